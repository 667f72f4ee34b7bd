"""A tensor in pieces: several boxes, each a separate tensor in some file, that make up one whole.

Processes share tensors in such pieces: a rank's slice along a dimension, a box of a mesh of several, a run of a flat
buffer.  The whole is one plain tensor whose bytes are made as they are read (`ckptkit.computed.DenseRange`), so
everything above treats it like any other.  Pieces that are runs of the whole's bytes are copied directly
(`PiecedValues.copies`); others are gathered row by row, in bounded blocks.

Only the place of a piece may be known at first; its content is then read when its values are first needed.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import Storage, TensorEntry, contiguous_stride
from ckptkit.computed import DenseRange, DenseValues, Held, files_of, is_made, read_into
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, LimitError, UnsupportedError
from ckptkit.report import count_of

__all__ = ["Piece", "PiecedValues", "pieced"]

_COPIED_NBYTES = 64 << 10
"""Bytes of a run from which on a separate copy is cheaper than gathering it with others."""

_MOST_PAIRS = 4_000_000
"""Pairs of pieces that are compared if no dimension separates them."""

_Box = tuple[tuple[int, ...], tuple[int, ...]]


class Piece(NamedTuple):
    """A box of a tensor.

    Attributes:
        offsets, sizes: its place in the whole and its size, in elements, by dimension.
        local: the tensor that it is, of exactly these sizes; or what reads that, called once.
        where: what messages call it: the file, the rank.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: TensorEntry | Callable[[], TensorEntry]
    where: str = ""


