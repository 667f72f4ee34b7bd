"""Holds a written file against what it was written from: every node, name and byte.

`check_output` opens the output with its own reader and compares, so that an error in the writer,
the plan, the copying or the reader shows before the file gets its name.  The source's recorded
checksums are checked as its bytes pass by.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry
from ckptkit.derived import ByteSource, ConvertedRange
from ckptkit.errors import CorruptError
from ckptkit.formats import read
from ckptkit.formats.module_versions import versions_text
from ckptkit.formats.torch_zip_writer import written_tree
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import brief, join
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId, effects_of
from ckptkit.transfer import stream
from ckptkit.transfer.checksums import Checksums, damage_error, damage_of
from ckptkit.transfer.workers import buffer, in_parallel

__all__ = ["check_output", "first_difference", "same_values"]

_COMPARED_NBYTES = 512 << 10
"""Bytes compared at a time: both sides fit into a core's own cache, where checksums are fast."""

_MAX_PLACE = 400
"""Characters of a place after which it is not made longer: trees may be nested 100,000 deep."""

_SHARDED = ("safetensors-sharded", "torch-sharded")

_kept = threading.local()

Compared = Callable[[int], object]
"""Called with the number of bytes that were just compared; from several threads."""


def check_output(source: Checkpoint, path: str, compared: Compared = lambda _: None) -> int:
    """Compare a complete output file with the checkpoint it was written from.

    Args:
        source: the checkpoint, as rewritten.
        path: the output; it is opened and read.
        compared: called as bytes are compared.

    Returns:
        Bytes of tensor data that were compared.

    Raises:
        CorruptError: the output differs, or a source's bytes are not those its checksum was recorded
            for; the message names the tensor.
    """
    output, file = read(path)
    try:
        for key, value in source.metadata.items():
            if output.metadata.get(key) != value:
                raise CorruptError(f"metadata {key!r}: the output does not hold its value; nothing was written")
        comparison = _Comparison(compared)
        if output.origin.format == "safetensors":
            if versions_text(source.state_dict) not in (None, versions_text(output.state_dict)):
                raise CorruptError("the output does not hold the same module versions; nothing was written")
            if source.state_dict.keys() == output.state_dict.keys() and [*source.state_dict] != [*output.state_dict]:
                raise CorruptError("the output does not hold the tensors in the same order; nothing was written")
            _tensors(source, output, comparison)
        elif output.origin.format in _SHARDED:
            _tensors(source, output, comparison)
            _extra_values(source, output, comparison)
        else:
            _trees(source, output, comparison)
        return comparison.run()
    finally:
        file.close()


class _Comparison:
    """What has to be compared: collected first, so that several threads can share it."""

    def __init__(self, compared: Compared) -> None:
        self._compared = compared
        self._storages: dict[tuple[int, int], tuple[str, Storage, Storage]] = {}
        self._tensors: list[tuple[str, TensorEntry, TensorEntry]] = []
        self._places: dict[int, tuple[str, Storage]] = {}

    def storages(self, place: str, source: Storage, written: Storage) -> None:
        """All bytes of one must be all bytes of the other."""
        self._places.setdefault(id(source), (place, source))
        self._storages.setdefault((id(source), id(written)), (place, source, written))

    def tensors(self, place: str, source: TensorEntry, written: TensorEntry) -> None:
        """The values of one must be the values of the other."""
        self._places.setdefault(id(source.storage), (place, source.storage))
        if source.covers_storage and source.is_plain_bytes and written.covers_storage:
            self.storages(place, source.storage, written.storage)
        else:
            self._tensors.append((place, source, written))

    def run(self) -> int:
        """Compare; returns the bytes that were.

        Raises:
            CorruptError: something differs, or does not have the checksum that is recorded for it.
        """
        whole = self._storages.values()
        checked = {id(source.original or source) for _, source, _ in whole if _covers_original(source)}
        # Views of larger storages, and what was cut out of some: is that whole which they were cut from?
        others = {id(s.original or s): (place, s.original or s) for place, s in self._places.values()}
        unchecked = Checksums()
        unchecked.want(s for key, (_, s) in others.items() if key not in checked)
        tasks: list[Callable[[], object]] = [partial(self._same_storage, *triple) for triple in whole]
        tasks += [partial(self._same_tensor, *triple) for triple in self._tensors]
        nbytes = sum(source.nbytes for _, source, _ in whole) + sum(source.nbytes for _, source, _ in self._tensors)
        in_parallel(tasks, nbytes=nbytes)
        unchecked.require(lambda: {key: place for key, (place, _) in others.items()})
        return nbytes

    def _same_storage(self, place: str, source: Storage, written: Storage) -> None:
        difference, crc = first_difference(source.source, written.source, self._compared)
        if difference is not None:
            raise CorruptError(
                f"{place}: the output differs at byte {difference:,} of the storage; nothing was written"
            )
        if _covers_original(source):
            damage = damage_of(source.original or source, crc)
            if damage is not None:
                raise damage_error([damage], {id(damage.storage): place})

    def _same_tensor(self, place: str, source: TensorEntry, written: TensorEntry) -> None:
        if not same_values(source, written):
            raise CorruptError(f"{place}: the output's values differ; nothing was written")
        self._compared(source.nbytes)


