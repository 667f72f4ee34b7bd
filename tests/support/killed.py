"""Runs conversions that are sent a signal at a certain moment: in the middle of the n-th call of the system.

    python killed.py

Reads jobs from stdin, one JSON object a line, and answers each with the exit status of the process
that carried it out, as `os.waitstatus_to_exitcode` gives it: ``{"status": -9, "calls": 17}``.

A job: ``arguments`` of the command line; ``at``: before which call the process sends itself
``signal``; ``links``: whether the file system has hard links.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from typing import Any

from ckptkit.cli import main

CALLS = (
    "copy_file_range",
    "fsync",
    "ftruncate",
    "link",
    "mkdir",
    "open",
    "rename",
    "replace",
    "rmdir",
    "splice",
    "unlink",
)
"""What changes files, and is called between all else that does.  `open` counts where it makes one."""


def counted(name: str, calls: Any, report: int, job: dict[str, Any]) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(*given: Any, **more: Any) -> Any:
        if name != "open" or given[1] & os.O_CREAT:
            os.write(report, b".")
            if next(calls) == job["at"]:
                os.kill(os.getpid(), job["signal"])
        if name == "fsync":  # no power fails here
            return None
        if name == "link" and not job["links"]:
            raise PermissionError(1, "Operation not permitted")
        return real(*given, **more)

    return call


def carry_out(job: dict[str, Any], report: int) -> int:
    calls = count()
    for name in CALLS:
        setattr(os, name, counted(name, calls, report, job))
    try:
        main(job["arguments"])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def part_killed_once(task: Any) -> Any:
    """`ckptkit.conversion.write_part`; the first process that writes the second part is killed in the middle."""
    from ckptkit import conversion

    mark = os.path.join(os.path.dirname(task.source), "killed")
    if task.share.index == 2 and not os.path.exists(mark):
        os.mkdir(mark)
        _kill_at_work()
    return conversion.write_part(task)


def part_killed_always(task: Any) -> Any:
    """The same, but each is."""
    from ckptkit import conversion

    if task.share.index == 2:
        _kill_at_work()
    return conversion.write_part(task)


def _kill_at_work() -> None:
    from ckptkit.transfer import writing

    writing.move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def killed_by_one(source: str, destination: str, options: Any) -> Any:
    """`ckptkit.conversion.convert_file`; the file `three.pth` kills its process, whose temporary file is there."""
    from ckptkit import conversion

    if source.endswith("three.pth"):
        _kill_at_work()
    return conversion.convert_file(source, destination, options)


def killed_after_one(source: str, destination: str, options: Any) -> Any:
    """The same; the first that converts `two.pth` is killed once it has; `four.pth` is written by others meanwhile."""
    from ckptkit import conversion
    from ckptkit.fleet import worker

    if source.endswith("four.pth") and worker.is_one:
        with open(destination, "wb") as file:
            file.write(b"of others")
    report = conversion.convert_file(source, destination, options)
    if source.endswith("two.pth") and not os.path.exists(mark := f"{source}.killed"):
        os.mkdir(mark)
        os.kill(os.getpid(), signal.SIGKILL)
    return report


def warm_up() -> None:
    """Import what a conversion imports, and compute what is kept: the processes that follow are forks of this one."""
    one = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with tempfile.TemporaryDirectory() as folder:
        source, destination = os.path.join(folder, "a.safetensors"), os.path.join(folder, "b.safetensors")
        with open(source, "wb") as file:
            file.write(len(one).to_bytes(8, "little") + one + b"x")
        for options in ([], ["--max-shard-size", "10"]):
            try:
                main(["convert", "-q", source, destination, "--force", *options])
            except SystemExit as ended:
                if ended.code:
                    raise
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        job = json.loads(line)
        seen, report = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = 70
            try:
                status = carry_out(job, report)
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(report)
        calls = 0
        while part := os.read(seen, 4096):
            calls += len(part)
        os.close(seen)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, "calls": calls}), flush=True)