class PiecedValues(DenseValues):
    """The values of a tensor in pieces, in C order, little-endian.

    Args:
        name: of the tensor, for messages.
        shape: of the whole.
        dtype: torch name of the elements' type.
        pieces: which cover it once.
        files: the sources that they are in.
    """

    __slots__ = ("_dtype", "_first_rows", "_locals", "_pieces", "_read_lock", "_shape", "_tallest")

    how = "in pieces"
    is_gathered = True

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, pieces: Sequence[Piece], files: tuple[Source, ...]
    ) -> None:
        itemsize = DTYPES[dtype].itemsize
        super().__init__(self._made, math.prod(shape), itemsize, (), files, f"tensor {name!r:.200}")
        self._shape = shape
        self._dtype = dtype
        self._pieces = sorted((piece for piece in pieces if 0 not in piece.sizes), key=itemgetter(0))
        self._first_rows = [piece.offsets[0] for piece in self._pieces] if shape else []
        self._tallest = max((piece.sizes[0] for piece in self._pieces), default=0) if shape else 0
        self._locals: dict[int, TensorEntry] = {}
        self._read_lock = threading.Lock()

    @property
    def parts(self) -> tuple[object, ...]:
        """The storages that the pieces are in; those that were not read yet are."""
        found = (self._local(number).storage for number in range(len(self._pieces)))
        return tuple({id(storage): storage for storage in found}.values())

    @parts.setter
    def parts(self, value: tuple[object, ...]) -> None:
        """The arguments of `DenseValues`; the pieces identify them."""

    @property
    def is_known(self) -> bool:
        """Whether every piece was read, so that `parts` reads nothing."""
        return all(isinstance(piece.local, TensorEntry) for piece in self._pieces) or len(self._locals) == len(
            self._pieces
        )

    def _local(self, number: int) -> TensorEntry:
        """The tensor of a piece.

        Raises:
            CorruptError: it is not of the sizes and the dtype that the whole says.
        """
        piece = self._pieces[number]
        if isinstance(piece.local, TensorEntry):
            return piece.local
        found = self._locals.get(number)
        if found is None:
            with self._read_lock:
                found = self._locals.get(number)
                if found is None:
                    found = self._locals[number] = _fitting(piece.local(), piece, self._dtype, self.name)
        return found

    def without_checksums(self) -> PiecedValues:
        """As `DenseValues.without_checksums`; pieces that were not read yet are without, too, once they are."""
        pieces = [
            piece._replace(
                local=_bare(piece.local) if isinstance(piece.local, TensorEntry) else partial(_read_bare, piece.local)
            )
            for piece in self._pieces
        ]
        made = PiecedValues("", self._shape, self._dtype, pieces, self.files)
        made.name = self.name
        return made

    def copies(self, offset: int, nbytes: int) -> list[tuple[int, ByteRange]] | None:
        """The bytes of a range as runs of files, each with where in the range it begins; ``None``: they are gathered.

        Args:
            offset: of the range, in bytes of the whole.
            nbytes: of the range.
        """
        found: list[tuple[int, ByteRange]] = []
        for number, piece in enumerate(self._pieces):
            entry = self._local(number)
            if not entry.is_plain_bytes or is_made(entry.storage.source):
                return None
            runs, run_nbytes = self._runs(piece)
            if run_nbytes < _COPIED_NBYTES and runs > 1:
                return None
            source = entry.storage.source.plain().part(entry.storage_offset * self.itemsize, entry.nbytes)
            for run, begin in enumerate(self._begins(piece)):
                start, stop = max(begin, offset), min(begin + run_nbytes, offset + nbytes)
                if start < stop:
                    found.append((start - offset, source.part(run * run_nbytes + start - begin, stop - start)))
        return sorted(found, key=itemgetter(0))

    def _runs(self, piece: Piece) -> tuple[int, int]:
        """How many runs of the whole's bytes a piece is, and the bytes of each."""
        axis = _run_axis(piece.sizes, self._shape)
        return math.prod(piece.sizes[:axis]), math.prod(piece.sizes[axis:]) * self.itemsize

    def _begins(self, piece: Piece) -> Iterator[int]:
        """The first byte in the whole of each of its runs, in order."""
        axis = _run_axis(piece.sizes, self._shape)
        stride = contiguous_stride(self._shape)
        first = sum(at * step for at, step in zip(piece.offsets, stride, strict=True))
        index = [0] * axis
        while True:
            yield (first + sum(at * step for at, step in zip(index, stride, strict=False))) * self.itemsize
            for dim in reversed(range(axis)):
                index[dim] += 1
                if index[dim] < piece.sizes[dim]:
                    break
                index[dim] = 0
            else:
                return

    def fill(self, offset: int, out: memoryview) -> None:
        """As `DenseValues.fill`, from the pieces straight into the buffer."""
        width = self.itemsize
        first, end = offset // width, -(-(offset + len(out)) // width)
        if first * width == offset and end * width == offset + len(out):
            self._fill(first, end, out)
        else:
            whole = self._made(first, end - first)
            out[:] = whole[offset - first * width :][: len(out)]

    def _made(self, first: int, count: int) -> bytes:
        data = bytearray(count * self.itemsize)
        self._fill(first, first + count, memoryview(data))
        return bytes(data)

    def _fill(self, first: int, end: int, out: memoryview) -> None:
        for (offsets, sizes), begin in _boxes(first, end, self._shape):
            nbytes = math.prod(sizes) * self.itemsize
            start = (begin - first) * self.itemsize
            self._fill_box(offsets, sizes, out[start : start + nbytes])

    def _fill_box(self, offsets: tuple[int, ...], sizes: tuple[int, ...], out: memoryview) -> None:
        """Fill a box of the whole that is one run of its bytes."""
        for number in self._near(offsets, sizes):
            piece = self._pieces[number]
            low = [max(a, b) for a, b in zip(offsets, piece.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offsets, sizes, piece.offsets, piece.sizes, strict=True)
            ]  # fmt: skip
            common = tuple(max(b - a, 0) for a, b in zip(low, high, strict=True))
            if 0 in common:
                continue
            local = self._local(number)
            part = _part(local, tuple(a - b for a, b in zip(low, piece.offsets, strict=True)), common)
            at = tuple(a - b for a, b in zip(low, offsets, strict=True))
            axis = _run_axis(common, sizes)
            if math.prod(common[:axis]) == 1:  # one run there too
                start = sum(a * s for a, s in zip(at, contiguous_stride(sizes), strict=True)) * self.itemsize
                _read(part, out[start : start + part.nbytes])
            else:
                self._scatter(part, at, sizes, out)

    def _near(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Sequence[int]:
        """The pieces that may overlap a box, by their place along the first dimension."""
        if not offsets:
            return range(len(self._pieces))
        first = bisect_left(self._first_rows, offsets[0] - self._tallest + 1)
        return range(first, bisect_left(self._first_rows, offsets[0] + sizes[0]))

    def _scatter(self, part: TensorEntry, at: tuple[int, ...], sizes: tuple[int, ...], out: memoryview) -> None:
        """Put the rows of a part where they belong in a box."""
        import numpy

        element = numpy.dtype((numpy.void, self.itemsize))
        target: Any = numpy.ndarray(sizes, element, out)[
            tuple(slice(a, a + n) for a, n in zip(at, part.shape, strict=True))
        ]
        values = bytearray(part.nbytes)
        _read(part, memoryview(values))
        target[...] = numpy.ndarray(part.shape, element, values)


def pieced(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    pieces: Sequence[Piece],
    *,
    view: tuple[int, ...] | None = None,
    files: Sequence[Source] | None = None,
    key: str | None = None,
    location: str | None = None,
    requires_grad: bool = False,
    is_parameter: bool = False,
) -> TensorEntry:
    """The plain tensor that pieces make up.

    Args:
        name: of the tensor, for messages.
        shape: that the pieces are in.
        dtype: torch name of the elements' type.
        pieces: the boxes; each element is in exactly one.
        view: the tensor's own shape, with the same number of elements; ``None``: that of the pieces.
        files: their sources; needed if some pieces were not read yet.
        key: of its storage; ``None``: its name.
        location: device tag; ``None``: that of the first piece, or ``"cpu"``.
        requires_grad: as in `TensorEntry`.
        is_parameter: as in `TensorEntry`.

    Raises:
        CorruptError: a piece reaches outside, is of other sizes or of another dtype than it should be; two have
            elements in common; or they leave some out.
        UnsupportedError: elements that are smaller than a byte are in several pieces.
    """
    for piece in pieces:
        if isinstance(piece.local, TensorEntry):
            _fitting(piece.local, piece, dtype, f"tensor {name!r:.200}")
    require_cover(name, shape, [piece[:2] for piece in pieces])
    if DTYPES[dtype].bits and len(pieces) > 1:
        raise UnsupportedError(
            f"tensor {name!r:.200}: elements of {dtype} are smaller than a byte, and it is in pieces"
        )
    known = [piece.local for piece in pieces if isinstance(piece.local, TensorEntry)]
    if files is None:
        found = {id(file): file for entry in known for file in files_of(entry.storage.source)}
        files = tuple(found.values())
    values = PiecedValues(name, shape, dtype, pieces, tuple(files) or (Held(b"", name),))
    storage = Storage(
        key=name if key is None else key,
        dtype=dtype if DTYPES[dtype].storage_class else None,
        nbytes=values.nbytes,
        location=location or (known[0].location if known else "cpu"),
        source=DenseRange(values, 0, values.nbytes),
    )
    own = shape if view is None else view
    if math.prod(own) != math.prod(shape):
        raise CorruptError(
            f"tensor {name!r:.200}: shape {own} has a different number of elements than its pieces, {shape}"
        )
    return TensorEntry(
        storage=storage,
        storage_offset=0,
        shape=own,
        stride=contiguous_stride(own),
        dtype=dtype,
        requires_grad=requires_grad,
        is_parameter=is_parameter,
    )


def require_cover(name: str, shape: tuple[int, ...], boxes: Sequence[_Box]) -> None:
    """See that boxes are inside a whole, have nothing in common, and leave nothing out.

    Args:
        name: of the tensor, for messages.
        shape: of the whole.
        boxes: offsets and sizes of each.

    Raises:
        CorruptError: they do not.
        LimitError: they are too many to separate.
    """
    what, total = f"tensor {name!r:.200} of shape {[*shape]}", 0
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise CorruptError(
                f"{what}: a piece at {[*offsets]} of sizes {[*sizes]} has a different number of dimensions"
            )
        volume = 1
        for offset, size, limit in zip(offsets, sizes, shape, strict=True):
            if offset < 0 or size < 0 or offset + size > limit:
                raise CorruptError(f"{what}: a piece at {[*offsets]} of sizes {[*sizes]} reaches outside")
            volume *= size
        total += volume
    wanted = math.prod(shape)
    if total < wanted:
        raise CorruptError(f"{what}: its pieces leave out {count_of(wanted - total, 'element')} of {wanted:,}")
    both = _overlap([box for box in boxes if 0 not in box[1]], len(shape), what)
    if both is not None:
        (first, sizes), (second, others) = both
        raise CorruptError(
            f"{what}: the pieces at {[*first]} of sizes {[*sizes]} and at {[*second]} of sizes {[*others]} overlap"
        )


def _overlap(boxes: list[_Box], dims: int, what: str) -> tuple[_Box, _Box] | None:
    """Two boxes with an element in common; ``None``: there are none.

    They are split along each dimension in turn if some are wholly before all others, as those of meshes are.
    """
    stack = [(boxes, 0, 0)]
    while stack:
        group, axis, tried = stack.pop()
        if len(group) < 2:
            continue
        if tried == dims:  # no dimension tells them apart
            if len(group) * (len(group) - 1) // 2 > _MOST_PAIRS:
                raise LimitError(f"pairs of pieces of {what}", limit=_MOST_PAIRS, actual=len(group) ** 2 // 2)
            both = next((pair for pair in _pairs(group) if _meet(*pair)), None)
            if both is not None:
                return both
            continue
        group.sort(key=lambda box: box[0][axis])
        groups: list[list[_Box]] = []
        end = -1
        for box in group:
            if box[0][axis] >= end:
                groups.append([])
            groups[-1].append(box)
            end = max(end, box[0][axis] + box[1][axis])
        following = (axis + 1) % dims
        stack += [(part, following, tried + 1 if len(groups) == 1 else 1) for part in groups]
    return None


def _pairs(group: list[_Box]) -> Iterator[tuple[_Box, _Box]]:
    return ((group[i], group[j]) for i in range(len(group)) for j in range(i + 1, len(group)))


def _meet(a: _Box, b: _Box) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a[0], a[1], b[0], b[1], strict=True))


