"""The reader against CPython: what it accepts means the same."""

from __future__ import annotations

import collections
import datetime
import decimal
import pickle
import pickletools
import random
import struct
import types
from collections.abc import Callable
from typing import Any

import pytest

from ckptkit.errors import AmbiguousError, FormatError, UnsupportedError
from ckptkit.pickling.inert import Global, InertDict, Object, walk
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.writer import write_pickle

Evaluate = Callable[[object], Any]

# Every opcode there is.

READ = {
    "INT": b"I-42\n.",
    "BININT": b"J\xfe\xff\xff\xff.",
    "BININT1": b"K\xff.",
    "BININT2": b"M\x07\x01.",
    "LONG": b"L-42L\n.",
    "LONG1": b"\x8a\x02\x00\x80.",
    "LONG4": b"\x8b\x01\x00\x00\x00\xff.",
    "STRING": rb"""S'a\n\x41\t\\\'"b'""" + b"\n.",
    "BINSTRING": b"T\x02\x00\x00\x00ab.",
    "SHORT_BINSTRING": b"U\x02ab.",
    "BINBYTES": b"B\x02\x00\x00\x00\xffb.",
    "SHORT_BINBYTES": b"C\x02\xffb.",
    "BINBYTES8": b"\x8e\x02\x00\x00\x00\x00\x00\x00\x00\xffb.",
    "BYTEARRAY8": b"\x96\x02\x00\x00\x00\x00\x00\x00\x00\xffb.",
    "NONE": b"N.",
    "NEWTRUE": b"\x88.",
    "NEWFALSE": b"\x89.",
    "UNICODE": b"Va\\u0062\xe9\n.",
    "SHORT_BINUNICODE": b"\x8c\x02\xc3\xa9.",
    "BINUNICODE": b"X\x02\x00\x00\x00\xc3\xa9.",
    "BINUNICODE8": b"\x8d\x02\x00\x00\x00\x00\x00\x00\x00\xc3\xa9.",
    "FLOAT": b"F-1.5e-3\n.",
    "BINFLOAT": b"G\xbf\xf8\x00\x00\x00\x00\x00\x00.",
    "EMPTY_LIST": b"].",
    "APPEND": b"]K\x01a.",
    "APPENDS": b"](K\x01K\x02e.",
    "LIST": b"(K\x01K\x02l.",
    "EMPTY_TUPLE": b").",
    "TUPLE": b"(K\x01K\x02K\x03K\x04t.",
    "TUPLE1": b"K\x01\x85.",
    "TUPLE2": b"K\x01K\x02\x86.",
    "TUPLE3": b"K\x01K\x02K\x03\x87.",
    "EMPTY_DICT": b"}.",
    "DICT": b"(K\x01K\x02d.",
    "SETITEM": b"}K\x01K\x02s.",
    "SETITEMS": b"}(K\x01K\x02K\x01K\x03u.",
    "EMPTY_SET": b"\x8f.",
    "ADDITEMS": b"\x8f(K\x01K\x02\x90.",
    "FROZENSET": b"(K\x01K\x02\x91.",
    "POP": b"K\x01K\x020.",
    "MARK": b"(K\x01t.",
    "POP_MARK": b"K\x01(K\x02K\x031.",
    "GET": b"]p0\n0g0\n.",
    "BINGET": b"]q\x000h\x00.",
    "LONG_BINGET": b"]r\x00\x00\x00\x000j\x00\x00\x00\x00.",
    "PUT": b"]p7\ng7\na0g7\n0K\x01.",
    "BINPUT": b"K\x01q\xff0h\xff.",
    "LONG_BINPUT": b"K\x01r\x00\x01\x00\x000j\x00\x01\x00\x00.",
    "MEMOIZE": b"K\x01\x940K\x02\x940h\x00h\x01\x86.",
    "GLOBAL": b"ccollections\nOrderedDict\n.",
    "STACK_GLOBAL": b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93.",
    "REDUCE": b"cbuiltins\ncomplex\nK\x01K\x02\x86R.",
    "BUILD": b"ctypes\nSimpleNamespace\n)\x81}\x8c\x01aK\x01sb.",
    "INST": b"(K\x01K\x02i__builtin__\ncomplex\n.",
    "OBJ": b"(cbuiltins\ncomplex\nK\x01K\x02o.",
    "NEWOBJ": b"cbuiltins\nint\nK\x07\x85\x81.",
    "NEWOBJ_EX": b"cbuiltins\ncomplex\n)}\x8c\x04realK\x02s\x92.",
    "PROTO": b"\x80\x05N.",
    "STOP": b"N.",
    "FRAME": b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00N.",
    "PERSID": b"Pabc\n.",
    "BINPERSID": b"K\x01Q.",
}
REFUSED = {
    "DUP": b"N2\x86.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x97.",
    "READONLY_BUFFER": b"C\x01a\x98.",
}


