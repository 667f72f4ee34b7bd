"""Reads by position: bounded, and every failure says which file."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, SourceFile
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError

DATA = bytes(range(256)) * 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


def test_reads_exactly_what_is_asked(path: Path) -> None:
    file = SourceFile(path)
    assert file.size == 1024
    assert file.path == str(path)
    assert repr(file) == f"SourceFile({str(path)!r}, 1,024 bytes)"
    for offset, nbytes in ((0, 0), (0, 1024), (1, 3), (1023, 1), (1024, 0)):
        assert file.read(offset, nbytes) == DATA[offset : offset + nbytes]
    assert not file.changed()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 1025), (1024, 1), (1 << 70, 1), (0, 1 << 70)])
def test_reads_nothing_outside(path: Path, offset: int, nbytes: int) -> None:
    with pytest.raises(CorruptError, match="were asked of a file of 1,024 bytes") as caught:
        SourceFile(path).read(offset, nbytes)
    assert caught.value.path == str(path)


def test_bytes_paths_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    file = SourceFile(os.fsencode(tmp_path / "empty"))
    assert (file.path, file.size, file.read(0, 0)) == (str(tmp_path / "empty"), 0, b"")


def test_what_cannot_be_opened(tmp_path: Path, path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file") as caught:
        SourceFile(tmp_path / "missing")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(FileAccessError, match="is a folder, not a file"):
        SourceFile(tmp_path)
    with pytest.raises(FileAccessError, match="cannot be opened: Not a directory"):
        SourceFile(path / "below")
    with pytest.raises(FileAccessError, match="cannot be opened: embedded null"):
        SourceFile("a\0b")
    with pytest.raises(TypeError):
        SourceFile(None)  # type: ignore[arg-type]
    gc.collect()  # what was never opened is not closed either: an error in __del__ would fail this test


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes and sockets are POSIX")
def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileAccessError, match="is not a regular file"):
        SourceFile(tmp_path / "pipe")
    with pytest.raises(FileAccessError, match="is not a regular file"):
        SourceFile("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(FileAccessError, match="cannot be opened"):
            SourceFile(tmp_path / "s")


def test_no_permission(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # tests may run as root, whom nothing denies
    with pytest.raises(FileAccessError, match=r"data\.bin: cannot be opened: Permission denied"):
        SourceFile(path)


def test_links_are_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    assert SourceFile(tmp_path / "link").read(0, 4) == DATA[:4]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingFileError):
        SourceFile(tmp_path / "dangling")


def test_after_closing(path: Path) -> None:
    file = SourceFile(path)
    file.close()
    file.close()
    for use in (lambda: file.fd, lambda: file.read(0, 1), file.changed):
        with pytest.raises(FileAccessError, match="was closed; open it again"):
            use()
    assert file.read(0, 0) == b""


def test_no_descriptor_is_left_open(path: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(50):
        SourceFile(path).read(0, 1)
        with pytest.raises(FileAccessError):
            SourceFile(tmp_path)
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_that_becomes_shorter(path: Path) -> None:
    file = SourceFile(path)
    os.truncate(path, 100)
    with pytest.raises(CorruptError, match=r"became shorter while it was read: byte 100"):
        file.read(0, 1024)
    assert file.changed()


def test_a_file_that_is_written_to(path: Path) -> None:
    file = SourceFile(path)
    with path.open("r+b") as other:
        other.write(b"x")
    os.utime(path, ns=(0, 0))
    assert file.changed()


def test_a_file_that_is_replaced_is_still_the_one_opened(path: Path, tmp_path: Path) -> None:
    file = SourceFile(path)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(path)
    assert file.read(0, 1024) == DATA
    assert not file.changed()


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: pread(fd, min(nbytes, 7), offset))
    assert SourceFile(path).read(5, 1000) == DATA[5:1005]


def test_errors_of_the_system_name_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    file = SourceFile(path)
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(FileAccessError, match=r"data\.bin: cannot be read: Input/output error"):
        file.read(0, 1)


@pytest.mark.parametrize("positioned", [True, False])
def test_several_threads(path: Path, monkeypatch: pytest.MonkeyPatch, positioned: bool) -> None:
    if not positioned:
        monkeypatch.delattr(os, "pread")  # as on Windows
    file = SourceFile(path)
    barrier = threading.Barrier(8)

    def read(seed: int) -> bool:
        barrier.wait()
        return all(file.read(at, 16) == DATA[at : at + 16] for at in range(seed, 1000, 3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


# Ranges.


def test_a_range_reads_its_own_bytes(path: Path) -> None:
    part = ByteRange(SourceFile(path), 100, 50)
    assert part.read() == DATA[100:150]
    assert part.read(10) == DATA[110:150]
    assert part.read(10, 5) == DATA[110:115]
    assert part.read(50) == part.read(50, 0) == b""
    assert part.part(10, 20).read() == DATA[110:130]
    assert part.part(10, 20).part(5, 1) == ByteRange(part.file, 115, 1)


@pytest.mark.parametrize(("start", "nbytes"), [(-1, 1), (0, 51), (50, 1), (51, 0), (0, -1), (10, 41)])
def test_a_range_gives_nothing_outside(path: Path, start: int, nbytes: int) -> None:
    part = ByteRange(SourceFile(path), 100, 50)
    with pytest.raises(CorruptError, match="range of 50 bytes"):
        part.read(start, nbytes)
    with pytest.raises(CorruptError, match="range of 50 bytes"):
        part.part(start, nbytes)


def test_a_start_behind_the_range(path: Path) -> None:
    with pytest.raises(CorruptError, match="range of 50 bytes"):
        ByteRange(SourceFile(path), 100, 50).read(51)


def test_chunks(path: Path) -> None:
    part = ByteRange(SourceFile(path), 1, 1000)
    for size in (1, 7, 999, 1000, 1001):
        chunks = list(part.chunks(size))
        assert b"".join(chunks) == DATA[1:1001]
        assert all(len(chunk) == size for chunk in chunks[:-1])
        assert 0 < len(chunks[-1]) <= size
    assert list(part.part(0, 0).chunks()) == []
    assert [len(c) for c in part.chunks()] == [1000]
    assert CHUNK_NBYTES % 16 == 0  # a chunk never cuts an element
