"""A model inside a dict stays a model in a .pth, unless a state_dict is asked for; what goes is named."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.report import Finding


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.codebook = torch.full((3,), 9.0)
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.width = 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.codebook


@pytest.fixture(autouse=True)
def _importable() -> Iterator[None]:
    builtins.Net = Net  # type: ignore[attr-defined]
    Net.__module__, Net.__qualname__ = "builtins", "Net"
    yield
    del builtins.Net  # type: ignore[attr-defined]


Save = Callable[..., Path]


def converted(path: Path, name: str = "out.pth", **options: Any) -> tuple[Any, dict[str, Finding]]:
    out = path.with_name(name)
    report = ckptkit.convert(path, out, **options)
    found = {finding.code: finding for finding in report.findings}
    if name.endswith(".safetensors"):
        return None, found
    return torch.load(out, weights_only=False), found


def test_it_stays(save: Save) -> None:
    model = Net()
    loaded, found = converted(save({"epoch": 3, "model": model, "opt": {"lr": 0.1}}))
    kept = loaded["model"]
    assert isinstance(kept, Net)
    assert (kept.width, loaded["epoch"], loaded["opt"]) == (7, 3, {"lr": 0.1})
    x = torch.ones(1, 2)
    assert torch.equal(kept(x), model(x))
    assert not found.keys() & {"module-left-out", "attributes-left-out"}


def test_with_what_a_module_can_have(save: Save) -> None:
    path = save({"model": Net(), "optimizer": {"state": {}, "param_groups": []}}, device="cuda:1")
    loaded, _ = converted(path, map_location="cpu", leave_out="optimizer", metadata={"a": "b"})
    assert isinstance(loaded["model"], Net)
    assert list(loaded) == ["model"]
    with ckptkit.open(path.with_name("out.pth")) as file:
        assert {row["location"] for row in ckptkit.inspect(path.with_name("out.pth"))["tensors"]} == {"cpu"}
        assert file.metadata["a"] == "b"


def test_the_chosen_one_of_two(save: Save) -> None:
    loaded, _ = converted(save({"model": Net(), "ema": Net()}), section="ema")
    assert isinstance(loaded["model"], Net) and isinstance(loaded["ema"], Net)


def test_what_was_tied_stays_tied(save: Save) -> None:
    model = Net()
    model.codebook = model.body.bias.data
    loaded, _ = converted(save({"model": model, "again": model, "bias": model.body.bias}))
    kept = loaded["model"]
    assert loaded["again"] is kept and loaded["bias"] is kept.body.bias
    assert kept.codebook.data_ptr() == kept.body.bias.data_ptr()


def test_what_the_model_and_the_file_share_stays_shared(save: Save) -> None:
    model = Net()
    model.settings = {"lr": 0.1}  # type: ignore[assignment]
    model.owner = [model]  # type: ignore[assignment]
    loaded, _ = converted(save({"model": model, "settings": model.settings, "nets": [model]}))
    kept = loaded["model"]
    assert kept.settings is loaded["settings"]
    assert kept.owner[0] is kept is loaded["nets"][0]


def test_a_cut_storage_of_a_module(save: Save) -> None:
    model = Net()
    model.codebook = torch.arange(1000.0)[5:8]
    loaded, found = converted(save({"model": model}))
    assert torch.equal(loaded["model"].codebook, torch.tensor([5.0, 6.0, 7.0]))
    assert "compacted" in found


STATE_DICTS: dict[str, dict[str, Any]] = {
    "asked for": {"weights_only": True},
    "renamed": {"rename": "^body=>head"},
    "prefixed": {"add_prefix": "x."},
    "stripped": {"strip_module": True},
    "cast": {"dtype": "float16"},
    "included": {"include": "*.weight"},
    "excluded": {"exclude": "*.bias"},
    "as safetensors": {"weights_only": True, "name": "out.safetensors"},
}


@pytest.mark.parametrize("why", STATE_DICTS)
def test_it_becomes_a_state_dict(save: Save, why: str) -> None:
    loaded, found = converted(save({"epoch": 3, "model": Net()}), **STATE_DICTS[why])
    if loaded is not None:
        state = loaded if why == "asked for" else loaded["model"]
        assert isinstance(state, dict)
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert ".Net" in found["module-left-out"].message
    lost = found["attributes-left-out"]
    assert lost.severity == "warning"
    assert "model.codebook" in lost.message and "model.cache" in lost.message


def test_a_model_that_is_all_of_the_file(save: Save) -> None:
    loaded, found = converted(save(Net()))
    assert list(loaded) == ["body.weight", "body.bias"]
    assert "codebook" in found["attributes-left-out"].message


def test_attributes_of_tensors(save: Save) -> None:
    tensor = torch.ones(2)
    tensor.scale = torch.ones(3)  # type: ignore[attr-defined]
    path = save({"w": tensor})
    loaded, found = converted(path)
    assert torch.equal(loaded["w"].scale, torch.ones(3))
    assert "attributes-left-out" not in found
    assert "w.scale" in converted(path, "out.safetensors")[1]["attributes-left-out"].message


def test_another_view_of_a_storage_that_is_kept_in_part(save: Save) -> None:
    base = torch.arange(100.0)
    model = Net()
    model.body.weight = nn.Parameter(base[:6].view(3, 2))
    model.codebook, model.same = base[50:53], base[1:3]
    for name in ("out.pth", "out.safetensors"):
        lost = converted(save(model), name)[1]["attributes-left-out"].message
        assert "codebook" in lost and "same" not in lost  # whose values are those of a part of the weight


# Second parts.


PART = {"up.weight": torch.ones(3, 2)}


def test_a_second_part_is_missed(save: Save) -> None:
    path = save({"model": Net().state_dict(), "generator": PART, "epoch": 3})
    for name in ("out.pth", "out.safetensors"):
        finding = converted(path, name, weights_only=True)[1]["weights-left-out"]
        assert finding.severity == "warning"
        assert "'generator'" in finding.message
    assert "weights-left-out" not in converted(path, "kept.pth")[1]
    assert "weights-left-out" not in converted(path, "asked.pth", weights_only=True, leave_out="generator")[1]
    codes = {finding["code"] for finding in ckptkit.inspect(path)["findings"]}
    assert "other-parts" in codes and "training-state" not in codes


@pytest.mark.parametrize(
    "beside",
    [
        {"best": Net().state_dict()},  # a copy
        {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], 0.1), 1).state_dict()},
        {"optimizer": torch.optim.Adam([torch.ones(1)]).state_dict(), "losses": {"a": torch.ones(())}},
        {"rng_state": torch.get_rng_state(), "args": {"lr": torch.tensor(0.1)}},
    ],
)  # fmt: skip
def test_what_no_model_misses(save: Save, beside: dict[str, Any]) -> None:
    path = save({"model": Net().state_dict(), **beside})
    section = "model" if "best" in beside else None
    found = converted(path, "out.safetensors", weights_only=True, section=section)[1]
    assert not {code for code, finding in found.items() if finding.severity == "warning"}


def test_graphs_are_collections(save: Save) -> None:
    graph = {"x": torch.ones(4, 3), "edge_index": torch.zeros(2, 5, dtype=torch.int64), "y": torch.ones(4)}
    slices = {name: torch.tensor([0, 4]) for name in graph}
    for saved in ((graph, slices), [graph, graph], (graph, slices, nn.Linear)):
        assert ckptkit.inspect(save(saved))["kind"] == "collection"
    assert ckptkit.inspect(save({"model": {"x": torch.ones(2, 2)}}))["kind"] == "resume"
