"""Storages are cut down to what is viewed of them, and no value changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.files import opened
from support.generated_tensors import STORABLE
from torch import nn

import ckptkit
from ckptkit import Compact
from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Checkpoint, Origin, StateDict, Storage, TensorEntry
from ckptkit.computed import ConvertedRange, DTypeConversion
from ckptkit.pickling.inert import InertDict
from ckptkit.rewrite.storages import dead_bytes

Save = Callable[..., Path]
Through = Callable[..., Any]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def stored(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_a_small_view_of_a_large_storage(save: Save, through: Through) -> None:
    big = torch.arange(20_000.0)
    saved = {"view": big[500:520].view(4, 5), "whole": torch.ones(3)}
    assert save(saved).stat().st_size > big.nbytes
    with opened(save(saved)) as checkpoint:
        assert dead_bytes(checkpoint) == (1, big.nbytes - 80)
        compact = Compact()(checkpoint)
        assert dead_bytes(compact) == (0, 0)
        assert compact.state_dict["whole"] is checkpoint.state_dict["whole"]
        before, after = (found.state_dict["view"].storage for found in (checkpoint, compact))
        assert after.original is before
        assert (after.nbytes, after.crc32, after.location, after.dtype) == (80, None, "cpu", "float32")
        assert before.nbytes == big.nbytes
        assert Compact()(compact) is compact
    path = through(saved, Compact(), load=False)
    assert path.stat().st_size < 5000
    found = torch.load(path)
    assert torch.equal(found["view"], saved["view"])
    assert stored(found["view"]) == 80


def test_nothing_to_cut(save: Save) -> None:
    lstm = nn.LSTM(3, 4)
    full = torch.ones(4, 4)
    for saved in (lstm.state_dict(), nn.BatchNorm1d(3).state_dict(), {"a": full, "b": full[1:], "t": full.T, "n": 3}):
        with opened(save(saved)) as checkpoint:
            assert dead_bytes(checkpoint) == (0, 0)
            assert Compact()(checkpoint) is checkpoint


def test_slices_of_one_flat_storage_stay_together(through: Through) -> None:
    flat = torch.arange(100.0)
    saved = {"w": flat[10:20].view(2, 5), "u": flat[20:30], "b": flat[30:31], "far": flat[50:60], "inside": flat[12:14]}
    found = through(saved, Compact())
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    together = {name for name in saved if stored(found[name]) == 84}
    assert together == {"w", "u", "b", "inside"}
    assert len({found[name].untyped_storage().data_ptr() for name in together}) == 1
    assert stored(found["far"]) == 40


def test_ties_stay_ties(through: Through) -> None:
    view = torch.arange(100.0)[3:9]
    found = through({"a": view, "b": view, "rest": view[2:]}, Compact())
    assert found["a"].data_ptr() == found["b"].data_ptr()
    found["rest"].zero_()
    assert found["a"].tolist() == [3, 4, 0, 0, 0, 0]


def test_what_stands_beside_the_weights_counts(through: Through, save: Save) -> None:
    flat = torch.arange(1000.0)
    noted = torch.ones(1)
    noted.mask = flat[500:510]  # type: ignore[attr-defined]
    saved = {
        "state_dict": {"w": flat[:10], "m._extra_state": (flat[700:705],)},
        "optimizer": {"state": {0: {"exp_avg": flat[5:20]}}, "param_groups": []},
        "noted": [noted],
    }
    with opened(save(saved)) as checkpoint:
        assert dead_bytes(checkpoint) == (1, 4 * (1000 - 20 - 10 - 5))
    found = through(saved, Compact())
    moment = found["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, flat[5:20])
    assert moment.untyped_storage().data_ptr() == found["state_dict"]["w"].untyped_storage().data_ptr()
    assert stored(moment) == 80
    assert torch.equal(found["noted"][0].mask, flat[500:510])
    assert stored(found["noted"][0].mask) == 40
    assert torch.equal(found["state_dict"]["m._extra_state"][0], flat[700:705])


def test_what_hangs_on_the_mapping_counts(through: Through) -> None:
    state = nn.Linear(10, 10).state_dict()
    state["weight"] = state["weight"][:2]
    state.noted = state["weight"][1]  # type: ignore[attr-defined]
    found = through(state, Compact())
    assert stored(found["weight"]) == 80
    assert torch.equal(found.noted, state["weight"][1])
    assert found.noted.untyped_storage().data_ptr() == found["weight"].untyped_storage().data_ptr()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_storages_that_stand_alone_are_left_whole(save: Save) -> None:
    flat = torch.arange(100.0)
    quantized = torch.quantize_per_tensor(flat, 0.1, 0, torch.qint8)
    octets = torch.arange(100, dtype=torch.uint8)
    for saved in ({"w": octets[:3], "bare": octets.untyped_storage()}, {"w": torch.ones(2), "q": quantized[:5]}):
        with opened(save(saved)) as checkpoint:
            assert dead_bytes(checkpoint) == (0, 0)


def test_tensors_without_elements(through: Through) -> None:
    flat = torch.arange(100.0)
    saved = {
        "none of a used one": flat[7:7], "used": flat[:5], "alone": torch.ones(50)[20:20].view(0, 3),
        "empty": torch.empty(2, 0),
    }  # fmt: skip
    found = through(saved, Compact())
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].shape, found[name].stride()) == (tensor.shape, tensor.stride())
        assert stored(found[name]) == tensor.nbytes


def test_parts_begin_where_the_widest_element_can(through: Through) -> None:
    flat = torch.arange(16.0, dtype=torch.float64)
    single = flat.view(torch.uint8)[17:19]
    with pytest.raises(RuntimeError, match="different types"):  # torch refuses to save such, ckptkit reads others'
        torch.save({"d": flat[8:9], "b": single}, "/dev/null")
    source = ByteRange(file=None, offset=1000, nbytes=128)  # type: ignore[arg-type]
    storage = Storage(key="0", dtype=None, nbytes=128, location="cpu", source=source)
    entries = {
        "byte": TensorEntry(storage=storage, storage_offset=17, shape=(2,), stride=(1,), dtype="uint8"),
        "double": TensorEntry(storage=storage, storage_offset=8, shape=(1,), stride=(1,), dtype="float64"),
    }
    found = Compact()(of(StateDict(entries))).state_dict
    assert [(e.storage.source.offset, e.storage.nbytes, e.storage_offset) for e in found.values()] == [  # type: ignore[union-attr]
        (1016, 8, 1), (1064, 8, 0)
    ]  # fmt: skip
    assert {entry.storage.original for entry in found.values()} == {storage}


def of(state_dict: StateDict, rest: object = None) -> Checkpoint:
    return Checkpoint(
        state_dict=state_dict, rest=rest, origin=Origin(path="", size=0, format="torch-zip", kind="state_dict")
    )


def test_a_converted_storage_is_cut_between_values() -> None:
    original = Storage(
        key="0", dtype="float32", nbytes=400, location="cpu",
        source=ByteRange(file=None, offset=0, nbytes=400),  # type: ignore[arg-type]
    )  # fmt: skip
    conversion = DTypeConversion(original.source, 4, 2, lambda data: data[::2], "w", "float16")  # type: ignore[arg-type]
    cast = Storage(
        key="0", dtype="float16", nbytes=200, location="cpu", source=ConvertedRange(conversion, 0, 200),
        original=original,
    )  # fmt: skip
    entry = TensorEntry(storage=cast, storage_offset=30, shape=(5,), stride=(2,), dtype="float16")
    found = Compact()(of(StateDict({"w": entry}))).state_dict["w"]
    assert found.storage_offset == 0
    assert found.storage.original is original
    assert isinstance(found.storage.source, ConvertedRange)
    assert found.storage.source.original == ByteRange(file=None, offset=120, nbytes=36)  # type: ignore[arg-type]


def test_many_views_of_one_storage() -> None:
    source = ByteRange(file=None, offset=0, nbytes=1 << 30)  # type: ignore[arg-type]
    storage = Storage(key="0", dtype="float32", nbytes=1 << 30, location="cpu", source=source)
    entries = {
        str(index): TensorEntry(storage=storage, storage_offset=index * 7919 % 20_011 * 100, shape=(9,), stride=(1,),
            dtype="float32")
        for index in range(20_000)
    }  # fmt: skip
    checkpoint = of(StateDict(entries), InertDict([("all", list(entries.values()))]))
    assert dead_bytes(checkpoint) == (1, (1 << 30) - 36 * 20_000)
    found = Compact()(checkpoint)
    assert sum(entry.storage.nbytes for entry in found.state_dict.values()) == 36 * 20_000
    assert isinstance(found.rest, InertDict)
    assert found.rest["all"] == list(found.state_dict.values())


Geometry = tuple[int, tuple[int, ...], tuple[int, ...]]
_SIZE = 60


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Offset, shape and stride of a view that fits `_SIZE` elements."""
    offset = draw(st.integers(0, _SIZE - 1))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    stride = []
    room = _SIZE - 1 - offset
    for size in shape:
        step = draw(st.integers(0, room // max(size - 1, 1)))
        room -= step * max(size - 1, 0)
        stride.append(step)
    return offset, tuple(shape), tuple(stride)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 1), geometries()), min_size=1, max_size=6),
    st.sampled_from([name for name in ("float32", "int8", "float8_e4m3fn", "complex128") if name in STORABLE]),
)
def test_every_value_stays(
    save: Save, same_bits: SameBits, tmp_path: Path, drawn: list[tuple[int, Geometry]], dtype: str
) -> None:
    bases = [(torch.arange(_SIZE) + shift).to(getattr(torch, dtype)) for shift in (0, 60)]
    saved = {
        f"t{index}": torch.as_strided(bases[which], shape, stride, offset)
        for index, (which, (offset, shape, stride)) in enumerate(drawn)
    }
    with ckptkit.open(save({"w": saved, "again": list(saved.values())})) as file:
        storages, saving = dead_bytes(file.checkpoint)
        result = file.rewrite(Compact())
        result.save(tmp_path / "out.pth", force=True)
        assert dead_bytes(result.checkpoint) == (0, 0)
    found = torch.load(tmp_path / "out.pth")
    kept: dict[int, int] = {}
    for (name, tensor), again in zip(saved.items(), found["again"], strict=True):
        new = found["w"][name]
        assert same_bits(new, tensor)
        assert new.stride() == tensor.stride()
        assert not new.numel() or new.data_ptr() == again.data_ptr()
        kept[new.untyped_storage()._cdata] = stored(new)
    touched = {
        (which, at)
        for which, (offset, shape, stride) in drawn
        if math.prod(shape)
        for at in range(offset, offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
    }
    assert sum(kept.values()) == len(touched) * getattr(torch, dtype).itemsize
    used = {which for which, _ in drawn}
    assert saving == sum(bases[which].nbytes for which in used) - sum(kept.values())
    assert storages == sum(len({at for base, at in touched if base == which}) < _SIZE for which in used)
