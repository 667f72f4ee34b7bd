"""Every way out of the program carries the verdict: lost outputs, closed descriptors, signals, errors on the way."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file

import ckptkit
from ckptkit.cli import COMMANDS, check, ending, main
from ckptkit.cli.options import styler

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors and signals as on Linux")

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

NET = """
import os, sys, time
from torch import nn

def make():
    return nn.Linear(3, 3)

def slow():
    print("at work", os.getpid(), file=sys.stderr, flush=True)
    for _ in range(6000):
        if os.path.exists("go on"):
            break
        time.sleep(0.01)
    return nn.Linear(3, 3)
"""

CASES: dict[str, dict[int, list[str]]] = {
    "check": {0: ["lin.pth"], 1: ["lin.pth", "--allow-dtype", "int8"]},
    "convert": {0: ["lin.pth", "out.safetensors", "--force"]},
    "diff": {0: ["lin.pth", "same.pth"], 1: ["lin.pth", "other.pth", "--format", "markdown"]},
    "explain": {0: []},
    "inspect": {0: ["lin.pth"], 1: ["hostile.pth", "--json"]},
    "manifest": {0: ["lin.pth"]},
    "report": {0: ["passed.json"], 1: ["failed.json"]},
    "verify": {
        0: ["lin.pth", "--model", "net.py:make", "--no-forward"],
        1: ["other.pth", "--model", "net.py:make", "--no-forward", "--json"],
    },
}
"""Of each command, arguments by the verdict they come to."""


class Runs:
    """Naming this in a pickle runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = torch.nn.Linear(3, 3).state_dict()
    torch.save(state, tmp_path / "lin.pth")
    torch.save(state, tmp_path / "same.pth")
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pth")
    torch.save({"w": torch.ones(2), "x": Runs()}, tmp_path / "hostile.pth")
    (tmp_path / "net.py").write_text(NET)
    for name, dtype in (("passed.json", "float32"), ("failed.json", "int8")):
        (tmp_path / name).write_text(ckptkit.check(tmp_path / "lin.pth", allow_dtype=dtype).to_json())
    return tmp_path


CLOSED = {"<&-": [0], ">&-": [1], "2>&-": [2], "<&- >&- 2>&-": [0, 1, 2]}
"""What is closed, by the shell's words for it."""

BEGIN_CLOSED = """
import os, sys

for number in {}:
    os.close(number)
    for name in (("stdin", "stdout", "stderr")[number],):
        setattr(sys, name, None)
        setattr(sys, "__" + name + "__", None)
from ckptkit.cli import run
run()
"""
"""As Python begins where these are closed."""

PROGRAM = f"ckptkit() {{ '{sys.executable}' -m ckptkit \"$@\"; }}\n"


