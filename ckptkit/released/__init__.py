"""Released weights: recording what they must be, and checking that they are.

In a check, paths are resolved to files (`selection`), each file is opened and read once (`examine`, `reading`), then
checked against its record in the manifest (`manifest_file`, `manifest_rules`) and against its policy (`policy`,
`policy_rules`, configured by `config`) by `file_check`, here or in other processes; all results make a report
(`results`).  `Run` does all of this.  `manifest_maker` does the same as far as the record.
The result of each file can be saved (`lines`), reused by another run, and combined (`merging`).

If a file's bytes are those in the manifest, its hash is enough.  If not, its tensors are digested to find out whether
the same weights were written differently or the weights are different: in the same pass if the file's size differs, in
a second one if it does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, Any

from ckptkit import places
from ckptkit.errors import CkptkitError, VerifyError
from ckptkit.extras import __version__, require_torch
from ckptkit.fleet.shares import Share
from ckptkit.formats.folder import PICKLE
from ckptkit.released.config import Config, read_config
from ckptkit.released.file_check import Task, held, held_from, stamp_of, with_model
from ckptkit.released.lines import Earlier, digest_of, digest_of_policy, end_of
from ckptkit.released.policy import Policy
from ckptkit.released.results import (
    CheckReport,
    FileResult,
    Tally,
    lost_result,
    missing_result,
    nothing_selected,
    unreadable_finding,
)
from ckptkit.released.selection import Selected, Selection, name_of, select
from ckptkit.report import SCHEMA_VERSION, Report
from ckptkit.transfer.many import Workers, side_by_side

if TYPE_CHECKING:
    from ckptkit.fleet import Outcome
    from ckptkit.released.document import CheckEnd, CheckHead
    from ckptkit.released.manifest_file import FileRecord, Manifest

__all__ = ["Run", "check"]


class Run:
    """A check with a known list of files; its results come one by one, in the order of paths.

    Args:
        paths: files and folders; none: those of the configuration, or all of the manifest's, and anything else in the
            folders it was made from.
        manifest: its path; ``None``: that of the configuration.
        config: path of the configuration; ``None``: there is none.
        tag: which of several steps in the folders is meant.
        skip_others: whether to skip named files that are not checkpoints.
        is_listed: whether the paths are complete, even if there are none.
        part: the share of the files to check: ``"2/8"``.
        workers: the workers that check them.
        resume: a JSON Lines file whose results are reused if they are still valid.
        is_resumable: whether results record what they depend on, so that another run can reuse them.
        typed: fields of a `Policy` that override the configured ones.
        verify: the function that checks a file against a model; `ckptkit.verify`.

    Attributes:
        head: a description of the run, as in the first line of JSON Lines.

    Raises:
        As `ckptkit.check`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        manifest: str | None,
        config: str | None,
        tag: str | None = None,
        skip_others: bool,
        is_listed: bool = False,
        part: str | None = None,
        workers: Workers = Workers(),  # noqa: B008 - frozen
        resume: str | None = None,
        is_resumable: bool = False,
        typed: Mapping[str, Any],
        verify: Callable[..., Report],
    ) -> None:
        Policy(**typed)
        self._share = None if part is None else Share.of(part)
        self._config = replace(Config() if config is None else read_config(config), typed=typed)
        self._manifest = manifest = self._config.manifest if manifest is None else manifest
        paths = paths if is_listed else paths or self._config.paths
        if not paths and manifest is None and not is_listed:
            raise VerifyError("nothing to check: name files or folders, or a manifest with --manifest FILE")
        self._released = None if manifest is None else _released(manifest, paths)
        if self._config.needs_model:
            require_torch()
        self._started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        self._workers, self._verify = workers, verify
        self._earlier = None if resume is None else Earlier(resume)
        self._may_skip = skip_others
        with self._asked_once():
            selection = _selected(paths, self._released, self._config, manifest, tag, skip_others, is_listed)
            tasks = _tasks(selection, paths if paths or is_listed else None, self._released, self._config)
            self._divide(selection, tasks, [*paths], is_resumable or self._earlier is not None)

    def _asked_once(self) -> AbstractContextManager[object]:
        return places.asked_once(None if self._released is None else self._released.folder, *self._config.paths)

    def _divide(self, selection: Selection, tasks: list[Task], paths: list[str], is_kept: bool) -> None:
        """Keep the selected files in the share, sorted by what happens to them."""
        is_meant = (lambda path: True) if self._share is None else self._share.holds
        told = _told_unopened(selection, tasks, self._released)
        # For the manifest's own folders, missing files are reported.
        empty = selection.empty if paths else ()
        self._is_nothing = not (told or empty or any(task.other is None for task in tasks))
        self._may_be_empty = self._may_skip and not selection.empty
        self._told = [result for result in told if is_meant(result.path)]
        self._empty = [each for each in empty if is_meant(each[0])]
        self._passed = Counter(kind for path, kind in selection.passed.items() if is_meant(_tidy(path)))
        tasks = [task for task in tasks if not task.is_missing and is_meant(task.path)]
        tasks = _depending(tasks) if is_kept else tasks
        self._others = [task for task in tasks if task.other is not None]
        self._tasks = sorted((task for task in tasks if task.other is None), key=lambda task: task.path)

    @property
    def part(self) -> str | None:
        """The share of the files that it checks."""
        return None if self._share is None else str(self._share)

    @property
    def head(self) -> CheckHead:
        """A description of the run."""
        config, released = self._config, self._released
        said = [config.settings, [[each.files, each.settings] for each in config.overrides], config.typed]
        policies = [{}, *(override.settings for override in config.overrides)]
        digests = [digest_of_policy(Policy(**{**config.settings, **each, **config.typed})) for each in policies]
        return {
            "schema_version": SCHEMA_VERSION,
            "ckptkit": __version__,
            "policy": digest_of(said, digests, None if released is None else released.to_dict()),
            "run": (None if self._earlier is None else self._earlier.run) or os.urandom(16).hex(),
            "resumed": 0 if self._earlier is None else self._earlier.resumed,
            "part": self.part,
            "manifest": self._manifest,
            "config": config.path,
            "started": self._started,
        }

    def results(self) -> Iterator[FileResult]:
        """The result of each file, as it comes; asked for once."""
        with self._asked_once():
            yield from self._results()

    def _results(self) -> Iterator[FileResult]:
        tasks, kept = self._others + self._tasks, list[str]()
        count, self._others, self._tasks = len(self._others), [], []
        if self._earlier is not None:
            looked_at = [(task, is_kept and task.other is None) for task, is_kept in self._earlier.kept(tasks)]
            kept = [task.path for task, is_kept in looked_at if is_kept]
            tasks = [task for task, is_kept in looked_at if not is_kept]
        work = held if self._workers.executor is None else partial(held_from, os.getcwd())
        made = side_by_side(tasks, work, workers=self._workers, nbytes=_nbytes, lost=_lost, is_far=_is_far)
        found = zip(tasks, made, strict=True)
        opened = ((task, with_model(*each, task, self._verify)) for task, each in found)
        others = [(task, result) for task, result in islice(opened, count) if result.findings]
        self._passed.subtract(Counter(task.other for task, _ in others if task.other is not None))
        told = [*self._told, *(result for _, result in others)]
        told += _told_empty(self._empty, [result.path for _, result in others])
        taken = () if self._earlier is None else self._earlier.results(kept)
        if self._is_nothing and not self._may_skip and not told:
            where = "" if self._released is None else self._released.folder
            told = [nothing_selected(where, "found no file to check")]
        told.sort(key=lambda result: result.path)
        yield from merge(told, (result for _, result in opened), taken, key=lambda result: result.path)

    @property
    def passed_over(self) -> dict[str, int]:
        """How many files are not checkpoints, by kind; known once all results have come."""
        return dict(+self._passed)

    def end(self, tally: Tally) -> CheckEnd:
        """The outcome of all results, as in the last line of JSON Lines."""
        return end_of(tally, self.passed_over, may_be_empty=self._may_be_empty, part=self.part)

    def report(self, results: Iterable[FileResult]) -> CheckReport:
        """The report on its results."""
        report = CheckReport.of(
            tuple(results),
            started=self._started,
            passed_over=self.passed_over,
            may_be_empty=self._may_be_empty or (self._share is not None and not self._is_nothing),
            **({} if self.part is None else {"part": self.part}),
        )
        details = {**report.details, "manifest": self._manifest, "config": self._config.path}
        return replace(report, details=details)


