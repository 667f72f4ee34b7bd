"""What stands beside the weights: plain values kept in metadata and brought back, weights put under a key."""

from __future__ import annotations

import argparse
import collections
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptkit
from ckptkit.errors import RewriteError

Save = Callable[..., Path]

SD = {"enc.weight": torch.arange(4.0).reshape(2, 2), "enc.bias": torch.ones(2)}


def same(a: Any, b: Any) -> bool:
    """Whether two trees that torch loaded are equal, types and order included; NaN is NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, argparse.Namespace):
        return same(vars(a), vars(b))
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (math.isnan(a) and math.isnan(b)))
    return bool(a == b)


def there(source: Path, **options: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Convert to ``there.safetensors``; its metadata, and the messages of findings by their code."""
    report = ckptkit.convert(source, out := source.with_name("there.safetensors"), keep_beside=True, **options)
    with ckptkit.open(out) as file:
        return dict(file.metadata), {finding.code: finding.message for finding in report.findings}


def back(source: Path, **options: Any) -> Any:
    """What torch loads from the ``.pth`` that is made of ``there.safetensors``, without any other option."""
    ckptkit.convert(source.with_name("there.safetensors"), out := source.with_name("back.pth"), **options)
    return torch.load(out, weights_only=False)


WHISPER = {"dims": {"n_mels": 80, "n_vocab": 51865, "n_audio_ctx": 1500}, "model_state_dict": SD}
RVC = {"weight": SD, "config": [1025, 32, [3, 7], "0"], "info": "100epoch", "sr": "40k", "f0": 1, "version": "v2"}
YOLO = {"epoch": -1, "best_fitness": None, "model": SD, "ema": None, "updates": 5, "optimizer": None,
        "train_args": {"lr0": 0.01, "imgsz": [640, 640], "save": True}, "names": {0: "person", 1: "car"},
        "date": "2024-01-01T00:00:00"}  # fmt: skip
ODD = {
    "nan": math.nan, "inf": -math.inf, "zero": -0.0, "one": 1.0, "int": 1, "true": True, "big": 10**40, "none": None,
    "bytes": b"\x00\xff", "bytearray": bytearray(b"x"), "set": {1, 2}, "frozenset": frozenset("a"),
    "tuple": (1, (2, [3])), "keys": {1: "a", (1, 2): 3.5, None: 0, "$x": 1, False: 2}, "dollar": {"$weights": True},
    "size": torch.Size([1, 2]), "dtype": torch.float16, "ordered": collections.OrderedDict(b=1, a=2),
    "device": [torch.device("cuda:1"), torch.device("cpu")],
    "args": argparse.Namespace(lr=1e-3, inner=argparse.Namespace(x=[1])), "text": "é😀\x00", "model": SD, "": 5,
}  # fmt: skip
TREES: dict[str, Any] = {
    "whisper": WHISPER,
    "rvc": RVC,
    "yolo": YOLO,
    "odd": ODD,
    "nested": {"checkpoint": {"model": SD, "epoch": 2, "more": {"a": ()}}, "x": [1]},
    "ordered": collections.OrderedDict(epoch=1, model=SD),
    "a tuple": (SD, 3, {"lr": 0.1}),
    "a list": [SD, "text"],
    "the weights alone": {"state_dict": SD},
    "twice": {"model": SD, "best": SD, "epoch": 1},
    "among": {"height": 64, **SD, "use_mask": True, "version": "1", "sizes": [1, 2]},
    "beside and among": {"model": {"height": 64, **SD, "mask": None}, "epoch": 1},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", TREES)
def test_there_and_back(name: str, protocol: int, tmp_path: Path) -> None:
    torch.save(TREES[name], source := tmp_path / "model.pth", pickle_protocol=protocol)
    metadata, found = there(source)
    assert json.loads(metadata["ckptkit_beside"])["version"] == 1
    assert list(load_file(source.with_name("there.safetensors"))) == list(SD)
    assert not found.keys() & {"left-out", "not-kept", "plain-values"}
    assert same(back(source), TREES[name])
    with ckptkit.open(source.with_name("back.pth")) as file:
        assert "ckptkit_beside" not in file.metadata
    # From one .safetensors to another they stay, and come back from that.
    ckptkit.convert(source.with_name("there.safetensors"), source.with_name("next.safetensors"))
    with ckptkit.open(source.with_name("next.safetensors")) as file:
        assert file.metadata["ckptkit_beside"] == metadata["ckptkit_beside"]
    with ckptkit.open(source.with_name("next.safetensors")) as file:
        file.save(source.with_name("saved.pth"))
    assert same(torch.load(source.with_name("saved.pth"), weights_only=False), TREES[name])


def test_inspect_shows_them(save: Save) -> None:
    source = save({**WHISPER, "model_state_dict": {**SD, "height": 64}, "epoch": 3})
    there(source)
    document = ckptkit.inspect(source.with_name("there.safetensors"))
    assert document["metadata"]["height"] == 64
    assert document["metadata"]["dims.n_mels"] == 80
    assert document["training"]["scalars"]["epoch"] == 3
    assert "ckptkit_beside" not in document["metadata"]


def trained() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "e": argparse.ArgumentParser}


