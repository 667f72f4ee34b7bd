"""What a reference is, and the module its factory returns."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.verifier.foreign import foreign, told
from ckptkit.verifier.inputs import Input

__all__ = ["ModelLike", "Reference", "close", "made"]

ModelLike = str | nn.Module | Callable[..., nn.Module]
"""A reference by name, a module, or whatever returns one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a model is built from.

    Attributes:
        spec: as the user named it; ``None`` where an object was given.
        label: for messages.
        args: the arguments it is built with, without those ckptkit adds.
        make: builds the model, in eval mode; each call makes another.
        inputs: what the model takes; empty where that is not known.
        outputs: path to shape of each output for the first ``inputs``, ``None`` for a size that is not known;
            empty where that is not known.
    """

    spec: str | None
    label: str
    args: Mapping[str, object]
    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...] = ()
    outputs: Mapping[str, tuple[int | None, ...]] | None = None


def made(factory: Any, args: Mapping[str, object], spec: str) -> nn.Module:
    """The module a factory returns, in eval mode; a module given as it is is copied, not changed."""
    if isinstance(factory, nn.Module):
        if args:
            raise VerifyError(f"{spec}: is a module already and takes no arguments ({', '.join(args)})")
        try:
            with foreign():
                return copy.deepcopy(factory).eval()
        except Exception as error:
            raise VerifyError(f"{spec}: the module cannot be copied: {told(error)}; give a factory") from error
    if not callable(factory):
        raise VerifyError(f"{spec}: is of type {type(factory).__name__}; expected a function, a class or a module")
    _check_args(factory, args, spec)
    try:
        with foreign():
            model = factory(**args)
            if isinstance(model, nn.Module):
                return model.eval()
    except Exception as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            raise VerifyError(f"{spec}: {error}") from error
        raise VerifyError(f"{spec}: building the model failed: {told(error)}") from error
    raise VerifyError(f"{spec}: returned {type(model).__name__}; expected an nn.Module")


def _check_args(factory: Any, args: Mapping[str, object], spec: str) -> None:
    """Unknown and missing arguments, before anything is built."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # some built-in callables have none
    try:
        signature.bind(**args)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        unknown = next((name for name in args if name not in known), None)
        hint = close(unknown, known) if unknown is not None else "; give it with --model-arg NAME=VALUE"
        raise VerifyError(f"{spec}: {error}{hint}") from None


def close(name: str, names: list[str]) -> str:
    """What may have been meant, for the end of a message."""
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
