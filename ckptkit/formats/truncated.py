"""A zip archive whose directory cannot be used: its remains, read from the beginning.

The directory is the last thing written and the first thing read, so a download that stops early leaves an archive that
readers refuse whole.  But records are consecutive, each after its own header (`ckptkit.formats.zip_archive`), and torch
writes ``data.pkl`` first, which has the size of every storage.  So the archive can be processed without a directory:

- a header that states sizes states where the next one is
- torch's headers state none (flag bit 3): ``data.pkl`` ends at its STOP, a storage has the size in the pickle, other
  records are small and end at the descriptor after them

The answer is a sentence for the error that is raised anyway.  Nothing that is found here is used
to read tensors: what the front and the directory say may differ.
"""

from __future__ import annotations

import os
from typing import NoReturn

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CkptkitError, CorruptError, FormatError
from ckptkit.formats.zip_archive import CENTRAL_SIGNATURE
from ckptkit.formats.zip_records import CENTRAL, END, LOCAL, LOCAL_SIGNATURE, MAX32
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint, normalize
from ckptkit.pickling.inert import walk
from ckptkit.pickling.reader import PickleResult, read_pickle
from ckptkit.pickling.tensors import StorageTable
from ckptkit.report import count_of, share_of

__all__ = ["unfinished", "what_is_left"]

_DESCRIPTOR_SIGNATURE, _END_SIGNATURE, _END64_SIGNATURE = b"PK\x07\x08", b"PK\x05\x06", b"PK\x06\x06"
_DESCRIPTOR_SIZES = (16, 24)
"""Bytes of a data descriptor (APPNOTE 4.3.9): signature, checksum, two sizes of four bytes, or of eight."""

_ZEROS_NBYTES = 16
"""Bytes before a run of zeros that show whether it begins inside the record before it."""

_MAX_RECORDS = 100_000
"""Records that are processed: the answer is a courtesy, and not worth more than a second."""

_PICKLE_WINDOWS = (1 << 20, 16 << 20)
"""Bytes of ``data.pkl`` that are tried first, in this order: its end is not known beforehand."""

_UNFINISHED_ENDINGS = (".part", ".crdownload", ".download", ".incomplete", ".aria2", ".tmp", ".partial")
"""Extensions that browsers and download tools give to unfinished downloads."""


def unfinished(path: str) -> str:
    """A sentence, with a space before it, where the file's name says that it is still being downloaded; else none."""
    ending = os.path.splitext(path)[1].lower()
    return f". The extension {ending} means that its download is not finished" if ending in _UNFINISHED_ENDINGS else ""


def what_is_left(file: Source, limits: Limits) -> str | None:
    """What remains of an archive whose directory could not be read, in a sentence; ``None``: it is not cut off.

    Raises:
        FileAccessError: the operating system could not read it.
    """
    try:
        return _Remains(file, limits).describe() + unfinished(file.path)
    except FormatError:
        return None


class _CutError(CkptkitError):
    """The file ends here.

    Attributes:
        needed: bytes the file has at least up to the end of what was cut.
        filled: bytes before the room that was reserved and never filled; ``None``: all are filled.
    """

    def __init__(self, needed: int, filled: int | None = None) -> None:
        super().__init__()
        self.needed = needed
        self.filled = filled


