"""What changed between two checkpoints: the record, and the document that text, JSON and markdown are made from."""

from __future__ import annotations

import json
from collections import Counter
from copy import copy
from typing import Any, Literal, TypedDict, TypeVar

from ckptkit.checkpoint import Kind, Trust
from ckptkit.errors import FailedReportError
from ckptkit.report import SCHEMA_VERSION, Finding, FindingDocument, count_of, human_size, listed, printable, share_of
from ckptkit.startup import dataclass

__all__ = ["DiffDocument", "DiffFile", "Difference", "ModuleRow", "RenamedRow", "TreeRow"]

_FromText = TypedDict("_FromText", {"from": str})
_FromShape = TypedDict("_FromShape", {"from": list[int]})


class DiffFile(TypedDict):
    """One of the two files.

    Attributes:
        section: the path of its weights; ``None``: it has none, or it is not clear which are meant.
        tensors: names in the weights, tied ones too.
        nbytes: of these tensors, tied ones once; as ``state_dict.nbytes`` of ``inspect``.
        locations: device tags of the weights.
    """

    path: str
    size: int
    format: str
    kind: Kind
    writer: str | None
    section: str | None
    tensors: int
    nbytes: int
    locations: list[str]
    trust: Trust


class NanCounts(TypedDict):
    """Elements that are NaN in only one file, in both, and in both with different signs."""

    a: int
    b: int
    both: int
    signs: int


class FiguresRow(TypedDict):
    """By how much two tensors differ, in their finite elements; ``None``: there is no such figure.

    Attributes:
        max_abs, mean_abs: of the differences of elements.
        relative_norm: of the difference, as a share of the norm of ``a``.
        cosine: -1 to 1.
        equal_share: of the elements that are the same, 0 to 1.
        elements, differing: how many there are, and how many are not the same.
        infinite: elements that are infinite in only one, or with another sign.
        zero_signs: zeros with another sign.
        only_zero_signs, only_nan_bits: whether nothing else differs.
    """

    max_abs: float | None
    mean_abs: float | None
    relative_norm: float | None
    cosine: float | None
    equal_share: float | None
    elements: int | None
    differing: int | None
    nan: NanCounts | None
    infinite: int | None
    zero_signs: int | None
    only_zero_signs: bool | None
    only_nan_bits: bool | None


class _Was(TypedDict, total=False):
    """``was`` is the name in ``a``, if different."""

    was: str


class ChangedRow(FiguresRow, _Was):
    """A tensor with different values."""

    name: str
    dtype: str
    shape: list[int]


class RecastRow(_FromText, FiguresRow, _Was):
    """A tensor with another dtype; ``equal_after_cast``: in one of the two dtypes (``None``: unknown)."""

    name: str
    to: str
    shape: list[int]
    equal_after_cast: bool | None


class _Dtypes(TypedDict, total=False):
    from_dtype: str
    to_dtype: str


class ReshapedRow(_FromShape, _Was, _Dtypes):
    """A tensor with another shape; ``same_values``: the same bits in order (``None``: not as many, or other dtypes)."""

    name: str
    to: list[int]
    same_values: bool | None


class RenamedRow(_FromText):
    """A tensor with another name; see `ckptkit.differences.pairs`."""

    to: str
    by: Literal["content", "shape"]
    confidence: Literal["certain", "likely", "guess"]


class ValueRow(TypedDict):
    """A value that is not a plain tensor and differs, in words; ``at``: where in it the first difference is."""

    name: str
    a: str
    b: str
    at: str


class LostRow(TypedDict):
    """What could not be compared, and why."""

    name: str
    reason: str


class ScalarRow(TypedDict):
    """A scalar that differs; ``None``: one has none."""

    key: str
    a: Any
    b: Any


class SectionRow(TypedDict):
    """Another part that contains tensors.

    Attributes:
        a, b: how many tensors it has; ``None``: that file has no such part.
        differing: how many of them differ; ``equal``: whether none does.  ``None``: only one has it.
    """

    path: str
    kind: str
    a: int | None
    b: int | None
    differing: int | None
    equal: bool | None


class TreeRow(TypedDict):
    """A place in the files' trees that differs; ``a`` and ``b`` are shortened (``None``: there is nothing)."""

    path: str
    what: Literal["tensor", "value", "order"]
    a: str | None
    b: str | None
    max_abs: float | None


class TieRow(TypedDict):
    """Names that are one tensor in only one of the files."""

    names: list[str]
    tied_in: Literal["a", "b"]


class ModuleRow(TypedDict):
    """A module, or a tensor, that sums up differences.

    Attributes:
        tensors, differing: how many are in it, and how many of them differ.
        statuses: how many are ``"changed"``, ``"recast"`` and so on.
        max_abs: the largest difference of an element in it.
    """

    module: str
    tensors: int
    differing: int
    statuses: dict[str, int]
    max_abs: float | None


