"""The module tree of a file's weights, folded: repeated blocks stand once, as ``layers.0‥31`` times 32.

Made from the rows of the inspect document, and for whole models from its ``modules``.  Names are split
on dots to *show* them as a tree; nothing is rebuilt from that.

Siblings whose names differ in a last number alone (``0``, ``1``; ``layer1``, ``layer2``), follow one another without
a gap, and have the same structure (the same names, shapes, dtypes and classes below) are one branch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.inspection.listing import TensorRow, natural_key
from ckptkit.report import count_of

if TYPE_CHECKING:
    from ckptkit.inspection.document import ModuleDocument

__all__ = ["Outline", "OutlineLine"]

_MAX_LEVELS = 48
"""Dots of a name that make levels; what follows stays in one piece."""

_DIGITS = "0123456789"

_MAX_ON_A_LINE = 8
"""Tensors of a module that are one line rather than one each: a layer has up to eight."""

_MAX_TENSORS_NAMED = 3
"""Tensors of a module that are named on its line."""


class OutlineLine(NamedTuple):
    """One line of the tree.

    Attributes:
        level: 0 for the whole.
        label: name, below what stands above it.
        copies: how many alike it stands for.
        tensors, parameters, buffers, others, nbytes: of all it stands for; of a line below a folded
            one, of one of them.  Tied tensors count as tensors alone; parameters, buffers and what is
            neither in elements.
        note: dtype and shape of a tensor, class and settings of a module, or dtypes.
        is_tensor: whether it is a tensor.
    """

    level: int
    label: str
    copies: int
    tensors: int
    parameters: int
    buffers: int
    others: int
    nbytes: int
    note: str
    is_tensor: bool


class _Branch:
    """A module, or a tensor (which has a row), with what is below it; those that are alike in all are one object."""

    __slots__ = (
        "buffers", "children", "dtypes", "groups", "nbytes", "note", "others", "parameters", "row", "shape", "tensors",
    )  # fmt: skip

    def __init__(self, children: list[_Labelled], row: TensorRow | None = None, note: str = "") -> None:
        self.children = children
        self.row = row
        self.groups: list[_Group] | None = None
        self.note = note
        self.shape = -1
        """Equal numbers have the same structure."""
        self.tensors = self.parameters = self.buffers = self.others = self.nbytes = 0
        self.dtypes: frozenset[str] = frozenset()

    @property
    def is_module(self) -> bool:
        """Whether nothing but tensors is below it."""
        return self.row is None and all(child.row is not None for _, child in self.children)


_Labelled = tuple[str, _Branch]
"""A branch under its name below what stands above it."""

_Group = list[_Labelled]
"""Branches that are one line: siblings alike, or one."""

_Names = list[Any]
"""What stands below a name, by label: tensors (`TensorRow`), and what stands below further names; then its branch."""


class Outline:
    """The tree of some tensors.

    Args:
        rows: the tensors; what a value that is no plain tensor is made of is not shown.
        modules: of a whole model, as the inspect document lists them.
        sectioned: whether names begin with their section.
        sort: ``"file"``, ``"name"`` or ``"size"``; numbered siblings are in the order of their numbers but in the last.
    """

    def __init__(
        self,
        rows: Sequence[TensorRow],
        modules: Sequence[ModuleDocument] = (),
        *,
        sectioned: bool = False,
        sort: str = "file",
    ) -> None:
        self._sort = sort
        self._has_classes = bool(modules)
        made: dict[str, _Names] = {"": []}
        notes: dict[int, str] = {}
        for module in modules:
            notes[id(_below(module["path"], made))] = module["text"].replace("\n", " ")
        for row in _without_parts(rows):
            name = f"{row.section}.{row.name}" if sectioned and row.section else row.name
            above, _, last = name.rpartition(".")
            if not above:
                last = name
            inside = made.get(above)
            if inside is None:
                inside = _below(above, made)
            inside.append((last, row))
        if self._has_classes:
            for inside in made.values():
                inside.sort(key=lambda item: item[1].__class__ is list)  # as state_dict() gives them
        self._root = _measured(made, notes, sort)

    def lines(self, depth: int, *, modules_only: bool = False) -> Iterator[OutlineLine]:
        """The tree down to a level.

        Args:
            depth: levels below the whole, and below what all names have in common.
            modules_only: whether a module that holds tensors alone is one line that names them.
        """
        root = self._root
        groups = self._groups(root)
        if self._has_classes or root.tensors > 1:
            yield self._line([("", root)], 0, "(all)")
        if len(groups) == 1 and len(groups[0]) == 1:
            depth += 1
        for group in groups:
            yield from self._below(group, 1, depth, modules_only)

    def fitting(self, most: int) -> tuple[list[OutlineLine], int]:
        """The deepest tree of at most so many lines; where even its top level has more, how many are left out."""
        lines: list[OutlineLine] = []
        for depth in (_MAX_LEVELS + 2, *range(8, 0, -1)):
            lines = list(itertools.islice(self.lines(depth, modules_only=True), most + 1))
            if len(lines) <= most:
                return lines, 0
        left_out = sum(1 for _ in self.lines(1, modules_only=True)) - most
        return lines[:most], left_out

    def _below(self, group: _Group, level: int, depth: int, modules_only: bool) -> Iterator[OutlineLine]:
        label = _group_label(group)
        branch = group[0][1]
        while branch.row is None and not branch.note:
            inner = self._groups(branch)
            if len(inner) != 1 or (len(group) > 1 and len(inner[0]) > 1):
                break
            label += "." + _group_label(inner[0])
            group = inner[0] if len(group) == 1 else [self._groups(member)[0][0] for _, member in group]
            branch = group[0][1]
        is_small = modules_only and len(branch.children) <= _MAX_ON_A_LINE
        is_whole = branch.row is not None or level >= depth or ((is_small or branch.note) and branch.is_module)
        yield self._line(group, level, label, names_tensors=bool(is_whole))
        if is_whole:
            return
        for inner_group in self._groups(branch):
            yield from self._below(inner_group, level + 1, depth, modules_only)

    def _groups(self, branch: _Branch) -> list[_Group]:
        """A branch's children, those alike that follow one another folded."""
        if branch.groups is not None:
            return branch.groups
        groups: list[_Group] = []
        last: tuple[str, int] | None = None
        for label, child in branch.children:
            numbered = _split_number(label)
            follows = last is not None and numbered == (last[0], last[1] + 1) and child.shape == groups[-1][0][1].shape
            if follows:
                groups[-1].append((label, child))
            else:
                groups.append([(label, child)])
            last = numbered
        if self._sort == "size":
            groups.sort(key=lambda group: -sum(member.nbytes for _, member in group))
        branch.groups = groups
        return groups

    def _line(self, group: _Group, level: int, label: str, *, names_tensors: bool = False) -> OutlineLine:
        branch = group[0][1]
        return OutlineLine(
            level=level,
            label=label,
            copies=len(group),
            tensors=sum(member.tensors for _, member in group),
            parameters=sum(member.parameters for _, member in group),
            buffers=sum(member.buffers for _, member in group),
            others=sum(member.others for _, member in group),
            nbytes=sum(member.nbytes for _, member in group),
            note=_note(branch, names_tensors),
            is_tensor=branch.row is not None,
        )


