"""``ckptkit diff A B``: what changed between two checkpoints, whatever their containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ckptkit import api
from ckptkit.cli import closing, ending
from ckptkit.cli import options as ui
from ckptkit.cli.ending import progress_line
from ckptkit.cli.tables import Cell, columns, wrapped
from ckptkit.cli.usage import IntRange
from ckptkit.options import DiffOptions
from ckptkit.report import count_of, human_size, printable, share_of

if TYPE_CHECKING:
    from ckptkit.differences.difference import (
        ChangedRow,
        DiffDocument,
        Difference,
        DiffFile,
        ModuleRow,
        SectionRow,
    )

__all__ = ["RENDERERS", "Table", "command", "figure", "file_line", "notes", "tables", "text"]

_MOST_MODULES = 30
"""Rows of the table of modules."""

_MAX_VALUE = 60
"""Characters of a value of the metadata or the training state."""

_SPARED = ("cosine", "|b-a|/|a|", "mean |b-a|")
"""Heads of the columns that a narrow terminal does without."""

_STATUSES = ("changed", "recast", "reshaped", "renamed", "added", "removed", "not compared")

_APART = _STATUSES[-3:]
"""Statuses of tensors that were not compared with another."""


class Table(NamedTuple):
    """A list of the document as a table.

    Attributes:
        title: above it; ``rows``, ``headers``, ``align``: as `ckptkit.cli.tables.columns` takes them.
        names: the columns that contain text from the files.
        left_out: rows that are not shown.
    """

    title: str
    rows: list[list[str]]
    headers: list[str]
    align: str
    names: tuple[int, ...]
    left_out: int


def text(document: DiffDocument, view: ui.View) -> Iterator[str]:
    """Both files, the verdict, what changed by module, and the largest changes."""
    style, width = view.style, view.width
    for side, facts in (("A", document["a"]), ("B", document["b"])):
        yield from wrapped(f"{style(side, bold=True)}  {file_line(facts)}", width)
    label = style("same", fg="green", bold=True) if document["ok"] else style("different", fg="red", bold=True)
    yield from wrapped(f"{label}: {printable(document['summary'])}", width)
    for table in tables(document, view.top, None if width is None else _MAX_VALUE):
        table = table if width is None else _with_dtype_in_title(table)
        yield ""
        yield from (style(line, bold=True) for line in wrapped(table.title, width))
        if table.rows:
            room = None if width is None else width - 2
            spared = [table.headers.index(head) for head in _SPARED if head in table.headers]
            lines = columns(table.rows, table.headers, table.align, room, last=spared)
            yield "  " + style(lines[0], bold=True)
            yield from (f"  {line}" for line in lines[1:])
        if table.left_out:
            more = f"  and {table.left_out:,} more (--top {len(table.rows) + table.left_out}, or --json)"
            yield from (style(line, dim=True) for line in wrapped(more, width))
    if document["findings"]:
        yield ""
    yield from ui.finding_lines(document["findings"], style, width)


def _with_dtype_in_title(table: Table) -> Table:
    """The table without a column that says the same dtype in each row."""
    at = table.headers.index("dtype") if "dtype" in table.headers else -1
    found = {row[at] for row in table.rows} if at > 0 else set()
    if len(found) != 1:
        return table
    return table._replace(
        title=f"{table.title}, {found.pop()}",
        rows=[row[:at] + row[at + 1 :] for row in table.rows],
        headers=table.headers[:at] + table.headers[at + 1 :],
        align=table.align[:at] + table.align[at + 1 :],
    )


def _compared(difference: Difference) -> str:
    """How many tensors were compared with one of the other file, and of how many bytes the weights are."""
    total, sides = difference.tensors, (difference.a, difference.b)
    apart = sum(row["statuses"].get(status, 0) for row in difference.modules for status in _APART)
    told = share_of(total - apart, total, "tensor") if apart else count_of(total, "tensor")
    if all(side["section"] is not None for side in sides):
        sizes = [human_size(side["nbytes"]) for side in sides]
        told = f"{told} of {sizes[0]} in A and {sizes[1]} in B"
    return f"{told} compared in {closing.elapsed()}"


def file_line(facts: DiffFile) -> str:
    """A file and what it is, in a line."""
    parts = [facts["format"], facts["kind"].replace("_", " "), human_size(facts["size"])]
    if facts["section"] is not None:
        where = f" under {facts['section']!r}" if facts["section"] else ""
        parts.append(f"{count_of(facts['tensors'], 'tensor')} of {human_size(facts['nbytes'])}{where}")
    if facts["writer"]:
        parts.append(f"written by {facts['writer']}")
    return printable(f"{facts['path']}: {', '.join(parts)}")


def tables(document: DiffDocument, top: int, most: int | None = _MAX_VALUE) -> Iterator[Table]:
    """Every list of the document that has something to say, each with a title.

    Args:
        document: of ``ckptkit diff``.
        top: rows of each list.
        most: characters of a plain value; ``None``: all.
    """
    yield from _module_table(document["modules"])
    for title, rows in (("changed", document["changed"]), ("within tolerance", document["within_tolerance"])):
        headers = "tensor,dtype,shape,max |b-a|,mean |b-a|,|b-a|/|a|,cosine,equal,"
        yield from _table(_title(rows, title), [*map(_changed, rows)], headers, "nssrrrrrl", 0, most=top)
    for key, names, where in (("added", document["added"], "B"), ("removed", document["removed"], "A")):
        title = f"{key}: {count_of(len(names), 'tensor')} only in {where}"
        yield from _table(title, [[name] for name in names], "name", "n", 0, most=top)
    yield from _other_tensors(document, top)
    yield from _beside(document, top, most)


def _table(
    title: str, found: Sequence[list[str]], headers: str, align: str, *names: int, most: int, unlisted: int = 0
) -> Iterator[Table]:
    """The first of the rows; a column of the kind ``"s"`` holds shapes, dtypes or counts, which are never cut."""
    if found:
        heads = headers.split(",")
        cells = [
            [Cell(printable(cell), printable(cell)) if kind == "s" else printable(cell) for cell, kind in each]
            for each in (zip(row, align, strict=True) for row in found[:most])
        ]
        yield Table(title, cells, heads, align.replace("s", "l"), names, max(len(found) - most, 0) + unlisted)


def _module_table(modules: Sequence[ModuleRow]) -> Iterator[Table]:
    if len(modules) > 1 or sum(row["differing"] for row in modules) > 1:
        rows = [
            [
                row["module"] or "(everything)",
                f"{row['differing']:,} of {row['tensors']:,}",
                _statuses(row["statuses"]),
                figure(row["max_abs"]),
            ]
            for row in modules
        ]
        yield from _table("by module", rows, "module,differing,what,max |b-a|", "nrsr", 0, most=_MOST_MODULES)


def _other_tensors(document: DiffDocument, top: int) -> Iterator[Table]:
    """What is to be said of tensors but that values changed, or that only one has them."""
    renamed = [[row["from"], row["to"], f"by {row['by']}", row["confidence"]] for row in document["renamed"]]
    yield from _table(_title(renamed, "renamed"), renamed, "from,to,found,confidence", "nnll", 0, 1, most=top)
    reshaped = [
        [row["name"], str(row["from"]), str(row["to"]), _yes(row["same_values"], "the same values", "other values")]
        for row in document["reshaped"]
    ]
    yield from _table(_title(reshaped, "reshaped"), reshaped, "tensor,from,to,", "nssl", 0, most=top)
    recast = [
        [row["name"], row["from"], row["to"], figure(row["max_abs"]),
         _yes(row["equal_after_cast"], "equal after the cast", "not equal after the cast")]
        for row in document["recast"]
    ]  # fmt: skip
    yield from _table(_title(recast, "recast"), recast, "tensor,from,to,max |b-a|,", "nssrl", 0, most=top)
    others = [[row["name"], row["a"], row["b"]] for row in document["values"]]
    yield from _table("values that are not plain tensors and differ", others, "name,A,B", "nll", 0, 1, 2, most=top)
    lost = [[row["name"], row["reason"]] for row in document["not_compared"]]
    yield from _table("not compared", lost, "name,why", "nl", 0, most=top)


def _beside(document: DiffDocument, top: int, most: int | None) -> Iterator[Table]:
    """What is to be said of all else in the files."""
    sections = [
        [row["path"] or "(whole file)", row["kind"], _count(row["a"]), _count(row["b"]), _section(row)]
        for row in document["sections"]
    ]
    yield from _table("beside the weights", sections, "section,kind,tensors in A,in B,", "nlrrl", 0, most=top)
    for title, found in (("metadata", document["metadata"]), ("training state", document["training"])):
        scalars = [[row["key"], _shown(row["a"], most), _shown(row["b"], most)] for row in found]
        yield from _table(title, scalars, "key,A,B", "nll", 0, 1, 2, most=top)
    told = {row["key"] for row in document["training"]}
    rest = [row for row in document["tree"] if row["what"] == "tensor" or row["path"] not in told]
    rows = [[row["path"] or "(whole file)", row["a"] or "-", row["b"] or "-", figure(row["max_abs"])] for row in rest]
    unlisted = document["tree_differences"] - len(document["tree"])
    headers = "place,A,B,max |b-a|"
    yield from _table("elsewhere in the files", rows, headers, "nllr", 0, 1, 2, most=top, unlisted=unlisted)


def notes(row: ChangedRow) -> str:
    """What is to be said of a change beyond its figures."""
    if row["nan"] is None:
        return "its values cannot be computed"
    if row["only_zero_signs"]:
        return "the same except for the sign of zeros"
    if row["only_nan_bits"]:
        flipped = f", {row['nan']['signs']:,} with another sign" if row["nan"]["signs"] else ""
        return f"only bits of NaN differ{flipped}"
    sides = (("A", row["nan"]["a"]), ("B", row["nan"]["b"]))
    found = [f"NaN only in {side}: {count:,}" for side, count in sides if count]
    if row["nan"]["both"]:
        found.append(f"NaN in both: {row['nan']['both']:,}")
    if row["nan"]["signs"]:
        found.append(f"with another sign: {row['nan']['signs']:,}")
    if row["infinite"]:
        found.append(f"Inf on one side: {row['infinite']:,}")
    if row["zero_signs"]:
        found.append(f"-0 for 0: {row['zero_signs']:,}")
    return ", ".join(found)


def figure(value: float | None) -> str:
    """A figure in four digits; ``-``: there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else f"{value:.4g}"


