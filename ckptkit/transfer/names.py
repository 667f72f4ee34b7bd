"""Files under temporary names, and how they get their own: all at once, or as good as.

A sharded checkpoint is several files that change together, and an index that names them.  If shards with these names
exist, the index is first replaced by one that names the new shards under their temporary names, then the shards get
their own names too, then the index that says so takes its place: at every moment the index names one whole checkpoint,
the old one or the new one.

A temporary file is locked (``flock``) while its run has it open, and the system unlocks it whatever happens to the run.
So the next run into the same folder removes files that a killed one left: those with this host in their names, whose
lock it wins, and that no index names.  Other hosts may share the folder but not the locks; without locks, names have no
host, and such files stay.

Files are closed before they are renamed, because Windows cannot rename an open file, nor replace one: a source that is
about to be replaced is closed there too.  From closing to renaming, the folder is locked against removal.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from types import ModuleType

from ckptkit import places
from ckptkit.bytesource import Source, SourceFile, flush_to_disk, write_at
from ckptkit.errors import DestinationExistsError, FileAccessError, MissingFileError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.plan import Plan
from ckptkit.shell import mkdir_command
from ckptkit.startup import dataclass
from ckptkit.transfer.steps import UNAVAILABLE
from ckptkit.transfer.workers import uninterrupted

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "Output", "beside", "created", "exists", "flush_folder", "flush_names", "has_name", "locked",
    "names_flushed_together", "no_folder", "overwrite", "permit", "publish", "remove_folder", "remove_stale",
    "replacing", "this_host",
]  # fmt: skip

_AT_ONCE = 256
"""Files of killed runs that are open at a time: a process may have no more than 1,024."""

_PATIENCE = 1.0
"""Seconds to wait for a run that removes files from the folder; a longer lock is not ours."""


@dataclass(slots=True, kw_only=True)
class Output:
    """One file to be written.

    Attributes:
        plan: its steps.
        path: where it will be.
        shown: the name that messages use.
        temporary: its path in the meantime.
        fd: open on that, readable and writable; -1 once it is complete.
        host: the part of its temporary name about this machine; empty if it is not locked.
        replaced: the file whose permissions it gets.
        status: of the complete file.
        is_ours: whether to remove the temporary name at the end, because no index uses it.
    """

    plan: Plan
    path: str
    shown: str
    temporary: str
    fd: int
    host: str = ""
    replaced: os.stat_result | None = None
    status: os.stat_result | None = None
    is_ours: bool = True

    @property
    def has_name(self) -> bool:
        """Whether it is this very file that has the name it is meant for."""
        return has_name(self.status or os.fstat(self.fd), self.path)

    def finish(self) -> None:
        """Nothing more is written: it gets its permissions, and is closed."""
        if self.replaced is not None:
            permit(self.fd, self.replaced, 0o777)
        self.status = os.fstat(self.fd)
        fd, self.fd = self.fd, -1
        os.close(fd)

    def close(self) -> None:
        """Close it, and remove its temporary name."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        if self.is_ours:
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)


def created(plan: Plan, path: str, shown: str, replaced: os.stat_result | None = None) -> Output:
    """An empty file beside its final place, locked if possible.

    Args:
        plan: its steps.
        path: where it will be.
        shown: the name that messages use.
        replaced: the file whose permissions it is to get.

    Raises:
        FileAccessError: it cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # Less the umask, as any program's output; the replacement of a restricted file is restricted from the start.
    mode = 0o666 if replaced is None else 0o600
    host = this_host()
    while True:
        temporary = beside(path, host)
        try:
            fd = os.open(temporary, flags, mode)
        except FileNotFoundError as error:
            raise no_folder(shown) from error
        except OSError as error:
            raise FileAccessError(f"{shown}: cannot be written: {error.strerror}", path=shown) from error
        output = Output(plan=plan, path=path, shown=shown, temporary=temporary, fd=fd, host=host, replaced=replaced)
        try:
            if not host or (locked(fd) and has_name(os.fstat(fd), temporary)):
                return output
        except OSError:  # there are no locks here
            host = ""
        output.close()  # another run has swept it, in the moment before it was locked


def no_folder(shown: str) -> MissingFileError:
    """The error for an output in a folder that is not there."""
    folder = os.path.dirname(shown.rstrip("/")) or "."
    remedy = f"create it first: {mkdir_command(folder)}"
    return MissingFileError(f"{shown}: cannot be written: the folder {folder} does not exist; {remedy}", path=shown)


def permit(fd: int, old: os.stat_result, bits: int) -> None:
    """Give an output the permissions, and where this process may the owner and group, of what it replaces."""
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        with contextlib.suppress(OSError, AttributeError):  # Windows has neither
            os.fchown(fd, owner, group)  # type: ignore[attr-defined,unused-ignore]
    with contextlib.suppress(OSError, AttributeError):
        os.fchmod(fd, old.st_mode & bits)  # type: ignore[attr-defined,unused-ignore]


def remove_folder(path: str) -> None:
    """Remove a folder and the files in it; a folder that contains others stays."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)


