"""Archives without a usable directory: how much is missing, and which tensors are whole."""

from __future__ import annotations

import io
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.repeated import repeated

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.truncated import unfinished, what_is_left
from ckptkit.limits import DEFAULT_LIMITS, Limits

Save = Callable[..., Path]


def state() -> dict[str, torch.Tensor]:
    return {f"layer{n}.weight": torch.randn(50, 20 + n) for n in range(10)}


def said(path: Path) -> str:
    with pytest.raises(CorruptError) as caught:
        formats.read(path)
    assert len(str(caught.value)) < 1000
    return caught.value.message


def storage_starts(path: Path) -> dict[str, int]:
    """Where each tensor's bytes lie, as torch says."""
    reader = torch._C.PyTorchFileReader(str(path))
    return {f"layer{n}.weight": reader.get_record_offset(f"data/{n}") for n in range(10)}


@pytest.mark.parametrize("kept", range(10))
def test_a_cut_between_tensors_and_inside_them(kept: int, save: Save) -> None:
    path = save(state())
    data, starts = path.read_bytes(), storage_starts(path)
    for at in (starts[f"layer{kept}.weight"], starts[f"layer{kept}.weight"] + 4 * 50 * (20 + kept) - 1):
        path.write_bytes(data[:at])
        message = said(path)
        assert message.startswith(f"truncated: the file has {at:,} bytes, but at least ")
        expected = int(message.split("at least ")[1].split(" are")[0].replace(",", ""))
        assert at < expected <= len(data)
        assert len(data) - expected < 3000, "only padding and small records are not counted"
        assert f"({expected - at:,} missing); {kept} of 10 tensors {'is' if kept == 1 else 'are'} complete" in message
        assert message.endswith(f"the first incomplete one is 'layer{kept}.weight'. Download or copy the file again")


def test_a_cut_inside_the_pickle(save: Save) -> None:
    path = save(state())
    data = path.read_bytes()
    for at in (90, 200, 800):
        path.write_bytes(data[:at])
        assert said(path) == (
            f"truncated: the file of {at:,} bytes ends before the end of data.pkl, which describes the tensors: "
            "no tensor is present. Download or copy the file again"
        )  # fmt: skip


def test_a_cut_inside_the_first_header(save: Save) -> None:
    path = save(state())
    path.write_bytes(path.read_bytes()[:20])
    assert said(path) == (
        "truncated: the file has 20 bytes, but at least 30 are expected. Download or copy the file again"
    )


def test_a_cut_inside_the_directory(save: Save) -> None:
    path = save(state())
    data = path.read_bytes()
    for at in (data.index(b"PK\x01\x02") + 4, data.index(b"PK\x01\x02") + 300, len(data) - 21, len(data) - 1):
        path.write_bytes(data[:at])
        assert said(path).startswith(
            "truncated: all 10 tensors are complete, but the zip directory after them is missing"
        )


def test_room_that_was_made_and_never_filled(save: Save) -> None:
    path = save(state())
    data, at = path.read_bytes(), storage_starts(path)["layer6.weight"] - 5
    path.write_bytes(data[:at] + bytes(len(data) - at))
    assert "on are zeros; 6 of 10 tensors are complete; the first incomplete one is 'layer6.weight'" in said(path)


def test_headers_that_state_sizes(save: Save, tmp_path: Path) -> None:
    path, target = save(state()), tmp_path / "repacked.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    data = target.read_bytes()
    target.write_bytes(data[: len(data) // 2])
    assert "5 of 10 tensors are complete; the first incomplete one is 'layer5.weight'" in said(target)


def test_names_inside_a_training_file(save: Save) -> None:
    path = save({"epoch": 3, "model": state(), "optimizer": {"state": {0: {"exp_avg": torch.ones(50, 20)}}}})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    # The records lie in the order of their numbers, or in older releases of torch in that of their names: 0, 1, 10, 2.
    assert re.search(r"[34] of 11 tensors are complete; the first incomplete one is 'layer3.weight'", said(path))
    path.write_bytes(data[: data.index(b"PK\x01\x02") - 4000])
    last = r"10 of 11 tensors are complete; the first incomplete one is (that of storage '10'|'layer9.weight')"
    assert re.search(last, said(path))


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (bytes(100), "100 bytes were appended to an archive that ends at byte {end:,} (zeros)"),
        (b"<!DOCTYPE html><HTML>error</HTML>", "33 bytes were appended to an archive that ends at byte {end:,} ("),
        (b"\r\n--boundary--", "14 bytes were appended to an archive that ends at byte {end:,} (they begin b'"),
    ],
)  # fmt: skip
def test_bytes_behind_the_archive(tail: bytes, words: str, save: Save) -> None:
    path = save(state())
    data = path.read_bytes()
    path.write_bytes(data + tail)
    message = said(path)
    assert message.startswith(words.format(end=len(data)))
    assert message.endswith(f"keep what is before them: head -c {len(data)} FILE > FIXED")


def test_two_archives_are_no_appended_bytes(save: Save) -> None:
    path = save(state())
    path.write_bytes(path.read_bytes() + path.read_bytes())
    assert "appended to an archive that ends" not in said(path)


def test_other_archives_get_no_count_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("readme.txt", "x" * 1000)
    path.write_bytes(buffer.getvalue()[:500])
    assert said(path) == (
        "truncated: the file has 500 bytes, but at least 1,040 are expected. Download or copy the file again"
    )


@pytest.mark.parametrize("ending", ["part", "crdownload", "incomplete", "download"])
def test_an_ending_of_a_download(ending: str, save: Save) -> None:
    path = save(state(), f"model.pth.{ending}")
    path.write_bytes(path.read_bytes()[:5000])
    assert said(path).endswith(f"The extension .{ending} means that its download is not finished")
    assert unfinished("model.pth") == ""


@repeated("every", 3, 1)
def test_every_length_of_a_small_file(every: int, save: Save) -> None:
    path = save({"a": torch.ones(3), "b": torch.ones(2)})
    data = path.read_bytes()
    for length in range(len(data) - 1, 3, -every):
        path.write_bytes(data[:length])
        file = SourceFile(path)
        message = what_is_left(file, DEFAULT_LIMITS)
        file.close()
        assert message is not None
        assert message.startswith("truncated: "), length


def test_whatever_is_damaged_too_it_is_a_format_error(save: Save) -> None:
    path = save(state())
    data, random_bits = path.read_bytes(), random.Random(7)
    for _ in range(400):
        damaged = bytearray(data[: random_bits.randrange(100, len(data))])
        for _ in range(3):
            damaged[random_bits.randrange(min(4000, len(damaged)))] ^= 1 << random_bits.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            formats.read(path)


def test_a_file_that_claims_endless_things_is_bounded(tmp_path: Path) -> None:
    header = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 8, 0, 0, 0, 0, 0, 0, 10, 0)
    endless = tmp_path / "endless.pth"
    with open(endless, "wb") as out:
        out.write(header + b"x/data.pkl" + b"\x80\x02" + b"]q\x00" * 100_000)
        out.truncate(1 << 40)
    assert "no end record" in said(endless)
    many = tmp_path / "many.pth"
    many.write_bytes((struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a") * 120_000)
    file = SourceFile(many)
    assert what_is_left(file, Limits()) is None
    file.close()
