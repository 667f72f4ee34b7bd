"""torch-tar: what ``torch.save`` wrote in torch 0.1 until early 2017 (0.1.8 still did, pytorch issue 1263).

Layout (``torch/serialization.py`` ``legacy_load``, and ``_save`` of those releases): a tar archive of
four plain files (`ckptkit.formats.tar_archive`), in no order that matters:

- ``sys_info``: a pickle of ``{'protocol_version': 1000, 'little_endian': bool, 'type_sizes': {...}}``
- ``pickle``: the object.  A tensor or storage is the persistent id of its key as text; a class of the
  model, at its first use, ``(class, file, source)``
- ``tensors``: a pickle of their number; for each a pickle ``(key, storage's key, type)``, the number
  of dimensions (4 bytes, then 4 that mean nothing), sizes, strides, offset (8 bytes each)
- ``storages``: a pickle of their number; for each a pickle ``(key, location, class)``, the number of
  elements (8 bytes), the elements; then a pickle of the list of views, ``(key, storage's key, offset,
  numel)``, counted in elements

Keys are the addresses the objects had, one for each tensor and storage.  All numbers are
little-endian.  A tensor whose storage's key is ``None`` has no elements.

A reader must accept views, tensors that nothing names, parameters with their gradients
(`ckptkit.pickling.dialects`), pickles of any protocol.  Every member must be used up to its last byte.
Tar archives that are something else are refused by what they begin with.  Torch extracts members into a folder to read
them; here they are read in place.
"""

from __future__ import annotations

import contextlib
from struct import Struct
from typing import TypeGuard

from ckptkit.checkpoint import GlobalUse, Storage, TensorEntry
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnknownFormatError, UnsupportedError
from ckptkit.formats.format import Probe
from ckptkit.formats.tar_archive import Member, read_members
from ckptkit.formats.torch_legacy import PickleRow, legacy_findings
from ckptkit.formats.truncated import unfinished
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.dialects import LegacyTable
from ckptkit.pickling.inert import Global, InertDict
from ckptkit.pickling.reader import PickleResult
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import count_of, share_of
from ckptkit.startup import dataclass

__all__ = ["holds_one", "read"]

_NAME = "torch-tar"
_PROTOCOL = 1000
_MEMBERS = ("sys_info", "pickle", "tensors", "storages")

_MAX_MEMBERS = 8
"""Members that are read: one more than torch writes is one too many, a few more are named."""

_OBJECT_NBYTES = 1 << 20
"""The first window for the object."""

_DIMENSIONS = Struct("<i4x")


