"""What the tests of rewriters have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit


@pytest.fixture
def through(save: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """``through(obj, *rewriters, **of_save)``: what torch loads after torch saved, and ckptkit rewrote and saved."""

    def rewritten(saved: object, *rewriters: ckptkit.Rewriter, load: bool = True, **how: Any) -> Any:
        target = tmp_path / "rewritten.pth"
        with ckptkit.open(save(saved, **how)) as file:
            file.rewrite(*rewriters).save(target, force=True)
        return torch.load(target, weights_only=False) if load else target

    return rewritten
