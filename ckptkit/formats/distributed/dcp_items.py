"""Stored items of torch.distributed.checkpoint: each a whole file of ``torch.save``, one after the other.

Each is read as any such file is (`ckptkit.formats.torch_zip`).  A checkpoint has them by the hundred thousand, and
those of tensors with one size differ in four things: the values, their checksum, an identity of forty digits, and its
checksum; those of one plain value in the latter two.  So what was read of one is known of all whose other bytes are the
same (`_Mold`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby
from math import prod
from threading import Lock
from typing import NamedTuple

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import GlobalUse, TensorEntry
from ckptkit.computed import Held, spooled
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, FormatError, UnsupportedError
from ckptkit.formats.distributed.dcp_record import LISTED, Items, Wanted
from ckptkit.formats.shards import prefixed
from ckptkit.formats.torch_zip import read_archive
from ckptkit.formats.zip_archive import Records, read_directory
from ckptkit.formats.zip_records import CENTRAL, DESCRIPTOR_SIGNATURE, find_directory
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import SCALARS, Global
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import listed
from ckptkit.tensor import storage_of, tensor_of

__all__ = ["ItemReader"]

_ZSTD = ("stream.zstd/1",)
"""What ``torch.distributed.checkpoint._extension.ZStandard`` calls itself."""

_HEAD_NBYTES = 1536
_TAIL_NBYTES = 2048
"""Bytes before and after an item's values that are examined: torch writes some 700 and 850."""

_AROUND_NBYTES = 1 << 20
"""Bytes of a file of ``torch.save`` beyond those of its one tensor."""

_MOST_MOLDS = 2000
"""Sizes of items that are remembered; each takes some 3 kB."""

_IDENTITY = "/.data/serialization_id"
"""The record that has the digits, since torch 2.1."""


