"""ZIP archives: the directory, read strictly.

Layout (PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5): records, each a local header and its data;
then the central directory, one header a record; then, where sizes need it, the zip64 end record
and its locator; then the end record.  The central directory counts: torch writes local headers
whose sizes and CRC are zero (flag bit 3, a data descriptor follows).  A record's data starts at
its local offset + 30 + *local* name length + *local* extra length.

Readers of one archive must all see the same records, so what they are known to disagree about is
refused: records equal but for case, a directory that does not end where the end record begins
(two archives end to end), a first record the directory does not list, local headers that contradict
central ones, records that overlap or have a second name, encryption and patch flags, absolute and
``..`` names, bytes after the end.

A CRC-32 of 0 with data behind it means "not recorded" (``set_crc32_options(False)`` in torch).
"""

from __future__ import annotations

import itertools
import re
import zlib
from dataclasses import dataclass
from struct import Struct

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.errors import CorruptError, LimitError, UnsupportedError
from ckptkit.limits import DEFAULT_LIMITS, Limits

__all__ = ["LOCAL_SIGNATURE", "Record", "read_directory", "read_record"]

LOCAL_SIGNATURE = b"PK\x03\x04"
"""First bytes of a record, and so of an archive."""

# The headers: of a record (APPNOTE 4.3.7), in the central directory (4.3.12), and the end records
# (4.3.16, 4.3.14, 4.3.15).
LOCAL = Struct("<4sHHHHHIIIHH")
CENTRAL = Struct("<4sHHHHHHIIIHHHHHII")
END = Struct("<4sHHHHIIH")
END64 = Struct("<4sQHHIIQQQQ")
LOCATOR = Struct("<4sIQI")

STORED, DEFLATED = 0, 8
UTF8 = 0x800
_HAS_DESCRIPTOR = 0x8
_REFUSED_FLAGS = {0x1: "encrypted", 0x20: "patched", 0x40: "strongly encrypted", 0x2000: "masked"}
_ANY_REFUSED_FLAG = sum(_REFUSED_FLAGS)
MAX32 = 0xFFFFFFFF
MAX16 = 0xFFFF
_ODD_NAME = re.compile(r"[\0\\]|^/|(?:^|/)\.\.(?:/|$)")
_ZIP64, _UNICODE_PATH = 1, 0x7075  # tags of extra fields

_WINDOW_NBYTES = 4096
"""Bytes read around a local header: one page, which costs no more than the header alone and holds
the headers of the small records that follow."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an archive.

    Attributes:
        name: full name, root folder included.
        data: its bytes as they lie in the file, deflated or not.
        nbytes: size once inflated.
        deflated: whether it is compressed.
        crc32: of the inflated bytes; ``None``: not recorded.
    """

    name: str
    data: ByteRange
    nbytes: int
    deflated: bool
    crc32: int | None


def read_directory(file: SourceFile, limits: Limits = DEFAULT_LIMITS) -> dict[str, Record]:
    """Every record by name, in directory order.

    Raises:
        CorruptError: truncated, ambiguous or contradictory; the message says which.
        UnsupportedError: encryption, patches or a compression method other than deflate.
        LimitError: too many records, or too large a directory.
    """
    offset, nbytes, count = _find_directory(file)
    if count > limits.entries:
        raise LimitError("records in an archive", limit=limits.entries, actual=count)
    if nbytes > limits.directory_nbytes:
        raise LimitError("bytes of a zip directory", limit=limits.directory_nbytes, actual=nbytes)
    directory = file.read(offset, nbytes)
    window = _Window(file)
    records: dict[str, Record] = {}
    folded: dict[str, str] = {}
    extents: list[tuple[int, int, str]] = []
    pos = 0
    for _ in range(count):
        if pos + CENTRAL.size > nbytes:
            raise CorruptError(f"the zip directory ends after {len(records)} of {count} records")
        record, header_offset, pos = _read_central(window, directory, pos, offset, limits)
        other = folded.setdefault(record.name.casefold(), record.name)
        if record.name in records or other != record.name:
            raise CorruptError(f"records {other!r} and {record.name!r} are equal, or equal but for case")
        records[record.name] = record
        extents.append((header_offset, record.data.offset + record.data.nbytes, record.name))
    if pos != nbytes:
        raise CorruptError(f"the zip directory holds {nbytes - pos:,} bytes more than its {count} records")
    extents.sort()
    if extents and extents[0][0] != 0:
        raise CorruptError("the file begins with a record that the zip directory does not list")
    for (_, end, name), (start, _, following) in itertools.pairwise(extents):
        if start < end:
            raise CorruptError(f"records {name!r} and {following!r} overlap")
    return records


