"""Modules print from the file alone as ``print(model)`` prints them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import ckptkit
from ckptkit.inspection.settings import module_text, plain_value
from ckptkit.inspection.state import list_modules, printed_model
from ckptkit.pickling.inert import Global, InertDict, Object

Save = Callable[..., Path]

NORMS_SAY_BIAS = "bias=" in repr(nn.BatchNorm1d(1))
"""Whether the torch at hand prints what ckptkit prints of norms, or is older."""


def printed(path: Path) -> str:
    with ckptkit.open(path) as file:
        return "\n".join(printed_model(list_modules(file.checkpoint.module)))


def as_printed_here(text: str) -> str:
    return text if NORMS_SAY_BIAS else re.sub(r"((?:Norm)\w*\(.*), bias=(?:True|False)", r"\1", text)


def assert_prints_alike(save: Save, model: nn.Module) -> None:
    assert as_printed_here(printed(save(model))) == repr(model)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(2, 3),
    lambda: nn.Linear(2, 3, bias=False),
    lambda: nn.Bilinear(1, 2, 3),
    lambda: nn.Conv1d(1, 2, 3),
    lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
    lambda: nn.Conv3d(2, 2, 3, dilation=2, groups=2),
    lambda: nn.Conv2d(1, 1, 3, padding="same", padding_mode="circular"),
    lambda: nn.ConvTranspose2d(2, 3, 3, output_padding=1, stride=2),
    lambda: nn.BatchNorm2d(64),
    lambda: nn.BatchNorm1d(3, affine=False, momentum=None),
    lambda: nn.InstanceNorm2d(3),
    lambda: nn.SyncBatchNorm(3),
    lambda: nn.LayerNorm((3, 4)),
    lambda: nn.LayerNorm(3, bias=False),
    lambda: nn.GroupNorm(1, 3),
    *([lambda: nn.RMSNorm(3)] if hasattr(nn, "RMSNorm") else []),
    lambda: nn.LocalResponseNorm(2),
    lambda: nn.Embedding(3, 4),
    lambda: nn.Embedding(3, 4, padding_idx=0, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True, sparse=True),
    lambda: nn.EmbeddingBag(3, 4, mode="sum", padding_idx=1),
    lambda: nn.LSTM(2, 3, 2, bidirectional=True, batch_first=True, dropout=0.1, proj_size=2),
    lambda: nn.GRU(2, 3, bias=False),
    lambda: nn.RNN(1, 2, nonlinearity="relu"),
    lambda: nn.LSTMCell(1, 2),
    lambda: nn.RNNCell(1, 2, nonlinearity="relu", bias=False),
    lambda: nn.Dropout(),
    lambda: nn.Dropout2d(0.2, inplace=True),
    lambda: nn.AlphaDropout(),
    lambda: nn.MaxPool2d(3, 2, 1),
    lambda: nn.AvgPool1d(2),
    lambda: nn.AvgPool2d((2, 3)),
    lambda: nn.MaxUnpool2d(2),
    lambda: nn.LPPool2d(2, 3),
    lambda: nn.AdaptiveAvgPool2d((1, 1)),
    lambda: nn.AdaptiveAvgPool2d(1),
    lambda: nn.AdaptiveMaxPool1d(2),
    lambda: nn.FractionalMaxPool2d(2, output_size=1),
    lambda: nn.Upsample(scale_factor=2),
    lambda: nn.Upsample(size=(3, 4), mode="bilinear"),
    lambda: nn.UpsamplingNearest2d(2),
    lambda: nn.ReLU(),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.SiLU(),
    lambda: nn.SELU(inplace=True),
    lambda: nn.ELU(),
    lambda: nn.CELU(inplace=True),
    lambda: nn.LeakyReLU(0.2, inplace=True),
    lambda: nn.RReLU(),
    lambda: nn.Hardtanh(),
    lambda: nn.Threshold(1, 2),
    lambda: nn.GELU("tanh"),
    lambda: nn.Hardshrink(),
    lambda: nn.Softshrink(),
    lambda: nn.Softplus(),
    lambda: nn.PReLU(),
    lambda: nn.GLU(),
    lambda: nn.Softmax(dim=1),
    lambda: nn.LogSoftmax(),
    lambda: nn.Sigmoid(),
    lambda: nn.Identity(),
    lambda: nn.Flatten(),
    lambda: nn.Unflatten(1, (2, 3)),
    lambda: nn.Unflatten(1, torch.Size([2, 3])),
    lambda: nn.Fold(2, 3),
    lambda: nn.Unfold(3),
    lambda: nn.ConstantPad2d(1, 2.5),
    lambda: nn.ZeroPad2d(1),
    lambda: nn.ReflectionPad1d(2),
    lambda: nn.ReplicationPad3d(1),
    lambda: nn.CircularPad2d(1),
    lambda: nn.PixelShuffle(2),
    lambda: nn.PixelUnshuffle(2),
    lambda: nn.ChannelShuffle(2),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.CrossEntropyLoss(),
    lambda: nn.CosineSimilarity(),
    lambda: torchvision.ops.StochasticDepth(0.1, "row"),
    lambda: torchvision.ops.FrozenBatchNorm2d(3),
    lambda: torchvision.ops.Permute([0, 2, 1]),
]


def test_every_layer(save: Save) -> None:
    """In one model: the lines are the layers' own."""
    model = nn.Sequential(*(make() for make in LAYERS))
    assert_prints_alike(save, model)


