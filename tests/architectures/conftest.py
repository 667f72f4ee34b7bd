"""Fixtures of the tests of identification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import StateDict, Storage, TensorEntry, contiguous_stride

Named = Callable[..., StateDict]


@pytest.fixture(scope="session")
def named() -> Named:
    """``named(shapes, rename=...)``: a state_dict that has these names and shapes and no bytes."""
    source = ByteRange(SourceFile(Path(__file__)), 0, 0)
    storage = Storage(key="0", dtype="float32", nbytes=0, location="cpu", source=source)

    def entry(shape: tuple[int, ...]) -> TensorEntry:
        stride = contiguous_stride(shape)
        return TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=stride, dtype="float32")

    def build(
        of: nn.Module | Mapping[str, tuple[int, ...]], rename: Callable[[str], str] = lambda name: name
    ) -> StateDict:
        if isinstance(of, nn.Module):
            of = {name: tuple(tensor.shape) for name, tensor in of.state_dict().items()}
        return StateDict({rename(name): entry(shape) for name, shape in of.items()})

    return build


@pytest.fixture
def on_meta() -> object:
    """Modules made in the test have no memory for their weights."""
    with torch.device("meta"):
        yield
