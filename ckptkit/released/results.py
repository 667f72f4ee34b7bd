"""Results of a check: findings with file, rule, expected and found; a file's result; the report."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, cast

from ckptkit.errors import CkptkitError, FormatError, MissingFileError, PartError
from ckptkit.fixes import combined_fix
from ckptkit.normalize.parts import CODE
from ckptkit.report import SCHEMA_VERSION, Finding, Report, listed
from ckptkit.startup import dataclass

if TYPE_CHECKING:
    from ckptkit.documents import CheckDetails, CheckDocument, CheckedFile, CheckFindingDocument
    from ckptkit.report import CombinedFix

__all__ = [
    "NOT_CHECKED",
    "CheckFinding",
    "CheckReport",
    "FileResult",
    "Tally",
    "damage_finding",
    "extra_finding",
    "hostile_finding",
    "lost_result",
    "malformed_finding",
    "missing_result",
    "nothing_selected",
    "unlike_finding",
    "unreadable_finding",
    "whole_finding",
]

NOT_CHECKED = frozenset(
    (
        *("file-unreadable", "nothing-selected", "check-not-run", "not-looked-into"),
        *("worker-died", "timed-out", "worker-version", "worker-failed"),
        *("results-incomplete", "part-missing", "results-differ"),
    )
)
"""Codes of what could not be checked against anything: neither a pass nor a mismatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckFinding(Finding):
    """A file that breaks a rule.

    Attributes:
        path: the file, or a path that should be one.
        rule: the policy (``"no-pickle"``), ``"manifest"``, ``"readable"``, ``"whole"`` or ``"selection"``.
        expected: what the rule requires: text, a number, or a list of these.
        found: what the file has instead, in the same form.
    """

    path: str
    rule: str
    expected: Any = None
    found: Any = None

    @property
    def is_unchecked(self) -> bool:
        """Whether the rule could not be applied at all."""
        return self.code in NOT_CHECKED

    @property
    def line(self) -> str:
        """The finding in a line of text, after the file it is about."""
        return f"{self.path}: {super(CheckFinding, self).line}"  # noqa: UP008 - slots make another class

    def to_dict(self) -> CheckFindingDocument:
        """The finding for JSON documents."""
        return {
            "path": self.path,
            "code": self.code,
            "severity": self.severity,
            "rule": self.rule,
            "expected": self.expected,
            "found": self.found,
            "message": self.message,
            "fix": self.fix,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FileResult:
    """One file, its rules and what they found.

    Attributes:
        path: the file.
        size: bytes; ``None``: it could not be read, or is not there.
        sha256: of the file, if it was computed.
        rules: those applied, in order.
        findings: from the rules.
        seconds: how long it took.
        stamp: of the file when it was checked; ``None``: not requested, or unknown.
        against: a digest of all else that the result depends on.
    """

    path: str
    size: int | None = None
    sha256: str | None = None
    rules: tuple[str, ...]
    findings: tuple[CheckFinding, ...] = ()
    seconds: float = 0.0
    stamp: str | None = None
    against: str | None = None

    @property
    def is_checked(self) -> bool:
        """Whether every rule could be applied to it."""
        return self.size is not None and not any(finding.is_unchecked for finding in self.findings)

    @property
    def ok(self) -> bool:
        """Whether it is as all rules want it."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def combined_fix(self) -> CombinedFix | None:
        """The one command that does what the findings advise."""
        wrapped = any(finding.code == "prefix-not-allowed" and finding.fix is not None for finding in self.findings)
        return combined_fix(self.findings, needs=lambda _: ["--strip-module"] * wrapped)

    @classmethod
    def from_dict(cls, file: CheckedFile, findings: Sequence[CheckFindingDocument], **others: Any) -> FileResult:
        """The result in a document, with the findings about the file.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        found = tuple(CheckFinding(**finding) for finding in findings)
        if any(finding.severity not in ("info", "warning", "error") for finding in found):
            raise ValueError("a finding has no severity")
        size, sha256, rules = file["size"], file["sha256"], tuple(map(str, file["rules"]))
        result = cls(path=file["path"], size=size, sha256=sha256, rules=rules, findings=found, **others)
        path: Any = result.path
        if not isinstance(path, str) or (file["ok"], file["checked"]) != (result.ok, result.is_checked):
            raise ValueError("does not agree with itself")
        return result

    def to_dict(self) -> CheckedFile:
        """The result as an element of the document's ``files``."""
        return {
            "path": self.path,
            "size": self.size,
            "sha256": self.sha256,
            "ok": self.ok,
            "checked": self.is_checked,
            "rules": list(self.rules),
            "combined_fix": self.combined_fix,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport(Report["CheckDocument"]):
    """The outcome of a check; ``findings`` are those of all files, in the files' order.

    Attributes:
        results: the files.
        started: when, in UTC, as ISO 8601 without a zone.
        passed_over: how many files are not checkpoints, by kind.
        may_be_empty: whether it is fine that there is no checkpoint among the files.
    """

    findings: tuple[CheckFinding, ...] = ()
    results: tuple[FileResult, ...] = ()
    started: str = "1970-01-01T00:00:00"
    passed_over: Mapping[str, int] = field(default_factory=dict)
    may_be_empty: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<CheckReport: {self.verdict}>"

    @property
    def ok(self) -> bool:
        """Whether no finding is an error, and something was checked unless nothing had to be."""
        return bool(self.results or self.may_be_empty) and super(CheckReport, self).ok  # noqa: UP008 - slots make another class

    @property
    def is_complete(self) -> bool:
        """Whether everything could be checked."""
        return self.exit_code != 2

    @property
    def exit_code(self) -> Literal[0, 1, 2]:
        """As with diff(1): 0: everything passed; 1: something failed; 2: something could not be checked."""
        return exit_code_of(self.to_dict())

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        return verdict_of(self.to_dict())

    @classmethod
    def of(
        cls,
        results: tuple[FileResult, ...],
        *,
        started: str,
        passed_over: Mapping[str, int] | None = None,
        may_be_empty: bool = False,
        **details: Any,
    ) -> CheckReport:
        """The report on these files."""
        return cls(
            findings=tuple(finding for result in results for finding in result.findings),
            results=results,
            started=started,
            passed_over=passed_over or {},
            may_be_empty=may_be_empty,
            details={
                "checked": sum(result.is_checked for result in results),
                "passed_over": dict(passed_over or {}),
                **details,
                "files": [result.to_dict() for result in results],
            },
        )

    def to_dict(self) -> CheckDocument:
        """The report as one JSON-ready document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            **cast("CheckDetails", self.details),
            "findings": [finding.to_dict() for finding in self.findings],
        }


def unreadable_finding(path: str, error: CkptkitError, allow_part: bool = False) -> CheckFinding:
    """A file that could not be read; or a part of a checkpoint that is not allowed."""
    if error.is_hostile and isinstance(error, FormatError):
        return hostile_finding(path, error)
    message = str(error).removeprefix(f"{path}: ")
    found = "no such file" if isinstance(error, MissingFileError) else type(error).__name__
    if isinstance(error, PartError) and not allow_part:
        return CheckFinding(
            code=CODE,
            severity="error",
            path=path,
            rule="whole",
            expected="a whole checkpoint",
            found="part of one",
            message=message.removeprefix(f"{CODE}: "),
        )
    return _broken("file-unreadable", path, "a readable checkpoint", found, message)


def damage_finding(path: str, damage: str) -> CheckFinding:
    """A file whose recorded checksums are not those of its bytes."""
    return _broken("damaged", path, "the bytes whose checksums were recorded", "different bytes", damage)


def malformed_finding(path: str, told: str) -> CheckFinding:
    """A value whose parts do not fit each other."""
    return _broken("malformed-value", path, "values whose parts fit together", "others", told)


def _broken(code: str, path: str, expected: str, found: str, message: str) -> CheckFinding:
    """The problem with a file whatever the policy: it cannot be read, or not all of it."""
    return CheckFinding(
        code=code, severity="error", path=path, rule="readable", expected=expected, found=found, message=message
    )


_LOST = {
    "died": ("worker-died", "a process that runs until it has checked the file", "it ended"),
    "timed-out": ("timed-out", "a result within the time allowed for a file", "none yet"),
    "version": ("worker-version", "the same version of ckptkit", "another"),
    "failed": ("worker-failed", "a result", "an error"),
}
"""The findings about results that other processes failed to return."""


def lost_result(path: str, problem: str, told: str) -> FileResult:
    """The result of a file that others than this process could not check.

    Args:
        path: the file.
        problem: ``"died"``, ``"timed-out"``, ``"version"`` or ``"failed"``.
        told: what is known about it.
    """
    code, expected, found = _LOST[problem]
    return FileResult(path=path, rules=("readable",), findings=(_broken(code, path, expected, found, told),))


def unlike_finding(path: str, unlike: str) -> CheckFinding:
    """Files of a folder that do not hold the same values where they must."""
    return _broken("copies-differ", path, "copies that are equal", "others", unlike)


def hostile_finding(path: str, error: FormatError) -> CheckFinding:
    """A sharded checkpoint that was refused since its pickles would run something."""
    names = list(dict.fromkeys(use.name for use in error.globals if use.verdict == "dangerous"))
    return CheckFinding(
        code="hostile-name",
        severity="error",
        path=path,
        rule="max-trust",
        expected="nothing that runs, imports or opens things",
        found=names,
        message=str(error).removeprefix(f"{path}: "),
    )


def whole_finding(path: str, shards: Sequence[str]) -> CheckFinding:
    """That an index is checked where its shards were named."""
    return CheckFinding(
        code="whole-checked",
        severity="info",
        path=path,
        rule="selection",
        expected="the whole checkpoint",
        found=list(shards),
        message=f"checked in place of {listed(shards)}: the index beside a shard covers all of them",
    )


def missing_result(path: str) -> FileResult:
    """The result of a file that the manifest names, and that is not there."""
    finding = CheckFinding(
        code="file-missing",
        severity="error",
        path=path,
        rule="manifest",
        expected="the file in the manifest",
        found="no file",
        message="the manifest names this file, but it is missing",
    )
    return FileResult(path=path, rules=("manifest",), findings=(finding,))


def extra_finding(path: str) -> CheckFinding:
    """A file that is there, and that the manifest does not name."""
    return CheckFinding(
        code="file-extra",
        severity="error",
        path=path,
        rule="manifest",
        expected="no file that the manifest does not name",
        found="a checkpoint file",
        message="the manifest does not name this file",
    )


def nothing_selected(path: str, message: str) -> FileResult:
    """The result of a path without a checkpoint."""
    finding = CheckFinding(
        code="nothing-selected",
        severity="error",
        path=path or ".",
        rule="selection",
        expected="checkpoint files",
        found="none",
        message=message.removeprefix(f"{path}: "),
    )
    return FileResult(path=path or ".", rules=("selection",), findings=(finding,))


class Tally:
    """What results come to, counted while they come.

    Attributes:
        files: how many there are.
        checked: how many of them every rule could be applied to.
        failed: how many have something that is not as it must be.
        unchecked: how many others could not be checked.
        is_complete: whether nothing is known that could not be checked.
    """

    def __init__(self) -> None:
        self.files = self.checked = self.failed = self.unchecked = 0
        self.is_complete = True

    def add(self, result: FileResult) -> None:
        """Count a file's result."""
        self.files += 1
        self.checked += result.is_checked
        self.note(
            {finding.is_unchecked for finding in result.findings if finding.severity == "error"},
            any(finding.is_unchecked for finding in result.findings),
        )

    def note(self, errors: Container[bool], unchecked: bool) -> None:
        """Count what was found about a file: whether any error is, or is not, that it could not be checked."""
        self.failed += False in errors
        self.unchecked += True in errors and False not in errors
        self.is_complete &= not unchecked

    @property
    def ok(self) -> bool:
        """Whether no file has an error."""
        return not self.failed and not self.unchecked

    def exit_code(self, ok: bool) -> Literal[0, 1, 2]:
        """As with diff(1); ``ok``: whether everything passed, as the report says."""
        if not self.is_complete:
            return 2
        return 0 if ok else 1 if self.files else 2

    def verdict(self, ok: bool, part: str | None = None) -> str:
        """The outcome in a sentence; ``part``: the share of the files that this is."""
        if not self.files:
            nothing = "there is no checkpoint among the files" if part is None else f"part {part} has no files"
            return nothing if ok else "nothing was checked"
        files = f"{self.files:,} file" + "s" * (self.files != 1)
        if self.ok:
            return f"{files} passed"
        passed = self.files - self.failed - self.unchecked
        counts = [
            (self.failed, "failed"),
            (self.unchecked, "could not be checked"),
            (passed * bool(self.unchecked), "passed"),
        ]
        (first, what), *others = [(number, what) for number, what in counts if number]
        return ", ".join([f"{first:,} of {files} {what}", *(f"{number:,} {what}" for number, what in others)])


def _tally_of(document: CheckDocument) -> Tally:
    """The verdict of a document's findings."""
    errors: dict[str, set[bool]] = {}
    unchecked = False
    for finding in document["findings"]:
        is_unchecked = finding["code"] in NOT_CHECKED
        unchecked |= is_unchecked
        if finding["severity"] == "error":
            errors.setdefault(finding["path"], set()).add(is_unchecked)
    tally = Tally()
    tally.files = len(document["files"])
    tally.is_complete = not unchecked
    for kinds in errors.values():
        tally.note(kinds, False)
    return tally


def exit_code_of(document: CheckDocument) -> Literal[0, 1, 2]:
    """As with diff(1): 0: everything passed; 1: something failed; 2: something could not be checked."""
    return _tally_of(document).exit_code(document["ok"])


def findings_of(document: CheckDocument) -> Iterator[tuple[CheckedFile, list[CheckFindingDocument]]]:
    """Each file of a document with what was found about it."""
    found: dict[str, list[CheckFindingDocument]] = {}
    for finding in document["findings"]:
        found.setdefault(finding["path"], []).append(finding)
    for file in document["files"]:
        yield file, found.pop(file["path"], [])


def verdict_of(document: CheckDocument) -> str:
    """The outcome in a sentence."""
    return _tally_of(document).verdict(document["ok"], document.get("part"))
