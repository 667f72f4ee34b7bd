"""Files on other machines, read by range: a URL is a path like any other.

`store` defines what a server is asked for, and there is one module for each kind of server: `http` (http and https),
`hub` (hf://) and `objects` (everything that fsspec supports: s3, gs, az and others).  `source` makes a
`ckptkit.bytesource.Source` of a remote file, which is all that the rest of ckptkit sees of it; `ckptkit.places` lists
what is below a URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from ckptkit.bytesource import Source, SourceFile
from ckptkit.errors import FileAccessError
from ckptkit.remote.source import RemoteSource
from ckptkit.remote.store import Store

__all__ = [
    "RemoteSource", "Session", "Store", "carried", "current_session", "is_url", "local_path", "opened_at", "revealed",
    "session", "source_at", "store_of",
]  # fmt: skip

T = TypeVar("T")
R = TypeVar("R")

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*([A-Za-z][A-Za-z0-9+.-]*)://")
_ROOT = re.compile(r"[^/]*//[^/?#]*")
"""Scheme, and who is asked."""

_SHORTEST = 2
"""Letters of a scheme: one is a drive."""


def is_url(path: str) -> bool:
    """Whether a path is a URL: ``https://``, ``s3://`` and the like."""
    found = _URL.match(path) if "://" in path else None
    return found is not None and len(found[1]) >= _SHORTEST


def local_path(url: str) -> str:
    """The path of a file of this machine (``file:///tmp/a``, ``local://``; RFC 8089); of anything else itself."""
    found = _URL.match(url)
    if found is None or found[0].lower() not in ("file://", "local://"):
        return url
    path = url[found.end() :].removeprefix("localhost")
    if os.name == "nt" and path[2:3] in (":", "|"):
        path = path[1:]
    if "%" in path and not os.path.lexists(path):
        from urllib.parse import unquote

        return unquote(path)
    return path


class _Ahead(Protocol):
    def take(self, url: str) -> RemoteSource | None: ...


_MOST_KEPT = 128
"""Files that were opened to see what they are, and stay open for their next reader: some 64 KiB of memory each."""


class Session:
    """Facts that one command has learned about servers.

    Args:
        options: ``--storage-option``: what fsspec's file systems are made with.

    Attributes:
        options: as above.
        stores: those that were asked, by scheme.
        listings: of folders, by URL (`ckptkit.places.far.Tree`).
        opened: files that were opened to see what they are, by URL.
        ahead: what opens files before they are asked for.
        failed: why a file could not be opened, or a folder listed, by URL, a folder's with ``/*`` at its end.
        notes: facts that others learned about URLs, by URL.
        hidden: the credentials in URLs: each URL, and who it asks, by how it is shown.
        process: whose connections they are.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.stores: dict[str, Store] = {}
        self.listings: dict[str, Any] = {}
        self.opened: dict[str, RemoteSource] = {}
        self.ahead: _Ahead | None = None
        self.failed: dict[str, FileAccessError] = {}
        self.notes: dict[str, Any] = {}
        self.hidden: dict[str, str] = {}
        self.process = os.getpid()

    def shown(self, url: str) -> str:
        """A URL as it appears in paths and messages: without credentials.

        Raises:
            FileAccessError: others are known for whom it asks.
        """
        from ckptkit.remote.retries import masked

        told = masked(url)
        if told == url:
            return url
        self.hidden[told] = url
        whom, who = (each.group(0) if (each := _ROOT.match(path)) else "" for path in (told, url))
        if whom != who and self.hidden.setdefault(whom, who) != who:
            raise FileAccessError(f"{told}: is given with two different passwords; open one after the other", path=told)
        return told

    def keep(self, url: str, file: RemoteSource) -> None:
        """Keep a file open for its next reader."""
        if len(self.opened) >= _MOST_KEPT or self.opened.setdefault(url, file) is not file:
            file.close()

    def taken(self, url: str) -> RemoteSource | None:
        """A file that is open already, and is the caller's from now on; ``None``: it is not one.

        Raises:
            FileAccessError: it was asked for, and cannot be opened.
        """
        kept = self.opened.pop(url, None)
        return kept if kept is not None or self.ahead is None else self.ahead.take(url)

    def close(self) -> None:
        """Close unused files, and discard what was learned; connections stay."""
        while self.opened:
            self.opened.popitem()[1].close()
        for told in (self.listings, self.failed, self.notes, self.hidden):
            told.clear()


_current: ContextVar[Session | None] = ContextVar("ckptkit_remote_session", default=None)


def current_session() -> Session | None:
    """The session that this is within; ``None``: it is within none, or in one that another process began."""
    known = _current.get()
    return known if known is not None and known.process == os.getpid() else None


@contextmanager
def session(options: Mapping[str, Any] | None = None) -> Iterator[Session]:
    """Within it, servers are asked with these options, and each folder is listed once; one inside another is that one.

    Threads that are to take part run in a copy of the context (``contextvars.copy_context``).
    """
    known = current_session()
    if known is not None and not options:
        yield known
        return
    made = Session(options or {})
    with _within(made):
        yield made


@contextmanager
def _within(made: Session) -> Iterator[None]:
    token = _current.set(made)
    try:
        yield
    finally:
        _current.reset(token)
        made.close()


_kept: list[Session] = []
"""That of this process's last task: each would connect again."""