@pytest.mark.parametrize("name", [code.name for code in pickletools.opcodes])
def test_every_opcode_is_read_as_python_reads_it_or_refused_by_name(
    name: str, evaluate: Evaluate, python_value: Evaluate
) -> None:
    data = READ[name] if name in READ else REFUSED[name]
    assert any(op.name == name for op, _, _ in pickletools.genops(data)), "the sample does not use the opcode"
    if name in READ:
        result = read_pickle(data)
        expected = python_value(data)
        assert evaluate(result.root) == expected
        assert type(evaluate(result.root)) is type(expected)
        assert result.end == len(data)
    else:
        with pytest.raises((AmbiguousError, UnsupportedError), match=rf"opcode {name}\b"):
            read_pickle(data)


# Whatever honest picklers write.

SHARED = ["shared"]
VALUES = [
    None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, -(2**63),
    -(2**39), 2**100, -(2**2040), 0.0, -0.0, 1.5, float("inf"), -float("inf"), 1e-320, 1e300, 3.14,
    "", "text", "é", "line\nbreak\\", "\ud800", "\U0001f600", "x" * 300, "\x00\x1a\r", b"", b"\x00\xff", b"y" * 300,
    bytearray(b"\x00\xfe"), [], [1], list(range(3000)), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": 1},
    {i: str(i) for i in range(2500)}, {None: 1, (1, 2): 2, 1.5: 3, b"k": 4}, set(), {1, 2}, set(range(1500)),
    frozenset(), frozenset([1, 2]), 1 + 2j, range(3), slice(1, None, 2), [SHARED, SHARED, (SHARED, SHARED)],
    collections.OrderedDict(a=1, b=[2]), collections.Counter("aab"), collections.deque([1, 2], 5),
    collections.defaultdict(list, {"a": [1]}), datetime.datetime(2020, 1, 2, 3, 4, 5, 6), decimal.Decimal("1.50"),
    types.SimpleNamespace(lr=0.1, nested=types.SimpleNamespace(a=[1])), [[[[[[]]]]]], {"a": {"b": ({"c": [1, {2}]},)}},
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value", VALUES, ids=lambda v: f"{type(v).__name__}-{v!r:.20}".encode("ascii", "replace").decode()
)
def test_the_tree_of_a_python_value_is_that_value(value: object, protocol: int, evaluate: Evaluate) -> None:
    for pickler in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]
        data = pickler(value, protocol=protocol)
        result = read_pickle(data)
        again = evaluate(result.root)
        assert again == value
        assert type(again) is type(value)
        assert repr(again) == repr(value) or isinstance(value, (set, frozenset))  # the sign of zero, order of keys
        assert result.protocol == (protocol if protocol >= 2 else 0)
        assert result.end == len(data)


def test_nan_is_read_bit_for_bit() -> None:
    quiet = struct.pack(">Q", 0x7FF8000000000123)
    assert struct.pack(">d", read_pickle(b"G" + quiet + b".").root) == quiet
    assert repr(read_pickle(b"Fnan\n.").root) == "nan"


@pytest.mark.parametrize("protocol", range(6))
def test_sharing_is_kept(protocol: int) -> None:
    a, b, again = read_pickle(pickle.dumps([SHARED, (SHARED,), SHARED], protocol)).root
    assert a is b[0] is again


@pytest.mark.parametrize("protocol", range(6))
def test_cycles_are_kept(protocol: int) -> None:
    looped: list[object] = []
    looped.append(looped)
    table: dict[str, object] = {}
    table["self"] = table
    inner: list[object] = []
    through = (inner,)
    inner.append(through)
    root = read_pickle(pickle.dumps([looped, table, through], protocol)).root
    assert root[0][0] is root[0]
    assert root[1]["self"] is root[1]
    assert root[2][0][0] is root[2]


def test_an_object_whose_arguments_lead_back_to_it_is_one_object() -> None:
    # What CPython writes then: the object is finished on the way, the outer copy is dropped again.
    data = b"\x80\x02]q\x00ca\nB\nh\x00\x85Rq\x01a0h\x01."
    root = read_pickle(data).root
    assert isinstance(root, Object)
    assert root.args[0][0] is root  # type: ignore[index]


def test_several_pickles_in_a_row_are_read_from_where_each_begins(evaluate: Evaluate) -> None:
    data = b"".join(pickle.dumps(value, 4) for value in ("one", [2], {"three": 3}))
    values, position = [], 0
    while position < len(data):
        result = read_pickle(data, start=position)
        values.append(evaluate(result.root))
        position = result.end
    assert values == ["one", [2], {"three": 3}]


def test_a_key_given_twice_counts_as_python_counts_it() -> None:
    root = read_pickle(READ["SETITEMS"].replace(b"K\x01", b"\x8c\x01a")).root
    assert isinstance(root, InertDict)
    assert (root["a"], len(root), root.get("b", "none"), "a" in root, 3 in root) == (3, 2, "none", True, False)


