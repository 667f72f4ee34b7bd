"""Two runs of one model, compared: with another checkpoint, or on another device.

Outputs are compared in full; if they differ, samples of each leaf module's output show where the two diverge.  The
module is the same one, filled twice: there is one model in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.report import Finding, Severity, listed
from ckptkit.rewrite.rename import StripModule
from ckptkit.verifier.context import Context, floating_dtype
from ckptkit.verifier.fill import become
from ckptkit.verifier.fit import check_fit
from ckptkit.verifier.foreign import error_text, foreign
from ckptkit.verifier.forward import Pass, measured_noise, model_dtype, run
from ckptkit.verifier.load import check_load
from ckptkit.verifier.measure import measure_fit
from ckptkit.verifier.outputs import OutputDifference, OutputTolerance, Parting, Trace, compare_outputs
from ckptkit.verifier.references.without_values import without_values

__all__ = ["check_against", "check_devices", "without_wrappers"]


def without_wrappers(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint | None:
    """The checkpoint without its wrapper prefixes, where more of the model's tensors are in it then."""
    try:
        stripped = StripModule()(checkpoint)
    except RewriteError:
        return None  # two names would become one
    if list(stripped.state_dict.everything) == list(checkpoint.state_dict.everything):
        return None
    better = measure_fit(model, stripped.state_dict).tensors > measure_fit(model, checkpoint.state_dict).tensors
    return stripped if better else None


