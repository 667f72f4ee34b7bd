"""DeepSpeed's flat buffers: where each parameter is in them, and the parameters that they make up.

ZeRO joins the parameters of an optimizer's group into one flat buffer and gives each rank a part of it.  Names and
shapes are not in the buffers: ``param_shapes`` of a model file lists them in flat order.  Facts (DeepSpeed 0.19.8,
``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``runtime/bf16_optimizer.py``; each seen in files):

- stages 1 and 2: a rank's part is one run of the buffer, all of one size.  After a parameter there may be elements that
  align the next one (``param_alignment_paddings``), and after the last one elements that make the parts equal; saving
  removes the last ones from the masters (except in BF16_Optimizer), but not from the moments (except with
  ``elastic_checkpoint``)
- stage 3: each parameter is split over all ranks, n elements over W ranks into ⌈n/W⌉ each, the last padded; a rank
  joins its shares of the parameters of a (sub)group
- an optimizer keeps what it knows of a parameter (``exp_avg``) under the number of a flat buffer, in buffers of the
  same layout.  The numbers are in ``params`` of its ``param_groups``, in the order of the buffers
- ``param_slice_mappings`` says where parameters are, too, and is wrong with ``round_robin_gradients``: it is not read
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import NamedTuple

from ckptkit.checkpoint import Replica, TensorEntry
from ckptkit.errors import CorruptError
from ckptkit.normalize.shapes import MOMENTS
from ckptkit.pickling.inert import SCALARS, InertDict, mapping_items
from ckptkit.report import count_of, listed
from ckptkit.startup import dataclass
from ckptkit.tensor import tensor_of
from ckptkit.transfer.pieces import Piece, pieced

__all__ = [
    "Flats",
    "Kept",
    "Moments",
    "Shapes",
    "Slot",
    "by_name",
    "joined_slots",
    "kept_of",
    "moments_of",
    "named",
    "require_alike",
    "require_settings",
    "split_slots",
]

_REMEDY = "a rank's file is from another run, or its optimizer was offloaded to NVMe and the values are there"


class Slot(NamedTuple):
    """The position of a parameter.

    Attributes:
        name, shape: of the parameter.
        flat: the number of the flat buffer.
        start: its first element there; at stage 3 there in every rank's.
    """

    name: str
    shape: tuple[int, ...]
    flat: int
    start: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return prod(self.shape)

    def share(self, world: int) -> int:
        """Elements of a rank's share of it at stage 3, including the last one's padding."""
        return share(prod(self.shape), world)


Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""The parameters of a group, in flat order."""


def joined_slots(groups: Sequence[Shapes], paddings: Sequence[Sequence[int]] | None) -> tuple[list[Slot], list[int]]:
    """Where the parameters are in buffers of stages 1 and 2, and the elements that each buffer has at least.

    Args:
        groups: the parameters.
        paddings: by group, the elements after each parameter; ``None``: there are none.

    Raises:
        CorruptError: the paddings are not one a parameter.
    """
    slots, totals = [], []
    for flat, group in enumerate(groups):
        behind = [0] * len(group) if paddings is None else paddings[flat] if flat < len(paddings) else []
        if len(behind) != len(group):
            raise CorruptError(
                f"param_alignment_paddings gives {len(behind)} paddings for the "
                f"{count_of(len(group), 'parameter')} of group {flat}"
            )
        start = end = 0
        for (name, shape), padding in zip(group, behind, strict=True):
            slots.append(Slot(name, shape, flat, start))
            end = start + prod(shape)
            start = end + padding
        totals.append(end)
    return slots, totals


