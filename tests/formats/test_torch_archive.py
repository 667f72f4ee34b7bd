"""What torch's archives have in common: which one a file is, who wrote it, dead records, deflated storages."""

from __future__ import annotations

import os
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import Conformance

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.derived import DeflatedRange
from ckptkit.errors import AmbiguousError, CorruptError, FileAccessError, FormatError
from ckptkit.formats.archives.zip_archive import read_directory
from ckptkit.formats.archives.zip_record import record_source
from ckptkit.torch_bridge import tensors

Save = Callable[..., Path]
Change = Callable[[str, bytes], tuple[str, bytes] | None]


def repacked(path: Path, change: Change = lambda n, d: (n, d), *, deflate: bool = False, more: Any = ()) -> Path:
    """The archive with each record changed or dropped, and more added."""
    target = path.with_name("repacked.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        records = [change(name, source.read(name)) for name in source.namelist()]
        for name, data in [record for record in records if record is not None] + list(more):
            out.writestr(name, data, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return target


def read(path: Path) -> Checkpoint:
    checkpoint, file = formats.read(path)
    file.close()
    return checkpoint


def state() -> dict[str, torch.Tensor]:
    base = torch.arange(2000.0)
    return {"w": base, "view": base[10:20], "t": torch.randn(40, 30).t(), "n": torch.tensor(3), "none": torch.ones(0)}


class TestTorchZip(Conformance):
    reads = "torch-zip"
    step = 7

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        torch.save(state, folder / "m.pth")
        return folder / "m.pth"


class TestDeflatedTorchZip(TestTorchZip):
    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        return repacked(super().written(state, folder), deflate=True)


# Who wrote it.


@pytest.mark.parametrize(
    ("dropped", "version", "writer"),
    [
        ((), b"3\n", "torch 2.7 or later"),
        ((".format_version",), b"3\n", "torch 2.7 or later"),
        ((".format_version", ".storage_alignment"), b"3\n", "torch 2.1 to 2.6"),
        ((".format_version", ".storage_alignment", ".data/serialization_id"), b"3\n", None),
        ((".format_version", ".storage_alignment", ".data/serialization_id", "byteorder"), b"3\n", "torch 1.6 to 2.0"),
        ((".format_version", ".storage_alignment", ".data/serialization_id", "byteorder"), b"2\n", "torch 1.4 or 1.5"),
        ((".format_version", ".storage_alignment", ".data/serialization_id", "byteorder", "version"), b"", None),
    ],
)
def test_the_records_tell_which_torch_wrote_them(
    dropped: tuple[str, ...], version: bytes, writer: str | None, save: Save
) -> None:
    def change(name: str, data: bytes) -> tuple[str, bytes] | None:
        short = name.removeprefix("model/")
        return None if short in dropped else (name, version if short == "version" else data)

    path = save(state())
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if writer == "torch 2.7 or later" and "model/.storage_alignment" not in names:
        pytest.skip("this torch is older")
    assert read(repacked(path, change)).origin.writer == writer


def test_what_ckptkit_writes_is_not_taken_for_torchs(save: Save, tmp_path: Path) -> None:
    ckptkit.convert(save(state()), tmp_path / "ours.pth")
    assert read(tmp_path / "ours.pth").origin.writer is None


def test_newer_archives_keep_the_version_among_the_hidden_records(save: Save) -> None:
    path = repacked(save(state()), lambda n, d: (n.replace("/version", "/.data/version"), d))
    assert read(path).origin.format_version == "3"


# Records that nothing refers to.


def codes(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in checkpoint.findings]


def test_a_clean_file_has_none(save: Save) -> None:
    assert codes(read(save(state()))) == []


def test_dead_storages(save: Save) -> None:
    checkpoint = read(repacked(save(state()), more=[("model/data/99", b"x" * 5000), ("model/notes", b"y" * 120)]))
    assert codes(checkpoint) == [("unreferenced-records", "info")]
    assert "2 records of 5.12 kB" in checkpoint.findings[0].message
    assert "data/99, notes" in checkpoint.findings[0].message


def test_a_pickle_beside_the_pickle(save: Save) -> None:
    checkpoint = read(repacked(save(state()), more=[("model/other.pkl", b"N.")]))
    assert codes(checkpoint) == [("unreferenced-records", "warning")]


def test_many_are_counted_and_few_named(save: Save) -> None:
    checkpoint = read(repacked(save(state()), more=[(f"model/x{n}", b"") for n in range(9)]))
    assert "9 records of 0 B" in checkpoint.findings[0].message
    assert "x3, ..." in checkpoint.findings[0].message


# Roots.


def test_a_second_root_before_the_first(save: Save, tmp_path: Path) -> None:
    with zipfile.ZipFile(save(state())) as source, zipfile.ZipFile(tmp_path / "two.pth", "w") as out:
        out.writestr("other/readme", b"hi")
        for name in source.namelist():
            out.writestr(name, source.read(name))
    with pytest.raises(AmbiguousError, match=r"2 root folders \(model, other\); torch takes the first for all"):
        formats.read(tmp_path / "two.pth")


# Deflated storages: torch.load inflates them, and is the oracle.


@pytest.fixture
def deflated(save: Save) -> Path:
    return repacked(save(state()), deflate=True)


def test_opening_inflates_nothing(deflated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    document = ckptkit.inspect(deflated)
    assert [tensor["name"] for tensor in document["tensors"]] == list(state())
    with ckptkit.open(deflated) as file:
        assert all(isinstance(entry.storage.source, DeflatedRange) for entry in file.state_dict.values())
        assert file.plan(deflated.with_name("x.safetensors")).tensors == 5


def test_values_are_those_torch_loads(deflated: Path) -> None:
    oracle = torch.load(deflated)
    ours = ckptkit.load_state_dict(deflated)
    assert list(ours) == list(oracle)
    for name, value in oracle.items():
        assert torch.equal(ours[name], value)
        assert (ours[name].stride(), ours[name].storage_offset()) == (value.stride(), value.storage_offset())
    assert ours["w"].untyped_storage().data_ptr() == ours["view"].untyped_storage().data_ptr()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_converting_writes_them_plain(ending: str, deflated: Path) -> None:
    oracle = torch.load(deflated)
    target = deflated.with_name(f"out.{ending}")
    assert ckptkit.convert(deflated, target).details["checked"]
    again = ckptkit.load_state_dict(target)
    assert all(torch.equal(again[name], value) for name, value in oracle.items())


def test_statistics_read_them(deflated: Path) -> None:
    tensors = {tensor["name"]: tensor for tensor in ckptkit.inspect(deflated, stats=True)["tensors"]}
    assert (tensors["w"]["stats"]["max"], tensors["view"]["stats"]["min"]) == (1999.0, 10.0)


def test_the_temporary_file_is_closed_with_the_checkpoint(deflated: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with ckptkit.open(deflated) as file:
        tensors(file.state_dict)
        source = file.state_dict["w"].storage.source
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(FileAccessError, match="closed"):
        source.read(0, 1)


def test_a_storage_inflates_once(deflated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: made.append(1) or real(*a, **k))
    ckptkit.convert(deflated, deflated.with_name("out.pth"))
    assert len(made) == 4, "one for each storage that has bytes, and the empty one"


def damaged(path: Path, record: str, at: int, mask: int) -> None:
    """Flip bits of a record's packed data, as they lie."""
    with closing(SourceFile(path)) as source:
        data = read_directory(source)[record].data
    with open(path, "r+b") as out:
        out.seek(data.offset + at)
        byte = out.read(1)[0]
        out.seek(data.offset + at)
        out.write(bytes([byte ^ mask]))


def test_damage_shows_when_the_bytes_are_asked_for(save: Save) -> None:
    path = repacked(save({"w": torch.randint(0, 9, (500,))}), deflate=True)
    noise = random.Random(0)
    refused = 0
    for _ in range(40):
        at, mask = noise.randrange(100), 1 << noise.randrange(8)
        damaged(path, "model/data/0", at, mask)
        with ckptkit.open(path) as file, pytest.raises(CorruptError, match="record 'model/data/0'"):
            tensors(file.state_dict)
        refused += 1
        damaged(path, "model/data/0", at, mask)
    assert refused == 40


def test_a_size_no_deflated_bytes_could_have(save: Save) -> None:
    path = repacked(save({"w": torch.zeros(4)}), deflate=True)
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            names = data[start + (30 if at == 22 else 46) :]
            if names.startswith(b"model/data/0"):
                struct.pack_into("<I", data, start + at, 1 << 30)
    path.write_bytes(data)
    with closing(SourceFile(path)) as source:
        record = read_directory(source)["model/data/0"]
        with pytest.raises(CorruptError, match="declares 1,073,741,824 bytes"):
            record_source(record)
    with pytest.raises(FormatError, match="declared as 16 bytes, its record holds 1,073,741,824"):
        formats.read(path)
