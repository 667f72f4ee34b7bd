"""Parts of checkpoints: each layout is told, refused by all that needs the whole, and taken where one insists."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckptkit
from ckptkit.errors import PartError

CODE = "part-of-a-checkpoint"
WEIGHTS = {"a.weight": torch.ones(4, 3), "a.bias": torch.zeros(4)}
EMPTY = dict.fromkeys(WEIGHTS, torch.empty(0))
SHAPES = {name: value.shape for name, value in WEIGHTS.items()}


# Files as their writers leave them.


Spread = Callable[[int, int], AbstractContextManager[dict[str, Any]]]


@pytest.fixture
def spread() -> Iterator[Spread]:
    """``spread(rank, ranks)``: DTensors and ShardedTensors as that process has them; no other runs."""

    @contextmanager
    def made(rank: int, ranks: int) -> Iterator[dict[str, Any]]:
        from torch.distributed._shard.sharded_tensor import Shard as Piece
        from torch.distributed._shard.sharded_tensor import ShardedTensor
        from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
        from torch.distributed._shard.sharding_spec import ShardMetadata

        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        except ImportError:
            pytest.skip(f"torch {torch.__version__} has DTensor elsewhere; its public place is of 2.5")

        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (ranks,))
            local = torch.arange(6.0).reshape(2, 3)
            shards = [ShardMetadata([2 * n, 0], [2, 3], placement=f"rank:{n}/cpu") for n in range(ranks)]
            metadata = ShardedTensorMetadata(shards, torch.Size([2 * ranks, 3]), TensorProperties())
            yield {
                "shard": DTensor.from_local(local, mesh, [Shard(0)]),
                "parameter": torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)])),
                "replicate": DTensor.from_local(local, mesh, [Replicate()]),
                "partial": DTensor.from_local(local, mesh, [Partial()]),
                "sharded": ShardedTensor._init_from_local_shards_and_global_metadata(
                    [Piece(local, shards[rank])], metadata
                ),
            }
        finally:
            dist.destroy_process_group()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield made


def tree(**values: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(values, folder / "model.pt")
        return folder / "model.pt"

    return write


def names(*files: str, content: Any = WEIGHTS) -> Callable[[Path], Path]:
    """Files of these names, each with the content; the first is what is looked at."""

    def write(folder: Path) -> Path:
        for file in files:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".safetensors"):
                save_file(content, path)
            elif file.endswith((".json", ".metadata")):
                path.write_text(json.dumps({"weight_map": {"a.weight": files[0], "a.bias": files[1]}}))
            else:
                torch.save(content, path)
        return folder / files[0]

    return write


def dcp_safetensors(folder: Path) -> Path:
    info = json.dumps({name: {"saved_offsets": [0] * value.dim()} for name, value in WEIGHTS.items()})
    save_file(WEIGHTS, folder / "x.safetensors", {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0"})
    return folder / "x.safetensors"


def args(**sizes: int) -> dict[str, Any]:
    return {"args": argparse.Namespace(num_layers=2, **sizes), "checkpoint_version": 3.0, "model": WEIGHTS}


PARTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    # By what the tree says, whatever the file is called.
    "stubs": (tree(module=EMPTY, param_shapes=[SHAPES], ds_version="0.19"), "ZeRO stage 3 .* 2 of 2 weights are empty"),
    "a stub beside weights": (
        tree(module={**WEIGHTS, "a.bias": torch.empty(0)}, param_shapes=SHAPES, dp_world_size=8),
        "one rank of 8 of a DeepSpeed ZeRO stage 3 .* 1 of 2 weights is an empty",
    ),
    "stubs of frozen weights, under another key": (
        tree(state_dict=EMPTY, param_shapes=[], frozen_param_shapes=SHAPES), "stage 3 .* 2 of 2 weights are empty"
    ),
    "stubs under a wrapper": (
        tree(module={f"module.{name}": value for name, value in EMPTY.items()}, param_shapes=[SHAPES]),
        "stage 3 .* 2 of 2 weights",
    ),
    "zero 2 optimizer": (
        tree(optimizer_state_dict={"single_partition_of_fp32_groups": [torch.ones(7)], "partition_count": [2, 2]}),
        "one rank of 2 of a DeepSpeed ZeRO checkpoint",
    ),
    "zero 3 optimizer": (tree(optimizer_state_dict={"fp32_flat_groups": [torch.ones(7)]}), "a DeepSpeed ZeRO"),
    "the optimizer alone": (tree(fp32_flat_groups=[torch.ones(7)], partition_count=4), "one rank of 4"),
    "pipeline, no module": (tree(module=None, mp_world_size=2, ds_version="0.19"), "DeepSpeed pipeline .* no weights"),
    "tensor parallel module": (tree(module=WEIGHTS, mp_world_size=2), "one rank of 2 of a DeepSpeed .* model parallel"),
    "degrees": (
        tree(module=WEIGHTS, ds_version="0.19", checkpoint_parallel_dimensions={"tp_degree": 4}), "one rank of 4 of a"
    ),
    "experts": (tree(module=WEIGHTS, ds_version="0.19", num_experts=[8]), "DeepSpeed mixture of experts"),
    "megatron": (tree(**args(tensor_model_parallel_size=2, pipeline_model_parallel_size=1)), "tensor parallel"),
    "megatron pipeline": (tree(**args(pipeline_model_parallel_size=4)), "one pipeline rank of 4 of a Megatron"),
    "megatron args as a dict": (tree(args={"model_parallel_size": 8}, model=WEIGHTS), "one tensor parallel rank of 8"),
    "flat": (tree(**{"_fsdp_wrapped_module._flat_param": torch.ones(9)}), "FSDP checkpoint with flat parameters"),
    "flat below a key": (tree(model={"_flat_param": torch.ones(9), "l.0._flat_param": torch.ones(9)}, epoch=1), "flat"),
    "flat, several models": (tree(g={"_flat_param": torch.ones(9)}, d={"_flat_param": torch.ones(8)}), "flat"),
    "fairscale": (tree(**{"decoder.layers.0.flat_param_0": torch.ones(9)}), "FSDP checkpoint with flat parameters"),
    "dcp in safetensors": (dcp_safetensors, "torch.distributed.checkpoint of safetensors"),
    # By name, and what lies beside.
    "customary": (names("model-00001-of-00002.safetensors"), "shard 1 of 2 of a sharded .* no index beside it"),
    "customary, of six digits": (names("m-00001-of-000163.safetensors"), "shard 1 of 163 of a sharded"),
    "customary, not finished": (names("m-00002-of-00002.bin.incomplete"), "shard 2 of 2 of a sharded"),
    "customary, a copy": (names("m-00002-of-00002 (1).safetensors"), "shard 2 of 2 of a sharded"),
    "customary, without an ending": (names("m-00002-of-00002"), "shard 2 of 2 of a sharded"),
    "customary, of a variant": (
        names("m-00001-of-00002.fp16.bin", "m-00001-of-00002.bin", "m-00002-of-00002.bin"), "shard 1 of 2 .* no index"
    ),
    "customary, of a variant with its index": (
        names("m.fp16-00001-of-00002.pt", "m.fp16-00002-of-00002.pt", "m.pt.index.fp16.json"), "give .*index.fp16.json"
    ),
    "named by an index": (
        names("one.bin", "two.bin", "w.bin.index.json"), "one of 2 shards of a sharded .*; give .*w.bin.index.json"
    ),
    "customary, with its index": (
        names("m-00002-of-00002.pt", "m-00001-of-00002.pt", "m.pt.index.json"), "shard 2 of 2 .*; give .*m.pt.index"
    ),
    "distcp": (names("__1_0.distcp", "__0_0.distcp", ".metadata"), "rank 1 of 2 of a torch.distributed"),
    "fsdp": (names("model_world_size_4_rank_2.pt"), "rank 2 of 4 of an FSDP"),
    "fsdp extra state": (names("extra_state_world_size_2_rank_0.pt", "x.pt"), "rank 0 of 2"),
    "accelerate": (names("pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_0_rank1.bin"), "rank 0 of 2 of an FSDP"),
    "deepspeed model parallel": (names("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), "rank 0 of 2"),
    "pipeline layer": (names("layer_03-model_states.pt", "layer_04-model_states.pt"), "layer 3 of a DeepSpeed"),
    "pipeline layer slice": (names("layer_03-model_01-model_states.pt"), "layer 3 of a DeepSpeed pipeline"),
    "expert": (names("layer_0_expert_1_mp_rank_00_model_states.pt"), "expert 1 of a DeepSpeed mixture"),
    "expert optimizer": (names("expp_rank_1_mp_rank_00_optim_states.pt"), "rank 1 of a DeepSpeed mixture"),
    "universal": (names("zero/a.weight/fp32.pt"), "DeepSpeed universal .* 'a.weight'"),
    "megatron folders": (names("mp_rank_00_001/m.pt", "mp_rank_00_000/m.pt"), "mp_rank_00_001, one of 2 folders"),
    "nemo folders": (names("tp_rank_01_pp_rank_000/m.ckpt"), "tp_rank_01_pp_rank_000 of a Megatron"),
    "llama": (names("consolidated.00.pth", "consolidated.01.pth"), "rank 0 of 2 of a Llama"),
    "llama, the second alone": (names("consolidated.01.pth"), "rank 1 of a Llama"),
    "llama in safetensors": (names("consolidated.01.safetensors", "consolidated.00.safetensors"), "rank 1 of 2 of"),
    "common": (names("common.pt", "__0_0.distcp", ".metadata"), "are in the .distcp files"),
}  # fmt: skip

WHOLES: dict[str, Callable[[Path], Path]] = {
    "an empty weight": tree(**EMPTY, w=torch.ones(2)),
    "an empty weight, as it is to be": tree(module={"e": torch.empty(0, 3)}, param_shapes=[{"e": torch.Size([0, 3])}]),
    "zero 1 and 2": tree(module=WEIGHTS, param_shapes=[SHAPES], dp_world_size=8, mp_world_size=1, ds_version="0.19"),
    "zero 3 that was gathered": names(
        "zero_pp_rank_0_mp_rank_00_model_states.pt", content={"module": WEIGHTS, "param_shapes": [SHAPES]}
    ),
    "megatron of one rank": tree(**args(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)),
    "megatron of one rank in its folder": names("mp_rank_00/model_optim_rng.pt"),
    "args of something else": tree(args=argparse.Namespace(lr=0.1, tensor_parallel=2), model=WEIGHTS),
    "a parameter called flat_param": tree(flat_param=torch.ones(3), **{"head.flat_param_scale": torch.ones(2)}),
    "a matrix called _flat_param": tree(_flat_param=torch.ones(3, 3)),
    "one shard of one": names("model-00001-of-00001.safetensors"),
    "folds": names("best-1-of-5.pt", "best-2-of-5.pt"),
    "one shard of one, with its index": names("m-00001-of-00001.bin", "m-00001-of-00001.bin", "m.bin.index.json"),
    "beside an index of others": names("c.bin", "c.bin", "x/a.bin"),
    "fsdp of one rank": names("model_world_size_1_rank_0.pt"),
    "accelerate of one rank": names("pytorch_model_fsdp_rank0.bin"),
    "llama of one part": names("consolidated.00.pth"),
    "deepspeed of one rank": names("mp_rank_00_model_states.pt"),
    "a copy a rank": names("checkpoint_rank0.pt", "checkpoint_rank1.pt"),
    "numbered epochs": names("epoch_1.pt", "epoch_2.pt"),
}  # fmt: skip


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    write, words = PARTS[request.param]
    return write(tmp_path), words


def said(path: Path) -> Any:
    with ckptkit.open(path) as file:
        return file.checkpoint.part


@pytest.mark.parametrize("name", WHOLES)
def test_what_is_whole_is_not_accused(name: str, tmp_path: Path) -> None:
    assert said(WHOLES[name](tmp_path)) is None


def test_each_part_is_told_and_refused_by_everything_that_needs_the_whole(
    part: tuple[Path, str], tmp_path: Path
) -> None:
    path, words = part
    whole = tmp_path / "whole of it.safetensors"
    save_file(WEIGHTS, whole)
    document = ckptkit.inspect(path)
    (finding,) = [finding for finding in document["findings"] if finding["code"] == CODE]
    assert finding["severity"] == "warning" and "not the whole" in finding["message"]
    assert set(document["part"]) == {"layout", "piece", "lacks", "instead", "opens"}
    out = tmp_path / "out.pth"
    for refused in (
        lambda: ckptkit.convert(path, out),
        lambda: ckptkit.convert(path, out, dry_run=True),
        lambda: ckptkit.verify(path, model="torchvision:resnet18"),
        lambda: ckptkit.verify(whole, model="torchvision:resnet18", against=path),
        lambda: ckptkit.diff(path, whole),
        lambda: ckptkit.diff(whole, path),
        lambda: ckptkit.manifest([path]),
        lambda: ckptkit.load_state_dict(path),
        lambda: ckptkit.open(path).save(out),
    ):
        with pytest.raises(PartError, match=f"{CODE}: .*{words}") as caught:
            refused()
        assert caught.value.path == str(path) and isinstance(caught.value, ckptkit.CkptkitError)
    assert not out.exists()
    report = ckptkit.check(path)
    if finding["fix"] and finding["fix"].endswith(".json"):  # the index beside it stands for it
        assert report.findings[0].code == "whole-checked" and report.exit_code == 2  # the other shards are not there
        return
    assert report.exit_code == 1
    (found,) = [finding for finding in report.findings if finding.severity == "error"]
    assert (found.code, found.rule, found.message) == (CODE, "whole", finding["message"])


def test_whoever_insists_gets_the_part_and_is_told(part: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = part
    out = tmp_path / "out.pth"
    report = ckptkit.convert(path, out, allow_part=True)
    assert CODE in {finding.code for finding in report.findings} and out.exists()
    # A file without a tensor cannot be compared with another.
    if ckptkit.inspect(path)["tensors"]:
        difference = ckptkit.diff(path, path, allow_part=True)
        assert difference.equal and CODE in {finding.code for finding in difference.findings}
    report = ckptkit.check(path, allow_part=True)
    if report.findings[0].code != "whole-checked":
        assert report.exit_code == 0 and [(f.code, f.severity) for f in report.findings] == [(CODE, "warning")]
    assert len(ckptkit.manifest([path], allow_part=True).files) == 1
    with ckptkit.open(path) as file:
        file.save(tmp_path / "again.pth", allow_part=True)
        if file.state_dict:
            assert ckptkit.load_state_dict(path, allow_part=True).keys() == file.state_dict.keys()


def test_what_to_give_instead(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    path = names("a.safetensors", "b.safetensors", index.name)(tmp_path)
    assert (said(path).instead, said(path).opens) == (str(index), True)
    assert ckptkit.inspect(path)["findings"][0]["fix"] == f"ckptkit inspect {index}"
    ranks = tmp_path / "ranks"
    path = names("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt")(ranks)
    assert (said(path).instead, said(path).opens) == (str(ranks), True)
    assert f"ckptkit inspect {ranks}" in [finding["fix"] for finding in ckptkit.inspect(path)["findings"]]
    shards = tmp_path / "shards"
    path = names("m-00001-of-00002.bin", "m-00002-of-00002.bin")(shards)
    assert (said(path).instead, said(path).opens) == (str(shards), True)
    (shards / "m-00002-of-00002.bin").unlink()
    assert (said(path).instead, said(path).opens) == (None, False)
    folders = tmp_path / "iter_0000001"
    assert said(names("mp_rank_01/m.pt", "mp_rank_00/m.pt")(folders)).instead == str(folders)
    # What torch consolidated lies above the shards it was made of.
    merged = tmp_path / "merged"
    names("model.safetensors", "model.safetensors", "model.safetensors.index.json")(merged)
    (merged / "sharded").mkdir()
    assert said(dcp_safetensors(merged / "sharded")).instead == str(merged / "model.safetensors.index.json")


def test_an_index_that_changes_is_read_again(tmp_path: Path) -> None:
    path = names("a.bin", "b.bin", "m.bin.index.json")(tmp_path)
    assert said(path) is not None
    (tmp_path / "m.bin.index.json").write_text('{"weight_map": {"a.weight": "b.bin"}}')
    assert said(path) is None
    (tmp_path / "m.bin.index.json").write_text("no JSON")
    assert said(path) is None


def test_a_whole_opened_by_its_index_is_no_part(tmp_path: Path) -> None:
    names("m-00001-of-00002.bin", "m-00002-of-00002.bin")(tmp_path)
    torch.save({"a.weight": WEIGHTS["a.weight"]}, tmp_path / "m-00001-of-00002.bin")
    torch.save({"a.bias": WEIGHTS["a.bias"]}, tmp_path / "m-00002-of-00002.bin")
    index = tmp_path / "m.bin.index.json"
    index.write_text(
        json.dumps({"weight_map": {f"a.{n}": f"m-0000{i}-of-00002.bin" for i, n in ((1, "weight"), (2, "bias"))}})
    )
    assert said(index) is None
    ckptkit.convert(index, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == WEIGHTS.keys()
    assert ckptkit.check(index).exit_code == 0


# Tensors that are spread over processes.


@pytest.mark.parametrize("name", ["shard", "parameter", "partial", "sharded"])
@pytest.mark.parametrize("where", ["weights", "optimizer", "list"])
def test_a_slice_of_a_tensor_makes_a_part(name: str, where: str, spread: Spread, save: Any) -> None:
    with spread(2, 4) as made:
        value = made[name]
        optimizer = {"state": {0: {"exp_avg": value}}, "param_groups": []}
        path = save({"weights": {"w": value}, "optimizer": optimizer, "list": [value]}[where])
    found = said(path)
    assert found.piece == "rank 2 of 4" and "1 tensor in it is a slice of the whole" in found.lacks


@pytest.mark.parametrize("name", ["shard", "parameter", "replicate", "sharded"])
def test_a_process_that_is_alone_has_the_whole(name: str, spread: Spread, save: Any) -> None:
    with spread(0, 1) as made:
        path = save({"w": made[name]})
    assert said(path) is None


def test_a_replica_is_whole_and_a_sum_is_not(spread: Spread, save: Any) -> None:
    with spread(1, 2) as made:
        path = save({"w": made["replicate"]}, "model_world_size_2_rank_1.pt")
    assert said(path) is None, "the tree decides, not the name"
    with spread(0, 1) as made:
        path = save({"w": made["partial"]})
    assert said(path) is not None


def test_tensors_of_other_classes_are_named(spread: Spread, save: Any, tmp_path: Path) -> None:
    with spread(0, 2) as made:
        path = save({"a": torch.ones(1), **made})
    (message,) = [f["message"] for f in ckptkit.inspect(path)["findings"] if f["code"] == "not-a-plain-tensor"]
    assert "shard (DTensor [4, 3] float32, Shard(0) of 2)" in message
    assert "parameter (DTensor [4, 3] float32, Shard(0) of 2)" in message
    assert "replicate (DTensor [2, 3] float32, Replicate of 2)" in message
    assert "partial (DTensor [2, 3] float32, Partial(sum) of 2)" in message
    assert "sharded (ShardedTensor [4, 3] float32, 1 of 2 shards)" in message
    with pytest.raises(ckptkit.RewriteError, match=r"tensors of other classes \(shard") as caught:
        ckptkit.convert(path, tmp_path / "x.safetensors", allow_part=True)
    assert "--exclude" not in str(caught.value)


class Int8(torch.Tensor):
    """As torchao's: int8 values and a scale, that look like floats."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Int8:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        made.values = values
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].values)
        raise NotImplementedError(func)


