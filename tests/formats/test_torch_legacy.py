"""torch-legacy: torch saves and loads, ckptkit reads, converts, and refuses what does not add up."""

from __future__ import annotations

import collections
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import Conformance
from support.files import MAGIC, PROTOCOL, SYS_INFO, Pid, dumped, tensor_of
from support.generated_tensors import STORABLE

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import LimitError
from ckptkit.formats import torch_legacy
from ckptkit.limits import Limits
from ckptkit.pickling.inert import Object, PersistentId, walk

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def save(obj: object, path: Path, protocol: int = 2) -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return path


def read(path: Path) -> Checkpoint:
    return formats.read(path)[0]


def entries(tree: object) -> list[TensorEntry]:
    return [node for node in walk(tree) if isinstance(node, TensorEntry)]


def floats(key: str, numel: int, view: object = None) -> Pid:
    return Pid("storage", torch.FloatStorage, key, "cpu", numel, view)


class V1:
    """A tensor as torch before 0.4 pickled it."""

    def __init__(self, storage: Pid, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.args = (storage, offset, shape, stride)

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor, self.args


def counted(*values: float) -> bytes:
    return struct.pack(f"<q{len(values)}f", len(values), *values)


def parts(obj: object, keys: object, *storages: bytes, info: object = SYS_INFO, version: object = PROTOCOL) -> bytes:
    """A file put together by hand."""
    return b"".join([*map(dumped, (MAGIC, version, info, obj, keys)), *storages])


def model() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(3, 4), "half": torch.randn(5).half(), "count": torch.tensor(7)}


class TestConformance(Conformance):
    """torch-legacy does what every container does."""

    reads = "torch-legacy"

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        """As torch writes it."""
        return save(state, folder / "model.pt")


# What torch writes.


@pytest.mark.parametrize("legacy", [True, False])
def test_protocol_0_which_torch_cannot_load(legacy: bool, tmp_path: Path, same_bits: SameBits) -> None:
    state: dict[str, torch.Tensor] = {**model(), "u16": torch.ones(3).to(torch.uint16), "b": torch.ones(2).bool()}
    path = tmp_path / "0.pth"
    torch.save(state, path, pickle_protocol=0, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(AssertionError, match="saved_id must be a tuple"):
        torch.load(path, weights_only=False)
    checkpoint = read(path)
    (finding,) = [finding for finding in checkpoint.findings if finding.code == "text-persistent-ids"]
    assert finding.fix == f"ckptkit convert {path} {tmp_path / '0.clean.pth'}"
    assert checkpoint.trust == "safe"
    assert all(same_bits(tensor_of(checkpoint.state_dict[name]), value) for name, value in state.items())
    ckptkit.convert(path, tmp_path / "0.clean.pth")
    again = torch.load(tmp_path / "0.clean.pth")
    assert all(same_bits(again[name], value) for name, value in state.items())
    assert "text-persistent-ids" not in {finding.code for finding in read(tmp_path / "0.clean.pth").findings}


def test_a_whole_model_in_protocol_0_with_its_source(tmp_path: Path, same_bits: SameBits) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(layers, tmp_path / "0.pth", pickle_protocol=0, _use_new_zipfile_serialization=False)
    checkpoint = read(tmp_path / "0.pth")
    assert all(same_bits(tensor_of(checkpoint.state_dict[n]), v) for n, v in layers.state_dict().items())
    assert "torch.nn.modules.linear.Linear" in {use.name for use in checkpoint.globals}
    source = next(finding for finding in checkpoint.findings if finding.code == "embedded-source")
    assert "torch.nn.modules.container.Sequential" in source.message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol: int, tmp_path: Path, same_bits: SameBits) -> None:
    state = model()
    path = save(state, tmp_path / "m.pt", protocol)
    checkpoint = read(path)
    assert (checkpoint.origin.format, checkpoint.origin.format_version) == ("torch-legacy", "1001")
    assert (checkpoint.origin.kind, checkpoint.origin.pickle_protocol) == ("state_dict", protocol)
    assert checkpoint.trust == "safe"
    assert [finding.code for finding in checkpoint.findings] == ["no-checksums"]
    assert list(checkpoint.state_dict) == list(state)
    assert all(same_bits(tensor_of(checkpoint.state_dict[name]), value) for name, value in state.items())
    ckptkit.convert(path, tmp_path / "new.pth")
    again = torch.load(tmp_path / "new.pth", weights_only=protocol == 2)
    assert all(same_bits(again[name], value) for name, value in state.items())
    ckptkit.convert(path, tmp_path / "new.safetensors")
    assert all(same_bits(tensor_of(read(tmp_path / "new.safetensors").state_dict[n]), v) for n, v in state.items())


