"""Options that rename: what torch loads afterwards has the names that renaming by hand gives, in the same order."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
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


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"]


@pytest.mark.parametrize("order", [WRAPPERS, WRAPPERS[::-1], [*WRAPPERS[2:], *WRAPPERS]])
def test_wrappers_in_any_order(save, converted, model: Inner, order: list[str]) -> None:
    """Before names, inside them, and behind a prefix that is stripped; with the module versions."""
    state = model.state_dict()
    inside = "._checkpoint_wrapped_module._orig_mod._fsdp_wrapped_module."
    before = ".".join(order)

    def wrap(path: str) -> str:
        return path.replace("features.", f"features{inside}", 1) if path != "features" else "features" + inside[:-1]

    for prefix, options in (("", []), ("model.", ["--strip-prefix", "model"])):
        saved = type(state)((f"{prefix}{before}.{wrap(name)}", value) for name, value in state.items())
        saved._metadata = {  # type: ignore[attr-defined]
            f"{prefix}{before}.{wrap(path)}".rstrip("."): entry
            for path, entry in state._metadata.items()  # type: ignore[attr-defined]
        }
        path = save(saved, f"{len(prefix)}.pth")
        for number, given in enumerate((["--strip-module", *options], [*options, "--strip-module"])):
            written = converted(path, f"{len(prefix)}{number}.out.pth", *given)
            fresh = Inner()
            fresh.load_state_dict(written)
            assert list(written) == list(state)
            assert dict(written._metadata) == dict(state._metadata)  # type: ignore[attr-defined]


def test_a_prefix_given_with_wrappers(save, convert, converted) -> None:
    state = {"model._orig_mod.module.w": torch.ones(1), "model._orig_mod.module.b": torch.zeros(1)}
    path = save(state)
    for number, prefix in enumerate(["model", "model.", "model._orig_mod", "model._orig_mod.module."]):
        assert list(converted(path, f"{number}.pth", "--strip-module", "--strip-prefix", prefix)) == ["w", "b"]
    bare = save({"module.w": torch.ones(1)}, "bare.pth")
    assert list(converted(bare, "m.pth", "--strip-module", "--strip-prefix", "module")) == ["w"]
    alone = convert(path, "alone.pth", "--strip-prefix", "model")  # is taken at its word, and says what is left
    assert list(torch.load("alone.pth")) == ["_orig_mod.module.w", "_orig_mod.module.b"]
    assert "(`_orig_mod.module.`)" in alone.err
    command = shlex.split(next(line for line in alone.err.splitlines() if line.startswith("    ckptkit convert")))
    assert convert(*command[2:]).code == 0
    assert list(torch.load(command[3])) == ["w", "b"]


class Partly(nn.Module):
    """A model whose parts may be wrapped, and that has a `module` of its own."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], many: int = 1) -> None:
        super().__init__()
        self.features = wrap(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
        self.blocks = nn.ModuleList(wrap(nn.Linear(2, 2)) for _ in range(many))
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("many", [0, 2, 5])
@pytest.mark.parametrize("outer", [False, True])
def test_an_inner_module(save, convert, agree, many: int, outer: bool) -> None:
    """`--strip-module` leaves it; the commands that inspect and convert print take it off."""
    wrapped: nn.Module = Partly(nn.DataParallel, many)
    expected = Partly(lambda module: module, many).state_dict()
    state = {re.sub(r"\.module\.", ".", name): tensor for name, tensor in wrapped.state_dict().items()}
    wrapped = nn.DataParallel(wrapped) if outer else wrapped
    path = save({"state_dict": wrapped.state_dict(), "epoch": 3})
    with ckptkit.open(path) as file:
        (seen,) = [finding for finding in file.findings if finding.code == "inner-module"]
    assert seen.severity == "info"
    assert ("--strip-module" in (seen.fix or "")) == outer
    done = convert(path, "left.pth", "--strip-module")
    assert "features.module.0.weight" in torch.load("left.pth")["state_dict"]
    (left,) = [line.strip() for line in done.err.splitlines() if line.startswith("    ckptkit convert")]
    assert "[inner-module]" in done.err
    for fix in (seen.fix, left):
        command = shlex.split(fix)
        assert command[:2] == ["ckptkit", "convert"]
        assert convert(*command[2:]).code == 0
        loaded = load_file(command[3]) if command[3].endswith(".safetensors") else torch.load(command[3])["state_dict"]
        agree(loaded, state, ordered=False)
        Partly(lambda module: module, many).load_state_dict(loaded)
        with ckptkit.open(command[3]) as file:
            assert not {"inner-module", "module-prefix"} & {finding.code for finding in file.findings}
    assert loaded.keys() == expected.keys()


def test_an_inner_module_that_cannot_go(save, convert, converted) -> None:
    """Rules are exact: names with odd characters, several levels; and none where names would collide."""
    odd = {"a+b.module.w": torch.ones(1), "c.module.d.module.w": torch.ones(2), "e.module.module.w": torch.ones(3)}
    told = convert(save(odd), "odd.pth", "--strip-module").err
    command = shlex.split(next(line for line in told.splitlines() if line.startswith("    ckptkit convert")))
    assert convert(*command[2:]).code == 0
    assert list(torch.load(command[3])) == ["a+b.w", "c.d.w", "e.w"]
    both = convert(save({"a.module.w": torch.ones(1), "a.w": torch.ones(1)}), "both.pth", "--strip-module").err
    assert "two names would be the same [inner-module]" in both
    assert "--rename" not in both
    assert convert(save({"a.module.w": torch.ones(1)}), "dry.pth", "--strip-module", "--dry-run").err.count("\n") == 2


def flattening(flat: bool) -> Any:
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    if flat and "flatten_optimizer_state_dict" not in dcp.StateDictOptions.__dataclass_fields__:
        pytest.skip(f"torch {torch.__version__} does not flatten optimizers (2.5)")
    return dcp.StateDictOptions(flatten_optimizer_state_dict=True) if flat else None


def by_names(model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str, flat: bool) -> dict[str, Any]:
    """The optimizer's state as torch.distributed.checkpoint has it, of a model whose names carry a prefix."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=flattening(flat))
    if flat:
        return {re.sub(r"^(state|param_groups)\.", rf"\1.{prefix}", key): value for key, value in saved.items()}
    groups = [{**group, "params": [prefix + name for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": {prefix + name: value for name, value in saved["state"].items()}, "param_groups": groups}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("module.", ["--strip-module"]),
        ("module._orig_mod.", ["--strip-module"]),
        ("net.", ["--strip-prefix", "net"]),
        ("net.body.", ["--rename", r"^net\.body\.=>"]),
    ],
)
def test_an_optimizer_that_goes_by_names(save, convert, prefix: str, options: list[str], flat: bool) -> None:
    """FSDP and torch.distributed.checkpoint key it so: it is renamed along, and training goes on as if never saved."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}])
    trained(model, optimizer, 2)
    weights = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [copy.deepcopy(by_names(model, optimizer, prefix, flat)), {"note": "of nobody"}]
    path = save({"model": weights, "trainer": {"optimizers": states}, "epoch": 2})
    assert convert(path, "out.pth", *options).code == 0
    written = torch.load("out.pth", weights_only=True)
    expected = by_names(model, optimizer, "", flat)
    found = written["trainer"]["optimizers"][0]
    assert list(found) == list(expected)
    if not flat:
        names = [group["params"] for group in found["param_groups"]]
        assert names == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    again = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    resumed = torch.optim.AdamW([{"params": again[0].parameters()}, {"params": again[2].parameters(), "lr": 0.1}])
    again.load_state_dict(written["model"])
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    dcp.set_optimizer_state_dict(again, resumed, found, options=flattening(flat))
    trained(model, optimizer, 3)
    trained(again, resumed, 3)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizers_other_names(save, convert, refused) -> None:
    """Names that the state_dict lacks stay; where two would become one nothing is written."""
    moments = {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}
    both = {"module.a": moments, "other.b": {"exp_avg": torch.ones(3)}, 7: {"exp_avg": torch.ones(4)}}
    groups = [{"params": ["module.a", "other.b"], "lr": 0.1}, {"params": [7]}, {"params": ()}]
    saved = {"model": {"module.a": torch.ones(2)}, "optim": {"state": both, "param_groups": groups}}
    saved["shared"] = both["module.a"]
    assert convert(save(saved), "out.pth", "--add-prefix", "net").code == 0
    written = torch.load("out.pth", weights_only=True)
    assert list(written["optim"]["state"]) == ["net.module.a", "other.b", 7]
    assert [group["params"] for group in written["optim"]["param_groups"]] == [["net.module.a", "other.b"], [7], ()]
    assert written["optim"]["state"]["net.module.a"] is written["shared"], "what is shared stays so"
    for state, names in (({"module.a": moments, "a": moments}, []), ({}, ["a", "module.a"])):
        saved["optim"] = {"state": state, "param_groups": [{"params": names}]}
        assert "would both be named 'a'" in refused(save(saved), "no.pth", "--strip-module")


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
        (["--rename", ".+=>"], "leaves the name 'module.a' empty"),
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
