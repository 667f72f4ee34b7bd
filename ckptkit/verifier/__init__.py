"""Verification: does a checkpoint fit a reference model, load into it, and compute?

Imports torch.  Adding a check is a function `Check` in a module of its own and one line in
`CHECKS`; they run in that order, each sees what the earlier ones left in the `Context`.

The reference is built by the user's own code; nothing of the checkpoint is ever executed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import SectionError, VerifyError
from ckptkit.report import Finding, Report
from ckptkit.verifier.context import Check, Context, floating_dtype, pick_device
from ckptkit.verifier.fit import check_fit
from ckptkit.verifier.forward import check_forward, input_shapes, model_dtype
from ckptkit.verifier.load import check_load
from ckptkit.verifier.measure import Fit
from ckptkit.verifier.references import ModelLike, build

__all__ = ["CHECKS", "Check", "Context", "ModelLike", "verify"]

CHECKS: tuple[Check, ...] = (check_fit, check_load, check_forward)
"""Every check, in the order they run."""


def verify(
    checkpoint: Checkpoint,
    *,
    model: ModelLike,
    model_args: Mapping[str, object] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    input_shapes: Sequence[Sequence[int]] = (),
    seed: int = 0,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    forward: bool = True,
) -> Report:
    """Load a checkpoint's weights into a reference model and run a forward check.

    Args:
        checkpoint: the checkpoint; the file it lies in must still be open.
        model: ``"torchvision:NAME"``, ``"package.module:factory"``, ``"path/to/file.py:factory"``,
            a module, or a callable that returns one.  A module given is copied, not changed.
        model_args: keyword arguments of the factory; strings are read as Python literals where they are.
        device: where the forward check runs: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        dtype: floating point type the model and its inputs are cast to, such as ``"float16"``.
        input_shapes: one for each positional input; empty: what the reference implies.
        seed: of the inputs, and of whatever the factory draws.
        allow_missing: patterns (``fnmatch``) of names the checkpoint may lack.
        allow_unexpected: patterns of names the reference may lack.
        forward: whether to run the forward check.

    Returns:
        The report; its details are the JSON document's figures.

    Raises:
        VerifyError: the reference cannot be built, or a check cannot be run.
        SectionError: the file holds no state_dict, or several and none was chosen.
        MissingDependencyError: torchvision is needed and not installed.
        CkptkitError: the weights cannot be read.
    """
    _require_weights(checkpoint)
    where = pick_device(device)
    cast = None if dtype is None else floating_dtype(dtype)
    with torch.random.fork_rng(devices=[where.index or 0] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        started = time.perf_counter()
        module, reference = build(model, model_args or {})
        if cast is not None:
            module.to(cast)
        context = Context(
            reference=reference,
            device=where,
            dtype=dtype,
            input_shapes=tuple(tuple(shape) for shape in input_shapes),
            seed=seed,
            allow_missing=tuple(allow_missing),
            allow_unexpected=tuple(allow_unexpected),
            wants_forward=forward,
        )
        context.seconds["build"] = time.perf_counter() - started
        _require_inputs(context)
        findings: list[Finding] = []
        for check in CHECKS:
            for finding in check(checkpoint, module, context):
                findings.append(finding)
                context.failed = context.failed or finding.severity == "error"
    return Report(findings=tuple(findings), details=_details(checkpoint, context, model_dtype(module)))


def _require_weights(checkpoint: Checkpoint) -> None:
    if len(checkpoint.state_dict):
        return
    path = checkpoint.origin.path
    weights = [section.path for section in checkpoint.sections if section.kind in ("state_dict", "whole_model")]
    if len(weights) > 1:
        raise SectionError(f"{path}: several sections hold weights; choose one with --section: {', '.join(weights)}")
    raise SectionError(f"{path}: holds no state_dict to verify (it is of kind {checkpoint.origin.kind!r})")


def _require_inputs(context: Context) -> None:
    """Say before any work is done that the forward check cannot be run."""
    if context.wants_forward:
        input_shapes(context)


def _details(checkpoint: Checkpoint, context: Context, dtype: str) -> dict[str, Any]:
    fit = context.fit
    if fit is None:
        raise VerifyError("no check looked at how the checkpoint fits; CHECKS must begin with one that does")
    return {
        "path": checkpoint.origin.path,
        "reference": context.reference.label,
        "device": str(context.device),
        "dtype": dtype,
        **_fit_details(fit),
        "loaded": context.loaded,
        "outputs": context.outputs,
        "seconds": {part: round(seconds, 6) for part, seconds in context.seconds.items()},
        "peak_memory_nbytes": _peak_memory(),
        "versions": _versions(),
    }


def _fit_details(fit: Fit) -> dict[str, Any]:
    return {
        "coverage": {"tensors": fit.tensors, "of": fit.of, "parameters_share": fit.parameters_share},
        "missing_keys": list(fit.missing),
        "unexpected_keys": list(fit.unexpected),
        "shape_mismatches": [
            {"name": m.name, "checkpoint": list(m.checkpoint), "reference": list(m.reference)} for m in fit.mismatches
        ],
    }


def _peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere


def _versions() -> dict[str, str]:
    torchvision = sys.modules.get("torchvision")
    versions = {"torch": str(torch.__version__)}
    if torchvision is not None:
        versions["torchvision"] = str(torchvision.__version__)
    return versions
