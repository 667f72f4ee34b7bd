"""What is said where a state_dict is a known model only in part, alike, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet34, resnet50, vgg16
from torchvision.models.resnet import BasicBlock, ResNet

from ckptkit.architectures import _MAX_CHARACTERS, _MAX_TENSORS, _MIN_TENSORS, identify
from ckptkit.architectures.index import LIBRARIES, load

pytestmark = pytest.mark.usefixtures("on_meta")


def prefixed(prefix: str):
    return lambda name: prefix + name


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.module."])
def test_wrappers_are_no_difference(wrapper: str, named) -> None:
    assert identify(named(resnet18(), prefixed(wrapper))) == identify(named(resnet18()))


def test_batch_counters_are_no_difference(named) -> None:
    shapes = {n: tuple(t.shape) for n, t in resnet18().state_dict().items() if not n.endswith("num_batches_tracked")}
    assert identify(named(shapes)) == identify(named(resnet18()))


def test_order_is_no_difference(named) -> None:
    shapes = {n: tuple(t.shape) for n, t in reversed(resnet18().state_dict().items())}
    assert identify(named(shapes)) == identify(named(resnet18()))


@pytest.mark.parametrize("prefix", ["model.", "encoder.", "model.net.backbone."])
def test_under_a_prefix(prefix: str, named) -> None:
    best = identify(named(resnet18(num_classes=10), prefixed(prefix)))[0]
    assert (best.reference, best.args, best.exact, best.prefix) == (
        "torchvision:resnet18", {"num_classes": 10}, True, prefix,
    )  # fmt: skip
    assert best.label == f"torchvision resnet18, head 1000 → 10, under '{prefix}'"


def test_beside_other_tensors(named) -> None:
    best = identify(named(nn.ModuleDict({"projection": nn.Linear(8, 8), "backbone": resnet50()})))[0]
    assert (best.reference, best.exact, best.prefix, best.others) == ("torchvision:resnet50", True, "backbone.", 2)


def test_models_that_fit_alike(named) -> None:
    found = identify(named(resnet18()))
    assert [a.reference for a in found[:2]] == ["torchvision:resnet18", "torchvision:quantized_resnet18"]
    assert all(a.exact for a in found)


def test_without_the_head(named) -> None:
    model = resnet18()
    model.fc = nn.Identity()
    for prefix in ("", "encoder."):
        best = identify(named(model, prefixed(prefix)))[0]
        assert (best.reference, best.exact, best.differs, best.prefix) == (
            "torchvision:resnet18", False, "no head", prefix,
        )  # fmt: skip
        assert best.similarity == 100 / 102
        assert best.label.startswith("torchvision resnet18, without its head")


def test_with_another_head(named) -> None:
    model = resnet18()
    model.fc = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 3))
    best = identify(named(model))[0]
    assert (best.reference, best.exact, best.differs) == ("torchvision:resnet18", False, "another head")
    assert best.similarity == 100 / 106
    assert best.label == "torchvision resnet18, with another head"


def test_with_another_head_in_the_place_of_the_module_the_head_is_in(named) -> None:
    model = mobilenet_v2()
    model.classifier = nn.Sequential(nn.Linear(1280, 64), nn.ReLU(), nn.Linear(64, 3))
    best = identify(named(model, prefixed("net.")))[0]
    assert (best.reference, best.differs, best.prefix) == ("torchvision:mobilenet_v2", "another head", "net.")


def test_with_other_shapes(named) -> None:
    found = identify(named(mobilenet_v2(width_mult=0.25)))
    assert (found[0].reference, found[0].exact, found[0].differs) == ("torchvision:mobilenet_v2", False, "other shapes")
    gray = resnet18()
    gray.conv1 = nn.Conv2d(1, 64, 7, bias=False)
    best = identify(named(gray))[0]  # timm's model takes an argument for that
    assert (best.reference, best.args, best.exact) == ("timm:resnet18", {"in_chans": 1}, True)
    assert best.label == "timm resnet18, in_chans 3 → 1"
    gray.layer1[0].conv2 = nn.Conv2d(3, 3, 3, bias=False)
    best = identify(named(gray))[0]
    assert (best.reference, best.exact, best.differs) == ("torchvision:resnet18", False, "other shapes")


def test_the_closest(named) -> None:
    found = identify(named(ResNet(BasicBlock, [3, 3, 3, 3])))
    assert {"torchvision:resnet18", "torchvision:resnet34"} <= {a.reference for a in found}
    assert not any(a.exact or a.differs for a in found)
    likeness = [a.similarity for a in found]
    assert likeness == sorted(likeness, reverse=True)
    assert 0.3 <= likeness[-1] <= likeness[0] < 1


@pytest.mark.parametrize(("drop", "least", "most"), [("layer4.2.", 0.85, 0.99), ("layer3.", 0.45, 0.85)])
def test_similarity_is_the_share_in_common(drop: str, least: float, most: float, named) -> None:
    shapes = {n: tuple(t.shape) for n, t in resnet34().state_dict().items() if not n.startswith(drop)}
    best = identify(named(shapes))[0]
    assert best.reference == "torchvision:resnet34"
    assert least <= best.similarity <= most


def test_a_part_of_a_model(named) -> None:
    best = identify(named(vgg16().features, prefixed("features.")))[0]
    assert best.reference == "torchvision:vgg16"
    assert not best.exact


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)]),
        lambda: nn.Transformer(d_model=48, nhead=4, batch_first=True),
        lambda: nn.LSTM(8, 8, num_layers=6),
        lambda: nn.Linear(8, 8),
    ],
)
def test_nothing_is_said_of_strangers(model, named) -> None:
    assert identify(named(model())) == ()


def test_the_bounds_hold_the_index() -> None:
    for library in LIBRARIES:
        tensors = [row.tensors for row in load(library).rows()]
        assert min(tensors) >= _MIN_TENSORS
        assert max(tensors) * 2 <= _MAX_TENSORS


def test_the_document_and_the_text_say_it(command, save) -> None:
    with torch.device("cpu"):
        path = save(mobilenet_v2(num_classes=3).state_dict())
    (file,) = json.loads(command("inspect", "--json", path).out)["files"]
    best = file["architecture"][0]
    assert (best["reference"], best["args"], best["exact"]) == ("torchvision:mobilenet_v2", {"num_classes": 3}, True)
    line = "torchvision mobilenet_v2, head 1000 → 3 (fits equally well: torchvision quantized_mobilenet_v2"
    assert f"looks like: {line}" in command("inspect", path).out
    assert (
        "- **looks like**: torchvision mobilenet\\_v2, head 1000 → 3"
        in command("inspect", "--format", "markdown", path).out
    )


def test_the_text_says_what_is_closest(command, save) -> None:
    with torch.device("cpu"):
        state = {n: t for n, t in mobilenet_v2().state_dict().items() if not n.startswith("features.17.")}
        path = save(state)
    output = command("inspect", path).out
    assert "closest: torchvision mobilenet_v2 (9" in output
    assert "% alike)" in output
    assert "looks like" not in output


def test_the_fixture_of_the_training_run_is_a_small_mobilenet(command, ddp_resume: Path) -> None:
    assert "looks like: torchvision mobilenet_v2, with other shapes" in command("inspect", ddp_resume).out


# Files of strangers.


def test_many_tensors_are_not_looked_at(named) -> None:
    shapes = {f"layer.{number}.weight": (4, 4) for number in range(100_000)}
    assert identify(named(shapes)) == ()


def test_long_names_are_not_looked_at(named) -> None:
    assert identify(named({f"{number}.{'x' * _MAX_CHARACTERS}": (1,) for number in range(_MIN_TENSORS)})) == ()


@pytest.mark.parametrize("size", [0, 1, (1 << 31) + 1, 10**400])
def test_sizes_no_model_has(size: int, named) -> None:
    shapes = {n: tuple(t.shape) for n, t in resnet18().state_dict().items()}
    shapes["fc.weight"], shapes["fc.bias"] = (size, 512), (size,)
    best = identify(named(shapes))[0]
    assert (best.exact, best.args) == ((True, {"num_classes": 1}) if size == 1 else (False, {}))


def test_dimensions_no_model_has(named) -> None:
    shapes = {n: tuple(t.shape) for n, t in resnet18().state_dict().items()}
    for shape in ((), (1,) * 64):
        found = identify(named({**shapes, "fc.weight": shape}))
        assert found
        assert not any(a.exact for a in found)


def test_numbers_that_do_not_agree(named) -> None:
    shapes = {n: tuple(t.shape) for n, t in resnet18().state_dict().items()}
    best = identify(named({**shapes, "fc.weight": (10, 512), "fc.bias": (11,)}))[0]
    assert (best.reference, best.exact) == ("torchvision:resnet18", False)


@pytest.mark.parametrize("name", ["\udcff\ud800", "a\nb", "", ".", "..." * 1000, "\0", 'x"}', "module.", "é" * 50])
def test_names_no_model_has(name: str, named) -> None:
    shapes = {n: tuple(t.shape) for n, t in resnet18().state_dict().items()}
    assert not any(a.exact for a in identify(named({**shapes, name: (1,)})))
    assert identify(named({f"{name}.{number}": (number,) for number in range(99)})) == ()


def test_a_hostile_prefix_is_printed_harmlessly(command, save) -> None:
    with torch.device("cpu"):
        state = mobilenet_v2().state_dict()
    output = command("inspect", save({f"\x1b[31m.{name}": tensor for name, tensor in state.items()})).out
    assert "looks like: torchvision mobilenet_v2, under" in output
    assert "\x1b" not in output


def test_the_text_says_what_is_beside_and_what_fits_alike(command, save) -> None:
    with torch.device("cpu"):
        path = save(nn.ModuleDict({"net": mobilenet_v2(num_classes=2), "extra": nn.Linear(2, 2)}).state_dict())
    (line,) = (line for line in command("inspect", path).out.splitlines() if line.startswith("looks like: "))
    assert line.startswith("looks like: torchvision mobilenet_v2, head 1000 → 2, under 'net.' (fits equally well: ")
    assert "torchvision quantized_mobilenet_v2" in line
    assert line.endswith("; 2 other tensors beside it")
