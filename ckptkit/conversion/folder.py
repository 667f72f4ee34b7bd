"""Conversions into folders: each checkpoint below one folder into another, or one file into a folder.

What lies in the source folder is listed first (`ckptkit.formats.folder`), so that no output is taken for a source, and
all names are settled before anything is written: each output has its source's place and name, with the ending of its
container.  Then one file is converted after the other, each with the guarantees of a conversion of its own; one that
cannot be is told, and the others go on.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, cast

from ckptkit import formats, rewrite
from ckptkit.conversion.options import renamers_of
from ckptkit.errors import CkptkitError, DestinationExistsError, FileAccessError, RewriteError
from ckptkit.report import Finding, Report, count_of, listed, parse_size, without_endings
from ckptkit.transfer import folder_made, names_flushed_together
from ckptkit.transfer.names import exists, is_temporary_name

if TYPE_CHECKING:
    from ckptkit.conversion.document import ConvertedFile, ConvertFolderDetails, UnconvertedFile
    from ckptkit.formats.folder import FolderSurvey
    from ckptkit.options import ConvertOptions

    Convert = Callable[[str, str, ConvertOptions], Report]
    """Converts one file."""

__all__ = ["convert_folder", "destination_of", "is_folder_of_files", "outcome", "require_file_name", "told"]


# What a destination means.


def is_folder_of_files(source: object, destination: str | os.PathLike[str], options: ConvertOptions) -> bool:
    """Whether every checkpoint below a folder is meant, and another folder for them."""
    if not isinstance(source, (str, os.PathLike)) or not os.path.isdir(source):
        return False
    path = os.fsdecode(destination)
    return _is_folder(path, options) or not _names_a_file(path)


def require_file_name(destination: str | os.PathLike[str]) -> None:
    """Refuse what means standard output.

    Raises:
        FileAccessError: it does.
    """
    if os.fsdecode(destination) == "-":
        raise FileAccessError(
            "-: nothing is written to standard output: an output is compared with its source before it gets its name; "
            "name a file (one that is called so is ./-)"
        )


@contextmanager
def destination_of(
    path: str, destination: str | os.PathLike[str], options: ConvertOptions
) -> Iterator[str | os.PathLike[str]]:
    """The file that a destination means, which may be the folder to put it into; that is made where it is not there.

    Args:
        path: the source's.
        destination: a file, a folder that is there, or one with a slash at its end.
        options: the container.

    Raises:
        RewriteError: the container is not known, or the source has no name.
        FileAccessError: the folder cannot be made.
    """
    folder = os.fsdecode(destination)
    if not _is_folder(folder, options):
        yield destination
        return
    ending = _ending(folder, options)
    name = os.path.basename(path)
    if not os.path.lexists(path):  # in an archive, or nowhere
        name = "" if path == "-" or path.startswith("<") else re.split("[/!]", path)[-1]
    if not name:
        raise RewriteError(f"{folder}: is a folder, and the source has no name to give to a file in it; name a file")
    with folder_made("" if options.dry_run else folder, flush=options.check):
        yield os.path.join(folder, without_endings(name) + ending)


def told(error: FileAccessError, source: object, destination: str | os.PathLike[str]) -> FileAccessError:
    """The error for what cannot be opened; of a folder that was to become one file, with what converts its files."""
    from ckptkit.formats.refused_folders import parts_in

    if not isinstance(source, (str, os.PathLike)) or not os.path.isdir(source):
        return error
    source = os.fsdecode(source)
    if parts_in(source) is not None:
        return error
    path, container, _ = formats.target(destination)
    into = os.path.join(os.path.dirname(path), without_endings(os.path.basename(path)), "")
    command = shlex.join(["ckptkit", "convert", source, into, "--to", container.name])
    return type(error)(f"{error}; or convert each checkpoint below it: {command}")


def _is_folder(path: str, options: ConvertOptions) -> bool:
    """Whether a path means a folder: by its slash, or because it is one and no name for a file either."""
    if path.endswith(("/", os.sep)):
        return True
    return os.path.isdir(path) and (options.to is not None or not _names_a_file(path))


def _names_a_file(path: str) -> bool:
    """Whether a path that is no folder has the ending of an output."""
    try:
        formats.target(path)
    except RewriteError:
        return False
    return True


def _ending(folder: str, options: ConvertOptions) -> str:
    """The ending of outputs in a folder.

    Raises:
        RewriteError: no container is asked for, or there is none of that name.
    """
    if options.to is None:
        raise RewriteError(
            f"{folder}: a folder's name does not say what to write into it; give --to safetensors or --to torch-zip"
        )
    _, container, _ = formats.target(folder, options.to)
    asked = f".{options.to}"
    return asked if asked in container.suffixes else container.suffixes[0]


# A folder.


class _Item(NamedTuple):
    """A file to convert, its output, and all files it is read from: itself and its shards."""

    source: str
    destination: str
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of these files; nothing of what cannot be asked, which opening it will tell."""
        sizes = 0
        for path in self.files:
            with suppress(OSError):
                sizes += os.stat(path).st_size
        return sizes


