"""Whole trees: what differs in one thing alone is told with its place, and what is saved again is the same.

Of each pair `ckptkit.diff` with ``strict`` and the whole digest must say the same.
"""

from __future__ import annotations

import argparse
import collections
import copy
import decimal
import fractions
import pathlib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import ckptkit
from ckptkit.digests import tree_digest
from ckptkit.normalize.trees import Place, SameContent, side_by_side
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object
from ckptkit.released.examine import examine_file

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize.* deprecated", "ignore:.*CSR")


class Thing:
    """An object with attributes."""

    def __init__(self, **members: object) -> None:
        self.__dict__.update(members)


class OtherThing(Thing):
    pass


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class Extra(nn.Module):
    """A module with more than parameters and buffers."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.value = value


class Sub(torch.Tensor):
    pass


def net(value: object) -> nn.Module:
    return nn.Sequential(collections.OrderedDict([("a", nn.Linear(2, 2)), ("b", Extra(value))]))


def whole(path: Path) -> str | None:
    return examine_file(str(path), hash_file=False, digest=True, values=False, whole=True).whole_digest


def resumed(value: object) -> dict[str, Any]:
    """A checkpoint with something beside its weights."""
    return {"model": {"w": torch.ones(2), "b": torch.zeros(3)}, "x": value}


def optimizer(**options: Any) -> dict[str, Any]:
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    made = torch.optim.Adam(weights)
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    made.step()
    made.param_groups[0].update(options)
    return made.state_dict()


def on_tensor(value: object) -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.note = value  # type: ignore[attr-defined]
    return tensor


def quantized(scale: float = 0.1, zero: int = 0) -> torch.Tensor:
    return torch._make_per_tensor_quantized_tensor(torch.ones(4, dtype=torch.int8), scale, zero)


def per_channel(axis: int, *scales: float) -> torch.Tensor:
    ints = torch.ones(2, 2, dtype=torch.int8)
    return torch._make_per_channel_quantized_tensor(ints, torch.tensor(scales), torch.zeros(2, dtype=torch.int64), axis)


def sparse(size: tuple[int, ...], index: int = 1) -> torch.Tensor:
    return torch.sparse_coo_tensor([[0], [index]], [1.0], size)


def versioned(**more: Any) -> dict[str, Any]:
    state = nn.BatchNorm1d(2).state_dict()
    state._metadata[""].update(more)  # type: ignore[attr-defined]
    return state


def weights(value: object) -> dict[str, object]:
    return {"w": torch.ones(2), "b": torch.ones(3), "v": value}


LONG = "a" * 300


def cases() -> dict[str, tuple[object, object, str]]:
    return {
        # What is a value beside the weights.
        "list": (resumed([1, [2, 3]]), resumed([1, [2, 4]]), "x.1.1"),
        "length": (resumed([1, 2]), resumed([1, 2, 3]), "x"),
        "tuple": (resumed((1, 2)), resumed((1, 3)), "x.1"),
        "list for tuple": (resumed([1, 2]), resumed((1, 2)), "x"),
        "nested dict": (resumed({"a": {"b": {"c": 1}}}), resumed({"a": {"b": {"c": 2}}}), "x.a.b.c"),
        "key": (resumed({"a": 1}), resumed({"b": 1}), "x.a"),
        "key of another type": (resumed({1: "a"}), resumed({"1": "a"}), "x.1"),
        "key that is a tuple": (resumed({(1, 2): 3}), resumed({(1, 2): 4}), "x.(1, 2)"),
        "order of keys": (resumed({"a": 1, "b": 2}), resumed({"b": 2, "a": 1}), "x"),
        "namespace": (resumed(argparse.Namespace(lr=1, name="a")), resumed(argparse.Namespace(lr=2, name="a")), "x.lr"),
        "attribute": (resumed(Thing(a=[1])), resumed(Thing(a=[2])), "x.a.0"),
        "slot": (resumed(Slotted(1)), resumed(Slotted(2)), "x.value"),
        "class": (resumed(Thing(a=1)), resumed(OtherThing(a=1)), "x"),
        "class reference": (resumed(torch.optim.SGD), resumed(torch.optim.Adam), "x"),
        "dtype": (resumed(torch.float16), resumed(torch.bfloat16), "x"),
        "mapping class": (resumed({"a": 1}), resumed(collections.OrderedDict(a=1)), "x"),
        "default": (resumed(collections.defaultdict(list)), resumed(collections.defaultdict(dict)), "x"),
        "counter": (resumed(collections.Counter("aab")), resumed(collections.Counter("abb")), "x.a"),
        "set": (resumed({"a", "b"}), resumed({"a", "c"}), "x"),
        "member": (resumed({"a"}), resumed({"a", "b"}), "x"),
        "frozenset": (resumed({1}), resumed(frozenset({1})), "x"),
        "bytes": (resumed(b"a"), resumed(b"b"), "x"),
        "bytes for text": (resumed(b"a"), resumed("a"), "x"),
        "bytearray": (resumed(bytearray(b"a")), resumed(bytearray(b"b")), "x"),
        "bool for int": (resumed(True), resumed(1), "x"),
        "float for int": (resumed(1.0), resumed(1), "x"),
        "zero's sign": (resumed(0.0), resumed(-0.0), "x"),
        "NaN": (resumed(float("nan")), resumed(1.0), "x"),
        "large int": (resumed(1 << 200), resumed((1 << 200) + 1), "x"),
        "complex": (resumed(1j), resumed(2j), "x"),
        "none": (resumed(None), resumed(0), "x"),
        "end of a long text": (resumed(LONG + "b"), resumed(LONG + "c"), "x"),
        "the 500th scalar": (
            resumed({f"k{i}": i for i in range(600)}),
            resumed({f"k{i}": i if i != 500 else -1 for i in range(600)}),
            "x.k500",
        ),
        "path": (resumed(pathlib.PurePosixPath("a/b")), resumed(pathlib.PurePosixPath("a/c")), "x"),
        "decimal": (resumed(decimal.Decimal("1.1")), resumed(decimal.Decimal("1.2")), "x"),
        "named tuple": (resumed(fractions.Fraction(1, 2)), resumed(fractions.Fraction(1, 3)), "x"),
        "size": (resumed(torch.Size([1, 2])), resumed(torch.Size([2, 1])), "x.0"),
        "array": (resumed(np.arange(4)), resumed(np.arange(1, 5)), "x"),
        "array's dtype": (resumed(np.zeros(2, "i4")), resumed(np.zeros(2, "u4")), "x"),
        "array's shape": (resumed(np.zeros((2, 3))), resumed(np.zeros((3, 2))), "x.0"),
        "numpy scalar": (resumed(np.float64(1)), resumed(np.float64(2)), "x"),
        "exception": (resumed(ValueError("a")), resumed(ValueError("b")), "x"),
        # Optimizers.
        "betas": (resumed(optimizer()), resumed(optimizer(betas=(0.9, 0.99))), "x.param_groups.0.betas.1"),
        "eps": (resumed(optimizer()), resumed(optimizer(eps=1e-6)), "x.param_groups.0.eps"),
        "amsgrad": (resumed(optimizer()), resumed(optimizer(foreach=True)), "x.param_groups.0.foreach"),
        # Tensors that stand in no section, and what hangs on tensors.
        "tensor in an object": (resumed(Thing(a=torch.ones(2))), resumed(Thing(a=torch.zeros(2))), "x.a"),
        "shape in an object": (resumed(Thing(a=torch.ones(2))), resumed(Thing(a=torch.ones(3))), "x.a"),
        "tensor for a number": (resumed(Thing(a=torch.ones(1))), resumed(Thing(a=1.0)), "x.a"),
        "storage": (resumed([torch.ones(2).untyped_storage()]), resumed([torch.zeros(2).untyped_storage()]), "x.0"),
        "needs a gradient": (resumed(torch.ones(2)), resumed(torch.ones(2, requires_grad=True)), "x.requires_grad"),
        "parameter": (
            resumed(torch.ones(2, requires_grad=True)), resumed(nn.Parameter(torch.ones(2))), "x.is_parameter"
        ),
        "tensor's note": (weights(on_tensor("a")), weights(on_tensor("b")), "v.note"),
        "tensor on a tensor": (weights(on_tensor(torch.ones(1))), weights(on_tensor(torch.zeros(1))), "v.note"),
        "subclass": (weights(torch.ones(2)), weights(torch.ones(2).as_subclass(Sub)), "v"),
        "parameter among weights": (weights(torch.ones(2)), weights(nn.Parameter(torch.ones(2))), "v.is_parameter"),
        # Values of a state_dict that are no plain tensors.
        "scale": (weights(quantized(0.1)), weights(quantized(0.2)), "v"),
        "zero point": (weights(quantized(0.1, 0)), weights(quantized(0.1, 1)), "v"),
        "scale of a channel": (weights(per_channel(0, 0.1, 0.2)), weights(per_channel(0, 0.1, 0.3)), "v"),
        "axis": (weights(per_channel(0, 0.1, 0.2)), weights(per_channel(1, 0.1, 0.2)), "v"),
        "sparse size": (weights(sparse((4, 4))), weights(sparse((4, 5))), "v"),
        "sparse index": (weights(sparse((4, 4), 1)), weights(sparse((4, 4), 2)), "v"),
        "layout": (weights(torch.eye(3).to_sparse()), weights(torch.eye(3).to_sparse_csr()), "v"),
        "meta shape": (weights(torch.ones(2, device="meta")), weights(torch.ones(3, device="meta")), "v"),
        "array as a weight": (weights(np.ones(2)), weights(np.zeros(2)), "v"),
        "extra state": (weights({"a": [1]}), weights({"a": [2]}), "v"),
        "versions": (versioned(more=1), versioned(more=2), "_metadata..more"),
        # Whole models.
        "attribute tensor": (net(torch.ones(3)), net(torch.zeros(3)), "_modules.b.value"),
        "setting": (net(0.1), net(0.2), "_modules.b.value"),
        "training": (net(1).train(), net(1).eval(), "training"),
        "class of a module": (nn.Sequential(nn.ReLU(), Extra(1)), nn.Sequential(nn.ELU(), Extra(1)), "_modules.0"),
        # Files without weights.
        "collection": ([torch.ones(2), {"a": 1}], [torch.ones(2), {"a": 2}], "1.a"),
        "one sparse tensor": (sparse((4, 4)), sparse((4, 5)), ""),
    }  # fmt: skip


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # quantized and compressed sparse tensors
    CASES = cases()
torch.manual_seed(0)
EQUAL_WEIGHTS = net(None).state_dict()
for case in CASES.values():
    for model in case[:2]:
        if isinstance(model, nn.Sequential) and "a.weight" in model.state_dict():
            model.load_state_dict(EQUAL_WEIGHTS)


def places(difference: ckptkit.Difference) -> set[str]:
    return {row["path"] for row in difference.tree} | {row["name"] for row in difference.values}


def assert_same(a: Path, b: Path) -> None:
    difference = ckptkit.diff(a, b, strict=True)
    assert difference.ok and not difference.tree, difference.to_json()
    assert whole(a) == whole(b) is not None


@pytest.mark.parametrize("case", CASES)
def test_one_thing_that_differs(diff: Callable[..., ckptkit.Difference], tmp_path: Path, case: str) -> None:
    a, b, place = CASES[case]
    difference = diff(a, b, strict=True)
    assert not difference.ok
    assert place in places(difference) or not place
    assert whole(tmp_path / "a.pth") != whole(tmp_path / "b.pth")


@pytest.mark.parametrize("protocol", [1, 3, 4, 5])
def test_the_same_in_another_protocol(tmp_path: Path, protocol: int) -> None:
    everything = {name: case[0] for name, case in CASES.items() if name not in ("slot", "collection")}
    torch.save(everything, tmp_path / "a.pth")
    torch.save(everything, tmp_path / "b.pth", pickle_protocol=protocol)
    assert_same(tmp_path / "a.pth", tmp_path / "b.pth")


def test_the_same_saved_again(tmp_path: Path) -> None:
    saved = {"net": net([torch.ones(2)]), "optimizer": optimizer(), "names": {"a", "b", "c"}, "epoch": 3}
    torch.save(saved, tmp_path / "a.pth")
    (tmp_path / "other").mkdir()
    again = {
        "name": lambda path: torch.save(saved, path),
        "copies": lambda path: torch.save(copy.deepcopy(saved), path),
        "loaded": lambda path: torch.save(torch.load(tmp_path / "a.pth", weights_only=False), path),
        "legacy": lambda path: torch.save(saved, path, _use_new_zipfile_serialization=False),
        "zipped": lambda path: zipped_again(tmp_path / "a.pth", path),
    }
    for name, save in again.items():
        save(tmp_path / "other" / f"{name}.pth")
        assert_same(tmp_path / "a.pth", tmp_path / "other" / f"{name}.pth")


def zipped_again(path: Path, other: Path) -> None:
    """The records in another order, with other times and alignment, deflated."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for record in reversed(old.infolist()):
            new.writestr(zipfile.ZipInfo(record.filename, (2001, 2, 3, 4, 5, 6)), old.read(record))


