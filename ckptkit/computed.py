"""Bytes that cannot be read from a file directly: compressed, of another dtype, computed from others, or in memory.

The first three are made when they are asked for, and read like a `ckptkit.bytesource.ByteRange`.  A
`DeflatedRange` is inflated once, into a temporary file without a name, one for all of a source.  A `ConvertedRange` is
converted piece by piece as it is read, and a `DenseRange` is made block by block: `is_made` identifies these two, which
keep nothing, and `read_into` reads any.  `plain` gives of each a `ByteRange`.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, Source, outside, spool_room, write_at
from ckptkit.errors import CorruptError, FileAccessError
from ckptkit.startup import dataclass

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DEFLATE_MOST",
    "ByteSource",
    "ConvertedRange",
    "DTypeConversion",
    "DeflatedRange",
    "DenseRange",
    "DenseValues",
    "Held",
    "Inflation",
    "can_be_looked_at",
    "files_of",
    "is_made",
    "piece_nbytes",
    "read_into",
    "spooled",
]

Buffer = bytes | bytearray | memoryview

DEFLATE_MOST = 1032
"""The most bytes that deflate can make of one (RFC 1951: 258 bytes from a length code of one bit and a
distance code of one bit)."""


def spooled(parts: Iterable[bytes], nbytes: int | None, source: Source, what: str) -> ByteRange:
    """The parts in the temporary file of the source, which is closed with it.

    Args:
        parts: the bytes.
        nbytes: how many they are; ``None``: that is known after the last, and nothing else is spooled in the meantime.
        source: whose they are.
        what: begins the message if they do not fit.

    Raises:
        FileAccessError: the temporary file could not be written.
    """
    import shutil
    import tempfile

    remedy, needs = "set TMPDIR to a folder with enough space", ""

    def reserve(more: int) -> tuple[int, ByteRange]:
        nonlocal needs
        needs = f"{source.path}: {what} {done + more:,} bytes in the temporary folder"
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if more > free:  # before a small file fills the disk
            raise FileAccessError(f"{needs}, which has {free:,}; {remedy}", path=source.path)
        return spool_room(source, more)

    done = 0
    try:
        spool, room = reserve(CHUNK_NBYTES if nbytes is None else nbytes)
        for part in parts:
            # The maker of the bytes reports too many.
            piece = memoryview(part) if nbytes is None else memoryview(part)[: nbytes - done]
            if done + len(piece) > room.nbytes:
                _, further = reserve(-(-len(piece) // CHUNK_NBYTES) * CHUNK_NBYTES)
                room = ByteRange(room.file, room.offset, room.nbytes + further.nbytes)
            write_at(spool, piece, room.offset + done)
            done += len(piece)
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{needs}: {error.strerror}; {remedy}", path=source.path) from error
    if nbytes is None:  # who reads ahead goes by the size of the whole
        room.file.size = room.offset + done
        return room.part(0, done)
    return room


class Held(Source):
    """Bytes in memory that are read like a file; they are not copied.

    Args:
        data: whatever gives its bytes as a buffer; it cannot be resized until this is closed.
        path: what messages call it.

    Raises:
        FileAccessError: they are not consecutive.
    """

    __slots__ = ("_data",)

    def __init__(self, data: Any, path: str) -> None:
        view = memoryview(data)
        if not view.c_contiguous:
            raise FileAccessError(f"{path}: a view with gaps, which is not the content of a file", path=path)
        self._data = view.cast("B")
        super().__init__(path, self._data.nbytes)

    def _some(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._data[offset : offset + nbytes])

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`, without allocating memory."""
        if self._closed or offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        memoryview(buffer)[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        """As `Source.close`; the bytes may be resized again."""
        super().close()
        self._data.release()


class _Computed:
    """Bytes that are computed from others, at most once and only on request."""

    __slots__ = ("_lock", "_plain", "file", "name", "nbytes")

    how: ClassVar[str]
    """The kind of the others, for messages."""

    def __init__(self, file: Source, nbytes: int, name: str) -> None:
        self.file = file
        self.nbytes = nbytes
        self.name = name
        self._lock = threading.Lock()
        self._plain: ByteRange | None = None

    def plain(self) -> ByteRange:
        """The decompressed or computed bytes, in a temporary file that is closed with the file they came from.

        Raises:
            CorruptError: the bytes they are made from are damaged.
            FileAccessError: the temporary file could not be written.
        """
        with self._lock:
            if self._plain is None:
                self._plain = spooled(self._parts(), self.nbytes, self.file, f"{self.name} is {self.how} and takes")
            return self._plain

    def _parts(self) -> Iterator[bytes]:
        """The bytes in pieces, as they are made."""
        raise NotImplementedError


class Inflation(_Computed):
    """Deflated bytes of a file (RFC 1951), inflated at most once, and only when they are asked for.

    Args:
        deflated: their place in the file.
        nbytes: size in bytes once inflated, as declared; another size is an error.
        crc32: of the inflated bytes; ``None``: not recorded.
        name: what the bytes are, for messages.
    """

    __slots__ = ("crc32", "deflated")

    how = "compressed"

    def __init__(self, deflated: ByteRange, nbytes: int, crc32: int | None, name: str) -> None:
        super().__init__(deflated.file, nbytes, name)
        self.deflated = deflated
        self.crc32 = crc32

    def check(self) -> None:
        """Inflate, count and sum, and keep nothing; what is there already was.

        Raises:
            CorruptError: they cannot be inflated, or their size or checksum is another.
        """
        with self._lock:
            if self._plain is None:
                for _ in self._parts():
                    pass

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
            raise self._corrupt(f"its CRC-32 is {crc:08x}, but the archive records {self.crc32:08x}: damaged")

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self.name}: {what}", path=self.file.path)


