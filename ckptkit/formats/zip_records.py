"""The end of a ZIP archive, with the position of its directory.

The end record (PKWARE APPNOTE 4.3.16) is the last thing in the file but for a comment of at most 65,535 bytes.  Where
its fields are too narrow, a zip64 end record (4.3.14) and its locator (4.3.15) are before it.
`ckptkit.formats.zip_archive` says what is refused, and why.

The records of a ZIP archive, and the bytes of one.

The checks that `ckptkit.formats.zip_archive` makes record by record are made here for hundreds at once if they are
written alike, as torch's are: their headers are a table, and its columns slices of bytes.  Of those that differ in
anything nothing is decided here.
"""

from __future__ import annotations

import copy
import operator
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from struct import Struct
from typing import NamedTuple

from ckptkit.bytesource import ByteRange, byte_range
from ckptkit.computed import DEFLATE_MOST, ByteSource, DeflatedRange, Inflation
from ckptkit.errors import AmbiguousError, CorruptError, LimitError, UnsupportedError
from ckptkit.startup import pattern

__all__ = [
    "CENTRAL", "DEFLATED", "DESCRIPTOR_SIGNATURE", "END", "END64", "FEW", "HAS_DESCRIPTOR", "LOCAL", "LOCAL_SIGNATURE",
    "LOCATOR", "MANY", "MAX16", "MAX32", "REPACK", "SIGNED_DESCRIPTORS", "STORED", "TAIL_NBYTES", "UNICODE_PATH",
    "WINDOW_NBYTES", "Record", "Records", "Row", "begins_alike", "check_names", "fetch_beginnings", "find_directory",
    "read_record", "record_source", "rows_alike",
]  # fmt: skip

END = Struct("<4sHHHHIIH")
END64 = Struct("<4sQHHIIQQQQ")
LOCATOR = Struct("<4sIQI")

MAX32 = 0xFFFFFFFF
MAX16 = 0xFFFF

TAIL_NBYTES = END.size + MAX16
"""Last bytes of a file, in which an archive's end record begins."""

REPACK = "unpack it (7z x FILE -oOUT) and pack its folder again, stored: cd OUT && zip -0 -r NEW.pth FOLDER"
"""What helps where an archive contains a checkpoint in a way that is not read."""

_ODD_NAME = pattern(r"\A\Z|[\0\\]|\A/|(?:\A|/)\.\.(?:/|\Z)")

LOCAL_SIGNATURE = b"PK\x03\x04"
"""First bytes of a record, and so of an archive."""

DESCRIPTOR_SIGNATURE = b"PK\x07\x08"

# The headers: of a record (APPNOTE 4.3.7), and in the central directory (4.3.12).
LOCAL = Struct("<4sHHHHHIIIHH")
CENTRAL = Struct("<4sHHHHHHIIIHHHHHII")

STORED, DEFLATED = 0, 8
HAS_DESCRIPTOR = 0x8
"""The flag of a record whose checksum and sizes follow its data."""

UNICODE_PATH = b"\x75\x70"
"""Tag of an extra field that gives a record a second name."""

WINDOW_NBYTES = 4096
"""Bytes read around a local header: one page, which costs no more than the header and contains the headers of the small
records that follow."""

SIGNED_DESCRIPTORS = {16: "4sIII", 24: "4sIQQ"}
"""Data descriptors that begin with a signature, as torch writes them, by their size."""

FEW, MANY = 16, 2048
"""Records that are looked at together: as many at first, and at most."""

_FIXED = (0, 1, 2, 3, 8, 9, 10, 11, *range(28, 36))
"""Bytes of a record's header in the directory that make it like another: signature, flags, method, lengths, volume."""

_OWN_FIXED = (0, 1, 2, 3, 6, 7, 8, 9, 26, 27)
_OWN_SIZES = range(14, 26)
"""Those of its own header, and the positions of its checksum and sizes."""

_END_SIGNATURE = b"PK\x05\x06"


