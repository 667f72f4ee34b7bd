"""What people see: text from files that nothing acts upon, sizes, and what notebooks show.

A notebook shows a block of HTML with a title, facts, a table and a tree that folds.  It is made of elements and inline
styles that notebooks allow: ``<details>`` folds without a script, and without styles (as in GitHub's view of a
notebook) an outline remains.  Text has the notebook's own color, so that it is readable on light and on dark; the few
colors are in dots and bars, with their meaning beside them in words.

No text of a file is markup, nothing is loaded, and nothing runs.  However much there is, a block stays small: cells,
rows and lines are limited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

__all__ = ["MOST_LINES", "TreeLine", "html_block", "human_size", "names_tree", "printable"]

MOST_LINES = 200
"""Lines of a tree, folded ones too."""

_MOST_OPEN = 24
"""Lines of it that are seen before anything is unfolded, and of a module's names those that are listed."""

_MAX_CELL = 500
"""Characters of a cell, and of a line."""

_MAX_LABEL = 160
"""Characters of a tree's label; names differ by their ends, so that these are kept."""

_MOST_NAMED = 8
"""Tensors of a module without others that are named on its line: a layer has up to eight."""

_MAX_LEVELS = 24
"""Dots of a name that make levels."""

_DOTS = {"ok": "#2da44e", "failed": "#e5484d", "error": "#e5484d", "warning": "#d29922", "info": "#539bf5"}
"""Colors of the dot before each word for a state, with a contrast of 3:1 against white and against black."""

_TEXT = ' style="white-space:pre-wrap"'
_CELL = (
    ' style="text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;vertical-align:top;min-width:5em;'
    'padding:.1em .9em .1em 0"'
)
_LIST = ' style="list-style:none;margin:0;padding:{}"'
_ITEM = ' style="margin:0;padding:0 0 0 {}"'
_LINE = ' style="display:inline-flex;width:calc(100% - {}em);gap:1em;vertical-align:top"'
_NAME = ' style="flex:1 1 13em;min-width:8em;font-family:monospace;overflow-wrap:anywhere"'
_NOTE = ' style="flex:1 1 16em;min-width:0;opacity:.75;overflow:hidden;text-overflow:ellipsis;white-space:nowrap"'


def printable(text: str) -> str:
    """Text from a file, with what a terminal would act upon (control characters) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def human_size(nbytes: int) -> str:
    """Bytes as people read them: ``"1.2 MB"``, in powers of 1000."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{nbytes} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{nbytes} B"


class TreeLine:
    """A module or a tensor.

    Attributes:
        level: 0 for what is at the top; what is in it follows.
        label: its name below what is above it.
        tensors: how many are in it; 0: it is one.
        elements, nbytes: of all of them.
        note: dtype and shape, or class.
    """

    __slots__ = ("elements", "label", "level", "nbytes", "note", "tensors")

    def __init__(self, level: int, label: str, tensors: int, elements: int, nbytes: int, note: str) -> None:
        self.level, self.label, self.note = level, label, note
        self.tensors, self.elements, self.nbytes = tensors, elements, nbytes


