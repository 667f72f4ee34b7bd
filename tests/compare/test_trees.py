"""Trees nobody writes by hand: the comparison of outputs finds every difference between them, and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.files import one_float

from ckptkit import compare
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import CorruptError
from ckptkit.normalize.trees import Place
from ckptkit.pickling.inert import Global, InertDict, InertSet, Object

Save = Callable[..., Path]


@pytest.fixture
def entry(save: Save) -> Iterator[TensorEntry]:
    with one_float(save) as found:
        yield found


def assert_differ(a: object, b: object) -> str:
    with pytest.raises(CorruptError, match="nothing was written") as caught:
        list(compare._paired_storages([(Place(), a, b)]))
    assert len(caught.value.message) < 1000
    return caught.value.message


def assert_agree(a: object, b: object) -> list[tuple[Place, Storage, Storage]]:
    return list(compare._paired_storages([(Place(), a, b)]))


def nested(depth: int, bottom: object) -> object:
    for _ in range(depth):
        bottom = [bottom]
    return bottom


def test_deep_trees(entry: TensorEntry) -> None:
    assert len(assert_agree(nested(20_000, entry), nested(20_000, entry))) == 1
    assert_differ(nested(20_000, 1), nested(20_000, 2))
    assert_differ(nested(20_000, entry), nested(20_001, entry))
    assert assert_differ(nested(20_000, 1), 3) == "root: <list of 1> became 3 in the output; nothing was written"


def test_shared_trees_that_explode() -> None:
    def shared(bottom: object, of: Callable[..., object]) -> object:
        node = of((bottom, bottom))
        for _ in range(100):
            node = of((node, node))
        return node

    for kind in (list, tuple):
        assert_agree(shared(1, kind), shared(1, kind))
        assert_differ(shared(1, kind), shared(2, kind))


def test_cycles() -> None:
    def ring(length: int) -> list[object]:
        first: list[object] = []
        node: object = first
        for _ in range(length - 1):
            node = [node]
        first.append(node)
        return first

    assert_agree(ring(3), ring(3))
    assert_differ(ring(3), ring(4))


def test_sharing_is_part_of_the_tree() -> None:
    for make in (lambda: [1], lambda: InertDict([("a", 1)]), lambda: InertSet([1]), lambda: Object("reduce", None, ())):
        one = make()
        assert_agree([one, one], (lambda other: [other, other])(make()))
        assert_differ([one, one], [make(), make()])
        assert_differ([make(), make()], [one, one])


def test_equal_values_may_be_joined_or_parted() -> None:
    for make in (lambda: tuple([1, "a"]), lambda: Global("m", "n"), lambda: "".join(["a", "b"])):  # noqa: C409
        one = make()
        assert_agree([one, one], [make(), make()])
        assert_agree([make(), make()], [one, one])
    assert_differ([(one_tuple := (1, "a")), one_tuple], [(1, "a"), (1, "b")])
    assert_differ([(name := Global("m", "n")), name], [Global("m", "n"), Global("m", "o")])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (InertSet([1]), InertSet([1], frozen=True)),
        (InertSet([1]), [1]),
        ([1], (1,)),
        (b"a", bytearray(b"a")),
        (b"a", "a"),
        (True, 1),
        (1, 1.0),
        (0.0, -0.0),
        (None, False),
        (Object("reduce", Global("m", "n"), ()), Object("newobj", Global("m", "n"), ())),
        (Object("reduce", Global("m", "n"), (1,)), Object("reduce", Global("m", "n"), (2,))),
        (InertDict([("a", 1)]), InertDict([("b", 1)])),
        (InertDict([("a", 1), ("b", 2)]), InertDict([("b", 2), ("a", 1)])),
        ({}, 3),
    ],
)
def test_kinds_of_nodes(a: object, b: object) -> None:
    assert_differ([a], [b])


def test_places_are_named() -> None:
    a = InertDict([("args", InertDict([("layers", [1, (2, 3)])]))])
    b = InertDict([("args", InertDict([("layers", [1, (2, 4)])]))])
    assert assert_differ(a, b) == "args.layers.1.1: 3 became 4 in the output; nothing was written"
