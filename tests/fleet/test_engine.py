"""What comes of tasks, the same wherever the work is done: here, in processes of our own, in a user's executor."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import fleet_work

from ckptkit.errors import CkptkitError, CorruptError
from ckptkit.fleet import Outcome, cores, driver, each, engine


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def threads_of() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


HERE = {"jobs": 1}
OWN = {"jobs": 2}


@pytest.fixture(params=["here", "own", "processes", "threads_of", "dask_executor"])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments that say where the work is done."""
    if request.param in ("here", "own"):
        return HERE if request.param == "here" else OWN
    return {"executor": request.getfixturevalue(request.param)}


@pytest.fixture(params=["here", "threads_of"])
def in_short(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where the work is done by the driver, and where it is not: all that has one is alike."""
    return HERE if request.param == "here" else {"executor": request.getfixturevalue(request.param)}


def test_every_task_has_its_outcome_in_order(where: dict[str, Any]) -> None:
    tasks = [*range(40), "raises", "value-error", "lambda", "memory", "exits", *range(40, 60)]
    came = list(each(iter(tasks), fleet_work.mixed, **where))
    assert [task for task, _ in came] == tasks
    outcomes = {task: outcome for task, outcome in came if isinstance(task, str)}
    values = [outcome.result() for task, outcome in came if isinstance(task, int)]
    assert values == [("done", number) for number in range(60)]
    raised = outcomes["raises"]
    assert (raised.problem, raised.text) == ("failed", "a.pth: header, byte 7: is damaged")
    assert isinstance(raised.error, CorruptError)
    assert (raised.error.path, raised.error.where, raised.error.offset) == ("a.pth", "header", 7)
    with pytest.raises(CorruptError):
        raised.result()
    assert outcomes["value-error"] == Outcome(problem="failed", text="ValueError: no such thing")
    with pytest.raises(CkptkitError, match="no such thing"):
        outcomes["value-error"].result()
    assert outcomes["memory"] == Outcome(problem="failed", text="out of memory")
    assert outcomes["exits"] == Outcome(problem="failed", text="SystemExit: 3")
    if where == HERE:
        assert outcomes["lambda"].result()() == "lambda"
    else:
        assert outcomes["lambda"].problem == "failed"
        assert outcomes["lambda"].text.startswith("its result cannot be pickled: ")


def test_a_task_that_hangs_is_timed_out_and_the_others_are_done(where: dict[str, Any]) -> None:
    tasks = [*range(5), "asleep", *range(5, 10)]
    came = list(each(tasks, fleet_work.hangs, seconds=0.3, **where))
    assert [task for task, _ in came] == tasks
    assert [outcome.value for task, outcome in came if task != "asleep"] == list(range(10))
    assert came[5][1] == Outcome(problem="timed-out", text="it took longer than the limit of 0.3 s")


def test_a_task_that_cannot_be_pickled_is_told(in_short: dict[str, Any]) -> None:
    outcomes = [outcome for _, outcome in each([1, threading.Lock(), 2], fleet_work.threads, **in_short)]
    assert outcomes[0].problem is outcomes[2].problem is None
    if in_short != HERE:
        assert outcomes[1].problem == "failed"
        assert outcomes[1].text.startswith("the task cannot be pickled: TypeError: ")


def test_a_task_that_workers_cannot_read_is_told(processes: Executor) -> None:
    tasks = [fleet_work.Elsewhere(number) for number in range(500)]
    outcomes = [outcome for _, outcome in each(tasks, fleet_work.number_of, executor=processes)]
    assert [outcome.value for outcome in outcomes] == [*range(30), None, *range(31, 500)]
    assert outcomes[30].problem == "failed"
    assert outcomes[30].text.startswith(
        "the worker cannot read the task (are its functions and classes in an importable module?): "
    )


def test_batches_shrink_where_the_number_of_tasks_is_known() -> None:
    sizes: list[int] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            sizes.append(args[3])
            return super().submit(function, *args, **kwargs)

    with Counting(1) as executor:
        assert len(list(each(range(20_000), fleet_work.same, executor=executor))) == 20_000
    assert max(sizes) > 50
    assert sizes[-1] == 1


def test_work_that_cannot_be_pickled_is_an_error(where: dict[str, Any]) -> None:
    if where == HERE:
        assert [outcome.value for _, outcome in each([1, 2], lambda number: number + 1, **where)] == [2, 3]
        return
    with pytest.raises(CkptkitError, match="the task cannot be sent to other processes: "):
        next(each([1, 2], lambda number: number + 1, **where))


def test_a_partial_function_is_sent_with_what_it_holds(in_short: dict[str, Any]) -> None:
    came = each(range(5), partial(pow, 2), **in_short)
    assert [outcome.result() for _, outcome in came] == [1, 2, 4, 8, 16]


def test_without_tasks_nothing_comes(where: dict[str, Any]) -> None:
    assert list(each([], fleet_work.square, **where)) == []


def test_an_error_of_the_iterable_comes_after_the_results_before_it(in_short: dict[str, Any]) -> None:
    def tasks() -> Iterator[int]:
        yield from range(3)
        raise CkptkitError("line 4 cannot be read")

    seen = []
    with pytest.raises(CkptkitError, match="line 4"):
        seen.extend(outcome.result() for _, outcome in each(tasks(), fleet_work.square, **in_short))
    came = each(tasks(), fleet_work.square, **in_short)
    assert [next(came)[1].result() for _ in range(3)] == [0, 1, 4]
    with pytest.raises(CkptkitError, match="line 4"):
        next(came)


def test_the_same_work_is_done_anew_each_time(where: dict[str, Any], tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "abc"]
    for count in (1, 2):
        assert [outcome.result() for _, outcome in each(paths, fleet_work.counted, **where)] == [count] * 3


def test_tasks_are_pulled_as_there_is_room(threads_of: Executor) -> None:
    pulled, most = itertools.count(), 0
    tasks = (next(pulled) for _ in range(40_000))
    for number, (task, outcome) in enumerate(each(tasks, fleet_work.same, executor=threads_of)):
        assert task == outcome.value == number
        if number % 1000 == 0:
            most = max(most, int(repr(pulled)[6:-1]) - number)
    assert number == 39_999
    assert most <= driver._MOST_TASKS + 1


def test_results_do_not_wait_for_tasks_that_come_slowly(in_short: dict[str, Any]) -> None:
    pulled = 0

    def tasks() -> Iterator[int]:
        nonlocal pulled
        for number in range(80):
            pulled += 1
            time.sleep(0.001 if number < 50 else 0.05)
            yield number

    behind = []
    for task, outcome in each(tasks(), fleet_work.square, **in_short):
        assert outcome.result() == task * task
        behind.append(pulled - task)
    assert max(behind[-30:]) <= 15


def test_a_slow_task_holds_up_no_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_MOST_TASKS", 500)
    pulled = itertools.count()
    came = each((next(pulled) for _ in range(100_000)), fleet_work.slow_at_first, jobs=2)
    assert next(came)[1].value == 0
    assert 400 < int(repr(pulled)[6:-1]) <= 502  # the other worker went on meanwhile
    came.close()


def test_results_that_wait_are_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_MOST_NBYTES", 100_000)
    with ThreadPoolExecutor(2) as executor:
        tasks = [b"x" * 10_000] * 300
        assert [outcome.value for _, outcome in each(tasks, fleet_work.same, executor=executor)] == tasks


def test_several_processes_work_and_none_is_left(where: dict[str, Any]) -> None:
    numbers = {outcome.result() for _, outcome in each(range(20), fleet_work.pids, **where)}
    is_here = where == HERE or isinstance(where.get("executor"), ThreadPoolExecutor)
    assert numbers == {os.getpid()} if is_here else len(numbers) == 2 and os.getpid() not in numbers
    if where == OWN:
        assert not [number for number in numbers if Path(f"/proc/{number}").exists()]


def test_batches_grow_and_what_is_slow_holds_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_GIVEN_BATCH_SECONDS", 0.1)
    sizes = []

    class Counting(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            sizes.append(args[3])
            return super().submit(function, *args, **kwargs)

    with Counting(1) as executor:
        values = [
            outcome.value for _, outcome in each((number for number in range(5000)), fleet_work.same, executor=executor)
        ]
        assert values == [*range(5000)]
    assert sizes[:64] == [1] * 64
    assert 50 < max(sizes) <= driver._LARGEST_BATCH
    sizes.clear()
    with Counting(1) as executor:  # fast ones make large batches; then each takes longer than a batch should
        tasks = [0.0] * 2000 + [0.15] * 6
        assert [outcome.value for _, outcome in each((task for task in tasks), time.sleep, executor=executor)] == [
            None
        ] * 2006
    assert sum(sizes) > 2006  # some went out twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jobs": 0}, "jobs must be a whole number of at least 1, not 0"),
        ({"jobs": True}, "not True"),
        ({"jobs": 1.5}, "not 1.5"),
        ({"jobs": 2, "executor": ThreadPoolExecutor(1)}, "either jobs or an executor"),
        ({"executor": 3}, "the executor has no submit method: 3"),
        ({"seconds": 0}, "a number of seconds above 0, not 0"),
        ({"seconds": float("nan")}, "above 0, not nan"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CkptkitError, match=message):
        each([1], fleet_work.square, **arguments)


def test_few_tasks_are_done_here() -> None:
    assert {outcome.value for _, outcome in each(range(9), fleet_work.pids, jobs=2, worth=10)} == {os.getpid()}
    assert {outcome.value for _, outcome in each([1], fleet_work.pids, jobs=2)} == {os.getpid()}


def test_a_limit_alone_asks_for_a_process_that_can_be_stopped() -> None:
    assert next(each([1], fleet_work.pids, seconds=20))[1].result() != os.getpid()


def test_a_worker_does_the_work_of_another_fleet_itself() -> None:
    def inner() -> None:
        values.append([outcome.value == os.getpid() for _, outcome in each(range(3), fleet_work.pids, jobs=2)])

    values: list[list[bool]] = []
    current = multiprocessing.current_process()
    was = current.daemon
    current._config["daemon"] = True  # type: ignore[attr-defined] - as of a worker
    try:
        inner()
    finally:
        current._config["daemon"] = was  # type: ignore[attr-defined]
    assert values == [[True] * 3]


def test_another_version_of_ckptkit_is_told(monkeypatch: pytest.MonkeyPatch, where: dict[str, Any]) -> None:
    if where == HERE:
        return
    monkeypatch.setattr(driver, "__version__", "9.9")
    outcomes = [outcome for _, outcome in each(range(10), fleet_work.square, **where)]
    assert {outcome.problem for outcome in outcomes} == {"version"}
    assert "the worker has ckptkit 0." in outcomes[0].text
    assert "and this process 9.9: install the same" in outcomes[0].text


def test_processors_are_those_that_this_process_may_use() -> None:
    code = "import os, ckptkit.fleet as f; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(f.cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


def test_processors_are_no_more_than_the_control_group_has(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    inner = tmp_path / "fs" / "a" / "b"
    inner.mkdir(parents=True)
    groups.write_text("4:cpu:/x\n0::/a/b\n")
    assert engine._quota(str(groups), str(tmp_path / "fs")) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert engine._quota(str(groups), str(tmp_path / "fs")) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert engine._quota(str(groups), str(tmp_path / "fs")) == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert engine._quota(str(groups), str(tmp_path / "fs")) == 0.5
    first = tmp_path / "v1" / "cpu"
    first.mkdir(parents=True)
    (first / "cpu.cfs_quota_us").write_text("200000\n")
    (first / "cpu.cfs_period_us").write_text("100000\n")
    assert engine._quota(str(groups), str(tmp_path / "v1")) == 2
    (first / "cpu.cfs_quota_us").write_text("-1\n")
    assert engine._quota(str(groups), str(tmp_path / "v1")) is None
    assert engine._quota(str(tmp_path / "none"), str(tmp_path / "fs")) is None


def test_what_comes_of_a_task_can_itself_be_sent_on() -> None:
    outcome = Outcome(problem="failed", text="a: b", error=CorruptError("b", path="a"))
    again = pickle.loads(pickle.dumps(outcome))
    assert (again.problem, again.text, str(again.error)) == ("failed", "a: b", "a: b")
