"""Identifying: what the line "looks like" costs ``ckptkit inspect``, beside an empty Python and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, Command, Groups

MAKE = """
import sys, torch, torchvision
from pathlib import Path
from safetensors.torch import save_file
folder = Path(sys.argv[1])
state = torchvision.models.resnet50(num_classes=10).state_dict()
torch.save(state, folder / "resnet50.pth")
save_file(state, folder / "resnet50.safetensors")
torch.save({n: t for n, t in state.items() if not n.startswith("layer4.2.")}, folder / "part.pth")
print(torch.__version__)
"""

WITHOUT = """
import sys, types
# In the place of the room, so that importing it is not counted either.
room = sys.modules["ckptkit.architectures"] = types.ModuleType("ckptkit.architectures")
room.identify = lambda state_dict: ()
from ckptkit.cli import main
main(["inspect", *sys.argv[1:]])
"""

BUILD = """
import sys, torch, torchvision
model = torchvision.models.resnet50(num_classes=10)
model.load_state_dict(torch.load(sys.argv[1], mmap=True, weights_only=True))
"""


def make(folder: Path) -> str:
    """A ResNet-50 with another head in two containers, and one that lacks a block; the version of torch."""
    made = subprocess.run([sys.executable, "-c", MAKE, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    return made.stdout.strip()


def groups(folder: Path) -> Groups:
    """The table."""
    empty = Command("python -c pass", [sys.executable, "-c", "pass"])
    commands = [empty]
    for name in ("resnet50.pth", "resnet50.safetensors", "part.pth"):
        path = str(folder / name)
        commands += [
            Command(f"inspect {name}, not identified", [sys.executable, "-c", WITHOUT, path]),
            Command(f"inspect {name}", [*CKPTKIT, "inspect", path]),
        ]
    commands.append(Command("building and loading it", [sys.executable, "-c", BUILD, str(folder / "resnet50.pth")]))
    return {"Identifying a ResNet-50 (the last: one that lacks a block)": (empty.name, commands)}
