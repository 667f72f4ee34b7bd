"""A reference: a factory, its arguments as typed by a user, and the module it returns.

A factory is the user's own code: in an importable module, in a file, or an object in Python.
A parameter's annotation decides its type, otherwise its default; if neither does, a string that is a Python literal
becomes its value.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import copy
import enum
import importlib
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.nearness import did_you_mean, meant_file
from ckptkit.startup import dataclass
from ckptkit.verifier.foreign import error_text, foreign
from ckptkit.verifier.inputs import Input

__all__ = ["ModelLike", "Reference", "close", "literal", "made", "of_object", "reference", "typed"]

ModelLike = str | nn.Module | Callable[..., nn.Module]
"""A reference by name, a module, or whatever returns one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The recipe of a model.

    Attributes:
        spec: as the user named it; ``None`` where an object was given.
        label: for messages.
        args: the arguments it is built with, without those ckptkit adds.
        make: builds the model, in eval mode; each call makes another.
        inputs: of the model; empty if unknown.
        outputs: path to shape of each output for the first ``inputs``, ``None`` for an unknown size; empty if unknown.
    """

    spec: str | None
    label: str
    args: Mapping[str, object]
    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...] = ()
    outputs: Mapping[str, tuple[int | None, ...]] | None = None


def made(factory: Any, args: Mapping[str, object], spec: str) -> nn.Module:
    """The module a factory returns, in eval mode; a given module is copied, not changed."""
    if isinstance(factory, nn.Module):
        if args:
            raise VerifyError(f"{spec}: is already a module and takes no arguments ({', '.join(args)})")
        try:
            with foreign():
                return copy.deepcopy(factory).eval()
        except Exception as error:
            raise VerifyError(f"{spec}: the module cannot be copied: {error_text(error)}; give a factory") from error
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
        raise VerifyError(f"{spec}: building the model failed: {error_text(error)}") from error
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
    """Similar names, for the end of a message."""
    return did_you_mean(name, names)


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_PLAIN = (bool, int, float, str, list, tuple)


class _UnfitError(Exception):
    """A text is not a value of a type."""


def literal(value: object) -> object:
    """A string that is a Python literal as its value; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def typed(factory: Any, args: Mapping[str, object], spec: str) -> dict[str, object]:
    """The arguments, each string as a value of the type its parameter takes.

    Args:
        factory: what will be called; only its signature counts.
        args: as the user gave them; anything but a string is unchanged.
        spec: of the reference, for messages.

    Raises:
        VerifyError: a string is not a value of its parameter's type.
    """
    wanted = _wanted(factory) if any(isinstance(value, str) for value in args.values()) else {}
    values: dict[str, object] = {}
    for name, value in args.items():
        if not isinstance(value, str):
            values[name] = value
        elif name not in wanted:
            values[name] = literal(value)
        else:
            try:
                values[name] = _value(value, wanted[name])
            except _UnfitError:
                kind = _shown(wanted[name])
                raise VerifyError(
                    f"{spec}: --model-arg {name}={value}: expected {kind}, as the factory's signature says"
                ) from None
    return values


