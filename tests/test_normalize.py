"""What a file holds, and its weights: held against the module and the dicts torch saved."""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import formats, transfer
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, TensorEntry
from ckptkit.errors import CorruptError, LimitError, SectionError
from ckptkit.limits import Limits
from ckptkit.modules import walk_module
from ckptkit.normalize import RawCheckpoint, lower_state_dict, normalize
from ckptkit.pickling.inert import ABSENT, Global, InertDict, Object, mapping_items
from ckptkit.sections import CUSTOMARY_KEYS, brief, step

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


@contextmanager
def opened(path: Path, *, section: str | None = None) -> Iterator[Checkpoint]:
    checkpoint, file = formats.read(path, section=section)
    with closing(file):
        yield checkpoint


def tensor_of(entry: TensorEntry) -> torch.Tensor:
    data = bytearray(b"".join(transfer.stream(entry)))
    dtype = getattr(torch, entry.dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)


def assert_same_weights(state_dict: StateDict, expected: dict[str, torch.Tensor], same_bits: SameBits) -> None:
    assert list(state_dict) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(tensor_of(state_dict[name]), tensor), name


def codes(checkpoint: Checkpoint) -> list[str]:
    return [finding.code for finding in checkpoint.findings]


def facts(checkpoint: Checkpoint) -> list[tuple[str, str, bool]]:
    return [(section.path, section.kind, section.selected) for section in checkpoint.sections]


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


SD = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


# Kinds.


def test_kind_of_each_object(save: Save) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    kinds = {
        "whole_model": [nn.Linear(2, 3), nn.Sequential()],
        "state_dict": [SD, OrderedDict(SD), {"w": torch.ones(1), "steps": 3}],
        "resume": [{"state_dict": SD, "epoch": 3}, {"model": nn.Linear(1, 1)}, [nn.Linear(1, 1)], [SD, SD]],
        "tensor": [torch.ones(3), torch.tensor(1.0), nn.Parameter(torch.ones(1)), torch.ones(3).untyped_storage()],
        "collection": [
            [torch.ones(1), torch.ones(2)],
            (torch.ones(1), 3),
            {0: torch.ones(1), 1: torch.ones(2)},
            {"epoch": 1, "lr": 0.1, "w": torch.ones(1)},
            {"images": [torch.ones(1)]},
            optimizer.state_dict(),
            {"storage": torch.ones(3).untyped_storage()},
        ],
        "other": [argparse.Namespace(lr=0.1), {}, [], {"epoch": 3}, "text", 3, None, OrderedDict()],
    }
    for kind, objects in kinds.items():
        for index, obj in enumerate(objects):
            with opened(save(obj, f"{kind}{index}.pth")) as checkpoint:
                assert checkpoint.origin.kind == kind, obj
                has_weights = kind in ("whole_model", "state_dict")
                assert (checkpoint.origin.state_path == "") == has_weights or kind == "resume"


# Whole models.


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


class ParametersAndDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(2), torch.randn(3)])
        self.dict = nn.ParameterDict({"b": torch.randn(1), "a": torch.randn(2)})
        self.modules_by_name = nn.ModuleDict({"z": nn.Linear(1, 2), "a": nn.ModuleList([nn.Linear(2, 1)])})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.first = self.second = nn.Linear(3, 3)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 2))


