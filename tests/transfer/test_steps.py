"""Plans are carried out exactly."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import DATA, bits, executed, plan_of, posix_only, some_plan, some_result, unavailable

from ckptkit import formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.casting import caster
from ckptkit.checkpoint import TensorEntry
from ckptkit.computed import ConvertedRange, DTypeConversion
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError
from ckptkit.plan import Cast, Checksum, Copy, Digest, Gather, LiteralBytes
from ckptkit.rewrite import CastDtype
from ckptkit.transfer import steps, values, workers
from ckptkit.transfer.passing import DigestsInPassing
from ckptkit.transfer.steps import Copier

Entry = Callable[[torch.Tensor], TensorEntry]


def test_gathers_and_empty_steps(entry: Entry, source: SourceFile, out: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    empty = entry(torch.ones(0, 3))
    moved: list[int] = []
    plan = plan_of(
        LiteralBytes(0, b"ab"), Gather(2, entry(tensor)), Gather(50, empty), Copy(50, ByteRange(source, 5, 0))
    )
    executed(out, plan, moved.append)
    assert out.read_bytes() == b"ab" + bits(tensor)
    assert sum(moved) == 50
    executed(out, plan_of())
    assert out.read_bytes() == b""


def test_where_there_are_no_positioned_calls(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pread", "pwrite", "copy_file_range", "splice", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)  # as on Windows
    executed(out, some_plan(source))
    assert out.read_bytes() == some_result()


def test_checksums_of_one_extent_are_computed_once(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, int]] = []
    real = steps._crc32
    monkeypatch.setattr(steps, "_crc32", lambda fd, at, n: computed.append((at, n)) or real(fd, at, n))
    monkeypatch.setattr(steps, "_CACHED_NBYTES", 1000)
    copy = Copy(8, ByteRange(source, 0, 5000))
    executed(out, plan_of(LiteralBytes(0, bytes(8)), copy, Checksum(0, 8, 5000), Checksum(4, 8, 5000)))
    assert computed == [(8, 5000)]
    assert out.read_bytes()[:8] == zlib.crc32(DATA[:5000]).to_bytes(4, "little") * 2


def test_steps_are_written_at_the_planned_places(source: SourceFile, out: Path) -> None:
    executed(out, plan_of(LiteralBytes(3, b"abc"), Copy(10, ByteRange(source, 0, 5))))
    assert out.read_bytes() == bytes(3) + b"abc" + bytes(4) + DATA[:5]


# Casts.


def conversion(source: ByteRange, before: str, after: str) -> DTypeConversion:
    widths = DTYPES[before].itemsize, DTYPES[after].itemsize
    return DTypeConversion(source, *widths, caster(before, after), "tensor 'w'", before)


def all_of(conversion: DTypeConversion) -> ConvertedRange:
    return ConvertedRange(conversion, 0, conversion.nbytes)


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("piece", [8, 1000, 4096, 1 << 20])
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("float16", "float64"), ("float64", "float16")])
def test_casts_in_pieces_are_one_cast(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, piece: int, threads: bool
) -> None:
    monkeypatch.setattr(steps, "CONVERTED_NBYTES", piece)
    monkeypatch.setattr(workers, "MANY_NBYTES", 0 if threads else 1 << 60)
    first = conversion(ByteRange(source, 16, 4000 if piece == 8 else 80_000), before, after)
    second = conversion(ByteRange(source, 100_000, 808), before, after)
    end = 3 + first.nbytes
    moved: list[int] = []
    tally = executed(
        out, plan_of(LiteralBytes(0, b"abc"), Cast(3, all_of(first)), Cast(end, all_of(second))), moved.append
    )
    expected = [each.function(each.original.read()) for each in (first, second)]
    assert out.read_bytes() == b"abc" + b"".join(expected)
    assert sum(moved) == out.stat().st_size
    # What was lost is counted in pieces, too, and by tensor.
    assert dict(tally) == {
        each: caster(before, after).losses(each.original.read(), cast)
        for each, cast in zip((first, second), expected, strict=True)
    }


def test_a_part_of_what_is_converted(source: SourceFile, out: Path) -> None:
    whole = conversion(ByteRange(source, 0, 4000), "float32", "float16")
    executed(out, plan_of(Cast(0, ConvertedRange(whole, 20, 60)), Cast(60, ConvertedRange(whole, 0, 0))))
    assert out.read_bytes() == whole.function(DATA[40:160])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float8_e4m3fn", "float8_e5m2fnuz"])
@pytest.mark.parametrize("chunk_nbytes", [None, 16, 64])
def test_gathers_of_casts_are_casts_of_gathers(
    save: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, chunk_nbytes: int | None
) -> None:
    if chunk_nbytes is not None:
        monkeypatch.setattr(values, "CHUNK_NBYTES", chunk_nbytes)
    torch.manual_seed(0)
    base = torch.randn(12, 10) * 100  # past 448 releases of torch cast to float8_e4m3fn differently
    views = {
        "t": base.t(), "columns": base[:, 2:5], "steps": base[::3, ::2], "row": base[4],
        "wide": base[:1].expand(3, 10), "negative": torch._neg_view(base.t()),
    }  # fmt: skip
    checkpoint, file = formats.read(save(views))
    with closing(file):
        cast = CastDtype(dtype)(checkpoint)
        for name, view in views.items():
            entry = cast.state_dict[name]
            tally = executed(out, plan_of(Gather(0, entry)))
            assert out.read_bytes() == bits(view.to(getattr(torch, dtype)))
            ((converted, losses),) = tally
            assert converted is entry.storage.source.whole
            assert losses.values == view.numel()


# Digests and checksums.


def hexadecimal(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def test_digests_are_those_of_the_files(source: SourceFile, out: Path, tmp_path: Path) -> None:
    contents = [b"", b"x", os.urandom(3 << 20), *(os.urandom(100) for _ in range(40))]
    files = []
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
        files.append(SourceFile(tmp_path / str(number)))
    wanted = [*files, source, files[1]]  # one file twice
    places = [Digest(4 + 64 * number, file) for number, file in enumerate(wanted)]
    executed(out, plan_of(LiteralBytes(0, bytes(4 + 64 * len(wanted))), *places, Checksum(0, 4, 64 * len(wanted))))
    expected = b"".join(map(hexadecimal, [*contents, DATA, contents[1]]))
    assert out.read_bytes() == zlib.crc32(expected).to_bytes(4, "little") + expected
    for file in files:
        file.close()


@pytest.mark.parametrize("change", ["cut", "written to"])
def test_a_hashed_file_that_changes_meanwhile(source: SourceFile, out: Path, change: str) -> None:
    def touch(_: int) -> None:
        with open(source.path, "r+b") as file:
            file.write(b"y")
        os.utime(source.path, ns=(1, 1))

    if change == "cut":
        os.truncate(source.path, 1000)
    with pytest.raises(CorruptError, match="became shorter" if change == "cut" else "was changed while") as caught:
        executed(out, plan_of(LiteralBytes(0, bytes(64)), Digest(0, source)), touch)
    assert caught.value.path == source.path


def test_a_digest_that_is_no_longer_wanted(source: SourceFile) -> None:
    stop = threading.Event()
    stop.set()
    digests = DigestsInPassing([source], stop)
    digests.join()
    assert digests._found == {}


def test_what_depends_on_digests_is_left_for_later(source: SourceFile, out: Path) -> None:
    plan = plan_of(
        LiteralBytes(0, bytes(8)), Copy(8, ByteRange(source, 0, 1000)), LiteralBytes(1008, bytes(64)),
        Digest(1008, source), Checksum(0, 8, 1000), Checksum(4, 1008, 64),
    )  # fmt: skip
    over_copy = zlib.crc32(DATA[:1000]).to_bytes(4, "little")
    over_literal = zlib.crc32(hexadecimal(DATA)).to_bytes(4, "little")
    for wanted in (True, False):
        fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            steps.reserve(fd, plan.nbytes)
            steps.move(plan, fd, steps.Tally())
            steps.fill_file(plan, fd, checksums=wanted)
            first = over_copy if wanted else bytes(4)
            assert out.read_bytes() == first + bytes(4) + DATA[:1000] + bytes(64)
            steps.fill_file(plan, fd, DigestsInPassing([source], threading.Event()), checksums=False)
            assert out.read_bytes() == first + over_literal + DATA[:1000] + hexadecimal(DATA)
        finally:
            os.close(fd)


# Ranges are copied exactly, by every way the system offers.

pytestmark = posix_only

WAYS = ["splice", "copy_file_range", "read_write"]


def one_byte_at_a_time(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "copy_file_range":
        real_range = os.copy_file_range
        monkeypatch.setattr(os, way, lambda a, b, n, at, to: real_range(a, b, min(n, 1), at, to))
    elif way == "splice":
        real_splice = os.splice
        monkeypatch.setattr(os, way, lambda a, b, n, **places: real_splice(a, b, min(n, 1), **places))
    else:
        real_write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:1], at))


def counted(name: str, calls: dict[str, int]) -> Callable[..., int]:
    real = getattr(os, name)

    def call(*given: Any, **more: Any) -> int:
        calls[name] = calls.get(name, 0) + 1
        return real(*given, **more)

    return call


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reason", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("short", [False, True])
def test_every_way_of_copying(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, way: str, reason: int, short: bool
) -> None:
    calls: dict[str, int] = {}
    monkeypatch.setattr(steps, "_PIECE_NBYTES", 1024 if short else steps._PIECE_NBYTES)
    monkeypatch.setattr(steps, "SMALL_NBYTES", 1024)
    for name in ("splice", "copy_file_range"):
        monkeypatch.setattr(os, name, counted(name, calls))
    if short:
        one_byte_at_a_time(monkeypatch, way)
    for name in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(os, name, unavailable(reason))
    nbytes = 3000 if short else 150_001
    moved: list[int] = []
    executed(out, plan_of(LiteralBytes(0, b"x"), Copy(1, ByteRange(source, 7, nbytes))), moved.append)
    assert out.read_bytes() == b"x" + DATA[7 : 7 + nbytes]
    assert sum(moved) == nbytes + 1
    assert set(calls) == {way} - {"read_write"}
    if short:
        assert calls.get(way) == {"splice": 2 * nbytes, "copy_file_range": nbytes, "read_write": None}[way]


@pytest.mark.parametrize("offset", [0, 1, 192, 4096, 65_535])
@pytest.mark.parametrize("target", [0, 1, 8, 4096, 65_535, 70_000])
def test_pieces_end_on_the_grid_of_the_output(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, offset: int, target: int
) -> None:
    written: list[tuple[int, int]] = []
    real = os.splice

    def splice(src: int, dst: int, count: int, **places: int) -> int:
        moved = real(src, dst, count, **places)
        if "offset_dst" in places:
            written.append((places["offset_dst"], moved))
        return moved

    monkeypatch.setattr(os, "splice", splice)
    nbytes = 131_073
    executed(out, plan_of(Copy(target, ByteRange(source, offset, nbytes))))
    assert out.read_bytes() == bytes(target) + DATA[offset : offset + nbytes]
    ends = [place + moved for place, moved in written]
    assert [place for place, _ in written] == [target, *ends[:-1]]
    assert all(end % (64 << 10) == 0 for end in ends[:-1])
    assert ends[-1] == target + nbytes


def test_a_pipe_no_larger_than_usual(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above what a user may have in pipes, a piece goes in two parts."""
    import fcntl

    monkeypatch.setattr(fcntl, "fcntl", unavailable(errno.EPERM))
    executed(out, some_plan(source))
    assert out.read_bytes() == some_result()


