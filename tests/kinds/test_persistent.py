"""Models whose loader is given their whole ``__dict__``: StyleGAN's persistent classes, libtorch's ``pickle_save``."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.errors import CorruptError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]

SOURCE = "import os\nraise SystemExit('never executed')\n"

KNOWN: dict[str, type] = {}


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> object:
    cls = KNOWN[meta["class_name"]]
    made = cls.__new__(cls)
    made.__dict__.update(meta["state"])
    return made


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(nn.Module):
    """Pickled as the classes that ``@persistence.persistent_class`` decorates (torch_utils/persistence.py)."""

    def __init_subclass__(cls) -> None:
        KNOWN[cls.__name__] = cls

    def __reduce__(self) -> tuple[Any, ...]:
        name, state = type(self).__name__, {**self.__dict__, "_init_args": (8,), "_init_kwargs": {}}
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": name, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


class FullyConnectedLayer(Persistent):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(after, before)), nn.Parameter(torch.zeros(after))


class MappingNetwork(Persistent):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc0, self.fc1 = FullyConnectedLayer(4, size), FullyConnectedLayer(size, size)
        self.blocks = nn.ModuleList([nn.Conv2d(1, 2, 3), FullyConnectedLayer(1, 2)])
        self.register_buffer("w_avg", torch.zeros(size))
        self.register_buffer("noise", torch.ones(3), persistent=False)


class Generator(Persistent):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mapping = MappingNetwork(size)


@pytest.fixture
def stub() -> Iterator[None]:
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    package.persistence, package.__path__ = module, []  # type: ignore[attr-defined]
    sys.modules.update({"torch_utils": package, "torch_utils.persistence": module})
    yield
    del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    generator, discriminator = Generator(8).requires_grad_(False), MappingNetwork(6).requires_grad_(False)
    options = {"class_name": "training.dataset.ImageFolderDataset", "path": "x.zip", "resolution": 256}
    average = copy.deepcopy(generator)
    average.mapping.w_avg += 1
    return {
        "G": generator, "D": discriminator, "G_ema": average, "augment_pipe": None, "training_set_kwargs": options,
    }  # fmt: skip


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_each_network_is_a_whole_model(protocol: int, tmp_path: Path, same_bits: SameBits) -> None:
    path, saved = tmp_path / "network-snapshot.pkl", networks()
    path.write_bytes(pickle.dumps(saved, protocol))
    document = ckptkit.inspect(path)
    assert [(row["path"], row["kind"]) for row in document["sections"]] == [
        (name, "whole_model") for name in ("G", "D", "G_ema")
    ]
    assert "ambiguous-section" in {finding["code"] for finding in document["findings"]}
    assert {row["name"] for row in document["tensors"] if row["section"] is None} == {
        "G.mapping.noise", "D.noise", "G_ema.mapping.noise",
    }  # fmt: skip
    for name in ("G", "D", "G_ema"):
        with ckptkit.open(path, section=name) as file:
            assert (file.trust, list(file.state_dict)) == ("needs_trust", list(saved[name].state_dict()))
        ckptkit.convert(path, tmp_path / "m.safetensors", section=name, weights_only=True, force=True)
        found = ckptkit.load_state_dict(tmp_path / "m.safetensors")
        assert all(same_bits(found[key], value) for key, value in saved[name].state_dict().items())
        assert found.keys() == saved[name].state_dict().keys()
    use = next(use for use in document["globals"] if "persistent" in use["name"])
    assert (use["verdict"], "source text" in use["reason"]) == ("unknown", True)
    assert {row["class"] for row in ckptkit.inspect(path, section="G")["modules"]} >= {"Generator", "MappingNetwork"}


@pytest.mark.usefixtures("stub")
def test_a_pth_keeps_them_as_they_are(tmp_path: Path, same_bits: SameBits) -> None:
    path, saved = tmp_path / "network-snapshot.pkl", networks()
    path.write_bytes(pickle.dumps(saved))
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=False)
    assert type(whole["G_ema"]) is Generator and whole["training_set_kwargs"] == saved["training_set_kwargs"]
    for name in ("G", "D", "G_ema"):
        for key, value in saved[name].state_dict().items():
            assert same_bits(whole[name].state_dict()[key], value)


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("protocol", [2, 4])
def test_all_tensors_have_one_name_each_and_torch_loads_them(protocol: int, tmp_path: Path) -> None:
    path, saved = tmp_path / "network-snapshot.pkl", networks()
    path.write_bytes(pickle.dumps(saved, protocol))
    expected = {f"{name}.{key}" for name in ("G", "D", "G_ema") for key in saved[name].state_dict()}
    expected |= {"G.mapping.noise", "D.noise", "G_ema.mapping.noise"}
    ckptkit.convert(path, out := tmp_path / "all.safetensors", all_tensors=True)
    with ckptkit.open(out) as file:
        assert set(file.state_dict) == expected
    ckptkit.convert(path, out := tmp_path / "all.pth", all_tensors=True)
    assert set(torch.load(out, weights_only=True)) == expected  # which takes protocol 2 alone
    ckptkit.convert(path, out, section="G", weights_only=True, force=True)
    assert list(torch.load(out, weights_only=True)) == list(saved["G"].state_dict())
    ckptkit.convert(path, out := tmp_path / "shards.pth", all_tensors=True, max_shard_size="2KB")
    parts = [torch.load(part, weights_only=True) for part in tmp_path.glob("shards-*.pth")]
    assert len(parts) > 1 and {name for part in parts for name in part} == expected


@pytest.mark.usefixtures("stub")
def test_one_that_contains_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    generator = Generator(4)
    state = generator.__dict__
    data = pickle.dumps({"G": generator, "x": state}, 3)
    path.write_bytes(data)
    assert list(ckptkit.load_state_dict(path, section="G")) == list(generator.state_dict())
    inner: dict[str, Any] = {mark: {} for mark in ("_parameters", "_buffers", "_modules")}
    inner["_modules"]["again"] = Again(inner)
    inner["w"] = torch.ones(1)
    path.write_bytes(pickle.dumps({"G": inner["_modules"]["again"]}, 3))
    with pytest.raises((CorruptError, ckptkit.LimitError)), ckptkit.open(path, section="G") as file:
        list(file.state_dict)


class Again:
    """An object whose loader is given a state in which it stands itself."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, ({"class_name": 3, "state": self.state},), None


