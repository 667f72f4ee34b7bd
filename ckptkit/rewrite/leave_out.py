"""Leaving parts of a file behind that stand beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ckptkit.arguments import several
from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, join, step
from ckptkit.normalize.shapes import parts
from ckptkit.pickling.inert import InertDict, Object, mapping_items, states, tensors_in, walk
from ckptkit.report import listed
from ckptkit.rewrite.leaves import with_leaves

__all__ = ["LeaveOut"]

_MAX_LISTED = 20
"""Paths in a message."""

_MAX_PATH = 200
"""Characters of a path in a message."""

_GONE: Final = object()
"""Stands where an item of a list is taken away."""


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """Remove parts of the file: an optimizer, an EMA, arguments.

    Args:
        paths: of each part the keys that lead to it from the top of the file, joined with dots, as
            `Checkpoint.sections` has them: ``"optimizer"``, ``"trainer.optimizer"``.  Any key of the
            file's top level is one.

    Raises (when applied):
        RewriteError: there is no such part, it is the weights or holds them, or it cannot be taken
            away from where it stands (an argument that an object is made from).
    """

    paths: str | Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", several(self.paths))

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        if not self.paths:
            return checkpoint
        result = with_leaves(checkpoint, lambda leaf: leaf)  # what it holds is ours to change
        places = {path: _place(checkpoint, result.rest, path) for path in self.paths}
        rest = result.rest
        for path, place in places.items():
            if place.node is rest and isinstance(rest, tuple):
                continue
            if not _removed(place):
                stands = "stands in a tuple" if isinstance(place.node, tuple) else "is what an object is made from"
                raise RewriteError(f"{path[:_MAX_PATH]!r} cannot be left out: it {stands}; leave out what holds it")
        if isinstance(rest, tuple):
            gone = {place.key for place in places.values() if place.node is rest}
            rest = tuple(part for index, part in enumerate(rest) if index not in gone)
        for place in places.values():
            if isinstance(place.node, list):
                place.node[:] = [item for item in place.node if item is not _GONE]
            elif isinstance(place.node, Object):
                place.node.items[:] = [item for item in place.node.items if item is not _GONE]
        if _holds(checkpoint.rest, STATE_DICT) and not _holds(rest, STATE_DICT):
            raise RewriteError(f"{', '.join(map(repr, self.paths))}: the weights lie there; they cannot be left out")
        sections = tuple(section for section in checkpoint.sections if self._stays(section.path, rest))
        return result.replace(rest=rest, sections=sections)

    def _stays(self, section: str, rest: object) -> bool:
        """Whether a section is still there; keys hold dots, so one that seems to lie below a path need not."""
        below = any(section.startswith(f"{path}.") for path in self.paths)
        return section not in self.paths and (not below or any(True for _ in _places(rest, "", section, 1, set())))


class _Place(NamedTuple):
    """Where a part stands: what holds it, the key or index there, and the part."""

    node: object
    key: object
    value: object


def _place(checkpoint: Checkpoint, rest: object, path: str) -> _Place:
    """Where the part of a path stands in ``rest``.

    Raises:
        RewriteError: nowhere, or it is the weights.
    """
    shown = f"{path[:_MAX_PATH]!r}"
    found = list(_places(rest, "", path, 1, set()))
    number = 1
    bare, mark, digits = path.rpartition("#")  # as sections of one path are told apart
    if not found and mark and digits.isdecimal() and len(digits) < 9:
        found, number = list(_places(rest, "", bare, 1, set())), int(digits)
    if len(found) > 1:
        # A section's path is that of the first with tensors, or with the number, of those with tensors.
        found = [place for place in found if _holds_tensors(place.value)] or found
    if len(found) < number:
        raise RewriteError(f"there is no {shown} to leave out; there is {_listed(checkpoint)}")
    place = found[number - 1]
    if place.value is STATE_DICT:
        raise RewriteError(f"{shown} is the weights; they cannot be left out")
    return place


def _listed(checkpoint: Checkpoint) -> str:
    """The parts that there are beside the weights."""
    top = (join("", key) for key, value in parts(checkpoint.rest) if value is not STATE_DICT)
    sections = (section.path for section in checkpoint.sections if not section.selected and section.path)
    paths = list(dict.fromkeys([*top, *sections]))
    return listed([repr(path[:_MAX_PATH]) for path in paths], _MAX_LISTED) or "nothing beside the weights"


def _places(node: object, above: str, path: str, depth: int, seen: set[tuple[int, str]]) -> Iterator[_Place]:
    """Every place that a path can mean (keys hold dots, too), in file order."""
    for key, value in parts(node):
        here = join(above, key)
        if here == path:
            yield _Place(node, key, value)
        elif depth < MAX_SECTION_DEPTH and (not here or path.startswith(f"{here}.")) and (id(value), here) not in seen:
            seen.add((id(value), here))
            yield from _places(value, here, path, depth + 1, seen)


def _holds(root: object, wanted: object) -> bool:
    return any(node is wanted for node in walk(root))


def _holds_tensors(root: object) -> bool:
    return _holds(root, STATE_DICT) or any(tensors_in(root))


def _removed(place: _Place) -> bool:
    """Take a part away from what holds it; items of lists are marked, so that indices stay."""
    node, key, value = place
    items = node.items if isinstance(node, Object) else node
    if isinstance(items, list) and isinstance(key, int) and key < len(items) and items[key] is value:
        items[key] = _GONE
        return True
    removed = False
    for pairs in _pair_lists(node):
        kept = [pair for pair in pairs if not _same(_key(pair), key)]
        removed = removed or len(kept) < len(pairs)
        pairs[:] = kept
    return removed


def _pair_lists(node: object) -> Iterator[list[Any]]:
    """The lists of pairs of a mapping, or of an object's items and attributes."""
    holders: tuple[object, ...] = (node,)
    if isinstance(node, Object):
        yield node.pairs
        holders = tuple(states(node)) if mapping_items(node) is None else node.args[-1:]
    for holder in holders:
        if isinstance(holder, InertDict):
            yield holder.pairs
        elif isinstance(holder, list) and holder is not node and mapping_items(node) is not None:
            yield holder


def _key(pair: object) -> object:
    return pair[0] if isinstance(pair, (list, tuple)) and len(pair) == 2 else _GONE


def _same(one: object, other: object) -> bool:
    """Whether two keys are one; what a stranger nested is compared as it is shown."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    return one is other or (type(one) is type(other) and step(one) == step(other) != "?")
