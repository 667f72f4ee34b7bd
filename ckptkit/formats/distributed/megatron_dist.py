"""Megatron's ``torch_dist``: a torch.distributed.checkpoint folder whose names say more.

Layout (``megatron/core/dist_checkpointing``), of a folder as `ckptkit.formats.distributed.dcp` describes it:

- ``metadata.json``: ``{"sharded_backend": "torch_dist", "sharded_backend_version": 1, ...}``
- ``common.pt``: what all ranks have alike, args and iteration among it; newer: an object ``common_state/shard_0_1``
- tensors by their names in the whole model, whatever rank had them.  The layers of a homogeneous stack are one tensor
  ``decoder.layers.<tail>`` with a leading dimension, and so are experts, ``mlp.experts.experts.<tail>``; here each is
  ``decoder.layers.<number>.<tail>``, ``mlp.experts.local_experts.<number>.<tail>`` (of grouped ones
  ``mlp.experts.linear_fc1.weight<number>``), as their modules name them
- ``optimizer.state.<moment>.<name>``: here ``optimizer.state.<name>.<moment>``, as torch has it.  A distributed
  optimizer stores each rank's slice flat, in runs: of a weight of [8, 6] that two ranks share out along the first
  dimension the moment is [2, 1, 24]
- objects ``<key>/shard_<place>_<shape>``, as ``rng_state/shard_0.1_1.2``: a list of one each.  They make up an array of
  objects: of one its object, else lists inside lists
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ckptkit.checkpoint import TensorEntry
from ckptkit.computed import files_of
from ckptkit.errors import CorruptError, LimitError, UnsupportedError
from ckptkit.formats.distributed.dcp import Opened, open_folder
from ckptkit.formats.distributed.dcp_record import TensorMetadata
from ckptkit.formats.distributed.folder import FolderSource, folder_of, read_part
from ckptkit.formats.distributed.slices import args_of, as_of_one, mesh_of, stated
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import parse, shown
from ckptkit.formats.shards import Shard, merged_findings, merged_globals
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict, mapping_items
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding, count_of, listed
from ckptkit.transfer.pieces import Piece, pieced

__all__ = ["read"]

_BACKENDS = ("torch_dist", "fsdp_dtensor")

_STACKED = re.compile(r"((?:.*?\.)?layers)\.(?!\d+(?:\.|$))([^.]+\..+)", re.DOTALL)
_EXPERTS = re.compile(r"(.*\.?experts)\.experts\.(linear_fc[12])\.(.+)", re.DOTALL)
_OBJECT = re.compile(r"(.+)/shard_(\d{1,9}(?:\.\d{1,9})*)_(\d{1,9}(?:\.\d{1,9})*)", re.DOTALL)
_MOMENT = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)", re.DOTALL)
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")

_COMMON = "common_state"

_LISTED = 5
"""Names that a message lists."""


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the facts of a folder.

    Raises:
        FormatError: something is missing, damaged or refused.
    """
    folder = folder_of(probe)
    _require_backend(probe, folder)
    opened = open_folder(probe)
    objects = _arrays(opened.objects)
    shards: dict[str, Shard] = {}
    common: object = None
    if "common.pt" in folder.names:
        raw = read_part(probe, "common.pt")
        shards, common = {"common.pt": Shard("common.pt", raw, {})}, raw.root
    elif _COMMON in objects:
        common = objects.pop(_COMMON)[()]
    args = args_of(common)
    tree = _Tree(folder, opened, common, probe.limits.entries)
    root = tree.root(objects)
    return RawCheckpoint(
        root=root,
        format="megatron",
        format_version=opened.metadata.version,
        pickle_protocol=opened.metadata.protocol,
        globals=merge_uses(opened.globals, merged_globals(shards)),
        discarded=(*opened.discarded, *(part for shard in shards.values() for part in shard.raw.discarded)),
        findings=(*opened.findings, *merged_findings(shards), *tree.findings()),
        unread=opened.items if opened.unread else None,
        world_size=size if type(size := args.get("world_size")) is int and size > 0 else None,
        mesh=mesh_of(args),
    )


