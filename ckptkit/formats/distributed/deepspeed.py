"""DeepSpeed: the folder of one step, as ``engine.save_checkpoint`` writes it (``runtime/engine.py``, DeepSpeed 0.19.8).

Files, each of torch's own container; ``D`` is a data-parallel rank, ``MM`` a model-parallel one (a pipeline's stage):

- ``mp_rank_MM_model_states.pt``; of stage 3 ``zero_pp_rank_D_mp_rank_MM_model_states.pt``, one a rank: ``module`` (the
  state_dict in the precision of the forward pass; at stage 3 its parameters are empty), ``buffer_names``,
  ``param_shapes`` (`ckptkit.formats.distributed.zero`), ``frozen_param_shapes`` and ``frozen_param_fragments`` (of
  stages 2 and 3; at stage 3 a rank's share of each), ``shared_params`` (another name of a tied parameter -> the one
  that has the values), ``optimizer`` (without ZeRO), ``lr_scheduler``, counters, ``ds_config``, ``ds_version``, and
  what the user added at the top
- ``[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt`` has ``optimizer_state_dict``: of stages 1 and 2
  ``single_partition_of_fp32_groups`` and ``base_optimizer_state``, of stage 3 ``fp32_flat_groups`` and
  ``optimizer_state_dict``; ``partition_count`` says how many ranks there are.  BF16_Optimizer says no ``zero_stage``
- ``layer_NN-model_states.pt``: the state_dict of a pipeline's layer.  Its names in the model are ``NN.`` (the number
  without zeros) and its own; of a layer that several places share ``tied_modules.KEY.`` and its own, and ``module`` is
  ``None``
- ``layer_L_expert_E_…`` and ``expp_rank_…`` are those of a mixture of experts, which is not read

The tree is the model file's, as one process would have saved it: ``fp32`` is the state_dict with the masters in place
of ``module``'s weights (buffers and frozen weights in their own dtype), ``module`` the saved one; they are one where
they have one dtype, and at stage 3, of which no other copy exists, there is one alone.  Under ``optimizer`` stands what
an optimizer keeps, by parameters' names.

Where ``module`` has the weights, each must be its master converted to its dtype, bit for bit: that finds ranks of other
runs or steps, swapped or repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ckptkit.checkpoint import Replica, TensorEntry
from ckptkit.errors import CorruptError, UnsupportedError
from ckptkit.formats.distributed.deepspeed_modules import layers_of, modules_of, shape_in_module, tensor_parallel
from ckptkit.formats.distributed.deepspeed_parts import (
    File,
    Models,
    Parts,
    Weights,
    by_rank,
    frozen_weights,
    models_of,
    plain,
    require_ranks,
    shapes_of,
    unproven,
)
from ckptkit.formats.distributed.folder import FolderSource
from ckptkit.formats.distributed.zero import (
    Flats,
    Kept,
    Moments,
    Shapes,
    Slot,
    by_name,
    joined_slots,
    kept_of,
    moments_of,
    named,
    require_alike,
    split_slots,
)
from ckptkit.formats.format import Probe
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict, Object, attributes
from ckptkit.pickling.tensors import is_int
from ckptkit.report import Finding, count_of, listed

__all__ = ["read"]

_OPTIMIZER = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d{1,7})_mp_rank_(\d{1,7})_optim_states\.pt", re.ASCII)
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*", re.ASCII)

_JOINED, _SPLIT = "single_partition_of_fp32_groups", "fp32_flat_groups"
"""The masters' flat buffers, of stages 1 and 2 and of stage 3."""

_MOST_PADDING = 1 << 20
"""Elements of padding behind a parameter, thousands of times what 16 bytes take."""

