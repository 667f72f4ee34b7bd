"""The tensors of a checkpoint, one row each: where it stands, what it is, what it is tied to.

A row has the fields of one element of the inspect document's ``tensors``; `TensorRow.to_dict` is that
element and `TensorRow.to_json` its text.  Files have 100,000 of them: a row is a tuple, and what
rows have in common they share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.checkpoint import WEIGHTS, Checkpoint, Storage, TensorEntry, as_tensor, contiguous_stride, shared_storages
from ckptkit.dtypes import DTYPES
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import Role, tensor_role
from ckptkit.normalize.sections import join
from ckptkit.normalize.tensors import FoundTensor, other_tensors, plain_tensors
from ckptkit.pickling.arrays import is_array, layout_of
from ckptkit.pickling.inert import Object

if TYPE_CHECKING:
    from ckptkit.inspection.document import StatsDocument, TensorDocument

__all__ = [
    "Listing", "TensorRow", "list_tensors", "natural_key", "ordered", "other_rows", "rows_of", "wanted",
]  # fmt: skip


class TensorRow(NamedTuple):
    """One tensor, under one name; the fields are those of the inspect document.

    Attributes:
        entry: the tensor; ``None``: it is an array of numpy's, or another value that is no plain tensor.
        form: ``"storage"``, ``"numpy"`` or a kind of `ckptkit.normalize.not_plain`: it stands in the file as that;
            ``None``: as a tensor.
        value: what such a value is, in words; what it is made of has rows of its own, whose names begin with its name.
    """

    section: str | None
    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int
    location: str
    storage: str
    role: Role
    role_inferred: bool
    tied_to: str | None
    entry: TensorEntry | None
    form: str | None = None
    value: str | None = None
    stats: StatsDocument | None = None

    @property
    def tensor(self) -> TensorEntry:
        """The tensor of a row of `Listing.rows`."""
        return self.entry  # type: ignore[return-value]  # arrays are not among these

    @property
    def path(self) -> str:
        """Section and name."""
        return join(self.section, self.name) if self.section and self.name != self.section else self.name

    @property
    def numel(self) -> int:
        """Number of elements."""
        return max(math.prod(self.shape), 0)  # sizes that differ are -1

    def to_dict(self) -> TensorDocument:
        """The row as an element of the document's ``tensors``."""
        document: TensorDocument = {
            "section": self.section,
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "nbytes": self.nbytes,
            "location": self.location,
            "storage": self.storage,
            "role": self.role,
            "role_inferred": self.role_inferred,
            "tied_to": self.tied_to,
        }
        if self.form is not None:
            document["form"] = self.form
        if self.value is not None:
            document["value"] = self.value
        if self.stats is not None:
            document["stats"] = self.stats
        return document

    def to_json(self) -> str:
        """The JSON text of `to_dict`, several times faster than through it."""
        (
            section,
            name,
            dtype,
            shape,
            stride,
            nbytes,
            location,
            storage,
            role,
            inferred,
            tied_to,
            _,
            form,
            value,
            stats,
        ) = self
        text = (
            f'{{"section": {_nullable(section)}, "name": {quoted(name)}, "dtype": "{dtype}", "shape": {[*shape]}, '
            f'"stride": {[*stride]}, "nbytes": {nbytes}, "location": {quoted(location)}, "storage": {quoted(storage)}, '
            f'"role": "{role}", "role_inferred": {"true" if inferred else "false"}, '
            f'"tied_to": {_nullable(tied_to)}'
        )
        if form is not None:
            text += f', "form": "{form}"'
        if value is not None:
            text += f', "value": {quoted(value)}'
        if stats is None:
            return text + "}"
        import json

        return f'{text}, "stats": {json.dumps(stats)}}}'


def rows_of(tensors: list[TensorRow] | list[TensorDocument]) -> list[TensorRow]:
    """The rows that the elements of a document's ``tensors`` stand for; rows are given back as they are."""
    rows: list[Any] = [*tensors]
    if not rows or isinstance(rows[0], TensorRow):
        return rows
    return [
        TensorRow(**{**each, "shape": (*each["shape"],), "stride": (*each["stride"],), "entry": None}) for each in rows
    ]


def _nullable(text: str | None) -> str:
    return "null" if text is None else quoted(text)


class Listing(NamedTuple):
    """Every tensor of a file under every name it has, the state_dict's first, and what it is stored in.

    Attributes:
        rows: the tensors, in file order.
        others: storages that stand in the file by themselves, numpy's arrays, and what is made of tensors.
        several: storages that several of the tensors view, by ``id``.
        partial: the tensors that are not all of their storage, or repeat its elements.
    """

    rows: list[TensorRow]
    others: list[FoundTensor]
    several: set[int]
    partial: list[TensorEntry]

    @property
    def bare(self) -> list[Storage]:
        """The storages that stand in the file by themselves, each once."""
        return [found.node for found in self.others if isinstance(found.node, Storage)]

    @property
    def arrays(self) -> list[tuple[FoundTensor, Object]]:
        """Numpy's arrays; see `ckptkit.pickling.arrays`."""
        return [(found, found.node) for found in self.others if is_array(found.node)]


