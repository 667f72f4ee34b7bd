"""Runs the command line many times, each time in a process of its own, and imports it once: a fork takes milliseconds.

    python forked.py [MODULE ...]

Imports ckptkit but for what needs torch, and the modules; then reads jobs from stdin, one JSON object a line, and
answers each with its exit status, as `subprocess` gives it.  A job: ``arguments`` of the command line, ``cwd``,
``env`` (all of it), and ``out`` and ``err``, the files that stdout and stderr go to.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 300
"""A command that takes longer is killed."""

AT_START = ("PYTHON", "LANG", "LC_", "TZ", "OMP_", "MKL_", "TORCH", "CUDA")
"""Variables that are read when a process starts, or a library is loaded: other values need a new process."""

WITH_TORCH = ("ckptkit.verifier", "ckptkit.torch_bridge", "ckptkit.testing", "ckptkit.__main__")

ROOT = Path(__file__).parents[2]


class Forks:
    """A process with ckptkit and some modules imported, which forks for each command."""

    def __init__(self, python: str, *modules: str) -> None:
        self.env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [python, __file__, *modules]
        self._process = subprocess.Popen(
            command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self._folder = tempfile.TemporaryDirectory()

    def takes(self, env: dict[str, str]) -> bool:
        """Whether a command with this environment would find what it finds in a new process."""
        return all(env.get(key) == self.env.get(key) for key in {*env, *self.env} if key.startswith(AT_START))

    def run(self, arguments: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` gives it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = (Path(self._folder.name) / stream for stream in ("out", "err"))
        job = {"arguments": arguments, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        said = (stream.read_text(encoding="utf-8") for stream in (out, err))
        return subprocess.CompletedProcess(["ckptkit", *arguments], code, *said)

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)
        self._folder.cleanup()


def preload(*modules: str) -> None:
    """Import all of ckptkit but for what needs torch, and these: whatever a child would import first of all."""
    found = [module.name for module in pkgutil.walk_packages([str(ROOT / "ckptkit")], "ckptkit.")]
    for module in [*(name for name in found if not name.startswith(WITH_TORCH)), "decimal", "fractions", *modules]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()


def begin(job: dict[str, Any]) -> None:
    """Be the command; never returns."""
    import ckptkit.cli

    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, stream in ((1, "out"), (2, "err")):
        fd = os.open(job[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
        os.close(fd)
    sys.path[0] = job["cwd"]
    sys.argv = ["ckptkit", *job["arguments"]]
    ckptkit.cli.run()


def serve() -> None:
    jobs, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)
    os.close(nothing)
    for line in jobs:
        child = os.fork()
        if child == 0:
            try:
                begin(json.loads(line))
            finally:
                os._exit(70)

        def kill(*_: object, child: int = child) -> None:
            os.kill(child, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.alarm(SECONDS)
        status = os.waitpid(child, 0)[1]
        signal.alarm(0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    preload(*sys.argv[1:])
    serve()
