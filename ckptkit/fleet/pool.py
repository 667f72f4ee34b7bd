"""Our own processes, each with one batch at a time and a private channel.

A worker that dies takes nothing with it but the batch that it had; one that hangs is killed by itself.  No thread is
started here, so that a process which had one thread still has one and may fork at any time.
"""

from __future__ import annotations

import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from ckptkit.fleet.outcome import told
from ckptkit.fleet.processes import CLEANING_SECONDS, ready, signals_held, started
from ckptkit.fleet.worker import PROTOCOL, SLACK, SLICE, Call, Lost, RefusedError, Reply

__all__ = ["Pool"]

_START_SECONDS = 60.0
"""Within which a worker must be ready: it imports ckptkit, and the disk may be slow."""

_FAILED_STARTS = 3
"""In a row, after which no more are started: those that are ready continue."""


class _Worker:
    """One process, and the batch that it has.

    Attributes:
        process: its own.
        ready: whether it has said that it is.
        ticket: of the batch; ``None``: it has none.
        since: when it was given that, or started.
    """

    def __init__(self) -> None:
        self.process = started()
        self.ready = False
        self.ticket: int | None = None
        self.since = time.monotonic()
        self._call: bytes | None = None

    def give(self, ticket: int, call: bytes) -> None:
        """A batch, at once or when it is ready: a message to a process that is not reading may not fit."""
        self.ticket, self._call = ticket, call
        if self.ready:
            self.send()

    def send(self) -> None:
        if self._call is not None:
            self.since = time.monotonic()
            data, self._call = self._call, None
            with suppress(OSError):  # it died: that is noticed where its answer is waited for
                self.process.send(data)

    def end(self) -> str:
        """How it ended; it is killed if it has not."""
        self.process.join(0.2)  # its channel is closed a moment before it has ended
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(CLEANING_SECONDS)
        self.process.close()
        return _ending(self.process.exitcode)


class Pool:
    """Up to so many workers, started as there is work for them.

    Args:
        jobs: how many at most.
        limit: seconds that a batch takes at most; ``None``: there is no limit.

    Attributes:
        most: how many batches they are given.
    """

    def __init__(self, jobs: int, limit: float | None) -> None:
        self.most = min(jobs, 60) if sys.platform == "win32" else jobs  # 63 handles can be waited for
        self._limit = None if limit is None else limit + SLACK
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    @property
    def free(self) -> int:
        """How many more batches it is given now."""
        most = self.most if self._failed_starts < _FAILED_STARTS else max(1, len(self._workers))
        return most - sum(worker.ticket is not None for worker in self._workers)

    def submit(self, ticket: int, call: Call) -> None:
        """Hand over a batch.

        Raises:
            RefusedError: no worker can be started.
        """
        worker = next((worker for worker in self._workers if worker.ticket is None), None)
        if worker is None:
            worker = self._started()
        worker.give(ticket, pickle.dumps(call, PROTOCOL))

    def _started(self) -> _Worker:
        if self._failed_starts >= _FAILED_STARTS:
            raise RefusedError("no worker process starts: the last ones ended before they were ready")
        try:
            with signals_held():
                self._workers.append(_Worker())
        except (OSError, RuntimeError) as error:
            raise RefusedError(f"no worker process can be started: {told(error)}") from error
        return self._workers[-1]

    def wait(self, timeout: float) -> Iterator[tuple[int, Reply | Lost]]:
        """The batches that came back, or are lost; waits for one, so many seconds at most."""
        by_process = {worker.process: worker for worker in self._workers}
        said = ready(by_process, min(timeout, SLICE))
        for process in said:
            yield from self._heard(by_process[process])
        now = time.monotonic()
        for worker in self._workers.copy():
            if timeout and not said and worker.process.exitcode is not None:  # another holds its channel open
                yield from self._ended(worker)
                continue
            limit = self._limit if worker.ready else _START_SECONDS
            if worker.ticket is not None and limit is not None and now - worker.since > limit:
                worker.process.kill()
                text = f"its worker did not respond for {limit:g} s and was killed"
                yield from self._ended(worker, Lost(text=text, problem="timed-out", is_sure=True))

    def _heard(self, worker: _Worker) -> Iterator[tuple[int, Reply | Lost]]:
        try:
            data = worker.process.receive()
            reply: Reply | None = pickle.loads(data) if data else None  # noqa: S301 - our own
        except (EOFError, OSError):
            yield from self._ended(worker)
            return
        if reply is None:
            worker.ready = True
            self._failed_starts = 0
            worker.send()
            return
        ticket, worker.ticket = worker.ticket, None
        if reply[3]:  # a task still runs there, and would be in the way of others
            self._workers.remove(worker)
            worker.process.kill()
            worker.end()
        if ticket is not None:
            yield ticket, reply

    def _ended(self, worker: _Worker, lost: Lost | None = None) -> Iterator[tuple[int, Lost]]:
        self._workers.remove(worker)
        how = worker.end()
        if lost is None:
            lost = Lost(text=f"its worker {how}", is_sure=worker.process.exitcode != -9)
        if not worker.ready:
            self._failed_starts += 1
            lost = Lost(text=f"its worker {how} before it was ready", is_begun=False)
        if worker.ticket is not None:
            yield worker.ticket, lost

    def close(self) -> None:
        """End all of them; those that are at work may clean up first."""
        workers, self._workers = self._workers, []
        for worker in workers:
            is_working = worker.ready and worker.ticket is not None
            (worker.process.terminate if is_working else worker.process.kill)()
        until = time.monotonic() + CLEANING_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.end()


def _ending(code: int | None) -> str:
    """The message for an exit code from `multiprocessing`."""
    if code is None:
        return "does not end"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + ", as the system does when memory runs out" * (name == "SIGKILL")
