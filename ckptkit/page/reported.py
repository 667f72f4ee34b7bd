"""The pages of ``ckptkit diff``, ``check`` and ``verify``: each a document as one element, as ``reported.js`` reads it.

What there may be 100,000 of (tensors that differ, files that were checked) is in columns, and what many have in
common, once.  Only the page of a difference has charts, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckptkit.codes import CODES
from ckptkit.formats.folder import passed_over_text
from ckptkit.page.frame import element, page, plain, without_scripts
from ckptkit.released.results import NOT_CHECKED, exit_code_of, verdict_of

if TYPE_CHECKING:
    from ckptkit.differences.difference import DiffDocument
    from ckptkit.documents import CheckDocument, VerifyDocument

__all__ = ["check", "diff", "verify"]

_SCRIPT = "reported.js"

_DIGITS = 6
"""Of a figure: more than anybody reads, fewer than float64 has."""

_FIGURES = ("max_abs", "mean_abs", "relative_norm", "cosine", "equal_share")
"""The order of a tensor's figures."""

_STATUSES = (
    *("changed", "within tolerance", "recast", "reshaped", "renamed", "added", "removed"),
    *("other value", "not compared"),
)
"""What may have become of a tensor."""

_GRAVITIES = ("error", "warning", "info")

_STATES = ({False}, {False, True}, {True}, set[bool]())
"""Of a file, the most severe first: whether its errors are that it could not be checked."""


def diff(document: DiffDocument, notes: Callable[[Any], str]) -> Iterator[str]:
    """The lines of the page of a difference.

    Args:
        document: the difference.
        notes: what is to be said of a changed tensor beyond its figures.
    """
    rows = _Rows()
    for row in document["changed"]:
        rows.add("changed", row["name"], row, (row["dtype"], None, row["shape"], None), notes(row))
    for row in document["within_tolerance"]:
        rows.add("within tolerance", row["name"], row, (row["dtype"], None, row["shape"], None), notes(row))
    for cast in document["recast"]:
        told = {True: "equal after the cast", False: "not equal after the cast", None: ""}[cast["equal_after_cast"]]
        said = "; ".join(filter(None, (told, notes(cast) if cast["nan"] is not None else "")))
        rows.add("recast", cast["name"], cast, (cast["from"], cast["to"], cast["shape"], None), said)
    for shaped in document["reshaped"]:
        told = {True: "the same values in order", False: "other values", None: ""}[shaped["same_values"]]
        dtypes = (shaped.get("from_dtype"), shaped.get("to_dtype"))
        rows.add("reshaped", shaped["name"], shaped, (*dtypes, shaped["from"], shaped["to"]), told)
    for renamed in document["renamed"]:
        told = f"by {renamed['by']}, {renamed['confidence']}"
        rows.add("renamed", renamed["to"], {"was": renamed["from"]}, (None, None, None, None), told)
    for status, names in (("added", document["added"]), ("removed", document["removed"])):
        for name in names:
            rows.add(status, name, {}, (None, None, None, None), "")
    for value in document["values"]:
        place = f" at {value['at']}" if value["at"] else ""
        rows.add("other value", value["name"], {}, (None,) * 4, f"{value['a']}; now {value['b']}{place}")
    for lost in document["not_compared"]:
        rows.add("not compared", lost["name"], {}, (None,) * 4, lost["reason"])
    lists = ("modules", "metadata", "training", "sections", "tree", "ties", "findings")
    keys = (*("ok", "equal", "same_beside", "summary", "a", "b", "tensors", "unchanged", "same_order"), *lists)
    told_of = {key: value for key, value in document.items() if key in (*keys, "tree_differences")}
    data = plain({**told_of, "meanings": _meanings(document["findings"]), "statuses": _STATUSES})
    data["rows"] = rows.columns()
    sides = " and ".join(document[side]["path"].rpartition("/")[2] for side in ("a", "b"))
    columns = data["rows"]
    names = [f"{_STATUSES[n]}: {name}" for name, n in zip(columns["names"], columns["statusOf"], strict=True)]
    has_charts = bool(names)
    word = "The same" if document["ok"] else "Different"
    short = without_scripts(f"{word}: {sides}", [document["summary"]], document["findings"], more=names)
    yield from page(f"{sides} - ckptkit diff", _SCRIPT, [short, element("diff", data)], has_charts=has_charts)