def _without_parts(rows: Sequence[TensorRow]) -> Sequence[TensorRow]:
    """The rows without those of what a value is made of."""
    values = {(row.section, row.name) for row in rows if row.value is not None}
    if not values:
        return rows
    left = []
    for row in rows:
        above = row.name
        while above and (row.section, above := above.rpartition(".")[0]) not in values:
            pass
        if not above:
            left.append(row)
    return left


def _below(path: str, made: dict[str, _Names]) -> _Names:
    """What stands below a path, made with all above it where it is not there yet."""
    inside = made.get(path)
    if inside is not None:
        return inside
    above, _, last = path.rpartition(".")
    inside = made.get(above)
    if inside is not None and (len(path) <= _MAX_LEVELS or path.count(".") <= _MAX_LEVELS):  # as nearly always
        below: _Names = []
        made[path] = below
        inside.append((last, below))
        return below
    missing = [(path, last)]
    if path.count(".") > _MAX_LEVELS:
        above, missing = "", [(path, path)]  # one piece
    while above and above not in made:
        missing.append((above, above.rpartition(".")[2]))
        above = above.rpartition(".")[0]
    inside = made[above]
    for whole, part in reversed(missing):
        made[whole] = below = []
        inside.append((part, below))
        inside = below
    return inside


def _measured(made: dict[str, _Names], notes: dict[int, str], sort: str) -> _Branch:
    """The branch of all, with what is below each branch in order and summed up, from the bottom."""
    shapes: dict[tuple[object, ...], int] = {}
    known: dict[tuple[object, ...], _Branch] = {}
    orders: dict[tuple[str, ...], list[int] | None] = {}
    branch: _Branch | None = None
    for inside in reversed(made.values()):  # what is below was made later
        note = notes.get(id(inside), "") if notes else ""
        alike: tuple[object, ...] | None = None
        if len(inside) == 1:
            label, item = inside[0]
            if item.__class__ is not list and item[10] is None and item[13] is None:  # neither tied nor a value
                alike = label, item[2], item[3], item[5], item[8], note
                branch = known.get(alike)
                if branch is not None:
                    inside.append(branch)
                    continue
        elif inside:
            labels = tuple([label for label, _ in inside])
            order = orders[labels] if labels in orders else orders.setdefault(labels, _order(labels, sort))
            if order is not None:
                inside[:] = [inside[at] for at in order]
        key: list[object] = [note]
        for label, item in inside:
            key += label, (item[-1] if item.__class__ is list else _tensor(item, known, shapes))
        branch = known.get(tuple(key))
        if branch is None:
            branch = known[tuple(key)] = _Branch(list(zip(key[1::2], key[2::2], strict=True)), note=note)  # type: ignore[arg-type]
            _sum_up(branch, shapes)
        inside.append(branch)
        if alike is not None:
            known[alike] = branch
    return branch or _Branch([])


