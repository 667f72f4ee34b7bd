"""The checks that opening a checkpoint puts off until its bytes are read.

They cover checksums that an archive recorded, pickles of a folder that were left for later, and copies that must be
equal; a hostile sharded checkpoint is refused.
"""

from __future__ import annotations

import os
import zlib

from ckptkit.bytesource import Source
from ckptkit.checkpoint import Checkpoint, GlobalUse
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.containers import format_named
from ckptkit.formats.format import is_folder
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import listed

__all__ = ["as_hostile", "hashed_parts", "is_part", "judged", "require_sound"]


def require_sound(file: Source, checkpoint: Checkpoint, *, held: bool = True) -> Checkpoint:
    """Check everything that opening the checkpoint put off; every reader of its bytes begins here.

    A stored member of a zip archive is checked against its recorded checksum, pickles that were left for later are
    judged, and values in several files of a folder are compared.

    Args:
        file: the source.
        checkpoint: its content.
        held: whether bytes are checked against checksums and copies; pickles left for later are judged in any case.

    Returns:
        The checkpoint, with the names in pickles that were left for later.

    Raises:
        CorruptError: bytes do not match their recorded checksum, or differ where they must be the same.
        FormatError: a pickle that was left for later is damaged, or a sharded checkpoint is hostile.
    """
    for each in (file, *file.parts.values()) if held else ():
        recorded: int | None = getattr(each, "crc32", None)
        if recorded is None:
            continue
        found = 0
        for chunk in each.whole.chunks():
            found = zlib.crc32(chunk, found)
        if found != recorded:
            told = f"its CRC-32 is {found:08x}, but the archive records {recorded:08x}: damaged"
            raise CorruptError(told, path=each.path)
        each.crc32 = None  # type: ignore[attr-defined]  # once is enough
    checkpoint = judged(checkpoint)
    if checkpoint.trust == "hostile" and format_named(checkpoint.origin.format).is_folder:
        raise as_hostile(CorruptError("", path=checkpoint.origin.path).at(seen=checkpoint.globals))
    if checkpoint.replicas and held:
        from ckptkit.transfer.replicas import require_equal

        try:
            require_equal(checkpoint.replicas)
        except CorruptError as error:
            raise error.at(path=checkpoint.origin.path) from None
    return checkpoint


def as_hostile(error: FormatError) -> FormatError:
    """The error of a sharded checkpoint, which says so if that is hostile."""
    names = dict.fromkeys(use.name for use in error.globals if use.verdict == "dangerous")
    if names and not error.is_hostile:
        told = f"hostile: a loader that executes its pickles would run {listed(names)}; refused"
        error.message = f"{error.message}; {told}" if error.message else told
        error.is_hostile = True
    return error


def judged(checkpoint: Checkpoint, file: Source | None = None) -> Checkpoint:
    """The checkpoint with the names in the pickles that were left for later when it was opened.

    Args:
        checkpoint: its content.
        file: the source; if it is a folder, the names in files that its reader did not open are added.

    Raises:
        FormatError: one is damaged.
    """
    uses: list[GlobalUse] = []
    unvouched = checkpoint.unvouched
    if checkpoint.unread is not None:
        try:
            uses += checkpoint.unread.judge()
        except FormatError as error:
            raise as_hostile(error.at(path=checkpoint.origin.path)) from error.__cause__
        unvouched = tuple(use for use in unvouched if use.kind != "unread")
    if file is not None and is_folder(file):
        from ckptkit.formats.distributed.folder import FolderSource, left_over

        uses += left_over(file) if isinstance(file, FolderSource) else ()
    if checkpoint.unread is None and not uses:
        return checkpoint
    return checkpoint.replace(
        globals=merge_uses(checkpoint.globals, (use for use in uses if use.kind == "name")),
        unvouched=(*unvouched, *(use for use in uses if use.kind != "name")),
        unread=None,
    )


def is_part(file: Source, path: str) -> bool:
    """Whether a path, or what it links to, is one of several files being read: in a folder, or a shard of an index."""
    if file.is_far or not os.path.exists(path):
        return False
    if is_folder(file):
        from ckptkit.formats.distributed.folder import FolderSource

        paths = []
        if isinstance(file, FolderSource):
            paths = [os.path.join(file.root, *name.split("/")) for name in file.own]
    else:
        paths = [part.path for part in file.parts.values() if part.path != file.path]
    written = os.stat(path)
    return any(os.path.exists(each) and os.path.samestat(os.stat(each), written) for each in paths)


def hashed_parts(file: Source) -> dict[str, Source]:
    """The files of a checkpoint in several, by name: shards and their index, all files of a folder.

    Raises:
        FileAccessError: one cannot be opened.
    """
    if is_folder(file):
        from ckptkit.formats.distributed.folder import FolderSource

        return dict(file.whole_parts()) if isinstance(file, FolderSource) else {}
    return {os.path.basename(file.path): file, **file.parts} if file.parts else {}