# libtorch's.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("scale", torch.ones(2))
        self.steps = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_modules_without_code(tmp_path: Path, same_bits: SameBits) -> None:
    net = Net()
    path = tmp_path / "m.pt"
    path.write_bytes(bytes(torch._C._pickle_save(torch.jit.script(net))))
    with ckptkit.open(path) as file:
        assert (file.format, file.kind, file.trust) == ("torch-zip", "whole_model", "needs_trust")
        uses = {use.name: use for use in file.checkpoint.globals}
        assert (
            "code is not in the file" in uses["__torch__.Net" if "__torch__.Net" in uses else next(iter(uses))].reason
        )
    for name in ("o.pth", "o.safetensors"):
        ckptkit.convert(path, tmp_path / name)
        found = ckptkit.load_state_dict(tmp_path / name)
        assert found.keys() == net.state_dict().keys()
        assert all(same_bits(found[key], value) for key, value in net.state_dict().items())
    assert ckptkit.inspect(tmp_path / "o.pth")["trust"] == "safe"


@pytest.mark.parametrize("value", [{"a": torch.ones(2), "b": torch.zeros(3)}, [torch.ones(2)], (torch.ones(1), [1, 2])])
def test_typed_lists_and_dicts_are_what_torch_loads(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(bytes(torch._C._pickle_save(value)))
    ckptkit.convert(path, tmp_path / "o.pth")
    assert (
        repr(torch.load(tmp_path / "o.pth", weights_only=True))
        == repr(torch.load(path, weights_only=False))
        == repr(value)
    )
    if isinstance(value, dict):
        assert list(ckptkit.load_state_dict(path)) == ["a", "b"]
