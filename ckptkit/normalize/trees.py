"""Inert trees compared, and digested: the one walk that looks at everything that makes up a tree.

`side_by_side` goes through two trees at once, by one of two rules:

- `Identical`: node for node as the files say it, devices, strides and order included; what was one object must still
  be one.  So an output is held against what it was written from.
- `SameContent`: what two files mean.  Tensors are compared by their values, mappings key by key, and what Python
  pickles in several ways depending on the protocol (sets, bytes, names that moved, numpy's arrays) is one thing.
  Whether two places hold one object or two equal ones does not matter.  The order of keys does, but for names of
  tensors, as in a state_dict.

`content_of` is what a node is by the second rule; tree digests (`ckptkit.digests`) are made of it.

Trees come from strangers: they share nodes, contain cycles, are 100,000 deep and are never hashed by content.
Everything here is iterative, and takes time in proportion to both trees.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from ckptkit.checkpoint import STATE_DICT, Storage, TensorEntry
from ckptkit.normalize.sections import brief, join
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId, mapping_items
from ckptkit.pickling.tensors import is_tensor_like

__all__ = [
    "FLAGS",
    "PLAIN",
    "Identical",
    "Met",
    "Place",
    "SameContent",
    "content_of",
    "effects_of",
    "plain_bytes",
    "shown",
    "side_by_side",
]

_MAX_STEPS = 64
_MAX_PLACE = 400
"""Steps and characters of a place after which it is not made longer."""

_SHOWN = 60
"""Characters of a value in a message."""

_HERE: Final = object()
"""Label of what has the place of the node that it is a part of."""

PLAIN = (bool, int, float, str, bytes, bytearray, type(None), type(ABSENT))
"""Types of what has no parts."""


class Place(NamedTuple):
    """Where a node is: the step that leads to it, and those above."""

    above: Place | None = None
    label: object = _HERE
    steps: int = 0
    in_tensor: bool = False
    """Whether it is in what a tensor is made of that is not a plain one."""

    def below(self, label: object) -> Place:
        """The place of a part."""
        if label is _HERE or self.steps >= _MAX_STEPS:
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
            if label is not _HERE and len(path) <= _MAX_PLACE:
                path = join(path, label)
        return path


class Met(NamedTuple):
    """Two nodes in one place that differ, or two tensors or storages whose bytes are to be compared.

    Attributes:
        place: where; ``a``, ``b``: what is there, `ABSENT` where nothing is.
        how: ``"differs"``; ``"kinds"``: so much that their parts cannot be compared; ``"order"``: the keys alone stand
            in another order; ``"parted"``: what was one object is two, or the other way round; ``"bytes"``: what is
            known of the two agrees, and their bytes are left.
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


_Pairs = list[tuple[Place, object, object]]


class _Rule(Protocol):
    by_meaning: bool

    def met(self, a: object, b: object) -> bool | None:
        """Whether two nodes, met before, may stand in one place; ``None``: they were not met."""

    def compare(self, place: Place, a: object, b: object) -> tuple[list[Met], _Pairs]:
        """What differs of two nodes themselves, and their parts in pairs."""


def side_by_side(
    roots: Sequence[tuple[Place, object, object]], rule: _Rule, weights: tuple[object, object] = (STATE_DICT,) * 2
) -> Iterator[Met]:
    """Go through pairs of trees in the order of the file.

    Args:
        roots: the trees, each pair with its place.
        rule: `Identical` or `SameContent`.
        weights: what stands for the marker `STATE_DICT` in either.
    """
    stack = list(reversed(roots))
    while stack:
        place, a, b = stack.pop()
        a, b = weights[0] if a is STATE_DICT else a, weights[1] if b is STATE_DICT else b
        if rule.by_meaning:
            a, b = _meant(a), _meant(b)
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
        return struct.pack("<d", a) == struct.pack("<d", b)  # NaN is not equal to itself, and -0.0 is to 0.0
    return type(a) is type(b) and a == b


