"""Weights as the assertions take them: a path, an open file, a dict of tensors or a module."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit import api
from ckptkit.report import count_of

if TYPE_CHECKING:
    import torch

    from ckptkit.checkpoint import Checkpoint

    Weights = str | os.PathLike[str] | api.CheckpointFile | Mapping[str, torch.Tensor] | torch.nn.Module

__all__ = ["Subject", "described", "on_disk", "opened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Weights as a file.

    Attributes:
        path: the file.
        section: path of the weights in it, where one was selected.
        called: what messages say.
        is_temporary: whether the file is gone when the assertion has failed.
    """

    path: str
    section: str | None = None
    called: str
    is_temporary: bool = False


@contextmanager
def on_disk(weights: Weights, name: str) -> Iterator[Subject]:
    """The weights as a file: their own, or one that is gone afterwards."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(weights, torch.nn.Module):
        from ckptkit.verifier.foreign import foreign

        module: Any = weights
        called = f"a {type(module).__name__} in memory"
        with foreign(f"{name}: state_dict() of {called} failed"):
            weights = module.state_dict()
    else:
        called = "a dict in memory"
    if isinstance(weights, (str, os.PathLike)):
        path = os.fsdecode(weights)
        yield Subject(path=path, called=path)
    elif isinstance(weights, api.CheckpointFile) and not weights.checkpoint.operations:
        several = sum(section.is_weights for section in weights.sections) > 1
        section = weights.checkpoint.origin.state_path if several else None
        yield Subject(path=weights.path, section=section, called=described(weights))
    elif isinstance(weights, (api.CheckpointFile, Mapping)):
        with tempfile.TemporaryDirectory(prefix="ckptkit-") as folder:
            path = os.path.join(folder, "weights.pth")
            if isinstance(weights, api.CheckpointFile):
                weights.rewrite(_weights_only()).save(path, check=False, receipt=False)
                called = f"{described(weights)}, rewritten"
            else:
                _save(weights, path, name)
                called = f"{called} ({count_of(len(weights), 'tensor')})"
            yield Subject(path=path, called=called, is_temporary=True)
    else:
        raise TypeError(
            f"{name} is of type {type(weights).__name__}; expected a path, an open CheckpointFile, a dict of tensors "
            "or a module"
        )


@contextmanager
def opened(weights: Weights, name: str, strip_module: bool) -> Iterator[tuple[Checkpoint, str]]:
    """The weights as a checkpoint, with what messages call it."""
    from ckptkit.rewrite import StripModule

    rewriters = (StripModule(),) if strip_module else ()
    if isinstance(weights, api.CheckpointFile):
        yield weights.checkpoint.rewrite(*rewriters), described(weights)
    else:
        with on_disk(weights, name) as subject, api.open(subject.path) as file:
            called = described(file) if subject.called == subject.path else subject.called
            yield file.checkpoint.rewrite(*rewriters), called


def _weights_only() -> api.Rewriter:
    from ckptkit.rewrite import WeightsOnly

    return WeightsOnly()


def _save(weights: Mapping[str, Any], path: str, name: str) -> None:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise TypeError(f"{name} is a dict of {count_of(len(weights), 'value')}, none of them a torch.Tensor")
    torch.save(dict(weights), path)


def described(file: api.CheckpointFile) -> str:
    """An open file in a few words."""
    return f"{file.path} ({file.format}, {file.kind}, {count_of(len(file.state_dict), 'tensor')})"
