"""Every tensor of a checkpoint, each with its place: the one enumeration.

Everything that shows, compares, digests, checks or counts the tensors of a file uses `every_tensor`.  It goes to:

- the values of the state_dict, and their parts if they are not plain tensors
- the other sections, each under its path
- what belongs to no section, whose `FoundTensor.section` is ``None`` and whose name is its path from the top of the
  file: attributes of modules and of tensors, buffers that a module does not save, what hangs on a mapping's class,
  keys of dicts and members of sets

Besides tensors it yields separate storages and numpy's arrays (`ckptkit.pickling.arrays`); on request also the values
made from tensors (`ckptkit.normalize.not_plain`), before their parts.  A tensor is yielded under every name it has, but
not again below the module or mapping whose own value it is.

`tensors_with_keys` gives the same with the keys that lead to each from the top of the file.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.checkpoint import STATE_DICT, WEIGHTS, Checkpoint, Storage, TensorEntry
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import MODULE_MARKS, module_state, persistent
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, is_plain_value, join, state_values, step
from ckptkit.pickling.arrays import is_array
from ckptkit.pickling.inert import (
    SCALARS,
    Global,
    InertDict,
    InertSet,
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

__all__ = [
    "FoundTensor",
    "Nameless",
    "every_tensor",
    "keys_of",
    "longer",
    "other_tensors",
    "plain_tensors",
    "storage_names",
    "tensors_with_keys",
]

_MAX_STEPS = 32
"""Steps of a name inside a section that are shown; what is deeper keeps the name of what is above."""

_MAX_NAME = 1000
"""Characters of a name made from such steps; names of a state_dict are shown whole."""

_NO_STEP: Final = object()
"""What leads to a node that has no key or index, or to one that names do not show."""

_HIDDEN: Final = object()
"""What leads to the parameters, buffers and modules of a module, which no name shows."""

_SCALARS = (*SCALARS, bytearray)
_ONCE = (list, tuple, InertDict, InertSet, Global)
"""Types of nodes that have the names of the first place they are found in."""


class Nameless(str):
    """A key of a dict that is not text or a number: a parameter, as in the state of old optimizers.

    Attributes:
        position: its place in the dict.
    """

    position: int

    def __new__(cls, position: int) -> Nameless:
        """The display of such a key, with its place."""
        made = super().__new__(cls, "?")
        made.position = position
        return made


class FoundTensor(NamedTuple):
    """A tensor, a storage, an array or another value that is not a plain tensor, under one name.

    Attributes:
        section: path of the section it is in; ``None``: in none.
        name: in its section; of what is in none its path from the top of the file.
        node: the tensor; a separate storage; numpy's array; or the maker of the value.
        is_own: whether it is one of the section's own values, not somewhere below one.
        keys: those that lead to it from the top of the file, on request; see `keys_of`.
    """

    section: str | None
    name: str
    node: TensorEntry | Storage | Object
    is_own: bool
    keys: _Steps = None

    @property
    def is_value(self) -> bool:
        """Whether it is a value made from tensors, which are found too."""
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
        return [make(FoundTensor, (selected, name, value, True, None)) for name, value in everything]
    return [
        make(FoundTensor, (selected, name, value, True, None)) for name, value in everything if is_plain_value(value)
    ]


def other_tensors(checkpoint: Checkpoint, *, values: bool = False) -> list[FoundTensor]:
    """What `every_tensor` finds but for the plain tensors of the state_dict; no more than one above the limit.

    Args:
        checkpoint: as it was read, or rewritten.
        values: whether to include values made from tensors, such as quantized and sparse ones.
    """
    return list(islice(_beside(checkpoint, values), DEFAULT_LIMITS.entries + 1))


def tensors_with_keys(checkpoint: Checkpoint, top: _Steps) -> Iterator[FoundTensor]:
    """The same, with values made from tensors instead of their parts, each with the keys that lead to it.

    In the order of `every_tensor`.  A tensor is found in every dict or list that it is in, and what is deeper in an
    object that several places share in the first.

    Args:
        checkpoint: the file.
        top: the keys that lead to its state_dict, as `longer` puts them together.
    """
    for found in plain_tensors(checkpoint):
        yield found._replace(keys=longer(top, found.name))
    yield from _beside(checkpoint, values=True, top=top, whole=True)


def longer(steps: _Steps, key: object) -> _Steps:
    """One more key below those that `keys_of` gives of the same."""
    return steps, key, 1 if steps is None else steps[2] + 1


def keys_of(steps: _Steps) -> list[object]:
    """The keys that `FoundTensor.keys` are, the first at the top; none of what is all of the file."""
    keys: list[object] = []
    while steps is not None:
        keys.append(steps[1])
        steps = steps[0]
    return keys[::-1]


def _beside(checkpoint: Checkpoint, values: bool, *, top: _Steps = None, whole: bool = False) -> Iterator[FoundTensor]:
    state_dict, selected = checkpoint.state_dict, checkpoint.origin.state_path or ""
    kinds = {section.path: section.kind for section in checkpoint.sections if not section.selected}
    found = _Walk(kinds, values, whole, state_dict.everything, top)
    values_of = state_dict.everything.items() if not state_dict.is_plain else ()
    others = [(name, value) for name, value in values_of if not is_plain_value(value)]
    own = _Own(state_dict.everything.values())
    yield from found.values(_Place(selected, None, 0, None, None, top), others, own)
    outside = _Place(None, (None, selected, 1) if selected else None, 0, None, own, top)
    if state_dict.is_module:
        yield from found.below(outside, state_dict.container)
    else:
        yield from found.below(outside, mapping_shell(state_dict.container))
        if not checkpoint.operations:  # else it is not written, and its tensors are those before
            yield from found.below(outside, checkpoint.module)
    yield from found.below(_Place("" if "" in kinds else None, None, 0, "", None), checkpoint.rest)
    yield from found.below(
        _Place(None, (None, "(dropped)", 1), 0, None, None, (None, "(dropped)", 1)), list(checkpoint.discarded)
    )


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
    """The tensors that a section has as its own values, or as parts of these."""

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
    def _bare(self) -> set[int]:
        return {id(value) for value in self._values if isinstance(value, Storage)}

    @cached_property
    def _views(self) -> set[tuple[object, ...]]:
        return {value.view for value in self._ids.values()}

    def has(self, node: object) -> bool:
        """Whether a node is a storage that is one of the values by itself."""
        return isinstance(node, Storage) and id(node) in self._bare

    def __contains__(self, entry: TensorEntry) -> bool:
        """Whether a tensor is one of them: a parameter and its placeholder in its module are two objects."""
        known = id(entry) in self._ids or entry.view in self._views
        return known or (self._also is not None and entry in self._also)


_Steps = tuple[Any, Any, int] | None
"""The steps that lead to a node: those above, the last one, and how many they are.  Sharing what
is above keeps 100,000 nested lists from taking 100,000 lists of steps."""


class _Place(NamedTuple):
    section: str | None
    steps: _Steps
    depth: int
    path: str | None
    """Whole path from the root; ``None`` below the depth at which sections begin."""
    own: _Own | None
    """The tensors that are not listed again here."""
    keys: _Steps = None
    """All keys from the root, unchanged."""

    def name(self) -> str:
        parts: list[str] = []
        steps = self.steps
        while steps is not None:
            parts.append(steps[1])
            steps = steps[0]
        return ".".join(reversed(parts))[:_MAX_NAME] or self.section or ""

    def inside(self, key: object, whole: bool) -> _Place:
        """The place of what hangs on what is here, and has no key."""
        return self._replace(keys=longer(self.keys, key)) if whole else self

    def below(self, label: object, key: object, kinds: Mapping[str, str], whole: bool) -> _Place:
        path = None if self.path is None or self.depth >= MAX_SECTION_DEPTH else join(self.path, key)
        keys = longer(self.keys, key) if whole and label is not _HIDDEN else self.keys
        if path is not None and path in kinds:
            return _Place(path, None, self.depth + 1, path, None, keys)
        if label is _NO_STEP or label is _HIDDEN:
            return self._replace(path=path, depth=self.depth + 1, keys=keys)
        return _Place(self.section, _further(self.steps, step(label)), self.depth + 1, path, self.own, keys)


def _further(steps: _Steps, last: str) -> _Steps:
    above = 0 if steps is None else steps[2]
    return (steps, last, above + 1) if above < _MAX_STEPS else steps


class _Walk:
    """One walk through everything: nodes above tensors are entered once."""

    def __init__(
        self,
        kinds: Mapping[str, str],
        values: bool,
        whole: bool = False,
        selected: Mapping[str, object] = {},
        top: _Steps = None,
    ) -> None:
        self._kinds = kinds
        self._values = values
        self._whole = whole
        self._selected = selected
        self._top = top
        self._seen: set[int] = set()
        self._known: dict[int, Value | None] = {}
        self._parts: set[int] = set()
        self._kept: list[object] = []

    def values(self, at: _Place, values: list[tuple[str, object]], own: _Own) -> Iterator[FoundTensor]:
        """The parts of a section's own values that are not plain tensors."""
        section = at.section
        for name, value in values:
            steps: _Steps = (None, name, 1)
            keys = longer(at.keys, name) if self._whole else None
            if not isinstance(value, TensorEntry):
                yield from self.below(_Place(section, steps, 0, None, None, keys), value)
                continue
            yield FoundTensor(section, name, value, True, keys)
            outside = _Place(None, _further((None, section, 1), name) if section else steps, 0, None, own, keys)
            for label, part in (("?", value.subclass), (_NO_STEP, value.attributes), ("?", value.effects)):
                yield from self.below(outside if label is _NO_STEP else outside.inside(label, self._whole), part)

    def below(self, place: _Place, root: object) -> Iterator[FoundTensor]:
        """Every tensor at or below a node."""
        stack: list[tuple[_Place, object]] = [(place, root)]
        while stack:
            place, node = stack.pop()
            if isinstance(node, _SCALARS):
                continue
            if isinstance(node, TensorEntry) and (place.own is None or node not in place.own):
                yield FoundTensor(place.section, place.name(), node, False, place.keys)
            made = self._made(node)
            if made is not None and self._values and not self._is_told(place, node, made):
                found: Any = node  # an `Object`
                yield FoundTensor(place.section, place.name(), found, False, place.keys)
            if self._whole and (node is STATE_DICT or id(node) in self._seen):
                yield from self._again(place, node)
            if id(node) in self._seen or (place.own is not None and place.own.has(node)):
                continue
            self._seen.add(id(node))
            if isinstance(node, Storage) or is_array(node):
                yield FoundTensor(place.section, place.name(), node, False, place.keys)
            elif made is not None:
                stack.extend(self._in_value(place, node, made))
                continue
            kind = self._kinds.get(place.path) if place.steps is None and place.path is not None else None
            if kind is not None and kind in WEIGHTS and place.section is not None:
                place = yield from self._weights(place, place.section, kind, node)
            stack.extend(
                (place.below(label, key, self._kinds, self._whole), child)
                for label, key, child in reversed(_steps(node))
                if not isinstance(child, _SCALARS)
            )

    def _in_value(self, place: _Place, node: object, made: Value) -> Iterator[tuple[_Place, object]]:
        """The parts of a value, under torch's names; if it is a placeholder, what else is in it."""
        rest = place._replace(own=_Own([part for _, part in made.parts], place.own)).inside("?", self._whole)
        self._parts.update(id(part) for _, part in made.parts)
        yield from ((rest, child) for child in reversed(children(node)))
        for name, part in reversed(made.parts) if not self._whole else ():
            # A quantized value has the name of its storage.
            yield (place if isinstance(part, Storage) else place.below(name, name, self._kinds, False)), part

    def _weights(self, place: _Place, section: str, kind: str, node: object) -> Generator[FoundTensor, None, _Place]:
        """The values of a section of weights under their names; returns the place of what else is there."""
        values = list(state_values(kind, node))
        self._kept.append(values)  # some are made for it, and are known by their ids
        own = _Own([value for _, value in values])
        for name, value in values:
            if is_plain_value(value):
                keys = longer(place.keys, name) if self._whole else None
                yield FoundTensor(section, name, value, True, keys)  # type: ignore[arg-type]
        yield from self.values(place, [pair for pair in values if not is_plain_value(pair[1])], own)
        return _Place(None, _further(None, section) if section else None, place.depth, place.path, own, place.keys)

    def _again(self, place: _Place, node: object) -> Iterator[FoundTensor]:
        """The tensors right in a dict or list that is in another place too: an EMA that is the model itself."""
        pairs: Iterable[tuple[object, object]] = ()
        if node is STATE_DICT:
            pairs = self._selected.items() if keys_of(place.keys) != keys_of(self._top) else ()
        elif isinstance(node, (list, tuple)) or mapping_items(node) is not None:
            pairs = [(key, child) for _, key, child in _steps(node)]
        for key, value in pairs:
            if isinstance(value, TensorEntry):
                yield FoundTensor(None, "", value, False, longer(place.keys, key))

    def _made(self, node: object) -> Value | None:
        """The value that a node makes of tensors; ``None``: it is something else."""
        if not isinstance(node, Object) or not is_tensor_like(node):
            return None
        if id(node) not in self._known:
            from ckptkit.normalize.not_plain import describe_value

            self._known[id(node)] = describe_value(node)
        return self._known[id(node)]

    def _is_told(self, place: _Place, node: object, made: Value) -> bool:
        """Whether a value is a section's own, or made from its own tensors: a module may keep it in another form."""
        own = place.own
        if own is None or id(node) in self._seen:
            return own is not None
        parts = [part for _, part in made.parts]
        return bool(parts) and all(
            part in own if isinstance(part, TensorEntry) else id(part) in self._parts or id(part) in self._seen
            for part in parts
        )