@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:bcomplex32", "ignore:.*omplex")
@pytest.mark.parametrize("name", STORABLE)
def test_every_dtype(name: str, tmp_path: Path, same_bits: SameBits) -> None:
    raw = torch.randint(0, 2 if name == "bool" else 255, (6 * DTYPES[name].itemsize,), dtype=torch.uint8)
    value = raw.view(getattr(torch, name)).reshape(2, 3)
    state = {"t": value, "part": value[1], "empty": value[:0]}
    path = save(state, tmp_path / "m.pt")
    checkpoint = read(path)
    # Torch does not read back what it saves as untyped storages in this format.
    expected = state if DTYPES[name].storage_class is None else torch.load(path, weights_only=True)
    for key, entry in checkpoint.state_dict.items():
        assert same_bits(tensor_of(entry), expected[key])
    assert checkpoint.state_dict["t"].storage is checkpoint.state_dict["part"].storage


def test_views_ties_and_geometry(tmp_path: Path, same_bits: SameBits) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base, "tied": base, "row": base[2], "transposed": base.t(), "step": base[:, ::2],
        "expanded": base[:1].expand(5, 6), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4),
        "conj": torch.randn(3, dtype=torch.complex64).conj(), "grad": torch.ones(2, requires_grad=True),
    }  # fmt: skip
    path = save(state, tmp_path / "m.pt")
    found = read(path).state_dict
    for name, value in torch.load(path, weights_only=True).items():
        entry = found[name]
        assert (entry.shape, entry.stride, entry.storage_offset) == (
            tuple(value.shape), value.stride(), value.storage_offset())  # fmt: skip
        assert same_bits(tensor_of(entry), value)
        assert entry.requires_grad == value.requires_grad
    assert found["base"].view == found["tied"].view
    assert len({id(found[name].storage) for name in ("base", "tied", "row", "transposed", "step", "expanded")}) == 1
    assert found["conj"].is_conj


