"""Sections: their paths, and what bounds the search for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.errors import CorruptError, LimitError, SectionError
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint, lower_state_dict, normalize
from ckptkit.normalize.sections import SectionSearch, brief, join, step
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SourceFile]:
    (tmp_path / "file.pth").write_bytes(bytes(64))
    with closing(SourceFile(tmp_path / "file.pth")) as source:
        yield source


@pytest.fixture
def entry(file: SourceFile) -> TensorEntry:
    storage = Storage(key="0", dtype="float32", nbytes=4, location="cpu", source=ByteRange(file, 0, 4))
    return TensorEntry(storage=storage, storage_offset=0, shape=(1,), stride=(1,), dtype="float32")


def normalized(root: object, file: SourceFile, section: str | None = None) -> Checkpoint:
    return normalize(RawCheckpoint(root=root, format="torch-zip", metadata={}), file, section=section)


def paths(checkpoint: Checkpoint) -> list[str]:
    return [section.path for section in checkpoint.sections]


# Paths.


def test_what_is_listed_is_what_selects(entry: TensorEntry, file: SourceFile) -> None:
    def weights() -> InertDict:
        return InertDict([("w", entry), ("v", entry)])

    keys: list[object] = [
        "plain", "a.b", "k" * 300, "k" * 2000, "K" * 1000 + "1", "K" * 1000 + "2", ("a", 1), ("a", (2,)), ("a", (3,)),
        1, "1", None, "None", True, 1.5, b"raw", "", "line\nbreak", "\udc80", Global("m", "c"),
    ]  # fmt: skip
    pairs: list[tuple[object, object]] = [(key, weights()) for key in keys]
    root = InertDict([*pairs, ("a", InertDict([("b", weights())])), ("1#2", weights())])
    listed = paths(normalized(root, file))
    assert len(listed) == len(set(listed)) == len(keys) + 2
    assert listed[:3] == ["plain", "a.b", "k" * 300]
    assert {"a.b#2", "1#2", "1#2#2", "('a', 1)", "?", "?#2", "?#3"} <= set(listed)
    for index, path in enumerate(listed):
        checkpoint = normalized(root, file, path)
        assert [section.selected for section in checkpoint.sections].index(True) == index
        assert checkpoint.origin.state_path == path
    with pytest.raises(SectionError, match="no section 'nowhere' contains weights"):
        normalized(root, file, "nowhere")


def test_many_sections_under_one_path(entry: TensorEntry, file: SourceFile) -> None:
    root = InertDict([(Global("m", "c"), entry) for _ in range(20_000)])
    root.pairs.append(("named", entry))
    listed = paths(normalized(root, file))
    assert listed[:3] == ["?", "?#2", "?#3"]
    assert len(set(listed)) == 20_001


def test_steps_and_nodes_in_messages() -> None:
    deep: tuple[Any, ...] = ()
    for _ in range(100_000):
        deep = (deep, deep)
    assert step(deep) == "?"
    assert step("k" * 1000) == "k" * 200
    assert step(b"k" * 1000) == repr(b"k" * 200)
    assert [step(key) for key in (1, 1.5, True, None, "", ("a", 1))] == ["1", "1.5", "True", "None", "", "('a', 1)"]
    assert len(step(("k" * 1000,) * 4)) < 1000
    assert [join("", "k" * 300), join("a", 1)] == ["k" * 300, "a.1"]
    assert brief(deep) == "<tuple of 2>"
    assert brief([deep]) == "<list of 1>"
    assert brief("x" * 1_000_000) == "'" + "x" * 59
    assert brief(ABSENT) == "<absent>"
    while deep:  # taken apart by hand: to drop 100,000 nested tuples at once is a deep recursion in CPython
        deep = deep[0]


# Bounds.


def test_shared_dicts_are_entered_once(entry: TensorEntry, file: SourceFile) -> None:
    node: object = InertDict([("weight", entry)])
    for _ in range(4):
        node = InertDict([(f"k{i}", node) for i in range(300)])
    checkpoint = normalized(node, file)
    assert len(checkpoint.sections) == 300
    assert {section.kind for section in checkpoint.sections} == {"state_dict"}
    assert checkpoint.origin.state_path == "k0.k0.k0.k0"  # one object, whatever leads to it


def test_one_large_value_under_many_keys(entry: TensorEntry, file: SourceFile) -> None:
    large = [[number] for number in range(8_000)]
    root = InertDict([*((f"k{i}", [large, i]) for i in range(8_000)), ("weights", InertDict([("w", entry)]))])
    assert normalized(root, file).origin.state_path == "weights"
    holding = [entry, *large]
    survey = SectionSearch(InertDict([("w", entry), ("v.v", entry), *((f"k{i}", [holding, i]) for i in range(8_000))]))
    assert len(survey.sections()) == 8_002


def test_sections_that_share_too_much(entry: TensorEntry, file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.normalize.sections.DEFAULT_LIMITS", Limits(opcodes=100_000))
    large = [entry, *([number] for number in range(1000))]
    assert len(normalized(InertDict([(f"k{i}", [large, i]) for i in range(90)]), file).sections) == 90
    with pytest.raises(LimitError, match="parts that sections share"):
        normalized(InertDict([(f"k{i}", [large, i]) for i in range(110)]), file)


def test_too_many_names_to_compare_are_a_choice(
    entry: TensorEntry, file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = InertDict([("model", InertDict([(f"a{i}", entry) for i in range(100)])), ("x", InertDict([("w", entry)]))])
    assert normalized(root, file).origin.state_path == "model"
    monkeypatch.setattr("ckptkit.normalize.selection.DEFAULT_LIMITS", Limits(entries=50))
    assert normalized(root, file).origin.state_path is None


def nested(kind: str, entry: TensorEntry, levels: int) -> object:
    node: object = entry
    for _ in range(levels):
        node = {
            "list": lambda below: [below, 1],
            "dict": lambda below: InertDict([("key", below), ("w", entry)]),
            "dotted": lambda below: InertDict([("k.k", below), ("a.w", entry), ("b.w", entry)]),
            "pairs": lambda below: [("key", below), ("w", entry)],
            "object": lambda below: Object("newobj", Global("m", "C"), (below,)),
        }[kind](node)
    return node


@pytest.mark.parametrize("kind", ["list", "dict", "dotted", "pairs", "object"])
def test_nesting_without_end(entry: TensorEntry, file: SourceFile, kind: str) -> None:
    root = nested(kind, entry, 10_000)
    checkpoint = normalized(root, file)
    assert checkpoint.sections
    assert sum(section.tensors for section in checkpoint.sections) >= 1
    while isinstance(root, (list, InertDict, Object)):  # taken apart by hand, as above
        below = root.args if isinstance(root, Object) else root.pairs if isinstance(root, InertDict) else root
        root = below[0][1] if isinstance(below[0], tuple) else below[0]


def test_cycles(entry: TensorEntry, file: SourceFile) -> None:
    root = InertDict([("state_dict", InertDict([("w", entry)]))])
    root.pairs += [("self", root), ("list", [root])]
    checkpoint = normalized(root, file)
    assert checkpoint.origin.state_path == "state_dict"
    assert isinstance(checkpoint.rest, InertDict)
    assert checkpoint.rest["self"] is checkpoint.rest
    # Of dicts that lead to each other alone, with the weights among them.
    a, b = InertDict([("w.w", entry)]), InertDict([("w", entry)])
    a.pairs.append(("b.b", b))
    b.pairs.append(("a", a))
    assert paths(normalized(a, file))
    assert paths(normalized([a, [b]], file))


def test_deep_extra_state_is_named_without_going_down(entry: TensorEntry, file: SourceFile) -> None:
    deep: list[object] = []
    top = deep
    for _ in range(20_000):
        deep.append([])
        deep = deep[0]  # type: ignore[assignment]
    checkpoint = normalized(InertDict([("w", entry), ("m._extra_state", top)]), file)
    assert "m._extra_state (<list of 1>)" in checkpoint.findings[0].message


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_as_many_tensors_as_a_file_may_hold(entry: TensorEntry, file: SourceFile, count: int) -> None:
    weights = InertDict([(f"layer.{i}.w", entry) for i in range(count)])
    copy = InertDict([(f"module.{key}", value) for key, value in weights.pairs])
    root = InertDict([("state_dict", weights), ("ema", copy), ("epoch", 1)])
    assert normalized(root, file).origin.state_path is None
    assert len(normalized(root, file, "ema").state_dict) == count


# Any tree at all.

NAMES = (
    "state_dict", "model", "w", "a.b", "_parameters", "_buffers", "_modules", "state", "param_groups", "_metadata",
    "_extra_state", "_packed_params", "dtype", "_non_persistent_buffers_set", "module", "exp_avg", "step", "",
)  # fmt: skip
CLASSES = (
    ("collections", "OrderedDict"), ("builtins", "getattr"), ("torch._utils", "_rebuild_qtensor"), ("m", "M"),
    ("torch.nn.parallel", "DataParallel"), ("torch._dynamo.eval_frame", "OptimizedModule"), ("torch", "ScriptObject"),
    ("torch.ao.nn.quantized.modules.conv", "Conv2d"), ("torch.ao.nn.quantized.modules.linear", "Linear"),
)  # fmt: skip


class Grower:
    """A tree that grows from numbers: nodes are shared, and contain themselves."""

    def __init__(self, choices: Iterator[int], entry: TensorEntry) -> None:
        self.choices = choices
        self.nodes: list[object] = [entry, entry.storage, None, 3, "state_dict", b"x", 1.5, *NAMES]

    def pick(self) -> object:
        return self.nodes[next(self.choices) % len(self.nodes)]

    def name(self) -> str:
        return NAMES[next(self.choices) % len(NAMES)]

    def pairs(self) -> list[tuple[object, object]]:
        return [(self.name() if next(self.choices) % 4 else self.pick(), self.pick()) for _ in range(4)]

    def module(self) -> Object:
        node = Object("newobj", Global(*CLASSES[next(self.choices) % len(CLASSES)]), ())
        named = [(name, InertDict(self.pairs())) for name in ("_parameters", "_buffers", "_modules")]
        node.state = InertDict([*named, *self.pairs()])
        return node

    def object(self) -> Object:
        cls = CLASSES[next(self.choices) % len(CLASSES)]
        node = Object("reduce" if next(self.choices) % 2 else "newobj", Global(*cls), (self.pick(), self.pick()))
        node.items, node.pairs = [self.pick()], self.pairs() if next(self.choices) % 2 else []
        node.state = (InertDict(self.pairs()), (self.pick(), self.pick()), self.pick(), ABSENT)[next(self.choices) % 4]
        return node

    def grow(self, count: int) -> object:
        for _ in range(count):
            pairs = self.pairs()
            self.nodes.append((
                InertDict(pairs), [self.pick(), self.pick()], (self.pick(),), self.object(), self.module(),
                [(self.name(), self.pick())], InertSet([self.pick()]),
            )[next(self.choices) % 7])  # fmt: skip
            older = self.pick()
            if isinstance(older, list):
                older.append(self.nodes[-1])
            elif isinstance(older, InertDict):
                older.pairs.append((self.name(), self.nodes[-1]))
        return self.nodes[-1]


@pytest.mark.parametrize("seed", range(100))
def test_any_tree_gives_an_answer(entry: TensorEntry, file: SourceFile, seed: int) -> None:
    rng = random.Random(seed)
    root = Grower(iter(lambda: rng.randrange(1 << 16), None), entry).grow(rng.choice((3, 10, 40)))
    try:
        checkpoint = normalized(root, file)
    except CorruptError as error:
        assert "contains itself" in str(error)
        return
    listed = paths(checkpoint)
    assert len(listed) == len(set(listed))
    for section in checkpoint.sections:
        if section.is_weights:
            try:
                again = normalized(root, file, section.path)
            except CorruptError as error:
                assert "contains itself" in str(error)
            else:
                assert again.origin.state_path == section.path
                lower_state_dict(again.state_dict)
