"""One file a rank, as torch's processes wrote it: put together bit for bit, or refused with what is wrong."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.files import SameBits
from support.sharded import Samples, Sharded, flat
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckptkit
from ckptkit.errors import CkptkitError, CorruptError, PartError, RewriteError, SectionError, UnsupportedError

WHOLE = (
    *("dtensor_files_2", "dtensor_files_4", "dtensor_files_hsdp", "dtensor_files_tp_fsdp", "dtensor_files_meshes"),
    *("sharded_tensor_files_2", "sharded_tensor_files_4", "dtensor_files_stages"),
)

Tensors = dict[str, torch.Tensor]


def tensors_in(tree: object) -> Tensors:
    return {name: value for name, value in flat(tree) if isinstance(value, torch.Tensor)}


def same(found: Tensors, wanted: Tensors, same_bits: SameBits) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same_bits(found[name], value), name


@pytest.fixture
def copy(sharded: Samples, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a case's folder, to be damaged."""

    def made(case: str) -> Path:
        return Path(shutil.copytree(sharded[case].folder, tmp_path / case))

    return made


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """This process as one of several, of which no other runs."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def changed(path: Path, rank: int, world: int, change: Callable[[Any], object]) -> None:
    """Save a rank's file again with something in it changed."""
    with as_rank(rank, world), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tree = torch.load(path, weights_only=False)
        change(tree)
        torch.save(tree, path)


def expected(sample: Sharded) -> dict[str, Any]:
    tree = sample.expected
    return tree if "optimizer" in tree else tree["model"]


# What they make up.


@pytest.mark.parametrize("case", WHOLE)
def test_all_that_was_saved_is_there_as_one_process_would_have_saved_it(
    case: str, sharded: Samples, same_bits: SameBits
) -> None:
    sample = sharded[case]
    with ckptkit.open(sample.folder) as file:
        assert file.format == "fsdp"
        assert file.checkpoint.part is None
        assert (
            file.checkpoint.origin.size
            == sum(path.stat().st_size for path in sample.folder.iterdir() if path.name != "fsdp_config.json")
            + (sample.folder / "fsdp_config.json").stat().st_size
        )
    found = ckptkit.load(sample.folder)
    extra = found.pop("extra", None)
    leaves = {name: value for name, value in flat(found) if not isinstance(value, torch.Tensor)}
    assert leaves == {name: value for name, value in flat(expected(sample)) if not isinstance(value, torch.Tensor)}
    same(tensors_in(found), tensors_in(expected(sample)), same_bits)
    assert (extra is None) == ("optimizer" not in sample.expected)


@pytest.mark.parametrize("case", ["dtensor_files_tp_fsdp", "dtensor_files_hsdp", "sharded_tensor_files_4"])
def test_it_is_converted_like_any_file(case: str, sharded: Samples, tmp_path: Path, same_bits: SameBits) -> None:
    sample = sharded[case]
    model = sample.expected["model"]
    ckptkit.convert(sample.folder, tmp_path / "w.safetensors", weights_only=True)
    same(dict(ckptkit.load_state_dict(tmp_path / "w.safetensors")), model, same_bits)
    same(dict(ckptkit.load_state_dict(sample.folder)), model, same_bits)
    assert ckptkit.diff(sample.folder, tmp_path / "w.safetensors").equal
    ckptkit.convert(sample.folder, tmp_path / "resume.pth")
    resumed = torch.load(tmp_path / "resume.pth")  # nothing of it needs trust
    extra = resumed.pop("extra", {"rng": {"cpu": None}})
    same(tensors_in(resumed), tensors_in(expected(sample)), same_bits)
    assert list(extra["rng"]) == ["cpu"]