def _covers_original(storage: Storage) -> bool:
    """Whether all bytes of the storage of the file pass by where this one is read."""
    if storage.original is None:
        return True
    source = storage.source
    read = source.original.nbytes if isinstance(source, ConvertedRange) else source.nbytes
    return read == storage.original.nbytes


def _tensors(source: Checkpoint, output: Checkpoint, comparison: _Comparison) -> None:
    """A container of named tensors only: names and values."""
    if set(source.state_dict) != set(output.state_dict):
        raise CorruptError("the output does not hold the same tensor names; nothing was written")
    pairs: set[tuple[object, ...]] = set()
    for name, entry in source.state_dict.items():
        written = output.state_dict[name]
        if (entry.dtype, entry.shape) != (written.dtype, written.shape):
            raise CorruptError(f"tensor {name!r}: the output has another dtype or shape; nothing was written")
        if (*entry.view, *written.view) not in pairs:
            pairs.add((*entry.view, *written.view))
            comparison.tensors(f"tensor {name!r}", entry, written)


def _extra_values(source: Checkpoint, output: Checkpoint, comparison: _Comparison) -> None:
    """What a sharded state_dict holds beside plain tensors."""
    ours, theirs = source.state_dict.extra, output.state_dict.extra
    if set(ours) != set(theirs):
        raise CorruptError("the output does not hold the same values beside its tensors; nothing was written")
    for name, value in ours.items():
        for pair in _paired_storages([(name, value, theirs[name])]):
            comparison.storages(*pair)


def _trees(source: Checkpoint, output: Checkpoint, comparison: _Comparison) -> None:
    """A container of a whole tree: every node, and every storage byte."""
    lowered = lower_state_dict(source.state_dict), lower_state_dict(output.state_dict)
    for pair in _paired_storages([("", written_tree(source), output.rest)], lowered):
        comparison.storages(*pair)


def first_difference(a: ByteSource, b: ByteSource, compared: Compared = lambda _: None) -> tuple[int | None, int]:
    """Position of the first byte that differs, ``None`` where all are equal, and the CRC-32 of ``a`` up to there.

    Of values that are converted it is that of the bytes before.  ``compared`` is called as bytes are compared.
    """
    if a.nbytes != b.nbytes:
        return min(a.nbytes, b.nbytes), 0
    b = b.plain()
    if not isinstance(a, ConvertedRange):
        a = a.plain()
    crc = 0
    for start in range(0, a.nbytes, _COMPARED_NBYTES):
        nbytes = min(_COMPARED_NBYTES, a.nbytes - start)
        left, right = _buffers(nbytes)
        b.file.read_into(b.offset + start, right)
        if isinstance(a, ConvertedRange):
            source = a.part(start, nbytes).original.plain()
            original = buffer("original", source.nbytes)
            source.file.read_into(source.offset, original)
            a.whole.function.into(original, left)
        else:
            original = memoryview(left)
            a.file.read_into(a.offset + start, left)
        crc = zlib.crc32(original, crc)
        if left != right:
            return start + next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y), crc
        compared(nbytes)
    return None, crc


