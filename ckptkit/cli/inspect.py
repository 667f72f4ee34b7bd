"""``ckptkit inspect PATH...``: what is in the files, without running or loading them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from ckptkit import api
from ckptkit.cli import inspect_text
from ckptkit.cli.options import common_options, echo, echo_json, path_argument, styler, with_examples
from ckptkit.errors import CkptkitError, FileAccessError
from ckptkit.formats import SUFFIXES
from ckptkit.inspection import describe_error
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
@click.option("--depth", type=click.IntRange(1), default=3, show_default=True, help="Levels of the module tree.")
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
    depth: int,
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

    Nothing in a file is executed, and no tensor is read (but with --stats). A folder stands for the
    checkpoint files below it.
    """
    files: list[dict[str, Any]] = []
    for path in paths:
        try:
            files.extend(_inspect(found, section, filters, sort, stats) for found in _expand(path))
        except CkptkitError as error:
            files.append(describe_error(path, error))
    if as_json or output == "json":
        echo_json({"schema_version": SCHEMA_VERSION, "files": files})
    else:
        style = styler(color)
        for number, document in enumerate(files):
            if document["error"] is not None:
                continue
            if number and not flat:
                echo()
            if flat:
                lines = inspect_text.flat(document)
            elif output == "markdown":
                lines = inspect_text.markdown(document)
            else:
                lines = inspect_text.text(document, style, depth=depth, stats=stats)
            for line in lines:
                echo(line)
    for document in files:
        if document["error"] is not None:
            message = document["error"]["message"]
            place = "" if message.startswith(document["path"]) else f"{document['path']}: "
            sys.stdout.flush()
            click.echo(f"ckptkit: error: {place}{message}", err=True)
    return _exit_code(files, fail_on)


def _inspect(path: str, section: str | None, filters: tuple[str, ...], sort: str, stats: bool) -> dict[str, Any]:
    try:
        return api.inspect(path, section=section, filters=filters, sort=sort, stats=stats)
    except CkptkitError as error:
        return describe_error(path, error)


def _expand(path: str) -> Iterator[str]:
    """The path itself, or the checkpoint files below a folder, in order.

    Raises:
        FileAccessError: a folder without any.
    """
    if not os.path.isdir(path):
        yield path
        return
    found = 0
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                found += 1
                yield os.path.join(folder, name)
    if not found:
        raise FileAccessError(f"{path}: a folder without checkpoint files ({', '.join(sorted(SUFFIXES))})")


def _exit_code(files: list[dict[str, Any]], fail_on: str) -> int:
    if any(document["error"] is not None for document in files):
        return 2
    if fail_on == "never":
        return 0
    severities = [finding["severity"] for document in files for finding in document["findings"]]
    return int(any(at_least(severity, "warning" if fail_on == "warning" else "error") for severity in severities))
