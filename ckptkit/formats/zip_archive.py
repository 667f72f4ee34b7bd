"""ZIP archives: the directory, read strictly.

Layout (PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5): records, each a local header and its data;
then the central directory, one header a record; then, where sizes need it, the zip64 end record
and its locator; then the end record.  The central directory counts: torch writes local headers
whose sizes and CRC are zero (flag bit 3, a data descriptor follows).  A record's data starts at
its local offset + 30 + *local* name length + *local* extra length.

Readers of one archive must all see the same records, so what they are known to disagree about is
refused (`AmbiguousError`): records equal but for case; a directory that does not end where the end
record begins (two archives end to end); a second end record inside the comment; local headers and
data descriptors that contradict the directory; records that overlap or have a second name; bytes
between records that belong to none, where a reader that goes from header to header would find
others; bytes after the end.  Encryption and patch flags, absolute and ``..`` names are refused too.

For a remote archive only the directory is read at first: where each record's data begins follows from the gaps between
records (`ckptkit.formats.zip_far`).  The records' own headers and data descriptors are checked against it before a
record is read here, or before values are given to anyone (`ckptkit.bytesource.Source.settle`).

A CRC-32 of 0 with data after it means "not recorded" (``set_crc32_options(False)`` in torch).
"""

from __future__ import annotations

from functools import partial
from struct import Struct
from typing import NamedTuple

from ckptkit.bytesource import ByteRange, Source
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.zip_records import (
    CENTRAL,
    DEFLATED,
    DESCRIPTOR_SIGNATURE,
    END,
    FEW,
    HAS_DESCRIPTOR,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR,
    MANY,
    MAX16,
    MAX32,
    REPACK,
    STORED,
    TAIL_NBYTES,
    UNICODE_PATH,
    WINDOW_NBYTES,
    Record,
    Records,
    Row,
    begins_alike,
    check_names,
    find_directory,
    read_record,
    rows_alike,
)  # fmt: skip
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.report import count_of

__all__ = ["LOCAL_SIGNATURE", "TAIL_NBYTES", "Record", "Records", "ends_like_a_zip", "read_directory", "read_record"]

CENTRAL_SIGNATURE = b"PK\x01\x02"
_LOCAL_BRIEF = Struct("<4s2xHH4xIIIHH")
_CENTRAL_BRIEF = Struct("<4s4xHH4xIIIHHHH6xI")
"""The same without irrelevant fields: versions, times, attributes."""

_LATER = [0, 0, 0]
"""Checksum and sizes in a record's own header where a data descriptor follows."""

UTF8 = 0x800
_REFUSED_FLAGS = {0x1: "encrypted", 0x20: "patched", 0x40: "strongly encrypted", 0x2000: "masked"}
_ANY_REFUSED_FLAG = sum(_REFUSED_FLAGS)
_METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 98: "PPMd", 99: "AES"}
"""Compression methods that others than torch use (APPNOTE 4.4.5)."""

_ZIP64 = 1
"""Tag of an extra field."""

_MAX_WINDOW_NBYTES = 1 << 20
"""Bytes read at once where header follows header closely."""

_DESCRIPTORS = {layout.size: layout for layout in map(Struct, ("<III", "<4sIII", "<IQQ", "<4sIQQ"))}
_DESCRIPTOR_NBYTES = max(_DESCRIPTORS)
_NARROW_DESCRIPTOR_NBYTES = 16
"""Data descriptors by their size (APPNOTE 4.3.9): with or without a signature, sizes of 32 or 64 bits."""


_MOST_LOOKED_AT = 1000
"""Records whose own headers are all read, one after the other, once one of them is wrong in a remote file."""


class _Central(NamedTuple):
    """A record as the directory has it; sorts by position."""

    at: int
    raw_name: bytes
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    nbytes: int


