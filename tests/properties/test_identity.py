"""From ``.pth`` to ``.pth`` everything stays what it is: to the bit, the stride and the sharing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import event, given
from support.generated_objects import OBJECTS, Box, graphs
from support.generated_tensors import SOME, STORABLE, TYPED, resumes, state_dicts, tagged, tensors_of
from support.torch_oracle import Same, check_compacted, check_tags, convert, load, save, through

import ckptkit

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")]


@SOME
@given(data=st.data(), state=state_dicts())
def test_a_state_dict_survives(folder: Path, data: st.DataObject, state: dict[str, torch.Tensor]) -> None:
    source = save(state, folder / "source.pth", data.draw(tagged(list(state.values()))))
    expected = load(source)
    result = through(source, folder / "result.pth")
    found = load(result)
    Same()(expected.tree, found.tree)
    assert found.tags == expected.tags
    # Written once more it is the same file, byte for byte.
    assert through(result, folder / "again.pth").read_bytes() == result.read_bytes()


@SOME
@given(state=state_dicts(), rest=OBJECTS, graph=graphs(), protocol=st.integers(2, 5))
def test_a_resume_dict_survives(
    folder: Path, state: dict[str, torch.Tensor], rest: object, graph: list[object], protocol: int
) -> None:
    tensors = list(state.values())
    checkpoint = {
        "state_dict": state,
        "optimizer": {"state": {i: {"moment": t} for i, t in enumerate(tensors)}, "param_groups": [{"lr": 0.1}]},
        "rest": rest,
        "graph": graph,
        1: ("again", rest, tensors[-1:], state),
    }
    source = save(checkpoint, folder / "source.pth", protocol=protocol)
    result = through(source, folder / "result.pth")
    Same()(load(source).tree, load(result).tree)
    assert through(result, folder / "again.pth").read_bytes() == result.read_bytes()


@SOME
@given(rest=OBJECTS, graph=graphs(), protocol=st.integers(2, 5))
def test_python_objects_survive(folder: Path, rest: object, graph: list[object], protocol: int) -> None:
    source = save([rest, graph, rest], folder / "source.pth", protocol=protocol)
    Same()(load(source).tree, load(through(source, folder / "result.pth")).tree)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@SOME
@given(data=st.data(), protocol=st.integers(2, 5))
def test_convert_leaves_all_that_tensors_view(folder: Path, legacy: bool, data: st.DataObject, protocol: int) -> None:
    dtypes = {"dtypes": TYPED} if legacy else {}
    tree: Any = data.draw(resumes(**dtypes) | state_dicts(**dtypes))
    source = save(tree, folder / "source.pth", data.draw(tagged(tensors_of(tree))), protocol, legacy=legacy)
    expected, found = load(source), load(convert(source, folder / "result.pth"))
    same = Same(compacted=True)
    same(expected.tree, found.tree)
    check_compacted(same.tensors)
    check_tags(expected, found, same.tensors)
    cut = sum(storage.nbytes() for storage in expected.kept) > sum(storage.nbytes() for storage in found.kept)
    event(f"cut: {cut}")
    if not cut:
        Same()(expected.tree, found.tree)
        assert found.tags == expected.tags


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_empty_tensors_of_one_storage_keep_it(folder: Path, legacy: bool) -> None:
    empty = torch.empty(0, 3)
    tree = {"parameter": torch.nn.Parameter(empty), "buffer": empty, "other": empty.view(-1), "alone": torch.empty(0)}
    source = save(tree, folder / "source.pth", legacy=legacy)
    result = convert(source, folder / "result.pth")
    expected, found, same = load(source), load(result), Same()
    same(expected.tree, found.tree)
    check_tags(expected, found, same.tensors)
    with ckptkit.open(result) as file:
        keys = {name: entry.storage.key for name, entry in file.state_dict.items()}
    assert keys["parameter"] == keys["buffer"] == keys["other"] != keys["alone"]


@SOME
@given(rest=OBJECTS, graph=graphs(), state=state_dicts(TYPED))
def test_legacy_files_become_modern_ones(
    folder: Path, rest: object, graph: list[object], state: dict[str, torch.Tensor]
) -> None:
    tree = {"state_dict": state, "rest": rest, "graph": graph}
    source = save(tree, folder / "source.pth", legacy=True)
    assert source.read_bytes()[:2] != b"PK"
    result = through(source, folder / "result.pth")
    assert result.read_bytes()[:2] == b"PK"
    Same()(load(source).tree, load(result).tree)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_odd_tensors_survive(folder: Path) -> None:
    noted = torch.arange(3.0)
    noted.note = ["about", torch.ones(1)]
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.shard = {"axis": 0}
    everything = {
        "sparse": torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (3,)),
        "noted": noted,
        "parameter": parameter,
        **({"buffer": torch.nn.Buffer(torch.zeros(2), persistent=False)} if hasattr(torch.nn, "Buffer") else {}),
        "extra._extra_state": {"scale": torch.ones(1)},
        "plain": torch.ones(2),
    }
    resume = {"state_dict": everything, "again": [*everything.values()], "bytes": torch.UntypedStorage([1, 2])}
    resume["random"] = (random.Random(0).getstate(), np.random.default_rng(0).bit_generator.state)
    for obj in (everything, resume):
        source = save(obj, folder / "source.pth")
        Same()(load(source).tree, load(through(source, folder / "result.pth")).tree)
        Same()(load(source).tree, load(convert(source, folder / "result.pth")).tree)


BYTES = torch.arange(16, dtype=torch.uint8)
EMPTY = torch.empty(0)


FLOAT8 = [
    {"packed": BYTES, "weight": BYTES.view(torch.float8_e4m3fn)},
    {"weight": BYTES.view(torch.float8_e4m3fn), "packed": BYTES},
    {"weight": BYTES.view(getattr(torch, "uint16", torch.uint8)), "scale": BYTES.view(torch.float8_e5m2)[3:]},
]


@pytest.mark.parametrize(
    "obj",
    [
        *(FLOAT8 if "float8_e5m2" in STORABLE else []),
        {"empty": EMPTY, "as integers": EMPTY.view(torch.int32)},
        {"state_dict": {"packed": BYTES}, "bytes": BYTES.untyped_storage()},
        {"state_dict": {"packed": BYTES[:13]}, "bytes": [torch.UntypedStorage(0), torch.UntypedStorage(3)]},
    ],
)
def test_views_of_bytes_survive(folder: Path, obj: object) -> None:
    """One storage under two types: torch takes an untyped storage for one of uint8."""
    source = save(obj, folder / "source.pth")
    Same()(load(source).tree, load(through(source, folder / "result.pth")).tree)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_set_that_its_member_holds_survives(folder: Path, protocol: int) -> None:
    box = Box()
    box.content = {box}
    ring = frozenset([Box(deeper := Box())])
    deeper.content = (ring, [ring])
    for obj in (box, box.content, [box.content, box], {"state_dict": {"w": torch.ones(1)}, "rest": [ring, deeper]}):
        source = save(obj, folder / "source.pth", protocol=protocol)
        Same()(load(source).tree, load(through(source, folder / "result.pth")).tree)
