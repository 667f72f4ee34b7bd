"""Megatron's checkpoints: every split of a model over ranks gives the model again, and what is no whole is refused."""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.megatron import Shape, chunk_of, flat_slices, old_name, stacked, whole, write_dist, write_ranks
from support.repeated import repeated

import ckptkit
from ckptkit.errors import CkptkitError, CorruptError, LimitError, UnsupportedError

State = dict[str, torch.Tensor]


def require_same(folder: Path, want: State) -> None:
    found = {name: value for name, value in ckptkit.load_state_dict(folder).items() if value is not None}
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def codes(folder: Path) -> dict[str, str]:
    with ckptkit.open(folder) as file:
        return {finding.code: finding.message for finding in file.findings}


SPLITS = [
    Shape(tp=tp, pp=pp, virtual=virtual, layers=layers, swiglu=bool(number % 2), tied=bool(number // 2 % 2))
    for number, (tp, pp, virtual, layers) in enumerate(itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (4, 8, 8)))
    if layers % (pp * virtual) == 0 and (pp > 1 or virtual == 1) and tp * pp < 16
]


@repeated("every", 2, 1)
@pytest.mark.parametrize("old", [False, True], ids=["core", "old"])
def test_every_split_gives_the_whole_model(tmp_path: Path, old: bool, every: int) -> None:
    for number, shape in enumerate(SPLITS[old % every :: every]):
        state = whole(shape)
        folder = write_ranks(tmp_path / str(number), shape, state, old=old)
        require_same(folder, {old_name(name): value for name, value in state.items()} if old else state)
        shutil.rmtree(folder)


def test_experts_get_the_numbers_that_they_have_in_the_whole(tmp_path: Path) -> None:
    for number, (tp, pp, ep) in enumerate([(1, 1, 2), (2, 1, 2), (1, 2, 4), (2, 2, 2)]):
        shape = Shape(tp=tp, pp=pp, ep=ep, experts=4, layers=2)
        state = whole(shape)
        require_same(write_ranks(tmp_path / str(number), shape, state), state)


def test_grouped_experts_are_numbered_too(tmp_path: Path) -> None:
    for expert in range(2):
        values = {
            f"decoder.layers.0.mlp.experts.linear_fc{fc}.weight{number}": torch.full((4, 2), float(expert * 2 + number))
            for fc in (1, 2)
            for number in range(2)
        }
        (tmp_path / f"mp_rank_00_{expert:03}").mkdir()
        args = argparse.Namespace(
            pipeline_model_parallel_size=1, tensor_model_parallel_size=1, expert_model_parallel_size=2
        )
        torch.save({"args": args, "model": values}, tmp_path / f"mp_rank_00_{expert:03}" / "model_optim_rng.pt")
    found = ckptkit.load_state_dict(tmp_path)
    assert len(found) == 8
    for name, value in found.items():
        assert bool((value == int(name[-1])).all()), name


def test_folders_of_nemo(tmp_path: Path) -> None:
    shape = Shape(tp=2, pp=2, tied=True)
    state = whole(shape)
    for rank, stage in itertools.product(range(2), range(2)):
        own = {f"model.{old_name(k)}": v for k, v in chunk_of(state, shape, rank, stage, 0, 0).items()}
        if stage:
            own["model.word_embeddings.weight"] = own.pop("model.language_model.output_layer.weight")
        folder = tmp_path / "a" / f"tp_rank_{rank:02}_pp_rank_{stage:03}"
        folder.mkdir(parents=True)
        torch.save(own, folder / "model_weights.ckpt")
    require_same(tmp_path / "a", {f"model.{old_name(name)}": value for name, value in state.items()})


def test_ranks_and_mesh_are_shown(tmp_path: Path) -> None:
    shape = Shape(tp=2, pp=2)
    document = ckptkit.inspect(write_ranks(tmp_path / "a", shape, whole(shape)))
    assert document["layout"] == {"world_size": 4, "mesh": {"tensor": 2, "pipeline": 2}, "files": 4, "tag": None}
    document = ckptkit.inspect(write_dist(tmp_path / "b", stacked(whole(shape)), {}, common(shape)))
    assert document["layout"] is not None
    assert document["layout"]["mesh"] == {"tensor": 2, "pipeline": 2}


def test_training_state_is_that_of_one_process(tmp_path: Path) -> None:
    shape = Shape(tp=2, pp=2, virtual=2)
    moments = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": []}
    folder = write_ranks(tmp_path / "a", shape, whole(shape), optimizer=moments)
    everything = ckptkit.load(folder)
    assert [*everything] == ["args", "iteration", "checkpoint_version", "opt_param_scheduler", "rng_state", "model"]
    assert everything["iteration"] == 10
    assert everything["rng_state"][0]["torch_rng_state"][0] == 0
    assert next(iter(everything["model"])) == "embedding.word_embeddings.weight"
    told = codes(folder)
    assert "optimizer" in told["not-merged"]
    assert "the first 13 are tokens" in told["padded-vocabulary"]
    written = tmp_path / "resume.pth"
    assert ckptkit.convert(folder, written).ok
    assert "part-of-a-checkpoint" not in codes(written)
    loaded = torch.load(written, weights_only=False)
    assert loaded["args"].tensor_model_parallel_size == loaded["args"].pipeline_model_parallel_size == 1
    assert loaded["args"].num_layers == 4


def test_tied_embeddings_of_the_last_stage_are_compared_and_stand_once(tmp_path: Path) -> None:
    shape = Shape(tp=2, pp=2, tied=True)
    for old in (False, True):
        folder = write_ranks(tmp_path / str(old), shape, whole(shape), old=old)
        assert "copy of the word embeddings" in codes(folder)["taken-of-one-rank"]
        change(folder / "mp_rank_01_001", lambda model: head(model).add_(1))
        with pytest.raises(CorruptError, match="tied embeddings"):
            ckptkit.load_state_dict(folder)


def head(model: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model.get("output_layer.weight", model.get("word_embeddings_for_head"))
    return found["weight"] if isinstance(found, dict) else found


def change(folder: Path, model: Callable[[Any], object] = lambda _: None, **values: Any) -> None:
    """Change what is in the file of a rank."""
    path = folder / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    for key, value in values.items():
        if key in vars(saved["args"]):
            setattr(saved["args"], key, value)
        else:
            saved[key] = value
    model(saved["model"])
    torch.save(saved, path)


def test_rows_of_before_version_two_are_joined_in_their_order(tmp_path: Path) -> None:
    shape = Shape(tp=2, layers=1, swiglu=False)
    state = whole(shape)
    folder = write_ranks(tmp_path / "1", shape, state, old=True, version=1.0)
    require_same(folder, {old_name(name): value for name, value in state.items()})
    assert "by head, dimension and matrix" in codes(folder)["old-qkv-order"]
    for version in (0, None):
        folder = tmp_path / f"{version}"
        write_ranks(folder, shape, state, old=True, version=version)
        for rank in range(2):  # three matrices in each rank's rows
            own = {
                name: torch.cat([third.chunk(2)[rank] for third in value.chunk(3)])
                for name, value in state.items()
                if "linear_qkv.weight" in name or "linear_qkv.bias" in name
            }
            change(folder / f"mp_rank_{rank:02}", partial(replace_rows, own))
        require_same(folder, {old_name(name): value for name, value in state.items()})
        assert "all queries, keys, values" in codes(folder)["old-qkv-order"]


def replace_rows(rows: State, model: dict[str, Any]) -> None:
    for name, value in rows.items():
        model["language_model"]["encoder"][old_name(name).removeprefix("language_model.encoder.")] = value


def refused(folder: Path, error: type[CkptkitError], text: str) -> None:
    with pytest.raises(error, match=text):
        ckptkit.load_state_dict(folder)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: shutil.rmtree(f / "mp_rank_01_001"), "1 rank is missing.*tensor rank 1, pipeline rank 1"),
        (lambda f: shutil.rmtree(f / "mp_rank_00_001"), "tensor rank 0, pipeline rank 1"),
        (lambda f: (f / "mp_rank_01_001" / "model_optim_rng.pt").write_bytes(b""), "mp_rank_01_001.*empty"),
        (lambda f: change(f / "mp_rank_01_000", iteration=20), "says iteration 10, mp_rank_01_000 says 20"),
        (lambda f: change(f / "mp_rank_01_000", seed=7), "says args.seed 1234, mp_rank_01_000 says 7"),
        (lambda f: change(f / "mp_rank_01_000", checkpoint_version=2.0), "checkpoint_version"),
        (lambda f: shutil.copytree(f / "mp_rank_01_001", f / "mp_rank_02_001"), "mp_rank_02_001 is not one of them"),
        (lambda f: change(f / "mp_rank_00_001", lambda m: m["decoder.final_layernorm.weight"].add_(1)),
         "decoder.final_layernorm.weight .mp_rank_00_001 and mp_rank_01_001"),
        (lambda f: change(f / "mp_rank_00_001", lambda m: m.pop("decoder.final_layernorm.weight")), "only one has"),
        (lambda f: [change(f / f"mp_rank_0{r}_001", drop_layer) for r in range(2)], "num_layers is 4.*contain 3 "),
        (lambda f: change(f / "mp_rank_00_000", lambda m: cut_rows(m, "embedding.word_embeddings.weight")),
         "embedding.word_embeddings.weight.: the slice"),
        (lambda f: change(f / "mp_rank_00_000", lambda m: cut_rows(m, "decoder.layers.0.mlp.linear_fc1.weight")),
         "linear_fc1"),
        (lambda f: swap(f, "mp_rank_00_000", "mp_rank_01_000"), "args say that rank 1 is at .0, 0, 0., and rank 0"),
        (lambda f: [swap(f, f"mp_rank_0{r}_000", f"mp_rank_0{r}_001") for r in range(2)], "belongs to the last stage"),
        (lambda f: [without_model(p) for p in f.iterdir()], "no model in the files"),
    ],
)  # fmt: skip
def test_what_is_no_whole_is_refused(tmp_path: Path, damage: Callable[[Path], object], text: str) -> None:
    shape = Shape(tp=2, pp=2)
    folder = write_ranks(tmp_path / "a", shape, whole(shape))
    damage(folder)
    refused(folder, CkptkitError, text)


