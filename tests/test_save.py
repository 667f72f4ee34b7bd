"""`ckptkit.save`: what is in memory becomes a file, with the writer's guarantees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.torch_oracle import Same
from torch import nn

import ckptkit
from ckptkit.errors import CorruptError, DestinationExistsError, FileAccessError, RewriteError
from ckptkit.transfer import memory


def as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    plain = np.ascontiguousarray(value).reshape(value.shape)
    if plain.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(plain.astype(plain.dtype.newbyteorder("=")).copy())


ARRAYS = {
    "plain": np.arange(12.0).reshape(3, 4),
    "backwards": np.arange(12.0)[::-1],
    "columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "every other": np.arange(10)[1:8:3],
    "block": np.arange(24).reshape(4, 6)[1:3, 2:5],
    "transposed": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "swapped": np.arange(5, dtype=">i4"),
    "swapped view": np.arange(24, dtype=">c8").reshape(4, 6)[:, ::-2],
    "repeated": np.broadcast_to(np.float32(2), (3, 2)),
    "unaligned": np.frombuffer(bytearray(b"?" + np.arange(4.0).tobytes()), "<f8", offset=1),
    "field": np.zeros(3, [("a", "<f4"), ("b", "i1")])["a"],
    "no dimension": np.array(3, np.int64),
    "empty": np.empty((0, 3), np.float16),
    "bool": np.array([True, False]),
    "bfloat16": np.array([1, 2.5], ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_arrays_of_every_order(name: str, suffix: str, tmp_path: Path, same_bits) -> None:
    array = ARRAYS[name]
    path = tmp_path / f"a{suffix}"
    ckptkit.save({"w": array}, path)
    loaded = torch.load(path, weights_only=True) if suffix == ".pth" else load_file(path)
    assert same_bits(loaded["w"], as_tensor(array))


def test_arrays_mapped_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    ckptkit.save({"w": mapped, "row": mapped[1]}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == mapped.tolist()
    assert load_file(tmp_path / "a.safetensors")["row"].tolist() == [3, 4, 5]


def test_what_shares_memory_is_written_once(tmp_path: Path) -> None:
    base = torch.randn(1000, 10)
    array = base.numpy()
    state = {
        "a": base,
        "again": base,
        "t": base.t(),
        "row": base[3],
        "n": array,
        "nrow": array[3],
        "bits": base.view(torch.int32),
    }
    plan = ckptkit.save(state, tmp_path / "a.pth")
    assert plan.nbytes < base.nbytes + 4000
    loaded = torch.load(tmp_path / "a.pth")
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1
    assert loaded["a"] is loaded["again"]
    ckptkit.save({"part": base[:5]}, tmp_path / "part.pth")  # and what nothing views is not
    assert (tmp_path / "part.pth").stat().st_size < 2000
    ckptkit.save({"a": base, "b": base.view(1000, 10)}, tmp_path / "tied.safetensors")
    assert set(load_file(tmp_path / "tied.safetensors")) == {"a"}
    assert set(ckptkit.load_state_dict(tmp_path / "tied.safetensors", map_location="cpu")) == {"a", "b"}
    ckptkit.save({"a": base, "b": base}, tmp_path / "copies.safetensors", tied="duplicate")
    assert set(load_file(tmp_path / "copies.safetensors")) == {"a", "b"}
    with pytest.raises(RewriteError, match="1 tensor has several names"):
        ckptkit.save({"a": base, "b": base}, tmp_path / "none.pth", tied="error")
    assert not (tmp_path / "none.pth").exists()


def test_a_model_and_its_training_state(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 1, 3])
    tree = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "epoch": 3, "best": (0.5, None, [True, b"x"]), "names": {"b", "a"}, 3: {"size": torch.Size([2, 3])},
        "dtype": torch.bfloat16, "device": torch.device("cuda:1"), "array": np.arange(3), "count": Counter("aab"),
    }  # fmt: skip
    ckptkit.save(tree, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=False)
    Same(compacted=True)({**tree, "array": torch.arange(3)}, loaded)
    assert loaded["model"]._metadata == model.state_dict()._metadata
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    with ckptkit.open(tmp_path / "a.pth") as file:
        assert (file.kind, file.checkpoint.origin.state_path, file.trust) == ("resume", "model", "safe")
    ckptkit.save(tree["model"], tmp_path / "a.safetensors", metadata={"by": "me"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["by"] == "me"
    again = ckptkit.load_state_dict(tmp_path / "a.safetensors", map_location="cpu")
    model.load_state_dict(again, strict=True)
    assert again._metadata == model.state_dict()._metadata


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_was_loaded_is_saved_again(suffix: str, save, tmp_path: Path) -> None:
    for name, state in (("plain.pth", {"w": torch.ones(2)}), ("model.pth", nn.Linear(2, 1).state_dict())):
        loaded = ckptkit.load_state_dict(save(state, name), map_location="cpu")  # a dict too has module versions: none
        ckptkit.save(loaded, tmp_path / f"again{suffix}", force=True)
        again = ckptkit.load_state_dict(tmp_path / f"again{suffix}", map_location="cpu")
        Same()(loaded, again)


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    tied = nn.Parameter(torch.ones(2))
    state = OrderedDict(a=tied, b=tied, frozen=nn.Parameter(torch.ones(1), requires_grad=False))
    ckptkit.save(state, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    Same()(state, loaded)
    assert loaded["a"] is loaded["b"]


class _Wrapped(torch.Tensor):
    pass


class _Viewed(np.ndarray):
    pass


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    bad = {
        "number": np.float64(3), "object": object(), "sparse": torch.eye(2).to_sparse(), "text": np.array(["x"]),
        "meta": torch.ones(1, device="meta"), "wrapped": torch.ones(1).as_subclass(_Wrapped),
        "deep": {"er": [1, {2: 1j}]}, "zeros": torch._efficientzerotensor((2, 3)),
    }  # fmt: skip
    masked = np.ma.masked_array([1.0], [True])
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        with pytest.raises(RewriteError) as caught:
            ckptkit.save({"w": torch.ones(1), **bad}, path)
        for told in (
            r"number (of class numpy.float64; .item() makes it a plain one)",
            r"object (of class builtins.object)",
            r"sparse (a tensor of layout sparse_coo; .to_dense() makes it a plain one)",
            r"text (torch has no dtype for numpy's <U1)",
            r"meta (a tensor on the meta device, which has no values)",
            "_Wrapped; .as_subclass(torch.Tensor) makes it a plain one",
            "zeros (a tensor without memory of its own; .clone() makes it a plain one)",
            r"deep.er.1.2 (of class builtins.complex)",
        ):
            assert told in str(caught.value)
        with pytest.raises(RewriteError, match=r"m \(of class numpy\.ma.*; \.filled\(\) makes it"):
            ckptkit.save({"m": masked}, path)
        with pytest.raises(RewriteError, match=r"n \(a nested tensor; \.to_padded_tensor\(0\)"):
            ckptkit.save({"n": torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)}, path)
        with pytest.raises(RewriteError, match=r"v \(of class .*; numpy\.asarray\(\.\.\.\) makes it"):
            ckptkit.save({"v": np.arange(3).view(_Viewed)}, path)
    quantizer = getattr(torch, "quantize_per_tensor", None)
    if quantizer is not None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = quantizer(torch.ones(2), 1.0, 0, torch.qint8)
        with pytest.raises(RewriteError, match=r"\.dequantize\(\) makes it"):
            ckptkit.save({"q": quantized}, tmp_path / "a.pth")
    with pytest.raises(RewriteError, match=r"the state itself \(of class .*Linear; save its state_dict\(\)\)"):
        ckptkit.save(nn.Linear(1, 1), tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"model": {"w": torch.ones(1)}, "epoch": 3}, "not 'model' (dict), 'epoch' (int); save the dict of tensors"),
        ({3: torch.ones(1)}, "not 3 (Tensor)"),
        ([torch.ones(1)], "not a list"),
        (torch.ones(1), "not a Tensor"),
        ({}, ", and none is given"),
    ],
)
def test_what_safetensors_and_shards_cannot_hold(state: Any, told: str, tmp_path: Path) -> None:
    for options in ({}, {"to": "safetensors"}, {"to": "torch-sharded"}, {"max_shard_size": "1MB"}):
        name = "a.pth" if "to" in options or options else "a.safetensors"
        with pytest.raises(RewriteError) as caught:
            ckptkit.save(state, tmp_path / name, **options)
        assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_trees_that_are_no_dict(tmp_path: Path) -> None:
    cycle: list[Any] = [1, torch.ones(2)]
    cycle.append(cycle)
    for tree in (
        torch.ones(2),
        [torch.ones(2), 3],
        {},
        {"a": cycle},
        {"exp_avg": torch.ones(1), "step": torch.ones(())},
    ):
        ckptkit.save(tree, tmp_path / "a.pth", force=True)
        Same()(tree, torch.load(tmp_path / "a.pth", weights_only=True))
    deep: Any = torch.ones(1)
    for _ in range(200):
        deep = [deep]
    with pytest.raises(RewriteError, match="nested more than 100 levels deep"):
        ckptkit.save(deep, tmp_path / "deep.pth")


def test_entries_of_open_checkpoints(save, tmp_path: Path) -> None:
    a, b = {"w": torch.randn(6, 4)}, {"w": torch.arange(5)}
    first, second = save(a, "first.pth"), save(b, "second.pth")
    for target in (tmp_path / "both.safetensors", tmp_path / "both.pth"):
        with ckptkit.open(first) as one, ckptkit.open(second) as two:
            ours, theirs = one.state_dict["w"], two.state_dict["w"]
            half = one.rewrite(ckptkit.CastDtype("float16")).state_dict["w"]
            ckptkit.save(
                {"one": ours, "two": theirs, "part": ours[1:3, ::2], "half": half, "new": torch.ones(1)}, target
            )
        loaded = load_file(target) if target.suffix == ".safetensors" else torch.load(target, weights_only=True)
        assert torch.equal(loaded["one"], a["w"])
        assert torch.equal(loaded["two"], b["w"])
        assert torch.equal(loaded["part"], a["w"][1:3, ::2])
        assert torch.equal(loaded["half"], a["w"].half())
    with pytest.raises(FileAccessError, match="was closed"):
        ckptkit.save({"one": ours}, tmp_path / "closed.pth")


def test_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    ckptkit.save({"w": np.zeros(3)}, path)
    before = path.read_bytes()
    with pytest.raises(DestinationExistsError):
        ckptkit.save({"w": np.ones(3)}, path)
    state = {"w": np.ones(1 << 20)}

    def meddle(done: int, _: int) -> None:
        state["w"][-1] = done  # after it was written, and before it is compared

    with pytest.raises(CorruptError, match="'w': the output differs at byte"):
        ckptkit.save(state, path, force=True, progress=meddle)
    with pytest.raises(RewriteError, match="does not belong to a known container"):
        ckptkit.save(state, tmp_path / "a.txt")
    with pytest.raises(RewriteError, match="is not text"):
        ckptkit.save(state, path, force=True, metadata={"a": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]
    ckptkit.save(state, path, force=True, check=False)
    assert load_file(path)["w"][0] == 1


def test_shards(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((1000,), float(number)) for number in range(4)}
    plan = ckptkit.save(state, tmp_path / "model.safetensors", max_shard_size=8500)
    assert len(plan.shards) == 2
    loaded = ckptkit.load_state_dict(tmp_path / "model.safetensors.index.json", map_location="cpu")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_and_imports(suffix: str, tmp_path: Path) -> None:
    """128 MiB of arrays, in odd orders too, is written with some MiB beside it, and without torch."""
    code = f"""
