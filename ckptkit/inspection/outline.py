"""The module tree of a file's weights, folded: repeated blocks are shown once, as ``layers.0‥31`` times 32.

Made from the rows of the inspect document, and for whole models from its ``modules``.  Names are split
on dots to *show* them as a tree; nothing is rebuilt from that.

Siblings whose names differ only in a last number (``0``, ``1``; ``layer1``, ``layer2``), are consecutive, and have the
same structure (the same names, shapes, dtypes and classes below) are one branch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.inspection.listing import Rows, TensorRow, natural_key, where
from ckptkit.report import count_of

if TYPE_CHECKING:
    from ckptkit.inspection.document import ModuleDocument
    from ckptkit.inspection.listing import Survey

__all__ = ["Outline", "OutlineLine", "outline_of"]

_MAX_LEVELS = 48
"""Dots of a name that make levels; what follows stays in one piece."""

_DIGITS = "0123456789"

_MAX_ON_A_LINE = 8
"""Tensors of a module that are one line rather than one each: a layer has up to eight."""

_TREE_LINES = 40
"""Lines of the tree where no depth is asked for."""

_MAX_TENSORS_NAMED = 3
"""Tensors of a module that are named on its line."""


class OutlineLine(NamedTuple):
    """One line of the tree.

    Attributes:
        level: 0 for the whole.
        label: name, below what is above it.
        copies: how many equal ones it represents.
        tensors, parameters, buffers, others, nbytes: of everything it represents; for a line below a folded one, of one
            of them.  Tied tensors count only as tensors; parameters, buffers and others count in elements.
        note: dtype and shape of a tensor, class and settings of a module, or dtypes.
        is_tensor: whether it is a tensor.
        dtypes: of everything it represents, as text.
        pieces: the note without them: of a tensor its shape, and the name it is tied to; of a module its class and
            settings, or the first tensors it holds.
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
    dtypes: str = ""
    pieces: tuple[str, ...] = ()


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
"""A branch under its name below what is above it."""

_Group = list[_Labelled]
"""Branches that are one line: siblings alike, or one."""

_Placed = tuple[_Group, int, str, bool]
"""A line before it is made: its branches, level and label, and whether it names the tensors."""

_Names = list[Any]
"""Everything below a name, each after its label: tensors' branches, and further names.

Once it is made, the branch of it all is the last item.

Files have 100,000 modules, most with one tensor, below others that are all alike (the experts of a layer, its blocks).
So consecutive names two levels below a name, ``0.weight`` and ``0.bias``, are kept unchanged, with their tensors, after
a ``None``, until another comes between: that is an odd number of items.
"""


class Outline:
    """The tree of some tensors.

    Args:
        rows: the tensors; the parts of a value that is not a plain tensor are not shown.
        modules: of a whole model, as the inspect document lists them.
        sectioned: whether names begin with their section.
        sort: ``"file"``, ``"name"`` or ``"size"``; numbered siblings are in the order of their numbers but in the last.
        picked: whether the file has others.
    """

    def __init__(
        self,
        rows: Sequence[TensorRow],
        modules: Sequence[ModuleDocument] = (),
        *,
        sectioned: bool = False,
        sort: str = "file",
        picked: bool = False,
    ) -> None:
        self._sort = sort
        self._has_classes = bool(modules)
        self._title = "(matching)" if picked else "(all)"
        made: dict[str, _Names] = {"": []}
        notes: dict[int, str] = {}
        for module in modules:
            notes[id(_below(module["path"], made))] = module["text"].replace("\n", " ")
        branches = _Branches(sort)
        _fill(made, branches.leaves(rows, sectioned), packs=not modules)
        if self._has_classes:
            for inside in made.values():
                pairs = sorted(zip(inside[::2], inside[1::2], strict=True), key=lambda pair: pair[1].__class__ is list)
                inside[:] = itertools.chain.from_iterable(pairs)  # as state_dict() gives them
        self._root = branches.of(made, notes)

    def lines(self, depth: int, *, modules_only: bool = False) -> Iterator[OutlineLine]:
        """The tree down to a level.

        Args:
            depth: levels below the whole, and below what all names have in common.
            modules_only: whether a module that contains only tensors is one line that names them.
        """
        return itertools.starmap(self._line, self._placed(depth, modules_only))

    def _placed(self, depth: int, modules_only: bool) -> Iterator[_Placed]:
        root = self._root
        groups = self._groups(root)
        if self._has_classes or root.tensors > 1:
            yield [("", root)], 0, self._title, False
        if len(groups) == 1 and len(groups[0]) == 1:
            depth += 1
        for group in groups:
            yield from self._below(group, 1, depth, modules_only)

    def fitting(self, most: int) -> tuple[list[OutlineLine], int]:
        """The deepest tree of at most so many lines; where even its top level has more, how many are left out."""
        placed: list[_Placed] = []
        for depth in (_MAX_LEVELS + 2, *range(8, 0, -1)):
            placed = list(itertools.islice(self._placed(depth, modules_only=True), most + 1))
            if len(placed) <= most:
                break
        left_out = sum(1 for _ in self._placed(1, modules_only=True)) - most if len(placed) > most else 0
        return [*itertools.starmap(self._line, placed[:most])], left_out

    def _below(self, group: _Group, level: int, depth: int, modules_only: bool) -> Iterator[_Placed]:
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
        yield group, level, label, bool(is_whole)
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

    def _line(self, group: _Group, level: int, label: str, names_tensors: bool) -> OutlineLine:
        branch = group[0][1]
        dtypes = sorted(branch.dtypes)
        told = ", ".join(dtypes) if len(dtypes) < 4 else f"{count_of(len(dtypes), 'dtype')}"
        pieces = _pieces(branch, names_tensors)
        return OutlineLine(
            level=level,
            label=label,
            copies=len(group),
            tensors=sum(member.tensors for _, member in group),
            parameters=sum(member.parameters for _, member in group),
            buffers=sum(member.buffers for _, member in group),
            others=sum(member.others for _, member in group),
            nbytes=sum(member.nbytes for _, member in group),
            note=_note(branch, told, pieces),
            is_tensor=branch.row is not None,
            dtypes=told,
            pieces=pieces,
        )


