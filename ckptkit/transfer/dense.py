"""Dense values of tensors that are computed from others: sparse, nested, quantized, block-scaled; as torch makes them.

Only a block of the values is in memory, with its parts, and for a sparse tensor the rows' beginnings.

- Sparse (``to_dense()``): zeros, to which each value is added in its place, in the stored order and with each sum
  rounded; so -0.0 becomes 0.0, and duplicates are added up.
- Nested (``to_padded_tensor(0)``): each tensor in the corner of a box that fits the largest, zeros after it.
- Quantized (``dequantize()``, ATen's ``AffineQuantizerBase.cpp`` and ``QuantizedOpKernels.cpp``; values are float32):
  ``(number - zero point) * scale``, where the difference is one of whole numbers of 32 bits and the scale a float32.
  Per channel the product is one of float64, rounded once; with zero points in float32 everything is float32.
- Scaled by blocks (torchao's ``dequantize_affine`` and ``dequantize_affine_float8``, DeepSeek's ``weight_dequant``):
  the same in float32; difference and product are rounded to the dtype of the values if that is narrower.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES
from ckptkit.casting import caster, numpy_dtype
from ckptkit.checkpoint import Storage, TensorEntry, contiguous_stride
from ckptkit.computed import DenseRange, DenseValues, files_of
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError
from ckptkit.normalize.not_plain import Form, Scaled
from ckptkit.pickling.layouts import PACKED, Jagged, Nested, Quantized, Sparse
from ckptkit.transfer.values import check_indices, stream, values_of

__all__ = ["dense_entry"]

_SPARSE_NBYTES = 16 << 20
"""Bytes of a block of a sparse tensor's values: everything stored may have to be searched for each."""

_LOOKED = 1 << 16
"""Stored values that are examined together."""

_WIDE_NBYTES = 1 << 20
"""Bytes of one stored value, with its dense dimensions, above which it is read in parts."""


def dense_entry(form: Form, name: str) -> tuple[TensorEntry, int]:
    """The tensor of dense values that a form makes, before any is computed; and the bytes by which it may grow.

    Args:
        form: its parts; the indices of nested tensors are read, because their sizes are in the bytes.
        name: of the tensor, for messages.

    Raises:
        CorruptError: the parts of a nested tensor do not fit each other.
    """
    made: Any
    block_nbytes = CHUNK_NBYTES
    if isinstance(form, Sparse):
        made, shape, dtype, block_nbytes = _SparseValues(form, name), form.size, form.values.dtype, _SPARSE_NBYTES
        parts = (*form.indices, form.values)
    elif isinstance(form, (Nested, Jagged)):
        made = _NestedValues(form, name)
        shape, dtype, parts = made.shape, made.buffer.dtype, tuple(made.parts)
    else:
        made = _ScaledValues(form)
        shape, dtype, parts = form.numbers.shape, made.dtype, tuple(made.parts)
    row, numel = DTYPES[dtype], math.prod(shape)
    storages = tuple({id(part.storage): part.storage for part in parts}.values())
    files = {id(file): file for storage in storages for file in files_of(storage.source)}
    values = DenseValues(
        made, numel, row.itemsize, storages, tuple(files.values()), f"tensor {name!r:.200}", block_nbytes
    )
    stored = sum(storage.nbytes for storage in storages)
    is_repeated = isinstance(form, (Quantized, Scaled)) and form.numbers.nbytes > form.numbers.storage.nbytes
    grows = is_repeated or not isinstance(form, (Quantized, Scaled))
    storage = Storage(
        key=f"dense:{name}",
        dtype=dtype if row.storage_class else None,
        nbytes=values.nbytes,
        location=parts[-1].location if isinstance(form, Sparse) else parts[0].location,
        source=DenseRange(values, 0, values.nbytes),
    )
    entry = TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype=dtype)
    return entry, max(values.nbytes - stored, 0) if grows else 0


def flat(entry: TensorEntry, first: int, count: int) -> bytes:
    """The bytes of ``count`` elements of a tensor from element ``first`` on, in C order, little-endian."""
    if count <= 0:
        return b""
    if entry.is_plain_bytes:
        return entry.storage.source.part((entry.storage_offset + first) * entry.itemsize, count * entry.itemsize).read()
    if not entry.shape or count == entry.numel:
        return b"".join(stream(entry))
    size = math.prod(entry.shape[1:])
    (begin, skipped), (end, more) = divmod(first, size), divmod(first + count, size)

    def rows(start: int, stop: int) -> TensorEntry:
        offset = entry.storage_offset + start * entry.stride[0]
        return replace(entry, storage_offset=offset, shape=(stop - start, *entry.shape[1:]))

    def within(number: int) -> TensorEntry:
        return replace(rows(number, number + 1), shape=entry.shape[1:], stride=entry.stride[1:])

    if begin == end:
        return flat(within(begin), skipped, count)
    head = flat(within(begin), skipped, size - skipped) if skipped else b""
    whole = b"".join(stream(rows(begin + bool(skipped), end)))
    return head + whole + (flat(within(end), 0, more) if more else b"")


