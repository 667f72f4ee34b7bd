"""The rules that a model decides, ``fits`` and ``forward``: what the verifier finds, as findings of a check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ckptkit.errors import CkptkitError, MissingDependencyError
from ckptkit.normalize.parts import CODE
from ckptkit.released.examine import Examined
from ckptkit.released.policy import Policy
from ckptkit.released.results import CheckFinding
from ckptkit.report import Report

__all__ = ["model_findings"]

_IGNORE = " --ignore-checksums"

_FIT_CHECKS = ("fit", "load", "weights")
"""Checks of the verifier that need no forward pass."""


def model_findings(
    examined: Examined, policy: Policy, golden: str | None, verify: Callable[..., Report]
) -> Iterator[CheckFinding]:
    """What the verifier finds to be wrong with a file.

    The model is that of ``fits``; without it that of the golden, or of the architecture that was identified.

    Raises:
        MissingDependencyError: torch, or the package of the reference, is not installed.
    """
    path, rule = examined.path, "fits" if policy.fits is not None else "forward"
    options: dict[str, Any] = {
        "model": policy.fits,
        "model_args": dict(policy.model_args),
        "allow_part": policy.allow_part,
    }
    if policy.forward and golden is not None:
        options["golden"] = golden  # with the model and the inputs, where they are not given
    elif policy.fits is None and examined.architecture is not None and not examined.architecture.prefix:
        options["model"] = examined.architecture.reference
        options["model_args"] = {**examined.architecture.args, **policy.model_args}
    elif policy.fits is None:
        yield _not_run(
            path,
            rule,
            "a model to run",
            "the forward pass was asked for, but no model is named (--fits REF), recorded in a golden, or identified",
        )
        return
    try:
        # Checksums were held already, or the file's own is the manifest's.  What is advised does hold them.
        options |= {"forward": policy.forward, "input_shapes": policy.input_shapes, "ignore_checksums": True}
        report = verify(path, **options)
    except MissingDependencyError:
        raise
    except CkptkitError as error:
        message = re.sub(r"--model(?!-)", "--fits", str(error))  # as the option is called here
        yield _not_run(path, rule, _reference(options), message.removeprefix(f"{path}: "))
        return
    yield from _told(report, path, policy, _reference(options))


def _told(report: Report, path: str, policy: Policy, reference: str) -> Iterator[CheckFinding]:
    """The verifier's findings but those that are only worth knowing, each under the rule whose it is."""
    findings = list(report.findings)
    names = [check["name"] for check in report.details["checks"] for _ in check["codes"]]
    names = [""] * (len(findings) - len(names)) + names  # those before the first check are not any check's
    for name, finding in zip(names, findings, strict=True):
        if finding.severity == "info" or finding.code == CODE:  # which its own rule has told
            continue
        fits = policy.fits is not None and (not policy.forward or name in ("", *_FIT_CHECKS))
        yield CheckFinding(
            code=finding.code,
            severity=finding.severity,
            path=path,
            rule="fits" if fits else "forward",
            expected=f"{'loads into' if fits else 'runs in'} {reference}",
            found=finding.code,
            message=finding.message,
            fix=finding.fix if finding.fix is None or policy.ignore_checksums else finding.fix.replace(_IGNORE, ""),
        )


def _reference(options: dict[str, Any]) -> str:
    return str(options["model"] or "the model of the golden")


def _not_run(path: str, rule: str, expected: str, message: str) -> CheckFinding:
    return CheckFinding(
        code="check-not-run",
        severity="error",
        path=path,
        rule=rule,
        expected=expected,
        found="could not be checked",
        message=message,
    )
