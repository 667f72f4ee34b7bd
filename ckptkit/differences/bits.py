"""Whether tensors have the same bits: read side by side, a piece at a time.

Tensors whose values are in a row are compared in place, without computing anything; numpy is imported only for values
that must be gathered.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import TensorEntry
from ckptkit.computed import Held
from ckptkit.errors import CorruptError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.transfer.checksums import Checksums, first_difference
from ckptkit.transfer.values import Ahead, same_values, stream

__all__ = ["PIECE_NBYTES", "chunks_side_by_side", "held", "pieces", "same_piece", "unexpanded"]

PIECE_NBYTES = 16 << 20
"""Bytes of a tensor that one thread compares before it looks for other work: of few large tensors every core
has its share."""


def unexpanded(a: TensorEntry, b: TensorEntry) -> tuple[TensorEntry, TensorEntry, int] | None:
    """Two tensors of one shape with each dimension that both expand (stride 0) taken once.

    Returns:
        The two, and how often each of their elements is in the whole; ``None``: both are views of far more elements
        than their storages hold, which a few bytes of a file can ask for.
    """
    copies = 1
    if a.shape == b.shape and 0 in a.stride and 0 in b.stride and 0 not in a.shape:
        again = [x == y == 0 for x, y in zip(a.stride, b.stride, strict=True)]
        shape = tuple(1 if once else size for once, size in zip(again, a.shape, strict=True))
        copies = a.numel
        a, b = replace(a, shape=shape), replace(b, shape=shape)
        copies //= a.numel
    most = DEFAULT_LIMITS.overlap
    if a.nbytes > most * a.storage.nbytes and b.nbytes > most * b.storage.nbytes:
        return None
    return a, b, copies


def pieces(a: TensorEntry, b: TensorEntry, elements: int) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    """Two tensors of equal size in pieces of ``elements``, in C order; whole if one is not contiguous."""
    if a.numel == 0:
        return
    if a.numel <= elements or not (a.is_contiguous and b.is_contiguous):
        yield a, b
        return
    for first in range(0, a.numel, elements):
        count = min(elements, a.numel - first)
        left, right = (
            replace(entry, storage_offset=entry.storage_offset + first, shape=(count,), stride=(1,)) for entry in (a, b)
        )
        yield left, right


def same_piece(a: TensorEntry, b: TensorEntry, checksums: Checksums, ahead: tuple[Ahead, Ahead] | None = None) -> bool:
    """Whether two tensors of one dtype and as many elements have the same bits, in C order.

    Args:
        a: one.
        b: the other.
        checksums: gets the sums of bytes that are the same.
        ahead: by which either is read along with its neighbours, where both are small.

    Raises:
        DTypeError: values of a dtype that numpy cannot hold would have to be computed.
        CorruptError, FileAccessError: they cannot be read.
    """
    if a.is_plain_bytes and b.is_plain_bytes:
        nbytes = a.nbytes
        left, right = _lying(a, nbytes), _lying(b, nbytes)
        x, y = a.storage, b.storage
        summed = [left] if (x.original or x).crc32 is not None else []
        if (y.original or y).crc32 is not None:
            summed.append(right)
        if ahead is not None:
            data = ahead[0].read(left)
            is_same = data == ahead[1].read(right)
            crc = zlib.crc32(data) if summed else 0
        else:
            difference, crc = first_difference(left, right, summed=bool(summed))
            is_same = difference is None
        for run in summed if is_same else ():
            checksums.note(run, crc)
        return is_same
    return same_values(a, b)


def held(entry: TensorEntry) -> TensorEntry:
    """The same tensor with its bytes in memory."""
    start, end = entry.span()
    storage = entry.storage
    data = storage.source.part(start, end - start).read()
    place = Held(data, storage.source.file.path).whole
    return replace(
        entry,
        storage=replace(storage, source=place, nbytes=len(data), crc32=None, original=None),
        storage_offset=entry.storage_offset - start // entry.itemsize,
    )


def _lying(entry: TensorEntry, nbytes: int) -> ByteRange:
    """The bytes, so many, of a tensor whose values are in a row."""
    source = entry.storage.source
    if nbytes != source.nbytes:
        source = source.part(entry.storage_offset * entry.itemsize, nbytes)
    return source if isinstance(source, ByteRange) else source.plain()


def chunks_side_by_side(a: TensorEntry, b: TensorEntry, elements: int) -> Iterator[tuple[memoryview, memoryview]]:
    """The values of two tensors of as many elements, ``elements`` of each at a time, in C order and little-endian."""
    left, right = _Taken(a), _Taken(b)
    for first in range(0, a.numel, elements):
        count = min(elements, a.numel - first)
        yield left.take(count * a.itemsize), right.take(count * b.itemsize)


class _Taken:
    """A tensor's values, taken in portions of any size from the chunks they are read in."""

    def __init__(self, entry: TensorEntry) -> None:
        self._chunks = stream(entry)
        self._chunk = memoryview(b"")
        self._path = entry.storage.source.file.path

    def take(self, nbytes: int) -> memoryview:
        """The next bytes.

        Raises:
            CorruptError: there are fewer.
        """
        if len(self._chunk) < nbytes:
            parts = [self._chunk]
            missing = nbytes - len(self._chunk)
            while missing > 0:
                part = next(self._chunks, b"")
                if not part:
                    raise CorruptError(f"a tensor has {missing:,} bytes less than its shape requires", path=self._path)
                parts.append(memoryview(part))
                missing -= len(part)
            self._chunk = memoryview(b"".join(parts)) if len(parts) > 2 or len(parts[0]) else parts[1]
        taken, self._chunk = self._chunk[:nbytes], self._chunk[nbytes:]
        return taken
