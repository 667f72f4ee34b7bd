"""How a tree shows that it is a part: the share of one rank, slice or stage of a checkpoint.

Facts of the layouts (torch 2.14, DeepSpeed 0.19, Megatron-LM; each seen in files that they wrote):

- a *DTensor* (``torch/distributed/tensor/_api.py``) is ``_rebuild_wrapper_subclass`` with the whole's shape and a
  state ``{_local_tensor, _spec}``; it is whole where the local tensor has that shape and no placement is ``Partial``
- a *ShardedTensor* (``torch/distributed/_shard/sharded_tensor/api.py``) has a state ``(shards, metadata, ...)``; it
  is whole where its own shards are as many elements as ``metadata.size``
- *FSDP* before ``use_orig_params`` joins parameters into one-dimensional ``_flat_param`` (fairscale:
  ``flat_param_0``); names and shapes of what is joined are not in the file
- *DeepSpeed* (``deepspeed/runtime/engine.py`` ``_save_checkpoint``): ``param_shapes`` has the weights' shapes, for
  which ZeRO stage 3 leaves empty stubs under ``module``; optimizer files have ``single_partition_of_fp32_groups`` or
  ``fp32_flat_groups``; ``module`` is ``None`` if a pipeline's layers are in separate files
- *Megatron-LM* (``megatron/training/checkpointing.py``): ``args`` says how many ranks share a model
- *safetensors of torch.distributed.checkpoint* have ``DCP_SHARDING_INFO`` in their metadata

What files are called is for `ckptkit.formats.shards`, which asks here first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, NamedTuple, TypeGuard

from ckptkit.checkpoint import Checkpoint, Part, StateDict, TensorEntry
from ckptkit.errors import PartError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import unwrapped
from ckptkit.pickling.inert import InertDict, Object, mapping_items, walk
from ckptkit.pickling.tensors import Wrapped, shape_of, wrapped_tensor
from ckptkit.report import Finding, count_of
from ckptkit.shell import quoted

__all__ = [
    "CODE",
    "WHOLE",
    "flat_part",
    "is_flat_name",
    "members",
    "mesh_sizes",
    "part_findings",
    "part_in",
    "part_text",
    "require_whole",
    "spread_text",
    "way_findings",
    "way_out",
]

CODE = "part-of-a-checkpoint"
UNPROVEN = "completeness-unknown"

WHOLE: Final = "whole"
"""The answer for a tree that records one rank: the file is whole."""

_MOST_KEYS = 1000
"""Keys of a file's own dict; what has more is a state_dict."""

_MOST_RANKS = 1 << 24
"""Processes that may have saved a checkpoint, hundreds of times what there are."""

_HUGE = 1 << 62
"""More than any count of elements."""

_FLAT = r"(?:^|\.)(?:_flat_param|flat_param_[0-9]+|_(?:fsdp_wrapped|fpw)_module\.flat_param)\Z"

_PARALLEL = {
    "tensor_model_parallel_size": "tensor parallel",
    "model_parallel_size": "tensor parallel",
    "pipeline_model_parallel_size": "pipeline",
    "expert_model_parallel_size": "expert parallel",
}
"""Megatron's arguments that say over how many ranks a model is split (``model_parallel_size``: before 2021)."""


def part_in(
    root: object, state_dict: StateDict, metadata: Mapping[str, str], names: list[str]
) -> Part | Literal["whole"] | None:
    """The content's verdict: a part, the whole, or none (``None``).

    Args:
        root: the tree as it was read.
        state_dict: the weights that were found in it.
        metadata: the container's own strings.
        names: of the globals in the file's pickles, which show whether the tree is worth a walk.
    """
    if "DCP_SHARDING_INFO" in metadata:
        return Part(
            layout="a torch.distributed.checkpoint of safetensors files",
            lacks="its tensors are slices of those in the whole checkpoint",
        )
    own = _own_keys(root)
    said: Part | Literal["whole"] | None = None
    for each in (_deepspeed(own, state_dict), _megatron(own)):
        if isinstance(each, Part):
            return each
        said = said or each
    if (llama := _llama(state_dict)) is not None:
        return llama
    if any(name.endswith(".FlatParameter") for name in names) or _has_flat(own, state_dict):
        return _FLAT_PART
    if any(name.endswith((".DTensor", ".ShardedTensor")) for name in names):
        return _distributed(root) or said
    return said


_FLAT_PART = Part(
    layout="an FSDP checkpoint with flat parameters",
    lacks="its parameters are joined into flat ones, and the file does not contain their names and shapes",
)


