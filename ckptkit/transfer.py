"""Executes a `Plan`: bytes from file to file, into a temporary file, then one rename.

Bytes that move as they lie are copied inside the kernel (``copy_file_range``, then ``sendfile``,
then reads and writes in bounded buffers).  Only gathers and checksums touch them.

The destination is either what it was before or the complete new file: the output is written
beside it under a temporary name, flushed to disk, and renamed; on any error, an interrupt
included, the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, SourceFile
from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES, DType
from ckptkit.errors import CorruptError, DestinationExistsError, DTypeError, FileAccessError
from ckptkit.plan import Checksum, Copy, Gather, Literal, Plan

__all__ = ["execute", "stream", "write_atomically"]

_ONE_CALL = 64 << 20
"""Bytes asked of one kernel copy: calls cost nothing at this size, and an interrupt is heard soon."""

_FLUSH_SECONDS = 0.05
"""Pause between flushes while a file is being written; most files are written before the first."""

_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
"""Errors that say this file system or kernel cannot copy so, not that the copy failed."""


def write_atomically(
    destination: str | os.PathLike[str],
    plan: Plan,
    *,
    force: bool,
    check: Callable[[str], object] | None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the plan's file so that the destination is never half-written.

    Args:
        destination: the output file; a symbolic link is followed, the link itself stays.
        plan: what to write.
        force: whether an existing destination may be replaced.
        check: called with the temporary file's path once it is complete; whatever it raises stops
            the write before the destination is touched.
        progress: called with the number of bytes as they are written.

    Raises:
        DestinationExistsError: it exists and ``force`` is false; checked again at the very end.
        FileAccessError: it cannot be written; nothing is left behind.
        CorruptError: a source changed while it was read.
    """
    path = os.path.realpath(destination)
    shown = os.fspath(destination)
    if os.path.isdir(path):
        raise FileAccessError(f"{shown}: is a folder; name a file")
    if not force and os.path.lexists(path):
        raise DestinationExistsError(f"{shown}: exists already; --force overwrites it")
    folder, name = os.path.split(path)
    # 50 characters are at most 200 bytes, so that the name is no longer than a file system allows.
    temporary = os.path.join(folder, f".{name[:50]}.{os.urandom(4).hex()}.tmp")
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        fd = os.open(temporary, flags, 0o666)  # less the umask, as any program's output
    except OSError as error:
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}") from error
    try:
        try:
            with _flushing(fd) as written:
                execute(plan, fd, progress)
                written()
                if check is not None:
                    check(temporary)
        finally:
            os.close(fd)
        _publish(temporary, path, shown, force=force)
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _flushing(fd: int) -> Iterator[Callable[[], None]]:
    """Flush a file to disk while it is still being written and checked.

    The disk works side by side with the copying, so that little is left to wait for at the end.
    The block calls what it is given once everything is written.

    Raises:
        OSError: a flush failed; the file is not safely on disk.
    """
    written, wanted, failures = threading.Event(), [True], list[OSError]()

    def flush() -> None:
        try:
            while not written.wait(_FLUSH_SECONDS):
                os.fsync(fd)
            if wanted:
                os.fsync(fd)
        except OSError as error:
            failures.append(error)

    flusher = threading.Thread(target=flush)
    flusher.start()
    try:
        yield written.set
    except BaseException:
        wanted.clear()
        raise
    finally:
        written.set()
        flusher.join()
    if failures:
        raise failures[0]


def _publish(temporary: str, path: str, shown: str, *, force: bool) -> None:
    """Give the complete file its name, and make the name itself durable."""
    if force:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)  # fails, in one step, where a file of that name has appeared
        except FileExistsError:
            raise DestinationExistsError(f"{shown}: exists already; --force overwrites it") from None
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise DestinationExistsError(f"{shown}: exists already; --force overwrites it") from None
            os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in _NOT_HERE:  # some file systems cannot flush a folder
                raise
        finally:
            os.close(folder)


