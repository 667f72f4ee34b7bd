"""torch's pickle vocabulary, in both directions: storages and ``_rebuild_*`` calls.

A tensor is pickled as a call of a function in ``torch._utils`` whose first argument is a
persistent id ``('storage', class, key, location, numel[, view_metadata])`` (``torch/_utils.py``,
``torch/_tensor.py`` ``_reduce_ex_internal``, ``torch/serialization.py`` ``persistent_id``):

- ``_rebuild_tensor(storage, offset, size, stride)``: before 0.4
- ``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])``: dtype is the storage class's,
  ``metadata`` contains the ``conj`` and ``neg`` bits
- ``_rebuild_tensor_v3(storage, ..., hooks, dtype[, metadata])``: untyped storage, whose ``numel``
  counts bytes (float8, uint16/32/64, complex32, bits)
- ``_rebuild_parameter(data, requires_grad, hooks)``, and ``_rebuild_parameter_with_state``
- ``_rebuild_from_type_v2(function, type, args, state)``: a subclass, or Python attributes

Arguments that do not fit (quantized, sparse, nested, hooks that are not empty) are left as the
inert `Object` they are, with their tensors as leaves.  Geometry that does not fit its storage is
an error: a reader that believes it reads outside the storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, TypeGuard

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.computed import ByteSource
from ckptkit.dtypes import BY_STORAGE_CLASS, DTYPES
from ckptkit.errors import CorruptError, UnsupportedError
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import Global, InertDict, Object, PersistentId, is_global, mapping_items
from ckptkit.pickling.machine import Constructor
from ckptkit.report import count_of
from ckptkit.tensor import storage_of, tensor_of

__all__ = [
    "TEXT_IDS_MESSAGE",
    "Locate",
    "StorageTable",
    "Wrapped",
    "is_int",
    "is_rebuilt_alone",
    "is_tensor_like",
    "lower_storage",
    "lower_tensor",
    "no_hooks",
    "shape_of",
    "wrapped_tensor",
]

_UNTYPED = {("torch.storage", "UntypedStorage"), ("torch.storage", "_UntypedStorage"), ("torch", "UntypedStorage")}
"""Where torch has kept the untyped storage class: 2.0 and later, 1.12, 1.13."""

TEXT_IDS_MESSAGE = (
    "pickled with protocol 0, which turns the references to the storages into text: torch.load refuses it; convert "
    "writes protocol 2"
)
"""Of a file whose persistent ids are text."""

_UNTYPED_DTYPE = "uint8"
"""What torch takes an untyped storage's elements for (``torch/serialization.py`` ``persistent_load``)."""

_PLAIN_TYPES = {("torch", "Tensor"), ("torch._tensor", "Tensor")}
_PARAMETER = ("torch.nn.parameter", "Parameter")

_HUGE = 1 << 62
"""More than any count of elements or bytes: products and sums of counts stay cheap."""

Locate = Callable[[str, int], tuple[ByteSource, int | None]]
"""From a storage key and the size in bytes that the pickle declares to the range of its bytes, and their recorded
CRC-32 (``None``: not recorded)."""