_LISTED = 3
"""Keys that a message lists."""


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of a step's folder.

    Raises:
        CorruptError: files are missing, damaged, or of different runs or steps.
        UnsupportedError: it is a mixture of experts, or split over tensor-parallel ranks.
    """
    folder = probe.file
    if not isinstance(folder, FolderSource):
        raise TypeError("a folder is read")
    parts = Parts(probe)
    if any(name.startswith("zero/") and name.endswith("/fp32.pt") for name in folder.names):
        from ckptkit.formats.distributed.deepspeed_universal import read_universal

        return read_universal(parts, folder.names)
    names = [name for name in folder.names if "/" not in name]
    if experts := [name for name in names if _EXPERT.fullmatch(name)]:
        raise UnsupportedError(
            f"a mixture of experts, which lie in files of their own ({listed(experts, 2)}): ckptkit does not put "
            "them together"
        )
    models = models_of(parts, names)
    layers = layers_of(parts, names)
    degree = named(models.first.own.get("checkpoint_parallel_dimensions")).get("tp_degree")
    if (is_int(degree) and degree > 1) or (len(models.files) > 1 and not layers):
        raise tensor_parallel(f"{len(models.files)} mp_rank files")
    optimizers = by_rank(parts, names, _OPTIMIZER)
    if not optimizers:
        return _without_masters(parts, models, layers)
    require_ranks(optimizers, len(models.files), "optim_states files of each mp_rank")
    zeros = [_zero_of(models.files[stage], files, layers) for stage, files in optimizers.items()]
    files = [file for ranks in optimizers.values() for file in ranks.values()]
    require_alike("ds_version", {file.name: file.own.get("ds_version") for file in (models.first, *files)})
    return _with_masters(parts, models, layers, zeros)


# Without ZeRO.


def _without_masters(parts: Parts, models: Models, layers: Mapping[int, File]) -> RawCheckpoint:
    """Of what was trained without ZeRO: the module, and the optimizer as it was saved.

    Raises:
        CorruptError: it was trained with ZeRO, and the files of the optimizer are missing.
    """
    first = models.first
    if first.own.get("param_shapes") is not None:
        alone = f"; {first.name}, given alone, has the module's" * (first.own.get("module") is not None)
        raise CorruptError(f"the ranks' optim_states files, which have the fp32 weights, are missing{alone}")
    weights = Weights({}, {})
    for where, module in modules_of(first, layers, {}):
        weights.add(module, where)
    optimizers: list[object] = [next(iter(ranks.values())).own.get("optimizer") for ranks in models.files.values()]
    findings = []
    masters = [key for key in ("fp32_groups", "fp32_groups_flat") if named(optimizers[0]).get(key)]
    if masters:
        findings.append(
            Finding(
                code="optimizer-by-rank",
                severity="info",
                message=f"the fp32 weights under optimizer.{masters[0]} are without names; the module's are taken",
            )
        )
    root = models.tree(weights, optimizers[0] if len(optimizers) == 1 else optimizers)
    stages = f", {len(models.files)} pipeline stages" * (len(models.files) > 1)
    return parts.raw(root, f"{models.writer}, without ZeRO{stages}", findings, weights.replicas)


# With ZeRO.


class _Zero(NamedTuple):
    """What the optimizer files of the model, or of a stage of its pipeline, hold.

    Attributes:
        slots: where the parameters lie.
        masters: their values.
        moments: what the optimizer keeps of them; ``None``: nothing says how it belongs to them.
        groups: the pairs of each of its ``param_groups``, and the names of their parameters.
        own: what the file of rank 0 has.
        left: by rank, what could not be put together.
        told: the stage of ZeRO and its ranks.
    """

    slots: Sequence[Slot]
    masters: Flats
    moments: Moments | None
    groups: list[tuple[list[tuple[object, object]], list[str]]]
    own: Mapping[str, object]
    left: list[tuple[object, object]]
    told: str


def _zero_of(models: Mapping[int, File], files: Mapping[int, File], layers: Mapping[int, File]) -> _Zero:
    """Put the buffers of all ranks together.

    Args:
        models: the model files by rank; of stages 1 and 2 there is one.
        files: the optimizer files by rank.
        layers: the files of a pipeline's layers.

    Raises:
        CorruptError: a rank is missing, or its buffers are not what they should be.
    """
    owns = [named(file.own.get("optimizer_state_dict")) for file in files.values()]
    first, model = owns[0], next(iter(models.values()))
    is_split = _SPLIT in first
    where = [file.name for file in files.values()]
    for key in ("zero_stage", "partition_count"):
        require_alike(key, dict(zip(where, (_number(own.get(key)) for own in owns), strict=True)))
    world = _world(first.get("partition_count"), len(files))
    require_ranks(files, world, "optim_states files")
    if is_split:
        require_ranks(models, world, "model_states files")
    buffers = [_buffers(own.get(_SPLIT if is_split else _JOINED), name) for own, name in zip(owns, where, strict=True)]
    count = len(buffers[0])
    for own, name in zip(buffers, where, strict=True):
        if len(own) != count:
            raise CorruptError(f"it has {count_of(len(own), 'flat buffer')}, and {where[0]} has {count}", where=name)
    shapes = model.own.get("param_shapes")
    groups = shapes_of(shapes, model.name) if shapes is not None else _shapes_by_mappings(owns, model, layers)
    if is_split:
        totals = [flat.numel for flat in buffers[0]]
        slots = split_slots(groups, totals, world)
    else:
        slots, totals = joined_slots(groups, _paddings(first.get("param_alignment_paddings")))
        if len(totals) != count:
            raise CorruptError(f"param_shapes has {len(totals)} groups, and there are {count} flat buffers")
    ranks = [f"rank {rank}" for rank in files]
    masters = Flats("fp32", list(zip(*buffers, strict=True)), ranks, is_split).require(dict(enumerate(totals)))
    bases = [own.get("optimizer_state_dict" if is_split else "base_optimizer_state") for own in owns]
    kept = [found for base in bases if (found := kept_of(base, count)) is not None]
    stage = _number(first.get("zero_stage"))
    told = f"ZeRO stage {stage if is_int(stage) else '1 (BF16_Optimizer)'}, {count_of(world, 'rank')}"
    if len(kept) < len(bases):
        return _Zero(slots, masters, None, [], first, list(zip(ranks, bases, strict=True)), told)
    moments = moments_of(kept, masters, totals)
    names = [[slot.name for slot in slots if slot.flat == flat] for flat in range(count)]
    named_groups = [(pairs, [name for flat in flats for name in names[flat]]) for pairs, flats in kept[0].groups]
    return _Zero(slots, masters, moments, named_groups, first, _left(moments, ranks, kept), told)


def _shapes_by_mappings(owns: Sequence[Mapping[str, object]], model: File, layers: Mapping[int, File]) -> list[Shapes]:
    """The parameters in flat order, where ``param_shapes`` is ``None``: of BF16_Optimizer at stage 0.

    Which run of a rank's part is of which parameter stands in ``param_slice_mappings``, and shapes in the module.

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
        groups.append([(name, shape_in_module(name, numel, model, layers)) for name, numel in sizes.items()])
    if not groups:
        raise CorruptError("neither param_shapes nor param_slice_mappings say which parameters the buffers hold")
    return groups


