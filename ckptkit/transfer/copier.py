"""Copies ranges of files inside the kernel, by whichever of its ways is the faster as things stand.

A page cache takes aligned pieces best, and keeps each in one folio.  Tensors lie at another distance
from a page in the source than in the output, so a long ``copy_file_range`` writes off the grid all
the way; through a pipe (``splice``) each piece can end on it.  Hot memory takes the latter in 0.8 of
the time (ext4, Linux 6.18).  Where a virtual machine has first to get memory back from its host,
large folios are what comes late, and the former can be twice as fast; where a server copies by itself
(NFS) or blocks can be shared (XFS, btrfs), it can be faster than any copying.  So the pace of both is
measured on the way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, write_at
from ckptkit.errors import FileAccessError

__all__ = ["UNAVAILABLE", "Copier"]

UNAVAILABLE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
"""Errors that say this file system or kernel cannot do it so, not that doing it failed."""

_ONE_CALL = 16 << 20
"""Bytes asked of one kernel copy: calls cost nothing at this size, and an interrupt is heard soon."""

_MEASURED_NBYTES = 1 << 20
"""Bytes from which a call tells how fast a way is."""

_FORGETTING = 0.98
"""What is left after a call of how slow the other ways were: one a third slower is tried again after some fifteen."""

_PIECE_NBYTES = 64 << 10
"""Bytes spliced at a time, and the grid in the output that they end on: sixteen pages."""


_Way = Callable[[ByteRange, int], int]
"""Copies the first bytes of a range to a position; the number of them."""


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
        """Seconds a byte, of the ways that work here; 0 where it is not known yet."""
        self._last: dict[_Way, float] = {}

    def copy(self, source: ByteRange, target: int) -> None:
        """Copy all of ``source`` to position ``target``.

        Raises:
            CorruptError: the source ended early.
            OSError: it could not be written.
        """
        while source.nbytes:
            way = self._way(source.nbytes)
            start = time.perf_counter()
            try:
                moved = way(source, target)
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
        """Take the better of a way's last two calls, since one alone may have had to wait for something else."""
        for other in self._pace:
            self._pace[other] *= _FORGETTING
        self._pace[way] = min(pace, self._last.get(way, pace))
        self._last[way] = pace

    def _splice(self, source: ByteRange, target: int) -> int:
        if self._pipe is None:
            self._pipe = _pipe()
        end, start = self._pipe
        wanted, done = min(source.nbytes, _ONE_CALL), 0
        while done < wanted:
            place = target + done
            piece = min(wanted - done, _PIECE_NBYTES - place % _PIECE_NBYTES)
            held = os.splice(source.file.fd, start, piece, offset_src=source.offset + done)
            if held == 0:
                break
            while held:
                moved = os.splice(end, self._fd, held, offset_dst=target + done)
                if moved == 0:
                    raise OSError(errno.EINVAL, "nothing is taken from a pipe")
                held, done = held - moved, done + moved
        return done

    def _copy_file_range(self, source: ByteRange, target: int) -> int:
        return os.copy_file_range(source.file.fd, self._fd, min(source.nbytes, _ONE_CALL), source.offset, target)

    def _read_write(self, source: ByteRange, target: int) -> int:
        chunk = source.read(0, min(source.nbytes, CHUNK_NBYTES))
        write_at(self._fd, chunk, target)
        return len(chunk)

    def close(self) -> None:
        """Close the pipe; not the file."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None


def _pipe() -> tuple[int, int]:
    """A pipe that holds a piece wherever in a page it begins, where the system grants that."""
    import fcntl

    ends = os.pipe()
    with contextlib.suppress(OSError):  # above what a user may have: a piece then goes in two parts
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 2 * _PIECE_NBYTES)
    return ends
