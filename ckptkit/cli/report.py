"""``ckptkit report FILES...``: several runs of a check as one, with one verdict, in any output that a check has.

The runs are JSON Lines (`ckptkit.released.lines`), of which a file may hold several, and JSON documents.  What counts
where they do not agree, and what is said where one is missing, is in `ckptkit.released.merging`.  What is written as
JSON Lines here is a run like any other, and can be put together with more.
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
@click.option("--json-lines", "as_lines", is_flag=True, help="A line of JSON for each file, as ckptkit check has it.")
@ui.common_options(RENDERERS, type=Choice(OUTPUTS), default=None, metavar="|".join(OUTPUTS))
def command(files: tuple[str, ...], as_lines: bool, output: str | None, quiet: bool, color: str) -> int:
    """Put runs of ckptkit check together: what --json-lines or --json wrote, on one machine or many.

    The parts of a job array (--part I/N) must all be there, and each run must have come to its end, with the same
    version of ckptkit and the same policy; what is missing is told, and the whole is not green. Of a file that several
    runs tell of the worst result counts; of a run that was resumed, the latest.

    Exit code 0: all is as it must be; 1: something is not; 2: something was not checked.
    """
    if as_lines and output is not None:
        raise click.UsageError(f"--json-lines and --format {output}: give one of them")
    with ui.json_errors(output == "json"):
        report, head = merged(files)
    if as_lines:
        return echo_lines(
            head,
            report.results,
            lambda tally: end_of(tally, report.passed_over, may_be_empty=report.may_be_empty, part=None),
        )
    return show(report, output or "text", ui.View(ui.styler(color), ui.terminal_width(), quiet))
