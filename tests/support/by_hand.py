"""What ``convert`` does, done in torch by hand: to the loaded tree, in the order its docstring gives."""

from __future__ import annotations

import fnmatch
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ckptkit.dtypes import DTYPES
from support.generated_tensors import ANYWHERE, LEADING
from support.torch_oracle import Loaded

__all__ = ["Refused", "by_hand"]


class Refused(Exception):
    """It cannot be done."""


def by_hand(
    loaded: Loaded,
    *,
    leave_out: Sequence[str] = (),
    weights_only: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    keep_dtype: Sequence[str] = (),
    strip_module: bool = False,
    add_module: bool = False,
    strip_prefix: str | None = None,
    add_prefix: str | None = None,
    rename: Sequence[str] = (),
    map_location: str | Mapping[str, str] | None = None,
    tied: str = "alias",
) -> Loaded:
    """The tree as it should be after a conversion, with the tags its storages should have.

    Module versions stay as they are, whatever the names become.
    """
    hand = _Hand(loaded)
    tree = hand.copied(loaded.tree)
    for key in leave_out:
        (place,) = [known for known in tree if str(known) == key]
        del tree[place]
    if weights_only:
        tree = _state_dict(tree)
    state = _state_dict(tree)
    renamers = _renamers(strip_module, add_module, strip_prefix, add_prefix, rename)

    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(known, glob) for known in (name, _final(name, renamers)) for glob in globs)

    if include or exclude:
        if any(not any(matches(name, [glob]) for name in state) for glob in include):
            raise Refused("a glob matches nothing")
        dropped = [n for n in state if (include and not matches(n, include)) or matches(n, exclude)]
        if len(dropped) == len(state):
            raise Refused("nothing is left")
        if "optimizer" in tree and not all(_counts(state[name]) for name in dropped):
            raise Refused("the optimizer goes by the position of parameters")
        for name in dropped:
            del state[name]
    if dtype is not None:
        if any(not any(matches(name, [glob]) for name in state) for glob in keep_dtype):
            raise Refused("a glob matches nothing")
        hand.cast(tree, state, getattr(torch, dtype), {name for name in state if matches(name, keep_dtype)})
    for renamer in renamers:
        _renamed(tree, state, renamer)
    if map_location is not None:
        mapping = map_location if isinstance(map_location, Mapping) else dict.fromkeys(loaded.of.values(), map_location)
        hand.of = {storage: mapping.get(tag, tag) for storage, tag in hand.of.items()}
    if tied != "alias":
        hand.untie(state, refuse=tied == "error")
    return Loaded(tree, of=hand.of, kept=hand.kept)


def _state_dict(tree: Any) -> dict[str, torch.Tensor]:
    return tree["state_dict"] if "state_dict" in tree and isinstance(tree["state_dict"], dict) else tree


def _counts(tensor: torch.Tensor) -> bool:
    """Whether it is of a dtype that no parameter has."""
    return DTYPES[str(tensor.dtype).removeprefix("torch.")].kind in ("int", "bool")


# Names.

Renamer = Callable[[str], str]


def _renamers(
    strip_module: bool, add_module: bool, strip_prefix: str | None, add_prefix: str | None, rename: Sequence[str]
) -> list[Renamer]:
    made: list[Renamer] = []
    if strip_module:
        made.append(_bare)
    if add_module:
        made.append(lambda name: f"module.{name}")
    if strip_prefix is not None:
        made.append(lambda name: name[len(strip_prefix) + 1 :] if name.startswith(strip_prefix + ".") else name)
        if strip_module and not add_module:  # what was behind the prefix
            made.append(_bare)
    if add_prefix is not None:
        made.append(lambda name: f"{add_prefix}.{name}")
    if rename:
        made.append(lambda name: _ruled(name, rename))
    return made


def _bare(name: str) -> str:
    while re.match(rf"({'|'.join((*LEADING, *ANYWHERE))})\.", name):
        name = name.split(".", 1)[1]
    for wrapper in ANYWHERE:
        while f".{wrapper}." in name:
            name = name.replace(f".{wrapper}.", ".")
    return name


def _ruled(name: str, rules: Sequence[str]) -> str:
    emptied = False
    for rule in rules:
        pattern, replacement = rule.split("=>", 1)
        before, name = name, re.sub(pattern, replacement, name)
        emptied = emptied or (bool(before) and not name)
    if emptied and not name:
        raise Refused("nothing is left of a name")
    return name


