"""Every tensor of a file is listed: held against an unpickler that knows no class and no section.

It makes nothing of a pickle but the calls that are in it, whatever becomes of their results: every ``_rebuild_tensor*``
is a tensor, every persistent id a storage, every ``_reconstruct`` of numpy's an array.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.errors import LimitError
from ckptkit.limits import DEFAULT_LIMITS, Limits

FIXTURES = Path(__file__).parents[2] / "fixtures"
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch: what is deprecated, or a prototype

CORPUS = os.environ.get("CKPTKIT_CORPUS", "")


Call = tuple[str, tuple[Any, ...], Any]
"""What is called, with what, and what it makes."""


class Stub:
    """What every name stands for: a class whose objects keep what they are made of."""

    full = ""
    args: tuple[Any, ...]
    calls: list[Call]

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        made = super().__new__(cls)
        made.args = args
        cls.calls.append((cls.full, args, made))
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        """What `functools.partial` makes is called."""
        return type(self)(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


class Calls(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Keeps the calls of a pickle and the storages it names."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.calls: list[Call] = []
        self.storages: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (Stub,), {"calls": self.calls, "full": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] != "storage":
            return pid[1]
        view = pid[5] if len(pid) > 5 else None  # of files before torch 1.6: a part of a storage
        key = str(pid[2] if view is None else view[0])
        self.storages.add(key)
        return "storage", key


def pickles(path: Path) -> Iterator[bytes]:
    """The pickles of a file that hold objects."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(("/data.pkl", "/constants.pkl")):
                    yield archive.read(name)
        return
    data = path.read_bytes()
    stream = io.BytesIO(data)
    for _ in range(3):  # magic number, protocol, sys_info
        if not data.startswith(b"\x80"):
            return
        for _ in pickletools.genops(stream):
            pass
    yield data[stream.tell() :]


def expected(path: Path) -> tuple[set[str], set[tuple[str, tuple[int, ...]]], list[tuple[int, ...]]]:
    """Keys of storages; key and shape of each tensor; the shapes of numpy's arrays."""
    storages: set[str] = set()
    tensors: set[tuple[str, tuple[int, ...]]] = set()
    arrays: list[tuple[int, ...]] = []
    for data in pickles(path):
        reader = Calls(io.BytesIO(data))
        reader.load()
        storages |= reader.storages
        for name, args, made in reader.calls:
            if name.endswith("._rebuild_from_type_v2"):
                name, args = args[0].full, args[2]
            if name.endswith(("._rebuild_tensor", "._rebuild_tensor_v2", "._rebuild_tensor_v3")):
                tensors.add((args[0][1], tuple(args[2])))
            elif name.startswith("numpy") and name.endswith("._reconstruct") and made.state[2].args[0][0] in "bifuc":
                arrays.append(tuple(made.state[1]))  # of numbers
    return storages, tensors, arrays


def assert_all_listed(path: Path) -> None:
    document = ckptkit.inspect(path)
    assert document["error"] is None, document["error"]
    rows = document["tensors"]
    storages, tensors, arrays = expected(path)
    if arrays and not storages:  # with no tensor beside them they are tensors, each of a storage of its own
        assert {row.get("form") for row in rows} == {None}
        assert sorted(tuple(row["shape"]) for row in rows) == sorted(arrays)
        assert len({row["storage"] for row in rows}) == len(arrays)
        return
    assert {row["storage"] for row in rows} - {""} == storages
    assert {(row["storage"], tuple(row["shape"])) for row in rows if row.get("form") is None} == tensors
    assert sorted(tuple(row["shape"]) for row in rows if row.get("form") == "numpy") == sorted(arrays)


class Holder:
    def __init__(self, value: object = None) -> None:
        self.value = value


class Arguments(Holder):
    def __reduce__(self) -> Any:
        return Arguments, (self.value,)


class KeywordArguments(Holder):
    def __new__(cls, value: object = None) -> KeywordArguments:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (), {"value": self.value}


class Listing(list[Any]):
    pass


class Mapping(dict[Any, Any]):
    pass


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.codebook = torch.full((3,), 9.0)
        self.settings = {"anchors": [torch.ones(4), (torch.ones(5),)]}
        self.register_buffer("cache", torch.ones(6), persistent=False)
        self.body.register_forward_hook(Hook())


class Hook:
    def __init__(self) -> None:
        self.optimizer = torch.ones(7)

    def __call__(self, *args: object) -> None:
        pass


def noted(tensor: torch.Tensor, **attributes: torch.Tensor) -> torch.Tensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def with_attributes() -> Any:
    state = nn.Linear(2, 2).state_dict()
    state.extra = torch.ones(11)  # type: ignore[attr-defined]
    return state


