"""Tasks handed out and their results given back, in order: lazily, in bounded memory, whatever becomes of each.

A task is pulled from the iterable when there is room for it, so many batches are under way as there are workers to take
them, and results wait in pickled form for those before them.  A batch is one task at first, and grows while batches
come back sooner than is worth a trip.

What a worker leaves undone is handed out anew.  A batch that is lost with its worker is tried once more, one task at a
time: that which loses its worker again is ``died``, and the others have their results.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast

from ckptkit.errors import CkptkitError
from ckptkit.extras import __version__
from ckptkit.fleet.worker import PROTOCOL, Reply, Result, failure, late, told

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckptkit.fleet.executors import Call, Lost

__all__ = ["Outcome", "Problem", "cores", "each"]

T = TypeVar("T")
R = TypeVar("R")

Problem = Literal["died", "timed-out", "failed", "version"]

_MOST_TASKS = 10_000
"""Tasks that are under way or wait for one before them: a slow one holds up no others until there are so many."""

_MOST_NBYTES = 32 << 20
"""Bytes of results that wait."""

_LARGEST_BATCH = 256

_BATCH_SECONDS = 0.02
"""What a batch is to take: a trip to a process takes some hundredths of that."""

_GIVEN_BATCH_SECONDS = 0.25
"""The same with an executor of somebody else, which may be of other machines."""

_PATIENCE = 4
"""How many times that a batch may take before it is cut short."""

_LOOK_SECONDS = 0.005
"""How often the workers are looked after while results are taken away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[R]):
    """What came of a task.

    Attributes:
        value: what the work returned; ``None`` where there is a problem.
        problem: ``None``: there is none; ``"failed"``: the work raised an error, or something could not be pickled;
            ``"died"``: so did its worker, or nobody took it; ``"timed-out"``; ``"version"``: the worker has another
            ckptkit.
        text: the problem in a sentence.
        error: what the work raised, where that is an error of ckptkit.
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


class _Workers(Protocol):
    """`ckptkit.fleet.pool.Pool` and `ckptkit.fleet.executors.Given`."""

    @property
    def free(self) -> int: ...

    def submit(self, ticket: int, call: Call) -> None: ...

    def wait(self, timeout: float) -> Iterator[tuple[int, Reply | Lost]]: ...

    def close(self) -> None: ...


def cores() -> int:
    """How many processors this process may use: those it is bound to, and no more than its control group is allowed."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def _quota() -> float | None:
    """Processors that the control group has; ``None``: no bound is known.

    Where they stand: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``), and of version 1
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    own = ""
    found = []
    try:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            own = next((line.strip()[3:] for line in file if line.startswith("0::")), "")
    except OSError:
        return None
    steps = own.strip("/").split("/") if own.strip("/") else []
    folders = ["/".join(["/sys/fs/cgroup", *steps[:count]]) for count in range(len(steps) + 1)]
    for folder in folders:
        found += _numbers(f"{folder}/cpu.max")
    if not found:
        base = "/sys/fs/cgroup/cpu/cpu.cfs_"
        found += _numbers(f"{base}quota_us", f"{base}period_us")
    return min(found, default=None)


def _numbers(*paths: str) -> list[float]:
    """The quota over the period that files hold."""
    try:
        texts = []
        for path in paths:
            with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123
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

    Nothing is lost: of every task there is an outcome.  Tasks are pulled as they are needed; closing the iterator, or
    an interrupt, ends what is under way.  With one job the work is done in this process, and a limit is kept by
    a thread that is left behind when it is late; a task that ends the process ends all.

    Args:
        tasks: plain data that can be pickled; any iterable.
        work: a function of a module, or a `functools.partial` of one, which others can import.
        jobs: how many processes; ``None``: as `cores` counts them.
        executor: any `concurrent.futures.Executor`, in place of processes of our own; it is not shut down.
        seconds: the limit of one task; ``None``: none.
        worth: number of tasks from which processes of our own are worth starting.  Without ``jobs``, a limit makes
            them worth it always: only another process can be stopped.

    Raises:
        CkptkitError: ``jobs`` or ``seconds`` is not a number above 0, ``jobs`` and ``executor`` are both given, the
            executor is none, or ``work`` cannot be pickled.
    """
    if jobs is not None and executor is not None:
        raise CkptkitError("give either jobs or an executor: an executor knows how many workers it has")
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise CkptkitError(f"jobs must be a whole number from 1 up, not {jobs!r:.80}")
    if seconds is not None and (isinstance(seconds, bool) or not 0 < seconds < math.inf):
        raise CkptkitError(f"the limit of a task must be a number of seconds above 0, not {seconds!r:.80}")
    if executor is not None:
        if not callable(getattr(executor, "submit", None)):
            raise CkptkitError(f"the executor has no method submit: {executor!r:.80}")
        return _shared_out(tasks, _pickled(work), partial(_given, executor), seconds, _GIVEN_BATCH_SECONDS)
    return _with_jobs(tasks, work, jobs, seconds, worth)


