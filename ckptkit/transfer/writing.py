"""Executes a plan: a destination is what it was before, or the complete new file.

Every file is written beside its destination under a temporary name, compared, closed, and only then
renamed; see `ckptkit.transfer.names`.  On any error, an interrupt included, the temporary files are
removed; what a run leaves that is killed, the next one into the folder removes.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from ckptkit.bytesource import Source, flush_to_disk
from ckptkit.errors import FileAccessError
from ckptkit.places import require_local
from ckptkit.plan import Digest, Plan
from ckptkit.transfer.folders import OutputFolder, created_folder, folder_made
from ckptkit.transfer.names import (
    Output,
    created,
    exists,
    overwrite,
    publish,
    remove_stale,
    replacing,
)
from ckptkit.transfer.passing import DigestsInPassing, Passed, is_far
from ckptkit.transfer.steps import (
    Tally,
    digested,
    fill_file,
    move,
    require_unchanged,
    reserve,
)
from ckptkit.transfer.workers import Progress, Stopped, in_parallel, uninterrupted

__all__ = [
    "Check", "folder_made", "index_bytes", "places", "remove_stale_shards", "status_of", "write_atomically",
]  # fmt: skip

Check = Callable[[str, Callable[[int], object]], object]
"""Called with a path that opens the output, and a function to be called with the bytes as they are compared."""

_SWEEPING_SECONDS = 60.0
"""Pause between two looks for what killed runs left in a folder, which may hold ten thousand files."""

_swept: dict[str, float] = {}
"""When each folder was last searched."""

_FLUSH_SECONDS = 0.05
"""Pause between flushes while files are being written; most are written before the first."""


def write_atomically(
    destination: str | os.PathLike[str],
    plan: Plan,
    *,
    force: bool,
    check: Check | None,
    replaces: tuple[str, ...] = (),
    source: Source | None = None,
    passed: Passed | None = None,
    digests: DigestsInPassing | None = None,
    progress: Progress | None = None,
) -> Tally:
    """Write the plan's file, and its shards beside it, so that nothing is ever half-written.

    Args:
        destination: the output; a symbolic link is followed, the link itself stays.
        plan: what to write.
        force: whether a file that exists may be replaced; what replaces it keeps its permissions.
        check: called once everything is written, with a path that opens it and a function to be called with
            the number of bytes as they are compared; whatever it raises stops the write before the
            destination is touched.  ``None``: nothing is compared, checksums that would have to be computed stay
            unrecorded, and the system decides when the bytes reach the disk, as with ``cp``.
        replaces: names of files beside the destination that the new ones make stale; removed at the end.
        source: the open file that the plan reads; where the system replaces no file that is open, and this is one to
            be replaced, it is closed once all of it is read.
        passed: compares what passes by with what was written, if the source is remote.
        digests: of source files that the caller wants, beside those that the plan has; none: the plan's.
        progress: called as bytes are written, and again as they are compared.

    Returns:
        What conversions lost.

    Raises:
        DestinationExistsError: it exists and ``force`` is false; checked again at the very end.
        FileAccessError: it cannot be written, or is a URL, a device or a pipe; nothing is left behind.
        CorruptError: a source changed while it was read.
    """
    shown = os.fsdecode(destination)
    require_local(shown)
    require_replaceable(shown)
    wanted = places(plan, shown, force=force)
    path = wanted[-1][1]
    folder = os.path.dirname(path)
    tally, stop = Tally(), threading.Event()
    files: list[Output] = []
    whole: OutputFolder | None = None
    own = None
    try:
        _remove_stale_now_and_then(folder)
        with uninterrupted():  # no file without a record of it
            whole = None if plan.in_folder is None else created_folder(path, shown)
            for file in _created(wanted, folder, replaces) if whole is None else whole.created(plan):
                files.append(file)
        for file in files:
            reserve(file.fd, file.plan.nbytes)
        counted = _Counter(progress, plan.total_nbytes * (1 if check is None else 2), stop)
        with uninterrupted():
            if digests is None:
                digests = own = DigestsInPassing(digested(plan), stop)
        opened = files[-1].temporary if whole is None else whole.temporary
        index = _filled(files, plan, opened, check, tally, counted, digests, source, passed, stop)
        require_unchanged(plan)
        counted.finish()
        if whole is not None:
            whole.publish(files, flush=check is not None)
        else:
            publish(files, index, force=force, flush=check is not None, source=source)
            remove_stale_shards(folder, replaces, source)
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}", path=shown) from error
    finally:
        stop.set()
        with uninterrupted(), contextlib.ExitStack() as stack:  # Ctrl-C is often pressed twice
            if whole is not None:
                stack.callback(whole.close)
            for file in files:
                stack.callback(file.close)
            if own is not None:
                own.join()
    return tally


def _filled(
    files: list[Output],
    plan: Plan,
    opened: str,
    check: Check | None,
    tally: Tally,
    counted: _Counter,
    digests: DigestsInPassing,
    source: Source | None,
    passed: Passed | None,
    stop: threading.Event,
) -> bytes:
    """Write and compare what `write_atomically` is to publish, ``opened`` being what opens it; gives the index."""
    with _flushing([file.fd for file in files] if check is not None else []) as written:
        # A file system lets one thread write to a file at a time; several files go side by side.
        data = [file for file in files if file.plan.index is None]
        outputs = [(file.plan, file.fd) for file in data]
        if source is not None and is_far(source):
            from ckptkit.transfer.far import move_far

            move_far(outputs, tally, counted, digests, passed, stop)
        else:
            moves = (partial(move, *output, tally, counted) for output in outputs)
            in_parallel(moves, nbytes=plan.total_nbytes if plan.shards else 0, stop=stop)
        for file in data:
            fill_file(file.plan, file.fd, checksums=check is not None, alone=passed is not None)
        if plan.index is not None:
            overwrite(files[-1].fd, plan.index.to_bytes(_temporary_names(files, plan)))
        if check is not None:
            check(opened, counted)
        for file in data:
            fill_file(file.plan, file.fd, digests, checksums=False)
        index = b"" if plan.index is None else _index(files, plan, digests)
        written()
    return index


def places(plan: Plan, shown: str, *, force: bool) -> list[tuple[Plan, str, str]]:
    """Each file's plan, its path, and the name that messages use; what is asked for is the last, of a folder the one.

    Raises:
        DestinationExistsError: one exists and ``force`` is false.
        FileAccessError: one is a folder.
    """
    found = [(plan, os.path.realpath(shown), shown)]
    if plan.in_folder is not None:
        return found
    if plan.index is not None:
        # An index may be a link into a cache, whose folder is not for shards: only links to folders are followed.
        above, name = os.path.split(shown)
        folder = os.path.realpath(above)
        shards = [(shard, os.path.join(folder, at), os.path.join(above, at)) for at, shard in plan.shards.items()]
        found = [*shards, (plan, os.path.join(folder, name), shown)]
    for _, path, name in found:
        if os.path.isdir(path):
            raise FileAccessError(f"{name}: is a folder; name a file", path=name)
        if not force and os.path.lexists(path):
            raise exists(name)
    return found


def _created(wanted: list[tuple[Plan, str, str]], folder: str, replaces: tuple[str, ...]) -> Iterator[Output]:
    """The files of `places` to write; a new file gets the permissions of the checkpoint that it replaces."""
    old = [status_of(path) for path in (wanted[-1][1], *(os.path.join(folder, name) for name in replaces))]
    like = next(filter(None, old), None)
    for plan, path, name in wanted:
        yield created(plan, path, name, status_of(path) or like)


def _remove_stale_now_and_then(folder: str) -> None:
    """Remove what killed runs left in the folder, unless it was searched a moment ago."""
    if time.monotonic() - _swept.get(folder, -math.inf) > _SWEEPING_SECONDS:
        _swept[folder] = time.monotonic()
        remove_stale(folder)


def remove_stale_shards(folder: str, names: tuple[str, ...], source: Source | None) -> None:
    """Remove files that new ones made stale; ``source`` as in `ckptkit.transfer.names.replacing`."""
    for path in (os.path.join(folder, name) for name in names):
        with contextlib.suppress(OSError):
            replacing(partial(os.unlink, path), path, source)


def status_of(path: str) -> os.stat_result | None:
    """That of a file that is there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def require_replaceable(path: str) -> None:
    """Refuse what a file may not take the place of.

    Raises:
        FileAccessError: a device, a pipe or a socket is there.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        told = "is a device, a pipe or a socket, and the output gets its name only once it is complete; name a file"
        raise FileAccessError(f"{path}: {told}", path=path)


def _temporary_names(files: list[Output], plan: Plan) -> dict[str, str]:
    return {name: os.path.basename(file.temporary) for name, file in zip(plan.shards, files, strict=False)}


def _index(files: list[Output], plan: Plan, digests: DigestsInPassing) -> bytes:
    """The index as it will be, with digests where they belong; in the one that is there they are filled in."""
    overwrite(files[-1].fd, index_bytes(plan, digests, _temporary_names(files, plan)))
    return index_bytes(plan, digests)


def index_bytes(plan: Plan, digests: DigestsInPassing, names: Mapping[str, str] | None = None) -> bytes:
    """The content of an index, with digests in their places.

    Args:
        plan: of the index.
        digests: of the sources.
        names: what shards are called; ``None``: as they will be.
    """
    if plan.index is None:
        return b""
    final, data = plan.index.to_bytes(), plan.index.to_bytes(names)
    for step in plan.steps:
        if isinstance(step, Digest):
            data = data.replace(final[step.target : step.target + step.nbytes], digests.of(step.file))
    return data


class _Counter:
    """Adds up what threads have dealt with."""

    def __init__(self, progress: Progress | None, nbytes: int, stop: threading.Event) -> None:
        self._progress = progress
        self._nbytes = nbytes
        self._stop = stop
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Stopped
        if self._progress is not None:
            with self._lock:
                self._done = min(self._done + nbytes, self._nbytes)
                self._progress(self._done, self._nbytes)

    def finish(self) -> None:
        """Everything is written: bytes between tensors are neither counted nor compared."""
        self(self._nbytes - self._done)


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
                    flush_to_disk(fd)
        except OSError as error:
            failures.append(error)

    if not fds:
        yield lambda: None
        return
    flusher = threading.Thread(target=flush)
    try:
        with uninterrupted():
            flusher.start()
        yield written.set
    except BaseException:
        wanted.clear()
        raise
    finally:
        written.set()
        if flusher.ident is not None:  # it was started
            flusher.join()
    if failures:
        raise failures[0]
