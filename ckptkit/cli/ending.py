"""The end of the program: the one place that owns stdout and the exit code.

A command says its `verdict` as soon as it knows it, and prints afterwards; whatever happens from then on, that is
what the process exits with.  Before it is known, and where the output cannot be delivered, it is 2; never 0.

The process keeps stdout for itself where a model's own code runs (`keep_stdout`): descriptor 1 leads to stderr from
then on, so that nothing which that code, or a library written in C++, prints can get into the output.

Progress on stderr: how much, how fast, how long it will take.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

from ckptkit.report import count_of, human_size, share_of

__all__ = [
    "NARROWEST",
    "OutputLostError",
    "SignalledError",
    "begin",
    "captured",
    "ended",
    "keep_stdout",
    "message_width",
    "progress_line",
    "say",
    "signals_heard",
    "stderr_width",
    "stdout",
    "take_descriptors",
    "ticking",
    "verdict",
    "watched",
    "write",
]

NARROWEST = 40
"""Columns of a terminal below which nothing is cut: whoever says so is not a terminal."""

_CLEANING_SECONDS = 3.0
"""After a signal others are not heard for so long: what is unfinished is being removed."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class OutputLostError(Exception):
    """What was to go to stdout could not be written; ``errno`` says why."""

    def __init__(self, number: int | None) -> None:
        super().__init__(os.strerror(number or errno.EIO))
        self.errno = number

    @property
    def is_reader_gone(self) -> bool:
        """Whether the reader had enough, as `head` does."""
        return self.errno == errno.EPIPE


class SignalledError(BaseException):
    """The process was asked to end: Ctrl-C, ``kill``, ``timeout``, a terminal that was closed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Ending:
    """What is known so far.

    Attributes:
        verdict: the exit code; ``None``: a command is at work and does not know it yet.
        done: what a command did that stays done, such as a file that was written.
        owns_process: whether this is the program, and not a function of another.
        stdout: the stream of the program's own output, where it has one.
        file: what takes its place while a file is made of the output.
    """

    verdict: int | None = 0
    done: str = ""
    owns_process: bool = False
    stdout: TextIO | None = None
    file: TextIO | None = None


_ending = _Ending()


def begin(*, known: int | None) -> None:
    """Before a command 0 is known (``--help`` and ``--version`` have no other verdict); once it works, nothing is."""
    _ending.verdict, _ending.done = known, ""


def verdict(code: int, done: str = "") -> int:
    """Say, before anything is printed, what the process will exit with, and what was done and stays so."""
    _ending.verdict, _ending.done = code, done
    return code


# Output.


class _Stdout(io.FileIO):
    """A descriptor whose errors are told from those of any other file."""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # it does not block, and can take nothing now
                import select

                select.select([], [self], [])
        except OSError as error:
            raise OutputLostError(error.errno) from error
        return count


def take_descriptors() -> None:
    """Make stdin, stdout and stderr the process's own.

    Those that are closed get the null device, so that no file which is opened later gets their numbers, and with them
    what others print.  Stdout's is open for reading alone: writing to it fails as it does on a closed one.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY if fd == 2 else os.O_RDONLY)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace")
    _ending.owns_process = True
    if os.name != "nt" or sys.stdout is None:  # Windows' console takes text, not bytes
        sys.stdout = _ending.stdout = _stream(1, sys.stdout or sys.stderr)


def _stream(fd: int, like: Any) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Stdout(fd, "w", closefd=False)),
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=like.line_buffering,
        write_through=like.write_through,
    )


def keep_stdout() -> None:
    """Let nobody else write to stdout from here on: its descriptor, and what held on to it, lead to stderr."""
    if _ending.stdout is not None:
        _ending.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        _ending.stdout = _stream(kept, _ending.stdout)


def stdout() -> TextIO:
    """Where the program's own output goes."""
    return _ending.file or _ending.stdout or sys.stdout


