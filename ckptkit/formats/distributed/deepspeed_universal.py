"""DeepSpeed's universal checkpoints: one file a parameter and value, as ``ds_to_universal`` writes them.

Layout (``deepspeed/checkpoint/ds_to_universal.py``, DeepSpeed 0.19.8): the ``model_states`` files of the step it was
made from, and below ``zero/``

- ``NAME/fp32.pt``, ``NAME/exp_avg.pt``, ``NAME/exp_avg_sq.pt``: of stages 1 and 2 a dict whose ``param`` is the whole
  parameter, combined from all tensor-parallel ranks (``cat_dim`` and the like say how; ``vocab_tensor``: without the
  rows that pad a vocabulary); of stage 3 its elements in one dimension
- ``NAME/step.pt``: a number; not of stage 3
- ``optimizer_state.pt``: what else an optimizer file of rank 0 has, with ``param_groups``, whose parameters are numbers

A buffer or frozen weight was converted to fp32 there: ``module`` has the original.
``ds_to_universal`` puts parameters of ``round_robin_gradients`` together wrongly, which ``module`` shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from ckptkit.checkpoint import TensorEntry, contiguous_stride
from ckptkit.errors import CorruptError
from ckptkit.formats.distributed.deepspeed_parts import (
    Parts,
    Weights,
    frozen_weights,
    models_of,
    plain,
    shapes_of,
    unproven,
)
from ckptkit.formats.distributed.zero import Shapes, by_name, kept_of, named
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict
from ckptkit.report import listed
from ckptkit.tensor import tensor_of

__all__ = ["read_universal"]

_ITEM = re.compile(r"zero/(.+)/([^/]+)\.pt", re.ASCII | re.DOTALL)
_OPTIMIZER = "zero/optimizer_state.pt"

_LISTED = 3
"""Names that a message lists."""


def read_universal(parts: Parts, names: Sequence[str]) -> RawCheckpoint:
    """The tree and the facts of the folder.

    Args:
        parts: its files.
        names: theirs.

    Raises:
        CorruptError: files are missing, damaged, or of different runs or steps.
    """
    models = models_of(parts, [name for name in names if "/" not in name])
    firsts = [next(iter(ranks.values())) for ranks in models.files.values()]
    groups = [shapes_of(file) for file in firsts]
    shapes = {name: shape for stage in groups for group in stage for name, shape in group}
    masters, holders, state = _put_together(parts, names, shapes)
    # Of tensor-parallel ranks the module has slices, and a vocabulary's padding is gone from the masters alone.
    are_others = len(firsts) > 1 or any(masters[name].shape != shape for name, shape in shapes.items())
    ranks = next(iter(models.files.values()))
    masters |= frozen_weights(ranks)
    weights = Weights(masters, holders, models.first.own.get("shared_params"))
    for file in [file for ranks in models.files.values() for file in ranks.values()]:
        module = named(file.own.get("module"))
        buffers = file.own.get("buffer_names")
        if are_others:
            module = {name: module[name] for name in (buffers if isinstance(buffers, list) else ()) if name in module}
        is_stub = len(ranks) > 1 or _has_stubs(module, shapes)
        weights.add(module, file.name, buffers=buffers, stubs=is_stub)
    root = models.tree(weights, _optimizer(parts, names, groups, state))
    return parts.raw(root, f"{models.writer}, universal checkpoint", unproven(weights), weights.replicas)


def _put_together(
    parts: Parts, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, TensorEntry], dict[str, str], dict[str, InertDict]]:
    """By name the masters, their files, and what the optimizer keeps.

    Raises:
        CorruptError: there is no master of a parameter, or it is not a tensor.
    """
    items: dict[str, dict[str, str]] = {}
    for name in names:
        match = _ITEM.fullmatch(name)
        if match is not None:
            items.setdefault(match[1], {})[match[2]] = name
    if lost := [name for name in shapes if "fp32" not in items.get(name, {})]:
        raise CorruptError(f"zero/NAME/fp32.pt is missing for {listed(lost, _LISTED)}", names=lost)
    masters: dict[str, TensorEntry] = {}
    state: dict[str, InertDict] = {}
    for name, shape in shapes.items():
        found = dict(_values(parts, shape, items[name]))
        master = found.pop("fp32")
        if not isinstance(master, TensorEntry):
            raise CorruptError("it is not a tensor", where=items[name]["fp32"])
        masters[name] = master
        if found:
            state[name] = InertDict(list(found.items()))
    return masters, {name: items[name]["fp32"] for name in shapes}, state


def _has_stubs(module: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all weights of a module are empty (stage 3, of one rank)."""
    values = [value for name, value in module.items() if name in shapes]
    return all(isinstance(value, TensorEntry) and not value.numel for value in values)


def _values(parts: Parts, shape: tuple[int, ...], files: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    """What there is of a parameter: its master as ``"fp32"``, and what the optimizer keeps of it.

    Raises:
        CorruptError: a tensor is of another size than the parameter.
    """
    for key in sorted(files, key=lambda key: (key != "fp32", key != "step", key)):
        file = parts.read(files[key])
        value = file.own.get("param", file.root)
        if isinstance(value, TensorEntry) and key != "step" and "param" not in file.own:
            if not value.is_contiguous or value.numel != prod(shape):
                raise CorruptError(
                    f"it has {value.numel:,} elements, but param_shapes says {[*shape]}", where=file.name
                )
            stride = contiguous_stride(shape)
            value = tensor_of(value.storage, value.storage_offset, shape, stride, value.dtype)
        yield key, value


def _optimizer(
    parts: Parts,
    names: Sequence[str],
    groups: Sequence[Sequence[Shapes]],
    state: Mapping[str, InertDict],
) -> InertDict:
    """The optimizer's state, by parameters' names."""
    own = parts.read(_OPTIMIZER).own if _OPTIMIZER in names else {}
    param_groups: list[InertDict] = []
    kept = kept_of(InertDict([("param_groups", own.get("param_groups"))]), len(groups[0]))
    if kept is not None:
        stages = [
            [(pairs, [name for flat in flats for name, _ in stage[flat]]) for pairs, flats in kept.groups]
            for stage in groups
            if len(stage) == len(groups[0])
        ]
        param_groups = by_name(stages)
    return InertDict([("state", InertDict(list(state.items()))), ("param_groups", param_groups), *plain(own)])
