"""Whatever holds a file's bytes: one that is no local file takes one class, and all else is as with the file itself."""

from __future__ import annotations

import json
import os
import pickle
import posixpath
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from test_torch_tar import archive, members
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
    deflated(FIXTURES / "ddp_resume.pth", folder)
    (folder / "old.tar").write_bytes(archive(members()))
    base = torch.randn(40, 30)
    state = {"w": base.t(), "row": base[3], "big": torch.randn(40_000), "wide": torch.randn(3000, 2400)[:, :7].t()}
    torch.save(state, folder / "views.pth")
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


@pytest.fixture
def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The same files in memory, which paths that begin with the scheme stand for."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    real = formats.source_of

    def source_of(path: str | os.PathLike[str]) -> Source:
        name = os.fsdecode(path)
        return Memory(name.removeprefix(SCHEME), files) if name.startswith(SCHEME) else real(path)

    monkeypatch.setattr(formats, "source_of", source_of)
    return files


NAMES = (
    "ddp_resume.pth", "deflated.pth", "views.pth", "tied.pth", "linear.pth", "legacy.pth", "old.tar", "plain.pkl",
    "scripted.pt", "package.pt", "program.pt2", "state_dict.safetensors", "hub/model.safetensors.index.json",
    "hub/model-00001-of-00002.safetensors", "bin/pytorch_model.bin.index.json",
)  # fmt: skip

every_file = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def both(folder: Path, files: dict[str, bytes]) -> Callable[[str, Callable[[str], object]], tuple[str, str]]:
    """What comes of the file in memory and of the one on disk, or which error, told without where they lie."""

    def outcomes(name: str, work: Callable[[str], object]) -> tuple[str, str]:
        told = []
        for place in (SCHEME, f"{folder}/"):
            try:
                outcome = work(place + name)
            except CkptkitError as error:
                outcome = f"{type(error).__name__}: {error}"
            text = outcome if isinstance(outcome, str) else json.dumps(outcome, default=repr)
            told.append(text.replace(place, ""))
        return told[0], told[1]

    return outcomes


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
    assert len(set(written)) == 1 or "Error" in ours  # a package holds no state_dict to write


@pytest.mark.parametrize("name", ["ddp_resume.pth", "deflated.pth", "views.pth", "legacy.pth", "old.tar", "linear.pth"])
def test_all_of_it_is_copied_without_a_descriptor(name: str, both: Both, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    written: list[bytes] = []

    def convert(path: str) -> object:
        report = ckptkit.convert(path, out, force=True)
        written.append(out.read_bytes())
        return report.details

    ours, theirs = both(name, convert)
    assert (ours, written[0]) == (theirs, written[1])


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
    def bits(value: torch.Tensor) -> list[int]:
        return value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()

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
        assert bool(maps) and all((found is None) == path.startswith(SCHEME) for found in maps)
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
    with pytest.raises(MissingFileError, match="ten: nothing lies beside it, 'other' neither"):
        source.sibling("other")
    buffer = bytearray(8)
    source.read_into(1, buffer)
    assert (source.read(0, 10), bytes(buffer), source.tail(4), source.tail(40)) == (
        b"0123456789", b"12345678", b"6789", b"0123456789",
    )  # fmt: skip
    source.size = 11
    with pytest.raises(CorruptError, match="became shorter while it was read: byte 10"):
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
    with pytest.raises(CorruptError, match="were asked of a file"):
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
