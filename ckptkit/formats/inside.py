"""The content of a file: the members of an archive, what they decompress to, and which of them is meant.

The members of a zip or tar archive are files; those of torch's own archives are records, not files.  Archives with
several checkpoints, one of which is the model, are in `_LAYOUTS`:

- ``.nemo`` (NeMo, ``nemo/core/connectors/save_restore_connector.py``): a tar, compressed or not, with
  ``model_config.yaml`` and ``model_weights.ckpt``
- stable-baselines3 (``stable_baselines3/common/save_util.py`` ``save_to_zip_file``): a zip with ``policy.pth``, the
  optimizers and other tensors in ``.pth`` files beside it, and ``data``: JSON with pickles in base64, which loading
  runs

The other members of an archive whose only checkpoint is opened are searched for pickles all the same.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping

from ckptkit.bytesource import ByteRange, Source, SourceFile
from ckptkit.computed import Held
from ckptkit.errors import (
    AmbiguousError,
    FileAccessError,
    FormatError,
    LimitError,
    MissingFileError,
    UnknownFormatError,
)
from ckptkit.formats.compression import ENDINGS, FRAME_NBYTES, Compression, compression_of, decompressed
from ckptkit.formats.containers import FORMATS, SUFFIXES, holds_files, identify
from ckptkit.formats.contents import ContentSearch, head_of
from ckptkit.formats.format import Around, Probe
from ckptkit.formats.magic import guess_pickle
from ckptkit.formats.sharded import shard_names
from ckptkit.formats.shards import is_index_name, name_of
from ckptkit.formats.sources import Inner, room_for
from ckptkit.formats.tar_archive import is_header, read_members
from ckptkit.formats.torch_archive import archive_kind
from ckptkit.formats.torch_legacy import begins_one
from ckptkit.formats.torch_tar import holds_one
from ckptkit.formats.zip_archive import LOCAL_SIGNATURE, Record
from ckptkit.formats.zip_records import fetch_beginnings, read_record, record_source
from ckptkit.limits import Limits
from ckptkit.nearness import asked_of, near_names
from ckptkit.remote import source_at
from ckptkit.report import Finding, count_of, listed, split_member
from ckptkit.startup import dataclass

__all__ = ["ENDINGS", "begins_like_one", "entered", "member_at", "member_of"]

_DATA_NBYTES = 64 << 20
"""Bytes of the JSON in a stable-baselines3 archive that are read."""


# What is an archive.


@dataclass(frozen=True, slots=True)
class _Layout:
    """A kind of archive in which the model's member is known.

    Attributes:
        what: its description.
        needs: members that identify it.
        meant: the one that is opened.
        pickled: members that contain pickles in JSON.
    """

    what: str
    needs: frozenset[str]
    meant: str
    pickled: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout("a NeMo model", frozenset(("model_config.yaml", "model_weights.ckpt")), "model_weights.ckpt"),
    _Layout(
        "a model of stable-baselines3",
        frozenset(("data", "policy.pth", "_stable_baselines3_version")),
        "policy.pth",
        pickled=("data",),
    ),
)


def _layout_of(names: Mapping[str, object]) -> _Layout | None:
    return next((layout for layout in _LAYOUTS if layout.needs <= names.keys()), None)


class _Archive:
    """The files in a zip or tar archive.

    Args:
        file: the archive.
        limits: bounds on what it may ask for.

    Attributes:
        members: by name, without ``./`` before it.
        twice: names that occur several times.
        others: members that are neither files nor folders, with their kinds.
    """

    def __init__(self, file: Source, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self.members: dict[str, Record | ByteRange] = {}
        self.twice: set[str] = set()
        self.others: dict[str, str] = {}
        self._plain: dict[str, ByteRange] = {}

    def add(self, name: str, held: Record | ByteRange) -> None:
        """Add a member."""
        name = _tidy(name)
        if name in self.members:
            self.twice.add(name)
        self.members[name] = held

    def open(self, name: str, path: str | None = None, *, owns: bool = True) -> Inner:
        """A member as a source.

        Args:
            name: its name.
            path: what messages call it.
            owns: whether the archive is closed with it.

        Raises:
            AmbiguousError: there are two of the name.
            LimitError: all that were opened are many times as large as the archive.
            CorruptError: it cannot be inflated.
        """
        if name in self.twice:
            raise AmbiguousError(f"two members are named {name!r}; readers disagree about which counts")
        held = self.members[name]
        data = self._inflated(name, held) if isinstance(held, Record) else held
        made = Inner(
            path or f"{self.file.path}!{name}",
            data,
            self.file,
            name=f"{name_of(self.file)}/{name}",
            owns=owns,
            sibling=lambda other: self._beside(name, other),
        )
        made.crc32 = held.crc32 if isinstance(held, Record) and not held.deflated else None
        return made

    def _inflated(self, name: str, record: Record) -> ByteRange:
        """The bytes of a member of a zip archive; what is deflated is inflated once."""
        if not record.deflated:
            return record.data
        if name not in self._plain:
            allowed = room_for(self.file, self.limits)
            actual = record.nbytes + sum(area.nbytes for area in self._plain.values())
            if actual > allowed:
                raise LimitError("bytes of an archive's members, which are compressed", limit=allowed, actual=actual)
            self._plain[name] = record_source(record).plain()
        return self._plain[name]

    def _beside(self, name: str, other: str) -> Source:
        found = posixpath.normpath(posixpath.join(posixpath.dirname(name), other))
        if found not in self.members:
            raise MissingFileError(f"{self.file.path}: no member {found!r}", path=self.file.path)
        return self.open(found, owns=False)

    def checkpoints(self) -> list[str]:
        """The names of the members that are checkpoints by their content; for shards with an index, only the index."""
        fetch_beginnings([held for held in self.members.values() if isinstance(held, Record)])
        found = [name for name, held in self.members.items() if self._is_checkpoint(name, held)]
        shards: set[str] = set()
        for name in found:
            if is_index_name(name):
                folder = posixpath.dirname(name)
                shards.update(posixpath.join(folder, each) for each in shard_names(self.open(name, owns=False)))
        return [name for name in found if name not in shards]

    def _is_checkpoint(self, name: str, held: Record | ByteRange) -> bool:
        stem, ending = os.path.splitext(name)
        is_named = (os.path.splitext(stem)[1] if ending in ENDINGS else ending).lower() in SUFFIXES
        try:
            head = head_of(held)
            if compression_of(head) is not None:
                return is_named
            is_index = is_index_name(name) and head[:1] == b"{"
            may_be = is_index or head[8:9] == b"{" or head.startswith(LOCAL_SIGNATURE) or begins_one(head)
            if not (may_be or is_header(head)) and guess_pickle(head, held.nbytes) is None:
                return False
            probe = Probe(self.open(name, owns=False), self.limits)
            claims = [container.name for container in FORMATS if container.claims(probe)]
            return claims != [] and (claims != ["torch-tar"] or holds_one(probe))
        except FormatError as error:  # damaged, or readers disagree about it, which opening it tells
            if isinstance(error, LimitError) and not is_named:
                raise  # it may be one
            return is_named

    def meant(self) -> tuple[str, _Layout | None] | None:
        """The member that is opened for the whole, and what the archive is; ``None``: there is no checkpoint in it.

        Raises:
            UnknownFormatError: there are several; the message says how to name one.
        """
        layout = _layout_of(self.members)
        if layout is not None:
            return layout.meant, layout
        found = self.checkpoints()
        if len(found) > 1:
            is_path = self.file.is_far or split_member(f"{self.file.path}!{found[0]}") is not None
            each = [f"{self.file.path if is_path else 'FILE'}!{name:.200}" for name in found]
            how = "" if is_path else ", by its path: members of standard input or of an open file cannot be named"
            raise UnknownFormatError(
                f"an archive with {count_of(len(found), 'checkpoint')} in it; give one of them{how}: {listed(each, 8)}",
                names=found,
            )
        return (found[0], None) if found else None

    def judged(self, besides: str, layout: _Layout | None) -> ContentSearch:
        """The content of all members except one, and those that belong to it."""
        contents = ContentSearch(self.limits)
        known = {besides}
        fetch_beginnings([held for held in self.members.values() if isinstance(held, Record)][: self.limits.members])
        if is_index_name(besides):
            folder = posixpath.dirname(besides)
            known.update(posixpath.join(folder, each) for each in shard_names(self.open(besides, owns=False)))
        for number, (name, held) in enumerate(self.members.items()):
            if number >= self.limits.members:
                contents.unread("", f"more than {self.limits.members:,} members")
                break
            if name not in known:
                contents.look(name, held)
            if layout is not None and name in layout.pickled:
                _look_into_json(contents, name, held)
        for name in self.twice:
            contents.unread(name, "one of two members of this name")
        for name, kind in self.others.items():
            contents.unread(name, kind)
        return contents


def _tidy(name: str) -> str:
    return re.sub(r"\A(?:\./+)+", "", name)


def _look_into_json(contents: ContentSearch, name: str, held: Record | ByteRange) -> None:
    """Look at the pickles in the JSON of stable-baselines3: ``{key: {":serialized:": base64}}``."""
    try:
        nbytes = held.nbytes
        if nbytes > _DATA_NBYTES:
            raise LimitError("bytes of JSON with pickles", limit=_DATA_NBYTES, actual=nbytes)
        document = json.loads(read_record(held, _DATA_NBYTES) if isinstance(held, Record) else held.read())
        for value in document.values() if isinstance(document, dict) else ():
            if isinstance(value, dict) and ":serialized:" in value:
                data = base64.b64decode(value[":serialized:"].encode())
                contents.look(name, Held(data, held.data.file.path if isinstance(held, Record) else "").whole)
    except (FormatError, ValueError, RecursionError, AttributeError, binascii.Error) as error:
        contents.unread(name, f"JSON with pickles that cannot be read: {error}")


_KINDS = {"1": "a link", "2": "a link", "3": "a device", "4": "a device", "6": "a pipe", "S": "a sparse file"}
"""Types of a tar archive's members that are not files that are read."""


