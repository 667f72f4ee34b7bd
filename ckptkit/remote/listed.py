"""A file of a listing: asked for when it is first read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from ckptkit.bytesource import Source, at_once
from ckptkit.errors import CkptkitError, CorruptError
from ckptkit.remote.retries import masked
from ckptkit.remote.source import RemoteSource
from ckptkit.remote.store import Store

__all__ = ["ListedSource", "look_ahead"]


class ListedSource(Source):
    """A file of a listing: its size is known from there, and it is asked for when it is first read.

    Args:
        store: who has it.
        url: where.
        size: in bytes, as listed.
    """

    __slots__ = ("_file", "_store", "_url")

    is_far = True

    def __init__(self, store: Store, url: str, size: int) -> None:
        super().__init__(masked(url), size)
        self._store, self._url = store, url
        self._file: RemoteSource | None = None

    def _opened(self) -> RemoteSource:
        self._require_open()
        with self._lock:
            if self._file is None:
                file = RemoteSource(self._store, self._url)
                if file.size != self.size:
                    told = (
                        f"the file has {file.size:,} bytes but was listed with {self.size:,}: it changed in the "
                        "meantime"
                    )
                    raise CorruptError(told, path=self.path)
                self._file, self.identity = file, file.identity
            return self._file

    def _some(self, offset: int, nbytes: int) -> bytes:
        return self._opened()._some(offset, nbytes)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`."""
        self._opened().read_into(offset, buffer)

    def tail(self, nbytes: int) -> bytes:
        """As `Source.tail`."""
        return self._opened().tail(nbytes)

    def ranges(self, wanted: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """As `Source.ranges`."""
        return self._opened().ranges(wanted)

    def views(self, offset: int, nbytes: int) -> Iterator[bytes | memoryview]:
        """As `Source.views`."""
        return self._opened().views(offset, nbytes)

    def will_read(
        self, areas: Sequence[tuple[int, int]], passing: Callable[[int, memoryview], object] | None = None
    ) -> None:
        """As `Source.will_read`."""
        if areas or self._file is not None:
            self._opened().will_read(areas, passing)

    def on_read(self, offset: int, nbytes: int, check: Callable[[bytes], object]) -> bool:
        """As `Source.on_read`."""
        return self._opened().on_read(offset, nbytes, check)

    def settle(self, areas: Sequence[tuple[int, int]] | None = None) -> None:
        """As `Source.settle`; an unread file has nothing to check."""
        if self._file is not None:
            self._file.settle(areas)

    @property
    def left(self) -> int:
        """As `Source.left`."""
        return 0 if self._file is None else self._file.left

    def look_ahead(self) -> None:
        """Open it, and read what opening a checkpoint reads; errors show when it is read."""
        with contextlib.suppress(CkptkitError):
            self._opened()._look_ahead()

    def stamp(self) -> object:
        """As `Source.stamp`."""
        return self.identity if self._file is None else self._file.stamp()

    def sibling(self, name: str) -> RemoteSource:
        """As `Source.sibling`."""
        return RemoteSource(self._store, self._store.beside(self._url, name))

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        if self._file is not None:
            self._file.close()


def look_ahead(files: Iterable[Source]) -> None:
    """Look into files of a listing side by side, before each is asked for what is in it."""
    at_once([file.look_ahead for file in files if isinstance(file, ListedSource)])
