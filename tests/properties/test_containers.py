"""Through safetensors, through shards, and back: the same names, values and ties."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import event, given
from support.generated_tensors import SAFETENSORS, SOME, resumes, state_dicts
from support.torch_oracle import Same, bits, check_compacted, convert, load, save, through

import ckptkit

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")]

SIZES = st.integers(1, 20_000) | st.just(1)
"""Bytes of a file: from one tensor a file to one file."""


def ties(state: dict[str, torch.Tensor]) -> list[set[str]]:
    """The names of each tensor that has several."""
    groups = collections.defaultdict(set)
    for name, tensor in state.items():
        if tensor.numel():
            place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()
            groups[place, tensor.shape, tensor.stride()].add(name)
    return sorted((names for names in groups.values() if len(names) > 1), key=sorted)


def check_same_values(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library, every tied name with its tensor, as its ``load_model`` gives them."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert metadata["format"] == "pt"
    check_same_values(safetensors.torch.load_file(path), loaded)
    tied = {name: kept for name, kept in metadata.items() if name not in loaded and kept in loaded and name != "format"}
    return loaded | {name: loaded[kept] for name, kept in tied.items()}


def read_shards(written: Path) -> dict[str, torch.Tensor]:
    """By the libraries, each tensor from the shard that the index names."""
    if written.suffix != ".json":
        return read_safetensors(written) if written.suffix == ".safetensors" else load(written).tree
    index = json.loads(written.read_text(encoding="utf-8"))
    names = set(index["weight_map"].values())
    stem, ending, *_ = written.name.split(".")
    assert {path.name for path in written.parent.glob(f"{stem}-*.{ending}")} == names
    read = read_safetensors if written.name.endswith(".safetensors.index.json") else lambda path: load(path).tree
    shards = {name: read(written.with_name(name)) for name in names}
    together = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert sum(map(len, shards.values())) == len(together)
    if written.name.endswith(".safetensors.index.json"):  # which lists the names that tensors are stored under
        stored = {shard: safetensors.torch.load_file(written.with_name(shard)).keys() for shard in names}
        assert index["weight_map"] == {name: shard for shard in names for name in stored[shard]}
    else:
        assert index["weight_map"] == {name: shard for shard in names for name in shards[shard]}
    return {name: together[name] for name in (*index["weight_map"], *together)}


@SOME
@given(state=state_dicts(SAFETENSORS))
def test_safetensors_holds_the_same_values(folder: Path, state: dict[str, torch.Tensor]) -> None:
    source = save(state, folder / "source.pth")
    result = through(source, folder / "result.safetensors")
    loaded = safetensors.torch.load_file(result)
    with safetensors.safe_open(result, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    event(f"tied: {len(loaded) < len(state)}")
    for name, tensor in state.items():
        found = loaded[name] if name in loaded else loaded[metadata[name]]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert bits(found) == bits(tensor), name
    # And back: every name has its tensor again, and what was tied still is.
    back = load(through(result, folder / "back.pth")).tree
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert bits(back[name]) == bits(tensor), name
    shared = collections.Counter(tensor.untyped_storage()._cdata for tensor in back.values() if tensor.numel())
    assert len(shared) == sum(tensor.numel() > 0 for tensor in loaded.values())


@SOME
@given(tree=resumes(SAFETENSORS) | state_dicts(SAFETENSORS))
def test_through_safetensors_and_back(folder: Path, tree: dict[str, Any]) -> None:
    state = tree.get("state_dict", tree)
    source = save(tree, folder / "source.pth")
    weights = convert(source, folder / "weights.safetensors", weights_only=True)
    check_same_values(read_safetensors(weights), state)
    back = load(convert(weights, folder / "back.pth")).tree
    check_same_values(back, state)
    assert ties(back) == ties(state)
    assert list(back) == list(state)
    again = convert(weights, folder / "again.safetensors", receipt=False)
    once = convert(again, folder / "once more.safetensors", receipt=False)
    assert once.read_bytes() == again.read_bytes()
    versions = getattr(state, "_metadata", None)
    assert getattr(back, "_metadata", None) == versions
    assert list(getattr(back, "_metadata", ())) == list(versions or ())
    assert not any(tensor.requires_grad for tensor in back.values())


@SOME
@given(state=state_dicts(), size=SIZES)
def test_through_torch_shards_and_back(folder: Path, state: dict[str, torch.Tensor], size: int) -> None:
    source = save(state, folder / "source.pth")
    written = convert(source, folder / "shards.pth", max_shard_size=size)
    event(f"shards: {written.suffix == '.json'}")
    found = read_shards(written)
    assert list(found) == list(state)
    expected = load(source).tree
    merged = load(convert(written, folder / "merged.pth")).tree
    for back in (found, merged):
        same = Same(compacted=True)
        same(list(expected.items()), list(back.items()))
        check_compacted(same.tensors)
    assert getattr(merged, "_metadata", None) == getattr(state, "_metadata", None)
    # Split in another way, then merged, it is the same.
    again = convert(written, folder / "again.pth", max_shard_size=size * 2, receipt=False)
    once = convert(written, folder / "merged.pth", receipt=False).read_bytes()
    assert convert(again, folder / "merged.pth", receipt=False).read_bytes() == once


@SOME
@given(state=state_dicts(SAFETENSORS), size=SIZES)
def test_through_safetensors_shards_and_back(folder: Path, state: dict[str, torch.Tensor], size: int) -> None:
    source = save(state, folder / "source.pth")
    single = convert(source, folder / "single.safetensors", receipt=False)
    for begun in (source, single):
        written = convert(begun, folder / "shards.safetensors", max_shard_size=size, receipt=False)
        event(f"shards: {written.suffix == '.json'}")
        found = read_shards(written)
        check_same_values(found, state)
        assert ties(found) == ties(state)
        merged = convert(written, folder / "merged.safetensors", receipt=False)
        check_same_values(read_safetensors(merged), state)
        back = load(convert(merged, folder / "back.pth")).tree
        assert ties(back) == ties(state)
        assert getattr(back, "_metadata", None) == getattr(state, "_metadata", None)
    assert merged.read_bytes() == single.read_bytes()


@SOME
@given(state=state_dicts(SAFETENSORS), size=SIZES, sharded=st.sampled_from([".pth", ".safetensors"]))
def test_single_and_sharded_files_load_the_same(
    folder: Path, state: dict[str, torch.Tensor], size: int, sharded: str
) -> None:
    source = save(state, folder / "source.pth")
    written = convert(source, folder / f"shards{sharded}", max_shard_size=size)
    loaded = ckptkit.load_state_dict(written)
    check_same_values(loaded, state)
    if written.suffix == ".json":
        assert list(loaded) == list(state)
    check_same_values(ckptkit.load_state_dict(convert(written, folder / "merged.pth")), state)
    check_same_values(ckptkit.load_state_dict(convert(written, folder / "merged.safetensors")), state)
