"""What a checkpoint may be read from beside a local file: what lies inside another source, open files, bytes, stdin.

Each is a `ckptkit.bytesource.Source` of its own; nothing else knows the difference.  The position of a file that is
given open stays where it was, unless it can only be read from beginning to end: that one is read to its end.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, Source, SourceFile
from ckptkit.checkpoint import GlobalUse
from ckptkit.computed import spooled
from ckptkit.errors import FileAccessError, MissingFileError
from ckptkit.report import Finding

__all__ = ["STDIN", "Around", "Held", "Inner", "around_of", "given_of", "name_of", "opened", "standard_input"]

STDIN = "-"
"""The path that means standard input; a file of that name is ``./-``."""


@dataclass(frozen=True, slots=True)
class Around:
    """What a checkpoint was found in.

    Attributes:
        given: the file that was given: one that is compressed, or an archive.
        findings: what is to be told of the way.
        uses: the names in the pickles beside it, and what could not be looked into.
        has_pickle: whether there may be any.
        where: the way, for messages.
    """

    given: Source
    findings: tuple[Finding, ...]
    uses: tuple[GlobalUse, ...]
    has_pickle: bool
    where: str


class Inner(Source):
    """A file inside another source: a range of it, or of the temporary file in which it was decompressed.

    Args:
        path: what messages call it.
        area: where its bytes lie.
        outer: what it lies in, which is asked whether it has changed.
        name: its own path, with slashes, the ending of what it is compressed with left out.
        owns: whether ``outer`` is closed with it.
        folder: the local folder it lies in.
        sibling: gives the source of a name beside it.

    Attributes:
        area, name: as above.
        around: what it was found in, where it is not what was given.
    """

    __slots__ = ("_folder", "_outer", "_owns", "_sibling", "area", "around", "name")

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
        self.area, self.name = area, name
        self.around: Around | None = None

    def _some(self, offset: int, nbytes: int) -> bytes:
        return self.area.read(offset, nbytes)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`; no memory is taken for the bytes."""
        if self._closed or offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        self.area.file.read_into(self.area.offset + offset, buffer)

    def located(self, area: ByteRange) -> ByteRange:
        """As `Source.located`."""
        if self._closed:
            self._require_open()
        return self.area.file.located(self.area.part(area.offset, area.nbytes))

    def stamp(self) -> object:
        """As `Source.stamp`: that of what it lies in."""
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


def given_of(file: Source) -> Source:
    """The file that was given, where a source is what was found in it."""
    around = around_of(file)
    return file if around is None else around.given


def around_of(file: Source) -> Around | None:
    """What a source was found in, where it is not what was given."""
    return file.around if isinstance(file, Inner) else None


def name_of(file: Source) -> str:
    """The path of a source by which it is known: of what lies in another, without how that is compressed."""
    return file.name if isinstance(file, Inner) else file.path


