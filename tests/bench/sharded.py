"""Folders of several processes: opened, and made one file, beside copying them and torch's own way.

A folder is written by four processes (FSDP2 shards dim 0; the last dimension is shared out too in the second), and
`.metadata` of 128,000 chunks beside empty files stands for a run of many ranks.  torch's `dcp_to_torch_save` loads a
whole folder into memory and writes a `.pth`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from measure import CKPTKIT, ROOT, Command, Groups

MAKE = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

def rank(number, size, folder, nbytes, where):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=where)
    dist.init_process_group("gloo", rank=number, world_size=size)
    for name, placements, mesh in (("rows", [Shard(0)], (4,)), ("boxes", [Shard(0), Shard(1)], (2, 2))):
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", mesh)
        state = {}
        for i in range(max(1, nbytes // (4 << 20))):  # 4 MiB each
            state[f"layers.{i}.weight"] = distribute_tensor(torch.randn(1024, 1024), mesh, placements)
        dcp.save(state, checkpoint_id=os.path.join(folder, name))
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(rank, (4, sys.argv[1], int(sys.argv[2]), sys.argv[3]), nprocs=4)
"""

MANY = """
import os, pickle, sys, torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
)
folder, tensors, ranks = sys.argv[1], 1000, 128
os.makedirs(folder)
described, stored, ends = {}, {}, [0] * ranks
for i in range(tensors):
    name, chunks = f"model.layers.{i // 10}.part{i % 10}.weight", []
    for r in range(ranks):
        at = torch.Size((8 * r, 1024))
        chunks.append(ChunkStorageMetadata(offsets=torch.Size((8 * r, 0)), sizes=torch.Size((8, 1024))))
        where = _StorageInfo(f"__{r}_0.distcp", ends[r], 34000)
        stored[MetadataIndex(name, torch.Size((8 * r, 0)), r)] = where
        ends[r] += 34000
    described[name] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((8 * ranks, 1024)), chunks)
for r in range(ranks):
    with open(os.path.join(folder, f"__{r}_0.distcp"), "wb") as file:
        file.truncate(ends[r])
with open(os.path.join(folder, ".metadata"), "wb") as file:
    pickle.dump(Metadata(state_dict_metadata=described, planner_data=None, storage_data=stored), file, protocol=4)
"""

MERGE = "import sys; from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as f; f(*sys.argv[1:])"
RANKS = 4


def make(nbytes: int, folder: Path) -> Path:
    """The folder with those that are measured: ``rows``, ``boxes``, ``many``."""
    folder = folder / "sharded"
    folder.mkdir()
    script = folder / "make.py"  # processes that are spawned import it
    script.write_text(MAKE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    port = str(20_000 + os.getpid() % 20_000)
    for argv in ([str(script), str(folder), str(nbytes), port], ["-c", MANY, str(folder / "many")]):
        subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, env=environment)
    return folder


def groups(folder: Path) -> Groups:
    """The tables: opening, and one for each folder that is made one file."""
    inspect = [*CKPTKIT, "inspect"]
    made: Groups = {
        "Opening folders of several processes": (
            "python -c pass",
            [
                Command("python -c pass", [sys.executable, "-c", "pass"]),
                Command(f"ckptkit inspect, {RANKS} ranks", [*inspect, str(folder / "rows")]),
                Command("ckptkit inspect, 128,000 chunks of 128 ranks", [*inspect, str(folder / "many")]),
                Command("python -c 'import torch'", [sys.executable, "-c", "import torch"]),
            ],
        )
    }
    for name, what in (("rows", "shared out by rows"), ("boxes", "shared out by rows and columns")):
        source = folder / name
        out, whole, copy = folder / "out.safetensors", folder / "out.pth", folder / "copy"
        some = next(source.glob("*.distcp"))  # as large as the part that is warmed
        convert = [*CKPTKIT, "convert", str(source)]
        merge = [sys.executable, "-W", "ignore", "-c", MERGE, str(source), str(whole)]
        made[f"A folder of {RANKS} ranks, {what}"] = (
            "cp -r",
            [
                Command("cp -r", ["cp", "-r", str(source), str(copy / "of")], some, copy),
                Command("ckptkit convert --no-check", [*convert, str(out), "--no-check"], some, out),
                Command("ckptkit convert", [*convert, str(out)], some, out),
                Command("ckptkit convert to .pth", [*convert, str(whole)], some, whole),
                Command("dcp_to_torch_save", merge, some, whole),
            ],
        )  # fmt: skip
    return made
