"""What ``.metadata`` says a million times, read by patterns into columns: no node a chunk, no memo entry a field.

``pickle.dump`` of protocol 4 and later writes every chunk but the first with the same opcodes, every stored item, every
tensor and every planned write likewise (``torch/distributed/checkpoint/metadata.py``, ``filesystem.py``,
``planner.py``); here PUT is MEMOIZE, KEY and CLASS are BINGET or LONG_BINGET of what the first one wrote::

    OBJECT   CLASS EMPTY_TUPLE NEWOBJ PUT EMPTY_DICT PUT MARK (KEY VALUE)... SETITEMS BUILD
    SIZE     CLASS ``torch.Size``, numbers, TUPLE PUT TUPLE1 PUT REDUCE PUT; or the GET of one
    chunk    ChunkStorageMetadata: offsets SIZE, sizes SIZE
    item     MetadataIndex: fqn TEXT, index INT or NONE, offset SIZE (of a tensor);
             _StorageInfo: relative_path TEXT, offset INT, length INT, transform_descriptors [TEXT] (if any)
    tensor   TEXT, TensorStorageMetadata: properties TensorProperties, size SIZE, chunks LIST of chunks
    bytes    TEXT, BytesStorageMetadata, which has no state
    write    WriteItem: index MetadataIndex, type, bytes_io_data NONE, tensor_data NONE or TensorWriteData

`Runs` takes over when the machine has built the first of a kind, continues as long as the bytes have exactly that form,
and leaves one `Run` on the machine's stack for all of them; FRAMEs, and anything of another form, are left to the
machine.  Each `Run` must be in its place exactly once when the pickle ends, and only sizes and texts are returned for
memo entries that were left out: a pickle that does anything else with them is `Runs.is_odd`, and is read again without
runs.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from ckptkit.errors import LimitError
from ckptkit.formats.distributed.dcp_patterns import Match, index_of, number_of, pattern_of, puts_of, spelled
from ckptkit.pickling.inert import Global, Object
from ckptkit.pickling.machine import Machine
from ckptkit.pickling.shortcut import whole_numbers

__all__ = ["BYTES", "LEFT_OUT", "Columns", "Memo", "Run", "Runs", "TensorRow"]

_KEYS = frozenset(
    {"fqn", "index", "offset", "offsets", "sizes", "relative_path", "length", "transform_descriptors", "properties",
     "size", "chunks", "type", "bytes_io_data", "tensor_data", "chunk"}
)  # fmt: skip
"""Attributes of all these objects."""

_SIZE_PUTS = 3
"""PUTs of a size; of one without dimensions they are two."""

_MOST_TRIES = 4
"""How often a pattern is searched for: something it needs may be named only later."""

_MOST_KNOWN = 200_000
"""Sizes, texts and numbers that are kept by how they are spelled."""


class _Marker:
    """Type of placeholders for nodes that were not made."""

    __slots__ = ()


LEFT_OUT = _Marker()
"""The result of a reference to a node that was left out."""

BYTES = _Marker()
"""Placeholder for a ``BytesStorageMetadata``, which contains nothing."""


class Run:
    """Rows of a column, from ``start`` up to ``stop``, in the place of as many nodes."""

    __slots__ = ("kind", "start", "stop")

    def __init__(self, kind: str, start: int, stop: int) -> None:
        self.kind = kind
        self.start = start
        self.stop = stop


class TensorRow(NamedTuple):
    """One tensor: its name, and what `Runs` has read of it.

    Attributes:
        name: the fqn.
        dtype: the node of its dtype; of bytes `BYTES`.
        layout, requires_grad: as pickled.
        shape: its size.
        start, stop: of its chunks among `Columns.offsets`.
    """

    name: str
    dtype: object
    layout: object = None
    requires_grad: object = False
    shape: tuple[int, ...] = ()
    start: int = 0
    stop: int = 0


class Columns:
    """The result of reading; rows of one kind have one index.

    Attributes:
        offsets, sizes: of chunks.
        names, places, paths, starts, lengths, transforms: of stored items: the fqn, the offset of the chunk (``None``:
            bytes), the file, first byte and number of bytes in it, names of what the bytes went through.
        tensors: what `Run` of a tensor counts.
    """

    def __init__(self) -> None:
        self.offsets: list[tuple[int, ...]] = []
        self.sizes: list[tuple[int, ...]] = []
        self.names: list[str] = []
        self.places: list[tuple[int, ...] | None] = []
        self.paths: list[str] = []
        self.starts = array("q")
        self.lengths = array("q")
        self.transforms: list[tuple[str, ...]] = []
        self.tensors: list[TensorRow] = []


class Memo(dict[int, object]):
    """A memo that counts entries which were left out, and makes those that are asked for.

    Attributes:
        count: entries, with those.
        made: entries that there are.
        is_odd: whether an entry was replaced, or a `Run` kept: no pickler of these files does either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.made = 0
        self.is_odd = False
        self.bases = array("Q")
        self.positions = array("Q")
        self.entries: Callable[[int], list[object]] = lambda position: []

    def __len__(self) -> int:
        return self.count

    def __setitem__(self, index: int, value: object) -> None:
        if index != self.count or value.__class__ is Run:
            self.is_odd = True
        self.count += 1
        self.made += 1
        super().__setitem__(index, value)

    def keep(self, index: int, value: object) -> None:
        """Make an entry that was left out: most pickles ask for it."""
        self.made += 1
        super().__setitem__(index, value)

    def __missing__(self, index: int) -> object:
        """The entries that a left-out record wrote there."""
        at = bisect_right(self.bases, index) - 1
        entries = self.entries(self.positions[at]) if at >= 0 else []
        if at < 0 or index - self.bases[at] >= len(entries):
            raise KeyError(index)
        return entries[index - self.bases[at]]


