"""Every tensor of a checkpoint, each with where it stands: the one enumeration.

What shows, compares, digests, checks or counts the tensors of a file goes through `every_tensor`.  It goes to:

- the values of the state_dict, and what they are made of where they are no plain tensors
- the other sections, each under its path
- what belongs to no section, whose `FoundTensor.section` is ``None`` and whose name is its path from the top of the
  file: attributes of modules and of tensors, buffers that a module does not save, what hangs on a mapping's class,
  keys of dicts and members of sets

Beside tensors it yields storages that stand by themselves and numpy's arrays (`ckptkit.pickling.arrays`); where it is
asked for, also the values that are made of tensors (`ckptkit.normalize.not_plain`), before their parts.  A tensor is
yielded under every name it has, but not again below the module or mapping whose own value it is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.checkpoint import WEIGHTS, Checkpoint, Storage, TensorEntry
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import MODULE_MARKS, module_state
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, is_plain_value, join, state_values, step
from ckptkit.normalize.selection import is_copy
from ckptkit.pickling.arrays import is_array
from ckptkit.pickling.inert import (
    SCALARS,
    Global,
    InertDict,
    Object,
    children,
    mapping_items,
    mapping_shell,
    states,
    tensors_in,
    walk,
)
from ckptkit.pickling.tensors import is_tensor_like

if TYPE_CHECKING:
    from ckptkit.normalize.not_plain import Value

__all__ = ["FoundTensor", "every_tensor", "other_tensors", "other_weights", "plain_tensors", "storage_names"]

_MAX_STEPS = 32
"""Steps of a name inside a section that are shown; what is deeper keeps the name of what is above."""

_MAX_NAME = 1000
"""Characters of a name that is made of such steps; names of a state_dict are shown whole."""

_NO_STEP: Final = object()
"""What leads to a node that has no key or index, or to one that names do not show."""

_SCALARS = (*SCALARS, bytearray)


class FoundTensor(NamedTuple):
    """A tensor, a storage, an array or another value that is no plain tensor, under one name.

    Attributes:
        section: path of the section it stands in; ``None``: in none.
        name: in its section; of what stands in none its path from the top of the file.
        node: the tensor; a storage that stands by itself; numpy's array; or what makes the value.
        is_own: whether it is one of the section's own values, not somewhere below one.
    """

    section: str | None
    name: str
    node: TensorEntry | Storage | Object
    is_own: bool

    @property
    def is_value(self) -> bool:
        """Whether it is a value that is made of tensors, which are found too."""
        return isinstance(self.node, Object) and not is_array(self.node)

    @property
    def path(self) -> str:
        """Section and name."""
        return join(self.section, self.name) if self.section and self.name != self.section else self.name


def every_tensor(checkpoint: Checkpoint) -> Iterator[FoundTensor]:
    """Every tensor, bare storage and array of a checkpoint: the state_dict's first, then in file order."""
    yield from plain_tensors(checkpoint)
    yield from _beside(checkpoint, values=False)


def plain_tensors(checkpoint: Checkpoint) -> list[FoundTensor]:
    """The plain tensors of the state_dict: a hundred thousand of some files."""
    selected, make = checkpoint.origin.state_path or "", tuple.__new__  # which takes half the time of `FoundTensor`
    everything: Any = checkpoint.state_dict.everything.items()
    if checkpoint.state_dict.is_plain:
        return [make(FoundTensor, (selected, name, value, True)) for name, value in everything]
    return [make(FoundTensor, (selected, name, value, True)) for name, value in everything if is_plain_value(value)]


def other_tensors(checkpoint: Checkpoint, *, values: bool = False) -> list[FoundTensor]:
    """What `every_tensor` finds but for the plain tensors of the state_dict; no more than one above the limit.

    Args:
        checkpoint: as it was read, or rewritten.
        values: whether values that are made of tensors are among them, such as quantized and sparse ones.
    """
    return list(islice(_beside(checkpoint, values), DEFAULT_LIMITS.entries + 1))


def _beside(checkpoint: Checkpoint, values: bool) -> Iterator[FoundTensor]:
    state_dict, selected = checkpoint.state_dict, checkpoint.origin.state_path or ""
    kinds = {section.path: section.kind for section in checkpoint.sections if not section.selected}
    found = _Walk(kinds, values)
    values_of = state_dict.everything.items() if not state_dict.is_plain else ()
    others = [(name, value) for name, value in values_of if not is_plain_value(value)]
    own = _Own(state_dict.everything.values())
    yield from found.values(selected, others, own)
    outside = _Place(None, (None, selected, 1) if selected else None, 0, None, own)
    if state_dict.is_module:
        yield from found.below(outside, state_dict.container)
    else:
        yield from found.below(outside, mapping_shell(state_dict.container))
        if not checkpoint.operations:  # else it is not written, and its tensors are those before
            yield from found.below(outside, checkpoint.module)
    yield from found.below(_Place("" if "" in kinds else None, None, 0, "", None), checkpoint.rest)
    yield from found.below(_Place(None, (None, "(dropped)", 1), 0, None, None), list(checkpoint.discarded))