def _archive_in(probe: Probe) -> _Archive | None:
    """The archive that a file is; ``None``: it is not one, or it is torch's."""
    archive = _Archive(probe.file, probe.limits)
    if probe.records is not None:
        if archive_kind(probe) is not None:
            return None
        for name, record in probe.records.items():
            if not name.endswith("/"):
                archive.add(name, record)
        return archive
    if [container.name for container in FORMATS if container.claims(probe)] != ["torch-tar"] or holds_one(probe):
        return None
    identify(probe, FORMATS)  # which refuses a file that is two things at once
    for member in read_members(probe.file.whole, probe.limits, probe.limits.members):
        if member.path is not None and not member.path.endswith("/"):
            archive.add(member.path, member.data(probe.file.whole))
        elif member.kind in _KINDS or member.kind == "x":
            archive.others[_tidy(member.name)] = _KINDS.get(member.kind, "a member changed by a pax header")
    return archive


# Which file is meant.


def entered(probe: Probe) -> Probe:
    """The checkpoint in a compressed file or an archive, with findings about the way to it; otherwise the file.

    Raises:
        FormatError: it is damaged, too large, or an archive of several checkpoints.
        MissingDependencyError: what decompresses it is not installed.
    """
    given, limits = probe.file, probe.limits
    around = Around(given, (), (), False, "")
    try:
        for level in range(limits.levels + 1):
            if not holds_files(probe):
                break
            if level == limits.levels:
                raise LimitError("files inside one another", limit=limits.levels, actual=level + 1)
            step = _step(probe, given.path, around)
            if step is None:
                break
            found, around = step
            found.around = around
            probe = Probe(found, limits)
    except FormatError as error:
        raise around.at(error) if around.where else error from error.__cause__
    return probe


