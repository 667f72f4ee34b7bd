"""On a GPU: loading straight to the device, verifying there, and tags that torch reads there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.files import flipped, repacked

import ckptkit
from ckptkit.errors import CorruptError
from ckptkit.torch_bridge.devices import Staging, allocated

Save = Callable[..., Path]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU is at hand: torch.cuda.is_available() is False"
)

DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "complex64", "int64", "uint8", "bool"]


def assert_same_on_the_gpu(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for name, want in theirs.items():
        got = ours[name]
        assert got.device == want.device and got.device.type == "cuda", name
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), name
        raw = [value.detach().contiguous().flatten().view(torch.uint8) for value in (got, want)]
        assert torch.equal(*raw), name


@pytest.fixture
def state() -> dict[str, Any]:
    made: dict[str, Any] = {
        name: torch.randint(0, 2 if name == "bool" else 120, (4096,), dtype=torch.uint8).view(getattr(torch, name))
        for name in DTYPES
    }
    made["large"] = torch.randn(5 << 22)  # 80 MiB: several pieces
    made["tied"], made["view"] = made["large"], made["large"][10:1000:3]
    return made


def test_a_pth_as_torch_loads_it(save: Save, state: dict[str, Any]) -> None:
    path = save(state)
    theirs = torch.load(path, map_location="cuda", weights_only=True)
    assert_same_on_the_gpu(ckptkit.load_state_dict(path, device="cuda"), theirs)
    assert_same_on_the_gpu(ckptkit.load_state_dict(path, map_location={"cpu": "cuda:0"}), theirs)
    assert_same_on_the_gpu(ckptkit.load_state_dict(path, map_location=lambda storage, _: storage.cuda()), theirs)
    assert_same_on_the_gpu(dict(ckptkit.load(path, map_location=torch.device("cuda", 0))), theirs)
    ours = ckptkit.load_state_dict(path, device="cuda")
    assert ours["tied"] is ours["large"]
    assert ours["view"].untyped_storage().data_ptr() == ours["large"].data_ptr()


def test_a_safetensors_file_as_its_library_loads_it(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in state.items() if name not in ("tied", "view", "complex64")}, path)
    theirs = load_file(path, device="cuda")
    ours = ckptkit.load_state_dict(path, device="cuda")
    assert_same_on_the_gpu(ours, {name: theirs[name] for name in ours})


def test_other_byte_orders_compression_casts_and_damage(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3 << 20)
    with monkeypatch.context() as patch:
        patch.setattr("sys.byteorder", "big")
        big = save({"a": values}, "big.pth")
    for path in (big, repacked(save({"a": values}), deflate=True)):
        assert_same_on_the_gpu(
            ckptkit.load_state_dict(path, device="cuda"), torch.load(path, map_location="cuda", weights_only=True)
        )
    path = save({"module.a": values})
    cast = ckptkit.load_state_dict(path, device="cuda", strip_module=True, dtype="bfloat16")
    assert torch.equal(cast["a"].cpu(), values.bfloat16())
    flipped(path, path.read_bytes().index(values[:100].numpy().tobytes()) + 300)
    with pytest.raises(CorruptError, match=r"tensor 'module\.a': the bytes have CRC-32"):
        ckptkit.load_state_dict(path, device="cuda")


def test_what_is_queued_next_waits_for_the_bytes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    staging = Staging(device, nbytes=1 << 20)
    memory = allocated(64 << 20, str(device))
    staging.fill(memory, lambda start, piece: piece.fill_(start >> 20))
    target = torch.empty((0,), dtype=torch.uint8, device=device).set_(memory)
    assert target.view(64, 1 << 20).float().mean(1).tolist() == list(range(64))
    staging.finish()


def test_no_second_copy_on_the_host(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({f"t{i}": torch.ones(16 << 20) for i in range(8)}, path)  # 512 MiB
    ckptkit.load_state_dict(path, device="cuda")  # the buffers are pinned, and torch keeps them
    peak = Path("/proc/self/clear_refs")
    peak.write_text("5")

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    before = status("VmRSS:")
    loaded = ckptkit.load_state_dict(path, device="cuda")
    assert status("VmHWM:") - before < 160 << 20
    assert all(bool((value == 1).all()) for value in loaded.values())


def test_tags_that_torch_wrote_and_reads(save: Save, tmp_path: Path) -> None:
    path = tmp_path / "gpu.pth"
    torch.save({"w": torch.arange(6.0, device="cuda"), "c": torch.ones(2)}, path)
    with ckptkit.open(path) as file:
        assert {name: entry.location for name, entry in file.state_dict.items()} == {"w": "cuda:0", "c": "cpu"}
    as_saved = ckptkit.load_state_dict(path, map_location=None)
    assert (str(as_saved["w"].device), str(as_saved["c"].device)) == ("cuda:0", "cpu")
    ckptkit.convert(path, tmp_path / "cpu.pth", map_location="cpu")
    assert torch.load(tmp_path / "cpu.pth", weights_only=True)["w"].device.type == "cpu"
    ckptkit.convert(tmp_path / "cpu.pth", tmp_path / "again.pth", map_location="cuda:0")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert str(again["w"].device) == "cuda:0" and again["w"].tolist() == list(range(6))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cpu,cuda"])
def test_verify(tmp_path: Path, device: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    path = tmp_path / "model.pth"
    torch.save({f"module.{n}": v for n, v in torchvision.models.resnet18().state_dict().items()}, path)
    ckptkit.convert(path, tmp_path / "clean.safetensors", strip_module=True)
    report = ckptkit.verify(tmp_path / "clean.safetensors", model="torchvision:resnet18", device=device, against=path)
    assert report.ok, report.findings
