"""Every document as markdown, as for a pull request: the verdict first, long lists folded.

Names come from strangers: nothing of theirs is markup.  The vocabulary is at the end: a table, what is folded,
findings, code, and text in which nothing is markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from ckptkit.cli import inspect_text as as_text
from ckptkit.cli import tensor_tables as of_tensors
from ckptkit.cli.closing import combined_title
from ckptkit.cli.options import View, printable
from ckptkit.formats.folder import passed_over_text
from ckptkit.inspection import surveyed
from ckptkit.inspection.state import printed_model
from ckptkit.report import CombinedFix, FindingDocument, count_of, human_size

if TYPE_CHECKING:
    from ckptkit.conversion.document import ConvertFolderDocument
    from ckptkit.differences.difference import DiffDocument
    from ckptkit.documents import CheckDocument, ConvertDocument, ExplainDocument, ManifestDocument, VerifyDocument
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import InspectedFile

__all__ = ["check", "convert", "diff", "explain", "inspect", "manifest", "verify"]

_MAX_TENSORS = 1000
"""Rows of the tensor table: the longest comment a forge takes has 65,536 characters."""

_MAX_PRINTED = 400
"""Lines of the printed model."""

_MAX_ROWS = 200
"""Rows of the tables of a check."""

_MAX_CELL = 200
"""Characters of a cell of them."""

_OPEN = ("by module", "changed")
"""Beginnings of the titles of what is not folded in a difference."""


def inspect(document: InspectedFile | Survey, view: View) -> Iterator[str]:
    """One file: facts, sections, the tree, training state and findings; the model and every tensor folded."""
    document = surveyed(document)
    yield f"## {code(document['path'])}"
    yield ""
    yield escaped(as_text.facts(document))
    yield ""
    yield f"It contains {escaped(as_text.what_it_is(document))}."
    facts = [f"- **{label}**: {escaped(line)}" for label, line in as_text.fact_lines(document) if line]
    if facts:
        yield ""
        yield from facts
    rows, headers, align = as_text.section_table(document)
    if rows:
        yield ""
        yield from _aligned([[code(c) if i == 1 else c for i, c in enumerate(row)] for row in rows], headers, align)
    if document["tensors"]:
        yield ""
        lines, left_out = of_tensors.outline_of(document, view.depth, view.sort)
        tree, headers, align = of_tensors.tree_table(lines)
        yield from _aligned([[_indented(row[0]), *row[1:-1], code(row[-1])] for row in tree], headers, align)
        yield from and_more(left_out)
    training = [line for line in as_text.training_lines(document, View().style) if line]
    if training:
        yield f"\n### {training[0].capitalize()}\n"
        yield from (f"- {escaped(line.strip())}" for line in training[1:])
    yield from findings(document["findings"])
    yield from combined(document.get("combined_fix"), document["findings"])
    if document["modules"]:
        yield from folded("print(model)", _printed(document))
    if document["tensors"]:
        yield from folded(count_of(len(document["tensors"]), "tensor"), _tensors(document))


def _printed(document: Survey) -> Iterator[str]:
    lines = list(islice(printed_model(document["modules"]), _MAX_PRINTED + 1))
    yield "```text"
    yield from (printable(line).replace("```", "'''") for line in lines[:_MAX_PRINTED])
    if len(lines) > _MAX_PRINTED:
        yield "..."
    yield "```"


def _tensors(document: Survey) -> Iterator[str]:
    rows = document["tensors"][:_MAX_TENSORS]
    extra = of_tensors.STATS if rows[0].stats is not None else ()
    several = ["section"] if document["state_dict"] is not None and len(document["sections"]) > 1 else []
    cells = []
    for row in rows:
        names = [*(code(row.section or "") for _ in several), code(of_tensors.full_name(row, document))]
        facts = [row.dtype, of_tensors.shape(row), human_size(row.nbytes), escaped(row.location)]
        cells.append([*names, *facts, *of_tensors.stat_cells(row)])
    headers = [*several, "tensor", "dtype", "shape", "bytes", "device", *extra]
    yield from _aligned(cells, headers, "l" * len(several) + "lllrl" + "r" * len(extra))
    yield from and_more(len(document["tensors"]) - len(rows), " (--flat shows all)")


def _indented(label: str) -> str:
    """A label of the tree; spaces at the beginning of a cell would be lost."""
    bare = label.lstrip(" ")
    return "&nbsp;" * (len(label) - len(bare)) + code(bare)


def convert(document: ConvertDocument | ConvertFolderDocument, view: View) -> Iterator[str]:
    """What was written, or would be, how its bytes are moved, and what changes; of a folder a row a file."""
    from ckptkit.cli.convert import changes, step_rows

    if "files" in document:
        yield from _converted_folder(cast("ConvertFolderDocument", document))
        return
    plan = document["plan"]
    state = (
        "the plan" if not document["written"] else "written, " + ("compared" if document["checked"] else "unchecked")
    )
    size = f"{count_of(plan['tensors'], 'tensor')}, {human_size(plan['nbytes'])}"
    if "part" in document:
        state = f"part {document['part']['part']} of {document['part']['of']} {state}"
    yield f"## {code(document['destination'])}: {state}"
    yield ""
    yield f"From {code(document['source'])}: {plan['format']}, {size}."
    yield ""
    yield from table(step_rows(document), ["moved as", "steps", "bytes"], "lrr")
    for kind, items in changes(document):
        yield from folded(f"{kind} ({len(items):,})", _first([f"- {code(item)}" for item in items], _MAX_ROWS))
    yield from findings(document["findings"])


def _converted_folder(document: ConvertFolderDocument) -> Iterator[str]:
    from ckptkit.cli.convert import findings_of, summary

    failed = any(file["error"] is not None for file in document["files"])
    state = "**some files could not be converted**" if failed else "written" if document["written"] else "the plan"
    yield f"## {code(document['destination'])}: {state}"
    yield ""
    yield f"From {code(document['source'])}."
    yield from (f"\n{line[0].upper()}{escaped(line[1:])}." for line in summary(document))
    yield ""
    rows = [
        [
            code(file["source"], _MAX_CELL),
            code(file["destination"] or "", _MAX_CELL),
            *(
                [f"{file['plan']['tensors']:,}", human_size(file["plan"]["nbytes"]), ""]
                if file["error"] is None
                else ["", "", f"**error**: {escaped(file['error']['message'])}"]
            ),
        ]
        for file in document["files"][:_MAX_ROWS]
    ]
    yield from table(rows, ["file", "output", "tensors", "bytes", ""], "llrrl")
    yield from and_more(len(document["files"]) - len(rows))
    yield from findings(findings_of(document))


def verify(document: VerifyDocument, view: View) -> Iterator[str]:
    """The verdict, and each check with what it found."""
    from ckptkit.cli.verify import check_rows

    yield f"## ckptkit verify: {'passed' if document['ok'] else '**failed**'}"
    yield ""
    yield f"{code(document['path'])} against {code(document['reference'])} on {escaped(document['device'])}."
    yield ""
    rows = [
        [row.name, f"**{row.label}**" if row.label in ("failed", "error") else row.label, escaped(row.text)]
        for row in check_rows(document)
    ]
    yield from table(rows, ["check", "", ""], "lll")
    yield from fixes(document["findings"])
    yield from combined(document.get("combined_fix"), document["findings"])


def diff(document: DiffDocument, view: View) -> Iterator[str]:
    """The verdict, both files, and every list of what differs."""
    from ckptkit.cli.diff import file_line, tables

    yield f"## {'Same' if document['ok'] else 'Different'}: {escaped(document['summary'])}"
    yield ""
    for side, facts in (("A", document["a"]), ("B", document["b"])):
        yield f"- **{side}** {escaped(file_line(facts))}"
    for each in tables(document, view.top):
        cells = [[code(cell) if i in each.names else escaped(cell) for i, cell in enumerate(row)] for row in each.rows]
        lines = [*table(cells, each.headers, each.align), *and_more(each.left_out)]
        if each.title.startswith(_OPEN):
            yield f"\n### {each.title.capitalize()}\n"
            yield from lines
        else:
            yield from folded(each.title, lines)
    yield from findings(document["findings"])


def check(document: CheckDocument, view: View) -> Iterator[str]:
    """The verdict, a table of what is wrong, and the files with their rules folded away."""
    from ckptkit.released.results import exit_code_of, verdict_of  # checking alone needs them

    verdict = verdict_of(document)
    yield f"## ckptkit check: {'passed' if exit_code_of(document) == 0 else '**failed**'}"
    yield ""
    yield f"{verdict[0].upper()}{verdict[1:]}."
    if document["passed_over"]:
        yield f"\nS{passed_over_text(document['passed_over'])[1:]}."
    found = document["findings"]
    if found:
        yield ""
        rows = [
            [
                code(each["path"], _MAX_CELL),
                each["rule"],
                _value(each["expected"]),
                _value(each["found"]),
                f"{each['severity']}: {escaped(each['message'])} (`{each['code']}`)",
            ]
            for each in found[:_MAX_ROWS]
        ]
        yield from table(rows, ["file", "rule", "expected", "found", ""], "lllll")
        yield from and_more(len(found) - len(rows))
    yield from fixes(found[:_MAX_ROWS])
    for each in document["files"][:_MAX_ROWS]:
        own = [finding for finding in found if finding["path"] == each["path"]] if each.get("combined_fix") else []
        yield from combined(each.get("combined_fix"), own)
    files = document["files"]
    outcomes = {(True, True): "ok", (False, True): "**failed**"}
    rows = [
        [
            code(each["path"], _MAX_CELL),
            "" if each["size"] is None else human_size(each["size"]),
            ", ".join(each["rules"]),
            outcomes.get((each["ok"], each["checked"]), "**not checked**"),
        ]
        for each in files[:_MAX_ROWS]
    ]
    lines = [*table(rows, ["file", "size", "rules", ""], "lrll"), *and_more(len(files) - len(rows))]
    yield from folded(f"Files ({len(files):,})", lines)


def _value(value: Any) -> str:
    """What a rule wants, or what is there."""
    if value is None:
        return ""
    return code(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value), _MAX_CELL)


def manifest(document: ManifestDocument, view: View) -> Iterator[str]:
    """The files that were added, changed or removed, and how many there are."""
    from ckptkit.cli.manifest import changed_files, told

    name = view.written
    yield f"## {'Manifest' if name is None else code(name)}: {escaped(told(document))}"
    rows = [[what, code(path), escaped(about)] for what, path, about in changed_files(document)]
    if rows:
        yield ""
        yield from table(rows, ["", "file", ""], "lll")
    if document.get("passed_over"):
        yield f"\nS{passed_over_text(document['passed_over'])[1:]}."


def explain(document: ExplainDocument, view: View) -> Iterator[str]:
    """A code, a topic, or the tables of all."""
    from ckptkit.cli.explain import titled

    codes, topics = document["codes"], document.get("topics", {})
    if codes and topics:
        yield from table([[code(name), escaped(titled(topics[name]))] for name in topics], ["topic", ""], "ll")
        yield ""
        yield from table([[code(name), escaped(codes[name]["title"])] for name in sorted(codes)], ["code", ""], "ll")
        return
    for name, said in codes.items():
        yield f"## {code(name)}: {escaped(said['title'])}"
        yield from (f"\n{escaped(part)}" for part in (said["meaning"], said["remedy"]) if part != "-")
    for text in topics.values():
        yield from text.splitlines()


# The vocabulary.


def table(rows: Iterable[Sequence[str]], headers: Sequence[str], align: str) -> Iterator[str]:
    """A table, of cells that are markup already; each column to the left (``"l"``) or right (``"r"``)."""
    yield f"| {' | '.join(map(escaped, headers))} |"
    yield f"|{'|'.join('---:' if side == 'r' else ':---' for side in align)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _aligned(rows: Sequence[Sequence[str]], headers: Sequence[str], align: str) -> Iterator[str]:
    """The same with columns that are below one another, for people who read it as it is."""
    from tabulate import tabulate

    sides = ["right" if side == "r" else "left" for side in align]
    yield tabulate(rows, headers, "pipe", disable_numparse=True, colalign=sides)


def folded(summary: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines that are shown on demand."""
    yield f"\n<details><summary>{summary}</summary>\n"
    yield from lines
    yield "\n</details>"