class StorageTable:
    """The storages of one file, made as persistent ids name them.

    `ckptkit.pickling.dialects` has the table for files before torch 1.6.

    Args:
        locate: finds a storage's bytes in the container.
        byteorder: of the elements, ``"little"`` or ``"big"``.
        limits: bounds on tensor geometry.
    """

    def __init__(self, locate: Locate, *, byteorder: str = "little", limits: Limits = DEFAULT_LIMITS) -> None:
        self._locate = locate
        self._byteorder = "big" if byteorder == "big" else "little"
        self._limits = limits
        self._storages: dict[str, Storage] = {}
        self._classes: dict[object, tuple[str | None, int]] = {}
        self._encoded: dict[str, bytes] = {}

    def persistent_load(self, pid: object) -> object:
        """The `Storage` a persistent id names.

        Raises:
            CorruptError: one key with two types, sizes or locations, or an id that is not a storage's.
            UnsupportedError: a storage class that is not torch's.
        """
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, cls, key, location, numel = pid
            if key.__class__ is str and location.__class__ is str and numel.__class__ is int and 0 <= numel < _HUGE:
                return self.named(cls, key, location, numel)
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and isinstance(pid[0], str) and pid[0] == "storage"):
            raise UnsupportedError("a persistent id that is not a torch storage")
        _, cls, key, location, numel, *_ = pid
        if not isinstance(key, str) or not isinstance(location, str) or not _is_count(numel):
            raise CorruptError("a storage's persistent id without key, location or size")
        storage = self.named(cls, key, location, numel)
        return storage if len(pid) == 5 or pid[5] is None else self._view(storage, pid[5])

    def _view(self, root: Storage, view_metadata: object) -> Storage:
        """The part of a storage that is one itself; torch-zip has none (``torch/serialization.py`` ``_load``)."""
        raise UnsupportedError("a storage that is a view of another (view_metadata)")

    def named(self, cls: object, key: str, location: str, numel: int) -> Storage:
        """The storage of a key, made when it is first named.

        Args:
            cls: the node of its class.
            key: its key.
            location: its device tag.
            numel: how many elements it has, from 0 to less than 62 bits count.

        Raises:
            As `persistent_load`.
        """
        dtype, itemsize = (self._classes.get(cls) if isinstance(cls, Global) else None) or self._dtype(cls)
        known = self._storages.get(key)
        if known is None:
            nbytes = numel * itemsize
            source, crc32 = self._locate(key, nbytes)
            known = self._storages[key] = storage_of(key, dtype, nbytes, location, source, crc32, self._byteorder)
        elif known.nbytes == numel == 0 and known.dtype != dtype:
            return replace(known, dtype=dtype)  # nothing is shared, and torch does not compare the types
        elif (known.nbytes, known.location) != (numel * itemsize, location) or not _agree(known.dtype, dtype):
            raise CorruptError(
                f"storage {key!r} is named as {count_of(known.nbytes, 'byte')} of {known.dtype or 'bytes'} on "
                f"{known.location!r} and as {count_of(numel * itemsize, 'byte')} of {dtype or 'bytes'} on {location!r}"
            )
        return known

    def _dtype(self, cls: object) -> tuple[str | None, int]:
        """Declared dtype (``None``: untyped) and element size in bytes of a storage class."""
        if not isinstance(cls, Global):
            raise UnsupportedError(f"a storage whose class is a {type(cls).__name__}, not a name")
        known = self._classes[cls] = _storage_dtype(cls)
        return known

    @property
    def constructors(self) -> dict[tuple[str, str], Constructor]:
        """The calls that are understood, for `read_pickle`: those that make tensors, and bytes."""
        return {
            ("torch._utils", "_rebuild_tensor"): self._tensor_v1,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter_with_state,
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            ("_codecs", "encode"): self._bytes,
        }

    def _bytes(self, args: tuple[object, ...]) -> object:
        """Bytes as Python 3 pickles them in protocol 2: the text that latin-1 reads in them.

        One text gives one object, however often a file encodes it: calls cost the file two bytes each.
        """
        if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
            return NotImplemented
        if args[0] not in self._encoded:
            try:
                self._encoded[args[0]] = args[0].encode("latin-1")
            except UnicodeEncodeError:
                return NotImplemented
        return self._encoded[args[0]]

    def _entry(
        self, args: tuple[object, ...], dtype: str | None = None, requires_grad: object = False, metadata: object = None
    ) -> object:
        """An entry from ``(storage, offset, size, stride, ...)``."""
        storage, offset, shape, stride = args[0], args[1], shape_of(args[2]), shape_of(args[3])
        bits = _metadata_bits(metadata)
        if not isinstance(storage, Storage) or not isinstance(requires_grad, bool) or bits is None:
            return NotImplemented
        dtype = dtype or storage.dtype or _UNTYPED_DTYPE
        if DTYPES[dtype].kind == "quantized":
            return NotImplemented
        if shape is None or stride is None or not is_int(offset) or abs(offset) >= _HUGE:
            raise CorruptError("a tensor whose offset, size or stride are not 62-bit whole numbers")
        if len(shape) > self._limits.dimensions:
            raise CorruptError(
                f"a tensor of {count_of(len(shape), 'dimension')}; torch allows {self._limits.dimensions}"
            )
        return tensor_of(storage, offset, shape, stride, dtype, requires_grad, False, *bits).check()

    def _tensor_v1(self, args: tuple[object, ...]) -> object:
        return self._entry(args) if len(args) == 4 else NotImplemented

    def _tensor_v2(self, args: tuple[object, ...]) -> object:
        if len(args) not in (6, 7) or not no_hooks(args[5]):
            return NotImplemented
        return self._entry(args, None, args[4], args[6] if len(args) == 7 else None)

    def _tensor_v3(self, args: tuple[object, ...]) -> object:
        if len(args) not in (7, 8) or not no_hooks(args[5]):
            return NotImplemented
        dtype = args[6]
        if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in DTYPES:
            return NotImplemented
        if DTYPES[dtype.name].bits:  # torch has no such dtype
            return NotImplemented
        return self._entry(args, dtype.name, args[4], args[7] if len(args) == 8 else None)

    def _parameter(self, args: tuple[object, ...]) -> object:
        if len(args) != 3 or not no_hooks(args[2]):
            return NotImplemented
        data, requires_grad = args[0], args[1]
        if not isinstance(data, TensorEntry) or not isinstance(requires_grad, bool):
            return NotImplemented
        if data.is_parameter or data.subclass is not None or data.attributes is not None or data.effects:
            return NotImplemented  # torch wraps a plain tensor; whatever this is, nothing of it may get lost
        return replace(data, is_parameter=True, requires_grad=requires_grad)

    def _parameter_with_state(self, args: tuple[object, ...]) -> object:
        parameter = self._parameter(args[:3]) if len(args) == 4 else NotImplemented
        return replace(parameter, attributes=args[3]) if isinstance(parameter, TensorEntry) else NotImplemented

    def _from_type(self, args: tuple[object, ...]) -> object:
        if len(args) != 4 or not isinstance(args[0], Global) or not isinstance(args[1], Global):
            return NotImplemented
        function, cls, inner, state = args[0], args[1], args[2], args[3]
        # Not the other two: a call inside a call inside a call could be nested without end.
        rebuild = {"_rebuild_tensor_v2": self._tensor_v2, "_rebuild_tensor_v3": self._tensor_v3}.get(function.name)
        if rebuild is None or function.module != "torch._utils" or not isinstance(inner, tuple):
            return NotImplemented
        entry = rebuild(inner)
        if not isinstance(entry, TensorEntry):
            return NotImplemented
        if (cls.module, cls.name) == _PARAMETER:
            return replace(entry, is_parameter=True, attributes=state)
        plain = (cls.module, cls.name) in _PLAIN_TYPES
        return replace(entry, subclass=None if plain else cls, attributes=state)