def test_how_tensors_lie_is_no_difference(tmp_path: Path) -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    for name, tensor in {"a": rows, "b": rows.T.contiguous().T, "c": torch.arange(60.0)[:6].reshape(2, 3)}.items():
        torch.save(resumed(Thing(t=tensor)) | {"model": {"w": tensor, "v": tensor + 1}}, tmp_path / f"{name}.pth")
    assert_same(tmp_path / "a.pth", tmp_path / "b.pth")
    state = {"w": rows, "v": rows + 1}
    for name, order in {"a": "wv", "b": "vw"}.items():
        torch.save(
            {"model": {key: state[key] for key in order}, "ema": {key: state[key] for key in order}},
            tmp_path / f"{name}.pth",
        )
    assert_same(tmp_path / "a.pth", tmp_path / "b.pth")


def test_ties(diff: Callable[..., ckptkit.Difference], tmp_path: Path) -> None:
    one = torch.ones(2)
    assert not diff({"a": one, "b": one}, {"a": one, "b": one.clone()}, strict=True).ok
    assert whole(tmp_path / "a.pth") != whole(tmp_path / "b.pth")


def test_containers_of_weights_alone(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2), "b": nn.Parameter(torch.zeros(3))}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    model = net(1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")

    def against(saved: object, name: str = "w.safetensors") -> tuple[bool, set[str]]:
        torch.save(saved, tmp_path / "a.pth")
        difference = ckptkit.diff(tmp_path / "a.pth", tmp_path / name, strict=True)
        assert difference.equal and difference.ok is not bool(difference.tree)
        return difference.ok, places(difference)

    assert against(weights) == (True, set())
    assert against({"state_dict": weights}) == (True, set())
    assert against({"ckpt": {"state_dict": weights, "epoch": 3}, "args": Thing(a=1)}) == (False, {"ckpt.epoch", "args"})
    assert against(model, "m.safetensors") == (False, {""})
    itself: dict[str, object] = {"model": weights, "epoch": 3}
    itself["again"] = itself
    assert against(itself) == (False, {"epoch"})
    for value in (1, 2):
        safetensors.torch.save_file(weights, tmp_path / f"{value}.safetensors", metadata={"k": str(value)})
    assert whole(tmp_path / "1.safetensors") != whole(tmp_path / "2.safetensors")


def test_without_strict_tensors_count_and_nothing_else(diff: Callable[..., ckptkit.Difference]) -> None:
    for case, is_equal in {
        "tensor in an object": False, "shape in an object": False, "tensor on a tensor": False, "storage": False,
        "attribute tensor": False, "scale": False, "sparse size": False, "array as a weight": False,
        "setting": True, "list": True, "betas": True, "class": True, "tensor's note": True, "order of keys": True,
        "tensor for a number": True, "layout": False,
    }.items():  # fmt: skip
        assert diff(*CASES[case][:2]).ok is is_equal, case
    moved = diff(weights(on_tensor(torch.ones(2))), weights(on_tensor(torch.ones(2) * 1.5)))
    assert [tuple(row.values()) for row in moved.tree] == [("v.note", "tensor", "float32 [2]", "float32 [2]", 0.5)]
    assert moved.summary == "all 3 tensors are bit-identical; beside them v.note differs"
    assert diff(weights(on_tensor(torch.ones(2))), weights(on_tensor(torch.ones(2) * 1.5)), atol=0.6, strict=True).ok
    for case in ("scale", "sparse size", "meta shape"):
        a, b = (saved["v"] for saved in CASES[case][:2])  # type: ignore[index]
        assert not diff(resumed(Thing(a=a)), resumed(Thing(a=b))).ok, case
    apart = diff(resumed(Thing(a=[torch.ones(2)])), resumed(Thing(a={"k": torch.ones(2)})))
    assert not apart.equal  # they stand in what cannot be compared
    assert diff(resumed(Thing(a=torch.ones(2))), resumed(Thing())).equal  # only one has it
    hidden = (resumed(on_tensor(torch.ones(1))) for _ in range(2))
    assert diff(*hidden, section="model", strict=True).ok


def test_what_cannot_be_compared_is_not_the_same(diff: Callable[..., ckptkit.Difference]) -> None:
    windows = [Thing(a=torch.ones(2000).as_strided((1000, 1000), (1, 1))) for _ in range(2)]
    difference = diff(resumed(windows[0]), resumed(windows[1]))
    assert ([row["name"] for row in difference.not_compared], difference.ok) == (["x.a"], False)


def test_how_differences_are_shown(diff: Callable[..., ckptkit.Difference]) -> None:
    def rows(a: object, b: object) -> list[tuple[Any, ...]]:
        return [(row["path"], row["a"], row["b"]) for row in diff(resumed(a), resumed(b)).tree]

    assert rows(0.999, 0.99) == [("x", "0.999", "0.99")]
    assert rows("1", 1) == [("x", "'1'", "1")]
    assert rows(LONG + "b", LONG + "c" + LONG) == [("x", f"…'{'a' * 10}b'", f"…'{'a' * 10}c{'a' * 49}'…")]
    assert rows({"a": 1}, {"b": (1,)}) == [("x.a", "1", None), ("x.b", None, "<tuple of 1>")]
    many = diff(resumed(list(range(3000))), resumed(list(range(1, 3001))), strict=True)
    assert (len(many.tree), many.tree_differences, many.ok) == (1000, 3000, False)


# Trees that nobody writes by hand.


def is_same(a: object, b: object) -> bool:
    """Whether the two have the same content; their digests must agree on it."""
    same = not list(side_by_side([(Place(), a, b)], SameContent()))
    assert (tree_digest(a, str) == tree_digest(b, str)) is same
    return same


def test_deep_and_shared_trees() -> None:
    def deep(leaf: object) -> object:
        node = leaf
        for _ in range(5_000):
            node = [node]
        return node

    def shared(leaf: object) -> object:
        node: object = [leaf, leaf]
        for _ in range(100):
            node = [node, node]
        return node

    for tree in (deep, shared):
        assert is_same(tree(1), tree(1))
        assert not is_same(tree(1), tree(2))
    one = [1]
    assert is_same([one, one], [[1], [1]])  # whether it is one list does not matter


def ring(length: int, leaf: object = 1) -> list[object]:
    first: list[object] = [leaf]
    node: list[object] = first
    for _ in range(length - 1):
        node.append(below := [leaf])
        node = below
    node.append(first)
    return first


def test_cycles() -> None:
    assert is_same(ring(5), ring(5))
    assert not is_same(ring(5), ring(5, 2))
    assert is_same([ring(3), ring(3)], [ring(3), ring(3)])
    # Rings of coprime lengths meet in 10**8 pairs of nodes; nothing tells them apart.
    assert not list(side_by_side([(Place(), ring(9_973), ring(10_000))], SameContent()))


def test_keys_that_cannot_be_compared() -> None:
    odd = [Object("reduce", Global("m", "C"), ([n],)) for n in (1, 2)]
    assert is_same(InertDict([(odd[0], 1)]), InertDict([(odd[0], 1)]))
    assert not is_same(InertDict([(odd[0], 1)]), InertDict([(odd[1], 1)]))
    assert not is_same(InertDict([(odd[0], 1)]), InertDict([(odd[0], 1), (odd[1], 1)]))
    assert is_same(InertDict([("a", 1), ("a", 2)]), InertDict([("a", 2)]))  # the last counts, as in Python
    assert is_same(InertSet([1, "a"]), InertSet(["a", 1]))
    assert not is_same(InertSet([1]), InertSet([True]))


def grown(random: Random, changed: int) -> list[object]:
    """A tree with shared nodes and cycles; one number in it is another where `changed` is its place."""
    nodes: list[Any] = [[]]
    for number in range(30):
        leaf = number % 3 if number != changed else 9
        kind = random.randrange(5)
        inner = [random.choice(nodes) for _ in range(random.randrange(3))]
        keys = random.sample("abcde", 2)
        made: Any = [leaf, *inner]
        if kind == 1:
            made = tuple(made)
        elif kind == 2:
            made = InertDict([(keys[0], leaf), (keys[1], inner)])
        elif kind == 3:
            made = Object("newobj", Global("m", "C"), tuple(inner))
            made.state = InertDict([("a", leaf)])
        nodes.append(made)
        if kind == 0 and random.random() < 0.2:
            made.append(nodes[0])
        if isinstance(nodes[0], list):
            nodes[0].append(made)
    return nodes[0]


def test_trees_at_random() -> None:
    for seed in range(60):
        assert is_same(grown(Random(seed), -1), grown(Random(seed), -1))
        assert not is_same(grown(Random(seed), -1), grown(Random(seed), seed % 30))


def called(name: str, *args: object, state: object = ABSENT, items: tuple[object, ...] = ()) -> Object:
    node = Object("reduce", Global(*name.rsplit(".", 1)), args)
    node.state = state
    node.items += items
    return node


def test_what_stands_for_the_same() -> None:
    assert is_same(called("__builtin__.set", [1, 2]), InertSet([2, 1]))
    assert is_same(called("__builtin__.bytearray", "\xff", "latin-1"), bytearray(b"\xff"))
    assert is_same(called("builtins.getattr", Global("m", "A"), "B"), Global("m", "A.B"))
    assert is_same(Global("copy_reg", "x"), Global("copyreg", "x"))
    one = called("copy_reg._reconstructor", Global("m", "C"), Global("__builtin__", "object"), None, state=(1,))
    other = Object("newobj", Global("m", "C"), ())
    other.state = (1,)
    assert is_same(one, other)


def test_what_nearly_does() -> None:
    more: dict[str, Any] = {"items": (1,)}
    for a, b in (
        (called("builtins.set", [1], **more), InertSet([1])),
        (called("builtins.bytearray", b"a", **more), bytearray(b"a")),
        (called("builtins.bytearray", b"a", "utf-8"), bytearray(b"a")),
        (called("builtins.bytes", b"a", state=1), b"a"),
        (called("builtins.getattr", Global("m", "A"), "B", **more), Global("m", "A.B")),
        (called("copyreg._reconstructor", Global("m", "C"), None, None), Object("newobj", Global("m", "C"), ())),
        (Global("a.b", "c"), Global("a", "b.c")),
        (called("m.C", state=(1, 2)), called("m.C", state=1, items=(2,))),
        (called("m.C", 1, state=2), called("m.C", state=(1, 2))),
        (called("collections.OrderedDict", [(1, 2)], []), called("collections.OrderedDict", [])),
        (["a", "b"], ["ab", ""]),
        ([["a"], "b"], [["a", "b"]]),
        (Global("a", "b.c"), called("a.b.c")),
        ([b"a"], ["a"]),
        (["True"], [True]),
        (InertSet([1]), InertSet([1, 2])),
    ):  # fmt: skip
        assert not is_same(a, b), (a, b)


# Calls made for their effect.


class Kept(Thing):
    """Restored by a function that is called for its effect alone (the sixth item, `copyreg` since Python 3.8)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (), dict(self.__dict__), None, None, put


class KeptDict(dict):  # type: ignore[type-arg]
    def __reduce__(self) -> tuple[Any, ...]:
        return KeptDict, (), self.__dict__, None, iter(self.items()), put


def put(target: Any, state: dict[str, object]) -> None:
    target.__dict__.update(state)


def kept_dict(note: object) -> KeptDict:
    made = KeptDict(a=torch.ones(2))
    made.note = note  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("a", "b", "place", "is_equal"),
    [
        (Kept(a=1), Kept(a=2), "x.a", True),
        (Kept(a=torch.ones(2)), Kept(a=torch.zeros(2)), "x.a", False),
        (Kept(a=[Kept(b=(1,))]), Kept(a=[Kept(b=(2,))]), "x.a.0.b.0", True),
        (kept_dict(1), kept_dict(2), "x.note", True),
        (kept_dict(torch.ones(2)), kept_dict(torch.zeros(2)), "x.note", False),
    ],
)
def test_what_a_call_sets(
    diff: Callable[..., ckptkit.Difference], tmp_path: Path, a: object, b: object, place: str, is_equal: bool
) -> None:
    difference = diff(resumed(a), resumed(b), strict=True)
    assert (difference.equal, difference.ok) == (is_equal, False)
    assert places(difference) == {place}
    assert whole(tmp_path / "a.pth") != whole(tmp_path / "b.pth")
    torch.save(resumed(a), tmp_path / "b.pth", pickle_protocol=4)
    assert_same(tmp_path / "a.pth", tmp_path / "b.pth")


def test_what_a_pickle_drops(tmp_path: Path) -> None:
    torch.save(resumed(1), tmp_path / "plain.pth")
    for name, dropped in {"none": b"", "one": b"cm\nf\n(K\x01tR0", "two": b"cm\nf\n(K\x02tR0"}.items():
        with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / f"{name}.pth", "w") as new:
            for record in old.infolist():
                data = old.read(record)
                if record.filename.endswith("data.pkl"):
                    data = data[:2] + dropped + data[2:]
                new.writestr(record.filename, data)
    for other in ("none", "two"):
        difference = ckptkit.diff(tmp_path / "one.pth", tmp_path / f"{other}.pth", strict=True)
        assert difference.equal and not difference.ok
        assert all(place.startswith("(discarded)") for place in places(difference))
        assert whole(tmp_path / "one.pth") != whole(tmp_path / f"{other}.pth")
