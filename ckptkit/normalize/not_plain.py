"""Values in the places of tensors that are not plain ones, as facts and in words; nothing is built.

They are tensors that torch makes from other tensors (`ckptkit.pickling.layouts` lists them), tensors of a class without
its own bytes (`ckptkit.pickling.tensors.Wrapped`: DTensor, torchao's), strided ones with hooks or metadata that is not
torch's, any of them as a parameter or as a subclass, and numpy's arrays (`ckptkit.pickling.arrays`).  One whose parts
do not fit together is reported with the reason, and has the tensors that are found in it.

`dense_form` says which dense values each can become.  The supported torchao classes (https://github.com/pytorch/ao; 0.5
to 0.18) are those with unpacked numbers, one in a byte, whose ``dequantize()`` is ``(number - zero point) * scale`` by
blocks: AffineQuantizedTensor with a plain, QDQ or float8 layout, Int8Tensor, Float8Tensor, IntxUnpackedTensor and
IntxUnpackedToInt8Tensor, and LinearActivationQuantizedTensor around any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, UnsupportedError
from ckptkit.normalize.parts import spread_text
from ckptkit.pickling.arrays import is_array, is_numpy_scalar, layout_of
from ckptkit.pickling.inert import Global, Object, mapping_items, walk
from ckptkit.pickling.layouts import PACKED, Jagged, Layout, Meta, Nested, OnDevice, Quantized, Sparse, call_of, rebuilt
from ckptkit.pickling.tensors import Wrapped, shape_of, wrapped_tensor
from ckptkit.report import count_of

__all__ = [
    "PACKED_DTYPE",
    "Dense",
    "Form",
    "Scaled",
    "Value",
    "can_be_dense",
    "dense_form",
    "describe_value",
    "packed_parts",
]

_MOST = 100
"""Nodes that are examined in one value: a dozen are usual."""

_UNKNOWN = "?"
"""The dtype of a value that does not fit its parts."""

_STRIDED = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


class Value(NamedTuple):
    """A value's description.

    Attributes:
        kind: ``"quantized"``, ``"sparse"``, ``"nested"``, ``"meta"``, ``"device"``, ``"wrapper"``, ``"array"`` or, of a
            strided tensor that is odd in some other way, ``"tensor"``.
        what: the kind, or a class, as a message names it.
        dtype: torch name of its elements; of arrays that torch has no type for numpy's; ``"?"``: its parts do not fit.
        shape: of the whole; -1 where a nested tensor's parts differ.
        nbytes: bytes in the file of all its parts.
        detail: what else distinguishes it from others with its dtype and shape; may be empty.
        parts: its tensors, storages and arrays, under torch's names for them.
        location: the device tag in the file; ``""``: unknown.
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
    """What a node is if torch or numpy makes a tensor or array from it; ``None``: a plain tensor, or something else."""
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


# What dense values can be made of.


class Scaled(NamedTuple):
    """Numbers of a few bits and the scales of their blocks.

    Attributes:
        numbers: of 8 bits, one in a byte.
        scales: floating, one for each block in C order.
        block: sizes of a block; the last of a dimension may be cut short.
        zero_points: as many, subtracted from the numbers first; ``None``: there are none.
        dtype: of the values that are made.
    """

    numbers: TensorEntry
    scales: TensorEntry
    block: tuple[int, ...]
    zero_points: TensorEntry | None = None
    dtype: str = "float32"


Form = Quantized | Sparse | Nested | Jagged | Scaled
"""The parts from which dense values are made."""


class Dense(NamedTuple):
    """The parts of one value, and the dense tensor they become."""

    form: Form
    is_parameter: bool = False
    requires_grad: bool = False


def dense_form(node: object) -> Dense | None:
    """The source of dense values; ``None``: it is a plain tensor, an array, or not a tensor.

    Raises:
        UnsupportedError: it is a tensor that cannot be made dense; the message says why.
        CorruptError: its parts do not fit together.
    """
    if not isinstance(node, Object):
        return None
    call = call_of(node)
    wrapped = wrapped_tensor(call.made)
    if wrapped is not None:
        return Dense(_scaled(wrapped), call.is_parameter, bool(call.requires_grad))
    found = rebuilt(call.made)
    if found is None or isinstance(found.layout, OnDevice):
        return None
    layout, own = found.layout, getattr(found.layout, "requires_grad", False)
    if isinstance(layout, Meta):
        raise UnsupportedError("a meta tensor is a shape without values")
    if isinstance(layout, Quantized) and layout.numbers.dtype in PACKED and not layout.numbers.is_contiguous:
        raise UnsupportedError(f"numbers of {layout.numbers.dtype} that are not stored in a row")
    if isinstance(layout, Sparse) and DTYPES[layout.values.dtype].numpy is None:
        raise UnsupportedError(f"values of {layout.values.dtype} cannot be computed")
    return Dense(layout, call.is_parameter, own if call.requires_grad is None else call.requires_grad)


def can_be_dense(name: str, value: object) -> bool:
    """Whether a value of a state_dict can be made dense, or belongs to one that can."""
    if isinstance(value, Global):
        return name.endswith(PACKED_DTYPE)
    parts = packed_parts(name, value)
    try:
        forms = [dense_form(part) for part in ({name: value} if parts is None else parts).values()]
    except (UnsupportedError, CorruptError):
        return False
    return parts is not None or forms != [None]


