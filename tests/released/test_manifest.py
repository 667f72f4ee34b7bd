"""Manifests: what is recorded, how it is written, and how it is renewed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.errors import (
    CorruptError,
    DestinationExistsError,
    FileAccessError,
    MissingFileError,
    RewriteError,
    UnknownFormatError,
    UnsupportedError,
)
from ckptkit.released.manifest_file import read_manifest

Save = Callable[..., Path]
FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one in a folder below, and a sharded checkpoint."""
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    torch.save({"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.zeros(2)}, folder / "one.pth")
    save_file({"w": torch.ones(4, dtype=torch.bfloat16)}, folder / "sub" / "two.safetensors")
    for path in FIXTURES.glob("model*"):
        shutil.copy(path, folder / "sub")
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("as_given", [Path, str, lambda path: [path], lambda path: (str(path),)])
def test_one_path_or_several(folder: Path, as_given: Callable[[Path], object]) -> None:
    made = ckptkit.manifest(as_given(folder / "one.pth"))
    assert [record.path for record in made.files] == ["one.pth"]
    assert [result.path for result in ckptkit.check(as_given(folder / "one.pth")).results] == [str(folder / "one.pth")]


def test_what_is_recorded(folder: Path) -> None:
    made = ckptkit.manifest([folder], folder / "weights.lock.json")
    assert [record.path for record in made.files] == [
        *("one.pth", "sub/model.safetensors.index.json", "sub/two.safetensors")
    ]
    assert made.changes.added == tuple(record.path for record in made.files)
    document = json.loads((folder / "weights.lock.json").read_text("ascii"))
    assert document == made.to_dict()
    assert document["schema_version"] == 1
    one, index, two = document["files"]
    zeros = hashlib.sha256(bytes(8)).hexdigest()
    assert {key: value for key, value in one.items() if key not in ("content_digest", "whole_digest")} == {
        "path": "one.pth",
        "size": (folder / "one.pth").stat().st_size,
        "sha256": sha256(folder / "one.pth"),
        "format": "torch-zip",
        "kind": "state_dict",
        "trust": "safe",
        "architecture": None,
        "golden": None,
        "tensors": {
            "a.b": {"dtype": "float32", "shape": [2], "digest": f"sha256:{zeros}"},
            "a.w": {**one["tensors"]["a.w"], "shape": [2, 3]},
        },
    }
    assert {name: shard["sha256"] for name, shard in index["shards"].items()} == {
        path.name: sha256(path) for path in (folder / "sub").glob("model-0*")
    }
    assert index["sha256"] == sha256(folder / "sub" / "model.safetensors.index.json")
    assert two["tensors"]["w"]["dtype"] == "bfloat16"
    assert read_manifest(folder / "weights.lock.json").files == made.files
    assert made.paths == {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".pth", ".safetensors")
    } | {"sub/model.safetensors.index.json"}


def test_one_line_a_tensor_or_folded(folder: Path) -> None:
    listed = ckptkit.manifest([folder / "one.pth"]).to_json()
    assert '\n        "a.b": {"dtype": "float32", "shape": [2], "digest": "sha256:' in listed
    folded = ckptkit.manifest([folder / "one.pth"], digests="total")
    assert folded.files[0].tensors is None
    assert folded.to_json().endswith('      "golden": null,\n      "tensors": null\n    }\n  ]\n}\n')
    with pytest.raises(RewriteError, match="'total' or 'tensor'"):
        ckptkit.manifest([folder], digests="none")  # type: ignore[arg-type]


def test_the_same_files_make_the_same_text(folder: Path, tmp_path: Path) -> None:
    first = ckptkit.manifest([folder], folder / "a.json")
    shutil.copytree(folder, tmp_path / "copy")
    paths = [tmp_path / "copy" / "sub", tmp_path / "copy" / "one.pth", tmp_path / "copy"]
    ckptkit.manifest(paths, tmp_path / "copy" / "b.json")
    assert (folder / "a.json").read_bytes() == (tmp_path / "copy" / "b.json").read_bytes()
    assert first.to_json().isascii()


def test_names_are_without_wrappers_and_odd_ones_are_escaped(save: Save, tmp_path: Path) -> None:
    names = ["module.a", 'module.quote"', "module.new\nline", "module.Größe‮"]
    path = save({name: torch.ones(1) for name in names})
    ckptkit.manifest([path], tmp_path / "m.json")
    (record,) = read_manifest(tmp_path / "m.json").files
    assert record.tensors is not None
    assert list(record.tensors) == sorted(name.removeprefix("module.") for name in names)


def test_values_that_are_no_plain_tensors_are_named(save: Save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(1), "v": torch.ones(1), "s": torch.ones(2).to_sparse(), "x._extra_state": {"a": 1}})
    ckptkit.manifest([path], tmp_path / "m.json")
    (record,) = read_manifest(tmp_path / "m.json").files
    assert record.others == ("s", "x._extra_state")


