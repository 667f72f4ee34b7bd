"""What stands in bytes that no container's reader understands: pickles, archives, compiled code.

A record that nothing refers to, a resource of a package, a file of the user's in a program, a member of an archive:
whoever is told to will load it, whatever its name.  So each is known by its first bytes:

- a pickle of any protocol (of 0 and 1, which begin like text, one that can be read to its end, or names what runs
  before it goes wrong), torch's row of pickles before 1.6, a numpy array of objects: the names in it are judged
- a zip or tar archive: its records are looked at in the same way, one level deep
- code compiled for a machine, by its magic number or the ending of its name
- anything else is data

What is compressed, encrypted or damaged, lies deeper, or is larger than `ckptkit.limits.Limits` has room for is not
looked into, and that is said: nobody vouches for it.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CkptkitError, FormatError, LimitError
from ckptkit.formats.archives.tar_header import BLOCK_NBYTES, is_header
from ckptkit.formats.archives.zip_archive import LOCAL_SIGNATURE, Record, read_directory, read_record
from ckptkit.formats.format import Probe
from ckptkit.formats.pickle_row import PickleRow
from ckptkit.limits import Limits
from ckptkit.pickling.inert import Global
from ckptkit.pickling.reader import LEGACY_MAGIC, LEGACY_PICKLES
from ckptkit.pickling.trust import global_uses, merge_uses

__all__ = ["COMPILED", "Contents", "names_left", "scanned"]

_HEAD_NBYTES = BLOCK_NBYTES
"""First bytes that tell what a record is: as many as a tar archive's header has."""

_DEFLATED_NBYTES = 4096
"""Packed bytes that are inflated for them at first."""

_MAX_RECORDS = 10_000
"""Records of one archive that are looked at."""

_COMPRESSED = re.compile(
    rb"\x1f\x8b\x08[\x00-\x1f]|BZh[1-9]|\xfd7zXZ\0|\x5d\0\0[\x00-\xff]{2}[\0\xff]|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18"
    rb"|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|PK\x07\x08|\x00\x01BLOSC|LZIP"
)
"""gzip, bzip2, xz, lzma, zstd, lz4, 7z, RAR, zip in several volumes, blosc, lzip."""

_ZLIB = re.compile(rb"\x78[\x01\x5e\x9c\xda]")

COMPILED = re.compile(
    rb"\x7fELF|MZ\x90\0|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\xbe\xba\xfe\xca|!<arch>\n"
    rb"|\0asm|BC\xc0\xde|\xde\xc0\x17\x0b|\x50\xed\x55\xba|\x03\x02\x23\x07|\x07\x23\x02\x03|MTLB|dex\n"
    rb"|__CLANG_OFFLOAD_BUNDLE__|.{4}ET1[0-9]|.{2}\r\n\0\0\0\0|(?:\s|//[^\n]*\n)*\.version\s+[0-9]+\.[0-9]+\s*\.target\s",
    re.DOTALL,
)
"""ELF (with ``.cubin`` and ``.hsaco``), PE, Mach-O and Java, a static library, WebAssembly, LLVM's bitcode, CUDA's fat
binaries, SPIR-V, Metal, Android, offload bundles, ExecuTorch, Python's bytecode, PTX."""

_COMPILED_NAME = re.compile(
    r".*\.(?:so(?:\.[0-9]+)*|dylib|dll|pyd|exe|cubin|fatbin|hsaco|ptx|metallib|spv|wasm|pte|pyc)",
    re.IGNORECASE,
)

_TEXT_PICKLE = re.compile(rb"[(\]})NKMJGTUXBCcILFSVP\x82-\x84\x88-\x8f\x95-\x97]")
"""First bytes of pickles that declare no protocol: what pushes something."""

_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")

