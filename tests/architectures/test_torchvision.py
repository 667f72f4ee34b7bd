"""Every torchvision model is recognised, by the shipped index, whichever torchvision made it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from support.index_maker import meta_model, rows
from torch import nn

import ckptkit
from ckptkit.architectures import Architecture, identify
from ckptkit.architectures.index import load, sketch, weights_of

NAMES = torchvision.models.list_models()
FAMILIES = {torchvision.models.get_model_builder(name).__module__: name for name in reversed(NAMES)}
"""The first model of each module of torchvision's."""


def among(names: Iterable[str]) -> list[Any]:
    """These; those that are not the first of their module are thorough."""
    return [pytest.param(name, marks=() if name in FAMILIES.values() else pytest.mark.thorough) for name in names]


@cache
def shapes_of(name: str, **args: object) -> dict[str, tuple[int, ...]]:
    state = meta_model("torchvision", name, args).state_dict()
    return weights_of((key, tuple(tensor.shape)) for key, tensor in state.items())


def assert_is(found: tuple[Architecture, ...], name: str, **args: object) -> None:
    """The model is among those found, and whatever comes first has the same names and shapes."""
    assert all(architecture.exact and architecture.similarity == 1.0 for architecture in found)
    assert {"torchvision:" + name: args}.items() <= {a.reference: dict(a.args) for a in found}.items()
    first = found[0]
    library, _, best = first.reference.partition(":")
    assert library == "torchvision"
    assert shapes_of(best, **first.args) == shapes_of(name, **args)
    assert not best.startswith("quantized_") or name.startswith("quantized_")


@pytest.mark.parametrize("name", among(NAMES))
def test_a_model_as_it_is(name: str, named) -> None:
    assert_is(identify(named(shapes_of(name))), name)


@pytest.mark.parametrize("name", among(name for name in NAMES if not name.startswith("raft_")))
def test_a_model_with_another_head(name: str, named) -> None:
    assert_is(identify(named(shapes_of(name, num_classes=7))), name, num_classes=7)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_b_16", {"num_classes": 5, "image_size": 384}),
        ("vit_h_14", {"image_size": 518}),
        ("fcn_resnet50", {"aux_loss": True, "num_classes": 3}),
        ("lraspp_mobilenet_v3_large", {"num_classes": 2}),
        ("googlenet", {"aux_logits": False}),
        ("inception_v3", {"aux_logits": False, "num_classes": 12}),
        ("keypointrcnn_resnet50_fpn", {"num_keypoints": 5}),
        ("keypointrcnn_resnet50_fpn", {"num_keypoints": 5, "num_classes": 4}),
    ],
)
def test_arguments_are_read_off(name: str, args: dict[str, object], named) -> None:
    assert_is(identify(named(shapes_of(name, **args))), name, **args)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
@pytest.mark.parametrize("classes", [1000, 10])
def test_files(name: str, classes: int, tmp_path: Path) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    wrapped = nn.DataParallel(model)
    torch.save(model, tmp_path / "whole.pth")
    torch.save({"state_dict": wrapped.state_dict(), "epoch": 3}, tmp_path / "wrapped.pth")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for file in ("whole.pth", "wrapped.pth", "model.safetensors"):
        found = identify(ckptkit.open(tmp_path / file).state_dict)
        assert_is(found, name, **({} if classes == 1000 else {"num_classes": 10}))
        head = "" if classes == 1000 else ", head 1000 → 10"
        assert found[0].label == f"torchvision {name}{head}"


def test_the_index_is_what_the_library_gives() -> None:
    index = load("torchvision")
    shipped = {(row["name"], json.dumps(row["args"])): (number, row) for number, row in enumerate(index_lines())}
    for name in ("alexnet", "googlenet", "resnet18", "ssd300_vgg16", "vit_b_32"):
        made = list(rows("torchvision", [name]))
        assert made
        for line, hashes in made:
            number, row = shipped[name, json.dumps(line["args"])]
            assert row == line
            assert index.sketch(number) == hashes


def test_the_index_has_every_model() -> None:
    assert {row.name for row in load("torchvision").rows()} >= set(NAMES)


def test_sketches_belong_to_their_rows() -> None:
    index = load("torchvision")
    for number, row in enumerate(index.rows()):
        if row.name in ("resnet50", "swin_t", "raft_large", "quantized_googlenet") and not row.args:
            assert index.sketch(number) == sketch(shapes_of(row.name))


def index_lines() -> list[dict]:
    text = (Path(ckptkit.__file__).parent / "architectures" / "torchvision.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()[1:]]
