"""Writes the checkpoints of trainings on several processes, as torch writes them: ``python -m support.ranks FOLDER``.

Each case is a function that every rank of a gloo group calls, with the folder to write into; it returns what one
process would have saved: the whole state, from values that are known before anything is sharded. Seeds are names, and
moments are computed from the weights element by element, so that a shard of them is the shard of the whole.

FOLDER/CASE/ckpt is the checkpoint, FOLDER/CASE/expected.pt its state, written by torch.save. `support.sharded` runs
this program and has the cases by name. The ranks are forks of one process that has imported torch: two, then four.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distribute

Tree = dict[str, Any]
Case = Callable[[Path, int], Tree]
CASES: dict[int, list[Case]] = {2: [], 4: []}


def case(*worlds: int) -> Callable[[Case], Case]:
    """A case that is written by so many processes; the name of the folder says so where there are two of them."""

    def add(function: Case) -> Case:
        for world in worlds:
            CASES[world].append(function)
        return function

    return add


# -- models, and their state -----------------------------------------------------------------------------------------


def drawn(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that the name alone decides."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)


class Net(nn.Module):
    """Rows that 2 and 4 do not divide, fewer rows than ranks, a convolution, buffers of several kinds."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(6, 3, 3, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.tiny = nn.Linear(6, 1)
        self.head = nn.Linear(6, 13, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        self.register_buffer("mask", drawn("mask", 5, dtype=torch.bool))
        for name, value in self.state_dict().items():
            if value.is_floating_point():
                value.copy_(drawn(name, *value.shape))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of two groups whose state is as after three steps, computed from the weights."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if "bias" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if "bias" in name], "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]
    optimizer = torch.optim.AdamW([{**group, "lr": 0.0} for group in groups])
    for parameter in named.values():  # a step on DTensors would take most of this program's time
        weights, state = parameter.detach(), {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        local(state["exp_avg"]).copy_(local(weights) * 2 + 1)
        local(state["exp_avg_sq"]).copy_(local(weights) ** 2)
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **state}
    return optimizer


def distribute_tensor(value: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that all ranks have, of which each keeps its part: nothing is sent."""
    return distribute(value, mesh, placements, src_data_rank=None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def training(model: nn.Module, **options: Any) -> Tree:
    """Model and optimizer by their names, whatever shards them."""
    chosen = StateDictOptions(**options)
    optimizer = adam(model)
    return {
        "model": get_model_state_dict(model, options=chosen),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=chosen),
    }


def sharded_net(mesh: DeviceMesh | None = None, net: nn.Module | None = None) -> Any:
    net = net or Net()
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def in_two_dimensions() -> nn.Module:
    """Tensor parallelism over rows and columns, and FSDP over that: where both take rows, `_StridedShard`."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = Net()
    placed = {"emb": Shard(0), "blocks.0.up": Shard(0), "blocks.1.up": Shard(0), "head": Shard(0),
              "blocks.0.down": Shard(1), "blocks.1.down": Shard(1)}  # fmt: skip
    for path, placement in placed.items():
        module = net.get_submodule(path)
        for name, parameter in [*module.named_parameters()]:
            where = [placement if name == "weight" or placement.dim == 0 else Replicate()]
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh["tp"], where)))
    return sharded_net(mesh["dp"], net)


def as_dcp_gives(tree: Any) -> Any:
    """What DCP makes of a tree that it flattens: keys are strings, empty dicts are gone, and whole objects stay."""
    if isinstance(tree, Mapping):
        pairs = ((str(key), as_dcp_gives(value)) for key, value in tree.items())
        return {key: value for key, value in pairs if value != {}} if tree else {}
    if isinstance(tree, list):
        return [as_dcp_gives(value) for value in tree]
    return tree


def save(tree: Tree, folder: Path, writer: Any = None, **options: Any) -> None:
    dcp.save(tree, storage_writer=writer or dcp.FileSystemWriter(folder, sync_files=False), **options)


# -- torch.distributed.checkpoint ------------------------------------------------------------------------------------


@case(2, 4)
def fsdp2(folder: Path, rank: int) -> Tree:
    save(training(sharded_net()), folder)
    return training(Net())


@case(2)
def fsdp2_flat_optimizer(folder: Path, rank: int) -> Tree:
    """The optimizer's state by flat names, in its section `optimizer`."""
    save(training(sharded_net(), flatten_optimizer_state_dict=True), folder)
    return training(Net(), flatten_optimizer_state_dict=True)


