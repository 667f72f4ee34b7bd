"""The content of folders: each file is a checkpoint, or is skipped and counted by kind, or cannot be read.

A checkpoint is identified by its first bytes (`ckptkit.formats.containers`), whatever its name.  The name decides in
only one case: a file that is called ``.safetensors``, ``.pth`` and so on but is none of these is a checkpoint that
cannot be read (a git-lfs pointer, an error page, an interrupted download), not a file of another kind.  Other files
have the extensions ``.bin``, ``.pkl`` and ``.jit`` too: one that is known to be something else is skipped.

- An index represents its shards.  A folder that several processes wrote is one checkpoint, and represents the files
  that belong to it (`ckptkit.formats.distributed`); others in it are handled as anywhere.
- Only regular files are opened.  Links are followed, those to folders after the folders themselves, and each file and
  each folder is met once, by device and inode: in a cache of the hub the blob and its name are one file.
- ``.git`` is not entered.  AppleDouble files (``._name``, RFC 1740) and incomplete outputs of ckptkit are not
  checkpoints.
- A file that may contain pickles that are not torch's is listed; policies against pickles search it
  (`ckptkit.formats.contents`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import field

from ckptkit import places
from ckptkit.bytesource import Source, pace
from ckptkit.errors import CkptkitError, FileAccessError, FormatError, MissingFileError
from ckptkit.formats.containers import (
    FORMATS,
    INDEX_SUFFIXES,
    PACKED,
    SHARED_SUFFIXES,
    SUFFIXES,
    format_named,
    holds_files,
)
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.shards import CUSTOMARY, TEXTS, indexes_in, is_index_name
from ckptkit.formats.unpacked import is_unpacked
from ckptkit.formats.zip_archive import ends_like_a_zip
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.report import count_of
from ckptkit.startup import dataclass

__all__ = [
    "PICKLE",
    "FolderSurvey",
    "FoundFile",
    "Surveyor",
    "indexes_by_shard",
    "nothing_in",
    "passed_over_text",
    "says_checkpoint",
]

PICKLE = "pickle"
"""The kind of a pickle that is not a checkpoint."""

UNFINISHED = "unfinished ckptkit output"

_PLAIN_SUFFIXES = (*sorted(SUFFIXES - SHARED_SUFFIXES), ".distcp", ".nemo", *INDEX_SUFFIXES)
_TARRED_SUFFIXES = tuple(
    f"{suffix}{ending}"
    for suffix in sorted(SUFFIXES - SHARED_SUFFIXES)
    for ending in (".tar", ".gz", ".xz", ".bz2", ".zst")
)

_UNREADABLE_KINDS = frozenset(("empty file", "zero-filled file", "git-lfs pointer", "HTML page", "unknown file"))
"""What under an ending of both is more likely a checkpoint that did not arrive than a file of another kind."""

_TEXTS = frozenset(("text file", "JSON file", "HTML page", "git-lfs pointer", "empty file"))

_APPLE_DOUBLE = b"\x00\x05\x16\x07"

_DEEPEST = 64
"""Folders above one that distinguish it from others."""

_DIRECTORY_NBYTES = 1 << 20
"""Bytes at the end of an unreadable zip archive that are searched for a record of torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A checkpoint.

    Attributes:
        path: the file; of several names of one file the one that says best what it is.
        others: its other names.
    """

    path: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSurvey:
    """The files found.

    Attributes:
        checkpoints: files to open, in the order of the walk; some of them may be unreadable.
        passed: the files (and folders) that were skipped, with their kinds.
        others: those among them that may hold pickles, with their kinds.
        unreadable: files and folders about which nothing is known, and why.
    """

    checkpoints: tuple[FoundFile, ...] = ()
    passed: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    unreadable: tuple[tuple[str, CkptkitError], ...] = ()

    @property
    def passed_over(self) -> dict[str, int]:
        """How many of each kind were skipped."""
        return dict(Counter(self.passed.values()))


def passed_over_text(passed_over: Mapping[str, int]) -> str:
    """The skipped files, in a line: ``"skipped: 3 files (2 text files, 1 PNG image)"``."""
    kinds = sorted((kind for kind, count in passed_over.items() if count), key=lambda kind: (-passed_over[kind], kind))
    each = ", ".join(count_of(passed_over[kind], kind) for kind in kinds)
    return f"skipped: {count_of(sum(passed_over.values()), 'file')} ({each})"


def says_checkpoint(name: str) -> bool:
    """Whether a file's name says plainly that it is a checkpoint."""
    name = name.lower()
    if is_index_name(name):  # of a variant, too
        name = name[: name.rindex(".index.")] + ".index.json"
    return name.endswith(_PLAIN_SUFFIXES) or name.endswith(_TARRED_SUFFIXES)


