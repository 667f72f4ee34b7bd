"""torch.distributed.checkpoint: a folder that its ``load`` reads, as ranks would have written it.

The folder has a file for each rank, ``__0_0.distcp``, and ``.metadata``, which says what lies where.  What is written
is what torch 2.14 writes (``torch/distributed/checkpoint/filesystem.py``, ``default_planner.py``), seen in its files:

- The tree of dicts becomes names as `flattened` says; the planner's data lead back from them to the tree.
- A tensor is one item or, of several ranks, one for each part along its first dimension, cut as ``torch.chunk`` cuts it
  and as FSDP2 shards it: every part but the last has ⌈rows / ranks⌉ rows, and the last ranks may have none.  What has
  fewer rows than there are ranks is one item, of the rank that has the fewest bytes by then.
- An item is a torch-zip of its own, and they lie in a row; the first rank's other values come first.  Tensors are
  contiguous, little-endian and on the CPU.  What is no tensor is pickled as ``torch.save`` does it.
- ``.metadata`` is a pickle of protocol 4.  Neither the path nor a random id is in it: the same checkpoint gives the
  same bytes.  The properties of tensors are of the class that torch had for them until 2.2, and still has: so torch
  2.1 reads it, too.  Strings that a checkpoint has as its metadata are an attribute of their own (`STRINGS`), which
  torch passes over.

What torch's planner does not keep is told (`Flat.lost`): the classes of dicts, keys that are no text, empty dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, Storage, TensorEntry, contiguous_stride
from ckptkit.computed import Held
from ckptkit.dtypes import DTYPES
from ckptkit.errors import KeyCollisionError, RewriteError
from ckptkit.formats.distributed.dcp_metadata import STRINGS
from ckptkit.formats.safetensors_writer import require_writable_size
from ckptkit.formats.torch_zip_writer import archive_of, finished, require_torch_dtypes, written_tree
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import brief, is_plain_value
from ckptkit.pickling.inert import ABSENT, SCALARS, Global, InertDict, Object, attributes, effects_of, mapping_items
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.pickling.writer import write_pickle
from ckptkit.plan import Checksum, Copy, Gather, LiteralBytes, Plan, Step, moved

__all__ = ["NAME", "Flat", "flattened", "values_at", "write"]

NAME = "dcp"

_MAX_LEVELS = 100
"""Dicts and lists inside one another: torch's planner recurses for each, and `ckptkit.formats.distributed.dcp` reads
as many."""

Path = tuple[str | int, ...]
"""The keys that lead to a value: text those of dicts, numbers those of lists."""


# Names.


@dataclass(slots=True)
class Flat:
    """A tree as torch's planner flattens it.

    Attributes:
        values: by name, in order: a `TensorEntry`, or any other node that is written as one item.
        paths: of each name the keys that lead there.
        lost: what of the tree its names do not keep, in words.
    """

    values: dict[str, object] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The values that are tensors."""
        return {name: value for name, value in self.values.items() if isinstance(value, TensorEntry)}

    def add(self, path: Path, value: object) -> None:
        """A value and the keys that lead there.

        Raises:
            KeyCollisionError: another has the same name.
        """
        name = _name(path)
        if name in self.values:
            raise KeyCollisionError(str(self.paths[name]), str(path), name)
        self.values[name], self.paths[name] = value, path
        if isinstance(value, TensorEntry) and not (is_plain_value(value) and value.attributes is None):
            cls = value.subclass.qualified if isinstance(value.subclass, Global) else "its attributes"
            self.lost.append(f"{name[-100:]} (a plain tensor is written, without {cls:.100})")
        elif not isinstance(value, TensorEntry) and is_tensor_like(value):
            self.lost.append(f"{name[-100:]} (no plain tensor: written as a pickled value)")


