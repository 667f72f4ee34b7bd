"""Cast the floating-point weights to another dtype, with nothing read before it is written.

A cast changes the storage, with every tensor that is a view of it: ties, views, strides and offsets (which torch counts
in elements) do not change.

Some weights are values only together with scales beside them (`ckptkit.normalize.quantized`), and are not cast.

Of those in FP8 whose scales multiply them and nothing else does, `scaled_weights` knows the values: ``weight`` with
``weight_scale_inv`` (DeepSeek's ``inference/kernel.py`` ``weight_dequant``: blocks of 128 by 128, the last ones cut
short), with ``weight_scale`` (one for the tensor, a row, or a block) or with ComfyUI's ``scale_weight`` (one for it).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from glob import escape
from itertools import chain
from typing import TYPE_CHECKING

from ckptkit.arguments import several
from ckptkit.casting import CAST_TARGETS, cast_storage, caster
from ckptkit.checkpoint import Checkpoint, StateDict, Storage, TensorEntry
from ckptkit.computed import ConvertedRange
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError
from ckptkit.normalize.quantized import scaled_pairs
from ckptkit.pickling.inert import walk
from ckptkit.report import count_of, glob_of, listed
from ckptkit.rewrite.storages import nodes, with_tensors_replaced
from ckptkit.startup import dataclass

if TYPE_CHECKING:
    from ckptkit.normalize.not_plain import Scaled

__all__ = ["CastDtype", "scaled_pairs", "scaled_weights"]

_LISTED = 8
"""Options in a message."""

_BESIDE = "a tensor beside the weights"


@dataclass(frozen=True, slots=True)
class CastDtype:
    """Cast the state_dict's floating-point tensors, as ``tensor.to(dtype)`` does.

    Optimizer moments, averaged weights and everything else in the file keep their dtype, unless they are views of a
    storage that is cast: one storage has one dtype, and ties are kept.  Integer, bool, complex and quantized
    tensors do not change, nor do values that are not plain tensors (`StateDict.extra`).  A tensor that already has
    the dtype stays the same object.

    Args:
        dtype: torch's name, with or without ``torch.``: see `ckptkit.casting.CAST_TARGETS`.
        keep: globs (`fnmatch.fnmatchcase`) of names of the state_dict; a storage is not cast if any name that uses it
            matches.
        rename: from a name to its name after the following rewriters; a glob may match either.  Comparisons ignore it.
        cast_scaled: whether to cast weights that have a meaning only together with scales beside them, and these
            scales; see `ckptkit.normalize.quantized`.
        scaled: those weights and scales, if some of the names are already gone; ``None``: they are searched for.

    Raises:
        DTypeError: nothing can be cast to the dtype.  When applied: a tensor's dtype cannot be cast, or it was already
            cast; it is a weight with scales, or a scale; or the file also uses its bytes in another way, as a tensor of
            another dtype or as a separate storage, and the cast would change that.
    """

    dtype: str
    keep: str | Sequence[str] = ()
    rename: Callable[[str], str] | None = field(default=None, repr=False, compare=False)
    cast_scaled: bool = False
    scaled: Mapping[str, str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "keep", several(self.keep))
        caster("float32", self.dtype)

    def __repr__(self) -> str:
        return f"CastDtype(dtype={self.dtype!r}, keep={self.keep!r}{', cast_scaled=True' if self.cast_scaled else ''})"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        cast = self._cast_storages(checkpoint)
        if not cast:
            return checkpoint

        def leaf(node: object) -> object:
            if not isinstance(node, TensorEntry) or id(node.storage) not in cast:
                return node
            return replace(node, storage=cast[id(node.storage)], dtype=self.dtype)

        result = with_tensors_replaced(checkpoint, leaf, module=True)
        state_dict = result.state_dict
        return result.replace(state_dict=state_dict.holding(state_dict.everything, state_dict.versions))

    def scaled_in(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The tensors that are cast although they have scales or are scales, each with the tensor it belongs to."""
        pairs = scaled_pairs(checkpoint.state_dict) if self.scaled is None else self.scaled
        names = [name for name in pairs if name in checkpoint.state_dict] if pairs else []
        cast = self._first(checkpoint) if names else {}
        return {name: pairs[name] for name in names if id(checkpoint.state_dict[name].storage) in cast}

    def unmatched(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The globs of ``keep`` that match no name."""
        names = list(checkpoint.state_dict.everything)
        return tuple(glob for glob in self.keep if not any(self._matches(name, glob) for name in names))

    def _matches(self, name: str, glob: str) -> bool:
        if fnmatch.fnmatchcase(name, glob):
            return True
        return self.rename is not None and fnmatch.fnmatchcase(self.rename(name), glob)

    def _first(self, checkpoint: Checkpoint) -> dict[int, tuple[str, TensorEntry]]:
        """The storages that are cast, by ``id``: the first tensor over each."""
        first: dict[int, tuple[str, TensorEntry]] = {}
        kept: set[int] = set()
        for name, entry in checkpoint.state_dict.items():
            if any(self._matches(name, glob) for glob in self.keep):
                kept.add(id(entry.storage))
            elif DTYPES[entry.dtype].is_floating and entry.dtype != self.dtype:
                first.setdefault(id(entry.storage), (name, entry))
        return {storage: named for storage, named in first.items() if storage not in kept}

    def _cast_storages(self, checkpoint: Checkpoint) -> dict[int, Storage]:
        """What takes the place of each storage that is cast, by the ``id`` of the old one."""
        first = self._first(checkpoint)
        if first and not self.cast_scaled and (scaled := self.scaled_in(checkpoint)):
            raise DTypeError(_refusal(scaled, checkpoint.state_dict), names=scaled)
        if first:
            _require_one_meaning(checkpoint, first)
        return {storage: self._cast(name, entry) for storage, (name, entry) in first.items()}

    def _cast(self, name: str, entry: TensorEntry) -> Storage:
        """The storage with its values cast; ``name`` is one of the tensors over it."""
        storage, before, after = entry.storage, DTYPES[entry.dtype], DTYPES[self.dtype]
        if isinstance(storage.source, ConvertedRange):
            raise DTypeError(
                f"tensor {name!r} is already cast from {storage.source.whole.dtype} to {before.name} and would be "
                f"rounded twice; cast it once, or {_remedy(name)}",
                names=[name],
            )
        if storage.nbytes % before.itemsize:
            raise DTypeError(
                f"tensor {name!r}: its storage {storage.key!r} of {storage.nbytes:,} bytes is not a whole number of "
                f"{before.name} values and cannot be cast; {_remedy(name)}",
                names=[name],
            )
        try:
            return cast_storage(storage, before.name, after.name)
        except DTypeError as error:
            raise DTypeError(f"tensor {name!r}: {error}; {_remedy(name)}", names=[name]) from None


def _require_one_meaning(checkpoint: Checkpoint, cast: dict[int, tuple[str, TensorEntry]]) -> None:
    """Make sure that the bytes of each storage that is cast are values of one dtype to all that use them.

    Raises:
        DTypeError: they are not; the message names both.
    """
    names = {id(entry): name for name, entry in checkpoint.state_dict.items()}
    for node in chain(nodes(checkpoint), walk(checkpoint.module)):
        storage = node.storage if isinstance(node, TensorEntry) else node
        if not isinstance(storage, Storage) or id(storage) not in cast:
            continue
        name, entry = cast[id(storage)]
        if not isinstance(node, TensorEntry):
            other = "the file also has the storage on its own"
        elif node.dtype != entry.dtype:
            other = f"{repr(names[id(node)]) if id(node) in names else _BESIDE} views it as {node.dtype}"
        else:
            continue
        raise DTypeError(
            f"tensor {name!r} is {entry.dtype} in storage {storage.key!r}, but {other}; "
            f"a cast would change that too; {_remedy(name)}",
            names=[name],
        )


def _refusal(scaled: Mapping[str, str], state_dict: StateDict) -> str:
    few = len(scaled) <= _LISTED
    globs = dict.fromkeys(glob_of(name) if few else glob_of(name.rpartition(".")[2], before="*") for name in scaled)
    from ckptkit.normalize.not_plain import can_be_dense

    known = scaled_weights(state_dict)[0]
    names = {*known, *(scale for scale, _ in known.values())}
    others = {of: state_dict.everything.get(of) for name, of in scaled.items() if name not in names}
    dense = all(of in known or can_be_dense(of, value) for of, value in others.items())
    helps = "Make them dense with --densify" if dense else "Dequantize with the library that made them"
    return (
        f"{count_of(len(scaled), 'tensor', 'has', 'have')} meaning only together with another, such as a weight "
        f"and its scales: {listed([f'{name:.100} (with {other:.100})' for name, other in scaled.items()], 4)}; casting "
        f"one alone makes garbage. {helps}, leave them as they are with "
        f"{' '.join(f'--keep-dtype {glob}' for glob in list(globs)[:_LISTED])}, or cast them anyway with --cast-scaled"
    )


def _remedy(name: str) -> str:
    return f"leave it as it is with --keep-dtype {escape(name)!r}"


_SIDE = 128
"""The side of a block of DeepSeek's."""


def scaled_weights(state_dict: Mapping[str, TensorEntry]) -> tuple[dict[str, tuple[str, Scaled]], dict[str, str]]:
    """The FP8 weights with known scales, each with the name of its scale and the function that computes the values.

    Returns:
        Them; and those that have scales which could mean several things, each with the reason.
    """
    from ckptkit.normalize.not_plain import Scaled

    known: dict[str, tuple[str, Scaled]] = {}
    unknown: dict[str, str] = {}
    for name, entry in state_dict.items():
        if entry.itemsize != 1 or entry.dtype not in CAST_TARGETS:
            continue
        parent, dot, last = name.rpartition(".")
        alone = [f"{parent}{dot}scale_weight"] * (last == "weight")
        own = [f"{name}{ending}" for ending in ("_scale_inv", "_scale")]
        others = [f"{name}{ending}" for ending in ("_scale_2", "_global_scale", "_zero_point", "_zeros")]
        there = [scale for scale in (*own, *alone, *others) if scale in state_dict]
        if not there:
            continue
        scale = state_dict[there[0]]
        block = None if there[0] in others else _block_of(there[0], entry.shape, scale.shape)
        if len(there) > 1 or there[0] in others:
            unknown[name] = f"it has several scales: {listed(there, 4)}"
        elif not DTYPES[scale.dtype].is_floating or not DTYPES[scale.dtype].numpy or scale.dtype == "float64":
            unknown[name] = f"{there[0]:.100} is {scale.dtype}"
        elif block is None:
            unknown[name] = f"{there[0]:.100} {list(scale.shape)} fits several dimensions, or none"
        else:
            known[name] = there[0], Scaled(entry, scale, block)
    return known, unknown


def _block_of(scale: str, shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """The sizes of the blocks of a tensor that each have one of the scales; ``None``: it is not clear which.

    Args:
        scale: the name of the scales.
        shape: of the tensor.
        grid: shape of the scales.
    """
    if all(count == 1 for count in grid):
        return tuple(max(size, 1) for size in shape)
    if scale.endswith("scale_weight"):
        return None
    if len(grid) == 1 and len(shape) > 1 and grid[0] == shape[0] and grid[0] not in shape[1:]:  # one for each row
        grid = (*grid, *[1] * (len(shape) - 1))
    if len(grid) != len(shape) or 0 in grid or 0 in shape:
        return None
    block: list[int] = []
    for size, count in zip(shape, grid, strict=True):
        sides = {_SIDE} if count > 1 and count == -(-size // _SIDE) else set()
        if size % count == 0 and not (sides and scale.endswith("_inv")):
            sides.add(size // count)
        if len(sides) != 1:
            return None
        block += sides
    return tuple(block)