def _final(name: str, renamers: Sequence[Renamer]) -> str:
    for renamer in renamers:
        name = renamer(name)
    return name


def _renamed(tree: Any, state: dict[str, torch.Tensor], renamer: Renamer) -> None:
    """Rename in place: the state_dict and the names an optimizer keeps."""
    targets = {name: renamer(name) for name in state}
    if len(set(targets.values())) < len(targets):
        raise Refused("two names become one")
    values = [(targets[name], value) for name, value in state.items()]
    state.clear()
    state.update(values)
    for group in tree["optimizer"]["param_groups"] if "optimizer" in tree and state is not tree else []:
        if "param_names" in group:
            group["param_names"] = [targets.get(name, name) for name in group["param_names"]]


# Tensors.


class _Hand:
    """Copies trees whose containers are changed in place, and makes tensors over other storages."""

    def __init__(self, loaded: Loaded) -> None:
        self.of = dict(loaded.of)
        self.kept = list(loaded.kept)
        self._copies: dict[int, Any] = {}

    def copied(self, node: Any) -> Any:
        """The same tensors in containers of its own; what is shared stays shared."""
        if not isinstance(node, (dict, list, tuple)):
            return node
        if id(node) not in self._copies:
            if isinstance(node, dict):
                copy = type(node)()
                self._copies[id(node)] = copy
                copy.update((key, self.copied(value)) for key, value in node.items())
                if hasattr(node, "_metadata"):
                    copy._metadata = OrderedDict(node._metadata)
            else:
                copy = self._copies[id(node)] = type(node)(map(self.copied, node))
        return self._copies[id(node)]

    def cast(self, tree: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, kept: set[str]) -> None:
        """Cast the storages of floating tensors of the state_dict, with all that views them."""
        stays = {state[name].untyped_storage()._cdata for name in kept}
        flats: dict[int, torch.Tensor] = {}
        for tensor in state.values():
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and tensor.dtype != dtype and storage._cdata not in stays | flats.keys():
                whole = torch.empty(0, dtype=tensor.dtype).set_(
                    storage, 0, (storage.nbytes() // tensor.element_size(),)
                )
                if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
                    raise Refused("torch casts no such type")
                flats[storage._cdata] = _cast(whole, dtype)
                self._has_tag(flats[storage._cdata].untyped_storage(), self.of[storage._cdata])
        made: dict[int, torch.Tensor] = {}

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            flat = flats.get(tensor.untyped_storage()._cdata)
            if flat is None:
                return tensor
            if id(tensor) not in made:
                made[id(tensor)] = _over(flat, tensor)
            return made[id(tensor)]

        _replace(tree, leaf, set())

    def untie(self, state: dict[str, torch.Tensor], *, refuse: bool) -> None:
        """Give every name but the first of a tensor a storage of its own."""
        seen: set[object] = set()
        for name, tensor in state.items():
            storage = tensor.untyped_storage()
            view = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            if not tensor.numel() or (*view, tensor.is_conj(), tensor.is_neg()) not in seen:
                seen.add((*view, tensor.is_conj(), tensor.is_neg()))
                continue
            if refuse:
                raise Refused("tied")
            state[name] = _over(torch.empty(0, dtype=tensor.dtype).set_(storage.clone()), tensor)
            self._has_tag(state[name].untyped_storage(), self.of[storage._cdata])

    def _has_tag(self, storage: torch.UntypedStorage, tag: str) -> None:
        self.of[storage._cdata] = tag
        self.kept.append(storage)


def _over(flat: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The same view of another storage."""
    made = torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset())
    made = torch._neg_view(made) if tensor.is_neg() else made
    made = made.conj() if tensor.is_conj() else made
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def _replace(node: Any, leaf: Callable[[torch.Tensor], torch.Tensor], seen: set[int]) -> None:
    """Replace the tensors of dicts and lists in place."""
    if id(node) in seen or not isinstance(node, (dict, list)):
        return
    seen.add(id(node))
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, torch.Tensor):
            node[key] = leaf(value)
        else:
            _replace(value, leaf, seen)


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As torch 2.15 casts; before it, float8_e4m3fn had NaN for what is past its range."""
    if dtype != torch.float8_e4m3fn:
        return values.to(dtype)
    wide = values.double()
    return torch.where(wide.isnan(), wide, wide.clamp(-448.0, 448.0)).to(dtype)
