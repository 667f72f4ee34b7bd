"""Values that stand where tensors do and are no plain ones: what they are, in facts and in words; nothing is built.

They are tensors that torch makes of other tensors (`ckptkit.pickling.layouts` says which), tensors of a class that has
no bytes of its own (`ckptkit.pickling.tensors.Wrapped`: DTensor, torchao's), strided ones with hooks or metadata that
is not torch's, any of them as a parameter or as a subclass, and numpy's arrays (`ckptkit.pickling.arrays`).  One whose
parts do not fit each other is told with the reason, and has the tensors that are found in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import CorruptError
from ckptkit.normalize.parts import spread_text
from ckptkit.pickling.arrays import is_array, is_numpy_scalar, layout_of
from ckptkit.pickling.inert import Global, Object, mapping_items, walk
from ckptkit.pickling.layouts import Jagged, Layout, Meta, Nested, OnDevice, Quantized, Sparse, call_of, rebuilt
from ckptkit.pickling.tensors import shape_of, wrapped_tensor
from ckptkit.report import count_of

__all__ = ["Value", "describe_value"]

_MOST = 100
"""Nodes that are looked at in what one value is made of: a dozen are usual."""

_UNKNOWN = "?"
"""In place of a dtype, of a value that does not fit its parts."""

_STRIDED = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


class Value(NamedTuple):
    """What a value is.

    Attributes:
        kind: ``"quantized"``, ``"sparse"``, ``"nested"``, ``"meta"``, ``"device"``, ``"wrapper"``, ``"array"`` or, of a
            strided tensor that is odd in some other way, ``"tensor"``.
        what: the kind, or a class, as a message names it.
        dtype: torch name of its elements; of arrays that torch has no type for numpy's; ``"?"``: its parts do not fit.
        shape: of the whole; -1 where a nested tensor's parts differ.
        nbytes: bytes in the file of all that it is made of.
        detail: what else tells it from others of its dtype and shape; may be empty.
        parts: the tensors, storages and arrays that it is made of, under torch's names for them.
        location: device tag, as the file says it; ``""``: not told.
    """

    kind: str
    what: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    detail: str
    parts: tuple[tuple[str, object], ...]
    location: str

    @property
    def text(self) -> str:
        """It in a few words: ``"quantized [3, 4] qint8, scale 0.1, zero point 3"``, ``"meta [5, 6] float32"``."""
        if self.dtype == _UNKNOWN:
            return f"{self.what:.60}: {self.detail:.120}"
        shape = ", ".join("?" if size == -1 else str(size) for size in self.shape)
        return f"{self.what:.40} [{shape:.60}] {self.dtype:.40}{', ' * bool(self.detail)}{self.detail:.60}"


class _Facts(NamedTuple):
    """A `Value` before its parts are counted."""

    kind: str
    what: str
    dtype: str
    shape: tuple[int, ...] | None
    detail: str
    parts: tuple[tuple[str, object], ...]
    location: str = ""


def describe_value(node: object) -> Value | None:
    """What a node is that torch or numpy makes a tensor or array of; ``None``: a plain tensor, or something else."""
    if not isinstance(node, Object):
        return None
    if is_array(node):
        return _value(_array(node), "")
    call = call_of(node)
    made = call.made
    if isinstance(made, TensorEntry):
        entry = _Facts("tensor", call.cls, made.dtype, made.shape, "", (("data", made),), made.location)
        return _value(entry, call.cls) if call.cls else None
    wrapped = wrapped_tensor(made)
    if wrapped is not None:
        what = wrapped.cls.name.rpartition(".")[2]
        parts = _leaves(wrapped.state)
        return _value(_Facts("wrapper", what, wrapped.dtype, wrapped.shape, spread_text(made), parts), call.cls)
    try:
        found = rebuilt(made)
        facts = _strided(made) if found is None else _FACTS[type(found.layout)](found.layout)
    except CorruptError as error:
        what = f"malformed {call.kind} tensor"
        facts = _Facts(call.kind, what, _UNKNOWN, None, error.message, _numbered(made))
    return None if facts is None else _value(facts, call.cls)


def _value(facts: _Facts, cls: str) -> Value:
    tensors = {id(node): node for _, part in facts.parts for node in _tensors(part)}
    nbytes = {node.view if isinstance(node, TensorEntry) else id(node): node.nbytes for node in tensors.values()}
    held = (layout_of(node).data if is_array(node) else node for _, node in facts.parts)
    inside = sum(len(data) for data in held if isinstance(data, (bytes, bytearray)))
    location = facts.location or next((node.location for node in tensors.values()), "")
    what = facts.what if cls in ("", "NestedTensor", facts.what) else f"{cls}, {facts.what}"
    return Value(
        facts.kind,
        what,
        facts.dtype,
        facts.shape or (),
        sum(nbytes.values()) + inside,
        facts.detail,
        facts.parts,
        location,
    )


def _leaves(state: object) -> tuple[tuple[str, object], ...]:
    """The tensors in a class's ``__dict__``, with the names they have there; in any other state, numbered."""
    for part in state if isinstance(state, tuple) else (state,):
        pairs = (mapping_items(part) or [])[:_MOST]
        found = [(key, value) for key, value in pairs if isinstance(key, str) and any(True for _ in _tensors(value))]
        if found:
            return tuple(found)
    return _numbered(state)


