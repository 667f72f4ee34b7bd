"""``ckptkit check [PATHS]``: files against a manifest and a policy, as a gate in CI.

The screen has a line a file, what is wrong with it below, and the verdict last.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from ckptkit.cli import closing, ending
from ckptkit.cli import options as ui
from ckptkit.cli.closing import combined_lines, read
from ckptkit.cli.tables import wrapped
from ckptkit.cli.usage import Choice
from ckptkit.dtypes import DTYPES, meant_dtype
from ckptkit.formats.folder import passed_over_text
from ckptkit.options.storage import local, session_of
from ckptkit.released import Run
from ckptkit.released.config import find_config
from ckptkit.released.lines import line_of, text_of
from ckptkit.released.policy import CONTAINERS
from ckptkit.released.results import Tally, exit_code_of, findings_of, verdict_of
from ckptkit.report import human_size, printable
from ckptkit.transfer.many import Workers

if TYPE_CHECKING:
    from ckptkit.documents import CheckDocument, CheckedFile, CheckFindingDocument
    from ckptkit.released.document import CheckEnd, CheckHead
    from ckptkit.released.results import CheckReport, FileResult
    from ckptkit.report import Report

__all__ = ["OUTPUTS", "RENDERERS", "command", "echo_lines", "show", "text"]

_TOGETHER = 4096
"""Elements of a document that are written at once."""

_MOST = 160
"""Characters of an expected or found value, on a terminal."""


def text(document: CheckDocument, view: ui.View) -> Iterator[str]:
    """The lines; with ``quiet`` only those of what is wrong."""
    for file, findings in findings_of(document):
        yield from _lines(file, findings, view)
    yield from _last_lines(document["passed_over"], verdict_of(document), exit_code_of(document), view)


def _lines(file: CheckedFile, findings: Sequence[CheckFindingDocument], view: ui.View) -> Iterator[str]:
    """What is said of a file."""
    if view.quiet and not findings:
        return
    yield from wrapped(_head(file, findings, view.style), view.width)
    for finding in findings:
        yield from _finding(finding, view)
    yield from combined_lines(file.get("combined_fix"), findings, view.width, "  ")


def _last_lines(passed_over: Mapping[str, int], verdict: str, code: int, view: ui.View) -> Iterator[str]:
    """What is said of all files."""
    if view.quiet:
        return
    if passed_over:
        yield from wrapped(passed_over_text(passed_over), view.width)
    yield from (
        view.style(line, fg="green" if code == 0 else "red", bold=True) for line in wrapped(verdict, view.width)
    )


def _head(file: CheckedFile, findings: Sequence[CheckFindingDocument], style: ui.Style) -> str:
    outcome, color = ("ok", "green") if file["ok"] else ("FAILED", "red")
    if not file["checked"] and not file["ok"]:
        outcome = "FAILED" if any(f["code"] == "file-missing" for f in findings) else "NOT CHECKED"
    size = "" if file["size"] is None else f" ({human_size(file['size'])}; {', '.join(file['rules'])})"
    return f"{printable(file['path'])}: {style(outcome, fg=color, bold=outcome != 'ok')}{size}"


def _finding(finding: CheckFindingDocument, view: ui.View) -> Iterator[str]:
    severity, style = finding["severity"], view.style
    label, code = style(severity, fg=ui.COLORS[severity], bold=True), style(f"[{finding['code']}]", dim=True)
    yield from wrapped(f"  {label}: {finding['rule']}: {printable(finding['message'])} {code}", view.width)
    for name, value in (("expected", finding["expected"]), ("found", finding["found"])):
        if value is not None:
            yield from wrapped(f"      {name}: {_value(value, None if view.width is None else _MOST)}", view.width)
    if finding["fix"]:
        yield f"      fix: {printable(finding['fix'])}"


def _value(value: object, most: int | None) -> str:
    shown = printable(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return shown if most is None or len(shown) <= most else f"{shown[: most - 1]}…"


RENDERERS: dict[str, ui.Renderer] = {
    "text": text,
    "junit": ui.later("outputs.junit"),
    "sarif": ui.later("outputs.sarif"),
    "github": ui.later("outputs.github"),
    "gitlab": ui.later("outputs.gitlab"),
    "markdown": ui.later("markdown.check"),
    "html": ui.later("html.check"),
}

OUTPUTS = ("text", "json", *(name for name in RENDERERS if name != "text"))


@click.command(
    "check",
    epilog=ui.with_examples(
        "ckptkit check --manifest weights/weights.lock.json",
        "ckptkit check weights/ --no-pickle --max-size 2GB --no-nan",
        "ckptkit check hf://user/repo --no-pickle --max-trust safe",
        "ckptkit check model.pth --max-trust safe --allow-dtype float32 --allow-dtype int64 --location cpu",
        "ckptkit check model.safetensors --fits torchvision:resnet18 --forward",
        "ckptkit check weights/ --manifest weights/weights.lock.json --format junit > check.xml",
        "git diff --name-only -z HEAD~1 | ckptkit check --files-from - --no-pickle --skip-others",
        "ckptkit check weights/ --part 2/8 --json-lines > part-2.jsonl",
    ),
)
@ui.path_argument("paths", nargs=-1)
@click.option("--manifest", metavar="FILE", help="Manifest to check against, from ckptkit manifest.")
@click.option("--no-pickle", is_flag=True, default=None, help="Forbid pickles.")
@click.option(
    "--max-trust",
    type=Choice(["safe", "needs_trust"]),
    help="Highest trust level allowed; hostile files never pass.",
)
@click.option(
    "--require-format",
    multiple=True,
    type=Choice(CONTAINERS),
    metavar="CONTAINER",
    help="Container allowed, as inspect names it; repeatable.",
)
@click.option("--max-size", metavar="SIZE", help="Largest size allowed for a file with its shards: 2GB, 500MB.")
@click.option(
    "--allow-dtype",
    multiple=True,
    type=Choice(DTYPES, meant=meant_dtype),
    metavar="DTYPE",
    help="Dtype allowed for tensors; repeatable.",
)
@click.option(
    "--no-nan", is_flag=True, default=None, help="Forbid NaN in tensors and Inf in parameters; reads the data."
)
@click.option("--no-optimizer", is_flag=True, default=None, help="Forbid optimizer state.")
@click.option(
    "--no-prefix", is_flag=True, default=None, help="Forbid wrapper prefixes in names: module., _orig_mod. ..."
)
@click.option(
    "--location",
    multiple=True,
    callback=ui.checked_devices,
    metavar="DEV",
    help="Device tag allowed for storages: cpu; repeatable.",
)
@click.option(
    "--allow-part",
    is_flag=True,
    default=None,
    help="Allow a file that is one part of a sharded checkpoint, without the others.",
)
@click.option(
    "--fits",
    metavar="REF",
    help="Model that every file must load into, as in verify; needs torch.",
)
@click.option("--forward", is_flag=True, default=None, help="Run the model too; needs torch.")
@click.option(
    "--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Argument of the factory; repeatable."
)
@click.option("--input-shape", "shapes", multiple=True, metavar="N,C,H,W", help="Shape of an input; repeatable.")
@ui.tag_option
@ui.tp_rules_option
@click.option(
    "--skip-others", is_flag=True, help="Skip named files that are not checkpoints; it is fine if none is left."
)
@ui.files_from_option
@click.option("--part", metavar="I/N", help="Check only the I-th of N shares of the files, the same on every machine.")
@ui.jobs_option
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Time limit for one file.")
@click.option("--json-lines", "as_lines", is_flag=True, help="Print a line of JSON for each file as it is done.")
@click.option(
    "--resume",
    metavar="FILE",
    help="Reuse results of an earlier run's --json-lines that are still valid; append with >> to the same FILE.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="A ckptkit.toml or pyproject.toml; default: the nearest one in this folder or above.",
)
@ui.ignore_checksums
@ui.storage_option
@ui.common_options(
    RENDERERS,
    multiple=True,
    default=(),
    type=Choice([*OUTPUTS, *CONTAINERS]),
    metavar="|".join(OUTPUTS),
    help="Output format; a container name here means --require-format.",
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
    files_from: str | None,
    part: str | None,
    jobs: int | None,
    timeout: float | None,
    as_lines: bool,
    resume: str | None,
    output: tuple[str, ...],
    quiet: bool,
    color: str,
    **policy: Any,
) -> int:
    """Check checkpoints against a manifest and a policy, without running or loading them.

    A folder means the checkpoints below it, found by their content; other files are counted, and --no-pickle and
    --max-trust apply to pickles in them too.  An index, or any of its shards, means all of its shards.  Files and
    folders may be URLs (https://, s3://, gs://, az://, hf://user/repo).  Without PATHS, everything in the manifest is
    checked, and the folders it was made from may not contain other checkpoints.  In every case, a file must be readable
    and may not be hostile.

    The same options can be set under [tool.ckptkit] in pyproject.toml, or in ckptkit.toml, with other values for some
    files under [[tool.ckptkit.overrides]], or [[overrides]]; command-line options win.

    Large numbers of files are shared among processes.  A file that crashes its process, or takes longer than --timeout,
    is a result like any other. ckptkit report combines the parts of a job array and resumed runs.

    Exit code 0: everything passed; 1: something failed; 2: something could not be checked.
    """
    shown = [name for name in output if name not in CONTAINERS]
    *_, wanted = ("text", *shown)
    if as_lines and shown:
        raise click.UsageError(f"--json-lines and --format {wanted}: give only one of them")
    policy["require_format"] = (*require_format, *(name for name in output if name in CONTAINERS))
    for name in ("require_format", "allow_dtype", "location", "ignore_checksums"):
        policy[name] = policy[name] or None  # not given: what is configured stands
    policy["model_args"] = ui.key_values("--model-arg", model_args) or None
    policy["input_shapes"] = [ui.input_shape(shape) for shape in shapes] or None
    ending.keep_stdout()
    view = ui.View(ui.styler(color), ui.terminal_width(), quiet)
    with ui.json_errors(wanted == "json"), ExitStack() as stack:
        given = ui.with_listed(paths, files_from)
        stack.enter_context(session_of(storage_options, given))
        run = Run(
            local(given),
            is_listed=files_from is not None,
            manifest=manifest,
            config=config if config is not None else find_config(os.curdir),
            tag=tag,
            skip_others=skip_others,
            part=part,
            workers=Workers(jobs=jobs, seconds=timeout),
            resume=resume,
            is_resumable=as_lines,
            typed={name: value for name, value in policy.items() if value is not None},
            verify=_verify,
        )
        if as_lines:
            return echo_lines(run.head, run.results(), run.end)
        if wanted == "text":
            return _echo_text(run, view)
        if wanted == "json" and not ending.stdout().isatty():
            return _echo_json(run)
        report = run.report([*run.results()])
    return show(report, wanted, view)


def _verify(*given: Any, **options: Any) -> Report:
    """As `ckptkit.verify`."""
    from ckptkit import api  # not there where no model is asked for

    return api.verify(*given, **options)


def show(report: CheckReport, wanted: str, view: ui.View) -> int:
    """A report on stdout, in one of the outputs; its exit code."""
    code = ending.verdict(report.exit_code)
    seconds = {result.path: result.seconds for result in report.results}
    document, view = report.to_dict(), view._replace(started=report.started, seconds=seconds)
    if wanted in ("text", "json"):
        ui.show(document, wanted, RENDERERS, view)
    else:  # programs that read these expect UTF-8
        lines = [*RENDERERS[wanted](document, view)]
        if wanted == "github" and (summary := os.environ.get("GITHUB_STEP_SUMMARY")):
            from ckptkit.cli.outputs import add_summary

            lines[-1:-1] = add_summary(document, view, summary)
        ending.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
    return code


def _echo_text(run: Run, view: ui.View) -> int:
    """What `text` makes of the document, each file's lines as its result comes; the exit code.

    A reader that goes away does not end the check: what it comes to is the exit code.
    """
    tally, nbytes = Tally(), 0
    gone: ending.OutputLostError | None = None
    for result in run.results():
        tally.add(result)
        nbytes += result.size or 0
        findings = [finding.to_dict() for finding in result.findings]
        try:
            for line in () if gone else _lines(result.to_dict(), findings, view):
                ui.echo(line)
        except ending.OutputLostError as error:
            if not error.is_reader_gone:
                raise
            gone = error
    end = run.end(tally)
    code = ending.verdict(end["exit_code"])
    if gone is not None:
        raise gone
    is_shown = ending.stdout().isatty()  # the verdict, just above
    closing.summary(read(tally.files, nbytes) + ("" if is_shown else f": {end['verdict']}"))
    for line in _last_lines(end["passed_over"], end["verdict"], code, view):
        ui.echo(line)
    return code


def _echo_json(run: Run) -> int:
    """The document, on one line; of very many files no more than its text is in memory.  The exit code."""
    tally = Tally()
    files, findings = list[str](), list[str]()
    for result in run.results():
        tally.add(result)
        files.append(json.dumps(result.to_dict()))
        findings += [json.dumps(finding.to_dict()) for finding in result.findings]
    end = run.end(tally)
    code = ending.verdict(end["exit_code"])
    empty = json.dumps({**run.report(()).to_dict(), "ok": end["ok"], "checked": end["checked"]})
    head, rest = empty.split('"files": []', 1)
    between, tail = rest.rsplit('"findings": []', 1)
    ending.write(f'{head}"files": [')
    _write_all(files)
    ending.write(f']{between}"findings": [')
    _write_all(findings)
    ending.write(f"]{tail}\n")
    return code


def _write_all(texts: Sequence[str]) -> None:
    for start in range(0, len(texts), _TOGETHER):
        ending.write(", " * (start > 0) + ", ".join(texts[start : start + _TOGETHER]))


def echo_lines(head: CheckHead, results: Iterable[FileResult], end: Callable[[Tally], CheckEnd]) -> int:
    """A run on stdout as JSON Lines, each result as it comes; the exit code."""
    tally = Tally()
    if _is_begun():  # its last line may have been cut short
        ending.write("\n")
    ending.write(text_of(head))
    for result in results:
        tally.add(result)
        ending.write(text_of(line_of(result)))
    last = end(tally)
    code = ending.verdict(last["exit_code"])
    ending.write(text_of(last))
    return code


def _is_begun() -> bool:
    """Whether stdout is a file that holds something already."""
    try:
        status = os.fstat(ending.stdout().fileno())
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
