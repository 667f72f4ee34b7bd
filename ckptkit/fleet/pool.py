"""Processes of our own, each with one batch at a time and a connection to itself alone.

A worker that dies takes nothing with it but the batch that it had; one that hangs is killed by itself.  No thread is
started here, so that a process which had one thread still has one and may fork at any time: a fork takes milliseconds,
a new Python a fifth of a second and more.  Where there are several threads, and elsewhere than on Linux, workers are
new Pythons; they do not run the user's ``__main__`` again, which may have no guard against it.

A worker does not hear Ctrl-C, which is the driver's to deal with; SIGTERM lets it clean up.  It ends with its driver,
however that ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process, process
from typing import Any

from ckptkit.fleet.outcome import told
from ckptkit.fleet.worker import PROTOCOL, SLACK, SLICE, Call, Lost, RefusedError, Reply, StopWorker, run

__all__ = ["Pool"]

_NAME = "ckptkit-worker"

_START_SECONDS = 60.0
"""Within which a worker must be ready: it imports ckptkit, and the disk may be slow."""

_CLEANING_SECONDS = 3.0
"""For which a worker that is asked to end may clean up."""

_FAILED_STARTS = 3
"""In a row, after which no further is tried: those that are ready go on."""

_starting = threading.Lock()

_WATCHED_SECONDS = 1.0
"""How often a worker looks whether its driver is there."""


class _Worker:
    """One process, and the batch that it has.

    Attributes:
        ticket: of the batch; ``None``: it has none.
        call: what it is to do once it is ready.
        since: when it was given that, or started.
    """

    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True, name=_NAME)
        try:
            with _signals_held():
                self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
        self.ready = False
        self.ticket: int | None = None
        self.call: bytes | None = None
        self.since = time.monotonic()

    def give(self, ticket: int, call: bytes) -> None:
        """A batch, at once or when it is ready: what is sent to a process that does not read may not fit."""
        self.ticket, self.call = ticket, call
        if self.ready:
            self.send()

    def send(self) -> None:
        if self.call is not None:
            self.since = time.monotonic()
            data, self.call = self.call, None
            with suppress(OSError):  # it died: that is noticed where its answer is waited for
                self.connection.send_bytes(data)

    def end(self) -> str:
        """How it ended; it is killed where it has not."""
        self.connection.close()
        if self.process.exitcode is None:
            self.process.join(0.2)  # its connection is closed a moment before it has ended
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(_CLEANING_SECONDS)
        if self.process.exitcode is None:  # it waits for a disk, and cannot be killed: neither is it waited for
            getattr(process, "_children", set()).discard(self.process)
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
            raise RefusedError("no worker process gets ready: the last ones ended before they were")
        try:
            if _may_fork():
                worker = _Worker(get_context("fork"))
            else:
                with _main_left_alone():
                    worker = _Worker(get_context("spawn"))
        except (OSError, RuntimeError) as error:
            raise RefusedError(f"no worker process can be started: {told(error)}") from error
        self._workers.append(worker)
        return worker

    def wait(self, timeout: float) -> Iterator[tuple[int, Reply | Lost]]:
        """The batches that came back, or are lost; waits for one, so many seconds at most."""
        by_object: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        by_object |= {worker.process.sentinel: worker for worker in self._workers}
        ready = connection.wait(list(by_object), min(timeout, SLICE))
        for worker in dict.fromkeys(by_object[each] for each in ready):
            yield from self._heard(worker)
        now = time.monotonic()
        for worker in self._workers.copy():
            limit = self._limit if worker.ready else _START_SECONDS
            if worker.ticket is not None and limit is not None and now - worker.since > limit:
                worker.process.kill()
                text = f"its worker gave no sign for {limit:g} s and was killed"
                yield from self._ended(worker, Lost(text=text, problem="timed-out", is_sure=True))

    def _heard(self, worker: _Worker) -> Iterator[tuple[int, Reply | Lost]]:
        try:
            if not worker.connection.poll():
                raise EOFError  # its process has ended
            data = worker.connection.recv_bytes()
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
        until = time.monotonic() + _CLEANING_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.end()


def _ending(code: int | None) -> str:
    """What is told of an exit code, as `multiprocessing` gives them."""
    if code is None:
        return "does not end"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + ", as the system does where memory runs out" * (name == "SIGKILL")


def _may_fork() -> bool:
    """Whether this process has one thread alone: what others hold would stay locked in a copy for ever."""
    if sys.platform != "linux":
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return threading.active_count() == 1


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process that is started hears none of them before it knows what to do with them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Workers that start in the block do not import the user's ``__main__``, which may have no guard against it."""
    from multiprocessing import spawn

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name == _NAME:  # other threads may start what they like meanwhile
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    with _starting:
        original: Callable[[str], dict[str, Any]] = spawn.get_preparation_data
        setattr(spawn, "get_preparation_data", without_main)  # noqa: B010 - a function of the standard library
        try:
            yield
        finally:
            setattr(spawn, "get_preparation_data", original)  # noqa: B010


# In the worker.


def _serve(theirs: Any, driver: int) -> None:
    """Do one batch after the other, until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, _stop)
    threading.Thread(target=_watch, args=(driver,), daemon=True).start()
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        theirs.send_bytes(b"")
        while True:
            theirs.send_bytes(pickle.dumps(run(*pickle.loads(theirs.recv_bytes())), PROTOCOL))  # noqa: S301 - our own
    except (EOFError, OSError):  # the driver has gone
        os._exit(1)
    except StopWorker as stopped:
        number = int(stopped.args[0])
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _stop(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once: what is unfinished is being removed
    raise StopWorker(number)


def _watch(driver: int) -> None:
    """End this process when its driver is gone, even where its end was not heard of."""
    parent = parent_process()
    while os.name == "nt" or os.getppid() == driver:
        if parent is not None and connection.wait([parent.sentinel], _WATCHED_SECONDS):
            break
    if os.name != "nt":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_CLEANING_SECONDS)
    os._exit(1)
