"""Consecutive pickles in a file, with raw bytes between them, as torch wrote before 1.6.

Nothing says where a pickle ends before it is read, and gigabytes of tensors may follow it.  So it is read from a window
of the file that grows until it contains the pickle.

torch-legacy: what ``torch.save`` wrote from spring 2017 (0.1) to 1.5, and still does when it is asked to.

Layout (``torch/serialization.py`` ``_legacy_save`` and ``_legacy_load``; ``torch/csrc/serialization.cpp``
``writeFileRaw``), one after the other, nothing between them and nothing after:

- a pickle of the number 0x1950a86a20f9469cfc6c
- a pickle of the protocol, 1001
- a pickle of ``{'protocol_version': 1001, 'little_endian': bool, 'type_sizes': {...}}``, which torch
  does not look at
- a pickle of the object, storages as persistent ids (`ckptkit.pickling.dialects`)
- a pickle of the list of storage keys, sorted; a key is the decimal address the storage had
- for each key of that list, in its order: the number of elements (8 bytes) and the elements

Counts and elements are little-endian whatever ``little_endian`` says.  Old releases wrote counts, and some of them
elements, in the order of a big-endian machine: such a file does not record the order of its elements and is refused.

A reader must accept pickles of any protocol, in Python 2's dialect too, views of storages, classes
with their source, and untyped storages (float8, uint16), which torch writes in this format and does
not read back.  Torch believes the list of keys; here it must name each storage of the object once and no other, each
count must match the object, and the last storage must end the file: there are no checksums, and only this account
reveals a damaged file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from struct import Struct

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import GlobalUse, Storage, TensorEntry
from ckptkit.errors import AmbiguousError, CkptkitError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.format import Probe
from ckptkit.formats.truncated import unfinished
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint, normalize
from ckptkit.pickling.dialects import LegacyTable, writing_release
from ckptkit.pickling.inert import Global, InertDict, PersistentId, walk
from ckptkit.pickling.reader import LEGACY_MAGIC, Constructor, PickleResult, read_pickle
from ckptkit.pickling.tensors import TEXT_IDS_MESSAGE
from ckptkit.pickling.trust import global_uses, merge_uses
from ckptkit.report import Finding, convert_command, count_of, listed, share_of

__all__ = ["PickleRow", "begins_one", "legacy_findings", "read", "storage_in"]

_SMALL_NBYTES = 4096
"""The first window for a pickle of a few values."""

_GROWTH = 8
"""How much a window grows: bytes that are read twice remain a small part of the whole."""

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
            where: for messages: the record, and after a comma the place in it.
            persistent_load: from a persistent id to its node.
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
        return pickle._replace(end=self.pos)

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
                f"plain values are expected{f', not the names {names}' if names else ''}: torch did not write this",
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
        """The range of the next bytes; none of them is read.

        Raises:
            CorruptError: they are not all there.
        """
        if nbytes > self.left:
            raise CorruptError(
                f"{nbytes:,} bytes are declared, but only {self.left:,} are left: damaged or truncated",
                where=where,
                offset=self.pos,
            )
        self.pos += nbytes
        return self.source.part(self.pos - nbytes, nbytes)


_NAME = "torch-legacy"
_PROTOCOL = 1001

_MAGIC_NBYTES = 64
"""Bytes in which the first pickle ends, whatever its protocol: a number of ten bytes."""

_OBJECT_NBYTES = 1 << 20
"""The first window for the object: most state_dicts fit."""

_STORAGE_NBYTES = 4096
"""The first window for the object if it is only a storage."""


def begins_one(head: bytes) -> bool:
    """Whether a file with these first bytes begins with the pickle of the magic number."""
    try:
        root = read_pickle(head[:_MAGIC_NBYTES]).root
    except FormatError:
        return False
    return isinstance(root, int) and root == LEGACY_MAGIC


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    row = PickleRow(probe.file.whole, probe.limits)
    try:
        return _read_row(row, probe.limits, _OBJECT_NBYTES)
    except FormatError as error:
        raise error.at(seen=tuple(row.uses)) from error.__cause__


def storage_in(source: ByteRange, limits: Limits) -> Storage | None:
    """The storage that is all that was saved in a file, or a part of one; ``None``: something else was.

    Raises:
        FormatError: it is damaged or refused.
    """
    row = PickleRow(source, limits)
    try:
        root = _read_row(row, limits, _STORAGE_NBYTES).root
    except FormatError as error:
        raise error.at(seen=tuple(row.uses)) from error.__cause__
    return root if isinstance(root, Storage) else None


def _read_row(row: PickleRow, limits: Limits, window: int) -> RawCheckpoint:
    row.plain("magic number")
    protocol = row.plain("protocol version")
    if protocol != _PROTOCOL:
        what = str(protocol)[:20] if isinstance(protocol, int) else f"a {type(protocol).__name__}"
        raise UnsupportedError(f"protocol version {what}; {_PROTOCOL} is supported", where="protocol version")
    if not isinstance(row.plain("sys_info"), InertDict):
        raise CorruptError("a dict is expected: torch did not write this", where="sys_info")

    table = LegacyTable(row.source.file, limits)
    pickle = row.pickle(
        "object",
        persistent_load=table.persistent_load,
        constructors=table.constructors,
        window=window,
    )
    raw = RawCheckpoint(
        root=table.understood(pickle),
        format=_NAME,
        format_version=str(_PROTOCOL),
        pickle_protocol=pickle.protocol,
        writer=writing_release(pickle.globals),
        globals=merge_uses(row.uses),
        discarded=pickle.discarded,
        findings=(*legacy_findings(table), *_text_ids(pickle, row.source.file.path)),
    )
    _settle(row, _keys(row, table, raw), table, raw)
    if row.left:
        raise _followed(row)
    return raw


def _text_ids(pickle: PickleResult, path: str) -> list[Finding]:
    if not pickle.text_ids:
        return []
    fix = convert_command(path, suffix=".pth")
    return [Finding(code="text-persistent-ids", severity="warning", message=TEXT_IDS_MESSAGE, fix=fix)]


def _keys(row: PickleRow, table: LegacyTable, raw: RawCheckpoint) -> list[str]:
    """The list of keys, which names every storage of the object once."""
    where = "storage keys"
    try:
        listed = row.plain(where)
    except CorruptError as error:
        end = row.pos + sum(8 + storage.nbytes for storage in table.storages.values())
        if row.source.nbytes >= end:
            raise
        every = set(table.storages)
        raise CorruptError(_truncated(row.source, end, every, len(every), raw)) from error
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise CorruptError("a list of strings is expected", where=where)
    keys: list[str] = [key for key in listed if isinstance(key, str)]
    unnamed = [key for key in keys if key not in table.storages]
    if unnamed:
        count = count_of(len(unnamed), "storage")
        raise CorruptError(f"{count} that the object does not name: {_shown(unnamed)}", where=where)
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise AmbiguousError(f"storages are listed twice: {_shown(twice)}", where=where)
    missing = table.storages.keys() - set(keys)
    if missing:
        count = count_of(len(missing), "storage")
        raise CorruptError(f"{count} of the object not listed: {_shown(missing)}", where=where)
    return keys


def _settle(row: PickleRow, keys: list[str], table: LegacyTable, raw: RawCheckpoint) -> None:
    """Find every storage's bytes; the file must hold them all."""
    # What the pickle says is there tells where each storage is, whether or not the file goes so far.
    end = row.pos + sum(8 + table.storages[key].nbytes for key in keys)
    for done, key in enumerate(keys):
        storage = table.storages[key]
        expected = storage.nbytes // table.itemsize(storage)
        check = partial(_require_count, row.source.file.path, row.pos, key, expected)
        if row.left >= 8 and not (
            row.source.file.is_far and row.source.file.on_read(row.source.offset + row.pos, 8, check)
        ):
            check(row.source.read(row.pos, 8))
        if row.left < 8 + storage.nbytes:
            raise CorruptError(_truncated(row.source, end, set(keys[done:]), len(keys), raw))
        row.pos += 8
        table.settle(key, row.raw(storage.nbytes, "storages"))


