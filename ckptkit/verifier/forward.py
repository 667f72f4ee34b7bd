"""The forward check: one evaluation on seeded input, and whether what comes out are numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import VerifyError
from ckptkit.report import Finding
from ckptkit.verifier.context import Context, floating_dtype, shortened

__all__ = ["check_forward", "input_shapes", "model_dtype"]


def input_shapes(context: Context) -> tuple[tuple[int, ...], ...]:
    """The shapes of the positional inputs: those given, else those the reference implies.

    Raises:
        VerifyError: neither says, or one is no shape.
    """
    shapes = context.input_shapes or tuple(i.shape for i in context.reference.inputs)
    if not shapes:
        raise VerifyError(
            f"what {context.reference.label} takes as input is not known; "
            "give --input-shape 1,3,224,224 (once for each input) or --no-forward"
        )
    for shape in shapes:
        if not shape or any(size < 1 for size in shape):
            raise VerifyError(f"input shape {shape}: expected sizes of at least 1, such as 1,3,224,224")
    return shapes


def model_dtype(model: nn.Module) -> str:
    """Name of the model's floating point type: its first parameter's or buffer's that has one."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return "float32"


def check_forward(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether the model, with the checkpoint's weights, computes finite outputs."""
    if not context.wants_forward or not context.loaded:
        return
    shapes, name = input_shapes(context), model_dtype(model)
    shown = " and ".join("x".join(str(size) for size in shape) for shape in shapes)
    place = f"on {context.device} with input {shown} of {name}"
    try:
        model.to(context.device)
        with torch.no_grad():
            inputs = _inputs(shapes, context, floating_dtype(name))
            _synchronize(context.device)
            started = time.perf_counter()
            output = model(*inputs)
            _synchronize(context.device)
        context.seconds["forward"] = time.perf_counter() - started
        outputs = dict(_tensors(output, ""))
        context.outputs.extend(_described(path, tensor) for path, tensor in outputs.items())
        broken = [_broken(path, tensor) for path, tensor in outputs.items() if not _is_finite(tensor)]
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        yield Finding(
            code="forward-failed",
            severity="error",
            message=f"the forward pass {place} failed: {type(error).__name__}: {text}"
            + ("" if context.input_shapes else "; where the model takes another input, give --input-shape"),
        )
        return
    if not outputs:
        yield Finding(
            code="no-output",
            severity="error",
            message=f"the forward pass {place} returned {type(output).__name__} without a tensor; nothing was checked",
        )
    elif broken:
        yield Finding(
            code="output-not-finite",
            severity="error",
            message=f"the forward pass {place} gave values that are no numbers: {shortened(broken)}",
        )
    elif not any(tensor.numel() for tensor in outputs.values()):
        yield Finding(
            code="empty-output",
            severity="warning",
            message=f"the forward pass {place} gave empty tensors only (nothing detected), which says nothing of the "
            "weights",
        )
    else:
        yield Finding(
            code="forward-ok",
            severity="info",
            message=f"finite outputs {place}: {shortened([_shown(p, t) for p, t in outputs.items()])}, "
            f"in {context.seconds['forward'] * 1000:,.0f} ms",
        )


def _inputs(shapes: tuple[tuple[int, ...], ...], context: Context, dtype: torch.dtype) -> list[Any]:
    """Seeded values in [0, 1), the same on every device; a detector gets single images in a list."""
    generator = torch.Generator().manual_seed(context.seed)
    made = [torch.rand(shape, generator=generator).to(context.device, dtype) for shape in shapes]
    if not any(i.is_list for i in context.reference.inputs):
        return list(made)
    return [[image for batch in made for image in (batch.unbind(0) if batch.dim() == 4 else (batch,))]]


def _synchronize(device: torch.device) -> None:
    """Wait for the device, so that times are times of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _tensors(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in an output, with the keys that lead to it joined by dots."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    parts: list[tuple[object, object]] = []
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    for key, part in parts:
        yield from _tensors(part, f"{path}.{key}" if path else str(key))


def _can_be_broken(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_finite(tensor: torch.Tensor) -> bool:
    return not _can_be_broken(tensor) or bool(torch.isfinite(tensor).all())


def _described(path: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "path": path,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "finite": _is_finite(tensor),
    }


def _shown(path: str, tensor: torch.Tensor) -> str:
    shape = "x".join(str(size) for size in tensor.shape) or "scalar"
    return f"{path + ' ' if path else ''}{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _broken(path: str, tensor: torch.Tensor) -> str:
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{path or 'the output'} ({nan:,} NaN, {infinite:,} Inf of {tensor.numel():,})"
