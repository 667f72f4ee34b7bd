"""pickle: tensors and arrays that Python's own pickle wrote, or cloudpickle, dill or joblib.

Layout: one pickle of any protocol and nothing after it.  A tensor is the call that torch-zip has for it, too
(`ckptkit.pickling.tensors`).  Instead of naming a storage, such a pickle has ``torch.storage._load_from_bytes(data)``
(``torch/storage.py`` ``__reduce__``), whose argument is a whole file of `ckptkit.formats.torch_legacy` with only that
storage in it.  Since protocol 3 that is an opcode with the bytes after it, and the storage is in place; before, it is
text that ``_codecs.encode`` turns into bytes, which are put into a temporary file.

Each call makes a separate storage: tensors that shared one no longer do, unless pickle saw that they are one object.  A
call that was given anything else stays the call it is.

If there is no torch storage, named numpy arrays are tensors (`ckptkit.normalize.made_plain`).  Such a pickle
is a checkpoint if there are weights in it by that, or if it contains arrays and nothing else, in lists and dicts.  A
single array is not a checkpoint, nor is a pickle with arrays in its objects (a table, a scikit-learn model):
`ckptkit.formats.refused_contents` says what that is.

joblib (``joblib/numpy_pickle.py``) writes a ``NumpyArrayWrapper`` for an array, whose BUILD is followed by a byte that
counts padding, the padding, and the array's bytes; without ``numpy_array_alignment_bytes``, by the bytes only.  An
array of objects contains another pickle, and such a file is not read.  joblib compresses all of it: zlib, gzip, bz2, xz
or lzma; what that holds is put into a temporary file.

The machine reads the file without the large arrays and storages in it (`_Text`): gigabytes are skipped.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Storage
from ckptkit.computed import spooled
from ckptkit.dtypes import BY_STORAGE_CLASS
from ckptkit.errors import (
    AmbiguousError,
    CorruptError,
    FormatError,
    LimitError,
    MissingDependencyError,
    UnknownFormatError,
    UnsupportedError,
)
from ckptkit.formats.format import Probe
from ckptkit.formats.torch_legacy import begins_one, legacy_findings, storage_in
from ckptkit.normalize import RawCheckpoint, needs_protocol
from ckptkit.normalize.made_plain import arrays_made_plain
from ckptkit.normalize.sections import SectionSearch
from ckptkit.pickling.arrays import LocatedBytes, is_array, is_numpy_scalar, itemsize_of, layout_of
from ckptkit.pickling.dialects import LegacyTable
from ckptkit.pickling.inert import Global, InertDict, Object, attributes, children, is_global, walk
from ckptkit.pickling.machine import LOADER, NO_FRAME, Constructor, Machine
from ckptkit.pickling.reader import PickleResult, holds_legacy, read_pickle, storage_pickles
from ckptkit.pickling.tensors import shape_of
from ckptkit.pickling.trust import global_uses
from ckptkit.report import Finding, count_of
from ckptkit.tensor import storage_of

__all__ = ["outcome", "read"]

_NAME = "pickle"

_TEXT = 8
"""How many times the bytes of other pickles one may have that contains its storages as text."""

_BEGIN_NBYTES = 64
"""First bytes that identify a storage's file."""

_WINDOW_NBYTES = 256 << 10
"""Bytes that are read at a time, at least."""

_MARKS = (LOADER[1].encode(), b"numpy")
"""Names without any of which there is neither a tensor nor an array."""

_PACKED = (b"\x78", b"\x1f", b"B", b"\xfd", b"\x5d", b"\x28")
"""First bytes of what joblib may have compressed."""

_WRAPPERS = ("joblib.numpy_pickle.NumpyArrayWrapper", "sklearn.externals.joblib.numpy_pickle.NumpyArrayWrapper")


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    found = outcome(probe)
    if isinstance(found, RawCheckpoint):
        return found
    raise found or UnknownFormatError("not a pickle of torch tensors")


def outcome(probe: Probe) -> RawCheckpoint | FormatError | None:
    """The content of the file, or why it cannot be read; ``None``: it is not a pickle, or one without a storage."""
    if _NAME not in probe.outcomes:
        probe.outcomes[_NAME] = _attempt(probe)
    return probe.outcomes[_NAME]


