"""Reads files once for everything that is wanted of their bytes: their own SHA-256, and tensors' digests and counts.

Where a tensor's values lie in the file as they are (nearly all do), they are taken from the bytes that pass
by for the file's own hash.  Others (transposed, compressed, big-endian) are read by themselves afterwards.
Pieces are small enough to stay in a core's own cache, and hashing lets go of the interpreter, so that several files, or
the two hashes of one, go side by side.

What in a file may be NaN beside the plain tensors of its weights, and what of it cannot be looked at.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

from ckptkit.bytesource import ByteRange, Source, SourceFile
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry, as_tensor
from ckptkit.digests import digest_text
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, LimitError
from ckptkit.inspection.listing import list_tensors
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import tensor_role
from ckptkit.pickling.arrays import Array, array_of, is_array, is_numpy_scalar
from ckptkit.pickling.inert import Object, children, tensors_in, walk
from ckptkit.pickling.layouts import call_of
from ckptkit.stats import NonFinite
from ckptkit.transfer.checksums import Checksums, Damage
from ckptkit.transfer.values import stream
from ckptkit.transfer.workers import MANY_NBYTES, Background

__all__ = ["OtherValue", "Reading", "Values", "file_sha256", "is_opaque", "other_values_in", "read_through"]

_PIECE_NBYTES = 1 << 20
"""Bytes read and hashed at a time."""

_PIECES = 4
"""Buffers, of which one is read into while others are hashed."""


@dataclass(slots=True)
class Values:
    """What was computed of one tensor's values.

    Attributes:
        hash: running SHA-256; ``None``: not wanted.
        counts: of NaN and Inf; ``None``: not wanted.
    """

    hash: Any
    counts: NonFinite | None

    def update(self, data: bytes | memoryview) -> None:
        """Take the next of the tensor's bytes."""
        if self.hash is not None:
            self.hash.update(data)
        if self.counts is not None:
            self.counts.update(data)

    @property
    def digest(self) -> str | None:
        """``"sha256:…"``; ``None``: not wanted."""
        return None if self.hash is None else digest_text(self.hash.digest())


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read.

    Attributes:
        files: the SHA-256 of each file in hexadecimal, by ``id``.
        values: of each tensor, by its view (`TensorEntry.view`); not of those whose bytes cannot be inflated.
        damages: of the storages whose recorded checksums were held, those whose bytes are others.
    """

    files: dict[int, str] = field(default_factory=dict)
    values: dict[tuple[object, ...], Values] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)

    def of(self, entry: TensorEntry) -> Values | None:
        """What was computed of a tensor; ``None``: nothing was wanted of it."""
        return self.values.get(entry.view)


class _Taker(Protocol):
    def update(self, data: memoryview) -> None: ...


_Span = tuple[int, int, _Taker]
"""First byte in the file, the byte after the last, and what takes them."""


def read_through(
    files: Sequence[Source],
    entries: Iterable[TensorEntry],
    *,
    hash_files: bool,
    digest: bool,
    counted: Iterable[TensorEntry] = (),
    held: Iterable[Storage] = (),
    threads: int = 1,
) -> Reading:
    """Read files, once: from beginning to end, or what is wanted of them.

    Args:
        files: the file, and its shards.
        entries: tensors whose bytes lie in them.
        hash_files: whether to hash the files themselves.
        digest: whether to digest the tensors.
        counted: tensors whose NaN and Inf are counted; they need not be among the others.
        held: storages whose recorded checksums are held against their bytes.
        threads: 2 lets a file's hash and the tensors' run side by side.

    Raises:
        CorruptError: a file became shorter, or was changed meanwhile.
        LimitError: the tensors repeat the file's bytes beyond all use.
        FileAccessError: a file cannot be read.
    """
    reading = Reading()
    spans: dict[int, list[_Span]] = {}
    apart: list[tuple[TensorEntry, Values]] = []
    entries, counted = list(entries) if digest else [], list(counted)
    digested, wanted = {entry.view for entry in entries}, {entry.view for entry in counted}
    known = {id(file) for file in files}
    shared: dict[tuple[int, int, int, bool, str | None], Values] = {}
    for entry in (*entries, *counted):
        view = entry.view
        if view in reading.values:
            continue
        is_digested = view in digested
        source = entry.storage.source
        if isinstance(source, ByteRange) and entry.is_plain_bytes and id(source.file) in known:
            start = source.offset + entry.storage_offset * entry.itemsize
            key = (id(source.file), start, entry.nbytes, is_digested, entry.dtype if view in wanted else None)
            values = shared.get(key)
            if values is None:
                shared[key] = values = _values(entry, is_digested, view in wanted)
                if entry.nbytes:
                    spans.setdefault(id(source.file), []).append((start, start + entry.nbytes, values))
        else:
            values = _values(entry, is_digested, view in wanted)
            apart.append((entry, values))
        reading.values[view] = values
    _check_sizes(files, spans, apart)
    sums = {id(file): Checksums() for file in files}
    for storage in held:
        sums[id(storage.source.file)].want([storage])
    for file in files:
        if hash_files or id(file) in spans:
            checksums = sums[id(file)]
            runs = [storage.source for storage in checksums.wanted if isinstance(storage.source, ByteRange)]
            passing = [(run.offset, run.offset + run.nbytes, checksums.passing(run)) for run in runs]
            spans[id(file)] = [*spans.get(id(file), ()), *passing]
    for file in files:
        found = sorted(spans.get(id(file), ()), key=lambda span: span[:2])
        hasher = hashlib.sha256() if hash_files else None
        with_helper = threads > 1 and hasher is not None and bool(found) and file.size >= MANY_NBYTES
        (_sweep_with_helper if with_helper else _read_spans)(file, hasher, found)
        if hasher is not None:
            reading.files[id(file)] = hasher.hexdigest()
        reading.damages.extend(sums[id(file)].damages(keep=bool(apart)))
        if file is not files[0]:  # of many files systems allow some to be open at once
            file.release()
    unreadable = {id(damage.storage) for damage in reading.damages if not isinstance(damage.storage.source, ByteRange)}
    for entry, values in apart:
        if id(entry.storage) in unreadable:
            del reading.values[entry.view]
            continue
        for chunk in stream(entry):
            values.update(chunk)
    for file in files:
        if file.changed():
            raise CorruptError("the file was changed while it was being read", path=file.path)
    return reading


def file_sha256(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        FileAccessError: it cannot be read.
        CorruptError: it was changed meanwhile.
    """
    file = SourceFile(path)
    try:
        return read_through([file], (), hash_files=True, digest=False).files[id(file)]
    finally:
        file.close()