def test_short_ranges_are_one_call(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}
    for name in ("splice", "copy_file_range"):
        monkeypatch.setattr(os, name, counted(name, calls))
    nbytes = steps.SMALL_NBYTES
    copies = [Copy(nbytes * number, ByteRange(source, 3 + 1000 * number, nbytes)) for number in range(50)]
    executed(out, plan_of(*copies))
    assert out.read_bytes() == b"".join(DATA[3 + 1000 * number :][:nbytes] for number in range(50))
    assert calls == {"copy_file_range": 50}


def test_small_ranges_are_read_and_written_with_their_neighbours(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}
    for name in ("splice", "copy_file_range", "pread", "pwrite"):
        monkeypatch.setattr(os, name, counted(name, calls))
    ranges = [(3 + 250 * number, 100) for number in range(700)]
    ranges += [(offset, 100) for offset, _ in reversed(ranges)]  # and against the order of the file
    moved: list[int] = []
    plan = plan_of(LiteralBytes(0, b"head"), *(Copy(4 + 100 * i, ByteRange(source, *r)) for i, r in enumerate(ranges)))
    executed(out, plan, moved.append)
    assert out.read_bytes() == b"head" + b"".join(DATA[offset : offset + nbytes] for offset, nbytes in ranges)
    assert sum(moved) == plan.nbytes
    assert calls["pwrite"] == 1
    assert calls["pread"] < 20 + 700
    assert calls.keys() == {"pread", "pwrite"}


