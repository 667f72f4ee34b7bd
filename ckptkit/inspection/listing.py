"""The tensors of a checkpoint, one row each: where it stands, what it is, what it is tied to.

A row has the fields of one element of the inspect document's ``tensors``; `TensorRow.to_dict` is that
element and `TensorRow.to_json` its text.  Files have 100,000 of them: a row is a tuple, and what
rows have in common they share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Final, NamedTuple

from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry, shared_storages
from ckptkit.dtypes import DTYPES
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import module_state, walk_module
from ckptkit.normalize.roles import Role, tensor_role
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, is_plain, join, step
from ckptkit.normalize.shapes import named_values
from ckptkit.pickling.arrays import is_array
from ckptkit.pickling.inert import InertDict, Object, children, effects_of, mapping_items, states, walk

__all__ = ["Listing", "TensorRow", "list_tensors", "natural_key", "ordered", "storage_names", "wanted"]

_MAX_STEPS = 32
"""Steps of a name inside a section that are shown; what is deeper keeps the name of what is above."""

_MAX_NAME = 1000
"""Characters of a name that is made of such steps; names of a state_dict are shown whole."""

_NO_STEP: Final = object()
"""What leads to a node that has no key or index."""


class TensorRow(NamedTuple):
    """One tensor, under one name; the fields are those of the inspect document."""

    section: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int
    location: str
    storage: str
    role: Role
    role_inferred: bool
    tied_to: str | None
    entry: TensorEntry
    stats: dict[str, Any] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """The row as an element of the document's ``tensors``."""
        document: dict[str, Any] = {
            "section": self.section,
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "nbytes": self.nbytes,
            "location": self.location,
            "storage": self.storage,
            "role": self.role,
            "role_inferred": self.role_inferred,
            "tied_to": self.tied_to,
        }
        if self.stats is not None:
            document["stats"] = self.stats
        return document

    def to_json(self) -> str:
        """The JSON text of `to_dict`, several times faster than through it."""
        (section, name, dtype, shape, stride, nbytes, location, storage, role, inferred, tied_to, _, stats) = self
        text = (
            f'{{"section": {quoted(section)}, "name": {quoted(name)}, "dtype": "{dtype}", "shape": {[*shape]}, '
            f'"stride": {[*stride]}, "nbytes": {nbytes}, "location": {quoted(location)}, "storage": {quoted(storage)}, '
            f'"role": "{role}", "role_inferred": {"true" if inferred else "false"}, '
            f'"tied_to": {"null" if tied_to is None else quoted(tied_to)}'
        )
        if stats is None:
            return text + "}"
        import json

        return f'{text}, "stats": {json.dumps(stats)}}}'


class Listing(NamedTuple):
    """Every tensor of a file under every name it has, the state_dict's first, and what it is stored in.

    Attributes:
        rows: in file order.
        bare: storages that stand in the file by themselves.
        several: storages that several of the tensors view, by ``id``.
        arrays: numpy's arrays, each with its section and name; see `ckptkit.pickling.arrays`.
    """

    rows: list[TensorRow]
    bare: list[Storage]
    several: set[int]
    arrays: list[tuple[str, str, Object]]