def is_tensor_like(node: object) -> bool:
    """Whether a node is a tensor, or a tensor torch rebuilds that is not a plain strided one."""
    if isinstance(node, TensorEntry):
        return True
    return isinstance(node, Object) and isinstance(node.cls, Global) and (
        node.cls.module in ("torch._utils", "torch._tensor") and node.cls.name.startswith("_rebuild_")
    )  # fmt: skip


class Wrapped(NamedTuple):
    """A tensor of a class without its own bytes that wraps others: DTensor, ShardedTensor, torchao's.

    Attributes:
        cls: the class.
        dtype: torch name.
        shape: of the whole, whatever of it is in the file.
        state: inert node of what the class keeps.
    """

    cls: Global
    dtype: str
    shape: tuple[int, ...]
    state: object


def wrapped_tensor(node: object) -> Wrapped | None:
    """The tensor that ``_rebuild_from_type_v2(_rebuild_wrapper_subclass, ...)`` makes; ``None``: it is something else.

    The call's third argument is ``(cls, dtype, size, stride, offset, layout, device, requires_grad)``
    (``torch/_tensor.py`` ``_reduce_ex_internal``).
    """
    if not isinstance(node, Object) or node.class_name != "torch._tensor._rebuild_from_type_v2" or len(node.args) != 4:
        return None
    function, cls, inner, state = node.args
    if not is_global(function, "torch._utils", "_rebuild_wrapper_subclass") or not isinstance(cls, Global):
        return None
    if not isinstance(inner, tuple) or len(inner) < 3 or not isinstance(inner[1], Global):
        return None
    shape = shape_of(inner[2])
    return None if shape is None else Wrapped(cls, inner[1].name, shape, state)


