"""The names in all pickles of a file that was refused, so that what it would run is told all the same.

A reader stops at the first thing that is wrong, which need not be the worst.  Here every record of
an archive that is a pickle by its name or first byte is gone through for names alone, and what is
wrong with it is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CkptkitError
from ckptkit.formats.archives.tar_archive import read_members
from ckptkit.formats.archives.tar_header import is_header
from ckptkit.formats.archives.zip_archive import Record, read_record
from ckptkit.formats.format import Probe
from ckptkit.pickling.reader import read_names

__all__ = ["names_left"]

_MAX_MEMBERS = 1000
"""Members of a tar archive that are looked at; torch's have four."""

_MAX_RECORDS = 10_000
"""Records of a zip archive whose first byte is looked at."""


def names_left(probe: Probe) -> tuple[GlobalUse, ...]:
    """The verdicts on the names in the file's archive; nothing for a file that is none, or cannot be read as one."""
    found: list[GlobalUse] = []
    left = probe.limits.pickle_nbytes
    try:
        for name, record in _records(probe):
            size = record.nbytes
            if 0 < size <= left:
                left -= size
                data = read_record(record, size) if isinstance(record, Record) else record.read()
                found.extend(read_names(data, name, limits=probe.limits))
    except CkptkitError:
        pass  # what is wrong with it was said
    return tuple(found)


def _records(probe: Probe) -> Iterator[tuple[str, Record | ByteRange]]:
    if is_header(probe.head):
        for member in read_members(probe.file, probe.limits, _MAX_MEMBERS):
            yield member.name, member.data(probe.file)
        return
    # A directory that was refused is not read again.
    records: dict[str, Record] | None = vars(probe).get("records")
    for name, record in list((records or {}).items())[:_MAX_RECORDS]:
        inner = name.partition("/")[2] or name
        if inner.endswith((".pkl", ".pickle")) or (not record.deflated and record.data.read(0, 1) == b"\x80"):
            yield inner, record
