"""Which files paths stand for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckptkit.errors import FileAccessError
from ckptkit.released.selection import name_of, select

FIXTURES = Path(__file__).parents[2] / "fixtures"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_a_folder_stands_for_its_checkpoints(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES, tmp_path / "a" / "b")
    (tmp_path / "notes.txt").touch()
    selected = select([tmp_path], relative_to=str(tmp_path))
    names = [each.name for each in selected]
    assert names == sorted(names)
    assert names == [
        f"a/b/{name}"
        for name in (
            *("ddp_resume.pth", "legacy.pth", "model.safetensors.index.json", "scripted.pt"),
            *("state_dict.safetensors", "tied.pth", "whole_model.pth"),
        )
    ]
    assert {each.name: each.shards for each in selected if each.shards} == {
        "a/b/model.safetensors.index.json": tuple(f"a/b/{shard}" for shard in SHARDS)
    }
    assert all(Path(each.path).is_file() for each in selected)


def test_each_file_once_and_no_shard_beside_its_index() -> None:
    index = FIXTURES / "model.safetensors.index.json"
    shard = FIXTURES / SHARDS[0]
    assert [
        each.name for each in select([shard, index, index, FIXTURES / "." / index.name], relative_to=str(FIXTURES))
    ] == [index.name]
    (alone,) = select([shard], relative_to=str(FIXTURES))
    assert alone.name == SHARDS[0]


def test_a_file_that_is_not_there_is_for_others_to_tell(tmp_path: Path) -> None:
    (selected,) = select([tmp_path / "none.pth"], relative_to=str(tmp_path / "deeper"))
    assert (selected.path, selected.name) == (str(tmp_path / "none.pth"), "../none.pth")


def test_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="no files"):
        select([], relative_to=str(tmp_path))
    with pytest.raises(FileAccessError, match="without checkpoint files"):
        select([tmp_path], relative_to=str(tmp_path))


def test_an_index_that_leads_out_or_is_none(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in ('{"weight_map": {"w": "../x.safetensors"}}', "no JSON", "{}"):
        index.write_text(text)
        (selected,) = select([index], relative_to=str(tmp_path))
        assert selected.shards == ()


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of("a/./b/../c.pth", "") == "a/c.pth"
    assert name_of(str(tmp_path / "x.pth"), str(tmp_path)) == "x.pth"