def _number(value: object) -> object:
    """A number; of an enum, of whatever class, its value."""
    if isinstance(value, Object) and len(value.args) == 1:
        value = value.args[0]
    return value if isinstance(value, (int, list)) else None


def _world(partitions: object, files: int) -> int:
    """How many ranks share the buffers: ``partition_count``, one number or one a group; else as many as have files."""
    counts = [count for count in (partitions if isinstance(partitions, list) else [partitions]) if is_int(count)]
    return max(counts, default=0) or files


def _buffers(node: object, where: str) -> list[TensorEntry]:
    found = [flat for flat in node if isinstance(flat, TensorEntry)] if isinstance(node, (list, tuple)) else []
    if not isinstance(node, (list, tuple)) or len(found) < len(node):
        raise CorruptError(f"it has no flat buffers of the fp32 weights ({_JOINED}, {_SPLIT})", where=where)
    return found


def _paddings(node: object) -> list[list[int]] | None:
    """``param_alignment_paddings``, which DeepSpeed writes since 0.19.

    Raises:
        CorruptError: they are not numbers of elements.
    """
    if node is None:
        return None
    groups = [group for group in node if isinstance(group, (list, tuple))] if isinstance(node, (list, tuple)) else []
    if not isinstance(node, (list, tuple)) or len(groups) < len(node):
        raise CorruptError("param_alignment_paddings are not lists")
    if not all(is_int(number) and 0 <= number < _MOST_PADDING for group in groups for number in group):
        raise CorruptError("param_alignment_paddings are not numbers of elements")
    return [list(group) for group in groups]


