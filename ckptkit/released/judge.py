"""Holds files against a manifest and their policies.

A file whose bytes are the manifest's needs no more than its hash.  Of one whose are not, the tensors are digested, so
that it can be told whether the same weights were written differently or the weights are others: a file of
another size in the same pass, one of the same size in a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from ckptkit.errors import CkptkitError, MissingFileError, PartError
from ckptkit.normalize.parts import CODE
from ckptkit.released.config import Config
from ckptkit.released.examine import Examined, examine, over_the_cores, size_of
from ckptkit.released.manifests.records import FileRecord, Manifest, paths_of
from ckptkit.released.policy import Policy
from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.released.rules.manifest_rules import compare, golden_findings, is_same_file
from ckptkit.released.rules.model_rules import model_findings
from ckptkit.released.rules.policy_rules import rules_of, violations
from ckptkit.released.selection import Selected, name_of, select
from ckptkit.report import Report

__all__ = ["judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One file, and what it is held against."""

    path: str
    policy: Policy
    record: FileRecord | None
    is_extra: bool


def judge(
    paths: Sequence[str], *, manifest: Manifest | None, config: Config, verify: Callable[..., Report]
) -> CheckReport:
    """Check files.

    Args:
        paths: files and folders; none: all of the manifest's, and what else lies in the folders it was made of.
        manifest: what they must be.
        config: the policies.
        verify: what holds a file against a model; `ckptkit.verify`.

    Raises:
        VerifyError: a policy has a value that it cannot have.
        MissingDependencyError: a policy needs torch, or the package of a reference, and it is not installed.
    """
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    results, tasks = _tasks(paths, manifest, config)
    results += _carried_out(tasks, manifest, verify)
    results.sort(key=lambda result: result.path)
    if not results:
        results = [_nothing_selected("" if manifest is None else manifest.folder, "no file to check was found")]
    return CheckReport.of(tuple(results), started=started)


def _tasks(paths: Sequence[str], manifest: Manifest | None, config: Config) -> tuple[list[FileResult], list[_Task]]:
    """What is not there to be checked, and what is."""
    if manifest is not None:
        return _tasks_of(manifest, paths, config)
    selected, results = _selected(paths, "")
    return results, [_task(each, config) for each in selected]


def _tasks_of(manifest: Manifest, paths: Sequence[str], config: Config) -> tuple[list[FileResult], list[_Task]]:
    folder = manifest.folder or "."
    selected, results = _selected(paths, folder) if paths else (_everything_in(manifest.folders, folder), [])
    if not manifest.files:
        results.append(_nothing_selected(folder, "the manifest names no file"))
    owners = {shard: record for record in manifest.files for shard in _shards(record)}
    goldens = {record.golden.path for record in manifest.files if record.golden is not None}
    known = paths_of(manifest.files)
    wanted = {record.path: record for record in manifest.files if not paths or _is_meant(record, paths, folder)}
    wanted.update({owners[each.name].path: owners[each.name] for each in selected if each.name in owners})
    tasks = []
    for record in wanted.values():
        task = _recorded_task(record, manifest, config)
        if os.path.lexists(task.path):
            tasks.append(task)
        else:
            results.append(_missing(task.path))
    for each in selected:
        if each.name not in known:
            tasks.append(_task(each, config, is_extra=os.path.lexists(each.path)))
        elif paths and each.name in goldens and each.name not in wanted:  # named, and a checkpoint like any other
            tasks.append(_task(each, config))
    return results, tasks


def _task(selected: Selected, config: Config, *, is_extra: bool = False) -> _Task:
    path = _tidy(selected.path)
    return _Task(path=path, policy=config.policy_for(path), record=None, is_extra=is_extra)


def _recorded_task(record: FileRecord, manifest: Manifest, config: Config) -> _Task:
    path = os.path.join(manifest.folder, *record.path.split("/"))
    return _Task(path=path, policy=config.policy_for(path), record=record, is_extra=False)


def _tidy(path: str) -> str:
    """A path without steps that lead nowhere; ``..`` stays, for it may lead out of a link."""
    steps = path.split(os.sep)
    return os.sep.join(step for step in steps if step != "." or len(steps) == 1)


def _selected(paths: Sequence[str], folder: str) -> tuple[tuple[Selected, ...], list[FileResult]]:
    """The checkpoints that paths stand for; and those paths that stand for none."""
    sound, failed = [], []
    for path in paths:
        try:
            select([path], relative_to=folder)
        except CkptkitError as error:
            failed.append(_nothing_selected(path, str(error)))
        else:
            sound.append(path)
    return (select(sound, relative_to=folder) if sound else ()), failed


def _everything_in(folders: Sequence[str], folder: str) -> tuple[Selected, ...]:
    found: dict[str, Selected] = {}
    for name in folders:
        try:
            found.update({each.name: each for each in select([os.path.join(folder, name)], relative_to=folder)})
        except CkptkitError:  # nothing at all: what the manifest names is missing, which is told
            continue
    return tuple(found.values())


def _shards(record: FileRecord) -> Iterator[str]:
    folder = record.path.rpartition("/")[0]
    for shard in record.shards:
        yield f"{folder}/{shard}" if folder else shard


