"""The parts of a file: which contain weights, which an optimizer, which something else.

Decided by shape, never by a file's name:

- a *whole model* is what `ckptkit.normalize.modules` finds the ``__dict__`` of a module in, or a bound
  method of one
- a *state_dict* is a mapping with string keys, or a list of (name, tensor) pairs, of which at least
  half are tensors, or a fifth, where these are called as parameters of modules are (``encoder.weight``) and all else
  is plain (``height``, ``version``).  Other values that contain tensors must not have weights themselves: otherwise it
  is a file's own dict, and each value a part.  Where names are dotted paths, as modules give them, nested dicts of
  tensors are values too.  Inside a file's own dict, a value in which nothing could be a parameter (losses, metrics,
  random states), or that has the names of a graph (from PyG), is not weights unless a customary key says so.  Modules
  may be dicts inside dicts (`ckptkit.normalize.nested`).
- an *optimizer* is a mapping or object with ``state`` and ``param_groups`` (fastai: ``hypers``), whatever it is under;
  never the weights.  Neither are its moments (`ckptkit.normalize.shapes.MOMENTS`).
- anything else with tensors is a *tensor* or a *collection*; so is a data set of graphs, ``(data, slices)``

Dicts, lists, tuples, and the attributes, items and arguments of objects (a Namespace, a Trainer, a named tuple) are
searched for parts, at most `MAX_SECTION_DEPTH` keys down; a part is never searched.

Which part is *the* state_dict is decided by `ckptkit.normalize.selection`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from operator import itemgetter
from typing import Any, Final, Literal, NamedTuple

from ckptkit.checkpoint import WEIGHTS, Section, Storage, TensorEntry
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import bound_method, module_state, walk_module
from ckptkit.normalize.shapes import (
    CUSTOMARY_KEYS,
    PARAMETERS,
    are_moments,
    is_graph,
    is_optimizer,
    is_packed,
    is_sliced,
    is_substantial,
    named_values,
    parts,
    tensor_at_a_glance,
    weights_at_sight,
)
from ckptkit.pickling.inert import SCALARS, Global, InertDict, Object, children, is_bare_leaf, mapping_items, walk
from ckptkit.pickling.tensors import is_tensor_like

__all__ = [
    "MAX_SECTION_DEPTH",
    "Candidate",
    "SectionSearch",
    "above_tensors",
    "brief",
    "is_plain_value",
    "join",
    "state_values",
    "step",
]

MAX_SECTION_DEPTH = 4
"""Keys from the root to a section.  Lightning and fairseq need two."""

_MAX_STEP = 200
"""Characters of a key for display."""

_MAX_PATH_STEP = 1000
"""Characters of a key in a path: paths are typed after ``--section`` and must be what is listed."""

_NEAR = 2
"""Keys down that a value of a mapping is searched for its own weights: ``{"nets": {"g": {...}}}``."""

_MOST_SETTINGS = 4
"""Plain values for each parameter among them in a state_dict."""

_FEW = 64
"""Numbers in a list that is a setting."""

_ROOT: Final = object()
"""What leads to the root."""

_SectionKind = Literal["state_dict", "whole_model", "optimizer", "collection", "tensor"]
_NodeKind = _SectionKind | Literal["parts"]
"""``"parts"``: something that has tensors somewhere below, and is not a section by itself."""


class Candidate(NamedTuple):
    """A part of a file that contains tensors.

    Attributes:
        path: the keys that lead to it, joined with dots, for lists and ``--section``.
        kind: of part.
        node: it.
        keys: the keys that lead to it, unchanged.
        nested: whether its modules are dicts inside dicts, so that names are combined.
    """

    path: str
    kind: _SectionKind
    node: object
    keys: tuple[object, ...] = ()
    nested: bool = False

    @property
    def is_weights(self) -> bool:
        """Whether it could be the checkpoint's state_dict."""
        return self.kind in WEIGHTS

    @property
    def module(self) -> object:
        """The module it is, or that it is a method of."""
        bound = bound_method(self.node)
        return self.node if bound is None else bound[0]

    def values(self) -> Iterator[tuple[str, object]]:
        """The names and values its state_dict would have."""
        if self.nested:
            from ckptkit.normalize.nested import nested_values

            return iter((nested_values(self.node) or {}).items())
        return state_values(self.kind, self.node)


