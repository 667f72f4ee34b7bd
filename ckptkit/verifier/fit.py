"""The fit check: names, shapes and dtypes.  No weight is read."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.conversion.options import unselected_weights
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError
from ckptkit.formats import format_named
from ckptkit.report import Finding, count_of, listed, share_of
from ckptkit.rewrite.like import Fitting, Like
from ckptkit.verifier.advice import (
    architecture_that_fits,
    command_for,
    folded,
    head_classes,
    renamings_that_fit,
    sections_that_fit,
)
from ckptkit.verifier.context import Context
from ckptkit.verifier.measure import Fit, ShapeMismatch, is_counter, like_model, measure_fit, model_values
from ckptkit.verifier.references import build

__all__ = ["check_fit"]


def check_fit(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether torch's strict load takes the checkpoint: every name of the model with its shape, and no other.

    Findings on missing and unexpected names and on shapes begin with torch's own words.
    """
    context.fit = fit = _measured(model, checkpoint, context)
    yield _coverage(fit, context)
    cause = _one_cause(fit, checkpoint, model, context)
    if cause is not None:
        yield cause
        return
    architecture = _architecture(fit, checkpoint, context)
    if architecture is not None:
        yield architecture
    yield from _names(fit, checkpoint, model_values(model), context)
    if fit.mismatches:
        yield _shapes(fit, checkpoint, context)
    yield from _dtypes(fit, checkpoint.origin.path, context)
    yield from _remarks(fit)
    others, chosen = unselected_weights(checkpoint), checkpoint.origin.state_path
    if others:
        # All loops over them end.
        following = [section.path for section in checkpoint.sections if section.is_weights]
        following = following[following.index(chosen) + 1 :] if chosen in following else []
        yield Finding(
            code="other-weights",
            severity="info",
            message=f"the weights of section {chosen!r} are verified; the file also contains {listed(others)}",
            fix=context.command(checkpoint.origin.path, "--section", following[0]) if following else None,
        )


def _measured(model: nn.Module, checkpoint: Checkpoint, context: Context) -> Fit:
    return measure_fit(
        model,
        checkpoint.state_dict,
        allow_missing=context.options.allow_missing,
        allow_unexpected=context.options.allow_unexpected,
        ties_once=format_named(checkpoint.origin.format).ties_once,
    )


def _coverage(fit: Fit, context: Context) -> Finding:
    # Never "100.0 %" by rounding alone.
    percent = fit.parameters_share * 100 if fit.parameters_share == 1 else min(fit.parameters_share * 100, 99.9)
    return Finding(
        code="fit-coverage",
        severity="info",
        message=f"{share_of(fit.tensors, fit.of, 'tensor')}, {percent:.1f} % of parameters, of "
        f"{context.reference.label}",
    )


def _one_cause(fit: Fit, checkpoint: Checkpoint, model: nn.Module, context: Context) -> Finding | None:
    """What explains all that does not fit, and makes a list of names superfluous."""
    expected = model_values(model)
    if expected and (fit.missing or fit.unexpected or fit.mismatches):
        like = like_model(expected, context.reference.label)
        fittings = like.fittings(checkpoint.state_dict)
        cause = _old_names(fit, checkpoint, fittings, context) if fit.missing and fit.unexpected else None
        cause = cause or _section(fit, checkpoint, like, len(fittings[0].sources), context)
        if cause is not None:
            return cause
    if not fit.tensors and not fit.mismatches:
        return _architecture(fit, checkpoint, context) or Finding(
            code="nothing-matches",
            severity="error",
            message=f"no tensor of {context.reference.label} ({listed(list(expected), 3) or 'it has none'}) is in "
            f"the checkpoint ({listed(list(checkpoint.state_dict.everything), 3)}): it is another architecture",
        )
    return None


def _old_names(fit: Fit, checkpoint: Checkpoint, fittings: Sequence[Fitting], context: Context) -> Finding | None:
    """Another prefix, or names of another release."""
    found = renamings_that_fit(fittings, fit.of)
    if not found:
        return None
    best = found[0]
    if best.unexpected and len(found) == 1 and (architecture := _architecture(fit, checkpoint, context)):
        return architecture
    fitting = f"all {fit.of}" if best.is_complete and not best.counters else f"{len(best.sources)} of {fit.of}"
    others = f"; just as many after {listed([other.label for other in found[1:]], between=' or ')}" if found[1:] else ""
    in_passing = best.options == ("--strip-module",) and not best.unexpected
    here = " (verify --strip-module does this without writing a file)" if in_passing else ""
    # The rest has to go too; of several that fit, the advised one is named.
    is_like = best.is_complete and bool(best.unexpected) and context.reference.spec is not None
    options = best.options if found[1:] or not is_like else ()
    return Finding(
        code="old-names" if best.is_old else "wrapper-prefix",
        severity="error",
        message=f"{'; '.join(best.causes)}; once renamed, {fitting} tensors of the reference fit{here}{others}",
        fix=context.conversion(checkpoint, *options, like=is_like),
    )


