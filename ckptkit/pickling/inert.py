"""The nodes of an inert tree, and ways to walk one.

An inert tree is what a pickle *says*, built only from these:

- ``None``, ``bool``, ``int``, ``float``, ``str``, ``bytes``, ``bytearray``, ``list``, ``tuple``
- `InertDict` and `InertSet`: never hashed by their members, which come from a stranger
- `Global`: a name, `Object`: something made by calling one, `PersistentId`
- `TensorEntry` and `Storage`, where torch's own vocabulary was understood

A call that a pickle makes for its effect on an object it built (``setter(obj, state)``, whose result is popped) is kept
in that node's ``effects``; there the marker `ITSELF` represents the node.

Trees share nodes, contain cycles and may be nested 100,000 deep.  Everything here is iterative
and goes to each node once; ``repr`` never goes into children.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Final, Literal

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS

__all__ = [
    "ABSENT", "ITSELF", "Global", "InertDict", "InertSet", "Object", "PersistentId", "TreeMap", "attributes",
    "check_references", "children", "effects_of", "holds", "is_bare_leaf", "is_global", "mapping_items",
    "mapping_shell", "states", "walk",
]  # fmt: skip


class _Marker:
    """Type of `ABSENT` and `ITSELF`."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}>"


ABSENT: Final = _Marker("absent")
"""Means "the pickle does not set this", which is not ``None``."""

ITSELF: Final = _Marker("itself")
"""Represents the node among the arguments of its ``effects``: copies of it need no other call."""


