"""Renders the inspect document as markdown: facts, sections, folded tree and findings, as for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from tabulate import tabulate  # a fifth of the start-up time: this module is imported where it is needed

from ckptkit.cli import inspect_text as as_text
from ckptkit.cli.options import printable
from ckptkit.inspection.state import printed_model
from ckptkit.report import count_of, human_size

__all__ = ["markdown"]

_MAX_TENSORS = 1000
"""Rows of the tensor table: the longest comment a forge takes has 65,536 characters."""

_MAX_PRINTED = 400
"""Lines of the printed model."""


def markdown(document: dict[str, Any], *, depth: int | None = None, sort: str = "file") -> Iterator[str]:
    """The lines of the markdown output.

    Args:
        document: of `ckptkit.inspection.survey`.
        depth: levels of the module tree; ``None``: as many as are still readable.
        sort: the order of the tree.
    """
    yield f"## {_code(printable(document['path']))}"
    yield ""
    yield _escaped(as_text.facts(document))
    yield ""
    yield f"It holds {_escaped(as_text.what_it_is(document))}."
    facts = [f"- **{label}**: {_escaped(line)}" for label, line in as_text.fact_lines(document) if line]
    if facts:
        yield ""
        yield from facts
    rows, headers, align = as_text.section_table(document)
    if rows:
        yield ""
        yield from _table([[_code(c) if i == 1 else c for i, c in enumerate(row)] for row in rows], headers, align)
    if document["tensors"]:
        yield ""
        lines, left_out = as_text.outline_of(document, depth, sort)
        tree, headers, align = as_text.tree_table(lines)
        cells = [[_indented(row[0]), *row[1:-1], _code(row[-1]) if row[-1] else ""] for row in tree]
        yield from _table(cells, headers, align)
        if left_out:
            yield f"\nand {left_out:,} more"
    yield from _training(document)
    if document["findings"]:
        yield "\n### Findings\n"
        for finding in document["findings"]:
            fix = f"  \n  Fix: {_code(printable(finding['fix']))}" if finding["fix"] else ""
            yield f"- **{finding['severity']}** `{finding['code']}`: {_escaped(printable(finding['message']))}{fix}"
    yield from _details(document)


def _training(document: dict[str, Any]) -> Iterator[str]:
    lines = [line for line in as_text.training_lines(document, lambda text, **_: text) if line]
    if lines:
        yield f"\n### {lines[0].capitalize()}\n"
        yield from (f"- {_escaped(line.strip())}" for line in lines[1:])


def _details(document: dict[str, Any]) -> Iterator[str]:
    """What is too long to be shown at once: the model as it prints, and every tensor."""
    if document["modules"]:
        lines = list(islice(printed_model(document["modules"]), _MAX_PRINTED + 1))
        yield "\n<details><summary>print(model)</summary>\n"
        yield "```text"
        yield from (printable(line).replace("```", "'''") for line in lines[:_MAX_PRINTED])
        if len(lines) > _MAX_PRINTED:
            yield "..."
        yield "```\n\n</details>"
    rows = document["tensors"][:_MAX_TENSORS]
    if not rows:
        return
    extra = as_text.STATS if rows[0].stats is not None else ()
    several = ["section"] if document["state_dict"] is not None and len(document["sections"]) > 1 else []
    cells = []
    for row in rows:
        names = [*(_code(printable(row.section or "")) for _ in several), _code(as_text.full_name(row, document))]
        facts = [row.dtype, as_text.shape(row), human_size(row.nbytes), _escaped(printable(row.location))]
        cells.append([*names, *facts, *(as_text.figure((row.stats or {})[key]) for key in extra)])
    yield f"\n<details><summary>{count_of(len(document['tensors']), 'tensor')}</summary>\n"
    headers = [*several, "tensor", "dtype", "shape", "bytes", "device", *extra]
    yield from _table(cells, headers, "l" * len(several) + "lllrl" + "r" * len(extra))
    if len(document["tensors"]) > _MAX_TENSORS:
        yield f"\nand {len(document['tensors']) - _MAX_TENSORS:,} more (--flat shows all)"
    yield "\n</details>"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], align: str) -> Iterator[str]:
    sides = ["right" if a == "r" else "left" for a in align]
    yield tabulate(rows, headers, "pipe", disable_numparse=True, colalign=sides)


def _indented(label: str) -> str:
    """A label of the tree; spaces at the beginning of a cell would be lost."""
    bare = label.lstrip(" ")
    return "&nbsp;" * (len(label) - len(bare)) + _code(bare)


def _code(cell: str) -> str:
    return "`" + cell.replace("`", "'").replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """Text in which nothing is markup: names come from a stranger."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
