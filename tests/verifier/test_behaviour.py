"""The behaviour check: constant, random and batch-dependent outputs, and models that just are not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.report import Report
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references import factory

Run = Callable[..., Report]


class Layer(nn.Module):
    """One linear layer; a function makes the output of input and result."""

    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.last = forward

    def forward(self, x: torch.Tensor) -> object:
        return self.last(x, self.linear(x))


@pytest.fixture
def run(save: Any) -> Run:
    def check(forward: Callable[..., object], **options: Any) -> Report:
        torch.manual_seed(0)
        path = save(Layer(forward).state_dict())
        given = {"input_shapes": [(1, 3)], "device": "cpu", "model": lambda: Layer(forward), **options}
        return ckptkit.verify(path, **given)

    return check


def codes(report: Report) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings if f.code not in ("fit-coverage", "forward-ok")}


def message(report: Report, code: str) -> str:
    [found] = [f.message for f in report.findings if f.code == code]
    return found


@pytest.mark.parametrize("shape", [(1, 3), (4, 3)])
def test_a_sound_model_takes_two_passes(run: Run, shape: tuple[int, ...]) -> None:
    """The documented batch, and one of another size: alone where there were several, a pair where there was one."""
    sizes: list[int] = []

    def noted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[0])
        return y

    report = run(noted, input_shapes=[shape])
    assert codes(report) == {}
    assert report.details["passes"] == 2 and sizes == ([1, 2] if shape[0] == 1 else [4, 1])


def test_one_value_throughout(run: Run) -> None:
    report = run(lambda x, y: y * 0 + 0.25)
    assert codes(report) == {"constant-output": "error"}
    assert "has the same value: the output is 0.25" in message(report, "constant-output")
    for end in (0.0, 1.0):  # a ReLU, a sigmoid
        assert codes(run(lambda x, y, end=end: y * 0 + end)) == {"constant-output": "warning"}


def test_two_inputs_with_one_output(run: Run) -> None:
    report = run(lambda x, y: torch.tensor([[0.25, 0.5]]).expand(len(x), 2))
    assert codes(report) == {"constant-output": "warning"}
    assert "two different inputs give the same outputs" in message(report, "constant-output")
    # One output among several may well be so: anchors, positions.
    assert codes(run(lambda x, y: {"anchors": torch.ones(len(x), 4) / 3, "y": y})) == {}


def test_a_single_number_is_not_constant(run: Run) -> None:
    assert codes(run(lambda x, y: y[:, :1])) == {}


def test_a_head_of_zeros_explains_a_constant_output(save: Any) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    weights = Headed().state_dict()
    weights["head.weight"] = torch.zeros(2, 3)
    weights["head.bias"] = torch.full((2,), 0.5)
    report = ckptkit.verify(save(weights), model=Headed, input_shapes=[(1, 3)], device="cpu")
    assert codes(report) == {"zero-weights": "warning", "constant-output": "warning"}
    assert "head.weight is zero throughout" in message(report, "constant-output")


def test_random_numbers_in_eval_mode(run: Run) -> None:
    report = run(lambda x, y: nn.functional.dropout(y.repeat(1, 50), training=True))
    assert codes(report) == {"not-repeatable": "error"}
    assert report.details["passes"] == 3
    assert codes(run(lambda x, y: nn.functional.dropout(y.repeat(1, 50), training=False))) == {}
    # Within the tolerance it repeats itself.
    assert codes(run(lambda x, y: y + 1e-7 * torch.rand_like(y))) == {}
    assert codes(run(lambda x, y: y + 1e-7 * torch.rand_like(y), rtol=0.0, atol=0.0)) == {"not-repeatable": "error"}


def test_state_kept_between_calls(run: Run) -> None:
    calls: list[int] = []

    def counted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return y + len(calls)

    assert codes(run(counted)) == {"not-repeatable": "error"}


def test_results_that_depend_on_the_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def normalized(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y - y.mean(0) / 2

    report = run(normalized)
    assert codes(report) == {"batch-dependent": "warning"}
    assert "row 0 of" in message(report, "batch-dependent")
    assert codes(run(normalized, input_shapes=[(3, 3)])) == {"batch-dependent": "warning"}
    assert codes(run(lambda x, y: y - y.mean(1, keepdim=True) / 2)) == {}
    # Where the reference documents that the batch comes first, it is an error.
    original = factory.Reference.__init__

    def documented(self: Any, **fields: Any) -> None:
        original(self, **{**fields, "inputs": (Input(shape=(1, 3)),)})

    monkeypatch.setattr(factory.Reference, "__init__", documented)
    assert codes(run(normalized, input_shapes=[])) == {"batch-dependent": "error"}


def test_small_results_that_depend_on_the_batch(run: Run) -> None:
    assert codes(run(lambda x, y: (y - y.mean(0) / 2) * 1e-10)) == {"batch-dependent": "warning"}

    def cancelled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = y.repeat(1, 501) * 100
        parts = wide.flip(1) if len(x) > 1 else wide
        return parts.cumsum(1)[:, -1:] - wide.sum(1, keepdim=True)  # rounding alone

    assert codes(run(cancelled)) == {}


def test_a_fixed_batch(run: Run) -> None:
    def fixed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(1, 2)

    report = run(fixed)
    assert report.ok and codes(report) == {"fixed-batch": "info"}
    assert "RuntimeError" in message(report, "fixed-batch")
    assert report.details["passes"] == 2  # the one that failed is none


def test_outputs_without_rows(run: Run) -> None:
    report = run(lambda x, y: y.flatten()[:2].sum())
    assert report.ok and codes(report) == {"batch-not-compared": "info"}
    assert "no output has a row" in message(report, "batch-not-compared")


def test_inputs_that_are_no_batch(save: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * scale.sum()

    options = {"model": Two, "input_shapes": [(2, 3), (5,)], "device": "cpu"}
    report = ckptkit.verify(save(Two().state_dict()), **options)
    assert report.ok and codes(report) == {"batch-not-compared": "info"}


def test_the_documented_outputs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = factory.Reference.__init__
    outputs: dict[str, tuple[int | None, ...]] = {}

    def documented(self: Any, **fields: Any) -> None:
        original(self, **{**fields, "inputs": (Input(shape=(1, 3)),), "outputs": dict(outputs)})

    monkeypatch.setattr(factory.Reference, "__init__", documented)
    for expected, said in (
        ({"": (1, 2)}, None),
        ({"": (None, 2)}, None),
        ({"": (1, 3)}, "the output is 1x2, expected 1x3"),
        ({"": (1,)}, "the output is 1x2, expected 1"),
        ({"logits": (1, 2)}, "logits is missing, a tensor is unexpected"),
    ):
        outputs.clear()
        outputs.update(expected)
        report = run(lambda x, y: y, input_shapes=[])
        assert codes(report) == ({} if said is None else {"output-shape": "error"})
        assert said is None or said in message(report, "output-shape")
    assert codes(run(lambda x, y: y, input_shapes=[(2, 3)])) == {}  # other inputs than the documented ones
