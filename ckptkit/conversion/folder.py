"""Folder to folder: each checkpoint below one is converted to the same place below another.

The source folder is listed first (`ckptkit.formats.folder`), so no output is read as a source, and all names are
settled (`ckptkit.conversion.outputs`).  Then one file is converted after the other, or several by parallel workers,
each with the guarantees of a single conversion; one that fails is reported, and the others continue.

Many small files are shared among processes unasked: reading what is in them and planning is done under the interpreter
lock.  Large ones are moved by the threads of one process as fast, one after the other.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ckptkit import formats, places, rewrite
from ckptkit.conversion.options import renamers_of
from ckptkit.conversion.outputs import Item, ending_of, is_folder, name_in, require_fitting, require_names
from ckptkit.errors import CkptkitError, DestinationExistsError, FileAccessError, RewriteError
from ckptkit.fleet.shares import paths_from
from ckptkit.places import is_temporary_name
from ckptkit.report import Finding, Report, parse_size, without_endings
from ckptkit.transfer.folders import temporary_folder
from ckptkit.transfer.many import Workers
from ckptkit.transfer.names import names_flushed_together, remove_stale
from ckptkit.transfer.workers import MANY_NBYTES

if TYPE_CHECKING:
    from ckptkit.conversion.document import ConvertedFile, ConvertFolderDetails, UnconvertedFile
    from ckptkit.documents import ConvertDocument
    from ckptkit.formats.folder import FolderSurvey
    from ckptkit.options import ConvertOptions

    Convert = Callable[[str, str, ConvertOptions], Report[ConvertDocument]]
    """Converts one file."""

__all__ = ["convert_files", "convert_folder", "converted_all", "outcome", "shared_folder"]


def convert_folder(source: str, destination: str, options: ConvertOptions, convert: Convert) -> Report[Any]:
    """Convert each checkpoint below a folder.

    Args:
        source: the folder.
        destination: the folder for the outputs, which is created if needed.
        options: for each file; ``progress`` is called with the bytes of the sources.
        convert: converts one file.

    Returns:
        A report of the files, with a finding of severity ``"error"`` for each that could not be converted.

    Raises:
        RewriteError: two files would get one name, or options are wrong whatever the files hold.
        DestinationExistsError: outputs exist and are not to be replaced.
        FileAccessError: there is no checkpoint, or nothing can be written.
    """
    started = time.monotonic()
    ending = ending_of(destination, options)
    _require_options(options, destination)
    survey = _surveyed(source, destination, options.files_from)
    items, refused = list(_items(survey, source, destination, ending)), dict(survey.unreadable)
    own = items
    passed = dict(survey.passed) | {path: "other name" for each in survey.checkpoints for path in each.others}
    if options.part is not None:
        own = [item for item in items if options.part.holds(os.path.relpath(item.source, source))]
        refused = {path: error for path, error in refused.items() if options.part.holds(os.path.relpath(path, source))}
    require_names(items, destination, options, own)
    return converted_all(own, options, convert, started, source, destination, refused=refused, passed=passed)


def convert_files(sources: Sequence[str], destination: str, options: ConvertOptions, convert: Convert) -> Report[Any]:
    """Convert each of several files into a folder, as `convert_folder` does those that are below one.

    Raises:
        RewriteError: the destination is not a folder, two files would get one name, or options are wrong.
        DestinationExistsError: outputs exist and are not to be replaced.
    """
    started = time.monotonic()
    if not is_folder(destination, options):
        raise RewriteError(f"{destination}: several files need a folder; end the path of a new one with /")
    if options.to is not None:
        _require_options(options, destination)
    items = [
        Item(path, os.path.join(destination, name_in(destination, path, options)), (path,))
        for path in dict.fromkeys(sources)
    ]
    require_names(items, destination, options)
    return converted_all(items, options, convert, started, shared_folder(sources), destination)


def shared_folder(paths: Sequence[str]) -> str:
    """The folder that all are below."""
    with contextlib.suppress(ValueError):  # on several drives, or of paths some absolute
        return os.path.commonpath([os.path.dirname(path) for path in paths]) or os.curdir
    return os.curdir


def converted_all(
    items: Sequence[Item],
    options: ConvertOptions,
    convert: Convert,
    started: float,
    source: str,
    destination: str,
    *,
    refused: Mapping[str, CkptkitError] = MappingProxyType({}),
    passed: Mapping[str, str] = MappingProxyType({}),
) -> Report[Any]:
    """Convert each of several files, here or in workers, even if others fail; the report is that of a folder.

    Args:
        items: the files.
        options: for each file.
        convert: converts one file.
        started: when it began, by `time.monotonic`.
        source: the folder, for the report.
        destination: that of the outputs.
        refused: what could not even be tried, and why.
        passed: files that are not checkpoints, by kind.
    """
    files = [_unconverted(path, None, error, 0, 0.0) for path, error in refused.items()]
    tasks = [_Task(item.source, item.destination, item.nbytes) for item in items]
    progress = _Progress(options.progress, sum(task.nbytes for task in tasks))
    with names_flushed_together(), contextlib.closing(_outcomes(tasks, convert, options, progress)) as outcomes:
        for file in outcomes:
            files.append(_sharing(file, files[-1] if files else file))
    details: ConvertFolderDetails = {
        "source": source,
        "destination": destination,
        "written": not options.dry_run,
        "files": files,
        "passed_over": dict(Counter(passed.values())),
        "passed_over_files": dict(passed),
        "seconds": time.monotonic() - started,
    }
    failures = (
        Finding(code="not-converted", severity="error", message=error_text(file["source"], file["error"]["message"]))
        for file in files
        if file["error"] is not None
    )
    return Report(findings=tuple(failures), details=details)


class _Task(NamedTuple):
    """A file to convert, its output, and its size in bytes."""

    source: str
    destination: str
    nbytes: int


def _outcomes(
    tasks: list[_Task], convert: Convert, options: ConvertOptions, progress: _Progress
) -> Generator[ConvertedFile | UnconvertedFile, None, None]:
    """The result of each file, in order."""
    own = ("progress", "confirm", "jobs", "executor", "part", "files_from", "storage_options")
    plain = options.but(**dict.fromkeys(own))
    if not _are_others(tasks, options, plain):
        for task in tasks:
            yield outcome(convert, *task, progress.within(plain, task.nbytes))
        return
    from ckptkit.fleet import each
    from ckptkit.remote import carried

    work = carried(partial(_converted, convert, plain, os.getcwd()))
    for task, done in each(tasks, work, jobs=options.jobs, executor=options.executor):
        told = progress.within(plain, task.nbytes).progress
        if told is not None:
            told(1, 1)
        if done.problem is None:
            file = done.result()
            is_there = file["error"] is not None and file["error"]["type"] == DestinationExistsError.__name__
            yield (_written_before(task, convert, plain) if is_there else None) or file
            continue
        if done.problem == "died":
            remove_stale(os.path.dirname(task.destination) or os.curdir)
        yield _unconverted(task.source, task.destination, done.error or CkptkitError(done.text), task.nbytes, 0.0)


def _written_before(task: _Task, convert: Convert, options: ConvertOptions) -> ConvertedFile | UnconvertedFile | None:
    """The document of a file whose output appeared in the meantime, from a worker that died before it could report it.

    No output was there at first.  An existing file counts as this file's output if it is identical to the byte.
    """
    above, name = os.path.split(task.destination)
    folder = temporary_folder(os.path.join(os.path.realpath(above), name), task.destination)
    try:
        file = outcome(convert, task.source, os.path.join(folder.temporary, name), task.nbytes, options)
        made = [os.path.join(inside, each) for inside, _, names in os.walk(folder.temporary) for each in names]
        there = [os.path.join(above, os.path.relpath(path, folder.temporary)) for path in made]
        is_same = file["error"] is None and all(os.path.isfile(path) for path in there)
        is_same = is_same and all(map(partial(filecmp.cmp, shallow=False), made, there))
    finally:
        folder.close()
    return cast("ConvertedFile", {**file, "destination": task.destination}) if is_same else None


def _are_others(tasks: list[_Task], options: ConvertOptions, plain: ConvertOptions) -> bool:
    """Whether other processes convert the files, with the plain options.

    Raises:
        RewriteError: they are asked to, and an option cannot be sent to them.
    """
    from ckptkit.conversion.parts import require_portable

    is_asked = options.executor is not None or options.jobs is not None
    if not Workers(jobs=options.jobs, executor=options.executor).are_others(len(tasks)):
        return False
    if not is_asked and sum(task.nbytes for task in tasks) >= len(tasks) * MANY_NBYTES:
        return False
    try:
        require_portable(plain)
    except RewriteError:
        if is_asked:
            raise
        return False
    return True


def _converted(convert: Convert, options: ConvertOptions, folder: str, task: _Task) -> ConvertedFile | UnconvertedFile:
    """The result of one file, in a worker; paths are relative to ``folder`` if that is not its own."""
    above = "" if os.getcwd() == folder else folder
    source, destination = (path if places.is_url(path) else os.path.join(above, path) for path in task[:2])
    return outcome(convert, source, destination, task.nbytes, options)


def outcome(
    convert: Convert, source: str, destination: str, nbytes: int, options: ConvertOptions
) -> ConvertedFile | UnconvertedFile:
    """The result of one file in a folder, for JSON documents.

    Args:
        convert: converts one file.
        source: the file.
        destination: its output.
        nbytes: of the source.
        options: as requested.
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
    """The problem with a file, and the file."""
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


