"""Names of shards and of their indexes, and what the shards of a checkpoint say together: metadata, names, findings."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from ckptkit import places
from ckptkit.bytesource import Source
from ckptkit.checkpoint import GlobalUse, Storage, TensorEntry, shared_storages
from ckptkit.dtypes import DTYPES
from ckptkit.formats.json_text import shown
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import TreeMap
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding, count_of, listed
from ckptkit.startup import pattern

__all__ = [
    "CUSTOMARY",
    "LISTED",
    "TEXTS",
    "Shard",
    "extra_keys",
    "indexes_in",
    "is_index_name",
    "is_shard_name",
    "may_tell_a_part",
    "merged_findings",
    "merged_globals",
    "merged_metadata",
    "name_of",
    "odd_shards",
    "prefixed",
    "total_size",
    "unnamed_shards",
]

CUSTOMARY = pattern(r"(.+)-(\d{5,6})-of-(\d{5,6})((?:[^0-9A-Za-z].*)?)", re.ASCII)
"""What shards are called: the stem, the number of one, how many there are, and what follows, such as the ending.

There may be six digits (``model-00001-of-000163.safetensors``), a variant (``-00001-of-00002.fp16.safetensors``), and
what was added to the name of one that is not finished, or a copy (``.incomplete``, ``.bak``, `` (1).safetensors``).
"""

_ODD_PATH = pattern(r"[\0\\]|^/|^[A-Za-z]:|(?:^|/)\.{0,2}(?:/|$)")


def is_shard_name(name: str) -> bool:
    """Whether an index may name a shard so: relative, and inside its folder."""
    return bool(name) and not _ODD_PATH.search(name)


def is_index_name(name: str) -> bool:
    """Whether a file is called as an index is: ``model.safetensors.index.json``, ``….index.fp16.json`` of a variant."""
    return name.endswith(".json") and ".index." in name


TEXTS = (".json", ".txt", ".py", ".md", ".yaml", ".yml")
"""Endings of texts beside the files of a checkpoint in several files."""

_WORDS = ("rank", "layer_", "expert_", "consolidated.", ".distcp", "-of-", "common.pt", "meta.pt")
"""Parts of names that `ckptkit.formats.shard_parts` uses."""


def name_of(file: Source) -> str:
    """The path that identifies a source: for a member, with the member's name; without the compression."""
    name: str = getattr(file, "name", file.path)
    return name


def may_tell_a_part(file: Source) -> bool:
    """Whether a file's name, or an index beside it, is worth a look: most files are whole, and opened at once."""
    folder, name = places.split(name_of(file))
    if any(word in name for word in _WORDS) or "_rank_" in folder or "zero" in folder or name == "fp32.pt":
        return True
    return file.folder is not None and places.is_known(file.folder) and bool(indexes_in(file.folder))


_listed: dict[str, tuple[int, tuple[str, ...]]] = {}

_SETTLED_NS = 2_000_000_000
"""Nanoseconds after which a change of a folder shows in its time of change, however coarse the file system's clock."""


def indexes_in(folder: str) -> tuple[str, ...]:
    """The names in a folder that end as those of indexes do; it is listed once for all its files while nothing changes.

    Args:
        folder: its path; ``""`` is the working directory.
    """
    try:
        if places.is_url(folder):
            return _indexes(places.listdir(folder))
        where = os.path.abspath(folder)
        changed = os.stat(where).st_mtime_ns
        if where not in _listed or _listed[where][0] != changed:
            _listed[where] = (changed if time.time_ns() - changed > _SETTLED_NS else -1), _indexes(os.listdir(where))
        return _listed[where][1]
    except OSError:
        return ()


def _indexes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(filter(is_index_name, names)))


def unnamed_shards(names: Iterable[str]) -> list[str]:
    """The shards that by the names of the others are part of the checkpoint, and that an index does not name."""
    found = {(match[1], len(match[2]), match[3], match[4]) for match in map(CUSTOMARY.fullmatch, names) if match}
    known = set(names)
    every = [
        f"{stem}-{number:0{width}}-of-{count}{ending}"
        for stem, width, count, ending in sorted(found)
        for number in range(1, min(int(count), DEFAULT_LIMITS.shards) + 1)
    ]
    return [name for name in every if name not in known]


LISTED = 5
"""Names that a message lists of each kind."""


class Shard(NamedTuple):
    """One shard as it was read.

    Attributes:
        name: as the index gives it.
        raw: what its container's reader says.
        values: its state_dict.
    """

    name: str
    raw: RawCheckpoint
    values: Mapping[str, object]


