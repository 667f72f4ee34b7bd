"""The weights check: what is in the model now, before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.report import Finding, count_of, share_of
from ckptkit.verifier.context import Context, shortened
from ckptkit.verifier.measure import named_values

__all__ = ["check_weights"]


def check_weights(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether what came from the file are numbers, matrices are not all zero, and variances are positive."""
    if not context.loaded or context.fit is None:
        return
    values = named_values(model)
    from_file = [name for name, source in context.fit.sources.items() if source is not None]
    broken: list[str] = []
    masks: list[str] = []
    matrices: list[str] = []
    zero: list[str] = []
    for name in from_file:
        value = values[name]
        if not isinstance(value, torch.Tensor) or not _has_values(value):
            continue
        tensor = value.detach()
        is_parameter = isinstance(value, nn.Parameter)
        nan, infinite, is_zero = _looked_at(tensor)
        if nan or (infinite and is_parameter):
            broken.append(f"{name} ({nan:,} NaN, {infinite:,} Inf of {tensor.numel():,})")
        elif infinite:
            masks.append(name)
        if is_parameter and tensor.dim() >= 2 and tensor.numel():
            matrices.append(name)
            if is_zero:
                zero.append(name)
    context.zeroed = tuple(zero)
    if broken:
        yield Finding(
            code="weights-not-finite",
            severity="error",
            message=f"{count_of(len(broken), 'tensor', 'holds', 'hold')} values that are not numbers: "
            f"{shortened(broken)}",
        )
    if masks:
        yield Finding(
            code="infinite-buffer",
            severity="info",
            message=f"{count_of(len(masks), 'buffer', 'holds', 'hold')} infinities, as masks do: {shortened(masks)}",
        )
    if zero:
        yield _zeroed(zero, matrices)
    yield from _variances({name: values[name] for name in from_file})


def _zeroed(zero: list[str], matrices: list[str]) -> Finding:
    if len(zero) == len(matrices):
        return Finding(
            code="weights-all-zero",
            severity="error",
            message=f"every parameter of two or more dimensions is zero throughout ({shortened(zero)}): "
            "nothing was ever trained or stored in them",
        )
    return Finding(
        code="zero-weights",
        severity="warning",
        message=f"{share_of(len(zero), len(matrices), 'parameter')} of two or more dimensions "
        f"{'is' if len(zero) == 1 else 'are'} zero throughout: "
        f"{shortened(zero)}",
    )


def _variances(values: dict[str, object]) -> Iterator[Finding]:
    """BatchNorm's running variances: it divides by their root."""
    negative: list[str] = []
    zero: list[str] = []
    for name, value in values.items():
        if name.rpartition(".")[2] != "running_var" or not isinstance(value, torch.Tensor) or not value.numel():
            continue
        below, nothing = int((value < 0).sum()), int((value == 0).sum())
        if below:
            negative.append(f"{name} ({below:,} of {value.numel():,}, the least {float(value.min()):.3g})")
        elif nothing:
            zero.append(f"{name} ({nothing:,} of {value.numel():,})")
    if negative:
        yield Finding(
            code="negative-variance",
            severity="error",
            message=f"{count_of(len(negative), 'layer', 'has', 'have')} negative running variances: "
            f"{shortened(negative)}",
        )
    if zero:
        yield Finding(
            code="zero-variance",
            severity="warning",
            message=f"{count_of(len(zero), 'layer', 'has', 'have')} running variances of zero: {shortened(zero)}; "
            "the channel never changed in training, and is now scaled by 1/sqrt(eps)",
        )


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether they can be computed with."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return is_number and tensor.layout == torch.strided and "float4" not in str(tensor.dtype)


def _looked_at(tensor: torch.Tensor) -> tuple[int, int, bool]:
    """Numbers of NaN and of infinite elements, and whether all are zero."""
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # 8-bit floats know no arithmetic
    total = tensor.sum()
    if torch.isfinite(total):  # any NaN or infinity would show in the sum
        return 0, 0, bool(total == 0) and not bool(tensor.any())
    return int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum()), False
