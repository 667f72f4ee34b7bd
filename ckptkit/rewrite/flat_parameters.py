"""Flat parameters cut into those that were joined in them, by the names and shapes of a model.

FSDP's first version joins the parameters of each unit (a module that it wraps, less the units inside) into one of one
dimension, ``_flat_param``, and LOCAL_STATE_DICT saves that.  Facts (torch 2.14
``torch/distributed/fsdp/_flat_param.py`` ``_init_flat_param_and_metadata``):

- it contains the parameters in the order of ``named_parameters()``, shared ones once
- with ``use_orig_params=True`` each begins at a multiple of 16 bytes, and padding to a multiple of the ranks follows;
  then their names are in the file too, as views of it (`ckptkit.formats.distributed.ranks`), without their shapes
- buffers, and what FSDP was told to ignore, are beside it under their own names

Without such names nothing in the file shows names, shapes or order, so the model's are used; the numbers of elements
must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry, contiguous_stride
from ckptkit.computed import files_of
from ckptkit.errors import RewriteError
from ckptkit.formats import format_named
from ckptkit.normalize.modules import unwrapped, unwrapped_path
from ckptkit.normalize.parts import is_flat_name
from ckptkit.report import count_of, listed

__all__ = ["cut_flat", "keeps_order"]

_ALIGNED_NBYTES = 16
"""The alignment of each parameter in a padded flat one."""

_COUNTER = "num_batches_tracked"
"""What no parameter is called: a buffer that old files lack."""

_Shapes = Mapping[str, tuple[int, ...] | None]


def keeps_order(checkpoint: Checkpoint) -> bool:
    """Whether names are in the order in which they were saved, not in that of safetensors: by dtype, then sorted."""
    if not format_named(checkpoint.origin.format).tensors_alone:
        return True
    names: dict[str, list[str]] = {}
    for name, entry in checkpoint.state_dict.items():
        names.setdefault(entry.dtype, []).append(name)
    return any(each != sorted(each) for each in names.values())


def cut_flat(
    checkpoint: Checkpoint,
    expected: _Shapes,
    tied: Sequence[Sequence[str]],
    label: str,
    *,
    is_ordered: bool,
    rename: Callable[[str], str] | None,
) -> Checkpoint:
    """The checkpoint with the flat parameters of its state_dict split into the model's; unchanged if it has none.

    Args:
        checkpoint: of all ranks together.
        expected: the model's names and shapes, in its order; it may be a part of the one that was saved, and then its
            names lack what the part is called by.
        tied: groups of names that are one tensor in the model.
        label: the model, for messages.
        is_ordered: whether the order is known to be the model's.
        rename: from the names in the checkpoint to new ones; it chooses among several parts that the model may be.

    Raises:
        RewriteError: the model's parameters are not as many elements, several parts fit, or the order is not known.
    """
    flats = {name: entry for name, entry in checkpoint.state_dict.items() if is_flat_name(name)}
    if not flats or checkpoint.part is None or not checkpoint.part.remedy:
        return checkpoint
    path = checkpoint.origin.path
    refused: RewriteError | None = None
    fits: dict[str, dict[str, object]] = {}
    for prefix in _prefixes(flats):
        try:
            fits[prefix] = _cut(checkpoint.state_dict, flats, prefix, expected, tied, label, is_ordered)
        except RewriteError as error:
            refused = refused or error
        if "" in fits:
            break
    if len(fits) > 1 and rename is not None:
        fits = {
            prefix: everything
            for prefix, everything in fits.items()
            if all(rename(f"{prefix}.{name}") == name for name in expected)
        } or fits
    if len(fits) > 1:
        raise RewriteError(
            f"{path}: {len(fits)} parts of the saved names fit {label} equally well: {listed(fits)}; choose one with "
            f"--strip-prefix {next(iter(fits))}.",
            path=path,
        )
    for everything in fits.values():
        whole = checkpoint.state_dict.holding(everything, checkpoint.state_dict.versions)
        return checkpoint.replace(state_dict=whole, part=None)
    raise RewriteError(f"{path}: {refused}", path=path)


def _unit(name: str) -> str:
    """The path of the module that a flat parameter is of."""
    return unwrapped_path(name.rpartition(".")[0]) if "." in name else ""


def _prefixes(flats: Mapping[str, TensorEntry]) -> Iterator[str]:
    """The paths that may be the model's among the modules that were saved, the whole first."""
    found = {""}
    for name in flats:
        parts = _unit(name).split(".")
        found.update(".".join(parts[:count]) for count in range(len(parts) + 1))
    yield from sorted(found, key=lambda path: (path.count(".") + bool(path), path))


