"""``ckptkit inspect PATH...``: what is in the files, without running or loading them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from ckptkit import api
from ckptkit.cli import inspect_text
from ckptkit.cli.options import (
    common_options,
    echo,
    echo_json,
    path_argument,
    printable,
    styler,
    terminal_width,
    with_examples,
)
from ckptkit.errors import CkptkitError
from ckptkit.formats import files_below
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
@common_options
def command(
    paths: tuple[str, ...],
    depth: int | None,
    flat: bool,
    filters: tuple[str, ...],
    sort: str,
    section: str | None,
    stats: bool,
    output: str,
    fail_on: str,
    as_json: bool,
    quiet: bool,
    color: str,
) -> int:
    """Show what is in checkpoints: container, kind, sections, tensors, findings.

    Nothing in a file is executed, and no tensor is read but a few single numbers, such as step counts
    (all are with --stats). A folder stands for the checkpoint files below it.
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
    documents: Iterator[dict[str, Any]] = (
        _survey(found, section, filters, sort, stats) if error is None else describe_error(found, error)
        for path in paths
        for found, error in _expanded(path)
    )
    if filters and not quiet:
        documents = map(_noted, documents)
    if as_json or output == "json":
        return _exit_code(list(map(_told, _echo_documents(documents))), fail_on)
    seen: list[dict[str, Any]] = []
    for document in documents:
        if document["error"] is None:
            if seen and not flat:
                echo()
            for line in render(document):
                echo(line)
        seen.append(_told(document))
    return _exit_code(seen, fail_on)


def _survey(path: str, section: str | None, filters: tuple[str, ...], sort: str, stats: bool) -> dict[str, Any]:
    try:
        with api.open(path, section=section) as file:
            return survey(file.checkpoint, filters=filters, sort=sort, stats=stats)
    except CkptkitError as error:
        return describe_error(path, error)


def _expanded(path: str) -> Iterator[tuple[str, CkptkitError | None]]:
    """The files a path stands for; or the path, and why it stands for none."""
    try:
        for found in _expand(path):
            yield found, None
    except CkptkitError as error:
        yield path, error


def _echo_documents(documents: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Write the JSON document while its files are read: what is written of one need not be kept for the next."""
    if sys.stdout.isatty():
        files = list(documents)
        echo_json({"schema_version": SCHEMA_VERSION, "files": [plain_document(document) for document in files]})
        yield from files
        return
    write = sys.stdout.write
    write(f'{{"schema_version": {SCHEMA_VERSION}, "files": [')
    for number, document in enumerate(documents):
        write(", " * (number > 0))
        for chunk in json_chunks(document):
            write(chunk)
        yield document
    write("]}\n")


def _noted(document: dict[str, Any]) -> dict[str, Any]:
    """The document; that --filter left nothing of it is told on stderr."""
    if document["error"] is None and not document["tensors"]:
        click.echo(f"ckptkit: {printable(document['path'])}: no tensor matches --filter", err=True)
    return document


def _told(document: dict[str, Any]) -> dict[str, Any]:
    """What of a document decides the exit code; its error, if it has one, is told on stderr."""
    if document["error"] is not None:
        message = document["error"]["message"]
        place = "" if message.startswith(document["path"]) else f"{document['path']}: "
        sys.stdout.flush()
        click.echo(f"ckptkit: error: {printable(place + message)}", err=True)
    return {"error": document["error"], "severities": [finding["severity"] for finding in document["findings"]]}


def _expand(path: str) -> Iterator[str]:
    """The path itself, or the checkpoint files below a folder, in order: an index in place of the shards it names.

    Raises:
        FileAccessError: a folder without any.
    """
    if not os.path.isdir(path):
        yield path
        return
    yield from files_below(path)


def _exit_code(files: list[dict[str, Any]], fail_on: str) -> int:
    if any(document["error"] is not None for document in files):
        return 2
    if fail_on == "never":
        return 0
    severities = [severity for document in files for severity in document["severities"]]
    return int(any(at_least(severity, "warning" if fail_on == "warning" else "error") for severity in severities))
