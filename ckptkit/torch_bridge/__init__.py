"""All values of a state_dict that torch's, numpy's and Python's own code can build, as ``torch.load`` returns them.

Plain tensors come from `loading`, the only other place that hands values to torch.
Tensors of every layout are built by the constructors that torch's ``_rebuild_*`` functions call, after
`ckptkit.pickling.layouts` and `ckptkit.transfer.values` have checked that the file's facts fit together; arrays and
plain values do not change.  No name in a file is looked up: everything that can be built is listed here.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, Storage, TensorEntry, as_tensor
from ckptkit.errors import CorruptError, DTypeError, RewriteError, SectionError, UnsupportedError
from ckptkit.extras import require_torch
from ckptkit.formats import collector_paused
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.made_plain import is_from_array
from ckptkit.normalize.sections import brief, join, step
from ckptkit.normalize.shapes import parts
from ckptkit.normalize.tensors import storage_names
from ckptkit.pickling.arrays import is_array, layout_of
from ckptkit.pickling.foreign import is_dunder, plain_value, stand_in
from ckptkit.pickling.inert import (
    ABSENT,
    SCALARS,
    Global,
    InertSet,
    Object,
    attributes,
    holds,
    mapping_items,
    named_items,
    tensors_in,
)
from ckptkit.pickling.layouts import (
    Jagged,
    Layout,
    Meta,
    Nested,
    OnDevice,
    Quantized,
    Rebuilt,
    Sparse,
    device_of,
    layout_name,
    rebuilt,
)
from ckptkit.pickling.tensors import shape_of
from ckptkit.report import count_of, glob_of, listed
from ckptkit.torch_bridge.devices import TorchLocation
from ckptkit.torch_bridge.loading import Loader, dtype_of, require_dtypes, tensors, typed
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.values import array_from, check_indices, values_of

require_torch()

import torch  # noqa: E402 - behind the check, so that its absence is explained

__all__ = ["TorchLocation", "dtype_of", "state_dict_of", "tensors", "tree_of"]

_MOST_DEPTH = 100
"""Containers inside one another that are made; a value that is deeper is not an honest one."""

_MANY_KEYS = 10_000
"""Keys of a dict from which it matters that they differ in their hashes."""

_LISTED = 8
"""Values in a message."""

_PLACE = 400
"""Characters of the keys that lead to a value in a message."""

_BUILTIN = ("builtins", "__builtin__")
_PLAIN = (list, int, dict, float, str, set, bool, tuple, frozenset, complex, bytes, bytearray)
_FACTORIES: dict[str, Callable[[], object]] = {
    **{f"{module}.{kind.__name__}": kind for module in _BUILTIN for kind in _PLAIN},
    **{f"{module}.{name}": kind for module in _BUILTIN for name, kind in (("long", int), ("unicode", str))},
    **{f"collections.{kind.__name__}": kind for kind in (OrderedDict, Counter, deque, defaultdict)},
}
"""Functions that a ``defaultdict`` may call; protocol 2 has Python 2's names."""

_LAZY = ("torch.nn.parameter.UninitializedParameter", "torch.nn.parameter.UninitializedBuffer")


class _ForeignError(Exception):
    """A value that only code from elsewhere, or another torch, can make; the text says what it is."""