def _step(probe: Probe, path: str, around: Around) -> tuple[Inner, Around] | None:
    """What a file decompresses to, or its only meant member, and the way to it; ``None``: there is none."""
    compression = compression_of(probe.head)
    if compression is not None:
        found = decompressed(probe.file, compression, probe.limits)
        told = f"{compression.name}-compressed: its {probe.file.size:,} bytes decompress to {found.size:,}"
        return found, around.further("decompressed", Finding(code="compressed", severity="info", message=told))
    archive = _archive_in(probe)
    meant = None if archive is None else archive.meant()
    if archive is None or meant is None:
        return None
    name, layout = meant
    found = archive.open(name, path)
    contents = archive.judged(name, layout)
    others = [repr(other) for other in archive.members if other != name]
    what = f" ({layout.what})" if layout is not None else ""
    told = f"{name!r:.200} in this archive{what} is shown"
    told += f"; others: {listed(others, characters=80)}" if others else ""
    finding = Finding(code="inside-an-archive", severity="info", message=told)
    has_pickle = bool(contents.pickles or contents.beyond)
    return found, around.further(f"{name:.200}", finding, contents.uses(), has_pickle=has_pickle)


def member_of(path: str, limits: Limits) -> Source | None:
    """The file that ``FILE/MEMBER`` or ``FILE!MEMBER`` means; ``None``: no beginning of the path is a file.

    Raises:
        MissingFileError: the archive has no such member; the message lists those that it has.
        FileAccessError: the file is not an archive of files.
        FormatError: it is damaged.
    """
    split = split_member(path)
    if split is None:
        return None
    return _member_in(SourceFile(split[0]), split[1], path, limits)


_MOST_TRIES = 3
"""Beginnings of a URL that are tried: each takes a trip."""


def member_at(url: str, limits: Limits) -> Source | None:
    """The file that ``URL/MEMBER`` or ``URL!MEMBER`` means, where no file has that URL.

    ``None``: none of the URL's longest beginnings that look like a file's is one.

    Raises:
        As `member_of`.
    """
    rest = url.index("://") + 3
    found = [match.start() for match in re.finditer("!", url[rest:])]
    if "?" not in url:
        found += [match.end() - 1 for match in re.finditer(r"(?<=/)[^/]*\.[^/]*/", url[rest:])]
    for at in sorted((rest + each for each in found), reverse=True)[:_MOST_TRIES]:
        if url[at + 1 :]:
            try:
                file = source_at(url[:at])
            except MissingFileError:
                continue
            return _member_in(file, url[at + 1 :], f"{file.path}{url[at:]}", limits)
    return None


