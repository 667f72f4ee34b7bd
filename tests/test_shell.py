"""Command lines for the shell at hand, patterns that it leaves to programs, and what else differs between systems.

Nothing runs on Windows or macOS here: what depends on the system is asked of functions that are told which it is.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptkit
from ckptkit import places, shell
from ckptkit.bytesource import flush_to_disk, local
from ckptkit.cli import ending
from ckptkit.report import split_member
from ckptkit.transfer import workers

SHELLS = get_args(shell.Shell)
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\\\"'%!^&|<> `$")
WORDS = st.lists(st.text(CHARACTERS, max_size=8))
HOSTILE = ["a b.pth", "100%.pth", "x!y", 'q"q\\', "C:\\a b\\", "a&del", "", "$(x)", "`x`", "it's", "it\u2019s", "-a.b"]


@given(words=WORDS)
def test_what_is_quoted_is_read_back(words: list[str]) -> None:
    for name in SHELLS:
        line = shell.command_line(words, name)
        assert shell.words_in(line, name) == words, (name, line)


@given(words=WORDS)
def test_posix_is_what_shlex_says(words: list[str]) -> None:
    assert shell.command_line(words, "posix") == shlex.join(words)


@given(words=WORDS)
def test_programs_split_a_line_as_the_c_runtime_does(words: list[str]) -> None:
    words = [word.replace("^", "") for word in words]  # which cmd takes away before
    assert shell.words_in(subprocess.list2cmdline(words), "cmd") == words


@pytest.mark.parametrize("word", HOSTILE)
def test_cmd_acts_upon_nothing(word: str) -> None:
    """Outside of quotes each character that cmd acts upon has a caret, and inside there is none that counts there."""
    line = shell.quoted(word, "cmd")
    is_inside, at = False, 0
    while at < len(line):
        if line[at] == "^" and not is_inside:
            at += 2
            continue
        assert line[at] not in ("%!" if is_inside else "&|<>()%!"), line
        is_inside ^= line[at] == '"'
        at += 1
    assert not is_inside


@pytest.mark.parametrize("word", HOSTILE)
def test_powershell_acts_upon_nothing(word: str) -> None:
    line = shell.quoted(word, "powershell")
    assert line[0] == line[-1] == "'"
    assert shell.quoted("model-1.pth", "powershell") == shell.quoted("model-1.pth", "cmd") == "model-1.pth"


@pytest.mark.parametrize(
    ("system", "environment", "expected"),
    [
        ("posix", {"PSModulePath": "a;b;c;d"}, "posix"),
        ("nt", {}, "cmd"),
        ("nt", {"PSModulePath": r"C:\Program Files\WindowsPowerShell\Modules;C:\Windows\Modules"}, "cmd"),
        ("nt", {"PSModulePath": r"C:\Users\a\Documents\Modules;C:\Program Files\Modules;C:\Windows"}, "powershell"),
        ("nt", {"MSYSTEM": "MINGW64", "PSModulePath": "a;b;c"}, "posix"),
        ("nt", {"SHELL": "/usr/bin/bash"}, "posix"),
    ],
)
def test_which_shell_is_at_hand(system: str, environment: dict[str, str], expected: str) -> None:
    assert shell.named(system, environment) == expected
    assert shell.at_hand() == "posix"


@pytest.mark.parametrize("name", ["cmd", "powershell"])
def test_fixes_are_typed_for_it(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of findings and of errors; those that are taken apart and put together again, too."""
    monkeypatch.setattr(shell, "at_hand", lambda: name)
    path = tmp_path / "it's 100% a & b.pth"
    linear = torch.nn.Linear(3, 3)
    torch.save({"model": {f"module.{k}": v for k, v in linear.state_dict().items()}, "epoch": 1}, path)
    file = ckptkit.inspect(path)
    fixes = [finding["fix"] for finding in file["findings"] if finding["fix"] and finding["fix"].startswith("ckptkit ")]
    assert fixes
    for fix in [*fixes, *(combined["command"] for combined in [file.get("combined_fix")] if combined)]:
        assert fix not in (shlex.join(shell.words_in(fix)), " ".join(shell.words_in(fix)))
        assert shell.words_in(fix)[:3] == ["ckptkit", "convert", str(path)]
    with pytest.raises(ckptkit.CkptkitError) as raised:
        ckptkit.convert(path, tmp_path / "no such" / "out.pth")
    assert str(raised.value).endswith(shell.mkdir_command(str(tmp_path / "no such"), name))
    assert "mkdir -p" not in str(raised.value)


