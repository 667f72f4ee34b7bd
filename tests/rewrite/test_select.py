"""Keeping the weights alone, or some of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import LeaveOut, Rename, RewriteError, Select, StripModule, StripPrefix, WeightsOnly
from ckptkit.checkpoint import STATE_DICT

Save = Callable[..., Path]
Through = Callable[..., Any]


def test_the_state_dict_alone_is_kept(save: Save, tmp_path: Path) -> None:
    weights = nn.BatchNorm1d(3).state_dict()
    with ckptkit.open(
        save({"state_dict": weights, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}})
    ) as file:
        result = file.rewrite(WeightsOnly())
        assert result.rest is STATE_DICT
        assert result.state_dict is file.state_dict
        assert file.rest is not STATE_DICT
        result.save(tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=False)
    assert type(written) is OrderedDict
    assert list(written) == list(weights)
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert written._metadata == weights._metadata


def test_a_whole_models_weights(save: Save, tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with ckptkit.open(save({"model": model, "epoch": 1})) as file:
        file.rewrite(WeightsOnly()).save(tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    nn.Linear(2, 3).load_state_dict(written)
    assert torch.equal(written["weight"], model.weight)


def test_the_selected_section_is_kept(save: Save, tmp_path: Path) -> None:
    saved = {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}
    with ckptkit.open(save(saved), section="ema") as file:
        file.rewrite(WeightsOnly()).save(tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True) == {"w": torch.ones(1)}


@pytest.mark.parametrize("saved", [{"epoch": 1}, torch.ones(1), {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}])
def test_without_one_there_is_nothing_to_keep(save: Save, saved: object) -> None:
    with ckptkit.open(save(saved)) as file, pytest.raises(RewriteError, match="no state_dict to keep"):
        file.rewrite(WeightsOnly())


# Selecting by name.


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(
        backbone=nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), act=nn.ReLU())),
        head=nn.Sequential(OrderedDict(fc=nn.Linear(2, 2), norm=nn.BatchNorm1d(2))),
    ))  # fmt: skip


SELECTED: dict[str, tuple[Select, Callable[[str], bool]]] = {
    "include": (Select(include=("backbone.*",)), lambda name: name.startswith("backbone.")),
    "several": (Select(include=("*.weight", "*.fc.*")), lambda name: name.endswith(".weight") or ".fc." in name),
    "exclude": (Select(exclude=("head.*",)), lambda name: not name.startswith("head.")),
    "both": (Select(include=("head.*",), exclude=("*.bias",)), lambda name: name[:4] == "head" and name[-4:] != "bias"),
    "a question mark": (Select(include=("head.?c.*",)), lambda name: name.startswith("head.fc.")),
    "one of several characters": (Select(include=("*.[fc]c*.bias",)), lambda name: name == "head.fc.bias"),
    "case counts": (Select(exclude=("HEAD.*", "head.fc.bias")), lambda name: name != "head.fc.bias"),
    "nothing": (Select(), lambda name: True),
    "nothing excluded": (Select(exclude=("zzz",)), lambda name: True),
}


@pytest.mark.parametrize("case", SELECTED)
def test_names_are_selected_as_by_hand(through: Through, case: str) -> None:
    select, wanted = SELECTED[case]
    saved = net().state_dict()
    found = through(saved, select)
    kept = [name for name in saved if wanted(name)]
    assert list(found) == kept
    assert all(torch.equal(found[name], saved[name]) for name in kept)
    modules = {"", *(name[:end] for name in kept for end, char in enumerate(name) if char == ".")}
    untouched = len(kept) == len(saved)
    assert found._metadata == {path: entry for path, entry in saved._metadata.items() if untouched or path in modules}
    missing, unexpected = net().load_state_dict(found, strict=False)
    assert not unexpected
    assert set(missing) == {name for name in saved if name not in kept and not name.endswith("num_batches_tracked")} | {
        name for name in missing if name.endswith("num_batches_tracked")
    }


def test_a_part_of_a_model_under_its_own_names(through: Through) -> None:
    saved = net()
    found = through(nn.DataParallel(saved).state_dict(), Select(include=("module.head.*",)), StripPrefix("module.head"))
    expected = saved.head.state_dict()
    assert list(found) == list(expected)
    assert found._metadata == expected._metadata
    net().head.load_state_dict(found)


def test_a_pattern_matches_the_name_there_will_be(through: Through) -> None:
    saved = nn.DataParallel(net()).state_dict()
    for pattern in ("module.head.*", "head.*"):
        found = through(saved, Select(include=(pattern,), rename=StripModule().rename), StripModule())
        assert set(found) == {name[7:] for name in saved if name.startswith("module.head.")}
        found = through(saved, Select(exclude=(pattern,), rename=StripModule().rename), StripModule())
        assert set(found) == {name[7:] for name in saved if not name.startswith("module.head.")}
    rename = Rename((("^module.", ""), ("head", "tail")))
    found = through(saved, Select(include=("tail.*",), rename=rename.rename), rename)
    assert {name.partition(".")[0] for name in found} == {"tail"}


def test_how_names_change_is_no_part_of_what_it_is() -> None:
    select = Select(include=("a",), rename=StripModule().rename)
    assert repr(select) == "Select(include=('a',), exclude=())"
    assert select == Select(include=("a",)) == Select(include=["a"]) == Select("a")  # type: ignore[arg-type]
    assert hash(select) == hash(Select(include=("a",)))


def test_values_that_are_no_tensors_are_selected_too(through: Through) -> None:
    saved = {"a.w": torch.ones(1), "a._extra_state": 3, "b.w": torch.ones(1), "b._extra_state": 4}
    assert list(through(saved, Select(exclude=("a.*",)))) == ["b.w", "b._extra_state"]


def test_an_include_that_matches_nothing(save: Save) -> None:
    with ckptkit.open(save(net().state_dict())) as file:
        with pytest.raises(RewriteError) as caught:
            file.rewrite(Select(include=("backbone.*", "head.cf.*")))
        message = str(caught.value)
        assert message.startswith("no name matches 'head.cf.*'; there is 'head.fc.bias', ")
        assert message.endswith(" and 9 more")
        with pytest.raises(RewriteError, match="no name matches ''"):
            file.rewrite(Select(include=("",)))


def test_nothing_left(save: Save) -> None:
    with ckptkit.open(save(net().state_dict())) as file:
        for select in (Select(exclude=("*",)), Select(include=("head.*",), exclude=("head*",))):
            with pytest.raises(RewriteError, match=r"none of 14 names is left; there is 'backbone\.conv\.weight', "):
                file.rewrite(select)


def test_excludes_that_match_nothing_are_told(save: Save) -> None:
    with ckptkit.open(save(nn.DataParallel(net()).state_dict())) as file:
        select = Select(exclude=("head.*", "module.head.*", "zzz"))
        assert select.unmatched(file.checkpoint) == ("head.*", "zzz")
        renaming = Select(exclude=select.exclude, rename=StripModule().rename)
        assert renaming.unmatched(file.checkpoint) == ("zzz",)
        assert Select().unmatched(file.checkpoint) == ()


# The optimizer.


def training(kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> dict[str, Any]:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    model.backbone(torch.ones(1, 1, 4, 4)).sum().backward()
    optimizer.step()
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_parameters_under_an_optimizer_stay(save: Save, kind: type[torch.optim.Optimizer]) -> None:
    trained = training(kind)
    wrapped = {"trainer": [{"opt": trained["optimizer"]}], "state_dict": trained["state_dict"]}
    for saved, path in ((trained, "optimizer"), (wrapped, "trainer.0.opt")):
        with ckptkit.open(save(saved)) as file, pytest.raises(RewriteError) as caught:
            file.rewrite(Select(exclude=("head.fc.*",)))
        message = str(caught.value)
        assert message.startswith(
            "'head.fc.weight', 'head.fc.bias' would be left out, but the optimizer's state is keyed"
        )
        assert message.endswith(f"--leave-out {path} leaves it out")


def test_buffers_under_an_optimizer_may_go(through: Through) -> None:
    saved = training()
    found = through(saved, Select(exclude=("*.running_*", "*.num_batches_tracked")))
    assert set(found["state_dict"]) == {name for name, _ in net().named_parameters()}
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(found["optimizer"])
    assert len(optimizer.state) == len(saved["optimizer"]["state"])


def test_parameters_may_go_once_the_optimizer_has(through: Through) -> None:
    select = Select(exclude=("head.*",))
    for drop in (LeaveOut(("optimizer",)), WeightsOnly()):
        found = through(training(), drop, select)
        state = found if isinstance(drop, WeightsOnly) else found["state_dict"]
        assert all(name.startswith("backbone.") for name in state)
        assert "optimizer" not in found


def test_whole_models_tell_buffers(save: Save) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(1))
    saved = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict()}
    with ckptkit.open(save(saved)) as file:
        assert list(file.rewrite(Select(exclude=("scale",))).state_dict) == ["weight", "bias"]
        with pytest.raises(RewriteError, match=r"^'bias' would be left out"):
            file.rewrite(Select(exclude=("bias",)))
