"""Carries out the steps of a plan on an open file.

Casts, checksums and digests are computed in bounded buffers by several threads.  Unchanged bytes are copied inside the
kernel, in whichever way is faster at the moment: a page cache takes aligned pieces best, and keeps each in one folio.
Tensors have other positions relative to a page in the source than in the output, so a long ``copy_file_range`` writes
off the grid all the way; through a pipe (``splice``) each piece can end on it.  Hot memory takes the latter in 0.8 of
the time (ext4, Linux 6.18).  If a virtual machine first has to get memory back from its host, large folios are slow,
and the former can be twice as fast; if a server copies by itself (NFS) or blocks can be shared (XFS, btrfs), it can be
faster than any copying.  So the pace of both is measured on the way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, Source, byte_range, first_changed, read_at, write_at
from ckptkit.computed import Buffer, ConvertedRange, DenseRange, DTypeConversion, files_of, piece_nbytes, read_into
from ckptkit.errors import CorruptError, FileAccessError
from ckptkit.plan import Cast, Checksum, Copy, Digest, Gather, LiteralBytes, Plan, Step
from ckptkit.transfer.passing import CONVERTED_NBYTES, DigestsInPassing
from ckptkit.transfer.values import SMALL_NBYTES, Ahead, stream
from ckptkit.transfer.workers import buffer, in_parallel

if TYPE_CHECKING:
    from ckptkit.casting import Losses

__all__ = [
    "UNAVAILABLE",
    "Copier",
    "Small",
    "Tally",
    "digested",
    "execute",
    "fill_file",
    "move",
    "require_unchanged",
    "reserve",
]

UNAVAILABLE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
"""Errors that say this file system or kernel cannot do it so, not that doing it failed."""

_ONE_CALL = 16 << 20
"""Bytes asked of one kernel copy: calls cost nothing at this size, and an interrupt is heard soon."""

_MEASURED_NBYTES = 1 << 20
"""Bytes from which a call shows how fast a way is."""

_FORGETTING = 0.98
"""How much of the other ways' slowness counts after each call: one that is a third slower is tried again after some
fifteen calls."""

_PIECE_NBYTES = 64 << 10
"""Bytes spliced at a time, and the grid in the output that they end on: sixteen pages."""


_Way = Callable[[int, ByteRange, int], int]
"""Copies from a descriptor the first bytes of a range to a position; the number of them."""


class Copier:
    """Copies into one open file.

    Args:
        fd: where to; writable.
        progress: called with the number of bytes as they are copied.
    """

    def __init__(self, fd: int, progress: Callable[[int], object]) -> None:
        self._fd = fd
        self._progress = progress
        self._pipe: tuple[int, int] | None = None
        ways: list[tuple[str, _Way]] = [("splice", self._splice), ("copy_file_range", self._copy_file_range)]
        self._pace = {way: 0.0 for name, way in ways if hasattr(os, name)}
        """Seconds per byte, of the ways that work here; 0 if not known yet."""
        self._last: dict[_Way, float] = {}

    def copy(self, source: ByteRange, target: int) -> None:
        """Copy all of ``source`` to position ``target``.

        Raises:
            CorruptError: the source ended early.
            OSError: it could not be written.
        """
        source = source.file.located(source)
        while source.nbytes:
            fd = source.file.fileno()
            way = self._read_write if fd is None else self._way(source.nbytes)
            start = time.perf_counter()
            try:
                moved = way(-1 if fd is None else fd, source, target)
            except OSError as error:
                if isinstance(error, FileAccessError) or error.errno not in UNAVAILABLE or way not in self._pace:
                    raise
                moved = 0
            if moved == 0:  # the end of the source, which `read` tells; or a file system that cannot copy so
                del self._pace[way]
                continue
            if way in self._pace and moved >= _MEASURED_NBYTES:
                self._measured(way, (time.perf_counter() - start) / moved)
            self._progress(moved)
            source, target = source.part(moved, source.nbytes - moved), target + moved

    def _way(self, nbytes: int) -> _Way:
        """The way for a range of this size."""
        if nbytes < _PIECE_NBYTES and self._copy_file_range in self._pace:
            return self._copy_file_range  # one call, not two
        return min(self._pace, key=self._pace.__getitem__, default=self._read_write)

    def _measured(self, way: _Way, pace: float) -> None:
        """Take the better of a way's last two calls, because a single one may have had to wait for something else."""
        for other in self._pace:
            self._pace[other] *= _FORGETTING
        self._pace[way] = min(pace, self._last.get(way, pace))
        self._last[way] = pace

    def _splice(self, fd: int, source: ByteRange, target: int) -> int:
        if self._pipe is None:
            self._pipe = _pipe()
        end, start = self._pipe
        wanted, done = min(source.nbytes, _ONE_CALL), 0
        while done < wanted:
            place = target + done
            piece = min(wanted - done, _PIECE_NBYTES - place % _PIECE_NBYTES)
            held = os.splice(fd, start, piece, offset_src=source.offset + done)  # type: ignore[attr-defined,unused-ignore]
            if held == 0:
                break
            while held:
                moved = os.splice(end, self._fd, held, offset_dst=target + done)  # type: ignore[attr-defined,unused-ignore]
                if moved == 0:
                    raise OSError(errno.EINVAL, "a pipe cannot be read here")
                held, done = held - moved, done + moved
        return done

    def _copy_file_range(self, fd: int, source: ByteRange, target: int) -> int:
        wanted = min(source.nbytes, _ONE_CALL)
        moved: int = os.copy_file_range(fd, self._fd, wanted, source.offset, target)  # type: ignore[attr-defined,unused-ignore]
        return moved

    def _read_write(self, fd: int, source: ByteRange, target: int) -> int:
        chunk = source.read(0, min(source.nbytes, CHUNK_NBYTES))
        write_at(self._fd, chunk, target)
        return len(chunk)

    def close(self) -> None:
        """Close the pipe; not the file."""
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)


