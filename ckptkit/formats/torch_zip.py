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
are not read before their bytes are asked for (`ckptkit.computed.DeflatedRange`).

The writer emits ``data.pkl``, ``byteorder``, ``data/KEY``, metadata if any, ``version`` under the root ``archive``,
data aligned to 64 bytes, checksums recorded; torch 1.6 and later load it.  It leaves out
``.format_version``: with it torch may compute record offsets from its own writer's layout instead
of reading them.  The same checkpoint gives the same bytes.

`ckptkit.formats.torch_archive` describes what all torch archives have in common.
"""

from __future__ import annotations

from dataclasses import replace

from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CorruptError
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import parse
from ckptkit.formats.torch_archive import METADATA, TorchArchive
from ckptkit.formats.zip_archive import Records
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.tensors import StorageTable

__all__ = ["read", "read_archive"]

NAME = "torch-zip"


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    return read_archive(probe.records, probe.limits)


def read_archive(records: Records | None, limits: Limits) -> RawCheckpoint:
    """The same for an archive inside another source.

    Args:
        records: that it has.
        limits: bounds on what it may ask for.

    Raises:
        FormatError: it is damaged or refused.
    """
    archive = TorchArchive(records, limits)
    version, byteorder = archive.version(), archive.byteorder()
    table = StorageTable(archive.locator("data/"), byteorder=byteorder, limits=limits)
    pickle = archive.pickle("data.pkl", table)
    return RawCheckpoint(
        root=pickle.root,
        format=NAME,
        format_version=version,
        byteorder=byteorder,
        pickle_protocol=pickle.protocol,
        writer=archive.writer(),
        metadata=_metadata(archive),
        globals=_without_code(archive.uses()),
        discarded=archive.discarded,
        findings=tuple(archive.findings()),
    )


def _without_code(uses: tuple[GlobalUse, ...]) -> tuple[GlobalUse, ...]:
    """The verdicts: objects of TorchScript's, as libtorch's ``pickle_save`` writes them, have no code in the file."""
    reason = "a TorchScript object whose code is not in the file; the program that loads it must have that code"
    return tuple(replace(use, reason=reason) if use.name.startswith("__torch__.") else use for use in uses)


def _metadata(archive: TorchArchive) -> dict[str, str]:
    """The string metadata.

    Raises:
        CorruptError: the record is not a JSON object of strings.
    """
    if METADATA not in archive.records:
        return {}
    document = parse(archive.read(METADATA, archive.limits.index_nbytes), archive.limits, METADATA)
    if not isinstance(document, dict) or not all(isinstance(value, str) for value in document.values()):
        raise CorruptError("the metadata must be a JSON object that maps strings to strings", where=METADATA)
    return document
