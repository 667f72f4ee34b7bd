"""Folders that are asked for as a whole: they have a temporary name until all in them is complete.

One that is there may be empty, and nothing else, so that at no moment something of an old one is beside something of
the new one.  Like a temporary file (`ckptkit.transfer.names`) a temporary folder is locked while its run is at work,
and the next run beside it removes what a killed one left.  Folders that outputs are put into are made here, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ckptkit.errors import DestinationExistsError, FileAccessError
from ckptkit.plan import Plan
from ckptkit.startup import dataclass
from ckptkit.transfer.names import (
    Output,
    beside,
    fcntl,
    flush_folder,
    flush_names,
    has_name,
    locked,
    no_folder,
    permit,
    remove_folder,
    this_host,
)
from ckptkit.transfer.workers import uninterrupted

__all__ = ["OutputFolder", "created_folder", "folder_made", "is_empty_folder", "not_empty", "temporary_folder"]


@dataclass(slots=True, kw_only=True)
class OutputFolder:
    """A folder to be written, with all that is in it.

    Attributes:
        path: where it will be.
        shown: the name that messages use.
        temporary: its path in the meantime.
        fd: open on that, and locked if possible; otherwise -1.
        is_ours: whether it has the temporary name still.
    """

    path: str
    shown: str
    temporary: str
    fd: int = -1
    is_ours: bool = True

    def created(self, plan: Plan) -> Iterator[Output]:
        """The files in it, still empty and under the names that they keep; what says what is in the others is the last.

        Raises:
            FileAccessError: one cannot be made.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        for name, each in (*plan.shards.items(), (plan.in_folder or "", plan)):
            path, shown = os.path.join(self.temporary, name), os.path.join(self.shown, name)
            try:
                fd = os.open(path, flags, 0o666)
            except OSError as error:
                raise FileAccessError(f"{shown}: cannot be written: {error.strerror}", path=shown) from error
            yield Output(plan=each, path=path, shown=shown, temporary=path, fd=fd, is_ours=False)

    def publish(self, files: list[Output], *, flush: bool) -> None:
        """Give the folder its name, and make that and the names in it durable.

        Args:
            files: all that are in it, complete.
            flush: whether to wait for the disk.

        Raises:
            DestinationExistsError: a folder that is not empty, or a file, has appeared.
            OSError: it cannot be done.
        """
        with uninterrupted():
            for file in files:
                file.finish()
            if flush:
                flush_folder(self.temporary)
            if not hasattr(os, "O_DIRECTORY"):  # Windows renames over none
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(self.path)
            try:
                os.rename(self.temporary, self.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise not_empty(self.shown) from None
                raise
            self.is_ours = False
        if flush:
            flush_names(os.path.dirname(self.path))

    def close(self) -> None:
        """Unlock it; if it did not get its name, it is removed."""
        if self.is_ours:
            remove_folder(self.temporary)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def created_folder(path: str, shown: str) -> OutputFolder:
    """An empty folder beside its final place, locked if possible; with the permissions of an existing one.

    Args:
        path: where it will be.
        shown: the name that messages use.

    Raises:
        DestinationExistsError: a file is there, or a folder that is not empty.
        FileAccessError: it cannot be made, or could not get the name.
    """
    old = None
    try:
        if os.path.lexists(path):
            if not is_empty_folder(path):
                raise not_empty(shown)
            old = os.stat(path)
            if os.path.ismount(path) or os.path.samefile(path, os.curdir):
                why = "it is a mount point" if os.path.ismount(path) else "it is the working directory"
                raise FileAccessError(f"{shown}: cannot be replaced, {why}; name a new folder inside it", path=shown)
        output = _made(path, shown, 0o777 if old is None else 0o700)
        if old is not None and output.fd >= 0:
            permit(output.fd, old, 0o7777)
    except FileNotFoundError as error:
        raise no_folder(shown) from error
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}", path=shown) from error
    return output


def temporary_folder(path: str, shown: str) -> OutputFolder:
    """An empty folder beside a path, locked if possible, for the result; it never gets the name itself.

    The lock is one that others can share who give names in the folder (`ckptkit.transfer.names.publish`).

    Args:
        path: of the result.
        shown: the name that messages use.

    Raises:
        FileAccessError: it cannot be made.
    """
    try:
        while True:
            output = _made(path, shown, 0o700 if os.path.lexists(path) else 0o777)
            if _shares_lock(output):
                return output
            output.close()
    except FileNotFoundError as error:
        raise no_folder(shown) from error
    except OSError as error:
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}", path=shown) from error


def _shares_lock(output: OutputFolder) -> bool:
    """Let others share the lock; whether it is still there, since for a moment it has none."""
    if output.fd >= 0 and fcntl is not None:
        try:
            fcntl.flock(output.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # there are no locks here
            return True
        return has_name(os.fstat(output.fd), output.temporary)
    return True


def _made(path: str, shown: str, mode: int) -> OutputFolder:
    """A new folder under a temporary name."""
    while True:
        output = OutputFolder(path=path, shown=shown, temporary=beside(path, this_host()))
        os.mkdir(output.temporary, mode)
        try:
            if _is_locked(output):
                return output
        except OSError:
            output.close()
            raise


def _is_locked(output: OutputFolder) -> bool:
    """Lock a folder that was just made; whether it still exists, and is not anyone else's."""
    if fcntl is None:
        return True
    output.fd = os.open(output.temporary, os.O_RDONLY | os.O_DIRECTORY)  # type: ignore[attr-defined,unused-ignore]
    try:
        if locked(output.fd) and has_name(os.fstat(output.fd), output.temporary):
            return True
    except OSError:  # there are no locks here: no other run may treat it as one of a killed run
        named = beside(output.path, "")
        os.rename(output.temporary, named)
        output.temporary = named
        return True
    fd, output.fd = output.fd, -1
    os.close(fd)  # another run has swept it, in the moment before it was locked
    return False


def is_empty_folder(path: str) -> bool:
    """Whether it is a folder with nothing in it."""
    return os.path.isdir(path) and not os.listdir(path)


def not_empty(shown: str) -> DestinationExistsError:
    """The error for a folder that is not to be replaced, nor a file by one."""
    told = "the output folder must be new or empty, and --force does not replace folders; name another"
    return DestinationExistsError(f"{shown}: already exists and is not an empty folder; {told}", path=shown)


@contextlib.contextmanager
def folder_made(path: str, *, flush: bool) -> Iterator[None]:
    """A folder for what the block writes; where the block fails, those that were made and are empty go again.

    Args:
        path: the folder; ``""`` is the working directory.
        flush: whether to make the names of those that are made durable.

    Raises:
        FileAccessError: it cannot be made.
    """
    made: list[str] = []
    above = path.rstrip("/" + os.sep)
    while above and not os.path.isdir(above):
        made.append(above)
        above = os.path.dirname(above)
    try:
        try:
            if made:
                os.makedirs(made[0], exist_ok=True)
            for folder in made if flush else ():
                flush_names(os.path.dirname(folder) or os.curdir)
        except OSError as error:
            raise FileAccessError(f"{path}: the folder cannot be created: {error.strerror}") from error
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
