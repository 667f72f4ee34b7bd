"""The screen that ``ckptkit verify`` shows: a line a check, what each found, and the figures that matter."""

from __future__ import annotations

from ckptkit.cli.options import COLORS, Style, echo, printable
from ckptkit.report import Finding, Report, Severity, worst

__all__ = ["echo_report"]

_SOUND = {
    "load": "every tensor in the model is the file's",
    "weights": "finite, no matrix all zero, running variances positive",
}
"""What a check that found nothing has to say, where it leaves no note."""

_GAP = "  "


def echo_report(report: Report, style: Style) -> None:
    """Each check that was run on a line of its own, aligned; further findings and fixes below it."""
    checks = report.details["checks"]
    width = max((len(check["name"]) for check in checks if check["run"]), default=0)
    findings = list(report.findings)
    labels = len("not loaded") if any(finding.code == "not-loaded" for finding in findings) else len("warning")

    def line(name: str, severity: Severity | None, text: str, label: str = "ok") -> None:
        label = (label if severity in (None, "info") else str(severity)).ljust(labels)
        color = {"ok": "green", "failed": "red"}.get(label.strip(), COLORS.get(str(severity)))
        echo(f"{name.ljust(width)}{_GAP}{style(label, fg=color, bold=severity == 'error')}{_GAP}{printable(text)}")

    def told(name: str, found: list[Finding]) -> None:
        label = "failed" if worst(found) == "error" else "ok"
        for i, finding in enumerate(found):
            said = "not loaded" if finding.code == "not-loaded" else label
            line("" if i else name, finding.severity, f"{finding.message} [{finding.code}]", said if not i else "ok")
            if finding.fix:
                echo(" " * (width + len(_GAP) + labels) + _GAP + _GAP + printable(finding.fix))

    # Findings stand in the order of the checks; those before the first are not any check's.
    position = len(findings) - sum(len(check["codes"]) for check in checks)
    told("", findings[:position])
    for check in checks:
        found = findings[position : position + len(check["codes"])]
        position += len(found)
        told(check["name"], found)
        if check["run"] and not found:
            line(check["name"], None, check["note"] or _SOUND.get(check["name"], ""))
