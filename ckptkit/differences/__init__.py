"""What changed between two checkpoints, whatever their containers: `differ` makes a `Difference`.

The weights are compared name by name; renamed tensors are found by content and by shape (`pairs`).  Bits decide
(`bits`); figures are computed only for tensors that differ (`figures`).  Everything beside the weights is compared too:
sections, scalars, and both files' trees (`rest`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from ckptkit.checkpoint import Checkpoint, TensorEntry, tied_groups
from ckptkit.differences.difference import Difference
from ckptkit.differences.figures import Sums, Tolerance
from ckptkit.differences.pairs import NO_FIGURES, Pair, PairReader, all_sums, find_renamed
from ckptkit.differences.rest import (
    TreeComparison,
    ValueComparison,
    header,
    metadata_rows,
    named_tensors,
    other_sections,
    section_rows,
    training_rows,
)
from ckptkit.errors import SectionError
from ckptkit.normalize.made_plain import devices_made_plain
from ckptkit.normalize.modules import unwrapped
from ckptkit.normalize.parts import part_findings, require_whole
from ckptkit.normalize.selection import paths_listed, weights_paths
from ckptkit.normalize.tensors import storage_names
from ckptkit.report import Finding, count_of, listed
from ckptkit.rewrite.names import module_paths
from ckptkit.shell import command_line

if TYPE_CHECKING:
    from ckptkit.differences.difference import ModuleRow, SectionRow, TieRow

__all__ = ["Difference", "Tolerance", "differ", "rolled_up"]

_MOST_NAMED = 3
"""Names in a message."""

UNCHANGED = "unchanged"
"""The status of a tensor that is the same in both, or within tolerance."""

_MOST_ROWS = 24
"""Rows that can still be read."""

_MOST_SEGMENTS = 6
"""Segments of the name of a module that sums up the differences in it."""

_COUNTER = "num_batches_tracked"
"""What BatchNorm counts batches in: its last segment."""

_OVERLAPPING = "it is a view of far more elements than are stored, or its values cannot be computed"


def differ(
    a: Checkpoint,
    b: Checkpoint,
    *,
    beside: bool = True,
    tolerance: Tolerance | None = None,
    strict: bool = False,
    allow_part: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Difference:
    """Compare two open checkpoints.

    Args:
        a: the first.
        b: the second.
        beside: whether the parts beside the weights are compared too.
        tolerance: what counts as unchanged; ``None``: only the same bits.
        strict: whether what is beside the tensors counts for `Difference.ok`.
        allow_part: whether they may be parts of checkpoints.
        progress: called with the bytes processed so far and the total.

    Raises:
        SectionError: it is not clear which weights are meant, or there is nothing to compare.
        PartError: one is a part of a checkpoint.
        CorruptError, FileAccessError: something cannot be read.
    """
    for checkpoint in (a, b):
        require_whole(checkpoint, allow_part=allow_part)
    if a.state_dict.is_plain != b.state_dict.is_plain:  # one is converted, and has no tensors of devices any more
        a, b = devices_made_plain(a), devices_made_plain(b)
    ours, theirs, selected = _values(a, b, strict=strict)
    given = [*["--strict"] * strict, *["--allow-part"] * allow_part]
    if tolerance is not None:
        given += ["--atol", f"{tolerance.atol}", "--rtol", f"{tolerance.rtol}"]
    work = PairReader(progress, tolerance)
    with work.checksums.held(lambda: {**storage_names(a), **storage_names(b)}):
        comparison = _Comparison(ours, theirs, work, tolerance)
        sections: tuple[SectionRow, ...] = ()
        parts = (other_sections(a), other_sections(b)) if beside and selected else ({}, {})
        trees = TreeComparison(
            a,
            b,
            comparison.pairs,
            beside=beside,
            sections=[entry for side in parts for names in side.values() for entry in names.values()],
            work=work,
        )
        if any(parts):
            sections = section_rows(a, b, *parts, work)
        ties = tuple(_ties(comparison.pairs))
        return comparison.difference(
            a=header(a),
            b=header(b),
            metadata=metadata_rows(a, b),
            training=training_rows(a, b) if beside else (),
            sections=sections,
            trees=trees,
            ties=ties,
            findings=(*part_findings(a), *part_findings(b), *_prefixes(a, b, ours, theirs, given), *_ties_told(ties)),
            strict=strict,
        )


def _values(a: Checkpoint, b: Checkpoint, *, strict: bool) -> tuple[Mapping[str, object], Mapping[str, object], bool]:
    """The values to compare in each, by name, and whether they are the weights of both.

    Raises:
        SectionError: one of them has several; or neither has a tensor, and nothing else counts.
    """
    has_weights = [checkpoint.origin.state_path is not None for checkpoint in (a, b)]
    if any(has_weights) and not all(has_weights):
        lacking, option = (b, "--section-b") if has_weights[0] else (a, "--section-a")
        if several := paths_listed(lacking.sections):
            raise SectionError(
                f"{lacking.origin.path}: several sections contain weights ({several}); name the one to compare with "
                f"{option}",
                path=lacking.origin.path,
                names=weights_paths(lacking.sections),
            )
    found = [
        checkpoint.state_dict.everything if has else named_tensors(checkpoint)
        for checkpoint, has in zip((a, b), has_weights, strict=True)
    ]
    if not any(found) and not strict:
        raise SectionError(
            f"{a.origin.path} and {b.origin.path}: neither contains a tensor, so there is nothing to compare without "
            "--strict"
        )
    return found[0], found[1], all(has_weights)


_Paired = tuple[str, str, TensorEntry, TensorEntry]
"""The names of a tensor in the first and in the second, and what it is there."""


class _Comparison:
    """Two sets of named values, compared.

    Attributes:
        pairs: each tensor that both have.
    """

    def __init__(
        self, ours: Mapping[str, object], theirs: Mapping[str, object], work: PairReader, tolerance: Tolerance | None
    ) -> None:
        self._ours, self._theirs = ours, theirs
        self.work = work
        self._tolerance = tolerance
        common = [name for name in ours if name in theirs]
        self._removed = [name for name in ours if name not in theirs] if len(common) < len(ours) else []
        self._added = [name for name in theirs if name not in ours] if len(common) < len(theirs) else []
        self._renamed = find_renamed(_tensors(ours, self._removed), _tensors(theirs, self._added), work.checksums)
        self.pairs: list[_Paired] = []
        for old, new in chain(zip(common, common, strict=True), ((each.old, each.new) for each in self._renamed)):
            x, y = ours[old], theirs[new]
            if isinstance(x, TensorEntry) and isinstance(y, TensorEntry):
                self.pairs.append((old, new, x, y))
        others: list[str] = []
        if len(self.pairs) < len(common) + len(self._renamed):
            known = {new for _, new, _, _ in self.pairs}
            others = [name for name in common if name not in known]
        self._others = others
        self._values = ValueComparison(ours, theirs, others, work)
        self._same_order = common == ([name for name in theirs if name in ours] if self._added else list(theirs))
        self._kinds: dict[str, str] = {}
        self._lists: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("reshaped", "recast", "changed", "within_tolerance", "values", "not_compared")
        }

    def difference(self, *, trees: TreeComparison, findings: Sequence[Finding], **facts: Any) -> Difference:
        """Compare, and report everything."""
        known = {each.new: each for each in self._renamed}
        self._compare({each.new for each in self._renamed if each.by == "content"})
        self._compare_others()
        tree, in_trees, lost = trees.told(self._tolerance)
        self._lists["not_compared"] += [{"name": place, "reason": _OVERLAPPING} for place in lost]
        for name in {*self._added} - set(known):
            self._kinds[name] = "added"
        for name in {*self._removed} - {each.old for each in self._renamed}:
            self._kinds[name] = "removed"
        for each in self._renamed:
            if self._kinds[each.new] == UNCHANGED:
                self._kinds[each.new] = "renamed"
        self._lists["changed"].sort(key=_by_change)
        self._lists["within_tolerance"].sort(key=_by_change)
        rows: dict[str, Any] = {name: tuple(found) for name, found in self._lists.items()}
        largest = {row["name"]: row["max_abs"] for row in (*rows["changed"], *rows["recast"]) if row["max_abs"]}
        within = {row["name"] for row in rows["within_tolerance"]}
        unchanged = [name for name, kind in self._kinds.items() if kind == UNCHANGED and name not in within]
        olds = {each.old for each in self._renamed}
        return Difference(
            unchanged=len(unchanged),
            added=tuple(name for name in self._added if name not in known),
            removed=tuple(name for name in self._removed if name not in olds),
            renamed=tuple(each.to_dict() for each in self._renamed),
            same_order=self._same_order,
            modules=rolled_up(self._ordered(), largest) if {*self._kinds.values()} - {UNCHANGED} else (),
            tree=tree,
            tree_differences=in_trees,
            findings=(*self._told(rows), *findings),
            **rows,
            **facts,
        )

    def _ordered(self) -> dict[str, str]:
        """What happened to each name: in the order of the second file, what was removed last."""
        names = dict.fromkeys((*self._theirs, *self._ours))
        return {name: self._kinds[name] for name in names if name in self._kinds}

    def _compare(self, known_equal: set[str]) -> None:
        """Everything that is a tensor in both."""
        keys: list[Pair | None] = [
            self.work.add(a, b)
            if a.dtype == b.dtype and (a.shape == b.shape or a.numel == b.numel) and new not in known_equal
            else None
            for _, new, a, b in self.pairs
        ]
        self.work.run()
        others: list[tuple[_Paired, bool | None]] = []
        for pair, key in zip(self.pairs, keys, strict=True):
            _, new, a, b = pair
            same = new in known_equal if key is None else self.work.same(key)
            if same is True and a.shape == b.shape:
                self._kinds[new] = UNCHANGED
            else:
                others.append((pair, same))
        wanted = [(a, b) for (_, _, a, b), same in others if a.shape == b.shape and same is False]
        sums = all_sums(wanted, self._tolerance or Tolerance(), self.work) if wanted else {}
        for (old, new, a, b), same in others:
            self._kinds[new] = self._judge(old, new, a, b, same, sums.get((*a.view, *b.view)))

    def _judge(self, old: str, new: str, a: TensorEntry, b: TensorEntry, same: bool | None, sums: Sums | None) -> str:
        """What happened to a tensor that is not the same; it is put on the list of what did."""
        row: dict[str, Any] = {"name": new} if old == new else {"name": new, "was": old}
        figures = NO_FIGURES if sums is None else sums.to_dict()
        if a.shape != b.shape:
            row |= {"from": [*a.shape], "to": [*b.shape]}
            if a.dtype != b.dtype:
                row |= {"from_dtype": a.dtype, "to_dtype": b.dtype}
            comparable = a.dtype == b.dtype and a.numel == b.numel
            self._lists["reshaped"].append({**row, "same_values": same if comparable else None})
            return "reshaped"
        if a.dtype != b.dtype:
            equal = None if sums is None else min(sums.uncast, sums.uncast_back) == 0
            row |= {"from": a.dtype, "to": b.dtype, "shape": [*b.shape], "equal_after_cast": equal}
            self._lists["recast"].append({**row, **figures})
            return "recast"
        if same is None:
            self._lists["not_compared"].append({**row, "reason": _OVERLAPPING})
            return "not compared"
        row |= {"dtype": b.dtype, "shape": [*b.shape], **figures}
        if self._tolerance is not None and sums is not None and not sums.outside:
            self._lists["within_tolerance"].append(row)
            return UNCHANGED
        self._lists["changed"].append(row)
        return "changed"

    def _compare_others(self) -> None:
        """Values that are not a plain tensor in one of them."""
        for name in self._others:
            a, b = self._ours[name], self._theirs[name]
            same = self._values.same(name)
            if same is None:
                self._lists["not_compared"].append({"name": name, "reason": _OVERLAPPING})
            elif not same:
                self._lists["values"].append(self._values.row(name, a, b))
            self._kinds[name] = UNCHANGED if same else "not compared" if same is None else "changed"

    def _told(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Finding]:
        lost = [row["name"] for row in rows["not_compared"]]
        if lost:
            message = f"{count_of(len(lost), 'value')} could not be compared, which does not mean equal: {_names(lost)}"
            yield Finding(code="not-compared", severity="error", message=message)
        fresh = [row["name"] for row in rows["changed"] if row["nan"] and row["nan"]["b"] and not row["nan"]["a"]]
        if fresh:
            message = f"NaN where there were numbers, in {count_of(len(fresh), 'tensor')}: {_names(fresh)}"
            yield Finding(code="nan-appeared", severity="warning", message=message)


def _tensors(values: Mapping[str, object], names: Sequence[str]) -> dict[str, TensorEntry]:
    return {name: value for name in names if isinstance(value := values[name], TensorEntry)}


def _by_change(row: Mapping[str, Any]) -> tuple[bool, float]:
    """NaN and Inf on one side first, then by the largest difference."""
    nan = row["nan"]
    is_broken = nan is not None and bool(nan["a"] or nan["b"] or row["infinite"])
    return not is_broken, -(row["max_abs"] or 0)


def _names(names: Sequence[str]) -> str:
    return listed([*map(repr, names)], _MOST_NAMED)


def _prefixes(
    a: Checkpoint, b: Checkpoint, ours: Mapping[str, object], theirs: Mapping[str, object], given: Sequence[str]
) -> Iterator[Finding]:
    """Whether names that differ would be equal without wrapper prefixes."""
    agreeing = len(ours.keys() & theirs.keys())
    if agreeing == len(ours) == len(theirs):
        return
    bare = [{unwrapped(name) for name in side} for side in (ours, theirs)]
    if len(bare[0]) < len(ours) or len(bare[1]) < len(theirs) or len(bare[0] & bare[1]) <= agreeing:
        return
    message = (
        f"{count_of(agreeing, 'name', 'agrees', 'agree')}; without wrapper prefixes (such as module.) "
        f"{len(bare[0] & bare[1]):,} of {len(ours):,} and {len(theirs):,} would"
    )
    options = [
        f"{word}-{side}" if word in ("--section", "--tag") else word
        for side, each in (("a", a), ("b", b))
        for word in each.origin.options
    ]
    fix = command_line(["ckptkit", "diff", a.origin.path, b.origin.path, *options, *given, "--strip-module"])
    yield Finding(code="prefix-differs", severity="warning", message=message, fix=fix)


def _ties(pairs: Sequence[_Paired]) -> Iterator[TieRow]:
    """Tensors that are one tensor in only one of the files, under the names of the second."""
    groups = tied_groups({new: a for _, new, a, _ in pairs}), tied_groups({new: b for _, new, _, b in pairs})
    sides: tuple[tuple[Literal["a", "b"], int], ...] = (("a", 0), ("b", 1))
    for which, side in sides:
        mine, others = groups[side], groups[1 - side]
        group = {name: number for number, names in enumerate(others) for name in names}
        for names in mine:
            if len({group.get(name) for name in names}) > 1 or names[0] not in group:
                yield {"names": names, "tied_in": which}


def _ties_told(ties: Sequence[TieRow]) -> Iterator[Finding]:
    if ties:
        first = ties[0]
        message = (
            f"{count_of(len(ties), 'group')} of tensors are tied in only one of the files: "
            f"{_names(first['names'])} in {first['tied_in'].upper()}"
        )
        yield Finding(code="ties-differ", severity="info", message=message)


def rolled_up(statuses: Mapping[str, str], largest: Mapping[str, float]) -> tuple[ModuleRow, ...]:
    """One row for each module, or tensor, that sums up differences.

    The highest module in which everything changed represents everything in it.  Where only ``fc.weight`` and
    ``fc.bias`` changed that is ``fc``; where all of ``layer1.0.conv1`` changed and the rest of ``layer1.0`` did not,
    ``layer1.0.conv1``.  Batch counters are ignored for this.  If that makes too many rows to read, modules with fewer
    segments represent what differs in them.  Names are split on dots only to *show* this; nothing is rebuilt from it.

    Args:
        statuses: of every name: `UNCHANGED`, or what happened to it.
        largest: absolute difference of those that have one.
    """
    differing = {name: status for name, status in statuses.items() if status != UNCHANGED}
    if not differing:
        return ()
    kept = {
        path
        for name, status in statuses.items()
        if status == UNCHANGED and name.rpartition(".")[2] != _COUNTER
        for path in _above(name)
    }
    places = {name: next((path for path in _above(name) if path not in kept), name) for name in differing}
    segments = _MOST_SEGMENTS
    while len(set(places.values())) > _MOST_ROWS and segments:
        places = {name: ".".join(name.split(".", segments)[:segments]) for name in differing}
        segments -= 1
    rows: dict[str, ModuleRow] = {}
    for name, status in differing.items():
        row = rows.setdefault(
            places[name],
            {"module": places[name], "tensors": 0, "differing": 0, "statuses": {}, "max_abs": None},
        )
        row["differing"] += 1
        row["statuses"][status] = row["statuses"].get(status, 0) + 1
        if name in largest:
            row["max_abs"] = max(row["max_abs"] or 0, largest[name])
    for name in statuses:
        for path in {*_above(name), name} & rows.keys():
            rows[path]["tensors"] += 1
    return tuple(rows.values())


def _above(name: str) -> Iterator[str]:
    yield ""
    yield from module_paths(name)
