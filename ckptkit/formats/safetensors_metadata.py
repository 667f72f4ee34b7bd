"""Module versions (torch's ``_metadata`` of a state_dict) in containers that have no place of their own for them.

They decide how BatchNorm and others load.  safetensors headers keep them in ``__metadata__`` under
`VERSIONS`, as JSON: ``{"": {"version": 1}, "bn1": {"version": 2}}``; other readers pass over it.

Where names stand that a safetensors header holds as aliases alone.

A tensor with several names is stored once; the other names are in ``__metadata__``, apart from the order of
the header.  Where they do not all come last in the state_dict, their places in it are kept under `ORDER`: a
JSON list of numbers, one for each alias in the order the aliases stand in.  Other readers pass over it.
The metadata of an index of shards has such a list too, for the names that it does not list: shard by shard.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

from ckptkit.checkpoint import StateDict
from ckptkit.errors import FormatError
from ckptkit.formats.strict_json import parse
from ckptkit.limits import Limits
from ckptkit.pickling.inert import Global, InertDict, Object, mapping_items

__all__ = ["ORDER", "VERSIONS", "in_order", "places", "state_dict_node", "versions_from", "versions_text"]

VERSIONS = "torch._metadata"
"""Key of the string metadata."""


def versions_from(text: str | None, limits: Limits) -> dict[str, object] | None:
    """The versions as inert nodes by module path; ``None``: there are none, or it is something else."""
    if text is None:
        return None
    try:
        document = parse(text.encode("utf-8", "surrogatepass"), limits, VERSIONS)
    except FormatError:
        return None
    if not isinstance(document, dict) or not all(_is_version(version) for version in document.values()):
        return None
    return {path: InertDict(list(version.items())) for path, version in document.items()}


def versions_text(state_dict: StateDict) -> str | None:
    """The versions as JSON; ``None``: there are none, or JSON cannot hold them."""
    if state_dict.versions is None:
        return None
    document: dict[str, dict[str, object]] = {}
    for path, version in state_dict.versions.items():
        pairs = mapping_items(version)
        fields = {key: value for key, value in pairs or [] if isinstance(key, str)}
        if pairs is None or len(fields) != len(pairs) or not _is_version(fields):
            return None
        document[path] = fields
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True)


def _is_version(node: object) -> bool:
    return isinstance(node, dict) and all(isinstance(value, (bool, int, str)) for value in node.values())


def state_dict_node(entries: Mapping[str, object], versions: Mapping[str, object] | None) -> object:
    """The inert node of a state_dict: an OrderedDict with ``_metadata`` where there are versions, else a dict."""
    if not versions:
        return InertDict(list(entries.items()))
    root, recorded = (Object("reduce", Global("collections", "OrderedDict"), ()) for _ in range(2))
    root.pairs, recorded.pairs = list(entries.items()), list(versions.items())
    root.state = InertDict([("_metadata", recorded)])
    return root


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
