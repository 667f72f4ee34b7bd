"""The pickles in a file that is no checkpoint: whether it is one, and what those in it name.

Whoever allows no pickle, or only names that need no trust, means all files that are handed on: plain pickles of any
protocol, arrays of objects (``numpy/lib/_format_impl.py``: a header, then a pickle), and members of zip and tar
archives.  An archive is looked into one level, and where a member of it is one of torch's archives, into that too.
What lies beyond is told: archives in archives, compressed streams, what is encrypted or damaged or past the bounds.

Nothing is executed.  Pickles of protocol 0 and 1 are text and declare nothing: a text that only begins like one is
none unless it comes to an end, or to a name that it calls, before the first byte that no unpickler takes.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange, SourceFile
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CorruptError, FormatError
from ckptkit.formats.archives.tar_archive import read_members
from ckptkit.formats.archives.tar_header import is_header
from ckptkit.formats.archives.zip_archive import LOCAL_SIGNATURE, Record, read_directory
from ckptkit.formats.contents import scanned
from ckptkit.formats.detection import ends_like_a_zip
from ckptkit.formats.format import HEAD_NBYTES, Probe
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import global_uses, merge_uses

__all__ = ["Inside", "Looker", "PickleGuess", "guess_pickle", "look_inside", "opaque"]

PickleGuess = str | None
"""``"pickle"``; ``"maybe"``: the first bytes do not tell; ``None``: it is none."""

_DECLARED = re.compile(rb"\x80[\x00-\x05]")
"""PROTO, with which pickles begin since protocol 2."""

_FIRST = re.compile(
    rb"[(\]})NKMJGTUXBC\x88-\x8f\x95\x96]|c[A-Za-z_\x80-\xff][^\n\0 ]*\n[A-Za-z_\x80-\xff]|[IL][\s\d+-]|F[\s\d+.\-inIN]"
    rb"|S['\"]|V"
)
"""How a pickle can begin that declares no protocol: opcodes that take nothing from the stack, which is empty."""

_CALL = re.compile(
    rb"c[A-Za-z_\x80-\xff][^\n\0 ]*\n[A-Za-z_\x80-\xff][^\n\0 ]*\n(?:p\d+\n|q.|r....|\x94)?[()\]}N]", re.DOTALL
)
"""A name as text and the beginning of what it is called with; a list of words has no bracket there."""

_ARRAY = b"\x93NUMPY"
_OF_OBJECTS = re.compile(rb"['\"]\|?O\d?['\"]")

_OPAQUE: dict[bytes, str] = {
    b"\x1f\x8b": "a gzip stream", b"\x1f\x9d": "a compressed stream", b"BZh": "a bzip2 stream",
    b"\xfd7zXZ\x00": "an xz stream", b"\x5d\x00\x00": "an lzma stream", b"\x28\xb5\x2f\xfd": "a zstd stream",
    b"\x04\x22\x4d\x18": "an lz4 stream", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a RAR archive",
    b"PK\x07\x08": "a zip archive in several volumes", b"!<arch>\n": "an ar archive", b"MSCF\x00": "a cabinet archive",
    b"070701": "a cpio archive", b"hsqs": "a SquashFS image",
}  # fmt: skip
"""What may hold pickles and is not read here, by its first bytes."""

_IS_OPAQUE = re.compile(b"|".join(map(re.escape, _OPAQUE)))

_MARKS = ("/data.pkl", "/.data/extern_modules", "/archive_format")
"""Ends of the names of records by which torch's archives are known; see `ckptkit.formats.torch_archive`."""

_LINKS = frozenset("123456")
"""Types of a tar archive's members that have no data of their own."""

_LEGACY_PICKLES = 5
"""Of a file before torch 1.6: all that it has before its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What pickles a file holds, as far as it was looked into.

    Attributes:
        pickles: where they are: names of members; ``""`` is the file itself.
        globals: the verdict on every name in them, each once.
        beyond: what was not looked into, or not to its end (a member's name, ``""`` for the file), and why.
    """

    pickles: tuple[str, ...] = ()
    globals: tuple[GlobalUse, ...] = ()
    beyond: tuple[tuple[str, str], ...] = ()