def test_trees_that_would_never_end_are_refused(tmp_path: Path) -> None:
    shape = Shape(tp=2, layers=1)
    folder = write_ranks(tmp_path / "a", shape, whole(shape))
    inner: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(9):
        inner = {str(number): inner for number in range(10)}
    for rank in range(2):
        change(folder / f"mp_rank_0{rank}", lambda model: model.update(odd=inner))
    refused(folder, LimitError, "tensors of a model")
    deep: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(30):
        deep = {"a": deep}
    for rank in range(2):
        change(folder / f"mp_rank_0{rank}", lambda model: model.update(odd=deep))
    refused(folder, CorruptError, "not a state_dict")
    long = "n" * 60_000
    many = {long: {f"{long}.{number}": torch.zeros(1) for number in range(1000)}}
    for rank in range(2):
        change(folder / f"mp_rank_0{rank}", lambda model: model.update(odd=many))
    refused(folder, LimitError, "characters of the tensors' names")


def drop_layer(model: dict[str, torch.Tensor]) -> None:
    for name in [name for name in model if name.startswith("decoder.layers.1.")]:
        del model[name]


def swap(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "c")
    (folder / b).rename(folder / a)
    (folder / "c").rename(folder / b)


def without_model(folder: Path) -> None:
    torch.save({"iteration": 10}, folder / "model_optim_rng.pt")


