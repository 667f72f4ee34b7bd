"""A checkpoint's tensors become the model's own, without a copy if possible.

A model without values (`ckptkit.verifier.references.without_values`) is filled with ``load_state_dict(assign=True)``:
the file's tensors, which are in a mapping of the file, take the place of its parameters.  What ``assign`` changes
besides the values is brought back to what the reference has, as copying would have kept it: dtype, stride,
``requires_grad``, and which names are one tensor.

A model with values is filled by copying into them, so that anything else that holds its parameters sees the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import StateDict
from ckptkit.report import listed
from ckptkit.verifier.foreign import error_text, foreign
from ckptkit.verifier.load_trial import is_extra_state, loadable
from ckptkit.verifier.measure import Fit, identity, model_values

__all__ = ["become", "fill_model", "has_no_values", "has_own_loading", "without_value"]

_LOADING = ("__setattr__", "_load_from_state_dict", "load_state_dict", "set_extra_state")
"""Methods that a load calls, and that a module may define."""


def has_no_values(model: nn.Module) -> bool:
    """Whether any of the model's parameters or buffers is on the meta device."""
    return any(tensor.is_meta for _, _, _, tensor in _slots(model))


def has_own_loading(model: nn.Module) -> bool:
    """Whether code that is not torch's own takes part in loading, and could change what it is given."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not all(getattr(type(module), name).__module__.startswith("torch.") for name in _LOADING)
        for module in model.modules()
    )


def become(model: nn.Module, other: nn.Module) -> None:
    """Let one module object be the other: the same parts, by reference."""
    model.__class__ = type(other)
    model.__dict__ = other.__dict__


def fill_model(
    model: nn.Module, state_dict: StateDict, values: Mapping[str, Any], fit: Fit, *, seeming: list[str]
) -> str | None:
    """Load; what is wrong, where something is.

    Args:
        model: the reference.
        state_dict: the weights.
        values: theirs; tensors become the model's if it has no values.
        fit: how they fit.
        seeming: gets the names that loading skipped without saying so.
    """
    assign = has_no_values(model)
    before = model_values(model)
    versions = {name: v._version for name, v in before.items() if isinstance(v, torch.Tensor)}
    slots = list(_slots(model)) if assign else []
    # A Parameter assigned to a buffer would make it a parameter.
    given = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    state = loadable(state_dict, given, before)
    try:
        with foreign():
            keys = model.load_state_dict(state, strict=fit.is_strict, assign=assign)
            taken: dict[int, list[tuple[int, int]]] = {}
            for group in _groups(slots):
                _settle(group, taken)
    except Exception as error:
        return error_text(error)
    tolerated = {*fit.tied, *fit.allowed_missing, *fit.allowed_unexpected}
    left = [name for name in (*keys.missing_keys, *keys.unexpected_keys) if name not in tolerated]
    if left:
        return f"these names were ignored: {listed(left)}"
    known = {*fit.sources, *tolerated}
    after = model_values(model)
    seeming += [
        name
        for name, version in versions.items()
        if name not in known
        and not is_extra_state(name)
        and after.get(name) is before[name]
        and before[name]._version == version
    ]
    return None


def without_value(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are on the meta device."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in named if tensor.is_meta]


_Slot = tuple[nn.Module, str, bool, torch.Tensor]
"""A module, a name in it, whether that is a parameter's, and what is there before loading."""


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for module in model.modules():
        yield from ((module, name, True, p) for name, p in module._parameters.items() if p is not None)
        yield from ((module, name, False, b) for name, b in module._buffers.items() if b is not None)


def _groups(slots: list[_Slot]) -> list[list[_Slot]]:
    """The slots of each tensor: more than one where names are tied."""
    groups: dict[object, list[_Slot]] = {}
    for slot in slots:
        groups.setdefault((slot[2], identity(slot[3])), []).append(slot)
    return list(groups.values())


def _settle(group: list[_Slot], taken: dict[int, list[tuple[int, int]]]) -> None:
    """Give every slot of one tensor what was loaded into the last of them, as the reference has it.

    Args:
        group: the slots.
        taken: the bytes that are already in use, by storage.
    """
    _, _, is_parameter, before = group[0]
    loaded = [_in(slot) for slot in group]
    given = [tensor for tensor in loaded if tensor is not None and tensor is not before and not tensor.is_meta]
    if not given:
        return
    tensor = _like(given[-1], before)
    if not _take(tensor, taken):  # one tensor in the file is two in the reference
        tensor = tensor.detach().clone()
    if is_parameter and (tensor is not given[-1] or not isinstance(tensor, nn.Parameter)):
        tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
    for slot in group:
        if _in(slot) is not tensor:
            setattr(slot[0], slot[1], tensor)  # not into the table: recurrent layers keep lists of their own


def _take(tensor: torch.Tensor, taken: dict[int, list[tuple[int, int]]]) -> bool:
    """Note the bytes of a tensor; whether nothing else uses any of them."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return True
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = begin + (last + 1) * tensor.element_size()
    others = taken.setdefault(tensor.untyped_storage().data_ptr(), [])
    others.append((begin, end))
    return all(end <= b or e <= begin for b, e in others[:-1])


def _in(slot: _Slot) -> torch.Tensor | None:
    module, name, is_parameter, _ = slot
    return (module._parameters if is_parameter else module._buffers).get(name)


def _like(tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy in the dtype and the layout of the one before."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor
    same = tensor.shape == before.shape
    has_bits = tensor.is_conj() or tensor.is_neg()
    if tensor.dtype == before.dtype and not has_bits and (not same or tensor.stride() == before.stride()):
        return tensor
    target = torch.empty_like(before if same else tensor, dtype=before.dtype, device=tensor.device)
    return target.requires_grad_(False).copy_(tensor.detach())
