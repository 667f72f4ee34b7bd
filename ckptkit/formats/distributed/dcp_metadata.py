"""The ``.metadata`` of torch.distributed.checkpoint (DCP): which tensors there are, and where their chunks are.

One bare pickle whose root is ``torch.distributed.checkpoint.metadata.Metadata`` (``metadata.py``, ``filesystem.py`` of
that package; Megatron's root is a subclass), and of whose attributes four are read:

- ``state_dict_metadata``: from a tensor's name (fqn) to its properties, its size, and the offsets and sizes of its
  chunks; or to a placeholder for an object that was pickled
- ``storage_data``: from a name, and of a chunk its offset, to a file, and the first byte and the number of bytes in it;
  the ``index`` beside them is a hint, and is skipped
- ``planner_data``: from a name to the keys that lead to its value in the saved object: texts are keys of dicts, numbers
  are indices of lists; ``None`` if nothing was flattened, and missing in Megatron's files
- ``version``, since torch 2.9

``storage_meta``, ``all_local_plans``, ``mcore_data`` and whatever else there is are skipped; their names are judged as
all are.  torch 1.12 and 1.13 had the classes in ``torch.distributed._shard``.  Attributes that are ``None`` may be left
out.  A run of 1,024 processes has some 3.4 million chunks in 480 MB: see `ckptkit.formats.distributed.dcp_runs`.

A reader must check that it is consistent: chunks cover their tensor once (`ckptkit.transfer.pieces`), each that
contains anything is stored somewhere, nothing is stored for no chunk, files have plain names, and no two items share
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

from ckptkit.checkpoint import GlobalUse
from ckptkit.dtypes import DTYPES
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.distributed.dcp_record import LISTED, Items, Metadata, TensorMetadata
from ckptkit.formats.distributed.dcp_runs import BYTES, LEFT_OUT, Columns, Run, Runs, TensorRow
from ckptkit.limits import Limits
from ckptkit.pickling.inert import ABSENT, Global, Object, attributes, is_global, mapping_items, named_items
from ckptkit.pickling.reader import PickleResult, read_pickle
from ckptkit.pickling.tensors import is_int
from ckptkit.pickling.trust import global_uses
from ckptkit.report import count_of

__all__ = ["METADATA_NBYTES", "STRINGS", "parse_metadata"]

METADATA_NBYTES = 1 << 30
"""Bytes of a ``.metadata``: twice that of 1,024 processes with Adam, at some 143 bytes a chunk."""

STRINGS = "ckptkit_metadata"
"""The attribute in which ckptkit keeps a checkpoint's string metadata, a dict; torch ignores it."""

_MOST_CHUNKS = 8_000_000
"""For chunks, stored items and tensors: the type that can hold their numbers."""

_MOST_NODES = 3_000_000
"""Nodes where chunks are shaped as torch does not write them, 16 for each of 180,000."""

_MOST_KEYS = 2_000_000
"""Keys of all paths in ``planner_data`` together: twenty for each of 100,000 tensors."""

_HUGE = 1 << 62
"""Elements and bytes that nothing has."""

