"""Real signals to real processes that write a part of an output, or finish it: nothing is lost, nothing half-seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import killed
from support.files import same_files
from support.plans import ASKED, INDEX, SHARD_SIZES, files_of, held, posix_only

import ckptkit
from ckptkit.errors import FormatError

pytestmark = posix_only

ROOT = Path(ckptkit.__file__).parents[1]

Send = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def send() -> Iterator[Send]:
    """``send([...], at=7, number=9, links=True)``: to `support/killed.py`; returns its answer."""
    command = [sys.executable, killed.__file__]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pipe, answers = process.stdin, process.stdout

        def job(arguments: list[str], at: int = -1, number: int = 0, links: bool = True) -> dict[str, int]:
            what = {"arguments": ["convert", "-q", *arguments], "at": at, "signal": number, "links": links}
            pipe.write(json.dumps(what) + "\n")
            pipe.flush()
            return json.loads(answers.readline())

        yield job
        pipe.close()


@pytest.fixture(scope="module")
def expected(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("expected")
    ckptkit.convert(sources["new"], folder / ASKED, max_shard_size=SHARD_SIZES[3])
    return folder


def arguments_of(sources: dict[str, Path], folder: Path, *more: str) -> list[str]:
    return [str(sources["new"]), str(folder / ASKED), "--max-shard-size", str(SHARD_SIZES[3]), *more]


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_part_that_is_killed(
    send: Send, sources: dict[str, Path], out: Path, expected: Path, number: signal.Signals
) -> None:
    """Nothing of it counts, those beside it stay, and the same part again completes."""
    folder = out.parent
    assert send(arguments_of(sources, folder, "--part", "2/2"))["status"] == 0
    (hidden,) = folder.iterdir()
    before = {path.name: path.read_bytes() for path in hidden.iterdir()}
    for at in range(0, 1000, 2 if number == signal.SIGKILL else 3):
        answer = send(arguments_of(sources, folder, "--part", "1/2"), at, number)
        assert visible(folder) == {}
        now = {path.name: path.read_bytes() for path in hidden.iterdir()}
        assert before.items() <= now.items()
        if answer["calls"] <= at:
            break
        assert answer["status"] in (-number, 128 + number)
        is_there = "part-00001-of-00002.json" in now
        if number != signal.SIGKILL and not is_there:
            assert not any(name.endswith(".tmp.json") for name in now)
        if at % 4 == 0 or is_there:
            finished = send(arguments_of(sources, folder, "--finish"))
            assert finished["status"] == (0 if is_there else 2)
            if is_there:
                assert same_files(folder, expected)
                for path in folder.iterdir():
                    path.unlink()
                hidden.mkdir()
            else:
                assert send(arguments_of(sources, folder, "--part", "1/2"))["status"] == 0
                assert not [name for name in os.listdir(hidden) if name.startswith(".")]
        for path in hidden.iterdir():
            path.unlink()
        for name, content in before.items():
            (hidden / name).write_bytes(content)
    assert at > 10


# What is there before: nothing, shards of the same names, others; and whether there are hard links.
FINISHES = [(0, True), (0, False), (2, True), (3, True), (3, False)]


@pytest.mark.parametrize(
    ("before", "links"),
    [pytest.param(*each, marks=pytest.mark.thorough if FINISHES.index(each) in (1, 3) else []) for each in FINISHES],
)
def test_a_finish_that_is_killed(
    send: Send, sources: dict[str, Path], out: Path, expected: Path, tmp_path: Path, before: int, links: bool
) -> None:
    """A reader sees the old checkpoint, or the new one; to finish again completes it."""
    folder, kept = out.parent, tmp_path / "kept"
    force = ["--force"] * bool(before)
    if before:
        ckptkit.convert(sources["old"], folder / ASKED, max_shard_size=SHARD_SIZES[before])
    for part in ("1/2", "2/2"):
        assert send(arguments_of(sources, folder, "--part", part, *force))["status"] == 0
    shutil.copytree(folder, kept)
    was = "old" if before else "nothing"
    outcomes: set[str] = set()
    for at in range(FINISHES.index((before, links)) % 2, 1000, 2):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        answer = send(arguments_of(sources, folder, "--finish", *force), at, signal.SIGKILL, links)
        try:
            outcomes.add(held(folder))
        except FormatError:  # shards that are not where the index says
            outcomes.add("refused")
        if answer["status"] == 0:
            break
        assert answer["status"] == -signal.SIGKILL
        is_done = (folder / INDEX).exists() and (folder / INDEX).read_bytes() == (expected / INDEX).read_bytes()
        again = send(arguments_of(sources, folder, "--finish", *force), links=links)
        assert again["status"] == 0 or is_done  # and the parts' records were about to go
        if any(name.startswith(".") for name in os.listdir(folder)):  # which the next to write into the folder removes
            beside = [str(sources["old"]), str(folder / "beside.pth"), "--no-check"]
            assert send(beside, links=links)["status"] == 0
            (folder / "beside.pth").unlink()
        for name in set(files_of(before or 1)) - {*files_of(3)} if is_done else ():  # as of any run that is killed then
            (folder / name).unlink(missing_ok=True)
        assert same_files(folder, expected), at
    assert same_files(folder, expected)
    assert {was, "new"} <= outcomes <= {was, "new"} | (set() if links else {"refused"})
    assert at > 10


@pytest.mark.parametrize(("before", "links"), [FINISHES[0], *FINISHES[3:]])
def test_a_finish_that_is_interrupted(
    send: Send, sources: dict[str, Path], out: Path, expected: Path, tmp_path: Path, before: int, links: bool
) -> None:
    """It is as if it had not begun, or complete."""
    folder, kept = out.parent, tmp_path / "kept"
    force = ["--force"] * bool(before)
    if before:
        ckptkit.convert(sources["old"], folder / ASKED, max_shard_size=SHARD_SIZES[before])
    for part in ("1/2", "2/2"):
        assert send(arguments_of(sources, folder, "--part", part, *force))["status"] == 0
    shutil.copytree(folder, kept)
    old = visible(folder)
    for at in range(1, 1000, 4):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        answer = send(arguments_of(sources, folder, "--finish", *force), at, signal.SIGINT, links)
        if answer["calls"] <= at:
            break
        assert answer["status"] == 130
        if visible(folder) != old:
            assert held(folder) == "new"
            assert sorted(set(visible(folder)) - set(old)) == sorted(set(files_of(3)) - set(old))
        else:
            assert send(arguments_of(sources, folder, "--finish", *force), links=links)["status"] == 0
            assert same_files(folder, expected)
    assert (folder / INDEX).exists()
