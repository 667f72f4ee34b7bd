"""The tensors of a checkpoint, one row each: where it is, what it is, what it is tied to.

A row has the fields of one element of the inspect document's ``tensors``; `TensorRow.to_dict` is that
element and `TensorRow.to_json` its text.  Files have 100,000 of them, of few kinds: `Rows` describes the tensors of a
file from one row of each kind, and makes the others on request.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from ckptkit.checkpoint import WEIGHTS, Checkpoint, Storage, TensorEntry, as_tensor, contiguous_stride, shared_storages
from ckptkit.dtypes import DTYPES
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import BUFFER_NAMES, Role, role_of
from ckptkit.normalize.sections import is_plain_value, join
from ckptkit.normalize.tensors import FoundTensor, other_tensors
from ckptkit.pickling.arrays import is_array, layout_of
from ckptkit.pickling.inert import Object
from ckptkit.startup import pattern

if TYPE_CHECKING:
    from ckptkit.inspection.document import EveryTensorDocument, FileFacts, StatsDocument, TensorDocument

    class Survey(FileFacts):
        """An `InspectedFile` whose tensors are rows."""

        tensors: Sequence[TensorRow]


__all__ = [
    "Listing", "Rows", "TensorRow", "each_kind", "every_tensor", "list_tensors", "natural_key", "ordered", "other_rows",
    "rows_of", "wanted", "where",
]  # fmt: skip


class TensorRow(NamedTuple):
    """One tensor, under one name; the fields are those of the inspect document.

    Attributes:
        entry: the tensor; ``None``: it is a numpy array, or another value that is not a plain tensor.
        form: ``"storage"``, ``"numpy"`` or a kind of `ckptkit.normalize.not_plain`: it is in the file as that;
            ``None``: as a tensor.
        value: what such a value is, in words; its parts have their own rows, whose names begin with its name.
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


_JSON_GAPS = pattern(r'(?<="name": )""|(?<="storage": )""')
"""Where the JSON text of a kind's row has no name and no storage; in strings quotes have a backslash before them."""


class Rows(Sequence[TensorRow]):
    """The rows of a file's tensors, made when they are asked for.

    Attributes:
        sections, names, entries: where each tensor is, and the tensor.
        kinds: a row of each kind: for tensors that differ only in name, storage and ties.  The
            same fields for some rows as for all.
        kind_of: the kind of each tensor, by its place in ``kinds``.
        tied_to: the name that a tensor is tied to, by its place in ``names``.
    """

    __slots__ = ("_made", "entries", "kind_of", "kinds", "names", "sections", "tied_to")

    def __init__(
        self,
        sections: Sequence[str | None],
        names: Sequence[str],
        entries: Sequence[TensorEntry],
        kinds: Sequence[TensorRow],
        kind_of: Sequence[int],
        tied_to: dict[int, str],
    ) -> None:
        self.sections, self.names, self.entries = sections, names, entries
        self.kinds, self.kind_of, self.tied_to = kinds, kind_of, tied_to
        self._made: list[TensorRow] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[TensorRow]:
        if self._made is None:
            self._made = self._rows(slice(None))
        return iter(self._made)

    @overload
    def __getitem__(self, index: int) -> TensorRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TensorRow]: ...
    def __getitem__(self, index: int | slice) -> TensorRow | list[TensorRow]:
        if self._made is not None:
            return self._made[index]
        if isinstance(index, slice):
            return self._rows(index)
        at = range(len(self))[index]
        return self._rows(slice(at, at + 1))[0]

    def _rows(self, part: slice) -> list[TensorRow]:
        make, row_class, kinds, tied_to = tuple.__new__, TensorRow, self.kinds, self.tied_to
        chosen = range(len(self))[part]
        columns = self.sections[part], self.names[part], self.entries[part], self.kind_of[part], chosen
        return [
            make(
                row_class,
                (section, name, kind[2], entry.shape, entry.stride, kind[5], kind[6], entry.storage.key, kind[8],
                 kind[9], tied_to.get(at) if tied_to else None, entry, None, None, None),
            )
            for section, name, entry, number, at in zip(*columns, strict=True)
            for kind in (kinds[number],)
        ]  # fmt: skip

    def to_json(self, part: slice) -> list[str]:
        """The JSON text of some rows: of each kind made once, and but name and storage filled in."""
        columns = self.names[part], self.entries[part], self.kind_of[part]
        texts = {number: _JSON_GAPS.split(self.kinds[number].to_json()) for number in set(columns[2])}
        made = [
            f"{head}{quoted(name)}{middle}{quoted(entry.storage.key)}{tail}"
            for name, entry, number in zip(*columns, strict=True)
            for head, middle, tail in (texts[number],)
        ]
        for at, index in enumerate(range(len(self))[part]) if self.tied_to else ():
            if index in self.tied_to:
                made[at] = self[index].to_json()
        return made

    def counts(self) -> list[tuple[TensorRow, int]]:
        """The kinds with the number of tensors of each."""
        counts = Counter(self.kind_of)
        return [(kind, counts[number]) for number, kind in enumerate(self.kinds)]

    def where(self, test: Callable[[TensorRow], bool]) -> Rows:
        """The rows of the kinds that pass a test."""
        passed = list(map(test, self.kinds))
        if all(passed):
            return self
        chosen = [passed[number] for number in self.kind_of]
        places = compress(range(len(self)), chosen) if self.tied_to else ()
        tied_to = {at: self.tied_to[before] for at, before in enumerate(places) if before in self.tied_to}
        return Rows(
            list(compress(self.sections, chosen)),
            list(compress(self.names, chosen)),
            list(compress(self.entries, chosen)),
            self.kinds,
            list(compress(self.kind_of, chosen)),
            tied_to,
        )


