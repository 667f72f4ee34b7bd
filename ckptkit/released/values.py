"""What in a file may be NaN beside the plain tensors of its weights, and what of it cannot be looked at."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry, as_tensor
from ckptkit.dtypes import DTYPES
from ckptkit.inspection.listing import list_tensors
from ckptkit.normalize.roles import tensor_role
from ckptkit.pickling.arrays import Array, array_of, is_array, is_scalar
from ckptkit.pickling.inert import Object, children, tensors_in, walk
from ckptkit.pickling.layouts import call_of

__all__ = ["Beside", "is_opaque", "values_beside"]

_PLAIN_MODULES = ("torch", "collections", "builtins", "__builtin__")
"""Of classes and functions whose objects hold no values beyond what stands in the tree, but for bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Values that are not a plain tensor of the weights.

    Attributes:
        name: section and place.
        entry: the tensor they are; ``None``: they are an array.
        array: the array.
        is_parameter: whether they belong to a parameter, which may not be infinite.
    """

    name: str
    entry: TensorEntry | None = None
    array: Array | None = None
    is_parameter: bool = False


def values_beside(checkpoint: Checkpoint, plain: set[int], others: Sequence[tuple[str, object]]) -> Iterator[Beside]:
    """Tensors of other sections and in attributes, parts of weights that are not plain tensors, numpy's arrays.

    Args:
        checkpoint: the file.
        plain: the plain tensors of the weights, by ``id``.
        others: the values of the weights that are not, by name.
    """
    known = set(plain)
    own: dict[int, bool] = {}
    for name, value in others:
        for node in tensors_in(value):
            if isinstance(node, TensorEntry):
                own[id(node)] = tensor_role(name, node, known=False)[0] == "parameter"
        floats = [part for node in walk([value]) for part in children(node) if isinstance(part, float)]
        if floats:  # scales of quantized tensors, extra state
            is_parameter = call_of(value).kind == "quantized"
            numbers = Array("float64", struct.pack(f"<{len(floats)}d", *floats))
            yield Beside(name=name, array=numbers, is_parameter=is_parameter)
    listing = list_tensors(checkpoint)
    selected = checkpoint.origin.state_path
    for row in listing.rows:
        if id(row.tensor) not in known:
            known.add(id(row.tensor))
            is_parameter = own.get(id(row.tensor), row.role == "parameter")
            yield Beside(name=row.path, entry=row.tensor, is_parameter=is_parameter)
    for found, array in listing.arrays:
        is_own = selected is None or found.section == selected
        if is_own or not is_scalar(array):  # a metric is a number like any other
            yield Beside(name=found.path, array=array_of(array), is_parameter=is_own)
    for storage in listing.bare:
        if storage.dtype is not None and DTYPES[storage.dtype].kind in ("float", "complex"):
            yield Beside(name=f"storage {storage.key}", entry=as_tensor(storage, typed=True))


def is_opaque(value: object) -> bool:
    """Whether a value of the weights is an object in which nothing is found that could be looked at."""
    if not isinstance(value, Object):
        return False
    nodes = list(walk(value))
    if any(isinstance(node, (TensorEntry, Storage)) or is_array(node) for node in nodes):
        return False
    if value.class_name.partition(".")[0] not in _PLAIN_MODULES:
        return True
    return any(isinstance(part, (bytes, bytearray)) and part for node in nodes for part in children(node))
