"""A command line that is wrong: what is said of it, on stderr, and as a document on stdout where JSON is asked for.

click finds what is wrong; what was probably meant is said here, for commands, options and values alike
(`ckptkit.nearness`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from ckptkit.cli import closing
from ckptkit.nearness import did_you_mean
from ckptkit.shell import quoted

if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:
    _Choice = click.Choice  # which click 8.1 gives no type

__all__ = ["Choice", "IntRange", "fail_command", "tell", "wants_json"]

_CALLED = {
    "info": "inspect", "show": "inspect", "ls": "inspect", "list": "inspect", "dump": "inspect", "print": "inspect",
    "summary": "inspect", "view": "inspect", "cat": "inspect", "open": "inspect", "tree": "inspect", "load": "verify",
    "infer": "verify", "prune": "convert", "extract": "convert", "shard": "convert", "quantize": "convert",
    "save": "convert", "export": "convert", "strip": "convert", "rename": "convert",
    "cast": "convert", "compare": "diff", "cmp": "diff", "lock": "manifest", "hash": "manifest", "test": "verify",
    "run": "verify", "validate": "check", "lint": "check", "scan": "check", "merge": "report",
}  # fmt: skip
"""What people call commands."""


class Choice(_Choice):
    """One of several values; of another it is said which is near.

    Args:
        choices: the values.
        meant: what is said of another value, as `did_you_mean`.
    """

    def __init__(self, choices: Iterable[str], *, meant: Callable[[str, Collection[str]], str] = did_you_mean) -> None:
        super().__init__(list(choices))
        self._meant = meant

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            if meant := self._meant(str(value), self.choices):
                raise click.BadParameter(error.message.removesuffix(".") + meant, ctx, param) from None
            raise


class IntRange(click.IntRange):
    """click's, which calls what is no number ``not a valid integer range``."""

    name = "integer"


def fail_command(ctx: click.Context, name: str, commands: Iterable[str]) -> None:
    """Say that there is no such command; of what is a file, that one must be named before it.

    Raises:
        click.UsageError: always.
    """
    meant = did_you_mean(name, commands, called=_CALLED)
    if not meant and os.path.exists(name):
        meant = f"; did you mean ckptkit inspect {quoted(name)}?"
    ctx.fail(f"No such command {name!r}{meant or '.'}")


def tell(error: click.ClickException) -> str:
    """Show the error on stderr, with the option that was probably meant; its message."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        command = error.ctx.command
        meant = did_you_mean(error.option_name, _options(command))
        if isinstance(command, click.Group):
            commands = filter(None, (command.get_command(error.ctx, name) for name in command.list_commands(error.ctx)))
            if any(error.option_name in _options(each) for each in commands):
                meant = f"; put it after the command: ckptkit COMMAND {error.option_name}"
        error = click.UsageError(error.message.removesuffix(".") + (meant or "."), error.ctx)
    shown = io.StringIO()
    error.show(shown)
    closing.say(shown.getvalue().removesuffix("\n"))
    return error.format_message()


def _options(command: click.Command) -> list[str]:
    """The options of a command, all but those of one letter."""
    names = [name for option in command.params for name in (*option.opts, *option.secondary_opts)]
    return [name for name in names if name.startswith("--")]


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether JSON is asked for, anywhere on a line that could not be taken apart."""
    words = [*takewhile(lambda word: word != "--", arguments)]
    pairs = zip(words, [*words[1:], ""], strict=True)
    formats = [following if word == "--format" else word[9:] for word, following in pairs if word[:9] in _FORMAT]
    return "--json" in words or formats[-1:] == ["json"]


_FORMAT = ("--format", "--format=")
