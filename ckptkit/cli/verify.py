"""``ckptkit verify PATH --model REF``: load into a reference model and examine what it computes; a line a check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ckptkit import api
from ckptkit.bytesource import pace
from ckptkit.cli import closing, ending
from ckptkit.cli import options as ui
from ckptkit.cli.closing import combined_lines, verified
from ckptkit.cli.tables import padded, wrapped
from ckptkit.options import VerifyOptions
from ckptkit.report import printable

if TYPE_CHECKING:
    from ckptkit.documents import VerifyDocument
    from ckptkit.report import Severity

__all__ = ["RENDERERS", "Row", "check_rows", "command", "text"]

_SOUND = {
    "load": "every tensor in the model matches the file",
    "weights": "finite, no matrix all zero, running variances positive",
}
"""What a check that found nothing has to say, where it leaves no note."""

_GAP = "  "


class Row(NamedTuple):
    """A line of the screen.

    Attributes:
        name: the check; ``""``: the one above.
        severity: of the finding; ``None``: there is none.
        label: what came of it.
        text: what is to be said.
        fix: the command that fixes it.
        code: of the finding, which the text ends with.
    """

    name: str
    severity: Severity | None
    label: str
    text: str
    fix: str | None = None
    code: str | None = None


def text(document: VerifyDocument, view: ui.View) -> Iterator[str]:
    """Each check that was run on a line of its own, aligned; further findings and fixes below it; the verdict last."""
    style, rows = view.style, list(check_rows(document))
    width = max((len(check["name"]) for check in document["checks"] if check["run"]), default=0)
    is_partial = any(finding["code"] == "not-loaded" for finding in document["findings"])
    labels = len("not loaded") if is_partial else len("warning")
    for row in rows:
        color = {"ok": "green", "failed": "red"}.get(row.label, ui.COLORS.get(f"{row.severity}"))
        label = style(padded(row.label, labels), fg=color, bold=row.label != "ok")
        indent = width + labels + 2 * len(_GAP)
        said = printable(row.text.removesuffix(f" [{row.code}]"))
        said += f" {style(f'[{row.code}]', dim=True)}" if row.code else ""
        yield from wrapped(f"{padded(row.name, width)}{_GAP}{label}{_GAP}{said}", view.width, indent)
        if row.fix:
            yield " " * indent + _GAP + printable(row.fix)
    yield from combined_lines(document.get("combined_fix"), document["findings"], view.width)
    if not view.quiet:
        verdict = style("passed", fg="green", bold=True) if document["ok"] else style("FAILED", fg="red", bold=True)
        line = f"{printable(document['path'])}: {verdict} against {printable(document['reference'])}"
        yield from wrapped(line, view.width)


def check_rows(document: VerifyDocument) -> Iterator[Row]:
    """What was told before the first check, then each check that was run with what it found."""
    checks = [(None, None), *((check["name"], check) for check in document["checks"])]
    for name, check in checks:
        found = [finding for finding in document["findings"] if finding["check"] == name]
        is_failed = any(finding["severity"] == "error" for finding in found)
        for number, finding in enumerate(found):
            severity, label = finding["severity"], "failed" if is_failed else "ok"
            label = "not loaded" if finding["code"] == "not-loaded" else label
            label = severity if severity != "info" else "ok" if number else label
            said = f"{finding['message']} [{finding['code']}]"
            yield Row("" if number else name or "", severity, label, said, finding["fix"], finding["code"])
        if check is not None and check["run"] and not found:
            yield Row(check["name"], None, "ok", check["note"] or _SOUND.get(check["name"], ""))


RENDERERS: dict[str, ui.Renderer] = {
    "text": text,
    "markdown": ui.later("markdown.verify"),
    "html": ui.later("html.verify"),
}


@click.command(
    "verify",
    epilog=ui.with_examples(
        "ckptkit verify clean.safetensors --model torchvision:resnet18",
        "ckptkit verify hf://user/repo/model.safetensors --model timm:resnet50",
        "ckptkit verify head10.pth --model torchvision:resnet18 --model-arg num_classes=10",
        "ckptkit verify net.pth --model models/net.py:build --input-shape 1,3,64,64",
        "ckptkit verify half.safetensors --model torchvision:resnet18 --against original.pth",
        "ckptkit verify original.pth --model torchvision:resnet18 --write-golden golden.safetensors",
        "ckptkit verify released.safetensors --golden golden.safetensors",
    ),
)
@ui.path_argument("path")
@ui.options_of(VerifyOptions)
@ui.common_options(RENDERERS)
def command(path: str, output: str, quiet: bool, color: str, **given: Any) -> int:
    """Load PATH strictly into a reference model, and check what it computes.

    ckptkit reads the checkpoint and never executes it (except with --unsafe-load); it does run the reference's code.
    Exit code 0: it fits, runs and agrees; 1: it does not; 2: it could not be checked.

    Outputs agree if no element differs by more than atol + rtol times the largest magnitude in the output.  Default
    rtol, by the least precise dtype of weights and outputs: float64 1.5e-8, float32 3.5e-4, float16 3.2e-2, bfloat16
    8.9e-2.  Default atol: four times the output's own noise, measured by computing it again with another number of
    threads, in another batch and with different rounding; a golden file keeps the noise from when it was written.
    """
    ending.keep_stdout()
    with ui.json_errors(output == "json"), ending.ticking():
        pace.enter("loading torch")
        report = api.verify(path, **ui.keywords_of(VerifyOptions, given))
    written = any(finding.code == "golden-written" for finding in report.findings)
    code = ending.verdict(0 if report.ok else 1, f"{printable(given['write_golden'])} was written" if written else "")
    if output == "text":
        closing.summary(verified(report.to_dict()))
    ui.show(report.to_dict(), output, RENDERERS, ui.View(ui.styler(color), ui.terminal_width(), quiet))
    return code
