"""One file a rank: what FSDP's ranks save with ``torch.save``, each its own, put together.

Layout (verl ``fsdp_checkpoint_manager.py``, accelerate ``fsdp_utils.py``, DINOv2 ``fsdp/__init__.py``; torch 2.14):

- names: ``model_world_size_4_rank_0.pt``, ``optim_...`` and ``extra_state_...`` beside it, ``fsdp_config.json`` with
  ``world_size``; ``pytorch_model_fsdp_rank0.bin``; ``model_final.rank_0.pth``: whatever differs in a rank's number
  alone belongs together
- each file is a tree as torch.save writes it; those of all ranks have the same keys.  A DTensor or ShardedTensor is the
  rank's part of a tensor (`ckptkit.formats.distributed.placements`), and a plain tensor or value is a copy: the first
  rank's is taken, tensors of the others are `Replica`s, other values must be equal.  What each rank has of its own
  (states of random generators) is the first rank's, and a finding says so
- FSDP's LOCAL_STATE_DICT has flat parameters (``_flat_param``), one-dimensional, of each rank a run.  Names and shapes
  of what is joined in them are not in the files: they are opened as they are, padding and all, and
  ``convert --like`` cuts them (`ckptkit.rewrite.flat_parameters`).  The moments of an optimizer are runs of theirs;
  with ``use_orig_params`` the parameters' own names are there too, and what is under them is a view of the flat one

What several sets of files have in one folder is one dict: ``{model, optimizer, extra}``.  A set alone is its tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Replica, Storage, TensorEntry
from ckptkit.errors import CorruptError, FormatError, UnsupportedError
from ckptkit.formats.distributed import RANKED
from ckptkit.formats.distributed.folder import FolderSource, read_part
from ckptkit.formats.distributed.placements import Box, Distributed, Mesh, Share, distributed, share_of
from ckptkit.formats.format import Probe
from ckptkit.formats.shards import Shard, merged_findings, merged_globals
from ckptkit.normalize import RawCheckpoint
from ckptkit.normalize.modules import unwrapped_path
from ckptkit.normalize.parts import is_flat_name
from ckptkit.normalize.trees import Met, Place, SameContent, shown, side_by_side
from ckptkit.pickling.inert import ABSENT, InertDict, Object, TreeMap, attributes, mapping_items, walk
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding, count_of, listed
from ckptkit.tensor import tensor_of
from ckptkit.transfer.pieces import Piece, pieced

__all__ = ["read"]

_SECTIONS = {
    "model": "model", "pytorch_model": "model", "pytorch_model_fsdp": "model", "optim": "optimizer",
    "optimizer": "optimizer", "extra": "extra", "extra_state": "extra",
}  # fmt: skip
"""What stands in files' names, and the key of what is in them."""

_STEPS = frozenset(("final", "last", "latest", "best"))
"""Words that tell one step from another, as numbers do."""

_OWN = frozenset(
    ("rng", "random", "generator", "generators", "seed", "seeds", "sampler", "dataloader", "loader", "rank", "device")
    + ("host", "hostname", "pid", "time", "elapsed", "duration", "throughput", "memory", "loss", "losses")
)
"""Words in keys of what each rank has of its own."""

_DAY_NS = 86_400 * 10**9
_LISTED = 5
"""Places, ranks and files that a message lists."""


@dataclass(slots=True)
class _Set:
    """Files that differ in the number of a rank alone.

    Attributes:
        key: of what is in them, where there are several sets.
        step: what tells it from another of this key.
        files: by rank.
        worlds: the world sizes in their names.
    """

    key: str
    step: str
    files: dict[int, str] = field(default_factory=dict)
    worlds: set[int] = field(default_factory=set)


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of all ranks' files together.

    Raises:
        FormatError: a file is missing, damaged or refused, or they do not belong together.
    """
    folder = probe.file
    if not isinstance(folder, FolderSource):
        raise TypeError("a folder is read")
    sets = _chosen(folder)
    count = _world_size(sets, folder)
    shards = _read_all(probe, [name for each in sets for _, name in sorted(each.files.items())])
    raws = [shard.raw for shard in shards.values()]
    try:
        merged = [_Ranks(each, shards, "" if len(sets) == 1 else each.key) for each in sets]
        roots = [(each.key, ranks.root()) for each, ranks in zip(sets, merged, strict=True)]
        findings = list(_findings(sets, merged, count, folder))
    except FormatError as error:
        error.globals = merge_uses(error.globals, merged_globals(shards))
        raise
    writers = {raw.writer for raw in raws}
    return RawCheckpoint(
        root=roots[0][1] if len(roots) == 1 else InertDict(list(roots)),
        format=folder.layout,
        byteorder="big" if {raw.byteorder for raw in raws} == {"big"} else "little",
        pickle_protocol=max((each for raw in raws if (each := raw.pickle_protocol) is not None), default=None),
        has_pickle=any(raw.has_pickle for raw in raws),
        writer=writers.pop() if len(writers) == 1 else None,
        globals=merged_globals(shards),
        discarded=tuple(value for raw in raws for value in raw.discarded),
        findings=(*merged_findings(shards), *findings),
        replicas=tuple(replica for ranks in merged for replica in ranks.replicas),
        world_size=len(sets[0].files),
        mesh=_mesh(mesh for ranks in merged for mesh in ranks.meshes),
    )


# The files.


def _chosen(folder: FolderSource) -> list[_Set]:
    """The sets of files that are one checkpoint: those of the step that is meant, where there are several.

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
    if len({each.key for each in sets}) == len(sets):
        return sets
    if folder.tag in steps:
        return [each for each in sets if each.step == folder.tag]
    said = f"{folder.tag!r:.80} is none of them" if folder.tag is not None else "name one with --tag"
    raise CorruptError(f"the files of {count_of(len(steps), 'step')} lie here ({listed(steps, _LISTED)}); {said}")


