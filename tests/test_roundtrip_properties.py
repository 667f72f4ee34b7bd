"""What goes through ckptkit comes out the same: properties over generated checkpoints.

torch writes, ckptkit reads, plans and writes, torch (or the safetensors library) loads; what torch
loads from the first file is what it must load from the second, to the bit, the stride and the sharing.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import random
import struct
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, event, given, settings

from ckptkit import formats, transfer
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import KeyCollisionError
from ckptkit.pickling.inert import InertDict
from ckptkit.rewrite import AddModule, MapLocation, StripModule

pytestmark = pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")

SOME = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(deadline=None, max_examples=150)

Rewriter = Callable[[Checkpoint], Checkpoint]


# Tensors.

# Not among them: dtypes this torch does not have.
STORABLE = [name for name, row in DTYPES.items() if row.kind != "quantized" and hasattr(torch, name)]
TAGS = ["cpu", "cuda:0", "cuda:1", "cuda:7", "mps"]
LOCATIONS = st.sampled_from(TAGS)

SEGMENTS = st.sampled_from(
    [
        "module",
        "mlp_module",
        "modules",
        "layer",
        "0",
        "weight",
        "",
        " ",
        "é",
        "重み",
        "a/b",
        "../x",
        "'",
        '"',
        "\n",
        "{}",
    ]
) | st.text(max_size=4)
KEYS = st.lists(SEGMENTS, max_size=4).map(".".join) | st.sampled_from(["", "format", "__metadata", "state", "a::b"])


@st.composite
def storages(draw: st.DrawFn, dtypes: list[str]) -> torch.Tensor:
    """A flat tensor of random bits that owns its storage."""
    dtype = getattr(torch, draw(st.sampled_from(dtypes)))
    numel = draw(st.integers(0, 12))
    raw = bytearray(draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize)))
    if not raw:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8).clone()
    return (flat & 1 if dtype is torch.bool else flat).view(dtype)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """A view of ``base``: whole, or of any size, stride and offset that stay inside."""
    if draw(st.booleans()):
        return base
    shape, stride = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=3).map(_columns))
    while _reach(shape, stride) > base.numel():
        shape, stride = shape[1:], stride[1:]
        if not shape and not base.numel():
            return base
    offset = draw(st.integers(0, base.numel() - _reach(shape, stride)))
    view = torch.as_strided(base, shape, stride, offset)
    if view.is_complex() and view.dtype in (torch.complex64, torch.complex128) and draw(st.booleans()):
        return view.conj()
    if view.dtype in (torch.float64, torch.float32) and draw(st.integers(0, 3)) == 0:
        return torch._neg_view(view)
    return view


def _columns(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [size for size, _ in pairs], [step for _, step in pairs]


def _reach(shape: list[int], stride: list[int]) -> int:
    """Elements from the first to the last that a view touches."""
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


@st.composite
def state_dicts(draw: st.DrawFn, dtypes: list[str] = STORABLE) -> dict[str, torch.Tensor]:
    """Named views of a few storages, so that many are tied or overlap."""
    bases = draw(st.lists(storages(dtypes), min_size=1, max_size=4))
    state: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(KEYS, min_size=1, max_size=8, unique=True)):
        if state and draw(st.integers(0, 4)) == 0:
            state[name] = draw(st.sampled_from(list(state.values())))  # the very same object
            continue
        tensor = draw(views(draw(st.sampled_from(bases))))
        if tensor.is_floating_point() and not tensor.is_neg() and draw(st.booleans()):
            tensor = torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
        state[name] = tensor
    if draw(st.booleans()):
        state = collections.OrderedDict(state)
        state._metadata = collections.OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    return state


# Python objects.


class Colour(enum.Enum):
    RED = 1
    GREEN = "green"


class Flags(enum.IntFlag):
    A = 1
    B = 2


Point = collections.namedtuple("Point", ["x", "y"])


class Box:
    """Keeps anything, itself included."""

    def __init__(self, content: object = None) -> None:
        self.content = content


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self, left: object, right: object) -> None:
        self.left, self.right = left, right


class Configured(dict):
    """A dict with attributes, made with keyword arguments."""

    def __new__(cls, *, name: str) -> Configured:
        self = super().__new__(cls)
        self.name = name
        return self

    def __init__(self, *, name: str) -> None:
        super().__init__()

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, str]]:
        return (), {"name": self.name}


class Tally(list):
    """A list with a state of its own making."""

    total = 0

    def __getstate__(self) -> tuple[str, int]:
        return "total", self.total

    def __setstate__(self, state: tuple[str, int]) -> None:
        self.total = state[1]


def _configured(name: str, content: dict[str, object]) -> Configured:
    made = Configured(name=name)
    made.update(content)
    return made


def _tally(items: list[object]) -> Tally:
    made = Tally(items)
    made.total = len(items)
    return made


HASHABLE = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
LEAVES = HASHABLE | st.sampled_from(
    [
        float("nan"),
        -0.0,
        complex(-0.0, float("inf")),
        -(1 << 2047),
        "\ud800",
        "module.weight",
        b"\xff" * 300,
        bytearray(b"\0\xff"),
        datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
        datetime.date(1, 1, 1),
        datetime.timedelta(days=-1, microseconds=1),
        decimal.Decimal("0.1"),
        fractions.Fraction(-2, 3),
        pathlib.PurePosixPath("runs/1"),
        uuid.UUID(int=7),
        Colour.RED,
        Colour.GREEN,
        Flags.A | Flags.B,
        range(3, 9, 2),
        slice(1, None),
        Ellipsis,
        len,
        collections.OrderedDict,
        functools.partial(int, base=2),
        torch.float16,
        torch.Size([2, 3]),
        torch.device("cpu"),
        torch.strided,
        np.float64(1.5),
        np.arange(6, dtype=np.int16).reshape(2, 3).T,
        np.array([None, "x"], dtype=object),
    ]
)


def _containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inside, max_size=3)
    named = st.dictionaries(st.text(max_size=3), inside, max_size=3)
    return (
        some
        | some.map(tuple)
        | some.map(lambda items: collections.deque(items, maxlen=5))
        | some.map(_tally)
        | st.dictionaries(HASHABLE, inside, max_size=3)
        | named.map(lambda content: argparse.Namespace(**content))
        | named.map(collections.OrderedDict)
        | named.map(lambda content: collections.defaultdict(list, content))
        | st.builds(_configured, st.text(max_size=3), named)
        | st.builds(Point, inside, inside)
        | st.builds(Slotted, inside, inside)
        | st.builds(Box, inside)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
        | st.lists(st.text(max_size=2), max_size=3).map(collections.Counter)
    )


OBJECTS = st.recursive(LEAVES, _containers, max_leaves=8)


@st.composite
def graphs(draw: st.DrawFn) -> list[Any]:
    """Containers that hold one another, in cycles too."""
    kinds = st.sampled_from([list, dict, Box, collections.deque, argparse.Namespace, set])
    nodes = [kind() for kind in draw(st.lists(kinds, min_size=1, max_size=6))]
    for number, (a, b) in enumerate(draw(st.lists(st.tuples(*[st.integers(0, len(nodes) - 1)] * 2), max_size=12))):
        target, member = nodes[a], nodes[b]
        if draw(st.integers(0, 3)) == 0:
            member = (number, member)
        if isinstance(target, (list, collections.deque)):
            target.append(member)
        elif isinstance(target, dict):
            target[number] = member
        elif isinstance(target, set):
            if isinstance(member, Box) and not target:  # its members have no order to compare them by
                target.add(member)
        else:
            setattr(target, f"link{number}", member)
    return nodes


# The way through.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roundtrip")


def save(obj: object, path: Path, tags: dict[int, str] | None = None, protocol: int = 2) -> Path:
    """Write with torch; storages are tagged by the address of their data."""
    by_address = tags or {}
    with mock.patch("torch.serialization.location_tag", lambda storage: by_address.get(storage.data_ptr(), "cpu")):
        torch.save(obj, path, pickle_protocol=protocol)
    return path


def through(source: Path, destination: Path, *rewriters: Rewriter) -> Path:
    """Read, rewrite and write with ckptkit."""
    checkpoint, file = formats.read(source)
    with closing(file):
        write = formats.format_for(destination).write
        assert write is not None
        plan = write(checkpoint.rewrite(*rewriters))
        transfer.write_atomically(destination, plan, force=True, check=None)
    assert destination.stat().st_size == plan.nbytes
    return destination


def load(path: Path) -> tuple[Any, list[str]]:
    """What torch loads, and the tags of its storages in the order they are met."""
    tags: list[str] = []

    def cpu(storage: Any, tag: str) -> Any:
        tags.append(tag)
        return storage

    return torch.load(path, map_location=cpu, weights_only=False), tags


class Same:
    """Holds two objects against each other: types, order, bits, and what is shared with what."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, int], int] = {}
        self._back: dict[tuple[str, int], int] = {}

    def __call__(self, a: Any, b: Any, at: str = "root") -> None:
        assert type(a) is type(b), at
        if isinstance(a, float):
            assert struct.pack("d", a) == struct.pack("d", b), at
        elif isinstance(a, complex):
            assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag), at
        elif isinstance(a, torch.Tensor):
            if not self._seen("object", id(a), id(b), at):
                self._tensor(a, b, at)
        elif isinstance(a, torch.UntypedStorage):
            if a.nbytes() + b.nbytes() and not self._seen("storage", a._cdata, b._cdata, at):
                assert a.tolist() == b.tolist(), at
        elif isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tolist()) == (b.dtype, b.shape, b.tolist()), at
        elif isinstance(a, functools.partial):
            assert (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords), at
        elif isinstance(a, tuple):  # shared or not, it is the same value; cycles pass through something else
            self._items(a, b, at)
        elif isinstance(a, (enum.Enum, type)) or not (hasattr(a, "__dict__") or isinstance(a, COMPOUND)):
            assert a == b, at
        elif not self._seen("object", id(a), id(b), at):
            self._members(a, b, at)

    def _seen(self, kind: str, a: int, b: int, at: str) -> bool:
        """Whether the two were paired before; sharing must be the same on both sides."""
        if (kind, a) in self._pairs or (kind, b) in self._back:
            assert self._pairs.get((kind, a)) == b, f"{at}: shared with something else"
            assert self._back.get((kind, b)) == a, f"{at}: shared with something else"
            return True
        self._pairs[kind, a], self._back[kind, b] = b, a
        return False

    def _items(self, a: Any, b: Any, at: str) -> None:
        assert len(a) == len(b), at
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            self(left, right, f"{at}[{index}]")

    def _members(self, a: Any, b: Any, at: str) -> None:
        if isinstance(a, dict):
            self._items(list(a), list(b), f"{at}.keys()")
            self._items(list(a.values()), list(b.values()), f"{at}.values()")
        elif isinstance(a, (list, collections.deque)):
            self._items(a, b, at)
        elif isinstance(a, (set, frozenset)):
            self._items(sorted(a, key=repr), sorted(b, key=repr), at)
        if isinstance(a, collections.defaultdict):
            assert a.default_factory is b.default_factory, at
        if isinstance(a, collections.deque):
            assert a.maxlen == b.maxlen, at
        for name in getattr(type(a), "__slots__", ()):
            self(getattr(a, name), getattr(b, name), f"{at}.{name}")
        if hasattr(a, "__dict__"):
            self(vars(a), vars(b), f"vars({at})")

    def _tensor(self, a: torch.Tensor, b: torch.Tensor, at: str) -> None:
        assert (a.dtype, a.shape, a.requires_grad, a.is_conj(), a.is_neg()) == (
            *(b.dtype, b.shape, b.requires_grad, b.is_conj(), b.is_neg()),
        ), at
        self(vars(a), vars(b), f"vars({at})")
        if a.layout is not torch.strided:
            self._items((a._indices(), a._values()), (b._indices(), b._values()), at)
            return
        assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()), at
        self(a.untyped_storage(), b.untyped_storage(), f"{at}.untyped_storage()")


