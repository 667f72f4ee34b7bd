"""What is done in a worker: a batch of tasks, each with its own result, whatever becomes of the others.

`run` is called with plain data and answers with plain data, so that it may run in any process, of any machine, that has
this version of ckptkit.  A batch ends before its last task where it takes longer than was thought, so that no task
waits for long behind others that are slow: those not begun are handed out anew.

The limit of seconds is kept here: tasks run in a thread of their own, which is abandoned with the task that is late.
Where nothing of Python runs any more (a library that holds the interpreter's lock, a disk that does not answer), no
limit can be kept here; whoever handed out the batch has one, too.
"""

from __future__ import annotations

import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any

from ckptkit.errors import CkptkitError
from ckptkit.extras import __version__

__all__ = ["PROTOCOL", "Reply", "Result", "StopWorker", "run", "told", "versions"]

PROTOCOL = 5
"""Of the pickles that travel: every Python that ckptkit runs on reads it."""

Result = tuple[str, str, "bytes | None"]
"""The problem (``""``: none), what is told of it, and the pickled value, or the pickled error where there is one."""

Reply = tuple[tuple[str, str], list[Result], float, bool]
"""The worker's `versions`; the results of the tasks that were begun, in order; seconds that it took; whether a thread
was abandoned."""


class StopWorker(BaseException):
    """Raised in a worker that is asked to end, so that what it is at can clean up."""


def versions() -> tuple[str, str]:
    """Of ckptkit and of Python, in this process."""
    return __version__, platform.python_version()


def told(error: BaseException) -> str:
    """An error that is not ckptkit's own, in a line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def run(version: str, work: bytes, tasks: Sequence[bytes], seconds: float | None, budget: float) -> Reply:
    """Do the work for one task after the other.

    Args:
        version: of ckptkit, in the process that asks; where it is not the one here, nothing is begun.
        work: the pickled function.
        tasks: what it is called with, pickled one by one.
        seconds: the limit of each task; ``None``: none.
        budget: seconds after which no further task is begun.
    """
    begun = time.monotonic()
    if version != __version__:
        return versions(), [], 0.0, False
    try:
        function = _function(work)
    except Exception as error:
        failed = ("failed", f"the worker cannot import what is to be done: {told(error)}", None)
        return versions(), [failed] * len(tasks), 0.0, False
    abandoned = threading.Event()
    if seconds is None:
        results = list(_results(function, tasks, begun + budget, abandoned))
    else:
        results = list(_limited(function, tasks, begun + budget, seconds, abandoned))
    return versions(), results, time.monotonic() - begun, abandoned.is_set()


@lru_cache(maxsize=8)
def _function(work: bytes) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(work)  # noqa: S301 - our own
    return function


def _results(
    function: Callable[[Any], Any], tasks: Sequence[bytes], until: float, abandoned: threading.Event
) -> Iterator[Result]:
    """One after the other, until it is late."""
    for number, task in enumerate(tasks):
        if number and (abandoned.is_set() or time.monotonic() > until):
            return
        yield _result(function, task)


def _limited(
    function: Callable[[Any], Any], tasks: Sequence[bytes], until: float, seconds: float, abandoned: threading.Event
) -> Iterator[Result]:
    """The same in a thread that is waited for, so many seconds a task; the first that is late is the last."""
    done: SimpleQueue[Result | None] = SimpleQueue()

    def work() -> None:
        for result in _results(function, tasks, until, abandoned):
            done.put(result)
        done.put(None)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            result = done.get(timeout=seconds)
        except Empty:
            abandoned.set()
            result = None
            yield late(seconds)
        if result is None:
            return
        yield result


def late(seconds: float) -> Result:
    """The result of a task that took longer than it may."""
    return "timed-out", f"it took longer than the limit of {seconds:g} s", None


def _result(function: Callable[[Any], Any], data: bytes) -> Result:
    try:
        task = pickle.loads(data)  # noqa: S301 - our own
    except Exception as error:
        return "failed", f"the worker cannot read the task: {told(error)}", None
    try:
        value = function(task)
    except StopWorker:
        raise
    except BaseException as error:
        return failure(error)
    try:
        return "", "", pickle.dumps(value, PROTOCOL)
    except Exception as error:
        return "failed", f"its result cannot be pickled: {told(error)}", None


def failure(error: BaseException) -> Result:
    """What is told of an error that the work raised; ckptkit's own travel whole."""
    if isinstance(error, MemoryError):
        return "failed", f"out of memory ({told(error)})", None
    if not isinstance(error, CkptkitError):
        return "failed", told(error), None
    try:
        return "failed", str(error), pickle.dumps(error, PROTOCOL)
    except Exception:
        return "failed", str(error), None
