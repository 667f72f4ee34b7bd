"""A file that takes a descriptor only while it is needed: one of thousands of shards."""

from __future__ import annotations

import errno
import os
import threading

from ckptkit.bytesource import SourceFile
from ckptkit.errors import CorruptError, FileAccessError

__all__ = ["ShardFile"]


class ShardFile(SourceFile):
    """A `SourceFile` that `release` lets go of until something is read from it again.

    Systems allow a process some hundred open files (``ulimit -n``: 1,024 on Linux, 256 on macOS),
    and a checkpoint may have more shards; to look at them needs one at a time.
    """

    __slots__ = ("_closed", "_opening")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._closed = False
        self._opening = threading.Lock()
        super().__init__(os.path.abspath(path))

    @property
    def fd(self) -> int:
        """The open file descriptor.

        Raises:
            FileAccessError: the checkpoint was closed, or the file cannot be opened again.
            CorruptError: it is another file by now.
        """
        if self._fd < 0 and not self._closed:
            with self._opening:
                if self._fd < 0:
                    self._fd = self._opened_again()
        return super().fd

    def _opened_again(self) -> int:
        try:
            again = SourceFile(self.path)
        except FileAccessError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EMFILE, errno.ENFILE):
                raise FileAccessError(
                    f"{self.path}: too many files are open at once for all shards; allow more (ulimit -n 8192)"
                ) from error
            raise
        if again.identity != self.identity:
            raise CorruptError("the file was changed while it was being read", path=self.path)
        descriptor, again._fd = again._fd, -1
        return descriptor

    def release(self) -> None:
        """Let go of the descriptor; the next read opens the file again.  No other thread may be reading."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """As `SourceFile.close`: for good."""
        self._closed = True
        super().close()
