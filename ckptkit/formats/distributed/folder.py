"""The folder of a sharded training checkpoint as the one file that was given.

A folder that several processes wrote is one checkpoint: a `FolderSource` represents it, has no bytes itself, and opens
the files in it, each once.  A file is named by its path below the folder, with slashes; a name that leads out of it is
refused, whatever its source.  A file that is itself a symbolic link is followed, since caches consist of such links.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptkit import places
from ckptkit.bytesource import ByteRange, Source, first_changed
from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CkptkitError, CorruptError, FormatError, LimitError
from ckptkit.formats.containers import CONTAINERS, identify
from ckptkit.formats.format import Probe
from ckptkit.formats.shards import TEXTS, is_shard_name, prefixed
from ckptkit.formats.zip_archive import LOCAL_SIGNATURE, read_directory
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import RawCheckpoint
from ckptkit.report import Finding
from ckptkit.startup import pattern

__all__ = ["FolderSource", "folder_of", "left_over", "listing", "read_part"]

_DEEPEST = 4
"""Folders below the given one that are searched: ``zero/NAME/fp32.pt``, ``mp_rank_00/model_optim_rng.pt``."""


_END = pattern(rb"PK\x05\x06.{8}(.{4})(.{4})\x00\x00", re.DOTALL)
_END_NBYTES = 22
_ZIP64_NBYTES = 76
_IN_ZIP64 = 0xFFFFFFFF
"""The end of a zip archive: the size and the place of its directory.  Records of zip64 may be between."""

_SEARCHED_NBYTES = 8 << 20

_OPENED = 100
"""After how many files of a folder it is seen to that as many may be open at once."""


def _let_open(count: int) -> None:
    """Let this process have so many files open, as far as the system lets it say so itself.

    Shells start programs with 1,024 on Linux and 256 on macOS, and a checkpoint may have a file a rank, or a tensor.
    """
    try:
        import resource
    except ImportError:  # systems without POSIX
        return
    if sys.platform == "win32":  # what it has of that is a package that somebody installed
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_READ_APART = (".distcp", ".metadata", *TEXTS)
"""How files end that are not read with all others: items, and texts."""


class FolderSource(Source):
    """A folder whose files are one checkpoint.

    Args:
        path: what messages call it: as it was given.
        root: the folder that the files are in: the given one, or the one that it points to.
        layout: name of its format (`ckptkit.formats.format.Format`).
        names: the files, by their paths below ``root``, with slashes.
        tag: the name of the chosen step, if there are several; ``None``: the folder contains one.
        own: those of the files that belong to the checkpoint; ``None``: all.
        members: what it is combined from (`ckptkit.formats.distributed.joined`).
        asked: the tag that was asked for.
        findings: about the way to it.

    Attributes:
        root, layout, names, tag, own, members, asked, findings: as above.
        parts: the files that were opened, by name.
        tp_rules: the rules for joining slices of ranks (`ckptkit.formats.distributed.tensor_parallel.Rule`).
        rules: the file that they were read from.
    """

    __slots__ = (
        "_is_listed", "_is_together", "_opens", "asked", "findings", "is_far", "layout", "members", "names", "own",
        "root", "rules", "tag", "tp_rules",
    )  # fmt: skip

    def __init__(
        self,
        path: str,
        root: str,
        layout: str,
        names: tuple[str, ...],
        tag: str | None = None,
        *,
        own: tuple[str, ...] | None = None,
        members: tuple[str, ...] = (),
        asked: str | None = None,
        findings: tuple[Finding, ...] = (),
    ) -> None:
        super().__init__(places.shown(path), 0)
        self._opens, self.is_far, self._is_listed = places.opener(root), places.is_url(root), places.are_listed(root)
        self._is_together = False
        self.root = root
        self.layout = layout
        self.names = names
        self.tag = tag
        self.own = names if own is None else own
        self.members = members
        self.asked = asked
        self.findings = findings
        self.tp_rules: tuple[Any, ...] = ()
        self.rules: str | None = None

    @property
    def folder(self) -> str:
        """As `Source.folder`: its own files are in it."""
        return self.root

    def part(self, name: str) -> Source:
        """The file of a name in the folder; closed with it.

        Raises:
            CorruptError: the name leads out of the folder.
            MissingFileError: there is none.
            FileAccessError: it cannot be opened.
        """
        known = self.parts.get(name)
        if known is None:
            if not is_shard_name(name):
                raise CorruptError(f"{name!r:.200} is not a path inside the folder", path=self.path)
            known = self.parts[name] = self.sibling(name)
            if not self._is_listed and name not in self.own:  # an unlisted folder has the files that are named
                self.names = self.own = (*self.own, name)
            if len(self.parts) % _OPENED == 0:
                _let_open(2 * (len(self.parts) + _OPENED))  # each may have a temporary file, too
        return known

    def sibling(self, name: str) -> Source:
        """As `Source.sibling`, of a name in the folder."""
        return self._opens(name)

    def will_open(self, names: Sequence[str]) -> None:
        """As `Source.will_open`, for remote files: in parallel."""
        if self.is_far:
            places.look_ahead([self.part(name) for name in names])

    def read_together(self) -> None:
        """Have the files whose trees are read one after the other fetched in parallel, if they are remote."""
        if self.is_far and not self._is_together:
            self._is_together = True
            self.will_open([name for name in self.own if not name.endswith(_READ_APART)])

    def whole_parts(self) -> dict[str, Source]:
        """All the files that belong to the checkpoint, by name, including unread ones.

        Raises:
            As `part`.
        """
        for name in self.own:
            if name not in self.parts:
                self.part(name).release()
        return self.parts

    @property
    def total_size(self) -> int:
        """Size in bytes of the files that belong to the checkpoint."""
        sizes = {name: part.size for name, part in self.parts.items()}
        for name in self.own:
            if name not in sizes:
                try:
                    sizes[name] = places.size(places.below(self.root, name))
                except OSError:  # who needs it says that it is missing
                    continue
        return sum(sizes.values())

    def changed(self) -> bool:
        """As `Source.changed`, of any file that was opened."""
        self._require_open()
        return first_changed(self.parts.values()) is not None


def listing(folder: str) -> tuple[str, ...]:
    """The files below a folder, by their paths from there, with slashes, sorted; hidden ones too.

    Raises:
        FileAccessError: it cannot be listed.
        LimitError: there are more than any checkpoint has.
    """
    try:
        found = []
        known = places.listed_below(folder)
        for name in _files(folder, "", 0) if known is None else _shallow(known):
            found.append(name)
            if len(found) > DEFAULT_LIMITS.entries:
                raise LimitError("files in a folder", limit=DEFAULT_LIMITS.entries, actual=len(found))
    except OSError as error:
        raise places.unreadable_folder(folder, error) from error
    return tuple(sorted(found))


def _shallow(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name.count("/") <= _DEEPEST)


def _files(folder: str, inside: str, depth: int) -> Iterator[str]:
    with os.scandir(os.path.join(folder, *inside.split("/")) if inside else folder or os.curdir) as entries:
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            try:
                mode = entry.stat().st_mode
            except OSError:  # a link that leads nowhere: who needs it says that it is missing
                continue
            if stat.S_ISREG(mode):
                yield name
            elif stat.S_ISDIR(mode) and depth < _DEEPEST and not entry.is_symlink():
                yield from _files(folder, name, depth + 1)


def left_over(folder: FolderSource) -> tuple[GlobalUse, ...]:
    """The names in pickles of those of a folder's own files that its reader did not open: of another save, or nobody's.

    Texts are met when the folder is searched (`ckptkit.formats.folder`).  What storages hold is not looked at.
    """
    from ckptkit.formats.contents import ContentSearch

    contents = ContentSearch(DEFAULT_LIMITS)
    for name in folder.own:
        if name in folder.parts or name.endswith(TEXTS):
            continue
        try:
            with contextlib.closing(folder.sibling(name)) as file:
                for item in _items(file):
                    if item.read(0, min(4, item.nbytes)) != LOCAL_SIGNATURE:
                        contents.look(name, item)
                        continue
                    for record, held in read_directory(item, DEFAULT_LIMITS).items():
                        if "/data/" not in record:
                            contents.look(f"{name}/{record}", held)
        except CkptkitError as error:
            contents.unread(name, str(error))
    return contents.uses()


def _items(file: Source) -> Iterator[ByteRange]:
    """The archives that a file consists of, end to end as in ``.distcp`` files; what is none is one piece."""
    start = begin = 0
    while not file.is_far and begin < file.size:
        data = file.read(begin, min(_SEARCHED_NBYTES, file.size - begin))
        for found in _END.finditer(data):
            end = begin + found.start()
            size, offset = int.from_bytes(found[1], "little"), int.from_bytes(found[2], "little")
            if offset == _IN_ZIP64 or end - start - offset - size in (0, _ZIP64_NBYTES):
                yield file.whole.part(start, end + len(found[0]) - start)
                start = end + len(found[0])
        begin += max(1, len(data) - _END_NBYTES + 1)
    if start < file.size:
        yield file.whole.part(start, file.size - start)


def folder_of(probe: Probe) -> FolderSource:
    """The folder that a reader of folders was given.

    Raises:
        TypeError: it was given something else.
    """
    folder = probe.file
    if not isinstance(folder, FolderSource):
        raise TypeError("a folder is read")
    return folder


def read_part(probe: Probe, name: str, *, named: bool = True) -> RawCheckpoint:
    """The content of one file of the folder: the whole tree from its container's reader.

    Args:
        probe: of the folder.
        name: of the file.
        named: whether the keys of its storages are to begin with the file's name and a colon.

    Raises:
        MissingFileError: it is not there.
        FormatError: it is damaged or refused; the message begins with its name.
    """
    folder = folder_of(probe)
    folder.read_together()
    file = folder.part(name)
    part = Probe(file, probe.limits, f"{name}:")
    try:
        if not file.size:
            raise CorruptError("the file is empty")
        raw = identify(part, CONTAINERS).read(part)
        return prefixed(raw, part.prefix) if named else raw
    except FormatError as error:
        error.where = f"{name}: {error.where}" if error.where else name
        raise
    finally:
        file.release()