def _tensor(row: Any, known: dict[tuple[object, ...], _Branch], shapes: dict[tuple[object, ...], int]) -> _Branch:
    alike = None
    if row.tied_to is None and row.value is None:
        alike = row.dtype, row.shape, row.role, row.nbytes
        if alike in known:
            return known[alike]
    branch = _Branch([], row)
    branch.tensors = 1
    if row.tied_to is None:
        numel = row.numel
        branch.nbytes = row.nbytes
        if row.role == "parameter":
            branch.parameters = numel
        elif row.role == "buffer":
            branch.buffers = numel
        else:
            branch.others = numel
    branch.shape = shapes.setdefault((row.dtype, row.shape, row.role), len(shapes))
    branch.dtypes = frozenset((row.dtype,))
    if alike is not None:
        known[alike] = branch
    return branch


def _sum_up(branch: _Branch, shapes: dict[tuple[object, ...], int]) -> None:
    below: list[object] = []
    dtypes: set[str] = set()
    for label, child in branch.children:
        dtypes |= child.dtypes
        branch.tensors += child.tensors
        branch.parameters += child.parameters
        branch.buffers += child.buffers
        branch.others += child.others
        branch.nbytes += child.nbytes
        below.append((label, child.shape))
    branch.shape = shapes.setdefault((branch.note, *below), len(shapes))
    branch.dtypes = frozenset(dtypes)


def _order(labels: Sequence[str], sort: str) -> list[int] | None:
    """The order of labels by name; or as they are, but those that differ in a number by that; ``None``: as they are."""
    if sort == "name":
        return sorted(range(len(labels)), key=lambda at: natural_key(labels[at]))
    slots: dict[str, list[int]] = {}
    numbers: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        numbered = _split_number(label)
        if numbered is not None:
            slots.setdefault(numbered[0], []).append(index)
            numbers.setdefault(numbered[0], []).append(numbered[1])
    order = list(range(len(labels)))
    for stem, found in numbers.items():
        if any(a > b for a, b in itertools.pairwise(found)):
            for index, (_, at) in zip(slots[stem], sorted(zip(found, slots[stem], strict=True)), strict=True):
                order[index] = at
    return order if order != list(range(len(labels))) else None


def _split_number(label: str) -> tuple[str, int] | None:
    """``("layer", 10)`` of ``layer10``; ``None``: it ends in no number, or in one that begins with a zero."""
    end = len(label)
    while end and label[end - 1] in _DIGITS:
        end -= 1
    digits = label[end:]
    if not digits or len(digits) > 9 or (digits[0] == "0" and len(digits) > 1):
        return None
    return label[:end], int(digits)


def _group_label(group: _Group) -> str:
    if len(group) == 1:
        return group[0][0]
    numbered = _split_number(group[-1][0])
    return f"{group[0][0]}‥{'' if numbered is None else numbered[1]}"


def _note(branch: _Branch, names_tensors: bool) -> str:
    """What stands at the end of a branch's line; of a module without a class, perhaps the tensors it holds."""
    if branch.row is not None and branch.row.value is not None:
        return branch.row.value
    if branch.row is not None:
        note = f"{branch.row.dtype} {list(branch.row.shape)}"
        return f"{note} = {branch.row.tied_to}" if branch.row.tied_to else note
    if branch.note:
        return branch.note if branch.is_module else branch.note.removesuffix("()")
    dtypes = sorted(branch.dtypes)
    shown = ", ".join(dtypes) if len(dtypes) < 4 else f"{count_of(len(dtypes), 'dtype')}"
    if not names_tensors or not branch.is_module:
        return shown
    named = [f"{label} {list(child.row.shape)}" for label, child in branch.children if child.row is not None]
    more = ", …" if len(named) > _MAX_TENSORS_NAMED else ""
    return f"{shown}: {', '.join(named[:_MAX_TENSORS_NAMED])}{more}"