import resource, sys
import numpy as np, ckptkit
state = {{f"w{{n}}": np.full(16 << 20, n, np.uint8) for n in range(6)}}
state["swapped"] = np.full(4 << 20, 7, ">f4")
state["backwards"] = np.full((1 << 11, 1 << 11), 8, "<f4")[::-1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ckptkit.save(state, {str(tmp_path / f"big{suffix}")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, imported = done.stdout.split()
    assert imported == "False"
    assert int(grown) < 32 << 10  # KiB: torch's import alone is more
    (tmp_path / f"big{suffix}").unlink()


def test_memory_of_a_device_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptkit.torch_bridge import handles

    tensor = torch.randn(3 << 20)
    asked: list[int] = []
    from_device = handles._from_device

    def piece(storage: torch.UntypedStorage, start: int, nbytes: int) -> bytes:
        found = from_device(storage, start, nbytes)
        asked.append(len(found))
        return found

    def elsewhere(self: memory.Memory, address: int, nbytes: int, owner: Any) -> Any:
        return self.add(nbytes, lambda start, count: piece(owner, start, count), owner)

    monkeypatch.setattr(memory.Memory, "add_at", elsewhere)
    ckptkit.save({"w": tensor}, tmp_path / "a.pth")
    assert torch.equal(torch.load(tmp_path / "a.pth")["w"], tensor)
    assert max(asked) <= 4 << 20