def test_a_quantized_tensor_is_named_and_whole(save: Any, tmp_path: Path) -> None:
    path = save({"w": Int8(torch.ones(4, 2, dtype=torch.int8)), "b": torch.ones(4)})
    assert said(path) is None
    with ckptkit.open(path) as file:
        (finding,) = [finding for finding in file.findings if finding.code == "not-a-plain-tensor"]
    assert "w (Int8 [4, 2] bfloat16)" in finding.message


def test_a_model_is_filled_from_a_part_only_where_one_insists(tmp_path: Path) -> None:
    weights = torch.nn.Linear(3, 4).state_dict()
    path = names("consolidated.00.pth", "consolidated.01.pth", content=weights)(tmp_path)
    model = torch.nn.Linear(3, 4)
    report = ckptkit.verify(path, model=model, forward=False, allow_part=True)
    assert report.ok and [finding.code for finding in report.findings].count(CODE) == 1
    report = ckptkit.verify(path, model=model, input_shapes=[(2, 3)], against=path, allow_part=True)
    assert report.ok and [finding.code for finding in report.findings].count(CODE) == 2
    whole = tmp_path / "whole.pth"
    torch.save(weights, whole)
    with pytest.raises(PartError, match=CODE):
        ckptkit.verify(whole, model=model, input=path)
    # Of what may not be checked no model is run.
    report = ckptkit.check(path, fits="torchvision:resnet18")
    assert (report.exit_code, [finding.code for finding in report.findings]) == (1, [CODE])
    report = ckptkit.check(path, fits="torchvision:resnet18", allow_part=True)
    codes = [finding.code for finding in report.findings]
    assert report.exit_code == 1 and "nothing-matches" in codes and codes.count(CODE) == 1