def shell(
    folder: Path, arguments: Sequence[object], redirected: str = "", program: str = PROGRAM
) -> subprocess.CompletedProcess[str]:
    """The command in a shell, with its descriptors as asked."""
    words = " ".join(f"'{word}'" for word in arguments)
    return subprocess.run(
        ["bash", "-c", f"{program}ckptkit {words} {redirected}"],
        cwd=folder,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_command_has_cases() -> None:
    assert CASES.keys() == COMMANDS.keys()


@pytest.mark.parametrize(("name", "code"), [(name, code) for name, cases in CASES.items() for code in cases])
def test_no_command_loses_its_verdict(folder: Path, name: str, code: int, forks: Callable[..., Any]) -> None:
    arguments = [name, *CASES[name][code]]
    # Where all descriptors are open, a fork of what has imported all it needs will do.
    fork = forks(with_torch=name == "verify")
    program = fork.shell("ckptkit", "-m", "ckptkit")

    def closed(redirected: str) -> subprocess.CompletedProcess[str]:
        if code == 0 and name in ("check", "convert"):  # Python itself begins so
            return shell(folder, arguments, redirected)
        return shell(folder, arguments, "", fork.shell("ckptkit", "-c", BEGIN_CLOSED.format(CLOSED[redirected])))

    assert shell(folder, arguments, program=program).returncode == code
    gone = shell(folder, arguments, "| true; exit ${PIPESTATUS[0]}", program)
    assert (gone.returncode, gone.stderr) == (code, "")
    if (name, code) == ("verify", 0):
        return  # a verdict of 1 shows the rest
    assert closed("<&-").returncode == code
    assert closed("2>&-").returncode == code
    assert shell(folder, arguments, "2>/dev/full", program).returncode == code
    written = "; out.safetensors was written" if name == "convert" else ""
    for redirected, state in ((">/dev/full", "full"), (">&-", "closed")):
        lost = closed(redirected) if state == "closed" else shell(folder, arguments, redirected, program)
        assert (lost.returncode, lost.stdout) == (2, "")
        assert lost.stderr == f"ckptkit: error: standard output is {state}{written}\n"
    nothing = closed("<&- >&- 2>&-")
    assert nothing.returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check", "--help"]])
def test_help_is_no_verdict(folder: Path, arguments: list[str]) -> None:
    assert shell(folder, arguments, "| true; exit ${PIPESTATUS[0]}").returncode == 0
    assert shell(folder, arguments, ">/dev/full").returncode == 2


def test_what_was_asked_for_badly_stays_2(folder: Path) -> None:
    for arguments in ([], ["check", "--nope"], ["inspect", "missing.pth", "--json"]):
        assert shell(folder, arguments, "| true; exit ${PIPESTATUS[0]}").returncode == 2
        lost = shell(folder, arguments, ">/dev/full")
        assert lost.returncode == 2
        assert "internal error" not in lost.stderr
    # The error is what is to be told, not that its document was lost.
    failed = shell(folder, ["check", "lin.pth", "--manifest", "missing.json", "--json"], ">/dev/full")
    assert failed.returncode == 2
    assert "missing.json: no such file" in failed.stderr


def test_files_do_not_get_the_numbers_of_closed_descriptors(folder: Path) -> None:
    done = shell(folder, ["convert", "lin.pth", "out.safetensors", "--debug"], "<&- >&- 2>&-")
    assert done.returncode == 2
    made = load_file(folder / "out.safetensors")
    assert {name: value.tolist() for name, value in made.items()} == {
        name: value.tolist() for name, value in torch.load(folder / "lin.pth").items()
    }
    assert shell(folder, ["convert", "-q", "lin.pth", "quiet.safetensors"], "<&- >&- 2>&-").returncode == 0
    assert (folder / "quiet.safetensors").read_bytes() == (folder / "out.safetensors").read_bytes()


def test_a_reader_that_goes_before_all_files_are_seen(folder: Path) -> None:
    large = folder / "large.pth"
    torch.save({f"a.rather.long.name.{number}": torch.ones(1) for number in range(3000)}, large)
    with subprocess.Popen(
        [sys.executable, "-m", "ckptkit", "inspect", "--flat", *["large.pth"] * 5],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=ENV,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 2


def test_a_stdout_that_takes_nothing_now_is_waited_for(folder: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(
        [sys.executable, "-m", "ckptkit", "explain", "--json"], stdout=writer, cwd=folder, env=ENV
    ) as process:
        os.close(writer)
        text = b""
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)  # the pipe is full by now
        while part := os.read(reader, 1 << 16):
            text += part
        assert process.wait(timeout=60) == 0
    os.close(reader)
    assert json.loads(text)["codes"]


# Signals.


CHECK = ["check", "lin.pth", "--fits", "net.py:slow"]
"""A check that runs a slow factory."""


def signalled(
    folder: Path, send: Callable[[int], object], forks: Callable[..., Any], arguments: Sequence[str]
) -> tuple[int, str, str]:
    """The status and outputs of a fork that has imported torch, which is sent signals while the factory is at work."""
    (folder / "out").touch()
    with (folder / "out").open("rb+") as out, ThreadPoolExecutor(1) as asking, open(os.devnull, "rb") as nothing:
        reader, writer = os.pipe()
        with open(reader, encoding="utf-8") as errors:
            streams = [nothing.fileno(), out.fileno(), writer]
            status = asking.submit(forks(with_torch=True).ask, *arguments, cwd=folder, env=ENV, streams=streams)
            status.add_done_callback(lambda _: os.close(writer))  # nothing more is said, whatever there was
            begun = errors.readline()
            assert begun.startswith("at work "), (begun, status.result(timeout=60))
            send(int(begun.split()[-1]))
            ended = status.result(timeout=60)
            out.seek(0)
            return ended, out.read().decode(), errors.read()


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 1)]
)
def test_a_signal_is_128_and_its_number(
    folder: Path, number: signal.Signals, times: int, forks: Callable[..., Any]
) -> None:
    def send(pid: int) -> None:
        for _ in range(times):
            os.kill(pid, number)

    status, out, errors = signalled(folder, send, forks, ["-m", "ckptkit", *CHECK])
    assert (status, out) == (128 + number, "")
    assert errors.endswith("; no file is half-written\n")
    assert errors.count("\n") == 1