def flattened(checkpoint: Checkpoint) -> Flat:
    """What torch's ``flatten_state_dict`` makes of a checkpoint's tree (``_nested_dict.py``, ``_traverse.py``).

    Dicts are gone into, and lists that hold a tensor or a dict, in lists of lists too; what is in neither is one value,
    tuples whatever they hold.  A name is the keys that lead to a value, with dots between them.

    Raises:
        KeyCollisionError: two values would have one name.
        RewriteError: the tree is no dict, holds nothing, or itself; a key has no text of its own.
    """
    weights = _weights(checkpoint)
    found = Flat()
    root = written_tree(checkpoint)
    if root is not STATE_DICT and mapping_items(root) is None:
        raise RewriteError(
            f"a {NAME} folder holds a dict, and this is {brief(root)}; --all-tensors writes every tensor under a name"
        )
    within: set[int] = set()
    stack: list[tuple[Path, object, bool]] = [((), root, False)]
    while stack:
        path, node, is_left = stack.pop()
        node = weights if node is STATE_DICT else node
        if is_left:
            within.discard(id(node))
            continue
        pairs = mapping_items(node)
        below: list[tuple[Path, object, bool]] = []
        if pairs is not None:
            below = [((*path, _text(key, path)), value, False) for key, value in pairs]
            found.lost += _lost(node, path, pairs)
        elif isinstance(node, list) and _is_gone_into(node):
            below = [((*path, at), value, False) for at, value in enumerate(node)]
        else:
            found.add(path, node)
            continue
        if id(node) in within or len(path) > _MAX_LEVELS:
            told = "holds itself" if id(node) in within else f"has over {_MAX_LEVELS} levels"
            raise RewriteError(f"{_name(path):.200}: {told}, which nothing in a {NAME} folder can")
        within.add(id(node))
        stack += [(path, node, True), *reversed(below)]
    if not found.values:
        raise RewriteError(f"there is nothing to write: a {NAME} folder holds values under names, and it has none")
    return found


def _weights(checkpoint: Checkpoint) -> object:
    """What stands for the state_dict: of a module its values, as torch asks it for them before it saves."""
    state_dict = checkpoint.state_dict
    lowered = None if state_dict.is_module else lower_state_dict(state_dict)
    return InertDict(list(state_dict.everything.items())) if mapping_items(lowered) is None else lowered


def values_at(checkpoint: Checkpoint, paths: Mapping[str, Path]) -> dict[str, object]:
    """What stands in a checkpoint's tree where paths lead; nothing of those that lead nowhere."""
    weights, dicts = _weights(checkpoint), dict[int, dict[object, object]]()
    found: dict[str, object] = {}
    for name, path in paths.items():
        node = checkpoint.rest
        for key in path:
            node = weights if node is STATE_DICT else node
            if isinstance(key, int):
                node = node[key] if isinstance(node, list) and key < len(node) else ABSENT
            else:
                if id(node) not in dicts:
                    dicts[id(node)] = {_text(each, ()): value for each, value in mapping_items(node) or ()}
                node = dicts[id(node)].get(key, ABSENT)
        if node is not ABSENT:
            found[name] = node
    return found


