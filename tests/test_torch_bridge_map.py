"""Tensors that lie in a mapping of the file: the same values as those that were read, and never written back."""

from __future__ import annotations

import gc
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.formats import read
from ckptkit.torch_bridge import tensors

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def mapped(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    checkpoint, file = read(path)
    try:
        return tensors(checkpoint.state_dict, map_location="cpu", mapped=True, **options)
    finally:
        file.close()


def test_the_same_as_torch_load_and_nothing_read(save: Save, reads: list[int], same_bits: SameBits) -> None:
    base = torch.randn(4, 6)
    state = {
        "plain": base,
        "view": base.t()[1:, ::2],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(5).half(),
        "conj": torch.randn(2, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3),
    }
    path = save(state)
    ours, theirs = mapped(path), torch.load(path)
    assert reads == []
    assert all(same_bits(ours[name], value) for name, value in theirs.items())
    assert ours["view"].stride() == theirs["view"].stride()
    assert ours["plain"].untyped_storage().data_ptr() == ours["view"].untyped_storage().data_ptr()
    assert isinstance(ours["parameter"], torch.nn.Parameter)


def test_writing_never_reaches_the_file(save: Save) -> None:
    path = save({"a": torch.arange(1000.0), "b": torch.ones(3)})
    before = path.read_bytes()
    ours = mapped(path)["a"]
    gc.collect(1)
    ours.mul_(2)  # the file was closed, all other tensors are gone
    assert torch.equal(ours, torch.arange(1000.0) * 2)
    assert path.read_bytes() == before


def test_empty_tensors_and_files_elsewhere(save: Save, reads: list[int]) -> None:
    assert mapped(save({"a": torch.empty(0, 3)}))["a"].shape == (0, 3)
    path = save({"a": torch.ones(3)})
    checkpoint, file = read(path)
    assert tensors(checkpoint.state_dict, map_location="meta", mapped=True)["a"].is_meta
    file.close()
    assert reads == [0]


def test_data_that_is_not_aligned_is_read(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(7), "b": torch.randn(16)}, path)
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    checkpoint, file = read(path)
    offsets = [entry.storage.source.offset for entry in checkpoint.state_dict.values()]
    file.close()
    ours = mapped(path)
    assert min(offsets) == start and any(offset % 64 for offset in offsets)
    assert len(reads) == sum(offset % 64 != 0 for offset in offsets)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in ours.values())


def test_compressed_data_is_made_first(save: Save, tmp_path: Path) -> None:
    state = {"a": torch.zeros(1000), "b": torch.arange(7.0)}
    path = tmp_path / "deflated.pth"
    with zipfile.ZipFile(save(state)) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    ours = mapped(path)
    assert all(torch.equal(ours[name], value) for name, value in state.items())


def test_foreign_byte_order_is_read(save: Save, reads: list[int]) -> None:
    path = save({"a": torch.tensor([1.0, 2.0])})
    swapped = path.with_name("big.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(swapped, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = struct.pack(">2f", 1.0, 2.0)
            target.writestr(name, data)
    assert mapped(swapped)["a"].tolist() == [1.0, 2.0]
    assert reads == [8]


def test_a_system_that_refuses_to_map(save: Save, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert mapped(save({"a": torch.ones(3)}))["a"].tolist() == [1, 1, 1]
    assert reads == [12]
