"""Sizes as people write and read them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ckptkit.errors import RewriteError
from ckptkit.report import Finding, apart, convert_command, count_of, human_size, listed, parse_size, share_of


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5G", 5 * 10**9), (" 5 GB ", 5 * 10**9), ("500MB", 500 * 10**6),
        ("1.5GB", 1_500_000_000), ("300 kB", 300_000), ("2T", 2 * 10**12), ("0.5k", 500), ("0.0015kB", 1),
        ("2GiB", 2 << 30), ("2gib", 2 << 30), ("1.5KiB", 1536), ("1MiB", 1 << 20), ("3TiB", 3 << 40),
        ("1000000", 1_000_000), ("7B", 7), ("1", 1), ("0001", 1), ("1.1GB", 1_100_000_000),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GB", "0", "0GB", "0.0001kB", "-1", "-5GB", "+5GB", "nan", "inf", "infGB", "1e9", "5 GB extra", "5GBB",
        "5iB", "5GiBB", "5Gi", "5 PB", "5EB", "1,000", "1_000", "1.5", "1.5B", ".5GB", "5.GB", "5..5GB", "0x10", "five",
        "\u0665GB", "5\u212aB", "5\nGB", "5  GB", "9223372036854775808", "10000000TB", "9" * 20,
        "9" * 1_000_000, "1." + "0" * 99 + "GB",
    ],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(
        RewriteError, match=r"is not a valid size; write it like 5GB, 500MB or 1.5GB, 2GiB, or 1000000"
    ) as caught:
        parse_size(text)
    assert len(str(caught.value)) < 250
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("nbytes", [1, 999, 1000, 12_300, 4_560_000, 7_890_000_000, 1_230_000_000_000])
def test_sizes_that_were_shown_are_understood(nbytes: int) -> None:
    assert parse_size(human_size(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("path", "suffix", "destination"),
    [
        ("x.pth", ".safetensors", "x.safetensors"), ("x.pth.tar", ".safetensors", "x.safetensors"),
        ("best.pth.tar", ".pth", "best.clean.pth"), ("best.pth", ".pth", "best.clean.pth"),
        ("a/b.pt.gz", ".pth", "a/b.pth"),
        ("x.safetensors", ".safetensors", "x.clean.safetensors"), ("x.ckpt.bak", ".safetensors", "x.safetensors"),
        ("model.safetensors.index.json", ".safetensors", "model.safetensors"),
        ("pytorch_model.bin.index.json", ".safetensors", "pytorch_model.safetensors"),
        ("model_v1.5", ".safetensors", "model_v1.5.safetensors"), ("noending", ".pth", "noending.pth"),
        ("runs/ckpt/", ".safetensors", "runs/ckpt.safetensors"), ("epoch=3.5.ckpt", ".pth", "epoch=3.5.pth"),
    ],
)  # fmt: skip
def test_the_name_of_what_is_to_be_written(path: str, suffix: str, destination: str) -> None:
    assert shlex.split(convert_command(path, "--x", suffix=suffix)) == ["ckptkit", "convert", path, destination, "--x"]


def test_a_command_writes_nothing_that_is_there_or_that_another_writes(tmp_path: Path) -> None:
    path, first = f"{tmp_path}/x.pth", f"{tmp_path}/x.safetensors"
    assert first in convert_command(path)
    Path(first).touch()
    assert f"{tmp_path}/x-2.safetensors" in convert_command(path)
    fixes = [convert_command(path), convert_command(path, "--a"), convert_command(path, "--section", "s"), "--b", None]
    told = [Finding(code="c", severity="info", message="m", fix=fix) for fix in [*fixes, fixes[0]]]
    found = [finding.fix and shlex.split(finding.fix)[3:] for finding in apart(told, ["--section", "t", "--i"])]
    second, third, fourth = (f"{tmp_path}/x-{number}.safetensors" for number in (2, 3, 4))
    assert found[:2] == [[second, "--section", "t", "--i"], [third, "--section", "t", "--i", "--a"]]
    assert found[2:] == [[fourth, "--i", "--section", "s"], [], None, found[0]]


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (1, ["tensor"], "1 tensor"), (0, ["tensor"], "0 tensors"), (1200, ["tensor"], "1,200 tensors"),
        (2, ["class"], "2 classes"), (1, ["class"], "1 class"), (3, ["entry"], "3 entries"), (2, ["key"], "2 keys"),
        (1, ["name", "is", "are"], "1 name is"), (2, ["name", "is", "are"], "2 names are"),
    ],
)  # fmt: skip
def test_counts(count: int, words: list[str], text: str) -> None:
    assert count_of(count, *words) == text


@pytest.mark.parametrize(
    ("part", "count", "text"),
    [
        (1, 5, "1 of 5 tensors is"), (2, 5, "2 of 5 tensors are"), (0, 5, "0 of 5 tensors are"),
        (1, 1, "1 of 1 tensor is"), (0, 1, "0 of 1 tensor is"), (1200, 3400, "1,200 of 3,400 tensors are"),
    ],
)  # fmt: skip
def test_shares(part: int, count: int, text: str) -> None:
    assert share_of(part, count, "tensor", "is", "are") == text


def test_lists_are_cut() -> None:
    names = [f"n{n}" for n in range(2000)]
    assert listed(names, 3) == "n0, n1, n2 and 1,997 more"
    assert listed(names[:3], 3) == "n0, n1, n2"
    assert listed(iter(names[:2]), 1, total=9, between="; ") == "n0 and 8 more"
    assert listed([]) == ""
