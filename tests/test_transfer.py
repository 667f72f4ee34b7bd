"""Bytes arrive exactly, by every way; and the destination is the old file or the complete new one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from ckptkit import formats, transfer
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Storage, TensorEntry, contiguous_stride
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, DestinationExistsError, DTypeError, FileAccessError
from ckptkit.plan import Checksum, Copy, Gather, Literal, Plan, Step
from ckptkit.transfer import execute, stream, write_atomically

Save = Callable[..., Path]
Entry = Callable[[torch.Tensor], TensorEntry]

posix_only = pytest.mark.skipif(sys.platform != "linux", reason="in-kernel copies, umask and links as on Linux")


def values_of(entry: TensorEntry) -> bytes:
    chunks = list(stream(entry))
    assert all(chunks)
    return b"".join(chunks)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's values in C order, as torch computes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # complex32 is "experimental"
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


@pytest.fixture
def entry(save: Save) -> Iterator[Entry]:
    """The entry of a tensor, after torch has saved it."""
    files: list[SourceFile] = []

    def make(tensor: torch.Tensor) -> TensorEntry:
        checkpoint, file = formats.read(save(tensor, f"{len(files)}.pth"))
        files.append(file)
        assert isinstance(checkpoint.rest, TensorEntry)
        return checkpoint.rest

    yield make
    for file in files:
        file.close()


# Values.

BASE = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: t,
    "0-d": lambda t: t[2, 3, 4],
    "zero-size": lambda t: t[:, 2:2],
    "zero-size transposed": lambda t: t[:0].transpose(0, 2),
    "offset": lambda t: t[1:3],
    "one row": lambda t: t[3, 4],
    "columns": lambda t: t[:, :3],
    "steps": lambda t: t[::2, ::3, ::2],
    "inner step": lambda t: t[..., 1::5],
    "transposed": lambda t: t.permute(2, 0, 1),
    "expanded": lambda t: t[1:2, :, :1].expand(3, 5, 7),
    "expanded 0-d": lambda t: t[0, 0, 5].expand(4, 4),
    "overlapping": lambda t: t.as_strided((4, 3, 2), (5, 1, 1), 7),
    "windows": lambda t: t.reshape(-1).unfold(0, 30, 10),
    "diagonal": lambda t: t.diagonal(0, 0, 1),
    "channels last": lambda t: t.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "size 1": lambda t: t[1:2].transpose(0, 1)[:, :, ::2],
}


@pytest.mark.parametrize("chunk_nbytes", [None, 64, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(entry: Entry, monkeypatch: pytest.MonkeyPatch, layout: str, chunk_nbytes: int | None) -> None:
    if chunk_nbytes is not None:  # tensors of several chunks, views far wider than one, mapped windows
        monkeypatch.setattr(transfer, "CHUNK_NBYTES", chunk_nbytes)
    tensor = LAYOUTS[layout](BASE)
    source = entry(tensor)
    assert values_of(source) == bits(tensor)
    if chunk_nbytes is not None and not source.is_plain_bytes:
        assert all(len(chunk) <= chunk_nbytes for chunk in stream(source))


def saveable(dtype: str) -> bool:
    return DTYPES[dtype].kind != "quantized" and hasattr(torch, dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if saveable(dtype)])
def test_every_dtype(entry: Entry, dtype: str) -> None:
    width = DTYPES[dtype].itemsize
    # All byte values: NaN with payloads, denormals, bools that are neither 0 nor 1.
    raw = torch.arange(256, dtype=torch.int64).repeat(width).to(torch.uint8)
    flat = raw.view(getattr(torch, dtype))
    for tensor in (flat, flat[3:7], flat.as_strided((16, 4), (1, 16)), flat[::3], flat[5].expand(3)):
        index = torch.arange(flat.numel()).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        expected = raw.reshape(-1, width)[index.reshape(-1)]
        assert values_of(entry(tensor)) == expected.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
def test_conjugates_and_negatives(entry: Entry, dtype: torch.dtype) -> None:
    parts = torch.tensor([[1.0, -2.0], [0.0, -0.0], [float("nan"), float("inf")], [-0.0, float("nan")]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.view_as_complex(parts.to(torch.float64)).to(dtype)
    assert tensor.conj().is_conj()
    for lazy in (tensor.conj(), tensor.conj()[::2], tensor.conj().view(2, 2).t()):
        source = entry(lazy)
        assert source.is_conj
        assert values_of(source) == bits(lazy)
    assert tensor.conj().imag.is_neg()
    for negative in (tensor.conj().imag, tensor.conj().imag[1:]):
        source = entry(negative)
        assert source.is_neg
        assert values_of(source) == bits(negative)
    # Both: the imaginary part is negated twice.  (torch's own copy of it loses signs of zeros in complex128.)
    real, imaginary = torch.view_as_real(tensor).unbind(-1)
    assert values_of(entry(torch._neg_view(tensor.conj()))) == bits(torch.stack([-real, imaginary], -1))


def test_negatives_that_have_no_sign_bit(entry: Entry) -> None:
    for dtype in ("int64", "float8_e4m3fn", "bool"):
        source = entry(torch._neg_view(torch.ones(3).to(getattr(torch, dtype))))
        with pytest.raises(DTypeError, match=f"lazily negated or conjugated tensor of {dtype}"):
            values_of(source)


@pytest.mark.parametrize(
    "dtype", ["float32", "int16", "uint64", "bfloat16", "complex64", "complex128", "uint8", "bool"]
)
def test_big_endian_storages(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (4, 6), dtype=torch.uint8).bool() if dtype == "bool" else torch.randn(4, 6)
    tensor = tensor.to(getattr(torch, dtype)) if "int" not in dtype else torch.arange(24).view(4, 6).to(
        getattr(torch, dtype)
    )  # fmt: skip
    width = DTYPES[dtype].itemsize // (2 if "complex" in dtype else 1)
    swapped = numpy.frombuffer(bits(tensor), dtype=f"u{width}").byteswap().tobytes()
    (tmp_path / "big").write_bytes(swapped)
    with closing(SourceFile(tmp_path / "big")) as file:
        storage = Storage(key="0", dtype=dtype, nbytes=len(swapped), location="cpu",
                          source=ByteRange(file, 0, len(swapped)), byteorder="big")  # fmt: skip
        for view in (tensor, tensor[1:], tensor.t(), tensor[:, ::2]):
            source = TensorEntry(storage=storage, storage_offset=view.storage_offset(), shape=tuple(view.shape),
                                 stride=view.stride(), dtype=dtype)  # fmt: skip
            assert values_of(source) == bits(view)


def test_geometry_only_a_stranger_writes(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(32)))
    with closing(SourceFile(tmp_path / "data")) as file:
        storage = Storage(key="0", dtype="uint8", nbytes=32, location="cpu", source=ByteRange(file, 0, 32))

        def view(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
            made = TensorEntry(storage=storage, storage_offset=offset, shape=shape, stride=stride, dtype="uint8")
            return values_of(made.check())

        # The stride of a dimension of one says nothing, and neither does the offset of an empty tensor.
        assert view((1, 3), (1 << 61, 2)) == bytes([0, 2, 4])
        assert view((3, 1), (2, 1 << 61), 1) == bytes([1, 3, 5])
        assert view((0,), (1,), 1 << 60) == b""
        assert view((0, 3), (1, 7), 99) == b""


def test_what_is_mapped_is_let_go(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_NBYTES", 16)
    before = len(os.listdir("/dev/fd"))
    source = entry(torch.arange(10_000.0).view(100, 100).t())
    assert values_of(source) == bits(torch.arange(10_000.0).view(100, 100).t())
    source.storage.source.file.close()
    assert len(os.listdir("/dev/fd")) == before


def test_a_window_of_a_shortened_file_is_not_touched(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_NBYTES", 16)
    source = entry(torch.arange(10_000.0).view(100, 100).t())
    os.truncate(source.storage.source.file.path, 2000)
    with pytest.raises(CorruptError, match="the file was changed"):
        values_of(source)


# Plans.

DATA = os.urandom(200_000)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceFile]:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "data").write_bytes(DATA)
    with closing(SourceFile(folder / "data")) as file:
        yield file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A destination in a folder of its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "result.bin"


def plan_of(*steps: Step) -> Plan:
    nbytes = max((step.target + step.nbytes for step in steps), default=0)
    return Plan(format="bytes", nbytes=nbytes, steps=steps, tensors=0, aliases={})


def some_plan(source: SourceFile) -> Plan:
    head = b"head" + bytes(4)
    return plan_of(Literal(0, head), Copy(8, ByteRange(source, 1000, 150_001)), Checksum(4, 8, 150_001))


def some_result() -> bytes:
    body = DATA[1000:151_001]
    return b"head" + zlib.crc32(body).to_bytes(4, "little") + body


def write(out: Path, plan: Plan, **more: Any) -> None:
    write_atomically(out, plan, **{"force": False, "check": None, **more})


def only(path: Path) -> list[str]:
    """What is in the destination's folder."""
    return sorted(item.name for item in path.parent.iterdir())


