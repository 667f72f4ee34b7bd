"""What the tests of differences share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit.codes import CODES


@pytest.fixture
def diff(tmp_path: Path):
    """``diff(a, b, ...)``: of two objects that torch saves."""

    def compare(a: object, b: object, **options: Any) -> ckptkit.Difference:
        torch.save(a, tmp_path / "a.pth")
        torch.save(b, tmp_path / "b.pth")
        difference = ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth", **options)
        assert json.loads(difference.to_json()) == difference.to_dict()
        assert {finding.code for finding in difference.findings} <= CODES.keys()
        return difference

    return compare
