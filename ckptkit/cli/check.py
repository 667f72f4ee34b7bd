"""``ckptkit check [PATHS]``: files against a manifest and a policy, as a gate in CI.

The screen that ``ckptkit check`` shows: a line a file, what is wrong with it below, and the verdict last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import click

from ckptkit import api
from ckptkit.cli import ending
from ckptkit.cli.explain import complete_reference
from ckptkit.cli.options import (
    COLORS,
    Style,
    checked_devices,
    common_options,
    echo,
    ignore_checksums,
    input_shape,
    json_errors,
    key_values,
    path_argument,
    styler,
    with_examples,
)
from ckptkit.dtypes import DTYPES
from ckptkit.formats.folder import passed_over_text
from ckptkit.released.config import find_config
from ckptkit.released.outputs import OUTPUTS
from ckptkit.released.policy import CONTAINERS
from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.report import human_size, printable

__all__ = ["command", "text"]


@click.command(
    "check",
    epilog=with_examples(
        "ckptkit check --manifest weights/weights.lock.json",
        "ckptkit check weights/ --no-pickle --max-size 2GB --no-nan",
        "ckptkit check model.pth --max-trust safe --allow-dtype float32 --allow-dtype int64 --location cpu",
        "ckptkit check model.safetensors --fits torchvision:resnet18 --forward",
        "ckptkit check weights/ --manifest weights/weights.lock.json --format junit > check.xml",
        "git diff --name-only -z HEAD~1 | xargs -0 ckptkit check --no-pickle --skip-others",
    ),
)
@path_argument("paths", nargs=-1)
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
    callback=checked_devices,
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
@click.option(
    "--skip-others", is_flag=True, help="Pass over named files that are not checkpoints; it is fine if none is left."
)
@click.option("--config", metavar="FILE", help="A ckptkit.toml or pyproject.toml; default: the nearest upward.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["text", *OUTPUTS, *CONTAINERS]),
    metavar="|".join(("text", *OUTPUTS)),
    help="Output; with the name of a container, the same as --require-format.",
)
@ignore_checksums
@common_options
def command(
    paths: tuple[str, ...],
    manifest: str | None,
    config: str | None,
    formats: tuple[str, ...],
    require_format: tuple[str, ...],
    model_args: tuple[str, ...],
    shapes: tuple[str, ...],
    skip_others: bool,
    as_json: bool,
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
    outputs = [name for name in formats if name not in CONTAINERS]
    output = "json" if as_json else outputs[-1] if outputs else "text"
    policy["require_format"] = (*require_format, *(name for name in formats if name in CONTAINERS))
    for name in ("require_format", "allow_dtype", "location", "ignore_checksums"):
        policy[name] = policy[name] or None  # not given: what is configured stands
    ending.keep_stdout()
    with json_errors(output == "json"):
        report = api.check(
            paths,
            manifest=manifest,
            config=config if config is not None else find_config(os.curdir),
            model_args=key_values("--model-arg", model_args) or None,
            input_shapes=[input_shape(shape) for shape in shapes] or None,
            skip_others=skip_others,
            **policy,
        )
    code = ending.verdict(report.exit_code)
    if output == "text":
        for line in text(report, styler(color), quiet=quiet):
            echo(line)
    else:
        ending.write(OUTPUTS[output](report).encode("utf-8"))
    return code


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
            yield passed_over_text(report.passed_over)
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
