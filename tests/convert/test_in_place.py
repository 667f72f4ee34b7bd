"""``--in-place``, ``--backup``, several sources, and the question that comes before files are replaced."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit

DDP = {"module.w": torch.ones(3, 3), "module.b": torch.zeros(3)}


@pytest.fixture
def ddp(tmp_path: Path) -> Path:
    """A checkpoint whose names have a prefix."""
    torch.save(DDP, tmp_path / "ddp.pth")
    return tmp_path / "ddp.pth"


def names(path: Path) -> list[str]:
    return [*(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))]


def test_a_file_is_replaced_and_keeps_its_container_and_permissions(convert, ddp: Path, tmp_path: Path) -> None:
    ddp.chmod(0o640)
    done = convert("ddp.pth", "--in-place", "--strip-module")
    assert done.code == 0, done.err
    assert names(ddp) == ["w", "b"]
    assert stat.S_IMODE(ddp.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["ddp.pth"]


def test_a_container_is_that_of_the_content(convert, tmp_path: Path) -> None:
    save_file(DDP, tmp_path / "model.bin")
    assert convert("model.bin", "--in-place", "--strip-module").code == 0
    assert [*load_file(tmp_path / "model.bin")] == ["b", "w"]
    done = convert("model.bin", "--in-place", "--to", "torch-zip")  # which its name is one of
    assert done.code == 0, done.err
    assert names(tmp_path / "model.bin") == ["b", "w"]


def test_the_old_file_is_kept_under_a_free_name(convert, ddp: Path, tmp_path: Path) -> None:
    before = ddp.read_bytes()
    (tmp_path / "ddp.pth.bak").write_text("mine")
    done = convert("ddp.pth", "--in-place", "--backup", "--strip-module", "--json")
    assert json.loads(done.out)["backup"] == "ddp.pth.bak.1"
    assert (tmp_path / "ddp.pth.bak.1").read_bytes() == before
    assert (tmp_path / "ddp.pth.bak").read_text() == "mine"
    assert "the old file is ddp.pth.bak.2" in convert("ddp.pth", "--in-place", "--backup").out


def test_a_backup_without_hard_links_is_a_copy(convert, ddp: Path, tmp_path: Path, monkeypatch) -> None:
    before = ddp.read_bytes()

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("ckptkit.conversion.in_place.os.link", refuse)
    assert convert("ddp.pth", "--in-place", "--backup", "--strip-module").code == 0
    assert (tmp_path / "ddp.pth.bak").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["ddp.pth", "ddp.pth.bak"]


def test_links(convert, ddp: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/link.pth").symlink_to("../ddp.pth")
    os.link(ddp, tmp_path / "other.pth")
    before = ddp.read_bytes()
    assert convert("there/link.pth", "--in-place", "--backup", "--strip-module").code == 0
    assert (tmp_path / "there/link.pth").is_symlink()
    assert names(ddp) == ["w", "b"]
    assert (tmp_path / "other.pth").read_bytes() == (tmp_path / "there/link.pth.bak").read_bytes() == before


@pytest.mark.parametrize("backup", [[], ["--backup"]])
def test_what_fails_leaves_the_old_file_alone(convert, ddp: Path, tmp_path: Path, monkeypatch, backup) -> None:
    before = ddp.read_bytes()
    assert convert("ddp.pth", "--in-place", *backup, "--rename", ".*=>x").code == 2
    monkeypatch.setattr("ckptkit.compare.check_output", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert convert("ddp.pth", "--in-place", *backup, "--strip-module").code == 2
    assert ddp.read_bytes() == before
    assert os.listdir(tmp_path) == ["ddp.pth"]


def test_an_interrupt_leaves_the_old_file_alone(ddp: Path, tmp_path: Path) -> None:
    before = ddp.read_bytes()

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckptkit.convert(ddp, in_place=True, backup=True, progress=interrupt)
    assert ddp.read_bytes() == before
    assert os.listdir(tmp_path) == ["ddp.pth"]


def test_a_dry_run_changes_nothing(convert, ddp: Path, tmp_path: Path) -> None:
    before = ddp.read_bytes()
    done = convert("ddp.pth", "--in-place", "--backup", "--strip-module", "--dry-run")
    assert done.code == 0 and "nothing was written" in done.out
    assert ddp.read_bytes() == before
    assert os.listdir(tmp_path) == ["ddp.pth"]


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("-", [], "is standard input"),
        ("http://127.0.0.1:1/a.pth", [], "is a URL"),
        ("folder", [], "is a folder; name the files in it"),
        ("a.zip!m.pth", [], "is a member of an archive"),
        ("ddp.pth.gz", [], "is compressed"),
        ("old.pth", [], "is torch-legacy, which ckptkit reads but does not write; --to torch-zip"),
        ("ddp.pth", ["--to", "safetensors"], "--in-place keeps the name"),
        ("ddp.pth", ["--to", "dcp"], "--to dcp writes several files; --in-place replaces one"),
        ("ddp.pth", ["--to", "torch-sharded"], "--to torch-sharded writes several files"),
        ("none.pth", [], "no such file"),
        ("model.safetensors.index.json", [], "is one of several files of a checkpoint"),
        ("ddp.pth", ["--max-shard-size", "5MB"], "--max-shard-size: --in-place replaces single files"),
        ("ddp.pth", ["--part", "1/2"], "--part: --in-place replaces single files"),
    ],
)
def test_what_cannot_be_replaced(convert, ddp: Path, tmp_path: Path, source: str, options, told: str) -> None:
    import gzip

    (tmp_path / "folder").mkdir()
    (tmp_path / "ddp.pth.gz").write_bytes(gzip.compress(ddp.read_bytes()))
    torch.save(DDP, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    ckptkit.convert(ddp, tmp_path / "model.safetensors", max_shard_size=40, receipt=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    done = convert(source, "--in-place", *options)
    assert (done.code, done.out) == (2, "")
    assert told in done.err and done.err.count("error: ") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_old_container_becomes_a_new_one_where_that_is_asked_for(convert, tmp_path: Path) -> None:
    torch.save(DDP, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert convert("old.pth", "--in-place", "--to", "torch-zip").code == 0
    assert ckptkit.inspect(tmp_path / "old.pth")["format"] == "torch-zip"


def test_several_in_place_and_one_that_cannot_be(convert, ddp: Path, tmp_path: Path) -> None:
    torch.save(DDP, tmp_path / "b.pth")
    (tmp_path / "bad.pth").write_text("words")
    done = convert("ddp.pth", "bad.pth", "none.pth", "b.pth", "--in-place", "--backup", "--strip-module")
    assert done.code == 2
    assert done.err.count("ckptkit: error: ") == 2
    assert "2 of 4 files converted" in done.out
    assert names(ddp) == names(tmp_path / "b.pth") == ["w", "b"]
    assert sorted(os.listdir(tmp_path)) == ["b.pth", "b.pth.bak", "bad.pth", "ddp.pth", "ddp.pth.bak"]


def test_several_in_place_by_workers(ddp: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.pth" for number in range(4)]
    for path in paths:
        torch.save(DDP, path)
    report = ckptkit.convert(paths, in_place=True, strip_module=True, jobs=2)
    assert report.ok
    assert all(names(path) == ["w", "b"] for path in paths)


def test_several_into_a_folder(convert, ddp: Path, tmp_path: Path) -> None:
    torch.save(DDP, tmp_path / "b.pth")
    done = convert("ddp.pth", "none.pth", "b.pth", "out/", "--to", "safetensors", "--strip-module")
    assert done.code == 2
    assert "none.pth: no such file" in done.err
    assert sorted(os.listdir(tmp_path / "out")) == ["b.safetensors", "ddp.safetensors"]
    assert convert("ddp.pth", "b.pth", "same/").code == 0  # in the containers that they have
    assert sorted(os.listdir(tmp_path / "same")) == ["b.pth", "ddp.pth"]
    assert "2 outputs already exist" in convert("ddp.pth", "b.pth", "same").err
    assert "unexpected extra argument (c.pth)" in convert("ddp.pth", "b.pth", "c.pth").err
    (tmp_path / "x").mkdir()
    torch.save(DDP, tmp_path / "x/b.pth")
    done = convert("b.pth", "x/b.pth", "new/")
    assert done.code == 2 and "from b.pth and x/b.pth" in done.err
    assert not (tmp_path / "new").exists()


def test_one_into_a_folder_keeps_its_name(convert, ddp: Path, tmp_path: Path) -> None:
    assert convert("ddp.pth", "out/", "--strip-module").code == 0
    assert names(tmp_path / "out/ddp.pth") == ["w", "b"]


def test_python(ddp: Path) -> None:
    report = ckptkit.convert(ddp, in_place=True, backup=True, strip_module=True)
    assert report.to_dict()["backup"] == f"{ddp}.bak"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'destination'"):
        ckptkit.convert(ddp)
    with pytest.raises(ckptkit.RewriteError, match="with --in-place there is no destination"):
        ckptkit.convert(ddp, ddp, in_place=True)
    with pytest.raises(ckptkit.RewriteError, match="--backup keeps the old file of --in-place"):
        ckptkit.convert(ddp, ddp, backup=True)
    with pytest.raises(ckptkit.RewriteError, match="--in-place replaces a file: expected its path, found bytes"):
        ckptkit.convert(ddp.read_bytes(), in_place=True)


def test_who_asks_before_files_are_replaced(ddp: Path, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    before = ddp.read_bytes()

    def no(paths) -> bool:
        asked.append([os.path.relpath(path, tmp_path) for path in paths])
        return False

    other = tmp_path / "other.pth"
    for source, destination, options in (
        (ddp, None, {"in_place": True}),
        ([ddp, tmp_path / "none.pth"], None, {"in_place": True}),
    ):
        with pytest.raises(ckptkit.DestinationExistsError, match="nothing was changed"):
            ckptkit.convert(source, destination, confirm=no, **options)
    assert asked == [["ddp.pth"]] * 2
    assert ddp.read_bytes() == before
    ckptkit.convert(ddp, in_place=True, backup=True, confirm=no)  # nothing is lost
    ckptkit.convert(ddp, other, force=True, confirm=no)  # nothing is there
    ckptkit.convert(ddp, other, force=True, dry_run=True, confirm=no)
    assert len(asked) == 2
    with pytest.raises(ckptkit.DestinationExistsError):
        ckptkit.convert(ddp, other, force=True, confirm=no)
    with pytest.raises(ckptkit.DestinationExistsError):
        ckptkit.convert([ddp], tmp_path, to="pth", force=True, confirm=no)
    assert asked[2:] == [["other.pth"], ["ddp.pth"]]
    assert ckptkit.convert(ddp, other, force=True, confirm=lambda paths: True).ok


def on_a_terminal(folder: Path, answer: bytes | int, *words: str) -> tuple[int, str]:
    """The command on a terminal of its own; ``answer`` is typed, or sent as a signal, when it asks."""
    pty = pytest.importorskip("pty", reason="Windows has no such terminals")
    pid, fd = pty.fork()
    if pid == 0:  # pragma: no cover
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "ckptkit", *words])  # noqa: S606
    seen, answered = b"", False
    while select.select([fd], [], [], 60)[0]:
        try:
            data = os.read(fd, 4096)
        except OSError:  # it has ended
            break
        if not data:
            break
        seen += data
        if not answered and b"[y/N]" in seen:
            answered = True
            time.sleep(0.3)  # until it reads: a signal that comes in just before waits for what is typed next
            os.kill(pid, answer) if isinstance(answer, int) else os.write(fd, answer)
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode()


def test_other_hard_links_are_told_of(convert, ddp: Path, tmp_path: Path) -> None:
    def told(*words: str) -> list[str]:
        done = convert(*words, "--strip-module", "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)["findings"]
        return [each["message"] for each in found if each["code"] == "other-hard-links"]

    before = ddp.read_bytes()
    assert told("ddp.pth", "new.pth") == []
    os.link(ddp, tmp_path / "second.pth")
    one = "ddp.pth: 1 other hard link keeps the old content"
    assert told("ddp.pth", "--in-place", "--dry-run") == [one]
    assert f"warning: {one} [other-hard-links]\n" in convert("ddp.pth", "--in-place", "--dry-run").err
    os.link(ddp, tmp_path / "third.pth")
    os.symlink("ddp.pth", tmp_path / "link.pth")
    two = "2 other hard links keep the old content"
    assert told("link.pth", "--in-place", "--dry-run") == [f"link.pth: {two}"]
    assert told("new.pth", "ddp.pth", "--force", "--dry-run") == [f"ddp.pth: {two}"]
    assert told("ddp.pth", "--in-place", "--backup") == [f"ddp.pth: {two}"]  # the backup is not another
    assert names(ddp) == ["w", "b"]
    assert all((tmp_path / name).read_bytes() == before for name in ("second.pth", "third.pth", "ddp.pth.bak"))
    assert told("ddp.pth", "--in-place") == []
    files = ["second.pth", "new.pth"]
    document = json.loads(convert(*files, "--in-place", "--strip-module", "--json").out)
    assert [{f["code"] for f in file["findings"]} & {"other-hard-links"} for file in document["files"]] == [
        {"other-hard-links"}, set()
    ]  # fmt: skip


def test_other_hard_links_of_shards_are_told_of(convert, ddp: Path, tmp_path: Path) -> None:
    words = ("ddp.pth", "out.safetensors", "--max-shard-size", "30B", "--force")
    assert convert(*words).code == 0
    os.link(tmp_path / "out-00002-of-00002.safetensors", tmp_path / "other")
    done = convert(*words)
    assert done.code == 0 and done.err.count("[other-hard-links]") == 1
    assert "warning: out-00002-of-00002.safetensors: 1 other hard link keeps the old content" in done.err


def test_the_question_tells_of_other_hard_links(ddp: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(ckptkit.__file__).parent.parent))
    os.link(ddp, tmp_path / "second.pth")
    ended, seen = on_a_terminal(tmp_path, b"n\n", "convert", "ddp.pth", "--in-place", "--strip-module")
    assert ended == 2
    assert "and no copy is kept except as other hard links. Replace it? [y/N]" in " ".join(seen.split())


@pytest.mark.parametrize(("answer", "code"), [(b"\n", 2), (b"\x04", 2), (signal.SIGINT, 130), (b"y\n", 0)])
def test_the_question_on_a_terminal(ddp: Path, tmp_path: Path, monkeypatch, answer: bytes | int, code: int) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(ckptkit.__file__).parent.parent))
    before = ddp.read_bytes()
    ended, seen = on_a_terminal(tmp_path, answer, "convert", "ddp.pth", "--in-place", "--strip-module")
    assert ended == code, seen
    assert "ddp.pth will be replaced, and no copy is kept. Replace it? [y/N]" in seen
    assert (ddp.read_bytes() == before) == (code != 0)


def test_yes_leaves_the_question_out(ddp: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(ckptkit.__file__).parent.parent))
    ended, seen = on_a_terminal(tmp_path, b"n\n", "convert", "ddp.pth", "--in-place", "--strip-module", "--yes")
    assert ended == 0 and "[y/N]" not in seen
    assert names(ddp) == ["w", "b"]