@contextmanager
def captured() -> Iterator[io.BytesIO]:
    """What goes to stdout in the block is kept instead, as UTF-8."""
    kept = io.BytesIO()
    _ending.file = io.TextIOWrapper(kept, "utf-8", "backslashreplace", newline="\n", write_through=True)
    try:
        yield kept
    finally:
        _ending.file = None


def write(data: str | bytes = "") -> None:
    """Write to stdout, colors as they are, and flush.

    Raises:
        OutputLostError: it could not be written.
    """
    with _line.lock:  # nobody writes the line again before the data are out
        _line.wipe()
        try:
            click.echo(data, file=stdout(), nl=False, color=True)
        except (OSError, ValueError) as error:  # ValueError: somebody closed it
            raise OutputLostError(getattr(error, "errno", errno.EBADF)) from error


def say(text: str) -> None:
    """A line on stderr, as it is; whether it arrives decides nothing."""
    with _line.lock:
        _line.wipe()
        _say(text, nl=True)


def _say(text: str, *, nl: bool = False) -> None:
    with suppress(OSError, ValueError):
        click.echo(text, err=True, nl=nl, color=True)


# Signals.


@contextmanager
def signals_heard() -> Iterator[None]:
    """Signals that ask for the end, Windows' Ctrl-Break too, are raised in the block: what is unfinished is removed.

    Those that are ignored (as by ``nohup``), or that somebody else handles, are left as they are.

    Raises:
        SignalledError: one came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, float]] = []

    def hear(number: int, _: object) -> None:
        if not came or time.monotonic() - came[-1][1] > _CLEANING_SECONDS:
            came.append((number, time.monotonic()))
            raise SignalledError(number)

    defaults: dict[str, Any] = dict.fromkeys(("SIGTERM", "SIGHUP", "SIGBREAK"), signal.SIG_DFL)
    defaults["SIGINT"] = signal.default_int_handler
    ours = [
        (number, default)
        for name, default in defaults.items()
        if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) == default
    ]
    for number, _ in ours:
        signal.signal(number, hear)
    try:
        yield
        if came:  # somebody caught it
            raise SignalledError(came[0][0])
    finally:
        if not _ending.owns_process:  # else they are heard to the very end
            for number, default in ours:
                signal.signal(number, default)


# The exit code.


def ended(error: BaseException) -> tuple[int, str]:
    """What the process exits with where its work ended in an interrupt or in output that was lost, and how to say so.

    Nothing is to be said where the reader had enough.
    """
    if isinstance(error, OutputLostError):
        if error.is_reader_gone:
            return 2 if _ending.verdict is None else _ending.verdict, ""
        state = "full" if error.errno in _FULL else "closed" if error.errno == errno.EBADF else f"failing ({error})"
        return 2, f"ckptkit: error: standard output is {state}" + (f"; {_ending.done}" if _ending.done else "")
    number = error.number if isinstance(error, SignalledError) else signal.SIGINT
    told = {"SIGINT": "interrupted", "SIGBREAK": "interrupted", "SIGTERM": "terminated"}
    how = told.get(signal.Signals(number).name, "the terminal is gone")
    return 128 + number, f"ckptkit: {how}; {_ending.done or 'no file is half-written'}"


_SECONDS = 0.2
"""Time between two updates."""

_PATIENCE_SECONDS = 0.5
"""Before that nobody asks how far a command is."""

_SETTLED_SECONDS = 1.0
"""Before that, and before a tenth is done, the rate says little about the time left."""

_FEW = 2
"""Files of which it is not told how many are done with, where there is more to tell."""


class _Line:
    """The line on stderr that is written over and over; it is wiped before anything else is printed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.width = 0

    def show(self, text: str) -> None:
        """Write it over what is there, as much of it as the terminal has room for."""
        with self.lock:
            text = _fitting(text)
            _say("\r" + text.ljust(self.width))
            self.width = len(text)

    def wipe(self) -> None:
        """Leave nothing of it."""
        with self.lock:
            if self.width:
                _say("\r" + " " * self.width + "\r")
            self.width = 0