def convert_folder(source: str, destination: str, options: ConvertOptions, convert: Convert) -> Report:
    """Convert each checkpoint below a folder.

    Args:
        source: the folder.
        destination: the folder for the outputs, which is made where it is not there.
        options: for each file; ``progress`` is called with the bytes of the sources.
        convert: converts one file.

    Returns:
        A report of the files, with a finding of severity ``"error"`` for each that could not be converted.

    Raises:
        RewriteError: two files would get one name, or options are wrong whatever the files hold.
        DestinationExistsError: outputs exist and are not to be replaced.
        FileAccessError: there is no checkpoint, the files are together one checkpoint, or nothing can be written.
    """
    started = time.monotonic()
    ending = _ending(destination, options)
    _require_options(options)
    survey = _surveyed(source, destination)
    items, refused = _sorted_out(survey, source, destination, ending, options)
    _require_names(items, destination, options)
    files = [_unconverted(path, None, error, 0, 0.0) for path, error in refused.items()]
    sizes = [item.nbytes for item in items]
    progress = _Progress(options.progress, sum(sizes))
    with names_flushed_together():
        for item, nbytes in zip(items, sizes, strict=True):
            file = outcome(convert, item.source, item.destination, nbytes, progress.within(options, nbytes))
            files.append(_sharing(file, files[-1] if files else file))
    passed = dict(survey.passed) | {path: "other name" for each in survey.checkpoints for path in each.others}
    details: ConvertFolderDetails = {
        "source": source,
        "destination": destination,
        "written": not options.dry_run,
        "files": files,
        "passed_over": dict(Counter(passed.values())),
        "passed_over_files": passed,
        "seconds": time.monotonic() - started,
    }
    failures = (
        Finding(code="not-converted", severity="error", message=error_text(file["source"], file["error"]["message"]))
        for file in files
        if file["error"] is not None
    )
    return Report(findings=tuple(failures), details=details)


def outcome(
    convert: Convert, source: str, destination: str, nbytes: int, options: ConvertOptions
) -> ConvertedFile | UnconvertedFile:
    """What came of one file of a folder, as it stands in JSON documents.

    Args:
        convert: converts one file.
        source: the file.
        destination: its output.
        nbytes: of the source.
        options: what is asked for.
    """
    started = time.monotonic()
    try:
        document = convert(source, destination, options).to_dict()
    except MemoryError:
        error = CkptkitError("out of memory")
        return _unconverted(source, destination, error, nbytes, time.monotonic() - started)
    except CkptkitError as error:
        return _unconverted(source, destination, error, nbytes, time.monotonic() - started)
    own = {"error": None, "source_nbytes": nbytes, "seconds": time.monotonic() - started}
    return cast("ConvertedFile", {**document, **own})


def _unconverted(
    source: str, destination: str | None, error: CkptkitError, nbytes: int, seconds: float
) -> ConvertedFile | UnconvertedFile:
    return {
        "source": source,
        "destination": destination,
        "written": False,
        "error": {"type": type(error).__name__, "message": str(error)},
        "source_nbytes": nbytes,
        "seconds": seconds,
    }


def _sharing(
    file: ConvertedFile | UnconvertedFile, before: ConvertedFile | UnconvertedFile
) -> ConvertedFile | UnconvertedFile:
    """The document with the parts of the one before that it has too: a thousand files of one model, and one list."""
    known: Mapping[str, object] = before
    shared = {key: known[key] if key in known and known[key] == value else value for key, value in file.items()}
    return cast("ConvertedFile", shared)


