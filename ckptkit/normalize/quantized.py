"""Quantized weights: which tensors are values only together with scales beside them, and what made them.

A weight of 4 or 8 bits is a number to be multiplied by a scale of its group, block, row or tensor: cast without it, it
is garbage, and so are products with a rounded scale.  The names, by those who write them:

- DeepSeek: ``weight`` and ``weight_scale_inv``; compressed-tensors, FBGEMM, ModelOpt: ``weight_scale``,
  ``weight_scale_2``, ``input_scale``, ``weight_packed`` with ``weight_global_scale``; ComfyUI: ``scale_weight``
- bitsandbytes: ``SCB`` beside ``weight``; ``weight.absmax``, ``weight.quant_map``, ``weight.nested_absmax``,
  ``weight.quant_state.bitsandbytes__nf4``
- GPTQ and AWQ: ``qweight`` and ``scales``, ``qzeros``, and of GPTQ ``g_idx``; AQLM: ``codes``, ``codebooks`` and
  ``scales``; HQQ: ``W_q``, ``scale`` and ``zero``
- optimum-quanto: ``weight._data`` and ``weight._scale``; torch's quantized modules: ``scale`` beside packed parameters
- MXFP4 of gpt-oss: ``gate_up_proj_blocks`` and ``gate_up_proj_scales``

The shapes show how many bits a value has: in GPTQ [in * bits / 32, out] int32 beside scales [in / group, out], in AWQ
[in, out * bits / 32] beside the same scales; in both the zeros are [in / group, out * bits / 32].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict

from ckptkit.checkpoint import StateDict, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.normalize.adapters import small_values
from ckptkit.pickling.inert import walk
from ckptkit.pickling.layouts import call_of
from ckptkit.report import count_of, listed, printable

__all__ = ["LayoutDocument", "QuantizationDocument", "quantization_in", "quantized_text", "scaled_pairs"]

_NAMED = re.compile(r"(?P<of>.+?)(?:_global)?_(?:scales?|scaling_factor|zeros?|zero_points?)(?:_inv|_[0-9])?\Z")
"""Names that say what they are the scale of."""

_ALONE = re.compile(
    r"_?(?:nested_)?(?:scales?|absmax|quant_map|zeros?|zero_points?|amax|codebooks?)\Z|SCB\Z|scale_(?:weight|input)\Z|"
    r"(?:input|output|act|activation)(?:_global)?_scale\Z|S[UV]\Z"
)
"""Names of scales of the weight beside them, or whose name they extend."""

_PACKING = re.compile(r"_(?:packed|blocks?|q)\Z|\Aq_?(?=weight)")
"""What in a weight's name says that it is packed."""

_PACKED = re.compile(r"q_?weight|.*_packed|W_q|codes|Qidxs|B\Z", re.IGNORECASE)
"""Names of weights that may be packed in wider integers."""

_WEIGHT = re.compile(r"weights?(?:\Z|_)|q_?weight|.*_(?:packed|blocks)\Z|W_q|_data\Z|codes|Qidxs|B\Z")
"""Names of what a tensor that is but called a scale may be the scale of."""

_CACHED = 1 << 12
"""Last parts of names whose meaning is cached: a model has a dozen."""

_NARROW = ("int8", "uint8")
_WIDE = ("int32", "int16", "int64", "uint32", "uint16")


_Beside = dict[tuple[str, str | None], list[str]]
"""Names by what they are below, and either what they are called or, all of them, ``None``."""


def scaled_pairs(state_dict: StateDict) -> dict[str, str]:
    """Every tensor that is scaled, with its first scale; and every scale, with what it scales.

    A name is not enough: ``logit_scale`` is a scale of this kind only beside a ``logit`` of 8 bits or fewer.
    """
    pairs: dict[str, str] = {}
    for name, of in _scalings(state_dict):
        pairs.setdefault(name, of)
        pairs.setdefault(of, name)
    return pairs