def _pipe() -> tuple[int, int]:
    """A pipe that can hold a piece wherever in a page it begins, if the system allows that."""
    import fcntl

    ends = os.pipe()
    with contextlib.suppress(OSError):  # above what a user may have: a piece then goes in two parts
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 2 * _PIECE_NBYTES)  # type: ignore[attr-defined,unused-ignore]
    return ends


_CACHED_NBYTES = 1 << 20
"""Bytes hashed at a time: they fit into a core's own cache."""

_FEW = 16
"""Checksums of bytes that begin in one such piece of a file, and are computed and filled in one by one."""

Progress = Callable[[int], object]
"""Called with the number of bytes that were just dealt with; from several threads."""


class Tally:
    """What conversions lost, added up over the pieces they were carried out in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[int, tuple[DTypeConversion, Losses]] = {}

    def add(self, conversion: DTypeConversion, before: Buffer, after: Buffer) -> None:
        """Count what was lost between these bytes."""
        from ckptkit.casting import Caster

        if isinstance(conversion.function, Caster):
            self.put(conversion, conversion.function.losses(before, after))

    def put(self, conversion: DTypeConversion, losses: Losses) -> None:
        """Count what a conversion lost."""
        with self._lock:
            known = self._found.get(id(conversion))
            self._found[id(conversion)] = (conversion, losses if known is None else known[1] + losses)

    def __iter__(self) -> Iterator[tuple[DTypeConversion, Losses]]:
        return iter(self._found.values())


def execute(plan: Plan, fd: int, progress: Progress | None = None) -> Tally:
    """Carry out all steps of a plan of one file on an open, empty file.

    Args:
        plan: the steps.
        fd: file descriptor, readable and writable.
        progress: called with the number of bytes as they are written.

    Returns:
        What conversions lost.

    Raises:
        CorruptError: a source changed while it was read, or ended early.
        OSError: the operating system could not write.
    """
    tally, stop = Tally(), threading.Event()
    reserve(fd, plan.nbytes)
    digests = DigestsInPassing(digested(plan), stop)
    try:
        move(plan, fd, tally, progress)
        fill_file(plan, fd, digests)
    finally:
        stop.set()
        digests.join()
    require_unchanged(plan)
    return tally


def digested(plan: Plan) -> list[Source]:
    """The files whose digests the plan wants."""
    return [step.file for step in plan.all_steps() if isinstance(step, Digest)]


def require_unchanged(plan: Plan) -> None:
    """Raise if a file that the plan reads was written to since it was opened.

    Raises:
        CorruptError: it was.
    """
    sources = {id(file): file for file in digested(plan)}
    for step in plan.all_steps():
        if isinstance(step, (Copy, Cast, Gather)):
            source = step.entry.storage.source if isinstance(step, Gather) else step.source
            sources.update((id(file), file) for file in files_of(source))
    if (file := first_changed(sources.values())) is not None:
        raise CorruptError("the file was changed while it was being converted; nothing was written", path=file.path)


def reserve(fd: int, nbytes: int) -> None:
    """Take the space up front, so that a full disk is known before a byte is moved.

    Raises:
        OSError: there is no room.
    """
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in UNAVAILABLE:
                raise
    os.ftruncate(fd, nbytes)


class Small:
    """Small pieces of the output that follow one another, written by one call.

    Args:
        fd: where to; writable.
        moved: called with the number of bytes as they are written.
        write: what writes them.
    """

    def __init__(self, fd: int, moved: Progress, write: Callable[[int, Buffer, int], object] = write_at) -> None:
        self._fd = fd
        self._moved = moved
        self._write = write
        self._ahead = Ahead()
        self._parts: list[bytes] = []
        self._start = self._end = 0

    def copy(self, source: ByteRange, target: int) -> None:
        """Take a piece of a file."""
        self.add(self._ahead.read(source), target)

    def add(self, data: bytes, target: int) -> None:
        """Take a piece that is at hand."""
        if target != self._end or target - self._start >= _CACHED_NBYTES:
            self.flush()
            self._start = target
        self._parts.append(data)
        self._end = target + len(data)

    def flush(self) -> None:
        """Write what was taken."""
        if self._parts:
            self._write(self._fd, b"".join(self._parts), self._start)
            self._parts.clear()
            self._moved(self._end - self._start)


def _joined(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps; copies of what is in a row in the source too are one."""
    file, at, nbytes, target = None, 0, 0, 0
    for step in steps:
        if isinstance(step, Copy):
            source = step.source.plain()
            if source.file is file and source.offset == at + nbytes and step.target == target + nbytes:
                nbytes += source.nbytes
                continue
            if file is not None:
                yield Copy(target, byte_range(file, at, nbytes))
            file, at, nbytes, target = source.file, source.offset, source.nbytes, step.target
            continue
        if file is not None:
            yield Copy(target, byte_range(file, at, nbytes))
            file = None
        yield step
    if file is not None:
        yield Copy(target, byte_range(file, at, nbytes))


