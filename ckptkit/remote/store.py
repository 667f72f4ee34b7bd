"""Requests to a server: a file's size and first bytes, some of its bytes, whether it has changed, a listing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from ckptkit.startup import dataclass

__all__ = ["FarFile", "Store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FarFile:
    """A file, as a server describes it.

    Attributes:
        url: with credentials: only for requests.
        shown: the same as messages have it, without them.
        size: in bytes.
        stamp: what differs once it is another: ETag, generation, time of change; ``None``: the server says nothing.
        head: its first bytes, where they came along.
        place: facts that the store itself needs to continue reading: where it was redirected to, a version.
    """

    url: str = field(repr=False)
    shown: str
    size: int
    stamp: str | None = None
    head: bytes = field(default=b"", repr=False)
    place: Any = field(default=None, repr=False)


class Store:
    """A kind of server.  What fails for the moment is tried again in here; errors name the file as it may be shown."""

    has_listings = True
    """Whether it says what is below a URL."""

    def open(self, url: str, nbytes: int) -> FarFile:
        """The facts about a file; with up to ``nbytes`` of its first bytes if they take no extra request.

        Raises:
            MissingFileError: there is none.
            FileAccessError: it cannot be read; the message says what to set, or to do.
        """
        raise NotImplementedError

    def read(self, file: FarFile, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes, of the file as it was when it was opened.

        Raises:
            CorruptError: it is another by now.
            FileAccessError: they could not be read.
        """
        raise NotImplementedError

    def stamp(self, file: FarFile) -> str | None:
        """`FarFile.stamp`, by now.

        Raises:
            FileAccessError: it cannot be found out.
        """
        raise NotImplementedError

    def listing(self, url: str) -> Mapping[str, int]:
        """The files below a folder, however deep: size in bytes by path from there, with slashes; empty: there is none.

        Raises:
            FileAccessError: it cannot be listed.
        """
        raise NotImplementedError

    def beside(self, url: str, name: str) -> str:
        """The URL of a name beside a file."""
        return f"{url.rsplit('/', 1)[0]}/{name}"
