"""The readers of DeepSpeed's folders share this: the files, and the state_dicts made from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from ckptkit.checkpoint import Replica, TensorEntry
from ckptkit.errors import CorruptError
from ckptkit.formats.distributed.folder import read_part
from ckptkit.formats.distributed.zero import Flats, Shapes, Slot, named, require_alike
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import state_dict_node
from ckptkit.formats.shards import Shard, merged_findings, merged_globals
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import RawCheckpoint
from ckptkit.normalize.selection import MASTERS
from ckptkit.pickling.inert import InertDict, Object, attributes, mapping_items
from ckptkit.pickling.tensors import shape_of
from ckptkit.report import Finding, count_of, listed, share_of

__all__ = [
    "File",
    "Models",
    "Parts",
    "Weights",
    "by_rank",
    "frozen_weights",
    "models_of",
    "plain",
    "require_ranks",
    "shapes_of",
    "unproven",
]

_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,7})_)?mp_rank_(\d{1,7})_model_states\.pt", re.ASCII)

_ALIKE = ("global_steps", "global_samples", "skipped_steps", "ds_version", "dp_world_size", "mp_world_size")
"""What all model files of a step say alike."""

_OF_THE_LAYOUT = frozenset({
    "module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "dp_world_size",
    "mp_world_size", "checkpoint_parallel_dimensions",
})  # fmt: skip
"""Keys of a model file that say how the state was spread over ranks, or whose values are combined again."""

_OF_THE_BUFFERS = frozenset({
    "single_partition_of_fp32_groups", "base_optimizer_state", "fp32_flat_groups", "optimizer_state_dict",
    "zero_stage", "partition_count", "group_paddings", "param_alignment_paddings", "param_slice_mappings",
    "param_groups",
})  # fmt: skip
"""Keys of an optimizer file likewise."""

_STATISTICS = frozenset({"running_mean", "running_var"})
"""Buffers that batch normalization keeps by rank: DeepSpeed does not make them alike."""

_MOST_ELEMENTS = 1 << 62
"""More than any tensor has, as torch counts them."""

_LISTED = 5
"""Files that a message lists."""


class File:
    """One file of the folder.

    Attributes:
        name: of it.
        root: its tree.
        own: the values of its dict by their keys; empty if it is not one.
    """

    __slots__ = ("name", "own", "root")

    def __init__(self, name: str, root: object) -> None:
        self.name = name
        self.root = root
        self.own = named(root)


class Parts:
    """The files of a folder that were read, and what is known from all of them together.

    Args:
        probe: of the folder.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._shards: dict[str, Shard] = {}

    def read(self, name: str) -> File:
        """A file with its tree."""
        raw = read_part(self._probe, name)
        self._shards[name] = Shard(name, raw, {})
        return File(name, raw.root)

    def raw(self, root: object, writer: str, findings: Iterable[Finding], replicas: Iterable[Replica]) -> RawCheckpoint:
        """The result of the folder's reader."""
        raws = [shard.raw for shard in self._shards.values()]
        return RawCheckpoint(
            root=root,
            format="deepspeed",
            byteorder="big" if {raw.byteorder for raw in raws} == {"big"} else "little",
            pickle_protocol=max((each for raw in raws if (each := raw.pickle_protocol) is not None), default=None),
            writer=writer,
            globals=merged_globals(self._shards),
            discarded=tuple(value for raw in raws for value in raw.discarded),
            findings=(*merged_findings(self._shards), *findings),
            is_prefixed=True,
            replicas=tuple(replicas),
        )


class Models:
    """The ``model_states`` files.

    Args:
        files: by model-parallel and data-parallel rank.

    Attributes:
        files: as above.
        first: the one of the first ranks.
    """

    def __init__(self, files: dict[int, dict[int, File]]) -> None:
        self.files = files
        self.first = next(iter(next(iter(files.values())).values()))

    @property
    def writer(self) -> str:
        """The version that wrote them."""
        version = self.first.own.get("ds_version")
        return f"DeepSpeed {version:.40}" if isinstance(version, str) else "DeepSpeed"

    def tree(self, weights: Weights, optimizer: object) -> InertDict:
        """The tree that one process would have saved: the state_dicts, the optimizer, and all else in the first."""
        others = [pair for pair in mapping_items(self.first.root) or () if pair[0] not in _OF_THE_LAYOUT]
        return InertDict([*weights.sections(self.first.own.get("module")), ("optimizer", optimizer), *others])


def models_of(parts: Parts, names: Sequence[str]) -> Models:
    """The ``model_states`` files of a folder, read.

    Raises:
        CorruptError: they are missing, or from different runs or steps.
    """
    files = by_rank(parts, names, _MODEL)
    if not files:
        raise CorruptError("there is no mp_rank_00_model_states.pt: the save did not finish, or files are missing")
    models = Models(files)
    owns = {file.name: file.own for ranks in files.values() for file in ranks.values()}
    for key in _ALIKE:
        require_alike(key, {name: own.get(key) for name, own in owns.items()})
    stages = models.first.own.get("mp_world_size")
    if isinstance(stages, int):
        require_ranks({stage: next(iter(ranks.values())) for stage, ranks in files.items()}, stages, "mp_rank_XX files")
    return models