def indexes_by_shard(folder: str) -> dict[str, str]:
    """The paths of a folder's indexes, by the names of those of their shards that are in it."""
    from ckptkit.formats.sharded import shard_names

    indexes = [places.below(folder, name) for name in reversed(indexes_in(folder))]
    return {shard: index for index in indexes for shard in shard_names(index) if "/" not in shard}


def nothing_in(folder: str, passed_over: Mapping[str, int]) -> FileAccessError:
    """The error for a folder without a checkpoint: what it is instead, or its content."""
    from ckptkit.formats.distributed.around import describe_folder

    what = describe_folder(folder)
    if what == "is a folder, not a file":
        others = f"; {passed_over_text(passed_over)}" if any(passed_over.values()) else ""
        what = f"a folder without checkpoint files{others}"
    return FileAccessError(f"{folder}: {what}", path=folder)


@dataclass(slots=True)
class _File:
    """A checkpoint during the walk."""

    paths: list[str]
    is_index: bool = False
    is_named: bool = False
    own: frozenset[object] = frozenset()
    """The files of a folder that is one checkpoint without an index in it."""


class Surveyor:
    """Meets files and folders, each once.

    Args:
        is_unfinished: whether a name belongs to an incomplete output of ckptkit.
        limits: bounds on what a file may ask for.
    """

    def __init__(
        self, *, is_unfinished: Callable[[str], bool] = lambda name: False, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._is_unfinished = is_unfinished
        self._limits = limits
        self._found: dict[object, _File] = {}
        self._met: dict[object, str] = {}
        """The files that are not checkpoints, and what they are called."""
        self._passed: dict[str, str] = {}
        self._skipped: dict[object, str] = {}
        self._own: set[str] = set()
        """The files of folders that are one checkpoint."""
        self._inside: set[str] = set()
        """The folders that such files are in."""
        self._others: dict[str, str] = {}
        self._unreadable: dict[str, CkptkitError] = {}

    def result(self) -> FolderSurvey:
        """The files met, without shards that have an index."""
        from ckptkit.formats.sharded import shard_names

        parts: set[object] = set()
        ranked = {
            key: file.paths if file.is_named else sorted(file.paths, key=_rank) for key, file in self._found.items()
        }
        for key, paths in ranked.items():
            folder = places.split(paths[0])[0]
            if self._found[key].is_index or is_index_name(places.split(paths[0])[1]):
                for shard in shard_names(paths[0]):
                    part = places.identity(places.below(folder, shard))
                    parts.update({part} - {key})
        # Shards that are all in one folder below their index were found as that folder.
        parts.update(key for key, file in self._found.items() if file.own and parts.issuperset(file.own))
        return FolderSurvey(
            checkpoints=tuple(
                FoundFile(path=paths[0], others=tuple(paths[1:])) for key, paths in ranked.items() if key not in parts
            ),
            passed=dict(self._passed),
            others=dict(self._others),
            unreadable=tuple(self._unreadable.items()),
        )

    def named(self, path: str) -> None:
        """A path to open as a checkpoint, whether it exists and is one, or not; its name stays."""
        key = places.identity(path)
        key = path if key is None else key
        known = self._found.get(key)
        if known is None or (known.is_named and path not in known.paths):
            self._found[path if known else key] = _File([path], is_named=True)
        elif not known.is_named:
            known.paths, known.is_named = [path, *(other for other in known.paths if other != path)], True

    def know(self, path: str) -> None:
        """A file that is neither a checkpoint nor skipped: the manifest."""
        self._met[places.identity(path)] = path

    def skip(self, folder: str, kind: str) -> None:
        """A folder that is skipped as one of a kind, whatever it holds."""
        self._skipped[places.identity(folder)] = kind

    def candidate(self, path: str) -> bool:
        """A file that is a checkpoint or is skipped.

        Returns:
            Whether it is a checkpoint, is called one, or cannot be read.
        """
        is_file = places.isfile(path) or not places.exists(path)
        return self._file(path) if is_file else self._not_a_file(path)

    def folder(self, folder: str) -> FileAccessError | None:
        """Everything in a folder and in those below it.

        Returns: The message if there is no checkpoint, and nothing that could be one.
        """
        before, passed = len(self._unreadable), Counter(self._passed.values())
        with places.opened_ahead(folder, _is_a_part):
            met = self._walk(folder)
        if met or len(self._unreadable) > before:
            return None
        return nothing_in(folder, Counter(self._passed.values()) - passed)

    def _walk(self, folder: str) -> bool:
        met = False
        # A link to a folder that holds this one leads out of it, and back in.
        above: set[object] = {
            places.identity(folder + os.sep + os.sep.join([os.pardir] * level)) for level in range(1, _DEEPEST)
        }
        above.discard(None)
        seen: set[object] = set()
        below, linked = [folder], list[str]()
        while below or linked:
            path = below.pop() if below else linked.pop(0)
            try:
                key = places.identity(path)
                if key is not None and key in seen:
                    continue
                seen.add(key)
                if key in self._skipped:
                    self._passed[path] = self._skipped[key]
                    continue
                if is_unpacked(path):
                    met |= self._file(os.path.join(path, "data.pkl"))
                    continue
                with places.scandir(path) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self._unreadable[path] = places.unreadable_folder(path, error)
                continue
            met |= self._is_one(path, key, [entry.name for entry in entries])
            # If each look takes a request, shards are left to their index.
            shards = indexes_by_shard(path) if places.is_url(path) else {}
            folders = []
            for entry in entries:
                if entry.path in self._own:
                    met |= entry.name.endswith(TEXTS) and self._text(entry.path)
                    continue
                if places.leads_to(entry.is_file):
                    met |= (entry.name in shards and says_checkpoint(entry.name)) or self._file(entry.path)
                elif not places.leads_to(entry.is_dir):
                    met |= self._not_a_file(entry.path)
                elif entry.name == ".git":
                    self._passed[entry.path] = ".git folder"
                elif self._is_unfinished(entry.name):
                    self._passed[entry.path] = UNFINISHED
                elif not entry.is_symlink():
                    folders.append(entry.path)
                elif places.identity(entry.path) in above:
                    self._passed[entry.path] = "link to a folder above"
                else:
                    linked.append(entry.path)
            below += reversed(folders)
        return met

    def _is_one(self, folder: str, key: object, names: list[str]) -> bool:
        """Whether a folder is one checkpoint, which is then among those found."""
        from ckptkit.formats.distributed.around import sharded_at

        if key in self._found and folder in self._found[key].paths and folder in self._inside:
            return True
        try:
            found = None if folder in self._inside else sharded_at(folder, names)
        except CkptkitError:  # unreadable files in it are reported when they are met
            return False
        if found is None:
            return False
        known = self._found.setdefault(key, _File([folder]))
        known.paths += [folder] * (folder not in known.paths)
        own = [places.below(folder, name) for name in found.own]
        if found.layout is not None and format_named(found.layout).shards:
            known.own = frozenset(map(places.identity, own))
        self._own.update(own)
        self._inside.update(places.split(path)[0] for path in own)
        return True

    def _text(self, path: str) -> bool:
        """What is called a text in a folder that is one checkpoint: one that is none is told of as anywhere."""
        is_met = self._file(path)
        if self._passed.get(path) in _TEXTS:
            del self._passed[path]
        return is_met

    def _file(self, path: str) -> bool:
        name = places.split(path)[1]
        pace.look()
        try:
            file = places.opened(path)
        except FileAccessError as error:
            if not (isinstance(error, MissingFileError) and self._is_unfinished(name)):  # it has its own name by now
                self._unreadable[path] = error
            return True
        key = places.identity_of(file, path)
        try:
            known = self._found.get(key)
            if known is not None:
                known.paths += [path] * (path not in known.paths)
                return True
            before = self._met.get(key)
            if before is not None and not says_checkpoint(name):
                return False
            kind = UNFINISHED if self._is_unfinished(name) else self._kind(file, path, name)
        except FileAccessError as error:
            self._unreadable[path] = error
            return True
        finally:
            places.put_back(file, path)
        if before is not None:  # by a name that says less
            self._passed.pop(before, None)
        if kind is not None:
            self._met[key] = path
            self._passed[path] = kind
        return kind is None

    def _kind(self, file: Source, path: str, name: str) -> str | None:
        """The kind of a file; ``None``: a checkpoint, which is then among those found."""
        probe = Probe(file, self._limits)
        claims: list[Format] = []
        kind: str | None = None
        if name == "data.pkl" and is_unpacked(os.path.dirname(path) or os.curdir):
            pass  # of an unpacked archive, and all of it
        elif name.startswith("._") and probe.head.startswith(_APPLE_DOUBLE):
            kind = "AppleDouble file"
        elif not says_checkpoint(name):
            try:
                claims = [container for container in FORMATS if container.claims(probe)]
                may_hold = claims[0].reader == "torch_tar" if claims else probe.head.startswith(PACKED)
                if may_hold and holds_files(probe) and _holds_one(probe):
                    claims = []
                elif not claims:
                    kind = self._other_kind(probe, path, name)
                elif [container.name for container in claims] == ["torch-tar"] and not _is_torchs_tar(probe):
                    kind = self._others[path] = "tar archive"
            except FormatError:  # a zip archive that is damaged, or that readers disagree about
                if not _may_be_torchs(probe, name):
                    kind = self._others[path] = "zip archive"
        if kind is None:
            is_index = any(container.shards for container in claims)
            self._found[places.identity_of(file, path)] = _File([path], is_index)
        return kind

    def _other_kind(self, probe: Probe, path: str, name: str) -> str | None:
        """The kind of a file that no container claims; ``None``: it is a checkpoint that cannot be read."""
        from ckptkit.formats.magic import guess_pickle, opaque
        from ckptkit.formats.refused import kind_of_file

        guess = guess_pickle(probe.head, probe.file.size)
        kind = PICKLE if guess == "pickle" else kind_of_file(probe)
        if kind in _UNREADABLE_KINDS and os.path.splitext(name)[1].lower() in SHARED_SUFFIXES:
            return None
        if guess and name == ".metadata":
            from ckptkit.formats.distributed.layouts import is_metadata

            if is_metadata(probe.head):
                return None
        if probe.records is not None and any(f"/{record}".endswith("/data.pkl") for record in probe.records):
            return None
        if (
            guess
            or kind == "numpy array"
            or probe.records is not None
            or opaque(probe.head) is not None
            or (kind not in _TEXTS and ends_like_a_zip(probe.file.whole))
        ):
            self._others[path] = kind
        return kind

    def _not_a_file(self, path: str) -> bool:
        """A link that leads nowhere, or what is not opened: a pipe, a socket, a device."""
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in _LEADS_NOWHERE or not os.path.islink(path):
                self._unreadable[path] = FileAccessError(f"{path}: cannot be opened: {error.strerror}", path=path)
                return True
            if says_checkpoint(path):
                self._unreadable[path] = MissingFileError(f"{path}: a broken link: {error.strerror}", path=path)
                return True
            self._passed[path] = "broken link"
            return False
        self._passed[path] = _SPECIAL.get(stat.S_IFMT(mode), "special file")
        return False


_LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)

_SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
"""The kind of anything but a regular file, which is never opened for its content."""


def _is_a_part(name: str) -> bool:
    """Whether a file has the name of one of several that their folder, or an index, represents."""
    from ckptkit.formats.shard_parts import known_as

    shard = CUSTOMARY.fullmatch(name)
    return name == ".metadata" or known_as(name) is not None or (shard is not None and int(shard[3]) > 1)


def _rank(path: str) -> int:
    """How well a name says what the file is, from 0; an order of equals stays."""
    return 0 if says_checkpoint(path) else 1 if os.path.splitext(path)[1].lower() in SUFFIXES else 2


def _holds_one(probe: Probe) -> bool:
    from ckptkit.formats.inside import begins_like_one

    return begins_like_one(probe)


def _is_torchs_tar(probe: Probe) -> bool:
    from ckptkit.formats.torch_tar import holds_one

    return holds_one(probe)


def _may_be_torchs(probe: Probe, name: str) -> bool:
    """Whether a zip archive that cannot be read is a checkpoint, by its name or by those of its records."""
    if os.path.splitext(name)[1].lower() in SUFFIXES:
        return True
    size = probe.file.size
    nbytes = min(size, _DIRECTORY_NBYTES)
    tail = probe.file.read(size - nbytes, nbytes)
    return any(mark in probe.head or mark in tail for mark in (b"data.pkl", b"/.data/", b"/.format_version"))
