"""Released weights: what they must be, and whether they are.

- `selection` finds the files; `examine_file` says what is in each, and `reading` reads it once for all that is asked
- `manifest_maker` records what was read in a `manifest_file`
- `policy` says what is allowed, `config` where that is written down
- `policy_rules` and `manifest_rules` hold a file against both, `checking` all files, from what was typed to the report
- `results` are what came of it, and `outputs` how that is written

A check from beginning to end: configuration, manifest, the files, the report.

A file whose bytes are the manifest's needs no more than its hash.  Of one whose are not, the tensors are digested, so
that it can be told whether the same weights were written differently or the weights are others: a file of
another size in the same pass, one of the same size in a second.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CkptkitError, FormatError, MissingFileError, PartError, VerifyError
from ckptkit.extras import require_torch
from ckptkit.normalize.parts import CODE
from ckptkit.pickling.trust import merge_uses
from ckptkit.released.config import Config, read_config
from ckptkit.released.examine import Examined, examine_file, over_the_cores, size_of
from ckptkit.released.manifest_file import FileRecord, Manifest, paths_of, read_manifest
from ckptkit.released.manifest_rules import compare, golden_findings, is_same_file, model_findings
from ckptkit.released.policy import Policy
from ckptkit.released.policy_rules import pickle_violations, rules_of, violations
from ckptkit.released.results import CheckFinding, CheckReport, FileResult
from ckptkit.released.selection import Selected, Selection, name_of, select
from ckptkit.report import Report, listed

__all__ = ["check", "check_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One file, and what it is held against; ``other``: the kind of one that is not a checkpoint, for its pickles."""

    path: str
    policy: Policy
    record: FileRecord | None = None
    is_extra: bool = False
    other: str | None = None
    shards: tuple[str, ...] = ()


def check(
    paths: Sequence[str],
    *,
    manifest: str | None,
    config: str | None,
    skip_others: bool,
    typed: Mapping[str, Any],
    verify: Callable[..., Report],
) -> CheckReport:
    """Hold files against a manifest and policies; see `ckptkit.check`.

    Args:
        paths: files and folders; none: those of the configuration, or all that the manifest names.
        manifest: its path; ``None``: that of the configuration.
        config: path of the configuration; ``None``: there is none.
        skip_others: whether files that are named and no checkpoint are passed over.
        typed: fields of a `Policy` that go before the configured ones.
        verify: `ckptkit.verify`.

    Raises:
        As `ckptkit.check`.
    """
    Policy(**typed)
    configured = replace(Config() if config is None else read_config(config), typed=typed)
    manifest = configured.manifest if manifest is None else manifest
    paths = paths or configured.paths
    if not paths and manifest is None:
        raise VerifyError("nothing to check: name files or folders, or a manifest with --manifest FILE")
    released = None
    if manifest is not None:
        # Paths are told as the manifest's own was given, not from the root of the disk.
        released = replace(read_manifest(manifest), folder=os.path.dirname(manifest))
    if configured.needs_model:
        require_torch()
    report = check_files(
        paths,
        manifest=released,
        config=configured,
        manifest_path=manifest,
        skip_others=skip_others,
        verify=verify,
    )
    return replace(report, details={**report.details, "manifest": manifest, "config": configured.path})


def check_files(
    paths: Sequence[str],
    *,
    manifest: Manifest | None,
    config: Config,
    manifest_path: str | None = None,
    skip_others: bool = False,
    verify: Callable[..., Report],
) -> CheckReport:
    """Check files.

    Args:
        paths: files and folders; none: all of the manifest's, and what else lies in the folders it was made of.
        manifest: what they must be.
        config: the policies.
        manifest_path: where the manifest lies.
        skip_others: whether files that are named and no checkpoint are passed over.
        verify: what holds a file against a model; `ckptkit.verify`.

    Raises:
        VerifyError: a policy has a value that it cannot have.
        MissingDependencyError: a policy needs torch, or the package of a reference, and it is not installed.
    """
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    folder = "" if manifest is None else manifest.folder or "."
    known = set() if manifest is None else paths_of(manifest.files)
    given = paths or ([] if manifest is None else [os.path.join(folder, name) for name in manifest.folders])
    selection = Selection(checkpoints=())
    if given:
        selection = select(
            given,
            relative_to=folder,
            skip_others=skip_others,
            whole=True,
            known=known,
            manifest=manifest_path,
            every_pickle=config.every_pickle,
        )
    tasks = _tasks(selection, paths, manifest, config)
    told = {task.path for task in tasks}
    unreadable = [(_tidy(path), error) for path, error in selection.unreadable]
    results = [_not_read(path, error) for path, error in unreadable if path not in told]
    if manifest is not None:
        if not manifest.files:
            results.append(_nothing_selected(folder, "the manifest names no file"))
        results += [_missing(task.path) for task in tasks if not os.path.lexists(task.path) and task.record is not None]
        tasks = [task for task in tasks if os.path.lexists(task.path) or task.record is None]
    passed_over, pickles = Counter(selection.passed_over), list[str]()
    for task, result in zip(tasks, _carried_out(tasks, manifest, verify), strict=True):
        if task.other is None:
            results.append(result)
        elif result.findings:
            results.append(result)
            pickles.append(result.path)
            passed_over[task.other] -= 1
    for path, error in selection.empty if paths else ():  # of the manifest's own folders it is told what is missing
        if all(name_of(pickle, path).startswith("../") for pickle in pickles):
            results.append(_nothing_selected(path, str(error)))
    if not results and not skip_others:
        results = [_nothing_selected("" if manifest is None else manifest.folder, "no file to check was found")]
    results.sort(key=lambda result: result.path)
    return CheckReport.of(
        tuple(results), started=started, passed_over=+passed_over, may_be_empty=skip_others and not selection.empty
    )


