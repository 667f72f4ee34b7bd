"""Selecting tensors of the state_dict, and leaving out parts that are beside it.

A glob is matched as `fnmatch.fnmatchcase` does: ``*`` crosses dots, and case counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, Final, NamedTuple

from ckptkit.arguments import several
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, TensorEntry
from ckptkit.errors import RewriteError
from ckptkit.nearness import did_you_mean
from ckptkit.normalize import origin_alone
from ckptkit.normalize.modules import tensor_role
from ckptkit.normalize.nested import NestedDicts
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, join, step
from ckptkit.normalize.shapes import is_optimizer, parts
from ckptkit.pickling.inert import SCALARS, InertDict, Object, holds, mapping_items, states, tensors_in
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.report import count_of, listed
from ckptkit.rewrite.names import module_paths
from ckptkit.rewrite.storages import with_tensors_replaced
from ckptkit.shell import quoted
from ckptkit.startup import dataclass

__all__ = ["LeaveOut", "Select", "WeightsOnly", "pair_lists", "part_paths", "places"]

_MAX_LISTED = 5
"""Names in a message."""

_MAX_COMPARED = 2000
"""Names that a pattern is compared with to find close ones: each takes a fraction of a millisecond."""

_MAX_NAME = 200
"""Characters of names that are compared, or shown."""


@dataclass(frozen=True, slots=True)
class Select:
    """Keep the values of the state_dict whose names match, in the same order.

    A pattern is compared with the name and with the result of ``rename``.  Everything beside the weights is kept, and
    so are the versions of modules that still have values.

    Args:
        include: globs; a name is kept if it matches one of them.  None keeps all.
        exclude: globs; a name that matches one of them is dropped even if ``include`` matches it.
        rename: from a name to its name after the following rewriters, such as the ``rename`` of `ckptkit.Rename`.
            Comparisons ignore it.

    Raises (when applied):
        RewriteError: a pattern of ``include`` matches nothing, nothing is left, or a parameter would be dropped while
            there is an optimizer, whose state is keyed by the position of parameters.
    """

    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    rename: Callable[[str], str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, several(getattr(self, name)))

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        state_dict = checkpoint.state_dict
        names = list(state_dict.everything)
        included = self._matching(self.include, names)
        for pattern, found in included.items():
            if not found:
                raise RewriteError(f"no name matches {pattern!r}; {_suggestions(pattern, names)}", names=names)
        wanted = set().union(*included.values()) if self.include else set(names)
        wanted.difference_update(*self._matching(self.exclude, names).values())
        everything = {name: value for name, value in state_dict.everything.items() if name in wanted}
        if len(everything) == len(names):
            return checkpoint
        if not everything:
            raise RewriteError(
                f"none of {count_of(len(names), 'name')} is left; {_suggestions('', names)}", names=names
            )
        _check_optimizer(checkpoint, everything)
        versions = state_dict.versions
        if versions is not None:
            kept = {"", *(path for name in everything for path in module_paths(name))}
            versions = {path: entry for path, entry in versions.items() if path in kept}
        return checkpoint.replace(state_dict=state_dict.holding(everything, versions))

    def unmatched(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The patterns of ``exclude`` that match no name."""
        matching = self._matching(self.exclude, list(checkpoint.state_dict.everything))
        return tuple(pattern for pattern, found in matching.items() if not found)

    def _matching(self, patterns: Sequence[str], names: list[str]) -> dict[str, set[str]]:
        """The names that each pattern matches."""
        found: dict[str, set[str]] = {}
        renamed = {name: self.rename(name) for name in names} if self.rename is not None and patterns else {}
        for pattern in patterns:
            found[pattern] = {
                name
                for name in names
                if fnmatchcase(name, pattern) or (renamed and fnmatchcase(renamed[name], pattern))
            }
        return found


def _suggestions(pattern: str, names: list[str]) -> str:
    """Some of the names there are, those like a pattern first."""
    from difflib import get_close_matches

    short = [name for name in names[:_MAX_COMPARED] if len(name) <= _MAX_NAME]
    close = get_close_matches(pattern[:_MAX_NAME].replace("*", ""), short, cutoff=0.5) if pattern else []
    others = (name for name in names if name not in close)
    return f"there is {_listed([*close, *islice(others, _MAX_LISTED)], len(names))}"