def _wanted(factory: Any) -> dict[str, Any]:
    """The types of the parameters that have one."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    wanted: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = _resolved(factory, parameter.annotation)
        if annotation is not parameter.empty and annotation is not None:
            wanted[name] = annotation
        elif isinstance(parameter.default, (*_PLAIN, enum.Enum)):
            # A default of 0 is as often meant for 0.1 as for 1.
            is_number = type(parameter.default) is int
            wanted[name] = int | float if is_number else type(parameter.default)
    return wanted


def _resolved(factory: Any, annotation: Any) -> Any:
    """The annotation; if it is text, as its module reads it, or empty if it cannot be read."""
    if not isinstance(annotation, str):
        return annotation
    function = inspect.unwrap(factory)
    names = getattr(function, "__globals__", None)
    if names is None:
        names = vars(sys.modules.get(getattr(function, "__module__", ""), typing))
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": annotation}), dict(names))["it"]
    except Exception:  # names that only a type checker sees
        return inspect.Parameter.empty


def _value(text: str, wanted: Any) -> object:
    """The text as a value of a type.

    Raises:
        _UnfitError: it is not one.
    """
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return _first_fitting(text, typing.get_args(wanted))
    if origin is typing.Annotated:
        return _value(text, typing.get_args(wanted)[0])
    if origin is typing.Literal:
        return _chosen(text, {str(choice): choice for choice in typing.get_args(wanted)})
    if (origin or wanted) in _SEQUENCES:
        return _sequence(text, origin or wanted, typing.get_args(wanted))
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return _chosen(text, {**{str(m.value): m for m in wanted}, **{m.name: m for m in wanted}})
    if wanted in (None, type(None)):
        return _chosen(text, {"None": None, "none": None})
    if wanted is str:
        return text
    if wanted is bool:
        return _chosen(text.lower(), {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)})
    if wanted in (int, float):
        return _number(text, wanted)
    value = literal(text)
    if (origin or wanted) in (dict, bytes, complex) and not isinstance(value, origin or wanted):
        raise _UnfitError
    return value


def _first_fitting(text: str, members: Sequence[Any]) -> object:
    # Every text is a string, so that comes last; "None" is meant literally.
    for member in sorted(members, key=lambda member: (member is str) - (member is type(None))):
        try:
            return _value(text, member)
        except _UnfitError:
            continue
    raise _UnfitError


def _chosen(text: str, choices: Mapping[str, object]) -> object:
    if text.strip() not in choices:
        raise _UnfitError
    return choices[text.strip()]


def _number(text: str, wanted: type) -> object:
    value = literal(text)
    if isinstance(value, int) and not isinstance(value, bool):
        return wanted(value)
    try:
        if wanted is float:
            return float(text)  # also inf and nan, which are not literals
    except ValueError:
        pass
    raise _UnfitError


def _sequence(text: str, kind: Any, items: Sequence[Any]) -> object:
    """``"1,2"``, ``"(1, 2)"`` and ``"[1, 2]"`` alike; the items as their types say."""
    value = literal(text)
    if isinstance(value, (list, tuple)):
        parts = [item if isinstance(item, str) else repr(item) for item in value]
    else:
        parts = [part.strip() for part in text.strip().strip("()[]").split(",") if part.strip()]
    if kind is tuple and items and items[-1] is not Ellipsis:
        if len(parts) != len(items):
            raise _UnfitError
        made = [_value(part, item) for part, item in zip(parts, items, strict=True)]
    else:
        made = [_value(part, items[0]) if items else literal(part) for part in parts]
    return list(made) if not isinstance(kind, type) or kind.__module__ == "collections.abc" else kind(made)


def _shown(wanted: Any) -> str:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_shown(member) for member in typing.get_args(wanted))
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return "one of " + ", ".join(member.name for member in wanted)
    if wanted is type(None):
        return "None"
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)


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
    with importable(folder):
        module = _file(source, spec) if is_file else _module(source, spec)
        factory = _attribute(module, name, spec)
    values = typed(factory, args, spec)

    def make() -> nn.Module:
        with importable(folder):
            return made(factory, values, spec)

    return Reference(spec=spec, label=spec, args=values, make=make)


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """Let modules in the folder be imported, as Python lets a script import its neighbours."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


_PACKAGES = ("torchvision", "timm", "transformers")
"""Those whose models need no module's name."""


def _module(name: str, spec: str) -> Any:
    try:
        with foreign():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            meant = did_you_mean(name, _PACKAGES, shown=lambda package: spec.replace(name, package, 1))
            raise VerifyError(
                f"{spec}: there is no module {error.name!r} here ({os.getcwd()}) or among the installed packages{meant}"
            ) from None
        raise VerifyError(f"{spec}: importing {name} failed: {error_text(error)}") from error
    except Exception as error:
        raise VerifyError(f"{spec}: importing {name} failed: {error_text(error)}") from error


def _file(path: str, spec: str) -> Any:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise VerifyError(f"{spec}: there is no file {path!r}{meant_file(path)}")
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
        raise VerifyError(f"{spec}: running {path} failed: {error_text(error)}") from error
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