COMPOUND = (dict, list, collections.deque, set, frozenset, Slotted)


def bits(tensor: torch.Tensor) -> list[int]:
    plain = tensor.detach().resolve_conj().resolve_neg().flatten().clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8).tolist() if plain.numel() else []


@st.composite
def tagged(draw: st.DrawFn, tensors: list[torch.Tensor]) -> dict[int, str]:
    """A tag for the storage of each tensor, by the address of its data."""
    addresses = sorted({t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().nbytes()})
    return dict(
        zip(addresses, draw(st.lists(LOCATIONS, min_size=len(addresses), max_size=len(addresses))), strict=True)
    )


# The properties.


@SOME
@given(data=st.data(), state=state_dicts())
def test_a_state_dict_survives(folder: Path, data: st.DataObject, state: dict[str, torch.Tensor]) -> None:
    source = save(state, folder / "source.pth", data.draw(tagged(list(state.values()))))
    expected, tags = load(source)
    result = through(source, folder / "result.pth")
    found, tags_after = load(result)
    Same()(expected, found)
    assert tags_after == tags
    # Written once more it is the same file, byte for byte.
    assert through(result, folder / "again.pth").read_bytes() == result.read_bytes()


@SOME
@given(state=state_dicts(), rest=OBJECTS, graph=graphs(), protocol=st.integers(2, 5))
def test_a_resume_dict_survives(
    folder: Path, state: dict[str, torch.Tensor], rest: object, graph: list[object], protocol: int
) -> None:
    tensors = list(state.values())
    checkpoint = {
        "state_dict": state,
        "optimizer": {"state": {i: {"moment": t} for i, t in enumerate(tensors)}, "param_groups": [{"lr": 0.1}]},
        "rest": rest,
        "graph": graph,
        1: ("again", rest, tensors[-1:], state),
    }
    source = save(checkpoint, folder / "source.pth", protocol=protocol)
    result = through(source, folder / "result.pth")
    Same()(load(source)[0], load(result)[0])
    assert through(result, folder / "again.pth").read_bytes() == result.read_bytes()