class DiffDocument(TypedDict):
    """The document of ``ckptkit diff``; `Difference` describes the fields."""

    schema_version: int
    equal: bool
    same_beside: bool
    ok: bool
    summary: str
    a: DiffFile
    b: DiffFile
    tensors: int
    unchanged: int
    added: list[str]
    removed: list[str]
    renamed: list[RenamedRow]
    reshaped: list[ReshapedRow]
    recast: list[RecastRow]
    changed: list[ChangedRow]
    within_tolerance: list[ChangedRow]
    values: list[ValueRow]
    not_compared: list[LostRow]
    same_order: bool
    metadata: list[ScalarRow]
    training: list[ScalarRow]
    sections: list[SectionRow]
    tree: list[TreeRow]
    tree_differences: int
    ties: list[TieRow]
    modules: list[ModuleRow]
    findings: list[FindingDocument]


_Row = TypeVar("_Row")

_MOST_NAMED = 3
"""Modules that the verdict names."""

_MOST_ROWS = 20
"""Modules that a notebook shows."""

_VERBS = {
    "changed": "changed",
    "recast": "has another dtype",
    "reshaped": "has another shape",
    "added": "was added",
    "removed": "was removed",
    "not compared": "was not compared",
}
"""The verdict's words for a module in which everything changed in the same way; otherwise its tensors differ."""

