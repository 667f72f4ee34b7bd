"""Whether tensors hold the same bits: read side by side, a piece at a time.

Tensors whose values lie in a row are compared as they lie, and nothing is computed; numpy is imported only for
what has to be gathered.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError
from ckptkit.transfer import stream
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.values import Ahead

__all__ = ["PIECE_NBYTES", "chunks_side_by_side", "pieces", "same_piece", "unexpanded"]

PIECE_NBYTES = 16 << 20
"""Bytes of a tensor that one thread compares before it looks for other work: of few large tensors every core
has its share."""

_COMPARED_NBYTES = 512 << 10
"""Bytes compared at a time: both sides fit into a core's own cache."""

_GATHERED = 1 << 16
"""Elements compared at a time where they have to be gathered."""

_MOST_OVERLAP = 64
"""How many times the bytes of its storage a view may have and still be gone through, as for statistics."""

_kept = threading.local()


def unexpanded(a: TensorEntry, b: TensorEntry) -> tuple[TensorEntry, TensorEntry, int] | None:
    """Two tensors of one shape with each dimension that both expand (stride 0) taken once.

    Returns:
        The two, and how often each of their elements stands in the whole; ``None``: both are views of far more
        elements than their storages hold, which a few bytes of a file can ask for.
    """
    copies = 1
    if a.shape == b.shape and 0 in a.stride and 0 in b.stride and 0 not in a.shape:
        again = [x == y == 0 for x, y in zip(a.stride, b.stride, strict=True)]
        shape = tuple(1 if once else size for once, size in zip(again, a.shape, strict=True))
        copies = a.numel
        a, b = replace(a, shape=shape), replace(b, shape=shape)
        copies //= a.numel
    if a.nbytes > _MOST_OVERLAP * a.storage.nbytes and b.nbytes > _MOST_OVERLAP * b.storage.nbytes:
        return None
    return a, b, copies


def pieces(a: TensorEntry, b: TensorEntry, elements: int) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    """Two tensors of as many elements in pieces of ``elements``, in C order; whole where one is not contiguous."""
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
    """Whether two tensors of one dtype and as many elements hold the same bits, in C order.

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
        summed = [(entry.storage.original or entry.storage).crc32 is not None for entry in (a, b)]
        return _same_bytes(_lying(a), _lying(b), summed, checksums, ahead)
    return all(bytes(left) == bytes(right) for left, right in chunks_side_by_side(a, b, _GATHERED))


def _lying(entry: TensorEntry) -> ByteRange:
    """The bytes of a tensor whose values lie in a row."""
    source, nbytes = entry.storage.source, entry.nbytes
    return (source if nbytes == source.nbytes else source.part(entry.storage_offset * entry.itemsize, nbytes)).plain()


def _same_bytes(
    a: ByteRange, b: ByteRange, summed: list[bool], checksums: Checksums, ahead: tuple[Ahead, Ahead] | None
) -> bool:
    crc = 0
    for start in range(0, a.nbytes, _COMPARED_NBYTES):
        left: bytes | bytearray
        right: bytes | bytearray
        nbytes = min(_COMPARED_NBYTES, a.nbytes - start)
        if ahead is not None:
            left, right = ahead[0].read(a), ahead[1].read(b)
        elif nbytes < _COMPARED_NBYTES:
            left, right = a.read(start, nbytes), b.read(start, nbytes)
        else:
            left, right = _buffers()
            a.file.read_into(a.offset + start, left)
            b.file.read_into(b.offset + start, right)
        if left != right:
            return False
        if True in summed:
            crc = zlib.crc32(left, crc)
    for run, is_summed in zip((a, b), summed, strict=True):
        if is_summed:
            checksums.note(run, crc)
    return True


def _buffers() -> tuple[bytearray, bytearray]:
    """The two buffers of this thread; no views, which compare slowly."""
    kept: tuple[bytearray, bytearray] | None = getattr(_kept, "buffers", None)
    if kept is None:
        kept = _kept.buffers = bytearray(_COMPARED_NBYTES), bytearray(_COMPARED_NBYTES)
    return kept


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
                    raise CorruptError(f"a tensor has {missing:,} bytes less than its shape asks for", path=self._path)
                parts.append(memoryview(part))
                missing -= len(part)
            self._chunk = memoryview(b"".join(parts)) if len(parts) > 2 or len(parts[0]) else parts[1]
        taken, self._chunk = self._chunk[:nbytes], self._chunk[nbytes:]
        return taken
