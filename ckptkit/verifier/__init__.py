"""Verification: does a checkpoint fit a reference model, load into it, and compute?

Imports torch.  Adding a check is a function `Check` in a module of its own and one line in
`CHECKS`; they run in that order, each sees what the earlier ones left in the `Context`.

The reference is built by a library's or the user's own code; nothing of the checkpoint is ever executed, but
where `ckptkit.verifier.foreign` is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ckptkit.architectures import identify
from ckptkit.arguments import several, shapes, tolerance
from ckptkit.checkpoint import Checkpoint
from ckptkit.conversion.options import unselected_weights
from ckptkit.errors import SectionError, VerifyError
from ckptkit.normalize.parts import part_findings
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
    from ckptkit.documents import InputsDocument, VerifyCheckDocument, VerifyDetails

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
    *,
    model: ModelLike | None = None,
    model_args: Mapping[str, object] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    input_shapes: Sequence[Sequence[int]] = (),
    input: str | None = None,  # noqa: A002 - the option's name
    seed: int = 0,
    allow_missing: str | Sequence[str] = (),
    allow_unexpected: str | Sequence[str] = (),
    forward: bool = True,
    against: Checkpoint | None = None,
    golden: str | None = None,
    write_golden: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    force: bool = False,
    unsafe_load: bool = False,
    strip_module: bool = False,
    reading: Sequence[str] = (),
) -> Report:
    """Load a checkpoint's weights into a reference model and examine what it computes.

    Args:
        checkpoint: the checkpoint; the file it lies in must still be open.
        model: ``"torchvision:NAME"``, ``"package.module:factory"``, ``"path/to/file.py:factory"``,
            a module, or a callable that returns one.  A module given is copied, not changed.  ``None``: that of
            the golden, or the pickled model itself where ``unsafe_load`` is asked for.
        model_args: keyword arguments of the factory; strings are read as Python literals where they are.
        device: where the forward check runs: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; of several,
            separated by commas, each is compared with the first.
        dtype: floating point type the model and its inputs are cast to, such as ``"float16"``.
        input_shapes: one for each input; empty: what the reference implies.
        input: file of the inputs' values, in any container.
        seed: of the inputs, and of whatever the factory draws.
        allow_missing: patterns (``fnmatch``) of names the checkpoint may lack.
        allow_unexpected: patterns of names the reference may lack.
        forward: whether to run the forward check.
        against: another checkpoint of the same model, whose outputs must agree; its file must be open.
        golden: file of outputs recorded earlier, which these must agree with.
        write_golden: file to record them in.
        atol: how far outputs may be apart, whatever their size; default: several times the noise that is measured;
            see `ckptkit.verifier.outputs.OutputTolerance`.
        rtol: the same, as a share of their largest magnitude.
        force: whether ``write_golden`` may replace a file.
        unsafe_load: whether to run the pickled model itself, which imports and runs what the file names.
        strip_module: whether wrappers' prefixes were taken off, as the commands that are told must, too.
        reading: other options by which the file was read, likewise.

    Returns:
        The report; its details are the JSON document's figures.

    Raises:
        VerifyError: the reference cannot be built, or a check cannot be run.
        SectionError: the file holds no state_dict, or several and none was chosen.
        MissingDependencyError: torchvision is needed and not installed.
        DestinationExistsError: ``write_golden`` exists and ``force`` is false.
        CkptkitError: the weights, inputs or golden cannot be read.
    """
    _require_weights(checkpoint)
    if input is not None and input_shapes:
        raise VerifyError("--input and --input-shape: the inputs are read from a file, or made; give one of them")
    needing = {"--against": against, "--golden": golden, "--write-golden": write_golden}
    _require_forward(needing, given=forward)
    if unsafe_load and model is not None:
        raise VerifyError("--model and --unsafe-load: a reference model is run, or the pickled one; give one of them")
    atol, rtol = tolerance("--atol", atol), tolerance("--rtol", rtol)
    input_shapes = shapes("--input-shape", input_shapes)
    if not -(1 << 63) <= seed < 1 << 64:
        raise VerifyError(f"--seed {seed:.6g}: torch takes whole numbers from -2**63 to 2**64 - 1")
    asked = _asked(
        {
            "--device": device,
            "--dtype": dtype,
            "--input": input,
            "--seed": seed,
            "--against": None if against is None else against.origin.path,
            "--golden": golden,
            "--write-golden": write_golden,
            "--atol": atol,
            "--rtol": rtol,
        },
        {
            "--input-shape": [",".join(map(str, shape)) for shape in input_shapes],
            "--allow-missing": several(allow_missing),
            "--allow-unexpected": several(allow_unexpected),
        },
        {"--force": force, "--no-forward": not forward},
    )
    devices = pick_devices(device)
    cast = None if dtype is None else floating_dtype(dtype)
    recorded = None if golden is None else _golden(golden, input_shapes, input, seed)
    if write_golden is not None:
        require_writable(write_golden, force=force)
    cuda = [where.index or 0 for where in devices if where.type == "cuda"]
    with foreign(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        started = time.perf_counter()
        built, reference = _model(checkpoint, model, model_args, recorded, unsafe_load=unsafe_load)
        if cast is not None:
            with foreign(f"the model cannot be cast to {dtype}"):
                built.to(cast)
        context = Context(
            reference=reference,
            devices=devices,
            dtype=dtype,
            seed=seed,
            inputs=_inputs(reference, input_shapes, input, seed, recorded) if forward else None,
            atol=atol,
            rtol=rtol,
            allow_missing=several(allow_missing),
            allow_unexpected=several(allow_unexpected),
            against=against,
            golden=recorded,
            write_golden=write_golden,
            force=force,
            given=_given(checkpoint, strip_module),
            reading=tuple(reading),
            asked=asked,
        )
        seconds = time.perf_counter() - started
        context.seconds["build"] = seconds
        context.steps.append({"name": "build", "seconds": round(seconds, 6), "peak_memory_nbytes": peak_memory()})
        told = [*part_findings(checkpoint), *(() if against is None else part_findings(against))]
        if unsafe_load:
            told += unsafe_findings(checkpoint, built)
        elif model is None and recorded is None:
            told.append(_identified(reference))
        stripped = without_wrappers(checkpoint, built) if against is not None else None
        if stripped is not None:
            told.append(wrapper_told(checkpoint.origin.path))
        context.failed = worst(told) == "error"
        checks, found = _run(stripped or checkpoint, built, context)
        findings = (*(VerifyFinding.of(finding, None) for finding in told), *found)
        return Report(findings=findings, details=_details(checkpoint, context, checks, model_dtype(built)))


def _asked(
    values: Mapping[str, object], repeated: Mapping[str, Sequence[str]], flags: Mapping[str, bool]
) -> tuple[str, ...]:
    """The options of this verification as they are typed: with a value (``None``: not given), repeated, and alone."""
    usual = {"--device": "auto", "--seed": 0}
    given = [(name, str(value)) for name, value in values.items() if value not in (None, usual.get(name))]
    given += [(name, value) for name, all_values in repeated.items() for value in all_values]
    return (*(part for pair in given for part in pair), *(name for name, is_set in flags.items() if is_set))


def _run(
    checkpoint: Checkpoint, model: nn.Module, context: Context
) -> tuple[list[VerifyCheckDocument], list[VerifyFinding]]:
    """Run every check: each one's line in the document, and what they find."""
    lines: list[VerifyCheckDocument] = []
    findings: list[VerifyFinding] = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        found: list[VerifyFinding] = []
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
        raise SectionError(f"{path}: several sections hold weights; choose one with --section: {listed(weights, 20)}")
    raise SectionError(f"{path}: holds no state_dict to verify (it is of kind {checkpoint.origin.kind!r})")


