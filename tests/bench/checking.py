"""Checking: ``ckptkit manifest`` and ``ckptkit check`` of two large files, and of a thousand small ones.

The large ones stand between ``sha256sum`` of the same; what is computed is twice as much: each file's SHA-256, and one
of each of its tensors.  The small ones stand beside ``picklescan``, which looks at the names in the pickles alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, ROOT, Command, Groups, gib

MAKE = """
import sys, torch
from safetensors.torch import save_file
torch.manual_seed(0)
count, safe, zipped = int(sys.argv[1]), sys.argv[2], sys.argv[3]
state = {f"blocks.{i // 10}.{i % 10}.weight": torch.randn(count // 100) for i in range(100)}
save_file(state, safe)
torch.save(state, zipped)
"""

MAKE_MANY = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
torch.manual_seed(0)
count, zipped, safe = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
layers = (torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6)) for _ in range(9))
model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers), "head": torch.nn.Linear(6, 3)})
model.scale = torch.nn.Parameter(torch.ones(3))
for i in range(count):
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    torch.save(state, zipped / f"{i:04d}.pth")
    save_file(state, safe / f"{i:04d}.safetensors")
"""

MANY = 1000
"""Small files, of 39 tensors each."""

MANIFEST = "weights.lock.json"


def make(nbytes: int, folder: Path) -> list[Path]:
    """Two files of the same tensors, and their manifest."""
    files = [folder / "checked.safetensors", folder / "checked.pth"]
    env = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", MAKE, str(nbytes // 4), *map(str, files)], cwd=ROOT, check=True, env=env)
    manifest = [*CKPTKIT, "manifest", "--quiet", *map(str, files), "-o", str(folder / MANIFEST)]
    subprocess.run(manifest, cwd=ROOT, check=True)
    return files


def groups(files: list[Path]) -> Groups:
    """One table; the baseline hashes one file after the other."""
    names = [str(file) for file in files]
    manifest = str(files[0].parent / MANIFEST)
    one_by_one = "sha256sum A B"
    both = "sha256sum A & sha256sum B"
    commands = [
        Command(one_by_one, ["sha256sum", *names]),
        Command(both, ["sh", "-c", 'sha256sum "$1" & sha256sum "$2"; wait', "sh", *names]),
        Command("sha256sum A", ["sha256sum", names[0]]),
        Command("manifest A", [*CKPTKIT, "manifest", names[0]]),
        Command("manifest A B", [*CKPTKIT, "manifest", *names]),
        Command("check A B against the manifest", [*CKPTKIT, "check", *names, "--manifest", manifest]),
        Command("the same, and --no-nan", [*CKPTKIT, "check", *names, "--manifest", manifest, "--no-nan"]),
    ]
    return {f"Hashing and checking two files of {gib(files[0])}": (one_by_one, commands)}


def make_many(folder: Path) -> tuple[Path, Path]:
    """The folders of small files: ``.pth`` and ``.safetensors``."""
    zipped, safe = folder / "many.pth", folder / "many.safetensors"
    zipped.mkdir()
    safe.mkdir()
    env = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", MAKE_MANY, str(MANY), str(zipped), str(safe)], cwd=ROOT, check=True, env=env)
    return zipped, safe


def groups_of_many(zipped: Path, safe: Path, picklescan: Path | None) -> Groups:
    """One table; the baseline is picklescan, where it is given."""
    few = sorted(map(str, zipped.iterdir()))[:10]
    commands = [Command("picklescan", [str(picklescan), "-p", str(zipped)])] * (picklescan is not None)
    commands += [
        Command("check", [*CKPTKIT, "check", str(zipped)]),
        Command("check of .safetensors", [*CKPTKIT, "check", str(safe)]),
        Command("check --no-nan", [*CKPTKIT, "check", str(zipped), "--no-nan"]),
        Command("check of 10", [*CKPTKIT, "check", *few]),
        Command("check of 1", [*CKPTKIT, "check", few[0]]),
        Command("manifest", [*CKPTKIT, "manifest", str(zipped)]),
    ]
    return {f"Checking {MANY:,} files of 39 tensors": (commands[0].name, commands)}
