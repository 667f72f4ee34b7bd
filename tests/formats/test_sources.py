"""Whatever holds a file's bytes: one that is no local file takes one class, and all else is as with the file itself."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import mmap
import os
import pickle
import posixpath
import pty
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.far import little_by_little, serving
from support.tar_samples import archive, members
from torch import nn
from torch.package import PackageExporter

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import CHUNK_NBYTES, GAP_NBYTES, ByteRange, Source, SourceFile
from ckptkit.errors import CkptkitError, CorruptError, FileAccessError, MissingFileError
from ckptkit.formats.zip_archive import read_directory
from ckptkit.released.examine import examine_file
from ckptkit.torch_bridge import loading

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"

SCHEME = "memory:"


class Memory(Source):
    """Files in memory, by name: all that a source has to say."""

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        if name not in files:
            raise MissingFileError(f"{SCHEME}{name}: no such file")
        super().__init__(SCHEME + name, len(files[name]), identity=files[name])
        self._name, self._files = name, files

    def _some(self, offset: int, nbytes: int) -> bytes:
        return self._files[self._name][offset : offset + min(nbytes, 50_000)]

    def stamp(self) -> object:
        return self._files[self._name]

    def sibling(self, name: str) -> Source:
        return Memory(posixpath.join(posixpath.dirname(self._name), name), self._files)


def deflated(path: Path, folder: Path) -> Path:
    """The same archive, compressed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return folder / "deflated.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every container, alone in a folder of its own where it is not one of several."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("ddp_resume.pth", "legacy.pth", "scripted.pt", "state_dict.safetensors", "tied.pth"):
        shutil.copy(FIXTURES / name, folder / name)
    (folder / "hub").mkdir()
    for path in FIXTURES.glob("model*.safetensors*"):
        shutil.copy(path, folder / "hub" / path.name)
    (folder / "old.tar").write_bytes(archive(members()))
    base = torch.randn(40, 30)
    state = {"w": base.t(), "row": base[3], "big": torch.randn(40_000)}
    torch.save({"state_dict": state, "epoch": 3}, folder / "views.pth")
    deflated(folder / "views.pth", folder)
    torch.save(state | {"wide": torch.randn(600, 2400)[:, :7].t()}, folder / "views.pth")
    (folder / "plain.pkl").write_bytes(pickle.dumps({"w": torch.arange(12.0), "b": torch.ones(2)}, protocol=2))
    (folder / "bin" / "parts").mkdir(parents=True)
    shards = {"parts/pytorch_model-00001-of-00002.bin": {"a": base}, "pytorch_model-00002-of-00002.bin": {"b": base}}
    for name, tensors in shards.items():
        torch.save(tensors, folder / "bin" / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packager uses what torch warns of
        with PackageExporter(str(folder / "package.pt")) as exporter:
            exporter.save_pickle("held", "weights.pkl", {"w": base})
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), folder / "program.pt2")
    torch.save(nn.Linear(3, 2).state_dict(), folder / "linear.pth")
    return folder


@pytest.fixture(scope="module")
def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the files, by their names: 8 MB, of which the hashes stay known."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The same files in memory, which paths that begin with the scheme stand for."""
    files = dict(contents)
    real = formats.source_of

    def source_of(path: str | os.PathLike[str], *given: Any) -> Source:
        name = os.fsdecode(path)
        return Memory(name.removeprefix(SCHEME), files) if name.startswith(SCHEME) else real(path, *given)

    monkeypatch.setattr(formats, "source_of", source_of)
    return files


NAMES = (
    "ddp_resume.pth", "deflated.pth", "views.pth", "tied.pth", "linear.pth", "legacy.pth", "old.tar", "plain.pkl",
    "scripted.pt", "package.pt", "program.pt2", "state_dict.safetensors", "hub/model.safetensors.index.json",
    "hub/model-00001-of-00002.safetensors", "bin/pytorch_model.bin.index.json",
)  # fmt: skip