def _numbered(node: object) -> tuple[tuple[str, object], ...]:
    return tuple((str(index), part) for index, part in enumerate(_tensors(node)))


def _tensors(node: object) -> Iterator[TensorEntry | Storage]:
    """Those at or near below a node."""
    return (each for each in islice(walk(node), _MOST) if isinstance(each, (TensorEntry, Storage)))


def _quantized(tensor: Quantized) -> _Facts:
    numbers, scales, zero_points = tensor.numbers, tensor.scales, tensor.zero_points
    parts: list[tuple[str, object]] = [("storage", numbers.storage)]
    if tensor.axis is None:
        detail = f"scale {scales:.6g}, zero point {zero_points}"
    else:
        parts += [("scales", scales), ("zero_points", zero_points)]
        detail = f"{count_of(numbers.shape[tensor.axis], 'scale')} along dim {tensor.axis}"
    return _Facts("quantized", "quantized", numbers.dtype, numbers.shape, detail, tuple(parts))


_INDICES = {"coo": ("indices",), "csr": ("crow_indices", "col_indices"), "bsr": ("crow_indices", "col_indices"),
            "csc": ("ccol_indices", "row_indices"), "bsc": ("ccol_indices", "row_indices")}  # fmt: skip


def _sparse(tensor: Sparse) -> _Facts:
    short = tensor.layout.rpartition("_")[2]
    stored = tensor.indices[-1].shape[-1] if short == "coo" else tensor.indices[-1].numel
    detail = f"{count_of(stored, 'block' if short in ('bsr', 'bsc') else 'value')} stored"
    parts = (*zip(_INDICES[short], tensor.indices, strict=True), ("values", tensor.values))
    return _Facts("sparse", f"sparse {short.upper()}", tensor.values.dtype, tensor.size, detail, parts)


def _nested(tensor: Nested) -> _Facts:
    shape = (tensor.sizes.shape[0], *[-1] * tensor.sizes.shape[1])
    return _Facts("nested", "nested", tensor.buffer.dtype, shape, "", tuple(tensor._asdict().items()))


def _jagged(tensor: Jagged) -> _Facts:
    sizes, at = tensor.values.shape, tensor.ragged_idx
    shape = (tensor.offsets.shape[0] - 1, *sizes[: at - 1], -1, *sizes[at:])
    parts = tuple((name, part) for name, part in tensor._asdict().items() if isinstance(part, TensorEntry))
    return _Facts("nested", "nested", tensor.values.dtype, shape, "jagged", parts)


def _meta(tensor: Meta) -> _Facts:
    return _Facts("meta", "meta", tensor.dtype, tensor.size, "a shape without values", (), "meta")


def _on_device(tensor: OnDevice) -> _Facts:
    """A tensor of a device that torch pickles as an array, or as a copy in main memory."""
    data = tensor.data
    shape = data.shape if isinstance(data, TensorEntry) else layout_of(data).shape if is_array(data) else None
    detail = f"of device {tensor.device:.40}"
    return _Facts("device", "tensor", tensor.dtype, shape, detail, (("data", data),), tensor.device)


_FACTS: Final[dict[type[Layout], Callable[[Any], _Facts]]] = {
    Quantized: _quantized, Sparse: _sparse, Nested: _nested, Jagged: _jagged, Meta: _meta, OnDevice: _on_device,
}  # fmt: skip


def _strided(node: object) -> _Facts | None:
    """One that is not read as a plain tensor, such as one with backward hooks."""
    if not isinstance(node, Object) or node.class_name not in _STRIDED:
        return None
    args = node.args
    if len(args) < 4 or not isinstance(args[0], Storage):
        return None
    told = args[6] if len(args) > 6 and isinstance(args[6], Global) else None
    dtype = told.name if told is not None else args[0].dtype or "uint8"
    return _Facts("tensor", "tensor", dtype, shape_of(args[2]), "with hooks or metadata", (("storage", args[0]),))


def _array(node: Object) -> _Facts:
    layout = layout_of(node)
    parts = () if layout.data is None else (("data", layout.data),)
    what = "numpy scalar" if is_numpy_scalar(node) else f"numpy {layout.subclass or 'array'}"
    dtype = layout.dtype or ("object" if layout.code[:1] == "O" else layout.code[:20] or "unknown")
    return _Facts("array", what, dtype, layout.shape, "", parts, "cpu")
