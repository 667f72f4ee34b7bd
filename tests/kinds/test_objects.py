"""Weights inside objects of foreign classes."""

from __future__ import annotations

import argparse
import collections
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.checkpoint import Checkpoint, StateDict

Save = Callable[..., Path]
Opened = Callable[..., AbstractContextManager[Checkpoint]]
SameWeights = Callable[[StateDict, dict[str, torch.Tensor]], None]


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.epoch = 3


class Mixed:
    """Two optimizers behind one interface, as libraries wrap them."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = list(optimizers)


class Slots:
    __slots__ = ("net", "other")


@dataclass
class Record:
    weights: dict[str, torch.Tensor]
    epoch: int = 1
    history: list[torch.Tensor] = field(default_factory=lambda: [torch.ones(1)])


class Pair(NamedTuple):
    model: nn.Module
    steps: int


class Settings(dict):  # type: ignore[type-arg]
    """A dict that is also an object, as configuration libraries make them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["note"] = "kept"


MODEL = nn.Linear(2, 2)
SD = MODEL.state_dict()


def slots() -> Slots:
    made = Slots()
    made.net, made.other = MODEL, 3
    return made


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "a namespace": ("model", lambda: argparse.Namespace(lr=0.1, model=SD)),
    "a namespace in a dict": ("args.model", lambda: {"args": argparse.Namespace(model=SD), "epoch": 1}),
    "a trainer": ("model", lambda: Trainer(MODEL)),
    "a trainer in a dict": ("trainer.model", lambda: {"trainer": Trainer(MODEL), "best": 0.5}),
    "a dataclass": ("weights", lambda: Record(dict(SD))),
    "slots": ("net", slots),
    "a named tuple": ("0", lambda: Pair(MODEL, 3)),
    "a deque": ("1", lambda: collections.deque([3, MODEL])),
    "a partial call": ("model", lambda: functools.partial(print, 1, model=MODEL)),
    "a dict of its own class": ("", lambda: Settings(SD)),
    "a dict of its own class around": ("model", lambda: Settings(model=SD, lr=0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_inside_objects(
    save: Save, opened: Opened, same_weights: SameWeights, case: str, tmp_path: Path
) -> None:
    path, make = CASES[case]
    saved = save(make())
    with opened(saved) as checkpoint:
        assert checkpoint.origin.state_path is not None, checkpoint.sections
        assert checkpoint.origin.kind == ("state_dict" if path == "" else "resume")
        same_weights(checkpoint.state_dict, SD)
        selected = [section for section in checkpoint.sections if section.selected]
        assert [section.tensors for section in selected] == [2]
        found = checkpoint.origin.state_path
        assert found == path
    ckptkit.convert(saved, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)
    assert type(written) is type(make())
    with opened(tmp_path / "out.pth", section=path) as checkpoint:
        same_weights(checkpoint.state_dict, SD)
    ckptkit.convert(saved, tmp_path / "out.safetensors", weights_only=True)
    with opened(tmp_path / "out.safetensors") as checkpoint:
        same_weights(checkpoint.state_dict, SD)


def test_an_optimizer_inside_an_object_is_one(save: Save, opened: Opened) -> None:
    with opened(save({"model": MODEL, "wrapped": Mixed(Trainer(nn.Linear(2, 2)).optimizer)})) as checkpoint:
        assert [(section.path, section.kind) for section in checkpoint.sections] == [
            ("model", "whole_model"),
            ("wrapped.optimizers.0", "optimizer"),
        ]
    with opened(save(Trainer(nn.Linear(2, 2)))) as checkpoint:
        assert [(section.path, section.kind) for section in checkpoint.sections] == [
            ("model", "whole_model"),
            ("optimizer", "optimizer"),
            ("scheduler.optimizer", "optimizer"),
        ]


def test_a_dict_with_tensors_among_its_attributes_too_is_no_state_dict(save: Save, opened: Opened) -> None:
    # Written back, names and values would no longer agree with the attributes.
    both = Settings(SD)
    both.__dict__.update(SD)
    with opened(save(both)) as checkpoint:
        assert checkpoint.origin.kind == "collection"
        assert {section.path for section in checkpoint.sections} == {"weight", "bias", "weight#2", "bias#2"}
