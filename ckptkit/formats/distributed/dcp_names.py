"""The names of torch.distributed.checkpoint: a tree as its planner flattens it, and the way back to each value.

Dicts are gone into, and lists that contain a tensor or a dict, in lists of lists too; what is in neither is one value,
tuples whatever they hold.  A name is the keys that lead to a value, with dots between them (torch 2.4 and later:
``torch/distributed/checkpoint/_nested_dict.py`` and ``_traverse.py``; before, a dict or list without tensors was one
value).  Losses are recorded (`Flat.lost`): the classes and attributes of dicts, keys that are not text, empty dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field

from ckptkit.checkpoint import STATE_DICT, Checkpoint, TensorEntry
from ckptkit.errors import KeyCollisionError, RewriteError
from ckptkit.formats.torch_zip_writer import written_tree
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import brief, is_plain_value
from ckptkit.pickling.inert import ABSENT, SCALARS, Global, InertDict, Object, attributes, effects_of, mapping_items
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.startup import dataclass

__all__ = ["NAME", "Flat", "Path", "flattened", "values_at"]

NAME = "dcp"

_MAX_LEVELS = 100
"""Dicts and lists inside one another: torch's planner recurses for each, and `ckptkit.formats.distributed.dcp` reads
as many."""

Path = tuple[str | int, ...]
"""The keys that lead to a value: text those of dicts, numbers those of lists."""


@dataclass(slots=True)
class Flat:
    """A tree as torch's planner flattens it.

    Attributes:
        values: by name, in order: a `TensorEntry`, or any other node that is written as one item.
        paths: of each name the keys that lead there.
        lost: the parts of the tree that its names do not keep, in words.
    """

    values: dict[str, object] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The values that are tensors."""
        return {name: value for name, value in self.values.items() if isinstance(value, TensorEntry)}

    def add(self, path: Path, value: object) -> None:
        """A value and the keys that lead there.

        Raises:
            KeyCollisionError: another has the same name.
        """
        name = _name(path)
        if name in self.values:
            raise KeyCollisionError(str(self.paths[name]), str(path), name)
        self.values[name], self.paths[name] = value, path
        if isinstance(value, TensorEntry) and not (is_plain_value(value) and value.attributes is None):
            cls = value.subclass.qualified if isinstance(value.subclass, Global) else "its attributes"
            self.lost.append(f"{name[-100:]} (a plain tensor is written, without {cls:.100})")
        elif not isinstance(value, TensorEntry) and is_tensor_like(value):
            self.lost.append(f"{name[-100:]} (not a plain tensor: written as a pickled value)")


def flattened(checkpoint: Checkpoint) -> Flat:
    """What torch's ``flatten_state_dict`` makes of a checkpoint's tree.

    Raises:
        KeyCollisionError: two values would have one name.
        RewriteError: the tree is not a dict, is empty, or contains itself; or a key has no text.
    """
    weights = _weights(checkpoint)
    found = Flat()
    root = written_tree(checkpoint)
    if root is not STATE_DICT and mapping_items(root) is None:
        raise RewriteError(
            f"a {NAME} folder stores a dict, but this is {brief(root)}; --all-tensors writes every tensor under a name"
        )
    within: set[int] = set()
    stack: list[tuple[Path, object, bool]] = [((), root, False)]
    while stack:
        path, node, is_left = stack.pop()
        node = weights if node is STATE_DICT else node
        if is_left:
            within.discard(id(node))
            continue
        pairs = mapping_items(node)
        below: list[tuple[Path, object, bool]] = []
        if pairs is not None:
            below = [((*path, _text(key, path)), value, False) for key, value in pairs]
            found.lost += _lost(node, path, pairs)
        elif isinstance(node, list) and _is_gone_into(node):
            below = [((*path, at), value, False) for at, value in enumerate(node)]
        else:
            found.add(path, node)
            continue
        if id(node) in within or len(path) > _MAX_LEVELS:
            told = "contains itself" if id(node) in within else f"has more than {_MAX_LEVELS} levels"
            raise RewriteError(f"{_name(path):.200}: {told}, which is not possible in a {NAME} folder")
        within.add(id(node))
        stack += [(path, node, True), *reversed(below)]
    if not found.values:
        raise RewriteError(f"there is nothing to write: a {NAME} folder stores named values, and it has none")
    return found


def _weights(checkpoint: Checkpoint) -> object:
    """The node for the state_dict: for a module its values, as torch requests them before it saves."""
    state_dict = checkpoint.state_dict
    lowered = None if state_dict.is_module else lower_state_dict(state_dict)
    return InertDict(list(state_dict.everything.items())) if mapping_items(lowered) is None else lowered


def values_at(checkpoint: Checkpoint, paths: Mapping[str, Path]) -> dict[str, object]:
    """The content of a checkpoint's tree at given paths, without paths that lead nowhere."""
    weights, dicts = _weights(checkpoint), dict[int, dict[object, object]]()
    found: dict[str, object] = {}
    for name, path in paths.items():
        node = checkpoint.rest
        for key in path:
            node = weights if node is STATE_DICT else node
            if isinstance(key, int):
                node = node[key] if isinstance(node, list) and key < len(node) else ABSENT
            else:
                if id(node) not in dicts:
                    dicts[id(node)] = {_text(each, ()): value for each, value in mapping_items(node) or ()}
                node = dicts[id(node)].get(key, ABSENT)
        if node is not ABSENT:
            found[name] = node
    return found


def _is_gone_into(node: list[object]) -> bool:
    """Whether there is a tensor or a dict in a list, or in lists in it."""
    seen = {id(node)}
    stack = [node]
    while stack:
        for value in stack.pop():
            if value is STATE_DICT or is_tensor_like(value) or mapping_items(value) is not None:
                return True
            if isinstance(value, list) and id(value) not in seen:
                seen.add(id(value))
                stack.append(value)
    return False


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _text(key: object, path: Path) -> str:
    """A key as the planner names it."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, SCALARS) for part in parts):
        raise RewriteError(f"{_name(path):.200}: a key is {brief(key)}, which has no name in a {NAME} folder")
    return str(key)


def _lost(node: object, path: Path, pairs: list[tuple[object, object]]) -> Iterator[str]:
    """The parts of a dict that the names in it do not keep."""
    where = _name(path)[-100:] or "the outermost dict"
    if not pairs and path:
        yield f"{where} (an empty dict)"
    if keys := [key for key, _ in pairs if not isinstance(key, str)]:
        yield f"{where} (keys that are not text, such as {keys[0]!r:.40}, become text)"
    if isinstance(node, Object):
        if node.class_name not in ("collections.OrderedDict", "builtins.dict", "__builtin__.dict"):
            yield f"{where} (a {node.class_name:.100}, becomes a dict)"
        if node.state is not ABSENT:
            kept = attributes(node)
            yield f"{where} (its attributes{': ' + ', '.join(map(str, kept)) if kept is not None else ''})"
    if effects_of(node):
        yield f"{where} (calls made only for their effect on it)"
