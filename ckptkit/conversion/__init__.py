"""One conversion, from its options to the output: `run`.  A `Job` is one output: planned, then carried out.

Receipts record how an output was made: the source's SHA-256, the operations, the ckptkit version.

A receipt is in the string metadata (`ckptkit.normalize.selection`) as JSON: a list that begins with the source's
receipts, so the last element is about this file::

    [{"ckptkit": "0.1.0", "format": "torch-zip", "sha256": "9f86d0…", "operations": ["StripModule()"]}]

``sha256`` is that of the source's bytes; for a sharded source it is an object with the SHA-256 of the index and of each
shard, by name.  Nothing in a receipt depends on time, place or machine.

The digests are computed while the bytes are moved, after the metadata is laid out.  Until then, unguessable tokens of
the same length take their place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ckptkit import formats
from ckptkit.bytesource import Source
from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.conversion.options import Conversion, needs_weights, read_section, section_like, with_flat_cut
from ckptkit.conversion.outputs import other_names, require_confirmed, require_fitting
from ckptkit.errors import DestinationExistsError, RewriteError
from ckptkit.extras import __version__
from ckptkit.normalize.made_plain import devices_made_plain
from ckptkit.normalize.parts import require_whole
from ckptkit.normalize.selection import BESIDE, KEY, earlier, require_state_dict
from ckptkit.places import is_temporary_name
from ckptkit.plan import Checksum, Digest, LiteralBytes, Plan, Step
from ckptkit.report import Finding, Report, count_of, parse_size
from ckptkit.rewrite.beside import KeepBeside, restored
from ckptkit.startup import dataclass
from ckptkit.transfer.passing import is_far, passed_of
from ckptkit.transfer.steps import Tally
from ckptkit.transfer.writing import folder_made, write_atomically

if TYPE_CHECKING:
    from ckptkit.conversion.parts import PartTask, WrittenPart
    from ckptkit.documents import ConvertDetails, ConvertDocument
    from ckptkit.options import ConvertOptions
    from ckptkit.transfer.part_records import PartRecord

__all__ = [
    "Job",
    "Outcome",
    "Tokens",
    "convert_file",
    "replace_file",
    "run",
    "with_digests",
    "with_receipt",
    "write_part",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checkpoint and the plan that writes it.

    Attributes:
        checkpoint: to write, including its metadata.
        source: the open file its bytes are in.
        asked: the destination that was asked for.
        path: the file, or the folder, that is written: of shards, their index.
        plan: how.
    """

    checkpoint: Checkpoint
    source: Source
    asked: str
    path: str
    plan: Plan

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        file: Source,
        destination: str | os.PathLike[str],
        options: ConvertOptions,
    ) -> Job:
        """Plan an output.

        Args:
            checkpoint: to write.
            file: the source its bytes are in.
            destination: the output.
            options: the container, the size of shards, and whether the metadata records how it was made: with the
                SHA-256 of the source if the output is written and checked, and if nearly all of a remote source is read
                for it.

        Raises:
            RewriteError: the container cannot store the checkpoint.
        """
        given = options.max_shard_size
        size: Any = parse_size(given) if isinstance(given, str) else given
        if size is not None and (not isinstance(size, int) or size < 1):
            raise RewriteError(f"{size!r} is not a valid file size; give one such as 5GB")
        tokens = Tokens()
        if options.receipt:
            hashed = options.check and not options.dry_run
            if hashed and is_far(file):  # what the plan does not move would be fetched for its hash alone
                from ckptkit.transfer.far import is_nearly_whole

                _, plan = formats.plan(checkpoint, destination, to=options.to, shard_nbytes=size, ranks=options.ranks)
                hashed = is_nearly_whole(plan, formats.hashed_parts(file).values() or [file])
            checkpoint = with_receipt(checkpoint, file, __version__, tokens if hashed else None)
        path, plan = formats.plan(checkpoint, destination, to=options.to, shard_nbytes=size, ranks=options.ranks)
        plan = with_digests(plan, tokens) if tokens.files else plan
        return cls(checkpoint=checkpoint, source=file, asked=os.fsdecode(destination), path=path, plan=plan)

    def carry_out(self, options: ConvertOptions) -> Tally:
        """Write it in this process; see `ckptkit.transfer.writing.write_atomically`."""
        compare = None
        passed = None
        if options.check:
            from ckptkit.compare import check_output  # moving bytes alone starts faster without

            passed = passed_of(self.checkpoint, self.source)

            def compare(path: str, compared: Callable[[int], object]) -> object:
                return check_output(self.checkpoint, path, compared, passed)

        self.require_place(options)
        return write_atomically(
            self.path,
            self.plan,
            force=options.force,
            check=compare,
            replaces=self.stale,
            source=self.source,
            passed=passed,
            progress=options.progress,
        )

    def require_place(self, options: ConvertOptions) -> None:
        """Check that the output may be written there.

        Raises:
            DestinationExistsError: something is there that it may not replace.
        """
        if not options.force and self.plan.in_folder is None and os.path.lexists(self.asked):
            raise DestinationExistsError(f"{self.asked}: already exists; --force overwrites it", path=self.asked)
        if formats.is_part(self.source, self.path):
            told = "is one of the files being read, and all of them are needed; name another"
            raise DestinationExistsError(f"{self.path}: {told}", path=self.path)
        require_confirmed(self._names, options)

    @property
    def _names(self) -> list[str]:
        """The paths of files that it may replace: none in a folder of its own, which is new or empty."""
        if self.plan.in_folder is not None:
            return []
        folder = os.path.dirname(self.path)
        return [self.asked, self.path, *(os.path.join(folder, shard) for shard in self.plan.shards)]

    def findings(self, backup: str | None) -> Iterator[Finding]:
        """How the output differs from the request, and what it leaves as it was; before anything is written.

        Args:
            backup: the name under which the file that is replaced is kept, if any.
        """
        if self.plan.index is None and self.asked != self.path:
            yield Finding(
                code="not-sharded",
                severity="info",
                message=f"everything fits into one file: {self.path}, so no index is written",
            )
        for path in dict.fromkeys(self._names):
            if others := other_names(path, backup):
                told = count_of(others, "other hard link", "keeps", "keep")
                message = f"{path}: {told} the old content"
                yield Finding(code="other-hard-links", severity="warning", message=message)

    @property
    def stale(self) -> tuple[str, ...]:
        """Remains of an earlier output beside this one: the shards of its index, or the one file."""
        if self.plan.index is None:
            return ()
        from ckptkit.formats.sharded import shard_names

        name = os.path.basename(self.path).removesuffix(".index.json")
        stem, ending = os.path.splitext(name)
        customary = re.compile(rf"{re.escape(stem)}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(ending.lower())}\Z")
        old = shard_names(self.path) if os.path.isfile(self.path) else frozenset()
        # Until an earlier run that was killed is made up for, its index may still name shards as they were called then.
        shards = {shard for shard in old if customary.match(shard) or is_temporary_name(shard)}
        shards -= self.plan.shards.keys()
        return (*sorted(shards), *([name] if os.path.basename(self.asked) == name else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a conversion.

    Attributes:
        section: the weights that were converted; ``None``: no section is selected.
        options: as requested.
        job: the plan, carried out unless that was not requested.
        conversion: the changes; ``None``: none were requested.
        findings: to report.
        part: which part of the output was written, if not all.
    """

    section: str | None
    options: ConvertOptions
    job: Job
    conversion: Conversion | None
    findings: tuple[Finding, ...]
    part: WrittenPart | None = None

    def report(self) -> Report[ConvertDocument]:
        """What `ckptkit.convert` gives."""
        plan, written = self.job.plan, not self.options.dry_run
        changes = cast("ConvertDetails", {} if self.conversion is None else self.conversion.details(plan))
        details: ConvertDetails = {
            "source": self.job.source.path,
            "source_nbytes": self.job.source.total_size,
            "destination": self.job.path,
            "written": written,
            "checked": written and self.options.check,
            "section": self.section,
            "plan": plan.to_dict(),
            **changes,
        }
        if self.part is not None:
            details["part"] = self.part.to_dict()
        return Report(findings=self.findings, details=details)


@formats.collector_paused()
def run(
    checkpoint: Checkpoint,
    file: Source,
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    rewrite: bool = True,
    given: str | None = None,
    task: PartTask | None = None,
    backup: str | None = None,
) -> Outcome:
    """Convert an open checkpoint, from its options to the output.

    Args:
        checkpoint: the content of the file.
        file: with its bytes.
        destination: the output.
        options: as requested; ``like`` is already a `ckptkit.Like`.
        rewrite: whether to change the checkpoint as the options say; otherwise it is written unchanged.
        given: the path by which others can open the source too.
        task: the worker's instructions, if it writes a part.
        backup: the name under which the file that is replaced is kept, if any.

    Raises:
        As `ckptkit.convert`.
    """
    if options.like is None:
        require_whole(checkpoint, allow_part=options.allow_part)
    is_held = _is_held(options, task)
    is_folder = formats.format_named(checkpoint.origin.format).is_folder
    if is_folder:  # of which planning reads pickles
        formats.require_sound(file, checkpoint, held=is_held)
    source = _section_meant(checkpoint, file, options)
    if rewrite:
        source = with_flat_cut(source, options)
    require_whole(source, allow_part=options.allow_part)
    _, container, most = formats.target(destination, options.to)
    require_fitting(options, container)
    weights_alone = container.tensors_alone or most is not None or options.max_shard_size is not None
    if rewrite and not options.all_tensors:
        _require_weights(source, options, weights_alone)
    read = source
    if BESIDE in source.metadata and (rewrite or not weights_alone):
        source = restored(source)
        if weights_alone and KeepBeside()(source).rest is not STATE_DICT:  # it could not be kept again
            source = read
    is_restored = source is not read
    if options.dtype is not None or container.tensors_alone or container.is_folder:
        source = devices_made_plain(source)
    conversion = None
    if rewrite:
        conversion = Conversion(
            source,
            options,
            tensors_alone=container.tensors_alone,
            weights_alone=weights_alone,
            restored=is_restored,
        )
    job = Job.of(source if conversion is None else conversion.result, file, destination, options)
    _require_shards(options, job.plan)
    findings: list[Finding] = []
    part = None
    if conversion is not None:
        findings += job.findings(backup)
        findings += conversion.findings(job.plan, None if options.dry_run else job.path)
    if not options.dry_run:
        if not is_folder:
            formats.require_sound(file, checkpoint, held=is_held)
        tally, part = _carried_out(job, options, given, task)
        findings += () if conversion is None else conversion.losses(tally)
    return Outcome(
        section=source.origin.state_path,
        options=options,
        job=job,
        conversion=conversion,
        findings=tuple(findings),
        part=part,
    )


def _is_held(options: ConvertOptions, task: PartTask | None) -> bool:
    """Whether what the source recorded of its bytes is checked against them: of several parts the first does it."""
    share = options.part if task is None else task.share
    is_wanted = options.check and not (options.ignore_checksums or options.dry_run or options.finish)
    return is_wanted and (share is None or share.index == 1)


def _require_shards(options: ConvertOptions, plan: Plan) -> None:
    if options.part is not None or options.finish or options.files_from is not None:
        from ckptkit.conversion.parts import require_shards

        require_shards(options, plan)


def _carried_out(
    job: Job, options: ConvertOptions, given: str | None, task: PartTask | None
) -> tuple[Tally, WrittenPart | None]:
    """Write the output, or a part of it, or make one of the parts; what casts lost in it, and the part."""
    is_alone = task is None and options.part is None and not options.finish
    if is_alone and (job.plan.index is None or (options.executor is None and (options.jobs or 1) == 1)):
        return job.carry_out(options), None
    from ckptkit.conversion import parts

    job.require_place(options)
    if options.finish:
        return parts.finish(job, options, given), None
    share = options.part if task is None else task.share
    if share is None:
        return parts.over_workers(job, options, given, write_part), None
    part = parts.write_part(job, options, share, task)
    return part.tally, part


def write_part(task: PartTask) -> PartRecord:
    """Write one part of an output, as a worker: the source is opened again, by its path.

    Raises:
        As `ckptkit.convert`.
    """
    options = task.options
    checkpoint, file = _opened(task.path(task.source), options)
    try:
        part = run(checkpoint, file, task.path(task.destination), options, task=task).part
    finally:
        file.close()
    assert part is not None  # noqa: S101 - a share was asked for
    return part.record


def _section_meant(checkpoint: Checkpoint, file: Source, options: ConvertOptions) -> Checkpoint:
    """The checkpoint with the section selected that matches the requested model, if none is named."""
    selected = checkpoint.origin.state_path
    path = section_like(checkpoint, file, options) if options.section is None else selected
    return checkpoint if path == selected else read_section(file, path, ignore_checksums=options.ignore_checksums)


def _require_weights(checkpoint: Checkpoint, options: ConvertOptions, weights_alone: bool) -> None:
    """Check that there are weights, if only they can be written or changed."""
    is_needed = needs_weights(options)
    if is_needed or weights_alone:
        require_state_dict(checkpoint, "to rewrite" if is_needed else "to write")


_DIGITS = 64
"""Characters of a SHA-256 in hexadecimal."""


class Tokens:
    """Placeholders for digests that are not known yet."""

    def __init__(self) -> None:
        self.prefix = os.urandom(_DIGITS // 4).hex()
        self.files: dict[str, Source] = {}

    def of(self, file: Source) -> str:
        """The placeholder for the digest of a file."""
        token = f"{self.prefix}{len(self.files):0{_DIGITS // 2}x}"
        self.files[token] = file
        return token


def with_receipt(checkpoint: Checkpoint, file: Source, version: str, tokens: Tokens | None) -> Checkpoint:
    """The checkpoint with a receipt in its metadata.

    Args:
        checkpoint: as rewritten.
        file: the source.
        version: of ckptkit.
        tokens: returns placeholders for the source's digests; ``None``: the receipt has none.
    """
    receipt: dict[str, object] = {"ckptkit": version, "format": checkpoint.origin.format}
    if tokens is not None:
        named = formats.hashed_parts(file)
        receipt["sha256"] = (
            {name: tokens.of(part) for name, part in sorted(named.items())} if named else tokens.of(file)
        )
    receipt["operations"] = list(checkpoint.operations)
    text = json.dumps([*earlier(checkpoint.metadata), receipt])  # ASCII: half a surrogate pair may be in them
    return checkpoint.replace(metadata={**checkpoint.metadata, KEY: text})


def with_digests(plan: Plan, tokens: Tokens) -> Plan:
    """The plan with a step for every placeholder in its output."""
    prefix = tokens.prefix.encode()
    found: list[Step] = []
    for step in plan.steps:
        at = step.data.find(prefix) if isinstance(step, LiteralBytes) else -1
        while isinstance(step, LiteralBytes) and at >= 0:
            file = tokens.files[step.data[at : at + _DIGITS].decode()]
            found.append(Digest(step.target + at, file))
            at = step.data.find(prefix, at + _DIGITS)
    others = [step for step in plan.steps if not isinstance(step, Checksum)]
    checksums = [step for step in plan.steps if isinstance(step, Checksum)]
    return replace(
        plan,
        steps=(*others, *found, *checksums),
        shards={name: with_digests(shard, tokens) for name, shard in plan.shards.items()},
    )


def convert_file(source: str, destination: str, options: ConvertOptions) -> Report[ConvertDocument]:
    """Convert a file by its path into one whose folder is created if needed.

    Raises:
        As `ckptkit.convert`.
    """
    checkpoint, file = _opened(source, options)
    try:
        with folder_made("" if options.dry_run else os.path.dirname(destination), flush=options.check):
            return run(checkpoint, file, destination, options).report()
    finally:
        file.close()


def replace_file(source: str, _: str, options: ConvertOptions) -> Report[ConvertDocument]:
    """Convert a file by its path into itself; its second argument is the same path, as in `convert_file`.

    Raises:
        As `ckptkit.convert`.
    """
    from ckptkit.conversion.in_place import replacing

    with replacing(source, options) as (checkpoint, file, own, backup):
        report = run(checkpoint, file, source, own, given=source, backup=backup).report()
    return Report(findings=report.findings, details={**report.details, "backup": backup})


def _opened(source: str, options: ConvertOptions) -> tuple[Checkpoint, Source]:
    return formats.read(
        source,
        section=options.section,
        tag=options.tag,
        tp_rules=options.tp_rules,
        ignore_checksums=options.ignore_checksums,
    )
