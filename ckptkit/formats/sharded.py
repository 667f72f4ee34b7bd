"""Sharded checkpoints: an index and the files it names, opened as one.

Layout (``huggingface_hub`` ``serialization/_torch.py``, ``transformers``
``load_sharded_checkpoint``): ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``
is a JSON object with

- ``weight_map``: each tensor's name -> the name of the shard that holds it, relative to the index
- ``metadata``: may be missing; ``total_size`` is the number of bytes of all tensors

The shards are complete files, ``model-00001-of-00002.safetensors`` by convention.  An index
that names a ``.safetensors`` file is "safetensors-sharded", and all its shards must be
safetensors; any other is "torch-sharded", and its shards are what their content says, but never
an index themselves.

A shard's name may have folders in it but must not leave the index's folder; a shard that is itself
a symbolic link is followed, since Hugging Face's cache consists of such links.

Names are in the order of the ``weight_map``.  What shards hold beyond it comes after, in the shards' order, because
loaders that read whole shards take it too; a finding says so.  Other names of a listed tensor, which a safetensors
shard has only in its metadata, are not listed, and are where `ckptkit.formats.json_text` says.  A storage's key is the
shard's name, a colon and its key there. Ties inside a shard stay ties.

Everything that is wrong is reported at once: shards that are missing, git-lfs pointers, damaged or
hold no state_dict; names in no shard, not in the shard that the index says, or in two shards.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from ckptkit import places
from ckptkit.bytesource import Source
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CorruptError, FileAccessError, FormatError, LimitError, MissingFileError
from ckptkit.formats.containers import CONTAINERS, format_named, identify, index_of
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import ORDER, in_order, parse, shown, state_dict_node
from ckptkit.formats.shards import (
    LISTED,
    Shard,
    extra_keys,
    is_shard_name,
    merged_findings,
    merged_globals,
    merged_metadata,
    odd_shards,
    prefixed,
    total_size,
)
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import attributes, mapping_items
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import listed

__all__ = ["read", "shard_names"]


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of the index and its shards.

    Raises:
        FormatError: the index or a shard is damaged or refused.
    """
    index = format_named(index_of(probe) or "")
    weight_map, names, metadata = _named(probe)
    allowed = [each.name for each in CONTAINERS if index.has_pickle or each.name == index.shards]
    problems = _Problems()
    probe.file.will_open(list(names))
    read_ones = {shard: _read_shard(shard, probe, allowed, problems) for shard in names}
    shards = {name: shard for name, shard in read_ones.items() if shard is not None}
    everything = _assembled(weight_map, shards, problems)
    weight_map = weight_map or {name: shard.name for shard in shards.values() for name in shard.values}
    if len(everything) > probe.limits.entries:
        raise LimitError("tensors in one checkpoint", limit=probe.limits.entries, actual=len(everything))
    problems.check(merged_globals(shards))
    tied = _tied(everything, weight_map) if index.ties_once else {}
    everything, metadata = _with_aliases(everything, tied, metadata)
    raws = [shard.raw for shard in shards.values()]
    writers = {raw.writer for raw in raws}
    return RawCheckpoint(
        root=_root(everything, shards),
        format=index.name,
        byteorder="big" if {raw.byteorder for raw in raws} == {"big"} else "little",
        pickle_protocol=max((each for raw in raws if (each := raw.pickle_protocol) is not None), default=None),
        has_pickle=any(raw.has_pickle for raw in raws),
        writer=writers.pop() if len(writers) == 1 else None,
        metadata=merged_metadata(metadata, shards),
        globals=merged_globals(shards),
        discarded=tuple(value for raw in raws for value in raw.discarded),
        findings=(
            *merged_findings(shards),
            *odd_shards(shards),
            *extra_keys([key for key in everything if key not in tied], weight_map),
            *total_size(metadata, everything, are_storages=index.tensors_alone),
        ),
    )


