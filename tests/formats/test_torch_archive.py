"""What torch's archives have in common: which one a file is, who wrote it, dead records, deflated storages."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import lzma
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.conformance import Conformance
from support.files import read, repacked, tarred, with_data

import ckptkit
from ckptkit import computed, formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.computed import DeflatedRange
from ckptkit.errors import (
    AmbiguousError,
    CkptkitError,
    CorruptError,
    FileAccessError,
    FormatError,
    UnknownFormatError,
    UnsupportedError,
)
from ckptkit.formats.contents import ContentSearch
from ckptkit.formats.zip_archive import read_directory
from ckptkit.formats.zip_records import record_source
from ckptkit.limits import Limits
from ckptkit.torch_bridge import tensors

Save = Callable[..., Path]
Change = Callable[[str, bytes], tuple[str, bytes] | None]


def state() -> dict[str, torch.Tensor]:
    base = torch.arange(2000.0)
    return {"w": base, "view": base[10:20], "t": torch.randn(40, 30).t(), "n": torch.tensor(3), "none": torch.ones(0)}


class TestTorchZip(Conformance):
    reads = "torch-zip"
    step = 3

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        torch.save(state, folder / "m.pth")
        return folder / "m.pth"


class TestDeflatedTorchZip(TestTorchZip):
    step = 7

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        return repacked(super().written(state, folder), deflate=True)


# Who wrote it.


@pytest.mark.parametrize(
    ("dropped", "version", "writer"),
    [
        ((), b"3\n", "torch 2.7 or later"),
        ((".format_version",), b"3\n", "torch 2.7 or later"),
        ((".format_version", ".storage_alignment"), b"3\n", "torch 2.1 to 2.6"),
        ((".format_version", ".storage_alignment", ".data/serialization_id"), b"3\n", None),
        ((".format_version", ".storage_alignment", ".data/serialization_id", "byteorder"), b"3\n", "torch 1.6 to 2.0"),
        ((".format_version", ".storage_alignment", ".data/serialization_id", "byteorder"), b"2\n", "torch 1.4 or 1.5"),
        ((".format_version", ".storage_alignment", ".data/serialization_id", "byteorder", "version"), b"", None),
    ],
)
def test_the_records_tell_which_torch_wrote_them(
    dropped: tuple[str, ...], version: bytes, writer: str | None, save: Save
) -> None:
    def change(name: str, data: bytes) -> tuple[str, bytes] | None:
        short = name.removeprefix("model/")
        return None if short in dropped else (name, version if short == "version" else data)

    path = save(state())
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if writer == "torch 2.7 or later" and "model/.storage_alignment" not in names:
        pytest.skip("this torch is older")
    assert read(repacked(path, change)).origin.writer == writer


def test_what_ckptkit_writes_is_not_taken_for_torchs(save: Save, tmp_path: Path) -> None:
    ckptkit.convert(save(state()), tmp_path / "ours.pth")
    assert read(tmp_path / "ours.pth").origin.writer is None


def test_newer_archives_keep_the_version_among_the_hidden_records(save: Save) -> None:
    path = repacked(save(state()), lambda n, d: (n.replace("/version", "/.data/version"), d))
    assert read(path).origin.format_version == "3"


# Records that nothing refers to.


def codes(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in checkpoint.findings]


def test_a_clean_file_has_none(save: Save) -> None:
    assert codes(read(save(state()))) == []


def test_dead_storages(save: Save) -> None:
    checkpoint = read(repacked(save(state()), more=[("model/data/99", b"x" * 5000), ("model/notes", b"y" * 120)]))
    assert codes(checkpoint) == [("unreferenced-records", "info")]
    assert "2 records of 5.12 kB" in checkpoint.findings[0].message
    assert "data/99, notes" in checkpoint.findings[0].message


def test_a_pickle_beside_the_pickle(save: Save) -> None:
    checkpoint = read(repacked(save(state()), more=[("model/other.pkl", b"N.")]))
    assert codes(checkpoint) == [("unreferenced-records", "warning")]


def test_many_are_counted_and_few_named(save: Save) -> None:
    checkpoint = read(repacked(save(state()), more=[(f"model/x{n}", b"") for n in range(9)]))
    assert "9 records of 0 B" in checkpoint.findings[0].message
    assert checkpoint.findings[0].message.endswith("x0, x1, x2, x3 and 5 more")
    assert "9 records" in checkpoint.findings[0].message


def test_without_the_version_that_torch_asks_for(save: Save, tmp_path: Path) -> None:
    path = with_data(save(state()), lambda name, data: None if name in ("version", ".data/version") else data)
    with pytest.raises(RuntimeError, match="version"):
        torch.load(path, weights_only=True)
    checkpoint = read(path)
    assert codes(checkpoint) == [("repacked-archive", "warning")]
    assert "without the record 'version'; torch refuses such an archive" in checkpoint.findings[0].message
    ckptkit.convert(path, tmp_path / "clean.pth")
    assert codes(read(tmp_path / "clean.pth")) == [] and torch.load(tmp_path / "clean.pth").keys() == state().keys()


# What is in them.


def packed(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()


def saved(value: object, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 1",)


class Held:
    """A class that nobody vouches for."""


def objects(value: object) -> bytes:
    out = io.BytesIO()
    numpy.save(out, numpy.array([value, None], dtype=object), allow_pickle=True)
    return out.getvalue()


HOSTILE: dict[str, bytes] = {
    **{f"protocol {protocol}": pickle.dumps(Runs(), protocol) for protocol in range(6)},
    "INST": b"(S'exit 1'\nios\nsystem\n.",
    "in a list of protocol 0": b"(lp0\nI1\na" + pickle.dumps(Runs(), 0)[:-1] + b"a.",
    "behind a string": b"S'notes'\n0" + pickle.dumps(Runs(), 0),
    "then an error": pickle.dumps(Runs(), 0)[:-1] + b"0\xff\xff",
    "the second of two": pickle.dumps("x", 2) + pickle.dumps(Runs(), 2),
    "after the refused content": b"\x80\x02N2" + pickle.dumps(Runs(), 2)[2:],
    "FRAME first": pickle.dumps([Runs(), "x" * 300], 4)[2:],
    "a cut FRAME first": b"\x95" + bytes(6) + b"\xff\0" + pickle.dumps([Runs(), "x" * 300], 4)[11:],
    "what looks like code": b"S'abET12'\n0" + pickle.dumps(Runs(), 0),
    "behind a value": b"N." + pickle.dumps(Runs(), 4),
    "torch's": saved({"a": torch.ones(2), "b": Runs()}),
    "torch's in a zip": packed({"x": saved({"b": Runs()})}, zipfile.ZIP_DEFLATED),
    "torch's in a tar": tarred({"x": saved({"b": Runs()})}),
    "torch's of old": saved({"a": torch.ones(2), "b": Runs()}, _use_new_zipfile_serialization=False),
    "an array of objects": objects(Runs()),
    "in a zip": packed({"notes": b"hello", "data": pickle.dumps(Runs())}),
    "in a deflated zip": packed({"notes": b"hello" * 100, "data": pickle.dumps(Runs(), 0)}, zipfile.ZIP_DEFLATED),
    "in a tar": tarred({"notes": b"hello", "data": pickle.dumps(Runs(), 1)}),
    "in an npz": packed({"a.npy": objects(Runs())}, zipfile.ZIP_DEFLATED),
}
UNREAD: dict[str, bytes] = {
    "gzip": gzip.compress(pickle.dumps(Runs())),
    "bzip2": bz2.compress(pickle.dumps(Runs())),
    "xz": lzma.compress(pickle.dumps(Runs())),
    "lzma": lzma.compress(pickle.dumps(Runs()), lzma.FORMAT_ALONE),
    "zlib": zlib.compress(pickle.dumps(Runs())),
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00",
    "an archive in an archive": packed({"x": packed({"y": pickle.dumps(Runs())})}),
    "a tar in a zip": packed({"x": tarred({"y": pickle.dumps(Runs())})}),
    "a tar in a tar": tarred({"x": tarred({"y": pickle.dumps(Runs())})}),
    "bytes after a pickle": pickle.dumps({"a": 1}, 2) + b"\xff" + bytes(9),
    "gzip in a tar": tarred({"x.gz": gzip.compress(b"x")}),
    "an encrypted zip": packed({"x": b"1"}).replace(b"\x14\x00\x00\x00", b"\x14\x00\x01\x00"),
    "a damaged zip": packed({"x": b"1234"})[:-30],
    "a pickle that ends early": pickle.dumps({"a": [1, 2, 3]}, 2)[:-3],
}
CODE: dict[str, bytes] = {
    "x": b"\x7fELF\x02\x01\x01" + bytes(60),
    "y": b"MZ\x90\x00\x03" + bytes(60),
    "z": b"\xcf\xfa\xed\xfe" + bytes(60),
    "w": b"\xca\xfe\xba\xbe\x00\x00\x00\x02",
    "lib.a": b"!<arch>\n" + bytes(60),
    "k": b"//\n// Generated by NVIDIA NVVM Compiler\n\n.version 8.3\n.target sm_90\n",
    "m.wasm": b"\0asm\x01\0\0\0",
    "lib.so": b"anything",
    "lib.so.12.1": b"anything",
    "kernel.cubin": b"anything",
    "kernel.hsaco": b"anything",
    "kernel.PTX": b"anything",
    "a.dll": b"anything",
    "b.dylib": b"anything",
    "in.zip": packed({"inner.so": b"anything"}),
}
DATA: dict[str, bytes] = {
    "text": b"copyright\nsomebody\nclass Net:\n    pass\n",
    "a list of words": b"cost\nsystems\nand more\n",
    "json": b'{"a": 1}',
    "yaml": b"lr: 0.1\nname: x\n",
    "python": b"class A:\n    import os\n",
    "digits": b"0101\n",
    "a list with dots": b"cache\nbuild\n.venv\n",
    "a poem": b"I dance\nalone\nNever\n",
    "a pickle without a name": pickle.dumps({"a": 1}, 0),
    "tensor": torch.randn(100).numpy().tobytes(),
    "an array": packed(
        {"a.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }" + bytes(80)}
    ),
    "a pickle of plain data": pickle.dumps({"a": [1, 2.5, None, "x"], "b": {1, 2}}, 4),
    "torch's": saved({"a": torch.ones(2)}),
    "torch's of old": saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
    "nothing": b"",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model.pth"
    torch.save(state(), path)
    return path


@pytest.mark.parametrize("deflate", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_payload_in_a_record_that_nothing_refers_to(name: str, deflate: bool, plain: Path) -> None:
    for record in ("model/odd", "model/.data/serialization_id", "model/notes.json", "model/data/99"):
        path = repacked(
            plain, lambda n, d, record=record: None if n == record else (n, d), deflate=deflate,
            more=[(record, HOSTILE[name])],
        )  # fmt: skip
        checkpoint = read(path)
        assert checkpoint.trust == "hostile"
        (use,) = [use for use in checkpoint.globals if use.verdict == "dangerous"]
        assert use.name in ("posix.system", "os.system") and use.where[0].startswith(record.removeprefix("model/"))


@pytest.mark.parametrize("deflate", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_looked_into_is_not_safe(name: str, deflate: bool, plain: Path) -> None:
    checkpoint = read(repacked(plain, deflate=deflate, more=[("model/odd", UNREAD[name])]))
    assert checkpoint.trust == "needs_trust"
    (part,) = checkpoint.unvouched
    assert part.kind == "unread" and part.where[0].startswith("odd")
    (finding,) = [finding for finding in checkpoint.findings if finding.code == "not-looked-into"]
    assert finding.severity == "warning" and "odd" in finding.message


@pytest.mark.parametrize("name", CODE)
def test_compiled_code_is_not_safe(name: str, plain: Path) -> None:
    checkpoint = read(repacked(plain, more=[(f"model/extra/{name}", CODE[name])]))
    assert checkpoint.trust == "needs_trust"
    (part,) = checkpoint.unvouched
    assert (part.kind, part.name, part.where[0][: len(name) + 6]) == ("code", "compiled code", f"extra/{name}")
    assert "foreign-program" in [finding.code for finding in checkpoint.findings]


@pytest.mark.parametrize("deflate", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("name", DATA)
def test_plain_data_stays_safe(name: str, deflate: bool, plain: Path) -> None:
    checkpoint = read(repacked(plain, deflate=deflate, more=[("model/odd", DATA[name])]))
    assert (checkpoint.trust, checkpoint.unvouched) == ("safe", ())


def test_past_the_bounds_nothing_is_vouched_for(plain: Path) -> None:
    large = pickle.dumps([collections.OrderedDict(), "x" * 50_000], 2)
    path = repacked(plain, more=[(f"model/x{number}", large) for number in range(4)])
    checkpoint, file = formats.read(path, limits=Limits(pickle_nbytes=120_000))
    file.close()
    assert checkpoint.trust == "needs_trust"
    assert sum(part.count for part in checkpoint.unvouched) == 2
    checkpoint, file = formats.read(path)
    file.close()
    assert checkpoint.trust == "safe"


def test_of_an_honest_file_nothing_more_is_read(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(ContentSearch, "look", lambda self, name, held, **_: looked.append(name))
    read(plain)
    assert looked == []


# Roots.


def test_a_second_root_before_the_first(save: Save, tmp_path: Path) -> None:
    with zipfile.ZipFile(save(state())) as source, zipfile.ZipFile(tmp_path / "two.pth", "w") as out:
        out.writestr("other/data.pkl", b"N.")
        for name in source.namelist():
            out.writestr(name, source.read(name))
    with pytest.raises(
        AmbiguousError,
        match=r"2 root folders \(model, other\); torch treats the first as the only "
        r"one",
    ):
        formats.read(tmp_path / "two.pth")


# Deflated storages: torch.load inflates them, and is the oracle.


@pytest.fixture
def deflated(save: Save) -> Path:
    return repacked(save(state()), deflate=True)


def test_opening_inflates_nothing(deflated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    document = ckptkit.inspect(deflated)
    assert [tensor["name"] for tensor in document["tensors"]] == list(state())
    with ckptkit.open(deflated) as file:
        assert all(isinstance(entry.storage.source, DeflatedRange) for entry in file.state_dict.values())
        assert file.plan(deflated.with_name("x.safetensors")).tensors == 5


def test_values_are_those_torch_loads(deflated: Path) -> None:
    oracle = torch.load(deflated)
    ours = ckptkit.load_state_dict(deflated)
    assert list(ours) == list(oracle)
    for name, value in oracle.items():
        assert torch.equal(ours[name], value)
        assert (ours[name].stride(), ours[name].storage_offset()) == (value.stride(), value.storage_offset())
    assert ours["w"].untyped_storage().data_ptr() == ours["view"].untyped_storage().data_ptr()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_converting_writes_them_plain(ending: str, deflated: Path) -> None:
    oracle = torch.load(deflated)
    target = deflated.with_name(f"out.{ending}")
    assert ckptkit.convert(deflated, target).details["checked"]
    again = ckptkit.load_state_dict(target)
    assert all(torch.equal(again[name], value) for name, value in oracle.items())


def test_statistics_read_them(deflated: Path) -> None:
    tensors = {tensor["name"]: tensor for tensor in ckptkit.inspect(deflated, stats=True)["tensors"]}
    assert (tensors["w"]["stats"]["max"], tensors["view"]["stats"]["min"]) == (1999.0, 10.0)


def _files_open() -> set[tuple[str, str]]:
    """The files that this process has open, where that can be known; not its sockets and pipes."""
    found = set()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(OSError):  # that of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return {(number, path) for number, path in found if path.startswith("/")}


def test_the_temporary_file_is_closed_with_the_checkpoint(deflated: Path) -> None:
    before = _files_open()
    with ckptkit.open(deflated) as file:
        tensors(file.state_dict)
        source = file.state_dict["w"].storage.source
    assert _files_open() <= before
    with pytest.raises(FileAccessError, match="closed"):
        source.read(0, 1)


def test_a_storage_inflates_once(deflated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rooms = [], []
    real, room = tempfile.TemporaryFile, computed.spool_room
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: made.append(1) or real(*a, **k))
    monkeypatch.setattr(computed, "spool_room", lambda *a: rooms.append(1) or room(*a))
    ckptkit.convert(deflated, deflated.with_name("out.pth"))
    assert len(rooms) == 4, "one for each storage that has bytes, and the empty one"
    assert len(made) == 1


def damaged(path: Path, record: str, at: int, mask: int) -> None:
    """Flip bits of a record's packed data, as they lie."""
    with closing(SourceFile(path)) as source:
        data = read_directory(source)[record].data
    with open(path, "r+b") as out:
        out.seek(data.offset + at)
        byte = out.read(1)[0]
        out.seek(data.offset + at)
        out.write(bytes([byte ^ mask]))


