"""Files on this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading

from ckptkit.bytesource.source import ByteRange, Source, pace
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError

__all__ = ["SourceFile", "fill_from", "flush_to_disk", "read_at", "spool_room", "write_at"]

_PAGE = 4096
"""Data made from a file begins at a multiple of this in its spool, so that it can be mapped."""

_position = threading.Lock()
"""Held while a file's own position is used, on systems without positioned reads and writes."""


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """At most ``nbytes`` bytes from a position of an open file; none at its end.

    Raises:
        OSError: it could not be read.
    """
    if hasattr(os, "pread"):
        data: bytes = os.pread(fd, nbytes, offset)
        return data
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def fill_from(fd: int, buffer: bytearray | memoryview, offset: int) -> int:
    """Fill a buffer from a position of an open file; returns how many bytes there were.

    Raises:
        OSError: it could not be read.
    """
    view, filled = memoryview(buffer), 0
    while filled < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(fd, [view[filled:]], offset + filled)
        else:
            part = read_at(fd, len(view) - filled, offset + filled)
            count = len(part)
            view[filled : filled + count] = part
        if not count:
            break
        filled += count
    return filled


def flush_to_disk(fd: int) -> None:
    """Wait until everything written to a file or folder is on the disk.

    macOS's ``fsync`` leaves it in the disk's own memory; ``F_FULLFSYNC`` does not (fcntl(2) there), but network disks
    do not support it.

    Raises:
        OSError: it is not.
    """
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of the data at a position of an open file.

    Raises:
        OSError: it could not be written.
    """
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            written = os.pwrite(fd, view, offset)
        else:
            with _position:
                os.lseek(fd, offset, os.SEEK_SET)
                written = os.write(fd, view)
        view, offset = view[written:], offset + written


class SourceFile(Source):
    """A regular file on this machine.

    Systems allow a process some hundred open files (``ulimit -n``: 1,024 on Linux, 256 on macOS), and a checkpoint may
    have more shards; to look at them needs one at a time.  So one that was released is opened again when it is read.

    Raises:
        MissingFileError: there is no such file.
        FileAccessError: it is a folder, a device or unreadable.
    """

    __slots__ = ("_fd",)
    identity: tuple[int, int, int, int]
    """Its device, inode, size in bytes and time of change (ns)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        super().__init__(os.fsdecode(path), 0)
        try:
            # O_NONBLOCK: opening a named pipe must be refused below, not wait for a writer.
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
            self._fd = os.open(self.path, flags)
            status = os.fstat(self._fd)
        except FileNotFoundError:
            raise MissingFileError(f"{self.path}: no such file", path=self.path) from None
        except (OSError, ValueError) as error:
            if os.path.isdir(self.path):  # Windows refuses to open a folder at all
                raise FileAccessError(f"{self.path}: is a folder, not a file", path=self.path) from None
            reason = getattr(error, "strerror", None) or str(error)
            raise FileAccessError(f"{self.path}: cannot be opened: {reason}", path=self.path) from error
        if not stat.S_ISREG(status.st_mode):
            what = "is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
            self.close()
            raise FileAccessError(f"{self.path}: {what}", path=self.path)
        self.size = status.st_size
        self.identity = _stamp(status)

    @classmethod
    def of_descriptor(cls, fd: int, path: str) -> SourceFile:
        """An open file that needs no name of its own; messages use ``path``.

        Raises:
            OSError: the descriptor is not open.
        """
        status = os.fstat(fd)
        file = cls.__new__(cls)
        file._fd = fd
        Source.__init__(file, path, status.st_size, _stamp(status))
        return file

    def fileno(self) -> int:
        """The file descriptor.

        Raises:
            FileAccessError: the file was closed, or cannot be opened again.
            CorruptError: it is another file by now.
        """
        if self._fd < 0:
            self._require_open()
            with self._lock:
                if self._fd < 0:
                    self._fd = self._opened_again()
        return self._fd

    def _opened_again(self) -> int:
        try:
            again = SourceFile(self.path)
        except FileAccessError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EMFILE, errno.ENFILE):
                raise FileAccessError(
                    f"{self.path}: too many shards for the number of open files allowed; raise the limit (ulimit -n "
                    "8192)",
                    path=self.path,
                ) from error
            raise
        if again.identity != self.identity:
            raise CorruptError("the file was changed while it was being read", path=self.path)
        descriptor, again._fd = again._fd, -1
        return descriptor

    def _some(self, offset: int, nbytes: int) -> bytes:
        try:
            data = read_at(self.fileno(), nbytes, offset)
        except FileAccessError:
            raise
        except OSError as error:
            raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}", path=self.path) from error
        if pace.tell is not None:
            pace.read += len(data)
            pace.tell()
        return data

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`, without allocating memory."""
        if not hasattr(os, "preadv"):
            super().read_into(offset, buffer)
            return
        if offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        try:
            filled = fill_from(self.fileno(), buffer, offset)
        except OSError as error:
            if isinstance(error, FileAccessError):
                raise
            raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}", path=self.path) from error
        if filled < len(buffer):
            raise self._shorter(offset + filled)
        if pace.tell is not None:
            pace.read += filled
            pace.tell()

    def stamp(self) -> tuple[int, int, int, int]:
        """As `identity`, by now."""
        return _stamp(os.fstat(self.fileno()))

    def sibling(self, name: str) -> SourceFile:
        """As `Source.sibling`."""
        return SourceFile(os.path.join(os.path.dirname(os.path.abspath(self.path)), *name.split("/")))

    @property
    def folder(self) -> str:
        """The folder it is in; ``""``: the working directory."""
        return os.path.dirname(self.path)

    def release(self) -> None:
        """Let go of the descriptor; the next read opens the file again.  No other thread may be reading."""
        fd, self._fd = self._fd, -1  # first: after an interrupt in between, nothing is closed twice
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        self.release()


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Spool(SourceFile):
    """A growing temporary file without a name, which nothing else writes to."""

    __slots__ = ()

    def changed(self) -> bool:
        """It is not."""
        return False


def spool_room(source: Source, nbytes: int) -> tuple[int, ByteRange]:
    """Space for bytes that are made from a source's, in its one temporary file, which is closed with it.

    Returns: The temporary file's descriptor, for writing them, and their position in it.

    Raises:
        FileAccessError: the source was closed.
        OSError: the temporary file could not be made.
    """
    import tempfile

    source._require_open()
    with source._lock:
        spool = source.spool
        if not isinstance(spool, SourceFile):
            with tempfile.TemporaryFile(buffering=0) as made:
                source.spool = spool = _Spool.of_descriptor(os.dup(made.fileno()), source.path)
        begin = -(-spool.size // _PAGE) * _PAGE
        spool.size = begin + nbytes
        return spool.fileno(), ByteRange(spool, begin, nbytes)
