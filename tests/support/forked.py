"""Python processes that are forks of one that has imported the program: each takes milliseconds, and is its own.

    python forked.py SOCKET [MODULE ...]

Once somebody connects to the socket, a descriptor, imports ckptkit but for what needs torch, and the modules; then
forks for everyone who connects, and does what ``python -m MODULE`` or ``python -c CODE`` does, with the streams, the
folder and the environment of whoever asks (`asking.py`).  It ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

SECONDS = 300
"""What takes longer is killed."""

PUT_THERE = {"PYTHONHASHSEED", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that dask and torch put into the environment of the process that imports them."""

AT_START = ("PYTHON", "LANG", "LC_", "TZ", "OMP_", "MKL_", "TORCH", "CUDA")
"""Variables that are read when a process starts, or a library is loaded: other values need a new process."""

WITH_TORCH = ("ckptkit.verifier", "ckptkit.torch_bridge", "ckptkit.testing", "ckptkit.__main__")

ROOT = Path(__file__).parents[2]


class Forks:
    """A process that has ckptkit and some modules imported, and forks."""

    def __init__(self, python: str, *modules: str, path: str | None = None) -> None:
        """With ``path`` it is that of another ``Forks``, of a process that has ours for a child."""
        self._python = python
        self._env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process: subprocess.Popen[bytes] | None = None
        if path is not None:
            self.path = path
            return
        self._folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self._folder.name) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(16)
            fd = listener.fileno()
            command = [python, __file__, str(fd), *modules]
            self._process = subprocess.Popen(
                command, env=self._env, stdin=subprocess.PIPE, pass_fds=[fd], start_new_session=True
            )

    def run(
        self, *arguments: str, cwd: Path, env: dict[str, str], stdin: int | bytes = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of ``python ARGUMENTS`` gives it; ``stdin``: a descriptor, or what a pipe gives."""
        keys = (key for key in {*env, *self._env} - PUT_THERE if key.startswith(AT_START))
        if any(env.get(key) != self._env.get(key) for key in keys):
            assert stdin == subprocess.DEVNULL
            return subprocess.run(
                [self._python, *arguments], cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=SECONDS
            )
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, standard_input(stdin) as given:
            streams = [given, out.fileno(), err.fileno()]
            code = self.ask(*arguments, cwd=cwd, env=env, streams=streams)
            said = [os.pread(fd, os.fstat(fd).st_size, 0).decode() for fd in streams[1:]]
        return subprocess.CompletedProcess([self._python, *arguments], code, *said)

    def ask(self, *arguments: str, cwd: Path, env: dict[str, str], streams: list[int]) -> int:
        """The exit status of ``python ARGUMENTS`` with these descriptors; a signal's is negative."""
        from support.asking import ask

        return ask(self.path, list(arguments), str(cwd), env, streams)

    def shell(self, name: str, *arguments: str) -> str:
        """A function for a shell: ``NAME ...`` is ``python ARGUMENTS ...``."""
        asking = Path(__file__).with_name("asking.py")
        words = [self._python, "-S", "-E", str(asking), self.path, *arguments]
        return f'{name}() {{ {shlex.join(words)} "$@"; }}\n'

    def close(self) -> None:
        """End it, if it is ours."""
        if self._process is None:
            return
        self._process.communicate(timeout=60)
        self._folder.cleanup()


@contextlib.contextmanager
def standard_input(given: int | bytes) -> Iterator[int]:
    """A descriptor to read from: that one, nothing's, or a pipe's that is filled by a thread."""
    if isinstance(given, int) and given != subprocess.DEVNULL:
        yield given
        return
    if isinstance(given, int):
        with open(os.devnull, "rb") as nothing:
            yield nothing.fileno()
        return
    reader, writer = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), open(writer, "wb") as pipe:
            pipe.write(given)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        yield reader
    finally:
        os.close(reader)
        filler.join()


def preload(*modules: str) -> None:
    """Import all of ckptkit but for what needs torch, and these: whatever a child would import first of all."""
    files = sorted((ROOT / "ckptkit").rglob("*.py"))
    found = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    without_torch = [name for name in found if not name.startswith(WITH_TORCH)]
    for module in [*without_torch, "decimal", "fractions", "tabulate", "numpy", "ml_dtypes", *modules]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # hundreds of torch's, which no child needs to undo
    gc.freeze()


def act(kind: str, what: str, *rest: str) -> int:
    """Be ``python KIND WHAT ...``; the exit status."""
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c"
            sys.argv = ["-c", *rest]
            sys.modules["__main__"] = module = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), module.__dict__)  # noqa: S102 - as python does
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def begin(asker: socket.socket) -> NoReturn:
    """Be the command that is asked for."""
    _, streams, _, _ = socket.recv_fds(asker, 1, 3)
    text = b"".join(iter(lambda: asker.recv(1 << 16), b""))
    asker.close()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    arguments, cwd, env = json.loads(text)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = cwd
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    code = 1
    try:
        code = act(*arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def serve(listener: socket.socket) -> None:
    """Fork for everyone who connects, and tell them how it ended."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    running: dict[int, tuple[socket.socket, float]] = {}
    while True:
        ready, _, _ = select.select([listener, heard, 0], [], [], 1 if running else None)
        if heard in ready:
            os.read(heard, 4096)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            asker, _ = running.pop(ended[0])
            with contextlib.suppress(OSError):  # who asked may be gone
                asker.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())
            asker.close()
        for child, (_, until) in running.items():
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
        if 0 in ready:
            return
        if listener not in ready:
            continue
        asker, _ = listener.accept()
        child = os.fork()
        if child == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (heard, told):
                    os.close(fd)
                for each in (listener, *(other for other, _ in running.values())):
                    each.close()
                begin(asker)
            finally:
                os._exit(70)
        running[child] = (asker, time.monotonic() + SECONDS)


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    if 0 in select.select([listening, 0], [], [])[0]:
        sys.exit()
    preload(*sys.argv[2:])
    serve(listening)
