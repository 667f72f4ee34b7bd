"""The load check: what the model holds afterwards, and everything that can go wrong on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.fitting import Net, Run, check_file, codes, finding, state, without
from torch import nn


class Interrupting(Net):
    """Its loading code looks at values, which there are none of before the weights are read."""

    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        if next(iter(state_dict.values())).sum().item() is None:
            raise ValueError
        super()._load_from_state_dict(state_dict, *args)


def test_loading_code_that_needs_values(run: Run) -> None:
    assert run(Net().state_dict(), model=Interrupting).ok
    report = run(without("head.bias"), model=Interrupting)
    assert report.details["missing_keys"] == ["head.bias"]


class Refusing(Net):
    """Its loading code objects to every checkpoint."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        args[6].append("not with me")


def test_load_failed(run: Run) -> None:
    report = run(Net().state_dict(), model=Refusing)
    assert codes(report) == [("info", "fit-coverage"), ("error", "load-failed")]
    assert "not with me" in finding(report, "load-failed").message
    assert report.details["loaded"] is False


class Doubling(Net):
    """Its loading code changes a value afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(self.double)

    @staticmethod
    def double(module: Any, keys: Any) -> None:
        with torch.no_grad():
            module.head.bias.mul_(2)


def test_load_differs(run: Run) -> None:
    report = run(Net().state_dict(), model=Doubling)
    assert codes(report) == [("info", "fit-coverage"), ("error", "load-differs")]
    assert "1 tensor differs between the model and the checkpoint: head.bias" in str(report.findings)


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        self.out.weight = self.embed.weight


def test_tied_weights_from_safetensors(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_model(Tied(), str(path))
    assert check_file(path, model=Tied).ok
    safetensors.torch.save_file({"out.weight": Tied().out.weight.detach()}, path)  # no record of the other name
    report = check_file(path, model=Tied)
    assert report.ok
    assert codes(report) == [("info", "fit-coverage"), ("info", "tied-restored")]
    assert "embed.weight = out.weight" in finding(report, "tied-restored").message
    assert report.details["coverage"] == {"tensors": 2, "of": 2, "parameters_share": 1.0}
    assert report.details["missing_keys"] == []
    assert run(Tied().state_dict(), model=Tied).ok
    weight = torch.ones(4, 3)
    assert run({"embed.weight": weight, "out.weight": weight}, model=Tied).ok  # one object under both names


def test_tied_weights_that_differ_in_the_file(run: Run) -> None:
    report = run({"embed.weight": torch.ones(4, 3), "out.weight": torch.zeros(4, 3)}, model=Tied)
    assert codes(report)[1] == ("error", "load-differs")
    assert "embed.weight" in finding(report, "load-differs").message


def test_one_tensor_for_two_that_are_not_tied(run: Run) -> None:
    weight = torch.ones(2, 2)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    report = run({"0.weight": weight, "1.weight": weight}, model=model)
    assert report.ok and report.details["coverage"]["tensors"] == 2


class Extra(Net):
    """Keeps something beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: object = {"built": True}

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


class Somebodys:
    """A class of which no object is made."""


def test_extra_state_of_foreign_classes_is_never_made_from_the_file(run: Run) -> None:
    report = run(Extra().state_dict() | {"_extra_state": {"built": Somebodys()}}, model=Extra)
    assert report.ok
    assert codes(report) == [("info", "fit-coverage"), ("warning", "extra-state")]
    assert "_extra_state" in finding(report, "extra-state").message
    assert report.details["coverage"] == {"tensors": 9, "of": 9, "parameters_share": 1.0}
    assert run(Net().state_dict(), model=Extra).details["missing_keys"] == ["_extra_state"]
    assert run(Extra().state_dict(), model=Net).details["unexpected_keys"] == ["_extra_state"]


def test_extra_state_of_plain_values_is_loaded(run: Run) -> None:
    kept: list[Extra] = []

    def make() -> Extra:
        kept.append(Extra())
        return kept[-1]

    source = Extra()
    source.extra = {"scale": 2, "amax": [torch.ones(2), None]}
    report = run(source.state_dict(), model=make)
    assert report.ok and codes(report) == [("info", "fit-coverage")]
    extra: Any = kept[-1].extra
    assert extra["scale"] == 2 and extra["amax"][0].tolist() == [1, 1]


def test_extra_state_that_is_a_tensor_is_loaded(run: Run) -> None:
    kept: list[Extra] = []

    def make() -> Extra:
        kept.append(Extra())
        kept[-1].extra = torch.zeros(1)
        return kept[-1]

    source = Extra()
    source.extra = torch.arange(3)
    assert run(source.state_dict(), model=make).ok
    assert kept[0].extra.tolist() == [0, 1, 2]  # not shown to the module without its values before