def _attempt(probe: Probe) -> RawCheckpoint | FormatError | None:
    area = _inflated(probe)
    if area is None:
        return None
    head = area.read(0, min(len(probe.head), area.nbytes))
    if begins_one(head):
        return None
    from ckptkit.formats.magic import guess_pickle  # only here, as many patterns take a moment to compile

    if guess_pickle(head, area.nbytes) is None or not _holds(area, _MARKS, probe.limits.pickle_nbytes):
        return None
    try:
        return _read(area, probe, apart=True) or _read(area, probe, apart=False)
    except FormatError as error:
        from ckptkit.formats.refused_contents import names_joblib

        data = area.read(0, min(area.nbytes, probe.limits.pickle_nbytes))
        return error if holds_legacy(data) and not names_joblib(error.globals) else None
    except _NoCheckpointError:
        return None


class _NoCheckpointError(Exception):
    """There is neither a torch storage in it, nor arrays that are weights."""


def _read(area: ByteRange, probe: Probe, *, apart: bool) -> RawCheckpoint | FormatError | None:
    """The content of a pickle, or why its arrays have none; ``None``: it also needs bytes that were left in place.

    Args:
        area: its place.
        probe: the file.
        apart: whether to leave those of arrays and storages in place.
    """
    table = _Table(area, probe, apart=apart)
    pickle = table.read()
    root, findings = table.understood(pickle), list[Finding]()
    if not table.storages:
        alone = _is_arrays_alone(root)
        if table.has_arrays:
            try:
                root, findings = arrays_made_plain(root, probe.file.path, everything=alone)
            except CorruptError as error:
                return error.at(seen=global_uses(pickle.globals))
        if not findings or not (alone or _has_weights(root)):
            raise _NoCheckpointError
    everything = [root, pickle.discarded]
    if apart and any(isinstance(part, (_Held, LocatedBytes)) for node in walk(everything) for part in children(node)):
        return None
    return RawCheckpoint(
        root=root,
        format=_NAME,
        pickle_protocol=pickle.protocol if needs_protocol(everything) else None,
        globals=global_uses(pickle.globals),
        discarded=pickle.discarded,
        findings=(*legacy_findings(table), *findings),
    )


def _has_weights(root: object) -> bool:
    return any(candidate.is_weights for candidate in SectionSearch(root).sections())


def _is_arrays_alone(root: object) -> bool:
    """Whether a tree contains arrays and nothing else, in lists, tuples and dicts; false if it is one array."""
    found, stack, seen = False, [root], set[int]()
    while stack:
        node = stack.pop()
        if is_array(node) and not is_numpy_scalar(node):
            found = node is not root
        elif not isinstance(node, (list, tuple, InertDict)):
            return False
        elif id(node) not in seen:
            seen.add(id(node))
            stack += [value for _, value in node.pairs] if isinstance(node, InertDict) else node
    return found


def _holds(area: ByteRange, marks: tuple[bytes, ...], most: int) -> bool:
    """Whether one of the names is in the first bytes, as many as a pickle may have."""
    before = b""
    for chunk in area.part(0, min(area.nbytes, most)).chunks():
        if any(mark in before + chunk for mark in marks):
            return True
        before = chunk[-_BEGIN_NBYTES:]
    return False


def _inflated(probe: Probe) -> ByteRange | None:
    """The content of a compressed file, in the temporary file; the whole of any other; ``None``: not joblib's."""
    whole = probe.file.whole
    if probe.head[:1] not in _PACKED:
        return whole
    from ckptkit.formats.compression import PACKED_PICKLES, compression_of

    compression = compression_of(probe.head, PACKED_PICKLES)
    if compression is None:
        return whole
    try:
        if b"joblib" not in next(compression.parts(probe.file, probe.limits), b""):
            return None
    except (FormatError, MissingDependencyError):  # damaged, or something else
        return None
    return spooled(compression.parts(probe.file, probe.limits), None, probe.file, "is compressed and takes")


# Storages and arrays.

_MOST = 200_000
"""Storages that are read: each is five small pickles; as torch writes them, they take some 0.1 ms."""

_PICKLES_NBYTES = 1024
_COUNT_NBYTES = 8
"""Bytes that hold these pickles, and of the count that follows them."""

_APART_NBYTES = 64 << 10
_APART_SHARE = 16
"""Bytes from which on data left in place is not part of the machine's input, and how many times as many may be copied
for that."""


class _Held(bytes):
    """The beginning of the bytes of a storage's file, whose pickles are in it.

    Attributes:
        storage: the one in them; its key is that of the file.
    """

    storage: Storage


