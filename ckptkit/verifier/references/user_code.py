"""The user's own code as a reference: an importable module, a file, or an object in Python."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.verifier.foreign import foreign, told
from ckptkit.verifier.references.arguments import typed
from ckptkit.verifier.references.factory import Reference, close, made

__all__ = ["of_object", "reference"]

_MISSING = object()


def of_object(model: nn.Module | Callable[..., nn.Module], args: Mapping[str, object]) -> Reference:
    """A module, which is copied each time, or what returns one."""
    label = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "the factory")
    values = typed(model, args, label)
    return Reference(spec=None, label=label, args=values, make=lambda: made(model, values, label))


def reference(spec: str, source: str, name: str, args: Mapping[str, object]) -> Reference:
    """The factory ``name`` in a module or file.

    Raises:
        VerifyError: there is none, or importing it failed.
    """
    is_file = source.endswith(".py") or "/" in source or os.sep in source
    folder = os.path.dirname(os.path.abspath(source)) if is_file else os.getcwd()
    with _importable(folder):
        module = _file(source, spec) if is_file else _module(source, spec)
        factory = _attribute(module, name, spec)
    values = typed(factory, args, spec)

    def make() -> nn.Module:
        with _importable(folder):
            return made(factory, values, spec)

    return Reference(spec=spec, label=spec, args=values, make=make)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Let modules in the folder be imported, as Python lets a script import its neighbours."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _module(name: str, spec: str) -> Any:
    try:
        with foreign():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise VerifyError(
                f"{spec}: there is no module {error.name!r} here ({os.getcwd()}) or among the installed packages"
            ) from None
        raise VerifyError(f"{spec}: importing {name} failed: {told(error)}") from error
    except Exception as error:
        raise VerifyError(f"{spec}: importing {name} failed: {told(error)}") from error


def _file(path: str, spec: str) -> Any:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise VerifyError(f"{spec}: there is no file {path!r}")
    name = "_ckptkit_reference_" + os.path.splitext(os.path.basename(path))[0]
    found = importlib.util.spec_from_file_location(name, os.path.abspath(path))
    if found is None or found.loader is None:
        raise VerifyError(f"{spec}: {path!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look classes up there
    try:
        with foreign():
            found.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise VerifyError(f"{spec}: running {path} failed: {told(error)}") from error
    return module


def _attribute(module: Any, name: str, spec: str) -> Any:
    found = module
    for step in name.split("."):
        with foreign(f"{spec}: looking up {step!r} failed"):
            following = getattr(found, step, _MISSING)
        if following is _MISSING:
            names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise VerifyError(f"{spec}: there is no {step!r} in it{close(step, names)}")
        found = following
    return found
