"""Every command and every Python example of the README and of the topics runs, as it stands there.

Those of the README's section "In CI", and of the topic on it, are run by ``tests/gate/test_in_ci.py``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from ckptkit.codes import CODES, TOPICS, topic

if TYPE_CHECKING:
    from support.forked import Forks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_CI = README[README.index("\n## In CI\n") : README.index("\n## In Python\n")]
PAGES = {"README.md": README.replace(IN_CI, ""), **{name: topic(name) for name in TOPICS if name != "ci"}}


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the README's commands find around them: the fixtures, and the files of earlier commands."""
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    return tmp_path


def shell(script: str, cwd: Path, programs: str) -> str:
    """Run a block with ``ckptkit`` and ``python`` being this interpreter's; gives what it printed."""
    prelude = f"set -euo pipefail\n{programs}"
    done = subprocess.run(
        ["bash", "-c", prelude + script],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(cwd)},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def without_install(script: str) -> str:
    """A block less the steps that make and fill a virtual environment."""
    kept = [line for line in script.splitlines() if "pip install" not in line]
    return "\n".join(kept)


@pytest.fixture
def programs(forks: Callable[..., Forks]) -> str:
    """``ckptkit`` and ``python`` for a shell: forks, of a process that has imported torch where a command needs it."""
    with_torch, without = forks(with_torch=True), forks(with_torch=False)
    verifying, others = with_torch.shell("verifying", "-m", "ckptkit"), without.shell("others", "-m", "ckptkit")
    chosen = 'ckptkit() { if [[ "${1-}" = verify ]]; then verifying "$@"; else others "$@"; fi; }\n'
    return verifying + others + chosen + with_torch.shell("python")


def test_the_main_job_and_every_command_after_it(clone: Path, programs: str) -> None:
    install, _tests, *more = blocks("sh")
    assert "pip install '.[torch]'" in install
    shell(without_install(install), clone, programs)
    assert more
    shown = re.findall(r"^```sh\n(.*?)^```\n+```text\n(.*?)^```$", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    assert len(shown) == 5
    for script in more:
        printed = shell(script, clone, programs).splitlines()
        expected = dict(shown).get(script, "").splitlines()
        assert [line for line in expected if line not in printed] == [], "\n".join(printed)


def test_every_command_of_the_topics(clone: Path, programs: str) -> None:
    shell(without_install(blocks("sh")[0]).rpartition("&&")[0], clone, programs)  # without its last step, verify
    for name in PAGES.keys() - {"README.md"}:
        assert not re.search(r"^    \w", re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.DOTALL | re.MULTILINE))
    for script in (script for name in TOPICS if name in PAGES for script in blocks("sh", name)):
        shell(script, clone, programs)


def test_what_needs_the_network_has_options_that_there_are() -> None:
    """Files on other machines: ``tests/remote`` has stand-ins for these."""
    lines = [line for page in PAGES for block in blocks("console", page) for line in block.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line))[0] == "ckptkit"]
    assert commands
    for _, name, *words in commands:
        command: click.Command = import_module(f"ckptkit.cli.{name}").command
        command.make_context(name, words)


def test_the_test_command_installs_what_the_tests_need() -> None:
    command = blocks("sh")[1]
    assert "pip install '.[torch,test]'" in command
    assert "python -m pytest" in command


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)])
def test_the_python_examples(page: str, clone: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (clone / "demo").mkdir()
    for example in blocks("python", page):
        done = python("-c", example, cwd=clone)
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        said = re.findall(r"^ *print\(.*\)  # (.*)$", example, re.MULTILINE)
        assert [line for line in said if line not in done.stdout.splitlines()] == []


# What the README says of what stands elsewhere.


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize("page", ["README.md", ".github/CONTRIBUTING.md", "tests/bench/README.md"])
def test_what_pages_name_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).is_file(), f"{page}: {target}"
    for target in re.findall(r"`((?:ckptkit|tests|\.ci)/[\w/.-]+)`", text):
        assert (ROOT / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("name", TOPICS)
def test_what_topics_name_is_there(name: str) -> None:
    text = topic(name)
    for target in re.findall(r"`((?:ckptkit|tests|\.ci)/[\w/.-]+)`", text):
        assert (ROOT / target).exists(), f"{name}: {target}"
    named = {each for group in re.findall(r"`(?:ckptkit )?explain ([\w-]+)`((?:, `[\w-]+`)*)", text) for each in group}
    assert {word for each in named for word in re.findall(r"[\w-]+", each)} <= {*TOPICS, *CODES}


def test_the_commands_of_contributing_name_tests_that_there_are() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in re.findall(r"pytest (tests/\S+)", text):
        assert (ROOT / target).exists(), target


def test_it_lists_the_topics() -> None:
    listed = README[README.index("`ckptkit explain TOPIC` tells the rest:") :].split("\n\n")[0]
    assert tuple(re.findall(r"`([\w-]+)`", listed)) == TOPICS


def test_its_table_of_containers_is_that_of_explain(run) -> None:
    lines = run("explain", "formats", "--format", "markdown").stdout.splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    assert table.count("\n") > 10
    assert f"\n{table}\n" in README
