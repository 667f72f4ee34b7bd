"""torch's other pickle vocabularies, beside what `ckptkit.pickling.tensors` knows: before 1.6, and TorchScript's.

Before 1.6:

- A storage may be a view of another: ``('storage', class, root key, location, root's numel, (key,
  offset, numel))``, offset and size in elements (``torch/serialization.py`` ``_legacy_load``).  Today's
  torch writes none, and reads them.  A tensor over such a view becomes an entry over the
  root, so that what shares memory shares a `Storage`; a view that is kept for itself becomes a
  `Storage` over its part of the root's bytes.
- ``('module', class, file, source)``: a class of the model, at its first use, with the text of its
  source.  The text represents the class and is never compiled.
- Before 0.4 a parameter was no tensor but a Variable that held one (``torch/autograd/variable.py``
  ``__reduce_ex__`` and ``__setstate__``): ``Parameter(data)`` with the state ``(requires_grad,
  volatile, hooks)``; in the tar archives of 0.1 ``Parameter()`` with ``(data, grad, hooks, requires_grad,
  volatile)``.  0.4.0 writes ``Parameter(data, requires_grad)``.  A tensor that was not saved by
  ``torch.save`` is ``FloatTensor()`` with ``(storage, offset, size, stride)``.
- Before 0.4 a tensor of no dimensions had no elements.

A gradient that was saved along is kept as the attribute ``grad`` of its parameter, and is not a weight.

TorchScript's storages and tensors (``torch/csrc/jit/serialization``, ``pickler.cpp`` and ``unpickler.cpp``):

- a storage is of class ``torch.NAMEStorage``, with the name of C++ for its elements (``c10/core/ScalarType.h``), also
  of types that Python saves untyped, with the dtype in the call
- a tensor on the device ``meta`` has a storage there, whose record is empty
- ``_rebuild_sparse_tensor(layout, size, requires_grad, indices, values, hooks)``, of CSR with both kinds of indices in
  place of ``indices``; the layout is a number (``c10/core/Layout.h``)

What Python has a call for becomes that call, so that all else knows it and a ``.pth`` may hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import AmbiguousError, CorruptError
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import ABSENT, Global, InertDict, Object, PersistentId, TreeMap, mapping_items, walk
from ckptkit.pickling.machine import Constructor
from ckptkit.pickling.reader import PickleResult
from ckptkit.pickling.tensors import Locate, StorageTable, shape_of

__all__ = ["LegacyTable", "ScriptStorageTable", "writing_release"]

_VARIABLES = {
    ("torch.nn.parameter", "Parameter"): True,
    ("torch.autograd.variable", "Variable"): False,
}
"""Classes that wrapped a tensor, and whether they make it a parameter."""

_NEWOBJ = {("copy_reg", "__newobj__"), ("copyreg", "__newobj__")}
"""What protocol 0 and 1 call where protocol 2 has an opcode: ``__newobj__(class, *args)``."""


class LegacyTable(StorageTable):
    """The storages of a file before torch 1.6, whose places are known only after the pickle.

    Args:
        file: the source of the bytes.
        limits: bounds on tensor geometry.

    Attributes:
        sources: for each class that came with its source: the class, its file, the text.
    """

    def __init__(self, file: Source, limits: Limits) -> None:
        nowhere = ByteRange(file, 0, 0)
        super().__init__(lambda key, nbytes: (nowhere, None), limits=limits)
        self.sources: list[tuple[object, object, object]] = []
        self._views: dict[str, Storage] = {}
        self._parts: dict[str, list[Storage]] = {}  # key of a storage -> its views
        self._roots: dict[int, tuple[Storage, int]] = {}  # id of a view -> its storage, its first byte there

    @property
    def storages(self) -> dict[str, Storage]:
        """The storages by their keys, in order of first appearance; views are parts of them."""
        return self._storages

    def settle(self, key: str, source: ByteRange) -> None:
        """Set where the bytes of a storage and its views are: before anything but the reader sees them.

        Raises:
            KeyError: nothing named the key.
        """
        object.__setattr__(self._storages[key], "source", source)
        for view in self._parts.get(key, ()):
            object.__setattr__(view, "source", source.part(self._roots[id(view)][1], view.nbytes))

    # What persistent ids name.

    def persistent_load(self, pid: object) -> object:
        """The `Storage`, or the class, a persistent id names."""
        if isinstance(pid, tuple) and len(pid) == 4 and isinstance(pid[0], str) and pid[0] == "module":
            return self.module(pid[1:])
        return super().persistent_load(pid)

    def module(self, described: Sequence[object]) -> object:
        """The class of ``(class, file, source)``.

        Raises:
            CorruptError: file and source are not text.
        """
        cls, file, source = described
        if not all(text is None or isinstance(text, (str, bytes)) for text in (file, source)):
            raise CorruptError("a class's persistent id whose file or source is not text")
        if source:
            self.sources.append((cls, file, source))
        return cls

    def named(self, cls: object, key: str, location: str, numel: int) -> Storage:
        if key in self._views:
            raise AmbiguousError(f"storage {key!r:.80} is also named as a view of another storage")
        return super().named(cls, key, location, numel)

    def _view(self, root: Storage, view_metadata: object) -> Storage:
        if not isinstance(view_metadata, tuple) or len(view_metadata) != 3:
            raise CorruptError(f"a view of storage {root.key!r:.80} without key, offset and size")
        key, offset, numel = view_metadata
        if not isinstance(key, str) or offset.__class__ is not int or numel.__class__ is not int:
            raise CorruptError(f"a view of storage {root.key!r:.80} without key, offset and size")
        return self.view(root, key, offset, numel)

    def view(self, root: Storage, key: str, offset: int, numel: int) -> Storage:
        """The part of a storage with its own key.

        Args:
            root: the storage.
            key: of the view.
            offset: its first element.
            numel: its elements.

        Raises:
            CorruptError: it is not inside the storage.
            AmbiguousError: the key has another meaning already.
        """
        itemsize = self.itemsize(root)
        start, nbytes = offset * itemsize, numel * itemsize
        if offset < 0 or numel < 0 or start + nbytes > root.nbytes:
            raise CorruptError(
                f"view {key!r:.80} of elements {offset} to {offset + numel} is not inside storage {root.key!r:.80} "
                f"of {root.nbytes:,} bytes"
            )
        known = self._views.get(key)
        if key in self._storages or (known and (known.nbytes, *self._roots[id(known)]) != (nbytes, root, start)):
            raise AmbiguousError(f"view {key!r:.80} of storage {root.key!r:.80} is also named as something else")
        if known is None:
            settled = root.source.nbytes == root.nbytes  # otherwise `settle` sets the view's place, too
            source = root.source.part(start, nbytes) if settled else root.source
            known = self._views[key] = replace(root, key=key, nbytes=nbytes, source=source)
            self._parts.setdefault(root.key, []).append(known)
            self._roots[id(known)] = (root, start)
        return known

    @staticmethod
    def itemsize(storage: Storage) -> int:
        """Bytes of one element as the file counts them."""
        return 1 if storage.dtype is None else DTYPES[storage.dtype].itemsize

    def _entry(
        self, args: tuple[object, ...], dtype: str | None = None, requires_grad: object = False, metadata: object = None
    ) -> object:
        entry = super()._entry(args, dtype, requires_grad, metadata)
        if not isinstance(entry, TensorEntry) or id(entry.storage) not in self._roots:
            return entry
        root, start = self._roots[id(entry.storage)]
        if start % entry.itemsize:
            raise CorruptError(
                f"a tensor of {entry.dtype} over view {entry.storage.key!r:.80}, which begins inside an element"
            )
        return replace(entry, storage=root, storage_offset=entry.storage_offset + start // entry.itemsize)

    def tensor(self, storage: object, offset: object, shape: object, stride: object) -> object:
        """The entry of a tensor before 0.4, or ``NotImplemented`` if its storage is not one.

        Raises:
            CorruptError: its geometry does not fit its storage.
        """
        if isinstance(storage, Storage) and storage.nbytes == 0 and shape in ((), []):
            shape, stride = (0,), (1,)
        return self._entry((storage, offset, shape, stride))

    def _tensor_v1(self, args: tuple[object, ...]) -> object:
        return self.tensor(*args) if len(args) == 4 else NotImplemented

    # Values built in steps.

    def understood(self, pickle: PickleResult) -> object:
        """The tree of a pickle with the tensors of before 0.4, which BUILD completes, as entries too."""
        if not any(_is_old(name) for name in pickle.globals):
            return pickle.root
        nodes = [node for node in walk(pickle.root) if isinstance(node, Object)]
        found: dict[int, TensorEntry] = {}
        for node in nodes:
            entry = self._bare_tensor(node)
            if entry is not None:
                found[id(node)] = entry
        gradients: list[tuple[int, object]] = []
        for node in nodes:
            variable = _variable(node, found)
            if variable is not None:
                found[id(node)] = variable[0]
                if variable[1] is not None:
                    gradients.append((id(node), variable[1]))
        with_gradient = {place for place, _ in gradients}
        for place, gradient in gradients:
            grad = found.get(id(gradient)) if isinstance(gradient, Object) else gradient
            if isinstance(grad, TensorEntry) and id(gradient) not in with_gradient:
                found[place] = replace(found[place], attributes=InertDict([("grad", grad)]))
            else:  # a gradient that is not a tensor, or has one itself: none of it may get lost
                del found[place]
        replaced = [(node, found[id(node)]) for node in nodes if id(node) in found]
        return TreeMap(lambda leaf: leaf, replaced)(pickle.root) if replaced else pickle.root

    def _bare_tensor(self, node: Object) -> TensorEntry | None:
        state = node.state
        if not isinstance(node.cls, Global) or not _is_tensor_class(node.cls) or node.args:
            return None
        if not isinstance(state, tuple) or len(state) != 4 or node.items or node.pairs or node.effects:
            return None
        entry = self.tensor(*state)
        return entry if isinstance(entry, TensorEntry) else None


def _is_tensor_class(name: Global) -> bool:
    return name.module in ("torch", "torch.cuda") and name.name.endswith("Tensor")


def _is_old(name: Global) -> bool:
    return (name.module, name.name) in _VARIABLES or _is_tensor_class(name)


def _members(args: tuple[object, ...], state: object, is_parameter: bool) -> tuple[object, ...] | None:
    """The data, gradient, hooks and requires_grad of a Variable, by the release that wrote it."""
    if state is ABSENT and len(args) in (1, 2):
        return args[0], None, None, args[1] if len(args) == 2 else is_parameter
    if isinstance(state, tuple) and len(state) == 3 and len(args) == 1:
        return args[0], None, state[2], state[0]
    if isinstance(state, tuple) and len(state) == 5 and not args:
        return state[0], state[1], state[2], state[3]
    return None


def _variable(node: Object, found: dict[int, TensorEntry]) -> tuple[TensorEntry, object] | None:
    """A saved Variable's tensor and its gradient; ``None``: the node is not a Variable, or more than one."""
    cls, args = node.cls, node.args
    if isinstance(cls, Global) and (cls.module, cls.name) in _NEWOBJ and args:
        cls, args = args[0], args[1:]
    if not isinstance(cls, Global) or (cls.module, cls.name) not in _VARIABLES or node.items or node.pairs:
        return None
    is_parameter = _VARIABLES[cls.module, cls.name]
    members = _members(args, node.state, is_parameter)
    if members is None:
        return None
    held, grad, hooks, requires_grad = members
    data = found.get(id(held)) if isinstance(held, Object) else held
    if not isinstance(data, TensorEntry) or not isinstance(requires_grad, bool):
        return None
    if data.is_parameter or data.subclass is not None or data.attributes is not None or data.effects or node.effects:
        return None
    if hooks is not None and mapping_items(hooks) != []:
        return None
    return replace(data, is_parameter=is_parameter, requires_grad=requires_grad), grad


