"""Whole models, read without their classes: names, order and values are those of ``Module.state_dict()``."""

from __future__ import annotations

import collections
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.files import SameBits, Save, codes
from torch import nn

import ckptkit
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict

Opened = Callable[..., AbstractContextManager[Checkpoint]]
SameWeights = Callable[[StateDict, dict[str, torch.Tensor]], None]


@contextmanager
def vanishing() -> Iterator[ModuleType]:
    """A module to define classes in; afterwards no such module can be imported."""
    module = ModuleType("a_module_that_is_gone")
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]


def define(module: ModuleType, **classes: type) -> None:
    for name, cls in classes.items():
        cls.__module__, cls.__qualname__ = module.__name__, name
        setattr(module, name, cls)


class Odd(nn.Module):
    """Everything a module can hold beside plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = None
        self.register_parameter("missing", None)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("absent", None)
        self.register_buffer("cache", torch.randn(9), persistent=False)
        self.plain = torch.randn(4)  # an attribute, no buffer
        self.listed = [torch.randn(2)]
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.norm = nn.BatchNorm2d(2, affine=False)
        self.nothing = None
        if hasattr(nn, "Buffer"):
            self.kept = nn.Buffer(torch.randn(2))
            self.dropped = nn.Buffer(torch.randn(3), persistent=False)


def compiled(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module, backend="eager")
    try:
        pickle.dumps(made)
    except AttributeError:  # of a local function
        pytest.skip("this torch cannot save a compiled module")
    return made


class ParametersAndDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(2), torch.randn(3), 3, "text"])
        self.dict = nn.ParameterDict({"b": torch.randn(1), "a": torch.randn(2), "none": None, "number": 5})
        self.modules_by_name = nn.ModuleDict({"z": nn.Linear(1, 2), "a": nn.ModuleList([nn.Linear(2, 1)])})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.first = self.second = nn.Linear(3, 3)


class Slotted(nn.Module):
    """Pickled as ``copyreg`` does with slots: a tuple of two dicts."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.size = 3

    def __getstate__(self) -> Any:
        return dict(self.__dict__), {"size": self.size}


class Versioned(nn.Module):
    """A ``__getstate__`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1)

    def __getstate__(self) -> Any:
        return "version 3", self.__dict__, 7

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state[1])


class Remade(nn.Linear):
    """A ``__reduce__`` of its own that passes the ``__dict__``."""

    def __reduce__(self) -> Any:
        return remake, ("any", self.__dict__)


def remake(kind: str, state: dict[str, Any]) -> nn.Module:
    raise AssertionError("called")


class Mine(nn.BatchNorm1d):
    """A class whose version is not known."""


class LowRank(nn.Module):
    """An adapter around a layer, as LoRA libraries make them."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = {"default": 0.5}