def _section(fit: Fit, checkpoint: Checkpoint, like: Like, already: int, context: Context) -> Finding | None:
    """Other weights in the file that fit better."""
    found = sections_that_fit(checkpoint, context.file, like, already)
    if not found:
        return None
    path, fitting = found[0]
    others = f" (and so do {listed([repr(other) for other, _ in found[1:]])})" if found[1:] else ""
    stripped = ["--strip-module"] * ("--strip-module" in fitting.options)
    return Finding(
        code="another-section",
        severity="error",
        message=f"section {path!r} has {len(fitting.sources)} of the reference's {count_of(fit.of, 'tensor')}{others}, "
        f"the selected {checkpoint.origin.state_path!r} {already}",
        fix=context.command(checkpoint.origin.path, "--section", path, *stripped),
    )


def _architecture(fit: Fit, checkpoint: Checkpoint, context: Context) -> Finding | None:
    """A known model other than the reference; another head does not count as another model."""
    is_head = not (fit.missing or fit.unexpected) and (not fit.mismatches or head_classes(fit.mismatches) is not None)
    if is_head or _lacks_no_weights(fit):
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


def _lacks_no_weights(fit: Fit) -> bool:
    """Whether nothing but counts and second names of tied tensors keeps it from fitting."""
    return not fit.mismatches and all(n in fit.twins or is_counter(n) for n in (*fit.missing, *fit.unexpected))


def _names(fit: Fit, checkpoint: Checkpoint, values: Mapping[str, Any], context: Context) -> Iterator[Finding]:
    if not (fit.missing or fit.unexpected):
        return
    known = None if _lacks_no_weights(fit) else architecture_that_fits(checkpoint, context.reference.spec)
    fix = command_for(checkpoint, known, context) if known is not None else None
    exactly = None
    if fix is None and values and context.reference.spec is not None:
        like = like_model(values, context.reference.label)
        if len(like.complete(like.fittings(checkpoint.state_dict))) == 1:
            exactly = context.conversion(checkpoint, like=True)
    expected, everything = list(values), list(checkpoint.state_dict.everything)
    if fit.missing:
        lacked = len({*fit.missing} & {*expected})  # torch asks for older names of a module as well
        made = set(fit.counters)
        among = [name for name in expected if name not in made]
        told, remedy = _why_missing(fit, checkpoint, context)
        yield Finding(
            code="missing-keys",
            severity="error",
            message=f"Missing key(s) in state_dict: {_quoted(fit.missing, among)}; {lacked} of the reference's "
            f"{count_of(len(expected), 'name')} {'is' if lacked == 1 else 'are'} not in the checkpoint{told}",
            fix=fix or exactly or remedy,
        )
    if fit.unexpected:
        yield Finding(
            code="unexpected-keys",
            severity="error",
            message=f"Unexpected key(s) in state_dict: {_quoted(fit.unexpected, everything)}; {len(fit.unexpected)} of "
            f"the checkpoint's {count_of(len(everything), 'name')} {'is' if len(fit.unexpected) == 1 else 'are'} not "
            "in the reference",
            fix=fix or _without_counters(fit, checkpoint, everything, context) or exactly,
        )


def _without_counters(fit: Fit, checkpoint: Checkpoint, everything: Sequence[str], context: Context) -> str | None:
    """The conversion that leaves out unexpected names, without counting batch counters."""
    extra = [name for name in fit.unexpected if is_counter(name)]
    if len(extra) < len(fit.unexpected):
        return None
    every = len(extra) == sum(is_counter(name) for name in everything)
    options = ["*num_batches_tracked"] if every else [glob.escape(name) for name in extra]
    return context.conversion(checkpoint, *(part for each in options for part in ("--exclude", each)))


def _quoted(names: Sequence[str], among: Sequence[str]) -> str:
    """Names as torch quotes them, but for those that are folded by module."""
    given = set(names)
    return listed([f'"{line}"' if line in given else line for line in folded(names, among)])


def _why_missing(fit: Fit, checkpoint: Checkpoint, context: Context) -> tuple[str, str | None]:
    """What explains missing names that no weights are lost by, and the command that helps; else nothing."""
    if not all(name in fit.twins or is_counter(name) for name in fit.missing):
        return "", None
    if fit.twins:
        pairs = listed([f"{name} = {twin}" for name, twin in fit.twins.items()])
        told = f": the reference ties them to names that are ({pairs}), but only safetensors may leave tied names out"
        return told, context.conversion(checkpoint)
    return (
        ": its module versions are of layers that have these counters; evaluation does not use them, and torch's "
        "load_state_dict(strict=False) leaves them at 0",
        context.command(checkpoint.origin.path, "--allow-missing", "*num_batches_tracked"),
    )