def _steps(node: object) -> list[tuple[object, object, object]]:
    """A node's children, each with what is shown of the key or index that leads to it, and that key."""
    pairs = mapping_items(node)
    if isinstance(node, InertDict) and pairs is not None:
        return [*_of_pairs(pairs), *((_NO_STEP, "?", call) for call in node.effects)]
    if isinstance(node, (list, tuple)):
        return _of_list(node)
    if not isinstance(node, Object):
        return [(_NO_STEP, 0, child) for child in children(node)]
    steps = list(_of_pairs(pairs or []))
    if pairs is None:
        steps.extend(_of_arguments(node))
        steps.extend((index, index, item) for index, item in enumerate(node.items))
        steps.extend(_of_pairs(node.pairs))
        for index, part in enumerate(states(node)):
            if isinstance(part, InertDict):
                steps.extend(_of_pairs(part.pairs, hidden=MODULE_MARKS if module_state(node) is part else ()))
            else:
                steps.append((_NO_STEP, index, part))
    known = {id(node.state)} if pairs is None else set(map(id, node.args))  # initial pairs are among the pairs
    known.update(id(child) for _, _, child in steps)
    known.add(id(persistent(node)))  # whose parts these are
    called: list[object] = []
    if pairs is None:  # what the calls for its effect are given is among its states
        known.update(map(id, node.effects))
        called = [call.cls for call in node.effects]
    others = (child for child in (*children(node), *called) if not isinstance(child, (*_SCALARS, Global)))
    steps.extend((_NO_STEP, "?", child) for child in others if id(child) not in known)
    return steps


