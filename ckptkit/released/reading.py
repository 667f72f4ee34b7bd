"""Reads files once for everything computed from their bytes: their own SHA-256, and tensors' digests and counts.

`read_through` does it; `other_values_in` lists the values whose NaN and Inf count besides those of the plain tensors of
the weights, and `is_opaque` says which values cannot be read.

A tensor whose values are stored unchanged (nearly every tensor) is digested from the bytes that pass by for the file's
own hash.  Others (transposed, compressed, big-endian) are read separately afterwards.  Pieces are small enough to stay
in a core's own cache, and hashing releases the GIL, so several files, or the two hashes of one, run in parallel.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Any, Protocol

from ckptkit.bytesource import GAP_NBYTES, ByteRange, Source, SourceFile, at_once, first_changed
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry, as_tensor
from ckptkit.digests import digest_text
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, LimitError
from ckptkit.formats import hashed_parts
from ckptkit.formats.format import is_folder
from ckptkit.inspection.listing import list_tensors
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import tensor_role
from ckptkit.normalize.tensors import FoundTensor
from ckptkit.pickling.arrays import Array, array_of, is_array, is_numpy_scalar
from ckptkit.pickling.inert import Object, children, tensors_in, walk
from ckptkit.pickling.layouts import call_of
from ckptkit.startup import dataclass, sha256
from ckptkit.stats import NonFinite, count_all
from ckptkit.transfer.checksums import Checksums, Damage
from ckptkit.transfer.passing import InOrder, each_of
from ckptkit.transfer.values import lying_in, stream, will_read
from ckptkit.transfer.workers import MANY_NBYTES, Background

__all__ = ["OtherValue", "Reading", "Values", "file_sha256", "is_opaque", "other_values_in", "read_through"]

_PIECE_NBYTES = 1 << 20
"""Bytes read and hashed at a time."""

_PIECES = 4
"""Buffers: one is read into while others are hashed."""


@dataclass(slots=True)
class Values:
    """The results for one tensor's values.

    Attributes:
        entry: the tensor.
        hash: running SHA-256; ``None``: not wanted.
        counts: of NaN and Inf; ``None``: not wanted.
        is_lost: whether its bytes cannot be inflated.
    """

    entry: TensorEntry
    hash: Any = None
    counts: NonFinite | None = None
    is_lost: bool = False

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


class Reading:
    """The results of reading.

    Args:
        digested: tensors to digest.
        counted: those whose NaN and Inf are counted.

    Attributes:
        files: the SHA-256 of each file in hexadecimal, by ``id``.
        damages: of the storages whose recorded checksums were checked, those whose bytes differ.
        sums: the CRC-32 of remote files' values that are not stored unchanged.
    """

    def __init__(self, digested: Iterable[TensorEntry] = (), counted: Iterable[TensorEntry] = ()) -> None:
        self.files: dict[int, str] = {}
        self.damages: list[Damage] = []
        self.sums = Checksums()
        self._first: dict[int, Values] = {}
        """Of the first tensor of each storage, by its ``id``."""
        self._others: dict[tuple[object, ...], Values] = {}
        """Of other views of them."""
        for entry in digested:
            self.want(entry, digest=True)
        for entry in counted:
            self.want(entry, counts=True)

    def want(self, entry: TensorEntry, *, digest: bool = False, counts: bool = False) -> None:
        """Something has to be computed for a tensor, once however many names it has."""
        known = self._first.get(id(entry.storage))
        if known is None:
            known = self._first[id(entry.storage)] = Values(entry)
        elif known.entry is not entry and known.entry.view != entry.view:
            known = self._others.setdefault(entry.view, Values(entry))
        if digest and known.hash is None:
            known.hash = sha256()
        if counts and known.counts is None:
            known.counts = NonFinite(entry.dtype)

    @property
    def wanted(self) -> Iterator[Values]:
        """Everything for which something is computed."""
        return chain(self._first.values(), self._others.values())

    def of(self, entry: TensorEntry) -> Values | None:
        """The results for a tensor; ``None``: none were requested, or its bytes cannot be inflated."""
        found = self._first.get(id(entry.storage))
        if found is not None and found.entry is not entry and found.entry.view != entry.view:
            found = self._others.get(entry.view)
        return None if found is None or found.is_lost else found


class _Taker(Protocol):
    def update(self, data: memoryview) -> None: ...


_Span = tuple[int, int, Values | ByteRange]
"""First byte in the file, the byte after the last, and what takes them; a range is summed."""


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
        entries: tensors whose bytes are in them.
        hash_files: whether to hash the files themselves.
        digest: whether to digest the tensors.
        counted: tensors whose NaN and Inf are counted; they need not be among the others.
        held: storages whose recorded checksums are checked against their bytes.
        threads: 2 lets a file's hash and the tensors' run side by side.

    Raises:
        CorruptError: a file became shorter, or was changed in the meantime.
        LimitError: the tensors repeat the file's bytes beyond all use.
        FileAccessError: a file cannot be read.
    """
    reading = Reading(entries if digest else (), counted)
    spans, apart = _lying(reading, files)
    _check_sizes(files, spans, apart)
    sums = {id(file): Checksums() for file in files}
    for storage in held:
        sums[id(storage.source.file)].want([storage])
    # Of a far folder whose tensors are in pieces, the pieces bring the bytes of the files.
    are_brought = hash_files and bool(apart)
    in_order = {id(f): InOrder(f.size) for f in files if are_brought and f.is_far and not spans.get(id(f))}
    for file in files:
        if id(file) in in_order:
            continue
        checksums = sums[id(file)]
        found: list[_Span] = spans.get(id(file), [])
        if hash_files or found:
            runs = [storage.source for storage in checksums.wanted if isinstance(storage.source, ByteRange)]
            found += [(run.offset, run.offset + run.nbytes, run) for run in runs]
            found.sort(key=lambda span: span[:2])
        hasher = sha256() if hash_files else None
        with_helper = threads > 1 and hasher is not None and bool(found) and file.size >= MANY_NBYTES
        distributor = _Distributor(found, checksums)
        (_sweep_with_helper if with_helper else _read_spans)(file, hasher, distributor)
        if hasher is not None:
            reading.files[id(file)] = hasher.hexdigest()
        reading.damages.extend(checksums.damages(keep=bool(apart)))
        if file is not files[0]:  # of many files systems allow some to be open at once
            file.release()
    _read_apart(reading, files, apart, in_order)
    _require_unchanged(files)
    return reading


