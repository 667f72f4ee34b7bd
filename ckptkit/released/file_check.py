"""One file of a check: what it is checked against, the results, and the state of the file when it was checked.

`held` is called where the file is checked, in this process or in another: its argument (a `Task`) and its results (a
`FileResult`, and the known model) are plain data.  What needs a model is done by `with_model`, in the process that has
it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptkit import places
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import STDIN, collector_paused, source_of
from ckptkit.formats.containers import SUFFIXES
from ckptkit.formats.unpacked import is_unpacked
from ckptkit.normalize.parts import CODE
from ckptkit.pickling.trust import merge_uses
from ckptkit.released.examine import Examined, examine_file
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
    FileResult,
    damage_finding,
    extra_finding,
    malformed_finding,
    unlike_finding,
    unreadable_finding,
    whole_finding,
)
from ckptkit.released.selection import size_of
from ckptkit.report import Report, split_member
from ckptkit.startup import dataclass, sha256

if TYPE_CHECKING:
    from ckptkit.architectures import Architecture
    from ckptkit.released.manifest_file import FileRecord

__all__ = ["Task", "held", "held_from", "stamp_of", "with_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One file, and what it is checked against.

    Attributes:
        path: the file.
        policy: what every file must meet.
        record: its record in the manifest; ``None``: it has none.
        folder: of the manifest, if there is one.
        is_extra: whether the manifest should name it, and does not.
        other: the kind of a file that is not a checkpoint, and is searched for pickles.
        shards: the named shards that it represents.
        against: a digest of everything else the result depends on; ``None``: nobody will ask whether the result is
            still valid.
    """

    path: str
    policy: Policy
    record: FileRecord | None = None
    folder: str = ""
    is_extra: bool = False
    other: str | None = None
    shards: tuple[str, ...] = ()
    against: str | None = None

    @property
    def nbytes(self) -> int:
        """Its size, as far as known before it is opened."""
        if self.record is not None and self.record.shards:
            return self.record.size
        return size_of(self.path)

    @property
    def is_missing(self) -> bool:
        """Whether the manifest names it, and it is not there."""
        return self.record is not None and not places.may_exist(self.path)

    @property
    def may_be_same(self) -> bool:
        """Whether the file may have the bytes of its record: then its hash is enough."""
        record = self.record
        return record is not None and (bool(record.shards) or self.nbytes == record.size)

    @property
    def golden(self) -> str | None:
        """The file of its recorded outputs."""
        if self.record is None or self.record.golden is None:
            return None
        return places.below(self.folder, self.record.golden.path)


@collector_paused()  # without it, read values are freed at the end
def held(task: Task, threads: int = 1) -> tuple[FileResult, Architecture | None]:
    """What of a file is not as manifest and policy want it; and the model it is of, where nothing else says which."""
    if task.other is not None:
        return _other_result(task), None
    begun = time.perf_counter()
    stamp = _stamp(task)
    path, policy, record = task.path, task.policy, task.record
    recorded = ("manifest",) if record is not None or task.is_extra else ()
    findings = [extra_finding(path)] * task.is_extra + [whole_finding(path, task.shards)] * bool(task.shards)
    examined, architecture = None, None
    try:
        examined, told = _looked_into(task, threads)
        if policy.forward and policy.fits is None and task.golden is None:
            architecture = examined.architecture
        findings += told
    except CkptkitError as error:
        # What the disk or a server said may be otherwise soon.
        stamp = stamp if isinstance(error, FormatError) else None
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
        stamp=stamp,
        against=task.against,
    )
    return result, architecture


def _looked_into(task: Task, threads: int) -> tuple[Examined, list[CheckFinding]]:
    """What is in a file, and what of it is not as manifest and policy want it."""
    path, policy, record = task.path, task.policy, task.record
    findings: list[CheckFinding] = []
    look = partial(
        examine_file,
        path,
        tp_rules=policy.tp_rules if places.isdir(path) else None,
        ignore_checksums=policy.ignore_checksums,
        whole=record is not None and record.whole_digest is not None,
        threads=threads,
    )
    may_be_same = task.may_be_same
    # A remote file is read once, for everything that may be needed.
    at_once = not may_be_same or places.is_url(path)
    examined = digested = look(
        hash_file=record is not None,
        digest=record is not None and at_once,
        values=policy.no_nan,
        checksums=at_once,
    )
    is_same = record is not None and may_be_same and is_same_file(examined, record)
    if record is not None:
        if not at_once and not is_same:
            digested = look(hash_file=False, digest=True, values=False)
        findings += compare(examined, digested, record)
        findings += golden_findings(path, record, task.folder)
    if digested.damage is not None and not is_same:
        findings.append(damage_finding(path, digested.damage))
    if digested.unlike is not None and not is_same:
        findings.append(unlike_finding(path, digested.unlike))
    findings += [malformed_finding(path, told) for told in examined.malformed]
    findings += violations(examined, policy)
    return examined, findings


