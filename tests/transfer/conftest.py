"""Entries that torch saved, a source of plain bytes, and a folder to write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from support.plans import DATA, NEW, OLD

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import TensorEntry


@pytest.fixture
def entry(save: Callable[..., Path]) -> Iterator[Callable[[torch.Tensor], TensorEntry]]:
    """The entry of a tensor, after torch has saved it."""
    files: list[SourceFile] = []

    def make(tensor: torch.Tensor) -> TensorEntry:
        checkpoint, file = formats.read(save(tensor, f"{len(files)}.pth"))
        files.append(file)
        assert isinstance(checkpoint.rest, TensorEntry)
        return checkpoint.rest

    yield make
    for file in files:
        file.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint that is there, and one that takes its place."""
    folder = tmp_path_factory.mktemp("sources")
    torch.save(OLD, folder / "old.pth")
    torch.save(NEW, folder / "new.pth")
    return {"old": folder / "old.pth", "new": folder / "new.pth"}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceFile]:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "data").write_bytes(DATA)
    with closing(SourceFile(folder / "data")) as file:
        yield file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A destination in a folder of its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "result.bin"
