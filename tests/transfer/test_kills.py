"""Real signals to real processes, at every moment: the old file, or the complete new one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import killed
from support.plans import ASKED, INDEX, SHARD_SIZES, files_of, held, posix_only
from support.repeated import repeated

import ckptkit
from ckptkit.errors import FormatError

pytestmark = posix_only

ROOT = Path(ckptkit.__file__).parents[1]

Send = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def send() -> Iterator[Send]:
    """``send(arguments=[...], at=7, signal=9, links=True)``: to `support/killed.py`; returns its answer."""
    command = [sys.executable, killed.__file__]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pipe, answers = process.stdin, process.stdout

        def job(**what: Any) -> dict[str, int]:
            pipe.write(json.dumps(what) + "\n")
            pipe.flush()
            return json.loads(answers.readline())

        yield job
        pipe.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outcome(folder: Path) -> str:
    """What a loader finds; "refused": shards that are not there, or one too few; never a mix that loads."""
    try:
        return held(folder)
    except FormatError:
        return "refused"


def put(folder: Path, there: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in there.items():
        (folder / name).write_bytes(content)


# From so many files to so many; none before, 1 without shards; and whether there are hard links.
JOBS = [(0, 1, True), (1, 1, True), (0, 3, True), (1, 3, True), (2, 3, True), (3, 3, True), (3, 3, False)]


def jobs(*chosen: int) -> list[Any]:
    """These of `JOBS`; the others are thorough."""
    return [pytest.param(*job, marks=[] if at in chosen else pytest.mark.thorough) for at, job in enumerate(JOBS)]


def converted(sources: dict[str, Path], folder: Path, before: int, after: int) -> tuple[list[str], dict[str, bytes]]:
    """The arguments that make ``after`` files of the new state, where ``before`` files of the old one are put."""
    if before:
        ckptkit.convert(sources["old"], folder / ASKED, max_shard_size=SHARD_SIZES[before], check=False)
    size = SHARD_SIZES[after]
    arguments = ["convert", "-q", str(sources["new"]), str(folder / ASKED)]
    arguments += [] if size is None else ["--max-shard-size", str(size)]
    return arguments + ["--force"] * bool(before), contents(folder)


@repeated("every", 2, 1)
@pytest.mark.parametrize(("before", "after", "links"), jobs(1, 2, 4, 6))
def test_killed_at_any_moment(
    send: Send, sources: dict[str, Path], out: Path, before: int, after: int, links: bool, every: int
) -> None:
    folder = out.parent
    arguments, there = converted(sources, folder, before, after)
    was = "old" if before else "nothing"
    outcomes: set[str] = set()
    for at in range(0, 1000, every):
        put(folder, there)
        answer = send(arguments=arguments, at=at, signal=signal.SIGKILL, links=links)
        now = contents(folder)
        whole = {name: content for name, content in now.items() if not name.startswith(".")}
        if whole == there:
            outcomes.add(was)
        else:
            outcomes.add(outcome(folder))
            assert links or outcomes <= {was, "new", "refused"}
            assert not links or "refused" not in outcomes
        if answer["status"] == 0:
            break
        assert answer["status"] == -signal.SIGKILL
        if at % 5 == 0:  # what a killed run leaves, the next one into the folder removes, but for what an index names
            found = outcome(folder)
            beside = ["convert", "-q", str(sources["old"]), str(folder / "beside.pth"), "--no-check"]
            assert send(arguments=beside, at=-1, signal=0, links=links)["status"] == 0
            (folder / "beside.pth").unlink()
            assert outcome(folder) == found
            index = (folder / INDEX).read_text() if (folder / INDEX).exists() else ""
            assert all(path.name in index for path in folder.glob(".*"))
            # And it is no hindrance to the same run again.
            again = [each for each in arguments if each != "--force"] + ["--force", "--no-check"]
            assert send(arguments=again, at=-1, signal=0, links=links)["status"] == 0
            assert held(folder) == "new"
    assert sorted(now) == files_of(after)
    assert {was, "new"} <= outcomes <= {was, "new"} | (set() if links else {"refused"})


@repeated("every", 2, 1)
@pytest.mark.parametrize(("before", "after", "links"), jobs(0, 5))
def test_interrupted_at_any_moment_nothing_is_left(
    send: Send, sources: dict[str, Path], out: Path, before: int, after: int, links: bool, every: int
) -> None:
    folder = out.parent
    arguments, there = converted(sources, folder, before, after)
    stale = set(files_of(before)) - set(files_of(after)) if before else set()
    for at in range(0, 1000, every):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[at % 3]
        if contents(folder) != there:
            put(folder, there)
        answer = send(arguments=arguments, at=at, signal=number, links=links)
        now = contents(folder)
        if answer["calls"] <= at:
            break
        assert answer["status"] == 128 + number
        if now != there:
            assert set(now) - stale == set(files_of(after))
            assert held(folder) == "new"
    assert answer["status"] == 0
    assert at > 5


WAITING = """
import sys
from ckptkit.cli import run
from ckptkit.transfer import writing

