"""The trees of several ranks, combined into the one that a single process would have saved.

All have the same places.  Each place has a distributed tensor, of which each rank has parts; a plain tensor, of which
each has a copy; a value, which must be equal; or something that differs by rank.  A DTensor of a mesh of some ranks
(experts, the layers of a pipeline's stage) may be only in their files: as many as the mesh has places.

FSDP's first version has flat parameters, and what an optimizer's own ``state_dict()`` keeps for one, or with
``use_orig_params`` for the part of one that a parameter is, is a plain tensor: each rank has a run of it, or nothing.
Where flat parameters are saved (LOCAL_STATE_DICT), and with ``use_orig_params`` the parameters' own names too, each is
a rank's view of its part, which says where in the flat one it begins and how many elements it has, but not its shape.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace

from ckptkit.checkpoint import Replica, Storage, TensorEntry
from ckptkit.computed import files_of
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.distributed.frames import frame_of
from ckptkit.formats.distributed.placements import Box, Distributed, Mesh, Share, distributed, fills_mesh, share_of
from ckptkit.normalize.modules import unwrapped_path
from ckptkit.normalize.parts import is_flat_name
from ckptkit.normalize.trees import Met, Place, SameContent, shown, side_by_side
from ckptkit.pickling.inert import ABSENT, InertDict, Object, TreeMap, attributes, mapping_items, walk
from ckptkit.report import listed
from ckptkit.startup import dataclass
from ckptkit.tensor import tensor_of
from ckptkit.transfer.pieces import Piece, pieced

__all__ = ["Ranks"]

_OWN = frozenset(("rng", "random", "seed", "seeds", "sampler", "dataloader", "loader", "rank"))
"""Words in keys of values that differ by rank, including tensors."""

_MEASURED = frozenset((
    "device", "host", "hostname", "pid", "time", "elapsed", "duration", "throughput", "memory", "loss", "losses",
))  # fmt: skip
"""Words in keys of plain values that each rank has measured, or found where it ran."""

_SHARED = frozenset(("model", "module", "network", "optim", "optimizer"))
"""Words in keys of what the ranks have together: nothing below is one rank's own, whatever it is called."""

_LISTED = 5
"""Differences that a message lists."""


class _SamePlaces(SameContent):
    """Two ranks' trees; what each has a part of is one thing, and not read."""

    def __init__(self) -> None:
        super().__init__(flags=False)
        self._seen: set[int] = set()

    def met(self, a: object, b: object) -> bool | None:
        """As for `SameContent`; a tree is compared with itself."""
        if a is not b:
            return super().met(a, b)
        if id(a) in self._seen:
            return True
        self._seen.add(id(a))
        return None

    def compare(self, place: Place, a: object, b: object) -> tuple[Iterable[Met], list[tuple[Place, object, object]]]:
        """As for `SameContent`."""
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
    """A plain tensor in the tree, and those that the ranks have in its place."""

    node: object
    place: Place
    each: list[tuple[int, TensorEntry]] = field(default_factory=list)


