"""The load and weights checks: the weights go into the model, whole or not at all, and are checked there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry
from ckptkit.errors import UnsupportedError
from ckptkit.report import Finding, count_of, listed, share_of
from ckptkit.torch_bridge import state_dict_of, tensors
from ckptkit.verifier.context import Context, floating_dtype
from ckptkit.verifier.fill import become, fill_model, has_no_values, has_own_loading, without_value
from ckptkit.verifier.foreign import foreign
from ckptkit.verifier.load_trial import is_extra_state
from ckptkit.verifier.measure import Fit, model_values
from ckptkit.verifier.outputs import same_bits

__all__ = ["check_load", "check_weights", "sources_of"]


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
    values = tensors(checkpoint.state_dict, map_location="cpu", mapped=True, checksums=True)
    others, left_out = _other_values(checkpoint, fit)
    if left_out:
        yield from _not_made(left_out)
        if not all(map(is_extra_state, left_out)):
            return
    passed_over: list[str] = []
    if fit.allowed_missing and has_no_values(model):
        _give_values(model, context)  # what the file lacks is what the reference begins with
    with_own_code = has_own_loading(model)
    problem = fill_model(model, checkpoint.state_dict, {**values, **others}, fit, seeming=passed_over)
    if has_no_values(model):  # loading code that copies by itself, or fails without values
        _give_values(model, context)
        passed_over.clear()
        problem = fill_model(model, checkpoint.state_dict, {**values, **others}, fit, seeming=passed_over)
    context.seconds["load"] = time.perf_counter() - started
    if problem is not None:
        yield Finding(code="load-failed", severity="error", message=f"load_state_dict refused the weights: {problem}")
        return
    left = list(dict.fromkeys([*without_value(model), *passed_over]))
    if left:
        yield Finding(
            code="left-on-meta",
            severity="error",
            message=f"{count_of(len(left), 'parameter or buffer')} got no value when the checkpoint was loaded: "
            f"{listed(left)}; the reference's own loading code skipped them, or its factory left them on the meta "
            "device",
        )
        return
    context.loaded = True
    if with_own_code:  # which may have changed its argument; the file is read again
        values.clear()
        pairs = _read_again(checkpoint.state_dict, fit)
    else:
        pairs = ((name, values[source]) for name, source in sources_of(fit).items())
    yield from _compared(model, pairs, others)


def _other_values(checkpoint: Checkpoint, fit: Fit) -> tuple[dict[str, Any], list[str]]:
    """The model's values that are not plain tensors, from the file; names of those only other code builds."""
    state_dict, path = checkpoint.state_dict, checkpoint.origin.path
    made: dict[str, Any] = {}
    left: list[str] = []
    for name in (*fit.special, *fit.opaque):
        alone = StateDict({name: state_dict.everything[name]})
        try:
            made.update(state_dict_of(alone, path, map_location="cpu", checksums=True))
        except UnsupportedError:
            left.append(name)
    return made, left


def _not_made(names: list[str]) -> Iterator[Finding]:
    states = [name for name in names if is_extra_state(name)]
    others = [name for name in names if name not in states]
    if states:
        yield Finding(
            code="extra-state",
            severity="warning",
            message=f"{count_of(len(states), 'value', 'is', 'are')} Python objects, which ckptkit never builds "
            f"from a file ({listed(states)}); the model keeps its initial ones",
        )
    if others:
        yield Finding(
            code="unloadable-value",
            severity="error",
            message=f"{count_of(len(others), 'value')} of the checkpoint can only be built by other code and cannot "
            f"be loaded: {listed(others)}",
        )


def sources_of(fit: Fit) -> dict[str, str]:
    """From where in the file each of the model's tensors comes, less those that are computed."""
    sources = {**fit.sources, **{name: fit.sources[twin] for name, twin in fit.tied.items()}}
    return {name: source for name, source in sources.items() if source is not None}