def test_a_process_of_its_own_is_interrupted(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ckptkit", *CHECK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=ENV
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"at work")
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGINT, b"")
    assert errors.endswith(b"; no file is half-written\n")
    assert errors.count(b"\n") == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_so(folder: Path, number: signal.Signals, forks: Callable[..., Any]) -> None:
    def send(pid: int) -> None:
        os.kill(pid, number)
        (folder / "go on").touch()

    ignoring = f"import signal; signal.signal({number:d}, signal.SIG_IGN); from ckptkit.cli import run; run()"
    status, out, _ = signalled(folder, send, forks, ["-c", ignoring, *CHECK])
    assert status == 0
    assert "1 file passed" in out


def test_a_signal_that_somebody_caught_is_no_success() -> None:
    with pytest.raises(ending.SignalledError), ending.signals_heard(), suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Errors.


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), MemoryError(), KeyError("x"), GeneratorExit(), SystemExit(0), OSError(5, "no")]
)
def test_whatever_fails_while_the_output_is_made_is_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(check, "_lines", fail)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(folder / "lin.pth")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("ckptkit: ")


def test_several_errors_are_lines(folder: Path) -> None:
    (folder / "a.pth").write_text("nothing")
    (folder / "b\n.pth").write_text("nothing")
    done = shell(folder, ["manifest", "."])
    assert done.returncode == 2
    first, *others = done.stderr.splitlines()
    assert "files cannot be recorded:" in first
    assert len(others) >= 2
    assert all(line.startswith("  ") for line in others)
    assert any("b\\n.pth" in line for line in others)


# --output FILE.


@pytest.mark.parametrize(
    ("name", "code"), [(name, code) for name, cases in CASES.items() for code in cases if name != "manifest"]
)
def test_the_output_goes_to_a_file(folder: Path, name: str, code: int, run, python) -> None:
    """What stdout would get, with the same exit code, in place of what the file held."""
    command = [name, *CASES[name][code]]
    run, command = (python, ["-m", "ckptkit", *command]) if name == "verify" else (run, command)  # which needs torch
    expected = run(*command, cwd=folder)
    (folder / "told").write_text("what stood here before")
    done = run(*command, "--output", "told", cwd=folder)
    assert (done.returncode, done.stdout) == (code, "")
    measured = r"\d+(\.\d+)?(e-\d+)?"  # seconds, bytes of memory
    told = (folder / "told").read_text()
    assert re.sub(measured, "0", told) == re.sub(measured, "0", expected.stdout) != ""
    assert sorted(path.name for path in folder.iterdir() if "told" in path.name) == ["told"]


