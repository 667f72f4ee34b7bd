"""Gives complete files their names: a destination is what it was before, or the complete new file.

Every file is written beside its destination under a temporary name, compared, and only then
renamed.  On any error, an interrupt included, the temporary files are removed.

A sharded checkpoint is several files that change together, and an index that names them.  Where an
index stands already, it is first replaced by one that names the new shards under their temporary
names, then the shards get their own names too, then the index that says so takes its place: at
every moment the index names one whole checkpoint, the old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptkit.errors import DestinationExistsError, FileAccessError
from ckptkit.plan import Digest, Index, Plan
from ckptkit.transfer.steps import (
    UNAVAILABLE,
    Digests,
    Tally,
    digested,
    fill,
    move,
    require_unchanged,
    reserve,
    write_at,
)

__all__ = ["write_atomically"]

_FLUSH_SECONDS = 0.05
"""Pause between flushes while files are being written; most are written before the first."""

Progress = Callable[[int, int], object]
"""Called with the bytes dealt with so far, and those to deal with in all."""


@dataclass(slots=True, kw_only=True)
class _File:
    """One file to be written.

    Attributes:
        plan: its steps.
        path: where it will be.
        shown: the name that messages use.
        temporary: where it is meanwhile.
        fd: open on that, readable and writable.
        is_ours: whether the temporary name is to be removed at the end, and not in use by an index.
    """

    plan: Plan
    path: str
    shown: str
    temporary: str
    fd: int
    is_ours: bool = True


def write_atomically(
    destination: str | os.PathLike[str],
    plan: Plan,
    *,
    force: bool,
    check: Callable[[str, Callable[[int], object]], object] | None,
    replaces: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Tally:
    """Write the plan's file, and its shards beside it, so that nothing is ever half-written.

    Args:
        destination: the output file; a symbolic link is followed, the link itself stays.
        plan: what to write.
        force: whether what exists may be replaced.
        check: called once everything is written, with a path that opens it and a function to be called with
            the number of bytes as they are compared; whatever it raises stops the write before the
            destination is touched.  ``None``: nothing is compared, checksums that would have to be computed
            stay unrecorded, and it is left to the system when the bytes reach the disk, as ``cp`` does.
        replaces: names of files beside the destination that the new ones make stale; removed at the end.
        progress: called as bytes are written, and again as they are compared.

    Returns:
        What conversions lost.

    Raises:
        DestinationExistsError: it exists and ``force`` is false; checked again at the very end.
        FileAccessError: it cannot be written; nothing is left behind.
        CorruptError: a source changed while it was read.
    """
    shown = os.fspath(destination)
    wanted = _places(plan, shown)
    for _, path, name in wanted:
        if os.path.isdir(path):
            raise FileAccessError(f"{name}: is a folder; name a file")
        if not force and os.path.lexists(path):
            raise DestinationExistsError(f"{name}: exists already; --force overwrites it")
    folder = os.path.dirname(wanted[-1][1])
    tally, stop = Tally(), threading.Event()
    files: list[_File] = []
    digests = None
    try:
        for each, path, name in wanted:
            files.append(_created(each, path, name))
        for file in files:
            reserve(file.fd, file.plan.nbytes)
        counted = _Counter(progress, plan.total_nbytes * (1 if check is None else 2))
        digests = Digests(digested(plan), stop)
        with _flushing([file.fd for file in files] if check is not None else []) as written:
            for file in files:
                if file.plan.index is None:
                    move(file.plan, file.fd, tally, counted)
            for file in files:
                if file.plan.index is None:
                    fill(file.plan, file.fd, checksums=check is not None)
            if plan.index is not None:
                _overwrite(files[-1].fd, plan.index.to_bytes(_temporary_names(files, plan)))
            if check is not None:
                check(files[-1].temporary, counted)
            for file in files:
                if file.plan.index is None:
                    fill(file.plan, file.fd, digests, checksums=False)
            index = b"" if plan.index is None else _index(files, plan, plan.index, digests)
            written()
        require_unchanged(plan)
        _publish(files, index, force=force, flush=check is not None)
        for name in replaces:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}") from error
    finally:
        stop.set()
        if digests is not None:
            digests.join()
        for file in files:
            os.close(file.fd)
            if file.is_ours:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.temporary)
    return tally


def _places(plan: Plan, shown: str) -> list[tuple[Plan, str, str]]:
    """Each file's plan, its path, and the name that messages use; the one that is asked for is the last."""
    if plan.index is None:
        return [(plan, os.path.realpath(shown), shown)]
    # An index may be a link into a cache, whose folder is no place for shards: links in folders alone are followed.
    above, name = os.path.split(shown)
    folder = os.path.realpath(above)
    shards = [(shard, os.path.join(folder, at), os.path.join(above, at)) for at, shard in plan.shards.items()]
    return [*shards, (plan, os.path.join(folder, name), shown)]


def _created(plan: Plan, path: str, shown: str) -> _File:
    """An empty file beside where it will be.

    Raises:
        FileAccessError: it cannot be made.
    """
    temporary = _beside(path)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        fd = os.open(temporary, flags, 0o666)  # less the umask, as any program's output
    except OSError as error:
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}") from error
    return _File(plan=plan, path=path, shown=shown, temporary=temporary, fd=fd)