def read_directory(file: Source | ByteRange, limits: Limits = DEFAULT_LIMITS) -> Records:
    """Every record by name, in directory order.

    Args:
        file: the archive, or its range in a larger file.
        limits: bounds on what it may ask for.

    Raises:
        CorruptError: truncated, ambiguous or contradictory; the message says which.
        UnsupportedError: encryption, patches or a compression method other than deflate.
        LimitError: too many records, or too large a directory.
    """
    area = file if isinstance(file, ByteRange) else file.whole
    offset, nbytes, count = find_directory(area)
    if count > limits.entries:
        raise LimitError("records in an archive", limit=limits.entries, actual=count)
    if nbytes > limits.directory_nbytes:
        raise LimitError("bytes of a zip directory", limit=limits.directory_nbytes, actual=nbytes)
    listed = _listed(area.read(offset, nbytes), count, limits)
    check_names([record[2] for record in listed])
    by_place = sorted(listed)
    begins: list[int] = []
    if area.file.is_far:
        from ckptkit.formats.zip_far import told_by_directory

        begins = told_by_directory(area, by_place, offset)
    begins = _LeftForLater(area, by_place, begins, offset).begins if begins else _located(area, by_place, offset)
    _, _, names, _, methods, crcs, packed, sizes = zip(*by_place, strict=True) if by_place else [()] * 8
    found = Records(area, names, begins, packed, sizes, methods, crcs)
    return found if by_place == listed else found.ordered(record[2] for record in listed)


def ends_like_a_zip(area: ByteRange, tail: bytes | None = None) -> bool:
    """Whether the last bytes are a zip archive's end record with a directory or a locator before it.

    Args:
        area: a file, or a part of one.
        tail: its last `TAIL_NBYTES`, or all there are, if they were read.
    """
    tail = area.tail(TAIL_NBYTES) if tail is None else tail
    start = area.nbytes - len(tail)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        return False
    _, _, _, _, count, nbytes, _, comment_nbytes = END.unpack_from(tail, at)
    if not count or at + END.size + comment_nbytes != len(tail):
        return False
    if tail[max(0, at - LOCATOR.size) :].startswith(b"PK\x06\x07"):
        return True
    directory = start + at - nbytes
    return directory >= 0 and area.read(directory, 4) == CENTRAL_SIGNATURE


class _Window:
    """Reads a few bytes here and there, forwards, with few calls to the operating system."""

    def __init__(self, area: ByteRange) -> None:
        self.area = area
        self.data = b""
        self.start = 0
        self._ahead = WINDOW_NBYTES

    def hold(self, offset: int, nbytes: int) -> int:
        """The position in `data` of the byte at ``offset``, once it and those after it are there."""
        start = offset - self.start
        if start < 0 or start + nbytes > len(self.data):
            close = 0 <= start <= len(self.data) + WINDOW_NBYTES
            self._ahead = min(2 * self._ahead, _MAX_WINDOW_NBYTES) if close else WINDOW_NBYTES
            self.data = self.area.read(offset, max(nbytes, min(self._ahead, self.area.nbytes - offset)))
            self.start, start = offset, 0
        return start


