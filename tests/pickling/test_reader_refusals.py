"""What the reader refuses: damage, and structure that honest picklers never write; by name, with the place."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
import torch

from ckptkit import formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.contents import ContentSearch
from ckptkit.inspection import describe_error
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import PersistentId
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.tensors import StorageTable
from ckptkit.pickling.trust import global_uses
from ckptkit.pickling.writer import write_pickle

# Damage.


def torch_pickle() -> bytes:
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
        (b"N\x80\x02.", AmbiguousError, "PROTO that is not the first"),
        (b"NN.", CorruptError, r"STOP without exactly one value on the stack \(2\)$"),
        (b"(N.", CorruptError, "STOP without exactly"),
        (b".", CorruptError, "STOP without exactly"),
        (b"R(((NNN.", CorruptError, "needs more values than the stack has"),
        (b"N(\x85NNN.", CorruptError, "needs more values than the stack has"),
        (b"ttN.", CorruptError, "needs more values than the stack has"),
        (b"(oNNNN.", CorruptError, "needs more values than the stack has"),
        (b"lN.", CorruptError, "needs a MARK"),
        (b"h\x00.", CorruptError, "memo entry 0 is read before"),
        (b"g7\n.", CorruptError, "memo entry 7 is read before"),
        (b"j\xff\xff\xff\xff.", CorruptError, "memo entry 4294967295 is read before"),
        (b"Np-1\n.", CorruptError, "memo entry -1"),
        (b"X\x05\x00\x00\x00abc.", CorruptError, "a string of 5 bytes is declared, but only 4 are left"),
        (b"\x8d" + struct.pack("<Q", 1 << 60) + b".", CorruptError, "1,152,921,504,606,846,976 bytes is declared"),
        (b"\x8e" + struct.pack("<Q", 1 << 60) + b".", CorruptError, "1,152,921,504,606,846,976 bytes are declared"),
        (b"\x96" + struct.pack("<Q", 1 << 63) + b".", CorruptError, "bytes are declared, but only 1 are left"),
        (b"B\xff\xff\xff\xff.", CorruptError, "4,294,967,295 bytes are declared"),
        (b"T\xff\xff\xff\xff.", CorruptError, "-1 bytes are declared"),
        (b"\x8b\xff\xff\xff\xff.", CorruptError, "-1 bytes are declared"),
        (b"\x8b\xff\xff\xff\x7f.", LimitError, "bytes of an integer: 2,147,483,647"),
        (b"X\x01\x00\x00\x00\xff.", CorruptError, "not UTF-8"),
        (b"V\\u12\n.", CorruptError, "UNICODE string that cannot be decoded"),
        (b"V\\U00110000\n.", CorruptError, "UNICODE string that cannot be decoded"),
        (b"Vabc", CorruptError, "does not end"),
        (b"P\xff\n.", CorruptError, "not ASCII"),
        (b"c\xff\nx\n.", CorruptError, "not UTF-8"),
        (b"Sabc\n.", CorruptError, "matching quotes"),
        (b"S'\n.", CorruptError, "matching quotes"),
        (b"S'abc\"\n.", CorruptError, "matching quotes"),
        (rb"S'\d'" + b"\n.", AmbiguousError, "escapes that no pickler writes"),
        (rb"S'\101'" + b"\n.", AmbiguousError, "escapes that no pickler writes"),
        (rb"S'\x4'" + b"\n.", AmbiguousError, "escapes that no pickler writes"),
        (b"S'\\'\n.", AmbiguousError, "escapes that no pickler writes"),
        (b"I\xd9\xa1\xd9\xa2\xd9\xa3\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I1_000\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I0x10\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I 1\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I1 \n.", AmbiguousError, "a number that no pickler writes"),
        (b"I+1\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I010\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I1L\n.", AmbiguousError, "a number that no pickler writes"),
        (b"I\n.", AmbiguousError, "a number that no pickler writes"),
        (b"L1_0L\n.", AmbiguousError, "a number that no pickler writes"),
        (b"L\xd9\xa1L\n.", AmbiguousError, "a number that no pickler writes"),
        (b"F1_0.0\n.", AmbiguousError, "a number that no pickler writes"),
        (b"Finfinity\n.", AmbiguousError, "a number that no pickler writes"),
        (b"Np 0\n.", AmbiguousError, "a number that no pickler writes"),
        (FRAME + b"N" + FRAME + b"NNN.", AmbiguousError, "a frame inside a frame"),
        (FRAME + b"NJ\x00\x00\x00\x000.", AmbiguousError, "straddles the end of its frame"),
        (b"\x95" + struct.pack("<Q", 1 << 60) + b"N.", CorruptError, "are left: truncated"),
        (FRAME + b"N.NN", AmbiguousError, "STOP is not the end of its frame"),
        (b"NN\x93.", AmbiguousError, "a name computed at run time"),
        (b"cos\nsystem\n)R\x8c\x01a\x93.", AmbiguousError, "a name computed at run time"),
        (b"\x8c\x01aU\x01\xff\x93.", AmbiguousError, "a name computed at run time"),
        (b"ca\nb\n]R.", UnsupportedError, "whose arguments are list"),
        (b"ca\nb\n)N\x92.", UnsupportedError, "keyword arguments that are not a dict"),
        (b"ca\nb\n)R}b}b.", AmbiguousError, "state applied twice to <a.b object>"),
        (b"}Nb.", UnsupportedError, "state applied to a InertDict"),
        (b"ca\nb\nNb.", UnsupportedError, "state applied to <global a.b>"),
        (b")Na.", UnsupportedError, "items appended to a tuple"),
        (b"ca\nb\n)R}bNa.", UnsupportedError, "items appended to <a.b object>"),
        (b"]NNs.", UnsupportedError, "keys set on a list"),
        (b"ca\nb\n)R}bNNs.", UnsupportedError, "keys set on <a.b object>"),
        (b"}(Nu.", CorruptError, "last key of a dict has no value"),
        (b"(Nd.", CorruptError, "last key of a dict has no value"),
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


# What is refused is still reported.


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"cos\nsystem\n(X\x02\x00\x00\x00idtR\xff", CorruptError),
        (b"cos\nsystem\n(X\x02\x00\x00\x00idtR", CorruptError),
        (b"cos\nsystem\n(X\x02\x00\x00\x00idtRh\x07.", CorruptError),
        (b"cos\nsystem\n\x8b\xff\xff\xff\x7f", LimitError),
        (b"cos\nsystem\n\x82\x01.", AmbiguousError),
        (b"cos\nsystem\n\x97.", UnsupportedError),
    ],
)
def test_the_names_before_an_error_are_in_the_error(data: bytes, error: type[FormatError]) -> None:
    with pytest.raises(error) as caught:
        read_pickle(data)
    assert [(use.name, use.verdict) for use in caught.value.globals] == [("os.system", "dangerous")]


def test_what_follows_stop_is_refused_where_the_pickle_must_be_all() -> None:
    data = b"ca\nb\n." + b"cos\nsystem\n."
    assert read_pickle(data).end == 6
    with pytest.raises(AmbiguousError, match="12 bytes follow the pickle's STOP") as caught:
        read_pickle(data, whole=True)
    assert caught.value.offset == 6
    assert [use.name for use in caught.value.globals] == ["a.b"]


def test_an_error_keeps_the_names_of_the_pickles_before_it() -> None:
    with pytest.raises(CorruptError) as caught:
        read_pickle(b"ca\nb\n\xff")
    earlier = global_uses(read_pickle(b"cos\nsystem\n.").globals, "first.pkl")
    error = caught.value.at(path="file.pth", where="second", seen=earlier)
    assert [use.name for use in error.globals] == ["os.system", "a.b"]
    assert str(error) == "file.pth: second, byte 5: unknown opcode 0xff: damaged, or not a pickle"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"cos\nsystem\n.", ["os.system"]),
        (b"ca\nb\n.cos\nsystem\n.ca\nb\n.", ["a.b", "os.system"]),
        (b"\x80\x04ca\nb\n\xff\xff", ["a.b"]),
        (b"just some text", []),
        (b"", []),
    ],
)
def test_the_names_in_a_record_that_nothing_refers_to(data: bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    contents = ContentSearch(DEFAULT_LIMITS)
    with closing(SourceFile(tmp_path / "x")) as file:
        contents.look("archive/evil.pkl", ByteRange(file, 0, file.size))
    uses = [use for use in contents.uses() if use.kind == "name"]
    assert [use.name for use in uses] == expected
    assert all(use.where == ("archive/evil.pkl",) for use in uses)


# What a pickle that ends badly has run by then.

SYSTEM = b"cposix\nsystem\nX\x02\x00\x00\x00id\x85R"
EXEC = b"cbuiltins\nexec\nX\x04\x00\x00\x00pass\x85R"


@pytest.mark.parametrize(
    ("data", "count", "named"),
    [
        (SYSTEM + b"N.", 2, "posix.system"),
        (b"N" + EXEC + b"0(N.", 2, "builtins.exec"),
        (EXEC + SYSTEM + b"NN.", 4, "builtins.exec, posix.system"),
        (b"ccollections\nOrderedDict\n)R" + SYSTEM + b".", 2, "posix.system, collections.OrderedDict"),
        (SYSTEM + b"0.", 0, "posix.system"),
        (b"(" + SYSTEM + b"1.", 0, "posix.system"),
        (b"\x8c\x05posix\x8c\x06system\x93)R.".replace(b")R", b"N"), 2, "posix.system"),
    ],
)
def test_values_left_on_the_stack_are_named(data: bytes, count: int, named: str) -> None:
    with pytest.raises(CorruptError, match=rf"on the stack \({count}") as caught:
        read_pickle(data)
    assert f"it names {named}: CPython takes the last value, and has imported" in caught.value.message
    assert {use.name for use in caught.value.globals if use.verdict == "dangerous"} <= set(named.split(", "))
    assert any(use.verdict == "dangerous" for use in caught.value.globals)


@pytest.mark.parametrize(
    "data",
    [SYSTEM + b"0N.", b"(" + SYSTEM + b"1N.", b"((" + SYSTEM + b"t1N.", SYSTEM + b"p0\n0g0\n0N."],
)
def test_what_is_popped_is_named(data: bytes) -> None:
    assert [use.name for use in global_uses(read_pickle(data).globals) if use.verdict == "dangerous"] == [
        "posix.system"
    ]


def refused(path: Path) -> tuple[str, list[str]]:
    """What is told of a file that is refused: its trust and its dangerous names."""
    with pytest.raises(FormatError) as caught:
        formats.read(path)
    document = describe_error(str(path), caught.value)
    return document["trust"], [name["name"] for name in document["globals"] if name["verdict"] == "dangerous"]


@pytest.mark.parametrize("rest", [b"\xff", b"R.", b"h\x07.", b"X\xff\xff\x00\x00", b"2.", b"\x80\x09.", b""])
def test_what_ran_before_an_error_is_named(rest: bytes, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read_pickle(SYSTEM + b"0" + rest)
    assert [use.name for use in caught.value.globals if use.verdict == "dangerous"] == ["posix.system"]
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + SYSTEM + b"0" + rest)
    assert refused(path) == ("hostile", ["posix.system"])


@pytest.mark.parametrize("odd", [b"N20", b"\x80\x02", b"I0x10\n0", rb"S'\d'" + b"\n0", b"\x82\x01", b"]p\x00\x002"])
def test_what_others_would_run_behind_what_is_refused_is_named(odd: bytes, tmp_path: Path) -> None:
    """CPython goes on where this reader stops."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02" + odd + SYSTEM + b".")
    assert refused(path)[0] == "hostile"
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + odd + SYSTEM + b".")
        archive.writestr("a/version", "3")
    trust, names = refused(tmp_path / "x.pth")
    assert trust == "hostile" and "posix.system" in names
