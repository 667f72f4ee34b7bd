"""Runs ckptkit on hostile files, each in a process of its own, and writes down what happened.

    python warden.py < jobs > results

A job is ``{"cwd", "commands"}``, one line of JSON, answered by one line as soon as it is done; ``"memory"`` and
``"seconds"`` in it are bounds of its own.  This process imports ckptkit once; for each job it forks
a child that may take at most `MEMORY` bytes more than it has, and `SECONDS` of time for each command, whose audit
events are watched.  It runs the commands, ``{"argv", "output"}`` each, one after the other; what one prints goes to
its file ``output``.  The answer has
``{"code", "signal", "stderr", "events", "peak"}`` for each command; a signal that ended the process is the answer of
all that had not ended before.  This process itself stays small: a child's peak of memory begins with what it was
forked from.

Events are what Python itself reports (``sys.addaudithook``): programs started, sockets opened, code
evaluated, modules imported that are neither ckptkit's nor the standard library's, files opened for
writing outside the job's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
SECONDS = 20
"""Of the processor's time.  The aim is ten, on the machine it was measured on; this only keeps a slow or
busy one from being taken for an attack that succeeded."""

_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
_REACHES = ("socket.", "ctypes.", "pickle.find_class", "webbrowser.", "urllib.", "ftplib.", "shutil.rmtree")
_KNOWN = frozenset(sys.stdlib_module_names) | {
    "ckptkit", "click", "tabulate", "wcwidth", "numpy", "ml_dtypes", "safetensors", "torch", "typing_extensions",
}  # fmt: skip


def main() -> None:
    # Defining a dataclass compiles its methods: no module may be first imported where that is watched.
    from forked import preload

    preload()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(job: dict[str, Any]) -> list[dict[str, object]]:
    folder, commands = Path(job["cwd"]), job["commands"]
    files = [[folder / f".{what}{number}" for what in ("stderr", "events", "code")] for number in range(len(commands))]
    child = os.fork()
    if child == 0:
        _child(folder, commands, files, job.get("memory", MEMORY), job.get("seconds", SECONDS))
    _, status, usage = os.wait4(child, 0)
    results: list[dict[str, object]] = []
    for err, seen, code in files:
        ended = code.read_text()
        results.append(
            {
                "code": int(ended) if ended else None,
                "signal": os.WTERMSIG(status) if not ended and os.WIFSIGNALED(status) else None,
                "stderr": err.read_bytes()[:20_000].decode(errors="replace"),
                "events": seen.read_text().splitlines(),
                "peak": usage.ru_maxrss * 1024,
            }
        )
        for path in (err, seen, code):
            path.unlink()
    return results


def _child(folder: Path, commands: list[dict[str, Any]], files: list[list[Path]], memory: int, seconds: int) -> None:
    """Never returns."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    tempfile.tempdir = str(folder)  # what is left behind there is seen
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    outputs = [command["output"] for command in commands]
    streams = [list(map(_created, (output, *paths))) for output, paths in zip(outputs, files, strict=True)]
    log = os.dup(0)
    sys.addaudithook(lambda event, args: _watch(event, args, log, str(folder)))
    before = set(sys.modules)
    try:
        for command, (out, err, seen, ended) in zip(commands, streams, strict=True):
            for number, opened in ((1, out), (2, err), (log, seen)):
                os.dup2(opened, number)
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime) + seconds
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            signal.alarm(12 * seconds)  # for what waits without working: a pipe, a lock
            code = _code([str(argument) for argument in command["argv"]])
            strangers = {name.partition(".")[0] for name in set(sys.modules) - before} - _KNOWN
            if strangers:
                os.write(log, f"modules {sorted(strangers)}\n".encode())
            os.write(ended, str(code).encode())
    finally:
        os._exit(70)


def _created(path: str | Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _code(argv: list[str]) -> int:
    """The exit status of a command."""
    try:
        from ckptkit.cli import main as command

        command(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    return 2


def _watch(event: str, args: tuple[object, ...], log: int, folder: str) -> None:
    if event.startswith((*_PROGRAMS, *_REACHES)):
        os.write(log, f"{event} {args!r:.200}\n".encode())
    elif event == "import" and str(args[0]).partition(".")[0] not in _KNOWN:
        os.write(log, f"import {args[0]}\n".encode())
    elif event == "compile" and args[0] is not None and args[1] in ("<string>", "<unknown>", None):
        os.write(log, f"compile {args[0]!r:.200}\n".encode())
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = os.path.abspath(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes)) else folder
        if not path.startswith((folder, "/dev/")):
            os.write(log, f"open {path} for writing\n".encode())


if __name__ == "__main__":
    main()
