"""Reads by position: bounded, and every failure says which file."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import socket
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, SourceFile
from ckptkit.computed import DeflatedRange, Inflation
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError

DATA = bytes(range(256)) * 4
YOUNG = 1
"""The generation of the collector that has what a test has just made; all that the run has made takes seconds."""


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
    with pytest.raises(CorruptError, match="were requested from a file of 1,024 bytes") as caught:
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
    gc.collect(YOUNG)  # what was never opened is not closed either: an error in __del__ would fail this test


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
    for use in (file.fileno, lambda: file.read(0, 1), file.changed):
        with pytest.raises(FileAccessError, match="was closed; open it again"):
            use()
    assert file.read(0, 0) == b""


def test_no_descriptor_is_left_open(path: Path, tmp_path: Path) -> None:
    def opened() -> int:
        count = 0
        for number in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):  # of the listing itself
                count += any(os.path.samestat(os.fstat(number), each.stat()) for each in (path, tmp_path))
        return count

    kept = SourceFile(path)
    assert opened() == 1
    for _ in range(50):
        SourceFile(path).read(0, 1)
        with pytest.raises(FileAccessError):
            SourceFile(tmp_path)
    gc.collect(YOUNG)
    assert opened() == 1
    kept.close()


def test_a_file_that_becomes_shorter(path: Path) -> None:
    file = SourceFile(path)
    os.truncate(path, 100)
    with pytest.raises(CorruptError, match=r"became shorter while it was being read: byte 100"):
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


# Deflated ranges.


def squeezed(
    tmp_path: Path, data: bytes, *, before: bytes = b"", behind: bytes = b"", **changes: object
) -> DeflatedRange:
    """A range of a file that inflates to the bytes, and says so unless it is told otherwise."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflater.compress(data) + deflater.flush()
    (tmp_path / "packed").write_bytes(before + packed + behind)
    at = ByteRange(SourceFile(tmp_path / "packed"), len(before), len(packed))
    declared: dict[str, Any] = {"deflated": at, "nbytes": len(data), "crc32": zlib.crc32(data)} | changes
    whole = Inflation(**declared, name="record 'x'")
    return DeflatedRange(whole, 0, whole.nbytes)


@pytest.mark.parametrize("nbytes", [0, 1, 1024, CHUNK_NBYTES - 1, CHUNK_NBYTES, CHUNK_NBYTES + 1, 3 * CHUNK_NBYTES + 7])
def test_a_deflated_range_reads_like_a_plain_one(nbytes: int, tmp_path: Path) -> None:
    data = (DATA * (nbytes // len(DATA) + 1))[:nbytes]
    source = squeezed(tmp_path, data, before=b"before", behind=b"behind")
    assert source.read() == data
    assert b"".join(source.chunks(1 << 20)) == data
    assert source.plain().read() == data
    assert source.plain() == source.plain()
    if nbytes > 100:
        part = source.part(50, 40).part(10, 20)
        assert (part.read(), part.read(5, 3), part.nbytes) == (data[60:80], data[65:68], 20)
        assert part.plain().read() == data[60:80]
    assert source.file.path == str(tmp_path / "packed")


def test_nothing_is_inflated_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: made.append(options) or real(**options))
    source = squeezed(tmp_path, DATA)
    parts = [source.part(at, 10) for at in range(0, 100, 10)]
    assert not made
    with ThreadPoolExecutor(4) as pool:
        assert b"".join(pool.map(DeflatedRange.read, parts)) == DATA[:100]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nbytes": 1023}, "does not inflate to the 1,023 bytes it declares"),
        ({"nbytes": 1025}, "does not inflate to the 1,025 bytes"),
        ({"nbytes": 0}, "does not inflate to the 0 bytes"),
        ({"crc32": 1}, "its CRC-32 is [0-9a-f]{8}, but the archive records 00000001: damaged"),
    ],
)
def test_what_it_inflates_to_must_be_what_is_declared(changes: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=f"record 'x': {words}") as caught:
        squeezed(tmp_path, DATA, **changes).read(0, 0)
    assert caught.value.path == str(tmp_path / "packed")


def test_a_checksum_that_is_not_recorded(tmp_path: Path) -> None:
    assert squeezed(tmp_path, DATA, crc32=None).read() == DATA


def test_truncated_or_followed_by_something(tmp_path: Path) -> None:
    whole = squeezed(tmp_path, DATA, behind=b"more").whole.deflated
    for nbytes in [*range(whole.nbytes), whole.nbytes + 2]:
        part = Inflation(ByteRange(whole.file, 0, nbytes), len(DATA), None, "x")
        with pytest.raises(CorruptError, match="does not inflate to"):
            part.plain()


def test_bytes_that_are_no_deflate(path: Path) -> None:
    with pytest.raises(CorruptError, match="x: cannot be inflated: Error -3"):
        Inflation(ByteRange(SourceFile(path), 255, 100), 100, None, "x").plain()


def test_a_bomb_stops_at_what_it_declares(tmp_path: Path) -> None:
    source = squeezed(tmp_path, bytes(50 << 20), nbytes=10)
    sizes = [len(part) for part in _parts_until_error(source)]
    assert sum(sizes) <= CHUNK_NBYTES


