"""The content of bytes that no container's reader understands: pickles, archives, compiled code.

A record that nothing refers to, a resource of a package, a user's file in a program, a member of an archive, a file
that is not a checkpoint: someone may load any of them, whatever its name.  So each is identified by its first bytes
(`ckptkit.formats.magic`):

- a pickle of any protocol, or several consecutive ones, the series of pickles that torch wrote before 1.6, a numpy
  array of objects (``numpy/lib/_format_impl.py``: a header, then a pickle): the names in it are judged
- a zip or tar archive: its records are examined in the same way, one level deep, and if one of them is an archive of
  torch's, its records too
- code compiled for a machine
- anything else is data

Anything compressed, encrypted or damaged, nested deeper, or larger than `ckptkit.limits.Limits` allows is not read, and
is reported as unread.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import field, replace

from ckptkit import places
from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import GlobalUse
from ckptkit.computed import Held
from ckptkit.errors import CkptkitError, FileAccessError, FormatError, LimitError
from ckptkit.formats.format import TORCH_MARKS, Probe
from ckptkit.formats.magic import (
    DECLARED,
    FIRST,
    PADDING,
    SCANNED_NBYTES,
    attempts,
    guess_pickle,
    is_compiled,
    is_plain_pickle,
    opaque,
    passes_over,
    runs,
    scanned,
)
from ckptkit.formats.tar_archive import BLOCK_NBYTES, is_header, read_members
from ckptkit.formats.torch_legacy import PickleRow
from ckptkit.formats.zip_archive import LOCAL_SIGNATURE, Record, Records, ends_like_a_zip, read_directory, read_record
from ckptkit.formats.zip_records import fetch_beginnings, record_source
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.reader import LEGACY_MAGIC, LEGACY_PICKLES
from ckptkit.pickling.trust import global_uses, merge_uses
from ckptkit.report import count_of
from ckptkit.startup import dataclass

__all__ = ["ContentSearch", "Inside", "head_of", "look_inside", "names_left"]

_HEAD_NBYTES = BLOCK_NBYTES
"""First bytes that identify a record: as many as a tar archive's header has."""

_DEFLATED_NBYTES = 4096
"""Packed bytes that are inflated for them at first."""

_SMALL_NBYTES = 8 << 20
"""Bytes that are inflated in memory; more go into a temporary file."""

_LEAST_NBYTES = 2048
"""Bytes that reading a pickle counts for at least: so many small ones take some seconds, too."""

_ATTEMPTS = 20_000
"""Names in unreadable bytes that are checked for calls."""

_ARRAY = b"\x93NUMPY"
_OF_OBJECTS = re.compile(rb"['\"]\|?O\d?['\"]")
_MAY_BE_OBJECTS = re.compile(rb"[Oo\\]")
"""In the header of an array, which Python evaluates: ``'|O'``, ``'object'``, ``'i4,O'`` and so on."""

_LINKS = frozenset("123456")
"""Types of a tar archive's members that have no data of their own."""

_LIST = re.compile(rb"c[^\n]*\n[^\n]*\n\.[^\n]")
"""A list of words whose third begins with a dot (``.gitignore``) is a pickle of a name, too."""


@dataclass(slots=True, kw_only=True)
class _Found:
    """The findings about the pickles in a record.

    Attributes:
        is_one: whether there is one.
        count: how many were read to their ends.
        uses: the names in them.
        error: why the next could not be read.
    """

    is_one: bool
    count: int = 0
    uses: list[GlobalUse] = field(default_factory=list)
    error: FormatError | None = None


