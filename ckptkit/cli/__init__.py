"""The ``ckptkit`` command: parse, call `ckptkit.api`, render, exit.

One module a command, imported only when it is run.  Exit codes are those of diff(1): 0 nothing
found, 1 a difference or a failing finding, 2 it could not be done.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn

import click

from ckptkit import __version__
from ckptkit.cli.options import printable
from ckptkit.errors import CkptkitError

__all__ = ["main", "run"]

COMMANDS = {
    "check": "Hold files against a manifest and a policy.",
    "convert": "Rewrite a checkpoint: container, prefixes, devices.",
    "diff": "What changed between two checkpoints.",
    "explain": "What a finding code means and how to fix it.",
    "inspect": "What is in a file, without running or loading it.",
    "manifest": "Record what released weights must be.",
    "verify": "Load into a reference model and run a forward check.",
}
"""Every command with its line in the list; ``ckptkit.cli.NAME`` holds it."""

_COMPLETION = "_CKPTKIT_COMPLETE"
"""The variable by which a shell asks; click derives it from the program's name."""

_GARBAGE_THRESHOLD = 100_000
"""New objects after which Python looks for garbage; by default some hundreds."""

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 100,
}


class _Commands(click.Group):
    """The commands, imported when asked for, so that starting one costs only itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"ckptkit.cli.{cmd_name}").command
        return command if isinstance(command, click.Command) else None

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
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    atexit._run_exitfuncs()  # a model's own code may have registered some
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


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
        if _COMPLETION in os.environ:  # a shell asks what it may offer
            from ckptkit.cli.completion import register

            register(os.environ[_COMPLETION])
        with _termination_heard():
            code = cli.main(args=arguments, prog_name="ckptkit", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.ClickException as error:
        error.show()
        code = 2
    except click.Abort:
        code = _interrupted()
    except KeyboardInterrupt:
        code = _interrupted()
    except _Terminated:
        click.echo("ckptkit: terminated; no file is half-written", err=True)
        code = 128 + signal.SIGTERM
    except (BrokenPipeError, SystemExit):  # the reader of our output has gone, as `head` does; click exits on it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except CkptkitError as error:
        _show_traceback(debug)
        click.echo(f"ckptkit: error: {printable(str(error))}", err=True)
        code = 2
    except MemoryError:
        _show_traceback(debug)
        click.echo("ckptkit: error: out of memory; nothing was written", err=True)
        code = 2
    except Exception as error:
        _show_traceback(debug)
        click.echo(
            f"ckptkit: internal error: {type(error).__name__}: {error} (a bug in ckptkit; --debug shows where)",
            err=True,
        )
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _show_traceback(wanted: bool) -> None:
    if wanted:
        import traceback

        traceback.print_exc()


class _Terminated(BaseException):
    """The process was asked to end, as by ``kill``, ``timeout`` or a scheduler."""


@contextmanager
def _termination_heard() -> Iterator[None]:
    """SIGTERM is raised, so that what is unfinished is cleaned up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupted() -> int:
    click.echo("ckptkit: interrupted; no file is half-written", err=True)
    return 2