class Ranks:
    """The trees of all ranks, combined into one.

    Args:
        trees: of each rank's file, by its name, in the order of the ranks.
        key: of their content; ``""``: they are all there is.
        is_sharded: whether the model's parameters are distributed: then what an optimizer's own state_dict() has that
            are plain tensors is of flat parameters.

    Attributes:
        replicas: tensors that must be the same.
        own: places of values that differ by rank.
        flat: places of what was combined from runs of flat parameters, and has no shape.
        shapes: those of its distributed tensors, in order, but for flat parameters.
        ranks: how many the files' content says that there are; 0: it does not say.
        meshes: those that its tensors are on.

    Raises:
        FormatError: they do not belong together.
    """

    def __init__(self, trees: Mapping[str, object], key: str, *, is_sharded: bool = False) -> None:
        self._files = list(trees)
        self._roots = list(trees.values())
        self._spread: dict[int, _Spread] = {}
        self._copied: dict[int, _Copied] = {}
        self._problems: list[str] = []
        self._storages: dict[int, Storage] = {}
        self._frame, self._optimizers = frame_of(self._roots, is_sharded=is_sharded)
        self._absent: dict[int, None] = {}
        self._versions: list[tuple[int, Met]] = []
        self.replicas: list[Replica] = []
        self.own: dict[str, None] = {}
        self.flat: list[str] = []
        self.ranks = 0
        self.meshes: dict[Mesh, None] = {}
        start = Place().below(key) if key else Place()
        self._optimizers = {str(start.below(each)) if each else str(start) for each in self._optimizers}
        for rank, root in enumerate(self._roots):
            self._meet(rank, side_by_side([(start, self._frame, root)], _SamePlaces()))
        if not self._absent:
            for rank, met in self._versions:
                self._differs(rank, met)
        for number in self._absent:
            spread = self._spread[number]
            if not fills_mesh([share for _, share in spread.shares]):
                files = [self._files[rank] for rank, _ in spread.shares]
                self._problems.append(f"{spread.name:.200} is only in {listed(files, _LISTED)}")
        self.shapes = [each.shares[0][1].shape for each in self._spread.values() if not is_flat_name(each.name)]

    def _meet(self, rank: int, mets: Iterable[Met]) -> None:
        known: dict[int, Mesh] = {}
        for met in mets:
            a, b = _as_entry(met.a), _as_entry(met.b)
            if met.how == "spread":
                self._share(rank, met, known)
            elif met.b is ABSENT and (found := distributed(met.a)) is not None and found.kind == "DTensor":
                self._absent[id(met.a)] = None
            elif met.b is ABSENT and met.place.above is not None and met.place.above.label == "_metadata":
                self._versions.append((rank, met))
            elif isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
                self._copied.setdefault(id(met.a), _Copied(met.a, met.place)).each.append((rank, b))
            elif (own := _own(met.place, _OWN | _MEASURED)) is not None:
                self.own[own] = None
            elif met.how != "order" and not (met.b is ABSENT and self._is_run(met.place)):
                self._differs(rank, met)
        if len(self._problems) >= _LISTED:
            self._check()

    def _is_run(self, place: Place) -> bool:
        """Whether it is in an optimizer's state for flat parameters."""
        return any(f"{place}.".startswith(f"{each}.state." if each else "state.") for each in self._optimizers)

    def _share(self, rank: int, met: Met, known: dict[int, Mesh]) -> None:
        """A rank's part of a distributed tensor.

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
                f"its content is from rank {share.rank}, but its name says rank {rank}: files were swapped or renamed",
                where=self._files[rank],
            )
        self.ranks = max(self.ranks, share.ranks)
        if share.mesh is not None:
            self.meshes.setdefault(share.mesh._replace(place=None, rank=None))
        spread.shares.append((rank, share))

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

    def twins(self) -> dict[int, int]:
        """The first rank that has the same parts of all distributed tensors, where another one has: it is its copy."""
        held: dict[int, list[object]] = {}
        for number, spread in self._spread.items():
            for rank, share in spread.shares:
                held.setdefault(rank, []).extend((number, box) for box, _ in share.pieces)
        first: dict[object, int] = {}
        return {rank: first.setdefault(tuple(held[rank]), rank) for rank in sorted(held) if held[rank]}

    def root(self, model: Ranks) -> object:
        """The tree, with every tensor whole.

        Args:
            model: the ranks' files that have the model's parameters; these or others.

        Raises:
            FormatError: tensors have parts that are missing, overlap or do not fit.
        """
        self._check()
        wholes = {number: self._whole(spread) for number, spread in self._spread.items()}
        replaced: list[tuple[object, object]] = [(self._spread[number].node, new) for number, new in wholes.items()]
        twins, flat = model.twins(), self._flat_parts()
        known = self._known_shapes(model.shapes, twins)
        for copied in self._copied.values():
            new = self._view(copied, flat, wholes) if flat else None
            if new is None and self._is_run(copied.place):
                new = self._joined(copied, known, twins)
            if new is not None:
                replaced.append((copied.node, new))
            else:
                self._compare(copied)
        self._check()
        root = TreeMap(self._leaf, replaced)(self._frame)
        _unwrap_versions(root)
        return root

    def _whole(self, spread: _Spread) -> TensorEntry:
        """The tensor that the ranks' parts make up.

        Raises:
            CorruptError: they do not.
        """
        name, first = spread.name, spread.shares[0][1]
        boxes: dict[Box, tuple[int, TensorEntry]] = {}
        for rank, share in spread.shares:
            for what, ours, theirs in (
                ("shape", first.shape, share.shape),
                ("dtype", first.dtype, share.dtype),
                ("list of shards", set(first.every or ()), set(share.every or ())),
            ):
                if ours != theirs:
                    raise CorruptError(
                        f"tensor {name!r:.200}: {self._files[0]} and {self._files[rank]} do not give it the same "
                        f"{what}: files of different runs were mixed"
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
                storage = self._named(entry.storage)
                needs_grad, is_parameter = found.requires_grad, found.is_parameter
                return replace(entry, storage=storage, requires_grad=needs_grad, is_parameter=is_parameter)
        pieces = [Piece(*box, entry, self._files[rank]) for box, (rank, entry) in boxes.items()]
        return pieced(
            name,
            first.shape,
            first.dtype,
            pieces,
            requires_grad=found.requires_grad,
            is_parameter=found.is_parameter,
        )

    def _named(self, storage: Storage) -> Storage:
        """A storage of one file's, with the file's name and a colon before its key."""
        named = self._storages.get(id(storage))
        if named is None:
            (file, *_) = files_of(storage.source)
            named = self._storages[id(storage)] = replace(storage, key=f"{os.path.basename(file.path)}:{storage.key}")
        return named

    def _leaf(self, leaf: object) -> object:
        if isinstance(leaf, TensorEntry):
            return replace(leaf, storage=self._named(leaf.storage))
        return self._named(leaf) if isinstance(leaf, Storage) else leaf

    def _compare(self, copied: _Copied) -> None:
        """Note a plain tensor's copies, which must be the same."""
        own = _own(copied.place, _OWN)
        if own is not None:
            if len(copied.each) > 1:
                self.own[own] = None
            return
        (first, entry), *others = copied.each
        for rank, other in others:
            if (other.dtype, other.shape) != (entry.dtype, entry.shape):
                self._differs(rank, Met(copied.place, entry, other))
            else:
                self.replicas.append(Replica(str(copied.place), entry, other, f"rank {first} and rank {rank}"))

    def _flat_parts(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Of each rank's storages that have a part of a flat parameter: which one, and where its first element is."""
        return {
            (rank, id(entry.storage)): (number, offsets[0] - entry.storage_offset)
            for number, spread in self._spread.items()
            if is_flat_name(spread.name)
            for rank, share in spread.shares
            for (offsets, _), entry in share.pieces
            if len(offsets) == 1
        }

    def _view(
        self, copied: _Copied, flat: Mapping[tuple[int, int], tuple[int, int]], wholes: Mapping[int, TensorEntry]
    ) -> TensorEntry | None:
        """A parameter joined in a flat one, if the ranks have views of it; ``None``: it is something else.

        Raises:
            CorruptError: the views do not follow each other.
        """
        runs: list[tuple[int, int]] = []
        of: set[int] = set()
        for rank, entry in copied.each:
            if len(entry.shape) != 1:
                return None
            held = flat.get((rank, id(entry.storage)))
            if entry.numel and held is None:
                return None
            if entry.numel and held is not None:
                of.add(held[0])
                runs.append((held[1] + entry.storage_offset, entry.numel))
        if not runs:
            return None
        begin, total = min(runs)[0], sum(numel for _, numel in runs)
        ends = [first + numel for first, numel in sorted(runs)]
        whole = wholes[of.pop()]
        if (
            of
            or whole.dtype != copied.each[0][1].dtype
            or [begin, *ends[:-1]] != [first for first, _ in sorted(runs)]
            or not 0 <= begin <= whole.numel - total
        ):
            raise CorruptError(f"tensor {copied.place!s:.200}: the ranks' parts of it in a flat parameter have gaps")
        offset = whole.storage_offset + begin
        return replace(whole, storage_offset=offset, shape=(total,), stride=(1,), requires_grad=False)

    def _joined(
        self, copied: _Copied, known: Mapping[object, tuple[int, ...]], twins: Mapping[int, int]
    ) -> TensorEntry | None:
        """The optimizer's state of a flat parameter, of which each rank has a run; ``None``: it is something else."""
        if any(len(entry.shape) != 1 for _, entry in copied.each):
            return None
        pieces, at = [], 0
        for rank, entry in copied.each:
            if (first := twins.get(rank, rank)) == rank:
                pieces.append(Piece((at,), entry.shape, entry, self._files[rank]))
                at += entry.numel
            elif (value := dict(copied.each).get(first)) is not None:
                where = f"rank {first} and rank {rank}"
                self.replicas.append(Replica(str(copied.place), value, entry, where))
        shape = known.get(copied.place.above.label) if copied.place.above is not None else None
        if shape is None:
            self.flat.append(str(copied.place))
        return pieced(str(copied.place), (at,), copied.each[0][1].dtype, pieces, view=shape)

    def _known_shapes(
        self, shapes: Sequence[tuple[int, ...]], twins: Mapping[int, int]
    ) -> dict[object, tuple[int, ...]]:
        """The shapes of the parameters by the keys of an optimizer's state, where its runs are of as many elements.

        An optimizer of one group numbers the parameters in the model's order.
        """
        numels: dict[object, set[int]] = {}
        for copied in self._copied.values():
            if self._is_run(copied.place) and copied.place.above is not None and len(copied.each[0][1].shape) == 1:
                total = sum(entry.numel for rank, entry in copied.each if twins.get(rank, rank) == rank)
                numels.setdefault(copied.place.above.label, set()).add(total)
        known: dict[object, tuple[int, ...]] = dict(enumerate(shapes))
        fits = all(isinstance(key, int) and numels[key] == {math.prod(known.get(key, (-1,)))} for key in numels)
        return known if fits and self._has_one_group() else {}

    def _has_one_group(self) -> bool:
        """Whether the optimizer that has runs of flat parameters has one group of them."""
        nodes = [self._frame, *(value for _, value in mapping_items(self._frame) or ())]
        groups = [node.get("param_groups") for node in nodes if isinstance(node, InertDict) and "param_groups" in node]
        return len(groups) == 1 and isinstance(groups[0], list) and len(groups[0]) == 1


def _as_entry(node: object) -> object:
    """A separate storage as its bytes."""
    return tensor_of(node, 0, (node.nbytes,), (1,), "uint8", False, False) if isinstance(node, Storage) else node


def _own(place: Place, words: frozenset[str]) -> str | None:
    """The place of values that differ by rank, if this one is in it; ``None``: all ranks have the same."""
    step: Place | None = place
    found = None
    while step is not None:
        if isinstance(step.label, str) and "." not in step.label:  # else it is the name of a tensor
            said = set(re.split(r"[^a-z]+", step.label.lower()))
            if said & _SHARED:
                return None
            found = step if said & words else found
        step = step.above
    return None if found is None else str(found)


def _unwrap_versions(root: object) -> None:
    """Leave out FSDP's wrappers in the names of module versions, which names of tensors have no more."""
    for node in walk(root):
        state = attributes(node)
        versions = None if state is None else state.get("_metadata")
        if isinstance(versions, Object) and mapping_items(versions) is not None:
            names: dict[object, object] = {}
            for key, value in versions.pairs:
                names.setdefault(unwrapped_path(key) if isinstance(key, str) else key, value)
            versions.pairs[:] = list(names.items())
