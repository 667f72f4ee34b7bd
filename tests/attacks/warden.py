"""Runs ckptkit on hostile files, each in a process of its own, and writes down what happened.

    python warden.py < jobs > results

A job is ``{"argv", "cwd", "output"}``, one line of JSON, answered by one line as soon as it is done.  This process
imports ckptkit once; for each job it forks
a child that may take at most `MEMORY` bytes more than it has and `SECONDS` of time, whose audit
events are watched, and whose standard output goes to the file ``output``.  An answer is
``{"code", "signal", "stderr", "events", "peak", "seconds"}``.  This process itself stays small: a
child's peak of memory begins with what it was forked from.

Events are what Python itself reports (``sys.addaudithook``): programs started, sockets opened, code
evaluated, modules imported that are neither ckptkit's nor the standard library's, files opened for
writing outside the job's folder.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
from pathlib import Path

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
    import fractions  # noqa: F401

    import ml_dtypes  # noqa: F401
    import numpy  # noqa: F401

    import ckptkit.cli.convert
    import ckptkit.cli.inspect
    import ckptkit.cli.inspect_text
    import ckptkit.cli.markdown
    import ckptkit.compare
    import ckptkit.conversion
    import ckptkit.conversion.options
    import ckptkit.formats
    import ckptkit.rewrite
    import ckptkit.stats
    import ckptkit.transfer

    # Defining a dataclass compiles its methods: no module may be first imported where that is watched.
    for package in (ckptkit.formats, ckptkit.rewrite):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)

    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(job: dict[str, object]) -> dict[str, object]:
    folder = Path(str(job["cwd"]))
    out = Path(str(job["output"]))
    err, seen = (folder / f".{stream}" for stream in ("stderr", "events"))
    child = os.fork()
    if child == 0:
        _child(job, out, err, seen)
    _, status, usage = os.wait4(child, 0)
    result: dict[str, object] = {
        "code": os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "stderr": err.read_bytes()[:20_000].decode(errors="replace"),
        "events": seen.read_text().splitlines() if seen.exists() else [],
        "peak": usage.ru_maxrss * 1024,
        "seconds": usage.ru_utime + usage.ru_stime,
    }
    for path in (err, seen):
        path.unlink(missing_ok=True)
    return result


def _child(job: dict[str, object], out: Path, err: Path, seen: Path) -> None:
    """Never returns."""
    folder = str(job["cwd"])
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    events = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    before = set(sys.modules)
    tempfile.tempdir = folder  # what is left behind there is seen
    argv = [str(argument) for argument in job["argv"]]  # type: ignore[attr-defined]
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(12 * SECONDS)  # for what waits without working: a pipe, a lock
    sys.addaudithook(lambda event, args: _watch(event, args, events, folder))
    code = 2
    try:
        from ckptkit.cli import main as command

        command(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        strangers = {name.partition(".")[0] for name in set(sys.modules) - before} - _KNOWN
        if strangers:
            os.write(events, f"modules {sorted(strangers)}\n".encode())
        os._exit(code)


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
