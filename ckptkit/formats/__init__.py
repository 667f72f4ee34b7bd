"""Containers: one module each, a table in `ckptkit.formats.containers`, and functions that choose among them."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptkit import places
from ckptkit.bytesource import Readable, Source, SourceFile
from ckptkit.checkpoint import GRAVITY, Checkpoint, GlobalUse, Part, Storage, TensorEntry
from ckptkit.errors import (
    CkptkitError,
    FileAccessError,
    FormatError,
    MissingFileError,
    RewriteError,
    SectionError,
    UnknownFormatError,
)
from ckptkit.formats.containers import FORMATS, SUFFIXES, format_named, holds_files, identify
from ckptkit.formats.format import Around, Format, Probe, is_folder
from ckptkit.formats.shards import may_tell_a_part
from ckptkit.formats.soundness import as_hostile, hashed_parts, is_part, judged, require_sound
from ckptkit.formats.unpacked import unpacked_source
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.nearness import did_you_mean, with_meant_file
from ckptkit.normalize import RawCheckpoint, normalize
from ckptkit.normalize.parts import flat_part, part_in
from ckptkit.pickling.inert import TreeMap
from ckptkit.pickling.trust import merge_uses

if TYPE_CHECKING:
    from ckptkit.plan import Plan

__all__ = [
    "FORMATS",
    "STDIN",
    "SUFFIXES",
    "collector_paused",
    "detect",
    "format_for",
    "format_named",
    "given_of",
    "hashed_parts",
    "is_checkpoint",
    "is_part",
    "judged",
    "makes_folder",
    "plan",
    "read",
    "require_sound",
    "reread",
    "source_of",
    "target",
]

_INDEX = ".index.json"

STDIN = "-"
"""The path that means standard input; a file of that name is ``./-``."""

SHARD_NBYTES = 5 * 10**9
"""Bytes of a shard if an index is requested without a size; huggingface_hub's value."""


_MOST_LEFT = 1000
"""Checks that were left for later, and that are made when a remote file is refused."""


def detect(probe: Probe) -> Format:
    """The container of a file, by its content alone.

    Raises:
        UnknownFormatError: none; the message says what the file is instead and what helps.
        AmbiguousError: more than one claims it.
    """
    return identify(probe, FORMATS)


def read(
    source: Readable,
    *,
    section: str | None = None,
    tag: str | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
    ignore_checksums: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Checkpoint, Source]:
    """Open a file and read what is in it, not its tensors.

    Args:
        source: to read from; see `source_of`.  A source is closed if it cannot be read.
        section: path of the weights to select, where the file contains several.
        tag: which of several steps is meant, where a folder contains such.
        tp_rules: the file with the rules for joining slices of ranks in a folder
            (`ckptkit.formats.distributed.tensor_parallel`).
        ignore_checksums: whether to discard the recorded checksums of the storages, so none is checked.
        limits: bounds on what the file may ask for.

    Returns:
        The checkpoint, and the source its bytes are in; close it when done with both.

    Raises:
        FileAccessError: the file cannot be opened.
        FormatError: its content is not what it claims to be; the path is in the message.
        SectionError: the section is not there.
        MissingDependencyError: it is compressed, and what decompresses it is not installed.
    """
    with places.asked_once(source):
        file = source_of(source, tag, tp_rules)
        try:
            probe = _entered(file, limits)
        except BaseException:
            file.close()
            raise
        try:
            return _checkpoint(probe, section, ignore_checksums=ignore_checksums), probe.file
        except FormatError:
            with contextlib.closing(probe.file):
                if probe.file.left <= _MOST_LEFT:  # which may tell more
                    probe.file.settle()
            raise
        except BaseException:
            probe.file.close()
            raise


def is_checkpoint(path: str) -> bool:
    """Whether a checkpoint is at a path, or one of the files of one; a damaged file counts."""
    from ckptkit.formats.distributed.layouts import is_metadata

    try:
        read(path)[1].close()
    except UnknownFormatError:
        head = b"" if os.path.isdir(path) else places.head(path, 1024)
        return head.startswith(b"\x80") and is_metadata(head)
    except CkptkitError:
        return not os.path.isdir(path)
    return True


