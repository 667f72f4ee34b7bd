"""The work of a worker: a batch of tasks, each with its own result, whatever happens to the others.

`run` takes and returns plain data, so it can run in any process, on any machine, that has this version of ckptkit.  A
batch that takes longer than expected ends early, so that no task waits long for slow ones; tasks that have not begun
are handed out again.

The time limit is enforced here: tasks run in a separate thread, which is abandoned if a task is late.  If Python itself
is blocked (a library that holds the GIL, a disk that does not respond), no limit works here; whoever handed out the
batch has one too.
"""

from __future__ import annotations

import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any

from ckptkit.errors import CkptkitError
from ckptkit.extras import __version__
from ckptkit.fleet.outcome import late, told
from ckptkit.startup import dataclass

__all__ = [
    "PROTOCOL",
    "SLACK",
    "SLICE",
    "Call",
    "Lost",
    "RefusedError",
    "Reply",
    "Result",
    "StopWorker",
    "is_one",
    "run",
]

PROTOCOL = 5
"""Of the pickles that travel: every Python that ckptkit runs on reads it."""

Result = tuple[str, str, "bytes | None"]
"""The problem (``""``: none), its message, and the pickled value, or the pickled error if there is one."""

Reply = tuple[tuple[str, str], list[Result], float, bool]
"""The worker's versions of ckptkit and Python; the results of the tasks that were begun, in order, and none if they
cannot be read; the seconds that it took; whether a thread was abandoned."""


SLICE = 0.5
"""The longest wait in seconds: on Windows, Ctrl-C does not interrupt one."""

SLACK = 5.0
"""Seconds that a worker may be late, over its limits, before it is given up."""

Call = tuple[str, bytes, bytes, int, "float | None", float, str]
"""What `ckptkit.fleet.worker.run` is called with."""


is_one = False
"""Whether this process is a worker, which has no workers itself."""


class RefusedError(Exception):
    """No more work is taken; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A batch that does not come back.

    Attributes:
        text: why.
        problem: ``"died"``, ``"timed-out"`` or ``"version"``.
        is_final: whether it makes no sense to try its tasks again.
        is_begun: whether it can be for one of its tasks.
        is_sure: whether nothing that ran beside it can be at fault.
    """

    text: str
    problem: str = "died"
    is_final: bool = False
    is_begun: bool = True
    is_sure: bool = False


class StopWorker(BaseException):
    """Raised in a worker that is asked to end, so that what it is at can clean up."""


def _versions() -> tuple[str, str]:
    """Of ckptkit and of Python, in this process."""
    return __version__, platform.python_version()


def run(
    version: str, work: bytes, tasks: bytes, count: int, seconds: float | None, budget: float, call: str = ""
) -> Reply:
    """Do the work for one task after the other.

    Args:
        version: of ckptkit, in the calling process; if it is different here, nothing is begun.
        work: the pickled function.
        tasks: its arguments, a pickled list, so that shared parts are there once.
        count: how many they are.
        seconds: the limit of each task; ``None``: none.
        budget: seconds after which no further task is begun.
        call: no other call has this, so that no engine takes two for one and gives the result of the first, as dask
            does: the files may have changed since.
    """
    begun = time.monotonic()
    if version != __version__:
        return _versions(), [], 0.0, False
    try:
        function = _function(work)
    except Exception as error:
        failed = (
            "failed",
            f"the worker cannot import the function (is it in an importable module?): {told(error)}",
            None,
        )
        return _versions(), [failed] * count, 0.0, False
    try:
        given = pickle.loads(tasks)  # noqa: S301 - our own
    except Exception as error:
        text = (
            f"the worker cannot read the task (are its functions and classes in an importable module?): {told(error)}"
        )
        failed = ("failed", text, None)
        return _versions(), [failed] if count == 1 else [], 0.0, False  # which of several is unknown
    abandoned = threading.Event()
    if seconds is None:
        results = list(_results(function, given, begun + budget, abandoned))
    else:
        results = list(_limited(function, given, begun + budget, seconds, abandoned))
    return _versions(), results, time.monotonic() - begun, abandoned.is_set()


@lru_cache(maxsize=8)
def _function(work: bytes) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(work)  # noqa: S301 - our own
    return function


def _results(
    function: Callable[[Any], Any], tasks: Sequence[Any], until: float, abandoned: threading.Event
) -> Iterator[Result]:
    """One after the other, until it is late."""
    for number, task in enumerate(tasks):
        if number and (abandoned.is_set() or time.monotonic() > until):
            return
        yield _result(function, task)


def _limited(
    function: Callable[[Any], Any], tasks: Sequence[Any], until: float, seconds: float, abandoned: threading.Event
) -> Iterator[Result]:
    """The same in a thread that is waited for, so many seconds a task; the first that is late is the last."""
    done: SimpleQueue[Result | None] = SimpleQueue()

    def work() -> None:
        for result in _results(function, tasks, until, abandoned):
            done.put(result)
        done.put(None)

    threading.Thread(target=copy_context().run, args=(work,), daemon=True).start()
    while True:
        try:
            result = done.get(timeout=seconds)
        except Empty:
            abandoned.set()
            result = None
            yield "timed-out", late(seconds), None
        if result is None:
            return
        yield result


def _result(function: Callable[[Any], Any], task: Any) -> Result:
    try:
        value = function(task)
    except StopWorker:
        raise
    except BaseException as error:
        return _failure(error)
    try:
        return "", "", pickle.dumps(value, PROTOCOL)
    except Exception as error:
        return "failed", f"its result cannot be pickled: {told(error)}", None


def _failure(error: BaseException) -> Result:
    """The message for an error that the task raised; ckptkit's own are sent whole."""
    data = None
    if isinstance(error, CkptkitError):
        with suppress(Exception):
            data = pickle.dumps(error, PROTOCOL)
    return "failed", told(error), data
