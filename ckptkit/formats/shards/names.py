"""Names of shards and of their indexes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable

from ckptkit.limits import DEFAULT_LIMITS

__all__ = ["CUSTOMARY", "INDEX_SUFFIXES", "indexes_in", "is_shard_name", "may_tell_a_part", "unnamed_shards"]

INDEX_SUFFIXES = tuple(f".{ending}.index.json" for ending in ("safetensors", "bin", "pth", "pt", "ckpt", "pkl"))
"""Endings of an index's name; used to find indexes in folders, never to decide what a file is."""

CUSTOMARY = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[A-Za-z]+)", re.ASCII)
"""What shards are called: the stem, the number of one, how many there are, and the ending."""

_ODD_PATH = re.compile(r"[\0\\]|^/|^[A-Za-z]:|(?:^|/)\.{0,2}(?:/|$)")


def is_shard_name(name: str) -> bool:
    """Whether an index may name a shard so: relative, and inside its folder."""
    return bool(name) and not _ODD_PATH.search(name)


_WORDS = ("rank", "layer_", "expert_", "consolidated.", ".distcp", "-of-", "common.pt", "meta.pt")
"""What stands in names that `ckptkit.formats.shards.parts` knows."""


def may_tell_a_part(path: str) -> bool:
    """Whether a file's name, or an index beside it, is worth a look: most files are whole, and opened at once."""
    folder, name = os.path.split(path)
    if any(word in name for word in _WORDS) or "_rank_" in folder or "zero" in folder or name == "fp32.pt":
        return True
    return bool(indexes_in(folder))


_listed: dict[str, tuple[int, tuple[str, ...]]] = {}

_SETTLED_NS = 2_000_000_000
"""Nanoseconds after which a change of a folder shows in its time of change, however coarse the file system's clock."""


def indexes_in(folder: str) -> tuple[str, ...]:
    """The names in a folder that end as those of indexes do; it is listed once for all its files while nothing changes.

    Args:
        folder: its path; ``""`` is the working directory.
    """
    where = os.path.abspath(folder)
    try:
        changed = os.stat(where).st_mtime_ns
        if where not in _listed or _listed[where][0] != changed:
            names = tuple(sorted(name for name in os.listdir(where) if name.endswith(".json") and ".index." in name))
            _listed[where] = (changed if time.time_ns() - changed > _SETTLED_NS else -1), names
        return _listed[where][1]
    except OSError:
        return ()


def unnamed_shards(names: Iterable[str]) -> list[str]:
    """The shards that by the names of the others are part of the checkpoint, and that an index does not name."""
    found = {(match[1], match[3], match[4]) for match in map(CUSTOMARY.fullmatch, names) if match}
    known = set(names)
    every = [
        f"{stem}-{number:05}-of-{count}{ending}"
        for stem, count, ending in sorted(found)
        for number in range(1, min(int(count), DEFAULT_LIMITS.shards) + 1)
    ]
    return [name for name in every if name not in known]
