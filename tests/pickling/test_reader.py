"""The reader against CPython: what it accepts means the same, what it refuses is refused by name."""

from __future__ import annotations

import collections
import copyreg
import datetime
import decimal
import io
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.bytesource import ByteRange
from ckptkit.errors import CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.limits import Limits
from ckptkit.pickling.inert import (
    ABSENT,
    Global,
    InertDict,
    InertSet,
    Object,
    PersistentId,
    TreeMap,
    walk,
)
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.tensors import StorageTable
from ckptkit.pickling.writer import write_pickle

CLASSES: dict[tuple[str, str], Any] = {
    (module, cls.__qualname__): cls
    for module, names in {
        "builtins": (set, frozenset, complex, bytearray, bytes, list, int, slice, range, object),
        "__builtin__": (set, frozenset, complex, bytearray, bytes, list, int, slice, range, object),
        "collections": (collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque),
        "datetime": (datetime.datetime, datetime.date),
        "decimal": (decimal.Decimal,),
        "types": (types.SimpleNamespace,),
        "_codecs": (),
    }.items()
    for cls in names
}
CLASSES["__builtin__", "xrange"] = range
CLASSES["__builtin__", "bytes"] = bytes
CLASSES["_codecs", "encode"] = lambda text, encoding: text.encode(encoding)
CLASSES["copy_reg", "_reconstructor"] = CLASSES["copyreg", "_reconstructor"] = copyreg._reconstructor  # type: ignore[attr-defined]


def evaluate(root: object) -> Any:
    """What Python would have made of an inert tree, for the classes listed above."""
    memo: dict[int, Any] = {}

    def value(node: Any) -> Any:
        if node is None or isinstance(node, (bool, int, float, str, bytes, bytearray)):
            return node
        if id(node) in memo:
            return memo[id(node)]
        if isinstance(node, list):
            memo[id(node)] = result = []
            result.extend(map(value, node))
        elif isinstance(node, tuple):
            result = tuple(map(value, node))
        elif isinstance(node, InertDict):
            memo[id(node)] = result = {}
            result.update((value(k), value(v)) for k, v in node.pairs)
        elif isinstance(node, InertSet):
            result = (frozenset if node.frozen else set)(map(value, node.members))
        elif isinstance(node, Global):
            result = CLASSES[node.module, node.name]
        elif isinstance(node, PersistentId):
            result = ("pid", value(node.pid))
        else:
            return made(node)
        return memo.setdefault(id(node), result)

    def made(node: Object) -> Any:
        cls, args = value(node.cls), value(node.args)
        if node.how in ("newobj", "newobj_ex"):
            result = cls.__new__(cls, *args, **(value(node.kwargs) if node.kwargs is not None else {}))
        else:
            result = cls(*args)
        memo[id(node)] = result
        if node.items:
            result.extend(map(value, node.items))
        for key, item in node.pairs:
            result[value(key)] = value(item)
        if node.state is not ABSENT:
            result.__dict__.update(value(node.state))
        return result

    return value(root)


class PythonReader(pickle.Unpickler):
    """The oracle, with the same idea of a persistent id as `evaluate`."""

    def persistent_load(self, pid: object) -> object:
        return ("pid", pid)


def python_value(data: bytes) -> Any:
    return PythonReader(io.BytesIO(data)).load()


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
def test_every_opcode_is_read_as_python_reads_it_or_refused_by_name(name: str) -> None:
    data = READ[name] if name in READ else REFUSED[name]
    assert any(op.name == name for op, _, _ in pickletools.genops(data)), "the sample does not use the opcode"
    if name in READ:
        result = read_pickle(data)
        expected = python_value(data)
        assert evaluate(result.root) == expected
        assert type(evaluate(result.root)) is type(expected)
        assert result.end == len(data)
    else:
        with pytest.raises(UnsupportedError, match=rf"opcode {name}\b"):
            read_pickle(data)


# Whatever honest picklers write.

