"""Inert trees compared: the one walk that looks at everything that makes up a tree.

`side_by_side` compares two trees part by part, by one of two rules:

- `Identical`: node for node as the files say it, devices, strides and order included; what was one object must still be
  one.  So an output is checked against what it was written from.
- `SameContent`: what two files mean (`ckptkit.normalize.content`).  Tensors are compared by their values, mappings key
  by key.  Whether two places hold one object or two equal ones does not matter.  The order of keys does, but for names
  of tensors, as in a state_dict.

Trees come from strangers: they share nodes, contain cycles, are 100,000 deep and are never hashed by content.
Everything here is iterative, and takes time in proportion to both trees.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from ckptkit.checkpoint import STATE_DICT, Storage, TensorEntry
from ckptkit.normalize.content import HERE, PLAIN, form_of, is_ordered, meant, token_of
from ckptkit.normalize.sections import brief, is_plain_value, join
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId, effects_of
from ckptkit.pickling.tensors import is_tensor_like

__all__ = ["FLAGS", "Identical", "Met", "Place", "SameContent", "shown", "side_by_side"]

_MAX_STEPS = 64
_MAX_PLACE = 400
"""Steps and characters of a place after which it is not made longer."""

_SHOWN = 60
"""Characters of a value in a message."""


class Place(NamedTuple):
    """Where a node is: the step that leads to it, and those above."""

    above: Place | None = None
    label: object = HERE
    steps: int = 0
    in_tensor: bool = False
    """Whether it is in a part of a tensor that is not a plain one."""

    def below(self, label: object) -> Place:
        """The place of a part."""
        if label is HERE or self.steps >= _MAX_STEPS:
            return self
        return Place(self, label, self.steps + 1, self.in_tensor)

    def __str__(self) -> str:
        labels = []
        place: Place | None = self
        while place is not None:
            labels.append(place.label)
            place = place.above
        path = ""
        for label in reversed(labels):
            if label is not HERE and len(path) <= _MAX_PLACE:
                path = join(path, label)
        return path


class Met(NamedTuple):
    """Two nodes in one place that differ, or two tensors or storages whose bytes must be compared.

    Attributes:
        place: of both; ``a``, ``b``: the two nodes, `ABSENT` if there is none.
        how: ``"differs"``; ``"kinds"``: so much that their parts cannot be compared; ``"order"``: only the keys are in
            another order; ``"parted"``: one object became two, or the other way round; ``"bytes"``: the known facts
            agree, and the bytes are left to compare.
    """

    place: Place
    a: object
    b: object
    how: str = "differs"

    @property
    def is_tensor(self) -> bool:
        """Whether both are tensors, or parts of tensors: one that only one file has is another matter."""
        if self.a is ABSENT or self.b is ABSENT or self.how == "order":
            return False
        return self.place.in_tensor or all(isinstance(x, Storage) or is_tensor_like(x) for x in (self.a, self.b))


_Part = tuple[object, object]
_Pairs = list[tuple[Place, object, object]]


class _Rule(Protocol):
    by_meaning: bool

    def met(self, a: object, b: object) -> bool | None:
        """Whether two nodes, met before, may be in one place; ``None``: they were not met."""

    def compare(self, place: Place, a: object, b: object) -> tuple[Iterable[Met], _Pairs]:
        """What differs of two nodes themselves, and their parts in pairs: all, once that was processed."""


def side_by_side(
    roots: Sequence[tuple[Place, object, object]], rule: _Rule, weights: tuple[object, object] = (STATE_DICT,) * 2
) -> Iterator[Met]:
    """Compare pairs of trees in the order of the file.

    Args:
        roots: the trees, each pair with its place.
        rule: `Identical` or `SameContent`.
        weights: the node in the place of the marker `STATE_DICT` in both.
    """
    stack = list(reversed(roots))
    while stack:
        place, a, b = stack.pop()
        a, b = weights[0] if a is STATE_DICT else a, weights[1] if b is STATE_DICT else b
        if rule.by_meaning:
            a, b = meant(a), meant(b)
        if isinstance(a, PLAIN) or isinstance(b, PLAIN):
            if not _same_scalar(a, b):
                yield Met(place, a, b)
            continue
        if (a is STATE_DICT) is not (b is STATE_DICT):
            yield Met(place, a, b)
            continue
        known = rule.met(a, b)
        if known is not None:
            if not known:
                yield Met(place, a, b, "parted")
            continue
        found, below = rule.compare(place, a, b)
        yield from found
        stack.extend(reversed(below))


def _is_same_scalar(a: object, b: object) -> bool:
    return isinstance(a, PLAIN) and _same_scalar(a, b)


def _same_scalar(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)  # NaN is not equal to itself, but -0.0 is equal to 0.0
    return type(a) is type(b) and a == b


def shown(a: object, b: object) -> tuple[str | None, str | None]:
    """Two values that differ, 60 characters of each at most, from where long texts differ; ``None`` for nothing."""
    first = 0
    if isinstance(a, (str, bytes, bytearray)) and type(a) is type(b) and max(len(a), len(b)) > _SHOWN:
        pairs = enumerate(zip(a, b, strict=False))
        first = max(next((i for i, (x, y) in pairs if x != y), min(len(a), len(b))) - 10, 0)
    return _shown(a, first), _shown(b, first)


def _shown(node: object, first: int) -> str | None:
    if node is ABSENT:
        return None
    if isinstance(node, (str, bytes, bytearray)):
        cut = node[first : first + _SHOWN]
        return "…" * (first > 0) + repr(cut) + "…" * (len(node) > first + _SHOWN)
    if isinstance(node, TensorEntry):
        return f"{node.dtype} {list(node.shape)}"
    return f"{node.nbytes:,} bytes" if isinstance(node, Storage) else brief(node)


class Identical:
    """Two trees node for node; sharing and ties are part of them."""

    by_meaning = False

    def __init__(self) -> None:
        self._paired: dict[int, object] = {}
        self._back: dict[int, object] = {}
        self._values: set[tuple[int, int]] = set()

    def met(self, a: object, b: object) -> bool | None:
        """See `side_by_side`."""
        if isinstance(a, (Global, tuple)):
            # Values without identity: the writer may join equal ones, and a reader part them.
            if (id(a), id(b)) in self._values:
                return True
            self._values.add((id(a), id(b)))
            return None
        if id(a) in self._paired or id(b) in self._back:
            return self._paired.get(id(a)) is b and self._back.get(id(b)) is a
        self._paired[id(a)], self._back[id(b)] = b, a
        return None

    def compare(self, place: Place, a: object, b: object) -> tuple[Iterable[Met], _Pairs]:
        """See `side_by_side`."""
        if isinstance(a, Storage) and isinstance(b, Storage):
            same = (a.dtype, a.nbytes, a.location) == (b.dtype, b.nbytes, b.location)
            return [Met(place, a, b, "bytes" if same else "differs")], []
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry) and is_plain_value(a) and is_plain_value(b):
            if _geometry(a) != _geometry(b):
                return [Met(place, a, b)], []
            known = self.met(a.storage, b.storage)
            if known is None:
                return self.compare(place, a.storage, b.storage)
            return [] if known else [Met(place, a.storage, b.storage, "parted")], []
        (count, parts), (other, others) = _exact_parts(a), _exact_parts(b)
        if type(a) is not type(b) or count != other:
            return [Met(place, a, b)], []
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry) and _geometry(a) != _geometry(b):
            return [Met(place, a, b)], []
        below: _Pairs = []
        return self._in_turn(place, zip(parts, others, strict=True), below), below

    def _in_turn(self, place: Place, parts: Iterable[tuple[_Part, _Part]], below: _Pairs) -> Iterator[Met]:
        """The first of a node's parts, as long as they are plain tensors that agree; the others go ``below``.

        For a state_dict these are all, perhaps a hundred thousand: no list is made of them.
        """
        paired, back = self._paired, self._back
        for (at, a), (_, b) in parts:
            if type(a) is str and a == b:
                continue
            if not below and isinstance(a, TensorEntry) and isinstance(b, TensorEntry) and self._are_alike(a, b):
                x, y = a.storage, b.storage
                paired[id(a)], paired[id(x)], back[id(b)], back[id(y)] = b, y, a, x
                yield Met(place.below(at), x, y, "bytes")
            else:
                below.append((place.below(at), a, b))

    def _are_alike(self, a: TensorEntry, b: TensorEntry) -> bool:
        """Whether nothing about two plain tensors needs a closer look: neither they nor their storages were met."""
        x, y = a.storage, b.storage
        paired, back = self._paired, self._back
        return (
            is_plain_value(a)
            and is_plain_value(b)
            and _geometry(a) == _geometry(b)
            and (x.dtype, x.nbytes, x.location) == (y.dtype, y.nbytes, y.location)
            and not (id(a) in paired or id(x) in paired or id(b) in back or id(y) in back)
        )


def _geometry(entry: TensorEntry) -> tuple[object, ...]:
    flags = entry.requires_grad, entry.is_parameter, entry.is_conj, entry.is_neg
    return entry.dtype, entry.storage_offset, entry.shape, entry.stride, flags


def _exact_parts(node: object) -> tuple[int, Iterator[_Part]]:
    """Everything that makes up a node, one level deep: how many parts, and each with its label."""
    parts: list[_Part] = []
    pairs: list[tuple[object, object]] = []
    if isinstance(node, TensorEntry):
        parts = [(HERE, node.storage)]
        if node.subclass is not None or node.attributes is not None:
            parts += [(HERE, node.subclass), (HERE, node.attributes)]
    elif isinstance(node, (list, tuple)):
        return len(node), iter(enumerate(node))
    elif isinstance(node, InertDict):
        pairs = node.pairs
    elif isinstance(node, Object):
        parts = [(HERE, part) for part in (node.how, node.cls, node.args, node.kwargs, node.state)]
        parts += enumerate(node.items)
        pairs = node.pairs
    elif isinstance(node, InertSet):
        parts = [(HERE, part) for part in (node.frozen, *node.members)]
    elif isinstance(node, Global):
        parts = [(HERE, node.module), (HERE, node.name)]
    elif isinstance(node, PersistentId):
        parts = [(HERE, node.pid)]
    calls = effects_of(node)
    keyed = ((key, part) for pair in pairs for key, part in ((pair[0], pair[0]), pair))
    return len(parts) + 2 * len(pairs) + len(calls), chain(parts, keyed, ((HERE, call) for call in calls))


class SameContent:
    """Two trees by what they mean; tensors by their values, whatever they are in.

    Nodes that were met are joined (as Hopcroft and Karp compare automata): each pair leaves one group of nodes less, so
    that shared nodes and cycles end, in linear time.

    Args:
        flags: whether it matters which tensors are parameters and need gradients.
    """

    by_meaning = True

    def __init__(self, *, flags: bool = True) -> None:
        self._flags = flags
        self._above: dict[int, int] = {}
        self._kept: list[object] = []  # keeps every id alive

    def met(self, a: object, b: object) -> bool | None:
        """See `side_by_side`."""
        x, y = self._group(id(a)), self._group(id(b))
        if x == y:
            return True
        self._above[x] = y
        self._kept += (a, b)
        return None

    def _group(self, key: int) -> int:
        above = self._above
        while (parent := above.get(key, key)) != key:
            above[key] = key = above.get(parent, parent)
        return key

    def compare(self, place: Place, a: object, b: object) -> tuple[Iterable[Met], _Pairs]:
        """See `side_by_side`."""
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
            same = (a.dtype, a.shape) == (b.dtype, b.shape)
            below = [(place, a.subclass, b.subclass), (place, a.attributes, b.attributes)]
            below.append((place, effects_of(a), effects_of(b)))
            if self._flags:
                below += [(place.below(name), getattr(a, name), getattr(b, name)) for name in FLAGS]
            return [Met(place, a, b, "bytes" if same else "differs")], below
        if isinstance(a, Storage) and isinstance(b, Storage):
            same = (a.dtype, a.nbytes, a.byteorder) == (b.dtype, b.nbytes, b.byteorder)
            return [Met(place, a, b, "bytes" if same else "differs")], []
        if isinstance(a, (list, tuple)) and type(a) is type(b):
            # Of ten million equal numbers no pair is made.
            pairs = enumerate(zip(a, b, strict=False))
            below = [(place.below(at), x, y) for at, (x, y) in pairs if not _is_same_scalar(x, y)]
            return [Met(place, a, b)] * (len(a) != len(b)), below
        if not place.in_tensor and is_tensor_like(a) and is_tensor_like(b):
            place = place._replace(in_tensor=True)
        ours, theirs = form_of(a), form_of(b)
        found = [] if ours.kind == theirs.kind and len(ours.parts) == len(theirs.parts) else [Met(place, a, b)]
        if ours.kind != theirs.kind and not ours.may_be(theirs):
            return [Met(place, a, b, "kinds")], []
        below = [(place.below(at), x, y) for (at, x), (_, y) in zip(ours.parts, theirs.parts, strict=False)]
        self._mappings(place, (a, b), ours.pairs, theirs.pairs, found, below)
        return found, below

    def _mappings(
        self,
        place: Place,
        nodes: tuple[object, object],
        ours: list[tuple[object, object]],
        theirs: list[tuple[object, object]],
        found: list[Met],
        below: _Pairs,
    ) -> None:
        tokens = [[token_of(key) for key, _ in pairs] for pairs in (ours, theirs)]
        if tokens[0] == tokens[1] and None not in tokens[0] and len(set(tokens[0])) == len(ours):
            below += [(place.below(key), x, y) for (key, x), (_, y) in zip(ours, theirs, strict=True)]
            return
        if None in tokens[0] or None in tokens[1]:  # keys that only Python could compare: in their order
            if len(ours) != len(theirs):
                found.append(Met(place, *nodes))
            for (key, x), (other, y) in zip(ours, theirs, strict=False):
                below += [(place, key, other), (place.below(key), x, y)]
            return
        left, right = (dict(zip(keys, pairs, strict=True)) for keys, pairs in zip(tokens, (ours, theirs), strict=True))
        for token, (key, value) in left.items():
            below.append((place.below(key), value, right[token][1] if token in right else ABSENT))
        below += [(place.below(key), ABSENT, value) for token, (key, value) in right.items() if token not in left]
        if (is_ordered(ours) or is_ordered(theirs)) and (
            [token for token in left if token in right] != [token for token in right if token in left]
        ):
            found.append(Met(place, *nodes, "order"))


FLAGS = ("is_parameter", "requires_grad")
"""The properties of a tensor, besides its values, that a container of weights does not store."""
