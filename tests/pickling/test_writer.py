"""The writer against CPython: what is written loads as the object that was read."""

from __future__ import annotations

import argparse
import collections
import decimal
import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.repeated import repeated

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Storage
from ckptkit.errors import LimitError, UnsupportedError
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, PersistentId
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.writer import write_pickle

PROTOCOLS = range(6)

UNTYPED = getattr(torch, "uint16", torch.uint8)
"""A dtype that torch saves as untyped bytes, where it has one."""


def itself(node: object) -> object:
    return node


def through(data: bytes) -> bytes:
    """Read and written again under the protocol it was read with."""
    result = read_pickle(data)
    return write_pickle(result.root, lower=itself, protocol=result.protocol)


class Plain:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: object, b: object) -> None:
        self.a, self.b = a, b

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and (self.a, self.b) == (other.a, other.b)


class SlottedWithDict(Slotted):
    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and vars(self) == vars(other)


class WithNewArgs(tuple):
    def __new__(cls, *, first: int, second: object) -> WithNewArgs:
        return super().__new__(cls, (first, second))

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, object]]:
        return (), {"first": self[0], "second": self[1]}


class ListWithState(list):
    pass


class DictWithState(dict):
    pass


class WithSetState:
    def __init__(self, value: object) -> None:
        self.value = value

    def __getstate__(self) -> tuple[object, int]:
        return (self.value, 7)

    def __setstate__(self, state: tuple[object, int]) -> None:
        assert state[1] == 7
        self.value = state[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithSetState) and self.value == other.value


def filled(cls: type, content: Any, **attributes: object) -> Any:
    made = cls(content)
    made.__dict__.update(attributes)
    return made


DISTINCT = "".join(["equal", " ", "text"])

