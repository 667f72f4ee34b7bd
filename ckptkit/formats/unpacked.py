"""An unpacked torch archive: each record is a separate file below one folder.

``folder/data.pkl`` with ``folder/data/0``, … and ``version`` or ``byteorder`` beside it is what unzip makes of a
torch-zip (`ckptkit.formats.torch_archive` says what else such archives hold).  The folder and its ``data.pkl``
represent all of it.  It is read like the archive: the files one after the other, in the order of their names,
``data.pkl`` first, are the bytes of one `Source`, in which each record has a place.

Regular files count, and links that lead to some inside the folder.  Nothing outside it is read: a link that leads out
is an error.  A file's size and time when the folder was listed must be the same when it is read.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from ckptkit.bytesource import Source, read_at
from ckptkit.errors import AmbiguousError, CorruptError, FileAccessError, LimitError
from ckptkit.formats.zip_records import Records
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.places import is_url
from ckptkit.shell import quoted

__all__ = ["UnpackedSource", "is_unpacked", "packing_of", "unpacked_source"]

_PICKLE = "data.pkl"

_OPEN = 64
"""Files that are kept open: a model may have thousands of records, and a process some hundred descriptors."""

_Stamp = tuple[int, int, int, int]


def is_unpacked(folder: str) -> bool:
    """Whether a folder is an unpacked torch archive, with its pickle and the records that every writer adds."""
    if is_url(folder):
        return False
    beside = any(os.path.isfile(os.path.join(folder, name)) for name in ("version", "byteorder", ".data/version"))
    return beside and os.path.isfile(os.path.join(folder, _PICKLE)) and os.path.isdir(os.path.join(folder, "data"))


def packing_of(folder: str) -> str | None:
    """What to say about a folder with the records of a torch archive; ``None``: it has none."""
    if is_url(folder):
        return None

    def holds(*names: str) -> bool:
        return any(os.path.lexists(os.path.join(folder, name)) for name in names)

    if not holds("version", "byteorder", "data") or not holds("data.pkl", ".data", "archive_format"):
        return None
    above, name = os.path.split(os.path.abspath(folder))
    # Not python -m zipfile: unzip gives torch's records the date they have, which is before 1980, and that refuses it.
    command = f"cd {quoted(above)} && zip -0 -r {quoted(f'{name}.pth')} {quoted(name)}"
    return f"a torch archive that was unpacked; pack it again, stored: {command}"


def unpacked_source(path: str) -> UnpackedSource | None:
    """What contains the bytes of an archive that was unpacked, by its folder or its pickle; ``None``: it is not one.

    Raises:
        FileAccessError: the folder cannot be read.
        AmbiguousError: a link leads out of it.
        LimitError: it has more files than any archive.
    """
    if is_url(path):
        return None
    folder = path
    if os.path.basename(path) == _PICKLE:
        folder = os.path.dirname(path) or os.curdir
    elif not os.path.isdir(path):
        return None
    return UnpackedSource(path, folder) if is_unpacked(folder) else None


class UnpackedSource(Source):
    """The files of a folder, one after the other.

    Args:
        path: what messages call it: the folder, or the pickle in it.
        folder: the folder.

    Raises:
        As `unpacked_source`.
    """

    __slots__ = ("_begins", "_files", "_folder", "_names", "_opened")
    identity: tuple[_Stamp, ...]

    def __init__(self, path: str, folder: str) -> None:
        super().__init__(path, 0)
        self._opened: dict[int, int] = {}
        self._folder = os.path.realpath(folder)
        found = sorted(self._listed(), key=lambda file: (file[0] != _PICKLE, file[0]))
        self._names = [name for name, _ in found]
        self.identity = tuple(seen for _, seen in found)
        *self._begins, self.size = accumulate((seen[2] for seen in self.identity), initial=0)

    def records(self) -> Records:
        """The files as the records of the archive."""
        root = os.path.basename(self._folder) or "archive"
        sizes, none = [seen[2] for seen in self.identity], [0] * len(self._names)
        names = [f"{root}/{name}" for name in self._names]
        return Records(self.whole, names, self._begins, sizes, sizes, none, none)

    def _listed(self) -> Iterator[tuple[str, _Stamp]]:
        """Every file: its path below the folder, with slashes, and its stamp."""
        count, below = 0, [""]
        while below:
            inside = below.pop()
            try:
                with os.scandir(os.path.join(self._folder, inside)) as entries:
                    for entry in entries:
                        count += 1
                        if count > DEFAULT_LIMITS.entries:
                            raise LimitError("files in a folder", limit=DEFAULT_LIMITS.entries, actual=count)
                        name = f"{inside}/{entry.name}" if inside else entry.name
                        status = self._status(entry, name)
                        if stat.S_ISDIR(status.st_mode):
                            below.append(name)
                        elif stat.S_ISREG(status.st_mode):
                            yield name, _stamp(status)
            except OSError as error:
                raise FileAccessError(f"{self.path}: the folder cannot be read: {error.strerror}") from error

    def _status(self, entry: os.DirEntry[str], name: str) -> os.stat_result:
        """The kind of an entry; for a link that of its target, unless that is a folder."""
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            return status
        if os.path.commonpath((self._folder, os.path.realpath(entry.path))) != self._folder:
            raise AmbiguousError(f"{name!r:.200} is a link that leads out of the folder; ckptkit does not follow it")
        behind = os.stat(entry.path)
        return status if stat.S_ISDIR(behind.st_mode) else behind

    def _some(self, offset: int, nbytes: int) -> bytes:
        number = bisect_right(self._begins, offset) - 1
        start = offset - self._begins[number]
        wanted = min(nbytes, self.identity[number][2] - start)
        try:
            with self._lock:
                return read_at(self._descriptor(number), wanted, start)
        except OSError as error:
            raise FileAccessError(f"{self.path}: {self._names[number]} cannot be read: {error.strerror}") from error

    def _descriptor(self, number: int) -> int:
        if number not in self._opened:
            if len(self._opened) >= _OPEN:
                os.close(self._opened.pop(next(iter(self._opened))))
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
            fd = self._opened[number] = os.open(os.path.join(self._folder, *self._names[number].split("/")), flags)
            if _stamp(os.fstat(fd)) != self.identity[number]:
                raise CorruptError(f"{self._names[number]!r:.200} was changed while it was being read", path=self.path)
        return self._opened[number]

    def stamp(self) -> tuple[_Stamp, ...]:
        """As `identity`, by now."""
        try:
            return tuple(_stamp(os.stat(os.path.join(self._folder, name))) for name in self._names)
        except OSError:
            return ()

    def release(self) -> None:
        """As `Source.release`."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        self.release()


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
