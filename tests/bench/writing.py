"""Writing: ``ckptkit convert``, between ``cp`` and torch with the safetensors library.

The page cache is warm: the sources were just written and read.  Before each run, outside the
measured time, a copy of the source is made and removed, so that the memory for the output is at
hand (a virtual machine may have given it back to its host), and the disk is flushed.  ckptkit
flushes its output to disk before it names it; ``cp`` does not, so ``cp`` with ``sync`` is measured
beside it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, ROOT, Command, Groups, gib

MAKE = """
import argparse, sys
from unittest import mock
import torch

torch.manual_seed(0)
size, state_path, resume_path = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def network(nbytes):
    # Twenty-four blocks of eight tensors, as in a transformer: four large ones carry nearly all bytes.
    blocks, numel = 24, nbytes // 4
    width = max(8, int((numel / (12 * blocks)) ** 0.5) // 8 * 8)
    shapes = {"qkv.weight": (3 * width, width), "qkv.bias": (3 * width,), "proj.weight": (width, width),
              "proj.bias": (width,), "fc1.weight": (4 * width, width), "fc1.bias": (4 * width,),
              "fc2.weight": (width, 4 * width), "norm.weight": (width,)}
    named = [(f"module.blocks.{i}.{name}", shape) for i in range(blocks) for name, shape in shapes.items()]
    weights = {name: torch.randn(shape) for name, shape in named}
    left = numel - sum(weight.numel() for weight in weights.values())
    if left > 0:
        weights["module.head.weight"] = torch.randn(left)
    return weights

with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
    torch.save(network(size), state_path)
    weights, first, second = (network(size // 3) for _ in range(3))
    state = {i: {"step": torch.tensor(100.0), "exp_avg": a, "exp_avg_sq": b * b}
             for i, (a, b) in enumerate(zip(first.values(), second.values()))}
    torch.save({"epoch": 7, "state_dict": weights, "best_acc1": 71.5, "args": argparse.Namespace(lr=0.1, arch="vit"),
                "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": list(range(len(weights)))}]},
                "scheduler": {"last_epoch": 7}}, resume_path)
print(torch.__version__)
"""

TORCH_CONVERT = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", mmap=True, weights_only=True)
dtype = getattr(torch, sys.argv[3]) if len(sys.argv) > 3 else None
save_file({name.removeprefix("module."): value.to(dtype or value.dtype).contiguous() for name, value in state.items()},
          sys.argv[2])
"""

CONVERTER = """
import sys
sys.path.insert(0, sys.argv[1])
from convert import convert_file
convert_file(sys.argv[2], sys.argv[3], [])
"""


def make(nbytes: int, state: Path, resume: Path) -> str:
    """Both checkpoints, of ``nbytes`` bytes each; the version of the torch that wrote them."""
    made = subprocess.run(
        # A process of its own: what this one holds in memory would be counted with every command it starts.
        [sys.executable, "-c", MAKE, str(nbytes), str(state), str(resume)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return made.stdout.strip()


def groups(state: Path, resume: Path, converter: Path | None = None) -> Groups:
    """The tables of rewriting ``state``, a state_dict, and ``resume``, a training checkpoint.

    Args:
        state: the file.
        resume: the file.
        converter: the safetensors project's ``convert.py``, where it is at hand.
    """
    folder = state.parent
    copy, made, pth, shards = (folder / name for name in ("copy.pth", "out.safetensors", "out.pth", "shards"))
    sharded = folder / "sharded"

    def copies(source: Path) -> list[Command]:
        flushed = ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(copy)]
        return [
            Command("cp", ["cp", str(source), str(copy)], source, copy),
            Command("cp, then sync", flushed, source, copy),
        ]

    def convert(source: Path, output: Path, *options: str) -> Command:
        name = " ".join(["convert to", output.suffix, *options])
        return Command(name, [*CKPTKIT, "convert", str(source), str(output), *options], source, output)

    def torch(name: str, *arguments: str) -> Command:
        return Command(name, [sys.executable, "-c", TORCH_CONVERT, str(state), str(made), *arguments], state, made)

    def split(*options: str) -> Command:
        size = ("--max-shard-size", str(state.stat().st_size // 4))
        argv = [*CKPTKIT, "convert", str(state), str(shards / "model.safetensors"), *size, *options]
        return Command(" ".join(["convert to 5 shards", *options]), argv, state, shards)

    def merge(*options: str) -> Command:
        source = sharded / "model.safetensors.index.json"
        argv = [*CKPTKIT, "convert", str(source), str(made), *options]
        return Command(" ".join(["convert 5 shards to one", *options]), argv, state, made)

    portable = ("--map-location", "cpu", "--strip-module")
    theirs = [sys.executable, "-c", CONVERTER, str(converter and converter.parent), str(state), str(made)]
    return {
        f"Rewriting a state_dict of {gib(state)}": (
            "cp",
            [
                *copies(state),
                convert(state, made, "--strip-module"),
                convert(state, made, "--strip-module", "--no-check"),
                convert(state, pth, *portable),
                convert(state, pth, *portable, "--no-check"),
                torch("torch.load(mmap=True), then save_file"),
                *([Command("the safetensors project's convert_file", theirs, state, made)] if converter else []),
            ],
        ),
        f"Casting a state_dict of {gib(state)} to bfloat16": (
            "cp",
            [
                *copies(state)[:1],
                convert(state, made, "--strip-module", "--dtype", "bfloat16"),
                convert(state, made, "--strip-module", "--dtype", "bfloat16", "--no-check"),
                torch("torch.load(mmap=True), to(bfloat16), save_file", "bfloat16"),
            ],
        ),
        f"Sharding {gib(state)}, and merging": (
            "cp",
            [*copies(state)[:1], split(), split("--no-check"), merge(), merge("--no-check")],
        ),
        f"Rewriting a training checkpoint of {gib(resume)}": (
            "cp",
            [*copies(resume), convert(resume, pth, *portable), convert(resume, pth, *portable, "--no-check")],
        ),
    }


def shard(state: Path) -> None:
    """The shards to be merged, beside the state_dict."""
    folder = state.parent / "sharded"
    folder.mkdir()
    argv = [*CKPTKIT, "convert", str(state), str(folder / "model.safetensors"), "--quiet"]
    subprocess.run([*argv, "--max-shard-size", str(state.stat().st_size // 4)], cwd=ROOT, check=True)
