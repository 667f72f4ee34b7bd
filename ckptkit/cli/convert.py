"""``ckptkit convert SRC DST``: rewrite a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ckptkit import api
from ckptkit.cli.options import (
    columns,
    common_options,
    echo,
    echo_findings,
    echo_json,
    json_errors,
    key_values,
    path_argument,
    printable,
    styler,
    with_examples,
)
from ckptkit.report import human_size

__all__ = ["command"]

_MAX_RENAMES_SHOWN = 10


@click.command(
    "convert",
    epilog=with_examples(
        "ckptkit convert ddp.pth clean.safetensors --strip-module",
        "ckptkit convert ddp.pth clean.pth --strip-module --map-location cpu",
        "ckptkit convert model.pth model2.pth --map-location cuda:1=cuda:0 --dry-run",
    ),
)
@path_argument("source", metavar="SRC")
@path_argument("destination", metavar="DST")
@click.option("--strip-module", is_flag=True, help="Take off every wrapper prefix: module., _orig_mod., nested.")
@click.option("--add-module", is_flag=True, help="Put one module. before every name.")
@click.option("--strip-prefix", metavar="P", help="Strip one leading prefix of whole segments.")
@click.option("--add-prefix", metavar="P", help="Put a prefix before every name.")
@click.option("--section", metavar="NAME", help="The weights to convert, where the file holds several.")
@click.option("--weights-only", is_flag=True, help="Drop all but the state_dict.")
@click.option(
    "--map-location",
    "locations",
    multiple=True,
    metavar="LOC",
    help="Device tags: 'cpu' for all, or OLD=NEW, repeatable; torch's meaning.",
)
@click.option("--to", metavar="FORMAT", help="torch-zip or safetensors; overrides DST's ending.")
@click.option("--metadata", "metadata", multiple=True, metavar="KEY=VALUE", help="Set in a safetensors header.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--force", is_flag=True, help="Overwrite DST if it exists.")
@click.option("--no-check", is_flag=True, help="Skip comparing the output with the source, byte for byte.")
@click.option("--progress/--no-progress", default=None, help="Progress on stderr; default: on a terminal.")
@common_options
def command(
    source: str,
    destination: str,
    locations: tuple[str, ...],
    metadata: tuple[str, ...],
    no_check: bool,
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    color: str,
    **options: Any,
) -> int:
    """Rewrite SRC into DST, without executing or loading it.

    DST's ending chooses the container: .safetensors, or .pth .pt .pkl .ckpt .bin. A .pth keeps
    everything that is in SRC (optimizer, epoch, arguments, unknown objects). DST is either the old
    file or the complete new one, whatever happens.
    """
    with json_errors(as_json), _progress_bar(source, progress, quiet=quiet) as moved:
        report = api.convert(
            source,
            destination,
            map_location=_map_location(locations),
            metadata=key_values("--metadata", metadata),
            check=not no_check,
            progress=moved,
            **options,
        )
    if as_json:
        echo_json(report.to_dict())
        return 0
    details = report.details
    if not details["written"]:
        _show_plan(details)
    elif not quiet:
        plan = details["plan"]
        checked = "compared byte for byte" if details["checked"] else "not checked"
        echo(
            f"{printable(destination)}: {plan['format']}, {plan['tensors']:,} tensors, "
            f"{human_size(plan['nbytes'])}, {checked}"
        )
    if not quiet:
        echo_findings(list(report.findings), styler(color), err=True)
    return 0


def _map_location(given: tuple[str, ...]) -> str | dict[str, str] | None:
    """``cpu``, or a dict from ``OLD=NEW`` pairs.

    Raises:
        click.UsageError: both forms at once, or one location twice.
    """
    pairs = [text.partition("=") for text in given]
    if any(not equals for _, equals, _ in pairs):
        if len(given) > 1:
            raise click.UsageError("--map-location takes one location for everything, or OLD=NEW pairs, not both")
        return given[0]
    table = {old: new for old, _, new in pairs}
    if len(table) != len(pairs):
        raise click.UsageError("--map-location maps one location twice")
    return table or None


def _show_plan(details: Any) -> None:
    plan = details["plan"]
    echo(
        f"{printable(details['destination'])}: {plan['format']}, {plan['tensors']:,} tensors, {plan['nbytes']:,} bytes"
    )
    rows = [[way, f"{plan[way]['count']:,}", f"{plan[way]['nbytes']:,}"] for way in ("copies", "gathers", "literals")]
    for line in columns(rows, ["moved as", "steps", "bytes"], "lrr"):
        echo(line)
    for name, kept in plan["aliases"].items():
        echo(f"tied: {printable(name)} = {printable(kept)}")
    renames = details["renames"]
    for rename in renames[:_MAX_RENAMES_SHOWN]:
        echo(f"rename: {printable(rename['from'])} -> {printable(rename['to'])}")
    if len(renames) > _MAX_RENAMES_SHOWN:
        echo(f"rename: and {len(renames) - _MAX_RENAMES_SHOWN:,} more (--json lists all)")
    echo("dry run: nothing was written")


@contextmanager
def _progress_bar(source: str, wanted: bool | None, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Bytes moved, on stderr: on a terminal, or when asked for; never when quiet."""
    if quiet or not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    import os

    total = os.path.getsize(source) if os.path.isfile(source) else 0
    with click.progressbar(length=total, label="writing", file=sys.stderr) as bar:
        yield bar.update
