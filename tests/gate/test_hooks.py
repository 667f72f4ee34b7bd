"""``.pre-commit-hooks.yaml``: which files the hooks take, and what becomes of a commit, by pre-commit itself.

pre-commit would install ckptkit into an environment of its own, from the network; here the hooks are the same, in a
repository of their own, but for the language: ``system``, with this interpreter's ckptkit on the path.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent.parent
MANIFEST = ROOT / ".pre-commit-hooks.yaml"
HOOKS = {hook["id"]: hook for hook in yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))}


def test_the_manifest_is_one() -> None:
    done = subprocess.run([sys.executable, "-m", "pre_commit", "validate-manifest", MANIFEST], check=False)
    assert done.returncode == 0
    assert set(HOOKS) == {"ckptkit-check", "ckptkit-no-pickle"}
    assert all(hook["language"] == "python" for hook in HOOKS.values())


def test_every_file_is_handed_over() -> None:
    assert all(hook["types"] == ["file"] and "files" not in hook for hook in HOOKS.values())
    assert all("--skip-others" in hook["entry"].split() for hook in HOOKS.values())


SAFE = ROOT / "fixtures" / "state_dict.safetensors"
SHARDS = {path.name: path for path in sorted((ROOT / "fixtures").glob("model*.safetensors*"))}


def test_good_checkpoints_pass_both(commit) -> None:
    done = commit("ckptkit-check", {"w/a b.safetensors": SAFE, "w/c.pth": {"w": torch.ones(3)}, "README.md": b"hello"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed" in done.stdout


def test_a_commit_without_checkpoints_is_let_by(commit) -> None:
    for hook in HOOKS:
        done = commit(hook, {"README.md": b"hello", "a.py": b"import os\n", "empty": b""})
        assert (done.returncode, "Passed" in done.stdout) == (0, True), done.stdout


@pytest.mark.parametrize("name", ["best.pth.tar", "m.sav", "weights", "notes.txt"])
def test_a_checkpoint_is_known_whatever_its_name(commit, name: str) -> None:
    done = commit("ckptkit-no-pickle", {name: {"w": torch.ones(3)}})
    assert done.returncode == 1
    assert f"{name}: FAILED" in done.stdout


def test_a_pickle_that_torch_did_not_write_is_refused_too(commit) -> None:
    done = commit("ckptkit-no-pickle", {"vocabulary.pkl": pickle.dumps({"a": 1}), "old": pickle.dumps([1], protocol=0)})
    assert done.returncode == 1
    assert "vocabulary.pkl: FAILED" in done.stdout and "old: FAILED" in done.stdout
    assert commit("ckptkit-check", {"vocabulary.pkl": pickle.dumps({"a": 1})}).returncode == 0


def test_a_pickle_is_refused_by_its_hook(commit) -> None:
    done = commit("ckptkit-no-pickle", {"a.safetensors": SAFE, "dir with space/c.pth": {"w": torch.ones(3)}})
    assert done.returncode == 1
    assert "dir with space/c.pth" in done.stdout
    assert "a.safetensors: " not in done.stdout.partition("c.pth")[2]


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"])
def test_what_is_no_checkpoint_is_refused(commit, content: bytes) -> None:
    done = commit("ckptkit-check", {"model.pth": content})
    assert done.returncode == 1
    assert "model.pth" in done.stdout


def test_shards_and_their_index_pass(commit) -> None:
    assert len(SHARDS) == 3
    done = commit("ckptkit-no-pickle", dict(SHARDS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_shard_that_changed_checks_its_whole(commit) -> None:
    changed = dict(SHARDS)
    changed[sorted(SHARDS)[0]] = SAFE
    done = commit("ckptkit-check", changed)
    assert done.returncode == 1
    assert "model.safetensors.index.json: NOT CHECKED" in done.stdout
    assert "1 of 1 file could not be checked" in done.stdout


def test_arguments_are_policy(commit) -> None:
    done = commit("ckptkit-check", {"model.pth": {"w": torch.full((2,), float("nan"))}}, args=["--no-nan"])
    assert done.returncode == 1
    assert "NaN" in done.stdout


def test_the_configuration_of_the_repository_counts(commit) -> None:
    policy = b'[tool.ckptkit]\nmax_size = "1kB"\n'
    done = commit("ckptkit-check", {"pyproject.toml": policy, "model.pth": {"w": torch.ones(3000)}})
    assert done.returncode == 1
    assert "1" in done.stdout
    assert "model.pth" in done.stdout


def test_the_manifest_of_the_repository_counts(commit, run, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a.safetensors").write_bytes(SAFE.read_bytes())
    assert run("manifest", "weights", "-o", "weights/weights.lock.json").returncode == 0
    files = {
        "pyproject.toml": b'[tool.ckptkit]\nmanifest = "weights/weights.lock.json"\n',
        "weights/weights.lock.json": weights / "weights.lock.json",
    }
    assert commit("ckptkit-check", {**files, "weights/a.safetensors": SAFE}).returncode == 0
    changed = commit("ckptkit-check", {**files, "weights/a.safetensors": ROOT / "fixtures" / "tied.pth"})
    assert changed.returncode == 1
    assert "weights/a.safetensors" in changed.stdout
    extra = commit("ckptkit-check", {**files, "weights/a.safetensors": SAFE, "weights/b.safetensors": SAFE})
    assert extra.returncode == 1
    assert "file-extra" in extra.stdout
