"""The weights that assertions accept (a path, an open file, a dict of tensors, a module), and their messages.

A message says what, where, expected and found; then comes a line for each finding.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ckptkit import api
from ckptkit.report import Finding, Report, count_of
from ckptkit.startup import dataclass

if TYPE_CHECKING:
    import torch

    from ckptkit.checkpoint import Checkpoint

    Weights = str | os.PathLike[str] | api.CheckpointFile | Mapping[str, torch.Tensor] | torch.nn.Module
    from ckptkit.differences import Difference
    from ckptkit.released.results import CheckFinding

__all__ = [
    "WeightsLike",
    "difference_lines",
    "file_described",
    "finding_lines",
    "message",
    "on_disk",
    "opened",
    "require_passed",
    "violation_lines",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLike:
    """Weights as a file.

    Attributes:
        path: the file.
        section: path of the weights in it, if one was selected.
        called: what messages say.
        is_temporary: whether the file is gone when the assertion has failed.
    """

    path: str
    section: str | None = None
    called: str
    is_temporary: bool = False


@contextmanager
def on_disk(weights: Weights, name: str) -> Iterator[WeightsLike]:
    """The weights as a file: their own, or one that is gone afterwards."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(weights, torch.nn.Module):
        from ckptkit.verifier.foreign import foreign

        module: Any = weights
        called = f"a {type(module).__name__} in memory"
        with foreign(f"{name}: state_dict() of {called} failed"):
            weights = module.state_dict()
    else:
        called = "a dict in memory"
    if isinstance(weights, (str, os.PathLike)):
        path = os.fsdecode(weights)
        yield WeightsLike(path=path, called=path)
    elif isinstance(weights, api.CheckpointFile) and not weights.checkpoint.operations:
        several = sum(section.is_weights for section in weights.sections) > 1
        section = weights.checkpoint.origin.state_path if several else None
        yield WeightsLike(path=weights.path, section=section, called=file_described(weights))
    elif isinstance(weights, (api.CheckpointFile, Mapping)):
        with tempfile.TemporaryDirectory(prefix="ckptkit-") as folder:
            path = os.path.join(folder, "weights.pth")
            if isinstance(weights, api.CheckpointFile):
                weights.rewrite(_weights_only()).save(path, check=False, receipt=False)
                called = f"{file_described(weights)}, rewritten"
            else:
                _save(weights, path, name)
                called = f"{called} ({count_of(len(weights), 'tensor')})"
            yield WeightsLike(path=path, called=called, is_temporary=True)
    else:
        raise TypeError(
            f"{name} is of type {type(weights).__name__}; expected a path, an open CheckpointFile, a dict of tensors "
            "or a module"
        )


@contextmanager
def opened(weights: Weights, name: str, strip_module: bool) -> Iterator[tuple[Checkpoint, str]]:
    """The weights as a checkpoint, with what messages call it."""
    from ckptkit.rewrite import StripModule

    rewriters = (StripModule(),) if strip_module else ()
    if isinstance(weights, api.CheckpointFile):
        yield weights.checkpoint.rewrite(*rewriters), file_described(weights)
    else:
        with on_disk(weights, name) as subject, api.open(subject.path) as file:
            called = file_described(file) if subject.called == subject.path else subject.called
            yield file.checkpoint.rewrite(*rewriters), called


def _weights_only() -> api.Rewriter:
    from ckptkit.rewrite import WeightsOnly

    return WeightsOnly()


def _save(weights: Mapping[str, Any], path: str, name: str) -> None:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise TypeError(f"{name} is a dict of {count_of(len(weights), 'value')}, none of them a torch.Tensor")
    torch.save(dict(weights), path)


def file_described(file: api.CheckpointFile) -> str:
    """An open file in a few words."""
    return f"{file.path} ({file.format}, {file.kind}, {count_of(len(file.state_dict), 'tensor')})"


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
    """One line per violation of a policy or a manifest; ``called`` replaces the path of a file that is gone."""
    for each in findings:
        if each.severity == "error":
            facts = f"expected {_told(each.expected)}, found {_told(each.found)}"
            yield f"{called or each.path}: {each.rule}: {each.message} ({facts}){_fix(each, called is None)}"


def _fix(finding: Finding, wanted: bool) -> str:
    return f" (fix: {finding.fix})" if wanted and finding.fix else ""


def _told(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def require_passed(report: Report, title: str, subject: WeightsLike, expected: str) -> None:
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
