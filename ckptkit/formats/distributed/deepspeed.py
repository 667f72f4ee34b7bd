"""DeepSpeed: the folder of one step, as ``engine.save_checkpoint`` writes it (``runtime/engine.py``, DeepSpeed 0.19.8).

Files, each in torch's own container; ``D`` is a data-parallel rank, ``MM`` a model-parallel one (a pipeline's stage):

- ``mp_rank_MM_model_states.pt``; of stage 3 ``zero_pp_rank_D_mp_rank_MM_model_states.pt``, one per rank: ``module``
  (the state_dict in the precision of the forward pass; at stage 3 its parameters are empty), ``buffer_names``,
  ``param_shapes`` (`ckptkit.formats.distributed.zero`), ``frozen_param_shapes`` and ``frozen_param_fragments`` (of
  stages 2 and 3; at stage 3 a rank's share of each), ``shared_params`` (another name of a tied parameter -> the one
  that has the values), ``optimizer`` (without ZeRO), ``lr_scheduler``, counters, ``ds_config``, ``ds_version``, and
  what the user added at the top
- ``[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt`` (at first without the ``_`` before ``optim``) has
  ``optimizer_state_dict``: of stages 1 and 2 ``single_partition_of_fp32_groups`` and ``base_optimizer_state``, of
  stage 3 ``fp32_flat_groups`` and ``optimizer_state_dict``; ``partition_count`` says how many ranks there
  are.  BF16_Optimizer says no ``zero_stage``
- ``layer_NN-model_states.pt``: the state_dict of a pipeline's layer.  Its names in the model are ``NN.`` (the number
  without zeros) and its own; of a layer that several places share ``tied_modules.KEY.`` and its own, and ``module`` is
  ``None``
- ``layer_L_expert_E_mp_rank_MM_model_states.pt``: of a mixture of experts the weights of expert E of the L-th such
  layer, by their names in the model; without ZeRO ``expp_rank_R_mp_rank_MM_optim_states.pt`` are the optimizers of the
  ranks of experts

The tree is the model file's, as one process would have saved it: ``fp32`` is the state_dict with the masters instead of
``module``'s weights (buffers and frozen weights in their own dtype), ``module`` the saved one; they are the same if
they have one dtype, and at stage 3, of which no other copy exists, there is only one.  Under ``optimizer`` is the
optimizer's state, by parameters' names.

Where ``module`` has the weights, each must be its master converted to its dtype, bit for bit: that finds ranks of other
runs or steps, swapped or repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ckptkit.checkpoint import Replica, TensorEntry
from ckptkit.errors import CorruptError, UnsupportedError
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
    unproven,
)
from ckptkit.formats.distributed.deepspeed_zero import TIED, Zero, zero_of
from ckptkit.formats.distributed.folder import folder_of
from ckptkit.formats.distributed.zero import by_name, named, require_alike
from ckptkit.formats.format import Probe
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.tensors import is_int
from ckptkit.report import Finding, listed

__all__ = ["read"]

_OPTIMIZER = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d{1,7})_mp_rank_(\d{1,7})_?optim_states\.pt", re.ASCII)
_LAYER = re.compile(r"layer_(\d{1,7})(?:-model_(\d{1,7}))?-model_states\.pt", re.ASCII)
_EXPERT = re.compile(r"layer_(\d{1,7})_expert_(\d{1,7})_mp_rank_(\d{1,7})_model_states\.pt", re.ASCII)
_EXPERTS_OPTIMIZER = re.compile(r"expp_rank_\d{1,7}_mp_rank_\d{1,7}_optim_states\.pt", re.ASCII)

_LISTED = 3
"""Names that a message lists."""


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of a step's folder.

    Raises:
        CorruptError: files are missing, damaged, or of different runs or steps.
        UnsupportedError: its tensors are split over tensor-parallel ranks.
    """
    folder = folder_of(probe)
    parts = Parts(probe)
    if any(name.startswith("zero/") and name.endswith("/fp32.pt") for name in folder.names):
        from ckptkit.formats.distributed.deepspeed_universal import read_universal

        return read_universal(parts, folder.names)
    names = [name for name in folder.names if "/" not in name]
    models = models_of(parts, names)
    modules = _modules_of(parts, names, models)
    degree = named(models.first.own.get("checkpoint_parallel_dimensions")).get("tp_degree")
    if (is_int(degree) and degree > 1) or (len(models.files) > 1 and not modules.layers):
        raise _tensor_parallel(f"{len(models.files)} mp_rank files")
    if models.first.own.get("ds_autoep_layers"):
        raise UnsupportedError("experts that AutoEP distributed over ranks (ds_autoep_layers) cannot be combined")
    optimizers = by_rank(parts, names, _OPTIMIZER)
    if not optimizers:
        return _without_masters(parts, models, modules, names)
    require_ranks(optimizers, len(models.files), "optim_states files of each mp_rank")
    zeros = [zero_of(models.files[stage], files, modules.layers) for stage, files in optimizers.items()]
    files = [file for ranks in optimizers.values() for file in ranks.values()]
    require_alike("ds_version", {file.name: file.own.get("ds_version") for file in (models.first, *files)})
    return _with_masters(parts, models, modules, zeros)