def test_an_architecture_is_recorded(save: Save) -> None:
    from torchvision.models import resnet18

    (record,) = ckptkit.manifest(
        [save({f"module.{k}": v for k, v in resnet18(num_classes=10).state_dict().items()})]
    ).files
    assert record.architecture == "torchvision:resnet18(num_classes=10)"


def test_a_golden_file_belongs_to_its_checkpoint(folder: Path) -> None:
    golden = folder / "golden.safetensors"
    save_file({"output": torch.ones(3)}, golden)
    made = ckptkit.manifest([folder], folder / "m.json", golden={folder / "one.pth": golden})  # type: ignore[dict-item]
    assert [record.path for record in made.files if "golden" in record.path] == []
    (record,) = [record for record in made.files if record.golden]
    assert (record.path, record.golden.path, record.golden.sha256) == ("one.pth", "golden.safetensors", sha256(golden))
    assert read_manifest(folder / "m.json").files == made.files
    save_file({"output": torch.zeros(3)}, golden)
    again = ckptkit.manifest((), folder / "m.json", update=True)
    assert (again.changes.changed, again.changes.added) == (("one.pth",), ())
    alone = ckptkit.manifest([folder / "one.pth"], golden=golden)
    assert alone.files[0].golden is not None
    with pytest.raises(FileAccessError, match="belongs to one of 3 checkpoints"):
        ckptkit.manifest([folder], golden=golden)
    with pytest.raises(MissingFileError):
        ckptkit.manifest([folder / "one.pth"], golden=folder / "none.safetensors")
    with pytest.raises(FileAccessError, match="not among the checkpoints"):
        ckptkit.manifest([folder / "one.pth"], golden={"other.pth": golden})
    with pytest.raises(FileAccessError, match="only golden files"):
        ckptkit.manifest([golden], folder / "n.json", golden={str(folder / "one.pth"): golden})


# Renewing.


def test_update_renews_what_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = folder / "weights.lock.json"
    before = ckptkit.manifest([folder], lock)
    torch.save({"a.w": torch.zeros(2, 3), "a.b": torch.zeros(2)}, folder / "one.pth")
    (folder / "sub" / "two.safetensors").unlink()
    torch.save({"n": torch.ones(1)}, folder / "new.pth")
    after = ckptkit.manifest([folder], lock, update=True)
    changes = after.changes
    assert (changes.added, changes.changed, changes.removed, changes.kept) == (
        *(("new.pth",), ("one.pth",), ("sub/two.safetensors",)),
        ("sub/model.safetensors.index.json",),
    )
    assert after.files[2] == before.files[1]
    assert read_manifest(lock).files == after.files
    inode = lock.stat().st_ino
    monkeypatch.delattr("ckptkit.released.manifest_maker.write")
    same = ckptkit.manifest((), lock, update=True)
    assert same.changes.kept == tuple(record.path for record in after.files)
    assert lock.stat().st_ino == inode


def test_update_keeps_what_a_record_says_of_an_untouched_file(folder: Path) -> None:
    lock = folder / "m.json"
    ckptkit.manifest([folder], lock)
    lock.write_text(lock.read_text().replace('"architecture": null', '"architecture": "mine:model"', 1))
    after = ckptkit.manifest([folder], lock, update=True)
    assert after.files[0].architecture == "mine:model"
    os.utime(folder / "one.pth", (1, 1))
    assert ckptkit.manifest([folder], lock, update=True).changes.changed == ()


def test_update_of_some_files_leaves_the_others(folder: Path) -> None:
    lock = folder / "m.json"
    ckptkit.manifest([folder], lock)
    torch.save({"a": torch.zeros(1)}, folder / "one.pth")
    (folder / "sub" / "two.safetensors").write_bytes(b"not read")
    after = ckptkit.manifest([folder / "one.pth"], lock, update=True)
    assert after.changes.changed == ("one.pth",)
    assert len(after.changes.kept) == 2
    (folder / "sub" / "two.safetensors").unlink()
    assert ckptkit.manifest([folder / "one.pth"], lock, update=True).changes.removed == ("sub/two.safetensors",)


