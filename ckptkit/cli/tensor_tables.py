"""The tables of tensors of ``ckptkit inspect``: the module tree, the largest, statistics; and flat lines for grep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from ckptkit.cli.options import Style, View, printable
from ckptkit.cli.tables import Cell, bar, columns, count_cell, wrapped
from ckptkit.inspection import surveyed
from ckptkit.inspection.listing import TensorRow
from ckptkit.inspection.outline import OutlineLine, outline_of
from ckptkit.report import human_size, listed

if TYPE_CHECKING:
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import InspectedFile

__all__ = [
    "BAR", "PARAMETERS", "STATS", "TIMES", "flat", "full_name", "outline_of", "shape", "stat_cells", "styled_table",
    "tensor_lines", "tree_table",
]  # fmt: skip

STATS: tuple[Literal["min", "max", "mean", "std", "zeros", "nan", "inf"], ...] = (
    "min", "max", "mean", "std", "zeros", "nan", "inf",
)  # fmt: skip
TIMES = "\N{MULTIPLICATION SIGN}"


BAR = " "
"""The head of the column with bars."""

PARAMETERS = Cell("parameters", "params")


def tensor_lines(document: Survey, view: View) -> Iterator[str]:
    """The tree, or a table of tensors."""
    style, width = view.style, view.width
    rows = _largest(document["tensors"], view.largest) if view.largest else document["tensors"]
    if rows[0].stats is not None:
        yield from styled_table(*_stats_table(rows, document), style, width, last=(8, 7, 6, 5))
    elif view.largest:
        shares = width is not None
        yield from styled_table(
            *_largest_table(rows, document, shares), style, width, first=range(4, 4 + shares), last=(3,)
        )
    else:
        tree, left_out = outline_of(document, view.depth, view.sort)
        table = tree_table(tree, bars=width is not None)
        bars = [i for i, head in enumerate(table[1]) if head == BAR]
        yield from styled_table(*table, style, width, first=bars, last=range(len(table[1]) - 3 - len(bars), 0, -1))
        notes = []
        if left_out:
            notes.append(f"and {left_out:,} more (--depth 1 shows all, --flat every tensor)")
        if any(line.copies > 1 and below.level > line.level for line, below in itertools.pairwise(tree)):
            notes.append(f"(below a line with {TIMES}: the figures of one of them)")
        yield from (style(line, dim=True) for note in notes for line in wrapped(note, width))


def flat(document: InspectedFile | Survey, view: View) -> Iterator[str]:
    """One line a tensor: name, dtype, shape, bytes, device, section, then statistics where there are any."""
    for row in surveyed(document)["tensors"]:
        fields = [
            printable(row.name),
            row.dtype,
            shape(row),
            str(row.nbytes),
            row.location,
            printable(row.section or ""),
        ]
        if row.stats is not None:
            fields += [f"{key}={value}" for key, value in zip(STATS, stat_cells(row), strict=True)]
        yield "\t".join(fields)


def tree_table(lines: Sequence[OutlineLine], *, bars: bool = False) -> tuple[list[list[str]], list[str], str]:
    """Rows, headers and alignment of the module tree; a dtype that all tensors have is in the head."""
    has_roles = any(line.parameters or line.buffers for line in lines)
    has_buffers = any(line.buffers for line in lines)
    headers = [PARAMETERS, "buffers"][: 1 + has_buffers] if has_roles else ["elements"]
    dtype = _only(line.dtypes for line in lines if line.dtypes)
    most = max((line.nbytes for line in lines), default=0) or 1
    rows = []
    for line in lines:
        times = f"  {line.copies:,} {TIMES}" if line.copies > 1 else ""
        counts = [line.parameters, line.buffers][: 1 + has_buffers] if has_roles else [line.others]
        one = line.is_tensor and line.copies == 1
        rows.append(
            [
                "  " * line.level + (printable(line.label) or "(tensor)") + times,
                f"{line.tensors:,}" if line.tensors and not one else "",
                *map(count_cell, counts),
                human_size(line.nbytes) if line.tensors else "",
                *([bar(line.nbytes / most)] if bars else ()),
                _note(line, "" if dtype else line.dtypes),
            ]
        )
    heads = ["tensors of", "tensors", *headers, "bytes", *([BAR] if bars else ()), dtype]
    return rows, heads, "n" + "r" * (len(headers) + 2) + "l" * (1 + bars)


def _only(dtypes: Iterable[str]) -> str:
    """The one dtype that all have; empty where they have several."""
    found = {*dtypes}
    return found.pop() if len(found) == 1 and not any(" " in dtype for dtype in found) else ""


def _note(line: OutlineLine, dtypes: str) -> str:
    """What is at the end of a line: of a tensor dtype and shape, which stay, and the name it is tied to."""
    pieces = [*map(printable, line.pieces)]
    if not pieces or (not line.is_tensor and line.note == line.pieces[0]):
        return pieces[0] if pieces else Cell(dtypes, "")
    if line.is_tensor:
        value = line.note == line.pieces[0]
        return _tensor_note("" if value else dtypes, pieces[0], pieces[1] if len(pieces) > 1 else None)
    count = line.tensors // line.copies
    most = range(len(pieces) if count == len(pieces) else 3, 0, -1)
    forms = [(f"{dtypes}: " if dtypes else "") + listed(pieces, each, total=count) for each in most]
    return Cell(*forms, dtypes, "")


def _tensor_note(dtype: str, shape: str, tied_to: str | None) -> Cell:
    kept = f"{dtype} {shape}" if dtype else shape
    return Cell(kept if tied_to is None else f"{kept} = {tied_to}", kept)


def _largest(rows: Sequence[TensorRow], most: int) -> list[TensorRow]:
    """So many of the tensors that take most bytes, of those with several names the first."""
    from heapq import nlargest  # the tree is shown sooner without

    return nlargest(most, (row for row in rows if row.tied_to is None), key=lambda row: row.nbytes) or [*rows[:1]]


def _largest_table(rows: Sequence[TensorRow], document: Survey, bars: bool) -> tuple[list[list[str]], list[str], str]:
    dtype = _only(row.dtype for row in rows)
    total = document["storage"]["nbytes"] or 1
    cells = [
        [
            full_name(row, document),
            count_cell(row.numel) or "0",
            human_size(row.nbytes),
            f"{row.nbytes / total:.1%}",
            *([bar(row.nbytes / total)] if bars else ()),
            _tensor_note("" if dtype else row.dtype, shape(row) if row.value is None else printable(row.value), None),
        ]
        for row in rows
    ]
    heads = ["largest tensors", "elements", "bytes", "share", *([BAR] if bars else ()), dtype]
    return cells, heads, "nrrr" + "l" * (1 + bars)


def stat_cells(row: TensorRow) -> list[str]:
    """The statistics of a tensor, in the order of `STATS`."""
    stats = row.stats
    return [] if stats is None else [figure(stats[key]) for key in STATS]


def _stats_table(rows: Sequence[TensorRow], document: Survey) -> tuple[list[list[str]], list[str], str]:
    dtype = _only(row.dtype for row in rows)
    cells = [[full_name(row, document), *([] if dtype else [row.dtype]), *stat_cells(row)] for row in rows]
    heads = [f"tensor ({dtype})"] if dtype else ["tensor", "dtype"]
    return cells, [*heads, *STATS], "n" + "l" * (not dtype) + "r" * len(STATS)


def full_name(row: TensorRow, document: Survey) -> str:
    """The name in the state_dict; with its section where none was selected."""
    name = printable(row.name)
    return name if document["state_dict"] is not None or not row.section else f"{printable(row.section)}.{name}"


def shape(row: TensorRow) -> str:
    """``"[64, 3, 7, 7]"``."""
    return str([*row.shape])


def figure(value: float | int | None) -> str:
    """A statistic in four digits."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def styled_table(
    rows: list[list[str]],
    headers: list[str],
    align: str,
    style: Style,
    width: int | None,
    *,
    first: Sequence[int] = (),
    last: Sequence[int] = (),
) -> Iterator[str]:
    """The lines of a table (`ckptkit.cli.tables.columns`), its heads bold."""
    lines = columns(rows, headers, align, width, first=first, last=last)
    yield style(lines[0], bold=True)
    yield from lines[1:]
