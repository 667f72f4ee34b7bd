"""The zip directory, with zipfile as the oracle."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import source_of
from support.repeated import repeated
from support.zip_samples import (
    CENTRAL,
    END,
    LOCAL,
    RECORDS,
    archive,
    both,
    content,
    hidden_first_record,
    hidden_record_behind,
    hidden_record_between,
    patched,
    renamed,
    with_descriptor,
    with_local_second_name,
    with_second_name,
    zip64_end,
)

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats import zip_archive
from ckptkit.formats.torch_zip_writer import ZipWriter
from ckptkit.formats.zip_archive import Record, read_directory, read_record
from ckptkit.limits import Limits
from ckptkit.plan import LiteralBytes

Opened = Callable[[bytes], SourceFile]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return lambda data: source_of(data, tmp_path)


# What honest archives look like.


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"a comment", b"x" * 65535])
def test_the_records_are_those_zipfile_sees(compression: int, comment: bytes, opened: Opened) -> None:
    data = archive(compression=compression, comment=comment)
    records = read_directory(opened(data))
    with zipfile.ZipFile(io.BytesIO(data)) as other:
        assert list(records) == other.namelist()
        for info in other.infolist():
            record = records[info.filename]
            assert (record.nbytes, record.data.nbytes) == (info.file_size, info.compress_size)
            assert record.deflated == (info.compress_type == zipfile.ZIP_DEFLATED)
            assert record.crc32 == info.CRC
    assert content(records) == RECORDS


def test_streamed_archives_whose_local_headers_hold_no_sizes(opened: Opened) -> None:
    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: Any) -> int:
            raise OSError

    buffer = Unseekable()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, data in RECORDS.items():
            out.writestr(name, data)
    assert struct.unpack_from("<H", buffer.getvalue(), 6)[0] & 0x8
    assert content(read_directory(opened(buffer.getvalue()))) == RECORDS


def test_zip64_fields_where_they_are_not_needed(opened: Opened) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, data in RECORDS.items():
            with out.open(name, "w", force_zip64=True) as record:
                record.write(data)
    assert content(read_directory(opened(buffer.getvalue()))) == RECORDS


def test_folders_and_extra_fields_of_other_tools(opened: Opened) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.mkdir("root")
        info = zipfile.ZipInfo("root/a")
        info.extra = struct.pack("<HHI", 0x5455, 4, 7) + b"odd"
        info.comment = b"of the record"
        out.writestr(info, b"x")
    assert content(read_directory(opened(buffer.getvalue()))) == {"root/": b"", "root/a": b"x"}


def test_cp437_names(opened: Opened) -> None:
    data = archive({"root/xy": b"1"}).replace(b"root/xy", b"root/\x82y")
    assert list(read_directory(opened(data))) == ["root/éy"]
    assert zipfile.ZipFile(io.BytesIO(data)).namelist() == ["root/éy"]


def test_many_records_beyond_what_16_bits_count(opened: Opened) -> None:
    records = {f"root/{n}": b"" for n in range(66_000)}
    found = read_directory(opened(archive(records)))
    assert list(found) == list(records)


def test_a_checksum_of_zero_is_not_recorded(opened: Opened) -> None:
    data = archive({"root/a": b"first", "root/empty": b""})
    crc = struct.pack("<I", zlib.crc32(b"first"))
    records = read_directory(opened(data.replace(crc, bytes(4))))
    assert (records["root/a"].crc32, records["root/empty"].crc32) == (None, 0)
    assert read_record(records["root/a"], 100) == b"first"


# What is refused.


ONE = archive({"root/a": b"first"})
TWO = archive({"root/a": b"first", "root/b": b"second"})
STORED_SIZE = len(b"first")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (ONE[:-1], CorruptError, "does not end the file"),
        (archive(comment=END + b" in a comment, where zipfile looks first"), AmbiguousError, "inside the comment"),
        (ONE[: ONE.index(END)], CorruptError, "no end record in its last"),
        (ONE + b"x", CorruptError, "bytes were appended"),
        (ONE + bytes(70_000), CorruptError, "no end record in its last"),
        (b"x" * 10 + ONE, CorruptError, "two archives were joined, or bytes were cut out"),
        (ONE + ONE, CorruptError, "two archives were joined, or bytes were cut out"),
        (ONE[:5] + ONE[6:], CorruptError, "bytes were cut out"),
        (renamed(b"root/a", b"root/a"), CorruptError, "'root/a' and 'root/a' have equal names"),
        (renamed(b"root/a", b"root/A"), CorruptError, "'root/a' and 'root/A' have equal names, or"),
        (renamed(b"/root/"), CorruptError, "absolute, empty, or leaving its folder"),
        (renamed(b"../root"), CorruptError, "leaving its folder"),
        (renamed(b"root/.."), CorruptError, "leaving its folder"),
        (renamed(b"root/../b"), CorruptError, "leaving its folder"),
        (renamed(b"root\\a"), CorruptError, "with backslashes, which some readers treat"),
        (renamed(b"..\\abc"), CorruptError, "leaving its folder"),
        (renamed(b"root/\0"), CorruptError, "leaving its folder"),
        (both(renamed(b"root/\xff"), 6, 8, "<H", 0x800), CorruptError, "declared as UTF-8 but is not: .*; unpack it"),
        (with_second_name(), CorruptError, "a second name in its extra field"),
        (hidden_first_record(), AmbiguousError, "begins with a record that the zip directory does not list"),
        (hidden_record_between(), AmbiguousError, "bytes after record 'root/a' belong to no record"),
        (hidden_record_behind(), AmbiguousError, "bytes after record 'root/a' belong to no record"),
        (with_descriptor(b"PK\x07\x08", "<III", 1, 5, 5), AmbiguousError, "belong to no record"),
        (with_descriptor(b"PK\x07\x08", "<IQQ", None, 5, 6), AmbiguousError, "belong to no record"),
        (with_descriptor(b"PK\x07\x07", "<III", None, 5, 5), AmbiguousError, "belong to no record"),
        (with_descriptor(b"xxxx", "<III", None, 5, 5, flag=0), AmbiguousError, "belong to no record"),
        (with_local_second_name(), AmbiguousError, "a second name in its extra field"),
        (patched(ONE, CENTRAL, 34, "<H", 3), UnsupportedError, "multi-volume"),
        (both(ONE, 6, 8, "<H", 0x1), UnsupportedError, "'root/a' is encrypted; unpack it .*-pPASSWORD"),
        (both(ONE, 6, 8, "<H", 0x20), UnsupportedError, "'root/a' is patched"),
        (both(ONE, 6, 8, "<H", 0x40), UnsupportedError, "'root/a' is strongly encrypted"),
        (both(ONE, 6, 8, "<H", 0x2000), UnsupportedError, "'root/a' is masked"),
        (both(ONE, 8, 10, "<H", 12), UnsupportedError, r"method 12 \(bzip2\); torch stores .* unpack it"),
        (patched(ONE, CENTRAL, 0, "<I", 0), CorruptError, "contains more than records"),
        (patched(ONE, CENTRAL, 28, "<H", 500), CorruptError, "reaches outside the zip directory"),
        (patched(ONE, CENTRAL, 24, "<I", 6), CorruptError, "is stored, but 5 bytes are declared as 6"),
        (patched(ONE, CENTRAL, 42, "<I", 1), CorruptError, "no record begins at byte 1"),
        (patched(ONE, CENTRAL, 42, "<I", 1 << 30), CorruptError, "declared at byte 1,073,741,824 of a file"),
        (both(ONE, 18, 20, "<II", 500, 500), CorruptError, "reaches into the zip directory"),
        (patched(ONE, LOCAL, 28, "<H", 500), CorruptError, "reaches into the zip directory"),
        (patched(ONE, LOCAL, 0, "<I", 0), CorruptError, "no record begins at byte 0"),
        (patched(ONE, LOCAL, 34, "<B", 0x41), CorruptError, "another name or method"),
        (patched(ONE, LOCAL, 8, "<H", 8), CorruptError, "another name or method"),
        (patched(ONE, LOCAL, 6, "<H", 0x2), CorruptError, "different flags"),
        (patched(ONE, LOCAL, 14, "<I", 1), CorruptError, "different size or checksum"),
        (patched(ONE, LOCAL, 14, "<I", 0xFFFFFFFF), CorruptError, "different size or checksum"),
        (patched(ONE, LOCAL, 18, "<I", 4), CorruptError, "different size or checksum"),
        (patched(ONE, LOCAL, 22, "<I", 4), CorruptError, "different size or checksum"),
        (patched(patched(TWO, LOCAL, 18, "<II", 9, 9), CENTRAL, 20, "<II", 9, 9), CorruptError, "overlap"),
        (patched(ONE, END, 10, "<H", 2), UnsupportedError, "multi-volume"),
        (patched(ONE, END, 4, "<H", 1), UnsupportedError, "multi-volume"),
        (patched(ONE, END, 8, "<HH", 2, 2), CorruptError, "ends after 1 of 2 records"),
        (patched(TWO, END, 8, "<HH", 1, 1), CorruptError, "more than its 1 record$"),
        (patched(ONE, END, 12, "<I", 1), CorruptError, "two archives were joined"),
        (patched(ONE, END, 16, "<I", 1), CorruptError, "two archives were joined"),
        (patched(ONE, CENTRAL, 24, "<I", 0xFFFFFFFF), CorruptError, "zip64 field, which is missing"),
        (zip64_end(ONE, at=0), CorruptError, "does not point at the zip64 end record"),
        (zip64_end(ONE, at=1 << 40), CorruptError, "after its locator"),
        (zip64_end(ONE, signature=0), CorruptError, "does not point at the zip64 end record"),
        (zip64_end(ONE, size=45), CorruptError, "does not point at the zip64 end record before it"),
        (zip64_end(ONE, disk=1), UnsupportedError, "multi-volume"),
        (zip64_end(ONE, start_disk=1), UnsupportedError, "multi-volume"),
        (zip64_end(ONE, end_disk=1), UnsupportedError, "multi-volume"),
        (zip64_end(ONE, disks=2), UnsupportedError, "multi-volume"),
        (zip64_end(ONE, disks=0), UnsupportedError, "multi-volume"),
        (zip64_end(ONE, count=2), CorruptError, "disagree"),
        (zip64_end(ONE, nbytes=1), CorruptError, "disagree"),
        (zip64_end(ONE, offset=1 << 40), CorruptError, "disagree"),
    ],
)  # fmt: skip
def test_refusals(data: bytes, error: type[FormatError], words: str, opened: Opened) -> None:
    with pytest.raises(error, match=words):
        read_directory(opened(data))


def test_the_samples_that_are_refused_are_whole_before_they_are_changed(opened: Opened) -> None:
    assert content(read_directory(opened(TWO))) == {"root/a": b"first", "root/b": b"second"}
    assert content(read_directory(opened(zip64_end(ONE)))) == {"root/a": b"first"}


@pytest.mark.parametrize(
    ("signature", "layout"), [(b"PK\x07\x08", "<III"), (b"PK\x07\x08", "<IQQ"), (b"", "<III"), (b"", "<IQQ")]
)
def test_data_descriptors(signature: bytes, layout: str, opened: Opened) -> None:
    data = with_descriptor(signature, layout, None, 5, 5)
    assert content(read_directory(opened(data))) == {"root/a": b"first", "root/b": b"second"}
    zeroed = patched(data, LOCAL, 14, "<III", 0, 0, 0)
    assert content(read_directory(opened(zeroed))) == {"root/a": b"first", "root/b": b"second"}


def test_the_directory_may_be_in_another_order(opened: Opened) -> None:
    at = TWO.index(CENTRAL)
    second, end = TWO.index(CENTRAL, at + 1), TWO.index(END)
    swapped = TWO[:at] + TWO[second:end] + TWO[at:second] + TWO[end:]
    assert list(content(read_directory(opened(swapped))).items()) == [("root/b", b"second"), ("root/a", b"first")]


def test_an_archive_inside_a_file(opened: Opened) -> None:
    file = opened(b"before" + TWO + b"behind")
    records = read_directory(ByteRange(file, 6, len(TWO)))
    assert content(records) == {"root/a": b"first", "root/b": b"second"}
    assert records["root/a"].data.offset == 6 + TWO.index(b"first")


def test_sizes_in_the_records_own_zip64_field_must_agree(opened: Opened) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out, out.open("root/a", "w", force_zip64=True) as record:
        record.write(b"first")
    data = buffer.getvalue()
    at = data.index(struct.pack("<HHQQ", 1, 16, 5, 5))
    assert content(read_directory(opened(data))) == {"root/a": b"first"}
    wrong = data[: at + 4] + struct.pack("<Q", 6) + data[at + 12 :]
    with pytest.raises(AmbiguousError, match="different size or checksum"):
        read_directory(opened(wrong))


def test_a_zip64_field_that_is_too_short(opened: Opened) -> None:
    info = zipfile.ZipInfo("root/a")
    info.extra = struct.pack("<HH4s", 0x9999, 4, b"....")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr(info, b"first")
    data = buffer.getvalue().replace(struct.pack("<HH", 0x9999, 4), struct.pack("<HH", 1, 4))
    with pytest.raises(CorruptError, match="zip64 field is too short"):
        read_directory(opened(patched(data, CENTRAL, 24, "<I", 0xFFFFFFFF)))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(entries=1), "records in an archive: 2 is over the limit of 1"),
        (Limits(directory_nbytes=50), "bytes of a zip directory"),
        (Limits(name_nbytes=5), "length of a record's name: 6"),
    ],
)
def test_limits(limits: Limits, words: str, opened: Opened) -> None:
    with pytest.raises(LimitError, match=words):
        read_directory(opened(TWO), limits)


def test_a_record_over_its_limit_is_not_read(opened: Opened) -> None:
    record = read_directory(opened(ONE))["root/a"]
    assert read_record(record, 5) == b"first"
    with pytest.raises(LimitError, match="bytes of record 'root/a': 5 is over the limit of 4"):
        read_record(record, 4)


def test_packed_bytes_count_too(opened: Opened) -> None:
    file = opened(bytes(100))
    with pytest.raises(LimitError, match="bytes of record 'x': 100"):
        read_record(Record(name="x", data=ByteRange(file, 0, 100), nbytes=1, deflated=True, crc32=None), 50)


@pytest.mark.parametrize("declared", [0, 1, 99_999, 100_001])
def test_a_record_that_inflates_to_another_size(declared: int, opened: Opened) -> None:
    data = archive({"root/a": bytes(100_000)}, compression=zipfile.ZIP_DEFLATED)
    record = read_directory(opened(both(data, 22, 24, "<I", declared)))["root/a"]
    with pytest.raises(CorruptError, match="does not inflate to"):
        read_record(record, 1 << 20)


def test_a_record_that_cannot_be_inflated(opened: Opened) -> None:
    data = archive({"root/a": bytes(1000)}, compression=zipfile.ZIP_DEFLATED)
    at = data.index(b"root/a") + 6
    record = read_directory(opened(data[:at] + b"\xff" * 5 + data[at + 5 :]))["root/a"]
    with pytest.raises(CorruptError, match="cannot be inflated"):
        read_record(record, 1 << 20)


def test_a_record_that_does_not_match_its_checksum(opened: Opened) -> None:
    record = read_directory(opened(ONE.replace(b"first", b"f1rst")))["root/a"]
    with pytest.raises(CorruptError, match=r"its CRC-32 is [0-9a-f]{8}, but [0-9a-f]{8} is recorded: damaged"):
        read_record(record, 100)


# Damage anywhere.

SAMPLES = {
    "stored": TWO,
    "deflated": archive(compression=zipfile.ZIP_DEFLATED),
    "zip64": zip64_end(TWO),
    "ours": b"",
}


def ours() -> bytes:
    writer = ZipWriter("root")
    writer.add_literal("a", b"first")
    writer.add_literal("b", b"second")
    steps, nbytes = writer.finish()
    out = bytearray(nbytes)
    for step in steps:
        assert isinstance(step, LiteralBytes)
        out[step.target : step.target + step.nbytes] = step.data
    return bytes(out)


@pytest.mark.parametrize("name", SAMPLES)
def test_truncation_at_every_byte(name: str, opened: Opened) -> None:
    data = SAMPLES[name] or ours()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            read_directory(opened(data[:length]))


@pytest.mark.parametrize("name", SAMPLES)
@repeated("masks", (1, 4, 32, 255), (1, 2, 4, 8, 16, 32, 64, 128, 255))
def test_every_flipped_byte_gives_the_records_or_an_error_of_ours(
    name: str, masks: tuple[int, ...], opened: Opened
) -> None:
    data = SAMPLES[name] or ours()
    expected = content(read_directory(opened(data)))
    file = opened(data)
    refused = 0
    with open(file.path, "r+b", buffering=0) as out:
        for at in range(len(data)):
            for mask in masks:
                os.pwrite(out.fileno(), bytes([data[at] ^ mask]), at)
                try:
                    found = content(read_directory(file))
                except FormatError:
                    refused += 1
                else:
                    # What gets through is in fields that say nothing about the content.
                    assert list(found.values()) == list(expected.values()) or found.keys() != expected.keys()
            os.pwrite(out.fileno(), data[at : at + 1], at)
    assert refused > len(data)


# Records that are written alike are checked many at a time.


def many(style: str) -> bytes:
    """An archive of so many records that most of them are."""
    names = [f"root/data/{number}" for number in range(150)]
    if style == "torch":
        buffer = io.BytesIO()
        torch.save({f"layer.{number}": torch.full((number % 3 + 1,), number) for number in range(150)}, buffer)
        return buffer.getvalue()
    if style == "descriptors":
        with zipfile.ZipFile(buffer := Unseekable(), "w") as out:
            for name in names:
                out.writestr(name, name)
        return buffer.getvalue()
    compression = zipfile.ZIP_DEFLATED if style == "deflated" else zipfile.ZIP_STORED
    return archive({name: name.encode() * 3 for name in names}, compression=compression)


class Unseekable(io.BytesIO):
    """What makes zipfile write data descriptors."""

    def tell(self) -> int:
        raise OSError


def found_in(data: bytes, opened: Opened) -> object:
    """Each record's place and content, or the error."""
    try:
        records = read_directory(opened(data))
        return [(name, record.data.offset, record.nbytes, record.crc32) for name, record in records.items()]
    except FormatError as error:
        return type(error), str(error)