def move(plan: Plan, fd: int, tally: Tally, progress: Progress | None = None) -> None:
    """Carry out the steps that bring bytes: copies, casts, gathers, literals.

    Raises:
        As `execute`.
    """
    moved = progress or (lambda _: None)
    casts = [step for step in plan.steps if isinstance(step, Cast)]
    small = Small(fd, moved)
    with closing(Copier(fd, moved)) as copier:
        for step in _joined(plan.steps):
            if isinstance(step, Copy):
                if step.nbytes < SMALL_NBYTES:
                    small.copy(step.source.plain(), step.target)
                else:
                    copier.copy(step.source.plain(), step.target)
            elif isinstance(step, LiteralBytes):
                small.add(step.data, step.target)
            elif isinstance(step, Gather):
                target = step.target
                for chunk in stream(step.entry, tally.add):
                    small.add(chunk, target)
                    target += len(chunk)
        small.flush()

    def pieces() -> Iterator[Callable[[], None]]:
        for step in casts:
            size = piece_nbytes(step.source, CONVERTED_NBYTES)
            for start in range(0, step.nbytes, size):
                part = step.source.part(start, min(size, step.nbytes - start))
                yield lambda part=part, target=step.target + start: convert(part, target)  # type: ignore[misc]

    def convert(part: ConvertedRange | DenseRange, target: int) -> None:
        after = buffer("after", part.nbytes)
        if isinstance(part, ConvertedRange):
            before = buffer("before", part.original.nbytes)
            part.into(after, before)
            tally.add(part.whole, before, after)
        else:
            read_into(part, after)
        write_at(fd, after, target)
        moved(part.nbytes)

    in_parallel(pieces(), nbytes=sum(step.nbytes for step in casts))


