"""The values of a tensor, in C order and little-endian, however they are stored.

Only here is numpy imported, and only when a tensor is not plain bytes.

What numpy is needed for in values that are not plain tensors: to hold indices against sizes, and to make arrays.

torch believes a file's indices: an index of 10^9 in a 4 x 4 sparse tensor ends the process, or reads whatever is there.
The rules are those of ``torch/csrc`` and ATen (``_validate_sparse_coo_tensor_args``,
``_validate_compressed_sparse_indices``), which torch does not apply when loading.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, GAP_NBYTES, ByteRange, Source
from ckptkit.casting import numpy_dtype
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.computed import ByteSource, ConvertedRange, DeflatedRange, DTypeConversion
from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import CorruptError, DTypeError
from ckptkit.pickling import arrays
from ckptkit.pickling.layouts import Jagged, Layout, Nested, Sparse, compressed_counts

__all__ = [
    "SMALL_NBYTES", "Ahead", "array_from", "check_indices", "lying_in", "same_values", "stream", "unconverted",
    "values_of", "will_read",
]  # fmt: skip

SMALL_NBYTES = 16 << 10
"""Bytes below which reading a tensor along with its neighbors is faster than a separate call."""

_AHEAD_NBYTES = 4 << 10, 256 << 10
"""Bytes read after a jump, and the most that are read along: both sides of a comparison fit into a core's own cache."""