def stepped(model: nn.Module) -> nn.Module:
    model(torch.randn(4, 3, 8, 8))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1)))),
    "odd": Odd,
    "parameter lists and dicts": ParametersAndDicts,
    "tied": Tied,
    "weight_norm": old_weight_norm,
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "batch norm": lambda: stepped(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "half": lambda: nn.Linear(3, 3).half(),
    "bfloat16": lambda: nn.Linear(3, 3).to(torch.bfloat16),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "empty": nn.Sequential,
}


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_model_gives_its_state_dict(save: Save, same_bits: SameBits, model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODELS[model]()
    expected = module.state_dict()
    path = save(module)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        assert checkpoint.origin.state_path == ""
        assert checkpoint.rest is STATE_DICT
        assert_same_weights(checkpoint.state_dict, expected, same_bits)
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


def test_parametrized_modules_are_saved_as_state_dicts(save: Save, same_bits: SameBits) -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with opened(save(module.state_dict())) as checkpoint:
        assert "parametrizations.weight.original0" in checkpoint.state_dict
        assert_same_weights(checkpoint.state_dict, module.state_dict(), same_bits)


def test_the_class_of_a_whole_model_is_not_needed(save: Save, same_bits: SameBits) -> None:
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
        assert_same_weights(checkpoint.state_dict, net.state_dict(), same_bits)
        assert checkpoint.module is not None


def test_tied_parameters_and_shared_modules_stay_one_tensor(save: Save) -> None:
    with opened(save(Tied())) as checkpoint:
        weights = checkpoint.state_dict
        assert weights["embed.weight"].view == weights["out.weight"].view
        assert weights["first.bias"].view == weights["second.bias"].view
        assert weights["first.bias"].storage is not weights["embed.weight"].storage


def test_flat_rnn_weights_share_a_storage(save: Save, same_bits: SameBits, tmp_path: Path) -> None:
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
        assert_same_weights(checkpoint.state_dict, lstm.state_dict(), same_bits)
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert len({t.untyped_storage().data_ptr() for t in written.values()}) == 1
    assert all(same_bits(written[name], tensor) for name, tensor in lstm.state_dict().items())


def test_a_wrapper_is_named(save: Save) -> None:
    with opened(save(nn.DataParallel(nn.Linear(1, 1)))) as checkpoint:
        assert codes(checkpoint) == ["wrapped-model"]
        assert "DataParallel" in checkpoint.findings[0].message
    with opened(save(nn.Linear(1, 1))) as checkpoint:
        assert codes(checkpoint) == []


def test_the_bound_method_is_read_as_the_model(save: Save, same_bits: SameBits, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    path = save(model.state_dict)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "whole_model"
        assert codes(checkpoint) == ["bound-method"]
        assert_same_weights(checkpoint.state_dict, model.state_dict(), same_bits)
    ckptkit.convert(path, tmp_path / "out.pth")
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == list(model.state_dict())


def test_another_bound_method_is_not(save: Save) -> None:
    with opened(save(nn.Linear(1, 1).forward)) as checkpoint:
        assert checkpoint.origin.kind == "collection"
        assert codes(checkpoint) == []


def test_a_child_that_is_no_module_is_not_dropped(save: Save) -> None:
    class Strange(nn.Linear):
        def __reduce__(self) -> Any:
            return collections.deque, ([self.weight],)

    with opened(save(nn.Sequential(nn.Linear(1, 1), Strange(2, 2)))) as checkpoint:
        assert list(checkpoint.state_dict) == ["0.weight", "0.bias"]
        assert list(checkpoint.state_dict.extra) == ["1"]
        assert codes(checkpoint) == ["not-a-plain-tensor"]


# Resume dicts.


@pytest.mark.parametrize("key", CUSTOMARY_KEYS)
@pytest.mark.parametrize("as_module", [False, True])
def test_weights_under_every_customary_key(save: Save, same_bits: SameBits, key: str, as_module: bool) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "losses": {"train": torch.tensor(1.0)},  # looks like weights, under no customary key
        key: model if as_module else model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1),
    }
    with opened(save(saved)) as checkpoint:
        assert checkpoint.origin.kind == "resume"
        assert checkpoint.origin.state_path == key
        assert_same_weights(checkpoint.state_dict, model.state_dict(), same_bits)
        assert facts(checkpoint) == [
            ("losses", "state_dict", False),
            (key, "whole_model" if as_module else "state_dict", True),
            ("optimizer", "optimizer", False),
        ]
        rest = dict(mapping_items(checkpoint.rest) or [])
        assert list(rest) == ["epoch", "losses", key, "optimizer", "args"]
        assert rest[key] is STATE_DICT
        assert rest["epoch"] == 3


def test_the_only_weights_are_taken_whatever_their_key(save: Save) -> None:
    with opened(save({"epoch": 1, "my_net": SD})) as checkpoint:
        assert checkpoint.origin.state_path == "my_net"


