"""What torch's archives have in common: torch-zip, TorchScript, torch.package and exported programs.

All are written by one class (``caffe2/serialize/inline_container.cc`` ``PyTorchStreamWriter``): a zip archive whose
records are under one root folder, which readers take from the first record's name and which means nothing.  Which of
them a file is follows from records that only that one has, as in ``torch/serialization.py`` ``_is_torchscript_zip`` and
``torch/export/pt2_archive/_package.py`` ``is_pt2_package``:

- ``constants.pkl`` beside ``data.pkl``: TorchScript; ``model.json``: TorchScript of 1.0 to 1.3
- ``archive_format``: an exported program (2.6 and later); before, ``serialized_exported_program.json``
  without a root folder
- ``.data/extern_modules``: torch.package (since 1.8)
- ``data.pkl`` and none of these: torch-zip

torch refuses an archive with anything outside its root folder, and one whose root is inside another folder, as after
unpacking and packing again.  Here the root is the one folder that has torch's records; everything outside it is
reported, and searched for names.  Two such folders are refused.

Records beside the data show who wrote it.  ``version`` counts formats, not releases: 2 is torch 1.4
and 1.5, 3 since 1.6.  Since 2.1 there are ``byteorder`` and ``.data/serialization_id``, since 2.7
``.format_version`` and ``.storage_alignment`` (``docs/source/notes/serialization.rst``, pytorch pull
requests 94503, 100994, 143879 and 147788).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ckptkit.checkpoint import GlobalUse
from ckptkit.computed import ByteSource
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.format import TORCH_MARKS, Probe
from ckptkit.formats.zip_archive import LOCAL_SIGNATURE, read_directory
from ckptkit.formats.zip_records import Record, Records, fetch_beginnings, read_record, record_source
from ckptkit.limits import Limits
from ckptkit.pickling.reader import Constructor, PickleResult, read_pickle
from ckptkit.pickling.shortcut import TensorShortcut
from ckptkit.pickling.tensors import TEXT_IDS_MESSAGE, StorageTable
from ckptkit.pickling.trust import global_uses, merge_uses
from ckptkit.report import Finding, convert_command, count_of, human_size, listed
from ckptkit.startup import pattern

if TYPE_CHECKING:
    from ckptkit.formats.contents import ContentSearch

__all__ = ["METADATA", "PICKLE_FUNCTIONS", "ArchiveKind", "TorchArchive", "archive_kind"]

METADATA = "ckptkit/metadata.json"
"""The record in which ckptkit keeps a checkpoint's string metadata, a JSON object; torch ignores it."""

PICKLE_FUNCTIONS = frozenset(
    {"build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "build_tensor_from_id",
     "restore_type_tag"}
)  # fmt: skip
"""The functions that libtorch's pickles call (``torch/jit/_pickle.py``)."""

_CONSTRUCTORS: dict[tuple[str, str], Constructor] = {
    ("torch.jit._pickle", name): lambda args: args[0] if args else NotImplemented
    for name in PICKLE_FUNCTIONS - {"build_tensor_from_id"}
}
"""Those that give their first argument."""

ArchiveKind = Literal["torch-zip", "torchscript", "torch-package", "pt2"]

_MAX_VERSION = 10
"""``kMaxSupportedFileFormatVersion`` of ``caffe2/serialize/versions.h``."""

_OWN_NAMES = frozenset(
    {"version", "byteorder", ".format_version", ".storage_alignment",
     ".data/version", ".data/serialization_id", ".data/python_version", ".data/extern_modules"}
)  # fmt: skip
"""Records that say something about the archive itself."""

_OWN_NBYTES = 64
"""Bytes that they have at most."""


_OWN_ROOT = pattern(r"(.+)/(?:data\.pkl|constants\.pkl|archive_format|\.data/extern_modules)\Z", re.DOTALL)
"""A record that an archive has only once, and the folders above it."""


def archive_kind(probe: Probe) -> ArchiveKind | None:
    """Which kind of torch archive a file is; ``None``: none of them."""
    records = probe.records
    if not records:
        return None
    root = _root(records)
    if root is None:
        return None
    if not _has_version(records, root) and not all(name.startswith(root) for name in records):
        return None  # files of which one is called like a record of torch's
    if f"{root}archive_format" in records or f"{root}serialized_exported_program.json" in records:
        return "pt2"
    if not root:
        return None  # torch reads nothing else without a root folder
    if f"{root}.data/extern_modules" in records:
        return "torch-package"
    if f"{root}model.json" in records:
        return "torchscript"
    if f"{root}data.pkl" not in records:
        return None
    return "torchscript" if f"{root}constants.pkl" in records else "torch-zip"


