"""Which part of a tensor one rank has: of a DTensor by mesh and placements, of a ShardedTensor by its shards.

Facts (torch 2.14 ``torch/distributed/tensor/_utils.py``, ``placement_types.py``; each checked against torch in the
tests):

- a *DTensor* (``_local_tensor``, ``_spec``) is cut once for each dimension of its mesh, from left to right, or in the
  ``shard_order`` of its spec: by ``Shard(dim)`` as ``torch.chunk`` cuts, in pieces of ⌈n/k⌉ of which the last are
  short or empty; by ``_StridedShard(dim, split_factor=f)`` into f pieces first, each of which is cut, and the rank has
  its part of every one, joined.  ``Replicate`` cuts nothing.  ``Partial`` is a sum that was not made yet, and refused
- a *DeviceMesh* says the place of the rank that saved it (``_coordinate_on_dim``, ``None``: it is not of the mesh),
  and which rank that is: ``_rank`` (torch 2.9 and later), or its tensor ``mesh`` at that place
- a *ShardedTensor* lists the shards of all ranks in its metadata, each with offsets, sizes and rank
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.parts import members, mesh_sizes
from ckptkit.normalize.sections import brief
from ckptkit.pickling.inert import Object
from ckptkit.pickling.tensors import shape_of, wrapped_tensor

__all__ = ["Distributed", "Mesh", "Share", "boxes_of", "distributed", "fills_mesh", "share_of"]

_MOST_BOXES = 1 << 16
"""Boxes that one rank has of a tensor: a `_StridedShard` makes as many as its split factor."""

_MOST_RANKS = 1 << 20
"""Ranks of a mesh; numbers of them are read where nothing else says a rank's own."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets in the whole and sizes, in elements."""


class Distributed(NamedTuple):
    """A rank's part of a tensor, as the pickle makes it.

    Attributes:
        kind: ``"DTensor"`` or ``"ShardedTensor"``.
        shape, dtype: of the whole; ``None``: its own metadata say it.
        state: inert node of what the class keeps.
        requires_grad, is_parameter: as in `TensorEntry`, if a parameter was made from it.
    """

    kind: str
    shape: tuple[int, ...] | None
    dtype: str | None
    state: object
    requires_grad: bool = False
    is_parameter: bool = False


class Mesh(NamedTuple):
    """The mesh of a DTensor as the rank that saved it sees it.

    Attributes:
        sizes, names: of its dimensions; no names: it has none.
        place: of the rank, a number for each dimension; ``None``: it is not of this mesh.
        rank: its number; ``None``: unknown.
        ranks: how many there are, as far as is known: one more than the greatest number used; 0: unknown.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    place: tuple[int, ...] | None
    rank: int | None
    ranks: int


class Share(NamedTuple):
    """The part of a tensor in a rank's file.

    Attributes:
        shape, dtype: of the whole.
        pieces: the boxes of it, each with the tensor that it is.
        rank: the rank it names as its own; ``None``: none.
        ranks: of how many; 0: unknown.
        every: for a ShardedTensor, all boxes and the rank of each.
        mesh: of a DTensor.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[Box, TensorEntry], ...]
    rank: int | None
    ranks: int
    every: dict[Box, int | None] | None = None
    mesh: Mesh | None = None


def distributed(node: object) -> Distributed | None:
    """The distributed tensor in a node, or in a parameter; ``None``: it is something else."""
    if not isinstance(node, Object):
        return None
    if node.class_name == "torch._utils._rebuild_parameter" and len(node.args) == 3:
        inner = distributed(node.args[0])
        return inner and inner._replace(requires_grad=node.args[1] is True, is_parameter=True)
    wrapped = wrapped_tensor(node)
    if wrapped is not None:
        kind = wrapped.cls.name.rpartition(".")[2]
        needs_grad = _last_flag(node)
        return Distributed(kind, wrapped.shape, wrapped.dtype, wrapped.state, needs_grad) if kind in _KINDS else None
    if node.class_name.endswith(".ShardedTensor"):  # torch 1.10 and 1.11
        return Distributed("ShardedTensor", None, None, node.state)
    return None


_KINDS = ("DTensor", "ShardedTensor")