def test_names_are_listed_once_with_their_calls() -> None:
    value = [collections.OrderedDict(), collections.OrderedDict(), collections.Counter()]
    names = read_pickle(pickle.dumps(value, 2)).globals
    assert [(name.qualified, name.calls) for name in names] == [
        ("collections.OrderedDict", 2),
        ("collections.Counter", 1),
    ]


# Python 2.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (rb"S'it\'s \\ \x00\n\r\t'" + b"\n.", "it's \\ \x00\n\r\t"),
        (b'S"it\'s"\n.', "it's"),
        (rb"S'\xc3\xa9'" + b"\n.", "é"),
        (rb"S'\xe9'" + b"\n.", b"\xe9"),
        (b"U\x02\xc3\xa9.", "é"),
        (b"T\x01\x00\x00\x00\xe9.", b"\xe9"),
        (b"(dp0\nS'a'\np1\nI1\nsVb\np2\nL2L\nsS'c'\np3\nI01\ns.", {"a": 1, "b": 2, "c": True}),
        (b"(lp0\nI00\naF2.5\na(I1\nI2\ntp1\na.", [False, 2.5, (1, 2)]),
        (b"ccollections\nOrderedDict\np0\n((lp1\n(lp2\nS'k'\naI1\naatRp3\n.", collections.OrderedDict(k=1)),
        (b"c__builtin__\nset\np0\n((lp1\nI1\naI2\natRp2\n.", {1, 2}),
        (b"c__builtin__\nxrange\n(I0\nI5\nI1\ntR.", range(5)),
    ],
)  # fmt: skip
def test_what_python_2_wrote(data: bytes, expected: object, evaluate: Evaluate) -> None:
    assert evaluate(read_pickle(data).root) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"(i__main__\nOld\np0\n(dp1\nS'x'\np2\nI1\nsb.",
        b"(c__main__\nOld\nq\x00oq\x01}q\x02U\x01xq\x03K\x01sb.",
    ],
)
def test_instances_of_python_2_classes(data: bytes) -> None:
    root = read_pickle(data).root
    assert isinstance(root, Object)
    assert (root.how, root.class_name, root.args) == ("obj", "__main__.Old", ())
    assert isinstance(root.state, InertDict)
    assert root.state["x"] == 1


def test_random_programs_give_a_result_or_an_error_of_ours() -> None:
    rng = random.Random(7)
    pieces = [code[:-1] for code in (*READ.values(), *REFUSED.values())] + [b"0", b"1", b"2", b"a", b"e", b"s", b"b"]
    for _ in range(3000):
        data = b"".join(rng.choice(pieces) for _ in range(rng.randint(1, 30))) + b"."
        try:
            root = read_pickle(data).root
        except FormatError:
            continue
        list(walk(root))
        try:
            written = write_pickle(root, lower=lambda node: node, protocol=2)
        except UnsupportedError:
            continue
        read_pickle(written)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("('storage', <class 'torch.HalfStorage'>, '0', 'xla', 6)", ["storage", "torch.HalfStorage", "0", "xla", 6]),
        ("('storage', <class 'a.b.C'>, '94', 'cpu', 6, None)", ["storage", "a.b.C", "94", "cpu", 6, None]),
        ('''('module', <class 'm.Net'>, 'n.py', "it's\\n\\x00 \\\\")''', ["module", "m.Net", "n.py", "it's\n\0 \\"]),
        ("('a', 'b\"c')", ["a", 'b"c']),
    ],
)  # fmt: skip
def test_a_tuple_that_protocol_0_made_text_of(text: str, items: list[object]) -> None:
    seen: list[Any] = []
    result = read_pickle(b"P" + text.encode() + b"\n.", persistent_load=seen.append)
    assert result.text_ids
    assert [item.qualified if isinstance(item, Global) else item for item in seen[0]] == items
    assert [name.qualified for name in result.globals] == items[1:2] * ("<class" in text)


@pytest.mark.parametrize(
    "text",
    [
        "0", "('a',)", "('a', 01)", "('a', -1)", "('a', 1.0)", "('a', b)", "('a',  'b')", "('a', 'b') ", "['a', 'b']",
        "('a', \"b\")", "('a', '\\q')", "('a', '\\N{DIGIT ONE}')", "('a', '\\x41')", "('a', <class 'C'>)", "('a', f())",
        "('a', <class 'a.b'>.c)", "('a', 'b' 'c')", "('a', ('b', 'c'))", "('a', '\\uD800')",
    ],
)  # fmt: skip
def test_any_other_text_stays_text(text: str) -> None:
    seen: list[object] = []
    result = read_pickle(b"P" + text.encode() + b"\n.", persistent_load=seen.append)
    assert seen == [text]
    assert not result.text_ids
