"""Arguments, checked here once for the command line, configurations and Python; and how options are declared.

A string given where several are accepted is one value, not its letters.  A tolerance is a finite number of at least 0.
A device is one that torch has.

A declaration of an `Option` has its type, its text in ``--help`` and in the docstring, its default, and the conversion
of a value given in Python.  A command's `Options` are a class of them (`ckptkit.options`): the command line is built
from it, and a function takes one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast, overload

from ckptkit.errors import RewriteError, VerifyError
from ckptkit.nearness import did_you_mean, nearest
from ckptkit.startup import pattern

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DEVICE_TYPES",
    "BinaryFile",
    "Option",
    "Options",
    "count",
    "device_problem",
    "documented",
    "dtype",
    "flag",
    "pairs",
    "path",
    "several",
    "shapes",
    "text",
    "texts",
    "tolerance",
    "unexpected",
    "within",
]

DEVICE_TYPES = (
    "cpu", "cuda", "mps", "xpu", "meta", "hip", "xla", "hpu", "mtia", "maia", "ipu", "ve", "lazy", "vulkan", "metal",
    "fpga", "mkldnn", "opengl", "opencl", "ideep", "privateuseone",
)  # fmt: skip
"""Every type of device that torch has (``c10/core/DeviceType.h``)."""

_ELSEWHERE = ("npu", "musa", "mlu", "gcu", "dml", "ort", "msnpu", "vsi", "rbln", "spyre", "openreg")
"""What packages beside torch call theirs (``torch.utils.rename_privateuse1_backend``), and torch did before 2.3."""

_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "tpu": "xla", "apple": "mps", "intel": "xpu"}
"""What people call devices."""

_DEVICES = "; expected 'cpu', 'cuda:0', 'mps' or similar"

_DEVICE = pattern(r"([a-z][a-z0-9_]*)(?::(0|[1-9][0-9]{0,2}))?\Z")

_MAX_INDEX = 127
"""torch keeps the index in a signed byte (``c10/core/Device.h``)."""


def device_problem(given: str) -> str | None:
    """The problem with a device such as ``"cpu"`` or ``"cuda:1"``; ``None``: torch has it, on some machine."""
    found = _DEVICE.match(given)
    kind = found[1] if found else given.partition(":")[0].strip().lower()
    types = (*DEVICE_TYPES, *_ELSEWHERE)
    if kind not in types:
        meant = did_you_mean(kind, DEVICE_TYPES, 1, called=_MEANT, shown=repr)
        return f"{given!r:.80} is not a device location{meant or _DEVICES}"
    if found is None or int(found[2] or 0) > _MAX_INDEX:
        return f"{given!r:.80} is not a device location; expected {kind!r} or '{kind}:N', N from 0 to {_MAX_INDEX}"
    return None


def tolerance(name: str, given: Any) -> float | None:
    """The tolerance; ``None`` if none is given.

    Raises:
        VerifyError: it is NaN, negative, infinite or no number: nothing, or everything, would be within it.
    """
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise VerifyError(f"{name} {given!s:.80}: expected a finite number of at least 0")
    return value


def several(given: Any) -> tuple[Any, ...]:
    """The values of an argument that accepts several: one string or path is one value."""
    return (given,) if isinstance(given, (str, bytes, os.PathLike)) else tuple(given)


def shapes(name: str, given: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of inputs.

    Raises:
        VerifyError: one is not a shape.
    """
    found = several(given) if isinstance(given, Iterable) else (given,)
    made = []
    for shape in found:
        sizes = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, (str, bytes)) else ()
        if not sizes or not all(hasattr(size, "__index__") and size is not True and size >= 0 for size in sizes):
            raise VerifyError(
                f"{name}: {shape!r:.80} is not a shape; expected a list of shapes of whole numbers, "
                "such as [[1, 3, 224, 224]]"
            )
        made.append(tuple(map(int, sizes)))
    return tuple(made)


T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

Kind = Literal["flag", "text", "texts", "pairs", "storage", "shapes", "device", "tolerance", "integer", "switch"]
"""How an option is typed: alone; with a value, or several times with one (``texts``, ``pairs`` of KEY=VALUE, which
``storage`` also is, but with hidden values, ``shapes``); or as ``--NAME/--no-NAME``."""


class Option(Generic[T]):
    """One option.

    Attributes:
        name: the keyword.
        kind: how it is typed.
        default: its value if it is not given.
        line: its line in ``--help``.
        meaning: its text in the function's docstring, without the final period.
        metavar: the placeholder for its value there.
        choices: the allowed values; empty: any.
        shows_default: whether the line ends in the default.
    """

    name: str

    def __init__(
        self,
        kind: Kind,
        default: T,
        line: str,
        meaning: str,
        metavar: str | None = None,
        *,
        switch: str | None = None,
        choices: Sequence[str] = (),
        shows_default: bool = False,
        taken: Callable[[Any], T] | None = None,
    ) -> None:
        self.kind = kind
        self.default = default
        self.line = line
        self.meaning = meaning
        self.metavar = metavar
        self.choices = choices
        self.shows_default = shows_default
        self._switch = switch
        self._taken = taken

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object, owner: type) -> Self | T:
        return self  # an instance has the value under the same name, which goes before

    @property
    def typed(self) -> str:
        """The option as typed: ``--strip-module``; ``--no-check`` if it is on by default."""
        negated = "no-" if self.default is True else ""
        return self._switch or f"--{negated}{self.name.replace('_', '-')}"

    @property
    def documented(self) -> str:
        """Its entry among the ``Args`` of the function."""
        shown = "" if not self.default else f"; default ``{self.default!r}``"
        return f"{self.name}: {self.meaning}{shown}."

    def value(self, given: Any) -> T:
        """The value given by a keyword."""
        if given is None and self.default is None:
            return self.default
        return cast(T, given) if self._taken is None else self._taken(given)

    def words(self, value: Any) -> list[str]:
        """The words of a command line that give it a value; empty for the default, and for possible secrets."""
        if value == self.default or value is None or self.kind == "storage":
            return []
        if self.kind == "flag":
            return [self.typed]
        if self.kind == "texts":
            return [word for text in value for word in (self.typed, str(text))]
        if self.kind == "shapes":
            return [word for shape in value for word in (self.typed, ",".join(map(str, shape)))]
        return [self.typed, str(value)]


