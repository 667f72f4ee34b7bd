"""Text in columns, as a terminal shows it: tables, cells that are cut, lines that are wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["columns", "padded", "width_of", "wrapped"]

_LEAST_NOTE, _LEAST_NAME = 12, 16
"""Characters that a table's last and widest columns keep however narrow the terminal is."""


def columns(rows: Sequence[Sequence[str]], headers: Sequence[str], align: str, width: int | None = None) -> list[str]:
    """The lines of a table: two spaces between columns, each aligned as ``align`` says (``"lr"``).

    Not by tabulate, whose import takes longer than inspecting a file, which cuts no line to a terminal's width, and
    which knows about wide characters only where another package is installed.

    Args:
        rows: cells.
        headers: of the columns; none: there is no line of them.
        align: ``"l"`` or ``"r"`` for each.
        width: characters a line may have; the last column is cut first, then the widest of text.
    """
    table = [headers, *rows] if headers else rows
    widths = [max(width_of(row[i]) for row in table) for i in range(len(align))]
    if width is not None:
        last = len(widths) - 1
        textual = [i for i, a in enumerate(align) if a == "l"]
        widest = max(textual, key=widths.__getitem__, default=0)
        for i, least in ((last, _LEAST_NOTE), (widest, _LEAST_NAME)):
            surplus = sum(widths) + 2 * last - width
            if surplus > 0 and align[i] == "l":
                widths[i] = min(widths[i], max(widths[i] - surplus, least))
    lines = []
    for row in table:
        cells = (padded(_cut(c, w), w, a) for c, w, a in zip(row, widths, align, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal: two for each wide character, none for what is put on top of another."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum((east_asian_width(c) in "WF") + (category(c) not in ("Mn", "Me")) for c in text)


def padded(cell: str, width: int, side: str = "l") -> str:
    """The cell with spaces to so many columns, aligned to the left (``"l"``) or right (``"r"``)."""
    spaces = " " * (width - width_of(cell))
    return spaces + cell if side == "r" else cell + spaces


def _cut(cell: str, width: int) -> str:
    """The cell in so many columns: the beginning, and of long ones the end, which names differ by."""
    if width_of(cell) <= width:
        return cell
    tail = width // 3 if width > 2 * _LEAST_NAME else 0
    head, end = cell[: width - tail - 1], cell[len(cell) - tail :] if tail else ""
    while width_of(head) + width_of(end) >= width:  # of wide characters fewer fit
        head, end = (head, end[1:]) if len(end) > len(head) else (head[:-1], end)
    return f"{head}…{end}"


def wrapped(text: str, width: int | None) -> Iterator[str]:
    """The text in lines of at most so many characters where its words allow it, all but the first indented."""
    if width is None or len(text) <= width:
        yield text
        return
    line = text[: len(text) - len(text.lstrip(" "))]
    indent = line + "    "
    is_empty = True
    for word in text.split():
        if not is_empty and len(line) + 1 + len(word) > width:
            yield line
            line, is_empty = indent, True
        line += word if is_empty else f" {word}"
        is_empty = False
    yield line
