"""The nodes: what they say of themselves, going through them, and copying trees of them."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import formats
from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import LimitError
from ckptkit.pickling.inert import (
    ABSENT,
    Global,
    InertDict,
    InertSet,
    Object,
    PersistentId,
    TreeMap,
    attributes,
    children,
    is_global,
    mapping_items,
    walk,
)
from ckptkit.pickling.reader import read_pickle


def entry(attached: object = None, subclass: object = None) -> TensorEntry:
    source = ByteRange(None, 0, 8)  # type: ignore[arg-type]
    storage = Storage(key="0", dtype="float32", nbytes=8, location="cpu", source=source)
    return TensorEntry(storage=storage, storage_offset=0, shape=(2,), stride=(1,), dtype="float32",
                       attributes=attached, subclass=subclass)  # fmt: skip


def same(leaf: object) -> object:
    return leaf


def made(cls: str, *args: object) -> Object:
    module, _, name = cls.rpartition(".")
    return Object("reduce", Global(module, name), args)


# What nodes say.


def test_repr_names_the_node_and_never_its_content() -> None:
    deep = read_pickle(b"]" * 50_000 + b"a" * 49_999 + b".").root
    table, members = InertDict([("k", deep)]), InertSet([deep])
    nodes: list[tuple[object, str]] = [
        (Global("torch", "Size"), "<global torch.Size>"),
        (made("a.B", deep), "<a.B object>"),
        (Object("reduce", deep, ()), "<? object>"),
        (PersistentId(deep), "<persistent id>"),
        (table, "<dict of 1>"),
        (members, "<set of 1>"),
        (InertSet(frozen=True), "<frozenset of 0>"),
        (ABSENT, "<absent>"),
    ]
    assert [repr(node) for node, _ in nodes] == [text for _, text in nodes]


def test_is_global() -> None:
    assert is_global(Global("a", "b"), "a", "b")
    assert not is_global(Global("a", "c"), "a", "b")
    assert not is_global("a.b", "a", "b")


def test_a_dict_never_hashes_its_keys() -> None:
    class Untouchable:
        def __hash__(self) -> int:
            raise AssertionError("hashed")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

    table = InertDict([(Untouchable(), 1), (10**5000, 2), ("a", 3), ("a", 4), (None, 5)])
    assert (table["a"], table.get("b"), table.get("b", 0), "a" in table, "b" in table, 7 in table) == (
        4, None, 0, True, False, False)  # fmt: skip
    assert len(table) == len(table.items()) == len(list(table)) == 5
    with pytest.raises(KeyError):
        table["b"]


def test_a_dict_sees_pairs_added_after_it_was_asked() -> None:
    table = InertDict()
    assert "a" not in table
    table.pairs.append(("a", 1))
    assert table["a"] == 1


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1},
        collections.OrderedDict(a=1),
        collections.defaultdict(list, a=1),
        collections.Counter({"a": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", range(6))
def test_mapping_items_of_what_python_pickles(value: object, protocol: int) -> None:
    assert mapping_items(read_pickle(pickle.dumps(value, protocol)).root) == [("a", 1)]


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (made("collections.OrderedDict", [["a", 1], ("b", 2)]), [("a", 1), ("b", 2)]),
        (made("collections.OrderedDict", ["ab"]), None),
        (made("collections.OrderedDict", [["a", 1, 2]]), None),
        (made("mine.OrderedDict"), None),
        (made("collections.deque"), None),
        (Object("reduce", "OrderedDict", ()), None),
        ([("a", 1)], None),
        ("text", None),
        (None, None),
    ],
)
def test_mapping_items_of_hand_made_nodes(node: object, expected: object) -> None:
    assert mapping_items(node) == expected


def test_attributes() -> None:
    state = InertDict([("a", 1)])
    node = made("a.B")
    assert attributes(node) is None
    node.state = state
    assert attributes(node) is state
    node.state = (state, InertDict())
    assert attributes(node) is state
    for other in ((None, state), (state, state, state), "text", None):
        node.state = other
        assert attributes(node) is None
    assert attributes("no object") is None


# Going through.


def test_children_are_all_there_is_below_a_node() -> None:
    node = Object("newobj_ex", "cls", ("arg",), InertDict())
    node.items, node.pairs, node.state = ["item"], [("key", "value")], "state"
    assert children(node) == ["cls", "arg", "item", "key", "value", node.kwargs, "state"]
    assert children(made("a.B", 1))[1:] == [1]
    assert children(InertDict([("a", 1), ("b", 2)])) == ["a", 1, "b", 2]
    assert children(InertSet([1])) == children([1]) == children((1,)) == children(PersistentId(1)) == [1]
    assert children(entry("attached", "subclass")) == ["subclass", "attached"]
    assert children(entry()) == children("text") == children(Global("a", "b")) == children(bytearray(b"x")) == []


def test_walk_goes_to_each_node_once_parents_first() -> None:
    shared = [1, "text"]
    looped: list[object] = [shared, {"no": "node"}]
    looped[1] = table = InertDict([("again", shared), ("up", looped)])
    assert list(walk(looped)) == [looped, shared, table]
    assert list(walk("text")) == list(walk(None)) == list(walk(3)) == []


# Copying.


def test_a_copy_has_every_part() -> None:
    node = Object("newobj_ex", Global("a", "B"), (1, [2]), InertDict([("k", 3)]))
    node.items, node.pairs, node.state = [[4]], [("p", [5])], (InertDict([("s", 6)]), None)
    tree = [node, InertSet([7], frozen=True), InertSet(["m"]), PersistentId(("pid", [8])), bytearray(b"9"), b"", "x"]
    copied: Any = TreeMap(same)(tree)
    unchanged = {id(n) for n in walk(tree)} & {id(n) for n in walk(copied)}
    assert unchanged == {id(node.cls), id(tree[4])}, "what cannot change is not copied, all else is"
    again = copied[0]
    assert (again.how, again.cls, again.args, again.items) == ("newobj_ex", node.cls, (1, [2]), [[4]])
    assert (again.pairs, again.kwargs.pairs, again.state[0].pairs) == ([("p", [5])], [("k", 3)], [("s", 6)])
    assert (copied[1].frozen, copied[1].members, copied[2].frozen, copied[2].members) == (True, [7], False, ["m"])
    assert copied[3].pid == ("pid", [8])
    assert copied[4:] == tree[4:]
    assert TreeMap(same)(made("a.B")).state is ABSENT  # type: ignore[attr-defined]


def test_sharing_and_cycles_survive_a_copy() -> None:
    shared: list[object] = []
    args = (shared,)
    node = made("a.B", *args)
    node.args = args
    through: tuple[object, ...] = (shared, node)
    shared.append(through)
    node.state = node
    copied: Any = TreeMap(same)((through, shared, node, args))
    assert copied[0][0] is copied[1]
    assert copied[1][0] is copied[0]
    assert copied[0][1] is copied[2]
    assert copied[2].state is copied[2]
    assert copied[2].args is copied[3]
    assert copied[2].args[0] is copied[1]


def test_leaves_are_replaced_once_each() -> None:
    first, second, storage = entry(), entry(), entry().storage
    seen: list[object] = []

    def leaf(node: object) -> object:
        seen.append(node)
        return replace(node, requires_grad=True) if isinstance(node, TensorEntry) else node

    copied: Any = TreeMap(leaf)([first, (first, second), InertDict([("s", storage), ("again", storage)])])
    assert copied[0] is copied[1][0]
    assert copied[0] is not copied[1][1]
    assert copied[0].requires_grad
    assert copied[2]["s"] is storage
    assert {id(node) for node in seen} == {id(first), id(second), id(storage)}
    assert len(seen) == 3


def test_what_two_trees_share_stays_shared_in_one_map() -> None:
    shared = [1]
    mapper = TreeMap(same)
    a: Any = mapper([shared])
    b: Any = mapper((shared,))
    assert a[0] is b[0]
    assert a[0] is not shared


def test_nodes_are_exchanged_whole() -> None:
    old = InertDict([("never", "seen")])
    copied: Any = TreeMap(same, [(old, "new")])([old, {"a": 1}, (old,)])
    assert copied[0] == copied[2][0] == "new"


def test_the_attributes_of_a_tensor_are_copied_with_their_tensors() -> None:
    inner = entry()
    table = InertDict([("inner", inner)])
    outer = entry(attached=table)
    table.pairs.append(("self", outer))
    copied: Any = TreeMap(lambda node: replace(node, requires_grad=True))([outer, inner])  # type: ignore[type-var]
    assert copied[0].attributes["inner"] is copied[1]
    assert copied[0].attributes["self"] is copied[0]
    assert copied[1].requires_grad
    assert not inner.requires_grad


def test_many_tensors_with_attributes_are_no_depth() -> None:
    tree = tuple([entry(attached=InertDict([("n", [n])]))] for n in range(500))
    copied: Any = TreeMap(same)(tree)
    assert [part[0].attributes["n"] for part in copied] == [[n] for n in range(500)]


def test_tensors_in_attributes_of_tensors_end_somewhere() -> None:
    nested = entry()
    for _ in range(1000):
        nested = entry(attached=(nested,))
    with pytest.raises(LimitError, match="tensors nested in attributes of tensors"):
        TreeMap(same)(nested)


class WithBuffers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))
        self.scale.note = "noted"


def test_a_model_with_many_tensors_that_carry_attributes_is_copied(save: Callable[..., Path]) -> None:
    path = save({"model": torch.nn.Sequential(*(WithBuffers() for _ in range(60))), "epoch": 1})
    checkpoint, file = formats.read(path)
    mapped: Any = TreeMap(same)(checkpoint.module)
    file.close()
    assert len(checkpoint.state_dict) == 60
    assert sum(isinstance(node, TensorEntry) for node in walk(mapped)) == 60
