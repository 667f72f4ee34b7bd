"""Module versions (torch's ``_metadata`` of a state_dict) in containers that have no place of their own for them.

They decide how BatchNorm and others load.  safetensors headers keep them in ``__metadata__`` under
`VERSIONS`, as JSON: ``{"": {"version": 1}, "bn1": {"version": 2}}``; other readers pass over it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ckptkit.checkpoint import StateDict
from ckptkit.errors import FormatError
from ckptkit.formats.strict_json import parse
from ckptkit.limits import Limits
from ckptkit.pickling.inert import Global, InertDict, Object, mapping_items

__all__ = ["VERSIONS", "state_dict_node", "versions_from", "versions_text"]

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
