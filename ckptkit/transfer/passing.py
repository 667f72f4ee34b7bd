"""What is computed of bytes as they pass by: the SHA-256 of source files, and what an output is held against.

A file on this machine is hashed by a thread of its own, which reads it again: it is in memory by then.  One that is far
is hashed as it comes (`InOrder`), so that no byte of it is fetched twice; and what was read of it is proved the same
way: `Passed` keeps the SHA-256 of every piece that was written, and `ckptkit.compare` finds it in the output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.computed import Buffer, ByteSource, is_made, piece_nbytes
from ckptkit.normalize.tensors import every_tensor
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.workers import Background

__all__ = ["CONVERTED_NBYTES", "DigestsInPassing", "InOrder", "Passed", "each_of", "is_far", "passed_of", "pieces_of"]

_HASHED_NBYTES = 1 << 20
"""Bytes hashed at a time: they fit into a core's own cache."""

CONVERTED_NBYTES = 256 << 10
"""Bytes that conversion makes at a time: with what they are made from they fit there too."""

_PIECE_NBYTES = 8 << 20
"""Bytes that one thread moves, and one digest is of."""

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
        from hashlib import sha256  # not there where nothing is hashed

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
        in_order: of files that are far, by ``id``: what is to be given their bytes as they come.
    """

    def __init__(
        self, files: Iterable[Source], stop: threading.Event, known: Mapping[int, bytes] = MappingProxyType({})
    ) -> None:
        self._files = {id(file): file for file in files}
        self._found = dict(known)
        self._stop = stop
        self.in_order = {key: InOrder(file.size) for key, file in self._files.items() if file.is_far}
        near = [file for key, file in self._files.items() if key not in self.in_order]
        # That it failed stops nothing else: it is raised where a digest is asked for.
        self._thread = Background(lambda: self._hash(near), threading.Event()) if near else None

    def _hash(self, files: Iterable[Source]) -> None:
        from hashlib import sha256

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
            CorruptError: it became shorter meanwhile.
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
    """Whether a source, or a part of it, is far."""
    return file.is_far or any(part.is_far for part in file.parts.values())


def pieces_of(source: ByteSource) -> Iterator[tuple[int, ByteSource]]:
    """The pieces in which bytes are moved, each with where in the whole it begins; the same each time."""
    size = piece_nbytes(source, CONVERTED_NBYTES) if is_made(source) else _PIECE_NBYTES
    for start in range(0, source.nbytes, size):
        yield start, source if source.nbytes <= size else source.part(start, min(size, source.nbytes - start))


class Passed:
    """What passed by on its way to an output, by where it came from: for what is too far to be read again.

    Args:
        storages: those whose recorded checksums are to be held.

    Attributes:
        sums: the CRC-32 of what was fetched of them.
    """

    def __init__(self, storages: Iterable[Storage] = ()) -> None:
        from hashlib import sha256

        self._sha256: Callable[[Buffer], Any] = sha256
        self._digests: dict[tuple[object, ...], bytes] = {}
        self.sums = Checksums()
        self.sums.want(storages)

    def note(self, source: ByteSource, data: Buffer) -> None:
        """These are the bytes of a piece, as they were written."""
        self.note_digest(source, self._sha256(data).digest())

    def note_digest(self, source: ByteSource | TensorEntry, digest: bytes) -> None:
        """This is the SHA-256 of a piece, or of what was gathered of a tensor."""
        self._digests[_key(source)] = digest

    def digest(self, source: ByteSource | TensorEntry) -> bytes | None:
        """The SHA-256 of a piece, or of a tensor that was gathered; ``None``: it did not pass by."""
        return self._digests.get(_key(source))


def passed_of(checkpoint: Checkpoint, source: Source) -> Passed | None:
    """What is to keep what passes by of a checkpoint that is written; ``None``: its source is near, and read again."""
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