class _Remains:
    """One pass over an archive's records from the front."""

    def __init__(self, file: Source, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._whole: set[str] = set()  # keys of the storages that are there
        self._storages: dict[str, int] = {}  # bytes of each storage, by its key
        self._pickle: PickleResult | None = None
        self._prefix = ""
        self._last = ""  # key of the last storage that was there

    def describe(self) -> str:
        """The sentence.

        Raises:
            FormatError: the archive is not cut off, or cannot be processed.
        """
        try:
            pos = self._records()
        except _CutError as cut:
            return self._cut(cut)
        try:
            end = self._directory(pos)
        except _CutError:
            count = count_of(self._count(), "tensor", "is", "are") if self._pickle else ""
            whole = f"all {count} complete" if count else "all records are present"
            return (
                f"truncated: {whole}, but the zip directory after them is missing: the file has {self._file.size:,} "
                "bytes. Download or copy the file again"
            )
        return self._appended(end)

    # Going through it.

    def _records(self) -> int:
        """Position of the directory.

        Raises:
            _CutError: the file ends before.
        """
        pos = 0
        for _ in range(_MAX_RECORDS):
            signature = self._read(pos, 4)
            if signature == CENTRAL_SIGNATURE:
                return pos
            if signature != LOCAL_SIGNATURE:
                if not any(self._file.read(pos, min(1 << 16, self._file.size - pos))):
                    self._unfilled(pos)
                raise _given_up()
            pos = self._record(pos)
        raise _given_up()

    def _unfilled(self, pos: int) -> NoReturn:
        """Room that was reserved and, from here on or a little before, never filled.

        Raises:
            _CutError: always, where the tensors are known.
            CorruptError: they are not.
        """
        if self._pickle is None:
            raise _given_up()
        before = self._file.read(max(0, pos - _ZEROS_NBYTES), min(pos, _ZEROS_NBYTES))
        if not any(before) and self._whole:  # a descriptor or data would end otherwise: the last record is not whole
            self._whole.discard(self._last)
        raise _CutError(pos + 4, pos)

    def _record(self, pos: int) -> int:
        """Position after the record that begins at ``pos``."""
        _, _, flags, method, _, _, _, packed, _, name_nbytes, extra_nbytes = LOCAL.unpack(self._read(pos, LOCAL.size))
        name = self._read(pos + LOCAL.size, name_nbytes).decode("utf-8", "replace")
        start = pos + LOCAL.size + name_nbytes
        extra = self._read(start, extra_nbytes)
        start += extra_nbytes
        later = bool(flags & 8) and packed == 0
        if packed == MAX32:
            packed = _wide_size(extra)
        key = name.removeprefix(self._prefix)
        if self._pickle is None and name.count("/") == 1 and name.endswith("/data.pkl") and method == 0:
            self._prefix = name.removesuffix("data.pkl") + "data/"
            self._pickle = self._read_pickle(start, None if later else packed)
            packed = self._pickle.end if later else packed
        elif later and key in self._storages and name.startswith(self._prefix):
            packed = self._storages[key]
        elif later:
            packed = self._find_descriptor(start)
        if start + packed > self._file.size:
            raise _CutError(start + packed)
        if name.startswith(self._prefix) and self._storages.get(key) == packed:
            self._whole.add(key)
            self._last = key
        pos = start + packed
        if flags & 8 and self._read(pos, 4) == _DESCRIPTOR_SIGNATURE:
            for size in _DESCRIPTOR_SIZES:
                if self._read(pos + size, 4) in (LOCAL_SIGNATURE, CENTRAL_SIGNATURE):
                    return pos + size
        return pos

    def _read(self, offset: int, nbytes: int) -> bytes:
        if offset + nbytes > self._file.size:
            raise _CutError(offset + nbytes)
        return self._file.read(offset, nbytes)

    def _read_pickle(self, start: int, declared: int | None) -> PickleResult:
        """The object pickle, whose end is known only once it is reached.

        Raises:
            _CutError: the file ends inside it.
            CorruptError: it is damaged before.
        """
        there = self._file.size - start
        most = min(self._limits.pickle_nbytes, there if declared is None else min(declared, there))
        for nbytes in (*_PICKLE_WINDOWS, most):
            data = self._file.read(start, min(nbytes, most))
            table = StorageTable(self._locate, limits=self._limits)
            try:
                return read_pickle(
                    data, persistent_load=table.persistent_load, constructors=table.constructors, limits=self._limits
                )
            except FormatError:
                if len(data) == most < there or _DESCRIPTOR_SIGNATURE in data:  # it ends before the file does: damage
                    raise
        raise _CutError(start + most + 1)

    def _locate(self, key: str, nbytes: int) -> tuple[ByteRange, int | None]:
        self._storages[key] = nbytes
        return ByteRange(self._file, 0, nbytes), None

    def _find_descriptor(self, start: int) -> int:
        """Bytes of a small record before its descriptor."""
        most = min(self._limits.record_nbytes, self._file.size - start)
        for nbytes in (4096, most):
            at = self._file.read(start, min(nbytes, most)).find(_DESCRIPTOR_SIGNATURE)
            if at >= 0:
                return at
        if most == self._file.size - start:
            raise _CutError(self._file.size + 1)
        raise _given_up()

    def _directory(self, pos: int) -> int:
        """Position after the archive's end record.

        Raises:
            _CutError: the file ends before.
        """
        for _ in range(_MAX_RECORDS):
            signature = self._read(pos, 4)
            if signature == CENTRAL_SIGNATURE:
                header = CENTRAL.unpack(self._read(pos, CENTRAL.size))
                pos += CENTRAL.size + sum(header[10:13])
            elif signature == _END64_SIGNATURE:
                pos += 56 + 20  # the record and its locator
            elif signature == _END_SIGNATURE:
                return pos + END.size + int(END.unpack(self._read(pos, END.size))[7])
            else:
                raise _given_up()
        raise _given_up()

    # The message.

    def _count(self) -> int:
        return 0 if self._pickle is None else sum(isinstance(node, TensorEntry) for node in walk(self._pickle.root))

    def _cut(self, cut: _CutError) -> str:
        size = self._file.size
        if self._pickle is None:
            if self._prefix or cut.needed <= size + 1:
                return (
                    f"truncated: the file of {size:,} bytes ends before the end of data.pkl, which describes the "
                    "tensors: no tensor is present. Download or copy the file again"
                )
            return (
                f"truncated: the file has {size:,} bytes, but at least {cut.needed:,} are expected. Download or copy "
                "the file again"
            )
        missing = {key: nbytes for key, nbytes in self._storages.items() if key not in self._whole}
        entries = [node for node in walk(self._pickle.root) if isinstance(node, TensorEntry)]
        lost = [entry for entry in entries if entry.storage.key in missing]
        first = f"; the first incomplete one is {self._name(lost[0])}" if lost else ""
        whole = share_of(len(entries) - len(lost), len(entries), "tensor", "is", "are")
        whole += f" complete{first}. Download or copy the file again"
        if cut.filled is not None:
            return f"truncated: all {size - cut.filled:,} bytes from byte {cut.filled:,} on are zeros; {whole}"
        # The rest, including headers and directory entries.
        name_nbytes = len(self._prefix) + 1
        expected = cut.needed + len(self._storages) * (CENTRAL.size + name_nbytes) + END.size
        expected += sum(list(missing.values())[1:]) + max(len(missing) - 1, 0) * (LOCAL.size + name_nbytes)
        return (
            f"truncated: the file has {size:,} bytes, but at least {expected:,} are expected ({expected - size:,} "
            f"missing); {whole}"
        )

    def _name(self, entry: TensorEntry) -> str:
        """The name a tensor has in the state_dict, or the storage it is in."""
        if self._pickle is not None:
            raw = RawCheckpoint(root=self._pickle.root, format="torch-zip")
            for name, other in normalize(raw, self._file).state_dict.items():
                if other is entry:
                    return f"{name!r:.200}"
        return f"that of storage {entry.storage.key!r:.80}"

    def _appended(self, end: int) -> str:
        rest = self._file.size - end
        start = self._file.read(end, min(rest, 1 << 16))
        tail = self._file.read(self._file.size - min(rest, 1 << 16), min(rest, 1 << 16))
        if rest <= 0 or b"PK" in start or b"PK" in tail:  # all is in its place, or there is another archive
            raise _given_up()
        what = (
            "zeros" if not any(start) else "an HTML page" if b"<html" in start.lower() else f"they begin {start[:16]!r}"
        )
        return (
            f"{count_of(rest, 'byte', 'was', 'were')} appended to an archive that ends at byte {end:,} ({what}). "
            f"Download or copy the file again, or keep what is before them: head -c {end} FILE > FIXED"
        )


def _given_up() -> CorruptError:
    return CorruptError("the archive cannot be read from its beginning")


def _wide_size(extra: bytes) -> int:
    """Packed size in bytes from a local header's zip64 field: it follows the size once inflated."""
    pos = 0
    while pos + 4 <= len(extra):
        tag, size = int.from_bytes(extra[pos : pos + 2], "little"), int.from_bytes(extra[pos + 2 : pos + 4], "little")
        if tag == 1 and size >= 16:
            return int.from_bytes(extra[pos + 12 : pos + 20], "little")
        pos += 4 + size
    raise _given_up()
