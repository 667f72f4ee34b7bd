"""Bytes on their way to a device, in pieces: a device of the CPU stands for one, and torch is the oracle.

What needs a GPU is in `gpu/`; the pieces, their order and what is in them are the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from support.files import flipped, repacked
from support.generated_tensors import SAFETENSORS, STORABLE
from support.torch_oracle import same

import ckptkit
from ckptkit.errors import CorruptError, FileAccessError, RewriteError
from ckptkit.torch_bridge import devices, loading

Save = Callable[..., Path]

PIECE = 1024
"""Bytes of a buffer here."""


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A device ``"standin:0"`` that is filled in pieces, and the sizes of those; it has memory of the CPU."""
    seen: list[int] = []
    room = devices.Staging._room

    def noted(self: devices.Staging, nbytes: int) -> torch.Tensor:
        piece = room(self, nbytes)
        seen.append(piece.numel())
        return piece

    before = list(torch.serialization._package_registry)
    torch.serialization.register_package(  # type: ignore[no-untyped-call]
        5, lambda storage: None, lambda storage, location: storage if location == "standin:0" else None
    )
    monkeypatch.setattr(devices.Staging, "_room", noted)
    monkeypatch.setattr(loading, "Staging", partial(devices.Staging, nbytes=PIECE))
    monkeypatch.setattr(loading, "STAGED", ("cpu",))
    yield seen
    torch.serialization._package_registry[:] = before


def there(path: Path, **options: Any) -> dict[str, Any]:
    return ckptkit.load_state_dict(path, device="standin:0", **options)


def raw(name: str, nbytes: int) -> torch.Tensor:
    data = torch.randint(0, 2 if name == "bool" else 120, (nbytes,), dtype=torch.uint8)
    return data.view(getattr(torch, name))


@pytest.mark.filterwarnings("ignore:.*experimental and many operators:UserWarning")
@pytest.mark.parametrize("name", STORABLE)
def test_every_dtype(save: Save, pieces: list[int], name: str) -> None:
    path = save({"a": raw(name, 5 * PIECE + 160), "b": raw(name, 96)})
    ours, theirs = there(path), torch.load(path, weights_only=False)
    for key, value in theirs.items():
        assert ours[key].dtype is value.dtype and bytes(ours[key].untyped_storage()) == bytes(value.untyped_storage())
    assert max(pieces) == PIECE and sum(pieces) == 5 * PIECE + 160 + 96


def test_ties_views_and_parameters(save: Save, pieces: list[int]) -> None:
    base = torch.randn(40, 40)
    weight = torch.nn.Parameter(torch.randn(7))
    state = {"a": base, "tied": base, "view": base.t()[1::2], "w": weight, "e": torch.empty(0, 2), "s": base[3, 4]}
    state["complex"] = torch.randn(300, dtype=torch.complex64).conj()
    path = save(state)
    ours = there(path)
    assert same(dict(ours), torch.load(path, weights_only=False))
    assert ours["a"] is ours["tied"] and ours["view"].untyped_storage().data_ptr() == ours["a"].data_ptr()
    assert sum(pieces) == 1600 * 4 + 28 + 2400


def test_small_tensors_share_a_piece_of_the_host(save: Save, pieces: list[int]) -> None:
    state = {f"t{i}": torch.full((3,), float(i)) for i in range(40)}
    path = save(state)
    assert same(dict(there(path)), state)
    assert pieces == [12] * 40


def test_other_byte_orders_and_compressed_files(save: Save, pieces: list[int]) -> None:
    with mock.patch("sys.byteorder", "big"):
        big = save({"a": torch.arange(3000.0, dtype=torch.float64), "h": torch.ones(3).half()}, "big.pth")
    assert same(dict(there(big)), torch.load(big, weights_only=False))
    deflated = repacked(save({"a": torch.randn(700)}), deflate=True)
    assert same(dict(there(deflated)), torch.load(deflated, weights_only=False))
    assert max(pieces) == PIECE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_casts_on_the_way(save: Save, pieces: list[int], dtype: str) -> None:
    state = {"module.a": torch.randn(1300), "module.n": torch.arange(5)}
    ours = there(save(state), strip_module=True, dtype=dtype)
    assert torch.equal(ours["a"], state["module.a"].to(getattr(torch, dtype))) and ours["n"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*experimental and many operators:UserWarning")
def test_safetensors_files_are_not_mapped_on_the_way(tmp_path: Path, pieces: list[int]) -> None:
    state = {name: raw(name, 2 * PIECE) for name in SAFETENSORS}
    save_file(state, tmp_path / "a.safetensors")
    ours = there(tmp_path / "a.safetensors")
    assert all(torch.equal(ours[n].view(torch.uint8), value.view(torch.uint8)) for n, value in state.items())
    assert sum(pieces) == 2 * PIECE * len(state)


@pytest.mark.filterwarnings("ignore:.*beta state:UserWarning")
def test_what_is_no_plain_tensor(save: Save, pieces: list[int]) -> None:
    state = {"sparse": torch.eye(40).to_sparse(), "w": torch.ones(300), "csr": torch.eye(3).to_sparse_csr()}
    assert same(dict(there(save(state))), state)
    whole = ckptkit.load(save({"m": state, "o": [torch.ones(400)]}), map_location={"cpu": "standin:0"})
    assert same(whole["m"]["w"], state["w"]) and same(whole["o"][0], torch.ones(400))


def test_damage_and_files_that_shrink(save: Save, pieces: list[int]) -> None:
    path = save({"a": torch.arange(9000.0)})
    data = path.read_bytes()
    flipped(path, data.index(torch.arange(9000.0).numpy().tobytes()) + 20000)
    with pytest.raises(CorruptError, match="tensor 'a': the bytes have CRC-32"):
        there(path)
    path.write_bytes(data)
    with ckptkit.open(path) as file:
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(CorruptError, match="became shorter"):
            loading.tensors(file.state_dict, map_location="standin:0")
    with pytest.raises(FileAccessError, match="closed"):
        loading.tensors(file.state_dict, map_location="standin:0")


def test_a_device_that_is_not_there_is_told_before_anything_is_read(save: Save, pieces: list[int]) -> None:
    with pytest.raises(RewriteError, match=r"cannot be put on 'standin:1' on this machine, which has cpu"):
        ckptkit.load_state_dict(save({"a": torch.ones(9)}), device="standin:1")
    assert pieces == []


def test_buffers_take_turns() -> None:
    staging = devices.Staging(torch.device("cpu"), nbytes=PIECE, count=2)
    memory = devices.allocated(5 * PIECE)
    where: list[int] = []

    def read(start: int, piece: torch.Tensor) -> None:
        where.append(piece.data_ptr())
        piece.fill_(start // PIECE + 1)

    staging.fill(memory, read)
    assert [where.index(pointer) for pointer in where] == [0, 1, 0, 1, 0]
    assert bytes(memory) == b"".join(bytes([i + 1]) * PIECE for i in range(5))
    staging.finish()
    assert staging._buffers == []


def test_memory_that_is_not_pinned_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuses(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", refuses)
    assert devices.Staging(torch.device("cuda"), nbytes=PIECE)._buffer().numel() == PIECE
