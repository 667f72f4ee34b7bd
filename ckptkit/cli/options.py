"""What the commands share: options, color, and how a document reaches a terminal.

A command makes a document (`ckptkit.documents`), and a renderer makes lines of it: a function of the document and a
`View`, and of nothing else, so that a document that was saved gives the same lines.  Each command has a table of its
renderers, whose names are the values of ``--format``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO, TypeVar, cast

import click

from ckptkit import places
from ckptkit.arguments import Option, Options, device_problem, tolerance
from ckptkit.cli import closing, ending
from ckptkit.cli.tables import wrapped
from ckptkit.cli.usage import Choice, IntRange
from ckptkit.errors import CkptkitError
from ckptkit.options.storage import local, storage_options, typed_options
from ckptkit.report import SCHEMA_VERSION, FindingDocument, printable

__all__ = [
    "COLORS",
    "Renderer",
    "Style",
    "View",
    "allow_part_option",
    "checked_devices",
    "common_options",
    "echo",
    "echo_error",
    "echo_json",
    "files_from_option",
    "finding_lines",
    "ignore_checksums",
    "input_shape",
    "jobs_option",
    "json_errors",
    "key_values",
    "keywords_of",
    "later",
    "options_of",
    "path_argument",
    "printable",
    "show",
    "storage_option",
    "styler",
    "tag_option",
    "terminal_width",
    "tp_rules_option",
    "with_examples",
    "with_listed",
]

F = TypeVar("F", bound=Callable[..., Any])

Decorator = Callable[[Any], Any]

Style = Callable[..., str]
"""Like ``click.style``, or a function that leaves text as it is."""


class View(NamedTuple):
    """How a document is to be shown.

    Attributes:
        style: how to color.
        width: characters of a line on the terminal; ``None``: nothing is cut.
        quiet: only what the document is for.
        depth: levels of a tree; ``None``: as many as are still readable.
        sort: the order of a tree: ``"file"``, ``"name"`` or ``"size"``.
        top: rows of each list.
        largest: how many of the largest tensors are listed in place of the tree; 0: the tree is shown.
        paths: columns of the longest path, where each file is one line.
        written: the file that was written; ``None``: none.
        started: when, in UTC, as ISO 8601 without a zone.
        seconds: how long each file took, by path.
    """

    style: Style = lambda text, **_: text
    width: int | None = None
    quiet: bool = False
    depth: int | None = None
    sort: str = "file"
    top: int = 10
    largest: int = 0
    paths: int = 0
    written: str | None = None
    started: str = "1970-01-01T00:00:00"
    seconds: Mapping[str, float] = MappingProxyType({})


Renderer = Callable[[Any, View], Iterator[str]]
"""From a command's document to lines of text."""


def later(name: str) -> Renderer:
    """The renderer ``name`` of `ckptkit.cli`, whose module is imported when it is used: ``"markdown.diff"``."""
    module, _, function = name.partition(".")

    def render(document: Any, view: View) -> Iterator[str]:
        lines: Iterator[str] = getattr(import_module(f"ckptkit.cli.{module}"), function)(document, view)
        return lines

    return render


COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}
"""Of the severities of findings."""

_SYMBOLS = str.maketrans(
    {
        "‥": "..",
        "…": "...",
        "\N{MULTIPLICATION SIGN}": "x",
        "█": "#",
        **dict.fromkeys("▌▋▊▉", "+"),
        **dict.fromkeys("▏▎▍", "-"),
    }
)
"""What stands for the symbols of our own on a terminal that does not have them."""

_REPLACED = 6
"""Columns of a line that are kept for what stands for those symbols: it takes more than they do."""


_output_option = click.option(
    "-o",
    "--output",
    "output_file",
    metavar="FILE",
    callback=lambda _, __, value: None if value == "-" else value,
    help="Write the output to FILE, completely or not at all.",
)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Every text among values that may be several."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple | list):
            yield from _texts(value)


