"""Every pickle counts where a policy speaks of pickles: whoever wrote it, and wherever it lies."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.checkpoint import trust_of
from ckptkit.formats.contents import look_inside
from ckptkit.formats.magic import guess_pickle
from ckptkit.limits import Limits
from ckptkit.pickling import reader
from ckptkit.released.results import CheckReport


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


class Own:
    """A class that nobody has heard of."""


def torchs(value: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2), "x": value}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def array(value: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([value, None], dtype=object))
    return buffer.getvalue()


KINDS: dict[str, Callable[[object], bytes]] = {
    **{f"protocol-{number}": lambda value, number=number: pickle.dumps([1, value], number) for number in range(6)},
    "behind-a-value": lambda value: b"I1\n0" + pickle.dumps(value, 0),
    "second-in-a-row": lambda value: pickle.dumps([1], 0) + pickle.dumps(value, 0),
    "breaks-off": lambda value: pickle.dumps(value, 0)[:-1] + b"\xff and so on",
    "behind-a-long-text": lambda value: pickle.dumps(["x" * 5000, value], 0),
    "array-of-objects": array,
    "with-odd-numbers": lambda value: b"I\r1\n0F\t1\n0" + pickle.dumps(value, 0),
    "with-the-stack-moved": lambda value: b"I1\n20" + pickle.dumps(value, 0),
}


def zipped(method: int) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as file:
            file.writestr("README.md", "words " * 100)
            file.writestr("some/where", data)
        return buffer.getvalue()

    return pack


def tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in (("words", b"words"), ("some/where", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


PLACES: dict[str, Callable[[bytes], bytes]] = {
    "a file": lambda data: data,
    "a zip": zipped(zipfile.ZIP_STORED),
    "a deflated zip": zipped(zipfile.ZIP_DEFLATED),
    "a tar": tarred,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One safe checkpoint and a text."""
    save_file({"w": torch.ones(2)}, tmp_path / "net.safetensors")
    (tmp_path / "README.md").write_text("# weights\n")
    return tmp_path


def codes(report: CheckReport) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in report.findings:
        found.setdefault(Path(finding.path).name, set()).add(finding.code)
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_counts_whoever_wrote_it_and_wherever_it_lies(folder: Path, kind: str, place: str) -> None:
    hostile, foreign = (PLACES[place](KINDS[kind](value)) for value in (Runs(), Own()))
    for name in ("notes.txt", "data.bin", ".m.0123abcd.tmp"):
        path = folder / name
        path.write_bytes(hostile)
        report = ckptkit.check(folder, no_pickle=True, max_trust="safe")
        assert report.exit_code == 1
        assert codes(report) == {name: {"pickle-not-allowed", "trust-not-allowed"}}
        assert any("system" in finding.message for finding in report.findings)
        assert ckptkit.check(folder, max_trust="needs_trust").exit_code == 1
        path.write_bytes(foreign)
        assert codes(ckptkit.check(folder, no_pickle=True)) == {name: {"pickle-not-allowed"}}
        assert codes(ckptkit.check(folder, max_trust="safe")) == {name: {"trust-not-allowed"}}
        assert ckptkit.check(folder).exit_code == 0
        path.unlink()


def bare(value: object, protocol: int) -> bytes:
    """A pickle that does not declare its protocol."""
    return pickle.dumps(value, protocol)[2:]


def framed(value: object, nbytes: int = 0) -> bytes:
    """One that begins with a frame, and may say that it has other bytes than there are."""
    body = bare([value, "x" * 300], 4)
    assert body[:1] == b"\x95"
    return b"\x95" + struct.pack("<Q", nbytes) + body[9:] if nbytes else body


def array_file(header: str, values: bytes) -> bytes:
    data = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(data)) + data + values


def npz(value: object) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, numbers=np.ones(9), objects=np.array([value, None], dtype=object))
    return buffer.getvalue()


ARRAY = "{'descr': %s, 'fortran_order': False, 'shape': (1,), }"