class HoldsAnOptimizer(nn.Module):
    """Hooks, and an optimizer among a module's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1, momentum=0.9)
        self.layer(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.layer.register_forward_hook(self.hook)
        self.optimizers = [self.optimizer]

    def hook(self, *arguments: Any) -> None: ...


class HoldsATrace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        self.weight = nn.Parameter(torch.ones(1))


def stepped(model: nn.Module) -> nn.Module:
    model(torch.randn(4, 3, 8, 8))
    return model


def pruned() -> nn.Module:
    import torch.nn.utils.prune as prune

    return prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1)))),
    "odd": Odd,
    "parameter lists and dicts": ParametersAndDicts,
    "tied": Tied,
    "slots": Slotted,
    "state in a tuple": Versioned,
    "reduced": lambda: nn.Sequential(Remade(2, 3)),
    "adapter": lambda: nn.Sequential(LowRank(nn.Linear(3, 4)), LowRank(nn.Linear(4, 1))),
    "optimizer inside": HoldsAnOptimizer,
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    "pruned": pruned,
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "compiled": lambda: compiled(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "compiled inside a wrapper": lambda: nn.DataParallel(compiled(nn.Linear(2, 2))),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "gru": lambda: nn.GRU(3, 4, num_layers=2, bias=False),
    "batch norm": lambda: stepped(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
    "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 8),
    "half": lambda: nn.Linear(3, 3).half(),
    "bfloat16": lambda: nn.Linear(3, 3).to(torch.bfloat16),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "traced inside": HoldsATrace,
    "empty": nn.Sequential,
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("model", MODELS)
def test_a_whole_model_gives_its_state_dict(
    save: Save, same_bits: SameBits, opened: Opened, same_weights: SameWeights, model: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = MODELS[model]()
    expected = module.state_dict()
    path = save(module)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        assert checkpoint.origin.state_path == ""
        assert checkpoint.rest is STATE_DICT
        assert [(s.path, s.kind, s.selected) for s in checkpoint.sections] == (
            [("", "whole_model", True)] if checkpoint.sections else []
        )
        same_weights(checkpoint.state_dict, expected)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        assert {n for n, e in checkpoint.state_dict.items() if e.is_parameter} == set(parameters)
        grads = {n: e.requires_grad for n, e in checkpoint.state_dict.items() if e.is_parameter}
        assert grads == {n: p.requires_grad for n, p in parameters.items()}
    if not expected:
        return
    # Written out it is what torch.save(model.state_dict()) holds: plain tensors that need no gradient.
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == list(expected)
    for name, tensor in written.items():
        assert same_bits(tensor, expected[name])
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
    shared = [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in d.values()] for d in
              (expected, written) for b in d.values()]  # fmt: skip
    assert shared[: len(expected)] == shared[len(expected) :]
    MODELS[model]().load_state_dict(written, strict=True)


@pytest.fixture
def process_group() -> Iterator[None]:
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(save: Save, opened: Opened, same_weights: SameWeights) -> None:
    # It keeps its parameters a second time, and buckets of them, among its attributes.
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with opened(save(model)) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        same_weights(checkpoint.state_dict, model.state_dict())
        assert codes(checkpoint) == ["wrapped-model"]
        assert "DistributedDataParallel" in checkpoint.findings[0].message


@pytest.mark.usefixtures("quiet")
def test_wrappers_are_named_with_their_prefix(save: Save, opened: Opened, tmp_path: Path) -> None:
    inner = nn.Linear(1, 1)
    both = nn.DataParallel(compiled(inner))
    for model, prefix in ((nn.DataParallel(inner), "module."), (both, "module._orig_mod.")):
        path = save(model)
        with opened(path) as checkpoint:
            (finding,) = checkpoint.findings
            assert finding.code == "wrapped-model"
            assert "DataParallel" in finding.message
            assert f"`{prefix}`" in finding.message
        ckptkit.convert(path, tmp_path / "out.pth", strip_module=True, force=True)
        assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == ["weight", "bias"]
    with opened(save(nn.Sequential(collections.OrderedDict(module=inner)))) as checkpoint:
        assert codes(checkpoint) == []  # a child called module is no wrapper


def test_parametrized_modules_are_saved_as_state_dicts(save: Save, opened: Opened, same_weights: SameWeights) -> None:
    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        module = parametrize(nn.Linear(3, 2))
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            save(module)
        with opened(save(module.state_dict())) as checkpoint:
            assert any(name.startswith("parametrizations.weight.") for name in checkpoint.state_dict)
            same_weights(checkpoint.state_dict, module.state_dict())


def test_the_class_of_a_whole_model_is_not_needed(save: Save, opened: Opened, same_weights: SameWeights) -> None:
    with vanishing() as module:

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
                self.register_buffer("scale", torch.tensor([2.0]))

            def __setstate__(self, state: Any) -> None:
                raise AssertionError("the class was used")

        define(module, Net=Net)
        net = Net()
        path = save(net)
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        same_weights(checkpoint.state_dict, net.state_dict())
        assert checkpoint.module is not None


def test_tied_parameters_and_shared_modules_stay_one_tensor(save: Save, opened: Opened) -> None:
    with opened(save(Tied())) as checkpoint:
        weights = checkpoint.state_dict
        assert weights["embed.weight"].view == weights["out.weight"].view
        assert weights["first.bias"].view == weights["second.bias"].view
        assert weights["first.bias"].storage is not weights["embed.weight"].storage


def test_flat_rnn_weights_share_a_storage(
    save: Save, same_bits: SameBits, opened: Opened, same_weights: SameWeights, tmp_path: Path
) -> None:
    # As cuDNN lays them out; on the CPU nothing does, so the slices are made here.
    lstm = nn.LSTM(3, 4)
    flat = torch.cat([p.detach().reshape(-1) for p in lstm.parameters()])
    offset = 0
    for parameter in lstm.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    path = save(lstm)
    with opened(path) as checkpoint:
        assert len({id(entry.storage) for entry in checkpoint.state_dict.values()}) == 1
        assert len({entry.view for entry in checkpoint.state_dict.values()}) == 4
        same_weights(checkpoint.state_dict, lstm.state_dict())
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert len({t.untyped_storage().data_ptr() for t in written.values()}) == 1
    assert all(same_bits(written[name], tensor) for name, tensor in lstm.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("method", ["state_dict", "parameters", "forward"])
def test_a_bound_method_is_read_as_the_model(
    save: Save, opened: Opened, same_weights: SameWeights, tmp_path: Path, wrap: Any, method: str
) -> None:
    model = wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    path = save(getattr(model, method))
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        assert codes(checkpoint)[0] == "bound-method"
        assert f"model.{method} " in checkpoint.findings[0].message
        same_weights(checkpoint.state_dict, model.state_dict())
    ckptkit.convert(path, tmp_path / "out.pth")
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == list(model.state_dict())


def test_a_child_that_is_no_module_is_not_dropped(save: Save, opened: Opened) -> None:
    class Strange(nn.Linear):
        def __reduce__(self) -> Any:
            return collections.deque, ([self.weight],)

    with opened(save(nn.Sequential(nn.Linear(1, 1), Strange(2, 2)))) as checkpoint:
        assert list(checkpoint.state_dict) == ["0.weight", "0.bias"]
        assert list(checkpoint.state_dict.extra) == ["1"]
        assert codes(checkpoint) == ["not-a-plain-tensor"]


@pytest.mark.usefixtures("quiet")
def test_lazy_modules_have_names_and_no_tensors_yet(save: Save, opened: Opened) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with opened(save(model)) as checkpoint:
        assert list(checkpoint.state_dict.everything) == list(model.state_dict())
        assert list(checkpoint.state_dict) == ["1.num_batches_tracked"]
        assert codes(checkpoint) == ["not-a-plain-tensor"]
        assert "UninitializedParameter" in checkpoint.findings[0].message


def test_the_versions_that_loading_needs_are_written(save: Save, opened: Opened, tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), Mine(2), nn.InstanceNorm1d(2, track_running_stats=True))
    ckptkit.convert(save(model), tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert dict(written._metadata) == {"0": {"version": 2}, "3": {"version": 2}}
    assert {path: model.state_dict()._metadata[path] for path in written._metadata} == dict(written._metadata)