class _Text:
    """The bytes of a pickle without those left in place.

    Attributes:
        area: its place, including them.
        data: its first bytes, without them.
    """

    def __init__(self, area: ByteRange, most: int) -> None:
        self.area = area
        self.data = area.read(0, min(area.nbytes, _WINDOW_NBYTES, most))
        self._gaps: list[tuple[int, int]] = [(0, 0)]  # position in the data, and how many bytes were left out by then

    @property
    def left(self) -> int:
        """Bytes after those that were read."""
        return self.area.nbytes - self.place(len(self.data))

    def place(self, at: int) -> int:
        """Where in the area a position of the data is."""
        return at + next(gone for begin, gone in reversed(self._gaps) if begin <= at)

    def longer(self) -> bytes:
        """The data with as many more bytes, if there are any."""
        start = self.place(len(self.data))
        self.data += self.area.read(start, min(self.area.nbytes - start, max(len(self.data), _WINDOW_NBYTES)))
        return self.data

    def without(self, at: int, nbytes: int) -> bytes:
        """The data without so many bytes from a position on, which are in the area."""
        start = self.place(at) + nbytes
        behind = self.data[at + nbytes :] or self.area.read(start, min(self.area.nbytes - start, _WINDOW_NBYTES))
        self._gaps.append((at, start - at))
        self.data = self.data[:at] + behind
        return self.data