def state_values(kind: str, node: object) -> Iterator[tuple[str, object]]:
    """The names and values of the state_dict that a section of weights is, or whose module it is."""
    if kind == "whole_model":
        bound = bound_method(node)
        return walk_module(node if bound is None else bound[0])
    pairs: list[Any] = named_values(node) or []
    if set(map(type, map(itemgetter(0), pairs))) - {str}:
        pairs = [pair for pair in pairs if isinstance(pair[0], str)]
    if any(isinstance(value, TensorEntry) for _, value in pairs):
        return iter(pairs)
    from ckptkit.normalize.nested import nested_values

    return iter((nested_values(node) or dict(pairs)).items())


class SectionSearch:
    """The kinds of the nodes of one tree.

    The tree may share nodes and contain cycles: each node is judged once, and entered once.

    Args:
        root: the tree.
    """

    def __init__(self, root: object) -> None:
        self._root = root
        self._kinds: dict[int, _NodeKind | None] = {}
        self._leading: dict[tuple[int, int], bool] = {}
        self._slight: set[int] = set()
        self._entered: set[int] = set()
        self._holding: set[int] | None = None
        self._near: dict[tuple[int, int], int] = {}
        self._nested: dict[tuple[int, object], bool] = {}
        self._nested_left = DEFAULT_LIMITS.entries + DEFAULT_LIMITS.tree_nodes

    def sections(self) -> list[Candidate]:
        """The parts that contain tensors, in file order, no two under one path; parts of a part are not listed."""
        taken: dict[str, int] = {}
        found = []
        for candidate in self._below(self._root, "", ()):
            path = candidate.path
            while path in taken:
                taken[candidate.path] += 1
                path = f"{candidate.path}#{taken[candidate.path]}"
            taken[path] = 1
            found.append(candidate if path == candidate.path else candidate._replace(path=path))
        if not found and self._has_tensor(self._root):
            found.append(Candidate("", "collection", self._root))
        return found

    def _below(self, node: object, path: str, keys: tuple[object, ...]) -> Iterator[Candidate]:
        kind = self._kind(node, keys[-1] if keys else _ROOT)
        if kind is None:
            return
        if kind != "parts":
            yield Candidate(path, kind, node, keys, nested=self._kinds[id(node)] == "parts")
            return
        inside = parts(node)
        # The keys of a file's own dict are its sections, whatever they hold.
        named = not keys and any(isinstance(key, str) for key, _ in inside)
        if not named and not self._leads_to_weights(node, len(keys), keys[-1] if keys else _ROOT):
            yield Candidate(path, "collection", node, keys)
        elif id(node) not in self._entered:
            self._entered.add(id(node))
            for key, value in inside:
                yield from self._below(value, join(path, key), (*keys, key))

    def _leads_to_weights(self, node: object, depth: int, key: object) -> bool:
        """Whether the node, or something at most `MAX_SECTION_DEPTH` keys from the root, is a separate section."""
        kind = self._kind(node, key)
        if kind != "parts" or depth >= MAX_SECTION_DEPTH:
            return kind in (*WEIGHTS, "optimizer")
        known = self._leading.get((id(node), depth))
        if known is None:
            self._leading[id(node), depth] = False  # where it leads back to itself
            self._leading[id(node), depth] = known = any(
                self._leads_to_weights(value, depth + 1, inner) for inner, value in parts(node)
            )
        return known

    def _kind(self, node: object, key: object) -> _NodeKind | None:
        """The kind of a node under ``key``; ``None``: it has no tensors."""
        if isinstance(node, SCALARS):
            return None
        if id(node) not in self._kinds:
            self._kinds[id(node)] = self._judge(node)
        kind = self._kinds[id(node)]
        if kind == "state_dict" and id(node) in self._slight and key is not _ROOT:
            return kind if isinstance(key, str) and key in CUSTOMARY_KEYS else "collection"
        if kind == "parts" and mapping_items(node) is not None and self._is_nested(node, key):
            return "state_dict"
        return kind

    def _is_nested(self, node: object, key: object) -> bool:
        """Whether its modules are nested dicts; a tree that is too large to find out counts as not nested."""
        known = key if isinstance(key, str) else None
        if (id(node), known) not in self._nested:
            # Most files' own dicts hold a number or a text, and need no closer look.
            may_be = all(
                isinstance(value, (InertDict, Object, TensorEntry))
                or (isinstance(inner, str) and inner.endswith("_extra_state"))
                for inner, value in mapping_items(node) or ()
            )
            if may_be:
                from ckptkit.normalize.nested import is_nested

                may_be = is_nested(node, key, self._root, self._may_look)
            self._nested[id(node), known] = may_be
        return self._nested[id(node), known]

    def _may_look(self, count: int) -> bool:
        self._nested_left -= count
        return self._nested_left >= 0

    def _judge(self, node: object) -> _NodeKind | None:
        if is_tensor_like(node) or isinstance(node, Storage):
            return "tensor"
        if module_state(node) is not None or bound_method(node) is not None:
            return "whole_model"
        if is_sliced(node):
            return "collection"
        pairs = named_values(node)
        if pairs is not None and self._is_state_dict(pairs) and not self._holds_more(node):
            if is_graph(pairs) or not any(is_substantial(value) for _, value in pairs):
                self._slight.add(id(node))
            return "state_dict"
        if not self._has_tensor(node):
            return None
        if isinstance(node, Object) and node.class_name.startswith("torch_geometric.data."):
            return "collection"
        if is_optimizer(node):
            return "optimizer"
        return "parts" if parts(node) else "collection"

    def _is_state_dict(self, pairs: list[tuple[object, object]]) -> bool:
        if set(map(type, map(itemgetter(0), pairs))) == {str} and set(map(type, map(itemgetter(1), pairs))) == {
            TensorEntry
        }:
            return not are_moments(pairs)
        tensors = others = dotted = below = parameters = 0
        is_plain = True
        for key, value in pairs:
            if not isinstance(key, str):
                return False
            if isinstance(value, TensorEntry) or is_tensor_like(value):
                tensors += 1
                dotted += "." in key
                parameters += "." in key and key.rpartition(".")[2] in PARAMETERS
            elif is_packed(key, value):
                tensors += 1
            elif not key.endswith("_extra_state"):
                others += 1
                is_plain = is_plain and _is_setting(value)
                if self._has_tensor(value):
                    weights = self._weights_near(value, _NEAR)
                    if not weights and "." not in key:
                        return False
                    below += weights
        if below and (below > tensors or not dotted):
            return False
        enough = tensors >= others or (is_plain and 2 * parameters >= tensors and _MOST_SETTINGS * parameters >= others)
        return tensors > 0 and enough and not are_moments(pairs)

    def _weights_near(self, node: object, depth: int) -> int:
        """Tensors in what looks like weights at, or at most ``depth`` keys below, a node; more than any for modules."""
        known = self._near.get((id(node), depth))
        if known is None:
            known = weights_at_sight(node)
            if not known and depth and not isinstance(node, SCALARS):
                inside = ((key, value) for key, value in parts(node) if not isinstance(value, SCALARS))
                known = sum(self._weights_near(value, depth - 1) for _, value in inside)
            self._near[id(node), depth] = known
        return known

    def _holds_more(self, node: object) -> bool:
        """Whether an object of a custom mapping class has tensors besides those it maps to."""
        if not isinstance(node, Object) or mapping_items(node) is not None:
            return False
        return any(map(self._has_tensor, (node.state, node.kwargs, *node.args, *node.items, *node.effects)))

    def _has_tensor(self, node: object) -> bool:
        seen = tensor_at_a_glance(node)
        if seen is not None:
            return seen
        if self._holding is None:
            self._holding = above_tensors(self._root)
        return id(node) in self._holding

    def measured(self, found: list[Candidate], chosen: Candidate | None) -> tuple[Section, ...]:
        """The candidates with their sizes.

        Raises:
            LimitError: sections share so much that sizing each would take too long.
        """
        sizes: dict[int, tuple[int, int]] = {}
        visits = 0
        sections = []
        for candidate in found:
            if id(candidate.node) not in sizes:
                most = DEFAULT_LIMITS.opcodes
                leaves = list(islice(_leaves(candidate), most - visits + 1))
                visits += len(leaves)
                if visits > most:
                    raise LimitError("parts that sections share", limit=most, actual=visits)
                entries: list[Any] = leaves
                bare: list[Storage] = []
                if set(map(type, leaves)) - {TensorEntry}:
                    entries = [leaf for leaf in leaves if isinstance(leaf, TensorEntry)]
                    bare = [leaf for leaf in leaves if isinstance(leaf, Storage)]
                count, storages = len(entries), [*[entry.storage for entry in entries], *bare]
                if len(set(map(id, storages))) < len(storages):
                    count = len(set(map(id, entries)))
                    storages = list({id(storage): storage for storage in storages}.values())
                sizes[id(candidate.node)] = count, sum([storage.nbytes for storage in storages])
            count, total = sizes[id(candidate.node)]
            sections.append(
                Section(
                    path=candidate.path, kind=candidate.kind, tensors=count, nbytes=total, selected=candidate is chosen
                )
            )
        return tuple(sections)


