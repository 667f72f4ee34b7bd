"""Rewriters: pure functions from `Checkpoint` to `Checkpoint`, one module per kind.

A new rewriter is a frozen dataclass with ``__call__(checkpoint) -> Checkpoint`` and one line in `REWRITES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptkit.rewrite.beside import KeepBeside, PutUnder
    from ckptkit.rewrite.densify import Densify
    from ckptkit.rewrite.dtype import CastDtype
    from ckptkit.rewrite.everything import AllTensors
    from ckptkit.rewrite.like import Like
    from ckptkit.rewrite.rename import AddModule, AddPrefix, Rename, StripModule, StripPrefix
    from ckptkit.rewrite.select import LeaveOut, Select, WeightsOnly
    from ckptkit.rewrite.storages import Compact, MapLocation, Tied

__all__ = [
    "REWRITES",
    "AddModule",
    "AddPrefix",
    "AllTensors",
    "CastDtype",
    "Compact",
    "Densify",
    "KeepBeside",
    "LeaveOut",
    "Like",
    "MapLocation",
    "PutUnder",
    "Rename",
    "Select",
    "StripModule",
    "StripPrefix",
    "Tied",
    "WeightsOnly",
]

REWRITES = {
    "StripModule": "rename",
    "AddModule": "rename",
    "StripPrefix": "rename",
    "AddPrefix": "rename",
    "Rename": "rename",
    "AllTensors": "everything",
    "Select": "select",
    "LeaveOut": "select",
    "Like": "like",
    "WeightsOnly": "select",
    "KeepBeside": "beside",
    "PutUnder": "beside",
    "MapLocation": "storages",
    "Tied": "storages",
    "Densify": "densify",
    "CastDtype": "dtype",
    "Compact": "storages",
}
"""Every rewriter, and the module it is in, which is imported when the rewriter is asked for."""


def __getattr__(name: str) -> Any:
    if name not in REWRITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{REWRITES[name]}"), name)