def _fitting(entry: TensorEntry, piece: Piece, dtype: str, what: str) -> TensorEntry:
    """A piece's tensor, once it is known to be what it should be.

    Raises:
        CorruptError: it is not.
    """
    if entry.shape != piece.sizes or entry.dtype != dtype:
        where = f" in {piece.where}" if piece.where else ""
        raise CorruptError(
            f"{what}: its piece{where} at {[*piece.offsets]} is {entry.dtype} {[*entry.shape]}, "
            f"not {dtype} {[*piece.sizes]}"
        )
    return entry


def _bare(entry: TensorEntry) -> TensorEntry:
    return replace(entry, storage=entry.storage.without_checksum())


def _read_bare(read: Callable[[], TensorEntry]) -> TensorEntry:
    return _bare(read())


def _part(entry: TensorEntry, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> TensorEntry:
    """The record of a box of a tensor."""
    if sizes == entry.shape:
        return entry
    offset = entry.storage_offset + sum(at * step for at, step in zip(offsets, entry.stride, strict=True))
    return replace(entry, storage_offset=offset, shape=sizes)


def _read(entry: TensorEntry, out: memoryview) -> None:
    """Fill a buffer with a tensor's values in C order, little-endian."""
    if entry.is_plain_bytes:
        read_into(entry.storage.source.part(entry.storage_offset * entry.itemsize, entry.nbytes), out)
        return
    from ckptkit.transfer.values import stream

    at = 0
    for chunk in stream(entry):
        out[at : at + len(chunk)] = chunk
        at += len(chunk)


def _run_axis(sizes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The dimension from which on a box of a whole is one run: it has all of the whole's elements after that."""
    axis = len(shape)
    while axis and sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    return max(axis - 1, 0)


def _boxes(first: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[_Box, int]]:
    """The elements from one to another, in C order, as boxes that are runs, each with its first element."""
    if first >= end:
        return
    if not shape:
        yield ((), ()), first
        return
    size = math.prod(shape[1:])
    low, high = -(-first // size), end // size
    if low > high or (low == high and first // size == (end - 1) // size and (first % size or end % size)):
        row = first // size  # inside one row
        for (offsets, sizes), at in _boxes(first - row * size, end - row * size, shape[1:]):
            yield ((row, *offsets), (1, *sizes)), at + row * size
        return
    if first < low * size:
        yield from _boxes(first, low * size, shape)
    if low < high:
        yield ((low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])), low * size
    if high * size < end:
        yield from _boxes(high * size, end, shape)
