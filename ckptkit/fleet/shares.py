"""Which of very many paths are meant: lists of them in files, and the share of each machine in a job array."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from ckptkit.errors import FileAccessError, FormatError, MissingFileError, VerifyError
from ckptkit.nearness import meant_file
from ckptkit.startup import dataclass

__all__ = ["STDIN", "Share", "paths_from"]

STDIN = "-"
"""The path that means standard input."""

_HEAD_NBYTES = 8192
"""Twice the longest path of Linux (``PATH_MAX``): a list whose names end in NUL has one among them."""

_CHUNK_NBYTES = 1 << 16

_LONGEST = 1 << 16
"""Bytes of a path; what has more is not a list of paths."""


_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
"""What no name has; a checkpoint that is taken for a list has it, and bytes in it may be those of a folder's path."""


@dataclass(frozen=True, slots=True)
class Share:
    """The I-th of N shares of any paths: together they are all of them, each once, in whatever order they come.

    A path's share is decided only by a hash of its text, so machines need not know about one another.

    Attributes:
        index: which, from 1.
        count: how many there are.
    """

    index: int
    count: int

    @classmethod
    def of(cls, text: Any) -> Share:
        """The share that is written ``"2/8"``.

        Raises:
            VerifyError: it is not one.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text) if isinstance(text, str) else None
        share = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= share.index <= share.count:
            raise VerifyError(f"part {text!r:.40}: expected I/N, I from 1 to N, such as 2/8")
        return share

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, path: str) -> bool:
        """Whether a path is in this share."""
        import hashlib  # with it, commands that have no shares would start later

        data = path.replace(os.sep, "/").encode("utf-8", "surrogateescape" if os.name != "nt" else "surrogatepass")
        digest = hashlib.blake2b(data, digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index - 1


def paths_from(file: str) -> Iterator[str]:
    """The paths that a file lists, read while they are asked for.

    There is one on each line, or where NULs are in the file one before each NUL (``find -print0``); empty ones are left
    out, and so are the carriage return and the byte order mark that other systems write.

    Args:
        file: its path; ``"-"``: standard input.

    Raises:
        MissingFileError, FileAccessError: the list cannot be read.
        FormatError: it is not a list of paths.
    """
    try:
        if file == STDIN:
            yield from _paths(sys.stdin.buffer, "standard input")
            return
        with open(file, "rb") as stream:  # noqa: PTH123 - a list, and no checkpoint
            yield from _paths(stream, file)
    except FileNotFoundError:
        raise MissingFileError(f"{file}: no such file{meant_file(file)}", path=file) from None
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{file}: the list cannot be read: {error.strerror or error}", path=file) from error


def _paths(stream: BinaryIO, name: str) -> Iterator[str]:
    head = stream.read(_HEAD_NBYTES)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FormatError("is UTF-16 text; expected a list of paths in UTF-8, one on each line", path=name)
    head = head.removeprefix(b"\xef\xbb\xbf")
    separator = b"\0" if b"\0" in head else b"\n"
    for entry in _split(head, stream, separator, name):
        path = entry.removesuffix(b"\r") if separator == b"\n" else entry
        if path and not (separator == b"\n" and path.isspace()):
            yield os.fsdecode(path)


def _split(head: bytes, stream: BinaryIO, separator: bytes, name: str) -> Iterable[bytes]:
    rest, chunk = b"", head
    while chunk:
        if _CONTROL.search(chunk):
            raise FormatError("is not text; expected a list of paths, one on each line or before each NUL", path=name)
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
        if len(rest) > _LONGEST:
            raise FormatError(f"has a line of more than {_LONGEST:,} bytes; expected a path on each line", path=name)
        chunk = stream.read(_CHUNK_NBYTES)
    yield rest
