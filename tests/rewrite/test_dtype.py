"""Casting the weights gives what ``tensor.to(dtype)`` gives, and leaves ties, views and all else alone."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import opened
from torch import nn

import ckptkit
from ckptkit import CastDtype, DTypeError
from ckptkit.casting import CAST_TARGETS, Caster, Losses
from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry
from ckptkit.computed import ConvertedRange
from ckptkit.pickling.inert import InertDict, walk
from ckptkit.torch_bridge import tensors

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def assert_cast(result: Checkpoint, saved: dict[str, torch.Tensor], dtype: torch.dtype, same_bits: SameBits) -> None:
    """Every floating tensor is what torch makes of it, every other one as it was."""
    got = tensors(result.state_dict)
    assert list(got) == list(saved)
    for name, tensor in saved.items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert same_bits(got[name], expected), name
        assert got[name].stride() == tensor.stride(), name
        assert got[name].storage_offset() == tensor.storage_offset(), name


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LSTM(2, 3))


def rest_tensors(checkpoint: Checkpoint) -> list[TensorEntry]:
    return [node for node in walk(checkpoint.rest) if isinstance(node, TensorEntry)]


@pytest.mark.parametrize("dtype", CAST_TARGETS)
def test_a_network(save: Save, same_bits: SameBits, dtype: str) -> None:
    saved = network().state_dict()
    with opened(save(saved)) as checkpoint:
        result = CastDtype(dtype)(checkpoint)
        assert_cast(result, saved, getattr(torch, dtype), same_bits)
        assert result.state_dict["1.num_batches_tracked"] is checkpoint.state_dict["1.num_batches_tracked"]
        assert result.state_dict.versions is checkpoint.state_dict.versions
        assert all(entry.dtype in ("float32", "int64") for entry in checkpoint.state_dict.values())
        written = result.state_dict["0.weight"].storage
        assert written.nbytes == saved["0.weight"].numel() * getattr(torch, dtype).itemsize
        assert written.byteorder == "little"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ties_and_views(save: Save, same_bits: SameBits, dtype: torch.dtype) -> None:
    base = torch.randn(6, 5)
    saved = {
        "weight": base,
        "tied": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "column": base[:, 1],
        "steps": base[::2, 1::2],
        "negated": torch._neg_view(base[3]),
        "expanded": base[:, :1].expand(6, 100),
        "element": base[1, 2],
        "none of it": base[6:],
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(7),
    }
    with opened(save(saved)) as checkpoint:
        result = CastDtype(str(dtype))(checkpoint)
        assert_cast(result, saved, dtype, same_bits)
        views = [name for name, tensor in saved.items() if tensor.untyped_storage().data_ptr() == base.data_ptr()]
        assert len({id(result.state_dict[name].storage) for name in views}) == 1
        loaded = tensors(result.state_dict)
        loaded["tied"][2, 1] = 42
        assert loaded["rows"][0, 1] == loaded["column"][2] == loaded["weight"][2, 1] == 42
        assert loaded["negated"].is_neg()


def test_a_whole_training_state(save: Save, same_bits: SameBits) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    (model[2](torch.ones(4)).sum() + model[0](torch.ones(1, 3, 4, 4)).sum()).backward()
    optimizer.step()
    saved = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "teacher": [value.clone() for value in model.state_dict().values()],
        "anchor": [model[0].weight.data[1], {"again": model[2].bias.data}],
        "epoch": 3,
    }
    with opened(save(saved)) as checkpoint:
        result = CastDtype("bfloat16")(checkpoint)
        assert_cast(result, saved["state_dict"], torch.bfloat16, same_bits)
        cast = {id(entry.storage) for entry in result.state_dict.values()}
        pairs = list(zip(rest_tensors(checkpoint), rest_tensors(result), strict=True))
        followed = [(old, new) for old, new in pairs if old is not new]
        assert len(followed) == 2
        for old, new in followed:
            assert (old.dtype, new.dtype) == ("float32", "bfloat16")
            assert (old.shape, old.stride, old.storage_offset) == (new.shape, new.stride, new.storage_offset)
            assert id(new.storage) in cast
        follower = tensors(StateDict({"anchor": followed[0][1]}))["anchor"]
        assert same_bits(follower, model[0].weight.data[1].bfloat16())
        assert {new.dtype for old, new in pairs if old is new} == {"float32", "int64"}
        assert isinstance(result.rest, InertDict)
        assert result.rest["epoch"] == 3


def test_a_whole_model(save: Save, same_bits: SameBits) -> None:
    model = network()
    with opened(save(model)) as checkpoint:
        result = CastDtype("float16")(checkpoint)
        assert_cast(result, dict(model.half().state_dict()), torch.float16, same_bits)
        inside = [node for node in walk(result.module) if isinstance(node, TensorEntry)]
        assert {entry.dtype for entry in inside} == {"float16", "int64"}
        assert result.state_dict["0.weight"].storage in [entry.storage for entry in inside]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ((), []),
        (("1.*",), ["1.weight", "1.bias", "1.running_mean", "1.running_var"]),
        ("*.bias", ["0.bias", "1.bias", "2.bias"]),
        (["0.weight", "[23].weight", "no such name"], ["0.weight", "2.weight"]),
        (("*",), [name for name, tensor in network().state_dict().items() if tensor.is_floating_point()]),
    ],
)
def test_names_that_are_kept(save: Save, keep: Any, kept: list[str]) -> None:
    with opened(save(network().state_dict())) as checkpoint:
        result = CastDtype("float16", keep)(checkpoint)
        for name, entry in result.state_dict.items():
            old = checkpoint.state_dict[name]
            if name in kept or old.dtype == "int64":
                assert entry is old
            else:
                assert entry.dtype == "float16"
        assert (result is checkpoint) == (keep == ("*",))


def test_what_is_tied_to_a_kept_name_is_kept(save: Save) -> None:
    weight = torch.ones(3, 2)
    with opened(
        save({"embed.weight": weight, "head.weight": weight, "part": weight[1:], "other": torch.ones(1)})
    ) as file:
        result = CastDtype("bfloat16", ("head.*",))(file)
        assert [entry.dtype for entry in result.state_dict.values()] == ["float32", "float32", "float32", "bfloat16"]


def test_what_has_the_dtype_already_stays_the_same_object(save: Save) -> None:
    saved = {"half": torch.ones(2).half(), "single": torch.ones(2), "int": torch.ones(2, dtype=torch.int8)}
    with opened(save(saved)) as checkpoint:
        result = CastDtype("float16")(checkpoint)
        assert result.state_dict["half"] is checkpoint.state_dict["half"]
        assert result.state_dict["int"] is checkpoint.state_dict["int"]
        assert CastDtype("float16")(result) is result


def test_what_is_no_floating_tensor_is_left(save: Save) -> None:
    saved = OrderedDict(
        weight=torch.ones(2),
        complex=torch.ones(2, dtype=torch.complex64),
        flags=torch.ones(2, dtype=torch.bool),
        sparse=torch.eye(2).to_sparse(),
        _extra_state={"scale": torch.ones(1)},
    )
    with opened(save(saved)) as checkpoint:
        result = CastDtype("float16")(checkpoint)
        assert [entry.dtype for entry in result.state_dict.values()] == ["float16", "complex64", "bool"]
        assert list(result.state_dict.everything) == list(saved)
        inside = [node for node in walk(list(result.state_dict.extra.values())) if isinstance(node, TensorEntry)]
        assert sorted(entry.dtype for entry in inside) == ["float32", "float32", "int64"]


def test_parameters_and_subclasses(save: Save) -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    with opened(save({"weight": weight, "frozen": nn.Parameter(torch.ones(2), requires_grad=False)})) as checkpoint:
        result = tensors(CastDtype("float16")(checkpoint).state_dict)
        assert isinstance(result["weight"], nn.Parameter)
        assert [tensor.requires_grad for tensor in result.values()] == [True, False]
        assert torch.equal(result["weight"].data, weight.data.half())
        entry = replace(checkpoint.state_dict["weight"], is_parameter=False, subclass="its class")
        tagged = CastDtype("float16")(checkpoint.replace(state_dict=StateDict({"weight": entry}))).state_dict["weight"]
        assert (tagged.dtype, tagged.subclass) == ("float16", "its class")


def test_other_containers(save: Save, same_bits: SameBits, tmp_path: Path) -> None:
    saved = network().state_dict()
    plain = save(saved)
    torch.save(saved, legacy := tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(deflated := tmp_path / "deflated.pth", "w") as new:
        for record in old.namelist():
            new.writestr(record, old.read(record), zipfile.ZIP_DEFLATED)
    from safetensors.torch import save_file

    save_file(saved, tensors_only := tmp_path / "model.safetensors")
    for path in (legacy, deflated):
        with opened(path) as checkpoint:
            assert_cast(CastDtype("bfloat16")(checkpoint), saved, torch.bfloat16, same_bits)
    with opened(tensors_only) as checkpoint:
        result = tensors(CastDtype("bfloat16")(checkpoint).state_dict)
        assert all(same_bits(result[k], v.bfloat16() if v.is_floating_point() else v) for k, v in saved.items())


def test_big_endian(save: Save, same_bits: SameBits) -> None:
    saved = {"weight": torch.randn(4, 3), "half": torch.randn(5).half()}
    swapped = {k: v.clone() for k, v in saved.items()}
    for tensor in swapped.values():
        tensor.untyped_storage().byteswap(tensor.dtype)
    with opened(save(swapped)) as checkpoint:
        state_dict = checkpoint.state_dict.with_values(
            lambda entry: replace(entry, storage=replace(entry.storage, byteorder="big"))  # type: ignore[type-var]
        )
        assert_cast(CastDtype("bfloat16")(checkpoint.replace(state_dict=state_dict)), saved, torch.bfloat16, same_bits)


def test_from_float8(save: Save, same_bits: SameBits) -> None:
    saved = {
        name: torch.randn(2, 3).to(getattr(torch, name))
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    }
    with opened(save(saved)) as checkpoint:
        result = CastDtype("float16")(checkpoint)
        assert_cast(result, saved, torch.float16, same_bits)
        assert {entry.storage.dtype for entry in result.state_dict.values()} == {"float16"}
        assert (
            CastDtype("float8_e5m2")(checkpoint).state_dict["float8_e4m3fn"].storage.dtype is None
        )  # torch has no class


def test_a_cast_storage_says_what_it_was_made_from(save: Save) -> None:
    with opened(save({"weight": torch.tensor([1.0, 1e9, 1e-20])}, device="cuda:1")) as checkpoint:
        old = checkpoint.state_dict["weight"].storage
        new = CastDtype("float16")(checkpoint).state_dict["weight"].storage
        assert (new.key, new.location, new.dtype, new.crc32, new.original) == (old.key, "cuda:1", "float16", None, old)
        assert isinstance(new.source, ConvertedRange)
        function = new.source.whole.function
        assert isinstance(function, Caster)
        losses = function.losses(old.source.read(), new.source.read())
        assert losses == Losses(3, overflowed=1, rounded=1, underflowed=1)


# Refusals.


@pytest.mark.parametrize("dtype", ["half", "fp16", "bf16", "float", "int8", "float8_e8m0fnu", "complex64", ""])
def test_no_dtype_to_cast_to(dtype: str) -> None:
    with pytest.raises(DTypeError, match="possible: float64, float32, float16, bfloat16, float8_e4m3fn"):
        CastDtype(dtype)


def test_what_is_recorded_of_it() -> None:
    assert repr(CastDtype("torch.bfloat16", "norm.*")) == "CastDtype(dtype='bfloat16', keep=('norm.*',))"
    assert CastDtype(str(torch.bfloat16), ("norm.*",)) == CastDtype("bfloat16", "norm.*")
    assert ckptkit.CastDtype is CastDtype


def test_bytes_of_two_dtypes(save: Save) -> None:
    raw = torch.arange(8, dtype=torch.uint8)
    saved = {"packed[0]": raw, "values": raw.view(torch.float8_e4m3fn), "other": torch.ones(2)}
    with opened(save(saved)) as checkpoint:
        with pytest.raises(DTypeError, match=r"'values' is float8_e4m3fn .* but 'packed\[0\]' views it as uint8"):
            CastDtype("float16")(checkpoint)
        for keep in ("values", "packed*"):
            result = CastDtype("float16", keep)(checkpoint)
            assert [entry.dtype for entry in result.state_dict.values()] == ["uint8", "float8_e4m3fn", "float16"]
        assert CastDtype("float8_e4m3fn")(checkpoint).state_dict["values"] is checkpoint.state_dict["values"]


def test_bytes_of_two_floating_dtypes(save: Save) -> None:
    eight = torch.ones(8).to(torch.float8_e4m3fn)
    with (
        opened(save({"a[1]": eight, "b": eight.view(torch.float8_e5m2)})) as checkpoint,
        pytest.raises(DTypeError, match=r"'a\[1\]' is float8_e4m3fn .* 'b' views it as float8_e5m2; .* 'a\[\[\]1\]'"),
    ):
        CastDtype("float16")(checkpoint)


def test_bytes_that_mean_something_else_beside_the_weights(save: Save) -> None:
    eight = torch.ones(8).to(torch.float8_e4m3fn)
    saved = {"state_dict": {"weight": eight}, "packed": [eight.view(torch.uint8)], "epoch": 1}
    with opened(save(saved)) as checkpoint, pytest.raises(DTypeError, match="a tensor beside the weights views it"):
        CastDtype("float16")(checkpoint)


def test_a_storage_by_itself(save: Save) -> None:
    eight = torch.ones(8).to(torch.float8_e4m3fn)
    saved = {"state_dict": {"weight": eight}, "bytes": eight.untyped_storage(), "epoch": 1}
    with opened(save(saved)) as checkpoint:
        with pytest.raises(DTypeError, match=r"'weight' is float8_e4m3fn .* on its own; .* --keep-dtype 'weight'"):
            CastDtype("float16")(checkpoint)
        assert CastDtype("float16", "weight")(checkpoint) is checkpoint


def test_packed_values(save: Save) -> None:
    saved = {"packed": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    with opened(save(saved)) as checkpoint, pytest.raises(DTypeError, match="'packed': values of 'float4_e2m1fn_x2'"):
        CastDtype("float16")(checkpoint)


def test_a_storage_of_a_part_of_a_value(save: Save) -> None:
    with opened(save({"weight": torch.ones(2)})) as checkpoint:
        entry = checkpoint.state_dict["weight"]
        storage = replace(entry.storage, nbytes=7, dtype=None, source=entry.storage.source.part(0, 7))
        changed = StateDict({"weight": replace(entry, storage=storage, shape=(1,))})
        with pytest.raises(DTypeError, match="7 bytes is not a whole number of float32 values"):
            CastDtype("float16")(checkpoint.replace(state_dict=changed))


def test_a_second_cast(save: Save) -> None:
    with opened(save({"weight": torch.ones(2)})) as checkpoint:
        once = CastDtype("bfloat16")(checkpoint)
        with pytest.raises(DTypeError, match="'weight' is already cast from float32 to bfloat16"):
            CastDtype("float32")(once)


def test_a_lazily_negated_view_of_eight_bits(save: Save, tmp_path: Path) -> None:
    """torch negates no 8-bit floats: such a view could be loaded, and never used."""
    base = torch.arange(6.0)
    saved = save({"base": base, "negated": torch._neg_view(base)})
    with pytest.raises(DTypeError, match=r"negated tensor of shape \(6,\) would be float8_e5m2 .* --keep-dtype"):
        ckptkit.convert(saved, tmp_path / "out.pth", dtype="float8_e5m2")
    assert not (tmp_path / "out.pth").exists()
    ckptkit.convert(saved, tmp_path / "kept.pth", dtype="float8_e5m2", keep_dtype="negated")
    assert torch.load(tmp_path / "kept.pth")["negated"].is_neg()
    ckptkit.convert(saved, tmp_path / "out.safetensors", dtype="float8_e5m2")
    values = ckptkit.load_state_dict(tmp_path / "out.safetensors")
    assert values["negated"].dtype == torch.float8_e5m2
    assert torch.equal(values["negated"].float(), -values["base"].float())