def _root(records: Mapping[str, Record]) -> str | None:
    """The root folder with its slash (``""``: there is none); ``None``: the archive is not torch's."""
    if "serialized_exported_program.json" in records:
        return ""
    root, slash, _ = next(iter(records)).partition("/")
    is_torchs = slash and (f"{root}/data.pkl" in records or f"{root}/.data/extern_modules" in records)
    if is_torchs and _has_version(records, root + slash):
        return root + slash
    # The first record decides for torch, but whoever looks for the pickle finds it anywhere; what was packed again
    # may have it further down.
    marked = [name for name in records if name.endswith(TORCH_MARKS)]
    folders = dict.fromkeys(name[: 1 - len(mark)] for name in marked for mark in TORCH_MARKS if name.endswith(mark))
    versioned = [folder for folder in folders if _has_version(records, folder)]
    above = [folder for folder in folders if folder.count("/") == 1]
    found = min(versioned, key=lambda folder: folder.count("/"), default=above[0] if above else None)
    if found is not None and found.count("/") > 1 and not all(folder.startswith(found) for folder in versioned):
        return None  # several checkpoints, unpacked and packed
    return found


def _has_version(records: Mapping[str, Record], root: str) -> bool:
    """Whether the records that every torch writer adds beside the data are there."""
    return any(f"{root}{name}" in records for name in ("version", ".data/version", "archive_version"))


_STORAGES = pattern(r"(?:\A|/)(?:data|constants|tensors|weights|traced_inputs)/[^/]*\Z|\.storage\Z")
"""Names of records that are the bytes of tensors, most of them."""