def _is_gone_into(node: list[object]) -> bool:
    """Whether there is a tensor or a dict in a list, or in lists in it."""
    seen = {id(node)}
    stack = [node]
    while stack:
        for value in stack.pop():
            if value is STATE_DICT or is_tensor_like(value) or mapping_items(value) is not None:
                return True
            if isinstance(value, list) and id(value) not in seen:
                seen.add(id(value))
                stack.append(value)
    return False


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _text(key: object, path: Path) -> str:
    """A key as the planner names it."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, SCALARS) for part in parts):
        raise RewriteError(f"{_name(path):.200}: a key is {brief(key)}, which has no name in a {NAME} folder")
    return str(key)


def _lost(node: object, path: Path, pairs: list[tuple[object, object]]) -> Iterator[str]:
    """What of a dict the names in it do not keep."""
    where = _name(path)[-100:] or "the outermost dict"
    if not pairs and path:
        yield f"{where} (an empty dict)"
    if keys := [key for key, _ in pairs if not isinstance(key, str)]:
        yield f"{where} (keys that are not text, such as {keys[0]!r:.40}, become text)"
    if isinstance(node, Object):
        if node.class_name not in ("collections.OrderedDict", "builtins.dict", "__builtin__.dict"):
            yield f"{where} (a {node.class_name:.100}, becomes a dict)"
        if node.state is not ABSENT:
            kept = attributes(node)
            yield f"{where} (its attributes{': ' + ', '.join(map(str, kept)) if kept is not None else ''})"
    if effects_of(node):
        yield f"{where} (what is called for its effect on it)"


# Items.


class _Item(NamedTuple):
    """What is written of a value: all of it, or of a tensor some rows.

    Attributes:
        name: of the value.
        number: of the part.
        first: its first row.
        value: the rows as an entry of their own, or the value.
    """

    name: str
    number: int
    first: int
    value: object


def _shared_out(flat: Flat, ranks: int) -> list[list[_Item]]:
    """The items of each rank."""
    others = [_Item(name, 0, 0, value) for name, value in flat.values.items() if not isinstance(value, TensorEntry)]
    items: list[list[_Item]] = [others, *([] for _ in range(ranks - 1))]
    loads = [0] * ranks
    whole: list[tuple[str, TensorEntry]] = []
    for name, entry in flat.tensors.items():
        if ranks == 1 or not entry.nbytes or not entry.shape or entry.shape[0] < ranks:
            whole.append((name, entry))
            continue
        count = -(-entry.shape[0] // ranks)
        for rank, first in enumerate(range(0, entry.shape[0], count)):
            part = entry[first : first + count]
            items[rank].append(_Item(name, rank, first, part))
            loads[rank] += part.nbytes
    for name, entry in whole:
        rank = loads.index(min(loads))
        items[rank].append(_Item(name, 0, 0, entry))
        loads[rank] += entry.nbytes
    return items


class _Layout(NamedTuple):
    """The item of a contiguous tensor of a dtype and shape, whatever its values are.

    Attributes:
        before, after: what lies around the values.
        checksums: positions of theirs.
    """

    before: bytes
    after: bytes
    checksums: tuple[int, ...]


@lru_cache(1024)
def _layout(dtype: str, shape: tuple[int, ...]) -> _Layout:
    row, nbytes = DTYPES[dtype], prod(shape) * DTYPES[dtype].itemsize
    storage = Storage(
        key="0",
        dtype=row.name if row.storage_class else None,
        nbytes=nbytes,
        location="cpu",
        source=ByteRange(Held(b"", NAME), 0, nbytes),
    )
    archive, _ = archive_of(
        TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype=dtype),
        StateDict(),
    )
    steps, _ = finished(archive)
    at = next((step.target for step in steps if isinstance(step, Copy)), 0)
    literals = [step for step in steps if isinstance(step, LiteralBytes)]
    return _Layout(
        b"".join(step.data for step in literals if step.target < at),
        b"".join(step.data for step in literals if step.target >= at),
        tuple(step.target for step in steps if isinstance(step, Checksum)),
    )


def _tensor_steps(start: int, entry: TensorEntry) -> tuple[list[Step], int]:
    """The steps of a tensor's item that begins at a position of its file, and where it ends."""
    before, after, checksums = _layout(entry.dtype, entry.shape)
    nbytes, storage = entry.nbytes, entry.storage
    at = start + len(before)
    end = at + nbytes + len(after)
    if not nbytes:
        return [LiteralBytes(at, after)], end
    values: list[Step] = []
    crc: int | None = None
    if not entry.is_plain_bytes:
        values.append(Gather(at, entry))
    elif nbytes == storage.source.nbytes:
        values += moved(at, storage.source)
        crc = storage.crc32
    else:
        values += moved(at, storage.source.part(entry.storage_offset * entry.itemsize, nbytes))
    if crc is None:
        fields = [Checksum(start + target, at, nbytes) for target in checksums]
        return [LiteralBytes(start, before), *values, LiteralBytes(at + nbytes, after), *fields], end
    known = bytearray(before + after)
    for target in checksums:
        target -= nbytes if target > len(before) else 0
        known[target : target + 4] = crc.to_bytes(4, "little")
    first, last = bytes(known[: len(before)]), bytes(known[len(before) :])
    return [LiteralBytes(start, first), *values, LiteralBytes(at + nbytes, last)], end


def _other_steps(start: int, value: object, protocol: int | None) -> tuple[list[Step], int, int]:
    """The steps of any other item, where it ends, and the number of tensors in it."""
    archive, tensors = archive_of(value, StateDict(), protocol=protocol)
    steps, nbytes = finished(archive)
    made: list[Step] = []
    for step in steps:
        shifted = step._replace(target=step.target + start)
        made.append(shifted._replace(start=shifted.start + start) if isinstance(shifted, Checksum) else shifted)
    return made, start + nbytes, tensors


