"""What is found in folders: every file is a checkpoint, is counted by kind, or cannot be read."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from support.files import tarred

import ckptkit
from ckptkit.errors import MissingFileError
from ckptkit.formats.folder import FolderSurvey, Surveyor, passed_over_text, says_checkpoint
from ckptkit.places import is_temporary_name
from ckptkit.transfer import names

FIXTURES = Path(__file__).parents[2] / "fixtures"
WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def saved(*, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def array(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def survey(folder: Path) -> FolderSurvey:
    surveyor = Surveyor(is_unfinished=is_temporary_name)
    surveyor.folder(str(folder))
    return surveyor.result()


def found(folder: Path) -> list[str]:
    return [os.path.relpath(each.path, folder) for each in survey(folder).checkpoints]


ENDINGS = (
    ".pth.tar",
    ".th",
    ".t7",
    ".sav",
    ".model",
    ".dat",
    ".nemo",
    ".state",
    ".pyth",
    ".sft",
    ".txt",
    ".PTH",
    ".bin",
    "",
)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "content",
    [saved(), saved(zipped=False), (FIXTURES / "scripted.pt").read_bytes(), save(WEIGHTS)],
    ids=("zip", "legacy", "script", "st"),
)
def test_a_checkpoint_is_found_whatever_its_name(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / f"best{ending}").write_bytes(content)
    assert found(tmp_path) == [f"deep/er/best{ending}"]
    assert survey(tmp_path).passed_over == {}


PLAIN = (".safetensors", ".pth", ".pt", ".ckpt", ".ptl", ".pt2", ".torchscript", ".pth.tar", ".Pth", ".distcp")


@pytest.mark.parametrize("ending", PLAIN)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        POINTER,
        PAGE,
        saved()[:900],
        saved(zipped=False)[:40],
        PNG,
        b"text\n",
        bytes(999),
        pickle.dumps(1),
        array(np.ones(3)),
    ],
    ids=("empty", "pointer", "page", "cut", "cut-legacy", "png", "text", "zeros", "pickle", "npy"),
)
def test_a_name_that_says_checkpoint_is_never_passed_over(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"m{ending}").write_bytes(content)
    assert says_checkpoint(f"m{ending}")
    assert found(tmp_path) == [f"m{ending}"]


@pytest.mark.parametrize("ending", [".bin", ".pkl", ".jit"])
def test_endings_of_other_kinds_too(tmp_path: Path, ending: str) -> None:
    lost = {
        "a": b"",
        "b": POINTER,
        "c": PAGE,
        "d": saved()[:900],
        "e": saved(zipped=False)[:60],
        "f": bytes(600),
        "g": b"\xfe\1\2" * 9,
    }
    for name, content in lost.items():
        (tmp_path / f"{name}{ending}").write_bytes(content)
    others = {
        "t": b"words\n",
        "u": PNG,
        "v": pickle.dumps({"a": 1}),
        "w": array(np.ones(2)),
        "x": b"GGUF\3\0\0\0" + bytes(40),
    }
    for name, content in others.items():
        (tmp_path / f"{name}{ending}").write_bytes(content)
    assert found(tmp_path) == [f"{name}{ending}" for name in lost]
    assert survey(tmp_path).passed_over == {
        "text file": 1,
        "PNG image": 1,
        "pickle": 1,
        "numpy array": 1,
        "GGUF file": 1,
    }


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    contents = {
        "README.md": b"# weights\n",
        ".gitattributes": b"*.bin filter=lfs\n",
        "config.json": b'{"a": 1}',
        "a.png": PNG,
        "b.jpg": b"\xff\xd8\xff\xe0" + bytes(9),
        "empty.txt": b"",
        "pointer.dat": POINTER,
        "data.zip": archive(a=b"1", b=b"2"),
        "arrays.npz": archive(**{"a.npy": array(np.ones(2))}),
        "data.tar": tarred({"a": b"1"}),
        "log.gz": b"\x1f\x8b\x08\0" + bytes(9),
        "numbers": b"\xfe\xfd\xfc" * 20,
        "p": pickle.dumps([1]),
        "text": pickle.dumps({"a": [1]}, protocol=0),
        "._x.pth": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    result = survey(tmp_path)
    assert (result.checkpoints, result.unreadable) == ((), ())
    assert result.passed_over == {
        "text file": 2, "JSON file": 1, "PNG image": 1, "JPEG image": 1, "empty file": 1, "git-lfs pointer": 1,
        "zip archive": 1, "numpy archive": 1, "tar archive": 1, "gzip-compressed file": 1, "unknown file": 1,
        "pickle": 2, "AppleDouble file": 1,
    }  # fmt: skip
    kinds = {os.path.basename(path): kind for path, kind in result.passed.items()}
    assert kinds.keys() == contents.keys()
    assert (kinds["a.png"], kinds["p"], kinds["._x.pth"]) == ("PNG image", "pickle", "AppleDouble file")
    assert {os.path.basename(path) for path in result.others} == {
        "data.zip",
        "arrays.npz",
        "data.tar",
        "log.gz",
        "p",
        "text",
    }
    line = passed_over_text(result.passed_over)
    assert line.startswith("skipped: 15 files (2 pickles, 2 text files, 1 ") and line.endswith(")")


def test_archives_that_were_or_are_torchs(tmp_path: Path) -> None:
    whole = saved()
    (tmp_path / "cut").write_bytes(whole[:-30])
    (tmp_path / "twice").write_bytes(whole + whole)
    (tmp_path / "old.tar").write_bytes(tarred({"sys_info": b"1", "pickle": b"2", "tensors": b"3", "storages": b"4"}))
    (tmp_path / "old_cut").write_bytes(tarred({"sys_info": b"1", "pickle": b"2" * 2000})[:1400])
    (tmp_path / "repacked").write_bytes(archive(**{"out/model/data.pkl": b"1", "out/model/version": b"3"}))
    (tmp_path / "data.zip").write_bytes(archive(a=b"1")[:-3])
    assert found(tmp_path) == ["cut", "old.tar", "old_cut", "repacked", "twice"]
    assert survey(tmp_path).passed_over == {"zip archive": 1}


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device.pt").symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "s.ckpt"))
        (tmp_path / "link").symlink_to("pipe")
        (tmp_path / "m").write_bytes(saved())
        result = survey(tmp_path)
    assert result.passed_over == {"named pipe": 3, "socket": 1, "device": 1}
    assert [each.path for each in result.checkpoints] == [str(tmp_path / "m")]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "beside.pth").write_bytes(saved())
    (outside / "far").write_bytes(saved())
    (inside / "deep" / "m.pth").write_bytes(saved())
    (inside / "a_link").symlink_to("deep/m.pth")
    (inside / "again").symlink_to("deep")
    (inside / "deep" / "self").symlink_to(".")
    (inside / "deep" / "up").symlink_to("..")
    (inside / "deep" / "out").symlink_to("../..")
    (inside / "elsewhere").symlink_to(outside)
    (outside / "back").symlink_to(inside)
    for first, second in (("x", "y"), ("y", "x"), ("z", "z")):
        (inside / first).symlink_to(second)
    (inside / "lost").symlink_to("nowhere")
    result = survey(inside)
    assert [os.path.relpath(each.path, inside) for each in result.checkpoints] == ["deep/m.pth", "elsewhere/far"]
    assert result.checkpoints[0].others == (str(inside / "a_link"),)
    assert result.passed_over == {"broken link": 4, "link to a folder above": 1}
    (inside / "lost.pth").symlink_to("nowhere")
    ((path, error),) = survey(inside).unreadable
    assert path == str(inside / "lost.pth") and isinstance(error, MissingFileError)


def test_each_file_once_under_the_name_that_says_most(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(saved())
    os.link(tmp_path / "a", tmp_path / "b.bin")
    os.link(tmp_path / "a", tmp_path / "c.pth")
    os.link(tmp_path / "a", tmp_path / "d.pth")
    (tmp_path / "n").write_bytes(b"notes")
    os.link(tmp_path / "n", tmp_path / "o")
    result = survey(tmp_path)
    (each,) = result.checkpoints
    assert each.path == str(tmp_path / "c.pth") and len(each.others) == 3
    assert result.passed_over == {"text file": 1}
    (tmp_path / "p").write_bytes(POINTER)
    os.link(tmp_path / "p", tmp_path / "q.pth")
    assert found(tmp_path) == ["c.pth", "q.pth"], "the name of one file decides that it was to be a checkpoint"
    assert survey(tmp_path).passed_over == {"text file": 1}


def test_a_cache_of_the_hub(tmp_path: Path) -> None:
    ckptkit.convert(_written(tmp_path / "m.pth"), tmp_path / "model.safetensors.index.json", max_shard_size=30)
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(tmp_path.glob("model*safetensors*"))):
        path.rename(model / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    assert found(model) == ["snapshots/main/model.safetensors.index.json"]


def _written(path: Path) -> Path:
    torch.save({"a": torch.ones(6), "b": torch.ones(7)}, path)
    return path


def test_an_index_stands_for_its_shards_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(save({"a": torch.ones(2)}))
    (tmp_path / "y.part").write_bytes(save({"b": torch.ones(2)}))
    (tmp_path / "list").write_text('{"weight_map": {"a": "x", "b": "y.part", "c": "z.safetensors"}}')
    (tmp_path / "other.json").write_text('{"weight": 1}')
    assert found(tmp_path) == ["list"]
    assert survey(tmp_path).passed_over == {"JSON file": 1}


def test_the_index_of_a_variant_is_one(tmp_path: Path) -> None:
    """As transformers and diffusers call it, beside shards that without it are one checkpoint, too."""
    shards = {name: f"m.fp16-0000{number}-of-00002.safetensors" for number, name in ((1, "a"), (2, "b"))}
    for name, shard in shards.items():
        (tmp_path / shard).write_bytes(save({name: torch.ones(2)}))
    index = tmp_path / "m.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert found(tmp_path) == [index.name] and survey(tmp_path).passed_over == {}
    assert ckptkit.check(tmp_path).results[0].path == str(index)
    ckptkit.convert([index], f"{tmp_path}/out/", to="pth")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.fp16.pth"]
    index.write_text('{"weight_map": {"a": "x"')
    assert index.name in found(tmp_path), "not passed over as any JSON file"


def test_shards_in_a_folder_below_their_index(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards = {name: f"shards/m-0000{number}-of-00002.bin" for number, name in ((1, "a"), (2, "b"))}
    for name, shard in shards.items():
        torch.save({name: torch.ones(2)}, tmp_path / shard)
    assert found(tmp_path) == ["shards"]
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert found(tmp_path) == ["m.bin.index.json"]
    with ckptkit.open(tmp_path) as file:
        assert [*file.state_dict] == ["a", "b"]
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": {"a": shards["a"]}}))
    assert found(tmp_path) == ["m.bin.index.json", "shards"], "it does not stand for them all"


def test_unfinished_outputs_and_folders_of_git(tmp_path: Path) -> None:
    for name in ("model.safetensors", "weights", "x" * 300 + ".pth", "w.lock.json"):
        made = os.path.basename(names.beside(str(tmp_path / name), ""))
        assert is_temporary_name(made)
        (tmp_path / made).write_bytes(saved()[:500])
    for name in (".model.tmp.pth", "model.0123abcd.tmp.pth", ".m.0123ABCD.tmp", ".m.0123abcd.tmp.tar.gz"):
        assert not is_temporary_name(name)
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "m.pth").write_bytes(saved())
    assert found(tmp_path) == []
    unfinished = tmp_path / os.path.basename(names.beside(str(tmp_path / "out"), "01234567"))
    ckptkit.save({"w": torch.ones(2)}, unfinished, to="dcp")  # as a run leaves it that is killed before the last step
    assert survey(tmp_path).passed_over == {"unfinished ckptkit output": 5, ".git folder": 1}


@pytest.mark.skipif(not hasattr(dcp, "save"), reason="this torch has no torch.distributed.checkpoint.save (2.2)")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_torch_distributed_checkpoint_is_not_silently_passed_over(tmp_path: Path) -> None:
    dcp.save({"model": WEIGHTS}, checkpoint_id=tmp_path / "step")
    assert found(tmp_path) == ["step"] and survey(tmp_path).passed_over == {}
    assert "torch.distributed.checkpoint" in str(_error(tmp_path / "step" / ".metadata"))
    (tmp_path / "step" / "beside.pth").write_bytes(saved())
    (tmp_path / "step" / "notes.csv").write_text("1,2")
    assert found(tmp_path) == ["step", "step/beside.pth"], "no name hides another file"
    assert survey(tmp_path).passed_over == {"text file": 1}
    (tmp_path / "step" / ".metadata").unlink()  # the save was never finished
    assert found(tmp_path) == ["step", "step/beside.pth"]
    assert "the save never finished" in str(_error(tmp_path / "step"))
    (tmp_path / "step" / ".metadata").write_bytes(saved())
    assert found(tmp_path) == ["step", "step/beside.pth"]


def _error(path: Path) -> Exception:
    with pytest.raises(ckptkit.CkptkitError) as raised:
        ckptkit.open(path)
    return raised.value


def test_what_cannot_be_read_is_told_and_the_others_are_found(
    open_folder: Path, unprivileged: Callable[..., Any]
) -> None:
    (open_folder / "shut").mkdir()
    (open_folder / "shut" / "evil.pth").write_bytes(saved())
    (open_folder / "a").write_bytes(saved())
    (open_folder / "notes.txt").write_bytes(b"nobody may read this")
    (open_folder / "to_evil").symlink_to("shut/evil.pth")
    (open_folder / "listed").mkdir()
    for name in ("one", "two"):
        (open_folder / "listed" / name).mkdir()
    (open_folder / "listed").chmod(0o444)
    (open_folder / "shut").chmod(0)
    (open_folder / "notes.txt").chmod(0)
    result = unprivileged(survey, open_folder)
    assert [each.path for each in result.checkpoints] == [str(open_folder / "a")]
    told_of = {os.path.basename(path): str(error) for path, error in result.unreadable}
    assert set(told_of) == {"shut", "notes.txt", "to_evil", "one", "two"}
    assert result.passed_over == {}
    assert all("Permission denied" in message for message in told_of.values())


def test_thousands_of_small_files(tmp_path: Path) -> None:
    for number in range(2_000):
        content = (b"words %d\n" % number, PNG, b'{"n": %d}' % number, b"\xfe\xff\0\1")[number % 4]
        (tmp_path / f"{number:05}.{('txt', 'png', 'json', 'dat')[number % 4]}").write_bytes(content)
    (tmp_path / "01000_best").write_bytes(saved())
    result = survey(tmp_path)
    assert [os.path.basename(each.path) for each in result.checkpoints] == ["01000_best"]
    assert sum(result.passed_over.values()) == 2_000
    assert result.passed_over["text file"] == result.passed_over["PNG image"] == 500
