"""Two checkpoints of one model: equal, close or different outputs, and where they part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptkit
from ckptkit.report import Finding, Report
from ckptkit.verifier.outputs import TOLERANCES, OutputTolerance, compared, tolerance_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        return {"logits": self.last(hidden), "hidden": hidden}


Weights = dict[str, torch.Tensor]
Verify = Callable[..., Report]


def weights(seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in Net().state_dict().items()}


@pytest.fixture
def verify(save: Any, tmp_path: Path) -> Verify:
    """``verify(ours, theirs, name)`` saves both and verifies the first against the second."""

    def check(ours: Weights, theirs: Weights, name: str = "other.safetensors", **options: Any) -> Report:
        other = tmp_path / name
        save_file(theirs, other) if name.endswith(".safetensors") else torch.save(theirs, other)
        given = {"model": Net, "input_shapes": [(1, 8)], "device": "cpu", **options}
        return ckptkit.verify(save(ours), against=other, **given)

    return check


def found(report: Report, code: str) -> Finding:
    [finding] = [f for f in report.findings if f.code == code]
    return finding


def figures(report: Report, check: str = "against") -> dict[str, Any]:
    [line] = [c for c in report.details["checks"] if c["name"] == check]
    return line["figures"]


@pytest.mark.parametrize("name", ["other.safetensors", "other.pth"])
def test_the_same_weights_in_any_container(verify: Verify, name: str) -> None:
    report = verify(weights(), weights(), name)
    assert report.ok and found(report, "against-equal").severity == "info"
    assert figures(report)["first_different_module"] is None
    assert figures(report)["calls_compared"] == 3
    assert all(output["equal"] for output in figures(report)["outputs"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", ["ours", "theirs", "both"])
def test_either_prefix(verify: Verify, prefix: str, wrapped: str) -> None:
    sides = []
    for side in ("ours", "theirs"):
        taken = prefix if wrapped in (side, "both") else ""
        sides.append({taken + name: value for name, value in weights().items()})
    report = verify(*sides)
    assert report.ok and found(report, "against-equal")
    told = [f for f in report.findings if f.code == "against-unwrapped"]
    assert len(told) == (2 if wrapped == "both" else 1)
    assert {f.severity for f in told} == {"info"}


def test_other_weights_and_where_they_part(verify: Verify) -> None:
    theirs = weights()
    theirs["second.bias"] += 0.5
    report = verify(weights(), theirs)
    assert not report.ok
    finding = found(report, "against-differs")
    assert finding.severity == "error" and "they diverge at `second`" in finding.message
    assert figures(report)["first_different_module"] == figures(report)["first_parting_module"] == "second"
    logits, hidden = figures(report)["outputs"]
    assert (logits["path"], hidden["path"]) == ("logits", "hidden")
    assert not logits["close"] and logits["max_abs"] > 0 and logits["max_rel"] > 0
    assert report.details["outputs"][0]["path"] == "logits"


def test_the_differences_are_those_of_the_outputs(verify: Verify) -> None:
    theirs = weights()
    theirs["last.bias"] += torch.tensor([0.0, 0.25, 0.0, 0.0])
    report = verify(weights(), theirs)
    logits, hidden = figures(report)["outputs"]
    assert hidden["equal"] and logits["max_abs"] == pytest.approx(0.25, rel=1e-5)
    x = torch.rand((1, 8), generator=torch.Generator().manual_seed(0))
    model = Net()
    results = []
    for state in (weights(), theirs):
        model.load_state_dict(state)
        results.append(model(x)["logits"].detach())
    scale = max(float(result.abs().max()) for result in results)
    assert logits["max_rel"] == pytest.approx(0.25 / scale, rel=1e-5)


def test_close_within_the_tolerance_and_not_beyond(verify: Verify) -> None:
    theirs = weights()
    theirs["first.weight"] *= 1 + 1e-6
    report = verify(weights(), theirs)
    assert report.ok and found(report, "against-close").severity == "info"
    assert "the first module that is not bit-equal is `first`" in found(report, "against-close").message
    assert figures(report)["first_parting_module"] is None
    assert found(verify(weights(), theirs, rtol=0.0, atol=0.0), "against-differs")
    theirs["first.weight"] *= 1.1
    assert found(verify(weights(), theirs), "against-differs")
    assert found(verify(weights(), theirs, rtol=1.0), "against-close")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_less_precise_side_decides_the_tolerance(verify: Verify, dtype: torch.dtype) -> None:
    theirs = {name: value.to(dtype) for name, value in weights().items()}
    report = verify(weights(), theirs)
    assert report.ok and found(report, "against-close")
    expected = TOLERANCES[str(dtype).removeprefix("torch.")]
    assert figures(report)["tolerance"] == expected.to_dict()
    # What was computed from float32 weights alone is still held to float32.
    assert figures(report, "behaviour")["tolerance"] == TOLERANCES["float32"].to_dict()


def test_a_checkpoint_that_does_not_fit(verify: Verify) -> None:
    theirs = weights()
    del theirs["last.bias"]
    report = verify(weights(), theirs)
    assert not report.ok
    assert "last.bias" in found(report, "against-not-loaded").message
    # Allowed to be missing, it is the reference's own, never what the first checkpoint left.
    ours = weights()
    ours["last.bias"] = torch.full((4,), 9.0)
    report = verify(ours, theirs, allow_missing=["last.bias"])
    logits, _ = figures(report)["outputs"]
    assert 8 < logits["max_abs"] < 10


def test_weights_that_are_no_numbers_on_the_other_side(verify: Verify) -> None:
    theirs = weights()
    theirs["last.bias"][1] = torch.nan
    report = verify(weights(), theirs)
    assert found(report, "against-differs") and figures(report)["outputs"][0]["max_abs"] is None
    assert "null" in report.to_json() and "NaN" not in report.to_json() and "Infinity" not in report.to_json()


def test_an_unreadable_other_is_told_before_any_work(save: Any, tmp_path: Path) -> None:
    built: list[int] = []
    options = {"model": lambda: built.append(1), "input_shapes": [(1, 8)]}
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ckptkit.FormatError):
        ckptkit.verify(save(weights()), against=tmp_path / "bad.pth", **options)
    with pytest.raises(ckptkit.SectionError, match="to compare with"):
        ckptkit.verify(save(weights()), against=save({"epoch": 1}, "no.pth"), **options)
    with pytest.raises(ckptkit.VerifyError, match="with --no-forward nothing is computed"):
        ckptkit.verify(save(weights()), against=save(weights(), "b.pth"), forward=False, **options)
    assert not built


def test_small_outputs_are_held_to_their_own_size(verify: Verify) -> None:
    ours = {name: value * 1e-4 for name, value in weights().items()}
    assert verify(ours, ours).ok
    report = verify(ours, {**ours, "last.bias": ours["last.bias"] * 0.95})
    assert found(report, "against-differs")
    logits = figures(report)["outputs"][0]
    assert 0 < logits["allowed"] < logits["max_abs"] < 1e-5
    assert verify(ours, {**ours, "last.bias": ours["last.bias"] * (1 + 1e-6)}).ok


def test_comparing_tensors() -> None:
    tight = OutputTolerance(atol=0.0, rtol=1e-3)
    a = torch.tensor([1.0, 100.0])
    near = compared("", a, a + torch.tensor([0.05, 0.0]), tight)
    assert near.is_close and not near.is_equal  # a twentieth of a small element, judged by the largest one
    assert not compared("", a, a + torch.tensor([0.2, 0.0]), tight).is_close
    assert compared("", a, a.double(), tight).is_close and not compared("", a, a.double(), tight).is_equal
    masked = torch.tensor([1.0, torch.finfo(torch.float32).min])
    assert not compared("", masked, masked * torch.tensor([1.05, 1.0]), tight).is_close  # no scale for the others
    assert "shape 2 against 1" in str(compared("", a, a[:1], tight))
    nan = torch.tensor([torch.nan, torch.inf])
    assert compared("", nan, nan.clone(), tight).is_equal
    assert compared("", nan, nan.double(), tight).is_close
    assert not compared("", nan, a, tight).is_close
    whole = torch.tensor([1000, 2000])
    assert compared("", whole, whole.int(), tight).is_close and not compared("", whole, whole + 1, tight).is_close
    assert compared("", torch.tensor([True]), torch.tensor([True]), tight).is_equal
    assert not compared("", torch.tensor([0.0]), torch.tensor([-0.0]), tight).is_equal
    assert compared("", torch.tensor([1 + 1j]), torch.tensor([1 + 1.0001j]), tight).is_close


def test_tolerances_by_dtype() -> None:
    for name, tolerance in TOLERANCES.items():
        eps = torch.finfo(getattr(torch, name)).eps
        assert tolerance.atol == 0 and eps**0.5 <= tolerance.rtol < eps**0.5 * 1.05
    assert tolerance_of(["float64", "int64"]) == TOLERANCES["float64"]
    assert tolerance_of(["float32", "float16", "float64"]) == TOLERANCES["float16"]
    assert tolerance_of(["float8_e4m3fn", "float32"]) == tolerance_of(["bfloat16"]) == TOLERANCES["bfloat16"]
    assert tolerance_of(["complex64"]) == tolerance_of([]) == TOLERANCES["float32"]
    assert tolerance_of(["float32"], rtol=0.5) == OutputTolerance(atol=0.0, rtol=0.5)
    assert tolerance_of(["float32"], atol=0.0, rtol=0.0).bound(100) == 0
