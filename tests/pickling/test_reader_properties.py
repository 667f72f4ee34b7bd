"""Any bytes at all: what is accepted is what CPython makes of them, and what is called damaged CPython refuses."""

from __future__ import annotations

import collections
import io
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptkit.errors import CorruptError, FormatError
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId
from ckptkit.pickling.reader import read_pickle

pytestmark = pytest.mark.thorough


class Name:
    """What CPython's unpickler finds instead of what a name stands for; calling it makes a `Made`."""

    def __init__(self, module: str, name: str) -> None:
        self.path = module, name
        vars(self)["__new__"] = lambda cls, *args, **kwargs: Made("new", cls, args, kwargs)

    def __call__(self, *args: object) -> Made:
        return Made("call", self, args, {})


class Made:
    """An object that was made by calling, and remembers all that is done to it."""

    def __init__(self, how: str, cls: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.how, self.cls, self.args, self.kwargs = how, cls, args, kwargs
        self.items: list[object] = []
        self.pairs: list[tuple[object, object]] = []
        self.state: object = ABSENT

    def __call__(self, *args: object) -> Made:
        return Made("call", self, args, {})

    def append(self, item: object) -> None:
        self.items.append(item)

    def extend(self, items: list[object]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.pairs.append((key, value))

    def __setstate__(self, state: object) -> None:
        assert self.state is ABSENT
        self.state = state

    def __hash__(self) -> int:
        return id(self)


class Oracle(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """CPython's own interpreter, written in Python, which finds `Name` for every name."""

    def find_class(self, module: str, name: str) -> Name:
        return self.names.setdefault((module, name), Name(module, name))  # type: ignore[no-any-return]

    def persistent_load(self, pid: object) -> object:
        return PersistentId(pid)

    def _decode_string(self, value: bytes) -> str | bytes:
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            return value

    def load_inst(self) -> None:
        """As the base class, for a name that is no class."""
        module, name = (str(self.readline()[:-1], "ascii") for _ in range(2))
        args = self.pop_mark()
        self.append(self.find_class(module, name)(*args))

    def load_obj(self) -> None:
        args = self.pop_mark()
        self.append(args.pop(0)(*args))

    dispatch = {**pickle._Unpickler.dispatch, pickle.INST[0]: load_inst, pickle.OBJ[0]: load_obj}  # type: ignore[attr-defined]


def oracle(data: bytes) -> tuple[object, int]:
    """What CPython makes of a pickle, and where it ends."""
    file = io.BytesIO(data)
    reader = Oracle(file, fix_imports=False)
    reader.names = {}
    return reader.load(), file.tell()


def same(ours: Any, theirs: Any, seen: set[tuple[int, int]]) -> bool:
    """Whether an inert tree and CPython's value say the same; what was compared once is not again."""
    if (id(ours), id(theirs)) in seen:
        return True
    seen.add((id(ours), id(theirs)))

    def each(a: Any, b: Any) -> bool:
        return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))

    if isinstance(ours, Global):
        return isinstance(theirs, Name) and theirs.path == (ours.module, ours.name)
    if isinstance(ours, Object):
        if not isinstance(theirs, Made) or (theirs.how == "new") != ours.how.startswith("newobj"):
            return False
        kwargs = ours.kwargs.pairs if isinstance(ours.kwargs, InertDict) else []
        return (
            same(ours.cls, theirs.cls, seen) and each(ours.args, theirs.args) and each(ours.items, theirs.items)
            and each(ours.pairs, theirs.pairs) and same(ours.state, theirs.state, seen)
            and each(list(dict(kwargs).items()), list(theirs.kwargs.items()))
        )  # fmt: skip
    if isinstance(ours, InertDict):
        if not isinstance(theirs, dict):
            return False
        last: dict[Any, Any] = {}
        for key, value in ours.pairs:  # keys that Python could hash, as CPython did
            known = next((k for k in theirs if same(key, k, set())), key)
            last[id(known)] = value
        return len(last) == len(theirs) and all(id(k) in last and same(last[id(k)], v, seen) for k, v in theirs.items())
    if isinstance(ours, InertSet):
        if not isinstance(theirs, frozenset if ours.frozen else set):
            return False
        return all(any(same(a, b, set()) for b in theirs) for a in ours.members) and len(theirs) <= len(ours.members)
    if isinstance(ours, PersistentId):
        return isinstance(theirs, PersistentId) and same(ours.pid, theirs.pid, seen)
    if isinstance(ours, (list, tuple)):
        return type(ours) is type(theirs) and each(ours, theirs)
    return type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))


STRICTER = (
    "STOP without exactly one value",  # CPython takes the topmost
    "a frame of",  # and notices only when it reads past the end
    "a STRING without matching quotes",  # '' of one quote
    "not ASCII",
    "not UTF-8",
    "memo entry -",
    "needs a MARK",  # CPython's stack has no fence there in one of its two unpicklers
    "needs more values than the stack has",
    "the last key of a dict",
)
"""What is damage here, and passes in one of CPython's unpicklers."""


_NO_SUCH = ("unhashable", "not callable", "attribute", "is not a type")
"""What CPython says of keys that cannot be hashed, and of values that are called or made as if they were classes."""


