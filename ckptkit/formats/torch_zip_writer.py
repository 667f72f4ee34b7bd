"""A layout for writing ZIP archives as torch does: stored records, aligned data, zip64 where needed.

The format is described in `ckptkit.formats.zip_archive`.  Sizes are in the local headers, so no data descriptors
follow; checksums that are not known beforehand are filled in by the plan.

The writing half of `ckptkit.formats.torch_zip`, where the layout is described.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from struct import pack

from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, Storage, TensorEntry
from ckptkit.computed import ByteSource
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError, RewriteError, UnsupportedError
from ckptkit.formats.containers import format_named
from ckptkit.formats.torch_archive import METADATA
from ckptkit.formats.zip_archive import UTF8
from ckptkit.formats.zip_records import CENTRAL, END, END64, LOCAL, LOCAL_SIGNATURE, LOCATOR, MAX16, MAX32, STORED
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.selection import discarded_text, held_instead, paths_listed
from ckptkit.pickling.tensors import is_rebuilt_alone, lower_storage, lower_tensor
from ckptkit.pickling.writer import write_pickle
from ckptkit.plan import Checksum, LiteralBytes, Plan, Step, moved
from ckptkit.report import count_of, glob_of, listed

__all__ = ["ALIGNMENT", "ZipWriter", "archive_of", "finished", "require_torch_dtypes", "write", "written_tree"]

ALIGNMENT = 64
"""torch aligns every record's data to this many bytes, by padding the local header's extra field."""

_DOS_DATE = 0x0021  # 1 January 1980, the first date the format can express


class ZipWriter:
    """Lays out an archive of stored records as torch does: aligned data, zip64 where needed.

    Adding a record only plans it; `finish` gives the steps and the size.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._steps: list[Step] = []
        self._checksums: list[Checksum] = []
        self._central: list[tuple[bytes, int | None, int, int]] = []  # name, crc, size, header offset
        self._data_at: list[int] = []
        self._pos = 0

    def add_literal(self, name: str, data: bytes, *, is_final: bool = True) -> None:
        """Plan a record of bytes in memory; records that are filled in later are not final."""
        target = self._header(name, len(data), zlib.crc32(data) if is_final else None)
        self._steps.append(LiteralBytes(target, data))

    def add_copy(self, name: str, source: ByteSource, crc32: int | None) -> int:
        """Plan a record that is copied, and return the position of its data.

        Args:
            name: below the root.
            source: the bytes.
            crc32: of exactly these bytes if known; ``None``: computed from the output.
        """
        target = self._header(name, source.nbytes, crc32)
        if source.nbytes:
            self._steps += moved(target, source)
        return target

    def _header(self, name: str, nbytes: int, crc: int | None) -> int:
        """Plan a local header at the current position; returns where the data begins."""
        raw = f"{self._root}/{name}".encode()
        at = self._pos
        wide = nbytes >= MAX32
        extra = pack("<HHQQ", 1, 16, nbytes, nbytes) if wide else b""
        data_at = at + LOCAL.size + len(raw) + len(extra) + 4  # 4: tag and length of the padding
        padding = -data_at % ALIGNMENT
        extra += b"FB" + pack("<H", padding) + b"Z" * padding
        size = MAX32 if wide else nbytes
        header = LOCAL.pack(
            LOCAL_SIGNATURE,
            45 if wide else 20,
            UTF8,
            STORED,
            0,
            _DOS_DATE,
            crc or 0,
            size,
            size,
            len(raw),
            len(extra),
        )
        self._steps.append(LiteralBytes(at, header + raw + extra))
        data_at += padding
        if crc is None and nbytes:
            self._checksums.append(Checksum(at + 14, data_at, nbytes))
        self._central.append((raw, crc if nbytes else 0, nbytes, at))
        self._data_at.append(data_at)
        self._pos = data_at + nbytes
        return data_at

    def finish(self) -> tuple[tuple[Step, ...], int]:
        """The steps, checksums last, and the size in bytes of the archive."""
        start = self._pos
        directory = bytearray()
        for (raw, crc, nbytes, at), data_at in zip(self._central, self._data_at, strict=True):
            version, size, offset, extra = 20, nbytes, at, b""
            if nbytes >= MAX32 or at >= MAX32:
                wide = [value for value in (nbytes, nbytes, at) if value >= MAX32]
                extra = pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide)
                version, size, offset = 45, min(nbytes, MAX32), min(at, MAX32)
            if crc is None:
                self._checksums.append(Checksum(start + len(directory) + 16, data_at, nbytes))
            directory += CENTRAL.pack(
                b"PK\x01\x02", version, version, UTF8, STORED, 0, _DOS_DATE, crc or 0,
                size, size, len(raw), len(extra), 0, 0, 0, 0, offset,
            )  # fmt: skip
            directory += raw + extra
        nbytes, count, end_at = len(directory), len(self._central), start + len(directory)
        if count >= MAX16 or nbytes >= MAX32 or start >= MAX32:
            directory += END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, nbytes, start)
            directory += LOCATOR.pack(b"PK\x06\x07", 0, end_at, 1)
        directory += END.pack(
            b"PK\x05\x06", 0, 0, min(count, MAX16), min(count, MAX16), min(nbytes, MAX32), min(start, MAX32), 0
        )
        self._steps.append(LiteralBytes(start, bytes(directory)))
        return (*self._steps, *self._checksums), start + len(directory)


NAME = "torch-zip"