class ItemReader:
    """Reads the items of one folder, and judges those of tensors.

    Args:
        folder: which they are in.
        items: where.
        files: by path, those that they name.
        limits: bounds on what each may ask for.
        wanted: gives what the items of tensors must be.
    """

    def __init__(
        self,
        folder: Source,
        items: Items,
        files: dict[str, Source],
        limits: Limits,
        wanted: Callable[[], Iterable[Wanted]],
    ) -> None:
        self._folder = folder
        self._items = items
        self._files = files
        self._limits = limits
        self._lock = Lock()
        self._tensors: dict[int, TensorEntry] = {}
        self._molds: dict[bytes, _Mold] = {}
        self._seen: dict[tuple[GlobalUse, ...], int] = {}
        self._wanted = wanted

    def judge(self) -> tuple[GlobalUse, ...]:
        """As `ckptkit.checkpoint.Unread.judge`: file by file, in the order of their positions."""
        items, before = self._items, ""
        wanted = sorted(self._wanted(), key=lambda want: (items.paths[want.row], items.starts[want.row]))
        for path, of_file in groupby(wanted, lambda want: items.paths[want.row]):
            if before:
                self._files[before].release()
            before, here = path, [*of_file]
            if self._files[path].is_far:
                self._look_ahead(path, [want.row for want in here])
            for want in here:
                entry = self.tensor(want.row, want.name)
                if entry.shape != want.sizes or entry.dtype != want.dtype:
                    raise CorruptError(
                        f"tensor {want.name!r:.200}: its piece in {path} at {[*want.offsets]} is {entry.dtype} "
                        f"{[*entry.shape]}, not {want.dtype} {[*want.sizes]}"
                    )
        return merge_uses(replace(use, count=use.count * count) for uses, count in self._seen.items() for use in uses)

    def _look_ahead(self, path: str, rows: Sequence[int]) -> None:
        """Read the ends of a file's items together: the file keeps them."""
        ends: list[tuple[int, int]] = []
        for area in map(self._lying, rows):
            ends.append((area.offset, min(area.nbytes, _HEAD_NBYTES)))
            ends.append((area.offset + max(area.nbytes - _TAIL_NBYTES, 0), min(area.nbytes, _TAIL_NBYTES)))
        for _ in self._files[path].ranges(ends):
            pass

    def tensor(self, row: int, name: str) -> TensorEntry:
        """The tensor that an item is.

        Raises:
            CorruptError: it is damaged, or more than one plain tensor.
            Others: as `read`.
        """
        known = self._tensors.get(row)
        if known is not None:
            return known
        area, ends, mold = self._known(row)
        entry = None if mold is None or ends is None else mold.cast(area, *ends, name)
        if entry is None or mold is None:
            raw = self._read(row, name, ends)
            entry, uses = self._alone(raw, row, name), raw.globals
        else:
            uses = mold.raw.globals
        with self._lock:
            self._seen[uses] = self._seen.get(uses, 0) + 1
            self._tensors[row] = entry
        return entry

    def _alone(self, raw: RawCheckpoint, row: int, name: str) -> TensorEntry:
        """The one plain tensor that an item must be."""
        entry = raw.root
        odd = [use for use in raw.globals if use.verdict not in ("torch", "allowed")]
        is_plain = isinstance(entry, TensorEntry) and entry.subclass is None and entry.attributes is None
        if not isinstance(entry, TensorEntry) or not is_plain or odd or raw.discarded or entry.effects:
            names = f": it names {listed([use.name for use in odd], LISTED)}" if odd else ""
            error = CorruptError(f"the item is not one plain tensor{names}", where=self._place(row, name))
            raise error.at(seen=raw.globals)
        return entry

    def read(self, row: int, name: str) -> RawCheckpoint:
        """The content of an item; the keys of its storages begin with the name.

        Raises:
            FormatError: it is damaged or refused.
            UnsupportedError: it went through something other than zstd.
            MissingDependencyError: it is compressed, and nothing that decompresses it is installed.
        """
        area, ends, mold = self._known(row)
        is_object = mold is not None and not isinstance(mold.raw.root, TensorEntry)
        if mold is not None and ends is not None and is_object and mold.tail_of(area, *ends) is not None:
            return mold.raw
        return self._read(row, name, ends)

    def _known(self, row: int) -> tuple[ByteRange, tuple[bytes, bytes] | None, _Mold | None]:
        """Where an item is, its first and last bytes, and what identifies an item that begins like this."""
        area = self._lying(row)
        ends = None if self._items.transforms[row] else self._ends(area)
        return area, ends, None if ends is None else self._molds.get(_kind(ends[0]))

    def _read(self, row: int, name: str, ends: tuple[bytes, bytes] | None) -> RawCheckpoint:
        try:
            records = read_directory(self._area(row, name), self._limits)
            raw = read_archive(records, self._limits)
        except FormatError as error:
            place = self._place(row, name)
            error.where = f"{place}: {error.where}" if error.where else place
            raise
        raw = prefixed(raw, f"{name}:")
        if ends is not None and len(self._molds) < _MOST_MOLDS:
            made = _Mold.of(self._lying(row), ends[0], raw, records)
            if made is not None:
                self._molds[_kind(ends[0])] = made
        return raw

    def _place(self, row: int, name: str) -> str:
        return f"{self._items.paths[row]}, {name!r:.200} at byte {self._items.starts[row]:,}"

    def _lying(self, row: int) -> ByteRange:
        """The stored bytes of an item."""
        items = self._items
        return ByteRange(self._files[items.paths[row]], items.starts[row], items.lengths[row])

    def _ends(self, area: ByteRange) -> tuple[bytes, bytes]:
        """The first and the last bytes of an item."""
        if area.nbytes <= _HEAD_NBYTES + _TAIL_NBYTES:
            data = area.read()
            return data[:_HEAD_NBYTES], data[-_TAIL_NBYTES:]
        return area.read(0, _HEAD_NBYTES), area.read(area.nbytes - _TAIL_NBYTES)

    @cached_property
    def _nbytes(self) -> dict[int, int]:
        """Bytes of the chunks in items: zeros shrink to next to nothing."""
        return {want.row: prod(want.sizes) * DTYPES[want.dtype].itemsize for want in self._wanted()}

    def _area(self, row: int, name: str) -> ByteRange:
        """The decompressed bytes of an item."""
        area, through = self._lying(row), self._items.transforms[row]
        if not through:
            return area
        if through != _ZSTD:
            raise UnsupportedError(f"it went through {listed(map(repr, through))}; only stream.zstd/1 is supported")
        from ckptkit.formats.compression import compression_of
        from ckptkit.formats.sources import Inner

        compression = compression_of(area.read(0, min(area.nbytes, 16)))
        if compression is None or compression.name != "zstd":
            raise CorruptError("it went through stream.zstd/1, but is not a zstd frame")
        inner = Inner(area.file.path, area, area.file, name=name, owns=False)
        most = max(self._limits.unpacked_nbytes, self._nbytes.get(row, 0) + _AROUND_NBYTES)
        parts = compression.parts(inner, self._limits._replace(unpacked_nbytes=most))
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            return Held(first, area.file.path).whole
        with self._lock:  # nothing else is spooled in the meantime
            return spooled(chain((first, second), parts), None, self._folder, "has items of zstd, and takes")


def _kind(head: bytes) -> bytes:
    """The bytes of an item to the end of its first record: its pickle, where torch wrote it."""
    return head[: head.find(DESCRIPTOR_SIGNATURE, 30) + 16]