def shown(a: object, b: object) -> tuple[str | None, str | None]:
    """Two values that differ, some 60 characters of each, from where long texts differ; ``None``: there is none."""
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

    def compare(self, place: Place, a: object, b: object) -> tuple[list[Met], _Pairs]:
        """See `side_by_side`."""
        if isinstance(a, Storage) and isinstance(b, Storage):
            same = (a.dtype, a.nbytes, a.location) == (b.dtype, b.nbytes, b.location)
            return [Met(place, a, b, "bytes" if same else "differs")], []
        parts, others = _exact_parts(a), _exact_parts(b)
        if type(a) is not type(b) or len(parts) != len(others):
            return [Met(place, a, b)], []
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry) and _geometry(a) != _geometry(b):
            return [Met(place, a, b)], []
        pairs = zip(parts, others, strict=True)
        return [], [(place.below(at), x, y) for (at, x), (_, y) in pairs if type(x) is not str or x != y]


def _geometry(entry: TensorEntry) -> tuple[object, ...]:
    flags = entry.requires_grad, entry.is_parameter, entry.is_conj, entry.is_neg
    return entry.dtype, entry.storage_offset, entry.shape, entry.stride, flags


def _exact_parts(node: object) -> list[tuple[object, object]]:
    """Everything that makes up a node, one level deep, each part with its label."""
    parts: list[tuple[object, object]] = []
    pairs: list[tuple[object, object]] = []
    if isinstance(node, TensorEntry):
        parts = [(_HERE, node.storage)]
        if node.subclass is not None or node.attributes is not None:
            parts += [(_HERE, node.subclass), (_HERE, node.attributes)]
    elif isinstance(node, (list, tuple)):
        return list(enumerate(node))
    elif isinstance(node, InertDict):
        pairs = node.pairs
    elif isinstance(node, Object):
        parts = [(_HERE, part) for part in (node.how, node.cls, node.args, node.kwargs, node.state)]
        parts += enumerate(node.items)
        pairs = node.pairs
    elif isinstance(node, InertSet):
        parts = [(_HERE, part) for part in (node.frozen, *node.members)]
    elif isinstance(node, Global):
        parts = [(_HERE, node.module), (_HERE, node.name)]
    elif isinstance(node, PersistentId):
        parts = [(_HERE, node.pid)]
    parts += [(key, part) for key, value in pairs for part in (key, value)]
    parts += [(_HERE, call) for call in effects_of(node)]
    return parts