CONTAINERS: list[Callable[[], nn.Module]] = [
    lambda: nn.ReLU(),
    lambda: nn.Sequential(),
    lambda: nn.ModuleList(),
    lambda: nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)]),
    lambda: nn.ModuleList([nn.Sequential(nn.ReLU(), nn.ModuleList([nn.Linear(1, 2)] * 3))] * 4),
    lambda: nn.ModuleDict({"a": nn.ReLU(), "b": nn.ModuleDict()}),
    lambda: nn.ParameterList([nn.Parameter(torch.ones(2, 3))]),
    lambda: nn.ParameterList([nn.Parameter(torch.ones(2, 3).half()), torch.ones(1), 3]),
    lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2, 3)), "b": torch.ones(2)}),
    lambda: nn.ParameterDict(),
    lambda: nn.Sequential(nn.ParameterList([nn.Parameter(torch.ones(2))] * 2), nn.ReLU()),
    lambda: nn.DataParallel(nn.Linear(1, 2)),
    lambda: nn.Transformer(4, 2, 1, 2, 8),
]


@pytest.mark.parametrize("make", CONTAINERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_containers(save: Save, make: Callable[[], nn.Module]) -> None:
    assert_prints_alike(save, make())


def test_a_child_that_is_none_prints_as_none(save: Save) -> None:
    model = nn.Sequential(nn.ReLU())
    model.register_module("gone", None)
    assert_prints_alike(save, model)


MODELS = ["resnet18", "mobilenet_v3_small", "squeezenet1_0", "swin_t", "convnext_tiny", "vit_b_16"]
MORE_MODELS = ["efficientnet_b0", "densenet121", "shufflenet_v2_x0_5", "maxvit_t"]


def small(model: nn.Module) -> nn.Module:
    """The model with one-element storages: what it prints depends on none of its weights."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.thorough) for name in MORE_MODELS)])
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # of an older torchvision
def test_torchvision_models(save: Save, name: str) -> None:
    with torch.device("meta"):  # no weights are made
        model = torchvision.models.get_model(name)
    with torch.device("cpu"):
        assert_prints_alike(save, small(model))


# Classes that are not torch's.


def made(cls: str, children: dict[str, Object] | None = None, **attributes: Any) -> Object:
    node = Object("newobj", Global(*cls.rsplit(".", 1)), ())
    state: list[tuple[object, object]] = [
        ("training", True), ("_parameters", InertDict()), ("_buffers", InertDict()),
        ("_modules", InertDict(list((children or {}).items()))), *attributes.items(),
    ]  # fmt: skip
    node.state = InertDict(state)
    return node


def text(node: Object, *, has_children: bool = False) -> str:
    assert isinstance(node.state, InertDict)
    return module_text(node, node.state, has_children=has_children)


def test_a_class_that_derives_from_torchs_prints_like_it() -> None:
    linear = made("lora.layers.LoRALinear", in_features=4, out_features=8, rank=2)
    assert text(linear) == "LoRALinear(in_features=4, out_features=8, bias=False)"
    norm = made("timm.layers.LayerNorm2d", normalized_shape=(64,), eps=1e-6, elementwise_affine=True)
    assert text(norm) == "LayerNorm2d((64,), eps=1e-06, elementwise_affine=True, bias=False)"


def test_an_unknown_class_prints_its_scalars_unless_it_has_children() -> None:
    block = made("model.DropPath", p=0.1, mode="row", _hidden=1, table=[1], size=(1, 2), on=None)
    assert text(block) == "DropPath(p=0.1, mode='row', size=(1, 2), on=None)"
    assert text(block, has_children=True) == "DropPath()"
    assert text(made("torch.nn.modules.linear.Identity", unused=3)) == "Identity()"


def test_attributes_that_a_file_lacks_are_left_out() -> None:
    old = made("torch.nn.modules.dropout.Dropout", p=0.5)
    assert text(old) == "Dropout(p=0.5)"
    assert text(made("torch.nn.modules.linear.Linear")) == "Linear(bias=False)"


def test_graph_modules_have_their_name() -> None:
    node = Object("reduce", Global("torch.fx.graph_module", "reduce_graph_module"), ())
    state = made("x.Y").state
    assert isinstance(state, InertDict)
    assert module_text(node, state, has_children=True) == "GraphModule()"


def test_settings_are_bounded() -> None:
    deep: Any = 1
    for _ in range(20_000):
        deep = (deep,)
    huge = made("m.N", deep=deep, many=tuple(range(1000)), text="x" * 10_000, **{f"k{i}": i for i in range(1000)})
    assert len(text(huge)) < 1000
    assert len(text(made("torch.nn.modules.conv.Conv2d", padding=deep, stride=tuple(range(1000))))) < 1000
    assert plain_value(InertDict()) is None
    tree = made("m.Leaf")
    for _ in range(40):  # 2 ** 40 paths
        tree = made("torch.nn.modules.container.Sequential", {"0": tree, "1": tree})
    modules = list_modules(tree)
    assert 0 < len(modules) <= 50_000
    assert sum(1 for _ in printed_model(modules)) < 200_000