def reread(file: Source, *, section: str | None = None, ignore_checksums: bool = False) -> Checkpoint:
    """The checkpoint in a source that `read` gave, with another section selected; the source stays open.

    Raises:
        As `read`.
    """
    return _checkpoint(Probe(file, DEFAULT_LIMITS), section, ignore_checksums=ignore_checksums)


def _entered(file: Source, limits: Limits) -> Probe:
    """The content of a compressed file or an archive; any other file itself."""
    probe: Probe | None = None
    try:
        with collector_paused():
            probe = Probe(file, limits)
            if not holds_files(probe):
                return probe
            from ckptkit.formats.inside import entered

            return entered(probe)
    except FormatError as error:
        seen = _names_left(probe, error)
        cause = error.__cause__
        if file.path.endswith(".distcp"):
            seen, cause, error = _part_instead(file, seen, error)
        raise error.at(path=file.path, seen=seen) from cause


def _checkpoint(probe: Probe, section: str | None, *, ignore_checksums: bool) -> Checkpoint:
    """The content of a file, normalized."""
    file = probe.file
    raw: RawCheckpoint | None = None
    around: Around | None = getattr(file, "around", None)
    try:
        with collector_paused():
            own = raw = _read(probe)
            if ignore_checksums:
                own = raw = _without_checksums(raw)
            if around is not None:
                raw = replace(
                    raw,
                    findings=(*around.findings, *raw.findings),
                    globals=merge_uses(raw.globals, around.uses),
                    has_pickle=raw.has_pickle or around.has_pickle,
                )
            checkpoint = _placed(normalize(raw, file, section=section), own, file)
            tag: str | None = getattr(file, "asked", None)
            rules: str | None = getattr(file, "rules", None)
            options = [*(("--section", section) if section else ()), *(("--tag", tag) if tag else ())]
            options += ["--tp-rules", rules] if rules else []
            options += ["--ignore-checksums"] * ignore_checksums
            return checkpoint.replace(origin=replace(checkpoint.origin, options=tuple(options)))
    except SectionError as error:
        error.path = file.path if error.path is None else error.path
        raise
    except FormatError as error:
        seen = raw.globals if raw is not None else _names_left(probe, error)
        cause = error.__cause__
        if raw is None and file.path.endswith(".distcp"):
            seen, cause, error = _part_instead(file, seen, error)
        error = (error if around is None else around.at(error)).at(path=file.path, seen=seen)
        raise (as_hostile(error) if is_folder(file) else error) from cause


def _read(probe: Probe) -> RawCheckpoint:
    """The result of the container's reader, with findings on the way to a folder."""
    container, file = detect(probe), probe.file
    if not is_folder(file):
        return container.read(probe)
    from ckptkit.formats.distributed.joined import read_folder

    return read_folder(probe, container)


def _part_instead(
    file: Source, seen: tuple[GlobalUse, ...], error: FormatError
) -> tuple[tuple[GlobalUse, ...], FormatError, FormatError]:
    """The error for archives end to end, one per tensor, compressed ones too: names, cause and error."""
    from ckptkit.formats.shard_parts import part_error

    return (*seen, *error.globals), error, part_error(file)


def _names_left(probe: Probe | None, error: FormatError) -> tuple[GlobalUse, ...]:
    """The names in a refused file beyond those that its reader found."""
    if probe is None:
        return ()
    from ckptkit.formats.contents import names_left

    if is_folder(probe.file):  # in the files that the error is about
        told = str(error)
        parts = [part for name, part in probe.file.parts.items() if name in told]
        return merge_uses(*(names_left(Probe(part, probe.limits), error.globals) for part in parts))
    known = {use.name: GRAVITY[use.verdict] for use in error.globals}
    return tuple(use for use in names_left(probe, error.globals) if GRAVITY[use.verdict] > known.get(use.name, -1))


def given_of(file: Source) -> Source:
    """The given file: for content of a compressed file or an archive, the outer one."""
    around: Around | None = getattr(file, "around", None)
    return file if around is None else around.given


