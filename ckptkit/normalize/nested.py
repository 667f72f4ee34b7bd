"""State_dicts whose modules are dicts inside dicts, as Megatron and flax save them.

``{"language_model": {"embedding": {"word_embeddings": {"weight": tensor}}}}`` contains the weight
``language_model.embedding.word_embeddings.weight``.  A tree of dicts with string keys is read so where

- all that it holds are tensors (and ``_extra_state``), none of them an optimizer's, and no two get one name
- some module in it is a separate dict (its names have no dots): a dict of whole state_dicts, each with dotted names, is
  several models
- it is under a customary key, or its names look like those of parameters, three dicts down
- none of its keys says that it contains several models or an optimizer, and no key in it says that the weights are
  there

It is written as it was while every name stays; where names are changed or left out, or nothing is beside it any more
(``--weights-only``), as one flat dict under the dotted names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ckptkit.normalize.shapes import CUSTOMARY_KEYS, MOMENTS, PARAMETERS, are_moments, is_optimizer, is_substantial
from ckptkit.pickling.inert import ABSENT, Global, InertDict, Object, children, effects_of, mapping_items, walk
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.startup import dataclass

__all__ = ["NestedDicts", "is_nested", "nested_values", "nested_versions"]

_MAX_LEVELS = 16
"""Nested dicts; modules are rarely nested deeper than ten."""

_MODULES_DEEP = 3
"""Dicts from the top to a tensor where nothing else says that they are a model's."""

_OTHERS = re.compile(r"(?:^|[._])(?:ema|shadow|averaged?|teacher|student|optim\w*|opt)(?:[._]|\d*$)")
"""Keys of what is not part of a model: copies of it, and optimizers."""


_STATE = ("state_dict", "_state")
"""Endings of keys in a file's own dict under which weights are, and which no module has."""


@dataclass(frozen=True, slots=True)
class NestedDicts:
    """The container of a state_dict that is nested: what `StateDict.container` is for others.

    Attributes:
        node: the outermost dict.
    """

    node: object

    def filled(self, everything: Mapping[str, object]) -> object | None:
        """The dicts as they were, with these values; ``None``: the names are not what they were."""
        if list(nested_values(self.node) or ()) != list(everything):
            return None

        def fill(node: object, prefix: str) -> object:
            pairs: list[tuple[object, object]] = []
            for key, value in mapping_items(node) or []:
                name = f"{prefix}{key}"
                pairs.append((key, everything[name] if _is_value(key, value) else fill(value, f"{name}.")))
            new: Object | InertDict = InertDict(pairs)
            if isinstance(node, Object):
                new = Object(node.how, node.cls, node.args, node.kwargs)
                new.pairs, new.state = pairs, node.state
            new.effects = effects_of(node)
            return new

        return fill(self.node, "")

    @staticmethod
    def flat(versions: Mapping[str, object] | None) -> object:
        """The container of the same values under their dotted names."""
        return InertDict() if versions is None else Object("reduce", Global("collections", "OrderedDict"), ())


@dataclass(slots=True)
class _Tree:
    """The result of searching a tree of dicts.

    Attributes:
        values: by dotted name, in order.
        holders: how many dicts hold tensors.
        levels: dicts from the top to the deepest tensor.
        is_bare: whether some dict below the top contains tensors, and no dotted name.
        is_parameters: whether the names in such a dict look like those of parameters.
        dicts: the ``id`` of each.
    """

    values: dict[str, object]
    dicts: set[int]
    holders: int = 0
    levels: int = 0
    is_bare: bool = False
    is_parameters: bool = False


def nested_values(node: object, visit: Callable[[int], bool] = lambda _: True) -> dict[str, object] | None:
    """The values of a tree of dicts by their dotted names; ``None``: it holds something else, or one name twice.

    Args:
        node: the outermost dict.
        visit: called with the number of values about to be examined; whether that is allowed.
    """
    tree = _tree(node, visit)
    return None if tree is None else tree.values


