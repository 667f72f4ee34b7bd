"""References: from what a user names to an ``nn.Module``.

- ``torchvision:NAME``: a model of ``torchvision.models``, built without downloading anything
- ``package.module:factory``: importable from the working directory, as ``python -m`` would
- ``path/to/file.py:factory``: a file, run as a module of its own

A factory is a function that returns a module, a module class, or a module itself.  It is the
user's own code; nothing in a checkpoint ever decides what is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.verifier.references import torchvision_models, user_code
from ckptkit.verifier.references.arguments import literal
from ckptkit.verifier.references.factory import ModelLike, Reference
from ckptkit.verifier.references.without_values import without_values

__all__ = ["FORMS", "ModelLike", "Reference", "build"]

FORMS = "torchvision:NAME, package.module:factory or path/to/file.py:factory"
"""How a reference is written."""


def build(model: ModelLike, args: Mapping[str, object]) -> tuple[nn.Module, Reference]:
    """The reference model, in eval mode, without values: its parameters lie on the meta device.

    Where it cannot be built so, it has values, as what `Reference.make` gives always has.

    Args:
        model: the reference.
        args: keyword arguments of its factory; strings that are Python literals become their
            value (``"10"``, ``"None"``, ``"(1, 2)"``), others stay strings.

    Raises:
        VerifyError: there is no such reference, or it could not be built.
        MissingDependencyError: it is of a package that is not installed.
    """
    values = {name: literal(value) for name, value in args.items()}
    if not isinstance(model, str):
        reference = user_code.of_object(model, values)
    else:
        source, colon, name = model.rpartition(":")
        if name.endswith(".py"):
            raise VerifyError(f"{model}: name the factory in it: {model}:NAME")
        if not colon or not source or not name:
            raise VerifyError(f"{model!r} is no reference; expected {FORMS}")
        if source == "torchvision":
            reference = torchvision_models.reference(name, values)
        else:
            reference = user_code.reference(model, source, name, values)
    return without_values(reference.make), reference
