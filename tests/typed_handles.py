"""User code that opens, rewrites, loads and saves, as mypy sees it; checked with the package, and never run.

Each wrong call is one that mypy must refuse: strict as it is here, it tells of an ignored error that is none.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

import ckptkit


def one_tensor(path: Path) -> float:
    """Entries, their values, and parts of them."""
    with ckptkit.open(path, section="model") as file:
        entry: ckptkit.TensorEntry = file.state_dict["conv1.weight"]
        array: NDArray[Any] = entry.numpy()
        tensor: torch.Tensor = entry.torch(device="cuda:0")
        rows: NDArray[numpy.float32] = entry[1000:2000].numpy()
        part: ckptkit.TensorEntry = entry[1:3, ::2, ..., None][-1]
        columns = [row.torch(device=torch.device("cpu")).sum() for row in part]
        shape: tuple[int, ...] = entry.shape
        return float(array.mean() + rows.mean() + float(tensor.sum()) + float(columns[0]) + shape[0])


def streamed(path: Path) -> dict[str, float]:
    """One tensor at a time."""
    with ckptkit.open(path) as file:
        return {name: float(entry.numpy().max()) for name, entry in file.state_dict.items()}


def shout(checkpoint: ckptkit.Checkpoint) -> ckptkit.Checkpoint:
    """A rewriter of one's own."""
    state_dict = checkpoint.state_dict.renamed(str.upper, checkpoint.state_dict.versions)
    return checkpoint.replace(state_dict=state_dict)


def rewritten(path: Path, model: torch.nn.Module) -> ckptkit.Plan:
    """Rewriters from rules, a dict and functions; what they make is loaded, and saved."""
    mine: ckptkit.Rewriter = shout
    names: Mapping[str, str] = {"old": "new"}
    with ckptkit.open(path) as file:
        clean = file.rewrite(
            ckptkit.StripModule(),
            ckptkit.Rename(names),
            ckptkit.Rename(lambda name: name.replace("gamma", "weight")),
            ckptkit.Rename([("^a", "b"), "^c=>d"]),
            ckptkit.Rename("^e=>f"),
            ckptkit.CastDtype("bfloat16"),
            mine,
        )
        state: OrderedDict[str, Any] = clean.load(map_location={"cuda:1": "cpu"})
        model.load_state_dict(state)
        return clean.save("clean.safetensors", force=True)


def saved(model: torch.nn.Module, path: Path) -> int:
    """A state_dict, arrays, a tree, and entries."""
    ckptkit.save(model.state_dict(), path, metadata={"by": "me"}, max_shard_size="5GB", tied="duplicate")
    ckptkit.save({"a": numpy.ones(3), "b": torch.ones(3)}, "out.safetensors", check=False, to="safetensors")
    with ckptkit.open(path) as file:
        ckptkit.save({name: entry[:10] for name, entry in file.state_dict.items()}, "heads.pth")
    plan: ckptkit.Plan = ckptkit.save({"model": model.state_dict(), "epoch": 3}, "resume.pth", force=True)
    return plan.total_nbytes


async def served(paths: list[Path]) -> list[OrderedDict[str, Any]]:
    """Beside an event loop."""
    states = [asyncio.to_thread(ckptkit.load_state_dict, path, map_location="cpu") for path in paths]
    await asyncio.to_thread(ckptkit.convert, paths[0], "out.pth", rename={"a": "b"}, force=True)
    await asyncio.to_thread(ckptkit.convert, paths[0], "out.pth", rename=str.lower, force=True)
    return list(await asyncio.gather(*states))


def wrong(path: Path, entry: ckptkit.TensorEntry) -> None:
    """Values of another type, and names that are none."""
    entry["a"]  # type: ignore[index]
    entry[[1, 2]]  # type: ignore[index]
    entry.numpy(device="cpu")  # type: ignore[call-arg]
    entry.torch("cpu")  # type: ignore[call-arg]
    ckptkit.Rename({1: "a"})  # type: ignore[dict-item]
    ckptkit.Rename(len)  # type: ignore[arg-type]
    ckptkit.save({}, path, tied="both")  # type: ignore[arg-type]
    ckptkit.save({}, path, metadata={"epoch": 3})  # type: ignore[dict-item]
    ckptkit.save({})  # type: ignore[call-arg]
    ckptkit.convert(path, path, rename=3)  # type: ignore[arg-type]
    with ckptkit.open(path) as file:
        file.load(map_loc="cpu")  # type: ignore[call-arg]
