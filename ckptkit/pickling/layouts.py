"""Tensors that are not plain strided ones, as the calls say that torch rebuilds them with; checked against their parts.

``torch/_utils.py`` has the functions, which check next to nothing: of what they are given a quantizer's axis, a sparse
tensor's index or a nested tensor's offset may point anywhere, and whoever uses the tensor reads there.

- ``_rebuild_qtensor(storage, offset, size, stride, (scheme, scale, zero_point) or (scheme, scales, zero_points, axis),
  requires_grad, hooks)``; the scheme of float zero points is saved as that of whole ones
- ``_rebuild_sparse_tensor(layout, (indices, values, size[, is_coalesced]) or (compressed, plain, values, size))``,
  with the layout as ``torch.serialization._get_layout("torch.sparse_coo")``; ``_rebuild_sparse_csr_tensor`` at
  first (torch 1.9)
- ``_rebuild_nested_tensor(buffer, sizes, strides, offsets)``, and ``_rebuild_njt({values, offsets, lengths, ...})`` of
  ``torch.nested._internal.nested_tensor`` for jagged ones
- ``_rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)``
- ``_rebuild_device_tensor_from_cpu_tensor`` and ``..._from_numpy(data, dtype, device, requires_grad)``, before called
  ``_rebuild_xla_tensor``

``_rebuild_parameter`` may wrap each, and so may ``_rebuild_from_type_v2(function, class, args, state)``.
`ckptkit.transfer.values` checks the bytes of indices and offsets against it; `ckptkit.normalize.not_plain` puts all of
it in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import Global, Object, mapping_items
from ckptkit.pickling.tensors import is_int, no_hooks, shape_of, wrapped_tensor

__all__ = [
    "PACKED", "Call", "Jagged", "Layout", "Meta", "Nested", "OnDevice", "Quantized", "Rebuilt", "Sparse", "call_of",
    "compressed_counts", "device_of", "layout_name", "rebuilt",
]  # fmt: skip

_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASSES = ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type")

_LAYERS = 8
"""Parameters of subclasses of ... tensors: two are usual."""

PACKED = {"quint4x2": 2, "quint2x4": 4}
"""Values in one byte of the quantized types that share one."""

_PER_CHANNEL = ("per_channel_affine", "per_channel_affine_float_qparams")
_COMPRESSED = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
_HUGE = 1 << 62


class Quantized(NamedTuple):
    """Whole numbers with what makes values of them.

    Attributes:
        numbers: as stored.
        scheme: torch name: ``"per_tensor_affine"``.
        scales, zero_points: one number, or one for each index of a dimension.
        axis: that dimension; ``None``: one number for all.
    """

    numbers: TensorEntry
    scheme: str
    scales: float | tuple[float, ...] | TensorEntry
    zero_points: float | tuple[float, ...] | TensorEntry
    axis: int | None
    requires_grad: bool


class Sparse(NamedTuple):
    """The values that are not zero, and their places.

    Attributes:
        layout: torch name: ``"sparse_coo"``.
        indices: of each value in each dimension; of compressed layouts the compressed and the plain ones.
        values: with dense dimensions last.
        size: of the whole.
        is_coalesced: whether no place appears twice, and all are in order; ``None``: not known.
    """

    layout: str
    indices: tuple[TensorEntry, ...]
    values: TensorEntry
    size: tuple[int, ...]
    is_coalesced: bool | None = None


class Nested(NamedTuple):
    """Tensors of different sizes in one buffer: a row of ``sizes`` and ``strides`` for each."""

    buffer: TensorEntry
    sizes: TensorEntry
    strides: TensorEntry
    offsets: TensorEntry


class Jagged(NamedTuple):
    """Tensors that differ along one dimension, one after the other along it.

    Attributes:
        values: all of them.
        offsets: where each begins, and where the last ends.
        lengths: of each, if they do not reach to the next one.
        ragged_idx: the dimension, counted with the one of the tensors.
    """

    values: TensorEntry
    offsets: TensorEntry
    lengths: TensorEntry | None
    ragged_idx: int
    requires_grad: bool


class Meta(NamedTuple):
    """A tensor without bytes."""

    dtype: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


class OnDevice(NamedTuple):
    """A tensor of a device that has no storages, saved as one on the CPU or as an array of numpy (a node)."""

    data: object
    dtype: str
    device: str
    requires_grad: bool


Layout = Quantized | Sparse | Nested | Jagged | Meta | OnDevice


class Call(NamedTuple):
    """The maker of a tensor, and the result.

    Attributes:
        made: the innermost call, or a plain tensor.
        cls: name of the outermost subclass; empty for a plain tensor.
        is_parameter: whether the result is a parameter.
        requires_grad: of that; ``None``: as the tensor's own.
    """

    made: object
    cls: str = ""
    is_parameter: bool = False
    requires_grad: bool | None = None

    @property
    def kind(self) -> str:
        """``"quantized"``, ``"sparse"``, ``"nested"``, ``"meta"`` or ``"device"``; empty: it makes none of them."""
        made = self.made
        is_known = isinstance(made, Object) and made.how == "reduce" and made.class_name in _MAKERS
        return _MAKERS[made.class_name][0] if is_known else ""  # type: ignore[attr-defined]  # an `Object`


def call_of(node: object) -> Call:
    """The maker of a tensor: a node without the parameters and subclasses around it."""
    cls, is_parameter, requires_grad = "", False, None
    for _ in range(_LAYERS):
        if not isinstance(node, Object) or node.how != "reduce" or len(node.args) not in (3, 4):
            break
        name, (inner, second, third) = node.class_name, node.args[:3]
        if name in _PARAMETERS and isinstance(second, bool):
            is_parameter, requires_grad = True, second if requires_grad is None else requires_grad
            node = inner
            continue
        if name not in _SUBCLASSES or not isinstance(inner, Global) or not isinstance(second, Global):
            break
        if not isinstance(third, tuple) or wrapped_tensor(node) is not None:
            break
        is_parameter = is_parameter or second.name == "Parameter"
        cls = cls or ("" if second.name in ("Parameter", "Tensor") else second.name.rpartition(".")[2])
        node = Object("reduce", inner, third)
    return Call(node, cls, is_parameter, requires_grad)


class Rebuilt(NamedTuple):
    """The result of a call.

    Attributes:
        layout: a tensor of a special kind.
        is_parameter: whether the result is a parameter.
        requires_grad: of that.
    """

    layout: Layout
    is_parameter: bool = False
    requires_grad: bool = False


def rebuilt(node: object) -> Rebuilt | None:
    """The tensor that a call makes which is not a plain strided one; ``None``: it makes none that is known here.

    Raises:
        CorruptError: its arguments are not what torch saves, or do not fit each other.
    """
    call = call_of(node)
    if not call.kind or not isinstance(call.made, Object):
        return None
    try:
        layout = _MAKERS[call.made.class_name][1](call.made.args)
    except CorruptError as error:
        raise error.at(where=call.made.class_name.rpartition(".")[2]) from None
    own = getattr(layout, "requires_grad", False)
    return Rebuilt(layout, call.is_parameter, own if call.requires_grad is None else call.requires_grad)


def layout_name(node: object) -> str | None:
    """The name of a ``torch.layout``; ``None``: it is not one."""
    if isinstance(node, Object) and node.class_name == "torch.serialization._get_layout" and len(node.args) == 1:
        name = node.args[0]
        return name.removeprefix("torch.") if isinstance(name, str) else None
    return node.name if isinstance(node, Global) and node.module == "torch" else None


def device_of(node: object) -> str | None:
    """The tag of a device as a call is given it: text, or a ``torch.device``; ``None``: it is neither."""
    if isinstance(node, Object) and node.class_name == "torch.device" and node.how == "reduce":
        kind, index = (*node.args, None)[:2] if len(node.args) in (1, 2) else (None, None)
        if not isinstance(kind, str):
            return None
        return f"{kind}:{index}" if isinstance(index, int) and 0 <= index < 1 << 16 else kind
    return node if isinstance(node, str) else None


def _quantized_values(storage: object, offset: object, sizes: object, strides: object) -> TensorEntry:
    """The numbers that scales and zero points belong to.

    Raises:
        CorruptError: they are not in the storage.
    """
    size, stride = _counts(sizes, "size"), _counts(strides, "stride")
    dtype = storage.dtype if isinstance(storage, Storage) else None
    if not isinstance(storage, Storage) or dtype is None or DTYPES[dtype].kind != "quantized":
        raise CorruptError("a quantized tensor without a storage of a quantized type")
    if len(size) != len(stride) or not is_int(offset) or not 0 <= offset < _HUGE:
        raise CorruptError(
            f"size {size}, stride {stride} and offset {offset!r:.40} of a quantized tensor do not fit together"
        )
    reach = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
    nbytes = -(-(offset + reach) // PACKED.get(dtype, 1)) * DTYPES[dtype].itemsize
    if reach and nbytes > storage.nbytes:
        raise CorruptError(
            f"size {size}, stride {stride}, offset {offset} of {dtype} reach to byte {nbytes:,} of a storage of "
            f"{storage.nbytes:,} bytes"
        )
    return TensorEntry(storage=storage, storage_offset=offset, shape=size, stride=stride, dtype=dtype)


def _quantized(args: tuple[object, ...]) -> Layout:
    *where, how, requires_grad, hooks = _of(args, 7)
    numbers = _quantized_values(*where)
    size = numbers.shape
    if not no_hooks(hooks):
        raise CorruptError("a quantized tensor with backward hooks")
    scheme = how[0] if isinstance(how, tuple) and how else None
    name = scheme.name if isinstance(scheme, Global) and scheme.module == "torch" else None
    how = how if isinstance(how, tuple) else ()
    if name == "per_tensor_affine" and len(how) == 3:
        if not _is_number(how[1]) or not is_int(how[2]) or abs(how[2]) >= 1 << 31:
            raise CorruptError("a quantized tensor whose scale and zero point are not numbers")
        return Quantized(numbers, name, float(how[1]), how[2], None, _flag(requires_grad))
    if name not in _PER_CHANNEL or len(how) != 4:
        raise CorruptError(f"a quantized tensor with scheme {name or '?'!s:.60}, which torch never saves")
    axis = how[3]
    if not is_int(axis) or not 0 <= axis < len(size):
        raise CorruptError(f"the axis of a quantized tensor of {len(size)} dimensions is {axis!r:.40}")
    scales, zeros = (_per_channel(how[n], size[axis], what) for n, what in ((1, "scales"), (2, "zero points")))
    return Quantized(numbers, name, scales, zeros, axis, _flag(requires_grad))


def _per_channel(node: object, count: int, what: str) -> tuple[float, ...] | TensorEntry:
    made = tuple(node) if isinstance(node, list) and all(map(_is_number, node)) else _tensor(node, what, dims=1)
    found = made.shape[0] if isinstance(made, TensorEntry) else len(made)
    if found != count:
        raise CorruptError(f"{found} {what} for {count} channels of a quantized tensor")
    return made


def _sparse(args: tuple[object, ...]) -> Layout:
    layout, data = layout_name(args[0]) if args else None, args[1] if len(args) == 2 else None
    parts = data if isinstance(data, tuple) else ()
    if layout == "sparse_coo" and len(parts) in (3, 4):
        indices = _tensor(parts[0], "indices", dims=2, dtypes=("int64",))
        values = _tensor(parts[1], "values")
        size = _counts(parts[2], "size")
        is_coalesced = None if len(parts) == 3 or parts[3] is None else _flag(parts[3])
        sparse, count = indices.shape
        if values.shape != (count, *size[sparse:]) or sparse > len(size):
            raise CorruptError(
                f"indices {list(indices.shape)} and values {list(values.shape)} do not make a sparse tensor of shape "
                f"{list(size)}"
            )
        return Sparse(layout, (indices,), values, size, is_coalesced)
    if layout not in _COMPRESSED or len(parts) != 4:
        raise CorruptError(f"a sparse tensor of layout {layout!r:.60} with {len(parts)} parts, which torch never saves")
    compressed = _tensor(parts[0], "compressed indices", dtypes=("int32", "int64"))
    plain = _tensor(parts[1], "plain indices", dtypes=(compressed.dtype,))
    values, size = _tensor(parts[2], "values"), _counts(parts[3], "size")
    batch = len(compressed.shape) - 1
    block = 2 if layout in ("sparse_bsr", "sparse_bsc") else 0
    fits = len(plain.shape) == batch + 1 and len(values.shape) > batch + block and len(size) >= batch + 2 and batch >= 0
    rows, columns = _blocks(layout, size, values.shape, batch)
    if (
        not fits
        or min(rows, columns) < 0
        or any(part.shape[:batch] != size[:batch] for part in (compressed, plain, values))
        or values.shape[batch] != plain.shape[-1]
        or values.shape[batch + 1 + block :] != size[batch + 2 :]
        or compressed.shape[-1] != 1 + (columns if layout in ("sparse_csc", "sparse_bsc") else rows)
    ):
        shapes = ", ".join(str(list(part.shape)) for part in (compressed, plain, values))
        raise CorruptError(f"indices and values {shapes} do not make a {layout} tensor of {list(size)}")
    return Sparse(layout, (compressed, plain), values, size)


def _blocks(layout: str, size: Sequence[int], shape: Sequence[int], batch: int) -> tuple[int, int]:
    """Rows and columns of a compressed layout, counted in blocks if it has them; negative: they do not fit."""
    rows, columns = (*size[batch : batch + 2], -1, -1)[:2]
    if layout in ("sparse_csr", "sparse_csc"):
        return rows, columns
    high, wide = (*shape[batch + 1 : batch + 3], 0, 0)[:2]
    if not high or not wide or rows % high or columns % wide:
        return -1, -1
    return rows // high, columns // wide


def compressed_counts(tensor: Sparse) -> tuple[int, int]:
    """How many compressed and how many plain indices there can be: rows and columns, or columns and rows."""
    counts = _blocks(tensor.layout, tensor.size, tensor.values.shape, len(tensor.indices[0].shape) - 1)
    return counts[::-1] if tensor.layout in ("sparse_csc", "sparse_bsc") else counts


def _nested(args: tuple[object, ...]) -> Layout:
    given = _of(args, 4)
    buffer = _tensor(given[0], "buffer", dims=1)
    sizes = _tensor(given[1], "sizes", dims=2, dtypes=("int64",))
    strides = _tensor(given[2], "strides", dims=2, dtypes=("int64",))
    offsets = _tensor(given[3], "offsets", dims=1, dtypes=("int64",))
    if sizes.shape != strides.shape or sizes.shape[:1] != offsets.shape or sizes.shape[1] >= DEFAULT_LIMITS.dimensions:
        raise CorruptError(
            f"sizes {list(sizes.shape)}, strides {list(strides.shape)} and offsets {list(offsets.shape)} of a nested "
            "tensor do not fit"
        )
    if not buffer.is_contiguous or buffer.storage_offset:  # torch takes offsets from the storage's beginning
        raise CorruptError("the buffer of a nested tensor is not its whole storage")
    return Nested(buffer, sizes, strides, offsets)


def _jagged(args: tuple[object, ...]) -> Layout:
    given = dict(mapping_items(args[0]) or []) if len(args) == 1 else {}
    values = _tensor(given.get("values"), "values")
    offsets = _tensor(given.get("offsets"), "offsets", dims=1, dtypes=("int32", "int64"))
    lengths = None
    if given.get("lengths") is not None:
        lengths = _tensor(given["lengths"], "lengths", dims=1, dtypes=(offsets.dtype,))
    axis = given.get("_ragged_idx", 1)
    if not is_int(axis) or not 1 <= axis <= len(values.shape) or not offsets.shape[0]:
        raise CorruptError(f"the ragged dimension of a nested tensor is {axis!r:.40}, which its values do not have")
    if lengths is not None and lengths.shape[0] != offsets.shape[0] - 1:
        raise CorruptError(f"{lengths.shape[0]} lengths and {offsets.shape[0]} offsets of a nested tensor")
    return Jagged(values, offsets, lengths, axis, _flag(given.get("requires_grad", False)))


def _meta(args: tuple[object, ...]) -> Layout:
    dtype, sizes, strides, requires_grad = _of(args, 4)
    size, stride = _counts(sizes, "size"), _counts(strides, "stride")
    reach = sum((n - 1) * s for n, s in zip(size, stride, strict=False)) if 0 not in size else 0
    if len(size) != len(stride) or reach >= _HUGE >> 4:
        raise CorruptError(f"size {size} and stride {stride} of a meta tensor do not fit")
    return Meta(_dtype(dtype), size, stride, _flag(requires_grad))


def _on_device(args: tuple[object, ...]) -> Layout:
    data, dtype, device, requires_grad = _of(args, 4)
    tag = device_of(device)
    if tag is None:
        raise CorruptError("a tensor on a device without a name")
    return OnDevice(data, _dtype(dtype), tag, _flag(requires_grad))


_MAKERS: dict[str, tuple[str, Callable[[tuple[object, ...]], Layout]]] = {
    "torch._utils._rebuild_qtensor": ("quantized", _quantized),
    "torch._utils._rebuild_sparse_tensor": ("sparse", _sparse),
    "torch._utils._rebuild_sparse_csr_tensor": ("sparse", _sparse),
    "torch._utils._rebuild_nested_tensor": ("nested", _nested),
    "torch.nested._internal.nested_tensor._rebuild_njt": ("nested", _jagged),
    "torch._utils._rebuild_meta_tensor_no_storage": ("meta", _meta),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": ("device", _on_device),
    "torch._utils._rebuild_device_tensor_from_numpy": ("device", _on_device),
    "torch._utils._rebuild_xla_tensor": ("device", _on_device),
}
"""What torch calls for them, of what kind that is, and what reads the arguments."""


# Arguments.


def _of(args: tuple[object, ...], count: int) -> Sequence[object]:
    if len(args) != count:
        raise CorruptError(f"{len(args)} arguments, but torch saves {count}")
    return args


def _is_number(node: object) -> TypeGuard[float]:
    return node.__class__ in (int, float)


def _flag(node: object) -> bool:
    if not isinstance(node, bool):
        raise CorruptError(f"{node!r:.40}, but True or False is expected")
    return node


def _counts(node: object, what: str) -> tuple[int, ...]:
    """Sizes or strides."""
    shape = shape_of(node)
    if shape is None or min(shape, default=0) < 0:
        raise CorruptError(f"a tensor whose {what} is not whole numbers from 0 to 2^62")
    if len(shape) > DEFAULT_LIMITS.dimensions or (what == "size" and math.prod(max(n, 1) for n in shape) >= _HUGE):
        raise CorruptError(f"a tensor whose {what} is larger than torch can count")
    return shape


def _dtype(node: object) -> str:
    if not isinstance(node, Global) or node.module != "torch" or node.name not in DTYPES:
        raise CorruptError("a tensor whose dtype is not torch's")
    return node.name


def _tensor(node: object, what: str, *, dims: int | None = None, dtypes: Sequence[str] = ()) -> TensorEntry:
    if not isinstance(node, TensorEntry):
        raise CorruptError(f"its {what} are not a tensor")
    if (dims is not None and len(node.shape) != dims) or (dtypes and node.dtype not in dtypes):
        raise CorruptError(f"its {what} are a tensor {list(node.shape)} of {node.dtype}, which is not possible")
    return node
