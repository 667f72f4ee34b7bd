"""Progress on stderr: how much, how fast, how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckptkit.cli import ending
from ckptkit.report import human_size

__all__ = ["progress_line"]

_SECONDS = 0.2
"""Time between two updates."""


@contextmanager
def progress_line(wanted: bool | None, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A line that is written over and over, and gone at the end.

    Args:
        wanted: whether to show it; ``None``: on a terminal.
        quiet: never.

    Yields:
        A function to be called with the bytes dealt with so far, and those to deal with in all.
    """
    if quiet or not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    started = shown = time.monotonic()
    width = 0

    def update(done: int, total: int) -> None:
        nonlocal shown, width
        now = time.monotonic()
        if now - shown < _SECONDS and done < total:
            return
        shown = now
        line = _line(done, total, now - started)
        ending.say("\r" + line.ljust(width), nl=False)
        width = len(line)

    try:
        yield update
    finally:
        if width:
            ending.say("\r" + " " * width + "\r", nl=False)


def _line(done: int, total: int, seconds: float) -> str:
    """``" 42%  1.2 GB of 2.9 GB  1.9 GB/s  0:01 left"``."""
    rate = done / seconds if seconds > 0 else 0.0
    percent = done * 100 // total if total else 100
    text = f"{percent:3d}%  {human_size(done)} of {human_size(total)}  {human_size(int(rate))}/s"
    if rate:
        left = int((total - done) / rate + 0.5)
        hours, minutes = divmod(left // 60, 60)
        clock = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
        text += f"  {clock} left"
    return text
