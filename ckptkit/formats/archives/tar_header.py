"""The header of a tar archive's member, as far as it tells that a file is one."""

from __future__ import annotations

__all__ = ["BLOCK_NBYTES", "checksums", "is_header"]

BLOCK_NBYTES = 512
"""Bytes of a block, and of a header."""

_ZEROS = bytes(BLOCK_NBYTES)


def is_header(block: bytes) -> bool:
    """Whether ``tarfile``, and with it torch, takes a file that begins so for a tar archive.

    It asks for no signature, only for a checksum, and reads that number generously.
    """
    if len(block) < BLOCK_NBYTES or block[:BLOCK_NBYTES] == _ZEROS:
        return False
    field = block[148:156]
    if field[0] in (0x80, 0xFF):
        stated = int.from_bytes(field[1:], "big") - (0 if field[0] == 0x80 else 256**7)
    else:
        try:
            stated = int(field.split(b"\0", 1)[0].decode("ascii").strip() or "0", 8)
        except ValueError:
            return False
    return stated in checksums(block)


def checksums(block: bytes) -> tuple[int, int]:
    """The sum of the header's bytes with its checksum blank; old tools added them as signed numbers."""
    others = block[:148] + block[156:BLOCK_NBYTES]
    unsigned = 8 * 0x20 + sum(others)
    return unsigned, unsigned - 256 * sum(byte > 127 for byte in others)