def _member_in(file: Source, wanted: str, path: str, limits: Limits) -> Source:
    try:
        return _member(file, wanted, path, limits)
    except FormatError as error:
        file.close()
        raise error.at(path=file.path) from error.__cause__
    except BaseException:
        file.close()
        raise


def _member(file: Source, wanted: str, path: str, limits: Limits) -> Source:
    """The kind of a file's member; for one in an archive inside it, the archive is opened first."""
    probe = Probe(file, limits)
    while holds_files(probe) and (compression := compression_of(probe.head)) is not None:
        probe = Probe(decompressed(probe.file, compression, limits), limits)
    archive = _archive_in(probe) if holds_files(probe) else None
    if archive is None:
        claims = [container.name for container in FORMATS if container.claims(probe)]
        what = (
            f"is a checkpoint itself ({claims[0]}) and contains records, not files" if claims else ("is not an archive")
        )
        told = f"{file.path}: {what}; there is no {wanted!r:.200} to open. Give the file: {file.path}"
        raise FileAccessError(told, path=file.path)
    if wanted in archive.members:
        return archive.open(wanted, path)
    for separator in re.finditer(r"[/!]", wanted):
        name, inner = wanted[: separator.start()], wanted[separator.end() :]
        if name in archive.members and inner:
            return _member(archive.open(name, path.removesuffix(wanted[separator.start() :])), inner, path, limits)
    below = [name for name in archive.members if name.startswith(wanted.rstrip("/") + "/")]
    what = f"{wanted!r:.200} is a folder in it" if below else f"it has no member {wanted!r:.200}"
    names = below or sorted(archive.members, key=lambda name: os.path.splitext(name)[1].lower() not in SUFFIXES)
    told = listed([f"{name!r:.200}" for name in names], 10) or "nothing"
    meant = "" if below else asked_of(map(repr, near_names(wanted, names)))
    raise MissingFileError(f"{file.path}: {what}; it contains {told}{meant}", path=file.path, names=names)


def begins_like_one(probe: Probe) -> bool:
    """Whether a checkpoint is in a compressed file or an archive by what its first bytes, or its members' names, show.

    For files in folders, of which there may be many: only a beginning is decompressed.
    """
    if probe.records is not None:
        return _layout_of(dict.fromkeys(map(_tidy, probe.records))) is not None
    compression = compression_of(probe.head)
    if compression is None:
        return _begins_a_layout(probe.file.whole, probe.limits)
    try:
        head = b"".join(_first(compression, probe))
    except Exception:  # it cannot be read, so nothing is known about it
        return False
    inner = Probe(Held(head, probe.file.path), probe.limits)
    if inner.head.startswith(LOCAL_SIGNATURE):
        return any(mark in head for mark in (b"/data.pkl", b"/.data/", b"/.format_version", b"/archive_format"))
    if begins_one(inner.head) or (inner.head[8:9] == b"{" and inner.head[5:8] == bytes(3)):
        return True
    return _begins_a_layout(inner.file.whole, probe.limits)


_BEGINNING_NBYTES = 256 << 10
"""Bytes of a compressed file that are decompressed to identify it in a folder; bzip2 returns none before a block of up
to 900,000."""

_MOST_NAMES = 64
"""Members of an archive in a folder whose names are examined."""


def _first(compression: Compression, probe: Probe) -> Iterator[bytes]:
    """The first bytes that a compressed file decompresses to."""
    made = 0
    with_all = compression.name == "bzip2"
    nbytes = min(probe.file.size, (1 << 20) if with_all else _BEGINNING_NBYTES)
    stream = compression.stream()
    for start in range(0, nbytes, FRAME_NBYTES):
        part = stream.decompress(probe.file.read(start, min(FRAME_NBYTES, nbytes - start)), _BEGINNING_NBYTES)
        made += len(part)
        yield part
        if made >= _BEGINNING_NBYTES or stream.eof:
            return


def _begins_a_layout(area: ByteRange, limits: Limits) -> bool:
    """Whether the members of a tar archive, as far as they exist, are those of a layout."""
    names: dict[str, object] = {}
    with contextlib.suppress(FormatError):  # cut off, if this is the beginning of one
        for member in read_members(area, limits, _MOST_NAMES):
            names[_tidy(member.path or "")] = None
    return _layout_of(names) is not None or "model_weights.ckpt" in names
