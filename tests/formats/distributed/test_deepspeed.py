"""DeepSpeed's folders: what is in the tree, which weights are meant, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.zero_writer import MODEL, MODEL_3, OPTIMIZER, Zero, same, written

import ckptkit
from ckptkit.errors import CorruptError, SectionError, UnsupportedError


class RunsAtLoad:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def codes(path: Path) -> list[str]:
    """The codes of all that inspect tells of a file."""
    return [finding["code"] for finding in ckptkit.inspect(path)["findings"]]


# Which weights.


@pytest.mark.parametrize("stage", [-1, 1, 2])
def test_masters_are_taken_and_the_module_can_be(tmp_path: Path, stage: int) -> None:
    zero = Zero.small(stage=stage)
    folder = zero.save(tmp_path / "step")
    same(ckptkit.load_state_dict(folder), zero.full)
    same(ckptkit.load_state_dict(folder, section="module"), zero.module)
    with ckptkit.open(folder) as file:
        assert (file.format, file.kind) == ("deepspeed", "resume")
        assert [(each.path, each.selected) for each in file.sections] == [
            ("module", False),
            ("fp32", True),
            ("optimizer", False),
        ]


def test_masters_of_the_modules_dtype_are_the_module(tmp_path: Path) -> None:
    zero = Zero.small(dtype=torch.float32)
    folder = zero.save(tmp_path / "step")
    same(ckptkit.load_state_dict(folder), zero.full)
    with ckptkit.open(folder) as file:
        assert [each.path for each in file.sections] == ["module", "optimizer"]


@pytest.mark.parametrize(("dtype", "section"), [(torch.float16, "fp32"), (torch.float32, "module")])
def test_stage_3_has_one_copy_of_the_weights(tmp_path: Path, dtype: torch.dtype, section: str) -> None:
    zero = Zero.small(stage=3, dtype=dtype, frozen={"frozen": torch.randn(5).to(dtype)})
    folder = zero.save(tmp_path / "step")
    same(ckptkit.load_state_dict(folder), zero.full)
    with ckptkit.open(folder) as file:
        assert [each.path for each in file.sections] == [section, "optimizer"]
        assert [each.severity for each in file.findings if each.code == "unproven-weights"] == ["info"]
    if section == "fp32":
        with pytest.raises(SectionError, match="no section 'module' contains weights; sections that do: 'fp32'"):
            ckptkit.load_state_dict(folder, section="module")


def test_without_zero_the_module_is_taken(tmp_path: Path) -> None:
    zero = Zero.small(stage=0)
    masters = [list(group.values()) for group in zero.groups]
    folder = zero.save(tmp_path / "step", lambda files: files[MODEL]["optimizer"].update(fp32_groups=masters))
    same(ckptkit.load_state_dict(folder), zero.module)
    everything: Any = ckptkit.load(folder)
    assert torch.equal(everything["optimizer"]["fp32_groups"][0][1], zero.masters["head.weight"])
    assert torch.equal(everything["optimizer"]["state"][1]["exp_avg"], zero.moment("head.weight", "exp_avg"))
    with ckptkit.open(folder) as file:
        assert [each.severity for each in file.findings if each.code == "optimizer-by-rank"] == ["info"]


def test_a_tie_stays_one(tmp_path: Path) -> None:
    for stage in (1, 3):
        zero = Zero.small(stage=stage, tied={"out.weight": "emb.weight"})
        folder = zero.save(tmp_path / f"step{stage}")
        with ckptkit.open(folder) as file:
            assert file.state_dict["out.weight"] is file.state_dict["emb.weight"]
    folder = Zero.small(tied={"out.weight": "emb.weight"}).save(tmp_path / "old", _without_shared_params)
    with ckptkit.open(folder) as file:  # by the module's own views
        assert file.state_dict["out.weight"] is file.state_dict["emb.weight"]


def _without_shared_params(files: dict[str, Any]) -> None:
    del files[MODEL]["shared_params"]


def test_a_tie_of_empty_stubs_is_told_by_their_storage(tmp_path: Path) -> None:
    zero = Zero.small(stage=3, tied={"tied.weight": "emb.weight"})

    def edit(files: dict[str, Any], *, every: bool = False) -> None:  # as before DeepSpeed 0.9
        for rank in range(2):
            del files[MODEL_3.format(rank)]["shared_params"]
            module = files[MODEL_3.format(rank)]["module"]
            stub = module["emb.weight"]
            module.update(dict.fromkeys(zero.module if every else ["tied.weight"], stub))

    folder = zero.save(tmp_path / "step", edit)
    with ckptkit.open(folder) as ckpt:
        assert ckpt.state_dict["tied.weight"] is ckpt.state_dict["emb.weight"]
    same(ckptkit.load_state_dict(folder), zero.full)
    with pytest.raises(CorruptError, match=r"tied\.weight is an empty stub"):  # one stub for all ties none
        ckptkit.open(zero.save(tmp_path / "one", lambda files: edit(files, every=True)))


def test_files_of_before_0_4_have_no_line_before_optim(tmp_path: Path) -> None:
    for stage in (1, 3):
        zero = Zero.small(stage=stage)
        named = {name.replace("_optim_", "optim_"): tree for name, tree in zero.files().items()}
        folder = written(named, tmp_path / str(stage))
        same(ckptkit.load_state_dict(folder), zero.full)
        assert "part-of-a-checkpoint" in codes(folder / OPTIMIZER.format(1).replace("_optim_", "optim_"))


def test_statistics_that_each_rank_has_are_the_first_ones(tmp_path: Path) -> None:
    zero = Zero.small(stage=3, buffers={"bn.running_mean": torch.ones(3), "bn.num_batches_tracked": torch.tensor(3)})

    def edit(files: dict[str, Any]) -> None:
        files[MODEL_3.format(1)]["module"]["bn.running_mean"] = torch.zeros(3)

    folder = zero.save(tmp_path / "step", edit)
    same(ckptkit.load_state_dict(folder), zero.full)
    assert "rank-values" in codes(folder)


def test_the_tree_is_what_one_process_would_have_saved(tmp_path: Path) -> None:
    zero = Zero.small(client={"epoch": 3, "ema": {"decay": 0.9}})
    ckptkit.convert(zero.save(tmp_path / "step"), tmp_path / "resume.pth")
    same(ckptkit.load_state_dict(tmp_path / "resume.pth"), zero.full)
    saved = torch.load(tmp_path / "resume.pth", weights_only=True)  # nothing of DeepSpeed's is needed for it
    assert (saved["epoch"], saved["ema"], saved["global_steps"]) == (3, {"decay": 0.9}, 2)
    assert saved["optimizer"]["loss_scaler"] == {"cur_scale": 1.0, "dynamic": False}
    assert saved["optimizer"]["param_groups"][1] == {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "params": ["head.bias", "scale"],
    }
    for name, state in saved["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], zero.moment(name, "exp_avg_sq"))
    assert not {"param_shapes", "dp_world_size", "frozen_param_shapes"} & saved.keys()
    assert "part-of-a-checkpoint" not in codes(tmp_path / "resume.pth")
    with ckptkit.open(tmp_path / "resume.pth") as file:
        assert (file.kind, file.trust) == ("resume", "safe")


# What proves that files belong together.


def test_ranks_of_another_run_are_found(tmp_path: Path) -> None:
    zero = Zero.small(groups=[{"a.weight": torch.randn(8, 2), "b.weight": torch.randn(4, 4)}])
    folder = zero.save(tmp_path / "step")
    other = Zero(groups=[{name: value + 1 for name, value in zero.masters.items()}], buffers=zero.buffers)
    shutil.copy(other.save(tmp_path / "other") / OPTIMIZER.format(1), folder)
    for read in (ckptkit.load_state_dict, lambda path: ckptkit.convert(path, tmp_path / "out.pth")):
        with pytest.raises(CorruptError, match=r"b\.weight \(rank 1 and mp_rank_00_model_states\.pt\)"):
            read(folder)
    assert not (tmp_path / "out.pth").exists()


def test_swapped_ranks_are_found(tmp_path: Path) -> None:
    zero = Zero.small(groups=[{"a.weight": torch.randn(8, 2), "b.weight": torch.randn(4, 4)}])

    def swap(files: dict[str, Any]) -> None:
        first, second = OPTIMIZER.format(0), OPTIMIZER.format(1)
        files[first], files[second] = files[second], files[first]

    folder = zero.save(tmp_path / "step", swap)
    with pytest.raises(CorruptError, match="2 tensors with different values in two files"):
        ckptkit.load_state_dict(folder)
    uneven = Zero.small(groups=[{"a": torch.randn(5)}])  # the last part is shorter: seen when it is opened
    with pytest.raises(CorruptError, match="flat buffer 0 of fp32 in rank 1 has 4 elements, but should have 1"):
        ckptkit.open(uneven.save(tmp_path / "uneven", swap))


def test_buffers_of_all_ranks_are_compared(tmp_path: Path) -> None:
    def edit(files: dict[str, Any]) -> None:
        files[MODEL_3.format(1)]["module"]["running"] = torch.ones(3)

    folder = Zero.small(stage=3).save(tmp_path / "step", edit)
    with pytest.raises(CorruptError, match=r"running \(zero_pp_rank_0_\w+\.pt and zero_pp_rank_1_\w+\.pt\)"):
        ckptkit.load_state_dict(folder)


def test_a_weight_that_stage_3_kept_whole_is_compared(tmp_path: Path) -> None:
    zero = Zero.small(stage=3)

    def edit(files: dict[str, Any], wrong: float = 0.0) -> None:
        for rank in range(2):
            files[MODEL_3.format(rank)]["module"]["head.bias"] = zero.masters["head.bias"].bfloat16() + wrong

    same(ckptkit.load_state_dict(zero.save(tmp_path / "step", edit)), zero.full)
    folder = zero.save(tmp_path / "wrong", lambda files: edit(files, 1.0))
    with pytest.raises(CorruptError, match=r"head\.bias \(all ranks and zero_pp_rank_0"):
        ckptkit.load_state_dict(folder)


def test_steps_of_ranks_are_compared(tmp_path: Path) -> None:
    def edit(files: dict[str, Any]) -> None:
        state = files[OPTIMIZER.format(1)]["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        state[0]["step"] = torch.tensor(3.0)

    folder = Zero.small(stage=3).save(tmp_path / "step", edit)
    with pytest.raises(CorruptError, match=r"the optimizer's step \(rank 0 and rank 1\)"):
        ckptkit.load_state_dict(folder)


def test_a_damaged_rank_is_told_and_can_be_insisted_on(tmp_path: Path) -> None:
    zero = Zero.small(stage=3)
    folder = zero.save(tmp_path / "step")
    file = folder / OPTIMIZER.format(1)
    data = bytearray(file.read_bytes())
    at = data.index(zero.moment("emb.weight", "exp_avg").numpy().tobytes()[44:80])
    data[at] ^= 1
    file.write_bytes(data)
    same(ckptkit.load_state_dict(folder), zero.full)
    with pytest.raises(CorruptError, match=r"state\.emb\.weight\.exp_avg' of 'optimizer': the bytes have CRC-32"):
        ckptkit.load(folder)
    found: Any = ckptkit.load(folder, ignore_checksums=True)
    state = found["optimizer"]["state"]["emb.weight"]
    assert int((state["exp_avg"] != zero.moment("emb.weight", "exp_avg")).sum()) == 1


# What is refused when it is opened.


def _set(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda files: files[name].update(values)


def _in_optimizer(rank: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda files: files[OPTIMIZER.format(rank)]["optimizer_state_dict"].update(values)


def _moved(files: dict[str, Any]) -> None:
    files[OPTIMIZER.format(4)] = files[OPTIMIZER.format(1)]


def _cut(files: dict[str, Any]) -> None:
    flats = files[OPTIMIZER.format(0)]["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[0] = flats[0][:-1].clone()


def _emptied(files: dict[str, Any]) -> None:
    for rank in range(2):
        state = files[OPTIMIZER.format(rank)]["optimizer_state_dict"]
        state["single_partition_of_fp32_groups"] = [torch.empty(0), torch.empty(0)]


def _longer(files: dict[str, Any]) -> None:
    files[MODEL]["param_shapes"][0]["emb.weight"] = torch.Size((9, 3))


def _stub(files: dict[str, Any]) -> None:
    files[MODEL]["module"]["emb.weight"] = torch.empty(0)


def _reshaped(files: dict[str, Any]) -> None:
    files[MODEL]["module"]["emb.weight"] = torch.ones(3, 7)


def _one_moment(files: dict[str, Any]) -> None:
    del files[OPTIMIZER.format(1)]["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]


def _other_rate(files: dict[str, Any]) -> None:
    files[OPTIMIZER.format(1)]["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = 0.5


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda files: files.pop(OPTIMIZER.format(1)), "1 of 2 ranks has no file among the optim_states files: rank 1"),
        (lambda files: files.pop(OPTIMIZER.format(0)), "1 of 2 ranks has no file among the optim_states files: rank 0"),
        (lambda files: [files.pop(OPTIMIZER.format(r)) for r in (0, 1)], "optim_states files, .* are missing"),
        (lambda files: files.pop(MODEL), "there is no mp_rank_00_model_states.pt"),
        (_moved, "2 ranks wrote the optim_states files, but there is one from rank 4"),
        (_in_optimizer(1, partition_count=[3, 3]), r"partition_count is \[2, 2\] in .* and \[3, 3\] in"),
        (_set(OPTIMIZER.format(1), ds_version="0.9"), "ds_version is '0.19.8' in .* and '0.9' in"),
        (_in_optimizer(0, single_partition_of_fp32_groups=[]), "_rank_0_.* has 0 flat buffers, but this one has 2"),
        (_in_optimizer(1, single_partition_of_fp32_groups=None), "it has no flat buffers of the fp32 weights"),
        (_in_optimizer(0, param_alignment_paddings=[[0], [0]]), "gives 1 paddings for the 2 parameters of group 0"),
        (_in_optimizer(0, param_alignment_paddings=[[-1, 0], [0, 0]]), "are not numbers of elements"),
        (_cut, r"flat buffer 0 of fp32 in all|flat buffer 0 of fp32"),
        (_emptied, "flat buffer 0 of fp32 has 0 elements in all, .* offloaded to NVMe"),
        (_longer, "flat buffer 0 of fp32 has 27 elements in all, but its parameters have 33"),
        (_stub, r"emb\.weight is of shape \[0\], but param_shapes says \[7, 3\]"),
        (_reshaped, r"emb\.weight is of shape \[3, 7\], but param_shapes says \[7, 3\]"),
        (_one_moment, "only some ranks have exp_avg of flat buffer 0"),
        (_other_rate, r"the optimizer's lr is 0\.01 in .* and 0\.5 in"),
        (_set(MODEL, param_shapes=[{"a": "b"}]), "its param_shapes do not map names to shapes"),
        (
            _set(MODEL, param_shapes=[{"a": torch.Size((1,))}]),
            "param_shapes has 1 group, but there are 2 flat buffers",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = Zero.small().save(tmp_path / "step", edit)
    with pytest.raises(CorruptError, match=message):
        ckptkit.open(folder)
    with pytest.raises(CorruptError):
        ckptkit.convert(folder, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda files: files.pop(MODEL_3.format(1)), "1 of 2 ranks has no file among the model_states files: rank 1"),
        (_set(MODEL_3.format(1), global_steps=3), "global_steps is 2 in .* and 3 in"),
        (
            lambda files: files[MODEL_3.format(1)]["frozen_param_fragments"].popitem(),
            "not every rank's file has its share of the frozen weight frozen",
        ),
        (
            lambda files: files[MODEL_3.format(0)]["module"].update(lost=torch.ones(0)),
            "the weight lost is an empty stub, and no file says where its values are",
        ),
        (
            lambda files: files[MODEL_3.format(1)]["frozen_param_fragments"].update(frozen=torch.ones(9)),
            "of the frozen weight frozen in zero_pp_rank_1",
        ),
        (
            lambda files: files[OPTIMIZER.format(0)]["optimizer_state_dict"].update(
                fp32_flat_groups=[torch.ones(9)] * 2
            ),
            "a rank's flat buffers have 18 elements, but its shares of the parameters have 16",
        ),
    ],
)
def test_stage_3_that_does_not_fit_together_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = Zero.small(stage=3, frozen={"frozen": torch.randn(5)}).save(tmp_path / "step", edit)
    with pytest.raises(CorruptError, match=message):
        ckptkit.open(folder)


def test_two_files_of_one_rank_are_refused(tmp_path: Path) -> None:
    folder = Zero.small().save(tmp_path / "step")
    shutil.copy(folder / OPTIMIZER.format(1), folder / OPTIMIZER.format(1).removeprefix("bf16_"))
    with pytest.raises(CorruptError, match="are from one rank: files of different runs"):
        ckptkit.open(folder)


def test_a_rank_that_is_there_twice_is_refused_at_stage_3(tmp_path: Path) -> None:
    zero = Zero(groups=[{"a.weight": torch.randn(4, 5), "b.weight": torch.randn(3)}], stage=3, world=3)
    folder = zero.save(tmp_path / "step")
    shutil.copy(folder / OPTIMIZER.format(0), folder / OPTIMIZER.format(2))
    with pytest.raises(
        CorruptError,
        match=r"zero_pp_rank_0_\w+\.pt and bf16_zero_pp_rank_2_\w+\.pt contain the "
        r"same va",
    ):
        ckptkit.open(folder)
    alike = Zero(groups=[{"a.weight": torch.ones(4, 4)}], stage=3, world=2, moments=("momentum_buffer",))
    same(ckptkit.load_state_dict(alike.save(tmp_path / "alike")), alike.full)


def test_a_hostile_rank_is_told_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Zero.small().save(tmp_path / "step", _set(OPTIMIZER.format(1), more=RunsAtLoad()))
    with ckptkit.open(folder) as file:
        assert file.trust == "hostile"
    document = ckptkit.inspect(folder)
    assert "posix.system" in [use["name"] for use in document["globals"] if use["verdict"] == "dangerous"]
    assert not (tmp_path / "ran").exists()


def test_tensor_parallel_ranks_are_refused(tmp_path: Path) -> None:
    zero = Zero.small(stage=0)

    def edit(files: dict[str, Any]) -> None:
        files[MODEL]["mp_world_size"] = 2
        files["mp_rank_01_model_states.pt"] = files[MODEL]

    with pytest.raises(UnsupportedError, match="split over tensor-parallel ranks"):
        ckptkit.open(zero.save(tmp_path / "step", edit))
    degrees = {"tp_degree": 2, "pp_degree": 1}
    with pytest.raises(UnsupportedError, match="split over tensor-parallel ranks"):
        ckptkit.open(zero.save(tmp_path / "one", _set(MODEL, checkpoint_parallel_dimensions=degrees)))
    with pytest.raises(UnsupportedError, match="experts that AutoEP distributed over ranks"):
        ckptkit.open(zero.save(tmp_path / "experts", _set(MODEL, ds_autoep_layers=[{"num_experts": 4}])))