@dataclass(frozen=True, slots=True)
class _ComputedRange:
    """``nbytes`` bytes at ``offset`` of what ``whole`` makes; read like a `ByteRange`."""

    whole: _Computed
    offset: int
    nbytes: int

    @property
    def file(self) -> Source:
        """The file with the bytes they are computed from."""
        return self.whole.file

    def plain(self) -> ByteRange:
        """The range, in a temporary file.

        Raises:
            CorruptError, FileAccessError: as `Inflation.plain`.
        """
        return self.whole.plain().part(self.offset, self.nbytes)

    def part(self, start: int, nbytes: int) -> Self:
        """As `ByteRange.part`; nothing is made for it."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise outside(start, nbytes, self.nbytes, self.file.path)
        return type(self)(self.whole, self.offset + start, nbytes)


class DeflatedRange(_ComputedRange):
    """``nbytes`` bytes at ``offset`` of what ``whole`` inflates to; read like a `ByteRange`."""

    __slots__ = ()

    whole: Inflation

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """As `ByteRange.read`."""
        return self.plain().read(start, nbytes)

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[bytes]:
        """As `ByteRange.chunks`."""
        return self.plain().chunks(chunk_nbytes)


class Function(Protocol):
    """Converts values; may be called from several threads at once."""

    def __call__(self, values: Buffer) -> bytes:
        """The bytes of the values converted."""
        ...

    def into(self, values: Buffer, out: bytearray | memoryview) -> None:
        """The same into a buffer of the right size, without allocating memory."""
        ...


class DTypeConversion(_Computed):
    """Values that are converted to another dtype as they are read; none are kept.

    Args:
        original: the values as they are in the file.
        before, after: bytes of one value, before and after.
        function: what converts the bytes of whole values.
        name: what the values are, for messages.
        dtype: torch name of the values' type before.
    """

    __slots__ = ("after", "before", "dtype", "function", "original")

    how = "converted"

    def __init__(
        self, original: ByteSource, before: int, after: int, function: Function, name: str, dtype: str
    ) -> None:
        super().__init__(original.file, original.nbytes // before * after, name)
        self.original = original
        self.before, self.after = before, after
        self.function = function
        self.dtype = dtype

    def _parts(self) -> Iterator[bytes]:
        return ConvertedRange(self, 0, self.nbytes).chunks()


class ConvertedRange(_ComputedRange):
    """``nbytes`` bytes at ``offset`` of what ``whole`` converts to; read like a `ByteRange`."""

    __slots__ = ()

    whole: DTypeConversion

    @property
    def original(self) -> ByteSource:
        """The values this range is converted from.

        Raises:
            CorruptError: it does not begin and end between values.
        """
        first, rest = divmod(self.offset, self.whole.after)
        count, more = divmod(self.nbytes, self.whole.after)
        if rest or more:
            raise CorruptError("a part of a converted value was asked for", path=self.file.path)
        return self.whole.original.part(first * self.whole.before, count * self.whole.before)

    def into(self, out: bytearray | memoryview, before: bytearray | memoryview) -> None:
        """Convert all of it into a buffer; ``before`` is one for the values as they were."""
        read_into(self.original, before)
        self.whole.function.into(before, out)

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """As `ByteRange.read`."""
        part = self.part(start, self.nbytes - start if nbytes is None else nbytes)
        width = self.whole.after
        first = part.offset // width * width
        end = -(-(part.offset + part.nbytes) // width) * width
        whole = ConvertedRange(self.whole, first, end - first)
        values = self.whole.function(whole.original.read())
        return values[part.offset - first : part.offset - first + part.nbytes]

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[bytes]:
        """As `ByteRange.chunks`; every chunk but the last holds whole values."""
        step = max(chunk_nbytes // self.whole.after, 1) * self.whole.after
        for start in range(0, self.nbytes, step):
            yield self.read(start, min(step, self.nbytes - start))


class DenseValues(_Computed):
    """A tensor's values in C order, little-endian, computed from other tensors' on request.

    They are made in blocks, and each thread keeps its last one: readers take pieces of any size.

    Args:
        function: gives the bytes of ``count`` elements from element ``first`` on; may be called from several threads.
        numel: how many elements there are.
        itemsize: bytes of one.
        parts: the storages (`ckptkit.tensor.Storage`) that they are computed from; at least one.
        files: the sources that those are in.
        name: what the values are, for messages.
        block_nbytes: bytes of a block.
    """

    __slots__ = ("block_nbytes", "files", "function", "itemsize", "parts")

    how = "made of others"
    is_gathered = False
    """Whether they are others' values that are only put in order."""

    def __init__(
        self,
        function: Callable[[int, int], bytes],
        numel: int,
        itemsize: int,
        parts: tuple[object, ...],
        files: tuple[Source, ...],
        name: str,
        block_nbytes: int = CHUNK_NBYTES,
    ) -> None:
        super().__init__(files[0], numel * itemsize, name)
        self.function = function
        self.itemsize = itemsize
        self.parts = parts
        self.files = files
        self.block_nbytes = max(block_nbytes // itemsize, 1) * itemsize

    def _parts(self) -> Iterator[bytes]:
        return DenseRange(self, 0, self.nbytes).chunks()

    def without_checksums(self) -> DenseValues:
        """The same values, without the recorded checksums of their parts."""
        return self

    def copies(self, offset: int, nbytes: int) -> list[tuple[int, ByteRange]] | None:
        """The bytes of a range as runs in files, each with its position there; ``None``: they have to be made."""
        del offset, nbytes
        return None

    def fill(self, offset: int, out: memoryview) -> None:
        """Fill a buffer with the bytes from a position on."""
        while out:
            number, skipped = divmod(offset, self.block_nbytes)
            some = memoryview(self.block(number))[skipped : skipped + len(out)]
            out[: len(some)] = some
            out, offset = out[len(some) :], offset + len(some)

    def block(self, number: int) -> bytes:
        """The bytes of a block.

        Raises:
            CorruptError: the bytes they are made from are damaged.
        """
        kept: tuple[DenseValues, int, bytes] | None = getattr(_last, "block", None)
        if kept is None or kept[0] is not self or kept[1] != number:
            start = number * self.block_nbytes
            nbytes = min(self.block_nbytes, self.nbytes - start)
            made = self.function(start // self.itemsize, nbytes // self.itemsize)
            kept = _last.block = self, number, made
        return kept[2]


_last = threading.local()


class DenseRange(_ComputedRange):
    """``nbytes`` bytes at ``offset`` of the values that ``whole`` makes; read like a `ByteRange`."""

    __slots__ = ()

    whole: DenseValues

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """As `ByteRange.read`."""
        out = bytearray(self.nbytes - start if nbytes is None else nbytes)
        self.part(start, len(out)).into(out)
        return bytes(out)

    def into(self, out: bytearray | memoryview) -> None:
        """Fill a buffer with all of it."""
        self.whole.fill(self.offset, memoryview(out))

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[bytes]:
        """As `ByteRange.chunks`; every chunk but the last holds whole values."""
        step = max(chunk_nbytes // self.whole.itemsize, 1) * self.whole.itemsize
        for start in range(0, self.nbytes, step):
            yield self.read(start, min(step, self.nbytes - start))


ByteSource = ByteRange | DeflatedRange | ConvertedRange | DenseRange
"""Where bytes are: stored unchanged, compressed, as values of another dtype, or in the parts they are computed from."""


def is_made(source: ByteSource) -> TypeGuard[ConvertedRange | DenseRange]:
    """Whether the bytes are made as they are read, and stored nowhere."""
    return isinstance(source, (ConvertedRange, DenseRange))


def can_be_looked_at(source: ByteSource) -> bool:
    """Whether a few bytes can be read without inflating or computing others."""
    return isinstance(source, ByteRange) or (isinstance(source, DenseRange) and source.whole.is_gathered)


def read_into(source: ByteSource, out: bytearray | memoryview) -> None:
    """Fill a buffer with all bytes of a range.

    Raises:
        CorruptError, FileAccessError: they cannot be read or made.
    """
    if isinstance(source, DenseRange):
        source.into(out)
    elif isinstance(source, ConvertedRange):
        source.into(out, bytearray(source.original.nbytes))
    else:
        run = source.plain()
        run.file.read_into(run.offset, out)


def piece_nbytes(source: ConvertedRange | DenseRange, converted: int) -> int:
    """Bytes that are made at a time, by one thread, in whole values: a block, or about ``converted`` that are."""
    if isinstance(source, DenseRange):
        return source.whole.block_nbytes
    before, after, original = source.whole.before, source.whole.after, source.whole.original
    return (piece_nbytes(original, converted) // before if is_made(original) else converted // after) * after


def files_of(source: ByteSource) -> tuple[Source, ...]:
    """The sources that bytes are read from."""
    if isinstance(source, ConvertedRange):
        return files_of(source.whole.original)
    return source.whole.files if isinstance(source, DenseRange) else (source.file,)