def _require_options(options: ConvertOptions, destination: str) -> None:
    """Raise what is wrong with options whatever a file holds: once, not for each file.

    Raises:
        RewriteError: an option's value makes no sense.
    """
    if options.finish:
        raise RewriteError("--finish combines parts into one checkpoint; the files of a folder are converted whole")
    renamers_of(options)
    require_fitting(options, formats.target(destination, options.to)[1])
    if options.dtype is not None:
        rewrite.CastDtype(options.dtype, options.keep_dtype)
    if options.map_location is not None:
        rewrite.MapLocation(options.map_location)
    if isinstance(options.max_shard_size, str):
        parse_size(options.max_shard_size)


def _surveyed(source: str, destination: str, files_from: str | None) -> FolderSurvey:
    """The content of the source folder; the destination folder is skipped if it is inside.

    Args:
        source: the folder.
        destination: that of the outputs.
        files_from: a list of the files in it that are meant; ``None``: all.

    Raises:
        FileAccessError: there is no checkpoint, or the list cannot be read.
        RewriteError: it lists what is not in the folder.
    """
    from ckptkit.formats.folder import Surveyor

    surveyor = Surveyor(is_unfinished=is_temporary_name)
    if os.path.isdir(destination) and places.identity(source) != places.identity(destination):
        surveyor.skip(destination, "output folder")
    if files_from is not None:
        for path in paths_from(files_from):
            if os.path.relpath(path, source).split(os.sep)[0] == os.pardir:
                raise RewriteError(f"--files-from {files_from}: {path} is not below {source}", path=path)
            surveyor.named(path)
        survey = surveyor.result()
        if not survey.checkpoints:
            raise FileAccessError(f"{files_from}: lists no file to convert", path=files_from)
        return survey
    if (nothing := surveyor.folder(source)) is not None:
        raise nothing
    return surveyor.result()


def _items(survey: FolderSurvey, source: str, destination: str, ending: str) -> Iterator[Item]:
    """The files, and folders that are one checkpoint, to convert."""
    from ckptkit.formats.distributed.around import sharded_at
    from ckptkit.formats.sharded import shard_names
    from ckptkit.formats.unpacked import is_unpacked

    for path in (each.path for each in survey.checkpoints):
        folder, name = places.split(path)
        shards = sorted(shard_names(path)) if name.endswith(".json") else ()
        files = [path, *(places.below(folder, shard) for shard in shards)]
        if is_unpacked(folder) and name == "data.pkl":  # the folder is the checkpoint
            path, (folder, name) = folder, os.path.split(folder)
            files = [os.path.join(inside, each) for inside, _, names in os.walk(path) for each in names]
        elif places.isdir(path):
            found = sharded_at(path)
            files = [places.below(path, each) for each in (found.own if found is not None else ())]
        beside = places.relative(folder, source)
        within = destination if beside == os.curdir else places.below(destination, beside)
        yield Item(path, os.path.join(within, without_endings(name) + ending), tuple(files))
