"""What the checks of one `verify` are told, and what they leave for one another."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import DTypeError, VerifyError
from ckptkit.report import Finding
from ckptkit.torch_bridge import dtype_of
from ckptkit.verifier.measure import Fit
from ckptkit.verifier.references import Reference

__all__ = ["Check", "Context", "floating_dtype", "pick_device", "shortened"]


@dataclass(slots=True, kw_only=True)
class Context:
    """The settings of one verification, and its results so far.

    Attributes:
        reference: what the model was built from.
        device: where the forward check runs.
        dtype: torch name of the type the model was cast to; ``None``: as the reference has it.
        input_shapes: one for each positional input; empty: what the reference implies.
        seed: of the random inputs.
        allow_missing, allow_unexpected: patterns of names that may be so.
        wants_forward: whether the forward check is asked for.
        failed: whether a check has found an error.
        fit: set by the fit check.
        loaded: set by the load check once every weight is in the model.
        outputs: set by the forward check: the outputs' figures, as in the JSON document.
        seconds: how long each part took.
    """

    reference: Reference
    device: torch.device
    dtype: str | None
    input_shapes: tuple[tuple[int, ...], ...]
    seed: int
    allow_missing: tuple[str, ...]
    allow_unexpected: tuple[str, ...]
    wants_forward: bool
    failed: bool = False
    fit: Fit | None = None
    loaded: bool = False
    outputs: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, path: str, *options: str) -> str | None:
        """This verification with more options, ready to be pasted; ``None`` for a reference that has no name."""
        if self.reference.spec is None:
            return None
        given = [part for name, value in self.reference.args.items() for part in ("--model-arg", f"{name}={value}")]
        return shlex.join(["ckptkit", "verify", path, "--model", self.reference.spec, *given, *options])


Check = Callable[[Checkpoint, nn.Module, Context], Iterator[Finding]]
"""One check.  It yields what it finds; a check that cannot be run at all raises `VerifyError`."""


def pick_device(name: str) -> torch.device:
    """The device a name means on this machine.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"``: the first of CUDA, MPS
            and the CPU that is here.

    Raises:
        VerifyError: it is no such name, or this machine lacks the device.
    """
    if name == "auto":
        here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(here)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise VerifyError(f"{name!r} is no device to verify on; expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise VerifyError(f"device {name!r} is not here: torch sees {count} CUDA devices; use --device cpu or auto")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise VerifyError(f"device {name!r} is not here; use --device cpu or auto")
    return device


def floating_dtype(name: str) -> torch.dtype:
    """The floating point type a model can be cast to.

    Raises:
        VerifyError: it is none, or this torch lacks it.
    """
    try:
        found = dtype_of(name)
    except DTypeError as error:
        raise VerifyError(f"the model cannot be cast: {error}") from error
    if not found.is_floating_point:
        raise VerifyError(f"the model cannot be cast to {name}: expected a floating point type, such as float16")
    return found


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