class _Mold(NamedTuple):
    """The identity of an item.

    Attributes:
        raw: the content of one: a tensor, or immutable values.
        head: its bytes before the values; of what is not a tensor, those of its pickle.
        nbytes: of the item, and of what follows.
        constant: bytes of that which are the same in all, each with where they begin and end.
        checksums: where the values' checksum is in it.
        digits: where its identity is in it, in how many bytes, and where the checksums of that are; ``None``: it has
            none.
    """

    raw: RawCheckpoint
    head: bytes
    nbytes: tuple[int, int]
    constant: tuple[tuple[int, int, bytes], ...]
    checksums: tuple[int, ...]
    digits: tuple[int, int, tuple[int, ...]] | None

    @classmethod
    def of(cls, area: ByteRange, head: bytes, raw: RawCheckpoint, records: Records) -> _Mold | None:
        """What identifies items like one that was read; ``None``: nothing worth searching for."""
        is_tensor = isinstance(raw.root, TensorEntry)
        begin = end = len(_kind(head))
        if isinstance(raw.root, TensorEntry):
            values = raw.root.storage.source
            if not isinstance(values, ByteRange) or values.file is not area.file:
                return None
            begin = values.offset - area.offset
            end = begin + values.nbytes
        elif not _is_constant(raw.root) or raw.discarded or raw.findings:
            return None
        if begin > len(head) or not 0 < area.nbytes - end <= _TAIL_NBYTES:
            return None
        tail = area.read(end)
        own = next((record.data for name, record in records.items() if name.endswith(_IDENTITY)), None)
        marks = None if own is None else (own.offset - area.offset - end, own.nbytes)
        if marks is not None and (marks[0] < 0 or not tail[marks[0] : sum(marks)].isdigit()):
            return None
        checksums = _checksums(tail, area, end, records)
        crc = checksums.get(0) if is_tensor else ()
        crc_of_digits = checksums.get(sum(marks)) if marks is not None else ()
        if crc is None or crc_of_digits is None:
            return None
        holes = [(at, 4) for at in (*crc, *crc_of_digits)] + ([marks] if marks is not None else [])
        constant, at = [], 0
        for start, nbytes in [*sorted(holes), (len(tail), 0)]:
            constant.append((at, start, tail[at:start]))
            at = start + nbytes
        digits = None if marks is None else (*marks, crc_of_digits)
        return cls(raw, head[:begin], (area.nbytes, len(tail)), tuple(constant), crc, digits)

    def tail_of(self, area: ByteRange, head: bytes, last: bytes) -> bytes | None:
        """What follows the values in another item; ``None``: it is shaped differently."""
        nbytes, tail_nbytes = self.nbytes
        if area.nbytes != nbytes or not head.startswith(self.head):
            return None
        tail = last[-tail_nbytes:]
        for start, stop, data in self.constant:
            if tail[start:stop] != data:
                return None
        if len({tail[at : at + 4] for at in self.checksums}) > 1:
            return None
        if self.digits is not None:
            start, count, places = self.digits
            digits = tail[start : start + count]
            crc = zlib.crc32(digits).to_bytes(4, "little")
            if not digits.isdigit() or any(tail[at : at + 4] != crc for at in places):
                return None
        return tail

    def cast(self, area: ByteRange, head: bytes, last: bytes, name: str) -> TensorEntry | None:
        """The tensor in another item; ``None``: it is shaped differently."""
        entry, tail = self.raw.root, self.tail_of(area, head, last)
        if tail is None or not isinstance(entry, TensorEntry):
            return None
        like, begin, (nbytes, tail_nbytes) = entry.storage, len(self.head), self.nbytes
        storage = storage_of(
            f"{name}:{like.key.rpartition(':')[2]}", like.dtype, like.nbytes, like.location,
            ByteRange(area.file, area.offset + begin, nbytes - tail_nbytes - begin),
            int.from_bytes(tail[self.checksums[0] :][:4], "little") or None, like.byteorder,
        )  # fmt: skip
        return tensor_of(
            storage, entry.storage_offset, entry.shape, entry.stride, entry.dtype, entry.requires_grad,
            entry.is_parameter, entry.is_conj, entry.is_neg,
        )  # fmt: skip


def _is_constant(root: object) -> bool:
    """Whether an object may be in several places: it is a plain value, or a tuple of such."""
    return all(isinstance(each, (*SCALARS, Global)) for each in (root if isinstance(root, tuple) else (root,)))


def _checksums(tail: bytes, area: ByteRange, end: int, records: Records) -> dict[int, tuple[int, int]]:
    """Where the checksums of records are in the last bytes of an item: after their bytes, and in the directory.

    Args:
        tail: the bytes from ``end`` on.
        area: the item.
        end: position in it.
        records: of the item, in the order of its directory.

    Returns:
        By the position after a record's bytes, counted from ``end`` like all.
    """
    at, found = find_directory(area)[0] - end, {}
    for record in records.values():
        after = record.data.offset + record.data.nbytes - area.offset - end
        row = CENTRAL.unpack_from(tail, at)
        if tail[max(after, 0) : max(after, 0) + 4] == DESCRIPTOR_SIGNATURE and after >= 0:
            found[after] = after + 4, at + 16
        at += CENTRAL.size + sum(row[10:13])
    return found
