"""What a file is, by its content, and what is said of files that are no checkpoint."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.errors import (
    CorruptError,
    FileAccessError,
    MissingFileError,
    RewriteError,
    SectionError,
    UnknownFormatError,
)
from ckptkit.formats.first_bytes import describe
from ckptkit.formats.format import Probe
from ckptkit.limits import DEFAULT_LIMITS

Save = Callable[..., Path]


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tarred(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.arange(3))
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    numpy.savez(buffer, weight=numpy.arange(3))
    return buffer.getvalue()


WEIGHTS = {"w": torch.ones(2)}
DIGEST = hashlib.sha256(b"").hexdigest()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{DIGEST}\nsize 102530333\n".encode()
LEGACY = "legacy format .before torch 1.6.*torch.load and torch.save rewrite it"

NO_CHECKPOINTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty .0 bytes.: an interrupted download"),
    "git-lfs pointer": (lambda: POINTER, rf"git-lfs pointer, not the file of 102,530,333 bytes .sha256 {DIGEST}. "
                                         "it stands for; run: git lfs pull"),
    "odd pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\nsize x\n", "not the file it stands for"),
    "html": (lambda: b"<!DOCTYPE html>\n<html>", "an HTML page, not a checkpoint"),
    "html in capitals": (lambda: b"\n\n  <HTML><head>", "an HTML page, not a checkpoint"),
    "html with spaces": (lambda: b"<!doctype  HTML PUBLIC>", "an HTML page, not a checkpoint"),
    "gzip": (lambda: gzip.compress(saved(WEIGHTS)), "gzip-compressed; decompress it first"),
    "xz": (lambda: lzma.compress(saved(WEIGHTS)), "xz-compressed; decompress it first"),
    "bzip2": (lambda: bz2.compress(saved(WEIGHTS)), "bzip2-compressed; decompress it first"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(20), "zstd-compressed; decompress it first"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(20), "7z archive; unpack it first"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
    "gguf": (lambda: b"GGUF" + struct.pack("<I", 3), "a GGUF file"),
    "npy": (npy, "a numpy array"),
    "npz": (npz, "a zip archive without data.pkl is no checkpoint; it begins with 'weight.npy'"),
    "empty zip": (lambda: b"PK\x05\x06" + bytes(18), "an empty zip archive"),
    "text": (lambda: b"hello, world", "a text file, not a checkpoint; it begins with b'hello, world'"),
    "utf-8 text": (lambda: "größe".encode(), "a text file, not a checkpoint"),
    "json": (lambda: json.dumps({"weight_map": {"a": "b"}}).encode(), "a text file, not a checkpoint"),
    "pickle": (lambda: pickle.dumps({"a": 1}, 4), "a Python pickle, but not one torch.save wrote"),
    "pickle of protocol 2": (lambda: pickle.dumps({"a": 1}, 2), "a Python pickle, but not one torch.save wrote"),
    "legacy": (lambda: saved(WEIGHTS, _use_new_zipfile_serialization=False), LEGACY),
    "legacy of protocol 4": (lambda: saved(WEIGHTS, _use_new_zipfile_serialization=False, pickle_protocol=4), LEGACY),
    "tar": (lambda: tarred(readme=b"hi"), "a tar archive; torch's own tar format"),
    "noise": (lambda: bytes(range(128, 140)) + b"\x01", "no known checkpoint container; .* the bytes 80 81 82"),
    "one byte": (lambda: b"\x00", "begins with the bytes 00"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    make, words = NO_CHECKPOINTS[name]
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    with pytest.raises(UnknownFormatError, match=words) as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ending", ["pth", "safetensors", "txt", "", "tar"])
def test_the_ending_says_nothing(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{ending}"
    path.write_bytes(saved(WEIGHTS))
    assert formats.detect(Probe(SourceFile(path), DEFAULT_LIMITS)).name == "torch-zip"
    save_file(WEIGHTS, path)
    assert formats.detect(Probe(SourceFile(path), DEFAULT_LIMITS)).name == "safetensors"


def test_what_begins_like_two_containers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    path.write_bytes(b"PK\x03\x04\x00\x00\x00\x00{" + bytes(100))
    with pytest.raises(CorruptError, match="begins like a zip archive but has no end record"):
        formats.read(path)


@pytest.mark.parametrize("length", range(1, 600, 7))
def test_any_first_bytes_of_anything_are_described_in_one_line(length: int) -> None:
    for make, _ in NO_CHECKPOINTS.values():
        text = describe(make()[:length][:512], length)
        assert text
        assert "\n" not in text


def test_a_text_with_controls_is_shown_escaped() -> None:
    assert describe(b"line\none\ttwo", 12) == "a text file, not a checkpoint; it begins with b'line\\none\\ttwo'"


# Files that cannot be opened.


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        formats.read(tmp_path / "gone.pth")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="is a folder, not a file"):
        formats.read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileAccessError, match="is not a regular file"):
        formats.read(tmp_path / "pipe")


def test_a_name_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="cannot be opened"):
        formats.read(f"{tmp_path}/a\0b")


def test_an_unknown_section_closes_the_file(save: Save) -> None:
    with pytest.raises(SectionError, match="no section 'ema' holds weights; sections that do: 'model'"):
        formats.read(save({"model": WEIGHTS, "epoch": 1}), section="ema")


# Choosing what to write.


@pytest.mark.parametrize(
    ("destination", "name", "expected"),
    [
        ("a.safetensors", None, "safetensors"),
        ("A.SAFETENSORS", None, "safetensors"),
        ("a.pth", None, "torch-zip"),
        ("a.b.pt", None, "torch-zip"),
        ("a.ckpt", None, "torch-zip"),
        ("a.bin", None, "torch-zip"),
        ("a.pkl", None, "torch-zip"),
        ("a.pth", "safetensors", "safetensors"),
        ("anything", "torch-zip", "torch-zip"),
        ("anything", "pth", "torch-zip"),
        (Path("folder.pth/a.safetensors"), None, "safetensors"),
    ],
)
def test_the_destination_chooses_the_container(destination: Any, name: str | None, expected: str) -> None:
    assert formats.format_for(destination, name).name == expected


@pytest.mark.parametrize(
    ("destination", "name", "words"),
    [
        ("a.onnx", None, "the ending '.onnx' chooses no container; use .pth, .pt, .*.safetensors, or --to"),
        ("noending", None, "the ending '' chooses no container"),
        ("a.pth", "onnx", "no container 'onnx'; one of: .*torch-zip.*safetensors"),
    ],
)
def test_a_destination_that_chooses_nothing(destination: str, name: str | None, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        formats.format_for(destination, name)


def test_names_and_endings_are_unique() -> None:
    names = [container.name for container in formats.FORMATS]
    suffixes = [suffix for container in formats.FORMATS for suffix in container.suffixes]
    assert len(set(names)) == len(names)
    assert len(set(suffixes)) == len(suffixes)
    assert set(suffixes) == formats.SUFFIXES
    assert all(suffix.startswith(".") and suffix.islower() for suffix in suffixes)
