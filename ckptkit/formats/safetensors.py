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

The module versions of a state_dict (``_metadata``), which decide how BatchNorm and others load, stand in
``__metadata__`` under `VERSIONS` as JSON, where they are plain values; other readers pass over it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from struct import pack

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Checkpoint, StateDict, Storage, TensorEntry, contiguous_stride
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, FormatError, LimitError, RewriteError
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.holdable import require_holdable, require_writable_size
from ckptkit.formats.safetensors_header import METADATA, Layout, check_extents, compact, layout, strings
from ckptkit.formats.strict_json import parse, shown
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import Global, InertDict, Object, mapping_items
from ckptkit.plan import Gather, Literal, Plan, Step, moved
from ckptkit.report import Finding, convert_command

__all__ = ["FORMAT", "VERSIONS", "versions_text"]

_NAME = "safetensors"
_ALIGNMENT = 8

VERSIONS = "torch._metadata"
"""Key of the metadata that holds a state_dict's module versions."""


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
    versions = _versions(metadata.get(VERSIONS), limits)
    own = aliases.keys() if versions is None else {*aliases, VERSIONS}
    return RawCheckpoint(
        root=_root(entries, versions),
        format=_NAME,
        metadata={key: value for key, value in metadata.items() if key not in own},
        findings=tuple(_alignment(layouts, start, file.path)),
    )


def _versions(text: str | None, limits: Limits) -> dict[str, object] | None:
    """The module versions as inert nodes; ``None``: there are none, or it is something else."""
    if text is None:
        return None
    try:
        document = parse(text.encode("utf-8", "surrogatepass"), limits, VERSIONS)
    except FormatError:
        return None
    if not isinstance(document, dict) or not all(_is_version(version) for version in document.values()):
        return None
    return {path: InertDict(list(version.items())) for path, version in document.items()}


def _is_version(node: object) -> bool:
    return isinstance(node, dict) and all(isinstance(value, (bool, int, str)) for value in node.values())


def _root(entries: Mapping[str, object], versions: Mapping[str, object] | None) -> object:
    """The state_dict: an OrderedDict with ``_metadata`` where there are module versions, else a dict."""
    if versions is None:
        return InertDict(list(entries.items()))
    root, recorded = (Object("reduce", Global("collections", "OrderedDict"), ()) for _ in range(2))
    root.pairs, recorded.pairs = list(entries.items()), list(versions.items())
    root.state = InertDict([("_metadata", recorded)])
    return root


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
    require_holdable(checkpoint, _NAME, plain=True)
    require_writable_size(checkpoint)
    if METADATA in state_dict:
        raise RewriteError(f"a tensor cannot be named {METADATA!r} in safetensors; rename it, or write a .pth")
    metadata = {"format": "pt", **checkpoint.metadata}
    if (versions := versions_text(state_dict)) is not None and VERSIONS not in metadata:
        metadata[VERSIONS] = versions
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


def versions_text(state_dict: StateDict) -> str | None:
    """The module versions as JSON; ``None``: there are none, or JSON cannot hold them."""
    if state_dict.versions is None:
        return None
    document: dict[str, dict[str, object]] = {}
    for path, version in state_dict.versions.items():
        pairs = mapping_items(version)
        fields = {key: value for key, value in pairs or [] if isinstance(key, str)}
        if pairs is None or len(fields) != len(pairs) or not _is_version(fields):
            return None
        document[path] = fields
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True)


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
