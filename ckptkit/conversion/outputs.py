"""Where outputs go: what a destination means, and whether each output of a folder has its own name.

A destination is a file, by its extension or ``--to``, or a folder, in which an output is named after its source.
All names are settled before anything is written.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from ckptkit import formats, places
from ckptkit.errors import DestinationExistsError, FileAccessError, RewriteError
from ckptkit.formats.unpacked import is_unpacked
from ckptkit.report import count_of, listed, without_endings
from ckptkit.shell import command_line
from ckptkit.transfer.folders import is_empty_folder, not_empty
from ckptkit.transfer.names import exists
from ckptkit.transfer.writing import folder_made, require_replaceable

if TYPE_CHECKING:
    from ckptkit.formats.format import Format
    from ckptkit.options import ConvertOptions

__all__ = [
    "Item",
    "destination_of",
    "ending_of",
    "is_folder",
    "is_folder_of_files",
    "name_in",
    "named_after",
    "other_names",
    "require_confirmed",
    "require_file_name",
    "require_fitting",
    "require_names",
    "told",
]


# What a destination means.


def is_folder_of_files(
    source: object, destination: str | os.PathLike[str], options: ConvertOptions
) -> TypeGuard[str | os.PathLike[str]]:
    """Whether every checkpoint below a folder is meant, and another folder for them."""
    if not isinstance(source, (str, os.PathLike)) or is_unpacked(os.fsdecode(source)):
        return False
    if not places.isdir(os.fsdecode(source)):
        return False
    path = os.fsdecode(destination)
    if options.tag is not None or options.tp_rules is not None:
        return False
    if not formats.makes_folder(options.to) and _names_a_file(path) and not is_folder(path, options):
        return False
    from ckptkit.formats.distributed.around import sharded_in

    return sharded_in(os.fsdecode(source)) is None


def require_file_name(destination: str | os.PathLike[str]) -> None:
    """Refuse what means standard output, URLs, devices and pipes.

    Raises:
        FileAccessError: it is one.
    """
    places.require_local(os.fsdecode(destination))
    if os.fsdecode(destination) == "-":
        raise FileAccessError(
            "-: ckptkit cannot write to standard output, because the output is compared with its source before it gets "
            "its name; name a file (./- is a file called -)",
            path="-",
        )
    require_replaceable(os.fsdecode(destination))


def named_after(path: str, options: ConvertOptions) -> str:
    """The path that an output in a folder is named after: the source, or the chosen step of a folder."""
    return places.below(path, options.tag) if options.tag is not None and places.isdir(path) else path


@contextmanager
def destination_of(
    path: str, destination: str | os.PathLike[str], options: ConvertOptions
) -> Iterator[str | os.PathLike[str]]:
    """The output that a destination means, which may be a folder for it; that is created if needed.

    Args:
        path: the source's.
        destination: a file, a folder that is there, or one with a slash at its end; or the folder to be written.
        options: the container.

    Raises:
        RewriteError: the container is not known, or the source has no name.
        FileAccessError: the folder cannot be made.
    """
    folder = os.fsdecode(destination)
    if formats.makes_folder(options.to):
        above = os.path.dirname(folder.rstrip("/" + os.sep))
        with folder_made("" if options.dry_run else above, flush=options.check):
            yield destination
        return
    if not is_folder(folder, options):
        yield destination
        return
    name = name_in(folder, path, options)
    with folder_made("" if options.dry_run else folder, flush=options.check):
        yield os.path.join(folder, name)


def name_in(folder: str, path: str, options: ConvertOptions) -> str:
    """The name of an output in a folder: as the source, with the extension of the container if one is given.

    Raises:
        RewriteError: no container is known, or the source has no name.
    """
    name = places.own_name(path)
    if not places.is_url(path) and not os.path.lexists(path):  # in an archive, or nowhere
        name = "" if path == "-" or path.startswith("<") else re.split("[/!]", path)[-1]
    if not name:
        raise RewriteError(f"{folder}: is a folder, and the source has no file name to use in it; name a file")
    if options.to is None and _names_a_file(name):
        return name
    return without_endings(name) + ending_of(folder, options)


def told(
    error: FileAccessError, source: object, destination: str | os.PathLike[str], options: ConvertOptions
) -> FileAccessError:
    """The error for what cannot be opened; of a folder that was to become one file, with what converts its files."""
    if options.tag is not None or not isinstance(source, (str, os.PathLike)) or not places.isdir(os.fsdecode(source)):
        return error
    source = os.fsdecode(source)
    if error.path is not None and os.path.normpath(error.path) != os.path.normpath(source):  # a file of the one in it
        return error
    path, container, _ = formats.target(destination, options.to)
    into = os.path.join(os.path.dirname(path), without_endings(os.path.basename(path)), "")
    command = command_line(["ckptkit", "convert", source, into, "--to", container.name])
    return FileAccessError(f"{error}; or convert each checkpoint below it: {command}", path=source)


def require_confirmed(paths: Iterable[str], options: ConvertOptions) -> None:
    """Ask, if there is someone to ask, whether existing files at these paths may be replaced.

    Raises:
        DestinationExistsError: it may not.
    """
    if options.confirm is None or options.dry_run:
        return
    there = [path for path in dict.fromkeys(paths) if os.path.lexists(path)]
    if there and not options.confirm(there):
        told = f"{listed(there, 4)}: {'stays as it is' if len(there) == 1 else 'stay as they are'}; nothing was changed"
        raise DestinationExistsError(told, path=there[0])


def other_names(path: str, backup: str | None = None) -> int:
    """How many other names, hard links, a file has; each keeps the old content when the file is replaced.

    Args:
        path: the file; it need not be there.
        backup: the name that was given to the old file to keep it, which does not count.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return 0
        return max(status.st_nlink - 1 - (backup is not None and os.path.samestat(status, os.stat(backup))), 0)
    except OSError:
        return 0