def check_against(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether another checkpoint of the same model gives the same outputs."""
    other = context.against
    if other is None or context.first is None or context.trace is None or context.inputs is None:
        return
    path = other.origin.path
    _emptied(model, context)
    stripped = without_wrappers(other, model)
    if stripped is not None:
        other = stripped
        yield wrapper_told(path)
    theirs = dataclasses.replace(
        context, given=(), fit=None, loaded=False, failed=False, notes={}, figures={}, seconds={}, steps=[]
    )
    grave = [finding for finding in check_fit(other, model, theirs) if finding.severity == "error"]
    if not grave:
        grave = [finding for finding in check_load(other, model, theirs) if finding.severity == "error"]
    if grave:
        yield Finding(
            code="against-not-loaded",
            severity="error",
            message=f"{path} does not fit the same model, so no outputs were compared: "
            + "; ".join(finding.message for finding in grave[:3]),
            fix=grave[0].fix,
        )
        return
    tolerance = context.tolerance((checkpoint, other), context.first)
    try:
        with foreign():
            model.to(context.device)
        made, parting = _followed(model, context, context.device, context.trace, tolerance)
    except Exception as error:
        yield Finding(
            code="forward-failed",
            severity="error",
            message=f"the forward pass with {path} on {context.device} failed: {error_text(error)}",
        )
        return
    tolerance = context.tolerance((checkpoint, other), context.first, made.outputs)
    found = compare_outputs(context.first, made.outputs, tolerance, _noise(model, context, context.device, made))
    context.figures["against"] = {"path": path, **_figures(found, tolerance, parting)}
    yield _told("against", f"outputs of {path}", found, tolerance, parting, "error")


def _emptied(model: nn.Module, context: Context) -> None:
    """Restore the model's state before it was filled: nothing of the first checkpoint may remain."""
    torch.manual_seed(context.options.seed)
    become(model, without_values(context.reference.make))
    if context.options.dtype is not None:
        with foreign(f"the model cannot be cast to {context.options.dtype}"):
            model.to(floating_dtype(context.options.dtype))


def wrapper_told(path: str) -> Finding:
    """That a checkpoint is compared under other names than its own."""
    return Finding(
        code="against-unwrapped",
        severity="info",
        message=f"the names in {path} have a wrapper's prefix; they are compared without it, as --strip-module does",
    )


def check_devices(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether each further device gives the same outputs as the first."""
    if context.first is None or context.trace is None or context.inputs is None:
        return
    context.figures["devices"] = []
    for device in context.devices[1:]:
        tolerance = context.tolerance((checkpoint,), context.first)
        try:
            with foreign():
                model.to(device)
            made, parting = _followed(model, context, device, context.trace, tolerance)
        except Exception as error:
            yield Finding(
                code="forward-failed",
                severity="error",
                message=f"the forward pass on {device} failed, but did not fail on {context.device}: "
                f"{error_text(error)}",
            )
            continue
        found = compare_outputs(context.first, made.outputs, tolerance, _noise(model, context, device, made))
        figures = {"device": str(device), "seconds": round(made.seconds, 6), **_figures(found, tolerance, parting)}
        context.figures["devices"].append(figures)
        # Boxes are chosen by rank and threshold: another device's rounding may choose others.
        severity: Severity = "warning" if context.inputs.is_list else "error"
        yield _told("device", f"outputs on {device}", found, tolerance, parting, severity, f" on {context.device}")
    with foreign(f"the model cannot be moved back to {context.device}"):
        model.to(context.device)


def _followed(
    model: nn.Module, context: Context, device: torch.device, trace: Trace, tolerance: OutputTolerance
) -> tuple[Pass, Parting]:
    """One pass on the first inputs, and where it parts from the one recorded."""
    if context.inputs is None:
        raise ValueError("there are no inputs to run on")
    batch = context.inputs.batch(device, floating_dtype(model_dtype(model)))
    with trace.comparing(model, tolerance) as parting:
        made = run(model, batch, device)
    return made, parting()


def _noise(
    model: nn.Module, context: Context, device: torch.device, made: Pass
) -> Callable[[], Mapping[str, float]] | None:
    """What measures the outputs' noise; ``None``: an ``atol`` was asked for, which is in its place."""
    return None if context.options.atol is not None else lambda: measured_noise(model, context, device, made.outputs)


def _figures(found: Sequence[OutputDifference], tolerance: OutputTolerance, parting: Parting) -> dict[str, Any]:
    return {
        "tolerance": tolerance.to_dict(),
        "outputs": [difference.to_dict() for difference in found],
        "first_different_module": parting.differs,
        "first_parting_module": parting.parts,
        "calls_compared": parting.calls,
        "all_calls_compared": parting.is_whole,
    }


_CODES = {
    "against": ("against-equal", "against-close", "against-differs"),
    "device": ("device-equal", "device-close", "device-differs"),
}
"""The comparison, and the findings' codes: bit-equal, within the tolerance, beyond it."""


def _told(
    prefix: str,
    what: str,
    found: Sequence[OutputDifference],
    tolerance: OutputTolerance,
    parting: Parting,
    severity: Severity,
    those: str = "",
) -> Finding:
    """What comparing came to: bit-equal, close, or different."""
    equal, close, differs = _CODES[prefix]
    if all(difference.is_equal for difference in found):
        return Finding(code=equal, severity="info", message=f"{what} and those{those or ' of this one'} are bit-equal")
    apart = [difference for difference in found if not difference.is_close]
    worst = sorted(apart or [d for d in found if not d.is_equal], key=lambda d: -d.max_rel)
    told = listed([str(difference) for difference in worst], 3)
    allowed = f"atol {tolerance.atol:.2g}, rtol {tolerance.rtol:.2g}"
    if not apart:
        first = "" if parting.differs is None else f"; the first module that is not bit-equal is `{parting.differs}`"
        return Finding(
            code=close,
            severity="info",
            message=f"{what} agree within {allowed}: {told}{first}",
        )
    if parting.parts is not None:
        where = f"; they diverge at `{parting.parts}`"
        if parting.differs not in (None, parting.parts):
            where += f", after small differences from `{parting.differs}` on"
    else:
        where = "" if parting.differs is None else f"; the first module that is not bit-equal is `{parting.differs}`"
    return Finding(code=differs, severity=severity, message=f"{what} are beyond {allowed}: {told}{where}")
