"""The fit check: names, shapes and dtypes.  No weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.dtypes import DTYPES
from ckptkit.normalize.beside import beside_weights
from ckptkit.report import Finding, convert_command, count_of
from ckptkit.verifier.advice import head_classes, matching, rename_that_fits
from ckptkit.verifier.context import Context, shortened
from ckptkit.verifier.elsewhere import architecture_that_fits, command_for, other_weights, section_that_fits
from ckptkit.verifier.folding import folded
from ckptkit.verifier.measure import Fit, ShapeMismatch, measure, named_values

__all__ = ["check_fit"]


def check_fit(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether every tensor of the model is in the checkpoint, with its shape, and nothing else is."""
    fit = measure(
        model,
        checkpoint.state_dict,
        allow_missing=context.allow_missing,
        allow_unexpected=context.allow_unexpected,
    )
    context.fit = fit
    yield _coverage(fit, context)
    cause = _one_cause(fit, checkpoint, model, context)
    if cause is not None:
        yield cause
        return
    architecture = _architecture(fit, checkpoint, context)
    if architecture is not None:
        yield architecture
    yield from _names(fit, checkpoint, list(named_values(model)), context)
    if fit.mismatches:
        yield _shapes(fit, checkpoint, context)
    yield from _dtypes(fit, checkpoint.origin.path, context)
    yield from _remarks(fit)
    others = other_weights(checkpoint)
    if others:
        yield Finding(
            code="other-weights",
            severity="info",
            message=f"the weights of section {checkpoint.origin.state_path!r} are verified; the file also holds "
            f"{shortened(others)}",
            fix=context.command(checkpoint.origin.path, "--section", others[0]),
        )


def _coverage(fit: Fit, context: Context) -> Finding:
    # Never "100.0 %" by rounding alone.
    percent = fit.parameters_share * 100 if fit.parameters_share == 1 else min(fit.parameters_share * 100, 99.9)
    return Finding(
        code="fit-coverage",
        severity="info",
        message=f"{fit.tensors:,} of {fit.of:,} tensors, {percent:.1f} % of parameters, of {context.reference.label}",
    )


def _one_cause(fit: Fit, checkpoint: Checkpoint, model: nn.Module, context: Context) -> Finding | None:
    """What explains all that does not fit, and makes a list of names superfluous."""
    expected = named_values(model)
    if fit.missing or fit.unexpected or fit.mismatches:
        shapes = {n: tuple(v.shape) for n, v in expected.items() if isinstance(v, torch.Tensor)}
        already = matching(checkpoint.state_dict, shapes)
        cause = _old_names(fit, checkpoint, shapes, already, context)
        cause = cause or _section(fit, checkpoint, shapes, already, context)
        if cause is not None:
            return cause
    if not fit.tensors and not fit.mismatches:
        return _architecture(fit, checkpoint, context) or Finding(
            code="nothing-matches",
            severity="error",
            message=f"no tensor of {context.reference.label} ({shortened(list(expected), 3) or 'it has none'}) is in "
            f"the checkpoint ({shortened(list(checkpoint.state_dict.everything), 3)}): another architecture",
        )
    return None


def _old_names(
    fit: Fit, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], already: int, context: Context
) -> Finding | None:
    """Another prefix, or names of another release."""
    rename = rename_that_fits(checkpoint, shapes, already) if fit.missing and fit.unexpected else None
    if rename is None:
        return None
    if rename.unexpected and (architecture := _architecture(fit, checkpoint, context)):
        return architecture
    fitting = f"all {fit.of}" if rename.matched == fit.of else f"{rename.matched} of {fit.of}"
    here = " (verify --strip-module does so in passing)" if rename.options == ("--strip-module",) else ""
    return Finding(
        code=rename.code,
        severity="error",
        message=f"{rename.cause}; once renamed, {fitting} tensors of the reference fit{here}",
        fix=_convert(checkpoint, *context.taken(rename.options)),
    )


def _section(
    fit: Fit, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], already: int, context: Context
) -> Finding | None:
    """Other weights in the file that fit better."""
    found = section_that_fits(checkpoint, shapes, already)
    if found is None:
        return None
    path, matched, stripped = found
    return Finding(
        code="another-section",
        severity="error",
        message=f"section {path!r} has {matched} of the reference's {count_of(fit.of, 'tensor')}, the selected "
        f"{checkpoint.origin.state_path!r} {already}",
        fix=context.command(checkpoint.origin.path, "--section", path, *["--strip-module"] * stripped),
    )


def _architecture(fit: Fit, checkpoint: Checkpoint, context: Context) -> Finding | None:
    """Another model than the reference, of which an index knows the name; another head is not another model."""
    is_head = not (fit.missing or fit.unexpected) and (not fit.mismatches or head_classes(fit.mismatches) is not None)
    if is_head:
        return None
    known = architecture_that_fits(checkpoint, context.reference.spec)
    if known is None or known.reference == context.reference.spec:
        return None
    return Finding(
        code="another-architecture",
        severity="error",
        message=f"the checkpoint has the names and shapes of {known.label}, not those of {context.reference.label}",
        fix=command_for(checkpoint, known, context),
    )


def _convert(checkpoint: Checkpoint, *options: str) -> str:
    """The convert command, which writes the weights alone."""
    alone = ("--weights-only",) if beside_weights(checkpoint) else ()
    return convert_command(checkpoint.origin.path, *options, *alone)


