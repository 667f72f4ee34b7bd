"""The rules of a policy, one function each: what of an examined file they forbid.

Adding one is a field of `Policy`, a function here and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ckptkit.dtypes import DTYPES
from ckptkit.normalize.beside import PROGRAMS
from ckptkit.released.examine import Examined, TensorFact
from ckptkit.released.policy import TRUST_ORDER, Policy
from ckptkit.released.results import CheckFinding
from ckptkit.report import Severity, convert_command, count_of, human_size, listed

__all__ = ["RULES", "Rule", "rules_of", "violations"]

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
    """What of a file its policy forbids, in the order of the rules."""
    for _, wanted, rule in RULES:
        if wanted(policy):
            yield from rule(examined, policy)


def _no_pickle(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if examined.has_pickle:
        yield _found(
            examined,
            code="pickle-not-allowed",
            rule="no-pickle",
            expected="no pickle",
            found=examined.format,
            message=f"a {examined.format} file holds a pickle, which runs what it names when it is loaded",
            fix=_convert(examined, pickled=False),
        )


def _max_trust(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if TRUST_ORDER[examined.trust] <= TRUST_ORDER[policy.max_trust]:
        return
    bad = [use.name for use in examined.globals if use.verdict in ("unknown", "dangerous")]
    dangerous = [use.name for use in examined.globals if use.verdict == "dangerous"]
    names = f": its pickle names {listed(dangerous or bad)}" if bad else ""
    yield _found(
        examined,
        code="trust-not-allowed",
        rule="max-trust",
        expected=policy.max_trust,
        found=examined.trust,
        message=f"the file is {examined.trust}, and at most {policy.max_trust} is allowed{names}",
        fix=None if examined.trust == "hostile" else _convert(examined),
    )


def _require_format(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    of_shards = {"safetensors-sharded": "safetensors", "torch-sharded": "torch-zip"}.get(examined.format)
    if examined.format in policy.require_format or of_shards in policy.require_format:
        return
    can_be_made = "safetensors" in policy.require_format
    yield _found(
        examined,
        code="container-not-allowed",
        rule="require-format",
        expected=list(policy.require_format),
        found=examined.format,
        message=f"the container is {examined.format}; allowed: {', '.join(policy.require_format)}",
        fix=_convert(examined, pickled=False) if can_be_made else None,
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
    bad = [tensor for tensor in examined.tensors if tensor.is_parameter is not False and (tensor.nan or tensor.inf)]
    if bad:
        yield _found(
            examined,
            code="values-not-finite",
            rule="no-nan",
            expected="finite values",
            found=[_counts(tensor) for tensor in bad[:_MOST_LISTED]],
            message=f"{_tensors(bad)} with NaN or Inf: {listed(map(_counts, bad))}",
        )
    unknown = [tensor for tensor in examined.tensors if tensor.is_parameter is not False and _may_be_nan(tensor)]
    if unknown:
        dtypes = sorted({tensor.dtype for tensor in unknown})
        yield _found(
            examined,
            code="check-not-run",
            rule="no-nan",
            expected="finite values",
            found=dtypes,
            message=f"values of {', '.join(dtypes)} cannot be computed, so {_tensors(unknown)} could not be checked",
        )
    if examined.others:
        yield _found(
            examined,
            code="not-a-plain-tensor",
            severity="warning",
            rule="no-nan",
            expected="plain tensors",
            found=list(examined.others[:_MOST_LISTED]),
            message=f"values that are not plain tensors were not looked at: {listed(examined.others)}",
        )


def _may_be_nan(tensor: TensorFact) -> bool:
    """Whether values that nobody could look at may be NaN or Inf."""
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
            message="the file holds the state of an optimizer beside the weights",
            fix=_convert(examined),
        )


def _no_prefix(examined: Examined, policy: Policy) -> Iterator[CheckFinding]:
    if examined.prefixes:
        prefixes = ", ".join(f"`{prefix}`" for prefix in examined.prefixes)
        yield _found(
            examined,
            code="prefix-not-allowed",
            rule="no-prefix",
            expected="no wrapper prefix",
            found=list(examined.prefixes[:_MOST_LISTED]),
            message=f"names carry a wrapper's prefix: {prefixes}",
            fix=_convert(examined, "--strip-module"),
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
            if examined.format in PROGRAMS
            else convert_command(examined.path, "--map-location", policy.location[0], suffix=".pth"),
        )


def _convert(examined: Examined, *options: str, pickled: bool = True) -> str | None:
    """The command that writes the weights alone; ``None``: the file has none.

    Values that safetensors cannot hold go into a ``.pth``, or nowhere where a pickle is not ``pickled``.
    """
    if examined.kind not in ("state_dict", "whole_model", "resume") or (examined.others and not pickled):
        return None
    alone = ["--weights-only"] if examined.kind != "state_dict" else []
    return convert_command(examined.path, *options, *alone, suffix=".pth" if examined.others else ".safetensors")


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
)
"""Every rule that a file alone decides: its name, whether a policy has it, what it forbids."""
