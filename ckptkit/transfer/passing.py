"""Computed from bytes as they pass by: the SHA-256 of source files, and the proof that they reached an output.

A file on this machine is hashed by a separate thread, which reads it again: it is in memory by then.  A remote one is
hashed as it arrives (`InOrder`), so no byte of it is fetched twice; and the proof that its bytes are in the output is
made on the way too: `Passed` reads every piece back as soon as it is written and compares it with the bytes still in
memory, and `ckptkit.compare` checks that the output's reader finds each tensor exactly where that was done.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from ckptkit.bytesource import ByteRange, Source, SourceFile, fill_from
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.computed import Buffer, ByteSource, is_made, piece_nbytes
from ckptkit.normalize.tensors import every_tensor
from ckptkit.startup import sha256
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.workers import Background

__all__ = [
    "CONVERTED_NBYTES",
    "READ_BACK_NBYTES",
    "DigestsInPassing",
    "InOrder",
    "Passed",
    "each_of",
    "is_far",
    "passed_of",
    "pieces_of",
]

_HASHED_NBYTES = 1 << 20
"""Bytes hashed at a time: they fit into a core's own cache."""

CONVERTED_NBYTES = 256 << 10
"""Bytes that conversion makes at a time: with what they are made from they fit there too."""

_PIECE_NBYTES = 8 << 20
"""Bytes that one thread moves, and that are known as one piece."""

READ_BACK_NBYTES = 512 << 10
"""Bytes written, read back and compared at a time: they, and what was read, fit into a core's own cache."""

_WAITING_NBYTES = 32 << 20
"""Bytes that wait to be hashed, from which on those that bring more wait too."""


def each_of(*takers: Callable[[int, memoryview], object]) -> Callable[[int, memoryview], None]:
    """What gives a run of bytes to each of several that are to see it."""

    def take(start: int, data: memoryview) -> None:
        for taker in takers:
            taker(start, data)

    return take