def check(data: bytes) -> str:
    """Compare the two on these bytes; what came of it."""
    try:
        ours = read_pickle(data)
    except FormatError as error:
        assert len(str(error)) < 1000
        if type(error) is CorruptError and not any(words in error.message for words in STRICTER):
            try:
                oracle(data)
            except Exception:
                return "damaged"
            raise AssertionError(f"CPython reads what is called damaged: {error}") from error
        return "refused"
    assert data[: ours.end].endswith(pickle.STOP)
    try:
        theirs, end = oracle(data)
    except (TypeError, AttributeError, ValueError) as error:
        assert any(words in str(error) for words in _NO_SUCH), repr(error)
        return "read"
    assert end == ours.end
    assert same(ours.root, theirs, set()), data
    return "the same"


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.complex_numbers(allow_nan=False)
)
keys = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.binary(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.binary(max_size=8).map(bytearray)
        | inner.map(lambda value: [value, value])
    ),
    max_leaves=12,
)


@given(values, st.integers(0, 5), st.sampled_from([pickle.dumps, pickle._dumps]))  # type: ignore[attr-defined]
@settings(max_examples=400, deadline=None)
def test_honest_objects_mean_what_they_mean_in_python(
    evaluate: Callable[[object], Any], value: object, protocol: int, dumps: Callable[..., bytes]
) -> None:
    data = dumps(value, protocol=protocol)
    result = read_pickle(data, whole=True)
    again = evaluate(result.root)
    assert repr(again) == repr(value) or again == value
    assert type(again) is type(value)


@given(st.binary(max_size=60))
@example(b"N" * 50 + b".")
@example(b"P\\\n.")  # a persistent id that pickletools takes for an escape
@example(b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00N.")
@settings(max_examples=1500, deadline=None)
def test_arbitrary_bytes(data: bytes) -> None:
    check(data)


PIECES = [
    b"N",
    b"K\x01",
    b"K\x02",
    b"M\x01\x02",
    b"J\xff\xff\xff\xff",
    b"\x8a\x01\x05",
    b"I7\n",
    b"L7L\n",
    b"F1.5\n",
    b"G" + bytes(8),
    b"U\x01a",
    b"X\x01\x00\x00\x00b",
    b"\x8c\x01c",
    b"S'd'\n",
    b"Ve\n",
    b"C\x01f",
    b"\x96" + struct.pack("<Q", 1) + b"g",
    b"]",
    b"}",
    b")",
    b"\x8f",
    b"(",
    b"(",
    b"(",
    b"t",
    b"l",
    b"d",
    b"\x91",
    b"\x85",
    b"\x86",
    b"\x87",
    b"a",
    b"e",
    b"s",
    b"u",
    b"\x90",
    b"q\x00",
    b"h\x00",
    b"q\x01",
    b"h\x01",
    b"r\x02\x00\x00\x00",
    b"j\x02\x00\x00\x00",
    b"p3\n",
    b"g3\n",
    b"\x94",
    b"0",
    b"1",
    b"ca\nb\n",
    b"ca\nc\n",
    b"\x8c\x01a\x8c\x01b\x93",
    b"R",
    b"\x81",
    b"\x92",
    b"b",
    b"(ia\nb\n",
    b"o",
    b"Q",
    b"Px\n",
    b"\x88",
    b"\x89",
]
"""Opcodes with their arguments."""


@given(st.lists(st.sampled_from(PIECES), max_size=25))
@settings(max_examples=3000, deadline=None)
def test_arbitrary_programs(pieces: list[bytes]) -> None:
    check(b"".join(pieces) + b".")


def balanced(rng: random.Random, depth: int = 3) -> bytes:
    """A program that leaves one value, more often than chance would."""
    kind = rng.randrange(9) if depth else 0
    inner = [balanced(rng, depth - 1) for _ in range(rng.randrange(4))] if kind else []
    put = rng.choice([b"", b"", b"q\x00", b"\x94"])
    return (
        rng.choice([b"N", b"K\x01", b"U\x01a", b"X\x01\x00\x00\x00b", b"I7\n", b"]", b")", b"}"]),
        b"](" + b"".join(inner) + b"e",
        b"(" + b"".join(inner) + b"t",
        b"(" + b"".join(inner) + b"l",
        b"}(" + b"".join(b"U\x01%c" % (97 + i) + value for i, value in enumerate(inner)) + b"u",
        b"ca\nb\n(" + b"".join(inner) + b"tR",
        b"ca\nb\n(" + b"".join(inner) + b"tR}b",
        b"ca\nc\n(" + b"".join(inner) + b"t\x81(" + b"".join(inner) + b"e",
        b"".join(value + b"0" for value in inner) + b"\x88",
    )[kind] + put


@given(st.randoms(use_true_random=False))
@settings(max_examples=1000, deadline=None)
def test_programs_that_are_balanced_and_then_damaged(rng: random.Random) -> None:
    data = balanced(rng) + b"."
    assert check(data) in ("the same", "read")
    for _ in range(3):
        place = rng.randrange(len(data))
        piece = rng.choice([b"", rng.choice(PIECES), bytes([rng.randrange(256)])])
        check(data[:place] + piece + data[place + rng.randrange(2) :])


@given(values, st.integers(0, 5), st.data())
@settings(max_examples=400, deadline=None)
def test_honest_pickles_that_are_damaged(value: object, protocol: int, data: st.DataObject) -> None:
    raw = pickle.dumps(value, protocol)
    place = data.draw(st.integers(0, len(raw) - 1))
    check(raw[:place] + bytes([data.draw(st.integers(0, 255))]) + raw[place + 1 :])
    check(raw[:place] + raw[place + 1 :])
    check(raw[:place])