def unexpected(function: str, name: str, known: Iterable[str]) -> TypeError:
    """Python's error for an unknown keyword, with the one that was probably meant."""
    near = nearest(name, known, 1)
    meant = f". Did you mean {near[0]!r}?" if near else ""
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{meant}")


class BinaryFile(Protocol):
    """A file that was opened in binary mode: of ``open``, ``gzip.open``, a member of an archive, a ``mmap``."""

    def read(self, nbytes: int, /) -> bytes | None:
        """Read at most so many bytes; ``b""`` at the end."""


class Options:
    """The options of one command: those given, and the defaults of the others.  They are immutable.

    Like a frozen dataclass, but nothing is compiled when the class is made, because every command starts with these.

    Raises:
        TypeError: there is no option with that name.
    """

    command: ClassVar[str]
    declared: ClassVar[dict[str, Option[Any]]]

    def __init_subclass__(cls) -> None:
        cls.declared = {name: each for name, each in vars(cls).items() if isinstance(each, Option)}

    def __init__(self, **given: Any) -> None:
        for name in given:
            if name not in self.declared:
                raise unexpected(self.command, name, self.declared)
        for name, option in self.declared.items():
            vars(self)[name] = option.value(given[name]) if name in given else option.default
        self._check()

    def _check(self) -> None:
        """See that the options go together."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"options cannot be changed; cannot set {name!r}")

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value != self.declared[name].default}
        told = (f"{name}={'...' if self.declared[name].kind == 'storage' else repr(given[name])}" for name in given)
        return f"{type(self).__name__}({', '.join(told)})"

    def typed(self, *names: str) -> list[str]:
        """These options as they are typed, without those that have their defaults."""
        return [word for name in names for word in self.declared[name].words(getattr(self, name))]

    def but(self, **changed: Any) -> Self:
        """The same options, with these changed."""
        return type(self)(**{**vars(self), **changed})


_WIDTH = 116
"""Characters of a line of a docstring."""


def documented(declared: type[Options]) -> Callable[[F], F]:
    """Lists the options in the docstring of the function that takes them, in place of the line ``**options``."""

    def listed(function: F) -> F:
        if function.__doc__:  # not with -OO
            head, _, tail = function.__doc__.partition("**options")
            indent = head[head.rindex("\n") + 1 :]
            entries = (line for option in declared.declared.values() for line in _lines(option.documented, indent))
            function.__doc__ = head + "\n".join(entries).lstrip() + tail[tail.index("\n") :]
        return function

    return listed


def _lines(text: str, indent: str) -> Iterator[str]:
    """The text in lines that are not too long, all but the first indented once more."""
    line = indent.removesuffix(" ")
    for word in text.split(" "):
        if len(line) + 1 + len(word) > _WIDTH:
            yield line
            line = indent + "   "
        line += " " + word
    yield line


def flag(line: str, meaning: str, *, default: bool = False) -> Option[bool]:
    """A flag: it turns something on, or off if that is on by default."""
    return Option("flag", default, line, meaning)


def text(metavar: str, line: str, meaning: str) -> Option[str | None]:
    """One with a value."""
    return Option("text", None, line, meaning, metavar)


def path(metavar: str, line: str, meaning: str) -> Option[str | None]:
    """One with a file."""
    return Option("text", None, line, meaning, metavar, taken=os.fsdecode)


def dtype(line: str, meaning: str) -> Option[str | None]:
    """One with a dtype, torch's own or by its name."""
    return Option("text", None, line, meaning, "DTYPE", taken=lambda given: str(given).removeprefix("torch."))


def texts(metavar: str, line: str, meaning: str) -> Option[tuple[str, ...]]:
    """One with a value that can be given several times."""
    return Option("texts", (), line, meaning, metavar, taken=several)


def pairs(switch: str, line: str, meaning: str) -> Option[Mapping[str, Any]]:
    """One with a name and its value that can be given several times."""
    return Option("pairs", {}, line, meaning, "KEY=VALUE", switch=switch, taken=lambda given: dict(given or {}))


def count(switch: str, line: str, meaning: str) -> Option[int | None]:
    """A count of at least 1."""

    def taken(given: Any) -> int:
        most = 10_000
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
            raise RewriteError(f"{switch} {given!r:.40}: expected a whole number from 1 to {most:,}")
        return given

    return Option("integer", None, line, meaning, "N", switch=switch, taken=taken)


def within(switch: str, line: str, meaning: str) -> Option[float | None]:
    """One with a tolerance."""
    return Option("tolerance", None, line, meaning, "X", switch=switch, taken=lambda given: tolerance(switch, given))
