"""What stands in a state_dict and around it, kept through reading and writing."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import Save, codes, sections
from torch import nn

import ckptkit
from ckptkit.checkpoint import Checkpoint, StateDict
from ckptkit.normalize.shapes import CUSTOMARY_KEYS
from ckptkit.pickling.inert import mapping_items

Opened = Callable[..., AbstractContextManager[Checkpoint]]
SameWeights = Callable[[StateDict, dict[str, torch.Tensor]], None]


SD = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


@pytest.mark.usefixtures("quiet")
def test_values_that_are_no_plain_tensors_are_kept_and_named(save: Save, opened: Opened, tmp_path: Path) -> None:
    saved = OrderedDict(SD)
    saved["layer._extra_state"] = {"scale": 3, "deep": [torch.ones(1)]}
    saved["q"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 3, torch.quint8)
    saved["s"] = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    path = save(saved)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "state_dict"
        assert list(checkpoint.state_dict.everything) == list(saved)
        assert list(checkpoint.state_dict) == list(SD)
        assert list(checkpoint.state_dict.extra) == ["layer._extra_state", "q", "s"]
        (finding,) = checkpoint.findings
        assert finding.code == "not-a-plain-tensor"
        assert finding.message.startswith("3 values")
        assert all(name in finding.message for name in ("layer._extra_state", "q (", "s ("))
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=hasattr(torch.serialization, "add_safe_globals"))
    assert list(written) == list(saved)
    assert torch.equal(written["q"].int_repr(), saved["q"].int_repr())
    assert torch.equal(written["s"].to_dense(), saved["s"].to_dense())
    assert written["layer._extra_state"]["scale"] == 3
    assert torch.equal(written["layer._extra_state"]["deep"][0], torch.ones(1))


def test_a_long_list_of_them_is_cut(save: Save, opened: Opened) -> None:
    with opened(save({f"t{i}": torch.ones(1) for i in range(9)} | {f"v{i}": i for i in range(8)})) as checkpoint:
        assert checkpoint.findings[0].message.endswith("v4 (4) and 3 more")


def test_module_versions_and_attributes_are_kept(save: Save, opened: Opened, tmp_path: Path) -> None:
    state_dict = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).state_dict()
    state_dict.note = {"by": "us"}
    path = save({"state_dict": state_dict, "n": 1})
    with opened(path) as checkpoint:
        versions = checkpoint.state_dict.versions
        assert versions is not None
        assert list(versions) == ["", "0", "1"]
        assert dict(mapping_items(versions["1"]) or []) == {"version": 2}
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)["state_dict"]
    assert type(written) is OrderedDict
    assert written._metadata == state_dict._metadata
    assert written.note == {"by": "us"}


@pytest.mark.parametrize("container", [dict, OrderedDict, lambda d: defaultdict(list, d)])
def test_the_containers_class_is_kept(save: Save, tmp_path: Path, container: Callable[[dict[str, Any]], Any]) -> None:
    for saved in (container(SD), {"state_dict": container(SD), "epoch": 1}):
        ckptkit.convert(save(saved), tmp_path / "out.pth", force=True)
        written = torch.load(tmp_path / "out.pth", weights_only=False)
        assert type(written) is type(saved)
        written, before = written.get("state_dict", written), saved.get("state_dict", saved)
        assert type(written) is type(before)
        assert list(written) == list(SD)
        assert getattr(written, "default_factory", None) is getattr(before, "default_factory", None)


def test_one_state_dict_under_two_keys_is_one(save: Save, opened: Opened, tmp_path: Path) -> None:
    for keys in (("state_dict", "best"), ("best", "model"), ("a", "b")):
        path = save(dict.fromkeys(keys, SD) | {"epoch": 1})
        with opened(path) as checkpoint:
            assert checkpoint.origin.state_path == next((k for k in keys if k in CUSTOMARY_KEYS), keys[0])
            assert codes(checkpoint) == []
            assert len(checkpoint.sections) == 2
        ckptkit.convert(path, tmp_path / "out.pth", force=True, strip_prefix="conv")
        written = torch.load(tmp_path / "out.pth", weights_only=True)
        assert written[keys[0]] is written[keys[1]]
        assert list(written[keys[0]]) == ["weight", "bias"]


def test_what_weights_and_rest_share_stays_shared(save: Save, opened: Opened, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(6.0))
    noted = nn.Parameter(torch.arange(3.0))
    noted.note = "an attribute"  # type: ignore[attr-defined]
    extra = ["shared"]
    saved = {
        "model": {"w": weight, "half": weight.data[3:], "noted": noted, "m._extra_state": extra},
        "anchor": [weight, weight.data[:1], noted, extra],
    }
    path = save(saved)
    with opened(path) as checkpoint:
        rest = dict(mapping_items(checkpoint.rest) or [])
        anchor: Any = rest["anchor"]
        assert anchor[0] is checkpoint.state_dict["w"]
        assert anchor[1].storage is checkpoint.state_dict["half"].storage
        assert anchor[2] is checkpoint.state_dict["noted"]
        assert anchor[3] is checkpoint.state_dict.everything["m._extra_state"]
    ckptkit.convert(path, tmp_path / "out.pth", map_location="cuda:0")
    written = torch.load(tmp_path / "out.pth", weights_only=False, map_location="cpu")
    assert written["anchor"][0] is written["model"]["w"]
    assert written["anchor"][2] is written["model"]["noted"]
    assert written["anchor"][2].note == "an attribute"
    assert written["anchor"][3] is written["model"]["m._extra_state"]
    storages = {t.untyped_storage().data_ptr() for t in (*written["anchor"][:2], written["model"]["half"])}
    assert len(storages) == 1


def test_without_metadata_none_is_made_up(save: Save, tmp_path: Path) -> None:
    ckptkit.convert(save(OrderedDict(SD)), tmp_path / "out.pth")
    assert not hasattr(torch.load(tmp_path / "out.pth", weights_only=True), "_metadata")


def test_a_state_dict_with_nested_values_is_one(save: Save, opened: Opened, tmp_path: Path) -> None:
    # Dotted names are a module's: what stands among them is a value, not a section.
    saved = {f"layer.{i}.weight": torch.ones(i + 1) for i in range(5)}
    saved |= {"layer.cache": {"k": torch.ones(2), "v": torch.ones(2)}, "layer.list": [torch.ones(1), 3], "extra": None}
    path = save(saved)
    with opened(path) as checkpoint:
        assert sections(checkpoint) == [("", "state_dict", True)]
        assert checkpoint.sections[0].tensors == 8
        assert list(checkpoint.state_dict.everything) == list(saved)
        assert list(checkpoint.state_dict.extra) == ["layer.cache", "layer.list", "extra"]
        assert codes(checkpoint) == ["not-a-plain-tensor"]
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == list(saved)
    assert torch.equal(written["layer.cache"]["v"], torch.ones(2))


def test_a_files_own_dict_is_none(save: Save, opened: Opened) -> None:
    many = {f"l.{i}": torch.ones(1, 1) for i in range(3)}
    for saved in (
        {"net": SD | many, "best.score": torch.tensor(1.0), "x": torch.ones(2)},  # the net has more tensors
        {"a.b": torch.ones(1), "model": nn.Linear(1, 1)},
        {"score": torch.ones(1), "other": torch.ones(1), "net": many},  # names without dots
        {"score": torch.ones(1), "nets": [many, many | SD]},
    ):
        with opened(save(saved)) as checkpoint:
            assert checkpoint.origin.kind == "resume"
            assert len(checkpoint.sections) > 1


class Marked(torch.Tensor):
    """A subclass."""


@pytest.mark.usefixtures("quiet")
def test_tensors_of_every_layout_keep_their_name_and_place(save: Save, opened: Opened, tmp_path: Path) -> None:
    saved = OrderedDict(
        plain=torch.ones(2),
        subclass=torch.ones(3).as_subclass(Marked),
        sparse=torch.eye(2).to_sparse(),
        csr=torch.eye(2).to_sparse_csr(),
        quantized=torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        meta=torch.empty(2, device="meta"),
        conj=torch.ones(2, dtype=torch.complex64).conj(),
    )
    if hasattr(torch._utils, "_rebuild_nested_tensor"):  # else torch saves none
        saved["nested"] = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    path = save(saved)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "state_dict"
        assert list(checkpoint.state_dict.everything) == list(saved)
        assert set(checkpoint.state_dict.extra) == {"sparse", "csr", "quantized", "meta", "nested"} & set(saved)
        assert checkpoint.state_dict["conj"].is_conj
        assert checkpoint.state_dict["subclass"].subclass is not None
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)
    assert list(written) == list(saved)
    assert [type(value) for value in written.values()] == [type(value) for value in saved.values()]
    assert [value.layout for value in written.values()] == [value.layout for value in saved.values()]
    assert torch.equal(written["sparse"].to_dense(), torch.eye(2))
    assert torch.equal(written["quantized"].int_repr(), saved["quantized"].int_repr())


NAMES = [
    "",
    ".",
    "a.b",
    "a::b",
    "a/b/../c",
    "'q\"",
    "line\nbreak",
    "tab\t",
    "naïve.权重",
    "\udc80",
    "{x}",
    "0",
    "k" * 3000,
    " ",
]


def test_names_are_kept_exactly(save: Save, opened: Opened, tmp_path: Path) -> None:
    path = save({name: torch.full((1,), float(i)) for i, name in enumerate(NAMES)})
    with opened(path) as checkpoint:
        assert list(checkpoint.state_dict) == NAMES
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert [(name, tensor.item()) for name, tensor in written.items()] == [(n, float(i)) for i, n in enumerate(NAMES)]


# Lists of (name, tensor) pairs.


def pairs_as(outer: Any, inner: Any) -> Any:
    return outer(inner(pair) for pair in SD.items())


@pytest.mark.parametrize("outer", [list, tuple])
@pytest.mark.parametrize("inner", [list, tuple])
def test_pairs_are_a_state_dict(
    save: Save, opened: Opened, same_weights: SameWeights, tmp_path: Path, outer: Any, inner: Any
) -> None:
    path = save(pairs_as(outer, inner))
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "state_dict"
        assert sections(checkpoint) == [("", "state_dict", True)]
        assert (checkpoint.sections[0].tensors, checkpoint.sections[0].nbytes) == (2, 32)
        same_weights(checkpoint.state_dict, SD)
    ckptkit.convert(path, tmp_path / "out.pth", strip_prefix="conv")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert type(written) is outer
    assert [type(pair) for pair in written] == [inner, inner]
    assert [name for name, _ in written] == ["weight", "bias"]
    ckptkit.convert(path, tmp_path / "out.safetensors")
    with opened(tmp_path / "out.safetensors") as checkpoint:
        assert set(checkpoint.state_dict) == set(SD)


def test_pairs_in_a_resume_dict(save: Save, opened: Opened, tmp_path: Path) -> None:
    path = save({"model": [("w", torch.ones(2)), ("n", 3)], "epoch": 1})
    with opened(path) as checkpoint:
        assert checkpoint.origin.state_path == "model"
        assert dict(checkpoint.state_dict.extra) == {"n": 3}
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert [name for name, _ in written["model"]] == ["w", "n"]
    assert written["epoch"] == 1


@pytest.mark.parametrize(
    "saved",
    [
        [("w", torch.ones(1)), ("w", torch.ones(1))],
        [("w", torch.ones(1)), ["v", torch.ones(1)]],
        [("w", torch.ones(1)), ("v", torch.ones(1), 3)],
        [("w", torch.ones(1)), (1, torch.ones(1))],
        [("w", torch.ones(1)), torch.ones(1)],
    ],
    ids=["one name twice", "two kinds of pairs", "triple", "no name", "no pair"],
)
def test_what_is_not_quite_a_list_of_pairs_is_a_collection(save: Save, opened: Opened, saved: Any) -> None:
    with opened(save(saved)) as checkpoint:
        assert checkpoint.origin.kind == "collection"
        assert [section.tensors for section in checkpoint.sections] == [2]