def _listed(names: list[str], count: int) -> str:
    """The first of the names, and how many of ``count`` are left."""
    return listed([repr(name[:_MAX_NAME]) for name in names], _MAX_LISTED, total=count) or "none"


def _check_optimizer(checkpoint: Checkpoint, kept: dict[str, object]) -> None:
    """Refuse to drop parameters that an optimizer counts.

    Raises:
        RewriteError: it does.
    """
    known = checkpoint.module is not None
    lost = [
        name
        for name, value in checkpoint.state_dict.everything.items()
        if name not in kept and _may_be_parameter(name, value, known=known)
    ]
    optimizers = list(_optimizers(checkpoint.rest)) if lost else []
    if optimizers:
        remedy = " ".join(f"--leave-out {quoted(path[:_MAX_NAME])}" for path in optimizers[:_MAX_LISTED])
        raise RewriteError(
            f"{_listed(lost, len(lost))} would be left out, but the optimizer's state is keyed by the position of "
            f"each parameter; {remedy} leaves it out",
            names=lost,
        )


def _may_be_parameter(name: str, value: object, *, known: bool) -> bool:
    if isinstance(value, TensorEntry):
        return tensor_role(name, value, known=known)[0] == "parameter"
    return is_tensor_like(value)


def _optimizers(root: object) -> Iterator[str]:
    """The paths of optimizers, with tensors in their state or without."""
    seen: set[int] = set()
    stack = [("", root, 0)]
    while stack:
        path, node, depth = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if is_optimizer(node):
            yield path
        elif depth < MAX_SECTION_DEPTH:
            below = ((key, value) for key, value in reversed(parts(node)) if not isinstance(value, SCALARS))
            stack.extend((join(path, key), value, depth + 1) for key, value in below)


