"""One tensor at a time: its values as an array and as a tensor, and parts that read only themselves."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.files import deflated_copy

import ckptkit
from ckptkit.bytesource import Source, SourceFile
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.errors import CorruptError, DTypeError, FileAccessError, RewriteError, UnsupportedError

Save = Callable[..., Path]


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """The sizes of what is read of files meanwhile."""
    sizes: list[int] = []
    some, into = SourceFile._some, SourceFile.read_into

    def counted(self: SourceFile, offset: int, nbytes: int) -> bytes:
        sizes.append(nbytes)
        return some(self, offset, nbytes)

    def counted_into(self: SourceFile, offset: int, buffer: bytearray | memoryview) -> None:
        sizes.append(len(buffer))
        into(self, offset, buffer)

    with mock.patch.object(SourceFile, "_some", counted), mock.patch.object(SourceFile, "read_into", counted_into):
        yield sizes


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_part_reads_only_itself(suffix: str, tmp_path: Path) -> None:
    table = torch.arange(4_000_000, dtype=torch.int64).reshape(2000, 2000)
    path = tmp_path / f"table{suffix}"
    torch.save({"t": table}, path) if suffix == ".pth" else save_file({"t": table}, path)
    with ckptkit.open(path) as file:
        entry = file.state_dict["t"]
        for index, most in (
            (np.s_[1000:1500], 500 * 16_000),
            (3, 16_000),
            (-1, 16_000),
            (np.s_[1:3, ::2], 32_000),
            (np.s_[..., 0], 2000 * 8),  # one element a row, and not the rows
            (np.s_[::1000], 2 * 16_000),
            (np.s_[5, 7], 8),
            (np.s_[2000:], 0),
            (np.s_[:, None, 10:20], 2000 * 80),
        ):
            with bytes_read() as sizes:
                part = entry[index]
                assert sizes == []
                array = part.numpy()
                assert sum(sizes) <= most
            with bytes_read() as sizes:
                tensor = part.torch()
                assert sum(sizes) <= most
            assert part.shape == array.shape == tuple(tensor.shape)
            assert np.array_equal(array, table.numpy()[index])
            assert torch.equal(tensor, table[index])


def test_rows_one_by_one(save: Save) -> None:
    table = torch.randn(3, 2)
    with ckptkit.open(save({"t": table, "s": torch.tensor(1.5)})) as file:
        assert [row.torch().tolist() for row in file.state_dict["t"]] == table.tolist()
        scalar = file.state_dict["s"]
        assert (scalar.numpy().shape, float(scalar.numpy()), scalar[...].shape, scalar[None].shape) == (
            *((), 1.5, (), (1,)),
        )
        with pytest.raises(TypeError, match="without dimensions has no rows"):
            iter(scalar)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (3, r"index 3 is out of range for dimension 0 of size 3"),
        (-4, r"index -4 is out of range"),
        ((0, 2), r"index 2 is out of range for dimension 1 of size 2"),
        ((0, 0, 0), r"has 3 dimensions; the tensor has shape \(3, 2\)"),
        ((..., ...), r"has more than one \.\.\."),
        (slice(None, None, -1), r"a step of -1.*reverse the values"),
        ([0, 1], r"of type list; whole numbers.*entry\.numpy\(\)"),
        (True, "of type bool"),
        (np.array([True, False, True]), "of type ndarray"),
        (torch.tensor([0, 1]), "of type Tensor"),
        ("a", "of type str"),
        (1.0, "of type float"),
    ],
)
def test_what_is_no_index_of_a_part(save: Save, index: object, message: str) -> None:
    with ckptkit.open(save({"t": torch.ones(3, 2)})) as file:
        entry = file.state_dict["t"]
        with pytest.raises(IndexError, match=message):
            entry[index]  # type: ignore[index]
        assert entry[np.int64(1)].shape == entry[torch.tensor(1)].shape == (2,)  # type: ignore[index]


def test_dtypes_of_arrays(tmp_path: Path) -> None:
    kinds = {
        "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "bool": np.bool_,
        "complex64": np.complex64, "int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
    }  # fmt: skip
    state = {name: torch.tensor([0, 1, 2.5]).to(getattr(torch, name)) for name in kinds}
    save_file({name: tensor for name, tensor in state.items() if name != "complex64"}, tmp_path / "a.safetensors")
    with ckptkit.open(tmp_path / "a.safetensors") as file:
        for name, entry in file.state_dict.items():
            array = entry.numpy()
            assert array.dtype == kinds[name]
            assert array.dtype.isnative
            assert array.astype(np.float32).tolist() == state[name].float().tolist()
            array[...] = 0  # memory of its own
            assert entry.numpy().astype(np.float32).tolist() == state[name].float().tolist()


def test_where_numpy_takes_arrays(save: Save) -> None:
    with ckptkit.open(save({"w": torch.arange(6).reshape(2, 3)})) as file:
        entry = file.state_dict["w"]
        assert np.asarray(entry).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert np.asarray(entry[1], np.float32).dtype == np.float32
        assert (np.mean(entry), np.array_equal(entry[0], [0, 1, 2])) == (2.5, True)
        with pytest.raises(ValueError, match="read again"):
            entry.__array__(copy=False)


def test_large_values_are_read_by_several_threads(tmp_path: Path) -> None:
    tensor = torch.randn(12 << 20)
    torch.save({"w": tensor}, tmp_path / "a.pth")
    with ckptkit.open(tmp_path / "a.pth") as file:
        assert np.array_equal(file.state_dict["w"].numpy(), tensor.numpy())
        assert torch.equal(file.state_dict["w"][7:-7].torch(), tensor[7:-7])
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[40 << 20] ^= 4
    (tmp_path / "a.pth").write_bytes(data)
    with ckptkit.open(tmp_path / "a.pth") as file, pytest.raises(CorruptError, match="is damaged"):
        file.state_dict["w"].numpy()


def test_elements_that_fill_no_byte(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(6))
    with ckptkit.open(tmp_path / "a.safetensors") as file:
        entry = file.state_dict["w"]
        assert entry[...].shape == (8,)
        with pytest.raises(DTypeError, match="smaller than a byte"):
            entry[1:]
        with pytest.raises(DTypeError, match="numpy has no dtype float6_e2m3fn"):
            entry.numpy()
        with pytest.raises(DTypeError, match="torch has no dtype"):
            entry.torch()


def test_elements_that_are_repeated(save: Save) -> None:
    with ckptkit.open(save({"x": torch.tensor([1.0, 2]).expand(1 << 40, 2), "w": torch.ones(4, 4)})) as file:
        entry = file.state_dict["x"]
        with bytes_read() as sizes:
            array, tensor = entry.numpy(), entry.torch()
        assert sum(sizes) <= 16  # of the 2^40 rows there is one
        assert (array.shape, array.strides, array.flags.writeable) == ((1 << 40, 2), (0, 4), False)
        assert (tensor.shape, tensor.stride()) == ((1 << 40, 2), (0, 1))
        assert array[12345].tolist() == tensor[12345].tolist() == [1, 2]
        assert file.state_dict["w"].numpy().flags.writeable
        windows = TensorEntry(
            storage=file.state_dict["w"].storage, storage_offset=0, shape=(8, 8), stride=(1, 1), dtype="float32"
        )
        assert windows.numpy().tolist() == windows.torch().tolist() == [[1.0] * 8] * 8
        assert not windows.numpy().flags.writeable


def test_sizes_that_numpy_cannot_hold(save: Save) -> None:
    with ckptkit.open(save({"w": torch.ones(1)})) as file:
        storage = file.state_dict["w"].storage
        empty = TensorEntry(storage=storage, storage_offset=0, shape=(0, 1 << 61), stride=(1, 1), dtype="float32")
        with pytest.raises(UnsupportedError, match="numpy cannot hold"):
            empty.numpy()


def test_strides_are_those_of_the_file(save: Save) -> None:
    base = torch.randn(6, 4)
    with ckptkit.open(save({"t": base.t(), "rows": base[::2], "all": base})) as file:
        assert file.state_dict["t"].torch().stride() == base.t().stride()
        assert file.state_dict["t"].numpy().strides == (4, 16)
        assert file.state_dict["rows"].torch().is_contiguous()  # what lies between is not read
        assert file.state_dict["rows"].torch().untyped_storage().nbytes() == 3 * 4 * 4


def test_of_big_endian_and_compressed_files(save: Save, tmp_path: Path, same_bits) -> None:
    state = {"c": torch.randn(4, dtype=torch.complex64), "h": torch.randn(6, 2).half().t(), "i": torch.arange(5)}
    plain = save(state)
    compressed = deflated_copy(plain, tmp_path / "deflated.pth")
    with ckptkit.open(plain) as little:
        entries = dict(little.state_dict)
        swapped = {}
        for name, entry in entries.items():
            width = entry.itemsize // (2 if entry.dtype == "complex64" else 1)
            values = np.frombuffer(entry.storage.source.read(), f"<u{width}").byteswap().tobytes()
            source = _Bytes(values).whole
            storage = Storage(
                key=name, dtype=entry.dtype, nbytes=len(values), location="cpu", source=source, byteorder="big"
            )
            swapped[name] = TensorEntry(
                storage=storage, storage_offset=0, shape=entry.shape, stride=entry.stride, dtype=entry.dtype
            )
    with ckptkit.open(compressed) as file:
        for entries in (dict(file.state_dict), swapped):
            for name, entry in entries.items():
                for index in (..., np.s_[1:], np.s_[::2]):
                    assert same_bits(entry[index].torch(), state[name][index])
                    assert entry[index].numpy().tolist() == state[name][index].tolist()
                    assert entry[index].numpy().dtype.isnative


class _Bytes(Source):
    def __init__(self, data: bytes) -> None:
        super().__init__("memory", len(data))
        self._data = data

    def _some(self, offset: int, nbytes: int) -> bytes:
        return self._data[offset : offset + nbytes]


def test_cast_values(save: Save) -> None:
    state = {"w": torch.randn(30, 20), "t": torch.randn(20, 3).t()}
    with ckptkit.open(save(state)) as file:
        cast = file.rewrite(ckptkit.CastDtype("bfloat16"))
        for name, entry in cast.state_dict.items():
            for index in (..., np.s_[1:3, ::2], np.s_[:, 0]):
                expected = state[name].bfloat16()[index]
                assert torch.equal(entry[index].torch(), expected)
                assert entry[index].numpy().astype(np.float32).tolist() == expected.float().tolist()


def test_a_closed_file_says_so(save: Save) -> None:
    with ckptkit.open(save({"w": torch.ones(2)})) as file:
        entry = file.state_dict["w"]
    for read in (entry.numpy, entry.torch, entry[1:].numpy):
        with pytest.raises(FileAccessError, match="was closed; open it again"):
            read()


def test_recorded_checksums_of_all_that_is_read(save: Save) -> None:
    path = save({"w": torch.arange(1000.0), "b": torch.ones(3)})
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(1000.0).numpy().tobytes())
    data[at + 2000] ^= 1
    path.write_bytes(data)
    with ckptkit.open(path) as file:
        entry = file.state_dict["w"]
        for read in (entry.numpy, entry.torch, file.rewrite(ckptkit.CastDtype("float16")).state_dict["w"].numpy):
            with pytest.raises(CorruptError, match=r"CRC-32.*is damaged"):
                read()
        assert entry[:10].numpy().tolist() == list(range(10))  # of a part there is none to be held
        assert file.state_dict["b"].numpy().tolist() == [1, 1, 1]
    with ckptkit.open(path, ignore_checksums=True) as file:
        assert file.state_dict["w"].numpy().shape == (1000,)


def test_a_file_that_changes(save: Save) -> None:
    path = save({"w": torch.zeros(1000)})
    with ckptkit.open(path) as file:
        with path.open("r+b") as out:
            out.seek(1)
            out.write(b"x")
        with pytest.raises(CorruptError, match="was changed while it was being read"):
            file.state_dict["w"][:10].numpy()


def test_devices(save: Save) -> None:
    with ckptkit.open(save({"w": torch.ones(2, 2)}, device="cuda:7")) as file:
        entry = file.state_dict["w"]
        assert entry.torch().device.type == "cpu"
        assert entry.torch(device=torch.device("cpu")).tolist() == [[1, 1], [1, 1]]
        meta = entry.torch(device="meta")
        assert (meta.device.type, meta.shape) == ("meta", (2, 2))
        for device in ("cuda:7", "cdua", None):  # None: as the file says
            with bytes_read() as sizes, pytest.raises(RewriteError, match="cannot be put on"):
                entry.torch(device=device)
            assert sizes == []
        with pytest.raises(RewriteError, match="cannot be put on 'mps:9'"):
            file.rewrite(ckptkit.MapLocation("mps:9")).load(map_location=None)


def test_load_of_a_rewritten_checkpoint(save: Save, tmp_path: Path, same_bits) -> None:
    model = torch.nn.Linear(3, 2)
    path = save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, device="cuda:0")
    with ckptkit.open(path) as file:
        state = file.rewrite(ckptkit.StripModule(), ckptkit.CastDtype("float64")).load()
        model.double().load_state_dict(state, strict=True)
        assert all(same_bits(file.load()[f"module.{name}"], value.float()) for name, value in state.items())
        mapped = file.load(mapped=True)
        assert all(same_bits(mapped[name], value) for name, value in file.load().items())
    whole = save(model, "whole.pth")
    with ckptkit.open(whole) as file:
        assert not any(value.requires_grad for value in file.load().values())
    with ckptkit.open(save({"epoch": 1}, "none.pth")) as file, pytest.raises(ckptkit.SectionError):
        file.load()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.pth", "none.pth", "whole.pth"]


def test_arrays_do_without_torch(save: Save) -> None:
    path = save({"w": torch.ones(4).bfloat16()})
    code = f"""
import sys, ckptkit
with ckptkit.open({str(path)!r}) as file:
    assert "numpy" not in sys.modules
    print(file.state_dict["w"][1:3].numpy().tolist(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[1.0,", "1.0]", "False"]