def fill_file(
    plan: Plan, fd: int, digests: DigestsInPassing | None = None, *, checksums: bool = True, alone: bool = False
) -> None:
    """Fill in the fields that depend on other bytes: digests, then checksums.

    Args:
        plan: the steps; those that bring bytes were carried out.
        fd: the file.
        digests: of the sources; ``None``: those fields, and checksums over literals, are left for later.
        checksums: whether to fill in the checksums over bytes of the source.
        alone: whether bytes between fields are not written again, because they were compared.

    Raises:
        As `execute`.
    """
    literals = {step.target for step in plan.steps if isinstance(step, LiteralBytes)}
    wanted: list[Checksum] = []
    for step in plan.steps:
        if isinstance(step, Digest) and digests is not None:
            write_at(fd, digests.of(step.file), step.target)
        elif isinstance(step, Checksum) and (digests is not None if step.start in literals else checksums):
            wanted.append(step)
    wanted.sort(key=itemgetter(1, 2))  # those of the same bytes follow one another
    found: list[tuple[int, int]] = []
    pages = groupby(wanted, key=lambda step: step.start // _CACHED_NBYTES)
    tasks = (partial(_checksums, fd, list(steps), found) for _, steps in pages)
    in_parallel(tasks, nbytes=sum(step.covers for step in wanted))
    for _, fields in groupby(sorted(found), key=lambda field: field[0] // _CACHED_NBYTES):
        _fill(fd, list(fields), _FEW if not alone else len(found))


def _checksums(fd: int, steps: list[Checksum], found: list[tuple[int, int]]) -> None:
    """Compute the checksums of bytes that begin in one page, for the fields at their targets; many from one read."""
    first = steps[0].start
    data = memoryview(read_at(fd, _CACHED_NBYTES, first) if len(steps) > _FEW else b"")
    extent, crc = (-1, -1), 0
    for target, start, covers in steps:
        if extent != (start, covers):
            extent, end = (start, covers), start - first + covers
            crc = zlib.crc32(data[start - first : end]) if end <= len(data) else _crc32(fd, start, covers)
        found.append((target, crc))


def _fill(fd: int, fields: list[tuple[int, int]], few: int) -> None:
    """Write checksums to their fields in one page; more than a few with what is between them."""
    first, nbytes = fields[0][0], fields[-1][0] + 4 - fields[0][0]
    data = bytearray(read_at(fd, nbytes, first) if len(fields) > few else b"")
    if len(data) == nbytes:
        for target, crc in fields:
            data[target - first : target - first + 4] = crc.to_bytes(4, "little")
        write_at(fd, data, first)
        return
    for target, crc in fields:
        write_at(fd, crc.to_bytes(4, "little"), target)


def _crc32(fd: int, start: int, nbytes: int) -> int:
    crc = 0
    while nbytes:
        chunk = read_at(fd, min(_CACHED_NBYTES, nbytes), start)
        if not chunk:
            raise OSError(errno.EIO, "the output became shorter while it was written")
        crc = zlib.crc32(chunk, crc)
        start, nbytes = start + len(chunk), nbytes - len(chunk)
    return crc
