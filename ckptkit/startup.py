r"""What a module declares when it is imported, made cheap: a command starts before it does anything.

`pattern` is `re.compile` at the first use.  Compiling an expression takes 0.1 to 1.5 ms, there are more than a hundred,
and a command uses few of them; from its second use on a pattern is as fast as any::

    _SHARD = pattern(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII)
    _SHARD.fullmatch("model-00001-of-00002")

What is used whenever a file is read is compiled at once, as anywhere else.

`sha256` is that of `hashlib`, which is imported, with all of OpenSSL, when something is hashed.

`dataclass` is that of `dataclasses`, with one method compiled for each class, ``__init__``, where that compiles six;
the others are shared.  A class takes a fifth of the time, and a command declares up to fifty.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, AnyStr, TypeVar, cast

__all__ = ["dataclass", "made_by_position", "pattern", "sha256"]

C = TypeVar("C", bound=type)
R = TypeVar("R")


class _Pattern:
    """Has what ``re.Pattern`` has; `re`'s own functions do not take it in place of one.

    Several threads may use one for the first time: each finds the same.

    Args:
        text: the expression, ``str`` or ``bytes``.
        flags: as `re.compile` takes them.
    """

    def __init__(self, text: Any, flags: int) -> None:
        self._text, self._flags = text, flags

    @cached_property
    def _compiled(self) -> re.Pattern[Any]:
        return re.compile(self._text, self._flags)

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = getattr(self._compiled, name)  # asked for once
        return found


def pattern(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """A regular expression, compiled when it is first used.

    Args:
        text: the expression; what is wrong with it is raised at its first use.
        flags: as `re.compile` takes them.
    """
    return cast("re.Pattern[AnyStr]", _Pattern(text, flags))


# Dataclasses: https://docs.python.org/3/library/dataclasses.html says what each method does.

_FACTORY = type("_Factory", (), {"__repr__": lambda _: "<factory>"})()
"""The default, in a signature, of a field that has a default factory."""


def _dataclass(
    *,
    frozen: bool = False,
    slots: bool = False,
    kw_only: bool = False,
    eq: bool = True,
    repr: bool = True,  # noqa: A002 - the name in dataclasses
) -> Callable[[C], C]:
    def made(declared: C) -> C:
        own = vars(declared)
        declare = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)
        cls: Any = declare(declared)
        if "__init__" not in own:
            cls.__init__ = _init(cls, frozen=frozen)
        fields = dataclasses.fields(cls)
        compared = [field.name for field in fields if field.compare]
        if repr and "__repr__" not in own:
            cls.__repr__ = _repr
        if eq and "__eq__" not in own:
            cls.__eq__ = _eq_of(compared)
        if eq and own.get("__hash__") is None:  # a class with an `__eq__` of its own has that
            cls.__hash__ = _hash_of(compared) if frozen else None
        if frozen:
            cls.__setattr__, cls.__delattr__ = _no_setattr, _no_delattr
            if slots and "__getstate__" not in own:
                cls.__getstate__, cls.__setstate__ = _state_of([field.name for field in fields])
        return cast("C", cls)

    return made


def made_by_position(cls: Callable[..., R]) -> Callable[..., R]:
    """A function that makes objects of a frozen, slotted dataclass, with fields by position, in a fifth of the time.

    A frozen dataclass sets each field through ``object.__setattr__``; of records that a file has by the hundred
    thousand that takes longer than to read them.  Here they are set in an object of a class with the same slots that
    is not frozen, which then becomes one of ``cls``.
    """
    space = {"__slots__": cls.__slots__, "__init__": _init(cls, becomes=cls)}  # type: ignore[attr-defined]  # a class
    made: Callable[..., R] = type(cls.__name__, (), space)
    return made


def _init(cls: Any, *, frozen: bool = False, becomes: object = None) -> Callable[..., None]:
    """``__init__`` of the fields of a class.

    Args:
        cls: the class.
        frozen: whether fields are set past its ``__setattr__``.
        becomes: the class of the object in the end, all of whose fields are given by position; ``None``: its own.
    """
    scope: dict[str, Any] = {"set_": object.__setattr__, "FACTORY": _FACTORY, "CLASS": becomes}
    fields = dataclasses.fields(cls)
    lines, by_place, by_name = list[str](), list[str](), list[str]()
    for field in fields:
        name, value, default, unset = field.name, field.name, "", ""
        if field.default is not dataclasses.MISSING:
            scope[f"default_{name}"], default, unset = field.default, f"=default_{name}", f"default_{name}"
        elif field.default_factory is not dataclasses.MISSING:
            scope[f"factory_{name}"], default, unset = field.default_factory, "=FACTORY", f"factory_{name}()"
            value = f"{unset} if {name} is FACTORY else {name}"
        if field.init:
            (by_name if field.kw_only and becomes is None else by_place).append(f"{name}{default}")
        elif unset:
            value = unset
        else:
            continue
        lines.append(f"set_(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    if becomes is not None:
        lines.append("self.__class__ = CLASS")
    given = ", ".join(["self", *by_place, *(["*", *by_name] if by_name else [])])
    exec(f"def __init__({given}):\n " + "\n ".join(lines or ["pass"]), scope)  # noqa: S102 - as dataclasses do
    made = scope["__init__"]
    made.__qualname__, made.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    made.__annotations__ = {**{field.name: field.type for field in fields if field.init}, "return": None}
    return cast("Callable[..., None]", made)


@recursive_repr()
def _repr(self: Any) -> str:
    shown = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _values_of(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda self: tuple(getattr(self, name) for name in names)


def _eq_of(names: list[str]) -> Callable[[Any, object], bool]:
    values = _values_of(names)

    def __eq__(self: Any, other: object) -> bool:  # noqa: N807
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    return __eq__


def _hash_of(names: list[str]) -> Callable[[Any], int]:
    values = _values_of(names)
    return lambda self: hash(values(self))


def _no_setattr(self: object, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _no_delattr(self: object, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _state_of(names: list[str]) -> tuple[Callable[[Any], tuple[Any, ...]], Callable[[Any, tuple[Any, ...]], None]]:
    """How it is pickled: the state of slots is set by name else, which a frozen class does not allow."""
    values = _values_of(names)
    set_ = object.__setattr__

    def __setstate__(self: Any, state: tuple[Any, ...]) -> None:  # noqa: N807
        for name, value in zip(names, state, strict=True):
            set_(self, name, value)

    return (lambda self: values(self)), __setstate__


def sha256(data: Buffer = b"") -> hashlib._Hash:
    """A SHA-256 that has these bytes."""
    from hashlib import sha256 as begun

    return begun(data)


if TYPE_CHECKING:
    import hashlib
    from dataclasses import dataclass

    from typing_extensions import Buffer
else:
    dataclass = _dataclass