def test_it_is_opened_without_torch(sharded: Samples) -> None:
    code = (
        "import sys, ckptkit\n"
        f"print([len(ckptkit.open(path).state_dict) for path in {[str(sharded[case].folder) for case in WHOLE]}])\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == [17, 17, 17, 17, 60, 17, 17, 13]  # noqa: S307 - printed above


def test_replicas_are_compared_and_what_each_rank_has_of_its_own_is_not(sharded: Samples) -> None:
    with ckptkit.open(sharded["dtensor_files_4"].folder) as file:
        replicas = file.checkpoint.replicas
        (told,) = [finding.message for finding in file.findings if finding.code == "rank-values"]
    assert told == "each rank has its own extra.rng; the values of rank 0 are used"
    names = {replica.name for replica in replicas}
    assert {"model.norm.running_mean", "optimizer.state.0.step"} <= names
    assert not any("rng" in name for name in names)
    assert {replica.where for replica in replicas} == {f"rank 0 and rank {rank}" for rank in (1, 2, 3)}
    with ckptkit.open(sharded["dtensor_files_hsdp"].folder) as file:
        where = {replica.where for replica in file.checkpoint.replicas if replica.name == "emb.weight"}
    assert where == {"rank 0 and rank 2", "rank 1 and rank 3"}
    with pytest.raises(CorruptError, match=r"1 tensor .* norm\.running_mean \(rank 0 and rank 1\); files of different"):
        ckptkit.load_state_dict(sharded["dtensor_files_unlike"].folder)


def test_what_verl_keeps_beside_it_is_rank_0s(copy: Callable[[str], Path], same_bits: SameBits) -> None:
    folder = copy("dtensor_files_2")
    states = []
    for rank in range(2):
        numpy_state, state = np.random.RandomState(rank).get_state(), random.Random(rank).getstate()
        states.append({"cpu": torch.full((8,), rank), "numpy": numpy_state, "random": state, "device": rank})
        extra = {"lr_scheduler": {"last_epoch": 3, "_last_lr": [0.1]}, "rng": states[rank]}
        torch.save(extra, folder / f"extra_state_world_size_2_rank_{rank}.pt")
    found = ckptkit.load(folder)["extra"]
    assert found["lr_scheduler"] == {"last_epoch": 3, "_last_lr": [0.1]}
    assert found["rng"]["random"] == states[0]["random"]
    assert same_bits(found["rng"]["cpu"], states[0]["cpu"])
    assert np.array_equal(found["rng"]["numpy"][1], states[0]["numpy"][1])


def test_what_a_word_in_a_key_does_not_excuse(tmp_path: Path) -> None:
    """A tensor of a loss, a model's under ``time``: they must be the same; a loss that was measured need not."""
    for rank in range(2):
        tree = {
            "model": {"time_embed": torch.ones(2), "seed.weight": torch.ones(2)},
            "loss": 0.5 + rank,
            "criterion_loss": {"center": torch.ones(2)},
            "random_states": {"torch": torch.full((2,), rank)},
        }
        torch.save(tree, tmp_path / f"rank_{rank}.pt")
    with ckptkit.open(tmp_path) as file:
        names = [replica.name for replica in file.checkpoint.replicas]
        told = [finding.message for finding in file.findings if finding.code == "rank-values"]
    assert names == ["model.time_embed", "model.seed.weight", "criterion_loss.center"]
    assert told == ["each rank has its own loss, random_states; the values of rank 0 are used"]
    tree["model"]["time_embed"] += 1
    torch.save(tree, tmp_path / "rank_1.pt")
    with pytest.raises(CorruptError, match=r"1 tensor .*: model\.time_embed"):
        ckptkit.load(tmp_path)


# Refusals.


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def renamed(**names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for old, new in names.items():
            (folder / f"{old}.pt").rename(folder / f"{new}.pt")

    return damage


def swapped(folder: Path) -> None:
    first, second = folder / "model_world_size_4_rank_0.pt", folder / "model_world_size_4_rank_2.pt"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def twice(folder: Path) -> None:
    shutil.copy(folder / "optim_world_size_4_rank_1.pt", folder / "optim_world_size_4_rank_01.pt")


def of_another_run(folder: Path) -> None:
    shutil.copy(folder / "model_world_size_4_rank_0.pt", folder / "model_world_size_8_rank_0.pt")


def configured(folder: Path) -> None:
    (folder / "fsdp_config.json").write_text('{"world_size": 8}')


def cut(folder: Path) -> None:
    path = folder / "optim_world_size_4_rank_3.pt"
    path.write_bytes(path.read_bytes()[:-700])


def foreign(folder: Path) -> None:
    (folder / "model_world_size_4_rank_1.pt").write_text("no checkpoint")


def emptied(folder: Path) -> None:
    (folder / "model_world_size_4_rank_1.pt").write_bytes(b"")


def saved_again(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """The file of rank 1 with something in it changed."""

    return lambda folder: changed(folder / f"{name}_world_size_4_rank_1.pt", 1, 4, change)


def another_step(tree: Any) -> None:
    tree["param_groups"][0]["lr"] = 0.5


def another_scheduler(tree: Any) -> None:
    tree["lr_scheduler"]["last_epoch"] = 4


def fewer(tree: Any) -> None:
    del tree["emb.weight"]


def more(tree: Any) -> None:
    tree["more"] = 1


def plain(tree: Any) -> None:
    tree["emb.weight"] = tree["emb.weight"].to_local()


def other_shape(tree: Any) -> None:
    tree["norm.running_mean"] = torch.zeros(7)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        without("model_world_size_4_rank_2.pt"),
        r"1 of 4 ranks is missing: model_world_size_4_rank_2\.pt; get all of them into the folder",
    ),
    "missing at the end": (without("optim_world_size_4_rank_3.pt"), r"1 of 4 ranks is missing: optim_.*_rank_3\.pt"),
    "twice": (twice, r"rank 1 is there twice: optim_world_size_4_rank_0?1\.pt and optim_world_size_4_rank_0?1\.pt"),
    "swapped": (
        swapped,
        r"rank_0\.pt: its content is from rank 2, but its name says rank 0: files were swapped or renamed",
    ),
    "a rank too many": (
        renamed(model_world_size_4_rank_3="model_world_size_4_rank_7"),
        r"model_world_size_4_rank_7\.pt: the number is too high for 4 ranks",
    ),
    "two runs": (of_another_run, "files of several runs are mixed here: of 4 and 8 ranks"),
    "another configuration": (configured, "files of several runs are mixed here: of 4 and 8 ranks"),
    "cut short": (cut, r"optim_world_size_4_rank_3\.pt: .*"),
    "foreign": (foreign, r"model_world_size_4_rank_1\.pt: .*"),
    "empty": (emptied, r"model_world_size_4_rank_1\.pt: the file is empty"),
    "another value": (
        saved_again("optim", another_step),
        r"optimizer\.param_groups\.0\.lr is .* in optim_world_size_4_rank_0\.pt and 0\.5 in optim_.*_rank_1\.pt; files",
    ),
    "another step": (
        saved_again("extra_state", another_scheduler),
        r"extra\.lr_scheduler\.last_epoch is 3 in .* and 4",
    ),
    "a tensor less": (saved_again("model", fewer), r"model\.emb\.weight is only in model_world_size_4_rank_0\.pt"),
    "a value more": (saved_again("model", more), r"model\.more is only in model_world_size_4_rank_1\.pt"),
    "a plain tensor": (
        saved_again("model", plain),
        r"the files of the ranks do not belong together: model\.emb\.weight",
    ),
    "another shape": (saved_again("model", other_shape), r"model\.norm\.running_mean is float32 \[6\] in .*\[7\]"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_files_that_do_not_belong_together_are_refused(
    damage: str, copy: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    folder = copy("dtensor_files_4")
    harm, text = REFUSED[damage]
    harm(folder)
    with pytest.raises(CkptkitError) as caught:
        ckptkit.open(folder)
    assert re.search(text, str(caught.value)), caught.value
    assert str(caught.value).startswith(str(folder))
    done = run("inspect", folder)
    assert done.returncode == 2
    assert re.search(text, done.stderr), done.stderr


def test_of_a_mesh_of_some_ranks_every_one_has_its_part(copy: Callable[[str], Path]) -> None:
    folder = copy("dtensor_files_stages")
    changed(folder / "model_world_size_4_rank_3.pt", 3, 4, lambda tree: tree["module"].pop("head.weight"))
    with pytest.raises(CorruptError, match=r"module\.head\.weight is only in model_world_size_4_rank_2\.pt; files"):
        ckptkit.open(folder)


def test_sums_that_were_not_made_are_refused(sharded: Samples) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor 'sum': Partial\(sum\): each rank has a part of a sum"):
        ckptkit.open(sharded["dtensor_files_partial"].folder)


def test_where_names_do_not_say_how_many_ranks_there_were_the_files_do(copy: Callable[[str], Path]) -> None:
    folder = copy("dtensor_files_hsdp")
    (folder / "fsdp_config.json").unlink()
    for rank in range(4):
        (folder / f"model_world_size_4_rank_{rank}.pt").rename(folder / f"step_7.rank_{rank}.pth")
    assert len(ckptkit.load_state_dict(folder)) == 17
    (folder / "step_7.rank_3.pth").unlink()
    with pytest.raises(CorruptError, match=r"1 of 4 ranks is missing: step_7\.rank_3\.pth"):
        ckptkit.open(folder)


def test_a_shard_that_no_file_has_is_told_by_whose_it_was(copy: Callable[[str], Path]) -> None:
    folder = copy("sharded_tensor_files_2")
    changed(folder / "model_world_size_2_rank_1.pt", 1, 2, lambda tree: tree["emb.weight"]._local_shards.clear())
    with pytest.raises(
        CorruptError, match=r"tensor 'emb\.weight': its shard at \[7, 0\] .* in none .* it was rank 1's"
    ):
        ckptkit.open(folder)


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("also", ["", "and damaged"])
def test_one_hostile_file_makes_the_folder_hostile(also: str, copy: Callable[[str], Path]) -> None:
    folder = copy("dtensor_files_2")
    torch.save({"rng": Attack(), "lr_scheduler": None}, folder / "extra_state_world_size_2_rank_1.pt")
    if not also:
        torch.save({"rng": Attack(), "lr_scheduler": None}, folder / "extra_state_world_size_2_rank_0.pt")
        with ckptkit.open(folder) as file:
            assert file.trust == "hostile"
        return
    (folder / "model_world_size_2_rank_0.pt").write_bytes(b"damaged")
    with pytest.raises(CkptkitError) as caught:
        ckptkit.open(folder)
    assert any(use.verdict == "dangerous" for use in caught.value.globals)  # type: ignore[attr-defined]


def test_files_that_are_days_apart_are_told(copy: Callable[[str], Path]) -> None:
    folder = copy("dtensor_files_2")
    old = folder / "optim_world_size_2_rank_0.pt"
    os.utime(old, (1e9, 1e9))
    with ckptkit.open(folder) as file:
        (told,) = [finding for finding in file.findings if finding.code == "saved-apart"]
    assert told.severity == "warning"
    assert re.match(rf"{old.name} was written \d+ days before \w+\.pt: files from two runs may be mixed", told.message)


# Names.


def saved(folder: Path, names: str, world: int = 2, **values: Any) -> None:
    for rank in range(world):
        torch.save({"w": torch.arange(3.0), **values}, folder / names.format(rank))


@pytest.mark.parametrize(
    "names",
    ["pytorch_model_fsdp_0_rank{}.bin", "rank_{}.pt", "x.rank_{}.pth", "world_size_2_rank_{}.pt", "a-rank-{}.pt"],
)
def test_files_are_known_by_a_ranks_number_alone(names: str, tmp_path: Path) -> None:
    saved(tmp_path, names)
    with ckptkit.open(tmp_path) as file:
        assert (file.format, list(file.state_dict)) == ("fsdp", ["w"])
        assert ("world_size" in names) != any(finding.code == "completeness-unknown" for finding in file.findings)


def test_what_lies_beside_a_model_is_told_by_its_name(tmp_path: Path) -> None:
    saved(tmp_path, "pytorch_model_fsdp_0_rank{}.bin")
    saved(tmp_path, "optimizer_0_rank{}.bin")
    saved(tmp_path, "more_things_rank{}.bin")
    assert list(ckptkit.load(tmp_path)) == ["model", "optimizer", "more_things"]


def test_of_several_steps_none_is_taken(tmp_path: Path) -> None:
    for step in (4, 40):
        saved(tmp_path, f"model_{step:04}.rank_{{}}.pth", step=step)
    with pytest.raises(CorruptError, match=r"2 steps lie here \(0004, 0040\); name one with --tag"):
        ckptkit.open(tmp_path)
    with pytest.raises(CorruptError, match=r"'0400' is not one of them"):
        ckptkit.open(tmp_path, tag="0400")
    assert ckptkit.load(tmp_path, tag="0040")["step"] == 40
    (tmp_path / "global_step_7" / "actor").mkdir(parents=True)
    saved(tmp_path / "global_step_7" / "actor", "model_world_size_2_rank_{}.pt", step=7)
    assert ckptkit.load(tmp_path / "global_step_7", tag="actor")["step"] == 7
    assert ckptkit.load(tmp_path / "global_step_7")["step"] == 7


# Flat parameters.


@pytest.mark.parametrize("case", ["flat_params", "flat_params_padded"])
def test_flat_parameters_are_cut_by_the_model(case: str, sharded: Samples, tmp_path: Path, same_bits: SameBits) -> None:
    folder, model = sharded[case].folder, sharded[case].expected["model"]
    torch.save(model, tmp_path / "model.pth")
    for name in ("w.safetensors", "w.pth"):
        ckptkit.convert(folder, tmp_path / name, like=tmp_path / "model.pth")
        found = ckptkit.load_state_dict(tmp_path / name)
        assert list(found) == list(model)
        same(dict(found), model, same_bits)
    with ckptkit.open(folder) as file:
        assert file.checkpoint.part is not None
        (told,) = [finding for finding in file.findings if finding.code == "part-of-a-checkpoint"]
    assert "does not contain their names and shapes; ckptkit convert --like REF splits them" in told.message
    assert ckptkit.load(folder, allow_part=True)["iteration"] == 3
    with pytest.raises(PartError, match="--like REF"):
        ckptkit.convert(folder, tmp_path / "no.pth")
    with pytest.raises(PartError, match="--like REF"):
        ckptkit.load_state_dict(folder)
    assert not (tmp_path / "no.pth").exists()


def test_flat_parameters_whose_names_are_not_there_are_cut_with_their_padding(
    copy: Callable[[str], Path], sharded: Samples, tmp_path: Path, same_bits: SameBits
) -> None:
    folder, model = copy("flat_params_padded"), sharded["flat_params_padded"].expected["model"]

    def without_names(tree: Any) -> None:
        for name in [name for name in tree["model"] if name.endswith(("weight", "bias"))]:
            del tree["model"][name]

    for rank in range(2):
        changed(folder / f"model_final.rank_{rank}.pth", rank, 2, without_names)
    torch.save(model, tmp_path / "model.pth")
    ckptkit.convert(folder, tmp_path / "w.pth", like=tmp_path / "model.pth")
    same(dict(ckptkit.load_state_dict(tmp_path / "w.pth")), model, same_bits)


def test_a_part_of_the_model_is_cut_alone(sharded: Samples, tmp_path: Path, same_bits: SameBits) -> None:
    model = sharded["flat_params"].expected["model"]
    block = {name.removeprefix("blocks.1."): value for name, value in model.items() if name.startswith("blocks.1.")}
    torch.save(block, tmp_path / "block.pth")
    for case in ("flat_params", "flat_params_padded"):
        with pytest.raises(RewriteError, match=r"2 parts of the saved names fit .* equally well: blocks\.0, blocks\.1"):
            ckptkit.convert(sharded[case].folder, tmp_path / "w.pth", like=tmp_path / "block.pth", force=True)
        ckptkit.convert(
            sharded[case].folder, tmp_path / "w.pth", like=tmp_path / "block.pth", strip_prefix="blocks.1.", force=True
        )
        same(dict(ckptkit.load_state_dict(tmp_path / "w.pth")), block, same_bits)


def test_flat_parameters_are_not_cut_by_another_model(sharded: Samples, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, model = sharded["flat_params"].folder, sharded["flat_params"].expected["model"]
    others = {
        "less": {name: value for name, value in model.items() if name != "tiny.bias"},
        "more": {**model, "more.weight": torch.ones(3)},
        "other": {**model, "head.weight": torch.ones(13, 7)},
    }
    for name, other in others.items():
        torch.save(other, tmp_path / f"{name}.pth")
        with pytest.raises(RewriteError, match=r"flat parameter '_flat_param' has 229 elements, but the parameters of"):
            ckptkit.convert(folder, tmp_path / "w.pth", like=tmp_path / f"{name}.pth")
    save_file(dict(model), tmp_path / "sorted.safetensors")
    with pytest.raises(RewriteError, match=r"in the order of the model's parameters, and .* does not keep it"):
        ckptkit.convert(folder, tmp_path / "w.pth", like=tmp_path / "sorted.safetensors")
    # With names in the files the order is known.
    ckptkit.convert(sharded["flat_params_padded"].folder, tmp_path / "w.pth", like=tmp_path / "sorted.safetensors")
    assert ckptkit.load_state_dict(tmp_path / "w.pth")["head.weight"].shape == (13, 6)


@pytest.mark.parametrize("case", ["sharded_tensor_files_2", "dtensor_files_2", "dtensor_files_hsdp"])
@pytest.mark.parametrize("by_parameter", [False, True])
def test_the_moments_of_flat_parameters_are_put_together(
    by_parameter: bool, case: str, copy: Callable[[str], Path], sharded: Samples, same_bits: SameBits
) -> None:
    """As `optimizer.state_dict()` in FSDP's first version has them, of a rank that has nothing of one nothing."""
    folder, model = copy(case), sharded[case].expected["model"]
    world = len(list(folder.glob("model_*")))
    shapes = [value.shape for name, value in model.items() if name.endswith(("weight", "bias"))]
    moments = [torch.randn(shape.numel()) for shape in shapes] if by_parameter else [torch.randn(50), torch.randn(30)]
    for rank in range(world):
        place = rank % 2  # of the mesh of 2 x 2 the second dimension
        halves = [moment.numel() // 2 for moment in moments]
        parts = [
            (moment[half:] if place else moment[:half]).clone() for moment, half in zip(moments, halves, strict=True)
        ]
        parts[0] = moments[0] if place else moments[0][:0]
        state = {n: {"step": torch.tensor(3.0), "exp_avg": part} for n, part in enumerate(parts) if part.numel()}
        groups = [{"lr": 0.1, "params": [*range(len(moments))]}]
        torch.save({"state": state, "param_groups": groups}, folder / f"optim_world_size_{world}_rank_{rank}.pt")
    found = ckptkit.load(folder)["optimizer"]["state"]
    assert sorted(found) == [*range(len(moments))]
    for number, moment in enumerate(moments):
        assert same_bits(found[number]["exp_avg"], moment.reshape(shapes[number]) if by_parameter else moment)
    with ckptkit.open(folder) as file:
        told = [finding for finding in file.findings if finding.code == "flat-optimizer"]
        where = {replica.where for replica in file.checkpoint.replicas if replica.name.endswith("1.exp_avg")}
    assert bool(told) != by_parameter
    assert where == ({"rank 0 and rank 2", "rank 1 and rank 3"} if world == 4 else set())


def test_a_section_is_named_as_in_a_file(sharded: Samples) -> None:
    with pytest.raises(SectionError):
        ckptkit.open(sharded["dtensor_files_2"].folder, section="nothing")
    with ckptkit.open(sharded["dtensor_files_2"].folder, section="model") as file:
        assert file.checkpoint.origin.state_path == "model"
