"""Values arrive exactly, however a tensor lies: in C order, little-endian, in bounded chunks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy
import pytest
import torch
from support.generated_tensors import STORABLE
from support.plans import bits

from ckptkit import bytesource
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Storage, TensorEntry, contiguous_stride
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, DTypeError
from ckptkit.transfer import values
from ckptkit.transfer.values import stream

Entry = Callable[[torch.Tensor], TensorEntry]


def values_of(entry: TensorEntry) -> bytes:
    chunks = list(stream(entry))
    assert all(chunks)
    return b"".join(chunks)


BASE = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: t,
    "0-d": lambda t: t[2, 3, 4],
    "zero-size": lambda t: t[:, 2:2],
    "zero-size transposed": lambda t: t[:0].transpose(0, 2),
    "offset": lambda t: t[1:3],
    "one row": lambda t: t[3, 4],
    "columns": lambda t: t[:, :3],
    "steps": lambda t: t[::2, ::3, ::2],
    "inner step": lambda t: t[..., 1::5],
    "transposed": lambda t: t.permute(2, 0, 1),
    "expanded": lambda t: t[1:2, :, :1].expand(3, 5, 7),
    "expanded 0-d": lambda t: t[0, 0, 5].expand(4, 4),
    "overlapping": lambda t: t.as_strided((4, 3, 2), (5, 1, 1), 7),
    "windows": lambda t: t.reshape(-1).unfold(0, 30, 10),
    "diagonal": lambda t: t.diagonal(0, 0, 1),
    "channels last": lambda t: t.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "size 1": lambda t: t[1:2].transpose(0, 1)[:, :, ::2],
}


@pytest.mark.parametrize("chunk_nbytes", [None, 64, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(entry: Entry, monkeypatch: pytest.MonkeyPatch, layout: str, chunk_nbytes: int | None) -> None:
    if chunk_nbytes is not None:  # tensors of several chunks, views far wider than one, mapped windows
        monkeypatch.setattr(values, "CHUNK_NBYTES", chunk_nbytes)
    tensor = LAYOUTS[layout](BASE)
    source = entry(tensor)
    assert values_of(source) == bits(tensor)
    if chunk_nbytes is not None and not source.is_plain_bytes:
        assert all(len(chunk) <= chunk_nbytes for chunk in stream(source))


@pytest.mark.parametrize("dtype", STORABLE)
def test_every_dtype(entry: Entry, dtype: str) -> None:
    width = DTYPES[dtype].itemsize
    # All byte values: NaN with payloads, denormals, bools that are neither 0 nor 1.
    raw = torch.arange(256, dtype=torch.int64).repeat(width).to(torch.uint8)
    flat = raw.view(getattr(torch, dtype))
    for tensor in (flat, flat[3:7], flat.as_strided((16, 4), (1, 16)), flat[::3], flat[5].expand(3)):
        index = torch.arange(flat.numel()).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        expected = raw.reshape(-1, width)[index.reshape(-1)]
        assert values_of(entry(tensor)) == expected.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_conjugates_and_negatives(entry: Entry, dtype: torch.dtype) -> None:
    parts = torch.tensor([[1.0, -2.0], [0.0, -0.0], [float("nan"), float("inf")], [-0.0, float("nan")]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.view_as_complex(parts.to(torch.float64)).to(dtype)
    assert tensor.conj().is_conj()
    for lazy in (tensor.conj(), tensor.conj()[::2], tensor.conj().view(2, 2).t()):
        source = entry(lazy)
        assert source.is_conj
        assert values_of(source) == bits(lazy)
    assert tensor.conj().imag.is_neg()
    for negative in (tensor.conj().imag, tensor.conj().imag[1:]):
        source = entry(negative)
        assert source.is_neg
        assert values_of(source) == bits(negative)
    # Both: the imaginary part is negated twice.  (torch's own copy of it loses signs of zeros in complex128.)
    real, imaginary = torch.view_as_real(tensor).unbind(-1)
    assert values_of(entry(torch._neg_view(tensor.conj()))) == bits(torch.stack([-real, imaginary], -1))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_negatives_of_8_bits(entry: Entry, dtype: str) -> None:
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(getattr(torch, dtype))
    negated = torch.frombuffer(bytearray(values_of(entry(torch._neg_view(every)))), dtype=every.dtype)
    assert torch.equal(negated.float().nan_to_num(0.5), (-every.float()).nan_to_num(0.5))
    same_zero = negated.float() == 0
    if not dtype.endswith("fnuz"):
        assert torch.equal(torch.signbit(negated.float()[same_zero]), ~torch.signbit(every.float()[same_zero]))


def test_negatives_that_have_no_sign_bit(entry: Entry) -> None:
    for dtype in ("int64", "float8_e8m0fnu", "bool"):
        source = entry(torch._neg_view(torch.ones(3).to(getattr(torch, dtype))))
        with pytest.raises(DTypeError, match=f"lazily negated or conjugated tensor of {dtype}"):
            values_of(source)


@pytest.mark.parametrize(
    "dtype", ["float32", "int16", "uint64", "bfloat16", "complex64", "complex128", "uint8", "bool"]
)
def test_big_endian_storages(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (4, 6), dtype=torch.uint8).bool() if dtype == "bool" else torch.randn(4, 6)
    tensor = tensor.to(getattr(torch, dtype)) if "int" not in dtype else torch.arange(24).view(4, 6).to(
        getattr(torch, dtype)
    )  # fmt: skip
    width = DTYPES[dtype].itemsize // (2 if "complex" in dtype else 1)
    swapped = numpy.frombuffer(bits(tensor), dtype=f"u{width}").byteswap().tobytes()
    (tmp_path / "big").write_bytes(swapped)
    with closing(SourceFile(tmp_path / "big")) as file:
        storage = Storage(key="0", dtype=dtype, nbytes=len(swapped), location="cpu",
                          source=ByteRange(file, 0, len(swapped)), byteorder="big")  # fmt: skip
        for view in (tensor, tensor[1:], tensor.t(), tensor[:, ::2]):
            source = TensorEntry(storage=storage, storage_offset=view.storage_offset(), shape=tuple(view.shape),
                                 stride=view.stride(), dtype=dtype)  # fmt: skip
            assert values_of(source) == bits(view)


def test_geometry_only_a_stranger_writes(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(32)))
    with closing(SourceFile(tmp_path / "data")) as file:
        storage = Storage(key="0", dtype="uint8", nbytes=32, location="cpu", source=ByteRange(file, 0, 32))

        def view(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
            made = TensorEntry(storage=storage, storage_offset=offset, shape=shape, stride=stride, dtype="uint8")
            return values_of(made.check())

        # The stride of a dimension of one says nothing, and neither does the offset of an empty tensor.
        assert view((1, 3), (1 << 61, 2)) == bytes([0, 2, 4])
        assert view((3, 1), (2, 1 << 61), 1) == bytes([1, 3, 5])
        assert view((0,), (1,), 1 << 60) == b""
        assert view((0, 3), (1, 7), 99) == b""


def test_what_is_opened_is_let_go(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK_NBYTES", 16)
    before = len(os.listdir("/dev/fd"))
    source = entry(torch.arange(10_000.0).view(100, 100).t())
    assert values_of(source) == bits(torch.arange(10_000.0).view(100, 100).t())
    source.storage.source.file.close()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("before", [True, False])
def test_a_file_that_is_shortened_is_an_error_and_not_fatal(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setattr(values, "CHUNK_NBYTES", 4096)
    source = entry(torch.arange(10_000.0).view(100, 100).t())
    chunks = stream(source)
    if not before:
        assert len(next(chunks)) == 4096
    os.truncate(source.storage.source.file.path, 2000)
    with pytest.raises(CorruptError, match="the file became shorter while it was being read"):
        list(chunks)


@pytest.mark.parametrize("gap", [0, 40, 1 << 20])
@pytest.mark.parametrize("chunk_nbytes", [16, 100, 1000])
def test_wide_windows_are_read_in_pieces(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, chunk_nbytes: int, gap: int
) -> None:
    monkeypatch.setattr(values, "CHUNK_NBYTES", chunk_nbytes)
    monkeypatch.setattr(values, "GAP_NBYTES", gap)
    monkeypatch.setattr(bytesource, "GAP_NBYTES", gap)
    asked: list[int] = []
    real = SourceFile.ranges
    monkeypatch.setattr(
        SourceFile, "ranges", lambda file, wanted: (asked.extend(n for _, n in wanted), real(file, wanted))[1]
    )
    base = torch.arange(6 * 50 * 40).view(6, 50, 40).to(torch.int16)
    views = (
        base.permute(2, 0, 1), base.permute(2, 1, 0), base[:, ::7, ::9], base.transpose(0, 1)[3:, :, 1:],
        base.as_strided((40, 3, 30), (2, 400, 7), 5), base[::5, 0, 0], base.transpose(0, 2).unsqueeze(1),
    )  # fmt: skip
    for view in views:
        source = entry(view)
        asked.clear()
        assert values_of(source) == bits(view)
        assert all(nbytes <= 2 * chunk_nbytes for nbytes in asked)
    assert asked or gap == 1 << 20


def test_more_dimensions_than_numpy_has(entry: Entry) -> None:
    tensor = torch.arange(6.0).view(*[1] * 40, 2, 3).transpose(-1, -2)
    assert values_of(entry(tensor)) == bits(tensor)


def test_contiguous_entries_are_streamed_in_chunks(tmp_path: Path) -> None:
    nbytes = 9 << 20
    with open(tmp_path / "big", "wb") as file:
        file.truncate(nbytes)
    with closing(SourceFile(tmp_path / "big")) as opened:
        storage = Storage(key="0", dtype="uint8", nbytes=nbytes, location="cpu", source=ByteRange(opened, 0, nbytes))
        shape = (3, 3 << 20)
        whole = TensorEntry(
            storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype="uint8"
        )
        assert [len(chunk) for chunk in stream(whole)] == [4 << 20, 4 << 20, 1 << 20]