PACKED_DTYPE = "_packed_params.dtype"
"""How names end of what is beside packed parameters."""

_PACKED = ("_packed_params._packed_params", "_packed_params._packed_weight")


def packed_parts(name: str, value: object) -> dict[str, object] | None:
    """The weight and bias that a quantized module of torch packs, under their names; ``None``: it packs none.

    ``torch/ao/nn/quantized/modules/linear.py`` ``LinearPackedParams`` and ``embedding_ops.py``: a tuple ``(weight, bias
    or None)`` or only the weight, with the dtype beside it as ``_packed_params.dtype``.
    """
    for ending in _PACKED:
        stem = name.removesuffix(ending)
        if stem == name or (stem and not stem.endswith(".")):
            continue
        parts = value if isinstance(value, tuple) else (value,)
        if len(parts) <= 2 and all(part is None or isinstance(part, (TensorEntry, Object)) for part in parts):
            return {
                stem + last: part for last, part in zip(("weight", "bias"), parts, strict=False) if part is not None
            }
    return None


_IMPLEMENTATIONS = {
    "PlainAQTTensorImpl": "int_data", "PlainAQTLayout": "int_data", "QDQTensorImpl": "int_data",
    "Float8AQTTensorImpl": "float8_data", "Float8AQTLayout": "float8_data",
}  # fmt: skip
"""The parts of torchao's AffineQuantizedTensor with unpacked numbers, and their names."""

_SCALED = ("Float8Tensor", "Int8Tensor", "IntxUnpackedTensor", "IntxUnpackedToInt8Tensor")
"""Its later classes of that kind."""

_OUTPUTS = ("float32", "bfloat16", "float16")


def _scaled(wrapped: Wrapped) -> Scaled:
    """The parts of a torchao tensor.

    Raises:
        UnsupportedError: it is another, or is not only numbers and scales.
    """
    what = f"{wrapped.cls.qualified:.100}"
    state = dict(mapping_items(wrapped.state) or [])
    name = wrapped.cls.name.rpartition(".")[2]
    is_torchao = wrapped.cls.module.partition(".")[0] == "torchao"
    if is_torchao and name == "LinearActivationQuantizedTensor":  # of which the input alone is quantized besides
        inner = wrapped_tensor(call_of(state.get("original_weight_tensor")).made)
        if inner is not None and inner.cls.name != wrapped.cls.name:
            return _scaled(inner)
    if is_torchao and name == "AffineQuantizedTensor":
        inner = wrapped_tensor(state.get("tensor_impl", state.get("layout_tensor")))
        kind = "" if inner is None else inner.cls.name.rpartition(".")[2]
        held = {} if inner is None else dict(mapping_items(inner.state) or [])
        if kind not in _IMPLEMENTATIONS or held.get("transposed"):
            raise UnsupportedError(f"a {name} with {kind or 'unknown parts'}: the layout of its numbers is unknown")
        domain = state.get("zero_point_domain")
        if isinstance(domain, Object) and domain.args != (1,) and held.get("zero_point") is not None:
            raise UnsupportedError(f"a {name} whose zero points are not whole numbers")
        return _by_blocks(wrapped, what, held.get(_IMPLEMENTATIONS[kind]), held, state.get("block_size"))
    if not is_torchao or name not in _SCALED or "qdata" not in state:
        raise UnsupportedError(f"a tensor of class {what}, which the program that made it can turn into a plain one")
    if state.get("act_pre_scale") is not None:
        raise UnsupportedError(f"a {name} whose inputs are scaled too (act_pre_scale)")
    return _by_blocks(wrapped, what, state["qdata"], state, state.get("block_size"))


def _by_blocks(wrapped: Wrapped, what: str, numbers: object, parts: dict[Any, object], sizes: object) -> Scaled:
    scales, zeros, block = parts.get("scale"), parts.get("zero_point"), shape_of(sizes)
    if not isinstance(numbers, TensorEntry) or not isinstance(scales, TensorEntry) or block is None:
        raise UnsupportedError(f"a tensor of class {what} without the parts that it has in torchao 0.5 to 0.18")
    shape, row = numbers.shape, DTYPES[numbers.dtype]
    fits = shape == wrapped.shape and len(block) == len(shape) and all(
        size > 0 and whole % size == 0 for size, whole in zip(block, shape, strict=False)
    )  # fmt: skip
    grid = math.prod(whole // size for size, whole in zip(block, shape, strict=True)) if fits else -1
    counts = {part.numel if isinstance(part, TensorEntry) else -1 for part in (scales, zeros) if part is not None}
    if not fits or counts != {grid}:
        raise UnsupportedError(f"a tensor of class {what} whose numbers, blocks and scales do not fit together")
    is_known = row.name in ("int8", "uint8") or (row.is_floating and row.itemsize == 1 and row.numpy)
    if not is_known or scales.dtype not in _OUTPUTS or wrapped.dtype not in _OUTPUTS:
        raise UnsupportedError(f"a tensor of class {what} of {row.name} with scales of {scales.dtype}")
    return Scaled(numbers, scales, block, zeros if isinstance(zeros, TensorEntry) else None, wrapped.dtype)
