"""Differences rolled up by module: the highest one below which nothing stayed as it was stands for all in it.

Where only ``fc.weight`` and ``fc.bias`` changed that is ``fc``; where all of ``layer1.0.conv1`` changed and the rest of
``layer1.0`` did not, ``layer1.0.conv1``.  Counters of batches do not keep a module from standing for what is in it.
Where that makes more rows than can be read, modules of as many segments as still can be stand for what differs in
them.  Names are split on dots to *show* this; nothing is rebuilt from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ckptkit.rewrite.names import module_paths

__all__ = ["UNCHANGED", "rolled_up"]

UNCHANGED = "unchanged"
"""The status of a tensor that is the same in both, or within tolerance."""

_MOST_ROWS = 24
"""Rows that can still be read."""

_MOST_SEGMENTS = 6
"""Segments of the name of a module that stands for what differs in it."""

_COUNTER = "num_batches_tracked"
"""What BatchNorm counts batches in: its last segment."""


def rolled_up(statuses: Mapping[str, str], largest: Mapping[str, float]) -> tuple[dict[str, Any], ...]:
    """One row for each module, or tensor, that stands for differences.

    Args:
        statuses: of every name: `UNCHANGED`, or what happened to it.
        largest: absolute difference of those that have one.

    Returns:
        ``module``, ``tensors`` (how many are in it), ``differing`` (how many of them differ), ``statuses`` (how many
        of each but `UNCHANGED`) and ``max_abs``.
    """
    differing = {name: status for name, status in statuses.items() if status != UNCHANGED}
    kept = {
        path
        for name, status in statuses.items()
        if status == UNCHANGED and name.rpartition(".")[2] != _COUNTER
        for path in _above(name)
    }
    places = {name: next((path for path in _above(name) if path not in kept), name) for name in differing}
    segments = _MOST_SEGMENTS
    while len(set(places.values())) > _MOST_ROWS and segments:
        places = {name: ".".join(name.split(".", segments)[:segments]) for name in differing}
        segments -= 1
    rows: dict[str, dict[str, Any]] = {}
    for name, status in differing.items():
        row = rows.setdefault(
            places[name],
            {"module": places[name], "tensors": 0, "differing": 0, "statuses": Counter(), "max_abs": None},
        )
        row["differing"] += 1
        row["statuses"][status] += 1
        if name in largest:
            row["max_abs"] = max(row["max_abs"] or 0, largest[name])
    for name in statuses:
        for path in {*_above(name), name} & rows.keys():
            rows[path]["tensors"] += 1
    return tuple({**row, "statuses": dict(row["statuses"])} for row in rows.values())


def _above(name: str) -> Iterator[str]:
    yield ""
    yield from module_paths(name)
