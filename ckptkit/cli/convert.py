"""``ckptkit convert SRC DST``: rewrite a checkpoint.

The plan of a conversion as text: every rename, drop, cast and gather, bytes and shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from ckptkit import api
from ckptkit.arguments import device_problem
from ckptkit.cli import ending
from ckptkit.cli.ending import progress_line
from ckptkit.cli.options import (
    columns,
    common_options,
    echo,
    echo_findings,
    echo_json,
    json_errors,
    keywords_of,
    options_of,
    path_argument,
    printable,
    styler,
    with_examples,
)
from ckptkit.options import ConvertOptions
from ckptkit.report import count_of, human_size

__all__ = ["command", "show_plan"]

_RULES = ("rename", "rename_file")
"""Options whose values the command is given together, as ``rules``."""


class _InOrder(click.Command):
    """A command that keeps the order in which the options `_RULES` are given, mixed as they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        values = {name: iter(given[name]) for name in _RULES if name in given}
        names = [parameter.name for parameter in order]
        ctx.params["rules"] = tuple((name, next(values[name])) for name in names if name in values)
        return super().parse_args(ctx, args)


def _rename_rules(given: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """The rules of ``--rename`` and ``--rename-file``."""
    from ckptkit.rewrite.rename import parse_rule, read_rules

    rules: list[tuple[str, str]] = []
    for option, value in given:
        rules.extend([parse_rule(value)] if option == "rename" else read_rules(value))
    return rules


def _complete_reference(*given: Any) -> Any:
    from ckptkit.cli.explain import complete_reference  # converting starts faster without

    return complete_reference(*given)


_rename_file = click.option(
    "--rename-file",
    multiple=True,
    expose_value=False,
    metavar="FILE",
    help="Rules from a file, one a line; # begins a comment.",
)


@click.command(
    "convert",
    cls=_InOrder,
    epilog=with_examples(
        "ckptkit convert ddp.pth clean.safetensors --strip-module",
        "ckptkit convert resume.pth weights.safetensors --weights-only --dtype bfloat16 --keep-dtype '*norm*'",
        "ckptkit convert ddp.pth clean.pth --strip-module --map-location cpu",
        "ckptkit convert big.pth out/model.safetensors --max-shard-size 5GB",
        "ckptkit convert old.pth new.pth --rename '^features\\.=>backbone.' --exclude 'head.*' --leave-out optimizer",
        "ckptkit convert model.pth model2.pth --map-location cuda:1=cuda:0 --dry-run",
        "ckptkit convert moco.pth backbone.safetensors --like torchvision:resnet50",
    ),
)
@path_argument("source", metavar="SRC")
@path_argument("destination", metavar="DST")
@options_of(
    ConvertOptions,
    behind={"rename": _rename_file},
    rename={"expose_value": False},
    like={"shell_complete": _complete_reference},
)
@common_options
def command(
    source: str,
    destination: str,
    rules: tuple[tuple[str, str], ...],
    map_location: tuple[str, ...],
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    color: str,
    **given: Any,
) -> int:
    """Rewrite SRC into DST, without executing or loading it.

    DST's ending chooses the container: .safetensors, or .pth .pt .pkl .ckpt .bin. A .pth keeps
    everything that is in SRC (optimizer, epoch, arguments, unknown objects). DST is either the old
    file or the complete new one, whatever happens. Before it gets its name every tensor is compared
    with its source, byte for byte.
    """
    with json_errors(as_json), progress_line(progress, quiet=quiet) as moved:
        report = api.convert(
            source,
            destination,
            rename=_rename_rules(rules),
            map_location=_map_location(map_location),
            progress=moved,
            **keywords_of(ConvertOptions, given),
        )
    details = report.details
    written = f"{printable(details['destination'])} was written" if details["written"] else ""
    code = ending.verdict(0, written)
    if as_json:
        echo_json(report.to_dict())
        return code
    if not details["written"]:
        show_plan(details)
    elif not quiet:
        plan = details["plan"]
        checked = "compared byte for byte" if details["checked"] else "not checked"
        shards = f" in {count_of(len(plan['shards']), 'shard')}" if plan["shards"] else ""
        echo(
            f"{printable(details['destination'])}: {plan['format']}, {count_of(plan['tensors'], 'tensor')}, "
            f"{human_size(plan['nbytes'])}{shards}, {checked}"
        )
    if not quiet:
        echo_findings(list(report.findings), styler(color), err=True)
    return code


def _map_location(given: tuple[str, ...]) -> str | dict[str, str] | None:
    """``cpu``, or a dict from ``OLD=NEW`` pairs.

    Raises:
        click.UsageError: both forms at once, one location twice, or a new one that torch does not have.
    """
    pairs = [text.partition("=") for text in given]
    for old, equals, new in pairs:
        if problem := device_problem(new if equals else old):
            raise click.UsageError(f"--map-location: {problem}")
    if any(not equals for _, equals, _ in pairs):
        if len(given) > 1:
            raise click.UsageError("--map-location takes one location for everything, or OLD=NEW pairs, not both")
        return given[0]
    table = {old: new for old, _, new in pairs}
    if len(table) != len(pairs):
        raise click.UsageError("--map-location maps one location twice")
    return table or None


_WAYS = ("copies", "casts", "gathers", "literals")

_SHOWN = 10
"""Lines of each kind; ``--json`` has them all."""


def show_plan(details: Mapping[str, Any]) -> None:
    """Print what would be done."""
    plan = details["plan"]
    echo(
        f"{printable(details['destination'])}: {plan['format']}, {count_of(plan['tensors'], 'tensor')}, "
        f"{plan['nbytes']:,} bytes"
    )
    rows = [[way, f"{plan[way]['count']:,}", f"{plan[way]['nbytes']:,}"] for way in _WAYS]
    for line in columns(rows, ["moved as", "steps", "bytes"], "lrr"):
        echo(line)
    for line in _changes(details, plan):
        echo(line)
    echo("dry run: nothing was written")


def _changes(details: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    name = printable
    yield from _some(
        "shard",
        plan["shards"],
        lambda s: f"{name(s['name'])}  {count_of(s['tensors'], 'tensor')}, {s['nbytes']:,} bytes",
    )
    yield from _some("tied", list(plan["aliases"].items()), lambda pair: f"{name(pair[0])} = {name(pair[1])}")
    yield from _some("rename", details["renames"], lambda r: f"{name(r['from'])} -> {name(r['to'])}")
    yield from _some("drop", details["dropped"], name)
    yield from _some("cast", details["casts"], lambda c: f"{name(c['name'])}  {c['from']} -> {c['to']}")
    yield from _some("gather", details["gathered"], name)
    cut = details["compacted"]
    if cut["storages"]:
        yield f"compact: {count_of(cut['storages'], 'storage')}, {human_size(cut['nbytes'])} that no tensor views"


def _some(kind: str, items: Sequence[Any], line: Callable[[Any], str]) -> Iterator[str]:
    """A line for each of the first items, and how many more there are."""
    for item in items[:_SHOWN]:
        yield f"{kind}: {line(item)}"
    if len(items) > _SHOWN:
        yield f"{kind}: and {len(items) - _SHOWN:,} more (--json lists all)"
