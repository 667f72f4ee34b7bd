"""Strategies: tensors of every kind torch saves, under names as people give them, alone and in training states."""

from __future__ import annotations

import collections
import io
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings

from ckptkit.dtypes import DTYPES

SOME = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(deadline=None, max_examples=150)


def _saves(name: str) -> bool:
    """Whether this torch has such tensors and saves them: 2.1 has float8 and bits, and saves none."""
    if DTYPES[name].kind == "quantized" or not hasattr(torch, name):
        return False
    try:
        torch.save(torch.empty(0, dtype=torch.uint8).view(getattr(torch, name)), io.BytesIO())
    except KeyError:
        return False
    return True


STORABLE = [name for name in DTYPES if _saves(name)]
SAFETENSORS = [name for name in STORABLE if DTYPES[name].safetensors and name != "float4_e2m1fn_x2"]  # never 0-d
TYPED = [name for name in STORABLE if DTYPES[name].storage_class]

TAGS = ["cpu", "cuda:0", "cuda:1", "cuda:7", "mps"]
LOCATIONS = st.sampled_from(TAGS)

ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LEADING = ("module", "_forward_module")
WRAPPERS = st.lists(st.sampled_from([*LEADING, *ANYWHERE, "module", "_orig_mod"]), min_size=1, max_size=3)
SEGMENTS = st.sampled_from(
    [
        "module",
        "mlp_module",
        "modules",
        "layer",
        "0",
        "weight",
        "",
        " ",
        "é",
        "重み",
        "a/b",
        "../x",
        "'",
        '"',
        "\n",
        "{}",
    ]
) | st.text(max_size=4)
KEYS = st.lists(SEGMENTS, max_size=4).map(".".join) | st.sampled_from(["", "format", "__metadata", "state", "a::b"])
"""Names of tensors."""


@st.composite
def storages(draw: st.DrawFn, dtypes: list[str]) -> torch.Tensor:
    """A flat tensor of random bits that owns its storage."""
    dtype = getattr(torch, draw(st.sampled_from(dtypes)))
    numel = draw(st.integers(0, 12))
    raw = bytearray(draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize)))
    if not raw:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8).clone()
    return (flat & 1 if dtype is torch.bool else flat).view(dtype)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """A view of ``base``: whole, or of any size, stride and offset that stay inside."""
    if draw(st.booleans()):
        return base
    shape, stride = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=3).map(_columns))
    while _reach(shape, stride) > base.numel():
        shape, stride = shape[1:], stride[1:]
        if not shape and not base.numel():
            return base
    offset = draw(st.integers(0, base.numel() - _reach(shape, stride)))
    view = torch.as_strided(base, shape, stride, offset)
    if view.is_complex() and view.dtype in (torch.complex64, torch.complex128) and draw(st.booleans()):
        return view.conj()
    if view.dtype in (torch.float64, torch.float32) and draw(st.integers(0, 3)) == 0:
        return torch._neg_view(view)
    return view


def _columns(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [size for size, _ in pairs], [step for _, step in pairs]


def _reach(shape: list[int], stride: list[int]) -> int:
    """Elements from the first to the last that a view touches."""
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


@st.composite
def state_dicts(
    draw: st.DrawFn, dtypes: list[str] = STORABLE, names: st.SearchStrategy[str] = KEYS
) -> dict[str, torch.Tensor]:
    """Named views of a few storages, so that many are tied or overlap."""
    bases = draw(st.lists(storages(dtypes), min_size=1, max_size=4))
    state: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(names, min_size=1, max_size=8, unique=True)):
        if state and draw(st.integers(0, 4)) == 0:
            state[name] = draw(st.sampled_from(list(state.values())))  # the very same object
            continue
        tensor = draw(views(draw(st.sampled_from(bases))))
        if tensor.is_floating_point() and not tensor.is_neg() and draw(st.booleans()):
            tensor = torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
        state[name] = tensor
    if draw(st.booleans()):
        state = collections.OrderedDict(state)
        state._metadata = collections.OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    return state


@st.composite
def resumes(
    draw: st.DrawFn, dtypes: list[str] = STORABLE, names: st.SearchStrategy[str] = KEYS
) -> dict[str | int, Any]:
    """A training state: weights under ``state_dict``, and beside them what trainers keep, some of it shared."""
    state = draw(state_dicts(dtypes, names))
    moments = draw(st.lists(views(draw(storages(["float32", "float64"]))), max_size=3))
    tree: dict[str | int, Any] = {"epoch": draw(st.integers()), "state_dict": state}
    if draw(st.booleans()):
        group: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "params": list(range(len(state)))}
        if draw(st.booleans()):
            group["param_names"] = [*state, "another"]
        tree["optimizer"] = {
            "state": {number: {"step": torch.tensor(3.0), "exp_avg": moment} for number, moment in enumerate(moments)},
            "param_groups": [group],
        }
    if draw(st.booleans()):
        tree["ema"] = {"shadow": [*moments, *list(state.values())[:2]], "decay": 0.999, 7: None}
    if draw(st.booleans()):
        tree[3] = {"best": [draw(st.floats(allow_nan=False))], ("a", 1): list(state.values())[-1:]}
    return tree


def tensors_of(tree: object) -> list[torch.Tensor]:
    """Every tensor of a tree of dicts, lists and tuples, in the order it is met, again where it stands again."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in tensors_of(value)]
    if isinstance(tree, (list, tuple)):
        return [tensor for value in tree for tensor in tensors_of(value)]
    return []


@st.composite
def tagged(draw: st.DrawFn, tensors: list[torch.Tensor]) -> dict[int, str]:
    """A device tag for the storage of each tensor, by the address of its data."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    addresses = list(dict.fromkeys(storage.data_ptr() for storage in storages if storage.nbytes()))
    return dict(
        zip(addresses, draw(st.lists(LOCATIONS, min_size=len(addresses), max_size=len(addresses))), strict=True)
    )
