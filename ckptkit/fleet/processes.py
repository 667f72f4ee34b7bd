"""One process of our own: how it starts, is talked to and ends; what it does.

A fork takes milliseconds, a new Python a fifth of a second and more.  A process forks if it has only one thread, on
Linux, because locks that other threads hold would stay locked in the copy for ever; it forks directly, because
importing `multiprocessing` takes longer than all the forks.  Elsewhere workers are new Pythons, which do not run the
user's ``__main__`` again: it may have no guard against that.

A worker ignores Ctrl-C, which the driver handles; SIGTERM lets it clean up.  It ends with its driver,
however that ends.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol

from ckptkit.fleet import worker
from ckptkit.fleet.worker import PROTOCOL, StopWorker, run

__all__ = ["CLEANING_SECONDS", "Process", "ready", "signals_held", "started"]

CLEANING_SECONDS = 3.0
"""For which a worker that is asked to end may clean up."""

_WATCHED_SECONDS = 1.0
"""How often a worker looks whether its driver is there."""

_NAME = "ckptkit-worker"

_LENGTH = struct.Struct("<Q")
"""Before each message."""

_starting = threading.Lock()


class Channel(Protocol):
    """The messages of one process for another, as a `multiprocessing.connection.Connection`."""

    def send_bytes(self, data: bytes) -> None: ...

    def recv_bytes(self) -> bytes: ...


class Process(Protocol):
    """A worker, as its driver sees it.

    Attributes:
        exitcode: as in `subprocess.Popen`, negative for signals; ``None``: it has not ended.
    """

    @property
    def exitcode(self) -> int | None: ...

    def send(self, data: bytes) -> None:
        """Send a message; waits if it is long."""

    def receive(self) -> bytes:
        """The next message.

        Raises:
            EOFError, OSError: it has ended.
        """

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def join(self, seconds: float) -> None:
        """Wait for its end, so long at most."""

    def close(self) -> None:
        """Close the channel, and do not wait for it any more: what waits for a disk cannot be killed."""


def started() -> Process:
    """A worker; call this while signals are held (`signals_held`), so that every worker is recorded.

    Raises:
        OSError, RuntimeError: the system, or Python, does not let it start.
    """
    return _Forked() if _may_fork() else _Spawned()


def _may_fork() -> bool:
    """Whether this process has only one thread, counting those of Python and of any library."""
    if sys.platform != "linux":
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return threading.active_count() == 1


class _Pipes:
    """Messages through two pipes."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target

    def send_bytes(self, data: bytes) -> None:
        view = memoryview(_LENGTH.pack(len(data)) + data)
        while view:
            view = view[os.write(self.target, view) :]

    def recv_bytes(self) -> bytes:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            parts.append(os.read(self.source, min(length, 1 << 20)))
            if not parts[-1]:
                raise EOFError
            length -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        os.close(self.source)
        os.close(self.target)


class _Forked:
    """A copy of this process."""

    def __init__(self) -> None:
        down = os.pipe()
        up = os.pipe()
        self._code: int | None = None
        try:
            driver = os.getpid()
            self._pid = os.fork()  # type: ignore[attr-defined,unused-ignore]
            if self._pid == 0:
                _begin(_Pipes(down[0], up[1]), driver, (down[1], up[0]))
        except OSError:
            for fd in (down[1], up[0]):
                os.close(fd)
            raise
        finally:
            os.close(down[0])
            os.close(up[1])
        self.channel = _Pipes(up[0], down[1])
        self.send, self.receive = self.channel.send_bytes, self.channel.recv_bytes

    @property
    def exitcode(self) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)  # type: ignore[attr-defined,unused-ignore]
            except ChildProcessError:  # somebody else waits for all children of this process
                self._code = 255
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)  # type: ignore[attr-defined,unused-ignore]

    def _signal(self, number: int) -> None:
        if self.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.exitcode is None and time.monotonic() < until:
            time.sleep(0.001)

    def close(self) -> None:
        self.channel.close()


class _Spawned:
    """A new Python."""

    def __init__(self) -> None:
        from multiprocessing import get_context

        context = get_context("spawn")
        self.channel, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True, name=_NAME)
        try:
            with _main_left_alone():
                self._process.start()
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        self.sentinel = self._process.sentinel

    def send(self, data: bytes) -> None:
        self.channel.send_bytes(data)

    def receive(self) -> bytes:
        if not self.channel.poll():  # it has ended, and another holds its channel open
            raise EOFError
        return self.channel.recv_bytes()

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def join(self, seconds: float) -> None:
        self._process.join(seconds)

    def close(self) -> None:
        self.channel.close()
        if self.exitcode is None:
            from multiprocessing import process

            getattr(process, "_children", set()).discard(self._process)


def ready(processes: Iterable[Process], timeout: float) -> list[Process]:
    """Those that have something to say, or have ended; waits for one, so many seconds at most."""
    forked = {each.channel.source: each for each in processes if isinstance(each, _Forked)}
    spawned = [each for each in processes if isinstance(each, _Spawned)]
    if spawned or sys.platform == "win32":
        from multiprocessing import connection

        by_object: dict[Any, Process] = dict(forked)
        for each in spawned:
            by_object |= {each.channel: each, each.sentinel: each}
        return list(dict.fromkeys(by_object[each] for each in connection.wait(list(by_object), timeout)))
    import select

    poll = select.poll()
    for fd in forked:
        poll.register(fd, select.POLLIN)
    return [forked[fd] for fd, _ in poll.poll(1000 * timeout)]


@contextmanager
def signals_held() -> Iterator[None]:
    """A process that starts hears none before it knows what to do; this one hears them once it has a record of that."""
    if sys.platform == "win32" or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Workers that start in the block do not import the user's ``__main__``."""
    from multiprocessing import spawn

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name == _NAME:  # other threads may start processes in the meantime
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


def _begin(channel: Channel, driver: int, others: Iterable[int]) -> NoReturn:
    """The life of a copy, which never returns to what the original was at."""
    code = 1
    try:
        for fd in others:
            os.close(fd)
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 - as long as the process lives
        signal.set_wakeup_fd(-1)  # an event loop of the original's would take our signals for its own
        gc.freeze()  # searching the original's objects for garbage would copy them all
        _serve(channel, driver)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)  # nothing of the original's is cleaned up twice


def _serve(channel: Channel, driver: int) -> None:
    """Do one batch after the other, until the driver is gone."""
    worker.is_one = True
    sys.stdout = sys.stderr  # whatever is printed here is not what the driver reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, _stop)
    threading.Thread(target=_watch, args=(driver,), daemon=True).start()
    try:
        if sys.platform != "win32" and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        channel.send_bytes(b"")
        while True:
            call = pickle.loads(channel.recv_bytes())  # noqa: S301 - our own
            channel.send_bytes(pickle.dumps(run(*call), PROTOCOL))
    except (EOFError, OSError):  # the driver has gone
        os._exit(1)
    except StopWorker as stopped:
        number = int(stopped.args[0])
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _stop(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once: unfinished work is being removed
    raise StopWorker(number)


def _watch(driver: int) -> None:
    """End this process when its driver is gone, even where its end was not heard of."""
    if os.name == "nt":
        from multiprocessing import connection, parent_process

        parent = parent_process()
        connection.wait([] if parent is None else [parent.sentinel])
        os._exit(1)
    while os.getppid() == driver:
        time.sleep(_WATCHED_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(CLEANING_SECONDS)
    os._exit(1)
