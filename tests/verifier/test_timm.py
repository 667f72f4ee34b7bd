"""References of timm's: through a stand-in that knows two models, and, where timm is installed, its own.

``pytest -m needs_timm tests/verifier/test_timm.py`` runs the tests with timm itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.fitting import check_file
from torch import nn

from ckptkit.errors import MissingDependencyError, VerifyError
from ckptkit.verifier.references import build


class Net(nn.Module):
    """What the stand-in makes."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: object = 32) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(in_chans, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def create_model(model_name: str, pretrained: bool = False, drop_rate: float = 0.0, **kwargs: Any) -> nn.Module:
    assert not pretrained
    return Net(**kwargs)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    sizes = {"tiny": SimpleNamespace(input_size=(3, 32, 48)), "bare": None}
    vars(timm).update(
        create_model=create_model,
        is_model=lambda name: name.partition(".")[0] in sizes,
        list_models=lambda: list(sizes),
        get_pretrained_cfg=lambda name: sizes[name.partition(".")[0]],
    )
    monkeypatch.setitem(sys.modules, "timm", timm)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("tiny", {}, (1, 3, 32, 48)),
        ("tiny.a1_in1k", {}, (1, 3, 32, 48)),
        ("bare", {}, (1, 3, 224, 224)),
        ("tiny", {"in_chans": "1", "img_size": "64"}, (1, 1, 64, 64)),
        ("tiny", {"img_size": "(16, 24)"}, (1, 3, 16, 24)),
    ],
)
def test_a_model_by_name(name: str, args: dict[str, object], shape: tuple[int, ...]) -> None:
    model, reference = build(f"timm:{name}", args)
    assert isinstance(model, Net) and not model.training and model.stem.weight.is_meta
    assert [each.shape for each in reference.inputs] == [shape]
    assert reference.spec == f"timm:{name}"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("tinny", {}, "timm has no model 'tinny'; did you mean tiny?"),
        ("hf-hub:someone/tiny", {}, "timm has no model 'hf-hub:someone/tiny'"),
        ("tiny", {"pretrained": "true"}, "without pretrained weights; omit pretrained"),
        ("tiny", {"checkpoint_path": "a.pth"}, "omit checkpoint_path"),
        ("tiny", {"drop_rate": "much"}, "--model-arg drop_rate=much: expected float"),
        ("tiny", {"classes": "3"}, "unexpected keyword argument 'classes'"),
    ],
)
def test_what_goes_wrong(name: str, args: dict[str, object], message: str) -> None:
    if args.get("pretrained") == "true":
        args = {"pretrained": True}
    with pytest.raises(VerifyError, match=message):
        build(f"timm:{name}", args)


@pytest.mark.usefixtures("stand_in")
def test_a_checkpoint_of_one(save: Any) -> None:
    report = check_file(
        save(Net(num_classes=4).state_dict()), model="timm:tiny", model_args={"num_classes": "4"}, forward=True
    )
    assert report.ok and report.details["outputs"][0]["shape"] == [1, 4]
    report = check_file(save(Net(num_classes=4).state_dict()), model="timm:tiny")
    [found] = [f for f in report.findings if f.code == "shape-mismatch"]
    assert found.message.startswith("another head: `head` has 4 outputs in the checkpoint and 10 in the reference")
    assert found.fix.endswith("--model timm:tiny --model-arg num_classes=4")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingDependencyError, match=r"timm, which is not installed; .* pip install '\.\[timm\]'"
    ) as caught:
        build("timm:resnet18", {})
    assert caught.value.name == "timm"


@pytest.mark.needs_timm
@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224.augreg_in21k", "test_convnext", "test_efficientnet"]
)
def test_with_timm_itself(name: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=7).state_dict(), tmp_path / "model.pth")
    report = check_file(tmp_path / "model.pth", model=f"timm:{name}", model_args={"num_classes": "7"}, forward=True)
    assert report.ok and report.details["coverage"]["parameters_share"] == 1
    assert report.details["outputs"][0]["shape"] == [1, 7]
    assert next(build(f"timm:{name}", {})[0].parameters()).is_meta
