"""torch-zip: what ``torch.save`` writes since 1.6.

Layout: a zip archive of stored records under one root folder, whose name is the file's stem at
saving time and means nothing (``caffe2/serialize/inline_container.cc``, ``torch/serialization.py``
``_save`` and ``_load``):

- ``data.pkl``: the object, pickle protocol 2, storages as persistent ids
- ``data/KEY``: the bytes of one storage; KEY counts from 0 in order of first appearance
- ``version``: a number in decimal; torch reads 1 to 10 and writes 3
- ``byteorder``: ``little`` or ``big``; missing in files before 2.1 means little
- ``.format_version``, ``.storage_alignment``, ``.data/serialization_id``: newer, not needed

A reader must accept any root name (dots included), records it does not know, deflated small
records, missing ``byteorder``, missing checksums.  It must not accept two roots.

The writer emits ``data.pkl``, ``byteorder``, ``data/KEY``, ``version`` under the root ``archive``,
data aligned to 64 bytes, checksums recorded; torch 1.6 and later load it.  It leaves out
``.format_version``: with it torch may compute record offsets from its own writer's layout instead
of reading them.  The same checkpoint gives the same bytes.

Related archives are recognised and refused by name: TorchScript (``constants.pkl``, ``code/``).
"""

from __future__ import annotations

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry
from ckptkit.errors import CorruptError, FormatError, UnknownFormatError, UnsupportedError
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.zip_archive import Record, read_record
from ckptkit.formats.zip_writer import ZipWriter
from ckptkit.normalize import RawCheckpoint, lower_state_dict
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.tensors import StorageTable, lower_storage, lower_tensor
from ckptkit.pickling.trust import global_uses
from ckptkit.pickling.writer import write_pickle
from ckptkit.plan import Plan
from ckptkit.report import Finding

__all__ = ["FORMAT"]

_NAME = "torch-zip"
_MAX_VERSION = 10


def _sniff(probe: Probe) -> bool:
    return probe.records is not None


def _read(probe: Probe) -> RawCheckpoint:
    records, limits = probe.records or {}, probe.limits
    root = _root(records)
    findings: list[Finding] = []

    def small(name: str) -> str | None:
        record = records.get(f"{root}/{name}")
        return None if record is None else read_record(record, limits.record_nbytes).decode("ascii", "replace").strip()

    version = small("version")
    if version is not None and (not version.isdecimal() or not 0 < int(version[:9]) <= _MAX_VERSION):
        raise UnsupportedError(f"format version {version[:20]!r}; 1 to {_MAX_VERSION} are known", where="version")
    byteorder = small("byteorder") or "little"
    if byteorder not in ("little", "big"):
        raise CorruptError(f"byte order {byteorder[:20]!r}; little or big is expected", where="byteorder")

    unrecorded = 0

    def locate(key: str, nbytes: int) -> tuple[ByteRange, int | None]:
        nonlocal unrecorded
        record = records.get(f"{root}/data/{key}")
        if record is None:
            raise CorruptError(f"storage {key!r} has no record data/{key}: damaged, or not written by torch")
        if record.deflated:
            raise UnsupportedError(f"storage {key!r} is compressed; store the archive's records uncompressed")
        if record.nbytes != nbytes:
            raise CorruptError(f"storage {key!r} is declared as {nbytes:,} bytes, its record holds {record.nbytes:,}")
        unrecorded += record.crc32 is None
        return record.data, record.crc32

    table = StorageTable(locate, byteorder=byteorder, limits=limits)
    data = read_record(records[f"{root}/data.pkl"], limits.pickle_nbytes)
    try:
        pickle = read_pickle(
            data, persistent_load=table.persistent_load, constructors=table.constructors, limits=limits
        )
        if pickle.end != len(data):
            raise CorruptError(f"{len(data) - pickle.end:,} bytes follow the pickle's STOP", offset=pickle.end)
    except FormatError as error:
        raise error.at(where="data.pkl") from error.__cause__
    if unrecorded:
        findings.append(
            Finding(
                code="crc-not-recorded",
                severity="info",
                message=f"{unrecorded} storages carry no checksum: damage to them cannot be seen",
            )
        )
    return RawCheckpoint(
        root=pickle.root,
        format=_NAME,
        format_version=version,
        byteorder="big" if byteorder == "big" else "little",
        pickle_protocol=pickle.protocol,
        metadata={},
        globals=global_uses(pickle.globals),
        findings=tuple(findings),
    )


def _root(records: dict[str, Record]) -> str:
    """The archive's root folder.

    Raises:
        UnknownFormatError: a zip archive that is no checkpoint.
        UnsupportedError: a related archive.
        CorruptError: two roots.
    """
    roots = {name.split("/", 1)[0] for name in records}
    holders = [
        name.removesuffix("/data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if not holders:
        if any("/.data/" in name or name.endswith("/version") for name in records):
            raise UnsupportedError("a torch archive without data.pkl (torch.package, or an exported program)")
        shown = ", ".join(repr(name) for name in list(records)[:3])
        raise UnknownFormatError(f"a zip archive without data.pkl is no checkpoint; it begins with {shown}")
    if len(roots) > 1:
        raise CorruptError(f"an archive with {len(roots)} root folders ({', '.join(sorted(roots)[:3])}); torch has one")
    root = holders[0]
    if f"{root}/constants.pkl" in records or any(name.startswith(f"{root}/code/") for name in records):
        raise UnsupportedError("a TorchScript archive (torch.jit.save); in Python, torch.jit.load opens it")
    return root


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

    data = write_pickle(checkpoint.rest, lower=lower, protocol=checkpoint.origin.pickle_protocol)
    byteorders = {storage.byteorder for storage in used if storage.dtype not in ("bool", "uint8", "int8")}
    if len(byteorders) > 1:
        raise UnsupportedError("storages of both byte orders cannot be written into one file")
    archive = ZipWriter("archive")
    archive.add_literal("data.pkl", data)
    archive.add_literal("byteorder", (byteorders.pop() if byteorders else "little").encode())
    for key, storage in enumerate(used):
        archive.add_copy(f"data/{key}", storage.source, storage.crc32)
    archive.add_literal("version", b"3\n")
    steps, nbytes = archive.finish()
    return Plan(format=_NAME, nbytes=nbytes, steps=steps, tensors=tensors, aliases={})


FORMAT = Format(name=_NAME, suffixes=(".pth", ".pt", ".pkl", ".ckpt", ".bin"), sniff=_sniff, read=_read, write=_write)
