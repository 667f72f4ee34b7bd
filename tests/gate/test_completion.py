"""What Tab offers: click's scripts, and answers to what the shells ask by them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ckptkit.architectures.index import load

ROOT = Path(__file__).parent.parent.parent


def asked(run, shell: str, *words: str) -> list[str]:
    """What is offered for the last word: the values alone."""
    text = "\n".join(words) if shell == "bash" else " ".join(words)
    env = {"COMP_WORDS": text, "COMP_CWORD": str(len(words) - 1), "_CKPTKIT_COMPLETE": f"{shell}_complete"}
    if shell == "fish":
        env["COMP_CWORD"] = words[-1]
    done = run(env=env)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    if shell == "zsh":  # type, value and help, a line each
        return lines[1::3]
    return [line.partition(",")[2].partition("\t")[0] for line in lines]


@pytest.mark.parametrize(
    ("shell", "registers"),
    [
        ("bash", r"complete .*-F _ckptkit_completion ckptkit"),
        ("zsh", "#compdef ckptkit"),
        ("fish", "complete .*ckptkit"),
    ],
)
def test_the_script_of_a_shell(run, shell: str, registers: str) -> None:
    done = run(env={"_CKPTKIT_COMPLETE": f"{shell}_source"})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(registers, done.stdout)
    assert f"_CKPTKIT_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize("wanted", ["tcsh_source", "bash", "bash_nothing"])
def test_another_shell_is_bad_usage(run, wanted: str) -> None:
    done = run(env={"_CKPTKIT_COMPLETE": wanted})
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected bash_source, zsh_source or fish_source" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_options_and_choices(run, shell: str) -> None:
    assert asked(run, shell, "ckptkit", "ins") == ["inspect"]
    assert asked(run, shell, "ckptkit", "convert", "--strip-m") == ["--strip-module"]
    assert asked(run, shell, "ckptkit", "inspect", "--color", "ne") == ["never"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_codes(run, shell: str) -> None:
    assert asked(run, shell, "ckptkit", "explain", "module-pre") == ["module-prefix"]
    assert asked(run, shell, "ckptkit", "explain", "trus") == ["trust"]


def test_references(run) -> None:
    known = sorted(f"torchvision:{row.name}" for row in load("torchvision").rows() if row.name.startswith("resnet1"))
    assert "torchvision:resnet18" in known
    for shell in ("bash", "zsh"):
        offered = asked(run, shell, "ckptkit", "verify", "a.pth", "--model", "torchvision:resnet1")
        assert offered == sorted(set(known))


def test_a_reference_is_asked_for_without_torch() -> None:
    code = (
        "import sys, click\nfrom ckptkit.cli import cli\nfrom ckptkit.cli.completion import equip\n"
        "model = next(each for each in cli.get_command(None, 'verify').params if each.name == 'model')\n"
        "equip(cli.get_command(None, 'verify'))\n"
        "print(len(model.shell_complete(None, 'timm:')) > 1000, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_what_no_index_has_may_be_a_file(run) -> None:
    env = {"COMP_WORDS": "ckptkit\nverify\n--model\nmodels/n", "COMP_CWORD": "3", "_CKPTKIT_COMPLETE": "bash_complete"}
    assert run(env=env).stdout == "file,models/n\n"


BASH = """
set -eu
PATH=%s:$PATH
eval "$(_CKPTKIT_COMPLETE=bash_source ckptkit)"
complete -p ckptkit >/dev/null
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _ckptkit_completion ckptkit; echo "${COMPREPLY[*]}"; }
ask ckptkit ins
ask ckptkit verify a.pth --model torchvision : resnet15
ask ckptkit verify a.pth --model = torchvision : resnet15
ask ckptkit verify a.pth --model torchvision:resnet15
ask ckptkit verify --model-arg num_classes = 10 a.pth --see
ask ckptkit explain module-p
"""


def test_bash_itself(tmp_path: Path) -> None:
    """The script as bash runs it; it takes a reference apart at the colon, and wants what follows it."""
    command = tmp_path / "ckptkit"
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m ckptkit \"$@\"\n")
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH % tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "inspect",
        "resnet152",
        "resnet152",
        "torchvision:resnet152",
        "--seed",
        "module-prefix",
    ]