def list_tensors(checkpoint: Checkpoint) -> Listing:
    """Every tensor of a checkpoint, and every bare storage.

    Raises:
        LimitError: the names are more, or all together longer, than those of any checkpoint.
    """
    bare: list[Storage] = []
    arrays: list[tuple[str, str, Object]] = []
    named = list(islice(_named_tensors(checkpoint, bare, arrays), DEFAULT_LIMITS.entries + 1))
    if len(named) > DEFAULT_LIMITS.entries:  # one tensor may stand in a list a million times
        raise LimitError("names of tensors", limit=DEFAULT_LIMITS.entries, actual=len(named))
    characters = sum(len(section) + len(name) for section, name, _, _ in named)
    if characters > DEFAULT_LIMITS.name_characters:  # one long key may stand above thousands of tensors
        raise LimitError("characters of names", limit=DEFAULT_LIMITS.name_characters, actual=characters)
    several = shared_storages(entry for _, _, entry, _ in named)
    tied_to = _ties(named, several)
    kinds = {section.path: section.kind for section in checkpoint.sections}
    selected = checkpoint.origin.state_path
    rows: list[TensorRow] = []
    make, sized = TensorRow._make, {name: row.itemsize for name, row in DTYPES.items()}
    roles: dict[str, tuple[bool, bool]] = {}
    for section, name, entry, is_own in named:
        role: Role = "unknown"
        inferred = False
        if section not in roles:
            is_selected = section == selected
            known = checkpoint.module is not None if is_selected else kinds.get(section) == "whole_model"
            roles[section] = is_selected or kinds.get(section) in ("state_dict", "whole_model"), known
        has_roles, known = roles[section]
        if has_roles and is_own:
            role, inferred = tensor_role(name, entry, known=known)
        shape, dtype, storage = entry.shape, entry.dtype, entry.storage
        rows.append(
            make(
                (section, name, dtype, shape, entry.stride, math.prod(shape) * sized[dtype], storage.location,
                 storage.key, role, inferred, tied_to.get(len(rows)) if tied_to else None, entry, None)
            )
        )  # fmt: skip
    return Listing(rows, bare, several, arrays)


def storage_names(checkpoint: Checkpoint) -> dict[int, str]:
    """What the storages of a checkpoint are called in a message, by ``id``: after the first tensor that views each."""
    names: dict[int, str] = {}
    for row in list_tensors(checkpoint).rows:
        storage = row.entry.storage
        place = f" of {row.section!r:.200}" if row.section else ""
        names.setdefault(id(storage.original or storage), f"tensor {row.name!r:.200}{place}")
    for name, value in checkpoint.state_dict.extra.items():  # a quantized tensor is made of its storage
        for node in walk(value):
            if isinstance(node, Storage):
                names.setdefault(id(node.original or node), f"tensor {name!r:.200}")
    return names


_Named = tuple[str, str, TensorEntry, bool]
"""Section, name in it, the tensor, and whether it is one of the section's own values, not somewhere below one."""


def _named_tensors(
    checkpoint: Checkpoint, bare: list[Storage], arrays: list[tuple[str, str, Object]]
) -> Iterator[_Named]:
    """Every tensor with the section it lies in and its name there: the state_dict's first."""
    seen: set[int] = set()
    selected = checkpoint.origin.state_path or ""
    for name, value in checkpoint.state_dict.everything.items():
        if is_plain(value):
            yield selected, name, value, True  # type: ignore[misc]
        else:
            own = isinstance(value, TensorEntry)
            for found in _below(value, _Place(selected, (None, name, 1), 0, None), {}, seen, bare, arrays):
                yield (*found[:3], own and found[2] is value)
    others = {section.path: section.kind for section in checkpoint.sections if not section.selected}
    yield from _below(checkpoint.rest, _Place("", None, 0, ""), others, seen, bare, arrays)


_Steps = tuple[Any, str, int] | None
"""The steps that lead to a node: those above, the last one, and how many they are.  Sharing what
is above keeps 100,000 nested lists from taking 100,000 lists of steps."""


class _Place(NamedTuple):
    section: str
    steps: _Steps
    depth: int
    path: str | None
    """Whole path from the root; ``None`` below the depth at which sections begin."""

    def name(self) -> str:
        parts: list[str] = []
        steps = self.steps
        while steps is not None:
            parts.append(steps[1])
            steps = steps[0]
        return ".".join(reversed(parts))[:_MAX_NAME] or self.section

    def below(self, label: object, key: object, sections: dict[str, str]) -> _Place:
        path = None if self.path is None or self.depth >= MAX_SECTION_DEPTH else join(self.path, key)
        if path is not None and path in sections:
            return _Place(path, None, self.depth + 1, path)
        if label is _NO_STEP:
            return self._replace(path=path, depth=self.depth + 1)
        above = 0 if self.steps is None else self.steps[2]
        steps = (self.steps, step(label), above + 1) if above < _MAX_STEPS else self.steps
        return _Place(self.section, steps, self.depth + 1, path)


