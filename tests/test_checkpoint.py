"""The common representation: geometry as torch has it, names, ties and trust."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import (
    STATE_DICT,
    Checkpoint,
    GlobalUse,
    Origin,
    StateDict,
    Storage,
    TensorEntry,
    contiguous_stride,
    shared_storages,
)
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, KeyCollisionError

Make = Callable[..., TensorEntry]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """``make(shape, stride, offset)`` over a float32 storage of 24 elements."""
    (tmp_path / "bytes").write_bytes(bytes(96))
    with closing(SourceFile(tmp_path / "bytes")) as file:
        storage = Storage(key="0", dtype="float32", nbytes=96, location="cpu", source=ByteRange(file, 0, 96))

        def entry(shape: Any, stride: Any = None, offset: int = 0, dtype: str = "float32", **more: Any) -> TensorEntry:
            stride = contiguous_stride(shape) if stride is None else stride
            return TensorEntry(
                storage=more.pop("storage", storage), storage_offset=offset, shape=shape, stride=stride, dtype=dtype,
                **more,
            )  # fmt: skip

        yield entry


SHAPES = [(), (0,), (1,), (3,), (2, 3), (0, 3), (3, 0), (2, 0, 3), (1, 1), (2, 1, 3), (2, 3, 4), (0, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_stride_is_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape).stride()


def test_geometry_is_torchs(make: Make) -> None:
    rng = random.Random(0)
    base = torch.zeros(24)
    checked = contiguous = 0
    for _ in range(3000):
        dims = rng.randrange(4)
        shape = tuple(rng.choice((0, 1, 1, 2, 3)) for _ in range(dims))
        stride = tuple(rng.choice((0, 1, 2, 3, 4, 6)) for _ in range(dims))
        offset = rng.randrange(4)
        reach = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if reach >= 24 and 0 not in shape:
            with pytest.raises(CorruptError, match="of a storage of 96 bytes"):
                make(shape, stride, offset).check()
            continue
        entry = make(shape, stride, offset).check()
        view = base.as_strided(shape, stride, offset)
        assert entry.is_contiguous == view.is_contiguous(), (shape, stride)
        assert (entry.numel, entry.nbytes) == (view.numel(), view.numel() * 4)
        start, end = entry.span()
        base.zero_()
        view.fill_(1)
        touched = [index * 4 for index, value in enumerate(base.tolist()) if value]
        assert (start, end) == ((touched[0], touched[-1] + 4) if touched else (offset * 4, offset * 4))
        checked, contiguous = checked + 1, contiguous + entry.is_contiguous
    assert checked > 1000
    assert contiguous > 100


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "message"),
    [
        ((2,), (1, 1), 0, "differ in length"),
        ((-1,), (1,), 0, "none may be negative"),
        ((2,), (-1,), 5, "none may be negative"),
        ((2,), (1,), -1, "none may be negative"),
        ((25,), (1,), 0, r"reach to byte 100 of a storage of 96 bytes"),
        ((24,), (1,), 1, "reach to byte 100"),
        ((1,), (1,), 24, "reach to byte 100"),
        ((), (), 24, "reach to byte 100"),
        ((1 << 61, 1 << 61), (1, 1), 0, "more elements than torch can count"),
        ((2,), (1 << 61,), 0, "of a storage of 96 bytes"),
    ],
)
def test_geometry_outside_the_storage(make: Make, shape: Any, stride: Any, offset: int, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        make(shape, stride, offset).check()


def test_geometry_at_the_edge(make: Make) -> None:
    for shape, stride, offset in [
        ((24,), (1,), 0),
        ((), (), 23),
        ((1 << 40,), (0,), 23),
        ((0,), (1,), 24),
        ((0,), (1,), 1 << 40),
        ((1,), (1 << 60,), 0),
    ]:
        entry = make(shape, stride, offset)
        assert entry.check() is entry


def test_what_is_plain_bytes(make: Make) -> None:
    big = Storage(key="0", dtype=None, nbytes=96, location="cpu", source=make(()).storage.source, byteorder="big")
    assert make((4, 6)).is_plain_bytes
    assert make((2, 3), offset=5).is_plain_bytes
    assert not make((4, 6), (1, 4)).is_plain_bytes
    assert not make((4, 6), is_conj=True).is_plain_bytes
    assert not make((4, 6), is_neg=True).is_plain_bytes
    assert not make((4, 6), storage=big).is_plain_bytes
    assert make((4, 6), dtype="float8_e5m2", storage=big).is_plain_bytes


def test_what_covers_its_storage(make: Make) -> None:
    assert make((4, 6)).covers_storage
    assert make((12,), dtype="complex64").covers_storage
    assert not make((4, 5)).covers_storage
    assert not make((23,), offset=1).covers_storage
    assert not make((4, 6), (1, 4)).covers_storage
    assert not make((24,), (0,)).covers_storage


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_every_dtype(make: Make, dtype: str) -> None:
    entry = make((3, 2), dtype=dtype)
    if getattr(torch, dtype, None) is not None and DTYPES[dtype].kind != "quantized":
        assert entry.itemsize == getattr(torch, dtype).itemsize
    bits = DTYPES[dtype].bits or 8 * DTYPES[dtype].itemsize
    assert entry.nbytes == math.ceil(6 * bits / 8)


def test_ties_are_equal_views(make: Make) -> None:
    one = make((2, 3))
    assert one.view == make((2, 3)).view
    assert one.view == make((2, 3), requires_grad=True, is_parameter=True).view
    others = [
        make((3, 2)),
        make((2, 3), (3, 0)),
        make((2, 3), offset=1),
        make((2, 3), dtype="int32"),
        make((2, 3), is_conj=True),
        make((2, 3), is_neg=True),
        make((2, 3), storage=Storage(key="0", dtype="float32", nbytes=96, location="cpu", source=one.storage.source)),
    ]
    assert len({entry.view for entry in (one, *others)}) == 8
    assert one != make((2, 3))  # entries are compared by identity
    assert one.location == "cpu"


def test_which_storages_are_shared(make: Make) -> None:
    other = Storage(key="1", dtype=None, nbytes=96, location="cpu", source=make(()).storage.source)
    entries = [make((1,)), make((2,), storage=other), make((3,))]
    assert shared_storages(entries) == {id(entries[0].storage)}
    assert shared_storages(entries[:2]) == set()


# StateDict.


def test_a_state_dict_is_a_mapping_of_tensors(make: Make) -> None:
    weight, bias = make((2,)), make((1,))
    state = StateDict({"w": weight, "extra": 3, "b": bias})
    assert list(state) == ["w", "b"]
    assert (len(state), "extra" in state, state["b"]) == (2, False, bias)
    assert dict(state.items()) == {"w": weight, "b": bias}
    assert state.extra == {"extra": 3}
    assert repr(state) == "StateDict(2 tensors: w float32 [2], b float32 [1])"
    assert repr(StateDict()) == "StateDict(0 tensors)"
    assert not StateDict()
    with pytest.raises(KeyError):
        state["extra"]


def test_renaming_keeps_order_values_and_extras(make: Make) -> None:
    weight = make((2,))
    container = object()
    state = StateDict({"m.w": weight, "m.extra": 3}, versions={"m": 1}, container=container)
    renamed = state.renamed(lambda name: name[2:], {"": 1})
    assert list(renamed.everything.items()) == [("w", weight), ("extra", 3)]
    assert renamed.versions == {"": 1}
    assert renamed.container is container
    assert list(state.everything) == ["m.w", "m.extra"]


def test_renaming_never_loses_a_name(make: Make) -> None:
    state = StateDict({"a": make((1,)), "b": make((1,)), "extra": 3})
    with pytest.raises(KeyCollisionError) as caught:
        state.renamed(lambda name: "a" if name == "extra" else name, None)
    assert (caught.value.first, caught.value.second, caught.value.target) == ("a", "extra", "a")
    assert str(caught.value) == "'a' and 'extra' would both be named 'a'; nothing was renamed"
    swapped = state.renamed(lambda name: {"a": "b", "b": "a"}.get(name, name), None)
    assert (swapped["a"], swapped["b"]) == (state["b"], state["a"])


def test_mapping_over_values(make: Make) -> None:
    weight, other = make((2,)), make((3,))
    state = StateDict({"w": weight, "extra": 3}, versions={"": 1}, container="c")
    mapped = state.with_values(lambda value: other if value is weight else value)
    assert (mapped["w"], mapped.extra, mapped.versions, mapped.container) == (other, {"extra": 3}, {"": 1}, "c")
    assert state["w"] is weight


# Checkpoint.


def checkpoint(**more: Any) -> Checkpoint:
    origin = Origin(path="a.pth", size=1, format="torch-zip", kind="other")
    return Checkpoint(**{"state_dict": StateDict(), "rest": None, "origin": origin, **more})


@pytest.mark.parametrize(
    ("verdicts", "trust"),
    [
        ((), "safe"),
        (("torch", "allowed"), "safe"),
        (("torch", "unknown"), "needs_trust"),
        (("dangerous",), "hostile"),
        (("unknown", "dangerous", "torch"), "hostile"),
    ],
)
def test_trust_is_the_worst_verdict(verdicts: Any, trust: str) -> None:
    uses = tuple(GlobalUse(name=f"m.{v}", verdict=v, count=1) for v in verdicts)
    assert checkpoint(globals=uses).trust == trust


def test_rewriters_are_applied_in_turn_and_change_nothing() -> None:
    start = checkpoint()
    seen: list[object] = []

    def step(value: str) -> Callable[[Checkpoint], Checkpoint]:
        def rewrite(given: Checkpoint) -> Checkpoint:
            seen.append(given.rest)
            return given.replace(rest=value)

        return rewrite

    assert start.rewrite(step("a"), step("b")).rest == "b"
    assert seen == [None, "a"]
    assert start.rest is None
    assert start.rewrite() is start
    assert repr(STATE_DICT) == "<state_dict>"
