"""Parts of the file beside the weights are left behind, and everything else stays as it was."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import LeaveOut, RewriteError, formats
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict
from ckptkit.pickling.inert import Global, InertDict, Object, children, walk

Save = Callable[..., Path]
Through = Callable[..., Any]


def resume() -> dict[str, Any]:
    """Training state with an optimizer, an EMA, nested parts, keys with dots and keys that are no text."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    noted = torch.ones(3)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": nn.Linear(2, 2).state_dict(),
        "trainer": {"optimizer": optimizer.state_dict(), "step": 7, "noted": noted},
        "a.b": torch.ones(1),
        "a": {"b": optimizer.state_dict(), "c": noted},
        5: "five",
        "ordered": OrderedDict(x=1, y=torch.ones(1)),
        "list": [torch.zeros(1), torch.ones(1), noted],
        "args": argparse.Namespace(lr=0.1, ema=[noted]),
        "epoch": 3,
    }


def without(saved: dict[Any, Any], *keys: Any) -> dict[Any, Any]:
    return {key: value for key, value in saved.items() if key not in keys}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return type(one) is type(two) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, argparse.Namespace):
        return same(vars(one), vars(two))
    return bool(one == two)


CASES: dict[str, tuple[tuple[str, ...], Callable[[dict[Any, Any]], Any]]] = {
    "nothing": ((), lambda saved: saved),
    "a key": (("epoch",), lambda saved: without(saved, "epoch")),
    "a section": (("optimizer",), lambda saved: without(saved, "optimizer")),
    "several": (("optimizer", "ema", "args"), lambda saved: without(saved, "optimizer", "ema", "args")),
    "twice": (("ema", "ema"), lambda saved: without(saved, "ema")),
    "nested": (("trainer.optimizer",), lambda saved: {**saved, "trainer": without(saved["trainer"], "optimizer")}),
    "nested, no section": (("trainer.step",), lambda saved: {**saved, "trainer": without(saved["trainer"], "step")}),
    "all that is nested": (("trainer.noted", "trainer"), lambda saved: without(saved, "trainer")),
    "a number": (("5",), lambda saved: without(saved, 5)),
    "an ordered dict's": (("ordered.y",), lambda saved: {**saved, "ordered": OrderedDict(x=1)}),
    "an item": (("list.1",), lambda saved: {**saved, "list": [saved["list"][0], saved["list"][2]]}),
    "items": (("list.0", "list.2"), lambda saved: {**saved, "list": [saved["list"][1]]}),
    "an attribute": (("args.ema",), lambda saved: {**saved, "args": argparse.Namespace(lr=0.1)}),
    "a dot in a key": (("a.b",), lambda saved: without(saved, "a.b")),
    "what a dot in a key hides": (("a.b#2",), lambda saved: {**saved, "a": without(saved["a"], "b")}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_by_hand(through: Through, case: str) -> None:
    paths, by_hand = CASES[case]
    saved = resume()
    found = through(saved, LeaveOut(paths))
    assert same(found, by_hand(saved))
    if isinstance(found.get("list"), list) and len(found["list"]) == 3 and "trainer" in found:
        noted = found["list"][2]
        assert found["a"]["c"].data_ptr() == noted.data_ptr()
        assert found["trainer"].get("noted", noted).data_ptr() == noted.data_ptr()


def references(root: object) -> int:
    return sum(len(children(node)) for node in walk(root))


def test_what_is_listed_can_be_left_out(save: Save) -> None:
    checkpoint, file = formats.read(save(resume()), section="model")
    try:
        paths = [section.path for section in checkpoint.sections if not section.selected]
        assert {"optimizer", "ema", "trainer.optimizer", "a.b", "a.b#2"} <= set(paths)
        for path in paths:
            left = LeaveOut((path,))(checkpoint)
            kept = [section.path for section in left.sections]
            assert path not in kept
            assert [section.path for section in checkpoint.sections if section.path in kept] == kept
            assert references(left.rest) < references(checkpoint.rest)
        every = LeaveOut(tuple(paths))(checkpoint)
        assert [section.path for section in every.sections] == ["model"]
    finally:
        file.close()


def test_sections_below_go_along(save: Save) -> None:
    saved = {"model": nn.Linear(2, 2).state_dict(), "trainer": {"opt": resume()["optimizer"], "step": 1}}
    with ckptkit.open(save(saved)) as file:
        assert [section.path for section in file.sections] == ["model", "trainer.opt"]
        assert [section.path for section in file.rewrite(LeaveOut(("trainer",))).sections] == ["model"]
        assert [section.path for section in file.rewrite(LeaveOut(("trainer.step",))).sections] == [
            "model",
            "trainer.opt",
        ]


def test_the_input_stays_as_it_was(save: Save) -> None:
    with ckptkit.open(save(resume()), section="model") as file:
        nodes = list(walk(file.rest))
        before = [list(map(id, children(node))) for node in nodes]
        file.rewrite(LeaveOut(("optimizer", "a.b", "list.0", "args.lr", "ordered.x")))
        assert [list(map(id, children(node))) for node in nodes] == before


def test_a_tuple(through: Through, save: Save) -> None:
    model, optimizer = nn.Linear(2, 2), resume()["optimizer"]
    assert same(through((model.state_dict(), optimizer, 3), LeaveOut(("1",))), (model.state_dict(), 3))
    with ckptkit.open(save({"model": model.state_dict(), "pair": (optimizer, 3)})) as file:
        with pytest.raises(RewriteError, match=r"'pair\.0' cannot be left out: it is in a tuple"):
            file.rewrite(LeaveOut(("pair.0",)))
        assert mapping_keys(file.rewrite(LeaveOut(("pair",))).rest) == ["model"]


def mapping_keys(node: object) -> list[object]:
    assert isinstance(node, InertDict)
    return list(node)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("zzz", r"there is no 'zzz' to leave out; there is 'optimizer', 'ema', 'trainer', 'a\.b', 'a', '5', "),
        ("optimizer.zzz", r"there is no 'optimizer\.zzz' to leave out"),
        ("list.3", r"there is no 'list\.3'"),
        ("ema#2", "there is no 'ema#2'"),
        ("a.b#3", r"there is no 'a\.b#3'"),
        ("", "there is no ''"),
        ("model", "'model' contains the weights"),
    ],
)
def test_what_cannot_be_left_out(save: Save, path: str, message: str) -> None:
    with ckptkit.open(save(resume()), section="model") as file, pytest.raises(RewriteError, match=message):
        file.rewrite(LeaveOut(("epoch", path)))


