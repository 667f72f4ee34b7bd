"""State_dicts whose modules are dicts inside dicts: what is one, under which names, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ckptkit
from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry
from ckptkit.normalize import lower_state_dict
from ckptkit.pickling.inert import Global, InertDict, Object

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
Opened = Callable[..., AbstractContextManager[Checkpoint]]
SameWeights = Callable[[StateDict, dict[str, torch.Tensor]], None]
Normalized = Callable[..., Checkpoint]


def layer(*sizes: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(*sizes), "bias": torch.randn(sizes[0])}


def block() -> dict[str, Any]:
    return {"attention": {"query": layer(4, 4), "out": layer(4, 4)}, "norm": {"weight": torch.ones(4)}}


MEGATRON = {
    "embedding": {
        "word_embeddings": {"weight": torch.randn(8, 4)},
        "position_embeddings": {"weight": torch.randn(3, 4)},
    },
    "encoder": {"layers.0.norm.weight": torch.ones(4), "layers.0.mlp.weight": torch.randn(4, 4)},
}
NESTED: dict[str, tuple[str, Any]] = {
    "Megatron": ("model", {"model": {"language_model": MEGATRON}, "iteration": 3, "checkpoint_version": 3.0}),
    "BERT of Megatron": (
        "model", {"model": {"language_model": MEGATRON, "lm_head": layer(4, 4) | {"a.weight": torch.ones(1)}}, "n": 1}
    ),
    "leaf modules alone": ("state_dict", {"state_dict": {"embed": {"weight": torch.ones(3, 2)}, "head": layer(3, 2)}}),
    "one leaf, far down": ("model", {"model": {"a": {"b": {"w": torch.ones(2)}}}, "epoch": 1}),
    "flax": ("params", {"step": 3, "params": {"Dense_0": {"kernel": torch.ones(2, 3), "bias": torch.ones(3)},
                                            "Block_1": {"Dense_0": {"kernel": torch.ones(3, 3)}}}}),
    "modules called like sections": ("model", {"model": {"model": {"layers": {"0": layer(2, 2)}}, "net": layer(2, 2)}}),
    "a tensor among the modules": ("model", {"model": {"scale": torch.ones(1), "a": block(), "b": block()}}),
    "a file of its own": ("", {"language_model": MEGATRON}),
    "a file of several": ("", {"encoder": block(), "decoder": {"layers": [block()][0]}}),
    "beside what trains it": ("net", {
        "net": {"a": block(), "b": block()}, "epoch": 1,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}}),
    "under a key of its own": ("backbone", {"backbone": {"stem": block(), "top": block()}, "epoch": 1}),
}  # fmt: skip


def by_hand(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        found |= by_hand(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def shape_of(tree: Any) -> Any:
    """Types, keys and values of a tree of dicts; tensors as their values."""
    if isinstance(tree, dict):
        return type(tree), [(key, shape_of(value)) for key, value in tree.items()], getattr(tree, "_metadata", None)
    return (tree.dtype, tree.tolist()) if isinstance(tree, torch.Tensor) else tree


@pytest.mark.parametrize("case", NESTED)
def test_names_and_what_is_written(
    save: Save, opened: Opened, same_weights: SameWeights, same_bits: SameBits, tmp_path: Path, case: str
) -> None:
    path, saved = NESTED[case]
    file = save(saved)
    weights = by_hand(saved[path] if path else saved)
    with opened(file) as checkpoint:
        assert checkpoint.origin.state_path == path
        assert checkpoint.origin.kind == ("resume" if path else "state_dict")
        same_weights(checkpoint.state_dict, weights)
        assert [finding.code for finding in checkpoint.findings] == ["nested-names"]
        assert next(s for s in checkpoint.sections if s.selected).tensors == len(weights)
    names = [row["name"] for row in ckptkit.inspect(file)["tensors"] if row["section"] == path]
    assert names == list(weights)
    ckptkit.convert(file, tmp_path / "same.pth")
    assert shape_of(torch.load(tmp_path / "same.pth", weights_only=True)) == shape_of(saved)
    for name in ("flat.pth", "flat.safetensors"):
        ckptkit.convert(file, tmp_path / name, weights_only=True)
        loaded = torch.load(tmp_path / name) if name == "flat.pth" else load_file(tmp_path / name)
        assert sorted(loaded) == sorted(weights)
        assert all(same_bits(loaded[key], tensor) for key, tensor in weights.items())
        with opened(tmp_path / name) as checkpoint:
            assert "nested-names" not in [finding.code for finding in checkpoint.findings]
    state = ckptkit.load_state_dict(file)
    assert all(same_bits(state[key], tensor) for key, tensor in weights.items())
    assert ckptkit.diff(file, tmp_path / "flat.safetensors").equal


def models() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.ones(2, 2), "conv.bias": torch.ones(2)}


HEAD = layer(2, 2)
OTHERS: dict[str, Any] = {
    "several models": {"model": {"generator": models(), "critic": models()}, "n": 1},
    "the file's own dict": {"encoder": layer(2, 2), "decoder": layer(3, 2)},
    "one model under two keys": {"state_dict": {"net": layer(2, 2)}},
    "a model and its average": {"model": {"net": {"a": layer(2, 2)}, "ema": {"a": layer(2, 2)}}},
    "two names that become one": {
        "model": {"a": {"b.c": torch.ones(2), "d": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}
    },
    "moments": {"params": {"exp_avg": {"a": layer(2, 2)}, "exp_avg_sq": {"a": layer(2, 2)}}},
    "an optimizer's own names": {"opt_state": {"mu": {"a": layer(2, 2)}, "nu": {"a": layer(2, 2)}}, "n": 1},
    "something else inside": {"model": {"a": layer(2, 2), "b": layer(2, 2), "epochs": [3]}},
    "keys that are numbers": {"model": {0: layer(2, 2), 1: layer(2, 2)}},
    "counts": {"model": {"a": {"hits": torch.tensor(1)}, "b": {"hits": torch.tensor(2)}}},
    "dicts of it elsewhere": {"model": {"a": HEAD, "b": layer(2, 2)}, "best": HEAD},
    "a data set": {"train": {"first": {"x": torch.ones(2), "y": torch.ones(2)}}, "test": {"x": torch.ones(2)}},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_none(save: Save, opened: Opened, tmp_path: Path, case: str) -> None:
    file = save(OTHERS[case])
    with opened(file) as checkpoint:
        assert "nested-names" not in [finding.code for finding in checkpoint.findings]
        assert checkpoint.origin.state_path in (None, "state_dict.net")
    ckptkit.convert(file, tmp_path / "same.pth")
    assert shape_of(torch.load(tmp_path / "same.pth", weights_only=True)) == shape_of(OTHERS[case])


def test_each_copy_is_listed(save: Save, opened: Opened) -> None:
    copies = {"params": {"a": block()}, "params_ema": {"a": block()}, "step": 1}
    with opened(save(copies)) as checkpoint:
        assert checkpoint.origin.state_path == "params"
    two = {"model": {"a": block(), "b": block()}, "net": {"c": block(), "d": block()}}
    file = save(two)
    with opened(file) as checkpoint:
        assert [(s.path, s.kind) for s in checkpoint.sections] == [("model", "state_dict"), ("net", "state_dict")]
        assert [finding.code for finding in checkpoint.findings] == ["ambiguous-section"]
    rows = ckptkit.inspect(file)["tensors"]
    assert [row["name"] for row in rows if row["section"] == "net"] == list(by_hand(two["net"]))
    with opened(file, section="net") as checkpoint:
        assert list(checkpoint.state_dict) == list(by_hand(two["net"]))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)


def test_module_versions(save: Save, opened: Opened, tmp_path: Path) -> None:
    """BatchNorm's decides how it loads: those of the dicts inside become one `_metadata` under whole paths."""
    model = Parts()
    file = save({"model": {name: part.state_dict() for name, part in model.named_children()}, "epoch": 1})
    ckptkit.convert(file, tmp_path / "flat.pth", weights_only=True)
    flat = torch.load(tmp_path / "flat.pth", weights_only=True)
    versions = {path: entry for path, entry in model.state_dict()._metadata.items() if path}  # type: ignore[attr-defined]
    assert dict(flat._metadata) == versions
    assert Parts().load_state_dict(flat) == ([], [])
    ckptkit.convert(file, tmp_path / "same.pth")
    assert shape_of(torch.load(tmp_path / "same.pth", weights_only=False)) == shape_of(
        torch.load(file, weights_only=False)
    )
    ckptkit.convert(file, tmp_path / "flat.safetensors", weights_only=True)
    with opened(tmp_path / "flat.safetensors") as checkpoint:
        assert set(checkpoint.state_dict.versions or ()) == set(versions)


