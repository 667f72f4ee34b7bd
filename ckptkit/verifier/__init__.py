"""Verification: does a checkpoint fit a reference model, load into it, and compute?

Imports torch.  A new check is a function `Check` in a module and one line in `CHECKS`; checks run in that order, and
each sees what the earlier ones left in the `Context`.

The reference is built by a library's or the user's own code; nothing from the checkpoint is ever executed unless
`ckptkit.verifier.foreign` is asked for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from ckptkit.architectures import identify
from ckptkit.bytesource import Source, pace
from ckptkit.checkpoint import Checkpoint
from ckptkit.conversion.options import unselected_weights
from ckptkit.errors import SectionError, VerifyError
from ckptkit.fixes import combined_fix
from ckptkit.normalize.parts import part_findings, way_findings
from ckptkit.options import VerifyOptions
from ckptkit.report import Finding, Report, listed, worst
from ckptkit.verifier.against import check_against, check_devices, without_wrappers, wrapper_told
from ckptkit.verifier.behaviour import check_behaviour
from ckptkit.verifier.context import Check, Context, VerifyFinding, floating_dtype, peak_memory, pick_devices
from ckptkit.verifier.fit import check_fit
from ckptkit.verifier.foreign import foreign
from ckptkit.verifier.forward import check_forward, model_dtype
from ckptkit.verifier.golden import Golden, read_golden
from ckptkit.verifier.golden_check import check_golden, require_writable, versions
from ckptkit.verifier.inputs import Inputs, drawn_inputs, read_inputs, wanted_inputs
from ckptkit.verifier.load import check_load, check_weights
from ckptkit.verifier.pickled import load_pickled, unsafe_findings
from ckptkit.verifier.references import ModelLike, Reference, build

if TYPE_CHECKING:
    from ckptkit.documents import InputsDocument, VerifyCheckDocument, VerifyDetails, VerifyDocument
    from ckptkit.report import CombinedFix

__all__ = ["CHECKS", "Check", "Context", "ModelLike", "verify"]

CHECKS: tuple[Check, ...] = (
    check_fit,
    check_load,
    check_weights,
    check_forward,
    check_behaviour,
    check_devices,
    check_golden,
    check_against,
)
"""Every check, in the order they run.  The last fills the model with other weights."""


def verify(
    checkpoint: Checkpoint,
    options: VerifyOptions,
    *,
    file: Source | None = None,
    against: Checkpoint | None = None,
) -> Report[VerifyDocument]:
    """Load a checkpoint's weights into a reference model and examine what it computes.

    Args:
        checkpoint: the checkpoint, without wrapper prefixes if ``strip_module`` asks for that; its file must still be
            open.
        options: what `ckptkit.verify` was asked for.  A module given is copied, not changed.
        file: that file, where advice may come of its other sections.
        against: the checkpoint that ``against`` names, whose outputs must agree; its file must be open.

    Returns:
        The report; its details are the JSON document's figures.

    Raises:
        VerifyError: the reference cannot be built, or a check cannot be run.
        SectionError: the file contains no state_dict, or several and none was chosen.
        MissingDependencyError: torchvision is needed and not installed.
        DestinationExistsError: ``write_golden`` exists and ``force`` is false.
        CkptkitError: the weights, inputs or golden cannot be read.
    """
    _require_weights(checkpoint)
    devices = pick_devices(options.device)
    cast = None if options.dtype is None else floating_dtype(options.dtype)
    recorded = None if options.golden is None else _golden(options.golden, options)
    if options.write_golden is not None:
        require_writable(options.write_golden, force=options.force)
    cuda = [where.index or 0 for where in devices if where.type == "cuda"]
    pace.enter("building the model")
    with foreign(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(options.seed)
        started = time.perf_counter()
        built, reference = _model(checkpoint, options, recorded)
        if cast is not None:
            with foreign(f"the model cannot be cast to {options.dtype}"):
                built.to(cast)
        context = Context(
            reference=reference,
            devices=devices,
            options=options,
            inputs=_inputs(reference, options, recorded) if options.forward else None,
            against=against,
            golden=recorded,
            file=file,
            given=_given(checkpoint, options.strip_module),
        )
        seconds = time.perf_counter() - started
        context.seconds["build"] = seconds
        context.steps.append({"name": "build", "seconds": round(seconds, 6), "peak_memory_nbytes": peak_memory()})
        told = [
            *part_findings(checkpoint),
            *way_findings(checkpoint),
            *(() if against is None else part_findings(against)),
        ]
        if options.unsafe_load:
            told += unsafe_findings(checkpoint, built)
        elif options.model is None and recorded is None:
            told.append(_identified(reference))
        stripped = without_wrappers(checkpoint, built) if against is not None else None
        if stripped is not None:
            told.append(wrapper_told(checkpoint.origin.path))
        context.failed = worst(told) == "error"
        checks, found = _run(stripped or checkpoint, built, context)
        findings = (*(VerifyFinding.of(finding, None) for finding in told), *found)
        details = _details(checkpoint, context, checks, model_dtype(built), combined_fix(findings))
        return Report(findings=findings, details=details)


def _run(
    checkpoint: Checkpoint, model: nn.Module, context: Context
) -> tuple[list[VerifyCheckDocument], list[VerifyFinding]]:
    """Run every check: each one's line in the document, and what they find."""
    lines: list[VerifyCheckDocument] = []
    findings: list[VerifyFinding] = []
    for number, check in enumerate(CHECKS, 1):
        name = check.__name__.removeprefix("check_")
        found: list[VerifyFinding] = []
        nbytes = sum(entry.nbytes for entry in checkpoint.state_dict.values()) if check is check_load else 0
        pace.enter(f"check {number} of {len(CHECKS)}: {name}", nbytes)
        with context.step(name):
            for finding in check(checkpoint, model, context):
                found.append(VerifyFinding.of(finding, name))
                context.failed = context.failed or finding.severity == "error"
        findings += found
        was_run = bool(found) or name in context.notes or name in context.figures
        was_run = was_run or (name in ("load", "weights") and context.loaded)
        lines.append(
            {
                "name": name,
                "run": was_run,
                "severity": worst(found),
                "codes": [finding.code for finding in found],
                "note": context.notes.get(name),
                "figures": context.figures.get(name),
            }
        )
    return lines, findings