def test_what_holds_the_weights_cannot_be_left_out(save: Save) -> None:
    with ckptkit.open(save({"checkpoint": {"state_dict": {"w": torch.ones(1)}, "n": 1}, "epoch": 1})) as file:
        with pytest.raises(RewriteError, match="'checkpoint': the weights are there"):
            file.rewrite(LeaveOut(("checkpoint",)))
        assert mapping_keys(file.rewrite(LeaveOut(("epoch",))).rest) == ["checkpoint"]
    with ckptkit.open(save({"w": torch.ones(1)})) as file:
        for path in ("w", ""):
            with pytest.raises(RewriteError, match=r"there is nothing beside the weights$"):
                file.rewrite(LeaveOut((path,)))


def test_a_whole_models_weights_stay(through: Through) -> None:
    saved = {"model": nn.Linear(2, 2), "optimizer": resume()["optimizer"], "epoch": 1}
    found = through(saved, LeaveOut(("optimizer",)))
    assert list(found) == ["model", "epoch"]
    assert torch.equal(found["model"].weight, saved["model"].weight)  # type: ignore[union-attr]


def of(rest: object) -> Checkpoint:
    return Checkpoint(
        state_dict=StateDict({"w": 1}), rest=rest, origin=Origin(path="", size=0, format="torch-zip", kind="resume")
    )


def test_pairs_that_python_2_gave_as_an_argument() -> None:
    rest = Object("reduce", Global("collections", "OrderedDict"), ([["model", STATE_DICT], ["a", 1], ["b", 2]],))
    found = LeaveOut(("a",))(of(rest)).rest
    assert isinstance(found, Object)
    assert found.args == ([["model", STATE_DICT], ["b", 2]],)
    assert rest.args == ([["model", STATE_DICT], ["a", 1], ["b", 2]],)


def test_an_earlier_value_of_a_key_does_not_come_back() -> None:
    found = LeaveOut(("a",))(of(InertDict([("a", 1), ("model", STATE_DICT), ("a", 2)]))).rest
    assert isinstance(found, InertDict)
    assert found.pairs == [("model", STATE_DICT)]


def test_what_an_object_is_made_from_stays() -> None:
    rest = InertDict([("model", STATE_DICT), ("made", Object("reduce", Global("m", "f"), ([1, 2], [3])))])
    with pytest.raises(
        RewriteError,
        match=r"'made\.1' cannot be left out: it is an argument that an object is "
        r"built from",
    ):
        LeaveOut(("made.1",))(of(rest))


def test_what_leads_back_to_itself() -> None:
    loop = InertDict([("x", 1)])
    loop.pairs.append(("loop", loop))
    rest = InertDict([("model", STATE_DICT), ("top", loop)])
    found = LeaveOut(("top.loop.loop.x",))(of(rest)).rest
    assert isinstance(found, InertDict)
    inner = found["top"]
    assert isinstance(inner, InertDict)
    assert [key for key, _ in inner.pairs] == ["loop"]
    assert inner["loop"] is inner
    assert len(loop.pairs) == 2


def test_its_repr_is_its_paths() -> None:
    assert repr(LeaveOut("a")) == repr(LeaveOut(["a"])) == "LeaveOut(paths=('a',))"  # type: ignore[arg-type]