class _Window:
    """Reads a few bytes here and there, mostly forwards, with few calls to the operating system."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.start = 0
        self.data = b""

    def read(self, offset: int, nbytes: int) -> bytes:
        start = offset - self.start
        if start < 0 or start + nbytes > len(self.data):
            self.data = self.file.read(offset, max(nbytes, min(_WINDOW_NBYTES, self.file.size - offset)))
            self.start, start = offset, 0
        return self.data[start : start + nbytes]


def _find_directory(file: SourceFile) -> tuple[int, int, int]:
    """Offset and size in bytes of the central directory, and its number of records."""
    tail_start = max(0, file.size - END.size - MAX16)
    tail = file.read(tail_start, file.size - tail_start)
    at = len(tail) - END.size
    if not tail.startswith(b"PK\x05\x06", max(at, 0)):  # a comment follows, or something is wrong
        at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise CorruptError(
            f"the file begins like a zip archive but has no end record in its last {len(tail):,} bytes "
            f"(size {file.size:,}): truncated download? Compare the size with the source's"
        )
    if at + END.size > len(tail) or at + END.size + END.unpack_from(tail, at)[7] != len(tail):
        raise CorruptError("the zip end record does not end the file: bytes were appended, or it is truncated")
    end_at = tail_start + at
    _, disk, start_disk, on_disk, count, nbytes, offset, _ = END.unpack_from(tail, at)
    ends_at = end_at
    locator_at = end_at - LOCATOR.size
    if locator_at >= 0 and (raw := file.read(locator_at, LOCATOR.size))[:4] == b"PK\x06\x07":
        end64_at = LOCATOR.unpack(raw)[2]
        if end64_at + END64.size > locator_at:
            raise CorruptError(f"the zip64 end record is said to lie at byte {end64_at:,}, past its locator")
        signature, nbytes_end64, _, _, _, _, on_disk64, count64, nbytes64, offset64 = END64.unpack(
            file.read(end64_at, END64.size)
        )
        if signature != b"PK\x06\x06" or end64_at + 12 + nbytes_end64 != locator_at:
            raise CorruptError(
                "the zip64 locator points at no zip64 end record, or not at the one before it: "
                "two archives laid end to end, or bytes cut out"
            )
        narrow = ((count, count64, MAX16), (nbytes, nbytes64, MAX32), (offset, offset64, MAX32))
        if any(small not in (wide, top) for small, wide, top in narrow):
            raise CorruptError("the zip end record and the zip64 end record disagree")
        count, nbytes, offset, on_disk, ends_at = count64, nbytes64, offset64, on_disk64, end64_at
    if disk not in (0, MAX16) or start_disk not in (0, MAX16) or on_disk != count:
        raise UnsupportedError("an archive in several volumes")
    if offset + nbytes != ends_at:
        raise CorruptError(
            f"the zip directory is said to end at byte {offset + nbytes:,}, its end record begins at {ends_at:,}: "
            "two archives laid end to end, or bytes cut out"
        )
    return offset, nbytes, count


def _read_central(
    window: _Window, directory: bytes, pos: int, directory_offset: int, limits: Limits
) -> tuple[Record, int, int]:
    """One record, the offset of its local header, and the position of the next central header."""
    (
        signature, _, _, flags, method, _, _, crc, packed, nbytes,
        name_nbytes, extra_nbytes, comment_nbytes, _, _, _, header_offset,
    ) = CENTRAL.unpack_from(directory, pos)  # fmt: skip
    if signature != b"PK\x01\x02":
        raise CorruptError("the zip directory holds something else than records", where="zip directory", offset=pos)
    end = pos + CENTRAL.size + name_nbytes + extra_nbytes + comment_nbytes
    if end > len(directory):
        raise CorruptError("a record's name or extra field leaves the zip directory", where="zip directory", offset=pos)
    raw_name = directory[pos + CENTRAL.size : pos + CENTRAL.size + name_nbytes]
    extra = directory[pos + CENTRAL.size + name_nbytes : end - comment_nbytes]
    name = _name(raw_name, flags, limits)
    if flags & _ANY_REFUSED_FLAG:
        what = next(what for flag, what in _REFUSED_FLAGS.items() if flags & flag)
        raise UnsupportedError(f"record {name!r} is {what}")
    if method not in (STORED, DEFLATED):
        raise UnsupportedError(f"record {name!r} uses compression method {method}; 0 and 8 are known")
    if extra or MAX32 in (nbytes, packed, header_offset):
        nbytes, packed, header_offset = _widened(extra, name, (nbytes, packed, header_offset))
    if method == STORED and packed != nbytes:
        raise CorruptError(f"record {name!r} is stored, yet {packed:,} bytes are said to be {nbytes:,}")
    data_offset = _data_offset(window, header_offset, raw_name, method, flags, (crc, packed, nbytes), name)
    if data_offset + packed > directory_offset:
        raise CorruptError(f"record {name!r} of {packed:,} bytes at {data_offset:,} reaches into the zip directory")
    return (
        Record(
            name=name,
            data=ByteRange(window.file, data_offset, packed),
            nbytes=nbytes,
            deflated=method == DEFLATED,
            crc32=crc if crc or not nbytes else None,
        ),
        header_offset,
        end,
    )


def _name(raw: bytes, flags: int, limits: Limits) -> str:
    if len(raw) > limits.name_nbytes:
        raise LimitError("length of a record's name", limit=limits.name_nbytes, actual=len(raw))
    try:
        name = raw.decode("utf-8" if flags & UTF8 or raw.isascii() else "cp437")
    except UnicodeDecodeError:
        raise CorruptError(f"a record's name is not UTF-8: {raw[:80]!r}") from None
    if _ODD_NAME.search(name) or not name:
        raise CorruptError(f"a record named {name[:80]!r}: absolute, empty, or leaving its folder")
    return name


def _widened(extra: bytes, name: str, fields: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size, packed size and offset, with those at 0xFFFFFFFF taken from the zip64 extra field.

    The wide values stand in this fixed order, and only those that did not fit are there.
    """
    pos = 0
    wide: bytes | None = None
    while pos + 4 <= len(extra):
        tag = int.from_bytes(extra[pos : pos + 2], "little")
        size = int.from_bytes(extra[pos + 2 : pos + 4], "little")
        if tag == _UNICODE_PATH:
            raise CorruptError(f"record {name!r} has a second name in its extra field; readers disagree about it")
        if tag == _ZIP64:
            wide = extra[pos + 4 : pos + 4 + size]
        pos += 4 + size
    if MAX32 not in fields:
        return fields
    if wide is None:
        raise CorruptError(f"record {name!r}: a size is said to be in a zip64 field that is not there")
    values = []
    for field in fields:
        if field == MAX32:
            if len(wide) < 8:
                raise CorruptError(f"record {name!r}: its zip64 field is too short")
            field, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        values.append(field)
    return values[0], values[1], values[2]


