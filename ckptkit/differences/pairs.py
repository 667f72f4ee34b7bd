"""Which tensors of two checkpoints are the same one, where their names do not say so.

What only one of the files has is matched in two rounds.  First by content: tensors of one dtype and shape with the same
bits.  Where several have the same (zeros, counters of batches), those whose names end alike are matched, then what
is left over in file order.  Then by shape: tensors with one dtype and shape, whose names end in the same segment, and
that are equally many in both files, are matched in file order; that is a guess unless there is only one.

Whether tensors have the same bits: read side by side, a piece at a time.

Tensors whose values are in a row are compared in place, without computing anything; numpy is imported only for values
that must be gathered.

The figures of many pairs of tensors, in pieces and on every core; only then is numpy imported.

The reading: which pairs of tensors have the same bits, and by how much the others differ; on every core.

A pair is compared once however many names it has.  Bits come first, up to the first piece that differs; values are
computed only of what was found to differ, which is when numpy is imported.  For remote files each piece is kept in
memory until both are done, so that it is fetched once; the equal part before the first piece that differs is fetched
again, for the figures of the whole.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any, Literal

from ckptkit.checkpoint import TensorEntry
from ckptkit.differences.bits import PIECE_NBYTES, held, pieces, same_piece, unexpanded
from ckptkit.differences.figures import MEASURED, Sums, Tolerance, is_measurable, measure_pair
from ckptkit.digests import tensor_digest
from ckptkit.errors import DTypeError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.startup import dataclass
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.values import SMALL_NBYTES, Ahead, will_read
from ckptkit.transfer.workers import Progress, in_parallel, near_together

if TYPE_CHECKING:
    from ckptkit.differences.difference import RenamedRow

__all__ = ["NO_FIGURES", "Pair", "PairReader", "Renamed", "all_sums", "find_renamed"]

_ENDS = (4, 3, 2, 1, 0)
"""Last segments of names that are examined if contents do not decide, most first."""

_HELD_NBYTES = 64 << 20
"""Bytes of a piece that is kept in memory; only one that is not contiguous can have more."""

_APART = 2
"""Pieces of remote files that threads work on at the same time."""

_TOGETHER = 4096
"""Small tensors that one thread compares before it looks for other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """A tensor that has another name in each file.

    Attributes:
        old, new: its names in the first and in the second.
        by: ``"content"``: the same bits; ``"shape"``: only dtype, shape, order and the end of the name.
        confidence: ``"certain"``: no other tensor has these bits; ``"likely"``: others have, or it is the only one of
            its shape; ``"guess"``.
    """

    old: str
    new: str
    by: Literal["content", "shape"]
    confidence: Literal["certain", "likely", "guess"]

    def to_dict(self) -> RenamedRow:
        """For JSON documents."""
        return {"from": self.old, "to": self.new, "by": self.by, "confidence": self.confidence}


def find_renamed(a: Mapping[str, TensorEntry], b: Mapping[str, TensorEntry], checksums: Checksums) -> list[Renamed]:
    """The tensors of ``a`` that are tensors of ``b`` under another name.

    Args:
        a: the tensors that only the first has, by name.
        b: those that only the second has.
        checksums: get the sums of what is read, and have the ones to check.
    """
    kinds = {_kind(entry) for entry in a.values()} & {_kind(entry) for entry in b.values()}
    sides = [{name: entry for name, entry in side.items() if _kind(entry) in kinds} for side in (a, b)]
    digests = _digests([entry for side in sides for entry in side.values()], checksums)
    by_content = [
        {name: digests[entry.view] for name, entry in side.items() if digests.get(entry.view) is not None}
        for side in sides
    ]
    keys = [_grouped(names, lambda name, names=names: names[name]) for names in by_content]  # type: ignore[misc]
    found = []
    for key in keys[0].keys() & keys[1].keys():
        alone = len(keys[0][key]) == len(keys[1][key]) == 1
        for old, new in _by_ends(keys[0][key], keys[1][key]):
            found.append(Renamed(old=old, new=new, by="content", confidence="certain" if alone else "likely"))
    olds, news = {each.old for each in found}, {each.new for each in found}
    left = [[name for name in side if name not in taken] for side, taken in zip(sides, (olds, news), strict=True)]
    found += _by_shape(left, sides)
    order = {name: number for number, name in enumerate(a)}
    return sorted(found, key=lambda each: order[each.old])