@pytest.mark.parametrize("style", ["torch", "descriptors", "stored", "deflated"])
@repeated("times", 60, 150)
def test_records_alike_are_read_as_one_by_one(
    style: str, times: int, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = many(style)
    together = []
    fast = zip_archive.begins_alike
    monkeypatch.setattr(zip_archive, "begins_alike", lambda *args: together.append(fast(*args)) or together[-1])
    assert len(content(read_directory(opened(honest)))) >= 150
    assert sum(map(len, together)) >= 80
    chance = random.Random(style)
    headers = [at for at in range(len(honest)) if honest.startswith((LOCAL, CENTRAL, b"PK\x07\x08"), at)]
    changes = []
    for _ in range(times):
        changed = bytearray(honest)
        at = chance.choice(headers) + chance.randrange(60)
        changed[at] = chance.choice((0, 1, 8, changed[at] ^ 1, chance.randrange(256)))
        changes.append(bytes(changed))
    for extra in (b"up", b"FB"):  # a second name, in a field that is as long as before
        at = honest.find(b"FB", len(honest) // 3)
        changes.append(honest[:at] + extra + honest[at + 2 :])
    quick = [found_in(data, opened) for data in changes]
    monkeypatch.setattr(zip_archive, "begins_alike", lambda *_: [])
    monkeypatch.setattr(zip_archive, "rows_alike", lambda *_: [])
    assert quick == [found_in(data, opened) for data in changes]
    refused = sum(isinstance(found, tuple) for found in quick)
    assert 20 < refused < len(quick)
