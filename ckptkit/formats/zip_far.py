"""Where the data of a zip archive's records begins, from its directory only: for remote archives.

A record's data begins after its own header, whose extra field has its own length.  But a strict archive accounts for
every byte: from one record to the next there are its header, name and extra field, its data, and a data descriptor if
one is announced.  Without a descriptor what is left over is the extra field.  With one there are several ways to share
what is left, of which torch's own writer (``caffe2/serialize/inline_container.cc``, ``getPadding``) takes one: an extra
field of at least four bytes moves the data to a multiple of 64, and the descriptor begins with a signature. If that is
impossible for all records, the headers of those that have descriptors are read, many at once.

Nothing here is checked yet against the headers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.bytesource import ByteRange
from ckptkit.formats.zip_records import HAS_DESCRIPTOR, LOCAL, MAX16, SIGNED_DESCRIPTORS, Row

__all__ = ["told_by_directory"]

_ALIGNMENT = 64
"""``kFieldAlignment``; ``storage_alignment`` asks for a multiple of it, or for something unknown here."""

_PADDING_HEADER_NBYTES = 4
"""Of an extra field that is nothing but room."""


def told_by_directory(area: ByteRange, listed: Sequence[Row], directory_at: int) -> list[int]:
    """Where in the archive the data of each record begins.

    Args:
        area: the range of the archive.
        listed: the directory's records, in order of position.
        directory_at: where the directory begins.

    Returns:
        One position for each; nothing: records overlap, or bytes belong to none of them, and a closer look is needed.
    """
    if not listed or listed[0][0]:
        return []
    begins: list[int] = []
    unsure: list[int] = []
    ends = [*(row[0] for row in listed[1:]), directory_at]
    is_torchs = True
    for number, ((at, raw_name, _, flags, _, _, packed, _), end) in enumerate(zip(listed, ends, strict=True)):
        left = end - at - LOCAL.size - len(raw_name) - packed
        if left < 0:
            return []
        begin = end - packed
        if left and flags & HAS_DESCRIPTOR:
            unsure.append(number)
            fitting = [
                begin - nbytes
                for nbytes in SIGNED_DESCRIPTORS
                if left - nbytes >= _PADDING_HEADER_NBYTES and (begin - nbytes) % _ALIGNMENT == 0
            ]
            is_torchs = is_torchs and len(fitting) == 1
            begin = fitting[0] if fitting else begin
        elif left > MAX16:
            return []
        begins.append(begin)
    return begins if is_torchs else _told_by_headers(area, listed, begins, ends, unsure)


def _told_by_headers(
    area: ByteRange, listed: Sequence[Row], begins: list[int], ends: Sequence[int], unsure: Sequence[int]
) -> list[int]:
    """The same, with the headers of some records read for the lengths of their extra fields."""
    headers = area.file.ranges([(area.offset + listed[number][0], LOCAL.size) for number in unsure])
    for number, header in zip(unsure, headers, strict=True):
        at, packed = listed[number][0], listed[number][6]
        begins[number] = at + LOCAL.size + sum(LOCAL.unpack(header)[-2:])
        if begins[number] + packed > ends[number]:
            return []
    return begins
