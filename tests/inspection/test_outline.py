"""The folded module tree: what is alike stands once, numbers are in order, sums are of what they stand for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptkit
from ckptkit.inspection import survey
from ckptkit.inspection.listing import TensorRow
from ckptkit.inspection.outline import Outline, OutlineLine

Save = Callable[..., Path]


def row(
    name: str, *shape: int, dtype: str = "float32", role: Any = "parameter", tied_to: str | None = None
) -> TensorRow:
    numel = 1
    for size in shape:
        numel *= size
    stride = tuple(1 for _ in shape)
    return TensorRow("", name, dtype, shape, stride, numel * 4, "cpu", "0", role, True, tied_to, None)  # type: ignore[arg-type]


def lines(rows: Sequence[TensorRow], depth: int = 50, **options: Any) -> list[str]:
    """``label xN`` with its level as dots, and the number of tensors."""
    return [shown(line) for line in Outline(rows, **options).lines(depth)]


def shown(line: OutlineLine) -> str:
    return "." * line.level + line.label + (f" x{line.copies}" if line.copies > 1 else "")


def block(prefix: str, width: int = 3) -> list[TensorRow]:
    return [
        row(f"{prefix}.attn.weight", width, width),
        row(f"{prefix}.attn.bias", width),
        row(f"{prefix}.mlp.weight", width),
    ]


def test_blocks_that_are_alike_stand_once() -> None:
    rows = [row("embed.weight", 9), *(r for i in range(32) for r in block(f"model.layers.{i}")), row("head.weight", 9)]
    assert lines(rows) == [
        "(all)", ".embed.weight", ".model.layers.0‥31 x32", "..attn", "...weight", "...bias", "..mlp.weight",
        ".head.weight",
    ]  # fmt: skip


def test_a_folded_line_has_the_sums_of_all_and_those_below_of_one() -> None:
    rows = [r for i in range(4) for r in block(f"layers.{i}")]
    by_label = {line.label: line for line in Outline(rows).lines(50)}
    folded = by_label["layers.0‥3"]
    assert (folded.copies, folded.tensors, folded.parameters, folded.nbytes) == (4, 12, 4 * 15, 4 * 60)
    assert (by_label["attn"].tensors, by_label["attn"].parameters) == (2, 12)
    assert by_label["(all)"].parameters == folded.parameters


def test_what_differs_in_anything_is_not_folded() -> None:
    same = [*block("layers.0"), *block("layers.1")]
    assert ".layers.0‥1 x2" in lines(same)
    assert ".layers.0‥1 x2" not in lines([*block("layers.0"), *block("layers.1", 4)])  # shapes
    assert ".layers.0‥1 x2" not in lines([*block("layers.0"), *block("layers.2")])  # a gap
    assert ".layers.0‥1 x2" not in lines([*block("layers.0"), *block("layers.1")[:-1]])  # names
    other = [r._replace(dtype="float16") for r in block("layers.1")]
    assert ".layers.0‥1 x2" not in lines([*block("layers.0"), *other])
    assert lines([*block("layers.00"), *block("layers.01")])[1:] != [".layers.00‥01 x2"]
    runs = [*block("l.0"), *block("l.1"), *block("l.2", 4), *block("l.3", 4), *block("l.4")]
    assert lines(runs, 1)[1:] == [".l", "..0‥1 x2", "..2‥3 x2", "..4"]


def test_names_with_a_number_at_their_end_are_folded_too() -> None:
    assert lines([r for i in (1, 2, 3) for r in block(f"layer{i}")], 1) == ["(all)", ".layer1‥3 x3"]
    leaves = [row(f"parameters.{i}", 2) for i in range(5)]
    assert lines(leaves) == ["(all)", ".parameters.0‥4 x5"]


def test_numbers_are_in_their_order_and_all_else_in_the_files() -> None:
    shuffled = random.Random(0).sample(range(12), 12)
    rows = [row("stem.w", 1), *(row(f"b{i}.w", i + 1) for i in shuffled), row("a.w", 1)]
    expected = ["(all)", ".stem.w", *(f".b{i}.w" for i in range(12)), ".a.w"]
    assert lines(rows) == expected
    interleaved = [row(name, i + 1) for i, name in enumerate(["conv1.w", "bn1.w", "conv2.w", "bn2.w"])]
    assert lines(interleaved)[1:] == [".conv1.w", ".bn1.w", ".conv2.w", ".bn2.w"]
    assert lines(rows, sort="name")[1:3] == [".a.w", ".b0.w"]
    assert lines(rows, sort="name")[-2:] == [".b11.w", ".stem.w"]
    assert lines(rows, sort="size")[1:3] == [".b11.w", ".b10.w"]


def test_the_order_of_names_makes_no_difference_to_what_they_are() -> None:
    names = [f"{above}.{last}" for above in ("x.0", "x.1", "x.0.a", "x.0.a.b", "x.1.a", "x") for last in "uvw"]
    rows = {name: row(name, index + 1) for index, name in enumerate(names)}
    everything = {f".{name}" for name in names}
    for seed in range(200):
        shuffled = random.Random(seed).sample(names, len(names))
        path: list[str] = []
        found = set()
        for line in Outline([rows[name] for name in shuffled]).lines(50):
            path[max(line.level - 1, 0) :] = [line.label] * (line.level > 0)
            if line.is_tensor:
                found.add("." + ".".join(path))
        assert found == everything


def test_depth() -> None:
    rows = [*block("a.b.c"), *block("a.d")]
    assert lines(rows, 1) == ["(all)", ".a", "..b.c", "..d"]  # what all names share is not counted
    assert lines([*rows, row("z", 1)], 1) == ["(all)", ".a", ".z"]


def test_tied_tensors_are_counted_once() -> None:
    rows = [row("embed.weight", 3, 4), row("head.weight", 3, 4, tied_to="embed.weight")]
    found = list(Outline(rows).lines(9))
    assert [line.parameters for line in found] == [12, 12, 0]
    assert found[2].note == "float32 [3, 4] = embed.weight"
    assert found[0].tensors == 2


def test_odd_names() -> None:
    names = ["", ".", "a", "a.b", ".x", "a..b", "..", "é.重み", "a/b::c.0"]
    found = lines([row(name, 1) for name in names])
    assert found[0] == "(all)"
    assert sum(line.tensors for line in Outline([row(name, 1) for name in names]).lines(99) if line.is_tensor) == len(
        names
    )
    deep = ".".join(["a"] * 100_000)
    assert next(line.tensors for line in Outline([row(deep, 1), row(deep + "b", 1)]).lines(999)) == 2
    assert lines([row("x", 1)]) == [".x"]
    assert lines([]) == []


def test_as_deep_as_is_readable() -> None:
    few = [row(f"layer{i}.w", i + 1) for i in range(5)]
    found, left_out = Outline(few).fitting(40)
    assert (len(found), left_out) == (6, 0)
    wide = [row(f"x{i * 2}.w{j}", i + 1) for i in range(300) for j in range(3)]
    found, left_out = Outline(wide).fitting(40)
    assert (len(found), left_out) == (40, 261)
    deep = [row(f"part{i * 2}.sub{j * 2}.w{k * 2}", i + j + 1) for i in range(6) for j in range(9) for k in range(9)]
    found, left_out = Outline(deep).fitting(40)
    assert (max(line.level for line in found), left_out) == (1, 0)


def test_a_module_of_few_tensors_is_a_line_that_names_them() -> None:
    rows = [row("fc.weight", 3, 4), row("fc.bias", 3), *(row(f"bn.{n}", 4) for n in "abcd"), row("last", 1)]
    notes = {line.label: line.note for line in Outline(rows).fitting(40)[0]}
    assert notes["fc"] == "float32: weight [3, 4], bias [3]"
    assert notes["bn"] == "float32: a [4], b [4], c [4], …"
    assert notes["last"] == "float32 [1]"


# Whole models.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(4)])
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(3, 2)


def test_a_whole_model_has_its_classes(save: Save) -> None:
    Net.__module__, Net.__qualname__ = "tests_outline", "Net"
    import sys

    sys.modules["tests_outline"] = sys.modules[__name__]
    try:
        path = save(Net())
    finally:
        del sys.modules["tests_outline"]
    with ckptkit.open(path) as file:
        document = survey(file.checkpoint)
    found = list(Outline(document["tensors"], document["modules"]).lines(50))
    assert [(shown(line), line.note) for line in found] == [
        ("(all)", "Net"),
        (".token", "float32 [3]"),
        (".blocks", "ModuleList"),
        ("..0‥3 x4", "Sequential"),
        ("...0", "Linear(in_features=3, out_features=3, bias=True)"),
        ("...1", "ReLU()"),
        (".drop", "Dropout(p=0.1, inplace=False)"),
        (".head", "Linear(in_features=3, out_features=2, bias=True)"),
    ]
    assert found[0].parameters == sum(p.numel() for p in Net().parameters())
    assert [line.tensors for line in found] == [11, 1, 8, 8, 2, 0, 0, 2]


def test_modules_of_another_class_are_not_folded() -> None:
    def module(path: str, text: str, *children: str) -> dict[str, Any]:
        return {"path": path, "class": text, "text": f"{text}()", "settings": {}, "children": list(children)}

    modules = [module("", "List", "0", "1", "2"), module("0", "A"), module("1", "A"), module("2", "B")]
    rows = [row(f"{i}.w", 2) for i in range(3)]
    assert lines(rows, modules=modules) == ["(all)", ".0‥1 x2", ".2"]
