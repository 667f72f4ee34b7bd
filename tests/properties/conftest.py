"""What goes through ckptkit comes out the same: properties over generated checkpoints.

torch writes, ckptkit reads, plans and writes, torch (or the safetensors library) loads.  What comes out is held
against what torch loads from the first file, after the same was done to it in torch by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("properties")
