"""DeepSpeed's optimizer files: the flat buffers of all ranks, read together.

`ckptkit.formats.distributed.deepspeed` describes their content, and `ckptkit.formats.distributed.zero` the positions of
parameters in buffers.  With a mixture of experts, fewer ranks than there are share a group of experts
(``partition_count`` has a number for each group): each of E sets of ranks has different experts, all called
``deepspeed_experts.0`` and on.  Rank r is of set r mod E, or, with ``use_data_before_expert_parallelism``, r div the
ranks of a set (``deepspeed/utils/groups.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, UnsupportedError
from ckptkit.formats.distributed.deepspeed_parts import File, require_ranks, shapes_of
from ckptkit.formats.distributed.zero import (
    Flats,
    Kept,
    Moments,
    Shapes,
    Slot,
    joined_slots,
    kept_of,
    moments_of,
    named,
    require_alike,
    require_settings,
    split_slots,
)
from ckptkit.pickling.inert import InertDict, Object, attributes
from ckptkit.pickling.tensors import is_int
from ckptkit.report import count_of

__all__ = ["TIED", "Zero", "zero_of"]

TIED = "tied_modules."
"""What names of a pipeline begin with that belong to a layer which several places share."""

_JOINED, _SPLIT = "single_partition_of_fp32_groups", "fp32_flat_groups"
"""The masters' flat buffers, of stages 1 and 2 and of stage 3."""

_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d{1,7})(\..+)", re.ASCII | re.DOTALL)
"""The name of an expert's weight: before its number, the number, and after it."""

_MOST_PADDING = 1 << 20
"""Elements of padding after a parameter, thousands of times more than 16 bytes take."""


class Zero(NamedTuple):
    """The content of the optimizer files of the model, or of a stage of its pipeline.

    Attributes:
        slots: the positions of the parameters.
        masters: their values.
        moments: the optimizer's values for them; ``None``: nothing says how they belong together.
        groups: the pairs of each of its ``param_groups``, and the names of their parameters.
        own: the values in the file of rank 0.
        left: by rank, what could not be combined.
        told: the stage of ZeRO and its ranks.
    """

    slots: Sequence[Slot]
    masters: Flats
    moments: Moments | None
    groups: list[tuple[list[tuple[object, object]], list[str]]]
    own: Mapping[str, object]
    left: list[tuple[object, object]]
    told: str


class _Buffer(NamedTuple):
    """A flat buffer: its number in the files, the ranks that share it, and which set of experts it holds."""

    number: int
    ranks: Sequence[int]
    experts: int | None = None

    @property
    def names(self) -> list[str]:
        """What messages call the ranks."""
        return [f"rank {rank}" for rank in self.ranks]


def zero_of(models: Mapping[int, File], files: Mapping[int, File], layers: Mapping[int, File]) -> Zero:
    """Put the buffers of all ranks together.

    Args:
        models: the model files by rank; of stages 1 and 2 there is one.
        files: the optimizer files by rank.
        layers: the files of a pipeline's layers.

    Raises:
        CorruptError: a rank is missing, or its buffers are not what they should be.
        UnsupportedError: experts are shared out over ranks in a way that is not known.
    """
    owns = [named(file.own.get("optimizer_state_dict")) for file in files.values()]
    first, model = owns[0], next(iter(models.values()))
    is_split = _SPLIT in first
    where = [file.name for file in files.values()]
    for key in ("zero_stage", "partition_count"):
        require_alike(key, dict(zip(where, (_number(own.get(key)) for own in owns), strict=True)))
    buffers = _buffers([own.get(_SPLIT if is_split else _JOINED) for own in owns], where)
    counts = _counts(first.get("partition_count"), len(buffers[0]), len(files))
    world = max(counts, default=len(files))
    require_ranks(files, world, "optim_states files")
    if is_split:
        require_ranks(models, world, "model_states files")
    groups = shapes_of(model) or _shapes_by_mappings(owns, model, layers)
    shared = [each for flat, count in enumerate(counts) for each in _shared(flat, count, world, model)]
    if is_split:
        totals = [flat.numel for flat in buffers[0]]
        slots = split_slots(groups, totals, world)
    else:
        slots, totals = _joined(groups, shared, _paddings(first.get("param_alignment_paddings")), len(counts))
    parts = [[buffers[rank][each.number] for rank in each.ranks] for each in shared]
    masters = Flats("fp32", parts, [each.names for each in shared], is_split).require(dict(enumerate(totals)))
    stage = _number(first.get("zero_stage"))
    told = f"ZeRO stage {stage if is_int(stage) else '1 (BF16_Optimizer)'}, {count_of(world, 'rank')}"
    bases = [own.get("optimizer_state_dict" if is_split else "base_optimizer_state") for own in owns]
    kept = _kept(bases, where, len(counts))
    if not kept:
        left: list[tuple[object, object]] = [(f"rank {rank}", base) for rank, base in enumerate(bases)]
        return Zero(slots, masters, None, [], first, left, told)
    moments = moments_of([[kept[rank].states[e.number] for rank in e.ranks] for e in shared], masters, totals)
    if is_split:
        _require_distinct([masters, *(flats for flats, _ in moments.flats.values())], where)
    return Zero(slots, masters, moments, _groups(slots, shared, kept[0]), first, _left(moments, shared, kept), told)


