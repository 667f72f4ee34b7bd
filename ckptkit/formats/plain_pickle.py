"""pickle: tensors that Python's own pickle wrote, or cloudpickle: ``pickle.dump(model.state_dict(), file)``.

Layout: one pickle of any protocol and nothing after it.  A tensor is the call that torch-zip has for it, too
(`ckptkit.pickling.tensors`).  Where that names a storage, here stands ``torch.storage._load_from_bytes(data)``
(``torch/storage.py`` ``__reduce__``), whose argument is a whole file of `ckptkit.formats.torch_legacy` with nothing but
that storage in it.  Since protocol 3 that is an opcode with the bytes behind it, and the storage lies where it lies;
before, it is a text that ``_codecs.encode`` makes bytes of, which are put into a temporary file.

Each call gives a storage of its own: tensors that shared one share it no longer, unless pickle saw that they are one
object.  A call that was given anything else stays the call it is.

A pickle without a torch storage is no checkpoint, whatever it names (`ckptkit.formats.refused_contents`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.computed import spooled
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnknownFormatError
from ckptkit.formats.format import Probe
from ckptkit.formats.torch_legacy import begins_one, legacy_findings, storage_in
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.dialects import LegacyTable
from ckptkit.pickling.inert import Global, InertDict, Object, children, walk
from ckptkit.pickling.machine import LOADER, Constructor
from ckptkit.pickling.reader import PickleResult, holds_legacy, read_pickle
from ckptkit.pickling.trust import global_uses
from ckptkit.report import count_of

__all__ = ["outcome", "read"]

_NAME = "pickle"

_TEXT = 8
"""How many times the bytes of other pickles one may have that holds its storages as text."""

_BEGIN_NBYTES = 64
"""First bytes of a storage's file that tell what it is."""


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    found = outcome(probe)
    if isinstance(found, RawCheckpoint):
        return found
    raise found or UnknownFormatError("no pickle of torch tensors")


def outcome(probe: Probe) -> RawCheckpoint | FormatError | None:
    """What the file says, or why it cannot be read; ``None``: it is no pickle, or one without a storage."""
    if _NAME not in probe.outcomes:
        probe.outcomes[_NAME] = _attempt(probe)
    return probe.outcomes[_NAME]


def _attempt(probe: Probe) -> RawCheckpoint | FormatError | None:
    if begins_one(probe.head):
        return None
    from ckptkit.formats.magic import guess_pickle  # only here, as many patterns take a moment to compile

    if guess_pickle(probe.head, probe.file.size) is None:
        return None
    data = probe.file.read(0, min(probe.file.size, probe.limits.pickle_nbytes))
    if LOADER[1].encode() not in data:
        return None
    table = _Table(probe.file, probe.limits)
    try:
        pickle = table.read(data)
    except FormatError as error:
        from ckptkit.formats.refused_contents import names_joblib  # whose arrays stand between the opcodes

        return error if holds_legacy(data) and not names_joblib(error.globals) else None
    if not table.storages:
        return None
    root = table.understood(pickle)
    return RawCheckpoint(
        root=root,
        format=_NAME,
        pickle_protocol=pickle.protocol if _needs_protocol([root, pickle.discarded]) else None,
        globals=global_uses(pickle.globals),
        discarded=pickle.discarded,
        findings=tuple(legacy_findings(table)),
    )


def _needs_protocol(root: object) -> bool:
    """Whether anything might mean something else in the protocol of torch's own files; torch warns of every other."""
    for node in walk(root):
        if isinstance(node, Global):
            if node.module.partition(".")[0] not in ("torch", "collections") or "." in node.name:
                return True
        elif not isinstance(node, (list, tuple, InertDict, TensorEntry, Storage, Object)):
            return True
    return False


_MOST = 25_000
"""Storages that are read: each is five small pickles of its own, and takes some 0.4 ms."""


class _Held(bytes):
    """The beginning of the bytes of a storage's file, whose pickles stand in it.

    Attributes:
        storage: which lies in them; its key is that of the file.
    """

    storage: Storage


class _Table(LegacyTable):
    """The storages of a plain pickle, in the order of their calls."""

    def __init__(self, file: Source, limits: Limits) -> None:
        super().__init__(file, limits)
        self._file = file
        self._held: dict[int, _Held | None] = {}  # by where it begins
        self._room = _TEXT * limits.pickle_nbytes
        self._spooled: dict[bytes, Storage | None] = {}

    @property
    def constructors(self) -> dict[tuple[str, str], Constructor]:
        """As `StorageTable.constructors`, and the call that makes a storage."""
        return {**super().constructors, LOADER: self._load}

    def read(self, data: bytes) -> PickleResult:
        """The pickle that begins with the data.

        Raises:
            FormatError: it is damaged or refused.
        """
        read = partial(read_pickle, data, constructors=self.constructors, limits=self._limits, more=self._more)
        result = read(hold=self._hold)
        nodes = walk([result.root, result.discarded])
        if any(isinstance(part, _Held) for node in nodes for part in children(node)):  # it is wanted as bytes, too
            self._storages.clear()
            result = read()
        left = self._file.size - result.end
        if left:
            follow = count_of(left, "byte", "follows", "follow")
            raise AmbiguousError(
                f"{follow} the pickle, which pickle.load does not read; save each pickle into a file of its own",
                offset=result.end,
            )
        return result

    def _more(self, nbytes: int) -> bytes:
        """The file up to a later position; storages that stay where they lie do not count as bytes of the pickle."""
        size = self._file.size
        if nbytes < size and self._room <= nbytes:
            raise LimitError("bytes of a pickle beside its storages", limit=self._room, actual=nbytes + 1)
        return self._file.read(0, min(size, 2 * nbytes))

    def _hold(self, start: int, nbytes: int) -> bytes | None:
        if start not in self._held:
            self._held[start] = None
            left = self._file.size - start
            if left < nbytes:
                if begins_one(self._file.read(start, min(left, _BEGIN_NBYTES))):
                    raise CorruptError(f"a storage's {nbytes:,} bytes are declared, {left:,} are left: truncated")
                return None
            source = ByteRange(self._file, start, nbytes)
            storage = self._storage_in(source, start)
            if storage is not None:
                held = self._held[start] = _Held(source.read(0, nbytes - storage.nbytes))
                held.storage = storage
                self._room += nbytes
        return self._held[start]

    def _load(self, args: tuple[object, ...]) -> object:
        data = args[0] if len(args) == 1 else None
        if isinstance(data, _Held):
            storage: Storage | None = data.storage
        elif isinstance(data, bytes):
            if data not in self._spooled:
                self._spooled[data] = self._storage_of(data)
            storage = self._spooled[data]
        else:
            return NotImplemented
        if storage is None:
            return NotImplemented
        if len(self._storages) >= _MOST:
            raise LimitError("storages in a plain pickle", limit=_MOST, actual=_MOST + 1)
        key = str(len(self._storages))
        self._storages[key] = replace(storage, key=key)
        return self._storages[key]

    def _storage_of(self, data: bytes) -> Storage | None:
        if not begins_one(data):  # before anything is written
            return None
        room = spooled([data], len(data), self._file, "a storage that is written as text takes")
        return self._storage_in(room, None)

    def _storage_in(self, source: ByteRange, start: int | None) -> Storage | None:
        """The storage in its file; ``None``: it is none, or holds something else."""
        if not begins_one(source.read(0, min(source.nbytes, _BEGIN_NBYTES))):
            return None
        try:
            return storage_in(source, self._limits)
        except FormatError as error:
            error.offset = None if start is None or error.offset is None else error.offset + start
            raise error.at(where="a storage") from error.__cause__
