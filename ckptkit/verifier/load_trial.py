"""Ask torch itself what ``load_state_dict`` would do, without moving a byte.

Comparing names is not enough: modules rename old keys while they load (torchvision's detection
heads, `BatchNorm` before version 2), or drop some.  So the model's own loading code runs on
tensors without data, every ``Tensor.copy_`` is noted instead of carried out, and what would be
missing, unexpected and copied is known as torch knows it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ckptkit.checkpoint import StateDict
from ckptkit.pickling.inert import mapping_items
from ckptkit.startup import dataclass
from ckptkit.torch_bridge import tensors
from ckptkit.verifier.foreign import foreign

__all__ = ["LoadTrial", "is_extra_state", "loadable", "try_load"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTrial:
    """What ``load_state_dict`` would do.

    Attributes:
        sources: for each name in the model that would be filled: the name in the file, or ``None``
            where the model's own code computes the value.
        missing, unexpected: as torch lists them, in its order.
    """

    sources: Mapping[str, str | None]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def loadable(state_dict: StateDict, values: Mapping[str, Any], expected: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The argument for ``load_state_dict``: the tensors, with the module versions that the file recorded.

    An object that is not a tensor (``_extra_state``) is never built from the file; if the model has one of that name,
    its own is used.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    for name in state_dict.everything:
        if name in values:
            state[name] = values[name]
        elif name not in expected:
            state[name] = torch.empty(0, device="meta")  # unexpected in any case; its value never counts
        elif is_extra_state(name) or not isinstance(expected[name], torch.Tensor):
            state[name] = expected[name]
    if state_dict.versions is not None:
        state._metadata = {  # type: ignore[attr-defined]
            path: _plain(node) or {} for path, node in state_dict.versions.items()
        }
    return state


def _plain(node: object) -> Any:
    """A module's versions, into which hooks put their own dicts (``spectral_norm``); ``None``: it is neither."""
    if isinstance(node, (int, str, float)):
        return node
    pairs = mapping_items(node)
    if pairs is None:
        return None
    plain = {key: _plain(value) for key, value in pairs if isinstance(key, str)}
    return {key: value for key, value in plain.items() if value is not None}


def is_extra_state(name: str) -> bool:
    """Whether it is what a module's ``get_extra_state`` returned, a tensor or not."""
    return name.rpartition(".")[2] == "_extra_state"


class _Noting(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Records every ``target.copy_(source)`` and executes none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.copies: list[tuple[torch.Tensor, Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and len(args) > 1:
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def try_load(model: nn.Module, expected: Mapping[str, Any], state_dict: StateDict) -> LoadTrial:
    """What loading the state_dict into the model would do.

    Args:
        model: the model; none of its tensors changes.
        expected: its ``state_dict(keep_vars=True)``.
        state_dict: the weights.
    """
    asked = _asked(model, expected, state_dict, tensors(state_dict, map_location="meta"))
    if asked is None:  # its own code may look at values
        asked = _asked(model, expected, state_dict, tensors(state_dict, map_location="cpu", mapped=True))
    if asked is not None:
        return asked
    # The model's own code gave up before the end both times: compare names alone.
    return LoadTrial(
        sources={n: n for n, v in state_dict.items() if getattr(expected.get(n), "shape", None) == v.shape},
        missing=tuple(n for n in expected if n not in state_dict.everything),
        unexpected=tuple(n for n in state_dict.everything if n not in expected),
    )


def _asked(
    model: nn.Module, expected: Mapping[str, Any], state_dict: StateDict, values: Mapping[str, torch.Tensor]
) -> LoadTrial | None:
    """What torch answers for these values; ``None``: the model's code fails."""
    # A module may do anything with its extra state, so it is shown its own.
    shown = {name: value for name, value in values.items() if not (name in expected and is_extra_state(name))}
    lists: list[tuple[list[str], list[str]]] = []

    def note(module: nn.Module, keys: Any) -> None:
        lists.append((list(keys.missing_keys), list(keys.unexpected_keys)))

    hook = model.register_load_state_dict_post_hook(note)  # type: ignore[no-untyped-call]
    noting = _Noting()
    try:
        with foreign(), noting, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_state_dict(loadable(state_dict, shown, expected), strict=False)
    except Exception:  # noqa: S110 - sizes that differ end here, and are told by comparing them
        pass
    finally:
        hook.remove()
    if not lists:
        return None
    missing_keys, unexpected_keys = lists[-1]
    return LoadTrial(
        sources=_sources(noting.copies, expected, values),
        missing=tuple(missing_keys),
        unexpected=tuple(unexpected_keys),
    )


def _sources(
    copies: list[tuple[torch.Tensor, Any]], expected: Mapping[str, Any], values: Mapping[str, torch.Tensor]
) -> dict[str, str | None]:
    """Where each name of the model gets its value from."""
    names_of: dict[int, list[str]] = {}
    for name, value in expected.items():
        names_of.setdefault(id(value), []).append(name)
    files_of: dict[int, list[str]] = {}
    for name, value in values.items():
        files_of.setdefault(id(value), []).append(name)
    sources: dict[str, str | None] = {}
    for target, source in copies:
        names, files = names_of.get(id(target), []), files_of.get(id(source), [])
        open_names = [n for n in names if n not in sources]
        if open_names:
            name = next((n for n in open_names if n in files), open_names[0])
            sources[name] = name if name in files else files[0] if files else None
    return sources
