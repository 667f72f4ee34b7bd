"""torch.distributed.checkpoint: a folder that its ``load`` reads, as ranks would have written it.

The folder has a file for each rank, ``__0_0.distcp``, and ``.metadata``, which says what is where.  The output equals
torch 2.14's (``torch/distributed/checkpoint/filesystem.py``, ``default_planner.py``), as seen in its files:

- The tree of dicts becomes names (`ckptkit.formats.distributed.dcp_names`); the planner's data lead back from them.
- A tensor is one item or, of several ranks, one for each part along its first dimension, cut as ``torch.chunk`` cuts it
  and as FSDP2 shards it: every part but the last has ⌈rows / ranks⌉ rows, and the last ranks may have none.  A tensor
  with fewer rows than there are ranks is one item, of the rank that has the fewest bytes by then.
- An item is a complete torch-zip, and items are consecutive; the first rank's other values come first.  Tensors are
  contiguous, little-endian and on the CPU.  Anything but a tensor is pickled as ``torch.save`` does it.
- ``.metadata`` is a pickle of protocol 4.  Neither the path nor a random id is in it: the same checkpoint gives the
  same bytes.  The properties of tensors are of the class that torch had for them until 2.2, and still has: so torch
  2.1 reads it, too.  A checkpoint's metadata strings are a separate attribute (`STRINGS`), which torch ignores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeVar

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Checkpoint, StateDict, Storage, TensorEntry, contiguous_stride
from ckptkit.computed import Held
from ckptkit.dtypes import DTYPES
from ckptkit.formats.distributed.dcp_metadata import STRINGS
from ckptkit.formats.distributed.dcp_names import NAME, Flat, Path, flattened
from ckptkit.formats.safetensors_writer import require_writable_size
from ckptkit.formats.torch_zip_writer import archive_of, finished, require_torch_dtypes
from ckptkit.plan import Checksum, Copy, Gather, LiteralBytes, Plan, Step, moved

__all__ = ["write"]

_T = TypeVar("_T")


# Items.


class _Item(NamedTuple):
    """The written part of a value: all of it, or some rows of a tensor.

    Attributes:
        name: of the value.
        number: of the part.
        first: its first row.
        shape: of the part of a tensor; of anything else empty.
    """

    name: str
    number: int = 0
    first: int = 0
    shape: tuple[int, ...] = ()


def _shared_out(flat: Flat, tensors: Mapping[str, TensorEntry], ranks: int) -> list[list[_Item]]:
    """The items of each rank."""
    items: list[list[_Item]] = [[] for _ in range(ranks)]
    items[0] += [_Item(name) for name in flat.values if name not in tensors]
    loads = [0] * ranks
    whole: list[str] = []
    for name, entry in tensors.items():
        shape, nbytes = entry.shape, entry.nbytes
        if ranks == 1 or not nbytes or not shape or shape[0] < ranks:
            whole.append(name)
            continue
        count = -(-shape[0] // ranks)
        for rank, first in enumerate(range(0, shape[0], count)):
            rows = min(count, shape[0] - first)
            items[rank].append(_Item(name, rank, first, (rows, *shape[1:])))
            loads[rank] += nbytes // shape[0] * rows
    for name in whole:
        rank = loads.index(min(loads))
        items[rank].append(_Item(name, shape=tensors[name].shape))
        loads[rank] += tensors[name].nbytes
    return items


class _Layout(NamedTuple):
    """The item of a contiguous tensor of a dtype and shape, whatever its values are.

    Attributes:
        before, after: the bytes around the values.
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


