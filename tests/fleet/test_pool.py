"""Processes of our own: those that die, hang or do not start; the end of their driver; what they cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import fleet_work

from ckptkit.fleet import Outcome, each, pool, processes

SUPPORT = Path(fleet_work.__file__)


def test_a_task_that_kills_its_worker_takes_no_other_with_it(tmp_path: Path) -> None:
    notes = [str(tmp_path / name) for name in ("exit", "killed", "once")]
    tasks = [*(("never", number) for number in range(200))]
    tasks[50:50] = [("exit", notes[0])]
    tasks[100:100] = [("killed", notes[1])]
    tasks[150:150] = [("once", notes[2])]
    came = list(each(tasks, fleet_work.dies, jobs=2))
    assert [task for task, _ in came] == tasks
    assert [outcome.value for task, outcome in came if task[0] == "never"] == list(range(200))
    outcomes = {task[0]: outcome for task, outcome in came}
    assert outcomes["exit"] == Outcome(problem="died", text="its worker ended with exit code 3")
    memory = "as the system does when memory runs out"
    assert outcomes["killed"] == Outcome(problem="died", text=f"its worker was killed by SIGKILL, {memory}")
    assert outcomes["once"].value == "lived"
    assert [os.path.getsize(note) for note in notes] == [2, 3, 2]  # what is killed may not be at fault


def test_a_worker_that_gives_no_sign_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SLACK", 0.2)
    came = list(each([1, "locked", 2, 3], fleet_work.hangs, jobs=2, seconds=0.1))
    assert [outcome.value for _, outcome in came] == [1, None, 2, 3]
    assert came[1][1].problem == "timed-out"
    assert "its worker did not respond for " in came[1][1].text


def test_workers_that_do_not_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_serve", os._exit)  # with a channel for its code: it raises
    came = list(each(range(5000), fleet_work.square, jobs=2))
    assert len(came) == 5000
    assert {outcome.problem for _, outcome in came} == {"died"}
    assert came[0][1].text == "no worker process starts: the last ones ended before they were ready"


def test_where_no_process_can_be_started_every_task_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> object:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pool, "_Worker", none)
    came = list(each(range(5), fleet_work.square, jobs=2))
    assert [outcome.problem for _, outcome in came] == ["died"] * 5
    assert came[0][1].text.startswith("no worker process can be started: BlockingIOError: ")


def pids(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def are_gone(numbers: list[int]) -> bool:
    def is_there(number: int) -> bool:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    return not any(map(is_there, numbers))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("how", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_driver(how: str, number: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SUPPORT), how, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 20
        while len(pids(tmp_path)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        workers = pids(tmp_path)
        assert len(workers) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -number
    until = time.monotonic() + 5
    while not are_gone(workers) and time.monotonic() < until:
        time.sleep(0.02)
    assert are_gone(workers)
    assert list(tmp_path.glob("*.tmp")) == []  # what was unfinished is removed
    told = [line for line in errors.splitlines() if not line.startswith(" ")]
    assert told == (["Traceback (most recent call last):", "KeyboardInterrupt"] if number == signal.SIGINT else [])


@pytest.mark.parametrize("thread", ["", "threading.Thread(target=time.sleep, args=(2,), daemon=True).start()"])
def test_a_script_without_a_guard_runs_once(thread: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    code = f"""
        import sys, threading, time
        sys.path.insert(0, {str(SUPPORT.parents[1])!r})
        print("begun", flush=True)
        {thread}
        from support.fleet_work import dies, says, square
        from ckptkit.fleet import each
        print(sum(outcome.result() for _, outcome in each(range(100), square, jobs=2)))
        tasks = [("never", 1), ("exit", {str(tmp_path / "note")!r}), ("never", 2)]
        print([outcome.problem or outcome.value for _, outcome in each(tasks, dies, jobs=2)])
        print("kept", end=" ")
        print([outcome.value for _, outcome in each(["noise"] * 2, says, jobs=2)])
    """
    script.write_text("\n".join(line.strip() for line in code.splitlines()))
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "begun\n328350\n[1, 'died', 2]\nkept ['noise', 'noise']\n"
    assert sorted(done.stderr) == sorted("noise\n" * 2), "of two that write at the same time"


def test_memory_stays_flat_over_100_000_tasks() -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(SUPPORT.parents[1])!r})
from support.fleet_work import same
from ckptkit.fleet import each
def paths(count):
    return (f"/data/models/a/rather/long/name/of/a/folder/model-{{i:06d}}.safetensors" for i in range(count))
def run(count):
    assert sum(outcome.value == path for path, outcome in each(paths(count), same, jobs=2)) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(10_000)
before = run(20_000)
print(run(100_000) - before)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert int(done.stdout) < 8 * 1024  # KiB
