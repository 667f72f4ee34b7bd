"""Makes a manifest, or brings one up to date: from paths as people type them, to the file that is written.

What a manifest is, `ckptkit.released.manifest_file` says.  `make_at` finds the files at the paths, `make` records them
(each opened and read once), and `write` writes the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptkit import places
from ckptkit.architectures import Architecture
from ckptkit.errors import (
    CkptkitError,
    CorruptError,
    DestinationExistsError,
    FileAccessError,
    RewriteError,
    UnsupportedError,
)
from ckptkit.formats import STDIN, collector_paused, is_checkpoint, source_of
from ckptkit.nearness import did_you_mean
from ckptkit.plan import LiteralBytes, Plan
from ckptkit.released.bases import common_folder, require_one_place, url_of
from ckptkit.released.examine import Examined, examine_file
from ckptkit.released.manifest_file import (
    Changes,
    Digests,
    FileRecord,
    GoldenRecord,
    Manifest,
    ShardRecord,
    TensorRecord,
    read_manifest,
)
from ckptkit.released.manifest_rules import is_same_file
from ckptkit.released.reading import file_sha256
from ckptkit.released.selection import Selected, name_of, select, size_of, step_of
from ckptkit.report import count_of
from ckptkit.startup import dataclass
from ckptkit.transfer.many import Workers, side_by_side
from ckptkit.transfer.writing import write_atomically

if TYPE_CHECKING:
    from ckptkit.fleet import Outcome

__all__ = ["make", "make_at", "write"]


def make(
    selected: Sequence[Selected],
    *,
    folder: str,
    beside: str | None = None,
    folders: Sequence[str] = (),
    digests: Digests | None = None,
    golden: Mapping[str, str] | None = None,
    allow_part: bool = False,
    previous: Manifest | None = None,
    tp_rules: str | None = None,
    ignore_checksums: bool = False,
    workers: Workers = Workers(),  # noqa: B008 - frozen
) -> Manifest:
    """The manifest of these checkpoints.

    Args:
        selected: the checkpoints; named relative to the folder.
        folder: that paths are relative to: where the manifest will be, or the URL that its files are below.
        beside: where it will be then, for golden files.
        folders: in which no other checkpoint may be; named relative to it.  The previous manifest's stay.
        digests: whether each tensor is listed; ``None``: as the previous manifest has it, and if it has none, yes.
        golden: golden files by the name of the checkpoint they belong to; named relative to the folder.
        allow_part: whether a file may be a part of a checkpoint.
        previous: the manifest so far.  Files whose sizes and SHA-256 are still the same keep their record; those
            that are not selected do too, as long as they exist.
        tp_rules: file with the rules for joining slices of tensor-parallel ranks.
        ignore_checksums: whether files may be recorded that their own checksums show to be damaged.
        workers: who reads very many files.

    Raises:
        FileAccessError: a file is not below the folder, or cannot be read.
        CkptkitError: as `ckptkit.released.examine.examine_file`, for one file; a `FileAccessError` lists several.
    """
    golden = golden or {}
    goldens = set(golden.values())
    old = {} if previous is None else {record.path: record for record in previous.files}
    goldens |= {record.golden.path for record in old.values() if record.golden is not None}
    wanted = {each.name: each.path for each in selected if each.name not in goldens}
    _require_recordable(wanted, golden, folder)
    known = {name: path for name, path in wanted.items() if name in old}
    kept = _unchanged(known, old, digests, workers, allow_part=allow_part, tp_rules=tp_rules)
    renewed = _renewed(
        {name: path for name, path in wanted.items() if name not in kept},
        {
            name
            for name in wanted
            if (digests == "tensor" if digests else name not in old or old[name].tensors is not None)
        },
        workers,
        allow_part=allow_part,
        tp_rules=tp_rules,
        ignore_checksums=ignore_checksums,
    )
    records = {**_unselected(old, wanted, folder), **kept, **renewed}
    for name, record in records.items():
        before = old[name].golden if name in old else None
        named = golden.get(name, before.path if before is not None else None)
        records[name] = replace(record, golden=None if named is None else _golden(named, folder, beside))
    files = tuple(records[name] for name in sorted(records))
    claimed = _outermost({*folders, *previous.folders} if previous is not None else {*folders})
    return Manifest(files=files, folder=folder, folders=claimed, changes=_changes(old, records), origin=url_of(folder))


def _require_recordable(wanted: Collection[str], golden: Collection[str], folder: str) -> None:
    if not wanted:
        raise FileAccessError("no checkpoints to record: only golden files")
    for name in wanted:
        _require_below(name, folder)
    for name in golden:
        if name not in wanted:
            told = f"a golden file is given for it, but it is not among the checkpoints{did_you_mean(name, wanted)}"
            raise FileAccessError(f"{name}: {told}", path=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One file: its name in the manifest, its path, how it is read, and its record.

    Attributes:
        is_listed: whether its tensors are listed.
        before: its record so far, which is used if it is still valid; ``None``: it is recorded again.
    """

    name: str
    path: str
    reading: Mapping[str, bool | str | None]
    is_listed: bool = True
    before: FileRecord | None = None


