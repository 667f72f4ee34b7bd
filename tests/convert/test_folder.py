"""Folder to folder, and a folder for a destination: names, what is passed over, what cannot be converted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ckptkit
from ckptkit.conversion import convert_file, outputs
from ckptkit.conversion.folder import outcome
from ckptkit.errors import DestinationExistsError, FileAccessError, RewriteError
from ckptkit.options import ConvertOptions

Save = Callable[..., Path]


def below(path: Path) -> list[str]:
    """The files below a folder."""
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if not each.is_dir())


@pytest.fixture
def runs(save: Save, tmp_path: Path) -> Path:
    """A folder of checkpoints in several containers and folders, and of other files."""
    for name in ("runs/deep/er", "runs/hub"):
        (tmp_path / name).mkdir(parents=True)
    save({"module.w": torch.rand(3, 4), "module.b": torch.ones(2).bfloat16()}, "runs/best.pth.tar")
    torch.save({"w": torch.arange(3)}, tmp_path / "runs/old.bin", _use_new_zipfile_serialization=False)
    save({"w": torch.rand(2)}, "runs/deep/er/epoch.10")
    safetensors.torch.save_file({"w": torch.rand(5)}, tmp_path / "runs/deep/a.safetensors")
    save({"a": torch.rand(50), "b": torch.rand(50)}, "whole.pth")
    ckptkit.convert(tmp_path / "whole.pth", tmp_path / "runs/hub/model.safetensors", max_shard_size=300)
    (tmp_path / "whole.pth").unlink()
    (tmp_path / "runs/notes.txt").write_text("words")
    (tmp_path / "runs/deep/scores.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    return tmp_path / "runs"


def test_each_checkpoint_goes_to_the_same_place(convert, runs: Path, tmp_path: Path, same_bits) -> None:
    before = below(runs)
    done = convert("runs", "out/new", "--to", "safetensors", "--strip-module")
    assert done.code == 0, done.err
    outputs = ["best", "deep/a", "deep/er/epoch.10", "hub/model", "old"]
    assert below(tmp_path / "out/new") == [f"{name}.safetensors" for name in outputs]
    assert below(runs) == before
    source = torch.load(runs / "best.pth.tar")
    written = load_file(tmp_path / "out/new/best.safetensors")
    assert written.keys() == {"w", "b"}
    assert all(same_bits(written[name], source[f"module.{name}"]) for name in written)
    shards = {k: v for path in sorted((runs / "hub").glob("*.safetensors")) for k, v in load_file(path).items()}
    whole = load_file(tmp_path / "out/new/hub/model.safetensors")
    assert len(list((runs / "hub").glob("*.safetensors"))) == 2
    assert whole.keys() == shards.keys() and all(same_bits(whole[name], shards[name]) for name in whole)
    *files, passed, last = done.out.splitlines()
    assert {line.partition(": ")[0] for line in files} == {f"out/new/{name}.safetensors" for name in outputs}
    assert passed == "skipped: 2 files (1 pickle, 1 text file)"
    assert last.startswith("5 files converted, ")
    assert "runs/best.pth.tar: 2 of 2 names changed" in done.err
    assert "none of 1 name has the prefix (and likewise in 3 other files) [nothing-to-strip]" in done.err


def test_to_torch_zip(convert, runs: Path, tmp_path: Path) -> None:
    assert convert("runs/", "out/", "--to", "torch-zip").code == 0
    assert below(tmp_path / "out") == ["best.pth", "deep/a.pth", "deep/er/epoch.10.pth", "hub/model.pth", "old.pth"]
    assert torch.equal(torch.load(tmp_path / "out/deep/a.pth")["w"], load_file(runs / "deep/a.safetensors")["w"])
    assert convert("runs", "bins", "--to", "bin").code == 0
    assert below(tmp_path / "bins")[0] == "best.bin"


def test_the_document_has_every_file_and_what_was_passed_over(convert, runs: Path) -> None:
    (runs / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    done = convert("runs", "out", "--to", "safetensors", "--json")
    document = json.loads(done.out)
    assert (done.code, document["ok"], document["schema_version"]) == (2, False, 1)
    files = {file["source"]: file for file in document["files"]}
    assert len(files) == 6
    broken = files.pop("runs/broken.pth")
    assert broken["error"]["type"] == "CorruptError" and broken["destination"] == "out/broken.safetensors"
    assert not os.path.exists(broken["destination"])
    assert all(file["error"] is None and file["written"] and file["checked"] for file in files.values())
    assert document["passed_over"] == {"pickle": 1, "text file": 1}
    assert document["passed_over_files"] == {"runs/deep/scores.pkl": "pickle", "runs/notes.txt": "text file"}
    (finding,) = document["findings"]
    assert finding["code"] == "not-converted" and finding["message"].startswith("runs/broken.pth: ")
    assert files["runs/old.bin"]["source_nbytes"] == (runs / "old.bin").stat().st_size
    nbytes = sum(path.stat().st_size for path in (runs / "hub").iterdir())
    assert files["runs/hub/model.safetensors.index.json"]["source_nbytes"] == nbytes


def test_one_file_that_cannot_be_converted_stops_no_other(convert, save: Save, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    (tmp_path / "in" / "bad").mkdir(parents=True)
    save({"w": torch.ones(1)}, "in/first.pth")
    save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}}, "in/several.pth")
    save({"w": torch.ones(1), "e": Evil()}, "in/hostile.pth")
    save({"w": torch.ones(4000)}, "in/bad/flipped.pth")
    data = bytearray((tmp_path / "in/bad/flipped.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "in/bad/flipped.pth").write_bytes(data)
    (tmp_path / "in/bad/empty.pth").write_bytes(b"")
    save({"w": torch.ones(1)}, "in/zzz.pth")
    done = convert("in", "out", "--to", "safetensors")
    assert done.code == 2
    assert below(tmp_path / "out") == ["first.safetensors", "zzz.safetensors"]
    assert not (tmp_path / "out/bad").exists()
    assert not canary.exists()
    errors = [line for line in done.err.splitlines() if line.startswith("ckptkit: error: ")]
    assert len(errors) == 4
    for name, why in {
        "in/several.pth": "several sections contain weights",
        "in/hostile.pth": "cannot store",
        "in/bad/flipped.pth": "damaged",
        "in/bad/empty.pth": "the file is empty",
    }.items():
        assert any(line.startswith(f"ckptkit: error: {name}: ") and why in line for line in errors), name
    assert "2 of 6 files converted, " in done.out
    shutil.rmtree(tmp_path / "out")
    done = convert("in/bad", "out/bad", "--to", "safetensors")
    assert done.code == 2 and "0 of 2 files converted" in done.out
    assert not (tmp_path / "out").exists(), "nothing is left of folders that nothing was written into"


def test_two_sources_for_one_name_are_refused_before_anything_is_written(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.pth", "a.bin", "a.pth.tar", "deep/b.pt", "deep/b.ckpt", "c.pth"):
        save({"w": torch.ones(1)}, f"in/{name}")
    for options in ([], ["--force"], ["--dry-run"]):
        done = convert("in", "out", "--to", "safetensors", *options)
        assert done.code == 2
        assert done.err.splitlines() == [
            "ckptkit: error: 2 outputs would be written from several files; nothing was written:",
            "  out/a.safetensors: from in/a.bin, in/a.pth and in/a.pth.tar",
            "  out/deep/b.safetensors: from in/deep/b.ckpt and in/deep/b.pt",
        ]
    assert os.listdir(tmp_path) == ["in"]


def test_a_file_and_a_folder_of_one_name_are_refused(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.safetensors").mkdir(parents=True)
    save({"w": torch.ones(1)}, "in/a.pth")
    save({"w": torch.ones(1)}, "in/a.safetensors/b.pth")
    done = convert("in", "out", "--to", "safetensors")
    assert done.code == 2
    assert "from in/a.safetensors/b.pth and in/a.pth (as the folder's name)" in done.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_would_be_a_shard_of_another_is_refused(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save({"a": torch.ones(50), "b": torch.ones(50)}, "in/a.pth")
    save({"a": torch.ones(50)}, "in/a-00001-of-00002.pth")
    options = ["--to", "safetensors", "--allow-part"]
    done = convert("in", "out", *options, "--max-shard-size", "300B")
    assert done.code == 2
    assert "from in/a-00001-of-00002.pth and in/a.pth (as a shard's name)" in done.err
    assert convert("in", "out", *options).code == 0


@pytest.mark.parametrize("folds", [True, False])
def test_names_that_are_equal_but_for_case(save: Save, tmp_path: Path, monkeypatch, folds: bool) -> None:
    (tmp_path / "in").mkdir()
    for name in ("Model.pth", "model.pth", "caf\u00e9.pth", "cafe\u0301.pth"):
        save({"w": torch.ones(1)}, f"in/{name}")
    if len(os.listdir(tmp_path / "in")) < 4:
        pytest.skip("the system folds the names of the sources")
    monkeypatch.setattr(outputs, "_folds_case", lambda path: folds)
    if folds:
        with pytest.raises(RewriteError, match=r"2 outputs would be written(?s:.*)Model\.pth and .*model\.pth"):
            ckptkit.convert(tmp_path / "in", tmp_path / "out", to="safetensors")
        assert not (tmp_path / "out").exists()
    else:
        assert ckptkit.convert(tmp_path / "in", tmp_path / "out", to="safetensors").ok
        assert len(below(tmp_path / "out")) == 4


def test_whether_a_system_folds_case_is_seen_from_names_that_are_there(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "Folder" / "123").mkdir(parents=True)
    is_one = (tmp_path / "fOLDER").exists()
    assert outputs._folds_case(str(tmp_path / "Folder" / "123")) is is_one
    (tmp_path / "Folder" / "a").touch()
    if not is_one:
        os.link(tmp_path / "Folder" / "a", tmp_path / "Folder" / "A")  # what a system that folds case shows
    assert outputs._folds_case(str(tmp_path / "Folder")) is True
    monkeypatch.setattr("os.path.ismount", lambda path: True)  # of an empty one, of which no name is known
    assert outputs._folds_case(str(tmp_path / "Folder" / "123")) is (sys.platform in ("win32", "darwin"))


def test_outputs_that_exist_are_all_named_before_anything_is_written(convert, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out/deep").mkdir(parents=True)
    for name in ("out/old.safetensors", "out/deep/a.safetensors"):
        (tmp_path / name).write_bytes(b"precious")
    done = convert("runs", "out", "--to", "safetensors")
    assert done.code == 2
    assert sorted(done.err.splitlines()[1:]) == ["  out/deep/a.safetensors", "  out/old.safetensors"]
    assert "2 outputs already exist; --force overwrites them; nothing was written:" in done.err
    assert below(tmp_path / "out") == ["deep/a.safetensors", "old.safetensors"]
    (tmp_path / "out/old.safetensors").unlink()
    with pytest.raises(
        DestinationExistsError, match=r"^out/deep/a.safetensors: already exists; --force overwrites it$"
    ):
        ckptkit.convert("runs", "out", to="safetensors")
    assert convert("runs", "out", "--to", "safetensors", "--force").code == 0
    assert load_file(tmp_path / "out/deep/a.safetensors").keys() == {"w"}


def test_an_index_and_shards_that_exist_are_named(convert, runs: Path, tmp_path: Path) -> None:
    options = ["--to", "safetensors", "--max-shard-size", "300B"]
    assert convert("runs/hub", "out", *options).code == 0
    outputs = below(tmp_path / "out")
    assert len(outputs) == 3
    done = convert("runs/hub", "out", *options)
    assert done.code == 2
    assert sorted(line.strip() for line in done.err.splitlines()[1:]) == [f"out/{name}" for name in outputs]
    (tmp_path / "out/model.safetensors.index.json").unlink()
    assert convert("runs/hub", "out", *options).code == 2
    assert convert("runs/hub", "out", "--to", "safetensors-sharded", "--force").code == 0


def test_into_the_folder_itself(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save({"w": torch.ones(1)}, "in/a.pth")
    assert convert("in", "in", "--to", "torch-zip").code == 2  # it is there
    assert convert("in", "in", "--to", "torch-zip", "--force", "--dtype", "float16").code == 0
    assert torch.load(tmp_path / "in/a.pth")["w"].dtype == torch.float16
    assert convert("in", "./in/", "--to", "safetensors").code == 0
    assert below(tmp_path / "in") == ["a.pth", "a.safetensors"]
    done = convert("in", "in", "--to", "safetensors", "--force")
    assert done.code == 2
    assert "in/a.safetensors: from in/a.pth and in/a.safetensors" in done.err


def test_an_output_replaces_no_file_that_another_is_read_from(convert, runs: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in (runs / "hub").glob("*.safetensors"))
    index = json.loads((runs / "hub/model.safetensors.index.json").read_text())
    torch.save({"w": torch.ones(1)}, runs / "hub" / shards[0].replace(".safetensors", ".pth"))
    before = (runs / "hub" / shards[0]).read_bytes()
    done = convert("runs/hub", "runs/hub", "--to", "safetensors", "--force", "--allow-part")
    assert done.code == 2
    assert f"runs/hub/{shards[0]}: from runs/hub/{shards[0][:-12]}.pth, but runs/hub/model.safetensors.index.json" in (
        done.err
    )
    assert (runs / "hub" / shards[0]).read_bytes() == before
    assert set(index["weight_map"].values()) == set(shards)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.safetensors").symlink_to(runs / "deep/a.safetensors")
    (tmp_path / "out/best.safetensors").mkdir()
    done = convert("runs", "out", "--to", "safetensors", "--force", "--allow-part")
    assert done.code == 2
    assert "out/best.safetensors: is a folder" in done.err
    assert "out/old.safetensors: from runs/old.bin, but runs/deep/a.safetensors is read from it" in done.err


def test_outputs_inside_the_source_are_never_sources(convert, runs: Path, tmp_path: Path) -> None:
    for options in ([], ["--force"]):
        done = convert("runs", "runs/deep/out", "--to", "torch-zip", *options)
        assert done.code == 0, done.err
        assert len(below(runs / "deep/out")) == 5
    assert "1 output folder" in done.out
    done = convert("runs/deep", ".", "--to", "pt")  # a source inside the destination
    assert done.code == 0, done.err
    assert [name for name in below(tmp_path) if name.endswith(".pt")] == [
        "a.pt", "er/epoch.10.pt", "out/best.pt", "out/deep/a.pt",
        "out/deep/er/epoch.10.pt", "out/hub/model.pt", "out/old.pt",
    ]  # fmt: skip


def test_an_archive_that_was_unpacked_is_one_checkpoint(convert, save: Save, tmp_path: Path) -> None:
    save({"w": torch.rand(3), "b": torch.rand(4)}, "model.pth")
    shutil.unpack_archive(tmp_path / "model.pth", tmp_path / "in/deep", "zip")
    nbytes = sum(path.stat().st_size for path in (tmp_path / "in").rglob("*") if path.is_file())
    done = convert("in", "out", "--to", "safetensors", "--json")
    assert done.code == 0 and below(tmp_path / "out") == ["deep/model.safetensors"]
    (file,) = json.loads(done.out)["files"]
    assert (file["source"], file["source_nbytes"]) == ("in/deep/model", nbytes)
    assert convert("in/deep/model/", "new/", "--to", "safetensors").code == 0
    assert below(tmp_path / "new") == ["model.safetensors"]
    assert load_file(tmp_path / "new/model.safetensors").keys() == {"w", "b"}


def test_other_names_of_a_checkpoint_are_counted(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save({"w": torch.ones(1)}, "in/epoch_3.pth")
    (tmp_path / "in/latest.pth").symlink_to("epoch_3.pth")
    done = convert("in", "out", "--to", "safetensors", "--json")
    document = json.loads(done.out)
    assert len(document["files"]) == 1
    assert document["passed_over_files"] == {"in/latest.pth": "other name"}


@pytest.mark.parametrize(
    ("source", "destination", "options", "told"),
    [
        ("runs", "out", [], "a folder's name does not determine the output format; give --to safetensors or --to "),
        ("runs", "out", ["--to", "onnx"], "unknown container 'onnx'"),
        ("runs", "out", ["--to", "safetensors", "--dtype", "nothing"], "cannot be cast to 'nothing'"),
        ("runs", "out", ["--to", "safetensors", "--rename", "("], "has no '=>'"),
        ("runs", "out", ["--to", "safetensors", "--max-shard-size", "much"], "is not a valid size"),
        ("runs", "runs/notes.txt", ["--to", "safetensors"], "runs/notes.txt: is a file"),
        ("runs", "runs/notes.txt/out", ["--to", "safetensors"], "runs/notes.txt: is a file"),
        ("runs", "-", ["--to", "safetensors"], "ckptkit cannot write to standard output"),
        ("runs/old.bin", "-", [], "ckptkit cannot write to standard output"),
        ("bare", "out", ["--to", "safetensors"], "without checkpoint files; skipped: 1 file (1 text"),
        ("none", "out/", ["--to", "safetensors"], "none: no such file"),
        ("runs/best.pth.tar", "out/", [], "a folder's name does not determine the output format"),
        (
            "runs", "y/x.pth", [],
            "4 checkpoints are in this folder: best.pth.tar, old.bin, deep, hub; give one of them, or",
        ),
        ("runs", "y/x.pth", [], "or convert each checkpoint below it: ckptkit convert runs y/x/ --to torch-zip"),
    ],
)  # fmt: skip
def test_refused_once_and_before_anything_is_written(
    convert, runs: Path, tmp_path: Path, source: str, destination: str, options: list[str], told: str
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/notes.txt").write_text("words")
    before = below(tmp_path)
    done = convert(source, destination, *options)
    assert done.code == 2 and done.out == ""
    assert told in done.err and done.err.count("error: ") == 1
    assert below(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["bare", "runs"]


def test_the_command_that_is_offered_can_be_run(convert, runs: Path, tmp_path: Path) -> None:
    offered = convert("runs", "y/x.pth").err.rpartition("ckptkit convert ")[2].split()
    assert convert(*offered).code == 0
    assert len(below(tmp_path / "y/x")) == 5


def test_a_file_called_minus(convert, runs: Path, tmp_path: Path) -> None:
    assert convert("runs/old.bin", "./-", "--to", "safetensors").code == 0
    assert load_file(tmp_path / "-").keys() == {"w"}


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("runs/best.pth.tar", "best.safetensors"),
        ("runs/deep/er/epoch.10", "epoch.10.safetensors"),
        ("runs/hub/model.safetensors.index.json", "model.safetensors"),
    ],
)
def test_a_file_into_a_folder_is_named_after_its_source(
    convert, runs: Path, tmp_path: Path, source: str, output: str
) -> None:
    (tmp_path / "there").mkdir()
    for destination in ("there", "there/", "new/er/"):
        done = convert(source, destination, "--to", "safetensors")
        assert done.code == (0 if destination != "there/" else 2), done.err
        assert below(tmp_path / destination) == [output]
    assert "there/" + output + ": already exists" in convert(source, "there/", "--to", "safetensors").err
    report = ckptkit.convert(tmp_path / source, tmp_path / "there", to="pt", dry_run=True)
    assert report.details["destination"] == str(tmp_path / "there" / output).replace(".safetensors", ".pt")
    assert below(tmp_path / "there") == [output]


def test_a_new_folder_goes_again_where_nothing_could_be_written(convert, save: Save, tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}}, "several.pth")
    assert convert("several.pth", "new/er/", "--to", "safetensors").code == 2
    assert convert("several.pth", "new/er/", "--to", "safetensors", "--section", "ema", "--dry-run").code == 2
    assert os.listdir(tmp_path) == ["several.pth"]
    done = convert("several.pth", "new/er/", "--to", "safetensors", "--section", "ema", "--weights-only", "--dry-run")
    assert (done.code, os.listdir(tmp_path)) == (0, ["several.pth"])


def test_options_apply_to_each_file(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        weights = {"module.w": torch.rand(300), "module.head.w": torch.rand(300)}
        save({"net": weights, "ema": weights, "epoch": number}, f"in/{number}.pth")
    names = ["--strip-module", "--section", "net", "--weights-only", "--exclude", "head.*", "--dtype", "bfloat16"]
    dry = convert("in", "out", "--to", "safetensors", *names, "--dry-run")
    assert dry.code == 0 and not (tmp_path / "out").exists()
    assert "3 files can be converted, " in dry.out and dry.out.endswith("dry run: nothing was written\n")
    assert convert("in", "out", "--to", "safetensors", *names, "--metadata", "license=MIT", "--no-check").code == 0
    for number in range(3):
        with safetensors.safe_open(tmp_path / f"out/{number}.safetensors", "pt") as file:
            assert [*file.keys()] == ["w"] and file.metadata()["license"] == "MIT"
            assert file.get_tensor("w").dtype == torch.bfloat16
    assert convert("in", "shards", "--to", "torch-zip", *names[:4], "--max-shard-size", "1500B").code == 0
    assert len(below(tmp_path / "shards")) == 9
    quiet = convert("in", "out", "--to", "safetensors", *names, "--force", "-q")
    assert quiet == (0, "", "")


def test_a_folder_with_one_checkpoint_in_it_is_that(convert, runs: Path, tmp_path: Path) -> None:
    assert convert("runs/hub", "x.safetensors").code == 0
    assert load_file(tmp_path / "x.safetensors").keys() == {"a", "b"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_that_several_processes_wrote_is_one_checkpoint(convert, save: Save, tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.arange(6.0)}, "epoch": 3}, checkpoint_id=tmp_path / "in/step-10")
    done = convert("in/step-10", "out/", "--to", "safetensors", "--weights-only")
    assert (done.code, below(tmp_path / "out")) == (0, ["step-10.safetensors"]), done.err
    save({"w": torch.ones(1)}, "in/other.pth")
    save({"v": torch.ones(1)}, "in/step-10/beside.pth")
    done = convert("in", "all", "--to", "pth", "--json")
    assert done.code == 0, done.err
    outputs = ["other.pth", "step-10.pth", "step-10/beside.pth"]
    document = json.loads(done.out)
    assert below(tmp_path / "all") == outputs and document["passed_over"] == {}
    sizes = {file["source"]: file["source_nbytes"] for file in document["files"]}
    own = [tmp_path / "in/step-10" / name for name in (".metadata", "__0_0.distcp")]
    assert sizes["in/step-10"] == sum(path.stat().st_size for path in own)
    loaded = torch.load(tmp_path / "all/step-10.pth")
    assert loaded["epoch"] == 3 and torch.equal(loaded["model"]["w"], torch.arange(6.0))
    (tmp_path / "in/step-10/.metadata").unlink()
    done = convert("in", "again", "--to", "pth")
    assert (done.code, below(tmp_path / "again")) == (2, ["other.pth", "step-10/beside.pth"])
    assert "error: in/step-10: " in done.err and "the save never finished" in done.err


def test_what_cannot_be_read_is_told(convert, save: Save, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save({"w": torch.ones(1)}, "in/a.pth")
    (tmp_path / "in/gone.pth").symlink_to("nowhere.pth")
    done = convert("in", "out", "--to", "safetensors")
    assert done.code == 2
    assert "error: in/gone.pth: a broken link" in done.err
    assert below(tmp_path / "out") == ["a.safetensors"]


def test_a_folder_that_cannot_be_written_to_is_told_once(save: Save, open_folder: Path, unprivileged) -> None:
    (open_folder / "in").mkdir()
    for number in range(3):
        torch.save({"w": torch.ones(1)}, open_folder / f"in/{number}.pth")
        (open_folder / f"in/{number}.pth").chmod(0o644)
    (open_folder / "in").chmod(0o755)
    with pytest.raises(FileAccessError, match=r"this folder is not writable"):
        unprivileged(_raised_if_any, open_folder / "in", open_folder / "in" / "out")


def _raised_if_any(source: Path, destination: Path) -> None:
    """Called once as root too, where it may not write anything."""
    if os.geteuid() == 0:
        ckptkit.convert(source, destination, to="safetensors", dry_run=True)
    else:
        ckptkit.convert(source, destination, to="safetensors")


def test_progress_is_that_of_the_whole(runs: Path, tmp_path: Path) -> None:
    (runs / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    told: list[tuple[int, int]] = []
    report = ckptkit.convert(runs, tmp_path / "out", to="safetensors", progress=lambda *counts: told.append(counts))
    assert not report.ok
    nbytes = sum(file["source_nbytes"] for file in report.details["files"])
    assert {total for _, total in told} == {nbytes}
    assert told == sorted(told) and told[-1] == (nbytes, nbytes)


def test_a_report_of_the_whole(runs: Path, tmp_path: Path) -> None:
    report = ckptkit.convert(runs, tmp_path / "out", to="safetensors")
    assert report.ok and report.findings == ()
    assert {Path(file["destination"]).suffix for file in report.details["files"]} == {".safetensors"}
    assert json.loads(report.to_json())["files"] == json.loads(json.dumps(report.details["files"]))
    (runs / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    failed = ckptkit.convert(runs, tmp_path / "out", to="safetensors", force=True)
    with pytest.raises(ckptkit.FailedReportError, match=r"not-converted: .*broken\.pth: "):
        failed.raise_if_failed()


def test_one_file_is_converted_by_a_function_of_plain_data(runs: Path, tmp_path: Path) -> None:
    options = ConvertOptions(to="safetensors")
    task: Any = partial(outcome, convert_file, str(runs / "old.bin"), str(tmp_path / "out/old.safetensors"), 3, options)
    assert pickle.loads(pickle.dumps(task))()["error"] is None
    assert load_file(tmp_path / "out/old.safetensors").keys() == {"w"}
    assert task()["error"]["type"] == "DestinationExistsError"


def test_memory_that_runs_out_is_the_error_of_one_file(runs: Path, tmp_path: Path, monkeypatch) -> None:
    read = outputs.formats.read

    def hungry(path: str, **options: Any) -> Any:
        if path.endswith("old.bin"):
            raise MemoryError
        return read(path, **options)

    monkeypatch.setattr("ckptkit.formats.read", hungry)
    report = ckptkit.convert(runs, tmp_path / "out", to="safetensors")
    (finding,) = report.findings
    assert finding.message == f"{runs / 'old.bin'}: out of memory"
    assert len(below(tmp_path / "out")) == 4


def test_an_interrupt_leaves_whole_files_alone(runs: Path, tmp_path: Path, monkeypatch) -> None:
    calls = iter(range(9))

    def interrupted(*given: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return convert_file(*given)

    monkeypatch.setattr("ckptkit.conversion.convert_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ckptkit.convert(runs, tmp_path / "out", to="safetensors")
    assert len(below(tmp_path / "out")) == 2
    assert all(load_file(tmp_path / "out" / name) for name in below(tmp_path / "out"))


def test_each_folder_is_flushed_once_and_each_file(save: Save, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"in/{number % 2}").mkdir(parents=True, exist_ok=True)
        save({"w": torch.ones(1)}, f"in/{number % 2}/{number}.pth")
    flushed: list[str] = []

    def fsync(fd: int) -> None:
        flushed.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        if flushed[-1] == "folder":
            flushed[-1] = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("what a descriptor is open on is not told here")
    with mock.patch("os.fsync", fsync):
        ckptkit.convert(tmp_path / "in", tmp_path / "out", to="safetensors")
        assert flushed.count("file") >= 6
        assert flushed[-4:] == [".", "out", "out/0", "out/1"] and flushed.count("out/0") == 1
        flushed.clear()
        ckptkit.convert(tmp_path / "in/0/0.pth", f"{tmp_path}/new/", to="safetensors")
        assert flushed[0] == "." and flushed[-1] == "new"
        flushed.clear()
        ckptkit.convert(tmp_path / "in", tmp_path / "fast", to="safetensors", check=False)
        assert flushed == []


def test_memory_and_descriptors_stay_flat_over_many_files(save: Save, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save({f"module.layer.{number}.weight": torch.rand(2) for number in range(40)}, "in/0.pth")
    for number in range(1, 70):
        shutil.copy(tmp_path / "in/0.pth", tmp_path / f"in/{number}.pth")
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("descriptors are not listed here")
    import tracemalloc

    seen: list[tuple[int, int]] = []

    def spy(*given: Any) -> Any:
        report = convert_file(*given)
        if len(os.listdir(tmp_path / "out")) in (20, 70):
            seen.append((tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd"))))
        return report

    tracemalloc.start()
    try:
        with mock.patch("ckptkit.conversion.convert_file", spy):
            report = ckptkit.convert(tmp_path / "in", tmp_path / "out", to="safetensors", strip_module=True)
    finally:
        tracemalloc.stop()
    (early, opened), (late, still_opened) = seen
    assert report.ok and still_opened == opened
    assert late - early < 50 * 20_000, "bytes for each file more"