def _with_jobs(
    tasks: Iterable[T], work: Callable[[T], R], jobs: int | None, seconds: float | None, worth: int
) -> Iterator[tuple[T, Outcome[R]]]:
    """In this process or in several of our own."""
    remaining = iter(tasks)
    count = cores() if jobs is None else jobs
    is_limited = jobs is None and seconds is not None
    if count > 1 or is_limited:
        first = list(islice(remaining, max(1, worth)))
        remaining = chain(first, remaining)
        if (len(first) == worth or (is_limited and first)) and _may_start():
            start = partial(_own, count, _needs_main(work))
            yield from _shared_out(remaining, _pickled(work), start, seconds, _BATCH_SECONDS)
            return
    for task in remaining:
        yield task, _here(work, task, seconds)


def _may_start() -> bool:
    """Whether this process may have others: a worker may not."""
    process = sys.modules.get("multiprocessing.process")
    return process is None or not process.current_process().daemon


def _own(jobs: int, needs_main: bool, limit: float | None) -> _Workers:
    from ckptkit.fleet.pool import Pool  # a plain command starts faster without

    return Pool(jobs, limit, needs_main=needs_main)


def _given(executor: Executor, limit: float | None) -> _Workers:
    from ckptkit.fleet.executors import Given

    return Given(executor, limit)


def _needs_main(work: Callable[..., Any]) -> bool:
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__module__", None) == "__main__"


def _pickled(work: Callable[..., Any]) -> bytes:
    try:
        return pickle.dumps(work, PROTOCOL)
    except Exception as error:
        raise CkptkitError(f"what is to be done cannot be sent to other processes: {told(error)}") from error


def _here(work: Callable[[T], R], task: T, seconds: float | None) -> Outcome[R]:
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

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        thread.join(min(left, 0.5))  # an interrupt is heard meanwhile
    return outcomes[0] if outcomes else _outcome(late(seconds))


def _failed(error: BaseException) -> Outcome[Any]:
    return Outcome(problem="failed", text=failure(error)[1], error=error if isinstance(error, CkptkitError) else None)


def _outcome(result: Result) -> Outcome[Any]:
    """A result as it came from a worker."""
    problem, text, data = result
    try:
        value = None if data is None else pickle.loads(data)  # noqa: S301 - our own
    except Exception as error:
        return Outcome(problem="failed", text=text or f"its result cannot be read here: {told(error)}")
    if not problem:
        return Outcome(value=value)
    return Outcome(problem=cast("Problem", problem), text=text, error=value)


