"""Verifying without naming a model: its names and shapes tell which it is, or it is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from support.fitting import check_file, codes, finding, state
from torch import nn

from ckptkit.errors import VerifyError


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_known_model_is_verified(tmp_path: Any, ending: str) -> None:
    weights = torchvision.models.squeezenet1_1(num_classes=7).state_dict()
    path = tmp_path / f"model{ending}"
    torch.save(weights, path) if ending == ".pth" else save_file(weights, path)
    report = check_file(path, forward=True)
    assert report.ok
    assert codes(report)[:2] == [("info", "identified"), ("info", "fit-coverage")]
    message = "no model was named; its names and shapes are those of torchvision:squeezenet1_1 with num_classes=7"
    assert finding(report, "identified").message == message
    assert [output["shape"] for output in report.details["outputs"]] == [[1, 7]]


def test_arguments_are_passed_to_the_model_that_was_identified(save: Any) -> None:
    path = save(torchvision.models.squeezenet1_1(num_classes=7).state_dict())
    report = check_file(path, model_args={"dropout": "0.1"}, forward=True)
    assert report.ok
    assert "num_classes=7, dropout=0.1" in finding(report, "identified").message


def test_a_prefix_is_told_with_its_remedy(save: Any) -> None:
    weights = torchvision.models.squeezenet1_1().state_dict()
    path = save({f"model.{name}": value for name, value in weights.items()})
    with pytest.raises(VerifyError, match=r"looks like torchvision squeezenet1_1, under 'model\.'; .*--strip-prefix"):
        check_file(path)


def test_a_wrapper_is_told_with_its_remedy(save: Any) -> None:
    weights = torchvision.models.squeezenet1_1().state_dict()
    report = check_file(save({f"module.{name}": value for name, value in weights.items()}))
    assert not report.ok
    assert finding(report, "wrapper-prefix").fix.endswith("--strip-module")


def test_the_closest_are_told_where_none_fits(save: Any) -> None:
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 3))
    with pytest.raises(VerifyError, match=r"no known architecture has these names and shapes \(closest: torchvision "):
        check_file(save(model.state_dict()))


def test_nothing_is_guessed_of_what_nobody_knows(save: Any) -> None:
    with pytest.raises(VerifyError, match="no known architecture has these names and shapes; give --model REF"):
        check_file(save(state()))


def test_a_pickled_model_is_never_run_unasked(save: Any) -> None:
    with pytest.raises(VerifyError, match=r"contains a pickled model; give --model REF .* or --unsafe-load"):
        check_file(save(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
