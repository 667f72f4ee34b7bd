"""Names of shards and of their indexes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ckptkit.bytesource import SourceFile
from ckptkit.errors import FileAccessError, FormatError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.report import Finding

__all__ = ["INDEX_SUFFIXES", "is_shard_name", "lone_shard", "unnamed_shards"]

INDEX_SUFFIXES = tuple(f".{ending}.index.json" for ending in ("safetensors", "bin", "pth", "pt", "ckpt", "pkl"))
"""Endings of an index's name; used to find indexes in folders, never to decide what a file is."""

_CUSTOMARY = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.[A-Za-z]+)\Z")
_ODD_PATH = re.compile(r"[\0\\]|^/|^[A-Za-z]:|(?:^|/)\.{0,2}(?:/|$)")


def is_shard_name(name: str) -> bool:
    """Whether an index may name a shard so: relative, and inside its folder."""
    return bool(name) and not _ODD_PATH.search(name)


def lone_shard(file: SourceFile) -> Finding | None:
    """The finding for a file that is one of several shards, by its name or by an index beside it."""
    folder, name = os.path.split(file.path)
    customary = _CUSTOMARY.match(name)
    ending = os.path.splitext(name)[1]
    if customary is not None:
        candidates = [f"{customary[1]}{ending}.index.json"]
    elif ending in (".safetensors", ".bin"):
        candidates = [f"{stem}{ending}.index.json" for stem in ("model", "pytorch_model", "diffusion_pytorch_model")]
    else:
        return None
    index = next((path for path in (os.path.join(folder, c) for c in candidates) if _names(path, name)), None)
    if index is None and (customary is None or int(customary[3]) < 2):
        return None
    import shlex

    what = f"one of {int(customary[3])} shards" if customary is not None else "one of several shards"
    beside = "the index beside it opens them all" if index else "the index that names them all is not beside it"
    return Finding(
        code="one-shard",
        severity="info",
        message=f"{what} of a checkpoint: the other tensors lie in the other files; {beside}",
        fix=f"ckptkit inspect {shlex.quote(index)}" if index else None,
    )


def unnamed_shards(names: Iterable[str]) -> list[str]:
    """The shards that by the names of the others are part of the checkpoint, and that an index does not name."""
    found = {(match[1], match[3], match[4]) for match in map(_CUSTOMARY.match, names) if match}
    known = set(names)
    every = [
        f"{stem}-{number:05}-of-{count}{ending}"
        for stem, count, ending in sorted(found)
        for number in range(1, min(int(count), DEFAULT_LIMITS.shards) + 1)
    ]
    return [name for name in every if name not in known]


def _names(path: str, shard: str) -> bool:
    """Whether a file beside a shard holds the shard's name in quotes: an index is not parsed for a remark."""
    try:
        index = SourceFile(path)
    except FileAccessError:
        return False
    import json

    try:
        return index.size <= DEFAULT_LIMITS.index_nbytes and json.dumps(shard).encode() in index.read(0, index.size)
    except (FormatError, FileAccessError):
        return False
    finally:
        index.close()