def flat_part(root: object, state_dict: StateDict) -> Part | None:
    """The facts that the ranks' files lack if their parameters are flat; ``None``: they are not.

    Args:
        root: the tree of all of them.
        state_dict: the weights that were found in it.
    """
    if not _has_flat(_own_keys(root), state_dict):
        return None
    return replace(
        _FLAT_PART,
        remedy="ckptkit convert --like REF splits them with the help of a file of the same model or the model itself",
    )


def is_flat_name(name: str) -> bool:
    """Whether a flat parameter of FSDP's is called so."""
    return re.search(_FLAT, name) is not None


def _own_keys(root: object) -> Mapping[str, object]:
    """The values of a file's own dict by their keys; empty for anything but such a dict."""
    pairs = mapping_items(root)
    return {} if pairs is None or len(pairs) > _MOST_KEYS else {k: v for k, v in pairs if isinstance(k, str)}


def members(node: object) -> InertDict:
    """The attributes of an object, in its ``__dict__`` and in slots; or those that such a state gives."""
    state = node.state if isinstance(node, Object) else node
    found = [part for part in (state if isinstance(state, tuple) else (state,)) if isinstance(part, InertDict)]
    return found[0] if len(found) == 1 else InertDict([pair for part in found for pair in part.pairs])


# DeepSpeed and Megatron.


def _deepspeed(own: Mapping[str, object], state_dict: StateDict) -> Part | Literal["whole"] | None:
    optimizer = {**own, **_own_keys(own.get("optimizer_state_dict"))}
    if "single_partition_of_fp32_groups" in optimizer or "fp32_flat_groups" in optimizer:
        count = optimizer.get("partition_count")
        ranks = max((n for n in (count if isinstance(count, list) else [count]) if _is_count(n)), default=0)
        return Part(
            layout="a DeepSpeed ZeRO checkpoint",
            piece=f"the optimizer state of {_rank_of(ranks)}" if ranks > 1 else "the optimizer state",
            lacks="it contains one rank's share of flat buffers; the model_states files say which parameters are in "
            "them",
        )
    if not own.keys() & {"param_shapes", "ds_version", "mp_world_size"}:
        return None
    if own.get("module", own) is None:
        return Part(
            layout="a DeepSpeed pipeline checkpoint", lacks="it contains no weights; they are in the layer_ files"
        )
    stubs, weights = _stubs(own, state_dict)
    if stubs:
        verb = "is an empty stub" if stubs == 1 else "are empty stubs"
        return Part(
            layout="a DeepSpeed ZeRO stage 3 checkpoint",
            piece=_rank_of(own.get("dp_world_size")),
            lacks=f"{stubs:,} of {count_of(weights, 'weight')} {verb}; the values are in the optim_states files",
        )
    degrees = _own_keys(own.get("checkpoint_parallel_dimensions"))
    for size in (own.get("mp_world_size"), degrees.get("tp_degree"), degrees.get("pp_degree")):
        if _is_count(size) and size > 1:
            return Part(
                layout="a DeepSpeed checkpoint with model parallelism",
                piece=_rank_of(size),
                lacks="the other ranks have the other slices of its tensors, or the other layers",
            )
    experts = own.get("num_experts")
    if isinstance(experts, list) and any(_is_count(count) and count > 1 for count in experts):
        return Part(layout="a DeepSpeed mixture of experts", lacks="the experts are in separate files")
    return WHOLE if "module" in own else None


def _stubs(own: Mapping[str, object], state_dict: StateDict) -> tuple[int, int]:
    """How many weights are smaller than ``param_shapes`` says, and how many it names."""
    groups = own.get("param_shapes")
    sizes: dict[str, int] = {}
    for group in (*(groups if isinstance(groups, (list, tuple)) else (groups,)), own.get("frozen_param_shapes")):
        for name, size in mapping_items(group) or []:
            shape = shape_of(size)
            if isinstance(name, str) and shape is not None:
                sizes[name] = _product(shape)
    weights = mapping_items(own.get("module")) or state_dict.items()
    stubs = sum(
        value.numel < sizes.get(name, sizes.get(unwrapped(name), 0))
        for name, value in (weights if sizes else ())
        if isinstance(name, str) and isinstance(value, TensorEntry)
    )
    return stubs, len(sizes)