@dataclass(frozen=True, slots=True)
class WeightsOnly:
    """Keep only the state_dict: no optimizer, scheduler, epoch or arguments.

    Raises (when applied):
        RewriteError: there is no state_dict to keep.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        if not checkpoint.state_dict.everything:
            raise RewriteError("there is no state_dict to keep")
        state_dict = checkpoint.state_dict
        if state_dict.is_module:
            state_dict = state_dict.holding(state_dict.everything, state_dict.versions)
        elif isinstance(state_dict.container, NestedDicts):
            container = state_dict.container.flat(state_dict.versions)
            state_dict = StateDict(state_dict.everything, versions=state_dict.versions, container=container)
        origin = origin_alone(checkpoint.origin, state_dict)
        return checkpoint.replace(state_dict=state_dict, rest=STATE_DICT, discarded=(), origin=origin)


_MAX_PATHS = 20
"""Paths in a message."""

_MAX_PATH = 200
"""Characters of a path in a message."""

_GONE: Final = object()
"""Replaces a removed item of a list."""


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """Remove parts of the file: an optimizer, an EMA, arguments.

    Args:
        paths: for each part the keys that lead to it from the top of the file, joined with dots, as in
            `Checkpoint.sections`: ``"optimizer"``, ``"trainer.optimizer"``.  Any key at the file's top level is
            allowed.

    Raises (when applied):
        RewriteError: there is no such part, it is the weights or contains them, or it cannot be removed from its place
            (an argument that an object is built from).
    """

    paths: str | Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", several(self.paths))

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        if not self.paths:
            return checkpoint
        result = with_tensors_replaced(checkpoint, lambda leaf: leaf)  # its content is ours to change
        found = {path: _place(checkpoint, result.rest, path) for path in self.paths}
        rest = result.rest
        for path, place in found.items():
            if place.node is rest and isinstance(rest, tuple):
                continue
            if not _removed(place):
                stands = (
                    "is in a tuple"
                    if isinstance(place.node, tuple)
                    else ("is an argument that an object is built from")
                )
                raise RewriteError(
                    f"{path[:_MAX_PATH]!r} cannot be left out: it {stands}; leave out the value that contains it"
                )
        if isinstance(rest, tuple):
            gone = {place.key for place in found.values() if place.node is rest}
            rest = tuple(part for index, part in enumerate(rest) if index not in gone)
        for place in found.values():
            if isinstance(place.node, list):
                place.node[:] = [item for item in place.node if item is not _GONE]
            elif isinstance(place.node, Object):
                place.node.items[:] = [item for item in place.node.items if item is not _GONE]
        if holds(checkpoint.rest, STATE_DICT) and not holds(rest, STATE_DICT):
            raise RewriteError(
                f"{', '.join(map(repr, self.paths))}: the weights are there; they cannot be left out",
                names=self.paths,
            )
        sections = tuple(section for section in checkpoint.sections if self._stays(section.path, rest))
        return result.replace(rest=rest, sections=sections)

    def _stays(self, section: str, rest: object) -> bool:
        """Whether a section is still there; keys hold dots, so one that seems to be below a path need not."""
        below = any(section.startswith(f"{path}.") for path in self.paths)
        return section not in self.paths and (not below or any(True for _ in places(rest, "", section, 1, set())))


class _Place(NamedTuple):
    """The place of a part: its container, the key or index there, and the part."""

    node: object
    key: object
    value: object


def _place(checkpoint: Checkpoint, rest: object, path: str) -> _Place:
    """Where the part of a path is in ``rest``.

    Raises:
        RewriteError: nowhere, or it is the weights.
    """
    shown = f"{path[:_MAX_PATH]!r}"
    found = list(places(rest, "", path, 1, set()))
    number = 1
    bare, mark, digits = path.rpartition("#")  # as sections with one path are distinguished
    if not found and mark and digits.isdecimal() and len(digits) < 9:
        found, number = list(places(rest, "", bare, 1, set())), int(digits)
    if len(found) > 1:
        # A section's path is that of the first with tensors, or with the number, of those with tensors.
        found = [place for place in found if _holds_tensors(place.value)] or found
    if len(found) < number:
        known = part_paths(checkpoint)
        told = listed([repr(each[:_MAX_PATH]) for each in known], _MAX_PATHS) or "nothing beside the weights"
        meant = did_you_mean(path, known, shown=repr)
        raise RewriteError(f"there is no {shown} to leave out; there is {told}{meant}")
    place = found[number - 1]
    if place.value is STATE_DICT:
        raise RewriteError(f"{shown} contains the weights, which cannot be left out")
    return place


def part_paths(checkpoint: Checkpoint) -> list[str]:
    """The parts that there are beside the weights."""
    top = (join("", key) for key, value in parts(checkpoint.rest) if value is not STATE_DICT)
    sections = (section.path for section in checkpoint.sections if not section.selected and section.path)
    return list(dict.fromkeys([*top, *sections]))


def places(node: object, above: str, path: str, depth: int, seen: set[tuple[int, str]]) -> Iterator[_Place]:
    """Every place that a path can mean (keys hold dots, too), in file order."""
    for key, value in parts(node):
        here = join(above, key)
        if here == path:
            yield _Place(node, key, value)
        elif depth < MAX_SECTION_DEPTH and (not here or path.startswith(f"{here}.")) and (id(value), here) not in seen:
            seen.add((id(value), here))
            yield from places(value, here, path, depth + 1, seen)


def _holds_tensors(root: object) -> bool:
    return holds(root, STATE_DICT) or any(tensors_in(root))


def _removed(place: _Place) -> bool:
    """Take a part away from what holds it; items of lists are marked, so that indices stay."""
    node, key, value = place
    items = node.items if isinstance(node, Object) else node
    if isinstance(items, list) and isinstance(key, int) and key < len(items) and items[key] is value:
        items[key] = _GONE
        return True
    removed = False
    for pairs in pair_lists(node):
        kept = [pair for pair in pairs if not _same(_key(pair), key)]
        removed = removed or len(kept) < len(pairs)
        pairs[:] = kept
    return removed


def pair_lists(node: object) -> Iterator[list[Any]]:
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
    """Whether two keys are the same; keys nested by a stranger are compared in their displayed form."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    return one is other or (type(one) is type(other) and step(one) == step(other) != "?")
