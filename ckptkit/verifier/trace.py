"""What each leaf module computed in one run, held against another: where two checkpoints part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckptkit.verifier.outputs import OutputTolerance, compared, output_tensors

__all__ = ["Parting", "Trace", "leaf_modules"]

_CALL_NUMEL = 1 << 20
"""Elements kept of one call's output."""

_ALL_NBYTES = 1 << 30
"""Bytes kept of all calls; those after are not compared."""

_Key = tuple[str, int, str]
"""The module's name, which of its calls, and where in its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """The first leaf modules, in the order they are called, whose outputs are not the same.

    Attributes:
        differs: the first that is not bit-equal; ``None``: all are.
        parts: the first beyond the tolerance; ``None``: none is.
        calls: how many calls were compared.
        is_whole: whether those are all: ``False`` where memory for samples ran out.
    """

    differs: str | None
    parts: str | None
    calls: int
    is_whole: bool


class Trace:
    """Evenly spaced samples of what each leaf module gave in one run.

    Large outputs are sampled, so a module is only said to part where one of the sampled elements does.
    """

    def __init__(self) -> None:
        self._samples: dict[_Key, torch.Tensor] = {}
        self._shapes: dict[_Key, torch.Size] = {}
        self._left = _ALL_NBYTES
        self._is_whole = True

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Keep samples of what runs inside the block."""

        def keep(key: _Key, tensor: torch.Tensor) -> None:
            sample = _sample(tensor)
            self._left -= sample.nbytes
            if self._left < 0:
                self._is_whole = False
                return
            self._samples[key], self._shapes[key] = sample, tensor.shape

        with _watched(model, keep):
            yield

    @contextmanager
    def comparing(self, model: nn.Module, tolerance: OutputTolerance) -> Iterator[Callable[[], Parting]]:
        """Compare what runs inside the block with what was recorded; what it gives says what came of it."""
        differs: list[str] = []
        parts: list[str] = []
        calls: set[tuple[str, int]] = set()

        def compare(key: _Key, tensor: torch.Tensor) -> None:
            if key not in self._samples:
                return
            calls.add(key[:2])
            if parts:
                return
            same_shape = self._shapes[key] == tensor.shape
            found = compared(key[2], self._samples[key], _sample(tensor), tolerance) if same_shape else None
            if found is None or not found.is_equal:
                differs.append(key[0])
            if found is None or not found.is_close:
                parts.append(key[0])

        with _watched(model, compare):
            yield lambda: Parting(
                differs=next(iter(differs), None),
                parts=next(iter(parts), None),
                calls=len(calls),
                is_whole=self._is_whole,
            )


def leaf_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, with their names; compiled ones take no hooks."""
    for name, module in model.named_modules():
        if next(module.children(), None) is None and not isinstance(module, torch.jit.ScriptModule):
            yield name or "(the model)", module


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU of evenly spaced elements."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _CALL_NUMEL))].to("cpu", copy=True)


@contextmanager
def _watched(model: nn.Module, note: Callable[[_Key, torch.Tensor], None]) -> Iterator[None]:
    """Call ``note`` with every tensor that a leaf module returns."""
    counts: dict[str, int] = {}
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            call = counts[name] = counts.get(name, 0) + 1
            for path, tensor in output_tensors(output):
                note((name, call, path), tensor)

        handles.append(module.register_forward_hook(hook))

    try:
        for name, module in leaf_modules(model):
            watch(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
