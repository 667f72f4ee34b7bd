"""The behavior check: a sound model gives the same result each time, whatever is beside its input.

If all is well it costs one more forward pass: the first one's row 0 is computed again in a batch of another size (in a
pair if it was alone, alone if it was one of several).  If that gives the same result, the model is repeatable and keeps
rows apart; if not, or if rows cannot be compared, one more pass on the first input decides which.

A detector's outputs are chosen by rank and threshold, so different rounding may give other boxes: for a list of images,
only the first one's result on a second run is compared, not that beside another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.report import Finding, listed
from ckptkit.verifier.context import Context, floating_dtype
from ckptkit.verifier.foreign import ForeignExitError, error_text
from ckptkit.verifier.forward import Pass, measured_noise, model_dtype, run
from ckptkit.verifier.inputs import Inputs
from ckptkit.verifier.outputs import OutputDifference, OutputTolerance, compare_outputs, compared

__all__ = ["check_behaviour"]


def check_behaviour(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether outputs depend on the input, on nothing but it, and row by row."""
    inputs, first = context.inputs, context.first
    if inputs is None or first is None:
        return
    dtype = floating_dtype(model_dtype(model))
    tolerance = context.tolerance((checkpoint,), first)
    figures: dict[str, Any] = {"tolerance": tolerance.to_dict(), "batch": [], "repeat": []}
    context.figures["behaviour"] = figures
    try:
        other, problem = _other_pass(model, inputs, context, dtype)
    except ForeignExitError as error:
        yield Finding(
            code="forward-failed",
            severity="error",
            message=f"the forward pass with a different batch size failed: {error_text(error)}",
        )
        return
    rows: list[OutputDifference] = []
    if other is not None:
        rows = _rows(first, other.outputs, inputs, tolerance)
        figures["batch"] = [difference.to_dict() for difference in rows]
    yield from _constant(first, None if other is None else other.outputs, inputs, context)
    apart = [difference for difference in rows if not difference.is_close]
    if rows and not apart:
        context.notes["behaviour"] = _note(context, "row 0 is the same in another batch size and in a second run")
        return
    yield from _repeated(model, inputs, context, dtype, tolerance)
    if other is not None and apart and not figures["differs"] and context.options.atol is None:
        noise = measured_noise(model, context, context.device, first)  # what repeats itself may be rounding alone
        rows = _rows(first, other.outputs, inputs, tolerance, noise)
        figures["batch"] = [difference.to_dict() for difference in rows]
        apart = [difference for difference in rows if not difference.is_close]
    if apart and not figures["differs"]:
        yield Finding(
            code="batch-dependent",
            severity="error" if context.reference.inputs else "warning",
            message="a row's result depends on the batch it is in: row 0 of "
            f"{_sizes(inputs)} rows, {listed([str(d) for d in apart], 3)}",
        )
    if problem is not None:
        yield Finding(
            code="fixed-batch",
            severity="info",
            message=f"the model does not accept another batch size ({problem}); whether rows are independent was not "
            "checked",
        )
    elif not rows:
        yield Finding(code="batch-not-compared", severity="info", message=_not_compared(inputs))
    if not figures["differs"]:
        context.notes["behaviour"] = _note(context, "the same on a second run")


def _other_pass(
    model: nn.Module, inputs: Inputs, context: Context, dtype: torch.dtype
) -> tuple[Pass | None, str | None]:
    """The pass on a batch of another size, or why there is none."""
    if inputs.is_list:
        return None, None
    try:
        batch = inputs.rebatched(context.device, dtype)
        if batch is None:
            return None, None
        made = run(model, batch, context.device)
    except ForeignExitError:  # that is no way to refuse a batch
        raise
    except Exception as error:
        return None, error_text(error)[:200]
    context.passes += 1
    return made, None