def test_what_changes_them(save: Save, tmp_path: Path) -> None:
    """The dicts stay while every name does; new names and names left out make them flat, which is told."""
    tree = {"lm": MEGATRON, "head": {"weight": MEGATRON["embedding"]["word_embeddings"]["weight"]}}
    file = save({"model": tree, "epoch": 1})

    def written(**options: Any) -> tuple[Any, list[str]]:
        report = ckptkit.convert(file, tmp_path / "out.pth", force=True, **options)
        return torch.load(tmp_path / "out.pth", weights_only=True)["model"], [f.code for f in report.findings]

    for options in ({"map_location": "cpu"}, {"leave_out": "epoch"}, {"exclude": "nothing"}, {"rename": "zzz=>y"}):
        model, codes = written(**options)
        assert shape_of(model) == shape_of(tree)
        assert "nested-names" not in codes
        assert model["head"]["weight"] is model["lm"]["embedding"]["word_embeddings"]["weight"]
    model, _ = written(dtype="float16")
    assert model["lm"]["encoder"]["layers.0.norm.weight"].dtype == torch.float16
    model, codes = written(rename="^lm=>language_model")
    assert list(model) == [name.replace("lm.", "language_model.") for name in by_hand(tree)]
    assert "nested-names" in codes
    model, codes = written(exclude="head.*")
    assert list(model) == list(by_hand({"lm": MEGATRON}))
    assert "nested-names" in codes
    report = ckptkit.convert(file, tmp_path / "m.bin", weights_only=True, max_shard_size=900)
    index = json.loads(Path(report.details["destination"]).read_text())
    assert list(index["weight_map"]) == list(by_hand(tree))
    assert list(ckptkit.load_state_dict(report.details["destination"])) == list(by_hand(tree))


