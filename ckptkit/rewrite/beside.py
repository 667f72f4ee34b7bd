"""Plain values beside the weights, kept as text where a container holds only tensors and strings, and brought back.

They are in the string metadata under `BESIDE`, as JSON::

    {"version": 1, "tree": {"dims": {"n_mels": 80}, "model_state_dict": {"$weights": true}}, "among": [[2, "size", 64]]}

``tree`` is the file's own dict; ``{"$weights": true}`` is where the state_dict stood.  ``among`` are values that stood
among the tensors of the state_dict: the place that each had in it, its name and it.  ``attributes`` are those of the
module that the weights were walked from (``names``, ``yaml``); a state_dict has no place for them, and they stay in the
metadata of a ``.pth`` too.  How values are spelled says `ckptkit.normalize.plain_json`.

A part of the file (a key beside the weights) is kept whole or not at all.  Text that is anything else than described
here, or far more than `Limits.beside_nbytes`, stays what it is, a string of the metadata.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import MODULE_MARKS, module_state
from ckptkit.normalize.plain_json import (
    MOST_DEEP,
    WEIGHTS,
    NotPlainError,
    PlainReader,
    PlainWriter,
    WrongTextError,
    parsed,
    plain_extra,
    plain_pairs,
)
from ckptkit.normalize.sections import brief, join
from ckptkit.normalize.selection import BESIDE
from ckptkit.normalize.shapes import parts
from ckptkit.pickling.inert import SCALARS, InertDict, Object, holds, mapping_items
from ckptkit.report import count_of
from ckptkit.rewrite.select import pair_lists, places
from ckptkit.rewrite.storages import with_tensors_replaced
from ckptkit.startup import dataclass

__all__ = ["KeepBeside", "PutUnder", "restored", "without_plain_values"]


@dataclass(frozen=True, slots=True)
class KeepBeside:
    """Move the plain values beside the weights into the metadata, as text; see `ckptkit.rewrite.beside`.

    Values that are not plain (tensors, optimizer state, objects) stay in place.  A ``.pth`` written from the result, or
    from a file that contains it, has the values back in their places.

    Args:
        among: whether to move plain values among the tensors of the state_dict too, and plain attributes of the module
            that it was walked from.
    """

    among: bool = True

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        kept = _Kept.of(checkpoint, among=self.among)
        if kept.text is None:
            return checkpoint
        state_dict = checkpoint.state_dict
        if kept.among:
            everything = {name: value for name, value in state_dict.everything.items() if name not in kept.among}
            state_dict = state_dict.holding(everything, state_dict.versions)
        metadata = {**checkpoint.metadata, BESIDE: kept.text}
        return checkpoint.replace(state_dict=state_dict, rest=kept.rest, metadata=metadata)

    def kept_of(self, checkpoint: Checkpoint) -> tuple[list[str], dict[str, str]]:
        """The parts of a checkpoint that are moved, and those that are not, with their content."""
        kept = _Kept.of(checkpoint, among=self.among)
        return [*kept.parts, *kept.among], kept.left


class _Kept(NamedTuple):
    """The values of a checkpoint that are moved.

    Attributes:
        text: for the metadata; ``None``: nothing is moved.
        rest: what stays beside the weights.
        parts: the keys that are moved.
        left: the keys that are not, and why.
        among: the values among the tensors that are moved.
    """

    text: str | None
    rest: object
    parts: list[str]
    left: dict[str, str]
    among: Mapping[str, object]

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, among: bool) -> _Kept:
        room = _Room()
        rest, parts, left = checkpoint.rest, list[str](), dict[str, str]()
        tree: object = WEIGHTS
        if rest is STATE_DICT:
            tree = _tree_of(checkpoint.metadata) or tree
        elif holds(rest, STATE_DICT):
            try:
                tree, rest = _around(rest, "", room, parts, left)
            except NotPlainError as error:
                tree, rest, parts, left = WEIGHTS, checkpoint.rest, [], {"it contains the weights": str(error)}
        moved: dict[str, object] = {}
        rows: list[list[object]] = []
        for place, (name, value) in enumerate(checkpoint.state_dict.everything.items()) if among else ():
            if name in checkpoint.state_dict:
                continue
            with contextlib.suppress(NotPlainError):
                rows.append([place, name, room.value(value)])
                moved[name] = value
        own, path = _attributes(checkpoint, room) if among else {}, checkpoint.origin.state_path or ""
        if tree == WEIGHTS and not moved and not own:
            return cls(None, checkpoint.rest, [], left, {})
        parts += [join(path, name) for name in own]
        return cls(_text(tree, rows, own), rest, parts, left, moved)


def _attributes(checkpoint: Checkpoint, room: _Room) -> dict[str, object]:
    """The plain attributes of the module that the weights were walked from, and those that the metadata hold."""
    found: dict[str, object] = {}
    if BESIDE in checkpoint.metadata:
        with contextlib.suppress(WrongTextError):
            found |= _own(parsed(checkpoint.metadata[BESIDE]))
    state = module_state(checkpoint.module)
    for name, value in (plain_pairs(state) or []) if state is not None else []:
        if isinstance(name, str) and name not in MODULE_MARKS and name != "training" and not name.startswith("_"):
            with contextlib.suppress(NotPlainError):
                found[name] = room.value(value)
    return found


def _own(document: Mapping[str, Any]) -> dict[str, object]:
    """The attributes in a document, unchanged.

    Raises:
        WrongTextError: they are not plain values by name.
    """
    own: object = document.get("attributes", {})
    reader = PlainReader()
    if not isinstance(own, dict) or not isinstance(reader.value({"": list(own.values())}), InertDict) or reader.places:
        raise WrongTextError
    return own


def _text(tree: object, among: list[list[object]], attributes: Mapping[str, object]) -> str:
    document = {"version": 1, "tree": tree, "among": among, "attributes": attributes}
    return json.dumps({key: value for key, value in document.items() if value}, separators=(",", ":"))


class _Room:
    """Makes text of values as long as there is room for it."""

    def __init__(self) -> None:
        self._nbytes = DEFAULT_LIMITS.beside_nbytes
        self.writer = PlainWriter()

    def value(self, node: object, depth: int = 0) -> object:
        """A plain value as JSON, at a depth below the top.

        Raises:
            NotPlainError: it is not one, or there is no room for it.
        """
        made = self.writer.part(node, depth)
        nbytes = len(json.dumps(made, separators=(",", ":")))
        if nbytes > self._nbytes:
            raise NotPlainError("too large")
        self._nbytes -= nbytes
        return made


def _around(
    node: object, path: str, room: _Room, parts: list[str], left: dict[str, str], depth: int = 0
) -> tuple[object, object]:
    """What contains the weights, as JSON, and what of it is not kept.

    Raises:
        NotPlainError: it is nothing that can be kept around them.
    """
    if node is STATE_DICT:
        return WEIGHTS, STATE_DICT
    pairs = plain_pairs(node)
    if pairs is None and isinstance(node, (list, tuple)):
        pairs = list(enumerate(node))
    if pairs is None or depth >= MOST_DEEP:
        raise NotPlainError(f"contains {brief(node)}")
    kept: list[tuple[object, object]] = []
    rest: list[tuple[object, object]] = []
    for key, value in pairs:
        here = join(path, key)
        if holds(value, STATE_DICT):
            inner, remaining = _around(value, here, room, parts, left, depth + 1)
            kept.append((key, inner))
            rest.append((key, remaining))
            continue
        try:
            kept.append((key, room.value(value, depth + 1)))
            parts.append(here)
        except NotPlainError as error:
            if isinstance(node, (list, tuple)):  # what follows would have another place
                raise
            left[here] = str(error)
            rest.append((key, value))
    remaining = STATE_DICT if all(value is STATE_DICT for _, value in rest) else InertDict(rest)
    if isinstance(node, (list, tuple)):
        items = [value for _, value in kept]
        return items if isinstance(node, list) else {"$tuple": items}, remaining
    return room.writer.mapping(node, kept), remaining


@dataclass(frozen=True, slots=True)
class PutUnder:
    """Put the weights under a key of the file's own dict; everything else stays.

    They are removed from their old place, and the key's old value is replaced: for example, an averaged model replaces
    the raw one.

    Args:
        key: where they go, with dots between the keys of nested dicts, which are created if needed.

    Raises (when applied):
        RewriteError: there are no weights, the key is invalid, a value on the way is not a dict, or the file's own dict
            is a list, a tuple or an object.
    """

    key: str

    def __post_init__(self) -> None:
        if not all(self.key.split(".")):
            raise RewriteError(f"{self.key!r:.200} is not a valid key for weights; expected one such as 'model'")

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        if not checkpoint.state_dict.everything:
            raise RewriteError(f"there is no state_dict to put under {self.key!r:.200}")
        result = with_tensors_replaced(checkpoint, lambda leaf: leaf)  # its content is ours to change
        rest, path = result.rest, checkpoint.origin.state_path or ""
        at = None
        if rest is STATE_DICT or checkpoint.origin.is_program:
            rest = InertDict()
        elif path == self.key:
            return checkpoint
        else:
            at = _taken_out(rest, path)
        _put(rest, self.key, at)
        gone = (self.key, f"{self.key}.")
        sections = tuple(
            replace(section, path=self.key) if section.selected else section
            for section in checkpoint.sections
            if section.selected or not (section.path == gone[0] or section.path.startswith(gone[1]))
        )
        origin = replace(checkpoint.origin, state_path=self.key, is_program=False)
        return result.replace(rest=rest, sections=sections, origin=origin)

    def replaced(self, checkpoint: Checkpoint) -> str | None:
        """The value under the key, in words; ``None``: nothing."""
        for section in checkpoint.sections:
            if section.path == self.key and not section.selected:
                kind = "model" if section.kind == "whole_model" else section.kind
                return f"a {kind} of {count_of(section.tensors, 'tensor')}"
        values = [place.value for place in places(checkpoint.rest, "", self.key, 1, set())]
        return next((brief(value) for value in values if value is not STATE_DICT), None)


def _taken_out(rest: object, path: str) -> int | None:
    """Take the weights out of their place; returns the place among the keys of the file's own dict.

    Raises:
        RewriteError: they are in no dict, or the file's own value is not one.
    """
    stands = next((place for place in places(rest, "", path, 1, set()) if place.value is STATE_DICT), None)
    for node in (rest, None if stands is None else stands.node):
        if not isinstance(node, (InertDict, Object)) or mapping_items(node) is None:
            raise RewriteError(
                f"the weights are in {brief(node)}, which has no keys; with --weights-only they can be put under one"
            )
    at = None
    for pairs in pair_lists(stands.node) if stands is not None else ():
        for index, (key, value) in enumerate(pairs):
            if value is STATE_DICT and stands is not None and key is stands.key:
                at = index if stands.node is rest else None
                del pairs[index]
                break
    return at


def _put(node: object, path: str, at: int | None) -> None:
    """Put the place of the weights into a dict, or one below it.

    Raises:
        RewriteError: something other than a dict is where one must be.
    """
    lists = list(pair_lists(node))
    known = {pair[0]: (pairs, index) for pairs in lists for index, pair in enumerate(pairs) if isinstance(pair[0], str)}
    if path in known:
        pairs, index = known[path]
        pairs[index] = (path, STATE_DICT)
        return
    keys = path.split(".")
    heads = [".".join(keys[:count]) for count in range(len(keys) - 1, 0, -1)]
    head = next((head for head in heads if head in known), heads[-1] if heads else None)
    if head in known:
        pairs, index = known[head]
        inner = pairs[index][1]
        if mapping_items(inner) is None:
            raise RewriteError(f"nothing can be put under {path!r:.200}: {head!r:.200} exists and is {brief(inner)}")
        _put(inner, path[len(head) + 1 :], None)
        return
    value: object = STATE_DICT
    if head is not None:
        value = InertDict()
        _put(value, path[len(head) + 1 :], None)
    lists[0].insert(len(lists[0]) if at is None else at, (path if head is None else head, value))


def without_plain_values(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the plain values among its tensors; see `plain_extra`."""
    state_dict, plain = checkpoint.state_dict, set(plain_extra(checkpoint.state_dict))
    everything = {name: value for name, value in state_dict.everything.items() if name not in plain}
    return checkpoint.replace(state_dict=state_dict.holding(everything, state_dict.versions))


