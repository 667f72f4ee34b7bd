"""Checkpoints that are combined from several: accelerate's folders, and Lightning's with ``meta.pt``.

accelerate's ``pytorch_model_fsdp_0`` holds ``{"model": ...}`` and ``optimizer_0`` holds ``{"optimizer": ...}``, each a
folder of torch.distributed.checkpoint; of several models the second is ``model_1``.  Lightning has the model and the
optimizers in such a folder, and all else in one dict in ``meta.pt``.  Together they are one resume dict: the keys of
all, in that order.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ckptkit.bytesource import Source
from ckptkit.checkpoint import GlobalUse, Spread, Unread
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.distributed.folder import FolderSource, folder_of, read_part
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.shards import prefixed
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict, mapping_items
from ckptkit.pickling.trust import merge_uses

__all__ = ["read_folder", "spread_of"]

_RANKS: dict[str, tuple[str, ...]] = {
    "dcp": (r"(?:.*/)?__(\d{1,9})_\d+\.distcp",),
    "megatron": (r"__(\d{1,9})_\d+\.distcp",),
    "deepspeed": (r"\w*zero_pp_rank_(\d{1,9})_.*", r".*mp_rank_(\d{1,9})_.*"),
    "safetensors-dcp": (r"shard-0*(\d{1,9})-.*",),
}
"""How the files of each layout encode the number of the process that wrote them; several kinds of numbers are
factors."""


class _Within(FolderSource):
    """A folder in one whose files are opened, and closed, with the outer one's."""

    __slots__ = ("_inside", "_outer")

    def __init__(self, outer: FolderSource, inside: str) -> None:
        names = tuple(name.removeprefix(inside) for name in outer.names if name.startswith(inside))
        super().__init__(outer.path, f"{outer.root}/{inside[:-1]}", outer.layout, names)
        self._outer = outer
        self._inside = inside

    def part(self, name: str) -> Source:
        """As `FolderSource.part`."""
        return self._outer.part(self._inside + name)


class _AllUnread:
    """What several have left for later."""

    def __init__(self, each: list[Unread]) -> None:
        self._each = each

    def judge(self) -> tuple[GlobalUse, ...]:
        """As `ckptkit.checkpoint.Unread.judge`."""
        return merge_uses(*(unread.judge() for unread in self._each))


def read_folder(probe: Probe, container: Format) -> RawCheckpoint:
    """The tree and the facts of a folder with all its members, and what was found on the way to it.

    Args:
        probe: of the folder.
        container: what its layout is.

    Raises:
        FormatError: one of them is damaged or refused.
        CorruptError: two have values under one key.
    """
    folder = folder_of(probe)
    raw = _joined(probe, folder, container) if folder.members else container.read(probe)
    return replace(raw, findings=(*folder.findings, *raw.findings))


def spread_of(folder: Source, raw: RawCheckpoint) -> Spread | None:
    """How a folder is spread over processes: as its reader says, or else by the ranks in the files' names."""
    if not isinstance(folder, FolderSource):
        return None
    count = 1 if raw.world_size is None else raw.world_size
    for pattern in _RANKS.get(raw.format, ()) if raw.world_size is None else ():
        numbers = [int(match[1]) for match in (re.fullmatch(pattern, name, re.ASCII) for name in folder.own) if match]
        count *= max(numbers, default=0) + (raw.format != "safetensors-dcp")  # the hub's shards count from 1
    return Spread(count or None, raw.mesh, len(folder.own), folder.tag)


def _joined(probe: Probe, folder: FolderSource, container: Format) -> RawCheckpoint:
    found = [] if all(member.endswith("/") for member in folder.members) else [("", container.read(probe))]
    found += [(member, _member(probe, folder, member, container)) for member in folder.members]
    pairs: dict[object, object] = {}
    for member, raw in found:
        for key, value in _pairs(raw, member):
            if key in pairs:
                raise CorruptError(f"{key!r:.80} is there twice", where=member or None)
            pairs[key] = value
    raws = [raw for _, raw in found]
    unread = [raw.unread for raw in raws if raw.unread is not None]
    return replace(
        raws[0],
        root=InertDict(list(pairs.items())),
        metadata={key: text for raw in reversed(raws) for key, text in raw.metadata.items()},
        globals=merge_uses(*(raw.globals for raw in raws)),
        findings=tuple(finding for raw in raws for finding in raw.findings),
        discarded=tuple(value for raw in raws for value in raw.discarded),
        has_pickle=any(raw.has_pickle for raw in raws),
        replicas=tuple(replica for raw in raws for replica in raw.replicas),
        unread=_AllUnread(unread) if unread else None,
        world_size=max((raw.world_size for raw in raws if raw.world_size is not None), default=None),
    )


def _member(probe: Probe, folder: FolderSource, member: str, container: Format) -> RawCheckpoint:
    if not member.endswith("/"):
        return read_part(probe, member)
    try:
        return prefixed(container.read(Probe(_Within(folder, member), probe.limits)), member)
    except FormatError as error:
        error.where = f"{member}: {error.where}" if error.where else member
        raise


def _pairs(raw: RawCheckpoint, member: str) -> list[tuple[object, object]]:
    """The keys and values of one; for the second of several models, the second's."""
    name = re.split("[./]", member)[0]
    number = re.search(r"_([1-9]\d*)\Z", name)
    pairs = mapping_items(raw.root)
    if pairs is None:
        return [(name, raw.root)]
    if number is None or not member.endswith("/"):
        return pairs
    return [(f"{key}{number[0]}" if isinstance(key, str) else key, value) for key, value in pairs]
