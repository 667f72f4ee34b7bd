"""Progress on stderr: on a terminal, or where it is asked for; gone at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckptkit
from ckptkit import bytesource
from ckptkit.cli import closing, ending, main
from ckptkit.cli.ending import progress_line

pty = pytest.importorskip("pty")

LINE = re.compile(r"\s*\d+%  [\d.]+ [kM]?B of [\d.]+ [kM]?B  [\d.]+ [kMGT]?B/s(  \d+:\d\d left)?\s*")


class Clock:
    """Stands for ``time.monotonic``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


SUMMARY = re.compile(r"ckptkit: 17\.5 kB to 17 kB in (under )?\d\.\d s; 1 tensor compared byte for byte\n")


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
        told = convert(path, f"{number}.pth", *options).err
        assert told == "" if "-q" in options else SUMMARY.fullmatch(told)


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
    line, _, summary = text.decode().replace("\r\n", "\n").rpartition("\r")
    assert summary == "" if "-q" in options else SUMMARY.fullmatch(summary), text
    assert bool(line) == there
    if there:
        assert shown(line + "\r")[-1].startswith("100%  ")


# The line at the end.


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "under 0.1 s"), (0.099, "under 0.1 s"), (0.1, "0.1 s"), (9.94, "9.9 s"), (9.96, "10 s"), (125, "2 min 5 s")],
)
def test_how_long_it_took(seconds: float, told: str) -> None:
    assert closing.lasted(seconds) == told


def test_what_a_command_says_last(run, save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for n in (1, 2):
        save({"w": torch.ones(n * 1000, 100), "b": torch.ones(9)}, f"runs/{n}.pth")
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(100, 3)\n")
    torch.save(torch.nn.Linear(100, 3).state_dict(), "net.pth")
    verified = "2 of 2 tensors loaded and compared, 2 forward passes on cpu in float32, outputs compared with those of"
    model = ["--model", "net.py:build", "--input-shape", "2,100", "--device", "cpu"]
    for words, told in (
        ("convert runs/1.pth a.safetensors", "402 kB to 400 kB in T; 2 tensors compared byte for byte"),
        (
            "convert runs/1.pth b.pth --dtype float16",
            "402 kB to 201 kB in T; 2 tensors compared byte for byte after the cast",
        ),
        ("convert runs/1.pth c.safetensors --no-check", "402 kB to 400 kB in T; 2 tensors not compared"),
        ("convert runs out --to safetensors", "1.2 MB to 1.2 MB in T; 4 tensors in 2 files compared byte for byte"),
        ("check runs/1.pth", "1 file, 402 kB, in T: 1 file passed"),
        ("check runs --max-size 1MB --no-pickle", "2 files, 1.2 MB, in T: 2 of 2 files failed"),
        ("manifest runs", "2 files, 1.2 MB, in T"),
        ("inspect runs", "2 files, 1.2 MB, in T"),
        ("inspect --brief runs", "2 files, 1.2 MB, in T"),
        ("diff runs/1.pth runs/2.pth", "2 tensors of 400 kB in A and 800 kB in B compared in T"),
        (f"verify net.pth {' '.join(model)}", f"{verified} other batches, in T"),
        (f"verify runs/1.pth {' '.join(model)}", "0 of 2 tensors found, in T"),
        ("inspect runs/1.pth", None),
        ("inspect --flat runs", None),
        ("convert runs/1.pth d.pth --dry-run", None),
    ):
        done = run(*words.split())
        last = done.stderr.splitlines()[-1:] if told else [each for each in done.stderr.splitlines() if " in " in each]
        said = [re.sub(r"\b(under )?\d+(\.\d)? s\b", "T", line) for line in last]
        assert said == ([f"ckptkit: {told}"] if told else []), words
        again = [*words.split(), *["--force"] * words.startswith("convert")]
        assert not any("ckptkit: " in run(*again, silent).stderr for silent in ("-q", "--json"))


# Commands that are not told how far they are, but leave word of what they read.


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs a command on a terminal so fast that each change is told: all that stood on the line."""
    monkeypatch.setattr(ending, "_SECONDS", 0)

    def command(*words: object, patience: float = 0) -> list[str]:
        monkeypatch.setattr(ending, "_PATIENCE_SECONDS", patience)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, (out, err)
        assert "\r" not in out
        assert bytesource.pace.tell is None
        told, _, after = err.rpartition("\r")
        assert "%" not in after
        return [line.rstrip() for line in told.split("\r") if line.strip() and not line.startswith("ckptkit")]

    return command


@pytest.fixture
def three(save) -> list[Path]:
    return [save({"w": torch.ones(n, 1000), "t": torch.ones(9, 9)}, f"{n}.pth") for n in (600, 700, 800)]


GOING = re.compile(r" *\d+%(  [\d.]+ [kM]?B of [\d.]+ MB  [\d.]+ [kMGT]?B/s)?(  \d+:\d\d left)?(  \d of 3 files)?")


@pytest.mark.parametrize(
    "words",
    [
        *(["check"], ["check", "--no-nan"], ["manifest"], ["inspect", "--stats"], ["inspect"]),
        *(["check", "--jobs", "2"], ["inspect", "--stats", "--jobs", "2"]),
    ],
    ids=" ".join,
)
def test_bytes_and_files_of_several(watched, three: list[Path], words: list[str]) -> None:
    told = watched(*words, *three)
    assert told
    assert all(GOING.fullmatch(line) for line in told), told
    shares = [int(line[:4].strip(" %")) for line in told]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 3
    assert told[-1].startswith("100%") and told[-1].endswith("  3 of 3 files")
    assert (" of 8.41 MB  " in told[-1]) == (words != ["inspect"]), told[-1]
    if "--jobs" not in words:
        assert watched(*words, *three, "-q") == []
        assert watched(*words, *three, patience=60) == []


def test_what_is_verified_and_how_many_files_were_looked_at(watched, three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(300, 300)\n")
    torch.save(torch.nn.Linear(300, 300).state_dict(), tmp_path / "weights.pth")
    words = ["--model", f"{tmp_path}/net.py:build", "--input-shape", "2,300"]
    told = watched("verify", tmp_path / "weights.pth", *words)
    stages = list(dict.fromkeys(line.rpartition("  ")[0] if line[-3] == ":" else line for line in told))
    assert stages[:3] == ["loading torch", "building the model", "check 1 of 8: fit"]
    assert "check 4 of 8: forward" in stages
    assert any(re.search(r"\d+%  .* of 361 kB  .*check 2 of 8: load$", line) for line in stages), stages
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("not a checkpoint")
    assert "5 files looked at" in watched("check", tmp_path)


def test_the_line_never_wraps(watched, three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    for columns, least in ((200, 50), (40, 20), (24, 15), (3, 2)):
        monkeypatch.setattr(os, "get_terminal_size", lambda fd, columns=columns: os.terminal_size((columns, 24)))
        lines = watched("check", *three)
        assert least <= max(map(len, lines)) < columns, lines


def test_nobody_who_does_not_watch_counts(three: list[Path]) -> None:
    ckptkit.check(three)
    assert (bytesource.pace.read, bytesource.pace.done, bytesource.pace.files) == (0, 0, 0)


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