def test_damage_shows_when_the_bytes_are_asked_for(save: Save) -> None:
    values = torch.randint(0, 9, (500,), generator=torch.Generator().manual_seed(0))
    path = repacked(save({"w": values}), deflate=True)
    noise = random.Random(0)
    refused = 0
    for _ in range(40):
        at, mask = noise.randrange(100), 1 << noise.randrange(8)
        damaged(path, "model/data/0", at, mask)
        with ckptkit.open(path) as file:
            try:
                found = tensors(file.state_dict)["w"]
            except CorruptError as error:
                assert "record 'model/data/0'" in str(error)
                refused += 1
            else:  # a bit that inflating takes no notice of: of the code of a byte that does not occur
                assert torch.equal(found, values)
        damaged(path, "model/data/0", at, mask)
    assert refused > 30


def test_a_size_no_deflated_bytes_could_have(save: Save) -> None:
    path = repacked(save({"w": torch.zeros(4)}), deflate=True)
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            names = data[start + (30 if at == 22 else 46) :]
            if names.startswith(b"model/data/0"):
                struct.pack_into("<I", data, start + at, 1 << 30)
    path.write_bytes(data)
    with closing(SourceFile(path)) as source:
        record = read_directory(source)["model/data/0"]
        with pytest.raises(CorruptError, match="declares 1,073,741,824 bytes"):
            record_source(record)
    with pytest.raises(FormatError, match="declared as 16 bytes, but its record has 1,073,741,824"):
        formats.read(path)


