"""Files of some kilobytes, or megabytes, that ask for more than the machine has: of memory, of time, of disk."""

from __future__ import annotations

import struct
import zipfile
import zlib
from functools import cache
from typing import Any

import pytest

pytestmark = pytest.mark.thorough

HOSTILE, REFUSED, READ, ANSWERED = "hostile", "refused", "read", "answered"

ASKED = ["json", "pth"]
"""Of the commands of `conftest`: the samples are large, and the test run must stay short."""

BOUNDS = {"memory": 320 << 20, "seconds": 6}
"""Three times what the largest sample takes, and what takes the square of a sample's size is far above them."""

DEPTH = 11_000
"""Levels: eleven times what Python itself recurses, and more than any Python's C code does (10,000)."""


def put(number: int) -> bytes:
    return b"r" + struct.pack("<I", number)


def get(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def doubled(kind: str, levels: int = 1200) -> bytes:
    """Nodes of which each holds the one before it several times, with a tensor at the bottom: 3**1200 by a naive walk."""
    level = {
        "list": lambda i: b"](" + get(i) * 3 + b"e" + put(i + 1),
        "tuple": lambda i: get(i) * 3 + b"\x87" + put(i + 1),
        "dict": lambda i: b"}(K\x01" + get(i) + b"K\x02" + get(i) + b"K\x03" + get(i) + b"u" + put(i + 1),
        "named dict": lambda i: b"}(U\x01a" + get(i) + b"U\x01b" + get(i) + b"U\x01c" + get(i) + b"u" + put(i + 1),
        "object": lambda i: b"cmine\nNet\n" + get(i) * 3 + b"\x87R" + put(i + 1),
        "state": lambda i: b"cmine\nNet\n)R}(U\x01a" + get(i) + b"U\x01b" + get(i) + b"ub" + put(i + 1),
        "key": lambda i: b"}(" + get(i) + b"K\x01" + get(i) + b"K\x02u" + put(i + 1),
        "set": lambda i: b"\x8f(" + get(i) * 3 + b"\x90" + put(i + 1),
        "module": lambda i: (
            b"cmine\nNet\n)R}(U\x0b_parametersN"
            + b"U\x08_buffersN"
            + b"U\x08_modules}(U\x01a"
            + get(i)
            + b"U\x01b"
            + get(i)
            + b"uub"
            + put(i + 1)
        ),
        "optimizer": lambda i: b"}(U\x05state" + get(i) + b"U\x0cparam_groups](" + get(i) + b"eu" + put(i + 1),
    }[kind]
    return b"".join(level(i) for i in range(levels))


def laughs(kind: str, levels: int = 1200) -> Any:
    def sample(m: Any) -> bytes:
        steps = doubled(kind, levels)
        return m.zip(
            b"\x80\x02(" + m.tensor() + put(0) + steps + b"1}(U\x05model" + get(levels) + b"U\x01w" + get(0) + b"u."
        )  # type: ignore[no-any-return]

    return sample


def nested(before: bytes, after: bytes, depth: int = DEPTH) -> Any:
    def sample(m: Any) -> bytes:
        return m.zip(
            b"\x80\x02}(U\x05model" + before * depth + m.tensor() + after * depth + b"U\x01w" + m.tensor() + b"u."
        )  # type: ignore[no-any-return]

    return sample


def references(count: int) -> Any:
    """One tensor under very many names, in lists that are no section."""

    def sample(m: Any) -> bytes:
        return m.zip(b"\x80\x02}(U\x05model" + m.tensor() + put(0) + b"U\x04list](" + b"h\x00" * count + b"eu.")  # type: ignore[no-any-return]

    return sample


@cache
def bomb(nbytes: int) -> bytes:
    """Deflated zeros."""
    deflater = zlib.compressobj(9, wbits=-15)
    piece, packed = bytes(1 << 20), b""
    for _ in range(nbytes >> 20):
        packed += deflater.compress(piece)
    return packed + deflater.flush()


def bombed(m: Any, name: str, nbytes: int, declared: int | None = None, **fields: Any) -> bytes:
    entries = [entry for entry in m.entries() if entry["name"] != name]
    size = nbytes if declared is None else declared
    return m.raw_zip([*entries, {"name": name, "data": bomb(nbytes), "method": 8, "nbytes": size, "crc": 0, **fields}])  # type: ignore[no-any-return]


SAMPLES: Any = {
    # Declared sizes.
    "a memo index of four billion": (READ, lambda m: m.zip(b"\x80\x02]r\xff\xff\xff\xff0j\xff\xff\xff\xff.")),
    "a memo index of 20 digits": (ANSWERED, lambda m: m.zip(b"\x80\x02]p18446744073709551615\n0g18446744073709551615\n.")),
    "a string of four gigabytes": (REFUSED, lambda m: m.zip(b"\x80\x02X\xff\xff\xff\xff.")),
    "a string of exabytes": (REFUSED, lambda m: m.zip(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".")),
    "bytes of exabytes": (REFUSED, lambda m: m.zip(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".")),
    "a bytearray of exabytes": (REFUSED, lambda m: m.zip(b"\x80\x05\x96" + struct.pack("<Q", 1 << 63) + b".")),
    "a frame of exabytes": (REFUSED, lambda m: m.zip(b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + b"N.")),
    "an integer of two gigabytes": (REFUSED, lambda m: m.zip(b"\x80\x02\x8b\xff\xff\xff\x7f.")),
    "an integer of a negative length": (REFUSED, lambda m: m.zip(b"\x80\x02\x8b\xff\xff\xff\xff.")),
    "an integer of 100,000 bytes": (REFUSED, lambda m: m.zip(b"\x80\x02\x8b" + struct.pack("<I", 100_000) + b"\x01" * 100_000 + b".")),
    "an integer of a million digits": (REFUSED, lambda m: m.zip(b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.")),
    "a float of a million digits": (REFUSED, lambda m: m.zip(b"\x80\x02F" + b"9" * 1_000_000 + b"\n.")),
    "a line without end": (REFUSED, lambda m: m.zip(b"\x80\x02c" + b"a" * 1_000_000)),
    # Depth.
    "lists in lists": (READ, nested(b"]", b"a")),
    "tuples in tuples": (READ, nested(b"(", b"t")),
    "dicts in dicts": (READ, nested(b"}U\x01k", b"s")),
    "dicts as keys": (READ, nested(b"}", b"Ns")),
    "sets in sets": (READ, nested(b"\x8f(", b"\x90")),
    "frozensets in frozensets": (READ, nested(b"(", b"\x91")),
    "objects as arguments": (READ, nested(b"cmine\nNet\n", b"\x85R")),
    "objects as states": (READ, nested(b"cmine\nNet\n)R", b"b")),
    "objects in attributes": (READ, nested(b"cmine\nNet\n)R}U\x01a", b"sb")),
    "objects as callees": (READ, lambda m: m.zip(b"\x80\x02}(U\x01w" + m.tensor() + b"U\x01ocmine\nNet\n" + b")R" * DEPTH + b"u.")),
    "modules in modules": (
        REFUSED, nested(b"cmine\nNet\n)R}(U\x0b_parametersNU\x08_buffersNU\x08_modules}U\x01m", b"sub")
    ),
    "persistent ids in persistent ids": (REFUSED, nested(b"", b"Q")),
    "OrderedDicts of pairs": (READ, nested(b"ccollections\nOrderedDict\n(](]U\x01k", b"eetR" , 0)),
    "graph modules in graph modules": (
        ANSWERED,
        nested(b"ctorch.fx.graph_module\nreduce_graph_module\n(}(U\x0b_parametersNU\x08_buffersNU\x08_modules}U\x01m", b"suU\x00tR", 5_500),
    ),
    "marks without end": (REFUSED, lambda m: m.zip(b"\x80\x02" + b"(" * 1_000_000 + b".")),
    "a list that holds itself": (READ, lambda m: m.zip(b"\x80\x02}(U\x01w" + m.tensor() + b"U\x01l]q\x01h\x01au.")),
    "a dict that holds itself": (READ, lambda m: m.zip(b"\x80\x02}q\x01(U\x01w" + m.tensor() + b"U\x01dh\x01u.")),
    "an object that is its own state": (READ, lambda m: m.zip(b"\x80\x02}(U\x01w" + m.tensor() + b"U\x01ocmine\nNet\n)Rq\x01h\x01bu.")),
    "a module that holds itself": (
        REFUSED, lambda m: m.zip(b"\x80\x02cmine\nNet\n)Rq\x01}(U\x0b_parameters}U\x01w" + m.tensor() + b"sU\x08_buffersNU\x08_modules}U\x01mh\x01sub.")
    ),
    # What doubles.
    **{f"laughs: {kind}": (READ if kind not in ("module", "optimizer", "named dict") else ANSWERED, laughs(kind))
       for kind in ("list", "tuple", "dict", "named dict", "object", "state", "key", "set", "module", "optimizer")},
    "laughs: forty modules deep": (REFUSED, laughs("module", 40)),
    "laughs: lists doubled in place": (
        READ, lambda m: m.zip(b"\x80\x02}(U\x01w" + m.tensor() + b"U\x01l]q\x01" + b"(h\x01h\x01e" * 5_500 + b"u.")
    ),
    "one tensor in a list 27,500 times": (READ, references(27_500)),
    "one string of a megabyte 10,000 times": (READ, lambda m: m.zip(m.beside(m.text("s" * 1_000_000) + b"q\x050](" + b"h\x05" * 10_000 + b"e"))),
    "one key of a megabyte in 10,000 dicts": (
        READ, lambda m: m.zip(m.beside(m.text("k" * 1_000_000) + b"q\x050](" + b"}h\x05Ns" * 10_000 + b"e"))
    ),
    "one name of a megabyte under 2,000 tensors": (
        REFUSED, lambda m: m.zip(m.beside(m.text("k" * 1_000_000) + b"q\x050" + m.tensor() + b"q\x060](" + b"}h\x05h\x06s" * 2_000 + b"e"))
    ),
    "a key of ten megabytes": (READ, lambda m: m.zip(m.state_dict(key="k" * 10_000_000))),
    "keys of a megabyte, 20 of them": (
        READ, lambda m: m.zip(m.state_dict(*(m.text(f"{i}" + "k" * 1_000_000) + m.tensor() for i in range(20))))
    ),
    "module names of a megabyte": (
        ANSWERED,
        lambda m: m.zip(b"\x80\x02" + m.text("k" * 1_000_000) + b"q\x050" + m.tensor() + b"q\x060"
                        + b"cmine\nNet\n)R}(U\x0b_parameters}h\x05h\x06sU\x08_buffersNU\x08_modules}h\x05" * 500 + b"N" + b"sub" * 500 + b"."),
    ),
    "2,750 sections": (READ, lambda m: m.zip(b"\x80\x02}(" + b"".join(m.text(f"s{i}") + m.state_dict()[2:-1] for i in range(2_750)) + b"u.")),
    "one state_dict under 16,500 keys": (
        READ, lambda m: m.zip(b"\x80\x02}(U\x05model" + m.state_dict()[2:-1] + put(0) + b"".join(m.text(f"s{i}") + b"h\x00" for i in range(16_500)) + b"u.")
    ),
    # What collides when hashed, or is not hashed at all.
    "dicts keyed by huge numbers": (READ, lambda m: m.zip(m.beside(b"}(" + b"".join(m.long(i * ((1 << 61) - 1)) + b"N" for i in range(1, 30_000)) + b"u"))),
    "dicts keyed by tuples": (READ, lambda m: m.zip(m.beside(b"}(" + b"".join(m.numbers(i, -i) + b"N" for i in range(16_500)) + b"u"))),
    "dicts keyed by lists": (READ, lambda m: m.zip(m.beside(b"}(]N]N]Nu"))),
    "dicts keyed by tensors": (READ, lambda m: m.zip(m.beside(b"}(" + m.tensor() + b"N" + m.tensor() + b"Nu"))),
    "sets of huge numbers": (READ, lambda m: m.zip(m.beside(b"\x8f(" + b"".join(m.long(i * ((1 << 61) - 1)) for i in range(1, 30_000)) + b"\x90"))),
    "a memo of numbers that collide": (READ, lambda m: m.zip(b"\x80\x02N" + b"".join(b"p%d\n" % (i << 42) for i in range(30_000)) + b".")),
    "nan as a key, often": (READ, lambda m: m.zip(m.beside(b"}(" + b"G\x7f\xf8\x00\x00\x00\x00\x00\x00N" * 10_000 + b"u"))),
    "state of an optimizer under huge numbers": (
        READ,
        lambda m: m.zip(m.beside(b"}(U\x05state}(" + b"".join(m.long(i * ((1 << 61) - 1)) + m.tensor() for i in range(1, 3_000)) + b"uU\x0cparam_groups]u")),
    ),
    # Names.
    "51,000 names": (REFUSED, lambda m: m.zip(m.beside(b"](" + b"".join(b"cm\nn%d\n" % i for i in range(51_000)) + b"e"))),
    "5,500 names": (READ, lambda m: m.zip(m.beside(b"](" + b"".join(b"cm\nn%d\n" % i for i in range(5_500)) + b"e"))),
    "11,000 dangerous names": (HOSTILE, lambda m: m.zip(m.beside(b"](" + b"".join(b"cos\nn%d\n" % i for i in range(11_000)) + b"e"))),
    "names of 4,000 dots": (HOSTILE, lambda m: m.zip(m.beside(b"](" + b"".join(b"c" + b"a." * 2000 + b"\n" + b"b." * 2000 + b"%d\n" % i for i in range(500)) + b"e"))),
    "a name of 10,000 bytes": (REFUSED, lambda m: m.zip(m.beside(b"cmine\n" + b"n" * 10_000 + b"\n"))),
    "a bare pickle of 17,000 names": (ANSWERED, lambda m: b"\x80\x02" + b"".join(b"ca\nb%d\n" % i for i in range(17_000)) + b"\xff"),
    # Archives.
    "a deflated pickle of 300 MiB": (REFUSED, lambda m: bombed(m, "archive/data.pkl", 300 << 20)),
    "a deflated pickle that declares less": (REFUSED, lambda m: bombed(m, "archive/data.pkl", 300 << 20, 1000)),
    "a deflated pickle that declares exabytes": (
        REFUSED, lambda m: bombed(m, "archive/data.pkl", 1 << 20, 0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 1 << 60))
    ),
    "a deflated version of 100 MiB": (REFUSED, lambda m: bombed(m, "archive/version", 100 << 20)),
    "a deflated byte order of 100 MiB": (REFUSED, lambda m: bombed(m, "archive/byteorder", 100 << 20)),
    "a deflated storage of 200 MiB": (REFUSED, lambda m: bombed(m, "archive/data/0", 200 << 20)),
    "deflated pickles beside it, of 200 MiB each": (
        ANSWERED,
        lambda m: m.raw_zip([*m.entries(), *({"name": f"archive/{i}.pkl", "data": bomb(200 << 20), "method": 8, "nbytes": 200 << 20, "crc": 0} for i in range(8))]),
    ),
    "27,500 records": (READ, lambda m: m.raw_zip([*m.entries(), *({"name": f"archive/data/{i}", "data": b""} for i in range(1, 27_500))])),
    "27,500 pickles beside it": (ANSWERED, lambda m: m.raw_zip([*m.entries(), *({"name": f"archive/x{i}.pkl", "data": b"\x80\x02N."} for i in range(27_500))])),
    "a root of 4,000 bytes": (READ, lambda m: m.zip(m.state_dict(), root="r" * 4000)),
    "legacy: lists in lists": (READ, lambda m: m.legacy(b"\x80\x02}(U\x01w" + m.tensor() + b"U\x01x" + b"]" * DEPTH + b"a" * (DEPTH - 1) + b"u.")),
    "legacy: a string of exabytes": (REFUSED, lambda m: m.legacy(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".")),
    "legacy: 110,000 keys": (REFUSED, lambda m: m.legacy(m.state_dict(), keys=b"\x80\x02](" + b"".join(m.text(str(i)) for i in range(110_000)) + b"e.")),
    "torchscript: lists in lists": (
        ANSWERED, lambda m: m.zip(b"\x80\x02}(U\x01w" + m.tensor() + b"U\x01x" + b"]" * DEPTH + b"a" * (DEPTH - 1) + b"u.", {"archive/constants.pkl": b"\x80\x02)."})
    ),
    "torchscript: code of 100 MiB": (
        ANSWERED,
        lambda m: m.raw_zip([*m.entries(), {"name": "archive/constants.pkl", "data": b"\x80\x02)."},
                             {"name": "archive/code/__torch__.py", "data": bomb(100 << 20), "method": 8, "nbytes": 100 << 20, "crc": 0}]),
    ),
}  # fmt: skip
assert zipfile.ZIP_DEFLATED == 8


@pytest.mark.parametrize("name", SAMPLES)
def test_exhaustion(name: str, court: Any) -> None:
    court.judge(name)