def this_host() -> str:
    """Eight digits for this machine; empty if there are no locks."""
    return _host_digits() if fcntl is not None else ""


@functools.cache
def _host_digits() -> str:
    mark = os.uname().nodename.encode(errors="surrogateescape")  # type: ignore[attr-defined,unused-ignore]
    with contextlib.suppress(OSError), contextlib.closing(SourceFile("/etc/machine-id")) as file:
        mark += file.read(0, min(file.size, 64))
    return f"{zlib.crc32(mark):08x}"


def locked(fd: int) -> bool:
    """Lock the file; whether nobody else has.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _folder_locked(path: str, *, shared: bool) -> Iterator[bool]:
    """Lock a folder if possible: giving names takes a shared lock, removing files an exclusive one, or is forbidden."""
    if fcntl is None or not hasattr(os, "O_DIRECTORY"):
        yield True
        return
    with contextlib.ExitStack() as stack:
        won = True
        until = time.monotonic() + (_PATIENCE if shared else 0)
        with contextlib.suppress(OSError):  # no locks here, or a folder to write to and not to read
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)
            won = False
            while not won:
                try:
                    fcntl.flock(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                    won = True
                except BlockingIOError:
                    if time.monotonic() >= until:
                        break
                    time.sleep(0.01)
                except OSError:
                    won = True
        yield won


def has_name(status: os.stat_result, path: str) -> bool:
    """Whether it is this file that has the name."""
    try:
        return os.path.samestat(status, os.lstat(path))
    except FileNotFoundError:
        return False


def beside(path: str, host: str) -> str:
    """A name in the same folder that nothing has."""
    folder, name = os.path.split(path)
    # 56 characters are at most 224 bytes, so that the name is no longer than a file system allows.  The ending stays:
    # by it an index that names shards so for a moment is still read as what it is.
    stem, ending = os.path.splitext(name)
    return os.path.join(folder, f".{stem[:40]}.{os.urandom(4).hex()}{host}.tmp{ending[:16]}")


def remove_stale(folder: str) -> None:
    """Remove the temporary files that killed runs on this host left in a folder; those of runs at work stay."""
    host = this_host()
    with contextlib.suppress(OSError), _folder_locked(folder, shared=False) as won_it:
        if not won_it:
            return
        found = [places.TEMPORARY.fullmatch(name) for name in os.listdir(folder) if host and name.startswith(".")]
        ours = {os.path.join(folder, each[0]): each[1] + host for each in found if each is not None and each[2] == host}
        for start in range(0, len(ours), _AT_ONCE):
            with contextlib.ExitStack() as stack:
                some = itertools.islice(ours.items(), start, start + _AT_ONCE)
                held: set[tuple[int, int]] = set()
                won = {path: digits for path, digits in some if _won(path, stack, held)}
                # Only now: the run that had them open is gone, and changes no index any more.
                for path in won and _named_by_no_index(folder, won):
                    remove_folder(path)
                    with contextlib.suppress(OSError):
                        os.unlink(path)


def _won(path: str, stack: contextlib.ExitStack, held: set[tuple[int, int]]) -> bool:
    """Whether nobody has the file open for writing; it is locked until the stack ends, and ``held`` names it.

    A shard has two names for a moment, and a lock belongs to one file: winning one name wins the other.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with contextlib.suppress(OSError):
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
        fd = os.open(path, flags | (os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR))  # type: ignore[attr-defined,unused-ignore]
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        file = status.st_dev, status.st_ino
        if (is_folder or stat.S_ISREG(status.st_mode)) and (file in held or locked(fd)):
            held.add(file)
            return has_name(status, path)
    return False


def _named_by_no_index(folder: str, digits_of: dict[str, str]) -> list[str]:
    """Of temporary files those whose digits no index in the folder holds: one names shards so while it changes."""
    named: set[str] = set()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".json") and not places.is_temporary_name(name) and os.path.isfile(path):
            with contextlib.closing(SourceFile(path)) as file:
                data = file.read(0, min(file.size, DEFAULT_LIMITS.index_nbytes))
            named.update(path for path, digits in digits_of.items() if digits.encode() in data)
    return [path for path in digits_of if path not in named]


def overwrite(fd: int, data: bytes) -> None:
    """Make the data all of a file."""
    os.ftruncate(fd, len(data))
    write_at(fd, data, 0)


def exists(shown: str) -> DestinationExistsError:
    """The error for a file that is not to be overwritten."""
    return DestinationExistsError(f"{shown}: already exists; --force overwrites it", path=shown)


def replacing(action: Callable[[], None], path: str, source: Source | None) -> None:
    """Rename over a file, or remove it; if that is impossible while we read the file, it is closed first.

    Args:
        action: what to do.
        path: the file.
        source: the open file that the plan reads, with those that belong to it; it is read no more.

    Raises:
        OSError: it cannot be done.
    """
    try:
        action()
    except PermissionError:
        opened = () if source is None else (source, *source.parts.values())
        ours = [each.path for each in opened if each.folder is not None and not each.is_far]
        if source is None or not any(os.path.exists(path) and os.path.samefile(each, path) for each in ours):
            raise
        source.close()
        action()


