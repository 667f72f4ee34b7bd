"""Threads for what runs outside the interpreter lock: reading, writing, checksums, conversions."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

__all__ = ["MANY_NBYTES", "Background", "buffer", "in_parallel"]

MANY_NBYTES = 32 << 20
"""Bytes from which threads are worth starting."""

_kept = threading.local()

_MAX_WORKERS = 4
"""More than a few only wait for memory."""


def in_parallel(tasks: Iterable[Callable[[], object]], *, nbytes: int) -> None:
    """Call every task once, several at a time where there is much to do; the order is not kept.

    Args:
        tasks: taken one after the other as threads come free.
        nbytes: how much they go through in all.

    Raises:
        BaseException: what a task raised first, or an interrupt; no further task is begun.
    """
    workers = min(_MAX_WORKERS, os.cpu_count() or 1) if nbytes >= MANY_NBYTES else 1
    if workers == 1:
        for task in tasks:
            task()
        return
    remaining, lock, stop = iter(tasks), threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(remaining, None)
            if task is None:
                return
            task()

    threads = [Background(work, stop) for _ in range(workers)]
    try:
        for thread in threads:
            thread.wait()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def buffer(name: str, nbytes: int) -> memoryview:
    """Memory of this size, the same each time a thread asks for it by this name: fresh memory is what costs."""
    kept: dict[str, bytearray] = _kept.__dict__
    if len(kept.get(name, b"")) < nbytes:
        kept[name] = bytearray(nbytes)
    return memoryview(kept[name])[:nbytes]


class Background(threading.Thread):
    """A thread whose failure is raised where it is waited for.

    Args:
        work: what it does.
        stop: set when it fails, so that others stop too.
    """

    def __init__(self, work: Callable[[], None], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._stop_all = stop
        self._failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error
            self._stop_all.set()

    def wait(self) -> None:
        """Wait for its end; an interrupt is heard meanwhile.

        Raises:
            BaseException: what its work raised.
        """
        while self.is_alive():
            self.join(0.2)
        if self._failure is not None:
            raise self._failure