def list_tensors(checkpoint: Checkpoint, beside: Sequence[FoundTensor] | None = None) -> Listing:
    """Every tensor of a checkpoint, and every bare storage.

    Args:
        checkpoint: as it was read.
        beside: what `every_tensor` finds but for the plain tensors of the state_dict, where it is known.

    Raises:
        LimitError: the names are more, or all together longer, than those of any checkpoint.
    """
    named: list[_Named] = plain_tensors(checkpoint)  # type: ignore[assignment]  # of tensors alone
    others: list[FoundTensor] = []
    for found in other_tensors(checkpoint) if beside is None else beside:
        (named if isinstance(found.node, TensorEntry) else others).append(found)  # type: ignore[arg-type]
    if len(named) + len(others) > DEFAULT_LIMITS.entries:  # one tensor may stand in a list a million times
        raise LimitError("names of tensors", limit=DEFAULT_LIMITS.entries, actual=len(named) + len(others))
    characters = sum([len(name) + len(section) if section else len(name) for section, name, _, _ in named])
    if characters > DEFAULT_LIMITS.name_characters:  # one long key may stand above thousands of tensors
        raise LimitError("characters of names", limit=DEFAULT_LIMITS.name_characters, actual=characters)
    several = shared_storages([found[2] for found in named])
    tied_to = _ties(named, several)
    kinds: dict[str | None, str] = {section.path: section.kind for section in checkpoint.sections}
    selected = checkpoint.origin.state_path
    rows: list[TensorRow] = []
    partial: list[TensorEntry] = []
    make, row_class = tuple.__new__, TensorRow
    geometries: dict[tuple[int, int, str], tuple[int, bool]] = {}  # readers give those alike the same tuples
    before: object = None
    has_roles = known = False
    for section, name, entry, is_own in named:
        role: Role = "unknown"
        inferred = False
        if section is not before or not rows:  # most stand in the one before them
            before = section
            is_selected = section is not None and section == selected
            known = checkpoint.module is not None if is_selected else kinds.get(section) == "whole_model"
            has_roles = is_selected or kinds.get(section) in WEIGHTS
        shape, stride, dtype, storage = entry.shape, entry.stride, entry.dtype, entry.storage
        geometry = geometries.get((id(shape), id(stride), dtype))
        if geometry is None:
            row = DTYPES[dtype]
            nbytes = math.prod(shape) * (row.bits or 8 * row.itemsize) // 8
            geometry = geometries[id(shape), id(stride), dtype] = nbytes, 0 in stride
        nbytes, repeats = geometry
        if repeats or nbytes != storage.nbytes:
            partial.append(entry)
        if has_roles and is_own:
            role, inferred = tensor_role(name, entry, known=known)
        rows.append(
            make(
                row_class,
                (section, name, dtype, shape, stride, nbytes, storage.location,
                 storage.key, role, inferred, tied_to.get(len(rows)) if tied_to else None, entry, None, None, None),
            )
        )  # fmt: skip
    return Listing(rows, others, several, partial)


def other_rows(listing: Listing) -> Iterator[TensorRow]:
    """The rows of storages that stand by themselves, of values made of tensors, and of numpy's arrays.

    An array that is but a number has none.
    """
    told: set[tuple[str | None, str]] = set()  # a parameter, the value in it and its storage have one name
    from ckptkit.normalize.not_plain import Value, describe_value

    known: dict[int, Value | None] = {}
    for section, name, node, _ in listing.others:
        if isinstance(node, Storage):
            if (section, name) in told:  # the value's own
                continue
            entry = as_tensor(node, typed=True)
            yield TensorRow(
                section, name, entry.dtype, entry.shape, entry.stride, node.nbytes, node.location, node.key, "unknown",
                False, None, entry, "storage",
            )  # fmt: skip
        elif not is_array(node):
            value = known[id(node)] = known.get(id(node)) or describe_value(node)
            if value is not None and (section, name) not in told:
                told.add((section, name))
                storage = next((part.key for _, part in value.parts if isinstance(part, Storage)), "")
                yield TensorRow(
                    section, name, value.dtype, value.shape, (), value.nbytes, value.location, storage, "unknown",
                    False, None, None, value.kind, value.text,
                )  # fmt: skip
        else:
            array = layout_of(node)
            if array.dtype is not None and array.shape is not None:
                way = -1 if array.is_fortran else 1
                stride = contiguous_stride(array.shape[::way])[::way]
                nbytes = math.prod(array.shape) * DTYPES[array.dtype].itemsize
                yield TensorRow(
                    section, name, array.dtype, array.shape, stride, nbytes, "cpu", "", "unknown", False, None, None,
                    "numpy",
                )  # fmt: skip


_Named = tuple[str | None, str, TensorEntry, bool]
"""What `FoundTensor` is of a tensor."""


def _ties(named: list[_Named], several: set[int]) -> dict[int, str]:
    """For each tensor that stands elsewhere already, by its index: the name it is tied to."""
    if not several:
        return {}
    first: dict[tuple[object, ...], int] = {}
    tied: dict[int, str] = {}
    for index, (section, _, entry, _) in enumerate(named):
        if id(entry.storage) in several and entry.nbytes:
            kept = first.setdefault(entry.view, index)
            if kept != index:
                kept_section, kept_name = named[kept][:2]
                inside = kept_section == section or not kept_section
                tied[index] = kept_name if inside else f"{kept_section}.{kept_name}"
    return tied


def wanted(name: str, filters: Sequence[str]) -> bool:
    """Whether a name matches one of the glob patterns; all do where there are none."""
    from fnmatch import fnmatchcase

    return not filters or any(fnmatchcase(name, pattern) for pattern in filters)


def ordered(rows: list[TensorRow], sort: str) -> list[TensorRow]:
    """The rows in file order (``"file"``), natural order of names (``"name"``) or largest first (``"size"``)."""
    if sort == "name":
        return sorted(rows, key=lambda row: (row.section or "", natural_key(row.name)))
    if sort == "size":
        return sorted(rows, key=lambda row: -row.nbytes)
    return rows


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``layer10`` after ``layer2``."""
    import re

    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # Only these digits: there are characters that are digits and no numbers.
    return [(0, int(part)) if "0" <= part[0] <= "9" and len(part) < 19 else (1, part) for part in parts]