def execute(plan: Plan, fd: int, progress: Callable[[int], None] | None = None) -> None:
    """Carry out a plan's steps on an open, empty file.

    Args:
        plan: the steps.
        fd: file descriptor, readable and writable.
        progress: called with the number of bytes as they are written.

    Raises:
        CorruptError: a source changed while it was read, or ended early.
        OSError: the operating system could not write.
    """
    _reserve(fd, plan.nbytes)
    moved = progress or (lambda _: None)
    copier = _Copier(fd, moved)
    checksums: dict[tuple[int, int], bytes] = {}
    sources: dict[int, SourceFile] = {}
    for step in plan.steps:
        if isinstance(step, Copy):
            sources[id(step.source.file)] = step.source.file
            copier.copy(step.source.plain(), step.target)
        elif isinstance(step, Gather):
            sources[id(step.entry.storage.source.file)] = step.entry.storage.source.file
            target = step.target
            for chunk in stream(step.entry):
                _write(fd, chunk, target)
                moved(len(chunk))
                target += len(chunk)
        elif isinstance(step, Literal):
            _write(fd, step.data, step.target)
            moved(len(step.data))
        elif isinstance(step, Checksum):
            extent = (step.start, step.covers)
            if extent not in checksums:
                checksums[extent] = _crc32(fd, *extent).to_bytes(4, "little")
            _write(fd, checksums[extent], step.target)
    for source in sources.values():
        if source.changed():
            raise CorruptError(
                "the file was changed while it was being converted; nothing was written", path=source.path
            )


def _reserve(fd: int, nbytes: int) -> None:
    """Take the space up front, so that a full disk is known before a byte is moved."""
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    os.ftruncate(fd, nbytes)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            written = os.pwrite(fd, view, offset)
        else:
            os.lseek(fd, offset, os.SEEK_SET)
            written = os.write(fd, view)
        view, offset = view[written:], offset + written


def _crc32(fd: int, start: int, nbytes: int) -> int:
    crc = 0
    while nbytes:
        if hasattr(os, "pread"):
            chunk = os.pread(fd, min(CHUNK_NBYTES, nbytes), start)
        else:
            os.lseek(fd, start, os.SEEK_SET)
            chunk = os.read(fd, min(CHUNK_NBYTES, nbytes))
        if not chunk:
            raise OSError(errno.EIO, "the output became shorter while it was written")
        crc = zlib.crc32(chunk, crc)
        start, nbytes = start + len(chunk), nbytes - len(chunk)
    return crc


class _Copier:
    """Copies ranges into one file by the best way that works, found out once."""

    def __init__(self, fd: int, progress: Callable[[int], None]) -> None:
        self._fd = fd
        self._progress = progress
        ways = [self._copy_file_range, self._sendfile] if hasattr(os, "copy_file_range") else []
        self._ways: list[Callable[[ByteRange, int], int]] = [*ways, self._read_write]

    def copy(self, source: ByteRange, target: int) -> None:
        """Copy all of ``source`` to position ``target``."""
        while source.nbytes:
            try:
                moved = self._ways[0](source, target)
            except OSError as error:
                if isinstance(error, FileAccessError) or error.errno not in _NOT_HERE or len(self._ways) == 1:
                    raise
                self._ways.pop(0)
                continue
            if moved == 0:  # the end of the source; or a file system that copies nothing and says so
                if len(self._ways) == 1:
                    raise CorruptError("the file became shorter while it was being copied", path=source.file.path)
                self._ways.pop(0)
                continue
            self._progress(moved)
            source, target = source.part(moved, source.nbytes - moved), target + moved

    def _copy_file_range(self, source: ByteRange, target: int) -> int:
        return os.copy_file_range(source.file.fd, self._fd, min(source.nbytes, _ONE_CALL), source.offset, target)

    def _sendfile(self, source: ByteRange, target: int) -> int:
        os.lseek(self._fd, target, os.SEEK_SET)
        return os.sendfile(self._fd, source.file.fd, source.offset, min(source.nbytes, _ONE_CALL))

    def _read_write(self, source: ByteRange, target: int) -> int:
        chunk = source.read(0, min(source.nbytes, CHUNK_NBYTES))
        _write(self._fd, chunk, target)
        return len(chunk)


# Values.  Only here is numpy imported, and only when a tensor is not plain bytes.