def publish(files: list[Output], index: bytes, *, force: bool, flush: bool, source: Source | None = None) -> None:
    """Give complete files their names, and make the names themselves durable.

    Args:
        files: shards, and last the file that is asked for.  For shards that is their index, which names them by their
            current names.
        index: naming the shards by their new names; empty if there are none.
        force: whether what exists may be replaced.
        flush: whether to wait for the disk.
        source: see `replacing`.

    Raises:
        DestinationExistsError: a file of a name has appeared.
        OSError: it cannot be done.
    """
    *shards, main = files
    folder = os.path.dirname(main.path)
    with uninterrupted(), _folder_locked(folder, shared=True):
        for file in files:
            file.finish()
        if not index:
            _rename(main, source, force=force)
        else:
            _publish_shards(shards, main, index, source, force=force, flush=flush)
    if flush:
        flush_names(folder)


def _publish_shards(
    shards: list[Output], main: Output, index: bytes, source: Source | None, *, force: bool, flush: bool
) -> None:
    """Give shards their names, and the index its own last."""
    final = created(main.plan, main.path, main.shown, main.replaced)
    try:
        overwrite(final.fd, index)
        if flush:
            flush_to_disk(final.fd)
        final.finish()
        if force and any(os.path.lexists(shard.path) for shard in shards):
            _replace(shards, main, final, source, flush=flush)
        else:
            _publish_new(shards, final, source, force=force)
    finally:
        final.close()


def _publish_new(shards: list[Output], final: Output, source: Source | None, *, force: bool) -> None:
    """Where no shards of these names are: until the index has its name, an old one names what it always did.

    Files that appeared in the meantime are not touched without force, and nothing of ours is left beside them.
    """
    try:
        for file in (*shards, final):
            _rename(file, source, force=force)
    except BaseException:
        if not final.has_name:
            for shard in shards:
                if shard.has_name:
                    with contextlib.suppress(OSError):
                        os.unlink(shard.path)
        raise


def _replace(shards: list[Output], main: Output, final: Output, source: Source | None, *, flush: bool) -> None:
    """Where shards of these names are: at every moment the index names one whole checkpoint.

    On a file system without hard links it names for a moment shards that are not there.
    """
    for shard in shards:
        shard.is_ours = False
    try:  # it names the shards as they are called now
        replacing(partial(os.replace, main.temporary, main.path), main.path, source)
    except BaseException:
        for shard in shards:
            shard.is_ours = not main.has_name
        raise
    try:
        if flush:
            flush_folder(os.path.dirname(main.path))
        for shard in shards:
            _rename_over(shard, source)
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


def _rename_over(shard: Output, source: Source | None) -> None:
    """Give a shard its name, and leave it the temporary one where the file system has hard links."""
    second = beside(shard.path, shard.host)
    try:
        try:
            os.link(shard.temporary, second)
        except OSError:
            replacing(partial(os.replace, shard.temporary, shard.path), shard.path, source)
        else:
            replacing(partial(os.replace, second, shard.path), shard.path, source)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(second)


def _rename(file: Output, source: Source | None, *, force: bool) -> None:
    """Give a complete file its name."""
    if force:
        replacing(partial(os.replace, file.temporary, file.path), file.path, source)
        return
    try:
        os.link(file.temporary, file.path)  # fails, in one step, where a file of that name has appeared
    except FileExistsError:
        raise exists(file.shown) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(file.path):
            raise exists(file.shown) from None
        os.replace(file.temporary, file.path)


_waiting: ContextVar[set[str] | None] = ContextVar("_waiting", default=None)
"""Folders whose names are made durable together; ``None``: each at once."""


@contextlib.contextmanager
def names_flushed_together() -> Iterator[None]:
    """The names of files written in the block are durable at its end: one wait for a folder, not one for each file.

    A power failure before that may take names back; one that stays is of a whole file, as ever.

    Raises:
        FileAccessError: the disk does not take them.
    """
    folders: set[str] = set()
    token = _waiting.set(folders)
    try:
        yield
    finally:
        _waiting.reset(token)
        for folder in filter(os.path.isdir, sorted(folders)):  # others are gone again
            try:
                flush_folder(folder)
            except OSError as error:
                raise FileAccessError(f"{folder}: cannot be written: {error.strerror}", path=folder) from error


def flush_names(folder: str) -> None:
    """Make the names in a folder durable, at once or with others."""
    waiting = _waiting.get()
    if waiting is None:
        flush_folder(folder)
    else:
        waiting.add(folder)


def flush_folder(path: str) -> None:
    """Make the names in a folder durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flush_to_disk(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in UNAVAILABLE | {errno.EACCES}:  # a folder may be one to write to and not to read
            raise