def by_rank(parts: Parts, names: Sequence[str], pattern: re.Pattern[str]) -> dict[int, dict[int, File]]:
    """The files of a pattern by model-parallel and data-parallel rank, read.

    Raises:
        CorruptError: one is not a dict, or two are of one rank.
    """
    found: dict[int, dict[int, str]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        ranks, rank = found.setdefault(int(match[2]), {}), int(match[1] or 0)
        if rank in ranks:
            raise CorruptError(f"{ranks[rank]} and {name} are from one rank: files of different runs")
        ranks[rank] = name
    files = {model: {rank: parts.read(ranks[rank]) for rank in sorted(ranks)} for model, ranks in sorted(found.items())}
    for read in files.values():
        for file in read.values():
            if mapping_items(file.root) is None:
                raise CorruptError("it is not a dict, although DeepSpeed's files are", where=file.name)
    return files


def require_ranks(files: Mapping[int, object], count: int, what: str) -> None:
    """See that each rank has its file.

    Args:
        files: by rank.
        count: of the ranks.
        what: their kind, for messages.

    Raises:
        CorruptError: one has none, or there are more.
    """
    missing = [f"rank {rank}" for rank in range(min(count, len(files) + _LISTED)) if rank not in files]
    if missing:
        lacking = count - sum(rank < count for rank in files)
        raise CorruptError(
            f"{share_of(lacking, count, 'rank', 'has', 'have')} no file among the {what}: "
            f"{listed(missing, _LISTED, total=lacking)}; get all files into the folder"
        )
    if len(files) > count:
        extra = max(files)
        raise CorruptError(
            f"{count_of(count, 'rank')} wrote the {what}, but there is one from rank {extra}: files of different runs"
        )


def shapes_of(file: File, key: str = "param_shapes") -> list[Shapes]:
    """Names and shapes by group, in flat order; nothing where the file has none.

    Raises:
        CorruptError: its values are not names and shapes.
    """
    node = file.own.get(key)
    groups: list[Shapes] = []
    for group in node if isinstance(node, (list, tuple)) else [] if node is None else [node]:
        pairs = mapping_items(group)
        shapes = [
            (name, shape) for name, size in pairs or () if isinstance(name, str) and (shape := _shape(size)) is not None
        ]
        if pairs is None or len(shapes) != len(pairs):
            raise CorruptError(f"its {key} do not map names to shapes", where=file.name)
        groups.append(shapes)
    return groups


def _shape(node: object) -> tuple[int, ...] | None:
    """A shape that a tensor can have; ``None``: it is not one."""
    shape = shape_of(node)
    if shape is None or min(shape, default=0) < 0 or len(shape) > DEFAULT_LIMITS.dimensions:
        return None
    return shape if math.prod(shape) < _MOST_ELEMENTS else None


def frozen_weights(models: Mapping[int, File]) -> dict[str, TensorEntry]:
    """The weights that no optimizer has, combined from the ranks' shares if there are several.

    Raises:
        CorruptError: a rank's share is missing or of another size.
    """
    shapes = shapes_of(next(iter(models.values())), "frozen_param_shapes")
    fragments = [named(file.own.get("frozen_param_fragments")) for file in models.values()]
    found: dict[str, TensorEntry] = {}
    for name, shape in (pair for group in shapes for pair in group):
        values = [fragment.get(name) for fragment in fragments]
        entries = [value for value in values if isinstance(value, TensorEntry)]
        if len(entries) < len(values):
            raise CorruptError(f"not every rank's file has its share of the frozen weight {name}")
        if len(entries) == 1 and entries[0].shape == shape:
            found[name] = entries[0]
            continue
        slot = Slot(name, shape, 0, 0)
        flats = Flats(f"the frozen weight {name}", [entries], [[file.name for file in models.values()]], True)
        found[name] = flats.require({0: slot.share(len(entries))}).tensor(slot, key=f"frozen:{name}")
    return found


def plain(own: Mapping[str, object]) -> list[tuple[object, object]]:
    """What an optimizer file has beside its buffers, with DeepSpeed's objects replaced by their attributes."""
    found: list[tuple[object, object]] = []
    for key, value in own.items():
        if key not in _OF_THE_BUFFERS:
            state = attributes(value)
            is_own = isinstance(value, Object) and value.class_name.startswith("deepspeed.") and state is not None
            found.append((key, InertDict(list(state.pairs)) if is_own and state is not None else value))
    return found


def unproven(weights: Weights) -> list[Finding]:
    """The finding about values that cannot be checked against a copy."""
    names = weights.unproven
    found = []
    if weights.own:
        own = listed(weights.own, _LISTED)
        message = f"each rank has its own {own}; the values of rank 0 are used"
        found.append(Finding(code="rank-values", severity="info", message=message))
    if not names:
        return found
    return [
        *found,
        Finding(
            code="unproven-weights",
            severity="info",
            message=f"the files have no second copy of {count_of(len(names), 'weight')} (as of stage 3): their "
            "values cannot prove that the ranks' files belong together",
        ),
    ]


class Weights:
    """The two state_dicts made from a module's values and from the masters.

    Args:
        masters: the weights that were combined, by name.
        holders: by name, the files that contain them, for messages.
        shared: another name of a tied parameter -> the one that has the values.

    Attributes:
        masters: as above.
        replicas: values that must be equal: each master converted and the module's weight, each buffer in several
            files.
        proven: the masters that have another copy.
        own: the names of buffers that differ by rank.
    """

    def __init__(self, masters: Mapping[str, TensorEntry], holders: Mapping[str, str], shared: object = None) -> None:
        self.masters = masters
        self.replicas: list[Replica] = []
        self.proven: set[str] = set()
        self.own: dict[str, None] = {}
        self._holders = holders
        self._shared = named(shared)
        self._module: dict[str, object] = {}
        self._full: dict[str, object] = {}
        self._where: dict[str, str] = {}
        self._views: dict[object, str | None] = {}

    @property
    def unproven(self) -> list[str]:
        """The masters that have no other copy."""
        return [name for name in self.masters if name not in self.proven]

    def add(self, module: Mapping[str, object], where: str, *, buffers: object = None, stubs: bool = False) -> None:
        """Take in a module's state_dict, or that of another rank or layer.

        Args:
            module: it.
            where: the file it is from.
            buffers: the names of its values that are not weights.
            stubs: whether its weights may be empty, since the values are elsewhere (stage 3).

        Raises:
            CorruptError: a weight is not of the shape that ``param_shapes`` says, or has no values anywhere.
        """
        known = buffers if isinstance(buffers, list) else []
        for name, value in module.items():
            if isinstance(value, TensorEntry) and (value.nbytes or stubs) and name in self.masters:
                # One empty tensor for several masters ties none of them.
                self._views[value.view] = name if value.nbytes or value.view not in self._views else None
        for name, value in module.items():
            own = self._master_of(name, value)
            if own is not None:
                self._add_weight(name, own, value, where, stubs=stubs)
            elif stubs and isinstance(value, TensorEntry) and not value.numel and name not in known:
                raise CorruptError(
                    f"the weight {name} is an empty stub, and no file says where its values are", where=where
                )
            elif name not in self._full:
                self._full[name] = self._module[name] = value
            else:
                first = self._full[name]
                if name.rpartition(".")[2] in _STATISTICS:
                    self.own[name] = None
                elif isinstance(first, TensorEntry) and isinstance(value, TensorEntry):
                    self.replicas.append(Replica(name, first, value, f"{self._where[name]} and {where}"))
            self._where.setdefault(name, where)

    def _master_of(self, name: str, value: object) -> str | None:
        """The name of the master that a weight of the module is converted from."""
        target = self._shared.get(name, name)
        if isinstance(target, str) and target in self.masters:
            return target
        return self._views.get(value.view) if isinstance(value, TensorEntry) else None  # tied

    def _add_weight(self, name: str, own: str, value: object, where: str, *, stubs: bool) -> None:
        master = self.masters[own]
        saved: object = None
        if isinstance(value, TensorEntry) and value.shape == master.shape and value is not master:
            self.replicas.append(Replica(name, master, value, f"{self._holders.get(own, own)} and {where}"))
            self.proven.add(own)
            saved = value
        elif value is master:
            saved = value
        elif not isinstance(value, TensorEntry) or value.numel or not stubs:
            shape = f"of shape {[*value.shape]}" if isinstance(value, TensorEntry) else "not a tensor"
            raise CorruptError(f"{name} is {shape}, but param_shapes says {[*master.shape]}", where=where)
        elif value.dtype == master.dtype:
            saved = master
        self._module.setdefault(name, saved)
        is_same = isinstance(saved, TensorEntry) and saved.dtype == master.dtype
        self._full.setdefault(name, saved if is_same else master)

    def sections(self, module: object) -> list[tuple[object, object]]:
        """The state_dicts by their keys in the tree: the saved one, unless it is the other or lacks values.

        Args:
            module: the module's state_dict as it was saved, which may have module versions.
        """
        state = attributes(module)
        versions = named(state.get("_metadata")) if state is not None else None
        others = {name: master for name, master in self.masters.items() if name not in self._full}
        full, saved = self._full | others, self._module | others
        if self._module and all(saved[name] is value for name, value in full.items()):
            return [("module", state_dict_node(full, versions))]
        found: list[tuple[object, object]] = [(MASTERS, state_dict_node(full, versions))]
        if self._module and all(value is not None for value in saved.values()):
            found.insert(0, ("module", state_dict_node(saved, versions)))
        return found
