"""The screen that ``ckptkit check`` shows: a line a file, what is wrong with it below, and the verdict last."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.cli.options import COLORS, Style
from ckptkit.formats.folder import told
from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.report import human_size, printable

__all__ = ["text"]

_MOST = 160
"""Characters of an expected or found value."""


def text(report: CheckReport, style: Style, *, quiet: bool = False) -> Iterator[str]:
    """The lines; with ``quiet`` only those of what is wrong."""
    for result in report.results:
        if quiet and not result.findings:
            continue
        yield _head(result, style)
        for finding in result.findings:
            yield from _finding(finding, style)
    if not quiet:
        if report.passed_over:
            yield told(report.passed_over)
        color = "green" if report.exit_code == 0 else "red"
        yield style(report.verdict, fg=color, bold=True)


def _head(result: FileResult, style: Style) -> str:
    outcome, color = ("ok", "green") if result.ok else ("FAILED", "red")
    if not result.is_checked and not result.ok:
        outcome = "FAILED" if any(f.code == "file-missing" for f in result.findings) else "NOT CHECKED"
    size = "" if result.size is None else f" ({human_size(result.size)}; {', '.join(result.rules)})"
    return f"{printable(result.path)}: {style(outcome, fg=color, bold=outcome != 'ok')}{size}"


def _finding(finding: CheckFinding, style: Style) -> Iterator[str]:
    label = style(finding.severity, fg=COLORS[finding.severity], bold=finding.severity == "error")
    yield f"  {label}: {finding.rule}: {printable(finding.message)} [{finding.code}]"
    for name, value in (("expected", finding.expected), ("found", finding.found)):
        if value is not None:
            yield f"      {name}: {_value(value)}"
    if finding.fix:
        yield f"      fix: {printable(finding.fix)}"


def _value(value: object) -> str:
    shown = printable(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return shown if len(shown) <= _MOST else f"{shown[: _MOST - 1]}…"
