"""Whether tensors hold the same bits: read side by side, a piece at a time.

Tensors whose values lie in a row are compared as they lie, and nothing is computed; numpy is imported only for
what has to be gathered.

The figures of many pairs of tensors, in pieces and on every core; only then is numpy imported.

The reading: which pairs of tensors hold the same bits, and by how much the others differ; on every core.

A pair is compared once however many names it has.  Bits come first, up to the first piece that differs; values are
computed only of what was found to differ, which is when numpy is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from operator import add
from typing import Any

from ckptkit.checkpoint import TensorEntry
from ckptkit.differences.bits import PIECE_NBYTES, pieces, same_piece, unexpanded
from ckptkit.differences.figures import MEASURED, Sums, Tolerance, is_measurable, measure_pair
from ckptkit.errors import DTypeError
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.workers import Progress, in_parallel

__all__ = ["NO_FIGURES", "Pair", "PairReader", "all_sums"]


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
        nbytes += left.nbytes + right.nbytes
        for number, (part, other) in enumerate(pieces(left, right, MEASURED)):
            found[key].append(Sums())
            tasks.append(partial(measured, key, number, part, other))
    work.expect(nbytes)
    in_parallel(tasks, nbytes=nbytes)
    return {key: None if key in failed else reduce(add, sums, Sums()).times(copies[key]) for key, sums in found.items()}


Pair = tuple[object, ...]
"""What a pair of tensors is known by."""

_Reduced = tuple[TensorEntry, TensorEntry, int]


class PairReader:
    """Pairs of tensors to compare, collected first so that several threads can share them.

    Args:
        progress: called with the bytes gone through so far, and those to go through in all.

    Attributes:
        checksums: those recorded for the storages of every tensor that is read.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._done = self._total = 0
        self._lock = threading.Lock()
        self.checksums = Checksums()
        self._pairs: dict[Pair, _Reduced | None] = {}
        self._same: dict[Pair, bool | None] = {}

    def add(self, a: TensorEntry, b: TensorEntry) -> Pair:
        """Two tensors of as many elements of one dtype, whose bits are to be compared."""
        key = (*a.view, *b.view)
        if key not in self._pairs:
            self._pairs[key] = unexpanded(a, b)
            self.checksums.want((a.storage, b.storage))
        return key

    def run(self) -> None:
        """Compare what was added since the last run.

        Raises:
            CorruptError, FileAccessError: something cannot be read.
        """
        waiting = {key: pair for key, pair in self._pairs.items() if key not in self._same}
        self._same.update({key: None if pair is None else True for key, pair in waiting.items()})
        known = [(key, pair) for key, pair in waiting.items() if pair is not None]
        nbytes = sum(pair[0].nbytes + pair[1].nbytes for _, pair in known)
        self._total += nbytes
        in_parallel(self._comparisons(known), nbytes=nbytes)

    def _comparisons(self, known: list[tuple[Pair, _Reduced]]) -> Iterator[Callable[[], object]]:
        for key, (a, b, _) in known:
            for left, right in pieces(a, b, max(PIECE_NBYTES // a.itemsize, 1)):
                yield partial(self._compare, key, left, right)

    def _compare(self, key: Pair, a: TensorEntry, b: TensorEntry) -> None:
        if self._same[key] is True:
            try:
                if not same_piece(a, b, self.checksums):
                    self._same[key] = False
            except DTypeError:
                self._same[key] = None
        if self._progress is not None:
            self.advance(a.nbytes + b.nbytes)

    def same(self, key: Pair) -> bool | None:
        """Whether a pair that was compared has the same bits; ``None``: it cannot be told."""
        return self._same[key]

    def expect(self, nbytes: int) -> None:
        """So many bytes more are to be gone through."""
        self._total += nbytes

    def advance(self, nbytes: int) -> None:
        """So many bytes more were gone through."""
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(min(self._done, self._total), self._total)