class SameContent:
    """Two trees by what they mean; tensors by their values, whatever they lie in.

    Nodes that were met are joined (as Hopcroft and Karp compare automata): each pair that is looked at leaves one
    group of nodes less, so that shared nodes and cycles end, in linear time.

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

    def compare(self, place: Place, a: object, b: object) -> tuple[list[Met], _Pairs]:
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
        ours, theirs = _form(a), _form(b)
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
        tokens = [[_token(key) for key, _ in pairs] for pairs in (ours, theirs)]
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
        if (_is_ordered(ours) or _is_ordered(theirs)) and (
            [token for token in left if token in right] != [token for token in right if token in left]
        ):
            found.append(Met(place, *nodes, "order"))


FLAGS = ("is_parameter", "requires_grad")
"""What a tensor is beyond its values, and a container of weights alone does not hold."""


class _Form(NamedTuple):
    """A node by what it means: its kind, its parts with their labels, and its pairs where it is a mapping."""

    kind: str
    parts: Sequence[tuple[object, object]] = ()
    pairs: list[tuple[object, object]] = []  # noqa: RUF012 - never changed

    def may_be(self, other: _Form) -> bool:
        """Whether parts of the two stand for each other though their kinds differ: a list for a tuple."""
        labels = [label for label, _ in self.parts]
        return bool(self.pairs and other.pairs) or (bool(labels) and labels == [label for label, _ in other.parts])


def effects_of(node: object) -> tuple[object, ...]:
    """The calls made for their effect on a node."""
    return tuple(getattr(node, "effects", ()))


def _form(node: object) -> _Form:
    form, effects = _own_form(node), effects_of(node)
    if not effects:
        return form
    parts = [*form.parts, *((_HERE, call) for call in effects)]
    return form._replace(kind=f"{form.kind} with {len(effects)}", parts=parts)


def _own_form(node: object) -> _Form:
    if isinstance(node, (list, tuple)):
        return _Form(type(node).__name__, list(enumerate(node)))
    if isinstance(node, InertDict):
        return _Form("dict", (), node.pairs)
    if isinstance(node, InertSet):
        return _set(node.frozen, node.members)
    if isinstance(node, Global):
        return _Form(f"name {_name(node, ':')}")
    if isinstance(node, PersistentId):
        return _Form("persistent id", [(_HERE, node.pid)])
    return _object(node) if isinstance(node, Object) else _Form(repr(node))


def _set(frozen: bool, members: Sequence[object]) -> _Form:
    """Members in an order of their own: that in the file changes from run to run."""
    tokens = [_token(member) for member in members]
    if None not in tokens:
        members = [member for _, member in sorted(zip(tokens, members, strict=True), key=lambda pair: pair[0] or b"")]
    return _Form("frozenset" if frozen else "set", [(_HERE, member) for member in members])


def _object(node: Object) -> _Form:
    how, cls, args = node.how, node.cls, node.args
    name = _name(cls) if isinstance(cls, Global) else ""
    is_call = _is_call(node)
    if name == "copyreg._reconstructor" and len(args) == 3 and _is_object(args[1]) and args[2] is None:
        how, cls, args = "newobj", args[0], ()  # of protocols 0 and 1
    elif name == "copyreg.__newobj__" and args:
        how, cls, args = "newobj", args[0], args[1:]
    elif is_call and name in ("builtins.set", "builtins.frozenset") and len(args) == 1 and isinstance(args[0], list):
        return _set(name.endswith("frozenset"), args[0])  # before protocol 4
    elif is_call and name == "builtins.getattr" and (attribute := _attribute(node)):
        return _Form(f"name {attribute}")
    elif (array := _array(node, name, is_call=is_call)) is not None:
        return array
    pairs = mapping_items(node)
    if pairs is not None and args and isinstance(args[-1], (list, InertDict)):
        args = args[:-1]  # it is among the pairs
    state = node.state if isinstance(node.state, tuple) and len(node.state) == 2 else (node.state,)
    inner = ([] if isinstance(cls, Global) else [cls], args, (node.kwargs,), state)
    parts = [(_HERE, part) for each in inner for part in each]
    name = _name(cls, ":") if isinstance(cls, Global) else "?"
    kind = f"{how} {name} {[len(each) for each in inner]} {len(node.items)}"
    return _Form(kind, [*parts, *enumerate(node.items)], node.pairs if pairs is None else pairs)


def _is_call(node: Object) -> bool:
    """Whether a node is what a call gives, and nothing was added to it."""
    return node.state is ABSENT and not (node.items or node.pairs or node.kwargs or effects_of(node))


def _is_object(node: object) -> bool:
    return isinstance(node, Global) and _name(node) == "builtins.object"


def _meant(node: object) -> object:
    """The bytes that a call makes, before there were opcodes for them; any other node as it is."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or node.cls.name not in ("bytes", "bytearray"):
        return node
    made = {"builtins.bytes": bytes, "builtins.bytearray": bytearray}.get(_name(node.cls))
    text, *encoding = node.args or (b"",)
    if isinstance(text, str) and encoding == ["latin-1"] and max(text, default="") <= "\xff":
        text, encoding = text.encode("latin-1"), []
    is_plain = made is not None and isinstance(text, bytes) and not encoding and _is_call(node)
    return made(text) if is_plain else node  # type: ignore[misc]


def _name(node: Global, dot: str = ".") -> str:
    """A name as Python 3 and numpy 2 call it."""
    module, name = NAME_MAPPING.get((node.module, node.name)) or (node.module, node.name)
    module = IMPORT_MAPPING.get(module, module)
    if module.startswith("numpy.core."):
        module = f"numpy._core.{module[11:]}"
    return f"{module}{dot}{name}"