VALUES = {
    "none": None,
    "bools": [True, False],
    "int widths": [s * v + d for v in (0, 1, 255, 256, 65535, 65536, 2**31, 2**63, 2**64, 2**2039) for s in (1, -1)
                   for d in (-1, 0, 1)],
    "floats": [0.0, 1.5, -1e308, 5e-324, float("inf"), float("-inf")],
    "strings": ["", "é", "\x00", "\n\r\\", "\ud800 alone", "\U0001f600", "x" * 70000],
    "equal strings": ["equal text", DISTINCT, DISTINCT[:5], ("equal text",)],
    "bytes": [b"", b"a", b"\xff\x00\n", bytes(range(256)), b"y" * 70000],
    "bytearrays": [bytearray(), bytearray(b"\xff\x00"), bytearray(70000)],
    "empty": [[], (), {}, set(), frozenset(), ""],
    "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), tuple(range(5000))],
    "batch edges": [list(range(n)) for n in (1, 2, 999, 1000, 1001, 2000, 2001)],
    "dict batch edges": [{i: -i for i in range(n)} for n in (1, 2, 999, 1000, 1001, 2001)],
    "set batch edges": [set(range(n)) for n in (1, 2, 999, 1000, 1001, 2001)],
    "sets": [{1, "a", (2, 3)}, frozenset({4}), {frozenset({5})}],
    "mappings": [collections.OrderedDict(a=1), collections.Counter("aab"), collections.defaultdict(list, a=[1])],
    "deque": collections.deque([1, [2]], maxlen=3),
    "namespace": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
    "decimal": decimal.Decimal("1.10"),
    "complex": [1 + 2j, -0.0j],
    "plain": Plain(a=1, b=Plain(c=[2])),
    "classes": [Plain, Slotted, int, len],
    "list with state": filled(ListWithState, [1, 2], note="n"),
    "dict with state": filled(DictWithState, {"a": 1, "b": 2}, note="n"),
    "set state": WithSetState([1]),
    "path": Path("a/b"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_loads_as_what_was_read(name: str, protocol: int) -> None:
    value = VALUES[name]
    again = pickle.loads(through(pickle.dumps(value, protocol)))
    assert again == value
    assert type(again) is type(value)
    assert getattr(again, "__dict__", None) == getattr(value, "__dict__", None)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("value", [Slotted(1, [2]), filled(lambda a: SlottedWithDict(a, 3), 1, extra="x"),
                                   WithNewArgs(first=1, second=[2])], ids=lambda v: type(v).__name__)  # fmt: skip
def test_slots_and_keyword_arguments(value: object, protocol: int) -> None:
    assert pickle.loads(through(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("pattern", [0x7FF8000000000000, 0xFFF8000000000001, 0x8000000000000000, 0x7FF0000000000001])
def test_floats_keep_every_bit(pattern: int, protocol: int) -> None:
    raw = struct.pack(">Q", pattern)
    assert write_pickle(struct.unpack(">d", raw)[0], lower=itself, protocol=protocol)[2:] == b"G" + raw + b"."


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sharing_and_cycles_load_as_they_were(protocol: int) -> None:
    shared = [1]
    looped: list[Any] = [shared]
    looped.append(looped)
    table: dict[str, Any] = {"shared": shared}
    table["self"] = table
    inner: list[Any] = []
    around = (1, inner)
    inner.append(around)
    wide: list[Any] = []
    around4 = (1, 2, 3, wide)
    wide.append(around4)
    thing = Plain(shared=shared)
    thing.me = thing  # type: ignore[attr-defined]
    again = pickle.loads(through(pickle.dumps([looped, table, around, around4, thing, thing], protocol)))
    assert again[0][1] is again[0]
    assert again[1]["self"] is again[1]
    assert again[2][1][0] is again[2]
    assert again[3][3][0] is again[3]
    assert again[4].me is again[4] is again[5]
    assert again[0][0] is again[1]["shared"] is again[4].shared


class Backwards:
    """Pickled as a call whose argument holds the object itself."""

    def __init__(self, holder: list[Any]) -> None:
        self.holder = holder

    def __reduce__(self) -> tuple[object, ...]:
        return Backwards, (self.holder,)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_object_reached_through_its_own_arguments(protocol: int) -> None:
    thing = Backwards([])
    thing.holder.append(thing)
    for pickler in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]
        again = pickle.loads(through(pickler([thing, thing], protocol)))
        assert again[0] is again[1]
        assert again[0].holder[0] is again[0]
        assert len(again[0].holder) == 1


class Hashed:
    """Hashable before it is filled, so that a set may lead back to itself."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", [set, frozenset, lambda members: collections.Counter(dict.fromkeys(members, 1))])
@pytest.mark.parametrize("first", ["whole", "member"])
def test_a_collection_whose_members_hold_it(first: str, kind: Any, count: int, protocol: int) -> None:
    members = [Hashed() for _ in range(count)]
    whole = kind(members)
    for member in members:
        member.owner, member.peers, member.nested = whole, members, [kind([member]), {"whole": whole}]
    root = [whole, members] if first == "whole" else [members, whole]
    again = pickle.loads(through(pickle.dumps(root, protocol)))
    whole, members = again if first == "whole" else reversed(again)
    assert len(whole) == count
    assert set(whole) == set(members)
    for member in members:
        assert member.owner is whole is member.nested[1]["whole"]
        assert member.peers is members
        assert set(member.nested[0]) == {member}


def test_more_objects_that_lead_back_to_themselves_than_a_pickler_writes() -> None:
    members: list[object] = []
    whole = Object("reduce", Global("builtins", "set"), (members,))
    for _ in range(5000):
        member = Object("newobj", Global("a", "B"), ())
        member.state = InertDict([("owner", whole)])
        members.append(member)
    with pytest.raises(LimitError, match="objects whose arguments lead back to them: 1,001"):
        write_pickle(whole, lower=itself)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_frozenset_that_contains_itself(protocol: int) -> None:
    member = Hashed()
    whole = frozenset([member])
    member.owner = whole  # type: ignore[attr-defined]
    again = pickle.loads(through(pickle.dumps(whole, protocol)))
    assert next(iter(again)).owner is again


def object_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


TORCH_VALUES = {
    "state_dict": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(),
    "whole model": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)),
    "resume": lambda: {"model": torch.nn.Linear(2, 2).state_dict(), "epoch": 3, "lr": 1e-3, "best": None,
                       "optimizer": torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict()},
    "tensor": lambda: torch.zeros(3),
    "list": lambda: [torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.int8, UNTYPED)],
    "plain": lambda: {"a": [1, 2.5, "x", b"bytes", None, (1, 2)]},
}  # fmt: skip


class NamesPersistentIds(pickle.Unpickler):
    """Loads a torch pickle with storages as their persistent ids and rebuild calls as tuples."""

    def persistent_load(self, pid: Any) -> Any:
        return ("pid", pid)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils":
            return lambda *args: (name, args)
        return super().find_class(module, name)


def shown(data: bytes) -> str:
    return show(NamesPersistentIds(io.BytesIO(data)).load())


def show(value: Any) -> str:
    if isinstance(value, torch.nn.Module):
        return f"{type(value)}{show(vars(value))}"
    if isinstance(value, dict):
        return f"{type(value)}{[(show(k), show(v)) for k, v in value.items()]}{show(getattr(value, '__dict__', None))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value)}{[show(item) for item in value]}"
    return repr(value)


@pytest.mark.parametrize("name", TORCH_VALUES)
def test_what_torch_saves_loads_as_the_same(name: str) -> None:
    data = object_pickle(TORCH_VALUES[name]())
    written = through(data)
    assert shown(written) == shown(data)
    assert through(written) == written


@pytest.mark.parametrize("name", ["state_dict", "tensor", "plain", "list"])
def test_what_torch_saves_is_written_with_the_same_opcodes(name: str) -> None:
    data = object_pickle(TORCH_VALUES[name]())

    def opcodes(data: bytes) -> list[tuple[str, object]]:
        puts = {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}  # indices depend on what else is remembered
        return [(op.name, arg) for op, arg, _ in pickletools.genops(data) if op.name not in puts]

    def calls(data: bytes) -> list[tuple[str, object]]:
        return [pair for pair in opcodes(data) if pair[0] in ("REDUCE", "BINPERSID", "BUILD", "APPENDS", "SETITEMS")]

    assert calls(through(data)) == calls(data)
    assert opcodes(through(data))[:2] == opcodes(data)[:2]


def test_the_same_tree_gives_the_same_bytes() -> None:
    data = object_pickle(TORCH_VALUES["whole model"]())
    assert through(data) == through(data)


def test_protocol_2_is_the_least_and_the_one_read_is_kept() -> None:
    for declared, protocol in ((None, 2), (0, 2), (1, 2), (2, 2), (3, 3), (4, 4), (5, 5)):
        assert write_pickle([], lower=itself, protocol=declared)[:2] == bytes([0x80, protocol])


def test_bytes_under_protocol_2_are_written_as_torch_reads_them() -> None:
    names = [arg for op, arg, _ in pickletools.genops(through(pickle.dumps([b"\xff"], 2))) if op.name == "GLOBAL"]
    assert names == ["_codecs encode"]


# The lowering of what is no inert node.


def storage(key: str) -> Storage:
    return Storage(key=key, dtype="uint8", nbytes=1, location="cpu", source=ByteRange(None, 0, 1))  # type: ignore[arg-type]


def test_a_leaf_is_lowered_once_and_shared() -> None:
    leaf, seen = storage("a"), []

    def lower(node: object) -> object:
        seen.append(node)
        return Object("reduce", Global("builtins", "bytearray"), (b"x",))

    again = pickle.loads(write_pickle([leaf, leaf, (leaf,)], lower=lower, protocol=4))
    assert again[0] is again[1] is again[2][0]
    assert again[0] == bytearray(b"x")
    assert seen == [leaf]


def test_a_persistent_id_is_written_each_time() -> None:
    leaf = storage("a")
    data = write_pickle([leaf, leaf], lower=lambda node: PersistentId(("storage", "a")), protocol=2)
    assert [op.name for op, _, _ in pickletools.genops(data)].count("BINPERSID") == 2


@pytest.mark.parametrize("node", [storage("a"), object(), ABSENT], ids=lambda n: type(n).__name__)
def test_a_node_nobody_knows_is_refused(node: object) -> None:
    with pytest.raises(UnsupportedError, match=rf"a {type(node).__name__} cannot be written"):
        write_pickle([node], lower=itself)


@pytest.mark.parametrize(("module", "name"), [("a\nb", "c"), ("a", "c\nd"), ("a", "\ud800")])
def test_a_name_protocol_2_cannot_hold_is_refused_and_protocol_4_holds_it(module: str, name: str) -> None:
    node = Global(module, name)
    with pytest.raises(UnsupportedError, match="cannot be written with protocol 2"):
        write_pickle(node, lower=itself, protocol=2)
    again = read_pickle(write_pickle(node, lower=itself, protocol=4)).root
    assert isinstance(again, Global)
    assert (again.module, again.name) == (module, name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("how", ["reduce", "newobj", "newobj_ex", "obj"])
def test_every_part_of_an_object_is_written(how: Any, protocol: int) -> None:
    node = Object(how, Global("a", "B"), (1, "x"), InertDict([("k", 2)]) if how == "newobj_ex" else None)
    node.items = [3, 4]
    node.pairs = [("p", 5)]
    node.state = (InertDict([("s", InertSet([6]))]), None)
    again = read_pickle(write_pickle(node, lower=itself, protocol=protocol)).root
    assert isinstance(again, Object)
    assert (again.how, again.class_name, again.args) == (how, "a.B", (1, "x"))
    assert (again.items, again.pairs) == ([3, 4], [("p", 5)])
    assert again.state[0]["s"].members == [6]  # type: ignore[index]
    assert (again.kwargs is None) == (how != "newobj_ex")


# Anything at all.

_atoms = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.binary(max_size=20)
)
_hashable = st.recursive(
    _atoms, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4) | st.tuples(inner), max_leaves=6
)
_values = st.recursive(
    _atoms | _hashable | st.binary(max_size=9).map(bytearray) | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(inner, max_size=6).map(tuple)
        | st.dictionaries(_hashable, inner, max_size=5)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4).map(collections.OrderedDict)
        | st.sets(_hashable, max_size=4)
        | inner.map(lambda value: [value, value])
    ),
    max_leaves=25,
)


@repeated("examples", 80, 250)
def test_any_value_survives_reading_and_writing(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(value=_values, protocol=st.sampled_from(PROTOCOLS))
    def survives(value: object, protocol: int) -> None:
        again = pickle.loads(through(pickle.dumps(value, protocol)))
        assert again == value
        assert type(again) is type(value)
        assert pickle.loads(through(pickle._dumps(value, protocol))) == value  # type: ignore[attr-defined]

    survives()
