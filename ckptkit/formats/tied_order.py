"""Where names stand that a safetensors header holds as aliases alone.

A tensor with several names is stored once; the other names are in ``__metadata__``, apart from the order of
the header.  Where they do not all come last in the state_dict, their places in it are kept under `ORDER`: a
JSON list of numbers, one for each alias in the order the aliases stand in.  Other readers pass over it.
The metadata of an index of shards has such a list too, for the names that it does not list: shard by shard.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

__all__ = ["ORDER", "in_order", "places"]

ORDER = "ckptkit_tied_order"
"""Key of the string metadata."""


def places(names: Collection[str], aliases: Iterable[str]) -> str | None:
    """The places of the aliases among all names; ``None``: they come last anyway."""
    place = {name: place for place, name in enumerate(names)}
    found = [place[name] for name in aliases]
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
    tied, others = dict(zip(found, aliases.items(), strict=True)), iter(stored.items())
    if not aliases or len(tied) < len(aliases) or not 0 <= min(tied) <= max(tied) < count:
        return {**stored, **aliases}, False
    return dict(tied[place] if place in tied else next(others) for place in range(count)), True
