"""Where bytes lie: sources that are read by position, and ranges of them.

Tensors are addresses, not data.  A `Source` is whatever contains a file's bytes: a local file (`SourceFile`), bytes in
memory, and whatever else a module of its own makes one.  A `ByteRange` says where in a source some bytes lie.  Nothing
here moves a file position, so ranges can be read from several threads.  Bytes that are not in a source as they are
wanted are in `ckptkit.computed`.
"""

from ckptkit.bytesource.local import SourceFile, fill_from, flush_to_disk, read_at, spool_room, write_at
from ckptkit.bytesource.source import (
    CHUNK_NBYTES,
    GAP_NBYTES,
    ByteRange,
    Readable,
    Source,
    at_once,
    byte_range,
    first_changed,
    given_up,
    made_by_position,
    outside,
    pace,
    require_wanted,
)

__all__ = [
    "CHUNK_NBYTES",
    "GAP_NBYTES",
    "ByteRange",
    "Readable",
    "Source",
    "SourceFile",
    "at_once",
    "byte_range",
    "fill_from",
    "first_changed",
    "flush_to_disk",
    "given_up",
    "made_by_position",
    "outside",
    "pace",
    "read_at",
    "require_wanted",
    "spool_room",
    "write_at",
]
