"""Where code that is not ours runs: a reference's module, factory, hooks and forward pass, a pickled model, a library.

Whatever that code does, it neither ends the program nor speaks in its place.  Every call of it is in a block of
`foreign`, and the verifier as a whole is in one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

from ckptkit.errors import VerifyError
from ckptkit.transfer.workers import SIGNALS

__all__ = ["ForeignExitError", "error_text", "foreign"]

_leave = os._exit


class ForeignExitError(VerifyError):
    """Foreign code ended without an error: ``SystemExit``, its own ``KeyboardInterrupt``, ``os._exit``."""


class foreign:  # noqa: N801 - read as a word of the language: ``with foreign():``
    """A block that runs foreign code; blocks may be in each other.

    - An exception that is not an `Exception` becomes a `ForeignExitError`, which is one; ``os._exit`` becomes that too.
    - A signal that the process really received is raised as its handler raised it, whatever the code made of that.
    - Printed text goes to stderr, even if the code replaces or closes stdout.
    - A process that the code forked ends with the block.

    Args:
        failed: the message for any exception; it becomes a `VerifyError`.  Empty: exceptions come through.
    """

    _lock = threading.RLock()
    _depth = 0
    _kept: tuple[Any, ...] = ()
    _handlers: dict[int, Any] | None = None
    _heard: list[BaseException] = []  # noqa: RUF012 - of the process, as signals are

    def __init__(self, failed: str = "") -> None:
        self._failed = failed
        self._process = os.getpid()
        self._hears = False

    def __enter__(self) -> None:
        cls = foreign
        with cls._lock:
            cls._depth += 1
            if cls._depth == 1:
                cls._kept = sys.stdout, sys.stderr, os._exit
                os._exit = self._exit
            sys.stdout = _Aside(cls._kept[1]) if cls._kept[1] is not None else None
        if cls._handlers is None and threading.current_thread() is threading.main_thread():
            self._hears, cls._heard = True, []
            cls._handlers = {number: signal.getsignal(number) for number in SIGNALS}
            for number, handler in cls._handlers.items():
                if callable(handler):
                    signal.signal(number, _hear)

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        cls = foreign
        if os.getpid() != self._process:
            _leave(1)
        if self._hears:
            handlers, cls._handlers = cls._handlers or {}, None
            for number, handler in handlers.items():
                if handler is not None:  # one that Python did not set cannot be set by it
                    signal.signal(number, handler)
        with cls._lock:
            cls._depth -= 1
            if cls._depth == 0:
                sys.stdout, sys.stderr, os._exit = cls._kept
        if cls._heard and threading.current_thread() is threading.main_thread():
            heard = cls._heard[0]
            if self._hears:
                cls._heard = []
            if error is heard:
                return
            raise heard
        if error is None:
            return
        if self._failed:
            raise VerifyError(f"{self._failed}: {error_text(error)}") from error
        if not isinstance(error, Exception):
            raise ForeignExitError(f"the model's own code raised {error_text(error)}") from error

    def _exit(self, status: int) -> NoReturn:
        """Replaces ``os._exit``; a forked process still ends by it, as it must."""
        if os.getpid() != self._process:
            _leave(status)
        raise SystemExit(status)


def _hear(number: int, frame: FrameType | None) -> None:
    """The handler that was there, and a note of what it raised."""
    try:
        (foreign._handlers or {})[number](number, frame)
    except BaseException as error:
        foreign._heard.append(error)
        raise


class _Aside:
    """Stderr in the place of stdout, which stays open when it is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """Nothing: others continue to write to it."""


def error_text(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, ForeignExitError) and error.__cause__ is not None:
        error = error.__cause__
    try:
        with foreign():
            text = " ".join(str(error).split())[:500]
    except Exception:  # its message fails too
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
