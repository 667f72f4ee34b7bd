"""The result of a task; and running tasks in this process, which needs nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Generic, Literal, TypeVar, cast

from ckptkit.errors import CkptkitError
from ckptkit.startup import dataclass

__all__ = ["Outcome", "Problem", "done_here", "late", "told"]

T = TypeVar("T")
R = TypeVar("R")

Problem = Literal["died", "timed-out", "failed", "version"]


@dataclass(frozen=True, kw_only=True)  # with slots, `Outcome[int](...)` is an error of Python's
class Outcome(Generic[R]):
    """The result of a task.

    Attributes:
        value: what the function returned; ``None`` if there is a problem.
        problem: ``None`` if it was done; ``"failed"``: the task raised an error, or something could not be pickled;
            ``"died"``: so did its worker, or no worker took it; ``"timed-out"``; ``"version"``: the worker has another
            ckptkit.
        text: the problem in a sentence.
        error: the error it raised, if it is ckptkit's.
    """

    value: R | None = None
    problem: Problem | None = None
    text: str = ""
    error: CkptkitError | None = None

    def result(self) -> R:
        """The value.

        Raises:
            CkptkitError: the error that the work raised, or the problem.
        """
        if self.problem is not None:
            raise self.error if self.error is not None else CkptkitError(self.text)
        return cast("R", self.value)


def told(error: BaseException) -> str:
    """An error in a line: ckptkit's own unchanged, others with their type."""
    text = str(error).strip()
    if isinstance(error, CkptkitError):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory ({text})" if text else "out of memory"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def late(seconds: float) -> str:
    """The message for a task that exceeded its time limit."""
    return f"it took longer than the limit of {seconds:g} s"


def done_here(work: Callable[[T], R], task: T, seconds: float | None) -> Outcome[R]:
    """The work in this process; interrupts of it are not an outcome."""
    if seconds is None:
        try:
            return Outcome(value=work(task))
        except (Exception, SystemExit) as error:
            return _failed(error)
    outcomes: list[Outcome[R]] = []

    def call() -> None:
        try:
            outcomes.append(Outcome(value=work(task)))
        except BaseException as error:
            outcomes.append(_failed(error))

    thread = threading.Thread(target=copy_context().run, args=(call,), daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        thread.join(min(left, 0.5))  # an interrupt is received in the meantime
    return outcomes[0] if outcomes else Outcome(problem="timed-out", text=late(seconds))


def _failed(error: BaseException) -> Outcome[Any]:
    return Outcome(problem="failed", text=told(error), error=error if isinstance(error, CkptkitError) else None)