def _require_weights(checkpoint: Checkpoint) -> None:
    if len(checkpoint.state_dict):
        return
    path = checkpoint.origin.path
    if weights := [section.path for section in checkpoint.sections if section.is_weights]:
        raise SectionError(
            f"{path}: several sections contain weights; choose one with --section: {listed(weights, 20)}",
            path=path,
            names=weights,
        )
    raise SectionError(f"{path}: contains no state_dict to verify (its kind is {checkpoint.origin.kind!r})", path=path)


def _given(checkpoint: Checkpoint, strip_module: bool) -> tuple[str, ...]:
    """The options, given or needed, that select these weights in the file: it may contain others."""
    path = checkpoint.origin.state_path
    is_named = "--section" in checkpoint.origin.options or bool(unselected_weights(checkpoint))
    section = ("--section", path) if path and is_named else ()
    return (*section, *["--strip-module"] * strip_module)


def _identified(reference: Reference) -> Finding:
    given = ", ".join(f"{name}={value}" for name, value in reference.args.items())
    return Finding(
        code="identified",
        severity="info",
        message=f"no model was named; its names and shapes are those of {reference.label}"
        + (f" with {given}" if given else ""),
    )


def _golden(path: str, options: VerifyOptions) -> Golden:
    golden = read_golden(path)
    if options.input_shapes or options.input is not None or options.seed not in (0, golden.inputs.seed):
        raise VerifyError(
            f"{path}: a golden file contains its own inputs; omit --input, --input-shape and --seed", path=path
        )
    return golden


def _model(checkpoint: Checkpoint, options: VerifyOptions, golden: Golden | None) -> tuple[nn.Module, Reference]:
    """The model that is filled: the one named, the golden's, or the pickled one itself."""
    if options.unsafe_load:
        return load_pickled(checkpoint)
    model: ModelLike | None = options.model
    args = options.model_args
    if model is None and golden is not None:
        model = golden.model()
    if model is None:
        path = checkpoint.origin.path
        likely = identify(checkpoint.state_dict)
        if likely and likely[0].exact and not likely[0].prefix:
            built, reference = build(likely[0].reference, {**likely[0].args, **args})
            return built, reference
        if likely and likely[0].exact:
            raise VerifyError(
                f"{path}: looks like {likely[0].label}; remove the prefix with --strip-module if a wrapper left it, "
                "otherwise with convert --strip-prefix, or give --model REF",
                path=path,
            )
        if checkpoint.module is not None:
            names = len(checkpoint.globals)
            raise VerifyError(
                f"{path}: contains a pickled model; give --model REF to verify its weights in a reference model, "
                f"or --unsafe-load to run the pickled model itself, which imports the names in it ({names})",
                path=path,
            )
        closest = f" (closest: {', '.join(found.label for found in likely)})" if likely else ""
        raise VerifyError(
            f"{path}: no known architecture has these names and shapes{closest}; give --model REF, such as "
            "torchvision:resnet18",
            path=path,
        )
    if golden is not None and not args:
        args = golden.args
    built, reference = build(model, args)
    if golden is not None:
        golden.require_model(reference.spec, reference.args)
    return built, reference


def _inputs(reference: Reference, options: VerifyOptions, golden: Golden | None) -> Inputs:
    if golden is not None:
        return golden.inputs
    if options.input is not None:
        return read_inputs(options.input, reference.inputs)
    return drawn_inputs(wanted_inputs(reference.inputs, options.input_shapes, reference.label), options.seed)


def _details(
    checkpoint: Checkpoint,
    context: Context,
    checks: list[VerifyCheckDocument],
    dtype: str,
    combined: CombinedFix | None,
) -> VerifyDetails:
    fit = context.fit
    if fit is None:
        raise VerifyError("no check tested how the checkpoint fits; CHECKS must begin with one that does")
    return {
        "path": checkpoint.origin.path,
        "reference": context.reference.label,
        "device": str(context.device),
        "devices": [str(device) for device in context.devices],
        "dtype": dtype,
        "coverage": {"tensors": fit.tensors, "of": fit.of, "parameters_share": fit.parameters_share},
        "missing_keys": list(fit.missing),
        "unexpected_keys": list(fit.unexpected),
        "shape_mismatches": [
            {"name": m.name, "checkpoint": list(m.checkpoint), "reference": list(m.reference)} for m in fit.mismatches
        ],
        "loaded": context.loaded,
        "inputs": None if context.inputs is None else _input_details(context.inputs),
        "outputs": context.outputs,
        "passes": context.passes,
        "checks": checks,
        "seconds": {part: round(seconds, 6) for part, seconds in context.seconds.items()},
        "steps": context.steps,
        "peak_memory_nbytes": peak_memory(),
        "versions": versions(),
        "combined_fix": combined,
    }


def _input_details(inputs: Inputs) -> InputsDocument:
    return {
        "seed": inputs.seed,
        "path": inputs.path,
        "tensors": [
            {"name": each.name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for each, value in zip(inputs.inputs, inputs.values, strict=True)
        ],
    }