def _cut(
    state_dict: StateDict,
    flats: Mapping[str, TensorEntry],
    prefix: str,
    expected: _Shapes,
    tied: Sequence[Sequence[str]],
    label: str,
    is_ordered: bool,
) -> dict[str, object]:
    """Every value by its name, those of the model's units cut.

    Raises:
        RewriteError: they do not fit.
    """
    before = f"{prefix}." if prefix else ""
    units = {unit: name for name in flats if f"{(unit := _unit(name))}.".startswith(before) or not before}
    own = {id(flats[name].storage) for name in units.values()}
    views = {
        name: entry for name, entry in state_dict.items() if id(entry.storage) in own and name not in units.values()
    }
    has_views = {id(entry.storage) for entry in views.values()}
    there = set(map(unwrapped, state_dict.everything))
    shapes = {before + name: shape for name, shape in expected.items()}
    if views and not any(unwrapped(name) in shapes for name in views):
        raise RewriteError(f"{label} has none of the names that are joined in flat parameters")
    members = _members(units, before, there, expected, tied)
    everything: dict[str, object] = {}
    for name, value in state_dict.everything.items():
        shape = shapes.get(unwrapped(name))
        if name in views and shape is not None:
            everything[name] = _part(name, views[name], shape, label)
        elif name not in units.values():
            everything[name] = value
        elif id(flats[name].storage) not in has_views:
            everything.update(_parts(name, flats[name], members[_unit(name)], label))
            if not is_ordered:
                raise RewriteError(
                    f"flat parameters are split in the order of the model's parameters, and {label} is a file that "
                    "does not keep it: give a .pth of the model, or the model itself"
                )
    return everything


def _members(
    units: Collection[str], before: str, there: Collection[str], expected: _Shapes, tied: Sequence[Sequence[str]]
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The parameters of each unit, with their shapes, in order.

    Args:
        units: paths of the modules that have flat parameters.
        before: the prefix of the model's names.
        there: names that are in the file themselves.
        expected: of the model.
        tied: of the model.
    """
    place = {name: number for number, name in enumerate(expected)}
    again = {name for group in tied for name in sorted(filter(place.__contains__, group), key=place.__getitem__)[1:]}
    members: dict[str, list[tuple[str, tuple[int, ...]]]] = {unit: [] for unit in units}
    for name, shape in expected.items():
        full = before + name
        of = [unit for unit in units if not unit or full.startswith(f"{unit}.")]
        if shape is not None and of and full not in there and name not in again and not name.endswith(_COUNTER):
            members[max(of, key=len)].append((full, shape))
    return members


def _part(name: str, view: TensorEntry, shape: tuple[int, ...], label: str) -> TensorEntry:
    """A parameter whose position in a flat one is recorded in the file.

    Raises:
        RewriteError: it is not of as many elements as it has.
    """
    if view.numel != math.prod(shape):
        raise RewriteError(
            f"{name!r:.200} has {count_of(view.numel, 'element')} in a flat parameter, but in {label} it is {[*shape]}"
        )
    return _run(view, 0, shape)


def _parts(
    name: str, flat: TensorEntry, members: Sequence[tuple[str, tuple[int, ...]]], label: str
) -> dict[str, TensorEntry]:
    """The parameters that are joined in a flat one.

    Raises:
        RewriteError: they are not as many elements as it has.
    """
    begins = _begins([math.prod(shape) for _, shape in members], flat)
    if begins is None or len(flat.shape) != 1 or not flat.is_contiguous:
        count = sum(math.prod(shape) for _, shape in members)
        raise RewriteError(
            f"flat parameter {name!r:.200} has {count_of(flat.numel, 'element')}, but the parameters of {label} that "
            f"would be joined in it have {count:,}"
        )
    return {full: _run(flat, begin, shape) for (full, shape), begin in zip(members, begins, strict=True)}


def _begins(numels: Sequence[int], flat: TensorEntry) -> list[int] | None:
    """The first element of each parameter in a flat one, without padding or with; ``None``: they do not fill it."""
    ranks = len(files_of(flat.storage.source))
    for step, multiple in ((1, 1), (_ALIGNED_NBYTES // flat.itemsize, ranks)):
        begins, end = [], 0
        for numel in numels:
            begins.append(-(-end // step) * step)
            end = begins[-1] + numel
        if -(-end // multiple) * multiple == flat.numel and numels:
            return begins
    return None


def _run(flat: TensorEntry, begin: int, shape: tuple[int, ...]) -> TensorEntry:
    """A run of a one-dimensional tensor as a tensor with its own storage."""
    start, nbytes = (flat.storage_offset + begin) * flat.itemsize, math.prod(shape) * flat.itemsize
    storage = replace(
        flat.storage,
        key=f"{flat.storage.key}[{start}:{start + nbytes}]",
        nbytes=nbytes,
        source=flat.storage.source.part(start, nbytes),
        crc32=None,
        original=flat.storage.original or flat.storage,
    )
    stride = contiguous_stride(shape)
    return replace(
        flat, storage=storage, storage_offset=0, shape=shape, stride=stride, requires_grad=False, is_parameter=False
    )
