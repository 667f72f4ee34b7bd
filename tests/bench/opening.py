"""Opening: ``ckptkit inspect`` between an empty Python and torch, for large files and for many tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, ROOT, Command, Groups, gib

SPARSE = """
import sys
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry
from ckptkit.formats import safetensors_writer, torch_zip_writer
from ckptkit.plan import LiteralBytes

# What the writers would write, with holes where the tensors' bytes would be.
nbytes, count = int(sys.argv[1]), 500
each = nbytes // count // 4 * 4
file = SourceFile(__file__ if "__file__" in globals() else sys.executable)
entries = {}
for i in range(count):
    storage = Storage(key=str(i), dtype="float32", nbytes=each, location="cpu", source=ByteRange(file, 0, each))
    name = f"blocks.{i // 10}.{i % 10}.weight"
    entries[name] = TensorEntry(storage=storage, storage_offset=0, shape=(each // 4,), stride=(1,), dtype="float32")
origin = Origin(path="-", size=0, format="torch-zip", kind="state_dict", state_path="")
checkpoint = Checkpoint(state_dict=StateDict(entries), rest=STATE_DICT, origin=origin)
for container, path in ((torch_zip_writer, sys.argv[2]), (safetensors_writer, sys.argv[3])):
    plan = container.write(checkpoint)
    with open(path, "wb") as output:
        output.truncate(plan.nbytes)
        for step in plan.steps:
            if isinstance(step, LiteralBytes):
                output.seek(step.target)
                output.write(step.data)
"""

MANY = """
import sys, torch
from safetensors.torch import save_file
count = int(sys.argv[1])
state = {f"model.layers.{i // 20}.block{i % 20}.weight": torch.full((1,), float(i)) for i in range(count)}
torch.save(state, sys.argv[2])
save_file(state, sys.argv[3])
"""

EXPERTS = """
import json, os, sys, torch
from safetensors.torch import save_file

# A large mixture of experts, as the hub has it: 88,917 names in 163 shards, and tiny tensors in place of its own.
os.mkdir(sys.argv[1])
names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
for layer in range(58):
    parts = ["input_layernorm", "self_attn.q_proj", "self_attn.kv_proj", "self_attn.o_proj", "mlp.gate", "post_norm"]
    parts += [f"mlp.experts.{n}.{part}_proj" for n in range(509) for part in ("gate", "up", "down")]
    names += [f"model.layers.{layer}.{part}.weight" for part in parts]
weight_map, each = {}, -(-len(names) // 163)
for number in range(163):
    shard = f"model-{number + 1:05}-of-00163.safetensors"
    held = names[number * each : (number + 1) * each]
    state = {name: torch.zeros((2, 4) if "down" in name else (4, 2), dtype=torch.bfloat16) for name in held}
    save_file(state, os.path.join(sys.argv[1], shard), metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(held, shard))
with open(os.path.join(sys.argv[1], "model.safetensors.index.json"), "w") as index:
    json.dump({"metadata": {"total_size": 16 * len(names)}, "weight_map": weight_map}, index, indent=2, sort_keys=True)
"""

TORCH_LOAD = "import sys, torch; torch.load(sys.argv[1], mmap=True, weights_only=True, map_location='cpu')"
SAFE_OPEN = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as file:
    for name in file.keys():
        part = file.get_slice(name)
        part.get_shape(), part.get_dtype()
"""
SAFE_OPEN_ALL = """
import json, os, sys
from safetensors import safe_open
with open(sys.argv[1]) as index:
    shards = dict.fromkeys(json.load(index)["weight_map"].values())
for shard in shards:
    with safe_open(os.path.join(os.path.dirname(sys.argv[1]), shard), "np") as file:
        for name in file.keys():
            part = file.get_slice(name)
            part.get_shape(), part.get_dtype()
"""
LOAD_AND_SAVE = """
import os, sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], mmap=True, weights_only=True, map_location="cpu"), sys.argv[1] + ".out")
os.remove(sys.argv[1] + ".out")
"""


def make(folder: Path, counts: tuple[int, ...]) -> None:
    """The sparse files, of 100 GB each, those of many tensors, and the shards of many more."""
    sparse = [str(100 * 10**9), str(folder / "sparse.pth"), str(folder / "sparse.safetensors")]
    commands = [[SPARSE, *sparse]]
    commands += [[MANY, str(n), str(folder / f"{n}.pth"), str(folder / f"{n}.safetensors")] for n in counts]
    commands.append([EXPERTS, str(folder / "experts")])
    for command in commands:
        subprocess.run([sys.executable, "-c", *command], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."})


def groups(resume: Path, counts: tuple[int, ...]) -> Groups:
    """The tables: a training checkpoint, the sparse files beside it, and those of many tensors."""
    folder = resume.parent
    empty = Command("python -c pass", [sys.executable, "-c", "pass"])
    torch = Command('python -c "import torch"', [sys.executable, "-c", "import torch"])

    def inspect(path: Path, *options: str) -> Command:
        return Command(" ".join(["inspect", *options, path.name]), [*CKPTKIT, "inspect", *options, str(path)])

    def python(name: str, code: str, path: Path) -> Command:
        return Command(f"{name} {path.name}", [sys.executable, "-c", code, str(path)])

    most = max(counts)

    def command(name: str, verb: str, *options: str) -> Command:
        return Command(name, [*CKPTKIT, verb, str(folder / f"{most}.pth"), *options])

    index = folder / "experts" / "model.safetensors.index.json"
    return {
        f"Opening a training checkpoint of {gib(resume)}, and sparse files of 100 GB": (
            empty.name,
            [
                empty,
                inspect(resume),
                inspect(resume, "--json"),
                inspect(folder / "sparse.pth"),
                inspect(folder / "sparse.safetensors"),
                torch,
            ],
        ),
        f"Opening up to {most:,} tensors": (
            f"torch.load(mmap=True, weights_only=True) {most}.pth",
            [
                python("torch.load(mmap=True, weights_only=True)", TORCH_LOAD, folder / f"{most}.pth"),
                torch,
                *(inspect(folder / f"{count}.pth", "--json") for count in counts),
                inspect(folder / f"{most}.pth"),
                inspect(folder / f"{most}.safetensors", "--json"),
                python("safe_open, every name and shape", SAFE_OPEN, folder / f"{most}.safetensors"),
            ],
        ),
        f"Working on {most:,} pickled tensors": (
            f"torch.load(mmap=True), then save_file {most}.pth",
            [
                python("torch.load(mmap=True), then save_file", LOAD_AND_SAVE, folder / f"{most}.pth"),
                inspect(folder / f"{most}.pth"),
                command("convert to .safetensors", "convert", "-q", "--force", str(folder / "out.safetensors")),
                command("convert to .pth", "convert", "-q", "--force", str(folder / "out.pth")),
                command("diff with the same in safetensors", "diff", "-q", str(folder / f"{most}.safetensors")),
                command("check --no-nan", "check", "-q", "--no-nan"),
            ],
        ),
        "Inspecting 88,917 tensors in 163 shards": (
            f"safe_open, every name and shape {index.name}",
            [python("safe_open, every name and shape", SAFE_OPEN_ALL, index), inspect(index), inspect(index, "--json")],
        ),
    }