def test_without_end(normalized: Normalized, entry: TensorEntry) -> None:
    """Dicts inside themselves, in each other's place, and deeper than any model: none is gone through for ever."""
    leaf = InertDict([("weight", entry)])
    itself = InertDict([("a", leaf)])
    itself.pairs.append(("b", itself))
    shared: object = leaf
    for _ in range(12):
        shared = InertDict([("a", shared), ("b", shared), ("c", shared)])
    deep: object = leaf
    for _ in range(50):
        deep = InertDict([("a", deep)])
    for tree in (itself, shared, deep):
        checkpoint = normalized(InertDict([("model", tree), ("epoch", 1)]))
        assert "nested-names" not in [finding.code for finding in checkpoint.findings]


def test_an_empty_module_and_attributes(normalized: Normalized, entry: TensorEntry) -> None:
    """A dict without tensors stays in its place; one that carries more than versions is something else."""
    inner = InertDict([("a", InertDict([("weight", entry)])), ("none", InertDict()), ("b", InertDict([("w", entry)]))])
    inner.pairs.append(("_extra_state", None))
    checkpoint = normalized(InertDict([("model", inner), ("n", 1)]))
    assert list(checkpoint.state_dict) == ["a.weight", "b.w"]
    assert checkpoint.state_dict.extra == {"_extra_state": None}
    lowered = lower_state_dict(checkpoint.state_dict)
    assert isinstance(lowered, InertDict)
    assert [key for key, _ in lowered.pairs] == ["a", "none", "b", "_extra_state"]
    odd = Object("reduce", Global("collections", "OrderedDict"), ())
    odd.pairs, odd.state = [("weight", entry)], InertDict([("scale", entry)])
    inner.pairs.append(("odd", odd))
    assert normalized(InertDict([("model", inner), ("n", 1)])).origin.state_path is None


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"ckpt": {"state_dict": layer(2, 2)}}, "ckpt.state_dict"),
        ({"trainer": {"model": layer(2, 2)}}, "trainer.model"),
        ({"run": {"best": {"model_state": layer(2, 2)}}}, "run.best.model_state"),
    ],
)
def test_what_leads_to_weights_is_no_part_of_their_names(save: Save, tree: dict[str, Any], path: str) -> None:
    document = ckptkit.inspect(save(tree))
    assert document["state_dict"]["path"] == path
    assert [row["name"] for row in document["tensors"]] == list(layer(2, 2))