def state_dict_of(
    state_dict: StateDict,
    path: str,
    *,
    map_location: TorchLocation = None,
    mapped: bool = False,
    checksums: bool = False,
) -> OrderedDict[str, Any]:
    """Every value of a state_dict, in its order, with the module versions that the file has as ``_metadata``.

    Args:
        state_dict: the names and values; the file they are in must still be open.
        path: the file, for messages.
        map_location: as `tensors` takes it.
        mapped: as for `tensors`, except that the width of an element is alignment enough, as for
            ``safetensors.torch.load_file``.
        checksums: as `tensors` takes it.

    Raises:
        UnsupportedError: values that cannot be made; the message names each.
        CorruptError: a tensor's indices, offsets, axes or sizes are outside what it consists of; else as `tensors`.
        RewriteError, DTypeError, FileAccessError: as `tensors`.
    """
    require_dtypes(state_dict)
    sums = Checksums()
    loader = Loader(map_location, alignment=1 if mapped else None, checksums=sums if checksums else None)
    builder = _Builder(loader, map_location)
    foreign: dict[str, str] = {}
    loader.expect(lambda: tensors_in([*state_dict.extra.values(), *state_dict.values()]))
    with collector_paused(), sums.held(lambda: storage_names(state_dict.everything)):
        others: dict[str, object] = {}
        for name, value in state_dict.extra.items():  # before the others are read: one that cannot be made ends it
            try:
                others[name] = builder(value)
            except _ForeignError as error:
                foreign[name] = str(error)
            except CorruptError as error:
                error.at(path=path)
                error.where = f"{name:.200}: {error.where}" if error.where else f"{name:.200}"
                raise
        if foreign:
            raise UnsupportedError(_refusal(foreign, len(state_dict.everything)), path=path, names=foreign)
        made: OrderedDict[str, Any] = OrderedDict()
        for name, value in state_dict.everything.items():
            made[name] = loader.tensor(value) if isinstance(value, TensorEntry) else others[name]
        versions = state_dict.versions or {}
        try:
            made._metadata = OrderedDict((key, builder(value)) for key, value in versions.items())  # type: ignore[attr-defined]
        except _ForeignError as error:
            raise UnsupportedError(f"the module versions (_metadata) contain {error}", path=path) from None
        loader.finish()
    return made


def tree_of(
    checkpoint: Checkpoint,
    *,
    section: str | None = None,
    map_location: TorchLocation = None,
    mapped: bool = False,
    checksums: bool = False,
) -> Any:
    """All that a file holds, or a part of it, with a `Foreign` for what only code from elsewhere can make.

    Args:
        checkpoint: the file, which must still be open.
        section: the keys that lead to the part, joined with dots; ``None``: all of it.
        map_location: as `tensors` takes it.
        mapped: as `state_dict_of` takes it.
        checksums: as `tensors` takes it.

    Raises:
        SectionError: nothing is there.
        UnsupportedError: it is nested too deep, or this torch does not make a value; the message says where.
        CorruptError: a value does not fit together; the same.
        RewriteError, DTypeError, FileAccessError: as `tensors`.
    """
    path, module = checkpoint.origin.path, checkpoint.module
    is_walked = module is not None and checkpoint.state_dict.container is None and not checkpoint.operations
    weights = module if is_walked and not checkpoint.origin.is_program else lower_state_dict(checkpoint.state_dict)
    root = STATE_DICT if checkpoint.origin.is_program else checkpoint.rest
    sums = Checksums()
    loader = Loader(map_location, alignment=1 if mapped else None, checksums=sums if checksums else None)
    builder = _Builder(loader, map_location, weights, stands_in=True)
    with collector_paused(), sums.held(lambda: storage_names(checkpoint)):
        if section:
            root = _part(root, weights, section, checkpoint)
        loader.expect(lambda: tensors_in((root, weights if holds(root, STATE_DICT) else None)))
        try:
            made = builder(root)
        except (_ForeignError, CorruptError, DTypeError, RecursionError) as error:
            place = ".".join(map(step, builder.steps))[:_PLACE] or "the file's own value"
            if isinstance(error, CorruptError):
                error.where = f"{place}: {error.where}" if error.where else place
                raise error.at(path=path) from None
            if isinstance(error, DTypeError):
                raise DTypeError(f"{path}: {place}: {error}", path=path, names=(place,)) from error
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise UnsupportedError(f"{place}: {reason}", path=path, names=(place,)) from error
        loader.finish()
    return made


def _part(root: object, weights: object, section: str, checkpoint: Checkpoint) -> object:
    """The node that keys lead to, which are joined with dots and may have some themselves."""
    stack, known = [("", root)], set[tuple[int, str]]()
    while stack:
        above, node = stack.pop()
        if above == section and above:
            return node
        node = weights if node is STATE_DICT else node
        if (id(node), above) not in known:
            known.add((id(node), above))
            below = ((join(above, key), value) for key, value in parts(node))
            stack += [(at, value) for at, value in below if section == at or section.startswith(f"{at}.")][::-1]
    path, names = checkpoint.origin.path, [each.path for each in checkpoint.sections]
    there = f"; sections: {listed([f'{name:.100}' for name in names], _LISTED)}" if names else ""
    raise SectionError(f"{path}: there is no section {section!r:.200}{there}", path=path, names=names)


