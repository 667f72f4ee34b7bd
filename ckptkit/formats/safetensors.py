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

Tied tensors are stored once.  For each other name ``__metadata__`` holds ``name: kept name``, as
``safetensors.torch.save_model`` records them and ``load_model`` expects; the name kept is the first
in alphabetical order, as there.  The reader gives such names their tensor back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from struct import pack

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Checkpoint, StateDict, Storage, TensorEntry, contiguous_stride
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, DTypeError, FormatError, LimitError, RewriteError
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.safetensors_header import METADATA, Layout, check_extents, compact, layout, strings
from ckptkit.formats.strict_json import parse, shown
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict
from ckptkit.plan import Gather, Literal, Plan, Step, moved
from ckptkit.report import Finding, convert_command

__all__ = ["FORMAT"]

_NAME = "safetensors"
_ALIGNMENT = 8


def _sniff(probe: Probe) -> bool:
    head = probe.head
    if len(head) < 9:
        return False
    header_nbytes = int.from_bytes(head[:8], "little")
    # A plausible size and a brace: text, pickles and zips have larger first words or no brace there.
    return head[8:9] == b"{" and header_nbytes < 1 << 40


def _read(probe: Probe) -> RawCheckpoint:
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
    entries.update({name: entries[kept] for name, kept in aliases.items()})
    return RawCheckpoint(
        root=InertDict(list(entries.items())),
        format=_NAME,
        metadata={key: value for key, value in metadata.items() if key not in aliases},
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
            message=f"{len(odd)} of {len(layouts)} tensors, such as {shown(odd[0])}, begin at no multiple of their "
            "elements' width",
            fix=convert_command(path),
        )


def _write(checkpoint: Checkpoint) -> Plan:
    state_dict = checkpoint.state_dict
    if not state_dict:
        raise RewriteError("there is no state_dict to write; safetensors holds named tensors only")
    _refuse(state_dict)
    metadata = {"format": "pt", **checkpoint.metadata}
    aliases = _aliases(state_dict, metadata)
    for key, value in metadata.items():
        if value in state_dict and key not in state_dict and key != "format":
            raise RewriteError(
                f"metadata {key!r}: its value {value!r} is a tensor's name, so readers take it for a tie"
            )
    metadata.update(aliases)
    stored = [name for name in state_dict if name not in aliases]
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(stored, key=lambda name: -state_dict[name].itemsize):
        offsets[name] = position
        position += state_dict[name].nbytes
    header = _header(state_dict, stored, offsets, metadata)
    steps: list[Step] = [Literal(0, header)]
    for name, offset in offsets.items():
        entry = state_dict[name]
        if entry.nbytes == 0:
            continue
        target = len(header) + offset
        if entry.is_plain_bytes:
            start = entry.storage_offset * entry.itemsize
            steps.append(moved(target, entry.storage.source.part(start, entry.nbytes)))
        else:
            steps.append(Gather(target, entry))
    return Plan(
        format=_NAME, nbytes=len(header) + position, steps=tuple(steps), tensors=len(state_dict), aliases=aliases
    )


def _refuse(state_dict: StateDict) -> None:
    """Raise for what safetensors cannot hold, naming all of it.

    Raises:
        DTypeError: tensors of a dtype it does not know.
        RewriteError: values that are no plain tensors, or a tensor of a reserved name.
    """
    odd = [f"{name} ({entry.dtype})" for name, entry in state_dict.items() if DTYPES[entry.dtype].safetensors is None]
    if odd:
        raise DTypeError(f"safetensors cannot hold {', '.join(odd[:5])}{_more(odd)}; write a .pth, or cast them first")
    if state_dict.extra:
        extra = list(state_dict.extra)
        raise RewriteError(
            f"safetensors holds plain tensors only, not {', '.join(extra[:5])}{_more(extra)}; write a .pth"
        )
    grown = {name: entry.nbytes - entry.storage.nbytes for name, entry in state_dict.items()}
    if sum(more for more in grown.values() if more > 0) > DEFAULT_LIMITS.expanded_nbytes:
        name = max(grown, key=grown.__getitem__)
        entry = state_dict[name]
        raise RewriteError(
            f"{name!r} of shape {entry.shape} and stride {entry.stride} would take {entry.nbytes:,} bytes, its storage "
            f"has {entry.storage.nbytes:,}: safetensors cannot repeat elements; write a .pth, or leave it out"
        )
    if METADATA in state_dict:
        raise RewriteError(f"a tensor cannot be named {METADATA!r} in safetensors; rename it, or write a .pth")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def _aliases(state_dict: StateDict, metadata: Mapping[str, str]) -> dict[str, str]:
    """For every name that is tied to another one: the name under which the tensor is stored.

    A name that is a key of the metadata already cannot be recorded there again: it is kept.

    Raises:
        RewriteError: two such names are tied to each other.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, entry in state_dict.items():
        if entry.nbytes:
            groups.setdefault(entry.view, []).append(name)
    kept = {min(group, key=lambda n: (n not in metadata, n)): group for group in groups.values() if len(group) > 1}
    aliases = {name: keep for keep, group in kept.items() for name in group if name != keep}
    if taken := aliases.keys() & metadata.keys():
        raise RewriteError(
            f"tied tensors are recorded in the metadata under their names, where {', '.join(sorted(taken))} stands "
            "already; rename them, or write a .pth"
        )
    return aliases


def _header(state_dict: StateDict, stored: list[str], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The length and the padded JSON."""
    document: dict[str, object] = {METADATA: dict(metadata)}
    for name in stored:
        entry = state_dict[name]
        document[name] = {
            "dtype": DTYPES[entry.dtype].safetensors,
            "shape": list(entry.shape),
            "data_offsets": [offsets[name], offsets[name] + entry.nbytes],
        }
    try:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RewriteError("a name that is not valid Unicode cannot stand in a safetensors header") from None
    text += b" " * (-len(text) % _ALIGNMENT)
    return pack("<Q", len(text)) + text


FORMAT = Format(name=_NAME, suffixes=(".safetensors",), sniff=_sniff, read=_read, write=_write)
