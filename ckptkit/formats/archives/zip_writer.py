"""A layout for writing ZIP archives as torch does: stored records, aligned data, zip64 where needed.

The format is described in `ckptkit.formats.archives.zip_archive`.  Sizes stand in the local headers, so no
data descriptors follow; checksums that are not known beforehand are filled in by the plan.
"""

from __future__ import annotations

import zlib
from struct import pack

from ckptkit.derived import ByteSource
from ckptkit.formats.archives.zip_archive import CENTRAL, LOCAL, LOCAL_SIGNATURE, STORED, UTF8
from ckptkit.formats.archives.zip_end import END, END64, LOCATOR, MAX16, MAX32
from ckptkit.plan import Checksum, Literal, Step, moved

__all__ = ["ALIGNMENT", "ZipWriter"]

ALIGNMENT = 64
"""torch aligns every record's data to this many bytes, by padding the local header's extra field."""

_DOS_DATE = 0x0021  # 1 January 1980, the first date the format can express


class ZipWriter:
    """Lays out an archive of stored records as torch does: aligned data, zip64 where needed.

    Adding a record only plans it; `finish` gives the steps and the size.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._steps: list[Step] = []
        self._checksums: list[Checksum] = []
        self._central: list[tuple[bytes, int | None, int, int]] = []  # name, crc, size, header offset
        self._data_at: list[int] = []
        self._pos = 0

    def add_literal(self, name: str, data: bytes, *, is_final: bool = True) -> None:
        """Plan a record of bytes that are at hand; not final are those in which something is filled in later."""
        target = self._header(name, len(data), zlib.crc32(data) if is_final else None)
        self._steps.append(Literal(target, data))

    def add_copy(self, name: str, source: ByteSource, crc32: int | None) -> int:
        """Plan a record that is copied, and return where its data will lie.

        Args:
            name: below the root.
            source: the bytes.
            crc32: of exactly these bytes where it is known; ``None``: computed from the output.
        """
        target = self._header(name, source.nbytes, crc32)
        if source.nbytes:
            self._steps.append(moved(target, source))
        return target

    def _header(self, name: str, nbytes: int, crc: int | None) -> int:
        """Plan a local header at the current position; returns where the data begins."""
        raw = f"{self._root}/{name}".encode()
        at = self._pos
        wide = nbytes >= MAX32
        extra = pack("<HHQQ", 1, 16, nbytes, nbytes) if wide else b""
        data_at = at + LOCAL.size + len(raw) + len(extra) + 4  # 4: tag and length of the padding
        padding = -data_at % ALIGNMENT
        extra += b"FB" + pack("<H", padding) + b"Z" * padding
        size = MAX32 if wide else nbytes
        header = LOCAL.pack(
            LOCAL_SIGNATURE,
            45 if wide else 20,
            UTF8,
            STORED,
            0,
            _DOS_DATE,
            crc or 0,
            size,
            size,
            len(raw),
            len(extra),
        )
        self._steps.append(Literal(at, header + raw + extra))
        data_at += padding
        if crc is None and nbytes:
            self._checksums.append(Checksum(at + 14, data_at, nbytes))
        self._central.append((raw, crc if nbytes else 0, nbytes, at))
        self._data_at.append(data_at)
        self._pos = data_at + nbytes
        return data_at

    def finish(self) -> tuple[tuple[Step, ...], int]:
        """The steps, checksums last, and the size in bytes of the archive."""
        start = self._pos
        directory = bytearray()
        for (raw, crc, nbytes, at), data_at in zip(self._central, self._data_at, strict=True):
            wide = [value for value in (nbytes, nbytes, at) if value >= MAX32]
            extra = pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            if crc is None:
                self._checksums.append(Checksum(start + len(directory) + 16, data_at, nbytes))
            size, offset = min(nbytes, MAX32), min(at, MAX32)
            version = 45 if wide else 20
            directory += CENTRAL.pack(
                b"PK\x01\x02", version, version, UTF8, STORED, 0, _DOS_DATE, crc or 0,
                size, size, len(raw), len(extra), 0, 0, 0, 0, offset,
            )  # fmt: skip
            directory += raw + extra
        nbytes, count, end_at = len(directory), len(self._central), start + len(directory)
        if count >= MAX16 or nbytes >= MAX32 or start >= MAX32:
            directory += END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, nbytes, start)
            directory += LOCATOR.pack(b"PK\x06\x07", 0, end_at, 1)
        directory += END.pack(
            b"PK\x05\x06", 0, 0, min(count, MAX16), min(count, MAX16), min(nbytes, MAX32), min(start, MAX32), 0
        )
        self._steps.append(Literal(start, bytes(directory)))
        return (*self._steps, *self._checksums), start + len(directory)
