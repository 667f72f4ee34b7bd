"""Shared fixtures: files that torch itself writes, with CUDA tags where a test wants them."""

from __future__ import annotations

import compileall
import copyreg
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from _pytest.runner import runtestprotocol

import ckptkit
from ckptkit.cli import main
from ckptkit.dtypes import DTYPES

# The collector has nothing to find while modules are imported and tests are collected.
gc.disable()

# Once, and not in every process: tests, with their assertions rewritten, and hypothesis, of which pytest rewrites all.
# Where PYTHONDONTWRITEBYTECODE is set none would be kept: half of the time that collecting takes.
_writes_no_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, False

import hypothesis  # noqa: E402

# Of several workers each has a core: more threads of torch's would wait for one another, and busily.  Torch is imported
# where it is needed: the process that several workers report to does without.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, so that a change is what a new failure comes from; others are drawn with
# `--hypothesis-profile=searching`.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("searching", derandomize=False)
hypothesis.settings.load_profile("repeatable")

# A run in the background (nohup, `&`) ignores these, and all that it starts would; tests send them.
for _ignored, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_ignored) == signal.SIG_IGN:
        signal.signal(_ignored, _default)

if TYPE_CHECKING:
    import torch
    from support.commands import Done
    from support.forked import Forks
    from support.sharded import Samples

pytest.register_assert_rewrite("support")

FIXTURES = Path(__file__).parent.parent / "fixtures"

PACKAGE = Path(ckptkit.__file__).parent

# Once, and not in every process that tests start: where PYTHONDONTWRITEBYTECODE is set, none of them would keep it.
compileall.compile_dir(PACKAGE, quiet=2)

PYTHON = os.environ.get("CKPTKIT_PYTHON", sys.executable)
"""What runs the command of the fixture `run`: another may have other versions of what ckptkit needs, and no torch.

Its processes are forks then; where it is the Python of the tests the command runs in theirs."""

IMPORTED = {True: ("safetensors.torch", "torchvision.models", "ckptkit.verifier"), False: ()}
"""What processes of the fixture `forks` have imported beside ckptkit, with torch and without."""

_forks: dict[bool, Forks] = {}
"""Those that the workers of this process share."""

SaveAs = Callable[..., Path]


@contextmanager
def saved_from(device: str | Callable[[Any], str]) -> Iterator[None]:
    """Let torch.save tag storages as if they lay on ``device``: all that differs in the file."""
    tag = device if callable(device) else lambda storage: device
    with mock.patch("torch.serialization.location_tag", tag):
        yield


def pytest_collection_finish() -> None:
    """Thousands of tests and all of torch stay to the end: without them the collector has little to go through."""
    sys.dont_write_bytecode = _writes_no_bytecode
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of several workers none starts the processes that fork: all have those that the process of this hook starts."""
    from support.forked import Forks

    if not _forks:
        _forks.update({with_torch: Forks(sys.executable, *modules) for with_torch, modules in IMPORTED.items()})
    node.workerinput["forks"] = {with_torch: forks.path for with_torch, forks in _forks.items()}


def pytest_unconfigure() -> None:
    for each in _forks.values():
        each.close()
    _forks.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A worker tells how a test ended, and not that it began, was set up and was torn down: six messages become two."""
    if not hasattr(item.config, "workerinput"):
        return None
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test that makes tensors of a kind that this torch does not have, or does not save, cannot run with it."""
    try:
        return (yield)
    except (AttributeError, KeyError, RuntimeError) as error:
        import torch

        lacking = re.search(r"attribute '(_rebuild_\w+)'|(NestedTensorImpl doesn't support sizes)", str(error))
        name = lacking and lacking[1]
        if lacking is not None and (name is None or not hasattr(torch._utils, name)):
            pytest.skip(f"torch {torch.__version__} does not save such tensors: {lacking[0]}")
        said = re.search(r"module 'torch' has no attribute '(\w+)'|dtype torch\.(\w+) is not recognized", str(error))
        name = said and (said[1] or said[2])
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if name not in {*DTYPES, "jagged"} or any(PACKAGE in Path(file).parents for file in files):
            raise
        pytest.skip(f"torch {torch.__version__} has no {name}, or does not save it")


@pytest.fixture(scope="session", autouse=True)
def _no_power_fails() -> Iterator[None]:
    """Nothing waits for the disk in this process; that it is asked to, tests of transfer say, and processes do."""
    with mock.patch("os.fsync", os.fstat):
        yield


@pytest.fixture(scope="module")  # an idle one takes a sixth of a processor
def dask_executor() -> Iterator[Any]:
    """The executor of a real cluster of dask's, of two processes, which gives up a task that kills its worker."""
    pickled = dict(copyreg.dispatch_table)
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.comm.timeouts.connect": "3s",
        "distributed.nanny.pre-spawn-environ": {},  # which it would put into our own environment
    }
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=None
        )
        with cluster, Client(cluster) as client:
            for name in copyreg.dispatch_table.keys() - pickled.keys():  # how it has exceptions pickled
                del copyreg.dispatch_table[name]
            yield client.get_executor()