def test_numbers_beyond_reason_are_passed_over(spread: Spread, save: Any, tmp_path: Path) -> None:
    huge = 10**2400  # as large as a pickle may say
    for content in (
        {
            "module": WEIGHTS,
            "mp_world_size": huge,
            "dp_world_size": huge,
            "param_shapes": [{"a.bias": (2**61,) * 10_000}],
        },
        {"module": EMPTY, "dp_world_size": huge, "param_shapes": [SHAPES]},
        {"fp32_flat_groups": [torch.ones(1)], "partition_count": huge},
        args(tensor_model_parallel_size=huge),
    ):
        ckptkit.inspect(save(content))
    with spread(1, 2) as made:
        value = made["shard"]
        mesh = value.device_mesh
        for changed in ({"_rank": huge}, {"_layout": argparse.Namespace(shape=(huge, 2**61) * 10_000)}):
            mesh.__dict__.update(changed)
            path = save({"w": value})
            assert said(path) is not None
            ckptkit.inspect(path)


# The command line.


def test_the_commands(run: Any, tmp_path: Path) -> None:
    path = names("consolidated.00.pth", "consolidated.01.pth")(tmp_path)
    for arguments in (
        ("convert", path, "o.pth"),
        ("diff", path, path),
        ("manifest", path),
        ("verify", path, "--model", "x:y"),
    ):
        result = run(*arguments)
        assert (result.returncode, CODE in result.stderr, str(tmp_path) in result.stderr) == (2, True, True), (
            result.stderr
        )
        if arguments[0] != "verify":
            assert run(*arguments, "--allow-part").returncode == 0
    assert run("check", path).returncode == 1
    assert run("check", path, "--allow-part").returncode == 0
    (tmp_path / "ckptkit.toml").write_text("allow-part = true")
    assert run("check", path).returncode == 0
    shown = run("inspect", path)
    assert shown.returncode == 0 and "rank 0 of 2 of a Llama checkpoint" in shown.stdout
    assert run("inspect", path, "--fail-on", "warning").returncode == 1
    document = json.loads(run("convert", path, "p.pth", "--json").stdout)
    assert document["error"]["type"] == "PartError"
    document = json.loads(run("convert", path, "p.pth", "--json", "--allow-part").stdout)
    assert [finding["code"] for finding in document["findings"]] == [CODE]


@pytest.mark.parametrize("behind", [b"", b"more", b"\x28\xb5\x2f\xfd"])
def test_items_end_to_end_are_parts_that_cannot_be_opened(behind: bytes, run: Any, tmp_path: Path) -> None:
    path = names("__0_0.distcp", "__1_0.distcp", ".metadata")(tmp_path)
    item = path.read_bytes()
    path.write_bytes(item + item if not behind else behind + item)
    with pytest.raises(PartError, match=f"{CODE}: rank 0 of 2 of a torch.distributed.checkpoint .*; give {tmp_path}$"):
        ckptkit.open(path)
    assert run("inspect", path).returncode == 2
    assert run("check", path).returncode == 1
    assert run("check", path, "--allow-part").returncode == 2, "it cannot be read all the same"
