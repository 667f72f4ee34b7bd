"""One record of a ZIP archive, and its bytes."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from ckptkit.bytesource import ByteRange
from ckptkit.derived import DEFLATE_MOST, ByteSource, DeflatedRange, Inflation
from ckptkit.errors import CorruptError, LimitError

__all__ = ["Record", "read_record", "record_source"]


class Record(NamedTuple):
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
            f"{record.data.nbytes:,} packed ones cannot hold them"
        )
    return DeflatedRange(
        Inflation(record.data, record.nbytes, record.crc32, f"record {record.name!r}"), 0, record.nbytes
    )