def held_from(folder: str, task: Task, threads: int = 1) -> tuple[FileResult, Architecture | None]:
    """As `held`, for a task whose paths are relative to a folder that need not be the working directory here."""
    if os.getcwd() == folder:
        return held(task, threads)

    def seen(path: str) -> str:
        return path if places.is_url(path) else os.path.join(folder, path)

    rules = task.policy.tp_rules
    policy = task.policy if rules is None else replace(task.policy, tp_rules=seen(rules))
    there = replace(task, path=seen(task.path), folder=seen(task.folder), policy=policy)
    result, architecture = held(there, threads)
    inside = os.path.join(folder, "")

    def told(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(inside, "")
        return [told(each) for each in value] if isinstance(value, list) else value

    findings = (
        replace(
            each,
            path=task.path,
            message=told(each.message),
            fix=told(each.fix),
            expected=told(each.expected),
            found=told(each.found),
        )
        for each in result.findings
    )
    return replace(result, path=task.path, findings=tuple(findings)), architecture


def _stamp(task: Task) -> str | None:
    return None if task.against is None else stamp_of(task.path)


def stamp_of(path: str) -> str | None:
    """A value that changes when a checkpoint is written to; ``None``: unknown.

    It is made from the sizes and times of its files: for a folder all in it, for an index its shards too.  The time of
    the last change of a file's entry tells another file of its size that brought its own time of modification along.
    For anything but a local file it comes from the source, such as an ETag.
    """
    try:
        if path == STDIN:
            return None
        member = split_member(path)
        if member is None and not os.path.lexists(path):
            return _stamp_of_source(path)
        files = [path if member is None else member[0]]
        if member is None:
            files += _files_beside(path)
        facts = [(name.removeprefix(os.path.dirname(path)), *_facts(os.stat(name))) for name in files]
    except (OSError, ValueError):
        return None
    if len(facts) == 1:
        return "/".join(map(str, facts[0][1:]))
    return sha256(json.dumps(facts).encode()).hexdigest()


def _stamp_of_source(path: str) -> str:
    """The stamp from the source of a path; at a URL it stays open for its next reader."""
    source = source_of(path)
    stamp = repr(source.identity)
    places.put_back(source, path)
    return stamp


def _facts(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _files_beside(path: str) -> list[str]:
    """The other files of a checkpoint: those in the folder that it is, or of the index that it is; sorted."""
    folder, name = os.path.split(path)
    if os.path.isdir(path) or (name == "data.pkl" and is_unpacked(folder or os.curdir)):
        above = path if os.path.isdir(path) else folder
        return sorted(os.path.join(inside, name) for inside, _, names in os.walk(above) for name in names)
    if os.path.splitext(name)[1].lower() in SUFFIXES:
        return []
    from ckptkit.formats.sharded import shard_names

    return sorted(os.path.join(folder, *shard.split("/")) for shard in shard_names(path))


def _other_result(task: Task) -> FileResult:
    """A file that is not a checkpoint, checked against the policies on pickles."""
    begun = time.perf_counter()
    stamp = _stamp(task)
    findings = tuple(_pickles(task))
    return FileResult(
        path=task.path,
        size=size_of(task.path),
        rules=(*(("no-pickle",) if task.policy.no_pickle else ()), "max-trust"),
        findings=findings,
        seconds=time.perf_counter() - begun,
        stamp=stamp,
        against=task.against,
    )


def _pickles(task: Task, uses: Sequence[GlobalUse] = ()) -> Iterator[CheckFinding]:
    """What the policy forbids of the pickles in a file that cannot be opened as a checkpoint."""
    from ckptkit.formats.contents import look_inside

    try:
        inside = look_inside(source_of(task.path))
    except CkptkitError as error:
        yield unreadable_finding(task.path, error, task.policy.allow_part)
    else:
        found = replace(inside, globals=merge_uses(uses, inside.globals))
        yield from pickle_violations(task.path, found, task.policy)


def with_model(
    result: FileResult, architecture: Architecture | None, task: Task, verify: Callable[..., Report]
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