def outline_of(
    document: Survey, depth: int | None = None, sort: str = "file", most: int = _TREE_LINES
) -> tuple[list[OutlineLine], int]:
    """The lines of the module tree, and how many are left out."""
    summary, rows, modules = document["state_dict"], document["tensors"], document["modules"]
    own = where(rows, lambda row: summary is not None and row.section == summary["path"])
    if modules:
        own = where(own, lambda row: row.role != "unknown")  # not gradients and what else hangs on a module
    if (summary is not None and len(own) < summary["tensors"]) or not own:
        modules = []  # filtered: modules without tensors would be in the way
    tree = Outline(
        own or rows, modules, sectioned=not own, sort=sort, picked=len(rows) < document["every_tensor"]["tensors"]
    )
    return (list(tree.lines(depth)), 0) if depth is not None else tree.fitting(most)


def _without_parts(rows: Sequence[TensorRow]) -> Sequence[TensorRow]:
    """The rows without the parts of values."""
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


def _fill(made: dict[str, _Names], leaves: Iterable[tuple[str, _Branch]], *, packs: bool) -> None:
    """Put tensors below their parents, which are created if needed.

    Args:
        made: the nodes below each name.
        leaves: the names, with the tensors' branches.
        packs: whether names two levels below one may be kept unchanged.
    """
    run: _Names | None = None
    prefix = ""
    outer: str | None = None
    outside: _Names = []  # what is below that
    for name, leaf in leaves:
        if run is not None and name.startswith(prefix):
            tail = name[len(prefix) :]
            if tail.count(".") == 1 and tail[0] != ".":
                run.append(tail)
                run.append(leaf)
                continue
        run = None
        above, _, last = name.rpartition(".")
        up, _, label = above.rpartition(".")
        if packs and up and label and up not in made and up.count(".") < _MAX_LEVELS:
            further, _, own = up.rpartition(".")
            if further != outer or len(outside) % 2:
                outside, outer = _below(further, made), further
            below = made.get(up)
            if below is None:  # otherwise it was among those unpacked now
                below = made[up] = []
                outside += own, below
            if not below:
                run, prefix = below, up + "."
                run += None, name[len(prefix) :], leaf
                continue
        inside = made.get(above)
        if inside is None:
            inside = _below(above, made)
        elif len(inside) % 2:
            inside = _unpacked(above, made)
        inside += last if above else name, leaf


def _unpacked(path: str, made: dict[str, _Names]) -> _Names:
    """Everything below a path as names two levels below it, level by level."""
    inside = made[path]
    tails, leaves = inside[1::2], inside[2::2]
    inside.clear()
    for tail, leaf in zip(tails, leaves, strict=True):
        label, _, last = tail.partition(".")
        below = made.get(f"{path}.{label}")
        if below is None:
            below = made[f"{path}.{label}"] = []
            inside += label, below
        below += last, leaf
    return inside


def _below(path: str, made: dict[str, _Names]) -> _Names:
    """The node at a path, created with all above it if needed."""
    inside = made.get(path)
    if inside is not None:
        return _unpacked(path, made) if len(inside) % 2 else inside
    above, _, last = path.rpartition(".")
    if path.count(".") > _MAX_LEVELS:
        above, last = "", path  # one piece
    outside = _below(above, made)
    inside = made.get(path)
    if inside is None:  # otherwise it was among those unpacked now
        inside = made[path] = []
        outside += last, inside
    return inside


