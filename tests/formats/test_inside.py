"""Checkpoints inside other files: compressed ones, members of archives, and which member is meant."""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import shlex
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import zstandard
from safetensors.torch import save as safetensors_save
from torch import nn

import ckptkit
from ckptkit import computed, formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.errors import (
    AmbiguousError,
    CorruptError,
    FileAccessError,
    FormatError,
    LimitError,
    MissingDependencyError,
    MissingFileError,
    UnknownFormatError,
    UnsupportedError,
)
from ckptkit.formats import compression as compressions
from ckptkit.formats import inside
from ckptkit.formats.folder import Surveyor
from ckptkit.formats.inside import member_of
from ckptkit.formats.tar_archive import BLOCK_NBYTES
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.report import split_member
from ckptkit.torch_bridge import loading
from ckptkit.transfer.steps import Copier

WEIGHTS = {"a.weight": torch.randn(300, 200, generator=torch.Generator().manual_seed(1)), "b": torch.ones(5)}


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


MODEL = saved(WEIGHTS)

FEW = {name: value[:40].clone() for name, value in WEIGHTS.items()}
SMALL = saved(FEW)

CONTENTS = {
    "zip": MODEL,
    "legacy": saved(WEIGHTS, _use_new_zipfile_serialization=False),
    "safetensors": safetensors_save(WEIGHTS),
}

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.compress,
}

every_compression = pytest.mark.parametrize("compression", COMPRESS)


def same(path: object, weights: dict[str, torch.Tensor] = WEIGHTS) -> None:
    """What is read there are the weights, bit for bit."""
    state = ckptkit.load_state_dict(path)  # type: ignore[arg-type]
    assert [*state] == [*weights]
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


def zipped(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED, level: int | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=level) as out:
        for name, data in contents.items():
            out.writestr(name, data)
    return buffer.getvalue()


def tarred(contents: dict[str, bytes], mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as out:  # type: ignore[call-overload]
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def put(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return put


Put = Callable[[str, bytes], Path]


# Compressed files.


@every_compression
@pytest.mark.parametrize("container", CONTENTS)
def test_compressed_files_are_read_whatever_they_are_called(compression: str, container: str, put: Put) -> None:
    data = CONTENTS[container]
    path = put("any.name", COMPRESS[compression](data))
    same(path)
    with ckptkit.open(path) as file:
        assert (file.path, file.checkpoint.origin.size) == (str(path), len(data))
        told = [finding.message for finding in file.findings if finding.code == "compressed"]
        assert told == [f"{compression}-compressed: its {path.stat().st_size:,} bytes decompress to {len(data):,}"]
        assert file.trust == "safe"


@every_compression
def test_the_output_is_that_of_the_file_itself(compression: str, put: Put, tmp_path: Path) -> None:
    plain, packed = put("m.pth", MODEL), put("m.pth.packed", COMPRESS[compression](MODEL))
    for path, out in ((plain, "plain"), (packed, "packed")):
        for ending in (".safetensors", ".pth"):
            ckptkit.convert(path, tmp_path / f"{out}{ending}", strip_module=True)
    for ending in (".safetensors", ".pth"):
        assert (tmp_path / f"packed{ending}").read_bytes() == (tmp_path / f"plain{ending}").read_bytes()
    assert ckptkit.diff(plain, packed).ok


SKIPPED = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"

IN_PIECES: dict[str, bytes] = {
    "gzip": gzip.compress(MODEL[:1000]) + gzip.compress(b"") + gzip.compress(MODEL[1000:]) + bytes(513),
    "xz": lzma.compress(MODEL[:1000]) + bytes(8) + lzma.compress(MODEL[1000:]) + bytes(4),
    "bzip2": bz2.compress(MODEL[:1000]) + bz2.compress(MODEL[1000:]),
    "zstd": SKIPPED + zstandard.compress(MODEL[:1000]) + SKIPPED + zstandard.compress(MODEL[1000:]),
}


@every_compression
def test_streams_that_follow_one_another_are_one(compression: str, put: Put) -> None:
    same(put("m.pth", IN_PIECES[compression]))


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(SMALL) + b"x",
        gzip.compress(SMALL) + bytes(5) + gzip.compress(b"more"),
        gzip.compress(SMALL) + zipped({"a.pth": SMALL}),
        lzma.compress(SMALL) + bytes(3),
        lzma.compress(SMALL) + bytes(3) + lzma.compress(b""),
        bz2.compress(SMALL) + bytes(1),
        bz2.compress(SMALL) + b"BZ",
        zstandard.compress(SMALL) + bytes(4),
        zstandard.compress(SMALL) + gzip.compress(SMALL),
    ],
)
def test_what_follows_and_is_not_compressed_is_refused(data: bytes, put: Put) -> None:
    with pytest.raises(AmbiguousError, match=r"any.gz: byte [0-9]+: other bytes follow the .* data"):
        ckptkit.open(put("any.gz", data))


