"""Rewriters: pure functions from `Checkpoint` to `Checkpoint`, one module each kind.

Adding a rewriter is a frozen dataclass with ``__call__(checkpoint) -> Checkpoint`` and one line
in `REWRITES`.
"""

from __future__ import annotations

from ckptkit.rewrite.device import MapLocation
from ckptkit.rewrite.prefix import AddModule, AddPrefix, StripModule, StripPrefix
from ckptkit.rewrite.select import WeightsOnly

__all__ = ["REWRITES", "AddModule", "AddPrefix", "MapLocation", "StripModule", "StripPrefix", "WeightsOnly"]

REWRITES = (StripModule, AddModule, StripPrefix, AddPrefix, MapLocation, WeightsOnly)
"""Every rewriter."""
