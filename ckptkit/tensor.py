"""Tensors as addresses: a `Storage` is a run of bytes in a file, a `TensorEntry` a strided view of one.

Two entries over the same `Storage` object are *shared*; two entries with the same `TensorEntry.view` of it are *tied*.

Both are immutable.  A file may have a hundred thousand of each: `storage_of` and `tensor_of` make them fastest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from operator import index
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal

from ckptkit.computed import ByteSource, DeflatedRange, DenseRange, Inflation
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, DTypeError
from ckptkit.report import count_of, human_size, printable
from ckptkit.startup import dataclass, made_by_position

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, device

__all__ = [
    "Storage",
    "TensorEntry",
    "as_tensor",
    "contiguous_stride",
    "shared_storages",
    "storage_of",
    "tensor_of",
    "tied_groups",
    "unordered",
    "unused_nbytes",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Storage:
    """A run of bytes that tensors are views of.  Its identity is its sharing: compare with ``is``.

    Attributes:
        key: its name in the file (``"0"`` for record ``data/0``, the tensor's name in safetensors).
        dtype: torch name of the element type the file declares, ``None`` for untyped bytes.
        nbytes: size in bytes.
        location: the device tag in the file: ``"cpu"``, ``"cuda:1"``.
        source: where the bytes are.
        crc32: the checksum the container recorded for exactly these bytes; ``None``: not recorded.
        byteorder: ``"little"`` or ``"big"``, of the elements.
        original: the storage of the file that these bytes are cut or converted from; ``None``: this is that storage.
    """

    key: str
    dtype: str | None
    nbytes: int
    location: str
    source: ByteSource
    crc32: int | None = None
    byteorder: Literal["little", "big"] = "little"
    original: Storage | None = None

    @property
    def originals(self) -> tuple[Storage, ...]:
        """The storages in the file that these bytes are, or are cut, converted or computed from."""
        whole = self.original or self
        if isinstance(whole.source, DenseRange):
            return tuple(
                each for part in whole.source.whole.parts if isinstance(part, Storage) for each in part.originals
            )
        return (whole,)

    def without_checksum(self) -> Storage:
        """The same bytes without a recorded checksum, so nothing checks them."""
        source = self.source
        if isinstance(source, DeflatedRange):
            whole = source.whole
            bare = Inflation(whole.deflated, whole.nbytes, None, whole.name)
            source = replace(source, whole=bare)
        elif isinstance(source, DenseRange):
            source = replace(source, whole=source.whole.without_checksums())
        return replace(self, crc32=None, source=source)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous tensor, as ``torch.empty(shape).stride()`` gives them."""
    stride = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        stride[axis] = stride[axis + 1] * max(shape[axis + 1], 1)
    return tuple(stride)


_READERS = {"numpy": "ckptkit.transfer.memory", "torch": "ckptkit.torch_bridge.handles"}
"""What reads a tensor's values, by name: a record imports neither what reads nor numpy and torch."""

Index = int | slice | EllipsisType | None
"""What picks a part of a tensor: a whole number, a slice, ``...``, and ``None`` for another dimension of size 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class TensorEntry:
    """A tensor: a strided view of a `Storage`.

    It contains no values.  `numpy` and `torch` read them each time, and only them; ``entry[1000:2000]`` is a record of
    a part and reads nothing yet.  Any number of threads may read entries of one open file.

    Attributes:
        storage: the bytes it views.
        storage_offset: first element, in elements.
        shape, stride: per dimension, in elements.
        dtype: torch name of the element type.
        requires_grad: as saved.
        is_parameter: saved as ``nn.Parameter``; ``False`` says nothing for a state_dict, whose
            parameters are saved as plain tensors.
        is_conj, is_neg: torch's lazy conjugate and negative bits.  They are not in the bytes: the
            values are the bytes' values conjugated or negated.
        subclass: inert node naming the tensor's Python class if it is neither ``torch.Tensor`` nor ``nn.Parameter``.
        attributes: inert node of Python attributes saved along with the tensor.
        effects: inert nodes of the calls that change the tensor once it is built (`ckptkit.pickling.inert.Object`).
    """

    storage: Storage
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool = False
    is_parameter: bool = False
    is_conj: bool = False
    is_neg: bool = False
    subclass: object = None
    attributes: object = None
    effects: tuple[object, ...] = ()

    def __repr__(self) -> str:
        order = "" if self.is_contiguous else f", stride {[*self.stride]}"
        place = f" on {printable(self.location[:40])}" if self.location else ""
        kind = "parameter" if self.is_parameter else "tensor"
        return f"<{kind} {self.dtype} {[*self.shape]!s:.80}{order:.40}, {human_size(self.nbytes)}{place:.60}>"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when written out contiguously."""
        row, numel = DTYPES[self.dtype], math.prod(self.shape)
        return -(-numel * row.bits // 8) if row.bits else numel * row.itemsize

    @property
    def location(self) -> str:
        """Device tag of its storage."""
        return self.storage.location

    @property
    def view(self) -> tuple[object, ...]:
        """What decides its values: entries with equal views are tied.

        Its one member is text, whose hash is salted: a tuple of the numbers, which come from a
        stranger, could be made to collide with 100,000 others.
        """
        numbers = f"{id(self.storage)} {self.storage_offset} {self.shape} {self.stride}"
        return (f"{numbers} {self.dtype} {self.is_conj} {self.is_neg}",)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements are in C order without gaps, as in ``torch.Tensor.is_contiguous``."""
        shape, stride, expected = self.shape, self.stride, 1
        if 0 in shape:
            return True
        for axis in range(len(shape) - 1, -1, -1):
            size = shape[axis]
            if size != 1:
                if stride[axis] != expected:
                    return False
                expected *= size
        return True

    @property
    def is_plain_bytes(self) -> bool:
        """Whether the storage's bytes are exactly the tensor's values in C order, little-endian."""
        return (
            self.is_contiguous
            and not self.is_conj
            and not self.is_neg
            and (self.storage.byteorder == "little" or self.itemsize == 1)
        )

    @property
    def form(self) -> str:
        """How its bytes differ from `is_plain_bytes`, in words."""
        if not self.is_contiguous:
            return "not contiguous"
        return "stored conjugated or negated" if self.is_conj or self.is_neg else "big-endian"

    @property
    def covers_storage(self) -> bool:
        """Whether it is the whole storage, contiguously."""
        return self.storage_offset == 0 and self.is_contiguous and self.nbytes == self.storage.nbytes

    def span(self) -> tuple[int, int]:
        """First byte and the byte after the last that the view touches, within its storage.

        An empty tensor touches nothing: both are equal.
        """
        start = self.storage_offset * self.itemsize
        if self.numel == 0:
            return start, start
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return start, start + DTYPES[self.dtype].nbytes(last + 1)

    def numpy(self) -> NDArray[Any]:
        """The values, read from the file.

        Only the bytes between the first and the last element are read, in several reads if they are far apart. bfloat16
        and the 8-bit types are those of the package ``ml_dtypes``.  Conjugated and negated values are computed.  A
        checksum in the file is checked if its whole storage is read.

        Returns:
            A writable array with its own memory in this machine's byte order; its strides are those of the file if
            there are no gaps between the elements.  Repeated elements (a stride of 0, overlapping rows) are repeated in
            the array too, as with ``numpy.broadcast_to``, and it is read-only.

        Raises:
            DTypeError: numpy has no such dtype; `torch` returns the values.
            UnsupportedError: numpy does not support so many dimensions or such large sizes.
            FileAccessError: the file was closed, or cannot be read.
            CorruptError: it was changed or became shorter, or its checksum shows damage.
        """
        values: NDArray[Any] = _reader("numpy")(self)
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """For ``numpy.asarray(entry)`` and every numpy function that accepts arrays: as `numpy`."""
        if copy is False:
            raise ValueError("the values of a tensor in a file are read again each time; there is nothing to share")
        values = self.numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def torch(self, *, device: str | device | None = "cpu") -> Tensor:
        """The values, read from the file as `numpy` does; imports torch.

        Args:
            device: where the tensor goes; ``None``: the device recorded in the file.

        Returns:
            A tensor with its own memory, an ``nn.Parameter`` if it was saved as one.  If elements are repeated, it is
            an expanded tensor.

        Raises:
            MissingDependencyError: torch is not installed.
            DTypeError: the installed torch has no such dtype.
            RewriteError: this machine lacks the device.
            FileAccessError, CorruptError: as `numpy`.
        """
        values: Tensor = _reader("torch")(self, device)
        return values

    def __getitem__(self, part: Index | tuple[Index, ...]) -> TensorEntry:
        """The record of a part, selected by numpy's basic indexing; nothing is read.

        It is a plain tensor, whatever the whole was saved as: not a parameter, and without gradient.

        Raises:
            IndexError: it is out of range or not such an index; steps must be positive, as in torch.
            DTypeError: elements smaller than a byte cannot be selected.
        """
        offset, shape, stride = _picked(self, part if isinstance(part, tuple) else (part,))
        return replace(
            self, storage_offset=offset, shape=shape, stride=stride, requires_grad=False, is_parameter=False,
            subclass=None, attributes=None, effects=(),
        )  # fmt: skip

    def __iter__(self) -> Iterator[TensorEntry]:
        """The record of each row."""
        if not self.shape:
            raise TypeError("a tensor without dimensions has no rows")
        return (self[row] for row in range(self.shape[0]))

    def check(self) -> TensorEntry:
        """Check that the entry is inside its storage, and return it.

        Raises:
            CorruptError: a negative size, stride or offset, sizes and strides of different length,
                or a view that reaches past its storage.
        """
        what = f"tensor over storage {self.storage.key!r}"
        if len(self.shape) != len(self.stride):
            raise CorruptError(f"{what}: shape {self.shape} and stride {self.stride} differ in length")
        if min(self.shape, default=0) < 0 or min(self.stride, default=0) < 0 or self.storage_offset < 0:
            raise CorruptError(
                f"{what}: shape {self.shape}, stride {self.stride}, offset {self.storage_offset}: none may be negative"
            )
        if self.numel >= 1 << 62:
            raise CorruptError(f"{what}: shape {self.shape} has more elements than torch can count (62 bits)")
        end = self.span()[1]
        if end > self.storage.nbytes and self.numel:
            raise CorruptError(
                f"{what}: shape {self.shape}, stride {self.stride}, offset {self.storage_offset} of {self.dtype} "
                f"reach to byte {end:,} of a storage of {count_of(self.storage.nbytes, 'byte')}"
            )
        return self


def _reader(name: str) -> Callable[..., Any]:
    reader: Callable[..., Any] = import_module(_READERS[name]).read
    return reader


def _picked(entry: TensorEntry, items: tuple[Index, ...]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, sizes and strides of what indices pick of a tensor.

    Raises:
        As `TensorEntry.__getitem__`.
    """
    offset, shape, stride, axis = entry.storage_offset, list[int](), list[int](), 0
    # Compared by identity: an array would compare its elements.
    known = sum(item is not None and item is not Ellipsis for item in items)
    several = sum(item is Ellipsis for item in items) > 1
    if known > len(entry.shape) or several:
        said = "has more than one ..." if several else f"has {count_of(known, 'dimension')}"
        raise IndexError(f"the index {said}; the tensor has shape {entry.shape}")
    rest = [slice(None)] * (len(entry.shape) - known)
    at = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    for item in (*items[:at], *rest, *items[at + 1 :]):
        if item is None:
            shape.append(1)
            stride.append(1)
            continue
        size, step = entry.shape[axis], entry.stride[axis]
        if isinstance(item, slice):
            picked = range(*item.indices(size))
            if picked.step < 0:
                raise IndexError(
                    f"a step of {picked.step}: records are read forward; reverse the values after reading them"
                )
            offset += picked.start * step if picked else 0
            shape.append(len(picked))
            stride.append(step * picked.step if len(picked) > 1 else step)
        else:
            try:
                number = index("" if isinstance(item, bool) else item)  # type: ignore[arg-type]
            except TypeError:
                raise IndexError(
                    f"{item!r:.60} is of type {type(item).__name__}; whole numbers, slices, ... and None select a "
                    "part; for anything else read the tensor first: entry.numpy()[...]"
                ) from None
            if not -size <= number < size:
                raise IndexError(f"index {number} is out of range for dimension {axis} of size {size}")
            offset += number % size * step
        axis += 1
    if DTYPES[entry.dtype].bits and (offset, tuple(shape)) != (entry.storage_offset, entry.shape):
        raise DTypeError(f"elements of {entry.dtype} are smaller than a byte, so no part can be selected")
    return offset, tuple(shape), tuple(stride)


storage_of = made_by_position(Storage)
"""A `Storage` of its fields by position."""

tensor_of = made_by_position(TensorEntry)
"""A `TensorEntry` of its fields by position."""


def as_tensor(node: TensorEntry | Storage, *, typed: bool = False) -> TensorEntry:
    """A bare storage as the tensor of its bytes, or of elements of the type that it declares; a tensor unchanged."""
    if isinstance(node, TensorEntry):
        return node
    dtype = (node.dtype if typed else None) or "uint8"
    count = node.nbytes // DTYPES[dtype].itemsize
    return TensorEntry(storage=node, storage_offset=0, shape=(count,), stride=(1,), dtype=dtype)


def shared_storages(entries: Iterable[TensorEntry]) -> set[int]:
    """The ``id`` of each storage that several of the entries use: only these can be tied or shared."""
    storages = [id(entry.storage) for entry in entries]
    if len(set(storages)) == len(storages):  # as in most files
        return set()
    return {storage for storage, count in Counter(storages).items() if count > 1}


def tied_groups(entries: Mapping[str, TensorEntry]) -> list[list[str]]:
    """The names of each tensor that has several, in the order of these.

    Tied is the same view (`TensorEntry.view`) of the same storage; tensors without elements are not.
    """
    several = shared_storages(entries.values())
    if not several:
        return []
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, entry in entries.items():
        if id(entry.storage) in several and entry.nbytes:
            groups.setdefault(entry.view, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def unordered(entries: Mapping[str, TensorEntry]) -> list[str]:
    """The names of the tensors whose elements are not in C order; see `TensorEntry.is_contiguous`."""
    geometries = {(entry.shape, entry.stride): entry for entry in entries.values()}
    moved = {geometry for geometry, entry in geometries.items() if not entry.is_contiguous}
    return [name for name, entry in entries.items() if (entry.shape, entry.stride) in moved] if moved else []


def unused_nbytes(entries: Iterable[TensorEntry], whole: Iterable[Storage] = ()) -> int:
    """Bytes of the tensors' storages that none of them touches.

    Args:
        entries: the tensors; which storages are counted, they say.
        whole: storages that are used whole all the same.
    """
    used = set(map(id, whole))
    extents: dict[int, list[tuple[int, int]]] = {}
    sizes: dict[int, int] = {}
    for entry in entries:
        key, nbytes = id(entry.storage), entry.storage.nbytes
        if entry.nbytes == nbytes and 0 not in entry.stride:  # as nearly all are
            used.add(key)
        elif key not in used:
            sizes[key] = nbytes
            extents.setdefault(key, []).append(entry.span())
    unused = 0
    for key, spans in extents.items():
        if key not in used:
            covered = end = 0
            for start, stop in sorted(spans):
                covered += max(0, stop - max(start, end))
                end = max(end, stop)
            unused += sizes[key] - covered
    return unused