def guess_pickle(head: bytes, size: int) -> PickleGuess:
    """Whether a file is a pickle, by its first bytes.

    Args:
        head: the first `HEAD_NBYTES`, or all there are.
        size: of the file, in bytes.
    """
    if _DECLARED.match(head):
        return "pickle"
    if _FIRST.match(head) is None:
        return None
    wanted = False

    def more(nbytes: int) -> bytes:
        nonlocal wanted
        wanted = nbytes < size
        return b""

    try:
        pickle = read_pickle(head, more=more)
    except FormatError as error:
        if wanted or type(error) is not CorruptError:  # refused for what other readers may take
            return "maybe"
        return "pickle" if _is_called(head, error) else None
    if pickle.end == size:
        return "pickle"
    return "maybe" if pickle.globals or _FIRST.match(head, pickle.end) or pickle.end == len(head) else None


def _is_called(data: bytes, error: FormatError) -> bool:
    """Whether a pickle that breaks off has called a name before: by then the call is made.

    What is refused without being damaged, other readers may take, and what follows it too.
    """
    if any(use.verdict == "dangerous" for use in error.globals):
        return True
    if type(error) is not CorruptError:
        return _CALL.search(data, error.offset or 0) is not None
    return bool(error.globals) and _CALL.search(data[: (error.offset or 0) + 1]) is not None


def opaque(head: bytes) -> str | None:
    """What a file is that may hold pickles and cannot be looked into; ``None``: it can, or is no container."""
    found = _IS_OPAQUE.match(head)
    if found is not None:
        return _OPAQUE[found[0]]
    if head[:1] == b"\x78" and len(head) > 1 and int.from_bytes(head[:2], "big") % 31 == 0:  # RFC 1950
        try:
            zlib.decompressobj().decompress(head, 1)
        except zlib.error:
            return None
        return "a zlib stream"
    return None


def look_inside(path: str, limits: Limits = DEFAULT_LIMITS) -> Inside:
    """The pickles in a file that is no checkpoint.

    Args:
        path: the file.
        limits: bounds; what is past them stands in `Inside.beyond`.

    Raises:
        FileAccessError: it cannot be opened or read.
    """
    file = SourceFile(path)
    looker = Looker(limits)
    try:
        looker.look(ByteRange(file, 0, file.size), "")
        found = looker.found()
        probe = Probe(file, limits)
        if not probe.head.startswith(LOCAL_SIGNATURE) and ends_like_a_zip(probe):
            found = replace(found, beyond=(*found.beyond, ("", "a zip archive behind something else")))
    finally:
        file.close()
    return found


