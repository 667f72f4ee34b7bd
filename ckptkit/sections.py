"""What the parts of a file are, and which of them are the weights.

Decided by shape, never by a file's name:

- a *whole model* is an object with ``_parameters``, ``_buffers`` and ``_modules``
- a *state_dict* is a mapping with string keys of which at least half are tensors, and none of
  whose other values has tensors inside
- an *optimizer* is a mapping with ``state`` and ``param_groups``; never the weights
- what else holds tensors is a *tensor* or a *collection*

Which weights of a file are *the* state_dict: the section asked for by name; else the only
candidate; else the only candidate under a customary key (`CUSTOMARY_KEYS`), when no other
candidate holds the same tensor names (an EMA or a "best" copy beside it is a choice to be made).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from ckptkit.checkpoint import Section, Storage, TensorEntry
from ckptkit.errors import LimitError, SectionError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.modules import module_state, walk_module
from ckptkit.pickling.inert import attributes, children, mapping_items, walk
from ckptkit.pickling.tensors import is_tensor_like

__all__ = ["CUSTOMARY_KEYS", "MAX_SECTION_DEPTH", "Candidate", "Survey", "brief", "choose", "is_plain", "join", "step"]

CUSTOMARY_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "model.state_dict",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
"""Where training scripts put the weights, most common first."""

MAX_SECTION_DEPTH = 4
"""Keys from the root to a section.  Lightning and fairseq need two."""

_MAX_STEP = 200
"""Characters of a key in a path."""

_SectionKind = Literal["state_dict", "whole_model", "optimizer", "collection", "tensor"]
_NodeKind = _SectionKind | Literal["parts"]
"""``"parts"``: a mapping or sequence that has tensors somewhere below, and is no section by itself."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part of a file that holds tensors: the keys that lead to it, what it is, and its node."""

    path: str
    kind: _SectionKind
    node: object

    @property
    def is_weights(self) -> bool:
        """Whether it could be the checkpoint's state_dict."""
        return self.kind in ("state_dict", "whole_model")

    def names(self) -> set[str]:
        """The names its state_dict would have."""
        if self.kind == "whole_model":
            return {name for name, _ in walk_module(self.node)}
        return {key for key, _ in mapping_items(self.node) or [] if isinstance(key, str)}


class Survey:
    """What the nodes of one tree are.

    The tree may share nodes and contain cycles: each node is judged once, and entered once.

    Args:
        root: the tree.
    """

    def __init__(self, root: object) -> None:
        self._root = root
        self._kinds: dict[int, _NodeKind | None] = {}
        self._leading: dict[tuple[int, int], bool] = {}
        self._entered: set[int] = set()
        self._holding: set[int] | None = None

    def sections(self) -> Iterator[Candidate]:
        """The parts that hold tensors, in file order; parts of a part are not listed."""
        return self._below(self._root, "", 0)

    def _below(self, node: object, path: str, depth: int) -> Iterator[Candidate]:
        kind = self._kind(node)
        if kind is None:
            return
        if kind != "parts":
            yield Candidate(path, kind, node)
            return
        parts = _parts(node)
        # The keys of a file's own dict are its sections, whatever they hold.
        named = depth == 0 and any(isinstance(key, str) for key, _ in parts)
        if not named and not self._leads_to_weights(node, depth):
            yield Candidate(path, "collection", node)
        elif id(node) not in self._entered:
            self._entered.add(id(node))
            for key, value in parts:
                yield from self._below(value, join(path, key), depth + 1)

    def _leads_to_weights(self, node: object, depth: int) -> bool:
        """Whether the node, or something at most `MAX_SECTION_DEPTH` keys from the root, is a section of its own."""
        kind = self._kind(node)
        if kind != "parts" or depth >= MAX_SECTION_DEPTH:
            return kind in ("state_dict", "whole_model", "optimizer")
        known = self._leading.get((id(node), depth))
        if known is None:
            self._leading[id(node), depth] = known = any(
                self._leads_to_weights(value, depth + 1) for _, value in _parts(node)
            )
        return known

    def _kind(self, node: object) -> _NodeKind | None:
        """What a node is; ``None``: it has no tensors."""
        if isinstance(node, (str, int, float, bytes, type(None))):
            return None
        if id(node) not in self._kinds:
            self._kinds[id(node)] = self._judge(node)
        return self._kinds[id(node)]

    def _judge(self, node: object) -> _NodeKind | None:
        if is_tensor_like(node) or isinstance(node, Storage):
            return "tensor"
        if module_state(node) is not None:
            return "whole_model"
        pairs = mapping_items(node)
        if pairs is not None and self._is_state_dict(pairs):
            return "state_dict"
        if not self._has_tensor(node):
            return None
        if pairs is not None and {"state", "param_groups"} <= {key for key, _ in pairs if isinstance(key, str)}:
            return "optimizer"
        return "parts" if pairs is not None or isinstance(node, (list, tuple)) else "collection"

    def _is_state_dict(self, pairs: list[tuple[object, object]]) -> bool:
        tensors = others = 0
        for key, value in pairs:
            if not isinstance(key, str):
                return False
            if is_tensor_like(value):
                tensors += 1
            elif not key.endswith("_extra_state"):
                if self._has_tensor(value):
                    return False
                others += 1
        return tensors > 0 and tensors >= others

    def _has_tensor(self, node: object) -> bool:
        if self._holding is None:
            self._holding = _above_tensors(self._root)
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
                leaves: set[int] = set()
                nbytes: dict[int, int] = {}
                for visits, leaf in enumerate(_leaves(candidate), visits + 1):  # noqa: B020 - it goes on counting
                    if visits > DEFAULT_LIMITS.opcodes:
                        raise LimitError("parts that sections share", limit=DEFAULT_LIMITS.opcodes, actual=visits)
                    if isinstance(leaf, TensorEntry):
                        leaves.add(id(leaf))
                        nbytes[id(leaf.storage)] = leaf.storage.nbytes
                    elif isinstance(leaf, Storage):
                        nbytes[id(leaf)] = leaf.nbytes
                sizes[id(candidate.node)] = len(leaves), sum(nbytes.values())
            count, total = sizes[id(candidate.node)]
            sections.append(
                Section(
                    path=candidate.path, kind=candidate.kind, tensors=count, nbytes=total, selected=candidate is chosen
                )
            )
        return tuple(sections)


