"""The check of an output finds every difference, and names what differs."""

from __future__ import annotations

import argparse
import json
import pickletools
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import extents, flipped, written
from torch import nn

import ckptkit
from ckptkit import compare, formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.compare import check_output
from ckptkit.errors import CorruptError
from ckptkit.transfer.checksums import first_difference
from ckptkit.transfer.values import same_values

Save = Callable[..., Path]


def checkpoint_of(path: Path) -> Iterator[Checkpoint]:
    checkpoint, file = formats.read(path)
    with closing(file):
        yield checkpoint


def training() -> dict[str, Any]:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].weight = nn.Parameter(model[2].weight.t())
    weights = model.state_dict()
    weights["tied"] = weights["0.weight"]
    weights["slice"] = weights["1.running_mean"][1:]
    return {
        "epoch": 3,
        "lr": 0.25,
        "name": "a name",
        "flag": True,
        "raw": b"bytes",
        "nan": float("nan"),
        "args": argparse.Namespace(lr=0.125, layers=[1, 2, (3, 4)], chosen={"only"}),
        "state_dict": weights,
        "optimizer": {"state": {0: {"moment": weights["0.weight"] * 2}}, "param_groups": [{"lr": 0.5, "params": [0]}]},
        "again": weights["0.bias"],
    }