def _last_flag(node: Object) -> bool:
    """Whether it needs a gradient: the last of what ``_rebuild_wrapper_subclass`` is given."""
    inner = node.args[2]
    return isinstance(inner, tuple) and len(inner) > 7 and inner[7] is True


def share_of(found: Distributed, name: str, rank: int, known: dict[int, Mesh]) -> Share:
    """The part of a distributed tensor in a rank's file.

    Args:
        found: the tensor in its file.
        name: of it, for messages.
        rank: whose file it is, which meshes of old torch do not say.
        known: the meshes of this file that were read, by the id of their node.

    Raises:
        UnsupportedError: it is a sum that was not made yet, or its own part is not a plain tensor.
        CorruptError: its parts do not fit together.
    """
    try:
        share = _dtensor(found, rank, known) if found.kind == "DTensor" else _sharded(found)
        if share.dtype not in DTYPES or min(share.shape, default=0) < 0 or len(share.shape) > DEFAULT_LIMITS.dimensions:
            raise CorruptError(f"there is no {share.dtype:.40} tensor of shape {brief(share.shape)}")
        return share
    except FormatError as error:
        error.message = f"tensor {name!r:.200}: {error.message}"
        raise


def fills_mesh(shares: Sequence[Share]) -> bool:
    """Whether these are all places of one mesh, each once: ranks in other places have nothing of the tensor."""
    meshes = [share.mesh for share in shares if share.mesh is not None and share.mesh.place is not None]
    sizes = {mesh.sizes for mesh in meshes}
    places = {mesh.place for mesh in meshes}
    return len(sizes) == 1 and len(places) == len(shares) == math.prod(sizes.pop())


# DTensor.


def _dtensor(found: Distributed, rank: int, known: dict[int, Mesh]) -> Share:
    inner = members(found.state)
    local, spec = inner.get("_local_tensor"), members(inner.get("_spec"))
    node = spec.get("mesh")
    mesh = known.get(id(node))
    if mesh is None:
        mesh = known[id(node)] = _mesh(node, rank)
    cuts = _cuts(spec, mesh)
    if not isinstance(local, TensorEntry):
        raise UnsupportedError("a rank's part of it is not a plain tensor")
    if found.shape is None or found.dtype is None:
        raise CorruptError("it has no shape")
    if mesh.place is None:
        return Share(found.shape, found.dtype, (), mesh.rank, mesh.ranks, mesh=mesh)
    runs = _runs(found.shape, cuts, mesh)
    pieces = boxes_of(runs, local)
    return Share(found.shape, found.dtype, pieces, mesh.rank, mesh.ranks, mesh=mesh)