# The module.


class _Modules(NamedTuple):
    """The files of the module's weights beside the model file.

    Attributes:
        layers: those of a pipeline's layers, by their numbers.
        experts: those of experts.
    """

    layers: Mapping[int, File]
    experts: Sequence[File]


def _modules_of(parts: Parts, names: Sequence[str], models: Models) -> _Modules:
    """The files of layers and experts, read.

    Raises:
        CorruptError: those of experts are missing.
        UnsupportedError: they are split over tensor-parallel ranks.
    """
    layers: dict[int, File] = {}
    experts: dict[int, dict[int, str]] = {}
    for name in names:
        layer, expert = _LAYER.fullmatch(name), _EXPERT.fullmatch(name)
        if layer is not None:
            if int(layer[2] or 0):
                raise _tensor_parallel(name)
            layers[int(layer[1])] = parts.read(name)
        elif expert is not None:
            if int(expert[3]):
                raise _tensor_parallel(name)
            experts.setdefault(int(expert[1]), {})[int(expert[2])] = name
    counts = models.first.own.get("num_experts")
    for layer_number, count in enumerate(counts if isinstance(counts, list) else ()):
        if is_int(count) and count > 1:
            require_ranks(experts.get(layer_number, {}), count, f"files of the experts of layer {layer_number}")
    return _Modules(
        dict(sorted(layers.items())),
        [parts.read(by_number[number]) for _, by_number in sorted(experts.items()) for number in sorted(by_number)],
    )


def _tensor_parallel(which: str) -> UnsupportedError:
    return UnsupportedError(
        f"its tensors are split over tensor-parallel ranks ({which}), and the files do not say how; "
        "give rules with --tp-rules FILE"
    )


def _states_of(
    first: File, modules: _Modules, masters: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, dict[str, object]]]:
    """The module's state_dict in parts, each with its file; the names of a pipeline's layers are those in the model.

    A layer that several places share has its values under ``tied_modules``: by names and shapes, since no file says it.
    A place where a function is applied to it, as an output layer is to an embedding's weight, has no file.
    """
    if not modules.layers:
        yield first.name, named(first.own.get("module"))
        yield from ((file.name, file.own) for file in modules.experts)
        return
    tied: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, master in masters.items():
        if name.startswith(TIED) and name.count(".") > 1:
            key, _, own = name.removeprefix(TIED).partition(".")
            tied.setdefault(key, {})[own] = master.shape
    for number, file in modules.layers.items():
        prefix = f"{number}."
        shapes = {name: value.shape for name, value in file.own.items() if isinstance(value, TensorEntry)}
        if shapes and not any(prefix + name in masters for name in shapes):
            keys = [key for key, own in tied.items() if own.items() <= shapes.items()]
            if len(keys) == 1:
                prefix = f"{TIED}{keys[0]}."
        yield file.name, {prefix + name: value for name, value in file.own.items()}