_SIGNED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""The types of 8 bits whose first is a sign."""


class Ahead:
    """Small ranges of files, read along with what follows them: a hundred thousand tensors take a few hundred reads.

    While each range begins where the last read ended, or a little later, the next read is twice as long.
    """

    __slots__ = ("_data", "_file", "_most", "_start")

    def __init__(self) -> None:
        self._file: Source | None = None
        self._start = 0
        self._data = b""
        self._most = 0

    def read(self, run: ByteRange) -> bytes:
        """The bytes of a range.

        Raises:
            As `Source.read`.
        """
        file, offset, nbytes = run.file, run.offset, run.nbytes
        at = offset - self._start
        if file is not self._file or at < 0 or at + nbytes > len(self._data):
            first, most = _AHEAD_NBYTES
            follows = file is self._file and 0 <= at <= len(self._data) + first
            self._most = min(2 * self._most, most) if follows else first
            self._data = file.read(offset, max(nbytes, min(self._most, file.size - offset)))
            self._file, self._start, at = file, offset, 0
        return self._data[at : at + nbytes]


def lying_in(value: TensorEntry | Storage | ByteSource) -> Iterator[ByteRange]:
    """The ranges of files that values are read from; the positions of pieces are read for it."""
    source = value.storage.source if isinstance(value, TensorEntry) else value
    source = source.source if isinstance(source, Storage) else source
    if isinstance(value, TensorEntry):
        start, end = value.span()
        source = source if end - start == source.nbytes else source.part(start, end - start)
    if isinstance(source, ConvertedRange):
        yield from lying_in(source.original)
    elif isinstance(source, DeflatedRange):
        yield source.whole.deflated
    elif isinstance(source, ByteRange):
        yield source
    else:
        for part in source.whole.parts:
            yield from lying_in(part) if isinstance(part, Storage) else ()


Along = Callable[[Source], Callable[[int, memoryview], object]]
"""Gives what is to see the bytes of a file as they come (`Checksums.along_file`)."""


def will_read(values: Iterable[TensorEntry | Storage | ByteSource], along: Along | None = None) -> bool:
    """Announce to remote sources what is about to be read, in about this order; see `Source.will_read`.

    Returns: Whether one is remote.
    """
    if "ckptkit.remote.source" not in sys.modules:  # no source is far, and to look at each value takes time
        return False
    areas: dict[int, tuple[Source, list[tuple[int, int]]]] = {}
    for value in values:
        for run in lying_in(value):
            if run.file.is_far:
                areas.setdefault(id(run.file), (run.file, []))[1].append((run.offset, run.nbytes))
    for file, wanted in areas.values():
        file.will_read(wanted, None if along is None else along(file))
    return bool(areas)


def stream(
    entry: TensorEntry, converted: Callable[[DTypeConversion, bytes, bytes], object] | None = None
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


def same_values(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors of one dtype and shape have the same bits in C order."""
    right = b""
    others = stream(b)
    for left in stream(a):
        while len(right) < len(left):
            part = next(others, b"")
            if not part:
                return False
            right += part
        if right[: len(left)] != left:
            return False
        right = right[len(left) :]
    return not right and not any(others)


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
        byteorder="little",  # the conversion itself knows the byte order, and needs the stored bytes
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

    A file that becomes shorter in the meantime is an error here.  To touch a page of it that was mapped would be fatal.

    Args:
        out: the array; its items are bytes.
        source: of the bytes.
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
    apart = one <= most and stride - one > GAP_NBYTES
    count = max(1, most // one if apart else (most - one) // stride + 1)
    for first in range(0, size, count):
        index = (*[slice(None)] * axis, slice(first, first + count))
        part = out[index]
        at = start + first * stride
        if not apart:
            _collect(part, source, at, strides)
            continue
        rows = [(source.offset + at + number * stride, one) for number in range(part.shape[axis])]
        data = b"".join(source.file.ranges(rows))
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


def values_of(entry: TensorEntry) -> Any:
    """A tensor of whole numbers as an array, read from its file.

    Raises:
        CorruptError: it has more elements than its bytes are, which no index has a reason for.
    """
    import numpy

    if entry.nbytes > entry.storage.nbytes:
        raise CorruptError(f"indices of shape {entry.shape} in {entry.storage.nbytes:,} bytes overlap in storage")

    data = b"".join(stream(entry))
    return numpy.frombuffer(data, numpy.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)


def check_indices(layout: Layout, values: Callable[[TensorEntry], Any] = values_of) -> None:
    """Hold the indices and offsets of a tensor against its sizes; others have none.

    Args:
        layout: the tensor.
        values: gives the array of an entry; default: its bytes are read.

    Raises:
        CorruptError: one is outside, or they are not in order where torch relies on it.
    """
    if isinstance(layout, Sparse):
        if layout.layout == "sparse_coo":
            _check_coo(layout, values(layout.indices[0]))
        else:
            _check_compressed(layout, values(layout.indices[0]), values(layout.indices[1]))
    elif isinstance(layout, Nested):
        _check_nested(layout, values(layout.sizes), values(layout.strides), values(layout.offsets))
    elif isinstance(layout, Jagged):
        lengths = None if layout.lengths is None else values(layout.lengths)
        _check_jagged(layout, values(layout.offsets), lengths)


def _check_coo(tensor: Sparse, indices: Any) -> None:
    import numpy

    for axis, row in enumerate(indices):
        _require_within(row, tensor.size[axis], f"dimension {axis}")
    if not tensor.is_coalesced or indices.shape[1] < 2:
        return
    before, after = indices[:, :-1], indices[:, 1:]
    smaller, equal = numpy.zeros(before.shape[1], bool), numpy.ones(before.shape[1], bool)
    for left, right in zip(before, after, strict=True):
        smaller |= equal & (left < right)
        equal &= left == right
    if not smaller.all():
        raise CorruptError("a sparse tensor marked as coalesced has duplicate or unordered indices")


def _check_compressed(tensor: Sparse, compressed: Any, plain: Any) -> None:
    import numpy

    _, count = compressed_counts(tensor)
    _require_within(plain, count, "its plain dimension")
    rows = math.prod(compressed.shape[:-1])
    pairs = zip(compressed.reshape(rows, compressed.shape[-1]), plain.reshape(rows, plain.shape[-1]), strict=True)
    for steps, row in pairs:
        is_within = steps[0] == 0 and steps[-1] == row.size and (steps >= 0).all() and (steps <= row.size).all()
        lengths = numpy.diff(steps)
        if not is_within or ((lengths < 0) | (lengths > count)).any():
            raise CorruptError(
                f"the compressed indices of a {tensor.layout} tensor do not rise from 0 to {row.size} in steps of 0 "
                f"to {count}"
            )
        first = numpy.zeros(row.size, bool)
        first[steps[:-1][lengths > 0]] = True
        if ((numpy.diff(row) <= 0) & ~first[1:]).any():
            raise CorruptError(f"the plain indices of a {tensor.layout} tensor are duplicated or not in order")


def _check_nested(tensor: Nested, sizes: Any, strides: Any, offsets: Any) -> None:
    for size, stride, offset in zip(sizes.tolist(), strides.tolist(), offsets.tolist(), strict=True):
        reach = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else offset
        if min([*size, *stride, offset], default=0) < 0 or reach > tensor.buffer.numel:
            raise CorruptError(
                f"size {size}, stride {stride}, offset {offset} of a nested tensor reach outside its buffer of "
                f"{tensor.buffer.numel} elements"
            )


def _check_jagged(tensor: Jagged, offsets: Any, lengths: Any) -> None:
    import numpy

    most = tensor.values.shape[tensor.ragged_idx - 1]
    is_within = bool((offsets >= 0).all() and (offsets <= most).all())
    steps = numpy.diff(offsets)
    if not is_within or (steps < 0).any():
        raise CorruptError(f"the offsets of a nested tensor do not rise from 0 to {most}")
    if lengths is not None and ((lengths < 0).any() or (lengths > steps).any()):
        raise CorruptError("the lengths of a nested tensor do not match its offsets")


def _require_within(indices: Any, size: int, where: str) -> None:
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise CorruptError(f"index {low if low < 0 else high} of a sparse tensor in {where}, whose size is {size}")


def array_from(layout: arrays.ArrayLayout) -> Any:
    """The array or number in a numpy pickle.

    Args:
        layout: it, and it is plain.

    Raises:
        CorruptError: its bytes are not as many as its shape says.
    """
    import numpy

    code, data = layout.code, layout.data or b""
    dtype = numpy_dtype(code) if code in DTYPES else numpy.dtype(code)
    if layout.swapped:
        dtype = dtype.newbyteorder(">")
    count = math.prod(layout.shape or ())
    if count * dtype.itemsize != len(data):
        raise CorruptError(
            f"a numpy array of shape {list(layout.shape or ())} and type {code} has "
            f"{len(data):,} bytes, not {count * dtype.itemsize:,}"
        )
    flat = numpy.frombuffer(data, dtype) if dtype.itemsize else numpy.zeros(count, dtype)
    flat = flat.astype(dtype.newbyteorder("="))  # a copy, that may be written to
    if layout.shape is None:
        return flat[0]
    return flat.reshape(layout.shape, order="F" if layout.is_fortran else "C")
