"""torch's quantized modules, which keep weights packed and compute their state_dict."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.ao import quantization
from torch.ao.nn import quantized

import ckptkit
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.errors import RewriteError
from ckptkit.pickling.inert import Global, Object

Save = Callable[..., Path]
Opened = Callable[..., AbstractContextManager[Checkpoint]]

pytestmark = pytest.mark.usefixtures("quiet", "engine")


@pytest.fixture
def engine() -> Any:
    backend = torch.backends.quantized
    before = backend.engine
    backend.engine = next(name for name in ("fbgemm", "x86", "qnnpack") if name in backend.supported_engines)
    yield
    backend.engine = before


def static() -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(1, 2, 3), nn.ReLU(), quantization.DeQuantStub()).eval()
    weight = quantization.get_default_qconfig(torch.backends.quantized.engine).weight
    model.qconfig = quantization.QConfig(quantization.MinMaxObserver, weight)  # type: ignore[assignment]
    prepared = quantization.prepare(model)
    prepared(torch.ones(1, 1, 4, 4))
    return quantization.convert(prepared)


def dynamic() -> nn.Module:
    return quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), {nn.Linear})


def recurrent() -> nn.Module:
    return quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4), nn.GRUCell(3, 4)), {nn.LSTM, nn.GRUCell})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: quantized.Linear(3, 2),
    "linear without bias": lambda: quantized.Linear(3, 2, bias_=False),
    "half linear": lambda: quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear}, torch.float16),
    "conv": lambda: quantized.Conv2d(3, 2, 1),
    "conv without bias": lambda: nn.Sequential(quantized.Conv2d(3, 2, 1, bias=False)),
    "transposed conv": lambda: nn.Sequential(quantized.ConvTranspose2d(3, 2, 1)),
    "static": static,
    "dynamic": dynamic,
    "recurrent": recurrent,
    "embedding": lambda: quantized.Embedding(4, 8),
    "embedding bag": lambda: nn.Sequential(quantized.EmbeddingBag(4, 8)),
    "function": lambda: nn.Sequential(quantized.QFunctional(), quantized.FloatFunctional()),
    "norm": lambda: nn.Sequential(quantized.BatchNorm2d(2)),
}


def parts(value: object) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("model", MODELS)
def test_names_and_values_are_the_state_dicts(save: Save, opened: Opened, model: str) -> None:
    module = MODELS[model]()
    expected = module.state_dict()
    with opened(save(module)) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        everything = checkpoint.state_dict.everything
        assert list(everything) == list(expected)
        assert bool(checkpoint.state_dict.extra) == any(f.code == "not-a-plain-tensor" for f in checkpoint.findings)
        for name, value in expected.items():
            for found, given in zip(parts(everything[name]), parts(value), strict=True):
                check(found, given)


def check(found: object, given: Any) -> None:
    if isinstance(found, TensorEntry):
        assert (found.dtype, found.shape) == (str(given.dtype).removeprefix("torch."), tuple(given.shape))
    elif isinstance(found, Global):
        assert found.qualified == str(given)
    elif isinstance(found, Object):
        assert found.class_name == "torch.ScriptObject" or given.is_quantized
    elif isinstance(found, (int, float)):
        assert found == pytest.approx(given.item())  # a number in the file, which state_dict() makes a tensor of
    else:
        assert found is None
        assert given is None


@pytest.mark.parametrize("model", ["linear", "conv", "transposed conv", "static", "dynamic", "embedding", "function"])
def test_what_is_written_loads_into_the_model(save: Save, model: str, tmp_path: Path) -> None:
    module = MODELS[model]()
    ckptkit.convert(save(module), tmp_path / "out.pth")
    fresh = MODELS[model]()
    fresh.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=False), strict=True)
    for (name, value), other in zip(module.state_dict().items(), fresh.state_dict().values(), strict=True):
        for a, b in zip(parts(value), parts(other), strict=True):
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, name


@pytest.mark.parametrize("model", ["linear", "static", "dynamic", "embedding", "recurrent"])
def test_a_saved_state_dict_of_one(save: Save, opened: Opened, model: str, tmp_path: Path) -> None:
    expected = MODELS[model]().state_dict()
    path = save(expected)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "state_dict"
        assert list(checkpoint.state_dict.everything) == list(expected)
    ckptkit.convert(path, tmp_path / "out.pth")
    MODELS[model]().load_state_dict(torch.load(tmp_path / "out.pth", weights_only=False), strict=True)


def test_what_safetensors_cannot_hold_of_one_is_to_be_had_with_all_tensors(save: Save, tmp_path: Path) -> None:
    path = save({"model": recurrent().state_dict(), "epoch": 1})
    with pytest.raises(RewriteError, match=r"--all-tensors takes the tensors inside 0\._all_weight_values\.0\.param"):
        ckptkit.convert(path, out := tmp_path / "out.safetensors", weights_only=True, densify=True)
    ckptkit.convert(path, out, all_tensors=True, densify=True)
    assert "model.0._all_weight_values.0.param.0.1.0" in load_file(out)


def test_all_tensors_of_a_module_have_one_name_each(save: Save, tmp_path: Path) -> None:
    ckptkit.convert(save(static()), out := tmp_path / "out.safetensors", all_tensors=True, densify=True)
    assert sorted(load_file(out)) == ["0.scale", "0.zero_point", "1.bias", "1.weight"]


def test_settings_of_a_convolution_come_from_its_tuple(save: Save, opened: Opened) -> None:
    from ckptkit.normalize.modules import module_state

    with opened(save(quantized.Conv2d(3, 2, (1, 2), stride=2))) as checkpoint:
        state = module_state(checkpoint.module)
        assert state is not None
        assert (state["in_channels"], state["kernel_size"], state["stride"]) == (3, (1, 2), (2, 2))
