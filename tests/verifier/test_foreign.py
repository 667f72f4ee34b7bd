"""Code that is not ours: whatever it does, it neither ends the program, nor speaks in its place, nor passes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.errors import VerifyError
from ckptkit.report import Report
from ckptkit.testing import assert_fits
from ckptkit.verifier.foreign import ForeignExitError, error_text, foreign

ROOT = Path(ckptkit.__file__).parents[1]


class OwnError(BaseException):
    """No `Exception`."""

    def __str__(self) -> str:
        sys.exit(0)


def raises(error: BaseException) -> Callable[[], None]:
    def leave() -> None:
        raise error

    return leave


WAYS: dict[str, Callable[[], None]] = {
    "SystemExit: 0": lambda: sys.exit(0),
    "SystemExit: 3": lambda: os._exit(3),
    "SystemExit": lambda: sys.exit(),
    "KeyboardInterrupt": raises(KeyboardInterrupt()),
    "GeneratorExit": raises(GeneratorExit()),
    "OwnError": raises(OwnError()),
    "RuntimeError: no": raises(RuntimeError("no")),
}
"""Ways to leave, by what is told of them."""


class Net(nn.Linear):
    """Leaves in one of its parts."""

    def __init__(self, part: str, leave: Callable[[], None]) -> None:
        super().__init__(3, 3)
        self.part, self.leave, self.calls = part, leave, 0
        if part == "factory":
            leave()
        if part == "load hook":
            self._register_load_state_dict_pre_hook(lambda *_: leave())
        if part == "state_dict hook":
            self._register_state_dict_hook(lambda *_: leave())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.part == "forward" or (self.part == "second pass" and self.calls == 2):
            self.leave()
        return super().forward(x)

    def _apply(self, *args: Any, **more: Any) -> Any:
        if self.part == "to":
            self.leave()
        return super()._apply(*args, **more)

    def train(self, mode: bool = True) -> Any:
        if self.part == "eval":
            self.leave()
        return super().train(mode)

    def __deepcopy__(self, memo: object) -> nn.Module:
        self.leave()
        return self


@pytest.fixture
def path(save: Any) -> Path:
    return save(nn.Linear(3, 3).state_dict())


def verify(path: Path, model: Any, **options: Any) -> Report:
    return ckptkit.verify(path, **{"model": model, "input_shapes": [(1, 3)], "device": "cpu", **options})


def failed(report: Report) -> list[tuple[str, str]]:
    return [(f.code, f.message) for f in report.findings if f.severity == "error"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("part", "code"), [("forward", "forward-failed"), ("load hook", "load-failed")])
def test_a_model_that_leaves_has_failed(path: Path, part: str, code: str, way: str) -> None:
    ((found, message),) = failed(verify(path, lambda: Net(part, WAYS[way])))
    assert found == code
    assert way in message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["factory", "eval", "state_dict hook"])
def test_a_reference_that_cannot_be_built(path: Path, part: str, way: str) -> None:
    with pytest.raises(VerifyError, match=way):
        verify(path, lambda: Net(part, WAYS[way]))
    if part == "state_dict hook":
        with pytest.raises(VerifyError, match=way):
            assert_fits(Net(part, WAYS[way]), nn.Linear(3, 3))


def test_what_leaves_when_the_batch_is_another(path: Path) -> None:
    """A model may refuse a batch by an error, which is no failure; not by leaving."""
    assert verify(path, lambda: Net("second pass", WAYS["RuntimeError: no"])).ok
    report = verify(path, lambda: Net("second pass", WAYS["KeyboardInterrupt"]))
    assert [code for code, _ in failed(report)] == ["forward-failed"]


@pytest.mark.parametrize("way", WAYS)
def test_other_places(path: Path, way: str) -> None:
    with pytest.raises(VerifyError, match=f"the module cannot be copied: {way}; give a factory"):
        verify(path, Net("copy", WAYS[way]))
    with pytest.raises(VerifyError, match=f"the model cannot be cast to float64: {way}"):
        verify(path, lambda: Net("to", WAYS[way]), dtype="float64")
    assert [code for code, _ in failed(verify(path, lambda: Net("to", WAYS[way])))] == ["forward-failed"]


@pytest.mark.parametrize("source", ["import sys; sys.exit(0)", "raise KeyboardInterrupt", "import os; os._exit(0)"])
def test_a_module_that_leaves_while_it_is_imported(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "leaving_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    for model in ("leaving_module:make", "leaving_module.py:make"):
        with pytest.raises(VerifyError, match=r"SystemExit|KeyboardInterrupt"):
            verify(path, model)


def test_a_pickled_model_that_leaves(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(nn.Linear(3, 3))
    monkeypatch.setattr(torch, "load", lambda *_, **__: sys.exit(0))
    with pytest.raises(VerifyError, match="cannot be loaded: SystemExit: 0"):
        verify(path, None, unsafe_load=True)


def test_what_is_printed_goes_to_stderr(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout

    def speak() -> None:
        print("said")
        sys.stdout.write("written\n")
        sys.stdout.close()
        print("after closing")
        sys.stdout = io.StringIO()

    assert verify(path, lambda: Net("forward", speak)).ok
    assert sys.stdout is before
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("said\nwritten\nafter closing\n")


# Signals.


def test_a_real_interrupt_comes_through_whatever_the_code_makes_of_it() -> None:
    def swallow() -> None:
        with suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    for run in (swallow, lambda: signal.raise_signal(signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt), foreign():
            with foreign():
                run()
            pytest.fail("the inner block raises it")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with foreign():
        pass  # nothing is left of it


def test_handlers_that_the_code_sets_are_taken_back() -> None:
    before, leave = signal.getsignal(signal.SIGTERM), os._exit
    with foreign():
        assert os._exit is not leave
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    assert signal.getsignal(signal.SIGTERM) == before
    assert os._exit is leave


def test_what_is_told_twice_is_told_once() -> None:
    with pytest.raises(ForeignExitError) as caught, foreign(), foreign():
        sys.exit(4)
    assert error_text(caught.value) == "SystemExit: 4"


# The command.

SPEAKING = """
import atexit, os, sys, threading, time, warnings
from sys import stdout as kept