def holds_one(probe: Probe) -> bool:
    """Whether a tar archive has the members of a checkpoint, or the first of them: it may have been cut off."""
    names: list[str] = []
    with contextlib.suppress(FormatError):  # the members that were met count
        for member in read_members(probe.file.whole, probe.limits, _MAX_MEMBERS):
            names.append(member.name)
    return names[:1] != [] and (names[0] in _MEMBERS or {"pickle", "tensors", "storages"} <= set(names))


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    return _Reader(probe).read()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A record of the member ``tensors``."""

    key: int
    storage_key: int | None
    cls: Global
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Reader:
    """One run over one archive."""

    def __init__(self, probe: Probe) -> None:
        self._file = probe.file
        self._limits = probe.limits
        self._table = LegacyTable(probe.file, probe.limits)
        self._objects: dict[int, Storage | TensorEntry] = {}
        self._uses: list[GlobalUse] = []

    def read(self) -> RawCheckpoint:
        """The tree and the archive's facts.

        Raises:
            FormatError: it is damaged, refused, or no checkpoint.
        """
        members, needed = self._members()
        try:
            info = self._row(members["sys_info"])
            self._check_info(info.plain("sys_info"))
            self._finish(info, "sys_info")
            records = self._tensors(self._row(members["tensors"]))
            self._storages(self._row(members["storages"]), records, needed)
            for record in records:
                self._define(record.key, self._tensor(record), "tensors")
            pickle = self._object(self._row(members["pickle"]))
        except FormatError as error:
            raise error.at(seen=tuple(self._uses)) from error.__cause__
        return RawCheckpoint(
            root=self._table.understood(pickle),
            format=_NAME,
            format_version=str(_PROTOCOL),
            pickle_protocol=pickle.protocol,
            writer="torch 0.1, of early 2017 or before",
            globals=merge_uses(self._uses),
            discarded=pickle.discarded,
            findings=tuple(legacy_findings(self._table)),
        )

    # The archive.

    def _members(self) -> tuple[dict[str, Member], int]:
        """The four members, and the size in bytes that the file has at least if it is whole."""
        found: list[Member] = []
        cut: CorruptError | LimitError | None = None
        try:
            for member in read_members(self._file.whole, self._limits, _MAX_MEMBERS):
                found.append(member)
        except (CorruptError, LimitError) as error:
            if not found or isinstance(error, AmbiguousError):
                raise
            cut = error
        names = [member.name for member in found]
        needed = max((member.start + member.nbytes for member in found), default=0)
        if not {"pickle", "tensors", "storages"} <= set(names):
            if cut is not None and set(names) <= set(_MEMBERS):
                raise cut
            shown = ", ".join(f"{name!r:.80}" for name in names[:4]) or "nothing"
            raise UnknownFormatError(
                f"a tar archive that is not a checkpoint: torch's has the members {', '.join(_MEMBERS)}, but this "
                f"one begins with {shown}. Unpack it first (tar -xf)"
            )
        if sorted(names) != sorted(_MEMBERS) or any(member.kind != "0" for member in found):
            shown = ", ".join(f"{member.name!r:.80} (type {member.kind!r})" for member in found)
            raise AmbiguousError(f"the members {', '.join(_MEMBERS)} are expected, each once, as files; found {shown}")
        if cut is not None and needed <= self._file.size:
            raise cut
        if found[-1].name != "storages" and needed > self._file.size and cut is not None:
            raise cut
        return {member.name: member for member in found}, needed

    def _row(self, member: Member) -> PickleRow:
        row = PickleRow(member.data(self._file.whole), self._limits)
        row.uses = self._uses
        return row

    @staticmethod
    def _finish(row: PickleRow, where: str) -> None:
        if row.left:
            raise CorruptError(
                f"{count_of(row.left, 'byte', 'follows', 'follow')} the member's content", where=where, offset=row.pos
            )

    @staticmethod
    def _check_info(info: object) -> None:
        version = info.get("protocol_version", _PROTOCOL) if isinstance(info, InertDict) else None
        if version != _PROTOCOL:
            raise UnsupportedError(f"only protocol version {_PROTOCOL} is supported", where="sys_info")

    # Its members.

    def _tensors(self, row: PickleRow) -> list[_Tensor]:
        where, records = "tensors", []
        for number in range(self._count(row, where)):
            part = f"{where}, record {number}"
            described = self._described(row, part)
            if len(described) != 3 or not _is_key(described[0]) or not isinstance(described[2], Global):
                raise UnsupportedError("a tensor's record is not (key, storage's key, type)", where=part)
            if described[1] is not None and not _is_key(described[1]):
                raise UnsupportedError("a tensor's record whose storage has no key", where=part)
            (dimensions,) = _DIMENSIONS.unpack(row.raw(_DIMENSIONS.size, part).read())
            if not 0 <= dimensions <= self._limits.dimensions:
                raise CorruptError(f"a tensor of {dimensions:,} dimensions: damaged", where=part)
            shape, stride = (tuple(row.count(part) for _ in range(dimensions)) for _ in range(2))
            records.append(
                _Tensor(
                    key=described[0],
                    storage_key=described[1],
                    cls=described[2],
                    shape=shape,
                    stride=stride,
                    offset=row.count(part),
                )
            )
        self._finish(row, where)
        return records

    def _storages(self, row: PickleRow, records: list[_Tensor], needed: int) -> None:
        where = "storages"
        total = done = 0
        try:
            total = self._count(row, where)
            for done in range(total):
                self._storage(row, f"{where}, record {done}")
            done = total
            views = row.plain(where)
        except CorruptError as error:
            if needed <= self._file.size:
                raise
            raise CorruptError(self._truncated(records, done, total, needed), where=where) from error
        if not isinstance(views, list):
            raise CorruptError("a list of views is expected", where=where, offset=row.pos)
        for view in views:
            if not isinstance(view, tuple) or len(view) != 4 or not all(_is_key(number) for number in view):
                raise CorruptError("a view that is not (key, storage's key, offset, size)", where=where)
            key, root, offset, numel = view
            self._define(key, self._table.view(self._storage_of(root, where), str(key), offset, numel), where)
        self._finish(row, where)

    def _storage(self, row: PickleRow, where: str) -> None:
        described = self._described(row, where)
        if len(described) != 3 or not _is_key(described[0]):
            raise UnsupportedError(
                "a storage's record is not (key, location, class): written before torch 0.1 was released", where=where
            )
        key, location, cls = described
        numel = row.count(where)
        storage = self._table.persistent_load(("storage", cls, str(key), location, numel))
        if not isinstance(storage, Storage):
            raise CorruptError("a storage's record that does not name a storage", where=where)
        self._table.settle(storage.key, row.raw(storage.nbytes, where))
        self._define(key, storage, where)

    def _tensor(self, record: _Tensor) -> TensorEntry:
        where = "tensors"
        if record.storage_key is None:
            storage: object = self._table.persistent_load(
                ("storage", Global(record.cls.module, record.cls.name.replace("Tensor", "Storage")),
                 f"of tensor {record.key}", "cpu", 0)
            )  # fmt: skip
        else:
            storage = self._storage_of(record.storage_key, where)
        entry = self._table.tensor(storage, record.offset, record.shape, record.stride)
        if not isinstance(entry, TensorEntry):
            raise UnsupportedError(f"tensor {record.key} has elements that are not plain numbers", where=where)
        return entry

    def _object(self, row: PickleRow) -> PickleResult:
        where = "pickle"
        pickle = row.pickle(
            where,
            persistent_load=self._persistent_load,
            constructors=self._table.constructors,
            window=_OBJECT_NBYTES,
        )
        self._finish(row, where)
        return pickle

    def _persistent_load(self, pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) == 3:
            return self._table.module(pid)
        if not isinstance(pid, str) or not pid.isdecimal() or not pid.isascii() or len(pid) > 20:
            raise UnsupportedError("a persistent id that is neither a key nor a class with its source")
        found = self._objects.get(int(pid))
        if found is None:
            raise CorruptError(f"the object names a tensor or storage {pid} that does not exist")
        return found

    # What the members have in common.

    def _count(self, row: PickleRow, where: str) -> int:
        count = row.plain(where)
        if not _is_key(count):
            raise CorruptError("a number of records is expected", where=where)
        if count > self._limits.entries:
            raise LimitError("records", limit=self._limits.entries, actual=count, where=where)
        return count

    def _described(self, row: PickleRow, where: str) -> tuple[object, ...]:
        described = row.pickle(where).root
        return described if isinstance(described, tuple) else ()

    def _define(self, key: object, value: Storage | TensorEntry, where: str) -> None:
        if not _is_key(key) or key in self._objects:
            raise AmbiguousError(f"the key {str(key)[:20]} is given to two tensors or storages", where=where)
        self._objects[key] = value

    def _storage_of(self, key: int, where: str) -> Storage:
        storage = self._objects.get(key)
        if not isinstance(storage, Storage):
            raise CorruptError(f"storage {str(key)[:20]} is named but does not exist: damaged", where=where)
        return storage

    def _truncated(self, records: list[_Tensor], done: int, total: int, needed: int) -> str:
        whole = [record for record in records if record.storage_key is None or record.storage_key in self._objects]
        return (
            f"truncated: the file has {self._file.size:,} bytes, but at least {needed:,} are expected "
            f"({needed - self._file.size:,} missing); {share_of(done, total, 'storage', 'is', 'are')} complete, "
            f"{share_of(len(whole), len(records), 'tensor', 'is', 'are')} whole. Download or "
            f"copy the file again{unfinished(self._file.path)}"
        )


def _is_key(node: object) -> TypeGuard[int]:
    """A key, a size or an offset: a whole number of at most 64 bits that is not negative."""
    return node.__class__ is int and 0 <= node < 1 << 64