class Global:
    """A name in a pickle: ``module.name``.  It is never imported.

    Attributes:
        module, name: as the file spells them (``name`` may be dotted since protocol 4).
        calls: how often the pickle makes an object by calling it.
        offence: the reason why a call of it is hostile whatever the name is; ``""``: none.
        excused: how many of its calls are harmless because of their arguments, although the name is not.
        effects: as those of an `Object`.
    """

    __slots__ = ("calls", "effects", "excused", "module", "name", "offence")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        self.calls = 0
        self.offence = ""
        self.excused = 0
        self.effects: tuple[Object, ...] = ()

    @property
    def qualified(self) -> str:
        """``"module.name"``."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"<global {self.qualified}>"


class Object:
    """Something a pickle makes by calling, and then fills.

    Attributes:
        how: the opcode family: ``"reduce"`` calls ``cls(*args)``, ``"newobj"`` calls
            ``cls.__new__(cls, *args)``, ``"newobj_ex"`` likewise with ``kwargs``, ``"obj"`` is
            an instance of a Python 2 class.  Among effects there is ``"setitems"``: what is set late of the dict that
            is the ``cls``.
        cls: the callee, a `Global` in honest files.
        args: a tuple; ``kwargs``: an `InertDict` or ``None``.
        items: what APPENDS added; ``pairs``: what SETITEMS set; ``state``: what BUILD applied, or
            `ABSENT`; ``effects``: what was then called for its effect on the object (the sixth item of
            ``__reduce__``), or on a part of it.  They are written back in this order, the one every pickler uses.
    """

    __slots__ = ("args", "cls", "effects", "how", "items", "kwargs", "pairs", "state")

    def __init__(
        self,
        how: Literal["reduce", "newobj", "newobj_ex", "obj", "setitems"],
        cls: object,
        args: tuple[object, ...],
        kwargs: object = None,
    ) -> None:
        self.how = how
        self.cls = cls
        self.args = args
        self.kwargs = kwargs
        self.items: list[object] = []
        self.pairs: list[tuple[object, object]] = []
        self.state: object = ABSENT
        self.effects: tuple[Object, ...] = ()

    @property
    def class_name(self) -> str:
        """``"module.name"`` of what is called; ``"?"`` when it is itself computed."""
        return self.cls.qualified if isinstance(self.cls, Global) else "?"

    def __repr__(self) -> str:
        return f"<{self.class_name} object>"


class PersistentId:
    """A reference to something outside the pickle; torch uses it for storages."""

    __slots__ = ("pid",)

    def __init__(self, pid: object) -> None:
        self.pid = pid

    def __repr__(self) -> str:
        return "<persistent id>"


class InertDict:
    """A dict as the pickle builds it: pairs in order, nothing hashed but strings.

    Reads like a mapping for string keys; of two pairs with one key the later counts, as in Python.
    Its ``effects`` are as those of an `Object`.  Pairs from ``late_from`` on (``None``: none) refer to the result of
    the dict, and the pickle sets them once that exists: among its effects is a ``"setitems"``.
    """

    __slots__ = ("_index", "effects", "late_from", "pairs")

    def __init__(self, pairs: list[tuple[object, object]] | None = None) -> None:
        self.pairs = [] if pairs is None else pairs
        self.late_from: int | None = None
        self.effects: tuple[Object, ...] = ()
        self._index: tuple[int, dict[str, object]] | None = None

    def _strings(self) -> dict[str, object]:
        if self._index is None or self._index[0] != len(self.pairs):
            self._index = (len(self.pairs), {k: v for k, v in self.pairs if isinstance(k, str)})
        return self._index[1]

    def get(self, key: str, default: object = None) -> object:
        """The value under a string key."""
        return self._strings().get(key, default)

    def __getitem__(self, key: str) -> object:
        return self._strings()[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self._strings()

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[object]:
        return (key for key, _ in self.pairs)

    def items(self) -> list[tuple[object, object]]:
        """All pairs in order, whatever their keys are."""
        return self.pairs

    def __repr__(self) -> str:
        return f"<dict of {len(self.pairs)}>"


class InertSet:
    """A set (or frozenset) as the pickle builds it: members in order, none hashed; ``effects`` as in an `Object`."""

    __slots__ = ("effects", "frozen", "members")

    def __init__(self, members: list[object] | None = None, *, frozen: bool = False) -> None:
        self.members = [] if members is None else members
        self.effects: tuple[Object, ...] = ()
        self.frozen = frozen

    def __repr__(self) -> str:
        return f"<{'frozenset' if self.frozen else 'set'} of {len(self.members)}>"


_MAPPING_CLASSES = frozenset({"OrderedDict", "defaultdict", "dict", "Counter"})


def is_global(node: object, module: str, name: str) -> bool:
    """Whether the node is the name ``module.name``."""
    return isinstance(node, Global) and node.name == name and node.module == module


def mapping_items(node: object) -> list[tuple[object, object]] | None:
    """The pairs of a node that is a dict or a standard mapping class; ``None`` for anything else.

    Python 2 picklers gave an OrderedDict its pairs as an argument: ``OrderedDict([[k, v], ...])``.
    """
    if isinstance(node, InertDict):
        return node.pairs
    if not isinstance(node, Object) or not isinstance(node.cls, Global):
        return None
    if node.cls.module not in ("collections", "builtins", "__builtin__") or node.cls.name not in _MAPPING_CLASSES:
        return None
    pairs: list[tuple[object, object]] = []
    args = node.args[1:] if node.cls.name == "defaultdict" else node.args
    initial = args[-1] if args else None
    if isinstance(initial, (list, tuple)) and node.cls.name != "Counter":
        for pair in initial:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                return None
            pairs.append((pair[0], pair[1]))
    elif isinstance(initial, InertDict):
        pairs.extend(initial.pairs)
    elif initial is not None:
        return None
    pairs.extend(node.pairs)
    return pairs


def named_items(node: object) -> list[tuple[str, object]]:
    """The pairs of a mapping whose keys are text; none where a node is not a mapping."""
    return [(key, value) for key, value in mapping_items(node) or () if isinstance(key, str)]


def attributes(node: object) -> InertDict | None:
    """The instance attributes that BUILD, or a custom setter, gives an object: its ``__dict__``; ``None``: it has none.

    A two-tuple state is ``(__dict__, slots)``, as ``copyreg`` makes it.
    """
    if not isinstance(node, Object):
        return None
    state = node.state
    if state is ABSENT:
        given = (call.args[1] for call in node.effects if len(call.args) == 2 and call.args[0] is ITSELF)
        state = next(given, None)
    if isinstance(state, tuple) and len(state) == 2:
        state = state[0]
    return state if isinstance(state, InertDict) else None


def effects_of(node: object) -> tuple[Object, ...]:
    """The calls made for their effect on a node, in order; see `Object`."""
    return node.effects if isinstance(node, (Object, InertDict, InertSet, Global, TensorEntry)) else ()  # type: ignore[return-value]


def states(node: Object) -> list[object]:
    """The values that filled an object: BUILD's state and the arguments of its ``effects``; the parts of a tuple."""
    filled = [] if node.state is ABSENT else [node.state]
    filled += [part for call in node.effects for part in call.args if part is not ITSELF]
    return [part for state in filled for part in (state if isinstance(state, tuple) else (state,))]