def test_device_tags_and_a_resume_dict(tmp_path: Path, same_bits: SameBits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:7")
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save({"epoch": 3, "model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "m.pt")
    checkpoint = read(path)
    assert (checkpoint.origin.kind, checkpoint.origin.state_path) == ("resume", "model")
    assert {entry.location for entry in checkpoint.state_dict.values()} == {"cuda:7"}
    ckptkit.convert(path, tmp_path / "new.pth", map_location="cpu")
    again = torch.load(tmp_path / "new.pth", weights_only=True)
    assert again["epoch"] == 3
    assert same_bits(again["model"]["weight"], net.weight)
    assert same_bits(again["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_whole_model_brings_its_source(tmp_path: Path, same_bits: SameBits) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    path = save(net, tmp_path / "m.pt")
    checkpoint = read(path)
    assert checkpoint.origin.kind == "whole_model"
    assert isinstance(checkpoint.module, Object)
    assert checkpoint.module.class_name == "torch.nn.modules.container.Sequential"
    finding = next(finding for finding in checkpoint.findings if finding.code == "embedded-source")
    assert "source text of 3 classes: torch.nn.modules.container.Sequential, " in finding.message
    assert {use.name for use in checkpoint.globals} >= {"torch.nn.modules.linear.Linear"}
    assert list(checkpoint.state_dict) == list(net.state_dict())
    assert all(same_bits(tensor_of(checkpoint.state_dict[name]), value) for name, value in net.state_dict().items())
    ckptkit.convert(path, tmp_path / "new.pth")
    assert list(torch.load(tmp_path / "new.pth", weights_only=True)) == list(net.state_dict())


def test_no_class_with_its_source_is_written(tmp_path: Path) -> None:
    state = {"state_dict": model(), "builder": torch.nn.ReLU, "net": torch.nn.Linear(2, 2)}
    path = save(state, tmp_path / "m.pt")
    ckptkit.convert(path, tmp_path / "new.pth", section="state_dict")
    again = read(tmp_path / "new.pth")
    assert not any(isinstance(node, PersistentId) for node in walk(again.rest))
    assert torch.load(tmp_path / "new.pth", weights_only=False)["builder"] is torch.nn.ReLU


def test_a_file_without_tensors(tmp_path: Path) -> None:
    checkpoint = read(save({"lr": 0.1}, tmp_path / "args.bin"))
    assert checkpoint.origin.kind == "other"
    assert checkpoint.findings == ()
    assert checkpoint.origin.writer is None


@pytest.mark.parametrize("name", [name for name in ("float32", "uint16") if name in STORABLE])
def test_who_wrote_it(name: str, tmp_path: Path) -> None:
    writer = read(save({"t": torch.zeros(2, dtype=getattr(torch, name))}, tmp_path / "m.pt")).origin.writer
    assert writer == {
        "float32": "torch 0.4 to 1.5, or a later version asked for that format",
        "uint16": "torch 2.0 or later, asked for the format used before 1.6",
    }[name]  # fmt: skip


# What older releases wrote.


@pytest.fixture
def both(tmp_path: Path, same_bits: SameBits) -> Iterator[Callable[[bytes], Any]]:
    """Reads a file with ckptkit and with torch; every tensor must agree.  Gives ckptkit's checkpoint."""
    files = []

    def load(data: bytes) -> Checkpoint:
        path = tmp_path / "old.pt"
        path.write_bytes(data)
        checkpoint, file = formats.read(path)
        files.append(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch.load(path, weights_only=False)
        found = checkpoint.state_dict or dict(enumerate(entries(checkpoint.rest)))
        pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
        tensors = {key: value for key, value in pairs if isinstance(value, torch.Tensor)}
        assert list(found) == list(tensors)
        for key, value in tensors.items():
            assert same_bits(tensor_of(found[key]), value)
            assert (found[key].stride, found[key].requires_grad) == (value.stride(), value.requires_grad)
            assert found[key].is_parameter == isinstance(value, torch.nn.Parameter)
        return checkpoint

    yield load
    for file in files:
        file.close()


def test_tensors_before_0_4(both: Callable[[bytes], Checkpoint], tmp_path: Path) -> None:
    state = collections.OrderedDict(w=V1(floats("10", 6), 0, (2, 3), (3, 1)), part=V1(floats("10", 6), 4, (2,), (1,)))
    checkpoint = both(parts(state, ["10"], counted(1, 2, 3, 4, 5, 6)))
    assert checkpoint.origin.writer == "torch 0.1 to 0.3"
    assert checkpoint.state_dict["w"].storage is checkpoint.state_dict["part"].storage


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_views_of_storages(both: Callable[[bytes], Checkpoint], tmp_path: Path) -> None:
    first, second = floats("10", 6, ("11", 1, 3)), floats("10", 6, ("12", 4, 2))
    whole = V1(floats("10", 6), 0, (6,), (1,))
    tensors = [V1(first, 0, (3,), (1,)), V1(second, 1, (1,), (1,)), whole, V1(first, 1, (2,), (1,))]
    checkpoint = both(parts([*tensors, first, second], ["10"], counted(1, 2, 3, 4, 5, 6)))
    found = entries(checkpoint.rest)
    assert len({id(entry.storage) for entry in found}) == 1
    assert [entry.storage_offset for entry in found] == [1, 5, 0, 2]
    views = [node for node in walk(checkpoint.rest) if isinstance(node, Storage)]
    assert [(view.key, view.source.read()) for view in views] == [
        ("11", struct.pack("<3f", 2, 3, 4)), ("12", struct.pack("<2f", 5, 6))]  # fmt: skip
    ckptkit.convert(tmp_path / "old.pt", tmp_path / "new.pth")
    again = torch.load(tmp_path / "new.pth", weights_only=True)
    assert [value.tolist() for value in again] == [[2, 3, 4], [6], [1, 2, 3, 4, 5, 6], [3, 4], [2, 3, 4], [5, 6]]
    assert again[0].untyped_storage().data_ptr() == again[3].untyped_storage().data_ptr()


@pytest.mark.parametrize("window", [1, 2, 3, 5, 17, 64, 1000])
def test_a_pickle_that_is_longer_than_what_is_read_at_first(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_bits: SameBits
) -> None:
    state = {**model(), "text": "x" * 300, "big": 1 << 200, "raw": b"\xff" * 300}
    monkeypatch.setattr(torch_legacy, "_OBJECT_NBYTES", window)
    monkeypatch.setattr("ckptkit.formats.torch_legacy._GROWTH", 2)
    for protocol in (2, 4):
        checkpoint = read(save(state, tmp_path / "m.pt", protocol))
        assert same_bits(tensor_of(checkpoint.state_dict["weight"]), state["weight"])
        assert list(checkpoint.state_dict.everything) == list(state)
        assert checkpoint.state_dict.everything["raw"] == state["raw"]


def test_a_pickle_over_the_limit(tmp_path: Path) -> None:
    path = save(model(), tmp_path / "m.pt")
    file = SourceFile(path)
    for limits in (Limits(pickle_nbytes=100), Limits(opcodes=10)):
        with pytest.raises(LimitError):
            torch_legacy.read(formats.Probe(file, limits))
    file.close()
