"""Tensors that lie about themselves: sizes, strides, offsets, storages."""

from __future__ import annotations

import struct
from typing import Any

import pytest

HOSTILE, REFUSED, READ, ANSWERED = "hostile", "refused", "read", "answered"

BOUNDS = {"memory": 512 << 20, "seconds": 5}
"""A quarter of what larger samples are given: what takes the square of a sample's size is far above them."""

BIG = 1 << 62


def one(m: Any, **geometry: Any) -> bytes:
    """An archive with one tensor of odd geometry."""
    return m.zip(b"\x80\x02}" + m.text("w") + m.tensor(**geometry) + b"s.")  # type: ignore[no-any-return]


def two(m: Any, first: bytes, second: bytes) -> bytes:
    return m.zip(  # type: ignore[no-any-return]
        b"\x80\x02}(" + m.text("a") + m.tensor(first) + m.text("b") + m.tensor(second) + b"u."
    )


def colliding_shapes(count: int) -> list[tuple[int, int]]:
    """Pairs whose tuples have one hash in CPython (xxHash of the members' own hashes), found by solving for the second."""
    p1, p2, p5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    mask = (1 << 64) - 1
    inverse = [pow(p, -1, 1 << 64) for p in (p1, p2)]

    def after(acc: int, lane: int) -> int:
        acc = (acc + lane * p2) & mask
        return ((acc << 31 | acc >> 33) * p1) & mask

    target = after(after(p5, 1), 1)
    found: list[tuple[int, int]] = []
    first = 1
    while len(found) < count:
        acc = after(p5, first)
        turned = target * inverse[0] & mask
        second = ((turned >> 31 | turned << 33) - acc) * inverse[1] & mask
        if second < 1 << 60:
            found.append((first, second))
        first += 1
    assert len({hash(pair) for pair in found}) == 1
    return found


def colliding(m: Any) -> bytes:
    """Views of one storage whose shapes collide in any dict that hashes them."""
    tensors = b"".join(
        m.text(f"t{i}") + m.tensor(b"h\x01", shape=shape, stride=(0, 0))
        for i, shape in enumerate(colliding_shapes(10_000))
    )
    return m.zip(b"\x80\x02" + m.storage + b"q\x010}(" + tensors + b"u.")  # type: ignore[no-any-return]


