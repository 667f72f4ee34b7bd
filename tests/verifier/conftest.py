"""Fixtures of the verifier's tests."""

from __future__ import annotations

from typing import Any

import pytest
from support.fitting import Run, check_file

from ckptkit.report import Report


@pytest.fixture
def run(save: Any) -> Run:
    """``run(obj, model=..., ...)`` saves with torch and verifies, without a forward pass unless asked."""

    def check(obj: object, *, device_tag: str = "cpu", **options: Any) -> Report:
        return check_file(save(obj, device=device_tag), **options)

    return check
