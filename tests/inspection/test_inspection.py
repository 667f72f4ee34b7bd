"""The inspect document: as the contract says, and complete, for honest and hostile trees."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import ckptkit
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, FileAccessError
from ckptkit.inspection import describe_error, natural_key, tensor_role, training_state
from ckptkit.pickling.inert import Global, InertDict, Object

Save = Callable[..., Path]

KEYS = {
    "path": str, "size": int, "format": str, "writer": (str, type(None)), "kind": str,
    "state_dict": (dict, type(None)), "sections": list, "storage": dict, "every_tensor": dict,
    "tensors": list, "metadata": dict, "training": dict, "trust": str, "globals": list, "modules": list,
    "architecture": list, "findings": list,
    "adapter": (dict, type(None)), "quantization": (dict, type(None)), "layout": (dict, type(None)),
    "part": (dict, type(None)), "error": type(None), "has_pickle": bool,
    "combined_fix": (dict, type(None)),
}  # fmt: skip
ELEMENTS: dict[str, dict[str, Any]] = {
    "state_dict": {"path": str, "tensors": int, "parameters": int, "buffers": int, "nbytes": int},
    "sections": {
        "path": str, "kind": str, "tensors": int, "parameters": (int, type(None)), "buffers": (int, type(None)),
        "nbytes": int, "share": float, "selected": bool,
    },
    "storage": {
        "storages": int, "nbytes": int, "unique_tensor_nbytes": int, "tied": int, "shared": int, "unused_nbytes": int,
    },
    "every_tensor": {"tensors": int, "locations": list, "dtypes": list, "roles_inferred": bool},
    "tensors": {
        "section": (str, type(None)), "name": str, "dtype": str, "shape": list, "stride": list, "nbytes": int,
        "location": str, "storage": str, "role": str, "role_inferred": bool, "tied_to": (str, type(None)),
    },
    "globals": {"name": str, "verdict": str, "count": int, "where": list, "reason": str},
    "modules": {"path": str, "class": str, "text": str, "settings": dict, "children": list},
    "training": {"scalars": dict, "optimizers": list, "schedulers": list},
    "findings": {"code": str, "severity": str, "message": str, "fix": (str, type(None))},
}  # fmt: skip
WORDS = {
    "format": {"torch-zip", "safetensors"},
    "kind": {"whole_model", "state_dict", "resume", "tensor", "collection", "other"},
    "trust": {"safe", "needs_trust", "hostile"},
    "role": {"parameter", "buffer", "unknown"},
    "verdict": {"torch", "allowed", "unknown", "dangerous"},
    "severity": {"info", "warning", "error"},
}


def assert_contract(document: dict[str, Any]) -> None:
    """Key by key what is promised."""

    def check(node: dict[str, Any], spec: dict[str, Any], more: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        assert set(spec) <= set(node) <= set(spec) | more
        for key, kind in spec.items():
            assert isinstance(node[key], kind), (key, node[key])
            assert key not in WORDS or node[key] in WORDS[key], (key, node[key])

    check(document, KEYS)
    for key, spec in ELEMENTS.items():
        found = document[key]
        for node in found if isinstance(found, list) else [found] * (found is not None):
            check(
                node,
                {k: v for k, v in spec.items() if (key, k) != ("sections", "kind")},
                {"stats", "kind", "form", "value"},
            )
    for tensor in document["tensors"]:
        assert all(type(n) is int for n in tensor["shape"] + tensor["stride"])
    for value in document["metadata"].values():
        assert value is None or isinstance(value, (str, int, float))
    json.dumps(document, allow_nan=False)


def inspect(path: Path, **options: Any) -> dict[str, Any]:
    document = ckptkit.inspect(path, **options)
    assert_contract(document)
    return document


def names(document: dict[str, Any]) -> list[str]:
    return [tensor["name"] for tensor in document["tensors"]]


def placed(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(tensor["section"], tensor["name"]) for tensor in document["tensors"]]


# Documents.


def test_a_resume_dict(save: Save) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    path = save({"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "top": torch.ones(())},
                device="cuda:1")  # fmt: skip
    document = inspect(path)
    assert document["path"] == str(path)
    assert document["size"] == path.stat().st_size
    assert (document["format"], document["kind"], document["trust"]) == ("torch-zip", "resume", "safe")
    state = model.state_dict()
    assert document["state_dict"] == {
        "path": "model",
        "tensors": 7,
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffers": sum(b.numel() for b in model.buffers()),
        "nbytes": sum(t.numel() * t.element_size() for t in state.values()),
    }
    assert [(s["path"], s["kind"], s["tensors"], s["selected"]) for s in document["sections"]] == [
        ("model", "state_dict", 7, True), ("optimizer", "optimizer", 4, False), ("top", "tensor", 1, False),
    ]  # fmt: skip
    assert placed(document)[:7] == [("model", name) for name in state]
    assert placed(document)[7:] == [*(("optimizer", f"state.{i}.momentum_buffer") for i in range(4)), ("top", "top")]
    first = document["tensors"][0]
    assert first == {
        "section": "model", "name": "0.weight", "dtype": "float32", "shape": [2, 1, 3, 3], "stride": [9, 9, 3, 1],
        "nbytes": 72, "location": "cuda:1", "storage": "0", "role": "parameter", "role_inferred": True, "tied_to": None,
    }  # fmt: skip
    assert {t["name"]: t["role"] for t in document["tensors"][:7] if t["role"] == "buffer"} == dict.fromkeys(
        ("1.running_mean", "1.running_var", "1.num_batches_tracked"), "buffer"
    )
    assert {t["role"] for t in document["tensors"][7:]} == {"unknown"}
    assert document["metadata"] == {"epoch": 3}
    assert {finding["code"] for finding in document["findings"]} == {"device-location", "training-state"}


def test_every_kind_of_file(save: Save) -> None:
    objects = [nn.Linear(1, 1), {"w": torch.ones(1)}, torch.ones(2), [torch.ones(1), [torch.ones(2)]], {"epoch": 1}, 3,
               torch.ones(2).untyped_storage(), {"model": nn.Linear(1, 1), "ema": nn.Linear(1, 1)}]  # fmt: skip
    assert [inspect(save(obj))["kind"] for obj in objects] == [
        "whole_model", "state_dict", "tensor", "collection", "other", "other", "tensor", "resume",
    ]  # fmt: skip
    assert placed(inspect(save(objects[2]))) == [("", "")]
    assert placed(inspect(save(objects[3]))) == [("", "0"), ("", "1.0")]
    assert placed(inspect(save(objects[6]))) == [("", "")]


def test_safetensors_and_errors(save: Save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(2, 2).t()})
    ckptkit.convert(path, tmp_path / "a.safetensors", metadata={"license": "MIT"}, receipt=False)
    document = inspect(tmp_path / "a.safetensors")
    assert document["metadata"] == {"format": "pt", "license": "MIT"}
    error = describe_error("x.pth", CorruptError("damaged", path="x.pth", where="data.pkl", offset=3))
    assert set(error) == set(KEYS)
    assert error["error"] == {"type": "CorruptError", "message": "damaged"}
    assert describe_error("x", FileAccessError("x: no"))["error"]["message"] == "x: no"
    json.dumps(error, allow_nan=False)


def test_resnet18_has_11689512_parameters(save: Save) -> None:
    model = torchvision.models.resnet18()
    for saved in (model.state_dict(), model, nn.DataParallel(model).state_dict()):
        summary = inspect(save(saved))["state_dict"]
        assert (summary["parameters"], summary["buffers"]) == (11_689_512, 9_620)
        assert summary["tensors"] == 122


def test_tied_tensors_count_once(save: Save) -> None:
    tied = nn.Linear(3, 5, bias=False)
    tied.weight = (embed := nn.Embedding(5, 3)).weight
    document = inspect(save(nn.ModuleDict({"embed": embed, "out": tied})))
    assert document["state_dict"]["parameters"] == 15
    assert document["state_dict"]["nbytes"] == 60
    assert [t["tied_to"] for t in document["tensors"]] == [None, "embed.weight"]


def test_ties_across_sections_and_of_the_same_name(save: Save) -> None:
    weight, other = torch.ones(2), torch.ones(3)
    saved = {"model": {"w": weight}, "ema": {"x": weight, "y": other}, "list": [weight, other, other]}
    document = inspect(save(saved), section="model")
    assert [(*placed, t["tied_to"]) for placed, t in zip(placed(document), document["tensors"], strict=True)] == [
        ("model", "w", None), ("ema", "x", "model.w"), ("ema", "y", None),
        ("list", "0", "model.w"), ("list", "1", "ema.y"), ("list", "2", "ema.y"),
    ]  # fmt: skip
    # One name in two sections is not one tensor.
    twins = inspect(save({"a": {"w": weight}, "b": {"w": other}}))
    assert [t["tied_to"] for t in twins["tensors"]] == [None, None]


# Filters and order.

NAMES = ["layer10.w", "layer2.w", "head.b", "layer2.b", "Layer1.w"]


@pytest.fixture
def named(save: Save) -> Path:
    return save({name: torch.ones(i % 3 + 1) for i, name in enumerate(NAMES)})


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((), NAMES),
        (("layer2.*",), ["layer2.w", "layer2.b"]),
        (("*.b", "head.*"), ["head.b", "layer2.b"]),
        (("layer?.w",), ["layer2.w"]),
        (("[Ll]ayer1.w",), ["Layer1.w"]),
        (("nothing",), []),
        (("w",), []),
    ],
)
def test_filters(named: Path, filters: tuple[str, ...], expected: list[str]) -> None:
    document = inspect(named, filters=filters)
    assert names(document) == expected
    assert document["state_dict"]["tensors"] == 5  # totals are of the file


def test_orders(named: Path) -> None:
    assert names(inspect(named)) == NAMES
    assert names(inspect(named, sort="name")) == ["Layer1.w", "head.b", "layer2.b", "layer2.w", "layer10.w"]
    assert names(inspect(named, sort="size")) == ["head.b", "layer2.w", "Layer1.w", "layer10.w", "layer2.b"]


def test_natural_order() -> None:
    ordered = ["", "1", "2", "10", "a", "a1", "a1.b2", "a1.b10", "a2", "a10", "a²", "b", "²", "٣"]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert sorted(shuffled, key=natural_key) == ordered
    assert sorted(["x" + "9" * 5000, "x1"], key=natural_key)[0] == "x1"  # no number is too long


def test_statistics_only_on_request(save: Save) -> None:
    path = save({"w": torch.tensor([1.0, 3.0]), "n": torch.tensor([float("nan"), float("inf")])})
    assert all("stats" not in tensor for tensor in inspect(path)["tensors"])
    document = inspect(path, stats=True)
    assert document["tensors"][0]["stats"] == {
        "min": 1.0, "max": 3.0, "mean": 2.0, "std": 1.0, "zeros": 0, "nan": 0, "inf": 0,
    }  # fmt: skip
    assert document["tensors"][1]["stats"]["nan"] == 1


# Roles.


@pytest.mark.parametrize(
    ("name", "dtype", "is_parameter", "known", "expected"),
    [
        ("fc.weight", "float32", False, False, ("parameter", True)),
        ("bn.running_mean", "float32", False, False, ("buffer", True)),
        ("running_var", "float32", False, False, ("buffer", True)),
        ("my_running_mean", "float32", False, False, ("parameter", True)),
        ("bn.num_batches_tracked", "int64", False, False, ("buffer", True)),
        ("index", "int64", False, False, ("buffer", True)),
        ("mask", "bool", False, False, ("buffer", True)),
        ("fc.weight", "float32", True, False, ("parameter", False)),
        ("running_mean", "float32", True, True, ("parameter", False)),
        ("fc.weight", "float32", False, True, ("buffer", False)),
    ],
)
def test_roles(name: str, dtype: str, is_parameter: bool, known: bool, expected: tuple[str, bool]) -> None:
    entry = TensorEntry(storage=None, storage_offset=0, shape=(), stride=(), dtype=dtype, is_parameter=is_parameter)  # type: ignore[arg-type]
    assert tensor_role(name, entry, known=known) == expected


# Training state.


def test_scalars_of_the_training_state(save: Save) -> None:
    saved = {
        "state_dict": {"w": torch.ones(1)},
        "epoch": 3,
        "best": 0.5,
        "none": None,
        "flag": True,
        "name": "x" * 300,
        "diverged": float("nan"),
        "low": -float("inf"),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], name="n"),
        "config": {"a": 1, "nested": {"b": 2}, 3: "no"},
        "ordered": OrderedDict(b=2, a=1),
        "values": [1, 2],
        4: "no",
    }
    metadata = inspect(save(saved))["metadata"]
    assert metadata == {
        "epoch": 3, "best": 0.5, "none": None, "flag": True, "name": "x" * 200 + "…", "diverged": "nan", "low": "-inf",
        "args.lr": 0.1, "args.name": "n", "config.a": 1, "ordered.b": 2, "ordered.a": 1,
    }  # fmt: skip


def test_there_are_not_endless_scalars() -> None:
    many = InertDict([(f"k{i}", i) for i in range(10_000)])
    assert len(training_state(many)) == 400
    assert len(training_state(InertDict([("args", many), ("more", many)]))) == 400
    assert training_state(InertDict([("k" * 1_000_000, 1)])) == {"k" * 200: 1}
    for node in (None, [1], "text", 3, Object("newobj", Global("m", "n"), ())):
        assert training_state(node) == {}


# Modules.


def test_modules_of_a_whole_model(save: Save) -> None:
    class_names = {"": "Sequential", "conv": "Conv2d", "block": "Sequential", "block.0": "BatchNorm2d", "act": "ReLU"}
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3, stride=2), block=nn.Sequential(nn.BatchNorm2d(2)),
                                      act=nn.ReLU()))  # fmt: skip
    modules = inspect(save(model))["modules"]
    assert {module["path"]: module["class"].rpartition(".")[2] for module in modules} == class_names
    assert [module["path"] for module in modules] == [name for name, _ in model.named_modules()]
    assert modules[0]["children"] == ["conv", "block", "act"]
    conv = modules[1]["settings"]
    assert (conv["in_channels"], conv["kernel_size"], conv["padding_mode"]) == (1, [3, 3], "zeros")
    assert "training" not in conv
    assert inspect(save(model.state_dict()))["modules"] == []


def test_sections_that_are_whole_models_have_their_names(save: Save) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
            self.register_buffer("cache", torch.ones(3), persistent=False)

    builtins.Net = Net  # type: ignore[attr-defined]
    Net.__module__, Net.__qualname__ = "builtins", "Net"
    try:
        path = save({"model": Net(), "ema": Net()})
    finally:
        del builtins.Net  # type: ignore[attr-defined]
    state = list(Net().state_dict())
    document = inspect(path)
    assert placed(document) == [
        *(("model", name) for name in state), (None, "model.cache"),
        *(("ema", name) for name in state), (None, "ema.cache"),
    ]  # fmt: skip
    chosen = inspect(path, section="ema")
    assert placed(chosen)[: len(state)] == [("ema", name) for name in state]


# Names and trust.


class Naming:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def test_hostile_files_are_described_and_not_run(save: Save, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    saved = {
        "w": {"fc": torch.ones(1)},
        "x": Naming(os.system, f"touch {proof}"),
        "y": Naming(exec, "raise SystemExit"),
    }
    document = inspect(save(saved))
    assert document["trust"] == "hostile"
    assert {use["name"]: use["verdict"] for use in document["globals"]}[f"{os.system.__module__}.system"] == "dangerous"
    assert any(f["code"] == "hostile-name" and f["severity"] == "error" for f in document["findings"])
    assert not proof.exists()
    assert inspect(save({"w": torch.ones(1), "p": Path("a")}))["trust"] == "needs_trust"


def test_odd_names(save: Save) -> None:
    odd = ["", ".", "a.b", "a b", 'quo"ted', "new\nline", "größe", "重み", "\ud800", "a/b::c", "__metadata__"]
    assert names(inspect(save({name: torch.ones(1) for name in odd}))) == odd
    odd_places = {1: [torch.ones(1)], (1, 2): {"x": torch.ones(1)}, None: torch.ones(1)}
    assert placed(inspect(save({"k": odd_places, "model": {"w": torch.ones(1)}}))) == [
        ("model", "w"), ("k.1", "0"), ("k.(1, 2)", "x"), ("k.None", "k.None"),
    ]  # fmt: skip


def test_tensors_in_objects(save: Save) -> None:
    noted = torch.ones(2)
    noted.mask = torch.zeros(3)  # type: ignore[attr-defined]
    saved = {"args": argparse.Namespace(best=torch.ones(1), more=[torch.ones(2), {"x": torch.ones(3)}]), "noted": noted}
    assert placed(inspect(save(saved))) == [
        ("args.more.1", "x"), ("args.best", "args.best"), ("args.more.0", "args.more.0"), ("noted", "noted"),
        ("noted", "mask"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11 on its own sparse tensors
def test_extra_values_are_listed_under_their_names(save: Save) -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    saved = {"w": torch.ones(1), "s": sparse, "m._extra_state": {"scale": torch.ones(1)}}
    document = inspect(save(saved))
    assert names(document) == ["w", "s.indices", "s.values", "m._extra_state.scale", "s"]
    assert document["state_dict"]["tensors"] == 1