def _leaves(candidate: Candidate) -> Iterator[object]:
    """The parts of a candidate that have bytes: the values of weights and their parts; otherwise everything in it.

    What hangs on a module, a mapping or a tensor of weights as an attribute belongs to no section.
    """
    if not candidate.is_weights:
        return walk(candidate.node)
    values = [value for _, value in candidate.values()]
    if not set(map(type, values)) - {TensorEntry}:
        return iter(values)
    return chain(values, walk([value for value in values if not isinstance(value, TensorEntry)]))


def _is_setting(node: object) -> bool:
    """Whether it is a number, text, or a few of them."""
    if isinstance(node, (list, tuple)):
        return len(node) <= _FEW and all(isinstance(item, SCALARS) for item in node)
    return isinstance(node, SCALARS)


def is_plain_value(node: object) -> bool:
    """Whether it is a tensor with nothing below it."""
    return isinstance(node, TensorEntry) and node.attributes is None and node.subclass is None and not node.effects


def above_tensors(root: object) -> set[int]:
    """The ids of all nodes from which a tensor or storage is reached, and of these themselves."""
    above: dict[int, list[int]] = {}
    found: list[int] = []
    for node in walk(root):
        if isinstance(node, (TensorEntry, Storage)):
            found.append(id(node))
        for child in () if is_bare_leaf(node) else children(node):
            if not isinstance(child, SCALARS):
                above.setdefault(id(child), []).append(id(node))
    holding = set(found)
    while found:
        for parent in above.get(found.pop(), ()):
            if parent not in holding:
                holding.add(parent)
                found.append(parent)
    return holding


