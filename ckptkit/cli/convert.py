"""``ckptkit convert SRC DST``: rewrite a checkpoint, or show the plan: every rename, drop, cast, gather and shard."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from ckptkit import api
from ckptkit.arguments import device_problem
from ckptkit.cli import closing, ending
from ckptkit.cli import options as ui
from ckptkit.cli.closing import converted
from ckptkit.cli.ending import progress_line
from ckptkit.cli.tables import columns, wrapped
from ckptkit.options import ConvertOptions
from ckptkit.report import count_of, human_size, printable, share_of

if TYPE_CHECKING:
    from ckptkit.conversion.document import ConvertFolderDocument, ReplacedDocument
    from ckptkit.documents import ConvertDocument
    from ckptkit.report import FindingDocument

__all__ = ["RENDERERS", "changes", "command", "findings_of", "step_rows", "summary", "text"]

_SHOWN = 10
"""Lines of each kind; ``--json`` has them all."""


def text(document: ConvertDocument | ConvertFolderDocument, view: ui.View) -> Iterator[str]:
    """What was written in a line, or the plan; of a folder a line a file, and how many there are."""
    if "files" in document:
        yield from _folder_text(cast("ConvertFolderDocument", document), view)
        return
    if not document["written"] or not view.quiet:
        yield from wrapped(_line(document), view.width)
    if document["written"]:
        return
    yield from columns(step_rows(document), ["moved as", "steps", "bytes"], "lrr", view.width)
    for kind, items in changes(document):
        more = [f"and {len(items) - _SHOWN:,} more (--json lists all)"] if len(items) > _SHOWN else []
        for item in (*items[:_SHOWN], *more):
            yield from wrapped(f"{kind}: {item}", view.width)
    yield _DRY


def _line(document: ConvertDocument) -> str:
    plan = document["plan"]
    head = f"{printable(document['destination'])}: {plan['format']}, {count_of(plan['tensors'], 'tensor')}, "
    if not document["written"]:
        return f"{head}{plan['nbytes']:,} bytes"
    shards = f" in {count_of(len(plan['shards']), 'shard')}" if plan["shards"] else ""
    checked = closing.proven([document])
    if "part" in document:
        part = document["part"]
        own = f"{human_size(part['nbytes'])} in {count_of(len(part['shards']), 'shard')} of {len(plan['shards'])}"
        state = "was already there" if part["kept"] else checked
        return f"{printable(document['destination'])}: part {part['part']} of {part['of']}: {own}, {state}"
    backup = cast("ReplacedDocument", document)["backup"] if "backup" in document else None
    kept = f"; the old file is {printable(backup)}" if backup is not None else ""
    return f"{head}{human_size(plan['nbytes'])}{shards}, {checked}{kept}"


def _folder_text(document: ConvertFolderDocument, view: ui.View) -> Iterator[str]:
    if document["written"] and view.quiet:
        return
    lines = (_line(file) for file in document["files"] if file["error"] is None)
    for line in (*lines, *summary(document)):
        yield from wrapped(line, view.width)
    if not document["written"]:
        yield _DRY


_DRY = "dry run: nothing was written"


def summary(document: ConvertFolderDocument) -> Iterator[str]:
    """What was skipped; how many files were converted, their bytes before and after, and the time it took."""
    if document["passed_over"]:
        from ckptkit.formats.folder import passed_over_text

        yield passed_over_text(document["passed_over"])
    files = document["files"]
    done = [file for file in files if file["error"] is None]
    sizes = sum(file["source_nbytes"] for file in done), sum(file["plan"]["nbytes"] for file in done)
    count = len(files), "file", *(() if document["written"] else ("can be", "can be"))
    told = count_of(*count) if len(done) == len(files) else share_of(len(done), *count)
    lasted = closing.lasted(document["seconds"])
    yield f"{told} converted, {human_size(sizes[0])} to {human_size(sizes[1])}, in {lasted}"


def findings_of(document: ConvertFolderDocument) -> list[FindingDocument]:
    """What was found about the files that were converted: each code once, with the first file that has it."""
    found: dict[tuple[str, str], list[tuple[str, FindingDocument]]] = {}
    for file in document["files"]:
        for finding in file["findings"] if file["error"] is None else ():
            found.setdefault((finding["code"], finding["severity"]), []).append((file["source"], finding))
    merged: list[FindingDocument] = []
    for (path, first), *others in found.values():
        more = (
            f" (and likewise in {count_of(len({name for name, _ in others} - {path}), 'other file')})" if others else ""
        )
        merged.append({**first, "message": f"{path}: {first['message']}{more}"})
    return merged


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
        "compact": [f"{count_of(cut['storages'], 'storage')}, {human_size(cut['nbytes'])} that no tensor uses"],
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


_yes = click.option("-y", "--yes", is_flag=True, help="Replace files without asking.")

_rename_file = click.option(
    "--rename-file",
    multiple=True,
    expose_value=False,
    metavar="FILE",
    help="Rules from a file, one per line; # begins a comment.",
)


@click.command(
    "convert",
    cls=_InOrder,
    epilog=ui.with_examples(
        "ckptkit convert ddp.pth clean.safetensors --strip-module",
        "ckptkit convert resume.pth weights.safetensors --weights-only --dtype bfloat16 --keep-dtype '*norm*'",
        "ckptkit convert ddp.pth clean.pth --strip-module --map-location cpu",
        "ckptkit convert model.pth --in-place --backup --strip-module",
        "ckptkit convert a.pth b.pth converted/ --to safetensors --weights-only",
        "ckptkit convert s3://bucket/model.pth model.safetensors",
        "ckptkit convert big.pth out/model.safetensors --max-shard-size 5GB",
        "ckptkit convert run/step-9 out/model.safetensors --max-shard-size 5GB --part 3/8",
        "ckptkit convert run/step-9 out/model.safetensors --max-shard-size 5GB --finish",
        "ckptkit convert model.safetensors run/step-0 --to dcp --ranks 8",
        "ckptkit convert runs/ converted/ --to safetensors --weights-only",
        "ckptkit convert old.pth new.pth --rename '^features\\.=>backbone.' --exclude 'head.*' --leave-out optimizer",
        "ckptkit convert model.pth model2.pth --map-location cuda:1=cuda:0 --dry-run",
        "ckptkit convert moco.pth backbone.safetensors --like torchvision:resnet50",
    ),
)
@ui.path_argument("paths", nargs=-1, metavar="SRC... DST")
@ui.options_of(
    ConvertOptions,
    behind={"rename": _rename_file, "backup": _yes},
    rename={"expose_value": False},
)
@ui.common_options(RENDERERS)
def command(
    paths: tuple[str, ...],
    yes: bool,
    rules: tuple[tuple[str, str], ...],
    map_location: tuple[str, ...],
    progress: bool | None,
    output: str,
    quiet: bool,
    color: str,
    **given: Any,
) -> int:
    """Rewrite SRC into DST, or with --in-place into itself, without executing or loading it.

    The extension of DST determines the container: .safetensors, or .pth .pt .pkl .ckpt .bin.  A .pth keeps everything
    in SRC (optimizer, epoch, arguments, unknown objects).  DST is either the old file or the complete new one, whatever
    happens.  Before it gets its name, every tensor is compared with its source, byte for byte.  SRC may be a URL
    (https://, s3://, gs://, az://, hf://user/repo/path), FILE/MEMBER or FILE!MEMBER in a zip or tar archive, - for
    standard input, or compressed (.gz .xz .bz2 .zst).

    DST may be a folder (that exists or ends in a slash), and there may be several SRC: each output is named after its
    source, with the extension of --to.  If SRC is a folder, each checkpoint below it is converted to the same place
    below DST; this needs --to.  With --to dcp, DST is a folder for torch.distributed.checkpoint, which must be new or
    empty even with --force.  Files that are not checkpoints are skipped and counted, and a file that cannot be
    converted does not stop the others.

    Several processes can write the shards, on one machine or several: --jobs N, or --part I/N in each of N and then
    --finish, all with the same SRC, DST and options.  Readers see nothing of the output until it is complete.

    On a terminal, convert asks before it replaces a file without keeping a copy (--force, or --in-place without
    --backup); --yes skips the question.

    Exit code 0: everything was converted; 2: something could not be.
    """
    source, destination = _source_and_destination(paths, is_in_place=given["in_place"])
    asked = ui.keywords_of(ConvertOptions, given)
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        asked["confirm"] = _confirmed
    with ui.json_errors(output == "json"), progress_line(progress, quiet=quiet) as moved:
        report = api.convert(
            source,
            destination,
            rename=_rename_rules(rules),
            map_location=_map_location(map_location),
            progress=moved,
            **asked,
        )
    document = cast("ConvertDocument | ConvertFolderDocument", report.to_dict())
    if "files" in document:
        of_folder = cast("ConvertFolderDocument", document)
        code, found = _verdict(of_folder), findings_of(of_folder)
    else:
        part = f"part {document['part']['part']} of " if "part" in document else ""
        written = f"{part}{printable(document['destination'])} was written" if document["written"] else ""
        code, found = ending.verdict(0, written), document["findings"]
    view = ui.View(ui.styler(color), ui.terminal_width(), quiet)
    ui.show(document, output, RENDERERS, view)
    if output == "text" and not quiet:
        for line in ui.finding_lines(found, ui.styler(color, sys.stderr), ending.message_width()):
            ending.say(line)
        closing.summary(converted(document))
    return code


def _source_and_destination(paths: tuple[str, ...], *, is_in_place: bool) -> tuple[str | list[str], str | None]:
    """What is to be converted, and into what.

    Raises:
        click.UsageError: one of them is missing, or there are too many.
    """
    context = click.get_current_context()
    if not paths or (len(paths) == 1 and not is_in_place):
        raise click.MissingParameter(param_hint="'DST'" if paths else "'SRC'", param_type="argument", ctx=context)
    if is_in_place:
        return (paths[0] if len(paths) == 1 else [*paths]), None
    *sources, destination = paths
    if len(sources) == 1:
        return sources[0], destination
    if not os.path.isdir(destination) and not destination.endswith(("/", os.sep)):
        extra = f"extra argument{'s' if len(paths) > 3 else ''} ({' '.join(paths[2:])})"
        told = "convert several files into a folder (with a slash at its end) or with --in-place"
        raise click.UsageError(f"Got unexpected {extra}; {told}", context)
    return sources, destination


def _confirmed(paths: Sequence[str]) -> bool:
    """Whether whoever sits at the terminal lets files be replaced."""
    from ckptkit.conversion.outputs import other_names

    shown = [printable(path) for path in paths[:_SHOWN]]
    more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
    linked = sum(other_names(path) > 0 for path in paths)
    which = f" of {count_of(linked, 'file')}" if len(paths) > 1 else ""
    kept = f" except as other hard links{which}" if linked else ""
    them = "it" if len(paths) == 1 else "them"
    try:
        told = f"{', '.join(shown)}{more} will be replaced, and no copy is kept{kept}. Replace {them}?"
        return click.confirm("\n".join(wrapped(told, ending.message_width())), err=True)
    except click.Abort:  # the end of the input
        ending.say("")
        return False


def _verdict(document: ConvertFolderDocument) -> int:
    """The exit code for a folder, with what could not be converted told."""
    count = sum(file["written"] for file in document["files"])
    written = f"{count_of(count, 'file', 'was', 'were')} written below {printable(document['destination'])}"
    code = ending.verdict(0 if document["ok"] else 2, written if count else "")
    for finding in document["findings"]:
        closing.say(f"ckptkit: error: {printable(finding['message'])}")
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
            raise click.UsageError("--map-location takes either one location for everything or OLD=NEW pairs")
        return given[0]
    table = {old: new for old, _, new in pairs}
    if len(table) != len(pairs):
        raise click.UsageError("--map-location maps the same location twice")
    return table or None
