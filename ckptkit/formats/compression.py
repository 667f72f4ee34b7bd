"""Files that are compressed as a whole.

They are identified by their first bytes, whatever their names, and decompressed once, into a temporary file:

- gzip (RFC 1952): consecutive members; zeros may follow the last
- xz (``xz-file-format.txt``): streams, with zeros in fours between and after them
- bzip2: consecutive streams
- zstd (RFC 8878): frames, some of which are skipped; Python 3.14 reads them, older versions need the package zstandard

Each has checksums or lengths, which are checked.  Data that is truncated, damaged or followed by something else is
refused, and so is data that grows too many times (`Limits.unpacked_ratio`).
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, Source
from ckptkit.computed import spooled
from ckptkit.errors import AmbiguousError, CorruptError, LimitError, MissingDependencyError, UnsupportedError
from ckptkit.extras import require
from ckptkit.formats.shards import name_of
from ckptkit.formats.sources import Inner, room_for
from ckptkit.limits import Limits
from ckptkit.startup import dataclass

__all__ = ["ENDINGS", "FRAME_NBYTES", "PACKED_PICKLES", "Compression", "compression_of", "decompressed"]

_PACKED_NBYTES = 256 << 10
"""Bytes that are given to a decompressor at a time."""

FRAME_NBYTES = 8 << 10
"""The same if the size of the result has no bound: zstd makes at most 32,768 bytes of one (RFC 8878, RLE_Block)."""

_MEMORY_NBYTES = 256 << 20
"""Memory that a decompressor may use for its window: xz -9 uses 65 MiB, zstd --long 128 MiB."""


class _Zlib:
    """A gzip member, or a stream of zlib's, with the attributes that Python's other decompressors have."""

    def __init__(self, *, is_gzip: bool = True) -> None:
        self._stream = zlib.decompressobj(16 * is_gzip + zlib.MAX_WBITS)
        self.needs_input, self.eof, self.unused_data = True, False, b""

    def decompress(self, data: bytes, most: int) -> bytes:
        part = self._stream.decompress(self._stream.unconsumed_tail + data, most)
        self.needs_input = not self._stream.unconsumed_tail and len(part) < most
        self.eof, self.unused_data = self._stream.eof, self._stream.unused_data
        return part


class _Zstandard:
    """The same of a frame of zstd, by the package zstandard."""

    def __init__(self) -> None:
        require("zstandard")
        package = importlib.import_module("zstandard")
        self._stream: Any = package.ZstdDecompressor(max_window_size=_MEMORY_NBYTES // 2).decompressobj()
        self._data = b""
        self.needs_input, self.eof, self.unused_data = True, False, b""

    def decompress(self, data: bytes, most: int) -> bytes:
        self._data += data
        part: bytes = self._stream.decompress(self._data[:FRAME_NBYTES])
        self._data = self._data[FRAME_NBYTES:]
        self.needs_input, self.eof = not self._data, bool(self._stream.eof)
        self.unused_data = self._stream.unused_data + self._data
        return part


def _standard(name: str) -> Any:
    """A module of Python's own that a Python build can lack."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"this Python cannot decompress such files: {error}", name=name) from None


def _lzma(form: str) -> Any:
    lzma = _standard("lzma")
    return lzma.LZMADecompressor(getattr(lzma, form), memlimit=_MEMORY_NBYTES)


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        zstd = _standard("compression.zstd")
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})
    return _Zstandard()