SAMPLES: Any = {
    "honest": (READ, one),
    "10^12 elements out of a stride of 0": (READ, lambda m: one(m, shape=(10**12,), stride=(0,))),
    "10^18 elements, twice": (READ, lambda m: one(m, shape=(10**9, 10**9), stride=(0, 0))),
    "2^62 elements": (REFUSED, lambda m: one(m, shape=(BIG,), stride=(0,))),
    "64 dimensions of 2^61": (REFUSED, lambda m: one(m, shape=(BIG - 1,) * 64, stride=(0,) * 64)),
    "65 dimensions": (REFUSED, lambda m: one(m, shape=(1,) * 65, stride=(1,) * 65)),
    "50,000 dimensions": (REFUSED, lambda m: one(m, shape=(1,) * 50_000, stride=(1,) * 50_000)),
    "50,000 dimensions of nothing": (REFUSED, lambda m: one(m, shape=(0,) * 50_000, stride=(1,) * 50_000)),
    "a size past the storage": (REFUSED, lambda m: one(m, shape=(5,))),
    "an offset past the storage": (REFUSED, lambda m: one(m, offset=1)),
    "a stride past the storage": (REFUSED, lambda m: one(m, shape=(2,), stride=(4,))),
    "a negative size": (REFUSED, lambda m: one(m, shape=(-1,))),
    "a negative stride": (REFUSED, lambda m: one(m, stride=(-1,))),
    "a negative offset": (REFUSED, lambda m: one(m, offset=-1)),
    "two negative sizes": (REFUSED, lambda m: one(m, shape=(-2, -2), stride=(2, 1))),
    "sizes and strides of different length": (REFUSED, lambda m: one(m, shape=(2, 2), stride=(1,))),
    "an offset of 2^70": (REFUSED, lambda m: one(m, offset=1 << 70)),
    "a stride of 2^70": (REFUSED, lambda m: one(m, stride=(1 << 70,))),
    "a size of 1000 bytes": (REFUSED, lambda m: one(m, shape=(1 << 8000,))),
    "an offset that overflows to the right one": (REFUSED, lambda m: one(m, offset=(1 << 64) - 0)),
    "nothing, far outside": (ANSWERED, lambda m: one(m, shape=(0,), offset=10**9)),
    "sizes that are no numbers": (REFUSED, lambda m: m.zip(m.state_dict().replace(m.numbers(4), b"(" + m.text("4") + b"t", 1))),
    "sizes that are booleans": (REFUSED, lambda m: m.zip(m.state_dict().replace(m.numbers(4), b"(\x88t", 1))),
    # Storages.
    "an element count that lies, upwards": (REFUSED, lambda m: one(m, storage=m.storage_id("0", 5), shape=(5,))),
    "an element count that lies, downwards": (REFUSED, lambda m: one(m, storage=m.storage_id("0", 3), shape=(3,))),
    "an element count of 2^61": (REFUSED, lambda m: one(m, storage=m.storage_id("0", 1 << 61))),
    "a negative element count": (REFUSED, lambda m: one(m, storage=m.storage_id("0", -4))),
    "one storage, two dtypes": (REFUSED, lambda m: two(m, m.storage, m.storage_id("0", 4, b"ctorch\nIntStorage\n"))),
    "one storage, two sizes": (REFUSED, lambda m: two(m, m.storage, m.storage_id("0", 2))),
    "one storage, two dtypes of one size in bytes": (REFUSED, lambda m: two(m, m.storage_id("0", 2, b"ctorch\nDoubleStorage\n"), m.storage)),
    "one storage, two devices": (REFUSED, lambda m: two(m, m.storage, m.storage_id("0", 4, location="cuda:0"))),
    "a storage that is not there": (REFUSED, lambda m: one(m, storage=m.storage_id("7", 4))),
    "a storage of an unknown class": (REFUSED, lambda m: one(m, storage=m.storage_id("0", 4, b"cmine\nStorage\n"))),
    "a storage whose class is dangerous": (HOSTILE, lambda m: one(m, storage=m.storage_id("0", 4, b"cos\nsystem\n"))),
    "a storage without its facts": (REFUSED, lambda m: m.zip(b"\x80\x02(" + m.text("storage") + b"tQ.")),
    "a persistent id that is no storage's": (REFUSED, lambda m: m.zip(b"\x80\x02" + m.text("other") + b"Q.")),
    "a view of a view of a storage": (REFUSED, lambda m: m.zip(m.state_dict().replace(b"tQ", m.text("v") + b"tQ"))),
    "a location without end": (READ, lambda m: one(m, storage=m.storage_id("0", 4, location="cuda:" + "9" * 100_000))),
    "tensors that nest in their attributes": (
        REFUSED,
        lambda m: m.zip(
            b"\x80\x02" + m.storage + b"q\x010}" + m.text("w")
            + b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n(h\x01K\x00K\x04\x85K\x01\x85\x89Nt" * 2000
            + b"N" + b"tR" * 2000 + b"s."
        ),
    ),
    "shapes that collide when hashed": (REFUSED, colliding),
    "dtypes that are none": (READ, lambda m: m.zip(m.state_dict().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3").replace(b")RtR", b")Rctorch\nsystem\ntR"))),
    "legacy: 10^12 elements out of a stride of 0": (READ, lambda m: m.legacy(b"\x80\x02}" + m.text("w") + m.tensor(shape=(10**12,), stride=(0,)) + b"s.")),
    "legacy: a view outside its storage": (
        REFUSED,
        lambda m: m.legacy(b"\x80\x02}" + m.text("w") + m.tensor(shape=(2,), stride=(1,)) + b"s.").replace(b"NtQ", b"(" + m.text("v") + m.number(3) + m.number(2) + b"ttQ"),
    ),
    "safetensors: a size that lies": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4))),
    "safetensors: sizes that overflow": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}})),
    "safetensors: a product that is 0 and more": (READ, lambda m: m.safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 0, 1 << 40], "data_offsets": [0, 0]}})),
    "safetensors: overlapping": (REFUSED, lambda m: m.safetensors({k: {"dtype": "U8", "shape": [3], "data_offsets": [i, i + 3]} for i, k in enumerate("ab")}, bytes(4))),
    "safetensors: a hole": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, bytes(2))),
    "safetensors: bytes behind the data": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, bytes(2))),
    "safetensors: outside the file": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, bytes(2))),
    "safetensors: offsets the wrong way round": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, bytes(1))),
    "safetensors: negative": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [-1, 0]}}, bytes(1))),
    "safetensors: fractions": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}, bytes(1))),
    "safetensors: booleans": (REFUSED, lambda m: m.safetensors({"a": {"dtype": "U8", "shape": [True], "data_offsets": [False, True]}}, bytes(1))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_tensor(name: str, court: Any) -> None:
    court.judge(name)


@pytest.mark.thorough
def test_every_command_refuses(court: Any) -> None:
    court.judge_refused()


def test_a_number_is_written_as_the_pickle_has_it(make: Any) -> None:
    assert make.number(5) == b"J" + struct.pack("<i", 5)
    assert make.number(1 << 70).startswith(b"\x8b")
