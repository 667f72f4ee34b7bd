"""Filling a model with the file's own memory: what loading keeps of the reference, and what it takes from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.fitting import Net, Run, check_file, codes, finding
from torch import nn

from ckptkit.formats import read
from ckptkit.options import VerifyOptions
from ckptkit.verifier import load as loading
from ckptkit.verifier.context import Context
from ckptkit.verifier.fill import without_value
from ckptkit.verifier.load import check_load
from ckptkit.verifier.measure import measure_fit
from ckptkit.verifier.references import build


@pytest.fixture
def loaded(save: Any) -> Any:
    """``loaded(state, factory)``: the model after loading, which must have found nothing wrong."""

    def load(state: object, factory: Any, *, ties_once: bool = False, **options: Any) -> nn.Module:
        checkpoint, file = read(save(state))
        model, reference = build(factory, {})
        context = Context(reference=reference, devices=(torch.device("cpu"),), options=VerifyOptions(**options))
        context.fit = measure_fit(
            model, checkpoint.state_dict, allow_missing=context.options.allow_missing, ties_once=ties_once
        )
        assert [f.code for f in check_load(checkpoint, model, context)] == []
        assert context.loaded
        file.close()
        return model

    return load


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""


def test_the_weights_are_the_file(loaded: Any, tmp_path: Path) -> None:
    source = Net()
    model = loaded(source.state_dict(), Net)
    if mapped_files():
        assert f"{tmp_path}/model.pth" in mapped_files()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    before = (tmp_path / "model.pth").read_bytes()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert (tmp_path / "model.pth").read_bytes() == before


def test_what_is_loaded_has_the_reference_s_type_layout_and_gradient(loaded: Any) -> None:
    def factory() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        model[0].weight.requires_grad_(False)
        return model

    weight = torch.arange(6, dtype=torch.float16).view(3, 2).t()  # transposed, and of another type
    state = {**factory().state_dict(), "0.weight": weight, "1.running_mean": torch.ones(2, dtype=torch.float64)}
    model = loaded(state, factory)
    assert model[0].weight.dtype == torch.float32 and model[0].weight.is_contiguous()
    assert torch.equal(model[0].weight, weight.float())
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert model[1].running_mean.dtype == torch.float32
    assert not isinstance(model[1].running_mean, nn.Parameter)


def test_a_parameter_in_the_file_that_is_a_buffer_in_the_model(loaded: Any) -> None:
    state = {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in Net().state_dict().items()}
    model = loaded(state, Net)
    assert not any(isinstance(buffer, nn.Parameter) for buffer in model.buffers())
    assert len(list(model.parameters())) == len(list(Net().parameters()))


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("names", [("embed.weight",), ("out.weight",), ("embed.weight", "out.weight")])
def test_ties_stay_ties(names: tuple[str, ...], loaded: Any) -> None:
    value = torch.randn(5, 3)
    model = loaded(dict.fromkeys(names, value), Tied, ties_once=True)
    assert model.embed.weight is model.out.weight and torch.equal(model.out.weight, value)


def test_one_tensor_of_the_file_for_two_of_the_model_is_parted(loaded: Any) -> None:
    value = torch.randn(4)
    model = loaded({"a": value, "b": value, "c": value[1:]}, lambda: nn.ParameterDict(
        {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(3)}))  # fmt: skip
    with torch.no_grad():
        model.a.zero_()
    assert torch.equal(model.b, value) and torch.equal(model.c, value[1:])


def test_recurrent_layers_compute_with_what_was_loaded(loaded: Any) -> None:
    source = nn.LSTM(3, 4, 2)
    model = loaded(source.state_dict(), lambda: nn.LSTM(3, 4, 2))
    assert all(flat is p for flat, p in zip(model._flat_weights, model.parameters(), strict=True))
    x = torch.randn(5, 1, 3)
    assert torch.equal(model(x)[0], source.eval()(x)[0])


def test_a_counter_that_is_missing_is_zero(loaded: Any) -> None:
    state = {name: v for name, v in Net().state_dict().items() if "tracked" not in name}
    model = loaded(state, Net)
    assert model.body[1].num_batches_tracked.item() == 0


def test_allowed_missing_names_have_the_values_of_the_factory(loaded: Any) -> None:
    torch.manual_seed(11)
    expected = Net().head.weight.detach().clone()
    torch.manual_seed(11)
    state = {name: v + 1 for name, v in Net().state_dict().items() if not name.startswith("head")}
    torch.manual_seed(11)
    model = loaded(state, Net, allow_missing=("head.*",))
    assert torch.equal(model.head.weight, expected)
    assert torch.equal(model.body[0].weight, state["body.0.weight"]) and not without_value(model)


class CopiesItself(nn.Linear):
    """Loads by copying in place, as modules with loading code of their own do."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])
            self.bias.copy_(state_dict[prefix + "bias"])


class Forgets(nn.Linear):
    """Takes the name and not the value."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state_dict[prefix + "weight"])


def test_loading_code_that_copies_in_place(loaded: Any) -> None:
    source = nn.Linear(3, 2)
    model = loaded(source.state_dict(), lambda: CopiesItself(3, 2))
    assert torch.equal(model.weight, source.weight) and torch.equal(model.bias, source.bias)


def test_a_parameter_that_got_no_value(run: Run) -> None:
    report = run(nn.Linear(3, 2).state_dict(), model=lambda: Forgets(3, 2))
    assert ("error", "left-on-meta") in codes(report)
    assert "1 parameter or buffer got no value" in finding(report, "left-on-meta").message
    assert ": bias;" in finding(report, "left-on-meta").message
    assert not report.details["loaded"]


def test_a_buffer_that_its_factory_left_on_meta(run: Run) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("mask", torch.ones(2, device="meta"), persistent=False)

    report = run(nn.Linear(3, 2).state_dict(), model=Masked)
    assert ": mask;" in finding(report, "left-on-meta").message
    assert "left-on-meta" not in {
        f.code for f in run(nn.Linear(3, 2).state_dict(), model=lambda: nn.Linear(3, 2)).findings
    }


def test_comparing_costs_no_pass_over_the_same_memory(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    compared = loading.same_bits
    monkeypatch.setattr(loading, "same_bits", lambda a, b: looked.append(a.numel()) or compared(a, b))
    loaded(Net().state_dict(), Net)
    assert looked == []
    loaded(Net().state_dict(), Net())  # a module given has memory of its own
    assert looked


class Scales(nn.Linear):
    """Changes what it was given, where no version counter sees it."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.weight.data.mul_(2)


@pytest.mark.parametrize("aligned", [True, False])
def test_loading_code_that_changes_values(aligned: bool, tmp_path: Path) -> None:
    path = tmp_path / ("model.pth" if aligned else "model.safetensors")
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, path) if aligned else save_file(state, path)
    report = check_file(path, model=lambda: Scales(3, 2))
    assert codes(report)[1:] == [("error", "load-differs")]
    assert ": weight;" in finding(report, "load-differs").message
    assert check_file(path, model=lambda: nn.Linear(3, 2)).ok
