"""Loading a state_dict: each way in a process of its own, that has imported what it needs; that alone stands first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from measure import ROOT, Command, Groups, gib

MAKE = """
import sys, torch
from safetensors.torch import save_file
count = max(1, int(sys.argv[1]) >> 24)
state = {f"layers.{i}.weight": torch.randn(2048, 2048) for i in range(count)}  # 16 MiB each
torch.save(state, sys.argv[2])
save_file(state, sys.argv[3])
state = {f"model.layers.{i // 20}.block{i % 20}.weight": torch.full((1,), float(i)) for i in range(100_000)}
torch.save(state, sys.argv[4])
save_file(state, sys.argv[5])
"""

IMPORTS = "import sys, torch, ckptkit.torch_bridge; from safetensors.torch import load_file; path = sys.argv[-1]; "
LOADS = {
    "imports alone": "path",
    "torch.load(weights_only=True, map_location='cpu')": "torch.load(path, weights_only=True, map_location='cpu')",
    "load_file": "load_file(path)",
    "ckptkit.load_state_dict": "ckptkit.load_state_dict(path)",
    "ckptkit.load_state_dict(mapped=True)": "ckptkit.load_state_dict(path, mapped=True)",
    "ckptkit.load": "ckptkit.load(path)",
}


def make(nbytes: int, folder: Path) -> tuple[Path, Path, Path, Path]:
    """A file of this size in either container, and two of 100,000 tensors."""
    folder = folder / "loading"
    folder.mkdir()
    paths = tuple(folder / name for name in ("large.pth", "large.safetensors", "many.pth", "many.safetensors"))
    subprocess.run(
        [sys.executable, "-c", MAKE, str(nbytes), *map(str, paths)],
        cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    return paths  # type: ignore[return-value]


def groups(paths: tuple[Path, Path, Path, Path]) -> Groups:
    """The tables: one for each file."""
    made: Groups = {}
    for path in paths:
        ours = [name for name in LOADS if name.startswith("ckptkit")]
        theirs = "load_file" if path.suffix == ".safetensors" else next(name for name in LOADS if "torch.load" in name)
        names = ["imports alone", theirs, *(ours if path.suffix == ".pth" else ["ckptkit.load_state_dict"])]
        commands = [Command(name, [sys.executable, "-c", f"{IMPORTS}{LOADS[name]}", str(path)]) for name in names]
        what = f"{gib(path)}" if path.stem == "large" else "100,000 tensors"
        made[f"Loading {what} from a {path.suffix}"] = theirs, commands
    return made
