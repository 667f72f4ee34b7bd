"""Executors that users have: what becomes of their tasks when workers die, hang, or answer what they should not."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import fleet_work

from ckptkit import __version__
from ckptkit.fleet import Outcome, each, engine, executors
from ckptkit.fleet.worker import run


def test_of_a_pool_that_breaks_only_what_broke_it_is_lost(tmp_path: Path) -> None:
    note = str(tmp_path / "note")
    tasks = [
        *(("never", number) for number in range(100)),
        ("exit", note),
        *(("never", number) for number in range(100)),
    ]
    with ProcessPoolExecutor(2, mp_context=_spawn()) as executor:
        came = list(each(tasks, fleet_work.dies, executor=executor))
    assert [task for task, _ in came] == tasks
    assert came[100][1] == Outcome[Any](problem="died", text="its worker ended with exit code 3")
    assert all(outcome.value == task[1] for task, outcome in came if task[0] == "never")


def _spawn() -> Any:
    return multiprocessing.get_context("spawn")


def test_dask_goes_on_when_a_worker_is_killed_in_the_middle(dask_executor: Executor, tmp_path: Path) -> None:
    once, always = str(tmp_path / "once"), str(tmp_path / "always")
    tasks = [*(("never", number) for number in range(100)), ("once", once), ("killed", always), ("never", 100)]
    # The limit is for dask, some of whose futures never end where workers that had their results are killed.
    came = list(each(tasks, fleet_work.dies, executor=dask_executor, seconds=5))
    assert [task for task, _ in came] == tasks
    outcomes = [outcome for _, outcome in came]
    assert [outcome.value for outcome in outcomes[:100]] == list(range(100))
    assert (outcomes[100].value, outcomes[102].value) == ("lived", 100)
    assert outcomes[101].problem == "died"
    assert "KilledWorker" in outcomes[101].text
    assert os.path.getsize(always) in (2, 3)  # it was tried again, and then while nothing else ran


def test_a_worker_that_gives_no_sign_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "SLACK", 0.2)
    monkeypatch.setattr(engine, "_GIVEN_BATCH_SECONDS", 0.05)
    executor = ProcessPoolExecutor(2, mp_context=_spawn())
    list(each(range(10), fleet_work.pids, executor=executor))
    try:
        came = list(each([1, "locked", 2, 3], fleet_work.hangs, executor=executor, seconds=0.1))
        assert [task for task, _ in came] == [1, "locked", 2, 3]
        assert [outcome.value for _, outcome in came] == [1, None, 2, 3]
        assert came[1][1].problem == "timed-out"
        assert came[1][1].text.startswith("the executor returned no result for ")
    finally:
        for pid in executor._processes:
            os.kill(pid, signal.SIGKILL)
        executor.shutdown()


class Refusing(ThreadPoolExecutor):
    """Takes three batches."""

    taken = 0

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.taken += 1
        if self.taken > 3:
            raise RuntimeError("the queue is closed")
        return super().submit(function, *args, **kwargs)


def test_an_executor_that_takes_no_more_leaves_no_task_untold() -> None:
    with Refusing(1) as executor:
        came = list(each(range(20_000), fleet_work.square, executor=executor))
    assert [outcome.value for _, outcome in came[:3]] == [0, 1, 4]
    refused = Outcome[int](problem="died", text="the executor accepts no work: RuntimeError: the queue is closed")
    assert [outcome for _, outcome in came[3:]] == [refused] * 19_997


def test_an_executor_that_was_shut_down_is_told() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    ((_, outcome),) = each([1], fleet_work.square, executor=executor)
    assert outcome.problem == "died"
    assert "cannot schedule new futures after shutdown" in outcome.text


class Answering(Executor):
    """Its futures are what a function makes of each batch."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            answer = self.answer(function, *args)
        except Exception as error:
            future.set_exception(error)
        else:
            if answer is None:
                future.cancel()
                future.set_running_or_notify_cancel()
            else:
                future.set_result(answer)
        return future


def raising(error: Exception) -> Any:
    def answer(*_: object) -> Any:
        raise error

    return answer


@pytest.mark.parametrize(
    ("answer", "problem", "text"),
    [
        (lambda *_: None, "died", "it was canceled"),
        (lambda *_: {"a": 1}, "died", "the executor returned {'a': 1}, which is not a worker's result"),
        (lambda *_: (1, 2, 3), "died", "the executor returned (1, 2, 3), which is not a worker's result"),
        (raising(OSError("no route")), "died", "the executor lost it: OSError: no route"),
        (
            raising(ModuleNotFoundError("No module named 'ckptkit.fleet'")),
            "version",
            "the worker cannot run this version of ckptkit: ModuleNotFoundError: No module named 'ckptkit.fleet'",
        ),
    ],
)
def test_answers_that_are_none_are_problems(answer: Any, problem: str, text: str) -> None:
    came = list(each(range(5), fleet_work.square, executor=Answering(answer)))
    assert [(outcome.problem, outcome.text) for _, outcome in came] == [(problem, text)] * 5


def test_what_is_lost_is_tried_once_more_one_by_one() -> None:
    calls: list[int] = []

    def answer(function: Any, *args: Any) -> Any:
        calls.append(args[3])
        if len(calls) == 70:
            raise ConnectionError("gone")
        return function(*args)

    came = list(each(range(2000), fleet_work.square, executor=Answering(answer)))
    assert [outcome.value for _, outcome in came] == [number * number for number in range(2000)]
    assert calls[69] > 1
    assert sum(calls) == 2000 + calls[69]


def test_what_is_under_way_is_cancelled_when_nobody_listens() -> None:
    futures: list[Future[Any]] = []

    class Kept(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            futures.append(super().submit(function, *args, **kwargs))
            return futures[-1]

    with Kept(1) as executor:
        came = each(range(1000), fleet_work.slow, executor=executor)
        assert next(came)[0] == 0
        came.close()
        assert any(future.cancelled() for future in futures)
        assert executor.submit(fleet_work.square, 3).result() == 9  # it is the user's, and goes on


class StandIn:
    """What of ``ray`` is used: ``remote``, and `ObjectRef.future`."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(2)

    def remote(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            future = self.threads.submit(function, *args)
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(remote=call)


def test_ray_is_an_executor_of_a_few_lines() -> None:
    ray = StandIn()

    class RayExecutor(Executor):
        def submit(self, function: Any, /, *args: Any) -> Future[Any]:
            return ray.remote(function).remote(*args).future()

    with ray.threads:
        came = list(each(range(200), fleet_work.square, executor=RayExecutor()))
    assert [outcome.value for _, outcome in came] == [number * number for number in range(200)]


def test_a_worker_answers_for_the_tasks_that_it_began() -> None:
    work, tasks = pickle.dumps(time.sleep), pickle.dumps([0.05] * 10)
    _, results, seconds, abandoned = run(__version__, work, tasks, 10, None, 0.12)
    assert 2 <= len(results) <= 4
    assert results[0] == ("", "", pickle.dumps(None, 5))
    assert seconds >= 0.1
    assert not abandoned
    _, results, _, _ = run(__version__, work, tasks, 10, None, -1.0)
    assert len(results) == 1  # one is begun, however late it is: else none ever were
    _, results, _, abandoned = run(__version__, work, tasks, 10, 0.01, 5.0)
    assert (len(results), results[0][0], abandoned) == (1, "timed-out", True)
    _, results, _, _ = run(__version__, b"cno_such_module\nx\n.", tasks, 10, None, 5.0)
    assert [result[0] for result in results] == ["failed"] * 10
    assert "the worker cannot import the function" in results[0][1]
