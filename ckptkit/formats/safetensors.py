"""The header of a safetensors file: its facts about each tensor, and whether they are possible.

Everything here is checked in the header itself and against the number of bytes after it; the layout is described in
`ckptkit.formats.safetensors`.  Each thing that can be wrong has its message.

Compared with the safetensors library (0.8, ``safetensors/src/tensor.rs``) this reader refuses more:

- a header that does not begin with ``{``, as the format's description says it must
- duplicate names, of which the library takes the last and other parsers the first
- a tensor described by a list instead of an object, or a dtype by an object, which serde accepts too
- numbers from 2^62 on (as sizes beside a 0): torch counts in 63 bits
- more than `Limits.entries` tensors or `Limits.dimensions` dimensions
- values of unknown fields nested more than 100 deep; the library stops at 128

safetensors: a JSON header followed by plain tensors.

Layout (the safetensors project's README "Format" and ``safetensors/src/tensor.rs``):

- 8 bytes: header size N, little-endian, at most 100,000,000
- N bytes: UTF-8 JSON that begins with ``{`` and may end in spaces; each key is a tensor's name with ``dtype``,
  ``shape`` and ``data_offsets`` [begin, end) in bytes after the header; the key ``__metadata__`` maps strings to
  strings
- the data: contiguous, C order, little-endian; no holes, no overlaps, nothing after it

A reader must accept data that is not aligned (older files); a finding says so.
`ckptkit.formats.safetensors` describes errors in a header, and where this reader is stricter than the library.

The writer pads the header with spaces so that data begins at a multiple of 8, and orders tensors by element width,
widest first, so that each is aligned; names are in the header in state_dict order. It refuses tensors that repeat their
elements beyond all use (`Limits.expanded_nbytes`).

Tied tensors are stored once, under the first of their names in state_dict order.  For each other name
``__metadata__`` holds ``name: kept name``, as ``safetensors.torch.save_model`` records them; ``load_model`` takes
whichever name is there.  The reader gives such names their tensor back, and their places
(`ckptkit.formats.json_text`).

The module versions of a state_dict (``_metadata``), which decide how BatchNorm and others load, are in ``__metadata__``
under `VERSIONS` as JSON, if they are plain values; other readers ignore them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn, TypeGuard

from ckptkit.bytesource import Source, byte_range
from ckptkit.checkpoint import contiguous_stride
from ckptkit.dtypes import BY_SAFETENSORS, DTYPES, DType
from ckptkit.errors import CorruptError, FormatError, LimitError
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import (
    ORDER,
    VERSIONS,
    check_count,
    check_ignored,
    in_order,
    parse,
    shown,
    state_dict_node,
    versions_from,
)
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.report import Finding, convert_command, count_of, share_of
from ckptkit.tensor import storage_of, tensor_of

__all__ = ["METADATA", "NAME", "TensorLayout", "check_extents", "compact", "header_shape", "layout", "read", "strings"]

NAME = "safetensors"

METADATA = "__metadata__"
"""The one key of a header that is not a tensor's name."""

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_HUGE = 1 << 62
"""More than any size or offset: torch counts in signed 64 bits, and sums must not reach them."""
_MAX_COUNT = (1 << 64) - 1
_JSON_TYPES: dict[type, str] = {
    dict: "an object", tuple: "an object", list: "a list", str: "a string", int: "a number", float: "a number",
    bool: "a boolean", type(None): "null",
}  # fmt: skip

TensorLayout = tuple[DType, tuple[int, ...], int, int]
"""A tensor as its header describes it: element type, shape, first byte and the byte after the last.

F4 and F6 are smaller than a byte.  torch has the first as pairs, whose last dimension counts one for two
(``safetensors/bindings/python/src/lib.rs`` does the same); if it is odd, torch has no such tensor.
"""

_WIDEST = max(row.itemsize for row in BY_SAFETENSORS.values())
_PACKED = DTYPES["float4_e2m1fn_x2"]
_UNPACKED = DTYPES["float4_e2m1fn"]


def compact(fields: dict[str, object]) -> object:
    """A tensor's description as soon as it is parsed, in a fifth of the memory; anything else unchanged."""
    if len(fields) == 3 and fields.keys() == _FIELDS:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        row = BY_SAFETENSORS.get(dtype) if isinstance(dtype, str) else None
        if row is not None and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2:
            if row is _PACKED:
                row, shape = _as_torch(row, shape)
            return row, tuple(shape), offsets[0], offsets[1]
    return fields