_line = _Line()


def stderr_width() -> int | None:
    """Columns of the terminal that stderr is; ``None``: it is not one, or does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def message_width() -> int | None:
    """Columns that messages on stderr are wrapped to; ``None``: they are not, for nobody reads them on a terminal."""
    width = stderr_width()
    return width if width is not None and width >= NARROWEST else None


def _fitting(text: str) -> str:
    """The parts of a line that a terminal has room for, so that it never wraps; the cursor needs a column too."""
    width = (stderr_width() or 0) - 1
    while 0 < width < len(text) and "  " in text.strip():
        text = text[: text.rindex("  ")].rstrip()
    return text[:width] if width > 0 else text


@contextmanager
def watched(*, quiet: bool) -> Iterator[None]:
    """While a command works: how far it is, how fast, and how long it will take, on a terminal.

    Those that are told so themselves (`progress_line`) need no more.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    from ckptkit.bytesource import pace  # what is shown at once starts faster without

    started = shown = time.monotonic()

    def tell() -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _SECONDS or now - started < _PATIENCE_SECONDS:
            return
        shown = now
        with _line.lock:
            if pace.tell is tell and (text := _told(pace, now - pace.began, now - started)):
                _line.show(text)

    pace.watch(tell)
    try:
        yield
    finally:
        with _line.lock:
            pace.watch(None)
            _line.wipe()


@contextmanager
def ticking() -> Iterator[None]:
    """For a command whose steps say nothing as long as they last: what is `watched` is told again and again.

    It has a thread for it, so that no process is forked in the meantime.
    """
    from ckptkit.bytesource import pace

    if pace.tell is None:
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(_SECONDS):
            if pace.tell is not None:
                pace.tell()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _told(pace: Any, seconds: float, since: float) -> str:
    """What there is to tell of a `ckptkit.bytesource.pace`, the most important first; nothing where nothing is known.

    Args:
        pace: that.
        seconds: since what is expected began.
        since: since the command began.
    """
    passed = min(max(pace.read, pace.finished), pace.total)
    parts: list[str] = []
    if passed:
        parts = [_how_far(passed, pace.total, seconds)]
    elif pace.arrived:
        parts = [f"{human_size(pace.arrived)} read", f"{human_size(int(pace.arrived / since))}/s"]
    elif pace.files > _FEW:
        parts = [f"{pace.done * 100 // pace.files:3d}%"]
        parts += [f"{_clock((pace.files - pace.done) * seconds / pace.done)} left"] if pace.done else []
    if pace.files > (1 if passed else _FEW):
        parts.append(share_of(pace.done, pace.files, "file"))
    elif pace.looked > _FEW and not pace.files:
        parts.append(f"{count_of(pace.looked, 'file')} looked at")
    if pace.stage:
        parts += [pace.stage] if passed else [pace.stage, _clock(seconds)]
    return "  ".join(parts)


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

    def update(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _SECONDS and done < total:
            return
        shown = now
        _line.show(_how_far(done, total, now - started))

    try:
        yield update
    finally:
        _line.wipe()


def _how_far(done: int, total: int, seconds: float) -> str:
    """``" 42%  1.2 GB of 2.9 GB  1.9 GB/s  0:01 left"``."""
    rate = done / seconds if seconds > 0 else 0.0
    percent = done * 100 // total if total else 100
    text = f"{percent:3d}%  {human_size(done)} of {human_size(total)}  {human_size(int(rate))}/s"
    if rate and (seconds >= _SETTLED_SECONDS or done * 10 >= total):
        text += f"  {_clock((total - done) / rate)} left"
    return text


def _clock(seconds: float) -> str:
    """``"0:07"``, ``"27:46:30"``."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
