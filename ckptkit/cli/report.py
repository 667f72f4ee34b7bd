"""``ckptkit report FILES...``: several runs of a check as one, with one verdict, in any output that a check has.

The runs are JSON Lines (`ckptkit.released.lines`), of which a file may contain several, and JSON documents.  What
counts where they do not agree, and what is said where one is missing, is in `ckptkit.released.merging`.  What is
written as JSON Lines here is a run like any other, and can be combined with more.
"""

from __future__ import annotations

import click

from ckptkit.cli import options as ui
from ckptkit.cli.check import OUTPUTS, RENDERERS, echo_lines, show
from ckptkit.cli.usage import Choice
from ckptkit.released.lines import end_of
from ckptkit.released.merging import merged

__all__ = ["RENDERERS", "command"]


@click.command(
    "report",
    epilog=ui.with_examples(
        "ckptkit report part-*.jsonl",
        "ckptkit report part-*.jsonl --format junit > check.xml",
        "ckptkit report linux.json windows.json --format markdown",
    ),
)
@ui.path_argument("files", nargs=-1, required=True)
@click.option(
    "--json-lines", "as_lines", is_flag=True, help="Print a line of JSON for each file, as ckptkit check does."
)
@ui.common_options(RENDERERS, type=Choice(OUTPUTS), default=None, metavar="|".join(OUTPUTS))
def command(files: tuple[str, ...], as_lines: bool, output: str | None, quiet: bool, color: str) -> int:
    """Combine runs of ckptkit check: what --json-lines or --json wrote, on one machine or several.

    All parts of a job array (--part I/N) must be present, and each run must be complete, with the same version of
    ckptkit and the same policy; otherwise the report says what is missing, and the exit code is not 0.  If several
    runs report on a file, the worst result counts; in a resumed run, the latest.

    Exit code 0: everything passed; 1: something failed; 2: something was not checked.
    """
    if as_lines and output is not None:
        raise click.UsageError(f"--json-lines and --format {output}: give only one of them")
    with ui.json_errors(output == "json"):
        report, head = merged(files)
    if as_lines:
        return echo_lines(
            head,
            report.results,
            lambda tally: end_of(tally, report.passed_over, may_be_empty=report.may_be_empty, part=None),
        )
    return show(report, output or "text", ui.View(ui.styler(color), ui.terminal_width(), quiet))
