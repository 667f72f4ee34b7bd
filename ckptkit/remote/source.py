"""A file on another machine as a source: few requests, and what was read of it once is kept.

A checkpoint's directory lies at the end of a torch-zip, its pickle at the beginning; a safetensors file has a header.
So the first bytes come with the answer to the question how large the file is, and what is read after them comes with
some that follow.  An archive that begins with a record longer than those has a long directory too: its end is asked for
at once.  A file of 300 tensors takes two requests so, one of 5,000 four.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ckptkit.bytesource import Source
from ckptkit.errors import FileAccessError
from ckptkit.remote.ahead import Passing, ReadAhead
from ckptkit.remote.store import FarFile, Store

__all__ = ["RemoteSource"]

_HEAD_NBYTES = 64 << 10
"""First bytes that come with the size."""

_LEAST_NBYTES, _MOST_NBYTES = 32 << 10, 4 << 20
"""Bytes that are read where fewer are asked for, and the most that they become while reads follow one another."""

_AT_ONCE_NBYTES = 8 << 20
"""Of a long range that nobody told of before it was read."""

_LONG_TAIL_NBYTES = 512 << 10
"""Of a file that begins with a longer record than fits into the first bytes."""

_KEPT_NBYTES = 64 << 20
"""Bytes of what was read that are kept; what was read first goes first."""

_RECORD = b"PK\x03\x04"


class RemoteSource(Source):
    """A file on another machine.

    Args:
        store: who has it.
        url: where.

    Attributes:
        store: as above.
        far: what was told of it.

    Raises:
        MissingFileError: there is none.
        FileAccessError: it cannot be read.
    """

    __slots__ = ("_ahead", "_checks", "_end", "_kept", "_length", "_spans", "_starts", "_within", "far", "store")

    is_far = True

    def __init__(self, store: Store, url: str) -> None:
        self._within = threading.RLock()
        self._starts: list[int] = []
        self._spans: dict[int, bytes] = {}
        self._kept = self._end = self._length = 0
        self._checks: list[tuple[int, int, Callable[[bytes], object]]] = []
        self._ahead: ReadAhead | None = None
        far = store.open(url, _HEAD_NBYTES)
        super().__init__(far.shown, far.size, far.stamp)
        self.store = store
        self.far: FarFile = far
        self._keep(0, far.head)

    # What was read is kept.

    def _keep(self, offset: int, data: bytes) -> None:
        if not data or len(data) > _KEPT_NBYTES // 4:
            return
        with self._within:
            known = self._spans.get(offset)
            if known is not None and len(known) >= len(data):
                return
            if known is None:
                self._starts.insert(bisect_right(self._starts, offset), offset)
            self._kept += len(data) - len(known or b"")
            self._spans[offset] = data
            for start in list(self._spans):
                if self._kept <= _KEPT_NBYTES or start == offset:
                    break
                self._kept -= len(self._spans.pop(start))
                self._starts.remove(start)

    def _known(self, offset: int, nbytes: int) -> bytes:
        """What is kept of these bytes, from the first on."""
        with self._within:
            at = bisect_right(self._starts, offset) - 1
            while at >= 0:
                start = self._starts[at]
                data = self._spans[start]
                if offset < start + len(data):
                    return data[offset - start : offset - start + nbytes]
                at -= 1
                if offset - start > _KEPT_NBYTES:
                    break
        return b""

    def _some(self, offset: int, nbytes: int) -> bytes:
        brought = None if self._ahead is None else self._brought(self._ahead, offset, nbytes)
        if brought is not None:
            return bytes(brought)
        known = self._known(offset, nbytes)
        if known:
            return known
        with self._within:
            self._length = min(2 * self._length, _MOST_NBYTES) if offset == self._end else _LEAST_NBYTES
            wanted = min(max(nbytes, self._length), self.size - offset, self._next(offset) - offset)
            wanted = max(wanted, min(nbytes, self.size - offset))
            self._end = offset + wanted
        data = self.store.read(self.far, offset, wanted)
        self._keep(offset, data)
        return data[:nbytes]

    def _next(self, offset: int) -> int:
        """Where what is kept begins again behind a position."""
        at = bisect_right(self._starts, offset)
        return self._starts[at] if at < len(self._starts) else self.size

    def tail(self, nbytes: int) -> bytes:
        """As `Source.tail`; of an archive with a long directory more is fetched."""
        head = self.far.head
        wanted = nbytes
        if head.startswith(_RECORD) and head.find(_RECORD, 4) < 0 and len(head) < self.size:
            wanted = max(nbytes, min(_LONG_TAIL_NBYTES, self.size - len(head)))
        start = max(0, self.size - wanted)
        if wanted > nbytes and not self._known(self.size - 1, 1):
            self._keep(start, self.store.read(self.far, start, self.size - start))
        return super().tail(nbytes)

    # What is left until values are read.

    def on_read(self, offset: int, nbytes: int, check: Callable[[bytes], object]) -> bool:
        """As `Source.on_read`."""
        known = self._known(offset, nbytes)
        if len(known) == nbytes:
            check(known)
        else:
            with self._within:
                self._checks.append((offset, nbytes, check))
        return True

    def settle(self) -> None:
        """As `Source.settle`."""
        self.will_read(())
        with self._within:
            left, self._checks = sorted(self._checks, key=lambda each: each[:2]), []
        for (_, _, check), data in zip(left, self.ranges([each[:2] for each in left]), strict=True):
            check(data)

    def stamp(self) -> object:
        """As `Source.stamp`."""
        return self.store.stamp(self.far)

    def sibling(self, name: str) -> RemoteSource:
        """As `Source.sibling`."""
        return RemoteSource(self.store, self.store.beside(self.far.url, name))

    # What is fetched ahead.

    def will_read(self, areas: Sequence[tuple[int, int]], passing: Passing | None = None) -> None:
        """As `Source.will_read`."""
        unknown = areas if passing is not None else [part for area in areas for part in self._unknown(*area)]
        ahead = ReadAhead(partial(self.store.read, self.far), unknown, passing) if unknown else None
        with self._within:
            before, self._ahead = self._ahead, ahead
        if before is not None:
            before.close()

    def _unknown(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that are not kept."""
        end = offset + nbytes
        while offset < end:
            known = len(self._known(offset, end - offset))
            follows = end if known else min(end, self._next(offset))
            if not known:
                yield offset, follows - offset
            offset = offset + known if known else follows

    def _brought(self, ahead: ReadAhead, offset: int, nbytes: int) -> memoryview | None:
        """What was fetched ahead of these bytes; where a block comes, what was left until then is looked at."""
        found = ahead.find(offset, nbytes)
        if found is None:
            return None
        data, block, start = found
        if block is not None and self._checks:
            with self._within:
                end, checks = start + len(block), self._checks
                passing = [each for each in checks if start <= each[0] and each[0] + each[1] <= end]
                self._checks = [each for each in checks if not (start <= each[0] and each[0] + each[1] <= end)]
            for at, size, check in passing:
                check(bytes(block[at - start : at - start + size]))
        return data

    def views(self, offset: int, nbytes: int) -> Iterator[bytes | memoryview]:
        """As `Source.views`."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size or self._closed:
            self.read(offset, nbytes)  # raises
        while nbytes:
            part: bytes | memoryview | None = None
            if self._ahead is not None:
                part = self._brought(self._ahead, offset, nbytes)
            if part is None:
                part = self.read(offset, min(nbytes, _AT_ONCE_NBYTES))
            yield part
            offset, nbytes = offset + len(part), nbytes - len(part)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """As `Source.read_into`; what was fetched is copied once."""
        view, at = memoryview(buffer), 0
        for part in self.views(offset, len(view)):
            view[at : at + len(part)] = part
            at += len(part)

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        with self._within:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
            self._spans.clear()
            self._starts.clear()
            self._kept = 0
            if self._checks:
                self._checks.clear()

    def __reduce__(self) -> object:  # type: ignore[override]
        raise FileAccessError(f"{self.path}: an open file cannot be copied or pickled; open it again")