class ContentSearch:
    """Looks at one record after the other; what all of them hold stays within the bounds of one file.

    Args:
        limits: bounds on what the file may ask for: `Limits.members`, `Limits.looked_nbytes` and `Limits.pickle_nbytes`
            are for everything that is examined.
        levels: how deep archives inside archives are opened; torch's own are opened one level deeper.

    Attributes:
        pickles: their places: names of records, ``""`` for the file itself.
        beyond: content that was not read, or not to its end, and why.
    """

    def __init__(self, limits: Limits, levels: int = 1) -> None:
        self.pickles: list[str] = []
        self.beyond: list[tuple[str, str]] = []
        self._limits = limits
        self._levels = levels
        self._members_left = limits.members
        self._looked_left = limits.looked_nbytes
        self._pickled_left = limits.pickle_nbytes
        self._attempts_left = _ATTEMPTS
        self._uses: list[GlobalUse] = []

    def uses(self) -> tuple[GlobalUse, ...]:
        """The names in all of them, code, and what could not be read; see `GlobalUse.kind`."""
        return merge_uses(self._uses)

    def look(self, name: str, held: Record | ByteRange, *, is_program: bool = False) -> None:
        """Look at a record, or at a file as a whole.

        Args:
            name: its name in messages; ``""``: it is the file.
            held: the file's bytes.
            is_program: whether it is code, or a part of it, whatever it looks like.
        """
        if is_program:
            self.code(name)
        try:
            self._look(name, held, is_program)
        except LimitError as error:
            self.unread(name, f"more than the limit ({error.message})")
        except FormatError as error:
            self.unread(name, f"damaged, encrypted or ambiguous: {error.message}")

    def code(self, name: str, what: str = "compiled code", reason: str = "loading the file runs it") -> None:
        """Say that a record is code."""
        self._uses.append(GlobalUse(name=what, verdict="unknown", count=1, where=(name,), reason=reason, kind="code"))

    def unread(self, name: str, why: str) -> None:
        """Report that a record was not read."""
        what = "unread content"
        self.beyond.append((name, why))
        self._uses.append(GlobalUse(name=what, verdict="unknown", count=1, where=(name,), reason=why, kind="unread"))

    def _look(self, name: str, held: Record | ByteRange, is_program: bool) -> None:
        head = head_of(held)
        if not head:
            return
        is_zip = head.startswith(LOCAL_SIGNATURE)
        is_tar = len(head) == BLOCK_NBYTES and is_header(head)
        declared = DECLARED.match(head) or (name.endswith((".pkl", ".pickle")) and FIRST.match(head))
        is_pickle = False
        if is_zip or is_tar or declared or guess_pickle(head, held.nbytes):
            held = self._plain(held)
            # A tar archive begins with the name of a member, which can be a pickle, too.
            is_pickle = not is_zip and self._pickles(name, held, declared=bool(declared) and not is_tar)
            if is_zip:
                records = read_directory(held, self._limits)
                fetch_beginnings(list(records.values())[: self._members_left] if held.file.is_far else ())
                self._archive(name, records.items(), any(inner.endswith(TORCH_MARKS) for inner in records))
            elif is_tar:
                self._archive(name, self._members(name, held))
        if is_zip or is_tar:
            return
        what = opaque(head)
        if head.startswith(_ARRAY):
            self._array(name, head, held)
        elif not is_pickle and is_compiled(head, name):
            if not is_program:
                self.code(name)
            if what is not None:  # which may hold more than code
                self.beyond.append((name, what))
        elif what is not None:
            self.unread(name, what)

    def _plain(self, held: Record | ByteRange) -> ByteRange:
        """The bytes of a record, inflated."""
        if not isinstance(held, Record):
            return held
        if not held.deflated:
            return held.data
        if held.nbytes > self._looked_left:
            raise LimitError("bytes once inflated", limit=self._limits.looked_nbytes, actual=held.nbytes)
        self._looked_left -= held.nbytes
        if max(held.nbytes, held.data.nbytes) <= _SMALL_NBYTES:
            return Held(read_record(held, _SMALL_NBYTES), held.data.file.path).whole
        try:
            return record_source(held).plain()
        except FileAccessError as error:  # no room in the temporary folder
            raise FormatError(str(error)) from error

    def _array(self, name: str, head: bytes, held: Record | ByteRange) -> None:
        """A numpy array file: its pickle, if its values are objects."""
        width = 2 if head[6:7] == b"\x01" else 4
        start = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
        area = None
        if start > len(head):
            area = self._plain(held)
            head = area.read(0, min(start, area.nbytes, self._limits.record_nbytes))
        header = head[8 + width : start]
        if start <= len(head) and not _MAY_BE_OBJECTS.search(header.replace(b"fortran_order", b"")):
            return
        area = area or self._plain(held)
        values = area.part(min(start, area.nbytes), max(0, area.nbytes - start))
        self._pickles(name, values, declared=_OF_OBJECTS.search(header) is not None)

    def _pickles(self, name: str, area: ByteRange, *, declared: bool) -> bool:
        """Judge the names in the pickles that follow one another.

        Args:
            name: of the record.
            area: its bytes.
            declared: whether the record says that it is a pickle; any text has letters that are opcodes.

        Returns:
            Whether it is one.
        """
        if self._pickled_left <= 0:
            self.pickles.extend([name] * declared)
            raise LimitError("bytes of pickles", limit=self._limits.pickle_nbytes, actual=area.nbytes)
        is_small = 2 < area.nbytes <= SCANNED_NBYTES
        if declared and is_small and area.read(0, 2) == b"\x80\x02" and is_plain_pickle(area.read()):
            self.pickles.append(name)
            return True
        row = PickleRow(area, self._limits._replace(pickle_nbytes=self._pickled_left))
        found = _Found(is_one=declared)
        is_list = not declared and _LIST.match(row.source.read(0, min(row.left, _HEAD_NBYTES))) is not None
        is_legacy = self._read_row(row, name, area, found, is_list=is_list)
        rest = b"" if is_legacy else row.source.read(row.pos, min(row.left, SCANNED_NBYTES))
        if found.error is not None:
            self._follow(row, rest, found, found.error)
        is_whole = not rest.strip(PADDING)
        if not found.is_one and not (is_whole and found.count):
            return False
        self.pickles.append(name)
        self._uses.extend(replace(use, where=(name,) if name else ()) for use in found.uses)
        if not is_whole:
            behind = f"{count_of(row.left, 'byte')} after a pickle"
            what = behind if found.count else "a pickle that cannot be read to its end"
            self.unread(name, what if found.error is None else f"{what}: {found.error.message}")
        return True

    def _read_row(self, row: PickleRow, name: str, area: ByteRange, found: _Found, *, is_list: bool) -> bool:
        """Read one pickle after the other, up to an error; whether they are all that ``torch.save`` once wrote."""
        most, most_nbytes = None, self._pickled_left
        while row.left and found.count != most and found.error is None:
            start = row.pos
            if self._pickled_left <= 0:
                found.error = LimitError("bytes of pickles", limit=most_nbytes, actual=area.nbytes)
                break
            try:
                pickle = row.pickle(name)
            except FormatError as caught:
                found.error = caught
            else:
                found.uses += global_uses(pickle.globals)
                found.is_one = found.is_one or (bool(found.uses) and not is_list) or any(map(runs, found.uses))
                most = LEGACY_PICKLES if not found.count and pickle.root == LEGACY_MAGIC else most
                found.count += 1
            read = row.pos if found.error is None else (found.error.offset or row.pos)
            self._pickled_left -= max(read - start, _LEAST_NBYTES)
            if isinstance(found.error, LimitError):  # one pickle took what a whole file may
                self._pickled_left = 0
        return found.count == most

    def _follow(self, row: PickleRow, rest: bytes, found: _Found, error: FormatError) -> None:
        """Search where a pickle could not be read, and after it."""
        found.uses += error.globals
        found.is_one = found.is_one or error.called or any(map(runs, error.globals))
        if found.is_one:
            found.uses += scanned(rest, error.globals)
        elif passes_over(error, rest, row.left, row.pos):
            left = self._behind(row.source.part(row.pos, row.left), error)
            found.is_one = left is not None
            found.uses += left or ()
            if not found.is_one and isinstance(error, LimitError):
                raise error

    def _behind(self, area: ByteRange, error: FormatError) -> tuple[GlobalUse, ...] | None:
        """The names in bytes that some unpickler may read on; ``None``: none runs something or is called."""
        self._looked_left -= area.nbytes
        if self._looked_left < 0 or area.nbytes > self._limits.pickle_nbytes:
            raise LimitError("bytes after the refused content", limit=self._limits.pickle_nbytes, actual=area.nbytes)
        data = area.read()
        names = scanned(data, error.globals)
        if any(map(runs, names)):
            return names
        for is_called in attempts(data):
            self._attempts_left -= 1
            if self._attempts_left < 0:
                raise LimitError("names after the refused content", limit=_ATTEMPTS, actual=_ATTEMPTS + 1)
            if is_called:
                return names
        return None

    def _members(self, name: str, area: ByteRange) -> Iterator[tuple[str, ByteRange]]:
        for member in read_members(area, self._limits, self._limits.members):
            if member.kind == "S":
                self.unread(f"{name}/{member.name}".lstrip("/"), "a sparse member")
            elif member.kind not in _LINKS:
                yield member.name, member.data(area)

    def _archive(self, name: str, records: Iterable[tuple[str, Record | ByteRange]], is_torchs: bool = False) -> None:
        if self._levels < (0 if is_torchs else 1):
            self.unread(name, "an archive inside an archive")
            return
        self._levels -= 1
        try:
            for inner, record in records:
                self._members_left -= 1
                if self._members_left < 0:
                    self.unread(name, f"more than {self._limits.members:,} members")
                    return
                # For one of torch's in another archive the path says which.
                self.look((name if self._levels < 0 else f"{name}/{inner}") if name else inner, record)
        finally:
            self._levels += 1