# The folder.


def write(checkpoint: Checkpoint, ranks: int = 1) -> Plan:
    """The plan of a folder.

    Args:
        checkpoint: what to write.
        ranks: how many share it, at least 1.

    Raises:
        KeyCollisionError, RewriteError: as `flattened`; tensors repeat their elements beyond all use.
        DTypeError: torch has no dtype for a tensor.
        UnsupportedError: storages of both byte orders in one value that is no tensor.
    """
    flat = flattened(checkpoint)
    entries = flat.tensors
    require_torch_dtypes(entries)
    require_writable_size(entries, f"a {NAME} folder")
    protocol = None if checkpoint.origin.is_program else checkpoint.origin.pickle_protocol
    shards: dict[str, Plan] = {}
    chunks: dict[str, list[object]] = {name: [] for name in entries}
    stored: list[tuple[object, object]] = []
    for rank, items in enumerate(_shared_out(flat, ranks)):
        file = f"__{rank}_0.distcp"
        steps: list[Step] = []
        end = tensors = 0
        for item in items:
            start, value = end, item.value
            index = _made(_INDEX, fqn=item.name, index=None)
            if isinstance(value, TensorEntry):
                made, end = _tensor_steps(start, value)
                tensors += not item.number
                offsets = _size((item.first, *(0,) * (len(value.shape) - 1))[: len(value.shape)])
                chunks[item.name].append(_made(_CHUNK, offsets=offsets, sizes=_size(value.shape)))
                index = _made(_INDEX, fqn=item.name, index=item.number, offset=offsets)
            else:
                made, end, inside = _other_steps(start, value, protocol)
                tensors += inside
            steps += made
            stored.append((index, _made(_STORED, relative_path=file, offset=start, length=end - start)))
        if items:
            shards[file] = Plan(format=NAME, nbytes=end, steps=tuple(steps), tensors=tensors, aliases={})
    data = _metadata(flat, chunks, stored, checkpoint.metadata)
    return Plan(
        format=NAME,
        nbytes=len(data),
        steps=(LiteralBytes(0, data),),
        tensors=sum(shard.tensors for shard in shards.values()),
        aliases={},
        shards=shards,
        in_folder=".metadata",
    )


_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_ROOT, _TENSOR, _BYTES, _CHUNK, _INDEX = (
    Global(_CHECKPOINT, name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex"),
    )
)
_STORED = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_PROPERTIES, _SIZE = Global(_OLD, "TensorProperties"), Global("torch", "Size")
_STRIDED = Object("reduce", Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Object("reduce", Global(_OLD, "MEM_FORMAT_ENCODING"), (0,))


def _made(cls: Global, **state: object) -> Object:
    """An instance of a dataclass with these attributes."""
    node = Object("newobj", cls, ())
    if state:
        node.state = InertDict(list(state.items()))
    return node


def _size(sizes: tuple[int, ...]) -> Object:
    return Object("reduce", _SIZE, (sizes,))


def _metadata(
    flat: Flat,
    chunks: Mapping[str, list[object]],
    stored: list[tuple[object, object]],
    metadata: Mapping[str, str],
) -> bytes:
    """The content of ``.metadata``.

    Args:
        flat: names, values and paths.
        chunks: of each tensor.
        stored: the index of each item and where it lies.
        metadata: strings.
    """
    described: list[tuple[object, object]] = []
    for name, value in flat.values.items():
        if not isinstance(value, TensorEntry):
            described.append((name, _made(_BYTES)))
            continue
        properties = Object("newobj", _PROPERTIES, ())
        properties.state = (Global("torch", value.dtype), _STRIDED, value.requires_grad, _CONTIGUOUS, False)
        about = _made(_TENSOR, properties=properties, size=_size(value.shape), chunks=chunks[name])
        described.append((name, about))
    root = _made(
        _ROOT,
        state_dict_metadata=InertDict(described),
        planner_data=InertDict(list(flat.paths.items())),
        storage_data=InertDict(stored),
        version="1.0.0",
        **({STRINGS: InertDict(list(metadata.items()))} if metadata else {}),
    )
    return write_pickle(root, lower=lambda node: node, protocol=4)
