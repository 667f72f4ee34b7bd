"""What kind of thing a file holds."""

from __future__ import annotations

import argparse
import collections
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.checkpoint import Checkpoint
from ckptkit.diagnose import diagnose

Save = Callable[..., Path]
Opened = Callable[..., AbstractContextManager[Checkpoint]]

SD = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


def optimizer(kind: Any = torch.optim.SGD, **options: Any) -> Any:
    made = kind([nn.Parameter(torch.ones(2))], lr=0.1, **options)
    made.param_groups[0]["params"][0].grad = torch.ones(2)
    made.step()
    return made


class Settings(dict):  # type: ignore[type-arg]
    """A dict of a class of its own."""


KINDS: dict[str, list[Any]] = {
    "whole_model": [nn.Linear(2, 3), nn.Sequential(), nn.Linear(2, 3).state_dict],
    "state_dict": [
        SD,
        OrderedDict(SD),
        {"w": torch.ones(1), "steps": 3},
        list(SD.items()),
        Settings(SD),
        {"temperature": torch.tensor(1.0)},
        {"ids": torch.ones(2, dtype=torch.int64)},
    ],
    "resume": [
        {"state_dict": SD, "epoch": 3},
        {"model": nn.Linear(1, 1)},
        [nn.Linear(1, 1)],
        [SD, SD],
        (SD, 3),
        argparse.Namespace(net=nn.Linear(1, 1), epoch=3),
        {"nets": [list(SD.items()), 3]},
    ],
    "tensor": [torch.ones(3), torch.tensor(1.0), nn.Parameter(torch.ones(1)), torch.ones(3).untyped_storage()],
    "collection": [
        [torch.ones(1), torch.ones(2)],
        (torch.ones(1), 3),
        {0: torch.ones(1), 1: torch.ones(2)},
        {(1, 2): torch.ones(1), None: torch.ones(2)},
        {"epoch": 1, "lr": 0.1, "w": torch.ones(1)},
        {"images": [torch.ones(1)]},
        {"deep": {"images": [[[[[[torch.ones(1)]]]]]]}},
        optimizer(momentum=0.9).state_dict(),
        optimizer(torch.optim.Adam),
        {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "step": torch.tensor(1.0)},
        {"storage": torch.ones(3).untyped_storage()},
        [torch.ones(3).untyped_storage(), torch.ones(2).untyped_storage()],
        argparse.Namespace(lr=0.1, mean=torch.ones(1)),
        {frozenset([1]): {frozenset([torch.ones(1)])}},
    ],
    "other": [argparse.Namespace(lr=0.1), {}, [], (), {"epoch": 3}, "text", 3, None, OrderedDict(), {"a": {"b": {}}}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_each_object(save: Save, opened: Opened, kind: str) -> None:
    for index, obj in enumerate(KINDS[kind]):
        with opened(save(obj, f"{kind}{index}.pth")) as checkpoint:
            assert checkpoint.origin.kind == kind, obj
            assert (checkpoint.origin.state_path == "") == (kind in ("whole_model", "state_dict"))
            assert (checkpoint.sections == ()) == (kind == "other" or checkpoint.origin.kind != kind), obj
            found = [finding.code for finding in diagnose(checkpoint)]
            assert ("no-tensors" in found) == (kind == "other")


def test_every_tensor_lies_in_a_section(save: Save, opened: Opened) -> None:
    saved = {
        "w": torch.ones(1),
        "epoch": 3,
        "lr": 0.1,
        "storage": torch.ones(5).untyped_storage(),
        "moments": {0: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}},
        "rng": {"cpu": torch.get_rng_state(), "python": (3, [1, 2]), "cuda": [torch.get_rng_state()]},
        "keyed": {nn.Parameter(torch.ones(3)): torch.ones(3)},
        "set": {torch.ones(2)},
        "object": argparse.Namespace(deep=argparse.Namespace(queue=collections.deque([torch.ones(4)]))),
    }
    with opened(save(saved)) as checkpoint:
        assert [(s.path, s.kind, s.tensors) for s in checkpoint.sections] == [
            ("w", "tensor", 1),
            ("storage", "tensor", 0),
            ("moments", "collection", 2),
            ("rng", "collection", 2),
            ("keyed", "collection", 2),
            ("set", "collection", 1),
            ("object", "collection", 1),
        ]
        assert all(section.nbytes for section in checkpoint.sections)


def test_sections_are_measured(save: Save, opened: Opened) -> None:
    big = torch.zeros(1000)
    saved = {"state_dict": {"a": big[:10], "b": big[5:], "c": torch.ones(2)}, "extra": [torch.ones(3), big]}
    with opened(save(saved)) as checkpoint:
        assert [(s.path, s.tensors, s.nbytes) for s in checkpoint.sections] == [
            ("state_dict", 3, 4008),
            ("extra", 2, 4012),
        ]