def other_weights(checkpoint: Checkpoint, found: Iterable[FoundTensor]) -> dict[str, list[FoundTensor]]:
    """The sections of weights beside the selected ones that are no copies of them, with their own tensors.

    A model may be in two parts: a network and its ``generator``, ``likelihood`` or queue.

    Args:
        checkpoint: the file.
        found: what `every_tensor` finds in it, but for the plain tensors of the state_dict, which make no difference.
    """
    weights = {section.path for section in checkpoint.sections if section.is_weights and not section.selected}
    names: dict[str, list[FoundTensor]] = {}
    for each in found if weights and checkpoint.state_dict.everything else ():
        if each.is_own and each.section is not None and each.section in weights:
            names.setdefault(each.section, []).append(each)
    own = checkpoint.state_dict.everything
    return {path: inside for path, inside in names.items() if not is_copy((each.name for each in inside), own)}


def storage_names(named: Checkpoint | Mapping[str, object]) -> dict[int, str]:
    """What storages are called in a message, by ``id``: after the first tensor that views each.

    Args:
        named: a checkpoint, or values by name: tensors, and what has some at or below it.
    """
    places: list[tuple[str, str, object]]
    if isinstance(named, Checkpoint):
        places = [(f" of {each.section!r:.200}" if each.section else "", *each[1:3]) for each in every_tensor(named)]
    else:
        places = [("", name, value) for name, value in named.items()]
    names: dict[int, str] = {}
    for place, name, value in places:
        for node in (value,) if isinstance(value, (TensorEntry, Storage)) else tensors_in(value):
            storage = node.storage if isinstance(node, TensorEntry) else node
            for whole in storage.originals:
                names.setdefault(id(whole), f"tensor {name!r:.200}{place}")
    return names


class _Own:
    """The tensors that a section has as its own values, or that these are made of."""

    def __init__(self, values: Iterable[object], also: _Own | None = None) -> None:
        self._values = values
        self._also = also

    @cached_property
    def _ids(self) -> dict[int, TensorEntry]:
        own: dict[int, TensorEntry] = {}
        others = []
        for value in self._values:
            if isinstance(value, TensorEntry):
                own[id(value)] = value
            else:
                others.append(value)
        own.update((id(node), node) for node in walk(others) if isinstance(node, TensorEntry))
        return own

    @cached_property
    def _views(self) -> set[tuple[object, ...]]:
        return {value.view for value in self._ids.values()}

    def __contains__(self, entry: TensorEntry) -> bool:
        """Whether a tensor is one of them: a parameter and what stands for it in its module are two objects."""
        known = id(entry) in self._ids or entry.view in self._views
        return known or (self._also is not None and entry in self._also)


_Steps = tuple[Any, str, int] | None
"""The steps that lead to a node: those above, the last one, and how many they are.  Sharing what
is above keeps 100,000 nested lists from taking 100,000 lists of steps."""


class _Place(NamedTuple):
    section: str | None
    steps: _Steps
    depth: int
    path: str | None
    """Whole path from the root; ``None`` below the depth at which sections begin."""
    own: _Own | None
    """What is not told again here."""

    def name(self) -> str:
        parts: list[str] = []
        steps = self.steps
        while steps is not None:
            parts.append(steps[1])
            steps = steps[0]
        return ".".join(reversed(parts))[:_MAX_NAME] or self.section or ""

    def below(self, label: object, key: object, kinds: Mapping[str, str]) -> _Place:
        path = None if self.path is None or self.depth >= MAX_SECTION_DEPTH else join(self.path, key)
        if path is not None and path in kinds:
            return _Place(path, None, self.depth + 1, path, None)
        if label is _NO_STEP:
            return self._replace(path=path, depth=self.depth + 1)
        return _Place(self.section, _further(self.steps, step(label)), self.depth + 1, path, self.own)


def _further(steps: _Steps, last: str) -> _Steps:
    above = 0 if steps is None else steps[2]
    return (steps, last, above + 1) if above < _MAX_STEPS else steps