def error_text(path: str, message: str) -> str:
    """What is wrong with a file, and which one."""
    return message if message.startswith(path) else f"{path}: {message}"


class _Progress:
    """Adds up the progress of files to that of all, in bytes of the sources."""

    def __init__(self, progress: Callable[[int, int], object] | None, nbytes: int) -> None:
        self._progress = progress
        self._nbytes = nbytes
        self._done = 0

    def within(self, options: ConvertOptions, nbytes: int) -> ConvertOptions:
        """The options for the next file, of so many bytes."""
        before, self._done = self._done, self._done + nbytes
        return options if self._progress is None else options.but(progress=partial(self._tell, before, nbytes))

    def _tell(self, before: int, nbytes: int, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(before + nbytes * done // max(total, 1), self._nbytes)


def _require_options(options: ConvertOptions) -> None:
    """Raise what is wrong with options whatever a file holds: once, not for each file.

    Raises:
        RewriteError: an option's value makes no sense.
    """
    renamers_of(options)
    if options.dtype is not None:
        rewrite.CastDtype(options.dtype, options.keep_dtype)
    if options.map_location is not None:
        rewrite.MapLocation(options.map_location)
    if isinstance(options.max_shard_size, str):
        parse_size(options.max_shard_size)


def _surveyed(source: str, destination: str) -> FolderSurvey:
    """What lies in the source folder; the destination folder is passed over where it is inside.

    Raises:
        FileAccessError: there is no checkpoint.
    """
    from ckptkit.formats.folder import Surveyor

    surveyor = Surveyor(is_unfinished=is_temporary_name)
    if os.path.isdir(destination) and not os.path.samefile(source, destination):
        surveyor.skip(destination, "output folder")
    if (nothing := surveyor.folder(source)) is not None:
        raise nothing
    return surveyor.result()


def _sorted_out(
    survey: FolderSurvey, source: str, destination: str, ending: str, options: ConvertOptions
) -> tuple[list[_Item], dict[str, CkptkitError]]:
    """The files to convert; and those, and folders of files that are together one checkpoint, that cannot be.

    Raises:
        FileAccessError: the source is such a folder.
    """
    from ckptkit.formats.refused_folders import parts_in
    from ckptkit.formats.shard_parts import known_as
    from ckptkit.formats.sharded import shard_names

    parts = cache(parts_in)
    items, refused = list[_Item](), dict(survey.unreadable)
    for path in (each.path for each in survey.checkpoints):
        folder, name = os.path.split(path)
        above, own = os.path.split(folder)
        wholes = [folder, *([above] if known_as(own) is not None else ())]  # of several ranks, with a folder for each
        whole = None if options.allow_part else next((each for each in wholes if parts(each) is not None), None)
        if whole is None:
            beside = os.path.dirname(os.path.relpath(path, source))
            output = os.path.join(destination, beside, without_endings(name) + ending)
            shards = sorted(shard_names(path)) if name.endswith(".json") else ()
            files = (path, *(os.path.join(folder, *shard.split("/")) for shard in shards))
            items.append(_Item(path, output, files))
        elif whole not in refused:
            refused[whole] = FileAccessError(f"{whole}: {parts(whole)}")
            if os.path.samefile(whole, source):
                raise refused[whole]
    return items, refused


# The names of outputs.


def _require_names(items: Sequence[_Item], destination: str, options: ConvertOptions) -> None:
    """See that each output has a name of its own, which nothing has that it may not replace.

    Raises:
        RewriteError: two sources would get one name, or replace another; all of them are named.
        DestinationExistsError: outputs exist; all of them are named.
        FileAccessError: the outputs' folders cannot be made, or written to.
    """
    for folder in dict.fromkeys((destination, *(os.path.dirname(item.destination) for item in items))):
        above = _existing(folder)
        if not os.path.isdir(above):
            raise FileAccessError(f"{above}: is a file, and outputs are to be put into a folder of that name")
        is_ours = os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
        if not options.dry_run and not is_ours:
            raise FileAccessError(f"{above}: nothing can be written into this folder")
    is_sharded = options.max_shard_size is not None or formats.target(destination, options.to)[2] is not None
    clashes = [
        f"{output}: from {listed(names, len(names), last=' and ')}" for output, names in _clashes(items, is_sharded)
    ]
    if clashes:
        told = f"{count_of(len(clashes), 'output')} would be written from several files; nothing was written:"
        raise RewriteError("\n  ".join([told, *clashes]))
    taken = list(_taken(items, is_sharded))
    if taken and not options.force:
        if len(taken) == 1:
            raise exists(taken[0])
        told = f"{count_of(len(taken), 'output')} exist already; --force overwrites them; nothing was written:"
        raise DestinationExistsError("\n  ".join([told, *taken]))
    replaced = list(_replaced(items)) if taken else ()
    if replaced:
        told = f"{count_of(len(replaced), 'output')} cannot have the name; nothing was written:"
        raise RewriteError("\n  ".join([told, *replaced]))


def _existing(path: str) -> str:
    """The path, or what above it exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _clashes(items: Sequence[_Item], is_sharded: bool) -> Iterator[tuple[str, list[str]]]:
    """Each output that several files would be written to, or one as a file and others into a folder of its name."""
    from ckptkit.formats.shards import CUSTOMARY

    wanted: dict[str, list[_Item]] = {}
    key = _key_in(_existing(items[0].destination)) if items else str
    for item in items:
        wanted.setdefault(key(item.destination), []).append(item)
    for path, same in wanted.items():
        names = [each.source for each in same]
        above = os.path.dirname(path)
        while above != os.path.dirname(above):
            names += [f"{each.source} (as the folder's name)" for each in wanted.get(above, ())]
            above = os.path.dirname(above)
        shard = CUSTOMARY.fullmatch(os.path.basename(path)) if is_sharded else None
        if shard is not None:
            whole = os.path.join(os.path.dirname(path), shard[1] + shard[4])
            names += [f"{each.source} (as a shard's name)" for each in wanted.get(whole, ())]
        if len(names) > 1:
            yield same[0].destination, names


def _key_in(folder: str) -> Callable[[str], str]:
    """A function that is equal for paths of one file: where the system folds the case of names, of all such."""
    if not _folds_case(folder):
        return os.path.realpath
    from unicodedata import normalize

    return lambda path: normalize("NFC", os.path.realpath(path)).casefold()


def _folds_case(folder: str) -> bool:
    """Whether names that are equal but for case mean one file, as the first name with letters above a folder tells."""
    path = os.path.realpath(folder)
    while os.path.dirname(path) != path:
        above, name = os.path.split(path)
        if name.swapcase() != name:
            other = os.path.join(above, name.swapcase())
            return os.path.exists(other) and os.path.samefile(path, other)
        path = above
    return sys.platform in ("win32", "darwin")


def _taken(items: Sequence[_Item], is_sharded: bool) -> Iterator[str]:
    """What is there of outputs, or of indexes and shards in their places."""
    from ckptkit.formats.shard_writer import index_name
    from ckptkit.formats.shards import CUSTOMARY

    shards: dict[str, list[str]] = {}
    for folder in dict.fromkeys(os.path.dirname(item.destination) for item in items if is_sharded):
        with suppress(OSError):
            for match in filter(None, map(CUSTOMARY.fullmatch, sorted(os.listdir(folder or os.curdir)))):
                shards.setdefault(os.path.join(folder, match[1] + match[4]), []).append(os.path.join(folder, match[0]))
    for path in (item.destination for item in items):
        yield from filter(os.path.lexists, [path, index_name(path)] if is_sharded else [path])
        yield from shards.get(path, ())


def _replaced(items: Sequence[_Item]) -> Iterator[str]:
    """Outputs that would replace a folder, or what another file is read from."""
    owners: dict[tuple[int, int], _Item] = {}
    for item in items:
        for path in item.files:
            with suppress(OSError):
                owners.setdefault(_identity(path), item)
    for item in items:
        if os.path.isdir(item.destination):
            yield f"{item.destination}: is a folder"
        elif os.path.lexists(item.destination):
            with suppress(OSError):
                owner = owners.get(_identity(item.destination), item)
                if owner is not item:
                    yield f"{item.destination}: from {item.source}, but {owner.source} is read from it"


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