def _key_and_step(stem: str) -> tuple[str, str]:
    """What the files of a stem hold, and which step they are of."""
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
    """The ``world_size`` of fsdp_config.json; 0: none is there."""
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
        raise CorruptError(f"{listed(excess, _LISTED)}: of {count_of(count, 'rank')} there is none of that number")
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
            shards[name] = Shard(name, read_part(probe, name), {})
        except FormatError as error:
            if refused is None:
                refused = error
            else:
                refused.globals = (*refused.globals, *error.globals)
    if refused is not None:
        refused.globals = merge_uses(refused.globals, merged_globals(shards))
        raise refused
    return shards


# The ranks of one set.


class _SamePlaces(SameContent):
    """Two ranks' trees; what each has a part of is one thing, and not looked into."""

    def __init__(self) -> None:
        super().__init__(flags=False)
        self._seen: set[int] = set()

    def met(self, a: object, b: object) -> bool | None:
        """As of `SameContent`; a tree is gone through beside itself."""
        if a is not b:
            return super().met(a, b)
        if id(a) in self._seen:
            return True
        self._seen.add(id(a))
        return None

    def compare(self, place: Place, a: object, b: object) -> tuple[Iterable[Met], list[tuple[Place, object, object]]]:
        """As of `SameContent`."""
        ours, theirs = distributed(a), distributed(b)
        if ours is not None or theirs is not None:
            return [Met(place, a, b, "differs" if ours is None or theirs is None else "spread")], []
        if isinstance(a, Object) and isinstance(b, Object) and a.class_name == b.class_name == "torch.device":
            return [], []
        return super().compare(place, a, b)


@dataclass(slots=True)
class _Spread:
    """A distributed tensor in the first rank's tree, and what each rank has of it."""

    node: object
    found: Distributed
    name: str
    shares: list[tuple[int, Share]] = field(default_factory=list)


@dataclass(slots=True)
class _Copied:
    """A plain tensor in the first rank's tree, and those of the other ranks in its place."""

    entry: TensorEntry
    place: Place
    others: list[tuple[int, TensorEntry]] = field(default_factory=list)


