"""The ``ckptkit`` command: parse, call `ckptkit.api`, render, exit.

One module a command, imported only when it is run.  Exit codes are those of diff(1): 0 nothing
found, 1 a difference or a failing finding, 2 it could not be done; 128 and the number of a signal that ended it.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

import click

from ckptkit import __version__
from ckptkit.cli import closing, ending
from ckptkit.cli.options import echo_error, printable
from ckptkit.cli.usage import fail_command, tell, wants_json
from ckptkit.errors import CkptkitError

__all__ = ["main", "run"]

COMMANDS = {
    "check": "Check files against a manifest and a policy.",
    "convert": "Rewrite a checkpoint: container, prefixes, devices.",
    "diff": "Show what changed between two checkpoints.",
    "explain": "Explain a finding code and how to fix it, or a topic such as trust.",
    "inspect": "Show what is in a file, without running or loading it.",
    "manifest": "Record what released weights must be.",
    "report": "Combine the results of several runs of check.",
    "verify": "Load into a reference model and run a forward check.",
}
"""Every command with its line in the list; ``ckptkit.cli.NAME`` holds it."""

_COMPLETION = "_CKPTKIT_COMPLETE"
"""The variable by which a shell asks; click derives it from the program's name."""

_GARBAGE_THRESHOLD = 2_000_000
"""New objects after which Python looks for garbage; by default some hundreds."""

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 100,
}


class _Formatter(click.HelpFormatter):
    """The help, in whose lines no option is broken at one of its hyphens."""

    def write_text(self, text: str) -> None:
        super().write_text(_unbroken(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(first, _unbroken(second)) for first, second in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


_HYPHEN = "\N{NON-BREAKING HYPHEN}"


def _unbroken(text: str) -> str:
    """The text with other hyphens in its options."""
    return re.sub(r"(?<![\w-])--[\w-]+", lambda option: option[0].replace("-", _HYPHEN), text)


class _Context(click.Context):
    formatter_class = _Formatter


class _Commands(click.Group):
    """The commands, imported when asked for, so that starting one costs only itself."""

    context_class = _Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # click 8.1 ends with 0, later ones raise what 8.1 lacks
            code = ending.verdict(2)
            click.echo(ctx.get_help())
            ctx.exit(code)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"ckptkit.cli.{cmd_name}").command
        command.context_class = _Context
        if _COMPLETION in os.environ:
            from ckptkit.cli.completion import equip

            equip(command)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # click 8.1 takes what begins with a slash for an option, and shows the help.
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            fail_command(ctx, args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.command(cls=_Commands, context_settings=CONTEXT)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Inspect, convert and verify PyTorch checkpoints without executing them."""


def run() -> NoReturn:
    """The program: `main`, and the end of the process at once.

    Python would take down every module and object one by one first, a sixth of the time that a small
    command takes; all of it is memory, which the system takes back as a whole.
    """
    code, leave = 2, os._exit
    try:
        ending.take_descriptors()
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 2
    except ending.SignalledError as error:
        code = _ended(error)
    finally:
        # A model's own code may have registered some; they end as they like, and the exit code is ours.
        os._exit = lambda status: leave(code)
        with suppress(BaseException):
            atexit._run_exitfuncs()
        with suppress(BaseException):
            sys.stderr.flush()
        leave(code)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; default: those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What a command makes lives until it prints it: looking for garbage among 100,000 tensors is wasted.
    gc.set_threshold(_GARBAGE_THRESHOLD)
    debug = "--debug" in arguments
    try:
        ending.begin(known=0)
        with ending.signals_heard():
            code = _called([*arguments])
            ending.write()
    except click.ClickException as error:
        told = tell(error)
        if wants_json(arguments):
            with suppress(ending.OutputLostError):
                echo_error("UsageError", told)
        code = 2
    except (ending.OutputLostError, ending.SignalledError, KeyboardInterrupt) as error:
        code = _ended(error)
    except CkptkitError as error:
        _show_traceback(debug)
        closing.say(f"ckptkit: error: {_lines(str(error))}")
        code = 1 if error.is_hostile else 2
    except MemoryError:
        _show_traceback(debug)
        closing.say("ckptkit: error: out of memory; no file is half-written")
        code = 2
    except BaseException as error:
        _show_traceback(debug)
        told = f"{type(error).__name__}: {printable(str(error))}"
        closing.say(f"ckptkit: internal error: {told} (a bug in ckptkit; --debug shows where)")
        code = 2
    sys.exit(code)


def _ended(error: BaseException) -> int:
    """The exit code of `ending.ended`, which is said."""
    code, told = ending.ended(error)
    if told:
        closing.say(told)
    return code


def _called(arguments: list[str]) -> int:
    """Run what the arguments ask for; its exit code."""
    if _COMPLETION in os.environ:  # a shell asks what it may offer
        from ckptkit.cli.completion import register

        register(os.environ[_COMPLETION])
        try:
            cli.main(args=arguments, prog_name="ckptkit")
        except SystemExit as ended:
            return int(ended.code or 0)
    # Not click's own `main`, which has its own ways out for a closed pipe and Ctrl-C.
    try:
        with cli.make_context("ckptkit", arguments) as context:
            code = cli.invoke(context)
    except click.exceptions.Exit as left:
        code = left.exit_code
    return code if isinstance(code, int) else 2


def _lines(message: str) -> str:
    """A message ready for a terminal; where it lists several errors, each on its line, indented as it is."""
    return "\n  ".join(map(printable, message.split("\n  ")))


def _show_traceback(wanted: bool) -> None:
    if wanted:
        import traceback

        with suppress(OSError, ValueError):
            traceback.print_exc()
