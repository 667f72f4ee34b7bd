"""Options that rename: what torch loads afterwards has the names that renaming by hand gives, in the same order."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import ckptkit


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.mlp_module = nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)


def by_hand(state: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(name): tensor for name, tensor in state.items()}


def strip(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


@pytest.fixture
def model() -> Inner:
    torch.manual_seed(4)
    return Inner()


CASES = [
    (["--add-module"], lambda name: f"module.{name}"),
    (["--add-prefix", "net.body"], lambda name: f"net.body.{name}"),
    (["--add-prefix", "net.body."], lambda name: f"net.body.{name}"),
    (["--strip-prefix", "features"], strip("features.")),
    (["--strip-prefix", "features.0."], strip("features.0.")),
    (["--strip-prefix", "feat"], strip("feat.")),
    (["--strip-module"], lambda name: name),
    (["--strip-module", "--add-module"], lambda name: f"module.{name}"),
    (["--strip-prefix", "features", "--add-prefix", "x"], lambda name: f"x.{name.removeprefix('features.')}"),
    (["--add-module", "--add-prefix", "x"], lambda name: f"x.module.{name}"),
    (["--rename", "^features\\.=>backbone."], lambda name: re.sub(r"^features\.", "backbone.", name)),
    (["--rename", "a=>e", "--rename", "e=>a"], lambda name: name.replace("a", "e").replace("e", "a")),
    (
        ["--rename", r"^features\.(\d+)\.=>layer\1_", "--rename", r"^(?P<module>head|mlp)=>top.\g<module>"],
        lambda name: re.sub("^(head|mlp)", r"top.\1", re.sub(r"^features\.(\d+)\.", r"layer\1_", name)),
    ),
    (["--add-module", "--rename", r"^module\.=>m."], lambda name: f"m.{name}"),
]


@pytest.mark.parametrize(("options", "rename"), CASES, ids=[" ".join(options) for options, _ in CASES])
def test_renaming(save, converted, agree, model: Inner, options: list[str], rename: Callable[[str], str]) -> None:
    state = model.state_dict()
    path = save(state)
    agree(converted(path, "out.pth", *options), by_hand(state, rename))
    agree(converted(path, "out.safetensors", *options), by_hand(state, rename), ordered=False)


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.module."],
)
def test_wrappers_peel_in_any_order(save, converted, agree, model: Inner, wrapper: str) -> None:
    state = model.state_dict()
    path = save(by_hand(state, lambda name: wrapper + name))
    agree(converted(path, "out.pth", "--strip-module"), state)
    agree(converted("out.pth", "again.pth", "--strip-module"), state)
    rewrapped = converted("out.pth", "ddp.pth", "--add-module")
    agree(rewrapped, by_hand(state, lambda name: f"module.{name}"))
    nn.DataParallel(model).load_state_dict(rewrapped)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about what it imports to compile
def test_real_wrappers(save, converted, tmp_path: Path, model: Inner) -> None:
    """torch.compile of a part puts `_orig_mod` in the middle of names; the versions of modules follow."""
    expected = model.state_dict()
    model.features = torch.compile(model.features)
    wrapped = nn.DataParallel(torch.compile(model)).state_dict()
    assert "module._orig_mod.features._orig_mod.1.num_batches_tracked" in wrapped
    written = converted(save(wrapped), "out.pth", "--strip-module")
    assert list(written) == list(expected)
    assert dict(written._metadata) == dict(expected._metadata)
    Inner().load_state_dict(written)
    torch.save(expected, tmp_path / "expected.pth")
    assert list(torch.load("expected.pth")) == list(written)


def test_names_that_look_like_wrappers_stay(save, converted, agree) -> None:
    names = [
        "mlp_module.w", "modules.w", "submodule.module.w", "net.module.module", "module", "_orig_mod", "x_orig_mod.w",
        "module_.w", "Module.w", "_orig_mod_.w",
    ]  # fmt: skip
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    path = save(state)
    agree(converted(path, "out.pth", "--strip-module"), state)
    last = {"module.module": torch.ones(1), "a._orig_mod": torch.zeros(1)}  # a parameter of that name
    agree(
        converted(save(last, "last.pth"), "out2.pth", "--strip-module"),
        {"module": torch.ones(1), **dict([*last.items()][1:])},
    )


def test_module_versions_follow(save, convert, tmp_path: Path, model: Inner) -> None:
    """Without them BatchNorm would load as its version 1, and strictness with it."""
    path = save(nn.DataParallel(model).state_dict())
    for options in (["--strip-module"], ["--strip-prefix", "module"], ["--rename", r"^module\.=>"]):
        for name in ("out.pth", "out.safetensors"):
            assert convert(path, name, *options, "--force").code == 0
        versions = dict(model.state_dict()._metadata)
        assert dict(torch.load("out.pth")._metadata) == versions
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert json.loads(file.metadata()["torch._metadata"]) == versions
        assert convert("out.safetensors", "back.pth", "--force").code == 0
        assert dict(torch.load("back.pth")._metadata) == versions


def test_rules_of_options_and_files_in_the_order_given(save, converted, agree, tmp_path: Path) -> None:
    rules = tmp_path / "rules.txt"
    rules.write_text("# first head, then tail\n\nb$=>c\nd$=>e\n")
    state = {"x.a": torch.ones(1), "y.d": torch.zeros(2)}
    path = save(state)
    before = converted(path, "1.pth", "--rename", "a$=>b", "--rename-file", rules, "--rename", "c$=>last")
    agree(before, {"x.last": state["x.a"], "y.e": state["y.d"]})
    after = converted(path, "2.pth", "--rename-file", rules, "--rename", "a$=>b", "--rename", "e$=>f")
    agree(after, {"x.b": state["x.a"], "y.f": state["y.d"]})
    twice = converted(path, "3.pth", "--rename-file", rules, "--rename", "a$=>b", "--rename-file", rules)
    agree(twice, {"x.c": state["x.a"], "y.e": state["y.d"]})


def test_param_names_of_an_optimizer_follow(save, convert, model: Inner) -> None:
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    optimizer.param_groups[0]["param_names"] = [name for name, _ in wrapped.named_parameters()]  # as torch 2.6 does
    path = save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2})
    assert convert(path, "out.pth", "--strip-module", "--rename", "^head=>top").code == 0
    written = torch.load("out.pth", weights_only=True)
    names = [re.sub("^head", "top", name) for name, _ in model.named_parameters()]
    assert written["optimizer"]["param_groups"][0]["param_names"] == names
    assert [*written["model"]][-2:] == ["top.weight", "top.bias"]
    assert (written["epoch"], list(written)) == (2, ["model", "optimizer", "epoch"])


def test_what_is_told(save, convert) -> None:
    path = save({"module.a": torch.ones(1), "b": torch.zeros(1)})

    def codes(*options: str) -> list[str]:
        done = convert(path, "out.pth", "--force", "--json", *options)
        assert done.code == 0, done.err
        return [finding["code"] for finding in json.loads(done.out)["findings"]]

    assert codes() == []
    assert codes("--strip-module") == ["renamed", "mixed-prefix"]
    assert codes("--strip-prefix", "zzz") == ["nothing-to-strip"]
    assert codes("--rename", "zzz=>y") == ["nothing-renamed"]
    assert codes("--rename", "^b=>c") == ["renamed"]
    assert codes("--strip-module", "--rename", "^zzz=>c") == ["renamed", "nothing-renamed", "mixed-prefix"]
    assert codes("--strip-prefix", "x", "--add-module") == ["renamed", "nothing-to-strip"]
    assert codes("--strip-module", "--exclude", "b") == ["renamed", "dropped"]
    assert codes("--add-module") == ["renamed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strip-module"], "'module.a' and 'a' would both be named 'a'"),
        (["--rename", "^.*$=>same"], "'module.a' and 'a' would both be named 'same'"),
        (["--rename", ".+=>"], "leaves nothing of the name 'module.a'"),
        (["--rename", "a"], "has no '=>'"),
        (["--rename", "=>a"], "no regular expression before '=>'"),
        (["--rename", "(=>a"], "bad regular expression"),
        (["--rename", r"a=>\2"], "bad replacement"),
        (["--rename-file", "no.txt"], "no.txt: no such file"),
        (["--rename-file", "bad.txt"], "bad.txt, line 2: "),
        (["--strip-prefix", ""], "the prefix '' is empty"),
        (["--add-prefix", "."], "the prefix '.' is empty"),
    ],
)
def test_refused(save, refused, tmp_path: Path, options: list[str], words: str) -> None:
    path = save({"module.a": torch.ones(1), "a": torch.zeros(1)})
    (tmp_path / "bad.txt").write_text("a=>b\nnothing\n")
    for destination in ("out.pth", "out.safetensors"):
        assert words in refused(path, destination, *options)


def test_in_python(save, agree, tmp_path: Path, model: Inner) -> None:
    state = model.state_dict()
    path = save(by_hand(state, lambda name: f"module.{name}"))
    report = ckptkit.convert(
        path,
        tmp_path / "out.pth",
        strip_module=True,
        add_module=True,
        strip_prefix="module",
        add_prefix="net",
        rename=[("^net.head", "top"), "^net.=>"],
    )
    expected = by_hand(state, lambda name: re.sub("^head", "top", name))
    agree(torch.load(tmp_path / "out.pth"), expected)
    assert report.details["renames"][0] == {"from": "module.features.0.weight", "to": "features.0.weight"}