class _Ranks:
    """The trees of all ranks, put together into one.

    Args:
        files: which they are.
        shards: what is in each, by name.
        key: of what they hold; ``""``: they are all there is.

    Attributes:
        replicas: tensors that must be the same.
        own: places of what each rank has of its own.
        ranks: how many the files' content says that there are; 0: it does not say.
        meshes: those that its tensors lie on.

    Raises:
        FormatError: they do not belong together.
    """

    def __init__(self, files: _Set, shards: Mapping[str, Shard], key: str) -> None:
        self._files = [files.files[rank] for rank in sorted(files.files)]
        self._roots = [shards[name].raw.root for name in self._files]
        self._spread: dict[int, _Spread] = {}
        self._copied: dict[int, _Copied] = {}
        self._problems: list[str] = []
        self.replicas: list[Replica] = []
        self.own: dict[str, None] = {}
        self.ranks = 0
        self.meshes: dict[Mesh, None] = {}
        start = Place().below(key) if key else Place()
        for rank, root in enumerate(self._roots):
            self._meet(rank, side_by_side([(start, self._roots[0], root)], _SamePlaces()))

    def _meet(self, rank: int, mets: Iterable[Met]) -> None:
        known: dict[int, Mesh] = {}
        for met in mets:
            if met.how == "order":
                continue
            a, b = _as_entry(met.a), _as_entry(met.b)
            if met.how == "spread":
                self._share(rank, met, known)
            elif isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
                copied = self._copied.setdefault(id(met.a), _Copied(a, met.place))
                if rank:
                    copied.others.append((rank, b))
            elif (own := _own(met.place)) is not None or self._is_state_of_flat(met):
                self.own[own or str(met.place)] = None
            else:
                self._differs(rank, met)
        if len(self._problems) >= _LISTED:
            self._check()

    def _share(self, rank: int, met: Met, known: dict[int, Mesh]) -> None:
        """What a rank has of a distributed tensor.

        Raises:
            FormatError: it does not fit together, or is another rank's.
        """
        spread = self._spread.get(id(met.a))
        if spread is None:
            found = distributed(met.a)
            if found is None:
                return
            spread = self._spread[id(met.a)] = _Spread(met.a, found, str(met.place))
        own = distributed(met.b)
        if own is None or own.kind != spread.found.kind:
            self._differs(rank, met)
            return
        try:
            share = share_of(own, spread.name, rank, known)
        except FormatError as error:
            raise error.at(where=self._files[rank]) from error.__cause__
        if share.rank is not None and share.rank != rank:
            raise CorruptError(
                f"its content is rank {share.rank}'s, its name says rank {rank}: files were swapped or renamed",
                where=self._files[rank],
            )
        self.ranks = max(self.ranks, share.ranks)
        if share.mesh is not None:
            self.meshes.setdefault(share.mesh._replace(place=None, rank=None))
        spread.shares.append((rank, share))

    def _is_state_of_flat(self, met: Met) -> bool:
        """Whether it is the state of a parameter of which a rank has nothing: so it is with flat parameters."""
        is_absent = met.a is ABSENT or met.b is ABSENT
        return (
            is_absent and "optim" in str(met.place) and any(is_flat_name(each.name) for each in self._spread.values())
        )

    def _differs(self, rank: int, met: Met) -> None:
        place = str(met.place) or "the whole"
        if met.a is ABSENT or met.b is ABSENT:
            who = self._files[rank if met.a is ABSENT else 0]
            self._problems.append(f"{place:.200} is only in {who}")
        else:
            ours, theirs = shown(met.a, met.b)
            self._problems.append(f"{place:.200} is {ours} in {self._files[0]} and {theirs} in {self._files[rank]}")

    def _check(self) -> None:
        """Raise for what differs between the ranks' trees.

        Raises:
            CorruptError: something does.
        """
        if self._problems:
            raise CorruptError(
                f"the files of the ranks do not belong together: {listed(self._problems, _LISTED, between='; ')}; "
                "files of different runs or steps were mixed"
            )

    def root(self) -> object:
        """The tree, with every tensor whole.

        Raises:
            FormatError: tensors have parts that are missing, overlap or do not fit.
        """
        self._check()
        flat = [spread for spread in self._spread.values() if is_flat_name(spread.name)]
        views = self._views(flat)
        replaced: list[tuple[object, object]] = []
        for spread in self._spread.values():
            replaced.append((spread.node, self._whole(spread)))
        for number, copied in self._copied.items():
            if number in views:
                continue
            if flat and (joined := self._joined(copied)) is not None:
                replaced.append((copied.entry, joined))
            else:
                self._compare(copied)
        self._check()
        root = TreeMap(lambda leaf: leaf, replaced)(self._roots[0])
        _tidied(root, views)
        return root

    def _whole(self, spread: _Spread) -> TensorEntry:
        """The tensor that the ranks' parts make up.

        Raises:
            CorruptError: they do not.
        """
        name, first = spread.name, spread.shares[0][1]
        boxes: dict[Box, tuple[int, TensorEntry]] = {}
        for rank, share in spread.shares:
            for what in ("shape", "dtype", "every"):
                if getattr(share, what) != getattr(first, what):
                    told = f" ({getattr(first, what)} and {getattr(share, what)})" if what != "every" else ""
                    what = "list of shards" if what == "every" else what
                    raise CorruptError(
                        f"tensor {name!r:.200}: {self._files[0]} and {self._files[rank]} give it another {what}{told}: "
                        "files of different runs were mixed"
                    )
            for box, entry in share.pieces:
                other, known = boxes.setdefault(box, (rank, entry))
                if known is not entry:
                    self.replicas.append(Replica(name, known, entry, f"rank {other} and rank {rank}"))
        for box, owner in (first.every or {}).items():
            if box not in boxes and 0 not in box[1]:
                raise CorruptError(
                    f"tensor {name!r:.200}: its shard at {[*box[0]]} of sizes {[*box[1]]} is in none of the files"
                    + (f"; it was rank {owner}'s" if owner is not None else "")
                )
        found = spread.found
        if len(boxes) == 1:
            ((box, (_, entry)),) = boxes.items()
            if box[1] == first.shape == entry.shape and entry.dtype == first.dtype and not any(box[0]):
                return replace(entry, requires_grad=found.requires_grad, is_parameter=found.is_parameter)
        pieces = [Piece(*box, entry, self._files[rank]) for box, (rank, entry) in boxes.items()]
        return pieced(
            name,
            first.shape,
            first.dtype,
            pieces,
            requires_grad=found.requires_grad,
            is_parameter=found.is_parameter,
        )

    def _compare(self, copied: _Copied) -> None:
        """Note a plain tensor's copies, which must be the same."""
        own = _own(copied.place)
        if own is not None:
            if copied.others:
                self.own[own] = None
            return
        name, entry = str(copied.place), copied.entry
        for rank, other in copied.others:
            if (other.dtype, other.shape) != (entry.dtype, entry.shape):
                self._differs(rank, Met(copied.place, entry, other))
            else:
                self.replicas.append(Replica(name, entry, other, f"rank 0 and rank {rank}"))

    def _views(self, flat: Sequence[_Spread]) -> set[int]:
        """The tensors that are views of flat parameters under the names of what is joined in them, by id."""
        storages: dict[int, set[int]] = {}
        for spread in flat:
            for rank, share in spread.shares:
                storages.setdefault(rank, set()).update(id(entry.storage) for _, entry in share.pieces)
        found = set()
        for number, copied in self._copied.items() if flat else ():
            each = [(0, copied.entry), *copied.others]
            held = [id(entry.storage) in storages.get(rank, ()) for rank, entry in each if entry.numel]
            if held and all(held) and all(len(entry.shape) == 1 for _, entry in each):
                found.add(number)
        return found

    def _joined(self, copied: _Copied) -> TensorEntry | None:
        """What an optimizer keeps for a flat parameter, of which each rank has a run; ``None``: it is something else."""
        each = [(0, copied.entry), *copied.others]
        if "optim" not in str(copied.place) or any(len(entry.shape) != 1 for _, entry in each):
            return None
        pieces, at = [], 0
        for rank, entry in each:
            pieces.append(Piece((at,), entry.shape, entry, self._files[rank]))
            at += entry.numel
        return pieced(str(copied.place), (at,), copied.entry.dtype, pieces)