def _data_offset(
    window: _Window, at: int, raw_name: bytes, method: int, flags: int, sizes: tuple[int, int, int], name: str
) -> int:
    """Where the record's data begins, once the local header is known not to contradict the central one."""
    if at + LOCAL.size + len(raw_name) > window.file.size:
        raise CorruptError(f"record {name!r} is said to lie at byte {at:,} of a file of {window.file.size:,} bytes")
    header = window.read(at, LOCAL.size + len(raw_name))
    (
        signature, _, local_flags, local_method, _, _, crc, packed, nbytes, name_nbytes, extra_nbytes,
    ) = LOCAL.unpack_from(header)  # fmt: skip
    if signature != LOCAL_SIGNATURE:
        raise CorruptError(f"record {name!r}: no record begins at byte {at:,}")
    if name_nbytes != len(raw_name) or header[LOCAL.size :] != raw_name or local_method != method:
        raise CorruptError(f"record {name!r}: its own header gives another name or method than the directory")
    if (local_flags ^ flags) & ~(_HAS_DESCRIPTOR | UTF8) & 0xFFFF:
        raise CorruptError(f"record {name!r}: its own header gives other flags than the directory")
    if (crc, packed, nbytes) != sizes:
        for local, central, wide in zip((crc, packed, nbytes), sizes, (None, MAX32, MAX32), strict=True):
            later = local == 0 and local_flags & _HAS_DESCRIPTOR  # the values follow the data
            if local not in (central, wide) and not later:
                raise CorruptError(f"record {name!r}: its own header gives another size or checksum than the directory")
    return at + LOCAL.size + int(name_nbytes) + int(extra_nbytes)


def read_record(record: Record, limit: int) -> bytes:
    """A record's bytes, inflated, and held against its checksum where one is recorded.

    Args:
        record: the record.
        limit: the most bytes it may have.

    Raises:
        LimitError: it is larger, or inflates to more.
        CorruptError: it cannot be inflated, or its checksum differs.
    """
    largest = max(record.nbytes, record.data.nbytes)
    if largest > limit:
        raise LimitError(f"bytes of record {record.name!r}", limit=limit, actual=largest)
    data = record.data.read()
    if record.deflated:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(data, record.nbytes + 1)
        except zlib.error as error:
            raise CorruptError(f"record {record.name!r} cannot be inflated: {error}") from None
        if len(data) != record.nbytes or not inflater.eof:
            raise CorruptError(f"record {record.name!r} does not inflate to the {record.nbytes:,} bytes it declares")
    if record.crc32 is not None and zlib.crc32(data) != record.crc32:
        raise CorruptError(
            f"record {record.name!r}: its CRC-32 is {zlib.crc32(data):08x}, recorded is {record.crc32:08x}: damaged"
        )
    return data