def and_more(count: int, where: str = "") -> Iterator[str]:
    """How many are not shown."""
    if count > 0:
        yield f"\nand {count:,} more{where}"


def _first(lines: Sequence[str], most: int) -> Iterator[str]:
    yield from lines[:most]
    yield from and_more(len(lines) - most)


def findings(found: Sequence[FindingDocument]) -> Iterator[str]:
    """Each finding, with its fix below it."""
    if found:
        yield "\n### Findings\n"
    for each in found:
        fix = f"  \n  Fix: {code(each['fix'])}" if each["fix"] else ""
        yield f"- **{each['severity']}** `{each['code']}`: {escaped(each['message'])}{fix}"


def fixes(found: Sequence[FindingDocument]) -> Iterator[str]:
    """The commands that fix what was found, each once."""
    told = list(dict.fromkeys(each["fix"] for each in found if each["fix"]))
    if told:
        yield "\n### To fix it\n"
        yield from (f"- {code(fix, _MAX_CELL)}" for fix in told)


def combined(fix: CombinedFix | None, found: Sequence[FindingDocument]) -> Iterator[str]:
    """The command that does what all findings advise, where it is not the only one."""
    title = combined_title(fix, found)
    if fix is not None and title is not None:
        yield f"\n{title} {code(fix['command'])}"
        yield f"({escaped(fix['keeps'])})"


def code(text: str, most: int | None = None) -> str:
    """Text as it is, in so many characters; nothing of nothing."""
    text = printable(text).replace("`", "'").replace("|", "\\|")
    if most is not None and len(text) > most:
        text = text[: most - 1].rstrip("\\") + "…"
    return f"`{text}`" if text else ""


def escaped(text: str) -> str:
    """Text in which nothing is markup: names come from a stranger."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text))