def _kept(bases: Sequence[object], where: Sequence[str], count: int) -> list[Kept]:
    """The optimizers' state; empty if one does not say to which buffers it belongs.

    Raises:
        CorruptError: they are of different steps.
    """
    kept = [found for base in bases if (found := kept_of(base, count)) is not None]
    if len(kept) < len(bases):
        return []
    for name, other in zip(where[1:], kept[1:], strict=True):
        require_settings(kept[0], other, where[0], name)
    return kept


def _require_distinct(kept: Sequence[Flats], where: Sequence[str]) -> None:
    """Check that no rank's values are there twice, by their checksums: stage 3 has no copy of the weights.

    Args:
        kept: the masters, and what the optimizer keeps of each element: without that, values may be alike by chance.
        where: the files of the ranks.

    Raises:
        CorruptError: some are.
    """
    seen: dict[tuple[int | None, ...], int] = {}
    for rank, name in enumerate(where if len(kept) > 1 else ()):
        parts = [[flat[rank] for flat in flats.parts if flat] for flats in kept]
        sums = tuple(part.storage.crc32 for own in parts for part in own)
        first = rank if None in sums else seen.setdefault(sums, rank)
        if first != rank and all(any(_varies(part) for part in own) for own in parts):
            raise CorruptError(f"{where[first]} and {name} contain the same values: one rank's file is there twice")


def _varies(part: TensorEntry) -> bool:
    """Whether a buffer has several values."""
    from ckptkit.transfer.values import same_values

    return part.numel > 1 and not same_values(part[1:], part[:-1])


def _groups(
    slots: Sequence[Slot], shared: Sequence[_Buffer], kept: Kept
) -> list[tuple[list[tuple[object, object]], list[str]]]:
    """The optimizer's groups, with the names of their parameters."""
    names: dict[int, list[str]] = {}
    for slot in slots:
        names.setdefault(shared[slot.flat].number, []).append(slot.name)
    return [(pairs, [name for flat in flats for name in names.get(flat, ())]) for pairs, flats in kept.groups]


def _number(value: object) -> object:
    """A number; for an enum of any class, its value."""
    if isinstance(value, Object) and len(value.args) == 1:
        value = value.args[0]
    return value if isinstance(value, (int, list)) else None


def _buffers(nodes: Sequence[object], where: Sequence[str]) -> list[list[TensorEntry]]:
    """The flat buffers of each rank, as many of each.

    Raises:
        CorruptError: a rank has none, or another number.
    """
    found: list[list[TensorEntry]] = []
    for node, name in zip(nodes, where, strict=True):
        flats = [flat for flat in node if isinstance(flat, TensorEntry)] if isinstance(node, (list, tuple)) else []
        if not isinstance(node, (list, tuple)) or len(flats) < len(node):
            raise CorruptError(f"it has no flat buffers of the fp32 weights ({_JOINED}, {_SPLIT})", where=name)
        if found and len(flats) != len(found[0]):
            first = count_of(len(found[0]), "flat buffer")
            raise CorruptError(f"{where[0]} has {first}, but this one has {len(flats)}", where=name)
        found.append(flats)
    return found


def _joined(
    groups: Sequence[Shapes], shared: Sequence[_Buffer], paddings: list[list[int]] | None, count: int
) -> tuple[list[Slot], list[int]]:
    """As `joined_slots`, for groups some of which are in several sets of experts.

    Raises:
        CorruptError: there are not as many groups as buffers.
    """
    for what, found in (("param_shapes", groups), ("param_alignment_paddings", paddings)):
        if found is not None and len(found) != count:
            raise CorruptError(
                f"{what} has {count_of(len(found), 'group')}, but there are {count_of(count, 'flat buffer')}"
            )
    renamed = [_renamed(groups[each.number], each.experts) for each in shared]
    return joined_slots(renamed, None if paddings is None else [paddings[each.number] for each in shared])


def _counts(partitions: object, count: int, files: int) -> list[int]:
    """How many ranks share each buffer: ``partition_count``, one number or one a group; else as many as have files."""
    if not isinstance(partitions, list):
        partitions = [partitions] * count
    counts = [number for number in partitions if is_int(number) and number > 0]
    return counts if len(counts) == len(partitions) == count else [files] * count


