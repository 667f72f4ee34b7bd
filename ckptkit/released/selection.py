"""Which files are meant: those named, and those that folders hold."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ckptkit.errors import FileAccessError
from ckptkit.formats import files_below
from ckptkit.formats.sharded import shard_names
from ckptkit.formats.shards.names import INDEX_SUFFIXES

__all__ = ["Selected", "name_of", "select"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """One checkpoint.

    Attributes:
        path: as it is to be opened.
        name: relative to the folder in question, with ``/``; begins with ``../`` where it is not below it.
        shards: of an index, the names of the files that belong to it; they are no checkpoints of their own.
    """

    path: str
    name: str
    shards: tuple[str, ...] = ()


def select(paths: Iterable[str | os.PathLike[str]], *, relative_to: str) -> tuple[Selected, ...]:
    """The checkpoints that paths stand for, each once, sorted by name.

    A file stands for itself, whether it exists or not: that is for whoever opens it to say.  A folder stands for the
    checkpoint files in it and below it, as for ``ckptkit inspect``.  A shard is left out where its index is there.

    Args:
        paths: files and folders.
        relative_to: the folder that names are relative to.

    Raises:
        FileAccessError: a folder holds no checkpoint files, or there are no paths: nothing checked is never well.
    """
    found: dict[str, Selected] = {}
    for given in paths:
        path = os.fsdecode(given)
        for each in files_below(path) if os.path.isdir(path) else (path,):
            name = name_of(each, relative_to)
            found.setdefault(name, Selected(path=each, name=name, shards=_shards(each, name)))
    if not found:
        raise FileAccessError("no files: name files or folders")
    shards = {shard for selected in found.values() for shard in selected.shards}
    return tuple(found[name] for name in sorted(found) if name not in shards)


def name_of(path: str, folder: str) -> str:
    """A file's name relative to a folder, with ``/``; links are not followed."""
    absolute = os.path.abspath(path)
    try:
        return os.path.relpath(absolute, folder or ".").replace(os.sep, "/")
    except ValueError:  # another drive
        return absolute.replace(os.sep, "/")


def _shards(path: str, name: str) -> tuple[str, ...]:
    """The names of an index's shards, relative to the same folder as its own."""
    if not path.endswith(INDEX_SUFFIXES):
        return ()
    folder = name.rpartition("/")[0]
    return tuple(sorted(f"{folder}/{shard}" if folder else shard for shard in shard_names(path)))
