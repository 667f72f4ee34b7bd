"""A file on another machine as a source: few requests, and what was read of it once is kept.

A checkpoint's directory is at the end of a torch-zip, its pickle at the beginning; a safetensors file has a header. So
the first bytes come with the answer to the question how large the file is, and what is read after them comes with some
that follow.  An archive that begins with a pickle longer than those has a long directory too: that is asked for at
once.  A file of 300 tensors then takes two requests, one of 5,000 three; one more if a server sends the size
separately.

Looking into such a file leaves some of its bytes unread that of a local one are read (`RemoteSource.on_read`): the
records' own headers beside values, which must say what an archive's directory says, the counts between the storages of
torch-legacy, and the end of a file that is not a zip archive, which must not look like one.  They are made when their
bytes come along with others, and all of them before values are given to anyone (`RemoteSource.settle`).
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter

from ckptkit.bytesource import GAP_NBYTES, Source, at_once, pace
from ckptkit.errors import CkptkitError, FileAccessError
from ckptkit.remote.ahead import Passing, ReadAhead
from ckptkit.remote.store import FarFile, Store

__all__ = ["RemoteSource"]

_HEAD_NBYTES = 96 << 10
"""First bytes that come with the size, or are read if none do."""

_HEADER_NBYTES = 256 << 10
"""First bytes that are read where none come with the size, of a file called as those that begin with their header."""

_LEAST_NBYTES, _MOST_NBYTES = 32 << 10, 4 << 20
"""Bytes that are read where fewer are asked for, and the most that they become while reads follow one another."""

_AT_ONCE_NBYTES = 8 << 20
"""For a long range that was not announced before it was read."""

_LONG_TAIL_NBYTES = 512 << 10
"""Of a file that begins with a longer pickle than fits into the first bytes."""

_KEPT_NBYTES = 64 << 20
"""Bytes of what was read that are kept; what was read first goes first."""

_ALONG_NBYTES = 256 << 10
"""Bytes between two that are wanted which are read along: a trip takes longer."""

_TOGETHER_NBYTES = 8 << 20
"""The most bytes of a request for several ranges."""

_RECORD = b"PK\x03\x04"
_LONG_PICKLE = re.compile(rb"PK\x03\x04.{26}[^/]{1,255}/data\.pkl", re.DOTALL)
"""How an archive of torch begins."""

_Left = tuple[int, int, Callable[[bytes], object]]
"""A check that waits until values are read: offset, size in bytes, and the function."""

_begin: Callable[[_Left], int] = itemgetter(0)


def _read(store: Store, far: FarFile, offset: int, nbytes: int) -> bytes:
    data = store.read(far, offset, nbytes)
    pace.arrive(len(data))
    return data


class RemoteSource(Source):
    """A file on another machine.

    Args:
        store: who has it.
        url: where.

    Attributes:
        store: as above.
        far: what the server said about it.

    Raises:
        MissingFileError: there is none.
        FileAccessError: it cannot be read.
    """

    __slots__ = (
        "_ahead", "_end", "_kept", "_later", "_length", "_opened", "_spans", "_starts", "_within", "far", "store",
    )  # fmt: skip

    is_far = True

    def __init__(self, store: Store, url: str) -> None:
        self._within = threading.RLock()
        self._starts: list[int] = []
        self._spans: dict[int, bytes] = {}
        self._kept = self._end = self._length = 0
        self._later: list[_Left] = []
        self._opened: dict[str, RemoteSource | CkptkitError] = {}
        self._ahead: ReadAhead | None = None
        far = store.open(url, _HEAD_NBYTES)
        super().__init__(far.shown, far.size, far.stamp)
        self.store = store
        self.far: FarFile = replace(far, head=b"")
        self._keep(0, far.head)

    # Kept bytes.

    def _keep(self, offset: int, data: bytes) -> None:
        """Keep what is not kept yet of some bytes, or of their rest; no two spans overlap."""
        if not data or len(data) > _KEPT_NBYTES // 4:
            return
        with self._within:
            end, at = offset + len(data), bisect_right(self._starts, offset) - 1
            if at >= 0 and (known := self._starts[at] + len(self._spans[self._starts[at]])) > offset:
                if known >= end:
                    return
                offset, data = known, data[known - offset :]
            first, last = bisect_left(self._starts, offset), bisect_left(self._starts, end)
            if first < last and (begin := self._starts[last - 1]) + len(self._spans[begin]) > end:
                data, last = data[: begin - offset], last - 1
            for start in self._starts[first:last]:
                self._kept -= len(self._spans.pop(start))
            self._starts[first:last] = [offset]
            self._spans[offset] = data
            self._kept += len(data)
            for start in list(self._spans) if self._kept > _KEPT_NBYTES else ():
                if self._kept <= _KEPT_NBYTES or start == offset:
                    break
                self._kept -= len(self._spans.pop(start))
                self._starts.remove(start)

    def _known(self, offset: int, nbytes: int) -> bytes:
        """The kept part of these bytes, from the first on; more may be kept after it."""
        with self._within:
            at = bisect_right(self._starts, offset) - 1
            if at < 0:
                return b""
            start = self._starts[at]
            return self._spans[start][offset - start : offset - start + nbytes]

    def _some(self, offset: int, nbytes: int) -> bytes:
        brought = None if self._ahead is None else self._brought(self._ahead, offset, nbytes)
        if brought is not None:
            return bytes(brought)
        known = self._known(offset, nbytes)
        if known:
            return known
        with self._within:
            least = _LEAST_NBYTES
            if not offset and not self._starts:
                least = _HEADER_NBYTES if self.path.endswith(".safetensors") else _HEAD_NBYTES
            self._length = min(2 * self._length, _MOST_NBYTES) if offset == self._end and self._length else least
            end = min(offset + max(nbytes, self._length), self.size)
            first, last = bisect_right(self._starts, offset), bisect_left(self._starts, end)
            long = (start for start in self._starts[first:last] if len(self._spans[start]) >= _LEAST_NBYTES)
            self._end = end = next(long, end)
        return self._fetched(offset, end - offset)[:nbytes]

    def _fetched(self, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes, from the server."""
        data = _read(self.store, self.far, offset, nbytes)
        self._keep(offset, data)
        self.came(offset, data)
        return data

    def tail(self, nbytes: int) -> bytes:
        """As `Source.tail`; of an archive with a long directory more is fetched."""
        head = self._known(0, _HEAD_NBYTES)
        wanted = nbytes
        if _LONG_PICKLE.match(head) and head.find(_RECORD, 4) < 0 and len(head) < self.size:
            wanted = max(nbytes, min(_LONG_TAIL_NBYTES, self.size - len(head)))
        start = max(0, self.size - wanted)
        if wanted > nbytes and not self._known(self.size - 1, 1):
            self._fetched(start, self.size - start)
        return super().tail(nbytes)

    def ranges(self, wanted: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """As `Source.ranges`; many are on their way at the same time."""
        first = 0
        while first < len(wanted):
            last, nbytes = first, 0
            while last < len(wanted) and (last == first or nbytes + wanted[last][1] <= _KEPT_NBYTES // 4):
                nbytes, last = nbytes + wanted[last][1], last + 1
            part = wanted[first:last]
            self._fetch(part)
            for area in part:  # the bytes between two may be nowhere here
                yield self.read(*area)
            first = last

    def _fetch(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Get small ranges that are not kept yet, those that are close together by one request."""
        missing = [each for each in map(self._missing, sorted(wanted)) if each[0] < each[1]]
        runs = _merged(missing, _ALONG_NBYTES)
        if sum(end - begin for begin, end in runs) > _KEPT_NBYTES // 2:  # most of the file would come along
            runs = _merged(missing, GAP_NBYTES)

        def get(begin: int, end: int) -> None:
            self._fetched(begin, end - begin)

        at_once([partial(get, *run) for run in runs])

    def _missing(self, area: tuple[int, int]) -> tuple[int, int]:
        """Where what is not kept of a range begins and ends; nowhere, of a large one."""
        begin, end = area[0], min(sum(area), self.size)
        if end - begin > _KEPT_NBYTES // 4:
            return end, end
        while begin < end and (known := len(self._known(begin, end - begin))):
            begin += known
        if self._ahead is not None:
            if self._ahead.brings(begin):
                return end, end
            end = self._ahead.next_block(begin, end)
        with self._within:
            at = bisect_left(self._starts, end) - 1
            if at >= 0 and begin < self._starts[at] and self._starts[at] + len(self._spans[self._starts[at]]) >= end:
                end = self._starts[at]
        return begin, end

    # Checks delayed until values are read.

    def on_read(self, offset: int, nbytes: int, check: Callable[[bytes], object]) -> bool:
        """As `Source.on_read`."""
        begin, end = self._missing((offset, nbytes))
        if begin >= end:
            check(self.read(offset, nbytes))
            return True
        with self._within:
            at = len(self._later)
            if at and self._later[-1][0] > offset:
                at = bisect_right(self._later, offset, key=_begin)
            self._later.insert(at, (offset, nbytes, check))
        return True

    def came(self, offset: int, data: bytes | memoryview) -> None:
        """Some bytes were read, by any reader: delayed checks in them are made, and ranges that end in others are kept.

        Raises:
            FormatError: the rest is not valid.
        """
        if not self._later:
            return
        end = offset + len(data)
        with self._within:
            first = bisect_left(self._later, offset, key=_begin)
            last = bisect_left(self._later, end, lo=first, key=_begin)
            if first and (before := sum(self._later[first - 1][:2])) > offset:
                self._keep(offset, bytes(data[: before - offset]))
            inside = self._later[first:last]
            due = [left for left in inside if left[0] + left[1] <= end]
            if len(due) < len(inside):
                beyond = [left for left in inside if left[0] + left[1] > end]
                self._keep(beyond[0][0], bytes(data[beyond[0][0] - offset :]))
                self._later[first:last] = beyond
            else:
                del self._later[first:last]
        self._look(due, (bytes(data[begin - offset : begin - offset + nbytes]) for begin, nbytes, _ in due))

    def _look(self, left: Sequence[_Left], parts: Iterable[bytes]) -> None:
        """Examine what was left; an error stays for every later reader."""
        done = 0
        try:
            for (_, _, check), data in zip(left, parts, strict=True):
                check(data)
                done += 1
        except BaseException:
            with self._within:
                self._later = sorted([*self._later, *left[done:]], key=_begin)
            raise

    @property
    def left(self) -> int:
        """As `Source.left`."""
        return len(self._later)

    def settle(self, areas: Sequence[tuple[int, int]] | None = None) -> None:
        """As `Source.settle`."""
        super().settle(areas)
        if areas is None:
            self.will_read(())
            with self._within:
                left, self._later = self._later, []
        else:
            left = self._around(areas)
        self._look(left, self.ranges([each[:2] for each in left]))

    def _around(self, areas: Sequence[tuple[int, int]]) -> list[_Left]:
        """The delayed ranges next to some ranges, which are then removed; small ones are fetched with them."""
        found: list[_Left] = []
        wanted: list[tuple[int, int]] = []
        for offset, nbytes in areas:
            end = offset + nbytes
            with self._within:
                last = first = bisect_right(self._later, end, key=_begin)
                while first and sum(self._later[first - 1][:2]) >= offset:
                    first -= 1
                near = self._later[first:last]
                del self._later[first:last]
            found += near
            if nbytes <= _MOST_NBYTES:
                begin = min([offset, *(left[0] for left in near)])
                wanted.append((begin, max([end, *(left[0] + left[1] for left in near)]) - begin))
        self._fetch(wanted)
        return found

    def stamp(self) -> object:
        """As `Source.stamp`."""
        return self.store.stamp(self.far)

    @property
    def folder(self) -> str | None:
        """As `Source.folder`: a URL, where the server lists what is below it."""
        return self.path.rpartition("/")[0] if self.store.has_listings else None

    # Files beside it.

    def will_open(self, names: Sequence[str]) -> None:
        """As `Source.will_open`: they are opened side by side, with what is read of each at first."""
        at_once([partial(self._open, name) for name in names])

    def _open(self, name: str) -> None:
        opened: RemoteSource | CkptkitError
        try:
            opened = file = self._beside(name)
            file._look_ahead()
        except CkptkitError as error:
            opened = error
        with self._within:
            self._opened[name] = opened

    def _look_ahead(self) -> None:
        """Read what opening a checkpoint reads: the rest of a header, an archive's end."""
        try:
            head = self.read(0, min(16, self.size))
            if head.startswith(_RECORD):
                self.tail(_HEAD_NBYTES + 21)
            elif head[8:9] == b"{":
                nbytes = 8 + int.from_bytes(head[:8], "little")
                self._fetch([(0, nbytes)] if nbytes <= self.size else [])
        except CkptkitError:
            pass  # which reading it will tell

    def sibling(self, name: str) -> RemoteSource:
        """As `Source.sibling`."""
        with self._within:
            opened = self._opened.pop(name, None)
        if isinstance(opened, CkptkitError):
            raise opened
        return self._beside(name) if opened is None else opened

    def _beside(self, name: str) -> RemoteSource:
        return RemoteSource(self.store, self.store.beside(self.far.url, name))

    # Prefetching.

    def will_read(self, areas: Sequence[tuple[int, int]], passing: Passing | None = None) -> None:
        """As `Source.will_read`; of what is here of an earlier call some is kept."""
        if areas and self._ahead is not None:
            for start, data in self._ahead.here():
                self._keep(start, bytes(data))
        unknown: list[tuple[int, int]] = []
        for offset, nbytes in areas:
            end = offset + nbytes
            while offset < end:
                known = self._known(offset, end - offset)
                if known and passing is not None:
                    passing(offset, memoryview(known))
                following = offset + len(known) if known else self._kept_from(offset, end)
                unknown += () if known else ((offset, following - offset),)
                offset = following
        ahead = ReadAhead(partial(_read, self.store, self.far), unknown, passing) if unknown else None
        with self._within:
            before, self._ahead = self._ahead, ahead
        if before is not None:
            before.close()

    def _kept_from(self, offset: int, end: int) -> int:
        """Where after a position, before some end, the kept bytes begin again."""
        with self._within:
            at = bisect_right(self._starts, offset)
            return min([end, *self._starts[at : at + 1]])

    def _brought(self, ahead: ReadAhead, offset: int, nbytes: int) -> memoryview | None:
        """The prefetched part of these bytes; when a block arrives, delayed checks up to it are made."""
        found = ahead.find(offset, nbytes)
        if found is None:
            return None
        if found.whole is not None:
            self.came(found.start, found.whole)
            for at, size in found.late:
                self._keep(at, bytes(found.whole[at - found.start : at - found.start + size]))
        return found.data

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

    def release(self) -> None:
        """As `Source.release`: what is kept is given up."""
        with self._within:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
            self._spans.clear()
            self._starts.clear()
            self._kept = 0

    def close(self) -> None:
        """As `Source.close`."""
        super().close()
        self.release()
        with self._within:
            self._later.clear()
            opened, self._opened = self._opened, {}
        for each in opened.values():
            if isinstance(each, RemoteSource):
                each.close()

    def __reduce__(self) -> object:  # type: ignore[override]
        raise FileAccessError(f"{self.path}: an open file cannot be copied or pickled; open it again")


def _merged(areas: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Ranges in order, begin and end of each, with those that have no more than some bytes between them as one."""
    runs: list[tuple[int, int]] = []
    for begin, end in areas:
        if runs and begin - runs[-1][1] <= gap and end - runs[-1][0] <= _TOGETHER_NBYTES:
            runs[-1] = runs[-1][0], max(runs[-1][1], end)
        else:
            runs.append((begin, end))
    return runs
