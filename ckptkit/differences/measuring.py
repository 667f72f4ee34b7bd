"""The figures of many pairs of tensors, in pieces and on every core; only then is numpy imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from operator import add
from typing import Any

from ckptkit.checkpoint import TensorEntry
from ckptkit.differences.bits import pieces, unexpanded
from ckptkit.differences.figures import MEASURED, Sums, Tolerance, is_measurable, measure
from ckptkit.differences.work import Pair, Work
from ckptkit.errors import DTypeError
from ckptkit.transfer.workers import in_parallel

__all__ = ["NO_FIGURES", "all_sums"]

NO_FIGURES: Mapping[str, Any] = dict.fromkeys(Sums().to_dict())
"""The figures of tensors whose values cannot be computed."""


def all_sums(
    pairs: Iterable[tuple[TensorEntry, TensorEntry]], tolerance: Tolerance, work: Work
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
            found[key][number] = measure(a, b, tolerance, work.advance)
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
