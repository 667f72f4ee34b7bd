"""Text in columns, as a terminal shows it: tables that fit its width, cells that say less where they must, wrapping.

Columns are counted as terminals count them, by ``wcwidth``: two for a wide character, none for what is put on top of
another, one or two for a whole sequence of emoji; escape codes of colors have none.  Text is cut between what a reader
sees as characters, never inside of one.

Where a table is wider than the terminal, its columns give way in this order: names that would take nearly half of it,
notes, columns that are spared first (bars), long names, counts (``11.7 M`` for ``11,689,512``), names, columns that are
spared last.  Paths give way after counts, and keep a third of the width: files differ by their ends.  What no cell
gives up is the last of its forms, which for a tensor is its shape: where not even that finds room, it is below its row.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckptkit.cli import ending

__all__ = ["Cell", "bar", "columns", "count_cell", "padded", "seen", "width_of", "wrapped"]

_LEAST_NOTE, _LONG_NAME, _LEAST_NAME = 12, 30, 16
"""Columns that notes keep; that names keep before and after counts are shortened."""

_NAMES = "np"
"""Columns of names."""

_LEAST_OF_PATH = 0.35
"""Part of the width that paths keep before anything is below its row: the name of a file is most of it."""

_LONG_NOTE = 28
"""Columns that notes keep as long as there are columns that are spared first."""

_EARLIER = 8
"""Characters before the first difference at which what is shown of a name may begin."""

_GAP = 2
"""Spaces between columns."""

_INDENT = "    "
"""Before all lines of a text but the first, and before what is below its row."""

_BLOCKS = " ▏▎▍▌▋▊▉█"

_OWN = str.maketrans(dict.fromkeys(f"{_BLOCKS}‥…\N{MULTIPLICATION SIGN}", " "))
"""Our own symbols, one column each."""

_CODE = r"\x1b\[[0-9;]*m"
"""What colors text; none comes from files, for their control characters are escaped."""

_RESET = "\x1b[0m"

_WORD = r"( *)(\S*\[[\d, ]*\]\S*|[\d.,]+ (?:[kMGT]?B|\N{MULTIPLICATION SIGN})(?!\w)\S*|\S+)"
"""Spaces, and what is behind them: a shape, and a number with its unit, are one word."""


class Cell(str):
    """A cell that has shorter forms.

    Attributes:
        forms: what may be in its place, each shorter than the one before.  If the first is how the cell begins, what
            follows that may be cut.
    """

    __slots__ = ("forms",)

    forms: tuple[str, ...]

    def __new__(cls, text: str, *forms: str) -> Cell:
        cell = super().__new__(cls, text)
        cell.forms = forms
        return cell


def count_cell(count: int) -> str:
    """A number in full, or where there is no room in three digits: ``11,689,512`` or ``11.7 M``; nothing of 0."""
    text, size = f"{count:,}" if count else "", float(count)
    for unit in ("", "k", "M", "B", "T"):
        if size < 999.5 or unit == "T":
            short = f"{size:.3g} {unit}"
            return Cell(text, short) if len(short) < len(text) else text
        size /= 1000
    return text


def bar(share: float, width: int = 6) -> str:
    """A share of 1 as a bar of at most so many columns; nothing of nothing."""
    eighths = min(max(round(share * width * 8), int(share > 0)), width * 8)
    return _BLOCKS[8] * (eighths // 8) + _BLOCKS[eighths % 8].strip()


class _Layout(NamedTuple):
    """A way to lay out a table.

    Attributes:
        inside: the columns of a row.
        below: those that are below it.
        stage: how far the others give way: 0, notes; 1, names and counts too; 2, names down to a few letters.
        note: columns that notes keep.
    """

    inside: tuple[int, ...]
    below: tuple[int, ...] = ()
    stage: int = 0
    note: int = _LEAST_NOTE


def columns(
    rows: Sequence[Sequence[str]],
    headers: Sequence[str],
    align: str,
    width: int | None = None,
    *,
    first: Sequence[int] = (),
    last: Sequence[int] = (),
) -> list[str]:
    """The lines of a table: two spaces between columns, each aligned as ``align`` says (``"nrl"``).

    Not by tabulate, whose import takes longer than inspecting a file, and which cuts no line to a terminal's width.

    Args:
        rows: cells.
        headers: of the columns; none: there is no line of them.
        align: for each column: ``"n"``, a name, to the left, cut in the middle so that those that differ do so still;
            ``"p"``, a path, to the left, cut at its beginning, before the name of the file;
            ``"l"``, a note, to the left, cut at its end; ``"r"``, a number, to the right, never cut.
        width: columns a line may have; ``None``: as many as it takes.
        first: columns that are left out before names and counts are shortened, one after the other.
        last: columns that are left out after that, one after the other.
    """
    table = [headers, *rows] if headers else rows
    table = table if width is None else [[*map(_encodable, row)] for row in table]
    layout, widths = _Layout(tuple(range(len(align)))), dict[int, int]()
    for layout in _layouts(align, first, last):
        widths = _widths(table, align, width, layout)
        if width is None or sum(widths.values()) + _GAP * (len(widths) - 1) <= width:
            break
    cut = {
        i: (_paths if align[i] == "p" else _names)([row[i] for row in table], widths[i])
        for i in layout.inside
        if align[i] in _NAMES
    }
    lines = []
    for number, row in enumerate(table):
        moved = [i for i in layout.inside if i not in cut and not _finds_room(row[i], widths[i])]
        cells = [
            ("" if i in moved else cut[i][number] if i in cut else _shortened(row[i], widths[i]), i)
            for i in layout.inside
        ]
        lines.append((" " * _GAP).join(padded(cell, widths[i], align[i]) for cell, i in cells).rstrip())
        if number or not headers:
            below = [i for i in (*layout.below, *moved) if _must_stand(row[i])]
            lines += _below(row, below, headers, align, width)
    return lines


def _below(row: Sequence[str], at: Sequence[int], headers: Sequence[str], align: str, width: int | None) -> list[str]:
    """The lines of the cells that are below their row; numbers are labelled."""
    told = [f"{headers[i]} {row[i]}" if align[i] == "r" and headers else row[i] for i in at]
    return [*wrapped(_INDENT + (" " * _GAP).join(told), width)] if told else []


def _encodable(cell: str) -> str:
    """The text with what the terminal's encoding lacks escaped, before columns are counted; not our own symbols."""
    encoding = "utf-8" if cell.isascii() else ending.stdout().encoding or "utf-8"
    if encoding.lower().startswith("utf"):
        return cell
    escaped = (c if ord(c) in _OWN else c.encode(encoding, "backslashreplace").decode(encoding) for c in cell)
    text = "".join(escaped)
    return Cell(text, *map(_encodable, cell.forms)) if isinstance(cell, Cell) else text


