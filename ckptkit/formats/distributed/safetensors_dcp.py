"""The hub's sharded safetensors: what torch.distributed.checkpoint writes with `HuggingFaceStorageWriter`.

Layout (torch 2.14 ``torch/distributed/checkpoint/hf_storage.py``, ``_hf_utils.py``, ``save_distributed=True``):

- names: ``shard-RRRRR-model-CCCCC-of-NNNNN.safetensors``: of the rank R, from 1, the tensors of the file C of N into
  which they will be consolidated.  There is no index.  ``consolidate_safetensors_files`` makes one, beside the folder
  ``sharded`` that these are in, and it is opened by itself
- each is a safetensors file whose tensors are boxes of wholes.  Its metadata say in ``DCP_SHARDING_INFO``, as JSON, the
  offsets of each: ``{name: {"saved_offsets": [7, 0]}}``; ``DCP_VERSION`` is "1.0"
- a rank without any tensors of a consolidated file writes no file for it
- the shape of the whole is not stored: it is what its boxes reach to.  Files missing from the middle leave holes;
  nothing shows files missing at the end, and a finding says so, with those that may be missing

Replicated tensors are stored once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import islice

from ckptkit.checkpoint import Replica, TensorEntry
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.distributed.folder import folder_of, read_part
from ckptkit.formats.distributed.layouts import SHARDED
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import parse, shown, state_dict_node
from ckptkit.formats.shards import Shard, merged_findings, merged_metadata
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import mapping_items
from ckptkit.pickling.tensors import shape_of
from ckptkit.report import Finding, count_of, listed
from ckptkit.startup import dataclass
from ckptkit.transfer.pieces import Piece, pieced

__all__ = ["read"]

_INFO = "DCP_SHARDING_INFO"
_VERSION = "DCP_VERSION"
_LISTED = 5
"""Files that a message lists."""


@dataclass(slots=True)
class _Boxes:
    """The files' parts of one tensor, by where they begin."""

    dtype: str
    found: dict[tuple[int, ...], tuple[str, TensorEntry]] = field(default_factory=dict)


def read(probe: Probe) -> RawCheckpoint:
    """The state_dict that the files make up.

    Raises:
        FormatError: a file is missing, damaged or refused, or they do not belong together.
    """
    folder = folder_of(probe)
    numbers = {name: match for name in folder.names if (match := re.fullmatch(SHARDED, name, re.ASCII)) is not None}
    _require_all(numbers)
    shards: dict[str, Shard] = {}
    tensors: dict[str, _Boxes] = {}
    replicas: list[Replica] = []
    for name in numbers:
        raw = read_part(probe, name)
        try:
            if raw.format != "safetensors":
                raise CorruptError(f"it is {raw.format}, but its name says safetensors")
            _placed(name, raw, tensors, replicas, probe.limits)
        except FormatError as error:
            error.globals = (*raw.globals, *error.globals)
            raise error.at(where=name) from error.__cause__
        shards[name] = Shard(name, raw, {})
    absent = _absent(numbers)
    try:
        entries: dict[str, object] = {name: _whole(name, boxes) for name, boxes in tensors.items()}
    except CorruptError as error:
        if absent:
            error.message += f"; missing: {listed(absent, _LISTED)}"
        raise
    metadata = {
        key: text for key, text in merged_metadata({}, shards).items() if _INFO not in key and _VERSION not in key
    }
    return RawCheckpoint(
        root=state_dict_node(entries, None),
        format=folder.layout,
        has_pickle=False,
        metadata=metadata,
        replicas=tuple(replicas),
        world_size=max(int(match["n"]) for match in numbers.values()),
        findings=(*merged_findings(shards), _unproven(numbers, absent)),
    )


def _require_all(numbers: Mapping[str, re.Match[str]]) -> None:
    """See that the files are there that the names of the others speak of.

    Raises:
        CorruptError: some are missing, or they are of several checkpoints.
    """
    counts = {int(match["of"]) for match in numbers.values()}
    if len(counts) > 1:
        sizes = " and ".join(map(str, sorted(counts)))
        raise CorruptError(f"files of several checkpoints are mixed here: of {sizes} consolidated files")
    for group, what, count in (
        ("n", "shard-{:05}-…", max(int(match["n"]) for match in numbers.values())),
        ("file", "…-model-{:05}-of-" + f"{max(counts):05}.safetensors", max(counts)),
    ):
        there = {int(match[group]) for match in numbers.values()}
        left = count - len(there - {0})
        if left > 0:
            missing = [number for number in range(1, min(count, len(there) + _LISTED) + 1) if number not in there]
            names = [what.format(number) for number in missing]
            verb = "is" if left == 1 else "are"
            raise CorruptError(
                f"{count_of(left, 'file')} {verb} missing: {listed(names, _LISTED, total=left)}; "
                "get all of them into the folder"
            )


