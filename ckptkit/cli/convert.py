"""``ckptkit convert SRC DST``: rewrite a checkpoint, or show the plan: every rename, drop, cast, gather and shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ckptkit import api
from ckptkit.arguments import device_problem
from ckptkit.cli import ending
from ckptkit.cli import options as ui
from ckptkit.cli.ending import progress_line
from ckptkit.options import ConvertOptions
from ckptkit.report import count_of, human_size, printable

if TYPE_CHECKING:
    from ckptkit.documents import ConvertDocument

__all__ = ["RENDERERS", "changes", "command", "step_rows", "text"]

_SHOWN = 10
"""Lines of each kind; ``--json`` has them all."""


def text(document: ConvertDocument, view: ui.View) -> Iterator[str]:
    """What was written in a line, or the plan."""
    plan = document["plan"]
    head = f"{printable(document['destination'])}: {plan['format']}, {count_of(plan['tensors'], 'tensor')}, "
    if document["written"]:
        checked = "compared byte for byte" if document["checked"] else "not checked"
        shards = f" in {count_of(len(plan['shards']), 'shard')}" if plan["shards"] else ""
        if not view.quiet:
            yield f"{head}{human_size(plan['nbytes'])}{shards}, {checked}"
        return
    yield f"{head}{plan['nbytes']:,} bytes"
    yield from ui.columns(step_rows(document), ["moved as", "steps", "bytes"], "lrr")
    for kind, items in changes(document):
        yield from (f"{kind}: {item}" for item in items[:_SHOWN])
        if len(items) > _SHOWN:
            yield f"{kind}: and {len(items) - _SHOWN:,} more (--json lists all)"
    yield "dry run: nothing was written"


def step_rows(document: ConvertDocument) -> list[list[str]]:
    """How many steps move how many bytes in each way."""
    plan = document["plan"]
    ways = [("copies", plan["copies"]), ("casts", plan["casts"]), ("gathers", plan["gathers"])]
    ways.append(("literals", plan["literals"]))
    return [[way, f"{steps['count']:,}", f"{steps['nbytes']:,}"] for way, steps in ways]


def changes(document: ConvertDocument) -> Iterator[tuple[str, list[str]]]:
    """What becomes another thing, by kind; kinds of which there is nothing are left out."""
    plan, cut = document["plan"], document["compacted"]
    found = {
        "shard": [
            f"{each['name']}  {count_of(each['tensors'], 'tensor')}, {each['nbytes']:,} bytes"
            for each in plan["shards"]
        ],
        "tied": [f"{name} = {other}" for name, other in plan["aliases"].items()],
        "rename": [f"{each['from']} -> {each['to']}" for each in document["renames"]],
        "drop": document["dropped"],
        "cast": [f"{each['name']}  {each['from']} -> {each['to']}" for each in document["casts"]],
        "gather": document["gathered"],
        "compact": [f"{count_of(cut['storages'], 'storage')}, {human_size(cut['nbytes'])} that no tensor views"],
    }
    for kind, items in found.items():
        if items and (kind != "compact" or cut["storages"]):
            yield kind, [*map(printable, items)]


RENDERERS: dict[str, ui.Renderer] = {"text": text, "markdown": ui.later("markdown.convert")}

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
    epilog=ui.with_examples(
        "ckptkit convert ddp.pth clean.safetensors --strip-module",
        "ckptkit convert resume.pth weights.safetensors --weights-only --dtype bfloat16 --keep-dtype '*norm*'",
        "ckptkit convert ddp.pth clean.pth --strip-module --map-location cpu",
        "ckptkit convert big.pth out/model.safetensors --max-shard-size 5GB",
        "ckptkit convert old.pth new.pth --rename '^features\\.=>backbone.' --exclude 'head.*' --leave-out optimizer",
        "ckptkit convert model.pth model2.pth --map-location cuda:1=cuda:0 --dry-run",
        "ckptkit convert moco.pth backbone.safetensors --like torchvision:resnet50",
    ),
)
@ui.path_argument("source", metavar="SRC")
@ui.path_argument("destination", metavar="DST")
@ui.options_of(
    ConvertOptions,
    behind={"rename": _rename_file},
    rename={"expose_value": False},
    like={"shell_complete": _complete_reference},
)
@ui.common_options(RENDERERS)
def command(
    source: str,
    destination: str,
    rules: tuple[tuple[str, str], ...],
    map_location: tuple[str, ...],
    progress: bool | None,
    output: str,
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
    with ui.json_errors(output == "json"), progress_line(progress, quiet=quiet) as moved:
        report = api.convert(
            source,
            destination,
            rename=_rename_rules(rules),
            map_location=_map_location(map_location),
            progress=moved,
            **ui.keywords_of(ConvertOptions, given),
        )
    document = report.to_dict()
    written = f"{printable(document['destination'])} was written" if document["written"] else ""
    code = ending.verdict(0, written)
    view = ui.View(ui.styler(color), quiet=quiet)
    ui.show(document, output, RENDERERS, view)
    if output == "text" and not quiet:
        for line in ui.finding_lines(document["findings"], view.style):
            ending.say(line)
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
