"""Tensors in memory: reads tensors into it, and makes checkpoints from it.

`read` is `TensorEntry.numpy`.  `least` says how much memory it needs: elements of a part that are close together are
read with those between them; those far apart are gathered, so a column of a table does not take the memory of the
table. Elements that are repeated (expanded tensors, whose sizes a stranger may choose) are read once.

`Memory` is a source whose bytes are in the memory of arrays and tensors, one run after another; they are read in place,
when they are needed.  `checkpoint_of` makes a checkpoint of a state over it: what `ckptkit.save` writes.
"""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, Source
from ckptkit.casting import numpy_dtype
from ckptkit.checkpoint import (
    STATE_DICT,
    Checkpoint,
    Origin,
    StateDict,
    Storage,
    TensorEntry,
    contiguous_stride,
)
from ckptkit.computed import ByteSource, ConvertedRange, DTypeConversion
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, CorruptError, DTypeError, RewriteError, UnsupportedError
from ckptkit.normalize import RawCheckpoint, normalize
from ckptkit.pickling.inert import Global, InertDict, Object, attributes, mapping_items
from ckptkit.report import listed
from ckptkit.transfer.checksums import SUMMED_NBYTES, Checksums
from ckptkit.transfer.values import stream
from ckptkit.transfer.workers import in_parallel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Memory", "checkpoint_of", "fill", "least", "memory_at", "read"]

_READ_NBYTES = 1 << 20
"""Bytes of one read that are summed while they are in a core's own cache."""


def read(entry: TensorEntry) -> NDArray[Any]:
    """The values of a tensor; see `TensorEntry.numpy`."""
    if DTYPES[entry.dtype].numpy is None:
        raise DTypeError(f"numpy has no dtype {entry.dtype}; entry.torch() returns its values")
    import numpy

    lying, strides = least(entry)
    data = numpy.empty(lying.nbytes, numpy.uint8)
    fill(data.data, lying)
    dtype, row = numpy_dtype(entry.dtype), DTYPES[entry.dtype]
    if sys.byteorder == "big":
        data = data.view(f"u{row.itemsize // (2 if row.kind == 'complex' else 1)}").byteswap().view(numpy.uint8)
    # The stride of a dimension of one element says nothing, and may be any number.
    steps = [(step if n > 1 else 1) * row.itemsize for n, step in zip(entry.shape, strides, strict=True)]
    try:
        values: NDArray[Any] = numpy.ndarray(entry.shape, dtype, data, 0, steps)
    except (ValueError, OverflowError) as error:
        raise UnsupportedError(f"numpy cannot hold a tensor of shape {entry.shape}: {error}") from None
    values.flags.writeable = entry.numel <= lying.numel
    return values