def html_block(
    title: str,
    lines: Iterable[str] = (),
    headers: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    left_out: int = 0,
    *,
    state: str = "",
    tree: Sequence[TreeLine] = (),
    tree_left_out: int = 0,
) -> str:
    """A title, lines, a table and a tree as HTML for a notebook, light or dark.

    Args:
        title: the subject.
        lines: below it, above the table; one that begins with a severity and a colon gets its dot.
        headers: of the columns; none: there is no table.
        rows: of the table, as many as are shown; a first cell that is a severity gets its dot.
        left_out: how many are not.
        state: ``"ok"`` or ``"failed"``: the title's dot.
        tree: each line before what is in it.
        tree_left_out: how many lines it has more.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{_CELL}>{_dot(text)}{_shown(text)}</{tag}>" for text in texts) + "</tr>"

    parts = [f"<div>{_dot(state)}<strong>{_shown(title)}</strong></div>"]
    parts += [f"<div{_TEXT}>{_dot(line.partition(':')[0])}{_shown(line)}</div>" for line in lines]
    if headers:
        parts += ["<table>", cells("th", headers), *(cells("td", row) for row in rows), "</table>"]
    if left_out > 0:
        parts.append(f"<div>and {left_out:,} more</div>")
    if tree:
        parts += _tree(tree)
    if tree_left_out > 0:
        parts.append(f"<div>and {tree_left_out:,} more</div>")
    return f'<div style="max-width:64em;line-height:1.5">{"".join(parts)}</div>'


def _shown(text: str) -> str:
    from html import escape  # few look at it

    return escape(printable(text if len(text) <= _MAX_CELL else text[:_MAX_CELL] + "…"))


def _dot(state: str) -> str:
    if state not in _DOTS:
        return ""
    shape = "display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.45em"
    return f'<span style="{shape};background:{_DOTS[state]}"></span>'


def _tree(lines: Sequence[TreeLine]) -> Iterable[str]:
    """The lines as a list, what is in each folded below it; as many levels are open as fit on a screen."""
    depth = max((line.level for line in lines), default=0)
    while depth and sum(line.level <= depth for line in lines) > _MOST_OPEN:
        depth -= 1
    whole = max((line.nbytes for line in lines), default=0) or 1
    yield f"<ul{_LIST.format('.6em 0 0')}>"
    above: list[int] = []
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        while above and above[-1] >= line.level:
            above.pop()
            yield "</ul></details></li>"
        if after is not None and after.level > line.level:
            above.append(line.level)
            inside = f"<summary>{_line(line, whole, 1.4)}</summary><ul{_LIST.format('0 0 0 1.2em')}>"
            yield f"<li{_ITEM.format(0)}><details{' open' * (line.level < depth)}>{inside}"
        else:
            yield f"<li{_ITEM.format('1.2em')}>{_line(line, whole, 0.4)}</li>"
    yield "</ul></details></li>" * len(above) + "</ul>"


def _line(line: TreeLine, whole: int, marker: float) -> str:
    """A line of the tree, ``marker`` em narrower than there is room, and a bar as wide as its share of the bytes."""
    share = f"{100 * line.nbytes / whole:.1f}%"
    bar = f"background:linear-gradient(#539bf566,#539bf566) right/{share} 100% no-repeat;padding-right:.3em;"
    half = _MAX_LABEL // 2
    label = line.label if len(line.label) <= _MAX_LABEL else f"{line.label[:half]}…{line.label[-half:]}"
    figures = [
        (_figure(8), f"{line.tensors:,} tensor{'s' * (line.tensors != 1)}" if line.tensors else ""),
        (_figure(12), f"{line.elements:,} element{'s' * (line.elements != 1)}" if line.elements else ""),
        (_figure(7, bar), human_size(line.nbytes) if line.nbytes else ""),
    ]
    return f"<span{_LINE.format(marker)}>{_spans([(_NAME, label), (_NOTE, line.note), *figures])}</span>"


def _figure(width: int, look: str = "") -> str:
    return f' style="{look}flex:none;width:{width}em;text-align:right;white-space:nowrap"'


def _spans(cells: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"<span{style}>{_shown(text)}</span>" for style, text in cells)


class _Module(dict[str, Any]):
    """The content of a module, by label: tensors as lines, and modules; with the totals."""

    tensors = elements = nbytes = 0


def names_tree(tensors: Iterable[tuple[str, str, int, int]]) -> tuple[list[TreeLine], int]:
    """The lines of the tree that dots in names make, and how many are left out.

    Args:
        tensors: name, note, elements and bytes of each, in order.
    """
    root = _Module()
    for name, note, elements, nbytes in tensors:
        inside = root
        *above, last = name.split(".", _MAX_LEVELS)
        for part in above:
            below = inside.setdefault(part, _Module())
            inside = below if isinstance(below, _Module) else inside.setdefault(f"{part}.", _Module())
            inside.tensors += 1
            inside.elements += elements
            inside.nbytes += nbytes
        inside[last if last not in inside else f"{last} "] = TreeLine(0, "", 0, elements, nbytes, note)
    lines = [*_lines(root, 0, 0)]
    for depth in range(1, _MAX_LEVELS + 1):
        deeper = [*islice(_lines(root, 0, depth), MOST_LINES + 1)]
        if len(deeper) > MOST_LINES:
            break
        lines = deeper
    return lines, len(root) - min(len(root), _MOST_OPEN)


def _lines(inside: _Module, level: int, depth: int) -> Iterator[TreeLine]:
    for label, below in islice(inside.items(), _MOST_OPEN):
        if not isinstance(below, _Module):
            yield TreeLine(level, label, 0, below.elements, below.nbytes, below.note)
            continue
        while len(below) == 1 and isinstance(only := next(iter(below.values())), _Module):  # a name on its own
            label, below = f"{label}.{next(iter(below))}", only
        is_small = len(below) <= _MOST_NAMED and not any(isinstance(each, _Module) for each in below.values())
        note = ", ".join(f"{name} {each.note}" for name, each in below.items()) if is_small else ""
        yield TreeLine(level, label, below.tensors, below.elements, below.nbytes, note)
        if level < depth and not is_small:
            yield from _lines(below, level + 1, depth)
    if level and (left_out := len(inside) - _MOST_OPEN) > 0:
        yield TreeLine(level, f"and {left_out:,} more", 0, 0, 0, "")
