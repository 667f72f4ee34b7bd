"""Placeholders for values that only other code can build, and the plain values that Python makes by a call.

A file describes an object by the name of its class, what it was made from, and its attributes.  A `Foreign` shows that,
and does nothing.  Its class is this one, whatever the file says: no name in the file is looked up, none is imported,
and no name with two underscores on both sides, which Python would call, is taken from it.
"""

from __future__ import annotations

import datetime
import decimal
import pathlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ckptkit.errors import CorruptError
from ckptkit.pickling.inert import (
    ABSENT,
    Global,
    InertDict,
    Object,
    PersistentId,
    attributes,
    mapping_items,
    named_items,
)

__all__ = ["Builder", "Foreign", "is_dunder", "plain_value", "stand_in"]

_SHOWN = 100
"""Characters of a ``repr`` that attributes are added to."""

_VALUE = 30
"""Characters of one value in it."""

_BUILTIN = {
    **dict.fromkeys(("range", "xrange"), (range, (int,))),
    "slice": (slice, (int, type(None))),
    "complex": (complex, (int, float)),
    "bytes": (bytes, ()),
    "bytearray": (bytearray, (bytes, str)),
    **{kind.__name__: (kind, (list, tuple)) for kind in (set, frozenset, list, tuple)},
}
_PATHS = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}

_MADE: dict[str, tuple[Callable[..., object], tuple[type, ...]]] = {
    **{f"{module}.{name}": row for module in ("builtins", "__builtin__") for name, row in _BUILTIN.items()},
    **{
        f"{module}.{pure}{name}": (kind, (str,))
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for name, kind in _PATHS.items()
    },
    "datetime.datetime": (datetime.datetime, (bytes, int, datetime.tzinfo)),
    "datetime.date": (datetime.date, (bytes, int)),
    "datetime.time": (datetime.time, (bytes, int, datetime.tzinfo)),
    "datetime.timedelta": (datetime.timedelta, (int,)),
    "datetime.timezone": (datetime.timezone, (datetime.timedelta, str)),
    "decimal.Decimal": (decimal.Decimal, (str,)),
}
"""Python's own types that are made by a call, and the types of its arguments: with a number for its size,
``bytearray`` would take any memory.  A path is one that looks at no disk."""


class Foreign:
    """Represents an object of a foreign class, or a class or function that a file names.

    Its attributes are those in the file: ``args.lr``, ``vars(args)``.  A dict or list of a custom class has its content
    too: ``config["lr"]``, ``len(config)``, ``dict(config)``; a name that is not an attribute is looked up as a key.
    A module has its parameters, buffers and modules as attributes, as in torch. Two are equal only if they are the
    same object.  It cannot be called, and has no methods of the class it represents.

    Attributes:
        __name__: the name of the class, function or the like: ``"argparse.Namespace"``.
        __args__: what the object was made from, by position; ``None``: the file only names it.
        __kwargs__: the same by keyword.
        __content__: its dict or list; ``None``: it is neither.
        __state__: what it was filled with, if that is not attributes; otherwise ``None``.
    """

    __slots__ = ("__args__", "__content__", "__dict__", "__kwargs__", "__name__", "__state__", "__weakref__")

    __args__: tuple[Any, ...] | None
    __kwargs__: dict[Any, Any]
    __content__: dict[Any, Any] | list[Any] | None
    __state__: Any

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.__args__ = None
        self.__kwargs__ = {}
        self.__content__ = None
        self.__state__ = None

    def __getattr__(self, name: str) -> Any:
        """What is not an attribute in the file: a key of its content, or a part of a module."""
        if not is_dunder(name):
            stores = [self.__content__, *(vars(self).get(store) for store in ("_parameters", "_buffers", "_modules"))]
            for store in stores:
                if isinstance(store, dict) and name in store:
                    return store[name]
            raise AttributeError(f"the file has no attribute {name!r:.100} of this {self.__name__:.100}")
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        if self.__content__ is None:
            raise TypeError(f"{self.__name__:.100} is neither a dict nor a list in the file")
        return self.__content__[key]

    def __iter__(self) -> Iterator[Any]:
        if self.__content__ is None:
            raise TypeError(f"{self.__name__:.100} is neither a dict nor a list in the file")
        return iter(self.__content__)

    def __len__(self) -> int:
        return 0 if self.__content__ is None else len(self.__content__)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, key: object) -> bool:
        return self.__content__ is not None and key in self.__content__

    def keys(self) -> list[Any]:
        """The keys of a dict of a custom class; for others, the names of attributes."""
        return list(self.__content__ if isinstance(self.__content__, dict) else vars(self))

    def __repr__(self) -> str:
        text = f"<{self.__name__:.100}"
        if self.__args__ is None:
            return f"{text}, by name>"
        content = self.__content__ if isinstance(self.__content__, dict) else {}
        own = [(name, value) for name, value in vars(self).items() if not name.startswith("_")]
        for name, value in [*((None, part) for part in self.__args__), *content.items(), *own]:
            if len(text) > _SHOWN:
                return f"{text} ...>"
            text += " " if name is None else f" {_told(name)}=" if not isinstance(name, str) else f" {name:.{_VALUE}}="
            text += _told(value)
        return f"{text}>"


