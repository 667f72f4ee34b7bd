"""The load check: the weights go into the model, whole or not at all, and are compared there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.report import Finding
from ckptkit.torch_bridge import tensors
from ckptkit.verifier.context import Context, floating_dtype, shortened
from ckptkit.verifier.fill import become, fill, has_no_values, without_value
from ckptkit.verifier.measure import Fit, named_values

__all__ = ["check_load"]


def check_load(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether loading works, and leaves in the model what the file holds.

    The weights are loaded on the CPU, whatever device the file names.  Where the model has no values they are not
    copied: they become its parameters.
    """
    fit = context.fit
    if context.failed or fit is None:
        yield Finding(
            code="not-loaded",
            severity="info",
            message="nothing was loaded and no forward check was run, because the checkpoint does not fit",
        )
        return
    started = time.perf_counter()
    values = tensors(checkpoint.state_dict, map_location="cpu", mapped=True)
    passed_over: list[str] = []
    if fit.allowed_missing and has_no_values(model):
        _give_values(model, context)  # what the file lacks is what the reference begins with
    problem = fill(model, checkpoint.state_dict, values, fit, seeming=passed_over)
    if has_no_values(model):  # loading code that copies by itself, or fails without values
        _give_values(model, context)
        passed_over.clear()
        problem = fill(model, checkpoint.state_dict, values, fit, seeming=passed_over)
    context.seconds["load"] = time.perf_counter() - started
    if problem is not None:
        yield Finding(code="load-failed", severity="error", message=f"load_state_dict refused the weights: {problem}")
        return
    left = list(dict.fromkeys([*without_value(model), *passed_over]))
    if left:
        yield Finding(
            code="left-on-meta",
            severity="error",
            message=f"{len(left)} parameters or buffers got no value when the checkpoint was loaded: {shortened(left)}; "
            "the reference's own loading code passed over them, or its factory left them on the meta device",
        )
        return
    context.loaded = True
    yield from _compared(model, values, fit)
    yield from _finite(model, values, fit)


def _give_values(model: nn.Module, context: Context) -> None:
    """Let the model be the reference built with values, as the seed draws them."""
    torch.manual_seed(context.seed)
    other = context.reference.make()
    if context.dtype is not None:
        other.to(floating_dtype(context.dtype))
    become(model, other)


def _compared(model: nn.Module, values: Mapping[str, torch.Tensor], fit: Fit) -> Iterator[Finding]:
    loaded = model.state_dict()
    sources = {**fit.sources, **{name: fit.sources[twin] for name, twin in fit.tied.items()}}
    different = [n for n, source in sources.items() if source is not None and not _same(loaded[n], values[source])]
    if different:
        yield Finding(
            code="load-differs",
            severity="error",
            message=f"{len(different)} tensors in the model are not what the checkpoint holds: {shortened(different)}; "
            "names that are tied in the reference have different values in the file, or its loading code changes them",
        )


def _same(loaded: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the model holds the file's bits, or their cast to its own dtype."""
    loaded, value = loaded.detach(), value.detach()
    if _is_same_memory(loaded, value):
        return True
    if loaded.shape != value.shape:
        return loaded.numel() == value.numel() == 1 and _same(loaded.reshape(1), value.reshape(1))
    if loaded.dtype != value.dtype:
        cast = value.to(loaded.dtype)
        equal = loaded == cast
        # A NaN keeps no payload through a cast.
        return bool((equal | ((loaded != loaded) & (cast != cast))).all())
    return torch.equal(_bits(loaded), _bits(value))


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
        and a.numel() > 0
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _finite(model: nn.Module, values: Mapping[str, torch.Tensor], fit: Fit) -> Iterator[Finding]:
    """NaN anywhere and infinities in parameters are errors; an infinite buffer may be a mask."""
    expected = named_values(model)
    broken: list[str] = []
    masks: list[str] = []
    for name, source in fit.sources.items():
        nan, infinite = _not_finite(values[source]) if source is not None else (0, 0)
        if nan or (infinite and isinstance(expected[name], nn.Parameter)):
            broken.append(f"{name} ({nan:,} NaN, {infinite:,} Inf of {values[source or name].numel():,})")
        elif infinite:
            masks.append(name)
    if broken:
        yield Finding(
            code="weights-not-finite",
            severity="error",
            message=f"{len(broken)} tensors hold values that are no numbers: {shortened(broken)}",
        )
    if masks:
        yield Finding(
            code="infinite-buffer",
            severity="info",
            message=f"{len(masks)} buffers hold infinities, as masks do: {shortened(masks)}",
        )


def _not_finite(tensor: torch.Tensor) -> tuple[int, int]:
    """Numbers of NaN and of infinite elements."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or "float4" in str(tensor.dtype):
        return 0, 0
    tensor = tensor.detach()
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)  # 8-bit floats know no arithmetic
    if torch.isfinite(tensor.sum()):  # any NaN or infinity would show in the sum
        return 0, 0
    return int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
