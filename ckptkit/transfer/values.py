"""The values of a tensor, in C order and little-endian, however they lie.

Only here is numpy imported, and only when a tensor is not plain bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.derived import Conversion, ConvertedRange
from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import CorruptError, DTypeError

__all__ = ["stream", "unconverted"]


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
        yield _gather(block)


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
    """The tensor cut along its leading dimensions into pieces of at most a chunk."""
    if entry.nbytes <= CHUNK_NBYTES or not entry.shape:
        yield entry
        return
    row_nbytes = entry.nbytes // entry.shape[0]
    rows = 1 if row_nbytes > CHUNK_NBYTES else max(1, CHUNK_NBYTES // row_nbytes)
    for first in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - first)
        offset = entry.storage_offset + first * entry.stride[0]
        if rows == 1 and row_nbytes > CHUNK_NBYTES:
            row = replace(entry, storage_offset=offset, shape=entry.shape[1:], stride=entry.stride[1:])
            yield from _blocks(row)
        else:
            yield replace(entry, storage_offset=offset, shape=(count, *entry.shape[1:]))


def _gather(entry: TensorEntry) -> bytes:
    """The values of a piece that fits into memory and has elements."""
    import numpy

    row = DTYPES[entry.dtype]
    start, end = entry.span()
    with _window(entry.storage.source.plain(), start, end) as raw:
        # The stride of a dimension of one element says nothing, and may be any number.
        strides = tuple(
            step * row.itemsize if size > 1 else 0 for size, step in zip(entry.shape, entry.stride, strict=True)
        )
        # Elements are moved as opaque bytes: no value passes through a conversion.
        element = numpy.dtype((numpy.void, row.itemsize))
        view = numpy.ndarray(entry.shape, element, buffer=raw, strides=strides)
        values: bytes = view.tobytes()
        del view
    if entry.storage.byteorder == "big":
        values = _swapped(values, row)
    if entry.is_conj or entry.is_neg:
        values = _signs(values, row, conj=entry.is_conj, neg=entry.is_neg)
    return values


@contextlib.contextmanager
def _window(source: ByteRange, start: int, end: int) -> Iterator[Any]:
    """The bytes [start, end) of a range: read where they are few, mapped where they are spread out."""
    if end - start <= 4 * CHUNK_NBYTES:
        yield source.read(start, end - start)
        return
    import mmap

    first = source.offset + start
    base = first - first % mmap.ALLOCATIONGRANULARITY
    if source.file.changed():  # to touch a page past the end of a shortened file is fatal
        raise CorruptError("the file was changed while it was being converted", path=source.file.path)
    with mmap.mmap(source.file.fd, source.offset + end - base, access=mmap.ACCESS_READ, offset=base) as mapped:
        view = memoryview(mapped)[first - base :]
        try:
            yield view
        finally:
            view.release()


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
    if row.kind not in ("float", "complex") or width == 1:  # not every 8-bit format has a sign bit or -0
        raise DTypeError(f"a lazily negated or conjugated tensor of {row.name} cannot be written out")
    bits = numpy.frombuffer(values, dtype=f"<u{width}").reshape(-1, parts).copy()
    sign = bits.dtype.type(1 << (8 * width - 1))
    if neg:
        bits ^= sign
    if conj and parts == 2:
        bits[:, 1] ^= sign
    return bits.tobytes()  # type: ignore[no-any-return]
