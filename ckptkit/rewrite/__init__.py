"""Rewriters: pure functions from `Checkpoint` to `Checkpoint`, one module each kind.

Adding a rewriter is a frozen dataclass with ``__call__(checkpoint) -> Checkpoint`` and one line
in `REWRITES`.
"""

from __future__ import annotations

from ckptkit.rewrite.compact import Compact
from ckptkit.rewrite.device import MapLocation
from ckptkit.rewrite.dtype import CastDtype
from ckptkit.rewrite.leave_out import LeaveOut
from ckptkit.rewrite.prefix import AddModule, AddPrefix, StripModule, StripPrefix
from ckptkit.rewrite.rename import Rename
from ckptkit.rewrite.select import Select, WeightsOnly
from ckptkit.rewrite.tied import Tied

__all__ = [
    "REWRITES",
    "AddModule",
    "AddPrefix",
    "CastDtype",
    "Compact",
    "LeaveOut",
    "MapLocation",
    "Rename",
    "Select",
    "StripModule",
    "StripPrefix",
    "Tied",
    "WeightsOnly",
]

REWRITES = (
    StripModule,
    AddModule,
    StripPrefix,
    AddPrefix,
    Rename,
    Select,
    LeaveOut,
    WeightsOnly,
    MapLocation,
    Tied,
    CastDtype,
    Compact,
)
"""Every rewriter."""
