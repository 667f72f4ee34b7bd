"""Progress on stderr: on a terminal, or where it is asked for; gone at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptkit
from ckptkit.cli import ending
from ckptkit.cli.ending import progress_line

pty = pytest.importorskip("pty")

LINE = re.compile(r"\s*\d+%  [\d.]+ [kM]?B of [\d.]+ [kM]?B  [\d.]+ [kMGT]?B/s(  \d+:\d\d left)?\s*")


class Clock:
    """Stands for ``time.monotonic``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def shown(text: str) -> list[str]:
    """What stood on the line, one after the other; at last it must have been wiped."""
    *lines, wiped, end = text.split("\r")
    assert (wiped.strip(), end) == ("", "")
    assert len(wiped) >= len(lines[-1].rstrip())
    return [line.rstrip() for line in lines if line]


def test_share_size_rate_and_time_left(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with progress_line(True, quiet=False) as update:
        assert update is not None
        for seconds, done in (
            (1, 10**8),
            (2, 2 * 10**8),
            (0.1, 2 * 10**8 + 5),
            (197, 2 * 10**10),
            (7000, 4 * 10**10 - 1),
        ):
            clock.now += seconds
            update(done, 4 * 10**10)
        clock.now += 0.01
        update(4 * 10**10, 4 * 10**10)
    assert shown(capsys.readouterr().err) == [
        "  0%  100 MB of 40 GB  100 MB/s  6:39 left",
        "  0%  200 MB of 40 GB  66.7 MB/s  9:57 left",
        " 50%  20 GB of 40 GB  100 MB/s  3:20 left",
        " 99%  40 GB of 40 GB  5.56 MB/s  0:00 left",  # a byte is left
        "100%  40 GB of 40 GB  5.56 MB/s  0:00 left",
    ]


def test_hours_are_told_and_nothing_is_divided_by_zero(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with progress_line(True, quiet=False) as update:
        assert update is not None
        update(0, 0)
        clock.now += 1
        update(0, 10**10)
        clock.now += 9
        update(10**6, 10**10)
    assert shown(capsys.readouterr().err) == [
        "100%  0 B of 0 B  0 B/s",
        "  0%  0 B of 10 GB  0 B/s",
        "  0%  1 MB of 10 GB  100 kB/s  27:46:30 left",
    ]


def test_a_shorter_line_leaves_nothing_of_a_longer_one(monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    with progress_line(True, quiet=False) as update:
        assert update is not None
        for done in (10**6, 5 * 10**9, 10**10):
            clock.now += 9
            update(done, 10**10)
    width = 0
    for line in capsys.readouterr().err.split("\r")[1:-1]:
        assert len(line) >= width
        width = len(line.rstrip())


@pytest.mark.parametrize(
    ("wanted", "quiet", "terminal", "there"),
    [
        (None, False, False, False),
        (None, False, True, True),
        (None, True, True, False),
        (True, False, False, True),
        (True, True, True, False),
        (False, False, True, False),
    ],
)
def test_when(monkeypatch, capsys, wanted: bool | None, quiet: bool, terminal: bool, there: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_line(wanted, quiet=quiet) as update:
        assert (update is not None) == there
        if update is not None:
            update(3, 3)
    assert bool(capsys.readouterr().err) == there


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "sharded.safetensors"])
@pytest.mark.parametrize("options", [[], ["--no-check"], ["--dtype", "float16"]], ids=" ".join)
def test_of_a_conversion(save, convert, monkeypatch, name: str, options: list[str]) -> None:
    monkeypatch.setattr(ending, "_SECONDS", -1)
    path = save({f"w{i}": torch.ones(90_000).view(300, 300).t() for i in range(20)})
    sharding = ["--max-shard-size", "2MB"] if name.startswith("sharded") else []
    done = convert(path, name, "--progress", *options, *sharding)
    assert done.code == 0
    line, _, findings = done.err.rpartition("\r")
    lines = shown(line + "\r")
    assert all(LINE.fullmatch(text) for text in lines), lines
    shares = [int(text[:4].strip(" %")) for text in lines]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert len(set(shares)) >= 5
    assert "\r" not in findings


def test_an_error_stands_on_a_line_of_its_own(save, convert, monkeypatch) -> None:
    monkeypatch.setattr(ending, "_SECONDS", -1)
    path = save({"w": torch.ones(4000)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes()) + 400] ^= 0x40
    path.write_bytes(data)
    done = convert(path, "out.pth", "--progress")
    assert done.code == 2
    line, _, error = done.err.rpartition("\r")
    assert shown(line + "\r")
    assert error.startswith("ckptkit: error: ")


def test_silent_unless_it_is_a_terminal(save, convert) -> None:
    path = save({"w": torch.ones(4000)})
    for number, options in enumerate(([], ["--no-progress"], ["-q"], ["-q", "--progress"])):
        assert convert(path, f"{number}.pth", *options).err == ""


@pytest.mark.parametrize(("options", "there"), [([], True), (["--no-progress"], False), (["-q"], False)])
def test_on_a_terminal(save, tmp_path: Path, options: list[str], there: bool) -> None:
    path = save({"w": torch.ones(4000)})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ckptkit", "convert", str(path), str(tmp_path / "out.pth"), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(ckptkit.__file__).parents[1])}
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment, timeout=300)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # how Linux says that nothing is left
        pass
    os.close(ours)
    assert done.returncode == 0
    assert bool(text) == there
    if there:
        assert shown(text.decode())[-1].startswith("100%  ")


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_in_python(save, tmp_path: Path, name: str, check: bool) -> None:
    path = save({f"w{i}": torch.ones(30_000) for i in range(9)})
    calls: list[tuple[int, int]] = []
    ckptkit.convert(path, tmp_path / name, check=check, progress=lambda done, total: calls.append((done, total)))
    (total,) = {total for _, total in calls}
    assert total == (tmp_path / name).stat().st_size * (2 if check else 1)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)
    assert sum(total * 0.55 < done < total * 0.95 for done, _ in calls) >= 3  # the comparison is part of it
