"""What verifying costs: against loading the file and computing with plain torch, and against the size of the weights.

The model is wide linear layers, as in a transformer's feed-forward blocks; the file is written by torch.
Importing torch alone is measured too: what the others hold above it is their own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, ROOT, Command, Groups

FACTORY = """
import torch
from torch import nn

WIDTH = 2048

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))

def make(blocks={blocks}):
    return nn.Sequential(*(Block() for _ in range(blocks)))
"""

MAKE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from wide import make
torch.save(make().state_dict(), sys.argv[2])
"""

PLAIN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from wide import WIDTH, make
model = make()
model.load_state_dict(torch.load(sys.argv[2], map_location="cpu", weights_only=True))
model.eval()
with torch.no_grad():
    output = model(torch.rand(1, 16, WIDTH))
assert torch.isfinite(output).all()
"""

_BLOCK_NBYTES = 4 * (2 * 4 * 2048 * 2048 + 4 * 2048 + 2048 + 2 * 2048)


def make(nbytes: int, folder: Path) -> Path:
    """The factory and its weights, about ``nbytes`` bytes; the checkpoint's path."""
    blocks = max(1, round(nbytes / _BLOCK_NBYTES))
    (folder / "wide.py").write_text(FACTORY.format(blocks=blocks))
    path = folder / "wide.pth"
    # A process of its own: what this one holds in memory would be counted with every command it starts.
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(path)], cwd=ROOT, check=True)
    strip = [*CKPTKIT, "convert", str(path), str(folder / "wide.safetensors"), "--quiet"]
    subprocess.run(strip, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return path


def groups(path: Path) -> Groups:
    """The table of verifying ``path``, the factory beside it."""
    folder = path.parent
    safetensors = path.with_suffix(".safetensors")

    def verify(source: Path, *options: str) -> Command:
        argv = [*CKPTKIT, "verify", str(source), "--model", f"{folder / 'wide.py'}:make", "--device", "cpu"]
        shape = () if "--no-forward" in options else ("--input-shape", "1,16,2048")
        return Command(" ".join(["verify", source.suffix, *options]), [*argv, *shape, *options])

    plain = Command("load_state_dict(torch.load()), forward", [sys.executable, "-c", PLAIN, str(folder), str(path)])
    size = path.stat().st_size
    return {
        f"Verifying {size / (1 << 20):.0f} MiB of weights": (
            plain.name,
            [
                Command("import torch", [sys.executable, "-c", "import torch"]),
                plain,
                verify(path),
                verify(path, "--no-forward"),
                verify(safetensors),
            ],
        )
    }
