"""Training goes on from a converted checkpoint exactly as it goes on from the source."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from support.generated_tensors import SOME
from support.torch_oracle import Same, convert, load, save
from torch import nn

pytestmark = pytest.mark.thorough

FEW = settings(SOME, max_examples=6)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
}


class Net(nn.Module):
    """Layers that share a weight and keep buffers; one weight is transposed where the optimizer can bear it."""

    def __init__(self, kind: str = "SGD") -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.back = nn.Linear(3, 4)
        if kind != "LBFGS":
            self.back.weight = nn.Parameter(torch.randn(3, 4).t())
        self.again = nn.Linear(4, 3, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.back(self.norm(self.first(x)).relu())).square().mean()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 2) -> None:
    """Some steps of training, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randn(5, 4, generator=generator)

        def loss(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            value = model(batch)
            value.backward()
            return value

        optimizer.step(loss)


class Parallel(nn.Module):
    """Keeps a module where DataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


TAKES_NAMES = "param_names" in inspect.getsource(torch.optim.Optimizer)
"""Whether optimizers take named parameters: since torch 2.6."""


def groups(model: nn.Module, named: bool, apart: bool) -> Any:
    """The model's parameters as people give them to an optimizer."""
    parameters = list(model.named_parameters() if named else model.parameters())
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}] if apart else parameters


def began(kind: str, seed: int, named: bool, apart: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A wrapped model and its optimizer, some steps into training."""
    torch.manual_seed(seed)
    model = Parallel(Net(kind))
    optimizer = OPTIMIZERS[kind](groups(model, named, apart and kind != "LBFGS"))
    trained(model, optimizer, seed)
    return model, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@FEW
@given(
    seed=st.integers(0, 1000),
    named=st.booleans() if TAKES_NAMES else st.just(False),
    apart=st.booleans(),
    legacy=st.booleans(),
    tag=st.sampled_from(["cpu", "cuda:3"]),
)
def test_training_goes_on(folder: Path, kind: str, seed: int, named: bool, apart: bool, legacy: bool, tag: str) -> None:
    model, optimizer = began(kind, seed, named, apart)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    average = torch.optim.swa_utils.AveragedModel(model)
    resume = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "ema": average.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": 2,
    }
    tags = {t.untyped_storage().data_ptr(): tag for t in model.state_dict().values()}
    source = save(resume, folder / "source.pth", tags, legacy=legacy)
    result = convert(source, folder / "result.pth", section="state_dict", strip_module=True, map_location="cpu")
    found = torch.load(result, weights_only=True)  # no map_location
    assert list(found) == list(resume)

    bare = Net(kind)
    assert not any(bare.load_state_dict(found["state_dict"]))
    again = OPTIMIZERS[kind](groups(bare, named, apart and kind != "LBFGS"))
    again.load_state_dict(found["optimizer"])
    for group in again.param_groups if named else ():
        assert set(group["param_names"]) <= {name for name, _ in bare.named_parameters()}
    torch.optim.lr_scheduler.ExponentialLR(again, 0.9).load_state_dict(found["scheduler"])
    assert torch.equal(found["rng"], resume["rng"])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert not any(averaged.load_state_dict(found["ema"]))

    again.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    trained(model, optimizer, seed + 1)
    trained(bare, again, seed + 1)
    Same()(dict(model.module.state_dict()), dict(bare.state_dict()))
    Same()(optimizer.state_dict()["state"], again.state_dict()["state"])


@FEW
@given(seed=st.integers(0, 1000), dtype=st.sampled_from(["float16", "bfloat16", "float64"]))
def test_cast_weights_keep_the_optimizer(folder: Path, seed: int, dtype: str) -> None:
    model, optimizer = began("AdamW", seed, TAKES_NAMES, False)
    resume = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    source = save(resume, folder / "source.pth")
    found = load(convert(source, folder / "result.pth", dtype=dtype, strip_module=True)).tree
    cast = copy.deepcopy(model.module).to(getattr(torch, dtype))
    fresh = Net().to(getattr(torch, dtype))
    assert not any(fresh.load_state_dict(found["model"]))
    Same()(dict(cast.state_dict()), dict(fresh.state_dict()))
    Same()(resume["optimizer"]["state"], found["optimizer"]["state"])
    torch.optim.AdamW(fresh.parameters()).load_state_dict(found["optimizer"])


@FEW
@given(seed=st.integers(0, 1000), size=st.integers(1, 3000))
def test_weights_load_from_everywhere(folder: Path, seed: int, size: int) -> None:
    model, _ = began("SGD", seed, False, False)
    source = save({"state_dict": model.state_dict(), "epoch": 1}, folder / "source.pth")
    batch = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    expected = model.eval()(batch)
    weights = convert(source, folder / "weights.safetensors", weights_only=True, strip_module=True)
    shards = convert(weights, folder / "shards.pth", max_shard_size=size)
    merged = convert(shards, folder / "merged.pth")
    split = convert(merged, folder / "split.safetensors", max_shard_size=size)
    whole = convert(split, folder / "whole.safetensors")
    for path in (weights, whole):
        fresh = Net()
        missing, unexpected = safetensors.torch.load_model(fresh, path)
        assert not missing
        assert not unexpected
        assert torch.equal(fresh.eval()(batch), expected)
    fresh = Net()
    assert not any(fresh.load_state_dict(torch.load(merged, weights_only=True)))
    assert torch.equal(fresh.eval()(batch), expected)