def _scalings(state_dict: StateDict, *, alike: bool = False) -> Iterator[tuple[str, str]]:
    """Each scale with each tensor that it scales; with ``alike`` those too that have the dtype of their scale."""
    scaled = [name for name, value in state_dict.everything.items() if _is_scaled(name, value)]
    beside: _Beside = {}
    for name in scaled:
        bare = _bare(name.rpartition(".")[2])
        for place in (_parent(name), name):  # the names beside it, and its own
            beside.setdefault((place, None), []).append(name)
            beside.setdefault((place, bare), []).append(name)
    for name, entry in state_dict.items() if scaled else ():
        for of in _scales(name, beside):
            other = state_dict.everything[of]
            if of != name and (alike or not isinstance(other, TensorEntry) or other.dtype != entry.dtype):
                yield name, of


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


def _scales(name: str, beside: _Beside) -> list[str]:
    """The tensor that a scale belongs to, by its name."""
    parent, _, last = name.rpartition(".")
    if _ALONE.match(last):
        near = beside.get((parent, None), [])
        return [of for of in near if of == parent or _WEIGHT.match(of.rpartition(".")[2]) or "._packed_params" in of]
    named = _NAMED.match(last)
    return [] if named is None else beside.get((parent, _bare(named["of"])), [])


@lru_cache(_CACHED)
def _bare(last: str) -> str:
    """Names of a weight in all packings: ``qweight``, ``weight_packed``, ``W_q``, ``w1_blocks``."""
    return _PACKING.sub("", last)


# What made them.

Mixed = Literal["mixed"]
Strategy = Literal["tensor", "channel", "group", "block"]
_Spread = tuple[Strategy | None, int | None, tuple[int, int] | None]
"""Strategy, size of groups, and of blocks."""


class LayoutDocument(TypedDict):
    """Modules that are quantized alike.

    Attributes:
        method: ``"gptq"``, ``"awq"``, ``"bitsandbytes"``, ``"compressed-tensors"``, ``"fp8"``, ``"int8"``, ``"nvfp4"``,
            ``"mxfp4"``, ``"hqq"``, ``"aqlm"``, ``"quanto"``, ``"torch"``; ``"other"``: weights with scales of another.
        dtype: of a value: ``"int4"``, ``"nf4"``, ``"float8_e4m3fn"``; ``None``: unknown.
        bits: of a value; ``"mixed"``: its tensors contradict each other; ``None``: unknown.
        strategy: what has its own scale: the tensor, a row (``"channel"``), a group in a row, or a block.
        group_size: values that have a scale together, along a row; of bitsandbytes in storage order.
        block: rows and columns of a block.
        modules: how many there are.
        companions: the names that belong together, in a module.
        example: one of the modules.
    """

    method: str
    dtype: str | None
    bits: int | Mixed | None
    strategy: Strategy | None
    group_size: int | None
    block: list[int] | None
    modules: int
    companions: list[str]
    example: str


class QuantizationDocument(TypedDict):
    """Weights that are values only together with their scales.

    Attributes:
        method, dtype, bits, strategy, group_size: of all, as `LayoutDocument` has them; ``"mixed"``: they differ.
        modules: that are quantized.
        plain: modules beside them whose weight is a matrix of plain floating-point values.
        companions: the names that belong together, of all layouts.
        layouts: modules that are quantized alike, the most first; at most 20, and of names 50.
    """

    method: str
    dtype: str | None
    bits: int | Mixed | None
    strategy: str | None
    group_size: int | Mixed | None
    modules: int
    plain: int
    companions: list[str]
    layouts: list[LayoutDocument]


class _Facts(NamedTuple):
    """How a weight is quantized; as `LayoutDocument`."""

    method: str
    dtype: str | None = None
    bits: int | Mixed | None = None
    strategy: Strategy | None = None
    group_size: int | None = None
    block: tuple[int, int] | None = None


_STATE = ".quant_state.bitsandbytes__"

_KIN = re.compile(r"qzeros|g_idx|perm|weight_format|nbits|group_size")
"""Names of what belongs to whatever weight is beside it and is not a scale."""

_SIZED = re.compile(r"(?P<of>.+)_(?:shape|g_idx)")
"""Names that say which weight they belong to, and are not scales."""

_FIRST = re.compile(r"_?scales?|scale_weight|(?!input_|output_|act|.+_global_).+_scales?(?:_inv)?")
"""Names of what a weight is multiplied by, not of scales of scales nor of inputs."""

_TORCH_BITS = {"qint8": 8, "quint8": 8, "qint32": 32, "quint4x2": 4, "quint2x4": 2}