def test_what_lies_in_a_row_is_one_copy(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}
    for name in ("splice", "copy_file_range", "pread"):
        monkeypatch.setattr(os, name, counted(name, calls))
    sizes = [100, 0, 40_000, 7, 9_000]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    copies = [Copy(at, ByteRange(source, 11 + at, nbytes)) for at, nbytes in zip(starts, sizes, strict=True)]
    executed(out, plan_of(*copies, Copy(sum(sizes), ByteRange(source, 0, 20_000))))
    assert out.read_bytes() == DATA[11 : 11 + sum(sizes)] + DATA[:20_000]
    assert calls == {"copy_file_range": 2}


class Clock:
    """A time that passes only while bytes are copied: so many seconds a byte, by way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **pace: float) -> None:
        self.now = 0.0
        self.pace = pace
        self.moved = dict.fromkeys(pace, 0)
        self.first: dict[str, int] = {}
        for name in pace:
            monkeypatch.setattr(os, name, self.timed(name))
        monkeypatch.setattr(steps, "time", self)
        for name, value in (("_PIECE_NBYTES", 1024), ("_ONE_CALL", 1024), ("_MEASURED_NBYTES", 1024)):
            monkeypatch.setattr(steps, name, value)

    def perf_counter(self) -> float:
        return self.now

    def timed(self, name: str) -> Callable[..., int]:
        real = getattr(os, name)

        def call(*given: Any, **places: Any) -> int:
            moved: int = real(*given, **places)
            if "offset_src" not in places:  # into a pipe is half the way
                self.now += moved * self.pace[name]
                self.moved[name] += moved
            return moved

        return call


@pytest.mark.parametrize(("splice", "copy_file_range"), [(1, 2), (2, 1), (1, 50), (50, 1)])
def test_the_faster_way_is_found_out(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, splice: int, copy_file_range: int
) -> None:
    clock = Clock(monkeypatch, splice=splice, copy_file_range=copy_file_range)
    executed(out, plan_of(Copy(0, ByteRange(source, 7, 190_000))))
    assert out.read_bytes() == DATA[7:190_007]
    faster, slower = sorted(clock.moved, key=clock.pace.__getitem__)
    assert 0 < clock.moved[slower] < 0.05 * clock.moved[faster]


def test_one_slow_call_changes_nothing(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, splice=1, copy_file_range=2)
    steps = [Copy(at, ByteRange(source, 7 + at, 1024)) for at in range(0, 1024 * 180, 1024)]

    def wait(_: int) -> None:
        clock.pace["splice"] = 50 if sum(clock.moved.values()) // 1024 % 20 == 10 else 1

    executed(out, plan_of(*steps), wait)
    assert out.read_bytes() == DATA[7 : 7 + 1024 * 180]
    assert 0 < clock.moved["copy_file_range"] < 0.1 * clock.moved["splice"]


def test_a_way_that_was_slow_is_tried_again(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, splice=1, copy_file_range=1.3)
    steps = [Copy(at, ByteRange(source, 7 + at, 1024)) for at in range(0, 1024 * 180, 1024)]

    def turn(_: int) -> None:
        if sum(clock.moved.values()) == 1024 * 90:
            clock.pace = {"splice": 1.3, "copy_file_range": 1}
            clock.first = dict(clock.moved)

    executed(out, plan_of(*steps), turn)
    assert out.read_bytes() == DATA[7 : 7 + 1024 * 180]
    assert clock.first["splice"] > 0.8 * 1024 * 90
    assert clock.moved["copy_file_range"] - clock.first["copy_file_range"] > 0.6 * 1024 * 90


def test_a_pipe_is_closed(source: SourceFile, out: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with out.open("wb") as file, closing(Copier(file.fileno(), lambda _: None)) as each:
        each.copy(ByteRange(source, 0, 150_000), 0)
        assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_way_that_copies_nothing_is_given_up(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("splice", "copy_file_range"):
        monkeypatch.setattr(os, name, lambda *_, **__: 0)  # as some file systems do
    executed(out, some_plan(source))
    assert out.read_bytes() == some_result()


def test_a_pipe_that_is_never_emptied(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.splice
    monkeypatch.setattr(os, "splice", lambda *given, **places: 0 if "offset_dst" in places else real(*given, **places))
    executed(out, some_plan(source))
    assert out.read_bytes() == some_result()


@pytest.mark.parametrize("way", ["splice", "copy_file_range"])
def test_a_way_that_fails_half_way_is_replaced(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    real = getattr(os, way)
    calls = iter([5, 5, 7, 7])

    def failing(a: int, b: int, n: int, *given: int, **places: int) -> int:
        for count in calls:
            return real(a, b, count, *given, **places)
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    for name in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(os, name, unavailable(errno.ENOSYS))
    monkeypatch.setattr(os, way, failing)
    executed(out, some_plan(source))
    assert out.read_bytes() == some_result()


@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_is_cut_meanwhile(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    for name in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(os, name, unavailable(errno.EXDEV))
    os.truncate(source.path, 100_000)
    with pytest.raises(CorruptError, match="the file became shorter while it was") as caught:
        executed(out, some_plan(source))
    assert caught.value.path == source.path