def _placed(name: str, raw: RawCheckpoint, tensors: dict[str, _Boxes], replicas: list[Replica], limits: Limits) -> None:
    """Add what a file has.

    Raises:
        CorruptError: it does not say where its tensors are, or describes others.
    """
    info = raw.metadata.get(_INFO)
    if info is None:
        raise CorruptError(f"its metadata has no {_INFO}: it is not from this checkpoint, or was rewritten")
    said = parse(info.encode("utf-8", "surrogatepass"), limits, _INFO)
    pairs = mapping_items(raw.root) or []
    if not isinstance(said, dict) or len(said) != len(pairs) or any(key not in said for key, _ in pairs):
        raise CorruptError(f"{_INFO} describes other tensors than the file has")
    copied = len(replicas)
    for key, entry in pairs:
        fields = said[key] if isinstance(key, str) else None
        offsets = shape_of(fields.get("saved_offsets")) if isinstance(fields, dict) else None
        if not isinstance(entry, TensorEntry) or offsets is None or len(offsets) != len(entry.shape):
            raise CorruptError(f"{_INFO} does not give {shown(key)} an offset for each of its dimensions")
        boxes = tensors.setdefault(str(key), _Boxes(entry.dtype))
        other, known = boxes.found.setdefault(offsets, (name, entry))
        if known is entry:
            continue
        if known.shape != entry.shape or known.dtype != entry.dtype:
            raise CorruptError(f"{shown(key)} begins at {[*offsets]} in {other} too, but is a different tensor there")
        replicas.append(Replica(str(key), known, entry, f"{other} and {name}"))
    if pairs and len(replicas) - copied == len(pairs):
        raise CorruptError(
            "it has no unique slice: each is in another file at the same place, and the writer stores each once; one "
            "file was copied over another"
        )


def _whole(name: str, boxes: _Boxes) -> TensorEntry:
    """The tensor that boxes make up, as large as they reach.

    Raises:
        CorruptError: they leave something out, overlap, or are of several dtypes.
    """
    first = next(iter(boxes.found))
    pieces = [Piece(offsets, entry.shape, entry, file) for offsets, (file, entry) in boxes.found.items()]
    if any(len(offsets) != len(first) for offsets in boxes.found):
        raise CorruptError(f"tensor {shown(name)} has a different number of dimensions in two files")
    ends = [[offset + size for offset, size in zip(piece.offsets, piece.sizes, strict=True)] for piece in pieces]
    shape = tuple(map(max, zip(*ends, strict=True)))
    if len(pieces) == 1 and not any(first) and isinstance(pieces[0].local, TensorEntry):
        return pieces[0].local
    return pieced(name, shape, boxes.dtype, pieces)


def _absent(numbers: Mapping[str, re.Match[str]]) -> list[str]:
    """The files of each rank that other ranks have, and it does not; at most some."""
    there = {(int(match["n"]), int(match["file"])) for match in numbers.values()}
    digits = next(iter(numbers.values()))["of"]
    ranks, files = (sorted({pair[at] for pair in there}) for at in (0, 1))
    pairs = ((rank, file) for rank in ranks for file in files if (rank, file) not in there)
    return [f"shard-{rank:05}-model-{file:05}-of-{digits}.safetensors" for rank, file in islice(pairs, _LISTED + 1)]


def _unproven(numbers: Mapping[str, re.Match[str]], absent: Sequence[str]) -> Finding:
    """Facts that the files do not show."""
    last = max(int(match["n"]) for match in numbers.values())
    if absent:
        return Finding(
            code="completeness-unknown",
            severity="warning",
            message=f"missing: {listed(absent, _LISTED)}; a rank without values writes no file, but a lost file "
            "at the end would look the same: the shapes of whole tensors are not stored",
        )
    return Finding(
        code="completeness-unknown",
        severity="info",
        message=f"the files of {count_of(last, 'rank')} were combined and leave no gaps; they do not say whether more "
        "files followed, because the shapes of whole tensors are not stored",
    )
