"""The page of ``ckptkit inspect``: elements of an inspect document, as ``inspect.js`` reads them.

Each file has two: ``head``, by which the list of files shows it, and ``file``, which is read when it is chosen.
Tensors are columns, and what many have in common stands once: a file may have 100,000, of few kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.codes import CODES
from ckptkit.formats.folder import passed_over_text
from ckptkit.inspection import surveyed
from ckptkit.page.frame import element, page, plain, without_scripts

if TYPE_CHECKING:
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import InspectedFile, StatsDocument, UnreadFile
    from ckptkit.inspection.listing import TensorRow

__all__ = ["STATS", "elements", "pages"]

STATS = ("min", "max", "mean", "std", "zeros", "nan", "inf")
"""The order of a tensor's statistics."""

_DIGITS = 7
"""Of a statistic: more than anybody reads, fewer than float64 has."""


def pages(files: Iterable[Iterable[str]], passed_over: Mapping[str, int]) -> Iterator[str]:
    """The lines of the page of some files.

    Args:
        files: the `elements` of each.
        passed_over: how many files of each kind the folders hold that are not checkpoints, once all files are there.
    """

    def all_elements() -> Iterator[str]:
        for lines in files:
            yield from lines
        yield element("passed-over", plain(passed_over_text(passed_over)) if passed_over else "")

    yield from page("ckptkit inspect", "inspect.js", all_elements())


def elements(
    document: InspectedFile | Survey | UnreadFile,
    sentence: str = "",
    facts: Iterable[tuple[str, str]] = (),
    combined: str | None = None,
) -> Iterator[str]:
    """One file's.

    Args:
        document: the file.
        sentence: what it is, in words.
        facts: what there is to say of it beyond that, each with its label.
        combined: what is above the combined fix; ``None``: it is not shown.
    """
    facts = [fact for fact in facts if fact[1]]
    told_first = [sentence and f"{sentence[0].upper()}{sentence[1:]}.", *(f"{label}: {text}" for label, text in facts)]
    words = (document["format"], document["kind"], document["trust"] and f"trust: {document['trust']}")
    told_first.insert(1, ", ".join(each.replace("_", " ") for each in words if each))
    error = [f"error: {document['error']['message']}"] if document["error"] is not None else []
    yield without_scripts(document["path"], [*error, *told_first], document["findings"])
    weights = document["state_dict"]
    severities = [finding["severity"] for finding in document["findings"]]
    head = {
        "path": document["path"],
        "format": document["format"],
        "kind": document["kind"],
        "size": document["size"],
        "trust": document["trust"],
        "tensors": 0 if document["error"] is not None else surveyed(document)["every_tensor"]["tensors"],
        "parameters": None if weights is None else weights["parameters"],
        "severities": {severity: severities.count(severity) for severity in dict.fromkeys(severities)},
        "error": None if document["error"] is None else document["error"]["message"],
    }
    yield element("head", plain(head))
    codes = {finding["code"] for finding in document["findings"]}
    told = {
        **{key: value for key, value in document.items() if key not in ("tensors", "modules")},
        "sentence": sentence,
        "combined_title": combined,
        "facts": [list(fact) for fact in facts],
        "meanings": {code: CODES[code]._asdict() for code in sorted(codes & CODES.keys())},
        "modules": {module["path"]: module["text"] for module in document["modules"]},
    }
    shown = plain(told)
    if document["error"] is None:
        shown["tensors"] = _columns(surveyed(document)["tensors"])
    yield element("file", shown)


def _columns(rows: Sequence[TensorRow]) -> dict[str, Any]:
    """The tensors: their names, the kind of each, the statistics of each, and what few of them have."""
    kinds: dict[tuple[Any, ...], int] = {}
    names, kind_of, tied_to, values = [], [], {}, {}
    for at, row in enumerate(rows):
        kind = (row.section, row.dtype, row.shape, row.stride, row.nbytes, row.location, row.role, row.form)
        names.append(plain(row.name))
        kind_of.append(kinds.setdefault(kind, len(kinds)))
        if row.tied_to is not None:
            tied_to[at] = plain(row.tied_to)
        if row.value is not None:
            values[at] = plain(row.value)
    stats = [_figures(row.stats) for row in rows if row.stats is not None]
    return {
        "names": names,
        "kindOf": kind_of,
        "kinds": [plain(kind) for kind in kinds],
        "tiedTo": tied_to,
        "values": values,
        "stats": stats or None,
        "histograms": [row.stats.get("histogram") for row in rows if row.stats is not None] if stats else None,
    }


def _figures(stats: StatsDocument) -> list[float | int | str | None]:
    figures = (stats[name] for name in STATS)  # type: ignore[literal-required]
    return [float(f"{each:.{_DIGITS}g}") if isinstance(each, float) else plain(each) for each in figures]