def test_patterns_are_expanded_where_shells_leave_that_to_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.pth", "a.pth", "a[1].pth", "c.txt"):
        Path(name).touch()
    for path, found in {
        "*.pth": ["a.pth", "a[1].pth", "b.pth"],
        "a[1].pth": ["a[1].pth"],
        "[b-z].pth": ["b.pth"],
        "*.safetensors": ["*.safetensors"],
        "c.txt": ["c.txt"],
        "-": ["-"],
        "hf://user/repo/*.pth": ["hf://user/repo/*.pth"],
    }.items():
        assert places.expanded(path, "nt") == found
        assert places.expanded(path, "posix") == [path]


def test_members_of_archives_below_a_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """``C:\\folder\\models.zip!inside\\model.pth``: the colon of a drive makes no URL of it."""
    monkeypatch.setattr("ckptkit.report.os", SimpleNamespace(sep="\\", path=os.path))
    monkeypatch.setattr(os.path, "isfile", lambda path: path == "C:\\folder\\models.zip")
    for mark in "!\\/":
        found = split_member(f"C:\\folder\\models.zip{mark}inside\\model.pth")
        assert found == ("C:\\folder\\models.zip", "inside/model.pth")
    assert split_member("s3:\\folder\\models.zip!model.pth") is None


@pytest.mark.parametrize("gone", [[], ["preadv"], ["preadv", "pread", "pwrite"]])
def test_files_are_read_and_written_by_position(
    gone: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has none of these calls, and macOS got ``preadv`` with version 11."""
    for name in gone:
        monkeypatch.delattr(os, name)
    with open(tmp_path / "file", "w+b") as file:
        local.write_at(file.fileno(), bytes(range(100)), 3)
        buffer = bytearray(10)
        assert local.fill_from(file.fileno(), buffer, 13) == 10
        assert buffer == bytes(range(10, 20))
        assert local.fill_from(file.fileno(), buffer, 100) == 3
        assert buffer == bytes([97, 98, 99, *range(13, 20)])
        assert local.fill_from(file.fileno(), buffer, 200) == 0


@pytest.mark.parametrize("has_it", [True, False])
def test_macos_is_asked_to_put_it_on_the_disk(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fcntl(2) there; a disk on a network knows no such command."""
    asked: list[tuple[str, int]] = []

    def control(fd: int, command: int) -> None:
        asked.append((f"fcntl {command}", fd))
        if not has_it:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(local, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setitem(sys.modules, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=control))
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append(("fsync", fd)))
    flush_to_disk(3)
    assert asked == [("fcntl 51", 3)] + [("fsync", 3)] * (not has_it)


def test_other_systems_are_asked_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "fsync", asked.append)
    flush_to_disk(3)
    assert asked == [3]


def test_ctrl_break_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' SIGBREAK, by the name that a signal has here."""
    named = signal.Signals

    def as_there(number: int) -> Any:
        return SimpleNamespace(name="SIGBREAK") if number == 21 else named(number)

    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    monkeypatch.setattr(signal, "Signals", as_there)
    heard: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", heard.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with pytest.raises(ending.SignalledError) as raised, ending.signals_heard():
        heard[21](21, None)
    with monkeypatch.context() as known:
        known.setattr(ending._ending, "done", "")
        code, told = ending.ended(raised.value)
    assert code == 128 + 21 and "interrupted" in told
    assert "SIGBREAK" in workers._NAMES
