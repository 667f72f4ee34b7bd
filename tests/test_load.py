"""`ckptkit.load` gives what torch.load gives, with stand-ins for what only foreign code makes; torch is the oracle."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from support.files import with_data
from support.torch_oracle import same
from torch import nn
from torch.optim import lr_scheduler

import ckptkit
from ckptkit import Foreign
from ckptkit.errors import CorruptError, SectionError, UnsupportedError

Save = Callable[..., Path]


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    layers: tuple[int, ...] = (1, 2)


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, torch.ones(2)


class Called:
    """Is a dict that is made of pairs, all at once."""

    def __reduce__(self) -> Any:
        return dict, (((1, "a"), ("b", [2])),)


class Config(dict):  # type: ignore[type-arg]
    pass


class History(list):  # type: ignore[type-arg]
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())  # type: ignore[no-any-return]


PLAIN: dict[str, Any] = {
    "dict": {"a": 1, 2: "b", (3, "c"): None, None: True},
    "ordered": OrderedDict(b=1, a=[1.5, (2, "x")]),
    "default": collections.defaultdict(list, a=[1]),
    "factories": [
        collections.defaultdict(kind, a=kind())
        for kind in (int, tuple, frozenset, complex, bytes, OrderedDict, collections.Counter, collections.deque)
    ],
    "called": {"of pairs": Called()},
    "counter": collections.Counter("abca"),
    "sets": [{1, "a"}, frozenset({2.0})],
    "bytes": [b"\x00\xff", bytearray(b"ab"), "\ud800é", 1 << 70, -0.0, 1j, range(3), slice(1, None)],
    "torch": [torch.Size([2, 3]), torch.device("cuda:1"), torch.float16],
    "numpy": [numpy.arange(6.0).reshape(2, 3).T, numpy.float64(0.5), numpy.array(["a", "bc"]), numpy.int64(3)],
    "arrays alone": {"a": numpy.arange(6.0).reshape(2, 3).T, "b": {"c": numpy.ones(2, "f2"), "d": numpy.array(True)}},
    "times": [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "x")),
        datetime.date(2026, 1, 2),
        datetime.time(3, 4),
        datetime.timedelta(1, 2, 3),
    ],
    "decimal": decimal.Decimal("1.50"),
    "deque": collections.deque([1, 2, 3], maxlen=3),
    "tensors": [torch.ones(2), nn.Parameter(torch.zeros(3)), torch.eye(2).to_sparse(), torch.ones(2).bfloat16()],
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_values_are_what_torch_loads(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / "model.pth"
    torch.save(PLAIN[name], path, pickle_protocol=protocol)
    ours, theirs = ckptkit.load(path), torch.load(path, weights_only=False)
    assert same(ours, theirs), ours


def test_arrays_of_a_plain_pickle_are_arrays(tmp_path: Path) -> None:
    saved = {"model": {"a": numpy.arange(6.0).reshape(2, 3), "b": numpy.ones(2, "f2")}, "epoch": 3}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(saved))
    assert same(ckptkit.load(tmp_path / "model.pkl"), saved)
    assert torch.equal(ckptkit.load_state_dict(tmp_path / "model.pkl")["a"], torch.arange(6.0).double().view(2, 3))


def test_the_dict_of_a_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    ours = ckptkit.load(tmp_path / "model.safetensors")
    assert type(ours) is dict and same(ours, {"a": torch.ones(2), "b": torch.zeros(3)})


def test_versions_of_modules_and_attributes_of_an_ordered_dict(save: Save) -> None:
    state = Net().state_dict()
    ours = ckptkit.load(save({"model": state, "epoch": 3}))
    assert ours["model"]._metadata == state._metadata
    assert ours["epoch"] == 3 and same(dict(ours["model"]), dict(state))


def test_attributes_of_tensors(save: Save) -> None:
    weight, buffer = nn.Parameter(torch.ones(2)), torch.zeros(3)
    weight.note, weight.scale = "kept", buffer  # type: ignore[attr-defined]
    buffer.persistent = False  # type: ignore[attr-defined]
    path = save({"weight": weight, "buffer": buffer, "again": buffer})
    for loaded in (torch.load(path, weights_only=True), ckptkit.load(path)):
        assert vars(loaded["weight"]).keys() == {"note", "scale"} and loaded["weight"].note == "kept"
        assert loaded["weight"].scale is loaded["buffer"] is loaded["again"]
        assert vars(loaded["buffer"]) == {"persistent": False}
    assert not vars(ckptkit.load_state_dict(path)["weight"])


def test_what_is_one_is_one_and_cycles_close(save: Save) -> None:
    shared, weight, lasting = [1], torch.arange(6.0), argparse.Namespace()
    lasting.me, lasting.shared = lasting, shared
    cycle: list[Any] = [shared]
    cycle.append((cycle, weight[:2]))
    ours = ckptkit.load(save({"a": shared, "c": cycle, "n": lasting, "w": weight, "again": weight}))
    assert ours["c"][0] is ours["a"] is ours["n"].shared
    assert ours["c"][1][0] is ours["c"] and ours["n"].me is ours["n"]
    assert ours["again"] is ours["w"] and ours["c"][1][1].data_ptr() == ours["w"].data_ptr()


# Training goes on.

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW([{"params": p[:2], "weight_decay": 0.0}, {"params": p[2:]}], lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


def trained(parts: tuple[nn.Module, torch.optim.Optimizer, Any], steps: range) -> list[torch.Tensor]:
    """The weights after some more steps, and the learning rates."""
    model, optimizer, scheduler = parts
    for step in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(*([float(step)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    rates = torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)
    return [*(value.detach().clone() for value in model.state_dict().values()), rates]


def parts_of(optimizer: str, scheduler: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(3)
    model = Net()
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    return model, made, SCHEDULERS[scheduler](made)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:The epoch parameter")
@pytest.mark.parametrize(
    ("optimizer", "scheduler"), [*((name, "StepLR") for name in OPTIMIZERS), *(("AdamW", name) for name in SCHEDULERS)]
)
def test_training_goes_on_as_if_it_had_not_stopped(save: Save, optimizer: str, scheduler: str) -> None:
    first = parts_of(optimizer, scheduler)
    trained(first, range(3))
    names = ("model", "optimizer", "scheduler")
    path = save({name: part.state_dict() for name, part in zip(names, first, strict=True)})
    went_on = trained(first, range(3, 7))
    again = parts_of(optimizer, scheduler)
    state = ckptkit.load(path)
    for name, part in zip(names, again, strict=True):
        part.load_state_dict(state[name])
    assert all(map(torch.equal, trained(again, range(3, 7)), went_on))


def test_a_gradient_scaler_goes_on(save: Save) -> None:
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch has a scaler for CUDA alone")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    scaler.scale(torch.ones(1, requires_grad=True))
    path = save({"scaler": scaler.state_dict(), "rng": torch.get_rng_state()})
    state = ckptkit.load(path)
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(state["scaler"])
    assert again.state_dict() == scaler.state_dict()
    torch.set_rng_state(state["rng"])


# Stand-ins.


@pytest.mark.parametrize("protocol", [2, 5])
def test_attributes_are_shown(tmp_path: Path, protocol: int) -> None:
    args = argparse.Namespace(lr=0.1, name="x", deep=types.SimpleNamespace(w=torch.ones(1)))
    objects = {
        "args": args, "settings": Settings(), "slots": Slots(), "color": Color.RED,
        "partial": functools.partial(Settings, 3, layers=()), "path": pathlib.PurePosixPath("/a/b"),
    }  # fmt: skip
    torch.save(objects, tmp_path / "model.pth", pickle_protocol=protocol)
    ours = ckptkit.load(tmp_path / "model.pth")
    assert (ours["args"].lr, ours["args"].name, ours["args"].deep.w.item()) == (0.1, "x", 1)
    assert list(vars(ours["args"])) == ["lr", "name", "deep"]
    assert vars(ours["settings"]) == {"lr": 0.1, "layers": (1, 2)}
    assert (ours["slots"].a, ours["slots"].b.tolist()) == (1, [1, 1])
    assert (ours["partial"].args, ours["partial"].keywords) == ((3,), {"layers": ()})
    assert ours["partial"].func.__name__.endswith(".Settings") and ours["partial"].func.__args__ is None
    assert ours["path"] == pathlib.PurePosixPath("/a/b")
    color = ours["color"]
    assert color.__name__.endswith(".Color.RED") or (color.__name__.endswith(".Color") and color.__args__ == (1,))
    assert {type(ours[name]) for name in objects} == {Foreign, pathlib.PurePosixPath}
    assert ours["args"].__name__ == "argparse.Namespace"


def test_dicts_and_lists_of_foreign_classes(save: Save) -> None:
    config, history = Config(lr=1, keys="k"), History([1, [2]])
    config.depth = 3  # type: ignore[attr-defined]
    ours = ckptkit.load(save({"config": config, "history": history}))["config"]
    assert (ours["lr"], ours.lr, ours.depth, len(ours), list(ours), "lr" in ours) == (1, 1, 3, 2, ["lr", "keys"], True)
    assert dict(ours) == {"lr": 1, "keys": "k"} and ours.keys() == ["lr", "keys"]
    history_again = ckptkit.load(save({"history": history}))["history"]
    assert history_again[1] == [2] and list(history_again) == [1, [2]] and bool(history_again)


def test_a_whole_model(save: Save) -> None:
    model = Net()
    path = save(model)
    for ours in (ckptkit.load(path), ckptkit.load(save({"model": model, "epoch": 1}, "resume.pth"))["model"]):
        assert isinstance(ours, Foreign) and ours.__name__.endswith(".Net")
        assert isinstance(ours.head.weight, nn.Parameter) and same(ours.head.weight, model.head.weight)
        assert same(getattr(ours.body, "1").running_mean, model.body[1].running_mean)
        with pytest.raises(TypeError, match="not callable"):
            ours(torch.ones(1, 3))
    with pytest.raises(AttributeError, match=r"no attribute 'tail' of this .*\.Net"):
        _ = ckptkit.load(path).tail


def test_a_name_a_repr_and_identity(save: Save) -> None:
    long = argparse.Namespace(**{f"name{i}": "x" * 1000 for i in range(50)})
    ours = ckptkit.load(save({"f": torch.relu, "c": Settings, "a": long, "b": Settings(1.5)}))
    assert repr(ours["f"]).endswith("relu, by name>") and repr(ours["c"]) == f"<{__name__}.Settings, by name>"
    assert repr(ours["b"]) == f"<{__name__}.Settings lr=1.5 layers=<tuple>>"
    assert len(repr(ours["a"])) < 200 and "\n" not in repr(ours["a"])
    assert ours["b"] != ckptkit.load(save({"b": Settings(1.5)}))["b"] and len({ours["b"], ours["b"]}) == 1
    for again in (copy.deepcopy(ours["b"]), pickle.loads(pickle.dumps(ours["b"]))):
        assert vars(again) == vars(ours["b"]) and again.__name__ == ours["b"].__name__


class Hostile:
    """Attributes by which Python would call something, on a class that is looked up by name."""

    def __reduce__(self) -> Any:
        names = ["__class__", "__call__", "__len__", "__iter__", "__reduce__", "__dict__", "__name__", "__eq__"]
        return argparse.Namespace, (), {**dict.fromkeys(names, Settings), "lr": 1, "keys": 2}


def test_no_name_that_python_looks_for_comes_from_the_file(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"a": Hostile(), "o": OrderedDict(x=1)})
    monkeypatch.setitem(sys.modules, "argparse", None)  # whoever imports it fails
    ours = ckptkit.load(path)["a"]
    assert type(ours) is ours.__class__ is Foreign and len(ours) == 0
    assert vars(ours) == {"lr": 1, "keys": 2} and ours.__name__ == "argparse.Namespace"
    with pytest.raises(AttributeError):
        _ = ours.__call__


def test_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('it ran')",)

    torch.save({"w": torch.ones(1), "b": Bomb()}, tmp_path / "bomb.pth")
    ours = ckptkit.load(tmp_path / "bomb.pth")
    assert ours["b"].__name__ in ("builtins.exec", "__builtin__.exec") and ours["w"].item() == 1


def test_configurations_show_their_values(save: Save) -> None:
    """As omegaconf pickles them: each value an object that has it as ``_val``."""
    names = ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")
    modules = {"omegaconf", *(f"omegaconf.{name.partition('.')[0]}" for name in names)}
    made: dict[str, Any] = {}
    for name in names:
        module, _, short = f"omegaconf.{name}".rpartition(".")
        made[short] = type(short, (), {"__module__": module})
    for module in modules:
        sys.modules[module] = types.ModuleType(module)
        for kind in made.values():
            if kind.__module__ == module:
                setattr(sys.modules[module], kind.__name__, kind)

    def node(kind: str, **state: Any) -> Any:
        value = made[kind]()
        vars(value).update(state)
        return value

    try:
        values = node("ListConfig", _content=[node("AnyNode", _val=3)], _parent=None)
        config = node(
            "DictConfig", _content={"lr": node("AnyNode", _val=0.1), "sizes": values}, _metadata={"key": None}
        )
        values._parent = config
        path = save({"cfg": config})
    finally:
        for module in modules:
            del sys.modules[module]
    ours = ckptkit.load(path)["cfg"]
    assert (ours.lr, ours["lr"], list(ours), ours.sizes[0]) == (0.1, 0.1, ["lr", "sizes"], 3)


# A part, and what cannot be made.


def test_a_part_by_its_keys(save: Save) -> None:
    model = Net()
    optimizer = OPTIMIZERS["Adam"](list(model.parameters()))
    trained((model, optimizer, SCHEDULERS["StepLR"](optimizer)), range(2))
    path = save({"a": {"b.c": [1, {"d": 5}]}, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    whole = ckptkit.load(path)
    for section in ("optimizer", "model", "optimizer.state.0", "model.head.weight", "a.b.c.1"):
        part: Any = whole
        for key in {"a.b.c.1": ["a", "b.c", 1], "optimizer.state.0": ["optimizer", "state", 0],
                    "model.head.weight": ["model", "head.weight"]}.get(section, [section]):  # fmt: skip
            part = part[key]
        assert same(ckptkit.load(path, section=section), part), section
    with pytest.raises(SectionError, match=r"there is no section 'optimizer\.nothing'"):
        ckptkit.load(path, section="optimizer.nothing")


def test_a_part_reads_only_itself(save: Save) -> None:
    path = save({"model": {"w": torch.ones(1000)}, "args": argparse.Namespace(lr=1)})
    path.write_bytes(path.read_bytes().replace(torch.ones(1000).numpy().tobytes(), bytes(4000)))
    assert ckptkit.load(path, section="args").lr == 1
    with pytest.raises(CorruptError, match="CRC-32"):
        ckptkit.load(path)
    assert ckptkit.load(path, ignore_checksums=True)["model"]["w"].sum() == 0


def test_what_is_nested_too_deep(save: Save) -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UnsupportedError, match=r"model\.pth: extra\.x: nested more than 100 levels deep"):
        ckptkit.load(save({"extra": {"x": deep}, "w": torch.ones(1)}, "model.pth"))


def test_a_malformed_value_is_named(tmp_path: Path) -> None:
    torch.save(
        {"w": torch.ones(1), "info": {"when": [datetime.date(2026, 1, 2)]}}, tmp_path / "a.pth", pickle_protocol=4
    )
    bad_month = lambda name, data: data.replace(b"\x07\xea\x01\x02", b"\x07\xea\x7f\x02")  # noqa: E731
    path = with_data(tmp_path / "a.pth", bad_month)
    with pytest.raises(CorruptError, match=r"info\.when: a datetime\.date that cannot be created"):
        ckptkit.load(path)


def test_places_and_mapping(save: Save) -> None:
    path = save({"w": torch.arange(64.0), "n": {"x": torch.ones(2)}}, device="cuda:1")
    assert ckptkit.load(path, map_location="meta")["n"]["x"].is_meta
    assert same(ckptkit.load(path)["w"], torch.arange(64.0))
    mapped = ckptkit.load(path, mapped=True)["w"]
    before = path.read_bytes()
    assert same(mapped, torch.arange(64.0))
    mapped.zero_()
    assert path.read_bytes() == before