def head_of(held: Record | ByteRange) -> bytes:
    """The first bytes of a record."""
    if not isinstance(held, Record):
        return held.read(0, min(_HEAD_NBYTES, held.nbytes))
    if not held.deflated:
        return held.data.read(0, min(_HEAD_NBYTES, held.data.nbytes))
    packed = held.data.read(0, min(_DEFLATED_NBYTES, held.data.nbytes))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _HEAD_NBYTES)
    except zlib.error as error:
        raise FormatError(f"it cannot be inflated: {error}") from None


# Of files that were refused.


def names_left(probe: Probe, known: Iterable[GlobalUse] = ()) -> tuple[GlobalUse, ...]:
    """The names in a file that was refused, so that everything it would run is reported all the same.

    A reader stops at the first thing that is wrong, which need not be the worst, and may be something that other
    readers pass over.

    Args:
        probe: the file.
        known: the names that its reader found.
    """
    found: list[GlobalUse] = []
    contents = ContentSearch(probe.limits)
    # A directory that was refused is not read again.
    records: Records | None = vars(probe).get("records")
    whole = probe.file.whole
    try:
        if records:
            for name, record in list(records.items())[: probe.limits.members]:
                contents.look(name.partition("/")[2] or name, record)
                if name.endswith("data.pkl") and not record.deflated:  # the others were scanned where that helps
                    data = record.data.read(0, min(SCANNED_NBYTES, record.data.nbytes))
                    found.extend(scanned(data, (*known, *contents.uses())))
        else:
            contents.look("", whole)
            if probe.head[:1] in (b"\x80", LOCAL_SIGNATURE[:1]):
                found.extend(scanned(whole.read(0, min(SCANNED_NBYTES, whole.nbytes)), (*known, *contents.uses())))
    except CkptkitError:
        pass  # its problem was reported
    return tuple(use for use in merge_uses(contents.uses(), found) if use.kind == "name")


