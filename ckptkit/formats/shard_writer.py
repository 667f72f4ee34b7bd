"""Values that must be in one shard, and their largest size there; `ckptkit.formats.shard_writer` says why.

Sizes are bounds that are cheap to compute: the overhead of a name, a tensor or a record beside its data is counted at
its largest and summed, so no file needs to be planned to know that it fits.

Sharded output: how names are shared out among files, and the index over them.

The output is what `ckptkit.formats.sharded` reads and ``huggingface_hub`` writes (``serialization/_torch.py``
``save_torch_state_dict``, ``serialization/_base.py`` ``split_state_dict_into_shards_factory``): shards
``model-00001-of-00003.safetensors``, and beside them ``model.safetensors.index.json`` with the ``weight_map`` and the
``total_size`` of all tensors in bytes, tied ones once.  As there, nothing is sharded that fits into one file.

Names are taken in state_dict order; a shard is closed when the next tensor would make its *file* larger than wanted,
header, pickle and archive included.  Values that must be in one file go there with their first name:

- safetensors: tied tensors, which are stored once.  Views of one storage are written out apart.  The index
  lists the name that a tensor is stored under, and no other: loaders look for what it lists.
- torch: all that is over one storage or shares an object, because sharing ends with a file.

A file is larger than the limit only if such values alone are: it then contains no other tensor.  (The first file can
also be larger because of the values beside its tensors, below.)

The first shard has the versions of all modules, each other one those of its own modules; other attributes of the
mapping are only in the first torch shard.  The checkpoint's string metadata is in each shard and in the index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, Storage, TensorEntry, shared_storages
from ckptkit.errors import RewriteError
from ckptkit.formats.containers import index_over
from ckptkit.formats.format import Format
from ckptkit.formats.json_text import ORDER, VERSIONS, lone_surrogates, places, versions_text
from ckptkit.formats.safetensors import NAME
from ckptkit.formats.safetensors_writer import require_storable
from ckptkit.formats.shards import is_shard_name
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import is_plain_value
from ckptkit.pickling.inert import SCALARS, Global, InertDict, Object, children
from ckptkit.pickling.tensors import lower_storage, lower_tensor
from ckptkit.pickling.writer import write_pickle
from ckptkit.plan import IndexFile, LiteralBytes, Plan
from ckptkit.report import count_of

__all__ = ["SafetensorsUnits", "TorchUnits", "Unit", "index_name", "plan_shards"]

# Bounds in bytes, summed up from the formats' own layouts.
_TORCH_FILE = 4096
"""For a torch-zip: its small records, the end of its directory, and each name that a pickle spells out once."""
_TORCH_STORAGE = 240
"""Of a record beside its data: both headers with zip64 fields (168), and up to 63 bytes of padding."""
_TORCH_NAME = 256
"""For a parameter in the pickle (204) beside its name, its device tag and its dimensions, and for its module's version
(27): with memo indices of four bytes and numbers of eight."""
_TORCH_DIMENSION = 24
"""Of one size and one stride in a pickle."""
_SAFETENSORS_FILE = 64
"""Of a safetensors file beside its header's content: the length, and spaces up to a multiple of 8."""
_SAFETENSORS_NAME = 104
"""Of a tensor in a safetensors header beside its name and its sizes: braces, words, and two offsets."""
_SAFETENSORS_VERSION = 40
"""Of the version of a tensor's module beside its path."""
_MEMO_GROWTH = 3
"""How much larger nodes may be in a pickle of more: two bytes of memo index become five."""


class Unit(NamedTuple):
    """Names that must be in one file.

    Attributes:
        names: in state_dict order.
        nbytes: they make a file larger by at most so many bytes.
    """

    names: list[str]
    nbytes: int