def test_what_is_more_is_named(save: Save) -> None:
    source = save(trained())
    with pytest.raises(RewriteError, match=r"beside the weights \(optimizer, e\): --weights-only"):
        there(source)
    metadata, found = there(source, weights_only=True)
    assert json.loads(metadata["ckptkit_beside"])["tree"] == {"model": {"$weights": True}, "epoch": 3}
    assert "optimizer (holds <float32 tensor []>), e (holds argparse.ArgumentParser)" in found["not-kept"]
    assert found["left-out"] == "not in the output: optimizer, e"
    assert found["kept-beside"].endswith("epoch")
    assert list(back(source)) == ["model", "epoch"]


def test_a_pth_keeps_them_in_their_places(save: Save) -> None:
    source = save(trained())
    ckptkit.convert(source, out := source.with_name("out.pth"), weights_only=True, keep_beside=True)
    assert list(torch.load(out, weights_only=True)) == ["model", "epoch"]
    ckptkit.convert(source, out := source.with_name("all.pth"), keep_beside=True)
    assert list(torch.load(out, weights_only=False)) == ["model", "optimizer", "epoch", "e"]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_have_them_in_the_index(ending: str, save: Save) -> None:
    source = save({**WHISPER, "model_state_dict": {**SD, **{f"w{i}": torch.ones(64, 64) for i in range(3)}}})
    for more in ({}, {"weights_only": True}):
        report = ckptkit.convert(
            source, source.with_name(f"there{ending}"), keep_beside=True, max_shard_size="20KB", force=True, **more
        )
        assert len(report.details["plan"]["shards"]) > 2
        ckptkit.convert(report.details["destination"], out := source.with_name("back.pth"), force=True)
        assert torch.load(out, weights_only=True)["dims"] == WHISPER["dims"]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)
        self.names = {0: "person", 1: "car"}
        self.stride = torch.tensor([8.0, 16.0])
        self.yaml = {"nc": 2, "anchors": ((1, 2), (3, 4))}
        self.criterion = nn.MSELoss()


def test_plain_attributes_of_a_model(save: Save) -> None:
    source = save({"epoch": -1, "model": Detector(), "optimizer": None})
    metadata, found = there(source)
    anchors = {"$tuple": [{"$tuple": [1, 2]}, {"$tuple": [3, 4]}]}
    own = {"names": {"$dict": [[0, "person"], [1, "car"]]}, "yaml": {"nc": 2, "anchors": anchors}}
    assert json.loads(metadata["ckptkit_beside"])["attributes"] == own
    assert found["kept-beside"].endswith("epoch, optimizer, model.names, model.yaml")
    loaded = back(source)
    assert (list(loaded), list(loaded["model"])) == (["epoch", "model", "optimizer"], ["head.weight", "head.bias"])
    for name in ("back.pth", "there.safetensors"):
        ckptkit.convert(
            source.with_name(name), out := source.with_name("again.safetensors"), keep_beside=True, force=True
        )
        with ckptkit.open(out) as file:
            assert file.metadata["ckptkit_beside"] == metadata["ckptkit_beside"]
    metadata, _ = there(save(Detector()), force=True)
    assert json.loads(metadata["ckptkit_beside"]) == {"version": 1, "tree": W, "attributes": own}