def _shapes(fit: Fit, checkpoint: Checkpoint, context: Context) -> Finding:
    layers = list(dict.fromkeys(m.name.rpartition(".")[0] for m in fit.mismatches))
    shown = "size mismatch for " + listed([_shape(m) for m in fit.mismatches])
    classes = head_classes(fit.mismatches) if not (fit.missing or fit.unexpected) else None
    number = None if classes is None else _num_classes(classes, checkpoint, context)
    if classes is None or (len(layers) > 4 and number is None):
        return Finding(
            code="shape-mismatch",
            severity="error",
            message=f"{shown}; {count_of(len(fit.mismatches), 'tensor', 'has', 'have')} another shape in the "
            "checkpoint than in the reference",
        )
    ours, theirs = classes
    fix = None
    if number is not None:
        fix = context.command(checkpoint.origin.path, num_classes=number)
    return Finding(
        code="shape-mismatch",
        severity="error",
        message=f"another head: {listed([f'`{layer}`' if layer else 'the model itself' for layer in layers])} "
        f"{'has' if len(layers) == 1 else 'have'} {count_of(ours, 'output')} in the checkpoint and {theirs} in the "
        f"reference; everything else fits ({shown})",
        fix=fix,
    )


def _num_classes(outputs: tuple[int, int], checkpoint: Checkpoint, context: Context) -> int | None:
    """The ``num_classes`` with which a library's model fits; a detector's heads have several outputs for a class."""
    spec = context.reference.spec or ""
    if not spec.startswith(("torchvision:", "timm:")):
        return None
    for each in (1, 2, 3, 4, 6, 9, 12):
        if math.gcd(*outputs) % each:
            continue
        number = outputs[0] // each
        try:
            other, _ = build(spec, {**context.reference.args, "num_classes": number})
            fit = _measured(other, checkpoint, context)
        except CkptkitError:
            continue  # it takes no such number
        if not (fit.missing or fit.unexpected or fit.mismatches):
            return number
    return None


def _shape(mismatch: ShapeMismatch) -> str:
    return f"{mismatch.name} {list(mismatch.checkpoint)} instead of {list(mismatch.reference)}"


def _dtypes(fit: Fit, path: str, context: Context) -> Iterator[Finding]:
    """Values that change by loading: between floating types rounded, between kinds something else altogether."""
    within: dict[tuple[str, str], list[str]] = {}
    across: list[str] = []
    for name, ours, theirs in fit.recast:
        if DTYPES[ours].kind != (DTYPES[theirs].kind if theirs in DTYPES else None):
            across.append(f"{name} {ours} into {theirs}")
        elif context.options.dtype is None or not DTYPES[ours].is_floating:
            within.setdefault((ours, theirs), []).append(name)
    if across:
        yield Finding(
            code="dtype-mismatch",
            severity="error",
            message=f"{count_of(len(across), 'tensor', 'is', 'are')} of a different kind than the reference's: "
            f"{listed(across)}; loading would change their values",
        )
    for (ours, theirs), names in within.items():
        yield Finding(
            code="dtype-mismatch",
            severity="warning",
            message=f"{count_of(len(names), 'tensor', 'is', 'are')} {ours} in the checkpoint and {theirs} in the "
            f"reference ({listed(names, 3)}); they are cast to {theirs} as torch does when it loads",
            fix=context.command(path, "--dtype", ours) if DTYPES[ours].is_floating else None,
        )


def _remarks(fit: Fit) -> Iterator[Finding]:
    """Facts that are not errors but are always reported."""
    if fit.unloadable:
        yield Finding(
            code="unloadable-value",
            severity="error",
            message=f"{count_of(len(fit.unloadable), 'value', 'is not a plain tensor', 'are not plain tensors')} in "
            f"the checkpoint (quantized, sparse, foreign objects) and cannot be loaded: {listed(fit.unloadable)}",
        )
    if fit.tied:
        pairs = [f"{name} = {twin}" for name, twin in fit.tied.items()]
        yield Finding(
            code="tied-restored",
            severity="info",
            message=f"{count_of(len(pairs), 'name')} not in the checkpoint {'is' if len(pairs) == 1 else 'are'} tied "
            f"in the reference to one that is, and filled from it: {listed(pairs)}",
        )
    if fit.counters and not fit.missing:
        yield Finding(
            code="batch-counters",
            severity="info",
            message=f"{count_of(len(fit.counters), 'BatchNorm counter', 'is', 'are')} not in the checkpoint "
            f"({listed(fit.counters, 2)}); torch sets them to 0, as for all weights that do not record a version "
            "of the layer",
        )
    renamed = [name for name in fit.renamed if name not in fit.counters]
    if renamed:
        yield Finding(
            code="upgraded-keys",
            severity="info",
            message=f"{count_of(len(renamed), 'tensor', 'is', 'are')} converted to their current names or format by "
            f"the reference's own loading code: {listed(renamed)}",
        )
    if fit.allowed_missing:
        yield Finding(
            code="allowed-missing",
            severity="info",
            message=f"{count_of(len(fit.allowed_missing), 'name', 'is', 'are')} missing, which is allowed: "
            f"{listed(fit.allowed_missing)}",
        )
    if fit.allowed_unexpected:
        left = fit.allowed_unexpected
        yield Finding(
            code="allowed-unexpected",
            severity="info",
            message=f"{count_of(len(left), 'name', 'is', 'are')} unexpected, which is allowed: {listed(left)}",
        )
