"""Bounds: what a pickle may ask for, how deep and how wide it may go; and that nothing in it runs."""

from __future__ import annotations

import codecs
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import CorruptError, LimitError
from ckptkit.limits import Limits
from ckptkit.pickling.inert import TreeMap, walk
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.writer import write_pickle

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
        (b"ca\nb\nca\nc\nca\nb\nca\nd\n", Limits(names=2), "names in a pickle: 3 is over the limit of 2"),
    ],
)
def test_limits(data: bytes, limits: Limits, words: str) -> None:
    with pytest.raises(LimitError, match=words):
        read_pickle(data, limits=limits)


def test_a_limit_is_the_last_value_allowed() -> None:
    assert read_pickle(b"N0" * 9 + b"N.", limits=Limits(opcodes=20)).root is None
    assert read_pickle(b"\x8a\x04\x00\x00\x00\x01.", limits=Limits(int_nbytes=4)).root == 1 << 24


def test_a_name_without_end_is_not_searched_for_in_the_whole_file() -> None:
    with pytest.raises(CorruptError, match="does not end within 16 bytes"):
        read_pickle(b"c" + b"a" * 100 + b"\nb\n.", limits=Limits(name_nbytes=16))


def test_a_memo_index_of_four_billion_costs_nothing() -> None:
    tracemalloc.start()
    try:
        assert read_pickle(b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff.").root == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# Depth and explosion.

DEPTH = 11_000
"""Eleven times what Python itself recurses, and more than any Python's C code does (10,000)."""

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
    root = read_pickle(data).root
    count = sum(1 for _ in walk(root))
    assert 201 <= count <= 402
    copied = TreeMap(lambda leaf: leaf)(root)
    written = write_pickle(copied, lower=lambda node: node, protocol=2)
    assert len(written) < 10_000
    assert sum(1 for _ in walk(read_pickle(written).root)) == count


# Nothing is imported, called or built.


def test_nothing_is_imported_or_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_value: Callable[[bytes], Any]
) -> None:
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
    codecs.lookup("raw_unicode_escape")  # Python imports the codec of text in protocol 0 when it is first used
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