def test_nested_weights(save: Save) -> None:
    with opened(save({"checkpoint": {"inner": {"state_dict": SD}}, "n": 1})) as checkpoint:
        assert checkpoint.origin.state_path == "checkpoint.inner.state_dict"
        assert list(checkpoint.state_dict) == list(SD)
    with opened(save({"a": {"b": {"c": {"d": SD}}}})) as checkpoint:
        assert checkpoint.origin.state_path == "a.b.c.d"
    with opened(save({"a": {"b": {"c": {"d": {"e": SD}}}}})) as checkpoint:
        assert facts(checkpoint) == [("a", "collection", False)]


def test_a_module_in_a_list(save: Save, same_bits: SameBits) -> None:
    model = nn.Linear(2, 2)
    with opened(save([model, "text"])) as checkpoint:
        assert checkpoint.origin.state_path == "0"
        assert_same_weights(checkpoint.state_dict, model.state_dict(), same_bits)


def test_model_and_ema_are_a_choice(save: Save, same_bits: SameBits) -> None:
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    path = save({"model": model, "ema": ema, "epoch": 3})
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "resume"
        assert checkpoint.origin.state_path is None
        assert len(checkpoint.state_dict) == 0
        assert facts(checkpoint) == [("model", "whole_model", False), ("ema", "whole_model", False)]
        assert codes(checkpoint) == ["ambiguous-section"]
        assert "'model', 'ema'" in checkpoint.findings[0].message
        assert "--section NAME" in (checkpoint.findings[0].fix or "")
    for section, chosen in (("model", model), ("ema", ema)):
        with opened(path, section=section) as checkpoint:
            assert checkpoint.origin.state_path == section
            assert_same_weights(checkpoint.state_dict, chosen.state_dict(), same_bits)
            assert codes(checkpoint) == []
            assert [s.path for s in checkpoint.sections if s.selected] == [section]


def test_an_ema_that_is_none_is_no_choice(save: Save) -> None:
    with opened(save({"model": nn.Linear(2, 2), "ema": None})) as checkpoint:
        assert checkpoint.origin.state_path == "model"
        assert codes(checkpoint) == []


def test_same_names_beside_a_customary_key_are_a_choice(save: Save, same_bits: SameBits) -> None:
    other = {name: tensor + 1 for name, tensor in SD.items()}
    path = save({"model": SD, "model_ema": other})
    with opened(path) as checkpoint:
        assert checkpoint.origin.state_path is None
        assert codes(checkpoint) == ["ambiguous-section"]
    with opened(path, section="model_ema") as checkpoint:
        assert_same_weights(checkpoint.state_dict, other, same_bits)
    with pytest.raises(SectionError, match=r"no section 'ema' holds weights; sections that do: 'model', 'model_ema'"):
        formats.read(path, section="ema")


def test_other_names_beside_a_customary_key_are_not(save: Save) -> None:
    with opened(save({"state_dict": SD, "criterion": {"centers": torch.ones(3)}})) as checkpoint:
        assert checkpoint.origin.state_path == "state_dict"
        assert codes(checkpoint) == []


def test_two_customary_keys_are_a_choice(save: Save) -> None:
    with opened(save({"model": SD, "net": {"other": torch.ones(1)}})) as checkpoint:
        assert codes(checkpoint) == ["ambiguous-section"]


def test_generator_and_discriminator_are_a_choice(save: Save) -> None:
    with opened(save({"netG": {"g": torch.ones(1)}, "netD": {"d": torch.ones(1)}})) as checkpoint:
        assert facts(checkpoint) == [("netG", "state_dict", False), ("netD", "state_dict", False)]
        assert codes(checkpoint) == ["ambiguous-section"]


def test_lightning(save: Save) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.0",
        "state_dict": OrderedDict((f"model.{k}", v) for k, v in model.state_dict().items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }
    with opened(save(saved)) as checkpoint:
        assert checkpoint.origin.state_path == "state_dict"
        assert ("optimizer_states.0", "optimizer", False) in facts(checkpoint)


def test_an_optimizer_is_never_the_weights(save: Save) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with opened(save({"model": optimizer.state_dict(), "epoch": 1})) as checkpoint:
        assert checkpoint.origin.state_path is None
        assert facts(checkpoint) == [("model", "optimizer", False)]
    with pytest.raises(SectionError, match="sections that do: none"):
        formats.read(save({"model": optimizer.state_dict()}), section="model")


