"""Findings and reports: what was found, how severe it is, and the command that fixes it.

A `Finding` has a stable code; `ckptkit.codes` has the `Explanation` of each.  All findings are collected first
and reported together; the worst severity decides.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

from ckptkit.display import human_size, printable
from ckptkit.errors import FailedReportError, RewriteError
from ckptkit.shell import command_line, quoted, words_in
from ckptkit.startup import dataclass, pattern

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault  # of Python 3.13

    _Document = TypeVarWithDefault("_Document", bound=Mapping[str, Any], covariant=True, default=Mapping[str, Any])
else:
    _Document = TypeVar("_Document", covariant=True)

__all__ = [
    "CONVERT",
    "SCHEMA_VERSION",
    "CombinedFix",
    "Explanation",
    "Finding",
    "FindingDocument",
    "Report",
    "Severity",
    "apart",
    "at_least",
    "convert_command",
    "count_of",
    "glob_of",
    "gravest_first",
    "human_size",
    "listed",
    "parse_size",
    "printable",
    "share_of",
    "without_endings",
    "worst",
]

SCHEMA_VERSION = 1
"""Version of every JSON document ckptkit prints."""

Severity = Literal["info", "warning", "error"]

_ORDER: dict[Severity, int] = {"info": 0, "warning": 1, "error": 2}

_MAX_ROWS = 20
"""Findings that a notebook shows."""


class FindingDocument(TypedDict):
    """One fact worth reporting.

    Attributes:
        code: stable, in kebab-case; ``ckptkit explain CODE`` explains it.
        severity: ``"error"`` fails a report, ``"warning"`` and ``"info"`` do not.
        message: what, where, expected, found.
        fix: the command or option that fixes it.
    """

    code: str
    severity: Severity
    message: str
    fix: str | None


class CombinedFix(TypedDict):
    """The one conversion that does what all findings about a file advise (`ckptkit.fixes`).

    Attributes:
        command: ready to be pasted into a shell.
        keeps: what its output has of the file, what it drops, and which findings it does not fix.
        codes: of the findings that it fixes.
    """

    command: str
    keeps: str
    codes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact worth reporting.

    Attributes:
        code: stable, in kebab-case; ``ckptkit explain CODE`` explains it.
        severity: ``"error"`` fails a report, ``"warning"`` and ``"info"`` do not.
        message: what, where, expected, found.
        fix: the command or option that fixes it, or ``None``.
    """

    code: str
    severity: Severity
    message: str
    fix: str | None = None

    @property
    def line(self) -> str:
        """The finding in a line of text."""
        return f"{self.code}: {self.message}" + (f" (fix: {self.fix})" if self.fix else "")

    def to_dict(self) -> FindingDocument:
        """The finding for JSON documents."""
        return {"code": self.code, "severity": self.severity, "message": self.message, "fix": self.fix}


_Finding = TypeVar("_Finding", bound=Finding)


def at_least(severity: Severity, bound: Severity) -> bool:
    """Whether ``severity`` is ``bound`` or more severe."""
    return _ORDER[severity] >= _ORDER[bound]


def gravest_first(findings: Iterable[_Finding]) -> list[_Finding]:
    """The findings by severity; the order of equals stays."""
    return sorted(findings, key=lambda finding: -_ORDER[finding.severity])