def _tensor_steps(start: int, entry: TensorEntry, first: int, shape: tuple[int, ...]) -> tuple[list[Step], int]:
    """The steps of the item that rows of a tensor are, from a position of the file on, and where it ends.

    Args:
        start: that position.
        entry: the tensor.
        first: its first row that is in the item.
        shape: of these rows.
    """
    before, after, checksums = _layout(entry.dtype, shape)
    storage, nbytes = entry.storage, prod(shape) * entry.itemsize
    at = start + len(before)
    end = at + nbytes + len(after)
    if not nbytes:
        return [LiteralBytes(at, after)], end
    values: list[Step] = []
    crc: int | None = None
    if not entry.is_plain_bytes:
        values.append(Gather(at, entry if shape == entry.shape else entry[first : first + shape[0]]))
    elif nbytes == storage.source.nbytes:
        values += moved(at, storage.source)
        crc = storage.crc32
    else:
        skipped = entry.storage_offset + (first * prod(shape[1:]) if first else 0)
        values += moved(at, storage.source.part(skipped * entry.itemsize, nbytes))
    if crc is None:
        fields = [Checksum(start + target, at, nbytes) for target in checksums]
        return [LiteralBytes(start, before), *values, LiteralBytes(at + nbytes, after), *fields], end
    known = bytearray(before + after)
    for target in checksums:
        target -= nbytes if target > len(before) else 0
        known[target : target + 4] = crc.to_bytes(4, "little")
    head, tail = bytes(known[: len(before)]), bytes(known[len(before) :])
    return [LiteralBytes(start, head), *values, LiteralBytes(at + nbytes, tail)], end


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
        UnsupportedError: storages of both byte orders in one value that is not a tensor.
    """
    flat = flattened(checkpoint)
    entries = flat.tensors
    require_torch_dtypes(entries)
    require_writable_size(entries, f"a {NAME} folder")
    protocol = None if checkpoint.origin.is_program else checkpoint.origin.pickle_protocol
    shards: dict[str, Plan] = {}
    chunks: dict[str, list[_Item]] = {name: [] for name in entries}
    places: list[tuple[_Item, str, int, int]] = []
    for rank, items in enumerate(_shared_out(flat, entries, ranks)):
        file = f"__{rank}_0.distcp"
        steps: list[Step] = []
        end = tensors = 0
        for item in items:
            start, entry = end, entries.get(item.name)
            if entry is not None:
                made, end = _tensor_steps(start, entry, item.first, item.shape)
                tensors += not item.number
                chunks[item.name].append(item)
            else:
                made, end, inside = _other_steps(start, flat.values[item.name], protocol)
                tensors += inside
            steps += made
            places.append((item, file, start, end - start))
        if items:
            shards[file] = Plan(format=NAME, nbytes=end, steps=tuple(steps), tensors=tensors, aliases={})
    data = _metadata(flat, chunks, places, checkpoint.metadata)
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
_ROOT, _TENSOR, _BYTES = ((_CHECKPOINT, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata"))
_CHUNK, _INDEX = (_CHECKPOINT, "ChunkStorageMetadata"), (_CHECKPOINT, "MetadataIndex")
_STORED = "torch.distributed.checkpoint.filesystem", "_StorageInfo"
_BATCH = 1000
"""Pairs of a dict, or items of a list, that picklers set together."""


class _Pickle:
    """A pickle of protocol 4, with the opcodes of ``pickle.dump``, which readers recognize in chunks by the million.

    Equal texts, sizes and classes are written once.

    Attributes:
        out: the bytes.
    """

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x04")
        self._memo: dict[object, bytes] = {}
        self._count = 0

    def put(self, key: object = None) -> None:
        """Put the last value into the memo; ``key``: to get it from there."""
        self.out += b"\x94"
        if key is not None:
            count = self._count
            self._memo[key] = b"h" + bytes((count,)) if count < 256 else b"j" + count.to_bytes(4, "little")
        self._count += 1

    def _got(self, key: object) -> bool:
        get = self._memo.get(key)
        self.out += get or b""
        return get is not None

    def text(self, text: str) -> None:
        """A string."""
        if not self._got(text):
            raw = text.encode("utf-8", "surrogatepass")
            size = b"\x8c" + bytes((len(raw),)) if len(raw) < 256 else b"X" + len(raw).to_bytes(4, "little")
            self.out += size + raw
            self.put(text)

    def number(self, number: int) -> None:
        """A number of at least 0."""
        if number < 1 << 8:
            self.out += b"K" + bytes((number,))
        elif number < 1 << 16:
            self.out += b"M" + number.to_bytes(2, "little")
        elif number < 1 << 31:
            self.out += b"J" + number.to_bytes(4, "little")
        else:
            raw = number.to_bytes(number.bit_length() // 8 + 1, "little")
            self.out += b"\x8a" + bytes((len(raw),)) + raw

    def path(self, parts: tuple[str | int, ...]) -> None:
        """A tuple of strings and numbers."""
        if len(parts) > 3:
            self.out += b"("
        for part in parts:
            if isinstance(part, str):
                self.text(part)
            else:
                self.number(part)
        if not parts:
            self.out += b")"
            return
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(parts), b"t")
        self.put()

    def name(self, name: tuple[str, str]) -> None:
        """A class or function."""
        if not self._got(name):
            self.text(name[0])
            self.text(name[1])
            self.out += b"\x93"
            self.put(name)

    def called(self, name: tuple[str, str], *given: str | int) -> None:
        """The result of a function, the same each time."""
        if not self._got((name, given)):
            self.name(name)
            self.path(given)
            self.out += b"R"
            self.put((name, given))

    def size(self, sizes: tuple[int, ...]) -> None:
        """A ``torch.Size``."""
        if not self._got((sizes,)):
            self.name(("torch", "Size"))
            self.path(sizes)
            self.out += b"\x85"
            self.put()
            self.out += b"R"
            self.put((sizes,))

    def new(self, name: tuple[str, str]) -> None:
        """An instance of a class, without a state."""
        self.name(name)
        self.out += b")\x81"
        self.put()

    def begun(self, name: tuple[str, str]) -> None:
        """An instance of a dataclass whose attributes follow, and then ``ub``."""
        self.new(name)
        self.out += b"}"
        self.put()
        self.out += b"("

    def each(self, kind: bytes, values: Iterable[_T], write: Callable[[_T], object], one: bytes, many: bytes) -> None:
        """A dict or a list whose pairs or items ``write`` writes."""
        self.out += kind
        self.put()
        left = list(values)
        for at in range(0, len(left), _BATCH):
            self.out += b"(" * (len(left) > 1)
            for value in left[at : at + _BATCH]:
                write(value)
            self.out += many if len(left) > 1 else one

    def pairs(self, values: Iterable[_T], write: Callable[[_T], object]) -> None:
        """A dict whose pairs ``write`` writes."""
        self.each(b"}", values, write, b"s", b"u")


def _metadata(
    flat: Flat,
    chunks: Mapping[str, list[_Item]],
    places: list[tuple[_Item, str, int, int]],
    metadata: Mapping[str, str],
) -> bytes:
    """The content of ``.metadata``.

    Args:
        flat: names, values and paths.
        chunks: of each tensor.
        places: each item, its file, and its first byte and number of bytes there.
        metadata: strings.
    """
    pickle = _Pickle()

    def offsets(item: _Item) -> tuple[int, ...]:
        return (item.first, *(0,) * (len(item.shape) - 1)) if item.shape else ()

    def chunk(item: _Item) -> None:
        pickle.begun(_CHUNK)
        pickle.text("offsets")
        pickle.size(offsets(item))
        pickle.text("sizes")
        pickle.size(item.shape)
        pickle.out += b"ub"

    def described(pair: tuple[str, object]) -> None:
        name, value = pair
        pickle.text(name)
        if not isinstance(value, TensorEntry):
            pickle.new(_BYTES)
            return
        pickle.begun(_TENSOR)
        pickle.text("properties")
        pickle.new((_OLD, "TensorProperties"))
        pickle.out += b"("
        pickle.name(("torch", value.dtype))
        pickle.called(("torch.serialization", "_get_layout"), "torch.strided")
        pickle.out += b"\x88" if value.requires_grad else b"\x89"
        pickle.called((_OLD, "MEM_FORMAT_ENCODING"), 0)
        pickle.out += b"\x89t"
        pickle.put()
        pickle.out += b"b"
        pickle.text("size")
        pickle.size(value.shape)
        pickle.text("chunks")
        pickle.each(b"]", chunks[name], chunk, b"a", b"e")
        pickle.out += b"ub"

    def path(pair: tuple[str, Path]) -> None:
        pickle.text(pair[0])
        pickle.path(pair[1])

    def stored(place: tuple[_Item, str, int, int]) -> None:
        item, file, start, length = place
        is_tensor = item.name in chunks
        pickle.begun(_INDEX)
        pickle.text("fqn")
        pickle.text(item.name)
        pickle.text("index")
        if is_tensor:
            pickle.number(item.number)
            pickle.text("offset")
            pickle.size(offsets(item))
        else:
            pickle.out += b"N"
        pickle.out += b"ub"
        pickle.begun(_STORED)
        pickle.text("relative_path")
        pickle.text(file)
        pickle.text("offset")
        pickle.number(start)
        pickle.text("length")
        pickle.number(length)
        pickle.out += b"ub"

    def text(pair: tuple[str, str]) -> None:
        pickle.text(pair[0])
        pickle.text(pair[1])

    pickle.begun(_ROOT)
    pickle.text("state_dict_metadata")
    pickle.pairs(flat.values.items(), described)
    pickle.text("planner_data")
    pickle.pairs(flat.paths.items(), path)
    pickle.text("storage_data")
    pickle.pairs(places, stored)
    text(("version", "1.0.0"))
    if metadata:
        pickle.text(STRINGS)
        pickle.pairs(metadata.items(), text)
    return bytes(pickle.out + b"ub.")
