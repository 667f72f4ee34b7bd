"""DeepSpeed's other layouts: pipelines, mixtures of experts, universal checkpoints, BF16_Optimizer without ZeRO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.zero_writer import MODEL, OPTIMIZER, LossScaler, Zero, fragment_address, same, written

import ckptkit
from ckptkit.errors import CorruptError, PartError


def pipeline(folder: Path, stages: list[Zero], layers: Mapping[int, Mapping[str, torch.Tensor]]) -> Path:
    """The folder of a pipeline: the stages' optimizers, and a file a layer."""
    files: dict[str, Any] = {
        f"layer_{number:02d}-model_states.pt": OrderedDict(layer) for number, layer in layers.items()
    }
    for number, zero in enumerate(stages):
        for name, tree in zero.files().items():
            if "module" in tree:
                tree |= {"module": None, "mp_world_size": len(stages)}
            files[name.replace("mp_rank_00", f"mp_rank_{number:02d}")] = tree
    return written(files, folder)


def test_a_pipeline_is_one_model(tmp_path: Path) -> None:
    word, up, down = torch.randn(7, 3), torch.randn(5, 3), torch.randn(3, 5)
    tied = "tied_modules.embed.word.weight"
    stages = [Zero(groups=[{tied: word, "1.weight": up}]), Zero(groups=[{"10.weight": down, tied: word}])]
    layers = {
        0: {"word.weight": word.bfloat16(), "places": torch.arange(4)},
        1: {"weight": up.bfloat16()},
        2: {},
        10: {"weight": down.bfloat16(), "running": torch.ones(2)},
    }
    folder = pipeline(tmp_path / "step", stages, layers)
    expected = {"1.weight": up, "10.weight": down, "10.running": torch.ones(2), tied: word}
    same(ckptkit.load_state_dict(folder), {**expected, "tied_modules.embed.places": torch.arange(4)})
    optimizer: Any = ckptkit.load(folder)["optimizer"]  # type: ignore[index]
    assert optimizer["param_groups"][0]["params"] == [tied, "1.weight", "10.weight"]
    assert torch.equal(optimizer["state"]["10.weight"]["exp_avg"], stages[1].moment("10.weight", "exp_avg"))
    ckptkit.convert(folder, tmp_path / "resume.pth")
    assert "part-of-a-checkpoint" not in [each["code"] for each in ckptkit.inspect(tmp_path / "resume.pth")["findings"]]
    (folder / "layer_10-model_states.pt").unlink()
    with pytest.raises(CorruptError, match=r"no layer_ file has 10\.weight"):
        ckptkit.open(folder)
    stages[1].groups[0][tied].add_(1)  # type: ignore[index]
    apart = pipeline(tmp_path / "apart", [Zero(groups=[{tied: word - 1, "1.weight": up}]), stages[1]], layers)
    with pytest.raises(
        CorruptError, match=r"embed\.word\.weight \(rank 0, rank 1 of mp_rank_00 and rank 0, rank 1 of mp_rank_01\)"
    ):
        ckptkit.load_state_dict(apart)
    (folder / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CorruptError, match="1 of 2 ranks has no file among the mp_rank_XX files: rank 1"):
        ckptkit.open(folder)


