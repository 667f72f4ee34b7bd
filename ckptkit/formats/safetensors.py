"""safetensors: a JSON header and plain tensors behind it.

Layout (the safetensors project's README "Format" and ``safetensors/src/tensor.rs``):

- 8 bytes: header size N, little-endian, at most 100,000,000
- N bytes: UTF-8 JSON that begins with ``{`` and may end in spaces; each key is a tensor's name with
  ``dtype``, ``shape`` and ``data_offsets`` [begin, end) in bytes behind the header; the key
  ``__metadata__`` maps strings to strings
- the data: contiguous, C order, little-endian; no holes, no overlaps, nothing behind

A reader must accept data that is not aligned (older files); a finding says so.
What is wrong with a header, and where this reader is stricter than the library, is in
`ckptkit.formats.safetensors_header`.

The writer pads the header with spaces so that data begins at a multiple of 8, and orders tensors by
element width, widest first, so that each is aligned; names stand in the header in state_dict order.
It refuses tensors that repeat their elements beyond all use (`Limits.expanded_nbytes`).

Tied tensors are stored once, under the first of their names in state_dict order.  For each other name
``__metadata__`` holds ``name: kept name``, as ``safetensors.torch.save_model`` records them; ``load_model`` takes
whichever name is there.  The reader gives such names their tensor back, and their places
(`ckptkit.formats.tied_order`).

The module versions of a state_dict (``_metadata``), which decide how BatchNorm and others load, stand in
``__metadata__`` under `VERSIONS` as JSON, where they are plain values; other readers pass over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Storage, TensorEntry, contiguous_stride
from ckptkit.errors import CorruptError, FormatError, LimitError
from ckptkit.formats.format import Probe
from ckptkit.formats.module_versions import VERSIONS, state_dict_node, versions_from
from ckptkit.formats.safetensors_header import METADATA, NAME, Layout, check_extents, compact, layout, strings
from ckptkit.formats.strict_json import parse, shown
from ckptkit.formats.tied_order import ORDER, in_order
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.report import Finding, convert_command, count_of

__all__ = ["read"]


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    try:
        return _read_header(probe.file, probe.limits)
    except FormatError as error:
        raise error.at(where="header") from error.__cause__


def _read_header(file: SourceFile, limits: Limits) -> RawCheckpoint:
    header_nbytes = int.from_bytes(file.read(0, 8), "little")
    if header_nbytes > limits.header_nbytes:
        if 8 + header_nbytes > file.size:
            raise CorruptError(
                f"its first 8 bytes say that {header_nbytes:,} bytes of header follow; the file has {file.size:,}, and "
                f"no reader takes more than {limits.header_nbytes:,}: damaged, or no safetensors file"
            )
        raise LimitError("bytes of a safetensors header", limit=limits.header_nbytes, actual=header_nbytes)
    if 8 + header_nbytes > file.size:
        raise CorruptError(
            f"truncated: a header of {header_nbytes:,} bytes is declared, the file has {file.size:,} in all; "
            "no tensor is there. Get the file again"
        )
    header = parse(file.read(8, header_nbytes), limits, "the header", compact)
    if not isinstance(header, dict):
        raise CorruptError("the header is no JSON object of tensors by name")
    if len(header) > limits.entries:
        raise LimitError("tensors in one file", limit=limits.entries, actual=len(header))
    metadata = strings(header.pop(METADATA, None))
    layouts = {name: layout(name, info, limits) for name, info in header.items()}
    del header
    start = 8 + header_nbytes
    check_extents(layouts, file.size - start)
    entries: dict[str, object] = {name: _entry(name, place, file, start) for name, place in layouts.items()}
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
    )


def _entry(name: str, place: Layout, file: SourceFile, start: int) -> TensorEntry:
    row, shape, begin, end = place
    storage = Storage(
        key=name,
        dtype=row.name if row.storage_class else None,
        nbytes=end - begin,
        location="cpu",
        source=ByteRange(file, start + begin, end - begin),
    )
    return TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype=row.name)


def _alignment(layouts: Mapping[str, Layout], start: int, path: str) -> Iterator[Finding]:
    odd = [name for name, (row, _, begin, end) in layouts.items() if (start + begin) % row.itemsize and end > begin]
    if odd:
        yield Finding(
            code="unaligned-data",
            severity="info",
            message=f"{len(odd)} of {count_of(len(layouts), 'tensor')}, such as {shown(odd[0])}, begin at no "
            "multiple of their elements' width",
            fix=convert_command(path),
        )
