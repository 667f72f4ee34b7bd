"""What the tests of fitting and loading share: a small model, its weights, and running the checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptkit.formats import read
from ckptkit.options import VerifyOptions
from ckptkit.report import Finding, Report
from ckptkit.verifier import verify

Run = Callable[..., Report]
"""Saves an object with torch and verifies it, without a forward pass unless asked."""

NOT_LOADED = ("info", "not-loaded")


def check_file(path: Path, *, section: str | None = None, **options: Any) -> Report:
    checkpoint, file = read(path, section=section)
    try:
        return verify(checkpoint, VerifyOptions(**{"forward": False, "device": "cpu", **options}), file=file)
    finally:
        file.close()


def codes(report: Report) -> list[tuple[str, str]]:
    return [(f.severity, f.code) for f in report.findings]


def finding(report: Report, code: str) -> Finding:
    [found] = [f for f in report.findings if f.code == code]
    return found


class Net(nn.Module):
    """Linear, batch norm and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Its weights, with some others; dots in names are written ``__``."""
    values = dict(Net().state_dict())
    values.update({name.replace("__", "."): value for name, value in changes.items()})
    return values


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state().items() if name not in names}