def _require_count(path: str, at: int, key: str, expected: int, data: bytes) -> None:
    """Raise if a storage's number of elements is not the one that the object says.

    Args:
        path: the file.
        at: the number's position in it.
        key: of the storage.
        expected: the number.
        data: the bytes there.
    """
    if data == expected.to_bytes(8, "little"):
        return
    where = f"storage {key!r:.80}"
    if int.from_bytes(data, "big") == expected:
        raise UnsupportedError(
            "its count is big-endian: an old torch wrote it on a big-endian machine, and there is no way to tell "
            "whether the elements are swapped too. Load it there, and save it with a recent torch",
            path=path,
            where=where,
            offset=at,
        )
    count = int.from_bytes(data, "little", signed=True)
    raise CorruptError(
        f"{count_of(count, 'element', 'is', 'are')} here, but the object says {expected:,}: damaged",
        path=path,
        where=where,
        offset=at,
    )


def _truncated(file: ByteRange, end: int, missing: set[str], total: int, raw: RawCheckpoint) -> str:
    """How much is missing, and which tensors are whole."""
    entries = [node for node in walk(raw.root) if isinstance(node, TensorEntry)]
    cut = [entry for entry in entries if entry.storage.key in missing]
    first = ""
    if cut:
        try:
            names = {id(entry): name for name, entry in normalize(raw, file.file).state_dict.items()}
        except CkptkitError:
            names = {}
        named = [names[id(entry)] for entry in cut if id(entry) in names]
        first = f", the first incomplete one is {named[0]!r:.200}" if named else ""
    whole = f"{share_of(len(entries) - len(cut), len(entries), 'tensor', 'is', 'are')} whole{first}"
    return (
        f"truncated: the file has {file.nbytes:,} bytes, but at least {end:,} are expected ({end - file.nbytes:,} "
        f"missing); {share_of(total - len(missing), total, 'storage', 'is', 'are')} complete, {whole}. Download or "
        f"copy the file again{unfinished(file.file.path)}"
    )