def worst(findings: Iterable[Finding]) -> Severity | None:
    """The most severe severity among the findings; ``None`` when there are none."""
    return max((f.severity for f in findings), key=_ORDER.__getitem__, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Generic[_Document]):
    """The outcome of a command: its findings and its figures.

    For type checkers it is generic in its document: `ckptkit.convert` returns ``Report[ckptkit.ConvertDocument]``.

    Attributes:
        findings: everything found, in the order it was found.
        details: the command's own figures, for its JSON document.
    """

    findings: tuple[Finding, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no finding has severity ``"error"``."""
        return worst(self.findings) != "error"

    def __repr__(self) -> str:
        codes = listed(dict.fromkeys(f.code for f in self.findings if f.severity == "error"), 3)
        state = f"failed: {codes}" if codes else f"ok, {count_of(len(self.findings), 'finding')}"
        return f"<{type(self).__name__}: {state}>"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, the figures, each check that ran, and the findings."""
        from ckptkit.display import html_block  # few look at it

        facts = [f"{key}: {value}" for key, value in self.details.items() if isinstance(value, str | int) and value]
        rows = [(f"{finding.severity}", finding.line) for finding in gravest_first(self.findings)[:_MAX_ROWS]]
        left_out = len(self.findings) - len(rows)
        for check in self.details.get("checks", ()):
            if check["run"] and not check["codes"]:
                rows.append(("ok", check["name"] + f": {check['note']}" * bool(check["note"])))
        lines, headers, state = [", ".join(facts)] * bool(facts), ("", "finding"), "ok" if self.ok else "failed"
        return html_block(repr(self)[1:-1], lines, headers if rows else (), rows, left_out, state=state)

    def raise_if_failed(self) -> None:
        """Raise if the report is not ok.

        Raises:
            FailedReportError: its message lists every finding of severity ``"error"``, with its fix.
        """
        if not self.ok:
            raise FailedReportError("\n".join(f.line for f in self.findings if f.severity == "error"))

    def to_dict(self) -> _Document:
        """The report as one JSON-ready document."""
        document: Any = {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            **self.details,
            "findings": [finding.to_dict() for finding in self.findings],
        }
        return document  # type: ignore[no-any-return]  # whoever makes the report says what its details are

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


_ENDINGS = frozenset(
    {
        ".pth",
        ".pt",
        ".pkl",
        ".ckpt",
        ".bin",
        ".safetensors",
        ".tar",
        ".zip",
        ".gz",
        ".xz",
        ".bz2",
        ".zst",
        ".pt2",
        ".th",
        ".nemo",
        ".pickle",
        ".joblib",
        ".jit",
        ".ptl",
        ".torchscript",
    }
)
"""Endings of checkpoints and of what they are packed in."""


def without_endings(name: str) -> str:
    """A file's name without the endings of checkpoints and of what they are packed in: of best.pth.tar best is left."""
    stem, ending = os.path.splitext(_without_index(name))
    while ending.lower() in _ENDINGS:
        stem, ending = os.path.splitext(stem)
    return stem + ending


def _without_index(name: str) -> str:
    """The name of the whole that an index means: model.fp16.safetensors of model.safetensors.index.fp16.json."""
    whole, index, variant = name.partition(".index.")
    if not index or not variant.endswith("json"):
        return name
    stem, ending = os.path.splitext(whole)
    return f"{stem}.{variant}"[: -len(".json")] + ending


CONVERT = "ckptkit convert "
"""How the commands begin that are made here."""


def convert_command(
    path: str, *options: str, suffix: str = ".safetensors", taken: Container[str] = (), is_clean: bool = False
) -> str:
    """The command that rewrites ``path`` with these options, ready to be pasted into a shell.

    The destination is named after the source, beside it or its archive (in the working directory for a URL), and is not
    in ``taken`` and does not exist; ``is_clean`` says so in its name, which has it anyway if only that distinguishes it
    from the source.  Anything but a file or standard input is called FILE.
    """
    from itertools import chain, count

    if path.startswith("-") and path != "-":  # no option
        path = os.path.join(os.curdir, path)
    member = split_member(path)
    folder, name = os.path.split(path.rstrip("/"))
    if member is not None:
        folder, name = os.path.dirname(member[0]), re.split("[/!]", member[1].rstrip("/"))[-1]
    elif "://" in path:
        whole = path.rstrip("/").removesuffix("/.metadata")  # of a folder that its server does not list
        folder, name = "", re.sub(r"\?.*", "", whole).rpartition("/")[2] or "model"
    elif path == "-" or (path.startswith("<") and not os.path.lexists(path)):
        name, path = "model", "-" if path == "-" else "FILE"
    stem, ending = os.path.splitext(_without_index(name))
    if ending[1:].isdigit():  # a version: model_v1.5
        stem, ending = stem + ending, ""
    endings = {ending} if stem + ending == name else set()
    bare = without_endings(stem)
    endings.update(f".{each}" for each in stem[len(bare) :].split("."))
    stem = os.path.join(folder, f"{bare}.clean" if is_clean or suffix in endings else bare)
    paths = chain([stem + suffix], (f"{stem}-{number}{suffix}" for number in count(2)))
    destination = next(each for each in paths if each not in taken and not os.path.lexists(each))
    return command_line(["ckptkit", "convert", path, destination, *options])


def split_member(path: str) -> tuple[str, str] | None:
    """The archive and the member that ``FILE/MEMBER`` or ``FILE!MEMBER`` means: ``None``: it is the path of something.

    The longest beginning that is a file counts; there need be no such member.
    """
    if os.path.lexists(path) or re.match(r"[A-Za-z][\w.+-]+:", path):  # a file, or of some other system's
        return None
    separators = "/!" + (os.sep if os.sep != "/" else "")
    for at in range(len(path) - 2, 0, -1):
        if path[at] in separators and os.path.isfile(path[:at]):
            return path[:at], path[at + 1 :].replace(os.sep, "/")
    return None


def apart(findings: Iterable[_Finding], given: Sequence[str] = ()) -> Iterator[_Finding]:
    """The findings, with no two different conversions that write one file: each can be run after the others.

    Args:
        findings: of one file.
        given: options by which the file was read, which conversions keep.
    """
    fixes: dict[str, str] = {}
    taken: set[str] = set()
    for finding in findings:
        fix = finding.fix
        if fix is not None and fix.startswith(CONVERT):
            if fix not in fixes:
                _, _, path, destination, *options = words_in(fix)
                kept = given[2:] if "--section" in given and "--section" in options else given
                suffix = os.path.splitext(destination)[1]
                fixes[fix] = convert_command(path, *kept, *options, suffix=suffix, taken=taken)
                taken.add(words_in(fixes[fix])[3])
            finding = replace(finding, fix=fixes[fix])
        yield finding


def glob_of(name: str, before: str = "") -> str:
    """A pattern that matches a name, ready to be pasted into a shell; ``?`` replaces characters that cannot be typed.

    ``before`` is a pattern of what is before it: ``"*"``.
    """
    from glob import escape

    return quoted(before + "".join(c if c.isprintable() else "?" for c in escape(name)))


def count_of(count: int, thing: str, *verb: str) -> str:
    """How many of a thing: ``"1 storage"``, ``"1,200 storages"``, ``"2 classes"``, ``"2 entries"``.

    Args:
        count: how many.
        thing: one of them.
        verb: what follows, of one and of several: ``"is", "are"``.
    """
    if count != 1:
        is_y = thing.endswith("y") and thing[-2:-1] not in ("a", "e", "o", "u")
        ending = "es" if thing.endswith(("s", "x", "sh", "ch")) else "s"
        thing = thing[:-1] + "ies" if is_y else thing + ending
    return " ".join((f"{count:,} {thing}", *verb[count != 1 :][:1]))


def share_of(part: int, count: int, thing: str, *verb: str) -> str:
    """How many of all: ``"1 of 5 tensors is"``, ``"2 of 5 tensors are"``, ``"0 of 1 tensor is"``.

    Args:
        part: how many.
        count: of how many.
        thing: one of them.
        verb: what follows, of one and of several: ``"is", "are"``.
    """
    is_one = part == 1 or count == 1
    return " ".join((f"{part:,} of {count_of(count, thing)}", *verb[not is_one :][:1]))


def listed(
    things: Iterable[str],
    most: int = 5,
    *,
    total: int | None = None,
    between: str = ", ",
    last: str | None = None,
    characters: int | None = None,
) -> str:
    """The first of several things as a message names them, and how many more there are.

    Args:
        things: to name, or as many of them as will be named.
        most: how many of them are named.
        total: how many there are where ``things`` are not all.
        between: the text between them.
        last: the text before the last one if all are named, if different.
        characters: how many are shown of each; ``None``: all.
    """
    every = list(things)
    shown = [thing[:characters] for thing in every[:most]]
    more = (len(every) if total is None else total) - len(shown)
    if more > 0:
        return f"{between.join(shown)} and {more:,} more"
    if last is None or len(shown) < 2:
        return between.join(shown)
    return f"{between.join(shown[:-1])}{last}{shown[-1]}"


_SIZE = pattern(r"([0-9]{1,19})(\.[0-9]{1,19})? ?(?:([kmgt])(?:(i)b|b?)|b)?", re.ASCII | re.IGNORECASE)
_LARGEST = (1 << 63) - 1


def parse_size(text: str) -> int:
    """The bytes that people mean: ``"5GB"`` in powers of 1000, ``"5GiB"`` of 1024, ``"5000000"`` bytes.

    Raises:
        RewriteError: it is not a size, is under one byte, or more than 63 bits count.
    """
    from fractions import Fraction

    found = _SIZE.fullmatch(text.strip())
    if found is not None and not (found[2] and not found[3]):  # no part of a byte
        power = " kmgt".index((found[3] or " ").lower())
        nbytes = int(Fraction(found[1] + (found[2] or "")) * (1024 if found[4] else 1000) ** power)
        if 1 <= nbytes <= _LARGEST:
            return nbytes
    raise RewriteError(
        f"{text[:40]!r} is not a valid size; write it like 5GB, 500MB or 1.5GB, 2GiB, or 1000000 for bytes"
    )


class Explanation(NamedTuple):
    """The text of a code."""

    title: str
    """The finding, in a line."""
    meaning: str
    """Why it matters: what fails, and with which message."""
    remedy: str
    """What to do; ``-`` where nothing needs to be done."""