def split_slots(groups: Sequence[Shapes], sizes: Sequence[int], world: int) -> list[Slot]:
    """Where the parameters are in a rank's buffers of stage 3.

    Args:
        groups: the parameters; the groups need not be those of the buffers.
        sizes: elements of each buffer of a rank.
        world: how many ranks there are.

    Raises:
        CorruptError: the buffers do not hold exactly these parameters.
    """
    slots = []
    flat = start = 0
    for name, shape in (pair for group in groups for pair in group):
        count = share(prod(shape), world)
        while flat < len(sizes) and start == sizes[flat] and count:
            flat, start = flat + 1, 0
        slots.append(Slot(name, shape, min(flat, len(sizes) - 1), start))
        start += count
        if flat == len(sizes) or start > sizes[flat]:
            break
    else:
        if start == (sizes[flat] if sizes else 0) and not any(sizes[flat + 1 :]):
            return slots
    wanted = sum(share(prod(shape), world) for group in groups for _, shape in group)
    raise CorruptError(
        f"a rank's flat buffers have {count_of(sum(sizes), 'element')}, but its shares of the parameters have "
        f"{wanted:,}: {_REMEDY}"
    )


def share(numel: int, world: int) -> int:
    """Elements of a rank's share of a parameter at stage 3, padded."""
    return -(-numel // world)


@dataclass(frozen=True, slots=True)
class Flats:
    """Flat buffers that contain one value for each element of every parameter: the masters, or one of the moments.

    Attributes:
        what: their content, for messages and as a storage's key: ``"fp32"``, ``"exp_avg"``.
        parts: by flat buffer, the parts of the ranks that share it, one-dimensional.
        ranks: likewise, what messages call the ranks.
        is_split: whether each parameter is split over all ranks (stage 3).
    """

    what: str
    parts: Sequence[Sequence[TensorEntry]]
    ranks: Sequence[Sequence[str]]
    is_split: bool

    def require(self, totals: Mapping[int, int]) -> Flats:
        """These buffers, once they are known to be as large as they should be.

        Args:
            totals: by number of the buffer, the elements of its parameters; at stage 3 of a rank's shares of them.

        Raises:
            CorruptError: they are not.
        """
        for flat, total in totals.items():
            sizes = [part.numel for part in self.parts[flat]]
            have = sum(sizes)
            if self.is_split:
                wanted = [total] * len(sizes)
            else:  # all of one size; if padding was removed, the last ones are shorter
                wanted = [min(max(have - rank * sizes[0], 0), sizes[0]) for rank in range(len(sizes))]
            for rank, size, right in zip(self.ranks[flat], sizes, wanted, strict=True):
                if size != right or any(len(part.shape) != 1 or not part.is_contiguous for part in self.parts[flat]):
                    raise CorruptError(
                        f"flat buffer {flat} of {self.what} in {rank} has {count_of(size, 'element')}, "
                        f"but should have {right:,}: {_REMEDY}"
                    )
            if not self.is_split and not total <= have <= _aligned(total, len(sizes)):
                raise CorruptError(
                    f"flat buffer {flat} of {self.what} has {count_of(have, 'element')} in all, but its parameters "
                    f"have {total:,}: {_REMEDY}"
                )
        return self

    def tensor(self, slot: Slot, *, key: str | None = None) -> TensorEntry:
        """A parameter of them, in its own shape.

        Raises:
            CorruptError: the parts are of different dtypes, or too short.
        """
        numel = slot.numel
        parts = self.parts[slot.flat]
        return pieced(
            slot.name,
            (numel,),
            parts[0].dtype,
            list(self._pieces(slot)),
            view=slot.shape,
            key=f"{self.what}:{slot.name}" if key is None else key,
            location=parts[0].location,
        )

    def holders(self, slot: Slot) -> str:
        """The ranks with a parameter in their buffers, for messages."""
        if self.is_split:
            return "all ranks"
        return listed((piece.where for piece in self._pieces(slot)), 3)

    def _pieces(self, slot: Slot) -> Iterator[Piece]:
        parts, ranks, numel = self.parts[slot.flat], self.ranks[slot.flat], slot.numel
        if self.is_split:
            per = slot.share(len(parts))
            for rank, part in enumerate(parts):
                count = min(per, numel - rank * per)
                if count > 0:
                    yield _piece(part, slot.start, count, rank * per, ranks[rank])
            return
        ends = list(accumulate(part.numel for part in parts))
        at, end = slot.start, slot.start + numel
        while at < end:
            rank = bisect_right(ends, at)
            if rank == len(parts):
                return  # combining them reports missing ones
            count = min(ends[rank], end) - at
            yield _piece(parts[rank], at - ends[rank] + parts[rank].numel, count, at - slot.start, ranks[rank])
            at += count


def _piece(part: TensorEntry, start: int, count: int, at: int, where: str) -> Piece:
    local = tensor_of(part.storage, part.storage_offset + start, (count,), (1,), part.dtype)
    return Piece((at,), (count,), local, where)


# What an optimizer keeps.


class Moments(NamedTuple):
    """An optimizer's state of the parameters.

    Attributes:
        flats: by name, the buffers of what it keeps for every element, where all ranks have them; by flat buffer
            whether it has any.
        shared: by flat buffer, what it keeps once for all parameters in it: a number of steps.
        left: other values, by flat buffer and name: nothing says how they belong to parameters.
        replicas: what all ranks must have alike.
    """

    flats: Mapping[str, tuple[Flats, frozenset[int]]]
    shared: Sequence[Mapping[str, object]]
    left: Sequence[tuple[int, str]]
    replicas: tuple[Replica, ...]

    def state(self, slot: Slot) -> InertDict:
        """The state of one parameter, as an optimizer that has parameters one by one keeps it."""
        pairs: list[tuple[object, object]] = []
        for key, value in self.shared[slot.flat].items():
            if isinstance(value, TensorEntry):  # a separate one: counting it up counts one parameter's
                value = replace(value, storage=replace(value.storage, key=f"{key}:{slot.name}"))
            pairs.append((key, value))
        for key, (flats, has) in self.flats.items():
            if slot.flat in has:
                pairs.append((key, flats.tensor(slot)))
        return InertDict(pairs)


def moments_of(states: Sequence[Sequence[Mapping[str, object]]], masters: Flats, totals: Sequence[int]) -> Moments:
    """The state of the optimizers of all ranks.

    Args:
        states: by flat buffer and rank that shares it, what is kept of it, by name.
        masters: the buffers of the masters, of the same layout.
        totals: by buffer, as in `Flats.require`.

    Raises:
        CorruptError: ranks do not keep the same, or are of different steps.
    """
    shared: list[dict[str, object]] = [{} for _ in totals]
    found: dict[str, dict[int, list[TensorEntry]]] = {}
    left: list[tuple[int, str]] = []
    replicas: list[Replica] = []
    for flat, total in enumerate(totals):
        ranks = masters.ranks[flat]
        for key in {key: None for state in states[flat] for key in state}:
            values = [state.get(key) for state in states[flat]]
            entries = [value for value in values if isinstance(value, TensorEntry)]
            dims = {len(entry.shape) for entry in entries} if len(entries) == len(values) else set()
            if dims == {0}:
                shared[flat][key] = entries[0]
                replicas += _alike(f"the optimizer's {key}", entries, ranks)
            elif dims == {1} and (key in MOMENTS or _fits(entries, masters, flat, total)):
                found.setdefault(key, {})[flat] = entries
            elif not entries and all(isinstance(value, SCALARS) for value in values):
                shared[flat][key] = values[0]
                require_alike(f"the optimizer's {key}", dict(zip(ranks, values, strict=True)))
            elif key in MOMENTS and entries and len(entries) < len(values):
                raise CorruptError(f"only some ranks have {key} of flat buffer {flat}: {_REMEDY}")
            else:
                left.append((flat, key))
    flats = {}
    for key, by_flat in found.items():
        made = Flats(key, [by_flat.get(flat, []) for flat in range(len(totals))], masters.ranks, masters.is_split)
        flats[key] = made.require({flat: totals[flat] for flat in by_flat}), frozenset(by_flat)
    return Moments(flats, shared, left, tuple(replicas))


def _alike(name: str, entries: Sequence[TensorEntry], ranks: Sequence[str]) -> list[Replica]:
    others = zip(ranks[1:], entries[1:], strict=True)
    return [Replica(name, entries[0], other, f"{ranks[0]} and {rank}") for rank, other in others]


def _fits(entries: Sequence[TensorEntry], masters: Flats, flat: int, total: int) -> bool:
    """Whether tensors are buffers of the masters' layout, with the padding that the masters may be without."""
    sizes = [entry.numel for entry in entries]
    if sizes == [part.numel for part in masters.parts[flat]]:
        return True
    return not masters.is_split and len(set(sizes)) == 1 and total <= sum(sizes) <= _aligned(total, len(sizes))


def _aligned(total: int, world: int) -> int:
    """Elements of a buffer of stages 1 and 2, with its padding."""
    return -(-total // (2 * world)) * 2 * world


def require_alike(what: str, values: Mapping[str, object]) -> None:
    """See that a plain value is the same in several files.

    Args:
        what: the value, for messages.
        values: by file or rank.

    Raises:
        CorruptError: it is not.
    """
    (first, value), *others = values.items()
    for other, found in others:
        if type(found) is not type(value) or found != value:
            raise CorruptError(
                f"{what} is {value!r:.60} in {first} and {found!r:.60} in {other}: files of different runs or steps"
            )


def require_settings(ours: Kept, theirs: Kept, rank: str, other: str) -> None:
    """See that the numbers of two ranks' ``param_groups`` (``lr``, ``step``) are the same."""
    for (pairs, _), (others, _) in zip(ours.groups, theirs.groups, strict=False):
        known = {key: value for key, value in others if isinstance(key, str)}
        for key, value in pairs:
            if isinstance(key, str) and isinstance(value, (int, float)) and key in known:
                require_alike(f"the optimizer's {key}", {rank: value, other: known[key]})


def by_name(stages: Sequence[Sequence[tuple[list[tuple[object, object]], list[str]]]]) -> list[InertDict]:
    """The ``param_groups`` of an optimizer that knows parameters by their names.

    Args:
        stages: by stage of a pipeline, the pairs of each group and its parameters; groups with the same settings in one
            place are one.
    """
    found: list[tuple[list[tuple[object, object]], dict[str, None]]] = []
    for groups in stages:
        for number, (pairs, names) in enumerate(groups):
            if number < len(found) and found[number][0] == pairs:
                found[number][1].update(dict.fromkeys(names))
            else:
                found.append((pairs, dict.fromkeys(names)))
    return [InertDict([*pairs, ("params", list(names))]) for pairs, names in found]


class Kept(NamedTuple):
    """The state of one rank's optimizer.

    Attributes:
        states: by flat buffer what it keeps of it, by name.
        groups: the pairs of each of its ``param_groups`` but for ``params``, and the flat buffers that these are.
    """

    states: list[dict[str, object]]
    groups: list[tuple[list[tuple[object, object]], list[int]]]


def kept_of(base: object, count: int) -> Kept | None:
    """An optimizer's state; ``None``: it does not say to which buffers it belongs.

    Args:
        base: its state_dict; or (``elastic_checkpoint``) a list of what it keeps, by buffer.
        count: of flat buffers.
    """
    if isinstance(base, list):
        elastic = [named(state) for state in base]
        return Kept(elastic, [([], [flat]) for flat in range(count)]) if len(elastic) == count else None
    own = named(base)
    by_number = {number: state for number, state in mapping_items(own.get("state")) or () if isinstance(number, int)}
    groups = own.get("param_groups")
    states: list[dict[str, object]] = []
    kept: list[tuple[list[tuple[object, object]], list[int]]] = []
    for group in groups if isinstance(groups, list) else ():
        pairs = mapping_items(group) or []
        numbers = named(group).get("params")
        first = len(states)
        for number in numbers if isinstance(numbers, list) else ():
            states.append(named(by_number.get(number)) if isinstance(number, int) else {})
        kept.append(([pair for pair in pairs if pair[0] != "params"], list(range(first, len(states)))))
    return Kept(states, kept) if len(states) == count else None


def named(node: object) -> dict[str, object]:
    """The values of a mapping whose keys are text; nothing of what is not a mapping."""
    return {key: value for key, value in mapping_items(node) or () if isinstance(key, str)}
