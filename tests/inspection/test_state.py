"""What is told of optimizers, schedulers and scalars, held against what torch itself saved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import ckptkit
from ckptkit.inspection.state import training_document
from ckptkit.pickling.inert import InertDict

Save = Callable[..., Path]


def training(path: Path) -> dict[str, Any]:
    document = ckptkit.inspect(path)["training"]
    json.dumps(document, allow_nan=False)
    assert set(document) == {"scalars", "optimizers", "schedulers"}
    return document


def stepped(cls: type[optim.Optimizer], steps: int = 3, **options: Any) -> optim.Optimizer:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = cls([parameter], **options)
    for _ in range(steps):
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
    return optimizer


KINDS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"momentum": 0.9}),
    "Adam": (optim.Adam, {}),
    "AdamW": (optim.AdamW, {}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "Adamax": (optim.Adamax, {}),
    "Adadelta": (optim.Adadelta, {}),
    "Adagrad": (optim.Adagrad, {}),
    "RMSprop": (optim.RMSprop, {}),
    "Rprop": (optim.Rprop, {}),
    "ASGD": (optim.ASGD, {}),
    **({"Adafactor": (optim.Adafactor, {})} if hasattr(optim, "Adafactor") else {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizers_kind_is_told_by_its_options(save: Save, kind: str) -> None:
    cls, options = KINDS[kind]
    optimizer = stepped(cls, lr=0.01, **options)
    (found,) = training(save({"w": torch.ones(1), "optimizer": optimizer.state_dict()}))["optimizers"]
    told = "decoupled_weight_decay" in optim.Adam([torch.ones(1)]).defaults  # else Adam's options are AdamW's
    kinds = (
        {kind} if told or kind not in ("Adam", "AdamW", "RAdam") else {"Adam or AdamW", "Adam or a related optimizer"}
    )
    assert found["path"] == "optimizer" and found["kind"] in kinds and found["inferred"]
    assert (found["groups"], found["lr"]) == (1, [0.01])
    state = optimizer.state_dict()["state"][0]
    assert found["steps"] == (float(state["step"]) if "step" in state else None)
    assert found["tensors"] == sum(isinstance(value, torch.Tensor) for value in state.values())


def test_adam_of_older_torch_may_be_either(save: Save) -> None:
    state = stepped(optim.Adam).state_dict()
    state["param_groups"][0].pop("decoupled_weight_decay", None)
    state["state"][0]["step"] = 7  # a number before torch 1.12
    (found,) = training(save({"optimizer": state}))["optimizers"]
    assert (found["kind"], found["steps"]) == ("Adam or AdamW", 7)


def test_groups_have_their_own_learning_rates(save: Save) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.01)]
    adversary = optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.25))
    path = save({"optimizer_states": [optim.SGD(groups).state_dict(), adversary.state_dict()]})
    first, second = training(path)["optimizers"]
    assert (first["path"], first["kind"], first["lr"], first["steps"]) == (
        "optimizer_states.0",
        "SGD",
        [0.1, 0.01],
        None,
    )
    assert (second["path"], second["lr"], second["tensors"]) == ("optimizer_states.1", [0.25], 1)


def test_a_pickled_optimizer_says_what_it_is(save: Save) -> None:
    (found,) = training(save({"optimizer": stepped(optim.SGD, lr=0.5, momentum=0.9)}))["optimizers"]
    assert (found["kind"], found["inferred"], found["lr"]) == ("SGD", False, [0.5])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "LinearLR": lr_scheduler.LinearLR,
    "ConstantLR": lr_scheduler.ConstantLR,
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.StepLR(o, 2), lr_scheduler.StepLR(o, 3)], [1]),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_schedulers_kind_is_told_by_its_attributes(save: Save, kind: str) -> None:
    scheduler = SCHEDULERS[kind](optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9))
    found = training(save({"scheduler": scheduler.state_dict()}))["schedulers"][0]
    assert (found["path"], found["kind"], found["inferred"]) == ("scheduler", kind, True)
    assert found["last_epoch"] == scheduler.last_epoch
    assert found["lr"] == pytest.approx(scheduler.get_last_lr() if kind != "ReduceLROnPlateau" else found["lr"])


def test_numbers_that_are_tensors_are_read(save: Save) -> None:
    saved = {"best": torch.tensor(71.5), "half": torch.tensor(0.5, dtype=torch.float16), "step": torch.tensor([12]),
             "flag": torch.tensor(True), "many": torch.ones(2), "bf16": torch.tensor(1.0, dtype=torch.bfloat16),
             "nan": torch.tensor(float("nan")), "epoch": 3, "model": {"w": torch.ones(1)}}  # fmt: skip
    path = save(saved)
    assert training(path)["scalars"] == {"epoch": 3, "best": 71.5, "half": 0.5, "step": 12, "flag": True, "nan": "nan"}
    assert ckptkit.inspect(path)["metadata"] == {"epoch": 3}


def test_arguments(save: Save) -> None:
    args = argparse.Namespace(lr=0.1, layers=[1], name="n")
    assert training(save({"args": args, "model": {"w": torch.ones(1)}}))["scalars"] == {
        "args.lr": 0.1,
        "args.name": "n",
    }


def test_files_without_training_state(save: Save) -> None:
    nothing: dict[str, Any] = {"scalars": {}, "optimizers": [], "schedulers": []}
    for saved in ({"w": torch.ones(1)}, torch.ones(1), nn.Linear(1, 1), [1, 2]):
        assert training(save(saved)) == nothing


def test_hostile_trees() -> None:
    group = InertDict([("lr", 0.1), ("betas", 1), ("eps", 1), ("amsgrad", 1)])
    for groups in ([], [1, None], [group] * 100_000, [InertDict([(("a",), 1), (2**70_000, 1)])]):
        tree = InertDict([("o", InertDict([("param_groups", groups), ("state", InertDict([((), group)]))]))])
        (found,) = training_document(tree)["optimizers"]
        assert len(found["lr"]) <= 64
        json.dumps(found, allow_nan=False)
    wide = InertDict([(f"k{i}", InertDict([("last_epoch", 1)])) for i in range(1000)])
    assert len(training_document(wide)["schedulers"]) == 64
    cyclic = InertDict([])
    cyclic.pairs.append(("self", cyclic))
    node: object = cyclic
    for _ in range(100_000):
        node = [node, node]
    assert training_document(InertDict([("deep", node)]))["optimizers"] == []
