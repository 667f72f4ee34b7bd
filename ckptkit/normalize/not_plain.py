"""Values that stand where tensors do and are no plain ones: what they are, in facts and in words; nothing is built.

What torch pickles for them (``torch/_utils.py``, ``torch/_tensor.py`` ``_reduce_ex_internal``; torch 2.14):

- *quantized*: ``_rebuild_qtensor(storage, offset, size, stride, (qscheme, scale, zero_point) or
  (qscheme, scales, zero_points, axis), requires_grad, hooks)``
- *sparse*: ``_rebuild_sparse_tensor(layout, data)``; data of COO is ``(indices, values, size[, is_coalesced])``, of the
  compressed layouts ``(compressed indices, plain indices, values, size)``.  TorchScript
  (``torch/csrc/jit/serialization/pickler.cpp``) gives the same name ``layout, size, requires_grad, indices...,
  values, {}``, the layout as a number
- *nested*: ``_rebuild_nested_tensor(buffer, sizes, strides, offsets)``, jagged ones ``_rebuild_njt({"values": ...})``
- *meta*: ``_rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)``, which has no bytes
- *device*: ``_rebuild_device_tensor_from_numpy(array, dtype, device, requires_grad)`` and ``..._from_cpu_tensor``
- *wrapper*: a class that has no bytes of its own (`ckptkit.pickling.tensors.Wrapped`): DTensor, torchao's
- any of them as a parameter, or as a subclass: ``_rebuild_parameter(value, ...)``,
  ``_rebuild_from_type_v2(function, class, args, state)``
- *array*: numpy's (`ckptkit.pickling.arrays`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.parts import spread_text
from ckptkit.pickling.arrays import is_array, is_scalar
from ckptkit.pickling.inert import Global, InertDict, Object, mapping_items, walk
from ckptkit.pickling.tensors import shape_of, wrapped_tensor
from ckptkit.report import count_of

__all__ = ["Value", "describe_value"]

_MOST = 100
"""Nodes that are looked at in what one value is made of: a dozen are usual."""

_LAYERS = 8
"""Parameters of subclasses of ... tensors: two are usual."""


class Value(NamedTuple):
    """What a value is.

    Attributes:
        kind: ``"quantized"``, ``"sparse"``, ``"nested"``, ``"meta"``, ``"device"``, ``"wrapper"``, ``"array"`` or, of a
            strided tensor that is odd in some other way, ``"tensor"``.
        what: the kind, or a class, as a message names it.
        dtype: torch name of its elements; of arrays numpy's.
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
    cls = ""
    for _ in range(_LAYERS):
        if isinstance(node, TensorEntry) and cls:
            return _value(_Facts("tensor", cls, node.dtype, node.shape, "", (("data", node),), node.location), cls)
        if not isinstance(node, Object) or not isinstance(node.cls, Global):
            return None
        module, name = node.cls.module, node.cls.name
        if name.startswith("_rebuild_parameter") and node.args:
            node = node.args[0]
            continue
        wrapped = wrapped_tensor(node)
        if wrapped is not None:
            what = wrapped.cls.name.rpartition(".")[2]
            leaves = _leaves(wrapped.state)
            return _value(_Facts("wrapper", what, wrapped.dtype, wrapped.shape, spread_text(node), leaves), cls)
        if node.class_name == "torch._tensor._rebuild_from_type_v2" and len(node.args) == 4:
            function, outer, args, _ = node.args
            if not isinstance(function, Global) or not isinstance(outer, Global) or not isinstance(args, tuple):
                return None
            cls = cls or ("" if outer.name in ("Parameter", "Tensor") else outer.name.rpartition(".")[2])
            node = Object("reduce", function, args)
            continue
        facts = _array(node) if is_array(node) else None
        maker = _MAKERS.get(name)
        if maker is not None and module.partition(".")[0] == "torch":
            facts = maker(node.args)
        return None if facts is None else _value(facts, cls)
    return None


