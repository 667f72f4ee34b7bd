"""pickle: what pickle.dump and cloudpickle write of tensors is read as pickle.load reads it, executing nothing."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.conformance import Conformance
from torch import nn

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnknownFormatError
from ckptkit.formats.plain_pickle import read
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import Object, walk

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]

PICKLERS: dict[str, Callable[[object, int], bytes]] = {"C": pickle.dumps, "Python": pickle._dumps}  # type: ignore[attr-defined]


class TestPlainPickle(Conformance):
    reads = "pickle"
    trust = "needs_trust"

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        (folder / "model.pkl").write_bytes(pickle.dumps(state))
        return folder / "model.pkl"


class TestPlainPickleAsText(TestPlainPickle):
    step = 5

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        (folder / "model.pkl").write_bytes(pickle.dumps(state, 2))
        return folder / "model.pkl"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)
        self.register_buffer("step", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Given:
    """Pickled as the call of torch's loader with these bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.data,)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    weight, large = torch.randn(3, 4), torch.randn(40_000)
    return OrderedDict(
        {
            "weight": weight, "tied": weight, "view": large[7:11], "large": large, "transposed": torch.randn(2, 5).t(),
            "brain": torch.randn(7).bfloat16(), "complex": torch.randn(3, dtype=torch.complex64),
            "count": torch.tensor(3), "mask": torch.tensor([True, False]), "empty": torch.zeros(0, 2),
            "parameter": nn.Parameter(torch.randn(2)),
        }
    )  # fmt: skip


def put(folder: Path, data: bytes) -> Path:
    (folder / "model.pkl").write_bytes(data)
    return folder / "model.pkl"


@pytest.mark.parametrize("pickler", PICKLERS)
@pytest.mark.parametrize("protocol", range(6))
def test_it_is_what_pickle_loads(protocol: int, pickler: str, tmp_path: Path, same_bits: SameBits) -> None:
    path = put(tmp_path, PICKLERS[pickler]({"net": {"state": state()}, "epoch": 3, "lr": [0.1]}, protocol))
    wanted = pickle.loads(path.read_bytes())["net"]["state"]
    with ckptkit.open(path) as file:
        assert (file.format, file.trust) == ("pickle", "needs_trust")
    found = ckptkit.load_state_dict(path)
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=True)
    assert (whole["epoch"], whole["lr"]) == (3, [0.1])
    ckptkit.convert(path, tmp_path / "m.safetensors", weights_only=True, tied="duplicate")
    for other in (found, whole["net"]["state"], load_file(tmp_path / "m.safetensors")):
        assert set(other) == set(wanted)
        assert all(same_bits(other[name], value) for name, value in wanted.items())
    assert list(found) == list(wanted)
    assert found["transposed"].stride() == wanted["transposed"].stride()


def test_dtypes_that_pickle_writes_and_does_not_load(tmp_path: Path, same_bits: SameBits) -> None:
    values = {"float8": torch.randn(4).to(torch.float8_e4m3fn), "wide": torch.ones(3, dtype=torch.uint16)}
    path = put(tmp_path, pickle.dumps(values))
    with pytest.raises(AttributeError):
        pickle.loads(path.read_bytes())
    found = ckptkit.load_state_dict(path)
    assert all(same_bits(found[name], value) for name, value in values.items())


@pytest.mark.parametrize("protocol", range(6))
def test_what_shares_memory_is_what_pickle_shares(protocol: int, tmp_path: Path) -> None:
    path = put(tmp_path, pickle.dumps(state(), protocol))
    for found in (pickle.loads(path.read_bytes()), ckptkit.load_state_dict(path)):
        assert found["weight"].data_ptr() == found["tied"].data_ptr()
        assert found["large"].untyped_storage().data_ptr() != found["view"].untyped_storage().data_ptr()
    storage = torch.arange(6.0).untyped_storage()
    twice = pickle.dumps([storage, storage, torch.ones(1)], protocol)
    checkpoint, file = formats.read(put(tmp_path, twice))
    file.close()
    one, other, _ = checkpoint.rest  # type: ignore[misc]
    assert one is other  # type: ignore[has-type]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_stay_where_they_lie(protocol: int, tmp_path: Path) -> None:
    values = {"a": torch.arange(20_000.0), "b": torch.arange(4)}
    path = put(tmp_path, pickle.dumps(values, protocol))
    checkpoint, file = formats.read(path)
    with open(path, "rb") as raw:
        for name, value in values.items():
            source = checkpoint.state_dict[name].storage.source
            assert source.file is file
            raw.seek(source.offset)
            assert raw.read(source.nbytes) == value.numpy().tobytes()
    file.close()


