"""What came of a check: findings that name file, rule, expected and found; a file's result; the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from ckptkit.errors import CkptkitError, FormatError, MissingFileError, PartError
from ckptkit.normalize.parts import CODE
from ckptkit.report import SCHEMA_VERSION, Finding, Report, listed

if TYPE_CHECKING:
    from ckptkit.documents import CheckDetails, CheckDocument, CheckedFile, CheckFindingDocument

__all__ = [
    "NOT_CHECKED",
    "CheckFinding",
    "CheckReport",
    "FileResult",
    "damage_finding",
    "extra_finding",
    "hostile_finding",
    "malformed_finding",
    "missing_result",
    "nothing_selected",
    "unlike_finding",
    "unreadable_finding",
    "whole_finding",
]

NOT_CHECKED = frozenset(("file-unreadable", "nothing-selected", "check-not-run", "not-looked-into"))
"""Codes of what could not be held against anything: neither a pass nor a mismatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckFinding(Finding):
    """A file that is not as a rule wants it.

    Attributes:
        path: the file, or what was to be one.
        rule: the policy (``"no-pickle"``), ``"manifest"``, ``"readable"``, ``"whole"`` or ``"selection"``.
        expected: what the rule wants; text, a number, or a list of these.
        found: what is there.
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
        return f"{self.path}: {super(CheckFinding, self).line}"

    def to_dict(self) -> CheckFindingDocument:
        """The finding as it stands in JSON documents."""
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
    """One file, the rules it was held to and what they found.

    Attributes:
        path: the file.
        size: bytes; ``None``: it could not be read, or is not there.
        sha256: of the file, where it was computed.
        rules: those applied, in order.
        findings: what they found.
        seconds: how long it took.
    """

    path: str
    size: int | None = None
    sha256: str | None = None
    rules: tuple[str, ...]
    findings: tuple[CheckFinding, ...] = ()
    seconds: float = 0.0

    @property
    def is_checked(self) -> bool:
        """Whether every rule could be applied to it."""
        return self.size is not None and not any(finding.is_unchecked for finding in self.findings)

    @property
    def ok(self) -> bool:
        """Whether it is as all rules want it."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> CheckedFile:
        """The result as an element of the document's ``files``."""
        return {
            "path": self.path,
            "size": self.size,
            "sha256": self.sha256,
            "ok": self.ok,
            "checked": self.is_checked,
            "rules": list(self.rules),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport(Report["CheckDocument"]):
    """The outcome of a check; ``findings`` are those of all files, in the files' order.

    Attributes:
        results: the files.
        started: when, in UTC, as ISO 8601 without a zone.
        passed_over: how many files of each kind were met that are not checkpoints.
        may_be_empty: whether it is well that there is no checkpoint among the files.
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
        """Whether something was checked, or need not be, and no finding is an error."""
        return bool(self.results or self.may_be_empty) and super(CheckReport, self).ok

    @property
    def is_complete(self) -> bool:
        """Whether everything that was to be checked could be."""
        return self.exit_code != 2

    @property
    def exit_code(self) -> Literal[0, 1, 2]:
        """As of diff(1): 0 all is as it must be, 1 something is not, 2 something could not be checked."""
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
    """A file that could not be read; or that is a part of a checkpoint, where that is not allowed."""
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
            found="a part of one",
            message=message.removeprefix(f"{CODE}: "),
        )
    return _broken("file-unreadable", path, "a readable checkpoint", found, message)


def damage_finding(path: str, damage: str) -> CheckFinding:
    """A file whose recorded checksums are not those of its bytes."""
    return _broken("damaged", path, "the bytes that checksums were recorded for", "other bytes", damage)


def malformed_finding(path: str, told: str) -> CheckFinding:
    """A value whose parts do not fit each other."""
    return _broken("malformed-value", path, "values whose parts fit each other", "others", told)


def _broken(code: str, path: str, expected: str, found: str, message: str) -> CheckFinding:
    """What is wrong with a file whatever the policy: it cannot be read, or not all of it."""
    return CheckFinding(
        code=code, severity="error", path=path, rule="readable", expected=expected, found=found, message=message
    )


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
        expected="nothing that runs, imports or opens something",
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
        message=f"checked in place of {listed(shards)}: the index beside a shard stands for all of them",
    )


def missing_result(path: str) -> FileResult:
    """The result of a file that the manifest names, and that is not there."""
    finding = CheckFinding(
        code="file-missing",
        severity="error",
        path=path,
        rule="manifest",
        expected="the file of the manifest",
        found="no file",
        message="the manifest names this file, and it is not there",
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
    """The result of a path that stands for no checkpoint."""
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


def exit_code_of(document: CheckDocument) -> Literal[0, 1, 2]:
    """As of diff(1): 0 all is as it must be, 1 something is not, 2 something could not be checked."""
    if any(finding["code"] in NOT_CHECKED for finding in document["findings"]):
        return 2
    if document["ok"]:
        return 0
    return 1 if document["files"] else 2


def verdict_of(document: CheckDocument) -> str:
    """The outcome in a sentence."""
    count = len(document["files"])
    if not count:
        return "no checkpoint is among the files" if document["ok"] else "nothing was checked"
    files = f"{count:,} file" + "s" * (count != 1)
    errors: dict[str, set[bool]] = {}
    for finding in document["findings"]:
        if finding["severity"] == "error":
            errors.setdefault(finding["path"], set()).add(finding["code"] in NOT_CHECKED)
    failed = sum(False in kinds for kinds in errors.values())
    unchecked = len(errors) - failed
    passed = count - failed - unchecked
    if not errors:
        return f"{files} passed"
    counts = [(failed, "failed"), (unchecked, "could not be checked"), (passed * bool(unchecked), "passed")]
    (first, what), *others = [(number, what) for number, what in counts if number]
    return ", ".join([f"{first:,} of {files} {what}", *(f"{number:,} {what}" for number, what in others)])