@SOME
@given(rest=OBJECTS, graph=graphs(), protocol=st.integers(2, 5))
def test_python_objects_survive(folder: Path, rest: object, graph: list[object], protocol: int) -> None:
    source = save([rest, graph, rest], folder / "source.pth", protocol=protocol)
    Same()(load(source)[0], load(through(source, folder / "result.pth"))[0])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_odd_tensors_survive(folder: Path) -> None:
    noted = torch.arange(3.0)
    noted.note = ["about", torch.ones(1)]
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.shard = {"axis": 0}
    everything = {
        "sparse": torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (3,)),
        "noted": noted,
        "parameter": parameter,
        "buffer": torch.nn.Buffer(torch.zeros(2), persistent=False),
        "extra._extra_state": {"scale": torch.ones(1)},
        "plain": torch.ones(2),
    }
    resume = {"state_dict": everything, "again": [*everything.values()], "bytes": torch.UntypedStorage([1, 2])}
    resume["random"] = (random.Random(0).getstate(), np.random.default_rng(0).bit_generator.state)
    for obj in (everything, resume):
        source = save(obj, folder / "source.pth")
        Same()(load(source)[0], load(through(source, folder / "result.pth"))[0])


BYTES = torch.arange(16, dtype=torch.uint8)
EMPTY = torch.empty(0)


