"""The weights check: each finding has a checkpoint that provokes it, and one that just does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.generated_tensors import STORABLE
from torch import nn

import ckptkit
from ckptkit.report import Report

Run = Callable[..., Report]


class Net(nn.Module):
    """A convolution, a BatchNorm with its buffers, a mask, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("mask", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture
def run(save: Any) -> Run:
    """``run(change)``: a sound net's weights, changed, saved and verified."""

    def check(change: Callable[[dict[str, torch.Tensor]], object], **options: Any) -> Report:
        torch.manual_seed(0)
        weights = {name: value.clone() for name, value in Net().state_dict().items()}
        change(weights)
        given = {"model": Net, "device": "cpu", "input_shapes": [(1, 3, 4, 4)], **options}
        return ckptkit.verify(save(weights), **given)

    return check


def put(name: str, index: object, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights[name].__setitem__(index, value)


def codes(report: Report) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings if f.code not in ("fit-coverage", "forward-ok")}


def message(report: Report, code: str) -> str:
    [found] = [f.message for f in report.findings if f.code == code]
    return found


def test_sound_weights_are_passed_without_a_word(run: Run) -> None:
    report = run(lambda weights: None)
    assert report.ok and codes(report) == {}
    [check] = [c for c in report.details["checks"] if c["name"] == "weights"]
    assert check["run"] and check["severity"] is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_no_number(run: Run, value: float) -> None:
    report = run(put("conv.weight", (1, 2, 0, 0), value))
    assert codes(report)["weights-not-finite"] == "error"
    counted = "1 NaN, 0 Inf" if value != value else "0 NaN, 1 Inf"
    assert f"conv.weight ({counted} of 12)" in message(report, "weights-not-finite")
    assert codes(run(put("conv.weight", (1, 2, 0, 0), 3e38))).get("weights-not-finite") is None


def test_sums_that_overflow_are_not_taken_for_infinities(run: Run) -> None:
    report = run(put("head.bias", slice(None), 3e38), forward=False)
    assert report.ok and codes(report) == {}


def test_an_infinite_buffer_is_a_mask_and_a_nan_in_it_is_none(run: Run) -> None:
    report = run(put("mask", 0, -torch.inf))
    assert report.ok and codes(report) == {"infinite-buffer": "info"}
    assert codes(run(put("mask", 0, torch.nan))) == {"weights-not-finite": "error"}


def test_every_matrix_zero(run: Run) -> None:
    def blank(weights: dict[str, torch.Tensor]) -> None:
        weights["conv.weight"].zero_()
        weights["head.weight"].zero_()

    report = run(blank)
    assert not report.ok and codes(report)["weights-all-zero"] == "error"
    assert "conv.weight, head.weight" in message(report, "weights-all-zero")

    def all_but_one_element(weights: dict[str, torch.Tensor]) -> None:
        blank(weights)
        weights["conv.weight"][0, 0, 0, 0] = 1e-3

    report = run(all_but_one_element)
    assert report.ok and codes(report)["zero-weights"] == "warning"
    assert "1 of 2 parameters" in message(report, "zero-weights")
    assert "head.weight" in message(report, "zero-weights")


def test_zeros_that_cancel_out_are_not_zero(run: Run) -> None:
    def opposite(weights: dict[str, torch.Tensor]) -> None:
        weights["head.weight"].copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2))

    assert codes(run(opposite)) == {}


def test_biases_may_be_zero(run: Run) -> None:
    assert codes(run(put("head.bias", slice(None), 0.0))) == {}


def test_running_variances(run: Run) -> None:
    report = run(put("norm.running_var", 2, -1e-3))
    assert not report.ok and codes(report)["negative-variance"] == "error"
    assert "norm.running_var (1 of 4, the least -0.001)" in message(report, "negative-variance")
    report = run(put("norm.running_var", 2, 0.0))
    assert report.ok and codes(report) == {"zero-variance": "warning"}
    assert codes(run(put("norm.running_var", 2, 1e-30))) == {}


def test_what_is_allowed_to_be_missing_is_not_looked_at(run: Run) -> None:
    """It is the reference's own, not the checkpoint's."""

    class Blank(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.head.weight)

    report = run(lambda weights: weights.pop("head.weight"), model=Blank, allow_missing=["head.weight"])
    assert "zero-weights" not in codes(report)


@pytest.mark.parametrize(
    "name", [name for name in ("float16", "bfloat16", "float64", "float8_e4m3fn") if name in STORABLE]
)
def test_other_types(save: Any, name: str) -> None:
    dtype = getattr(torch, name)

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)

    def check(value: float) -> dict[str, str]:
        weight = torch.ones(3, 3).to(dtype)
        weight[1, 1] = value
        return codes(ckptkit.verify(save({"weight": weight}), model=Only, forward=False, device="cpu"))

    assert check(torch.nan) == {"weights-not-finite": "error"}
    assert check(2.0) == {}


def test_a_model_without_matrices(save: Any) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale

    report = ckptkit.verify(save({"scale": torch.zeros(3)}), model=Scale, input_shapes=[(1, 3)], device="cpu")
    assert report.ok and codes(report) == {}
