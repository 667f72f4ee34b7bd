"""Checkpoints that several ranks wrote, made once a run by `ranks.py`: the fixture `sharded` of tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from support.forked import Forks


@dataclass(frozen=True)
class Sharded:
    """One checkpoint: a folder to read (copy it before you damage it), and what one process would have saved."""

    folder: Path

    @cached_property
    def expected(self) -> dict[str, Any]:
        """The whole state as a tree, as a reader of the folder gives it."""
        tree: dict[str, Any] = torch.load(self.folder.parent / "expected.pt", weights_only=False)
        return tree

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of `expected`, by their paths joined with dots."""
        return {name: value for name, value in flat(self.expected) if isinstance(value, torch.Tensor)}


class Samples(Mapping[str, Sharded]):
    """The checkpoints, by the names of their cases."""

    def __init__(self, root: Path) -> None:
        self._cases = {path.parent.name: Sharded(path.parent / "ckpt") for path in sorted(root.glob("*/expected.pt"))}

    def __getitem__(self, case: str) -> Sharded:
        return self._cases[case]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)


def flat(tree: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of dicts, lists and tuples, with its path; those with nothing in them are leaves."""
    pairs: Any = ()
    if isinstance(tree, Mapping):
        pairs = tree.items()
    elif isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        pairs = [*enumerate(tree)]
    if not pairs:
        yield path, tree
        return
    for key, value in pairs:
        yield from flat(value, f"{path}.{key}" if path else str(key))


def made(factory: pytest.TempPathFactory, forks: Callable[..., Forks]) -> Samples:
    """Let the ranks write, or wait until another worker of this run has: that takes five seconds of CPU time."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip(f"torch {torch.__version__} does not write all of these: the program is for 2.9 and later")
    import fcntl

    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root /= "sharded"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            tests, fork = Path(__file__).parents[1], forks(with_torch=True)
            env = {**os.environ, "PYTHONPATH": str(tests.parent)}
            done = fork.run("-m", "support.ranks", str(root), cwd=tests, env=env)
            assert done.returncode == 0, done.stderr[-8000:]
            (root / "done").touch()
    return Samples(root)