def lower_storage(storage: Storage, key: str) -> PersistentId:
    """The persistent id of a storage that is written under ``key``."""
    cls, itemsize = _storage_class(storage.dtype)
    return PersistentId(("storage", cls, key, storage.location, storage.nbytes // itemsize))


@lru_cache(256)
def _storage_class(dtype: str | None) -> tuple[Global, int]:
    """The class of a storage of a dtype (``None``: untyped), and the bytes of one of its elements."""
    if dtype is None:
        return Global("torch.storage", "UntypedStorage"), 1
    row = DTYPES[dtype]
    return Global("torch", row.storage_class or "UntypedStorage"), row.itemsize


def is_rebuilt_alone(entry: TensorEntry) -> bool:
    """Whether `ckptkit.pickling.writer.REBUILD` makes a tensor from its storage and sizes alone."""
    return (
        entry.storage.dtype == entry.dtype
        and not (entry.is_parameter or entry.is_conj or entry.is_neg or entry.effects)
        and entry.subclass is None
        and entry.attributes is None
    )


def lower_tensor(entry: TensorEntry) -> Object:
    """The call torch itself would pickle for a tensor; its first argument is the `Storage`."""
    call = _rebuild_call(entry)
    call.effects = entry.effects  # type: ignore[assignment]
    return call


def _rebuild_call(entry: TensorEntry) -> Object:
    hooks = Object("reduce", Global("collections", "OrderedDict"), ())
    data: object = entry
    typed = entry.storage.dtype == entry.dtype
    args: tuple[object, ...] = (
        entry.storage,
        entry.storage_offset,
        entry.shape,
        entry.stride,
        # A parameter wraps a plain tensor, which itself needs no gradient.
        entry.requires_grad and not _is_wrapped_parameter(entry),
        hooks,
    )
    if not typed:
        args += (Global("torch", entry.dtype),)
    bits = [(name, True) for name, bit in (("conj", entry.is_conj), ("neg", entry.is_neg)) if bit]
    if bits:
        args += (InertDict(list(bits)),)
    function = Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    if entry.subclass is not None or (entry.attributes is not None and not entry.is_parameter):
        cls = entry.subclass or Global("torch", "Tensor")
        data = Object(
            "reduce",
            Global("torch._tensor", "_rebuild_from_type_v2"),
            (function, cls, args, entry.attributes),
        )
    else:
        data = Object("reduce", function, args)
    if not _is_wrapped_parameter(entry):
        return data
    parameter = (data, entry.requires_grad, Object("reduce", Global("collections", "OrderedDict"), ()))
    if entry.attributes is None:
        return Object("reduce", Global("torch._utils", "_rebuild_parameter"), parameter)
    return Object("reduce", Global("torch._utils", "_rebuild_parameter_with_state"), (*parameter, entry.attributes))


def _is_wrapped_parameter(entry: TensorEntry) -> bool:
    return entry.is_parameter and entry.subclass is None


def _agree(known: str | None, dtype: str | None) -> bool:
    """Whether a storage of one type may also be named with the other; ``None`` is an untyped storage."""
    return (known or _UNTYPED_DTYPE) == (dtype or _UNTYPED_DTYPE)


def _storage_dtype(cls: Global) -> tuple[str | None, int]:
    """Declared dtype and element size of a storage class by its name."""
    if (cls.module, cls.name) in _UNTYPED:
        return None, 1
    row = BY_STORAGE_CLASS.get(cls.name)
    if row is not None and cls.module in ("torch", "torch.cuda", "torch.storage"):
        return row.name, row.itemsize
    raise UnsupportedError(f"a storage of class {cls.qualified:.80}, which is not torch's")


def is_int(node: object) -> TypeGuard[int]:
    """Whether it is a whole number; True and False are not."""
    return isinstance(node, int) and not isinstance(node, bool)


def _is_count(node: object) -> TypeGuard[int]:
    """A size: not negative, and small enough that no product with an item size means anything else."""
    return is_int(node) and 0 <= node < _HUGE


def shape_of(node: object) -> tuple[int, ...] | None:
    """A shape or stride: a tuple of ints, or a ``torch.Size`` call holding one; ``None``: it is neither."""
    if isinstance(node, Object) and node.class_name == "torch.Size" and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, (tuple, list)):
        return None
    for number in node:
        if number.__class__ is not int or not -_HUGE < number < _HUGE:
            return None
    return tuple(node)


def no_hooks(node: object) -> bool:
    """Whether the backward hooks are the empty mapping torch always saves."""
    return node is None or mapping_items(node) == []


def _metadata_bits(node: object) -> tuple[bool, bool] | None:
    """The conj and neg bits; ``None`` where the metadata says anything else."""
    if node is None:
        return False, False
    pairs = mapping_items(node)
    if pairs is None or any(key not in ("conj", "neg") or not isinstance(value, bool) for key, value in pairs):
        return None
    bits = dict(pairs)
    return bool(bits.get("conj")), bool(bits.get("neg"))