# Without ZeRO.


def _without_masters(parts: Parts, models: Models, modules: _Modules, names: Sequence[str]) -> RawCheckpoint:
    """Of what was trained without ZeRO: the module, and the optimizer as it was saved.

    Raises:
        CorruptError: it was trained with ZeRO, and the files of the optimizer are missing.
    """
    first = models.first
    if first.own.get("param_shapes") is not None:
        alone = f"; {first.name}, given alone, has the module's" * (first.own.get("module") is not None)
        raise CorruptError(f"the ranks' optim_states files, which have the fp32 weights, are missing{alone}")
    weights = Weights({}, {})
    for where, module in _states_of(first, modules, {}):
        weights.add(module, where)
    own = [(f"mp_rank_{stage:02d}", next(iter(ranks.values())).own) for stage, ranks in models.files.items()]
    own += [(name.rpartition("_mp")[0], parts.read(name).own) for name in names if _EXPERTS_OPTIMIZER.fullmatch(name)]
    optimizers = [(which, file.get("optimizer")) for which, file in own if file.get("optimizer") is not None]
    findings = []
    masters = [key for key in ("fp32_groups", "fp32_groups_flat") if optimizers and named(optimizers[0][1]).get(key)]
    if masters:
        findings.append(
            Finding(
                code="optimizer-by-rank",
                severity="info",
                message=f"the fp32 weights under optimizer.{masters[0]} have no names; the module's weights are used",
            )
        )
    several: list[tuple[object, object]] = [*optimizers]
    root = models.tree(weights, optimizers[0][1] if len(own) == 1 and optimizers else InertDict(several))
    stages = f", {len(models.files)} pipeline stages" * (len(models.files) > 1)
    return parts.raw(root, f"{models.writer}, without ZeRO{stages}", findings, weights.replicas)


# With ZeRO.


def _with_masters(parts: Parts, models: Models, modules: _Modules, zeros: Sequence[Zero]) -> RawCheckpoint:
    """For checkpoints of ZeRO: the masters by name, the module, and the optimizer's state, by name.

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
    for where, module in _states_of(models.first, modules, masters):
        weights.add(module, where, buffers=models.first.own.get("buffer_names"), stubs=is_split)
    for file in [file for ranks in models.files.values() for file in ranks.values()][1:]:
        weights.add(named(file.own.get("module")), file.name, buffers=file.own.get("buffer_names"), stubs=is_split)
    if (modules.layers or modules.experts) and weights.unproven:
        raise CorruptError(
            f"no layer_ file has {listed(weights.unproven, _LISTED)}: it is missing, or from another run",
            names=weights.unproven,
        )
    stages = f", {len(zeros)} pipeline stages" * (len(zeros) > 1)
    findings = [*unproven(weights), *_left_findings(zeros)]
    root = models.tree(weights, _optimizer(models, zeros))
    return parts.raw(root, f"{models.writer}, {zeros[0].told}{stages}", findings, [*replicas, *weights.replicas])


def _optimizer(models: Models, zeros: Sequence[Zero]) -> InertDict:
    """The optimizer's state, by parameters' names, with the rest of rank 0's."""
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


def _left_findings(zeros: Sequence[Zero]) -> Iterator[Finding]:
    keys = {key: None for zero in zeros if zero.moments is not None for _, key in zero.moments.left}
    if keys or any(zero.left for zero in zeros):
        what = f"its state in {listed(keys, _LISTED)}" if keys else "its state"
        yield Finding(
            code="optimizer-by-rank",
            severity="warning",
            message=f"{what} of the optimizer does not have the layout of the parameters: it is kept by rank, as "
            "it was saved, under optimizer.by_rank",
        )
