"""``check`` of very many files and ``report`` as they are typed: lists, parts, lines as they come, ways to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file
from support.commands import output_of

import ckptkit
from ckptkit.cli.check import RENDERERS
from ckptkit.cli.check import command as check
from ckptkit.cli.inspect import command as inspect
from ckptkit.cli.manifest import command as manifest
from ckptkit.cli.report import command as report
from ckptkit.errors import CkptkitError, FileAccessError, MissingFileError, VerifyError

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: five checkpoints, one of them with NaN, and what is none."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        torch.save({"a": torch.full((3,), float(number))}, f"{number}.pth")
    save_file({"a": torch.ones(2)}, "s.safetensors")
    torch.save({"a": torch.tensor([torch.nan])}, "nan.pth")
    Path("notes.txt").write_text("none")
    return tmp_path


def runs(count: int = 2, *arguments: str) -> list[str]:
    """The files of a job array over all that is in the folder."""
    parts = range(1, count + 1)
    texts = [output_of(check, ".", *arguments, "--part", f"{i}/{count}", "--json-lines", code=None) for i in parts]
    for index, text in zip(parts, texts, strict=True):
        Path(f"{index}.jsonl").write_text(text)
    return [f"{index}.jsonl" for index in parts]


@pytest.mark.parametrize("shown", sorted(RENDERERS))
def test_a_report_looks_like_the_check_of_all(shown: str) -> None:
    whole = output_of(check, ".", "--no-nan", "--format", shown, code=1)
    text = output_of(report, *runs(2, "--no-nan"), "--format", shown, code=1)
    if shown == "junit":
        text, whole = (re.sub(r'time(stamp)?="[^"]*"', "", each) for each in (text, whole))
    assert text == whole


def test_of_several_outputs_one() -> None:
    first, second = runs()
    lines = output_of(report, first, second, "--json-lines")
    Path("whole.jsonl").write_text(lines)
    head, *_, end = map(json.loads, lines.splitlines())
    assert (head["part"], end["results"], end["exit_code"]) == (None, 5, 0)
    assert output_of(report, "whole.jsonl") == output_of(report, first, second)
    assert output_of(report, "-", second, stdin=Path(first).read_bytes()) == output_of(report, first, second)
    for other in ("--json", "--format=junit"):
        for command, path in ((check, "."), (report, first)):
            with pytest.raises(click.UsageError, match=r"--json-lines and --format .*: give only one of them"):
                output_of(command, path, "--json-lines", other)


def test_a_report_that_cannot_be_made() -> None:
    with pytest.raises(click.MissingParameter):
        output_of(report)
    with pytest.raises(MissingFileError):
        output_of(report, "nope.jsonl")
    lines = output_of(report, runs()[0], code=2).splitlines()
    place = lines.index("1.jsonl: NOT CHECKED")
    assert lines[place + 1] == "  error: report: no run has reported on 1 part of 2: 2/2 [part-missing]"
    assert re.fullmatch(r"1 of \d files could not be checked, \d passed", lines[-1])


def test_an_empty_part_says_so() -> None:
    said = [output_of(check, "0.pth", "--part", f"{index}/2") for index in (1, 2)]
    empty = next(index for index, text in enumerate(said) if "0.pth" not in text)
    assert said[empty] == f"part {empty + 1}/2 has no files\n"
    document = json.loads(output_of(check, "0.pth", "--part", f"{empty + 1}/2", "--json"))
    assert (document["ok"], document["files"], document["part"]) == (True, [], f"{empty + 1}/2")
    with pytest.raises(VerifyError, match="part '3/2': expected I/N"):
        output_of(check, "0.pth", "--part", "3/2")


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_lists_of_files(separator: str) -> None:
    Path("list").write_text(separator.join(["0.pth", "", "s.safetensors", "nope.pth"]))
    plain = output_of(check, "0.pth", "s.safetensors", "nope.pth", "nan.pth", code=2)
    assert output_of(check, "nan.pth", "--files-from", "list", code=2) == plain
    assert output_of(check, "nan.pth", "--files-from", "-", stdin=Path("list").read_bytes(), code=2) == plain
    Path("list").write_text(separator.join(["0.pth", "s.safetensors"]))
    assert output_of(inspect, "--files-from", "list", "--json") == output_of(
        inspect, "0.pth", "s.safetensors", "--json"
    )
    assert output_of(manifest, "--files-from", "list") == output_of(manifest, "0.pth", "s.safetensors")


def test_an_empty_list_is_not_all_there_is() -> None:
    """Neither what is configured nor what the manifest names is meant by it."""
    Path("list").write_text("\n")
    output_of(manifest, ".", "-o", "lock.json")
    Path("ckptkit.toml").write_text("paths = ['.']\n")
    for more in ((), ("--manifest", "lock.json")):
        lines = output_of(check, "--files-from", "list", *more, code=2).splitlines()
        assert lines[1].endswith("[nothing-selected]"), lines
        assert output_of(check, "--files-from", "list", "--skip-others", *more) == (
            "there is no checkpoint among the files\n"
        )
    for command in (inspect, manifest):
        with pytest.raises(FileAccessError, match="list: lists no files"):
            output_of(command, "--files-from", "list")


def test_lists_that_cannot_be_read() -> None:
    for command in (check, inspect, manifest):
        with pytest.raises(MissingFileError, match="nope: no such file"):
            output_of(command, "--files-from", "nope")
        with pytest.raises(click.UsageError, match="only one of them can be standard input"):
            output_of(command, "-", "--files-from", "-")
    with pytest.raises(click.MissingParameter):
        output_of(inspect)


@pytest.mark.parametrize(
    "arguments",
    [["--json", "--stats"], ["--depth", "1"], ["--flat", "--filter", "b*"], ["--format", "markdown", "-q"]],
)
def test_inspect_shows_the_same_whoever_looks(arguments: list[str]) -> None:
    Path("broken.pth").write_bytes(b"PK\x03\x04")
    one, two = (output_of(inspect, ".", "nope.pth", *arguments, "--jobs", jobs, code=2) for jobs in ("1", "2"))
    assert one == two and (one or "--filter" in arguments)


def test_bad_values() -> None:
    for arguments in (["--jobs", "0"], ["--timeout", "0"], ["--timeout", "-1"], ["--jobs", "x"]):
        with pytest.raises(click.BadParameter):
            output_of(check, ".", *arguments)
    for value in ("nan", "inf"):
        with pytest.raises((CkptkitError, click.BadParameter)):
            output_of(check, ".", "--timeout", value)


# Lines as they come.

SLOW = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support import odd_files
odd_files.are_odd()
from ckptkit.cli import run
run()
"""


