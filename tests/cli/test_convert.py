"""``ckptkit convert``: torch and safetensors judge what it writes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torchvision.models import get_model


def bare(state_dict: dict) -> dict:
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def test_strip_module_to_safetensors(run, ddp_resume: Path, tmp_path: Path, same_bits) -> None:
    refused = run("convert", ddp_resume, "clean.safetensors", "--strip-module")
    assert refused.returncode == 2
    assert "cannot store what is beside the weights (epoch, arch, best_acc1, optimizer, scheduler" in refused.stderr
    assert os.listdir(tmp_path) == []
    done = run("convert", ddp_resume, "clean.safetensors", "--strip-module", "--weights-only")
    assert done.returncode == 0, done.stderr
    assert "not in the output: epoch" in done.stderr
    expected = bare(torch.load(ddp_resume, map_location="cpu", weights_only=False)["state_dict"])
    written = safetensors.torch.load_file(tmp_path / "clean.safetensors")
    assert written.keys() == expected.keys()
    assert all(same_bits(written[name], expected[name]) for name in expected)
    model = get_model("mobilenet_v2", width_mult=0.1, num_classes=10).eval()
    model.load_state_dict(written, strict=True)


def test_strip_module_to_pth_keeps_the_training_state(run, ddp_resume: Path, tmp_path: Path, same_bits) -> None:
    done = run("convert", ddp_resume, "clean.pth", "--strip-module", "--map-location", "cpu")
    assert done.returncode == 0, done.stderr
    source = torch.load(ddp_resume, map_location="cpu", weights_only=False)
    written = torch.load(tmp_path / "clean.pth", weights_only=False)  # no map_location: the tags say cpu
    assert list(written) == list(source)
    assert written["args"] == source["args"]
    assert isinstance(written["args"], argparse.Namespace)
    assert (written["epoch"], written["arch"], written["best_acc1"]) == (
        source["epoch"],
        source["arch"],
        source["best_acc1"],
    )
    assert written["scheduler"] == source["scheduler"]
    expected = bare(source["state_dict"])
    assert list(written["state_dict"]) == list(expected)
    assert all(same_bits(written["state_dict"][name], expected[name]) for name in expected)
    versions = {k.removeprefix("module").lstrip("."): v for k, v in source["state_dict"]._metadata.items()}
    assert dict(written["state_dict"]._metadata) == versions
    model = get_model("mobilenet_v2", width_mult=0.1, num_classes=10)
    model.load_state_dict(written["state_dict"], strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(written["optimizer"])
    for old, new in zip(source["optimizer"]["state"].values(), written["optimizer"]["state"].values(), strict=True):
        assert same_bits(old["momentum_buffer"], new["momentum_buffer"])


def test_outputs_before_and_after_are_equal(run, save, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.DataParallel(get_model("squeezenet1_1", num_classes=4)).eval()
    image = torch.rand(1, 3, 64, 64)
    before = model(image)
    run("convert", save(model.state_dict(), "a.pth", device="cuda:3"), "b.safetensors", "--strip-module")
    fresh = get_model("squeezenet1_1", num_classes=4).eval()
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "b.safetensors"), strict=True)
    assert torch.equal(before, fresh(image))


def test_safetensors_to_pth(run, tmp_path: Path) -> None:
    state = {"w": torch.rand(3, 4), "h": torch.rand(2).bfloat16(), "u": torch.tensor([1, 2], dtype=torch.uint8)}
    if hasattr(torch, "uint16"):
        state["v"] = torch.tensor([1, 2], dtype=torch.uint16)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert run("convert", "a.safetensors", "b.pth").returncode == 0
    loaded = torch.load(tmp_path / "b.pth")  # weights_only
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)


def test_add_and_strip_prefixes(run, save, tmp_path: Path) -> None:
    path = save(torch.nn.Linear(2, 2).state_dict())
    assert run("convert", path, "ddp.pth", "--add-module").returncode == 0
    assert list(torch.load(tmp_path / "ddp.pth")) == ["module.weight", "module.bias"]
    assert run("convert", "ddp.pth", "b.pth", "--strip-prefix", "module", "--add-prefix", "net.head").returncode == 0
    assert list(torch.load(tmp_path / "b.pth")) == ["net.head.weight", "net.head.bias"]


def test_module_inside_a_name_is_left_alone(run, save, tmp_path: Path) -> None:
    names = ["mlp_module.module.weight", "module_list.0.weight", "net.module.bias"]
    done = run("convert", save({name: torch.ones(1) for name in names}), "b.pth", "--strip-module")
    assert done.returncode == 0
    assert "none of 3 names has the prefix" in done.stderr
    assert list(torch.load(tmp_path / "b.pth")) == names


def test_a_collision_names_both_and_writes_nothing(run, save, tmp_path: Path) -> None:
    path = save({"module.w": torch.ones(1), "w": torch.zeros(1)})
    done = run("convert", path, "b.pth", "--strip-module")
    assert done.returncode == 2
    assert "'module.w' and 'w' would both be named 'w'" in done.stderr
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["cpu"], ["cpu", "cpu"]),
        (["cuda:1=cuda:0"], ["cuda:0", "cuda:0"]),
        (["cuda:0=cpu", "cuda:1=mps"], ["cpu", "mps"]),
    ],
)
def test_map_location(run, save, tmp_path: Path, given: list[str], expected: list[str]) -> None:
    tags = iter(["cuda:0", "cuda:1"])
    path = save({"a": torch.ones(1), "b": torch.ones(2)}, device=lambda storage: next(tags))
    options = [part for location in given for part in ("--map-location", location)]
    assert run("convert", path, "b.pth", *options).returncode == 0
    (file,) = json.loads(run("inspect", "--json", "b.pth").stdout)["files"]
    assert [t["location"] for t in file["tensors"]] == expected


@pytest.mark.parametrize(
    "given", [["cpu", "cuda:0"], ["cpu", "cuda:0=cpu"], ["no where"], ["meta"], ["a=b=c"], ["a=cpu"] * 2]
)
def test_map_location_refused(run, save, tmp_path: Path, given: list[str]) -> None:
    options = [part for location in given for part in ("--map-location", location)]
    done = run("convert", save({"a": torch.ones(1)}), "b.pth", *options)
    assert done.returncode == 2
    assert not (tmp_path / "b.pth").exists()


def test_a_device_that_nothing_is_on_is_told(run, save) -> None:
    path = save({"a": torch.ones(1)}, device="cuda:0")
    done = run("convert", path, "b.pth", "--map-location", "cuda:1=cpu", "--map-location", "cuda:0=cpu")
    assert done.returncode == 0
    assert "nothing in the file is on 'cuda:1'; it has cuda:0 [nothing-moved]" in done.stderr
    assert "'cuda:0';" not in done.stderr.replace("tagged 'cuda:1'", "")


def test_one_file_where_an_index_was_asked_for_is_told(run, save, tmp_path: Path) -> None:
    path = save({"a": torch.ones(1)})
    done = run("convert", path, "x.safetensors.index.json")
    assert "fits into one file: x.safetensors, so no index is written [not-sharded]" in done.stderr
    assert (tmp_path / "x.safetensors").exists() and not (tmp_path / "x.safetensors.index.json").exists()
    assert "not-sharded" not in run("convert", path, "y.safetensors").stderr
    two = save({"a": torch.ones(9), "b": torch.ones(9)})
    assert "not-sharded" not in run("convert", two, "z.safetensors.index.json", "--max-shard-size", "40B").stderr


@pytest.mark.parametrize("options", [[], ["--max-shard-size", "40B"]])
def test_a_folder_that_is_not_there_is_told_with_what_makes_it(run, save, tmp_path: Path, options: list[str]) -> None:
    path = save({"a": torch.ones(9), "b": torch.ones(9)})
    done = run("convert", path, "no such/folder/x.safetensors", *options)
    assert done.returncode == 2
    assert "the folder no such/folder does not exist; create it first: mkdir -p 'no such/folder'" in done.stderr
    (tmp_path / "no such" / "folder").mkdir(parents=True)
    assert run("convert", path, "no such/folder/x.safetensors", *options).returncode == 0


def test_unknown_objects_survive_unexecuted(run, save, tmp_path: Path) -> None:
    from datetime import timedelta

    path = save({"model": {"w": torch.ones(1)}, "took": timedelta(seconds=3), "dims": {(1, 2): {3, 4}}, "f": print})
    assert run("convert", path, "b.pth").returncode == 0
    written = torch.load(tmp_path / "b.pth", weights_only=False)
    assert written["took"] == timedelta(seconds=3)
    assert written["dims"] == {(1, 2): {3, 4}}
    assert written["f"] is print


def test_weights_only(run, ddp_resume: Path, tmp_path: Path) -> None:
    assert run("convert", ddp_resume, "w.pth", "--weights-only", "--map-location", "cpu").returncode == 0
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    assert len(state) == 314
    assert (tmp_path / "w.pth").stat().st_size < ddp_resume.stat().st_size


def test_ties(run, save, tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Embedding(5, 3)
            self.decoder = torch.nn.Linear(3, 5, bias=False)
            self.decoder.weight = self.encoder.weight

    model = Tied()
    path = save(model.state_dict())
    assert run("convert", path, "b.safetensors", "--no-receipt").returncode == 0
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert list(file.keys()) == ["encoder.weight"]
        metadata = file.metadata()
    assert json.loads(metadata.pop("torch._metadata")) == dict(model.state_dict()._metadata)
    assert metadata == {"format": "pt", "decoder.weight": "encoder.weight"}
    fresh = Tied()
    missing, unexpected = safetensors.torch.load_model(fresh, tmp_path / "b.safetensors")
    assert (missing, unexpected) == (set(), [])
    assert torch.equal(fresh.encoder.weight, model.encoder.weight)
    assert run("convert", "b.safetensors", "c.pth").returncode == 0
    back = torch.load(tmp_path / "c.pth")
    assert back["encoder.weight"].data_ptr() == back["decoder.weight"].data_ptr()
    assert set(back) == {"encoder.weight", "decoder.weight"}


def test_what_safetensors_cannot_hold_is_refused_by_name(run, save, tmp_path: Path) -> None:
    done = run("convert", save({"z": torch.ones(1, dtype=torch.complex128)}), "b.safetensors")
    assert done.returncode == 2
    assert "z (complex128)" in done.stderr
    done = run("convert", save({"w": torch.ones(1), "s": torch.eye(2).to_sparse()}), "b.safetensors")
    assert done.returncode == 2
    assert (
        "values that are not plain tensors (s (sparse COO [2, 2] float32, 2 values stored)): --exclude s" in done.stderr
    )
    assert not (tmp_path / "b.safetensors").exists()


def test_several_sections_ask(run, save, tmp_path: Path) -> None:
    path = save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}, "epoch": 3})
    done = run("convert", path, "b.safetensors")
    assert done.returncode == 2
    assert "several sections contain weights ('model', 'ema')" in done.stderr
    chosen = run("convert", path, "b.safetensors", "--section", "ema")
    assert chosen.returncode == 2
    assert "beside the weights (model, epoch)" in chosen.stderr
    assert run("convert", path, "b.safetensors", "--section", "ema", "--weights-only").returncode == 0
    assert torch.equal(safetensors.torch.load_file(tmp_path / "b.safetensors")["w"], torch.zeros(1))
    # Nothing needs to be chosen to move devices and keep everything.
    assert run("convert", path, "b.pth", "--map-location", "cpu").returncode == 0
    assert torch.load(tmp_path / "b.pth")["epoch"] == 3


def test_an_existing_destination_needs_force(run, save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(1)})
    (tmp_path / "b.safetensors").write_bytes(b"precious")
    done = run("convert", path, "b.safetensors")
    assert done.returncode == 2
    assert "already exists; --force overwrites it" in done.stderr
    assert (tmp_path / "b.safetensors").read_bytes() == b"precious"
    assert run("convert", path, "b.safetensors", "--force").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["b.safetensors", "model.pth"]


def test_onto_itself(run, save) -> None:
    path = save({"module.w": torch.ones(7)})
    assert run("convert", path, path, "--strip-module").returncode == 2
    assert run("convert", path, path, "--strip-module", "--force").returncode == 0
    assert list(torch.load(path)) == ["w"]


def test_a_flipped_bit_in_the_source_is_found(run, save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(4000)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes()) + 400] ^= 0x40
    path.write_bytes(data)
    torch.load(path)  # torch does not notice
    done = run("convert", path, "b.safetensors")
    assert done.returncode == 2
    assert "the file is damaged" in done.stderr
    assert "w" in done.stderr
    assert not (tmp_path / "b.safetensors").exists()


def test_dry_run_writes_nothing(run, ddp_resume: Path, tmp_path: Path) -> None:
    options = [ddp_resume, "b.safetensors", "--strip-module", "--weights-only"]
    done = run("convert", *options, "--dry-run")
    assert done.returncode == 0
    assert "rename: module.features.0.0.weight -> features.0.0.weight" in done.stdout
    document = json.loads(run("convert", *options, "--dry-run", "--json", "--no-receipt").stdout)
    assert document["written"] is False
    assert len(document["renames"]) == 314
    assert os.listdir(tmp_path) == []
    assert run("convert", *options, "--no-receipt").returncode == 0
    assert (tmp_path / "b.safetensors").stat().st_size == document["plan"]["nbytes"]


def test_json_of_a_failure_is_json(run, tmp_path: Path) -> None:
    done = run("convert", "no.pth", "b.pth", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "MissingFileError"


def test_to_and_metadata(run, save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(1)})
    options = ["--to", "safetensors", "--metadata", "license=MIT", "--no-receipt"]
    assert run("convert", path, "b.weights", *options).returncode == 0
    with safetensors.safe_open(tmp_path / "b.weights", "pt") as file:
        assert file.metadata() == {"format": "pt", "license": "MIT"}
    assert run("convert", path, "b.weird").returncode == 2
    assert run("convert", path, "c.safetensors", "--metadata", "novalue").returncode == 2
    tie = run("convert", path, "c.safetensors", "--metadata", "best=w")
    assert tie.returncode == 2
    assert "metadata 'best': its value 'w' is a tensor's name" in tie.stderr


def test_quiet_and_progress(run, save) -> None:
    path = save({"module.w": torch.ones(1)})
    quiet = run("convert", path, "a.pth", "--strip-module", "-q")
    assert quiet.stdout + quiet.stderr == ""
    shown = run("convert", path, "b.pth", "--progress")
    assert "100%" in shown.stderr
