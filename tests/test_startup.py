"""What `ckptkit.startup` makes cheap; its dataclasses are held against those of the standard library."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any, Generic, TypeVar

import pytest

from ckptkit import startup

T = TypeVar("T")


def _plain(dataclass: Callable[..., Any], **options: Any) -> Any:
    @dataclass(**options)
    class Record:
        """A record."""

        name: str
        numbers: tuple[int, ...] = ()
        beside: dict[str, int] = field(default_factory=dict, compare=False)
        secret: str = field(default="", repr=False)

    return Record


def _made_later(dataclass: Callable[..., Any], **options: Any) -> Any:
    @dataclass(**options)
    class Record:
        """A record."""

        name: str
        numbers: tuple[int, ...] = ()
        length: int = field(default=3, init=False)
        seen: list[str] = field(default_factory=list, init=False, compare=False)

        def __post_init__(self) -> None:
            self.seen.append(self.name)

    return Record


def _below(dataclass: Callable[..., Any], **options: Any) -> Any:
    @dataclass(**{**options, "kw_only": True})
    class Above:
        """A record."""

        numbers: tuple[int, ...] = ()
        name: str

    @dataclass(**options)
    class Record(Above):
        """A record of more."""

        numbers: tuple[int, ...] = (1,)
        more: int = 0

    return Record


def _with_its_own(dataclass: Callable[..., Any], **options: Any) -> Any:
    @dataclass(**options)
    class Record:
        """A record."""

        name: str
        numbers: tuple[int, ...] = ()

        def __repr__(self) -> str:
            return "as I say"

        def __eq__(self, other: object) -> bool:
            return getattr(other, "name", None) == self.name

        def __hash__(self) -> int:
            return 7

    return Record


def _generic(dataclass: Callable[..., Any], **options: Any) -> Any:
    @dataclass(**{**options, "slots": False})
    class Record(Generic[T]):
        """A record."""

        name: T
        numbers: tuple[int, ...] = ()

    return Record[str]


DECLARED = [_plain, _made_later, _below, _with_its_own, _generic]
OPTIONS: list[dict[str, Any]] = [
    {**kind, **more}
    for kind in ({}, {"frozen": True})
    for more in ({"slots": True}, {"slots": True, "kw_only": True}, {}, {"slots": True, "eq": False, "repr": False})
]
each = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "none")
every = pytest.mark.parametrize("declared", DECLARED)


def _origin(cls: Any) -> Any:
    return getattr(cls, "__origin__", cls)


def _done(action: Callable[[], Any]) -> object:
    """The result, or the error, without the names of functions that differ."""
    try:
        return action()
    except Exception as error:
        return type(error), str(error).replace("_made_later.<locals>.", "")


@contextmanager
def _found(cls: type) -> Iterator[None]:
    """Where a pickle looks for the class there is one for a while."""
    cls.__qualname__ = name = f"_Found{id(cls)}"
    setattr(sys.modules[__name__], name, cls)
    yield
    delattr(sys.modules[__name__], name)


@every
@each
def test_it_does_what_the_standard_one_does(declared: Callable[..., Any], options: dict[str, Any]) -> None:
    ours, theirs = declared(startup.dataclass, **options), declared(dataclasses.dataclass, **options)
    told = []
    for cls in (ours, theirs):
        one, same, other = cls(name="a", numbers=(1, 2)), cls(name="a", numbers=(1, 2)), cls(name="b")
        changed = dataclasses.replace(one, name="c")
        of = _origin(cls)
        is_by_identity = options.get("eq") is False and declared is not _with_its_own
        told.append(
            {
                "signature": str(inspect.signature(of)).replace("'", ""),
                "annotations": of.__init__.__annotations__,
                "fields": [(each.name, each.init, each.compare, each.repr) for each in dataclasses.fields(one)],
                "order": of.__match_args__,
                "doc": of.__doc__,
                "slots": getattr(of, "__slots__", None),
                "repr": repr(one) if options.get("repr", True) else None,
                "equal": (one == same, one == other, one != same, one == 3),
                "hash": _done(lambda one=one, same=same: hash(one) == hash(same)),
                "hashed": None if is_by_identity else _done(lambda one=one: hash(one)),
                "changed": dataclasses.asdict(changed),
                "unset": dataclasses.asdict(other),
                "set": _done(lambda same=same: setattr(same, "name", "d")),
                "name": same.name,
                "deleted": _done(lambda same=same: delattr(same, "name")),
                "missing": _done(cls)[0],  # type: ignore[index]
                "by place": _done(lambda cls=cls: dataclasses.astuple(cls("a", (1,))))
                if "kw_only" not in options
                else _done(lambda cls=cls: cls("a"))[0],  # type: ignore[index]
                "copied": dataclasses.asdict(copy.copy(one)),
            }
        )
        with _found(of):
            for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
                back = pickle.loads(pickle.dumps(one, protocol))
                assert type(back) is of
                assert dataclasses.asdict(back) == dataclasses.asdict(one)
    assert told[0] == told[1]


def test_what_is_made_anew_is_not_shared() -> None:
    record = _plain(startup.dataclass, frozen=True, slots=True)
    one, other = record("a"), record("a")
    one.beside["x"] = 1
    assert other.beside == {}
    assert record("a", (), {"y": 2}).beside == {"y": 2}


def test_one_that_holds_itself_is_shown() -> None:
    record = _plain(startup.dataclass, slots=True)("a")
    record.name = record
    assert "name=..." in repr(record)


def test_objects_made_by_position_are_like_any_others() -> None:
    record = _plain(startup.dataclass, frozen=True, slots=True, kw_only=True)
    one = startup.made_by_position(record)("a", (1,))
    assert type(one) is record
    assert one == record(name="a", numbers=(1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "b"


def test_nothing_is_hashed_before_it_is_asked_for() -> None:
    lines = ["import sys", "from ckptkit.startup import sha256", "print('hashlib' in sys.modules)"]
    lines.append("print(sha256(b'a').hexdigest() == __import__('hashlib').sha256(b'a').hexdigest())")
    made = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["False", "True"]
