"""The zip writer's layout, with zipfile as the oracle."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.zip_samples import content

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.formats.torch_zip_writer import ALIGNMENT, ZipWriter
from ckptkit.formats.zip_archive import read_directory, read_record
from ckptkit.plan import Checksum, Copy, LiteralBytes


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], SourceFile]:
    def write(data: bytes) -> SourceFile:
        path = tmp_path / "file.zip"
        path.write_bytes(data)
        return SourceFile(path)

    return write


Opened = Callable[[bytes], SourceFile]


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