def prefixed(raw: RawCheckpoint, prefix: str) -> RawCheckpoint:
    """The content of one of several files, with its name before the key of every storage."""
    if raw.is_prefixed:
        return raw
    known: dict[int, Storage] = {}

    def named(storage: Storage) -> Storage:
        if id(storage) not in known:
            known[id(storage)] = replace(storage, key=prefix + storage.key)
        return known[id(storage)]

    def leaf(node: object) -> object:
        if isinstance(node, TensorEntry):
            return replace(node, storage=named(node.storage))
        return named(node) if isinstance(node, Storage) else node

    return replace(raw, root=TreeMap(leaf)(raw.root), is_prefixed=True)


def merged_metadata(metadata: Mapping[str, object], shards: Mapping[str, Shard]) -> dict[str, str]:
    """The index's scalars as text, then the shards' own strings; where two differ, with the shard's name before.

    Not among them is the index's ``total_size``, a fact of the container that another file would state falsely.
    """
    merged = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
        if isinstance(value, (str, bool, int, float)) and key != "total_size"
    }
    for shard in shards.values():
        for key, text in shard.raw.metadata.items():
            if merged.setdefault(key, text) != text:
                merged[f"{shard.name}:{key}"] = text
    return merged


def merged_globals(shards: Mapping[str, Shard]) -> tuple[GlobalUse, ...]:
    """Every name with the most severe verdict on it; where it occurs begins with the shard's name."""
    return merge_uses(
        replace(use, where=tuple(f"{shard.name}: {place}" for place in use.where))
        for shard in shards.values()
        for use in shard.raw.globals
    )


def merged_findings(shards: Mapping[str, Shard]) -> Iterator[Finding]:
    """The findings of the shards' readers, each code once."""
    found: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for shard in shards.values():
        for finding in shard.raw.findings:
            found.setdefault((finding.code, finding.severity), []).append((shard.name, finding))
    for (name, first), *others in found.values():
        more = f" (and likewise in {count_of(len(others), 'other shard')})" if others else ""
        yield replace(first, message=f"{name}: {first.message}{more}")


def extra_keys(everything: Iterable[str], weight_map: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the shards hold names beyond the index."""
    extra = [shown(name) for name in everything if name not in weight_map]
    if extra:
        yield Finding(
            code="shard-extra-keys",
            severity="warning",
            message=f"{count_of(len(extra), 'name')} in shards that the index does not list: {listed(extra, LISTED)}",
        )


def odd_shards(shards: Mapping[str, Shard]) -> Iterator[Finding]:
    """Whether all shards are named, by what they are called, and say the same of the whole."""
    if unnamed := unnamed_shards(shards):
        yield Finding(
            code="shard-not-named",
            severity="warning",
            message=f"the index puts no tensor into {listed(unnamed, LISTED)}, "
            "which the names of the other shards imply",
        )
    texts: dict[str, list[str]] = {}
    for shard in shards.values():
        for key, text in shard.raw.metadata.items():
            texts.setdefault(key, []).append(text)
    partial = [shown(key) for key, values in texts.items() if len(values) < len(shards) or len(set(values)) > 1]
    if partial:
        yield Finding(
            code="shard-metadata",
            severity="info",
            message=f"the shards do not all have the same metadata: {listed(partial, LISTED)}",
        )


def total_size(
    metadata: Mapping[str, object], everything: Mapping[str, object], *, are_storages: bool
) -> Iterator[Finding]:
    """Whether ``total_size`` is what the tensors take, ties counted once (as now) or each (as before).

    Args:
        metadata: of the index.
        everything: the values of all shards.
        are_storages: whether each tensor is all of its storage, which is then not computed again.
    """
    stated = metadata.get("total_size")
    if stated is None:
        return
    entries = [value for value in everything.values() if isinstance(value, TensorEntry)]
    if are_storages and stated == sum([entry.storage.nbytes for entry in entries]):
        return
    bits, prod = {name: row.bits or 8 * row.itemsize for name, row in DTYPES.items()}, math.prod
    once = each = sum([-(-prod(entry.shape) * bits[entry.dtype] // 8) for entry in entries])
    if stated != each and shared_storages(entries):
        once = sum({entry.view: entry.nbytes for entry in entries}.values())
    if isinstance(stated, bool) or not isinstance(stated, (int, float)) or stated not in (once, each):
        said = f"{stated:,}" if isinstance(stated, int) and abs(stated) < 1 << 63 else f"{stated!r:.40}"
        yield Finding(
            code="shard-total-size",
            severity="warning",
            message=f"the index states a total_size of {said} bytes, but the shards' tensors have {once:,}",
        )
