"""What the commands share: options, colour, and how text from a file reaches a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from ckptkit.errors import CkptkitError
from ckptkit.report import SCHEMA_VERSION, Finding

__all__ = [
    "Style",
    "columns",
    "common_options",
    "echo",
    "echo_findings",
    "echo_json",
    "json_errors",
    "key_values",
    "path_argument",
    "printable",
    "styler",
    "with_examples",
]

F = TypeVar("F", bound=Callable[..., Any])

Style = Callable[..., str]
"""Like ``click.style``, or a function that leaves text as it is."""

_COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}


def common_options(function: F) -> F:
    """``--json``, ``-q``, ``--color`` and ``--debug``."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
        click.option(
            "--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Colour of the text output."
        ),
        click.option("-q", "--quiet", is_flag=True, help="No messages and no progress on stderr."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        function = option(function)
    return function


def with_examples(*examples: str) -> str:
    """The epilog of a ``--help``: commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


def path_argument(name: str, **options: Any) -> Callable[[F], F]:
    """A file name that is left to the command to open, so that every refusal reads alike."""
    return click.argument(name, type=click.Path(path_type=str), **options)


def styler(color: str) -> Style:
    """How to colour: always, never, or (auto) on a terminal where ``NO_COLOR`` is not set."""
    wanted = color == "always" or (color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    return click.style if wanted else lambda text, **_: text


def printable(text: str) -> str:
    """Text from a file, with what a terminal would act upon (control characters) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def echo(text: str = "") -> None:
    """A line on stdout, colours kept as they were decided, whatever the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), color=True)


def columns(rows: list[list[str]], headers: list[str], align: str) -> list[str]:
    """The lines of a table: two spaces between columns, each aligned as ``align`` says (``"lr"``)."""
    table = [headers, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    lines = []
    for row in table:
        cells = (c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines


def echo_json(document: Any) -> None:
    """A JSON document on stdout: indented for people at a terminal, on one line (and faster) for programs.

    Non-ASCII is escaped, so that any terminal and any name will do.
    """
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None))


@contextmanager
def json_errors(as_json: bool) -> Iterator[None]:
    """Where JSON is asked for, an error is a document on stdout too; it is raised all the same."""
    try:
        yield
    except CkptkitError as error:
        if as_json:
            failure = {"type": type(error).__name__, "message": str(error)}
            echo_json({"schema_version": SCHEMA_VERSION, "ok": False, "error": failure})
        raise


def key_values(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """The ``KEY=VALUE`` pairs given to a repeatable option.

    Raises:
        click.UsageError: one has no key or no ``=``.
    """
    pairs = [(text, *text.partition("=")) for text in given]
    for text, key, equals, _ in pairs:
        if not key or not equals:
            raise click.UsageError(f"{option} {text!r}: KEY=VALUE is expected")
    return {key: value for _, key, _, value in pairs}


def echo_findings(findings: list[Finding], style: Style, *, err: bool = False) -> None:
    """One line a finding, and its fix below it."""
    for finding in findings:
        label = style(finding.severity, fg=_COLORS[finding.severity], bold=finding.severity == "error")
        lines = [f"{label}: {printable(finding.message)} [{finding.code}]"]
        if finding.fix:
            lines.append(f"    {printable(finding.fix)}")
        for line in lines:
            click.echo(line, err=True, color=True) if err else echo(line)