def _finds_room(cell: str, width: int) -> bool:
    return not isinstance(cell, Cell) or width_of(cell.forms[-1]) <= width


def _layouts(align: str, first: Sequence[int], last: Sequence[int]) -> Iterator[_Layout]:
    """The ways to lay out a table, each narrower than the one before."""
    inside = tuple(range(len(align)))
    yield _Layout(inside, note=_LONG_NOTE if first else _LEAST_NOTE)
    for number, left_out in enumerate(first, 1):
        inside = tuple(i for i in inside if i != left_out)
        yield _Layout(inside, note=_LONG_NOTE if number < len(first) else _LEAST_NOTE)
    yield _Layout(inside, stage=1)
    for left_out in last:
        inside = tuple(i for i in inside if i != left_out)
        yield _Layout(inside, stage=1)
    name = next((i for i, kind in enumerate(align) if kind in _NAMES), 0)
    notes = tuple(i for i in inside if align[i] == "l" and i != name)
    yield _Layout(tuple(i for i in inside if i not in notes), notes, 2)
    yield _Layout((name,), tuple(i for i in inside if i != name), 2)


def _widths(table: Sequence[Sequence[str]], align: str, width: int | None, layout: _Layout) -> dict[int, int]:
    """The width of each column of a layout: no more than there is room for, if they can give way so far."""
    widths = {i: max(width_of(row[i]) for row in table) for i in layout.inside}
    if width is None:
        return widths
    least: list[tuple[int, int]] = []
    notes = [i for i in reversed(layout.inside) if align[i] == "l"]
    names = [i for i in layout.inside if align[i] in _NAMES]
    least += ((i, width * 2 // 5) for i in names)
    least += ((i, max(_least(row[i], layout.note, width // 2) for row in table)) for i in notes)
    if layout.stage:
        least += ((i, _LONG_NAME) for i in names if align[i] != "p")
        least += ((i, max(_least(row[i], widths[i], width) for row in table)) for i in layout.inside if align[i] == "r")
        least += ((i, _least_name(align[i], width) if layout.stage == 1 else 1) for i in names or layout.inside[:1])
    surplus = sum(widths.values()) + _GAP * (len(widths) - 1) - width
    for i, fewest in least:
        given = max(min(surplus, widths[i] - fewest), 0)
        widths[i] -= given
        surplus -= given
    return widths


def _least_name(kind: str, width: int) -> int:
    """The columns that a name keeps as long as there is room for all else."""
    return max(_LEAST_NAME, int(width * _LEAST_OF_PATH)) if kind == "p" else _LEAST_NAME


def _least(cell: str, fewest: int, most: int) -> int:
    """The columns that a cell needs: of one without other forms ``fewest``; none if it needs more than ``most``."""
    least = width_of(cell.forms[-1]) if isinstance(cell, Cell) else min(width_of(cell), fewest)
    return least if least <= most else 0


def _must_stand(cell: str) -> bool:
    return bool(cell) and not (isinstance(cell, Cell) and not cell.forms[-1])


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii() or text.translate(_OWN).isascii():
        return len(text)
    from wcwidth import wcswidth  # most files do without

    width = wcswidth(text)
    return width if width >= 0 else len(text)


def seen(text: str) -> int:
    """The same, for text that may be colored."""
    return width_of(re.sub(_CODE, "", text))


def padded(cell: str, width: int, side: str = "l") -> str:
    """The cell with spaces to so many columns, aligned to the right (``"r"``) or left (any other)."""
    spaces = " " * (width - width_of(cell))
    return spaces + cell if side == "r" else cell + spaces


def _characters(text: str) -> list[str]:
    """What a reader sees as characters."""
    if text.isascii() or text.translate(_OWN).isascii():
        return [*text]
    from wcwidth import iter_graphemes

    return [*iter_graphemes(text)]


def _shortened(cell: str, width: int) -> str:
    """The cell, or what says less, in so many columns."""
    if width_of(cell) <= width:
        return cell
    forms = cell.forms if isinstance(cell, Cell) else ()
    if forms and cell.startswith(forms[0]) and width - width_of(forms[0]) >= _LEAST_NOTE:
        return forms[0] + _middle(cell[len(forms[0]) :], width - width_of(forms[0]))
    for form in forms:
        if width_of(form) <= width:
            return form
    return _cut(_characters((forms and forms[-1]) or cell), width, 0)


def _cut(characters: Sequence[str], width: int, tail: int) -> str:
    """The beginning and so many columns of the end, with an ellipsis between."""
    ending = _head(characters[::-1], tail)
    return f"{''.join(_head(characters, width - 1 - tail))}…{''.join(reversed(ending))}"


def _head(characters: Sequence[str], width: int) -> Sequence[str]:
    """As many of them as there are columns for."""
    totals = itertools.accumulate(map(width_of, characters))
    return characters[: sum(1 for _ in itertools.takewhile(width.__ge__, totals))]


def _middle(name: str, width: int) -> str:
    """A name in so many columns, cut in the middle; spaces before it are fewer where they would be most of it."""
    if width_of(name) <= width:
        return name
    bare = name.lstrip(" ")
    indent = min(len(name) - len(bare), width // 3)
    room = width - indent
    return " " * indent + (bare if width_of(bare) <= room else _cut(_characters(bare), room, (room - 1) // 2))


def _paths(cells: Sequence[str], width: int) -> list[str]:
    """Paths in so many columns: the name of each file, as long as it fits, and what is before it as far as it does."""
    return [_end_of(cell, width) for cell in cells]


def _end_of(path: str, width: int) -> str:
    if width_of(path) <= width:
        return path
    name = path[max(path.rfind("/"), path.rfind("\\")) + 1 :]
    return _middle(name, width) if width_of(name) >= width else _cut(_characters(path), width, width - 1)


def _names(cells: Sequence[str], width: int) -> list[str]:
    """Names in so many columns: those that differ do so still, as far as there is room for it."""
    cut = {cell: _middle(cell, width) for cell in cells}
    if any(cell != short for cell, short in cut.items()):
        _tell_apart(cut, [*cut], width, 0, Counter(cut.values()))
    return [cut[cell] for cell in cells]


def _tell_apart(cut: dict[str, str], names: Sequence[str], width: int, known: int, shown: Counter[str]) -> None:
    """Cut those that look alike where they begin to differ, or a little before, where others would look like that.

    Args:
        cut: each name, as it is shown.
        names: to look at.
        width: columns of each.
        known: characters they are known to have in common.
        shown: how many of all are shown as what.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(cut[name], []).append(name)
    for look, group in alike.items():
        characters = [_characters(name) for name in group]
        ends = zip(min(characters), max(characters), strict=False)
        at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends)) if len(group) > 1 else 0
        if at <= known:
            continue
        shown[look] -= len(group)
        for name, each in zip(group, characters, strict=True):
            looks = (_windowed(each, start, width) for start in range(at, max(at - _EARLIER, 0), -1))
            cut[name] = next((each for each in looks if not shown[each]), _windowed(each, at, width))
        shown.update(cut[name] for name in group)
        _tell_apart(cut, group, width, at, shown)


def _windowed(characters: Sequence[str], at: int, width: int) -> str:
    """A name in so many columns, of which most show what is there from a place on."""
    rest = "".join(characters[at:])
    head = _cut(characters[:at], max(width - min(width_of(rest), width * 2 // 3), 1), 0)
    return head + _middle(rest, width - width_of(head))


def wrapped(text: str, width: int | None, indent: int | None = None) -> Iterator[str]:
    """The text in lines of at most so many columns, all but the first indented; a word that is longer is broken.

    Args:
        text: one line, perhaps colored.
        width: columns of the terminal; ``None``: it stays one line.
        indent: columns before all lines but the first; ``None``, or more than half of them: four more than before that.
    """
    text = text if width is None else _encodable(text)
    if width is None or seen(text) <= width:
        yield text
        return
    colors = ""
    if indent is None or indent > width // 2:
        indent = len(text) - len(text.lstrip(" ")) + len(_INDENT)
    for line in _lines(text, width, " " * indent):
        started = colors
        for code in re.findall(_CODE, line):
            colors = "" if code == _RESET else colors + code
        yield started + line + _RESET * bool(colors)


def _lines(text: str, width: int, indent: str) -> Iterator[str]:
    bare = text.lstrip(" ")
    line = text[: len(text) - len(bare)]
    used, is_empty = len(line), True
    for spaces, word in re.findall(_WORD, bare):
        for number, piece in enumerate(_pieces(word, max(width - len(indent), _LEAST_NOTE))):
            gap = "" if is_empty else spaces
            if not is_empty and (number or used + len(gap) + seen(piece) > width):
                yield line
                line, used, gap = indent, len(indent), ""
            line, used, is_empty = line + gap + piece, used + len(gap) + seen(piece), False
    yield line


def _pieces(word: str, room: int) -> Iterator[str]:
    """The word, or if it is longer than there is room for, so much of it at a time."""
    if seen(word) <= room:
        yield word
        return
    piece, used = "", 0
    for part in re.split(f"({_CODE})", word):
        for character in [part] if re.fullmatch(_CODE, part) else _characters(part):
            wide = seen(character)
            if used and used + wide > room:
                yield piece
                piece, used = "", 0
            piece, used = piece + character, used + wide
    yield piece