class TorchArchive:
    """A torch archive of any kind, with its records by their name below the root folder.

    Args:
        records: of the zip archive.
        limits: bounds on what the file may ask for.
        levels: archives inside it that are searched.

    Attributes:
        records, limits: these.
        programs: folders that contain only a program for one machine.

    Raises:
        AmbiguousError: more than one folder in the archive is torch's.
        CorruptError: there are no records.
    """

    def __init__(self, records: Records | None, limits: Limits, levels: int = 1) -> None:
        if not records:
            raise CorruptError("an archive without records")
        root = _root(records) or ""
        self.limits = limits
        self.programs: tuple[str, ...] = ()
        self.records = records.below(root)
        self._root = root
        self._outside: dict[str, Record] = {}
        if len(self.records) < len(records):
            self._outside = {
                name: record
                for name, record in records.items()
                if not name.startswith(root) and not (name.endswith("/") and root.startswith(name))
            }
        if self._outside and any(map(_OWN_ROOT.match, self._outside)):
            roots = sorted({root[:-1], *(found[1] for found in map(_OWN_ROOT.match, self._outside) if found)})
            raise AmbiguousError(
                f"an archive with {len(roots)} root folders ({', '.join(roots[:3])}); torch treats the first as the "
                "only one"
            )
        self._fetch_own()
        self._used: set[str] = set()  # what something refers to
        self._known: set[str] = set()  # known to be nothing else than it is read as
        self._looked = False
        self._levels = levels
        self._pickles = 0
        self._unrecorded = 0
        self._uses: list[GlobalUse] = []
        self._discarded: list[object] = []
        self._pickled = 0
        self._text_ids = False

    def _fetch_own(self) -> None:
        """For a remote archive, get everything except the bytes of tensors with few requests."""
        file = next(iter(self.records.values())).data.file
        if file.is_far:
            own = [self.records[name].data for name in self.records if not _STORAGES.search(name)]
            file.settle([(data.offset, data.nbytes) for data in own if data.nbytes <= self.limits.record_nbytes])

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of a record that is there.

        Args:
            name: below the root folder.
            limit: the most bytes it may have; by default the limit of a pickle.

        Raises:
            CorruptError: it is not there, or damaged.
            LimitError: it is larger.
        """
        record = self.records.get(name)
        if record is None:
            raise CorruptError(f"the archive has no record {name!r}: damaged, or not written by torch")
        self._used.add(name)
        return read_record(record, self.limits.pickle_nbytes if limit is None else limit)

    def small(self, name: str) -> str | None:
        """The text of a record of a few characters; ``None``: it is not there."""
        if name not in self.records:
            return None
        return self.read(name, self.limits.record_nbytes).decode("ascii", "replace").strip()

    def version(self) -> str | None:
        """The archive's format version, ``"3"``; newer archives keep it among the hidden records.

        Raises:
            UnsupportedError: a version torch does not read either.
        """
        version = self.small("version")
        version = self.small(".data/version") if version is None else version
        if version is not None and (not version.isdecimal() or not 0 < int(version[:9]) <= _MAX_VERSION):
            raise UnsupportedError(
                f"format version {version[:20]!r}; 1 to {_MAX_VERSION} are supported. A newer ckptkit may read it",
                where="version",
            )
        self._known.add("version" if "version" in self.records else ".data/version")
        return version

    def byteorder(self) -> Literal["little", "big"]:
        """The order of the elements' bytes; archives before 2.1 do not say it.

        Raises:
            CorruptError: it is neither of the two.
        """
        byteorder = self.small("byteorder") or "little"
        if byteorder not in ("little", "big"):
            raise CorruptError(f"byte order {byteorder[:20]!r}; little or big is expected", where="byteorder")
        self._known.add("byteorder")
        return "big" if byteorder == "big" else "little"

    def writer(self) -> str | None:
        """Which torch wrote it, as far as the records show; ``None``: no torch leaves such records."""
        if ".format_version" in self.records or ".storage_alignment" in self.records:
            return "torch 2.7 or later"
        if ".data/serialization_id" in self.records:
            return "torch 2.1 to 2.6" if "byteorder" in self.records and self._is_plain() else "torch 2.1 or later"
        if "byteorder" in self.records:
            return None
        version = self.small("version")
        if version == "2":
            return "torch 1.4 or 1.5"
        return "torch 1.6 to 2.0" if version is not None and version.isdecimal() and int(version[:9]) > 2 else None

    def _is_plain(self) -> bool:
        """Whether ``torch.save`` wrote it, whose newer releases leave more records than TorchScript's."""
        return "data.pkl" in self.records and "constants.pkl" not in self.records

    def locator(self, folder: str, suffix: str = "") -> Callable[[str, int], tuple[ByteSource, int | None]]:
        """What finds the storages of a pickle: see `ckptkit.pickling.tensors.StorageTable`.

        Args:
            folder: of their records, with its slash.
            suffix: that follows the key in their names.
        """
        take = self.records.take

        def locate(key: str, nbytes: int) -> tuple[ByteSource, int | None]:
            name = f"{folder}{key}{suffix}"
            record = take(name)
            if record is None:
                raise CorruptError(f"storage {key!r} has no record {name[:200]}: damaged, or not written by torch")
            _, data, held, is_deflated, crc32 = record
            if held != nbytes:
                raise CorruptError(
                    f"storage {key!r} is declared as {count_of(nbytes, 'byte')}, but its record has {held:,}"
                )
            if crc32 is None:
                self._unrecorded += 1
            return record_source(record) if is_deflated else data, crc32

        return locate

    def pickle(
        self,
        name: str,
        table: StorageTable,
        persistent_load: Callable[[object], object] | None = None,
    ) -> PickleResult:
        """Read the pickle in a record, which must be all there is in it.

        Args:
            name: of the record.
            table: the storages it may name.
            persistent_load: understands persistent ids that are not storages too.

        Raises:
            FormatError: the pickle is damaged or refused; the record's name is in the message.
        """
        data = self.read(name)
        self._pickled += len(data)
        if self._pickled > self.limits.pickle_nbytes:
            raise LimitError("bytes of pickles", limit=self.limits.pickle_nbytes, actual=self._pickled)
        try:
            pickle = read_pickle(
                data,
                persistent_load=persistent_load or table.persistent_load,
                constructors={**table.constructors, **_CONSTRUCTORS},
                limits=self.limits,
                shortcut=TensorShortcut(table.named),
                whole=True,
            )
        except FormatError as error:
            raise error.at(where=name, seen=tuple(self._uses)) from error.__cause__
        self._uses.extend(global_uses(pickle.globals, name))
        self._known.add(name)
        self._pickles += 1
        self._text_ids |= pickle.text_ids
        self._discarded.extend(pickle.discarded)
        return pickle

    def uses(self) -> tuple[GlobalUse, ...]:
        """The verdicts on all that the file holds.

        On the names in the pickles that were read, and on what was not read (`ckptkit.formats.contents`).
        """
        left = [name for name in self._not_located() if name not in self._known] if not self._looked else []
        fetch_beginnings([self.records[name] for name in left])
        for name in left:
            record = self.records[name]
            is_own = name in _OWN_NAMES and not record.deflated and record.nbytes <= _OWN_NBYTES
            if is_own and record.data.read().strip().isdigit():
                continue  # as torch writes them
            if not name.endswith("/"):
                self._contents.look(name, record, is_program=name.startswith(self.programs))
                self._known.add(name)
        self._looked = True
        for name, record in self._outside.items():
            if f"/{name}" not in self._known and not name.endswith("/"):  # no name below the root begins so
                self._contents.look(name, record)
                self._known.add(f"/{name}")
        return merge_uses(self._uses, self._contents.uses() if "_contents" in vars(self) else ())

    @cached_property
    def _contents(self) -> ContentSearch:
        """What looks at records that nothing reads; honest files have none, and open faster without."""
        from ckptkit.formats.contents import ContentSearch

        return ContentSearch(self.limits, self._levels)

    @property
    def discarded(self) -> tuple[object, ...]:
        """What its pickles make and drop, and that belongs to nothing they keep."""
        return tuple(self._discarded)

    @property
    def has_pickle(self) -> bool:
        """Whether there is any, once `uses` looked at all that was not read."""
        return self._pickles > 0 or ("_contents" in vars(self) and bool(self._contents.pickles))

    def code(self, name: str, what: str, reason: str) -> None:
        """Say that a record is code, which is not read."""
        self._contents.code(name, what, reason)

    def include(self, name: str, nested: TorchArchive) -> None:
        """Take in what is in the archive that a record holds, once it was read."""
        self._uses.extend(replace(use, where=tuple(f"{name}, {place}" for place in use.where)) for use in nested.uses())
        self._pickles += nested.has_pickle
        self._discarded.extend(nested.discarded)

    def _not_located(self) -> list[str]:
        """The records that are not the bytes of tensors."""
        return self.records.left()

    def _others(self) -> list[tuple[str, Record]]:
        """The records that nothing in the file refers to, as far as it was read."""
        return [
            (name, self.records[name])
            for name in self._not_located()
            if name not in self._used and name not in _OWN_NAMES and name and not name.endswith("/")
        ]

    def nested(self, name: str) -> TorchArchive | None:
        """The archive that a record holds, as ``torch.save`` wrote it there; ``None``: it holds something else.

        Raises:
            CorruptError: it begins like one, and is damaged or ambiguous.
        """
        record = self.records.get(name)
        if record is None or record.deflated or not record.nbytes:
            return None
        self._used.add(name)
        if record.data.read(0, min(4, record.nbytes)) != LOCAL_SIGNATURE:
            return None
        try:
            nested = TorchArchive(read_directory(record.data, self.limits), self.limits, levels=0)
            if nested.is_repacked:
                raise AmbiguousError("an archive inside an archive that torch did not pack")
        except FormatError as error:
            raise error.at(where=name) from error.__cause__
        if "data.pkl" not in nested.records:
            return None
        self._known.add(name)
        return nested

    @property
    def is_repacked(self) -> bool:
        """Whether something is outside the root folder, or the root is in another: torch never writes that."""
        return bool(self._outside) or self._root.count("/") > 1

    def findings(self) -> list[Finding]:
        """Noteworthy facts about the records, once all needed ones are read."""
        findings = []
        path = next((record.data.file.path for record in self.records.values()), "")
        clean = convert_command(path, suffix=".pth") if self._is_plain() else None
        if self.is_repacked or not _has_version(self.records, ""):
            inside = f"torch's records are below {self._root[:200]!r}"
            inside += "" if _has_version(self.records, "") else ", without the record 'version'"
            beside = f", beside them {listed([name[:80] for name in self._outside], 4)}" if self._outside else ""
            findings.append(
                Finding(
                    code="repacked-archive",
                    severity="warning",
                    message=f"packed again with another program: {inside}{beside}; torch refuses such an archive",
                    fix=clean,
                )
            )
        if self._text_ids:
            findings.append(
                Finding(code="text-persistent-ids", severity="warning", message=TEXT_IDS_MESSAGE, fix=clean)
            )
        if self._unrecorded:
            findings.append(
                Finding(
                    code="crc-not-recorded",
                    severity="info",
                    message=f"{count_of(self._unrecorded, 'storage')} without a checksum: damage there cannot be "
                    "detected",
                )
            )
        findings.extend(_unvouched(self.uses()))
        others = self._others()
        dead = sum(record.nbytes for _, record in others)
        if others:
            shown = listed([name[:80] for name, _ in others], 4)
            pickles = any(name.endswith((".pkl", ".pickle")) for name, _ in others)
            findings.append(
                Finding(
                    code="unreferenced-records",
                    severity="warning" if pickles else "info",
                    message=f"{count_of(len(others), 'record')} of {human_size(dead)} that nothing in the file refers "
                    f"to: {shown}",
                )
            )
        return findings

    def mark(self, names: Iterable[str], *, known: bool = False) -> None:
        """Say that these records belong to the file, though they are not read.

        Args:
            names: theirs.
            known: whether they are the bytes of tensors and nothing else.
        """
        for name in names:
            self._used.add(name)
            if known:
                self._known.add(name)


def _unvouched(uses: Iterable[GlobalUse]) -> Iterator[Finding]:
    """Parts besides names that count for trust."""
    for use in uses:
        shown = ", ".join(place[:80] for place in use.where) + (", ..." if use.count > len(use.where) else "")
        if use.kind == "code" and use.name == "compiled code":
            yield Finding(
                code="foreign-program",
                severity="warning",
                message=f"{count_of(use.count, 'file')} of a program compiled for one machine, not read: {shown}",
            )
        elif use.kind == "unread":
            yield Finding(
                code="not-looked-into",
                severity="warning",
                message=f"{count_of(use.count, 'record')} that could not be read ({use.reason:.200}): {shown}",
            )
