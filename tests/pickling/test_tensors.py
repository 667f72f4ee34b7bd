"""torch's pickle vocabulary: torch saves, ckptkit reads, torch loads what ckptkit writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.files import SameBits, Save, tensor_of
from support.generated_tensors import STORABLE

from ckptkit import formats
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.formats import torch_zip_writer
from ckptkit.pickling.inert import InertDict, Object, walk
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.transfer.writing import write_atomically


def read(path: Path) -> Checkpoint:
    return formats.read(path)[0]


def rewritten(path: Path) -> Path:
    """The file read and written again by ckptkit."""
    checkpoint, file = formats.read(path)
    target = path.with_name("again.pth")
    write_atomically(target, torch_zip_writer.write(checkpoint), force=True, check=None)
    file.close()
    return target


def of_dtype(name: str, *shape: int) -> torch.Tensor:
    dtype = getattr(torch, name)
    count = DTYPES[name].itemsize
    for size in shape:
        count *= size
    raw = torch.arange(count, dtype=torch.int64).remainder(2 if name == "bool" else 97).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:.*support is experimental:UserWarning")
@pytest.mark.parametrize("name", STORABLE)
def test_every_dtype_is_read_and_written_bit_for_bit(name: str, save: Save, same_bits: SameBits) -> None:
    whole = of_dtype(name, 4, 6)
    path = save({"whole": whole, "part": whole[1:, 2:5], "empty": of_dtype(name, 0, 3), "scalar": of_dtype(name)})
    loaded = torch.load(path)
    checkpoint = read(path)
    assert list(checkpoint.state_dict) == ["whole", "part", "empty", "scalar"]
    again = torch.load(rewritten(path))
    for key, entry in checkpoint.state_dict.items():
        assert (entry.shape, entry.stride, entry.dtype) == (tuple(loaded[key].shape), loaded[key].stride(), name)
        assert entry.storage_offset == loaded[key].storage_offset()
        assert entry.storage.dtype == (name if DTYPES[name].storage_class else None)
        assert entry.storage.nbytes == loaded[key].untyped_storage().nbytes()
        assert same_bits(again[key], loaded[key])
    assert same_bits(tensor_of(checkpoint.state_dict["whole"]), whole)
    assert checkpoint.state_dict["part"].storage is checkpoint.state_dict["whole"].storage
    assert again["part"].untyped_storage().data_ptr() == again["whole"].untyped_storage().data_ptr()


def test_the_table_has_every_dtype_of_torch_that_fills_bytes() -> None:
    known = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    fractions = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
    assert known - fractions <= set(DTYPES)


@pytest.mark.parametrize("name", [name for name in STORABLE if DTYPES[name].numpy is not None])
def test_item_sizes_are_torchs(name: str) -> None:
    assert DTYPES[name].itemsize == getattr(torch, name).itemsize
    assert DTYPES[name].is_floating == getattr(torch, name).is_floating_point


GEOMETRY: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "step": lambda: torch.arange(12.0)[::2],
    "columns": lambda: torch.arange(12.0).reshape(3, 4)[:, :3],
    "expanded": lambda: torch.arange(3.0)[:, None].expand(3, 5),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "zero size": lambda: torch.empty(0, 4),
    "zero size at the end": lambda: torch.arange(12.0).reshape(3, 4)[3:, 4:],
    "0-d": lambda: torch.tensor(1.5),
    "1 element of many": lambda: torch.arange(1000.0)[999],
    "overlapping": lambda: torch.arange(10.0).as_strided((3, 4), (2, 1)),
    "conj": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "neg": lambda: torch.randn(3, dtype=torch.complex128).conj().imag,
    "conj and neg": lambda: torch.view_as_complex(torch.randn(3, 2)).conj()._neg_view(),
    "requires grad": lambda: torch.randn(2, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.randn(2)),
    "frozen parameter": lambda: torch.nn.Parameter(torch.randn(2), requires_grad=False),
    "nan": lambda: torch.tensor([float("nan"), -0.0, float("inf")]),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_every_geometry_is_read_and_written_as_torch_does(name: str, save: Save, same_bits: SameBits) -> None:
    original = GEOMETRY[name]()
    path = save({"t": original})
    entry = read(path).state_dict["t"]
    assert (entry.shape, entry.stride) == (tuple(original.shape), original.stride())
    assert entry.requires_grad == original.requires_grad
    assert entry.is_parameter == isinstance(original, torch.nn.Parameter)
    assert (entry.is_conj, entry.is_neg) == (original.is_conj(), original.is_neg())
    assert entry.is_contiguous == original.is_contiguous()
    if entry.numel:
        assert same_bits(tensor_of(entry), original)
    again = torch.load(rewritten(path))["t"]
    assert type(again) is type(original)
    assert again.requires_grad == original.requires_grad
    assert (again.stride(), again.is_conj(), again.is_neg()) == (
        original.stride(), original.is_conj(), original.is_neg())  # fmt: skip
    assert same_bits(again, original)


# Python attributes and subclasses.


def with_attributes(t: torch.Tensor, **attributes: object) -> torch.Tensor:
    for key, value in attributes.items():
        setattr(t, key, value)
    return t


class Marked(torch.Tensor):
    pass


ATTRIBUTED: dict[str, Callable[[], torch.Tensor]] = {
    "tensor": lambda: with_attributes(torch.randn(2), note="n"),
    "parameter": lambda: with_attributes(torch.nn.Parameter(torch.randn(2)), note="n"),
    **({"buffer": lambda: torch.nn.Buffer(torch.randn(2), persistent=False)} if hasattr(torch.nn, "Buffer") else {}),
    "subclass": lambda: torch.randn(2).as_subclass(Marked),
    "subclass with attributes": lambda: with_attributes(torch.randn(2).as_subclass(Marked), note=[1, "n"]),
    **{
        f"{name} with attributes": lambda name=name: with_attributes(of_dtype(name, 2), note="n")
        for name in ("float8_e5m2", "uint16")
        if name in STORABLE
    },
    "subclass of bfloat16 that needs grad": lambda: (
        torch.randn(2, dtype=torch.bfloat16).as_subclass(Marked).requires_grad_()
    ),
}


@pytest.mark.parametrize("name", ATTRIBUTED)
def test_attributes_and_subclasses_are_kept(name: str, save: Save, same_bits: SameBits) -> None:
    original = ATTRIBUTED[name]()
    path = save({"t": original})
    entry = read(path).state_dict["t"]
    assert entry.is_parameter == isinstance(original, torch.nn.Parameter)
    assert (entry.subclass is not None) == isinstance(original, Marked)
    again = torch.load(rewritten(path), weights_only=False)["t"]
    assert type(again) is type(original)
    assert vars(again) == vars(original)
    assert again.requires_grad == original.requires_grad
    assert same_bits(again.as_subclass(torch.Tensor), original.as_subclass(torch.Tensor))


def test_tensors_in_attributes_are_entries_of_the_same_storages(save: Save) -> None:
    scale = torch.randn(3)
    entry = read(save({"t": with_attributes(torch.randn(2), scale=scale), "scale": scale})).state_dict
    attached = entry["t"].attributes
    assert isinstance(attached, InertDict)
    assert attached["scale"] is entry["scale"]


# What stays an inert object.


SAVES_NESTED = hasattr(torch._utils, "_rebuild_nested_tensor")


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces prototypes
        return {
            "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
            "quantized per channel": torch.quantize_per_channel(
                torch.randn(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.quint8
            ),
            "sparse": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(),
            **({"nested": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])} if SAVES_NESTED else {}),
            "meta": torch.empty(2, 3, device="meta"),
        }


@pytest.mark.parametrize("name", odd_tensors())
def test_what_is_no_strided_tensor_stays_an_object(name: str, save: Save) -> None:
    original = odd_tensors()[name]
    path = save({"odd": original, "plain": torch.ones(2)})
    checkpoint = read(path)
    assert list(checkpoint.state_dict) == ["plain"]
    node = checkpoint.state_dict.extra["odd"]
    assert isinstance(node, Object)
    assert is_tensor_like(node)
    assert any(isinstance(leaf, (TensorEntry, Storage)) for leaf in walk(node)) == (name != "meta")
    assert [finding.code for finding in checkpoint.findings] == ["not-a-plain-tensor"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = torch.load(rewritten(path), weights_only=False)["odd"]
        assert (again.layout, again.dtype, again.is_quantized, again.is_nested) == (
            original.layout, original.dtype, original.is_quantized, original.is_nested)  # fmt: skip
        if name.startswith("quantized"):
            assert torch.equal(again.dequantize(), original.dequantize())
        elif name in ("sparse", "csr"):
            assert torch.equal(again.to_dense(), original.to_dense())
        elif name == "nested":
            assert all(torch.equal(a, b) for a, b in zip(again.unbind(), original.unbind(), strict=True))
        else:
            assert (again.shape, again.device.type) == ((2, 3), "meta")


def test_bare_storages_are_leaves(save: Save) -> None:
    t = torch.arange(4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save({"typed": t.storage(), "untyped": torch.ones(3).untyped_storage(), "t": t})
    checkpoint = read(path)
    leaves = [node for node in walk(checkpoint.rest) if isinstance(node, Storage)]
    assert sorted(leaf.nbytes for leaf in leaves) == [12, 16]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = torch.load(rewritten(path), weights_only=False)
    assert list(again["untyped"]) == list(torch.ones(3).untyped_storage())
    assert again["typed"].tolist() == [0, 1, 2, 3]
