"""Checking: ``ckptkit manifest`` and ``ckptkit check`` of two files, between ``sha256sum`` of the same.

What is computed is twice as much: each file's SHA-256, and one of each of its tensors.
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
