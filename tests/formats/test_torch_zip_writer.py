"""torch-zip: what ckptkit writes, torch reads."""

from __future__ import annotations

import io
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import SameBits, Save, filled, published, source_of
from support.zip_samples import content

from ckptkit import formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry
from ckptkit.errors import UnsupportedError
from ckptkit.formats import torch_zip_writer
from ckptkit.formats.torch_zip_writer import ALIGNMENT, ZipWriter
from ckptkit.formats.zip_archive import read_directory, read_record
from ckptkit.plan import Checksum, Copy, LiteralBytes, Plan


def read(path: Path) -> Checkpoint:
    return formats.read(path)[0]


def write(checkpoint: Checkpoint, target: Path) -> Plan:
    return published(torch_zip_writer.write(checkpoint), target)


def model() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(3, 4), "half": torch.randn(5).half(), "count": torch.tensor(7)}


def test_the_written_file(save: Save, same_bits: SameBits, tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    path = save({"model": state, "epoch": 3, "args": {"lr": 1e-3, "b": b"bytes"}}, device="cuda:0")
    checkpoint = read(path)
    target = tmp_path / "again.pth"
    plan = write(checkpoint, target)
    assert plan.nbytes == target.stat().st_size
    assert plan.tensors == len(state)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert names == ["archive/data.pkl", "archive/byteorder", *(f"archive/data/{n}" for n in range(len(state))),
                     "archive/version"]  # fmt: skip
    takes_bytes = hasattr(torch.serialization, "add_safe_globals")
    again = torch.load(target, map_location="cpu", weights_only=takes_bytes)
    original = torch.load(path, map_location="cpu", weights_only=takes_bytes)
    assert list(again) == list(original)
    assert (again["epoch"], again["args"]) == (original["epoch"], original["args"])
    assert again["model"]._metadata == state._metadata
    assert type(again["model"]) is type(original["model"])
    assert list(again["model"]) == list(state)
    assert all(same_bits(again["model"][name], value) for name, value in state.items())
    reader = torch._C.PyTorchFileReader(str(target))
    for name in reader.get_all_records():
        assert reader.get_record_offset(name) % 64 == 0
    assert {entry.location for entry in read(target).state_dict.values()} == {"cuda:0"}


def test_mmap_loads_what_is_written(save: Save, same_bits: SameBits, tmp_path: Path) -> None:
    state = model()
    write(read(save(state)), tmp_path / "again.pth")
    again = torch.load(str(tmp_path / "again.pth"), mmap=True)
    assert all(same_bits(again[name].clone(), value) for name, value in state.items())


def test_the_same_checkpoint_gives_the_same_bytes(save: Save, tmp_path: Path) -> None:
    path = save({"model": model(), "epoch": 1})
    shutil.copy(path, tmp_path / "other name.pth")
    write(read(path), tmp_path / "a.pth")
    write(read(tmp_path / "other name.pth"), tmp_path / "b.pth")
    write(read(tmp_path / "a.pth"), tmp_path / "c.pth")
    first = (tmp_path / "a.pth").read_bytes()
    assert first == (tmp_path / "b.pth").read_bytes() == (tmp_path / "c.pth").read_bytes()


def test_shared_storages_are_written_once(save: Save, tmp_path: Path) -> None:
    base = torch.randn(100)
    path = save({"a": base, "b": base, "c": base[10:20], "d": base.reshape(10, 10).t()})
    target = tmp_path / "again.pth"
    write(read(path), target)
    again = torch.load(target)
    assert len({value.untyped_storage().data_ptr() for value in again.values()}) == 1
    assert target.stat().st_size < path.stat().st_size + 200
    assert torch.equal(again["c"], base[10:20])
    assert torch.equal(again["d"], base.reshape(10, 10).t())


def test_objects_torch_would_have_to_trust_stay_what_they_are(save: Save, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    path = save({"state_dict": network.state_dict(), "network": [network], "optimizer": optimizer.state_dict()})
    checkpoint = read(path)
    write(checkpoint, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=False)
    x = torch.randn(4, 2)
    assert torch.equal(again["network"][0].eval()(x), network.eval()(x))
    tied = again["network"][0][0].weight, again["state_dict"]["0.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr(), "the model and its state_dict share storages still"
    step = again["optimizer"]["state"][0]
    assert torch.equal(step["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def hollow(path: Path, nbytes: int) -> SourceFile:
    with open(path, "wb") as out:
        out.truncate(nbytes)
    return SourceFile(path)


def checkpoint_of(entries: dict[str, TensorEntry]) -> Checkpoint:
    return Checkpoint(
        state_dict=StateDict(entries),
        rest=STATE_DICT,
        origin=Origin(path="none", size=0, format="torch-zip", kind="state_dict"),
    )


def entry_over(source: ByteRange, key: str = "0", **changes: Any) -> TensorEntry:
    storage = Storage(key=key, dtype="uint8", nbytes=source.nbytes, location="cpu", source=source, crc32=1)
    return TensorEntry(storage=storage, storage_offset=0, shape=(source.nbytes,), stride=(1,), dtype="uint8")


def test_storages_beyond_4_gib_without_writing_them(tmp_path: Path) -> None:
    big, small = 5 << 30, 100
    source = hollow(tmp_path / "source", big)
    plan = torch_zip_writer.write(
        checkpoint_of({"big": entry_over(ByteRange(source, 0, big)), "small": entry_over(ByteRange(source, 0, small))})
    )
    assert [step.nbytes for step in plan.steps if isinstance(step, Copy)] == [big, small]
    path = filled(plan, tmp_path / "big.pth")
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == big
    reader = torch._C.PyTorchFileReader(str(path))
    found = read(path).state_dict
    assert found["big"].storage.source.offset == reader.get_record_offset("data/0")
    assert found["small"].storage.source.offset == reader.get_record_offset("data/1") > big
    loaded = torch.load(str(path), mmap=True)
    assert (loaded["big"].shape, loaded["small"].shape) == ((big,), (small,))
    assert loaded["big"][-1] == 0


def test_both_byte_orders_in_one_file_are_refused(tmp_path: Path) -> None:
    source = hollow(tmp_path / "source", 8)
    storages = [
        Storage(key=order, dtype="float32", nbytes=8, location="cpu", source=ByteRange(source, 0, 8), byteorder=order)
        for order in ("little", "big")
    ]
    entries = {
        s.key: TensorEntry(storage=s, storage_offset=0, shape=(2,), stride=(1,), dtype="float32") for s in storages
    }
    with pytest.raises(UnsupportedError, match="both byte orders"):
        torch_zip_writer.write(checkpoint_of(entries))


def test_a_written_file_declares_what_older_torch_reads(save: Save, tmp_path: Path) -> None:
    write(read(save(model())), tmp_path / "again.pth")
    data = (tmp_path / "again.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        assert not any(name.startswith("archive/.") for name in archive.namelist())
    assert struct.unpack_from("<4s", data)[0] == b"PK\x03\x04"


# The zip writer's layout, with zipfile as the oracle.


Opened = Callable[[bytes], SourceFile]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return lambda data: source_of(data, tmp_path)


# The writer.


def laid_out(writer: ZipWriter, path: Path) -> list[Any]:
    steps, nbytes = writer.finish()
    with open(path, "wb") as out:
        for step in steps:
            if isinstance(step, LiteralBytes):
                out.seek(step.target)
                out.write(step.data)
            elif isinstance(step, Copy):
                out.seek(step.target)
                out.write(step.source.read())
        out.truncate(nbytes)
    with open(path, "r+b") as out:
        for step in steps:
            if isinstance(step, Checksum):
                out.seek(step.start)
                crc = zlib.crc32(out.read(step.covers))
                out.seek(step.target)
                out.write(struct.pack("<I", crc))
    return list(steps)


def test_what_is_written_is_whole_for_zipfile_and_for_us(tmp_path: Path, opened: Opened) -> None:
    source = opened(bytes(range(256)) * 40)
    writer = ZipWriter("archive")
    writer.add_literal("data.pkl", b"pickle")
    known = source.read(100, 1000)
    writer.add_copy("data/0", ByteRange(source, 100, 1000), zlib.crc32(known))
    writer.add_copy("data/1", ByteRange(source, 7, 3), None)
    writer.add_copy("data/2", ByteRange(source, 0, 0), None)
    writer.add_literal("empty", b"")
    path = tmp_path / "out.zip"
    steps = laid_out(writer, path)
    with zipfile.ZipFile(path) as out:
        assert out.testzip() is None
        expected = {name: out.read(name) for name in out.namelist()}
        assert all(info.flag_bits == 0x800 and info.date_time == (1980, 1, 1, 0, 0, 0) for info in out.infolist())
    assert expected == {"archive/data.pkl": b"pickle", "archive/data/0": known, "archive/data/1": b"\x07\x08\x09",
                        "archive/data/2": b"", "archive/empty": b""}  # fmt: skip
    records = read_directory(SourceFile(path))
    assert content(records) == expected
    assert all(record.data.offset % ALIGNMENT == 0 for record in records.values())
    assert [step.covers for step in steps if isinstance(step, Checksum)] == [3, 3], "in both headers"
    assert isinstance(steps[-1], Checksum)


def test_steps_cover_the_file_without_overlap() -> None:
    writer = ZipWriter("archive")
    for n in range(5):
        writer.add_literal(str(n), bytes(n * 7))
    steps, nbytes = writer.finish()
    position = 0
    for step in steps:
        assert step.target == position
        position += step.nbytes
    assert position == nbytes


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    writer = ZipWriter("r")
    for n in range(65_535):
        writer.add_literal(str(n), b"")
    path = tmp_path / "many.zip"
    laid_out(writer, path)
    with zipfile.ZipFile(path) as out:
        assert len(out.namelist()) == 65_535
    assert len(read_directory(SourceFile(path))) == 65_535


GIB = 1 << 30


@pytest.mark.parametrize(
    "sizes", [(5 * GIB,), (3 * GIB, 3 * GIB, 10), (4 * GIB - 1, 10), (4 * GIB - 2, 10), (GIB, 3 * GIB)]
)
def test_beyond_4_gib_without_writing_4_gib(sizes: tuple[int, ...], tmp_path: Path) -> None:
    whole = tmp_path / "source"
    with open(whole, "wb") as out:
        out.truncate(max(sizes))
    source = SourceFile(whole)
    writer = ZipWriter("archive")
    offsets = [writer.add_copy(f"data/{n}", ByteRange(source, 0, size), 7 + n) for n, size in enumerate(sizes)]
    writer.add_literal("version", b"3\n")
    steps, nbytes = writer.finish()
    path = tmp_path / "big.zip"
    with open(path, "wb") as out:
        out.truncate(nbytes)  # a hole where the copies would go
        for step in steps:
            assert isinstance(step, (LiteralBytes, Copy))
            if isinstance(step, LiteralBytes):
                out.seek(step.target)
                out.write(step.data)
    assert path.stat().st_size == nbytes
    records = read_directory(SourceFile(path))
    with zipfile.ZipFile(path) as other:
        infos = other.infolist()
        assert [(info.file_size, info.compress_size, info.CRC) for info in infos[:-1]] == [
            (size, size, 7 + n) for n, size in enumerate(sizes)
        ]
        assert other.read("archive/version") == b"3\n"
        with other.open("archive/data/0") as first:
            assert first.read(100) == bytes(100)
    assert [(r.nbytes, r.data.offset, r.crc32) for r in records.values()][:-1] == [
        (size, offset, 7 + n) for n, (size, offset) in enumerate(zip(sizes, offsets, strict=True))
    ]
    assert read_record(records["archive/version"], 10) == b"3\n"
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


def test_zip64_values_stand_in_their_order(tmp_path: Path) -> None:
    """Only the offset is wide here, so it is the first and only value of the field."""
    writer = ZipWriter("r")
    hole = tmp_path / "hole"
    with open(hole, "wb") as out:
        out.truncate(5 * GIB)
    writer.add_copy("big", ByteRange(SourceFile(hole), 0, 5 * GIB), 1)
    writer.add_literal("small", b"x")
    steps, _ = writer.finish()
    directory = steps[-1]
    assert isinstance(directory, LiteralBytes)
    at = directory.data.index(b"r/small") + len(b"r/small")
    tag, size, offset = struct.unpack_from("<HHQ", directory.data, at)
    assert (tag, size) == (1, 8)
    assert offset > 5 * GIB
