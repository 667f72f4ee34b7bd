"""Every tensor of a file as one flat state_dict, each named by the keys that lead to it.

``{"generator": {"conv.weight": …}, "optimizer": {"state": {3: {"exp_avg": …}}}}`` gives ``generator.conv.weight`` and
``optimizer.state.3.exp_avg``, a list ``0``, ``1``, …, and what is all of the file is called ``tensor``.  The names are
whole: modules have the names of their state_dict, attributes are keys, and what a call is given goes by its position.
A tensor has the name of every dict or list that it stands in, and stays tied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ckptkit.bytesource import Source
from ckptkit.checkpoint import (
    STATE_DICT,
    Checkpoint,
    Section,
    StateDict,
    Storage,
    TensorEntry,
    as_tensor,
    contiguous_stride,
)
from ckptkit.errors import CorruptError, KeyCollisionError, LimitError, RewriteError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.sections import is_plain_value, step
from ckptkit.normalize.tensors import FoundTensor, keys_of, tensors_with_keys
from ckptkit.pickling.arrays import is_array, is_numpy_scalar, layout_of
from ckptkit.pickling.inert import SCALARS, Global, InertDict, Object

__all__ = ["AllTensors"]


@dataclass(frozen=True, slots=True)
class AllTensors:
    """Take every tensor of the file, whatever it stands in, for the state_dict; nothing else stays.

    Tensors are plain ones afterwards (no parameters, nothing hangs on them), and those that were tied stay so.
    Storages that stand by themselves become one-dimensional tensors of the elements that they declare, of bytes where
    they declare none, and numpy's arrays tensors where torch has their dtype.  Values that are no plain tensors
    (quantized, sparse, …) stay what they are, each under its path: a container that cannot hold them says so.

    Raises (when applied):
        KeyCollisionError: two paths are spelled alike: those of ``{"a": {"b": …}, "a.b": …}``.
        LimitError: more tensors than any file has.
        RewriteError: there is no tensor at all.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        everything: dict[str, object] = {}
        plain: dict[int, TensorEntry] = {}
        for name, node in _by_path(checkpoint).items():
            if isinstance(node, Object):
                if not is_numpy_scalar(node):
                    everything[name] = _array_tensor(node, name) or node
            else:
                everything[name] = plain.setdefault(id(node), _bare(as_tensor(node, typed=True)))
        if not everything:
            raise RewriteError(f"{checkpoint.origin.path}: the file holds no tensor at all")
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
            origin=replace(checkpoint.origin, state_path="", kind="state_dict"),
        )


_WHOLE_FILE = "tensor"
"""What a tensor is called that is all of the file."""

_MAX_SHOWN = 300
"""Characters of keys in a message."""


def _by_path(checkpoint: Checkpoint) -> dict[str, TensorEntry | Storage | Object]:
    """Every tensor, bare storage, array and value made of tensors, by its keys, joined with dots.

    Raises:
        As `AllTensors`.
    """
    found: dict[str, FoundTensor] = {}
    limits, steps = DEFAULT_LIMITS, 0
    for each in tensors_with_keys(checkpoint):
        keys = keys_of(each.keys)
        name = ".".join(map(_named, keys)) if keys else _WHOLE_FILE
        other = found.setdefault(name, each)
        if other.node is not each.node:
            raise KeyCollisionError(_subscripts(other), _subscripts(each), name[:_MAX_SHOWN])
        steps += len(keys)
        if len(found) > limits.entries:
            raise LimitError("tensors in one file", limit=limits.entries, actual=len(found))
        if steps > limits.references:  # of lists in lists, say
            raise LimitError("keys that lead to all tensors", limit=limits.references, actual=steps)
    return {name: each.node for name, each in found.items()}


def _named(key: object) -> str:
    """A key in a name, as Python's ``str`` has it."""
    if isinstance(key, (str, Global)):
        return key if isinstance(key, str) else key.qualified
    if isinstance(key, tuple):
        return f"({', '.join(repr(part) if isinstance(part, str) else _named(part) for part in key)})"
    return repr(key) if isinstance(key, SCALARS) else step(key)


def _subscripts(found: FoundTensor) -> str:
    """Where a tensor stands, as Python would get there: ``["model"]["conv.weight"]``."""
    return "".join(f"[{key!r:.100}]" for key in keys_of(found.keys))[:_MAX_SHOWN]


def _bare(entry: TensorEntry) -> TensorEntry:
    """The plain tensor of the same values."""
    if is_plain_value(entry) and not entry.is_parameter and not entry.requires_grad:
        return entry
    return replace(entry, is_parameter=False, requires_grad=False, subclass=None, attributes=None, effects=())


class _Held(Source):
    """Bytes that are in memory: an array's, which its pickle holds."""

    __slots__ = ("_data",)

    def __init__(self, name: str, data: bytes | bytearray) -> None:
        super().__init__(name, len(data))
        self._data = data

    def _some(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._data[offset : offset + nbytes])


def _array_tensor(node: Object, name: str) -> TensorEntry | None:
    """The tensor of an array's values; ``None``: it is no array, or torch has no dtype for it.

    Raises:
        CorruptError: it has fewer bytes than its shape takes.
    """
    if not is_array(node):
        return None
    layout = layout_of(node)
    if layout.dtype is None or layout.shape is None or layout.data is None or not layout.is_plain:
        return None
    order: Literal["little", "big"] = "big" if layout.swapped else "little"
    source = _Held(name, layout.data).whole
    storage = Storage(key=name, dtype=None, nbytes=source.nbytes, location="cpu", source=source, byteorder=order)
    stride = contiguous_stride(layout.shape)
    if layout.is_fortran:
        stride = contiguous_stride(layout.shape[::-1])[::-1]
    try:
        return TensorEntry(
            storage=storage, storage_offset=0, shape=layout.shape, stride=stride, dtype=layout.dtype
        ).check()
    except CorruptError as error:
        raise CorruptError(f"{name!r:.200}: {error.message}") from None