def experts(folder: Path, *, sets: int, world: int) -> dict[str, torch.Tensor]:
    """Write a mixture of two experts a set, spread over ranks; gives the masters."""
    body = Zero(groups=[{"head.weight": torch.randn(3, 4)}], world=world)
    name = "moe.deepspeed_moe.experts.deepspeed_experts.{}.weight"
    trained = [
        Zero(groups=[{name.format(n): torch.randn(4, 2) for n in (0, 1)}], world=world // sets) for _ in range(sets)
    ]
    files, parts = body.files(), [each.files() for each in trained]
    full = dict(body.masters)
    for rank in range(world):
        own = parts[rank % sets][OPTIMIZER.format(rank // sets)]["optimizer_state_dict"]
        state = files[OPTIMIZER.format(rank)]["optimizer_state_dict"]
        for key in ("single_partition_of_fp32_groups", "param_alignment_paddings", "partition_count"):
            state[key] = state[key] + own[key]
        state["base_optimizer_state"]["state"][1] = own["base_optimizer_state"]["state"][0]
        state["base_optimizer_state"]["param_groups"].append({"moe": True, "params": [1]})
    files[MODEL]["param_shapes"] += parts[0][MODEL]["param_shapes"]
    files[MODEL]["num_experts"] = [2 * sets]
    for number in range(2 * sets):
        value = trained[number // 2].masters[name.format(number % 2)]
        full[name.format(number)] = value
        files[f"layer_0_expert_{number}_mp_rank_00_model_states.pt"] = {name.format(number): value.bfloat16()}
    written(files, folder)
    return full


@pytest.mark.parametrize(("sets", "world"), [(2, 2), (2, 4), (3, 6)])
def test_experts_are_put_together(tmp_path: Path, sets: int, world: int) -> None:
    full = experts(tmp_path / "step", sets=sets, world=world)
    same(ckptkit.load_state_dict(tmp_path / "step"), full)
    optimizer: Any = ckptkit.load(tmp_path / "step")["optimizer"]  # type: ignore[index]
    assert optimizer["state"].keys() == full.keys()
    assert set(optimizer["param_groups"][1]["params"]) == full.keys() - {"head.weight"}
    (tmp_path / "step" / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
    for _ in range(2):  # one is missing, and then all are
        with pytest.raises(CorruptError, match="files of the experts of layer 0: rank "):
            ckptkit.open(tmp_path / "step")
        for path in (tmp_path / "step").glob("layer_0_expert_*"):
            path.unlink()


def universal(zero: Zero, folder: Path) -> Path:
    """What ``ds_to_universal`` makes of a step."""
    files = {name: tree for name, tree in zero.files().items() if "module" in tree}
    masters = zero.masters
    others = {} if zero.stage == 3 else {**zero.buffers, **zero.frozen}
    for name, value in {**others, **masters}.items():
        kept = {"fp32": value.float()}
        if name in masters:
            kept |= {what: zero.moment(name, what) for what in zero.moments}
        for what, each in kept.items():
            files[f"zero/{name}/{what}.pt"] = each.reshape(-1) if zero.stage == 3 else {"param": each, "cat_dim": 0}
        if name in masters and zero.stage != 3:
            files[f"zero/{name}/step.pt"] = torch.tensor(2.0)
    groups = [{"lr": 0.01, "params": [number]} for number in range(len(zero.groups))]
    files["zero/optimizer_state.pt"] = {"param_groups": groups, "loss_scaler": LossScaler(), "zero_stage": zero.stage}
    return written(files, folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 3])
def test_universal_checkpoints(tmp_path: Path, stage: int, world: int) -> None:
    frozen = {"frozen": torch.randn(5).bfloat16()}
    zero = Zero.small(stage=stage, world=world, frozen=frozen, tied={"out.weight": "emb.weight"})
    folder = universal(zero, tmp_path / "step_universal")
    same(ckptkit.load_state_dict(folder), zero.full)
    optimizer: Any = ckptkit.load(folder)["optimizer"]  # type: ignore[index]
    for name, state in optimizer["state"].items():
        assert torch.equal(state["exp_avg"], zero.moment(name, "exp_avg"))
        assert state.keys() == {"exp_avg", "exp_avg_sq"} | ({"step"} if stage < 3 else set())
    assert [group["params"] for group in optimizer["param_groups"]] == [list(group) for group in zero.groups]
    if stage < 3:
        torch.save({"param": torch.ones(7, 3)}, folder / "zero" / "emb.weight" / "fp32.pt")
        with pytest.raises(CorruptError, match=r"emb\.weight \(zero/emb\.weight/fp32\.pt and mp_rank_00"):
            ckptkit.load_state_dict(folder)
    torch.save(torch.ones(2), folder / "zero" / "scale" / "fp32.pt")
    with pytest.raises(CorruptError, match="it has 2 elements, but param_shapes says"):
        ckptkit.open(folder)
    (folder / "zero" / "scale" / "fp32.pt").unlink()
    with pytest.raises(CorruptError, match=r"zero/NAME/fp32\.pt is missing for scale"):
        ckptkit.open(folder)


def test_a_file_of_a_universal_checkpoint_leads_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = universal(Zero.small(stage=1), tmp_path / "step_universal")
    name = folder / "zero" / "emb.weight" / "fp32.pt"
    with pytest.raises(PartError, match=rf"; give {folder};"):
        ckptkit.load_state_dict(name)
    monkeypatch.chdir(name.parent)
    with pytest.raises(PartError, match=r"; give \.\./\.\.;"):
        ckptkit.load_state_dict("fp32.pt")


def test_bf16_optimizer_at_stage_0_says_no_shapes(tmp_path: Path) -> None:
    zero = Zero.small(stage=-1)

    def edit(files: dict[str, Any]) -> None:
        files[MODEL]["param_shapes"] = files[MODEL]["shared_params"] = None
        for rank in range(2):
            mappings = []
            for group in zero.groups:
                at, half = 0, -(-sum(v.numel() for v in group.values()) // 4) * 2
                mapping: dict[str, fragment_address] = {}
                for name, value in group.items():
                    low, high = max(at, rank * half), min(at + value.numel(), (rank + 1) * half)
                    if low < high:
                        mapping[name] = fragment_address(high - low, low - rank * half)
                    at += value.numel()
                mappings.append(mapping)
            files[OPTIMIZER.format(rank)]["optimizer_state_dict"]["param_slice_mappings"] = mappings

    folder = zero.save(tmp_path / "step", edit)
    same(ckptkit.load_state_dict(folder), zero.full)