def _values(entry: TensorEntry, digest: bool, counted: bool) -> Values:
    return Values(hashlib.sha256() if digest else None, NonFinite(entry.dtype) if counted else None)


def _check_sizes(
    files: Sequence[Source], spans: dict[int, list[_Span]], apart: list[tuple[TensorEntry, Values]]
) -> None:
    """Refuse what four bytes of a file can ask for: terabytes to be hashed."""
    wanted = sum(end - start for of in spans.values() for start, end, _ in of)
    wanted += sum(entry.nbytes for entry, _ in apart)
    storages = {id(entry.storage): entry.storage.nbytes for entry, _ in apart}
    most = sum(file.size for file in files) + sum(storages.values()) + DEFAULT_LIMITS.expanded_nbytes
    if wanted > most:
        raise LimitError("bytes of tensors, which repeat those of the file", limit=most, actual=wanted)


def _pieces(file: Source, everything: bool, spans: list[_Span]) -> Iterator[tuple[int, int]]:
    """Position and size of each piece to read: of the whole file, or of what the tensors take."""
    end = 0
    extents = [(0, file.size)] if everything else [span[:2] for span in spans]
    for first, last in extents:
        start = max(first, end)
        while start < last:
            nbytes = min(_PIECE_NBYTES, last - start)
            yield start, nbytes
            start += nbytes
        end = max(end, last)


class _Distributor:
    """Gives each tensor its part of the bytes that pass by."""

    def __init__(self, spans: list[_Span]) -> None:
        self._spans = spans
        self._next = 0
        self._active: list[_Span] = []

    def update(self, start: int, piece: memoryview) -> None:
        end = start + len(piece)
        while self._next < len(self._spans) and self._spans[self._next][0] < end:
            self._active.append(self._spans[self._next])
            self._next += 1
        for first, last, values in self._active:
            values.update(piece[max(first - start, 0) : last - start])
        self._active = [span for span in self._active if span[1] > end]


