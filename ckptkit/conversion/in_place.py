"""``--in-place``: the output replaces the file; ``--backup``: the old one stays beside it under another name.

The file is written as any output is (`ckptkit.transfer.writing`): under a temporary name, compared, and then given the
old one's name and permissions, so that there is the old file or the whole new one at every moment.  Of a symbolic link
the file that it leads to is replaced; other hard links keep the old one, and a finding says so.  The backup is a hard
link to the old file, or a copy if the file system has none; it exists before the new file does, and is removed again if
that cannot be made.

Only one file on this machine is replaced, in its own container, which ckptkit must be able to write.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit import formats, places
from ckptkit.bytesource import Source, SourceFile
from ckptkit.conversion.folder import converted_all, shared_folder
from ckptkit.conversion.outputs import Item, require_confirmed
from ckptkit.errors import FileAccessError, RewriteError
from ckptkit.report import Report
from ckptkit.shell import quoted
from ckptkit.transfer.names import beside

if TYPE_CHECKING:
    from ckptkit.checkpoint import Checkpoint
    from ckptkit.conversion.folder import Convert
    from ckptkit.options import ConvertOptions

__all__ = ["Replacing", "convert_in_place", "replacing"]


def convert_in_place(source: object, options: ConvertOptions, convert: Convert) -> Report[Any]:
    """Convert a file, or several, into themselves.

    Args:
        source: the path of a file; or a list of paths, each of which is converted even if others fail.
        options: for each.
        convert: converts one file into itself.

    Returns: A report as for a conversion, whose ``details`` also contain the path of the ``backup``, ``None`` if none
        is kept; for a list, as for a folder.

    Raises:
        As `ckptkit.convert`; RewriteError: what is meant is not one file that can be replaced.
    """
    if isinstance(source, (list, tuple)):
        started = time.monotonic()
        paths = [os.fsdecode(path) for path in source]
        items = [Item(path, path, (path,)) for path in dict.fromkeys(paths)]
        require_confirmed([] if options.backup else paths, options)
        above = shared_folder(paths)
        return converted_all(items, options.but(confirm=None), convert, started, above, above)
    if not isinstance(source, (str, os.PathLike)):
        raise RewriteError(f"--in-place replaces a file: expected its path, found {type(source).__name__}")
    path = os.fsdecode(source)
    return convert(path, path, options)


class Replacing(NamedTuple):
    """A file to convert in place: its content, the source of its bytes, the options, and the place of the old file."""

    checkpoint: Checkpoint
    file: Source
    options: ConvertOptions
    backup: str | None


@contextmanager
def replacing(path: str, options: ConvertOptions) -> Iterator[Replacing]:
    """Open a file to convert in place; the backup stays if the block ends well.

    Raises:
        As `convert_in_place`.
    """
    _require_file(path)
    given = {name: getattr(options, name) for name in ("section", "ignore_checksums")}
    checkpoint, file = formats.read(path, **given)
    try:
        container = _container(path, checkpoint, file, options)
        with _kept(path, options) as backup:
            confirm = None if options.backup else options.confirm
            own = options.but(to=container, force=True, in_place=False, backup=False, confirm=confirm)
            yield Replacing(checkpoint, file, own, backup)
    finally:
        file.close()


def _require_file(path: str) -> None:
    """Refuse a path that is clearly not a local file.

    Raises:
        RewriteError: it is not one.
    """
    what = None
    if path == formats.STDIN:
        what = "is standard input"
    elif places.is_url(path):
        what = "is a URL"
    elif os.path.isdir(path):
        what = "is a folder; name the files in it to convert them in place"
    elif not os.path.lexists(path) and "!" in path:
        what = "is a member of an archive"
    if what is not None:
        raise RewriteError(f"{places.shown(path)}: {what}; --in-place replaces a file{_instead(path)}", path=path)


def _instead(path: str) -> str:
    """The end of a message: what to do instead."""
    return "" if os.path.isdir(path) else f"; name a new one: ckptkit convert {quoted(places.shown(path))} NEW"


def _container(path: str, checkpoint: Checkpoint, file: Source, options: ConvertOptions) -> str:
    """The container of the output: the file's own, or on request the one of its extension.

    Raises:
        RewriteError: it is several files, or in another one, or ckptkit does not write it.
    """
    own = formats.format_named(checkpoint.origin.format)
    what = None
    if own.shards is not None or own.is_folder or formats.hashed_parts(file):
        what = "is one of several files of a checkpoint"
    elif not isinstance(file, SourceFile):
        what = "is compressed, or is an archive with the checkpoint in it"
    if what is not None:
        raise RewriteError(f"{path}: {what}; --in-place replaces one plain file{_instead(path)}", path=path)
    if options.to is None:
        if own.writer is not None:
            return own.name
        told = f"is {own.name}, which ckptkit reads but does not write; --to torch-zip converts it to that"
        raise RewriteError(f"{path}: {told}{_instead(path)}", path=path)
    _, asked, most = formats.target(path, options.to)
    if most is not None or asked.is_folder:
        told = f"--to {options.to} writes several files; --in-place replaces one"
        raise RewriteError(f"{path}: {told}{_instead(path)}", path=path)
    if asked.name != own.name and os.path.splitext(path)[1].lower() not in asked.suffixes:
        told = f"is {own.name}, and its extension does not belong to {asked.name}"
        raise RewriteError(f"{path}: {told}; --in-place keeps the name{_instead(path)}", path=path)
    return asked.name


@contextmanager
def _kept(path: str, options: ConvertOptions) -> Iterator[str | None]:
    """Keep the file under another name, if requested: it stays if the block ends well.

    Raises:
        FileAccessError: it cannot be kept.
    """
    if not options.backup or options.dry_run:
        yield None
        return
    try:
        backup = _another_name(os.path.realpath(path), path)
    except OSError as error:
        raise FileAccessError(f"{path}: no backup can be made: {error.strerror}", path=path) from error
    try:
        yield backup
    except BaseException:
        with suppress(OSError):
            os.unlink(backup)
        raise


def _another_name(path: str, shown: str) -> str:
    """Give a file a name that nothing has: ``FILE.bak``, else ``FILE.bak.1`` and so on."""
    for name in _names(shown):
        try:
            os.link(path, name)
        except FileExistsError:
            continue
        except OSError:  # no hard links here, or none of this file
            break
        return name
    temporary = beside(shown, "")
    try:
        shutil.copy2(path, temporary)
        name = next(name for name in _names(shown) if not os.path.lexists(name))
        os.rename(temporary, name)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return name


def _names(path: str) -> Iterator[str]:
    yield f"{path}.bak"
    yield from (f"{path}.bak.{number}" for number in itertools.count(1))