def require_fitting(options: ConvertOptions, container: Format) -> None:
    """Raise where options are not for the container that is written.

    Raises:
        RewriteError: they are not.
    """
    if container.is_folder and options.max_shard_size is not None:
        raise RewriteError(
            f"--max-shard-size makes shards and an index; a {container.name} folder has one file per rank; use --ranks "
            "N"
        )
    if options.ranks is not None and not container.is_folder:
        raise RewriteError("--ranks is only for --to dcp, which writes a folder with one file for each of N ranks")


def is_folder(path: str, options: ConvertOptions) -> bool:
    """Whether a path means a folder: by its slash, or because it is one and no name for a file either."""
    if path.endswith(("/", os.sep)):
        return True
    return os.path.isdir(path) and (options.to is not None or not _names_a_file(path))


def _names_a_file(path: str) -> bool:
    """Whether a path that is not a folder has the ending of an output."""
    try:
        formats.target(path)
    except RewriteError:
        return False
    return True


def ending_of(folder: str, options: ConvertOptions) -> str:
    """The ending of outputs in a folder; ``""`` where each is a folder.

    Raises:
        RewriteError: no container is asked for, or none has that name.
    """
    if options.to is None:
        raise RewriteError(
            f"{folder}: a folder's name does not determine the output format; give --to safetensors or --to torch-zip"
        )
    _, container, _ = formats.target(folder, options.to)
    if container.is_folder:
        return ""
    asked = f".{options.to}"
    return asked if asked in container.suffixes else container.suffixes[0]


# Outputs of a folder.


