"""How often a test repeats what it does: seldom in a plain run, as often as it can where the run is thorough."""

from __future__ import annotations

import pytest


def repeated(name: str, plain: object, thorough: object) -> pytest.MarkDecorator:
    """An argument of a test, in a plain run and in a thorough one: how often, every how many bytes, which seeds."""
    return pytest.mark.parametrize(name, [plain, pytest.param(thorough, marks=pytest.mark.thorough)])
