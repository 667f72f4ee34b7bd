"""The writing half of `ckptkit.formats.safetensors`, where the layout is described."""

from __future__ import annotations

import json
from collections.abc import Mapping
from struct import pack

from ckptkit.checkpoint import Checkpoint, StateDict
from ckptkit.dtypes import DTYPES
from ckptkit.errors import RewriteError
from ckptkit.formats.holdable import require_holdable, require_writable_size
from ckptkit.formats.module_versions import VERSIONS, versions_from, versions_text
from ckptkit.formats.safetensors_header import METADATA, NAME, header_shape
from ckptkit.formats.tied_order import ORDER, places
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.plan import Gather, Literal, Plan, Step, moved

__all__ = ["write"]

_ALIGNMENT = 8


def write(checkpoint: Checkpoint) -> Plan:
    """The plan of a safetensors file; see `ckptkit.formats.safetensors` for the layout.

    Raises:
        DTypeError, RewriteError: the format cannot hold the checkpoint; the message lists why.
    """
    state_dict = checkpoint.state_dict
    require_holdable(checkpoint, NAME, plain=True)
    require_writable_size(checkpoint)
    if METADATA in state_dict:
        raise RewriteError(f"a tensor cannot be named {METADATA!r} in safetensors; rename it, or write a .pth")
    metadata = {"format": "pt", **checkpoint.metadata}
    versions = versions_text(state_dict)
    if VERSIONS in metadata and (versions or versions_from(metadata[VERSIONS], DEFAULT_LIMITS)) is not None:
        raise RewriteError(f"metadata {VERSIONS!r} is where module versions stand; leave it out, or write a .pth")
    if versions is not None:
        metadata[VERSIONS] = versions
    aliases = _aliases(state_dict, metadata)
    for key, value in metadata.items():
        if value in state_dict and key not in state_dict and key != "format":
            raise RewriteError(
                f"metadata {key!r}: its value {value!r} is a tensor's name, so readers take it for a tie"
            )
    if ORDER not in metadata and (order := places(state_dict, aliases)) is not None:
        metadata[ORDER] = order
    metadata.update(aliases)
    stored = [name for name in state_dict if name not in aliases]
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(stored, key=lambda name: -state_dict[name].itemsize):
        offsets[name] = position
        position += state_dict[name].nbytes
    header = _header(state_dict, stored, offsets, metadata)
    steps: list[Step] = [Literal(0, header)]
    for name, offset in offsets.items():
        entry = state_dict[name]
        if entry.nbytes == 0:
            continue
        target = len(header) + offset
        if entry.is_plain_bytes:
            start = entry.storage_offset * entry.itemsize
            steps.append(moved(target, entry.storage.source.part(start, entry.nbytes)))
        else:
            steps.append(Gather(target, entry))
    return Plan(
        format=NAME, nbytes=len(header) + position, steps=tuple(steps), tensors=len(state_dict), aliases=aliases
    )


def _aliases(state_dict: StateDict, metadata: Mapping[str, str]) -> dict[str, str]:
    """For every name that is tied to another one: the name under which the tensor is stored.

    That is the first of them: what fills tied weights in (transformers, vLLM, llama.cpp) looks for the embedding,
    which stands before the head.  A name that is a key of the metadata already cannot be recorded there again: it is
    kept.

    Raises:
        RewriteError: two such names are tied to each other.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, entry in state_dict.items():
        if entry.nbytes:
            groups.setdefault(entry.view, []).append(name)
    kept = {min(group, key=lambda n: n not in metadata): group for group in groups.values() if len(group) > 1}
    tied = {name: keep for keep, group in kept.items() for name in group if name != keep}
    aliases = {name: tied[name] for name in state_dict if name in tied}  # the order they are read back in
    if taken := aliases.keys() & metadata.keys():
        raise RewriteError(
            f"tied tensors are recorded in the metadata under their names, where {', '.join(sorted(taken))} stands "
            "already; rename them, or write a .pth"
        )
    return aliases


def _header(state_dict: StateDict, stored: list[str], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The length and the padded JSON."""
    document: dict[str, object] = {METADATA: dict(metadata)}
    for name in stored:
        entry = state_dict[name]
        document[name] = {
            "dtype": DTYPES[entry.dtype].safetensors,
            "shape": header_shape(DTYPES[entry.dtype], entry.shape),
            "data_offsets": [offsets[name], offsets[name] + entry.nbytes],
        }
    try:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RewriteError("a name that is not valid Unicode cannot stand in a safetensors header") from None
    text += b" " * (-len(text) % _ALIGNMENT)
    return pack("<Q", len(text)) + text
