"""Every task once, on as many threads as there are; a failure ends them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ckptkit.transfer import workers
from ckptkit.transfer.workers import in_parallel

Tasks = Iterator[Callable[[], object]]

THREADS = [1, 2, 4]


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("os.cpu_count", lambda: request.param)
    return request.param


def test_every_task_once(threads: int) -> None:
    done: list[int] = []
    in_parallel((lambda number=number: done.append(number) for number in range(1000)), nbytes=workers.MANY_NBYTES)
    assert sorted(done) == list(range(1000))
    in_parallel([], nbytes=workers.MANY_NBYTES)


def test_they_run_side_by_side_where_there_is_much_to_do(threads: int) -> None:
    barrier = threading.Barrier(threads)
    in_parallel([lambda: barrier.wait(10)] * threads, nbytes=workers.MANY_NBYTES)
    seen: set[threading.Thread] = set()
    in_parallel([lambda: seen.add(threading.current_thread())] * 9, nbytes=workers.MANY_NBYTES - 1)
    assert seen == {threading.current_thread()}


def test_none_and_one_start_no_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of each of very many small files: to start a thread takes as long as to look into one."""
    monkeypatch.setattr(workers, "Background", None)
    seen: list[threading.Thread] = []
    for count in (0, 1):
        in_parallel([lambda: seen.append(threading.current_thread())] * count, nbytes=workers.MANY_NBYTES)
    assert seen == [threading.current_thread()]


def test_a_processor_nobody_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: None)
    seen: set[threading.Thread] = set()
    in_parallel([lambda: seen.add(threading.current_thread())] * 9, nbytes=1 << 60)
    assert seen == {threading.current_thread()}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_is_raised_and_nothing_more_begun(threads: int, failure: BaseException) -> None:
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        if number == 5:
            raise failure
        if number > 5:
            time.sleep(0.02)

    with pytest.raises(type(failure)) as caught:
        in_parallel((lambda number=number: task(number) for number in range(500)), nbytes=1 << 60)
    assert caught.value is failure
    assert 5 in begun
    assert len(begun) <= 5 + 2 * threads
    assert threading.active_count() == 1 or not any(isinstance(t, workers.Background) for t in threading.enumerate())


def test_tasks_that_cannot_be_made(threads: int) -> None:
    def tasks() -> Tasks:
        yield lambda: None
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        in_parallel(tasks(), nbytes=1 << 60)


def test_an_interrupt_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    real = workers.Background.join
    begun: list[int] = []

    def interrupted(thread: workers.Background, timeout: float | None = None) -> None:
        while not begun:
            time.sleep(0.001)
        monkeypatch.setattr(workers.Background, "join", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers.Background, "join", interrupted)

    def task(number: int) -> None:
        begun.append(number)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        in_parallel((lambda number=number: task(number) for number in range(500)), nbytes=1 << 60)
    count = len(begun)
    assert count < 500
    assert not any(isinstance(thread, workers.Background) for thread in threading.enumerate())
    assert len(begun) == count


def test_buffers_are_kept_by_thread_and_name() -> None:
    first = workers.buffer("a", 100)
    assert len(first) == 100
    first[:] = b"x" * 100
    assert bytes(workers.buffer("a", 60)) == b"x" * 60
    assert bytes(workers.buffer("b", 60)) == bytes(60)
    assert len(workers.buffer("a", 200)) == 200
    others: list[bytes] = []
    thread = threading.Thread(target=lambda: others.append(bytes(workers.buffer("b", 60))))
    workers.buffer("b", 60)[:] = b"y" * 60
    thread.start()
    thread.join()
    assert others == [bytes(60)]