def _read_apart(
    reading: Reading, files: Sequence[Source], apart: list[Values], in_order: Mapping[int, InOrder]
) -> None:
    """Read values that are not stored unchanged, hashing remote files as they arrive if that is still to do."""
    unreadable = {id(damage.storage) for damage in reading.damages if not isinstance(damage.storage.source, ByteRange)}

    def along(file: Source) -> Callable[[int, memoryview], object]:
        reading.sums.want(values.entry.storage for values in apart)
        return each_of(reading.sums.along_file(file), *([in_order[id(file)]] if id(file) in in_order else []))

    for file in files:
        if id(file) in in_order:
            file.will_read([(0, file.size)], along(file))
    if in_order:  # files are hashed from their beginnings
        apart.sort(key=lambda values: next((run.offset for run in lying_in(values.entry)), 0))
    else:
        will_read((values.entry for values in apart), along)
    for values in apart:
        values.is_lost = id(values.entry.storage) in unreadable
        for chunk in () if values.is_lost else stream(values.entry):
            values.update(chunk)
    reading.files |= {id(file): in_order[id(file)].hexdigest(file) for file in files if id(file) in in_order}


def files_of(file: Source) -> tuple[list[Source], dict[str, Source]]:
    """The sources to read: the file and its shards, or all of a folder's own files; and those of several by name."""
    parts = hashed_parts(file) if is_folder(file) else file.parts
    return [*([] if is_folder(file) else [file]), *parts.values()], parts