@pytest.mark.parametrize(
    "obj",
    [
        {"packed": BYTES, "weight": BYTES.view(torch.float8_e4m3fn)},
        {"weight": BYTES.view(torch.float8_e4m3fn), "packed": BYTES},
        {"weight": BYTES.view(torch.uint16), "scale": BYTES.view(torch.float8_e5m2)[3:]},
        {"empty": EMPTY, "as integers": EMPTY.view(torch.int32)},
        {"state_dict": {"packed": BYTES}, "bytes": BYTES.untyped_storage()},
        {"state_dict": {"packed": BYTES[:13]}, "bytes": [torch.UntypedStorage(0), torch.UntypedStorage(3)]},
    ],
)
def test_views_of_bytes_survive(folder: Path, obj: object) -> None:
    """One storage under two types: torch takes an untyped storage for one of uint8."""
    source = save(obj, folder / "source.pth")
    Same()(load(source)[0], load(through(source, folder / "result.pth"))[0])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_set_that_its_member_holds_survives(folder: Path, protocol: int) -> None:
    box = Box()
    box.content = {box}
    ring = frozenset([Box(deeper := Box())])
    deeper.content = (ring, [ring])
    for obj in (box, box.content, [box.content, box], {"state_dict": {"w": torch.ones(1)}, "rest": [ring, deeper]}):
        source = save(obj, folder / "source.pth", protocol=protocol)
        Same()(load(source)[0], load(through(source, folder / "result.pth"))[0])


SAFETENSORS = [name for name in STORABLE if DTYPES[name].safetensors]