def source_of(path: Readable, tag: str | None = None, tp_rules: str | os.PathLike[str] | None = None) -> Source:
    """The source of the bytes of a file: only here is it decided which values can be given as one.

    Args:
        path: a path, of a file or (``FILE/MEMBER``, ``FILE!MEMBER``) of a member of an archive, where no file has that
            path; ``"-"``: standard input.  An open binary file: from its current position, which does not change unless
            it cannot seek, to its end.  Bytes, a bytearray, a memoryview: not copied, and not to be resized before the
            source is closed.  A source: itself.  A folder that several processes wrote, or that leads to one, or with
            one checkpoint in it (`ckptkit.formats.distributed.around`).
        tag: which of several steps in the folder is meant.
        tp_rules: as in `read`.

    Raises:
        FileAccessError: it cannot be opened; of a folder the message says what to give instead.
        FormatError: an archive that contains it is damaged, or a folder is.
    """
    given = os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else None
    if tag is not None and (given is None or places.isfile(given) or given == STDIN):
        what = "the source" if given is None else given
        raise FileAccessError(f"{what}: --tag {tag} chooses one of several steps in a folder, and this is a file")
    if tp_rules is not None and not (given is not None and places.isdir(given)):
        raise FileAccessError(
            f"{path!s:.200}: --tp-rules joins the files of several ranks in a folder, and this is a file"
        )
    if isinstance(path, Source):
        return path
    if not isinstance(path, (str, os.PathLike)):
        from ckptkit.formats.sources import opened

        return opened(path)
    name = os.fsdecode(path)
    if name == STDIN:
        from ckptkit.formats.sources import standard_input

        return standard_input()
    if (unpacked := unpacked_source(name)) is not None:
        return unpacked
    if places.isdir(name):
        from ckptkit.formats.distributed import folder_source
        from ckptkit.formats.distributed.around import describe_folder

        if (together := folder_source(name, tag, tp_rules)) is not None:
            return together
        raise FileAccessError(f"{name}: {describe_folder(name)}", path=name)
    if places.is_url(name):
        from ckptkit.formats.distributed import unlisted_source

        try:
            return unlisted_source(name) or places.opened(name)
        except MissingFileError:
            from ckptkit.formats.inside import member_at

            inner = member_at(name, DEFAULT_LIMITS)
            if inner is None:
                raise
            return inner
    try:
        return SourceFile(path)
    except FileAccessError as error:
        if os.path.lexists(path):
            raise
        from ckptkit.formats.inside import member_of

        member = member_of(name, DEFAULT_LIMITS)
        if member is None:
            raise with_meant_file(error) from error.__cause__
        return member


def _without_checksums(raw: RawCheckpoint) -> RawCheckpoint:
    known: dict[int, Storage] = {}

    def leaf(node: object) -> object:
        storage = node.storage if isinstance(node, TensorEntry) else node
        if not isinstance(storage, Storage):
            return node
        plain = known.setdefault(id(storage), storage.without_checksum())
        return replace(node, storage=plain) if isinstance(node, TensorEntry) else plain

    bare = TreeMap(leaf)
    replicas = [each._replace(value=bare(each.value), copy=bare(each.copy)) for each in raw.replicas]  # type: ignore[arg-type]
    return replace(raw, root=bare(raw.root), replicas=tuple(replicas))


def _placed(checkpoint: Checkpoint, raw: RawCheckpoint, file: Source) -> Checkpoint:
    """The checkpoint with the size of all its shards, or with what it is itself a part of."""
    names = [use.name for use in raw.globals]
    if format_named(raw.format).is_folder:
        from ckptkit.formats.distributed.joined import spread_of

        origin = replace(checkpoint.origin, size=file.total_size, spread=spread_of(file, raw))
        return checkpoint.replace(origin=origin, part=flat_part(raw.root, checkpoint.state_dict))
    if format_named(raw.format).shards is not None:  # an index makes its shards whole, not what they hold
        said = part_in(raw.root, checkpoint.state_dict, {}, names)
        origin = replace(checkpoint.origin, size=file.total_size)
        return checkpoint.replace(origin=origin, part=said if isinstance(said, Part) else None)
    said = part_in(raw.root, checkpoint.state_dict, raw.metadata, names)
    if not isinstance(said, Part) and not may_tell_a_part(file):
        return checkpoint
    from ckptkit.formats.shard_parts import part_of

    return checkpoint.replace(part=part_of(file, said))


class _Pauses:
    """What several threads do at once: the last that ends lets the collector be as it was before the first."""

    lock = threading.Lock()
    count = 0
    was_enabled = True


