"""What the tests of the output's check share: writing one unchecked, and damaging it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ckptkit import formats
from ckptkit.checkpoint import Checkpoint
from ckptkit.rewrite import WeightsOnly
from ckptkit.transfer import execute


def written(checkpoint: Checkpoint, path: Path) -> Path:
    """The checkpoint (to safetensors its weights alone) as its writer writes it, unchecked."""
    if path.suffix == ".safetensors":
        checkpoint = WeightsOnly()(checkpoint)
    write = formats.format_for(path).write
    assert write is not None
    with path.open("w+b") as file:
        execute(write(checkpoint), file.fileno())
    return path


def extents(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's storage begins in a file, and its bytes."""
    checkpoint, file = formats.read(path)
    with closing(file):
        return {name: (e.storage.source.offset, e.storage.nbytes) for name, e in checkpoint.state_dict.items()}


def flipped(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