@SOME
@given(state=state_dicts(SAFETENSORS))
def test_safetensors_holds_the_same_values(folder: Path, state: dict[str, torch.Tensor]) -> None:
    source = save(state, folder / "source.pth")
    result = through(source, folder / "result.safetensors")
    loaded = safetensors.torch.load_file(result)
    with safetensors.safe_open(result, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    event(f"tied: {len(loaded) < len(state)}")
    for name, tensor in state.items():
        found = loaded[name] if name in loaded else loaded[metadata[name]]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert bits(found) == bits(tensor), name
    # And back: every name has its tensor again, and what was tied still is.
    back = load(through(result, folder / "back.pth"))[0]
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert bits(back[name]) == bits(tensor), name
    shared = collections.Counter(tensor.untyped_storage()._cdata for tensor in back.values() if tensor.numel())
    assert len(shared) == sum(tensor.numel() > 0 for tensor in loaded.values())


@SOME
@given(data=st.data(), state=state_dicts(), new=LOCATIONS)
def test_map_location_changes_tags_alone(
    folder: Path, data: st.DataObject, state: dict[str, torch.Tensor], new: str
) -> None:
    checkpoint = {"state_dict": state, "optimizer": {"state": {0: list(state.values())}, "param_groups": []}}
    source = save(checkpoint, folder / "source.pth", data.draw(tagged(list(state.values()))))
    expected, tags = load(source)
    found, moved = load(through(source, folder / "result.pth", MapLocation(new)))
    Same()(expected, found)
    assert moved == [new] * len(tags)

    chosen = data.draw(st.dictionaries(LOCATIONS, LOCATIONS))
    found, moved = load(through(source, folder / "result.pth", MapLocation(chosen)))
    Same()(expected, found)
    assert moved == [chosen.get(tag, tag) for tag in tags]

    found, moved = load(through(source, folder / "result.pth", MapLocation(lambda storage, tag: {"mps": new}.get(tag))))
    Same()(expected, found)
    assert moved == [new if tag == "mps" else tag for tag in tags]


# Names.


def checkpoint_of(names: list[str], versions: dict[str, object] | None) -> Checkpoint:
    """A checkpoint that no file backs: renaming reads none."""
    nowhere = ByteRange(mock.Mock(SourceFile), 0, 0)
    storage = Storage(key="0", dtype="float32", nbytes=0, location="cpu", source=nowhere)
    entries = {
        name: TensorEntry(storage=storage, storage_offset=0, shape=(0,), stride=(1,), dtype="float32") for name in names
    }
    return Checkpoint(
        state_dict=StateDict(entries, versions=versions),
        rest=STATE_DICT,
        origin=Origin(path="x.pth", size=0, format="torch-zip", kind="state_dict", state_path=""),
    )


def is_bare(name: str) -> bool:
    """Whether a name carries no wrapper."""
    *parents, _ = name.split(".")
    return "_orig_mod" not in parents and parents[:1] != ["module"]


WRAPPERS = st.lists(st.sampled_from(["module", "_orig_mod"]), min_size=1, max_size=3)
BARE = st.lists(KEYS.filter(is_bare), unique=True, min_size=1, max_size=6)


def versions_of(names: list[str]) -> dict[str, object]:
    """The module versions torch saves beside such names: for the root first, then every module."""
    paths = {".".join(name.split(".")[:depth]): None for name in names for depth in range(name.count(".") + 1)}
    return {path: InertDict([("version", number)]) for number, path in enumerate({"": None, **paths})}


@MANY
@given(names=BARE, versioned=st.booleans())
def test_strip_module_undoes_add_module(names: list[str], versioned: bool) -> None:
    versions = versions_of(names) if versioned else None
    before = checkpoint_of(names, versions)
    wrapped = before.rewrite(AddModule())
    assert list(wrapped.state_dict) == [f"module.{name}" for name in names]
    after = wrapped.rewrite(StripModule())
    assert list(after.state_dict.items()) == list(before.state_dict.items())
    assert after.state_dict.versions == versions
    assert list(after.state_dict.versions or ()) == list(versions or ())


@MANY
@given(names=BARE, wrappers=WRAPPERS)
def test_strip_module_takes_off_every_wrapper(names: list[str], wrappers: list[str]) -> None:
    prefix = ".".join(wrappers)
    after = checkpoint_of([f"{prefix}.{name}" for name in names], None).rewrite(StripModule())
    assert list(after.state_dict) == names


@MANY
@given(names=st.lists(KEYS | WRAPPERS.map(".".join) | st.tuples(WRAPPERS, KEYS).map(
    lambda pair: ".".join([*pair[0], pair[1]])), unique=True, max_size=8))  # fmt: skip
def test_strip_module_loses_nothing(names: list[str]) -> None:
    before = checkpoint_of(names, None)
    try:
        after = before.rewrite(StripModule())
    except KeyCollisionError as error:
        assert {error.first, error.second} <= set(names)
        assume(False)
    assert list(after.state_dict.values()) == list(before.state_dict.values())
    assert all(is_bare(name) for name in after.state_dict)
    assert list(after.rewrite(StripModule()).state_dict.items()) == list(after.state_dict.items())