@case(2)
def tied(folder: Path, rank: int) -> Tree:
    save({"model": sharded_net(net=Net(tied=True)).state_dict()}, folder)
    return {"model": Net(tied=True).state_dict()}


@case(4)
def hsdp(folder: Path, rank: int) -> Tree:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    save({"app": training(sharded_net(mesh))}, folder)
    return {"app": training(Net())}


@case(4)
def tp_fsdp(folder: Path, rank: int) -> Tree:
    save(training(in_two_dimensions()), folder)
    return training(Net())


@case(2)
def weights_alone(folder: Path, rank: int) -> Tree:
    """A state_dict at the top, in bfloat16."""
    save(sharded_net(net=Net().bfloat16()).state_dict(), folder)
    return Net().bfloat16().state_dict()


@case(2)
def int_keys(folder: Path, rank: int) -> Tree:
    """An optimizer's state as it gives it itself: parameters by number."""
    net = sharded_net()
    save({"model": net.state_dict(), "optim": adam(net).state_dict()}, folder)
    whole = Net()
    return as_dcp_gives({"model": whole.state_dict(), "optim": adam(whole).state_dict()})


def mixed_tree(sharded: bool) -> Tree:
    """Tensors of all kinds, and everything that is none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None

    def spread(value: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return distribute_tensor(value, mesh, [Shard(dim)]) if mesh else value

    def replicated(value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, mesh, [Replicate()]) if mesh else value

    kinds = ("bfloat16", "float16", "float64", "int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn")
    return {
        "step": 7,
        "name": "run é",
        "rate": 0.5,
        "nothing": None,
        "yes": True,
        "big": 2**70,
        "numbers": [1, 2.5, "three"],
        "none at all": [],
        "empty": {},
        "of empty": {"inner": {}},
        "pair": (1, drawn("pair", 3)),
        "bytes": b"\0\1",
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor(9),
        "list": [drawn("list.0", 2), 5, {"deep": drawn("deep", 3), "text": "t"}, [drawn("inner", 1)]],
        "ints": {0: drawn("ints.0", 2), 10: {"lr": 0.1}},
        "dots": {"a.b": drawn("a.b", 1), "a": {"c": drawn("a.c", 1)}},
        "kinds": {kind: drawn(kind, 7, 3, dtype=getattr(torch, kind)) for kind in kinds},
        "sharded kinds": {kind: spread(drawn(kind, 7, 3, dtype=getattr(torch, kind))) for kind in kinds[:-1]},
        "strides": {
            "transposed": drawn("transposed", 6, 4).t(),
            "expanded": drawn("expanded", 1, 4).expand(3, 4),
            "sliced": drawn("sliced", 9, 9)[2:5, 1:8:2],
            "channels_last": drawn("channels_last", 2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        },
        "shapes": {
            f"{'x'.join(map(str, shape))} by {dim}": spread(drawn(f"{shape}{dim}", *shape), dim)
            for shape in ((7, 3), (1, 4), (0, 4), (2, 5, 3), (9,))
            for dim in range(len(shape))
        },
        "replicated": replicated(drawn("replicated", 4, 4)),
    }


@case(2, 4)
def mixed(folder: Path, rank: int) -> Tree:
    save(mixed_tree(sharded=True), folder)
    return as_dcp_gives(mixed_tree(sharded=False))


@case(2)
def no_flatten(folder: Path, rank: int) -> Tree:
    """Only what stands at the top is a tensor by name: all else is one object an entry, and tensors lie in it."""
    tree: Tree = {key: value for key, value in mixed_tree(sharded=False).items() if key != "strides"}
    top = {"model": {"weight": drawn("w", 3, 2)}, "optimizer": adam(Net()).state_dict(), **tree}
    mesh = init_device_mesh("cpu", (2,))
    sharded = {"top.weight": distribute_tensor(drawn("top", 5, 3), mesh, [Shard(0)])}
    save({**top, **sharded}, folder, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    return {**top, "top.weight": drawn("top", 5, 3)}


@case(2)
def file_per_item(folder: Path, rank: int) -> Tree:
    save(training(sharded_net()), folder, dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False))
    return training(Net())


@case(2)
def threads(folder: Path, rank: int) -> Tree:
    save(training(sharded_net()), folder, dcp.FileSystemWriter(folder, thread_count=3, sync_files=False))
    return training(Net())


@case(2)
def zstd(folder: Path, rank: int) -> Tree:
    writer = dcp.FileSystemWriter(folder, sync_files=False, _extensions=[ZStandard()])
    save({**training(sharded_net()), "note": "n" * 5000}, folder, writer)
    return {**training(Net()), "note": "n" * 5000}


@case(2)
def saved_async(folder: Path, rank: int) -> Tree:
    dcp.async_save(training(sharded_net()), storage_writer=dcp.FileSystemWriter(folder, sync_files=False)).result()
    return training(Net())


@case(2)
def no_collectives(folder: Path, rank: int) -> Tree:
    """A `.metadata` of each rank, which knows the shards of that rank alone."""
    save(training(sharded_net()), folder, use_collectives=False)
    return training(Net())


@case(4)
def meshes(folder: Path, rank: int) -> Tree:
    """Every pair of placements on a mesh of 2 x 2, over shapes that divide and that do not."""
    save(placed(sharded=True), folder)
    return placed(sharded=False)


def placed(sharded: bool) -> Tree:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) if sharded else None
    tree: Tree = {}
    for shape in ((5, 7), (8, 4, 2), (3, 1), (2, 0), (6, 5, 3)):
        dims = [*(Shard(dim) for dim in range(len(shape))), Replicate()]
        for pair in product(dims, repeat=2):
            letters = "".join(f"s{p.dim}" if isinstance(p, Shard) else "r" for p in pair)
            name = f"{'x'.join(map(str, shape))}.{letters}"
            value = drawn(name, *shape)
            tree[name] = distribute_tensor(value, mesh, pair) if mesh else value
    return tree


# -- the hub's sharded safetensors -----------------------------------------------------------------------------------


@case(2, 4)
def hf_sharded(folder: Path, rank: int) -> Tree:
    state = sharded_net().state_dict()
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    return Net().state_dict()


@case(2)
def hf_several_files(folder: Path, rank: int) -> Tree:
    """Two files a rank, by an index of names."""
    state = sharded_net().state_dict()
    files = {name: 1 + ("blocks" in name) for name in state}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    dcp.save(state, storage_writer=writer)
    return Net().state_dict()


@case(2)
def hf_consolidated(folder: Path, rank: int) -> Tree:
    """The shards in `sharded`, and beside them the whole; floats alone, since torch consolidates nothing else well."""

    def floats(net: nn.Module) -> Tree:
        return {name: value for name, value in net.state_dict().items() if value.is_floating_point() and value.ndim}

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    dcp.save(floats(sharded_net()), storage_writer=writer)
    return floats(Net())


# -- a file of each rank ---------------------------------------------------------------------------------------------


def saved_by_rank(folder: Path, rank: int, model: Tree, optimizer: Tree | None = None) -> None:
    """As verl and its like do it."""
    world = dist.get_world_size()
    torch.save(model, folder / f"model_world_size_{world}_rank_{rank}.pt")
    if optimizer is not None:
        torch.save(optimizer, folder / f"optim_world_size_{world}_rank_{rank}.pt")
        extra = {"lr_scheduler": {"last_epoch": 3}, "rng": {"cpu": torch.get_rng_state()[:8] + rank}}
        torch.save(extra, folder / f"extra_state_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))


@case(2, 4)
def dtensor_files(folder: Path, rank: int) -> Tree:
    net, whole = sharded_net(), Net()
    saved_by_rank(folder, rank, net.state_dict(), adam(net).state_dict())
    return {"model": whole.state_dict(), "optimizer": adam(whole).state_dict()}


@case(4)
def dtensor_files_hsdp(folder: Path, rank: int) -> Tree:
    net = sharded_net(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    saved_by_rank(folder, rank, net.state_dict())
    return {"model": Net().state_dict()}


@case(4)
def dtensor_files_tp_fsdp(folder: Path, rank: int) -> Tree:
    net, whole = in_two_dimensions(), Net()
    saved_by_rank(folder, rank, net.state_dict(), adam(net).state_dict())
    return {"model": whole.state_dict(), "optimizer": adam(whole).state_dict()}


@case(4)
def dtensor_files_meshes(folder: Path, rank: int) -> Tree:
    saved_by_rank(folder, rank, {**placed(sharded=True), "plain": drawn("plain", 3)})
    return {"model": {**placed(sharded=False), "plain": drawn("plain", 3)}}


@case(4)
def dtensor_files_stages(folder: Path, rank: int) -> Tree:
    """Two stages of a pipeline, each sharded over its own ranks, which have the files of its layers alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    net = sharded_net(mesh["dp"])
    mine = {name: value for name, value in net.state_dict().items() if isinstance(value, DTensor)}
    whole = {name: value for name, value in Net().state_dict().items() if name in mine}
    names = [*mine]
    first, stage = len(names) // 2, mesh["pp"].get_local_rank()
    state = OrderedDict((name, mine[name]) for name in (names[first:] if stage else names[:first]))
    state._metadata = OrderedDict({"": {"version": 1}, **{name: {"version": 1} for name in state}})  # type: ignore[attr-defined]
    saved_by_rank(folder, rank, {"module": state, "step": 3})
    return {"model": {"module": whole, "step": 3}}


