"""Released weights: what they must be, and whether they are.

A check goes one way: paths stand for files (`selection`), each file is opened and read once (`examine`, `reading`), and
held against its record in the manifest (`manifest_file`, `manifest_rules`) and against its policy (`policy`,
`policy_rules`, as `config` has it); what came of them all is a report (`results`).
`check` is that way from its beginning to its end.  `manifest_maker` goes it too, as far as the record.

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

from ckptkit.architectures import Architecture
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CkptkitError, FormatError, VerifyError
from ckptkit.extras import require_torch
from ckptkit.formats import collector_paused, source_of
from ckptkit.formats.folder import PICKLE
from ckptkit.normalize.parts import CODE
from ckptkit.pickling.trust import merge_uses
from ckptkit.released.config import Config, read_config
from ckptkit.released.examine import examine_file
from ckptkit.released.manifest_file import FileRecord, Manifest, paths_of, read_manifest
from ckptkit.released.manifest_rules import (
    compare,
    golden_findings,
    incomplete_finding,
    is_same_file,
    model_findings,
)
from ckptkit.released.policy import Policy
from ckptkit.released.policy_rules import pickle_violations, rules_of, violations
from ckptkit.released.results import (
    CheckFinding,
    CheckReport,
    FileResult,
    damage_finding,
    extra_finding,
    malformed_finding,
    missing_result,
    nothing_selected,
    unlike_finding,
    unreadable_finding,
    whole_finding,
)
from ckptkit.released.selection import Selected, Selection, name_of, select, size_of
from ckptkit.report import Report
from ckptkit.transfer.workers import each_file

__all__ = ["check"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One file, and what it is held against.

    Attributes:
        path: the file.
        policy: what every file is held to.
        record: what the manifest says of it; ``None``: nothing.
        folder: of the manifest, where there is one.
        is_extra: whether the manifest should name it, and does not.
        other: the kind of a file that is not a checkpoint, and is looked at for its pickles.
        shards: those that were named, for which it stands.
    """

    path: str
    policy: Policy
    record: FileRecord | None = None
    folder: str = ""
    is_extra: bool = False
    other: str | None = None
    shards: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its size, as far as it is known before it is opened."""
        if self.record is not None and self.record.shards:
            return self.record.size
        return size_of(self.path)

    @property
    def is_missing(self) -> bool:
        """Whether the manifest names it, and it is not there."""
        return self.record is not None and not os.path.lexists(self.path)

    @property
    def golden(self) -> str | None:
        """The file of its recorded outputs."""
        if self.record is None or self.record.golden is None:
            return None
        return os.path.join(self.folder, *self.record.golden.path.split("/"))


def check(
    paths: Sequence[str],
    *,
    manifest: str | None,
    config: str | None,
    tag: str | None = None,
    skip_others: bool,
    typed: Mapping[str, Any],
    verify: Callable[..., Report],
) -> CheckReport:
    """Hold files against a manifest and policies; see `ckptkit.check`.

    Args:
        paths: files and folders; none: those of the configuration, or all of the manifest's, and what else lies in the
            folders it was made of.
        manifest: its path; ``None``: that of the configuration.
        config: path of the configuration; ``None``: there is none.
        tag: which of several steps in the folders is meant.
        skip_others: whether files that are named and no checkpoint are passed over.
        typed: fields of a `Policy` that go before the configured ones.
        verify: what holds a file against a model; `ckptkit.verify`.

    Raises:
        As `ckptkit.check`.
    """
    Policy(**typed)
    configured = replace(Config() if config is None else read_config(config), typed=typed)
    manifest = configured.manifest if manifest is None else manifest
    paths = paths or configured.paths
    if not paths and manifest is None:
        raise VerifyError("nothing to check: name files or folders, or a manifest with --manifest FILE")
    # Paths are told as the manifest's own was given, not from the root of the disk.
    released = None if manifest is None else replace(read_manifest(manifest), folder=os.path.dirname(manifest))
    if configured.needs_model:
        require_torch()
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")

    selection = _selected(paths, released, configured, manifest, tag, skip_others)
    tasks = _tasks(selection, paths, released, configured)
    results = _told_unopened(selection, tasks, released)
    tasks = [task for task in tasks if not task.is_missing]
    found = each_file([task.nbytes for task in tasks], lambda number, threads: _held(tasks[number], threads))
    opened = [(task.other, _with_model(*each, task, verify)) for task, each in zip(tasks, found, strict=True)]
    results += [result for other, result in opened if other is None or result.findings]
    pickles = [(other, result.path) for other, result in opened if other is not None and result.findings]
    passed_over = Counter(selection.passed_over)
    passed_over.subtract(other for other, _ in pickles)
    if paths:  # of the manifest's own folders it is told what is missing
        results += _told_empty(selection, [path for _, path in pickles])
    if not results and not skip_others:
        results = [nothing_selected("" if released is None else released.folder, "no file to check was found")]
    report = CheckReport.of(
        tuple(sorted(results, key=lambda result: result.path)),
        started=started,
        passed_over=+passed_over,
        may_be_empty=skip_others and not selection.empty,
    )
    return replace(report, details={**report.details, "manifest": manifest, "config": configured.path})


def _selected(
    paths: Sequence[str],
    manifest: Manifest | None,
    config: Config,
    manifest_path: str | None,
    tag: str | None,
    skip_others: bool,
) -> Selection:
    """What the paths stand for; without any, the folders that the manifest was made of."""
    folder = "" if manifest is None else manifest.folder or "."
    given = paths or ([] if manifest is None else [os.path.join(folder, name) for name in manifest.folders])
    if not given:
        return Selection(checkpoints=())
    return select(
        given,
        relative_to=folder,
        tag=tag if paths else None,
        skip_others=skip_others,
        whole=True,
        known=set() if manifest is None else paths_of(manifest.files),
        manifest=manifest_path,
        every_pickle=config.every_pickle,
        are_whole=config.typed.get("tp_rules") is not None,
    )


def _told_unopened(selection: Selection, tasks: Sequence[_Task], manifest: Manifest | None) -> list[FileResult]:
    """What is said of files and folders of which nothing can be looked at."""
    told = {task.path for task in tasks}
    unreadable = [(_tidy(path), error) for path, error in selection.unreadable]
    results = [
        FileResult(path=path, rules=("readable",), findings=(unreadable_finding(path, error),))
        for path, error in unreadable
        if path not in told
    ]
    if manifest is not None and not manifest.files:
        results.append(nothing_selected(manifest.folder or ".", "the manifest names no file"))
    return [*results, *(missing_result(task.path) for task in tasks if task.is_missing)]


def _told_empty(selection: Selection, pickles: Sequence[str]) -> Iterator[FileResult]:
    """What is said of folders without a checkpoint, and without a file that is told of for its pickles."""
    for path, error in selection.empty:
        if all(name_of(pickle, path).startswith("../") for pickle in pickles):
            yield nothing_selected(path, str(error))


def _tasks(selection: Selection, paths: Sequence[str], manifest: Manifest | None, config: Config) -> list[_Task]:
    """What is to be looked at."""
    others = _other_tasks(selection, config)
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


def _other_tasks(selection: Selection, config: Config) -> list[_Task]:
    """Files that are not checkpoints, and may hold pickles that count."""
    tasks = [
        _Task(path=_tidy(path), policy=config.policy_for(path), other=kind) for path, kind in selection.others.items()
    ]
    return [task for task in tasks if task.policy.every_pickle or task.other == PICKLE]


def _task(selected: Selected, config: Config, selection: Selection, *, is_extra: bool = False) -> _Task:
    path = _tidy(selected.path)
    return _Task(
        path=path, policy=config.policy_for(path), is_extra=is_extra, shards=selection.shards.get(selected.path, ())
    )


def _recorded_task(record: FileRecord, manifest: Manifest, config: Config, selection: Selection) -> _Task:
    path = os.path.join(manifest.folder, *record.path.split("/"))
    shards = next((named for index, named in selection.shards.items() if _tidy(index) == path), ())
    return _Task(path=path, policy=config.policy_for(path), record=record, folder=manifest.folder, shards=shards)


def _tidy(path: str) -> str:
    """A path without steps that lead nowhere; ``..`` stays, for it may lead out of a link."""
    steps = path.split(os.sep)
    return os.sep.join(step for step in steps if step != "." or len(steps) == 1)


def _shards(record: FileRecord) -> Iterator[str]:
    yield from paths_of([replace(record, golden=None)]) - {record.path}


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


@collector_paused()  # what is read is gone at the end, without it
def _held(task: _Task, threads: int) -> tuple[FileResult, Architecture | None]:
    """What of a file is not as manifest and policy want it; and the model it is of, where nothing else says which."""
    if task.other is not None:
        return _other_result(task), None
    begun = time.perf_counter()
    path, policy, record = task.path, task.policy, task.record
    recorded = ("manifest",) if record is not None or task.is_extra else ()
    findings = [extra_finding(path)] * task.is_extra + [whole_finding(path, task.shards)] * bool(task.shards)
    examined, architecture = None, None
    try:
        look = partial(
            examine_file,
            path,
            tp_rules=policy.tp_rules if os.path.isdir(path) else None,
            ignore_checksums=policy.ignore_checksums,
            whole=record is not None and record.whole_digest is not None,
            threads=threads,
        )
        # Where the manifest's hash is the file's, nothing more is needed.
        may_be_same = record is not None and (bool(record.shards) or task.nbytes == record.size)
        examined = digested = look(
            hash_file=record is not None,
            digest=record is not None and not may_be_same,
            values=policy.no_nan,
            checksums=not may_be_same,
        )
        if policy.forward and policy.fits is None and task.golden is None:
            architecture = examined.architecture
        if record is not None:
            if may_be_same and not is_same_file(examined, record):
                digested = look(hash_file=False, digest=True, values=False)
            findings += compare(examined, digested, record)
            findings += golden_findings(path, record, task.folder)
        if digested.damage is not None:
            findings.append(damage_finding(path, digested.damage))
        if digested.unlike is not None:
            findings.append(unlike_finding(path, digested.unlike))
        findings += [malformed_finding(path, told) for told in examined.malformed]
        findings += violations(examined, policy)
    except CkptkitError as error:
        findings.append(unreadable_finding(path, error, policy.allow_part))
        findings += incomplete_finding(path, record)
        if policy.every_pickle and isinstance(error, FormatError):
            findings += _pickles(task, error.globals)
    result = FileResult(
        path=path,
        size=None if examined is None else examined.size,
        sha256=None if examined is None else examined.sha256,
        rules=("readable", *recorded, *rules_of(policy)),
        findings=tuple(findings),
        seconds=time.perf_counter() - begun,
    )
    return result, architecture


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
        inside = look_inside(source_of(task.path))
    except CkptkitError as error:
        yield unreadable_finding(task.path, error, task.policy.allow_part)
    else:
        found = replace(inside, globals=merge_uses(uses, inside.globals))
        yield from pickle_violations(task.path, found, task.policy)


def _with_model(
    result: FileResult, architecture: Architecture | None, task: _Task, verify: Callable[..., Report]
) -> FileResult:
    """The result with what the verifier says, if a model is needed; of a file that could not be read no more."""
    policy = task.policy
    if not policy.needs_model:
        return result
    begun = time.perf_counter()
    rules = [name for name, wanted in (("fits", policy.fits), ("forward", policy.forward)) if wanted]
    findings = result.findings
    unfit = any(finding.rule == "readable" or finding.code == CODE for finding in findings)
    if task.other is None and result.size is not None and (not unfit or policy.allow_part):
        findings = (*findings, *model_findings(task.path, policy, task.golden, architecture, verify))
    seconds = result.seconds + time.perf_counter() - begun
    return replace(result, rules=(*result.rules, *rules), findings=findings, seconds=seconds)
