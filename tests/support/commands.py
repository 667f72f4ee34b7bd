"""Commands called in this process, as they are typed."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import NamedTuple

import click
from click.testing import CliRunner

RUNNER = CliRunner(**({"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}))
"""Keeps stderr apart, which click does by itself since 8.2."""


class Done(NamedTuple):
    """What the whole command line left."""

    code: int
    out: str
    err: str


def output_of(
    command: click.Command, *arguments: str, code: int | None = 0, to: str | None = None, stdin: bytes | None = None
) -> str:
    """What a command writes to stdout, and to a file, once the exit code is the one expected (``None``: any)."""
    done = RUNNER.invoke(command, arguments, input=stdin, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert code is None or done.return_value == code, done.output
    if to is not None:
        Path(to).write_text(done.stdout)
    return done.stdout