def least(entry: TensorEntry) -> tuple[TensorEntry, tuple[int, ...]]:
    """The part of a tensor that has to be in memory, and the tensor's layout there.

    Returns:
        The tensor whose values, in C order, are that memory; and the strides of the whole in it, in elements.
    """
    if not entry.numel:
        return replace(entry, shape=(0,), stride=(1,)), contiguous_stride(entry.shape)
    shape = tuple(size if step else 1 for size, step in zip(entry.shape, entry.stride, strict=True))
    core = replace(entry, shape=shape)
    start, end = core.span()
    steps = entry.stride
    if core.nbytes < end - start:  # there is something between
        steps = contiguous_stride(shape)
    elif not core.is_contiguous:
        core = replace(core, shape=((end - start) // entry.itemsize,), stride=(1,))
    return core, tuple(step if old else 0 for step, old in zip(steps, entry.stride, strict=True))


def fill(memory: memoryview, entry: TensorEntry) -> None:
    """Fill memory of the right size with a tensor's values, in C order, little-endian.

    If they are all bytes of a storage of the file, its recorded checksum is checked.

    Raises:
        FileAccessError, CorruptError: as `TensorEntry.numpy`.
    """
    storage, sums = entry.storage, Checksums()
    source = storage.source
    original = source.original if isinstance(source, ConvertedRange) else source
    if entry.covers_storage and original.nbytes == (storage.original or storage).nbytes:
        sums.want([storage])
    if isinstance(source, ConvertedRange) or not entry.is_plain_bytes:
        passing = sums.passing(original) if isinstance(original, ByteRange) and entry.covers_storage else None

        def convert(_: DTypeConversion, before: bytes, __: bytes) -> None:
            if passing is not None:
                passing.update(before)

        at = 0
        for chunk in stream(entry, convert):
            memory[at : at + len(chunk)] = chunk
            at += len(chunk)
    elif entry.nbytes:
        run = source.plain().part(entry.storage_offset * entry.itemsize, entry.nbytes)
        pieces = [run.part(at, min(SUMMED_NBYTES, run.nbytes - at)) for at in range(0, run.nbytes, SUMMED_NBYTES)]
        tasks = (
            partial(_read_into, memory[piece.offset - run.offset :][: piece.nbytes], piece, sums) for piece in pieces
        )
        in_parallel(tasks, nbytes=run.nbytes)
    sums.require(lambda: dict.fromkeys(map(id, storage.originals), "a tensor"))
    if entry.nbytes:
        _require_unchanged(original)


def _require_unchanged(source: ByteSource) -> None:
    """Raise if the file has been replaced; a remote file is always the one that was opened.

    Delayed checks around these bytes are made.
    """
    file = source.file
    if file.is_far and isinstance(source, ByteRange):
        file.settle([(source.offset, 0), (source.offset + source.nbytes, 0)])
    elif file.changed():
        raise CorruptError("the file was changed while it was being read; read it again", path=file.path)


def _read_into(memory: memoryview, run: ByteRange, sums: Checksums) -> None:
    """Read a range, summed on the way if a checksum must be checked."""
    passing = sums.passing(run) if sums.wanted else None
    step = SUMMED_NBYTES if run.file.is_far else _READ_NBYTES
    for start in range(0, run.nbytes, step):
        piece = memory[start : start + step]
        run.file.read_into(run.offset + start, piece)
        if passing is not None:
            passing.update(piece)


# The other way: values in memory, as bytes of a file.

_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_READABLE, _WRITABLE = 0x100, 0x200
"""``PyBUF_READ`` and ``PyBUF_WRITE``."""


def memory_at(address: int, nbytes: int, *, writable: bool = False) -> memoryview:
    """Bytes at an address of this process; the caller keeps them there."""
    view: memoryview = _memory_at(address, nbytes, _WRITABLE if writable else _READABLE)
    return view


Piece = Callable[[int, int], "bytes | memoryview"]
"""Gives so many bytes from a position of a run."""


class Memory(Source):
    """Runs of bytes in memory, one after another, as a file would have them.

    Their owner is kept alive; not writing to them in the meantime is up to the owner.

    Args:
        path: what messages call it.
    """

    __slots__ = ("_kept", "_runs", "_starts")

    def __init__(self, path: str) -> None:
        super().__init__(path, 0)
        self._starts: list[int] = []
        self._runs: list[Piece] = []
        self._kept: list[object] = []

    def add(self, nbytes: int, run: Piece, owner: object) -> ByteRange:
        """Take a run of bytes.

        Args:
            nbytes: how many.
            run: gives some of them, at most a chunk.
            owner: of the bytes.
        """
        place = ByteRange(self, self.size, nbytes)
        if nbytes:
            self._starts.append(self.size)
            self._runs.append(run)
            self.size += nbytes
        self._kept.append(owner)
        return place

    def add_at(self, address: int, nbytes: int, owner: object) -> ByteRange:
        """Take bytes at an address of this machine's memory, which ``owner`` keeps there."""
        view = memory_at(address, nbytes) if nbytes else memoryview(b"")
        return self.add(nbytes, lambda start, count: view[start : start + count], owner)

    def _run(self, offset: int, nbytes: int) -> bytes | memoryview:
        at = bisect_right(self._starts, offset) - 1
        end = self._starts[at + 1] if at + 1 < len(self._starts) else self.size
        return self._runs[at](offset - self._starts[at], min(nbytes, end - offset, CHUNK_NBYTES))

    def _some(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._run(offset, nbytes))

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`, without allocating memory."""
        view = memoryview(buffer)
        if offset < 0 or offset + len(view) > self.size or self._closed:
            self.read(offset, len(view))  # raises
        while view:
            part = self._run(offset, len(view))
            view[: len(part)] = part
            view, offset = view[len(part) :], offset + len(part)


class Storages:
    """The storages of a state, each once: what shares memory shares one.

    Args:
        memory: takes their bytes.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._known: dict[object, Storage] = {}

    def get(self, key: object, dtype: str, take: Callable[[], ByteRange], location: str = "cpu") -> Storage:
        """The storage with a key; if there is none, one of the bytes that ``take`` returns."""
        if key not in self._known:
            source = take()
            declared = dtype if DTYPES[dtype].storage_class else None
            self._known[key] = Storage(
                key=str(len(self._known)), dtype=declared, nbytes=source.nbytes, location=location, source=source,
                byteorder=sys.byteorder,
            )  # fmt: skip
        return self._known[key]


def _array_entry(array: Any, storages: Storages) -> TensorEntry:
    """An array of numpy as a tensor over its own memory; arrays over the same memory share a storage.

    Layouts that torch's strides cannot express (a negative stride, unaligned elements, the other byte order) are put in
    C order, and in this machine's, as they are read.

    Raises:
        DTypeError: torch has no such dtype.
    """
    name = _torch_name(array.dtype)
    size, memory = array.dtype.itemsize, storages.memory
    whole = array
    while type(whole.base) is type(whole):
        whole = whole.base
    if not (whole.flags.c_contiguous or whole.flags.f_contiguous):
        whole = array
    start = whole.__array_interface__["data"][0]
    offset, apart = divmod(array.__array_interface__["data"][0] - start, size)
    stride = tuple(step // size for step in array.strides)
    lies = array.dtype.isnative and not apart and offset >= 0 and all(s >= 0 and not s % size for s in array.strides)
    if lies and (whole is not array or array.flags.c_contiguous or array.flags.f_contiguous):
        key = (start, whole.nbytes) if whole.nbytes else id(whole)
        storage = storages.get(key, name, lambda: memory.add_at(start, whole.nbytes, whole))
    else:
        native = array.dtype.newbyteorder("=")

        def piece(begin: int, count: int) -> bytes:
            first, last = begin // size, -(-(begin + count) // size)
            values: bytes = array.flat[first:last].astype(native).tobytes()
            return values[begin - first * size :][:count]

        storage = storages.get(id(array), name, lambda: memory.add(array.nbytes, piece, array))
        offset, stride = 0, contiguous_stride(array.shape)
    return TensorEntry(storage=storage, storage_offset=offset, shape=array.shape, stride=stride, dtype=name).check()


def _torch_name(dtype: Any) -> str:
    """The name that torch has for a dtype of numpy or of ml_dtypes'.

    Raises:
        DTypeError: torch has none.
    """
    name = str(dtype.name)
    row = DTYPES.get(name)
    if row is None or (row.numpy or "").rpartition(".")[2] != name:
        raise DTypeError(f"torch has no dtype for numpy's {dtype.str if dtype.kind in 'USVOMm' else name}")
    return name


Tensors = Callable[[object, Storages], object]
"""Makes nodes of torch objects: for tensors their `TensorEntry`, for sizes, devices and dtypes their form in a pickle;
``None`` for anything else.  Of a tensor that is not a plain one it raises an error that says why."""

_MOST_DEPTH = 100
"""Containers inside one another that are written: as many as are read back."""


class _Tree:
    """Makes nodes of values; what is one object is one node.

    Attributes:
        problems: values that cannot be saved, and why.
    """

    def __init__(self, storages: Storages, tensors: Tensors) -> None:
        self._storages = storages
        self._tensors = tensors
        self._made: dict[int, tuple[object, object]] = {}  # the value is kept so that its id stays taken
        self._arrays: tuple[type, ...] = ()
        if numpy := sys.modules.get("numpy"):  # whoever has an array has imported it
            self._arrays = numpy.ndarray, numpy.memmap
        self.problems: dict[str, str] = {}

    def node(self, value: Any, place: str, depth: int = 0) -> object:
        """The node of a value, which is at ``place``."""
        if type(value) in (type(None), bool, int, float, str, bytes, bytearray):
            return value
        if id(value) not in self._made:
            try:
                made = self._container(value, place, depth)
                made = self._leaf(value) if made is None else made
            except CkptkitError as error:
                self.problems.setdefault(place or "the state itself", str(error))
                made = None
            self._made[id(value)] = value, made
        return self._made[id(value)][1]

    def _leaf(self, value: object) -> object:
        if isinstance(value, TensorEntry):  # of an open checkpoint
            return value
        if type(value) in self._arrays:
            return _array_entry(value, self._storages)
        found = self._tensors(value, self._storages)
        if found is None:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            remedy = "; save its state_dict()" if hasattr(value, "state_dict") else ""
            if isinstance(value, Mapping):
                remedy = "; dict(...) makes it a plain dict"
            elif name.startswith("numpy.") and hasattr(value, "filled"):
                remedy = "; .filled() makes it a plain one"
            elif self._arrays and isinstance(value, self._arrays):
                remedy = "; numpy.asarray(...) makes it a plain one"
            elif name.startswith("numpy.") and hasattr(value, "item"):
                remedy = "; .item() makes it a plain one"
            raise UnsupportedError(f"of class {name}{remedy}")
        return found

    def _container(self, value: Any, place: str, depth: int) -> object:
        """The node of a list, dict and the like; ``None``: it is not one."""
        kind = type(value)
        if kind not in (list, tuple, set, dict, OrderedDict, Counter):
            return None
        if depth >= _MOST_DEPTH:
            raise UnsupportedError(f"nested more than {_MOST_DEPTH} levels deep")

        def below(key: object, part: object) -> object:
            return self.node(part, f"{place}.{key!s:.100}" if place else f"{key!s:.200}", depth + 1)

        if kind is tuple:
            return tuple([below(number, part) for number, part in enumerate(value)])
        if kind is set:
            members = [below("member", part) for part in sorted(value, key=repr)]
            return Object("reduce", Global("__builtin__", "set"), (members,))  # as pickles of torch's protocol say it
        node: Any = [] if kind is list else InertDict() if kind is dict else _ordered()
        self._made[id(value)] = value, node  # before its content, which may refer back
        if kind is list:
            node.extend([below(number, part) for number, part in enumerate(value)])
            return node
        pairs = [(below(key, key), below(key, part)) for key, part in value.items()]
        if kind is Counter:
            node.cls, node.args = Global("collections", "Counter"), (InertDict(pairs),)
            return node
        node.pairs = pairs
        if kind is OrderedDict and vars(value):
            node.state = InertDict([(key, below(key, part)) for key, part in vars(value).items()])
        return node


def _ordered() -> Object:
    return Object("reduce", Global("collections", "OrderedDict"), ())


def checkpoint_of(
    state: object, memory: Memory, tensors: Tensors, format_name: str, *, alone: str | None
) -> Checkpoint:
    """Values in memory as a checkpoint.

    Args:
        state: tensors, arrays and entries by name, or a tree of plain values with such in it.
        memory: takes their bytes.
        tensors: makes nodes of torch objects.
        format_name: the container that is to hold it.
        alone: its name, if it stores named tensors and nothing else.

    Raises:
        RewriteError: it cannot be written; the message names all that is in the way.
    """
    if isinstance(state, Mapping) and type(state) not in (dict, OrderedDict, Counter):
        state = dict(state)
    tree = _Tree(Storages(memory), tensors)
    root = tree.node(state, "")
    if tree.problems:
        problems = [f"{name} ({what:.200})" for name, what in tree.problems.items()]
        told = f"only plain tensors, arrays and plain values can be saved, not {listed(problems, 8)}"
        raise RewriteError(told, names=tree.problems)
    pairs = mapping_items(root) or []
    if pairs and all(isinstance(key, str) and isinstance(value, TensorEntry) for key, value in pairs):
        versions = mapping_items(_attribute(root, "_metadata"))
        state_dict = StateDict(
            {str(name): value for name, value in pairs},
            versions=None if versions is None else {str(path): value for path, value in versions},
            container=root,
        )
        origin = Origin(path=memory.path, size=memory.size, format=format_name, kind="state_dict", state_path="")
        return Checkpoint(state_dict=state_dict, rest=STATE_DICT, origin=origin)
    if alone is not None:
        others = [f"a {type(state).__name__}"]
        if isinstance(state, Mapping):
            others = [
                f"{key!r:.100} ({type(value).__name__})"
                for (key, value), (_, node) in zip(state.items(), pairs, strict=True)
                if not isinstance(key, str) or not isinstance(node, TensorEntry)
            ]
        told = f", not {listed(others, 8)}" if others else ", and none is given"
        raise RewriteError(
            f"{alone} stores named tensors and nothing else{told}; save the dict of tensors alone, or write a "
            ".pth, which stores everything"
        )
    return normalize(RawCheckpoint(root=root, format=format_name), memory)


def _attribute(node: object, name: str) -> object:
    own = attributes(node)
    return None if own is None else own.get(name)