def _told(value: object) -> str:
    """A value in a few characters, which do not grow with it."""
    if isinstance(value, (str, bytes)):
        return f"{value[:_VALUE]!r:.{_VALUE}}"
    if isinstance(value, (int, float, type(None))):
        return f"{value!r:.{_VALUE}}"
    return f"<{value.__name__:.{_VALUE}}>" if isinstance(value, Foreign) else f"<{type(value).__name__}>"


def is_dunder(name: str) -> bool:
    """Whether Python finds what to call by such names."""
    return name.startswith("__") and name.endswith("__")


_CONFIG = "omegaconf."
"""Where the classes of configurations are, each of whose values is an object that has it as ``_val``."""


class Builder(Protocol):
    """Makes values of nodes."""

    def __call__(self, node: object, step: object = None) -> Any:
        """The value of a node; ``step`` is what leads to it, for messages."""

    def keys(self, nodes: Sequence[object]) -> list[Any]:
        """The values of a dict's keys."""


def stand_in(node: object, build: Builder, keep: Callable[[object], object]) -> Any:
    """The value for a node that cannot be built.

    Args:
        node: an object, a name, or a reference to something outside the pickle.
        build: makes the values of what hangs there.
        keep: called with the placeholder before it is filled: its values may refer back to it.
    """
    if isinstance(node, Global):
        return Foreign(node.qualified)
    if not isinstance(node, Object):
        made = Foreign("persistent id" if isinstance(node, PersistentId) else type(node).__name__)
        keep(made)
        made.__args__ = (build(node.pid),) if isinstance(node, PersistentId) else ()
        return made
    if node.class_name in ("builtins.getattr", "__builtin__.getattr") and len(node.args) == 2:
        of, name = node.args  # a member of an enumeration, a method of a class
        if isinstance(of, Global) and isinstance(name, str):
            return Foreign(f"{of.qualified}.{name}")
    own = attributes(node)
    if own is not None and "_val" in own and node.class_name.startswith(_CONFIG):
        return build(own["_val"])
    made = Foreign(node.class_name)
    keep(made)
    made.__args__ = tuple(map(build, node.args))
    made.__kwargs__ = _dict(named_items(node.kwargs), build)
    if node.pairs or node.items:
        made.__content__ = _dict(node.pairs, build) if node.pairs else list(map(build, node.items))
    if node.state is not ABSENT or own is not None:
        _fill(made, node, own, build)
    return made


def _fill(made: Foreign, node: Object, own: InertDict | None, build: Builder) -> None:
    """Fill a placeholder with the object's state: attributes, including slots; or something else."""
    state = node.state
    slots = named_items(state[1]) if isinstance(state, tuple) and len(state) == 2 else []
    if own is None and not slots:
        if node.class_name == "functools.partial" and isinstance(state, tuple) and len(state) == 4:
            vars(made).update(zip(("func", "args", "keywords"), map(build, state[:3]), strict=True))
        else:
            made.__state__ = build(state)
    for name, value in [*named_items(own), *slots]:
        if name == "_content" and node.class_name.startswith(_CONFIG):
            pairs = mapping_items(value)
            made.__content__ = build(value) if pairs is None else _dict(pairs, build)
        elif not is_dunder(name):
            vars(made)[name] = build(value, name)


def _dict(pairs: Sequence[tuple[object, object]], build: Builder) -> dict[Any, Any]:
    keys = build.keys([key for key, _ in pairs])
    return {made: build(value, key) for made, (key, value) in zip(keys, pairs, strict=True)}


def plain_value(node: Object, build: Builder) -> Any:
    """A value of a built-in type that a call makes; `ABSENT`: it is not one.

    Raises:
        CorruptError: the type takes no such arguments.
    """
    name = node.class_name
    if node.kwargs or node.pairs or node.state is not ABSENT:
        return ABSENT
    if name == "collections.deque" and len(node.args) in (0, 2):
        size = node.args[1] if node.args else None
        return deque(map(build, node.items), size if isinstance(size, int) and size >= 0 else None)
    if name not in _MADE or node.items:
        return ABSENT
    make, types = _MADE[name]
    args = tuple(map(build, node.args))
    if not all(isinstance(arg, types) for arg in args):
        return ABSENT
    try:
        return make(*args)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CorruptError(f"a {name} that cannot be created: {error!s:.100}") from None