import torch

print("while it is imported")


class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x):
        print("said")
        print("to the kept one", file=kept)
        print("to the first one", file=sys.__stdout__, flush=True)
        os.write(1, b"to the descriptor\\n")
        os.system("echo by a child")
        warnings.warn("careful")
        sys.stdout.close()
        sys.stdout = open(os.devnull, "w")
        threading.Thread(target=lambda: (time.sleep(0.1), os.write(1, b"late\\n"))).start()
        return super().forward(x)


@atexit.register
def at_exit():
    print("at the end", flush=True)
    os.write(1, b"at the very end\\n")
    os._exit(0)


class Wrong(Net):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Forks(Net):
    def forward(self, x):
        if os.fork() == 0:
            sys.exit(0)
        return super().forward(x)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(("model", "code"), [("Net", 0), ("Wrong", 1), ("Forks", 0)])
def test_the_output_is_the_commands_own(path: Path, model: str, code: int, forks: Callable[..., Any]) -> None:
    (path.parent / "speaking.py").write_text(SPEAKING)
    reference = f"speaking.py:{model}"
    check = ["check", path.name, "--fits", reference, "--forward"]
    for arguments in (["verify", path.name, "--model", reference], *[check] * (model == "Net")):
        words = ["-m", "ckptkit", *arguments, "--input-shape", "1,3", "--json"]
        where: Any = {"cwd": path.parent, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
        if model == "Wrong":  # Python itself ends with it
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, **where)
        else:
            done = forks(with_torch=True).run(*words, **where)
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["ok"] is (code == 0)
        for said in ("while it is imported", "said", "kept one", "first one", "descriptor", "by a child", "careful"):
            assert said in done.stderr
        assert "at the very end" in done.stderr
