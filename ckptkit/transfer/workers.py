"""Threads for what runs outside the interpreter lock: reading, writing, checksums, conversions; and interrupts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from ckptkit.bytesource import given_up

__all__ = [
    "MANY_NBYTES",
    "SIGNALS",
    "Background",
    "Progress",
    "Stopped",
    "buffer",
    "each_file",
    "in_parallel",
    "near_together",
    "uninterrupted",
]

T = TypeVar("T")

Progress = Callable[[int, int], object]
"""Called with the bytes processed so far and the total."""

MANY_NBYTES = 32 << 20
"""Bytes from which threads are worth starting."""

_NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Those that ask a process to end, and let it clean up."""

_kept = threading.local()

_MAX_WORKERS = 4
"""More than a few only wait for memory."""


class Stopped(Exception):  # noqa: N818 - not an error: another thread has one
    """Raised in a task that is no longer wanted."""


def in_parallel(
    tasks: Iterable[Callable[[], object]],
    *,
    nbytes: int,
    stop: threading.Event | None = None,
    most: int = _MAX_WORKERS,
) -> None:
    """Call every task once, several at a time if there is much to do; the order is not kept.

    Args:
        tasks: taken one after the other as threads come free.
        nbytes: how much they process in total.
        stop: set when one fails or is interrupted; the others may look at it, and raise `Stopped`.
        most: how many at a time, if there are as many processors.

    Raises:
        BaseException: a task's first error, or an interrupt; no further task is begun.
    """
    workers = min(most, os.cpu_count() or 1) if nbytes >= MANY_NBYTES else 1
    remaining = iter(tasks)
    first = list(islice(remaining, min(workers, 2)))
    remaining = chain(first, remaining)
    if len(first) < 2:  # a single task has nothing beside it
        for task in remaining:
            task()
        return
    lock, failures = threading.Lock(), list[BaseException]()
    halt = stop or threading.Event()

    def work() -> None:
        try:
            while not halt.is_set():
                with lock:
                    task = next(remaining, None)
                if task is None:
                    return
                task()
        except BaseException as error:
            failures.append(error)
            raise

    threads: list[Background] = []
    try:
        with uninterrupted():  # no thread without a record of it
            threads += [Background(work, halt) for _ in range(workers)]
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # an interrupt is received in the meantime
    except BaseException:
        halt.set()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]


def near_together(tasks: Iterable[Callable[[], object]], apart: int) -> Iterator[Callable[[], object]]:
    """The tasks, none of which begins before all but the last few before it are done: while one waits, others work.

    Prefetched bytes are kept only for a while (`ckptkit.remote.ahead`).

    Args:
        tasks: taken by `in_parallel`.
        apart: how many of them may be under way at a time, with those between that are done.
    """
    under_way: set[int] = set()
    changed = threading.Condition()

    def run(number: int, task: Callable[[], object]) -> None:
        with changed:
            changed.wait_for(lambda: number - min(under_way) < apart)
        try:
            task()
        finally:
            with changed:
                under_way.discard(number)
                changed.notify_all()

    for number, task in enumerate(tasks):
        with changed:
            under_way.add(number)
        yield partial(run, number, task)


def each_file(sizes: Sequence[int], work: Callable[[int, int], T]) -> list[T]:
    """Process several files in parallel, the largest first, so that none is left for one processor at the end.

    Args:
        sizes: of each file, in bytes.
        work: called with a file's number and how many threads it may use.

    Returns: The result for each file, in order.
    """
    cores = os.cpu_count() or 1
    threads = 2 if len(sizes) < cores else 1
    made: dict[int, T] = {}

    def note(number: int) -> None:
        made[number] = work(number, threads)

    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    in_parallel((partial(note, number) for number in order), nbytes=sum(sizes), most=cores)
    return [made[number] for number in range(len(sizes))]


def buffer(name: str, nbytes: int) -> memoryview:
    """Memory of this size, the same each time a thread asks for it by this name: fresh memory is what costs."""
    kept: dict[str, bytearray] = _kept.__dict__
    if len(kept.get(name, b"")) < nbytes:
        kept[name] = bytearray(nbytes)
    return memoryview(kept[name])[:nbytes]


class Background(threading.Thread):
    """A thread whose failure is raised where it is waited for; it has the context in which it was started.

    Args:
        work: its function.
        stop: set when it fails, so that others stop too.
    """

    def __init__(self, work: Callable[[], None], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._context = copy_context()  # the storage options of a command are in it
        self._work = work
        self._stop_all = stop
        self._failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._context.run(given_up.set, self._stop_all)
            self._context.run(self._work)
        except BaseException as error:
            self._failure = error
            self._stop_all.set()

    def wait(self) -> None:
        """Wait for its end; an interrupt is heard in the meantime.

        Raises:
            BaseException: what its work raised.
        """
        while self.is_alive():
            self.join(0.2)
        if self._failure is not None:
            raise self._failure


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP are heard when the block is done: a few calls, which take milliseconds.

    Masking them would not work: a mask belongs to one thread, and Python receives the signals of any thread.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in that one alone
        yield
        return
    came: list[int] = []

    def hear() -> None:
        for number in came:
            signal.raise_signal(number)

    with ExitStack() as stack:
        stack.callback(hear)
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _: came.append(number))
        yield