_CALLED = {
    "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "nvfp4": "NVFP4", "mxfp4": "MXFP4",
    "int8": "scaled int8", "fp8": "scaled fp8", "other": "scaled in an unknown way",
}  # fmt: skip

_MAX_SHOWN = 3
"""Layouts in a line of text."""

_MAX_LAYOUTS = 20

_MAX_COMPANIONS = 50

_MAX_READ = 200
"""Shapes of packed weights that are read: a model has a dozen."""


def quantization_in(state_dict: StateDict) -> QuantizationDocument | None:
    """How the weights are quantized; ``None``: none of them is, or in no way that has scales."""
    weights = _weights(state_dict)
    if not weights:
        return None
    beside: _Beside = {}
    wanted = {*weights, *map(_parent, weights)}
    for name in state_dict.everything:
        place = name.partition(_STATE)[0] if _STATE in name else _parent(name)
        if place in wanted and (place in weights or (key := _whose(name.rpartition(".")[2])) is not None):
            beside.setdefault((place, None if place in weights else key), []).append(name)
    shapes = _Shapes()
    layouts: dict[tuple[object, ...], LayoutDocument] = {}
    for weight in weights:
        module, bare = _parent(weight), _bare(weight.rpartition(".")[2])
        near = {name for own in ("", bare) for name in beside.get((module, own), [])[:_MAX_COMPANIONS]}
        names = [weight, *sorted({*near, *beside.get((weight, None), [])[:_MAX_COMPANIONS]} - {weight})]
        start, stem = f"{module}." if module else "", ""
        named = f"{start}{bare}"
        if bare not in ("weight", "W") and len(names) > 1 and all(f"{name}_".startswith(f"{named}_") for name in names):
            module, start, stem = named, named, "*"  # several are beside one another, each with its own
        parts = {stem + name[len(start) :]: state_dict.everything[name] for name in names}
        found = shapes.facts(parts)
        layout = layouts.get(alike := (found, *parts))
        if layout is None:
            block = None if found.block is None else [*found.block]
            layouts[alike] = {
                "method": found.method,
                "dtype": found.dtype,
                "bits": found.bits,
                "strategy": found.strategy,
                "group_size": found.group_size,
                "block": block,
                "modules": 1,
                "companions": [*parts],
                "example": module,
            }
        else:
            layout["modules"] += 1
    listed = sorted(layouts.values(), key=lambda layout: -layout["modules"])
    return {
        "method": _all(listed, "method"),
        "dtype": _all(listed, "dtype"),
        "bits": _all(listed, "bits"),
        "strategy": _all(listed, "strategy"),
        "group_size": _all(listed, "group_size"),
        "modules": len(weights),
        "plain": sum(_is_plain_matrix(name, entry) for name, entry in state_dict.items() if name not in weights),
        "companions": list(dict.fromkeys(name for layout in listed for name in layout["companions"]))[:_MAX_COMPANIONS],
        "layouts": listed[:_MAX_LAYOUTS],
    }


def _is_plain_matrix(name: str, entry: TensorEntry) -> bool:
    row = DTYPES[entry.dtype]
    return name.endswith("weight") and len(entry.shape) > 1 and row.is_floating and row.itemsize > 1


def _all(layouts: Sequence[LayoutDocument], key: str) -> Any:
    """What all of them have; ``"mixed"``: they differ."""
    values = {layout[key] for layout in layouts}  # type: ignore[literal-required]
    return "mixed" if len(values) > 1 else next(iter(values))


def _weights(state_dict: StateDict) -> dict[str, None]:
    """The names of what is scaled and no scale itself, in file order."""
    pairs = list(_scalings(state_dict, alike=True))
    scaled = {of for _, of in pairs} - {scale for scale, _ in pairs}
    for name, value in state_dict.everything.items():
        if _STATE in name:  # what bitsandbytes packs may be in elements of any type
            scaled.add(name.partition(_STATE)[0])
        elif not isinstance(value, TensorEntry) and _is_scaled(name, value):
            scaled.add(name)
    own = (name for name in state_dict.everything if name in scaled)
    return dict.fromkeys(name for name in own if not _KIN.fullmatch(name.rpartition(".")[2]))


