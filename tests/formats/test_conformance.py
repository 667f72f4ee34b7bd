"""What every reader must do, for the containers that torch.save writes."""

from __future__ import annotations

from pathlib import Path

import torch
from support.conformance import Conformance


class TestTorchZip(Conformance):
    reads = "torch-zip"
    step = 3

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        torch.save(state, folder / "model.pth")
        return folder / "model.pth"


class TestTorchLegacy(Conformance):
    reads = "torch-legacy"

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)
        return folder / "model.pth"