def mapping_shell(node: object) -> Object | InertDict | None:
    """The class and attributes of an object that is a mapping, without its pairs; ``None``: nothing hangs there."""
    if isinstance(node, InertDict) and node.effects:
        bare = InertDict()
        bare.effects = node.effects
        return bare
    if not isinstance(node, Object):
        return None
    # The initial pairs some picklers pass as an argument are among the pairs.
    initial = (list, InertDict) if mapping_items(node) is None else (list, tuple, InertDict)
    args = tuple(arg for arg in node.args if not isinstance(arg, initial))
    shell = Object(node.how, node.cls, args, node.kwargs)
    shell.items, shell.state, shell.effects = list(node.items), node.state, node.effects
    return shell


def children(node: object) -> list[object]:
    """The nodes directly below a node, in the order a pickle writes them."""
    if isinstance(node, (list, tuple)):
        return list(node)
    if isinstance(node, InertDict):
        return [*chain.from_iterable(node.pairs), *node.effects]
    if isinstance(node, Object):
        below = [node.cls, *node.args, *node.items, *chain.from_iterable(node.pairs)]
        if node.kwargs is not None:
            below.append(node.kwargs)
        if node.state is not ABSENT:
            below.append(node.state)
        below.extend(node.effects)
        return below
    if isinstance(node, InertSet):
        return [*node.members, *node.effects]
    if isinstance(node, PersistentId):
        return [node.pid]
    if is_bare_leaf(node):  # as nearly all are
        return []
    if isinstance(node, TensorEntry):
        return [part for part in (node.subclass, node.attributes, *node.effects) if part is not None]
    return list(node.effects) if isinstance(node, Global) else []


SCALARS = (str, int, float, bytes, type(None))
"""Types of nodes that have nothing below them and are not placeholders."""


def walk(root: object, seen: set[int] | None = None) -> Iterator[object]:
    """Every node below and including ``root``, parents first, each object once; scalars are left out.

    Args:
        root: the tree.
        seen: ids of nodes that are not gone into, since that was done before; those gone into are added.

    Raises:
        LimitError: there are more than any checkpoint has.
    """
    seen = set() if seen is None else seen
    most = DEFAULT_LIMITS.tree_nodes + DEFAULT_LIMITS.entries
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, SCALARS) or id(node) in seen:
            continue
        seen.add(id(node))
        if len(seen) > most:
            raise LimitError("nodes of a tree", limit=most, actual=len(seen))
        yield node
        if not is_bare_leaf(node):
            stack.extend([child for child in reversed(children(node)) if not isinstance(child, SCALARS)])


def tensors_in(root: object, seen: set[int] | None = None) -> Iterator[TensorEntry | Storage]:
    """Every tensor, and every separate storage, at or below a node; arguments and errors as in `walk`."""
    return (node for node in walk(root, seen) if isinstance(node, (TensorEntry, Storage)))


def holds(root: object, wanted: object) -> bool:
    """Whether a node is the one wanted, or has it somewhere below."""
    return any(node is wanted for node in walk(root))


def check_references(root: object) -> None:
    """Refuse a tree whose nodes refer to each other more often than those of any checkpoint.

    A walk visits each node once, but sees each reference.

    Raises:
        LimitError: it has more nodes or references than `Limits` allow.
    """
    limits = DEFAULT_LIMITS
    references = compound = 0
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        compound += not isinstance(node, (TensorEntry, Storage))
        below = [child for child in children(node) if not isinstance(child, SCALARS)]
        references += len(below)
        if references > limits.references:
            raise LimitError("references between nodes", limit=limits.references, actual=references)
        if compound > limits.tree_nodes:
            raise LimitError("nodes of a tree", limit=limits.tree_nodes, actual=compound)
        stack.extend([child for child in below if not is_bare_leaf(child)])


def is_bare_leaf(node: object) -> bool:
    """Whether it is a tensor or a storage with nothing below it."""
    return isinstance(node, Storage) or (
        isinstance(node, TensorEntry) and node.subclass is None and node.attributes is None and not node.effects
    )