_GLOBAL = re.compile(rb"[ci]([A-Za-z_][\w.]{0,100})\n([A-Za-z_][\w.]{0,100})\n")
_TEXT = rb"(?:\x8c[\x01-\x64]|X[\x01-\x64]\0\0\0)([A-Za-z_][\w.]{0,99})(?:\x94|q.|r....|p[0-9]+\n)?"
_STACK_GLOBAL = re.compile(_TEXT + _TEXT + rb"\x93", re.DOTALL)
"""Names as they stand in a pickle that cannot be read to its end (protocol 0 to 3, and 4 on)."""

_DATA = re.compile(
    rb"(?:K.|M..|J....|q.|h.|r....|j....|[N()t\]}aelsud0R\x85-\x89\x94]|ctorch\.jit\._pickle\nbuild_[a-z]+\n){0,1000}",
    re.DOTALL,
)
"""Opcodes of numbers and containers, and what TorchScript's own unpickler makes lists of."""

_SCANNED_NBYTES = 8 << 20
"""Bytes in which names are looked for where the pickle cannot be read."""


class Contents:
    """Looks at one record after the other; what all of them hold stays within the bounds of one file.

    Args:
        limits: bounds on what the file may ask for.
        levels: archives that are opened inside one another.

    Attributes:
        pickles: how many were found.
    """

    def __init__(self, limits: Limits, levels: int = 1) -> None:
        self.pickles = 0
        self._limits = limits
        self._levels = levels
        self._left = limits.pickle_nbytes
        self._uses: list[GlobalUse] = []

    def uses(self) -> tuple[GlobalUse, ...]:
        """The names in all of them, code, and what could not be looked into; see `GlobalUse.kind`."""
        return merge_uses(self._uses)

    def look(self, name: str, held: Record | ByteRange, *, is_program: bool = False) -> None:
        """Look at a record, or at a file as a whole.

        Args:
            name: that it has in what is told of it.
            held: its bytes.
            is_program: whether it is code, or a part of it, whatever it looks like.
        """
        if is_program:
            self.code(name)
        try:
            self._look(name, held, is_program)
        except LimitError:
            self.unread(name, "larger than there is room for")
        except FormatError as error:
            self.unread(name, f"damaged, encrypted or ambiguous: {error.message}")

    def code(self, name: str, what: str = "compiled code", reason: str = "whoever loads the file runs it") -> None:
        """Say that a record is code."""
        self._uses.append(GlobalUse(name=what, verdict="unknown", count=1, where=(name,), reason=reason, kind="code"))

    def unread(self, name: str, why: str) -> None:
        """Say that a record was not looked into."""
        what = "what was not looked into"
        self._uses.append(GlobalUse(name=what, verdict="unknown", count=1, where=(name,), reason=why, kind="unread"))

    def _look(self, name: str, held: Record | ByteRange, is_program: bool) -> None:
        head = _head(held)
        if not head:
            return
        if head.startswith(LOCAL_SIGNATURE) or (len(head) == BLOCK_NBYTES and is_header(head)):
            self._archive(name, held, is_zip=head.startswith(LOCAL_SIGNATURE))
        elif _COMPRESSED.match(head) or _is_zlib(head):
            self.unread(name, "compressed")
        elif head.startswith(b"\x93NUMPY"):
            if re.search(rb"'\|?O", head):
                row = self._row(held)
                row.raw(_array_at(head), name)
                self._pickles(name, row, declared=True)
        elif head[0] == 0x80 or (name.endswith((".pkl", ".pickle")) and _TEXT_PICKLE.match(head)):
            self._pickles(name, self._row(held), declared=True)
        elif COMPILED.match(head) or _COMPILED_NAME.fullmatch(name):
            if not is_program:
                self.code(name)
        elif _TEXT_PICKLE.match(head):
            self._pickles(name, self._row(held), declared=False)

    def _row(self, held: Record | ByteRange) -> PickleRow:
        """What reads pickles from a record's bytes."""
        if not isinstance(held, Record):
            return PickleRow(held, self._limits)
        if held.deflated:
            self._take(held.nbytes)
            return PickleRow(_in_memory(held), self._limits)
        return PickleRow(held.data, self._limits)

    def _take(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            limit = self._limits.pickle_nbytes
            raise LimitError("bytes of what nothing refers to", limit=limit, actual=limit - self._left)

    def _pickles(self, name: str, row: PickleRow, *, declared: bool) -> None:
        """Judge the names in the pickles that follow one another; what is no pickle ends them.

        Args:
            name: of the record.
            row: its bytes.
            declared: whether the record says that it is a pickle; any text has letters that are opcodes.
        """
        if declared and _is_data(row):
            self.pickles += 1
            return
        most = None
        count = 0
        while row.left and count != most:
            start = row.pos
            try:
                pickle = row.pickle(name)
            except FormatError as error:
                named = [use for use in error.globals if declared or _runs(use)]
                if declared:  # others may pass over what is refused here
                    named += scanned(row.source.read(start, min(row.left, _SCANNED_NBYTES)), error.globals)
                    self.unread(name, f"a pickle that cannot be read to its end: {error.message}")
                self._uses.extend(replace(use, where=(name,) if name else ()) for use in named)
                self.pickles += bool(named) or (declared and not count)
                break
            self._take(row.pos - start)
            self._uses.extend(global_uses(pickle.globals, name))
            self.pickles += declared or bool(pickle.globals)
            most = LEGACY_PICKLES if not count and pickle.root == LEGACY_MAGIC else most
            count += 1
            declared = declared and bool(row.left) and row.source.read(row.pos, 1) == b"\x80"

    def _archive(self, name: str, held: Record | ByteRange, *, is_zip: bool) -> None:
        if not self._levels:
            self.unread(name, "an archive inside an archive")
            return
        if isinstance(held, Record):
            if held.deflated:
                self._take(held.nbytes)
            area = _in_memory(held) if held.deflated else held.data
        else:
            area = held
        records: Iterable[tuple[str, Record | ByteRange]] = (
            read_directory(area, self._limits).items() if is_zip else _members(area, self._limits)
        )
        self._levels -= 1
        try:
            for number, (inner, record) in enumerate(records):
                if number == _MAX_RECORDS:
                    self.unread(name, f"of its records the first {_MAX_RECORDS:,} were")
                    break
                self.look(f"{name}/{inner}", record)
        finally:
            self._levels += 1


def _head(held: Record | ByteRange) -> bytes:
    """The first bytes of a record."""
    if not isinstance(held, Record):
        return held.read(0, min(_HEAD_NBYTES, held.nbytes))
    if not held.deflated:
        return held.data.read(0, min(_HEAD_NBYTES, held.nbytes))
    packed = held.data.read(0, min(_DEFLATED_NBYTES, held.data.nbytes))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _HEAD_NBYTES)
    except zlib.error as error:
        raise FormatError(f"it cannot be inflated: {error}") from None