@case(2)
def dtensor_files_partial(folder: Path, rank: int) -> Tree:
    """Sums that were not made yet: to be refused."""
    mesh = init_device_mesh("cpu", (2,))
    tree = {"good": drawn("good", 3), "sum": DTensor.from_local(drawn("sum", 3), mesh, [Partial()], run_check=False)}
    saved_by_rank(folder, rank, tree)
    return {}


@case(2)
def dtensor_files_unlike(folder: Path, rank: int) -> Tree:
    """A buffer that differs between the ranks: to be refused."""
    net = sharded_net()
    net.norm.running_mean += rank
    saved_by_rank(folder, rank, net.state_dict())
    return {}


@contextmanager
def fsdp1(kind: StateDictType, *, use_orig_params: bool) -> Iterator[tuple[nn.Module, nn.Module]]:
    """FSDP's first version around a net and each block of it, and the net by itself."""
    net = FullyShardedDataParallel(
        Net(),
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=use_orig_params,
    )
    with FullyShardedDataParallel.state_dict_type(net, kind):
        yield net, Net()


@case(2, 4)
def sharded_tensor_files(folder: Path, rank: int) -> Tree:
    with fsdp1(StateDictType.SHARDED_STATE_DICT, use_orig_params=True) as (net, whole):
        state = net.state_dict()
        assert any(isinstance(value, ShardedTensor) for value in state.values())
        saved_by_rank(folder, rank, state)
        return {"model": whole.state_dict()}