def _names(fit: Fit, checkpoint: Checkpoint, expected: Sequence[str], context: Context) -> Iterator[Finding]:
    known = architecture_that_fits(checkpoint, context.reference.spec)
    fix = command_for(checkpoint, known, context) if known is not None and (fit.missing or fit.unexpected) else None
    if fit.missing:
        yield Finding(
            code="missing-keys",
            severity="error",
            message=f"{len(fit.missing)} of the reference's {count_of(fit.of, 'tensor')} are not in the checkpoint: "
            f"{shortened(folded(fit.missing, expected))}",
            fix=fix,
        )
    if fit.unexpected:
        yield Finding(
            code="unexpected-keys",
            severity="error",
            message=f"{len(fit.unexpected)} of the checkpoint's "
            f"{count_of(len(checkpoint.state_dict.everything), 'name', 'is', 'are')} not in the reference: "
            f"{shortened(folded(fit.unexpected, checkpoint.state_dict.everything))}",
            fix=fix,
        )


def _shapes(fit: Fit, checkpoint: Checkpoint, context: Context) -> Finding:
    layers = list(dict.fromkeys(m.name.rpartition(".")[0] for m in fit.mismatches))
    shown = shortened([_shape(m) for m in fit.mismatches])
    classes = head_classes(fit.mismatches) if not (fit.missing or fit.unexpected) else None
    if classes is None or len(layers) > 4:
        return Finding(
            code="shape-mismatch",
            severity="error",
            message=f"{count_of(len(fit.mismatches), 'tensor', 'has', 'have')} another shape in the checkpoint than "
            "in the reference: " + shown,
        )
    ours, theirs = classes
    fix = None
    if context.reference.is_torchvision:
        fix = context.command(checkpoint.origin.path, "--model-arg", f"num_classes={ours}")
    return Finding(
        code="shape-mismatch",
        severity="error",
        message=f"another head: {', '.join(f'`{layer}`' for layer in layers)} has {ours} outputs in the checkpoint and "
        f"{theirs} in the reference; all else fits ({shown})",
        fix=fix,
    )


def _shape(mismatch: ShapeMismatch) -> str:
    return f"{mismatch.name} {list(mismatch.checkpoint)} against {list(mismatch.reference)}"


def _dtypes(fit: Fit, path: str, context: Context) -> Iterator[Finding]:
    """Values that change by loading: between floating types rounded, between kinds something else altogether."""
    within: dict[tuple[str, str], list[str]] = {}
    across: list[str] = []
    for name, ours, theirs in fit.recast:
        if DTYPES[ours].kind != (DTYPES[theirs].kind if theirs in DTYPES else None):
            across.append(f"{name} {ours} into {theirs}")
        elif context.dtype is None or not DTYPES[ours].is_floating:
            within.setdefault((ours, theirs), []).append(name)
    if across:
        yield Finding(
            code="dtype-mismatch",
            severity="error",
            message=f"{count_of(len(across), 'tensor', 'is', 'are')} of another kind than the reference's: "
            f"{shortened(across)}; loading would change their values",
        )
    for (ours, theirs), names in within.items():
        yield Finding(
            code="dtype-mismatch",
            severity="warning",
            message=f"{count_of(len(names), 'tensor', 'is', 'are')} {ours} in the checkpoint and {theirs} in the "
            f"reference ({shortened(names, 3)}); they are cast to {theirs} as torch does when it loads",
            fix=context.command(path, "--dtype", ours) if DTYPES[ours].is_floating else None,
        )


def _remarks(fit: Fit) -> Iterator[Finding]:
    """What is not an error, and is never passed over in silence."""
    if fit.unloadable:
        yield Finding(
            code="unloadable-value",
            severity="error",
            message=f"{count_of(len(fit.unloadable), 'value', 'is not a plain tensor', 'are not plain tensors')} in "
            f"the checkpoint (quantized, sparse, foreign objects) and cannot be loaded: {shortened(fit.unloadable)}",
        )
    if fit.tied:
        pairs = [f"{name} = {twin}" for name, twin in fit.tied.items()]
        yield Finding(
            code="tied-restored",
            severity="info",
            message=f"{count_of(len(pairs), 'name')} not in the checkpoint are tied in the reference to one that is: "
            f"{shortened(pairs)}",
        )
    if fit.counters:
        yield Finding(
            code="batch-counters",
            severity="info",
            message=f"{len(fit.counters)} BatchNorm counters are on one side alone ({shortened(fit.counters, 2)}); "
            "evaluation does not use them, a missing one counts as 0",
        )
    renamed = [name for name in fit.renamed if name not in fit.counters]
    if renamed:
        yield Finding(
            code="upgraded-keys",
            severity="info",
            message=f"{count_of(len(renamed), 'tensor', 'is', 'are')} brought to their present names or form by the "
            f"reference's own loading code: {shortened(renamed)}",
        )
    if fit.allowed_missing:
        yield Finding(
            code="allowed-missing",
            severity="info",
            message=f"{count_of(len(fit.allowed_missing), 'name', 'is', 'are')} missing, which is allowed: "
            f"{shortened(fit.allowed_missing)}",
        )
    if fit.allowed_unexpected:
        left = fit.allowed_unexpected
        yield Finding(
            code="allowed-unexpected",
            severity="info",
            message=f"{count_of(len(left), 'name', 'is', 'are')} unexpected, which is allowed: {shortened(left)}",
        )
