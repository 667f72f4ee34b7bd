"""Which tensors of two checkpoints are the same one, where their names do not say so.

What only one of the files has is matched in two rounds.  First by content: tensors of one dtype and shape with the same
bits.  Where several have the same (zeros, counters of batches), those whose names end alike are matched, then what
is left over in file order.  Then by shape: tensors of one dtype and shape, whose names end in the same segment, and of
which both files have as many, are matched in file order; that is a guess unless there is but one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ckptkit.checkpoint import TensorEntry
from ckptkit.digests import tensor_digest
from ckptkit.errors import DTypeError
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.workers import in_parallel

__all__ = ["Renamed", "find_renamed"]

_ENDS = (4, 3, 2, 1, 0)
"""Last segments of names that are looked at where contents do not decide, most first."""

_MOST_OVERLAP = 64
"""How many times the bytes of its storage a view may have and still be read for this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """A tensor that has another name in each file.

    Attributes:
        old, new: its names in the first and in the second.
        by: ``"content"``: the same bits; ``"shape"``: dtype, shape, order and the end of the name alone.
        confidence: ``"certain"``: no other tensor has these bits; ``"likely"``: others have, or it is the only one of
            its shape; ``"guess"``.
    """

    old: str
    new: str
    by: Literal["content", "shape"]
    confidence: Literal["certain", "likely", "guess"]

    def to_dict(self) -> dict[str, str]:
        """As it stands in JSON."""
        return {"from": self.old, "to": self.new, "by": self.by, "confidence": self.confidence}


def find_renamed(a: Mapping[str, TensorEntry], b: Mapping[str, TensorEntry], checksums: Checksums) -> list[Renamed]:
    """The tensors of ``a`` that are tensors of ``b`` under another name.

    Args:
        a: the tensors that only the first has, by name.
        b: those that only the second has.
        checksums: gets the sums of what is read, and what is to be held.
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
    groups = [
        _grouped(names, lambda name, side=side: (_kind(side[name]), _end(name, 1)))  # type: ignore[misc]
        for names, side in zip(left, sides, strict=True)
    ]
    for key in groups[0].keys() & groups[1].keys():
        if len(groups[0][key]) == len(groups[1][key]):
            confidence: Literal["likely", "guess"] = "likely" if len(groups[0][key]) == 1 else "guess"
            for old, new in zip(groups[0][key], groups[1][key], strict=True):
                found.append(Renamed(old=old, new=new, by="shape", confidence=confidence))
    order = {name: number for number, name in enumerate(a)}
    return sorted(found, key=lambda each: order[each.old])


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
    """A digest of each, with its dtype and shape, by view; ``None``: its values cannot be gone through."""
    by_view = {entry.view: entry for entry in entries if entry.nbytes <= _MOST_OVERLAP * max(entry.storage.nbytes, 1)}
    found: dict[tuple[object, ...], str | None] = {}
    checksums.want(entry.storage for entry in by_view.values())

    def add(view: tuple[object, ...], entry: TensorEntry) -> None:
        try:
            found[view] = f"{_kind(entry)} {tensor_digest(entry, checksums)}"
        except DTypeError:
            found[view] = None

    in_parallel(
        [partial(add, view, entry) for view, entry in by_view.items()],
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