def _given(checkpoint: Checkpoint, strip_module: bool) -> tuple[str, ...]:
    """The options by which these weights are taken from the file, given or needed: it may hold others."""
    path = checkpoint.origin.state_path
    is_named = "--section" in checkpoint.origin.options or bool(unselected_weights(checkpoint))
    section = ("--section", path) if path and is_named else ()
    return (*section, *["--strip-module"] * strip_module)


def _identified(reference: Reference) -> Finding:
    given = ", ".join(f"{name}={value}" for name, value in reference.args.items())
    return Finding(
        code="identified",
        severity="info",
        message=f"no model was named; by names and shapes it is {reference.label}"
        + (f" with {given}" if given else ""),
    )


def _require_forward(needing: Mapping[str, object], *, given: bool) -> None:
    """What is asked for cannot be had when nothing is computed."""
    useless = [name for name, value in needing.items() if value is not None]
    if useless and not given:
        raise VerifyError(f"{', '.join(useless)}: with --no-forward nothing is computed; leave one of them out")


def _golden(path: str, shapes: Sequence[Sequence[int]], input_path: str | None, seed: int) -> Golden:
    golden = read_golden(path)
    if shapes or input_path is not None or seed not in (0, golden.inputs.seed):
        raise VerifyError(f"{path}: a golden brings its own inputs; leave --input, --input-shape and --seed out")
    return golden


def _model(
    checkpoint: Checkpoint,
    model: ModelLike | None,
    args: Mapping[str, object] | None,
    golden: Golden | None,
    *,
    unsafe_load: bool,
) -> tuple[nn.Module, Reference]:
    """The model that is filled: the one named, the golden's, or the pickled one itself."""
    if unsafe_load:
        return load_pickled(checkpoint)
    if model is None and golden is not None:
        model = golden.model()
    if model is None:
        path = checkpoint.origin.path
        likely = identify(checkpoint.state_dict)
        if likely and likely[0].exact and not likely[0].prefix:
            built, reference = build(likely[0].reference, {**likely[0].args, **(args or {})})
            return built, reference
        if likely and likely[0].exact:
            raise VerifyError(
                f"{path}: looks like {likely[0].label}; take the prefix off with --strip-module where wrappers left "
                "it, else with convert --strip-prefix, or give --model REF"
            )
        if checkpoint.module is not None:
            names = len(checkpoint.globals)
            raise VerifyError(
                f"{path}: holds a pickled model; give --model REF to verify its weights in a reference model, or "
                f"--unsafe-load to run the pickled model itself, which imports the names it holds ({names})"
            )
        closest = f" (closest: {', '.join(found.label for found in likely)})" if likely else ""
        raise VerifyError(
            f"{path}: no known architecture has these names and shapes{closest}; give --model REF, such as "
            "torchvision:resnet18"
        )
    if golden is not None and not args:
        args = golden.args
    built, reference = build(model, args or {})
    if golden is not None:
        golden.require_model(reference.spec, reference.args)
    return built, reference


def _inputs(
    reference: Reference, shapes: Sequence[Sequence[int]], path: str | None, seed: int, golden: Golden | None
) -> Inputs:
    if golden is not None:
        return golden.inputs
    if path is not None:
        return read_inputs(path, reference.inputs)
    return drawn_inputs(wanted_inputs(reference.inputs, shapes, reference.label), seed)


def _details(checkpoint: Checkpoint, context: Context, checks: list[VerifyCheckDocument], dtype: str) -> VerifyDetails:
    fit = context.fit
    if fit is None:
        raise VerifyError("no check looked at how the checkpoint fits; CHECKS must begin with one that does")
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
