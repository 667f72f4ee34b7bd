"""``ckptkit manifest``: the command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("legacy.pth", "tied.pth"):
        shutil.copy(FIXTURES / name, folder)
    return folder


def test_write_update_and_check(run, weights: Path) -> None:
    lock = weights / "weights.lock.json"
    done = run("manifest", weights, "-o", lock)
    assert done.returncode == 0
    assert re.fullmatch(r"ckptkit: 2 files, [\d.]+ kB, in (under )?\d\.\d s\n", done.stderr)
    first, second, last = done.stdout.splitlines()
    assert first.startswith("+ legacy.pth  torch-legacy, 3.77 kB, resume, sha256:")
    assert second.startswith("+ tied.pth  torch-zip")
    assert last == f"{lock}: 2 files (2 added)"
    assert run("check", "--manifest", lock).returncode == 0
    (weights / "tied.pth").unlink()
    torch.save({"w": torch.ones(1)}, weights / "legacy.pth")
    torch.save({"w": torch.ones(1)}, weights / "new.pth")
    assert run("check", "--manifest", lock).returncode == 1
    done = run("manifest", "--update", "-o", lock)
    assert [line[:10] for line in done.stdout.splitlines()[:3]] == ["+ new.pth ", "~ legacy.p", "- tied.pth"]
    assert done.stdout.endswith("2 files (1 added, 1 changed, 1 removed)\n")
    assert run("check", "--manifest", lock).returncode == 0
    assert run("manifest", "--update", "-o", lock).stdout == f"{lock}: 2 files (2 unchanged)\n"
    quiet = run("manifest", "--force", "-q", weights, "-o", lock)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_without_a_destination_it_is_printed(run, weights: Path) -> None:
    done = run("manifest", "--digests", "total", "legacy.pth", cwd=weights)
    document = json.loads(done.stdout)
    assert document["files"][0]["path"] == "legacy.pth"
    assert document["files"][0]["tensors"] is None
    assert done.stdout.startswith(
        '{\n  "schema_version": 1,\n  "folders": [],\n  "files": [\n    {\n      "path": "legacy.pth",\n'
    )


def test_what_is_passed_over_is_counted_and_not_written(run, weights: Path) -> None:
    lock = weights / "weights.lock.json"
    (weights / "README.md").write_text("words")
    done = run("manifest", weights, "-o", lock)
    assert done.stdout.splitlines()[-2:] == ["skipped: 1 file (1 text file)", f"{lock}: 2 files (2 added)"]
    assert json.loads(run("manifest", "--json", weights).stdout)["passed_over"] == {"text file": 1, "JSON file": 1}
    assert "passed_over" not in lock.read_text()
    (weights / "x.pth").symlink_to("nowhere")
    done = run("manifest", weights)
    assert done.returncode == 2 and "x.pth: a broken link" in done.stderr


def test_json(run, weights: Path) -> None:
    done = run("manifest", "--json", weights, "-o", weights / "m.json")
    document = json.loads(done.stdout)
    changes = document.pop("changes")
    assert changes == {"added": ["legacy.pth", "tied.pth"], "changed": [], "removed": [], "kept": []}
    assert document == json.loads((weights / "m.json").read_text())


def test_golden_files(run, weights: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(FIXTURES / "state_dict.safetensors", weights / name)
    done = run(
        *("manifest", "legacy.pth", "tied.pth", "-o", "m.json"),
        *("--golden", "legacy.pth=a.safetensors", "--golden", "tied.pth=b.safetensors"),
        cwd=weights,
    )
    assert done.returncode == 0, done.stderr
    files = json.loads((weights / "m.json").read_text())["files"]
    assert [file["golden"]["path"] for file in files] == ["a.safetensors", "b.safetensors"]
    one = run("manifest", "legacy.pth", "--golden", "a.safetensors", cwd=weights)
    assert json.loads(one.stdout)["files"][0]["golden"]["path"] == "a.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'PATH...'"),
        (["--update", "legacy.pth"], "--update needs the manifest"),
        (["legacy.pth", "--golden", "a", "--golden", "b"], "each as FILE=GOLDEN"),
        (["legacy.pth", "--golden", "a=b", "--golden", "a=c"], "each FILE once"),
        (["none.pth", "-o", "m.json"], "no such file"),
        (["legacy.pth", "-o", "there.json"], "already exists"),
        (["legacy.pth", "-o", "there.json", "--update"], "the manifest is not valid JSON"),
        (["legacy.pth", "-o", "none/m.json"], "not below the manifest's folder"),
        (["empty"], "a folder without checkpoint files"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], message: str, run, weights: Path) -> None:
    (weights / "there.json").write_text("mine")
    (weights / "empty").mkdir()
    done = run("manifest", *arguments, cwd=weights)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert (weights / "there.json").read_text() == "mine"
