"""Work on many files: in this process or in others, chosen by what there is.

- A few files are dealt with in this process.  Large ones share its threads, which read, hash and digest outside the
  interpreter lock; small ones come one after the other, since threads would only wait for that lock.
- Very many are shared among processes, small ones above all.  To start them takes some 50 ms, and a file of some
  kilobytes 1 ms, so that from some hundreds on it is worth it.
- Whoever names a number of jobs, an executor or a limit of time for each file has decided.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from ckptkit.errors import VerifyError
from ckptkit.transfer.workers import MANY_NBYTES, each_file

__all__ = ["Workers", "side_by_side"]

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)

_MANY = 250
"""Files from which processes are worth starting unasked."""

_TOGETHER = 64
"""Files that share the threads of one process before the next are begun, so that results come while others are read."""


_LONGEST_SECONDS = 1e7
"""Longer than any wait that threads can be told of (``threading.TIMEOUT_MAX``) on every system."""


class Work(Protocol[T_contra, R_co]):
    """What is done with one task: an importable function, for it may be called in another process."""

    def __call__(self, task: T_contra, threads: int = 1) -> R_co:
        """Do it with so many threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Who does the work.

    Attributes:
        jobs: how many processes; ``None``: as many as there are cores, where they are worth starting.
        executor: what runs it in their place.
        seconds: the time that one file may take; ``None``: any.

    Raises:
        VerifyError: a value that cannot be, or two that do not go together.
    """

    jobs: int | None = None
    executor: Executor | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        jobs: Any = self.jobs
        seconds: Any = self.seconds
        if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
            raise VerifyError(f"--jobs {jobs!r:.40}: expected a whole number of at least 1")
        if self.jobs is not None and self.executor is not None:
            raise VerifyError("jobs and executor both say who works; give one of them")
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise VerifyError(f"executor is {type(self.executor).__name__}; expected a concurrent.futures.Executor")
        if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < _LONGEST_SECONDS):
            raise VerifyError(f"--timeout {seconds!r:.40}: expected a number of seconds above 0")

    def are_others(self, count: int) -> bool:
        """Whether so many files are dealt with by others than this process."""
        if self.executor is not None or self.seconds is not None:
            return count > 0
        if self.jobs is not None:
            return self.jobs > 1 and count > 1
        return count >= _MANY


def side_by_side(
    tasks: Sequence[T],
    work: Work[T, R],
    *,
    workers: Workers,
    nbytes: Callable[[T], int],
    lost: Callable[[T, str, str], R],
) -> Iterator[R]:
    """What the work makes of each task, in their order, as it comes.

    Args:
        tasks: plain data.
        work: what is done with each.
        workers: who does it.
        nbytes: how much a task has to read.
        lost: makes the result of a task that others could not complete: called with it, the problem (``"died"``,
            ``"timed-out"``, ``"version"`` or ``"failed"``) and what is known of it.
    """
    if workers.are_others(len(tasks)):
        from ckptkit.fleet.engine import each

        asked = {"jobs": workers.jobs, "executor": workers.executor, "seconds": workers.seconds}
        for task, outcome in each(tasks, work, **asked):
            yield outcome.value if outcome.problem is None else lost(task, outcome.problem, outcome.text)
        return
    for start in range(0, len(tasks), _TOGETHER):
        some = tasks[start : start + _TOGETHER]
        sizes = [nbytes(task) for task in some]
        if sum(sizes) < MANY_NBYTES:  # threads gain nothing, and each result can be told before the next is begun
            threads = 2 if len(tasks) < (os.cpu_count() or 1) else 1
            yield from (work(task, threads) for task in some)
        else:
            yield from each_file(sizes, partial(_numbered, work, some))


def _numbered(work: Work[T, R], tasks: Sequence[T], number: int, threads: int) -> R:
    return work(tasks[number], threads)