@case(2)
def sharded_tensor_dcp(folder: Path, rank: int) -> Tree:
    with fsdp1(StateDictType.SHARDED_STATE_DICT, use_orig_params=False) as (net, whole):
        save({"model": net.state_dict()}, folder)
        return {"model": whole.state_dict()}


def flat_files(folder: Path, rank: int, *, use_orig_params: bool) -> Tree:
    with fsdp1(StateDictType.LOCAL_STATE_DICT, use_orig_params=use_orig_params) as (net, whole):
        torch.save({"model": net.state_dict(), "iteration": 3}, folder / f"model_final.rank_{rank}.pth")
        return {"model": whole.state_dict(), "iteration": 3}


@case(2)
def flat_params(folder: Path, rank: int) -> Tree:
    """Flat parameters: their names and shapes are those of a reference, the expected state among them."""
    return flat_files(folder, rank, use_orig_params=False)


@case(2)
def flat_params_padded(folder: Path, rank: int) -> Tree:
    """The same with each parameter at a multiple of 16 bytes."""
    return flat_files(folder, rank, use_orig_params=True)


# -- processes -------------------------------------------------------------------------------------------------------


def name_of(function: Case, world: int) -> str:
    """The case, and how many wrote it where there are several of it."""
    several = sum(function in cases for cases in CASES.values()) > 1
    return f"{function.__name__}_{world}" if several else function.__name__


def as_rank(root: Path, rank: int, world: int) -> None:
    store = dist.FileStore(str(root / f"store_{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for function in CASES[world]:
        folder = root / name_of(function, world) / "ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        expected = function(folder, rank)
        if rank == 0:
            torch.save(expected, folder.parent / "expected.pt")
    dist.barrier()


def main(root: Path) -> int:
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    adam(Net())  # imports torch._dynamo, once for all ranks
    gc.collect()
    gc.freeze()
    gc.disable()  # in each of them it would go through all of torch
    failed = 0
    for world in CASES:
        ranks = []
        for rank in range(world):
            if pid := os.fork():
                ranks.append(pid)
                continue
            try:
                as_rank(root, rank, world)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            if status:  # the others wait for it
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
