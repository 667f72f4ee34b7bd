"""What a file is, by its content, and what is said of files that are not checkpoints."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.errors import (
    AmbiguousError,
    CorruptError,
    FileAccessError,
    MissingFileError,
    RewriteError,
    SectionError,
)
from ckptkit.formats.format import Probe
from ckptkit.limits import DEFAULT_LIMITS

Save = Callable[..., Path]


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


WEIGHTS = {"w": torch.ones(2)}


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


def glued(front: bytes, path: Path) -> bytes:
    """Bytes with a zip archive behind them whose directory is right for where it lies."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("archive/data.pkl", b"\x80\x02}.")
    path.write_bytes(front + path.read_bytes())
    with zipfile.ZipFile(path, "a") as out:  # corrects the offsets
        out.writestr("archive/version", b"3\n")
    return path.read_bytes()


@pytest.mark.parametrize("first", ["legacy", "safetensors"])
def test_what_is_another_container_by_its_end_is_refused(first: str, tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    if first == "legacy":
        front = saved(WEIGHTS, _use_new_zipfile_serialization=False)
    else:
        save_file(WEIGHTS, path)
        front = path.read_bytes()
    path.write_bytes(glued(front, tmp_path / "both.zip"))
    assert zipfile.is_zipfile(path)
    with pytest.raises(AmbiguousError, match=r"and a zip archive \(by its end\) at once; readers would disagree"):
        formats.read(path)
    data = path.read_bytes()
    path.write_bytes(data[:-22] + data[-22:-2] + b"\x05\x00" + b"hello")  # a comment behind the directory
    assert zipfile.is_zipfile(path)
    with pytest.raises(AmbiguousError, match="a zip archive"):
        formats.read(path)


def test_data_that_holds_a_zips_signature_is_no_second_container(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    end = b"PK\x05\x06" + bytes(18)
    for data in (end, b"PK\x05\x06" + b"\xff" * 18, b"x" + end[:-1]):
        save_file({"a": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, path)
        assert list(formats.read(path)[0].state_dict) == ["a"]


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
    with pytest.raises(SectionError, match="no section 'ema' contains weights; sections that do: 'model'"):
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
        (
            "a.onnx",
            None,
            "the extension '.onnx' does not belong to a known container; use .pth, .pt, .*.safetensors, or --to",
        ),
        ("noending", None, "the extension '' does not belong to a known container"),
        ("a.pth", "onnx", "unknown container 'onnx'; choose from: .*torch-zip.*safetensors"),
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


def test_the_facts_of_containers_fit_together() -> None:
    for container in formats.FORMATS:
        assert formats.format_named(container.name) is container
        assert container.loader is None or not container.words or container.loader in container.words
        assert bool(container.words) == container.is_program, "of others the kind says what they are"
        assert container.shards is None or formats.format_named(container.shards).writer is not None
