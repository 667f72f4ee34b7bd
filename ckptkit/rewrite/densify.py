"""Values of the state_dict that are not plain tensors become dense ones, with nothing made before it is written.

`ckptkit.normalize.not_plain.dense_form` says what they can be made from, `ckptkit.rewrite.dtype.scaled_weights` does so
for FP8 weights with their scales beside them, and `ckptkit.transfer.dense` computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from itertools import islice

from ckptkit.casting import cast_storage, caster
from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, KeyCollisionError, RewriteError, UnsupportedError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.not_plain import PACKED_DTYPE, Dense, dense_form, packed_parts
from ckptkit.normalize.sections import brief
from ckptkit.pickling.inert import Global
from ckptkit.pickling.layouts import Jagged, Nested
from ckptkit.report import count_of, glob_of, listed
from ckptkit.rewrite.dtype import scaled_weights
from ckptkit.startup import dataclass
from ckptkit.transfer.dense import dense_entry

__all__ = ["Densify"]

_LISTED = 8
"""Names in a message."""


@dataclass(frozen=True, slots=True)
class Densify:
    """Turn sparse, nested, quantized and block-scaled values of the state_dict into dense tensors.

    - Sparse tensors of every layout become what ``to_dense()`` gives, in their own dtype.
    - Nested ones become what ``to_padded_tensor(0)`` gives: the sizes of the tensors inside are lost.
    - Quantized ones become what ``dequantize()`` gives: float32.  Packed parameters of quantized modules
      (``_packed_params._packed_params``) become ``weight`` and ``bias``, and the dtype beside them goes.
    - torchao tensors become what ``dequantize()`` gives, in their own dtype; `ckptkit.normalize.not_plain` lists the
      supported classes.
    - FP8 weights are multiplied by the scales beside them, in float32, and become float32; the scales are removed
      (`ckptkit.rewrite.dtype`).

    Other values do not change, nor do a module's own scales (``scale``, ``zero_point``, ``input_scale``), which are for
    its inputs and outputs.  Everything beside the weights is left alone.

    Args:
        dtype: the dtype to cast floating-point results to, as ``.to(dtype)`` does; ``None``: as above.
        beside: where to search for scales, if some of the state_dict's names are already gone; ``None``: in the
            state_dict.

    Attributes:
        made: each tensor that the last application made, and what it was made from.
        padded: those of them that were padded.
        taken: the names whose values were used, including scales.

    Raises:
        DTypeError: nothing can be cast to the dtype.  When applied:
        RewriteError: some tensors cannot be made dense, each named with the reason; or the values would be larger than
            `ckptkit.limits.Limits.densified_nbytes` allows.
        KeyCollisionError: a name for packed parameters is already in use.
        CorruptError, FileAccessError: the sizes of nested tensors cannot be read, or do not fit.
    """

    dtype: str | None = None
    beside: Mapping[str, TensorEntry] | None = field(default=None, repr=False, compare=False)
    made: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    padded: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    taken: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
            caster("float32", self.dtype)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        for told in (self.made, self.padded, self.taken):
            told.clear()
        state_dict = checkpoint.state_dict
        work = _Work(self, state_dict)
        everything: dict[str, object] = {}
        came_from: dict[str, str] = {}
        for name, value in state_dict.everything.items():
            for target, dense in work.of(name, value).items():
                if target in everything:
                    raise KeyCollisionError(came_from[target], name, target)
                everything[target], came_from[target] = dense, name
        work.finish()
        if not self.taken:
            return checkpoint
        return checkpoint.replace(state_dict=state_dict.holding(everything, state_dict.versions))


class _Work:
    """One state_dict, value by value; what cannot be is collected."""

    def __init__(self, densify: Densify, state_dict: StateDict) -> None:
        self._densify = densify
        found = {**(densify.beside or {}), **state_dict}
        known, unknown = scaled_weights(found)
        self._scaled = {name: pair for name, pair in known.items() if name in state_dict}
        self._scales = {scale: name for name, (scale, _) in self._scaled.items()}
        self._refused = {name: why for name, why in unknown.items() if name in state_dict}
        self._dense: dict[object, tuple[object, TensorEntry]] = {}
        self._grown: dict[str, int] = {}
        self._packed = {
            name.removesuffix(last) + "dtype"
            for name, value in state_dict.extra.items()
            for last in ("_packed_params", "_packed_weight")
            if name.endswith(f"_packed_params.{last}") and packed_parts(name, value) is not None
        }

    def of(self, name: str, value: object) -> dict[str, object]:
        """The value in a value's place, by name."""
        if name in self._scales or (name in self._packed and isinstance(value, Global) and name.endswith(PACKED_DTYPE)):
            self._densify.taken.add(name)
            return {}
        parts = packed_parts(name, value)
        if parts is None:
            return {name: self._value(name, name, value)}
        self._densify.taken.add(name)
        return {target: self._value(name, target, part) for target, part in parts.items()}

    def _value(self, name: str, target: str, value: object) -> object:
        key: object  # ties are kept
        try:
            if isinstance(value, TensorEntry):
                if name not in self._scaled:
                    return value
                scale, scaled = self._scaled[name]
                dense, key = Dense(scaled, value.is_parameter, value.requires_grad), (value.view, scaled.scales.view)
                text = f"{value.dtype} {list(value.shape)} times {scale.rpartition('.')[2]:.60}"
            else:
                found = dense_form(value)
                if found is None:
                    return value
                dense, text, key = found, brief(value), id(value)
            if key not in self._dense:
                self._dense[key] = value, self._entry(target, dense)
        except (UnsupportedError, CorruptError) as error:
            self._refused[name] = str(error)
            return value
        self._densify.made[target] = text
        self._densify.taken.add(name)
        if isinstance(dense.form, (Nested, Jagged)):
            self._densify.padded.add(target)
        return self._dense[key][1]

    def _entry(self, name: str, dense: Dense) -> TensorEntry:
        entry, self._grown[name] = dense_entry(dense.form, name)
        dtype = self._densify.dtype
        if dtype is not None and DTYPES[entry.dtype].is_floating and entry.dtype != dtype:
            entry = replace(entry, storage=cast_storage(entry.storage, entry.dtype, dtype), dtype=dtype)
        differentiable = DTYPES[entry.dtype].kind in ("float", "complex")
        requires_grad = dense.requires_grad and differentiable
        return replace(entry, is_parameter=dense.is_parameter, requires_grad=requires_grad)

    def finish(self) -> None:
        """Raise what is wrong.

        Raises:
            RewriteError: something cannot be made, or would be too large.
        """
        if self._refused:
            shown = listed([f"{name:.100} ({why:.200})" for name, why in self._refused.items()], _LISTED)
            options = " ".join(f"--exclude {glob_of(name)}" for name in islice(self._refused, _LISTED))
            raise RewriteError(
                f"{count_of(len(self._refused), 'value')} cannot be made dense: {shown}; {options} leaves "
                f"{'it' if len(self._refused) == 1 else 'them'} out",
                names=self._refused,
            )
        total = sum(self._grown.values())
        if total > DEFAULT_LIMITS.densified_nbytes:
            name = max(self._grown, key=self._grown.__getitem__)
            raise RewriteError(
                f"dense values would take {total:,} bytes more than the source values, {name:.200} of them "
                f"{self._grown[name]:,}, over the limit of {DEFAULT_LIMITS.densified_nbytes:,}; leave it out with "
                f"--exclude {glob_of(name)}",
                names=[name],
            )