def writing_release(names: Sequence[Global]) -> str | None:
    """Which torch pickles these names in a file of the legacy format, as far as they show.

    Later releases write the format on request; only additions since then distinguish them.
    """
    called = {name.qualified for name in names if name.calls}
    classes = {name.name for name in names if name.module in ("torch", "torch.storage")}
    if "torch._utils._rebuild_tensor_v3" in called or "UntypedStorage" in classes:
        return "torch 2.0 or later, asked for the format used before 1.6"
    if "torch._utils._rebuild_tensor_v2" in called:
        return "torch 0.4 to 1.5, or a later version asked for that format"
    if "torch._utils._rebuild_tensor" in called or any(_is_old(name) for name in names):
        return "torch 0.1 to 0.3"
    return None


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

    def named(self, cls: object, key: str, location: str, numel: int) -> Storage:
        storage = super().named(cls, key, location, numel)
        name = _script_dtype(cls)
        if self._declared.setdefault(id(storage), (name, storage))[0] != name:
            raise CorruptError(f"storage {key!r} is named with two element types")
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
    """The call as Python makes it; it does not say whether places appear twice, and neither does C++."""
    layout = _LAYOUTS.get(args[0]) if args and isinstance(args[0], int) else None
    size = shape_of(args[1]) if len(args) > 1 else None
    parts = args[3:-1]
    if layout is None or size is None or len(parts) != (2 if layout == "sparse_coo" else 3):
        return NotImplemented
    if not all(isinstance(part, TensorEntry) for part in parts):
        return NotImplemented
    named = Object("reduce", Global("torch.serialization", "_get_layout"), (f"torch.{layout}",))
    return Object("reduce", Global("torch._utils", "_rebuild_sparse_tensor"), (named, (*parts, size)))