# What was unpacked and packed again.

MAC = [("__MACOSX/m/._data.pkl", b"\x00\x05\x16\x07\x00"), ("__MACOSX/._m", b"\x00\x05\x16\x07")]
README = [("README.md", b"# weights")]


def packed(path: Path, before: Any = (), after: Any = (), *, under: str = "") -> Path:
    """The archive with records before and after its own, all of these in a folder."""
    target = path.with_name("packed.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        own = [(under + name, source.read(name)) for name in source.namelist()]
        for name, data in [*before, *own, *after]:
            out.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"after": MAC}, "below 'model/', beside them __MACOSX/m/._data.pkl, __MACOSX/._m;"),
        ({"before": MAC}, "__MACOSX"),
        ({"after": README}, "beside them README.md;"),
        ({"before": [*README, ("docs/", b""), ("docs/a/b.txt", b"b")]}, "README.md, docs/, docs/a/b.txt;"),
        ({"under": "out/"}, "below 'out/model/';"),
        ({"under": "a/b c/", "before": [("a/", b""), ("a/b c/", b"")], "after": README}, "'a/b c/model/', beside"),
        ({"after": [(f"x/{n}.txt", b"") for n in range(9)]}, "x/3.txt and 5 more;"),
    ],
)  # fmt: skip
def test_what_was_packed_again_opens_where_one_folder_is_torchs(
    options: dict[str, Any], words: str, save: Save, tmp_path: Path
) -> None:
    path = packed(save(state()), **options)
    with pytest.raises(RuntimeError, match=r"not in a subdirectory|hasRecord"):
        torch.load(path)
    checkpoint = read(path)
    finding = next(finding for finding in checkpoint.findings if finding.code == "repacked-archive")
    assert finding.severity == "warning"
    assert words in finding.message
    assert (finding.fix or "").startswith("ckptkit convert")
    assert checkpoint.trust == "safe"
    ckptkit.convert(path, tmp_path / "clean.pth")
    for name, tensor in torch.load(tmp_path / "clean.pth").items():
        assert torch.equal(tensor, state()[name]) or name == "t"
    assert not [f for f in read(tmp_path / "clean.pth").findings if f.code == "repacked-archive"]