@pytest.fixture
def save(tmp_path: Path) -> SaveAs:
    """``save(obj, name="model.pth", device="cpu")`` writes with torch and returns the path."""
    import torch

    def write(obj: object, name: str = "model.pth", *, device: str | Callable[[Any], str] = "cpu") -> Path:
        path = tmp_path / name
        with saved_from(device):
            torch.save(obj, path)
        return path

    return write


@pytest.fixture
def without_checksums() -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch.save leaves checksums out."""
    import torch

    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always records checksums: leaving them out is an option of later ones")

    @contextmanager
    def context() -> Iterator[None]:
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(True)

    return context


@pytest.fixture
def same_bits() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Whether two tensors agree in dtype, shape and every bit (NaN payloads and signs of zero too)."""
    import torch

    def compare(a: torch.Tensor, b: torch.Tensor) -> bool:
        def bits(t: torch.Tensor) -> torch.Tensor:
            t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            return t.reshape(-1).view(torch.uint8)

        return a.dtype == b.dtype and a.shape == b.shape and (not a.numel() or torch.equal(bits(a), bits(b)))

    return compare


@pytest.fixture(scope="session")
def forks(request: pytest.FixtureRequest) -> Iterator[Callable[..., Forks]]:
    """``forks(with_torch=True)``: what makes processes that have imported what they need."""
    from support.forked import Forks

    started: dict[tuple[bool, str], Forks] = {}
    shared: dict[bool, str] = getattr(request.config, "workerinput", {}).get("forks", {})

    def fork(*, with_torch: bool, python: str = sys.executable) -> Forks:
        if (with_torch, python) not in started:
            path = shared.get(with_torch) if python == sys.executable else None
            started[with_torch, python] = Forks(python, *IMPORTED[with_torch], path=path)
        return started[with_torch, python]

    yield fork
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, forks: Callable[..., Forks]) -> Samples:
    """``sharded["fsdp2_4"].folder`` and ``.expected``: checkpoints of several ranks, and what one would have saved."""
    from support.sharded import made

    return made(tmp_path_factory, forks)


@pytest.fixture
def whole(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``whole(folder, "inspect", ...)``: the whole command line, in this process and in a folder."""
    from support.commands import Done

    def call(folder: Path, *arguments: object) -> Done:
        capsys.readouterr()
        threshold, before = gc.get_threshold(), Path.cwd()
        os.chdir(folder)
        try:
            with pytest.raises(SystemExit) as ended:
                main([*map(str, arguments)])
        finally:
            os.chdir(before)
            gc.set_threshold(*threshold)
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def run(
    tmp_path: Path, forks: Callable[..., Forks], request: pytest.FixtureRequest
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run("inspect", path, ...)``: the command in an empty folder; with an environment or stdin it is a process."""

    def command(
        *arguments: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | bytes = subprocess.DEVNULL,
    ) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        if sys.executable == PYTHON and env is None and stdin == subprocess.DEVNULL:
            done = request.getfixturevalue("whole")(cwd or tmp_path, *words)
            return subprocess.CompletedProcess(words, *done)
        with_torch = "verify" in words or "--fits" in words
        return forks(with_torch=with_torch, python=PYTHON).run(
            "-m", "ckptkit", *words,
            cwd=cwd or tmp_path,
            env={**os.environ, "PYTHONPATH": str(FIXTURES.parent), **(env or {})},
            stdin=stdin,
        )  # fmt: skip

    return command


@pytest.fixture
def command(tmp_path: Path, whole: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``command("inspect", ...)``: the whole command line, in this process and in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: whole(Path.cwd(), *arguments)


@pytest.fixture
def python(tmp_path: Path, forks: Callable[..., Forks]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python("-c", code, ...)``: Python as a process of its own, which finds torch imported."""

    def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(FIXTURES.parent)}
        return forks(with_torch=True).run(*map(str, arguments), cwd=cwd or tmp_path, env=env)

    return command


@pytest.fixture
def ddp_resume() -> Path:
    """The committed multi-GPU training checkpoint."""
    return FIXTURES / "ddp_resume.pth"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def unprivileged() -> Callable[..., Any]:
    """``unprivileged(function, *arguments)``: its value, without root's power to read everything."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        function(*arguments)  # imports what it needs, which root alone may be able to read
        if os.geteuid():
            return function(*arguments)
        os.setegid(65534)
        os.seteuid(65534)
        try:
            return function(*arguments)
        finally:
            os.seteuid(0)
            os.setegid(0)

    return call


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was read into memory, where it was not mapped."""
    from ckptkit.torch_bridge import loading

    seen: list[int] = []
    reading = loading._reading
    monkeypatch.setattr(
        loading, "_reading", lambda m, source, *rest: seen.append(source.nbytes) or reading(m, source, *rest)
    )
    return seen