def test_no_input_and_no_checkpoint_is_overwritten_by_the_output(folder: Path, run) -> None:
    (folder / "link.pth").symlink_to("lin.pth")
    (folder / "weights").mkdir()
    (folder / "weights" / "other.pth").write_bytes((folder / "other.pth").read_bytes())
    shutil.copytree(Path(__file__).parents[2] / "fixtures" / "training" / "step-4", folder / "step-4")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for arguments, refused in (
        (["inspect", "lin.pth", "-o", "./lin.pth"], "the command itself reads or writes this file"),
        (["inspect", "lin.pth", "-o", "link.pth"], "the command itself reads or writes this file"),
        (["check", "--manifest", "passed.json", "-o", "passed.json"], "the command itself reads or writes this file"),
        (["convert", "lin.pth", "new.pth", "-o", "new.pth"], "the command itself reads or writes this file"),
        (["inspect", "weights", "-o", "weights/other.pth"], "this is a checkpoint"),
        (["inspect", "lin.pth", "-o", "hostile.pth"], "this is a checkpoint"),
        (["inspect", "step-4", "-o", "step-4/.metadata"], "this is a checkpoint"),
        (["inspect", "step-4", "-o", "step-4/__1_0.distcp"], "this is a checkpoint"),
    ):
        done = run(*arguments, cwd=folder)
        assert (done.returncode, done.stdout) == (2, "") and refused in done.stderr, done.stderr
    for arguments in (
        ["inspect", "lin.pth", "-o", "no/such/folder.txt"],
        ["inspect", "lin.pth", "-o", "weights"],
        ["inspect", "nope*.pth", "--files-from", "nope", "-o", "told"],
        ["diff", "lin.pth", "nope.pth", "--json", "-o", "told"],
    ):
        assert run(*arguments, cwd=folder).returncode == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_output_goes_to_a_device_a_pipe_or_stdout(folder: Path, run) -> None:
    expected = run("inspect", "lin.pth", cwd=folder).stdout
    done = run("inspect", "lin.pth", "-o", "-", cwd=folder)
    assert (done.returncode, done.stdout) == (0, expected)
    assert not (folder / "-").exists()
    os.mkfifo(folder / "pipe")
    with subprocess.Popen(["cat", folder / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert run("inspect", "lin.pth", "-o", "pipe", cwd=folder).returncode == 0
        assert reader.stdout is not None and reader.stdout.read() == expected
    assert (folder / "pipe").is_fifo()
    full = run("inspect", "lin.pth", "-o", "/dev/full", cwd=folder)
    assert full.returncode == 2 and "/dev/full: cannot be written: No space left" in full.stderr
    assert "give the name of a file" in run("inspect", "lin.pth", "-o", "", cwd=folder).stderr


@pytest.mark.parametrize(
    "arguments", [["inspect", "lin.pth", "-o", "no/such/folder.json"], ["diff", "lin.pth", "nope.pth", "-o", "told"]]
)
def test_an_error_is_a_document_on_stdout_where_no_file_is_written(folder: Path, arguments: list[str], run) -> None:
    done = run(*arguments, "--json", cwd=folder)
    document = json.loads(done.stdout)
    assert done.returncode == 2 and document["ok"] is False and document["error"]["message"] in done.stderr
    assert not (folder / "told").exists()


# A terminal.


@pytest.mark.parametrize(("done", "seconds", "told"), [(9, 0.9, False), (10, 0.1, True), (1, 1.0, True)])
def test_the_time_left_is_told_once_the_rate_says_something(done: int, seconds: float, told: bool) -> None:
    assert ("left" in ending._how_far(done, 100, seconds)) == told


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_gets_no_colors(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(ending._ending, "stdout", Terminal())
    assert styler("auto")("told", bold=True) == ("told" if term == "dumb" else click.style("told", bold=True))
    assert styler("always")("told", bold=True) != "told"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("name", "code"), [(name, code) for name, cases in CASES.items() for code in cases if name != "manifest"]
)
def test_lines_fit_the_terminal(
    folder: Path, name: str, code: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command, but for commands to copy, which are whole."""
    arguments = [word for word in CASES[name][code] if word not in ("--json", "--format", "markdown")]
    terminal = Terminal()
    monkeypatch.setattr(Terminal, "encoding", encoding)
    monkeypatch.setattr(ending._ending, "file", terminal)
    monkeypatch.setenv("COLUMNS", "64")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main([name, *arguments])
    lines = [click.unstyle(line) for line in terminal.getvalue().splitlines()]
    assert ended.value.code == code and lines
    assert "\x1b[" in terminal.getvalue() or name == "convert"
    long = [line for line in lines if len(line) > 64]
    assert [line for line in long if "ckptkit " not in line and "model.load_state_dict(" not in line] == []


MESSAGES = {
    "a file": ["inspect", "no/such/file/anywhere/at/all.pth"],
    "one of several": ["inspect", "--brief", "lin.pth", "no/such/file/anywhere/at/all.pth"],
    "one of two": ["diff", "lin.pth", "no/such/file/anywhere/at/all.pth", "--no-progress"],
    "too many arguments": ["convert", "lin.pth", "other.pth", "same.pth", "hostile.pth"],
    "no such option": ["check", "lin.pth", "--max-trsut", "safe"],
    "no such value": ["check", "lin.pth", "--max-trust", "nobody"],
    "one of many": [
        "convert",
        "lin.pth",
        "hostile.pth",
        "out/",
        "--to",
        "safetensors",
        "--force",
        "--no-progress",
    ],
    "nothing matches": ["inspect", "--filter", "nothing.that.is.in.there", "lin.pth"],
    "what was read": ["check", "lin.pth", "other.pth", "hostile.pth"],
    "what was written": ["convert", "lin.pth", "new.pth", "--force", "--no-progress"],
}


def on_a_terminal(folder: Path, columns: int, *arguments: str) -> list[str]:
    """The lines on stderr, which is a terminal of so many columns."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    words = [os.environ.get("CKPTKIT_PYTHON", sys.executable), "-m", "ckptkit", *arguments]
    files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": theirs}
    with open(ours, "rb", buffering=0) as terminal, subprocess.Popen(words, cwd=folder, env=ENV, **files) as process:
        os.close(theirs)
        data = b""
        with suppress(OSError):  # how Linux says that nothing is left
            while part := terminal.read(4096):
                data += part
        process.wait(60)
    return [line.rpartition("\r")[2] for line in data.decode().replace("\r\n", "\n").splitlines()]


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_wrapped_on_a_terminal_alone(folder: Path, run, name: str) -> None:
    def words(lines: list[str]) -> list[str]:
        """Each word, wherever the lines end, but for how long it took."""
        return re.sub(r" (under )?\d+\.\d s\b", " T", " ".join(" ".join(lines).split())).split()

    wrapped = on_a_terminal(folder, 42, *MESSAGES[name])
    piped = run(*MESSAGES[name], cwd=folder, env=ENV).stderr.splitlines()
    assert max(map(len, wrapped)) <= 42 < max(map(len, piped))
    assert words(wrapped) == words(piped)
    beginnings = [line for line in wrapped if not line.startswith("    ")]
    assert len(beginnings) == len(piped)
    assert [line.split()[:2] for line in beginnings] == [line.split()[:2] for line in piped]


def test_what_is_not_shown_on_a_terminal_has_no_colors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending._ending, "file", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(folder)
    for options, is_colored in (([], False), (["--color", "always"], True)):
        with pytest.raises(SystemExit):
            main(["convert", "lin.pth", "wrapped.pth", "--add-module", "--force", *options])
        told = capsys.readouterr().err
        assert "[renamed]" in click.unstyle(told) and ("\x1b[" in told) == is_colored
