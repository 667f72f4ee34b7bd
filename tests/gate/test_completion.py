"""What Tab offers: click's scripts, and answers to what the shells ask by them."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert asked(run, shell, "ckptkit", "explain", "guar") == ["guarantees"]


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


def test_dtypes_containers_devices(run) -> None:
    assert asked(run, "bash", "ckptkit", "convert", "a.pth", "b.pth", "--dtype", "bf") == ["bfloat16"]
    assert asked(run, "zsh", "ckptkit", "verify", "a.pth", "--dtype", "float1") == ["float16"]
    assert asked(run, "fish", "ckptkit", "check", "--allow-dtype", "int1") == ["int16"]
    assert asked(run, "bash", "ckptkit", "convert", "a.pth", "b", "--to", "safe") == [
        "safetensors",
        "safetensors-sharded",
    ]
    assert asked(run, "bash", "ckptkit", "check", "--require-format", "dee") == ["deepspeed"]
    assert asked(run, "bash", "ckptkit", "inspect", "a.pth", "--format", "ma") == ["markdown"]
    assert asked(run, "bash", "ckptkit", "convert", "a.pth", "b.pth", "--map-location", "cu") == ["cuda"]


@pytest.fixture
def files(tmp_path: Path, save) -> Path:
    """Files in the folder that `run` works in."""
    weights = {"conv.weight": torch.ones(2), "conv.bias": torch.ones(2), "fc.weight": torch.ones(2)}
    save({"model": weights, "model_ema": weights, "epoch": 3, "optimizer": {}}, "several.pth")
    save({f"layers.{n}.weight": torch.ones(1) for n in range(150)}, "many.pth")
    save({"odd\nname": torch.ones(1), "old": torch.ones(1)}, "odd.pth")
    for step in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / "run" / step).mkdir(parents=True)
        save(weights, f"run/{step}/model.pth")
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "many.pth.gz").write_bytes(gzip.compress((tmp_path / "many.pth").read_bytes()))
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_the_files_on_the_line_hold(run, files: Path, shell: str) -> None:
    def offered(*words: str) -> list[str]:
        return [*filter(None, asked(run, shell, "ckptkit", *words))]

    assert offered("inspect", "several.pth", "--section", "model") == ["model", "model_ema"]
    assert offered("convert", "several.pth", "o.pth", "--leave-out", "ep") == ["epoch"]
    assert offered("convert", "several.pth", "o.pth", "--as", "model") == ["model", "model_ema"]
    assert offered("convert", "run/checkpoint-10/model.pth", "--strip-prefix", "c") == ["conv."]
    assert offered("convert", "run/checkpoint-10/model.pth", "--include", "conv.") == ["conv.weight", "conv.bias"]
    assert offered("convert", "run", "o.pth", "--tag", "check") == ["checkpoint-10", "checkpoint-20"]
    assert offered("inspect", "odd.pth", "--filter", "o") == ["old"]  # a line is a name
    for unread in ("none.pth", "notes.txt", "many.pth.gz", "https://host.invalid/a.pth", "-"):
        assert offered("inspect", unread, "--filter", "l") == []


def test_very_many_names_are_offered_by_module(run, files: Path) -> None:
    offered = asked(run, "bash", "ckptkit", "inspect", "many.pth", "--filter", "la")
    assert len(offered) == 150 and offered[:2] == ["layers.0.", "layers.1."]
    assert asked(run, "bash", "ckptkit", "inspect", "many.pth", "--filter", "layers.14")[:2] == [
        "layers.14.weight",
        "layers.140.weight",
    ]


def test_a_file_after_the_word_counts_too(run, files: Path) -> None:
    words = "ckptkit\ninspect\n--section\nmodel_\nseveral.pth"
    env = {"COMP_WORDS": words, "COMP_CWORD": "3", "_CKPTKIT_COMPLETE": "bash_complete"}
    assert run(env=env).stdout == "plain,model_ema\n"


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