def _listed(directory: bytes, count: int, limits: Limits) -> list[Row]:
    """The directory's headers, in its order."""
    listed: list[Row] = []
    pos, nbytes = 0, len(directory)
    together, alone_until = FEW, 0
    while len(listed) < count:
        if pos + CENTRAL.size > nbytes:
            raise CorruptError(f"the zip directory ends after {len(listed)} of {count_of(count, 'record')}")
        (
            signature, flags, method, crc, packed, size, name_nbytes, extra_nbytes, comment_nbytes, disk, at,
        ) = _CENTRAL_BRIEF.unpack_from(directory, pos)  # fmt: skip
        if signature != CENTRAL_SIGNATURE:
            raise CorruptError("the zip directory contains more than records", where="zip directory", offset=pos)
        name_at = pos + CENTRAL.size
        extra_at = name_at + name_nbytes
        end = extra_at + extra_nbytes + comment_nbytes
        if end > nbytes:
            raise CorruptError(
                "a record's name or extra field reaches outside the zip directory", where="zip directory", offset=pos
            )
        raw = directory[name_at:extra_at]
        is_simple = name_nbytes <= limits.name_nbytes and raw.isascii()
        name = str(raw, "ascii") if is_simple else _name(raw, flags, limits)
        if flags & _ANY_REFUSED_FLAG:
            what = next(what for flag, what in _REFUSED_FLAGS.items() if flags & flag)
            password = " -pPASSWORD" * (what != "patched")
            raise UnsupportedError(f"record {name!r:.200} is {what}; {REPACK.replace(' -o', f'{password} -o')}")
        if method != STORED and method != DEFLATED:
            called = f" ({_METHODS[method]})" if method in _METHODS else ""
            raise UnsupportedError(
                f"record {name!r:.200} uses compression method {method}{called}; torch stores or deflates; {REPACK}"
            )
        if disk and disk != MAX16:
            raise UnsupportedError("a multi-volume archive")
        if extra_nbytes or size == MAX32 or packed == MAX32 or at == MAX32:
            size, packed, at = _widened(directory[extra_at : extra_at + extra_nbytes], name, (size, packed, at))
        if method == STORED and packed != size:
            raise AmbiguousError(f"record {name!r} is stored, but {packed:,} bytes are declared as {size:,}")
        listed.append((at, raw, name, flags, method, crc, packed, size))
        if end >= alone_until and end == extra_at:
            rows = rows_alike(directory, pos, end - pos, min(together, count - len(listed)), flags, method)
            listed += rows
            if not rows:
                alone_until = end + together * (end - pos)
            together = max(FEW, 2 * len(rows))
            end += len(rows) * (end - pos)
        pos = end
    if pos != nbytes:
        raise AmbiguousError(f"the zip directory has {nbytes - pos:,} bytes more than its {count_of(count, 'record')}")
    return listed


def _name(raw: bytes, flags: int, limits: Limits) -> str:
    if len(raw) > limits.name_nbytes:
        raise LimitError("length of a record's name", limit=limits.name_nbytes, actual=len(raw))
    try:
        return raw.decode("utf-8" if flags & UTF8 or raw.isascii() else "cp437")
    except UnicodeDecodeError:
        raise CorruptError(
            f"a record's name is declared as UTF-8 but is not: {raw[:80]!r}; {REPACK}, renamed if needed"
        ) from None


def _located(area: ByteRange, listed: list[Row], directory_at: int) -> list[int]:
    """Where the records' data begins, once their own headers are known not to contradict the directory.

    Args:
        area: the range of the archive.
        listed: the directory's records, in order of position.
        directory_at: where the directory begins.
    """
    window = _Window(area)
    begins: list[int] = []
    end = 0
    before: _Central | None = None
    together, alone_until = FEW, 1
    while len(begins) < len(listed):
        if before is not None and len(begins) >= alone_until:
            found = begins_alike(area, listed, len(begins), together, end, directory_at)
            if found:
                begins += found
                before = _Central(*listed[len(begins) - 1])
                end = begins[-1] + before.packed
                together = min(2 * together, MANY)
                continue
            alone_until, together = len(begins) + FEW, FEW
        record = _Central(*listed[len(begins)])
        begins.append(_begin(window, before, record, end))
        end = begins[-1] + record.packed
        if end > directory_at:
            raise CorruptError(
                f"record {record.name!r} of {record.packed:,} bytes at {begins[-1]:,} reaches into the zip directory"
            )
        before = record
    if end != directory_at:
        _check_gap(before, directory_at - end, window, end)
    return begins


def _begin(window: _Window, before: _Central | None, record: _Central, end: int) -> int:
    """Where a record's data begins, once its own header, and what is before that, are as the directory says.

    Args:
        window: reads them.
        before: the record before it; ``None``: it is the first.
        record: as the directory has it.
        end: where the data of the one before ends.
    """
    at, raw_name, name = record[:3]
    header_nbytes = LOCAL.size + len(raw_name)
    if at + header_nbytes > window.area.nbytes:
        raise CorruptError(f"record {name!r} is declared at byte {at:,} of a file of {window.area.nbytes:,} bytes")
    if at < end and before is not None:
        raise AmbiguousError(f"records {before.name!r} and {name!r} overlap")
    gap = at - end if at - end <= _DESCRIPTOR_NBYTES else 0
    start = window.hold(at - gap, gap + header_nbytes)
    extra_nbytes = _usual_header(window.data, start + gap, record)
    is_usual = extra_nbytes >= 0
    if not is_usual:
        extra_nbytes = _check_header(window, record, start + gap)
    if end != at:
        layout = _DESCRIPTORS.get(gap) if is_usual and before is not None and before[3] & HAS_DESCRIPTOR else None
        if layout is None or layout.unpack_from(window.data, start) != (DESCRIPTOR_SIGNATURE, *(before or ())[5:]):
            _check_gap(before, at - end, window, end)
    return at + header_nbytes + extra_nbytes