@pytest.fixture
def source(save: Save) -> Iterator[Checkpoint]:
    yield from checkpoint_of(save(training(), "source.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_identical_output_passes(source: Checkpoint, tmp_path: Path, suffix: str) -> None:
    compared = check_output(source, str(written(source, tmp_path / f"out{suffix}")))
    if suffix == ".safetensors":
        distinct = {entry.view: entry.nbytes for entry in source.state_dict.values()}
        assert compared == sum(distinct.values())
    else:
        state, moment = source.state_dict, 2 * 9 * 4
        assert compared == sum({id(e.storage): e.storage.nbytes for e in state.values()}.values()) + moment


def test_no_file_is_left_open(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[SourceFile] = []
    read = compare.read

    def reading(path: str) -> tuple[Checkpoint, SourceFile]:
        result = read(path)
        opened.append(result[1])
        return result

    monkeypatch.setattr(compare, "read", reading)
    check_output(source, str(written(source, tmp_path / "out.pth")))
    with pytest.raises(OSError, match="was closed"):
        opened[0].read(0, 1)


# Every byte of an output.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_flipped_bit_in_any_storage_names_the_tensor(source: Checkpoint, tmp_path: Path, suffix: str) -> None:
    path = written(source, tmp_path / f"out{suffix}")
    good = path.read_bytes()
    first: dict[int, str] = {}
    for name, (offset, _) in extents(path).items():
        first.setdefault(offset, name)
    for name, (offset, nbytes) in extents(path).items():
        for at in (offset, offset + nbytes - 1):
            path.write_bytes(good)
            flipped(path, at)
            with pytest.raises(CorruptError, match="the output") as caught:
                check_output(source, str(path))
            assert any(shown in str(caught.value) for shown in (name, first[offset]))


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_flipped_bit_anywhere_in_the_pickle(source: Checkpoint, tmp_path: Path, step: int) -> None:
    """Without the archive's checksums only the comparison stands between an error and the user."""
    path = written(source, tmp_path / "out.pth")
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    pickle = records["archive/data.pkl"]
    unnoticed = []
    for at in range(0, len(pickle), step):
        damaged = bytearray(pickle)
        damaged[at] ^= 1
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, bytes(damaged) if name.endswith("data.pkl") else data)
        try:
            check_output(source, str(path))
        except ckptkit.CkptkitError:
            continue
        unnoticed.append(at)
    ops = [(at, op.name) for op, _, at in pickletools.genops(pickle)]
    owners = Counter(max((start, name) for start, name in ops if start <= at)[1] for at in unnoticed)
    # What says nothing: the protocol's number, and the memo's where nothing refers to the entry.
    assert set(owners) <= {"PROTO", "BINPUT", "LONG_BINPUT"}, owners


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_flipped_bit_anywhere_in_a_safetensors_header(source: Checkpoint, tmp_path: Path, step: int) -> None:
    path = written(source, tmp_path / "out.safetensors")
    good = path.read_bytes()
    end = 8 + struct.unpack("<Q", good[:8])[0]
    padding = len(good[:end]) - len(good[:end].rstrip(b" "))
    marker = good.index(b'"format":"pt"')
    unnoticed = []
    for at in range(0, end - padding, step):
        path.write_bytes(good)
        flipped(path, at)
        try:
            check_output(source, str(path))
        except ckptkit.CkptkitError:
            continue
        unnoticed.append(at)
    assert set(unnoticed) <= set(range(marker, marker + len('"format":"pt"')))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(epoch=4),
        lambda c: c.update(epoch=3.0),
        lambda c: c.update(flag=1),
        lambda c: c.update(lr=-0.25),
        lambda c: c.update(name="another"),
        lambda c: c.update(raw="bytes"),
        lambda c: c.update(nan=-float("nan")),
        lambda c: c.update(more=1),
        lambda c: c.pop("epoch"),
        lambda c: c.update(epoch=c.pop("epoch")),
        lambda c: setattr(c["args"], "lr", 0.25),
        lambda c: setattr(c["args"], "layers", [1, 2, [3, 4]]),
        lambda c: setattr(c["args"], "chosen", {"other"}),
        lambda c: c.update(args=argparse.Namespace()),
        lambda c: c.update(again=c["again"].clone()),
        lambda c: c.update(again=c["state_dict"]["2.bias"]),
        lambda c: c.update(again=c["again"].requires_grad_()),
        lambda c: c["state_dict"].update(tied=c["state_dict"]["tied"].clone()),
        lambda c: c["state_dict"].update({"2.bias": c["state_dict"]["0.bias"]}),
        lambda c: c["state_dict"].update({"0.weight": c["state_dict"]["0.weight"].view(2, 9)}),
        lambda c: c["state_dict"].update({"2.weight": c["state_dict"]["2.weight"].t()}),
        lambda c: c["state_dict"].update({"2.bias": c["state_dict"]["2.bias"].view(torch.int32)}),
        lambda c: c["state_dict"].update({"2.bias": nn.Parameter(c["state_dict"]["2.bias"])}),
        lambda c: c["state_dict"].move_to_end("0.weight"),
        lambda c: c.update(state_dict=dict(c["state_dict"])),
        lambda c: c["state_dict"]._metadata["1"].update(version=1),
        lambda c: c["state_dict"]._metadata.pop("1"),
        lambda c: c["optimizer"]["state"].update({1: c["optimizer"]["state"].pop(0)}),
    ],
)
def test_any_other_difference(save: Save, source: Checkpoint, tmp_path: Path, change: Callable[[Any], object]) -> None:
    other = torch.load(tmp_path / "source.pth", weights_only=False)
    change(other)
    with pytest.raises(CorruptError, match="nothing was written"):
        check_output(source, str(save(other, "other.pth")))
    # And unchanged it passes: what torch writes again is the same tree.
    assert check_output(source, str(save(torch.load(tmp_path / "source.pth", weights_only=False), "other.pth")))


def test_another_device_is_a_difference(save: Save, source: Checkpoint, tmp_path: Path) -> None:
    again = torch.load(tmp_path / "source.pth", weights_only=False)
    with pytest.raises(CorruptError):
        check_output(source, str(save(again, "other.pth", device="cuda:0")))


def source_versions() -> dict[str, Any]:
    return dict(training()["state_dict"]._metadata)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


def with_header(path: Path, header: dict[str, Any]) -> None:
    data = path.read_bytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])