# Of files that are not checkpoints.


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What pickles a file holds, as far as it was read.

    Attributes:
        pickles: their places: names of members; ``""`` is the file itself.
        globals: the verdict on every name in them, each once.
        beyond: content that was not read, or not to its end (a member's name, ``""`` for the file), and why.
    """

    pickles: tuple[str, ...] = ()
    globals: tuple[GlobalUse, ...] = ()
    beyond: tuple[tuple[str, str], ...] = ()


def look_inside(path: str | Source, limits: Limits = DEFAULT_LIMITS) -> Inside:
    """The pickles in a file that is not a checkpoint.

    Args:
        path: the file, or its source, which is closed.
        limits: bounds; what is past them is in `Inside.beyond`.

    Raises:
        FileAccessError: it cannot be opened or read.
    """
    file = path if isinstance(path, Source) else places.opened(path)
    contents = ContentSearch(limits)
    try:
        contents.look("", file.whole)
        if not head_of(file.whole).startswith(LOCAL_SIGNATURE) and ends_like_a_zip(file.whole):
            contents.unread("", "a zip archive after something else")
    finally:
        file.close()
    return Inside(
        pickles=tuple(dict.fromkeys(contents.pickles)),
        globals=tuple(use for use in contents.uses() if use.kind == "name"),
        beyond=tuple(dict.fromkeys(contents.beyond)),
    )