def _by_shape(left: list[list[str]], sides: list[dict[str, TensorEntry]]) -> Iterator[Renamed]:
    """The second round: those of one kind whose names end alike, where both files have as many."""
    groups = [
        _grouped(names, lambda name, side=side: (_kind(side[name]), _end(name, 1)))  # type: ignore[misc]
        for names, side in zip(left, sides, strict=True)
    ]
    for key in groups[0].keys() & groups[1].keys():
        if len(groups[0][key]) == len(groups[1][key]):
            confidence: Literal["likely", "guess"] = "likely" if len(groups[0][key]) == 1 else "guess"
            for old, new in zip(groups[0][key], groups[1][key], strict=True):
                yield Renamed(old=old, new=new, by="shape", confidence=confidence)


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype} {entry.shape}"


def _end(name: str, segments: int) -> str:
    """The last segments of a name; ``""`` for none."""
    return ".".join(name.rsplit(".", segments)[-segments:]) if segments else ""


def _grouped(names: Iterable[str], key: Callable[[str], Any]) -> dict[Hashable, list[str]]:
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def _digests(entries: list[TensorEntry], checksums: Checksums) -> dict[tuple[object, ...], str | None]:
    """A digest of each, with its dtype and shape, by view; ``None``: its values cannot be processed."""
    most = DEFAULT_LIMITS.overlap
    by_view = {entry.view: entry for entry in entries if entry.nbytes <= most * max(entry.storage.nbytes, 1)}
    found: dict[tuple[object, ...], str | None] = {}
    checksums.want(entry.storage for entry in by_view.values())

    def add(view: tuple[object, ...], entry: TensorEntry) -> None:
        try:
            found[view] = f"{_kind(entry)} {tensor_digest(entry, checksums)}"
        except DTypeError:
            found[view] = None

    far = will_read(by_view.values(), checksums.along_file)
    tasks = [partial(add, view, entry) for view, entry in by_view.items()]
    in_parallel(
        near_together(tasks, _APART) if far else tasks,
        nbytes=sum(entry.nbytes for entry in by_view.values()),
    )
    return found


def _by_ends(olds: list[str], news: list[str]) -> list[tuple[str, str]]:
    """Names in pairs: those that end alike first, then in order."""
    pairs: list[tuple[str, str]] = []
    for segments in _ENDS if len(olds) > 1 or len(news) > 1 else (0,):
        waiting = _grouped(reversed(news), partial(_end, segments=segments))
        left = []
        for old in olds:
            same = waiting.get(_end(old, segments))
            if same:
                pairs.append((old, same.pop()))
            else:
                left.append(old)
        taken = {new for _, new in pairs}
        olds, news = left, [new for new in news if new not in taken]
    return pairs


NO_FIGURES: Mapping[str, Any] = dict.fromkeys(Sums().to_dict())
"""The figures of tensors whose values cannot be computed."""


def all_sums(
    pairs: Iterable[tuple[TensorEntry, TensorEntry]], tolerance: Tolerance, work: PairReader
) -> dict[Pair, Sums | None]:
    """The sums of each pair of tensors of one shape, by their views; ``None``: there are none.

    Raises:
        CorruptError, FileAccessError: something cannot be read.
    """
    found: dict[Pair, list[Sums]] = {}
    copies: dict[Pair, int] = {}
    failed: set[Pair] = set()
    tasks: list[Callable[[], object]] = []
    wanted: list[TensorEntry] = []
    nbytes = 0

    def measured(key: Pair, number: int, a: TensorEntry, b: TensorEntry) -> None:
        if key in failed:
            return
        try:
            # The order in which threads come does not change the figures: each has its place.
            found[key][number] = measure_pair(a, b, tolerance, work.advance)
        except DTypeError:
            failed.add(key)

    for a, b in pairs:
        key = (*a.view, *b.view)
        if key in found:
            continue
        found[key] = []
        work.checksums.want((a.storage, b.storage))
        reduced = unexpanded(a, b) if is_measurable(a.dtype) and is_measurable(b.dtype) else None
        if reduced is None:
            failed.add(key)
            continue
        left, right, copies[key] = reduced
        for number, (part, other) in enumerate(pieces(left, right, MEASURED)):
            known = work.measured.get((*part.view, *other.view)) if work.measured else None
            found[key].append(Sums() if known is None else known)
            if known is None:
                nbytes += part.nbytes + other.nbytes
                wanted += part, other
                tasks.append(partial(measured, key, number, part, other))
    far = will_read(wanted, work.checksums.along_file)
    work.expect(nbytes)
    in_parallel(near_together(tasks, _APART) if far else tasks, nbytes=nbytes)
    return {key: None if key in failed else reduce(add, sums, Sums()).times(copies[key]) for key, sums in found.items()}


Pair = tuple[object, ...]
"""The identity of a pair of tensors."""

_Waiting = list[tuple[Pair, TensorEntry, TensorEntry, int]]
"""Pairs, and the bytes of one of the two."""


