"""The screen that ``ckptkit diff`` shows: both files, the verdict, what changed by module, the largest changes.

Renders a difference as markdown, as for a pull request: the verdict first, long lists folded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptkit.cli.options import COLORS, Style, columns, printable, wrapped
from ckptkit.report import count_of, human_size

__all__ = ["Table", "figure", "file_line", "markdown", "notes", "tables", "text"]

_MOST_MODULES = 30
"""Rows of the table of modules."""

_MAX_VALUE = 60
"""Characters of a value of the metadata or the training state."""

_STATUSES = ("changed", "recast", "reshaped", "renamed", "added", "removed", "not compared")


class Table(NamedTuple):
    """A list of the document as a table.

    Attributes:
        title: above it; ``rows``, ``headers``, ``align``: as `ckptkit.cli.options.columns` takes them.
        names: the columns that hold text from the files.
        left_out: rows that are not shown.
    """

    title: str
    rows: list[list[str]]
    headers: list[str]
    align: str
    names: tuple[int, ...]
    left_out: int


def text(document: Mapping[str, Any], style: Style, *, top: int, width: int | None = None) -> Iterator[str]:
    """The lines of the text output.

    Args:
        document: of `ckptkit.differences.Difference.to_dict`.
        style: how to colour.
        top: rows of each list.
        width: characters of a line on the terminal; ``None``: nothing is cut.
    """
    for side in ("a", "b"):
        yield from wrapped(f"{style(side.upper(), bold=True)}  {file_line(document[side])}", width)
    label = style("same", fg="green", bold=True) if document["ok"] else style("different", fg="red", bold=True)
    yield from wrapped(f"{label}: {printable(document['summary'])}", width)
    for table in tables(document, top):
        yield ""
        yield style(table.title, bold=True)
        if table.rows:
            lines = columns(table.rows, table.headers, table.align, None if width is None else width - 2)
            yield "  " + style(lines[0], dim=True)
            yield from (f"  {line}" for line in lines[1:])
        if table.left_out:
            yield style(
                f"  and {table.left_out:,} more (--top {len(table.rows) + table.left_out}, or --json)", dim=True
            )
    if document["findings"]:
        yield ""
    for finding in document["findings"]:
        severity = finding["severity"]
        shown = style(severity, fg=COLORS[severity], bold=severity == "error")
        yield from wrapped(f"{shown}: {printable(finding['message'])} [{finding['code']}]", width)
        if finding["fix"]:
            yield f"    {printable(finding['fix'])}"


def file_line(facts: Mapping[str, Any]) -> str:
    """A file and what it is, in a line."""
    parts = [facts["format"], facts["kind"].replace("_", " "), human_size(facts["size"])]
    if facts["section"] is not None:
        where = f" under {facts['section']!r}" if facts["section"] else ""
        parts.append(f"{count_of(facts['tensors'], 'tensor')} of {human_size(facts['nbytes'])}{where}")
    if facts["writer"]:
        parts.append(f"written by {facts['writer']}")
    return printable(f"{facts['path']}: {', '.join(parts)}")


def tables(document: Mapping[str, Any], top: int) -> Iterator[Table]:
    """Every list of the document that has something to say, each with a title."""

    def table(
        title: str, found: Sequence[list[str]], headers: str, align: str, *names: int, most: int = top
    ) -> Iterator[Table]:
        if found:
            cells = [[printable(cell) for cell in row] for row in found[:most]]
            yield Table(title, cells, headers.split(","), align, names, max(len(found) - most, 0))

    def values(title: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
        found = [[row["key"], _shown(row["a"]), _shown(row["b"])] for row in rows]
        yield from table(title, found, "key,A,B", "lll", 0, 1, 2)

    changed, within = document["changed"], document["within_tolerance"]
    modules = document["modules"]
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
        yield from table("by module", rows, "module,differing,what,max |b-a|", "lrlr", 0, most=_MOST_MODULES)
    headers = "tensor,dtype,shape,max |b-a|,mean |b-a|,|b-a|/|a|,cosine,equal,"
    yield from table(_title(changed, "changed"), [_changed(row) for row in changed], headers, "lllrrrrrl", 0)
    yield from table(_title(within, "within tolerance"), [_changed(row) for row in within], headers, "lllrrrrrl", 0)
    for key in ("added", "removed"):
        where = "B" if key == "added" else "A"
        found = [[name] for name in document[key]]
        yield from table(f"{key}: {count_of(len(found), 'tensor')} only in {where}", found, "name", "l", 0)
    renamed = [[row["from"], row["to"], f"by {row['by']}", row["confidence"]] for row in document["renamed"]]
    yield from table(_title(renamed, "renamed"), renamed, "from,to,found,confidence", "llll", 0, 1)
    reshaped = [
        [row["name"], str(row["from"]), str(row["to"]), _yes(row["same_values"], "the same values", "other values")]
        for row in document["reshaped"]
    ]
    yield from table(_title(reshaped, "reshaped"), reshaped, "tensor,from,to,", "llll", 0)
    recast = [
        [row["name"], row["from"], row["to"], figure(row["max_abs"]),
         _yes(row["equal_after_cast"], "equal after the cast", "not equal after the cast")]
        for row in document["recast"]
    ]  # fmt: skip
    yield from table(_title(recast, "recast"), recast, "tensor,from,to,max |b-a|,", "lllrl", 0)
    others = [[row["name"], row["a"], row["b"]] for row in document["values"]]
    yield from table("values that are not plain tensors and differ", others, "name,A,B", "lll", 0, 1, 2)
    lost = [[row["name"], row["reason"]] for row in document["not_compared"]]
    yield from table("not compared", lost, "name,why", "ll", 0)
    sections = [
        [row["path"] or "(whole file)", row["kind"], _count(row["a"]), _count(row["b"]), _section(row)]
        for row in document["sections"]
    ]
    yield from table("beside the weights", sections, "section,kind,tensors in A,in B,", "llrrl", 0)
    yield from values("metadata", document["metadata"])
    yield from values("training state", document["training"])
    told = {row["key"] for row in document["training"]}
    rest = [row for row in document["tree"] if row["what"] == "tensor" or row["path"] not in told]
    rows = [[row["path"] or "(whole file)", row["a"] or "-", row["b"] or "-", figure(row["max_abs"])] for row in rest]
    unlisted = document["tree_differences"] - len(document["tree"])
    for each in table("elsewhere in the files", rows, "place,A,B,max |b-a|", "lllr", 0, 1, 2):
        yield each._replace(left_out=each.left_out + unlisted)


def notes(row: Mapping[str, Any]) -> str:
    """What is to be said of a change beyond its figures."""
    if row["nan"] is None:
        return "its values cannot be computed"
    if row["only_zero_signs"]:
        return "but for the sign of zeros the same"
    if row["only_nan_bits"]:
        flipped = f", {row['nan']['signs']:,} of other sign" if row["nan"]["signs"] else ""
        return f"only bits of NaN differ{flipped}"
    found = [
        f"NaN only in {side.upper()}: {row['nan'][side]:,}" for side in ("a", "b") if row["nan"][side]
    ]  # fmt: skip
    if row["nan"]["both"]:
        found.append(f"NaN in both: {row['nan']['both']:,}")
    if row["nan"]["signs"]:
        found.append(f"of other sign: {row['nan']['signs']:,}")
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


def _changed(row: Mapping[str, Any]) -> list[str]:
    name = f"{row['name']} (was {row['was']})" if "was" in row else row["name"]
    figures = [figure(row[key]) for key in ("max_abs", "mean_abs", "relative_norm")]
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


def _section(row: Mapping[str, Any]) -> str:
    if row["equal"] is None:
        return "only in A" if row["b"] is None else "only in B"
    return "the same" if row["equal"] else f"{row['differing']:,} {'differs' if row['differing'] == 1 else 'differ'}"


def _shown(value: object) -> str:
    shown = "-" if value is None else str(value)
    return shown if len(shown) <= _MAX_VALUE else shown[:_MAX_VALUE] + "…"


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
