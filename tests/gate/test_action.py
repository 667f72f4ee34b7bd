"""``action.yml``: its steps, run as GitHub's runner runs them, but for the installation, which a stand-in does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def test_it_is_a_composite_action_with_inputs_that_are_all_used() -> None:
    assert ACTION["runs"]["using"] == "composite"
    steps = str(ACTION["runs"]["steps"])
    for name, facts in ACTION["inputs"].items():
        assert facts["description"]
        assert facts["default"] == ""
        assert f"inputs.{name} " in steps
    for step in ACTION["runs"]["steps"]:
        assert step["name"]
        assert ("uses" in step) != ("run" in step)


def test_good_files_pass(runner) -> None:
    done = runner.run(paths="weights", **{"python-version": "3.12"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::error" not in done.stdout
    assert runner.used == ["actions/setup-python@v5"]


def test_the_install_takes_the_actions_own_checkout_and_extras(runner) -> None:
    runner.run(paths="weights", extras="torch")
    venv, pip = (runner.temp / "calls").read_text().splitlines()[:2]
    assert venv == f"-m venv {runner.temp}/ckptkit"
    assert pip.endswith(f"{ROOT}[torch]")
    assert runner.used == []


def test_bad_files_fail_and_are_annotated(runner) -> None:
    done = runner.run(paths="weights", args="--no-pickle --max-size 1GB")
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("::error ")]
    assert len(errors) == 1
    assert "file=weights/a model.pth" in errors[0]
    summary = runner.summary.read_text(encoding="utf-8")
    assert summary.startswith("## ckptkit check: **failed**\n") and "`weights/a model.pth`" in summary


def test_paths_are_one_a_line_with_spaces_and_patterns(runner) -> None:
    done = runner.run(paths="weights/a model.pth\nweights/*.safetensors\n", args="--no-pickle")
    assert (done.returncode, done.stdout.count("::error ")) == (1, 1)
    assert runner.run(paths="weights/*.safetensors", args="--no-pickle").returncode == 0
    missing = runner.run(paths="weights/*.ckpt")
    assert missing.returncode == 2
    assert "weights/*.ckpt" in missing.stdout + missing.stderr


def test_a_manifest(runner, run) -> None:
    manifest = "weights/weights.lock.json"
    assert run("manifest", "weights", "-o", manifest, cwd=runner.workspace).returncode == 0
    assert runner.run(manifest=manifest).returncode == 0
    (runner.workspace / "weights" / "b.safetensors").unlink()
    done = runner.run(manifest=manifest)
    assert done.returncode == 1
    assert "::error file=weights/b.safetensors" in done.stdout


@pytest.mark.parametrize("name", ["paths", "manifest", "args"])
def test_nothing_in_an_input_is_run(runner, name: str) -> None:
    marker = runner.workspace / "pwned"
    done = runner.run(**{"paths": "weights", name: f"$(touch {marker}) `touch {marker}` ; touch {marker}"})
    assert done.returncode == 2
    assert not marker.exists()


def test_a_path_is_never_an_option(runner) -> None:
    done = runner.run(paths="--no-pickle")
    assert done.returncode == 2
    assert "--no-pickle" in done.stdout + done.stderr
    assert "no such" in (done.stdout + done.stderr).lower()


def test_environment_of_the_tests_is_not_needed(runner) -> None:
    assert "ckptkit" not in os.listdir(runner.workspace)
    assert runner.run(paths="weights").returncode == 0
    assert os.access(runner.temp / "ckptkit" / "bin" / "ckptkit", os.X_OK)
    assert str(runner.temp / "ckptkit" / "bin") in runner.path, "later steps find the command"