def _parts_until_error(source: DeflatedRange) -> list[bytes]:
    parts: list[bytes] = []
    with pytest.raises(CorruptError, match="does not inflate"):
        parts.extend(source.whole._parts())
    return parts


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(FileAccessError, match=r"takes 1,024 bytes in the temporary folder: No space left.*set TMPDIR"):
        squeezed(tmp_path, DATA).read()


def test_it_is_closed_with_the_file_it_came_from(tmp_path: Path) -> None:
    source = squeezed(tmp_path, DATA)
    inflated = source.plain()
    source.file.close()
    for closed in (inflated, source):
        with pytest.raises(FileAccessError, match="the checkpoint was closed"):
            closed.read(0, 1)
    with pytest.raises(FileAccessError, match="the checkpoint was closed"):
        squeezed_and_closed(tmp_path).read()


def squeezed_and_closed(tmp_path: Path) -> DeflatedRange:
    source = squeezed(tmp_path, DATA)
    source.file.close()
    return source


@pytest.mark.parametrize(("start", "nbytes"), [(-1, 1), (0, 1025), (1024, 1), (0, -1)])
def test_a_deflated_range_gives_nothing_outside(start: int, nbytes: int, tmp_path: Path) -> None:
    source = squeezed(tmp_path, DATA)
    with pytest.raises(CorruptError, match="range of 1,024 bytes"):
        source.part(start, nbytes)
    with pytest.raises(CorruptError, match="range of 1,024 bytes"):
        source.read(start, nbytes)


def test_what_would_fill_the_disk_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deflated"
    path.write_bytes(zlib.compress(bytes(1024), wbits=-15))
    source = SourceFile(path)
    inflation = Inflation(ByteRange(source, 0, source.size), 1024, None, "x")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1023})())
    with pytest.raises(
        FileAccessError, match=r"takes 1,024 bytes in the temporary folder, which has 1,023; set TMPDIR"
    ):
        inflation.plain()
    monkeypatch.undo()
    assert inflation.plain().read() == bytes(1024)


# The spool.


def inflations(path: Path, contents: list[bytes]) -> list[Inflation]:
    """One file that holds all of these, each compressed."""
    packed = [zlib.compress(content, wbits=-15) for content in contents]
    path.write_bytes(b"".join(packed))
    source = SourceFile(path)
    made, at = [], 0
    for number, (content, part) in enumerate(zip(contents, packed, strict=True)):
        made.append(Inflation(ByteRange(source, at, len(part)), len(content), zlib.crc32(content), str(number)))
        at += len(part)
    return made


def test_threads_share_one_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: made.append(options) or real(**options))
    contents = [bytes([number % 256]) * (number * 37 % 20_000) for number in range(400)]
    all_of_it = inflations(tmp_path / "packed", contents)
    with ThreadPoolExecutor(8) as pool:
        ranges = list(pool.map(Inflation.plain, all_of_it))
    assert len(made) == 1
    assert len({id(each.file) for each in ranges}) == 1
    assert [each.read() for each in ranges] == contents


def test_one_that_inflates_to_too_much_does_not_reach_the_next(tmp_path: Path) -> None:
    contents = [b"a" * 5000, b"b" * 5000, b"c" * 50_000, b"d" * 5000]
    first, second, third, fourth = inflations(tmp_path / "packed", contents)
    third.nbytes = 10
    kept = first.plain(), second.plain()
    with pytest.raises(CorruptError, match="does not inflate to the 10 bytes"):
        third.plain()
    assert [each.read() for each in (*kept, fourth.plain())] == [contents[0], contents[1], contents[3]]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of descriptors")
def test_more_compressed_records_than_descriptors(tmp_path: Path, python: Callable[..., Any]) -> None:
    import zipfile

    import torch

    torch.manual_seed(0)
    state = {f"layer{number}.weight": torch.randn(3, 7) for number in range(200)}
    torch.save(state, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in plain.namelist():
            deflated.writestr(name, plain.read(name))
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import ckptkit, torch
state = torch.load("plain.pth")
assert ckptkit.convert("deflated.pth", "out.safetensors").ok
assert ckptkit.convert("deflated.pth", "half.safetensors", dtype="float16").ok
assert ckptkit.diff("deflated.pth", "out.safetensors").equal
assert ckptkit.diff("deflated.pth", "deflated.pth").equal
loaded = ckptkit.load_state_dict("deflated.pth")
assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


# Its end.


def test_no_copy_shares_the_descriptor(path: Path) -> None:
    file = SourceFile(path)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"an open file cannot be copied or pickled; open it again"):
            attempt(file)
    gc.collect(YOUNG)
    assert file.read(0, 10) == DATA[:10]


@pytest.mark.filterwarnings("error")
def test_one_that_was_never_whole_goes_without_a_word(path: Path) -> None:
    half = SourceFile.__new__(SourceFile)
    del half
    closed = SourceFile(path)
    os.close(closed.fileno())  # by somebody else
    del closed
    gc.collect(YOUNG)  # an error in __del__ would fail this test
    with pytest.raises(OSError, match="Bad file descriptor"):
        SourceFile.of_descriptor(999_999, "x")
    gc.collect(YOUNG)
