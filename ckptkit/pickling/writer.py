"""Inert tree -> bytes: a pickler for the nodes of `ckptkit.pickling.inert`.

Emits what CPython's pickler emits for the values in the tree (``Lib/pickle.py``): protocol 2, which ``torch.save``
uses, unless the tree came from a higher one.  Sharing and cycles are kept through the memo.  Iterative: nesting costs
no Python stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from struct import Struct, pack

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import LimitError, UnsupportedError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import ABSENT, ITSELF, Global, InertDict, InertSet, Object, PersistentId, children, walk
from ckptkit.pickling.machine import BATCH

__all__ = ["write_pickle"]


_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
"""The opcode that makes a tuple of so many items."""

REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
"""The call that makes a plain tensor of its storage's own type."""

ORDERED = Global("collections", "OrderedDict")


_WRITTEN_OUT = 100
"""Tensors whose sizes are written out; those of the others refer to ones written since."""


def write_pickle(
    root: object, *, lower: Callable[[object], object], protocol: int | None = None, common_sizes: bool = True
) -> bytes:
    """One pickle that, read back, is ``root``.

    Args:
        root: an inert tree.
        lower: from a node that is not an inert node (a tensor, a storage, a marker) to the inert node for it in the
            pickle; called once for each object.  A `TensorEntry` that `REBUILD` makes from its storage and sizes may be
            given as its `Storage`.
        protocol: the one the tree was read with, at least 2; names are understood by it.
        common_sizes: whether many tensors may have their shape and stride in common.

    Raises:
        UnsupportedError: a node that neither the writer nor ``lower`` knows.
        LimitError: more objects contain themselves than any pickler could have written.
    """
    declared = max(protocol or 2, 2)
    writer = _Writer(lower, declared, common_sizes=common_sizes)
    writer.run(root)
    writer.out += b"."
    return bytes(writer.out)