class _Branches:
    """Makes branches, one of all that are alike."""

    def __init__(self, sort: str) -> None:
        self._sort = sort
        self._tensors: dict[tuple[object, ...], _Branch] = {}
        self._known: dict[tuple[object, ...], _Branch] = {}
        self._shapes: dict[tuple[object, ...], int] = {}
        self._orders: dict[tuple[str, ...], list[int] | None] = {}

    def leaves(self, rows: Sequence[TensorRow], sectioned: bool) -> Iterable[tuple[str, _Branch]]:
        """The name of each tensor with its branch."""
        if isinstance(rows, Rows) and not (sectioned and any(rows.sections)):
            kinds = list(map(self._tensor, rows.kinds))
            leaves = [kinds[number] for number in rows.kind_of]
            for at in rows.tied_to:
                leaves[at] = self._tensor(rows[at])
            return zip(rows.names, leaves, strict=True)
        return (
            (f"{row.section}.{row.name}" if sectioned and row.section else row.name, self._tensor(row))
            for row in _without_parts(rows)
        )

    def of(self, made: dict[str, _Names], notes: Mapping[int, str] = {}) -> _Branch:
        """The branch of all, with what is below each branch in order and summed up, from the bottom."""
        known = self._known
        branch: _Branch | None = None
        for inside in reversed(made.values()):  # its children were made later
            note = notes.get(id(inside), "") if notes else ""
            is_packed = len(inside) % 2
            key = tuple(inside if is_packed else [item[-1] if item.__class__ is list else item for item in inside])
            if note:
                key = (note, *key)
            branch = known.get(key)
            if branch is None:
                branch = known[key] = self._made(key, note)
            inside.append(branch)
        return branch or _Branch([])

    def _made(self, key: tuple[Any, ...], note: str) -> _Branch:
        if key[:1] == (None,):
            below: dict[str, _Names] = {"": []}
            _fill(below, zip(key[1::2], key[2::2], strict=True), packs=False)
            return self.of(below)
        if note:
            key = key[1:]
        labels = key[::2]
        if labels not in self._orders:
            self._orders[labels] = _order(labels, self._sort)
        order = self._orders[labels]
        if order is not None:
            key = tuple([part for at in order for part in key[2 * at : 2 * at + 2]])
        in_order = (note, *key) if note else key
        branch = self._known.get(in_order)
        if branch is None:
            branch = self._known[in_order] = _Branch(list(zip(key[::2], key[1::2], strict=True)), note=note)
            self._sum_up(branch)
        return branch

    def _tensor(self, row: TensorRow) -> _Branch:
        alike = None
        if row.tied_to is None and row.value is None:
            alike = row.dtype, row.shape, row.role, row.nbytes
            if alike in self._tensors:
                return self._tensors[alike]
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
        branch.shape = self._shapes.setdefault((row.dtype, row.shape, row.role), len(self._shapes))
        branch.dtypes = frozenset((row.dtype,))
        if alike is not None:
            self._tensors[alike] = branch
        return branch

    def _sum_up(self, branch: _Branch) -> None:
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
        branch.shape = self._shapes.setdefault((branch.note, *below), len(self._shapes))
        branch.dtypes = frozenset(dtypes)


def _order(labels: Sequence[str], sort: str) -> list[int] | None:
    """The order of labels by name, with numbers in numeric order; or unchanged; ``None``: unchanged."""
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


def _pieces(branch: _Branch, names_tensors: bool) -> tuple[str, ...]:
    """The end of a branch's line except dtypes; for a module without a class, the first tensors in it."""
    row = branch.row
    if row is not None:
        shape = str([*row.shape]) if row.value is None else row.value
        return (shape, row.tied_to) if row.value is None and row.tied_to else (shape,)
    if branch.note:
        return (branch.note if branch.is_module else branch.note.removesuffix("()"),)
    if not names_tensors or not branch.is_module:
        return ()
    named = ((label, child.row) for label, child in branch.children[:_MAX_ON_A_LINE])
    return tuple(f"{label} {[*row.shape]}" for label, row in named if row is not None)


def _note(branch: _Branch, dtypes: str, pieces: Sequence[str]) -> str:
    """All that is there in a line."""
    if branch.note or (branch.row is not None and branch.row.value is not None):
        return pieces[0]
    if branch.row is not None:
        return f"{dtypes} {' = '.join(pieces)}"
    more = ", …" if len(branch.children) > _MAX_TENSORS_NAMED else ""
    return f"{dtypes}: {', '.join(pieces[:_MAX_TENSORS_NAMED])}{more}" if pieces else dtypes