class _Rows:
    """Tensors that differ, in columns."""

    def __init__(self) -> None:
        self._kinds: dict[str, int] = {}
        self._texts: list[list[Any]] = []
        self._columns: dict[str, list[Any]] = {"names": [], "statusOf": [], "kindOf": [], "figures": []}
        self._was: dict[int, str] = {}
        self._notes: dict[int, str] = {}
        self._not_finite: list[int] = []

    def add(self, status: str, name: str, row: Mapping[str, Any], kind: tuple[Any, ...], note: str) -> None:
        """A tensor; ``kind``: dtype, the other dtype, shape, the other shape."""
        at = len(self._columns["names"])
        number = self._kinds.setdefault(str(kind), len(self._kinds))
        if number == len(self._texts):
            self._texts.append([plain(each) for each in kind])
        figures = [_short(row.get(key)) for key in _FIGURES]
        values = (plain(name), _STATUSES.index(status), number, figures if any(f is not None for f in figures) else 0)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        if row.get("was"):
            self._was[at] = plain(row["was"])
        nan = row.get("nan") or {"a": 0, "b": 0}
        if nan["a"] != nan["b"] or row.get("infinite"):
            self._not_finite.append(at)
        if note:
            self._notes[at] = plain(note)

    def columns(self) -> dict[str, Any]:
        """All of them."""
        columns = {**self._columns, "kinds": self._texts, "was": self._was, "notes": self._notes}
        return {**columns, "notFinite": self._not_finite}


def _short(value: float | None) -> float | int | str | None:
    """A figure with the digits that are read."""
    shown: float | int | str | None = plain(float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value)
    return shown


def check(document: CheckDocument) -> Iterator[str]:
    """The lines of the page of a check: files and findings, the most severe first."""
    rule_sets: dict[tuple[str, ...], int] = {}
    errors: dict[str, set[bool]] = {}
    for finding in document["findings"]:
        if finding["severity"] == "error":
            errors.setdefault(finding["path"], set()).add(finding["code"] in NOT_CHECKED)
    states = {id(file): _STATES.index(errors.get(file["path"], set())) for file in document["files"]}
    files = sorted(document["files"], key=lambda file: states[id(file)])
    data: dict[str, Any] = {
        **{key: document.get(key) for key in ("manifest", "config", "part", "checked")},
        "passed_over": passed_over_text(document["passed_over"]) if document["passed_over"] else "",
        "exit_code": exit_code_of(document),
        "verdict": verdict_of(document),
        "paths": [file["path"] for file in files],
        "sizes": [file["size"] for file in files],
        "digests": [file["sha256"] for file in files],
        "states": [max(0, states[id(file)] - 1) for file in files],
        "ruleSetOf": [rule_sets.setdefault(tuple(file["rules"]), len(rule_sets)) for file in files],
        "ruleSets": [*rule_sets],
        "findings": sorted(document["findings"], key=lambda finding: _GRAVITIES.index(finding["severity"])),
        "unchecked": sorted(NOT_CHECKED),
        "meanings": _meanings(document["findings"]),
    }
    short = without_scripts("ckptkit check", [data["verdict"], data["passed_over"]], data["findings"])
    yield from page("ckptkit check", _SCRIPT, [short, element("check", plain(data))], has_charts=False)


def verify(document: VerifyDocument) -> Iterator[str]:
    """The lines of the page of a verification."""
    compared = [
        {"check": check["name"], "what": what, **row}
        for check in document["checks"]
        for what, row in _compared(check["figures"])
    ]
    data = {**document, "compared": compared, "meanings": _meanings(document["findings"])}
    name = document["path"].rpartition("/")[2]
    checks = [f"{check['name']}: {_outcome(check)}" for check in document["checks"]]
    word = "Passed" if document["ok"] else "Failed"
    heading = f"{word}: {document['path']} against {document['reference']}"
    short = without_scripts(heading, (), document["findings"], more=checks)
    yield from page(f"{name} - ckptkit verify", _SCRIPT, [short, element("verify", plain(data))], has_charts=False)


def _outcome(check: Mapping[str, Any]) -> str:
    return (check["severity"] or "ok") if check["run"] else "not run"


def _compared(figures: Any, what: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each comparison of two outputs in a check's figures, and in which of its parts it stands."""
    if isinstance(figures, Mapping) and "close" in figures:
        yield what, figures
    elif isinstance(figures, Mapping):
        named = str(figures.get("device") or figures.get("path") or "")
        for key, value in figures.items():
            yield from _compared(value, named if key == "outputs" else key)
    elif isinstance(figures, list | tuple):
        for value in figures:
            yield from _compared(value, what)


def _meanings(findings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the codes of findings mean."""
    return {code: CODES[code]._asdict() for code in sorted({each["code"] for each in findings} & CODES.keys())}
