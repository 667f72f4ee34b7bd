"""Recorded checksums, checked against the bytes they were recorded for.

torch's archives record the CRC-32 of each storage and ``torch.load`` passes over it: a flipped bit loads as a weight.
Readers of tensors' bytes say which storages are theirs (`Checksums.want`).  Bytes that pass by anyway are summed on
the way, in pieces of any size and order; what did not pass by is read at the end, on every core.

When two runs of bytes are compared, the sum is that of the one that may have a recorded checksum.

The sums of pieces are combined as zlib's ``crc32_combine`` does (``crc32.c``): a CRC is a polynomial over GF(2), which
bytes that follow multiply by a power of x.
"""

from __future__ import annotations

import sys
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import groupby, islice
from typing import Any, NamedTuple

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.computed import ByteSource, ConvertedRange, DeflatedRange, Inflation, is_made, read_into
from ckptkit.errors import CorruptError
from ckptkit.report import count_of
from ckptkit.transfer.values import will_read
from ckptkit.transfer.workers import buffer, in_parallel, near_together

__all__ = [
    "SUMMED_NBYTES",
    "Checksums",
    "Damage",
    "combined",
    "crc32",
    "damage_error",
    "damage_of",
    "damage_text",
    "first_difference",
]

SUMMED_NBYTES = 16 << 20
"""Bytes of a storage that one thread sums before it looks for other work."""

_APART = 2
"""Such portions of a remote file that threads work on at the same time."""

_READ_NBYTES = 512 << 10
"""Bytes read at a time: they are still in a core's own cache when they are summed, or compared with as many."""

_SMALL_NBYTES = 64 << 10
"""Bytes of a storage that is read along with its neighbours: another call to the operating system costs as much."""

_MANY = 1024
"""Small storages that one thread sums before it looks for other work."""

_LAGS = 49_961, 91_639
"""Bytes: a byte may be moved by these two numbers of bytes instead, because x^(8 * 91639) is x^(8 * (91639 - 49961)) +
1 modulo the polynomial.  They are the least such pair."""

_BLOCK_NBYTES, _FOLDED_NBYTES = 48 << 10, 512 << 10
"""Bytes that are folded at a time, fewer than the first lag, and those from which that is worth its calls."""

_POLYNOMIAL = 0xEDB88320
"""Of CRC-32, its bits reversed."""

_ONE, _X8 = 1 << 31, 1 << 23
"""The polynomials 1, and x to the power of the bits of a byte."""

_REMEDY = "download or copy the file again; --ignore-checksums accepts it, for files that were edited in place"

Names = Callable[[], Mapping[int, str]]
"""Names of storages, by ``id``; only needed if one is damaged."""


_kept = threading.local()


class Damage(NamedTuple):
    """A storage whose bytes are not those its checksum was recorded for, and what is wrong with them."""

    storage: Storage
    what: str


def damage_of(storage: Storage, crc: int) -> Damage | None:
    """The damage of a storage whose bytes have this CRC-32; ``None`` if it is sound, or has no recorded checksum."""
    if storage.crc32 is None or crc == storage.crc32:
        return None
    return Damage(storage, f"the bytes have CRC-32 {crc:08x}, but {storage.crc32:08x} is recorded: the file is damaged")


def damage_text(damages: Sequence[Damage], names: Mapping[int, str]) -> str:
    """The damage, and what helps."""
    storage, what = damages[0]
    place = names.get(id(storage), "bytes of no tensor")
    others = len(damages) - 1
    more = f"; {count_of(others, 'other storage')} {'is' if others == 1 else 'are'} damaged too" if others else ""
    return f"{place}: {what} (storage {storage.key!r:.200}, {count_of(storage.nbytes, 'byte')}){more}; {_REMEDY}"


def damage_error(damages: Sequence[Damage], names: Mapping[int, str]) -> CorruptError:
    """The error for damage: its path is the file's, or in a sharded checkpoint the shard's."""
    return CorruptError(damage_text(damages, names), path=damages[0].storage.source.file.path)


