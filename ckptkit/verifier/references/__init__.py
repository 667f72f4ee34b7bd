"""References: from what a user names to an ``nn.Module``.

- ``torchvision:NAME``: a model of ``torchvision.models``, built without downloading anything
- ``timm:NAME``: a timm model, likewise
- ``transformers:NAME`` or ``transformers:FOLDER``: a transformers model type with its default configuration, or with
  the ``config.json`` in a folder
- ``package.module:factory``: importable from the working directory, as ``python -m`` would
- ``path/to/file.py:factory``: a file, run as a separate module

A factory is a function that returns a module, a module class, or a module itself.  It is the
user's own code; nothing in a checkpoint ever decides what is imported here.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.nearness import did_you_mean, meant_file
from ckptkit.report import listed
from ckptkit.verifier.references import factory, libraries
from ckptkit.verifier.references.factory import ModelLike, Reference
from ckptkit.verifier.references.without_values import without_values

__all__ = ["FORMS", "ModelLike", "Reference", "build"]

FORMS = "torchvision:NAME, timm:NAME, transformers:NAME-OR-FOLDER, package.module:factory or path/to/file.py:factory"
"""How a reference is written."""

_PACKAGES = {
    "torchvision": libraries.torchvision_reference,
    "timm": libraries.timm_reference,
    "transformers": libraries.transformers_reference,
}


def build(model: ModelLike, args: Mapping[str, object]) -> tuple[nn.Module, Reference]:
    """The reference model, in eval mode, without values: its parameters are on the meta device.

    If it cannot be built that way, it has values, like every result of `Reference.make`.

    Args:
        model: the reference.
        args: keyword arguments of its factory; strings become values of the type its signature names, or, where
            it names none, what they are as Python literals (``"10"``, ``"None"``, ``"(1, 2)"``).

    Raises:
        VerifyError: there is no such reference, an argument does not fit, or it could not be built.
        MissingDependencyError: it is of a package that is not installed.
    """
    reference = _reference(model, args)
    reference = replace(reference, make=_seeded(reference.make))
    return without_values(reference.make), reference


def _reference(model: ModelLike, args: Mapping[str, object]) -> Reference:
    if not isinstance(model, str):
        return factory.of_object(model, args)
    package, colon, name = model.partition(":")
    if package in _PACKAGES and name:
        return _PACKAGES[package](name, args)
    source, colon, name = model.rpartition(":")
    if name.endswith(".py"):
        raise VerifyError(f"{model}: name the factory in it: {model}:NAME{_meant_factory(model)}")
    if not colon or not source or not name:
        raise VerifyError(f"{model!r} is not a reference; expected {FORMS}{_meant_model(model)}")
    return factory.reference(model, source, name, args)


def _meant_model(model: str) -> str:
    """The end of a message about a name without its library: the models of that name, or of one like it."""
    from ckptkit.architectures.index import LIBRARIES, load

    known = [f"{library}:{row.name}" for library in LIBRARIES for row in load(library).rows()]
    same = [each for each in known if each.partition(":")[2] == model.casefold()]
    bare = {each.partition(":")[2]: each for each in reversed(known)}
    if same:
        return f"; did you mean {' or '.join(same)}?"
    whole = did_you_mean(model, known)
    return whole if whole and "." in model else did_you_mean(model, bare, shown=bare.__getitem__) or whole


def _meant_factory(path: str) -> str:
    """The end of a message about a file without its factory: the functions and classes in it, which is not run."""
    try:
        with tokenize.open(path) as file:
            body = ast.parse(file.read()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return meant_file(path)
    made = (ast.FunctionDef, ast.ClassDef)
    names = [f"{path}:{each.name}" for each in body if isinstance(each, made) and not each.name.startswith("_")]
    return f"; there {'is' if len(names) == 1 else 'are'} {listed(names, 4)}" if names else ""


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Let every call draw the same random numbers: those that torch would draw now."""
    state = torch.get_rng_state()

    def seeded() -> nn.Module:
        torch.set_rng_state(state)
        return make()

    return seeded
