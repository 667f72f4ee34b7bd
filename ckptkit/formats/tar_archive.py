"""The header of a tar archive's member, as far as it identifies a file.

A tar archive's members: bounded, and so strict that no two readers disagree about it.

Layout (POSIX.1-2001 ``pax``, "ustar Interchange Format"): blocks of 512 bytes; each member is a header and its data,
padded to whole blocks; two blocks of zeros end the archive, and zeros fill it up.  A member of type ``x`` holds records
``LENGTH KEY=VALUE`` about the one that follows it; Python's ``tarfile`` writes them for times that are not whole
seconds and for sizes from 8 GiB.

Nothing is extracted, and names are only ever compared.  A reader wants files of type ``0``: links,
sparse files and what an extension renames or redirects have another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ckptkit.bytesource import ByteRange
from ckptkit.errors import AmbiguousError, CorruptError, LimitError
from ckptkit.limits import Limits
from ckptkit.report import count_of
from ckptkit.startup import pattern

__all__ = ["BLOCK_NBYTES", "Member", "checksums", "is_header", "read_members"]

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


_MAX_PADDING_NBYTES = 1 << 20
"""Zeros after the end: ``tarfile`` fills up to 10 KiB, tape tools up to some hundred."""

_PAX_KEYS = frozenset({"atime", "ctime", "mtime", "uid", "gid", "uname", "gname", "size", "comment"})
"""Facts about a member that do not change what or where it is; others rename or redirect it."""

_OCTAL = pattern(rb" *([0-7]{1,12})[ \0]*\Z")
_RECORD = pattern(rb"([1-9][0-9]{0,7}) ([A-Za-z.]{1,64})=")


class Member(NamedTuple):
    """One member.

    Attributes:
        name: as the header has it.
        kind: the type flag: ``"0"`` is a regular file; ``"x"`` means that a pax header describes it as something else,
            or somewhere else, than its own header does.
        start: of its data in the file.
        nbytes: of its data, as declared; the file may be shorter.
        path: the name of a regular file, even if it is too long for the header: a pax header, or before it a member of
            type ``L`` (GNU tar), has it.  ``None``: it is not a regular file, or one is declared to be more than
            renamed.
    """

    name: str
    kind: str
    start: int
    nbytes: int
    path: str | None = None

    def data(self, area: ByteRange) -> ByteRange:
        """Its existing bytes, as a range of the archive."""
        return area.part(min(self.start, area.nbytes), max(0, min(self.nbytes, area.nbytes - self.start)))


def read_members(area: ByteRange, limits: Limits, most: int) -> Iterator[Member]:
    """The members in order; a caller that has seen enough of them stops.

    Args:
        area: the range of the archive.
        limits: bounds on what it may ask for.
        most: members there may be.

    Raises:
        CorruptError: it is damaged or cut off.
        AmbiguousError: something follows its end.
        LimitError: it has more members.
    """
    pos, size, path, as_stated = 0, None, "", True
    for _ in range(2 * most + 1):
        block = area.read(pos, max(0, min(BLOCK_NBYTES, area.nbytes - pos)))
        if block == bytes(BLOCK_NBYTES):
            _check_end(area, pos)
            return
        if len(block) < BLOCK_NBYTES:
            raise CorruptError("truncated: the archive's end is missing. Download or copy the file again", offset=pos)
        member = _member(block, pos, size)
        following = member.start + -(-member.nbytes // BLOCK_NBYTES) * BLOCK_NBYTES
        if member.kind == "x":
            size, path, as_stated = _pax(member, area, limits)
        else:
            is_named = member.kind == "0" and (as_stated or path)
            kind = member.kind if as_stated else "x"
            yield member._replace(kind=kind, path=(path or member.name) if is_named else None)
            size, path, as_stated = None, _long_name(member, area, limits) if member.kind == "L" else "", True
        if following > area.nbytes:
            raise CorruptError(
                f"truncated: the file has {area.nbytes:,} bytes, but {following:,} are expected up to the end of "
                f"member {member.name!r}. Download or copy the file again",
                offset=pos,
            )
        pos = following
    raise LimitError("members of a tar archive", limit=most, actual=most + 1)


def _member(block: bytes, pos: int, size: int | None) -> Member:
    stated = _OCTAL.match(block[148:156])
    nbytes = _OCTAL.match(block[124:136])
    if stated is None or int(stated[1], 8) not in checksums(block):
        raise CorruptError("a member's header does not have the checksum it states: damaged", offset=pos)
    if nbytes is None and block[124] != 0x80:  # in binary, as GNU tar writes it from 8 GiB on
        raise CorruptError("a member's size is not an octal number", offset=pos)
    own = int(nbytes[1], 8) if nbytes is not None else int.from_bytes(block[125:136], "big")
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return Member(
        name=(prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace"),
        kind=chr(block[156] or ord("0")),
        start=pos + BLOCK_NBYTES,
        nbytes=own if size is None else size,
    )


def _long_name(member: Member, area: ByteRange, limits: Limits) -> str:
    """The name that a member of GNU tar's own gives the next one."""
    if member.nbytes > limits.name_nbytes:
        raise LimitError("length of a member's name", limit=limits.name_nbytes, actual=member.nbytes)
    return member.data(area).read().split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax(member: Member, area: ByteRange, limits: Limits) -> tuple[int | None, str, bool]:
    """The size and the name that a pax header gives the next member (``""``: none), and whether all is as stated.

    That is what the member's own header states.  A name counts where nothing else is declared to be otherwise.
    """
    if member.nbytes > limits.record_nbytes:
        raise LimitError("bytes of a pax header", limit=limits.record_nbytes, actual=member.nbytes)
    data = member.data(area).read()
    pos, size, path, others = 0, None, "", False
    while pos < len(data):
        record = _RECORD.match(data, pos)
        end = pos + int(record[1]) if record else 0
        if record is None or end > len(data) or end <= record.end() or data[end - 1 : end] != b"\n":
            raise CorruptError("a pax header that is not a list of records: damaged", offset=member.start + pos)
        key, value = record[2].decode("ascii"), data[record.end() : end - 1]
        others = others or key not in (*_PAX_KEYS, "path")
        if key == "path":
            others = others or bool(path)
            path = value.decode("utf-8", "backslashreplace")
        if key == "size":
            if size is not None or not re.fullmatch(rb"[0-9]{1,19}", value):
                raise CorruptError(
                    "a pax header whose size is not a number, or stated twice", offset=member.start + pos
                )
            size = int(value)
        pos = end
    return size, "" if others else path, not (others or path)


def _check_end(area: ByteRange, pos: int) -> None:
    left = area.nbytes - pos
    if left < 2 * BLOCK_NBYTES:
        raise CorruptError("truncated: the archive's end is missing. Download or copy the file again", offset=pos)
    if left > _MAX_PADDING_NBYTES or any(area.read(pos, left)):
        raise AmbiguousError(
            f"{count_of(left, 'byte', 'follows', 'follow')} the archive's last member and are not padding: some "
            "readers would continue there",
            offset=pos,
        )