_PLURALS = {"differs": "differ", "has another dtype": "have another dtype", "has another shape": "have another shape",
            "was added": "were added", "was removed": "were removed",
            "was not compared": "were not compared"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What changed from a checkpoint ``a`` to a checkpoint ``b``, whatever their containers.

    Names are those in ``b``, or for removed tensors those in ``a``.  Every list is JSON-ready.

    Attributes:
        a, b: the files.
        unchanged: how many tensors have the same name, shape, dtype and bits in both.
        added, removed: names that only ``b`` has, and names that only ``a`` has.
        renamed: tensors with a different name.
        reshaped: tensors with a different shape.
        recast: tensors with a different dtype.
        changed: tensors with different values, the largest change first.
        within_tolerance: the same for tensors that differ only within the tolerance.
        values: values that are not plain tensors (quantized, extra state) and differ.
        not_compared: what could not be compared.
        same_order: whether the values that both have are in the same order.
        metadata, training: what differs of each.
        sections: the other parts that contain tensors.
        tree: every difference in the files' trees: beside the weights, in attributes of modules and of tensors, in
            classes and settings.  Tensors come first, then the rest in file order; at most 1,000 are listed.
        tree_differences: how many there are.
        ties: names that are tied in only one of the files.
        modules: the differences summed up by module; see `ckptkit.differences.rolled_up`.
        findings: anything noteworthy.
        strict: whether differences beside the tensors count for `ok`.
    """

    a: DiffFile
    b: DiffFile
    unchanged: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[RenamedRow, ...] = ()
    reshaped: tuple[ReshapedRow, ...] = ()
    recast: tuple[RecastRow, ...] = ()
    changed: tuple[ChangedRow, ...] = ()
    within_tolerance: tuple[ChangedRow, ...] = ()
    values: tuple[ValueRow, ...] = ()
    not_compared: tuple[LostRow, ...] = ()
    same_order: bool = True
    metadata: tuple[ScalarRow, ...] = ()
    training: tuple[ScalarRow, ...] = ()
    sections: tuple[SectionRow, ...] = ()
    tree: tuple[TreeRow, ...] = ()
    tree_differences: int = 0
    ties: tuple[TieRow, ...] = ()
    modules: tuple[ModuleRow, ...] = ()
    findings: tuple[Finding, ...] = ()
    strict: bool = False

    def __repr__(self) -> str:
        return f"<Difference: {printable(self.summary):.180}>"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, both files, and the modules that differ."""
        from ckptkit.display import html_block

        rows = [
            (
                row["module"] or "(whole)",
                f"{row['differing']:,} of {row['tensors']:,}",
                ", ".join(f"{count:,} {status}" for status, count in row["statuses"].items()),
                "" if row["max_abs"] is None else f"{row['max_abs']:.4g}",
            )
            for row in self.modules[:_MOST_ROWS]
        ]
        lines = [
            f"{side}: {file['path']}, {file['format']}, {human_size(file['size'])}"
            for side, file in (("A", self.a), ("B", self.b))
        ]
        lines += [finding.line for finding in self.findings[:_MOST_ROWS]]
        headers = ("module", "tensors", "", "max |b-a|") if rows else ()
        left_out = len(self.modules) - len(rows)
        return html_block(self.summary, lines, headers, rows, left_out, state="ok" if self.ok else "failed")

    @property
    def equal(self) -> bool:
        """Whether both have the same tensors: names, shapes, dtypes, values; in every part and place that both have."""
        differs = (
            self.added or self.removed or self.renamed or self.reshaped or self.recast or self.changed
            or self.values or self.not_compared or any(section["equal"] is False for section in self.sections)
            or any(row["what"] == "tensor" for row in self.tree)
        )  # fmt: skip
        return not differs

    @property
    def same_beside(self) -> bool:
        """Whether metadata, ties and the whole trees are also the same; containers and devices do not count."""
        alone = any(section["equal"] is None for section in self.sections)
        return not (self.metadata or self.training or self.ties or self.tree_differences or alone)

    @property
    def ok(self) -> bool:
        """Whether the exit code is 0: `equal` and, if strict, `same_beside`."""
        return self.equal and (self.same_beside or not self.strict)

    @property
    def tensors(self) -> int:
        """Number of tensors and other values in the weights of either; those in both count once."""
        touched = {each["name"] for each in (*self.reshaped, *self.recast, *self.changed, *self.within_tolerance)}
        touched |= {each["name"] for each in (*self.values, *self.not_compared)} | {each["to"] for each in self.renamed}
        return self.unchanged + len(touched) + len(self.added) + len(self.removed)

    @property
    def summary(self) -> str:
        """The verdict: ``"only fc changed; 120 of 122 tensors are bit-identical"``."""
        share = share_of(self.unchanged, self.tensors, "tensor", "is", "are")
        every = "the only tensor is" if self.unchanged == 1 else f"all {count_of(self.unchanged, 'tensor')} are"
        everything = f"{every} bit-identical" if self.tensors else "neither contains a tensor"
        if self.equal:
            within = f"{share} bit-identical, the others are within tolerance"
            told = within if self.within_tolerance else everything
            return told if self.ok else f"{told}; what is stored beside them differs"
        if not self.modules:
            apart = [
                section["path"] or "the rest of the file" for section in self.sections if section["equal"] is False
            ] or [row["path"] or "the rest of the file" for row in self.tree if row["what"] == "tensor"]
            told = listed(apart, _MOST_NAMED, last=" and ")
            return f"{everything}; beside them {told} {'differs' if len(apart) == 1 else 'differ'}"
        return f"{self._told}; {share} bit-identical{' under the same name' if self.renamed else ''}"

    @property
    def _told(self) -> str:
        """What differs, where, and how."""
        counts: Counter[str] = Counter()
        for row in self.modules:
            counts.update(row["statuses"])
        total = sum(counts.values())
        kind = next(iter(counts)) if len(counts) == 1 else ""
        if kind == "recast" and all(row["equal_after_cast"] for row in self.recast):
            return f"{count_of(total, 'tensor')} {'is' if total == 1 else 'are'} recast, equal after the cast"
        if kind == "renamed":
            return f"{count_of(total, 'tensor')} {'has' if total == 1 else 'have'} another name and the same bits"
        names = [row["module"] for row in self.modules]
        if len(names) <= _MOST_NAMED and all(names) and all(row["differing"] == row["tensors"] for row in self.modules):
            verb = _VERBS.get(kind, "differs")
            told = listed(names, _MOST_NAMED, last=" and ")
            return f"only {told} {verb if len(names) == 1 else _PLURALS.get(verb, verb)}"
        each = ", ".join(f"{count:,} {status}" for status, count in counts.items())
        return f"{count_of(total, 'tensor')} {'differs' if total == 1 else 'differ'} ({each})"

    def raise_if_failed(self) -> None:
        """Raise when it is not `ok`.

        Raises:
            FailedReportError: its message says what differs.
        """
        if not self.ok:
            lines = [f"{self.a['path']} and {self.b['path']}: {self.summary}"]
            lines += [f"{f.code}: {f.message}" + (f" (fix: {f.fix})" if f.fix else "") for f in self.findings]
            raise FailedReportError("\n".join(lines))

    def to_dict(self) -> DiffDocument:
        """The difference as one JSON-ready document."""

        def rows(each: tuple[_Row, ...]) -> list[_Row]:
            return [*map(copy, each)]

        return {
            "schema_version": SCHEMA_VERSION,
            "equal": self.equal,
            "same_beside": self.same_beside,
            "ok": self.ok,
            "summary": self.summary,
            "a": copy(self.a),
            "b": copy(self.b),
            "tensors": self.tensors,
            "unchanged": self.unchanged,
            "added": [*self.added],
            "removed": [*self.removed],
            "renamed": rows(self.renamed),
            "reshaped": rows(self.reshaped),
            "recast": rows(self.recast),
            "changed": rows(self.changed),
            "within_tolerance": rows(self.within_tolerance),
            "values": rows(self.values),
            "not_compared": rows(self.not_compared),
            "same_order": self.same_order,
            "metadata": rows(self.metadata),
            "training": rows(self.training),
            "sections": rows(self.sections),
            "tree": rows(self.tree),
            "tree_differences": self.tree_differences,
            "ties": rows(self.ties),
            "modules": rows(self.modules),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_json(self) -> str:
        """The difference as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
