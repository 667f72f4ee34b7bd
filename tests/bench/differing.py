"""Differences: ``ckptkit diff`` of two equal files beside ``cmp`` of the same, and of files that differ."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, Command, Groups, gib

MAKE = """
import sys, torch
from pathlib import Path
folder, nbytes = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
state = {f"layers.{i}.weight": torch.randn(nbytes // 64) for i in range(16)}
torch.save(state, folder / "a.pth")
torch.save({name: tensor * 1.001 for name, tensor in state.items()}, folder / "changed.pth")
torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "recast.pth")
torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "renamed.pth")
state["layers.15.weight"][-1] += 1
torch.save(state, folder / "last.pth")
"""


def make(nbytes: int, folder: Path) -> Path:
    """A checkpoint of so many bytes, its copy, and others that differ from it."""
    (folder / "differing").mkdir()
    folder = folder / "differing"
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(nbytes)], check=True)
    shutil.copyfile(folder / "a.pth", folder / "copy.pth")
    return folder


def groups(folder: Path) -> Groups:
    """The table."""

    def diff(name: str, *options: str) -> list[str]:
        # Files that differ are no failure here.
        command = [*CKPTKIT, "diff", str(folder / "a.pth"), str(folder / name), *options]
        return ["sh", "-c", '"$@" || test $? -eq 1', "sh", *command]

    cmp = Command("cmp, equal", ["cmp", str(folder / "a.pth"), str(folder / "copy.pth")])
    commands = [
        cmp,
        Command("ckptkit diff, equal", diff("copy.pth")),
        Command("one element differs, the last", diff("last.pth")),
        Command("everything differs", diff("changed.pth")),
        Command("everything recast to bfloat16", diff("recast.pth")),
        Command("everything renamed", diff("renamed.pth")),
    ]
    return {f"Differences of two files of {gib(folder / 'a.pth')}": (cmp.name, commands)}
