"""Work for fleets, as workers import it; and a driver that tests interrupt.

    python fleet_work.py fork|spawn FOLDER [SECONDS]

The driver has two workers at tasks which hang; each leaves its process's number in the folder, and a file that a
``finally`` removes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ckptkit.errors import CorruptError


def square(number: int) -> int:
    return number * number


def same(value: Any) -> Any:
    return value


def says(text: str) -> str:
    print(text, flush=True)
    return text


def slow(number: int) -> int:
    time.sleep(0.002)
    return number


def slow_at_first(number: int) -> int:
    time.sleep(0.6 if number == 0 else 0)
    return number


def mixed(task: Any) -> Any:
    """Something of every kind, by the task."""
    if task == "raises":
        error = CorruptError("is damaged", path="a.pth", where="header", offset=7)
        raise error
    if task == "value-error":
        raise ValueError("no such thing")
    if task == "memory":
        raise MemoryError
    if task == "exits":
        sys.exit(3)
    if task == "lambda":
        return lambda: task
    return ("done", task)


def dies(task: tuple[str, str | int]) -> Any:
    """A pair of how its process ends, and where it notes that it was called."""
    how, place = task
    if how == "never":
        return place
    with open(place, "ab") as file:
        file.write(b".")
    if how == "once" and os.path.getsize(place) > 1:
        return "lived"
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def hangs(task: str | int) -> Any:
    """By name: asleep, or with the interpreter's lock held, so that no other thread runs."""
    if task == "asleep":
        time.sleep(60)
    if task == "locked":
        ctypes.PyDLL(None).sleep(60)
    return task


class Elsewhere:
    """What no other process can read."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.place = os.getpid()

    def __setstate__(self, state: dict[str, int]) -> None:
        if state["number"] == 30 and state["place"] != os.getpid():
            raise RuntimeError("is of another process")
        self.__dict__.update(state)


def number_of(task: Elsewhere) -> int:
    return task.number


def pids(_: object) -> int:
    time.sleep(0.02)
    return os.getpid()


def threads(_: object) -> int:
    return threading.active_count()


def counted(path: str) -> int:
    """How often it was called with a path."""
    with open(path, "ab") as file:
        file.write(b".")
    return os.path.getsize(path)


def stays(folder: str) -> None:
    """Hang, with a note of the process and a file that is to be removed."""
    unfinished = Path(folder, f"{os.getpid()}.tmp")
    try:
        unfinished.touch()
        Path(folder, f"{os.getpid()}.pid").touch()
        time.sleep(60)
    finally:
        unfinished.unlink()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support import fleet_work  # isort: skip - so that workers can import it, as they cannot import a __main__
    from ckptkit.fleet import each

    if sys.argv[1] == "spawn":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    limit = float(sys.argv[3]) if len(sys.argv) > 3 else None
    for _, outcome in each([sys.argv[2]] * 4, fleet_work.stays, jobs=2, seconds=limit):
        print(outcome.problem, flush=True)
