"""The documents of ``ckptkit check --json-lines``, a line each; `ckptkit.documents` has the one of ``--json``.

Fields are added, never changed or taken away, within one ``schema_version``.
"""

from __future__ import annotations

from typing import TypedDict

from ckptkit.documents import CheckedFile, CheckFindingDocument

__all__ = ["CheckEnd", "CheckHead", "CheckLine"]


class CheckHead(TypedDict):
    """The first line of a run.

    Attributes:
        ckptkit: the version that checks.
        policy: digest of what the files are held against.
        run: what names the run; one that resumes another goes by the other's name.
        resumed: how many runs by that name came before it.
        part: the share of the files that this is: ``"2/8"``.
        manifest, config: the files that say what must be.
        started: when, in UTC, as ISO 8601 without a zone.
    """

    schema_version: int
    ckptkit: str
    policy: str
    run: str
    resumed: int
    part: str | None
    manifest: str | None
    config: str | None
    started: str


class CheckLine(CheckedFile):
    """One file of a run.

    Attributes:
        findings: what the rules found.
        seconds: how long it took.
        stamp: of the file when it was looked at; ``None``: the result is not taken over by another run.
        against: digest of all else that the result depends on.
    """

    findings: list[CheckFindingDocument]
    seconds: float
    stamp: str | None
    against: str | None


class CheckEnd(TypedDict):
    """The last line of a run.

    Attributes:
        ok: whether no finding is an error.
        exit_code: as of ``ckptkit check``.
        verdict: the outcome in a sentence.
        results: how many files the run has told of.
        checked: how many of them every rule could be applied to.
        passed_over: how many files of each kind were met that are not checkpoints.
        may_be_empty: whether it is well that there is no checkpoint among the files.
    """

    ok: bool
    exit_code: int
    verdict: str
    results: int
    checked: int
    passed_over: dict[str, int]
    may_be_empty: bool