def check(paths: Sequence[str], **asked: Any) -> CheckReport:
    """Check files against a manifest and policies; arguments as in `Run`, results as in `ckptkit.check`."""
    run = Run(paths, **asked)
    results = tuple(run.results())
    return run.report(results)


def _nbytes(task: Task) -> int:
    return task.nbytes


def _is_far(task: Task) -> bool:
    return places.is_url(task.path)


def _lost(task: Task, outcome: Outcome[Any]) -> tuple[FileResult, None]:
    return lost_result(task.path, outcome.problem or "failed", outcome.text), None


def _depending(tasks: Iterable[Task]) -> list[Task]:
    """The tasks with digests of all that their results depend on beside the file."""
    policies: dict[int, str] = {}
    digests: dict[tuple[object, ...], str] = {}
    made = []
    for task in tasks:
        if id(task.policy) not in policies:
            policies[id(task.policy)] = digest_of_policy(task.policy)
        record = None if task.record is None else digest_of(task.record.to_dict())
        golden = None if task.golden is None else stamp_of(task.golden)
        key = (policies[id(task.policy)], record, golden, task.is_extra, task.other, task.shards)
        if key not in digests:
            digests[key] = digest_of(__version__, *key)
        made.append(replace(task, against=digests[key]))
    return made


def _released(path: str, paths: Sequence[str]) -> Manifest:
    """The manifest, for these paths."""
    from ckptkit.released.bases import based  # not there where nothing is recorded
    from ckptkit.released.manifest_file import read_manifest

    return based(read_manifest(path), path, paths)