def written_tree(checkpoint: Checkpoint) -> object:
    """The written part of a checkpoint: its tree, or for a program only its state_dict.

    Raises:
        RewriteError: it is a program, and none of its sections was selected, or it has no weights; its pickle makes
            what belongs to nothing in the tree.
    """
    if not checkpoint.origin.is_program:
        if checkpoint.discarded:
            raise RewriteError(
                f"{checkpoint.origin.path}: its pickle makes {discarded_text(checkpoint.discarded)} and discards "
                "the result, which a .pth would lose; --weights-only leaves it out, and so does a .safetensors",
                path=checkpoint.origin.path,
            )
        return checkpoint.rest
    only = f"{checkpoint.origin.path}: only the weights of a {checkpoint.origin.format} file can be written, and"
    if checkpoint.origin.state_path is None:
        weights = paths_listed(checkpoint.sections)
        if weights:
            raise RewriteError(f"{only} none are selected; name the section with --section: {weights}")
        raise RewriteError(f"{only} {held_instead(checkpoint)}")
    if not checkpoint.state_dict.everything:
        frozen = any(finding.code == "frozen-program" for finding in checkpoint.findings)
        why = "has none with names, as in a frozen program" if frozen else "contains no named tensors"
        raise RewriteError(f"{only} it {why}")
    return STATE_DICT


def write(checkpoint: Checkpoint) -> Plan:
    """The plan of a torch-zip; see `ckptkit.formats.torch_zip` for the layout.

    Raises:
        RewriteError: as `written_tree`.
        DTypeError: a tensor that torch could load and not use, or has no dtype for.
        UnsupportedError: storages of both byte orders.
    """
    require_torch_dtypes(checkpoint.state_dict)
    # Of a program only the state_dict is written, as torch would; no name in it means another thing in protocol 2.
    protocol = None if checkpoint.origin.is_program else checkpoint.origin.pickle_protocol
    has_pickle = format_named(checkpoint.origin.format).has_pickle
    tree = written_tree(checkpoint)
    archive, tensors = archive_of(tree, checkpoint.state_dict, protocol=protocol, common_sizes=has_pickle)
    if checkpoint.metadata:
        text = json.dumps(dict(checkpoint.metadata), ensure_ascii=True, indent=1).encode()
        archive.add_literal(METADATA, text, is_final=False)
    steps, nbytes = finished(archive)
    return Plan(format=NAME, nbytes=nbytes, steps=steps, tensors=tensors, aliases={})


def require_torch_dtypes(entries: Mapping[str, TensorEntry]) -> None:
    """Raise where torch lacks a tensor's dtype.

    Raises:
        DTypeError: it does.
    """
    if unknown := [name for name, entry in entries.items() if DTYPES[entry.dtype].bits]:
        raise DTypeError(
            f"torch has no dtype for {count_of(len(unknown), 'tensor')}: "
            f"{listed([f'{name:.100} ({entries[name].dtype})' for name in unknown], 4)}; write a "
            f".safetensors, which stores all of them, or leave them out with --exclude {glob_of(unknown[0])}",
            names=unknown,
        )


def archive_of(
    root: object, state_dict: StateDict, *, protocol: int | None = None, common_sizes: bool = True
) -> tuple[ZipWriter, int]:
    """An archive of one tree, to be `finished`.

    Args:
        root: the tree.
        state_dict: the node in the place of the marker `STATE_DICT` in it.
        protocol: see `ckptkit.pickling.writer.write_pickle`.
        common_sizes: likewise.

    Returns:
        It, and the number of tensors in it.

    Raises:
        DTypeError: a tensor that torch could load and not use.
        UnsupportedError: storages of both byte orders.
    """
    keys: dict[int, str] = {}
    used: list[Storage] = []
    tensors = 0

    def lower(node: object) -> object:
        nonlocal tensors
        if node is STATE_DICT:
            return lower_state_dict(state_dict)
        if isinstance(node, TensorEntry):
            tensors += 1
            _require_usable(node)
            return node.storage if is_rebuilt_alone(node) else lower_tensor(node)
        if isinstance(node, Storage):
            if id(node) not in keys:
                keys[id(node)] = str(len(used))
                used.append(node)
            return lower_storage(node, keys[id(node)])
        return node

    data = write_pickle(root, lower=lower, protocol=protocol, common_sizes=common_sizes)
    byteorders = {storage.byteorder for storage in used if storage.dtype not in ("bool", "uint8", "int8")}
    if len(byteorders) > 1:
        told = "storages of both byte orders cannot be written into one torch file"
        raise UnsupportedError(f"{told}; a .safetensors has only one order: write that, and then a .pth from it")
    archive = ZipWriter("archive")
    archive.add_literal("data.pkl", data)
    archive.add_literal("byteorder", (byteorders.pop() if byteorders else "little").encode())
    for key, storage in enumerate(used):
        archive.add_copy(f"data/{key}", storage.source, storage.crc32)
    return archive, tensors


def finished(archive: ZipWriter) -> tuple[tuple[Step, ...], int]:
    """The steps and the size of a torch archive, once its last record is in it."""
    archive.add_literal("version", b"3\n")
    return archive.finish()


def _require_usable(entry: TensorEntry) -> None:
    """Raise for the negated view that a cast can make and torch cannot resolve: it negates no 8-bit floats."""
    if entry.is_neg and DTYPES[entry.dtype].is_floating and DTYPES[entry.dtype].itemsize == 1:
        raise DTypeError(
            f"a lazily negated tensor of shape {entry.shape} would be {entry.dtype} in the output, which torch loads "
            "but cannot use; write a .safetensors, which stores its values, or keep its dtype with --keep-dtype"
        )
