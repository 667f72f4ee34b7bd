"""Finds what a container of named tensors cannot store, and reports all of it before anything is written.

safetensors stores plain tensors of the dtypes it supports, and strings.  A sharded checkpoint contains only a
state_dict, whatever its shards are.  Everything else must be left out explicitly: training state with
``--weights-only`` or ``--leave-out``, tensors with ``--exclude``.

The writing half of `ckptkit.formats.safetensors`, where the layout is described.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring as quoted
from struct import pack

from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry, tied_groups
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError, RewriteError
from ckptkit.formats.json_text import ORDER, VERSIONS, lone_surrogates, places, versions_from, versions_text
from ckptkit.formats.safetensors import METADATA, NAME, header_shape
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.not_plain import can_be_dense, describe_value
from ckptkit.normalize.plain_json import plain_parts
from ckptkit.normalize.sections import brief
from ckptkit.normalize.selection import other_parts
from ckptkit.normalize.shapes import tensor_at_a_glance
from ckptkit.plan import Gather, LiteralBytes, Plan, Step, moved
from ckptkit.report import glob_of, listed

__all__ = ["require_storable", "require_writable_size", "write"]

_LISTED = 8
"""Names in a message."""

_OPTIONS = 2000
"""Characters of options in a message."""


def require_storable(checkpoint: Checkpoint, what: str, *, plain: bool) -> None:
    """Raise unless a container of named tensors can store the checkpoint.

    Args:
        checkpoint: to write.
        what: the container, for messages: ``"safetensors"``.
        plain: whether it contains only plain tensors with dtypes of safetensors.

    Raises:
        DTypeError: all that it cannot hold are tensors of certain dtypes.
        RewriteError: it cannot hold something; the message lists everything and says how to leave it out.
    """
    if not checkpoint.state_dict.everything:
        raise RewriteError(
            f"there is no state_dict to write: it contains no named tensors, and {what} stores nothing else"
        )
    problems = list(_training_state(checkpoint))
    dtypes = list(_dtypes(checkpoint)) if plain else []
    if plain:
        problems += _values(checkpoint)
    if problems or dtypes:
        error = RewriteError if problems else DTypeError
        odd = {**checkpoint.state_dict.extra, **_odd_dtypes(checkpoint)} if plain else {}
        told = "; nor ".join([*problems, *dtypes])
        names = [*other_parts(checkpoint), *odd]
        raise error(f"{what} cannot store {told}; or write a .pth, which stores everything", names=names)


def _training_state(checkpoint: Checkpoint) -> Iterator[str]:
    beside = other_parts(checkpoint)
    if beside:
        plain = plain_parts(checkpoint.rest)
        kept = "it" if len(plain) == len(beside) else _listed(plain)
        keeps = f", --keep-beside keeps {kept} as text" if plain else ""
        leaves_out = "--weights-only leaves it out, --leave-out KEY leaves out one part"
        yield f"what is beside the weights ({_listed(beside)}): {leaves_out}{keeps}"


def _values(checkpoint: Checkpoint) -> Iterator[str]:
    extra = checkpoint.state_dict.extra
    kinds = {name: described.kind for name, value in extra.items() if (described := describe_value(value)) is not None}
    dense = [name for name, value in extra.items() if can_be_dense(name, value)]
    wrapped = {name: value for name, value in extra.items() if kinds.get(name) == "wrapper" and name not in dense}
    others = {name: value for name, value in extra.items() if name not in wrapped}
    if wrapped:
        gathers = any(".DTensor" in use.name for use in checkpoint.globals)
        yield (
            f"tensors of other classes ({_kinds(wrapped)}), which the program that made them turns into plain ones"
            f"{' (tensor.full_tensor(), before it saves them)' if gathers else ''}"
        )
    if others:
        leaves_out = f"{_exclude(list(others), checkpoint)} leaves them out"
        made = "them" if len(dense) == len(others) else _listed(dense)
        makes = f", --densify makes dense tensors from {made}" if dense else ""
        inside = [name for name, value in others.items() if name not in dense and tensor_at_a_glance(value)]
        takes = f", --all-tensors takes the tensors inside {_listed(inside)}" if inside else ""
        yield f"values that are not plain tensors ({_kinds(others)}): {leaves_out}{makes}{takes}"


def _kinds(values: Mapping[str, object]) -> str:
    return listed([f"{name:.100} ({brief(value):.100})" for name, value in values.items()], _LISTED)


def _odd_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        name: entry.dtype
        for name, entry in checkpoint.state_dict.items()
        if not DTYPES[entry.dtype].safetensors or (entry.dtype == "float4_e2m1fn_x2" and not entry.shape)
    }  # a pair of F4 has a dimension there


def _dtypes(checkpoint: Checkpoint) -> Iterator[str]:
    odd = _odd_dtypes(checkpoint)
    if odd:
        kinds = _listed([f"{name} ({dtype})" for name, dtype in odd.items()])
        yield f"these dtypes ({kinds}): {_exclude(list(odd), checkpoint)} leaves them out"


def _exclude(names: list[str], checkpoint: Checkpoint) -> str:
    """The options that leave these names out, and no others."""
    odd, endings = set(names), {name.rpartition(".")[2] for name in names}
    patterns = [glob_of(name) for name in names]
    if len(names) > _LISTED and len(endings) == 1:
        ending = endings.pop()  # `_extra_state`, say
        if all(name in odd for name in checkpoint.state_dict.everything if name.endswith(ending)):
            patterns = [glob_of(ending, before="*")]
    shown = ""
    for pattern in patterns:
        if len(shown) + len(pattern) > _OPTIONS:
            return f"{shown}..."
        shown += f"--exclude {pattern} "
    return shown[:-1]


def _listed(names: Iterable[str]) -> str:
    return listed(names, _LISTED, characters=100)


def require_writable_size(entries: Mapping[str, TensorEntry], what: str) -> None:
    """Raise where tensors repeat their elements beyond all use; see `Limits.expanded_nbytes`.

    Args:
        entries: by name.
        what: the container that cannot repeat them, for messages.

    Raises:
        RewriteError: they do.
    """
    total = 0
    for entry in entries.values():
        more = entry.nbytes - entry.storage.nbytes
        if more > 0:
            total += more
    if total > DEFAULT_LIMITS.expanded_nbytes:
        grown = {name: entry.nbytes - entry.storage.nbytes for name, entry in entries.items()}
        name = max(grown, key=grown.__getitem__)
        entry = entries[name]
        raise RewriteError(
            f"{name!r} of shape {entry.shape} and stride {entry.stride} would take {entry.nbytes:,} bytes, but its "
            f"storage has {entry.storage.nbytes:,}: {what} cannot repeat elements; write a .pth, or leave it out",
            names=[name],
        )


_ALIGNMENT = 8


def write(checkpoint: Checkpoint) -> Plan:
    """The plan of a safetensors file; see `ckptkit.formats.safetensors` for the layout.

    Raises:
        DTypeError, RewriteError: the format cannot store the checkpoint; the message lists why.
    """
    state_dict = checkpoint.state_dict
    require_storable(checkpoint, NAME, plain=True)
    require_writable_size(state_dict, NAME)
    if METADATA in state_dict:
        raise RewriteError(f"a tensor cannot be named {METADATA!r} in safetensors; rename it, or write a .pth")
    metadata = {"format": "pt", **checkpoint.metadata}
    versions = versions_text(state_dict)
    if VERSIONS in metadata and (versions or versions_from(metadata[VERSIONS], DEFAULT_LIMITS)) is not None:
        raise RewriteError(f"metadata {VERSIONS!r} is reserved for module versions; leave it out, or write a .pth")
    if versions is not None:
        metadata[VERSIONS] = versions
    aliases = _aliases(state_dict, metadata)
    for key, value in metadata.items():
        if value in state_dict and key not in state_dict and key != "format":
            raise RewriteError(
                f"metadata {key!r}: its value {value!r} is a tensor's name, so readers would treat it as a tie"
            )
    if ORDER not in metadata and (order := places(state_dict, aliases)) is not None:
        metadata[ORDER] = order
    metadata.update(aliases)
    stored = {name: entry for name, entry in state_dict.items() if name not in aliases}
    offsets: dict[str, int] = {}
    position = 0
    for name, entry in sorted(stored.items(), key=lambda each: -each[1].itemsize):
        offsets[name] = position
        position += entry.nbytes
    header = _header(stored, offsets, metadata)
    steps: list[Step] = [LiteralBytes(0, header)]
    for name, offset in offsets.items():
        entry = stored[name]
        nbytes, source = entry.nbytes, entry.storage.source
        if nbytes == 0:
            continue
        target = len(header) + offset
        if not entry.is_plain_bytes:
            steps.append(Gather(target, entry))
        elif nbytes == source.nbytes:
            steps += moved(target, source)
        else:
            steps += moved(target, source.part(entry.storage_offset * entry.itemsize, nbytes))
    return Plan(
        format=NAME, nbytes=len(header) + position, steps=tuple(steps), tensors=len(state_dict), aliases=aliases
    )


def _aliases(state_dict: StateDict, metadata: Mapping[str, str]) -> dict[str, str]:
    """For every name that is tied to another one: the name under which the tensor is stored.

    That is the first of them: what fills tied weights in (transformers, vLLM, llama.cpp) looks for the embedding, which
    is before the head.  A name that is a key of the metadata already cannot be recorded there again: it is kept.

    Raises:
        RewriteError: two such names are tied to each other.
    """
    kept = {min(group, key=lambda name: name not in metadata): group for group in tied_groups(state_dict)}
    tied = {name: keep for keep, group in kept.items() for name in group if name != keep}
    aliases = {name: tied[name] for name in state_dict if name in tied}  # the order they are read back in
    if taken := aliases.keys() & metadata.keys():
        raise RewriteError(
            f"tied tensors are recorded in the metadata under their names, but {', '.join(sorted(taken))} is already "
            "there; rename them, or write a .pth",
            names=sorted(taken),
        )
    return aliases


def _header(stored: Mapping[str, TensorEntry], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The length and the padded JSON, as `json.dumps` would write it of a hundred thousand dicts."""
    parts = [f"{quoted(METADATA)}:{json.dumps(metadata, separators=(',', ':'), ensure_ascii=False)}"]
    for name, entry in stored.items():
        row, offset = DTYPES[entry.dtype], offsets[name]
        shape = ",".join(map(str, header_shape(row, entry.shape)))
        end = offset + entry.nbytes
        parts.append(
            f'{quoted(name)}:{{"dtype":"{row.safetensors}","shape":[{shape}],"data_offsets":[{offset},{end}]}}'
        )
    try:
        text = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError:
        raise RewriteError(
            "a name that is not valid Unicode cannot be stored in a safetensors header", names=lone_surrogates(stored)
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    return pack("<Q", len(text)) + text