def started(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """The command as a process in which a file called ``hangs…`` takes a minute."""
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", SLOW, *arguments]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env, **options})


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interrupt_leaves_a_stream_that_is_taken_up(jobs: str) -> None:
    torch.save({"a": torch.ones(2)}, "hangs.pth")
    process = started("check", ".", "--json-lines", "--jobs", jobs)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]  # they come though the next file hangs
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=30)
    assert (process.returncode, rest) == (130, b"")
    assert said.startswith(b"ckptkit: interrupted")
    paths = [json.loads(line).get("path") for line in lines]
    assert paths == [None, "./0.pth", "./1.pth", "./2.pth"] or paths == [None, "0.pth", "1.pth", "2.pth"]
    Path("runs.jsonl").write_bytes(b"".join(lines))
    Path("hangs.pth").unlink()
    assert "results-incomplete" in output_of(report, "runs.jsonl", code=2)
    with Path("runs.jsonl").open("a") as file:
        file.write(output_of(check, ".", "--json-lines", "--resume", "runs.jsonl"))
    assert output_of(report, "runs.jsonl").splitlines()[-1] == "5 files passed"
    Path("s.safetensors").unlink()  # nor is a file that has gone since told of
    assert appended("--resume", "runs.jsonl") == 0
    assert output_of(report, "runs.jsonl").splitlines()[-1] == "4 files passed"


def appended(*arguments: str) -> int:
    """The exit code of the command, whose output is appended to a file."""
    with Path("runs.jsonl").open("ab") as file:
        process = started("check", ".", "--json-lines", *arguments, stdout=file)
    process.communicate(timeout=60)
    return process.returncode


def test_a_stream_is_appended_to_a_file() -> None:
    """Behind a line that was cut short, and while the file is what is resumed."""
    assert appended() == 0
    data = Path("runs.jsonl").read_bytes()
    assert not data.startswith(b"\n")
    Path("runs.jsonl").write_bytes(data[:-200])
    assert appended("--resume", "runs.jsonl") == 0
    assert output_of(report, "runs.jsonl").splitlines()[-1] == "5 files passed"
    assert json.loads(Path("runs.jsonl").read_text().splitlines()[-1])["results"] == 5


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """Of the text the verdict is the exit code all the same; of lines, of which some are lost, it is not known."""
    for number in range(400):
        (tmp_path / f"more{number:03}.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes())
    for arguments, code in (([], 0), (["--no-nan"], 1), (["--json-lines"], 2)):
        process = started("check", ".", *arguments, "--jobs", "1")
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=60) == code
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()


def test_the_report_command_is_listed(run: Any) -> None:
    assert "\n  report " in run("--help").stdout
    done = run("report", "--help")
    assert done.returncode == 0 and "ckptkit report part-*.jsonl" in done.stdout
    assert ckptkit.ReportDocument.__doc__
