"""Plans of plain bytes, and what they make."""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.plan import Checksum, Copy, LiteralBytes, Plan, Step
from ckptkit.transfer.steps import Tally, execute
from ckptkit.transfer.writing import write_atomically

DATA = os.urandom(200_000)

posix_only = pytest.mark.skipif(sys.platform != "linux", reason="in-kernel copies, umask and links as on Linux")


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's values in C order, as torch computes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # complex32 is "experimental"
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        plain = plain.as_strided((plain.numel(),), (1,))  # of one element any stride is contiguous
        return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def plan_of(*steps: Step) -> Plan:
    nbytes = max((step.target + step.nbytes for step in steps), default=0)
    return Plan(format="bytes", nbytes=nbytes, steps=steps, tensors=0, aliases={})


def some_plan(source: SourceFile) -> Plan:
    head = b"head" + bytes(4)
    return plan_of(LiteralBytes(0, head), Copy(8, ByteRange(source, 1000, 150_001)), Checksum(4, 8, 150_001))


def some_result() -> bytes:
    body = DATA[1000:151_001]
    return b"head" + zlib.crc32(body).to_bytes(4, "little") + body


def executed(path: Path, plan: Plan, progress: Callable[[int], object] | None = None) -> Tally:
    """Carry out a plan on a new file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        return execute(plan, fd, progress)
    finally:
        os.close(fd)


def write(out: Path, plan: Plan, **more: Any) -> None:
    """As with a check, unless told otherwise: checksums are computed, and the disk waited for."""
    write_atomically(out, plan, **{"force": False, "check": lambda path, compared: None, **more})


def only(path: Path) -> list[str]:
    """What is in the destination's folder."""
    return sorted(item.name for item in path.parent.iterdir())


def unavailable(code: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


# Checkpoints, as one file or in shards.

State = dict[str, torch.Tensor]

ASKED = "model.safetensors"
INDEX = "model.safetensors.index.json"

OLD, NEW = (
    {f"layer{number}.weight": torch.full((2000,), first + number) for number in range(6)} for first in (100.0, 200.0)
)
"""Two states of a model."""

SHARD_SIZES = {1: None, 2: 28_000, 3: 19_000, 6: 10_000}
"""The size that makes so many shards of them."""


def shard_names(count: int) -> list[str]:
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def files_of(count: int) -> list[str]:
    """All files of a checkpoint of so many shards."""
    return [ASKED] if count == 1 else sorted([*shard_names(count), INDEX])


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def held(folder: Path) -> str:
    """What a loader finds in a folder: "old" or "new", whole, or nothing."""
    path = folder / INDEX if os.path.lexists(folder / INDEX) else folder / ASKED
    if not path.exists():
        return "nothing"
    state = ckptkit.load_state_dict(path)
    assert list(state) == list(OLD)
    found = [which for which, expected in (("old", OLD), ("new", NEW)) if same(state, expected)]
    assert found, "a mix of old and new"
    return found[0]
