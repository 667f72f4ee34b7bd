"""Reads and writes at a position of an open output; on systems without such calls, one after the other."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptkit.derived import Buffer

__all__ = ["read_at", "write_at"]

_position = threading.Lock()
"""Held while a file's own position is used."""


def read_at(fd: int, nbytes: int, offset: int) -> bytes:
    """At most ``nbytes`` bytes from a position of a file; none at its end.

    Raises:
        OSError: it could not be read.
    """
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def write_at(fd: int, data: Buffer, offset: int) -> None:
    """Write all of the data at a position of a file.

    Raises:
        OSError: it could not be written.
    """
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            written = os.pwrite(fd, view, offset)
        else:
            with _position:
                os.lseek(fd, offset, os.SEEK_SET)
                written = os.write(fd, view)
        view, offset = view[written:], offset + written
