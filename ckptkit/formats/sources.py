"""Sources other than local files: a part of another source, open files, bytes, stdin.

Each is a separate `ckptkit.bytesource.Source`; nothing else knows the difference.  The position of a given open file
does not change, unless it can only be read from beginning to end: then it is read to its end.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, Source, SourceFile
from ckptkit.computed import Held, spooled
from ckptkit.errors import (
    FileAccessError,
    MissingFileError,
)  # fmt: skip
from ckptkit.formats.format import Around
from ckptkit.limits import Limits

__all__ = ["Inner", "opened", "room_for", "standard_input"]


class Inner(Source):
    """A file inside another source: a range of it, or of the temporary file into which it was decompressed.

    Args:
        path: what messages call it.
        area: the range of its bytes.
        outer: the source around it, which is asked whether it has changed.
        name: its own path, with slashes, the ending of what it is compressed with left out.
        owns: whether ``outer`` is closed with it.
        folder: the local folder it is in.
        sibling: gives the source of a name beside it.

    Attributes:
        area, name: as above.
        crc32: that an archive records for it, as long as its bytes were not checked against it.
        around: the source it was found in, if that is not the given one.
    """

    __slots__ = ("_folder", "_outer", "_owns", "_sibling", "area", "around", "crc32", "is_far", "name")

    def __init__(
        self,
        path: str,
        area: ByteRange,
        outer: Source,
        *,
        name: str,
        owns: bool = True,
        folder: str | None = None,
        sibling: Callable[[str], Source] | None = None,
    ) -> None:
        super().__init__(path, area.nbytes, outer.identity)
        self._outer, self._owns, self._folder, self._sibling = outer, owns, folder, sibling
        self.area, self.name, self.is_far = area, name, area.file.is_far
        self.around: Around | None = None
        self.crc32: int | None = None

    def _some(self, offset: int, nbytes: int) -> bytes:
        return self.area.read(offset, nbytes)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`, without allocating memory."""
        if self._closed or offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        self.area.file.read_into(self.area.offset + offset, buffer)

    def views(self, offset: int, nbytes: int) -> Iterator[bytes | memoryview]:
        """As `Source.views`."""
        if self._closed or offset < 0 or offset + nbytes > self.size:
            self.read(offset, nbytes)  # raises
        return self.area.file.views(self.area.offset + offset, nbytes)

    def will_read(
        self, areas: Sequence[tuple[int, int]], passing: Callable[[int, memoryview], object] | None = None
    ) -> None:
        """As `Source.will_read`."""
        begin = self.area.offset
        shifted = None if passing is None else lambda start, data: passing(start - begin, data)
        self.area.file.will_read(self._moved(areas), shifted)

    def located(self, area: ByteRange) -> ByteRange:
        """As `Source.located`."""
        if self._closed:
            self._require_open()
        return self.area.file.located(self.area.part(area.offset, area.nbytes))

    def _moved(self, areas: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(self.area.offset + offset, nbytes) for offset, nbytes in areas]

    def on_read(self, offset: int, nbytes: int, check: Callable[[bytes], object]) -> bool:
        """As `Source.on_read`."""
        return self.area.file.on_read(self.area.offset + offset, nbytes, check)

    @property
    def left(self) -> int:
        """As `Source.left`."""
        return self.area.file.left

    def settle(self, areas: Sequence[tuple[int, int]] | None = None) -> None:
        """As `Source.settle`; its outer source is checked, too."""
        super().settle(areas)
        self.area.file.settle(None if areas is None else self._moved(areas))
        if areas is None and self.area.file is not self._outer:
            self._outer.settle()

    def stamp(self) -> object:
        """As `Source.stamp`: that of what it is in."""
        return self._outer.stamp()

    def sibling(self, name: str) -> Source:
        """As `Source.sibling`: another member of the archive."""
        return super().sibling(name) if self._sibling is None else self._sibling(name)

    @property
    def folder(self) -> str | None:
        """As `Source.folder`."""
        return self._folder

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        if self._owns:
            self._outer.close()


def room_for(file: Source, limits: Limits) -> int:
    """Bytes that what is in a file may become, however deep: by the size of the outermost one."""
    while isinstance(file, Inner):
        file = file._outer
    return max(limits.unpacked_nbytes, limits.unpacked_ratio * file.size)


class _OpenFile(SourceFile):
    """A regular file that the caller opened, through our own descriptor."""

    __slots__ = ("_has_name",)
    _has_name: bool

    @classmethod
    def of(cls, descriptor: int, name: object) -> _OpenFile:
        path = name if isinstance(name, str) and name else "<file>"
        file = cls.of_descriptor(os.dup(descriptor), path)
        try:
            has_name = path is name and os.path.samestat(os.stat(path), os.fstat(descriptor))
        except (OSError, ValueError):
            has_name = False
        made = cast("_OpenFile", file)
        made._has_name = has_name
        return made

    @property
    def folder(self) -> str | None:  # type: ignore[override]  # without its name nothing is known of it
        return super().folder if self._has_name else None

    def sibling(self, name: str) -> SourceFile:
        if not self._has_name:
            raise MissingFileError(
                f"{self.path}: an open file has no folder, so there is no {name!r} beside it", path=self.path
            )
        return super().sibling(name)

    def release(self) -> None:
        if self._closed:  # a file that was opened without a name cannot be opened again
            super().release()


