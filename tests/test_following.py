"""Every fix that is printed and is a ckptkit command: it runs, leads on, and ends where nothing is left to fix.

Other people's checkpoints are followed too where a folder of them is named, as in test_corpus.py:

    CKPTKIT_CORPUS=folder python -m pytest tests/test_following.py
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckptkit.cli import cli

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDER = os.environ.get("CKPTKIT_CORPUS", "")
CORPUS = sorted(path for path in Path(FOLDER).iterdir() if path.is_file()) if FOLDER else []

_MOST = 60
"""Commands for one file; the longest way has some ten."""

_TAKEN = {"--section": 2, "--strip-module": 1}
"""Options, with the words they are, that a conversion has carried out: its output is looked at without them."""

NETS = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def bn(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Plain())
"""


def bn(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def state(prefix: str = "", suffix: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**{prefix + name: value for name, value in bn().state_dict().items()}, **(suffix or {})}


def run(arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The command in this process: its exit code, and the document."""
    result = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    if result.exception is not None:
        return 2, {"error": f"{result.exception}"}
    return result.return_value, json.loads(result.stdout)


def looked_at(command: list[str], path: str) -> list[str]:
    """The command for the output of a conversion."""
    if command[0] != "verify":
        return ["inspect", path]
    words = iter(command[1:])
    kept: list[str] = ["verify", path]
    for word in words:
        if word in _TAKEN:
            for _ in range(_TAKEN[word] - 1):
                next(words)
        elif word != path and (word.startswith("-") or kept[-1].startswith("-")):
            kept.append(word)
    return kept


class Way:
    """All that comes of a command and of the fixes it prints."""

    def __init__(self) -> None:
        self.run: list[list[str]] = []
        self.ends: set[tuple[str, str]] = set()

    def follow(self, command: list[str], before: tuple[tuple[str, ...], ...] = ()) -> None:
        if command in self.run:
            return
        self.run.append(command)
        assert len(self.run) < _MOST, self.run
        code, document = run(command)
        if code == 2 and not before and command[0] == "inspect":
            self.ends.add(("inspect", "not read"))
            return
        assert code in (0, 1), (command, document)
        findings = document["findings"] if command[0] == "verify" else document["files"][0]["findings"]
        fixes = [finding for finding in findings if (finding["fix"] or "").startswith("ckptkit ")]
        if not fixes:
            worst = next((f["code"] for f in findings if f["severity"] == "error" and f["code"] != "not-loaded"), "fits")
            self.ends.add((command[0], worst))
        for finding in fixes:
            fix = shlex.split(finding["fix"])[1:]
            # The same advice about what came of it would never end.
            advice = (finding["code"], *(word for word in fix if not Path(word).suffix or ":" in word))
            assert advice not in before, (command, finding, before)
            self.carry_out(command, fix, (*before, advice))

    def carry_out(self, command: list[str], fix: list[str], before: tuple[tuple[str, ...], ...]) -> None:
        if fix[0] != "convert":
            self.follow(fix, before)
            return
        if fix in self.run:
            return
        self.run.append(fix)
        code, document = run(fix)
        assert code == 0, (command, fix, document)
        assert document["written"] and Path(document["destination"]).exists()
        for looking in (["inspect", document["destination"]], looked_at(command, document["destination"])):
            self.follow(looking, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.*")) + CORPUS, ids=lambda path: path.name)
def test_every_fix_of_a_file_leads_on(path: Path, folder: Path) -> None:
    if path.suffix in (".py", ".json") and not path.name.endswith(".index.json"):
        return
    for each in path.parent.glob("model*") if path.name.startswith("model") else [path]:
        shutil.copy(each, folder)
    Way().follow(["inspect", path.name])
