"""Names that break tools: wherever they lead, the tensors arrive under them, and nothing acts on a terminal."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

NAMES = [
    "", ".", "..", "a.", ".a", "a..b", "module", "module.", "module..w", "net.module.w", "x._orig_mod.w",
    "module.x._orig_mod", "größe.重み.😀", "e\u0301", "\u00e9", "with space", "tab\there", "line\nbreak", "null\0byte",
    "\x1b[31mred", "\u202ereversed", "\"double\" 'single' `back`", "back\\slash", "a/b::c", "{brace} %s $HOME",
    "*.weight", "[ab]?", "-dash", "--flag", "a=>b", "a=b", "format", "ckptkit_receipts", "torch._metadata", "_metadata",
    "state_dict", "x" * 5000, "1", "None",
]  # fmt: skip


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(i)) for i, name in enumerate(NAMES)}


def test_they_survive(save, converted, agree, state: dict[str, torch.Tensor]) -> None:
    path = save(state)
    agree(converted(path, "out.pth"), state)
    agree(converted(path, "out.safetensors"), state, ordered=False)
    agree(converted("out.safetensors", "back.pth"), state, ordered=False)
    agree(converted("back.pth", "again.safetensors"), state, ordered=False)


def test_in_shards(save, convert, converted, agree, state: dict[str, torch.Tensor]) -> None:
    path = save(state)
    for name in ("m.safetensors", "m.bin"):
        assert convert(path, name, "--max-shard-size", "6kB").code == 0
        assert Path(f"{name}.index.json").exists()
        agree(converted(f"{name}.index.json", f"{name}.pth"), state)


def test_prefixes(save, converted, agree, state: dict[str, torch.Tensor]) -> None:
    path = save(state)
    added = converted(path, "added.pth", "--add-prefix", "größe")
    agree(added, {f"größe.{name}": tensor for name, tensor in state.items()})
    agree(converted("added.pth", "back.pth", "--strip-prefix", "größe"), state)
    agree(converted(path, "module.pth", "--add-module"), {f"module.{name}": tensor for name, tensor in state.items()})


def test_strip_module(save, converted, agree) -> None:
    names = {
        "module.größe": "größe",
        "module._orig_mod.": "",
        "module.x._orig_mod.y\nz": "x.y\nz",
        "_orig_mod.a._orig_mod._orig_mod.b": "a.b",
        "module.module": "module",
        "module..w": ".w",
        "net.module.w": "net.module.w",
        "modüle.w": "modüle.w",
    }
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    agree(converted(save(state), "out.pth", "--strip-module"), {names[name]: tensor for name, tensor in state.items()})


def test_versions_and_param_names_of_odd_names(save, convert, converted) -> None:
    state: Any = OrderedDict({"module.größe._orig_mod.w\n": torch.ones(2), "module.x": torch.ones(3)})
    paths = ["", "module", "module.größe", "module.größe._orig_mod"]
    state._metadata = OrderedDict((path, {"version": i + 1}) for i, path in enumerate(paths))
    group = {"lr": 0.1, "params": [0, 1, 2], "param_names": [*state, "elsewhere"]}
    path = save({"model": state, "optimizer": {"state": {}, "param_groups": [group]}})
    assert convert(path, "out.pth", "--strip-module").code == 0
    written = torch.load("out.pth", weights_only=True)
    assert list(written["model"]) == ["größe.w\n", "x"]
    assert written["optimizer"]["param_groups"][0]["param_names"] == ["größe.w\n", "x", "elsewhere"]
    assert dict(written["model"]._metadata) == {"": {"version": 2}, "größe": {"version": 4}}
    converted(path, "out.safetensors", "--strip-module", "--weights-only")
    with safe_open("out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["torch._metadata"]) == {"": {"version": 2}, "größe": {"version": 4}}


def test_keys_that_are_no_strings_stay_beside(save, convert, agree) -> None:
    saved = {"model": {"w": torch.ones(2)}, 3: "three", (1, "a"): 4, None: 5, True: 6, b"raw": 7}
    assert convert(save(saved), "out.pth").code == 0
    written = torch.load("out.pth", weights_only=False)
    assert list(written) == list(saved)
    agree(written.pop("model"), saved.pop("model"))
    assert written == saved


def test_nothing_acts_on_a_terminal(save, convert, state: dict[str, torch.Tensor]) -> None:
    z = torch.zeros(1, dtype=torch.complex128)
    path = save({f"module.{name}": tensor for name, tensor in state.items()} | {"module.z\x1b[2J\nz": z})
    for options in (
        ["out.pth", "--strip-module", "--dry-run"],
        ["out.pth", "--strip-module", "--exclude", "*"],
        ["out.pth", "--strip-module", "--include", "zzz"],
        ["out.pth", "--rename", ".*=>same"],
        ["out.safetensors", "--strip-module"],
        ["out.safetensors", "--exclude", "module.z?[[]2J?z", "--add-prefix", "\x1b[31m", "--dtype", "float16"],
    ):
        done = convert(path, *options)
        for text in (done.out, done.err):
            assert all(line.isprintable() for line in text.split("\n")), text


def test_a_name_that_cannot_be_typed_is_matched_all_the_same(save, refused, converted) -> None:
    z = torch.zeros(1, dtype=torch.complex128)
    path = save({"w": torch.ones(1), "z\x1b\n[1]": z})
    line = refused(path, "out.safetensors")
    assert "--exclude 'z??[[]1]' leaves them out" in line
    assert list(converted(path, "out.safetensors", "--exclude", "z??[[]1]")) == ["w"]


def test_a_tie_under_a_name_of_the_metadata(save, converted, agree) -> None:
    shared = torch.ones(3)
    state = {"format": shared, "a": shared, "ckptkit_receipts": torch.zeros(2)}
    path = save(state)
    written = converted(path, "out.safetensors")
    assert set(written) <= set(state)
    agree(converted("out.safetensors", "back.pth"), state, ordered=False)