class _Seekable(Source):
    """A file that someone else opened, read by position; its position does not change."""

    __slots__ = ("_begin", "_file")

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._begin = file, file.tell()
        file.seek(0, os.SEEK_END)
        end = file.tell()
        file.seek(self._begin)
        super().__init__(path, max(0, end - self._begin))

    def _some(self, offset: int, nbytes: int) -> bytes:
        with self._lock:
            try:
                before = self._file.tell()
                self._file.seek(self._begin + offset)
                data = self._file.read(nbytes)
                self._file.seek(before)
            except (OSError, ValueError) as error:
                raise FileAccessError(f"{self.path}: cannot be read: {error}", path=self.path) from error
        return _binary(data, self.path)


_REREADING = frozenset(("gzip", "bz2", "lzma", "zipfile", "tarfile", "compression", "zstandard"))
"""Modules whose files say that they can seek, and begin again to go back."""


def opened(file: Any) -> Source:
    """The source of an open binary file from its present position to its end, or of bytes.

    Raises:
        FileAccessError: it is neither, or opened as text.
    """
    path = _path_of(file)
    if isinstance(file, io.TextIOBase):
        raise FileAccessError(f"{path}: is open as text; open it in binary mode: open(PATH, 'rb')", path=path)
    try:
        return Held(file, "<bytes>")
    except ValueError as error:  # a view that was released
        raise FileAccessError(f"<bytes>: cannot be read: {error}", path="<bytes>") from error
    except TypeError:
        pass
    if not callable(getattr(file, "read", None)):
        raise FileAccessError(f"{type(file).__name__} is not a path, an open binary file or bytes")
    temporary = getattr(sys.modules.get("tempfile"), "_TemporaryFileWrapper", ())
    inner = file.file if isinstance(file, temporary) else file
    raw = inner.raw if isinstance(inner, (io.BufferedReader, io.BufferedRandom)) else inner
    try:
        if isinstance(file, io.BytesIO):  # whose value shares its bytes, and does not prevent writing to it
            return Held(memoryview(file.getvalue())[file.tell() :], "<BytesIO>")
        if isinstance(raw, io.FileIO) and stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            if inner.writable():
                inner.flush()
            whole, begin = _OpenFile.of(raw.fileno(), getattr(file, "name", None)), inner.tell()
            if not begin:
                return whole
            area = whole.whole.part(min(begin, whole.size), max(0, whole.size - begin))
            return Inner(path, area, whole, name=path)
        is_seekable = getattr(file, "seekable", bool)()
        if is_seekable and type(file).__module__.partition(".")[0] not in _REREADING:
            return _Seekable(file, path)
    except (OSError, ValueError) as error:  # closed, or not open for reading
        raise FileAccessError(f"{path}: cannot be read: {error}", path=path) from error
    holder = Source(path, 0)
    return Inner(path, _spooled_stream(file, holder), holder, name=path)


def _path_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) and name else "<file>"


def _binary(data: object, path: str) -> bytes:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        what = "returns text; open it in binary mode" if isinstance(data, str) else "does not return bytes"
        raise FileAccessError(f"{path}: {what}", path=path)
    return bytes(data)


def _spooled_stream(file: Any, holder: Source) -> ByteRange:
    """The rest of an open file, in the temporary file of a source."""

    def parts() -> Iterator[bytes]:
        while True:
            try:
                data = _binary(file.read(CHUNK_NBYTES), holder.path)
            except (OSError, ValueError, EOFError) as error:
                if isinstance(error, FileAccessError):
                    raise
                raise FileAccessError(f"{holder.path}: cannot be read: {error}", path=holder.path) from error
            if not data:
                return
            yield data

    area = spooled(parts(), None, holder, "is read from beginning to end, and takes")
    holder.size = area.nbytes
    return area


_read: tuple[object, ByteRange, Source] | None = None
"""Standard input that was read: which one, where its bytes are, and whose temporary file that is."""


def standard_input() -> Source:
    """The input piped into this process; read once, however often it is requested.

    Raises:
        FileAccessError: nothing is, or it cannot be read.
    """
    global _read
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise FileAccessError("-: there is no standard input", path="-")
    if stream.isatty():
        raise FileAccessError("-: standard input is a terminal; pipe a checkpoint into it", path="-")
    if _read is None or _read[0] is not stream:
        try:
            is_regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        except (OSError, ValueError):
            is_regular = False
        if is_regular:
            file = opened(stream)
            file.path = "-"
            return file
        holder = Source("-", 0)
        _read = stream, _spooled_stream(stream, holder), holder
    return Inner("-", _read[1], _read[2], name="-", owns=False)