def _followed(row: PickleRow) -> FormatError:
    """The error for a file that continues after the last storage."""
    start = row.source.read(row.pos, min(row.left, _MAGIC_NBYTES))
    what = f"{count_of(row.left, 'byte', 'follows', 'follow')} the last storage"
    if begins_one(start):
        return AmbiguousError(
            f"{what}: another checkpoint, saved into the same file. In Python, torch.load on the open file returns "
            "one after the other; save each to a separate file",
            offset=row.pos,
        )
    return AmbiguousError(f"{what}, which torch does not read: they begin {start[:16]!r}", offset=row.pos)


def _shown(keys: Iterable[str]) -> str:
    return listed((repr(key[:40]) for key in sorted(keys)), 3)


def legacy_findings(table: LegacyTable) -> list[Finding]:
    """Noteworthy facts about a file from before torch 1.6."""
    findings = []
    if table.storages:
        findings.append(
            Finding(
                code="no-checksums",
                severity="info",
                message=f"the container has no checksums: damage to the bytes of its "
                f"{count_of(len(table.storages), 'storage')} cannot be detected",
            )
        )
    if table.sources:
        names = [cls.qualified[:80] if isinstance(cls, Global) else "?" for cls, _, _ in table.sources]
        findings.append(
            Finding(
                code="embedded-source",
                severity="info",
                message=f"the file contains the source text of {count_of(len(names), 'class')}: {listed(names, 4)}",
            )
        )
    return findings