def _mesh(node: object, rank: int) -> Mesh:
    """The mesh, and the place in it of the rank that saved it.

    Raises:
        CorruptError: it is not one, or has no such place.
    """
    said = members(node)
    sizes = tuple(mesh_sizes(said))
    names = said.get("_mesh_dim_names", said.get("mesh_dim_names"))
    shown = names if isinstance(names, (list, tuple)) and len(names) == len(sizes) else ()
    numbers = said.get("_flatten_rank_map")
    whole = said.get("mesh")
    own = said.get("_rank")
    if isinstance(whole, TensorEntry) and not isinstance(numbers, tuple):
        numbers = _numbers(whole)
    ranks = [number for number in numbers if isinstance(number, int)] if isinstance(numbers, tuple) else []
    place = said.get("_coordinate_on_dim", ...)
    if place is ...:
        at = ranks.index(rank) if rank in ranks and len(ranks) == math.prod(sizes) else -1
        place = None if at < 0 else tuple(at // math.prod(sizes[dim + 1 :]) % size for dim, size in enumerate(sizes))
    if place is not None and not _is_place(place, sizes):
        raise CorruptError(f"its mesh of sizes {[*sizes]} has no place {brief(place)}")
    if not isinstance(own, int):
        own = None
        if isinstance(place, (list, tuple)) and isinstance(whole, TensorEntry) and len(ranks) == math.prod(sizes):
            own = ranks[sum(at * math.prod(sizes[dim + 1 :]) for dim, at in enumerate(place))]
    count = max(ranks, default=math.prod(sizes) - 1) + 1
    if not 0 < count <= _MOST_RANKS:
        raise CorruptError(f"its mesh has {count:.0f} ranks")
    return Mesh(sizes, tuple(map(str, shown)), None if place is None else tuple(place), own, count)  # type: ignore[arg-type]


def _is_place(place: object, sizes: Sequence[int]) -> bool:
    if not isinstance(place, (list, tuple)) or len(place) != len(sizes):
        return False
    return all(isinstance(at, int) and 0 <= at < size for at, size in zip(place, sizes, strict=True))


def _numbers(entry: TensorEntry) -> tuple[int, ...]:
    """The values of a mesh's tensor.

    Raises:
        CorruptError: they are not ranks.
    """
    from ckptkit.transfer.values import stream

    if entry.dtype not in ("int32", "int64") or entry.numel > _MOST_RANKS:
        raise CorruptError(f"its mesh is {entry.dtype} {[*entry.shape]}")
    data = b"".join(stream(entry))
    width = entry.itemsize
    return tuple(int.from_bytes(data[at : at + width], "little", signed=True) for at in range(0, len(data), width))


class _Cut(NamedTuple):
    """A dimension of a tensor that one of a mesh cuts; ``factor`` as of a `_StridedShard`, else 1."""

    axis: int
    dim: int
    factor: int


def _cuts(spec: object, mesh: Mesh) -> list[_Cut]:
    """The dimensions that the placements split, in order.

    Raises:
        UnsupportedError: one is a sum that was not made yet, or is not known.
        CorruptError: they are not those of the mesh.
    """
    placements = members(spec).get("placements")
    if not isinstance(placements, (list, tuple)) or len(placements) != len(mesh.sizes):
        raise CorruptError(f"it does not have one placement for each dimension of its mesh of sizes {[*mesh.sizes]}")
    cuts: list[_Cut] = []
    for axis, placement in enumerate(placements):
        kind = placement.class_name.rpartition(".")[2] if isinstance(placement, Object) else "?"
        if "Partial" in kind:
            how = members(placement).get("reduce_op")
            told = f"({how:.20})" if isinstance(how, str) else ""
            raise UnsupportedError(
                f"{kind}{told}: each rank has a part of a sum that was never computed; save it after redistribute()"
            )
        if kind == "Replicate":
            continue
        dim, factor = members(placement).get("dim"), members(placement).get("split_factor", 1)
        if kind not in ("Shard", "_StridedShard"):
            raise UnsupportedError(f"its placement {kind:.80} is unknown")
        if not isinstance(dim, int) or not isinstance(factor, int) or factor < 1:
            raise CorruptError(f"its placement {kind} has no dimension")
        cuts.append(_Cut(axis, dim, factor if kind == "_StridedShard" else 1))
    order = _order(members(spec).get("shard_order"))
    return sorted(cuts, key=lambda cut: order.get((cut.dim, cut.axis), cut.axis))


def _order(node: object) -> dict[tuple[int, int], int]:
    """Of each dimension and each of the mesh that cuts it, when it does: as ``ShardOrderEntry(dim, mesh_dims)`` say."""
    found: dict[tuple[int, int], int] = {}
    for entry in node if isinstance(node, (list, tuple)) else ():
        args = entry.args if isinstance(entry, Object) else entry
        if isinstance(args, tuple) and len(args) == 2 and isinstance(args[0], int) and isinstance(args[1], tuple):
            found.update({(args[0], axis): when for when, axis in enumerate(args[1]) if isinstance(axis, int)})
    return found


Runs = list[tuple[int, int]]
"""Indexes along a dimension, as runs: the first of each, and how many."""


def _runs(shape: tuple[int, ...], cuts: Sequence[_Cut], mesh: Mesh) -> list[Runs]:
    """The indexes of a rank along each dimension, in the order of its own tensor."""
    runs: list[Runs] = [[(0, size)] for size in shape]
    for axis, dim, factor in cuts:
        dim = dim + len(shape) if dim < 0 else dim
        if not 0 <= dim < len(shape):
            raise CorruptError(f"it is split along dimension {dim} but has {len(shape)}")
        count, place = mesh.sizes[axis], (mesh.place or ())[axis]
        total = sum(size for _, size in runs[dim])
        if min(factor, total) > _MOST_BOXES:
            raise LimitError("pieces of a strided dimension", limit=_MOST_BOXES, actual=factor)
        own: Runs = []
        for each in range(min(factor, max(total, 1))):
            own += _chunk(_chunk(runs[dim], factor, each), count, place)
        runs[dim] = _joined(own)
    return runs


def _chunk(runs: Runs, count: int, number: int) -> Runs:
    """The part of that number where ``torch.chunk`` makes ``count``; those that it does not make are empty."""
    total = sum(size for _, size in runs)
    each = -(-total // count)
    begin, end = min(each * number, total), min(each * (number + 1), total)
    found, at = [], 0
    for first, size in runs:
        low, high = max(begin - at, 0), min(end - at, size)
        if low < high:
            found.append((first + low, high - low))
        at += size
    return found


def _joined(runs: Runs) -> Runs:
    """The same with those made one that follow each other."""
    found: Runs = []
    for first, size in runs:
        if found and sum(found[-1]) == first:
            found[-1] = found[-1][0], found[-1][1] + size
        else:
            found.append((first, size))
    return found


def boxes_of(runs: Sequence[Runs], local: TensorEntry) -> tuple[tuple[Box, TensorEntry], ...]:
    """The boxes that runs along each dimension make, each with its part of the rank's own tensor; no empty ones.

    Raises:
        CorruptError: the tensor is not of the size that they make.
        LimitError: they are too many.
    """
    sizes = tuple(sum(size for _, size in each) for each in runs)
    if 0 in sizes and not local.numel:
        return ()
    if local.shape != sizes:
        raise CorruptError(
            f"a rank's part of it is {[*local.shape]}; by its mesh and placements it should be {[*sizes]}"
        )
    if (count := math.prod(map(len, runs))) > _MOST_BOXES:
        raise LimitError("boxes of it on one rank", limit=_MOST_BOXES, actual=count)
    found = []
    begins = [list(itertools.accumulate((size for _, size in each), initial=0)) for each in runs]
    for index in itertools.product(*map(range, map(len, runs))):
        box = (
            tuple(runs[dim][at][0] for dim, at in enumerate(index)),
            tuple(runs[d][at][1] for d, at in enumerate(index)),
        )
        offset = sum(begins[dim][at] * local.stride[dim] for dim, at in enumerate(index))
        found.append((box, replace(local, storage_offset=local.storage_offset + offset, shape=box[1])))
    return tuple(found)


# ShardedTensor.


def _sharded(found: Distributed) -> Share:
    state = found.state if isinstance(found.state, tuple) and len(found.state) > 1 else ((), None)
    shards, about = state[0], members(state[1])
    shape = found.shape if found.shape is not None else shape_of(about.get("size"))
    if shape is None or not isinstance(shards, (list, tuple)):
        raise CorruptError("it is a ShardedTensor without a size or shards")
    listed = about.get("shards_metadata")
    every = dict(map(_placed, listed)) if isinstance(listed, (list, tuple)) else {}
    pieces, dtype, whose = [], found.dtype, None
    for shard in map(members, shards):
        local = shard.get("tensor")
        box, whose = _placed(shard.get("metadata"))
        if not isinstance(local, TensorEntry):
            raise UnsupportedError("a rank's part of it is not a plain tensor")
        if box not in every:
            raise CorruptError(f"the shard at {[*box[0]]} of sizes {[*box[1]]} is not one of those that it lists")
        dtype = dtype or local.dtype
        pieces.append((box, local))
    group = members(state[2]) if len(state) > 2 else members(None)
    own, ranks = group.get("global_rank", whose), group.get("global_world_size", 0)
    return Share(
        shape,
        dtype or "float32",
        tuple(pieces),
        own if isinstance(own, int) else None,
        ranks if isinstance(ranks, int) and 0 < ranks <= _MOST_RANKS else 0,
        every=every,
    )


def _placed(node: object) -> tuple[Box, int | None]:
    """The box of a shard and whose it is, by its metadata.

    Raises:
        CorruptError: they do not say it.
    """
    said = members(node)
    offsets, sizes = shape_of(said.get("shard_offsets")), shape_of(said.get("shard_sizes"))
    if offsets is None or sizes is None:
        raise CorruptError("a shard has no offsets or sizes")
    rank = members(said.get("placement")).get("_rank")
    return (offsets, sizes), rank if isinstance(rank, int) else None
