"""Where bytes lie: sources that are read by position, and ranges of them.

Tensors are addresses, not data.  A `Source` is whatever holds a file's bytes: a local file (`SourceFile`), bytes in
memory, and whatever else a module of its own makes one.  A `ByteRange` says where in a source some bytes lie.  Nothing
here moves a file position, so ranges can be read from several threads.  Bytes that do not lie in a source as they are
wanted are in `ckptkit.computed`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, NoReturn, TypeVar

from ckptkit.arguments import BinaryFile
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError

__all__ = [
    "CHUNK_NBYTES",
    "GAP_NBYTES",
    "ByteRange",
    "Readable",
    "Source",
    "SourceFile",
    "byte_range",
    "made_by_position",
    "outside",
    "read_at",
    "write_at",
]

CHUNK_NBYTES = 4 << 20
"""Bytes moved at a time: large enough that calls cost nothing, and some such buffers are far below the memory bound."""

GAP_NBYTES = 8 << 10
"""Bytes between two wanted ones that take longer to read along than another read does to begin."""

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


class Source:
    """What holds the bytes of a file, read by position, from several threads at once.

    All else reads through this protocol, so that a source of another kind is one subclass in one module.  It says how
    some bytes are got (`_some`); whether it can have changed (`stamp`) and what lies beside it (`sibling`), where
    anything can and does.  Copies in the kernel, maps and locks are for those with a descriptor (`fileno`).

    Args:
        path: what messages call it, and what it is called by: its last segment is the file's name.
        size: in bytes.
        identity: its `stamp` when it was opened.

    Attributes:
        path, size, identity: as above.
        parts: the sources that belong to this one (shards to their index) and are closed with it, by the names that it
            calls them by.
    """

    __slots__ = ("_closed", "_lock", "_spool", "identity", "parts", "path", "size")

    def __init__(self, path: str, size: int, identity: object = None) -> None:
        self._closed = False
        self._lock = threading.Lock()
        self._spool: SourceFile | None = None
        self.path = path
        self.size = size
        self.identity = identity
        self.parts: dict[str, Source] = {}

    def _some(self, offset: int, nbytes: int) -> bytes:
        """At least one and at most ``nbytes`` bytes from position ``offset``; none where the source ends before.

        Called for what lies inside the source, as it was when it was opened.

        Raises:
            FileAccessError: they could not be read.
        """
        raise NotImplementedError

    def stamp(self) -> object:
        """What differs once the source was written to: a file's modification time, an ETag.

        Raises:
            FileAccessError: it cannot be found out.
        """
        return self.identity

    def sibling(self, name: str) -> Source:
        """The source of a name beside this one; see `parts` for one that is to be closed with it.

        Args:
            name: relative to the folder this one lies in, in segments with slashes between.

        Raises:
            MissingFileError: there is none.
            FileAccessError: it cannot be opened.
        """
        raise MissingFileError(f"{self.path}: nothing lies beside it, {name!r} neither", path=self.path)

    @property
    def folder(self) -> str | None:
        """The local folder it lies in, all of whose files can be looked at; ``None``: those whose names are known."""
        return None

    def fileno(self) -> int | None:
        """Descriptor of an open file that has exactly its bytes; ``None``: they can only be read.

        Raises:
            FileAccessError: it was closed.
        """
        return None

    def located(self, area: ByteRange) -> ByteRange:
        """The same bytes as a range of what has a descriptor, where this lies inside another source that does."""
        return area

    def release(self) -> None:
        """Let go of what a system has few of, until something is read again.  No other thread may be reading."""

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
            raise outside(offset, nbytes, self.size, self.path, "were asked of a file")
        parts = []
        while nbytes:
            if self._closed:
                self._require_open()
            part = self._some(offset, min(nbytes, 1 << 30))
            if not part:
                raise self._shorter(offset)
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill a buffer with the bytes from position ``offset`` on.

        Raises:
            As `read`.
        """
        view = memoryview(buffer)
        for start in range(0, len(view), CHUNK_NBYTES):
            piece = view[start : start + CHUNK_NBYTES]
            piece[:] = self.read(offset + start, len(piece))

    def tail(self, nbytes: int) -> bytes:
        """The last ``nbytes`` bytes, or all there are.

        Raises:
            As `read`.
        """
        return self.read(max(0, self.size - nbytes), min(nbytes, self.size))

    def ranges(self, wanted: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of several ranges, in the order asked for; those that nearly touch are read at once.

        Args:
            wanted: offset and size in bytes of each.

        Raises:
            As `read`.
        """
        first = 0
        while first < len(wanted):
            begin, end, last = wanted[first][0], sum(wanted[first]), first + 1
            while last < len(wanted) and 0 <= wanted[last][0] - end <= GAP_NBYTES:
                if sum(wanted[last]) - begin > CHUNK_NBYTES:
                    break
                end, last = sum(wanted[last]), last + 1
            data = self.read(begin, end - begin)
            for offset, nbytes in wanted[first:last]:
                yield data[offset - begin : offset - begin + nbytes]
            first = last

    def changed(self) -> bool:
        """Whether it was written to since it was opened.

        Raises:
            As `stamp`.
        """
        self._require_open()
        return self.stamp() != self.identity

    @property
    def total_size(self) -> int:
        """Size in bytes of it and its parts."""
        return self.size + sum(part.size for part in self.parts.values())

    def spool(self, nbytes: int) -> tuple[int, ByteRange]:
        """Room for so many bytes that are made of this source's, in its one temporary file, which is closed with it.

        Returns:
            The temporary file's descriptor, to write them with, and where in it they are to lie.

        Raises:
            FileAccessError: the source was closed.
            OSError: the temporary file could not be made.
        """
        import tempfile

        self._require_open()
        with self._lock:
            if self._spool is None:
                with tempfile.TemporaryFile(buffering=0) as made:
                    self._spool = _Spool.of_descriptor(os.dup(made.fileno()), self.path)
            begin = -(-self._spool.size // _PAGE) * _PAGE
            self._spool.size = begin + nbytes
            return self._spool.fileno(), ByteRange(self._spool, begin, nbytes)

    def close(self) -> None:
        """Close it and its parts; later reads raise.  Closing twice is harmless."""
        self._closed = True
        for part in self.parts.values():
            part.close()
        if self._spool is not None:
            self._spool.close()

    def _require_open(self) -> None:
        if self._closed:
            raise FileAccessError(f"{self.path}: the checkpoint was closed; open it again", path=self.path)

    def _shorter(self, offset: int) -> CorruptError:
        return CorruptError(f"the file became shorter while it was read: byte {offset:,}", path=self.path)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the very end there may be no contextlib
            self.close()
        except Exception:  # noqa: S110 - it was never whole, or Python itself is going down
            pass

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: an open file cannot be copied or pickled; open it again")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.size:,} bytes)"


Readable = str | os.PathLike[str] | Source | BinaryFile | bytes | bytearray | memoryview
"""What a checkpoint may be read from: a path, a source, an open file, or the bytes themselves."""


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
        """An open file that needs no name of its own; ``path`` is what messages say.

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
                    f"{self.path}: too many files are open at once for all shards; allow more (ulimit -n 8192)",
                    path=self.path,
                ) from error
            raise
        if again.identity != self.identity:
            raise CorruptError("the file was changed while it was being read", path=self.path)
        descriptor, again._fd = again._fd, -1
        return descriptor

    def _some(self, offset: int, nbytes: int) -> bytes:
        try:
            return read_at(self.fileno(), nbytes, offset)
        except FileAccessError:
            raise
        except OSError as error:
            raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}", path=self.path) from error

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`; no memory is taken for the bytes."""
        if not hasattr(os, "preadv"):
            super().read_into(offset, buffer)
            return
        if offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        view = memoryview(buffer)
        while view:
            try:
                count = os.preadv(self.fileno(), [view], offset)
            except OSError as error:
                if isinstance(error, FileAccessError):
                    raise
                raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}", path=self.path) from error
            if not count:
                raise self._shorter(offset)
            view, offset = view[count:], offset + count

    def stamp(self) -> tuple[int, int, int, int]:
        """As `identity`, by now."""
        return _stamp(os.fstat(self.fileno()))

    def sibling(self, name: str) -> SourceFile:
        """As `Source.sibling`."""
        return SourceFile(os.path.join(os.path.dirname(os.path.abspath(self.path)), *name.split("/")))

    @property
    def folder(self) -> str:
        """The folder it lies in; ``""``: the working directory."""
        return os.path.dirname(self.path)

    def release(self) -> None:
        """Let go of the descriptor; the next read opens the file again.  No other thread may be reading."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        self.release()


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Spool(SourceFile):
    """A temporary file without a name: it grows, and nobody else writes to it."""

    __slots__ = ()

    def changed(self) -> bool:
        """It is not."""
        return False


def outside(start: int, nbytes: int, whole: int, path: str, told: str = "are not inside a range") -> CorruptError:
    """The error that not all of so many bytes from ``start`` are among the ``whole`` number of a range or a file."""
    return CorruptError(f"bytes {start:,} to {start + nbytes:,} {told} of {whole:,} bytes", path=path)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``nbytes`` bytes at ``offset`` of ``file``."""

    file: Source
    offset: int
    nbytes: int

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """``nbytes`` bytes (default: all that follow) from position ``start`` of this range.

        Raises:
            CorruptError: the part asked for is not inside the range.
        """
        wanted = self.nbytes - start if nbytes is None else nbytes
        if start < 0 or wanted < 0 or start + wanted > self.nbytes:
            raise outside(start, wanted, self.nbytes, self.file.path, "were asked of a range")
        return self.file.read(self.offset + start, wanted)

    def tail(self, nbytes: int) -> bytes:
        """The last ``nbytes`` bytes, or all there are."""
        if self.offset + self.nbytes == self.file.size and nbytes <= self.nbytes:
            return self.file.tail(nbytes)
        return self.read(max(0, self.nbytes - nbytes))

    def part(self, start: int, nbytes: int) -> ByteRange:
        """The range of ``nbytes`` bytes that begins at ``start`` of this one."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise outside(start, nbytes, self.nbytes, self.file.path)
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