def _rows(
    first: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    inputs: Inputs,
    tolerance: OutputTolerance,
    noise: Mapping[str, float] = {},
) -> list[OutputDifference]:
    """Row 0 of each output that is a batch, in both passes."""
    sizes = _sizes(inputs)
    if inputs.is_list or sizes is None:
        return []
    ours, theirs = sizes
    return [
        compared(path, first[path][:1], other[path][:1], tolerance.above(noise.get(path, 0.0)))
        for path in first
        if path in other
        and first[path].dim()
        and other[path].dim()
        and (first[path].shape[0], other[path].shape[0]) == (ours, theirs)
    ]


def _sizes(inputs: Inputs) -> tuple[int, int] | None:
    """Rows of the first pass and of the other."""
    rows = inputs.rows
    return None if rows is None else (rows, 2 if rows == 1 else 1)


def _repeated(
    model: nn.Module, inputs: Inputs, context: Context, dtype: torch.dtype, tolerance: OutputTolerance
) -> Iterator[Finding]:
    """Whether the first input gives the first outputs again."""
    first = context.first or {}
    try:
        again = run(model, inputs.batch(context.device, dtype), context.device)
        context.passes += 1
        found = compare_outputs(first, again.outputs, tolerance)
        apart = [str(difference) for difference in found if not difference.is_close]
    except Exception as error:
        found, apart = [], [error_text(error)]
    context.figures["behaviour"] |= {"repeat": [d.to_dict() for d in found], "differs": bool(apart)}
    if apart:
        yield Finding(
            code="not-repeatable",
            severity="error",
            message="the same input gives a different result on a second run in eval mode: " + listed(apart, 3),
        )


def _constant(
    first: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor] | None, inputs: Inputs, context: Context
) -> Iterator[Finding]:
    """Outputs that say the same whatever is asked.

    One value throughout is an error, but for zeros and ones, which may be a ReLU or a sigmoid at its end, and for
    a head that is zero.  Two inputs with the same outputs are only a warning: in a deep model that was never trained,
    rounding removes their differences, and it may do so where outputs saturate.
    """
    floating = {path: t for path, t in first.items() if t.is_floating_point() and t.numel() > 1}
    if not floating:
        return
    saturated = all(bool(((t == 0) | (t == 1)).all()) for t in floating.values())
    severity = "warning" if saturated or context.zeroed else "error"
    because = f"; {listed(context.zeroed, 2)} is zero throughout" if context.zeroed else ""
    if all(bool((t == t.reshape(-1)[0]).all()) for t in floating.values()):
        values = [f"{path or 'the output'} is {float(t.reshape(-1)[0]):.6g}" for path, t in floating.items()]
        yield Finding(
            code="constant-output",
            severity=severity,  # type: ignore[arg-type]
            message=f"every element of an output has the same value: {listed(values, 3)}{because}",
        )
    elif other is not None and _are_alike(first, other, inputs, floating):
        yield Finding(
            code="constant-output",
            severity="warning",
            message=f"two different inputs give the same outputs, bit for bit{because}",
        )


def _are_alike(
    first: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], inputs: Inputs, floating: Collection[str]
) -> bool:
    """Whether two different inputs are known to give the same in each of these outputs."""
    rows = inputs.rows
    if rows is None or inputs.is_list or not inputs.rows_differ:
        return False
    batch, size = (other, 2) if rows == 1 else (first, rows)
    pairs = [batch[p] for p in floating if p in batch and batch[p].dim() and batch[p].shape[0] == size]
    return bool(pairs) and len(pairs) == len(floating) and all(torch.equal(t[0], t[1]) for t in pairs)


def _not_compared(inputs: Inputs) -> str:
    if inputs.is_list:
        return (
            "a detector's outputs are chosen by rank and threshold, so different rounding may choose others: "
            "they were compared with a second run, not with those beside another image"
        )
    if inputs.rows is None:
        return (
            "the inputs' first dimensions differ, so they are not a batch; outputs were only compared with a second run"
        )
    return "no output has a row for each row of the input; outputs were only compared with a second run"


def _note(context: Context, what: str) -> str:
    return f"{what} ({context.passes} forward passes)"