SHARED = ["shared"]
VALUES = [
    None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, -(2**63),
    -(2**39), 2**100, -(2**2040), 0.0, -0.0, 1.5, float("inf"), -float("inf"), 1e-320, 1e300, 3.14,
    "", "text", "é", "line\nbreak\\", "\ud800", "\U0001f600", "x" * 300, "\x00\x1a\r", b"", b"\x00\xff", b"y" * 300,
    bytearray(b"\x00\xfe"), [], [1], list(range(3000)), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": 1},
    {i: str(i) for i in range(2500)}, {None: 1, (1, 2): 2, 1.5: 3, b"k": 4}, set(), {1, 2}, set(range(1500)),
    frozenset(), frozenset("ab"), 1 + 2j, range(3), slice(1, None, 2), [SHARED, SHARED, (SHARED, SHARED)],
    collections.OrderedDict(a=1, b=[2]), collections.Counter("aab"), collections.deque([1, 2], 5),
    collections.defaultdict(list, {"a": [1]}), datetime.datetime(2020, 1, 2, 3, 4, 5, 6), decimal.Decimal("1.50"),
    types.SimpleNamespace(lr=0.1, nested=types.SimpleNamespace(a=[1])), [[[[[[]]]]]], {"a": {"b": ({"c": [1, {2}]},)}},
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value", VALUES, ids=lambda v: f"{type(v).__name__}-{v!r:.20}".encode("ascii", "replace").decode()
)
def test_the_tree_of_a_python_value_is_that_value(value: object, protocol: int) -> None:
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


def test_several_pickles_in_a_row_are_read_from_where_each_begins() -> None:
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
def test_what_python_2_wrote(data: bytes, expected: object) -> None:
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


# Damage.


def torch_pickle() -> bytes:
    import zipfile

    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2, 3), "n": [1, 2.5, "é", None, True, 70000]}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def read_tensors(data: bytes) -> object:
    file = type("File", (), {"size": 1 << 40, "path": "none"})()
    table = StorageTable(lambda key, nbytes: (ByteRange(file, 0, nbytes), None))
    return read_pickle(data, persistent_load=table.persistent_load, constructors=table.constructors)


@pytest.mark.parametrize("protocol", range(6))
def test_truncation_at_every_byte_is_an_error_of_ours(protocol: int) -> None:
    value = [{"k": (1, 300, 70000, 2**40, -5, "é", b"b", 1.5, None, True)}, {1, 2}, collections.OrderedDict(a=[1, 2])]
    data = pickle.dumps(value, protocol)
    for length in range(len(data)):
        with pytest.raises((CorruptError, UnsupportedError)):
            read_pickle(data[:length])


def test_truncation_of_a_torch_pickle_at_every_byte() -> None:
    data = torch_pickle()
    read_tensors(data)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            read_tensors(data[:length])


def test_every_flipped_byte_gives_a_result_or_an_error_of_ours() -> None:
    data = torch_pickle()
    outcomes = collections.Counter()
    for position in range(len(data)):
        for mask in (*(1 << bit for bit in range(8)), 0xFF, data[position] ^ ord("."), data[position] ^ ord("(")):
            flipped = data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]
            try:
                result = read_tensors(flipped)
                write_pickle(result.root, lower=lambda node: PersistentId(None), protocol=2)  # type: ignore[attr-defined]
                outcomes["read"] += 1
            except FormatError as error:
                assert len(str(error)) < 1000
                outcomes["refused"] += 1
    assert outcomes["read"] > 50
    assert outcomes["refused"] > 50


def test_random_programs_give_a_result_or_an_error_of_ours() -> None:
    import random

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


# Refusals: one line each, and the words that tell which.