def find_directory(file: ByteRange) -> tuple[int, int, int]:
    """Offset and size in bytes of the central directory, and its number of records.

    Raises:
        CorruptError: there is no end record, or it is ambiguous.
        UnsupportedError: the archive is one of several volumes.
    """
    tail = file.tail(TAIL_NBYTES)
    tail_start = file.nbytes - len(tail)
    # Where an end record could be: it and its comment must reach to the end of the file exactly.
    ends = _occurrences(_END_SIGNATURE, tail)
    fits = [at for at in ends if at + END.size <= len(tail)]
    whole = [at for at in fits if at + END.size + END.unpack_from(tail, at)[7] == len(tail)]
    if not ends:
        raise CorruptError(
            f"the file begins like a zip archive but has no end record in its last {len(tail):,} bytes "
            f"(size {file.nbytes:,}): it may be a truncated download. Compare its size with the original"
        )
    if not whole:
        raise AmbiguousError("the zip end record does not end the file: bytes were appended, or it is truncated")
    if len(whole) > 1 or whole[0] != ends[-1]:
        raise AmbiguousError("a zip end record inside the comment of another; readers disagree about which counts")
    at = whole[0]
    end_at = tail_start + at
    _, disk, start_disk, on_disk, count, nbytes, offset, _ = END.unpack_from(tail, at)
    ends_at = end_at
    locator_at = end_at - LOCATOR.size
    if locator_at >= 0 and (raw := file.read(locator_at, LOCATOR.size))[:4] == b"PK\x06\x07":
        _, end64_disk, end64_at, disks = LOCATOR.unpack(raw)
        if end64_at + END64.size > locator_at:
            raise CorruptError(f"the zip64 end record is declared at byte {end64_at:,}, after its locator")
        signature, nbytes_end64, _, _, disk64, start64, on_disk64, count64, nbytes64, offset64 = END64.unpack(
            file.read(end64_at, END64.size)
        )
        if signature != b"PK\x06\x06" or end64_at + 12 + nbytes_end64 != locator_at:
            raise AmbiguousError(
                "the zip64 locator does not point at the zip64 end record before it: two archives "
                "were joined, or bytes were cut out"
            )
        if (end64_disk, disks, disk64, start64) != (0, 1, 0, 0):
            raise UnsupportedError("a multi-volume archive")
        narrow = ((count, count64, MAX16), (nbytes, nbytes64, MAX32), (offset, offset64, MAX32))
        if any(small not in (wide, top) for small, wide, top in narrow):
            raise AmbiguousError("the zip end record and the zip64 end record disagree")
        count, nbytes, offset, on_disk, ends_at = count64, nbytes64, offset64, on_disk64, end64_at
    if disk not in (0, MAX16) or start_disk not in (0, MAX16) or on_disk != count:
        raise UnsupportedError("a multi-volume archive")
    if offset + nbytes != ends_at:
        raise AmbiguousError(
            f"the zip directory is declared to end at byte {offset + nbytes:,}, but its end record begins at "
            f"{ends_at:,}: two archives were joined, or bytes were cut out"
        )
    return offset, nbytes, count


def _occurrences(wanted: bytes, data: bytes) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(wanted), data)]


def check_names(names: list[str]) -> None:
    """Names that leave their folder, or that some file system treats as equal, are refused."""
    everything = "\n".join(("", *names))
    if everything.endswith("\n") or any(mark in everything for mark in ("\0", "\\", "..", "\n/", "\n\n")):
        for name in names:
            if _ODD_NAME.search(name):
                if "\\" in name and not _ODD_NAME.search(name.replace("\\", "/") or "/"):
                    raise AmbiguousError(
                        f"a record named {name[:80]!r}, with backslashes, which some readers treat as part of the name "
                        f"and others as slashes; {REPACK}"
                    )
                raise AmbiguousError(f"a record named {name[:80]!r}: absolute, empty, or leaving its folder")
    if everything.count("\n") == len(names) and len(set(everything.casefold().split("\n"))) == len(names) + 1:
        return
    folded: dict[str, str] = {}
    for name in names:
        if name.casefold() in folded:
            other = folded[name.casefold()]
            raise AmbiguousError(f"records {other!r} and {name!r} have equal names, or names that differ only in case")
        folded[name.casefold()] = name


class Record(NamedTuple):
    """One record of an archive.

    Attributes:
        name: full name, root folder included.
        data: its bytes in the file, deflated or not.
        nbytes: size once inflated.
        deflated: whether it is compressed.
        crc32: of the inflated bytes; ``None``: not recorded.
    """

    name: str
    data: ByteRange
    nbytes: int
    deflated: bool
    crc32: int | None