def _is_zlib(head: bytes) -> bool:
    try:
        return bool(_ZLIB.match(head)) and bool(zlib.decompressobj().decompress(head, 1))
    except zlib.error:
        return False


def _array_at(head: bytes) -> int:
    """Where the data of a numpy array begins (``numpy/lib/_format_impl.py``)."""
    width = 2 if head[6:7] == b"\x01" else 4
    return 8 + width + int.from_bytes(head[8 : 8 + width], "little")


class _Held(SourceFile):
    """Bytes in memory that are read like a file."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes, path: str) -> None:
        self._fd, self._companions = -1, []
        self._data, self.size, self.path = data, len(data), path

    def read(self, offset: int, nbytes: int) -> bytes:
        """As `SourceFile.read`; a `ByteRange` asks for nothing that is not there."""
        return self._data[offset : offset + nbytes]


def _in_memory(record: Record) -> ByteRange:
    """A record's bytes, inflated."""
    data = read_record(record, max(record.nbytes, record.data.nbytes))
    return ByteRange(_Held(data, record.data.file.path), 0, len(data))


def _members(area: ByteRange, limits: Limits) -> Iterable[tuple[str, ByteRange]]:
    from ckptkit.formats.archives.tar_archive import read_members

    file = area.file
    if area.offset or area.nbytes != file.size:  # where a tar archive lies in another
        file = _Part(area)
    for member in read_members(file, limits, _MAX_RECORDS):
        if member.kind == "0":
            yield member.name, member.data(file)