def _read_spans(file: Source, hasher: Any, spans: list[_Span]) -> None:
    distributor = _Distributor(spans)
    buffer = memoryview(bytearray(min(_PIECE_NBYTES, max(file.size, 1))))
    for start, nbytes in _pieces(file, hasher is not None, spans):
        piece = buffer[:nbytes]
        file.read_into(start, piece)
        if hasher is not None:
            hasher.update(piece)
        distributor.update(start, piece)


def _sweep_with_helper(file: Source, hasher: Any, spans: list[_Span]) -> None:
    """As `_read_spans`, while another thread computes the file's own hash."""
    distributor = _Distributor(spans)
    free: SimpleQueue[memoryview] = SimpleQueue()
    full: SimpleQueue[tuple[memoryview, memoryview] | None] = SimpleQueue()
    for _ in range(_PIECES):
        free.put(memoryview(bytearray(_PIECE_NBYTES)))

    def hash_pieces() -> None:
        while (item := full.get()) is not None:
            hasher.update(item[1])
            free.put(item[0])

    helper = Background(hash_pieces, threading.Event())
    try:
        for start, nbytes in _pieces(file, True, spans):
            buffer = free.get()
            piece = buffer[:nbytes]
            file.read_into(start, piece)
            full.put((buffer, piece))
            distributor.update(start, piece)
            # The buffer may be read into again only when both are done with it, and this thread now is.
    finally:
        full.put(None)
        helper.wait()


_PLAIN_MODULES = ("torch", "collections", "builtins", "__builtin__")
"""Of classes and functions whose objects hold no values beyond what stands in the tree, but for bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherValue:
    """Values that are not a plain tensor of the weights.

    Attributes:
        name: section and place.
        entry: the tensor they are; ``None``: they are an array.
        array: the array.
        is_parameter: whether they belong to a parameter, which may not be infinite.
    """

    name: str
    entry: TensorEntry | None = None
    array: Array | None = None
    is_parameter: bool = False


def other_values_in(
    checkpoint: Checkpoint, plain: set[int], others: Sequence[tuple[str, object]]
) -> Iterator[OtherValue]:
    """Tensors of other sections and in attributes, parts of weights that are not plain tensors, numpy's arrays.

    Args:
        checkpoint: the file.
        plain: the plain tensors of the weights, by ``id``.
        others: the values of the weights that are not, by name.
    """
    known = set(plain)
    own: dict[int, bool] = {}
    for name, value in others:
        for node in tensors_in(value):
            if isinstance(node, TensorEntry):
                own[id(node)] = tensor_role(name, node, known=False)[0] == "parameter"
        floats = [part for node in walk([value]) for part in children(node) if isinstance(part, float)]
        if floats:  # scales of quantized tensors, extra state
            is_parameter = call_of(value).kind == "quantized"
            numbers = Array("float64", struct.pack(f"<{len(floats)}d", *floats))
            yield OtherValue(name=name, array=numbers, is_parameter=is_parameter)
    listing = list_tensors(checkpoint)
    selected = checkpoint.origin.state_path
    for row in listing.rows:
        if id(row.tensor) not in known:
            known.add(id(row.tensor))
            is_parameter = own.get(id(row.tensor), row.role == "parameter")
            yield OtherValue(name=row.path, entry=row.tensor, is_parameter=is_parameter)
    for found, array in listing.arrays:
        is_own = selected is None or found.section == selected
        if is_own or not is_numpy_scalar(array):  # a metric is a number like any other
            yield OtherValue(name=found.path, array=array_of(array), is_parameter=is_own)
    for storage in listing.bare:
        if storage.dtype is not None and DTYPES[storage.dtype].kind in ("float", "complex"):
            yield OtherValue(name=f"storage {storage.key}", entry=as_tensor(storage, typed=True))


def is_opaque(value: object) -> bool:
    """Whether a value of the weights is an object in which nothing is found that could be looked at."""
    if not isinstance(value, Object):
        return False
    nodes = list(walk(value))
    if any(isinstance(node, (TensorEntry, Storage)) or is_array(node) for node in nodes):
        return False
    if value.class_name.partition(".")[0] not in _PLAIN_MODULES:
        return True
    return any(isinstance(part, (bytes, bytearray)) and part for node in nodes for part in children(node))