def _with_aliases(
    everything: dict[str, object], tied: Mapping[str, object], metadata: dict[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """The names in the order that the metadata keep for those not listed; the metadata without it."""
    if not tied:
        return everything, metadata
    order = metadata.get(ORDER)
    others = {key: value for key, value in everything.items() if key not in tied}
    everything, is_ordered = in_order(others, tied, order if isinstance(order, str) else None)
    return everything, {key: value for key, value in metadata.items() if key != ORDER or not is_ordered}


# The index.


def _named(probe: Probe) -> tuple[dict[str, str], dict[str, None], dict[str, object]]:
    """The weight_map, the shards in order and the metadata; for a folder without an index only its shards."""
    own: tuple[str, ...] | None = getattr(probe.file, "own", None)
    if own is not None:
        return {}, dict.fromkeys(own), {}
    weight_map, metadata = _parse(probe.json_object or b"", probe.limits)
    return weight_map, dict.fromkeys(weight_map.values()), metadata


def _parse(raw: bytes, limits: Limits) -> tuple[dict[str, str], dict[str, object]]:
    """The weight_map and the metadata.

    Raises:
        CorruptError: the index is not as described above.
        LimitError: it names too many tensors or shards.
    """
    document = parse(raw, limits, "the index")
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(weight_map, dict):
        raise CorruptError("the weight_map of an index must map tensors' names to file names, and is not an object")
    metadata = document.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise CorruptError("the metadata of an index must be an object")
    is_odd = bool(set(map(type, weight_map.values())) - {str})
    texts = {shard for shard in weight_map.values() if isinstance(shard, str)} if is_odd else set(weight_map.values())
    longest = max(map(len, texts), default=0)
    if longest > limits.name_nbytes:
        raise LimitError("length of a shard's file name", limit=limits.name_nbytes, actual=longest)
    for name, shard in weight_map.items() if is_odd or not all(map(is_shard_name, texts)) else ():
        if not isinstance(shard, str):
            raise CorruptError(f"the weight_map maps {shown(name)} to {shown(shard)}, which is not a file name")
        if not is_shard_name(shard):
            raise CorruptError(
                f"the weight_map puts {shown(name)} into {shown(shard)}: absolute, empty, or leaving the index's folder"
                "; expected the plain path of a file in it, without '.', '..', '//' and '\\'"
            )
    if len(weight_map) > limits.entries:
        raise LimitError("tensors in an index", limit=limits.entries, actual=len(weight_map))
    if len(texts) > limits.shards:
        raise LimitError("shards of one checkpoint", limit=limits.shards, actual=len(texts))
    return weight_map, metadata or {}


def shard_names(index: str | os.PathLike[str] | Source, limits: Limits = DEFAULT_LIMITS) -> frozenset[str]:
    """The shards an index names; none if it cannot be read as one.  Opened files are closed."""
    try:
        file = index if isinstance(index, Source) else places.opened(os.fsdecode(index))
    except FileAccessError:
        return frozenset()
    try:
        return frozenset(_parse(Probe(file, limits).json_object or b"", limits)[0].values())
    except (FormatError, FileAccessError):
        return frozenset()
    finally:
        if isinstance(index, Source):
            file.close()
        else:
            places.put_back(file, os.fsdecode(index))


# The shards.


class _Problems:
    """Problems, by kind, in the order in which they were met."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}
        self._globals: list[GlobalUse] = []

    def add(self, kind: str, name: str, seen: Iterable[GlobalUse] = ()) -> None:
        self._kinds.setdefault(kind, []).append(name)
        self._globals.extend(seen)

    def check(self, seen: tuple[GlobalUse, ...]) -> None:
        """Raise for all of them.

        Args:
            seen: the names in the shards that were read.

        Raises:
            CorruptError: there is at least one.
        """
        parts = []
        for kind, names in self._kinds.items():
            parts.append(kind.format(count=len(names), s="s" * (len(names) > 1), names=listed(names, LISTED)))
        if parts:
            error = CorruptError("; ".join(parts))
            error.globals = merge_uses(seen, self._globals)
            raise error


_MISSING = "{count} shard{s} missing: {names}; put them into the index's folder"
_POINTER = "{count} shard{s} present only as git-lfs pointer{s}: {names}; run: git lfs pull"
_UNREADABLE = "{count} shard{s} that cannot be read: {names}"
_NO_STATE_DICT = "{count} shard{s} without a state_dict of names and values: {names}"
_NOWHERE = "{count} name{s} of the index in no shard: {names}"
_ELSEWHERE = "{count} name{s} not in the shard that the index says: {names}"
_TWICE = "{count} name{s} in two shards: {names}"


def _read_shard(name: str, probe: Probe, allowed: Sequence[str], problems: _Problems) -> Shard | None:
    try:
        file = probe.file.sibling(name)
    except MissingFileError:
        problems.add(_MISSING, name)
        return None
    probe.file.parts[name] = file
    part = Probe(file, probe.limits, f"{name}:")
    try:
        if part.head.startswith(b"version https://git-lfs.github.com/"):
            size = re.search(rb"^size ([0-9]{1,19})$", part.head, re.MULTILINE)
            problems.add(_POINTER, f"{name} ({int(size[1]):,} bytes)" if size else name)
            return None
        container = identify(part, CONTAINERS)
        if container.name not in allowed:
            from ckptkit.formats.contents import names_left  # nobody waits for it if all is well

            what = f"{name} (it is {container.name}, but the index promises {' or '.join(allowed)})"
            problems.add(_UNREADABLE, what, names_left(part))
            return None
        raw = container.read(part)
    except FormatError as error:
        problems.add(_UNREADABLE, f"{name} ({error.where + ': ' if error.where else ''}{error.message})", error.globals)
        return None
    finally:
        file.release()
    pairs = mapping_items(prefixed(raw, part.prefix).root)
    if pairs is None or set(map(type, map(itemgetter(0), pairs))) - {str}:
        problems.add(_NO_STATE_DICT, name, raw.globals)
        return None
    return Shard(name, raw, dict(pairs))  # type: ignore[arg-type]  # text alone


def _assembled(weight_map: Mapping[str, str], shards: Mapping[str, Shard], problems: _Problems) -> dict[str, object]:
    """Every name with its value, in the order described above."""
    everything: dict[str, object] = {}
    values = {shard.name: shard.values for shard in shards.values()}
    with contextlib.suppress(KeyError):
        everything = {name: values[promised][name] for name, promised in weight_map.items()}
        if len(everything) == sum(map(len, values.values())):  # each name once, and where the index says
            return everything
    everything = {}
    holder: dict[str, str] = {}
    for shard in shards.values():
        for name in shard.values:
            other = holder.setdefault(name, shard.name)
            if other != shard.name:
                problems.add(_TWICE, f"{shown(name)} ({other} and {shard.name})")
    for name, promised in weight_map.items():
        if promised not in shards:
            continue  # and that is reported
        found = shards[promised].values
        if name in found:
            everything[name] = found[name]
        elif name in holder:
            problems.add(_ELSEWHERE, f"{shown(name)} ({holder[name]}, not {promised})")
        else:
            problems.add(_NOWHERE, f"{shown(name)} ({promised})")
    for shard in shards.values():
        for name, value in shard.values.items():
            everything.setdefault(name, value)
    return everything


def _tied(everything: Mapping[str, object], weight_map: Mapping[str, str]) -> dict[str, object]:
    """The names beyond the index that are other names of tensors it lists."""
    if everything.keys() <= weight_map.keys():
        return {}
    stored = {id(value) for key, value in everything.items() if key in weight_map}
    return {key: value for key, value in everything.items() if key not in weight_map and id(value) in stored}


def _root(everything: Mapping[str, object], shards: Mapping[str, Shard]) -> object:
    """The state_dict: an OrderedDict with ``_metadata`` where shards have module versions, else a dict."""
    versions: dict[str, object] = {}
    for shard in shards.values():
        state = attributes(shard.raw.root)
        for key, value in mapping_items(state.get("_metadata")) or [] if state is not None else []:
            if isinstance(key, str):
                versions.setdefault(key, value)
    return state_dict_node(everything, versions)
