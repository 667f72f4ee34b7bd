"""Batches through an executor that a user has: `concurrent.futures`' own, dask's, or what has their ``submit``.

Of an executor only ``submit`` is used, of its futures ``add_done_callback``, ``result`` and ``cancel``.  It is never
shut down: it is the user's.  A `ProcessPoolExecutor` takes nothing any more once one of its workers has died; what is
left is then done by processes of our own, which are on the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from ckptkit.fleet.outcome import told
from ckptkit.fleet.worker import SLACK, SLICE, Call, Lost, RefusedError, Reply, run

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from ckptkit.fleet.pool import Pool

__all__ = ["Given"]

_FIRST, _MOST = 64, 1024
"""Batches in flight at first and at last, one more for each that came back: how many workers there are is not known."""


class Given:
    """An executor, and the batches that it has.

    Args:
        executor: the user's.
        spare: makes processes of our own, called with the limit.
        limit: seconds that a batch takes at most once it has begun; ``None``: there is no limit.

    Attributes:
        most: how many batches it is given.
    """

    def __init__(self, executor: Executor, spare: Callable[[float | None], Pool], limit: float | None) -> None:
        self._executor = executor
        self._own: Pool | None = None
        self._spare = partial(spare, limit)
        self._limit = None if limit is None else 2 * limit + SLACK
        self._futures: dict[int, Future[Reply]] = {}
        self._since: dict[int, float] = {}
        self._came: SimpleQueue[int] = SimpleQueue()
        self.most = _FIRST

    @property
    def free(self) -> int:
        """How many more batches it is given now."""
        return self.most - len(self._futures) if self._own is None else self._own.free

    def submit(self, ticket: int, call: Call) -> None:
        """Hand over a batch.

        Raises:
            RefusedError: the executor does not take it.
        """
        if self._own is not None:
            self._own.submit(ticket, call)
            return
        try:
            future = self._executor.submit(run, *call)
            self._futures[ticket] = future
            self._since[ticket] = time.monotonic()
            future.add_done_callback(lambda _: self._came.put(ticket))
        except Exception as error:
            self._futures.pop(ticket, None)
            if not _is_broken_pool(error):
                raise RefusedError(f"the executor accepts no work: {told(error)}") from error
            self._own = self._spare()
            self._own.submit(ticket, call)

    def wait(self, timeout: float) -> Iterator[tuple[int, Reply | Lost]]:
        """The batches that came back, or are given up; waits for one, so many seconds at most."""
        if self._own is not None and not self._futures:
            yield from self._own.wait(timeout)
            return
        try:
            came = [self._came.get(timeout=min(timeout, SLICE))] if timeout else [self._came.get_nowait()]
            while not self._came.empty():
                came.append(self._came.get_nowait())
        except Empty:
            came = []
        for ticket in came:
            if (future := self._futures.pop(ticket, None)) is not None:
                self._since.pop(ticket)
                self.most = min(self.most + 1, _MOST)
                self._moved(ticket)
                yield ticket, _reply(future)
        yield from self._overdue()

    def _moved(self, ticket: int) -> None:
        """Tasks that were handed over later may begin only now."""
        if self._limit is not None:
            now = time.monotonic()
            self._since.update((other, now) for other in self._since if other > ticket)

    def _overdue(self) -> Iterator[tuple[int, Lost]]:
        """Batches without a sign: each has waited for one before it to end, and then for itself."""
        if self._limit is None:
            return
        now = time.monotonic()
        for ticket in [ticket for ticket, since in self._since.items() if now - since > self._limit]:
            del self._since[ticket]
            is_begun = not self._futures.pop(ticket).cancel()
            text = f"the executor returned no result for {self._limit:g} s, the time allowed for its whole batch"
            yield ticket, Lost(text=text, problem="timed-out", is_final=is_begun)

    def close(self) -> None:
        """Cancel everything that has not begun; the rest ends by itself, and its results are ignored."""
        futures, self._futures = list(self._futures.values()), {}
        for future in futures:
            future.cancel()
        if self._own is not None:
            self._own.close()


def _is_broken_pool(error: Exception) -> bool:
    from concurrent.futures.process import BrokenProcessPool

    return isinstance(error, BrokenProcessPool)


def _reply(future: Future[Reply]) -> Reply | Lost:
    """The result of a future that is done."""
    from concurrent.futures import BrokenExecutor, CancelledError  # here: who gave the executor has imported it

    try:
        reply: Any = future.result()
    except CancelledError:
        return Lost(text="it was canceled", is_final=True)
    except (ImportError, AttributeError) as error:
        return Lost(text=f"the worker cannot run this version of ckptkit: {told(error)}", problem="version")
    except BrokenExecutor as error:
        return Lost(text=f"the executor lost its worker: {told(error)}")
    except Exception as error:
        return Lost(text=f"the executor lost it: {told(error)}")
    kinds = tuple(map(type, reply)) if isinstance(reply, tuple) else ()
    if kinds[:2] != (tuple, list) or len(kinds) != 4:
        return Lost(text=f"the executor returned {reply!r:.80}, which is not a worker's result")
    return cast(Reply, reply)