_OWN_NAMES = frozenset(
    {f"{package}.metadata.{name}" for package in ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint")
     for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "MetadataIndex",
                  "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "StorageMeta")}
    | {f"{package}.{name}" for package in ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint")
       for name in ("filesystem._StorageInfo", "planner.SavePlan", "planner.WriteItem", "planner.WriteItemType",
                    "planner.TensorWriteData")}
    | {f"torch.distributed._shard.sharded_tensor.metadata.{name}" for name in ("TensorProperties",
                                                                               "MEM_FORMAT_ENCODING")}
    | {f"pathlib.{module}{name}" for module in ("", "_local.") for name in ("PosixPath", "WindowsPath")}
)  # fmt: skip
"""What torch itself names in a ``.metadata``: records without behavior, and the path that it was saved to."""

_WRITERS = ("Metadata", "MCoreMetadata")
"""Names of the root's class."""


def parse_metadata(data: bytes, limits: Limits) -> Metadata:
    """The content of a ``.metadata``, once it is consistent.

    Args:
        data: the file.
        limits: bounds on names, dimensions and numbers; those on bytes, chunks and nodes are its own.

    Raises:
        FormatError: the pickle is damaged or refused, is not a ``.metadata``, or contradicts itself.
    """
    limits = limits._replace(pickle_nbytes=METADATA_NBYTES, tree_nodes=METADATA_NBYTES, nodes=_MOST_NODES)
    runs = Runs(_MOST_CHUNKS)
    uses: tuple[GlobalUse, ...] = ()
    try:
        pickle = read_pickle(
            data, constructors=_CONSTRUCTORS, limits=limits, whole=True, hold=runs, memo=runs.memo
        )  # fmt: skip
        uses = _uses(pickle)
        read = None if runs.memo.is_odd else _Reader(runs.columns, limits).read(pickle)
        if read is None:  # a left-out part is used as no pickler would
            pickle = read_pickle(data, constructors=_CONSTRUCTORS, limits=limits, whole=True)
            uses = _uses(pickle)
            read = _Reader(Columns(), limits).read(pickle)
            if read is None:
                raise CorruptError("chunks or items of unknown classes")
        read.globals = uses
        return read
    except FormatError as error:
        raise error.at(seen=uses) from error.__cause__


def _uses(pickle: PickleResult) -> tuple[GlobalUse, ...]:
    """The verdicts on its names: its own classes are what torch's loader is made for."""
    found = global_uses(pickle.globals, ".metadata")
    return tuple(replace(use, verdict="torch") if _is_own(use) else use for use in found)


def _is_own(use: GlobalUse) -> bool:
    return use.verdict == "unknown" and not use.reason and use.name in _OWN_NAMES


def _size(args: tuple[object, ...]) -> object:
    """The tuple inside a ``torch.Size``."""
    return args[0] if len(args) == 1 and isinstance(args[0], tuple) and all(map(is_int, args[0])) else NotImplemented


_CONSTRUCTORS = {("torch", "Size"): _size}


class _OddError(Exception):
    """A `Run` is in the wrong place, or a placeholder is missing."""


class _Reader:
    """Makes `Metadata` of a tree and the columns that runs of it were read into."""

    def __init__(self, columns: Columns, limits: Limits) -> None:
        self._columns = columns
        self._limits = limits
        self._seen: set[int] = set()
        self._dtypes: dict[tuple[int, int], str] = {}
        self._rows = 0

    def read(self, pickle: PickleResult) -> Metadata | None:
        """The content of the pickle; ``None``: a part that was left out is needed.

        Raises:
            FormatError: it is not a ``.metadata``, or contradicts itself.
        """
        columns = self._columns
        tensors, objects, order = dict[str, TensorMetadata](), dict[str, int](), list[str]()
        before = len(columns.offsets), len(columns.names), len(columns.tensors)
        try:
            state = _state(pickle.root, *_WRITERS)
            for row in self._described(state.get("state_dict_metadata")):
                if row.name in objects or row.name in tensors:
                    raise AmbiguousError(f"{_shown(row.name)} is described twice")
                order.append(row.name)
                if row.dtype is BYTES:
                    objects[row.name] = -1
                else:
                    tensors[row.name] = self._tensor(row)
            if len(order) > self._limits.entries:
                raise LimitError("tensors and objects", limit=self._limits.entries, actual=len(order))
            self._stored(state.get("storage_data"))
        except _OddError:
            del columns.offsets[before[0] :], columns.names[before[1] :], columns.tensors[before[2] :]
            return None
        if sum(before) != self._rows:  # some runs are nowhere, or in two places
            return None
        self._match(tensors, objects)
        version = state.get("version")
        return Metadata(
            tensors=tensors,
            objects=objects,
            order=order,
            items=Items(columns.paths, columns.starts, columns.lengths, columns.transforms),
            paths=self._paths(state.get("planner_data"), order),
            version=version if isinstance(version, str) else None,
            strings={key: value for key, value in named_items(state.get(STRINGS)) if isinstance(value, str)},
            protocol=pickle.protocol,
            globals=(),
        )

    def _run(self, node: object, kind: str) -> range:
        """The rows of a run, which is in one place."""
        if not isinstance(node, Run) or node.kind != kind or id(node) in self._seen:
            raise _OddError
        self._seen.add(id(node))
        self._rows += node.stop - node.start
        return range(node.start, node.stop)

    # Tensors and their chunks.

    def _described(self, node: object) -> Iterator[TensorRow]:
        pairs = mapping_items(node)
        if pairs is None:
            raise CorruptError(f"its state_dict_metadata is {_kind(node)}, not a dict")
        for key, value in pairs:
            if isinstance(key, Run):
                if value is not key:
                    raise _OddError
                for number in self._run(key, "tensor"):
                    row = self._columns.tensors[number]
                    self._rows += row.stop - row.start
                    yield row
                continue
            if not isinstance(key, str):
                raise CorruptError(f"a name in its state_dict_metadata is {_kind(key)}, not text")
            if _is_a(value, "BytesStorageMetadata"):
                yield TensorRow(key, BYTES)
                continue
            state = _state(value, "TensorStorageMetadata")
            dtype, layout, requires_grad = _properties(state.get("properties"))
            start = len(self._columns.offsets)
            self._add_chunks(state.get("chunks"))
            shape = self._extent(state.get("size"))
            yield TensorRow(key, dtype, layout, requires_grad, shape, start, len(self._columns.offsets))

    def _add_chunks(self, node: object) -> None:
        """Append the chunks of a list to the existing ones; its runs are copied, so that rows are in one piece."""
        columns = self._columns
        if not isinstance(node, list) or id(node) in self._seen:
            raise CorruptError(f"the chunks of a tensor are {_kind(node)}, not a separate list")
        self._seen.add(id(node))
        for chunk in node:
            if isinstance(chunk, Run):
                rows = self._run(chunk, "chunk")
                columns.offsets += columns.offsets[rows.start : rows.stop]
                columns.sizes += columns.sizes[rows.start : rows.stop]
                continue
            state = _state(chunk, "ChunkStorageMetadata")
            columns.offsets.append(self._extent(state.get("offsets")))
            columns.sizes.append(self._extent(state.get("sizes")))
        if len(columns.offsets) > 2 * _MOST_CHUNKS:
            raise LimitError("chunks", limit=_MOST_CHUNKS, actual=_MOST_CHUNKS + 1)

    def _extent(self, node: object) -> tuple[int, ...]:
        if isinstance(node, list) and len(node) <= self._limits.dimensions:
            node = tuple(node)
        if not isinstance(node, tuple) or not all(map(is_int, node)):
            raise CorruptError(f"a size or an offset is {_kind(node)}, not whole numbers")
        return node

    def _tensor(self, row: TensorRow) -> TensorMetadata:
        """A tensor; `ckptkit.transfer.pieces` sees whether its chunks cover it.

        Raises:
            CorruptError: torch has no such dtype, or no tensor such a size.
            UnsupportedError: it is not strided.
        """
        kind = id(row.dtype), id(row.layout)
        try:
            dtype = self._dtypes.get(kind)
            if dtype is None:
                dtype = self._dtypes[kind] = _dtype(row.dtype, row.layout)
            if len(row.shape) > self._limits.dimensions:
                count = count_of(len(row.shape), "dimension")
                raise CorruptError(f"{count}; torch allows {self._limits.dimensions}")
            if min(row.shape, default=0) < 0 or math.prod(row.shape) >= _HUGE:
                raise CorruptError(f"no tensor has the size {[*row.shape]}"[:200])
        except FormatError as error:
            error.message = f"tensor {_shown(row.name)}: {error.message}"
            raise
        offsets = self._columns.offsets[row.start : row.stop]
        sizes = self._columns.sizes[row.start : row.stop]
        return TensorMetadata(row.name, dtype, row.shape, row.requires_grad is True, offsets, sizes, [])

    # Where they are.

    def _stored(self, node: object) -> None:
        """Bring all items into the columns, and see what each says."""
        columns = self._columns
        pairs = mapping_items(node)
        if pairs is None:
            raise CorruptError(f"its storage_data is {_kind(node)}, not a dict")
        for key, value in pairs:
            if isinstance(key, Run):
                if value is not key:
                    raise _OddError
                self._run(key, "item")
                continue
            index, info = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
            name, place = index.get("fqn"), index.get("offset")
            path, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
            through = info.get("transform_descriptors")
            through = () if through is None else through
            if not isinstance(name, str) or not isinstance(path, str) or not is_int(start) or not is_int(length):
                raise CorruptError("a stored item without a name, a file, an offset or a length")
            if not isinstance(through, (list, tuple)) or not all(isinstance(each, str) for each in through):
                raise CorruptError(f"{_shown(name)}: its transform_descriptors are {_kind(through)}, not strings")
            if not 0 <= start < _HUGE or not 0 <= length < _HUGE or len(through) > LISTED:
                raise CorruptError(f"{_shown(name)}: an item of {length:,} bytes from byte {start:,} on")
            columns.names.append(name)
            columns.places.append(None if place is None else self._extent(place))
            columns.paths.append(path)
            columns.starts.append(start)
            columns.lengths.append(length)
            columns.transforms.append(tuple(through))
        if min(columns.starts, default=0) < 0 or min(columns.lengths, default=0) < 0:
            raise CorruptError("an item has a negative offset or length")
        for path in dict.fromkeys(columns.paths):
            if not path or path in (".", "..") or not path.isprintable() or any(sign in path for sign in "/\\\0:"):
                raise CorruptError(f"{path!r:.200} is not the name of a file in the folder")

    def _match(self, tensors: dict[str, TensorMetadata], objects: dict[str, int]) -> None:
        """Give each chunk and object the row of its item.

        Raises:
            CorruptError: one is nowhere or in two places, or an item belongs to none.
        """
        columns = self._columns
        by_name: dict[str, list[int]] = {}
        for row, name in enumerate(columns.names):
            found = by_name.get(name)
            if found is None:
                by_name[name] = [row]
            else:
                found.append(row)
        lost, extra = list[str](), list[str]()
        for name in objects:
            rows = by_name.pop(name, [])
            if len(rows) > 1:
                raise AmbiguousError(f"object {_shown(name)} is in {count_of(len(rows), 'place')}")
            if not rows or columns.places[rows[0]] is not None:
                lost.append(f"object {_shown(name)}")
            else:
                objects[name] = rows[0]
        places = columns.places
        for name, tensor in tensors.items():
            rows = by_name.pop(name, [])
            known = {places[row]: row for row in rows}
            if len(known) < len(rows):
                raise AmbiguousError(f"tensor {_shown(name)}: two items are for the same chunk")
            tensor.rows = [known.get(offsets, -1) for offsets in tensor.offsets]
            if len(rows) < len(tensor.rows):
                _leave_out_empty(tensor)
            if -1 in tensor.rows:
                lost += [
                    f"tensor {_shown(name)} at {[*offsets]}"
                    for offsets, sizes, row in zip(tensor.offsets, tensor.sizes, tensor.rows, strict=True)
                    if row < 0 and 0 not in sizes
                ]
            if not known.keys() <= set(tensor.offsets):
                extra.append(name)
        extra += by_name
        if lost:
            told = count_of(len(lost), "chunk", "lies", "lie")
            raise CorruptError(f"nothing says where {told}: {_first(lost)}", names=lost)
        if extra:
            raise CorruptError(f"items are stored that are not described: {_first(map(_shown, extra))}", names=extra)

    def _paths(self, node: object, order: list[str]) -> dict[str, tuple[str | int, ...]] | None:
        """The keys that lead to each name.

        Raises:
            CorruptError: they are not strings and numbers, or some names have none.
        """
        if node is None:
            return None
        pairs, found, left = mapping_items(node), dict[str, tuple[str | int, ...]](), _MOST_KEYS
        if pairs is None:
            raise CorruptError(f"its planner_data is {_kind(node)}, not a dict")
        for name, path in pairs:
            left -= len(path) if isinstance(path, (tuple, list)) else 0
            if left < 0:
                raise LimitError("keys in planner_data", limit=_MOST_KEYS, actual=_MOST_KEYS + 1)
            is_path = isinstance(path, (tuple, list)) and path and all(isinstance(k, str) or is_int(k) for k in path)
            if not isinstance(name, str) or not is_path:
                raise CorruptError("its planner_data does not map names to strings and numbers")
            found[name] = tuple(path)  # type: ignore[arg-type]
        if pairs and (unknown := [name for name in order if name not in found]):
            raise CorruptError(f"its planner_data does not mention {_first(map(_shown, unknown))}", names=unknown)
        return found or None


def _leave_out_empty(tensor: TensorMetadata) -> None:
    """Empty chunks where another begins: the item is that one's, and replaced theirs."""
    taken = {offsets for offsets, sizes in zip(tensor.offsets, tensor.sizes, strict=True) if 0 not in sizes}
    for number, (offsets, sizes) in enumerate(zip(tensor.offsets, tensor.sizes, strict=True)):
        if 0 in sizes and offsets in taken:
            tensor.rows[number] = -1


class _Attributes(dict[str, object]):
    """The attributes of an object; missing ones are ``None``."""

    def __missing__(self, key: str) -> None:
        return None


def _is_a(node: object, *names: str) -> bool:
    """Whether a node is an object of a class of one of these names, made by NEWOBJ or, in protocols 0 and 1, a call."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or node.items or node.pairs or node.effects:
        return False
    cls, args = node.cls, node.args
    if cls.qualified in ("copyreg._reconstructor", "copy_reg._reconstructor") and args[2:] == (None,):
        return isinstance(args[0], Global) and args[0].name in names
    return cls.name in names and not args


def _state(node: object, *names: str) -> _Attributes:
    """The attributes of an object of a class of one of these names.

    Raises:
        CorruptError: it is something else.
    """
    found = attributes(node) if _is_a(node, *names) else None
    if found is None:
        if isinstance(node, Run) or node is LEFT_OUT:
            raise _OddError
        raise CorruptError(f"{_kind(node)} where a {names[0]} belongs: torch.distributed.checkpoint never writes that")
    return _Attributes((key, value) for key, value in found.pairs if isinstance(key, str))


def _properties(node: object) -> tuple[object, object, object]:
    """dtype, layout and requires_grad, as pickled: a tuple's first three items, or attributes."""
    if not _is_a(node, "TensorProperties") or not isinstance(node, Object) or node.state is ABSENT:
        raise CorruptError(f"{_kind(node)} where a tensor's TensorProperties belong")
    if isinstance(node.state, tuple) and len(node.state) >= 3:
        return node.state[0], node.state[1], node.state[2]
    state = _state(node, "TensorProperties")
    return state.get("dtype"), state.get("layout"), state.get("requires_grad")


def _dtype(dtype: object, layout: object) -> str:
    """Torch name of a dtype, of a tensor that is strided.

    Raises:
        CorruptError: torch has no such dtype.
        UnsupportedError: it is not strided.
    """
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in DTYPES:
        raise CorruptError(f"its dtype is {_kind(dtype)}, which torch does not have")
    if isinstance(layout, Object) and is_global(layout.cls, "torch.serialization", "_get_layout"):
        layout = layout.args[0] if layout.args else None
    name = layout.qualified if isinstance(layout, Global) else layout
    if name not in ("torch.strided", None):
        raise UnsupportedError(f"its layout is {name!r:.40}; only strided is supported")
    return dtype.name


def _kind(node: object) -> str:
    """A node in a message: never its content, which may be endless."""
    if isinstance(node, (Global, Object)):
        return repr(node)[:120]
    name = type(node).__name__.lower().removeprefix("inert")
    return "None" if node is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _shown(name: str) -> str:
    return f"{name!r:.200}"


def _first(texts: Iterable[str]) -> str:
    found = [*islice(texts, LISTED + 1)]
    return ", ".join(found[:LISTED]) + (" and others" if len(found) > LISTED else "")
