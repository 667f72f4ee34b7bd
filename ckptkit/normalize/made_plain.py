"""Values that contain a tensor's bytes and say so in another way become plain tensors; nothing is computed.

- numpy's arrays (`ckptkit.pickling.arrays`), if a file has no torch tensor: the values of a mapping, if at least half
  of them are arrays and the others are plain values or mappings.  detectron2 and caffe2 save ``{"model": {name:
  array}}`` and ``{"blobs": {name: array}}``, flax dicts in dicts.  An array of structured, text or object type, of a
  subclass or masked is not included, nor is a scalar.
- tensors of devices that torch pickles as an array or as a copy in main memory (XLA;
  ``torch._utils._rebuild_device_tensor_from_numpy`` and ``_from_cpu_tensor``), of which an array of another dtype is
  cast: numpy has no bfloat16.

An array's bytes are in the file (`ckptkit.pickling.arrays.LocatedBytes`), or were read from its pickle and stay in
memory.  In Fortran's order its first dimension has the stride 1; big-endian ones stay so (`Storage.byteorder`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.computed import ConvertedRange, DTypeConversion, Held
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError
from ckptkit.normalize.sections import is_plain_value
from ckptkit.pickling.arrays import LocatedBytes, bytes_reversed, is_array, is_numpy_scalar, layout_of
from ckptkit.pickling.inert import SCALARS, InertDict, Object, TreeMap, mapping_items, states, walk
from ckptkit.pickling.layouts import OnDevice, call_of, rebuilt
from ckptkit.report import Finding, convert_command, count_of, listed
from ckptkit.tensor import contiguous_stride, storage_of

__all__ = ["array_entry", "arrays_made_plain", "devices_made_plain", "is_from_array"]

_KEY = "array "
"""How the keys of storages begin that are an array's."""


def array_entry(node: Object, path: str, key: str, *, native: bool = False) -> TensorEntry | None:
    """The tensor that an array of numpy is; ``None``: torch has none like it.

    Args:
        node: see `ckptkit.pickling.arrays.is_array`.
        path: of the file that it is in.
        key: of its storage.
        native: whether the bytes of a big-endian one that is in memory are reversed, as a .pth beside others needs it.

    Raises:
        CorruptError: its bytes are not as many as its shape takes.
    """
    layout = layout_of(node)
    name, shape, data = layout.dtype, layout.shape, layout.data
    if not layout.is_plain or name is None or shape is None or data is None:
        return None
    held = data.source.nbytes if isinstance(data, LocatedBytes) else len(data)
    if held != DTYPES[name].nbytes(math.prod(shape)):
        sizes = ", ".join(map(str, shape))
        raise CorruptError(f"a numpy array [{sizes:.80}] of {name} with {count_of(held, 'byte')}: damaged")
    swapped = layout.swapped
    if isinstance(data, LocatedBytes):
        source = data.source
    else:
        swapped = swapped and not native
        source = Held(bytes_reversed(bytes(data), name) if layout.swapped and native else data, path).whole
    stride = contiguous_stride(shape)
    if layout.is_fortran:
        stride = contiguous_stride(shape[::-1])[::-1]
    storage = storage_of(
        key,
        name if DTYPES[name].storage_class else None,
        held,
        "cpu",
        source,
        None,
        "big" if swapped else "little",
    )
    return TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=stride, dtype=name).check()


def _tensor_like(node: object) -> bool:
    return is_array(node) and not is_numpy_scalar(node)


def _wanted(root: object, *, everything: bool) -> list[Object]:
    """The arrays that become tensors, in file order."""
    states_of: set[int] = set()
    mappings, others = [], []
    for node in walk(root):
        if isinstance(node, Object):
            states_of.update(id(part) for part in states(node) if isinstance(part, InertDict))
        if isinstance(node, Object) and _tensor_like(node):
            others.append(node)
        elif mapping_items(node):
            mappings.append(node)
    if everything:
        return others
    found: dict[int, Object] = {}
    for node in mappings:
        values = [value for _, value in mapping_items(node) or () if mapping_items(value) is None]
        arrays = [value for value in values if isinstance(value, Object) and _tensor_like(value)]
        plain = sum(isinstance(value, SCALARS) or is_numpy_scalar(value) for value in values)
        if id(node) not in states_of and len(arrays) + plain == len(values) and len(arrays) >= plain:
            found.update((id(value), value) for value in arrays)
    return [*found.values()]