real = writing.move

def move(*given):
    print("at work", file=sys.stderr, flush=True)
    sys.stdin.readline()
    return real(*given)

writing.move = move
run()
"""
"""The command, which waits for a line before it moves the first byte."""


SHARDS = ["--max-shard-size", str(SHARD_SIZES[3])]


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, []),
        (signal.SIGKILL, []),
        (signal.SIGTERM, SHARDS),
        (signal.SIGKILL, SHARDS),
        pytest.param(signal.SIGHUP, [], marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, [], marks=pytest.mark.thorough),
        pytest.param(signal.SIGHUP, SHARDS, marks=pytest.mark.thorough),
        pytest.param(signal.SIGINT, SHARDS, marks=pytest.mark.thorough),
    ],
)
def test_a_second_run_beside(sources: dict[str, Path], out: Path, number: signal.Signals, options: list[str]) -> None:
    folder = out.parent

    def start(name: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, "convert", "-q", sources["new"], folder / name, *options],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "at work\n"
        return process

    with start("killed.safetensors") as first, start(ASKED) as beside:
        theirs = set(folder.glob(".model*"))
        assert len(theirs) == (4 if options else 1)
        first.send_signal(number)
        assert first.wait(timeout=60) == (-number if number == signal.SIGKILL else 128 + number)
        left = set(folder.iterdir()) - theirs
        assert len(left) == (len(theirs) if number == signal.SIGKILL else 0)
        ckptkit.convert(sources["old"], folder / "next.pth")
        assert set(folder.iterdir()) == {*theirs, folder / "next.pth"}
        _, errors = beside.communicate("go on\n" * 9, timeout=60)
    assert (beside.returncode, errors.replace("at work\n", "")) == (0, "")
    assert sorted(contents(folder)) == sorted([*files_of(3 if options else 1), "next.pth"])
    assert held(folder) == "new"


LARGE = 1_000_000
"""Values of each of 4 tensors."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.pth"
    torch.save({f"layer{number}": torch.full((LARGE,), float(number)).view(1000, -1).t() for number in range(4)}, path)
    return path


AT_RANDOM = [["--dtype", "float64"], ["--max-shard-size", "4.5MB"]]


@pytest.mark.parametrize(
    "options", [[], *(pytest.param(more, marks=pytest.mark.thorough) for more in AT_RANDOM)], ids=" ".join
)
def test_at_random_times(large: Path, out: Path, options: list[str]) -> None:
    folder = out.parent
    command = [sys.executable, "-m", "ckptkit", "convert", "-q", large, folder / ASKED, "--force", *options]
    dice = random.Random(str(options))
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        for path in folder.iterdir():
            path.unlink()
        (folder / ASKED).write_bytes(b"old")
        with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE) as process:
            time.sleep(dice.uniform(0.05, 0.4))
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        shown = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        hidden = {path.name for path in folder.iterdir()} - shown
        if process.returncode == 0:
            assert not hidden
        elif number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert not hidden, errors  # before it has started, Python itself ends without our help
        index = folder / INDEX
        if index.exists() or (folder / ASKED).stat().st_size > 3:
            with ckptkit.open(index if index.exists() else folder / ASKED) as file:
                assert {name: entry.shape for name, entry in file.state_dict.items()} == {
                    f"layer{each}": (LARGE // 1000, 1000) for each in range(4)
                }
            state = ckptkit.load_state_dict(index if index.exists() else folder / ASKED)
            assert all(bool((state[f"layer{each}"] == each).all()) for each in range(4))
        else:
            assert (folder / ASKED).read_bytes() == b"old"
            assert process.returncode != 0
