"""Which weights are values only together with scales beside them, and which tensors are such scales.

A weight of 4 or 8 bits is a number to be multiplied by a scale of its block, row or tensor: cast alone it is garbage,
and so is what is multiplied by a scale that was rounded.  The names, by those who write them:

- DeepSeek: ``weight`` and ``weight_scale_inv``; compressed-tensors, FBGEMM, ModelOpt: ``weight_scale``,
  ``weight_scale_2``, ``input_scale``, ``weight_packed`` with ``weight_global_scale``; ComfyUI: ``scale_weight``
- bitsandbytes: ``SCB`` beside ``weight``; ``weight.absmax``, ``weight.quant_map``, ``weight.nested_absmax``
- GPTQ and AWQ: ``qweight`` and ``scales``; AQLM: ``codes``, ``codebooks`` and ``scales``; HQQ: ``W_q``, ``scale`` and
  ``zero``
- optimum-quanto: ``weight._data`` and ``weight._scale``; torch's quantized modules: ``scale`` beside packed parameters
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptkit.checkpoint import StateDict, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.pickling.inert import walk
from ckptkit.pickling.layouts import call_of

__all__ = ["scaled_pairs"]

_NAMED = re.compile(r"(?P<of>.+?)(?:_global)?_(?:scales?|scaling_factor|zeros?|zero_points?)(?:_inv|_[0-9])?\Z")
"""Names that say what they are the scale of."""

_ALONE = re.compile(
    r"_?(?:nested_)?(?:scales?|absmax|quant_map|zeros?|zero_points?|amax|codebooks?)\Z|SCB\Z|scale_(?:weight|input)\Z|"
    r"(?:input|output|act|activation)(?:_global)?_scale\Z|S[UV]\Z"
)
"""Names of scales of whatever is beside them, or bears them."""

_PACKED = re.compile(r"q_?weight|.*_packed|W_q|codes|Qidxs|B\Z", re.IGNORECASE)
"""Names of weights that may be packed in wider integers."""

_WEIGHT = re.compile(r"weights?(?:\Z|_)|q_?weight|.*_(?:packed|blocks)\Z|W_q|_data\Z|codes|Qidxs|B\Z")
"""Names of what a tensor that is but called a scale may be the scale of."""

_NARROW = ("int8", "uint8")
_WIDE = ("int32", "int16", "int64", "uint32", "uint16")


def scaled_pairs(state_dict: StateDict) -> dict[str, str]:
    """Every tensor that is scaled, with its first scale; and every scale, with what it scales.

    A name alone says nothing: ``logit_scale`` is a scale of this kind only beside a ``logit`` of 8 bits or fewer.
    """
    scaled = {name for name, value in state_dict.everything.items() if _is_scaled(name, value)}
    if not scaled:
        return {}
    beside: dict[str, list[str]] = {}
    for name in scaled:
        beside.setdefault(_parent(name), []).append(name)
        beside.setdefault(name, []).append(name)  # what it bears
    pairs: dict[str, str] = {}
    for name, entry in state_dict.items():
        for of in _scales(name, beside):
            other = state_dict.everything[of]
            if of != name and (not isinstance(other, TensorEntry) or other.dtype != entry.dtype):
                pairs.setdefault(name, of)
                pairs.setdefault(of, name)
    return pairs


def _is_scaled(name: str, value: object) -> bool:
    """Whether a value may be one that has scales: of a few bits, or packed."""
    if not isinstance(value, TensorEntry):
        return any(call_of(node).kind == "quantized" for node in walk(value))
    row = DTYPES[value.dtype]
    if row.is_floating:
        return row.itemsize == 1
    return value.dtype in _NARROW or (value.dtype in _WIDE and _PACKED.match(name.rpartition(".")[2]) is not None)


def _parent(name: str) -> str:
    return name.partition("._packed_params")[0] if "._packed_params" in name else name.rpartition(".")[0]


def _scales(name: str, beside: Mapping[str, list[str]]) -> list[str]:
    """What a tensor is the scale of, by its name."""
    parent, _, last = name.rpartition(".")
    near = beside.get(parent, [])
    if _ALONE.match(last):
        return [of for of in near if of == parent or _WEIGHT.match(of.rpartition(".")[2]) or "._packed_params" in of]
    named = _NAMED.match(last)
    if named is None:
        return []
    return [of for of in near if _bare(of.rpartition(".")[2]) == _bare(named["of"])]


def _bare(name: str) -> str:
    """What a weight is called, however it is packed: ``qweight``, ``weight_packed``, ``W_q``, ``w1_blocks``."""
    return re.sub(r"_(?:packed|blocks?|q)\Z|\Aq_?(?=weight)", "", name)