class Records(Mapping[str, Record]):
    """The records of an archive by name, made on request.

    Args:
        area: the range of the archive.
        names: theirs, in directory order.
        begins: where in the archive the data of each begins.
        packed: size in bytes of each.
        sizes: the same once inflated.
        methods: the compression method of each, 0 where it is stored.
        crcs: the checksum of each; 0: it may not be recorded.
    """

    __slots__ = ("_columns", "_file", "_names", "_next", "_numbers", "_offset", "_root", "_taken")

    def __init__(
        self,
        area: ByteRange,
        names: Sequence[str],
        begins: Sequence[int],
        packed: Sequence[int],
        sizes: Sequence[int],
        methods: Sequence[int],
        crcs: Sequence[int],
    ) -> None:
        self._file, self._offset, self._root = area.file, area.offset, ""
        self._columns = begins, packed, sizes, methods, crcs
        self._names, self._next = names, 0  # most are taken in the directory's order: no need to look for them
        self._numbers = dict(zip(names, range(len(names)), strict=True))
        self._taken = bytearray(len(names))

    def get(self, name: str, default: object = None) -> Record | None:  # type: ignore[override]
        """The record of that name; ``None``: no record has it."""
        number = self._numbers.get(self._root + name)
        return None if number is None else self._record(number, self._root + name)

    def take(self, name: str) -> Record | None:
        """As `get`; it is noted that it was taken."""
        full, number = self._root + name, self._next
        if number >= len(self._names) or self._names[number] != full:
            found = self._numbers.get(full)
            if found is None:
                return None
            number = found
        self._next = number + 1
        self._taken[number] = 1
        return self._record(number, full)

    def _record(self, number: int, name: str) -> Record:
        begins, packed, sizes, methods, crcs = self._columns
        crc, nbytes = crcs[number], sizes[number]
        data = byte_range(self._file, self._offset + begins[number], packed[number])
        return _make(Record, (name, data, nbytes, methods[number] != 0, crc if crc or not nbytes else None))

    def left(self) -> list[str]:
        """The names of those that were not taken."""
        cut, taken = len(self._root), self._taken
        return [name[cut:] for name, number in self._numbers.items() if not taken[number]]

    def __getitem__(self, name: str) -> Record:
        record = self.get(name)
        if record is None:
            raise KeyError(name)
        return record

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._root + name in self._numbers

    def __iter__(self) -> Iterator[str]:
        if not self._root:
            return iter(self._numbers)
        return iter([name[len(self._root) :] for name in self._numbers])

    def __len__(self) -> int:
        return len(self._numbers)

    def ordered(self, names: Iterable[str]) -> Records:
        """The same records, or some of them, in another order."""
        made = copy.copy(self)
        made._names, made._numbers = (), {name: self._numbers[name] for name in names}
        return made

    def below(self, root: str) -> Records:
        """Those whose names begin with ``root``, by what follows it; their own names stay whole."""
        within = [name for name in self._numbers if name.startswith(root)]
        made = copy.copy(self) if len(within) == len(self._numbers) else self.ordered(within)
        made._root = root
        return made


_make = tuple.__new__
"""Which takes half the time of `Record`."""


