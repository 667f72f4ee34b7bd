"""Files as ckptkit opens them and writes them, and damage done to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ckptkit import formats
from ckptkit.checkpoint import Checkpoint
from ckptkit.rewrite import WeightsOnly
from ckptkit.transfer import execute


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint, as the rewriters and writers see it, while its file is open."""
    checkpoint, file = formats.read(path)
    with closing(file):
        yield checkpoint


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
    with opened(path) as checkpoint:
        return {name: (e.storage.source.offset, e.storage.nbytes) for name, e in checkpoint.state_dict.items()}


def flipped(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
