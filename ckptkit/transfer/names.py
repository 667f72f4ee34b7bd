"""Files under temporary names, and how they get their own: all at once, or as good as.

A sharded checkpoint is several files that change together, and an index that names them.  Where
shards of these names stand already, the index is first replaced by one that names the new shards
under their temporary names, then the shards get their own names too, then the index that says so
takes its place: at every moment the index names one whole checkpoint, the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from dataclasses import dataclass

from ckptkit.errors import DestinationExistsError, FileAccessError, MissingFileError
from ckptkit.plan import Plan
from ckptkit.transfer.copier import UNAVAILABLE
from ckptkit.transfer.positioned import write_at
from ckptkit.transfer.workers import uninterrupted

__all__ = ["Output", "created", "exists", "overwrite", "publish"]


@dataclass(slots=True, kw_only=True)
class Output:
    """One file to be written.

    Attributes:
        plan: its steps.
        path: where it will be.
        shown: the name that messages use.
        temporary: where it is meanwhile.
        fd: open on that, readable and writable.
        is_ours: whether the temporary name is to be removed at the end, and not in use by an index.
    """

    plan: Plan
    path: str
    shown: str
    temporary: str
    fd: int
    is_ours: bool = True

    @property
    def has_name(self) -> bool:
        """Whether it is this very file that has the name it is meant for."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close it, and remove its temporary name."""
        os.close(self.fd)
        if self.is_ours:
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)


def created(plan: Plan, path: str, shown: str) -> Output:
    """An empty file beside where it will be.

    Raises:
        FileAccessError: it cannot be made.
    """
    temporary = _beside(path)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        fd = os.open(temporary, flags, 0o666)  # less the umask, as any program's output
    except FileNotFoundError as error:
        folder = os.path.dirname(shown) or "."
        raise MissingFileError(
            f"{shown}: cannot be written: the folder {folder} does not exist; create it first: mkdir -p "
            f"{shlex.quote(folder)}"
        ) from error
    except OSError as error:
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}") from error
    return Output(plan=plan, path=path, shown=shown, temporary=temporary, fd=fd)


def _beside(path: str) -> str:
    """A name in the same folder that nothing has."""
    folder, name = os.path.split(path)
    # 50 characters are at most 200 bytes, so that the name is no longer than a file system allows.  The ending stays:
    # by it an index that names shards so for a moment is still read as what it is.
    stem, ending = os.path.splitext(name)
    return os.path.join(folder, f".{stem[:50]}.{os.urandom(4).hex()}.tmp{ending[:20]}")


def overwrite(fd: int, data: bytes) -> None:
    """Make the data all of a file."""
    os.ftruncate(fd, len(data))
    write_at(fd, data, 0)


def exists(shown: str) -> DestinationExistsError:
    """The error for a file that is not to be overwritten."""
    return DestinationExistsError(f"{shown}: exists already; --force overwrites it")


def publish(files: list[Output], index: bytes, *, force: bool, flush: bool) -> None:
    """Give complete files their names, and make the names themselves durable.

    Args:
        files: shards, and last the file that is asked for.  Of shards that is their index, and what is in
            it names them as they are called now.
        index: naming the shards as they will be called; empty where there are none.
        force: whether what exists may be replaced.
        flush: whether to wait for the disk.

    Raises:
        DestinationExistsError: a file of a name has appeared.
        OSError: it cannot be done.
    """
    *shards, main = files
    with uninterrupted():
        if not index:
            _rename(main, force=force)
        else:
            _publish_shards(shards, main, index, force=force, flush=flush)
    if flush:
        _flush_folder(os.path.dirname(main.path))


def _publish_shards(shards: list[Output], main: Output, index: bytes, *, force: bool, flush: bool) -> None:
    """Give shards their names, and the index its own last."""
    final = created(main.plan, main.path, main.shown)
    try:
        overwrite(final.fd, index)
        if flush:
            os.fsync(final.fd)
        if force and any(os.path.lexists(shard.path) for shard in shards):
            _replace(shards, main, final, flush=flush)
        else:
            _publish_new(shards, final, force=force)
    finally:
        final.close()


def _publish_new(shards: list[Output], final: Output, *, force: bool) -> None:
    """Where no shards of these names are: until the index has its name, an old one names what it always did.

    What has appeared meanwhile is not touched without force, and nothing of ours is left beside it.
    """
    try:
        for file in (*shards, final):
            _rename(file, force=force)
    except BaseException:
        if not final.has_name:
            for shard in shards:
                if shard.has_name:
                    with contextlib.suppress(OSError):
                        os.unlink(shard.path)
        raise


def _replace(shards: list[Output], main: Output, final: Output, *, flush: bool) -> None:
    """Where shards of these names are: at every moment the index names one whole checkpoint.

    On a file system without hard links it names for a moment shards that are not there.
    """
    for shard in shards:
        shard.is_ours = False
    try:
        os.replace(main.temporary, main.path)  # it names the shards as they are called now
    except BaseException:
        for shard in shards:
            shard.is_ours = not main.has_name
        raise
    try:
        if flush:
            _flush_folder(os.path.dirname(main.path))
        for shard in shards:
            _rename_over(shard)
        os.replace(final.temporary, final.path)
    except BaseException:
        if not final.has_name:
            for shard in shards:  # those that could not keep the temporary name get it back: the index names them so
                if not os.path.lexists(shard.temporary):
                    os.replace(shard.path, shard.temporary)
            raise
        for shard in shards:
            shard.is_ours = True
        raise
    for shard in shards:
        shard.is_ours = True


def _rename_over(shard: Output) -> None:
    """Give a shard its name, and leave it the temporary one where the file system has hard links."""
    second = _beside(shard.path)
    try:
        try:
            os.link(shard.temporary, second)
        except OSError:
            os.replace(shard.temporary, shard.path)
        else:
            os.replace(second, shard.path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(second)


def _rename(file: Output, *, force: bool) -> None:
    """Give a complete file its name."""
    if force:
        os.replace(file.temporary, file.path)
        return
    try:
        os.link(file.temporary, file.path)  # fails, in one step, where a file of that name has appeared
    except FileExistsError:
        raise exists(file.shown) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(file.path):
            raise exists(file.shown) from None
        os.replace(file.temporary, file.path)


def _flush_folder(path: str) -> None:
    """Make the names in a folder durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in UNAVAILABLE | {errno.EACCES}:  # a folder may be one to write to and not to read
            raise