def test_update_sees_one_flipped_bit_and_a_changed_shard(folder: Path) -> None:
    lock = folder / "m.json"
    ckptkit.manifest([folder], lock)
    for name, offset in (("sub/two.safetensors", -1), ("sub/model-00002-of-00002.safetensors", -1)):
        data = bytearray((folder / name).read_bytes())
        data[offset] ^= 1
        (folder / name).write_bytes(data)
    after = ckptkit.manifest([folder], lock, update=True)
    assert after.changes.changed == ("sub/model.safetensors.index.json", "sub/two.safetensors")


def test_update_folds_and_unfolds(folder: Path) -> None:
    lock = folder / "m.json"
    ckptkit.manifest([folder], lock, digests="total")
    torch.save({"n": torch.ones(1)}, folder / "one.pth")
    kept = ckptkit.manifest([folder], lock, update=True)
    assert [record.tensors for record in kept.files] == [None] * 3  # as it was
    listed = ckptkit.manifest([folder], lock, update=True, digests="tensor")
    assert all(record.tensors for record in listed.files)
    folded = ckptkit.manifest([folder], lock, update=True, digests="total")
    assert folded.files == kept.files


def test_update_makes_one_where_there_is_none(folder: Path) -> None:
    made = ckptkit.manifest((), folder / "m.json", update=True)
    assert len(made.changes.added) == 3
    with pytest.raises(FileAccessError, match="no manifest to update"):
        ckptkit.manifest([folder], update=True)


# What is refused.


def test_an_existing_manifest_is_not_replaced_unasked(folder: Path) -> None:
    lock = folder / "m.json"
    lock.write_text("mine")
    with pytest.raises(DestinationExistsError, match="--update updates"):
        ckptkit.manifest([folder], lock)
    with pytest.raises(CorruptError, match="not valid JSON"):
        ckptkit.manifest([folder], lock, update=True)
    assert lock.read_text() == "mine"
    lock.chmod(0o640)
    ckptkit.manifest([folder], lock, force=True)
    assert len(read_manifest(lock).files) == 3
    assert stat.S_ISREG(lock.stat().st_mode)


@pytest.mark.parametrize(
    "name", ["one.pth", "sub/model.safetensors.index.json", "sub/model-00001-of-00002.safetensors", "step-4/.metadata"]
)
def test_no_checkpoint_and_no_part_of_one_is_replaced(folder: Path, name: str) -> None:
    shutil.copytree(FIXTURES / "training" / "step-4", folder / "step-4")
    (folder / "cut.pth").write_bytes((folder / "one.pth").read_bytes()[:-30])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for taken in (name, "cut.pth"):
        with pytest.raises(DestinationExistsError, match="is a checkpoint; --force replaces only a manifest"):
            ckptkit.manifest(folder / "one.pth", folder / taken, force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_nothing_is_written_where_a_file_cannot_be_recorded(folder: Path) -> None:
    (folder / "bad.pth").write_text("<html>")
    with pytest.raises(UnknownFormatError, match=r"bad\.pth"):
        ckptkit.manifest([folder], folder / "m.json")
    (folder / "sub" / "worse.pth").write_bytes(b"\x1f\x8b")
    with pytest.raises(FileAccessError, match=r"2 files cannot be recorded:\n.*bad\.pth(.|\n)*worse\.pth"):
        ckptkit.manifest([folder], folder / "m.json")
    with pytest.raises(MissingFileError):
        ckptkit.manifest([folder / "none.pth"], folder / "m.json")
    assert sorted(path.name for path in folder.iterdir()) == ["bad.pth", "one.pth", "sub"]


def test_files_outside_its_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileAccessError, match="not below the manifest's folder"):
        ckptkit.manifest([folder / "one.pth"], folder / "sub" / "m.json")
    monkeypatch.chdir(tmp_path)
    assert ckptkit.manifest([folder / "one.pth"]).files[0].path == "weights/one.pth"
    monkeypatch.chdir(folder / "sub")
    assert ckptkit.manifest([folder / "one.pth"]).files[0].path == "one.pth"
    os.rename(folder / "one.pth", os.fsencode(folder) + b"/\xff.pth")
    with pytest.raises(FileAccessError, match="not Unicode text"):
        ckptkit.manifest([folder], folder / "m.json")


def test_a_name_that_is_no_text(save: Save) -> None:
    path = save({"\ud800": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(UnsupportedError, match="--digests total"):
        ckptkit.manifest([path])
    assert ckptkit.manifest([path], digests="total").files[0].content_digest is not None
