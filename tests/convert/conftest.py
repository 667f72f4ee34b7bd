"""The command, called in this process, and what its outputs are held against."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from ckptkit.cli import main


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Convert = Callable[..., Done]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Convert]:
    """``convert(SRC, DST, ...)``: the whole command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    threshold = gc.get_threshold()

    def command(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["convert", *map(str, arguments)])
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    yield command
    gc.set_threshold(*threshold)


@pytest.fixture
def converted(convert: Convert, tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """``converted(SRC, DST, ...)``: what torch or safetensors loads from the output."""

    def load(source: object, destination: str, *options: object) -> dict[str, torch.Tensor]:
        done = convert(source, destination, *options)
        assert done.code == 0, done.err
        path = tmp_path / destination
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
        return loaded

    return load


@pytest.fixture
def agree(same_bits: Callable[[torch.Tensor, torch.Tensor], bool]) -> Callable[..., None]:
    """Assert that two state_dicts hold the same names (in the same order, if asked) and bits."""

    def compare(
        written: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, ordered: bool = True
    ) -> None:
        assert (list(written) if ordered else sorted(written)) == (list(expected) if ordered else sorted(expected))
        assert [name for name in expected if not same_bits(written[name], expected[name])] == []

    return compare


@pytest.fixture
def refused(convert: Convert, tmp_path: Path) -> Callable[..., str]:
    """``refused(SRC, DST, ...)``: exit code 2, one line on stderr, nothing left behind; gives that line."""

    def attempt(*arguments: object) -> str:
        before = sorted(os.listdir(tmp_path))
        done = convert(*arguments)
        assert (done.code, done.out) == (2, ""), done
        (line,) = [line for line in done.err.splitlines() if not line.startswith(("Usage: ", "Try ")) and line]
        assert "internal error" not in line
        assert sorted(os.listdir(tmp_path)) == before
        return line

    return attempt
