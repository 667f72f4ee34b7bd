"""An archive of torch's that was unpacked is read as it lies: nothing outside its folder, and no file that changed."""

from __future__ import annotations

import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit import formats
from ckptkit.errors import AmbiguousError, CkptkitError, CorruptError, FileAccessError

Save = Callable[..., Path]


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": {"a.w": torch.randn(3, 4), "a.b": torch.randn(4), "n": torch.tensor(3)}, "epoch": 3}


@pytest.fixture
def folder(save: Save, tmp_path: Path) -> Path:
    return unpacked(save(state()), tmp_path / "out")


def unpacked(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.mark.parametrize("given", ["", "data.pkl"])
def test_it_is_what_torch_loads_of_the_archive(given: str, folder: Path, tmp_path: Path) -> None:
    path = folder / given
    with ckptkit.open(path) as file:
        assert (file.format, file.kind, file.trust) == ("torch-zip", "resume", "safe")
        assert {finding.code for finding in file.findings} >= {"crc-not-recorded"}
    found, wanted = ckptkit.load_state_dict(path), state()["model"]
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    ckptkit.convert(path, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again["epoch"] == 3 and all(torch.equal(again["model"][name], wanted[name]) for name in wanted)
    assert ckptkit.diff(path, tmp_path / "again.pth").equal
    assert ckptkit.check(path).ok


def test_from_the_folder_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert list(ckptkit.load_state_dict("data.pkl")) == list(ckptkit.load_state_dict(".")) == list(state()["model"])


def test_a_folder_around_it_holds_one_checkpoint(folder: Path, save: Save, run: Any) -> None:
    report = ckptkit.check(folder.parent)
    assert [result.path for result in report.results] == [str(folder / "data.pkl")] and not report.passed_over
    assert run("inspect", folder.parent).stdout.count("torch-zip") == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_program(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with ckptkit.open(unpacked(tmp_path / "model.pt", tmp_path / "out") / "data.pkl") as file:
        assert file.format == "torchscript" and list(file.state_dict) == ["weight", "bias"]


def test_more_records_than_files_may_be_open(save: Save, tmp_path: Path) -> None:
    values = {str(number): torch.full((2,), float(number)) for number in range(300)}
    folder = unpacked(save(values), tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 90, before[1]))
    try:
        found = ckptkit.load_state_dict(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_sizes_are_held_against_the_pickle(folder: Path) -> None:
    record = folder / "data" / "0"
    for data in (record.read_bytes()[:-1], record.read_bytes() + b"x"):
        record.write_bytes(data)
        with pytest.raises(CorruptError, match="storage '0' is declared as 48 bytes, but its record has"):
            formats.read(folder)
    record.unlink()
    with pytest.raises(CorruptError, match="storage '0' has no record data/0"):
        formats.read(folder)


def test_no_link_leads_out_of_it(folder: Path, tmp_path: Path) -> None:
    record, secret = folder / "data" / "0", tmp_path / "secret"
    secret.write_bytes(record.read_bytes())
    inside = folder / "kept"
    record.rename(inside)
    record.symlink_to(inside)
    assert list(ckptkit.load_state_dict(folder)) == list(state()["model"])
    for target in (secret, Path("../../../secret"), tmp_path):
        record.unlink()
        record.symlink_to(target)
        with pytest.raises(AmbiguousError, match="'data/0' is a link that leads out of the folder"):
            formats.read(folder)
    record.unlink()
    record.symlink_to(folder.parent)  # and back in
    with pytest.raises(CkptkitError):
        formats.read(folder)


def test_keys_lead_nowhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((folder / "data" / "0").read_bytes())
    pickled = folder / "data.pkl"
    longer = pickled.read_bytes().replace(b"X\x01\x00\x00\x000", b"X\x0f\x00\x00\x00../../../secret", 1)
    assert b"../../../secret" in longer
    pickled.write_bytes(longer)
    with pytest.raises(CorruptError, match=r"has no record data/../../../secret"):
        formats.read(folder)


def test_what_changes_while_it_is_read_is_an_error(folder: Path) -> None:
    with ckptkit.open(folder) as file:
        (folder / "data" / "0").write_bytes(bytes(48))
        os.utime(folder / "data" / "0", ns=(1, 1))
        assert file._file.changed()
        file._file.release()  # of what is open the system tells nothing
        with pytest.raises(CorruptError, match="'data/0' was changed while it was being read"):
            file.state_dict["a.w"].storage.source.read()


def test_no_pipe_is_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "data" / "pipe")
    assert list(ckptkit.load_state_dict(folder)) == list(state()["model"])


def test_names_beside_it_count_for_trust(folder: Path) -> None:
    (folder / "extra.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with ckptkit.open(folder) as file:
        assert file.trust == "hostile"


def test_other_folders_are_told_as_before(tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(b"x")
    with pytest.raises(FileAccessError, match="is a folder, not a file"):
        formats.read(tmp_path)
