"""``ckptkit check [PATHS]``: files against a manifest and a policy, as a gate in CI.

The screen has a line a file, what is wrong with it below, and the verdict last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptkit import api
from ckptkit.cli import ending
from ckptkit.cli import options as ui
from ckptkit.cli.explain import complete_reference
from ckptkit.cli.outputs import findings_of, github, junit, sarif
from ckptkit.dtypes import DTYPES
from ckptkit.formats.folder import passed_over_text
from ckptkit.released.config import find_config
from ckptkit.released.policy import CONTAINERS
from ckptkit.released.results import exit_code_of, verdict_of
from ckptkit.report import human_size, printable

if TYPE_CHECKING:
    from ckptkit.documents import CheckDocument, CheckedFile, CheckFindingDocument

__all__ = ["RENDERERS", "command", "text"]

_MOST = 160
"""Characters of an expected or found value."""


def text(document: CheckDocument, view: ui.View) -> Iterator[str]:
    """The lines; with ``quiet`` only those of what is wrong."""
    for file, findings in findings_of(document):
        if view.quiet and not findings:
            continue
        yield _head(file, findings, view.style)
        for finding in findings:
            yield from _finding(finding, view.style)
    if not view.quiet:
        if document["passed_over"]:
            yield passed_over_text(document["passed_over"])
        color = "green" if exit_code_of(document) == 0 else "red"
        yield view.style(verdict_of(document), fg=color, bold=True)


def _head(file: CheckedFile, findings: Sequence[CheckFindingDocument], style: ui.Style) -> str:
    outcome, color = ("ok", "green") if file["ok"] else ("FAILED", "red")
    if not file["checked"] and not file["ok"]:
        outcome = "FAILED" if any(f["code"] == "file-missing" for f in findings) else "NOT CHECKED"
    size = "" if file["size"] is None else f" ({human_size(file['size'])}; {', '.join(file['rules'])})"
    return f"{printable(file['path'])}: {style(outcome, fg=color, bold=outcome != 'ok')}{size}"


def _finding(finding: CheckFindingDocument, style: ui.Style) -> Iterator[str]:
    severity = finding["severity"]
    label = style(severity, fg=ui.COLORS[severity], bold=severity == "error")
    yield f"  {label}: {finding['rule']}: {printable(finding['message'])} [{finding['code']}]"
    for name, value in (("expected", finding["expected"]), ("found", finding["found"])):
        if value is not None:
            yield f"      {name}: {_value(value)}"
    if finding["fix"]:
        yield f"      fix: {printable(finding['fix'])}"


def _value(value: object) -> str:
    shown = printable(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return shown if len(shown) <= _MOST else f"{shown[: _MOST - 1]}…"


RENDERERS: dict[str, ui.Renderer] = {
    "text": text,
    "junit": junit,
    "sarif": sarif,
    "github": github,
    "markdown": ui.later("markdown.check"),
}

_OUTPUTS = ("text", "json", *(name for name in RENDERERS if name != "text"))


@click.command(
    "check",
    epilog=ui.with_examples(
        "ckptkit check --manifest weights/weights.lock.json",
        "ckptkit check weights/ --no-pickle --max-size 2GB --no-nan",
        "ckptkit check model.pth --max-trust safe --allow-dtype float32 --allow-dtype int64 --location cpu",
        "ckptkit check model.safetensors --fits torchvision:resnet18 --forward",
        "ckptkit check weights/ --manifest weights/weights.lock.json --format junit > check.xml",
        "git diff --name-only -z HEAD~1 | xargs -0 ckptkit check --no-pickle --skip-others",
    ),
)
@ui.path_argument("paths", nargs=-1)
@click.option("--manifest", metavar="FILE", help="What the files must be, as ckptkit manifest wrote it.")
@click.option("--no-pickle", is_flag=True, default=None, help="No file may hold a pickle.")
@click.option(
    "--max-trust",
    type=click.Choice(["safe", "needs_trust"]),
    help="The most a loader may have to trust a file with; hostile files never pass.",
)
@click.option(
    "--require-format",
    multiple=True,
    type=click.Choice(CONTAINERS),
    metavar="CONTAINER",
    help="The container a file must be, as inspect names it; repeatable.",
)
@click.option("--max-size", metavar="SIZE", help="The most a file may have, with its shards: 2GB, 500MB.")
@click.option(
    "--allow-dtype",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    metavar="DTYPE",
    help="A dtype tensors may have; repeatable.",
)
@click.option("--no-nan", is_flag=True, default=None, help="No tensor may hold NaN, no parameter Inf; reads the data.")
@click.option("--no-optimizer", is_flag=True, default=None, help="No file may hold an optimizer's state.")
@click.option(
    "--no-prefix", is_flag=True, default=None, help="No name may carry a wrapper's prefix: module., _orig_mod. ..."
)
@click.option(
    "--location",
    multiple=True,
    callback=ui.checked_devices,
    metavar="DEV",
    help="A device tag storages may have: cpu; repeatable.",
)
@click.option(
    "--allow-part",
    is_flag=True,
    default=None,
    help="A file may be one part of a sharded checkpoint, without the others.",
)
@click.option(
    "--fits",
    metavar="REF",
    shell_complete=complete_reference,
    help="The model every file must load into, as for verify; needs torch.",
)
@click.option("--forward", is_flag=True, default=None, help="Run the model too; needs torch.")
@click.option(
    "--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Argument of the factory; repeatable."
)
@click.option("--input-shape", "shapes", multiple=True, metavar="N,C,H,W", help="Shape of an input; repeatable.")
@ui.tag_option
@ui.tp_rules_option
@click.option(
    "--skip-others", is_flag=True, help="Pass over named files that are not checkpoints; it is fine if none is left."
)
@click.option("--config", metavar="FILE", help="A ckptkit.toml or pyproject.toml; default: the nearest upward.")
@ui.ignore_checksums
@ui.storage_option
@ui.common_options(
    RENDERERS,
    multiple=True,
    default=(),
    type=click.Choice([*_OUTPUTS, *CONTAINERS]),
    metavar="|".join(_OUTPUTS),
    help="Output; with the name of a container, the same as --require-format.",
)
def command(
    paths: tuple[str, ...],
    manifest: str | None,
    config: str | None,
    require_format: tuple[str, ...],
    model_args: tuple[str, ...],
    shapes: tuple[str, ...],
    tag: str | None,
    skip_others: bool,
    storage_options: dict[str, Any],
    output: tuple[str, ...],
    quiet: bool,
    color: str,
    **policy: Any,
) -> int:
    """Hold checkpoints against a manifest and a policy, without running or loading them.

    A folder stands for the checkpoints below it, found by their content; what else lies there is counted, and under
    --no-pickle and --max-trust its pickles count too. An index stands for its shards, and so does each of them.
    Without PATHS, all that the manifest names is checked, and nothing else may lie in the folders it was made of.
    Whatever is asked for, a file must be readable and may not be hostile.

    The same is configured under [tool.ckptkit] in pyproject.toml, or in ckptkit.toml, with other values for some
    files under [[tool.ckptkit.overrides]], or [[overrides]]; command-line options win.

    Exit code 0: all is as it must be; 1: something is not; 2: something could not be checked.
    """
    *_, wanted = ("text", *(name for name in output if name not in CONTAINERS))
    policy["require_format"] = (*require_format, *(name for name in output if name in CONTAINERS))
    for name in ("require_format", "allow_dtype", "location", "ignore_checksums"):
        policy[name] = policy[name] or None  # not given: what is configured stands
    ending.keep_stdout()
    with ui.json_errors(wanted == "json"):
        report = api.check(
            paths,
            manifest=manifest,
            config=config if config is not None else find_config(os.curdir),
            model_args=ui.key_values("--model-arg", model_args) or None,
            input_shapes=[ui.input_shape(shape) for shape in shapes] or None,
            tag=tag,
            skip_others=skip_others,
            storage_options=storage_options,
            **policy,
        )
    code = ending.verdict(report.exit_code)
    seconds = {result.path: result.seconds for result in report.results}
    document, view = report.to_dict(), ui.View(ui.styler(color), quiet=quiet, started=report.started, seconds=seconds)
    if wanted in ("text", "json"):
        ui.show(document, wanted, RENDERERS, view)
    else:  # programs that read these expect UTF-8
        ending.write("".join(f"{line}\n" for line in RENDERERS[wanted](document, view)).encode("utf-8"))
    return code