class Held(Source):
    """Bytes in memory that are read like a file; they are not copied.

    Args:
        data: whatever gives its bytes as a buffer; it cannot be resized until this is closed.
        path: what messages call it.

    Raises:
        FileAccessError: they do not lie one behind the other.
    """

    __slots__ = ("_data",)

    def __init__(self, data: Any, path: str) -> None:
        view = memoryview(data)
        if not view.c_contiguous:
            raise FileAccessError(f"{path}: a view with gaps, which is not the content of a file")
        self._data = view.cast("B")
        super().__init__(path, self._data.nbytes)

    def _some(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._data[offset : offset + nbytes])

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`; no memory is taken for the bytes."""
        if self._closed or offset < 0 or offset + len(buffer) > self.size:
            self.read(offset, len(buffer))  # raises
        memoryview(buffer)[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        """As `Source.close`; whoever holds the bytes may resize them again."""
        super().close()
        self._data.release()


class _OpenFile(SourceFile):
    """A regular file that somebody else opened, by a descriptor of our own."""

    __slots__ = ("_has_name",)

    @classmethod
    def of(cls, descriptor: int, name: object) -> _OpenFile:
        path = name if isinstance(name, str) and name else "<file>"
        file = cls.of_descriptor(os.dup(descriptor), path)
        try:
            has_name = path is name and os.path.samestat(os.stat(path), os.fstat(descriptor))
        except (OSError, ValueError):
            has_name = False
        file._has_name = has_name  # type: ignore[attr-defined]  # it is of this class
        return file  # type: ignore[return-value]

    @property
    def folder(self) -> str | None:  # type: ignore[override]  # without its name nothing is known of it
        return super().folder if self._has_name else None

    def sibling(self, name: str) -> SourceFile:
        if not self._has_name:
            raise MissingFileError(f"{self.path}: nothing is known of what lies beside an open file, {name!r} neither")
        return super().sibling(name)

    def release(self) -> None:
        if self._closed:  # what was opened by nobody's name cannot be opened again
            super().release()


class _Seekable(Source):
    """A file of somebody else's making that is read by position, in which it then stands where it stood."""

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
                raise FileAccessError(f"{self.path}: cannot be read: {error}") from error
        return _binary(data, self.path)


_REREADING = frozenset(("gzip", "bz2", "lzma", "zipfile", "tarfile", "compression", "zstandard"))
"""Modules whose files say that they can seek, and begin anew to go back."""


def opened(file: Any) -> Source:
    """The source of an open binary file from its present position to its end, or of bytes.

    Raises:
        FileAccessError: it is neither, or opened as text.
    """
    path = _path_of(file)
    if isinstance(file, io.TextIOBase):
        raise FileAccessError(f"{path}: is open as text; open it in binary mode: open(PATH, 'rb')")
    with contextlib.suppress(TypeError):
        return Held(file, "<bytes>")
    if not callable(getattr(file, "read", None)):
        raise FileAccessError(f"a {type(file).__name__} is not the path of a file, an open binary file or bytes")
    temporary = getattr(sys.modules.get("tempfile"), "_TemporaryFileWrapper", ())
    inner = file.file if isinstance(file, temporary) else file
    raw = inner.raw if isinstance(inner, (io.BufferedReader, io.BufferedRandom)) else inner
    try:
        if isinstance(file, io.BytesIO):  # whose value shares its bytes, and keeps nobody from writing to it
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
        raise FileAccessError(f"{path}: cannot be read: {error}") from error
    holder = Source(path, 0)
    return Inner(path, _spooled_stream(file, holder), holder, name=path)


def _path_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) and name else "<file>"


def _binary(data: object, path: str) -> bytes:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        what = "gives text; open it in binary mode" if isinstance(data, str) else "gives no bytes"
        raise FileAccessError(f"{path}: {what}")
    return bytes(data)


def _spooled_stream(file: Any, holder: Source) -> ByteRange:
    """What an open file gives from here to its end, in the temporary file of a source."""

    def parts() -> Iterator[bytes]:
        while True:
            try:
                data = _binary(file.read(CHUNK_NBYTES), holder.path)
            except (OSError, ValueError, EOFError) as error:
                if isinstance(error, FileAccessError):
                    raise
                raise FileAccessError(f"{holder.path}: cannot be read: {error}") from error
            if not data:
                return
            yield data

    return spooled(parts(), None, holder, "is read from beginning to end, and takes")


_read: tuple[object, ByteRange, Source] | None = None
"""Standard input that was read: which one, where its bytes are, and whose temporary file that is."""


def standard_input() -> Source:
    """What is piped into this process; read once, however often it is asked for.

    Raises:
        FileAccessError: nothing is, or it cannot be read.
    """
    global _read
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise FileAccessError(f"{STDIN}: there is no standard input")
    if stream.isatty():
        raise FileAccessError(f"{STDIN}: standard input is a terminal; pipe a checkpoint into it: cat FILE | ckptkit ...")
    if _read is None or _read[0] is not stream:
        try:
            is_regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        except (OSError, ValueError):
            is_regular = False
        if is_regular:
            file = opened(stream)
            file.path = STDIN
            return file
        holder = Source(STDIN, 0)
        _read = stream, _spooled_stream(stream, holder), holder
    return Inner(STDIN, _read[1], _read[2], name=STDIN, owns=False)