def read_record(record: Record, limit: int) -> bytes:
    """A record's bytes, inflated, and checked against its checksum where one is recorded.

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
    if record.data.file.is_far:
        record.data.file.settle([(record.data.offset, record.data.nbytes)])
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
            f"record {record.name!r}: its CRC-32 is {zlib.crc32(data):08x}, but {record.crc32:08x} is recorded: damaged"
        )
    return data


_BEGINNING_NBYTES = 4096
"""Bytes of a record that are read first."""


def fetch_beginnings(records: Sequence[Record]) -> None:
    """Get the first bytes of some records with few requests, in a remote archive.

    Raises:
        FormatError: one of the records is not as the directory says.
    """
    file = records[0].data.file if records else None
    if file is not None and file.is_far:
        file.settle([(record.data.offset, min(record.data.nbytes, _BEGINNING_NBYTES)) for record in records])


def record_source(record: Record) -> ByteSource:
    """A record's bytes once inflated, as tensors are read from them; nothing is read for it.

    Raises:
        CorruptError: it declares more than its packed bytes can hold.
    """
    if not record.deflated:
        return record.data
    if record.nbytes > DEFLATE_MOST * record.data.nbytes:
        raise CorruptError(
            f"record {record.name!r} declares {record.nbytes:,} bytes; "
            f"{record.data.nbytes:,} compressed bytes cannot contain them"
        )
    return DeflatedRange(
        Inflation(record.data, record.nbytes, record.crc32, f"record {record.name!r}"), 0, record.nbytes
    )


# Many records at once.

Row = tuple[int, bytes, str, int, int, int, int, int]
"""A record as in `_Central`; a bare tuple takes half the time."""


def rows_alike(directory: bytes, pos: int, stride: int, count: int, flags: int, method: int) -> list[Row]:
    """The headers after one without extra fields that have its length, and equal it apart from name, place and sizes.

    Args:
        directory: the zip directory.
        pos: where in it that one begins.
        stride: its size in bytes.
        count: how many they may be.
        flags: its flags.
        method: its compression method.

    Returns:
        They; nothing: they are few, or among them is one to be looked at closely.
    """
    for byte in _FIXED:
        column = directory[pos + byte : pos + byte + (count + 1) * stride : stride]
        count = min(count, len(column) - len(column.lstrip(column[:1])) - 1, (len(directory) - pos) // stride - 1)
    if count < FEW:
        return []
    pos += stride
    layout = Struct(f"<16xIII14xI{stride - CENTRAL.size}s")
    found = zip(*layout.iter_unpack(directory[pos : pos + count * stride]), strict=True)
    crcs, packed, sizes, places, names = found
    if MAX32 in packed or MAX32 in sizes or MAX32 in places or (method == STORED and packed != sizes):
        return []
    if not b"".join(names).isascii():
        return []
    texts = map(str, names, repeat("ascii"))
    return list(zip(places, names, texts, repeat(flags), repeat(method), crcs, packed, sizes, strict=False))


def begins_alike(area: ByteRange, listed: list[Row], first: int, count: int, end: int, directory_at: int) -> list[int]:
    """Where the data begins of many small, similar records, one shortly after another.

    Their own headers are laid out as a table, whose columns are compared whole with what the directory says.

    Args:
        area: the range of the archive.
        listed: the directory's records, in order of position.
        first: the first record's number, not 0.
        count: how many they may be.
        end: where the data of the one before ends.
        directory_at: where the directory begins.

    Returns:
        Where their data begins; nothing: one of them differs in something, or they are far apart.
    """
    rows = listed[first : first + count]
    places, raw_names, _, _, _, _, packed, _ = zip(*rows, strict=True)
    flags, _, name_nbytes = kind = rows[0][3], rows[0][4], len(raw_names[0])
    gap = places[0] - end
    count, begin, header_nbytes = len(rows), places[0] - gap, LOCAL.size + name_nbytes
    stop = min(places[-1] + header_nbytes + MAX16 // 64, directory_at)
    if {(row[3], row[4], len(row[1])) for row in rows} != {kind}:
        return []
    if gap and not (gap in SIGNED_DESCRIPTORS and listed[first - 1][3] & flags & HAS_DESCRIPTOR):
        return []
    if not places[-1] + header_nbytes <= stop <= begin + count * WINDOW_NBYTES:
        return []
    data, stride = area.read(begin, stop - begin), gap + header_nbytes
    starts = [at - end for at in places]
    table = b"".join([data[start - gap : start + header_nbytes] for start in starts])
    columns = [table[gap + byte :: stride] for byte in range(header_nbytes)]
    if len(table) != count * stride or not _are_own(table, columns, gap, rows):
        return []
    if gap and not _say(table, f"{SIGNED_DESCRIPTORS[gap]}{header_nbytes}x", listed[first - 1 : first + count - 1]):
        return []
    extras = [low + 256 * high for low, high in zip(columns[28], columns[29], strict=True)]
    begins = [at + header_nbytes + extra for at, extra in zip(places, extras, strict=True)]
    ends = list(map(operator.add, begins, packed))
    if list(map(operator.add, ends[:-1], repeat(gap))) != list(places[1:]) or ends[-1] > directory_at:
        return []
    extra_starts = [start + header_nbytes for start in starts]
    extra_stops = list(map(operator.add, extra_starts, extras))
    if extra_stops[-1] > len(data) or max(map(data.find, repeat(UNICODE_PATH), extra_starts, extra_stops)) >= 0:
        return []
    return begins


def _are_own(table: bytes, columns: list[bytes], before: int, rows: list[Row]) -> bool:
    """Whether records' own headers agree with the directory.

    Args:
        table: the headers with their names.
        columns: those of its columns that are the headers'.
        before: how many others are before them.
        rows: as the directory has them, alike in flags, method, and length of the name.
    """
    joined, name_nbytes = b"".join([row[1] for row in rows]), len(rows[0][1])
    if columns[LOCAL.size :] != [joined[at::name_nbytes] for at in range(name_nbytes)]:
        return False
    flags, method, count = rows[0][3], rows[0][4], len(rows)
    model = LOCAL.pack(LOCAL_SIGNATURE, 0, flags, method, 0, 0, 0, 0, 0, name_nbytes, 0)
    if any(columns[byte].count(model[byte]) != count for byte in _OWN_FIXED):
        return False
    if flags & HAS_DESCRIPTOR and all(columns[byte].count(0) == count for byte in _OWN_SIZES):
        return True  # they follow
    return _say(table, f"{before + _OWN_SIZES.start}xIII{len(columns) - _OWN_SIZES.stop}x", rows)


def _say(table: bytes, layout: str, rows: list[Row]) -> bool:
    """Whether each row of a table has the record's checksum and sizes from the directory."""
    signature = (DESCRIPTOR_SIGNATURE,) if "s" in layout else ()
    return list(Struct("<" + layout).iter_unpack(table)) == [(*signature, *row[5:]) for row in rows]