class Runs:
    """Reads runs of records; the `Hold` of one pickle.

    Args:
        most: chunks, items and tensors there may be, of each.

    Attributes:
        columns: the values read.
        memo: the machine's.
    """

    def __init__(self, most: int) -> None:
        self.columns = Columns()
        self.memo = Memo()
        self.memo.entries = self._entries
        self._most = most
        self._data = b""
        self._frame_end = 0
        self._looked = 0
        self._tries: dict[str, int] = {}
        self._patterns: dict[str, tuple[Match, bytes]] = {}
        self._gets: dict[tuple[bool, str], bytes] = {}
        self._classes: dict[str, Global] = {}
        self._calls = Counter[str]()
        self._sizes: dict[bytes, tuple[int, ...]] = {}
        self._texts: dict[bytes, str] = {}
        self._lists: dict[bytes | None, tuple[str, ...]] = {None: ()}
        self._numbers: dict[bytes, int] = {}

    def data(self, machine: Machine, nbytes: int, /) -> bool:
        """Bytes in these pickles are left to the machine."""
        return False

    def built(self, machine: Machine, target: Object, /) -> None:
        """Continue after an object of a known class."""
        name = target.cls.name if isinstance(target.cls, Global) else ""
        runs = _RUNS.get(name)
        if runs is None or self.memo.is_odd:
            return
        kind, run = runs
        if kind not in self._patterns and not self._prepare(kind, machine):
            return
        self._data, self._frame_end = machine.data, machine.frame_end
        self.memo.is_odd |= self._classes[name] is not target.cls
        start, stop, machine.pos = run(self, machine.pos)
        if stop > start:
            place = Run(kind, start, stop)
            machine.stack += (place, place) if kind in ("item", "tensor") else (place,)
        for called, calls in self._calls.items():
            if called in self._classes:
                self._classes[called].calls += calls
        self._calls.clear()
        if max(len(self.columns.offsets), len(self.columns.names), len(self.columns.tensors)) > self._most:
            raise LimitError("chunks of a checkpoint", limit=self._most, actual=self._most + 1)

    # Patterns.

    def _prepare(self, kind: str, machine: Machine) -> bool:
        """Make the pattern of a kind of what the memo names; whether it could be made."""
        self._tries[kind] = self._tries.get(kind, 0) + 1
        if self._tries[kind] > _MOST_TRIES:
            return False
        looked, self._looked = self._looked, self.memo.made
        for index, value in islice(self.memo.items(), looked, None):
            if isinstance(value, Global):
                self._classes.setdefault(value.name, value)
                self._gets.setdefault((True, value.name), spelled(index))
            elif isinstance(value, str) and value in _KEYS:
                self._gets.setdefault((False, value), spelled(index))
        try:
            for needed in ("chunk", kind):
                if needed not in self._patterns:
                    self._patterns[needed] = pattern_of(needed, self._gets)
        except KeyError:
            return False
        return True

    # Runs: each from a position to the first and last row, and the position after them.

    def _chunks(self, at: int) -> tuple[int, int, int]:
        columns, memo, end = self.columns, self.memo, self._frame_end
        match, data, sizes = self._patterns["chunk"][0], self._data, self._sizes
        start, base = len(columns.offsets), memo.count
        add_offsets, add_sizes = columns.offsets.append, columns.sizes.append
        note_base, note_position = memo.bases.append, memo.positions.append
        while (found := match(data, at)) is not None and found.end() <= end:
            offset, get_offset, size, get_size = found.groups()
            offsets = sizes.get(offset) or self._size(offset, get_offset)
            extent = sizes.get(size) or self._size(size, get_size)
            if offsets is None or extent is None:
                break
            add_offsets(offsets)
            add_sizes(extent)
            note_base(base)
            note_position(at)
            base += 2 + puts_of(offset) + puts_of(size)
            at = found.end()
        count = len(columns.offsets) - start
        self._calls["ChunkStorageMetadata"] += count
        self._calls["Size"] += (base - memo.count - 2 * count) // _SIZE_PUTS
        memo.count = base
        return start, start + count, at

    def _items(self, at: int) -> tuple[int, int, int]:
        columns, memo, end = self.columns, self.memo, self._frame_end
        match, data, sizes, texts = self._patterns["item"][0], self._data, self._sizes, self._texts
        start, base = len(columns.names), memo.count
        numbers, full = self._numbers, 0
        while (found := match(data, at)) is not None and found.end() <= end:
            name, place, get_place, path, first, length, transforms = found.groups()
            fqn = texts.get(name) or self._text(name)
            file = texts.get(path) or self._text(path)
            is_tensor = place is not None or get_place is not None
            offsets = (sizes.get(place) or self._size(place, get_place)) if is_tensor else None
            through = self._lists.get(transforms)
            if through is None:
                text = self._text(transforms)
                through = None if text is None else (text,)
            if fqn is None or file is None or through is None or (offsets is None and is_tensor):
                break
            columns.names.append(fqn)
            columns.places.append(offsets)
            columns.paths.append(file)
            columns.starts.append(number_of(first))
            columns.lengths.append(numbers[length] if length in numbers else self._kept_number(length))
            columns.transforms.append(through)
            memo.bases.append(base)
            memo.positions.append(at)
            base += 4 + (name[0] in b"\x8cX") + puts_of(place) + (path[0] in b"\x8cX")
            base += 0 if transforms is None else 1 + (transforms[0] in b"\x8cX")
            full += place is not None
            at = found.end()
        memo.count = base
        count = len(columns.names) - start
        self._calls.update(MetadataIndex=count, _StorageInfo=count, Size=full)
        return start, start + count, at

    def _tensors(self, at: int) -> tuple[int, int, int]:
        columns, memo, data = self.columns, self.memo, self._data
        match, calls = self._patterns["tensor"][0], self._calls
        start = len(columns.tensors)
        while (found := match(data, at)) is not None and found.end() <= self._frame_end:
            name, nothing, dtype, layout, grad, memory_format, size, get_size = found.groups()
            before = len(columns.offsets), len(memo.bases), memo.count
            called = calls["ChunkStorageMetadata"], calls["Size"]
            memo.bases.append(memo.count)
            memo.positions.append(at)
            memo.count += name[0] in b"\x8cX"
            text = self._text(name)
            if nothing is not None:
                memo.count += 1
                row, end = None if text is None else TensorRow(text, BYTES), found.end()
            else:
                shape = self._sizes.get(size) or self._size(size, get_size)
                memo.count += 5 + puts_of(size)
                end = self._listed(found.end())
                row = None
                if text is not None and shape is not None and end and index_of(memory_format) < before[2]:
                    row = TensorRow(
                        text, memo[index_of(dtype)], memo[index_of(layout)], grad == b"\x88", shape, before[0],
                        len(columns.offsets),
                    )  # fmt: skip
            if row is None or end > self._frame_end:
                del columns.offsets[before[0] :], columns.sizes[before[0] :]
                del memo.bases[before[1] :], memo.positions[before[1] :]
                memo.count = before[2]
                calls["ChunkStorageMetadata"], calls["Size"] = called
                break
            if name[0] in b"\x8cX":
                memo.keep(before[2], row.name)
            columns.tensors.append(row)
            calls["BytesStorageMetadata" if nothing is not None else "TensorStorageMetadata"] += 1
            calls["Size"] += size is not None
            at = end
        calls["TensorProperties"] += calls["TensorStorageMetadata"]
        return start, len(columns.tensors), at

    def _listed(self, at: int) -> int:
        """The position after a tensor's list of chunks, and what ends the tensor; 0: they are shaped differently."""
        data = self._data
        while data[at : at + 1] != b"u":
            if data[at : at + 1] == b"(":
                start, stop, at = self._chunks(at + 1)
                if stop == start or data[at : at + 1] != b"e":
                    return 0
            else:
                found = self._patterns["chunk"][0](data, at)
                if found is None or data[found.end() : found.end() + 1] != b"a" or found.end() >= self._frame_end:
                    return 0
                # The pattern takes as many as there are: one, before APPEND.
                _, _, at = self._chunks(at)
                if at != found.end():
                    return 0
            at += 1
        return at + 2 if data[at : at + 2] == b"ub" else 0

    def _writes(self, at: int) -> tuple[int, int, int]:
        """Planned writes, none of which is kept."""
        memo, count = self.memo, 0
        match = self._patterns["write"][0]
        while (found := match(self._data, at)) is not None and found.end() <= self._frame_end:
            entries = self._written(found)
            gets = found.group(3, 4, 8, 10, 11, 13, 14, 15, 16, 18)
            if self._text(found[1]) is None or any(get and index_of(get) >= memo.count + len(entries) for get in gets):
                break
            memo.bases.append(memo.count)
            memo.positions.append(at)
            memo.count += len(entries)
            self._calls.update(
                WriteItem=1, MetadataIndex=1, TensorWriteData=found[5] is not None,
                ChunkStorageMetadata=found[6] is not None, TensorProperties=found[12] is not None,
                Size=sum(each is not None for each in found.group(2, 7, 9, 17)),
            )  # fmt: skip
            at = found.end()
            count += 1
        return 0, count, at

    # What they have in common.

    def _size(self, dimensions: bytes | None, get: bytes | None) -> tuple[int, ...] | None:
        """A size by its opcodes, or of the memo; ``None``: no such thing is there."""
        if dimensions is None:
            gotten = self.memo.get(index := index_of(get or b"h\0"))
            gotten = self._gotten(index) if gotten is None else gotten
            is_size = isinstance(gotten, tuple) and all(number.__class__ is int for number in gotten)
            return gotten if is_size else None  # type: ignore[return-value]
        if len(self._sizes) >= _MOST_KNOWN:
            self._sizes.clear()
        known = self._sizes[dimensions] = whole_numbers(dimensions)
        return known

    def _gotten(self, index: int) -> object:
        try:
            return self.memo[index]
        except KeyError:
            return None

    def _text(self, raw: bytes) -> str | None:
        """A text by its opcodes, or of the memo; ``None``: it is not one, or longer than it is declared to be."""
        text: object
        if raw[0] in b"hj":
            text = self._gotten(index_of(raw))
        else:
            start = 2 if raw[0] == 0x8C else 5
            if int.from_bytes(raw[1:start], "little") != len(raw) - start - 1:
                return None
            try:
                text = str(raw[start:-1], "utf-8", "surrogatepass")
            except UnicodeDecodeError:
                return None
        if not isinstance(text, str):
            return None
        if len(self._texts) >= _MOST_KNOWN:
            self._texts.clear()
        self._texts[raw] = text
        return text

    def _kept_number(self, raw: bytes) -> int:
        if len(self._numbers) >= _MOST_KNOWN:
            self._numbers.clear()
        number = self._numbers[raw] = number_of(raw)
        return number

    # The memo's entries that were left out.

    def _entries(self, at: int) -> list[object]:
        """The entries that the record at a position wrote to the memo, in order."""
        for kind, (match, head) in self._patterns.items():
            if self._data.startswith(head, at) and (found := match(self._data, at)) is not None:
                return _ENTRIES[kind](self, found)
        return []

    def _put_size(self, dimensions: bytes | None) -> list[object]:
        return [] if dimensions is None else [*[LEFT_OUT] * (puts_of(dimensions) - 1), self._size(dimensions, None)]

    def _put_text(self, raw: bytes | None) -> list[object]:
        return [self._text(raw)] if raw and raw[0] in b"\x8cX" else []

    def _chunk_entries(self, found: re.Match[bytes]) -> list[object]:
        return [LEFT_OUT, LEFT_OUT, *self._put_size(found[1]), *self._put_size(found[3])]

    def _item_entries(self, found: re.Match[bytes]) -> list[object]:
        index = [LEFT_OUT, LEFT_OUT, *self._put_text(found[1]), *self._put_size(found[2])]
        transforms = [LEFT_OUT, *self._put_text(found[7])] if found[7] else []
        return [*index, LEFT_OUT, LEFT_OUT, *self._put_text(found[4]), *transforms]

    def _tensor_entries(self, found: re.Match[bytes]) -> list[object]:
        if found[2] is not None:
            return [*self._put_text(found[1]), LEFT_OUT]
        return [*self._put_text(found[1]), *[LEFT_OUT] * 4, *self._put_size(found[7]), LEFT_OUT]

    def _written(self, found: re.Match[bytes]) -> list[object]:
        name, place, tensor, chunk, offset, size, properties, shape = found.group(1, 2, 5, 6, 7, 9, 12, 17)
        entries = [*[LEFT_OUT] * 4, *self._put_text(name), *self._put_size(place)]
        if tensor is not None:
            entries += [LEFT_OUT, LEFT_OUT]
            if chunk is not None:
                entries += [LEFT_OUT, LEFT_OUT, *self._put_size(offset), *self._put_size(size)]
            entries += [LEFT_OUT, LEFT_OUT] if properties is not None else []
            entries += self._put_size(shape)
        return entries


_RUNS: dict[str, tuple[str, Callable[[Runs, int], tuple[int, int, int]]]] = {
    "ChunkStorageMetadata": ("chunk", Runs._chunks),
    "_StorageInfo": ("item", Runs._items),
    "TensorStorageMetadata": ("tensor", Runs._tensors),
    "WriteItem": ("write", Runs._writes),
}

_ENTRIES: dict[str, Callable[[Runs, re.Match[bytes]], list[object]]] = {
    "chunk": Runs._chunk_entries,
    "item": Runs._item_entries,
    "tensor": Runs._tensor_entries,
    "write": Runs._written,
}