def _selected(
    paths: Sequence[str],
    manifest: Manifest | None,
    config: Config,
    manifest_path: str | None,
    tag: str | None,
    skip_others: bool,
    is_listed: bool,
) -> Selection:
    """The files that the paths mean; without any, the folders that the manifest was made from."""
    folder = "" if manifest is None else manifest.folder or "."
    given = (
        paths
        if is_listed
        else paths or ([] if manifest is None else [places.below(folder, name) for name in manifest.folders])
    )
    if not given:
        return Selection(checkpoints=())
    return select(
        given,
        relative_to=folder,
        tag=tag if paths else None,
        skip_others=skip_others,
        whole=True,
        known=set() if manifest is None else manifest.paths,
        manifest=manifest_path,
        every_pickle=config.every_pickle,
        beside=manifest is None,
        are_whole=config.typed.get("tp_rules") is not None,
    )


def _told_unopened(selection: Selection, tasks: Sequence[Task], manifest: Manifest | None) -> list[FileResult]:
    """The findings about files and folders that cannot be opened."""
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


def _told_empty(empty: Iterable[tuple[str, CkptkitError]], pickles: Sequence[str]) -> Iterator[FileResult]:
    """The findings about folders without a checkpoint and without any file that may contain pickles."""
    for path, error in empty:
        if all(name_of(pickle, path).startswith("../") or name_of(pickle, path) == pickle for pickle in pickles):
            yield nothing_selected(path, str(error))


def _tasks(selection: Selection, paths: Sequence[str] | None, manifest: Manifest | None, config: Config) -> list[Task]:
    """The files to check; without paths, all that the manifest names."""
    others = _other_tasks(selection, config)
    if manifest is None:
        return [*(_task(each, config, selection) for each in selection.checkpoints), *others]
    folder = manifest.folder or "."
    records = {record.path: record for record in manifest.files}
    owners = {shard: record for record in manifest.files for shard in record.parts - {record.path}}
    goldens = {record.golden.path for record in manifest.files if record.golden is not None}
    is_meant = None if paths is None else _are_meant(paths, folder)
    wanted = {name: record for name, record in records.items() if is_meant is None or is_meant(name)}
    tasks = []
    for each in selection.checkpoints:
        named = next((name for name in each.names if name in records or name in owners), None)
        if named is not None:
            record = records.get(named) or owners[named]
            wanted[record.path] = record
        elif not any(name in goldens for name in each.names):
            tasks.append(_task(each, config, selection, is_extra=places.exists(each.path)))
        elif paths is not None and each.name not in wanted:  # named, and a checkpoint like any other
            tasks.append(_task(each, config, selection))
    recorded = [_recorded_task(record, manifest, config, selection) for record in wanted.values()]
    return [*recorded, *tasks, *others]


def _other_tasks(selection: Selection, config: Config) -> list[Task]:
    """Files that are not checkpoints, and may hold pickles that count."""
    tasks = [
        Task(path=_tidy(path), policy=config.policy_for(path), other=kind) for path, kind in selection.others.items()
    ]
    return [task for task in tasks if task.policy.every_pickle or task.other == PICKLE]


def _task(selected: Selected, config: Config, selection: Selection, *, is_extra: bool = False) -> Task:
    path = _tidy(selected.path)
    return Task(
        path=path, policy=config.policy_for(path), is_extra=is_extra, shards=selection.shards.get(selected.path, ())
    )


def _recorded_task(record: FileRecord, manifest: Manifest, config: Config, selection: Selection) -> Task:
    path = places.below(manifest.folder, record.path)
    shards = next((named for index, named in selection.shards.items() if _tidy(index) == path), ())
    folder = manifest.folder if manifest.beside is None else manifest.beside
    return Task(path=path, policy=config.policy_for(path), record=record, folder=folder, shards=shards)


def _tidy(path: str) -> str:
    """A path without steps that lead nowhere; ``..`` stays, for it may lead out of a link.  A URL is unchanged."""
    if places.is_url(path):
        return path
    steps = path.split(os.sep)
    if "." not in steps:  # the same text, which takes no extra memory
        return path
    return os.sep.join(step for step in steps if step != "." or len(steps) == 1)


def _are_meant(paths: Sequence[str], folder: str) -> Callable[[str], bool]:
    """Whether, of a file with a name relative to the folder, one of the paths is it, or is a folder above it."""
    names = {name_of(path, folder) for path in paths}
    if "." in names or any(map(_is_above, names)):
        return lambda name: True

    def is_meant(name: str) -> bool:
        steps = name.split("/")
        return any("/".join(steps[:count]) in names for count in range(1, len(steps) + 1))

    return is_meant


def _is_above(name: str) -> bool:
    """Whether a name leads to a folder above the one it is relative to."""
    return set(name.split("/")) == {".."}
