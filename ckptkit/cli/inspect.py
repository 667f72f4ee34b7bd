"""``ckptkit inspect PATH...``: what is in the files, without running or loading them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ckptkit import api, places
from ckptkit.bytesource import pace
from ckptkit.cli import closing, ending, inspect_text, tensor_tables
from ckptkit.cli import options as ui
from ckptkit.cli.closing import read
from ckptkit.cli.tables import width_of, wrapped
from ckptkit.cli.usage import Choice, IntRange
from ckptkit.errors import CkptkitError, FileAccessError
from ckptkit.inspection import describe_error, json_chunks, plain_document, survey
from ckptkit.options.storage import local, session_of
from ckptkit.report import SCHEMA_VERSION, Severity, at_least, printable

if TYPE_CHECKING:
    from ckptkit.fleet import Outcome
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import InspectDocument, InspectedFile, UnreadFile

__all__ = ["RENDERERS", "command", "lines"]

RENDERERS: dict[str, ui.Renderer] = {
    "text": inspect_text.text,
    "markdown": ui.later("markdown.inspect"),
    "html": ui.later("html.inspect"),
}
"""Of one file."""


@click.command(
    "inspect",
    epilog=ui.with_examples(
        "ckptkit inspect model.pth",
        "ckptkit inspect --flat --filter '*.bias' model.pth",
        "ckptkit inspect --brief runs/",
        "ckptkit inspect --json runs/ | jq '.files[].state_dict'",
        "ckptkit inspect archive.zip/a/model.pth",
        "ckptkit inspect hf://user/repo s3://bucket/run/step-9",
    ),
)
@ui.path_argument("paths", nargs=-1, metavar="PATHS...")
@click.option("--depth", type=IntRange(1), help="Levels of the module tree; default: as many as remain readable.")
@click.option("--flat", is_flag=True, help="One line per tensor with tab-separated fields, for grep and cut.")
@click.option("--brief", is_flag=True, help="One line per file.")
@click.option(
    "--top",
    "largest",
    type=IntRange(0),
    default=0,
    metavar="N",
    help="The N largest tensors instead of the tree.",
)
@click.option("--filter", "filters", multiple=True, metavar="GLOB", help="Only tensors whose name matches; repeatable.")
@click.option(
    "--sort", type=Choice(["name", "size", "file"]), default="file", show_default=True, help="Order of the tensors."
)
@click.option("--section", metavar="NAME", help="Weights to select, if a file has several.")
@ui.tag_option
@ui.tp_rules_option
@click.option(
    "--stats", is_flag=True, help="Read the data and show min, max, mean, std, zeros, NaN and Inf of each tensor."
)
@click.option(
    "--fail-on",
    type=Choice(["warning", "error", "never"]),
    default="error",
    show_default=True,
    help="Exit with 1 from this severity on.",
)
@ui.files_from_option
@ui.jobs_option
@ui.ignore_checksums
@ui.storage_option
@ui.common_options(RENDERERS)
def command(
    paths: tuple[str, ...],
    depth: int | None,
    flat: bool,
    brief: bool,
    largest: int,
    filters: tuple[str, ...],
    sort: str,
    section: str | None,
    tag: str | None,
    tp_rules: str | None,
    stats: bool,
    files_from: str | None,
    jobs: int | None,
    ignore_checksums: bool,
    storage_options: dict[str, Any],
    fail_on: str,
    output: str,
    quiet: bool,
    color: str,
) -> int:
    """Show what is in checkpoints: container, kind, sections, tensors, findings.

    Nothing in a file is executed, and no tensor is read except a few single numbers, such as step counts (--stats reads
    all).  A folder means the checkpoints below it, whatever their names; other files are counted.  A folder that
    several processes wrote (FSDP, DeepSpeed, Megatron, torch.distributed.checkpoint) is one checkpoint, and a folder
    that names its last step means that step.  FILE/MEMBER or FILE!MEMBER is a file in a zip or tar archive, - is
    standard input, and gzip, xz, bzip2 or zstd compression is read transparently.  From a URL (https://, s3://, gs://,
    az://, hf://user/repo[@revision][/path]) only the bytes needed are fetched; a bucket prefix or a repository is a
    folder.
    """
    if not paths and files_from is None:
        raise click.MissingParameter(param=_paths_of(click.get_current_context()))
    with ui.json_errors(output == "json"):
        given = ui.with_listed(paths, files_from)
        if not given:
            raise FileAccessError(f"{files_from}: lists no files to inspect", path=files_from)
        click.get_current_context().with_resource(session_of(storage_options, *given))
        given = local(given)
    opening: dict[str, Any] = {"section": section, "ignore_checksums": ignore_checksums}
    of_folders = {**opening, "tag": tag, "tp_rules": tp_rules}
    passed_over: Counter[str] = Counter()
    files = [each for path in given for each in _expanded(path, tag or tp_rules, passed_over)]
    named = set(given)
    one_line = _one_line(flat, brief)
    widest = max((width_of(printable(path)) for path, _ in files), default=0)
    view = ui.View(ui.styler(color), ui.terminal_width(), quiet, depth, sort, largest=largest, paths=widest)
    shown = one_line if one_line and output != "json" else output
    is_shared = len(files) > 1 and _are_shared(len(files), jobs)
    as_typed = _Asked(
        "", None, opening, filters, stats, shown, view.style is click.style, view._replace(style=_plain, seconds={})
    )
    seen: list[_Seen] = []

    def documents() -> Iterator[Survey | UnreadFile]:
        """Each file's document; before the last is shown, the verdict is known."""
        tasks = []
        for found, error in files:
            is_given = found in named and (len(given) == 1 or places.isdir(found))
            tasks.append(as_typed._replace(path=found, error=error, opening=of_folders if is_given else opening))
        for document in _shared(tasks, jobs) if is_shared else _one_by_one(tasks):
            seen.append(_told(document))
            if filters and not quiet and document["error"] is None and not document["tensors"]:
                closing.say(f"ckptkit: {printable(document['path'])}: no tensor matches --filter")
            if len(seen) == len(files):
                ending.verdict(_exit_code(seen, fail_on))
                if output == "text" and not flat and len(seen) > 1:
                    closing.summary(read(len(seen), sum(each.nbytes for each in seen), len(_unread(seen))))
            yield document

    if output == "json":
        _echo_documents(documents(), passed_over)
        return _exit_code(seen, fail_on)
    render = _as_shown if is_shared else _RENDERERS[shown]
    _echo_text(documents(), passed_over, render, view, output if one_line is None else one_line)
    return _exit_code(seen, fail_on)


def _one_line(flat: bool, brief: bool) -> str | None:
    """The renderer of a line a tensor or a file, where one is asked for."""
    if flat and brief:
        raise click.UsageError("--flat and --brief: give only one of them")
    return "flat" if flat else "brief" if brief else None


def _echo_text(
    documents: Iterator[Any], passed_over: Mapping[str, int], render: ui.Renderer, view: ui.View, output: str
) -> None:
    """Print the files' lines as they come; those that programs read are all that stdout gets."""
    if output not in RENDERERS:
        for document in documents:
            if document["error"] is None:
                for line in render(document, view):
                    ui.echo(line)
        if passed_over and not view.quiet:
            from ckptkit.formats.folder import passed_over_text

            closing.say(passed_over_text(passed_over))
        return
    for line in (_page if output == "html" else lines)(documents, passed_over, render, view):
        ui.echo(line)


def _paths_of(context: click.Context) -> click.Parameter:
    return next(parameter for parameter in context.command.params if parameter.name == "paths")


_RENDERERS: dict[str, ui.Renderer] = {**RENDERERS, "flat": tensor_tables.flat, "brief": inspect_text.brief}


def _plain(text: str, **_: Any) -> str:
    return text


class _Asked(NamedTuple):
    """One file, and how it is to be shown, as plain data.

    Attributes:
        path: the file.
        error: why it cannot be read, where that is known.
        opening: how it is opened.
        output: ``"json"``, ``"flat"``, ``"brief"`` or a renderer's name.
        is_colored: whether it is colored.
        view: all else of how it is shown.
    """

    path: str
    error: CkptkitError | None
    opening: dict[str, Any]
    filters: tuple[str, ...]
    stats: bool
    output: str
    is_colored: bool
    view: ui.View


def _surveyed(asked: _Asked) -> Survey | UnreadFile:
    try:
        if asked.error is not None:
            raise asked.error
        with api.open(asked.path, **asked.opening) as file:
            histograms = asked.stats and asked.output == "html"
            order = asked.view.sort
            return survey(file.checkpoint, filters=asked.filters, sort=order, stats=asked.stats, histograms=histograms)
    except CkptkitError as error:
        return describe_error(asked.path, error)


def _one_by_one(tasks: Sequence[_Asked]) -> Iterator[Survey | UnreadFile]:
    """The documents of files as this process makes them."""
    sizes = None if pace.tell is None else [*map(_nbytes, tasks)]
    if sizes is not None:
        pace.expect(len(tasks), 0 if any(map(_is_far, tasks)) else sum(sizes))
    for number, task in enumerate(tasks):
        document = _surveyed(task)
        pace.finish(sizes[number] if sizes else 0)
        yield document


def _nbytes(asked: _Asked) -> int:
    """The bytes that are read of a file: all of them, where statistics are asked for."""
    if not asked.stats or _is_far(asked):
        return 0
    from ckptkit.released.selection import size_of  # few are asked for them

    return size_of(asked.path)


def _is_far(asked: _Asked) -> bool:
    return places.is_url(asked.path)


def _are_shared(count: int, jobs: int | None) -> bool:
    from ckptkit.transfer.many import Workers  # a file alone is shown sooner without

    return Workers(jobs=jobs).are_others(count)


def _shared(tasks: Sequence[_Asked], jobs: int | None) -> Iterator[Any]:
    """The documents of files as other processes show them: with ``lines``, and of the tensors whether there are any."""
    from ckptkit.transfer.many import Workers, side_by_side

    return side_by_side(tasks, _shown, workers=Workers(jobs=jobs), nbytes=_nbytes, lost=_lost, is_far=_is_far)


def _shown(asked: _Asked, threads: int = 1) -> dict[str, Any]:
    return _with_lines(_surveyed(asked), asked)


def _lost(asked: _Asked, outcome: Outcome[Any]) -> dict[str, Any]:
    error = outcome.error or FileAccessError(f"{asked.path}: {outcome.text}", path=asked.path)
    return _with_lines(describe_error(asked.path, error), asked)


def _with_lines(document: Survey | UnreadFile, asked: _Asked) -> dict[str, Any]:
    view = asked.view._replace(style=ui.styler("always" if asked.is_colored else "never"))
    lines: Iterable[str] = ()
    if asked.output == "json":
        lines = ["".join(json_chunks(document))]
    elif document["error"] is None or asked.output == "html":
        lines = _RENDERERS[asked.output](document, view)
    findings = [{"severity": finding["severity"]} for finding in document["findings"]]
    told = {"path": document["path"], "size": document["size"], "error": document["error"], "findings": findings}
    return {**told, "tensors": [True] * bool(document["tensors"]), "lines": [*lines]}


def _as_shown(document: Any, view: ui.View) -> Iterator[str]:
    """The renderer of what `_shared` gives."""
    yield from document["lines"]


def lines(
    files: Iterable[InspectedFile | Survey | UnreadFile],
    passed_over: Mapping[str, int],
    render: ui.Renderer,
    view: ui.View,
) -> Iterator[str]:
    """The files of a document, an empty line before each but the first, and what was skipped."""
    for number, document in enumerate(files):
        if document["error"] is None:
            if number:
                yield ""
            yield from render(document, view)
    if passed_over and not view.quiet:
        from ckptkit.formats.folder import passed_over_text

        yield ""
        yield from wrapped(passed_over_text(passed_over), view.width)


def _page(files: Iterable[Any], passed_over: Mapping[str, int], render: ui.Renderer, view: ui.View) -> Iterator[str]:
    """The same as a page."""
    from ckptkit.cli import html

    return html.inspected((render(document, view) for document in files), passed_over)


def _expanded(path: str, asked: str | None, passed_over: Counter[str]) -> Iterator[tuple[str, CkptkitError | None]]:
    """The path itself, or the checkpoints below a folder; and what cannot be read, with the reason."""
    if not places.isdir(path):
        yield path, None
        return
    from ckptkit.formats.distributed.around import sharded_in

    try:
        if asked is not None or sharded_in(path) is not None:
            yield path, None
            return
    except CkptkitError as error:
        yield path, error
        return
    from ckptkit.formats.folder import Surveyor
    from ckptkit.places import is_temporary_name

    surveyor = Surveyor(is_unfinished=is_temporary_name)
    nothing = surveyor.folder(path)
    found = surveyor.result()
    passed_over.update(found.passed_over)
    yield from ((each.path, None) for each in found.checkpoints)
    yield from found.unreadable
    if nothing is not None:
        yield path, nothing


def _echo_documents(documents: Iterator[Any], passed_over: Mapping[str, int]) -> None:
    """Write the JSON document while its files are read: what is written of one need not be kept for the next."""
    if ending.stdout().isatty():
        plain: Any = [
            json.loads(each["lines"][0])
            if "lines" in each
            else each
            if each["error"] is not None
            else plain_document(each)
            for each in documents
        ]
        whole: InspectDocument = {
            "schema_version": SCHEMA_VERSION,
            "passed_over": dict(passed_over),
            "files": plain,
        }
        ui.echo_json(whole)
        return
    write = ending.stdout().write
    write(f'{{"schema_version": {SCHEMA_VERSION}, "passed_over": {json.dumps(passed_over)}, "files": [')
    for number, document in enumerate(documents):
        write(", " * (number > 0))
        for chunk in _as_shown(document, ui.View()) if "lines" in document else json_chunks(document):
            write(chunk)
    write("]}\n")


class _Seen(NamedTuple):
    """What of a document decides the exit code."""

    is_read: bool
    is_hostile: bool
    severities: list[Severity]
    nbytes: int


def _told(document: Survey | UnreadFile) -> _Seen:
    """What of a document decides the exit code; its error, if it has one, is told on stderr."""
    if document["error"] is not None:
        message = document["error"]["message"]
        place = "" if message.startswith(document["path"]) else f"{document['path']}: "
        ending.write()  # what comes before it
        closing.say(f"ckptkit: error: {printable(place + message)}")
    severities = [finding["severity"] for finding in document["findings"]]
    return _Seen(document["error"] is None, bool(document["findings"]), severities, document["size"] or 0)


def _unread(files: list[_Seen]) -> list[_Seen]:
    return [file for file in files if not file.is_read]


def _exit_code(files: list[_Seen], fail_on: str) -> int:
    unread = _unread(files)
    if unread:
        return 1 if all(file.is_hostile for file in unread) else 2
    if fail_on == "never":
        return 0
    severities = [severity for file in files for severity in file.severities]
    return int(any(at_least(severity, "warning" if fail_on == "warning" else "error") for severity in severities))