def _as_entry(node: object) -> object:
    """A storage that stands by itself as the bytes that it is."""
    return tensor_of(node, 0, (node.nbytes,), (1,), "uint8", False, False) if isinstance(node, Storage) else node


def _own(place: Place) -> str | None:
    """The place of what each rank has of its own, in which this one is; ``None``: all ranks have the same."""
    step: Place | None = place
    found = None
    while step is not None:
        if isinstance(step.label, str) and _OWN & set(re.split(r"[^a-z]+", step.label.lower())):
            found = step
        step = step.above
    return None if found is None else str(found)


def _tidied(root: object, views: set[int]) -> None:
    """Leave out the views of flat parameters, and FSDP's wrappers in the names of module versions."""
    for node in walk(root):
        if not isinstance(node, (InertDict, Object)):
            continue
        if views and any(id(value) in views for _, value in node.pairs):
            node.pairs[:] = [pair for pair in node.pairs if id(pair[1]) not in views]
        state = attributes(node)
        versions = None if state is None else state.get("_metadata")
        if isinstance(versions, Object) and mapping_items(versions) is not None:
            names: dict[object, object] = {}
            for key, value in versions.pairs:
                names.setdefault(unwrapped_path(key) if isinstance(key, str) else key, value)
            if len(names) < len(versions.pairs) or any(key not in names for key, _ in versions.pairs):
                versions.pairs[:] = list(names.items())


# What is to be told.


def _findings(sets: Sequence[_Set], merged: Sequence[_Ranks], count: int, folder: FolderSource) -> Iterator[Finding]:
    """What is to be told of the files together.

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
            message=f"nothing in names or files says how many ranks there were; the files of {files} are here",
        )
    if own := [place for ranks in merged for place in ranks.own]:
        yield Finding(
            code="rank-values",
            severity="info",
            message=f"each rank has its own of {listed(own, _LISTED)}; those of rank 0 are taken",
        )
    times = {name: file.identity[3] for name, file in folder.parts.items() if isinstance(file, SourceFile)}
    first, last = (choose(times, key=lambda name: times[name]) for choose in (min, max))
    if times[last] - times[first] > _DAY_NS:
        days = (times[last] - times[first]) / _DAY_NS
        yield Finding(
            code="saved-apart",
            severity="warning",
            message=f"{first} was written {days:.0f} days before {last}: files of two runs may be mixed",
        )


def _mesh(meshes: Iterable[Mesh]) -> dict[str, int] | None:
    """The sizes of the mesh of most dimensions, by their names, or numbers where it has none; ``None``: there is none."""
    largest = max(meshes, key=lambda mesh: (len(mesh.sizes), mesh.ranks), default=None)
    if largest is None:
        return None
    names = largest.names or map(str, range(len(largest.sizes)))
    return dict(zip(names, largest.sizes, strict=True))
