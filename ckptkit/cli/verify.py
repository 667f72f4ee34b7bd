"""``ckptkit verify PATH --model REF``: load into a reference model and examine what it computes.

The screen that ``ckptkit verify`` shows: a line a check, what each found, and the figures that matter.
"""

from __future__ import annotations

from typing import Any

import click

from ckptkit import api
from ckptkit.cli import ending
from ckptkit.cli.explain import complete_reference
from ckptkit.cli.options import (
    COLORS,
    Style,
    common_options,
    echo,
    echo_json,
    json_errors,
    keywords_of,
    options_of,
    path_argument,
    printable,
    styler,
    with_examples,
)
from ckptkit.options import VerifyOptions
from ckptkit.report import Finding, Report, Severity, worst

__all__ = ["command", "echo_report"]


@click.command(
    "verify",
    epilog=with_examples(
        "ckptkit verify clean.safetensors --model torchvision:resnet18",
        "ckptkit verify head10.pth --model torchvision:resnet18 --model-arg num_classes=10",
        "ckptkit verify net.pth --model models/net.py:build --input-shape 1,3,64,64",
        "ckptkit verify half.safetensors --model torchvision:resnet18 --against original.pth",
        "ckptkit verify original.pth --model torchvision:resnet18 --write-golden golden.safetensors",
        "ckptkit verify released.safetensors --golden golden.safetensors",
    ),
)
@path_argument("path")
@options_of(VerifyOptions, model={"shell_complete": complete_reference})
@common_options
def command(path: str, as_json: bool, quiet: bool, color: str, **given: Any) -> int:
    """Load PATH into a reference model, strictly, and examine what it computes.

    The checkpoint is read by ckptkit and never executed (but with --unsafe-load); the reference's own code is.
    Exit code 0: it fits, runs and agrees; 1: it does not; 2: it could not be checked.

    Outputs agree when no element differs by more than atol + rtol times the largest magnitude in the output.
    Default rtol, by the least precise dtype of weights and outputs: float64 1.5e-8, float32 3.5e-4, float16 3.2e-2,
    bfloat16 8.9e-2. Default atol: four times the output's own noise, which is measured by computing it again on
    another number of threads, in another batch and with other rounding; a golden keeps that of when it was written.
    """
    ending.keep_stdout()
    with json_errors(as_json):
        report = api.verify(path, **keywords_of(VerifyOptions, given))
    written = any(finding.code == "golden-written" for finding in report.findings)
    code = ending.verdict(0 if report.ok else 1, f"{printable(given['write_golden'])} was written" if written else "")
    if as_json:
        echo_json(report.to_dict())
        return code
    style = styler(color)
    echo_report(report, style)
    verdict = style("passed", fg="green", bold=True) if report.ok else style("FAILED", fg="red", bold=True)
    if not quiet:
        echo(f"{printable(path)}: {verdict} against {printable(report.details['reference'])}")
    return code


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