class TreeMap:
    """Copies inert trees with their leaves replaced; sharing and cycles survive.

    One instance may be called on several trees: shared parts stay shared.

    Args:
        leaf: from a `TensorEntry` or bare `Storage` to what takes its place; called once for each.
        replaced: nodes that are exchanged whole, each with what takes its place.
    """

    def __init__(self, leaf: Callable[[object], object], replaced: Sequence[tuple[object, object]] = ()) -> None:
        self._leaf = leaf
        self._memo: dict[int, object] = {}
        self._sources: list[object] = []  # keeps every id in the memo alive
        self._unfilled: list[tuple[object, object]] = []
        self._depth = 0
        for node, new in replaced:
            self._remember(node, new)

    def __call__(self, root: object) -> object:
        result = self._shell(root)
        while self._unfilled:
            self._fill(*self._unfilled.pop())
        return result

    def _shell(self, node: object) -> object:
        """The node's copy: complete for leaves and tuples, still to be filled for what can change."""
        if isinstance(node, SCALARS):
            return node
        if id(node) in self._memo:
            return self._memo[id(node)]
        if isinstance(node, tuple):
            return self._tuple(node)
        new: object
        if isinstance(node, (TensorEntry, Storage)):
            new = self._remember(node, self._with_attributes(self._leaf(node)))
            if isinstance(new, TensorEntry) and new.effects:
                new = self._remember(node, replace(new, effects=tuple(map(self._shell, new.effects))))
            return new
        if isinstance(node, list):
            new = []
        elif isinstance(node, InertDict):
            new = InertDict()
        elif isinstance(node, InertSet):
            new = InertSet(frozen=node.frozen)
        elif isinstance(node, Object):
            new = Object(node.how, node.cls, ())
        elif isinstance(node, PersistentId):
            new = PersistentId(None)
        elif isinstance(node, Global) and node.effects:
            new = Global(node.module, node.name)
            new.calls, new.offence, new.excused = node.calls, node.offence, node.excused
        else:
            return node
        self._unfilled.append((node, new))
        return self._remember(node, new)

    def _with_attributes(self, leaf: object) -> object:
        """The leaf with the tree of its Python attributes copied too (tensors may hang there)."""
        if not isinstance(leaf, TensorEntry) or leaf.attributes is None:
            return leaf
        self._depth += 1
        most = DEFAULT_LIMITS.attribute_depth
        if self._depth > most:
            raise LimitError("tensors nested in attributes of tensors", limit=most, actual=self._depth)
        copied = replace(leaf, attributes=self._shell(leaf.attributes))
        self._depth -= 1
        return copied

    def _remember(self, node: object, new: object) -> object:
        self._memo[id(node)] = new
        self._sources.append(node)
        return new

    def _tuple(self, root: tuple[object, ...]) -> object:
        stack: list[tuple[tuple[object, ...], list[object], Iterator[object]]] = [(root, [], iter(root))]
        while True:
            node, done, rest = stack[-1]
            for child in rest:
                if isinstance(child, tuple) and id(child) not in self._memo:
                    stack.append((child, [], iter(child)))
                    break
                done.append(self._shell(child))
            else:
                stack.pop()
                new = self._remember(node, tuple(done))
                if not stack:
                    return new
                stack[-1][1].append(new)

    def _fill(self, node: object, new: object) -> None:
        shell = self._shell
        if isinstance(node, list) and isinstance(new, list):
            new.extend(shell(item) for item in node)
        elif isinstance(node, InertDict) and isinstance(new, InertDict):
            new.pairs.extend((shell(key), shell(value)) for key, value in node.pairs)
            new.late_from = node.late_from
        elif isinstance(node, InertSet) and isinstance(new, InertSet):
            new.members.extend(shell(member) for member in node.members)
        elif isinstance(node, PersistentId) and isinstance(new, PersistentId):
            new.pid = shell(node.pid)
        elif isinstance(node, Object) and isinstance(new, Object):
            new.cls = shell(node.cls)
            args = shell(node.args)
            new.args = args if isinstance(args, tuple) else ()
            new.kwargs = shell(node.kwargs)
            new.items.extend(shell(item) for item in node.items)
            new.pairs.extend((shell(key), shell(value)) for key, value in node.pairs)
            new.state = node.state if node.state is ABSENT else shell(node.state)
        if isinstance(new, (Object, InertDict, InertSet, Global)):
            new.effects = tuple(map(shell, effects_of(node)))  # type: ignore[arg-type]
