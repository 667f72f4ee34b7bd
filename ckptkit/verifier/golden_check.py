"""The golden check: outputs checked against a golden file, and golden files written; see `ckptkit.verifier.golden`."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors.torch import save
from torch import nn

from ckptkit import formats
from ckptkit.checkpoint import Checkpoint
from ckptkit.digests import DigestLine, content_digest, tensor_digest, unwrapped_names
from ckptkit.errors import CkptkitError, DestinationExistsError, FileAccessError, VerifyError
from ckptkit.extras import __version__
from ckptkit.formats.safetensors import NAME
from ckptkit.plan import LiteralBytes, Plan
from ckptkit.report import Finding, count_of, listed
from ckptkit.transfer.writing import write_atomically
from ckptkit.verifier.context import Context
from ckptkit.verifier.forward import measured_noise, model_dtype
from ckptkit.verifier.golden import KEY, VERSION, Golden, Recorded, read_golden, told_args
from ckptkit.verifier.load import sources_of
from ckptkit.verifier.outputs import OutputDifference, OutputTolerance, compared, dtype_name, tolerance_of

__all__ = ["check_golden", "require_writable", "versions"]

_WHOLE_NBYTES = 1 << 20
"""Bytes of an output that is kept whole; of larger ones about so many are kept."""


def require_writable(path: str, *, force: bool) -> None:
    """Say before any work is done that a golden cannot be written there.

    Raises:
        DestinationExistsError: it exists and is not to be replaced, or is a checkpoint.
        FileAccessError: its folder is not there.
    """
    if os.path.lexists(path) and not force:
        raise DestinationExistsError(f"{path}: already exists; --force replaces it", path=path)
    if os.path.isfile(path) and not _is_replaceable(path):
        raise DestinationExistsError(
            f"{path}: is a checkpoint; --force replaces only a golden file; give another name", path=path
        )
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise FileAccessError(
            f"{path}: a golden file cannot be written there: expected a file in an existing folder", path=path
        )


def _is_replaceable(path: str) -> bool:
    """Whether a file is a golden file, or no checkpoint at all."""
    if not formats.is_checkpoint(path):
        return True
    try:
        checkpoint, file = formats.read(path)
    except CkptkitError:  # damaged
        return False
    file.close()
    return KEY in checkpoint.metadata


def check_golden(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether weights and outputs are those of a golden file; and writing one on request."""
    if context.golden is not None and context.golden.weights and context.loaded:
        yield from _weights(context.golden, checkpoint, context)
    if context.golden is not None and context.first is not None:
        yield from _compared(context.golden, checkpoint, model, context)
    if context.options.write_golden is None:
        return
    if context.failed or context.first is None:
        yield Finding(
            code="golden-not-written",
            severity="info",
            message=f"{context.options.write_golden} was not written, because the model did not pass",
        )
        return
    yield _written(context.options.write_golden, context.first, checkpoint, model, context)


def _weights(golden: Golden, checkpoint: Checkpoint, context: Context) -> Iterator[Finding]:
    """Tensors that are not the golden's; the outputs decide whether that matters."""
    then, (_, now) = golden.weights, _digested(checkpoint, context)
    other = [name for name in dict.fromkeys((*then, *now)) if then.get(name) != now.get(name)]
    if not other:
        return
    dtypes = {tuple(side.get(name, "none").partition(" ")[0] for side in (then, now)) for name in other}
    is_cast = all(before != after for before, after in dtypes)
    told = ", ".join(f"{before} then, {after} now" for before, after in sorted(dtypes) if before != after)
    count = len({**then, **now})
    yield Finding(
        code="golden-weights",
        severity="info" if is_cast and all(name in then and name in now for name in other) else "warning",
        message=f"the weights are not those of {golden.path}: {len(other)} of {count_of(count, 'tensor')} "
        f"{'differs' if len(other) == 1 else 'differ'}{f' ({told})' if told else ''}: {listed(other)}",
    )