def test_values_that_are_no_plain_tensors(run: Run) -> None:
    report = run(state(head__weight=torch.ones(4, 5).to_sparse()), model=Net)
    assert ("error", "unloadable-value") in codes(report)
    assert "head.weight" in finding(report, "unloadable-value").message
    assert report.details["loaded"] is False


class Odd(nn.Module):
    """A buffer of a layout of its own, by which it multiplies."""

    def __init__(self, made: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("odd", made)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd: Any = self.odd
        return x @ (odd.dequantize() if odd.is_quantized else odd.to_dense()) * self.scale


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["coo", "csr", "quantized"])
def test_values_of_other_layouts_reach_the_model(name: str, run: Run) -> None:
    make: Any = {
        "coo": lambda matrix: matrix.to_sparse(),
        "csr": lambda matrix: matrix.to_sparse_csr(),
        "quantized": lambda matrix: torch.quantize_per_tensor(matrix, 0.5, 0, torch.qint8),
    }[name]
    kept: list[Odd] = []

    def model() -> Odd:
        kept.append(Odd(make(torch.eye(3))))
        return kept[-1]

    report = run(Odd(make(2 * torch.eye(3))).state_dict(), model=model, input_shapes=((1, 3),), forward=True)
    assert report.ok, report.findings
    assert kept[-1](torch.ones(1, 3)).tolist() == [[2, 2, 2]]
    assert report.details["coverage"] == {"tensors": 2, "of": 2, "parameters_share": 1.0}
    report = run(Odd(make(torch.eye(4))).state_dict(), model=model)  # of another shape
    assert ("error", "unloadable-value") in codes(report)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_weights_reach_the_model(run: Run) -> None:
    backend = torch.backends.quantized
    backend.engine = next(name for name in ("fbgemm", "x86", "qnnpack") if name in backend.supported_engines)
    kept: list[Any] = []

    def model() -> nn.Module:
        kept.append(nn.Sequential(nn.Linear(3, 3), torch.ao.nn.quantized.dynamic.Linear(3, 2)))
        return kept[-1]

    source: Any = model()
    weight = torch.arange(6.0).reshape(2, 3)
    source[1].set_weight_bias(torch.quantize_per_tensor(weight, 0.5, 0, torch.qint8), torch.ones(2))
    for saved in (source.state_dict(), source):
        assert run(saved, model=model, input_shapes=[(1, 3)], forward=True).ok
        assert torch.equal(kept[-1][1].weight().dequantize(), weight)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_packed_weights_that_only_torchs_program_unpacks_are_an_error(run: Run) -> None:
    def model() -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)), {nn.LSTM})

    report = run(model(), model=model)  # pickled whole, what is packed is an object of C++
    assert not report.ok
    assert "1._all_weight_values.0.param" in finding(report, "unloadable-value").message


def test_weights_that_are_no_numbers(run: Run) -> None:
    report = run(state(head__bias=torch.tensor([1, torch.nan, torch.inf, -torch.inf])), model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("error", "weights-not-finite")]
    assert "head.bias (1 NaN, 2 Inf of 4)" in finding(report, "weights-not-finite").message
    huge = state(head__bias=torch.tensor([65000.0] * 4, dtype=torch.float16))
    assert run(huge, model=Net).ok  # their sum alone is infinite
    assert not run(state(body__1__running_mean=torch.full((5,), torch.nan)), model=Net).ok


def test_an_infinite_buffer_may_be_a_mask(run: Run) -> None:
    report = run(state(body__1__running_var=torch.full((5,), torch.inf)), model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("info", "infinite-buffer")]


def test_eight_bit_floats(run: Run) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(2).to(torch.float8_e4m3fn))

    assert run(Small().state_dict(), model=Small).ok
    assert not run({"w": torch.tensor([1, torch.nan]).to(torch.float8_e4m3fn)}, model=Small).ok


def test_a_model_that_is_given_stays_as_it_is(run: Run) -> None:
    model = Net().train()
    before = model.head.bias.clone()
    assert run(Net().half().state_dict(), model=model, dtype="float16").ok
    assert model.training and torch.equal(model.head.bias, before) and model.head.bias.dtype == torch.float32


def test_global_random_state_is_left_alone(run: Run) -> None:
    weights = Net().state_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert run(weights, model=Net).ok
    assert torch.equal(torch.rand(3), expected)
