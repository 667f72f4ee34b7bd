"""Reads ahead: the next bytes of a file on another machine are fetched in blocks, several at a time.

Readers of values announce them (`ckptkit.bytesource.Source.will_read`), in about the order in which they are read.
Ranges that nearly follow one another are made blocks of 8 to 32 MiB, each byte in one; for ranges that are a whole
file, they are smaller if the file is.  Some threads fetch the next blocks, as far as there is room; a reader who comes
before them fetches the block itself, so nobody ever waits for room.  A block is let go of once the readers are some way
past it.  Ranges requested then are read as if they had not been announced.

The memory is shared by all files that are read ahead: `MOST_NBYTES`, and the blocks that readers fetch themselves.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

from ckptkit.bytesource import given_up, require_wanted

__all__ = ["GAP_NBYTES", "MOST_NBYTES", "Brought", "Passing", "ReadAhead"]

GAP_NBYTES, _LEAST_GAP = 1 << 20, 16 << 10
"""The most bytes between two ranges that are fetched along, because a request takes as long; and for files with little
to read, in which known or unneeded bytes would add up to much.
"""

_LEAST_BLOCK, _LARGE_BLOCK = 8 << 20, 16 << 20
"""Bytes of a block, of files up to some 100 MiB and of larger ones; what is left over is shared out among them."""

MOST_NBYTES = 128 << 20
"""Bytes of blocks of all files in memory or under way, so that more may be fetched ahead."""

_AHEAD_NBYTES, _KEPT_NBYTES = 80 << 20, 48 << 20
"""Bytes fetched beyond the current position, and bytes kept before it for readers slightly behind."""

_LATE_NBYTES = 64 << 10
"""Bytes of a range that are kept separately if it is read long after its block."""

_FETCHERS = 4
"""Blocks of a file that are fetched at a time."""

Passing = Callable[[int, memoryview], object]
"""Called with where a block begins and its bytes, once each, as they come; from several threads, in about their order.
"""


class _Block:
    """A run of the file that is fetched at once.

    Attributes:
        start, end: its first byte, and the byte after the last.
        turn: its number in the order in which they are read.
        before: bytes of the blocks before it.
        state: ``"waiting"``, ``"coming"``, ``"here"``, ``"gone"`` or ``"failed"``.
        data: its bytes, while they are here.
        late: small ranges in it that are read only when it was let go of.
        problem: why they could not be fetched.
        is_new: whether no reader has had of it yet.
    """

    __slots__ = ("before", "data", "end", "is_new", "late", "problem", "start", "state", "turn")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.turn = self.before = 0
        self.state = "waiting"
        self.data = memoryview(b"")
        self.late: list[tuple[int, int]] = []
        self.problem: Exception | None = None
        self.is_new = True


class Brought(NamedTuple):
    """The part of the requested bytes in a block.

    Attributes:
        data: they.
        whole: the bytes of the block, for the first who has of it; else ``None``.
        start: where it begins.
        late: ranges in it that are read only when it was let go of.
    """

    data: memoryview
    whole: memoryview | None
    start: int
    late: Sequence[tuple[int, int]]


_changed = threading.Condition()
"""Held while any block changes its state; notified when one has."""


class _Room:
    """The memory that all share: bytes in memory or under way, bytes that readers had so far, and who reads."""

    nbytes = 0
    had = 0
    readers: ClassVar[list[ReadAhead]] = []


class ReadAhead:
    """The ranges of one file that are about to be read.  It knows nothing about the source, and ends with `close`.

    Args:
        read: gives exactly so many bytes from a position; called from several threads.
        areas: the ranges, offset and size in bytes, in about the order in which they are read.
        passing: called with each block as it arrives.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], areas: Sequence[tuple[int, int]], passing: Passing | None = None
    ) -> None:
        self._read = read
        self._passing = passing
        self._blocks = list(_blocks(areas))
        before = 0
        for turn, block in enumerate(self._blocks):
            block.turn, block.before = turn, before
            before += block.end - block.start
        self._lying = sorted(self._blocks, key=lambda block: block.start)
        self._starts = [block.start for block in self._lying]
        turn = 0
        for offset, nbytes in areas:
            block = self._lying[max(bisect_right(self._starts, offset) - 1, 0)]
            if block.turn >= turn:
                turn = block.turn
            elif nbytes <= _LATE_NBYTES and self._blocks[turn].before - block.before > _KEPT_NBYTES // 2:
                block.late.append((offset, nbytes))
        self._at = -1
        """The last turn that was read."""
        self._had = 0
        """What all readers had had when one was here last."""
        self._next = 0
        self._here: list[_Block] = []
        self._threads: list[threading.Thread] | None = None
        self._is_closed = False
        self._halt = threading.Event()

    def find(self, offset: int, nbytes: int) -> Brought | None:
        """The part of these bytes in a block, from the first on; ``None``: there is none, or it was released.

        Raises:
            FileAccessError, CorruptError: as the block could not be fetched.
        """
        at = bisect_right(self._starts, offset) - 1
        if at < 0 or offset >= self._lying[at].end:
            return None
        block = self._lying[at]
        with _changed:
            while block.state == "coming" and not self._is_closed:
                _changed.wait(0.2)  # an interrupt is received in the meantime
                require_wanted()
            if self._is_closed or block.state == "gone":
                return None
            is_ours = block.state == "waiting"
            if is_ours:
                self._begin(block)
            self._advance(block.turn)
            _Room.had += nbytes
            self._had = _Room.had
        if is_ours:
            self._bring(block)
        with _changed:
            if block.problem is not None:
                raise block.problem
            data, is_new, block.is_new = block.data, block.is_new, False
        if not data:
            return None
        start = offset - block.start
        return Brought(data[start : start + nbytes], data if is_new else None, block.start, block.late)

    def brings(self, offset: int) -> bool:
        """Whether a block has this byte, or will."""
        at = bisect_right(self._starts, offset) - 1
        return at >= 0 and offset < self._lying[at].end and self._lying[at].state != "gone"

    def next_block(self, offset: int, end: int) -> int:
        """Where the first block after a position begins, before some end."""
        at = bisect_right(self._starts, offset)
        return min([end, *(block.start for block in self._lying[at : at + 1] if block.state != "gone")])

    def here(self) -> list[tuple[int, memoryview]]:
        """The blocks that are here: where each begins, and its bytes."""
        with _changed:
            return [(block.start, block.data) for block in self._here]

    def _begin(self, block: _Block) -> None:
        block.state = "coming"
        _Room.nbytes += block.end - block.start

    def _advance(self, turn: int) -> None:
        """A reader is at this block: blocks well before it are released, and the following ones are fetched."""
        if turn <= self._at:
            return
        self._at = turn
        self._next = max(self._next, turn + 1)
        reached = self._blocks[turn].before
        for block in [each for each in self._here if reached - each.before - (each.end - each.start) > _KEPT_NBYTES]:
            self._drop(block)
        if self._threads is None:
            self._threads = []
            _Room.readers.append(self)
            for _ in range(min(_FETCHERS, len(self._blocks) - 1)):
                thread = threading.Thread(target=self._fetch, name="ckptkit-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()
        _changed.notify_all()

    def _drop(self, block: _Block) -> None:
        self._here.remove(block)
        block.state = "gone"
        block.data = memoryview(b"")
        _Room.nbytes -= block.end - block.start

    def _bring(self, block: _Block) -> None:
        """Fetch a block that was begun."""
        data, problem, state = memoryview(b""), None, "gone"
        try:
            data = memoryview(self._read(block.start, block.end - block.start))
            if self._passing is not None and not self._is_closed:
                self._passing(block.start, data)
            state = "here"
        except Exception as error:
            problem, state = error, "failed"
        finally:
            with _changed:
                if self._is_closed and state == "here":
                    state = "gone"
                block.state, block.problem = state, problem
                if state == "here":
                    block.data = data
                    self._here.append(block)
                else:
                    _Room.nbytes -= block.end - block.start
                _changed.notify_all()

    def _fetch(self) -> None:
        """Fetch what comes next, until nothing does."""
        given_up.set(self._halt)
        while True:
            with _changed:
                block = self._following()
                while block is not None and not self._is_closed and not self._has_room(block):
                    _changed.wait()
                    block = self._following()
                if block is None or self._is_closed:
                    return
                self._begin(block)
            self._bring(block)

    def _following(self) -> _Block | None:
        """The first block beyond the current position that nobody has begun."""
        while self._next < len(self._blocks):
            block = self._blocks[self._next]
            if block.state == "waiting":
                return block
            self._next += 1
        return None

    def _has_room(self, block: _Block) -> bool:
        nbytes = block.end - block.start
        beyond = block.before + nbytes - self._blocks[self._at].before
        if beyond > _AHEAD_NBYTES:
            return False
        for other in _Room.readers if _Room.nbytes + nbytes > MOST_NBYTES else ():
            if _Room.had - other._had > _KEPT_NBYTES:  # that reader has gone elsewhere
                for read in [each for each in other._here if each.turn <= other._at]:
                    other._drop(read)
        return _Room.nbytes + nbytes <= MOST_NBYTES

    def close(self) -> None:
        """Let go of all; what is under way is not waited for, and nothing further is begun."""
        with _changed:
            self._is_closed = True
            self._halt.set()
            if self in _Room.readers:
                _Room.readers.remove(self)
            for block in [*self._here]:
                self._drop(block)
            _changed.notify_all()


def _blocks(areas: Sequence[tuple[int, int]]) -> Iterator[_Block]:
    """The blocks of some ranges, in their order; no two have a byte in common."""
    total = sum(nbytes for _, nbytes in areas)
    size = min(max(total // 16, _LEAST_BLOCK), _LARGE_BLOCK)
    gap = min(max(total // 64, _LEAST_GAP), GAP_NBYTES)
    made: list[_Block] = []
    for start, nbytes in _disordered(_together(areas, gap), size, gap):
        count = max(1, nbytes // size)
        cuts = [start + nbytes * number // count for number in range(count + 1)]
        made += [_Block(a, b) for a, b in pairwise(cuts)]
    reached = 0
    for block in sorted(made, key=lambda block: block.start):  # what several asked for is brought once
        block.start = max(block.start, reached)
        reached = max(block.end, reached)
    return (block for block in made if block.start < block.end)


def _together(areas: Iterable[tuple[int, int]], gap: int) -> Iterator[tuple[int, int]]:
    """The ranges, offset and size in bytes of each; those that nearly follow one another are one."""
    start = end = 0
    for offset, nbytes in areas:
        if start < end and start <= offset <= end + gap:
            end = max(end, offset + nbytes)
        elif nbytes:
            if start < end:
                yield start, end - start
            start, end = offset, offset + nbytes
    if start < end:
        yield start, end - start


def _disordered(runs: Iterable[tuple[int, int]], size: int, gap: int) -> Iterator[tuple[int, int]]:
    """The same, but short runs that together make a block are sorted by position."""
    short: list[tuple[int, int]] = []
    total = 0
    for start, nbytes in runs:
        if nbytes < size:
            short.append((start, nbytes))
            total += nbytes
            if total < size:
                continue
        yield from _together(sorted(short), gap)
        short, total = [], 0
        if nbytes >= size:
            yield start, nbytes
    yield from _together(sorted(short), gap)
