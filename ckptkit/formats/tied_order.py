"""Where names stand that a safetensors header holds as aliases alone.

A tensor with several names is stored once; the other names are in ``__metadata__``, apart from the order of
the header.  Where they do not all come last in the state_dict, their places in it are kept under `ORDER`: a
JSON list of numbers, one for each alias in the order the aliases stand in.  Other readers pass over it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

__all__ = ["ORDER", "in_order", "places"]

ORDER = "ckptkit_tied_order"
"""Key of the string metadata."""


def places(names: Collection[str], aliases: Mapping[str, str]) -> str | None:
    """The places of the aliases among all names; ``None``: they come last anyway."""
    found = [place for place, name in enumerate(names) if name in aliases]
    return None if found == list(range(len(names) - len(found), len(names))) else json.dumps(found)


def in_order(
    stored: Mapping[str, object], aliases: Mapping[str, object], text: str | None
) -> tuple[dict[str, object], bool]:
    """All names, and whether ``text`` gave the aliases their places; else they come last."""
    count = len(stored) + len(aliases)
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != len(aliases) or not all(type(place) is int for place in found):
        return {**stored, **aliases}, False
    if not aliases or found != sorted(set(found)) or not 0 <= found[0] <= found[-1] < count:
        return {**stored, **aliases}, False
    wanted, others, tied = set(found), iter(stored.items()), iter(aliases.items())
    return dict(next(tied if place in wanted else others) for place in range(count)), True