@lru_cache(_CACHED)
def _whose(last: str) -> str | None:
    """The name of the weight beside it that a name belongs to; ``""``: to each; ``None``: to none."""
    if _ALONE.match(last) or _KIN.fullmatch(last):
        return ""
    named = _NAMED.match(last) or _SIZED.fullmatch(last)
    return None if named is None else _bare(named["of"])


class _Shapes:
    """Finds out how weights are quantized, once for all similar ones; sizes stored in tensors are read for it."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Facts] = {}

    def facts(self, parts: Mapping[str, object]) -> _Facts:
        """How a weight is quantized that has these parts, by their names in its module, the weight first."""
        last, value = next(iter(parts.items()))
        if not isinstance(value, TensorEntry):
            return _of_torch(value)
        tensors = {name: part for name, part in parts.items() if isinstance(part, TensorEntry)}
        key = (*tensors, *[(part.dtype, part.shape) for part in tensors.values()])
        if key not in self._known:
            self._known[key] = self._told(last, value, tensors)
        return self._known[key]

    def _told(self, last: str, value: TensorEntry, tensors: Mapping[str, TensorEntry]) -> _Facts:
        found = _by_names(last, value, tensors)
        if found is not None:
            return found
        first = next((name for name in tensors if name != last and _FIRST.fullmatch(name)), None)
        if first is None:
            return _Facts("other")
        scale = tensors[first]
        if last.endswith("_packed") and value.dtype in _WIDE:
            return self._in_rows(value.shape, scale.shape, tensors.get(last.removesuffix("_packed") + "_shape"))
        if value.dtype == "int8" or (DTYPES[value.dtype].is_floating and not DTYPES[value.dtype].bits):
            method = "quanto" if last == "_data" else "int8" if value.dtype == "int8" else "fp8"
            return _Facts(method, value.dtype, 8, *_spread(value.shape, scale.shape, first))
        if scale.dtype.startswith("float8") or (scale.dtype == "uint8" and last.endswith(("_packed", "_blocks"))):
            micro = scale.dtype in ("uint8", "float8_e8m0fnu")  # exponents alone
            nbytes = _exact(value.numel, scale.numel)  # each holds two values
            size = 2 * nbytes if nbytes else None
            return _Facts("mxfp4" if micro else "nvfp4", "float4_e2m1fn", 4, "group", size)
        return _Facts("quanto" if last == "_data" else "other")

    def _in_rows(self, packed: tuple[int, ...], scales: tuple[int, ...], shape: TensorEntry | None) -> _Facts:
        """Of compressed-tensors: [out, in * bits / 32] beside scales [out, in / group] and the shape as values."""
        values = None if shape is None or len(self._known) >= _MAX_READ else small_values(shape, 2)
        wide = None if values is None else int(values[1])
        if not wide or wide < 0 or len(packed) != 2 or len(scales) != 2:
            return _Facts("compressed-tensors")
        bits = next((bits for bits in (4, 8, 2) if packed[1] == -(-wide // (32 // bits))), None)
        spread = _spread((packed[0], wide), scales)
        return _Facts("compressed-tensors", f"int{bits}" if bits else None, bits, *spread)


def _by_names(last: str, value: TensorEntry, tensors: Mapping[str, TensorEntry]) -> _Facts | None:
    """From names alone: the weight's and those beside it."""
    state = next((name for name in tensors if _STATE in name), "")
    if state or f"{last}.absmax" in tensors:
        absmax = tensors.get(f"{last}.absmax")
        run = None if absmax is None else _run(2 * value.nbytes, absmax.numel, 64)
        return _Facts("bitsandbytes", state.rpartition("__")[2] or None, 4, "group", run)
    if "SCB" in tensors:
        return _Facts("bitsandbytes", value.dtype, 8, "channel")
    if "codebooks" in tensors:
        return _Facts("aqlm")
    if last == "W_q":
        bits, size = (_number(tensors.get(name)) for name in ("nbits", "group_size"))
        return _Facts("hqq", None if bits is None else f"int{bits}", bits, "group" if size else None, size)
    if last == "qweight" and "scales" in tensors and value.dtype in _WIDE:
        return _in_columns({name: tensor.shape for name, tensor in tensors.items()})
    return None


def _of_torch(value: object) -> _Facts:
    """Of a value that torch quantized, or of parameters that it packed."""
    from ckptkit.normalize.not_plain import describe_value

    told = [describe_value(node) for node in walk(value) if call_of(node).kind == "quantized"]
    dtype = next((each.dtype for each in told if each is not None), None)
    return _Facts("torch", dtype, _TORCH_BITS.get(dtype or ""))