class Looker:
    """One search for pickles, with its bounds.

    Args:
        limits: `Limits.members` and `Limits.looked_nbytes` are for all that is looked at.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._members = limits.members
        self._left = limits.looked_nbytes
        self._pickles: list[str] = []
        self._uses: list[GlobalUse] = []
        self._beyond: list[tuple[str, str]] = []

    def found(self) -> Inside:
        """What was found so far."""
        return Inside(
            pickles=tuple(dict.fromkeys(self._pickles)),
            globals=merge_uses(self._uses),
            beyond=tuple(dict.fromkeys(self._beyond)),
        )

    def look(self, source: ByteRange, name: str, depth: int = 0) -> None:
        """Look at some bytes.

        Args:
            source: a file, or a member of an archive.
            name: of the member; ``""``: it is the file.
            depth: of archives around it.
        """
        head = source.read(0, min(HEAD_NBYTES, source.nbytes))
        try:
            if head.startswith(_ARRAY):
                self._look_at_array(source, name)
            elif head.startswith(LOCAL_SIGNATURE):
                self._look_into_zip(source, name, depth)
            elif is_header(head):
                if guess_pickle(head, source.nbytes) is not None:  # by the name of the first member
                    self._look_at_pickles(source, name)
                self._look_into_tar(source, name, depth)
            elif (what := opaque(head)) is not None:
                self._beyond.append((name, what))
            elif guess_pickle(head, source.nbytes) is not None:
                self._look_at_pickles(source, name)
        except FormatError as error:
            self._beyond.append((name, f"cannot be read ({error.message})"))

    def _look_at_pickles(self, source: ByteRange, name: str) -> None:
        """Pickles one behind the other."""
        data = source.read(0, min(source.nbytes, self._limits.pickle_nbytes, self._left))
        self._left -= len(data)
        start, uses, broken, is_legacy = 0, list[GlobalUse](), None, False
        for count in range(len(data)):
            if start == len(data) or (is_legacy and count == _LEGACY_PICKLES):
                break
            try:
                pickle = read_pickle(data, start=start, limits=self._limits)
            except FormatError as error:
                broken = error
                break
            if not count:
                from ckptkit.formats.torch_legacy import begins_one

                is_legacy = begins_one(data[:HEAD_NBYTES])
            uses += global_uses(pickle.globals, name)
            start = pickle.end
        is_pickle = _DECLARED.match(data) is not None or bool(uses) or (broken is None and start == source.nbytes)
        if broken is not None:
            left = scanned(data[start:])
            if is_pickle or _is_called(data, broken) or any(use.verdict == "dangerous" for use in left):
                is_pickle = True
                uses += [*broken.globals, *left]
        if not is_pickle:
            return
        self._pickles.append(name)
        self._uses += uses
        if broken is not None:
            self._beyond.append((name, f"a pickle that cannot be read to its end ({broken.message})"))
        elif start < source.nbytes and not is_legacy:
            self._beyond.append((name, f"a pickle of which {start:,} of {source.nbytes:,} bytes were looked at"))

    def _look_at_array(self, source: ByteRange, name: str) -> None:
        """An array file of numpy's: its pickle, where its values are objects."""
        size = 2 if source.read(6, 1) == b"\x01" else 4
        nbytes = int.from_bytes(source.read(8, size), "little")
        header = source.read(8 + size, min(nbytes, self._limits.record_nbytes))
        if _OF_OBJECTS.search(header):
            start = 8 + size + nbytes
            self._look_at_pickles(source.part(start, max(0, source.nbytes - start)), name)

    def _look_into_zip(self, source: ByteRange, name: str, depth: int) -> None:
        records = read_directory(source, self._limits)
        is_torchs = any(record.endswith(_MARKS) for record in records)
        if depth and not (depth == 1 and is_torchs):
            self._beyond.append((name, "an archive in an archive"))
            return
        for record in records.values():
            if not self._may_go_on(name):
                return
            inner = name or record.name  # of torch's archives in an archive it is told which
            head = _head_of(record)
            if depth and not (record.name.endswith((".pkl", ".pickle")) or head.startswith((b"\x80", LOCAL_SIGNATURE))):
                continue  # tensors
            if head and (head.startswith((_ARRAY, LOCAL_SIGNATURE)) or _is_of_interest(head, record.nbytes)):
                if record.deflated and record.nbytes > self._left:
                    self._beyond.append((inner, f"{record.nbytes:,} bytes once inflated, more than are looked at"))
                    continue
                self._look_at_record(record, inner, depth + 1)

    def _look_at_record(self, record: Record, name: str, depth: int) -> None:
        if not record.deflated:
            self.look(record.data, name, depth)
            return
        self._left -= record.nbytes
        with tempfile.TemporaryFile() as spool:
            for piece in _inflated(record):
                spool.write(piece)
            spool.flush()
            file = SourceFile.of_descriptor(spool.fileno(), record.data.file.path)
            try:
                self.look(ByteRange(file, 0, file.size), name, depth)
            finally:
                file._fd = -1  # the spool closes it

    def _look_into_tar(self, source: ByteRange, name: str, depth: int) -> None:
        if depth:
            self._beyond.append((name, "an archive in an archive"))
            return
        for member in read_members(source.file, self._limits, self._limits.members):
            if not self._may_go_on(name):
                return
            if member.kind == "S":
                self._beyond.append((member.name, "a sparse member"))
            elif member.kind not in _LINKS and member.nbytes:
                self.look(member.data(source.file), member.name, depth + 1)

    def _may_go_on(self, name: str) -> bool:
        self._members -= 1
        if self._members < 0:
            self._beyond.append((name, f"more than {self._limits.members:,} members"))
        return self._members >= 0


def _is_of_interest(head: bytes, nbytes: int) -> bool:
    return is_header(head) or opaque(head) is not None or guess_pickle(head, nbytes) is not None


def _head_of(record: Record) -> bytes:
    """The first bytes of a record, once inflated; none of what cannot be."""
    data = record.data.read(0, min(record.data.nbytes, HEAD_NBYTES))
    if not record.deflated:
        return data
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD_NBYTES)
    except zlib.error as error:
        raise CorruptError(f"record {record.name!r} cannot be inflated: {error}") from None


def _inflated(record: Record) -> Iterator[bytes]:
    """A record's bytes, a piece at a time.

    Raises:
        CorruptError: they cannot be inflated, or are not as many as it declares.
    """
    inflater, nbytes = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        for chunk in record.data.chunks():
            while chunk and nbytes <= record.nbytes:
                piece = inflater.decompress(chunk, CHUNK_NBYTES)
                nbytes += len(piece)
                yield piece
                chunk = inflater.unconsumed_tail
    except zlib.error as error:
        raise CorruptError(f"record {record.name!r} cannot be inflated: {error}") from None
    if nbytes != record.nbytes:
        raise CorruptError(f"record {record.name!r} does not inflate to the {record.nbytes:,} bytes it declares")