def every_tensor(rows: Sequence[TensorRow], weights: str | None) -> EveryTensorDocument:
    """What is to be said of a file's tensors, whichever of them are listed.

    Args:
        rows: all of them.
        weights: the section of the selected weights, if any.
    """
    sizes: Counter[str] = Counter()
    inferred = False
    for row, count in rows.counts() if isinstance(rows, Rows) else [(row, 1) for row in rows]:
        if weights is None or row.section == weights:
            sizes[row.dtype] += row.nbytes * count
            inferred = inferred or row.role_inferred
    return {
        "tensors": len(rows),
        "locations": sorted({row.location for row in each_kind(rows) if row.location}),
        "dtypes": [dtype for dtype, _ in sizes.most_common()],
        "roles_inferred": inferred,
    }


def each_kind(rows: Sequence[TensorRow]) -> Sequence[TensorRow]:
    """Rows among which are all that differ in more than name, storage and what they are tied to."""
    return rows.kinds if isinstance(rows, Rows) else rows


def where(rows: Sequence[TensorRow], test: Callable[[TensorRow], bool]) -> Sequence[TensorRow]:
    """The rows that pass a test on the properties that `each_kind` distinguishes."""
    return rows.where(test) if isinstance(rows, Rows) else list(filter(test, rows))


def rows_of(tensors: Sequence[TensorRow] | list[TensorDocument]) -> Sequence[TensorRow]:
    """The rows for the elements of a document's ``tensors``; rows are returned unchanged."""
    if isinstance(tensors, Rows):
        return tensors
    rows: list[Any] = [*tensors]
    if not rows or isinstance(rows[0], TensorRow):
        return rows
    return [
        TensorRow(**{**each, "shape": (*each["shape"],), "stride": (*each["stride"],), "entry": None}) for each in rows
    ]


def _nullable(text: str | None) -> str:
    return "null" if text is None else quoted(text)


class Listing(NamedTuple):
    """Every tensor of a file under every name it has, the state_dict's first, and the storage it is in.

    Attributes:
        rows: the tensors, in file order.
        others: separate storages, numpy's arrays, and values made from tensors.
        several: storages that several of the tensors view, by ``id``.
        partial: the tensors that are not all of their storage, or repeat its elements.
    """

    rows: Rows
    others: list[FoundTensor]
    several: set[int]
    partial: list[TensorEntry]

    @property
    def bare(self) -> list[Storage]:
        """The storages that are in the file by themselves, each once."""
        return [found.node for found in self.others if isinstance(found.node, Storage)]

    @property
    def arrays(self) -> list[tuple[FoundTensor, Object]]:
        """Numpy's arrays; see `ckptkit.pickling.arrays`."""
        return [(found, found.node) for found in self.others if is_array(found.node)]