def _buffers(nbytes: int) -> tuple[bytearray, bytearray]:
    """Two buffers of this size, the last ones of this thread where they fit; no views, which compare slowly."""
    kept: tuple[bytearray, bytearray] | None = getattr(_kept, "buffers", None)
    if kept is None or len(kept[0]) != nbytes:
        kept = _kept.buffers = bytearray(nbytes), bytearray(nbytes)
    return kept


def same_values(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits in C order."""
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


# Trees.


def _paired_storages(
    stack: list[tuple[str, object, object]], lowered: tuple[object, object] = (STATE_DICT, STATE_DICT)
) -> Iterator[tuple[str, Storage, Storage]]:
    """Go through trees side by side; yields each pair of storages with the place it was met at.

    Args:
        stack: pairs of trees, each with its place.
        lowered: what stands for the marker `STATE_DICT` in either.

    Raises:
        CorruptError: the trees differ in anything else.
    """
    paired: dict[int, object] = {}
    back: dict[int, object] = {}
    values: set[tuple[int, int]] = set()
    while stack:
        place, a, b = stack.pop()
        a, b = lowered[0] if a is STATE_DICT else a, lowered[1] if b is STATE_DICT else b
        if _is_scalar(a):
            if not _same_scalar(a, b):
                raise _differs(place, a, b)
            continue
        if isinstance(a, (Global, tuple)):
            # Values without identity: the writer may join equal ones, and a reader part them.
            if (id(a), id(b)) in values:
                continue
            values.add((id(a), id(b)))
        elif id(a) in paired or id(b) in back:
            # What was one object must still be one, and only that: sharing and ties are part of the tree.
            if paired.get(id(a)) is not b or back.get(id(b)) is not a:
                raise CorruptError(f"{place or 'root'}: no longer the same object in the output; nothing was written")
            continue
        else:
            paired[id(a)], back[id(b)] = b, a
        if isinstance(a, Storage) and isinstance(b, Storage):
            if (a.dtype, a.nbytes, a.location) != (b.dtype, b.nbytes, b.location):
                raise _differs(place, a, b)
            yield place or "root", a, b
            continue
        parts, others = _parts(a, place), _parts(b, place)
        if type(a) is not type(b) or len(parts) != len(others):
            raise _differs(place, a, b)
        stack.extend((at, x, y) for (at, x), (_, y) in zip(reversed(parts), reversed(others), strict=True))


def _is_scalar(node: object) -> bool:
    return node is None or isinstance(node, (bool, int, float, str, bytes, bytearray)) or node is ABSENT


def _same_scalar(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)  # NaN is not equal to itself
    return type(a) is type(b) and a == b


def _differs(place: str, a: object, b: object) -> CorruptError:
    return CorruptError(f"{place or 'root'}: {brief(a)} became {brief(b)} in the output; nothing was written")


def _parts(node: object, place: str) -> list[tuple[str, object]]:
    """Everything that makes up a node, one level deep, each part with its place."""

    def under(key: object) -> str:
        return place if len(place) > _MAX_PLACE else join(place, key)

    def of_pairs(pairs: list[tuple[object, object]]) -> list[tuple[str, object]]:
        named = ((under(key), key, value) for key, value in pairs)
        return [part for at, key, value in named for part in ((at, key), (at, value))]

    called = [(place, call) for call in effects_of(node)]
    if isinstance(node, TensorEntry):
        scalars = (
            node.storage_offset, node.dtype, node.requires_grad, node.is_parameter, node.is_conj, node.is_neg
        )  # fmt: skip
        others = (node.shape, node.stride, node.subclass, node.attributes, node.storage)
        return [*((place, part) for part in (*scalars, *others)), *called]
    if isinstance(node, (list, tuple)):
        return [(under(index), item) for index, item in enumerate(node)]
    if isinstance(node, InertDict):
        return [*of_pairs(node.pairs), *called]
    if isinstance(node, Object):
        filled = [(place, part) for part in (node.how, node.cls, node.args, node.kwargs, node.state)]
        return [*filled, *((under(i), item) for i, item in enumerate(node.items)), *of_pairs(node.pairs), *called]
    if isinstance(node, InertSet):
        return [(place, node.frozen), *((place, member) for member in node.members), *called]
    if isinstance(node, Global):
        return [(place, node.module), (place, node.name), *called]
    if isinstance(node, PersistentId):
        return [(place, node.pid)]
    return []
