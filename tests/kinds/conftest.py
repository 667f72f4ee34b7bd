"""What the tests of kinds share: files opened, their weights held against torch's, nodes made by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
import torch
from support.files import SameBits, Save, one_float, tensor_of

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry
from ckptkit.normalize import RawCheckpoint, normalize
from ckptkit.pickling.inert import Global, InertDict, Object

Opened = Callable[..., AbstractContextManager[Checkpoint]]
SameWeights = Callable[[StateDict, dict[str, torch.Tensor]], None]
Module = Callable[..., Object]
Normalized = Callable[..., Checkpoint]


@pytest.fixture
def opened() -> Opened:
    """``opened(path, section=...)``: the checkpoint while its file is open."""

    @contextmanager
    def open_file(path: Path, *, section: str | None = None) -> Iterator[Checkpoint]:
        checkpoint, file = formats.read(path, section=section)
        with closing(file):
            yield checkpoint

    return open_file


@pytest.fixture
def same_weights(same_bits: SameBits) -> SameWeights:
    """Fails unless names, order and values are those of a dict of tensors."""

    def check(state_dict: StateDict, expected: dict[str, torch.Tensor]) -> None:
        assert list(state_dict) == list(expected)
        for name, tensor in expected.items():
            assert same_bits(tensor_of(state_dict[name]), tensor), name

    return check


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without torch's warnings of what is deprecated, and still in many files."""
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


# By hand: what this torch does not write.


@pytest.fixture
def module_node() -> Module:
    """``module_node(children, parameters, buffers)``: a pickled module."""

    def make(children: object = (), parameters: object = (), buffers: object = ()) -> Object:
        node = Object("newobj", Global("m", "M"), ())
        node.state = InertDict([
            ("_parameters", InertDict(list(parameters))),  # type: ignore[call-overload]
            ("_buffers", InertDict(list(buffers))),  # type: ignore[call-overload]
            ("_modules", InertDict(list(children))),  # type: ignore[call-overload]
        ])  # fmt: skip
        return node

    return make


@pytest.fixture
def entry(save: Save) -> Iterator[TensorEntry]:
    """A tensor of one float."""
    with one_float(save) as found:
        yield found


@pytest.fixture
def normalized(save: Save) -> Iterator[Normalized]:
    """``normalized(root, section=...)``: the checkpoint a tree gives."""
    with closing(SourceFile(save(1, "file.pth"))) as source:
        yield lambda root, **options: normalize(
            RawCheckpoint(root=root, format="torch-zip", metadata={}), source, **options
        )
