"""Trees nobody writes by hand: the inspect document of them is complete, bounded, and made without recursion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Checkpoint, Origin, Section, StateDict, Storage, TensorEntry
from ckptkit.inspection import describe
from ckptkit.pickling.inert import InertDict


def names(document: dict[str, Any]) -> list[str]:
    return [tensor["name"] for tensor in document["tensors"]]


def placed(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(tensor["section"], tensor["name"]) for tensor in document["tensors"]]


@pytest.fixture
def entry(tmp_path: Path) -> TensorEntry:
    (tmp_path / "data").write_bytes(bytes(4))
    source = ByteRange(SourceFile(tmp_path / "data"), 0, 4)
    storage = Storage(key="0", dtype="float32", nbytes=4, location="cpu", source=source)
    return TensorEntry(storage=storage, storage_offset=0, shape=(1,), stride=(1,), dtype="float32")


def checkpoint(rest: object, *sections: str) -> Checkpoint:
    origin = Origin(path="a.pth", size=10, format="torch-zip", kind="collection")
    listed = tuple(Section(path=path, kind="collection", tensors=1, nbytes=4) for path in sections)
    return Checkpoint(state_dict=StateDict(), rest=rest, origin=origin, sections=listed)


def test_deep_trees(entry: TensorEntry) -> None:
    node: object = [entry]
    for _ in range(20_000):
        node = [node, entry]
    document = describe(checkpoint(InertDict([("k", node)]), "k"))
    assert len(document["tensors"]) == 20_001
    assert max(len(name) for name in names(document)) <= 64
    assert {tensor["section"] for tensor in document["tensors"]} == {"k"}


def test_long_keys(entry: TensorEntry) -> None:
    node: object = entry
    for _ in range(1000):
        node = InertDict([("k" * 10_000, node)])
    document = describe(checkpoint(node, ""))
    assert len(names(document)[0]) == 1000


def test_keys_that_are_trees(entry: TensorEntry) -> None:
    key: tuple[Any, ...] = ()
    for _ in range(200):
        key = (key, key)
    assert names(describe(checkpoint(InertDict([(key, entry)]), ""))) == ["?"]


def test_shared_and_cyclic_trees(entry: TensorEntry) -> None:
    node: object = [entry]
    for _ in range(200):
        node = [node, node]
    assert len(describe(checkpoint(node))["tensors"]) == 1
    cyclic = InertDict([("w", entry)])
    cyclic.pairs.append(("self", cyclic))
    assert names(describe(checkpoint(cyclic))) == ["w"]


def test_many_sections(entry: TensorEntry) -> None:
    sections = [f"k{i}" for i in range(20_000)]
    document = describe(checkpoint(InertDict([(name, [entry]) for name in sections]), *sections))
    assert placed(document) == [(name, "0") for name in sections]
