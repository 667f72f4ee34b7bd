"""Every tensor of a file as one flat state_dict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptkit.checkpoint import (
    STATE_DICT,
    Checkpoint,
    Section,
    StateDict,
    Storage,
    TensorEntry,
    as_tensor,
)
from ckptkit.errors import CorruptError, KeyCollisionError, LimitError, RewriteError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import origin_alone
from ckptkit.normalize.made_plain import array_entry
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, is_plain_value, join, step
from ckptkit.normalize.shapes import parts
from ckptkit.normalize.tensors import FoundTensor, Nameless, keys_of, longer, tensors_with_keys
from ckptkit.pickling.arrays import is_array, is_numpy_scalar
from ckptkit.pickling.inert import SCALARS, Global, InertDict, Object
from ckptkit.startup import dataclass

__all__ = ["AllTensors"]


@dataclass(frozen=True, slots=True)
class AllTensors:
    """Use every tensor in the file, wherever it is, as a weight; nothing else is kept.

    The keys that lead to a tensor are its name: ``{"generator": {"conv.weight": …}, "optimizer": {"state": {3:
    {"exp_avg": …}}}}`` gives ``generator.conv.weight`` and ``optimizer.state.3.exp_avg``, a list ``0``, ``1``, …, and a
    tensor that is the whole file is called ``tensor``.  Modules use the names of their state_dict, attributes are keys,
    and arguments of a call are named by position.  A tensor in several dicts or lists has a name for each, and stays
    tied.

    The result has plain tensors only (no parameters, no attributes), and ties are kept.  Separate storages become
    one-dimensional tensors of the element type that they declare, or of bytes if they declare none.  numpy arrays
    become tensors if torch has their dtype, and are left out otherwise.  Values that are not plain tensors (quantized,
    sparse, …) do not change and are named by their path; writing them to a container that cannot store them is an
    error.

    Raises (when applied):
        KeyCollisionError: two paths give the same name, as in ``{"a": {"b": …}, "a.b": …}``. LimitError: more tensors
        than any file has. RewriteError: there are no tensors.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        everything: dict[str, object] = {}
        plain: dict[int, TensorEntry] = {}
        typed: dict[int, Storage] = {}  # of bare bytes, as tensors of bytes have them
        for name, node in _by_path(checkpoint).items():
            if is_array(node):
                tensor = None if is_numpy_scalar(node) else _array_tensor(node, name, checkpoint.origin.path)
                everything.update({} if tensor is None else {name: tensor})
            elif isinstance(node, Object):
                everything[name] = node
            else:
                everything[name] = plain.setdefault(id(node), _bare(as_tensor(node, typed=True)))
                if isinstance(node, Storage) and node.dtype is None:
                    typed[id(node)] = replace(node, dtype="uint8")
        for name, value in everything.items() if typed else ():
            if isinstance(value, TensorEntry) and id(value.storage) in typed:
                everything[name] = replace(value, storage=typed[id(value.storage)])
        if not everything:
            raise RewriteError(f"{checkpoint.origin.path}: the file contains no tensors")
        state_dict = StateDict(everything, container=InertDict())
        storages = {id(entry.storage): entry.storage.nbytes for entry in state_dict.values()}
        whole = Section(
            path="", kind="state_dict", tensors=len(state_dict), nbytes=sum(storages.values()), selected=True
        )
        return checkpoint.replace(
            state_dict=state_dict,
            rest=STATE_DICT,
            module=None,
            discarded=(),
            sections=(whole,),
            origin=replace(origin_alone(checkpoint.origin, state_dict), state_path="", kind="state_dict"),
        )


_WHOLE_FILE = "tensor"
"""The name of a tensor that is the whole file."""

_MAX_KEYS = 300
"""Characters of keys in a message."""


def _by_path(checkpoint: Checkpoint) -> dict[str, TensorEntry | Storage | Object]:
    """Every tensor, bare storage, array and value made from tensors, by its keys, joined with dots.

    Raises:
        As `AllTensors`.
    """
    found: dict[str, FoundTensor] = {}
    limits, steps = DEFAULT_LIMITS, 0
    for each in tensors_with_keys(checkpoint, _keys_above(checkpoint)):
        keys = keys_of(each.keys)
        name = ".".join(map(_named, keys)) if keys else _WHOLE_FILE
        other = found.setdefault(name, each)
        if other.node is not each.node:
            raise KeyCollisionError(_subscripts(other), _subscripts(each), name[:_MAX_KEYS])
        steps += len(keys)
        if len(found) > limits.entries:
            raise LimitError("tensors in one file", limit=limits.entries, actual=len(found))
        if steps > limits.references:  # of lists in lists, say
            raise LimitError("keys that lead to all tensors", limit=limits.references, actual=steps)
    return {name: each.node for name, each in found.items()}


def _keys_above(checkpoint: Checkpoint) -> Any:
    """The keys that lead to the state_dict; of several places to the one that it was selected at."""
    stack: list[tuple[Any, str, object]] = [(None, "", checkpoint.rest)]
    seen: set[tuple[int, str]] = set()
    places: list[Any] = []
    while stack:
        keys, path, node = stack.pop()
        if node is STATE_DICT:
            places.insert(0 if path == checkpoint.origin.state_path else len(places), keys)
        if (id(node), path) in seen or (keys is not None and keys[2] > MAX_SECTION_DEPTH):
            continue
        seen.add((id(node), path))
        below = ((key, child) for key, child in reversed(parts(node)) if not isinstance(child, SCALARS))
        stack.extend((longer(keys, key), join(path, key), child) for key, child in below)
    return places[0] if places else None


def _named(key: object) -> str:
    """A key in a name, as Python's ``str`` has it."""
    if isinstance(key, Nameless):
        return f"?{key.position}"
    if isinstance(key, (str, Global)):
        return key if isinstance(key, str) else key.qualified
    if isinstance(key, tuple):
        return f"({', '.join(repr(part) if isinstance(part, str) else _named(part) for part in key)})"
    return repr(key) if isinstance(key, SCALARS) else step(key)


def _subscripts(found: FoundTensor) -> str:
    """The place of a tensor, as a Python expression: ``["model"]["conv.weight"]``."""
    return "".join(f"[{key!r:.100}]" for key in keys_of(found.keys))[:_MAX_KEYS]


def _bare(entry: TensorEntry) -> TensorEntry:
    """The plain tensor of the same values."""
    if is_plain_value(entry) and not entry.is_parameter and not entry.requires_grad:
        return entry
    return replace(entry, is_parameter=False, requires_grad=False, subclass=None, attributes=None, effects=())


def _array_tensor(node: Object, name: str, path: str) -> TensorEntry | None:
    """The tensor of an array's values; ``None``: torch has no dtype for it, or its class is custom.

    Raises:
        CorruptError: it has fewer bytes than its shape takes.
    """
    try:
        return array_entry(node, path, name, native=True)
    except CorruptError as error:
        raise CorruptError(f"{name!r:.200}: {error.message}") from None
