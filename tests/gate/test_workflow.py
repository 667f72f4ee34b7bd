"""``.github/workflows/``: that it holds what it says, and that what it runs works where the tests run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_it_runs_for_every_change() -> None:
    assert WORKFLOW[True] == {"push": {"branches": ["main"]}, "pull_request": None}  # YAML 1.1 takes "on" for True
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["defaults"] == {"run": {"shell": "bash"}}  # on Windows too, where it would be another
    assert set(JOBS) == {"everything", "base", "torch"}
    assert all(job["timeout-minutes"] <= 60 and "continue-on-error" not in job for job in JOBS.values())


def test_all_that_it_uses_has_a_version() -> None:
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert {name.partition("@")[0] for name in used} == {"actions/checkout", "actions/setup-python"}
    assert all(re.search(r"@(v[0-9]+(\.[0-9]+)*|[0-9a-f]{40})$", name) for name in used)
    systems = {
        system for job in JOBS.values() for system in job.get("strategy", {"matrix": {"os": []}})["matrix"]["os"]
    }
    assert all(re.search("-[0-9.]+$", system) for system in systems | {JOBS["everything"]["runs-on"]})
    assert {system.partition("-")[0] for system in systems} == {"ubuntu", "macos", "windows"}


@pytest.mark.parametrize("job", ["base", "torch"])
def test_the_oldest_and_the_newest_python_that_are_admitted(job: str) -> None:
    known = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.[0-9]+$", each)]
    known.sort(key=lambda version: int(version.partition(".")[2]))
    matrix = JOBS[job]["strategy"]["matrix"]
    assert matrix["python"] == [known[0], known[-1]]
    assert PROJECT["requires-python"] == f">={known[0]}"
    assert f"python:{known[-1]}-" in JOBS["everything"]["container"]
    assert JOBS[job]["runs-on"] == "${{ matrix.os }}"
    (version,) = (step["with"]["python-version"] for step in JOBS[job]["steps"] if "with" in step)
    assert version == "${{ matrix.python }}"


def test_one_job_is_what_runs_before_a_change_is_handed_in() -> None:
    script = ROOT / ".ci" / "run"
    assert commands("everything")[-1] == ".ci/run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    for part in ("CKPTKIT_BROWSER=required", "ruff check", "ruff format --check", "fixtures/make.py --check"):
        assert part in text
    assert 'for system in linux darwin win32; do .venv/bin/mypy --platform "$system"' in text


def test_what_is_installed_is_declared() -> None:
    installed = [re.search(r"pip install '?\.(\[.*\])?", text) for job in ("base", "torch") for text in commands(job)]
    base, full = [found[1] for found in installed if found is not None]
    assert base is None
    assert set(re.findall(r"\w+", full)) <= set(PROJECT["optional-dependencies"])
    assert commands("torch")[-1].startswith("python -m pytest ")
    assert PROJECT["scripts"]["ckptkit"] == "ckptkit.cli:run"


def test_the_commands_without_torch_run(tmp_path: Path) -> None:
    """All of them, one after the other, in a folder that is like a fresh copy; here torch is merely not asked for."""
    install, *scripts = commands("base")
    assert install == "python -m pip install ."
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    program = tmp_path / "bin" / "ckptkit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptkit "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for script in scripts:
        if not script.startswith("ckptkit"):
            is_without, script = script.split("\n", 1)
            assert "find_spec('torch') is not None" in is_without
        run = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "naïve & 100%.safetensors").is_file()
    assert (tmp_path / "base.lock.json").is_file()