def _digested(checkpoint: Checkpoint, context: Context) -> tuple[str | None, dict[str, str]]:
    """The content digest (``None``: some values are not plain tensors), and a golden file's facts on weights."""
    state_dict = checkpoint.state_dict
    digests = {name: tensor_digest(entry) for name, entry in state_dict.items()}
    named = zip(unwrapped_names(list(state_dict)), state_dict.items(), strict=True)
    lines = [DigestLine(name=bare, kind=e.dtype, shape=e.shape, digest=digests[name]) for bare, (name, e) in named]
    entries = (
        {} if context.fit is None else {n: (state_dict[s], digests[s]) for n, s in sources_of(context.fit).items()}
    )
    told = {name: f"{entry.dtype} {list(entry.shape)} {digest}" for name, (entry, digest) in entries.items()}
    return None if state_dict.extra else content_digest(lines), told


def _compared(golden: Golden, checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    first, options = context.first or {}, context.options
    is_elsewhere = (str(context.device), model_dtype(model)) != (golden.device, golden.dtype)
    yield from _circumstances(golden, model, context)
    default = context.tolerance((checkpoint,), first)
    recorded = tolerance_of([golden.dtype, *(o.dtype for o in golden.outputs)])
    tolerance = OutputTolerance(
        atol=max(golden.tolerance.atol, default.atol, recorded.atol) if options.atol is None else options.atol,
        rtol=max(golden.tolerance.rtol, default.rtol, recorded.rtol) if options.rtol is None else options.rtol,
    )
    found = [_difference(each, first.get(each.path), tolerance) for each in golden.outputs]
    if options.atol is None and not all(difference.is_close or difference.reason for difference in found):
        noise = {each.path: each.noise or 0.0 for each in golden.outputs}
        if is_elsewhere or any(o.noise is None for o in golden.outputs):
            here = measured_noise(model, context, context.device, first)
            noise = {path: max(value, here.get(path, 0.0)) for path, value in noise.items()}
        found = [_difference(o, first.get(o.path), tolerance.above(noise[o.path])) for o in golden.outputs]
    paths = {each.path for each in golden.outputs}
    found += [
        OutputDifference(path=path, is_equal=False, is_close=False, reason="it is not in the golden file")
        for path in first
        if path not in paths
    ]
    context.figures["golden"] = {
        "path": golden.path,
        "tolerance": tolerance.to_dict(),
        "outputs": [difference.to_dict() for difference in found],
    }
    yield _told(golden, found, tolerance)


def _circumstances(golden: Golden, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Differences from when the golden file was recorded: device, dtype, versions."""
    now = {"device": str(context.device), "dtype": model_dtype(model), **versions()}
    then = {"device": golden.device, "dtype": golden.dtype, **golden.versions}
    changed = [f"{name} {then[name]} then, {now.get(name, 'none')} now" for name in then if then[name] != now.get(name)]
    if changed:
        yield Finding(
            code="golden-versions",
            severity="info",
            message=f"{golden.path} was recorded under different conditions: {listed(changed)}",
        )


def _told(golden: Golden, found: Sequence[OutputDifference], tolerance: OutputTolerance) -> Finding:
    """Whether the outputs are the golden's."""
    sampled = [each.path or "the output" for each in golden.outputs if each.step > 1]
    of = f" (of {listed(sampled, 3)} a sample)" if sampled else ""
    allowed = f"atol {tolerance.atol:.2g}, rtol {tolerance.rtol:.2g}"
    apart = [difference for difference in found if not difference.is_close]
    if apart:
        return Finding(
            code="golden-differs",
            severity="error",
            message=f"outputs do not match those in {golden.path} within {allowed}{of}: "
            + listed([str(difference) for difference in apart], 3),
        )
    if all(difference.is_equal for difference in found):
        return Finding(
            code="golden-equal", severity="info", message=f"outputs are bit-equal to those in {golden.path}{of}"
        )
    told = [str(difference) for difference in found if not difference.is_equal]
    return Finding(
        code="golden-close",
        severity="info",
        message=f"outputs match those in {golden.path} within {allowed}{of}: {listed(told, 3)}",
    )


def _difference(recorded: Recorded, found: torch.Tensor | None, tolerance: OutputTolerance) -> OutputDifference:
    reason = ""
    if found is None:
        reason = "it is missing"
    elif tuple(found.shape) != recorded.shape:
        shapes = ("x".join(map(str, shape)) or "scalar" for shape in (found.shape, recorded.shape))
        reason = " is the shape, but the record has ".join(shapes)
    if found is None or reason:
        return OutputDifference(path=recorded.path, is_equal=False, is_close=False, reason=reason)
    return compared(recorded.path, found.reshape(-1)[:: recorded.step], recorded.sample, tolerance)


def versions() -> dict[str, str]:
    """What computes: the packages and their versions."""
    found = {"torch": str(torch.__version__), "ckptkit": __version__}
    for name in ("torchvision", "timm", "transformers"):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found


def _written(
    path: str, first: Mapping[str, torch.Tensor], checkpoint: Checkpoint, model: nn.Module, context: Context
) -> Finding:
    """Write the golden, and read it back before it gets its name."""
    inputs, reference = context.inputs, context.reference
    if inputs is None:
        raise VerifyError(f"{path}: there are no inputs to record", path=path)
    args = repr(dict(reference.args))
    try:
        kept: object = ast.literal_eval(args)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        kept = None
    if kept != dict(reference.args):
        raise VerifyError(
            f"{path}: the arguments {told_args(reference.args)} are not literals and cannot be recorded", path=path
        )
    is_recipe = inputs.seed is not None
    stored: dict[str, torch.Tensor] = {}
    if not is_recipe:
        stored |= {f"input.{i}": value.contiguous() for i, value in enumerate(inputs.values)}
    outputs = []
    noise = measured_noise(model, context, context.device, first)
    content, weights = _digested(checkpoint, context)
    for i, (place, tensor) in enumerate(first.items()):
        step = max(1, -(-tensor.nbytes // _WHOLE_NBYTES))
        stored[f"output.{i}"] = tensor.reshape(-1)[::step].clone(memory_format=torch.contiguous_format)
        outputs.append(
            {"path": place, "shape": list(tensor.shape), "dtype": dtype_name(tensor), "tensor": f"output.{i}",
             "step": step, "noise": noise.get(place, 0.0)}
        )  # fmt: skip
    document = {
        "version": VERSION,
        "reference": {"spec": reference.spec, "label": reference.label, "args": args},
        "inputs": {
            "seed": inputs.seed,
            "sha256": inputs.digest(),
            "items": [
                {"shape": list(value.shape), "name": each.name, "below": each.below, "is_list": each.is_list,
                 "tensor": None if is_recipe else f"input.{i}"}
                for i, (each, value) in enumerate(zip(inputs.inputs, inputs.values, strict=True))
            ],
        },
        "outputs": outputs,
        "weights": {"content_digest": content, "tensors": weights},
        "dtype": model_dtype(model),
        "device": str(context.device),
        "tolerance": context.tolerance((checkpoint,), first).to_dict(),
        "versions": versions(),
    }  # fmt: skip
    try:
        data = save(stored, metadata={KEY: json.dumps(document)})
    except Exception as error:
        raise VerifyError(f"{path}: the outputs cannot be stored in safetensors: {error}", path=path) from error
    plan = Plan(format=NAME, nbytes=len(data), steps=(LiteralBytes(0, data),), tensors=len(stored), aliases={})
    write_atomically(path, plan, force=context.options.force, check=lambda temporary, _: read_golden(temporary))
    sampled = sum(output["step"] != 1 for output in outputs)
    of = f", {sampled} of them as samples of 1 MiB" if sampled else ""
    return Finding(
        code="golden-written",
        severity="info",
        message=f"{path}: {count_of(len(outputs), 'output')}{of}, {len(data):,} bytes; "
        + (f"inputs are made from seed {inputs.seed}" if is_recipe else "it contains the inputs"),
    )
