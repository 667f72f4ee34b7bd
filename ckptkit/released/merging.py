"""Several runs of a check as one report: shares of a job array, runs that were resumed, documents of machines.

Anything missing is reported.  An interrupted run, a share without a report, and runs by other versions or against other
policies are findings of a rule that could not be applied, so the result cannot be green.

A file in several runs has the worst of its results.  Of one run that was resumed it has the latest.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptkit.errors import VerifyError
from ckptkit.extras import __version__
from ckptkit.fleet.shares import Share
from ckptkit.released.lines import Stream, read_streams
from ckptkit.released.results import CheckFinding, CheckReport, FileResult, nothing_selected
from ckptkit.report import SCHEMA_VERSION, at_least, count_of, listed

if TYPE_CHECKING:
    from ckptkit.released.document import CheckHead

__all__ = ["merged"]

_RULE = "report"


def merged(files: Sequence[str]) -> tuple[CheckReport, CheckHead]:
    """The report on everything in all the runs in these files, as one run.

    Args:
        files: JSON Lines, and JSON documents, of ``ckptkit check``; ``"-"``: standard input.

    Raises:
        VerifyError: there is no file, or a run says something that it cannot.
        MissingFileError, FileAccessError: one cannot be read.
        FormatError: one holds something else.
    """
    if not files:
        raise VerifyError("nothing to report on: name files that ckptkit check --json-lines or --json wrote")
    runs = _runs_in(files)
    last = [streams[-1] for streams in runs]
    results = _worst(runs)
    told = [*map(_incomplete, (run for run in last if not run.is_complete)), *_missing(last), *_differing(last)]
    passed_over = Counter[str]()
    for run in last:
        passed_over.update({} if run.end is None else run.end["passed_over"])
    may_be_empty = all(run.end is not None and run.end["may_be_empty"] for run in last)
    if not results and not told and not may_be_empty:
        told = [nothing_selected(files[0], "none of the runs has reported on a file")]
    heads = [run.head for run in last if run.head is not None]
    said = {name: {head.get(name) for head in heads} for name in ("manifest", "config", "policy")}
    manifest, config, policy = (values.pop() if len(values) == 1 else None for values in said.values())
    started = min((head["started"] for head in heads), default="1970-01-01T00:00:00")
    report = CheckReport.of(
        tuple(sorted([*results.values(), *told], key=lambda result: result.path)),
        started=started,
        passed_over=passed_over,
        may_be_empty=may_be_empty,
    )
    head: Any = {
        "schema_version": SCHEMA_VERSION,
        "ckptkit": __version__,
        "policy": policy or "",
        "run": os.urandom(16).hex(),
        "resumed": 0,
        "part": None,
        "manifest": manifest,
        "config": config,
        "started": started,
    }
    return replace(report, details={**report.details, "manifest": manifest, "config": config}), head


def _runs_in(files: Sequence[str]) -> list[list[Stream]]:
    """Each run, in the order of resuming."""
    runs: dict[object, list[Stream]] = {}
    for number, file in enumerate(dict.fromkeys(files)):
        for stream in read_streams(file):
            key = number if stream.head is None else (stream.head["run"], stream.head["part"])
            runs.setdefault(key, []).append(stream)
    return [sorted(streams, key=lambda run: run.head["resumed"] if run.head else 0) for streams in runs.values()]


def _worst(runs: Sequence[Sequence[Stream]]) -> dict[str, FileResult]:
    """The result of each file: of those of one run the latest, of those of several the worst."""
    results: dict[str, FileResult] = {}
    for streams in runs:
        if streams[-1].is_complete:  # it has reported on all files again, except those that are gone
            streams = streams[-1:]
        latest = {result.path: result for stream in streams for result in stream.results}
        for path, result in latest.items():
            known = results.get(path)
            results[path] = result if known is None or _gravity(result) > _gravity(known) else known
    return results


def _gravity(result: FileResult) -> tuple[bool, bool, bool]:
    """How severe a result is: what could not be checked is more severe than an error, and that than a warning."""
    findings = result.findings
    unchecked = any(finding.is_unchecked for finding in findings)
    return unchecked, not result.ok, any(at_least(finding.severity, "warning") for finding in findings)


def _told(path: str, code: str, expected: str, found: str, message: str) -> FileResult:
    finding = CheckFinding(
        code=code, severity="error", path=path, rule=_RULE, expected=expected, found=found, message=message
    )
    return FileResult(path=path, rules=(_RULE,), findings=(finding,))


def _incomplete(run: Stream) -> FileResult:
    """The finding about a run that has not reported on all its files."""
    count = count_of(len(run.results), "result")
    found = f"{count} and no last line" if run.end is None else f"{count} of {run.end['results']:,}"
    message = "the run was interrupted before it had reported on all files, or part of its report is lost"
    return _told(run.file, "results-incomplete", "a complete run", found, message)


def _missing(runs: Sequence[Stream]) -> Iterator[FileResult]:
    """The finding about job arrays with shares that have no report."""
    there: dict[int, dict[int, str]] = {}
    for run in runs:
        if run.part is not None:
            share = Share.of(run.part)
            there.setdefault(share.count, {})[share.index] = run.file
    for count, files in there.items():
        missing = [f"{index}/{count}" for index in range(1, count + 1) if index not in files]
        if missing:
            path = next(iter(files.values()))
            message = f"no run has reported on {count_of(len(missing), 'part')} of {count}: {listed(missing)}"
            yield _told(path, "part-missing", f"parts 1/{count} to {count}/{count}", f"{len(files)} of them", message)


def _differing(runs: Sequence[Stream]) -> Iterator[FileResult]:
    """The finding about runs by another version than the first, or against another policy or manifest."""
    heads = [(run.file, run.head) for run in runs if run.head is not None]
    for file, head in heads[1:]:
        first, own = heads[0][1], head
        for what, ours, theirs in (
            ("version of ckptkit", first["ckptkit"], own["ckptkit"]),
            ("policy or manifest", first["policy"], own["policy"]),
        ):
            if ours != theirs:
                message = (
                    f"this run and the one in {heads[0][0]} used a different {what}; their results cannot be combined"
                )
                yield _told(file, "results-differ", f"the same {what}: {ours}", theirs, message)
