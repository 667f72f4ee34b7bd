"""Sources of bytes that are read by position, and ranges of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import NoReturn, TypeVar

from ckptkit.arguments import BinaryFile
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError
from ckptkit.startup import dataclass, made_by_position

__all__ = [
    "CHUNK_NBYTES",
    "GAP_NBYTES",
    "ByteRange",
    "Readable",
    "Source",
    "at_once",
    "byte_range",
    "first_changed",
    "given_up",
    "outside",
    "pace",
    "require_wanted",
]

CHUNK_NBYTES = 4 << 20
"""Bytes moved at a time: large enough that calls cost nothing, and some such buffers are far below the memory bound."""

GAP_NBYTES = 8 << 10
"""Bytes between two wanted ones that take longer to read along than another read does to begin."""

_Record = TypeVar("_Record")


class _Pace:
    """How far this process is with a command: numbers for whoever watches.

    Attributes:
        read: bytes read from files on this machine since something was expected.
        arrived: bytes that servers sent.
        total: bytes to process; 0: unknown.
        finished: bytes of the files that are done.
        files, done: how many files there are to process, and how many are done; 0: unknown.
        looked: files that were opened to see what they are.
        stage: the current step, in words.
        began: when that step, or the expected work, began (`time.monotonic`).
        tell: called when one of these changes; ``None``: nobody watches.
    """

    __slots__ = ("arrived", "began", "done", "files", "finished", "looked", "read", "stage", "tell", "total")
    tell: Callable[[], object] | None

    def __init__(self) -> None:
        self.watch(None)

    def watch(self, tell: Callable[[], object] | None) -> None:
        """Call this whenever something changes from now on; all numbers start again."""
        self.read = self.arrived = self.total = self.finished = self.files = self.done = self.looked = 0
        self.stage, self.began, self.tell = "", time.monotonic(), tell

    def expect(self, files: int, nbytes: int) -> None:
        """Expect so many files, with so many bytes in total (0: unknown)."""
        self.files, self.total, self.began = files, nbytes, time.monotonic()
        self.read = self.finished = self.done = 0

    def enter(self, stage: str, nbytes: int = 0) -> None:
        """A new step begins, within one file if there are several; it reads so many bytes."""
        if self.tell is not None and not self.files:
            self.expect(0, nbytes)
            self.stage = stage
            self.tell()

    def finish(self, nbytes: int) -> None:
        """A file of so many bytes is done."""
        if self.tell is not None:
            self.finished += nbytes
            self.done += 1
            self.tell()

    def look(self) -> None:
        """A file is opened to see what it is."""
        if self.tell is not None:
            self.looked += 1
            self.tell()

    def arrive(self, nbytes: int) -> None:
        """A server sent so many bytes."""
        self.arrived += nbytes
        if self.tell is not None:
            self.tell()


pace = _Pace()
"""Of this process."""


class Source:
    """The bytes of a file, read by position, from several threads at once.

    All else reads through this protocol, so that a source of another kind is one subclass in one module.  It says how
    some bytes are got (`_some`); whether it can have changed (`stamp`) and what is beside it (`sibling`), where
    anything can and does.  Copies in the kernel, maps and locks are for those with a descriptor (`fileno`).

    Args:
        path: what messages call it, and what it is called by: its last segment is the file's name.
        size: in bytes.
        identity: its `stamp` when it was opened.

    Attributes:
        path, size, identity: as above.
        parts: the sources that belong to this one (shards to their index) and are closed with it, by the names that it
            calls them by.
        spool: the temporary file for data made from its bytes (`ckptkit.bytesource.local.spool_room`), closed with it.
    """

    is_far = False
    """Whether each read is a trip to another machine: few long ones, then, and none that can be left out."""

    __slots__ = ("_closed", "_lock", "identity", "parts", "path", "size", "spool")

    def __init__(self, path: str, size: int, identity: object = None) -> None:
        self._closed = False
        self._lock = threading.Lock()
        self.spool: Source | None = None
        self.path = path
        self.size = size
        self.identity = identity
        self.parts: dict[str, Source] = {}

    def _some(self, offset: int, nbytes: int) -> bytes:
        """At least one and at most ``nbytes`` bytes from position ``offset``; none where the source ends before.

        Called for what is inside the source, as it was when it was opened.

        Raises:
            FileAccessError: they could not be read.
        """
        raise NotImplementedError

    def stamp(self) -> object:
        """What differs once the source was written to: a file's modification time, an ETag.

        Raises:
            FileAccessError: it cannot be found out.
        """
        return self.identity

    def sibling(self, name: str) -> Source:
        """The source with a name beside this one; see `parts` for one that is to be closed with it.

        Args:
            name: relative to the folder this one is in, in segments with slashes between.

        Raises:
            MissingFileError: there is none.
            FileAccessError: it cannot be opened.
        """
        raise MissingFileError(f"{self.path}: it is not in a folder, so there is no {name!r} beside it", path=self.path)

    @property
    def folder(self) -> str | None:
        """The folder it is in, all of whose files can be looked at; ``None``: those whose names are known."""
        return None

    def fileno(self) -> int | None:
        """Descriptor of an open file that has exactly its bytes; ``None``: they can only be read.

        Raises:
            FileAccessError: it was closed.
        """
        return None

    def located(self, area: ByteRange) -> ByteRange:
        """The same bytes as a range of what has a descriptor, where this is inside another source that does."""
        return area

    def release(self) -> None:
        """Let go of what a system has few of, until something is read again.  No other thread may be reading."""

    @property
    def whole(self) -> ByteRange:
        """All of its bytes."""
        return ByteRange(self, 0, self.size)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes from position ``offset``.

        Raises:
            CorruptError: the range reaches past the end of the file.
            FileAccessError: the operating system could not read it.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise outside(offset, nbytes, self.size, self.path, "were requested from a file")
        parts = []
        while nbytes:
            if self._closed:
                self._require_open()
            part = self._some(offset, min(nbytes, 1 << 30))
            if not part:
                raise self._shorter(offset)
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill a buffer with the bytes from position ``offset`` on.

        Raises:
            As `read`.
        """
        view = memoryview(buffer)
        for start in range(0, len(view), CHUNK_NBYTES):
            piece = view[start : start + CHUNK_NBYTES]
            piece[:] = self.read(offset + start, len(piece))

    def views(self, offset: int, nbytes: int) -> Iterator[bytes | memoryview]:
        """The bytes from position ``offset`` on, in pieces of any size, without a copy if possible.

        Raises:
            As `read`.
        """
        for start in range(0, nbytes, CHUNK_NBYTES):
            yield self.read(offset + start, min(CHUNK_NBYTES, nbytes - start))

    def tail(self, nbytes: int) -> bytes:
        """The last ``nbytes`` bytes, or all there are.

        Raises:
            As `read`.
        """
        return self.read(max(0, self.size - nbytes), min(nbytes, self.size))

    def ranges(self, wanted: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of several ranges, in the order asked for; those that nearly touch are read at once.

        Args:
            wanted: offset and size in bytes of each.

        Raises:
            As `read`.
        """
        first = 0
        while first < len(wanted):
            begin, end, last = wanted[first][0], sum(wanted[first]), first + 1
            while last < len(wanted) and 0 <= wanted[last][0] - end <= GAP_NBYTES:
                if sum(wanted[last]) - begin > CHUNK_NBYTES:
                    break
                end, last = sum(wanted[last]), last + 1
            data = self.read(begin, end - begin)
            for offset, nbytes in wanted[first:last]:
                yield data[offset - begin : offset - begin + nbytes]
            first = last

    def will_read(
        self, areas: Sequence[tuple[int, int]], passing: Callable[[int, memoryview], object] | None = None
    ) -> None:
        """These ranges, offset and size in bytes of each, are about to be read, in about this order.

        A source on another machine fetches them ahead of the reader; others ignore this.  Other reads, or reads in
        another order, work as usual.

        Args:
            areas: the ranges; they replace those announced before.
            passing: called by a remote source with the position and the bytes of each run as it arrives: each once,
                from several threads, in about their order.
        """

    def will_open(self, names: Sequence[str]) -> None:
        """These names beside it are about to be opened (`sibling`), and looked at as `ckptkit.formats` does."""

    def on_read(self, offset: int, nbytes: int, check: Callable[[bytes], object]) -> bool:
        """Leave a look at some bytes until values are read: ``check`` is then called with them, once.

        Where values are around them they come by with those; `settle` fetches what did not.  Anything already in memory
        is checked before this returns.

        Returns: Whether it is left for later; ``False``: do it now, because nothing would be saved.
        """
        return False

    @property
    def left(self) -> int:
        """How many looks are left until values are read (`on_read`)."""
        return 0

    def settle(self, areas: Sequence[tuple[int, int]] | None = None) -> None:
        """Look at what was left until now (`on_read`); who has read values ends with it.

        Args:
            areas: offset and size in bytes of ranges: only checks next to one of them are made, and small ones are
                fetched along, so that reading them next takes no request; ``None``: all checks, including those of
                parts.

        Raises:
            FormatError: the rest is not valid.
        """
        for part in self.parts.values() if areas is None else ():
            part.settle()

    def changed(self) -> bool:
        """Whether it was written to since it was opened; delayed checks are made (`settle`).

        Raises:
            As `stamp` and `settle`.
        """
        self._require_open()
        self.settle()
        return self.stamp() != self.identity

    @property
    def total_size(self) -> int:
        """Size in bytes of it and its parts."""
        return self.size + sum(part.size for part in self.parts.values())

    def close(self) -> None:
        """Close it and its parts; later reads raise.  Closing twice is harmless."""
        self._closed = True
        for part in self.parts.values():
            part.close()
        if self.spool is not None:
            self.spool.close()

    def _require_open(self) -> None:
        if self._closed:
            raise FileAccessError(f"{self.path}: the checkpoint was closed; open it again", path=self.path)

    def _shorter(self, offset: int) -> CorruptError:
        return CorruptError(f"the file became shorter while it was being read: byte {offset:,}", path=self.path)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the very end there may be no contextlib
            self.close()
        except Exception:  # noqa: S110 - it was never whole, or Python itself is going down
            pass

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: an open file cannot be copied or pickled; open it again")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.size:,} bytes)"


Readable = str | os.PathLike[str] | Source | BinaryFile | bytes | bytearray | memoryview
"""The possible sources of a checkpoint: a path, a source, an open file, or the bytes themselves."""


def outside(start: int, nbytes: int, whole: int, path: str, told: str = "are not inside a range") -> CorruptError:
    """The error that not all of so many bytes from ``start`` are among the ``whole`` number of a range or a file."""
    return CorruptError(f"bytes {start:,} to {start + nbytes:,} {told} of {whole:,} bytes", path=path)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``nbytes`` bytes at ``offset`` of ``file``."""

    file: Source
    offset: int
    nbytes: int

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """``nbytes`` bytes (default: all that follow) from position ``start`` of this range.

        Raises:
            CorruptError: the part asked for is not inside the range.
        """
        wanted = self.nbytes - start if nbytes is None else nbytes
        if start < 0 or wanted < 0 or start + wanted > self.nbytes:
            raise outside(start, wanted, self.nbytes, self.file.path, "were requested from a range")
        return self.file.read(self.offset + start, wanted)

    def tail(self, nbytes: int) -> bytes:
        """The last ``nbytes`` bytes, or all there are."""
        if self.offset + self.nbytes == self.file.size and nbytes <= self.nbytes:
            return self.file.tail(nbytes)
        return self.read(max(0, self.nbytes - nbytes))

    def part(self, start: int, nbytes: int) -> ByteRange:
        """The range of ``nbytes`` bytes that begins at ``start`` of this one."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise outside(start, nbytes, self.nbytes, self.file.path)
        return ByteRange(self.file, self.offset + start, nbytes)

    def chunks(self, chunk_nbytes: int = CHUNK_NBYTES) -> Iterator[bytes]:
        """The bytes in order, at most ``chunk_nbytes`` at a time."""
        for start in range(0, self.nbytes, chunk_nbytes):
            yield self.read(start, min(chunk_nbytes, self.nbytes - start))

    def plain(self) -> ByteRange:
        """This range itself; `ckptkit.computed` has ranges that must be made first."""
        return self


byte_range = made_by_position(ByteRange)
"""A `ByteRange` of file, offset and number of bytes."""


_TRIPS = 16
"""Requests to other machines that are on their way at the same time."""


given_up: ContextVar[threading.Event | None] = ContextVar("ckptkit_given_up", default=None)
"""Set once nobody needs the result of this thread any more: only the main thread receives an interrupt."""


def require_wanted() -> None:
    """Waits for another machine ask now and then whether to continue.

    Raises:
        FileAccessError: the wait was given up.
    """
    halt = given_up.get()
    if halt is not None and halt.is_set():
        raise FileAccessError("canceled")


def at_once(trips: Sequence[Callable[[], _Record]]) -> list[_Record]:
    """Make requests to other machines at the same time, and return their results.

    Raises:
        Exception: the first error of them, in their order, once all are back.
    """
    if len(trips) < 2:
        return [trip() for trip in trips]
    from concurrent.futures import ThreadPoolExecutor, wait

    halt = given_up.get() or threading.Event()
    with ThreadPoolExecutor(
        min(_TRIPS, len(trips)), "ckptkit-trips", initializer=given_up.set, initargs=(halt,)
    ) as pool:
        made = [pool.submit(trip) for trip in trips]
        try:
            wait(made)
        except BaseException:
            halt.set()
            raise
    return [each.result() for each in made]


def first_changed(files: Iterable[Source]) -> Source | None:
    """The first of some files that was written to since it was opened (`Source.changed`); ``None``: none was.

    Raises:
        As `Source.changed`.
    """
    files = list(files)
    if sum(file.is_far for file in files) < 2:
        return next((file for file in files if file.changed()), None)
    return next((file for file, is_new in zip(files, at_once([f.changed for f in files]), strict=True) if is_new), None)
