"""``ckptkit inspect PATH...``: what is in the files, without running or loading them."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ckptkit import api
from ckptkit.cli import ending, inspect_text
from ckptkit.cli.options import (
    common_options,
    echo,
    echo_json,
    ignore_checksums,
    path_argument,
    printable,
    styler,
    terminal_width,
    with_examples,
)
from ckptkit.errors import CkptkitError
from ckptkit.inspection import describe_error, json_chunks, plain_document, survey
from ckptkit.report import SCHEMA_VERSION, at_least

__all__ = ["command"]


@click.command(
    "inspect",
    epilog=with_examples(
        "ckptkit inspect model.pth",
        "ckptkit inspect --flat --filter '*.bias' model.pth",
        "ckptkit inspect --json runs/ | jq '.files[].state_dict'",
    ),
)
@path_argument("paths", nargs=-1, required=True)
@click.option("--depth", type=click.IntRange(1), help="Levels of the module tree; default: as many as are readable.")
@click.option("--flat", is_flag=True, help="One line a tensor, fields separated by tabs, for grep and cut.")
@click.option("--filter", "filters", multiple=True, metavar="GLOB", help="Only tensors whose name matches; repeatable.")
@click.option("--sort", type=click.Choice(["name", "size", "file"]), default="file", show_default=True, help="Order.")
@click.option("--section", metavar="NAME", help="The weights to select, where a file holds several.")
@click.option("--stats", is_flag=True, help="Read the data: min, max, mean, std, zeros, NaN, Inf of each tensor.")
@click.option("--format", "output", type=click.Choice(["text", "json", "markdown"]), default="text", help="Output.")
@click.option(
    "--fail-on",
    type=click.Choice(["warning", "error", "never"]),
    default="error",
    show_default=True,
    help="Exit 1 from this severity on.",
)
@ignore_checksums
@common_options
def command(
    paths: tuple[str, ...],
    depth: int | None,
    flat: bool,
    filters: tuple[str, ...],
    sort: str,
    section: str | None,
    stats: bool,
    ignore_checksums: bool,
    output: str,
    fail_on: str,
    as_json: bool,
    quiet: bool,
    color: str,
) -> int:
    """Show what is in checkpoints: container, kind, sections, tensors, findings.

    Nothing in a file is executed, and no tensor is read but a few single numbers, such as step counts
    (all are with --stats). A folder stands for the checkpoints below it, whatever their names; what else lies there is
    counted.
    """
    if flat:
        render = inspect_text.flat
    elif output == "markdown":
        from ckptkit.cli.inspect_markdown import markdown

        render = functools.partial(markdown, depth=depth, sort=sort)
    else:
        render = functools.partial(
            inspect_text.text, style=styler(color), depth=depth, stats=stats, sort=sort, width=terminal_width()
        )
    opening: dict[str, Any] = {"section": section, "ignore_checksums": ignore_checksums}
    passed_over: Counter[str] = Counter()
    files = [each for path in paths for each in _expanded(path, passed_over)]
    seen: list[dict[str, Any]] = []

    def documents() -> Iterator[dict[str, Any]]:
        """Each file's document; before the last is shown, the verdict is known."""
        for found, error in files:
            document = _survey(found, opening, filters, sort, stats) if error is None else describe_error(found, error)
            seen.append(_told(document))
            if filters and not quiet and document["error"] is None and not document["tensors"]:
                ending.say(f"ckptkit: {printable(document['path'])}: no tensor matches --filter")
            if len(seen) == len(files):
                ending.verdict(_exit_code(seen, fail_on))
            yield document

    if as_json or output == "json":
        _echo_documents(documents(), passed_over)
        return _exit_code(seen, fail_on)
    for document in documents():
        if document["error"] is None:
            if len(seen) > 1 and not flat:
                echo()
            for line in render(document):
                echo(line)
    if passed_over and not quiet:
        from ckptkit.formats.folder import passed_over_text

        if flat:
            ending.say(passed_over_text(passed_over))
        else:
            echo()
            echo(passed_over_text(passed_over))
    return _exit_code(seen, fail_on)


def _survey(path: str, opening: dict[str, Any], filters: tuple[str, ...], sort: str, stats: bool) -> dict[str, Any]:
    try:
        with api.open(path, **opening) as file:
            return survey(file.checkpoint, filters=filters, sort=sort, stats=stats)
    except CkptkitError as error:
        return describe_error(path, error)


def _expanded(path: str, passed_over: Counter[str]) -> Iterator[tuple[str, CkptkitError | None]]:
    """The path itself, or the checkpoints below a folder; and what cannot be read, with the reason."""
    if not os.path.isdir(path):
        yield path, None
        return
    from ckptkit.formats.folder import Surveyor
    from ckptkit.transfer.names import is_temporary_name

    surveyor = Surveyor(is_unfinished=is_temporary_name)
    nothing = surveyor.folder(path)
    found = surveyor.result()
    passed_over.update(found.passed_over)
    yield from ((each.path, None) for each in found.checkpoints)
    yield from found.unreadable
    if nothing is not None:
        yield path, nothing


def _echo_documents(documents: Iterator[dict[str, Any]], passed_over: Mapping[str, int]) -> None:
    """Write the JSON document while its files are read: what is written of one need not be kept for the next."""
    if ending.stdout().isatty():
        plain = [plain_document(document) for document in documents]
        echo_json({"schema_version": SCHEMA_VERSION, "passed_over": dict(passed_over), "files": plain})
        return
    write = ending.stdout().write
    write(f'{{"schema_version": {SCHEMA_VERSION}, "passed_over": {json.dumps(passed_over)}, "files": [')
    for number, document in enumerate(documents):
        write(", " * (number > 0))
        for chunk in json_chunks(document):
            write(chunk)
    write("]}\n")


def _told(document: dict[str, Any]) -> dict[str, Any]:
    """What of a document decides the exit code; its error, if it has one, is told on stderr."""
    if document["error"] is not None:
        message = document["error"]["message"]
        place = "" if message.startswith(document["path"]) else f"{document['path']}: "
        ending.write()  # what comes before it
        ending.say(f"ckptkit: error: {printable(place + message)}")
    return {"error": document["error"], "severities": [finding["severity"] for finding in document["findings"]]}


def _exit_code(files: list[dict[str, Any]], fail_on: str) -> int:
    if any(document["error"] is not None for document in files):
        return 2
    if fail_on == "never":
        return 0
    severities = [severity for document in files for severity in document["severities"]]
    return int(any(at_least(severity, "warning" if fail_on == "warning" else "error") for severity in severities))
