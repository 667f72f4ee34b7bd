"""Files on other machines, read by range: a URL is a path like any other.

`store` says what a server is asked for, and there is one module for each kind of server: `http` (http and https), `hub`
(hf://) and `objects` (all that fsspec knows: s3, gs, az and others).  `source` makes a `ckptkit.bytesource.Source` of a
file there, which is all that the rest of ckptkit sees of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ckptkit.errors import FileAccessError
from ckptkit.remote.source import RemoteSource
from ckptkit.remote.store import Store

__all__ = ["RemoteSource", "Session", "Store", "is_url", "session", "source_at", "store_of"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SHORTEST = 2
"""Letters of a scheme: one is a drive."""


def is_url(path: str) -> bool:
    """Whether a path is a URL: ``https://``, ``s3://`` and the like."""
    found = _URL.match(path) if "://" in path else None
    return found is not None and len(found[1]) >= _SHORTEST


class Session:
    """What one command knows of the servers it asks.

    Args:
        options: ``--storage-option``: what fsspec's file systems are made with.

    Attributes:
        options: as above.
        stores: those that were asked, by scheme.
        listings: what they said of folders.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.stores: dict[str, Store] = {}
        self.listings: dict[str, Any] = {}


_current: ContextVar[Session | None] = ContextVar("ckptkit_remote_session", default=None)


@contextmanager
def session(options: Mapping[str, Any] | None = None) -> Iterator[Session]:
    """Within it, servers are asked with these options, and each folder is listed once; one inside another is that one.

    Threads that are to take part run in a copy of the context (``contextvars.copy_context``).
    """
    known = _current.get()
    if known is not None and not options:
        yield known
        return
    made = Session(options or {})
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)


def store_of(url: str) -> Store:
    """Who has the file, or folder, of a URL.

    Raises:
        FileAccessError: nothing is known of its scheme.
        MissingDependencyError: what reads it is not installed.
    """
    found = _URL.match(url)
    if found is None:
        raise FileAccessError(f"{url!r:.200} is no URL")
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
    raise FileAccessError(f"{scheme}:// cannot be read")


def source_at(url: str) -> RemoteSource:
    """What holds the bytes of the file at a URL.

    Raises:
        MissingFileError: there is none.
        FileAccessError: it cannot be read.
        MissingDependencyError: what reads it is not installed.
    """
    return RemoteSource(store_of(url), url)
