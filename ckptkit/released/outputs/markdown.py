"""A check's report as markdown, for the comment on a pull request or the summary of a job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptkit.formats.folder import told
from ckptkit.released.results import CheckFinding, CheckReport
from ckptkit.report import human_size, printable

__all__ = ["render"]

_MAX_ROWS = 200
"""Findings in the table: the longest comment a forge takes has 65,536 characters."""

_MAX_CELL = 200
"""Characters of a cell."""


def render(report: CheckReport) -> str:
    """The text: the verdict, a table of what is wrong, and the files with their rules folded away."""
    return "\n".join([*_lines(report), ""])


def _lines(report: CheckReport) -> Iterator[str]:
    mark = "passed" if report.exit_code == 0 else "**failed**"
    yield f"## ckptkit check: {mark}"
    yield ""
    yield f"{report.verdict[0].upper()}{report.verdict[1:]}."
    if report.passed_over:
        yield f"\nP{told(report.passed_over)[1:]}."
    if report.findings:
        yield ""
        yield "| file | rule | expected | found | |"
        yield "|:--|:--|:--|:--|:--|"
        for finding in report.findings[:_MAX_ROWS]:
            yield _row(finding)
        if len(report.findings) > _MAX_ROWS:
            yield f"\nand {len(report.findings) - _MAX_ROWS:,} more"
    fixes = list(dict.fromkeys(finding.fix for finding in report.findings[:_MAX_ROWS] if finding.fix))
    if fixes:
        yield "\n### To fix it\n"
        for fix in fixes:
            yield f"- {_code(fix)}"
    yield f"\n<details><summary>Files ({len(report.results):,})</summary>\n"
    yield "| file | size | rules | |"
    yield "|:--|--:|:--|:--|"
    for result in report.results[:_MAX_ROWS]:
        size = "" if result.size is None else human_size(result.size)
        outcome = "ok" if result.ok and result.is_checked else "**failed**" if result.is_checked else "**not checked**"
        yield f"| {_code(result.path)} | {size} | {', '.join(result.rules)} | {outcome} |"
    if len(report.results) > _MAX_ROWS:
        yield f"\nand {len(report.results) - _MAX_ROWS:,} more"
    yield "\n</details>"


def _row(finding: CheckFinding) -> str:
    cells = [
        _code(finding.path),
        finding.rule,
        _value(finding.expected),
        _value(finding.found),
        f"{finding.severity}: {_escaped(finding.message)} (`{finding.code}`)",
    ]
    return f"| {' | '.join(cells)} |"


def _value(value: Any) -> str:
    if value is None:
        return ""
    return _code(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _code(text: str) -> str:
    text = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1].rstrip(chr(92)) + '…'}`" if text else ""


def _escaped(text: str) -> str:
    """Text in which nothing is markup: names come from a stranger."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))