every_file = pytest.mark.parametrize("name", NAMES)


FAR = "far://bucket/"


@pytest.fixture
def both(folder: Path, files: dict[str, bytes]) -> Iterator[Callable[[str, Callable[[str], object]], tuple[str, str]]]:
    """What comes of a file elsewhere and of the one on disk, or which error, told without where they lie.

    Elsewhere: in memory, and far, where it comes little by little; of both comes the same.
    """
    with serving({}) as store, little_by_little():
        yield partial(_outcomes, [SCHEME, FAR, f"{folder}/"], files, store.files)


def _outcomes(
    places: list[str], files: dict[str, bytes], served: dict[str, bytes], name: str, work: Callable[[str], object]
) -> tuple[str, str]:
    served.update({FAR + each: data for each, data in files.items()})
    told = []
    for place in places:
        try:
            outcome = work(place + name)
        except CkptkitError as error:
            outcome = f"{type(error).__name__}: {error}"
        text = outcome if isinstance(outcome, str) else json.dumps(outcome, default=repr)
        told.append(text.replace(place, ""))
    in_memory, far, on_disk = told
    assert in_memory == far
    return far, on_disk


Both = Callable[[str, Callable[[str], object]], tuple[str, str]]


@every_file
def test_it_is_inspected(name: str, both: Both) -> None:
    ours, theirs = both(name, lambda path: ckptkit.inspect(path, stats=True))
    assert ours == theirs
    assert '"format"' in ours


@every_file
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_it_is_converted(name: str, ending: str, both: Both, tmp_path: Path) -> None:
    written: list[bytes] = []
    out = tmp_path / f"out{ending}"

    def convert(path: str) -> object:
        report = ckptkit.convert(path, out, weights_only=True, dtype="bfloat16", allow_part=True, force=True)
        written.append(out.read_bytes())
        return report.details, [finding.line for finding in report.findings]

    ours, theirs = both(name, convert)
    assert ours == theirs
    assert len(set(written)) == 1 or "Error" in ours  # a package contains no state_dict to write