class _Table(LegacyTable):
    """The storages of a plain pickle, in the order of their calls; leaves bytes in place."""

    def __init__(self, area: ByteRange, probe: Probe, *, apart: bool) -> None:
        super().__init__(probe.file, probe.limits)
        self._file = probe.file
        self._text = _Text(area, probe.limits.pickle_nbytes)
        self._apart = apart
        self._held: dict[int, _Held | None] = {}  # by where it begins
        self._room = _TEXT * probe.limits.pickle_nbytes
        self._spooled: dict[bytes, Storage | None] = {}
        self._array_room = probe.limits.pickle_nbytes
        self.has_arrays = False

    @property
    def constructors(self) -> dict[tuple[str, str], Constructor]:
        """As `StorageTable.constructors`, and the call that makes a storage."""
        return {**super().constructors, LOADER: self._load}

    def read(self) -> PickleResult:
        """The pickle, which must be all there is.

        Raises:
            FormatError: it is damaged or refused.
        """
        text = self._text
        try:
            result = read_pickle(
                text.data, constructors=self.constructors, limits=self._limits, more=self._more, hold=self
            )
        except FormatError as error:
            if error.offset is not None:
                error.offset = text.place(error.offset)
            raise
        end = text.place(result.end)
        left = text.area.nbytes - end
        if left:
            follow = count_of(left, "byte", "follows", "follow")
            raise AmbiguousError(
                f"{follow} the pickle, which pickle.load does not read; save each pickle to a separate file",
                offset=end,
            )
        names = [name for name in result.globals if name.module.startswith("numpy")]
        self.has_arrays = self.has_arrays or any(name.name in ("_reconstruct", "_frombuffer") for name in names)
        return result

    def _more(self, nbytes: int) -> bytes:
        """The text up to a later position; data left in place does not count as bytes of the pickle."""
        if self._text.left and self._room <= nbytes:
            raise LimitError("bytes of a pickle beside its storages", limit=self._room, actual=nbytes + 1)
        return self._text.longer()

    def data(self, machine: Machine, nbytes: int) -> bool:
        """See `ckptkit.pickling.machine.Hold`."""
        start, given = self._text.place(machine.pos), (machine.stack or [*machine.marks[-1:], []][0])[-1:]
        if not self._apart or not given:
            return False
        if machine.stack and is_global(given[0], *LOADER):
            held: bytes | None = self._storage_at(start, nbytes)
        elif _is_of_array(machine.stack, given[0]) and start + nbytes <= self._text.area.nbytes:
            held = self._located(start, nbytes)
        else:
            held = None
        if held is None or not self._pass(machine, nbytes):
            return False
        machine.stack.append(held)
        return True

    def _located(self, start: int, nbytes: int) -> bytes:
        found = LocatedBytes()
        found.source = self._text.area.part(start, nbytes)
        return found

    def _pass(self, machine: Machine, nbytes: int, *, always: bool = False) -> bool:
        """Continue after bytes that stay in place, unless they must be read to their end first."""
        is_worth_it = nbytes >= _APART_NBYTES and nbytes * _APART_SHARE >= machine.pos
        is_here = machine.pos + nbytes <= len(machine.data)
        if machine.frame_end == NO_FRAME and (is_worth_it or (always and not is_here)):
            machine.data = self._text.without(machine.pos, nbytes)
        elif is_here:
            machine.pos += nbytes
            self._room += nbytes
        else:
            return False
        return True

    def built(self, machine: Machine, target: Object) -> None:
        """Take the array that follows joblib's wrapper for it; see `ckptkit.pickling.machine.Hold`.

        Raises:
            CorruptError: it does not follow.
            UnsupportedError: it is one of objects.
        """
        if target.class_name not in _WRAPPERS:
            return
        state = attributes(target) or InertDict()
        if machine.frame_end not in (machine.pos, NO_FRAME):
            raise CorruptError("a joblib array inside a frame: damaged")
        machine.frame_end = NO_FRAME
        shape, dtype, area = shape_of(state.get("shape")), state.get("dtype"), self._text.area
        start = self._text.place(machine.pos)
        if state.get("numpy_array_alignment_bytes") is not None and start < area.nbytes:
            start += 1 + area.read(start, 1)[0]
        node = Object("reduce", Global("numpy._core.multiarray", "_reconstruct"), (state.get("subclass"), (0,), b"b"))
        node.state = (1, state.get("shape"), dtype, state.get("order") == "F", b"")
        itemsize = itemsize_of(layout_of(node).code)
        if itemsize is None or shape is None or min(shape, default=0) < 0:
            raise UnsupportedError("a joblib array whose elements are objects or have fields")
        nbytes = itemsize * math.prod(shape)
        if start + nbytes > area.nbytes:
            raise CorruptError(
                f"{nbytes:,} bytes of a joblib array are declared, but only {max(area.nbytes - start, 0):,} are "
                "left: damaged or truncated"
            )
        held = self._located(start, nbytes) if self._apart else self._read(start, nbytes)
        node.state = (*node.state[:4], held)
        self._pass(machine, start + nbytes - self._text.place(machine.pos), always=True)
        machine.stack[-1] = node
        self.has_arrays = True

    def _read(self, start: int, nbytes: int) -> bytes:
        self._array_room -= nbytes
        if self._array_room < 0:
            most = self._limits.pickle_nbytes
            raise LimitError("bytes of arrays that remain arrays", limit=most, actual=most - self._array_room)
        return self._text.area.read(start, nbytes)

    def _storage_at(self, start: int, nbytes: int) -> _Held | None:
        if start not in self._held:
            self._held[start] = None
            left = self._text.area.nbytes - start
            if left < nbytes:
                if begins_one(self._text.area.read(start, min(left, _BEGIN_NBYTES))):
                    raise CorruptError(
                        f"a storage's {nbytes:,} bytes are declared, but only {left:,} are left: truncated"
                    )
                return None
            source = self._text.area.part(start, nbytes)
            storage = self._storage_in(source, start)
            if storage is not None:
                held = self._held[start] = _Held(source.read(0, nbytes - storage.nbytes))
                held.storage = storage
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
        """The storage in its file; ``None``: it is not one, or holds something else."""
        begin = source.read(0, min(source.nbytes, _PICKLES_NBYTES))
        known = storage_pickles(begin)
        if known is not None and known[0] in BY_STORAGE_CLASS:
            cls, location, numel, end = known
            row, raw = BY_STORAGE_CLASS[cls], begin[end : end + _COUNT_NBYTES]
            nbytes = numel * row.itemsize
            if int.from_bytes(raw, "little") == numel and end + _COUNT_NBYTES + nbytes == source.nbytes:
                return storage_of("", row.name, nbytes, location, source.part(end + _COUNT_NBYTES, nbytes))
        if not begins_one(begin[:_BEGIN_NBYTES]):
            return None
        try:
            return storage_in(source, self._limits)
        except FormatError as error:
            error.offset = None if start is None or error.offset is None else error.offset + start
            raise error.at(where="a storage") from error.__cause__


def _is_of_array(stack: list[object], before: object) -> bool:
    """Whether the bytes that follow are an array's: those that BUILD or ``_frombuffer`` is given."""
    if not stack:
        return isinstance(before, Global) and before.name == "_frombuffer" and before.module.startswith("numpy")
    return before.__class__ is bool and len(stack) >= 2 and getattr(stack[-2], "class_name", "") == "numpy.dtype"