@dataclass(frozen=True, slots=True)
class Compression:
    """A way of compressing.

    Attributes:
        name: its name in messages.
        endings: of what is compressed so.
        begins: how it begins, and whatever follows what is complete.
        stream: a new decompressor, as those of the module ``bz2``.
        padding: the unit of zeros that may follow it; 0: none may.
        is_padded_between: whether more may follow them.
    """

    name: str
    endings: tuple[str, ...]
    begins: re.Pattern[bytes]
    stream: Callable[[], Any]
    padding: int = 0
    is_padded_between: bool = False

    def parts(self, file: Source, limits: Limits) -> Iterator[bytes]:
        """The bytes as they are decompressed.

        Raises:
            CorruptError: they are damaged, cut off, or followed by something else.
            LimitError: they are many times what they were.
            UnsupportedError: it would take too much memory.
        """
        allowed = room_for(file, limits)
        at = made = zeros = 0
        data, stream, is_first = b"", None, True
        while True:
            if not data and (stream is None or stream.needs_input):
                data = file.read(at, min(_PACKED_NBYTES, file.size - at))
                at += len(data)
                if not data:
                    break
            if stream is None:
                bare = data if is_first else data.lstrip(b"\0")
                zeros, data = zeros + len(data) - len(bare), bare
                if not data:
                    continue
                is_apart = zeros and not (self.is_padded_between and zeros % self.padding == 0)
                if is_apart or not self.begins.match(data + file.read(at, min(8, file.size - at))):
                    raise self._followed(at - len(data))
                stream, is_first, zeros = self.stream(), False, 0
            part = self._made(stream, data, made)
            data, made = b"", made + len(part)
            if made > allowed:
                raise LimitError(f"bytes of {self.name}-compressed data", limit=allowed, actual=made)
            yield part
            if stream.eof:
                data, stream = stream.unused_data, None
        if stream is not None:
            raise CorruptError(
                f"truncated: the {self.name} data continues past the file's {file.size:,} bytes, which decompress "
                f"to {made:,}. Download or copy the file again"
            )
        if zeros and (not self.padding or zeros % self.padding):
            raise self._followed(file.size - zeros)

    def _made(self, stream: Any, data: bytes, made: int) -> bytes:
        errors: tuple[type[Exception], ...] = (zlib.error, OSError, ValueError, EOFError, MemoryError, *_errors())
        try:
            part: bytes = stream.decompress(data, CHUNK_NBYTES)
        except errors as error:
            told = f"{self.name}-compressed, and damaged after {made:,} decompressed bytes"
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                told = f"{self.name}-compressed in a way that takes more than {_MEMORY_NBYTES:,} bytes of memory"
                raise UnsupportedError(f"{told}; decompress it first") from None
            raise CorruptError(f"{told}: {error}. Download or copy the file again") from None
        return part

    def _followed(self, at: int) -> AmbiguousError:
        return AmbiguousError(
            f"other bytes follow the {self.name} data: some readers stop before them, others do not", offset=at
        )


def _errors() -> Iterator[type[Exception]]:
    """The errors of the decompressors imported by now."""
    for module, name in (("lzma", "LZMAError"), ("zstandard", "ZstdError"), ("compression.zstd", "ZstdError")):
        if module in sys.modules:
            yield getattr(sys.modules[module], name)


_COMPRESSIONS = (
    Compression("gzip", (".gz", ".tgz"), re.compile(rb"\x1f\x8b\x08"), _Zlib, 1),
    Compression("xz", (".xz", ".txz"), re.compile(rb"\xfd7zXZ\0"), lambda: _lzma("FORMAT_XZ"), 4, True),
    Compression("bzip2", (".bz2", ".tbz2"), re.compile(rb"BZh[1-9]"), lambda: _standard("bz2").BZ2Decompressor()),
    Compression("zstd", (".zst", ".tzst"), re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd),
)

PACKED_PICKLES = (
    *_COMPRESSIONS,
    Compression("zlib", (), re.compile(rb"\x78[\x01\x5e\x9c\xda]"), lambda: _Zlib(is_gzip=False)),
    Compression("lzma", (), re.compile(rb"\x5d\0\0"), lambda: _lzma("FORMAT_ALONE")),
)
"""joblib's compressions: two more, whose first bytes are not enough to identify a file."""

ENDINGS = tuple(ending for compression in _COMPRESSIONS for ending in compression.endings)
"""Of compressed files; they never decide what a file is."""


def compression_of(head: bytes, among: Sequence[Compression] = _COMPRESSIONS) -> Compression | None:
    """How a file with these first bytes is compressed."""
    return next((each for each in among if each.begins.match(head)), None)


def decompressed(file: Source, compression: Compression, limits: Limits) -> Inner:
    """The decompressed content of a file; it is closed with the file.

    Raises:
        As `Compression.parts`; MissingDependencyError; FileAccessError: the temporary folder has no room for it.
    """
    file.will_read([(0, file.size)])
    area = spooled(compression.parts(file, limits), None, file, f"is {compression.name}-compressed, and takes")
    stem, ending = os.path.splitext(name_of(file))
    name = stem if ending.lower() in compression.endings else name_of(file)
    return Inner(file.path, area, file, name=name, folder=file.folder, sibling=file.sibling)
