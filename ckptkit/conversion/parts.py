"""One conversion, shared among processes: a single part (``part``), the end of it (``finish``), or all of it from here.

What there is to share are the shards of an output (`ckptkit.transfer.parts`).  Each process reads the source and plans
by itself; what travels is the paths, the options and which part is meant.  Several processes of one machine help if
there is something to compute, as with casts, or if a disk is faster in parallel; the threads of one process are just as
fast at copying.  Several machines with one file system help if each has its own path to the disks.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ckptkit import formats
from ckptkit.bytesource import Source
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict
from ckptkit.errors import CorruptError, RewriteError
from ckptkit.fleet.shares import Share
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.selection import KEY
from ckptkit.places import is_url, shown
from ckptkit.plan import Plan
from ckptkit.remote import carried
from ckptkit.report import count_of, human_size, listed
from ckptkit.shell import command_line
from ckptkit.startup import dataclass
from ckptkit.transfer.folders import temporary_folder
from ckptkit.transfer.part_records import modified_of, shares_of, tally_of
from ckptkit.transfer.parts import Parts
from ckptkit.transfer.passing import passed_of
from ckptkit.transfer.steps import Tally
from ckptkit.transfer.writing import places

if TYPE_CHECKING:
    from ckptkit.documents import PartDocument
    from ckptkit.options import ConvertOptions
    from ckptkit.transfer.part_records import PartRecord, PlanIdentity

__all__ = ["PartTask", "WrittenPart", "finish", "over_workers", "require_shards", "words_of", "write_part"]

_LISTED = 100
"""The number of missing parts for which a message has the commands."""

_MOST_PARTS = 64
"""Parts of an output for an external executor, if there are that many shards: each part plans again."""


class _Job(Protocol):
    """`ckptkit.conversion.Job`."""

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def source(self) -> Source: ...
    @property
    def asked(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def stale(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTask:
    """A part that a worker is to write: plain data.

    Attributes:
        source, destination: as they were given.
        options: of the conversion.
        share: which part.
        staging: the folder to put it into.
        identity: of the plan it is a part of.
        folder: the working directory that paths are relative to.
    """

    source: str
    destination: str
    options: ConvertOptions
    share: Share
    staging: str
    identity: PlanIdentity
    folder: str

    def path(self, given: str) -> str:
        """A path for the worker: as given, if it is relative to the same folder."""
        is_same = is_url(given) or os.path.isabs(given) or os.getcwd() == self.folder
        return given if is_same else os.path.join(self.folder, given)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPart:
    """A part that is there.

    Attributes:
        record: of it.
        tally: what casts lost in it.
        kept: whether it was there already, and whole.
    """

    record: PartRecord
    tally: Tally
    kept: bool

    def to_dict(self) -> PartDocument:
        """The text in a report."""
        shards = self.record["shards"]
        nbytes = sum(shard["nbytes"] for shard in shards.values())
        of = self.record["of"]
        return {"part": self.record["part"], "of": of, "shards": [*shards], "nbytes": nbytes, "kept": self.kept}


def require_shards(options: ConvertOptions, plan: Plan) -> None:
    """See that there are shards to share where parts are asked for.

    Raises:
        RewriteError: there are not.
    """
    if options.files_from is not None:
        raise RewriteError(
            f"--files-from {options.files_from} lists files of a folder, but the source is one checkpoint"
        )
    if options.part is None and not options.finish:
        return
    asked = "--finish" if options.part is None else f"--part {options.part}"
    if plan.in_folder is not None:
        raise RewriteError(
            f"{asked}: processes can share shards, but a {plan.format} folder is written by one process; omit it"
        )
    if plan.index is None:
        told = f"everything fits into one file of {human_size(plan.nbytes)}, so there is nothing to share"
        raise RewriteError(f"{asked}: {told}; omit it, or give a smaller --max-shard-size")
    if options.part is not None and options.part.count > DEFAULT_LIMITS.shards:
        raise RewriteError(
            f"{asked}: there can be at most {count_of(DEFAULT_LIMITS.shards, 'shard')}, and no more parts than that"
        )
    if options.part is not None and (options.executor is not None or options.jobs is not None):
        raise RewriteError(f"{asked}: one process writes a part; omit --jobs, or use it alone")


def _parts(job: _Job, options: ConvertOptions, staging: str | None = None) -> Parts:
    files = formats.hashed_parts(job.source) or {os.path.basename(job.source.path): job.source}
    return Parts(job.path, job.plan, files=files, options=_as_text(options), staging=staging)


def write_part(job: _Job, options: ConvertOptions, share: Share, task: PartTask | None) -> WrittenPart:
    """Write one part of the shards, and compare it with the source on request.

    Args:
        job: all of the output.
        options: as requested.
        share: which part.
        task: the worker's instructions; ``None``: the part is for ``finish``.

    Raises:
        As `Parts.write`; RewriteError: the plan is not the one that the task is about.
    """
    parts = _parts(job, options, None if task is None else task.staging)
    if task is not None:
        parts.require_agreed(task.identity)

    own = _restricted(job, share)
    passed = passed_of(own, job.source) if options.check else None

    def compare(path: str, compared: Callable[[int], object]) -> object:
        from ckptkit.compare import check_output

        return check_output(own, path, compared, passed)

    record, tally = parts.write(
        share,
        force=options.force,
        check=compare if options.check else None,
        hashed=options.check and task is None,
        source=job.source,
        passed=passed,
        progress=options.progress,
    )
    return WrittenPart(record=record, tally=tally or tally_of(job.plan, [record]), kept=tally is None)


def _restricted(job: _Job, share: Share) -> Checkpoint:
    """The checkpoint with only the tensors of one part."""
    shards = set(shares_of(job.plan, share.count)[share.index - 1])
    holder: Mapping[str, str] = {} if job.plan.index is None else job.plan.index.weight_map
    names = {name for name, shard in holder.items() if shard in shards}
    names |= {alias for alias, kept in job.plan.aliases.items() if kept in names}
    everything = job.checkpoint.state_dict.everything
    state_dict = StateDict({name: value for name, value in everything.items() if name in names})
    return job.checkpoint.replace(state_dict=state_dict, rest=STATE_DICT)


def finish(job: _Job, options: ConvertOptions, given: str | None) -> Tally:
    """Make one checkpoint of the parts that are there.

    Args:
        job: all of the output.
        options: as requested.
        given: path of the source, for the commands in messages.

    Returns:
        What casts lost in all parts.

    Raises:
        RewriteError: parts are not there or not whole, or are another conversion's; nothing is removed.
        DestinationExistsError, FileAccessError: as `Parts.finish`.
    """
    parts = _parts(job, options)
    with parts.alone():
        count, missing = parts.missing(hashed=options.check)
        if not count:
            places(job.plan, job.path, force=options.force)
        if missing or not count:
            raise RewriteError(_told_missing(job, options, given, count, missing), path=job.path)
        return _finished(job, options, parts)


def _finished(job: _Job, options: ConvertOptions, parts: Parts) -> Tally:
    now = modified_of(parts.files)
    modified = {name for each in parts.records().values() for name in now if each["modified"].get(name) != now[name]}

    def opened(path: str) -> object:
        from ckptkit.compare import check_output

        metadata = {key: value for key, value in job.checkpoint.metadata.items() if key != KEY}  # digests are in it
        try:  # a modified file has the same values if it was copied or touched
            return check_output(
                job.checkpoint.replace(metadata=metadata), path, values=options.check and bool(modified)
            )
        except CorruptError as error:
            if not modified:
                raise
            told = (
                f"the source was changed after a part was written ({listed(sorted(modified), 4)}); write all parts "
                "again"
            )
            raise RewriteError(f"{job.path}: {told}, with --force: {error}", path=job.path) from error

    return parts.finish(force=options.force, flush=options.check, opened=opened, replaces=job.stale, source=job.source)


def _told_missing(job: _Job, options: ConvertOptions, given: str | None, count: int, missing: Mapping[int, str]) -> str:
    """The missing parts, and the command that writes each."""
    source = job.source.path if given is None else shown(given)
    command = command_line(["ckptkit", "convert", source, job.asked, *words_of(options.but(finish=False))])
    if not count:
        return f"{job.path}: it has no parts yet; write each of N parts, from 1/N to N/N: {command} --part 1/N"
    lines = [f"part {number} {what}: {command} --part {number}/{count}" for number, what in missing.items()]
    more = [f"and {len(lines) - _LISTED:,} more"] if len(lines) > _LISTED else []
    told = f"{len(missing)} of {count_of(count, 'part')} {'is' if len(missing) == 1 else 'are'} missing or incomplete"
    return "\n  ".join(
        [f"{job.path}: {told}; nothing was changed; write them, then run --finish again:", *lines[:_LISTED], *more]
    )


# From here.


def over_workers(
    job: _Job, options: ConvertOptions, given: str | None, work: Callable[[PartTask], PartRecord]
) -> Tally:
    """Have an output written by workers, a part each, and finish it: all of it is there in the end, or nothing.

    Args:
        job: all of the output.
        options: as requested; ``jobs`` or ``executor`` chooses the workers.
        given: path of the source; ``None``: it has none.
        work: writes a part.

    Returns:
        What casts lost in all parts.

    Raises:
        RewriteError: the source or an option cannot travel.
        CkptkitError: a worker's error, or why one could not do its part; nothing is left behind.
    """
    from ckptkit.fleet import each

    if given is None or given == formats.STDIN:
        raise RewriteError("workers open the source by its path, and this source has none: omit --jobs")
    plain = options.but(progress=None, confirm=None, jobs=None, executor=None, storage_options=None)
    require_portable(plain)
    places(job.plan, job.path, force=options.force)
    folder, name = os.path.split(job.path)
    staging = temporary_folder(os.path.join(os.path.realpath(folder), name), job.path)
    parts = None
    try:
        parts = _parts(job, plain, staging.temporary)
        count = min(len(job.plan.shards), options.jobs or _MOST_PARTS)
        tasks = [
            PartTask(
                source=given,
                destination=job.asked,
                options=plain,
                share=Share(number, count),
                staging=staging.temporary,
                identity=parts.identity,
                folder=os.getcwd(),
            )
            for number in range(1, count + 1)
        ]
        done = 0
        failed = None
        for _, outcome in each(tasks, carried(work), jobs=options.jobs, executor=options.executor):
            if failed is not None or outcome.problem is not None:
                failed = (
                    failed or outcome
                )  # reported once no other part is being written: everything they wrote is removed
                continue
            record = outcome.result()
            done += sum(shard["nbytes"] for shard in record["shards"].values())
            if options.progress is not None:
                options.progress(done, job.plan.total_nbytes)
        if failed is not None:
            failed.result()
        _, missing = parts.missing(hashed=False)
        if missing:
            number, what = next(iter(missing.items()))
            raise CorruptError(f"part {number}, written by a worker, {what}; nothing was written", path=job.path)
        tally = _finished(job, options, parts)
        if options.progress is not None:
            options.progress(job.plan.total_nbytes, job.plan.total_nbytes)
        return tally
    finally:
        if parts is not None and parts.is_named():  # by an index that could not be replaced by the last one
            staging.is_ours = False
        staging.close()


def require_portable(options: ConvertOptions) -> None:
    """See that options can be sent to other processes.

    Raises:
        RewriteError: one cannot.
    """
    for name, option in options.declared.items():
        try:
            pickle.dumps(getattr(options, name))
        except Exception as error:
            value = "" if option.kind == "storage" else f" {getattr(options, name)!r:.80}"
            told = f"{option.typed}{value} cannot be sent to other processes ({error!s:.200})"
            raise RewriteError(f"{told}; give a function from a module, or omit jobs and executor") from None


# Options as text.

_UNSAID = frozenset({"confirm", "executor", "progress", "storage_options"})
"""Options that are not typed, and those that may be secrets."""

_OWN = frozenset({*_UNSAID, "part", "finish", "jobs", "files_from", "dry_run", "force", "in_place", "backup"})
"""Those that do not change what is written, too."""


def _as_text(options: ConvertOptions) -> dict[str, str]:
    """The options that change the output, as they are typed."""
    texts: dict[str, str] = {}
    for name, option in options.declared.items():
        words = [] if name in _OWN else list(_words(option, getattr(options, name)))
        if words:
            texts[option.typed] = command_line(words[1:], "posix") or "given"
    return texts


def words_of(options: ConvertOptions) -> list[str]:
    """All that was given, as it is typed."""
    named = (name for name in options.declared if name not in _UNSAID)
    return [word for name in named for word in _words(options.declared[name], getattr(options, name))]


def _words(option: Any, value: Any) -> Iterator[str]:
    if value == option.default or value is None:
        return
    if callable(value) and hasattr(value, "__qualname__"):
        yield from (option.typed, f"{getattr(value, '__module__', '')}.{value.__qualname__}")
    elif isinstance(value, Mapping):
        joined = "=>" if option.name == "rename" else "="
        yield from (word for key, each in value.items() for word in (option.typed, f"{key}{joined}{each}"))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        texts = (each if isinstance(each, str) else "=>".join(map(str, each)) for each in value)
        yield from (word for text in texts for word in (option.typed, text))
    elif hasattr(value, "label"):
        yield from (option.typed, value.label)
    else:
        yield from option.words(value)