T = torch.ones
PLACES: dict[str, Callable[[], Any]] = {
    "in attributes of a module": Codebook,
    "of a module in a dict": lambda: {"model": Codebook(), "epoch": 1},
    "of two modules": lambda: {"model": Codebook(), "ema": Codebook(), "epoch": 1},
    "of a module in a list": lambda: [Codebook()],
    "in attributes of a tensor": lambda: {"w": T(2), "t": noted(T(3), scale=T(4))},
    "of a parameter": lambda: {"w": nn.Parameter(noted(T(2), scale=T(4)))},
    "of a tensor beside the weights": lambda: {"model": {"w": T(2)}, "t": noted(T(3), scale=T(4))},
    "of a tensor in an attribute of a tensor": lambda: {"w": noted(T(2), a=noted(T(3), b=T(4)))},
    "in attributes of a state_dict": with_attributes,
    "of another section": lambda: {"model": {"w": T(2)}, "generator": with_attributes()},
    "in foreign objects": lambda: {"model": {"w": T(2)}, "x": Holder(Holder([T(3), {"a": T(4)}]))},
    "in arguments": lambda: {"model": {"w": T(2)}, "x": Arguments(T(3))},
    "in keyword arguments": lambda: {"model": {"w": T(2)}, "x": KeywordArguments(T(3))},
    "in a list of a class of its own": lambda: {"model": {"w": T(2)}, "x": Listing([T(3)])},
    "in a dict of a class of its own": lambda: {"model": {"w": T(2)}, "x": Mapping(a=T(3))},
    "in keys": lambda: {"model": {"w": T(2)}, "x": {T(3): 1, (T(4), 2): T(5)}},
    "in sets": lambda: {"model": {"w": T(2)}, "x": {T(3)}, "y": frozenset([T(4)])},
    "in a root that is a foreign object": lambda: Holder({"w": T(2)}),
    "in quantized values": lambda: {"w": torch.quantize_per_tensor(T(2, 2), 0.1, 0, torch.qint8), "b": T(2)},
    "in channels": lambda: {"w": torch.quantize_per_channel(T(2, 2), T(2), torch.zeros(2), 0, torch.qint8), "b": T(2)},
    "in sparse values": lambda: {"w": torch.eye(3).to_sparse(), "b": T(2), "c": T(4, 4).to_sparse_csr()},
    "in nested values": lambda: {"w": torch.nested.nested_tensor([T(2), T(3)]), "b": T(2)},
    "in storages": lambda: {"w": T(2), "x": [T(3).untyped_storage(), T(4).storage()]},
    "in arrays": lambda: {"layer.w": np.ones((2, 3), "f4"), "b": np.ones(4, "f8")},
    "in arrays beside tensors": lambda: {"w": T(2), "v": np.ones((3, 1), "i8"), "x": {"y": np.zeros(2, ">f4")}},
    "in an extra state": lambda: {"w": T(2), "a._extra_state": {"amax": T(3), "scale": [T(4)]}},
    "in an optimizer": lambda: {"model": {"w": T(2)}, "o": {"state": {0: {"m": T(3)}}, "param_groups": []}},
    "under integers": lambda: {0: T(2), 1: {2: T(3)}},
    "nowhere": lambda: {"epoch": 3},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_every_tensor_is_listed(save: Callable[..., Path], place: str) -> None:
    assert_all_listed(save(PLACES[place]()))


@pytest.mark.parametrize("place", PLACES)
def test_in_files_of_old(save: Callable[..., Path], tmp_path: Path, place: str) -> None:
    path = tmp_path / "legacy.pth"
    torch.save(PLACES[place](), path, _use_new_zipfile_serialization=False)
    assert_all_listed(path)


FIXED = [path for path in sorted(FIXTURES.iterdir()) if path.suffix in (".pth", ".pt")]
KNOWN = sorted(path for path in Path(CORPUS).iterdir() if path.is_file()) if CORPUS else []


@pytest.mark.parametrize("path", [*FIXED, *KNOWN], ids=lambda path: path.name)
def test_in_files_that_are_there(path: Path) -> None:
    try:
        document = ckptkit.inspect(path)
    except ckptkit.UnknownFormatError:
        return
    if document["format"] in ("torch-zip", "torchscript", "torch-legacy"):
        assert_all_listed(path)


def test_what_belongs_to_no_section_has_none(save: Callable[..., Path]) -> None:
    model = Codebook()
    rows = ckptkit.inspect(save({"model": model, "epoch": 1}))["tensors"]
    assert [row["name"] for row in rows if row["section"] == "model"] == list(Codebook().state_dict())
    assert {row["name"] for row in rows if row["section"] is None} == {
        "model.codebook", "model.cache", "model.settings.anchors.0", "model.settings.anchors.1.0",
        f"model.body._forward_hooks.{next(iter(model.body._forward_hooks))}.optimizer",
    }  # fmt: skip
    rows = ckptkit.inspect(save({"w": T(2), "t": noted(T(3), scale=T(4))}))["tensors"]
    assert [(row["section"], row["name"]) for row in rows] == [("", "w"), ("", "t"), (None, "t.scale")]
    sections = ckptkit.inspect(save({"model": Codebook(), "ema": Codebook()}))["sections"]
    assert [section["tensors"] for section in sections] == [len(Codebook().state_dict())] * 2


def test_a_storage_and_an_array_say_what_they_are(save: Callable[..., Path]) -> None:
    rows = ckptkit.inspect(save({"w": T(2), "v": np.ones((3, 2), ">i2", order="F"), "s": T(4).storage()}))["tensors"]
    found = {row["name"]: (row["dtype"], row["shape"], row["stride"], row["nbytes"], row.get("form")) for row in rows}
    assert found == {
        "w": ("float32", [2], [1], 8, None),
        "v": ("int16", [3, 2], [1, 3], 12, "numpy"),
        "s": ("float32", [4], [1], 16, "storage"),
    }


@pytest.mark.parametrize("most", [3_000, pytest.param(300_000, marks=pytest.mark.thorough)])
def test_no_list_is_gone_through_in_part(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEFAULT_LIMITS.entries == 300_000
    monkeypatch.setattr("ckptkit.normalize.tensors.DEFAULT_LIMITS", Limits(entries=most))
    same = (1, "a")
    for before in ([same] * (most + 1), [same] * (most - 1) + [{}] * 2):
        path = tmp_path / "m.pth"
        torch.save([*before, T(2)], path)
        assert [row["name"] for row in ckptkit.inspect(path)["tensors"]] == [str(len(before))]
    torch.save([T(1)] * (most + 1), path)
    with pytest.raises(LimitError, match=f"values in a list: {most + 1:,} is over the limit"):
        ckptkit.inspect(path)