def test_directory_records_are_nothing_to_tell(save: Save) -> None:
    checkpoint = read(packed(save(state()), before=[("model/", b""), ("model/data/", b"")]))
    assert not {"repacked-archive", "unreferenced-records"} & {finding.code for finding in checkpoint.findings}


@pytest.mark.parametrize("name", ["evil.pkl", "data.pkl", "docs/x.bin"])
def test_what_lies_outside_counts_for_the_trust(name: str, save: Save) -> None:
    evil = b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R."
    checkpoint = read(packed(save(state()), after=[(name, evil)]))
    assert checkpoint.trust == "hostile"
    assert [use.where for use in checkpoint.globals if use.name == "posix.system"] == [(name,)]


def test_two_checkpoints_in_folders_are_no_one(save: Save) -> None:
    path = save(state())
    with zipfile.ZipFile(path) as source:
        again = [(f"out/b/{name.partition('/')[2]}", source.read(name)) for name in source.namelist()]
    with pytest.raises(UnknownFormatError, match="with 2 checkpoints in it"):
        formats.read(packed(path, after=again, under="out/"))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_program_is_to_be_packed_again(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "m.pt")
    checkpoint = read(packed(tmp_path / "m.pt", after=README))
    finding = next(finding for finding in checkpoint.findings if finding.code == "repacked-archive")
    assert checkpoint.origin.format == "torchscript"
    assert finding.fix is None  # convert would drop the program


