"""What a failed assertion says: what, where, expected, found; then a line for each finding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.report import Finding, Report, count_of

if TYPE_CHECKING:
    from ckptkit.differences import Difference
    from ckptkit.released.results import CheckFinding
    from ckptkit.testing.subjects import Subject

__all__ = ["difference_lines", "finding_lines", "message", "require", "violation_lines"]

_MOST_LINES = 20
"""Lines of a list in a message; the rest is counted."""


def message(title: str, facts: Iterable[tuple[str, str]], lines: Sequence[str]) -> str:
    """What, where, expected, found; then the list."""
    head = [title, *(f"  {name + ':':10}{text}" for name, text in facts)]
    more = [f"... and {len(lines) - _MOST_LINES:,} more"] if len(lines) > _MOST_LINES else []
    return "\n".join([*head, *(f"- {line}" for line in lines[:_MOST_LINES]), *more])


def finding_lines(findings: Iterable[Finding], *, fixes: bool = True) -> Iterator[str]:
    """One line a finding, with its fix; without, where that would name a file that is gone."""
    for finding in findings:
        yield f"{finding.code}: {finding.message}{_fix(finding, fixes)}"


def violation_lines(findings: Iterable[CheckFinding], called: str | None = None) -> Iterator[str]:
    """One line a violation of a policy or a manifest; ``called`` stands for the path of a file that is gone."""
    for each in findings:
        if each.severity == "error":
            facts = f"expected {_told(each.expected)}, found {_told(each.found)}"
            yield f"{called or each.path}: {each.rule}: {each.message} ({facts}){_fix(each, called is None)}"


def _fix(finding: Finding, wanted: bool) -> str:
    return f" (fix: {finding.fix})" if wanted and finding.fix else ""


def _told(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def require(report: Report, title: str, subject: Subject, expected: str) -> None:
    """Raise `AssertionError` where a report on weights is not ok."""
    __tracebackhide__ = True
    if report.ok:
        return
    failing = [finding for finding in report.findings if finding.severity == "error"]
    facts = [
        ("weights", subject.called),
        ("expected", expected),
        ("found", ", ".join(dict.fromkeys(finding.code for finding in failing))),
    ]
    raise AssertionError(message(title, facts, [*finding_lines(failing, fixes=not subject.is_temporary)]))


def difference_lines(difference: Difference) -> Iterator[str]:
    """One line a difference."""
    for each in difference.changed:
        was = f" ({each['was']} in a)" if "was" in each else ""
        yield f"changed: {each['name']}{was}, {_figures(each)}"
    yield from (f"only in b: {name}" for name in difference.added)
    yield from (f"only in a: {name}" for name in difference.removed)
    yield from (f"renamed: {each['from']} in a, {each['to']} in b" for each in difference.renamed)
    for kind, rows in (("shape", difference.reshaped), ("dtype", difference.recast)):
        yield from (f"{kind}: {each['name']}, {each['from']} in a, {each['to']} in b" for each in rows)
    yield from (f"changed: {each['name']}, {each['a']} in a, {each['b']} in b" for each in difference.values)
    yield from (f"not compared: {each['name']}, {each['reason']}" for each in difference.not_compared)


def _figures(row: Mapping[str, Any]) -> str:
    """By how much the values of a tensor differ."""
    if row["equal_share"] is None:
        return "whose values cannot be computed"
    told = [f"{row['differing']:,} of {count_of(row['elements'], 'element')}"]
    if row["only_zero_signs"]:
        told.append("by the sign of zeros alone")
    elif row["max_abs"] is not None:
        told.append(f"by at most {row['max_abs']:.4g}, on average {row['mean_abs']:.4g}")
    told += [f"{row['nan'][side]:,} NaN in {side} alone" for side in "ab" if row["nan"][side]]
    told += [f"{row['infinite']:,} infinite in one"] * bool(row["infinite"])
    return ", ".join(told)
