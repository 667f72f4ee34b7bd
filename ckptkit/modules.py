"""Pickled ``nn.Module`` objects, walked without their classes.

A whole model's state_dict is what ``Module.state_dict()`` would give (torch/nn/modules/module.py
``_save_to_state_dict``): parameters that are not ``None``, buffers less
``_non_persistent_buffers_set``, then children, depth first.  What ``get_extra_state`` would add is
computed by the class and cannot be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import CorruptError, LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import InertDict, InertSet, Object, attributes, mapping_items, walk

__all__ = ["module_state", "walk_module"]

_MAX_MODULE_DEPTH = 1000
"""Modules inside modules: Python's own recursion limit stops ``state_dict()`` there."""


def module_state(node: object) -> InertDict | None:
    """The ``__dict__`` of a pickled ``nn.Module``; ``None``: it is none.

    ``torch.fx.GraphModule`` passes it as the first argument of a function that makes the code anew.
    """
    state = attributes(node)
    if state is None and isinstance(node, Object) and node.how == "reduce" and node.args:
        state = node.args[0] if isinstance(node.args[0], InertDict) else None
    return state if state is not None and all(key in state for key in ("_parameters", "_buffers", "_modules")) else None


def walk_module(module: object) -> Iterator[tuple[str, object]]:
    """Names and values of a pickled module's state_dict, in the order ``state_dict()`` gives them.

    A child that holds tensors but is pickled as no module is, is given whole, under its own name.

    Raises:
        CorruptError: a module is its own descendant.
        LimitError: more entries, or longer names, than any model has.
    """
    count = characters = 0
    above: set[int] = set()
    stack: list[tuple[str, object, bool]] = [("", module, True)]
    while stack:
        prefix, node, entering = stack.pop()
        if not entering:
            above.remove(id(node))
            continue
        state = module_state(node)
        if state is None:
            if any(isinstance(below, (TensorEntry, Storage)) for below in walk(node)):
                yield prefix[:-1], node
            continue
        if len(above) >= _MAX_MODULE_DEPTH:
            raise LimitError("modules inside modules", limit=_MAX_MODULE_DEPTH, actual=len(above) + 1)
        if id(node) in above:
            raise CorruptError(f"module {prefix.rstrip('.') or 'root'!r} contains itself")
        above.add(id(node))
        values = _saved_values(state)
        below = [(f"{prefix}{name}.", child) for name, child in _named(state.get("_modules")) if child is not None]
        count += 1 + len(values)
        characters += len(prefix) * len(values) + sum(len(path) for path, _ in below)
        if count > DEFAULT_LIMITS.entries:
            raise LimitError("modules and tensors in a model", limit=DEFAULT_LIMITS.entries, actual=count)
        if characters > DEFAULT_LIMITS.pickle_nbytes:
            raise LimitError("characters of names in a model", limit=DEFAULT_LIMITS.pickle_nbytes, actual=characters)
        for name, value in values:
            yield prefix + name, value
        stack.append(("", node, False))
        stack.extend((path, child, True) for path, child in reversed(below))


def _saved_values(state: InertDict) -> list[tuple[str, object]]:
    """A module's own parameters and buffers, less those that are ``None`` or not persistent."""
    values: list[tuple[str, object]] = []
    for name, value in _named(state.get("_parameters")):
        if isinstance(value, TensorEntry) and not value.is_parameter:
            values.append((name, replace(value, is_parameter=True)))
        elif value is not None:
            values.append((name, value))
    transient = _members(state.get("_non_persistent_buffers_set"))
    values += [(n, v) for n, v in _named(state.get("_buffers")) if v is not None and n not in transient]
    return values


def _named(node: object) -> list[tuple[str, object]]:
    return [(key, value) for key, value in mapping_items(node) or [] if isinstance(key, str)]


def _members(node: object) -> set[str]:
    """The strings in a set, however the pickle builds it."""
    if isinstance(node, InertSet):
        return {member for member in node.members if isinstance(member, str)}
    if isinstance(node, Object) and node.args and isinstance(node.args[0], (list, tuple)):
        return {member for member in node.args[0] if isinstance(member, str)}
    return set()