class _Units:
    """Values to distribute among files.

    Attributes:
        units: in the order of their first names.
        first_nbytes, other_nbytes: of the first and of any other shard without tensors, at most.
    """

    units: list[Unit]
    first_nbytes: int
    other_nbytes: int

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._state_dict = checkpoint.state_dict

    def _versions(self, names: Iterable[str], *, first: bool) -> Mapping[str, object] | None:
        """The module versions that a file with these names holds."""
        versions = self._state_dict.versions
        if versions is None or first:
            return versions
        modules = dict.fromkeys(("", *map(_module, names)))
        return {key: versions[key] for key in modules if key in versions and _is_usual(versions[key])}

    def shared_out(self, most: int) -> list[list[str]]:
        """The names of each file, in state_dict order, so that none has over ``most`` bytes if that can be."""
        parts: list[list[str]] = []
        size = 0
        for unit in self.units:
            if not parts or size + unit.nbytes > most:
                size = self.other_nbytes if parts else self.first_nbytes
                parts.append([])
            parts[-1].extend(unit.names)
            size += unit.nbytes
        place = {name: place for place, name in enumerate(self._state_dict.everything)}
        for names in parts:
            names.sort(key=place.__getitem__)
        return parts


class SafetensorsUnits(_Units):
    """Tied tensors together; attributes as in `_Units`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        shared = shared_storages(self._state_dict.values())

        def ties(value: object) -> Iterable[Hashable]:
            tied = isinstance(value, TensorEntry) and id(value.storage) in shared and value.nbytes
            return (value.view,) if isinstance(value, TensorEntry) and tied else ()

        has_versions = versions_text(self._state_dict) is not None
        self._recorded = self._state_dict.versions if has_versions else None
        self.units = [self._unit(names) for names in _together(self._state_dict, ties)]
        self.first_nbytes, self.other_nbytes = (
            _SAFETENSORS_FILE + self._metadata_nbytes(checkpoint.metadata, first=first) for first in (True, False)
        )

    def _metadata_nbytes(self, metadata: Mapping[str, str], *, first: bool) -> int:
        versions = versions_text(self.part((), first=first)) or ""
        return _json_nbytes({"format": "pt", VERSIONS: versions, **metadata})

    def _unit(self, names: list[str]) -> Unit:
        lengths = [_json_nbytes(name) for name in names]
        entry = self._state_dict[names[0]]
        described = sum(lengths) + len(names) * (_SAFETENSORS_NAME + len(str(entry.shape)))
        described += (len(names) - 1) * max(lengths)  # each other name, with the one kept
        modules = [path for path in map(_module, names) if path in (self._recorded or ())]
        described += sum(_SAFETENSORS_VERSION + _json_nbytes(json.dumps(path)) for path in modules)  # JSON inside JSON
        return Unit(names, entry.nbytes + described)

    def part(self, names: Iterable[str], *, first: bool) -> StateDict:
        """As `TorchUnits.part`."""
        names = list(names)
        versions = None if self._recorded is None else self._versions(names, first=first)
        return StateDict({name: self._state_dict[name] for name in names}, versions=versions)


class TorchUnits(_Units):
    """Values over one storage, or that share objects, together; attributes as in `_Units`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        origin, whole = checkpoint.origin, self._state_dict
        self._protocol = None if origin.is_program else origin.pickle_protocol
        container = whole.container
        self._first_container = InertDict() if isinstance(container, (list, tuple)) else container
        self._other_container = self._first_container
        if isinstance(container, Object):  # other attributes than the versions may be large: once is enough
            self._other_container = Object(container.how, container.cls, container.args, container.kwargs)
        self.units = [self._unit(names) for names in _together(whole.everything, _Objects())]
        metadata = _TORCH_STORAGE + len(json.dumps(dict(checkpoint.metadata), ensure_ascii=True, indent=1))
        self.first_nbytes, self.other_nbytes = (
            _TORCH_FILE + metadata + self._nbytes(lower_state_dict(self.part((), first=first)))
            for first in (True, False)
        )

    def _unit(self, names: list[str]) -> Unit:
        nbytes = 0
        storages: dict[int, Storage] = {}
        odd: list[object] = []
        for name in names:
            value = self._state_dict.everything[name]
            nbytes += _TORCH_NAME + 2 * _utf8_nbytes(name)  # its module's path is a part of it
            if isinstance(value, TensorEntry) and is_plain_value(value):
                nbytes += _TORCH_DIMENSION * len(value.shape) + _utf8_nbytes(value.location)
                storages[id(value.storage)] = value.storage
            else:
                odd.append(value)
        return Unit(names, nbytes + self._nbytes(odd, storages))

    def _nbytes(self, node: object, storages: dict[int, Storage] | None = None) -> int:
        """Of a tree's pickle and of the storages that it names; they are added to those given."""
        found = {} if storages is None else storages

        def lower(leaf: object) -> object:
            if isinstance(leaf, TensorEntry):
                return lower_tensor(leaf)
            if isinstance(leaf, Storage):
                found[id(leaf)] = leaf
                return lower_storage(leaf, "0" * 8)
            return leaf

        pickled = _MEMO_GROWTH * len(write_pickle(node, lower=lower, protocol=self._protocol)) if node else 0
        return pickled + sum(storage.nbytes + _TORCH_STORAGE for storage in found.values())

    def part(self, names: Iterable[str], *, first: bool) -> StateDict:
        """The state_dict of a file that holds these names, with the versions of their modules.

        The first file has all versions, so that those who read all files find them in their order.
        """
        names = list(names)
        return StateDict(
            {name: self._state_dict.everything[name] for name in names},
            versions=self._versions(names, first=first),
            container=self._first_container if first else self._other_container,
        )