def _beside(path: str) -> str:
    """A name in the same folder that nothing has."""
    folder, name = os.path.split(path)
    # 50 characters are at most 200 bytes, so that the name is no longer than a file system allows.  The ending stays:
    # by it an index that names shards so for a moment is still read as what it is.
    stem, ending = os.path.splitext(name)
    return os.path.join(folder, f".{stem[:50]}.{os.urandom(4).hex()}.tmp{ending[:20]}")


def _temporary_names(files: list[_File], plan: Plan) -> dict[str, str]:
    return {name: os.path.basename(file.temporary) for name, file in zip(plan.shards, files, strict=False)}


def _index(files: list[_File], plan: Plan, index: Index, digests: Digests) -> bytes:
    """The index as it will be, with digests where they belong; in the one that is there they are filled in."""
    temporary, final = index.to_bytes(_temporary_names(files, plan)), bytearray(index.to_bytes())
    for step in plan.steps:
        if isinstance(step, Digest):
            digest = digests.of(step.file)
            temporary = temporary.replace(bytes(final[step.target : step.target + step.nbytes]), digest)
            final[step.target : step.target + step.nbytes] = digest
    _overwrite(files[-1].fd, temporary)
    return bytes(final)


def _overwrite(fd: int, data: bytes) -> None:
    """Make the data all of a file."""
    os.ftruncate(fd, len(data))
    write_at(fd, data, 0)


class _Counter:
    """Adds up what threads have dealt with."""

    def __init__(self, progress: Progress | None, nbytes: int) -> None:
        self._progress = progress
        self._nbytes = nbytes
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done = min(self._done + nbytes, self._nbytes)
                self._progress(self._done, self._nbytes)


@contextlib.contextmanager
def _flushing(fds: list[int]) -> Iterator[Callable[[], None]]:
    """Flush files to disk while they are still being written and checked.

    The disk works side by side with the copying, so that little is left to wait for at the end.
    The block calls what it is given once everything is written.

    Raises:
        OSError: a flush failed; the files are not safely on disk.
    """
    written, wanted, failures = threading.Event(), [True], list[OSError]()

    def flush() -> None:
        try:
            while not written.wait(_FLUSH_SECONDS):
                for fd in fds:
                    os.fsync(fd)
            if wanted:
                for fd in fds:
                    os.fsync(fd)
        except OSError as error:
            failures.append(error)

    if not fds:
        yield lambda: None
        return
    flusher = threading.Thread(target=flush)
    flusher.start()
    try:
        yield written.set
    except BaseException:
        wanted.clear()
        raise
    finally:
        written.set()
        flusher.join()
    if failures:
        raise failures[0]


# Names.


def _publish(files: list[_File], index: bytes, *, force: bool, flush: bool) -> None:
    """Give the complete files their names, and make the names themselves durable."""
    *shards, main = files
    if not index:
        _rename(main.temporary, main.path, main.shown, force=force)
    else:
        _publish_shards(shards, main, index, force=force, flush=flush)
    if flush:
        _flush_folder(os.path.dirname(main.path))


def _publish_shards(shards: list[_File], main: _File, index: bytes, *, force: bool, flush: bool) -> None:
    """Give shards their names, and the index its own last."""
    final = _created(main.plan, main.path, main.shown)
    try:
        _overwrite(final.fd, index)
        if flush:
            os.fsync(final.fd)
        if not force:
            _publish_new(shards, final)
        elif not os.path.lexists(main.path) or not any(os.path.lexists(shard.path) for shard in shards):
            for shard in shards:
                os.replace(shard.temporary, shard.path)
            os.replace(final.temporary, final.path)
        else:
            _replace_old(shards, main, final, flush=flush)
    finally:
        os.close(final.fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(final.temporary)


def _publish_new(shards: list[_File], final: _File) -> None:
    """Where nothing of these names is; what has appeared meanwhile is not touched, and nothing of ours left."""
    named: list[str] = []
    try:
        for file in (*shards, final):
            _rename(file.temporary, file.path, file.shown, force=False)
            named.append(file.path)
    except BaseException:
        for path in named:
            os.unlink(path)
        raise


def _replace_old(shards: list[_File], main: _File, final: _File, *, flush: bool) -> None:
    """Where an index and shards of these names stand: at every moment the index names one whole checkpoint.

    On a file system without hard links there is a moment without an index.
    """
    others = [_beside(shard.path) for shard in shards]
    with _uninterrupted():
        try:
            for shard, other in zip(shards, others, strict=True):
                os.link(shard.temporary, other)
        except OSError:
            for other in others:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(other)
            os.unlink(main.path)
            others = [shard.temporary for shard in shards]
        else:
            os.replace(main.temporary, main.path)  # it names the shards as they are called now
            for shard in shards:
                shard.is_ours = False
        if flush:
            _flush_folder(os.path.dirname(main.path))
        for shard, other in zip(shards, others, strict=True):
            os.replace(other, shard.path)
        os.replace(final.temporary, final.path)
        for shard in shards:
            shard.is_ours = True


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C is heard when the block is done: a few renames, which take milliseconds."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rename(temporary: str, path: str, shown: str, *, force: bool) -> None:
    """Give a complete file its name."""
    if force:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # fails, in one step, where a file of that name has appeared
    except FileExistsError:
        raise DestinationExistsError(f"{shown}: exists already; --force overwrites it") from None
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise DestinationExistsError(f"{shown}: exists already; --force overwrites it") from None
        os.replace(temporary, path)


def _flush_folder(path: str) -> None:
    """Make the names in a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in UNAVAILABLE:
                raise
        finally:
            os.close(folder)
