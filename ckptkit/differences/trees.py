"""Whether two values that are not plain tensors are the same: quantized and sparse tensors, extra state, objects.

They are compared as what the files say they are: every node, and the values of every tensor and the bytes of every
storage in them.  Nothing is made of them, so what is equal in another form counts as different.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.differences.bits import as_tensor
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId

__all__ = ["same_tree"]

SameTensors = Callable[[TensorEntry, TensorEntry], "bool | None"]


def same_tree(a: object, b: object, same_tensors: SameTensors) -> bool | None:
    """Whether two trees are the same; ``None``: they could not be compared to their end.

    Args:
        a: a tree; it may share nodes, contain cycles and be deep.
        b: the other.
        same_tensors: whether two tensors of one dtype and shape hold the same bits; ``None``: it cannot be told.
    """
    seen: set[tuple[int, int]] = set()
    unknown = False
    stack: list[tuple[object, object]] = [(a, b)]
    while stack:
        x, y = stack.pop()
        if _is_scalar(x) or _is_scalar(y):
            if not _same_scalar(x, y):
                return False
            continue
        if (id(x), id(y)) in seen:
            continue
        seen.add((id(x), id(y)))
        if len(seen) > DEFAULT_LIMITS.tree_nodes:
            return None
        if type(x) is not type(y):
            return False
        if isinstance(x, TensorEntry) and isinstance(y, TensorEntry):
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                return False
            same = same_tensors(x, y)
            stack += [(x.subclass, y.subclass), (x.attributes, y.attributes), (x.effects, y.effects)]
        elif isinstance(x, Storage) and isinstance(y, Storage):
            if (x.dtype, x.nbytes) != (y.dtype, y.nbytes):
                return False
            same = same_tensors(as_tensor(x), as_tensor(y)) if x.byteorder == y.byteorder else None
        else:
            parts, others = _parts(x), _parts(y)
            if len(parts) != len(others):
                return False
            stack.extend(zip(parts, others, strict=True))
            continue
        if same is False:
            return False
        unknown = unknown or same is None
    return None if unknown else True


def _is_scalar(node: object) -> bool:
    return node is None or node is ABSENT or isinstance(node, (bool, int, float, str, bytes, bytearray))


def _same_scalar(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)  # NaN is not equal to itself
    return type(a) is type(b) and a == b


def _parts(node: object) -> list[object]:
    """What makes up a node, one level deep; as much of two nodes of one type is in the same place."""
    if isinstance(node, (list, tuple)):
        return list(node)
    if isinstance(node, InertDict):
        return [*(part for pair in node.pairs for part in pair), node.effects]
    if isinstance(node, Object):
        filled = [node.cls, node.args, node.kwargs, node.state, len(node.items), len(node.pairs), node.effects]
        return [*filled, *node.items, *(part for pair in node.pairs for part in pair)]
    if isinstance(node, InertSet):
        return [node.frozen, node.effects, *node.members]
    if isinstance(node, Global):
        return [node.module, node.name, node.effects]
    if isinstance(node, PersistentId):
        return [node.pid]
    return [node]