def _megatron(own: Mapping[str, object]) -> Part | Literal["whole"] | None:
    if not any(key.startswith(("model", "module", "state_dict")) for key in own):
        return None
    said = _own_keys(own.get("args")) or members(own.get("args"))
    sizes = {how: size for key, how in _PARALLEL.items() if _is_count(size := said.get(key))}
    if not sizes:
        return None
    split = {how: size for how, size in sizes.items() if size > 1}
    if not split:
        return WHOLE
    return Part(
        layout="a Megatron checkpoint",
        piece=", ".join(f"one {how} rank of {size}" for how, size in split.items()),
        lacks="the other ranks have the other slices of its tensors, or the other layers",
    )


def _llama(state_dict: StateDict) -> Part | None:
    """Llama's slices have embeddings that are narrower than its norms are long."""
    rows, norm = state_dict.get("tok_embeddings.weight"), state_dict.get("norm.weight")
    if rows is None or norm is None or len(rows.shape) != 2 or len(norm.shape) != 1:
        return None
    (width,), own = norm.shape, rows.shape[1]
    if not 0 < own < width or width % own:
        return None
    return Part(
        layout="a Llama checkpoint in tensor-parallel parts",
        piece=f"one of {width // own}",
        lacks="the other ranks have the other slices of its tensors",
    )


def _rank_of(count: object) -> str:
    return f"one rank of {count}" if _is_count(count) and count > 1 else ""


def _is_count(node: object) -> TypeGuard[int]:
    """Whether it can be how many ranks there are; a pickle may say numbers of a million digits."""
    return isinstance(node, int) and 0 < node < _MOST_RANKS


def _product(numbers: Sequence[int]) -> int:
    """The product of sizes in a file; 0 if it is more than any tensor's."""
    total = 1
    for number in numbers if len(numbers) <= DEFAULT_LIMITS.dimensions else (0,):
        total = total * number if 0 <= number < _HUGE and total < _HUGE else 0
    return total


# Tensors that are spread over processes.


def _has_flat(own: Mapping[str, object], state_dict: StateDict) -> bool:
    """Whether the weights, or if none are selected any of the file's own, are flat parameters."""
    if state_dict and "flat_param" not in "\n".join(state_dict):  # as of nearly all files
        return False
    weights = [state_dict.items()] if state_dict else [_own_keys(value).items() for value in own.values()]
    named = [(name, value) for values in weights for name, value in values if "flat_param" in name]
    return any(isinstance(v, TensorEntry) and len(v.shape) == 1 and is_flat_name(n) for n, v in named)


class _Spread(NamedTuple):
    """A distributed tensor, as far as a file describes it.

    Attributes:
        is_part: whether the file lacks some of its values.
        how: its placements, or how many of its shards are there.
        rank: whose file it is; ``None``: unknown.
        ranks: of how many; 0: unknown.
    """

    is_part: bool
    how: str
    rank: object
    ranks: int


def _distributed(root: object) -> Part | Literal["whole"] | None:
    found = [spread for node in walk(root) if (spread := _spread(node)) is not None]
    parts = [spread for spread in found if spread.is_part]
    if not parts:
        return WHOLE if found else None
    first = parts[0]
    verb = "is a slice" if len(parts) == 1 else "are slices"
    known = isinstance(first.rank, int) and 0 <= first.rank < first.ranks
    return Part(
        layout="a checkpoint with one file per rank (DTensor, ShardedTensor)",
        piece=f"rank {first.rank} of {first.ranks}" if known else _rank_of(first.ranks),
        lacks=f"{count_of(len(parts), 'tensor')} in it {verb} of the whole",
    )


def _spread(node: object) -> _Spread | None:
    wrapped = wrapped_tensor(node)
    if wrapped is not None:
        name = wrapped.cls.name.rpartition(".")[2]
        if name == "DTensor":
            return _dtensor(wrapped)
        return _sharded(wrapped.state) if name == "ShardedTensor" else None
    if isinstance(node, Object) and node.class_name.endswith(".ShardedTensor"):  # torch 1.10 and 1.11
        return _sharded(node.state)
    return None