def look_at_ends(files: Sequence[Source]) -> None:
    """For remote files whose values are not read: make sure that none is also a zip archive, by its end.

    Raises:
        AmbiguousError: one is.
        FileAccessError: one cannot be read.
    """
    at_once([partial(file.settle, [(file.size, 0)]) for file in files if file.is_far])


def damages_of(storages: Sequence[Storage], known: Checksums) -> list[Damage]:
    """The damage in the storages that others are made from; what is already known is not read again."""
    checksums = Checksums(known)
    checksums.want(storages)
    return checksums.damages()


def _require_unchanged(files: Sequence[Source]) -> None:
    if (file := first_changed(files)) is not None:
        raise CorruptError("the file was changed while it was being read", path=file.path)


def _lying(reading: Reading, files: Sequence[Source]) -> tuple[dict[int, list[_Span]], list[Values]]:
    """The spans of values stored unchanged in files, by the file's ``id``; and values to read separately."""
    spans: dict[int, list[_Span]] = {id(file): [] for file in files}
    apart: list[Values] = []
    shared: dict[tuple[int, int, int, bool, str | None], Values] = {}
    for values in reading.wanted:
        entry = values.entry
        source = entry.storage.source
        of_file = spans.get(id(source.file)) if isinstance(source, ByteRange) else None
        if of_file is None or not isinstance(source, ByteRange) or not entry.is_plain_bytes:
            apart.append(values)
            continue
        start, nbytes = source.offset + entry.storage_offset * entry.itemsize, entry.nbytes
        dtype = None if values.counts is None else entry.dtype
        twin = shared.setdefault((id(of_file), start, nbytes, values.hash is not None, dtype), values)
        if twin is not values:
            values.hash, values.counts = twin.hash, twin.counts
        elif nbytes:
            of_file.append((start, start + nbytes, values))
    return spans, apart


