"""One file a rank: what FSDP's ranks save with ``torch.save``, each its own, combined.

Layout (verl ``fsdp_checkpoint_manager.py``, accelerate ``fsdp_utils.py``, DINOv2 ``fsdp/__init__.py``; torch 2.14):

- names: ``model_world_size_4_rank_0.pt``, ``optim_...`` and ``extra_state_...`` beside it, ``fsdp_config.json`` with
  ``world_size``; ``pytorch_model_fsdp_rank0.bin``; ``model_final.rank_0.pth``: files whose names differ only in a
  rank's number belong together
- each file is a tree as torch.save writes it; those of all ranks have the same keys.  A DTensor or ShardedTensor is the
  rank's part of a tensor (`ckptkit.formats.distributed.placements`), and a plain tensor or value is a copy: the first
  rank's is taken, tensors of the others are `Replica`s, other values must be equal.  Values that differ by rank (states
  of random generators) are the first rank's, and a finding says so
- FSDP's LOCAL_STATE_DICT has flat parameters (``_flat_param``), one-dimensional, of each rank a run.  Names and shapes
  of the joined tensors are not in the files: they are opened unchanged, with padding, and ``convert --like`` splits
  them (`ckptkit.rewrite.flat_parameters`).  The moments of an optimizer are runs of theirs; with ``use_orig_params``
  the parameters' own names are there too, each a view of the flat one

What several sets of files have in one folder is one dict: ``{model, optimizer, extra}``.  A single set is its tree.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field

from ckptkit.bytesource import SourceFile
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.distributed.folder import FolderSource, folder_of, read_part
from ckptkit.formats.distributed.layouts import RANKED
from ckptkit.formats.distributed.placements import Mesh
from ckptkit.formats.distributed.ranks import Ranks
from ckptkit.formats.format import Probe
from ckptkit.formats.shards import Shard, merged_findings, merged_globals
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding, count_of, listed
from ckptkit.startup import dataclass

__all__ = ["read"]

_SECTIONS = {
    "model": "model", "pytorch_model": "model", "pytorch_model_fsdp": "model", "optim": "optimizer",
    "optimizer": "optimizer", "extra": "extra", "extra_state": "extra",
}  # fmt: skip
"""The kinds of content in files' names, and their keys."""

_STEPS = frozenset(("final", "last", "latest", "best"))
"""Words that distinguish steps, as numbers do."""

_DAY_NS = 86_400 * 10**9
_LISTED = 5
"""Places, ranks and files that a message lists."""


