"""Models whose parameters have a shape and no values: nothing is drawn at random, no memory is taken.

While a factory runs, each parameter it registers is replaced with one of the same shape, stride, dtype and sharing on
the meta device; buffers and plain attributes do not change, because a checkpoint may not contain them.  The way in is
torch's own hook, ``register_module_parameter_registration_hook`` of ``torch/nn/modules/module.py`` (since 2.0), which
adds to nothing but registration, and only in this thread.

A factory may do what cannot be done without values: read them, keep a parameter in a place where no
``load_state_dict`` finds it, compute a buffer from one.  All of that is searched for afterwards, and such a model is
built once more, with values.
"""

from __future__ import annotations

import gc
import sys
import threading
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from ckptkit.errors import VerifyError
from ckptkit.verifier.foreign import foreign

__all__ = ["without_values"]

_CHECKED_REFERRERS = 4
"""Parameters whose other owners are looked up; each costs a walk over all Python objects."""


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """The model, with its parameters on the meta device if that does no harm, otherwise with values.

    Args:
        make: builds the model; each call makes another, out of the same random state.

    Raises:
        VerifyError: as ``make``.
    """
    shells = _Shells()
    try:
        model = shells.run(make)
    except VerifyError:
        if not shells.count:
            raise
    else:
        if not shells.count or shells.are_all_of(model):
            return model
        del model
    return make()


class _Shells:
    """The parameters without values of one model, and the originals."""

    def __init__(self) -> None:
        self.count = 0
        self._thread = threading.get_ident()
        # The weak reference to a storage keeps its address from being used again.
        self._storages: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._of: dict[int, tuple[weakref.ref[nn.Parameter], weakref.ref[nn.Parameter]]] = {}
        self._made: list[weakref.ref[nn.Parameter]] = []

    def run(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The model, each of its parameters replaced as it is registered."""
        handle = register_module_parameter_registration_hook(self._replaced)  # type: ignore[arg-type]
        try:
            with warnings.catch_warnings():
                # A factory that loads its own checkpoint: those values are not needed.
                warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")
                return make()
        finally:
            handle.remove()

    def _replaced(self, module: nn.Module, name: str, given: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != self._thread or type(given) is not nn.Parameter:
            return None
        if given.is_meta or given.layout is not torch.strided:
            return None
        original, shell = self._of.get(id(given), (None, None))
        known = shell() if shell is not None and original is not None and original() is given else None
        if known is None:
            known = self._shell(given)
            self._of[id(given)] = weakref.ref(given), weakref.ref(known)
            self._made.append(weakref.ref(known))
            self.count += 1
        return known

    def _shell(self, given: nn.Parameter) -> nn.Parameter:
        storage = given.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        _, meta = self._storages.setdefault(
            weak.cdata,
            (weak, torch.UntypedStorage(storage.nbytes(), device="meta")),  # type: ignore[no-untyped-call]
        )
        view = torch.empty((0,), dtype=given.dtype, device="meta")
        view = view.set_(meta, given.storage_offset(), given.shape, given.stride())
        shell = nn.Parameter(view, requires_grad=given.requires_grad)
        shell.__dict__.update(given.__dict__)
        return shell

    def are_all_of(self, model: nn.Module) -> bool:
        """Whether filling the model's parameters makes it what it would be, had it been built with values."""
        modules = list(model.modules())
        owned = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
        return (
            all(type(p) is nn.Parameter and p.is_meta for p in owned.values())
            and not any(isinstance(module, torch.jit.ScriptModule) for module in modules)
            and not any(buffer.is_meta for buffer in model.buffers())
            and not any(_has_derived(module, owned) or _may_lack_parts(module) for module in modules)
            and not _overlap(owned)
            and not self._left_over(owned)
            and not _held_elsewhere(modules, owned)
            and _gives_its_state(model)
        )

    def _left_over(self, owned: dict[int, nn.Parameter]) -> bool:
        """Whether anything holds a parameter that was replaced, its memory, or a parameter that is not in the model."""

        def is_alive() -> bool:
            kept = not all(weak.expired() for weak, _ in self._storages.values())  # type: ignore[no-untyped-call]
            return kept or any(shell() is not None and id(shell()) not in owned for shell in self._made)

        if is_alive():
            gc.collect()  # references in cycles do not count
            return is_alive()
        return False


def _has_derived(module: nn.Module, owned: dict[int, nn.Parameter]) -> bool:
    """Whether a plain attribute holds a parameter, or a tensor computed from one.

    The flat list of a recurrent layer is kept up to date by its ``__setattr__``.
    """
    pending = [
        value
        for name, value in vars(module).items()
        if name not in ("_parameters", "_modules", "_buffers")
        and not (name == "_flat_weights" and isinstance(module, nn.RNNBase))
    ]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if value.is_meta or id(value) in owned:
                return True
        elif isinstance(value, (list, tuple, set, dict)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
    return False


def _may_lack_parts(module: nn.Module) -> bool:
    """Whether a parametrization may be without what it computes from the first weight.

    If it needs values it can fail with NotImplementedError (up to torch 2.2 each read of a value does), which
    ``register_parametrization`` misreads as "has no right inverse".
    """
    return isinstance(module, parametrize.ParametrizationList) and any(
        hasattr(each, "right_inverse") and type(each) is not _WeightNorm for each in module
    )


def _overlap(owned: dict[int, nn.Parameter]) -> bool:
    """Whether parameters share memory and are not the same view of it."""
    views: dict[int, object] = {}
    for p in owned.values():
        view = (p.storage_offset(), p.shape, p.stride(), p.dtype)
        if p.numel() and views.setdefault(p.untyped_storage()._cdata, view) != view:
            return True
    return False


def _held_elsewhere(modules: list[nn.Module], owned: dict[int, nn.Parameter]) -> bool:
    """Whether anything but the modules holds a parameter, and would keep one without values."""
    lists: list[Any] = [module._parameters for module in modules]
    lists += [module._flat_weights for module in modules if isinstance(module, nn.RNNBase)]
    holders = Counter(map(id, _entries(lists)))
    # What the count is of a parameter that nobody else holds differs between Pythons: one tells.
    alone = nn.Linear(1, 1, bias=False, device="meta")
    usual = _counts({0: alone.weight})[0] - 1
    counts = _counts(owned)
    suspects = [key for key in owned if counts[key] - holders[key] > usual]
    known = {id(each) for each in (*lists, owned)}
    return any(
        id(referrer) not in known and not isinstance(referrer, types.FrameType)
        for key in suspects[:_CHECKED_REFERRERS]
        for referrer in gc.get_referrers(owned[key])
    )


def _entries(lists: list[Any]) -> Iterator[object]:
    for each in lists:
        yield from each.values() if isinstance(each, dict) else each


def _counts(owned: Mapping[int, torch.Tensor]) -> dict[int, int]:
    return {key: sys.getrefcount(owned[key]) for key in owned}


def _gives_its_state(model: nn.Module) -> bool:
    try:
        with foreign():
            model.state_dict(keep_vars=True)
    except Exception:  # an extra state made of values
        return False
    return True
