"""Copies ranges of files inside the kernel, as fast as its page cache takes them.

A page cache takes whole, aligned pieces best: it can hold each in one folio, where a write that
ends anywhere leaves two half-filled pages.  Tensors lie at another distance from a page in the
source than in the output, so a long ``copy_file_range`` writes off the grid all the way; a pipe lets
each piece end on it (``splice``).  Measured on ext4 of Linux 6.18: 0.7 of the time.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange
from ckptkit.errors import FileAccessError
from ckptkit.transfer.positioned import write_at

__all__ = ["UNAVAILABLE", "Copier"]

UNAVAILABLE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
"""Errors that say this file system or kernel cannot do it so, not that doing it failed."""

_ONE_CALL = 64 << 20
"""Bytes asked of one kernel copy: calls cost nothing at this size, and an interrupt is heard soon."""

_PIECE_NBYTES = 64 << 10
"""Bytes spliced at a time, and the grid in the output that they end on: sixteen pages."""

_SERVER_COPIES = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph"})
"""File systems whose server copies by itself when asked by ``copy_file_range``: nothing crosses the network."""


class Copier:
    """Copies into one open file, by the best way that works there.

    Args:
        fd: where to; writable.
        progress: called with the number of bytes as they are copied.
    """

    def __init__(self, fd: int, progress: Callable[[int], object]) -> None:
        self._fd = fd
        self._progress = progress
        self._pipe: tuple[int, int] | None = None
        calls = [("splice", self._splice), ("copy_file_range", self._copy_file_range)]
        ways = [way for name, way in calls if hasattr(os, name)]
        if len(ways) > 1 and _file_system(fd) in _SERVER_COPIES:
            ways.reverse()
        self._ways: list[Callable[[ByteRange, int], int]] = [*ways, self._read_write]

    def copy(self, source: ByteRange, target: int) -> None:
        """Copy all of ``source`` to position ``target``.

        Raises:
            CorruptError: the source ended early.
            OSError: it could not be written.
        """
        while source.nbytes:
            way = self._ways[0]
            if source.nbytes < _PIECE_NBYTES and self._copy_file_range in self._ways:
                way = self._copy_file_range  # one call, not two
            try:
                moved = way(source, target)
            except OSError as error:
                if isinstance(error, FileAccessError) or error.errno not in UNAVAILABLE or way == self._read_write:
                    raise
                moved = 0
            if moved == 0:  # the end of the source, which `read` tells; or a file system that cannot copy so
                self._ways.remove(way)
                continue
            self._progress(moved)
            source, target = source.part(moved, source.nbytes - moved), target + moved

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


def _file_system(fd: int) -> str | None:
    """The type of the file system an open file lies in, as in proc(5); ``None`` where that is not known."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:  # noqa: PTH123 - starts faster
            found = [line for line in mounts if line.split()[2] == wanted]
    except (OSError, IndexError):
        return None
    return found[0].partition(" - ")[2].split()[0] if found else None
