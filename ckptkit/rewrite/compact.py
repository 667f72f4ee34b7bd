"""Leaving behind the bytes of storages that no tensor views.

torch saves whole storages: ``big[:10]`` takes all of ``big`` with it.  What is viewed of a storage
falls into runs of bytes: spans of tensors (`TensorEntry.span`) that overlap or touch are one, so
ties, overlaps and neighbouring slices go on sharing.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.rewrite.leaves import nodes, with_leaves

__all__ = ["Compact", "dead_bytes"]


@dataclass(frozen=True, slots=True)
class Compact:
    """Cut storages down to what tensors view of them.

    Each run of viewed bytes of a storage that has others too becomes a storage of its own.
    Storages that stand in the file by themselves are left whole, and so is what all is viewed of.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        cuts = {id(storage): _Cut(storage, runs) for storage, runs in _cuttable(checkpoint)}
        if not cuts:
            return checkpoint

        def leaf(node: object) -> object:
            cut = cuts.get(id(node.storage)) if isinstance(node, TensorEntry) else None
            return node if cut is None or not isinstance(node, TensorEntry) else cut.moved(node)

        return with_leaves(checkpoint, leaf)


def dead_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many storages `Compact` would cut, and the bytes that no tensor views of them."""
    cuttable = _cuttable(checkpoint)
    return len(cuttable), sum(storage.nbytes - _viewed(runs) for storage, runs in cuttable)


_Runs = list[tuple[int, int]]
"""Of each run of viewed bytes the first byte and the byte after the last, in order."""


class _Cut:
    """A storage of which parts alone are viewed.

    Args:
        storage: it.
        runs: the parts.
    """

    __slots__ = ("_empty", "_parts", "_starts", "storage")

    def __init__(self, storage: Storage, runs: _Runs) -> None:
        self.storage = storage
        self._starts = [start for start, _ in runs]
        self._parts = [self._part(start, end) for start, end in runs]
        self._empty: Storage | None = None

    def _part(self, start: int, end: int) -> Storage:
        return replace(
            self.storage,
            key=f"{self.storage.key}[{start}:{end}]",
            nbytes=end - start,
            source=self.storage.source.part(start, end - start),
            crc32=None,
            original=self.storage.original or self.storage,
        )

    def moved(self, entry: TensorEntry) -> TensorEntry:
        """The tensor over the part it views; one without elements over none."""
        if not entry.nbytes:
            self._empty = self._empty or self._part(0, 0)
            return replace(entry, storage=self._empty, storage_offset=0)
        index = bisect_right(self._starts, entry.span()[0]) - 1
        offset = entry.storage_offset - self._starts[index] // entry.itemsize
        return replace(entry, storage=self._parts[index], storage_offset=offset)


class _Use:
    """What is viewed of a storage."""

    __slots__ = ("spans", "storage", "width")

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.spans: list[tuple[int, int]] = []
        self.width = 1 if storage.dtype is None else DTYPES[storage.dtype].itemsize

    def runs(self) -> _Runs:
        """The parts that are viewed, each from a multiple of the widest element on."""
        width = self.width
        runs: _Runs = []
        for start, end in sorted(self.spans):
            first, last = start // width * width, min(-(-end // width) * width, self.storage.nbytes)
            if runs and first <= runs[-1][1]:
                runs[-1] = runs[-1][0], max(runs[-1][1], last)
            else:
                runs.append((first, last))
        return runs


def _viewed(runs: _Runs) -> int:
    return sum(end - start for start, end in runs)


def _cuttable(checkpoint: Checkpoint) -> list[tuple[Storage, _Runs]]:
    """The storages that have bytes no tensor views, and what is viewed of them."""
    uses: dict[int, _Use] = {}
    bare: set[int] = set()
    for node in nodes(checkpoint):
        if isinstance(node, Storage):
            bare.add(id(node))
        elif isinstance(node, TensorEntry):
            use = uses.get(id(node.storage))
            if use is None:
                use = uses[id(node.storage)] = _Use(node.storage)
            if node.nbytes:
                use.spans.append(node.span())
                use.width = max(use.width, node.itemsize)
    found = ((use.storage, use.runs()) for key, use in uses.items() if use.storage.nbytes and key not in bare)
    return [(storage, runs) for storage, runs in found if _viewed(runs) < storage.nbytes]