def _require_backend(probe: Probe, folder: FolderSource) -> None:
    """See that it is a torch.distributed.checkpoint folder.

    Raises:
        UnsupportedError: it was written otherwise: as zarr, which Megatron dropped.
    """
    if "metadata.json" not in folder.names:
        return
    file = folder.part("metadata.json")
    if file.size > probe.limits.record_nbytes:
        raise LimitError("bytes of metadata.json", limit=probe.limits.record_nbytes, actual=file.size)
    document = parse(file.read(0, file.size), probe.limits, "metadata.json")
    file.release()
    backend = document.get("sharded_backend") if isinstance(document, dict) else None
    if backend not in _BACKENDS:
        raise UnsupportedError(
            f"metadata.json names the backend {shown(backend)}; {' and '.join(_BACKENDS)} are supported",
            where="metadata.json",
        )


def _arrays(objects: Mapping[str, object]) -> dict[str, dict[tuple[int, ...], object]]:
    """Objects by key and by their place in an array; one that is in none has the place ``()``.

    Raises:
        CorruptError: places are missing, or given twice.
    """
    found: dict[str, dict[tuple[int, ...], object]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in objects.items():
        match = _OBJECT.fullmatch(name)
        key = name if match is None else match[1]
        place, shape = (tuple(map(int, match[group].split("."))) if match else () for group in (2, 3))
        content = value[0] if match is not None and isinstance(value, list) and len(value) == 1 else value
        is_inside = len(place) == len(shape) and all(at < size for at, size in zip(place, shape, strict=True))
        if shapes.setdefault(key, shape) != shape or not is_inside:
            raise CorruptError(f"the object {shown(name)} does not belong to the array of the others")
        if place in found.setdefault(key, {}):
            raise CorruptError(f"the object {shown(name)} appears twice")
        found[key][place] = content
    for key, values in found.items():
        if len(values) < math.prod(shapes[key]):
            missing = math.prod(shapes[key]) - len(values)
            raise CorruptError(f"{count_of(missing, 'object', 'is', 'are')} missing of {shown(key)}, of {shapes[key]}")
        if set(shapes[key]) <= {1}:
            found[key] = {(): next(iter(values.values()))}
    return found


def _listed(values: Mapping[tuple[int, ...], object]) -> object:
    """Lists inside lists of an array's objects; of one that has no places the object."""
    if () in values:
        return values[()]
    rows: dict[int, dict[tuple[int, ...], object]] = {}
    for place in sorted(values):
        rows.setdefault(place[0], {})[place[1:]] = values[place]
    return [_listed(row) for row in rows.values()]


class _Tree:
    """The tree that one process would have saved.

    Args:
        folder: the folder.
        opened: what its ``.metadata`` says.
        common: what all ranks have alike.
        most: tensors that there may be.
    """

    def __init__(self, folder: FolderSource, opened: Opened, common: object, most: int) -> None:
        self._folder = folder
        self._opened = opened
        self._common = common
        self._most = most
        self._is_grouped = args_of(common).get("moe_grouped_gemm") is True
        self._flat: list[str] = []
        self._empty: list[Finding] = []

    def root(self, objects: dict[str, dict[tuple[int, ...], object]]) -> InertDict:
        """The tree: what all have alike, the model, the optimizer's state, what else there is."""
        model: dict[str, object] = {}
        moments: dict[str, dict[str, object]] = {}
        optimizer: dict[str, object] = {}
        count = 0
        for name, tensor in self._opened.metadata.tensors.items():
            moment = _MOMENT.fullmatch(name)
            for own, entry in self._each(moment[2] if moment else name, tensor):
                count += 1
                if count > self._most:
                    raise LimitError("tensors in one checkpoint", limit=self._most, actual=count)
                if moment is not None:
                    _put(moments.setdefault(own, {}), moment[1], entry)
                elif _OPTIMIZER.match(own):
                    self._flat.append(own)
                    _put(optimizer, own.partition("optimizer.")[2], entry)
                else:
                    _put(model, own, entry)
        tops = {name.partition(".")[0] for name in model}
        others: dict[str, object] = {}
        for key, values in objects.items():
            if "." in key and (key.partition(".")[0] in tops or not tops):
                for own, value in self._objects(key, values):
                    _put(model, own, value)
            else:
                others[key] = _listed(values)
        if model and all(name.startswith("model.") for name in model):
            model = {name.removeprefix("model."): value for name, value in model.items()}
        model, self._empty = stated(model)
        return self._joined(model, moments, optimizer, others)

    def _joined(
        self,
        model: dict[str, object],
        moments: dict[str, dict[str, object]],
        optimizer: dict[str, object],
        others: dict[str, object],
    ) -> InertDict:
        pairs: dict[object, object] = dict(as_of_one(mapping_items(self._common) or ()))
        if model:
            pairs["model"] = InertDict(list(model.items()))
        if moments or optimizer:
            known = mapping_items(pairs.get("optimizer")) or []
            inner = dict(known) if all(isinstance(key, str) for key, _ in known) else {"common": pairs.get("optimizer")}
            groups = mapping_items(inner.get("optimizer")) or []
            inner.update((key, value) for key, value in groups if key == "param_groups" and "param_groups" not in inner)
            state: list[tuple[object, object]]
            state = [(name, InertDict(list(values.items()))) for name, values in moments.items()]
            inner.setdefault("param_groups", [])
            pairs["optimizer"] = InertDict([("state", InertDict(state)), *optimizer.items(), *inner.items()])
        for key, value in others.items():
            pairs.setdefault(key, value)
        return InertDict(list(pairs.items()))

    def _each(self, name: str, tensor: TensorMetadata) -> Iterator[tuple[str, TensorEntry]]:
        """A tensor, or each of those that are stacked in it, by name."""
        depth, named = self._name(name)
        grid = self._grid(name, tensor)
        shape, boxes = self._reshaped(tensor, grid) if grid else (tensor.shape, self._boxes(tensor))
        depth = depth if len(shape) >= depth else 0
        if not depth and not grid:
            yield name, self._opened.tensors[tensor.name]
            return
        places = math.prod(shape[:depth])
        if places > self._most:
            raise LimitError("layers of a tensor", limit=self._most, actual=places)
        pieces: dict[tuple[int, ...], list[Piece]] = {}
        for box in boxes:
            for own in itertools.product(*map(range, box.sizes[:depth])):
                place = tuple(a + b for a, b in zip(box.offsets, own, strict=False))
                later = partial(_part, tensor.name, box, own)
                local = later() if isinstance(box.local, TensorEntry) else later
                pieces.setdefault(place, []).append(Piece(box.offsets[depth:], box.sizes[depth:], local, box.where))
        for place in itertools.product(*map(range, shape[:depth])):
            own_name, found = named(place) if depth else name, pieces.get(place, ())
            yield own_name, self._pieced(own_name, shape[depth:], tensor, found)

    def _pieced(
        self,
        name: str,
        shape: tuple[int, ...],
        tensor: TensorMetadata,
        pieces: Sequence[Piece],
        view: tuple[int, ...] | None = None,
    ) -> TensorEntry:
        known = [piece.local for piece in pieces if isinstance(piece.local, TensorEntry)]
        files = {id(file): file for entry in known for file in files_of(entry.storage.source)}
        for path in {piece.where for piece in pieces if not isinstance(piece.local, TensorEntry)} - {""}:
            file = self._folder.part(path)
            files[id(file)] = file
        return pieced(
            name, shape, tensor.dtype, pieces, view=view, files=[*files.values()], requires_grad=tensor.requires_grad
        )

    def _boxes(self, tensor: TensorMetadata) -> list[Piece]:
        """The chunks of a tensor, not read yet."""
        paths, read = self._opened.metadata.items.paths, self._opened.items.tensor
        return [
            Piece(offsets, sizes, partial(read, row, tensor.name), paths[row] if row >= 0 else "")
            for offsets, sizes, row in zip(tensor.offsets, tensor.sizes, tensor.rows, strict=True)
        ]

    def _grid(self, name: str, tensor: TensorMetadata) -> tuple[int, ...]:
        """Into how many slices along each dimension a moment is cut whose slices are stored flat; none: it is not."""
        whole = self._opened.metadata.tensors.get(name)
        grid = tensor.shape[:-1]
        if whole is None or whole is tensor or len(grid) != len(whole.shape) or 0 in grid or not grid:
            return ()
        own = [size // count for size, count in zip(whole.shape, grid, strict=True)]
        is_flat = math.prod(own) == tensor.shape[-1] and all(
            size == count * each for size, count, each in zip(whole.shape, grid, own, strict=True)
        )
        return grid if is_flat else ()

    def _reshaped(self, tensor: TensorMetadata, grid: tuple[int, ...]) -> tuple[tuple[int, ...], list[Piece]]:
        """The shape, and the slices, of what is stored as a grid of flat slices, each in runs."""
        whole = self._opened.metadata.tensors[_whole_name(tensor.name)].shape
        sizes = tuple(size // count for size, count in zip(whole, grid, strict=True))
        if math.prod(grid) > self._most:
            raise LimitError("slices of a tensor", limit=self._most, actual=math.prod(grid))
        runs: dict[tuple[int, ...], list[Piece]] = {}
        for box in self._boxes(tensor):
            for own in itertools.product(*map(range, box.sizes[:-1])):
                cell = tuple(a + b for a, b in zip(box.offsets, own, strict=False))
                local = partial(_part, tensor.name, box, own)
                runs.setdefault(cell, []).append(Piece(box.offsets[-1:], box.sizes[-1:], local, box.where))
        slices = []
        for cell in itertools.product(*map(range, grid)):
            found = runs.get(cell, [])
            entry = self._pieced(tensor.name, tensor.shape[-1:], tensor, found, sizes)
            where = found[0].where if found else ""
            slices.append(Piece(tuple(a * b for a, b in zip(cell, sizes, strict=True)), sizes, entry, where))
        return whole, slices

    def _name(self, name: str) -> tuple[int, Callable[[Sequence[int]], str]]:
        """How many leading dimensions of a tensor are numbers in its name, and the name of each."""
        stack = _STACKED.fullmatch(name)
        tail = name if stack is None else stack[2]
        experts = _EXPERTS.fullmatch(tail)
        depth = (stack is not None) + (experts is not None)

        def named(place: Sequence[int]) -> str:
            rest = tail
            if experts is not None:
                number, is_weight = place[depth - 1], experts[3] in ("weight", "bias")
                rest = f"{experts[1]}.local_experts.{number}.{experts[2]}.{experts[3]}"
                if self._is_grouped and is_weight:
                    rest = f"{experts[1]}.{experts[2]}.{experts[3]}{number}"
            return rest if stack is None else f"{stack[1]}.{place[0]}.{rest}"

        return depth, named

    def _objects(self, key: str, values: Mapping[tuple[int, ...], object]) -> Iterator[tuple[str, object]]:
        """Objects of a model's layers by name."""
        depth, named = self._name(key)
        if depth and all(len(place) >= depth for place in values):
            groups: dict[tuple[int, ...], dict[tuple[int, ...], object]] = {}
            for place in sorted(values):
                groups.setdefault(place[:depth], {})[place[depth:]] = values[place]
            for place, group in groups.items():
                yield named(place), _listed({(): group[min(group)]} if len(group) == 1 else group)
        else:
            yield key, _listed(values)

    def findings(self) -> Iterator[Finding]:
        """The findings about it."""
        yield from self._empty
        if self._flat:
            yield Finding(
                code="not-merged",
                severity="warning",
                message=f"{count_of(len(self._flat), 'tensor')} of the optimizer's state are kept as they are, not by "
                f"parameter: {listed(self._flat, _LISTED)}",
            )


def _part(name: str, box: Piece, place: tuple[int, ...]) -> TensorEntry:
    """The content at a place of the leading dimensions of a chunk.

    Raises:
        CorruptError: the chunk does not have the declared sizes.
    """
    entry = box.local if isinstance(box.local, TensorEntry) else box.local()
    if entry.shape != box.sizes:
        raise CorruptError(f"tensor {name!r:.200}: a chunk is {[*entry.shape]}, not {[*box.sizes]}")
    return entry[place] if place else entry


def _whole_name(name: str) -> str:
    """The name of the parameter that a moment is of."""
    moment = _MOMENT.fullmatch(name)
    return name if moment is None else moment[2]


def _put(target: dict[str, object], name: str, value: object) -> None:
    if name in target:
        raise CorruptError(f"two tensors are called {shown(name)}")
    target[name] = value