class _Part(SourceFile):
    """A range of a file that is read like a file."""

    __slots__ = ("_area",)

    def __init__(self, area: ByteRange) -> None:
        self._fd, self._companions = -1, []
        self._area, self.size, self.path = area, area.nbytes, area.file.path

    def read(self, offset: int, nbytes: int) -> bytes:
        """As `SourceFile.read`."""
        return self._area.read(offset, nbytes)


def _is_data(row: PickleRow) -> bool:
    """Whether a record is one pickle of numbers, texts and containers.

    As those are that TorchScript keeps for debugging, by the thousand: to go from text to text takes a tenth of the
    time that reading them does.
    """
    if row.left > _SCANNED_NBYTES or row.source.read(0, min(2, row.left)) != b"\x80\x02":
        return False
    data = row.source.read()
    at, before = 2, 0
    while at > before:
        before = at
        found = _DATA.match(data, at)
        at = found.end() if found is not None else at
        if data[at : at + 1] == b"X":
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "little")
    return at == len(data) - 1 and data.endswith(b".")


def _runs(use: GlobalUse) -> bool:
    """Whether what was read of a text as a pickle is a name that runs something."""
    return use.verdict == "dangerous" and _NAME.fullmatch(use.name) is not None


# Of files that were refused.


def scanned(data: bytes, known: Iterable[GlobalUse] = ()) -> tuple[GlobalUse, ...]:
    """The names that stand in the bytes of a pickle, found without reading it.

    Args:
        data: the bytes.
        known: names that were found by reading it as far as that goes; they are judged by what they are given.
    """
    found: Counter[tuple[bytes, bytes]] = Counter()
    for pattern in (_GLOBAL, _STACK_GLOBAL):
        found.update(pattern.findall(data[:_SCANNED_NBYTES]))
    names = []
    for (module, name), count in found.items():
        made = Global(module.decode("ascii", "replace"), name.decode("ascii", "replace"))
        made.calls = count
        names.append(made)
    judged = {use.name for use in known}
    return tuple(use for use in global_uses(names) if use.name not in judged)


def names_left(probe: Probe, known: Iterable[GlobalUse] = ()) -> tuple[GlobalUse, ...]:
    """The names in a file that was refused, so that what it would run is told all the same.

    A reader stops at the first thing that is wrong, which need not be the worst, and may be something that other
    readers pass over.

    Args:
        probe: the file.
        known: the names that its reader found.
    """
    found: list[GlobalUse] = []
    contents = Contents(probe.limits)
    # A directory that was refused is not read again.
    records: dict[str, Record] | None = vars(probe).get("records")
    whole = ByteRange(probe.file, 0, probe.file.size)
    try:
        if records:
            for name, record in list(records.items())[:_MAX_RECORDS]:
                contents.look(name.partition("/")[2] or name, record)
                if name.endswith("data.pkl") and not record.deflated:  # the others were scanned where that helps
                    data = record.data.read(0, min(_SCANNED_NBYTES, record.data.nbytes))
                    found.extend(scanned(data, (*known, *contents.uses())))
        elif probe.head[:1] in (b"\x80", LOCAL_SIGNATURE[:1]):
            contents.look("", whole) if probe.head[:1] == b"\x80" else None
            found.extend(scanned(whole.read(0, min(_SCANNED_NBYTES, whole.nbytes)), (*known, *contents.uses())))
        elif is_header(probe.head):
            contents.look("", whole)
    except CkptkitError:
        pass  # what is wrong with it was said
    return tuple(use for use in merge_uses(contents.uses(), found) if use.kind == "name")
