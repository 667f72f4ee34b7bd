"""Bounded, positioned reads: a file, and a range of bytes inside one.

Tensors are addresses, not data.  A `SourceFile` is one open file; a `ByteRange` says where in it
some bytes lie.  Nothing here moves a file position, so ranges can be read from several threads.

A `DeflatedRange` stands for bytes that lie compressed in the file.  They are inflated when the
first of them is asked for, once, into a temporary file without a name; from then on they are a
`ByteRange` like any other, which is what `plain` gives of both.
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from ckptkit.errors import CorruptError, FileAccessError, MissingFileError

__all__ = ["CHUNK_NBYTES", "DEFLATE_MOST", "ByteRange", "ByteSource", "DeflatedRange", "Inflation", "SourceFile"]

CHUNK_NBYTES = 4 << 20
"""Bytes moved through memory at a time: large enough that the calls cost nothing, small enough
that a handful of buffers stay far below the memory bound."""

DEFLATE_MOST = 1032
"""The most bytes that deflate can make of one (RFC 1951: 258 bytes from a length code of one bit and a
distance code of one bit)."""


class SourceFile:
    """A regular file, open for reading by position.

    Raises:
        MissingFileError: there is no such file.
        FileAccessError: it is a folder, a device or unreadable.
    """

    __slots__ = ("_companions", "_fd", "_lock", "identity", "path", "size")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        self._lock = threading.Lock()
        self._companions: list[SourceFile] = []
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
        file._fd, file._lock, file._companions, file.path = fd, threading.Lock(), [], path
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
            if hasattr(os, "pread"):
                return os.pread(self.fd, nbytes, offset)
            with self._lock:  # no positioned read on this system: the position is shared
                os.lseek(self.fd, offset, os.SEEK_SET)
                return os.read(self.fd, nbytes)
        except FileAccessError:
            raise
        except OSError as error:
            raise FileAccessError(f"{self.path}: cannot be read: {error.strerror}") from error

    def read_into(self, offset: int, buffer: bytearray) -> None:
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

    @property
    def total_size(self) -> int:
        """Size in bytes of the file and its companions."""
        return self.size + sum(companion.size for companion in self._companions)

    def close(self) -> None:
        """Close the file and its companions; later reads raise.  Closing twice is harmless."""
        for companion in self._companions:
            companion.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SourceFile({self.path!r}, {self.size:,} bytes)"


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
        """This range; see `DeflatedRange.plain`."""
        return self


class Inflation:
    """Deflated bytes of a file (RFC 1951), inflated at most once, and only when they are asked for.

    Args:
        deflated: where they lie.
        nbytes: size in bytes once inflated, as declared; another size is an error.
        crc32: of the inflated bytes; ``None``: not recorded.
        name: what the bytes are, for messages.
    """

    __slots__ = ("_lock", "_plain", "crc32", "deflated", "name", "nbytes")

    def __init__(self, deflated: ByteRange, nbytes: int, crc32: int | None, name: str) -> None:
        self.deflated = deflated
        self.nbytes = nbytes
        self.crc32 = crc32
        self.name = name
        self._lock = threading.Lock()
        self._plain: ByteRange | None = None

    def plain(self) -> ByteRange:
        """The inflated bytes, in a temporary file that is closed with the file they came from.

        Raises:
            CorruptError: they cannot be inflated, or their size or checksum is another.
            FileAccessError: the temporary file could not be written.
        """
        with self._lock:
            if self._plain is None:
                self._plain = self._inflated()
            return self._plain

    def _inflated(self) -> ByteRange:
        import shutil
        import tempfile

        source = self.deflated.file
        source.fd  # noqa: B018 - raises where the file was closed
        needs = f"{source.path}: {self.name} is compressed and takes {self.nbytes:,} bytes in the temporary folder"
        remedy = "set TMPDIR to a folder with room for it"
        try:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if self.nbytes > free:  # before a small file fills the disk
                raise FileAccessError(f"{needs}, which has {free:,}; {remedy}")
            with tempfile.TemporaryFile(buffering=0) as out:
                for part in self._parts():
                    view = memoryview(part)
                    while view:
                        view = view[out.write(view) :]
                file = SourceFile.of_descriptor(os.dup(out.fileno()), source.path)
        except OSError as error:
            if isinstance(error, FileAccessError):
                raise
            raise FileAccessError(f"{needs}: {error.strerror}; {remedy}") from error
        source.keep(file)
        return ByteRange(file, 0, self.nbytes)

    def _parts(self) -> Iterator[bytes]:
        """The inflated bytes in pieces of at most a chunk, counted and summed on the way."""
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        count = crc = 0
        for chunk in self.deflated.chunks():
            more = True
            while more and count <= self.nbytes:
                try:
                    part = inflater.decompress(chunk, CHUNK_NBYTES)
                except zlib.error as error:
                    raise self._corrupt(f"cannot be inflated: {error}") from None
                count, crc = count + len(part), zlib.crc32(part, crc)
                chunk = inflater.unconsumed_tail
                more = bool(chunk) or len(part) == CHUNK_NBYTES
                yield part
        if count != self.nbytes or not inflater.eof or inflater.unused_data:
            raise self._corrupt(f"does not inflate to the {self.nbytes:,} bytes it declares")
        if self.crc32 is not None and crc != self.crc32:
            raise self._corrupt(f"its CRC-32 is {crc:08x}, recorded is {self.crc32:08x}: damaged")

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self.name}: {what}", path=self.deflated.file.path)


@dataclass(frozen=True, slots=True)
class DeflatedRange:
    """``nbytes`` bytes at ``offset`` of what ``whole`` inflates to; read like a `ByteRange`."""

    whole: Inflation
    offset: int
    nbytes: int

    @property
    def file(self) -> SourceFile:
        """The file the compressed bytes lie in."""
        return self.whole.deflated.file

    def plain(self) -> ByteRange:
        """The range once inflated.

        Raises:
            As `Inflation.plain`.
        """
        return self.whole.plain().part(self.offset, self.nbytes)

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """As `ByteRange.read`."""
        return self.plain().read(start, nbytes)

    def part(self, start: int, nbytes: int) -> DeflatedRange:
        """As `ByteRange.part`; nothing is inflated for it."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise CorruptError(
                f"bytes {start:,} to {start + nbytes:,} are not inside a range of {self.nbytes:,} bytes",
                path=self.file.path,
            )
        return DeflatedRange(self.whole, self.offset + start, nbytes)

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[bytes]:
        """As `ByteRange.chunks`."""
        return self.plain().chunks(chunk_nbytes)


ByteSource = ByteRange | DeflatedRange
"""Where bytes lie, as they are or compressed."""
