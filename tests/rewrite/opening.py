"""Opening a file as the rewriters see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ckptkit import formats
from ckptkit.checkpoint import Checkpoint


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    checkpoint, file = formats.read(path)
    with closing(file):
        yield checkpoint
