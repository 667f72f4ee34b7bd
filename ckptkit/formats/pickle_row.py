"""Pickles one behind the other in a file, with raw bytes between them, as torch wrote before 1.6.

Nothing says where a pickle ends before it is read, and gigabytes of tensors may follow it.  So it
is read from a window of the file that grows until it holds the pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from struct import Struct

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CorruptError, FormatError, LimitError
from ckptkit.limits import Limits
from ckptkit.pickling.inert import InertDict, PersistentId, walk
from ckptkit.pickling.reader import Constructor, PickleResult, read_pickle
from ckptkit.pickling.trust import global_uses

__all__ = ["PickleRow"]

_SMALL_NBYTES = 4096
"""The first window for a pickle of a few values."""

_GROWTH = 8
"""By how much a window grows: what is read twice stays a small part of the whole."""

_COUNT = Struct("<q")


class PickleRow:
    """A position in a file, and the pickles and raw bytes that are read from it on.

    Args:
        source: the file, or the part of it.
        limits: bounds for each pickle.

    Attributes:
        source: as given.
        pos: of the next byte.
        uses: the verdicts on the names in the pickles so far.
    """

    def __init__(self, source: ByteRange, limits: Limits) -> None:
        self.source = source
        self.pos = 0
        self.uses: list[GlobalUse] = []
        self._limits = limits

    @property
    def left(self) -> int:
        """Bytes that follow."""
        return self.source.nbytes - self.pos

    def pickle(
        self,
        where: str,
        *,
        persistent_load: Callable[[object], object] = PersistentId,
        constructors: Mapping[tuple[str, str], Constructor] | None = None,
        window: int = _SMALL_NBYTES,
    ) -> PickleResult:
        """The next pickle.

        Args:
            where: what it is, for messages: the record, and after a comma the place in it.
            persistent_load: from a persistent id to the node that stands for it.
            constructors: calls that are understood.
            window: bytes that are read at first.

        Raises:
            FormatError: it is damaged or refused; the position in the file is in the message.
        """
        most = min(self.left, self._limits.pickle_nbytes)

        def more(nbytes: int) -> bytes:
            if nbytes == most < self.left:
                raise LimitError("bytes of a pickle", limit=most, actual=most + 1)
            return self.source.read(self.pos, min(nbytes * _GROWTH, most))

        try:
            pickle = read_pickle(
                self.source.read(self.pos, min(window, most)),
                persistent_load=persistent_load,
                constructors=constructors,
                limits=self._limits,
                more=more,
            )
        except FormatError as error:
            if error.offset is not None:
                error.offset += self.pos
            raise error.at(where=where) from error.__cause__
        self.pos += pickle.end
        self.uses.extend(global_uses(pickle.globals, where.partition(",")[0]))
        return replace(pickle, end=self.pos)

    def plain(self, where: str) -> object:
        """The next pickle's value, which must be plain: no names, nothing that is called.

        Raises:
            CorruptError: it is not; no torch wrote that.
        """
        start = self.pos
        pickle = self.pickle(where)
        if pickle.globals or not all(isinstance(node, (bool, list, tuple, InertDict)) for node in walk(pickle.root)):
            names = ", ".join(name.qualified[:80] for name in pickle.globals[:3])
            raise CorruptError(
                f"plain values are expected{f', not the names {names}' if names else ''}: no torch wrote this",
                where=where,
                offset=start,
            )
        return pickle.root

    def count(self, where: str) -> int:
        """The next eight bytes as a whole number, little-endian.

        Raises:
            CorruptError: they are not there, or the number is negative.
        """
        value: int = _COUNT.unpack(self.raw(8, where).read())[0]
        if value < 0:
            raise CorruptError(f"a count of {value:,}: damaged", where=where, offset=self.pos - 8)
        return value

    def raw(self, nbytes: int, where: str) -> ByteRange:
        """Where the next bytes lie; none of them is read.

        Raises:
            CorruptError: they are not all there.
        """
        if nbytes > self.left:
            raise CorruptError(
                f"{nbytes:,} bytes are declared, {self.left:,} are left: damaged or truncated",
                where=where,
                offset=self.pos,
            )
        self.pos += nbytes
        return self.source.part(self.pos - nbytes, nbytes)
