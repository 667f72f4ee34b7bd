"""What came of a check: findings that name file, rule, expected and found; a file's result; the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptkit.report import Finding, Report

__all__ = ["NOT_CHECKED", "CheckFinding", "CheckReport", "FileResult"]

NOT_CHECKED = frozenset(("file-unreadable", "nothing-selected", "check-not-run"))
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

    def to_dict(self) -> dict[str, Any]:
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

    def to_dict(self) -> dict[str, Any]:
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
class CheckReport(Report):
    """The outcome of a check; ``findings`` are those of all files, in the files' order.

    Attributes:
        results: the files.
        started: when, in UTC, as ISO 8601 without a zone.
    """

    findings: tuple[CheckFinding, ...] = ()
    results: tuple[FileResult, ...] = ()
    started: str = "1970-01-01T00:00:00"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether everything that was to be checked could be."""
        return bool(self.results) and not any(finding.is_unchecked for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """As of diff(1): 0 all is as it must be, 1 something is not, 2 something could not be checked."""
        if not self.is_complete:
            return 2
        return 0 if self.ok else 1

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        count = len(self.results)
        files = f"{count:,} file" + "s" * (count != 1)
        if not self.is_complete:
            unread = sum(not result.is_checked for result in self.results)
            return f"not everything could be checked: {unread:,} of {files}" if count else "nothing was checked"
        failed = sum(not result.ok for result in self.results)
        return f"{failed:,} of {files} failed" if failed else f"{files} passed"

    @classmethod
    def of(cls, results: tuple[FileResult, ...], *, started: str, **details: Any) -> CheckReport:
        """The report on these files."""
        return cls(
            findings=tuple(finding for result in results for finding in result.findings),
            results=results,
            started=started,
            details={
                "checked": sum(result.is_checked for result in results),
                **details,
                "files": [result.to_dict() for result in results],
            },
        )