def _shared_out(
    tasks: Iterable[T], work: bytes, start: Callable[[float | None], _Workers], seconds: float | None, pace: float
) -> Iterator[tuple[T, Outcome[R]]]:
    limit = None if seconds is None else seconds + _PATIENCE * pace
    workers = start(limit)
    try:
        yield from _Driver[T, R](tasks, work, workers, seconds, pace).outcomes()
    finally:
        workers.close()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tasks by their numbers; whether it is the second and last time that they are tried."""

    numbers: list[int]
    again: bool = False


class _Driver(Generic[T, R]):
    """What is under way."""

    def __init__(self, tasks: Iterable[T], work: bytes, workers: _Workers, seconds: float | None, pace: float) -> None:
        self._remaining: Iterator[T] | None = iter(tasks)
        self._work, self._workers, self._seconds, self._pace = work, workers, seconds, pace
        self._tasks: dict[int, T] = {}  # those that were pulled and not given back
        self._results: dict[int, Result] = {}
        self._nbytes = 0  # of these
        self._pulled = 0
        self._batches: dict[int, _Batch] = {}
        self._tickets = 0
        self._size = 1
        self._waiting: deque[int] = deque()  # pulled, and in no batch
        self._suspects: deque[int] = deque()
        self._reasons: dict[int, str] = {}  # of suspects: what became of their first worker
        self._is_quiet = False  # whether suspects are tried while nothing else runs
        self._refused = ""

    def outcomes(self) -> Iterator[tuple[T, Outcome[R]]]:
        """Each task with what came of it, in order."""
        number, looked = 0, 0.0
        while True:
            self._hand_out()
            if number not in self._results:
                if not self._tasks:
                    return
                self._look(math.inf)
                looked = time.monotonic()
            while number in self._results:
                result = self._results.pop(number)
                self._nbytes -= len(result[2] or b"")
                yield self._tasks.pop(number), _outcome(result)
                number += 1
                if time.monotonic() - looked > _LOOK_SECONDS:
                    self._look(0)
                    self._hand_out()
                    looked = time.monotonic()

    # Handing out.

    def _hand_out(self) -> None:
        """Give the workers what they can take."""
        while self._refused or self._workers.free > 0:
            batch = self._next_batch()
            if batch is None:
                return
            calls = [(number, data) for number in batch.numbers if (data := self._data(number)) is not None]
            if not calls:
                continue
            numbers = [number for number, _ in calls]
            ticket, self._tickets = self._tickets, self._tickets + 1
            self._batches[ticket] = _Batch(numbers, batch.again)
            budget = _PATIENCE * self._pace
            call = (__version__, self._work, [data for _, data in calls], self._seconds, budget)
            try:
                if not self._refused:
                    self._workers.submit(ticket, call)
                    continue
            except Exception as error:
                self._refused = str(error)
            del self._batches[ticket]
            for number in numbers:
                self._note(number, ("died", self._reasons.pop(number, self._refused), None))

    def _next_batch(self) -> _Batch | None:
        if self._suspects:
            if not self._is_quiet or not self._batches:
                return _Batch([self._suspects.popleft()], again=True)
            return None
        if self._is_quiet and self._batches:
            return None
        self._is_quiet = False
        while len(self._waiting) < self._size and self._has_room():
            self._pull()
        count = min(self._size, len(self._waiting))
        return _Batch([self._waiting.popleft() for _ in range(count)]) if count else None

    def _has_room(self) -> bool:
        return self._remaining is not None and len(self._tasks) < _MOST_TASKS and self._nbytes < _MOST_NBYTES

    def _pull(self) -> None:
        for task in self._remaining or ():
            self._tasks[self._pulled] = task
            self._waiting.append(self._pulled)
            self._pulled += 1
            return
        self._remaining = None

    def _data(self, number: int) -> bytes | None:
        """The pickled task; ``None``: it cannot be pickled, which is noted."""
        try:
            return pickle.dumps(self._tasks[number], PROTOCOL)
        except Exception as error:
            self._note(number, ("failed", f"the task cannot be pickled: {told(error)}", None))
            return None

    # Taking back.

    def _look(self, timeout: float) -> None:
        for ticket, reply in self._workers.wait(timeout) if self._batches else ():
            batch = self._batches.pop(ticket)
            if isinstance(reply, tuple):
                self._take(batch, reply)
            else:
                self._lose(batch, reply)

    def _take(self, batch: _Batch, reply: Reply) -> None:
        (version, python), results, seconds, _ = reply
        if version != __version__:
            theirs = f"the worker has ckptkit {version} (Python {python}), and this process {__version__}"
            results = [("version", f"{theirs}: install the same", None)] * len(batch.numbers)
        for number, result in zip(batch.numbers, results, strict=False):
            self._note(number, result)
        rest = batch.numbers[len(results) :]
        self._waiting.extendleft(reversed(rest))
        if not batch.again:
            fitting = int(self._pace * len(results) / max(seconds, 1e-6))
            self._size = max(1, min(fitting, 2 * self._size, _LARGEST_BATCH))

    def _lose(self, batch: _Batch, lost: Lost) -> None:
        if not lost.is_begun:
            self._waiting.extendleft(reversed(batch.numbers))
        elif batch.again or lost.is_final:
            for number in batch.numbers:
                self._reasons.pop(number, None)
                self._note(number, (lost.problem, lost.text, None))
        else:
            self._suspects.extend(batch.numbers)
            self._reasons.update(dict.fromkeys(batch.numbers, lost.text))
            self._is_quiet |= lost.is_quiet

    def _note(self, number: int, result: Result) -> None:
        self._results[number] = result
        self._nbytes += len(result[2] or b"")