def test_safetensors_names_shapes_aliases_and_metadata(source: Checkpoint, tmp_path: Path) -> None:
    source = source.replace(metadata={"license": "MIT"})
    path = written(source, tmp_path / "out.safetensors")
    good = header_of(path)
    versions = json.dumps(source_versions(), separators=(",", ":"))
    order = json.dumps([list(source.state_dict).index("tied")])
    expected = {"format": "pt", "license": "MIT", "tied": "0.weight", "torch._metadata": versions}
    assert good["__metadata__"] == {**expected, "ckptkit_tied_order": order}
    with_header(path, good)
    check_output(source, str(path))

    def changed(change: Callable[[dict[str, Any]], object], message: str) -> None:
        header = json.loads(json.dumps(good))
        change(header)
        with_header(path, header)
        with pytest.raises(CorruptError, match=message):
            check_output(source, str(path))

    changed(lambda h: h.update({"0.biaz": h.pop("0.bias")}), "same tensor names")
    changed(lambda h: h["__metadata__"].pop("tied"), "same tensor names")
    changed(lambda h: h["__metadata__"].update(more="0.bias"), "same tensor names")
    changed(lambda h: h["__metadata__"].update(tied="0.bias"), "'tied': the output has another dtype or shape")
    changed(lambda h: h["0.weight"].update(shape=[2, 3, 3]), r"'(0\.weight|tied)': .* another dtype or shape")
    changed(lambda h: h["2.bias"].update(dtype="I32"), r"'2\.bias': the output has another dtype")
    changed(lambda h: h["__metadata__"].update(license="GPL"), "metadata 'license'")
    changed(lambda h: h["__metadata__"].pop("license"), "metadata 'license'")
    changed(lambda h: h["__metadata__"].pop("torch._metadata"), "the same module versions")
    changed(lambda h: h["__metadata__"].update({"torch._metadata": "{}"}), "the same module versions")
    swapped = {"1.weight": good["1.running_var"], "1.running_var": good["1.weight"]}
    assert good["1.weight"]["shape"] == good["1.running_var"]["shape"]
    with_header(path, {**good, **swapped})
    check_output(source, str(path))  # both are ones: other places, same values
    swapped = {"0.bias": good["2.bias"], "2.bias": good["0.bias"]}
    changed(lambda h: h.update(swapped), r"'0\.bias': the output differs at byte")


def test_an_alias_of_the_same_shape_but_other_values(save: Save, tmp_path: Path) -> None:
    tensor = torch.ones(3)
    path = save({"a": tensor, "b": tensor, "c": torch.zeros(3)})
    for source in checkpoint_of(path):
        out = written(source, tmp_path / "out.safetensors")
        header = header_of(out)
        header["__metadata__"]["b"] = "c"
        with_header(out, header)
        with pytest.raises(CorruptError, match="tensor 'b'"):
            check_output(source, str(out))


# Damaged sources.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["2.weight", "0.bias", "slice", "tied"])
def test_a_damaged_source_is_named(save: Save, tmp_path: Path, suffix: str, name: str) -> None:
    path = save({"state_dict": training()["state_dict"]})
    offset, _ = extents(path)[name]
    flipped(path, offset)
    torch.load(path, weights_only=True)  # torch does not notice
    for source in checkpoint_of(path):
        out = written(source, tmp_path / f"out{suffix}")
        with pytest.raises(CorruptError, match=r"the bytes have CRC-32 .* the file is damaged") as caught:
            check_output(source, str(out))
        assert caught.value.path == str(path)
        shares = [other for other, (at, _) in extents(path).items() if at == offset]
        assert any(other in caught.value.message for other in shares)
    with pytest.raises(CorruptError, match="the file is damaged"):
        ckptkit.convert(path, tmp_path / f"converted{suffix}")
    assert not (tmp_path / f"converted{suffix}").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_source_damaged_outside_its_views(save: Save, tmp_path: Path, suffix: str) -> None:
    path = save({"part": torch.arange(100.0)[:3]})
    flipped(path, extents(path)["part"][0] + 399)
    with pytest.raises(CorruptError, match=r"part.*the file is damaged"):
        ckptkit.convert(path, tmp_path / f"out{suffix}")


