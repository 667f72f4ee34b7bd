"""Where what a rank has lies in the whole: meshes, placements and shapes at random, against torch's own cuts."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from support.repeated import repeated

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.computed import Held
from ckptkit.errors import CorruptError, LimitError, UnsupportedError
from ckptkit.formats.distributed.placements import Distributed, Mesh, Share, distributed, share_of
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.transfer.pieces import Piece, pieced
from ckptkit.transfer.values import stream

try:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard
except ImportError:
    pytest.skip(f"torch {torch.__version__} cuts otherwise; the oracle is of 2.9", allow_module_level=True)

PLACEMENTS = "torch.distributed.tensor.placement_types"


# Nodes as pickles give them.


def made(name: str, module: str = "torch.distributed", **state: object) -> Object:
    node = Object("newobj", Global(module, name), ())
    node.state = InertDict(list(state.items()))
    return node


def placed(placement: Any) -> Object:
    if isinstance(placement, Replicate):
        return made("Replicate", PLACEMENTS)
    if isinstance(placement, _StridedShard):
        return made("_StridedShard", PLACEMENTS, dim=placement.dim, split_factor=int(placement.split_factor))
    return made("Shard", PLACEMENTS, dim=placement.dim)


def entry_of(tensor: torch.Tensor) -> TensorEntry:
    data = bytes(tensor.untyped_storage())
    storage = Storage(key="0", dtype=None, nbytes=len(data), location="cpu", source=Held(data, "memory").whole)
    return TensorEntry(
        storage=storage,
        storage_offset=int(tensor.storage_offset()),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        dtype=str(tensor.dtype).removeprefix("torch."),
    )


def mesh_of(sizes: tuple[int, ...], place: tuple[int, ...] | None, how: str, rank: int = 0) -> Object:
    """A mesh as torch 2.14, 2.9 and those before have it."""
    ranks = tuple(range(math.prod(sizes)))
    if how == "tensor":
        whole = entry_of(torch.arange(len(ranks), dtype=torch.int32).reshape(sizes))
        return made("DeviceMesh", mesh=whole, mesh_dim_names=None, _coordinate_on_dim=place and [*place])
    if how == "tensor without the place":
        return made("DeviceMesh", mesh=entry_of(torch.arange(len(ranks)).reshape(sizes)))
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    if how == "one layout":
        layout = made("_MeshLayout", shape=sizes, stride=tuple(strides))
    else:
        axes = tuple(made("_FlatLayout", shape=(a,), stride=(b,)) for a, b in zip(sizes, strides, strict=True))
        layout = made("_MeshLayout", axes=axes)
    return made(
        "DeviceMesh",
        _layout=layout,
        _flatten_rank_map=ranks,
        _rank=rank,
        _coordinate_on_dim=place,
        _mesh_dim_names=None,
    )


HOWS = ("axes", "one layout", "tensor", "tensor without the place")


def tensor_of(
    mesh: Object, placements: list[Object], whole: torch.Tensor, local: object, **spec: object
) -> Distributed:
    state = InertDict(
        [("_local_tensor", local), ("_spec", made("DTensorSpec", mesh=mesh, placements=tuple(placements), **spec))]
    )
    return Distributed("DTensor", tuple(whole.shape), str(whole.dtype).removeprefix("torch."), state)


# Torch's cuts.


def generated(rng: random.Random) -> tuple[tuple[int, ...], list[Any], torch.Tensor]:
    sizes = tuple(rng.choice((1, 2, 2, 3, 4)) for _ in range(rng.randint(1, 3)))
    shape = tuple(rng.choice((0, 1, 2, 3, 5, 7, 8, 13)) for _ in range(rng.randint(1, 3)))
    placements: list[Any] = []
    for _ in sizes:
        dim = rng.randrange(len(shape))
        choices = [Replicate(), Shard(dim), Shard(dim), _StridedShard(dim, split_factor=rng.choice((1, 2, 3, 4)))]
        placements.append(rng.choice(choices))
    return sizes, placements, torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)


def local_of(
    whole: torch.Tensor, sizes: tuple[int, ...], place: tuple[int, ...], placements: list[Any]
) -> torch.Tensor:
    """What torch gives the rank at a place: one cut after another."""
    for size, at, placement in zip(sizes, place, placements, strict=True):
        if not isinstance(placement, Replicate):
            whole = placement._split_tensor(whole, size, with_padding=False, contiguous=True)[0][at]
    return whole.clone()


@repeated("seeds", range(100), range(100, 250))
def test_all_ranks_together_are_the_whole_whatever_the_mesh_and_the_placements(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        sizes, placements, whole = generated(rng)
        how = rng.choice(HOWS)
        boxes: dict[Any, TensorEntry] = {}
        for rank, place in enumerate(itertools.product(*map(range, sizes))):
            local = local_of(whole, sizes, place, placements)
            shape, first = _compute_local_shape_and_global_offset(tuple(whole.shape), sizes, [*place], placements)
            assert tuple(local.shape) == shape
            if local.dim() > 1 and rng.random() < 0.3:
                local = local.transpose(0, 1).contiguous().transpose(0, 1)
            found = tensor_of(mesh_of(sizes, place, how, rank), [*map(placed, placements)], whole, entry_of(local))
            share = share_of(found, "w", rank, {})
            assert share.rank == (rank if how != "tensor without the place" or share.rank is not None else None)
            assert share.ranks == math.prod(sizes)
            assert share.mesh is not None
            assert share.mesh.place == place
            if local.numel():
                assert min(box[0] for box, _ in share.pieces) == first
            for (offsets, widths), entry in share.pieces:
                part = whole[tuple(slice(a, a + n) for a, n in zip(offsets, widths, strict=True))]
                assert b"".join(stream(entry)) == part.numpy().tobytes()
                boxes.setdefault((offsets, widths), entry)
        entry = pieced("w", tuple(whole.shape), "int32", [Piece(*box, entry) for box, entry in boxes.items()])
        assert b"".join(stream(entry)) == whole.numpy().tobytes(), (seed, sizes, placements, whole.shape)


def test_the_order_of_a_spec_is_that_of_its_cuts() -> None:
    """``shard_order`` says that the last dimension of the mesh was cut first."""
    whole = torch.arange(13 * 2, dtype=torch.int32).reshape(13, 2)
    order = (Object("newobj", Global("x", "ShardOrderEntry"), (0, (1, 0))),)
    for place in itertools.product(range(2), range(3)):
        local = whole.chunk(3)[place[1]].chunk(2)[place[0]].clone()
        mesh = mesh_of((2, 3), place, "axes")
        share = share_of(tensor_of(mesh, [placed(Shard(0))] * 2, whole, entry_of(local), shard_order=order), "w", 0, {})
        (((offsets, sizes), entry),) = share.pieces
        assert torch.equal(whole[offsets[0] : offsets[0] + sizes[0]], local)
        assert entry.shape == sizes


def test_a_rank_outside_of_the_mesh_has_nothing() -> None:
    whole = torch.arange(4, dtype=torch.int32)
    share = share_of(tensor_of(mesh_of((2,), None, "axes"), [placed(Shard(0))], whole, entry_of(whole[:0])), "w", 5, {})
    assert share.pieces == ()
    assert (
        share_of(
            tensor_of(mesh_of((2,), None, HOWS[3]), [placed(Shard(0))], whole, entry_of(whole[:0])), "w", 5, {}
        ).pieces
        == ()
    )


def refused(placement: Object, local: object = None, **changes: Any) -> str:
    whole = torch.arange(6, dtype=torch.int32)
    mesh = changes.pop("mesh", mesh_of((2,), (0,), "axes"))
    found = tensor_of(mesh, changes.pop("placements", [placement]), whole, local or entry_of(whole[:3]))
    with pytest.raises((CorruptError, UnsupportedError, LimitError)) as caught:
        share_of(found, "w", 0, {})
    assert "tensor 'w'" in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value.message}"


def test_what_cannot_be_placed_is_refused() -> None:
    shard = placed(Shard(0))
    assert "UnsupportedError" in refused(made("Partial", PLACEMENTS, reduce_op="sum"))
    assert "Partial(sum)" in refused(made("Partial", PLACEMENTS, reduce_op="sum"))
    assert "_MaskPartial" in refused(made("_MaskPartial", PLACEMENTS))
    assert "is unknown" in refused(made("Somehow", PLACEMENTS))
    assert "has no dimension" in refused(made("Shard", PLACEMENTS, dim="0"))
    assert "has no dimension" in refused(made("_StridedShard", PLACEMENTS, dim=0, split_factor=0))
    assert "along dimension 3 but has 1" in refused(made("Shard", PLACEMENTS, dim=3))
    assert "by its mesh and placements it should be [3]" in refused(shard, entry_of(torch.zeros(4, dtype=torch.int32)))
    assert "not a plain tensor" in refused(shard, made("AsyncCollectiveTensor"))
    assert "not have one placement for each dimension" in refused(shard, placements=[])
    assert "has no place" in refused(shard, mesh=mesh_of((2,), (2,), "axes"))
    assert "has no place" in refused(shard, mesh=mesh_of((2,), (0, 0), "axes"))
    assert "has no place" in refused(shard, mesh=mesh_of((0,), (0,), "one layout"))
    assert "its mesh is float32" in refused(shard, mesh=made("DeviceMesh", mesh=entry_of(torch.zeros(2))))
    assert "ranks" in refused(shard, mesh=mesh_of((1 << 19, 4), (0, 0), "axes"), placements=[shard, shard])


def test_a_tensor_that_cannot_be_is_refused() -> None:
    local, mesh = entry_of(torch.zeros(0, dtype=torch.int32)), mesh_of((2,), None, "axes")
    for shape, dtype in (((0,), "int33"), ((-1,), "int32"), ((0,) * 1000, "int32")):
        state = tensor_of(mesh, [placed(Shard(0))], torch.zeros(0, dtype=torch.int32), local).state
        with pytest.raises(CorruptError, match="tensor 'w': there is no"):
            share_of(Distributed("DTensor", shape, dtype, state), "w", 0, {})


def test_a_split_factor_without_end_is_refused() -> None:
    whole = torch.zeros(1).expand(1 << 20)
    strided = made("_StridedShard", PLACEMENTS, dim=0, split_factor=1 << 19)
    found = tensor_of(mesh_of((2,), (0,), "axes"), [strided], whole, entry_of(torch.zeros(1).expand(1 << 19)))
    with pytest.raises(LimitError, match="strided"):
        share_of(found, "w", 0, {})


def test_meshes_are_looked_at_once() -> None:
    whole = torch.arange(6, dtype=torch.int32)
    known: dict[int, Mesh] = {}
    mesh = mesh_of((2,), (1,), "tensor", 1)
    shares = [
        share_of(tensor_of(mesh, [placed(Shard(0))], whole, entry_of(whole[3:].clone())), name, 1, known)
        for name in "ab"
    ]
    assert len(known) == 1
    assert {share.rank for share in shares} == {1}


# ShardedTensor.


def shard_metadata(offsets: list[int], sizes: list[int], rank: object) -> Object:
    return made("ShardMetadata", shard_offsets=offsets, shard_sizes=sizes, placement=made("_remote_device", _rank=rank))


def sharded(local: object, own: Object, every: list[Object], rank: int = 0) -> Share:
    shards = [made("Shard", tensor=local, metadata=own)]
    about = made("ShardedTensorMetadata", shards_metadata=every, size=(6,))
    group = made("ProcessGroupState", global_rank=rank, global_world_size=2)
    found = Distributed("ShardedTensor", (6,), "int32", (shards, about, group, None, False))
    return share_of(found, "w", 0, {})


def test_a_sharded_tensor_lists_the_shards_of_all_ranks() -> None:
    local = entry_of(torch.arange(3, dtype=torch.int32))
    every = [shard_metadata([0], [3], 0), shard_metadata([3], [3], 1)]
    share = sharded(local, every[0], every)
    assert [box for box, _ in share.pieces] == [((0,), (3,))]
    assert share.every == {((0,), (3,)): 0, ((3,), (3,)): 1}
    assert (share.rank, share.ranks) == (0, 2)
    for own, text in ((shard_metadata([1], [3], 0), "not one of those"), (made("ShardMetadata"), "no offsets")):
        with pytest.raises(CorruptError, match=text):
            sharded(local, own, every)
    with pytest.raises(UnsupportedError, match="not a plain tensor"):
        sharded(None, every[0], every)
    with pytest.raises(CorruptError, match="without a size"):
        share_of(Distributed("ShardedTensor", None, None, None), "w", 0, {})


def test_what_is_no_distributed_tensor_is_none() -> None:
    assert distributed(made("Shard")) is None
    assert distributed({}) is None
    assert distributed(None) is None
