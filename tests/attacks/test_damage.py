"""Every fixture cut short and with bits flipped, throughout: an error of ckptkit's own, or a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.repeated import repeated

import ckptkit
from ckptkit import formats
from ckptkit.errors import CkptkitError
from ckptkit.inspection import survey

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = sorted(
    path.name for path in FIXTURES.iterdir() if path.name.endswith((".pth", ".pt", ".safetensors", ".index.json"))
)
POINTS = 60
"""Places in each file, beside its ends: the structure of a small one is hit everywhere."""

LARGE = 100_000
"""From this many bytes on a look takes long, and a third of the places must do: smaller ones of its container have all."""


def places(nbytes: int) -> list[int]:
    ends = [*range(min(nbytes, 64)), *range(max(0, nbytes - 64), nbytes)]
    found = sorted({*ends, *range(0, nbytes, max(1, nbytes // POINTS))})
    return found[:: 3 if nbytes > LARGE else 1]


def read(path: Path) -> str | None:
    """The message of the error; ``None``: it was read."""
    try:
        checkpoint, file = formats.read(path)
    except CkptkitError as error:
        return str(error)
    survey(checkpoint)
    file.close()
    return None


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    return tmp_path / "fixtures"


every_so_many = repeated("every", 3, 1)


@every_so_many
@pytest.mark.parametrize("name", NAMES)
def test_cut_short(name: str, every: int, damaged: Path) -> None:
    data = (FIXTURES / name).read_bytes()
    for length in places(len(data))[::-every]:
        os.truncate(damaged / name, length)
        said = read(damaged / name)
        # JSON may lose the line break at its end, and nothing else.
        assert said is not None or data[length:].isspace(), f"{length} of {len(data)} bytes were read"
        assert said is None or "\n" not in said


@every_so_many
@pytest.mark.parametrize("name", NAMES)
def test_bits_flipped(name: str, every: int, damaged: Path) -> None:
    data = (FIXTURES / name).read_bytes()
    refused = 0
    with (damaged / name).open("r+b", buffering=0) as file:
        for place in places(len(data))[::every]:
            os.pwrite(file.fileno(), bytes([data[place] ^ 1 << place % 8]), place)
            refused += read(damaged / name) is not None
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert (damaged / name).read_bytes() == data
    assert refused > 0


def test_the_fixtures_themselves_are_read() -> None:
    assert len(NAMES) > 8
    for name in NAMES:
        ckptkit.open(FIXTURES / name).close()