@pytest.mark.parametrize("name", ["ddp_resume.pth", "deflated.pth", "views.pth", "legacy.pth", "old.tar", "linear.pth"])
def test_all_of_it_is_copied_without_a_descriptor(name: str, both: Both, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    written: list[bytes] = []

    def convert(path: str) -> object:
        report = ckptkit.convert(path, out, force=True)
        written.append(out.read_bytes())
        return report.details

    ours, theirs = both(name, convert)
    assert ours == theirs
    assert len(set(written)) == 1


@every_file
def test_it_is_the_same_as_the_file(name: str, folder: Path, both: Both) -> None:
    ours, theirs = both(name, lambda path: ckptkit.diff(path, folder / name, allow_part=True).to_dict())
    assert ours.replace(f"{folder}/", "") == theirs


@every_file
def test_it_is_read_as_check_and_manifest_read_it(name: str, both: Both) -> None:
    def examined(path: str) -> object:
        return repr(examine_file(path, hash_file=True, digest=True, values=True, whole=True, threads=2))

    ours, theirs = both(name, examined)
    assert ours == theirs
    assert "sha256" in ours


@every_file
def test_it_is_loaded(name: str, both: Both) -> None:
    def bits(value: torch.Tensor) -> str:
        return value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()

    def loaded(path: str) -> object:
        state = ckptkit.load_state_dict(path, allow_part=True)
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return list(state), {key: (str(value.dtype), value.shape, bits(value)) for key, value in tensors.items()}

    ours, theirs = both(name, loaded)
    assert ours == theirs


def test_it_is_verified(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[object] = []
    real = loading._private_map
    monkeypatch.setattr(loading, "_private_map", lambda *given: maps.append(real(*given)) or maps[-1])

    def verified(path: str) -> object:
        maps.clear()
        report = ckptkit.verify(path, model=lambda: nn.Linear(3, 2), input_shapes=[(1, 3)], against=path)
        assert bool(maps) and all((found is None) == (":" in path) for found in maps)
        return report.ok, [finding.code for finding in report.findings], report.details["outputs"]

    ours, theirs = both("linear.pth", verified)
    assert ours == theirs
    assert ours.startswith("[true")


def test_nothing_is_looked_for_on_disk(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("stat", "open", "listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *a, _real=real, **k: asked.append(str(path)) or _real(path, *a, **k))
    for name in NAMES:
        formats.read(SCHEME + name)[1].close()
    files["sharded/rank_1/data.pkl"] = files["mp_rank_01/common.pt"] = pickle.dumps(print)
    for name in ("sharded/rank_1/data.pkl", "mp_rank_01/common.pt"):
        with pytest.raises(CkptkitError):
            formats.read(SCHEME + name)
    assert not [path for path in asked if SCHEME in path or path == os.getcwd()]


# What goes wrong.


@every_file
def test_cut_off_it_is_refused_with_the_same_words(
    name: str, folder: Path, files: dict[str, bytes], both: Both
) -> None:
    files[name], kept = files[name][: min(len(files[name]) // 2, 700)], files[name]
    (folder / name).write_bytes(files[name])
    try:
        ours, theirs = both(name, lambda path: formats.read(path)[1].close())
    finally:
        (folder / name).write_bytes(kept)
    assert ours == theirs != "null"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["views.pth", "deflated.pth", "hub/model.safetensors.index.json"])
def test_one_that_changes_meanwhile(name: str, check: bool, files: dict[str, bytes], tmp_path: Path) -> None:
    changed = "hub/model-00002-of-00002.safetensors" if name.startswith("hub") else name
    with ckptkit.open(SCHEME + name) as file:
        files[changed] += b"more"
        with pytest.raises(CorruptError, match=r"was changed while it was being converted; nothing was written"):
            file.save(tmp_path / "out.pth", check=check)
    assert not os.listdir(tmp_path)


def test_shards_that_are_missing(files: dict[str, bytes]) -> None:
    del files["hub/model-00002-of-00002.safetensors"]
    with pytest.raises(CorruptError, match=r"1 shard missing: model-00002-of-00002\.safetensors"):
        formats.read(f"{SCHEME}hub/model.safetensors.index.json")


def test_closed_it_says_so(files: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("views.pth", "deflated.pth", "hub/model.safetensors.index.json"):
        file = ckptkit.open(SCHEME + name)
        file.close()
        with pytest.raises(FileAccessError, match=r"the checkpoint was closed; open it again"):
            file.save(tmp_path / "out.pth")


def test_without_more_than_bytes() -> None:
    """What a source may leave out: it cannot change, and nothing lies beside it."""

    class Bytes(Source):
        def _some(self, offset: int, nbytes: int) -> bytes:
            return b"0123456789"[offset : offset + min(nbytes, 3)]

    source = Bytes("ten", 10)
    assert (source.fileno(), source.folder, source.changed(), repr(source)) == (
        None,
        None,
        False,
        "Bytes('ten', 10 bytes)",
    )
    with pytest.raises(MissingFileError, match="ten: it is not in a folder, so there is no 'other' beside it"):
        source.sibling("other")
    buffer = bytearray(8)
    source.read_into(1, buffer)
    assert (source.read(0, 10), bytes(buffer), source.tail(4), source.tail(40)) == (
        b"0123456789", b"12345678", b"6789", b"0123456789",
    )  # fmt: skip
    source.size = 11
    with pytest.raises(CorruptError, match="became shorter while it was being read: byte 10"):
        source.read(0, 11)
    with pytest.raises(NotImplementedError):
        Source("nothing", 1).read(0, 1)


# Several ranges at once.


def test_ranges_are_read_in_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 4000
    (tmp_path / "data").write_bytes(data)
    source, asked = SourceFile(tmp_path / "data"), []
    real = SourceFile.read
    monkeypatch.setattr(SourceFile, "read", lambda *given: asked.append(given[1:]) or real(*given))
    wanted = [(0, 10), (10, 5), (20, 0), (15 + GAP_NBYTES, 5), (500_000, 7), (100, 3), (100, 3), (1_000_000, 24_000)]
    assert list(source.ranges(wanted)) == [data[at : at + nbytes] for at, nbytes in wanted]
    assert asked == [(0, 20 + GAP_NBYTES), (500_000, 7), (100, 3), (100, 3), (1_000_000, 24_000)]
    assert list(source.ranges([])) == []
    with pytest.raises(CorruptError, match="were requested from a file"):
        list(source.ranges([(0, 1), (len(data), 1)]))


def test_ranges_that_touch_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros(Source):
        def _some(self, offset: int, nbytes: int) -> bytes:
            asked.append(nbytes)
            return bytes(nbytes)

    asked: list[int] = []
    wanted = [(at, 1 << 20) for at in range(0, 10 << 20, 1 << 20)]
    assert sum(map(len, Zeros("zeros", 1 << 30).ranges(wanted))) == 10 << 20
    assert max(asked) == CHUNK_NBYTES


# A member of an archive is a source, too.


class Member(Source):
    """A range of another source."""

    def __init__(self, area: ByteRange, name: str) -> None:
        super().__init__(f"{area.file.path}/{name}", area.nbytes, area.file.identity)
        self._area = area

    def _some(self, offset: int, nbytes: int) -> bytes:
        return self._area.read(offset, nbytes)

    def stamp(self) -> object:
        return self._area.file.stamp()


@pytest.mark.parametrize("outer", ["memory", "disk"])
def test_a_member_of_an_archive_is_read_where_it_lies(outer: str, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("ddp_resume.pth", "state_dict.safetensors", "old.tar"):
            archive.write(folder / name, name)
    path = tmp_path / "all.zip"
    file = SourceFile(path) if outer == "disk" else Memory("all.zip", {"all.zip": path.read_bytes()})
    for name, record in read_directory(file).items():
        checkpoint, member = formats.read(Member(record.data, name))
        assert checkpoint.origin.path == f"{file.path}/{name}"
        with ckptkit.open(folder / name) as same, ckptkit.CheckpointFile(checkpoint, member) as ours:
            for each, out in ((same, "same.pth"), (ours, "ours.pth")):
                each.save(tmp_path / out, force=True)
        assert (tmp_path / "ours.pth").read_bytes() == (tmp_path / "same.pth").read_bytes()
    file.close()


# Open files, bytes, standard input.

STATE = {"a": torch.arange(40_000.0), "b": torch.ones(3, dtype=torch.int8)}


def saved(state: object = STATE, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """A file that cannot seek, and gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.data[self.at : self.at + min(len(buffer), 70_001)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)


class Remote(Pipe):
    """One that can, as fsspec's do, and has no descriptor."""

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, len(self.data))[whence]
        return self.at


OPENED: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, _: data,
    "bytearray": lambda data, _: bytearray(data),
    "memoryview": lambda data, _: memoryview(b"--" + data)[2:],
    "mmap": lambda data, path: mapped_file(data, path),
    "array": lambda data, _: numpy.frombuffer(data, dtype=numpy.uint8),
    "BytesIO": lambda data, _: io.BytesIO(data),
    "file": lambda data, path: named(data, path),
    "raw file": lambda data, path: named(data, path, buffering=0),
    "temporary file": lambda data, _: filled(tempfile.TemporaryFile(), data),  # noqa: SIM115
    "named temporary file": lambda data, _: filled(tempfile.NamedTemporaryFile(), data),  # noqa: SIM115
    "pipe": lambda data, _: Pipe(data),
    "seekable": lambda data, _: Remote(data),
    "gzip": lambda data, _: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data))),
}


def named(data: bytes, path: Path, **options: Any) -> Any:
    path.write_bytes(data)
    return path.open("rb", **options)


def mapped_file(data: bytes, path: Path) -> mmap.mmap:
    with named(data, path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def filled(file: Any, data: bytes) -> Any:
    file.write(data)  # and is not flushed
    file.seek(0)
    return file


@pytest.fixture
def given(tmp_path: Path) -> Iterator[Callable[[str, bytes], Any]]:
    """What is open and has these bytes, by its kind."""
    with contextlib.ExitStack() as stack:

        def made(kind: str, data: bytes) -> Any:
            file = OPENED[kind](data, tmp_path / f"{len(stack._exit_callbacks)}.pth")  # type: ignore[attr-defined]
            stack.callback(getattr(file, "close", bool))
            return file

        yield made


Given = Callable[[str, bytes], Any]

UNMOVED = ("BytesIO", "file", "raw file", "temporary file", "named temporary file", "seekable")


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize("legacy", [False, True])
def test_whatever_is_open_is_read(kind: str, legacy: bool, given: Given, tmp_path: Path) -> None:
    data = saved(_use_new_zipfile_serialization=not legacy)
    opened = partial(given, kind, data)
    state = ckptkit.load_state_dict(opened())
    assert [*state] == [*STATE] and all(torch.equal(state[name], STATE[name]) for name in STATE)
    (tmp_path / "own.pth").write_bytes(data)
    ckptkit.convert(tmp_path / "own.pth", tmp_path / "own.safetensors")
    ckptkit.convert(opened(), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    assert torch.equal(ckptkit.load(opened())["a"], STATE["a"])
    assert ckptkit.diff(opened(), opened()).ok
    assert ckptkit.diff(opened(), tmp_path / "own.pth").ok
    document = ckptkit.inspect(opened(), stats=True)
    assert (document["size"], document["error"]) == (len(data), None)
    report = ckptkit.verify(opened(), model=lambda: _Holder(STATE), forward=False)
    assert report.ok, report.findings


class _Holder(nn.Module):
    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            self.register_buffer(name, torch.zeros_like(value))


@pytest.mark.parametrize("kind", [*UNMOVED, "pipe", "gzip"])
def test_from_the_present_position_which_stays(kind: str, given: Given, tmp_path: Path) -> None:
    first, second = saved({"first": torch.ones(9)}), saved({"second": torch.ones(9)})
    file = given(kind, b"%" * 100 + second)
    file.read(100)
    with ckptkit.open(file) as opened:
        assert [*opened.state_dict] == ["second"]
        assert kind == "pipe" or file.tell() == 100 + (kind not in UNMOVED) * len(second)
        ckptkit.convert(opened._file, tmp_path / "out.safetensors")
    if kind in UNMOVED:
        assert file.tell() == 100 and torch.load(io.BytesIO(file.read()))["second"].sum() == 9
    assert not file.closed, "it is not ours to close"
    whole = given(kind, first)
    whole.read()
    with pytest.raises(CkptkitError, match="the file is empty"):
        ckptkit.open(whole)


def test_what_is_open_need_not_stay_so(tmp_path: Path) -> None:
    with named(saved(), tmp_path / "m.pth") as file:
        opened = ckptkit.open(file)
    (tmp_path / "m.pth").unlink()
    assert torch.equal(loading.tensors(opened.state_dict)["a"], STATE["a"])
    opened.close()
    with pytest.raises(FileAccessError, match="was closed"):
        loading.tensors(opened.state_dict)
    data = bytearray(saved())
    with ckptkit.open(data) as opened, pytest.raises(BufferError):
        data.append(1)
    data.append(1)
    buffer = io.BytesIO(saved())
    with ckptkit.open(buffer):
        buffer.write(b"it may be written to")


def test_an_open_file_has_a_descriptor_and_what_lies_beside_it(folder: Path, tmp_path: Path) -> None:
    with (folder / "linear.pth").open("rb") as file:
        source = formats.source_of(file)
        assert source.fileno() not in (None, file.fileno()) and source.folder == str(folder)
        state = loading.tensors(formats.read(source)[0].state_dict, mapped=True)
        assert state["weight"].shape == (2, 3)
    with (folder / "hub" / "model.safetensors.index.json").open("rb") as file, ckptkit.open(file) as opened:
        opened.save(tmp_path / "out.safetensors")
    with (folder / "hub" / "model-00001-of-00002.safetensors").open("rb") as file, ckptkit.open(file) as opened:
        assert opened.checkpoint.part is not None
    shutil.copy(folder / "linear.pth", tmp_path / "linear.pth")
    with (tmp_path / "linear.pth").open("rb") as file:
        (tmp_path / "linear.pth").unlink()
        source = formats.source_of(file)
        assert (source.folder, source.path) == (None, str(tmp_path / "linear.pth"))
        with pytest.raises(MissingFileError, match="an open file has no folder"):
            source.sibling("x")
        with ckptkit.open(source) as opened:
            assert len(opened.state_dict) == 2


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(saved())
    closed = io.BytesIO(saved())
    closed.close()
    released = memoryview(saved())
    released.release()
    with (tmp_path / "m.pth").open(encoding="latin-1") as text, (tmp_path / "new").open("wb") as writable:
        for file, words in (
            (text, r"m.pth: is open as text; open it in binary mode"),
            (writable, r"new: the file is e"),
        ):
            with pytest.raises(CkptkitError, match=words):
                ckptkit.open(file)  # type: ignore[arg-type]
    for given, words in (
        (io.StringIO("x"), r"<file>: is open as text"),
        (closed, r"<file>: cannot be read: I/O operation on closed file"),
        (Typed(), r"<file>: returns text; open it in binary mode"),
        (7, r"^int is not a path, an open binary file or bytes"),
        (None, r"^NoneType is not a path"),
        (memoryview(saved())[::2], r"<bytes>: a view with gaps"),
        (released, r"<bytes>: cannot be read: operation forbidden on released memoryview"),
    ):
        with pytest.raises(FileAccessError, match=words):
            ckptkit.open(given)  # type: ignore[arg-type]


class Typed:
    def read(self, nbytes: int) -> str:
        return "x"


@pytest.mark.parametrize("kind", ["BytesIO", "pipe", "bytes", "file"])
def test_other_sections_are_read_from_what_was_given(kind: str, given: Given, tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3)}
    ema = {f"module.{name}": value * 2 for name, value in state.items()}
    data = saved({"model": {"z": torch.ones(9)}, "ema": ema, "g": {"y": torch.ones(1)}})
    torch.save(state, tmp_path / "like.pth")
    out, like = tmp_path / "out.safetensors", tmp_path / "like.pth"
    report = ckptkit.convert(given(kind, data), out, like=like, strip_module=True)
    assert report.details["section"] == "ema"
    assert ckptkit.load_state_dict(tmp_path / "out.safetensors")["a.bias"].tolist() == [2, 2, 2]
    report = ckptkit.verify(given(kind, data), model=_like, forward=False, section="g")
    (found,) = (finding for finding in report.findings if finding.code == "another-section")
    assert found.message == "section 'ema' has 2 of the reference's 2 tensors, the selected 'g' 0"


def _like() -> nn.Module:
    model = nn.Module()
    model.a = nn.Linear(2, 3)
    return model


def test_a_file_that_changes_between_its_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(saved({"model": {"z": torch.ones(9)}, "ema": {"a": torch.ones(3)}}))
    torch.save({"a": torch.ones(3)}, tmp_path / "like.pth")
    real = formats.reread

    def reread(file: Source, **options: Any) -> object:
        os.utime(path, (len(options), 1))
        return real(file, **options)

    monkeypatch.setattr("ckptkit.conversion.options.reread", reread)
    with pytest.raises(CorruptError, match=r"m.pth: the file was changed while it was being read"):
        ckptkit.convert(path, tmp_path / "out.safetensors", like=tmp_path / "like.pth")
    assert not (tmp_path / "out.safetensors").exists()


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_standard_input(tmp_path: Path, run: Run) -> None:
    data = saved()
    (tmp_path / "m.pth").write_bytes(data)
    (tmp_path / "like.pth").write_bytes(data)
    done = run("inspect", "-", "--json", stdin=data)
    (document,) = json.loads(done.stdout)["files"]
    assert (done.returncode, document["path"], document["size"], done.stderr) == (0, "-", len(data), "")
    with (tmp_path / "m.pth").open("rb") as file:
        assert json.loads(run("inspect", "-", "--json", stdin=file.fileno()).stdout)["files"] == [document]
    assert run("convert", "-", "out.safetensors", stdin=gzip.compress(data)).returncode == 0
    assert ckptkit.diff(tmp_path / "out.safetensors", tmp_path / "m.pth").ok
    sections = saved({"model": {"z": torch.ones(9)}, "ema": STATE})
    done = run("convert", "-", "ema.safetensors", "--like", "like.pth", stdin=sections)
    assert done.returncode == 0, done.stderr
    assert ckptkit.diff(tmp_path / "ema.safetensors", tmp_path / "m.pth").ok
    assert run("diff", "-", "m.pth", stdin=data).returncode == 0
    assert run("diff", "m.pth", "-", stdin=data).returncode == 0
    done = run("diff", "-", "-", stdin=data)
    assert (done.returncode, "only one of the two can be standard input" in done.stderr) == (2, True)
    done = run("check", "-", "m.pth", "--no-nan", "--json", stdin=data)
    assert (done.returncode, json.loads(done.stdout)["checked"]) == (0, 2)
    done = run("check", "-", stdin=b"words")
    assert (done.returncode, "-: NOT CHECKED" in done.stdout) == (2, True)
    done = run("manifest", "-", stdin=data)
    assert (done.returncode, done.stdout) == (2, "")
    assert "-: a manifest records files by their paths, and standard input has none" in done.stderr
    for content in (b"", b"words"):
        assert run("inspect", "-", stdin=content).returncode == 2
    (tmp_path / "-").write_bytes(saved({"named": torch.ones(1)}))
    done = run("inspect", "./-", "-", "--json", stdin=data)
    assert [len(each["tensors"]) for each in json.loads(done.stdout)["files"]] == [1, 2]
    model = saved(nn.Linear(2, 1))
    findings = json.loads(run("inspect", "-", "--json", stdin=model).stdout)["files"][0]["findings"]
    fix = next(finding["fix"] for finding in findings if finding["fix"])
    assert fix.startswith("ckptkit convert - model.")
    assert run(*fix.split()[1:], stdin=model).returncode == 0


def test_standard_input_of_verify_is_no_file_that_is_run(tmp_path: Path, run: Run) -> None:
    torch.save(nn.Linear(2, 1), tmp_path / "-")
    for given in (saved(nn.Linear(2, 1)), gzip.compress(saved(nn.Linear(2, 1)))):
        done = run("verify", "-", "--unsafe-load", "--input-shape", "1,2", stdin=given)
        assert done.returncode == 2
        assert "-: is not a separate file, which --unsafe-load requires; unpack it first" in done.stderr
    given = saved(nn.Linear(3, 2).state_dict())
    done = run("verify", "-", "--model", "torch.nn:Identity", "--no-forward", "--json", stdin=given)
    assert (done.returncode, json.loads(done.stdout)["path"]) == (1, "-")


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pty.openpty()
    with os.fdopen(second, "rb", buffering=0) as terminal, os.fdopen(first, "rb", buffering=0):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(terminal)))
        with pytest.raises(FileAccessError, match=r"-: standard input is a terminal; pipe a checkpoint into it"):
            ckptkit.open("-")
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(FileAccessError, match=r"-: there is no standard input"):
            ckptkit.open("-")


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for state in ({"a": torch.ones(2)}, {"b": torch.ones(3)}):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Pipe(saved(state)))))
        for _ in range(3):
            assert [*ckptkit.load_state_dict("-")] == [*state]
