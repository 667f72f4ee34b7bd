"""Bounded, positioned reads: a file, and a range of bytes inside one.

Tensors are addresses, not data.  A `SourceFile` is one open file; a `ByteRange` says where in it
some bytes lie.  Nothing here moves a file position, so ranges can be read from several threads.

Bytes that do not lie in the file as they are wanted are in `ckptkit.computed`.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, NoReturn, TypeVar

from ckptkit.errors import CorruptError, FileAccessError, MissingFileError

__all__ = ["CHUNK_NBYTES", "ByteRange", "SourceFile", "byte_range", "made_by_position", "read_at", "write_at"]

CHUNK_NBYTES = 4 << 20
"""Bytes moved through memory at a time: large enough that the calls cost nothing, small enough
that a handful of buffers stay far below the memory bound."""

_PAGE = 4096
"""What is made of a file begins at a multiple of this in its spool, so that it can be mapped."""

_Record = TypeVar("_Record")

_position = threading.Lock()
"""Held while a file's own position is used, on systems without positioned reads and writes."""


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """At most ``nbytes`` bytes from a position of an open file; none at its end.

    Raises:
        OSError: it could not be read.
    """
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


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


class SourceFile:
    """A regular file, open for reading by position.

    Raises:
        MissingFileError: there is no such file.
        FileAccessError: it is a folder, a device or unreadable.
    """

    __slots__ = ("_companions", "_fd", "_lock", "_spool", "identity", "path", "size")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        self._lock = threading.Lock()
        self._companions: list[SourceFile] = []
        self._spool: SourceFile | None = None
        self.path = os.fsdecode(path)
        try:
            # O_NONBLOCK: opening a named pipe must be refused below, not wait for a writer.
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
            self._fd = os.open(self.path, flags)
            status = os.fstat(self._fd)
        except FileNotFoundError:
            raise MissingFileError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as error:
            if os.path.isdir(self.path):  # Windows refuses to open a folder at all
                raise FileAccessError(f"{self.path}: is a folder, not a file") from None
            reason = getattr(error, "strerror", None) or str(error)
            raise FileAccessError(f"{self.path}: cannot be opened: {reason}") from error
        if not stat.S_ISREG(status.st_mode):
            what = "is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
            self.close()
            raise FileAccessError(f"{self.path}: {what}")
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @classmethod
    def of_descriptor(cls, fd: int, path: str) -> SourceFile:
        """An open file that needs no name of its own; ``path`` is what messages say.

        Raises:
            OSError: the descriptor is not open.
        """
        file = cls.__new__(cls)
        file._fd, file._lock, file._companions, file._spool, file.path = fd, threading.Lock(), [], None, path
        status = os.fstat(fd)
        file.size = status.st_size
        file.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return file

    @property
    def fd(self) -> int:
        """The open file descriptor.

        Raises:
            FileAccessError: the file was closed.
        """
        if self._fd < 0:
            raise FileAccessError(f"{self.path}: the checkpoint was closed; open it again")
        return self._fd

    @property
    def whole(self) -> ByteRange:
        """All of its bytes."""
        return ByteRange(self, 0, self.size)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes from position ``offset``.

        Raises:
            CorruptError: the range reaches past the end of the file.
            FileAccessError: the operating system could not read it.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CorruptError(
                f"bytes {offset:,} to {offset + nbytes:,} were asked of a file of {self.size:,} bytes",
                path=self.path,
            )
        parts = []
        while nbytes:
            part = self._pread(min(nbytes, 1 << 30), offset)
            if not part:
                raise CorruptError(f"the file became shorter while it was read: byte {offset:,}", path=self.path)
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pread(self, nbytes: int, offset: int) -> bytes:
        try:
            return read_at(self.fd, nbytes, offset)
        except FileAccessError:
            raise
        except OSError as error:
            raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}") from error

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill a buffer with the bytes from position ``offset`` on; no memory is taken for them.

        Raises:
            As `read`.
        """
        if not hasattr(os, "preadv"):
            buffer[:] = self.read(offset, len(buffer))
            return
        if offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        view = memoryview(buffer)
        while view:
            try:
                count = os.preadv(self.fd, [view], offset)
            except OSError as error:
                if isinstance(error, FileAccessError):
                    raise
                raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not count:
                raise CorruptError(f"the file became shorter while it was read: byte {offset:,}", path=self.path)
            view, offset = view[count:], offset + count

    def changed(self) -> bool:
        """Whether the file was written to since it was opened (size or modification time)."""
        status = os.fstat(self.fd)
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self.identity

    def keep(self, companion: SourceFile) -> SourceFile:
        """Another file that belongs to this one (a shard to its index) and is closed with it."""
        self._companions.append(companion)
        return companion

    def spool(self, nbytes: int) -> ByteRange:
        """Room for so many bytes that are made of this file's, in its one temporary file, which is closed with it.

        Raises:
            FileAccessError: the file was closed.
            OSError: the temporary file could not be made.
        """
        import tempfile

        self.fd  # noqa: B018 - raises where it was closed
        with self._lock:
            if self._spool is None:
                with tempfile.TemporaryFile(buffering=0) as made:
                    self._spool = _Spool.of_descriptor(os.dup(made.fileno()), self.path)
            begin = -(-self._spool.size // _PAGE) * _PAGE
            self._spool.size = begin + nbytes
            return ByteRange(self._spool, begin, nbytes)

    @property
    def parts(self) -> tuple[SourceFile, ...]:
        """The files that belong to this one."""
        return tuple(self._companions)

    @property
    def total_size(self) -> int:
        """Size in bytes of the file and its companions."""
        return self.size + sum(companion.size for companion in self._companions)

    def close(self) -> None:
        """Close the file and its companions; later reads raise.  Closing twice is harmless."""
        for companion in (*self._companions, *([self._spool] if self._spool is not None else [])):
            companion.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the very end there may be no contextlib
            self.close()
        except Exception:  # noqa: S110 - it was never whole, or Python itself is going down
            pass

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: an open file cannot be copied or pickled; open it again")

    def __repr__(self) -> str:
        return f"SourceFile({self.path!r}, {self.size:,} bytes)"


class _Spool(SourceFile):
    """A temporary file without a name: it grows, and nobody else writes to it."""

    __slots__ = ()

    def changed(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``nbytes`` bytes at ``offset`` of ``file``."""

    file: SourceFile
    offset: int
    nbytes: int

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """``nbytes`` bytes (default: all that follow) from position ``start`` of this range.

        Raises:
            CorruptError: the part asked for is not inside the range.
        """
        wanted = self.nbytes - start if nbytes is None else nbytes
        if start < 0 or wanted < 0 or start + wanted > self.nbytes:
            raise CorruptError(
                f"bytes {start:,} to {start + wanted:,} were asked of a range of {self.nbytes:,} bytes",
                path=self.file.path,
            )
        return self.file.read(self.offset + start, wanted)

    def part(self, start: int, nbytes: int) -> ByteRange:
        """The range of ``nbytes`` bytes that begins at ``start`` of this one."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise CorruptError(
                f"bytes {start:,} to {start + nbytes:,} are not inside a range of {self.nbytes:,} bytes",
                path=self.file.path,
            )
        return ByteRange(self.file, self.offset + start, nbytes)

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[bytes]:
        """The bytes in order, at most ``chunk_nbytes`` at a time."""
        for start in range(0, self.nbytes, chunk_nbytes):
            yield self.read(start, min(chunk_nbytes, self.nbytes - start))

    def plain(self) -> ByteRange:
        """This range, as it is; what `ckptkit.computed` holds has to be made first."""
        return self


def made_by_position(cls: Callable[..., _Record]) -> Callable[..., _Record]:
    """What makes objects of a frozen, slotted dataclass, its fields by position, in a fifth of the time.

    A frozen dataclass sets each field through ``object.__setattr__``; of records that a file has by the hundred
    thousand that takes longer than to read them.  Here they are set in an object of a class with the same slots that
    is not frozen, which then becomes one of ``cls``.
    """
    parts = fields(cls)  # type: ignore[arg-type]  # a class
    space: dict[str, Any] = {f"_{part.name}": part.default for part in parts} | {"_class": cls}
    given = [part.name + (f"=_{part.name}" if part.default is not MISSING else "") for part in parts]
    lines = [*(f"self.{part.name} = {part.name}" for part in parts), "self.__class__ = _class"]
    exec(f"def __init__(self, {', '.join(given)}):\n " + "\n ".join(lines), space)  # noqa: S102 - names of fields alone
    made: Callable[..., _Record] = type(cls.__name__, (), {"__slots__": cls.__slots__, "__init__": space["__init__"]})  # type: ignore[attr-defined]
    return made


byte_range = made_by_position(ByteRange)
"""A `ByteRange` of file, offset and number of bytes."""
