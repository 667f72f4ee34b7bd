"""Arguments of a factory: from what a user typed to the values it takes.

What a parameter takes is said by its annotation, else by its default; where neither says, a string that is a
Python literal becomes its value.
"""

from __future__ import annotations

import ast
import collections.abc
import enum
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.errors import VerifyError

__all__ = ["literal", "typed"]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_PLAIN = (bool, int, float, str, list, tuple)


class _UnfitError(Exception):
    """A text is no value of a type."""


def literal(value: object) -> object:
    """A string that is a Python literal as its value; anything else as it is."""
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
        args: as the user gave them; what is no string stays as it is.
        spec: of the reference, for messages.

    Raises:
        VerifyError: a string is no value of its parameter's type.
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
    """The annotation; one that is text, as its module reads it, or empty where it cannot be read."""
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
        _UnfitError: it is none.
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
    # Every text is a string, so that comes last; "None" is meant as it stands.
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