@collector_paused()  # without it, read values are freed at the end
def _recorded(task: _Task, threads: int = 1) -> FileRecord | CkptkitError | None:
    """The current record of a file; its existing record if that is still valid."""
    if task.before is not None:
        same = _looked_at(
            task.path, hash_file=True, digest=False, values=False, checksums=False, threads=threads, **task.reading
        )
        return task.before if not isinstance(same, CkptkitError) and is_same_file(same, task.before) else None
    found = _looked_at(
        task.path, hash_file=True, digest=True, values=False, whole=True, threads=threads, **task.reading
    )
    if isinstance(found, CkptkitError):
        return found
    wrong = found.damage or found.unlike
    if wrong is not None:
        return CorruptError(wrong, path=found.path)
    try:
        return _record(task.name, found, task.is_listed)
    except UnsupportedError as error:
        return error


def _lost(task: _Task, outcome: Outcome[Any]) -> CkptkitError:
    return FileAccessError(f"{task.path}: {outcome.text}", path=task.path)


def _size(task: _Task) -> int:
    return size_of(task.path)


def _is_far(task: _Task) -> bool:
    return places.is_url(task.path)


def _made(tasks: list[_Task], workers: Workers) -> list[FileRecord | CkptkitError | None]:
    """The record of each file; workers of an executor, which may be in other folders, get whole paths."""
    if workers.executor is not None:
        tasks = [
            replace(task, path=places.absolute(task.path), reading=_absolute_rules(task.reading)) for task in tasks
        ]
    return list(side_by_side(tasks, _recorded, workers=workers, nbytes=_size, lost=_lost, is_far=_is_far))


def _absolute_rules(reading: Mapping[str, bool | str | None]) -> Mapping[str, bool | str | None]:
    rules = reading["tp_rules"]
    return {**reading, "tp_rules": places.absolute(rules)} if isinstance(rules, str) else reading


def _renewed(
    wanted: Mapping[str, str], listed: Collection[str], workers: Workers, **reading: bool | str | None
) -> dict[str, FileRecord]:
    """The current records of files.

    Args:
        wanted: paths by name.
        listed: the names of those whose tensors are listed.
        workers: who reads them.
        **reading: ``allow_part``, ``tp_rules`` and ``ignore_checksums``, as in `make`.
    """
    tasks = [_Task(name=name, path=path, reading=reading, is_listed=name in listed) for name, path in wanted.items()]
    made = _made(tasks, workers)
    _require_none([result for result in made if isinstance(result, CkptkitError)])
    return {result.path: result for result in made if isinstance(result, FileRecord)}


