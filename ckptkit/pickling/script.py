"""Storages and tensors as TorchScript pickles them, where its words are not those of ``torch.save``.

``torch/csrc/jit/serialization`` ``pickler.cpp`` and ``unpickler.cpp``:

- a storage is of class ``torch.NAMEStorage``, with the name of C++ for its elements (``c10/core/ScalarType.h``), also
  of types that Python saves untyped, with the dtype in the call
- a tensor on the device ``meta`` has a storage there, whose record is empty
- ``_rebuild_sparse_tensor(layout, size, requires_grad, indices, values, hooks)``, of CSR with both kinds of indices in
  place of ``indices``; the layout is a number (``c10/core/Layout.h``)

What Python has a call for becomes that call, so that all else knows it and a ``.pth`` may hold it.
"""

from __future__ import annotations

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import Global, Object, PersistentId
from ckptkit.pickling.machine import Constructor
from ckptkit.pickling.tensors import Locate, StorageTable, shape_of

__all__ = ["ScriptStorageTable"]

_STORAGES = {
    "UInt16Storage": "uint16", "UInt32Storage": "uint32", "UInt64Storage": "uint64",
    "ComplexHalfStorage": "complex32", "BComplex32Storage": "bcomplex32",
    "Float8_e4m3fnStorage": "float8_e4m3fn", "Float8_e5m2Storage": "float8_e5m2",
    "Float8_e4m3fnuzStorage": "float8_e4m3fnuz", "Float8_e5m2fnuzStorage": "float8_e5m2fnuz",
    "Float8_e8m0fnuStorage": "float8_e8m0fnu", "Float4_e2m1fn_x2Storage": "float4_e2m1fn_x2",
    "Bits8Storage": "bits8", "Bits16Storage": "bits16", "Bits1x8Storage": "bits1x8", "Bits2x4Storage": "bits2x4",
    "Bits4x2Storage": "bits4x2",
}  # fmt: skip
"""C++'s storages of the types that Python saves untyped."""

_LAYOUTS = {1: "sparse_coo", 2: "sparse_csr", 4: "sparse_csc", 5: "sparse_bsr", 6: "sparse_bsc"}
"""Numbers of layouts; 0 is a plain tensor's, and of 3 nothing is saved."""


class ScriptStorageTable(StorageTable):
    """The storages of a TorchScript file."""

    def __init__(self, locate: Locate, *, byteorder: str = "little", limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(locate, byteorder=byteorder, limits=limits)
        self._declared: dict[int, tuple[str | None, Storage]] = {}  # which keeps the ids taken

    def persistent_load(self, pid: object) -> object:
        """The `Storage` a persistent id names; the id itself, of one on ``meta``.

        Raises:
            CorruptError, UnsupportedError: as `StorageTable.persistent_load`.
        """
        if isinstance(pid, tuple) and len(pid) == 5 and pid[3] == "meta" and isinstance(pid[2], str):
            self._locate(pid[2], 0)
            return PersistentId(pid)
        return super().persistent_load(pid)

    def _named(self, cls: object, key: str, location: str, numel: int) -> Storage:
        storage = super()._named(cls, key, location, numel)
        name = _script_dtype(cls)
        if self._declared.setdefault(id(storage), (name, storage))[0] != name:
            raise CorruptError(f"storage {key!r} is named with two types of elements")
        return storage

    def _dtype(self, cls: object) -> tuple[str | None, int]:
        name = _script_dtype(cls)
        return super()._dtype(cls) if name is None else (None, DTYPES[name].itemsize)

    @property
    def constructors(self) -> dict[tuple[str, str], Constructor]:
        """The calls that are understood."""
        return {**super().constructors, ("torch._utils", "_rebuild_sparse_tensor"): _sparse}

    def _entry(
        self, args: tuple[object, ...], dtype: str | None = None, requires_grad: object = False, metadata: object = None
    ) -> object:
        storage = args[0]
        if isinstance(storage, PersistentId) and isinstance(storage.pid, tuple):
            cls = storage.pid[1]
            name = _script_dtype(cls) or self._dtype(cls)[0] or "uint8"
            function = Global("torch._utils", "_rebuild_meta_tensor_no_storage")
            return Object("reduce", function, (Global("torch", name), args[2], args[3], requires_grad))
        if dtype is None and isinstance(storage, Storage) and id(storage) in self._declared:
            dtype = self._declared[id(storage)][0]
        return super()._entry(args, dtype, requires_grad, metadata)


def _script_dtype(cls: object) -> str | None:
    """The dtype of a storage class that only C++ has; ``None``: it is another."""
    return _STORAGES.get(cls.name) if isinstance(cls, Global) and cls.module == "torch" else None


def _sparse(args: tuple[object, ...]) -> object:
    """The call as Python makes it; it does not say whether places stand twice, and neither does C++."""
    layout = _LAYOUTS.get(args[0]) if args and isinstance(args[0], int) else None
    size = shape_of(args[1]) if len(args) > 1 else None
    parts = args[3:-1]
    if layout is None or size is None or len(parts) != (2 if layout == "sparse_coo" else 3):
        return NotImplemented
    if not all(isinstance(part, TensorEntry) for part in parts):
        return NotImplemented
    named = Object("reduce", Global("torch.serialization", "_get_layout"), (f"torch.{layout}",))
    return Object("reduce", Global("torch._utils", "_rebuild_sparse_tensor"), (named, (*parts, size)))
