"""Files that are far away, in this process: a store of bytes under ``far://`` that tells what it was asked for.

Within ``serving({"far://bucket/model.pth": data}) as store`` that URL is a path like any other.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from ckptkit import remote
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError
from ckptkit.formats import containers, zip_archive, zip_records
from ckptkit.remote import source
from ckptkit.remote.retries import masked
from ckptkit.remote.store import FarFile, Store

__all__ = ["Asked", "FarStore", "below", "little_by_little", "serving"]


class Asked(NamedTuple):
    """A request: what for (``open``, ``read``, ``stamp``, ``listing``), of which URL, which bytes came."""

    what: str
    url: str
    offset: int = 0
    nbytes: int = 0


@lru_cache(1024)
def _stamp(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FarStore(Store):
    """A server of bytes.

    Args:
        files: what is there, by URL; may be changed at any time.
        heads: whether the first bytes of a file come with its size, as over http; from object stores they do not.
        lists: whether it says what lies in a folder; http does not.

    Attributes:
        files, heads: as above.
        asked: the requests, in order.
        failing: URLs that cannot be read, with what is said then.
    """

    def __init__(self, files: Mapping[str, bytes], *, heads: bool = True, lists: bool = True) -> None:
        self.files = dict(files)
        self.heads, self.has_listings = heads, lists
        self.asked: list[Asked] = []
        self.failing: dict[str, str] = {}
        self._within = threading.Lock()

    def _note(self, what: str, url: str, offset: int = 0, nbytes: int = 0) -> None:
        with self._within:
            self.asked.append(Asked(what, url, offset, nbytes))

    def _data(self, url: str) -> bytes:
        if url in self.failing:
            raise FileAccessError(f"{masked(url)}: {self.failing[url]}", path=masked(url))
        if url not in self.files:
            raise MissingFileError(f"{masked(url)}: no such file", path=masked(url))
        return self.files[url]

    def open(self, url: str, nbytes: int) -> FarFile:
        """As `Store.open`."""
        head = self.files.get(url, b"")[:nbytes] if self.heads else b""
        self._note("open", url, 0, len(head))
        data = self._data(url)
        return FarFile(url=url, shown=masked(url), size=len(data), stamp=_stamp(data), head=head)

    def read(self, file: FarFile, offset: int, nbytes: int) -> bytes:
        """As `Store.read`."""
        self._note("read", file.url, offset, nbytes)
        data = self._data(file.url)
        if _stamp(data) != file.stamp:
            raise CorruptError("the file was changed while it was being read", path=file.shown)
        if nbytes < 1 or offset < 0 or offset + nbytes > len(data):
            raise AssertionError(f"bytes that are not there were asked for: {offset}, {nbytes} of {len(data)}")
        return data[offset : offset + nbytes]

    def stamp(self, file: FarFile) -> str | None:
        """As `Store.stamp`."""
        self._note("stamp", file.url)
        return _stamp(self._data(file.url))

    def listing(self, url: str) -> Mapping[str, int]:
        """As `Store.listing`."""
        if not self.has_listings:
            raise FileAccessError(f"{url}: this server lists no files", path=url)
        self._note("listing", url)
        root = url.rstrip("/") + "/"
        return {name[len(root) :]: len(data) for name, data in sorted(self.files.items()) if name.startswith(root)}

    @property
    def nbytes(self) -> int:
        """Bytes that were served."""
        return sum(each.nbytes for each in self.asked)

    def of(self, what: str) -> list[str]:
        """The URLs that were asked for so (see `Asked`)."""
        return [each.url for each in self.asked if each.what == what]


def below(folder: str | os.PathLike[str], url: str) -> dict[str, bytes]:
    """The files below a local folder, by the URLs that they have below another; or the one file, at that URL."""
    root = Path(folder)
    if root.is_file():
        return {url: root.read_bytes()}
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {f"{url.rstrip('/')}/{path.relative_to(root).as_posix()}": path.read_bytes() for path in found}


@contextmanager
def little_by_little() -> Iterator[None]:
    """Meanwhile so little of a far file is read at once that small ones are not whole by the first look at them."""
    amounts = ("_HEAD_NBYTES", 512), ("_HEADER_NBYTES", 512), ("_LEAST_NBYTES", 64), ("_ALONG_NBYTES", 16 << 10)
    with ExitStack() as stack:
        for name, nbytes in amounts:
            stack.enter_context(mock.patch.object(source, name, nbytes))
        for module in (zip_records, zip_archive, containers):
            stack.enter_context(mock.patch.object(module, "TAIL_NBYTES", 1200))
        yield


@contextmanager
def serving(
    files: Mapping[str, bytes], *, heads: bool = True, lists: bool = True, scheme: str = "far"
) -> Iterator[FarStore]:
    """A store that has the URLs of a scheme while this lasts; each command asks it in a session of its own."""
    store, others = FarStore(files, heads=heads, lists=lists), remote._made

    def made(asked: str, current: remote.Session) -> Store:
        return store if asked == scheme else others(asked, current)

    with mock.patch.object(remote, "_made", made):
        yield store