def cut_rows(model: dict[str, torch.Tensor], name: str) -> None:
    model[name] = model[name][:-1]


# torch_dist.


def common(shape: Shape) -> dict[str, Any]:
    return {"args": shape.args(), "iteration": 10, "checkpoint_version": 3.0, "opt_param_scheduler": {"max_lr": 0.1}}


def test_stacked_layers_and_experts_are_named_as_their_modules_are(tmp_path: Path) -> None:
    for seed in range(12):
        shape = Shape(layers=3, experts=2 * (seed % 2), tp=2)
        state = whole(shape)
        layers = {name: value for name, value in state.items() if "layers." in name}
        assert stacked(state).keys() != state.keys()
        assert len(stacked(layers)) == len(layers) // 3 - (3 if shape.experts else 0)
        require_same(write_dist(tmp_path / str(seed), stacked(state), {}, common(shape), seed=seed), state)


def test_layers_that_stand_alone_are_left_as_they_are(tmp_path: Path) -> None:
    state = whole(Shape(layers=2))
    require_same(write_dist(tmp_path / "a", state, {}, None), state)


def test_grouped_experts_of_a_stack(tmp_path: Path) -> None:
    shape = Shape(layers=2, experts=2, extra={"moe_grouped_gemm": True})
    state = whole(shape)
    want = {re.sub(r"local_experts\.(\d)\.(linear_fc\d\.\w+)", r"\2\1", name): value for name, value in state.items()}
    require_same(write_dist(tmp_path / "a", stacked(state), {}, common(shape)), want)


