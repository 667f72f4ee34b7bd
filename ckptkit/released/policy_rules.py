"""The rules of a policy, one function each: what they forbid in an examined file.

Adding one is a field of `Policy`, a function here and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoint import GlobalUse, Trust, trust_of
from ckptkit.dtypes import DTYPES
from ckptkit.formats import format_for, format_named
from ckptkit.normalize.parts import UNPROVEN
from ckptkit.released.examine import Examined, TensorFact
from ckptkit.released.policy import TRUST_ORDER, Policy
from ckptkit.released.results import CheckFinding
from ckptkit.report import Severity, apart, convert_command, count_of, human_size, listed
from ckptkit.shell import words_in

if TYPE_CHECKING:
    from ckptkit.formats.contents import Inside
    from ckptkit.formats.format import Format

__all__ = ["RULES", "Rule", "pickle_violations", "rules_of", "violations"]

Rule = Callable[[Examined, Policy], Iterator[CheckFinding]]
"""Yields what of the file the policy forbids."""

_MOST_LISTED = 100
"""Values of ``expected`` and ``found``."""


_WITHOUT_NAN = frozenset(("float4_e2m1fn_x2",))
"""Floating point types that have neither: all 16 codes of E2M1 are numbers (OCP Microscaling Formats 1.0, 5.3.3)."""


def rules_of(policy: Policy) -> tuple[str, ...]:
    """The names of the rules that a policy has, in the order in which they are applied."""
    return tuple(name for name, wanted, _ in RULES if wanted(policy))


def violations(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    """The violations of its policy in a file, in the order of the rules."""
    found = (finding for _, wanted, rule in RULES if wanted(policy) for finding in rule(examined, policy))
    return apart(found, ["--ignore-checksums"] * policy.ignore_checksums)


def _no_pickle(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if examined.has_pickle:
        yield _found(
            examined,
            code="pickle-not-allowed",
            rule="no-pickle",
            expected="no pickle",
            found=examined.format,
            message=f"a {examined.format} file contains a pickle, and loading a pickle runs the functions it names",
            fix=_convert(examined, pickled=False),
        )


def _max_trust(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if TRUST_ORDER[examined.trust] > TRUST_ORDER[policy.max_trust]:
        uses = (*examined.globals, *examined.unvouched)
        fix = None if examined.trust == "hostile" else _convert(examined)
        yield _too_much_trust(examined.path, examined.trust, uses, policy, fix)


def _too_much_trust(
    path: str, trust: Trust, uses: Sequence[GlobalUse], policy: Policy, fix: str | None = None
) -> CheckFinding:
    bad = [use.name for use in uses if use.kind == "name" and use.verdict in ("unknown", "dangerous")]
    dangerous = [use.name for use in uses if use.verdict == "dangerous"]
    parts = [f"{use.name} ({listed(use.where)})" for use in uses if use.kind != "name"]
    told = [f"its pickle names {listed(dangerous or bad)}"] * bool(bad) + [f"it contains {listed(parts)}"] * bool(parts)
    names = f": {'; '.join(told)}" if told else ""
    return CheckFinding(
        code="trust-not-allowed",
        severity="error",
        path=path,
        rule="max-trust",
        expected=policy.max_trust,
        found=trust,
        message=f"the file is {trust}, but at most {policy.max_trust} is allowed{names}",
        fix=fix,
    )


def pickle_violations(path: str, inside: Inside, policy: Policy) -> Iterator[CheckFinding]:
    """The violations of a policy in a file that is not a checkpoint, or cannot be read: its pickles.

    One broken rule is enough; if none is known to be broken, unread content counts.
    """
    is_kept = True
    if policy.no_pickle and inside.pickles:
        is_kept = False
        members = [name for name in inside.pickles if name]
        yield CheckFinding(
            code="pickle-not-allowed",
            severity="error",
            path=path,
            rule="no-pickle",
            expected="no pickle",
            found=members[:_MOST_LISTED] or "a pickle",
            message=(
                f"the archive contains {count_of(len(members), 'pickle')} ({listed(members)})"
                if members
                else "the file is a pickle"
            )
            + ", and loading a pickle runs the functions it names",
        )
    trust = trust_of(inside.globals)
    if TRUST_ORDER[trust] > TRUST_ORDER[policy.max_trust]:
        is_kept = False
        yield _too_much_trust(path, trust, inside.globals, policy)
    if is_kept and inside.beyond and policy.every_pickle:
        parts = [f"{name}: {why}" if name else why for name, why in inside.beyond]
        yield CheckFinding(
            code="not-looked-into",
            severity="error",
            path=path,
            rule="no-pickle" if policy.no_pickle else "max-trust",
            expected="no pickle" if policy.no_pickle else policy.max_trust,
            found=parts[:_MOST_LISTED],
            message=f"there may be pickles in content that was not read: {listed(parts)}",
        )


def _require_format(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    is_meant = bool({examined.format, format_named(examined.format).shards} & {*policy.require_format})
    if is_meant and not examined.is_inside:
        return
    fix = _convert(examined, pickled=False)
    yield _found(
        examined,
        code="container-not-allowed",
        rule="require-format",
        expected=list(policy.require_format),
        found=examined.format,
        message=f"the container is {examined.format}{', compressed or in an archive' * examined.is_inside}; allowed: "
        f"{', '.join(policy.require_format)}",
        fix=fix if fix is not None and _written_by(fix).name in policy.require_format else None,
    )


def _max_size(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    most = policy.max_size
    if isinstance(most, int) and examined.size > most:
        whole = " with its shards" if examined.shards else ""
        yield _found(
            examined,
            code="file-too-large",
            rule="max-size",
            expected=most,
            found=examined.size,
            message=f"{_size(examined.size, most)}{whole}; at most {human_size(most)} are allowed",
        )


def _size(size: int, most: int) -> str:
    """A size, in bytes where it would otherwise read like the bound."""
    return human_size(size) if human_size(size) != human_size(most) else f"{size:,} bytes (allowed: {most:,})"


def _allow_dtype(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    wrong = [tensor for tensor in examined.tensors if tensor.dtype not in policy.allow_dtype]
    if wrong:
        dtypes = sorted({tensor.dtype for tensor in wrong})
        yield _found(
            examined,
            code="dtype-not-allowed",
            rule="allow-dtype",
            expected=list(policy.allow_dtype),
            found=dtypes,
            message=(
                f"{_tensors(wrong)} of {', '.join(dtypes)}, which {'is' if len(dtypes) == 1 else 'are'} not allowed "
                f"({', '.join(policy.allow_dtype)}): {listed(tensor.name for tensor in wrong)}"
            ),
        )


def _no_nan(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    every = (*examined.tensors, *examined.beside)
    bad = [tensor for tensor in every if tensor.nan or (tensor.inf and not _may_be_infinite(tensor))]
    if bad:
        told = f"{_tensors(bad)} with NaN or Inf: {listed(map(_counts, bad))}"
        yield _not_finite(examined, "values-not-finite", [_counts(tensor) for tensor in bad[:_MOST_LISTED]], told)
    unknown = [tensor for tensor in every if _may_be_nan(tensor)]
    if unknown:
        dtypes = sorted({tensor.dtype for tensor in unknown})
        names = listed(tensor.name for tensor in unknown)
        told = f"values of {', '.join(dtypes)} cannot be computed, so {_tensors(unknown)} could not be checked: {names}"
        yield _not_finite(examined, "check-not-run", dtypes, told)
    if examined.unseen:
        told = f"objects among the weights could not be read: {listed(examined.unseen)}"
        yield _not_finite(examined, "check-not-run", list(examined.unseen[:_MOST_LISTED]), told)
    if not every:
        told = "the file contains no tensors: there is nothing to check"
        yield _not_finite(examined, "check-not-run", "no tensor", told)


def _not_finite(examined: Examined, code: str, found: object, message: str) -> CheckFinding:
    return _found(examined, code=code, rule="no-nan", expected="finite values", found=found, message=message)


def _may_be_infinite(tensor: TensorFact) -> bool:
    """Whether infinities are honest: in buffers such as masks and observers, and beside the weights."""
    return tensor.is_parameter is False or tensor.name.endswith("mask")


def _may_be_nan(tensor: TensorFact) -> bool:
    """Whether values that could not be read may be NaN or Inf."""
    if tensor.dtype not in DTYPES:
        return True
    is_float = DTYPES[tensor.dtype].kind in ("float", "complex") and tensor.dtype not in _WITHOUT_NAN
    return is_float and tensor.nan is None and tensor.nbytes > 0


def _counts(tensor: TensorFact) -> str:
    parts = [f"{count:,} {name}" for count, name in ((tensor.nan, "NaN"), (tensor.inf, "Inf")) if count]
    return f"{tensor.name} ({', '.join(parts)})"


def _no_optimizer(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if examined.has_optimizer:
        yield _found(
            examined,
            code="optimizer-not-allowed",
            rule="no-optimizer",
            expected="no optimizer state",
            found="optimizer state",
            message="the file contains the state of an optimizer beside the weights",
            fix=_convert(examined),
        )


def _no_prefix(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if examined.prefixes:
        prefixes = ", ".join(f"`{prefix}`" for prefix in examined.prefixes)
        can_come_off = all(finding.fix for finding in examined.findings if finding.code == "module-prefix")
        yield _found(
            examined,
            code="prefix-not-allowed",
            rule="no-prefix",
            expected="no wrapper prefix",
            found=list(examined.prefixes[:_MOST_LISTED]),
            message=f"names have a wrapper's prefix: {prefixes}",
            fix=_convert(examined, "--strip-module") if can_come_off else None,
        )


def _location(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    wrong = [tag for tag in examined.locations if tag not in policy.location]
    if wrong:
        yield _found(
            examined,
            code="location-not-allowed",
            rule="location",
            expected=list(policy.location),
            found=wrong[:_MOST_LISTED],
            message=f"storages are tagged {listed(wrong)}; allowed: {', '.join(policy.location)}",
            fix=None
            if examined.is_program
            else convert_command(examined.path, "--map-location", policy.location[0], suffix=".pth"),
        )


def _whole(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if examined.part is not None:
        yield _found(
            examined,
            code=examined.part.code,
            severity="warning" if policy.allow_part else "error",
            rule="whole",
            expected="a whole checkpoint",
            found="part of one",
            message=examined.part.message,
            fix=examined.part.fix,
        )
    for finding in examined.noticed:
        if finding.code == UNPROVEN and finding.severity == "warning":
            yield _found(
                examined,
                code=finding.code,
                severity="warning",
                rule="whole",
                expected="all files of the checkpoint",
                found="some that may be missing",
                message=finding.message,
            )


def _convert(examined: Examined, *options: str, pickled: bool = True) -> str | None:
    """The command that writes only the weights; ``None``: the file has none, or not all.

    Of several sections it takes the one that inspect advises.  What safetensors cannot hold goes into a ``.pth``, or
    nowhere where a pickle is not ``pickled``.
    """
    if examined.part is not None or examined.kind not in ("state_dict", "whole_model", "resume"):
        return None
    several = next((finding.fix for finding in examined.findings if finding.code == "ambiguous-section"), None)
    is_held = not examined.others and all(DTYPES[tensor.dtype].safetensors for tensor in examined.tensors)
    alone = ["--weights-only"] if examined.kind != "state_dict" else []
    suffix = ".safetensors" if is_held else ".pth"
    command = several or convert_command(examined.path, *options, *alone, suffix=suffix)
    return command if pickled or not _written_by(command).has_pickle else None


def _written_by(command: str) -> Format:
    """The container that a command of `convert_command` writes."""
    return format_for(words_in(command)[3])


def _tensors(tensors: list[TensorFact]) -> str:
    return count_of(len(tensors), "tensor")


def _found(examined: Examined, *, code: str, severity: Severity = "error", **facts: Any) -> CheckFinding:
    return CheckFinding(code=code, severity=severity, path=examined.path, **facts)


RULES: tuple[tuple[str, Callable[[Policy], object], Rule], ...] = (
    ("no-pickle", lambda policy: policy.no_pickle, _no_pickle),
    ("max-trust", lambda policy: True, _max_trust),
    ("require-format", lambda policy: policy.require_format, _require_format),
    ("max-size", lambda policy: policy.max_size is not None, _max_size),
    ("allow-dtype", lambda policy: policy.allow_dtype, _allow_dtype),
    ("no-nan", lambda policy: policy.no_nan, _no_nan),
    ("no-optimizer", lambda policy: policy.no_optimizer, _no_optimizer),
    ("no-prefix", lambda policy: policy.no_prefix, _no_prefix),
    ("location", lambda policy: policy.location, _location),
    ("whole", lambda policy: True, _whole),
)
"""Every rule that needs only the file: its name (``whole`` is for ``allow_part``), whether a policy has it, and the
rule."""
