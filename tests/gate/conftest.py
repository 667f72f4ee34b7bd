"""Stand-ins for GitHub's runner and for pre-commit's environments: neither the network nor an install is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

collect_ignore = ["repository"]
ROOT = Path(__file__).parent.parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))}

Commit = Callable[..., subprocess.CompletedProcess[str]]

PYTHON = """#!/usr/bin/env bash
# Python as the steps know it: makes an environment, and installs what pip is told to, by a link to the tests' own.
set -eu
printf '%%s\\n' "$*" >>"$RUNNER_TEMP/calls"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*)
    printf '#!/bin/sh\\nPYTHONPATH=%%s exec %(python)s -m ckptkit "$@"\\n' "${@: -1}" >"$(dirname "$0")/ckptkit"
    chmod +x "$(dirname "$0")/ckptkit" ;;
esac
"""


class Runner:
    """What of a composite action the runner carries out: inputs, conditions, environments, shells, ``GITHUB_PATH``."""

    def __init__(self, folder: Path) -> None:
        self.workspace, self.temp = folder / "workspace", folder / "runner temp"
        stand_in = folder / "stand-in"
        for made in (self.workspace, self.temp, stand_in):
            made.mkdir()
        self.summary = folder / "summary.md"
        (stand_in / "python3").write_text(PYTHON % {"python": sys.executable})
        (stand_in / "python3").chmod(0o755)
        self.path = [str(stand_in), "/usr/bin", "/bin"]
        self.used: list[str] = []

    def run(self, **inputs: str) -> subprocess.CompletedProcess[str]:
        """All steps until one fails; gives the last."""
        assert set(inputs) <= set(ACTION["inputs"])
        given = {name: inputs.get(name, facts["default"]) for name, facts in ACTION["inputs"].items()}
        for step in ACTION["runs"]["steps"]:
            condition = step.get("if")
            if condition is not None and not self._holds(condition, given):
                continue
            if "uses" in step:
                self.used.append(step["uses"])
                continue
            done = self._shell(step, given)
            if done.returncode:
                break
        return done

    def _shell(self, step: dict[str, Any], given: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an input in a script is run as part of it"
        script = self.temp / "step.sh"
        script.write_text(step["run"])
        added = self.temp / "path"
        added.touch()
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace,
            capture_output=True,
            text=True,
            env={
                "PATH": ":".join(self.path),
                "HOME": str(self.temp),
                "RUNNER_TEMP": str(self.temp),
                "GITHUB_PATH": str(added),
                "GITHUB_ACTION_PATH": str(ROOT),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                **{name: self._filled(value, given) for name, value in step.get("env", {}).items()},
            },
        )
        self.path = [*added.read_text().splitlines(), *self.path]
        added.unlink()
        return done

    @staticmethod
    def _filled(text: str, given: dict[str, str]) -> str:
        return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], text)

    @staticmethod
    def _holds(condition: str, given: dict[str, str]) -> bool:
        found = re.fullmatch(r"\$\{\{ inputs\.([\w-]+) != '' \}\}", condition)
        assert found is not None
        return given[found[1]] != ""


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    made = Runner(tmp_path)
    (made.workspace / "weights").mkdir()
    torch.save({"fc.weight": torch.ones(2, 3)}, made.workspace / "weights" / "a model.pth")
    shutil.copy(ROOT / "fixtures" / "state_dict.safetensors", made.workspace / "weights" / "b.safetensors")
    return made


@pytest.fixture
def commit(tmp_path: Path, forks: Callable[..., Any]) -> Commit:
    """``commit(hook, {name: bytes or value}, args=…)``: the files added to a new repository, and pre-commit run."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    ckptkit = forks(with_torch=False).shell("ckptkit", "-m", "ckptkit")
    (bin_ / "ckptkit").write_text(f'#!/bin/sh\n{ckptkit}ckptkit "$@"\n')
    (bin_ / "ckptkit").chmod(0o755)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PRE_COMMIT_HOME": str(tmp_path / "cache"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }

    def act(hook: str, files: dict[str, object], **overrides: object) -> subprocess.CompletedProcess[str]:
        repository = tmp_path / f"repository {len([*tmp_path.glob('repository *')])}"
        repository.mkdir()
        local = {**HOOKS[hook], "language": "system", **overrides}
        config = {"repos": [{"repo": "local", "hooks": [local]}]}
        (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
        for name, content in files.items():
            target = repository / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, target)
            elif isinstance(content, bytes):
                target.write_bytes(content)
            else:
                torch.save(content, target)
        subprocess.run(["git", "init", "--quiet"], cwd=repository, env=env, check=True)
        subprocess.run(["git", "add", "--all"], cwd=repository, env=env, check=True)
        return subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--color", "never"],
            cwd=repository,
            env=env,
            capture_output=True,
            text=True,
        )

    return act
