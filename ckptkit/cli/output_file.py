"""``--output FILE``: what a command prints becomes a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from ckptkit.cli import ending

__all__ = ["into_file"]


@contextmanager
def into_file(path: str, given: Iterable[str]) -> Iterator[None]:
    """What goes to stdout in the block becomes a file, whole or not at all: one that exists is replaced at the end.

    A device or a pipe is written to as it is.

    Args:
        path: the file.
        given: what else was typed, some of which may be paths.

    Raises:
        click.UsageError: it has no name, is one of those, or a checkpoint.
        FileAccessError: it cannot be written.
    """
    if not path:
        raise click.UsageError("--output: give the name of a file")
    if any(_is_same(path, each) for each in given):
        raise click.UsageError(f"--output {path}: the command itself reads or writes this file; give another name")
    is_special = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
    if os.path.exists(path) and not is_special:
        from ckptkit.formats import is_checkpoint

        if is_checkpoint(path):
            raise click.UsageError(
                f"--output {path}: this is a checkpoint, which --output does not overwrite; give another name"
            )
    with ending.captured() as output:
        yield
        data = output.getvalue()
    if is_special:
        _write_into(path, data)
        return
    from ckptkit.plan import LiteralBytes, Plan  # few commands write anything
    from ckptkit.transfer.writing import write_atomically

    plan = Plan(format="output", nbytes=len(data), steps=(LiteralBytes(0, data),), tensors=0, aliases={})
    write_atomically(path, plan, force=True, check=None)


def _write_into(path: str, data: bytes) -> None:
    from ckptkit.errors import FileAccessError

    try:
        with Path(path).open("wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be written: {error.strerror}", path=path) from error


def _is_same(path: str, other: str) -> bool:
    with suppress(OSError, ValueError):
        return os.path.realpath(path) == os.path.realpath(other) or os.path.samefile(path, other)
    return False