class _LeftForLater:
    """The look at records' own headers, and at what is between the records, that waits until values are read.

    Args:
        area: the range of the archive, in a remote file.
        listed: the directory's records, in order of position.
        begins: where the records' data begins, according to the directory.
        directory_at: where the directory begins.

    Attributes:
        begins: as above; where a header that is at hand says something else, by all headers.

    Raises:
        FormatError: as `read_directory`, of what is at hand.
    """

    def __init__(self, area: ByteRange, listed: list[Row], begins: list[int], directory_at: int) -> None:
        self.begins = begins
        self._area, self._listed, self._directory_at = area, listed, directory_at
        self._is_open, self._are_all_known = True, False
        end = 0
        for number, (row, begin) in enumerate(zip(listed, begins, strict=True)):
            area.file.on_read(area.offset + end, begin - end, partial(self._look, number, end, begin))
            end = begin + row[6]
        if end != directory_at:
            look = partial(self._look, len(listed), end, directory_at)
            area.file.on_read(area.offset + end, directory_at - end, look)
        self._is_open = False

    def _look(self, number: int, end: int, begin: int, data: bytes) -> None:
        """Look at what is between the data of two records.

        Args:
            number: of the second; how many there are: the directory.
            end: where the data of the first ends.
            begin: where that of the second begins.
            data: the bytes between.
        """
        if self._are_all_known:
            return
        window = _Window(self._area)
        window.data, window.start = data, end
        before = _Central(*self._listed[number - 1]) if number else None
        try:
            if number == len(self._listed):
                _check_gap(before, begin - end, window, end)
            elif (own := _begin(window, before, record := _Central(*self._listed[number]), end)) != begin:
                raise AmbiguousError(
                    f"record {record.name!r}: its own header puts its data at byte {own:,}, but the zip directory, "
                    f"which accounts for every byte, at {begin:,}"
                )
        except FormatError as error:
            self._look_at_all(error)

    def _look_at_all(self, error: FormatError) -> None:
        """Something is wrong: report the error of a local file, whose headers are all read at once, in order."""
        self._are_all_known = True
        try:
            if len(self._listed) <= _MOST_LOOKED_AT:
                found = _located(self._area, self._listed, self._directory_at)
                if self._is_open:
                    self.begins = found
                    return
            raise error
        except FormatError as worst:
            self._are_all_known = False
            raise worst.at(path=self._area.file.path) from worst.__cause__


def _usual_header(data: bytes, at: int, record: _Central) -> int:
    """The size of the extra field of a record's own header if that is as torch writes it.

    Args:
        data: holds at least the header and the name.
        at: where in it the header begins.
        record: as the directory has it.

    Returns: Its size in bytes; -1: it differs in something, and needs a close check.
    """
    _, raw_name, _, flags, method, *sizes = record
    mark, own_flags, own_method, *own, name_nbytes, extra_nbytes = _LOCAL_BRIEF.unpack_from(data, at)
    name_at = at + LOCAL.size
    extra_at = name_at + name_nbytes
    is_usual = (
        mark == LOCAL_SIGNATURE
        and own_flags == flags
        and own_method == method
        and data[name_at:extra_at] == raw_name
        and extra_at + extra_nbytes <= len(data)
        and (not extra_nbytes or data.find(UNICODE_PATH, extra_at, extra_at + extra_nbytes) < 0)
        and (own == sizes or (flags & HAS_DESCRIPTOR and own == _LATER))
    )
    return int(extra_nbytes) if is_usual else -1


