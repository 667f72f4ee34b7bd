"""A caller's request: the function for each of the tasks, and where it runs.

Little work is done here, because a process takes some hundredths of a second to start; a fleet's is shared among
processes (`ckptkit.fleet.pool`) or by a given executor (`ckptkit.fleet.executors`), through the driver
(`ckptkit.fleet.driver`), all imported when needed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from operator import length_hint
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ckptkit.errors import CkptkitError
from ckptkit.fleet.outcome import Outcome, done_here

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["cores", "each"]

T = TypeVar("T")
R = TypeVar("R")

_BATCH_SECONDS = 0.05
"""Planned seconds of a batch: a trip to a process takes some hundredths of that."""

_GIVEN_BATCH_SECONDS = 0.25
"""The same with an external executor, which may use other machines."""


def cores() -> int:
    """How many processors this process may use: those it is bound to, and no more than its control group is allowed."""
    count = os.cpu_count() or 1
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    quota = _quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def _quota(groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """Processors that the control group has; ``None``: no bound is known.

    Their description: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``), and for version 1
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    try:
        with open(groups, encoding="ascii", errors="replace") as file:  # noqa: PTH123 - the kernel's
            own = next((line.strip()[3:] for line in file if line.startswith("0::")), "")  # of version 2
    except OSError:
        return None
    steps = [step for step in own.split("/") if step]
    folders = ["/".join([root, *steps[:count]]) for count in range(len(steps) + 1)]
    found = [number for folder in folders for number in _numbers(f"{folder}/cpu.max")]
    if not found:
        found = _numbers(f"{root}/cpu/cpu.cfs_quota_us", f"{root}/cpu/cpu.cfs_period_us")
    return min(found, default=None)


def _numbers(*paths: str) -> list[float]:
    """The quota over the period that files hold."""
    try:
        texts = []
        for path in paths:
            with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123 - the kernel's
                texts += file.read().split()
        quota, period = map(int, texts)
    except (OSError, ValueError):  # "max": unbounded
        return []
    return [quota / period] if quota > 0 and period > 0 else []


def each(
    tasks: Iterable[T],
    work: Callable[[T], R],
    *,
    jobs: int | None = None,
    executor: Executor | None = None,
    seconds: float | None = None,
    worth: int = 2,
) -> Iterator[tuple[T, Outcome[R]]]:
    """Call ``work`` for every task, and give back each with its outcome, in the order of the tasks.

    Nothing is lost: of every task there is an outcome.  Tasks are pulled as needed; closing the iterator, or an
    interrupt, ends the ones in progress.  With one job the work is done in this process, and the time limit is enforced
    with a thread that is abandoned when it is late; a task that ends the process ends everything.

    Args:
        tasks: plain data that can be pickled; any iterable.
        work: a function of a module, or a `functools.partial` of one, which others can import.
        jobs: how many processes; ``None``: as `cores` counts them.
        executor: any `concurrent.futures.Executor` to use instead of local processes; it is not shut down.
        seconds: the limit of one task; ``None``: none.
        worth: number of tasks from which processes of our own are worth starting.  Without ``jobs``, a limit makes
            them worth it always: only another process can be stopped.

    Raises:
        CkptkitError: ``jobs`` or ``seconds`` is not a number above 0, ``jobs`` and ``executor`` are both given, or
            ``executor`` is not an executor.  Once it is needed elsewhere: ``work`` cannot be pickled.
    """
    if jobs is not None and executor is not None:
        raise CkptkitError("give either jobs or an executor: an executor has its own number of workers")
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise CkptkitError(f"jobs must be a whole number of at least 1, not {jobs!r:.80}")
    if seconds is not None and (isinstance(seconds, bool) or not 0 < seconds < math.inf):
        raise CkptkitError(f"the time limit of a task must be a number of seconds above 0, not {seconds!r:.80}")
    if executor is not None:
        if not callable(getattr(executor, "submit", None)):
            raise CkptkitError(f"the executor has no submit method: {executor!r:.80}")
        return _through(executor, tasks, work, seconds)
    return _with_jobs(tasks, work, jobs, seconds, max(1, worth))


def _with_jobs(
    tasks: Iterable[T], work: Callable[[T], R], jobs: int | None, seconds: float | None, worth: int
) -> Iterator[tuple[T, Outcome[R]]]:
    """In this process or in several of our own."""
    length, remaining = length_hint(tasks), iter(tasks)
    count = cores() if jobs is None else jobs
    is_limited = jobs is None and seconds is not None
    if count > 1 or is_limited:
        first, remaining = _begun(remaining, worth)
        if (len(first) >= worth or (is_limited and first)) and _may_start():
            from ckptkit.fleet.driver import pickled, shared_out
            from ckptkit.fleet.pool import Pool

            yield from shared_out(remaining, pickled(work), partial(Pool, count), seconds, _BATCH_SECONDS, length)
            return
    for task in remaining:
        yield task, done_here(work, task, seconds)


def _begun(tasks: Iterator[T], count: int) -> tuple[list[T], Iterator[T]]:
    """The first few, and all; an error of the iterable is raised after what came before it."""
    first = list[T]()
    try:
        first.extend(islice(tasks, count))
    except Exception as error:
        return first, chain(first, _raised(error))
    return first, chain(first, tasks)


def _raised(error: Exception) -> Iterator[NoReturn]:
    raise error
    yield


def _may_start() -> bool:
    """Whether this process may have workers: a worker, ours or `multiprocessing`'s, may not."""
    ours, process = sys.modules.get("ckptkit.fleet.worker"), sys.modules.get("multiprocessing.process")
    return not (getattr(ours, "is_one", False) or (process is not None and process.current_process().daemon))


def _through(
    executor: Executor, tasks: Iterable[T], work: Callable[[T], R], seconds: float | None
) -> Iterator[tuple[T, Outcome[R]]]:
    from ckptkit.fleet.driver import pickled, shared_out
    from ckptkit.fleet.executors import Given
    from ckptkit.fleet.pool import Pool

    start = partial(Given, executor, partial(Pool, cores()))
    return shared_out(tasks, pickled(work), start, seconds, _GIVEN_BATCH_SECONDS, length_hint(tasks))