@every_compression
def test_cut_off_at_any_place_it_is_refused(compression: str, put: Put) -> None:
    whole = COMPRESS[compression](SMALL)
    for length in sorted({8, 12, 20, 100, len(whole) // 2, *range(len(whole) - 30, len(whole))}):
        with pytest.raises(CorruptError, match=r"m.pth: .*Download or copy the file again"):
            ckptkit.open(put("m.pth", whole[:length]))


@every_compression
def test_damaged_it_is_refused_or_the_same(compression: str, put: Put) -> None:
    whole = bytearray(
        COMPRESS[compression](SMALL)
        if compression != "zstd"
        else zstandard.ZstdCompressor(write_checksum=True).compress(SMALL)
    )
    drawn = random.Random(compression)
    for _ in range(40):
        at, bit = drawn.randrange(3, len(whole)), 1 << drawn.randrange(8)
        whole[at] ^= bit
        path = put("m.pth", bytes(whole))
        try:
            same(path, FEW)
        except FormatError as error:
            assert isinstance(error, (CorruptError, UnsupportedError, UnknownFormatError)), error
        whole[at] ^= bit


def rle_bomb(count: int) -> bytes:
    """A frame of zstd of blocks of one byte repeated: 4 bytes for 128 KiB (RFC 8878)."""
    block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = ((1 << 17) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\x00\x58" + block * count + last


def test_bombs_end_soon_and_take_little_room(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(unpacked_nbytes=DEFAULT_LIMITS.unpacked_nbytes // 8, unpacked_ratio=2)
    zeros = bytes(1 << 20)
    packer, packed = zstandard.ZstdCompressor().compressobj(), []
    for _ in range(50):
        packed.append(packer.compress(zeros))
    held = b"\x08" + bytes(7) + b"{"
    inner = held + bytes(limits.unpacked_nbytes // 8)
    bombs = {
        "gzip": gzip.compress(zeros, 1) * 40,
        "bzip2": bz2.compress(zeros, 1) * 40,
        "xz": lzma.compress(zeros, preset=0) * 40,
        "zstd": b"".join(packed) + packer.flush(),
        "rle": rle_bomb(2500),
        "many": zipped({f"{number}.dat": inner for number in range(20)}, zipfile.ZIP_DEFLATED),
        "nested": gzip.compress(b"".join([gzip.compress(zeros)] * 40)),
    }
    rooms: list[int] = []
    real = computed.spool_room
    monkeypatch.setattr(computed, "spool_room", lambda file, nbytes: rooms.append(nbytes) or real(file, nbytes))

    def ends_soon(most: int, work: Callable[[], object]) -> None:
        rooms.clear()
        begun = time.process_time()
        with pytest.raises(LimitError, match=rf"is over the limit of {most:,}"):
            work()
        assert time.process_time() - begun < 20 * most / DEFAULT_LIMITS.unpacked_nbytes
        assert sum(rooms) <= most + (8 << 20)

    for name, data in bombs.items():
        ends_soon(limits.unpacked_nbytes, partial(formats.read, put(f"{name}.pth", data), limits=limits))
    most = DEFAULT_LIMITS.unpacked_nbytes
    path = put("large.pth", zipped({"a.safetensors": held + bytes(most + (8 << 20))}, zipfile.ZIP_DEFLATED, 1))
    ends_soon(most, partial(ckptkit.open, f"{path}!a.safetensors"))
    ends_soon(most, partial(ckptkit.open, put("large.gz", gzip.compress(zeros, 1) * 264)))


def test_what_shrinks_much_and_is_large_itself_is_no_bomb(put: Put) -> None:
    state = {"w": torch.zeros(1_000_000), "r": torch.randn(60_000)}
    path = put("m.pth.gz", gzip.compress(saved(state)))
    assert torch.equal(ckptkit.load_state_dict(path)["w"], state["w"])
    limits = Limits(unpacked_nbytes=1 << 20, unpacked_ratio=2)
    with pytest.raises(LimitError):
        formats.read(path, limits=limits)
    checkpoint, file = formats.read(path, limits=Limits(unpacked_nbytes=1 << 20, unpacked_ratio=30))
    assert len(checkpoint.state_dict) == 2
    file.close()


def test_files_inside_one_another_are_bounded(put: Put) -> None:
    data = MODEL
    for _ in range(DEFAULT_LIMITS.levels):
        data = gzip.compress(data)
    same(put("m", data))
    with pytest.raises(LimitError, match=r"files inside one another: 5 is over the limit of 4"):
        ckptkit.open(put("m", gzip.compress(data)))


def test_a_disk_that_is_full(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("m.pth.gz", gzip.compress(MODEL))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    with pytest.raises(FileAccessError, match=r"m.pth.gz: is gzip-compressed, and takes .* bytes in the tempora"):
        ckptkit.open(path)


def test_memory_is_bounded_too(put: Put) -> None:
    large = lzma.compress(MODEL, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}])
    with pytest.raises(
        UnsupportedError,
        match=r"xz-compressed in a way that takes more than 268,435,456 bytes of "
        r"memory",
    ):
        ckptkit.open(put("m.xz", large))
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    with pytest.raises(UnsupportedError, match=r"zstd-compressed in a way that takes more than"):
        ckptkit.open(put("m.zst", wide.compress(MODEL) + wide.flush()))


def test_zstd_says_what_to_install(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("m.zst", zstandard.compress(MODEL))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(compressions, "_zstd", compressions._Zstandard)
    with pytest.raises(MissingDependencyError, match=r"zstandard, which is not installed; .*pip install '.\[zstd\]'"):
        ckptkit.open(path)


@pytest.mark.parametrize("compression", ["xz", "bzip2"])
def test_a_python_that_was_built_without(compression: str, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("m", COMPRESS[compression](MODEL))
    monkeypatch.setitem(sys.modules, {"xz": "lzma", "bzip2": "bz2"}[compression], None)
    with pytest.raises(MissingDependencyError, match=r"this Python cannot decompress such files: "):
        ckptkit.open(path)


def test_safetensors_whose_length_looks_like_gzip(put: Put) -> None:
    header = b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = (0x088B1F).to_bytes(8, "little") + header.ljust(0x088B1F) + bytes(4)
    assert [*ckptkit.load_state_dict(put("m.safetensors", data))] == ["b"]


def test_it_changes_meanwhile(put: Put, tmp_path: Path) -> None:
    path = put("m.pth.gz", gzip.compress(MODEL))
    with ckptkit.open(path) as file:
        os.utime(path, (1, 1))
        with pytest.raises(CorruptError, match=r"the file was changed while it was being converted"):
            file.save(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_shards_that_are_compressed_are_parts(put: Put) -> None:
    path = put("model-00001-of-00002.safetensors.gz", gzip.compress(CONTENTS["safetensors"]))
    with ckptkit.open(path) as file:
        assert file.checkpoint.part is not None and file.checkpoint.part.piece == "shard 1 of 2"


# Members of archives.

ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "stored zip": zipped,
    "deflated zip": lambda contents: zipped(contents, zipfile.ZIP_DEFLATED),
    "tar": tarred,
    "tar of GNU's": lambda contents: tarred(contents, format=tarfile.GNU_FORMAT),
    "tar.gz": lambda contents: tarred(contents, "w:gz"),
    "tar.bz2": lambda contents: tarred(contents, "w:bz2"),
    "tar.xz": lambda contents: tarred(contents, "w:xz"),
    "tar.zst": lambda contents: zstandard.compress(tarred(contents)),
    "zip in a tar": lambda contents: tarred({"readme": b"hi", "in.zip": zipped(contents)}),
    "tar.gz in a deflated zip": lambda contents: zipped({"in.zip": tarred(contents, "w:gz")}, zipfile.ZIP_DEFLATED),
}

LONG = "very/" * 40 + "long/" + "n" * 90 + ".bin"

MEMBERS = {
    "a/model.pth": SMALL,
    "notes.txt": b"words",
    "old.tar": saved(FEW, _use_new_zipfile_serialization=False),
    LONG: safetensors_save(FEW),
    "m.pth.gz": gzip.compress(SMALL),
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("separator", ["/", "!"])
def test_members_are_named_with_their_archive(kind: str, separator: str, put: Put, tmp_path: Path) -> None:
    path = put("all.ar", ARCHIVES[kind](MEMBERS))
    inner = f"{separator}in.zip" * (" in a " in kind)
    for name in MEMBERS:
        named = f"{path}{inner}{separator}{name}"
        if name == "notes.txt":
            with pytest.raises(UnknownFormatError, match=r"notes.txt: a text file, not a checkpoint"):
                ckptkit.open(named)
            continue
        same(named, FEW)
        ckptkit.convert(named, tmp_path / "out.safetensors", force=True)
        with ckptkit.open(named) as file:
            assert file.path == named
    own = put("own.pth", MEMBERS["a/model.pth"])
    ckptkit.convert(own, tmp_path / "own.safetensors")
    ckptkit.convert(f"{path}{inner}{separator}a/model.pth", tmp_path / "out.safetensors", force=True)
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_a_path_that_exists_wins(put: Put) -> None:
    put("all.zip", zipped({"m.pth": saved({"inner": torch.ones(1)})}))
    outer = put("all.zip!m.pth", saved({"outer": torch.ones(1)}))
    assert [*ckptkit.load_state_dict(outer)] == ["outer"]
    assert [*ckptkit.load_state_dict(f"{outer.parent}/all.zip/m.pth")] == ["inner"]
    assert split_member(str(outer)) is None
    assert split_member(f"{outer.parent}/all.zip/m.pth") == (f"{outer.parent}/all.zip", "m.pth")
    assert [split_member(path) for path in ("a.zip!b", "https://host/a.zip/b", "all.zip!", "x\0/y", "")] == [None] * 5


def test_what_is_no_member_is_told_with_those_there_are(put: Put) -> None:
    path = put("all.zip", zipped({"notes": b"", **{f"r{n}/m.pth": b"" for n in range(12)}, "z.txt": b""}))
    with pytest.raises(
        MissingFileError, match=r"it has no member 'x.pth'; it contains 'r0/m.pth', .* and 4 more"
    ) as caught:
        ckptkit.open(f"{path}!x.pth")
    assert (caught.value.path, len(caught.value.names)) == (str(path), 14)
    with pytest.raises(MissingFileError, match=r"all.zip: 'r3' is a folder in it; it contains 'r3/m.pth'$"):
        ckptkit.open(f"{path}/r3")
    with pytest.raises(FileAccessError, match=r"is not an archive; there is no 'x' to open"):
        ckptkit.open(f"{put('notes.txt', b'words')}!x")
    with pytest.raises(MissingFileError, match=r"no such file"):
        ckptkit.open(f"{path}.not/there.pth")


@pytest.mark.parametrize("name", ["data/0", "archive/data.pkl", "data.pkl", "version"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_records_of_torchs_are_no_members(name: str, pack: Callable[[bytes], bytes], put: Put) -> None:
    path = put("model.pth", pack(MODEL))
    for separator in "/!":
        with pytest.raises(
            FileAccessError,
            match=rf"model.pth: is a checkpoint itself \(torch-zip\).*no '{name}' to open. Give the file: {path}",
        ):
            ckptkit.open(f"{path}{separator}{name}")


def test_two_members_of_one_name(put: Put) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, data in (("m.pth", MODEL), ("b.pth", MODEL), ("./m.pth", saved({}))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    path = put("all.tar", buffer.getvalue())
    same(f"{path}/b.pth")
    with pytest.raises(AmbiguousError, match=r"two members are named 'm.pth'"):
        ckptkit.open(f"{path}/m.pth")
    with pytest.warns(UserWarning, match=r"Duplicate name"):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for _ in range(2):
                archive.writestr("m.pth", MODEL)
    with pytest.raises(AmbiguousError, match=r"'m.pth' have equal names"):
        ckptkit.open(f"{put('all.zip', data.getvalue())}!m.pth")


def test_what_is_no_file_in_a_tar_is_not_followed(put: Put, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    put("secret.pth", MODEL)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        for kind, name in ((tarfile.SYMTYPE, "link.pth"), (tarfile.LNKTYPE, "hard.pth")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.pth")
            out.addfile(info)
        info = tarfile.TarInfo("sparse.pth")
        info.size, info.pax_headers = 4, {"GNU.sparse.name": "x"}
        out.addfile(info, io.BytesIO(b"1234"))
    path = put("all.tar", buffer.getvalue())
    for name in ("link.pth", "hard.pth", "sparse.pth"):
        with pytest.raises(MissingFileError, match=r"it has no member"):
            ckptkit.open(f"{path}/{name}")


def test_sizes_as_gnu_tar_writes_large_ones(put: Put) -> None:
    data = bytearray(tarred({"m.pth": MODEL}, format=tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + len(MODEL).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK_NBYTES])
    same(f"{put('all.tar', bytes(data))}!m.pth")


def test_damaged_archives(put: Put) -> None:
    deflated = bytearray(zipped({"m.pth": MODEL}, zipfile.ZIP_DEFLATED))
    deflated[5000] ^= 1
    with pytest.raises(CorruptError, match=r"member|record 'm.pth'"):
        ckptkit.open(f"{put('all.zip', bytes(deflated))}!m.pth")
    for name, data in (("cut.tar", tarred({"m.pth": MODEL})[:9000]), ("cut.zip", zipped({"m.pth": MODEL})[:-9])):
        with pytest.raises(CorruptError, match=f"{name}"):
            ckptkit.open(f"{put(name, data)}!m.pth")
        with pytest.raises(CorruptError, match=f"{name}"):
            ckptkit.open(put(name, data))


@pytest.mark.parametrize("container", ["legacy", "safetensors"])
def test_what_a_zip_records_of_a_member_is_held(container: str, put: Put, tmp_path: Path) -> None:
    data = bytearray(zipped({"m": CONTENTS[container]}))
    data[len(data) // 2] ^= 1
    path = put("all.zip", bytes(data))
    own, out = put("own", CONTENTS[container]), tmp_path / "out.safetensors"
    for named in (path, f"{path}!m"):
        assert len(ckptkit.inspect(named)["tensors"]) == 2
        for work in (
            lambda: ckptkit.load_state_dict(named),  # noqa: B023 - called at once
            lambda: ckptkit.load(named),  # noqa: B023
            lambda: ckptkit.convert(named, out),  # noqa: B023
            lambda: ckptkit.diff(own, named),  # noqa: B023
            lambda: ckptkit.verify(named, model=lambda: nn.Linear(2, 3), forward=False),  # noqa: B023
        ):
            with pytest.raises(CorruptError, match=r"its CRC-32 is \w{8}, but the archive records \w{8}: damaged"):
                work()
        assert ckptkit.check(named, no_nan=True).exit_code == 2
        ckptkit.convert(named, out, ignore_checksums=True)
        assert len(ckptkit.load_state_dict(named, ignore_checksums=True)) == 2
        out.unlink()


def test_an_archive_that_is_two_things(put: Put) -> None:
    with pytest.raises(AmbiguousError, match=r"at once"):
        ckptkit.open(put("all.tar", tarred({"m.pth": MODEL}) + zipped({"m.pth": MODEL})))


@pytest.mark.parametrize("kind", ["stored zip", "tar", "tar.gz", "deflated zip"])
def test_members_are_copied_in_the_kernel_and_mapped(
    kind: str, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put("all.ar", ARCHIVES[kind]({"m.pth": MODEL, "x": b"123"}))
    ways: list[str] = []
    real = Copier._way

    def way(self: Copier, nbytes: int) -> Any:
        ways.append("kernel")
        return real(self, nbytes)

    monkeypatch.setattr(Copier, "_way", way)
    with ckptkit.open(f"{path}!m.pth") as file:
        file.save(tmp_path / "out.safetensors")
        assert ways
        with torch.no_grad():
            mapped = loading.tensors(file.state_dict, map_location="cpu", mapped=True, checksums=True)
        assert all(torch.equal(mapped[name], WEIGHTS[name]) for name in WEIGHTS)
        entry = file.state_dict["a.weight"]
        source = entry.storage.source
        assert isinstance(source, ByteRange)
        located = source.file.located(source)
        assert isinstance(located.file, SourceFile) and located.read() == source.read()
        mapped["a.weight"][0, 0] = 7
    same(f"{path}!m.pth")
    with pytest.raises(FileAccessError, match=r"was closed"):
        source.file.located(source)


def test_shards_in_an_archive_are_read_there(put: Put, tmp_path: Path) -> None:
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"b": torch.ones(2)},
    }
    index = {"weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    contents = {f"hub/{name}": safetensors_save(tensors) for name, tensors in parts.items()}
    contents |= {"hub/model.safetensors.index.json": json.dumps(index).encode(), "hub/config.json": b"{}"}
    for name in ("stored zip", "tar.gz", "deflated zip"):
        path = put("all.ar", ARCHIVES[name](contents))
        for named in (path, f"{path}!hub/model.safetensors.index.json"):
            assert sorted(ckptkit.load_state_dict(named)) == ["a", "b"]
            ckptkit.convert(named, tmp_path / "out.safetensors", force=True)
        with ckptkit.open(f"{path}/hub/model-00001-of-00002.safetensors") as file:
            part = file.checkpoint.part
            assert part is not None and part.instead == f"{path}/hub/model.safetensors.index.json"
            assert [*ckptkit.load_state_dict(part.instead)] == ["a", "b"]
    record = ckptkit.manifest(path).files[0]
    assert (record.size, record.shards) == (path.stat().st_size, {})
    del contents["hub/model-00002-of-00002.safetensors"]
    with pytest.raises(CorruptError, match=r"1 shard missing: model-00002-of-00002.safetensors"):
        ckptkit.open(put("all.ar", zipped(contents)))


# Which member is meant.


def policy_archive(data: dict[str, Any], method: int = zipfile.ZIP_STORED) -> bytes:
    """What ``save_to_zip_file`` of stable-baselines3 writes."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    return zipped(
        {
            "data": json.dumps(data).encode(),
            "pytorch_variables.pth": saved(None),
            "policy.pth": MODEL,
            "policy.optimizer.pth": saved(optimizer.state_dict()),
            "_stable_baselines3_version": b"2.3.2",
            "system_info.txt": b"- OS: Linux",
        },
        method,
    )


def serialized(value: object) -> dict[str, str]:
    return {":type:": str(type(value)), ":serialized:": base64.b64encode(cloudpickle.dumps(value)).decode()}


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


NEMO = {
    "./tokenizer.model": b"\x0a\x05pieces" * 500,
    "./model_config.yaml": b"a: 1\n" * 50,
    "./model_weights.ckpt": MODEL,
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_nemo_file(mode: str, put: Put, tmp_path: Path) -> None:
    path = put("m.nemo", tarred(NEMO, mode))
    same(path)
    with ckptkit.open(path) as file:
        told = {finding.code: finding.message for finding in file.findings}
        assert (told["inside-an-archive"], file.trust) == (
            "'model_weights.ckpt' in this archive (a NeMo model) is shown; "
            "others: 'tokenizer.model', 'model_config.yaml'",
            "safe",
        )
        assert ("compressed" in told) == (mode == "w:gz")
        way = told["inside-an-archive"]
    for report in (
        ckptkit.convert(path, tmp_path / "out.safetensors"),
        ckptkit.convert(path, tmp_path / "out.safetensors", dry_run=True),
        ckptkit.verify(path, model=lambda: nn.Linear(2, 3), forward=False),
    ):
        assert way in [finding.message for finding in report.findings]
    manifest = ckptkit.manifest(path, tmp_path / "lock.json")
    (record,) = manifest.files
    assert (record.size, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert record.content_digest == ckptkit.manifest(put("own.pth", MODEL)).files[0].content_digest
    assert ckptkit.check(manifest=tmp_path / "lock.json").exit_code == 0
    put("m.nemo", tarred({**NEMO, "./tokenizer.model": b"other"}, mode))
    assert ckptkit.check(path, manifest=tmp_path / "lock.json").exit_code in (0, 1)
    put("m.nemo", tarred({**NEMO, "./model_weights.ckpt": saved({"a.weight": torch.ones(1)})}, mode))
    assert ckptkit.check(path, manifest=tmp_path / "lock.json").exit_code == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_model_of_stable_baselines3(method: int, put: Put) -> None:
    path = put("ppo.zip", policy_archive({"gamma": 0.99}, method))
    same(path)
    with ckptkit.open(path) as file:
        (told,) = (finding.message for finding in file.findings if finding.code == "inside-an-archive")
        assert told.startswith("'policy.pth' in this archive (a model of stable-baselines3) is shown; others: 'data', ")
        assert file.trust == "safe"
    with ckptkit.open(f"{path}!policy.optimizer.pth") as file:
        assert file.trust == "safe" and file.path == f"{path}!policy.optimizer.pth"


def test_what_else_lies_in_an_archive_counts_for_trust(put: Put) -> None:
    def trusted(data: bytes, **policy: Any) -> tuple[str, int, list[str]]:
        path = put("m.zip", data)
        with ckptkit.open(path) as file:
            report = ckptkit.check(path, **policy)
            return file.trust, report.exit_code, [finding.code for finding in report.findings]

    assert trusted(policy_archive({"x": 1}), max_trust="safe") == ("safe", 0, [])
    function = policy_archive({"lr": serialized(lambda x: x * 2), "cls": serialized(nn.Linear)})
    assert trusted(function, max_trust="safe") == ("needs_trust", 1, ["trust-not-allowed"])
    evil = {":serialized:": base64.b64encode(pickle.dumps(Runs())).decode()}
    assert trusted(policy_archive({"x": evil})) == ("hostile", 1, ["trust-not-allowed"])
    odd = {**_contents(policy_archive({})), "data": b"{" * 9}
    assert trusted(zipped(odd), max_trust="safe")[:2] == ("needs_trust", 1)
    weights = CONTENTS["safetensors"]
    assert trusted(zipped({"m.safetensors": weights}), no_pickle=True) == ("safe", 0, [])
    assert trusted(zipped({"m.safetensors": weights, "x": pickle.dumps(Runs())}))[0] == "hostile"
    assert trusted(zipped({"m.safetensors": weights, "x": pickle.dumps([1])}), no_pickle=True)[1] == 1
    assert trusted(zipped({"m.safetensors": weights, "x.7z": b"7z\xbc\xaf\x27\x1c"}), max_trust="safe")[:2] == (
        "needs_trust", 1,
    )  # fmt: skip
    assert trusted(zipped({"m.safetensors": weights}), require_format="safetensors")[1] == 1
    assert trusted(gzip.compress(weights), require_format="safetensors")[1:] == (1, ["container-not-allowed"])
    with ckptkit.open(
        f"{put('m.zip', zipped({'m.safetensors': weights, 'x': pickle.dumps(Runs())}))}!m.safetensors"
    ) as file:
        assert (file.trust, file.checkpoint.origin.has_pickle) == ("safe", False)


def _contents(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_what_a_damaged_one_names_is_told_all_the_same(put: Put) -> None:
    broken = MODEL[:-40] + bytes(40)
    with pytest.raises(CorruptError, match=r"m.zip: m.pth: the file begins like a zip archive but") as caught:
        ckptkit.open(put("m.zip", zipped({"m.pth": broken, "x": pickle.dumps(Runs())})))
    assert "posix.system" in {use.name for use in caught.value.globals}


@pytest.mark.parametrize("kind", ["stored zip", "deflated zip", "tar", "tar.gz"])
def test_one_checkpoint_by_its_content_is_meant(kind: str, put: Put) -> None:
    others = {"readme.md": b"# model", "image.png": b"\x89PNG\r\n" + bytes(99), "a.npy": b"\x93NUMPY" + bytes(99)}
    for name, data in (("weights", MODEL), ("w.bin", CONTENTS["legacy"]), ("w.dat", CONTENTS["safetensors"])):
        path = put("release.zip", ARCHIVES[kind]({**others, f"release/{name}": data}))
        same(path)
    path = put("release.zip", ARCHIVES[kind]({**others, "a/x": MODEL, "b/y": CONTENTS["safetensors"]}))
    with pytest.raises(
        UnknownFormatError,
        match=rf"an archive with 2 checkpoints in it; give one of them: {path}!a/x, {path}!b/y",
    ):
        ckptkit.open(path)
    same(f"{path}!b/y")
    with pytest.raises(UnknownFormatError, match=r"by its path: .* cannot be named: FILE!a/x, FILE!b/y"):
        ckptkit.open(Path(path).read_bytes())
    path = put("release.zip", ARCHIVES[kind](others))
    with pytest.raises(UnknownFormatError, match=r"archive without a torch checkpoint|tar archive that is not a che"):
        ckptkit.open(path)


# Folders, commands.


def survey(folder: Path) -> tuple[list[str], dict[str, int]]:
    surveyor = Surveyor()
    surveyor.folder(str(folder))
    found = surveyor.result()
    return sorted(os.path.relpath(each.path, folder) for each in found.checkpoints), dict(found.passed_over)


def test_folders_are_searched_for_them_by_content(put: Put, tmp_path: Path) -> None:
    for name, compress in COMPRESS.items():
        for container, data in CONTENTS.items():
            put(f"f/{name}_{container}", compress(data))
        put(f"f/text_{name}", compress(b"words " * 1000))
        put(f"f/pickle_{name}", compress(pickle.dumps({"a": 1})))
        put(f"f/cut_{name}", compress(MODEL)[:12])
    put("f/nemo", tarred(NEMO))
    put("f/nemo_gz", tarred(NEMO, "w:gz"))
    put("f/named.nemo", b"")
    put("f/named.pth.gz", b"")
    put("f/policy", policy_archive({}))
    put("f/data.zip", zipped({"a": b"1"}))
    put("f/data.tar", tarred({"a": b"1"}))
    put("f/data.tgz", tarred({"a": b"1"}, "w:gz"))
    found, passed_over = survey(tmp_path / "f")
    assert found == sorted(
        [f"{name}_{container}" for name in COMPRESS for container in CONTENTS]
        + ["nemo", "nemo_gz", "named.nemo", "named.pth.gz", "policy"]
    )
    assert passed_over == {
        "zip archive": 1, "tar archive": 1, "gzip-compressed file": 4, "xz-compressed file": 3,
        "bzip2-compressed file": 3, "zstd-compressed file": 3,
    }  # fmt: skip


def test_a_folder_of_many_small_files_is_not_looked_into_further(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = inside.begins_like_one
    monkeypatch.setattr(inside, "begins_like_one", lambda probe: asked.append(probe.file.path) or real(probe))
    for number in range(50):
        folder = put(f"f/{number}.pth", MODEL).parent
        put(f"f/{number}.txt", b"words")
        put(f"f/{number}.png", b"\x89PNG\r\n" + bytes(50))
        put(f"f/{number}.safetensors", CONTENTS["safetensors"])
        put(f"f/{number}", CONTENTS["legacy"])
    assert len(survey(folder)[0]) == 150
    assert asked == []


def test_commands(put: Put, run: Callable[..., Any], tmp_path: Path) -> None:
    put("model.pth.gz", gzip.compress(MODEL))
    put("archive.zip", zipped({"a/model.pth": MODEL, "b/model.pth": MODEL}))
    done = run("convert", "model.pth.gz", "x.safetensors")
    assert done.returncode == 0, done.stderr
    done = run("inspect", "archive.zip!a/model.pth", "--json")
    (document,) = json.loads(done.stdout)["files"]
    assert (done.returncode, document["path"], document["size"]) == (0, "archive.zip!a/model.pth", len(MODEL))
    done = run("inspect", "archive.zip")
    assert done.returncode == 2 and "give one of them: archive.zip!a/model.pth, archive.zip!b/model.pth" in done.stderr
    assert run("diff", "archive.zip/a/model.pth", "x.safetensors").returncode == 0
    assert run("check", "archive.zip!a/model.pth", "model.pth.gz", "--no-nan").returncode == 0
    assert run("check", "--skip-others", "archive.zip!a/model.pth", "archive.zip").returncode == 0
    done = run("manifest", "archive.zip!a/model.pth")
    assert done.returncode == 2 and "a manifest records files; record the archive, or unpack it" in done.stderr
    for option in ("archive.zip!a/model.pth", "archive.zip/a/model.pth"):
        done = run("check", option, "--require-format", "safetensors", "--json")
        (finding,) = json.loads(done.stdout)["findings"]
        assert finding["fix"] == f"ckptkit convert {option if '!' not in option else repr(option)} model.safetensors"
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        assert run(*shlex.split(finding["fix"])[1:]).returncode == 0
        (tmp_path / "model.safetensors").unlink()


def test_nothing_of_it_stays_open(put: Put, tmp_path: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    path = put("m.nemo", tarred(NEMO, "w:gz"))
    before = opened()
    for _ in range(3):
        with ckptkit.open(path):
            assert opened() > before
        with pytest.raises(FormatError):
            ckptkit.open(put("cut.gz", gzip.compress(MODEL)[:-5]))
        with pytest.raises(FormatError):
            ckptkit.open(put("two.zip", zipped({"a.pth": MODEL, "b.pth": MODEL}, zipfile.ZIP_DEFLATED)))
        with pytest.raises(MissingFileError):
            ckptkit.open(f"{path}!x")
    assert opened() == before
    assert member_of(str(path), DEFAULT_LIMITS) is None