def stream(entry: TensorEntry) -> Iterator[bytes]:
    """The tensor's values in C order, little-endian, in bounded chunks.

    Conjugate and negative bits are carried out on the values.

    Raises:
        DTypeError: values of a dtype that numpy cannot hold would have to be computed.
    """
    if entry.numel == 0:
        return
    if entry.is_plain_bytes:
        start = entry.storage_offset * entry.itemsize
        yield from entry.storage.source.part(start, entry.nbytes).chunks()
        return
    for block in _blocks(entry):
        yield _gather(block)


def _blocks(entry: TensorEntry) -> Iterator[TensorEntry]:
    """The tensor cut along its leading dimensions into pieces of at most a chunk."""
    if entry.nbytes <= CHUNK_NBYTES or not entry.shape:
        yield entry
        return
    row_nbytes = entry.nbytes // entry.shape[0]
    rows = 1 if row_nbytes > CHUNK_NBYTES else max(1, CHUNK_NBYTES // row_nbytes)
    for first in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - first)
        offset = entry.storage_offset + first * entry.stride[0]
        if rows == 1 and row_nbytes > CHUNK_NBYTES:
            row = replace(entry, storage_offset=offset, shape=entry.shape[1:], stride=entry.stride[1:])
            yield from _blocks(row)
        else:
            yield replace(entry, storage_offset=offset, shape=(count, *entry.shape[1:]))


def _gather(entry: TensorEntry) -> bytes:
    """The values of a piece that fits into memory and has elements."""
    import numpy

    row = DTYPES[entry.dtype]
    start, end = entry.span()
    with _window(entry.storage.source.plain(), start, end) as raw:
        # The stride of a dimension of one element says nothing, and may be any number.
        strides = tuple(
            step * row.itemsize if size > 1 else 0 for size, step in zip(entry.shape, entry.stride, strict=True)
        )
        # Elements are moved as opaque bytes: no value passes through a conversion.
        element = numpy.dtype((numpy.void, row.itemsize))
        view = numpy.ndarray(entry.shape, element, buffer=raw, strides=strides)
        values: bytes = view.tobytes()
        del view
    if entry.storage.byteorder == "big":
        values = _swapped(values, row)
    if entry.is_conj or entry.is_neg:
        values = _signs(values, row, conj=entry.is_conj, neg=entry.is_neg)
    return values


@contextlib.contextmanager
def _window(source: ByteRange, start: int, end: int) -> Iterator[Any]:
    """The bytes [start, end) of a range: read where they are few, mapped where they are spread out."""
    if end - start <= 4 * CHUNK_NBYTES:
        yield source.read(start, end - start)
        return
    import mmap

    first = source.offset + start
    base = first - first % mmap.ALLOCATIONGRANULARITY
    if source.file.changed():  # to touch a page past the end of a shortened file is fatal
        raise CorruptError("the file was changed while it was being converted", path=source.file.path)
    with mmap.mmap(source.file.fd, source.offset + end - base, access=mmap.ACCESS_READ, offset=base) as mapped:
        view = memoryview(mapped)[first - base :]
        try:
            yield view
        finally:
            view.release()


def _swapped(values: bytes, row: DType) -> bytes:
    """The elements with their bytes reversed; the two parts of a complex one each on its own."""
    import numpy

    width = row.itemsize // 2 if row.kind == "complex" else row.itemsize
    return numpy.frombuffer(values, dtype=f"u{width}").byteswap().tobytes()  # type: ignore[no-any-return]


def _signs(values: bytes, row: DType, *, conj: bool, neg: bool) -> bytes:
    """The values conjugated or negated, by flipping sign bits: exact for NaN and zero too."""
    import numpy

    parts = 2 if row.kind == "complex" else 1
    width = row.itemsize // parts
    if row.kind not in ("float", "complex") or width == 1:  # not every 8-bit format has a sign bit or -0
        raise DTypeError(f"a lazily negated or conjugated tensor of {row.name} cannot be written out")
    bits = numpy.frombuffer(values, dtype=f"<u{width}").reshape(-1, parts).copy()
    sign = bits.dtype.type(1 << (8 * width - 1))
    if neg:
        bits ^= sign
    if conj and parts == 2:
        bits[:, 1] ^= sign
    return bits.tobytes()  # type: ignore[no-any-return]
