"""Assertions about checkpoints, for pytest, unittest or any script.

    from ckptkit.testing import assert_fits, assert_no_pickle, assert_same_weights

    def test_release():
        assert_no_pickle("release.safetensors")
        assert_same_weights("training.pth", "release.safetensors", strip_module=True)
        assert_fits("release.safetensors", "torchvision:resnet18")

Plain functions, no plugin: each returns nothing, or raises `AssertionError` with a message that says which file, what
was expected and what was found, and then lists the findings.  A check that could not run never passes: it raises a
`ckptkit.CkptkitError` (a missing package), or is one of the findings (an unreadable file).

Weights are given as a path, an open `ckptkit.CheckpointFile` (rewritten ones too), a dict of tensors, or a module.
torch is needed for the last two, and to run a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptkit import api
from ckptkit.arguments import several
from ckptkit.errors import VerifyError
from ckptkit.report import Finding, Report, count_of
from ckptkit.testing.weights import (
    WeightsLike,
    difference_lines,
    file_described,
    finding_lines,
    message,
    on_disk,
    opened,
    require_passed,
    violation_lines,
)

if TYPE_CHECKING:
    from ckptkit.testing.weights import Weights

__all__ = [
    "assert_allowed",
    "assert_fits",
    "assert_matches_manifest",
    "assert_no_nan",
    "assert_no_pickle",
    "assert_runs",
    "assert_safe",
    "assert_same_outputs",
    "assert_same_weights",
]


def assert_same_weights(
    a: Weights, b: Weights, *, atol: float = 0.0, rtol: float = 0.0, strip_module: bool = False
) -> None:
    """Assert that names, shapes, dtypes and values are the same, whatever the containers, the order and the devices.

    Args:
        a: the weights expected.
        b: the weights found.
        atol: absolute difference allowed between values; with 0 for both, values are compared bit for bit.
        rtol: the same, as a share of the larger magnitude; the two are added.
        strip_module: remove wrapper prefixes (``module.``, ``_orig_mod.``) on both sides first.

    Raises:
        AssertionError: they differ; the message lists names by kind of difference, and figures for changed values.
        CkptkitError: they could not be compared.
    """
    __tracebackhide__ = True
    from ckptkit.differences import Tolerance, differ

    with opened(a, "a", strip_module) as (first, expected), opened(b, "b", strip_module) as (second, found):
        tolerance = Tolerance(atol=atol, rtol=rtol) if atol or rtol else None
        difference = differ(first, second, beside=False, tolerance=tolerance)
    if difference.equal:
        return
    how = f"values within atol={atol:g}, rtol={rtol:g}" if atol or rtol else "values bit for bit"
    raise AssertionError(
        message(
            "assert_same_weights: the weights differ",
            [
                ("a", expected),
                ("b", found),
                ("expected", f"the same names, shapes and dtypes, {how}"),
                ("found", difference.summary),
            ],
            [*finding_lines(map(_fixed_here, difference.findings)), *difference_lines(difference)],
        )
    )


def _fixed_here(finding: Finding) -> Finding:
    """The finding with what fixes it in an assertion; a command would name files that may be gone."""
    return replace(finding, fix="strip_module=True" if finding.code == "prefix-differs" else None)


def assert_fits(
    weights: Weights,
    model: Any,
    *,
    model_args: Mapping[str, Any] | None = None,
    strip_module: bool = False,
    allow_missing: str | Sequence[str] = (),
    allow_unexpected: str | Sequence[str] = (),
) -> None:
    """Assert that the weights load strictly into a model; nothing is computed.

    Args:
        weights: the weights.
        model: a reference such as ``"torchvision:resnet18"`` or ``"package.module:factory"``, or a module.
        model_args: keyword arguments of the reference's factory.
        strip_module: remove wrapper prefixes first.
        allow_missing: glob patterns of names that the weights may lack.
        allow_unexpected: glob patterns of names that the model may lack.

    Raises:
        AssertionError: they do not fit; the message says why and how to fix it.
        CkptkitError: it could not be checked.
    """
    __tracebackhide__ = True
    with on_disk(weights, "weights") as subject:
        names = {"allow_missing": allow_missing, "allow_unexpected": allow_unexpected}
        report = _verified(subject, model, model_args, strip_module, forward=False, **names)
    require_passed(
        report,
        "assert_fits: the weights do not fit the model",
        subject,
        f"every tensor of {report.details['reference']}, with its shape, and no others",
    )


def _verified(subject: WeightsLike, model: Any, args: Mapping[str, Any] | None, strip: bool, **options: Any) -> Report:
    options = {**options, "section": subject.section, "strip_module": strip}
    return api.verify(subject.path, model=model, model_args=args, **options)


def assert_runs(
    weights: Weights,
    model: Any = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    device: str = "cpu",
    input_shapes: Sequence[Sequence[int]] = (),
    strip_module: bool = False,
    golden: str | os.PathLike[str] | None = None,
) -> None:
    """Assert that the weights fit a model and that its outputs are sound: finite, repeatable, not constant.

    Args:
        weights: the weights.
        model: as for `assert_fits`; may be omitted if ``golden`` names it.
        model_args: keyword arguments of the reference's factory.
        device: where it runs; see `ckptkit.verify`.
        input_shapes: one shape for each input; default from the reference, if known.
        strip_module: remove wrapper prefixes first.
        golden: outputs recorded by ``ckptkit verify --write-golden``, which these must match.

    Raises:
        AssertionError: they do not fit, the outputs are not sound, or not those of the golden file.
        CkptkitError: it could not be checked.
    """
    __tracebackhide__ = True
    with on_disk(weights, "weights") as subject:
        place: dict[str, Any] = {"device": device, "input_shapes": input_shapes}
        report = _verified(subject, model, model_args, strip_module, golden=golden, **place)
    agreeing = f" that agree with {os.fsdecode(golden)}" if golden is not None else ""
    require_passed(
        report,
        "assert_runs: the model does not run as it should",
        subject,
        f"sound outputs of {report.details['reference']}{agreeing}",
    )


def assert_same_outputs(
    a: Weights,
    b: Weights,
    model: Any,
    *,
    model_args: Mapping[str, Any] | None = None,
    device: str = "cpu",
    input_shapes: Sequence[Sequence[int]] = (),
    strip_module: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
) -> None:
    """Assert that a model computes the same with either weights, as far as their dtypes allow.

    Args:
        a: the weights expected.
        b: the weights found.
        model: as for `assert_fits`.
        model_args: keyword arguments of the reference's factory.
        device: where it runs.
        input_shapes: one shape for each input.
        strip_module: remove wrapper prefixes first.
        atol: absolute difference allowed between outputs; default by the least precise dtype involved.
        rtol: the same, as a share of their largest magnitude.

    Raises:
        AssertionError: the outputs differ; the message says by how much and in which module first.
        CkptkitError: it could not be checked.
    """
    __tracebackhide__ = True
    with on_disk(a, "a") as expected, on_disk(b, "b") as subject:
        place: dict[str, Any] = {"device": device, "input_shapes": input_shapes}
        apart = {"against": expected.path, "atol": atol, "rtol": rtol}
        report = _verified(subject, model, model_args, strip_module, **place, **apart)
    require_passed(report, "assert_same_outputs: the outputs differ", subject, f"those of {expected.called}")


def assert_safe(checkpoint: str | os.PathLike[str] | api.CheckpointFile) -> None:
    """Assert that the file is plain data and torch's own rebuild functions: loading it needs no trust in its author.

    Raises:
        AssertionError: its pickles name something else; the message says what, and where.
        CkptkitError: it cannot be read.
    """
    __tracebackhide__ = True
    if isinstance(checkpoint, api.CheckpointFile):
        file = checkpoint
    else:
        with api.open(checkpoint) as file:
            pass
    if file.trust == "safe":
        return
    uses = (*file.checkpoint.globals, *file.checkpoint.unvouched)
    others = [use for use in uses if use.verdict in ("unknown", "dangerous")]
    raise AssertionError(
        message(
            "assert_safe: a loader that executes pickles would have to trust this file",
            [
                ("file", file_described(file)),
                ("expected", "trust 'safe': plain data and torch's own rebuild functions"),
                ("found", f"trust {file.trust!r}: {count_of(len(others), 'other name')}"),
            ],
            [f"{use.name} ({use.verdict}; {', '.join(use.where)})" for use in others],
        )
    )


def assert_no_pickle(*checkpoints: str | os.PathLike[str]) -> None:
    """Assert that the files contain no pickle; folders are searched.

    Raises:
        AssertionError: one does, or cannot be read, or there is none.
    """
    __tracebackhide__ = True
    _check("assert_no_pickle: a file contains a pickle", checkpoints, no_pickle=True)


def assert_no_nan(*checkpoints: Weights) -> None:
    """Assert that no tensor contains NaN and no parameter Inf, as ``ckptkit check --no-nan`` does; all values are read.

    Raises:
        AssertionError: one does, or a file cannot be read; the message says which tensors, and how many values.
        VerifyError: nothing was given.
    """
    __tracebackhide__ = True
    if not checkpoints:
        raise VerifyError("assert_no_nan: no checkpoint was given: there is nothing to check")
    for checkpoint in checkpoints:
        with on_disk(checkpoint, "the checkpoint") as subject:
            called = subject.called if subject.is_temporary else None
            _check("assert_no_nan: values are not finite", [subject.path], called=called, no_nan=True)


def assert_allowed(*checkpoints: str | os.PathLike[str], **policy: Any) -> None:
    """Assert that the files meet a policy, as with ``ckptkit check``; folders are searched.

    Args:
        *checkpoints: files and folders.
        **policy: arguments of `ckptkit.check`: ``no_pickle=True``, ``max_size="2GB"``, ``allow_dtype=["float16"]``.

    Raises:
        AssertionError: one does not, or cannot be read; the message names the file, the rule, what was expected
            and what was found.
        CkptkitError: the policy is invalid.
    """
    __tracebackhide__ = True
    _check("assert_allowed: the policy is not met", checkpoints, **policy)


def assert_matches_manifest(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], manifest: str | os.PathLike[str]
) -> None:
    """Assert that the files are those that a manifest describes.

    Args:
        checkpoints: files and folders; none: all that the manifest names.
        manifest: what ``ckptkit manifest`` wrote.

    Raises:
        AssertionError: a file is missing, is not in the manifest, or differs from the manifest.
        CkptkitError: the manifest cannot be read.
    """
    __tracebackhide__ = True
    paths = several(checkpoints)
    _check("assert_matches_manifest: the files do not match the manifest", paths, manifest=manifest)


def _check(title: str, paths: Sequence[str | os.PathLike[str]], *, called: str | None = None, **policy: Any) -> None:
    __tracebackhide__ = True
    report = api.check(paths, **policy)
    if report.exit_code == 0:
        return
    rules = ", ".join(f"{name.replace('_', '-')}={value}".removesuffix("=True") for name, value in policy.items())
    facts = [
        ("files", called or ", ".join(os.fsdecode(path) for path in paths) or "all in the manifest"),
        ("expected", rules or "readable checkpoints"),
        ("found", report.verdict),
    ]
    raise AssertionError(message(title, facts, [*violation_lines(report.findings, called)]))