def _require_none(errors: Sequence[CkptkitError]) -> None:
    """Raise the only error, or one that lists all."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise FileAccessError("\n  ".join([f"{count_of(len(errors), 'file')} cannot be recorded:", *map(str, errors)]))


def _looked_at(path: str, **asked: Any) -> Examined | CkptkitError:
    try:
        return examine_file(path, **asked)
    except CkptkitError as error:
        return error


def _outermost(folders: Collection[str]) -> tuple[str, ...]:
    """Those that are in no other, sorted."""
    if "." in folders:
        return (".",)
    return tuple(name for name in sorted(folders) if not any(name.startswith(f"{other}/") for other in folders))


def _require_below(name: str, folder: str) -> None:
    if name == "." or name.startswith("../") or os.path.isabs(name) or ":" in name.split("/")[0]:
        raise FileAccessError(
            f"{name}: is not below the manifest's folder, {folder}; write the manifest in the folder of the files or "
            "above it",
            path=name,
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FileAccessError(f"{name!r}: the file's name is not Unicode text; rename the file") from None


def _unchanged(
    wanted: Mapping[str, str],
    old: Mapping[str, FileRecord],
    digests: Digests | None,
    workers: Workers,
    **reading: bool | str | None,
) -> dict[str, FileRecord]:
    """The records of files that are what they were, by their sizes and hashes."""
    tasks = [
        _Task(name=name, path=path, reading=reading, before=old[name])
        for name, path in wanted.items()
        if _may_be_unchanged(name, path, old[name]) and not (digests == "tensor" and old[name].tensors is None)
    ]
    made = _made(tasks, workers)
    kept = [record for record in made if isinstance(record, FileRecord)]
    return {each.path: replace(each, tensors=None) if digests == "total" else each for each in kept}


def _may_be_unchanged(name: str, path: str, record: FileRecord) -> bool:
    """Whether it is worth hashing: of another size it is another file."""
    try:
        return bool(record.shards) or places.size(path) == record.size
    except OSError:
        return True  # examining it will report the problem


def _unselected(old: Mapping[str, FileRecord], wanted: Mapping[str, str], folder: str) -> dict[str, FileRecord]:
    return {
        name: record
        for name, record in old.items()
        if name not in wanted and places.may_exist(places.below(folder, name))
    }


def _changes(old: Mapping[str, FileRecord], new: Mapping[str, FileRecord]) -> Changes:
    names = sorted({*old, *new})
    return Changes(
        added=tuple(name for name in names if name not in old),
        changed=tuple(name for name in names if name in old and name in new and old[name] != new[name]),
        removed=tuple(name for name in names if name not in new),
        kept=tuple(name for name in names if name in old and name in new and old[name] == new[name]),
    )


def _golden(name: str, folder: str, beside: str | None) -> GoldenRecord:
    folder = folder if beside is None else beside
    _require_below(name, folder)
    return GoldenRecord(path=name, sha256=file_sha256(os.path.join(folder, *name.split("/"))))


def _record(name: str, found: Examined, listed: bool) -> FileRecord:
    """What was found as what must be.

    Raises:
        UnsupportedError: a name cannot be written in JSON.
    """
    for text in (*(tensor.name for tensor in found.tensors), *found.others) if listed else found.others:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UnsupportedError(
                f"the name {text!r:.80} is not Unicode text and cannot be listed; record it with --digests total",
                path=found.path,
            ) from None
    return FileRecord(
        path=name,
        size=found.size,
        sha256=found.sha256,
        format=found.format,
        kind=found.kind,
        trust=found.trust,
        content_digest=found.content_digest,
        whole_digest=found.whole_digest,
        tensors={
            tensor.name: TensorRecord(dtype=tensor.dtype, shape=tensor.shape, digest=tensor.digest or "")
            for tensor in found.tensors
        }
        if listed
        else None,
        architecture=None if found.architecture is None else _told(found.architecture),
        shards={
            shard.name: ShardRecord(size=shard.size, sha256=shard.sha256 or "")
            for shard in sorted(found.shards, key=lambda shard: shard.name)
        },
        others=found.others,
    )


def _told(architecture: Architecture) -> str:
    args = ", ".join(f"{name}={value!r}" for name, value in architecture.args.items())
    prefix = f" under {architecture.prefix!r}" if architecture.prefix else ""
    return architecture.reference + (f"({args})" if args else "") + prefix


def write(manifest: Manifest, destination: str | os.PathLike[str], *, force: bool) -> None:
    """Write a manifest; the file is the old one or the complete new one, whatever happens.

    Raises:
        DestinationExistsError: it exists and ``force`` is false.
        FileAccessError: it cannot be written.
    """
    data = manifest.to_json().encode("ascii")
    plan = Plan(format="manifest", nbytes=len(data), steps=(LiteralBytes(0, data),), tensors=0, aliases={})
    write_atomically(destination, plan, force=force, check=None)


Golden = Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str] | None


def make_at(
    paths: Sequence[str],
    destination: str | None,
    digests: Digests | None,
    golden: Golden,
    *,
    tag: str | None = None,
    tp_rules: str | None = None,
    allow_part: bool,
    update: bool,
    force: bool,
    ignore_checksums: bool = False,
    workers: Workers = Workers(),  # noqa: B008 - frozen
) -> Manifest:
    """As `ckptkit.manifest`."""
    if digests not in (None, "total", "tensor"):
        raise RewriteError(f"digests is {digests!r:.40}; expected 'total' or 'tensor'")
    if update and destination is None:
        raise FileAccessError("there is no manifest to update; name it with -o")
    if destination is not None:
        places.require_local(destination)
    _require_none([*filter(None, map(_problem, paths))])
    there = destination is not None and os.path.lexists(destination)
    if destination is not None and there and not update:
        _require_replaceable(destination, force=force)
    previous = read_manifest(destination) if destination is not None and there and update else None
    folder, beside = _folders_for(paths, destination, previous)
    with places.asked_once(folder):
        tag = tag if paths else None  # each of its folders is a separate step
        paths = paths or (_paths_of(previous, folder) if update else ())
        if tp_rules is None:
            paths = [step_of(path, tag) if places.isdir(path) else path for path in paths]
        selection = select(paths, relative_to=folder, manifest=destination, are_whole=tp_rules is not None)
        selection.require_all()
        selected = selection.checkpoints
        manifest = make(
            selected,
            folder=folder,
            beside=beside,
            folders=[_claimed(name_of(path, folder)) for path in paths if places.isdir(path)],
            digests=digests,
            golden=_goldens(golden, selected, folder, beside),
            allow_part=allow_part,
            previous=previous,
            tp_rules=tp_rules,
            ignore_checksums=ignore_checksums,
            workers=workers,
        )
        if destination is not None and (
            previous is None or (previous.files, previous.folders) != (manifest.files, manifest.folders)
        ):
            write(manifest, destination, force=there)
        return replace(manifest, passed_over=selection.passed_over)


def _require_replaceable(path: str, *, force: bool) -> None:
    """Check that a file may be replaced with a manifest.

    Raises:
        DestinationExistsError: it may not: that was not requested, or it is a checkpoint.
    """
    if not force:
        told = "already exists; --update updates what has changed in it, --force writes it from scratch"
    elif is_checkpoint(path):
        told = "is a checkpoint; --force replaces only a manifest; give another name"
    else:
        return
    raise DestinationExistsError(f"{path}: {told}", path=path)


def _problem(path: str) -> CkptkitError | None:
    """The error for what is not a file, and no folder, on the disk."""
    if path == STDIN:
        told = f"{path}: a manifest records files by their paths, and standard input has none"
        return FileAccessError(told, path=path)
    if places.exists(path):
        return None
    try:
        source_of(path).close()  # it says so where the file is missing
    except CkptkitError as error:
        return error
    return FileAccessError(f"{path}: a manifest records files; record the archive, or unpack it", path=path)


def _paths_of(previous: Manifest | None, folder: str) -> list[str]:
    """The folders that a manifest was made from, as far as known; for a new one, its own folder."""
    if previous is None:
        return [folder]
    names = [*previous.folders, *(record.path for record in previous.files)]
    paths = [places.below(folder, name) for name in names]
    return [path for path in paths if places.may_exist(path)]


def _claimed(name: str) -> str:
    """A folder as the manifest names it: one above its own is no more than its own."""
    return "." if name.split("/")[0] == ".." else name


def _folders_for(paths: Sequence[str], destination: str | None, previous: Manifest | None) -> tuple[str, str]:
    """The folder that paths are relative to, and the one that the manifest is in: of local files the same."""
    beside = None if destination is None else os.path.dirname(os.path.abspath(destination))
    is_far = require_one_place(paths)
    if previous is not None and previous.origin is not None and (is_far or not paths):
        folder = previous.origin
    else:
        folder = common_folder(paths) if is_far or beside is None else beside
    return folder, beside or (os.getcwd() if places.is_url(folder) else folder)


def _goldens(golden: Golden, selected: Sequence[Selected], folder: str, beside: str) -> dict[str, str]:
    """Golden files, relative to the manifest's folder, by the names of their checkpoints."""
    if golden is None:
        return {}
    if isinstance(golden, Mapping):
        return {name_of(os.fsdecode(path), folder): name_of(os.fsdecode(file), beside) for path, file in golden.items()}
    name = name_of(os.fsdecode(golden), beside)
    checkpoints = [each.name for each in selected if each.name != name]
    if len(checkpoints) != 1:
        raise FileAccessError(
            f"{os.fsdecode(golden)}: belongs to one of {count_of(len(checkpoints), 'checkpoint')}; say which one: "
            "FILE=GOLDEN",
            path=os.fsdecode(golden),
        )
    return {checkpoints[0]: name}
