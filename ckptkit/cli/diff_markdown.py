"""Renders a difference as markdown, as for a pull request: the verdict first, long lists folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptkit.cli.diff_text import Table, file_line, tables
from ckptkit.cli.options import printable

__all__ = ["markdown"]

_OPEN = ("by module", "changed")
"""Beginnings of the titles of what is not folded."""


def markdown(document: Mapping[str, Any], *, top: int) -> Iterator[str]:
    """The lines of the markdown output.

    Args:
        document: of `ckptkit.differences.Difference.to_dict`.
        top: rows of each list.
    """
    yield f"## {'Same' if document['ok'] else 'Different'}: {_escaped(printable(document['summary']))}"
    yield ""
    for side in ("a", "b"):
        yield f"- **{side.upper()}** {_escaped(file_line(document[side]))}"
    for table in tables(document, top):
        is_open = table.title.startswith(_OPEN)
        yield ""
        yield f"### {table.title.capitalize()}" if is_open else f"<details><summary>{table.title}</summary>"
        yield ""
        yield from _table(table)
        if table.left_out:
            yield f"\nand {table.left_out:,} more"
        if not is_open:
            yield "\n</details>"
    if document["findings"]:
        yield "\n### Findings\n"
        for finding in document["findings"]:
            fix = f"  \n  Fix: {_code(printable(finding['fix']))}" if finding["fix"] else ""
            yield f"- **{finding['severity']}** `{finding['code']}`: {_escaped(printable(finding['message']))}{fix}"


def _table(table: Table) -> Iterator[str]:
    yield "| " + " | ".join(_escaped(header) for header in table.headers) + " |"
    yield "|" + "|".join("---:" if side == "r" else ":---" for side in table.align) + "|"
    for row in table.rows:
        cells = (_code(cell) if i in table.names else _escaped(cell) for i, cell in enumerate(row))
        yield "| " + " | ".join(cells) + " |"


def _code(cell: str) -> str:
    return "`" + cell.replace("`", "'").replace("|", "\\|") + "`" if cell else ""


def _escaped(text: str) -> str:
    """Text in which nothing is markup: names come from a stranger."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