def _attribute(node: object) -> str:
    """The name that a nested class or bound method has since protocol 4; ``""``: it is something else."""
    names: list[str] = []
    while isinstance(node, Object) and len(node.args) == 2 and isinstance(node.args[1], str) and len(names) < 8:
        if not isinstance(node.cls, Global) or _name(node.cls) != "builtins.getattr" or not _is_call(node):
            return ""
        names.append(node.args[1])
        node = node.args[0]
    return ".".join((_name(node, ":"), *reversed(names))) if isinstance(node, Global) else ""


def _array(node: Object, name: str, *, is_call: bool) -> _Form | None:
    """An array of numpy's: its type, shape, order and bytes, however its protocol says them."""
    if name == "numpy._core.numeric._frombuffer" and len(node.args) == 4 and is_call:
        data, dtype, shape, order = node.args
    elif name == "numpy._core.multiarray._reconstruct" and isinstance(node.state, tuple) and len(node.state) == 5:
        cls, *rest = node.args or (None,)
        version, shape, dtype, is_fortran, data = node.state
        is_plain = isinstance(cls, Global) and cls.qualified == "numpy.ndarray" and rest == [(0,), b"b"]
        if not is_plain or version != 1 or node.items or node.pairs or node.kwargs:
            return None
        order = "F" if is_fortran is True else "C" if is_fortran is False else is_fortran
    else:
        return None
    data = bytes(data) if isinstance(data, bytearray) else data
    return _Form("array", [(_HERE, part) for part in (dtype, shape, order, data)])


def _token(node: object, depth: int = 4) -> bytes | None:
    """What tells keys and members of sets apart; ``None``: they are more than plain values and names."""
    node = _meant(node)
    if isinstance(node, PLAIN):
        return plain_bytes(node)
    if isinstance(node, Global):
        return b"g" + _name(node, ":").encode("utf-8", "surrogatepass")
    inner: Sequence[object] = ()
    if isinstance(node, tuple):
        tag, inner = b"(", node
    elif isinstance(node, Object) and _is_call(node):
        tag, inner = b"o", (node.cls, *node.args)  # a member of an enumeration, a path
    else:
        return None
    if len(inner) > 16 or not depth:
        return None
    parts = [_token(part, depth - 1) for part in inner]
    return None if None in parts else tag + b"".join(b"%d:%b" % (len(part), part) for part in parts if part is not None)


def plain_bytes(node: object) -> bytes:
    """A plain value with its type: no two have the same."""
    if isinstance(node, str):
        return b"s" + node.encode("utf-8", "surrogatepass")
    if isinstance(node, (bool, type(None), type(ABSENT))):
        return repr(node).encode()
    if isinstance(node, int):
        return b"i%x" % node
    if isinstance(node, float):
        return b"f" + struct.pack(">d", node)
    return (b"b" if isinstance(node, bytes) else b"a") + node  # type: ignore[operator]


def _is_ordered(pairs: list[tuple[object, object]]) -> bool:
    """Whether the order of a mapping's keys says anything: not where they name tensors."""
    return not any(isinstance(value, TensorEntry) for _, value in pairs) or not all(
        isinstance(key, str) for key, _ in pairs
    )


def content_of(node: object) -> tuple[str, list[object], list[tuple[object, object]]]:
    """What a node is that is no tensor: its kind, its parts, and its pairs where it is a mapping.

    Of pairs with one key the last counts, and names of tensors are sorted, so that their order is not part of it.
    """
    form = _form(node)
    pairs = form.pairs
    tokens = [_token(key) for key, _ in pairs]
    if pairs and None not in tokens:
        last = dict(zip(tokens, pairs, strict=True))
        pairs = list(last.values())
        if not _is_ordered(pairs):
            pairs = [last[token] for token in sorted(last, key=lambda token: token or b"")]
    return form.kind, [_meant(part) for _, part in form.parts], [(_meant(key), _meant(value)) for key, value in pairs]
