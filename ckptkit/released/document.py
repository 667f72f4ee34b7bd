"""The documents of ``ckptkit check --json-lines``, one per line; `ckptkit.documents` has the one of ``--json``.

Within one ``schema_version``, fields are added but never changed or removed.
"""

from __future__ import annotations

from typing import TypedDict

from ckptkit.documents import CheckedFile, CheckFindingDocument

__all__ = ["CheckEnd", "CheckHead", "CheckLine"]


class CheckHead(TypedDict):
    """The first line of a run.

    Attributes:
        ckptkit: the version that checks.
        policy: digest of what the files are checked against.
        run: the name of the run; a run that resumes another has the other's name.
        resumed: how many runs with that name came before it.
        part: the share of the files that this is: ``"2/8"``.
        manifest, config: the files with the requirements.
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
        stamp: of the file when it was checked; ``None``: another run cannot reuse the result.
        against: digest of everything else that the result depends on.
    """

    findings: list[CheckFindingDocument]
    seconds: float
    stamp: str | None
    against: str | None


class CheckEnd(TypedDict):
    """The last line of a run.

    Attributes:
        ok: whether no finding is an error.
        exit_code: as in ``ckptkit check``.
        verdict: the outcome in a sentence.
        results: how many files the run has reported on.
        checked: how many of them every rule could be applied to.
        passed_over: how many files are not checkpoints, by kind.
        may_be_empty: whether it is fine that there is no checkpoint among the files.
    """

    ok: bool
    exit_code: int
    verdict: str
    results: int
    checked: int
    passed_over: dict[str, int]
    may_be_empty: bool