def unpacked(path: Path, folder: Path) -> None:
    """As unzip does it, which gives files the dates of torch's records: they are before 1980."""
    shutil.unpack_archive(path, folder, "zip")
    for name in folder.rglob("*"):
        os.utime(name, (312_768_000, 312_768_000))


def as_told(message: str, folder: Path, **names: str) -> None:
    """Run the command that a message ends with; names in it that stand for others are replaced."""
    command = message.partition("again, stored: ")[2]
    for name, real in names.items():
        command = command.replace(name, real)
    told = re.fullmatch(r"cd (\S.*) && zip -0 -r (\S+\.pth) (\w+)", command)
    assert told is not None
    if shutil.which("zip") is None:  # packed as zip does it
        above = folder / told[1].strip("'")
        with zipfile.ZipFile(above / told[2], "w", strict_timestamps=False) as out:
            for path in sorted((above / told[3]).rglob("*")):
                out.write(path, path.relative_to(above))
        return
    assert subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("given", ["folder", "data.pkl", "constants.pkl"])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_an_unpacked_archive_is_packed_again_by_what_is_told(given: str, save: Save, tmp_path: Path) -> None:
    folder = tmp_path / "my weights"
    if given == "constants.pkl":
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    unpacked(tmp_path / "model.pt" if given == "constants.pkl" else save(state()), folder)
    if given != "constants.pkl":  # else it is read as it lies
        (folder / "model" / ".data" / "serialization_id").rename(folder / "model" / "id")
        (folder / "model" / "version").rename(folder / "model" / ".data" / "Version")
        (folder / "model" / "byteorder").unlink()
    path = folder / "model" if given == "folder" else folder / "model" / given
    with pytest.raises(CkptkitError, match="a torch archive that was unpacked; pack it again") as caught:
        formats.read(path)
    assert "pickle.load" not in str(caught.value)
    as_told(str(caught.value), tmp_path)
    packed = folder / "model.pth"
    loaded = torch.jit.load(packed).state_dict() if given == "constants.pkl" else torch.load(packed)
    assert loaded.keys() == read(packed).state_dict.keys()
    assert not [record for record in zipfile.ZipFile(packed).infolist() if record.compress_type]