def _refusal(foreign: Mapping[str, str], count: int) -> str:
    shown = listed([f"{name:.100} ({what:.200})" for name, what in foreign.items()], _LISTED)
    options = " ".join(f"--exclude {glob_of(name)}" for name in list(foreign)[:_LISTED] if len(name) < 200)
    return (
        f"{len(foreign)} of {count_of(count, 'value')} of the state_dict cannot be built, because ckptkit runs no code "
        f"but torch's own: {shown}; ckptkit convert leaves them out with {options}"
    )


class _Builder:
    """Makes values of nodes; what is one node in the file is one object.

    Args:
        loader: makes the tensors.
        map_location: where they go.
        weights: in the place of the marker `STATE_DICT`.
        stands_in: whether a placeholder replaces values that only other code can build.
    """

    def __init__(
        self, loader: Loader, map_location: TorchLocation, weights: object = None, *, stands_in: bool = False
    ) -> None:
        self._loader = loader
        self._weights = weights
        self._stands_in = stands_in
        self.steps: list[object] = []
        self._map_location = map_location
        self._made: dict[int, tuple[object, object]] = {}  # the node is kept so that its id stays taken
        self._depth = 0

    def __call__(self, node: object, step: object = None) -> Any:
        """The value of a node.

        Args:
            node: it.
            step: what leads to it; while it is made, and where that fails, it is the last of ``steps``.

        Raises:
            _ForeignError: only code from elsewhere can make it.
            CorruptError: it is a tensor that does not fit its parts.
        """
        if isinstance(node, (*SCALARS, bytearray)):
            return node
        if id(node) in self._made:
            return self._made[id(node)][1]
        self.steps += () if step is None else (step,)
        self._depth += 1
        try:
            if self._depth > _MOST_DEPTH:
                raise _ForeignError(f"nested more than {_MOST_DEPTH} levels deep")
            made = self._entry(node) if isinstance(node, TensorEntry) else self._make(node)
        finally:
            self._depth -= 1
        if step is not None:
            self.steps.pop()
        if id(node) in self._made:  # it was met again below itself
            return self._made[id(node)][1]
        return self._keep(node, made)

    def _keep(self, node: object, value: object) -> object:
        self._made[id(node)] = node, value
        return value

    def _entry(self, entry: TensorEntry) -> object:
        stands_in = self._stands_in and is_from_array(entry)
        made = self._keep(entry, entry.numpy() if stands_in else self._loader.tensor(entry))
        state = entry.attributes if self._stands_in else None
        self._attach(made, state[0] if isinstance(state, tuple) and state else state)
        return made

    def _attach(self, made: object, own: object) -> None:
        if hasattr(made, "__dict__"):
            vars(made).update({key: self(value, key) for key, value in named_items(own) if not is_dunder(key)})

    def _make(self, node: object) -> object:
        if node is STATE_DICT:
            return self(self._weights)
        if isinstance(node, list):
            made = self._keep(node, [])
            made.extend(map(self, node))  # type: ignore[attr-defined]
            return made
        if isinstance(node, tuple):
            return tuple(map(self, node))
        if isinstance(node, InertSet):
            return (frozenset if node.frozen else set)(self.keys(node.members))
        if isinstance(node, Storage):
            return self._storage(node)
        if isinstance(node, Global):
            return self._constant(node)
        pairs = mapping_items(node)
        if pairs is not None:
            return self._mapping(node, pairs)
        tensor = rebuilt(node)
        if tensor is not None:
            return self._tensor(tensor)
        if is_array(node) and (array := layout_of(node)).is_plain:
            return array_from(array)
        if isinstance(node, Object):
            return self._object(node)
        return self._foreign(node)

    def _foreign(self, node: object) -> object:
        if not self._stands_in:
            raise _ForeignError(brief(node))
        return stand_in(node, self, lambda made: self._keep(node, made))

    def _constant(self, node: Global) -> object:
        """A dtype, layout, quantization scheme or memory format that torch has."""
        found = vars(torch).get(node.name) if node.module == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout, torch.qscheme, torch.memory_format)):
            return found
        if not self._stands_in:
            raise _ForeignError(f"{node!r:.120}")
        return self._foreign(node)

    def _mapping(self, node: object, pairs: list[tuple[object, object]]) -> object:
        made: Any = {}
        if isinstance(node, Object):
            kind = node.class_name.rpartition(".")[2]
            factory = node.args[0] if kind == "defaultdict" and node.args else None
            name = factory.qualified if isinstance(factory, Global) else None
            if factory is not None and name not in _FACTORIES and not self._stands_in:
                raise _ForeignError(f"a defaultdict of {factory!r:.80}")
            empty = {"OrderedDict": OrderedDict, "Counter": Counter, "dict": dict}.get(kind)
            made = defaultdict(_FACTORIES.get(name or "")) if empty is None else empty()
        self._keep(node, made)
        for made_key, (key, value) in zip(self.keys([key for key, _ in pairs]), pairs, strict=True):
            made[made_key] = self(value, key)
        self._attach(made, None if isinstance(made, (defaultdict, Counter)) else attributes(node))
        return made

    def keys(self, nodes: Sequence[object]) -> list[Any]:
        """The keys of a dict, or the members of a set."""
        values = list(map(self, nodes))
        try:
            hashes = list(map(hash, values))
        except TypeError:
            kind = next(type(value).__name__ for value in values if getattr(value, "__hash__", None) is None)
            raise _ForeignError(f"a key of type {kind}") from None
        if len(hashes) > _MANY_KEYS and 2 * len(set(hashes)) < len(hashes):  # takes time by the square
            raise _ForeignError(f"{count_of(len(hashes), 'key')} made to collide")
        return values

    def _object(self, node: Object) -> object:
        name = node.class_name
        plain = not (node.items or node.pairs or node.kwargs)
        if layout_name(node) is not None:
            return self._constant(Global("torch", layout_name(node) or ""))
        if name == "torch.device" and (tag := device_of(node)) is not None:
            return _by_torch(lambda: torch.device(tag))
        if name == "torch.Size" and (shape := shape_of(node)) is not None:
            return torch.Size(shape)
        if name in _LAZY and plain and len(node.args) <= 1 and all(isinstance(arg, bool) for arg in node.args):
            return getattr(torch.nn.parameter, name.rpartition(".")[2])(*node.args)
        if name in ("_io.BytesIO", "io.BytesIO"):
            data = node.state[0] if isinstance(node.state, tuple) and node.state else (*node.args, b"")[0]
            if isinstance(data, (bytes, bytearray)):
                return io.BytesIO(data)
        made = plain_value(node, self)
        return self._foreign(node) if made is ABSENT else made

    def _storage(self, storage: Storage) -> object:
        """A bare storage, of the type that the file declares."""
        memory = self._loader.storage(as_tensor(storage, typed=True))
        return memory if storage.dtype is None else typed(memory, storage.dtype)

    # Tensors that are not plain ones.

    def _tensor(self, found: Rebuilt) -> object:
        # Storages are read before torch is called, so that a problem with the file is not reported as torch's refusal.
        check_indices(found.layout, self._numbers)
        with self._loader.at_once():
            made = self._laid_out(found.layout)
        if found.is_parameter:
            return _by_torch(lambda: torch.nn.Parameter(made.detach(), requires_grad=found.requires_grad))
        return made

    def _numbers(self, entry: TensorEntry) -> Any:
        """Whole numbers as an array; where all goes to the meta device, out of the file."""
        with self._loader.at_once():
            tensor = self._loader.tensor(entry).detach()
        return values_of(entry) if tensor.is_meta else tensor.cpu().numpy()

    def _laid_out(self, layout: Layout) -> Any:
        part = self._loader.tensor
        if isinstance(layout, Quantized):
            return self._quantized(layout)
        if isinstance(layout, Sparse):
            parts: list[Any] = [*map(part, layout.indices), part(layout.values), layout.size]
            options: dict[str, Any] = {"check_invariants": False}
            if layout.layout != "sparse_coo":
                options["layout"] = getattr(torch, layout.layout)
                return _by_torch(lambda: torch.sparse_compressed_tensor(*parts, **options))
            if layout.is_coalesced is not None:
                options["is_coalesced"] = layout.is_coalesced
            return _by_torch(lambda: torch.sparse_coo_tensor(*parts, **options))
        if isinstance(layout, Nested):
            rows = [part(entry).cpu() for entry in (layout.sizes, layout.strides, layout.offsets)]
            buffer = part(layout.buffer)
            return _by_torch(lambda: torch._nested_view_from_buffer(buffer, *rows))
        if isinstance(layout, Jagged):
            return self._jagged(layout)
        if isinstance(layout, Meta):
            dtype = dtype_of(layout.dtype)
            return _by_torch(
                lambda: torch.empty_strided(
                    layout.size, layout.stride, dtype=dtype, device="meta", requires_grad=layout.requires_grad
                )
            )
        return self._on_device(layout)

    def _quantized(self, layout: Quantized) -> Any:
        """A quantizer, made with a tensor without elements, over the file's numbers."""
        numbers, axis = layout.numbers, layout.axis
        memory, dtype = self._loader.storage(numbers), dtype_of(numbers.dtype)
        parts: list[Any] = [
            self._loader.tensor(found) if isinstance(found, TensorEntry) else found
            for found in (layout.scales, layout.zero_points)
        ]

        def make() -> torch.Tensor:
            if axis is None:
                made = torch._empty_affine_quantized(
                    [0], scale=parts[0], zero_point=parts[1], dtype=dtype, device=memory.device
                )
            else:
                kinds = (torch.float, torch.float) if "float" in layout.scheme else (torch.double, torch.long)
                scales, zero_points = (
                    part if isinstance(part, torch.Tensor) else torch.tensor(part, dtype=kind, device=memory.device)
                    for part, kind in zip(parts, kinds, strict=True)
                )
                made = torch._empty_per_channel_affine_quantized(
                    [n if at == axis else 0 for at, n in enumerate(numbers.shape)],
                    scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=memory.device,
                )  # fmt: skip
            made.set_(typed(memory, numbers.dtype), numbers.storage_offset, numbers.shape, numbers.stride)
            made.requires_grad = layout.requires_grad
            return made

        return _by_torch(make)

    def _jagged(self, layout: Jagged) -> Any:
        part = self._loader.tensor
        given: dict[str, Any] = {
            "values": part(layout.values),
            "offsets": part(layout.offsets),
            "lengths": None if layout.lengths is None else part(layout.lengths),
            "_ragged_idx": layout.ragged_idx,
            "requires_grad": layout.requires_grad,
        }

        def make() -> torch.Tensor:
            from torch.nested._internal.nested_tensor import NestedTensor

            return NestedTensor(given.pop("values"), given.pop("offsets"), **given)

        return _by_torch(make)

    def _on_device(self, layout: OnDevice) -> Any:
        where = self._map_location
        if isinstance(where, Mapping):
            where = where.get(layout.device, layout.device)
        elif where is None:
            where = layout.device
        elif not isinstance(where, (str, torch.device)):
            raise RewriteError(
                f"a tensor on {layout.device!r:.60} is saved without a storage there, so a function has no storage to "
                "receive; give map_location a location or a dict of locations"
            )
        data = self(layout.data)
        tensor = data if isinstance(data, torch.Tensor) else _by_torch(lambda: torch.from_numpy(data))
        try:
            return tensor.to(dtype=dtype_of(layout.dtype), device=str(where)).requires_grad_(layout.requires_grad)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise RewriteError(
                f"a tensor saved on {layout.device!r:.60} cannot be put on {str(where)!r:.60} on this machine "
                f'({reason:.200}); give map_location="cpu"'
            ) from error


def _by_torch(make: Callable[[], Any]) -> Any:
    """The result of a function of torch; what this torch lacks cannot be made."""
    try:
        return make()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise _ForeignError(f"torch {torch.__version__} cannot create it: {reason:.150}") from error
