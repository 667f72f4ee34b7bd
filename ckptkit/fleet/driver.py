"""The driver hands out tasks and returns their results in order, whatever happens to each.

A task is pulled from the iterable when there is room for it, so many batches are under way as workers take, and
results wait in pickled form for those before them.  A batch is one task at first, and grows while batches come back
sooner than is worth a trip.

Tasks that a worker leaves undone are handed out again.  A batch that is lost with its worker is tried once more, one
task at a time; if others may have been at fault, as when memory runs out or an engine loses all tasks on a machine, the
tasks that are lost again are tried while nothing else runs.  Tasks that are lost then are ``died``: the others have
their results.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

from ckptkit.errors import CkptkitError
from ckptkit.extras import __version__
from ckptkit.fleet.outcome import Outcome, Problem, told
from ckptkit.fleet.worker import PROTOCOL, Call, Lost, RefusedError, Reply, Result
from ckptkit.startup import dataclass

__all__ = ["pickled", "shared_out"]

T = TypeVar("T")
R = TypeVar("R")

_MOST_TASKS = 10_000
"""Tasks that are under way or wait for one before them: a slow one holds up no others until there are so many."""

_MOST_NBYTES = 32 << 20
"""Bytes of results that wait."""

_LARGEST_BATCH = 256

_SHARES = 64
"""Into twice as many batches, or as there are workers, goes what is left of a known number of tasks."""

_PATIENCE = 4
"""How many times that a batch may take before it is cut short."""

_LOOK_SECONDS = 0.005
"""How often the workers are looked after while results are taken away."""


class Workers(Protocol):
    """`ckptkit.fleet.pool.Pool` and `ckptkit.fleet.executors.Given`."""

    most: int

    @property
    def free(self) -> int: ...

    def submit(self, ticket: int, call: Call) -> None: ...

    def wait(self, timeout: float) -> Iterator[tuple[int, Reply | Lost]]: ...

    def close(self) -> None: ...


def pickled(work: Callable[..., Any]) -> bytes:
    """The task, ready to send.

    Raises:
        CkptkitError: it cannot be pickled, as a lambda or a function in another cannot.
    """
    try:
        return pickle.dumps(work, PROTOCOL)
    except Exception as error:
        raise CkptkitError(f"the task cannot be sent to other processes: {told(error)}") from error


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


def shared_out(
    tasks: Iterable[T],
    work: bytes,
    start: Callable[[float | None], Workers],
    seconds: float | None,
    pace: float,
    count: int = 0,
) -> Iterator[tuple[T, Outcome[R]]]:
    """Every task with its outcome, in order.

    Args:
        tasks: pulled as there is room.
        work: see `pickled`.
        start: makes the workers; called with the seconds that a batch takes at most, ``None``: there is no limit.
        seconds: the limit of a task; ``None``: none.
        pace: seconds that a batch is to take.
        count: how many tasks there are, if known: the last batches are smaller, so that all end together.
    """
    limit = None if seconds is None else seconds + _PATIENCE * pace
    workers = start(limit)
    try:
        yield from _Driver[T, R](tasks, work, workers, seconds, pace, count).outcomes()
    finally:
        workers.close()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tasks by their numbers; how often they were tried before."""

    numbers: list[int]
    tries: int = 0


