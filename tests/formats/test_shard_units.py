"""How names are shared out: each once, what is tied together, and no file larger than wanted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry, contiguous_stride
from ckptkit.dtypes import DTYPES
from ckptkit.errors import RewriteError
from ckptkit.formats import format_for
from ckptkit.formats.shard_writer import SafetensorsUnits, TorchUnits, plan_shards
from ckptkit.pickling.inert import InertDict

CONTAINERS = {"model.safetensors": format_for("", "safetensors"), "pytorch_model.bin": format_for("", "torch-zip")}
UNITS = {"model.safetensors": SafetensorsUnits, "pytorch_model.bin": TorchUnits}
both = pytest.mark.parametrize("name", list(CONTAINERS))


def made(number: int, shape: tuple[int, ...], location: str = "cpu", dtype: str = "float32") -> TensorEntry:
    """A tensor over a storage of its own, whose bytes nobody reads."""
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    source = ByteRange(None, 0, nbytes)  # type: ignore[arg-type]
    storage = Storage(key=str(number), dtype=dtype, nbytes=nbytes, location=location, source=source)
    return TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype=dtype)


ORIGIN = Origin(path="m.pth", size=0, format="torch-zip", kind="state_dict", state_path="")


def checkpoint_of(entries: dict[str, TensorEntry], versions: int = 100, **more: Any) -> Checkpoint:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in list(entries)[:versions])
    recorded = {module: InertDict([("version", 2)]) for module in modules}
    return Checkpoint(state_dict=StateDict(entries, versions=recorded), rest=STATE_DICT, origin=ORIGIN, **more)


NAMES = st.lists(st.sampled_from(["layer", "0", "重み", '"', "\n", "🙂", "w" * 60, "."]), max_size=5).map(".".join)


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    """Many names, some of them tied or views of another's storage."""
    entries: dict[str, TensorEntry] = {}
    texts = NAMES | st.text(st.characters(codec="utf-8"), max_size=9)
    for number, name in enumerate(draw(st.lists(texts, min_size=2, max_size=30, unique=True))):
        kind = draw(st.sampled_from(["own", "own", "own", "tied", "view"])) if entries else "own"
        if kind == "own":
            shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
            location = draw(st.sampled_from(["cpu", "cuda:0", "device" * 20]))
            entries[name] = made(number, shape, location, draw(st.sampled_from(["float32", "int8", "float8_e5m2"])))
        else:
            other = draw(st.sampled_from(list(entries.values())))
            view = kind == "view" and other.numel > 1
            entries[name] = replace(other, shape=(1,), stride=(1,)) if view else replace(other)
        if draw(st.booleans()):
            entries[name] = replace(entries[name], is_parameter=True, requires_grad=True)
    return checkpoint_of(entries, metadata={"note": "of " + draw(st.text(st.just("é"), max_size=90))})


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(checkpoint=checkpoints(), most=st.integers(1, 9000), name=st.sampled_from(list(CONTAINERS)))
def test_every_name_once_and_no_file_too_large(checkpoint: Checkpoint, most: int, name: str) -> None:
    plan = plan_shards(checkpoint, CONTAINERS[name], name, most)
    state_dict = checkpoint.state_dict
    if plan.index is None:
        assert plan.nbytes == CONTAINERS[name].write(checkpoint).nbytes
        return
    assert list(plan.index.weight_map) == [key for key in state_dict if key not in plan.aliases]
    assert name == "model.safetensors" or not plan.aliases
    listed = plan.index.weight_map
    weight_map = {key: listed[plan.aliases.get(key, key)] for key in state_dict}
    assert set(weight_map.values()) == set(plan.shards)
    assert plan.tensors == len(state_dict)
    for shard, part in plan.shards.items():
        names = [key for key, holder in weight_map.items() if holder == shard]
        together = {
            state_dict[key].view if name == "model.safetensors" else id(state_dict[key].storage) for key in names
        }
        assert part.nbytes <= most or len(together) == 1
    for key, entry in state_dict.items():
        for other, another in state_dict.items():
            tied = entry.view == another.view if name == "model.safetensors" else entry.storage is another.storage
            assert not tied or not entry.nbytes or weight_map[key] == weight_map[other]


def large(n: int) -> TensorEntry:
    """All that a pickle can say of a tensor, in numbers of eight bytes; its geometry is nonsense."""
    huge = (1 << 61) + n
    tag = f"privateuseone:{n}"
    source = ByteRange(None, 0, 5 << 30)  # type: ignore[arg-type]
    storage = Storage(key=str(n), dtype="uint8", nbytes=5 << 30, location=tag, source=source)
    entry = TensorEntry(
        storage=storage, storage_offset=huge, shape=tuple(huge + i for i in range(9)), dtype="complex64",
        stride=tuple(huge - i for i in range(9)), is_conj=True, is_neg=True)  # fmt: skip
    return replace(entry, is_parameter=True, requires_grad=True)


SHARED = made(0, (1,), dtype="int8")
MANY: dict[str, Callable[[int], TensorEntry]] = {
    "own storages": lambda n: made(n, (1,)),
    "one storage": lambda n: replace(SHARED, is_parameter=True, requires_grad=True, dtype="float8_e5m2"),
    "attributes": lambda n: replace(
        made(n, (1,)), attributes=InertDict([("a", n), ("b", "x" * 50)]), is_parameter=True
    ),
}


@pytest.mark.parametrize("text", ["", "é" * 300, '"\\\n', "\x00" * 9])
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(CONTAINERS, MANY), ("pytorch_model.bin", "large")])
def test_the_bound_is_one(name: str, kind: str, text: str) -> None:
    checkpoint = checkpoint_of({f"{n}{text}.w": MANY.get(kind, large)(n) for n in range(600)}, versions=600)
    units = UNITS[name](checkpoint)
    nbytes = CONTAINERS[name].write(checkpoint).nbytes
    for fixed in (units.first_nbytes, units.other_nbytes):
        assert nbytes <= fixed + sum(unit.nbytes for unit in units.units), "versions are counted in either way"


@pytest.mark.parametrize("length", [1, 700])
@both
def test_many_small_tensors_stay_below_the_size(name: str, length: int) -> None:
    entries = {f"{n}.{'é' * length}.weight": made(n, (1,) * (n % 9), "cuda:11") for n in range(3000)}
    checkpoint = checkpoint_of(entries)
    whole = CONTAINERS[name].write(checkpoint)
    plan = plan_shards(checkpoint, CONTAINERS[name], name, whole.nbytes // 3)
    assert 4 <= len(plan.shards) <= 9, "the bound is no waste either"
    assert all(part.nbytes <= whole.nbytes // 3 for part in plan.shards.values())


def test_too_many_shards() -> None:
    entries = {f"w{n}": made(n, (8,)) for n in range(10_001)}
    with pytest.raises(
        RewriteError, match=r"10,001 shards, and readers take at most 10,000; (\S+) bytes a file are"
    ) as e:
        plan_shards(checkpoint_of(entries), CONTAINERS["model.safetensors"], "m.safetensors", 60)
    enough = int(str(e.value).split("; ")[1].split(" ")[0].replace(",", ""))
    plan = plan_shards(checkpoint_of(entries), CONTAINERS["model.safetensors"], "m.safetensors", enough)
    assert len(plan.shards) <= 10_000
