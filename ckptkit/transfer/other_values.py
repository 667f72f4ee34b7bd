"""What numpy is needed for in values that are no plain tensors: to hold indices against sizes, and to make arrays.

torch believes a file's indices: one of 10^9 in a sparse tensor of 4 x 4 ends the process, or reads what lies there.
The rules are those of ``torch/csrc`` and ATen (``_validate_sparse_coo_tensor_args``,
``_validate_compressed_sparse_indices``), which are not applied to what is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ckptkit.casting import numpy_dtype
from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError
from ckptkit.pickling import arrays
from ckptkit.pickling.layouts import Jagged, Layout, Nested, Sparse, compressed_counts
from ckptkit.transfer.values import stream

__all__ = ["array_from", "check_indices", "values_of"]


def values_of(entry: TensorEntry) -> Any:
    """A tensor of whole numbers as an array, read from its file.

    Raises:
        CorruptError: it has more elements than its bytes are, which no index has a reason for.
    """
    import numpy

    if entry.nbytes > entry.storage.nbytes:
        raise CorruptError(f"indices of shape {entry.shape} in {entry.storage.nbytes:,} bytes repeat themselves")

    data = b"".join(stream(entry))
    return numpy.frombuffer(data, numpy.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)


def check_indices(layout: Layout, values: Callable[[TensorEntry], Any] = values_of) -> None:
    """Hold the indices and offsets of a tensor against its sizes; others have none.

    Args:
        layout: the tensor.
        values: gives the array of an entry; default: its bytes are read.

    Raises:
        CorruptError: one lies outside, or they are not in order where torch relies on it.
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
        raise CorruptError("a sparse tensor that is said to be coalesced has indices twice, or not in order")


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
                f"the compressed indices of a {tensor.layout} tensor do not go from 0 to {row.size} in steps of 0 to "
                f"{count}"
            )
        first = numpy.zeros(row.size, bool)
        first[steps[:-1][lengths > 0]] = True
        if ((numpy.diff(row) <= 0) & ~first[1:]).any():
            raise CorruptError(f"the plain indices of a {tensor.layout} tensor are twice there, or not in order")


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
        raise CorruptError("the lengths of a nested tensor are not those between its offsets")


def _require_within(indices: Any, size: int, where: str) -> None:
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise CorruptError(f"index {low if low < 0 else high} of a sparse tensor in {where}, whose size is {size}")


def array_from(layout: arrays.Layout) -> Any:
    """The array, or the number, that a pickle of numpy's holds.

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
            f"an array of numpy's of shape {list(layout.shape or ())} and type {code} has "
            f"{len(data):,} bytes, not {count * dtype.itemsize:,}"
        )
    flat = numpy.frombuffer(data, dtype) if dtype.itemsize else numpy.zeros(count, dtype)
    flat = flat.astype(dtype.newbyteorder("="))  # a copy, that may be written to
    if layout.shape is None:
        return flat[0]
    return flat.reshape(layout.shape, order="F" if layout.is_fortran else "C")