HIDDEN: dict[str, Callable[[object], bytes]] = {
    # What whoever writes it begins with.
    "FRAME": framed,
    "FRAME of bytes that are not there": lambda value: framed(value, 1 << 20),
    "no PROTO, protocol 2": lambda value: bare(value, 2),
    "no PROTO, protocol 3": lambda value: bare(value, 3),
    "NONE": lambda value: b"N0" + bare(value, 2),
    "NEWTRUE": lambda value: b"\x880" + bare(value, 3),
    "EMPTY_SET": lambda value: b"\x8f0" + bare(value, 2),
    "LONG1": lambda value: b"\x8a\x01\x010" + bare(value, 2),
    "LONG4": lambda value: b"\x8b\x01\0\0\0\x010" + bare(value, 2),
    "a large LONG4": lambda value: b"\x8b\0\x08\0\0" + bytes(2048) + b"0" + bare(value, 2),
    "BINUNICODE8": lambda value: b"\x8d\x02" + bytes(7) + b"ab0" + bare(value, 2),
    "BYTEARRAY8": lambda value: b"\x96\x02" + bytes(7) + b"ab0" + bare(value, 2),
    "EXT1": lambda value: b"\x82\x010" + bare(value, 2),
    "NEXT_BUFFER": lambda value: b"\x970" + bare(value, 2),
    "PERSID": lambda value: b"Pid\n0" + pickle.dumps(value, 0),
    "two PROTO": lambda value: b"\x80\x04" + pickle.dumps(value, 4),
    "a long text": lambda value: b"X" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"0" + bare(value, 2),
    # Other readers go on where ours stops.
    "a long number": lambda value: b"F0." + b"0" * 5000 + b"\n0" + pickle.dumps(value, 0),
    "a number with zeros before it": lambda value: b"Np" + b"0" * 40 + b"1\n0" + pickle.dumps(value, 0),
    "a number in base 16": lambda value: b"I 0x1\n0" + pickle.dumps(value, 0),
    "a number of other letters": lambda value: b"F Infinity \n0" + pickle.dumps(value, 0),
    "no number": lambda value: b"I\n0" + pickle.dumps(value, 0),
    "several values": lambda value: b"NNN." + pickle.dumps(value, 4),
    "arguments before DUP": lambda value: b"(S'x'\ntp1\n0N200" + pickle.dumps(value, 0),
    "the letter of another name before it": lambda value: b"N2Kc00" + pickle.dumps(value, 0),
    "breaks off, protocol 4": lambda value: bare([value], 4)[:-1] + b"\xff\xff",
    # What it looks like.
    "a program of ExecuTorch": lambda value: b"S'abET12'\n0" + pickle.dumps(value, 0),
    "Python's bytecode": lambda value: b"C\x10\r\n" + bytes(14) + b"0" + bare(value, 3),
    "a value, then a pickle": lambda value: b"N." + pickle.dumps(value, 4),
    # Arrays, whose headers numpy evaluates.
    "objects by another name": lambda value: array_file(ARRAY % "'object'", pickle.dumps(value, 2)),
    "objects among others": lambda value: array_file(ARRAY % "'i4,O'", pickle.dumps(value, 0)),
    "objects, escaped": lambda value: array_file(ARRAY % r"'\x4f'", pickle.dumps(value)),
    "objects, far behind": lambda value: array_file(ARRAY % (" " * 900 + "'|O'"), pickle.dumps(value)),
    "objects in records": lambda value: array_file(ARRAY % "[('a', '<f4'), ('b', '|O')]", pickle.dumps(value)),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_pickle_is_found_however_it_begins_and_whatever_it_looks_like(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "notes.txt"
    for place, pack in PLACES.items():
        for value in (Runs(), Own()):
            path.write_bytes(pack(HIDDEN[kind](value)))
            inside = look_inside(str(path))
            assert inside.pickles == (("" if place == "a file" else "some/where"),), place
            worst = trust_of(inside.globals)
            assert worst == "hostile" if isinstance(value, Runs) else (worst == "needs_trust" or inside.beyond), place
            assert place != "a file" or kind.startswith("objects") or guess_pickle(path.read_bytes()[:512], 1 << 22)


def test_archives_of_arrays_and_of_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for content, pickles, trust in (
        (npz(Runs()), ("objects.npy",), "hostile"),
        (npz(Own()), ("objects.npy",), "needs_trust"),
        (zipped(zipfile.ZIP_DEFLATED)(torchs(Runs())), ("some/where",), "hostile"),
        (tarred(torchs(Own())), ("some/where",), "needs_trust"),
    ):
        path.write_bytes(content)
        inside = look_inside(str(path))
        assert (inside.pickles, inside.beyond) == (pickles, ())
        assert trust_of(inside.globals) == trust


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_text_pickle_without_names_is_one(folder: Path, protocol: int) -> None:
    for place, pack in PLACES.items():
        for behind in (b"", b"\n", bytes(12)):
            (folder / "x").write_bytes(pack(pickle.dumps({"a": 1}, protocol) + behind))
            assert codes(ckptkit.check(folder, no_pickle=True)) == {"x": {"pickle-not-allowed"}}, place
            assert ckptkit.check(folder, max_trust="safe").exit_code == 0


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", [place for place in PLACES if place != "a file"])
def test_a_checkpoint_in_an_archive_counts(folder: Path, place: str, is_zip: bool) -> None:
    (folder / "release.zip").write_bytes(PLACES[place](torchs(Runs(), zipped=is_zip)))
    report = ckptkit.check(folder, no_pickle=True, max_trust="safe")
    assert report.exit_code == 1
    assert codes(report) == {"release.zip": {"pickle-not-allowed", "trust-not-allowed"}}
    assert next(f for f in report.findings if f.rule == "no-pickle").found == ["some/where"]
    (folder / "release.zip").write_bytes(PLACES[place](torchs(1, zipped=is_zip)))
    assert ckptkit.check(folder, no_pickle=True).exit_code == 1
    assert ckptkit.check(folder, max_trust="safe").exit_code == 0, "torch's own names need no trust"


def test_without_such_a_policy_hostile_pickles_fail_and_others_are_counted(folder: Path) -> None:
    (folder / "a").write_bytes(pickle.dumps(Own()))
    (folder / "b.npz").write_bytes(zipped(zipfile.ZIP_STORED)(array(Own())))
    report = ckptkit.check(folder)
    assert (report.exit_code, report.passed_over) == (0, {"text file": 1, "pickle": 1, "zip archive": 1})
    (folder / "c").write_bytes(pickle.dumps(Runs(), 0))
    report = ckptkit.check(folder)
    assert (report.exit_code, codes(report)) == (1, {"c": {"trust-not-allowed"}})
    assert report.passed_over == {"text file": 1, "pickle": 1, "zip archive": 1}, "what has a result is not passed over"


HARMLESS = [
    b"cat\ndog\nbird\n", b"cpu\ncuda\n", b"Copyright (c) 2026 somebody", b"N.B. this is a text\n", b"I am a text\n",
    b"If so\n", b"MIT License\n\nPermission\n", b"(c) 2026\n", b"[1, 2]\n", b"]\n", b"Version 3 of it\n", b"Some\n",
    b"False\n", b"The weights\n", b"}\n", b"Keras\n", b"Go\n", b"Usage: x\n", b"Xi\n", b"Bob\n", b"Load it\n", b"(dp\n",
    b"cache\nbuild\n.venv\n", b"Mar. 2026\n", b"cat\ndog\n(three)\n", b"Notes\nmacos\nsystem\n",
    b"Fix it\n", b"F1 score\n",
    b"K-2 Black Spider\nmusic\nbooks\nNothing\n", b"I dance\nalone\nNever\n", b"Python\nnumpy\n", b"L01\nL02\n" * 900,
    b"\x93NUMPY\x01\0v\0" + (ARRAY % "[('old', '<f4')]").encode().ljust(117) + b"\nN...", b"\x80\x02\x00\x3f" * 9,
    b"class Net:\n    def f(self):\n        pass\n", b"import os\nos.system\n", b"\x89PNG\r\n\x1a\n" + bytes(40),
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }" + b" " * 59 + b"\ncos\nsys\n",
]  # fmt: skip


@pytest.mark.parametrize("content", HARMLESS)
def test_what_only_begins_like_one_is_none(folder: Path, content: bytes) -> None:
    for number, (name, pack) in enumerate(PLACES.items()):
        (folder / f"{number} {name}").write_bytes(pack(content))
    report = ckptkit.check(folder, no_pickle=True, max_trust="safe")
    assert report.exit_code == 0, report.findings
    assert sum(report.passed_over.values()) == 1 + len(PLACES)


def encrypted(data: bytes) -> bytes:
    """A zip archive whose second record says that it is encrypted."""
    packed = bytearray(zipped(zipfile.ZIP_STORED)(data))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        packed[packed.rindex(signature) + offset] |= 1
    return bytes(packed)


BEYOND: dict[str, Callable[[bytes], bytes]] = {
    "zip in zip": lambda data: zipped(zipfile.ZIP_STORED)(zipped(zipfile.ZIP_STORED)(data)),
    "zip in deflated zip": lambda data: zipped(zipfile.ZIP_DEFLATED)(zipped(zipfile.ZIP_DEFLATED)(data)),
    "tar in zip": lambda data: zipped(zipfile.ZIP_STORED)(tarred(data)),
    "zip in tar": lambda data: tarred(zipped(zipfile.ZIP_STORED)(data)),
    "tar in tar": lambda data: tarred(tarred(data)),
    "gz": gzip.compress,
    "gz in zip": lambda data: zipped(zipfile.ZIP_STORED)(gzip.compress(data)),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zlib": zlib.compress,
    "zlib, best": lambda data: zlib.compress(data, 9),
    "zst": lambda data: b"\x28\xb5\x2f\xfd\x04\x00" + data,
    "lz4": lambda data: b"\x04\x22\x4d\x18" + data,
    "joblib": lambda data: zlib.compress(data, 3),
    "an old joblib": lambda data: b"ZF0x19              " + zlib.compress(data),
    "a Debian package": lambda data: b"!<arch>\n" + data,
    "7z": lambda data: b"7z\xbc\xaf\x27\x1c" + data,
    "rar": lambda data: b"Rar!\x1a\x07\x01\x00" + data,
    "encrypted": encrypted,
    "behind a program": lambda data: b"\x7fELF" + bytes(99) + zipped(zipfile.ZIP_STORED)(data),
    "behind an image": lambda data: b"\xff\xd8\xff\xe0" + bytes(99) + zipped(zipfile.ZIP_STORED)(data),
    "cut off": lambda data: zipped(zipfile.ZIP_STORED)(data)[:-9],
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_cannot_be_looked_into_is_neither_passed_nor_failed(folder: Path, kind: str) -> None:
    (folder / "data").write_bytes(BEYOND[kind](pickle.dumps([1, Runs()])))
    for policy in ({"no_pickle": True}, {"max_trust": "safe"}, {"max_trust": "needs_trust"}):
        report = ckptkit.check(folder, **policy)
        assert (report.exit_code, codes(report)) == (2, {"data": {"not-looked-into"}})
        assert report.verdict == "1 of 2 files could not be checked, 1 passed"
    report = ckptkit.check(folder)
    assert (report.exit_code, sum(report.passed_over.values())) == (0, 2)


def test_a_file_that_is_known_to_break_a_rule_needs_no_more(folder: Path) -> None:
    both = io.BytesIO()
    with zipfile.ZipFile(both, "w") as file:
        file.writestr("a", pickle.dumps(Runs()))
        file.writestr("b.gz", gzip.compress(b""))
    (folder / "both.zip").write_bytes(both.getvalue())
    assert ckptkit.check(folder, no_pickle=True).exit_code == 1
    assert ckptkit.check(folder, max_trust="needs_trust").exit_code == 1
    (folder / "own.pkl").write_bytes(pickle.dumps(Own()) + b"\xff\xff more")
    (folder / "both.zip").unlink()
    assert ckptkit.check(folder, no_pickle=True).exit_code == 1
    assert codes(ckptkit.check(folder, max_trust="needs_trust")) == {"own.pkl": {"not-looked-into"}}


def test_a_pickle_that_is_a_tar_too(folder: Path) -> None:
    member = tarfile.TarInfo("name").tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(pickle.dumps(Runs(), 0).ljust(100, b"\0") + member[100:148] + b" " * 8 + member[156:])
    header[148:156] = b"%06o\0 " % sum(header)
    (folder / "x").write_bytes(bytes(header) + bytes(10240))
    report = ckptkit.check(folder, no_pickle=True, max_trust="needs_trust")
    assert (report.exit_code, codes(report)) == (1, {"x": {"pickle-not-allowed", "trust-not-allowed"}})


def test_the_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zipped(zipfile.ZIP_DEFLATED)(pickle.dumps([Runs(), "x" * 9000])))
    assert look_inside(str(path)).pickles == ("some/where",)
    assert look_inside(str(path), Limits(members=1)).beyond == (("", "more than 1 members"),)
    ((name, why),) = look_inside(str(path), Limits(looked_nbytes=5000)).beyond
    assert name == "some/where" and "more than the limit" in why
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(str(number), b"\x80\x04N" + bytes(1 << 20))
    path.write_bytes(bomb.getvalue())
    assert {name for name, _ in look_inside(str(path), Limits(looked_nbytes=3 << 20)).beyond} == {"0", "1", "2"}


def test_first_bytes_that_do_not_tell() -> None:
    text = b"S'" + b"x" * 3000 + b"'\n0" + pickle.dumps(Runs(), 0)
    assert guess_pickle(text[:512], len(text)) == "maybe"
    assert guess_pickle(b"", 0) is None
    assert guess_pickle(pickle.dumps(3, 0), 4) == "pickle"


@pytest.mark.parametrize("name", ["data.zip", "model.pth", "x"])
def test_a_file_that_is_named_cannot_be_read_and_its_pickle_is_named(tmp_path: Path, name: str) -> None:
    for content in (zipped(zipfile.ZIP_STORED)(pickle.dumps(Runs())), pickle.dumps(Runs()), pickle.dumps(Runs(), 0)):
        (tmp_path / name).write_bytes(content)
        report = ckptkit.check(tmp_path / name, no_pickle=True, max_trust="safe")
        assert report.exit_code == 2
        assert codes(report) == {name: {"file-unreadable", "pickle-not-allowed", "trust-not-allowed"}}
        assert codes(ckptkit.check(tmp_path / name)) == {name: {"file-unreadable"}}


def test_policies_for_some_files_alone(folder: Path) -> None:
    (folder / "cache.joblib").write_bytes(pickle.dumps(Own()))
    (folder / "ckptkit.toml").write_text('no-pickle = true\n[[overrides]]\nfiles = ["*.joblib"]\nno-pickle = false\n')
    assert ckptkit.check(folder, config=folder / "ckptkit.toml").exit_code == 0
    (folder / "other").write_bytes(pickle.dumps(Own()))
    assert codes(ckptkit.check(folder, config=folder / "ckptkit.toml")) == {"other": {"pickle-not-allowed"}}


def test_a_manifest_counts_the_pickles_beside_its_files(folder: Path) -> None:
    made = ckptkit.manifest(folder, folder / "w.lock.json")
    assert made.passed_over == {"text file": 1}
    (folder / "x").write_bytes(pickle.dumps(Own()))
    assert ckptkit.check(manifest=folder / "w.lock.json").passed_over == {"text file": 1, "pickle": 1}
    report = ckptkit.check(manifest=folder / "w.lock.json", no_pickle=True)
    assert (report.exit_code, codes(report)) == (1, {"x": {"pickle-not-allowed"}})
    assert json.loads(report.to_json())["passed_over"] == {"text file": 1}


def test_a_folder_with_pickles_alone_fails_and_one_with_texts_is_nothing_checked(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps(Own()))
    assert ckptkit.check(tmp_path, no_pickle=True).exit_code == 1
    report = ckptkit.check(tmp_path)
    assert (report.exit_code, codes(report)) == (2, {tmp_path.name: {"nothing-selected"}})
    assert "skipped: 1 file (1 pickle)" in report.findings[0].message


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_metadata_of_a_sharded_checkpoint_is_a_pickle_too(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, "save"):
        pytest.skip(f"torch {torch.__version__} has no torch.distributed.checkpoint.save (2.2)")
    dcp.save({"w": torch.ones(4)}, checkpoint_id=folder / "step")
    report = ckptkit.check(folder, no_pickle=True)
    assert (report.exit_code, codes(report)) == (1, {"step": {"pickle-not-allowed"}})
    assert ckptkit.check(folder).exit_code == 0


def test_pickles_without_end_are_left_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(str(number), b"N0" * 5000)
    runs: list[int] = []
    real = reader._run
    monkeypatch.setattr(reader, "_run", lambda machine: runs.append(1) or real(machine))
    found = look_inside(str(tmp_path / "many.zip"), Limits(opcodes=1000))
    assert [name for name, _ in found.beyond] == ["0", "1", "2", "3", "4"]
    assert len(runs) < 10  # the first, and the first bytes of each
