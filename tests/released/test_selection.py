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
    selection = select([tmp_path], relative_to=str(tmp_path))
    names = [each.name for each in selection.checkpoints]
    assert names == sorted(names)
    assert names == [
        f"a/b/{name}"
        for name in (
            *("ddp_resume.pth", "legacy.pth", "model.safetensors.index.json", "scripted.pt"),
            *("state_dict.safetensors", "tied.pth", "training/step-2", "training/step-4", "whole_model.pth"),
        )
    ]
    assert all(Path(each.path).exists() for each in selection.checkpoints)
    assert selection.passed_over["empty file"] == 1
    assert selection.empty == selection.unreadable == ()


def test_each_file_once_and_no_shard_beside_its_index() -> None:
    index = FIXTURES / "model.safetensors.index.json"
    shard = FIXTURES / SHARDS[0]
    given = [shard, index, index, FIXTURES / "." / index.name]
    assert [each.name for each in select(given, relative_to=str(FIXTURES)).checkpoints] == [index.name]
    (alone,) = select([shard], relative_to=str(FIXTURES)).checkpoints
    assert alone.name == SHARDS[0]
    whole = select([shard, FIXTURES / SHARDS[1]], relative_to=str(FIXTURES), whole=True)
    assert [each.name for each in whole.checkpoints] == [index.name]
    assert whole.shards == {str(index): (str(shard), str(FIXTURES / SHARDS[1]))}
    (kept,) = select([shard], relative_to=str(FIXTURES), whole=True, known={SHARDS[0]}).checkpoints
    assert kept.name == SHARDS[0]


def test_a_name_that_was_given_stays(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "tied.pth", tmp_path / "a.pth")
    (tmp_path / "b").hardlink_to(tmp_path / "a.pth")
    (tmp_path / "c").symlink_to("a.pth")
    (named,) = select([tmp_path, tmp_path / "c"], relative_to=str(tmp_path)).checkpoints
    assert (named.name, sorted(named.names)) == ("c", ["a.pth", "b", "c"])
    (found,) = select([tmp_path], relative_to=str(tmp_path)).checkpoints
    assert found.name == "a.pth"
    two = select([tmp_path / "a.pth", tmp_path / "b"], relative_to=str(tmp_path)).checkpoints
    assert [each.name for each in two] == ["a.pth", "b"], "both were asked for"


def test_a_file_that_is_not_there_is_for_others_to_tell(tmp_path: Path) -> None:
    (selected,) = select([tmp_path / "none.pth"], relative_to=str(tmp_path / "deeper")).checkpoints
    assert (selected.path, selected.name) == (str(tmp_path / "none.pth"), "../none.pth")


def test_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="no files"):
        select([], relative_to=str(tmp_path))
    (tmp_path / "x.txt").write_text("words")
    selection = select([tmp_path], relative_to=str(tmp_path))
    assert selection.checkpoints == ()
    with pytest.raises(FileAccessError, match=r"without checkpoint files; skipped: 1 file \(1 text file\)"):
        selection.require_all()


def test_an_index_that_leads_out_or_is_none(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    index = tmp_path / "w" / "model.safetensors.index.json"
    shutil.copy(FIXTURES / "state_dict.safetensors", tmp_path / "x.safetensors")
    for text in ('{"weight_map": {"w": "../x.safetensors"}}', "no JSON", "{}"):
        index.write_text(text)
        selected = select([index, tmp_path / "x.safetensors"], relative_to=str(tmp_path)).checkpoints
        assert [each.name for each in selected] == ["w/model.safetensors.index.json", "x.safetensors"]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of("a/./b/../c.pth", "") == "a/c.pth"
    assert name_of(str(tmp_path / "x.pth"), str(tmp_path)) == "x.pth"
