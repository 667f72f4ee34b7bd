"""What the commands share: options, colour, and how text from a file reaches a terminal."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import click

from ckptkit.arguments import Option, Options, device_problem, tolerance
from ckptkit.cli import ending
from ckptkit.errors import CkptkitError
from ckptkit.report import SCHEMA_VERSION, Finding, printable

__all__ = [
    "COLORS",
    "Style",
    "allow_part_option",
    "checked_devices",
    "columns",
    "common_options",
    "echo",
    "echo_findings",
    "echo_json",
    "ignore_checksums",
    "input_shape",
    "json_errors",
    "key_values",
    "keywords_of",
    "options_of",
    "path_argument",
    "printable",
    "styler",
    "terminal_width",
    "with_examples",
    "wrapped",
]

F = TypeVar("F", bound=Callable[..., Any])

Decorator = Callable[[Any], Any]

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
    """``--json``, ``-q``, ``--color`` and ``--debug``; and that the command is at work once it is called."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> Any:
        ending.begin(known=None)
        return function(*args, **options)

    made = cast(F, command)
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
        click.option(
            "--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Colour of the text output."
        ),
        click.option("-q", "--quiet", is_flag=True, help="No messages and no progress on stderr."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        made = option(made)
    return made


def options_of(
    declared: type[Options], *, behind: Mapping[str, Decorator] | None = None, **further: Mapping[str, Any]
) -> Callable[[F], F]:
    """The options of a command, as `ckptkit.options` declares them; `keywords_of` reads what was typed.

    Args:
        declared: its class there.
        behind: options that the command line alone has, each by the name of the one that it follows.
        further: by name, what else click is told of one.
    """

    def made(function: F) -> F:
        for name, option in reversed(declared.declared.items()):
            if behind is not None and name in behind:
                function = behind[name](function)
            function = _click_option(option, further.get(name, {}))(function)
        return function

    return made


def _click_option(option: Option[Any], further: Mapping[str, Any]) -> Decorator:
    told: dict[str, Any] = {"help": option.line, "metavar": option.metavar, **_CLICK.get(option.kind, {}), **further}
    if option.choices:
        told["type"] = click.Choice(option.choices)
    if option.kind != "flag" and option.default not in (None, ()):
        told |= {"default": option.default, "show_default": option.shows_default}
    switch = f"{option.typed}/--no-{option.name}" if option.kind == "switch" else option.typed
    return click.option(switch, option.name, **told)


def keywords_of(declared: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, as the function takes it.

    Raises:
        click.UsageError: a value is not of the form it must have.
    """
    found = {}
    for name, option in declared.declared.items():
        if name not in given:
            continue
        value = given[name]
        if option.kind == "pairs":
            value = key_values(option.typed, value)
        elif option.kind == "shapes":
            value = [input_shape(text) for text in value]
        found[name] = not value if option.default is True else value
    return found


def _checked_tolerance(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """`ckptkit.arguments.tolerance` says what can be one."""
    try:
        return tolerance(parameter.opts[0], value)
    except CkptkitError as error:
        raise click.BadParameter(str(error)) from None


def checked_devices(_: click.Context, parameter: click.Parameter, value: str | tuple[str, ...]) -> Any:
    """The value of ``--device``, whose parts are separated by commas, or the values of ``--location``."""
    for name in value.split(",") if isinstance(value, str) else value:
        problem = None if parameter.name == "device" and name.strip() == "auto" else device_problem(name.strip())
        if problem is not None:
            raise click.BadParameter(problem)
    return value


_CLICK: dict[str, dict[str, Any]] = {
    "flag": {"is_flag": True},
    "switch": {"default": None},
    "integer": {"type": int},
    "tolerance": {"type": float, "callback": _checked_tolerance},
    "device": {"callback": checked_devices},
    "texts": {"multiple": True},
    "pairs": {"multiple": True},
    "shapes": {"multiple": True},
}
"""What click is told of each kind of option."""


ignore_checksums = click.option(
    "--ignore-checksums", is_flag=True, help="Accept bytes that recorded checksums show to be others."
)
"""For files that were edited in place, whose checksums are stale."""


allow_part_option = click.option(
    "--allow-part", is_flag=True, help="Take one part of a sharded checkpoint as it is, without the others."
)
"""For whatever else refuses a part."""


def with_examples(*examples: str) -> str:
    """The epilog of a ``--help``: commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


def path_argument(name: str, **options: Any) -> Callable[[F], F]:
    """A file name that is left to the command to open, so that every refusal reads alike."""
    return click.argument(name, type=click.Path(path_type=str, readable=False), **options)


def styler(color: str) -> Style:
    """How to colour: always, never, or (auto) on a terminal where ``NO_COLOR`` is not set."""
    wanted = color == "always" or (color == "auto" and ending.stdout().isatty() and not os.environ.get("NO_COLOR"))
    return click.style if wanted else lambda text, **_: text


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; ``None``: it is none, and lines are as long as they are."""
    if not ending.stdout().isatty():
        return None
    import shutil

    width = shutil.get_terminal_size().columns
    return width if width >= _NARROWEST else None


def echo(text: str = "") -> None:
    """A line on stdout, colours kept as they were decided, whatever the terminal's encoding."""
    ending.write(encodable(text) + "\n")


def encodable(text: str) -> str:
    """The text with what stdout's encoding does not have replaced or escaped."""
    encoding = ending.stdout().encoding or "utf-8"
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
    ending.write(json.dumps(document, indent=2 if ending.stdout().isatty() else None) + "\n")


@contextmanager
def json_errors(as_json: bool) -> Iterator[None]:
    """Where JSON is asked for, an error is a document on stdout too; it is raised all the same."""
    try:
        yield
    except CkptkitError as error:
        if as_json:
            failure = {"type": type(error).__name__, "message": str(error)}
            with suppress(ending.OutputLostError):  # that it failed is what is to be told
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
            ending.say(line) if err else echo(line)