def _value(facts: _Facts, cls: str) -> Value:
    tensors = {id(node): node for _, part in facts.parts for node in _tensors(part)}
    nbytes = {node.view if isinstance(node, TensorEntry) else id(node): node.nbytes for node in tensors.values()}
    inside = sum(len(node) for _, node in facts.parts if isinstance(node, (bytes, bytearray)))
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
    return tuple((str(index), node) for index, node in enumerate(_tensors(state)))


def _tensors(node: object) -> Iterator[TensorEntry | Storage]:
    """Those at or near below a node."""
    return (each for each in islice(walk(node), _MOST) if isinstance(each, (TensorEntry, Storage)))


def _quantized(args: tuple[object, ...]) -> _Facts | None:
    if len(args) < 5 or not isinstance(args[0], Storage) or not isinstance(args[4], tuple):
        return None
    storage, shape, parameters = args[0], shape_of(args[2]), args[4]
    scheme = parameters[0].name if parameters and isinstance(parameters[0], Global) else "?"
    parts: list[tuple[str, object]] = [("storage", storage)]
    detail = scheme
    if len(parameters) == 3 and isinstance(parameters[1], (int, float)):
        detail = f"scale {parameters[1]:.6g}, zero point {parameters[2]!s:.20}"
    elif len(parameters) == 4:
        parts += [("scales", parameters[1]), ("zero_points", parameters[2])]
        scales = parameters[1].numel if isinstance(parameters[1], TensorEntry) else 0
        detail = f"{count_of(scales, 'scale')} along dim {parameters[3]!s:.20}"
    return _Facts("quantized", "quantized", storage.dtype or "?", shape, detail, tuple(parts), storage.location)


_LAYOUTS: Final = {1: "sparse_coo", 2: "sparse_csr", 4: "sparse_csc", 5: "sparse_bsr", 6: "sparse_bsc"}
"""C++'s numbers of the layouts (``c10/core/Layout.h``)."""

_INDICES = {"csr": ("crow_indices", "col_indices"), "bsr": ("crow_indices", "col_indices"),
            "csc": ("ccol_indices", "row_indices"), "bsc": ("ccol_indices", "row_indices")}  # fmt: skip


def _sparse(args: tuple[object, ...]) -> _Facts | None:
    if len(args) < 2:
        return None
    layout, data = args[:2]
    if isinstance(layout, Object) and layout.args:  # torch.serialization._get_layout("torch.sparse_coo")
        layout = layout.args[0]
    name = _LAYOUTS.get(layout, "") if isinstance(layout, int) else getattr(layout, "name", layout)
    short = name.rpartition("_")[2] if isinstance(name, str) else ""
    at = 2 if short == "coo" else 3
    if isinstance(layout, int):
        size, data = args[1], args[3:-1]
    elif isinstance(data, (tuple, list)) and len(data) > at:
        size = data[at]
    else:
        return None
    names = ("indices", "values") if short == "coo" else (*_INDICES.get(short, ()), "values")
    parts = tuple(zip(names, data, strict=False))
    values = dict(parts).get("values")
    if not isinstance(values, TensorEntry):
        return None
    stored = values.shape[0] if values.shape else 0
    detail = f"{count_of(stored, 'block' if short in ('bsr', 'bsc') else 'value')} stored"
    return _Facts("sparse", f"sparse {short.upper()}", values.dtype, shape_of(size), detail, parts)


def _nested(args: tuple[object, ...]) -> _Facts | None:
    if len(args) < 2 or not isinstance(args[0], TensorEntry):
        return None
    parts = tuple(zip(("buffer", "sizes", "strides", "offsets"), args, strict=False))
    sizes = args[1].shape if isinstance(args[1], TensorEntry) and len(args[1].shape) == 2 else (0, 0)
    shape = (sizes[0], *[-1] * min(sizes[1], DEFAULT_LIMITS.dimensions))
    return _Facts("nested", "nested", args[0].dtype, shape, "", parts)