class _Walk:
    """One way through everything: what is above tensors is entered once."""

    def __init__(self, kinds: Mapping[str, str], values: bool) -> None:
        self._kinds = kinds
        self._values = values
        self._seen: set[int] = set()
        self._known: dict[int, Value | None] = {}
        self._kept: list[object] = []

    def values(self, section: str, values: list[tuple[str, object]], own: _Own) -> Iterator[FoundTensor]:
        """What a section's own values are made of, those that are no plain tensors."""
        for name, value in values:
            steps: _Steps = (None, name, 1)
            if not isinstance(value, TensorEntry):
                yield from self.below(_Place(section, steps, 0, None, None), value)
                continue
            yield FoundTensor(section, name, value, True)
            outside = _Place(None, _further((None, section, 1), name) if section else steps, 0, None, own)
            yield from self.below(outside, value.subclass)
            yield from self.below(outside, value.attributes)
            yield from self.below(outside, value.effects)

    def below(self, place: _Place, root: object) -> Iterator[FoundTensor]:
        """Every tensor at or below a node."""
        stack: list[tuple[_Place, object]] = [(place, root)]
        while stack:
            place, node = stack.pop()
            if isinstance(node, _SCALARS):
                continue
            if isinstance(node, TensorEntry) and (place.own is None or node not in place.own):
                yield FoundTensor(place.section, place.name(), node, False)
            made = self._made(node)
            if made is not None and self._values and not self._is_told(place, node, made):
                yield FoundTensor(place.section, place.name(), node, False)  # type: ignore[arg-type]  # an `Object`
            if id(node) in self._seen:
                continue
            self._seen.add(id(node))
            if isinstance(node, Storage) or is_array(node):
                yield FoundTensor(place.section, place.name(), node, False)
            elif made is not None:
                rest = place._replace(own=_Own([part for _, part in made.parts], place.own))
                stack.extend((rest, child) for child in reversed(children(node)))
                for name, part in reversed(made.parts):  # a quantized value has the name of its storage
                    at = place if isinstance(part, Storage) else place.below(name, name, self._kinds)
                    stack.append((at, part))
                continue
            kind = self._kinds.get(place.path) if place.steps is None and place.path is not None else None
            if kind is not None and kind in WEIGHTS and place.section is not None:
                place = yield from self._weights(place, place.section, kind, node)
            stack.extend(
                (place.below(label, key, self._kinds), child)
                for label, key, child in reversed(_steps(node))
                if not isinstance(child, _SCALARS)
            )

    def _weights(self, place: _Place, section: str, kind: str, node: object) -> Generator[FoundTensor, None, _Place]:
        """The values of a section of weights under their names; returns the place of what else stands there."""
        values = list(state_values(kind, node))
        self._kept.append(values)  # some are made for it, and are known by their ids
        own = _Own([value for _, value in values])
        for name, value in values:
            if is_plain_value(value):
                yield FoundTensor(section, name, value, True)  # type: ignore[arg-type]
        yield from self.values(section, [pair for pair in values if not is_plain_value(pair[1])], own)
        return _Place(None, _further(None, section) if section else None, place.depth, place.path, own)

    def _made(self, node: object) -> Value | None:
        """The value that a node makes of tensors; ``None``: it is something else."""
        if not isinstance(node, Object) or not is_tensor_like(node):
            return None
        if id(node) not in self._known:
            from ckptkit.normalize.not_plain import describe_value

            self._known[id(node)] = describe_value(node)
        return self._known[id(node)]

    def _is_told(self, place: _Place, node: object, made: Value) -> bool:
        """Whether a value is a section's own, or made of its own tensors: a module may keep it in another form."""
        own = place.own
        if own is None or id(node) in self._seen:
            return own is not None
        parts = [part for _, part in made.parts]
        return bool(parts) and all(
            part in own if isinstance(part, TensorEntry) else id(part) in self._seen for part in parts
        )


def _steps(node: object) -> list[tuple[object, object, object]]:
    """A node's children, each with what is shown of the key or index that leads to it, and that key."""
    pairs = mapping_items(node)
    if isinstance(node, InertDict) and pairs is not None:
        return [*_of_pairs(pairs), *((_NO_STEP, "?", call) for call in node.effects)]
    if isinstance(node, (list, tuple)):
        # A list of ten million numbers is passed over, not copied.
        shown = ((index, index, child) for index, child in enumerate(node) if not isinstance(child, _SCALARS))
        return list(islice(shown, DEFAULT_LIMITS.tree_nodes))
    if not isinstance(node, Object):
        return [(_NO_STEP, 0, child) for child in children(node)]
    steps = list(_of_pairs(pairs or []))
    if pairs is None:
        steps.extend((_NO_STEP, index, part) for index, part in enumerate(node.args))
        steps.extend((index, index, item) for index, item in enumerate(node.items))
        steps.extend(_of_pairs(node.pairs))
        for index, part in enumerate(states(node)):
            if isinstance(part, InertDict):
                steps.extend(_of_pairs(part.pairs, hidden=MODULE_MARKS if module_state(node) is part else ()))
            else:
                steps.append((_NO_STEP, index, part))
    known = {id(node.state)} if pairs is None else set(map(id, node.args))  # initial pairs are among the pairs
    known.update(id(child) for _, _, child in steps)
    called: list[object] = []
    if pairs is None:  # what the calls for its effect are given is among its states
        known.update(map(id, node.effects))
        called = [call.cls for call in node.effects]
    others = (child for child in (*children(node), *called) if not isinstance(child, (*_SCALARS, Global)))
    steps.extend((_NO_STEP, "?", child) for child in others if id(child) not in known)
    return steps


def _of_pairs(
    pairs: list[tuple[object, object]], hidden: tuple[str, ...] = ()
) -> Iterator[tuple[object, object, object]]:
    """The values of a mapping with their keys, and the keys that are no scalars."""
    for key, value in pairs:
        if not isinstance(key, _SCALARS):
            yield _NO_STEP, "?", key
        yield (_NO_STEP if key in hidden else key), key, value