class _Driver(Generic[T, R]):
    """Batches in progress."""

    def __init__(
        self, tasks: Iterable[T], work: bytes, workers: Workers, seconds: float | None, pace: float, count: int
    ) -> None:
        self._remaining: Iterator[T] | None = iter(tasks)
        self._work, self._workers, self._seconds, self._pace = work, workers, seconds, pace
        self._tasks: dict[int, T] = {}  # those that were pulled and not given back
        self._results: dict[int, Result] = {}
        self._nbytes = 0  # of these
        self._pulled, self._count = 0, count
        self._batches: dict[int, _Batch] = {}
        self._tickets = 0
        self._run = os.urandom(8).hex()
        self._size = 1
        self._waiting: deque[int] = deque()  # pulled, and in no batch
        self._suspects: deque[int] = deque()
        self._reasons: dict[int, str] = {}  # of suspects: what became of their first worker
        self._alone: deque[int] = (
            deque()
        )  # suspects that may have been lost with others, to run while nothing else does
        self._is_alone = False
        self._refused = ""
        self._error: Exception | None = None

    def outcomes(self) -> Iterator[tuple[T, Outcome[R]]]:
        """Each task with its result, in order."""
        number, looked = 0, 0.0
        while True:
            is_all = self._hand_out()
            if number not in self._results:
                if not self._tasks:
                    break
                self._look(math.inf if is_all else 0)
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
        if self._error is not None:
            raise self._error

    # Handing out.

    def _hand_out(self) -> bool:
        """Give the workers what they can take, for a while: the iterable may be slow, and so are processes that start.

        Returns:
            Whether that is all there is to do now.
        """
        until = time.monotonic() + self._pace
        while self._refused or self._workers.free > 0:
            if time.monotonic() > until:
                return False
            batch = self._next_batch(until)
            if batch is None:
                return True
            numbers, data = self._packed(batch.numbers)
            if not numbers:
                continue
            ticket, self._tickets = self._tickets, self._tickets + 1
            self._batches[ticket] = _Batch(numbers, batch.tries)
            budget = _PATIENCE * self._pace
            call = (__version__, self._work, data, len(numbers), self._seconds, budget, f"{self._run}-{ticket}")
            try:
                if not self._refused:
                    self._workers.submit(ticket, call)
                    continue
            except RefusedError as error:
                self._refused = str(error)
            del self._batches[ticket]
            for number in numbers:
                self._note(number, ("died", self._reasons.pop(number, self._refused), None))
        return True

    def _next_batch(self, until: float) -> _Batch | None:
        if self._batches and (self._alone or self._is_alone):
            return None
        self._is_alone = bool(self._alone)
        if self._alone:
            return _Batch([self._alone.popleft()], tries=2)
        if self._suspects:
            return _Batch([self._suspects.popleft()], tries=1)
        size = self._size
        if self._count > self._pulled:
            left = self._count - self._pulled + len(self._waiting)
            size = max(1, min(size, left // (2 * min(self._workers.most, _SHARES))))
        while len(self._waiting) < size and self._has_room():
            self._pull()
            if time.monotonic() > until:
                break
        count = min(size, len(self._waiting))
        return _Batch([self._waiting.popleft() for _ in range(count)]) if count else None

    def _has_room(self) -> bool:
        return self._remaining is not None and len(self._tasks) < _MOST_TASKS and self._nbytes < _MOST_NBYTES

    def _pull(self) -> None:
        """One more task; an error of the iterable is raised in its place, after what came before it."""
        try:
            for task in self._remaining or ():
                self._tasks[self._pulled] = task
                self._waiting.append(self._pulled)
                self._pulled += 1
                return
        except Exception as error:
            self._error = error
        self._remaining = None

    def _packed(self, numbers: list[int]) -> tuple[list[int], bytes]:
        """Tasks, pickled together, and which they are: of those that cannot be pickled it is noted."""
        try:
            return numbers, pickle.dumps([self._tasks[number] for number in numbers], PROTOCOL)
        except Exception as error:
            if len(numbers) > 1:
                able = [number for number in numbers if self._packed([number])[0]]
                return self._packed(able)
            if numbers:
                self._note(numbers[0], ("failed", f"the task cannot be pickled: {told(error)}", None))
            return [], b""

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
            results = [("version", f"{theirs}: install the same version", None)] * len(batch.numbers)
        for number, result in zip(batch.numbers, results, strict=False):
            self._note(number, result)
        rest = batch.numbers[len(results) :]
        if not results:  # one of them cannot be read there
            self._suspects.extend(rest)
            return
        self._waiting.extendleft(reversed(rest))
        if not batch.tries:
            fitting = int(self._pace * len(results) / max(seconds, 1e-6))
            self._size = max(1, min(fitting, 2 * self._size, _LARGEST_BATCH))

    def _lose(self, batch: _Batch, lost: Lost) -> None:
        if not lost.is_begun:
            self._waiting.extendleft(reversed(batch.numbers))
        elif lost.is_final or batch.tries == 2 or (batch.tries and lost.is_sure):
            for number in batch.numbers:
                self._reasons.pop(number, None)
                self._note(number, (lost.problem, lost.text, None))
        else:
            (self._alone if batch.tries else self._suspects).extend(batch.numbers)
            self._reasons.update(dict.fromkeys(batch.numbers, lost.text))

    def _note(self, number: int, result: Result) -> None:
        self._results[number] = result
        self._nbytes += len(result[2] or b"")