def test_other_options_apply_to_what_came_back(save: Save) -> None:
    source = save({"model": {f"module.{name}": tensor for name, tensor in SD.items()}, "epoch": 3, "args": [1]})
    there(source, strip_module=True)
    assert list(back(source, leave_out="args", add_prefix="x")) == ["model", "epoch"]
    assert list(back(source, weights_only=True, force=True)) == list(SD)
    assert list(back(source, as_key="net", force=True)) == ["net", "epoch", "args"]
    ckptkit.convert(source.with_name("there.safetensors"), out := source.with_name("w.safetensors"), weights_only=True)
    with ckptkit.open(out) as file:
        assert "ckptkit_beside" not in file.metadata


def test_names_among_the_tensors_follow_the_others(save: Save) -> None:
    source = save({f"module.{name}": value for name, value in TREES["among"].items()})
    there(source, strip_module=True)
    assert same(back(source), TREES["among"])


def test_they_are_bounded(save: Save) -> None:
    source = save({"model": SD, "vocabulary": ["word"] * 300_000, "small": 1, "deep": _deep(40), "wide": _wide(40)})
    metadata, found = there(source, weights_only=True)
    assert len(metadata["ckptkit_beside"]) < 100
    assert "vocabulary (too many values), deep (too many levels), wide (too many" in found["not-kept"]
    assert same(back(source), {"model": SD, "small": 1})


def _deep(levels: int) -> list[Any]:
    node: list[Any] = []
    for _ in range(levels):
        node = [node]
    return node


def _wide(levels: int) -> list[Any]:
    node: list[Any] = []
    for _ in range(levels):
        node = [node, node]
    return node


