"""Digests, sketches, and the arguments that are solved for."""

from __future__ import annotations

import binascii
import json
import struct
from pathlib import Path

import pytest

from ckptkit.architectures.index import (
    LIBRARIES,
    SKETCH,
    ArchitectureIndex,
    Free,
    load,
    names_digest,
    shapes_digest,
    similarity,
    sketch,
    weights_of,
)


def test_the_digests_do_not_change() -> None:
    """The shipped indexes hold them."""
    assert names_digest(["a.weight", "é"]) == "a30aec3018c7048e"
    assert shapes_digest([(1, 2), (), (3,)]) == "13335c660fda0216"
    assert sketch({"a.weight": (1, 2), "b": ()}) == [704589074, 2590507032]


def test_free_dimensions_may_have_any_size() -> None:
    assert shapes_digest([(10, 4), (10,)], {(0, 0), (1, 0)}) == shapes_digest([(7, 4), (7,)], {(0, 0), (1, 0)})
    assert shapes_digest([(10, 4), (10,)], {(0, 0)}) != shapes_digest([(7, 4), (7,)], {(0, 0)})
    assert shapes_digest([(10, 4)], {(0, 2)}) is None
    assert shapes_digest([(10, 4)], {(1, 0)}) is None


def test_counters_do_not_count() -> None:
    assert weights_of([("b", (1,)), ("bn.num_batches_tracked", ()), ("a", (2,))]) == {"a": (2,), "b": (1,)}


def test_similarity_of_small_models_is_exact() -> None:
    first = {f"{number}.weight": (number,) for number in range(30)}
    second = {f"{number}.weight": (number,) for number in range(10, 40)}
    assert similarity(sketch(first), sketch(second)) == pytest.approx(0.5, abs=0.15)
    assert similarity(sketch(first), sketch(first)) == 1.0
    assert similarity(sketch(first), []) == similarity([], []) == 0.0
    few = {name: first[name] for name in list(first)[:20]}
    assert similarity(sketch(few), sketch(first)) == 20 / 30


@pytest.mark.parametrize(
    ("form", "at", "shapes", "value"),
    [
        ("linear", [(0, 0, 1, 0)], [(10,)], 10),
        ("linear", [(0, 0, 9, 0), (1, 1, 4, 4)], [(18,), (5, 12)], 2),
        ("linear", [(0, 0, 9, 0)], [(19,)], None),
        ("linear", [(0, 0, 1, 0), (1, 0, 1, 0)], [(10,), (11,)], None),
        ("linear", [(0, 0, 1, 5)], [(5,)], None),
        ("linear", [(0, 0, 1, 5)], [(2,)], None),
        ("linear", [(0, 0, 1, 0)], [(1 << 31,)], None),
        ("square", [(0, 1, 16, 1)], [(1, 197)], 224),
        ("square", [(0, 1, 16, 1)], [(1, 198)], None),
        ("square", [(0, 1, 16, 1)], [(1, 0)], None),
    ],
)
def test_an_argument_is_solved_for(form, at, shapes, value: int | None) -> None:
    assert Free(default=3, form=form, at=tuple(at)).solve(shapes) == value


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_shipped_index_is_whole(library: str) -> None:
    index = load(library)
    rows = index.rows()
    assert len(rows) > 100
    assert len({(row.name, json.dumps(row.args)) for row in rows}) == len(rows)
    assert len(index.sketch(len(rows) - 1)) in (SKETCH, rows[-1].tensors)
    assert index.sketch(len(rows)) == []
    for number, row in enumerate(rows):
        assert len(index.sketch(number)) in (SKETCH, row.tensors)
        assert bool(row.trunk) == bool(row.head) == ("num_classes" in row.free)
        assert all(tensor < row.tensors for tensor, _ in row.masked)
        assert all(tensor < row.tensors for free in row.trunk_free.values() for tensor, *_ in free.at)


def test_rows_are_found_by_their_digests() -> None:
    index = load("torchvision")
    for number, row in enumerate(index.rows()):
        assert (number, row) in list(index.having("names", row.names))
        assert row.trunk == "" or (number, row) in list(index.having("trunk", row.trunk))
    assert list(index.having("names", "0" * 16)) == []


def test_rows_are_found_by_their_sketches(tmp_path: Path) -> None:
    rows = [{"name": name, "args": {}, "tensors": 2, "names": name * 16, "shapes": "", "free": {}, "head": [],
             "trunk": "", "trunk_shapes": ""} for name in "abc"]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"made_from": "here"}, *rows]))
    hashes = [[1, 2], [2, 3], [4]]
    packed = [struct.pack(f"<{SKETCH}I", *some, *[0] * (SKETCH - len(some))) for some in hashes]
    (tmp_path / "mine.sketches").write_bytes(b"".join(binascii.b2a_base64(line) for line in packed))
    index = ArchitectureIndex("mine", tmp_path)
    assert index.sharing([2, 3]) == {0: 1, 1: 2}
    assert index.sharing([9]) == {}
    assert [index.sketch(number) for number in range(3)] == hashes
    assert [number for number, _ in index.having("names", "b" * 16)] == [1]
    assert index.row(2).name == "c"