def test_objects_and_moments_are_in_their_place(tmp_path: Path) -> None:
    shape = Shape(layers=2)
    state = whole(shape)
    tensors = dict(stacked(state))
    for moment in ("exp_avg", "exp_avg_sq", "fp32_param"):
        tensors |= {f"optimizer.state.{moment}.{name}": value.float() + 1 for name, value in stacked(state).items()}
    tensors["optimizer.distributed.dp_group_idx_0.exp_avg"] = torch.randn(5)
    objects: dict[str, object] = {f"rng_state/shard_0.{rank}_1.2": [{"seed": rank}] for rank in range(2)}
    objects |= {f"decoder.layers.mlp._extra_state/shard_{layer}_2": f"of {layer}" for layer in range(2)}
    objects["rerun_state_machine_state/shard_0_1"] = {"mode": 1}
    for own in ("common.pt", "item"):
        shared = {**common(shape), "optimizer": {"optimizer": {"param_groups": [{"lr": 0.5}]}}}
        given = objects if own == "common.pt" else {**objects, "common_state/shard_0_1": shared}
        folder = write_dist(tmp_path / own, tensors, given, shared if own == "common.pt" else None)
        everything = ckptkit.load(folder)
        assert everything["iteration"] == 10
        assert everything["rng_state"] == [[[{"seed": 0}], [{"seed": 1}]]]
        assert everything["rerun_state_machine_state"] == {"mode": 1}
        assert everything["model"]["decoder.layers.1.mlp._extra_state"] == "of 1"
        assert everything["optimizer"]["param_groups"] == [{"lr": 0.5}]
        assert everything["optimizer"]["distributed.dp_group_idx_0.exp_avg"].shape == (5,)
        assert everything["optimizer"]["state"].keys() == state.keys()
        for name, moments in everything["optimizer"]["state"].items():
            assert all(torch.equal(value, state[name].float() + 1) for value in moments.values()), name
        assert "distributed.dp_group_idx_0" in codes(folder)["not-merged"]


@repeated("seeds", range(4), range(4, 12))
def test_flat_slices_of_a_distributed_optimizer_have_their_parameters_shape(tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        shape = Shape(layers=3, experts=2 * (seed % 3 == 2))
        state, tensors = whole(shape), dict(stacked(whole(shape)))
        for name, value in stacked(state).items():
            grid = [rng.choice([n for n in range(1, size + 1) if size % n == 0]) for size in value.shape]
            depth = name.count("layers.") + name.count("experts.experts")
            grid[:depth] = value.shape[:depth]
            tensors[f"optimizer.state.exp_avg.{name}"] = flat_slices(value.float() * 3, grid)
        everything = ckptkit.load(write_dist(tmp_path / str(seed), tensors, {}, common(shape), seed=seed))
        assert everything["optimizer"]["state"].keys() == state.keys()
        for name, moments in everything["optimizer"]["state"].items():
            assert torch.equal(moments["exp_avg"], state[name].float() * 3), name


def test_objects_that_are_missing_and_other_backends_are_refused(tmp_path: Path) -> None:
    state = whole(Shape(layers=1))
    folder = write_dist(tmp_path / "a", state, {"rng_state/shard_0.1_1.2": [1]}, None)
    refused(folder, CorruptError, "1 object is missing of 'rng_state'")
    folder = write_dist(tmp_path / "b", state, {"rng_state/shard_2_2": [1]}, None)
    refused(folder, CorruptError, "does not belong to the array")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(folder, UnsupportedError, "backend 'zarr'")
    folder = write_dist(tmp_path / "c", stacked(state), {}, None)
    (folder / "common.pt").write_bytes(b"")
    refused(folder, CorruptError, "common.pt: the file is empty")