W: dict[str, Any] = {"$weights": True}
HOSTILE = {
    "no JSON": "{",
    "deep": '{"version":1,"tree":' + "[" * 60_000 + "]" * 60_000 + "}",
    "too deep": json.dumps({"version": 1, "tree": {"m": W, "x": _deep(40)}}),
    "long": json.dumps({"version": 1, "tree": {"m": W, "x": "a" * 3_000_000}}),
    "wide": json.dumps({"version": 1, "tree": {"m": W, "x": [[]] * 300_000}}),
    "another version": json.dumps({"version": 2, "tree": {"m": W}}),
    "no weights": json.dumps({"version": 1, "tree": {"m": 1}}),
    "weights everywhere": json.dumps({"version": 1, "tree": {f"m{i}": W for i in range(17)}}),
    "weights in a set": json.dumps({"version": 1, "tree": {"$set": [W]}}),
    "weights in an object": json.dumps({"version": 1, "tree": {"$namespace": [["m", W]]}}),
    "weights among themselves": json.dumps({"version": 1, "tree": {"m": W}, "among": [[0, "x", W]]}),
    "a tensor's name": json.dumps({"version": 1, "tree": {"m": W}, "among": [[0, "enc.bias", 1]]}),
    "attributes wrong": json.dumps({"version": 1, "tree": {"m": W}, "attributes": [1]}),
    "weights in attributes": json.dumps({"version": 1, "tree": {"m": W}, "attributes": {"a": W}}),
    "among wrong": json.dumps({"version": 1, "tree": {"m": W}, "among": [["x", 0, 1]]}),
    "a key twice": '{"version":1,"tree":{"m":{"$weights":true},"m":1}}',
    "half a pair": '{"version":1,"tree":{"m":{"$weights":true},"x":"\\ud800"}}',
    "an endless number": '{"version":1,"tree":{"m":{"$weights":true},"x":' + "9" * 4000 + "}}",
    **{
        f"{value}"[:40]: json.dumps({"version": 1, "tree": {"m": W, "x": value}})
        for value in (
            {"$call": ["os.system", "true"]}, {"$bytes": "!"}, {"$bytes": 3}, {"$float": "00"}, {"$float": 1.5},
            {"$dtype": ["os.system"]}, {"$dtype": "float16"}, {"$device": ["gpu"]}, {"$device": ["cpu", 0, 1]},
            {"$device": [1]},
            {"$size": ["a"]}, {"$set": [[]]}, {"$set": 1},
            {"$dict": [[[], 1]]}, {"$dict": [1]}, {"$namespace": [["__class__", 1]]}, {"$namespace": [[1, 1]]},
            {"$tuple": [1], "$set": [1]}, {"a": 1, "$b": 2}, {"$weights": 1},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_stays_text(name: str, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    save_file(SD, source, {"ckptkit_beside": HOSTILE[name]})
    for ending in ("pth", "safetensors"):
        ckptkit.convert(source, out := tmp_path / f"out.{ending}")
        with ckptkit.open(out) as file:
            assert file.metadata["ckptkit_beside"] == HOSTILE[name]
            assert list(file.state_dict) == sorted(SD)
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == sorted(SD)
    assert ckptkit.inspect(source)["kind"] == "state_dict"


@pytest.mark.parametrize(
    "tree", [{"optimizer": {"state": W, "param_groups": []}}, {"exp_avg": W, "step": 1}, {"a": W, "model": {}}, [[W]]]
)
def test_no_tree_hides_the_weights(tree: Any, tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    save_file(SD, source, {"ckptkit_beside": json.dumps({"version": 1, "tree": tree})})
    assert list(ckptkit.load_state_dict(source)) == sorted(SD)
    ckptkit.convert(source, tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert repr(loaded).count("tensor(") == len(SD)


# Plain values among the tensors.


def test_a_few_plain_values_make_it_no_other_kind(save: Save, same_bits: Callable[..., bool]) -> None:
    source = save(TREES["among"])
    with ckptkit.open(source) as file:
        assert (file.kind, list(file.state_dict)) == ("state_dict", list(SD))
    report = ckptkit.convert(source, out := source.with_name("out.safetensors"))
    (found,) = [finding for finding in report.findings if finding.code == "plain-values"]
    assert (found.severity, found.fix) == ("info", "--keep-beside")
    assert found.message.endswith("height, use_mask, version, sizes")
    assert report.details["operations"] == ["without_plain_values()"]
    assert all(same_bits(tensor, SD[name]) for name, tensor in load_file(out).items())
    ckptkit.convert(source, out := source.with_name("out.pth"))
    assert same(torch.load(out, weights_only=True), TREES["among"])
    assert same(dict(ckptkit.load_state_dict(source)), TREES["among"])


@pytest.mark.parametrize(
    "tree",
    [
        {"lr": 0.1, "epochs": 3, "mask": torch.ones(3), "name": "x"},
        {"epoch": 3, "loss": 0.5, "best.score": torch.tensor(0.5), "args": {"lr": 1}},
        {"a.weight": torch.ones(2), "args": argparse.Namespace(lr=1), "epoch": 3},
        {"a.weight": torch.ones(2), **{f"option{i}": i for i in range(5)}},
        {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [], "a.weight": torch.ones(1)},
    ],
)
def test_others_do_not_become_state_dicts(tree: Any, save: Save) -> None:
    with ckptkit.open(save(tree)) as file:
        assert file.kind != "state_dict"


def test_what_modules_save_of_their_own_is_refused_as_before(save: Save) -> None:
    source = save({**SD, "enc._extra_state": None})
    with pytest.raises(RewriteError, match="_extra_state"):
        ckptkit.convert(source, source.with_name("out.safetensors"))


# Weights under a key.


def put(source: Path, key: str, **options: Any) -> tuple[Any, dict[str, str]]:
    report = ckptkit.convert(source, out := source.with_name("out.pth"), as_key=key, force=True, **options)
    found = {finding.code: finding.message for finding in report.findings}
    assert f"PutUnder(key={key!r})" in report.details["operations"]
    return torch.load(out, weights_only=False), found


def test_weights_go_under_a_key(save: Save) -> None:
    resume = {"a": 1, "state_dict": SD, "epoch": 3}
    loaded, _ = put(save(resume), "params")
    assert same(loaded, {"a": 1, "params": SD, "epoch": 3})
    assert same(put(save(SD), "params")[0], {"params": SD})
    assert same(put(save(resume), "a.b", weights_only=True)[0], {"a": {"b": SD}})
    assert same(
        put(save({"model": SD, "more": {"x": 1}}), "more.model.net")[0], {"more": {"x": 1, "model": {"net": SD}}}
    )
    dotted = {"model.state_dict": {"w": torch.ones(3, 3)}, "x": SD}
    assert same(put(save(dotted), "model.state_dict", section="x")[0], {"model.state_dict": SD})
    assert list(put(save(nn.Linear(1, 1)), "net")[0]["net"]) == ["weight", "bias"]
    assert isinstance(put(save({"model": nn.Linear(1, 1), "e": 1}), "net")[0]["net"], nn.Linear)


def test_an_average_is_promoted(save: Save) -> None:
    model = nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    tree = {**trained(), "model": {"w": torch.ones(3, 3), "b": torch.ones(3)}, "model_ema": averaged.state_dict()}
    loaded, found = put(save(tree), "model", section="model_ema", strip_module=True, exclude="n_averaged")
    assert same(dict(loaded["model"]), dict(model.state_dict()))
    assert list(loaded) == ["model", "optimizer", "epoch", "e"]
    assert same(loaded["optimizer"], tree["optimizer"])
    assert "a state_dict of 2 tensors" in found["replaced"]
    with ckptkit.open(save(tree).with_name("out.pth")) as file:
        assert [section.path for section in file.sections if section.selected] == ["model"]


@pytest.mark.parametrize(
    ("tree", "key", "reason"),
    [
        ({"model": SD, "epoch": 3}, "epoch.x", "'epoch' exists and is 3"),
        ((SD, 3), "model", "<tuple of 2>, which has no keys; with --weights-only"),
        ({"model": SD}, "a..b", "is not a valid key"),
        ({"model": SD}, "", "is not a valid key"),
        ({"a": SD, "b": {"w": torch.ones(3, 3)}}, "model", "name the one to rewrite with --section"),
        ([torch.ones(1)], "model", "no state_dict to rewrite"),
    ],
)
def test_what_cannot_be_put(tree: Any, key: str, reason: str, save: Save) -> None:
    source = save(tree)
    with pytest.raises(ckptkit.CkptkitError) as raised:
        put(source, key)
    assert reason in str(raised.value)
    assert not source.with_name("out.pth").exists()


@pytest.mark.parametrize("more", [{"to": "safetensors"}, {"to": "safetensors-sharded"}, {"max_shard_size": "1KB"}])
def test_where_the_weights_are_alone_there_is_no_key(more: Any, save: Save) -> None:
    source = save({"model": SD})
    with pytest.raises(RewriteError, match=r"--as puts the weights under a key of a \.pth"):
        ckptkit.convert(source, source.with_name("out.pth"), as_key="x", **more)


def test_as_typed(save: Save, convert: Any) -> None:
    source = save({"model_ema": SD, "epoch": 3})
    assert convert(source, "out.pth", "--as", "model").code == 0
    assert list(torch.load("out.pth", weights_only=True)) == ["model", "epoch"]
    done = convert(source, "out.safetensors", "--keep-beside")
    assert (done.code, "kept in the metadata" in done.err) == (0, True)


def test_what_is_kept_is_not_replaced_by_metadata(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save({"model": {"w.weight": torch.ones(2)}, "dims": {"n": 4}})
    with pytest.raises(RewriteError, match="--metadata ckptkit_beside: that key is reserved for the plain values"):
        ckptkit.convert(
            path, out := tmp_path / "out.safetensors", keep_beside=True, metadata={"ckptkit_beside": "something"}
        )
    assert not out.exists()