@dataclass(slots=True)
class _Set:
    """Files whose names differ only in the number of a rank.

    Attributes:
        key: of their content, if there are several sets.
        step: what distinguishes it from others with this key.
        files: by rank.
        worlds: the world sizes in their names.
    """

    key: str
    step: str
    files: dict[int, str] = field(default_factory=dict)
    worlds: set[int] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """The files, by the numbers of their ranks."""
        return [self.files[rank] for rank in sorted(self.files)]


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of all ranks' files together.

    Raises:
        FormatError: a file is missing, damaged or refused, or they do not belong together.
    """
    folder = folder_of(probe)
    sets = _chosen(folder)
    count = _world_size(sets, folder)
    shards = _read_all(probe, [name for each in sets for name in each.names])
    try:
        merged = _merged(sets, shards)
        model = next((ranks for ranks in merged if ranks.shapes), merged[0])
        roots = [(each.key, ranks.root(model)) for each, ranks in zip(sets, merged, strict=True)]
        findings = list(_findings(sets, merged, count, folder))
    except FormatError as error:
        error.globals = merge_uses(error.globals, merged_globals(shards))
        raise
    raws = [shard.raw for shard in shards.values()]
    protocols = [raw.pickle_protocol for raw in raws if raw.pickle_protocol is not None]
    writers = {raw.writer for raw in raws}
    return RawCheckpoint(
        root=roots[0][1] if len(roots) == 1 else InertDict(list(roots)),
        format=folder.layout,
        byteorder="big" if {raw.byteorder for raw in raws} == {"big"} else "little",
        pickle_protocol=max(protocols, default=None),
        has_pickle=any(raw.has_pickle for raw in raws),
        writer=writers.pop() if len(writers) == 1 else None,
        globals=merged_globals(shards),
        discarded=tuple(value for raw in raws for value in raw.discarded),
        findings=(*merged_findings(shards), *findings),
        replicas=tuple(replica for ranks in merged for replica in ranks.replicas),
        world_size=len(sets[0].files),
        mesh=_mesh(mesh for ranks in merged for mesh in ranks.meshes),
    )


def _merged(sets: Sequence[_Set], shards: Mapping[str, Shard]) -> list[Ranks]:
    """The ranks of each set."""
    kinds = (".DTensor", ".ShardedTensor")
    is_sharded = any(use.name.endswith(kinds) for shard in shards.values() for use in shard.raw.globals)
    found = []
    for each in sets:
        trees = {name: shards[name].raw.root for name in each.names}
        found.append(Ranks(trees, "" if len(sets) == 1 else each.key, is_sharded=is_sharded))
    return found


# The files.


def _chosen(folder: FolderSource) -> list[_Set]:
    """The sets of files that are one checkpoint: those of the chosen step, if there are several.

    Raises:
        CorruptError: a rank is there twice, or it is not clear which step is meant.
    """
    found: dict[tuple[str, str], _Set] = {}
    for name in folder.names:
        match = re.fullmatch(RANKED, name, re.ASCII)
        if match is None:
            continue
        key, step = _key_and_step(match["stem"] or "")
        files = found.setdefault((f"{key}/{step}", match["end"]), _Set(key, step))
        rank = int(match["rank"])
        if rank in files.files and int(match["of"] or 0) in (files.worlds or {0}):
            raise CorruptError(f"rank {rank} is there twice: {files.files[rank]} and {name}")
        files.files[rank] = name
        if match["of"]:
            files.worlds.add(int(match["of"]))
    sets = sorted(found.values(), key=lambda each: [*dict.fromkeys(_SECTIONS.values()), each.key].index(each.key))
    steps = list(dict.fromkeys(each.step for each in sets))
    is_itself = folder.root == folder.path and os.path.basename(os.path.abspath(folder.root)) != folder.asked
    asked = folder.asked if is_itself else None  # not what leads to the folder
    if asked in steps:
        return [each for each in sets if each.step == asked]
    if len({each.key for each in sets}) == len(sets) and asked is None:
        return sets
    said = "name one with --tag" if asked is None else f"{asked!r:.80} is not one of them"
    lie = "lies" if len(steps) == 1 else "lie"
    raise CorruptError(f"{count_of(len(steps), 'step')} {lie} here ({listed(steps, _LISTED)}); {said}", names=steps)


def _key_and_step(stem: str) -> tuple[str, str]:
    """The content of the files of a stem, and their step."""
    words = [word for word in re.split(r"[._-]+", stem) if word]
    steps = [word for word in words if word.isdigit() or word in _STEPS]
    key = "_".join(word for word in words if word not in steps)
    return _SECTIONS.get(key, key or "state"), "_".join(steps)


def _world_size(sets: Sequence[_Set], folder: FolderSource) -> int:
    """How many ranks saved the files, by their names; 0: they do not say it.

    Raises:
        CorruptError: they are of several runs, or some are missing.
    """
    worlds = {size for each in sets for size in each.worlds}
    if "fsdp_config.json" in folder.names and (size := _configured(folder)):
        worlds.add(size)
    if len(worlds) > 1:
        sizes = " and ".join(map(str, sorted(worlds)))
        raise CorruptError(f"files of several runs are mixed here: of {sizes} ranks")
    count = max(worlds, default=0)
    for each in sets:
        _require_ranks(each, count or max(max(other.files) for other in sets) + 1)
    return count


def _configured(folder: FolderSource) -> int:
    """The ``world_size`` of fsdp_config.json; 0: there is none."""
    file = folder.part("fsdp_config.json")
    try:
        said = json.loads(file.read(0, min(file.size, 1 << 20)))
    except (ValueError, RecursionError):
        return 0
    size = said.get("world_size") if isinstance(said, dict) else None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 0


def _require_ranks(each: _Set, count: int) -> None:
    """See that the files of all ranks are there, and no others.

    Raises:
        CorruptError: they are not.
    """
    excess = [name for rank, name in each.files.items() if rank >= count]
    if excess:
        raise CorruptError(f"{listed(excess, _LISTED)}: the number is too high for {count_of(count, 'rank')}")
    if len(each.files) == count:
        return
    some, name = next(iter(each.files.items()))
    missing = [rank for rank in range(min(count, len(each.files) + _LISTED + 1)) if rank not in each.files]
    left = count - len(each.files)
    names = [re.sub(rf"(?<=rank)([_-]?)0*{some}(?=\.\w+$)", rf"\g<1>{rank}", name) for rank in missing]
    verb = "is" if left == 1 else "are"
    raise CorruptError(
        f"{left:,} of {count_of(count, 'rank')} {verb} missing: {listed(names, _LISTED, total=left)}; "
        "get all of them into the folder",
        names=names,
    )


def _read_all(probe: Probe, names: Sequence[str]) -> dict[str, Shard]:
    """Every file as its reader gives it.

    Raises:
        FormatError: the first that cannot be read, with the names in all of them.
    """
    shards: dict[str, Shard] = {}
    refused: FormatError | None = None
    for name in names:
        try:
            shards[name] = Shard(name, read_part(probe, name, named=False), {})
        except FormatError as error:
            if refused is None:
                refused = error
            else:
                refused.globals = (*refused.globals, *error.globals)
    if refused is not None:
        refused.globals = merge_uses(refused.globals, merged_globals(shards))
        raise refused
    return shards


# Findings.


def _findings(sets: Sequence[_Set], merged: Sequence[Ranks], count: int, folder: FolderSource) -> Iterator[Finding]:
    """The findings about the files together.

    Raises:
        CorruptError: their content says that there are others.
    """
    told = max(ranks.ranks for ranks in merged)
    files = len(sets[0].files)
    if told > files:
        _require_ranks(sets[0], told)
    if not count and not told:
        yield Finding(
            code="completeness-unknown",
            severity="warning",
            message=f"neither names nor files say how many ranks there were; the files of {files} are here",
        )
    if own := [place for ranks in merged for place in ranks.own]:
        yield Finding(
            code="rank-values",
            severity="info",
            message=f"each rank has its own {listed(own, _LISTED)}; the values of rank 0 are used",
        )
    if flat := [place for ranks in merged for place in ranks.flat]:
        yield Finding(
            code="flat-optimizer",
            severity="warning",
            message=f"{count_of(len(flat), 'tensor')} of the optimizer's state belong to flat parameters, joined from "
            f"what each rank has, including padding: {listed(flat, _LISTED, characters=100)}",
        )
    names = {name for each in sets for name in each.names}
    opened = ((name, file) for name, file in folder.parts.items() if name in names)
    times = {name: file.identity[3] for name, file in opened if isinstance(file, SourceFile)}
    first, last = (choose(times, key=lambda name: times[name], default="") for choose in (min, max))
    if times and times[last] - times[first] > _DAY_NS:
        days = (times[last] - times[first]) / _DAY_NS
        yield Finding(
            code="saved-apart",
            severity="warning",
            message=f"{first} was written {days:.0f} days before {last}: files from two runs may be mixed",
        )


def _mesh(meshes: Iterable[Mesh]) -> dict[str, int] | None:
    """The sizes of the mesh with most dimensions by their names, or by their numbers; ``None``: there is none."""
    largest = max(meshes, key=lambda mesh: (len(mesh.sizes), mesh.ranks), default=None)
    if largest is None:
        return None
    names = largest.names or map(str, range(len(largest.sizes)))
    return dict(zip(names, largest.sizes, strict=True))
