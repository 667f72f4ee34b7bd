"""``--max-shard-size``: what comes apart comes together again, in the loaders people have."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import ckptkit


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(8)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(12)))
    return net.state_dict()


def merged(index: str) -> dict[str, torch.Tensor]:
    """As loaders do it: each shard, by the index."""
    weight_map = json.loads(Path(index).read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    tied: dict[str, torch.Tensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        tensors = load_file(shard) if shard.endswith(".safetensors") else torch.load(shard, weights_only=True)
        if shard.endswith(".safetensors"):  # a tied name stands in the metadata alone
            with safe_open(shard, "pt") as file:
                tied |= {alias: tensors[kept] for alias, kept in file.metadata().items() if kept in tensors}
        assert set(tensors) == {name for name, at in weight_map.items() if at == shard}
        found |= tensors
    return {**{name: found[name] for name in weight_map}, **tied}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", pytest.param("model.pth", marks=pytest.mark.thorough)]
)
def test_apart_and_together(save, convert, converted, agree, state: dict[str, torch.Tensor], name: str) -> None:
    path = save(state, "source.pth")
    done = convert(path, name, "--max-shard-size", "4kB")
    assert done.code == 0, done.err
    index = f"{name}.index.json"
    assert done.out.startswith(f"{index}: {'safetensors' if name.endswith('safetensors') else 'torch'}-sharded, ")
    agree(merged(index), state)
    stem, ending = os.path.splitext(name)
    shards = sorted(set(os.listdir()) - {"source.pth", index})
    assert shards == [f"{stem}-{i + 1:05d}-of-{len(shards):05d}{ending}" for i in range(len(shards))]
    assert len(shards) > 4
    assert max(os.path.getsize(shard) for shard in shards) <= 4000
    assert json.loads(Path(index).read_text())["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    agree(converted(index, "one.pth"), state)
    agree(converted(index, "one.safetensors"), state, ordered=False)
    assert dict(torch.load("one.pth")._metadata) == dict(state._metadata)  # type: ignore[attr-defined]
    assert convert(index, "other.bin", "--max-shard-size", "3 kB").code == 0
    agree(merged("other.bin.index.json"), state)


def test_one_file_when_it_fits(save, convert, state: dict[str, torch.Tensor]) -> None:
    path = save(state)
    for name in ("a.safetensors", "a.bin"):
        assert convert(path, name, "--max-shard-size", "5GB").code == 0
        assert convert(path, f"b{name}").code == 0
        assert Path(name).read_bytes() == Path(f"b{name}").read_bytes()
    assert sorted(os.listdir()) == ["a.bin", "a.safetensors", "ba.bin", "ba.safetensors", "model.pth"]


def test_a_destination_that_is_an_index(save, convert, agree, state: dict[str, torch.Tensor]) -> None:
    path = save(state, "source.pth")
    assert convert(path, "m.safetensors.index.json", "--max-shard-size", "5kB").code == 0
    agree(merged("m.safetensors.index.json"), state)
    small = convert(path, "n.safetensors.index.json")
    assert small.code == 0  # five gigabytes a file, so that there is one
    assert small.out.startswith("n.safetensors: safetensors, ")


def test_with_everything_else(save, convert, agree, state: dict[str, torch.Tensor]) -> None:
    path = save({"epoch": 1, "model": OrderedDict((f"module.{n}", t) for n, t in state.items())}, "source.pth")
    options = ["--weights-only", "--strip-module", "--dtype", "float16", "--exclude", "3.*", "--max-shard-size", "2KB"]
    assert convert(path, "m.safetensors", *options).code == 0
    expected = {n: t.half() if t.is_floating_point() else t for n, t in state.items() if not n.startswith("3.")}
    agree(merged("m.safetensors.index.json"), expected)


def test_ties_and_views(save, convert, converted, agree) -> None:
    base = torch.randn(300)
    state = {"a": base, "x": torch.randn(400), "tied": base, "y": torch.randn(400), "part": base[100:200]}
    path = save(state, "source.pth")
    for name in ("m.safetensors", "m.bin"):
        assert convert(path, name, "--max-shard-size", "3000").code == 0
        agree(merged(f"{name}.index.json"), state, ordered=False)
        weight_map = json.loads(Path(f"{name}.index.json").read_text())["weight_map"]
        assert "a" in weight_map
        assert ("tied" in weight_map) == (name == "m.bin"), "what a shard has under another name is not listed"
        written = converted(f"{name}.index.json", f"{name}.pth")
        agree(written, state)
        assert written["a"].data_ptr() == written["tied"].data_ptr()


def test_the_plan(save, convert, state: dict[str, torch.Tensor]) -> None:
    path = save(state, "source.pth")
    options = ["m.safetensors", "--max-shard-size", "4kB", "--no-receipt"]
    plan = json.loads(convert(path, *options, "--dry-run", "--json").out)["plan"]
    table = convert(path, *options, "--dry-run").out
    assert os.listdir() == ["source.pth"]
    assert convert(path, *options).code == 0
    assert {shard["name"]: shard["nbytes"] for shard in plan["shards"]} == {
        name: os.path.getsize(name) for name in os.listdir() if name.startswith("m-")
    }
    assert plan["nbytes"] == sum(os.path.getsize(name) for name in os.listdir() if name.startswith("m"))
    first = plan["shards"][0]
    assert f"shard: {first['name']}  {first['tensors']} tensors, {first['nbytes']:,} bytes" in table


def test_overwriting_leaves_no_old_shard(save, convert, refused, agree, state: dict[str, torch.Tensor]) -> None:
    path = save(state, "source.pth")
    assert convert(path, "m.safetensors", "--max-shard-size", "2kB").code == 0
    many = len(os.listdir())
    assert "m.safetensors.index.json: already exists; --force" in refused(
        path, "m.safetensors", "--max-shard-size", "9kB"
    )
    assert convert(path, "m.safetensors", "--max-shard-size", "9kB", "--force").code == 0
    assert len(os.listdir()) < many
    agree(merged("m.safetensors.index.json"), state)
    assert {f"{name}" for name in os.listdir() if name.startswith("m-")} == set(
        json.loads(Path("m.safetensors.index.json").read_text())["weight_map"].values()
    )


@pytest.mark.parametrize("options", [[], ["--include", "0.*"]])
def test_a_shard_of_the_source_is_not_written_over(
    save, convert, refused, state: dict[str, torch.Tensor], options: list[str]
) -> None:
    assert convert(save(state, "source.pth"), "m.safetensors", "--max-shard-size", "9kB").code == 0
    index, shard = "m.safetensors.index.json", next(name for name in os.listdir() if name.startswith("m-00002-"))
    Path("link.safetensors").symlink_to(shard)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    for taken in (shard, "link.safetensors"):
        assert "is one of the files being read, and all of them" in refused(index, taken, "--force", *options)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-shard-size", "0"], "'0' is not a valid size; write it like 5GB"),
        (["--max-shard-size", "-5GB"], "'-5GB' is not a valid size"),
        (["--max-shard-size", "lots"], "'lots' is not a valid size"),
        (["--max-shard-size", "5XB"], "'5XB' is not a valid size"),
        (["--max-shard-size", ""], "'' is not a valid size"),
    ],
)
def test_bad_sizes(save, refused, state: dict[str, torch.Tensor], options: list[str], words: str) -> None:
    assert words in refused(save(state), "out.safetensors", *options)


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin"])
def test_training_state_has_no_place(save, refused, state: dict[str, torch.Tensor], name: str) -> None:
    path = save({"epoch": 3, "model": state})
    line = refused(path, name, "--max-shard-size", "4kB")
    assert "cannot store what is beside the weights (epoch): --weights-only leaves it out" in line


def test_in_python(
    save, tmp_path: Path, agree, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(state, "source.pth")
    monkeypatch.chdir(tmp_path)
    for size in (4000, "4kB"):
        report: Any = ckptkit.convert(path, "m.safetensors", max_shard_size=size, force=True)
        assert report.details["destination"] == "m.safetensors.index.json"
        agree(merged("m.safetensors.index.json"), state)
    agree(ckptkit.load_state_dict("m.safetensors.index.json"), state)