def common_options(
    renderers: Mapping[str, Renderer], *, writes_file: bool = True, **format_option: Any
) -> Callable[[F], F]:
    """``--format``, ``--json``, ``--output``, ``-q``, ``--color``, ``--debug``; a command works once it is called.

    The command is given the ``output`` that is asked for: the name of a renderer, or ``"json"``; where ``--format`` may
    be repeated, all that are.

    Args:
        renderers: of the command.
        writes_file: whether the output may go to a file; not where the command has such an option of its own.
        format_option: what is special about its ``--format``.
    """
    text, *others = renderers
    kinds = Choice([text, "json", *others])
    format_option = {"type": kinds, "default": text, "help": "Output format.", **format_option}

    def decorated(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, as_json: bool, output: Any, output_file: str | None = None, **options: Any) -> Any:
            ending.begin(known=None)
            closing.begin()
            if as_json:
                output = (*output, "json") if isinstance(output, tuple) else "json"
            if "html" in (output or ()) and output_file is None and ending.stdout().isatty():
                raise click.UsageError("--format html: a page is for a browser; give --output FILE, such as page.html")
            with (
                json_errors(
                    output_file is not None and "json" in ([output] if isinstance(output, str) else output or ())
                ),
                _into_file(output_file, _texts([*args, *options.values()])),
                ending.watched(quiet=options["quiet"] or "progress" in options),
            ):
                code = function(*args, output=output, **options)
            if not options["quiet"]:
                closing.sum_up()
            return code

        made = cast(F, command)
        for option in (
            click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
            click.option(
                "--color",
                type=Choice(["auto", "always", "never"]),
                default="auto",
                help="Color of the text output.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="No messages and no progress on stderr."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
            *([_output_option] if writes_file else ()),
            click.option("--format", "output", **format_option),
        ):
            made = option(made)
        return made

    return decorated


def _into_file(path: str | None, given: Iterable[str]) -> AbstractContextManager[None]:
    if path is None:
        return nullcontext()
    from ckptkit.cli.output_file import into_file  # few commands write one

    return into_file(path, given)


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
            if option.line:  # what Python alone takes has none
                function = _click_option(option, further.get(name, {}))(function)
        return function

    return made


def _click_option(option: Option[Any], further: Mapping[str, Any]) -> Decorator:
    told: dict[str, Any] = {"help": option.line, "metavar": option.metavar, **_CLICK.get(option.kind, {}), **further}
    if option.choices:
        told["type"] = Choice(option.choices)
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


def _storage_options(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> dict[str, Any]:
    """`ckptkit.options.storage` says what they mean."""
    try:
        return typed_options(value)
    except CkptkitError as error:
        raise click.UsageError(str(error)) from None


_CLICK: dict[str, dict[str, Any]] = {
    "flag": {"is_flag": True},
    "switch": {"default": None},
    "integer": {"type": int},
    "tolerance": {"type": float, "callback": _checked_tolerance},
    "device": {"callback": checked_devices},
    "texts": {"multiple": True},
    "pairs": {"multiple": True},
    "storage": {"multiple": True, "callback": _storage_options},
    "shapes": {"multiple": True},
}
"""What click is told of each kind of option."""


ignore_checksums = click.option(
    "--ignore-checksums", is_flag=True, help="Accept bytes that do not match their recorded checksums."
)
"""For files that were edited in place, whose checksums are stale."""


allow_part_option = click.option(
    "--allow-part", is_flag=True, help="Take one part of a sharded checkpoint without the others."
)
"""For whatever else refuses a part."""


tp_rules_option = click.option("--tp-rules", metavar="FILE", help="Rules for joining tensor-parallel slices.")
"""The same."""


storage_option = _click_option(storage_options, {})
"""For whatever else reads checkpoints."""


tag_option = click.option("--tag", metavar="NAME", help="Step to use in a training folder with several.")
"""For whatever else reads folders."""


jobs_option = click.option(
    "--jobs",
    type=IntRange(1),
    metavar="N",
    help="Number of processes for many files; default: one per core.",
)
"""For what deals with each file by itself."""


files_from_option = click.option(
    "--files-from", metavar="FILE", help="File with more paths, one per line or before each NUL; - is standard input."
)
"""The same."""


def with_listed(paths: Sequence[str], files_from: str | None) -> list[str]:
    """The paths that were typed, and those of the list.

    Raises:
        click.UsageError: both the list and a file would come from standard input.
        CkptkitError: the list cannot be read.
    """
    if files_from is None:
        return [*paths]
    from ckptkit.fleet.shares import STDIN, paths_from  # every command starts faster without

    if files_from == STDIN and STDIN in paths:
        raise click.UsageError("--files-from - and the path -: only one of them can be standard input")
    return [*paths, *paths_from(files_from)]


def with_examples(*examples: str) -> str:
    """The epilog of a ``--help``: commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


def path_argument(name: str, **options: Any) -> Callable[[F], F]:
    """A file name or URL that is left to the command to open, so that every refusal reads alike."""
    several = options.get("nargs") == -1

    def given(_: click.Context, __: click.Parameter, value: Any) -> Any:
        return tuple(each for path in local(value) for each in places.expanded(path)) if several else local(value)

    options["callback"] = given
    return click.argument(name, type=click.Path(path_type=str, readable=False), **options)


def styler(color: str, stream: TextIO | None = None) -> Style:
    """How to color: always, never, or (auto) on a terminal that knows colors, where ``NO_COLOR`` is not set.

    Args:
        color: which of these.
        stream: where it goes; ``None``: to stdout.
    """
    can = (stream or ending.stdout()).isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style if color == "always" or (color == "auto" and can) else lambda text, **_: text


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; ``None``: it is not one, and lines are as long as they are."""
    if not ending.stdout().isatty():
        return None
    import shutil

    width = shutil.get_terminal_size().columns
    if width < ending.NARROWEST:
        return None
    return width if encodable("…") == "…" else width - _REPLACED


def echo(text: str = "") -> None:
    """A line on stdout, colors kept as they were decided, whatever the terminal's encoding."""
    ending.write(encodable(text) + "\n")


def encodable(text: str) -> str:
    """The text with what stdout's encoding does not have replaced or escaped."""
    encoding = ending.stdout().encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_SYMBOLS).encode(encoding, "backslashreplace").decode(encoding)
    return text


def show(document: Any, output: str, renderers: Mapping[str, Renderer], view: View) -> None:
    """A document on stdout, as JSON or as one of the renderers has it."""
    if output == "json":
        echo_json(document)
        return
    for line in renderers[output](document, view):
        echo(line)


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
            with suppress(ending.OutputLostError):  # that it failed is what is to be told
                echo_error(type(error).__name__, str(error))
        raise


def echo_error(kind: str, message: str) -> None:
    """The document of an error on stdout."""
    echo_json({"schema_version": SCHEMA_VERSION, "ok": False, "error": {"type": kind, "message": message}})


def key_values(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """The ``KEY=VALUE`` pairs given to a repeatable option.

    Raises:
        click.UsageError: one has no key or no ``=``.
    """
    pairs = [(text, *text.partition("=")) for text in given]
    for text, key, equals, _ in pairs:
        if not key or not equals:
            raise click.UsageError(f"{option} {text!r}: expected KEY=VALUE")
    return {key: value for _, key, _, value in pairs}


def input_shape(text: str) -> tuple[int, ...]:
    """The shape that was given to ``--input-shape``.

    Raises:
        click.UsageError: it is not one.
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise click.UsageError(
            f"--input-shape {text!r}: expected whole numbers separated by commas, such as 1,3,224,224"
        )
    return shape


def finding_lines(findings: Sequence[FindingDocument], style: Style, width: int | None = None) -> Iterator[str]:
    """One line a finding, and its fix below it."""
    for finding in findings:
        severity = finding["severity"]
        label = style(severity, fg=COLORS[severity], bold=True)
        code = style(f"[{finding['code']}]", dim=True)
        yield from wrapped(f"{label}: {printable(finding['message'])} {code}", width)
        if finding["fix"]:
            yield f"    {printable(finding['fix'])}"
