"""What changed between two checkpoints: the record that text, JSON and markdown are made of.

Differences rolled up by module: the highest one below which nothing stayed as it was stands for all in it.

Where only ``fc.weight`` and ``fc.bias`` changed that is ``fc``; where all of ``layer1.0.conv1`` changed and the rest of
``layer1.0`` did not, ``layer1.0.conv1``.  Counters of batches do not keep a module from standing for what is in it.
Where that makes more rows than can be read, modules of as many segments as still can be stand for what differs in
them.  Names are split on dots to *show* this; nothing is rebuilt from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.errors import FailedReportError
from ckptkit.report import SCHEMA_VERSION, Finding, count_of, share_of
from ckptkit.rewrite.names import module_paths

__all__ = ["UNCHANGED", "Difference", "rolled_up"]

Rows = tuple[Mapping[str, Any], ...]
"""Elements of a list of the JSON document."""

_MOST_NAMED = 3
"""Modules that the verdict names."""

_VERBS = {
    "changed": "changed",
    "recast": "has another dtype",
    "reshaped": "has another shape",
    "added": "was added",
    "removed": "was removed",
    "not compared": "was not compared",
}
"""What the verdict says of a module in which the same happened to all; others differ."""

_PLURALS = {"differs": "differ", "has another dtype": "have another dtype", "has another shape": "have another shape",
            "was added": "were added", "was removed": "were removed",
            "was not compared": "were not compared"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What changed from a checkpoint ``a`` to a checkpoint ``b``, whatever their containers.

    Names are those in ``b``, of removed tensors those in ``a``.  Every list is JSON-ready.

    Attributes:
        a, b: the files: ``path``, ``size``, ``format``, ``kind``, ``writer``, ``section``, ``tensors``, ``nbytes``,
            ``locations``, ``trust``.
        unchanged: how many tensors have the same name, shape, dtype and bits in both.
        added, removed: names that only ``b``, and only ``a``, has.
        renamed: ``from``, ``to``, ``by``, ``confidence``; see `ckptkit.differences.pairs`.
        reshaped: ``name``, ``from``, ``to``, ``same_values`` (the same bits in order; ``None``: not as many).
        recast: ``name``, ``from``, ``to``, ``equal_after_cast`` (``None``: no values that could be told), figures.
        changed: ``name``, ``dtype``, ``shape`` and figures (`ckptkit.differences.figures`), the largest change first.
        within_tolerance: the same of what is no difference because of the tolerance that was asked for.
        values: ``name``, ``a``, ``b`` of what is not a plain tensor (quantized, extra state) and differs; ``at``: where
            in it the first difference is.
        not_compared: ``name``, ``reason``.
        same_order: whether what both have stands in the same order.
        metadata, training: ``key``, ``a``, ``b`` of what differs; ``None`` where one has none.
        sections: the other parts that hold tensors: ``path``, ``kind``, tensors in ``a`` and in ``b`` (``None``: it
            has no such part), how many are ``differing``, ``equal`` (``None``: only one has it).
        tree: ``path``, ``what``, ``a``, ``b``, ``max_abs`` of all that differs in the files' trees: beside the weights,
            in attributes of modules and of tensors, in classes and settings.  ``what`` is ``"tensor"``, ``"value"`` or
            ``"order"`` (of keys); ``a`` and ``b`` are shortened (``None``: it has nothing there).  Tensors come first,
            then the order is the file's; at most 1,000 are listed.
        tree_differences: how many there are.
        ties: ``names``, ``tied_in`` of tensors that are one tensor in only one of the files.
        modules: the differences rolled up; see `ckptkit.differences.difference`.
        findings: what is remarkable about it.
        strict: whether what stands beside the tensors counts for `ok`.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    unchanged: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: Rows = ()
    reshaped: Rows = ()
    recast: Rows = ()
    changed: Rows = ()
    within_tolerance: Rows = ()
    values: Rows = ()
    not_compared: Rows = ()
    same_order: bool = True
    metadata: Rows = ()
    training: Rows = ()
    sections: Rows = ()
    tree: Rows = ()
    tree_differences: int = 0
    ties: Rows = ()
    modules: Rows = ()
    findings: tuple[Finding, ...] = ()
    strict: bool = False

    def __repr__(self) -> str:
        return f"<Difference: {self.summary}>"

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors: names, shapes, dtypes, values; in every part and place that both have."""
        differs = (
            self.added or self.removed or self.renamed or self.reshaped or self.recast or self.changed
            or self.values or self.not_compared or any(section["equal"] is False for section in self.sections)
            or any(row["what"] == "tensor" for row in self.tree)
        )  # fmt: skip
        return not differs

    @property
    def same_beside(self) -> bool:
        """Whether metadata, ties, and the whole trees are the same too; containers and devices do not count."""
        alone = any(section["equal"] is None for section in self.sections)
        return not (self.metadata or self.training or self.ties or self.tree_differences or alone)

    @property
    def ok(self) -> bool:
        """Whether the exit code is 0: `equal`, and where it was asked to be strict `same_beside`."""
        return self.equal and (self.same_beside or not self.strict)

    @property
    def tensors(self) -> int:
        """Tensors, and values that are none, in the weights of either; what both have counts once."""
        touched = {each["name"] for each in (*self.reshaped, *self.recast, *self.changed, *self.within_tolerance)}
        touched |= {each["name"] for each in (*self.values, *self.not_compared)} | {each["to"] for each in self.renamed}
        return self.unchanged + len(touched) + len(self.added) + len(self.removed)

    @property
    def summary(self) -> str:
        """The verdict: ``"only fc changed; 120 of 122 tensors are bit-identical"``."""
        share = share_of(self.unchanged, self.tensors, "tensor", "is", "are")
        every = "the only tensor is" if self.unchanged == 1 else f"all {count_of(self.unchanged, 'tensor')} are"
        everything = f"{every} bit-identical" if self.tensors else "neither holds a tensor"
        if self.equal:
            within = f"{share} bit-identical, the others are within tolerance"
            told = within if self.within_tolerance else everything
            return told if self.ok else f"{told}; what stands beside them differs"
        if not self.modules:
            apart = [
                section["path"] or "the rest of the file" for section in self.sections if section["equal"] is False
            ] or [row["path"] or "the rest of the file" for row in self.tree if row["what"] == "tensor"]
            return f"{everything}; beside them {_listed(apart)} {'differs' if len(apart) == 1 else 'differ'}"
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
            return f"only {_listed(names)} {verb if len(names) == 1 else _PLURALS.get(verb, verb)}"
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

    def to_dict(self) -> dict[str, Any]:
        """The difference as one JSON-ready document."""

        def rows(each: Rows) -> list[dict[str, Any]]:
            return [dict(row) for row in each]

        return {
            "schema_version": SCHEMA_VERSION,
            "equal": self.equal,
            "same_beside": self.same_beside,
            "ok": self.ok,
            "summary": self.summary,
            "a": dict(self.a),
            "b": dict(self.b),
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


def _listed(names: list[str]) -> str:
    """``"a, b and c"``, cut after a few."""
    if len(names) > _MOST_NAMED:
        names = [*names[:_MOST_NAMED], f"{len(names) - _MOST_NAMED:,} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


UNCHANGED = "unchanged"
"""The status of a tensor that is the same in both, or within tolerance."""

_MOST_ROWS = 24
"""Rows that can still be read."""

_MOST_SEGMENTS = 6
"""Segments of the name of a module that stands for what differs in it."""

_COUNTER = "num_batches_tracked"
"""What BatchNorm counts batches in: its last segment."""


def rolled_up(statuses: Mapping[str, str], largest: Mapping[str, float]) -> tuple[dict[str, Any], ...]:
    """One row for each module, or tensor, that stands for differences.

    Args:
        statuses: of every name: `UNCHANGED`, or what happened to it.
        largest: absolute difference of those that have one.

    Returns:
        ``module``, ``tensors`` (how many are in it), ``differing`` (how many of them differ), ``statuses`` (how many
        of each but `UNCHANGED`) and ``max_abs``.
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
    rows: dict[str, dict[str, Any]] = {}
    for name, status in differing.items():
        row = rows.setdefault(
            places[name],
            {"module": places[name], "tensors": 0, "differing": 0, "statuses": Counter(), "max_abs": None},
        )
        row["differing"] += 1
        row["statuses"][status] += 1
        if name in largest:
            row["max_abs"] = max(row["max_abs"] or 0, largest[name])
    for name in statuses:
        for path in {*_above(name), name} & rows.keys():
            rows[path]["tensors"] += 1
    return tuple({**row, "statuses": dict(row["statuses"])} for row in rows.values())


def _above(name: str) -> Iterator[str]:
    yield ""
    yield from module_paths(name)
