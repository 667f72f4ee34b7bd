"""The forward check: what an output may look like, and what can fail."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import ckptkit
from ckptkit.errors import VerifyError
from ckptkit.formats import read
from ckptkit.options import VerifyOptions
from ckptkit.report import Report
from ckptkit.verifier import CHECKS, verify

Run = Callable[..., Report]


@pytest.fixture
def run(save: Any) -> Run:
    """``run(obj, model=..., ...)`` saves with torch and verifies."""

    def check(obj: object, **options: Any) -> Report:
        checkpoint, file = read(save(obj))
        try:
            return verify(checkpoint, VerifyOptions(**{"device": "cpu", **options}))
        finally:
            file.close()

    return check


def finding(report: Report, code: str) -> Any:
    [found] = [f for f in report.findings if f.code == code]
    return found


class Layer(nn.Module):
    """One linear layer whose output a function dresses up."""

    def __init__(self, dress: Callable[[torch.Tensor], object] = lambda x: x) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dress = dress

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.dress(self.linear(sum(inputs)))


def dressed(run: Run, dress: Callable[[torch.Tensor], object], **options: Any) -> Report:
    return run(Layer().state_dict(), **{"model": lambda: Layer(dress), "input_shapes": [(1, 3)], **options})


def test_the_details_are_json(run: Run) -> None:
    weights = torchvision.models.squeezenet1_1().state_dict()
    document = json.loads(run(weights, model="torchvision:squeezenet1_1").to_json())
    assert document["ok"] is True
    assert Path(document["path"]).name == "model.pth"
    assert document["reference"] == "torchvision:squeezenet1_1"
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    [output] = document["outputs"]
    assert (output["path"], output["shape"], output["dtype"], output["finite"]) == ("", [1, 1000], "float32", True)
    assert output["min"] <= output["mean"] <= output["max"]
    assert set(document["seconds"]) == {"build", "load", "forward"}
    assert document["peak_memory_nbytes"] > 1 << 20
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "ckptkit": ckptkit.__version__}
    assert document["versions"].items() >= versions.items()
    assert [check["name"] for check in document["checks"] if check["run"]] == [
        "fit", "load", "weights", "forward", "behaviour"
    ]  # fmt: skip
    assert [step["name"] for step in document["steps"]][:3] == ["build", "fit", "load"]
    assert all(step["seconds"] >= 0 and step["peak_memory_nbytes"] > 1 << 20 for step in document["steps"])
    assert document["passes"] == 2
    assert document["inputs"]["tensors"] == [{"name": None, "shape": [1, 3, 224, 224], "dtype": "float32"}]


def test_a_bare_batch_of_images_is_a_detectors_list(run: Run) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    weights = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=2).state_dict()
    options = {"model": f"torchvision:{name}", "model_args": {"num_classes": 2}}
    batch = run(weights, input_shapes=[(2, 3, 64, 64)], **options)
    assert {o["path"][0] for o in batch.details["outputs"]} == {"0", "1"}
    both = run(weights, input_shapes=[(3, 64, 64), (3, 48, 80)], **options)
    assert {o["path"][0] for o in both.details["outputs"]} == {"0", "1"}


def test_the_models_own_weights_are_used(run: Run) -> None:
    """The output is the checkpoint's, on the documented input, in eval mode."""
    seen: list[torch.Tensor] = []

    class Watched(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            seen.append(self.drop(self.linear(x)))
            return seen[-1]

    weights = Layer().state_dict()
    for seed in (0, 0, 5):
        assert run(weights, model=Watched, input_shapes=[(4, 3)], seed=seed).ok
    # Each run is two passes: the documented batch, and its first row alone.
    (first, output, row, _), (again, *_), (other, *_) = seen[:4], seen[4:8], seen[8:]
    assert torch.equal(row, first[:1])
    assert torch.equal(first, torch.rand((4, 3), generator=torch.Generator().manual_seed(0)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not output.requires_grad
    expected = nn.functional.linear(first, weights["linear.weight"], weights["linear.bias"])
    assert torch.equal(output, expected)


def test_what_a_factory_draws_is_seeded(run: Run) -> None:
    built: list[Layer] = []

    def make() -> Layer:
        built.append(Layer())
        return built[-1]

    drawn = []
    for seed in (3, 3, 4):
        weights = {"linear.weight": torch.ones(2, 3)}
        assert run(weights, model=make, allow_missing=["*.bias"], input_shapes=[(1, 3)], seed=seed).ok
        drawn.append(built[-1].linear.bias)
    first, second, third = drawn
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_several_inputs(run: Run) -> None:
    report = dressed(run, lambda x: x, input_shapes=[(2, 3), (2, 3)])
    assert "with input 2x3 and 2x3 of float32: 2x2 float32" in finding(report, "forward-ok").message


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()
    loss: None = None


@pytest.mark.parametrize(
    ("dress", "paths"),
    [
        (lambda x: x, [""]),
        (lambda x: x.sum(), [""]),
        (lambda x: (x, [x, {"a": x}]), ["0", "1.0", "1.1.a"]),
        (lambda x: Pair(x, None), ["first"]),
        (lambda x: Output(x, (x,)), ["logits", "hidden.0"]),
        (lambda x: {"n": 3, 1: x.argmax()}, ["1"]),
    ],
)
def test_outputs_of_every_structure(run: Run, dress: Any, paths: list[str]) -> None:
    report = dressed(run, dress)
    assert report.ok
    assert [o["path"] for o in report.details["outputs"]] == paths


def test_outputs_that_are_no_numbers(run: Run) -> None:
    report = dressed(run, lambda x: {"good": x, "bad": torch.tensor([1, torch.nan, torch.inf, -torch.inf])})
    assert not report.ok
    found = finding(report, "output-not-finite")
    assert found.severity == "error" and "bad (1 NaN, 2 Inf of 4)" in found.message and "good" not in found.message
    assert [o["finite"] for o in report.details["outputs"]] == [True, False]


def test_weights_that_overflow(run: Run) -> None:
    weights = {"linear.weight": torch.full((2, 3), 3e38), "linear.bias": torch.zeros(2)}
    report = run(weights, model=Layer, input_shapes=[(1, 3)])
    assert [f.code for f in report.findings] == ["fit-coverage", "output-not-finite"]


def test_nothing_that_could_be_checked(run: Run) -> None:
    report = dressed(run, lambda x: {"n": 3})
    assert not report.ok
    assert "returned dict without a tensor; nothing was checked" in finding(report, "no-output").message
    report = dressed(run, lambda x: [x[:0]])
    assert finding(report, "empty-output").severity == "warning"


def test_a_forward_that_fails(run: Run) -> None:
    report = run(Layer().state_dict(), model=Layer, input_shapes=[(1, 4)])
    assert not report.ok
    found = finding(report, "forward-failed")
    assert "with input 1x4 of float32 failed: RuntimeError: " in found.message
    assert "shapes cannot be multiplied" in found.message
    assert report.details["outputs"] == []
    weights = torchvision.models.squeezenet1_1().state_dict()
    options = {"model": "torchvision:squeezenet1_1", "input_shapes": [(1, 3, 2, 2)]}
    assert finding(run(weights, **options), "forward-failed").severity == "error"


def test_no_forward(run: Run) -> None:
    report = run(Layer().state_dict(), model=Layer, forward=False)
    assert report.ok and [f.code for f in report.findings] == ["fit-coverage"]
    assert "forward" not in report.details["seconds"]


def test_no_forward_with_weights_that_do_not_fit(run: Run) -> None:
    calls: list[object] = []
    report = run({"linear.weight": torch.ones(2, 3)}, model=lambda: Layer(calls.append), input_shapes=[(1, 3)])
    assert not report.ok and not calls
    assert report.findings[-1].code == "not-loaded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is unknown; give --input-shape 1,3,224,224 .* or --no-forward"),
        ({"input_shapes": [(1, 0)]}, "expected sizes of at least 1"),
        ({"input_shapes": [()]}, r"\(\) is not a shape"),
        ({"device": "cuda:64"}, "'cuda:64' is not available: torch sees 0 CUDA devices; use --device cpu"),
        ({"device": "cuda"}, "is not available"),
        ({"device": "mps"}, "is not available"),
        ({"device": "meta"}, "is not a device for verify"),
        ({"device": "gpu"}, "is not a device location; did you mean 'cuda'"),
        ({"device": "cpu:x"}, "is not a device location"),
        ({"dtype": "float31"}, "cannot be cast: unknown dtype 'float31'"),
        ({"dtype": "int8"}, "cannot be cast to int8: expected a floating-point type"),
    ],
)
def test_checks_that_cannot_be_run(
    run: Run, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(VerifyError, match=message):
        run(Layer().state_dict(), model=Layer, **options)


def test_auto_takes_what_is_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptkit.verifier.context import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(pick_device("auto")) == "cuda"
    assert str(pick_device("cuda:1")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(pick_device("auto")) == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert dressed(run, lambda x: x, device="auto").details["device"] == "cpu"


def test_another_dtype(run: Run) -> None:
    report = dressed(run, lambda x: x, dtype="bfloat16")
    assert report.details["dtype"] == "bfloat16"
    assert report.details["outputs"][0]["dtype"] == "bfloat16"
    report = run(Layer().double().state_dict(), model=lambda: Layer().double(), input_shapes=[(1, 3)])
    assert report.details["dtype"] == report.details["outputs"][0]["dtype"] == "float64"


def test_checks_are_one_visible_tuple() -> None:
    names = ["fit", "load", "weights", "forward", "behaviour", "devices", "golden", "against"]
    assert [check.__name__ for check in CHECKS] == [f"check_{name}" for name in names]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("rest", [torch.bfloat16, torch.float32, None])
def test_weights_of_eight_bits_take_inputs_of_more(save: Any, dtype: str, rest: torch.dtype | None) -> None:
    """The type to compute in is that of the first tensor that a layer can compute with."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.rand(4, 3).to(getattr(torch, dtype))
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.register_buffer("scale", None if rest is None else torch.tensor(0.5, dtype=rest))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == (rest or torch.float32)
            return x @ self.weight.to(x.dtype).T * (1 if self.scale is None else self.scale)

    report = ckptkit.verify(save(Scaled().state_dict()), model=Scaled, input_shapes=[(1, 3)], device="cpu")
    assert report.ok, report.findings
    assert report.details["dtype"] == str(rest or torch.float32).removeprefix("torch.")