def test_without_recorded_checksums_there_is_nothing_to_hold_it_against(
    save: Save, tmp_path: Path, without_checksums: Callable[[], AbstractContextManager[None]]
) -> None:
    with without_checksums():
        path = save({"w": torch.ones(5), "part": torch.arange(9.0)[1:]})
    for source in checkpoint_of(path):
        assert check_output(source, str(written(source, tmp_path / "a.pth")))
        assert check_output(source, str(written(source, tmp_path / "a.safetensors")))


# Values.


def test_nan_equals_itself_and_zero_not_minus_zero(save: Save) -> None:
    one = {"a": torch.tensor([float("nan"), 0.0]), "b": torch.tensor([float("nan"), -0.0])}
    for checkpoint in checkpoint_of(save(one)):
        a, b = checkpoint.state_dict["a"], checkpoint.state_dict["b"]
        assert same_values(a, a)
        assert not same_values(a, b)


def test_values_are_compared_whatever_the_layout(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.transfer.values.CHUNK_NBYTES", 64)
    tensor = torch.arange(120.0).view(10, 12)
    wrong = tensor.clone()
    wrong[9, 11] += 1
    saved = {"plain": tensor, "t": tensor.t().contiguous().t(), "wrong": wrong, "wrong t": wrong.t().contiguous().t()}
    for checkpoint in checkpoint_of(save(saved)):
        state = checkpoint.state_dict
        assert same_values(state["plain"], state["t"])
        assert same_values(state["t"], state["plain"])
        for good in ("plain", "t"):
            for bad in ("wrong", "wrong t"):
                assert not same_values(state[good], state[bad])
                assert not same_values(state[bad], state[good])


def test_values_of_different_length(save: Save) -> None:
    for checkpoint in checkpoint_of(save({"a": torch.zeros(4), "b": torch.zeros(5), "c": torch.zeros(0)})):
        state = checkpoint.state_dict
        assert not same_values(state["a"], state["b"])
        assert not same_values(state["b"], state["a"])
        assert not same_values(state["c"], state["a"])
        assert not same_values(state["a"], state["c"])


def test_the_first_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.transfer.checksums._READ_NBYTES", 100)
    data = bytes(range(250))
    (tmp_path / "data").write_bytes(data + data[:-1] + b"x" + data)
    with closing(SourceFile(tmp_path / "data")) as file:
        one, other, same = (ByteRange(file, at, 250) for at in (0, 250, 500))
        assert first_difference(one, same) == (None, zlib.crc32(data))
        assert first_difference(one, other)[0] == 249
        assert first_difference(one, one.part(0, 10))[0] == 10
        assert first_difference(one.part(5, 0), same.part(9, 0)) == (None, 0)


def test_a_state_dict_under_two_keys(save: Save, tmp_path: Path) -> None:
    weights = OrderedDict(w=torch.ones(2))
    for source in checkpoint_of(save({"state_dict": weights, "best": weights})):
        check_output(source, str(written(source, tmp_path / "out.pth")))
        other = save({"state_dict": weights, "best": OrderedDict(weights)}, "other.pth")
        with pytest.raises(CorruptError, match="no longer the same object"):
            check_output(source, str(other))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_in_several_threads(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr("ckptkit.transfer.workers.MANY_NBYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    path = written(source, tmp_path / f"out{suffix}")
    alone = sum({id(e.storage): e.nbytes for e in source.state_dict.values() if e.covers_storage}.values())
    assert check_output(source, str(path)) >= alone
    flipped(path, extents(path)["2.bias"][0])
    with pytest.raises(CorruptError, match=r"2\.bias.*the output differs at byte 0"):
        check_output(source, str(path))