def unavailable(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def one_byte_at_a_time(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "copy_file_range":
        real_range = os.copy_file_range
        monkeypatch.setattr(os, way, lambda a, b, n, at, to: real_range(a, b, min(n, 1), at, to))
    elif way == "sendfile":
        real_send = os.sendfile
        monkeypatch.setattr(os, way, lambda out, a, at, n: real_send(out, a, at, min(n, 1)))
    else:
        real_write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:1], at))


def counted(name: str, calls: dict[str, int]) -> Callable[..., int]:
    real = getattr(os, name)

    def call(*given: Any) -> int:
        calls[name] = calls.get(name, 0) + 1
        return real(*given)

    return call


WAYS = ["copy_file_range", "sendfile", "read_write"]


@posix_only
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reason", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("short", [False, True])
def test_every_way_of_copying(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, way: str, reason: int, short: bool
) -> None:
    calls: dict[str, int] = {}
    for name in ("copy_file_range", "sendfile"):
        monkeypatch.setattr(os, name, counted(name, calls))
    if short:
        one_byte_at_a_time(monkeypatch, way)
    for name in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(os, name, unavailable(reason))
    nbytes = 3000 if short else 150_001
    moved: list[int] = []
    write(out, plan_of(Literal(0, b"x"), Copy(1, ByteRange(source, 7, nbytes))), progress=moved.append)
    assert out.read_bytes() == b"x" + DATA[7 : 7 + nbytes]
    assert sum(moved) == nbytes + 1
    assert set(calls) == {way} - {"read_write"}
    if short and way != "read_write":
        assert calls[way] == nbytes