FRAME = b"\x95" + struct.pack("<Q", 4)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", CorruptError, "ends early"),
        (b"\x80\x02K", CorruptError, "ends early"),
        (b"J\x01\x02", CorruptError, "ends early"),
        (b"\xff.", CorruptError, "unknown opcode 0xff"),
        (b"\x80\x06N.", UnsupportedError, "protocol 6"),
        (b"N\x80\x02.", UnsupportedError, "PROTO that is not the first"),
        (b"NN.", CorruptError, "STOP with something else"),
        (b"(N.", CorruptError, "STOP with something else"),
        (b".", CorruptError, "STOP with something else"),
        (b"R(((NNN.", CorruptError, "too little on the stack"),
        (b"N(\x85NNN.", CorruptError, "too little on the stack"),
        (b"ttN.", CorruptError, "too little on the stack"),
        (b"(oNNNN.", CorruptError, "too little on the stack"),
        (b"lN.", CorruptError, "needs a MARK"),
        (b"h\x00.", CorruptError, "memo entry 0 is read before"),
        (b"g7\n.", CorruptError, "memo entry 7 is read before"),
        (b"j\xff\xff\xff\xff.", CorruptError, "memo entry 4294967295 is read before"),
        (b"Np-1\n.", CorruptError, "memo entry -1"),
        (b"X\x05\x00\x00\x00abc.", CorruptError, "a string of 5 bytes is declared, 4 are left"),
        (b"\x8d" + struct.pack("<Q", 1 << 60) + b".", CorruptError, "1,152,921,504,606,846,976 bytes is declared"),
        (b"\x8e" + struct.pack("<Q", 1 << 60) + b".", CorruptError, "1,152,921,504,606,846,976 bytes are declared"),
        (b"\x96" + struct.pack("<Q", 1 << 63) + b".", CorruptError, "bytes are declared, 1 are left"),
        (b"B\xff\xff\xff\xff.", CorruptError, "4,294,967,295 bytes are declared"),
        (b"T\xff\xff\xff\xff.", CorruptError, "-1 bytes are declared"),
        (b"\x8b\xff\xff\xff\xff.", CorruptError, "-1 bytes are declared"),
        (b"\x8b\xff\xff\xff\x7f.", LimitError, "bytes of an integer: 2,147,483,647"),
        (b"X\x01\x00\x00\x00\xff.", CorruptError, "not UTF-8"),
        (b"V\\u12\n.", CorruptError, "UNICODE string that cannot be decoded"),
        (b"V\\U00110000\n.", CorruptError, "UNICODE string that cannot be decoded"),
        (b"Vabc", CorruptError, "has no end"),
        (b"P\xff\n.", CorruptError, "not ASCII"),
        (b"c\xff\nx\n.", CorruptError, "not UTF-8"),
        (b"Sabc\n.", CorruptError, "matching quotes"),
        (b"S'\n.", CorruptError, "matching quotes"),
        (b"S'abc\"\n.", CorruptError, "matching quotes"),
        (rb"S'\d'" + b"\n.", UnsupportedError, "escapes that no pickler writes"),
        (rb"S'\101'" + b"\n.", UnsupportedError, "escapes that no pickler writes"),
        (rb"S'\x4'" + b"\n.", UnsupportedError, "escapes that no pickler writes"),
        (b"S'\\'\n.", UnsupportedError, "escapes that no pickler writes"),
        (b"I\xd9\xa1\xd9\xa2\xd9\xa3\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I1_000\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I0x10\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I 1\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I1 \n.", UnsupportedError, "a number that no pickler writes"),
        (b"I+1\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I010\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I1L\n.", UnsupportedError, "a number that no pickler writes"),
        (b"I\n.", UnsupportedError, "a number that no pickler writes"),
        (b"L1_0L\n.", UnsupportedError, "a number that no pickler writes"),
        (b"L\xd9\xa1L\n.", UnsupportedError, "a number that no pickler writes"),
        (b"F1_0.0\n.", UnsupportedError, "a number that no pickler writes"),
        (b"Finfinity\n.", UnsupportedError, "a number that no pickler writes"),
        (b"Np 0\n.", UnsupportedError, "a number that no pickler writes"),
        (FRAME + b"N" + FRAME + b"NNN.", CorruptError, "a frame inside a frame"),
        (FRAME + b"NJ\x00\x00\x00\x000.", CorruptError, "straddles the end of its frame"),
        (b"\x95" + struct.pack("<Q", 1 << 60) + b"N.", CorruptError, "are left: truncated"),
        (FRAME + b"N.NN", CorruptError, "STOP is not the end of its frame"),
        (b"NN\x93.", UnsupportedError, "a name computed at run time"),
        (b"cos\nsystem\n)R\x8c\x01a\x93.", UnsupportedError, "a name computed at run time"),
        (b"\x8c\x01aU\x01\xff\x93.", UnsupportedError, "a name computed at run time"),
        (b"ca\nb\n]R.", UnsupportedError, "whose arguments are list"),
        (b"ca\nb\n)N\x92.", UnsupportedError, "keyword arguments that are no dict"),
        (b"ca\nb\n)R}b}b.", UnsupportedError, "state applied twice to <a.b object>"),
        (b"}Nb.", UnsupportedError, "state applied to a InertDict"),
        (b"ca\nb\nNb.", UnsupportedError, "state applied to <global a.b>"),
        (b")Na.", UnsupportedError, "items appended to a tuple"),
        (b"ca\nb\n)R}bNa.", UnsupportedError, "items appended to <a.b object>"),
        (b"]NNs.", UnsupportedError, "keys set on a list"),
        (b"ca\nb\n)R}bNNs.", UnsupportedError, "keys set on <a.b object>"),
        (b"}(Nu.", CorruptError, "last key has no value"),
        (b"(Nd.", CorruptError, "last key has no value"),
        (b"](N\x90.", UnsupportedError, "members added to a list"),
        (b"(\x91(N\x90.", UnsupportedError, "members added to a InertSet"),
    ],
)  # fmt: skip
def test_refusals(data: bytes, error: type[FormatError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_pickle(data)
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= len(data)


def test_a_frame_of_no_bytes_is_harmless() -> None:
    assert read_pickle(b"\x80\x04\x95" + bytes(8) + b"N.").root is None


@pytest.mark.parametrize("nested", [b"]" * 50_000 + b"a" * 49_999, b")" + b"\x85" * 50_000], ids=["list", "tuple"])
def test_an_error_about_a_deep_node_does_not_go_into_it(nested: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"keys set on a (list|tuple)"):
        read_pickle(nested + b"NNs.")


# Limits.


@pytest.mark.parametrize(
    ("data", "limits", "words"),
    [
        (b"N0" * 10 + b"N.", Limits(opcodes=20), "pickle opcodes: 21 is over the limit of 20"),
        (b"N" * 30, Limits(pickle_nbytes=20), "bytes of a pickle: 30 is over the limit of 20"),
        (b"\x8a\x05\x00\x00\x00\x00\x01.", Limits(int_nbytes=4), "bytes of an integer: 5"),
        (b"L99999999999L\n.", Limits(int_nbytes=4), "bytes of an integer: 5"),
        (b"\x8c\x0aabcdefghij\x8c\x01x\x93.", Limits(name_nbytes=9), "length of a name: 10"),
        (b"\x8c\x01x\x8c\x0aabcdefghij\x93.", Limits(name_nbytes=9), "length of a name: 10"),
    ],
)
def test_limits(data: bytes, limits: Limits, words: str) -> None:
    with pytest.raises(LimitError, match=words):
        read_pickle(data, limits=limits)


def test_a_limit_is_the_last_value_allowed() -> None:
    assert read_pickle(b"N0" * 9 + b"N.", limits=Limits(opcodes=20)).root is None
    assert read_pickle(b"\x8a\x04\x00\x00\x00\x01.", limits=Limits(int_nbytes=4)).root == 1 << 24


def test_a_name_without_end_is_not_searched_for_in_the_whole_file() -> None:
    with pytest.raises(CorruptError, match="has no end within 16 bytes"):
        read_pickle(b"c" + b"a" * 100 + b"\nb\n.", limits=Limits(name_nbytes=16))


def test_a_memo_index_of_four_billion_costs_nothing() -> None:
    tracemalloc.start()
    try:
        assert read_pickle(b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff.").root == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# Depth and explosion.

DEPTH = 100_000
DEEP = {
    "list": b"]" * DEPTH + b"a" * (DEPTH - 1) + b".",
    "tuple": b")" + b"\x85" * (DEPTH - 1) + b".",
    "dict": b"}K\x01" * (DEPTH - 1) + b"}" + b"s" * (DEPTH - 1) + b".",
    "frozenset": b"(" * DEPTH + b"\x91" * DEPTH + b".",
    "set": b"\x8f(" * (DEPTH - 1) + b"\x8f" + b"\x90" * (DEPTH - 1) + b".",
    "persistent": b"]" + b"Q" * (DEPTH - 1) + b".",
    "reduce": b"ca\nb\nq\x000" + b"h\x00" * (DEPTH - 1) + b"]" + b"\x85R" * (DEPTH - 1) + b".",
    "state": b"ca\nb\nq\x000" + b"h\x00)R" * DEPTH + b"b" * (DEPTH - 1) + b".",
    "callee": b"ca\nb\n" + b")R" * (DEPTH - 1) + b".",
    "memo": b"]r\x00\x00\x00\x00" + b"".join(
        b"0]j" + struct.pack("<I", i) + b"ar" + struct.pack("<I", i + 1) for i in range(DEPTH - 1)
    ) + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_nesting_costs_no_python_stack(kind: str) -> None:
    root = read_pickle(DEEP[kind]).root
    count = sum(1 for _ in walk(root))
    assert count >= DEPTH
    written = write_pickle(root, lower=lambda node: node, protocol=4)
    assert sum(1 for _ in walk(read_pickle(written).root)) == count
    assert sum(1 for _ in walk(TreeMap(lambda leaf: leaf)(root))) == count


def test_marks_without_end_are_refused() -> None:
    with pytest.raises(CorruptError, match="STOP"):
        read_pickle(b"(" * DEPTH + b".")


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "object"])
def test_doubling_through_the_memo_is_walked_once(kind: str) -> None:
    double = {
        "list": b"](h%ch%ch%ceq%c",
        "tuple": b"h%ch%ch%c\x87q%c",
        "dict": b"}(K\x01h%cK\x02h%cK\x03h%cuq%c",
        "object": b"ca\nb\nh%ch%ch%c\x87Rq%c",
    }[kind]
    data = b"]q\x00" + b"".join(double % (i, i, i, i + 1) for i in range(200))
    data = b"(" + data + b"1h\xc8."
    started = time.perf_counter()
    root = read_pickle(data).root
    count = sum(1 for _ in walk(root))
    assert 201 <= count <= 402
    copied = TreeMap(lambda leaf: leaf)(root)
    written = write_pickle(copied, lower=lambda node: node, protocol=2)
    assert len(written) < 10_000
    assert sum(1 for _ in walk(read_pickle(written).root)) == count
    assert time.perf_counter() - started < 5


# Nothing is imported, called or built.


def test_nothing_is_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            import os

            return os.system, (f"touch {canary}",)

    pickles = [pickle.dumps([Payload()], protocol) for protocol in range(6)]
    pickles += [
        b"ccanary_module\nNet\n)R.",
        b"(icanary_module\nNet\n.",
        b"(ccanary_module\nNet\no.",
        b"ccanary_module\nNet\n)\x81}\x8c\x01aK\x01sb.",
        b"ccanary_module\nNet\n)}\x92.",
        b"\x8c\x0dcanary_module\x8c\x03Net\x93)R.",
        f"cbuiltins\nexec\n(Vopen({str(canary)!r}, 'w')\ntR.".encode(),
    ]
    before = set(sys.modules)
    for data in pickles:
        root = read_pickle(data).root
        repr(root)
        list(walk(root))
        TreeMap(lambda leaf: leaf)(root)
        write_pickle(root, lower=lambda node: node, protocol=2)
    assert set(sys.modules) == before
    assert not canary.exists()
    python_value(pickles[0])
    assert canary.exists(), "the canary is alive: Python itself would have run it"