@pytest.mark.parametrize("keeper", ["pickle", "cloudpickle"])
def test_a_model_and_its_optimizer(keeper: str, tmp_path: Path, same_bits: SameBits) -> None:
    dumps = pytest.importorskip(keeper).dumps
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    path = put(tmp_path, dumps(net))
    with ckptkit.open(path) as file:
        assert (file.kind, file.trust) == ("whole_model", "needs_trust")
    found = ckptkit.load_state_dict(path)
    assert list(found) == list(net.state_dict())
    assert all(same_bits(found[name], value) for name, value in net.state_dict().items())
    path = put(tmp_path, dumps({"model": net.state_dict(), "optimizer": optimizer.state_dict()}))
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=True)
    optimizer.load_state_dict(whole["optimizer"])
    net.load_state_dict(whole["model"])
    with ckptkit.open(path) as file:
        assert file.kind == "resume"


@pytest.mark.parametrize("protocol", range(6))
def test_devices_are_those_that_it_says(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        path = put(tmp_path, pickle.dumps({"w": torch.ones(2)}, protocol))
    with ckptkit.open(path) as file:
        assert file.state_dict["w"].location == "cuda:1"
    ckptkit.convert(path, tmp_path / "m.pth", map_location="cpu")
    assert torch.equal(torch.load(tmp_path / "m.pth", weights_only=True)["w"], torch.ones(2))


# Names, and what else the loader is given.


@pytest.mark.parametrize("protocol", range(6))
def test_names_are_judged_wherever_they_stand(protocol: int, tmp_path: Path) -> None:
    for value in ([torch.ones(2), Runs()], [Runs(), torch.ones(2)], [torch.ones(2), Given(legacy(Runs()))]):
        with ckptkit.open(put(tmp_path, pickle.dumps(value, protocol))) as file:
            assert (file.format, file.trust) == ("pickle", "hostile")
    clean = put(tmp_path, pickle.dumps({"w": torch.ones(2)}, protocol))
    assert ckptkit.check(clean, max_trust="needs_trust").ok
    assert {finding.code for finding in ckptkit.check(clean, no_pickle=True).findings} == {"pickle-not-allowed"}


@pytest.mark.parametrize("protocol", range(6))
def test_what_is_no_storage_stays_a_call(protocol: int, tmp_path: Path) -> None:
    whole = legacy({"v": torch.ones(2)})
    checkpoint, file = formats.read(put(tmp_path, pickle.dumps([torch.ones(3), Given(whole)], protocol)))
    file.close()
    calls = [node for node in walk(checkpoint.rest) if isinstance(node, Object) and "_load_from" in node.class_name]
    assert [call.args for call in calls] == [(whole,)]
    with pytest.raises(UnknownFormatError, match="written by pickle"):
        formats.read(put(tmp_path, pickle.dumps([Given(whole)], protocol)))


@pytest.mark.parametrize("protocol", range(6))
def test_bytes_that_are_wanted_as_bytes_too_are_whole(protocol: int, tmp_path: Path) -> None:
    data = legacy(torch.arange(300.0).untyped_storage())
    path = put(tmp_path, pickle.dumps({"s": Given(data), "raw": data, "w": torch.ones(2)}, protocol))
    ckptkit.convert(path, tmp_path / "m.pth")
    assert torch.load(tmp_path / "m.pth", weights_only=False)["raw"] == data


@pytest.mark.parametrize(
    "value",
    [
        {"lr": 0.1},
        torch.ones(2).numpy(),
        torch.ones(2, device="meta"),
        {"text": "_load_from_bytes", "n": torch.float16},
    ],
)
def test_without_a_storage_it_is_no_checkpoint(value: object, tmp_path: Path) -> None:
    for protocol in range(6):
        with pytest.raises(UnknownFormatError, match=r"but not written by torch[.]save"):
            formats.read(put(tmp_path, pickle.dumps(value, protocol)))


def test_joblibs_arrays_between_the_opcodes(tmp_path: Path) -> None:
    wrapper = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}b" + torch.ones(2).numpy().tobytes()
    data = pickle.dumps([torch.ones(2)], 3)[:-1] + wrapper + b"0."
    with pytest.raises(UnknownFormatError, match=r"a joblib file, not written by torch.save; joblib.load reads it"):
        formats.read(put(tmp_path, data))