class Item(NamedTuple):
    """A file to convert, its output, and all files it is read from: itself and its shards, or what is in its folder."""

    source: str
    destination: str
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of these files, without those whose size is unknown; opening them reports the error."""
        sizes = 0
        for path in self.files:
            with suppress(OSError):
                sizes += places.size(path)
        return sizes


def require_names(
    items: Sequence[Item], destination: str, options: ConvertOptions, own: Sequence[Item] | None = None
) -> None:
    """Check that each output has its own name, which no file has that may not be replaced.

    Args:
        items: all of the folder's.
        destination: the folder for the outputs.
        options: as requested.
        own: those that are written; ``None``: all.  Files that other processes wrote may be there by now.

    Raises:
        RewriteError: two sources would get one name, or replace another; all of them are named.
        DestinationExistsError: outputs exist; all of them are named.
        FileAccessError: the outputs' folders cannot be made, or written to.
    """
    for folder in dict.fromkeys((destination, *(os.path.dirname(item.destination) for item in items))):
        above = _existing(folder)
        if not os.path.isdir(above):
            raise FileAccessError(f"{above}: is a file, but the outputs need a folder with that name", path=above)
        is_ours = os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
        if not options.dry_run and not is_ours:
            raise FileAccessError(f"{above}: this folder is not writable", path=above)
    is_sharded = options.max_shard_size is not None
    if options.to is not None:
        is_sharded = is_sharded or formats.target(destination, options.to)[2] is not None
    found = list(_clashes(items, is_sharded))
    clashes = [f"{output}: from {listed(names, len(names), last=' and ')}" for output, names in found]
    names = [name.removesuffix(_AS_FOLDER) for _, sources in found for name in sources]
    if clashes:
        told = f"{count_of(len(clashes), 'output')} would be written from several files; nothing was written:"
        raise RewriteError("\n  ".join([told, *clashes]), path=destination, names=names)
    own = items if own is None else own
    taken = list(_taken(own, is_sharded))
    if formats.makes_folder(options.to):
        full = [path for path in taken if not is_empty_folder(path)]
        if full:
            raise not_empty(listed(full, 4))
        return
    if taken and not options.force:
        if len(taken) == 1:
            raise exists(taken[0])
        told = (
            f"{count_of(len(taken), 'output', 'already exists', 'already exist')}; --force overwrites "
            f"{'it' if len(taken) == 1 else 'them'}; nothing was written:"
        )
        raise DestinationExistsError("\n  ".join([told, *taken]), path=destination)
    replaced = list(_replaced(items, own)) if taken else ()
    if replaced:
        told = f"{count_of(len(replaced), 'output')} cannot have this name; nothing was written:"
        raise RewriteError("\n  ".join([told, *replaced]), path=destination)
    require_confirmed(taken, options)


def _existing(path: str) -> str:
    """The path, or what above it exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


_AS_FOLDER = " (as the folder's name)"


def _clashes(items: Sequence[Item], is_sharded: bool) -> Iterator[tuple[str, list[str]]]:
    """Each output that several files would be written to, or one as a file and others into a folder of its name."""
    from ckptkit.formats.shards import CUSTOMARY

    wanted: dict[str, list[Item]] = {}
    key = _key_in(_existing(items[0].destination)) if items else str
    for item in items:
        wanted.setdefault(key(item.destination), []).append(item)
    for path, same in wanted.items():
        names = [each.source for each in same]
        above = os.path.dirname(path)
        while above != os.path.dirname(above):
            names += [f"{each.source}{_AS_FOLDER}" for each in wanted.get(above, ())]
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
    """Whether names that differ only in case mean one file in a folder: an existing name in it or above shows.

    If none has letters, or the folder begins another file system and is empty, the system's own way is used.
    """
    path = os.path.realpath(folder)
    with suppress(OSError), os.scandir(path) as listing:
        inside = next((entry.path for entry in listing if entry.name.swapcase() != entry.name), None)
        if inside is not None:
            return _is_one(inside)
    while not os.path.ismount(path):
        if os.path.basename(path).swapcase() != os.path.basename(path):
            return _is_one(path)
        path = os.path.dirname(path)
    return sys.platform in ("win32", "darwin")


def _is_one(path: str) -> bool:
    """Whether a name with its case changed is that of the same file."""
    folder, name = os.path.split(path)
    try:
        return os.path.samestat(os.lstat(path), os.lstat(os.path.join(folder, name.swapcase())))
    except OSError:
        return False


def _taken(items: Sequence[Item], is_sharded: bool) -> Iterator[str]:
    """Existing files at the paths of outputs, or of their indexes and shards."""
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


def _replaced(items: Sequence[Item], own: Sequence[Item]) -> Iterator[str]:
    """Outputs that would replace a folder, or what another file is read from."""
    owners: dict[tuple[int, int], Item] = {}
    for item in items:
        for path in item.files:
            with suppress(OSError):
                owners.setdefault(_identity(path), item)
    for item in own:
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
