"""Keeping the weights alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import RewriteError, WeightsOnly
from ckptkit.checkpoint import STATE_DICT

Save = Callable[..., Path]


def test_the_state_dict_alone_is_kept(save: Save, tmp_path: Path) -> None:
    weights = nn.BatchNorm1d(3).state_dict()
    with ckptkit.open(
        save({"state_dict": weights, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}})
    ) as file:
        result = file.rewrite(WeightsOnly())
        assert result.rest is STATE_DICT
        assert result.state_dict is file.state_dict
        assert file.rest is not STATE_DICT
        result.save(tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)
    assert type(written) is OrderedDict
    assert list(written) == list(weights)
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert written._metadata == weights._metadata


def test_a_whole_models_weights(save: Save, tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with ckptkit.open(save({"model": model, "epoch": 1})) as file:
        file.rewrite(WeightsOnly()).save(tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    nn.Linear(2, 3).load_state_dict(written)
    assert torch.equal(written["weight"], model.weight)


def test_the_selected_section_is_kept(save: Save, tmp_path: Path) -> None:
    saved = {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}
    with ckptkit.open(save(saved), section="ema") as file:
        file.rewrite(WeightsOnly()).save(tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True) == {"w": torch.ones(1)}


@pytest.mark.parametrize("saved", [{"epoch": 1}, torch.ones(1), {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}])
def test_without_one_there_is_nothing_to_keep(save: Save, saved: object) -> None:
    with ckptkit.open(save(saved)) as file, pytest.raises(RewriteError, match="no state_dict to keep"):
        file.rewrite(WeightsOnly())
