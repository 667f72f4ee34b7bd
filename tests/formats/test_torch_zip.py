"""torch-zip: torch writes, ckptkit reads; ckptkit writes, torch reads; and what must be refused."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support.files import SameBits, Save, repacked, tensor_of
from support.repeated import repeated

from ckptkit import formats
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnknownFormatError, UnsupportedError
from ckptkit.formats import torch_zip_writer
from ckptkit.limits import Limits
from ckptkit.plan import Plan
from ckptkit.transfer.writing import write_atomically


def read(path: Path) -> Checkpoint:
    return formats.read(path)[0]


def write(checkpoint: Checkpoint, target: Path) -> Plan:
    plan = torch_zip_writer.write(checkpoint)
    write_atomically(target, plan, force=True, check=lambda path, compared: None)
    return plan


def model() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(3, 4), "half": torch.randn(5).half(), "count": torch.tensor(7)}


# Reading what torch writes.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol: int, tmp_path: Path, same_bits: SameBits) -> None:
    state = model()
    path = tmp_path / "m.pth"
    torch.save(state, path, pickle_protocol=protocol)
    checkpoint = read(path)
    assert checkpoint.origin.pickle_protocol == protocol
    assert all(same_bits(tensor_of(checkpoint.state_dict[name]), value) for name, value in state.items())
    write(checkpoint, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=protocol == 2)  # torch refuses the others, safe or not
    assert all(same_bits(again[name], value) for name, value in state.items())


def test_the_facts_of_a_file(save: Save) -> None:
    path = save({"a": torch.arange(5.0), "b": torch.zeros(0)}, "model.v1.5.pth", device="cuda:3")
    checkpoint = read(path)
    origin = checkpoint.origin
    assert (origin.format, origin.format_version, origin.byteorder, origin.pickle_protocol) == (
        "torch-zip", "3", "little", 2)  # fmt: skip
    assert (origin.path, origin.size, origin.kind) == (str(path), path.stat().st_size, "state_dict")
    assert checkpoint.metadata == {}
    assert checkpoint.findings == ()
    assert [entry.location for entry in checkpoint.state_dict.values()] == ["cuda:3", "cuda:3"]


def test_data_lies_where_torch_and_zipfile_say(save: Save) -> None:
    path = save({f"t{n}": torch.randn(n) for n in range(1, 40)})
    reader = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:
        crcs = {info.filename: info.CRC for info in archive.infolist()}
    for entry in read(path).state_dict.values():
        record = f"data/{entry.storage.key}"
        assert entry.storage.source.offset == reader.get_record_offset(record)
        assert entry.storage.source.nbytes == len(reader.get_record(record))
        assert entry.storage.crc32 == crcs[f"model/{record}"]


@pytest.mark.parametrize(
    "name", ["my.v1.5.pth", "with space.pth", "ünïcode-模型.pth", "a'quote\".pth", "noending", "data.pkl"]
)
def test_any_file_name_any_root_name(name: str, save: Save) -> None:
    path = save(model(), name)
    assert list(read(path).state_dict) == list(model())


@pytest.mark.parametrize("root", ["archive", "a.b.c", "two words", "模型", "data", "x" * 300])
def test_any_root_name(root: str, save: Save) -> None:
    path = save(model())
    other = repacked(path, lambda name, data: (name.replace("model", root, 1), data))
    assert list(read(other).state_dict) == list(model())


def test_a_file_like_object_saved_under_no_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(model(), buffer)
    (tmp_path / "m.pth").write_bytes(buffer.getvalue())
    assert list(read(tmp_path / "m.pth").state_dict) == list(model())


@pytest.mark.parametrize("dropped", ["byteorder", "version", ".format_version", ".data/serialization_id"])
def test_records_older_files_lack(dropped: str, save: Save, same_bits: SameBits) -> None:
    state = model()
    path = repacked(save(state), lambda name, data: None if name == f"model/{dropped}" else (name, data))
    checkpoint = read(path)
    assert checkpoint.origin.byteorder == "little"
    assert checkpoint.origin.format_version == (None if dropped == "version" else "3")
    assert all(same_bits(tensor_of(checkpoint.state_dict[name]), value) for name, value in state.items())


def test_records_nobody_knows_are_left_alone(save: Save) -> None:
    path = repacked(
        save(model()), lambda name, data: (name, data), more=[("model/notes.txt", b"hi"), ("model/x/y", b"")]
    )
    assert list(read(path).state_dict) == list(model())


def test_small_records_may_be_deflated(save: Save) -> None:
    path = repacked(save({"epoch": 3, "lr": [0.1] * 50}), lambda name, data: (name, data), deflate=True)
    assert read(path).origin.kind == "other"


def test_big_endian_files(save: Save, same_bits: SameBits) -> None:
    state = {"f": torch.randn(3), "d": torch.randn(2).double(), "c": torch.randn(2, dtype=torch.complex64),
             "b": torch.tensor([True, False]), "h": torch.arange(4, dtype=torch.int16)[::2]}  # fmt: skip
    path = save(state)
    widths = {entry.storage.key: 4 if entry.dtype == "complex64" else entry.itemsize
              for entry in read(path).state_dict.values()}  # fmt: skip

    def swapped(name: str, data: bytes) -> tuple[str, bytes]:
        if name == "model/byteorder":
            return name, b"big"
        if not name.startswith("model/data/"):
            return name, data
        width = widths[name.removeprefix("model/data/")]
        return name, b"".join(data[at : at + width][::-1] for at in range(0, len(data), width))

    path = repacked(path, swapped)
    checkpoint = read(path)
    oracle = torch.load(path)
    assert checkpoint.origin.byteorder == "big"
    for name, value in state.items():
        assert same_bits(oracle[name], value), "torch itself reads it so"
        assert same_bits(tensor_of(checkpoint.state_dict[name]), value)
    again = path.with_name("again.pth")
    write(checkpoint, again)
    loaded = torch.load(again)
    assert all(same_bits(loaded[name], value) for name, value in state.items())


def test_checksums_that_were_not_recorded(
    save: Save, same_bits: SameBits, without_checksums: Callable[[], AbstractContextManager[None]]
) -> None:
    state = model()
    with without_checksums():
        checkpoint = read(save(state))
    assert [entry.storage.crc32 for entry in checkpoint.state_dict.values()] == [None] * 3
    assert [(finding.code, finding.severity) for finding in checkpoint.findings] == [("crc-not-recorded", "info")]
    assert "3 storages" in checkpoint.findings[0].message
    target = Path(checkpoint.origin.path).with_name("again.pth")
    write(checkpoint, target)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
    again = read(target)
    assert again.findings == ()
    assert all(same_bits(tensor_of(again.state_dict[name]), value) for name, value in state.items())


# What is refused.


def keep(name: str, data: bytes) -> tuple[str, bytes]:
    return name, data


def with_record(record: str, content: bytes) -> Callable[[str, bytes], tuple[str, bytes]]:
    return lambda name, data: (name, content if name == f"model/{record}" else data)


REFUSED: list[tuple[str, Callable[[Path], Path], type[FormatError], str]] = [
    ("version 0", lambda p: repacked(p, with_record("version", b"0\n")), UnsupportedError, "version '0'; 1 to 10"),
    ("version 11", lambda p: repacked(p, with_record("version", b"11\n")), UnsupportedError, "version '11'"),
    ("huge version", lambda p: repacked(p, with_record("version", b"9" * 5000)), UnsupportedError, "1 to 10 are"),
    ("odd version", lambda p: repacked(p, with_record("version", b"three")), UnsupportedError, "version 'three'"),
    ("odd digits", lambda p: repacked(p, with_record("version", "٣".encode())), UnsupportedError, "1 to 10 are"),
    ("byte order", lambda p: repacked(p, with_record("byteorder", b"middle")), CorruptError, "byte order 'middle'"),
    ("no storage", lambda p: repacked(p, lambda n, d: None if n == "model/data/1" else (n, d)), CorruptError,
     "storage '1' has no record data/1"),
    ("short storage", lambda p: repacked(p, lambda n, d: (n, d[:-1] if n == "model/data/1" else d)), CorruptError,
     "storage '1' is declared as 10 bytes, but its record has 9"),
    ("second pickle", lambda p: repacked(p, lambda n, d: (n, d + d if n.endswith("data.pkl") else d)), CorruptError,
     "bytes follow the pickle's STOP"),
    ("two roots", lambda p: repacked(p, keep, more=[("other/data.pkl", b"N.")]), AmbiguousError,
     r"2 root folders \(model, other\)"),
    ("two roots, one of them further down", lambda p: repacked(p, keep, more=[("x/y/data.pkl", b"N.")]), AmbiguousError,
     r"2 root folders \(model, x/y\)"),
    ("case-equal", lambda p: repacked(p, keep, more=[("model/DATA.PKL", b"N.")]), CorruptError, "differ only in case"),
    ("leaves folder", lambda p: repacked(p, keep, more=[("model/../x", b"N.")]), CorruptError, "leaving its folder"),
    ("no pickle", lambda p: repacked(p, lambda n, d: (n.replace("data.pkl", ".data/0.storage"), d)),
     UnknownFormatError, r"without a torch checkpoint; it contains \d+ files: 'model/.data/0.storage'"),
    ("pickle at the top", lambda p: repacked(p, lambda n, d: ("data.pkl", d) if n.endswith("data.pkl") else None),
     UnknownFormatError, "without their folder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refusals(change: Callable[[Path], Path], error: type[FormatError], words: str, save: Save) -> None:
    path = change(save(model()))
    with pytest.raises(error, match=words) as caught:
        formats.read(path)
    assert caught.value.path == str(path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_duplicate_names(save: Save) -> None:
    path = repacked(save(model()), keep, more=[("model/data.pkl", b"N.")])
    with pytest.raises(CorruptError, match=r"'model/data.pkl' and 'model/data.pkl' have equal names"):
        formats.read(path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda data: data + b"\n", CorruptError, "1 byte was appended"),
        (lambda data: b"junk" + data, UnknownFormatError, "something else before it"),
        (lambda data: data + data, CorruptError, "two archives were joined"),
        (lambda data: data[:-30], CorruptError, "truncated"),
        (lambda data: data[: len(data) // 2], CorruptError, "truncated"),
        (lambda data: data[:4], CorruptError, "truncated"),
    ],
)
def test_bytes_too_many_or_too_few(
    change: Callable[[bytes], bytes], error: type[FormatError], words: str, save: Save
) -> None:
    path = save(model())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(error, match=words):
        formats.read(path)


def test_limits_reach_the_pickle_and_the_records(save: Save) -> None:
    path = save(model())
    for limits, words in (
        (Limits(opcodes=5), "pickle opcodes"),
        (Limits(pickle_nbytes=50), "data.pkl"),
        (Limits(record_nbytes=1), "version"),
        (Limits(entries=3), "records in an archive"),
    ):
        with pytest.raises(LimitError, match=words):
            formats.read(path, limits=limits)


def test_an_error_closes_the_file_and_leaves_the_collector_on(save: Save) -> None:
    import gc

    path = save(model())
    path.write_bytes(path.read_bytes()[:-1])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with pytest.raises(FormatError):
            formats.read(path)
    assert gc.isenabled()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


# Damage anywhere.


@repeated("every", 3, 1)
def test_truncation_at_every_byte(every: int, save: Save) -> None:
    path = save({"w": torch.ones(3), "n": 1})
    for length in range(path.stat().st_size - 1, -1, -every):
        os.truncate(path, length)
        with pytest.raises(FormatError):
            formats.read(path)


MASKS = (1, 4, 32, 128, 255)


@repeated("masks", 1, len(MASKS))
@pytest.mark.parametrize("writer", ["torch", "ckptkit"])
def test_every_flipped_byte_gives_a_result_or_an_error_of_ours(writer: str, masks: int, save: Save) -> None:
    path = save({"w": torch.ones(3), "n": 1})
    if writer == "ckptkit":
        write(read(path), path.with_name("ours.pth"))
        path = path.with_name("ours.pth")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    pickle_at = data.index(pickled)
    refused = 0
    with open(path, "r+b", buffering=0) as out:
        for at in range(len(data)):
            for mask in [MASKS[(at + number) % len(MASKS)] for number in range(masks)]:
                os.pwrite(out.fileno(), bytes([data[at] ^ mask]), at)
                try:
                    _, file = formats.read(path)
                    file.close()
                    assert not pickle_at <= at < pickle_at + len(pickled), "a damaged pickle is told by its checksum"
                except FormatError as error:
                    refused += 1
                    assert len(str(error)) < 1000
            os.pwrite(out.fileno(), data[at : at + 1], at)
    assert refused > len(pickled) * masks