def list_tensors(checkpoint: Checkpoint, beside: Sequence[FoundTensor] | None = None) -> Listing:
    """Every tensor of a checkpoint, and every bare storage.

    Args:
        checkpoint: as it was read.
        beside: the result of `every_tensor` without the plain tensors of the state_dict, if known.

    Raises:
        LimitError: the names are more, or all together longer, than those of any checkpoint.
    """
    state_dict = checkpoint.state_dict
    names, entries = list(state_dict), list(state_dict.values())
    if not state_dict.is_plain:
        names = [name for name, entry in state_dict.items() if is_plain_value(entry)]
        entries = list(filter(is_plain_value, entries))
    sections: list[str | None] = [checkpoint.origin.state_path or ""] * len(names)
    are_own = [True] * len(names)
    others: list[FoundTensor] = []
    for found in other_tensors(checkpoint) if beside is None else beside:
        if isinstance(found.node, TensorEntry):
            sections.append(found.section)
            names.append(found.name)
            entries.append(found.node)
            are_own.append(found.is_own)
        else:
            others.append(found)
    if len(names) + len(others) > DEFAULT_LIMITS.entries:  # one tensor may be in a list a million times
        raise LimitError("names of tensors", limit=DEFAULT_LIMITS.entries, actual=len(names) + len(others))
    characters = sum(map(len, names)) + sum(map(len, filter(None, sections)))
    if characters > DEFAULT_LIMITS.name_characters:  # one long key may be above thousands of tensors
        raise LimitError("characters of names", limit=DEFAULT_LIMITS.name_characters, actual=characters)
    several = shared_storages(entries)
    kinds = _Kinds(checkpoint)
    kind_of = [
        kinds[section, entry.shape, entry.stride, entry.dtype, storage.location, storage.nbytes, entry.is_parameter,
              name.rpartition(".")[2] in BUFFER_NAMES, is_own]
        for section, name, entry, is_own in zip(sections, names, entries, are_own, strict=True)
        for storage in (entry.storage,)
    ]  # fmt: skip
    partial: list[TensorEntry] = []
    if True in kinds.are_partial:
        partial = [entry for entry, kind in zip(entries, kind_of, strict=True) if kinds.are_partial[kind]]
    tied_to = _ties(sections, names, entries, several)
    return Listing(Rows(sections, names, entries, kinds.rows, kind_of, tied_to), others, several, partial)


class _Kinds(dict[tuple[Any, ...], int]):
    """The kinds of a file's tensors by what distinguishes them; each makes a row on first use."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._sections: dict[str | None, str] = {section.path: section.kind for section in checkpoint.sections}
        self._selected = checkpoint.origin.state_path
        self._is_walked = checkpoint.module is not None
        self.rows: list[TensorRow] = []
        self.are_partial: list[bool] = []
        """Whether the tensors of each kind are not all of their storage, or repeat its elements."""

    def __missing__(self, key: tuple[Any, ...]) -> int:
        section, shape, stride, dtype, location, storage_nbytes, is_parameter, is_buffer_name, is_own = key
        facts = DTYPES[dtype]
        nbytes = math.prod(shape) * (facts.bits or 8 * facts.itemsize) // 8
        is_selected = section is not None and section == self._selected
        kind = self._sections.get(section)
        role: Role = "unknown"
        inferred = False
        if is_own and (is_selected or kind in WEIGHTS):
            known = self._is_walked if is_selected else kind == "whole_model"
            role, inferred = role_of(dtype, is_parameter, is_buffer_name, known=known)
        self.rows.append(TensorRow(section, "", dtype, shape, stride, nbytes, location, "", role, inferred, None, None))
        self.are_partial.append(0 in stride or nbytes != storage_nbytes)
        return self.setdefault(key, len(self))


def other_rows(listing: Listing) -> Iterator[TensorRow]:
    """The rows of separate storages, of values made from tensors, and of numpy arrays.

    An array that is but a number has none.
    """
    told: set[tuple[str | None, str]] = set()  # a parameter, the value in it and its storage have one name
    from ckptkit.normalize.not_plain import Value, describe_value

    known: dict[int, Value | None] = {}
    for section, name, node, *_ in listing.others:
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


def _ties(
    sections: list[str | None], names: list[str], entries: list[TensorEntry], several: set[int]
) -> dict[int, str]:
    """For each tensor that is elsewhere already, by its index: the name it is tied to."""
    if not several:
        return {}
    first: dict[tuple[object, ...], int] = {}
    tied: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if id(entry.storage) in several and entry.nbytes:
            kept = first.setdefault(entry.view, index)
            if kept != index:
                inside = sections[kept] == sections[index] or not sections[kept]
                tied[index] = names[kept] if inside else f"{sections[kept]}.{names[kept]}"
    return tied


def wanted(name: str, filters: Sequence[str]) -> bool:
    """Whether a name matches one of the glob patterns; if there are none, every name does."""
    from fnmatch import fnmatchcase

    return not filters or any(fnmatchcase(name, pattern) for pattern in filters)


def ordered(rows: Sequence[TensorRow], sort: str) -> Sequence[TensorRow]:
    """The rows in file order (``"file"``), natural order of names (``"name"``) or largest first (``"size"``)."""
    if sort == "name":
        return sorted(rows, key=lambda row: (row.section or "", natural_key(row.name)))
    if sort == "size":
        return sorted(rows, key=lambda row: -row.nbytes)
    return rows


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``layer10`` after ``layer2``."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # Only these digits: there are characters that are digits and no numbers.
    return [(0, int(part)) if "0" <= part[0] <= "9" and len(part) < 19 else (1, part) for part in parts]
