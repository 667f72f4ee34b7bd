"""Device tags are rewritten everywhere, and nothing else is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import opened
from torch import nn

import ckptkit
from ckptkit import MapLocation, RewriteError
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.pickling.inert import walk

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def storages(checkpoint: Checkpoint) -> list[Storage]:
    """Every storage of the file, each once, in the order it is met."""
    found: dict[int, Storage] = {}
    for root in (*checkpoint.state_dict.everything.values(), checkpoint.rest, checkpoint.module):
        for node in walk(root):
            storage = node.storage if isinstance(node, TensorEntry) else node
            if isinstance(storage, Storage):
                found[id(storage)] = storage
    return list(found.values())


def tags(checkpoint: Checkpoint) -> list[str]:
    return [storage.location for storage in storages(checkpoint)]


def training() -> dict[str, Any]:
    """A resume dict with ties, views, an optimizer, and tensors in odd places."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    noted = torch.ones(2)
    noted.mask = torch.zeros(2)  # type: ignore[attr-defined]
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "anchor": [model[0].weight.data, model[0].weight.data[1]],
        "noted": noted,
        "in an object": argparse.Namespace(best={torch.ones(1)}),
        "bare": torch.ones(3).untyped_storage(),
        "m._extra_state": (torch.ones(1),),
        "epoch": 3,
    }