def test_sections_are_measured(save: Save) -> None:
    big = torch.zeros(1000)
    saved = {"state_dict": {"a": big[:10], "b": big[5:], "c": torch.ones(2)}, "extra": [torch.ones(3), big]}
    with opened(save(saved)) as checkpoint:
        assert [(s.path, s.tensors, s.nbytes) for s in checkpoint.sections] == [
            ("state_dict", 3, 4008),
            ("extra", 2, 4012),
        ]


def test_an_optimizer_keyed_by_tensors_is_measured_with_its_keys(save: Save) -> None:
    with opened(save({"moments": {nn.Parameter(torch.ones(3)): torch.ones(3)}})) as checkpoint:
        assert [(s.kind, s.tensors, s.nbytes) for s in checkpoint.sections] == [("collection", 2, 24)]


# Values and containers.


def test_values_that_are_no_plain_tensors_are_kept_and_named(save: Save, tmp_path: Path) -> None:
    saved = OrderedDict(SD)
    saved["layer._extra_state"] = {"scale": 3, "deep": [torch.ones(1)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # deprecated, and still in many files
        saved["q"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 3, torch.quint8)
    saved["s"] = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    path = save(saved)
    with opened(path) as checkpoint:
        assert checkpoint.origin.kind == "state_dict"
        assert list(checkpoint.state_dict.everything) == list(saved)
        assert list(checkpoint.state_dict) == list(SD)
        assert list(checkpoint.state_dict.extra) == ["layer._extra_state", "q", "s"]
        (finding,) = checkpoint.findings
        assert finding.code == "not-a-plain-tensor"
        assert finding.message.startswith("3 values")
        assert all(name in finding.message for name in ("layer._extra_state", "q (", "s ("))
    ckptkit.convert(path, tmp_path / "out.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == list(saved)
    assert torch.equal(written["q"].int_repr(), saved["q"].int_repr())
    assert torch.equal(written["s"].to_dense(), saved["s"].to_dense())
    assert written["layer._extra_state"]["scale"] == 3
    assert torch.equal(written["layer._extra_state"]["deep"][0], torch.ones(1))


def test_a_long_list_of_them_is_cut(save: Save) -> None:
    with opened(save({f"t{i}": torch.ones(1) for i in range(9)} | {f"v{i}": i for i in range(8)})) as checkpoint:
        assert checkpoint.findings[0].message.endswith("v4 (4) and 3 more")


def test_module_versions_and_attributes_are_kept(save: Save, tmp_path: Path) -> None:
    state_dict = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).state_dict()
    state_dict.note = {"by": "us"}
    path = save({"state_dict": state_dict, "n": 1})
    with opened(path) as checkpoint:
        versions = checkpoint.state_dict.versions
        assert versions is not None
        assert list(versions) == ["", "0", "1"]
        assert dict(mapping_items(versions["1"]) or []) == {"version": 2}
    ckptkit.convert(path, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)["state_dict"]
    assert type(written) is OrderedDict
    assert written._metadata == state_dict._metadata
    assert written.note == {"by": "us"}


@pytest.mark.parametrize("container", [dict, OrderedDict, lambda d: defaultdict(list, d)])
def test_the_containers_class_is_kept(save: Save, tmp_path: Path, container: Callable[[dict[str, Any]], Any]) -> None:
    for saved in (container(SD), {"state_dict": container(SD), "epoch": 1}):
        ckptkit.convert(save(saved), tmp_path / "out.pth", force=True)
        written = torch.load(tmp_path / "out.pth", weights_only=False)
        assert type(written) is type(saved)
        written, before = written.get("state_dict", written), saved.get("state_dict", saved)
        assert type(written) is type(before)
        assert list(written) == list(SD)
        assert getattr(written, "default_factory", None) is getattr(before, "default_factory", None)


def test_one_state_dict_under_two_keys_is_one(save: Save, tmp_path: Path) -> None:
    for keys in (("state_dict", "best"), ("best", "model"), ("a", "b")):
        path = save(dict.fromkeys(keys, SD) | {"epoch": 1})
        with opened(path) as checkpoint:
            assert checkpoint.origin.state_path == next((k for k in keys if k in CUSTOMARY_KEYS), keys[0])
            assert codes(checkpoint) == []
            assert len(checkpoint.sections) == 2
        ckptkit.convert(path, tmp_path / "out.pth", force=True, strip_prefix="conv")
        written = torch.load(tmp_path / "out.pth", weights_only=True)
        assert written[keys[0]] is written[keys[1]]
        assert list(written[keys[0]]) == ["weight", "bias"]


def test_what_weights_and_rest_share_stays_shared(save: Save, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(6.0))
    noted = nn.Parameter(torch.arange(3.0))
    noted.note = "an attribute"  # type: ignore[attr-defined]
    extra = ["shared"]
    saved = {
        "model": {"w": weight, "half": weight.data[3:], "noted": noted, "m._extra_state": extra},
        "anchor": [weight, weight.data[:1], noted, extra],
    }
    path = save(saved)
    with opened(path) as checkpoint:
        rest = dict(mapping_items(checkpoint.rest) or [])
        anchor: Any = rest["anchor"]
        assert anchor[0] is checkpoint.state_dict["w"]
        assert anchor[1].storage is checkpoint.state_dict["half"].storage
        assert anchor[2] is checkpoint.state_dict["noted"]
        assert anchor[3] is checkpoint.state_dict.everything["m._extra_state"]
    ckptkit.convert(path, tmp_path / "out.pth", map_location="cuda:0")
    written = torch.load(tmp_path / "out.pth", weights_only=False, map_location="cpu")
    assert written["anchor"][0] is written["model"]["w"]
    assert written["anchor"][2] is written["model"]["noted"]
    assert written["anchor"][2].note == "an attribute"
    assert written["anchor"][3] is written["model"]["m._extra_state"]
    storages = {t.untyped_storage().data_ptr() for t in (*written["anchor"][:2], written["model"]["half"])}
    assert len(storages) == 1


def test_keys_that_are_not_strings(save: Save) -> None:
    with opened(save({("a", 1): SD, 2: [torch.ones(1)], None: {"w": torch.ones(1)}, b"x": 1})) as checkpoint:
        assert facts(checkpoint) == [("?", "state_dict", False), ("2", "collection", False),
                                     ("None", "state_dict", False)]  # fmt: skip


# By hand: what torch would never write.


def raw(root: object) -> RawCheckpoint:
    return RawCheckpoint(root=root, format="torch-zip", metadata={})


def module_node(children: list[tuple[object, object]], parameters: list[tuple[object, object]] | None = None) -> Object:
    node = Object("newobj", Global("m", "M"), ())
    node.state = InertDict(
        [("_parameters", InertDict(parameters or [])), ("_buffers", InertDict()), ("_modules", InertDict(children))]
    )
    return node


@pytest.fixture
def entry(save: Save) -> Iterator[TensorEntry]:
    with opened(save(torch.ones(1), "one.pth")) as checkpoint:
        assert isinstance(checkpoint.rest, TensorEntry)
        yield checkpoint.rest


@pytest.fixture
def file(save: Save) -> Iterator[SourceFile]:
    with closing(SourceFile(save(1, "file.pth"))) as source:
        yield source


def test_a_module_that_contains_itself(entry: TensorEntry, file: SourceFile) -> None:
    inner = module_node([])
    outer = module_node([("inner", inner)])
    inner.state.pairs[2][1].pairs.append(("outer", outer))  # type: ignore[attr-defined]
    with pytest.raises(CorruptError, match=r"module 'inner\.outer' contains itself"):
        normalize(raw(outer), file)


def test_modules_nested_without_end() -> None:
    node = module_node([])
    for _ in range(999):
        node = module_node([("m", node)])
    assert list(walk_module(node)) == []
    with pytest.raises(LimitError, match="modules inside modules"):
        list(walk_module(module_node([("m", node)])))


def test_modules_shared_until_they_explode(entry: TensorEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.modules.DEFAULT_LIMITS", Limits(entries=10_000))
    node = module_node([], [("w", entry)])
    for _ in range(40):
        node = module_node([("a", node), ("b", node)])
    with pytest.raises(LimitError, match="modules and tensors in a model"):
        collections.deque(walk_module(node), maxlen=0)


def test_names_that_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.modules.DEFAULT_LIMITS", Limits(pickle_nbytes=1_000_000))
    node = module_node([])
    for _ in range(900):
        node = module_node([("m" * 100_000, node)])
    with pytest.raises(LimitError, match="characters of names"):
        list(walk_module(node))


def test_shared_dicts_are_entered_once(entry: TensorEntry, file: SourceFile) -> None:
    node: object = InertDict([("weight", entry)])
    for _ in range(4):
        node = InertDict([(f"k{i}", node) for i in range(1000)])
    checkpoint = normalize(raw(node), file)
    assert len(checkpoint.sections) == 1000
    assert {section.kind for section in checkpoint.sections} == {"state_dict"}
    assert checkpoint.origin.state_path == "k0.k0.k0.k0"  # one object, whatever leads to it


def test_one_large_value_under_many_keys(entry: TensorEntry, file: SourceFile) -> None:
    large = [[number] for number in range(20_000)]
    root = InertDict([*((f"k{i}", [large, i]) for i in range(20_000)), ("weights", InertDict([("w", entry)]))])
    checkpoint = normalize(raw(root), file)
    assert checkpoint.origin.state_path == "weights"


def test_sections_that_share_too_much(entry: TensorEntry, file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.sections.DEFAULT_LIMITS", Limits(opcodes=100_000))
    large = [entry, *([number] for number in range(1000))]
    assert len(normalize(raw(InertDict([(f"k{i}", [large, i]) for i in range(90)])), file).sections) == 90
    with pytest.raises(LimitError, match="parts that sections share"):
        normalize(raw(InertDict([(f"k{i}", [large, i]) for i in range(110)])), file)


def test_deep_extra_state_is_named_without_going_down(entry: TensorEntry, file: SourceFile) -> None:
    deep: list[object] = []
    top = deep
    for _ in range(100_000):
        deep.append([])
        deep = deep[0]  # type: ignore[assignment]
    checkpoint = normalize(raw(InertDict([("w", entry), ("m._extra_state", top)])), file)
    assert "m._extra_state (<list of 1>)" in checkpoint.findings[0].message


def test_cycles(entry: TensorEntry, file: SourceFile) -> None:
    root = InertDict([("state_dict", InertDict([("w", entry)]))])
    root.pairs += [("self", root), ("list", [root])]
    checkpoint = normalize(raw(root), file)
    assert checkpoint.origin.state_path == "state_dict"
    assert isinstance(checkpoint.rest, InertDict)
    assert checkpoint.rest["self"] is checkpoint.rest


def test_steps_and_nodes_in_messages() -> None:
    deep: tuple[Any, ...] = ()
    for _ in range(100_000):
        deep = (deep, deep)
    assert step(deep) == "?"
    assert step("k" * 1000) == "k" * 200
    assert step(b"k" * 1000) == repr(b"k" * 200)
    assert [step(key) for key in (1, 1.5, True, None, "")] == ["1", "1.5", "True", "None", ""]
    assert brief(deep) == "<tuple of 2>"
    assert brief([deep]) == "<list of 1>"
    assert brief("x" * 1_000_000) == "'" + "x" * 59
    assert brief(ABSENT) == "<absent>"
    while deep:  # taken apart by hand: to drop 100,000 nested tuples at once is a deep recursion in CPython
        deep = deep[0]


def test_an_old_ordered_dict_loses_nothing_when_written(entry: TensorEntry, file: SourceFile) -> None:
    # Python 2 passed the pairs as an argument.
    node = Object("reduce", Global("collections", "OrderedDict"), ([["w", entry], ["v", entry]],))
    checkpoint = normalize(raw(node), file)
    assert list(checkpoint.state_dict) == ["w", "v"]
    lowered = lower_state_dict(checkpoint.state_dict)
    assert isinstance(lowered, Object)
    assert lowered.args == ()
    assert lowered.pairs == [("w", entry), ("v", entry)]


def test_without_metadata_none_is_made_up(save: Save, tmp_path: Path) -> None:
    ckptkit.convert(save(OrderedDict(SD)), tmp_path / "out.pth")
    assert not hasattr(torch.load(tmp_path / "out.pth", weights_only=True), "_metadata")
