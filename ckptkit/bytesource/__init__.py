"""Sources of bytes that are read by position, and ranges of them.

Tensors are addresses, not data.  A `Source` gives access to a file's bytes: a local file (`SourceFile`), bytes in
memory, and other kinds that have their own modules.  A `ByteRange` is the place of some bytes in a source.  Nothing
here moves a file position, so several threads can read ranges.  `ckptkit.computed` has bytes that must be made before
they can be read.
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
    "outside",
    "pace",
    "read_at",
    "require_wanted",
    "spool_room",
    "write_at",
]