class InOrder:
    """The SHA-256 of a file whose bytes come in runs, in about their order and from several threads.

    Args:
        nbytes: of the file.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._new: Callable[[], Any] = sha256
        self._digest = sha256()
        self._at = 0
        self._waiting: dict[int, memoryview] = {}
        self._is_busy = False
        self._changed = threading.Condition()

    def __call__(self, start: int, data: memoryview) -> None:
        """Take a run of bytes; one that does not follow on those before waits until they have come."""
        with self._changed:
            self._waiting[start] = data
            while self._is_busy and sum(map(len, self._waiting.values())) > _WAITING_NBYTES:
                self._changed.wait(0.2)
            if self._is_busy or self._following() is None:
                if sum(map(len, self._waiting.values())) > 2 * _WAITING_NBYTES:
                    self._waiting.clear()  # something before was never fetched: it is not known
                return
            self._is_busy = True
        try:
            while True:
                with self._changed:
                    first = self._following()
                    if first is None:
                        return
                    run = self._waiting.pop(first)[self._at - first :]
                self._digest.update(run)
                with self._changed:
                    self._at += len(run)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _following(self) -> int | None:
        """Where the run begins that has the next byte; others may have some of it, too."""
        return next((start for start, run in self._waiting.items() if start <= self._at < start + len(run)), None)

    def _reached(self) -> int:
        with self._changed:
            while self._is_busy:
                self._changed.wait(0.2)
            return self._at

    def hexdigest(self, file: Source) -> str:
        """The digest; what has not come of the file yet is read.

        Raises:
            FileAccessError, CorruptError: it cannot be.
        """
        at = -1
        while at < (at := self._reached()) < self._nbytes:
            file.read(at, 1)  # brings more, which comes here
        if at < self._nbytes:  # nothing has been brought at all, or not in order
            self._digest, self._at = self._new(), self._nbytes
            file.will_read([(0, self._nbytes)])
            for part in file.views(0, self._nbytes):
                self._digest.update(part)
        return self._digest.hexdigest()


class DigestsInPassing:
    """The SHA-256 of source files, computed side by side with everything else.

    Args:
        files: what to hash, one after the other.
        stop: set when they are no longer wanted.
        known: in hexadecimal, by the ``id`` of files that need no hashing.

    Attributes:
        in_order: for remote files, by ``id``: receives their bytes as they arrive.
    """

    def __init__(
        self, files: Iterable[Source], stop: threading.Event, known: Mapping[int, bytes] = MappingProxyType({})
    ) -> None:
        self._files = {id(file): file for file in files}
        self._found = dict(known)
        self._stop = stop
        self.in_order = {key: InOrder(file.size) for key, file in self._files.items() if file.is_far}
        near = [file for key, file in self._files.items() if key not in self.in_order]
        # A failure stops nothing else: it is raised when a digest is requested.
        self._thread = Background(lambda: self._hash(near), threading.Event()) if near else None

    def _hash(self, files: Iterable[Source]) -> None:
        buffer = bytearray(_HASHED_NBYTES)
        for file in files:
            digest = sha256()
            for start in range(0, file.size, len(buffer)):
                if self._stop.is_set():
                    return
                part = memoryview(buffer)[: min(len(buffer), file.size - start)]
                file.read_into(start, part)
                digest.update(part)
            self._found[id(file)] = digest.hexdigest().encode()

    def of(self, file: Source) -> bytes:
        """The digest in hexadecimal, once it is there.

        Raises:
            FileAccessError: the file could not be read.
            CorruptError: it became shorter in the meantime.
        """
        if self._thread is not None:
            self._thread.wait()
        if id(file) in self.in_order and id(file) not in self._found:
            self._found[id(file)] = self.in_order[id(file)].hexdigest(file).encode()
        return self._found[id(file)]

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()


def is_far(file: Source) -> bool:
    """Whether a source, or a part of it, is remote."""
    return file.is_far or any(part.is_far for part in file.parts.values())


def pieces_of(source: ByteSource) -> Iterator[tuple[int, ByteSource]]:
    """The pieces in which bytes are moved, each with its position in the whole; the same each time."""
    size = piece_nbytes(source, CONVERTED_NBYTES) if is_made(source) else _PIECE_NBYTES
    for start in range(0, source.nbytes, size):
        yield start, source if source.nbytes <= size else source.part(start, min(size, source.nbytes - start))


_File = tuple[int, int]
"""A file that is being written: its device and inode."""

_kept = threading.local()


class Passed:
    """Bytes on their way to an output: read back from where they were written, and compared with what was read.

    That is of use for what is too far to be read again.  It says that a piece is in the output only if nothing else was
    written there, and all of it was found unchanged; it knows nothing about anything else.

    Args:
        storages: those whose recorded checksums are checked.

    Attributes:
        sums: the CRC-32 of what was fetched of them.
    """

    def __init__(self, storages: Iterable[Storage] = ()) -> None:
        self._places: dict[tuple[object, ...], list[tuple[_File, int]]] = {}
        self._written: dict[_File, list[tuple[int, int]]] = {}
        """First byte of each run that was written of a file, and the byte after its last."""
        self._differing: dict[_File, list[int]] = {}
        """Where the first byte of a run was that was read back as another."""
        self._sound: dict[_File, list[tuple[int, int]]] = {}
        """As `_written`, once all is; those that follow one another are one."""
        self.sums = Checksums()
        self.sums.want(storages)

    def read_back(self, fd: int, data: Buffer, target: int) -> None:
        """Read what was just written at a position of an open file, and compare.

        Raises:
            OSError: it could not be read.
        """
        view = memoryview(data)
        for start in range(0, len(view), READ_BACK_NBYTES):
            ours = view[start : start + READ_BACK_NBYTES]
            theirs: bytearray | None = getattr(_kept, "theirs", None)
            if theirs is None or len(theirs) != len(ours):
                theirs = _kept.theirs = bytearray(len(ours))
            filled = fill_from(fd, theirs, target + start)
            if filled < len(ours) or theirs != ours:  # of two views each byte would be compared by itself
                same = next((i for i in range(filled) if theirs[i] != ours[i]), filled)
                self._differing.setdefault(_file(fd), []).append(target + start + same)
                break
        self.will_write(fd, target, len(view))

    def will_write(self, fd: int, target: int, nbytes: int) -> None:
        """Bytes at this position are written too: earlier proofs for them are void."""
        self._written.setdefault(_file(fd), []).append((target, target + nbytes))

    def note(self, source: ByteSource | TensorEntry, fd: int, target: int) -> None:
        """A piece, or what was gathered of a tensor, was written at this position."""
        self._places.setdefault(_key(source), []).append((_file(fd), target))

    def settle(self) -> None:
        """All is written: where is it sound?"""
        for file, written in self._written.items():
            written.sort()
            if all(end <= start for (_, end), (start, _) in pairwise(written)):  # nothing over something else
                self._sound[file] = runs = written[:1]
                for start, end in written[1:]:
                    if start == runs[-1][1]:
                        runs[-1] = runs[-1][0], end
                    else:
                        runs.append((start, end))

    def same(self, source: ByteSource | TensorEntry, written: ByteRange) -> int | None:
        """How many bytes of a piece, from the first on, are known to be in a range of the output.

        Args:
            source: the piece, or a tensor that was gathered.
            written: of the output, as its own reader has opened it.

        Returns: All of them if they were compared and are the same, fewer if one was different; ``None``: it was not
            written there, or cannot be relied upon.
        """
        if not isinstance(written.file, SourceFile):
            return None
        file, start, end = written.file.identity[:2], written.offset, written.offset + written.nbytes
        if (file, start) not in self._places.get(_key(source), ()):
            return None
        runs = self._sound.get(file, [])
        at = bisect_right(runs, start, key=itemgetter(0)) - 1
        if at < 0 or end > runs[at][1]:
            return None
        return min([each for each in self._differing.get(file, ()) if start <= each < end], default=end) - start


def _file(fd: int) -> _File:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def passed_of(checkpoint: Checkpoint, source: Source) -> Passed | None:
    """The recorder of a checkpoint being written; ``None``: its source is local, and is read again."""
    if not is_far(source):
        return None
    nodes = (found.node for found in every_tensor(checkpoint))
    found = (node.storage if isinstance(node, TensorEntry) else node for node in nodes)
    return Passed(each for each in found if isinstance(each, Storage))


def _key(source: ByteSource | TensorEntry) -> tuple[object, ...]:
    if isinstance(source, TensorEntry):
        return source.view
    where = source.file if isinstance(source, ByteRange) else source.whole
    return id(where), source.offset, source.nbytes