_Sizes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and stride."""


class _Writer:
    """One run over one tree.  Each ``_save_*`` is a generator that yields children, or generators that write them."""

    def __init__(self, lower: Callable[[object], object], protocol: int, *, common_sizes: bool) -> None:
        self.out = bytearray((0x80, protocol))
        self.lower = lower
        self.protocol = protocol
        self.memo: dict[int, int] = {}  # id of a node -> memo index
        self.strings: dict[str, int] = {}
        self.names: dict[tuple[str, str], int] = {}
        self.usual: dict[tuple[int, str], tuple[bytes, bytes, bytes]] = {}  # by storage class and place; see `_tensor`
        self.geometries: dict[tuple[int, int], bytes] = {}  # by shape and stride, both in the memo: their GETs
        self.common: dict[_Sizes, _Sizes] | None = {} if common_sizes else None  # see `_sizes_of`
        self.tensors = 0
        self.memo_size = 0
        self.alive: list[object] = []  # nodes made while writing: an id must not be used twice
        self.path: list[tuple[int, bool]] = []  # being written, outermost first: id, and whether it is an object
        self.begun: dict[int, int] = {}  # id of an object whose call is being written -> its place in the path
        self.repeats = 0
        self.root: object = None
        self.references: Counter[int] | None = None
        self.unset: dict[int, InertDict] = {}  # dicts whose late pairs are not written yet

    def run(self, root: object) -> None:
        self.root = root
        stack: list[Iterator[object]] = [iter((root,))]
        while stack:
            for child in stack[-1]:
                below = child if isinstance(child, Generator) else self._save(child)
                if below is not None:
                    stack.append(below)
                    break
            else:
                stack.pop()
                if not stack and self.unset:
                    stack.append(self._set_late(next(iter(self.unset.values()))))

    def _save(self, node: object) -> Iterator[object] | None:
        """Write a node without children, or return the generator that writes one with."""
        if node is None:
            self.out += b"N"
        elif isinstance(node, bool):
            self.out += b"\x88" if node else b"\x89"
        elif isinstance(node, int):
            self.out += _int(node)
        elif isinstance(node, str):
            self._string(node)
        elif isinstance(node, TensorEntry) and id(node) not in self.memo:
            lowered, sizes = self.lower(node), self._sizes_of(node)
            if not isinstance(lowered, Storage):
                return self._lowered(node, self.lower(replace(node, shape=sizes[0], stride=sizes[1])), node)
            self._tensor(node, lowered, *sizes)
        elif isinstance(node, float):
            self.out += b"G" + pack(">d", node)
        elif isinstance(node, Global):
            is_first = (node.module, node.name) not in self.names
            self._global(node)
            return self._effects(node.effects, node) if node.effects and is_first else None
        elif id(node) in self.memo:
            self._get(self.memo[id(node)])
        elif isinstance(node, bytes):
            return self._bytes(node)
        elif isinstance(node, bytearray):
            self.out += b"\x96" + pack("<Q", len(node)) + bytes(node)
            self._memoize(node)
        else:
            return self._compound(node, node)
        return None

    def _compound(self, node: object, owner: object) -> Iterator[object]:
        """The generator for a node; ``owner`` is the object that the memo remembers it by."""
        if isinstance(node, tuple):
            return self._tuple(node, owner)
        if isinstance(node, list):
            return self._list(node, owner)
        if isinstance(node, InertDict):
            return self._dict(node, owner)
        if isinstance(node, Object):
            return self._object(node, owner)
        if isinstance(node, PersistentId):
            return self._persistent(node)
        if isinstance(node, InertSet):
            return self._set(node, owner)
        return self._lowered(node, self.lower(node), owner)

    def _lowered(self, node: object, lowered: object, owner: object) -> Iterator[object]:
        """The generator for the representation of a node in the pickle."""
        if lowered is node or not isinstance(lowered, (Object, PersistentId, InertDict, list, tuple)):
            raise UnsupportedError(f"a {type(node).__name__} cannot be written into a pickle")
        self.alive.append(lowered)
        return self._compound(lowered, owner)

    # The memo.

    def _put(self) -> int:
        index = self.memo_size
        self.memo_size += 1
        self.out += b"q" + bytes([index]) if index < 256 else b"r" + pack("<I", index)
        return index

    def _memoize(self, node: object) -> None:
        self.memo[id(node)] = self._put()

    def _get(self, index: int) -> None:
        self.out += self._getting(index)

    def _getting(self, index: int) -> bytes:
        return b"h" + bytes([index]) if index < 256 else b"j" + pack("<I", index)

    # Nodes without children.

    def _string(self, text: str) -> None:
        if text in self.strings:
            self._get(self.strings[text])
            return
        raw = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + pack("<I", len(raw)) + raw
        self.strings[text] = self._put()

    def _global(self, node: Global) -> None:
        key = (node.module, node.name)
        if key in self.names:
            self._get(self.names[key])
            return
        if self.protocol >= 4:
            self._string(node.module)
            self._string(node.name)
            self.out += b"\x93"
        else:
            try:
                raw = f"c{node.module}\n{node.name}\n".encode()
            except UnicodeEncodeError:
                raw = b""
            if raw.count(b"\n") != 2:
                raise UnsupportedError(f"the name {key} cannot be written with protocol {self.protocol}")
            self.out += raw
        self.names[key] = self._put()

    def _sizes_of(self, entry: TensorEntry) -> _Sizes:
        """The tensor's shape and stride, as the objects that the memo knows them by.

        Which readers gave several tensors the same tuples must not show: the same checkpoint gives the same bytes.
        """
        self.tensors += 1
        shape, stride = entry.shape, entry.stride
        if self.common is None or self.tensors <= _WRITTEN_OUT or 0 in shape:
            self.alive.append(sizes := ((*shape,), (*stride,)))
            return sizes
        known = self.common.get((shape, stride))
        if known is None:
            known = self.common[shape, stride] = (*shape,), (*stride,)
        return known

    def _tensor(self, entry: TensorEntry, storage: Storage, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        """Write a plain tensor as the other methods would write `ckptkit.pickling.tensors.lower_tensor` of it.

        Of what they would remember nothing is met again but the sizes and the tensor; the others leave their places.
        """
        lowered = self.lower(storage)
        if not isinstance(lowered, PersistentId) or not isinstance(lowered.pid, tuple):
            raise UnsupportedError("a storage without a persistent id cannot be written into a pickle")
        kind, cls, key, location, numel = lowered.pid
        usual = self.usual.get((id(cls), location))
        if usual is not None and key not in self.strings:
            self._usual_tensor(entry, key, numel, shape, stride, *usual)
            return
        self._global(REBUILD)
        self.out += b"(("
        self._string(kind)
        self._global(cls)
        self._string(key)
        self._string(location)
        self.out += _int(numel) + b"t"
        self._put()
        self.out += b"Q" + _int(entry.storage_offset)
        self._sizes(shape)
        self._sizes(stride)
        self.out += b"\x88" if entry.requires_grad else b"\x89"
        self._global(ORDERED)
        for opcodes in (b")R", b"t", b"R"):
            self.out += opcodes
            index = self._put()
        self.memo[id(entry)] = index
        if self.memo_size >= 256:  # from here on all is in the memo that tensors of this class and place have in common
            names = [self.names[each.module, each.name] for each in (REBUILD, cls, ORDERED)]
            call, made, ordered = (self._getting(index) for index in names)
            first, last = (self._getting(self.strings[text]) for text in (kind, location))
            self.alive.append(cls)
            self.usual[id(cls), location] = call + b"((" + first + made, last, ordered

    def _usual_tensor(
        self, entry: TensorEntry, key: str, numel: int, shape: tuple[int, ...], stride: tuple[int, ...],
        before: bytes, place: bytes, after: bytes,
    ) -> None:  # fmt: skip
        """`_tensor` where all names are in the memo, and the key is not."""
        index, raw = self.memo_size, key.encode("utf-8", "surrogatepass")
        self.strings[key] = index
        self.out += b"".join(
            (before, _TEXT(b"X", len(raw)), raw, _TEXT(b"r", index), place, _int(numel),
             _ID(b"tr", index + 1, b"Q"), _int(entry.storage_offset))
        )  # fmt: skip
        self.memo_size = index + 2
        known = self.geometries.get((id(shape), id(stride)))
        if known is not None:
            self.out += known
        else:
            self._sizes(shape)
            self._sizes(stride)
            if shape and stride:
                indices = self.memo[id(shape)], self.memo[id(stride)]
                self.geometries[id(shape), id(stride)] = b"".join(map(self._getting, indices))
        index = self.memo_size
        self.out += (b"\x88" if entry.requires_grad else b"\x89") + after
        self.out += _END(b")Rr", index, b"tr", index + 1, b"Rr", index + 2)
        self.memo_size = index + 3
        self.memo[id(entry)] = index + 2

    def _sizes(self, sizes: tuple[int, ...]) -> None:
        if id(sizes) in self.memo:
            self._get(self.memo[id(sizes)])
        elif not sizes:
            self.out += b")"
        else:
            self.out += b"(" * (len(sizes) > 3) + b"".join(map(_int, sizes)) + _TUPLES.get(len(sizes), b"t")
            self._memoize(sizes)

    # Nodes with children.

    def _bytes(self, node: bytes) -> Iterator[object]:
        if self.protocol >= 3:
            self.out += b"B" + pack("<I", len(node)) + node
        else:  # as Python 3 writes bytes for Python 2; torch's weights-only loader knows this form
            encode = Global("_codecs", "encode")
            yield encode
            yield node.decode("latin-1")
            yield "latin1"
            self.out += b"\x86R"
        self._memoize(node)

    def _tuple(self, node: tuple[object, ...], owner: object) -> Iterator[object]:
        if not node:
            self.out += b")"
            return
        if len(node) > 3:
            self.out += b"("
        yield from node
        if id(owner) in self.memo:  # the tuple contains itself, and was written on the way
            self.out += b"0" * len(node) if len(node) <= 3 else b"1"
            self._get(self.memo[id(owner)])
            return
        self.out += _TUPLES.get(len(node), b"t")
        self._memoize(owner)

    def _list(self, node: list[object], owner: object) -> Iterator[object]:
        self.out += b"]"
        self._memoize(owner)
        self.path.append((id(owner), False))
        yield from self._items(node, b"a", b"e")
        self.path.pop()

    def _dict(self, node: InertDict, owner: object) -> Iterator[object]:
        self.out += b"}"
        self._memoize(owner)
        self.path.append((id(owner), False))
        yield from self._pairs(node.pairs[: node.late_from])
        if node.late_from is not None:
            self.unset[id(node)] = node
        yield from self._effects(node.effects, owner)
        self.path.pop()

    def _set_late(self, node: object) -> Iterator[object]:
        """Set what is set late of a dict, unless that was done, or another node has taken its place."""
        yield node
        unset = self.unset.pop(id(node), None)
        if unset is not None:
            yield from self._pairs(unset.pairs[unset.late_from :])
        self.out += b"0"

    def _set(self, node: InertSet, owner: object) -> Iterator[object]:
        if node.frozen:
            self.out += b"("
            yield from node.members
            if id(owner) in self.memo:
                self.out += b"1"
                self._get(self.memo[id(owner)])
                return
            self.out += b"\x91"
            self._memoize(owner)
            yield from self._effects(node.effects, owner)
            return
        self.out += b"\x8f"
        self._memoize(owner)
        self.path.append((id(owner), False))
        for start in range(0, len(node.members), BATCH):
            self.out += b"("
            yield from node.members[start : start + BATCH]
            self.out += b"\x90"
        yield from self._effects(node.effects, owner)
        self.path.pop()

    def _persistent(self, node: PersistentId) -> Iterator[object]:
        # Never memoized: a pickler asks for the persistent id each time it meets the object.
        yield node.pid
        self.out += b"Q"

    def _object(self, node: Object, owner: object) -> Iterator[object]:
        forgotten = self._forget_unfinished(owner)
        before = self.begun.get(id(owner))
        self.begun[id(owner)] = len(self.path)
        self.path.append((id(owner), True))
        yield from self._call(node)
        if before is None:
            del self.begun[id(owner)]
        else:
            self.begun[id(owner)] = before
        for key, index in forgotten.items():
            self.memo.setdefault(key, index)
        if id(owner) in self.memo:  # its arguments led back to it, and it was written on the way
            self.out += b"0"
            self._get(self.memo[id(owner)])
        else:
            self._memoize(owner)
            yield from self._items(node.items, b"a", b"e")
            yield from self._pairs(node.pairs)
            if node.state is not ABSENT:
                yield node.state
                self.out += b"b"
            yield from self._effects(node.effects, owner)
        self.path.pop()

    def _effects(self, calls: Sequence[Object], owner: object) -> Iterator[object]:
        """Call what is called for its effect, and drop the result, as pickle does with a ``state_setter``."""
        for call in calls:
            if call.how == "setitems":
                yield from self._set_late(call.cls)
                continue
            args = tuple(owner if part is ITSELF else part for part in call.args)
            self.alive.append(args)
            yield call.cls
            yield args
            self.out += b"R0"

    def _call(self, node: Object) -> Iterator[object]:
        if node.how == "obj":
            self.out += b"("
            yield node.cls
            yield from node.args
            self.out += b"o"
        else:
            yield node.cls
            yield node.args
            if node.how == "newobj_ex":
                yield node.kwargs
            self.out += {"reduce": b"R", "newobj": b"\x81", "newobj_ex": b"\x92"}[node.how]

    def _forget_unfinished(self, owner: object) -> dict[int, int]:
        """Where an object's arguments led back to it, the memo entries of what its call would find unfinished.

        ``set([b])`` whose member ``b`` holds that set: when the set is met inside ``b``, the list is not filled yet,
        and a call reads its arguments at once.  As a pickler asks the object for new arguments then, the list is
        written again.  That ends because ``b`` is remembered; where nothing on the way is, the arguments themselves
        lead back, and are meant to be unfinished.
        """
        unfinished: dict[int, int] = {}
        for place in range(self.begun.get(id(owner), len(self.path)) + 1, len(self.path)):
            key, is_object = self.path[place]
            if key not in self.memo:
                continue
            if is_object:
                self.repeats += 1
                if self.repeats > DEFAULT_LIMITS.repeated_calls:
                    what, most = "objects whose arguments lead back to them", DEFAULT_LIMITS.repeated_calls
                    raise LimitError(what, limit=most, actual=self.repeats)
                for found in unfinished:
                    del self.memo[found]
                return unfinished
            if not self._is_shared(key):  # a pickler would not write it again either
                unfinished[key] = self.memo[key]
        return {}

    def _is_shared(self, key: int) -> bool:
        """Whether more than one node of the tree refers to one."""
        if self.references is None:
            below = (id(child) for node in walk(self.root) for child in children(node))
            self.references = Counter(below)
        return self.references[key] > 1

    def _items(self, items: Sequence[object], one: bytes, many: bytes) -> Iterator[object]:
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            if len(batch) > 1:
                self.out += b"("
            yield from batch
            self.out += many if len(batch) > 1 else one

    def _pairs(self, pairs: Sequence[tuple[object, object]]) -> Iterator[object]:
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            if len(batch) > 1:
                self.out += b"("
            for key, value in batch:  # a hundred thousand of some dicts: what can be is written at once
                for node in (key, value):
                    below = self._save(node)
                    if below is not None:
                        yield below
            self.out += b"u" if len(batch) > 1 else b"s"


_TEXT, _ID, _END = Struct("<cI").pack, Struct("<2sIc").pack, Struct("<3sI2sI2sI").pack
_BYTES = [b"K" + bytes([value]) for value in range(1 << 8)]


def _int(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return _BYTES[value]
    if 0 <= value < 1 << 16:
        return b"M" + pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + pack("<i", len(raw)) + raw