def _below(
    root: object,
    place: _Place,
    sections: dict[str, str],
    seen: set[int],
    bare: list[Storage],
    arrays: list[tuple[str, str, Object]],
) -> Iterator[_Named]:
    """Every tensor at or below a node, under every name it has; what is above it is entered once.

    Of a section of weights the state_dict's tensors come first, under the names they have there.
    """
    listed: set[tuple[str, int]] = set()
    kept: list[object] = []  # what `listed` names by id
    stack: list[tuple[_Place, object]] = [(place, root)]
    while stack:
        place, node = stack.pop()
        if node is None or isinstance(node, (str, int, float, bytes)):
            continue
        if isinstance(node, TensorEntry) and (place.section, id(node)) not in listed:
            yield place.section, place.name(), node, False
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Storage):
            bare.append(node)
            continue
        if is_array(node):
            arrays.append((place.section, place.name(), node))
        if place.steps is None and place.path is not None:
            kind = sections.get(place.path)
            values = _weights(node) if kind in ("state_dict", "whole_model") else []
            for name, value in values:
                if isinstance(value, TensorEntry):
                    listed.add((place.section, id(value)))
                    kept.append(value)
                    yield place.section, name, value, True
        stack.extend(
            (place.below(label, key, sections), child)
            for label, key, child in reversed(_steps(node))
            if not isinstance(child, _SCALARS)
        )


def _weights(node: object) -> list[tuple[str, object]]:
    """Names and values of the state_dict that a section is, or whose module it is."""
    if module_state(node) is not None:
        return list(walk_module(node))
    return [(key, value) for key, value in named_values(node) or [] if isinstance(key, str)]


_SCALARS = (str, int, float, bytes, type(None))


def _steps(node: object) -> list[tuple[object, object, object]]:
    """A node's children, each with what is shown of the key or index that leads to it, and that key."""
    pairs = mapping_items(node)
    if pairs is not None:
        return [*((key, key, child) for key, child in pairs), *((_NO_STEP, 0, call) for call in effects_of(node))]
    if isinstance(node, (list, tuple)):
        # A list of ten million numbers is passed over, not copied.
        shown = ((index, index, child) for index, child in enumerate(node) if not isinstance(child, _SCALARS))
        return list(islice(shown, DEFAULT_LIMITS.tree_nodes))
    if not isinstance(node, Object):
        return [(_NO_STEP, 0, child) for child in children(node)]
    steps: list[tuple[object, object, object]] = [(_NO_STEP, index, part) for index, part in enumerate(node.args)]
    steps.append((_NO_STEP, "?", node.kwargs))
    steps.extend((index, index, item) for index, item in enumerate(node.items))
    steps.extend((key, key, value) for key, value in node.pairs)
    for index, part in enumerate(states(node)):
        if isinstance(part, InertDict):
            steps.extend((key, key, value) for key, value in part.pairs)
        else:
            steps.append((_NO_STEP, index, part))
    return steps


def _ties(named: list[_Named], several: set[int]) -> dict[int, str]:
    """For each tensor that stands elsewhere already, by its index: the name it is tied to."""
    if not several:
        return {}
    first: dict[tuple[object, ...], int] = {}
    tied: dict[int, str] = {}
    for index, (section, _, entry, _) in enumerate(named):
        if id(entry.storage) in several and entry.nbytes:
            kept = first.setdefault(entry.view, index)
            if kept != index:
                kept_section, kept_name = named[kept][:2]
                inside = kept_section == section or not kept_section
                tied[index] = kept_name if inside else f"{kept_section}.{kept_name}"
    return tied


def wanted(name: str, filters: Sequence[str]) -> bool:
    """Whether a name matches one of the glob patterns; all do where there are none."""
    from fnmatch import fnmatchcase

    return not filters or any(fnmatchcase(name, pattern) for pattern in filters)


def ordered(rows: list[TensorRow], sort: str) -> list[TensorRow]:
    """The rows in file order (``"file"``), natural order of names (``"name"``) or largest first (``"size"``)."""
    if sort == "name":
        return sorted(rows, key=lambda row: (row.section, natural_key(row.name)))
    if sort == "size":
        return sorted(rows, key=lambda row: -row.nbytes)
    return rows


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``layer10`` after ``layer2``."""
    import re

    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # Only these digits: there are characters that are digits and no numbers.
    return [(0, int(part)) if "0" <= part[0] <= "9" and len(part) < 19 else (1, part) for part in parts]