def _jagged(args: tuple[object, ...]) -> _Facts | None:
    state = args[0] if args else None
    values, offsets = (state.get("values"), state.get("offsets")) if isinstance(state, InertDict) else (None, None)
    if not isinstance(state, InertDict) or not isinstance(values, TensorEntry):
        return None
    many = max(offsets.shape[0] - 1, 0) if isinstance(offsets, TensorEntry) and offsets.shape else 0
    parts = tuple((name, state.get(name)) for name in ("values", "offsets", "lengths") if state.get(name) is not None)
    return _Facts("nested", "nested", values.dtype, (many, -1, *values.shape[1:]), "jagged", parts)


def _meta(args: tuple[object, ...]) -> _Facts | None:
    if len(args) < 2 or not isinstance(args[0], Global):
        return None
    return _Facts("meta", "meta", args[0].name, shape_of(args[1]), "a shape without values", (), "meta")


def _on_device(args: tuple[object, ...]) -> _Facts | None:
    """A tensor of a device that torch pickles as an array, or as a copy in main memory."""
    if len(args) < 3 or not isinstance(args[1], Global):
        return None
    source, dtype, device = args[0], args[1].name, args[2] if isinstance(args[2], str) else ""
    inner = _array(source) if is_array(source) else None
    shape = source.shape if isinstance(source, TensorEntry) else inner.shape if inner is not None else None
    parts = (("data", source),) if inner is None else inner.parts
    return _Facts("device", "tensor", dtype, shape, f"of device {device:.40}", parts, device)


def _strided(args: tuple[object, ...]) -> _Facts | None:
    """One that is not read as a plain tensor, such as one with backward hooks."""
    if len(args) < 4 or not isinstance(args[0], Storage):
        return None
    told = args[6] if len(args) > 6 and isinstance(args[6], Global) else None
    dtype = told.name if told is not None else args[0].dtype or "uint8"
    return _Facts("tensor", "tensor", dtype, shape_of(args[2]), "with hooks or metadata", (("storage", args[0]),))


_MAKERS: Final[dict[str, Callable[[tuple[object, ...]], _Facts | None]]] = {
    "_rebuild_qtensor": _quantized,
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_sparse_csr_tensor": _sparse,
    "_rebuild_nested_tensor": _nested,
    "_rebuild_njt": _jagged,
    "_rebuild_meta_tensor_no_storage": _meta,
    "_rebuild_device_tensor_from_numpy": _on_device,
    "_rebuild_device_tensor_from_cpu_tensor": _on_device,
    "_rebuild_tensor_v2": _strided,
    "_rebuild_tensor_v3": _strided,
}
"""What torch calls to make such a value, and what tells what it makes."""

_LETTERS = {"f": "float", "i": "int", "u": "uint", "c": "complex"}


def _array(node: Object) -> _Facts | None:
    if is_scalar(node):
        dtype, data = (*node.args, None, None)[:2]
        return _Facts("array", "numpy scalar", _numpy_dtype(dtype), None, "", _data(data), "cpu")
    if node.class_name.endswith("._frombuffer"):
        data, dtype, shape = (*node.args, None, None, None)[:3]
    else:
        state = node.state if isinstance(node.state, tuple) else ()
        shape, dtype, _, data = (*(state if len(state) == 4 else state[1:5]), None, None, None, None)[:4]
    return _Facts("array", "numpy array", _numpy_dtype(dtype), shape_of(shape), "", _data(data), "cpu")


def _data(data: object) -> tuple[tuple[str, object], ...]:
    return (("data", data),) if isinstance(data, (bytes, bytearray)) else ()


def _numpy_dtype(node: object) -> str:
    """``"float64"`` of ``dtype("f8")``; the code itself where it is no number's."""
    code = node.args[0] if isinstance(node, Object) and node.args else None
    if isinstance(code, Global):
        return code.name
    if not isinstance(code, str):
        return "object"
    bits = str(8 * int(code[1:])) if code[1:] in ("1", "2", "4", "8", "16") else "?"
    name = "bool" if code == "b1" else _LETTERS.get(code[:1], "?") + bits
    return name if name in DTYPES else code[:20]
