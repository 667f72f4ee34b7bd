"""What is said of a finding code."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Explanation"]


class Explanation(NamedTuple):
    """The text behind a code."""

    title: str
    """What was seen, in a line."""
    meaning: str
    """Why it matters: what fails, and with which message."""
    remedy: str
    """What to do; ``-`` where nothing needs to be done."""