def _dtensor(wrapped: Wrapped) -> _Spread:
    inner = members(wrapped.state)
    local, spec = inner.get("_local_tensor"), members(inner.get("_spec"))
    mesh = members(spec.get("mesh"))
    placements = spec.get("placements")
    sizes = mesh_sizes(mesh)
    how = []
    is_partial = False
    for axis, placement in enumerate(placements if isinstance(placements, (list, tuple)) else ()):
        kind = placement.class_name.rpartition(".")[2].lstrip("_") if isinstance(placement, Object) else "?"
        detail = members(placement).get("dim", members(placement).get("reduce_op"))
        of = f" of {sizes[axis]}" if axis < len(sizes) else ""
        how.append((f"{kind}({detail})" if isinstance(detail, (int, str)) else f"{kind:.20}") + of)
        is_partial = is_partial or kind.startswith("Partial")
    is_whole = isinstance(local, TensorEntry) and local.shape == wrapped.shape and not is_partial
    every = mesh.get("_flatten_rank_map")
    ranks = len(every) if isinstance(every, tuple) else _product(sizes)
    return _Spread(not is_whole, ", ".join(how), mesh.get("_rank"), ranks if sizes and _is_count(ranks) else 0)


def mesh_sizes(mesh: InertDict) -> list[int]:
    """How many ranks there are along each dimension of a mesh: in its layout, or (before torch 2.9) its tensor."""
    whole = mesh.get("mesh")
    if isinstance(whole, TensorEntry):
        return list(whole.shape)
    layout = members(mesh.get("_layout"))
    axes = layout.get("axes")
    if not isinstance(axes, (list, tuple)):  # torch 2.9: one layout of all
        return _numbers(layout.get("shape"))
    return [_product(_numbers(members(axis).get("shape"))) for axis in axes[: DEFAULT_LIMITS.dimensions]]


def _numbers(node: object) -> list[int]:
    """The numbers of a layout's shape, which may be one number or several nested ones."""
    found = node if isinstance(node, (list, tuple)) else (node,)
    nested = [_product(part) if (part := shape_of(each)) is not None else each for each in found]
    return [number for number in nested if isinstance(number, int)]


def _sharded(state: object) -> _Spread:
    shards, metadata, *_ = state if isinstance(state, tuple) and len(state) > 1 else ((), None)
    locals_ = [members(shard) for shard in shards] if isinstance(shards, (list, tuple)) else []
    tensors = [tensor for shard in locals_ if isinstance(tensor := shard.get("tensor"), TensorEntry)]
    about = members(metadata)
    size, every = shape_of(about.get("size")), about.get("shards_metadata")
    count = len(every) if isinstance(every, (list, tuple)) else 0
    is_whole = size is not None and sum(tensor.numel for tensor in tensors) == _product(size)
    rank = members(members(locals_[0].get("metadata")).get("placement")).get("_rank") if locals_ else None
    return _Spread(not is_whole, f"{len(tensors)} of {count_of(count, 'shard')}", rank, count)


def spread_text(node: object) -> str:
    """How a tensor is spread over processes: ``"Shard(0) of 2"``, ``"1 of 4 shards"``; empty if it is not."""
    spread = _spread(node)
    return "" if spread is None else spread.how


# The messages, and the gate.


def part_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The warning about a checkpoint that is a part, with what to give instead."""
    part = checkpoint.part
    if part is not None:
        fix: str | None = way_out(part)
        if part.opens and part.instead is not None:
            fix = f"ckptkit inspect {quoted(part.instead)}"
        told = part_text(part)
        if part.remedy:
            told, fix = f"{told}; {part.remedy}", None
        yield Finding(code=CODE, severity="warning", message=told, fix=fix)


def way_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Which member of an archive it is, where the archive was given; and whether some of its files may be missing."""
    codes = ("inside-an-archive", UNPROVEN)
    known = (finding for finding in checkpoint.findings if finding.code in codes)
    yield from (finding for finding in known if finding.code != UNPROVEN or finding.severity == "warning")


def require_whole(checkpoint: Checkpoint, *, allow_part: bool = False) -> None:
    """See that a checkpoint is not part of one, or that a part is what is wanted.

    Raises:
        PartError: it is a part; the message says of what, and what to give instead.
    """
    part, path = checkpoint.part, checkpoint.origin.path
    if part is not None and not allow_part:
        remedy = f"{way_out(part)}; --allow-part takes this part alone"
        raise PartError(f"{CODE}: {part_text(part)}; {remedy}", path=path)


def way_out(part: Part) -> str:
    """What to give instead of a part, or with it."""
    if part.remedy:
        return part.remedy
    if part.instead is None:
        return "get the files that belong to it into its folder"
    if part.opens:
        return f"give {part.instead}"
    return f"the files in {part.instead} belong together, in a layout that ckptkit does not support"


def part_text(part: Part) -> str:
    """The message about a part, and what it lacks."""
    what = f"{part.piece} of {part.layout}" if part.piece else f"a part of {part.layout}"
    return f"{what}, not the whole: {part.lacks}"
