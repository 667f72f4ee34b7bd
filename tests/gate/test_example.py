"""The example in ``repository/``: its weights are held by GitHub, GitLab, pre-commit and pytest."""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

EXAMPLE = Path(__file__).parent / "repository"
WEIGHTS = EXAMPLE.parent.parent.parent / "fixtures" / "state_dict.safetensors"


def configured(name: str) -> Any:
    return yaml.safe_load((EXAMPLE / name).read_text(encoding="utf-8"))


@pytest.fixture
def clone(tmp_path: Path, run) -> Path:
    """The example with its weights, and the manifest of them."""
    repository = tmp_path / "clone"
    shutil.copytree(EXAMPLE, repository)
    (repository / "weights").mkdir()
    shutil.copy(WEIGHTS, repository / "weights" / "net.safetensors")
    done = run("manifest", "weights", "-o", "weights/weights.lock.json", cwd=repository)
    assert done.returncode == 0, done.stderr
    return repository


def spoil(repository: Path) -> None:
    torch.save({"w": torch.ones(2)}, repository / "weights" / "new.pth")


def test_gitlab(clone: Path, forks) -> None:
    job = configured(".gitlab-ci.yml")["weights"]
    install, *script = job["script"]
    assert install == 'pip install "$CKPTKIT"' and "CKPTKIT" in job["variables"]
    words = "\n".join(["set -eo pipefail", forks(with_torch=False).shell("ckptkit", "-m", "ckptkit"), *script])
    reports = {name: clone / path for name, path in job["artifacts"]["reports"].items()}
    found: list[set[str]] = []
    for code in (0, 1):
        done = subprocess.run(["bash", "-c", words], cwd=clone, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        issues = json.loads(reports["codequality"].read_text(encoding="utf-8"))
        found.append({issue["check_name"] for issue in issues})
        assert {issue["location"]["path"] for issue in issues} <= {"weights/new.pth"}
        assert len({issue["fingerprint"] for issue in issues}) == len(issues)
        failures = ElementTree.parse(reports["junit"]).findall(".//failure")  # noqa: S314 - ours
        assert bool(failures) == bool(code)
        spoil(clone)
    assert found == [set(), {"file-extra", "pickle-not-allowed"}]


def test_github(clone: Path, runner) -> None:
    (job,) = configured(".github/workflows/weights.yml")["jobs"].values()
    _, action, _ = job["steps"]
    assert action["uses"].startswith("OWNER/ckptkit@v")
    shutil.rmtree(runner.workspace)
    shutil.copytree(clone, runner.workspace)
    good = runner.run(**action["with"])
    assert good.returncode == 0, good.stdout + good.stderr
    spoil(runner.workspace)
    bad = runner.run(**action["with"])
    assert bad.returncode == 1
    assert "::error file=weights/new.pth" in bad.stdout
    good_one, bad_one = runner.summary.read_text(encoding="utf-8").split("## ckptkit check: ")[1:]
    assert good_one.startswith("passed") and bad_one.startswith("**failed**") and "`weights/new.pth`" in bad_one


def test_pre_commit(commit) -> None:
    ((hook,),) = [repository["hooks"] for repository in configured(".pre-commit-config.yaml")["repos"]]
    name = hook.pop("id")
    assert commit(name, {"weights/net.safetensors": WEIGHTS}, **hook).returncode == 0
    assert commit(name, {"weights/new.pth": {"w": torch.ones(2)}}, **hook).returncode == 1


def test_pytest(clone: Path, python) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    good = python(*command, cwd=clone)
    assert (good.returncode, "2 passed" in good.stdout) == (0, True), good.stdout
    (clone / "weights" / "net.safetensors").unlink()
    assert python(*command, cwd=clone).returncode == 1