def _changed(row: ChangedRow) -> list[str]:
    name = f"{row['name']} (was {row['was']})" if "was" in row else row["name"]
    figures = [figure(row["max_abs"]), figure(row["mean_abs"]), figure(row["relative_norm"])]
    cosine = "-" if row["cosine"] is None else f"{row['cosine']:.6f}"
    return [name, row["dtype"], str(row["shape"]), *figures, cosine, _share(row["equal_share"]), notes(row)]


def _share(share: float | None) -> str:
    """A share in percent, 100 and 0 only where it is all and none."""
    if share is None:
        return "-"
    shown = f"{share:.1%}"
    return "<100%" if shown == "100.0%" and share < 1 else ">0%" if shown == "0.0%" and share > 0 else shown


def _title(rows: Sequence[object], what: str) -> str:
    return f"{what}: {count_of(len(rows), 'tensor')}"


def _statuses(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{statuses[status]:,} {status}" for status in _STATUSES if status in statuses)


def _yes(value: bool | None, yes: str, no: str) -> str:
    return "" if value is None else yes if value else no


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _section(row: SectionRow) -> str:
    if row["equal"] is None:
        return "only in A" if row["b"] is None else "only in B"
    return "the same" if row["equal"] else f"{row['differing']:,} {'differs' if row['differing'] == 1 else 'differ'}"


def _shown(value: object, most: int | None) -> str:
    shown = "-" if value is None else str(value)
    return shown if most is None or len(shown) <= most else shown[:most] + "…"


RENDERERS: dict[str, ui.Renderer] = {"text": text, "markdown": ui.later("markdown.diff"), "html": ui.later("html.diff")}


_top = click.option(
    "--top", type=IntRange(0), default=10, show_default=True, metavar="N", help="Number of rows in each list."
)


@click.command(
    "diff",
    epilog=ui.with_examples(
        "ckptkit diff epoch10.pth epoch11.pth",
        "ckptkit diff original.pth converted.safetensors",
        "ckptkit diff hf://user/repo@v1/model.safetensors hf://user/repo/model.safetensors",
        "ckptkit diff ddp.pth clean.safetensors --strip-module",
        "ckptkit diff resume.pth ema.safetensors --section-a ema",
        "ckptkit diff gpu.pth cpu.pth --rtol 1e-5 --atol 1e-8",
        "ckptkit diff main.pth pull_request.pth --format markdown",
    ),
)
@ui.path_argument("a")
@ui.path_argument("b")
@ui.options_of(DiffOptions, behind={"rtol": _top})
@ui.common_options(RENDERERS)
def command(
    a: str,
    b: str,
    top: int,
    progress: bool | None,
    output: str,
    quiet: bool,
    color: str,
    **options: Any,
) -> int:
    """Compare the checkpoints A and B: names, shapes, dtypes and every bit of every tensor.

    Exit code 0: the tensors are the same; 1: one differs or could not be compared; 2: the comparison failed.  Tensors
    that both have elsewhere (optimizer moments, averaged weights, attributes of modules) are compared too.  All other
    differences are listed and count only with --strict: parts that only one has, metadata, ties, and every value, class
    and key in the files' trees.  Containers, devices and the order of tensor names never count.

    With --atol or --rtol an element is unchanged if |b - a| <= atol + rtol * max(|a|, |b|).
    """
    as_json = output == "json"
    if a == b == "-":
        raise click.UsageError("only one of the two can be standard input")
    if output == "html":
        from ckptkit.page.frame import charts_script

        charts_script()  # before hours of comparing
    with ui.json_errors(as_json), progress_line(progress, quiet=quiet or as_json) as update:
        difference = api.diff(a, b, progress=update, **options)
    code = ending.verdict(0 if difference.ok else 1)
    if output == "text":
        closing.summary(_compared(difference))
    ui.show(difference.to_dict(), output, RENDERERS, ui.View(ui.styler(color), ui.terminal_width(), top=top))
    return code