def _array(data: bytes, dtype: str) -> Any:
    import numpy

    return numpy.frombuffer(data, numpy_dtype(dtype).newbyteorder("<"))


def _widened(data: bytes, dtype: str) -> Any:
    """Floating values, or whole numbers, as float32."""
    import numpy

    if not DTYPES[dtype].is_floating:
        return _array(data, dtype).astype(numpy.float32)
    return _array(data if dtype == "float32" else caster(dtype, "float32")(data), "float32")


def _rounded(values: Any, dtype: str) -> bytes:
    """float32 values as bytes of a dtype."""
    data: bytes = values.astype("<f4", copy=False).tobytes()
    return data if dtype == "float32" else caster("float32", dtype)(data)


# Scales.


class _ScaledValues:
    """Numbers times the scale of their block."""

    def __init__(self, form: Quantized | Scaled) -> None:
        self._form = form
        self.numbers = form.numbers
        self._scales: Any = form.scales
        self._zeros: Any = form.zero_points
        shape = self.numbers.shape
        if isinstance(form, Scaled):
            self.dtype, block = form.dtype, form.block
        else:
            self.dtype = "float32"
            block = tuple(1 if axis == form.axis else max(size, 1) for axis, size in enumerate(shape))
        self._block = block or (1,)
        self._shape = shape or (1,)
        self._grid = tuple(-(-size // of) for size, of in zip(self._shape, self._block, strict=True))
        self.parts = [part for part in (self.numbers, self._scales, self._zeros) if isinstance(part, TensorEntry)]

    def __call__(self, first: int, count: int) -> bytes:
        width, end, made = self._shape[-1], first + count, []
        while first < end:
            row, column = divmod(first, width)
            whole = (end - first) // width * width if not column else 0
            some = whole or min(end - first, width - column)
            made.append(self._box(first, row, max(some // width, 1), column, some if not whole else width))
            first += some
        return b"".join(made)

    def _box(self, first: int, row: int, rows: int, column: int, columns: int) -> bytes:
        """The values of a part of consecutive rows: all of their columns, or of one row some."""
        import numpy

        numbers = self._numbers(first, rows * columns).reshape(rows, columns)
        lead = numpy.unravel_index(numpy.arange(row, row + rows), self._shape[:-1]) if self._shape[:-1] else ()
        above = [index // of for index, of in zip(lead, self._block, strict=False)]
        of_row = numpy.zeros(rows, numpy.int64)
        for index, size in zip(above, self._grid, strict=False):
            of_row = of_row * size + index
        low, side = int(of_row.min()), self._block[-1]
        places = of_row - low, (column // side, (column + columns - 1) // side + 1), int(of_row.max()) + 1 - low

        def spread(part: Any) -> Any:
            """The scales or zero points of these values."""
            if not isinstance(part, (TensorEntry, tuple)):
                return part
            (start, stop), wide = places[1], self._grid[-1]
            held = self._held(part, low * wide, places[2] * wide).reshape(-1, wide)[places[0], start:stop]
            if stop - start == 1:
                return held
            return numpy.repeat(held, side, axis=1)[:, column % side : column % side + columns]

        with numpy.errstate(all="ignore"):
            return self._values(numbers, spread(self._scales), spread(self._zeros))

    def _held(self, part: TensorEntry | tuple[float, ...], first: int, count: int) -> Any:
        """Some of the scales or zero points, ready for arithmetic."""
        import numpy

        if not isinstance(part, TensorEntry):
            return numpy.array(part[first : first + count])
        data = flat(part, first, count)
        if not isinstance(self._form, Scaled):
            return _array(data, part.dtype)
        values = _widened(data, part.dtype)
        return self._narrowed(values) if part is self._zeros else values

    def _numbers(self, first: int, count: int) -> Any:
        """The numbers, ready for arithmetic: packed ones unpacked."""
        import numpy

        per_byte = PACKED.get(self.numbers.dtype)
        if per_byte is None:
            data = flat(self.numbers, first, count)
            kind = {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}.get(self.numbers.dtype, self.numbers.dtype)
            return _widened(data, kind) if isinstance(self._form, Scaled) else _array(data, kind)
        at = self.numbers.storage_offset + first
        begin, end = at // per_byte, -(-(at + count) // per_byte)
        packed = _array(self.numbers.storage.source.part(begin, end - begin).read(), "uint8")
        bits = 8 // per_byte
        shifts = numpy.arange(per_byte, dtype=numpy.uint8) * bits
        numbers = (packed[:, None] >> shifts) & ((1 << bits) - 1)
        return numbers.reshape(-1)[at - begin * per_byte :][:count]

    def _values(self, numbers: Any, scales: Any, zeros: Any) -> bytes:
        import numpy

        form, single = self._form, numpy.float32
        if isinstance(form, Scaled):
            less = numbers if zeros is None else self._narrowed(numbers - zeros)
            return _rounded(less * scales, form.dtype)
        if form.axis is None:
            whole = numbers.astype(numpy.int32) - numpy.array(int(zeros), numpy.int32)
            return _rounded(whole.astype(single) * single(scales), "float32")
        less = numbers.astype(single) - zeros.astype(single)
        if zeros.dtype.kind == "f":
            return _rounded(less * scales.astype(single), "float32")
        return _rounded((less.astype(numpy.float64) * scales.astype(numpy.float64)).astype(single), "float32")

    def _narrowed(self, values: Any) -> Any:
        """float32 values rounded to the dtype of those that are made."""
        if self.dtype == "float32":
            return values
        return _widened(_rounded(values, self.dtype), self.dtype).reshape(values.shape)


# Sparse.


class _SparseValues:
    """Zeros with the stored values added in their places.

    A *cell* is a place in the sparse dimensions; dense ones are inside it.  A stored value of a blocked layout has
    several cells.
    """

    def __init__(self, form: Sparse, name: str) -> None:
        self._form = form
        self._name = name
        self._lock = threading.Lock()
        self._table: list[tuple[int, int]] | None = None
        self._steps: Any = None
        self._is_coo = form.layout == "sparse_coo"
        self._high, self._wide = 1, 1
        if self._is_coo:
            sparse, self._stored = form.indices[0].shape
            if not sparse and form.values.nbytes > form.values.storage.nbytes:  # no index bounds their number
                raise CorruptError(f"tensor {name!r:.200}: its values overlap in storage")
        else:
            batch = len(form.indices[0].shape) - 1
            sparse, self._stored = batch + 2, form.indices[1].numel
            if form.layout in ("sparse_bsr", "sparse_bsc"):
                self._high, self._wide = form.values.shape[batch + 1 : batch + 3]
        self._size, self._inner = form.size[:sparse], math.prod(form.size[sparse:])
        self._cells = self._high * self._wide
        nbytes = self._cells * self._inner * form.values.itemsize
        self._step = max(min(_LOOKED, CHUNK_NBYTES // max(nbytes, 1)), 1)

    def __call__(self, first: int, count: int) -> bytes:
        import numpy

        form, inner = self._form, self._inner
        if self._inner * form.values.itemsize > _WIDE_NBYTES:
            return self._wide_cells(first, count)
        begin, end = first // inner, -(-(first + count) // inner)
        out = numpy.zeros((end - begin, inner), numpy_dtype(form.values.dtype))
        add = numpy.logical_or if form.values.dtype == "bool" else numpy.add
        for start, stop in self._near(begin, end):
            cells = self._places(start, stop)
            per = self._cells * inner
            values = _array(flat(form.values, start * per, (stop - start) * per), form.values.dtype)
            inside = (cells >= begin) & (cells < end)
            with numpy.errstate(all="ignore"):
                add.at(out, cells[inside] - begin, values.reshape(-1, inner)[inside])
        return out.reshape(-1)[first - begin * inner :][:count].tobytes()

    def _wide_cells(self, first: int, count: int) -> bytes:
        """The same if a cell has many elements, of which only the needed ones are read."""
        import numpy

        inner, values, last = self._inner, self._form.values, first + count
        out = numpy.zeros(count, numpy_dtype(values.dtype))
        add = numpy.logical_or if values.dtype == "bool" else numpy.add
        for start, stop in self._near(first // inner, -(-last // inner)):
            for number, cell in enumerate(self._places(start, stop).tolist()):
                low, high = max(cell * inner, first), min((cell + 1) * inner, last)
                if low < high:
                    at = (start * self._cells + number) * inner + low - cell * inner
                    part = out[low - first : high - first]
                    with numpy.errstate(all="ignore"):
                        add(part, _array(flat(values, at, high - low), values.dtype), out=part)
        return out.tobytes()

    def _near(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs of stored values some of which may be in these cells."""
        with self._lock:
            if self._table is None:
                self._table = self._checked()
            table = self._table
        for number, (low, high) in enumerate(table):
            if low < end and high >= begin:
                start = number * self._step
                yield start, min(start + self._step, self._stored)

    def _checked(self) -> list[tuple[int, int]]:
        """The first and last cell of each run of stored values, once all indices are known to be inside.

        Raises:
            CorruptError: they do not.
        """
        try:
            check_indices(self._form)
        except CorruptError as error:
            file = self._form.values.storage.source.file
            raise error.at(path=file.path, where=f"tensor {self._name!r:.200}") from None
        if not self._is_coo:
            steps = values_of(self._form.indices[0])
            self._steps = steps.reshape(-1, steps.shape[-1])
        table = []
        for start in range(0, self._stored, self._step):
            cells = self._places(start, min(start + self._step, self._stored))
            table.append((int(cells.min()), int(cells.max())) if cells.size else (0, -1))
        return table

    def _places(self, start: int, stop: int) -> Any:
        """The cells of stored values, in their order: a number each, counted in C order."""
        import numpy

        if self._is_coo:
            cells = numpy.zeros(stop - start, numpy.int64)
            for axis, size in enumerate(self._size):
                data = flat(self._form.indices[0], axis * self._stored + start, stop - start)
                cells = cells * size + _array(data, "int64")
            return cells
        plain = _array(flat(self._form.indices[1], start, stop - start), self._form.indices[1].dtype).astype(
            numpy.int64
        )
        each = self._form.indices[1].shape[-1]
        batches, within = numpy.divmod(numpy.arange(start, stop), each)
        compressed = numpy.empty(stop - start, numpy.int64)
        for batch in range(start // each, (stop - 1) // each + 1):
            chosen = batches == batch
            compressed[chosen] = numpy.searchsorted(self._steps[batch], within[chosen], side="right") - 1
        by_row = self._form.layout in ("sparse_csr", "sparse_bsr")
        row, column = (compressed, plain) if by_row else (plain, compressed)
        rows, columns = self._size[-2:]
        first = (batches * rows + row * self._high) * columns + column * self._wide
        inside = numpy.arange(self._high)[:, None] * columns + numpy.arange(self._wide)
        return (first[:, None] + inside.reshape(-1)).reshape(-1)


# Nested.


class _NestedValues:
    """Tensors of different sizes, each in the corner of its box."""

    def __init__(self, form: Nested | Jagged, name: str) -> None:
        import numpy

        self.buffer = form.buffer if isinstance(form, Nested) else form.values
        self.parts = [
            self.buffer,
            *(part for part in form if isinstance(part, TensorEntry) and part is not self.buffer),
        ]
        try:
            check_indices(form)
        except CorruptError as error:
            raise error.at(path=self.buffer.storage.source.file.path, where=f"tensor {name!r:.200}") from None
        if isinstance(form, Nested):
            self._sizes, self._strides = values_of(form.sizes), values_of(form.strides)
            self._offsets = values_of(form.offsets)
        else:
            offsets, axis = values_of(form.offsets).astype(numpy.int64), form.ragged_idx - 1
            lengths = numpy.diff(offsets) if form.lengths is None else values_of(form.lengths)
            stride = contiguous_stride(self.buffer.shape)
            self._sizes = numpy.tile(numpy.array(self.buffer.shape, numpy.int64), (len(lengths), 1))
            self._sizes[:, axis] = lengths
            self._strides = numpy.tile(numpy.array(stride, numpy.int64), (len(lengths), 1))
            self._offsets = offsets[:-1] * stride[axis]
        largest = self._sizes.max(axis=0) if len(self._sizes) else numpy.zeros(self._sizes.shape[1], numpy.int64)
        self.shape = (len(self._sizes), *(int(size) for size in largest))

    def __call__(self, first: int, count: int) -> bytes:
        import numpy

        width = self.buffer.itemsize
        out = numpy.zeros(count, numpy.dtype((numpy.void, width)))
        number, *index = numpy.unravel_index(numpy.arange(first, first + count), self.shape)
        inside = numpy.ones(count, bool)
        places = self._offsets[number]
        for axis, at in enumerate(index):
            inside &= at < self._sizes[number, axis]
            places = places + at * self._strides[number, axis]
        places = places[inside]
        if places.size:
            low, high = int(places.min()), int(places.max())
            data = flat(self.buffer, low, high + 1 - low)
            out[inside] = numpy.frombuffer(data, out.dtype)[places - low]
        return out.tobytes()