class PairReader:
    """Pairs of tensors to compare, collected first so that several threads can share them.

    Args:
        progress: called with the bytes processed so far and the total.
        tolerance: for measuring differences.

    Attributes:
        checksums: those recorded for the storages of every tensor that is read.
        measured: facts about pieces by their views, because they were in memory.
    """

    def __init__(self, progress: Progress | None = None, tolerance: Tolerance | None = None) -> None:
        self._progress = progress
        self._tolerance = tolerance or Tolerance()
        self.measured: dict[Pair, Sums] = {}
        self._done = self._total = 0
        self._lock = threading.Lock()
        self.checksums = Checksums()
        self._first: dict[Pair, tuple[TensorEntry, TensorEntry]] = {}
        self._same: dict[Pair, bool | None] = {}
        self._waiting: _Waiting = []

    def add(self, a: TensorEntry, b: TensorEntry) -> Pair:
        """Two tensors of equal size and dtype, whose bits are compared."""
        key: Pair = (id(a.storage), id(b.storage))
        known = self._first.get(key)
        if known is None:
            self._first[key] = a, b
        elif (a.view, b.view) == (known[0].view, known[1].view):
            return key
        else:
            key = (*a.view, *b.view)
            if key in self._same:
                return key
        nbytes = a.nbytes
        if nbytes <= a.storage.nbytes and 0 not in a.stride:  # as nearly all are
            self._same[key] = True
            self._waiting.append((key, a, b, nbytes))
        else:
            reduced = unexpanded(a, b)
            self._same[key] = None if reduced is None else True
            if reduced is not None:
                self._waiting.append((key, reduced[0], reduced[1], reduced[0].nbytes))
        self.checksums.want((a.storage, b.storage))
        return key

    def run(self) -> None:
        """Compare what was added since the last run.

        Raises:
            CorruptError, FileAccessError: something cannot be read.
        """
        waiting, self._waiting = self._waiting, []
        nbytes = 2 * sum([each for _, _, _, each in waiting])
        self._total += nbytes
        far = will_read((entry for _, a, b, _ in waiting for entry in (a, b)), self.checksums.along_file)
        tasks = near_together(self._held_comparisons(waiting), _APART) if far else self._comparisons(waiting)
        in_parallel(tasks, nbytes=nbytes)

    def _comparisons(self, waiting: _Waiting) -> Iterator[Callable[[], object]]:
        small: _Waiting = []
        for each in waiting:
            key, a, b, nbytes = each
            if nbytes < SMALL_NBYTES:
                small.append(each)
                if len(small) == _TOGETHER:
                    yield partial(self._compare_small, small)
                    small = []
                continue
            for left, right in pieces(a, b, max(PIECE_NBYTES // a.itemsize, 1)):
                yield partial(self._compare, key, left, right)
        yield partial(self._compare_small, small)

    def _held_comparisons(self, waiting: _Waiting) -> Iterator[Callable[[], object]]:
        """In the order in which they were added, and each piece as soon as it is measured."""
        for key, a, b, _ in waiting:
            for left, right in pieces(a, b, MEASURED):
                spans = [end - start for start, end in (left.span(), right.span())]
                yield partial(self._compare_held if max(spans) <= _HELD_NBYTES else self._compare, key, left, right)

    def _compare_held(self, key: Pair, a: TensorEntry, b: TensorEntry) -> None:
        """Compare two pieces once they are in memory, and measure them where their tensors differ."""
        left, right = held(a), held(b)
        self._compare(key, left, right)
        if self._same[key] is False and a.shape == b.shape and is_measurable(a.dtype):
            views: Pair = (*a.view, *b.view)
            try:
                self.measured[views] = measure_pair(left, right, self._tolerance, lambda _: None)
            except DTypeError:
                self._same[key] = None

    def _compare_small(self, small: _Waiting) -> None:
        ahead = Ahead(), Ahead()
        for key, a, b, _ in small:
            self._compare(key, a, b, ahead)

    def _compare(self, key: Pair, a: TensorEntry, b: TensorEntry, ahead: tuple[Ahead, Ahead] | None = None) -> None:
        if self._same[key] is True:
            try:
                if not same_piece(a, b, self.checksums, ahead):
                    self._same[key] = False
            except DTypeError:
                self._same[key] = None
        if self._progress is not None:
            self.advance(a.nbytes + b.nbytes)

    def same(self, key: Pair) -> bool | None:
        """Whether a pair that was compared has the same bits; ``None``: unknown."""
        return self._same[key]

    def expect(self, nbytes: int) -> None:
        """So many more bytes will be processed."""
        self._total += nbytes

    def advance(self, nbytes: int) -> None:
        """So many bytes more were processed."""
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(min(self._done, self._total), self._total)