def arrays_made_plain(root: object, path: str, *, everything: bool = False) -> tuple[object, list[Finding]]:
    """The tree with its arrays as tensors, and the findings; a tree without arrays is returned as it is.

    Args:
        root: the tree, without a torch tensor.
        path: of the file that it is in.
        everything: whether all arrays become tensors.

    Raises:
        CorruptError: an array that would be one has the wrong number of bytes.
    """
    made: list[tuple[object, object]] = []
    kept: list[str] = []
    for node in _wanted(root, everything=everything):
        entry = array_entry(node, path, f"{_KEY}{len(made)}")
        if entry is None:
            layout = layout_of(node)
            kept.append(layout.subclass or layout.code or "structured")
        else:
            made.append((node, entry))
    if not made:
        return root, []
    message = f"{count_of(len(made), 'numpy array')} {'is' if len(made) == 1 else 'are'} read as tensors"
    if kept:
        message += f"; {count_of(len(kept), 'other')} with a type that torch lacks stay as they are ({listed(kept, 3)})"
    finding = Finding(
        code="arrays-as-tensors", severity="info", message=message, fix=convert_command(path, suffix=".pth")
    )
    return TreeMap(lambda leaf: leaf, made)(root), [finding]


def is_from_array(entry: TensorEntry) -> bool:
    """Whether a tensor of a file that was read is an array there."""
    return entry.storage.key.startswith(_KEY)


def devices_made_plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors of devices among its weights as plain ones; those that do not fit stay what they are.

    Raises:
        DTypeError: one would have to be cast to a dtype that nothing can be cast to.
    """
    made = _OfDevices(checkpoint.origin.path)
    state_dict = checkpoint.state_dict
    return checkpoint if state_dict.is_plain else checkpoint.replace(state_dict=state_dict.with_values(made))


class _OfDevices:
    """Makes plain tensors from calls, each once; shared memory stays shared."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._values: dict[int, object] = {}
        self._arrays: dict[int, TensorEntry | None] = {}
        self._storages: dict[tuple[int, str, str], Storage] = {}

    def __call__(self, value: object) -> object:
        if not isinstance(value, Object):
            return value
        if id(value) not in self._values:
            self._values[id(value)] = self._made(value) or value
        return self._values[id(value)]

    def _made(self, node: Object) -> TensorEntry | None:
        call = call_of(node)
        if call.kind != "device" or call.cls:
            return None
        try:
            found = rebuilt(node)
            layout = found.layout if found is not None else None
            entry = self._data(layout.data) if isinstance(layout, OnDevice) else None
        except CorruptError:
            return None
        if found is None or not isinstance(layout, OnDevice) or entry is None or entry.is_conj or entry.is_neg:
            return None
        old, key = entry.storage, (id(entry.storage), layout.dtype, layout.device)
        if key not in self._storages:
            self._storages[key] = _cast(replace(old, location=layout.device), entry.dtype, layout.dtype)
        storage, own = self._storages[key], found.requires_grad
        return replace(entry, storage=storage, dtype=layout.dtype, requires_grad=own, is_parameter=found.is_parameter)

    def _data(self, node: object) -> TensorEntry | None:
        if not is_array(node):
            return node if isinstance(node, TensorEntry) and is_plain_value(node) else None
        if id(node) not in self._arrays:
            self._arrays[id(node)] = array_entry(node, self._path, f"{_KEY}{len(self._arrays)}")
        return self._arrays[id(node)]


def _cast(storage: Storage, old: str, new: str) -> Storage:
    """The storage with values of the tensor's dtype: numpy lacks some, and wider ones are pickled."""
    before, after = DTYPES[old], DTYPES[new]
    if before.name == after.name:
        return storage
    from ckptkit.casting import caster

    function = caster(before.name, after.name, byteorder=storage.byteorder)
    made = DTypeConversion(
        storage.source, before.itemsize, after.itemsize, function, f"storage {storage.key!r}", before.name
    )
    return replace(
        storage, dtype=after.name if after.storage_class else None, nbytes=made.nbytes, crc32=None, byteorder="little",
        source=ConvertedRange(made, 0, made.nbytes),
    )  # fmt: skip
