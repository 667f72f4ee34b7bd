"""Which checkpoint a folder stands for: itself, the step that it points to, the one in it, the one that is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckptkit
from ckptkit import formats
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError
from ckptkit.formats.distributed.around import found_in, pointed, sharded_at, sharded_in

if not hasattr(dcp, "save"):
    pytest.skip(f"torch {torch.__version__} has no torch.distributed.checkpoint.save (2.2)", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(4, 3), "a.bias": torch.ones(4)}

Step = Callable[..., Path]


@pytest.fixture
def step(tmp_path: Path) -> Step:
    """``step("runs/step-10", number=10)``: a folder of torch.distributed.checkpoint."""

    def write(name: str, number: int = 1, **tree: Any) -> Path:
        path = tmp_path / name
        dcp.save(tree or {"model": WEIGHTS, "step": number}, checkpoint_id=path, no_dist=True)
        return path

    return write


def number(path: Path, **options: Any) -> Any:
    with ckptkit.open(path, **options) as file:
        return dict(file.rest.items())["step"]  # type: ignore[attr-defined]


# What points to the last step.


@pytest.mark.parametrize(
    ("pointer", "text", "name"),
    [
        ("latest", "global_step20", "global_step20"),
        ("latest", "runs/best\n", "runs/best"),
        ("latest_universal", "global_step20_universal", "global_step20_universal"),
        ("latest_checkpointed_iteration.txt", "20\n", "iter_0000020"),
        ("latest_checkpointed_iteration.txt", "release", "release"),
    ],
)
def test_the_step_that_is_named_is_opened(pointer: str, text: str, name: str, step: Step, tmp_path: Path) -> None:
    step(name, 20)
    step("global_step100", 100)
    (tmp_path / pointer).write_text(text)
    assert number(tmp_path) == 20
    found = sharded_in(str(tmp_path))
    assert found is not None and (found.root, found.tag) == (str(tmp_path / name), name)
    (finding,) = found.findings
    assert (finding.code, finding.severity) == ("step-chosen", "info")
    assert f"{name!r}, as {pointer} says; others: global_step100" in finding.message
    assert number(tmp_path, tag="global_step100") == 100
    document = ckptkit.inspect(tmp_path)
    assert document["path"] == str(tmp_path) and document["layout"] == {
        "world_size": 1, "mesh": None, "files": 2, "tag": name
    }  # fmt: skip


def test_a_number_is_that_of_the_folder_whose_name_ends_so(step: Step, tmp_path: Path) -> None:
    step("global_step_10/actor", 10)
    step("global_step_110/actor", 110)
    torch.save({"state": torch.ones(2)}, tmp_path / "global_step_10" / "data.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert number(tmp_path) == 10 and number(tmp_path, tag="110") == 110
    found = sharded_in(str(tmp_path))
    assert found is not None and (found.tag, found.root) == ("global_step_10", str(tmp_path / "global_step_10/actor"))


def test_a_link_to_the_last_step(step: Step, tmp_path: Path) -> None:
    step("step-10", 10)
    step("step-20", 20)
    (tmp_path / "latest").symlink_to("step-10")
    found = sharded_in(str(tmp_path))
    assert found is not None and found.tag == "step-10" and number(tmp_path) == 10
    assert "others: step-20 (" in found.findings[0].message


@pytest.mark.parametrize("pointer", ["latest", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("../other", "which leads out of the folder"),
        ("/etc", "which leads out of the folder"),
        ("..", "which leads out of the folder"),
        ("a/../../b", "which leads out of the folder"),
        ("x\0y", "which leads out of the folder"),
        ("", "does not contain the name of a folder"),
        ("two\nlines", "does not contain the name of a folder"),
        ("x" * 300, "does not contain the name of a folder"),
        ("\udc80", "does not contain the name of a folder"),
        ("gone", r"names 'gone', which does not exist; available: step-10, step-20 \(--tag NAME selects one\)"),
    ],
)
def test_what_names_no_step_is_an_error(pointer: str, text: str, words: str, step: Step, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    step("runs/step-10", 10)
    step("runs/step-20", 20)
    (tmp_path / "other").mkdir()
    (folder / pointer).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptError, match=words) as caught:
        formats.read(folder)
    assert caught.value.path == str(folder / pointer)
    assert number(folder, tag="step-10") == 10, "whoever says which step needs no such file"


def test_a_step_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").write_text("empty")
    with pytest.raises(CorruptError, match=r"latest: names 'empty', which is a folder, not a file"):
        formats.read(tmp_path)
    assert sharded_in(str(tmp_path)) is None


def test_a_file_called_latest_among_others_means_nothing_to_those_who_walk(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("version 1.2")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert sharded_in(str(tmp_path)) is None
    assert ckptkit.check(tmp_path).exit_code == 0
    with pytest.raises(CorruptError, match=r"which does not exist$"):
        ckptkit.open(tmp_path)


def test_folders_that_point_to_one_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "latest").write_text("again")
    for reading in (pointed, lambda path: None):
        reading(str(tmp_path / "a"))
    with pytest.raises(CorruptError, match="in a loop"):
        formats.read(tmp_path / "a")
    with pytest.raises(CorruptError, match="in a loop"):
        sharded_in(str(tmp_path / "a"))


# Several steps, and one that is chosen.


def test_several_steps_are_listed(step: Step, tmp_path: Path) -> None:
    for each in (2, 10, 100):
        step(f"checkpoint-{each}", each)
    with pytest.raises(
        FileAccessError, match=r"3 checkpoints are in this folder: checkpoint-2, checkpoint-10, chec"
    ) as e:
        formats.read(tmp_path)
    assert e.value.names == ("checkpoint-2", "checkpoint-10", "checkpoint-100")
    assert str(e.value).endswith("--tag checkpoint-100")
    assert number(tmp_path, tag="checkpoint-10") == 10
    assert number(tmp_path, tag="10") == 10, "by the number alone"
    assert number(tmp_path / "checkpoint-2", tag="checkpoint-2") == 2
    with pytest.raises(
        MissingFileError, match=r"no step '7' is in this folder; available: checkpoint-2, checkpoint-10"
    ):
        formats.read(tmp_path, tag="7")
    for tag in ("..", "../x", "/etc", "a//b", ""):
        with pytest.raises(FileAccessError, match="is not the name of a folder in it"):
            formats.read(tmp_path, tag=tag)
    with ckptkit.open(tmp_path, tag="checkpoint-2") as file:
        assert file.path == str(tmp_path) and file.checkpoint.origin.options == ("--tag", "checkpoint-2")
        assert file.checkpoint.origin.spread is not None and file.checkpoint.origin.spread.tag == "checkpoint-2"


def test_one_step_alone_is_opened(step: Step, tmp_path: Path) -> None:
    step("checkpoint-2", 2)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("x")
    assert number(tmp_path) == 2


def test_the_tag_that_is_told_can_be_typed(step: Step, tmp_path: Path, save: Any) -> None:
    for each in (10, 20):
        step(f"run/global_step_{each}/actor", each)
        step(f"run/global_step_{each}/critic", -each)
        torch.save({"pos": 3}, tmp_path / "run" / f"global_step_{each}" / "data.pt")  # never the checkpoint
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    for folder, tag, before in ((tmp_path, None, "run/"), (tmp_path / "run", None, ""), (tmp_path / "run", "10", "")):
        with pytest.raises(FileAccessError, match="2 checkpoints are in this folder: actor, critic; ") as e:
            formats.read(folder, tag=tag)
        told = f"{before}global_step_{tag or 20}/critic"
        assert str(e.value).endswith(f"--tag {told}")
        assert number(folder, tag=told) == -int(tag or 20)


def test_a_tag_is_for_folders(tmp_path: Path, save: Any) -> None:
    path = save(WEIGHTS)
    for given in (path, path.read_bytes()):
        with pytest.raises(
            FileAccessError, match="--tag x chooses one of several steps in a folder, and this is a file"
        ):
            formats.read(given, tag="x")
    with ckptkit.open(tmp_path, tag="model.pth") as file:
        assert file.path == str(path)


# transformers' Trainer.


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    for each in (10, 20):
        folder = tmp_path / f"checkpoint-{each}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
            torch.save({"w": torch.ones(1)}, folder / name)
        (folder / "trainer_state.json").write_text("{}")
        save_file(WEIGHTS, folder / "model.safetensors")
    return tmp_path


def test_the_weights_in_a_trainers_folder(trainer: Path, step: Step) -> None:
    folder = trainer / "checkpoint-10"
    with ckptkit.open(folder) as file:
        assert file.path == str(folder / "model.safetensors")
    with ckptkit.open(trainer, tag="20") as file:
        assert file.path == str(trainer / "checkpoint-20" / "model.safetensors")
    with pytest.raises(FileAccessError, match="2 checkpoints are in this folder: checkpoint-10, checkpoint-20"):
        ckptkit.open(trainer)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileAccessError, match=r"4 checkpoints are in this folder: optimizer.pt, rng_state.pth, "):
        ckptkit.open(folder)
    save_file({"a.weight": WEIGHTS["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"a.bias": WEIGHTS["a.bias"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a.weight": "model-00001-of-00002.safetensors", "a.bias": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with ckptkit.open(folder) as file:
        assert file.path == str(folder / "model.safetensors.index.json") and len(file.state_dict) == 2
    step("checkpoint-10/global_step10", 10)
    (folder / "latest").write_text("global_step10")
    assert number(trainer, tag="checkpoint-10") == 10, "what is trained goes before what was gathered from it"


def test_what_ranks_wrote_goes_before_what_was_consolidated(tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    save_file(WEIGHTS, tmp_path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    offsets = json.dumps({name: {"saved_offsets": [0] * value.dim()} for name, value in WEIGHTS.items()})
    save_file(
        WEIGHTS,
        tmp_path / "sharded" / "shard-00001-model-00001-of-00001.safetensors",
        {"DCP_SHARDING_INFO": offsets, "DCP_VERSION": "1.0"},
    )
    with ckptkit.open(tmp_path) as file:
        assert file.format == "safetensors-dcp"
    with ckptkit.open(tmp_path / "model.safetensors.index.json") as file:
        assert file.format == "safetensors-sharded"
    assert ckptkit.diff(tmp_path, tmp_path / "model.safetensors.index.json").ok


# Put together from several.


def test_accelerates_folders_are_one_resume_dict(step: Step, tmp_path: Path) -> None:
    optimizer = {"state": {"a.weight": {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1}]}
    step("ckpt/pytorch_model_fsdp_0", model=WEIGHTS)
    step("ckpt/optimizer_0", optimizer=optimizer)
    step("ckpt/pytorch_model_fsdp_1", model={"b": torch.ones(2)})
    torch.save({"last_epoch": 3}, tmp_path / "ckpt" / "scheduler.bin")
    with ckptkit.open(tmp_path / "ckpt") as file:
        assert (file.format, file.kind) == ("dcp", "resume")
        assert [(s.path, s.kind, s.selected) for s in file.sections] == [
            ("model", "state_dict", True), ("model_1", "state_dict", False), ("optimizer", "optimizer", False)
        ]  # fmt: skip
        assert file.checkpoint.unread is not None
        keys = [file.state_dict["a.weight"].storage.key, file.rest]
        assert str(keys[0]).startswith("pytorch_model_fsdp_0/")
    loaded = ckptkit.load(tmp_path / "ckpt")
    assert list(loaded) == ["model", "model_1", "optimizer"]
    assert torch.equal(loaded["model"]["a.weight"], WEIGHTS["a.weight"])
    assert torch.equal(loaded["optimizer"]["state"]["a.weight"]["exp_avg"], torch.ones(4, 3))
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.1}]
    report = ckptkit.check(tmp_path)
    assert report.exit_code == 0
    assert [Path(result.path).name for result in report.results] == ["ckpt", "scheduler.bin"], "the rest is not hidden"
    (tmp_path / "ckpt" / "optimizer_0" / "__0_0.distcp").unlink()
    with pytest.raises(CorruptError, match=r"optimizer_0/.*1 file is missing: __0_0.distcp"):
        ckptkit.open(tmp_path / "ckpt")


def test_lightnings_folder_has_the_rest_in_a_file(step: Step, tmp_path: Path) -> None:
    folder = step("epoch=1.ckpt", model=WEIGHTS, optimizer_0={"state": {"a.bias": {"exp_avg": torch.ones(4)}}})
    torch.save({"epoch": 1, "global_step": 10, "loops": {"fit": [torch.ones(2)]}}, folder / "meta.pt")
    loaded = ckptkit.load(folder)
    assert list(loaded) == ["model", "optimizer_0", "epoch", "global_step", "loops"]
    assert loaded["global_step"] == 10 and torch.equal(loaded["model"]["a.bias"], WEIGHTS["a.bias"])
    with ckptkit.open(folder) as file:
        assert file.kind == "resume" and file.checkpoint.origin.spread is not None
        assert file.checkpoint.origin.spread.files == 3
    assert [Path(result.path) for result in ckptkit.check(tmp_path).results] == [folder]
    torch.save({"model": 1}, folder / "meta.pt")
    with pytest.raises(CorruptError, match="'model' is there twice"):
        ckptkit.open(folder)


# Shards without an index.


@pytest.mark.parametrize(("ending", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
def test_shards_that_are_all_there_need_no_index(ending: str, stem: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write = save_file if ending == ".safetensors" else torch.save
    names = [f"{stem}-{number:05}-of-00003{ending}" for number in (1, 2, 3)]
    parts = [{"a.weight": WEIGHTS["a.weight"]}, {"a.bias": WEIGHTS["a.bias"]}, {"c": torch.ones(2)}]
    for name, part in zip(names, parts, strict=True):
        write(part, folder / name)
    with ckptkit.open(folder) as file:
        assert file.format == ("safetensors-sharded" if ending == ".safetensors" else "torch-sharded")
        assert list(file.state_dict) == ["a.weight", "a.bias", "c"] and not file.findings[1:]
        assert file.checkpoint.origin.size == sum((folder / name).stat().st_size for name in names)
    assert torch.equal(ckptkit.load_state_dict(folder)["a.weight"], WEIGHTS["a.weight"])
    ckptkit.convert(folder, tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth").keys() == {"a.weight", "a.bias", "c"}
    report = ckptkit.check(folder)
    assert report.exit_code == 0 and [result.path for result in report.results] == [str(folder)]
    write({"a.bias": torch.ones(1)}, folder / names[2])
    with pytest.raises(CorruptError, match=r"1 name in two shards: 'a.bias'"):
        ckptkit.open(folder)
    (folder / names[2]).unlink()
    with pytest.raises(CorruptError, match=f"1 shard missing: {names[2]}; get it into the folder") as caught:
        ckptkit.open(folder)
    assert caught.value.names == (names[2],)
    assert sharded_at(str(folder)) is None, "in a walk each is a part"
    (folder / names[0]).unlink()
    with pytest.raises(CorruptError, match=f"2 shards missing: {names[0]}, {names[2]}; get them into the folder"):
        ckptkit.open(folder)


def test_shards_of_two_checkpoints_are_not_merged(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        for each in (1, 2):
            save_file({f"{stem}{each}": torch.ones(1)}, tmp_path / f"{stem}-{each:05}-of-00002.safetensors")
    with pytest.raises(FileAccessError, match=r"4 checkpoints are in this folder: a-00001-of-00002.safetensors"):
        ckptkit.open(tmp_path)


# Files with numbers of their own.


def test_numbers_that_are_no_ranks(tmp_path: Path) -> None:
    for each in (4, 8, 16):
        save_file(WEIGHTS, tmp_path / f"lora_rank{each}.safetensors")
        torch.save(WEIGHTS, tmp_path / f"lora_rank{each}.pth")
    assert sharded_at(str(tmp_path)) is None
    assert len(ckptkit.check(tmp_path).results) == 6
    torch.save({"_flat_param": torch.ones(5)}, tmp_path / "lora_rank4.pth")
    found = sharded_at(str(tmp_path))
    assert found is not None and found.layout == "fsdp"


# One file.


def test_the_one_checkpoint_in_a_folder(tmp_path: Path, save: Any) -> None:
    folder = tmp_path / "release"
    (folder / "docs").mkdir(parents=True)
    (folder / "README.md").write_text("words")
    (folder / "scores.pkl").write_bytes(b"\x80\x04]q\x00.")
    torch.save(WEIGHTS, folder / "epoch.10")
    (folder / "loop").symlink_to("loop")
    assert ckptkit.load_state_dict(folder).keys() == WEIGHTS.keys()
    with ckptkit.open(tmp_path) as file:
        assert file.path == str(folder / "epoch.10"), "also one folder further down"
    found = found_in(str(folder))
    assert found is not None and found.layout is None