def file_sha256(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        FileAccessError: it cannot be read.
        CorruptError: it was changed in the meantime.
    """
    file = SourceFile(path)
    try:
        return read_through([file], (), hash_files=True, digest=False).files[id(file)]
    finally:
        file.close()


def _check_sizes(files: Sequence[Source], spans: dict[int, list[_Span]], apart: list[Values]) -> None:
    """Refuse what four bytes of a file can ask for: terabytes to be hashed."""
    wanted = sum(end - start for of in spans.values() for start, end, _ in of)
    wanted += sum(values.entry.nbytes for values in apart)
    storages = {id(values.entry.storage): values.entry.storage.nbytes for values in apart}
    most = sum(file.size for file in files) + sum(storages.values()) + DEFAULT_LIMITS.expanded_nbytes
    if wanted > most:
        raise LimitError("bytes of tensors, which repeat those of the file", limit=most, actual=wanted)


def _pieces(file: Source, everything: bool, spans: list[_Span]) -> Iterator[tuple[int, int]]:
    """Position and size of each piece to read: of the whole file, or of what the tensors take, gaps and all."""
    extents = [[0, file.size]] if everything else []
    for first, last, _ in () if everything else spans:
        if extents and first <= extents[-1][1] + GAP_NBYTES:
            extents[-1][1] = max(last, extents[-1][1])
        else:
            extents.append([first, last])
    for first, last in extents:
        for start in range(first, last, _PIECE_NBYTES):
            yield start, min(_PIECE_NBYTES, last - start)


class _Distributor:
    """Gives each tensor its part of the bytes that pass by."""

    def __init__(self, spans: list[_Span], checksums: Checksums) -> None:
        self.spans = spans
        self._checksums = checksums
        self._next = 0
        self._active: list[tuple[int, int, _Taker]] = []

    def update(self, start: int, piece: memoryview) -> None:
        end = start + len(piece)
        for first, last, values in self._active:
            values.update(piece[max(first - start, 0) : last - start])
        self._active = [span for span in self._active if span[1] > end]
        alone: dict[str, list[tuple[NonFinite, memoryview]]] = {}
        number, spans, checksums = self._next, self.spans, self._checksums
        while number < len(spans) and spans[number][0] < end:
            first, last, wanted = spans[number]
            number += 1
            part = piece[first - start : last - start]
            if last > end:
                taker: _Taker = wanted if isinstance(wanted, Values) else checksums.passing(wanted)
                taker.update(part)
                self._active.append((first, last, taker))
            elif not isinstance(wanted, Values):
                checksums.note(wanted, zlib.crc32(part))
            elif wanted.hash is None and wanted.counts is not None:
                alone.setdefault(wanted.entry.dtype, []).append((wanted.counts, part))
            else:
                wanted.update(part)
        self._next = number
        for counts in alone.values():
            count_all(counts)


def _read_spans(file: Source, hasher: Any, distributor: _Distributor) -> None:
    buffer = memoryview(bytearray(min(_PIECE_NBYTES, max(file.size, 1))))
    if file.is_far:
        file.will_read([*_pieces(file, hasher is not None, distributor.spans)])
    for start, nbytes in _pieces(file, hasher is not None, distributor.spans):
        piece = buffer[:nbytes]
        file.read_into(start, piece)
        if hasher is not None:
            hasher.update(piece)
        distributor.update(start, piece)


def _sweep_with_helper(file: Source, hasher: Any, distributor: _Distributor) -> None:
    """As `_read_spans`, while another thread computes the file's own hash."""
    free: SimpleQueue[memoryview] = SimpleQueue()
    full: SimpleQueue[tuple[memoryview, memoryview] | None] = SimpleQueue()
    for _ in range(_PIECES):
        free.put(memoryview(bytearray(_PIECE_NBYTES)))

    def hash_pieces() -> None:
        while (item := full.get()) is not None:
            hasher.update(item[1])
            free.put(item[0])

    if file.is_far:
        file.will_read([(0, file.size)])
    helper = Background(hash_pieces, threading.Event())
    try:
        for start, nbytes in _pieces(file, True, distributor.spans):
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
"""Of classes and functions whose objects hold no values beyond what is in the tree, but for bytes."""


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
    checkpoint: Checkpoint,
    plain: set[int],
    others: Sequence[tuple[str, object]],
    beside: Sequence[FoundTensor],
) -> Iterator[OtherValue]:
    """Tensors of other sections and in attributes, parts of weights that are not plain tensors, numpy's arrays.

    Args:
        checkpoint: the file.
        plain: the plain tensors of the weights, by ``id``.
        others: the values of the weights that are not, by name.
        beside: what `ckptkit.normalize.tensors.other_tensors` finds in it.
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
    listing = list_tensors(checkpoint, beside)
    selected = checkpoint.origin.state_path
    for at, entry in enumerate(listing.rows.entries):
        if id(entry) not in known:
            known.add(id(entry))
            row = listing.rows[at]
            is_parameter = own.get(id(entry), row.role == "parameter")
            yield OtherValue(name=row.path, entry=entry, is_parameter=is_parameter)
    for found, array in listing.arrays:
        is_own = selected is None or found.section == selected
        if is_own or not is_numpy_scalar(array):  # a metric is a number like any other
            yield OtherValue(name=found.path, array=array_of(array), is_parameter=is_own)
    for storage in listing.bare:
        if storage.dtype is not None and DTYPES[storage.dtype].kind in ("float", "complex"):
            yield OtherValue(name=f"storage {storage.key}", entry=as_tensor(storage, typed=True))


def is_opaque(value: object) -> bool:
    """Whether a value of the weights is an object that contains nothing that can be read."""
    if not isinstance(value, Object):
        return False
    nodes = list(walk(value))
    if any(isinstance(node, (TensorEntry, Storage)) or is_array(node) for node in nodes):
        return False
    if value.class_name.partition(".")[0] not in _PLAIN_MODULES:
        return True
    return any(isinstance(part, (bytes, bytearray)) and part for node in nodes for part in children(node))