def _tasks(selection: Selection, paths: Sequence[str], manifest: Manifest | None, config: Config) -> list[_Task]:
    """What is to be looked at."""
    others = [
        _Task(path=_tidy(path), policy=policy, other=kind)
        for path, kind in selection.others.items()
        if (policy := config.policy_for(path)).every_pickle or kind == "pickle"
    ]
    if manifest is None:
        return [*(_task(each, config, selection) for each in selection.checkpoints), *others]
    folder = manifest.folder or "."
    records = {record.path: record for record in manifest.files}
    owners = {shard: record for record in manifest.files for shard in _shards(record)}
    goldens = {record.golden.path for record in manifest.files if record.golden is not None}
    wanted = {name: record for name, record in records.items() if not paths or _is_meant(record, paths, folder)}
    tasks = []
    for each in selection.checkpoints:
        named = next((name for name in each.names if name in records or name in owners), None)
        if named is not None:
            record = records.get(named) or owners[named]
            wanted[record.path] = record
        elif not any(name in goldens for name in each.names):
            tasks.append(_task(each, config, selection, is_extra=os.path.lexists(each.path)))
        elif paths and each.name not in wanted:  # named, and a checkpoint like any other
            tasks.append(_task(each, config, selection))
    recorded = [_recorded_task(record, manifest, config, selection) for record in wanted.values()]
    return [*recorded, *tasks, *others]


def _task(selected: Selected, config: Config, selection: Selection, *, is_extra: bool = False) -> _Task:
    path = _tidy(selected.path)
    return _Task(
        path=path, policy=config.policy_for(path), is_extra=is_extra, shards=selection.shards.get(selected.path, ())
    )


def _recorded_task(record: FileRecord, manifest: Manifest, config: Config, selection: Selection) -> _Task:
    path = os.path.join(manifest.folder, *record.path.split("/"))
    shards = next((named for index, named in selection.shards.items() if _tidy(index) == path), ())
    return _Task(path=path, policy=config.policy_for(path), record=record, shards=shards)


def _tidy(path: str) -> str:
    """A path without steps that lead nowhere; ``..`` stays, for it may lead out of a link."""
    steps = path.split(os.sep)
    return os.sep.join(step for step in steps if step != "." or len(steps) == 1)


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
    if task.other is not None:
        return _other_result(task), None
    record = task.record
    recorded = ("manifest",) if manifest is not None and (record is not None or task.is_extra) else ()
    rules = ("readable", *recorded, *rules_of(task.policy))
    findings: list[CheckFinding] = [_extra(task.path)] if task.is_extra else []
    findings += [_whole(task.path, task.shards)] if task.shards else []
    examined = None
    try:
        digest = record is not None and not record.shards and _nbytes(task) != record.size
        look = partial(
            examine_file,
            task.path,
            ignore_checksums=task.policy.ignore_checksums,
            whole=record is not None and record.whole_digest is not None,
            threads=threads,
        )
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
        findings += [_malformed(task.path, told) for told in examined.malformed]
        findings += violations(examined, task.policy)
    except CkptkitError as error:
        findings.append(_unreadable(task.path, error, task.policy))
        if task.policy.every_pickle and isinstance(error, FormatError):
            findings += _pickles(task, error.globals)
    result = FileResult(
        path=task.path,
        size=None if examined is None else examined.size,
        sha256=None if examined is None else examined.sha256,
        rules=rules,
        findings=tuple(findings),
        seconds=time.perf_counter() - begun,
    )
    return result, examined


def _other_result(task: _Task) -> FileResult:
    """A file that is not a checkpoint, held against what is said of pickles."""
    begun = time.perf_counter()
    findings = tuple(_pickles(task))
    return FileResult(
        path=task.path,
        size=size_of(task.path),
        rules=(*(("no-pickle",) if task.policy.no_pickle else ()), "max-trust"),
        findings=findings,
        seconds=time.perf_counter() - begun,
    )


def _pickles(task: _Task, uses: Sequence[GlobalUse] = ()) -> Iterator[CheckFinding]:
    """What the policy forbids of the pickles in a file that cannot be opened as a checkpoint."""
    from ckptkit.formats.contents import look_inside

    try:
        inside = look_inside(task.path)
    except CkptkitError as error:
        yield _unreadable(task.path, error, task.policy)
    else:
        found = replace(inside, globals=merge_uses(uses, inside.globals))
        yield from pickle_violations(task.path, found, task.policy)


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
    return _not_as_it_must_be("file-unreadable", path, "a readable checkpoint", found, message)


def _damaged(path: str, damage: str) -> CheckFinding:
    return _not_as_it_must_be("damaged", path, "the bytes that checksums were recorded for", "other bytes", damage)


def _malformed(path: str, told: str) -> CheckFinding:
    return _not_as_it_must_be("malformed-value", path, "values whose parts fit each other", "others", told)


def _not_as_it_must_be(code: str, path: str, expected: str, found: str, message: str) -> CheckFinding:
    """What is found whatever the policy."""
    return CheckFinding(
        code=code, severity="error", path=path, rule="readable", expected=expected, found=found, message=message
    )


def _not_read(path: str, error: CkptkitError) -> FileResult:
    return FileResult(path=path, rules=("readable",), findings=(_unreadable(path, error, Policy()),))


def _whole(path: str, shards: Sequence[str]) -> CheckFinding:
    return CheckFinding(
        code="whole-checked",
        severity="info",
        path=path,
        rule="selection",
        expected="the whole checkpoint",
        found=list(shards),
        message=f"checked in place of {listed(shards)}: the index beside a shard stands for all of them",
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
