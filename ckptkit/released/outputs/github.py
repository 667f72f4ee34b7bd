"""A check's report as GitHub's workflow commands: an annotation a finding, beside the file in a pull request.

``::error file=PATH,title=TITLE::MESSAGE``; in values ``%``, carriage returns and newlines are escaped with their
codes, in properties ``:`` and ``,`` too, as ``@actions/core`` does (``escapeData`` and ``escapeProperty`` in
https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts).
"""

from __future__ import annotations

import os

from ckptkit.formats.folder import told
from ckptkit.released.results import CheckFinding, CheckReport
from ckptkit.report import printable

__all__ = ["render"]

_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def render(report: CheckReport) -> str:
    """The lines to print; the last is the verdict, for whoever reads the log."""
    passed_over = [told(report.passed_over)] if report.passed_over else []
    lines = (*map(_annotation, report.findings), *passed_over, f"ckptkit check: {report.verdict}")
    return "".join(f"{line}\n" for line in lines)


def _annotation(finding: CheckFinding) -> str:
    fix = f"\nFix: {printable(finding.fix)}" if finding.fix else ""
    path = _property(finding.path.replace(os.sep, "/"))
    title = _property(f"ckptkit {finding.rule}: {finding.code}")
    text = _data(f"{printable(finding.message)}{fix}")
    return f"::{_COMMANDS[finding.severity]} file={path},title={title}::{text}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")