def join(path: str, key: object) -> str:
    """The path of what is under ``key`` of what is at ``path``; see `Section.path`."""
    last = key[:_MAX_PATH_STEP] if isinstance(key, str) else step(key)
    return f"{path}.{last}" if path else last


def step(key: object) -> str:
    """A key or index for display.  Keys come from a stranger: long and nested ones are cut short."""
    if isinstance(key, (str, bytes)):
        return key[:_MAX_STEP] if isinstance(key, str) else repr(key[:_MAX_STEP])
    if isinstance(key, tuple) and len(key) <= 4 and all(isinstance(part, (str, int, float)) for part in key):
        return f"({', '.join(repr(part)[:_MAX_STEP] for part in key)})"
    return repr(key) if isinstance(key, (int, float, type(None))) else "?"


def brief(node: object) -> str:
    """A node in a message: some 60 characters, and never what is below it."""
    if isinstance(node, tuple) and 0 < len(node) < 4 and any(map(is_tensor_like, node)):  # packed: weight and bias
        return " and ".join(brief(part) if is_tensor_like(part) else "..." for part in node)
    if isinstance(node, (list, tuple)):
        return f"<{type(node).__name__} of {len(node)}>"
    if isinstance(node, TensorEntry):
        return f"<{node.dtype} tensor {list(node.shape)}>"
    if isinstance(node, Storage):
        return f"<storage {node.key[:40]!r}>"
    if isinstance(node, Global):
        return f"{node.qualified:.60}"
    if isinstance(node, Object):
        from ckptkit.normalize.not_plain import describe_value

        value = describe_value(node)
        return f"{node!r:.60}" if value is None else value.text
    return f"{node[:60] if isinstance(node, (str, bytes, bytearray)) else node!r:.60}"
