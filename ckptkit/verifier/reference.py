"""References: from what a user names to an ``nn.Module``.

- ``torchvision:NAME``: a model of ``torchvision.models``, built without downloading anything
- ``package.module:factory``: importable from the working directory, as ``python -m`` would
- ``path/to/file.py:factory``: a file, run as a module of its own

A factory is a function that returns a module, a module class, or a module itself.  It is the
user's own code; nothing in a checkpoint ever decides what is imported here.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.extras import require
from ckptkit.verifier.families import default_inputs, takes_init_weights

__all__ = ["FORMS", "ModelLike", "Reference", "build"]

ModelLike = str | nn.Module | Callable[..., nn.Module]
"""A reference by name, a module, or whatever returns one."""

FORMS = "torchvision:NAME, package.module:factory or path/to/file.py:factory"
"""How a reference is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a model was built from.

    Attributes:
        spec: as the user named it; ``None`` where an object was given.
        label: for messages.
        args: the arguments it was built with, without those ckptkit adds.
        input_shapes: of the positional inputs it takes; empty where that is not known.
        takes_list: whether it takes a list of single images (torchvision's detection models).
    """

    spec: str | None
    label: str
    args: Mapping[str, object]
    input_shapes: tuple[tuple[int, ...], ...] = ()
    takes_list: bool = False

    @property
    def is_torchvision(self) -> bool:
        """Whether it is a model of torchvision's by name."""
        return self.spec is not None and self.spec.startswith("torchvision:")


def build(model: ModelLike, args: Mapping[str, object]) -> tuple[nn.Module, Reference]:
    """The reference model, in eval mode.

    Args:
        model: the reference.
        args: keyword arguments of its factory; strings that are Python literals become their
            value (``"10"``, ``"None"``, ``"(1, 2)"``), others stay strings.

    Raises:
        VerifyError: there is no such reference, or it could not be built.
        MissingDependencyError: it is torchvision's, which is not installed.
    """
    values = {name: _literal(value) for name, value in args.items()}
    if not isinstance(model, str):
        label = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "the factory")
        reference = Reference(spec=None, label=label, args=values)
        return _made(model, values, reference.label), reference
    source, colon, name = model.rpartition(":")
    if name.endswith(".py"):
        raise VerifyError(f"{model}: name the factory in it: {model}:NAME")
    if not colon or not source or not name:
        raise VerifyError(f"{model!r} is no reference; expected {FORMS}")
    if source == "torchvision":
        return _torchvision(name, values)
    reference = Reference(spec=model, label=model, args=values)
    is_file = source.endswith(".py") or "/" in source or os.sep in source
    with _importable(os.path.dirname(os.path.abspath(source)) if is_file else os.getcwd()):
        module = _file(source, model) if is_file else _module(source, model)
        return _made(_attribute(module, name, model), values, model), reference


def _literal(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


# torchvision.


def _torchvision(name: str, args: dict[str, object]) -> tuple[nn.Module, Reference]:
    require("torchvision")
    models = importlib.import_module("torchvision.models")
    spec = f"torchvision:{name}"
    if name not in models.list_models():
        raise VerifyError(f"torchvision has no model {name!r}{_close(name, models.list_models())}")
    for weights in ("weights", "weights_backbone", "pretrained", "pretrained_backbone"):
        if args.get(weights):
            raise VerifyError(f"{spec}: a reference is built without pretrained weights; leave {weights} out")
    builder = models.get_model_builder(name)
    added: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        added["weights_backbone"] = None
    if takes_init_weights(name):
        added["init_weights"] = False
    model = _made(builder, {**added, **args}, spec)
    module = builder.__module__
    reference = Reference(
        spec=spec,
        label=spec,
        args=args,
        input_shapes=default_inputs(module, name, args, models.get_model_weights(name).DEFAULT),
        takes_list=module.startswith("torchvision.models.detection"),
    )
    return model, reference


# The user's own code.


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
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise VerifyError(
                f"{spec}: there is no module {error.name!r} here ({os.getcwd()}) or among the installed packages"
            ) from None
        raise VerifyError(f"{spec}: importing {name} failed: {_told(error)}") from error
    except (Exception, SystemExit) as error:
        raise VerifyError(f"{spec}: importing {name} failed: {_told(error)}") from error


def _file(path: str, spec: str) -> Any:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise VerifyError(f"{spec}: there is no file {path!r}")
    name = "_ckptkit_reference_" + os.path.splitext(os.path.basename(path))[0]
    found = importlib.util.spec_from_file_location(name, os.path.abspath(path))
    if found is None or found.loader is None:
        raise VerifyError(f"{spec}: {path!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look classes up there
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise VerifyError(f"{spec}: running {path} failed: {_told(error)}") from error
    return module


def _attribute(module: Any, name: str, spec: str) -> Any:
    found = module
    for step in name.split("."):
        if not hasattr(found, step):
            names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise VerifyError(f"{spec}: there is no {step!r} in it{_close(step, names)}")
        found = getattr(found, step)
    return found


def _made(factory: Any, args: Mapping[str, object], spec: str) -> nn.Module:
    """The module a factory returns, in eval mode; a module given as it is is copied, not changed."""
    if isinstance(factory, nn.Module):
        if args:
            raise VerifyError(f"{spec}: is a module already and takes no arguments ({', '.join(args)})")
        try:
            return copy.deepcopy(factory).eval()
        except Exception as error:
            raise VerifyError(f"{spec}: the module cannot be copied: {_told(error)}; give a factory") from error
    if not callable(factory):
        raise VerifyError(f"{spec}: is of type {type(factory).__name__}; expected a function, a class or a module")
    _check_args(factory, args, spec)
    try:
        model = factory(**args)
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            raise VerifyError(f"{spec}: {error}") from error
        raise VerifyError(f"{spec}: building the model failed: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise VerifyError(f"{spec}: returned {type(model).__name__}; expected an nn.Module")
    return model.eval()


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
        hint = _close(unknown, known) if unknown is not None else "; give it with --model-arg NAME=VALUE"
        raise VerifyError(f"{spec}: {error}{hint}") from None


def _close(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _told(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
