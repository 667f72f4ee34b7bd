"""torch's pickle vocabulary before 1.6, beside what `ckptkit.pickling.tensors` knows.

- A storage may be a view of another: ``('storage', class, root key, location, root's numel, (key,
  offset, numel))``, offset and size in elements (``torch/serialization.py`` ``_legacy_load``).  Today's
  torch writes none, and reads them.  A tensor over such a view becomes an entry over the
  root, so that what shares memory shares a `Storage`; a view that is kept for itself becomes a
  `Storage` over its part of the root's bytes.
- ``('module', class, file, source)``: a class of the model, at its first use, with the text of its
  source.  The text stands for the class and is never compiled.
- Before 0.4 a parameter was no tensor but a Variable that held one (``torch/autograd/variable.py``
  ``__reduce_ex__`` and ``__setstate__``): ``Parameter(data)`` with the state ``(requires_grad,
  volatile, hooks)``; in the tar archives of 0.1 ``Parameter()`` with ``(data, grad, hooks, requires_grad,
  volatile)``.  0.4.0 writes ``Parameter(data, requires_grad)``.  A tensor that was not saved by
  ``torch.save`` is ``FloatTensor()`` with ``(storage, offset, size, stride)``.
- Before 0.4 a tensor of no dimensions had no elements.

A gradient that was saved along is kept as the attribute ``grad`` of its parameter, and is no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import AmbiguousError, CorruptError
from ckptkit.limits import Limits
from ckptkit.pickling.inert import ABSENT, Global, InertDict, Object, TreeMap, mapping_items, walk
from ckptkit.pickling.reader import PickleResult
from ckptkit.pickling.tensors import StorageTable

__all__ = ["LegacyTable", "era"]

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
        file: what they lie in.
        limits: bounds on tensor geometry.

    Attributes:
        sources: of each class that came with its source: the class, the file it stood in, the text.
    """

    def __init__(self, file: SourceFile, limits: Limits) -> None:
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
        """Say where the bytes of a storage and its views lie: before anyone but the reader sees them.

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

    def _named(self, cls: object, key: str, location: str, numel: int) -> Storage:
        if key in self._views:
            raise AmbiguousError(f"storage {key!r:.80} is also named as a view of another")
        return super()._named(cls, key, location, numel)

    def _view(self, root: Storage, view_metadata: object) -> Storage:
        if not isinstance(view_metadata, tuple) or len(view_metadata) != 3:
            raise CorruptError(f"a view of storage {root.key!r:.80} without key, offset and size")
        key, offset, numel = view_metadata
        if not isinstance(key, str) or offset.__class__ is not int or numel.__class__ is not int:
            raise CorruptError(f"a view of storage {root.key!r:.80} without key, offset and size")
        return self.view(root, key, offset, numel)

    def view(self, root: Storage, key: str, offset: int, numel: int) -> Storage:
        """The part of a storage that has a key of its own.

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
            settled = root.source.nbytes == root.nbytes  # else `settle` says where the view lies, too
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
                f"a tensor of {entry.dtype} over view {entry.storage.key!r:.80}, which begins inside one"
            )
        return replace(entry, storage=root, storage_offset=entry.storage_offset + start // entry.itemsize)

    def tensor(self, storage: object, offset: object, shape: object, stride: object) -> object:
        """The entry of a tensor before 0.4, or ``NotImplemented`` where its storage is none.

        Raises:
            CorruptError: its geometry does not fit its storage.
        """
        if isinstance(storage, Storage) and storage.nbytes == 0 and shape in ((), []):
            shape, stride = (0,), (1,)
        return self._entry((storage, offset, shape, stride))

    def _tensor_v1(self, args: tuple[object, ...]) -> object:
        return self.tensor(*args) if len(args) == 4 else NotImplemented

    # What was built in steps.

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
            else:  # a gradient that is no tensor, or has one itself: nothing of it may get lost
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


def _variable(node: Object, found: dict[int, TensorEntry]) -> tuple[TensorEntry, object] | None:
    """The tensor a Variable held, as saved, and its gradient; ``None``: the node is no Variable, or more than one."""
    cls, args = node.cls, node.args
    if isinstance(cls, Global) and (cls.module, cls.name) in _NEWOBJ and args:
        cls, args = args[0], args[1:]
    if not isinstance(cls, Global) or (cls.module, cls.name) not in _VARIABLES or node.items or node.pairs:
        return None
    is_parameter = _VARIABLES[cls.module, cls.name]
    state, grad, hooks = node.state, None, None
    requires_grad: object = is_parameter
    if state is ABSENT and len(args) in (1, 2):
        requires_grad = args[1] if len(args) == 2 else requires_grad
    elif isinstance(state, tuple) and len(state) == 3 and len(args) == 1:
        requires_grad, _, hooks = state
    elif isinstance(state, tuple) and len(state) == 5 and not args:
        args = (state[0],)
        _, grad, hooks, requires_grad, _ = state
    else:
        return None
    data = found.get(id(args[0])) if isinstance(args[0], Object) else args[0]
    if not isinstance(data, TensorEntry) or not isinstance(requires_grad, bool):
        return None
    if data.is_parameter or data.subclass is not None or data.attributes is not None or data.effects or node.effects:
        return None
    if hooks is not None and mapping_items(hooks) != []:
        return None
    return replace(data, is_parameter=is_parameter, requires_grad=requires_grad), grad


def era(names: Sequence[Global]) -> str | None:
    """Which torch pickles these names in a file of the legacy format, as far as they tell.

    Later releases write the format when they are asked to; only what they added since tells them apart.
    """
    called = {name.qualified for name in names if name.calls}
    classes = {name.name for name in names if name.module in ("torch", "torch.storage")}
    if "torch._utils._rebuild_tensor_v3" in called or "UntypedStorage" in classes:
        return "torch 2.0 or later, asked for the format of before 1.6"
    if "torch._utils._rebuild_tensor_v2" in called:
        return "torch 0.4 to 1.5, or a later one that was asked for its format"
    if "torch._utils._rebuild_tensor" in called or any(_is_old(name) for name in names):
        return "torch 0.1 to 0.3"
    return None