# And back.


def restored(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the values from its metadata in their places; unchanged if there are none.

    Nothing is restored where something is beside the weights already, or the text is not as described above.
    """
    text = checkpoint.metadata.get(BESIDE)
    if text is None or checkpoint.rest is not STATE_DICT or not checkpoint.state_dict:
        return checkpoint
    try:
        document = parsed(text)
        reader = PlainReader()
        rest = reader.value(document["tree"])
        if not reader.places:
            raise WrongTextError
        everything = _with_among(checkpoint.state_dict.everything, document.get("among", []))
        own = _own(document)
    except WrongTextError:
        return checkpoint
    state_dict = checkpoint.state_dict
    if len(everything) > len(state_dict.everything):
        state_dict = state_dict.holding(everything, state_dict.versions)
    elif rest is STATE_DICT and own:
        return checkpoint
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != BESIDE}
    if own:
        metadata[BESIDE] = _text(WEIGHTS, [], own)
    path = _place_of_weights(rest)
    sections = tuple(replace(each, path=path) if each.selected else each for each in checkpoint.sections)
    origin = replace(checkpoint.origin, state_path=path)
    return checkpoint.replace(state_dict=state_dict, rest=rest, metadata=metadata, sections=sections, origin=origin)


def _place_of_weights(rest: object) -> str:
    """The path of the first place of the weights in a tree that was restored."""
    stack = [("", rest)]
    while stack:
        path, node = stack.pop()
        if node is STATE_DICT:
            return path
        if not isinstance(node, SCALARS):
            stack.extend((join(path, key), value) for key, value in reversed(parts(node)))
    return ""


def _tree_of(metadata: Mapping[str, str]) -> object:
    """The tree that the metadata hold already; ``None``: none that can be read."""
    try:
        document = parsed(metadata.get(BESIDE, ""))
        reader = PlainReader()
        reader.value(document["tree"])
    except WrongTextError:
        return None
    tree: object = document["tree"]
    return tree if reader.places else None


def _with_among(everything: Mapping[str, object], among: object) -> dict[str, object]:
    """The values of a state_dict with others among them, each in its place.

    Raises:
        WrongTextError: they do not have the required form, or have the names of others.
    """
    rows: dict[int, tuple[str, object]] = {}
    reader = PlainReader()
    names = set(everything)
    for row in among if isinstance(among, list) else [None]:
        if not isinstance(row, list) or len(row) != 3 or type(row[0]) is not int or not isinstance(row[1], str):
            raise WrongTextError
        if row[1] in names or row[0] in rows:
            raise WrongTextError
        names.add(row[1])
        rows[row[0]] = row[1], reader.value(row[2])
    if reader.places:
        raise WrongTextError
    found: dict[str, object] = {}
    others = iter(everything.items())
    for place in range(len(names)):
        pair = rows.pop(place, None) or next(others, None)
        if pair is not None:
            found[pair[0]] = pair[1]
    found.update(others)
    found.update(row for _, row in sorted(rows.items()))
    return found