class _Carried:
    """Work with the options of a session, which no `repr` shows.

    Args:
        known: the session.
        work: called within a session like it.
    """

    def __init__(self, known: Session, work: Callable[[Any], Any]) -> None:
        self._options, self._hidden, self._work = known.options, dict(known.hidden), work

    def __call__(self, task: Any) -> Any:
        made = Session(self._options)
        made.hidden.update(self._hidden)
        last = _kept[-1] if _kept else made
        if last.process == made.process and last.options == made.options:
            made.stores = last.stores
        _kept[:] = [made]
        with _within(made):
            return self._work(task)


def carried(work: Callable[[T], R]) -> Callable[[T], R]:
    """The work with the options of the session that this is within, for a process that is within none."""
    known = current_session()
    return work if known is None else _Carried(known, work)


def revealed(url: str) -> str:
    """A URL as it was given: with the credentials that are hidden in what it is called (`Session.shown`)."""
    current = current_session()
    if current is None or not current.hidden:
        return url
    if url in current.hidden:
        return current.hidden[url]
    root = _ROOT.match(url)
    return url if root is None else current.hidden.get(root[0], root[0]) + url[root.end() :]


def opened_at(url: str) -> RemoteSource:
    """A file that is asked for again; as `source_at`."""
    return RemoteSource(store_of(url), revealed(url))


def store_of(url: str) -> Store:
    """Who has the file, or folder, of a URL.

    Raises:
        FileAccessError: nothing is known of its scheme.
        MissingDependencyError: what reads it is not installed.
    """
    found = _URL.match(url)
    if found is None:
        raise FileAccessError(f"{url!r:.200} is not a URL")
    if "::" in found[0]:
        raise FileAccessError(
            f"{found[0]}: chained URLs are not supported; name the file itself, and a member of a zip or tar archive "
            "as FILE/MEMBER"
        )
    scheme = found[1].lower()
    with session() as current:
        store = current.stores.get(scheme)
        if store is None:
            store = current.stores[scheme] = _made(scheme, current)
        return store


def _made(scheme: str, current: Session) -> Store:
    if scheme in ("http", "https"):
        from ckptkit.remote.http import HttpStore

        return HttpStore()
    if scheme == "hf":
        from ckptkit.remote.hub import HubStore

        return HubStore()
    from ckptkit.remote.objects import ObjectStore

    return ObjectStore(scheme, current.options)


def source_at(url: str) -> Source:
    """What contains the bytes of the file at a URL.

    Raises:
        MissingFileError: there is none.
        FileAccessError: it cannot be read.
        MissingDependencyError: what reads it is not installed.
    """
    if (path := local_path(url)) != url:
        return SourceFile(path)
    current = current_session()
    if current is not None:
        if (failed := current.failed.get(url)) is not None:
            raise failed
        if (kept := current.taken(url)) is not None:
            return kept
    return opened_at(url)