def _is_meant(record: FileRecord, paths: Sequence[str], folder: str) -> bool:
    """Whether one of the paths is the file, or a folder above it."""
    for path in paths:
        name = name_of(path, folder)
        if name in (".", record.path) or record.path.startswith(f"{name}/") or _is_above(name):
            return True
    return False


def _is_above(name: str) -> bool:
    """Whether a name is that of a folder above the one it is relative to."""
    return set(name.split("/")) == {".."}


def _carried_out(tasks: Sequence[_Task], manifest: Manifest | None, verify: Callable[..., Report]) -> list[FileResult]:
    """The results of files, several at a time over the processors; models are run one after the other."""
    found: dict[int, tuple[FileResult, Examined | None]] = {}

    def work(number: int, threads: int) -> None:
        found[number] = _file_result(tasks[number], manifest, threads)

    over_the_cores([_nbytes(task) for task in tasks], work)
    return [
        _with_model(*found[number], task, manifest, verify) if task.policy.needs_model else found[number][0]
        for number, task in enumerate(tasks)
    ]


def _nbytes(task: _Task) -> int:
    if task.record is not None and task.record.shards:
        return task.record.size
    return size_of(task.path)


def _file_result(task: _Task, manifest: Manifest | None, threads: int) -> tuple[FileResult, Examined | None]:
    begun = time.perf_counter()
    record = task.record
    recorded = ("manifest",) if manifest is not None and (record is not None or task.is_extra) else ()
    rules = ("readable", *recorded, *rules_of(task.policy))
    findings: list[CheckFinding] = [_extra(task.path)] if task.is_extra else []
    examined = None
    try:
        digest = record is not None and not record.shards and _nbytes(task) != record.size
        look = partial(examine, task.path, ignore_checksums=task.policy.ignore_checksums, threads=threads)
        # Where the manifest's hash is the file's, nothing more is needed.
        held = record is None or digest
        examined = look(hash_file=record is not None, digest=digest, values=task.policy.no_nan, checksums=held)
        damage = examined.damage
        if record is not None:
            digested = examined
            if not digest and not is_same_file(examined, record):
                digested = look(hash_file=False, digest=True, values=False)
                damage = digested.damage
            findings += compare(examined, digested, record)
            findings += golden_findings(task.path, record, manifest.folder if manifest is not None else "")
        if damage is not None:
            findings.append(_damaged(task.path, damage))
        findings += violations(examined, task.policy)
    except CkptkitError as error:
        findings.append(_unreadable(task.path, error, task.policy))
    result = FileResult(
        path=task.path,
        size=None if examined is None else examined.size,
        sha256=None if examined is None else examined.sha256,
        rules=rules,
        findings=tuple(findings),
        seconds=time.perf_counter() - begun,
    )
    return result, examined


def _with_model(
    result: FileResult,
    examined: Examined | None,
    task: _Task,
    manifest: Manifest | None,
    verify: Callable[..., Report],
) -> FileResult:
    """The result with what the verifier says; of a file that could not be read it says nothing more."""
    rules = [name for name, wanted in (("fits", task.policy.fits), ("forward", task.policy.forward)) if wanted]
    facts: dict[str, Any] = {"rules": (*result.rules, *rules)}
    begun = time.perf_counter()
    unfit = any(finding.rule == "readable" or finding.code == CODE for finding in result.findings)
    if examined is not None and (not unfit or task.policy.allow_part):
        golden = None
        if task.record is not None and task.record.golden is not None and manifest is not None:
            golden = os.path.join(manifest.folder, *task.record.golden.path.split("/"))
        facts["findings"] = (*result.findings, *model_findings(examined, task.policy, golden, verify))
    facts["seconds"] = result.seconds + time.perf_counter() - begun
    return replace(result, **facts)


def _unreadable(path: str, error: CkptkitError, policy: Policy) -> CheckFinding:
    message = str(error).removeprefix(f"{path}: ")
    found = "no such file" if isinstance(error, MissingFileError) else type(error).__name__
    if isinstance(error, PartError) and not policy.allow_part:
        return CheckFinding(
            code=CODE,
            severity="error",
            path=path,
            rule="whole",
            expected="a whole checkpoint",
            found="a part of one",
            message=message.removeprefix(f"{CODE}: "),
        )
    return CheckFinding(
        code="file-unreadable",
        severity="error",
        path=path,
        rule="readable",
        expected="a readable checkpoint",
        found=found,
        message=message,
    )


def _damaged(path: str, damage: str) -> CheckFinding:
    return CheckFinding(
        code="damaged",
        severity="error",
        path=path,
        rule="readable",
        expected="the bytes that checksums were recorded for",
        found="other bytes",
        message=damage,
    )


def _missing(path: str) -> FileResult:
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


def _extra(path: str) -> CheckFinding:
    return CheckFinding(
        code="file-extra",
        severity="error",
        path=path,
        rule="manifest",
        expected="no file that the manifest does not name",
        found="a checkpoint file",
        message="the manifest does not name this file",
    )


def _nothing_selected(path: str, message: str) -> FileResult:
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