def _json_nbytes(node: object) -> int:
    return len(json.dumps(node, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _utf8_nbytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _module(name: str) -> str:
    """The path of the module whose tensor it is."""
    return name.rpartition(".")[0]


def _is_usual(version: object) -> bool:
    """Whether it is what modules record of themselves, ``{"version": 2}``, and so of known size."""
    pairs = version.pairs if isinstance(version, InertDict) else []
    return len(pairs) == 1 and pairs[0][0] == "version" and isinstance(pairs[0][1], int) and pairs[0][1] < 1 << 31


# Groups.


def _together(values: Mapping[str, object], ties: Callable[[object], Iterable[Hashable]]) -> list[list[str]]:
    """The names, together where their values have a tie in common, directly or through others."""
    above = list(range(len(values)))  # a forest: each number leads to a smaller one of its group
    first: dict[Hashable, int] = {}

    def root(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    for number, value in enumerate(values.values()):
        for tie in ties(value):
            one, other = root(first.setdefault(tie, number)), root(number)
            above[max(one, other)] = min(one, other)
    groups: dict[int, list[str]] = {}
    for number, name in enumerate(values):
        groups.setdefault(root(number), []).append(name)
    return list(groups.values())


class _Objects:
    """The identities of the storages and objects below a value; below one that was met before none again."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, value: object) -> Iterable[Hashable]:
        if isinstance(value, TensorEntry) and is_plain_value(value):
            return (id(value.storage),)
        found: list[int] = []
        stack = [value]
        while stack:
            node = stack.pop()
            if node == () or isinstance(node, (*SCALARS, Global)):
                continue
            found.append(id(node))
            if isinstance(node, TensorEntry):
                found.append(id(node.storage))
            if id(node) not in self._seen:
                self._seen.add(id(node))
                stack.extend(children(node))
        return found


def index_name(name: str) -> str:
    """The customary name of the index of a checkpoint that would be ``name`` if it were one file."""
    return name + ".index.json"


def plan_shards(checkpoint: Checkpoint, container: Format, name: str, most: int) -> Plan:
    """The plan of files of at most ``most`` bytes.

    Args:
        checkpoint: what to write.
        container: of the shards; its ``write`` plans one file.
        name: of the checkpoint as one file; shards are named after it.
        most: bytes of a file; more only where what must stay together has more.

    Returns:
        The container's own plan where one file is enough; else that of an index, which belongs
        under `index_name`, with those of the shards.

    Raises:
        RewriteError: there is training state that no shard can hold, no tensors, more shards than `Limits.shards`, or a
            name that no index can hold; or as the container's ``write``.
        LimitError, UnsupportedError: as the container's ``write``.
    """
    stem, ending = _stem_and_ending(name, container)
    whole = container.write(checkpoint)
    if whole.nbytes <= most:
        return whole
    require_storable(checkpoint, "a sharded checkpoint", plain=False)
    index = index_over(container)
    if index is None:
        raise RewriteError(f"there is no index format for several {container.name} files; write one file")
    units = SafetensorsUnits(checkpoint) if container.tensors_alone else TorchUnits(checkpoint)
    parts = units.shared_out(most)
    if len(parts) < 2:
        return whole
    if len(parts) > DEFAULT_LIMITS.shards:
        enough = most
        while len(units.shared_out(enough)) > DEFAULT_LIMITS.shards:
            enough *= 2
        raise RewriteError(
            f"files of at most {most:,} bytes would be {count_of(len(parts), 'shard')}, but readers accept at most "
            f"{DEFAULT_LIMITS.shards:,}; {enough:,} bytes per file are enough"
        )
    del whole
    shards: dict[str, Plan] = {}
    holder: dict[str, str] = {}
    for number, names in enumerate(parts):
        shard = f"{stem}-{number + 1:05d}-of-{len(parts):05d}{ending}"
        part = checkpoint.replace(state_dict=units.part(names, first=number == 0), rest=STATE_DICT)
        shards[shard] = container.write(part)
        holder.update(dict.fromkeys(names, shard))
    return _index_plan(checkpoint, index, shards, {key: holder[key] for key in checkpoint.state_dict.everything})


def _index_plan(
    checkpoint: Checkpoint, container: Format, shards: Mapping[str, Plan], weight_map: Mapping[str, str]
) -> Plan:
    total = sum({entry.view: entry.nbytes for entry in checkpoint.state_dict.values()}.values())
    metadata: dict[str, object] = {**checkpoint.metadata, "total_size": total}
    metadata.pop("format", None)  # that is the shards'
    aliases = {alias: kept for plan in shards.values() for alias, kept in plan.aliases.items()}
    stored = {name: shard for name, shard in weight_map.items() if name not in aliases}
    found = [alias for shard in dict.fromkeys(stored.values()) for alias in shards[shard].aliases]
    if ORDER not in metadata and (order := places(weight_map, found)) is not None:
        metadata[ORDER] = order
    index = IndexFile(weight_map=stored, metadata=metadata)
    data = index.to_bytes()
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        raise RewriteError(
            "a name that is not valid Unicode cannot be stored in an index of shards", names=lone_surrogates(weight_map)
        ) from None
    if len(data) > DEFAULT_LIMITS.index_nbytes:
        raise RewriteError(
            f"the index of {count_of(len(weight_map), 'name')} would have {len(data):,} bytes, but readers accept "
            f"at most {DEFAULT_LIMITS.index_nbytes:,}; write one file"
        )
    return Plan(
        format=container.name,
        nbytes=len(data),
        steps=(LiteralBytes(0, data),),
        tensors=sum(plan.tensors for plan in shards.values()),
        aliases=aliases,
        shards=shards,
        index=index,
    )


def _stem_and_ending(name: str, container: Format) -> tuple[str, str]:
    """The parts of a shard's name before and after its number.

    Raises:
        RewriteError: readers of the index would not take files of that name, or for those of another container.
    """
    stem, ending = os.path.splitext(name)
    if not is_shard_name(name):
        raise RewriteError(
            f"{name!r}: an index cannot contain such shard names; choose a destination without backslash or colon"
        )
    if (ending.lower() == ".safetensors") != (container.name == NAME):
        endings = ", ".join(container.suffixes)
        raise RewriteError(
            f"{name}: only that extension makes shards safetensors; for {container.name} files it must be one "
            f"of {endings}",
            path=name,
        )
    return stem, ending.lower()