_pauses = _Pauses()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Reading makes objects by the million and no cyclic garbage; looking for it takes two fifths of the time."""
    with _pauses.lock:
        _pauses.was_enabled = gc.isenabled() if not _pauses.count else _pauses.was_enabled
        _pauses.count += 1
        gc.disable()
    try:
        yield
    finally:
        with _pauses.lock:
            _pauses.count -= 1
            if not _pauses.count and _pauses.was_enabled:
                gc.enable()


_SHARDED = [index.name for index in FORMATS if index.shards is not None]

_CALLED = {
    "st": "safetensors", "sft": "safetensors", "safe-tensor": "safetensors", "safe-tensors": "safetensors",
    "torch": "torch-zip", "pytorch": "torch-zip", "zip": "torch-zip", "pickle": "torch-zip",
    "distcp": "dcp", "torch-dcp": "dcp",
}  # fmt: skip
"""What people call containers that are written."""


def format_for(destination: str | os.PathLike[str], name: str | None = None) -> Format:
    """The container to write.

    Args:
        destination: the output file; its ending decides.
        name: overrides the ending: a container's name, or its ending without the dot.

    Raises:
        RewriteError: no container is meant by it; the message lists what can be written.
    """
    writable = [container for container in FORMATS if container.writer is not None]
    ending = os.path.splitext(os.fsdecode(destination))[1].lower()
    for container in writable:
        if name is None and ending in container.suffixes:
            return container
        if name is not None and (name == container.name or "." + name in container.suffixes):
            return container
    endings = ", ".join(suffix for container in writable for suffix in container.suffixes)
    if name is not None:
        names = [container.name for container in writable]
        meant = did_you_mean(name, [*names, *_SHARDED], called=_CALLED)
        raise RewriteError(f"unknown container {name!r}; choose from: {', '.join(names)}{meant}")
    meant = did_you_mean(ending, endings.split(", ")) if len(ending) > 1 else ""
    raise RewriteError(
        f"{os.fsdecode(destination)}: the extension {ending!r} does not belong to a known container; use {endings}, "
        f"or --to{meant}",
        path=os.fsdecode(destination),
    )


def makes_folder(to: str | None) -> bool:
    """Whether a container of this name is written as a folder."""
    return to is not None and any(each.is_folder for each in FORMATS if each.name == to)


def target(
    destination: str | os.PathLike[str], to: str | None = None, shard_nbytes: int | None = None
) -> tuple[str, Format, int | None]:
    """The checkpoint to write.

    Args:
        destination: the output; its ending chooses the container.  One that ends in ``.index.json`` asks for
            shards.  A container that is a folder counts as one, whatever its name.
        to: container name that overrides the ending; ``safetensors-sharded`` and ``torch-sharded`` ask for shards.
        shard_nbytes: the most bytes of a file; what has more becomes shards and an index.

    Returns:
        The path of the one file or folder, or that the shards are named after; the container of it or of them; and
        the most bytes of a shard, ``None``: no shards are asked for.

    Raises:
        RewriteError: no container is meant by it.
        FileAccessError: it is a URL.
    """
    path = os.fsdecode(destination)
    places.require_local(path)
    default = None
    if makes_folder(to):
        return path, format_for(path, to), None
    if path.endswith(_INDEX):
        path, default = path.removesuffix(_INDEX), SHARD_NBYTES
    shards = next((index.shards for index in FORMATS if index.name == to), None)
    if shards is not None:
        to, default = shards, SHARD_NBYTES
    return path, format_for(path, to), default if shard_nbytes is None else shard_nbytes


def plan(
    checkpoint: Checkpoint,
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    shard_nbytes: int | None = None,
    ranks: int | None = None,
) -> tuple[str, Plan]:
    """What would be written, and the file it would be.

    Args:
        checkpoint: to write.
        destination: the output.
        to: container name that overrides its ending.
        shard_nbytes: the most bytes of a file; see `target`.
        ranks: how many share a folder; ``None``: one, or it is not a folder.

    Returns: The file, which is the index of ``destination`` if there are shards, or the folder, and its plan.

    Raises:
        RewriteError: no container is meant, or it cannot store the checkpoint.
    """
    path, container, most = target(destination, to, shard_nbytes)
    if most is None:
        return path, container.write(checkpoint, ranks)
    from ckptkit.formats.shard_writer import index_name, plan_shards

    made = plan_shards(checkpoint, container, os.path.basename(path), most)
    return (path if made.index is None else index_name(path)), made