def _check_header(window: _Window, record: _Central, start: int) -> int:
    """Hold a record's own header against the directory's.

    Args:
        window: contains the header.
        record: as the directory has it.
        start: where in the window's data it begins.

    Returns:
        Size in bytes of the header's extra field.
    """
    (
        signature, _, flags, method, _, _, crc, packed, nbytes, name_nbytes, extra_nbytes,
    ) = LOCAL.unpack_from(window.data, start)  # fmt: skip
    name_at = start + LOCAL.size
    extra_at = name_at + name_nbytes
    if signature != LOCAL_SIGNATURE:
        raise CorruptError(f"record {record.name!r}: no record begins at byte {record.at:,}")
    if window.data[name_at:extra_at] != record.raw_name or method != record.method:
        raise AmbiguousError(f"record {record.name!r}: its header has another name or method than the directory")
    if (flags ^ record.flags) & ~(HAS_DESCRIPTOR | UTF8) & 0xFFFF:
        raise AmbiguousError(f"record {record.name!r}: its own header has different flags than the directory")
    extra = window.data[extra_at : extra_at + extra_nbytes]
    if len(extra) != extra_nbytes:
        offset = record.at + LOCAL.size + int(name_nbytes)
        extra_at = window.hold(offset, min(extra_nbytes, window.area.nbytes - offset))
        extra = window.data[extra_at : extra_at + extra_nbytes]
    if UNICODE_PATH in extra:
        _widened(extra, record.name, (0, 0, 0))  # raises where it is a field's tag
    if packed != record.packed or nbytes != record.nbytes or crc != record.crc:
        if MAX32 in (packed, nbytes):
            nbytes, packed, _ = _widened(extra, record.name, (nbytes, packed, 0))
        for local, central in ((crc, record.crc), (packed, record.packed), (nbytes, record.nbytes)):
            later = local == 0 and flags & HAS_DESCRIPTOR  # the values follow the data
            if local != central and not later:
                raise AmbiguousError(
                    f"record {record.name!r}: its own header has a different size or checksum than the directory"
                )
    return int(extra_nbytes)


def _check_gap(before: _Central | None, nbytes: int, window: _Window, at: int) -> None:
    """A record's data must be followed by its data descriptor, which must agree with the directory.

    A missing descriptor misleads nobody: the directory counts.

    Args:
        before: the record; ``None``: the gap begins the archive.
        nbytes: size of the gap, not 0.
        window: reads it.
        at: where it begins.
    """
    if before is None:
        raise AmbiguousError("the file begins with a record that the zip directory does not list")
    layout = _DESCRIPTORS.get(nbytes)
    if layout is not None and before.flags & HAS_DESCRIPTOR:
        start = window.hold(at, nbytes)  # which may read other data
        found = layout.unpack_from(window.data, start)
        mask = MAX32 if nbytes <= _NARROW_DESCRIPTOR_NBYTES else -1
        # A signature comes before the three values, or nothing.
        if found[-3:] == (before.crc, before.packed & mask, before.nbytes & mask) and (
            len(found) == 3 or found[0] == DESCRIPTOR_SIGNATURE
        ):
            return
    raise AmbiguousError(
        f"{count_of(nbytes, 'byte')} after record {before.name!r} {'belongs' if nbytes == 1 else 'belong'} to no "
        "record; readers may find others there"
    )


def _widened(extra: bytes, name: str, fields: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size, packed size and offset, with those at 0xFFFFFFFF taken from the zip64 extra field.

    The wide values are in this fixed order, and only those that did not fit are there.
    """
    pos = 0
    wide: bytes | None = None
    while pos + 4 <= len(extra):
        tag = int.from_bytes(extra[pos : pos + 2], "little")
        size = int.from_bytes(extra[pos + 2 : pos + 4], "little")
        if extra[pos : pos + 2] == UNICODE_PATH:
            raise AmbiguousError(f"record {name!r} has a second name in its extra field; readers disagree about it")
        if tag == _ZIP64:
            wide = extra[pos + 4 : pos + 4 + size]
        pos += 4 + size
    if MAX32 not in fields:
        return fields
    if wide is None:
        raise CorruptError(f"record {name!r}: a size should be in a zip64 field, which is missing")
    values = []
    for field in fields:
        if field == MAX32:
            if len(wide) < 8:
                raise CorruptError(f"record {name!r}: its zip64 field is too short")
            field, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        values.append(field)
    return values[0], values[1], values[2]
