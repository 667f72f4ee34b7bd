"""Several devices: both are run and compared.  Where there is one alone, it stands in for the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import verifier
from ckptkit.report import Report
from ckptkit.verifier.context import pick_devices
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references import factory

CPU = torch.device("cpu")


class Net(nn.Module):
    """Adds ``drift`` to what one layer gives on each call after the first three."""

    drift = 0.0
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.shift = nn.Identity()
        self.last = nn.Linear(5, 2)
        type(self).calls = 0
        self.shift.register_forward_hook(self._drift)

    def _drift(self, _module: object, _args: object, output: torch.Tensor) -> torch.Tensor | None:
        type(self).calls += 1
        return output + self.drift if self.calls > 2 and self.drift else None

    def forward(self, x: Any) -> torch.Tensor:
        return self.last(self.shift(self.first(x if isinstance(x, torch.Tensor) else torch.stack(x))))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, save: Any) -> Any:
    """``two(drift)`` verifies on two devices, the second run of which is off by so much."""
    monkeypatch.setattr(verifier, "pick_devices", lambda names: (CPU,) * len(names.split(",")))

    def check(drift: float, device: str = "cpu,cuda", **options: Any) -> Report:
        monkeypatch.setattr(Net, "drift", drift)
        torch.manual_seed(0)
        given = {"model": Net, "input_shapes": [(1, 3)], "device": device, **options}
        return ckptkit.verify(save(Net().state_dict()), **given)

    return check


def codes(report: Report) -> list[tuple[str, str]]:
    return [(f.severity, f.code) for f in report.findings if f.code not in ("fit-coverage", "forward-ok")]


def figures(report: Report) -> Any:
    [check] = [c for c in report.details["checks"] if c["name"] == "devices"]
    return check["figures"]


def test_devices_that_agree(two: Any) -> None:
    report = two(0.0)
    assert codes(report) == [("info", "device-equal")]
    assert report.details["devices"] == ["cpu", "cpu"]
    [line] = figures(report)
    assert line["device"] == "cpu" and line["seconds"] >= 0 and line["calls_compared"] == 3


def test_devices_that_round_differently(two: Any) -> None:
    report = two(1e-6)
    assert codes(report) == [("info", "device-close")]
    assert figures(report)[0]["first_different_module"] == "shift"
    assert codes(two(1e-6, atol=0.0, rtol=0.0)) == [("error", "device-differs")]


def test_devices_that_differ(two: Any) -> None:
    report = two(0.5)
    assert codes(report) == [("error", "device-differs")]
    [finding] = [f for f in report.findings if f.code == "device-differs"]
    assert "they diverge at `shift`" in finding.message
    assert not report.ok


def test_small_outputs_that_differ(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: forward(self, x) * 1e-10)
    assert codes(two(1e-6)) == [("info", "device-close")]
    assert codes(two(0.05)) == [("error", "device-differs")]
    assert codes(two(0.05, atol=1e-9)) == [("info", "device-close")]


def test_three_devices(two: Any) -> None:
    assert codes(two(0.0, "cpu,cuda,mps")) == [("info", "device-equal")] * 2


def test_one_device_compares_nothing(two: Any) -> None:
    report = two(0.5, "cpu")
    assert codes(report) == [] and figures(report) is None


def test_a_device_that_fails(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(self: Net, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise NotImplementedError("no kernel of that name")
        return self.last(self.first(x))

    monkeypatch.setattr(Net, "forward", fail)
    report = two(0.0)
    assert codes(report) == [("error", "forward-failed")]
    assert "but did not fail on cpu: NotImplementedError: no kernel" in report.findings[-1].message


def test_a_detectors_choice_of_boxes_is_a_warning(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = factory.Reference.__init__

    def documented(self: Any, **fields: Any) -> None:
        original(self, **{**fields, "inputs": (Input(shape=(3,), is_list=True),)})

    monkeypatch.setattr(factory.Reference, "__init__", documented)
    report = two(0.5, input_shapes=[])
    assert ("warning", "device-differs") in codes(report) and report.ok


def test_absent_devices_are_told_before_any_work(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built: list[int] = []
    path = save(Net().state_dict())
    for device, message in (
        ("cpu,cuda", "'cuda' is not available"),
        ("cpu,cpu", "names a device twice"),
        ("cpu,", "'' is not a device"),
        ("cpu,tpu", "'tpu' is not a device"),
    ):
        with pytest.raises(ckptkit.VerifyError, match=message):
            ckptkit.verify(path, model=lambda: built.append(1), device=device, input_shapes=[(1, 3)])
    assert not built


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device) for device in pick_devices("cpu, cuda:1,cuda")] == ["cpu", "cuda:1", "cuda"]
    with pytest.raises(ckptkit.VerifyError, match="names a device twice"):
        pick_devices("cuda,cuda:0")
