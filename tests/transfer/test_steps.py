"""Plans are carried out exactly."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from support.plans import DATA, bits, executed, plan_of, some_plan, some_result

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
    monkeypatch.setattr(steps, "_CONVERTED_NBYTES", piece)
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
    digests = steps.DigestsInPassing([source], stop)
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
            steps.fill_file(plan, fd, steps.DigestsInPassing([source], threading.Event()), checksums=False)
            assert out.read_bytes() == first + over_literal + DATA[:1000] + hexadecimal(DATA)
        finally:
            os.close(fd)
