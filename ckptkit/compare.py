"""Holds a written file against what it was written from: every node, name and byte.

`check_output` opens the output with its own reader and compares, so that an error in the writer,
the plan, the copying or the reader shows before the file gets its name.  The source's recorded
checksums are checked as its bytes pass by.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry
from ckptkit.derived import ByteSource
from ckptkit.errors import CorruptError
from ckptkit.formats import read
from ckptkit.formats.torch_zip import written_tree
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import brief, join
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId
from ckptkit.transfer import stream

__all__ = ["check_output", "first_difference", "same_values"]

_COMPARED_NBYTES = 512 << 10
"""Bytes compared at a time: both sides fit into a core's own cache, where checksums are fast."""

_kept = threading.local()

_MAX_WORKERS = 4
"""Threads that compare; more than a few only wait for memory."""

_MANY_NBYTES = 32 << 20
"""Bytes from which threads are worth starting."""

_MAX_PLACE = 400
"""Characters of a place after which it is not made longer: trees may be nested 100,000 deep."""


def check_output(source: Checkpoint, path: str) -> int:
    """Compare a complete output file with the checkpoint it was written from.

    Args:
        source: the checkpoint, as rewritten.
        path: the output; it is opened and read.

    Returns:
        Bytes of tensor data that were compared.

    Raises:
        CorruptError: the output differs, or a source's bytes are not those its checksum was recorded
            for; the message names the tensor.
    """
    output, file = read(path)
    try:
        if output.origin.format == "safetensors":
            return _check_tensors(source, output)
        return _check_tree(source, output)
    finally:
        file.close()


def _check_tensors(source: Checkpoint, output: Checkpoint) -> int:
    """A container of named tensors only: names and values."""
    if set(source.state_dict) != set(output.state_dict):
        raise CorruptError("the output does not hold the same tensor names; nothing was written")
    for key, value in source.metadata.items():
        if output.metadata.get(key) != value:
            raise CorruptError(f"metadata {key!r}: the output does not hold its value; nothing was written")
    compared: set[tuple[object, ...]] = set()
    whole: dict[tuple[int, int], tuple[str, Storage, Storage]] = {}
    nbytes = 0
    for name, entry in source.state_dict.items():
        written = output.state_dict[name]
        if (entry.dtype, entry.shape) != (written.dtype, written.shape):
            raise CorruptError(f"tensor {name!r}: the output has another dtype or shape; nothing was written")
        if (*entry.view, *written.view) in compared:
            continue
        compared.add((*entry.view, *written.view))
        if entry.covers_storage and entry.is_plain_bytes:
            whole[id(entry.storage), id(written.storage)] = (f"tensor {name!r}", entry.storage, written.storage)
            continue
        nbytes += entry.nbytes
        if not same_values(entry, written):
            raise CorruptError(f"tensor {name!r}: the output's values differ; nothing was written")
    nbytes += _same_storages(list(whole.values()))
    checked = {id(storage) for _, storage, _ in whole.values()}
    for name, entry in source.state_dict.items():  # views of larger storages: is what they were cut from whole?
        if id(entry.storage) not in checked and entry.numel:
            checked.add(id(entry.storage))
            _check_crc(f"tensor {name!r}", entry.storage, _crc32(entry.storage))
    return nbytes


def _check_tree(source: Checkpoint, output: Checkpoint) -> int:
    """A container of a whole tree: every node, and every storage byte."""
    pairs = {id(storage): (place, storage, written) for place, storage, written in _paired_storages(source, output)}
    return _same_storages(list(pairs.values()))


def _same_storages(pairs: list[tuple[str, Storage, Storage]]) -> int:
    """Compare storages, several at a time where there is much to compare; returns their bytes.

    Reading and checksums run outside the interpreter lock, so threads do help.
    """
    nbytes = sum(storage.nbytes for _, storage, _ in pairs)
    workers = min(_MAX_WORKERS, os.cpu_count() or 1) if nbytes >= _MANY_NBYTES else 1
    if workers == 1:
        for pair in pairs:
            _same_storage(*pair)
        return nbytes
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_same_storage, *pair) for pair in pairs]
        try:
            for comparison in running:
                comparison.result()
        finally:
            for comparison in running:
                comparison.cancel()
    return nbytes


def _same_storage(place: str, storage: Storage, written: Storage) -> None:
    difference, crc = first_difference(storage.source, written.source)
    if difference is not None:
        raise CorruptError(f"{place}: the output differs at byte {difference:,} of the storage; nothing was written")
    _check_crc(place, storage, crc)


def _crc32(storage: Storage) -> int | None:
    """The CRC-32 of a storage's bytes, where there is one to hold it against."""
    if storage.crc32 is None:
        return None
    crc = 0
    for chunk in storage.source.chunks():
        crc = zlib.crc32(chunk, crc)
    return crc


def _check_crc(place: str, storage: Storage, crc: int | None) -> None:
    if storage.crc32 is not None and crc != storage.crc32:
        raise CorruptError(
            f"{place}: the bytes have CRC-32 {crc:08x}, recorded is {storage.crc32:08x}: the source is damaged",
            path=storage.source.file.path,
        )


def first_difference(a: ByteSource, b: ByteSource) -> tuple[int | None, int]:
    """Position of the first byte that differs (``None``: equal), and the CRC-32 of ``a`` up to there."""
    if a.nbytes != b.nbytes:
        return min(a.nbytes, b.nbytes), 0
    a, b = a.plain(), b.plain()
    crc = 0
    for start in range(0, a.nbytes, _COMPARED_NBYTES):
        left, right = _buffers(min(_COMPARED_NBYTES, a.nbytes - start))
        a.file.read_into(a.offset + start, left)
        b.file.read_into(b.offset + start, right)
        if left != right:
            return start + next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y), crc
        crc = zlib.crc32(left, crc)
    return None, crc


def _buffers(nbytes: int) -> tuple[bytearray, bytearray]:
    """Two buffers of this size, the last ones of this thread where they fit: fresh memory is what costs."""
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


def _paired_storages(source: Checkpoint, output: Checkpoint) -> Iterator[tuple[str, Storage, Storage]]:
    """Go through both trees side by side; yields each pair of storages with the place it was met at.

    Raises:
        CorruptError: the trees differ in anything else.
    """
    paired: dict[int, object] = {}
    back: dict[int, object] = {}
    values: set[tuple[int, int]] = set()
    lowered = lower_state_dict(source.state_dict), lower_state_dict(output.state_dict)
    stack: list[tuple[str, object, object]] = [("", written_tree(source), output.rest)]
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

    if isinstance(node, TensorEntry):
        scalars = (
            node.storage_offset, node.dtype, node.requires_grad, node.is_parameter, node.is_conj, node.is_neg
        )  # fmt: skip
        return [
            (place, part) for part in (*scalars, node.shape, node.stride, node.subclass, node.attributes, node.storage)
        ]
    if isinstance(node, (list, tuple)):
        return [(under(index), item) for index, item in enumerate(node)]
    if isinstance(node, InertDict):
        return of_pairs(node.pairs)
    if isinstance(node, Object):
        filled = [(place, part) for part in (node.how, node.cls, node.args, node.kwargs, node.state)]
        return [*filled, *((under(i), item) for i, item in enumerate(node.items)), *of_pairs(node.pairs)]
    if isinstance(node, InertSet):
        return [(place, node.frozen), *((place, member) for member in node.members)]
    if isinstance(node, Global):
        return [(place, node.module), (place, node.name)]
    if isinstance(node, PersistentId):
        return [(place, node.pid)]
    return []