def _of_list(node: list[object] | tuple[object, ...]) -> list[tuple[object, object, object]]:
    """As `_steps`.  A list of ten million numbers is skipped, not copied."""
    most, met = DEFAULT_LIMITS.entries, set[int]()

    def is_new(child: object) -> bool:
        """Not in later places: in a long list, it is entered once."""
        if len(node) <= most or not isinstance(child, _ONCE):
            return True
        before = len(met)
        met.add(id(child))
        return len(met) > before

    shown = ((i, i, child) for i, child in enumerate(node) if not isinstance(child, _SCALARS) and is_new(child))
    steps = list(islice(shown, most + 1))
    if len(steps) > most:  # never a part of them: a tensor may follow
        raise LimitError("values in a list", limit=most, actual=len(steps))
    return steps  # type: ignore[return-value]


def _of_arguments(node: Object) -> Iterator[tuple[object, object, object]]:
    """The arguments an object was made from; for StyleGAN's modules the state is in a dict of their loader's."""
    kept = persistent(node)
    state = module_state(node) if kept is not None else None
    if kept is None or state is None:
        yield from ((_NO_STEP, index, part) for index, part in enumerate(node.args))
        return
    yield from _of_pairs([pair for pair in kept.pairs if pair[1] is not state])
    yield from _of_pairs(state.pairs, hidden=MODULE_MARKS)


def _of_pairs(
    pairs: list[tuple[object, object]], hidden: tuple[str, ...] = ()
) -> Iterator[tuple[object, object, object]]:
    """The values of a mapping with their keys, and the keys that are not scalars."""
    for position, (key, value) in enumerate(pairs):
        shown = key
        if not isinstance(key, _SCALARS):
            shown = key if isinstance(key, (tuple, Global)) else Nameless(position)
            yield _NO_STEP, Nameless(position), key
        yield (_HIDDEN if key in hidden else key), shown, value