def _left(moments: Moments, ranks: Sequence[str], kept: Sequence[Kept]) -> list[tuple[object, object]]:
    """By rank and flat buffer, what an optimizer keeps and that cannot be put together."""
    if not moments.left:
        return []
    found: list[tuple[object, object]] = []
    for rank, each in zip(ranks, kept, strict=True):
        by_flat: dict[int, InertDict] = {}
        for flat, key in moments.left:
            by_flat.setdefault(flat, InertDict()).pairs.append((key, each.states[flat].get(key)))
        found.append((rank, InertDict(list(by_flat.items()))))
    return found


def _with_masters(parts: Parts, models: Models, layers: Mapping[int, File], zeros: Sequence[_Zero]) -> RawCheckpoint:
    """Of what was trained with ZeRO: the masters by name, the module, and what the optimizer keeps, by name.

    Raises:
        CorruptError: a weight is not what ``param_shapes`` says, or the file of a layer is missing.
    """
    masters: dict[str, TensorEntry] = {}
    holders: dict[str, str] = {}
    replicas: list[Replica] = []
    for stage, zero in zip(models.files, zeros, strict=True):
        of_stage = f" of mp_rank_{stage:02d}" * (len(zeros) > 1)
        for slot in zero.slots:
            entry, holder = zero.masters.tensor(slot), f"{zero.masters.holders(slot)}{of_stage}"
            if slot.name in masters:  # a layer that several stages have
                replicas.append(Replica(slot.name, masters[slot.name], entry, f"{holders[slot.name]} and {holder}"))
            else:
                masters[slot.name], holders[slot.name] = entry, holder
        replicas += zero.moments.replicas if zero.moments is not None else ()
    is_split = zeros[0].masters.is_split
    for ranks in models.files.values():
        masters |= frozen_weights(ranks)
    weights = Weights(masters, holders, models.first.own.get("shared_params"))
    for where, module in modules_of(models.first, layers, masters):
        weights.add(module, where, stubs=is_split)
    for file in [file for ranks in models.files.values() for file in ranks.values()][1:]:
        weights.add(named(file.own.get("module")), file.name, stubs=is_split)
    if layers and (lost := [name for name in weights.unproven if name.partition(".")[0].isdecimal()]):
        raise CorruptError(
            f"no layer file has {listed(lost, _LISTED)}: layer_{int(lost[0].partition('.')[0]):02d}-model_states.pt is "
            "missing, or of another run"
        )
    stages = f", {len(zeros)} pipeline stages" * (len(zeros) > 1)
    findings = [*unproven(weights), *_left_findings(zeros)]
    root = models.tree(weights, _optimizer(models, zeros))
    return parts.raw(root, f"{models.writer}, {zeros[0].told}{stages}", findings, [*replicas, *weights.replicas])


def _optimizer(models: Models, zeros: Sequence[_Zero]) -> InertDict:
    """What the optimizer keeps, by parameters' names, with what else rank 0 has of it."""
    state: dict[str, InertDict] = {}
    left: list[tuple[object, object]] = []
    for stage, zero in zip(models.files, zeros, strict=True):
        for slot in zero.slots if zero.moments is not None else ():
            found = zero.moments.state(slot) if zero.moments is not None else InertDict()
            if found.pairs:
                state.setdefault(slot.name, found)
        if zero.left:
            left += zero.left if len(zeros) == 1 else [(f"mp_rank_{stage:02d}", InertDict(zero.left))]
    return InertDict(
        [
            ("state", InertDict(list(state.items()))),
            ("param_groups", by_name([zero.groups for zero in zeros])),
            *plain(zeros[0].own),
            *([("by_rank", InertDict(left))] if left else []),
        ]
    )


def _left_findings(zeros: Sequence[_Zero]) -> Iterator[Finding]:
    keys = {key: None for zero in zeros if zero.moments is not None for _, key in zero.moments.left}
    if keys or any(zero.left for zero in zeros):
        what = f"what it keeps as {listed(keys, _LISTED)}" if keys else "what it keeps"
        yield Finding(
            code="optimizer-by-rank",
            severity="warning",
            message=f"{what} of the optimizer is not laid out as the parameters are: it stands by rank, as it was "
            "saved, under optimizer.by_rank",
        )