def _as_torch(row: DType, shape: list[int]) -> tuple[DType, tuple[int, ...]]:
    """The dtype and shape that torch has of F4's."""
    if not shape or shape[-1] % 2:
        return _UNPACKED, tuple(shape)
    return row, (*shape[:-1], shape[-1] // 2)


def header_shape(row: DType, shape: tuple[int, ...]) -> list[int]:
    """The shape of a torch tensor, from the header."""
    return [*shape[:-1], 2 * shape[-1]] if row is _PACKED else list(shape)


def strings(node: object) -> dict[str, str]:
    """The file's own metadata.

    Raises:
        CorruptError: it is something other than strings by name.
    """
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise CorruptError(f"{METADATA} must be an object that maps strings to strings")
    for key, value in node.items():
        if not isinstance(value, str):
            raise CorruptError(
                f"{METADATA} must map strings to strings; the value of {shown(key)} is {_JSON_TYPES[type(value)]}"
            )
    return node


def layout(name: str, info: object, limits: Limits) -> TensorLayout:
    """The header's facts about a tensor, checked for themselves.

    Raises:
        CorruptError: a field is missing or not what it must be.
        LimitError: too many dimensions.
    """
    if not isinstance(info, tuple):
        info = _explained(name, info)
    row, shape, begin, end = info
    if len(shape) > limits.dimensions:
        raise LimitError(f"dimensions of tensor {shown(name)}", limit=limits.dimensions, actual=len(shape))
    numel = math.prod(shape)
    if numel * row.itemsize != end - begin if not row.bits else numel * row.bits != 8 * (end - begin):
        _refuse_size(name, row, shape, begin, end)
    bits = row.bits or row.itemsize * 8
    if 0 in shape and any(size > _MAX_COUNT for size in itertools.accumulate((*shape, bits), operator.mul)):
        raise CorruptError(f"tensor {shown(name)}: shape {_brief(shape)} overflows 64 bits before its 0")
    return info


def _explained(name: str, info: object) -> TensorLayout:
    """The slow way to a `TensorLayout`, for anything odd or wrong: unknown fields are ignored, as in the library.

    Raises:
        As `layout`.
    """
    what = f"tensor {shown(name)}"
    if not isinstance(info, dict):
        raise CorruptError(f"{what} is described by {_JSON_TYPES[type(info)]}, not by an object")
    if missing := [field for field in ("dtype", "shape", "data_offsets") if field not in info]:
        raise CorruptError(f"{what}: {' and '.join(missing)} missing; dtype, shape and data_offsets are expected")
    for field, value in info.items():
        if field not in _FIELDS:
            check_ignored(value, f"{what}, field {shown(field)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str):
        raise CorruptError(f"{what}: its dtype is {_JSON_TYPES[type(dtype)]}, not a string")
    row = BY_SAFETENSORS.get(dtype)
    if row is None:
        raise CorruptError(f"{what}: unknown dtype {shown(dtype)}; known: {', '.join(BY_SAFETENSORS)}")
    if not _are_counts(shape):
        raise CorruptError(f"{what}: its shape must be a list of whole numbers from 0 to 2^62; it is {_brief(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CorruptError(
            f"{what}: its data_offsets must be two whole numbers, begin and end; it is {_brief(offsets)}"
        )
    return *(_as_torch(row, shape) if row is _PACKED else (row, tuple(shape))), offsets[0], offsets[1]


def _are_counts(node: object) -> TypeGuard[list[int]]:
    # The class itself: True is an int too.
    return isinstance(node, list) and all(number.__class__ is int and 0 <= number < _HUGE for number in node)


def _brief(node: object) -> str:
    """A list in a file, for a message: cut if it is long, with nothing below it shown."""
    if not isinstance(node, (list, tuple)):
        return _JSON_TYPES[type(node)]
    parts = [repr(part)[:40] if isinstance(part, (int, float)) else _JSON_TYPES[type(part)] for part in node[:8]]
    return f"[{', '.join(parts)}{', ...' if len(node) > 8 else ''}]"


def _refuse_size(name: str, row: DType, shape: tuple[int, ...], begin: int, end: int) -> NoReturn:
    what = f"tensor {shown(name)}"
    if end < begin:
        raise CorruptError(f"{what}: its data_offsets end at {end:,}, before they begin at {begin:,}")
    bits = math.prod(shape) * (row.bits or row.itemsize * 8)
    stated = f"{bits // 8:,}" if bits < 8 * _HUGE else "over 2^62"  # such numbers are slow to print
    stated = f"{bits} bits, not a whole number of" if bits % 8 else stated
    raise CorruptError(
        f"{what}: shape {_brief(header_shape(row, shape))} of {row.safetensors} is {stated} "
        f"{'byte' if stated == '1' else 'bytes'}, but its data_offsets cover {end - begin:,}"
    )


def check_extents(layouts: Mapping[str, TensorLayout], nbytes: int) -> None:
    """Hold the tensors' places against each other and against the bytes that are there.

    Raises:
        CorruptError: a hole, an overlap, bytes that belong to no tensor, or fewer than are declared.
    """
    position = 0
    for _, _, begin, end in layouts.values():
        if begin != position:
            break
        position = end
    else:
        if position == nbytes:  # in the order of their names, as the library writes them
            return
    extents = sorted((begin, end, name) for name, (_, _, begin, end) in layouts.items())
    position = 0
    for begin, end, name in extents:
        if begin != position:
            what = (
                "overlaps another tensor"
                if begin < position
                else f"leaves a hole of {count_of(begin - position, 'byte')}"
            )
            raise CorruptError(f"tensor {shown(name)}: data at {begin:,} {what}")
        position = end
    if position < nbytes:
        raise CorruptError(
            f"{count_of(nbytes - position, 'byte', 'follows', 'follow')} the last tensor", where="data", offset=position
        )
    if position > nbytes:
        cut = [name for _, end, name in extents if end > nbytes]
        raise CorruptError(
            f"truncated: {nbytes:,} of {position:,} bytes of data are present ({position - nbytes:,} missing); "
            f"{share_of(len(extents) - len(cut), len(extents), 'tensor', 'is', 'are')} complete, the first "
            f"incomplete one is {shown(cut[0])}. Download or copy the file again",
            where="data",
            names=cut,
        )


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    try:
        return _read_header(probe.file, probe.limits, probe.prefix)
    except FormatError as error:
        raise error.at(where="header") from error.__cause__


def _read_header(file: Source, limits: Limits, prefix: str) -> RawCheckpoint:
    header_nbytes = int.from_bytes(file.read(0, 8), "little")
    if header_nbytes > limits.header_nbytes:
        if 8 + header_nbytes > file.size:
            raise CorruptError(
                f"its first 8 bytes say that {header_nbytes:,} bytes of header follow; the file has {file.size:,}, and "
                f"no reader accepts more than {limits.header_nbytes:,}: damaged, or not a safetensors file"
            )
        raise LimitError("bytes of a safetensors header", limit=limits.header_nbytes, actual=header_nbytes)
    if 8 + header_nbytes > file.size:
        raise CorruptError(
            f"truncated: a header of {header_nbytes:,} bytes is declared, but the file has {file.size:,} in "
            "all and no tensors. Download or copy the file again"
        )
    layouts, metadata = _layouts(file.read(8, header_nbytes), limits)
    start = 8 + header_nbytes
    check_extents(layouts, file.size - start)
    entries = _entries(layouts, file, start, prefix)
    aliases = {name: kept for name, kept in metadata.items() if name not in entries and kept in entries}
    aliases.pop("format", None)  # the one key every writer sets; its value is never a tensor's name
    entries, is_ordered = in_order(
        entries, {name: entries[kept] for name, kept in aliases.items()}, metadata.get(ORDER)
    )
    versions = versions_from(metadata.get(VERSIONS), limits)
    own = {*aliases, *([VERSIONS] if versions is not None else ()), *([ORDER] if is_ordered else ())}
    return RawCheckpoint(
        root=state_dict_node(entries, versions),
        format=NAME,
        metadata={key: value for key, value in metadata.items() if key not in own},
        findings=tuple(_alignment(layouts, start, file.path)),
        is_prefixed=True,
    )


def _layouts(raw: bytes, limits: Limits) -> tuple[dict[str, TensorLayout], dict[str, str]]:
    """Every tensor's layout, checked in itself, and the file's own metadata.

    Raises:
        FormatError: the header is not as described above.
    """
    with contextlib.suppress(FormatError):  # the JSON reader will say what is wrong
        found = _customary(raw, limits)
        if found is not None:
            return found
    header = parse(raw, limits, "the header", compact)
    if not isinstance(header, dict):
        raise CorruptError("the header is not a JSON object of tensors by name")
    if len(header) > limits.entries:
        raise LimitError("tensors in one file", limit=limits.entries, actual=len(header))
    metadata = strings(header.pop(METADATA, None))
    return {name: layout(name, info, limits) for name, info in header.items()}, metadata


_STRING = r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
_COUNT = "(?:0|[1-9][0-9]{0,17})"
_OWN = re.compile(rf'\{{"{METADATA}":(\{{(?:{_STRING}:{_STRING}(?:,(?=")|(?=\}})))*\}})[,}}]')
"""How a header begins that has metadata."""

_TENSOR = re.compile(r'"([^"\\\x00-\x1f]*)":\{"dtype":"([^]]*)\],"data_offsets":\[([0-9]{1,18}),([0-9]{1,18})\]\},')
"""A tensor as the safetensors library and this writer write it; its dtype, shape and numbers need another look."""

_KIND = re.compile(rf'([A-Z0-9_]*)","shape":\[((?:{_COUNT}(?:,{_COUNT})*)?)')
"""The dtype and the shape of a tensor, between a quotation mark and a bracket."""

_NUMBER = re.compile(_COUNT)

_OWN_NBYTES = 1 << 20
"""Bytes of metadata that the pattern is given; with each of its strings it takes memory."""

_CUSTOMARY_NBYTES = 32 << 20
"""Bytes of a header, of 300,000 tensors, that are parsed at once: the pieces take ten times as many."""

_FIXED_NBYTES = len('"":{"dtype":"],"data_offsets":[,]},')


def _customary(raw: bytes, limits: Limits) -> tuple[dict[str, TensorLayout], dict[str, str]] | None:
    """The same, at a quarter of the time, where the header is as the library writes it.

    ``None``: it does not have exactly this form, and nothing more is known.

    Raises:
        FormatError: something is wrong with it, perhaps something other than the message says.
    """
    check_count(raw, limits, "the header")
    if len(raw) > _CUSTOMARY_NBYTES or not raw.isascii():
        return None
    text = str(raw, "ascii").rstrip(" ")
    own = _OWN.match(text, 0, _OWN_NBYTES)
    metadata = strings(parse(own[1].encode(), limits, "the header")) if own is not None else {}
    start = 1 if own is None else own.end()
    if not text.startswith("{") or not text.endswith("}") or start >= len(text):
        return None
    found = _TENSOR.findall(text[start:-1] + ",")
    # Nothing was skipped: the matches are as long as the text.
    if len("".join(itertools.chain.from_iterable(found))) + _FIXED_NBYTES * len(found) != len(text) - start:
        return None
    if len(found) > limits.entries:
        return None
    layouts: dict[str, TensorLayout] = {}
    known: dict[str, tuple[DType, tuple[int, ...], int]] = {}
    end, before = 0, "0"
    for name, described, first, last in found:
        begin = end if first == before else int(first)
        end = int(last)
        alike = known.get(described)
        if alike is not None and end - begin == alike[2] and first == before and last[0] != "0":
            layouts[name] = alike[0], alike[1], begin, end
        else:
            kind = _KIND.fullmatch(described)
            if kind is None or not all(map(_NUMBER.fullmatch, (first, last))):
                return None
            shape = list(map(int, kind[2].split(","))) if kind[2] else []
            info = layout(name, compact({"dtype": kind[1], "shape": shape, "data_offsets": [begin, end]}), limits)
            layouts[name] = info
            known[described] = info[0], info[1], end - begin
        before = last
    return None if len(layouts) < len(found) or METADATA in layouts else (layouts, metadata)


def _entries(layouts: Mapping[str, TensorLayout], file: Source, start: int, prefix: str) -> dict[str, object]:
    """The tensors, each with its own storage; ``prefix`` is before the storages' keys."""
    entries: dict[str, object] = {}
    strides: dict[int, tuple[int, ...]] = {}  # of the shapes in the layouts, which do not move
    for name, (row, shape, begin, end) in layouts.items():
        stride = strides.get(id(shape))
        if stride is None:
            stride = strides[id(shape)] = contiguous_stride(shape)
        dtype, nbytes = row.name, end - begin
        source = byte_range(file, start + begin, nbytes)
        storage = storage_of(prefix + name, dtype if row.storage_class else None, nbytes, "cpu", source)
        entries[name] = tensor_of(storage, 0, shape, stride, dtype)
    return entries


def _alignment(layouts: Mapping[str, TensorLayout], start: int, path: str) -> Iterator[Finding]:
    if math.gcd(start, *[begin for _, _, begin, _ in layouts.values()]) % _WIDEST == 0:
        return
    odd = [name for name, (row, _, begin, end) in layouts.items() if (start + begin) % row.itemsize and end > begin]
    if odd:
        yield Finding(
            code="unaligned-data",
            severity="info",
            message=f"{share_of(len(odd), len(layouts), 'tensor')}, such as {shown(odd[0])}, "
            f"{'begins' if len(odd) == 1 else 'begin'} at an offset that is not a multiple of the element size",
            fix=convert_command(path),
        )