class Passing:
    """Sums bytes of a range as they pass by, from its first on; what has passed so far counts."""

    __slots__ = ("_crc", "_known", "_nbytes", "_place")

    def __init__(self, known: dict[tuple[int, int], tuple[int, int]], place: tuple[int, int]) -> None:
        self._known = known
        self._place = place
        self._crc = self._nbytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        self._crc = crc32(data, self._crc)
        self._nbytes += len(data)
        self._known[self._place] = self._nbytes, self._crc


class Checksums:
    """The recorded checksums of some storages; may be used by several threads at once.

    Args:
        known: whose sums are known here too.
    """

    def __init__(self, known: Checksums | None = None) -> None:
        self._wanted: dict[tuple[int, int, int], Storage] = {}
        self._known: dict[tuple[int, int], tuple[int, int]] = {} if known is None else known._known
        """By file (its ``id``) and first byte: how many bytes were summed, and their CRC-32."""

    def want(self, storages: Iterable[Storage]) -> None:
        """Check these too, each once; a storage cut or converted from others is checked through them."""
        for storage in storages:
            source = storage.source
            if storage.original is None and isinstance(source, ByteRange):  # as nearly all are
                if storage.crc32 is not None and storage.nbytes:
                    self._wanted.setdefault((id(source.file), source.offset, storage.nbytes), storage)
            else:
                self._want_originals(storage)

    def _want_originals(self, storage: Storage) -> None:
        for whole in storage.originals:
            if whole.crc32 is not None and whole.nbytes and not is_made(whole.source):
                place = whole.source.whole.deflated if isinstance(whole.source, DeflatedRange) else whole.source
                self._wanted.setdefault((id(place.file), place.offset, whole.nbytes), whole)

    @property
    def wanted(self) -> list[Storage]:
        """The storages that are checked; those without a recorded checksum are not among them."""
        return list(self._wanted.values())

    def passing(self, run: ByteRange) -> Passing:
        """What takes the bytes of a range as they pass by."""
        return Passing(self._known, (id(run.file), run.offset))

    def along_file(self, file: Source) -> Callable[[int, memoryview], None]:
        """What sums the bytes of a file as they pass by in runs, in any order and from several threads.

        It is called with where in the file a run begins, and its bytes.
        """
        runs = [storage.source for storage in self.wanted if isinstance(storage.source, ByteRange)]
        lying = sorted((run for run in runs if run.file is file), key=lambda run: run.offset)
        starts = [run.offset for run in lying]

        def take(start: int, data: memoryview) -> None:
            end = start + len(data)
            for run in lying[max(bisect_right(starts, start) - 1, 0) : bisect_left(starts, end)]:
                low, high = max(run.offset, start), min(run.offset + run.nbytes, end)
                if low < high:
                    self.note(run.part(low - run.offset, high - low), crc32(data[low - start : high - start]))

        return take

    def note(self, run: ByteRange, crc: int) -> None:
        """The bytes of a range have this CRC-32."""
        self._known[id(run.file), run.offset] = run.nbytes, crc

    def along(self, entry: TensorEntry, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks of a tensor's values, summed as they pass by if they are the file's bytes."""
        source = entry.storage.source
        is_summed = entry.storage.crc32 is not None and entry.is_plain_bytes and entry.nbytes > 0
        if not is_summed or not isinstance(source, ByteRange):
            yield from chunks
            return
        passing = self.passing(source.part(entry.storage_offset * entry.itemsize, entry.nbytes))
        for chunk in chunks:
            passing.update(chunk)
            yield chunk

    def damages(self, *, keep: bool = False) -> list[Damage]:
        """The damage; bytes that have not passed by are read.

        Args:
            keep: whether what is inflated will be read again.

        Raises:
            CorruptError, FileAccessError: something cannot be read.
        """
        held, known = self.wanted, self._known
        broken: dict[int, Damage] = {}
        unread: list[tuple[Storage, ByteRange]] = []
        tasks: list[Callable[[], object]] = []
        nbytes = 0
        for storage in held:
            source = storage.source
            if isinstance(source, ByteRange):
                if known.get((id(source.file), source.offset)) == (source.nbytes, storage.crc32):
                    continue  # as nearly all are
                if self._is_known(storage, source, broken):
                    continue
                unread.append((storage, source))
            elif isinstance(source, DeflatedRange):
                tasks.append(partial(_inflate, storage, source.whole, broken, keep))
            else:
                continue
            nbytes += storage.nbytes
        runs = [run for _, run in unread]
        far = any(run.file.is_far for run in runs)

        def kind(run: ByteRange) -> tuple[int, bool]:
            return id(run.file), run.nbytes <= _SMALL_NBYTES

        runs.sort(key=lambda run: (id(run.file), not far and run.nbytes <= _SMALL_NBYTES, run.offset))
        will_read(runs)
        for (_, is_small), alike in groupby(runs, key=kind):
            while is_small and (some := list(islice(alike, _MANY))):
                tasks.append(partial(self._read_small, some))
            for run in alike:
                for start in range(0, run.nbytes, SUMMED_NBYTES):
                    tasks.append(partial(self._read, run.part(start, min(SUMMED_NBYTES, run.nbytes - start))))
        in_parallel(near_together(tasks, _APART) if far else tasks, nbytes=nbytes)
        for storage, run in unread:
            self._is_known(storage, run, broken)
        return [broken[id(storage)] for storage in held if id(storage) in broken]

    def _is_known(self, storage: Storage, run: ByteRange, broken: dict[int, Damage]) -> bool:
        """Whether all bytes of a storage were summed; it is put among the broken where their sum is another."""
        crc = self._sum(run)
        damage = None if crc is None else damage_of(storage, crc)
        if damage is not None:
            broken[id(storage)] = damage
        return crc is not None

    def is_broken(self, storage: Storage) -> bool:
        """Whether a storage cannot be inflated, or not to the bytes that its checksum was recorded for."""
        broken: dict[int, Damage] = {}
        if isinstance(storage.source, DeflatedRange):
            _inflate(storage, storage.source.whole, broken, keep=False)
        return bool(broken)

    def require(self, names: Names) -> None:
        """Raise where anything is damaged; see `damages`.

        Raises:
            CorruptError: the message names the tensor, and the option that accepts it.
        """
        damages = self.damages()
        if any(damage.storage.source.file.changed() for damage in damages):
            raise CorruptError("the file was changed while it was being read", path=damages[0].storage.source.file.path)
        if damages:
            raise damage_error(damages, names())

    @contextmanager
    def held(self, names: Names) -> Iterator[None]:
        """The block reads the values; damage that it meets, or that is left, is reported by name.

        Raises:
            As `require`.
        """
        try:
            yield
        except CorruptError:  # a compressed record that cannot be inflated, perhaps
            self._wanted = {k: s for k, s in self._wanted.items() if isinstance(s.source, DeflatedRange)}
            self.require(names)
            raise
        self.require(names)

    def _sum(self, run: ByteRange) -> int | None:
        """The CRC-32 of a range, of its pieces that are known; ``None``: they are not all."""
        known, crc = self._known.get((id(run.file), run.offset), (0, 0))
        if known == run.nbytes:
            return crc
        at, end, crc = run.offset, run.offset + run.nbytes, 0
        while at < end:
            nbytes, part = self._known.get((id(run.file), at), (0, 0))
            if not nbytes or at + nbytes > end:
                return None
            crc = combined(crc, part, nbytes)
            at += nbytes
        return crc

    def _read(self, run: ByteRange) -> None:
        passing = self.passing(run)
        for start in range(0, run.nbytes, _READ_NBYTES):
            piece = buffer("checksum", _READ_NBYTES)[: min(_READ_NBYTES, run.nbytes - start)]
            run.file.read_into(run.offset + start, piece)
            passing.update(piece)

    def _read_small(self, runs: Sequence[ByteRange]) -> None:
        """Sum ranges of one file, in the order of their positions."""
        pieces = runs[0].file.ranges([(run.offset, run.nbytes) for run in runs])
        for run, piece in zip(runs, pieces, strict=True):
            self.note(run, zlib.crc32(piece))


def first_difference(
    a: ByteSource, b: ByteSource, compared: Callable[[int], object] = lambda _: None, *, summed: bool = True
) -> tuple[int | None, int]:
    """Position of the first byte that differs, ``None`` where all are equal, and the CRC-32 of ``a`` up to there.

    For converted values it is that of the original bytes.

    Args:
        a: one.
        b: the other.
        compared: called with the number of bytes that were just compared.
        summed: whether the CRC-32 is wanted; else it is 0.
    """
    if a.nbytes != b.nbytes:
        return min(a.nbytes, b.nbytes), 0
    b = b.plain()
    if not is_made(a):
        a = a.plain()
    crc = 0
    for start in range(0, a.nbytes, _READ_NBYTES):
        nbytes = min(_READ_NBYTES, a.nbytes - start)
        left, right = _buffers(nbytes)
        b.file.read_into(b.offset + start, right)
        part = a.part(start, nbytes)
        if isinstance(part, ConvertedRange):
            original = buffer("original", part.original.nbytes)
            part.into(left, original)
        else:
            original = memoryview(left)
            read_into(part, left)
        if summed:
            crc = zlib.crc32(original, crc)
        if left != right:
            return start + next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y), crc
        compared(nbytes)
    return None, crc


def _buffers(nbytes: int) -> tuple[bytearray, bytearray]:
    """Two buffers of this size, the last ones of this thread where they fit; no views, which compare slowly."""
    kept: tuple[bytearray, bytearray] | None = getattr(_kept, "buffers", None)
    if kept is None or len(kept[0]) != nbytes:
        kept = _kept.buffers = bytearray(nbytes), bytearray(nbytes)
    return kept


def _inflate(storage: Storage, whole: Inflation, broken: dict[int, Damage], keep: bool) -> None:
    try:
        (whole.plain if keep else whole.check)()
    except CorruptError as error:
        broken[id(storage)] = Damage(storage, error.message)


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """As ``zlib.crc32``, in half the time where numpy is there already.

    All but the last bytes are folded into later ones, by two exclusive ors of vectors, where zlib looks up tables:
    S. Russell, "Chorba: A novel CRC32 implementation", arXiv:2412.16398, with a different zero polynomial.
    """
    numpy: Any = sys.modules.get("numpy")
    nbytes = len(data)
    if numpy is None or nbytes < _FOLDED_NBYTES or not hasattr(numpy, "bitwise_xor"):
        return zlib.crc32(data, crc)
    near, far = _LAGS
    folded = getattr(_kept, "folded", None)
    if folded is None or len(folded) < far + nbytes:
        folded = _kept.folded = numpy.zeros(
            far + nbytes, numpy.uint8
        )  # the first are those before the data, and stay 0
    source, last = numpy.frombuffer(data, numpy.uint8), nbytes - (far - near)
    for start in range(0, last, _BLOCK_NBYTES):
        end = min(start + _BLOCK_NBYTES, last)
        out = folded[far + start : far + end]
        numpy.bitwise_xor(source[start:end], folded[start:end], out=out)
        numpy.bitwise_xor(out, folded[far - near + start : far - near + end], out=out)
        if start == 0:  # the register's state is as good as in the first bytes
            out[:4] ^= numpy.frombuffer((crc ^ 0xFFFFFFFF).to_bytes(4, "little"), numpy.uint8)
    # Bytes that one lag would fold beyond the end stay in place.
    numpy.bitwise_xor(source[last:], folded[last:nbytes], out=folded[far + last : far + nbytes])
    return zlib.crc32(folded[nbytes : nbytes + far], 0xFFFFFFFF)


def combined(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of bytes and others after them.

    Args:
        first: the CRC-32 of the bytes before.
        second: of those after.
        nbytes: how many are after.
    """
    return _times(_shift(nbytes), first) ^ second if first else second


@lru_cache(4096)
def _shift(nbytes: int) -> int:
    """What so many bytes that follow multiply a CRC by."""
    result, power = _ONE, _X8
    while nbytes:
        if nbytes & 1:
            result = _times(power, result)
        power = _times(power, power)
        nbytes >>= 1
    return result


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product
