"""The README's section "In CI", and the topic on it: every example runs as it stands there, in a repository like its
reader's."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ckptkit.codes import topic

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLEAN = ["convert", "fixtures/ddp_resume.pth", "demo/clean.safetensors", "--strip-module", "--weights-only", "--force"]


def blocks(language: str) -> list[str]:
    section = re.search(r"^## In CI\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)
    assert section is not None, "README.md has no section 'In CI'"
    return re.findall(rf"^```{language}\n(.*?)^```$", f"{section[1]}\n{topic('ci')}", re.DOTALL | re.MULTILINE)


def configuration(name: str) -> Any:
    """The YAML example that is named in its first line."""
    (found,) = [block for block in blocks("yaml") if block.startswith(f"# {name}\n")]
    return yaml.safe_load(found)


@pytest.fixture
def clone(tmp_path: Path, run) -> Path:
    """The fixtures, and what the README's first commands make of them."""
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    (tmp_path / "demo").mkdir()
    assert run(*CLEAN).returncode == 0
    return tmp_path


def fill(repository: Path, run) -> None:
    """The weights that the examples speak of, and the manifest of some."""
    shutil.rmtree(repository / "weights", ignore_errors=True)
    for folder in ("weights", "checkpoints", "exported models"):
        (repository / folder).mkdir(parents=True)
        shutil.copy(ROOT / "fixtures" / "state_dict.safetensors", repository / folder / "net.safetensors")
    done = run("manifest", "weights", "-o", "weights/weights.lock.json", cwd=repository)
    assert done.returncode == 0, done.stderr


def pickled(repository: Path) -> None:
    torch.save({"w": torch.ones(2)}, repository / "weights" / "pickled.pth")


def test_the_shell_commands(clone: Path, forks) -> None:
    ckptkit = forks(with_torch=True).shell("ckptkit", "-m", "ckptkit")
    script = "\n".join(["set -euo pipefail", ckptkit, *blocks("sh")])
    done = subprocess.run(["bash", "-c", script], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ElementTree.fromstring((clone / "demo" / "check.xml").read_bytes()).tag == "testsuites"  # noqa: S314 - ours
    assert (clone / "demo" / "weights" / "weights.lock.json").exists()
    assert (clone / "demo" / "comment.md").read_text().strip()


def test_gitlab(tmp_path: Path, run, forks) -> None:
    job = configuration(".gitlab-ci.yml")["weights"]
    install, check = job["script"]
    assert install == 'pip install "$CKPTKIT"'
    fill(tmp_path, run)
    words = f"set -e\n{forks(with_torch=False).shell('ckptkit', '-m', 'ckptkit')}{check}"
    report = tmp_path / job["artifacts"]["reports"]["junit"]
    for spoil, code in ((None, 0), (pickled, 1)):
        if spoil is not None:
            spoil(tmp_path)
        done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert ("<failure" in report.read_text()) == bool(code)


def test_the_policy_in_pyproject(tmp_path: Path, run) -> None:
    (policy,) = blocks("toml")
    fill(tmp_path, run)
    (tmp_path / "pyproject.toml").write_text(policy)
    good = run("check", cwd=tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    pickled(tmp_path)
    bad = run("check", cwd=tmp_path)
    assert bad.returncode == 1
    assert "pickled.pth" in bad.stdout
    assert "no-pickle" in bad.stdout


def test_the_workflow(runner, run) -> None:
    steps = configuration(".github/workflows/weights.yml")["jobs"]["weights"]["steps"]
    checkout, released, others = steps
    assert checkout["uses"].startswith("actions/checkout@")
    assert {released["uses"], others["uses"]} == {"OWNER/ckptkit@v0.2.0"}
    fill(runner.workspace, run)
    for step in (released, others):
        good = runner.run(**step["with"])
        assert good.returncode == 0, good.stdout + good.stderr
    pickled(runner.workspace)
    bad = runner.run(**released["with"])
    assert bad.returncode == 1
    assert "::error file=weights/pickled.pth" in bad.stdout
    (runner.workspace / "exported models" / "net.safetensors").unlink()
    assert runner.run(**others["with"]).returncode == 2


def test_the_hooks(commit) -> None:
    (repository,) = configuration(".pre-commit-config.yaml")["repos"]
    overrides = {hook.pop("id"): hook for hook in repository["hooks"]}
    state = {"w": torch.ones(2)}
    check, no_pickle = overrides["ckptkit-check"], overrides["ckptkit-no-pickle"]
    assert commit("ckptkit-check", {"a.pth": state}, **check).returncode == 0
    assert commit("ckptkit-check", {"a.pth": {"w": torch.full((2,), float("inf"))}}, **check).returncode == 1
    assert commit("ckptkit-no-pickle", {"legacy/a.pth": state}, **no_pickle).returncode == 0
    assert commit("ckptkit-no-pickle", {"a.pth": state}, **no_pickle).returncode == 1


def test_the_assertions(clone: Path, python) -> None:
    tests, _deployment = blocks("python")
    (clone / "test_release.py").write_text(tests)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_release.py"]
    good = python(*command, cwd=clone)
    assert good.returncode == 0, good.stdout
    assert "2 passed" in good.stdout
    torch.save({"w": torch.full((2,), float("nan"))}, clone / "demo" / "clean.safetensors")
    bad = python(*command, cwd=clone)
    assert "2 failed" in bad.stdout


def test_the_deployment(clone: Path, python) -> None:
    _tests, deployment = blocks("python")
    assert len([line for line in deployment.splitlines() if line]) <= 15
    after = "print(type(state['classifier.1.weight']).__name__, len(state))"
    good = python("-c", f"{deployment}\n{after}", cwd=clone)
    assert (good.returncode, good.stdout) == (0, "Tensor 314\n"), good.stderr
    (clone / "demo" / "served.safetensors").unlink()
    given = torch.load(clone / "fixtures" / "ddp_resume.pth", map_location="cpu", weights_only=False)
    given["state_dict"]["module.classifier.1.bias"][0] = float("nan")
    torch.save(given, clone / "fixtures" / "ddp_resume.pth")
    bad = python("-c", f"{deployment}\n{after}", cwd=clone)
    assert bad.returncode == 1
    assert "FailedReportError" in bad.stderr
    assert not (clone / "demo" / "served.safetensors").exists()
