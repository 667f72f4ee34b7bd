"""torch-zip: what ``torch.save`` writes since 1.6.

Layout: a zip archive of stored records under one root folder, whose name is the file's stem at
saving time and means nothing (``caffe2/serialize/inline_container.cc``, ``torch/serialization.py``
``_save`` and ``_load``):

- ``data.pkl``: the object, pickle protocol 2, storages as persistent ids
- ``data/KEY``: the bytes of one storage; KEY counts from 0 in order of first appearance
- ``version``: a number in decimal; torch reads 1 to 10 and writes 3
- ``byteorder``: ``little`` or ``big``; missing in files before 2.1 means little
- ``.format_version``, ``.storage_alignment``, ``.data/serialization_id``: newer, not needed
- ``ckptkit/metadata.json``: string metadata as safetensors has it, ours; others pass over it

A reader must accept any root name (dots included), records it does not know, deflated records,
missing ``byteorder``, missing checksums.  It must not accept two roots.  Storages that are deflated
are not read before their bytes are asked for (`ckptkit.derived.DeflatedRange`).

The writer emits ``data.pkl``, ``byteorder``, ``data/KEY``, metadata if any, ``version`` under the root ``archive``,
data aligned to 64 bytes, checksums recorded; torch 1.6 and later load it.  It leaves out
``.format_version``: with it torch may compute record offsets from its own writer's layout instead
of reading them.  The same checkpoint gives the same bytes.

What `ckptkit.formats.torch_archive` says is common to all of torch's archives is not repeated here.
"""

from __future__ import annotations

import json

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry
from ckptkit.errors import CorruptError, RewriteError, UnsupportedError
from ckptkit.formats.archives.zip_writer import ZipWriter
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.strict_json import parse
from ckptkit.formats.torch_archive import METADATA, TorchArchive, archive_kind
from ckptkit.normalize import RawCheckpoint, lower_state_dict
from ckptkit.normalize.beside import PROGRAMS
from ckptkit.pickling.tensors import StorageTable, lower_storage, lower_tensor
from ckptkit.pickling.writer import write_pickle
from ckptkit.plan import Plan

__all__ = ["FORMAT", "written_tree"]

_NAME = "torch-zip"


def _sniff(probe: Probe) -> bool:
    return archive_kind(probe) == _NAME


def _read(probe: Probe) -> RawCheckpoint:
    archive = TorchArchive(probe.records or {}, probe.limits)
    version, byteorder = archive.version(), archive.byteorder()
    table = StorageTable(archive.locator("data/"), byteorder=byteorder, limits=probe.limits)
    pickle = archive.pickle("data.pkl", table)
    return RawCheckpoint(
        root=pickle.root,
        format=_NAME,
        format_version=version,
        byteorder=byteorder,
        pickle_protocol=pickle.protocol,
        writer=archive.writer(),
        metadata=_metadata(archive),
        globals=archive.uses(),
        findings=tuple(archive.findings()),
    )


def _metadata(archive: TorchArchive) -> dict[str, str]:
    """The string metadata.

    Raises:
        CorruptError: the record is no JSON object of strings.
    """
    if METADATA not in archive.records:
        return {}
    document = parse(archive.read(METADATA, archive.limits.index_nbytes), archive.limits, METADATA)
    if not isinstance(document, dict) or not all(isinstance(value, str) for value in document.values()):
        raise CorruptError("the metadata must be a JSON object that maps strings to strings", where=METADATA)
    return document


def written_tree(checkpoint: Checkpoint) -> object:
    """What is written of a checkpoint: its tree, or of a program its state_dict alone.

    Raises:
        RewriteError: it is a program, and none of its sections was selected.
    """
    if checkpoint.origin.format not in PROGRAMS:
        return checkpoint.rest
    if checkpoint.origin.state_path is None:
        raise RewriteError(
            f"{checkpoint.origin.path}: of a {checkpoint.origin.format} file only the weights can be written, "
            "and none are selected; name the section with --section"
        )
    return STATE_DICT


def _write(checkpoint: Checkpoint) -> Plan:
    keys: dict[int, str] = {}
    used: list[Storage] = []
    tensors = 0

    def lower(node: object) -> object:
        nonlocal tensors
        if node is STATE_DICT:
            return lower_state_dict(checkpoint.state_dict)
        if isinstance(node, TensorEntry):
            tensors += 1
            return lower_tensor(node)
        if isinstance(node, Storage):
            if id(node) not in keys:
                keys[id(node)] = str(len(used))
                used.append(node)
            return lower_storage(node, keys[id(node)])
        return node

    # Of a program only the state_dict is written, as torch would; no name in it means another thing in protocol 2.
    protocol = None if checkpoint.origin.format in PROGRAMS else checkpoint.origin.pickle_protocol
    data = write_pickle(written_tree(checkpoint), lower=lower, protocol=protocol)
    byteorders = {storage.byteorder for storage in used if storage.dtype not in ("bool", "uint8", "int8")}
    if len(byteorders) > 1:
        raise UnsupportedError("storages of both byte orders cannot be written into one file")
    archive = ZipWriter("archive")
    archive.add_literal("data.pkl", data)
    archive.add_literal("byteorder", (byteorders.pop() if byteorders else "little").encode())
    for key, storage in enumerate(used):
        archive.add_copy(f"data/{key}", storage.source, storage.crc32)
    if checkpoint.metadata:
        text = json.dumps(dict(checkpoint.metadata), ensure_ascii=True, indent=1).encode()
        archive.add_literal(METADATA, text, is_final=False)
    archive.add_literal("version", b"3\n")
    steps, nbytes = archive.finish()
    return Plan(format=_NAME, nbytes=nbytes, steps=steps, tensors=tensors, aliases={})


FORMAT = Format(name=_NAME, suffixes=(".pth", ".pt", ".pkl", ".ckpt", ".bin"), sniff=_sniff, read=_read, write=_write)