FORMS: dict[str, Any] = {
    "string": "cpu",
    "string with index": "cpu:0",
    "torch.device": torch.device("cpu"),
    "dict": {"cuda:0": "cpu", "cuda:1": "cpu"},
    "dict of devices": {torch.device("cuda:0"): torch.device("cpu"), torch.device("cuda", 1): torch.device("cpu")},
    "callable, tag": lambda storage, location: "cpu",
    "callable, device": lambda storage, location: torch.device("cpu"),
    "callable, storage": lambda storage, location: storage,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reaches_every_tag(save: Save, same_bits: SameBits, form: str, tmp_path: Path) -> None:
    saved = training()
    path = save(saved, device=lambda storage: f"cuda:{storage.nbytes() % 3 % 2}")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=False)
    with ckptkit.open(path) as file:
        before = tags(file.checkpoint)
        assert set(before) == {"cuda:0", "cuda:1"}
        result = file.rewrite(MapLocation(FORMS[form]))
        assert set(tags(result.checkpoint)) == {"cpu"}
        assert tags(file.checkpoint) == before
        result.save(tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)
    assert list(written["state_dict"]) == list(saved["state_dict"])
    for name, tensor in saved["state_dict"].items():
        assert same_bits(written["state_dict"][name], tensor)
    assert written["anchor"][0].data_ptr() == written["state_dict"]["0.weight"].data_ptr()
    assert written["state_dict"]["1.weight"].data_ptr() == written["state_dict"]["0.weight"].data_ptr()
    assert written["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    for index, moments in saved["optimizer"]["state"].items():
        assert all(same_bits(written["optimizer"]["state"][index][key], moments[key]) for key in moments)
    assert torch.equal(written["noted"].mask, torch.zeros(2))


def test_nothing_but_tags_changes(save: Save) -> None:
    with opened(save(training(), device="cuda:3")) as checkpoint:
        result = MapLocation("cuda:0")(checkpoint)
        assert tags(checkpoint) == ["cuda:3"] * len(tags(checkpoint))
        pairs = list(zip(storages(checkpoint), storages(result), strict=True))
        for old, new in pairs:
            assert (new.key, new.dtype, new.nbytes, new.crc32, new.byteorder) == (
                old.key, old.dtype, old.nbytes, old.crc32, old.byteorder
            )  # fmt: skip
            assert new.source is old.source
            assert new.location == "cuda:0"
        moved = {id(old): new for old, new in pairs}
        for name, entry in checkpoint.state_dict.items():
            after = result.state_dict[name]
            assert (after.shape, after.stride, after.storage_offset, after.dtype) == (
                entry.shape, entry.stride, entry.storage_offset, entry.dtype
            )  # fmt: skip
            assert after.storage is moved[id(entry.storage)]
        assert result.origin is checkpoint.origin
        assert result.state_dict.versions is checkpoint.state_dict.versions


def test_what_is_already_there_stays_the_same_object(save: Save) -> None:
    with opened(save(training())) as checkpoint:
        assert [id(s) for s in storages(MapLocation("cpu")(checkpoint))] == [id(s) for s in storages(checkpoint)]


def test_a_dict_leaves_other_tags_and_is_applied_once(save: Save) -> None:
    tensors = [torch.ones(i + 1) for i in range(4)]
    where = {4: "cuda:0", 8: "cuda:1", 12: "cpu", 16: "a-tag-of-its-own"}
    with opened(save(tensors, device=lambda storage: where[storage.nbytes()])) as checkpoint:
        result = MapLocation({"cuda:0": "cuda:1", "cuda:1": "cuda:0", "cuda:7": "cpu"})(checkpoint)
        assert tags(result) == ["cuda:1", "cuda:0", "cpu", "a-tag-of-its-own"]


def test_a_callable_is_asked_once_a_storage(save: Save) -> None:
    asked: list[tuple[str, str]] = []

    def move(storage: Storage, location: str) -> str | None:
        asked.append((storage.key, location))
        return None if location == "cuda:1" else "cuda:9"

    base = torch.zeros(10)
    saved = {"a": base, "b": base, "c": base[2:], "other": torch.ones(2), "list": [base.view(2, 5)]}
    with opened(save(saved, device=lambda s: "cuda:1" if s.nbytes() == 8 else "cuda:0")) as checkpoint:
        result = MapLocation(move)(checkpoint)
        assert sorted(asked) == [("0", "cuda:0"), ("1", "cuda:1")]
        assert sorted(tags(result)) == ["cuda:1", "cuda:9"]


def test_a_whole_models_module_is_mapped_too(save: Save) -> None:
    with opened(save(nn.Linear(2, 2), device="cuda:1")) as checkpoint:
        result = MapLocation("cpu")(checkpoint)
        assert set(tags(result)) == {"cpu"}
        assert any(isinstance(node, TensorEntry) for node in walk(result.module))


@pytest.mark.parametrize(
    "location", ["", "CUDA:0", "cuda:", "cuda:x", "cuda:0 ", "cuda:-1", "meta", "meta:0", "0", "cpu\n"]
)
def test_no_locations(save: Save, location: str) -> None:
    for form in (location, {"cuda:0": location}, {location: "cpu"}):
        with pytest.raises(RewriteError, match="is not a device location"):
            MapLocation(form)
    rewriter = MapLocation(lambda storage, tag: location)
    with opened(save(torch.ones(1))) as checkpoint, pytest.raises(RewriteError, match="is not a device location"):
        rewriter(checkpoint)


def test_other_things_are_no_locations() -> None:
    for wrong in (None, 3, torch.device("meta")):
        with pytest.raises(RewriteError, match="is not a device location"):
            MapLocation(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("location", ["cuda", "cuda:0", "mps", "xpu:12", "hpu", "privateuseone:0", "npu:1"])
def test_locations(save: Save, location: str) -> None:
    with opened(save(torch.ones(1))) as checkpoint:
        assert tags(MapLocation(location)(checkpoint)) == [location]


def test_torch_reads_the_tag_it_would_have_written(save: Save, tmp_path: Path) -> None:
    with ckptkit.open(save({"w": torch.ones(2)})) as file:
        file.rewrite(MapLocation("cuda:5")).save(tmp_path / "out.pth")
    seen: list[str] = []
    torch.load(tmp_path / "out.pth", map_location=lambda storage, tag: seen.append(tag) or storage)
    assert seen == ["cuda:5"]
