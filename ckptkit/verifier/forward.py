"""The forward check: one evaluation on known input, and whether what comes out is what should."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.report import Finding, listed
from ckptkit.startup import dataclass
from ckptkit.verifier.context import Context, floating_dtype
from ckptkit.verifier.foreign import error_text, foreign
from ckptkit.verifier.inputs import Batch
from ckptkit.verifier.outputs import (
    OutputTolerance,
    Trace,
    broken_values,
    compared,
    described,
    is_finite,
    leaf_modules,
    output_tensors,
    shown,
)

__all__ = ["Pass", "check_forward", "measured_noise", "model_dtype", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One evaluation.

    Attributes:
        outputs: the tensors it gave, on the CPU.
        returned: the type of what it gave.
        seconds: it took.
    """

    outputs: Mapping[str, torch.Tensor]
    returned: str
    seconds: float


def model_dtype(model: nn.Module) -> str:
    """Name of the type the model computes in: its first parameter's or buffer's of floating point.

    Types of 8 bits and less store weights; no layer takes inputs of them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return str(tensor.dtype).removeprefix("torch.")
    return "float32"


def run(model: nn.Module, batch: Batch, device: torch.device) -> Pass:
    """Evaluate the model, which is on the device; every `Exception` comes through."""
    with foreign(), torch.inference_mode(), _full_precision(device):
        _synchronize(device)
        started = time.perf_counter()
        output = model(*batch.args, **batch.kwargs)
        _synchronize(device)
        seconds = time.perf_counter() - started
        outputs = {path: tensor.to("cpu", copy=True) for path, tensor in output_tensors(output)}
    return Pass(outputs=outputs, returned=type(output).__name__, seconds=seconds)


def check_forward(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether the model, with the checkpoint's weights, computes finite outputs of the documented shapes."""
    inputs = context.inputs
    if inputs is None or not context.loaded:
        return
    name = model_dtype(model)
    place = f"on {context.device} with input {inputs} of {name}"
    try:
        with foreign(), ExitStack() as stack:
            model.to(context.device)
            if context.against is not None or len(context.devices) > 1:
                context.trace = Trace()
                stack.enter_context(context.trace.recording(model))
            made = run(model, inputs.batch(context.device, floating_dtype(name)), context.device)
        context.passes += 1
        context.seconds["forward"] = made.seconds
        context.outputs.extend(described(path, tensor) for path, tensor in made.outputs.items())
        broken = [broken_values(path, tensor) for path, tensor in made.outputs.items() if not is_finite(tensor)]
    except Exception as error:
        is_given = inputs.path is not None or inputs.inputs != tuple(context.reference.inputs)
        yield Finding(
            code="forward-failed",
            severity="error",
            message=f"the forward pass {place} failed: {error_text(error)}"
            + ("" if is_given else "; if the model takes a different input, give --input-shape"),
        )
        return
    if not made.outputs:
        yield Finding(
            code="no-output",
            severity="error",
            message=f"the forward pass {place} returned {made.returned} without a tensor; nothing was checked",
        )
        return
    yield from _shapes(made.outputs, context)
    if broken:
        yield Finding(
            code="output-not-finite",
            severity="error",
            message=f"the forward pass {place} gave values that are not finite: {listed(broken)}",
        )
        return
    context.first = made.outputs
    if not any(tensor.numel() for tensor in made.outputs.values()):
        yield Finding(
            code="empty-output",
            severity="warning",
            message=f"the forward pass {place} gave only empty tensors (nothing detected), which says nothing about "
            "the weights",
        )
    else:
        yield Finding(
            code="forward-ok",
            severity="info",
            message=f"finite outputs {place}: {listed([shown(p, t) for p, t in made.outputs.items()])}, "
            f"in {made.seconds * 1000:,.0f} ms",
        )


def _shapes(outputs: Mapping[str, torch.Tensor], context: Context) -> Iterator[Finding]:
    """Outputs that are not what the reference documents for its own inputs."""
    expected = context.reference.outputs
    if not expected or context.inputs is None or context.inputs.inputs != tuple(context.reference.inputs):
        return
    wrong = [f"{path or 'the output'} is missing" for path in expected if path not in outputs]
    wrong += [f"{path or 'a tensor'} is unexpected" for path in outputs if path not in expected]
    for path, shape in expected.items():
        found = tuple(outputs[path].shape) if path in outputs else None
        if found is not None and (
            len(found) != len(shape) or any(size not in (None, got) for size, got in zip(shape, found, strict=True))
        ):
            wanted = "x".join("?" if size is None else str(size) for size in shape) or "a scalar"
            wrong.append(f"{path or 'the output'} is {'x'.join(map(str, found)) or 'a scalar'}, expected {wanted}")
    if wrong:
        told = f"the outputs do not match those of {context.reference.label}: {listed(wrong)}"
        yield Finding(code="output-shape", severity="error", message=told)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions in float32, where cuDNN would round their inputs to the 10 bits of TF32."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined, unused-ignore]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined, unused-ignore]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined, unused-ignore]


def measured_noise(
    model: nn.Module, context: Context, device: torch.device, outputs: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """How far each output moves where nothing changes but rounding: the largest absolute difference.

    The first inputs are run again on another number of threads, and once with each number that goes into a layer
    moved by about one in its last place; what row 0 in a batch of another size gave counts as well.  A run that
    fails says nothing.

    Args:
        model: as it gave the outputs, on the device.
        context: with the inputs.
        device: where to run.
        outputs: of the first run.
    """
    rows = context.figures.get("behaviour", {}).get("batch", [])
    noise = {row["path"]: row["max_abs"] for row in rows if row["close"] and row["max_abs"] is not None}
    inputs = context.inputs
    if inputs is None:
        return noise
    for way in (_other_threads(), _moved(model)):
        try:
            with way:
                made = run(model, inputs.batch(device, floating_dtype(model_dtype(model))), device)
        except Exception:  # noqa: S112 - its own hooks may mind
            continue
        for path, tensor in outputs.items():
            if path in made.outputs and made.outputs[path].shape == tensor.shape:
                moved = compared(path, tensor, made.outputs[path], OutputTolerance(atol=0.0, rtol=0.0)).max_abs
                noise[path] = max(noise.get(path, 0.0), moved if math.isfinite(moved) else 0.0)
    return noise


@contextmanager
def _other_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Move every floating point number that goes into a leaf module up or down by its type's relative spacing."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: object) -> object:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.element_size() == 1:
            return value
        up = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.bool).to(value.device)
        eps = torch.finfo(value.dtype).eps
        return torch.where(up, value * (1 + eps), value * (1 - eps))

    handles = [
        leaf.register_forward_pre_hook(lambda _module, given: tuple(moved(value) for value in given))
        for _, leaf in leaf_modules(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _synchronize(device: torch.device) -> None:
    """Wait for the device, so that times are times of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