@posix_only
def test_a_way_that_copies_nothing_is_given_up(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("copy_file_range", "sendfile"):
        monkeypatch.setattr(os, name, lambda *_: 0)  # as some file systems do
    write(out, some_plan(source))
    assert out.read_bytes() == some_result()


@posix_only
def test_a_way_that_fails_half_way_is_replaced(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range
    calls = iter([5, 7])

    def failing(a: int, b: int, n: int, at: int, to: int) -> int:
        for count in calls:
            return real(a, b, count, at, to)
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", failing)
    write(out, some_plan(source))
    assert out.read_bytes() == some_result()


def test_gathers_and_empty_steps(entry: Entry, source: SourceFile, out: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    empty = entry(torch.ones(0, 3))
    moved: list[int] = []
    plan = plan_of(Literal(0, b"ab"), Gather(2, entry(tensor)), Gather(50, empty), Copy(50, ByteRange(source, 5, 0)))
    write(out, plan, progress=moved.append)
    assert out.read_bytes() == b"ab" + bits(tensor)
    assert sum(moved) == 50
    write(out, plan_of(), force=True)
    assert out.read_bytes() == b""


def test_where_there_are_no_positioned_calls(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pread", "pwrite", "copy_file_range", "sendfile", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)  # as on Windows
    write(out, some_plan(source))
    assert out.read_bytes() == some_result()


def test_the_same_plan_gives_the_same_bytes(source: SourceFile, out: Path) -> None:
    write(out, some_plan(source))
    first = out.read_bytes()
    write(out, some_plan(source), force=True)
    assert out.read_bytes() == first == some_result()


def test_checksums_of_one_extent_are_computed_once(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, int]] = []
    real = transfer._crc32
    monkeypatch.setattr(transfer, "_crc32", lambda fd, at, n: computed.append((at, n)) or real(fd, at, n))
    monkeypatch.setattr(transfer, "CHUNK_NBYTES", 1000)
    copy = Copy(8, ByteRange(source, 0, 5000))
    write(out, plan_of(Literal(0, bytes(8)), copy, Checksum(0, 8, 5000), Checksum(4, 8, 5000)))
    assert computed == [(8, 5000)]
    assert out.read_bytes()[:8] == zlib.crc32(DATA[:5000]).to_bytes(4, "little") * 2


def test_an_output_that_is_cut_while_it_is_written(source: SourceFile, out: Path) -> None:
    def cut(_: int) -> None:
        for item in out.parent.iterdir():
            os.truncate(item, 100)

    with pytest.raises(FileAccessError, match=r"result\.bin: cannot be written: the output became shorter"):
        write(out, some_plan(source), progress=cut)
    assert only(out) == []


# Sources that change.


@posix_only
@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_is_cut_meanwhile(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    for name in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(os, name, unavailable(errno.EXDEV))
    os.truncate(source.path, 100_000)
    with pytest.raises(CorruptError, match="the file became shorter while it was") as caught:
        write(out, some_plan(source))
    assert caught.value.path == source.path
    assert only(out) == []


@pytest.mark.parametrize("kind", ["copy", "gather"])
def test_a_source_that_is_written_to_meanwhile(entry: Entry, source: SourceFile, out: Path, kind: str) -> None:
    tensor = entry(torch.arange(12.0).view(3, 4).t())
    file = source if kind == "copy" else tensor.storage.source.file
    step = Copy(0, ByteRange(source, 0, 1000)) if kind == "copy" else Gather(0, tensor)

    def touch(_: int) -> None:
        with open(file.path, "r+b") as other:
            other.write(b"x")
        os.utime(file.path, ns=(1, 1))

    out.write_bytes(b"old")
    with pytest.raises(CorruptError, match="was changed while it was being converted; nothing was written"):
        write(out, plan_of(step), progress=touch, force=True)
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


# Destinations.


def test_an_existing_destination_is_kept_without_force(source: SourceFile, out: Path) -> None:
    out.write_bytes(b"old")
    with pytest.raises(DestinationExistsError, match=r"result\.bin: exists already; --force overwrites it"):
        write(out, some_plan(source))
    assert out.read_bytes() == b"old"
    write(out, some_plan(source), force=True)
    assert out.read_bytes() == some_result()
    assert only(out) == [out.name]


@pytest.mark.parametrize("links", [True, False])
def test_a_destination_that_appears_meanwhile(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", unavailable(errno.EPERM))  # as on FAT
    with pytest.raises(DestinationExistsError):
        write(out, some_plan(source), check=lambda _: out.write_bytes(b"theirs"))
    assert out.read_bytes() == b"theirs"
    assert only(out) == [out.name]


def test_a_file_system_without_links(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", unavailable(errno.EPERM))
    write(out, some_plan(source))
    assert out.read_bytes() == some_result()
    assert only(out) == [out.name]
    assert out.stat().st_nlink == 1


def test_a_folder_that_cannot_be_flushed(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.fsync, []

    def fsync(fd: int) -> None:
        seen.append(fd)
        if len(seen) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write(out, some_plan(source))
    assert len(seen) == 2  # the file, then its folder
    assert out.read_bytes() == some_result()


def test_destinations_that_cannot_be(source: SourceFile, out: Path) -> None:
    plan = some_plan(source)
    with pytest.raises(FileAccessError, match="is a folder; name a file"):
        write(out.parent, plan, force=True)
    with pytest.raises(FileAccessError, match=r"missing/x: cannot be written: No such file or directory"):
        write(out.parent / "missing" / "x", plan)
    with pytest.raises(FileAccessError, match="cannot be written: Not a directory"):
        write(Path(source.path) / "x", plan)
    assert only(out) == []


def test_a_folder_nobody_may_write_to(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def denied(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", denied)  # tests may run as root, whom nothing denies
    with pytest.raises(FileAccessError, match=r"result\.bin: cannot be written: Permission denied"):
        write(out, some_plan(source))


@posix_only
def test_the_longest_names(source: SourceFile, out: Path) -> None:
    for name in ("n" * 255, "ö" * 127, "重" * 85):
        write(out.with_name(name), some_plan(source))
        assert out.with_name(name).read_bytes() == some_result()


@posix_only
def test_a_link_stays_and_its_target_is_replaced(source: SourceFile, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target.bin"
    out.symlink_to(target)
    write(out, some_plan(source))  # dangling: the target is made
    assert out.is_symlink()
    assert target.read_bytes() == some_result()
    target.write_bytes(b"old")
    with pytest.raises(DestinationExistsError):
        write(out, some_plan(source))
    write(out, some_plan(source), force=True)
    assert out.is_symlink()
    assert target.read_bytes() == some_result()
    assert (only(out), only(target)) == ([out.name], [target.name])


@posix_only
def test_a_source_may_be_replaced_by_what_is_made_of_it(source: SourceFile) -> None:
    path = Path(source.path)
    write(path, some_plan(source), force=True)
    assert path.read_bytes() == some_result()
    assert source.read(0, 10) == DATA[:10]  # the old file lives on while it is open
    assert only(path) == [path.name]


@posix_only
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_the_umask_decides_who_may_read(source: SourceFile, out: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(out, some_plan(source))
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == mode


# Failures in the middle.


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate", "fsync"])
def test_a_full_disk(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch, call: str, existing: bool) -> None:
    if existing:
        out.write_bytes(b"old")
    monkeypatch.setattr(os, call, unavailable(errno.ENOSPC))
    with pytest.raises(FileAccessError, match=r"result\.bin: cannot be written: No space left on device"):
        write(out, some_plan(source), force=True)
    assert only(out) == ([out.name] if existing else [])
    assert not existing or out.read_bytes() == b"old"


@posix_only
def test_a_disk_that_fills_up_while_copying(source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", unavailable(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "copy_file_range", unavailable(errno.ENOSPC))
    with pytest.raises(FileAccessError, match="No space left on device"):
        write(out, some_plan(source))
    assert only(out) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, MemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["progress", "check"])
def test_an_interrupt_leaves_the_old_file_alone(
    source: SourceFile, out: Path, failure: type[BaseException], where: str
) -> None:
    out.write_bytes(b"old")

    def interrupt(_: object) -> None:
        assert len(only(out)) == 2  # there is a temporary file now
        raise failure

    with pytest.raises(failure):
        write(out, some_plan(source), force=True, **{where: interrupt})
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


def test_the_check_sees_the_complete_file(source: SourceFile, out: Path) -> None:
    seen: list[bytes] = []

    def check(path: str) -> None:
        assert Path(path).parent == out.parent
        assert not out.exists()
        seen.append(Path(path).read_bytes())

    write(out, some_plan(source), check=check)
    assert seen == [some_result()]


def test_a_failing_check_leaves_the_old_file_alone(source: SourceFile, out: Path) -> None:
    out.write_bytes(b"old")

    def check(_: str) -> None:
        raise CorruptError("it differs")

    with pytest.raises(CorruptError, match="it differs"):
        write(out, some_plan(source), force=True, check=check)
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


def test_a_failing_rename_leaves_the_old_file_alone(
    source: SourceFile, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", unavailable(errno.EIO))
    with pytest.raises(FileAccessError, match="cannot be written: Input/output error"):
        write(out, some_plan(source), force=True)
    assert out.read_bytes() == b"old"
    assert only(out) == [out.name]


@posix_only
def test_kill_leaves_the_old_file_alone(tmp_path: Path, out: Path) -> None:
    out.write_bytes(b"old")
    (tmp_path / "data").write_bytes(DATA)
    program = textwrap.dedent(
        f"""
        import time
        from ckptkit.bytesource import ByteRange, SourceFile
        from ckptkit.plan import Copy, Plan
        from ckptkit.transfer import write_atomically

        source = SourceFile({str(tmp_path / "data")!r})
        steps = tuple(Copy(at, ByteRange(source, at, 1000)) for at in range(0, 200_000, 1000))
        plan = Plan(format="bytes", nbytes=200_000, steps=steps, tensors=0, aliases={{}})
        done = []

        def slow(nbytes):
            done.append(nbytes)
            if len(done) == 100:
                print("half", flush=True)
                time.sleep(60)

        write_atomically({str(out)!r}, plan, force=True, check=None, progress=slow)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    # What was being written has a name of its own that the next run does not stumble over.
    left = [name for name in only(out) if name != out.name]
    assert len(left) == 1
    assert left[0].startswith(".result.bin.")
    assert left[0].endswith(".tmp")
    with closing(SourceFile(tmp_path / "data")) as file:
        write(out, some_plan(file), force=True)
    assert out.read_bytes() == some_result()


def test_interrupted_between_two_copies(source: SourceFile, out: Path) -> None:
    """One kernel copy is bounded, so that an interrupt is heard between two."""
    assert transfer._ONE_CALL <= 64 << 20
    with pytest.raises(KeyboardInterrupt):
        write(out, some_plan(source), progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))


def test_execute_writes_at_the_planned_places(source: SourceFile, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        execute(plan_of(Literal(3, b"abc"), Copy(10, ByteRange(source, 0, 5))), fd)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == bytes(3) + b"abc" + bytes(4) + DATA[:5]


def test_contiguous_entries_are_streamed_in_chunks(tmp_path: Path) -> None:
    nbytes = 9 << 20
    with open(tmp_path / "big", "wb") as file:
        file.truncate(nbytes)
    with closing(SourceFile(tmp_path / "big")) as opened:
        storage = Storage(key="0", dtype="uint8", nbytes=nbytes, location="cpu", source=ByteRange(opened, 0, nbytes))
        shape = (3, 3 << 20)
        whole = TensorEntry(
            storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype="uint8"
        )
        assert [len(chunk) for chunk in stream(whole)] == [4 << 20, 4 << 20, 1 << 20]
