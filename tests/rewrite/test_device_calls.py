"""Devices that are named in the calls that make tensors, not with a storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import MapLocation, RewriteError
from ckptkit.checkpoint import Checkpoint, Origin, StateDict
from ckptkit.pickling.inert import Global, InertDict, Object, walk

Save = Callable[..., Path]

TO_CPU: dict[str, Any] = {
    "string": "cpu",
    "torch.device": torch.device("cpu"),
    "dict": {"xla:0": "cpu", "cuda:1": "cpu"},
    "dict of devices": {torch.device("xla:0"): torch.device("cpu"), torch.device("cuda:1"): torch.device("cpu")},
}


class _Reduced:
    """Pickled as a call of a function of ``torch._utils``."""

    def __init__(self, function: str, *args: object) -> None:
        self.call = getattr(torch._utils, function), args

    def __reduce__(self) -> Any:
        return self.call


def as_xla(requires_grad: bool = False) -> dict[str, _Reduced]:
    """Tensors as torch saves those of an XLA device: now, before 2.0, and before 1.9."""
    data = torch.arange(3.0)
    after = (torch.float32, "xla:0", requires_grad)
    saved: dict[str, tuple[str, Any]] = {
        "now": ("_rebuild_device_tensor_from_cpu_tensor", data),
        "before": ("_rebuild_device_tensor_from_numpy", data.numpy()),
        "long before": ("_rebuild_xla_tensor", data.numpy()),
    }
    known = {when: call for when, call in saved.items() if hasattr(torch._utils, call[0])}
    return {when: _Reduced(function, values, *after) for when, (function, values) in known.items()}


@contextmanager
def wrapped_on(device: str) -> Iterator[None]:
    """Let torch.save write wrapper subclasses as if they lay on a device."""
    original = torch.Tensor._reduce_ex_internal

    def reduce(self: torch.Tensor, proto: int) -> Any:
        function, args = original(self, proto)
        if function is torch._utils._rebuild_wrapper_subclass:
            args = (*args[:6], torch.device(device), *args[7:])
        return function, args

    with mock.patch.object(torch.Tensor, "_reduce_ex_internal", reduce):
        yield


maps_xla = pytest.mark.skipif(
    not hasattr(torch._utils, "_rebuild_device_tensor_from_cpu_tensor"),
    reason="this torch does not map the tensors of an XLA device",
)


@maps_xla
@pytest.mark.parametrize("form", TO_CPU)
def test_tensors_without_a_storage_on_their_device(save: Save, form: str, tmp_path: Path) -> None:
    path = save({"state_dict": {"w": torch.ones(1)}, "more": as_xla()}, device="cuda:1")
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=False)
    with ckptkit.open(path) as file:
        file.rewrite(MapLocation(TO_CPU[form])).save(tmp_path / "out.pth")
    expected = torch.load(path, weights_only=False, map_location={"xla:0": "cpu", "cuda:1": "cpu"})
    found = torch.load(tmp_path / "out.pth", weights_only=False)
    for name in as_xla():
        assert torch.equal(found["more"][name], expected["more"][name])
        assert found["more"][name].device == torch.device("cpu")


@pytest.mark.parametrize("form", TO_CPU)
def test_subclasses_that_wrap_other_tensors(save: Save, form: str, tmp_path: Path) -> None:
    TwoTensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    pair = TwoTensor(torch.ones(2), torch.zeros(2))
    with wrapped_on("cuda:1"):
        path = save({"weights": {"w": torch.ones(1)}, "pair": pair}, device="cuda:1")
    with ckptkit.open(path) as file:
        before = {id(node): node.args for node in walk(file.rest) if isinstance(node, Object)}
        file.rewrite(MapLocation(TO_CPU[form])).save(tmp_path / "out.pth")
        assert before == {id(node): node.args for node in walk(file.rest) if isinstance(node, Object)}
    found = torch.load(tmp_path / "out.pth", weights_only=False)["pair"]
    assert type(found) is TwoTensor
    assert found.device == torch.device("cpu")
    assert torch.equal(found.a, pair.a)
    assert torch.equal(found.b, pair.b)


def test_values_of_the_state_dict_and_of_modules(save: Save, tmp_path: Path) -> None:
    TwoTensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.zeros(2, 2)))
    for saved in (model, model.state_dict()):
        with wrapped_on("cuda:1"):
            path = save(saved, device="cuda:1")
        with ckptkit.open(path) as file:
            result = file.rewrite(MapLocation("cpu"))
            assert not [node for node in _everything(result.checkpoint) if node in ("cuda", "cuda:1")]
            result.save(tmp_path / "out.pth", force=True)
        found = torch.load(tmp_path / "out.pth", weights_only=False)
        assert torch.equal(found["weight"].a, torch.ones(2, 2))
        assert found["weight"].device == found["bias"].device == torch.device("cpu")


def _everything(checkpoint: Checkpoint) -> Iterator[object]:
    for node in walk([list(checkpoint.state_dict.everything.values()), checkpoint.rest, checkpoint.module]):
        yield from node.args if isinstance(node, Object) else ()


def test_another_device(save: Save) -> None:
    with ckptkit.open(save({"state_dict": {"w": torch.ones(1)}, "more": as_xla()})) as file:
        for location, expected in (("cuda:3", "cuda:3"), ({"xla:0": "xla:1"}, "xla:1"), ({"xla": "cpu"}, "xla:0")):
            nodes = walk(file.rewrite(MapLocation(location)).rest)
            calls = [node for node in nodes if isinstance(node, Object) and "device" in node.class_name]
            assert [node.args[2] for node in calls] == [expected] * len(calls)
            assert calls


@maps_xla
def test_a_function_has_nothing_to_be_asked_about(save: Save) -> None:
    path = save({"w": torch.ones(1), "more": as_xla()})
    with pytest.raises(RuntimeError, match="Callable map_location not supported"):
        torch.load(path, weights_only=False, map_location=lambda storage, location: storage)
    with ckptkit.open(path) as file, pytest.raises(RewriteError, match="give a location or a dict of locations"):
        file.rewrite(MapLocation(lambda storage, location: storage))


def call(function: str, *args: object) -> Object:
    return Object("reduce", Global("torch._utils", function), args)


def device(*args: object) -> Object:
    return Object("reduce", Global("torch", "device"), args)


def mapped(node: object, location: Any) -> object:
    checkpoint = Checkpoint(
        state_dict=StateDict(), rest=[node, node], origin=Origin(path="", size=0, format="torch-zip", kind="other")
    )
    rest = MapLocation(location)(checkpoint).rest
    assert isinstance(rest, list)
    assert rest[0] is rest[1]
    return rest[0]


def of_device(node: object) -> object:
    return node.args if isinstance(node, Object) else node


@pytest.mark.parametrize(
    ("before", "location", "after"),
    [
        (device("cuda", 1), "cpu", ("cpu",)),
        (device("cuda", 1), "xpu:2", ("xpu", 2)),
        (device("cuda"), {"cuda": "cuda:3"}, ("cuda", 3)),
        (device("cuda", 0), {"cuda": "cpu"}, ("cuda", 0)),
        ("cuda:1", {"cuda:1": "cpu"}, "cpu"),
        (device("meta"), {"cuda": "cpu"}, ("meta",)),
        (device(), "cpu", ()),
        (device(1), "cpu", (1,)),
        (device("a", "b", "c"), "cpu", ("a", "b", "c")),
        (3, "cpu", 3),
    ],
)
def test_hand_made_calls(before: object, location: Any, after: object) -> None:
    float32 = Global("torch", "float32")
    cls = Global("mine", "Wrapper")
    args = (cls, float32, (2,), (1,), 0, None, before, False)
    for node in (
        call("_rebuild_wrapper_subclass", *args),
        Object("reduce", Global("torch._tensor", "_rebuild_from_type_v2"),
            (Global("torch._utils", "_rebuild_wrapper_subclass"), cls, args, InertDict())),
    ):  # fmt: skip
        found = mapped(node, location)
        assert isinstance(found, Object)
        inner = found.args[2] if len(found.args) == 4 else found.args
        assert isinstance(inner, tuple)
        assert of_device(inner[6]) == after
        assert of_device(args[6]) == of_device(before)
        assert inner[:2] == args[:2]


def test_calls_that_only_look_so() -> None:
    others = [
        call("_rebuild_wrapper_subclass", 1, 2),
        call("_rebuild_meta_tensor_no_storage", None, (1,), "cuda:0"),
        Object("reduce", Global("mine", "_rebuild_xla_tensor"), (None, None, "cuda:0", False)),
        Object("reduce", Global("torch._tensor", "_rebuild_from_type_v2"), (1, 2, 3, 4)),
        device("cuda", 0),
    ]
    for node in others:
        found = mapped(node, "cpu")
        assert isinstance(found, Object)
        assert found.args == node.args


def test_tensors_on_meta_stay_there(save: Save, tmp_path: Path) -> None:
    with ckptkit.open(save({"w": torch.ones(1), "m": torch.empty(2, device="meta"), "n": 1})) as file:
        file.rewrite(MapLocation("cpu")).save(tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=False, map_location="cpu")
    assert found["m"].device == torch.device("meta")


def test_what_hangs_on_the_mapping(save: Save, tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    state.noted = torch.ones(3)  # type: ignore[attr-defined]
    with ckptkit.open(save(state, device="cuda:1")) as file:
        file.rewrite(MapLocation("cpu")).save(tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=False)
    assert torch.equal(found.noted, torch.ones(3))
    assert found._metadata == state._metadata


def test_numpy_arrays_have_no_device(save: Save, tmp_path: Path) -> None:
    with ckptkit.open(save({"w": torch.ones(1), "n": numpy.arange(3), "s": 1}, device="cuda:1")) as file:
        file.rewrite(MapLocation("cpu")).save(tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=False)["n"].tolist() == [0, 1, 2]
