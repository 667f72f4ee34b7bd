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
from ckptkit.report import SCHEMA_VERSION, Finding, printable

__all__ = [
    "COLORS",
    "Style",
    "columns",
    "common_options",
    "echo",
    "echo_findings",
    "echo_json",
    "input_shape",
    "json_errors",
    "key_values",
    "path_argument",
    "printable",
    "styler",
    "terminal_width",
    "with_examples",
    "wrapped",
]

F = TypeVar("F", bound=Callable[..., Any])

Style = Callable[..., str]
"""Like ``click.style``, or a function that leaves text as it is."""

COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}
"""Of the severities of findings."""

_SYMBOLS = str.maketrans({"‥": "..", "…": "...", "\N{MULTIPLICATION SIGN}": "x"})
"""What stands for the symbols of our own on a terminal that does not have them."""

_NARROWEST = 40
"""Columns of a terminal below which nothing is cut: whoever says so is no terminal."""

_LEAST_NOTE, _LEAST_NAME = 12, 16
"""Characters that a table's last and widest columns keep however narrow the terminal is."""


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
    return click.argument(name, type=click.Path(path_type=str, readable=False), **options)


def styler(color: str) -> Style:
    """How to colour: always, never, or (auto) on a terminal where ``NO_COLOR`` is not set."""
    wanted = color == "always" or (color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    return click.style if wanted else lambda text, **_: text


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; ``None``: it is none, and lines are as long as they are."""
    if not sys.stdout.isatty():
        return None
    import shutil

    width = shutil.get_terminal_size().columns
    return width if width >= _NARROWEST else None


def echo(text: str = "") -> None:
    """A line on stdout, colours kept as they were decided, whatever the terminal's encoding."""
    click.echo(encodable(text), color=True)


def encodable(text: str) -> str:
    """The text with what stdout's encoding does not have replaced or escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_SYMBOLS).encode(encoding, "backslashreplace").decode(encoding)
    return text


def columns(rows: list[list[str]], headers: list[str], align: str, width: int | None = None) -> list[str]:
    """The lines of a table: two spaces between columns, each aligned as ``align`` says (``"lr"``).

    Args:
        rows: cells.
        headers: of the columns.
        align: ``"l"`` or ``"r"`` for each.
        width: characters a line may have; the last column is cut first, then the widest of text.
    """
    table = [headers, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    if width is not None:
        last = len(widths) - 1
        textual = [i for i, a in enumerate(align) if a == "l"]
        widest = max(textual, key=widths.__getitem__, default=0)
        for i, least in ((last, _LEAST_NOTE), (widest, _LEAST_NAME)):
            surplus = sum(widths) + 2 * last - width
            if surplus > 0 and align[i] == "l":
                widths[i] = min(widths[i], max(widths[i] - surplus, least))
    lines = []
    for row in table:
        cells = ((_cut(c, w), w, a) for c, w, a in zip(row, widths, align, strict=True))
        lines.append("  ".join(c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in cells).rstrip())
    return lines


def _cut(cell: str, width: int) -> str:
    """The cell in so many characters: the beginning, and of long ones the end, which names differ by."""
    if len(cell) <= width:
        return cell
    tail = width // 3 if width > 2 * _LEAST_NAME else 0
    return f"{cell[: width - tail - 1]}…{cell[len(cell) - tail :] if tail else ''}"


def wrapped(text: str, width: int | None) -> Iterator[str]:
    """The text in lines of at most so many characters where its words allow it, all but the first indented."""
    if width is None or len(text) <= width:
        yield text
        return
    line = text[: len(text) - len(text.lstrip(" "))]
    indent = line + "    "
    is_empty = True
    for word in text.split():
        if not is_empty and len(line) + 1 + len(word) > width:
            yield line
            line, is_empty = indent, True
        line += word if is_empty else f" {word}"
        is_empty = False
    yield line


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


def input_shape(text: str) -> tuple[int, ...]:
    """The shape that was given to ``--input-shape``.

    Raises:
        click.UsageError: it is none.
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise click.UsageError(
            f"--input-shape {text!r}: whole numbers separated by commas are expected, as 1,3,224,224"
        )
    return shape


def echo_findings(findings: list[Finding], style: Style, *, err: bool = False) -> None:
    """One line a finding, and its fix below it."""
    for finding in findings:
        label = style(finding.severity, fg=COLORS[finding.severity], bold=finding.severity == "error")
        lines = [f"{label}: {printable(finding.message)} [{finding.code}]"]
        if finding.fix:
            lines.append(f"    {printable(finding.fix)}")
        for line in lines:
            click.echo(line, err=True, color=True) if err else echo(line)