def _read_again(state_dict: StateDict, fit: Fit) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's names with the file's values, in memory that nothing has written to; one storage at a time."""
    names_of: dict[str, list[str]] = {}
    for name, source in sources_of(fit).items():
        names_of.setdefault(source, []).append(name)
    groups: dict[int, dict[str, TensorEntry]] = {}
    for source in names_of:
        groups.setdefault(id(state_dict[source].storage), {})[source] = state_dict[source]
    for group in groups.values():
        for source, value in tensors(StateDict(group), map_location="cpu", mapped=True).items():
            yield from ((name, value) for name in names_of[source])


def _give_values(model: nn.Module, context: Context) -> None:
    """Let the model be the reference built with values, as the seed draws them."""
    other = context.reference.make()
    if context.options.dtype is not None:
        with foreign(f"the model cannot be cast to {context.options.dtype}"):
            other.to(floating_dtype(context.options.dtype))
    become(model, other)


def _compared(
    model: nn.Module, pairs: Iterable[tuple[str, torch.Tensor]], others: Mapping[str, Any]
) -> Iterator[Finding]:
    loaded = model_values(model)
    different = [name for name, value in pairs if not _same(loaded[name], value)]
    different += [
        name for name, value in others.items() if not is_extra_state(name) and not _equal(loaded[name], value)
    ]
    if different:
        yield Finding(
            code="load-differs",
            severity="error",
            message=f"{count_of(len(different), 'tensor', 'differs', 'differ')} between the model and the checkpoint: "
            f"{listed(different)}; names that are tied in the reference have different values in the file, or its "
            "loading code changes them",
        )


def _equal(loaded: Any, value: Any) -> bool:
    """Whether the model has a value that is not a plain tensor, or several in a tuple."""
    if isinstance(value, (tuple, list)):
        return len(loaded) == len(value) and all(map(_equal, loaded, value))
    if not isinstance(value, torch.Tensor) or not isinstance(loaded, torch.Tensor):
        return bool(loaded == value)  # a number may be a tensor of no dimension
    if value.layout is torch.sparse_coo:
        ours, theirs = loaded.detach().coalesce(), value.detach().coalesce()
        return torch.equal(ours.indices(), theirs.indices()) and torch.equal(ours.values(), theirs.values())
    if value.is_nested:
        return all(map(torch.equal, loaded.unbind(), value.unbind()))
    if value.layout is not torch.strided:
        return torch.equal(loaded.values(), value.values())
    return torch.equal(loaded, value)


def _same(loaded: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the model contains the file's bits, or their cast to its own dtype."""
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
    return same_bits(loaded, value)


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
        and a.is_conj() == b.is_conj()
        and a.is_neg() == b.is_neg()
        and a.numel() > 0
    )


def check_weights(checkpoint: Checkpoint, model: nn.Module, context: Context) -> Iterator[Finding]:
    """Whether what came from the file are numbers, matrices are not all zero, and variances are positive."""
    if not context.loaded or context.fit is None:
        return
    values = model_values(model)
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
            message=f"{count_of(len(broken), 'tensor', 'contains', 'contain')} values that are not finite: "
            f"{listed(broken)}",
        )
    if masks:
        yield Finding(
            code="infinite-buffer",
            severity="info",
            message=f"{count_of(len(masks), 'buffer', 'contains', 'contain')} infinities, as masks do: {listed(masks)}",
        )
    if zero:
        yield _zeroed(zero, matrices)
    yield from _variances({name: values[name] for name in from_file})


def _zeroed(zero: list[str], matrices: list[str]) -> Finding:
    if len(zero) == len(matrices):
        return Finding(
            code="weights-all-zero",
            severity="error",
            message=f"every parameter of two or more dimensions is zero throughout ({listed(zero)}): "
            "they were never trained or never stored",
        )
    return Finding(
        code="zero-weights",
        severity="warning",
        message=f"{share_of(len(zero), len(matrices), 'parameter')} of two or more dimensions "
        f"{'is' if len(zero) == 1 else 'are'} zero throughout: "
        f"{listed(zero)}",
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
            message=f"{count_of(len(negative), 'layer', 'has', 'have')} negative running variances: {listed(negative)}",
        )
    if zero:
        yield Finding(
            code="zero-variance",
            severity="warning",
            message=f"{count_of(len(zero), 'layer', 'has', 'have')} running variances of zero: {listed(zero)}; "
            "the channel never changed in training and is now scaled by 1/sqrt(eps)",
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
