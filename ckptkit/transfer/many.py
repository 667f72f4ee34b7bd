"""Work on many files: in this process or in others, chosen by what there is.

- A few files are dealt with in this process.  Large ones share its threads, which read, hash and digest outside the
  interpreter lock; small ones come one after the other, since threads would only wait for that lock.
- Very many are shared among processes, small ones above all.  To start them takes some 50 ms, and a file of some
  kilobytes 1 ms, so that from some hundreds on it is worth it.
- A number of jobs, an executor or a time limit per file decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from ckptkit.bytesource import pace
from ckptkit.startup import dataclass
from ckptkit.transfer.workers import MANY_NBYTES, each_file

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckptkit.fleet import Outcome

__all__ = ["Workers", "side_by_side"]

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)

_MANY = 250
"""Files from which processes are worth starting unasked."""

_TOGETHER = 64
"""Files that share the threads of one process before the next are begun, so that results come while others are read."""


class Work(Protocol[T_contra, R_co]):
    """The work on one task: an importable function, because it may be called in another process."""

    def __call__(self, task: T_contra, threads: int = 1) -> R_co:
        """Do it with so many threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Who does the work.

    Attributes:
        jobs: how many processes; ``None``: as many as there are cores, if they are worth starting.
        executor: what runs it in their place.
        seconds: the time that one file may take; ``None``: any.

    Raises:
        CkptkitError: a value that cannot be, or two that do not go together.
    """

    jobs: int | None = None
    executor: Executor | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.jobs, self.executor, self.seconds) != (None, None, None):
            from ckptkit.fleet import each  # says what is wrong with them

            each((), len, jobs=self.jobs, executor=self.executor, seconds=self.seconds)

    def are_others(self, count: int) -> bool:
        """Whether so many files are dealt with by others than this process."""
        if self.executor is not None or self.seconds is not None:
            return count > 0
        if self.jobs is not None:
            return self.jobs > 1 and count > 1
        from ckptkit.fleet import cores

        return count >= _MANY and cores() > 1


def side_by_side(
    tasks: Sequence[T],
    work: Work[T, R],
    *,
    workers: Workers,
    nbytes: Callable[[T], int],
    lost: Callable[[T, Outcome[R]], R],
    is_far: Callable[[T], bool] = lambda _: False,
) -> Iterator[R]:
    """The result of each task, in their order, as it comes.

    Args:
        tasks: plain data.
        work: the function for each.
        workers: who does it.
        nbytes: how much a task reads.
        lost: makes the result of a task that others could not complete, of what is known of it.
        is_far: whether to ask a task's size takes a trip to another machine.
    """
    known = None if pace.tell is None else _expected(tasks, nbytes, is_far)
    if workers.are_others(len(tasks)):
        from ckptkit.fleet import each
        from ckptkit.remote import carried

        jobs, executor, seconds = workers.jobs, workers.executor, workers.seconds
        others = each(tasks, carried(work), jobs=jobs, executor=executor, seconds=seconds, worth=1)
        for number, (task, outcome) in enumerate(others):
            pace.finish(known[number] if known else 0)
            yield lost(task, outcome) if outcome.problem is not None else outcome.result()
        return
    for start in range(0, len(tasks), _TOGETHER):
        some = tasks[start : start + _TOGETHER]
        sizes = known[start : start + _TOGETHER] if known else [nbytes(task) for task in some]
        if sum(sizes) < MANY_NBYTES:  # threads gain nothing, and each result is there before the next task begins
            threads = 2 if len(tasks) < (os.cpu_count() or 1) else 1
            yield from (_done(work, some, sizes, number, threads) for number in range(len(some)))
        else:
            yield from each_file(sizes, partial(_done, work, some, sizes))


def _done(work: Work[T, R], tasks: Sequence[T], sizes: Sequence[int], number: int, threads: int) -> R:
    result = work(tasks[number], threads)
    pace.finish(sizes[number])
    return result


def _expected(tasks: Sequence[T], nbytes: Callable[[T], int], is_far: Callable[[T], bool]) -> list[int] | None:
    """The size of each task, for the progress display; ``None`` if that takes requests."""
    sizes = None if any(map(is_far, tasks)) else list(map(nbytes, tasks))
    pace.expect(len(tasks), sum(sizes or ()))
    return sizes
