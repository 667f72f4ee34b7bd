"""The values of a tensor, in C order and little-endian, however they lie.

Only here is numpy imported, and only when a tensor is not plain bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.derived import Conversion, ConvertedRange
from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import DTypeError

__all__ = ["stream", "unconverted"]

_SIGNED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""The types of 8 bits whose first is a sign."""

_GAP_NBYTES = 8 << 10
"""Bytes between two wanted ones that take longer to read along than another read does to begin."""


def stream(
    entry: TensorEntry, converted: Callable[[Conversion, bytes, bytes], object] | None = None
) -> Iterator[bytes]:
    """The tensor's values in C order, little-endian, in bounded chunks.

    Conjugate and negative bits are carried out on the values.

    Args:
        entry: the tensor.
        converted: called for values that are converted on the way, with what they were before and after.

    Raises:
        DTypeError: values of a dtype that numpy cannot hold would have to be computed.
    """
    if entry.numel == 0:
        return
    source = entry.storage.source
    if isinstance(source, ConvertedRange):
        # Moving elements about and converting each of them commute.
        for before in stream(unconverted(replace(entry, is_neg=False), source)):
            after = source.whole.function(before)
            if converted is not None:
                converted(source.whole, before, after)
            yield _signs(after, DTYPES[entry.dtype], conj=False, neg=True) if entry.is_neg else after
        return
    if entry.is_plain_bytes:
        start = entry.storage_offset * entry.itemsize
        yield from source.part(start, entry.nbytes).chunks()
        return
    for block in _blocks(entry):
        yield from _gather(block)


def unconverted(entry: TensorEntry, source: ConvertedRange) -> TensorEntry:
    """The tensor before the values of its storage, ``source``, were converted."""
    conversion = source.whole
    original = source.original
    storage = Storage(
        key=entry.storage.key,
        dtype=conversion.dtype,
        nbytes=original.nbytes,
        location=entry.storage.location,
        source=original,
        byteorder="little",  # the conversion itself knows the byte order, and wants the bytes as they lie
    )
    return replace(entry, storage=storage, dtype=conversion.dtype)


def _blocks(entry: TensorEntry) -> Iterator[TensorEntry]:
    """The tensor cut along its leading dimensions into pieces of at most two chunks."""
    most = 2 * CHUNK_NBYTES
    if entry.nbytes <= most or not entry.shape:
        yield entry
        return
    row_nbytes = entry.nbytes // entry.shape[0]
    rows = max(1, most // row_nbytes)
    for first in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - first)
        offset = entry.storage_offset + first * entry.stride[0]
        if row_nbytes > most:
            row = replace(entry, storage_offset=offset, shape=entry.shape[1:], stride=entry.stride[1:])
            yield from _blocks(row)
        else:
            yield replace(entry, storage_offset=offset, shape=(count, *entry.shape[1:]))


def _gather(entry: TensorEntry) -> Iterator[bytes]:
    """The values, in chunks, of a piece that fits into memory and has elements."""
    import numpy

    row = DTYPES[entry.dtype]
    data = bytearray(entry.nbytes)
    # Elements are moved as opaque bytes: no value passes through a conversion.
    element = numpy.dtype((numpy.void, row.itemsize))
    dims = [(size, stride * row.itemsize) for size, stride in zip(entry.shape, entry.stride, strict=True) if size > 1]
    out = numpy.ndarray([size for size, _ in dims], element, data)
    _collect(out, entry.storage.source.plain(), entry.span()[0], [stride for _, stride in dims])
    step = max(CHUNK_NBYTES // row.itemsize, 1) * row.itemsize
    for start in range(0, len(data), step):
        values = bytes(memoryview(data)[start : start + step])
        if entry.storage.byteorder == "big":
            values = _swapped(values, row)
        if entry.is_conj or entry.is_neg:
            values = _signs(values, row, conj=entry.is_conj, neg=entry.is_neg)
        yield values


def _collect(out: Any, source: ByteRange, start: int, strides: list[int]) -> None:
    """Fill an array with elements that may be spread out widely; two chunks at a time are read.

    A file that becomes shorter meanwhile is an error here.  To touch a page of it that was mapped would be fatal.

    Args:
        out: the array; its items are bytes.
        source: what they lie in.
        start: position of the first one.
        strides: bytes from one to the next, by dimension.
    """
    import numpy

    most = 2 * CHUNK_NBYTES
    # The stride of a dimension of one element says nothing, and may be any number.
    strides = [stride if size > 1 else 0 for size, stride in zip(out.shape, strides, strict=True)]
    nbytes = out.itemsize + sum((size - 1) * stride for size, stride in zip(out.shape, strides, strict=True))
    if nbytes <= most:
        out[...] = numpy.ndarray(out.shape, out.dtype, source.read(start, nbytes), strides=strides)
        return
    axis = strides.index(max(strides))
    size, stride = out.shape[axis], strides[axis]
    one = nbytes - (size - 1) * stride
    apart = one <= most and stride - one > _GAP_NBYTES
    count = max(1, most // one if apart else (most - one) // stride + 1)
    for first in range(0, size, count):
        index = (*[slice(None)] * axis, slice(first, first + count))
        part = out[index]
        at = start + first * stride
        if not apart:
            _collect(part, source, at, strides)
            continue
        data = bytearray(part.shape[axis] * one)
        for number in range(part.shape[axis]):
            piece = memoryview(data)[number * one : (number + 1) * one]
            source.file.read_into(source.offset + at + number * stride, piece)
        part[...] = numpy.ndarray(part.shape, out.dtype, data, strides=[*strides[:axis], one, *strides[axis + 1 :]])


def _swapped(values: bytes, row: DType) -> bytes:
    """The elements with their bytes reversed; the two parts of a complex one each on its own."""
    import numpy

    width = row.itemsize // 2 if row.kind == "complex" else row.itemsize
    return numpy.frombuffer(values, dtype=f"u{width}").byteswap().tobytes()  # type: ignore[no-any-return]


def _signs(values: bytes, row: DType, *, conj: bool, neg: bool) -> bytes:
    """The values conjugated or negated, by flipping sign bits: exact for NaN and zero too."""
    import numpy

    parts = 2 if row.kind == "complex" else 1
    width = row.itemsize // parts
    if row.kind not in ("float", "complex") or (width == 1 and row.name not in _SIGNED):
        raise DTypeError(f"a lazily negated or conjugated tensor of {row.name} cannot be written out")
    bits = numpy.frombuffer(values, dtype=f"<u{width}").reshape(-1, parts).copy()
    sign = bits.dtype.type(1 << (8 * width - 1))
    if neg and row.name.endswith("fnuz"):  # what would be -0 is NaN
        bits[bits & ~sign != 0] ^= sign
    elif neg:
        bits ^= sign
    if conj and parts == 2:
        bits[:, 1] ^= sign
    return bits.tobytes()  # type: ignore[no-any-return]