def is_nested(node: object, key: object, root: object, visit: Callable[[int], bool]) -> bool:
    """Whether a dict is a nested state_dict.

    Args:
        node: the outermost dict.
        key: of its place; anything but a string for the file's own dict.
        root: the tree it is in, which has no other use for the dicts in it.
        visit: as in `nested_values`.
    """
    keys = [inner for inner, _ in mapping_items(node) or [] if isinstance(inner, str)]
    is_customary = isinstance(key, str) and key in CUSTOMARY_KEYS
    if (not is_customary or len(keys) == 1) and _leads_to_weights(node, visit):
        return False  # what is there is
    if any(_OTHERS.search(each.lower()) for each in (key, *keys) if isinstance(each, str)):
        return False
    tree = _tree(node, visit)
    if tree is None or not tree.is_bare or not any(map(is_substantial, tree.values.values())):
        return False
    is_deep = tree.levels >= _MODULES_DEEP
    if not (tree.holders > 1 or is_deep if is_customary else tree.is_parameters and is_deep):
        return False
    inside = tree.dicts - {id(node)}
    for other in walk(root):
        if not visit(1) or (id(other) not in tree.dicts and any(id(child) in inside for child in children(other))):
            return False
    return True


def _leads_to_weights(node: object, visit: Callable[[int], bool]) -> bool:
    """Whether a key of a dict, of one in it, or down the only way there is, is a customary one for weights."""
    level = [node]
    for depth in range(_MAX_LEVELS):
        pairs = [(key, value) for each in level for key, value in mapping_items(each) or [] if isinstance(key, str)]
        if any(key in CUSTOMARY_KEYS for key, _ in pairs):
            return True
        if (depth and len(pairs) != 1) or not visit(len(pairs)):
            return False
        level = list({id(value): value for _, value in pairs}.values())
    return False


def nested_versions(
    node: object, versions: Callable[[object], Mapping[str, object] | None]
) -> dict[str, object] | None:
    """The module versions of all of the dicts, by whole path; ``None``: none has any.

    Args:
        node: the outermost dict.
        versions: what one dict has itself.
    """
    found: dict[str, object] = {}
    stack = [("", node)]
    while stack:
        path, node = stack.pop()
        for module, version in (versions(node) or {}).items():
            found.setdefault(".".join(filter(None, (path, module))), version)
        inside = [pair for pair in mapping_items(node) or [] if mapping_items(pair[1]) is not None]
        stack += [(f"{path}.{key}" if path else f"{key}", value) for key, value in reversed(inside)]
    return found or None


def _is_value(key: object, value: object) -> bool:
    """Whether it is under a name, and is not a dict of others."""
    return is_tensor_like(value) or (isinstance(key, str) and key.endswith("_extra_state"))


def _plain_pairs(node: object) -> list[tuple[str, object]] | None:
    """The pairs of a dict that is nothing beside them but the versions of its modules; ``None``: it is more."""
    pairs = mapping_items(node)
    if isinstance(node, Object):
        state = node.state
        is_plain = state is ABSENT or (isinstance(state, InertDict) and [*state] == ["_metadata"])
        if pairs is None or len(pairs) > len(node.pairs) or node.items or not is_plain:
            return None
    strings = [(key, value) for key, value in pairs or () if isinstance(key, str)]
    return None if pairs is None or len(strings) < len(pairs) else strings


def _tree(node: object, visit: Callable[[int], bool]) -> _Tree | None:
    found = _Tree({}, set())

    def look(node: object, prefix: str, level: int) -> bool:
        pairs = _plain_pairs(node)
        if pairs is None or level > _MAX_LEVELS or id(node) in found.dicts or not visit(len(pairs)):
            return False
        found.dicts.add(id(node))
        tensors: list[str] = []
        for key, value in pairs:
            if is_tensor_like(value):
                tensors.append(key)
            elif not _is_value(key, value) and (mapping_items(value) is None or not key or key in MOMENTS):
                return False
        if are_moments(list(pairs)) or is_optimizer(node):
            return False
        if tensors:
            found.holders += 1
            found.levels = max(found.levels, level)
            if level > 1 and not any("." in key for key in tensors):
                found.is_bare = True
                found.is_parameters = found.is_parameters or not PARAMETERS.isdisjoint(tensors)
        for key, value in pairs:
            name = f"{prefix}{key}"
            if _is_value(key, value):
                if name in found.values:
                    return False
                found.values[name] = value
            elif key.endswith(_STATE) or not look(value, f"{name}.", level + 1):
                return False
        return True

    return found if look(node, "", 1) and found.values else None