def choose(weights: list[Candidate], section: str | None) -> Candidate | None:
    """The candidate that is the checkpoint's state_dict; ``None``: several could be.

    Raises:
        SectionError: none has the path asked for.
    """
    if section is not None:
        for candidate in weights:
            if candidate.path == section:
                return candidate
        listed = ", ".join(repr(candidate.path) for candidate in weights) or "none"
        raise SectionError(f"no section {section!r} holds weights; sections that do: {listed}")
    # One object under several keys is one candidate, by its most customary key.
    weights = sorted(weights, key=lambda candidate: candidate.path not in CUSTOMARY_KEYS)
    distinct = list({id(candidate.node): candidate for candidate in reversed(weights)}.values())
    if len(distinct) < 2:
        return distinct[0] if distinct else None
    customary = [candidate for candidate in distinct if candidate.path in CUSTOMARY_KEYS]
    if len(customary) != 1:
        return None
    names = customary[0].names()
    rivals = (candidate for candidate in distinct if candidate is not customary[0])
    return None if any(names & rival.names() for rival in rivals) else customary[0]


def _parts(node: object) -> list[tuple[object, object]]:
    """What a mapping or sequence holds, with the keys or indices that lead there."""
    pairs = mapping_items(node)
    if pairs is None and isinstance(node, (list, tuple)):
        return list(enumerate(node))
    return pairs or []


def _leaves(candidate: Candidate) -> Iterator[object]:
    """Every node at or below a candidate; the plain tensors of a state_dict without going through `walk`."""
    if candidate.kind != "state_dict":
        return walk(candidate.node)
    values = [value for _, value in mapping_items(candidate.node) or []]
    others = [value for value in values if not is_plain(value)]
    return chain(values if not others else filter(is_plain, values), walk([attributes(candidate.node), *others]))


def is_plain(node: object) -> bool:
    """Whether it is a tensor with nothing below it."""
    return isinstance(node, TensorEntry) and node.attributes is None and node.subclass is None


def _above_tensors(root: object) -> set[int]:
    """The ids of all nodes from which a tensor or storage is reached, and of these themselves."""
    above: dict[int, list[int]] = {}
    found: list[int] = []
    for node in walk(root):
        if isinstance(node, (TensorEntry, Storage)):
            found.append(id(node))
        for child in children(node):
            if not isinstance(child, (str, int, float, bytes, type(None))):
                above.setdefault(id(child), []).append(id(node))
    holding = set(found)
    while found:
        for parent in above.get(found.pop(), ()):
            if parent not in holding:
                holding.add(parent)
                found.append(parent)
    return holding


def join(path: str, key: object) -> str:
    """The path of what lies under ``key`` of what lies at ``path``; see `Section.path`."""
    return f"{path}.{step(key)}" if path else step(key)


def step(key: object) -> str:
    """A key or index as it stands in paths.  Keys come from a stranger: long and nested ones are cut short."""
    if isinstance(key, (str, bytes)):
        return key[:_MAX_STEP] if isinstance(key, str) else repr(key[:_MAX_STEP])
    return repr(key) if isinstance(key, (int, float, type(None))) else "?"


def brief(node: object) -> str:
    """A node in a message: at most 60 characters, and never what is below it."""
    if isinstance(node, (list, tuple)):
        return f"<{type(node).__name__} of {len(node)}>"
    if isinstance(node, TensorEntry):
        return f"<{node.dtype} tensor {list(node.shape)}>"
    if isinstance(node, Storage):
        return f"<storage {node.key[:40]!r}>"
    return f"{node[:60] if isinstance(node, (str, bytes, bytearray)) else node!r:.60}"
