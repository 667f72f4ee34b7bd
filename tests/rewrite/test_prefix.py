"""Prefixes come off and go on by whole segments, and what goes by the names comes along."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import opened
from torch import nn

import ckptkit
from ckptkit import AddModule, AddPrefix, KeyCollisionError, RewriteError, StripModule, StripPrefix, rewrite
from ckptkit.checkpoint import Checkpoint
from ckptkit.normalize.modules import unwrapped, wrapper_of
from ckptkit.pickling.inert import mapping_items

Save = Callable[..., Path]
Rewriter = Callable[[Checkpoint], Checkpoint]


def renamed(save: Save, names: list[str], *rewriters: Rewriter) -> list[str]:
    """The names after rewriting; values stay with their names, in order, and the input as it was."""
    with opened(save({name: torch.tensor(float(i)) for i, name in enumerate(names)})) as checkpoint:
        before = list(checkpoint.state_dict.items())
        result = checkpoint.rewrite(*rewriters)
        assert list(checkpoint.state_dict.items()) == before
        assert list(result.state_dict.values()) == [entry for _, entry in before]
        return list(result.state_dict)


STRIPPED = {
    "module.layer.weight": "layer.weight",
    "mlp_module.module.weight": "mlp_module.module.weight",
    "mlp_module.layer0": "mlp_module.layer0",
    "layer.module.weight": "layer.module.weight",
    "modules.weight": "modules.weight",
    "Module.weight": "Module.weight",
    "module._orig_mod.module.x": "x",
    "_orig_mod.module._orig_mod.a.b": "a.b",
    "model._orig_mod.layer": "model.layer",
    "model._orig_mod._orig_mod.layer._orig_mod.w": "model.layer.w",
    "model._orig_mod": "model._orig_mod",
    "_fsdp_wrapped_module.a._fsdp_wrapped_module.w": "a.w",
    "_fsdp_wrapped_module.module._checkpoint_wrapped_module._orig_mod.w": "w",
    "layers.0._checkpoint_wrapped_module.mlp.w": "layers.0.mlp.w",
    "a._fsdp_wrapped_module._checkpoint_wrapped_module.w": "a.w",
    "_forward_module.module._forward_module.w": "w",
    "_orig_mod._forward_module.w": "w",
    "_fsdp_wrapped_module._forward_module.module.module.w": "w",
    "a._forward_module.w": "a._forward_module.w",
    "a._orig_mod.module.w": "a.module.w",
    "a.my_fsdp_wrapped_module.w": "a.my_fsdp_wrapped_module.w",
    "_fsdp_wrapped_module": "_fsdp_wrapped_module",
    "block._module.w": "block._module.w",
    "my_orig_mod.w": "my_orig_mod.w",
    "_orig_mod_.w": "_orig_mod_.w",
    "module": "module",
    "_orig_mod": "_orig_mod",
    "module.module": "module",
    "module.": "",
    "": "",
    ".": ".",
    "..module.x": "..module.x",
    "module..x": ".x",
    "a.b.c": "a.b.c",
    "module.quo\"ted'.w": "quo\"ted'.w",
    "module.new\nline.w": "new\nline.w",
    "module.größe.重み": "größe.重み",
    "module.a/b::c{d}": "a/b::c{d}",
    "modulé.w": "modulé.w",
}


@pytest.mark.parametrize(("name", "expected"), STRIPPED.items())
def test_strip_module(save: Save, name: str, expected: str) -> None:
    assert unwrapped(name) == expected
    assert unwrapped(expected) == expected
    assert bool(wrapper_of(name)) == (name != expected)
    assert wrapper_of(expected) == ""
    assert renamed(save, [name], StripModule()) == [expected]
    assert renamed(save, [name], StripModule(), StripModule()) == [expected]


def test_names_of_mixed_prefix(save: Save) -> None:
    assert renamed(save, ["module.a", "b", "module.c"], StripModule()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("prefix", "name", "expected"),
    [
        ("module", "module.a.b", "a.b"),
        ("module.", "module.a.b", "a.b"),
        ("module.", "module.module.b", "module.b"),
        ("a.b", "a.b.c", "c"),
        ("a.b.", "a.bc.d", "a.bc.d"),
        ("a.b", "a.b", "a.b"),
        ("a.b", "x.a.b.c", "x.a.b.c"),
        ("encoder", "encoder_2.w", "encoder_2.w"),
        ("encoder", "Encoder.w", "Encoder.w"),
        ("größe", "größe.重み", "重み"),
        ("new\nline", "new\nline.w", "w"),
        ("module", "module.", ""),
        ("module", "", ""),
    ],
)
def test_strip_prefix(save: Save, prefix: str, name: str, expected: str) -> None:
    assert renamed(save, [name], StripPrefix(prefix)) == [expected]


@pytest.mark.parametrize(
    ("prefix", "name", "expected"),
    [
        ("model", "a.b", "model.a.b"),
        ("model.", "a.b", "model.a.b"),
        ("a.b", "c", "a.b.c"),
        ("a", "", "a."),
        ("größe", "重み", "größe.重み"),
    ],
)
def test_add_prefix(save: Save, prefix: str, name: str, expected: str) -> None:
    assert renamed(save, [name], AddPrefix(prefix)) == [expected]
    assert renamed(save, [name], AddPrefix(prefix), StripPrefix(prefix)) == [name]


def test_add_module(save: Save) -> None:
    names = ["a", "module.b", ""]
    assert renamed(save, names, AddModule()) == ["module.a", "module.module.b", "module."]


@pytest.mark.parametrize("prefix", ["", ".", "..."])
@pytest.mark.parametrize("rewriter", [StripPrefix, AddPrefix])
def test_an_empty_prefix(rewriter: Callable[[str], Rewriter], prefix: str) -> None:
    with pytest.raises(RewriteError, match="is empty; give at least one segment"):
        rewriter(prefix)


@pytest.mark.parametrize(
    ("names", "rewriter", "first", "second", "target"),
    [
        (["a", "module.a"], StripModule(), "a", "module.a", "a"),
        (["x.w", "_orig_mod.w", "module.w"], StripModule(), "_orig_mod.w", "module.w", "w"),
        (["m.w", "m._orig_mod.w"], StripModule(), "m.w", "m._orig_mod.w", "m.w"),
        (["enc.w", "w"], StripPrefix("enc"), "enc.w", "w", "w"),
    ],
)
def test_a_collision_names_both_and_changes_nothing(
    save: Save, tmp_path: Path, names: list[str], rewriter: Rewriter, first: str, second: str, target: str
) -> None:
    path = save({name: torch.tensor(float(i)) for i, name in enumerate(names)})
    with ckptkit.open(path) as file:
        with pytest.raises(KeyCollisionError) as caught:
            file.rewrite(rewriter)
        assert (caught.value.first, caught.value.second, caught.value.target) == (first, second, target)
        assert repr(first) in str(caught.value)
        assert repr(second) in str(caught.value)
        assert list(file.state_dict) == names
    assert list(tmp_path.iterdir()) == [path]


# What torch itself makes of wrapped models.


def model() -> nn.Module:
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2),
        block=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), act=nn.ReLU(),
    ))  # fmt: skip


def through(save: Save, state_dict: dict[str, Any], tmp_path: Path, *rewriters: Rewriter) -> Any:
    with ckptkit.open(save(state_dict)) as file:
        file.rewrite(*rewriters).save(tmp_path / "out.pth", force=True)
    return torch.load(tmp_path / "out.pth", weights_only=False)


def assert_same_state_dict(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(found._metadata) == list(expected._metadata)
    assert found._metadata == expected._metadata


@pytest.mark.parametrize("strip", [StripModule(), StripPrefix("module")])
def test_stripping_data_parallel_gives_the_bare_model(save: Save, tmp_path: Path, strip: Rewriter) -> None:
    bare = model()
    wrapped = nn.DataParallel(bare).state_dict()
    assert_same_state_dict(through(save, wrapped, tmp_path, strip), bare.state_dict())
    model().load_state_dict(through(save, wrapped, tmp_path, strip))


@pytest.mark.parametrize("add", [AddModule(), AddPrefix("module.")])
def test_adding_gives_what_data_parallel_saves(save: Save, tmp_path: Path, add: Rewriter) -> None:
    bare = model()
    assert_same_state_dict(through(save, bare.state_dict(), tmp_path, add), nn.DataParallel(bare).state_dict())


def test_several_segments_as_modules_save_them(save: Save, tmp_path: Path) -> None:
    bare = model()
    nested = nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(b=bare)))).state_dict()
    assert_same_state_dict(through(save, bare.state_dict(), tmp_path, AddPrefix("a.b")), nested)
    assert_same_state_dict(through(save, nested, tmp_path, StripPrefix("a.b")), bare.state_dict())


def test_compiled_submodules(save: Save, tmp_path: Path) -> None:
    class Compiled(nn.Module):  # what torch.compile wraps a module in, as far as names go
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    bare = nn.Sequential(OrderedDict(model=model()))
    state_dict = nn.DataParallel(Compiled(nn.Sequential(OrderedDict(model=Compiled(bare.model))))).state_dict()
    assert_same_state_dict(through(save, state_dict, tmp_path, StripModule()), bare.state_dict())


def test_no_versions_are_made_up(save: Save, tmp_path: Path) -> None:
    for rewriter in (AddModule(), StripModule()):
        assert not hasattr(through(save, OrderedDict(w=torch.ones(1)), tmp_path, rewriter), "_metadata")


def test_the_input_keeps_its_versions(save: Save) -> None:
    with opened(save(model().state_dict())) as checkpoint:
        versions = dict(checkpoint.state_dict.versions or {})
        wrapped = AddModule()(checkpoint)
        assert dict(checkpoint.state_dict.versions or {}) == versions
        assert wrapped.rest is checkpoint.rest
        assert StripModule()(wrapped).state_dict.versions == versions


# Names outside the state_dict.


def test_an_optimizers_parameter_names_are_renamed_along(save: Save, tmp_path: Path) -> None:
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    named = [dict(wrapped.module[i].named_parameters(f"module.{i}")) for i in range(2)]
    first, second = (list(each.values()) for each in named)
    optimizer = torch.optim.SGD([{"params": first}, {"params": second, "lr": 0.2}], lr=0.1)
    for group, names in zip(optimizer.param_groups, named, strict=True):
        group["param_names"] = list(names)  # as torch 2.6 does
    other = {"param_groups": [{"params": [0], "param_names": ["module.elsewhere"]}], "state": {}}
    saved = {"state_dict": wrapped.state_dict(), "optimizer": optimizer.state_dict(), "other": other}
    assert saved["optimizer"]["param_groups"][0]["param_names"] == ["module.0.weight", "module.0.bias"]
    written = through(save, saved, tmp_path, StripModule())
    groups = written["optimizer"]["param_groups"]
    assert [group["param_names"] for group in groups] == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    assert [group["params"] for group in groups] == [[0, 1], [2, 3]]
    assert groups[1]["lr"] == 0.2
    assert written["other"]["param_groups"][0]["param_names"] == ["module.elsewhere"]
    back = through(lambda obj: tmp_path / "out.pth", written, tmp_path, AddModule())
    assert back["optimizer"] == saved["optimizer"]


def test_the_rest_is_left_alone(save: Save) -> None:
    saved = {"state_dict": {"module.w": torch.ones(1)}, "names": ["module.w"], "module.w": "module.w"}
    with opened(save(saved)) as checkpoint:
        result = StripModule()(checkpoint)
        assert result.rest is checkpoint.rest
        assert mapping_items(result.rest) == mapping_items(checkpoint.rest)


def test_values_that_are_no_tensors_are_renamed_too(save: Save) -> None:
    with opened(save({"module.w": torch.ones(1), "module.m._extra_state": 3})) as checkpoint:
        assert StripModule()(checkpoint).state_dict.extra == {"m._extra_state": 3}


def test_every_rewriter_is_listed() -> None:
    assert {"REWRITES", *rewrite.REWRITES} == set(rewrite.__all__)
    for name, module in rewrite.REWRITES.items():
        assert getattr(rewrite, name).__module__ == f"ckptkit.rewrite.{module}"


def test_a_module_of_the_prefix_that_keeps_tensors_keeps_its_version(save: Save, tmp_path: Path) -> None:
    nested = nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(b=nn.BatchNorm1d(1), c=nn.BatchNorm1d(1)))))
    found = through(save, nested.state_dict(), tmp_path, StripPrefix("a.b"))
    assert found._metadata == {"": {"version": 2}, "a": {"version": 1}, "a.c": {"version": 2}}