# Damage and limits.


@pytest.mark.parametrize("protocol", range(6))
def test_two_in_a_row_are_refused(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps({"w": torch.ones(2)}, protocol)
    with pytest.raises(AmbiguousError, match=r"[0-9]+ bytes follow the pickle, which pickle.load does not read"):
        formats.read(put(tmp_path, data + data))


WORDS_OF_CUT = (
    "a text argument does not end within",
    *["a string of 200,[0-9]{3} bytes is declared, .* are left: damaged or truncated"] * 2,
    *["a storage's 160,[0-9]{3} bytes are declared, .* are left: truncated"] * 3,
)


@pytest.mark.parametrize("protocol", range(6))
def test_cut_off_in_a_storage_it_is_no_attack(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps({"w": torch.ones(40_000)}, protocol)
    with pytest.raises(CorruptError, match=WORDS_OF_CUT[protocol]) as cut:
        formats.read(put(tmp_path, data[:100_000]))
    assert "dangerous" not in {use.verdict for use in cut.value.globals}


@pytest.mark.parametrize("protocol", range(6))
def test_a_storage_that_does_not_add_up(protocol: int, tmp_path: Path) -> None:
    data = bytearray(legacy(torch.arange(300.0).untyped_storage()))
    data[-1208] ^= 1  # its count
    path = put(tmp_path, pickle.dumps({"w": torch.ones(2), "s": Given(bytes(data))}, protocol))
    with pytest.raises(CorruptError, match="1,201 elements are here, but the object says 1,200"):
        formats.read(path)


def bounded(path: Path, nbytes: int) -> Any:
    from ckptkit.bytesource import SourceFile

    file = SourceFile(path)
    limits = Limits(pickle_nbytes=nbytes)
    assert limits.opcodes == DEFAULT_LIMITS.opcodes
    try:
        return read(formats.Probe(file, limits))
    finally:
        file.close()


@pytest.mark.parametrize("protocol", range(6))
def test_storages_do_not_count_as_bytes_of_the_pickle(protocol: int, tmp_path: Path) -> None:
    values = {str(number): torch.randn(10_000) for number in range(4)}
    raw = bounded(put(tmp_path, pickle.dumps(values, protocol)), 100_000)
    assert sum(isinstance(node, TensorEntry) for node in walk(raw.root)) == 4
    assert "dangerous" not in {use.verdict for use in raw.globals}
    with pytest.raises(LimitError, match="bytes of a pickle beside its storages"):
        bounded(put(tmp_path, pickle.dumps({"w": torch.ones(2), "t": "x" * 2_000_000}, protocol)), 100_000)


def test_storages_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.formats.plain_pickle._MOST", 100)
    path = put(tmp_path, pickle.dumps([torch.ones(2) for _ in range(100)], 4))
    with ckptkit.open(path) as file:
        assert file.kind == "collection"
    with pytest.raises(LimitError, match="storages in a plain pickle"):
        formats.read(put(tmp_path, pickle.dumps([torch.ones(2) for _ in range(101)], 4)))


def test_a_folder_counts_it_once(tmp_path: Path) -> None:
    put(tmp_path, pickle.dumps({"w": torch.ones(2)}))
    (tmp_path / "settings.pkl").write_bytes(pickle.dumps({"lr": 0.1}))
    (tmp_path / "without-an-ending").write_bytes(pickle.dumps(torch.ones(3), 0))
    report = ckptkit.check(tmp_path)
    assert (len(report.results), report.passed_over) == (2, {"pickle": 1})
    assert len(ckptkit.check(tmp_path, no_pickle=True).findings) == 3


def test_anything_that_torch_reads_may_follow_the_name(tmp_path: Path) -> None:
    """A file of today's is no storage as pickle writes it: it may hold whatever torch.load runs."""
    buffer = io.BytesIO()
    torch.save(torch.ones(2).untyped_storage(), buffer)
    with pytest.raises(FormatError) as caught:
        formats.read(put(tmp_path, pickle.dumps(Given(buffer.getvalue()))))
    assert "dangerous" in {use.verdict for use in caught.value.globals}
