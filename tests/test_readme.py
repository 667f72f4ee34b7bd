"""Every command and every Python example of the README runs, as it stands there.

Those of its section "In CI" are run by ``tests/gate/test_in_ci.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    before, _, rest = README.partition("\n## In CI\n")
    elsewhere = before + rest[rest.index("\n## ") :]
    return re.findall(rf"^```{language}\n(.*?)^```$", elsewhere, re.DOTALL | re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the README's commands find around them: the fixtures, and the files of earlier commands."""
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    return tmp_path


def shell(script: str, cwd: Path, ckptkit: str) -> None:
    """Run a block with ``ckptkit`` and ``python`` being this interpreter's."""
    prelude = f"set -euo pipefail\n{ckptkit}python() {{ '{sys.executable}' \"$@\"; }}\n"
    done = subprocess.run(
        ["bash", "-c", prelude + script],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(cwd)},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


def without_install(script: str) -> str:
    """A block less the steps that make and fill a virtual environment."""
    kept = [line for line in script.splitlines() if "pip install" not in line]
    return "\n".join(kept)


def test_the_main_job_and_every_command_after_it(clone: Path, forks) -> None:
    ckptkit = forks(with_torch=True).shell("ckptkit", "-m", "ckptkit")
    install, _tests, *more = blocks("sh")
    assert "pip install '.[torch]'" in install
    shell(without_install(install), clone, ckptkit)
    assert more
    for script in more:
        shell(script, clone, ckptkit)


def test_the_test_command_installs_what_the_tests_need() -> None:
    command = blocks("sh")[1]
    assert "pip install '.[torch,test]'" in command
    assert "python -m pytest" in command


def test_the_python_examples(clone: Path, python) -> None:
    (clone / "demo").mkdir()
    examples = blocks("python")
    assert examples
    for example in examples:
        done = python("-c", example, cwd=clone)
        assert done.returncode == 0, f"{example}\n{done.stderr}"