def _paddings(node: object) -> list[list[int]] | None:
    """``param_alignment_paddings``, which DeepSpeed writes since 0.19.

    Raises:
        CorruptError: they are not numbers of elements.
    """
    if node is None:
        return None
    groups: list[list[int]] = []
    for group in node if isinstance(node, list) else ():
        numbers = group if isinstance(group, (list, tuple)) else ()
        groups.append([number for number in numbers if is_int(number) and 0 <= number < _MOST_PADDING])
        if len(groups[-1]) < len(numbers):
            raise CorruptError("param_alignment_paddings are not numbers of elements")
    return groups


def _shared(flat: int, count: int, world: int, model: File) -> list[_Buffer]:
    """A group's buffer; for experts, one for each set of ranks with its own experts.

    Raises:
        UnsupportedError: the ranks are not in sets of one size.
    """
    if count == world:
        return [_Buffer(flat, range(world))]
    if world % count:
        raise UnsupportedError(f"{count} ranks of {world} share flat buffer {flat}: how they are grouped is unknown")
    sets = world // count
    config = named(model.own.get("ds_config"))
    if config.get("use_data_before_expert_parallelism") is True:
        return [_Buffer(flat, range(one * count, (one + 1) * count), one) for one in range(sets)]
    return [_Buffer(flat, range(one, world, sets), one) for one in range(sets)]


def _renamed(shapes: Shapes, experts: int | None) -> Shapes:
    """The parameters of a set of experts, by the experts' numbers among all."""
    if experts is None:
        return shapes
    found = [(name, shape, _EXPERT.fullmatch(name)) for name, shape in shapes]
    local: dict[str, set[int]] = {}
    for _, _, match in found:
        if match is not None:
            local.setdefault(match[1], set()).add(int(match[2]))
    return [
        (name if match is None else f"{match[1]}{experts * len(local[match[1]]) + int(match[2])}{match[3]}", shape)
        for name, shape, match in found
    ]


def _left(moments: Moments, shared: Sequence[_Buffer], kept: Sequence[Kept]) -> list[tuple[object, object]]:
    """By rank and flat buffer, what an optimizer keeps and that cannot be combined."""
    found: dict[int, dict[int, InertDict]] = {}
    for flat, key in moments.left:
        number = shared[flat].number
        for rank in shared[flat].ranks:
            node = found.setdefault(rank, {}).setdefault(number, InertDict())
            node.pairs.append((key, kept[rank].states[number].get(key)))
    return [(f"rank {rank}", InertDict(list(by_flat.items()))) for rank, by_flat in sorted(found.items())]


# Where param_shapes says nothing.


def _shapes_by_mappings(owns: Sequence[Mapping[str, object]], model: File, layers: Mapping[int, File]) -> list[Shapes]:
    """The parameters in flat order, where ``param_shapes`` is ``None``: of BF16_Optimizer at stage 0.

    ``param_slice_mappings`` says which run of a rank's part belongs to which parameter, and the module has the shapes.

    Raises:
        CorruptError: it does not, or the module has no weight of so many elements.
    """
    mappings = [found if isinstance(found := own.get("param_slice_mappings"), list) else [] for own in owns]
    groups: list[Shapes] = []
    for flat in range(len(mappings[0])):
        sizes: dict[str, int] = {}
        for mapping in mappings:
            for name, fragment in named(mapping[flat] if flat < len(mapping) else None).items():
                numel = (attributes(fragment) or InertDict()).get("numel")
                sizes[name] = sizes.get(name, 0) + (numel if is_int(numel) else 0)
        groups.append([(name, _shape_in_module(name, numel, model, layers)) for name, numel in sizes.items()])
    if not groups:
        raise CorruptError("neither param_shapes nor param_slice_mappings say which parameters are in the buffers")
    return groups


def _shape_in_module(name: str, numel: int, model: File, layers: Mapping[int, File]) -> tuple[int, ...]:
    """The shape of a weight of so many elements.

    Raises:
        CorruptError: the module has no such weight.
    """
    number, _, own = name.partition(".")
    if name.startswith(TIED):
        own = name.removeprefix(TIED).partition(".")[2]
        found = [file.own.get(own) for file in layers.values()]
    elif number.isdecimal() and int(number) in layers:
        found = [layers[int(number)].own.get(own)]
    else:
        found = [named(model.own.get("module")).get(name)]
    shape = next((each.shape for each in found if isinstance(each, TensorEntry) and each.numel == numel), None)
    if shape is None:
        raise CorruptError(f"the module has no weight {name} of {count_of(numel, 'element')}", where=model.name)
    return shape