def _in_columns(shapes: Mapping[str, tuple[int, ...]]) -> _Facts:
    """Of GPTQ and AWQ: which of them it is, and how many bits, by what weights, zeros and scales have in common."""
    packed, scales, zeros, index = (shapes.get(name, ()) for name in ("qweight", "scales", "qzeros", "g_idx"))
    if len(packed) != 2 or len(scales) != 2:
        return _Facts("other")
    groups, out = scales
    known = {_exact(32 * zeros[1], out)} if len(zeros) == 2 else set()
    known |= {_exact(32 * packed[0], index[0])} if index else set()
    known -= {None}
    bits = known.pop() if len(known) == 1 else None
    if known:
        return _Facts("gptq" if index else "other", None, "mixed")
    dtype = f"int{bits}" if bits else None
    if packed[1] == out:
        method, wide = "gptq", 32 * packed[0] // bits if bits else None
    elif bits and 32 * packed[1] == out * bits:
        method, wide = "awq", packed[0]
    elif bits and packed[0] == groups:  # of the kernels for one row: all lies the other way, and scales may be padded
        size = _exact(32 * packed[1] // bits, out)
        return _Facts("awq", dtype, bits, "group", size if size in (32, 64, 128, 256) else None)
    else:
        return _Facts("other", dtype, bits)
    size = _exact(wide, groups) if wide and groups > 1 else None
    return _Facts(method, dtype, bits, "group" if groups > 1 else "channel", size)


def _spread(shape: tuple[int, ...], scales: tuple[int, ...], name: str = "") -> _Spread:
    """The part of a weight that each of its scales is for, by name."""
    rows, columns = (1, 1, *shape)[-2:]
    tall, wide = scales[-2:] if len(scales) > 1 else (math.prod(scales), 1)
    if not name.endswith("_inv") or len(scales) < 2:  # which are of blocks, however small the weight is
        if math.prod(scales) == 1 or (len(shape) > 2 and math.prod(scales) == math.prod(shape[:-2])):
            return "tensor", None, None
        if (tall, wide) in ((rows, 1), (1, columns)) or (len(scales) == 1 and tall == columns):
            return "channel", None, None
        if tall == rows:
            return "group", _exact(columns, wide), None
    block = _run(rows, tall, 128), _run(columns, wide, 128)
    return ("block", None, (block[0], block[1])) if block[0] and block[1] else (None, None, None)


def _exact(total: int, count: int) -> int | None:
    """How many there are of each of so many; ``None``: they do not come out even."""
    return total // count if count and total % count == 0 else None


def _run(total: int, count: int, usual: int) -> int | None:
    """How long each of so many runs is, of which the last may be shorter: the most common length that fits."""
    sizes = (usual, 64, 32, 16, 256, 512, 1024, 2048, 4096)
    return next((size for size in sizes if -(-total // size) == count), _exact(total, count))


def _number(entry: TensorEntry | None) -> int | None:
    values = None if entry is None else small_values(entry, 1)
    return None if values is None else int(values[0])


def quantized_text(found: QuantizationDocument) -> str:
    """It in a line."""
    told = []
    for layout in found["layouts"]:
        facts = [f"{layout['bits']} bits" if isinstance(layout["bits"], int) else layout["bits"] and "bits mixed"]
        facts.append(layout["dtype"] if layout["dtype"] and not layout["dtype"].startswith("int") else None)
        size, block = layout["group_size"], layout["block"]
        facts.append(
            f"groups of {size:,}" if size else f"blocks of {' x '.join(map(str, block))}" if block
            else f"one scale per {layout['strategy']}" if layout["strategy"] else None
        )  # fmt: skip
        names = listed([printable(name)[:60] for name in layout["companions"]], 8)
        words = ", ".join([_CALLED.get(layout["method"], layout["method"]), *filter(None, facts)])
        told.append(f"{words} ({count_of(layout['modules'], 'module')} of {names})")
    plain = f"; {count_of(found['plain'], 'other module')} with plain values" if found["plain"] else ""
    return f"{listed(told, _MAX_SHOWN, between='; ')}{plain}"