@pytest.mark.parametrize(
    ("method", "called"), [(zipfile.ZIP_BZIP2, r"12 \(bzip2\)"), (zipfile.ZIP_LZMA, r"14 \(LZMA\)")]
)
def test_what_is_told_of_records_that_are_packed_otherwise_helps(
    method: int, called: str, save: Save, tmp_path: Path
) -> None:
    other = tmp_path / "other.pth"
    with zipfile.ZipFile(save(state())) as source, zipfile.ZipFile(other, "w", method) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    with pytest.raises(UnsupportedError, match=f"'model/data.pkl' uses compression method {called}") as caught:
        formats.read(other)
    unpacked(other, tmp_path / "OUT")
    as_told(str(caught.value), tmp_path, FOLDER="model")
    assert (
        torch.load(tmp_path / "OUT" / "NEW.pth").keys()
        == read(tmp_path / "OUT" / "NEW.pth").state_dict.keys()
        == state().keys()
    )
    with pytest.raises(RuntimeError):
        torch.load(other)


def test_names_with_backslashes_are_refused_with_a_way_out(save: Save) -> None:
    path = repacked(save(state()), lambda name, data: (name.replace("/", "\\"), data))
    with pytest.raises(
        AmbiguousError, match=r"'model\\\\data.pkl', with backslashes.*; unpack it .* and pack its folder"
    ):
        formats.read(path)
