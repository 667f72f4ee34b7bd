"""Paths of every kind: what is at one and below it, from the system or, for a URL, from its server.

Every walk of a folder, and every question what a path is, uses this room and not `os`.  A path is text; between the
segments of a URL there are slashes on every system.  A server is asked once for everything below a URL, in one listing
per command (`ckptkit.places.far`); a server without listings (http) has files and no folders.  For a local path
everything is as `os` says, links included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ckptkit.bytesource import Source, SourceFile
from ckptkit.errors import FileAccessError
from ckptkit.startup import pattern

if TYPE_CHECKING:
    from ckptkit.places.far import FarEntry

__all__ = [
    "absolute",
    "are_listed",
    "asked_once",
    "below",
    "exists",
    "expanded",
    "head",
    "identity",
    "identity_of",
    "is_known",
    "is_url",
    "isdir",
    "isfile",
    "leads_to",
    "listdir",
    "listed_below",
    "look_ahead",
    "may_exist",
    "notes",
    "opened",
    "opened_ahead",
    "opener",
    "own_name",
    "put_back",
    "relative",
    "require_local",
    "scandir",
    "shown",
    "size",
    "split",
    "unreadable_folder",
]


TEMPORARY = re.compile(r"\.[^/]*\.([0-9a-f]{8})([0-9a-f]{8})?\.tmp(?:\.[^./]*)?")
"""Names of temporary files: the final name, random digits, those of the host, and the extension."""


def is_url(path: str | bytes) -> bool:
    """Whether a path is a URL; bytes are not."""
    if isinstance(path, bytes) or "://" not in path:
        return False
    from ckptkit.remote import is_url as is_one

    return is_one(path)


def is_temporary_name(name: str) -> bool:
    """Whether a file of this name (without its folder) is one that ckptkit has not finished writing."""
    return TEMPORARY.fullmatch(name) is not None


def asked_once(*paths: object) -> AbstractContextManager[object]:
    """Within it no server is asked twice what is at a URL, or below it; nothing where none of the paths is one."""
    if not any(isinstance(path, (str, os.PathLike)) and is_url(os.fspath(path)) for path in paths):
        return nullcontext()
    from ckptkit.remote import session

    return session()


def notes() -> dict[str, Any]:
    """What is known about URLs, by URL; it is discarded at the end of the command."""
    from ckptkit.remote import current_session

    current = current_session()
    return {} if current is None else current.notes


# The text of paths.

_QUERY = pattern(r"\?(?:\*\*\*|[\w.~%-]+=).*\Z", re.DOTALL)


def _plain(url: str) -> str:
    """A URL without its query; an object's name may have such marks, too."""
    if url[:4].lower() == "http":
        return url.partition("?")[0].partition("#")[0]
    return _QUERY.sub("", url) if "?" in url else url


def below(folder: str, name: str) -> str:
    """The path of what is called so below a folder: ``name`` is relative to it, with slashes between its segments."""
    if is_url(folder):
        return folder if name in ("", os.curdir) else f"{folder.rstrip('/')}/{name}"
    return os.path.join(folder, *name.split("/"))


def split(path: str) -> tuple[str, str]:
    """As `os.path.split`: the folder, and the name in it; above the first segment of a URL there is nothing."""
    if not is_url(path):
        return os.path.split(path)
    folder, _, name = _plain(path).rpartition("/")
    return (path, "") if folder.endswith((":", ":/")) else (folder, name)


def own_name(path: str) -> str:
    """The last segment of a path, by the folder that it leads to; for a URL without its query.

    A ``.metadata`` at a URL means the folder that it is in.
    """
    if not is_url(path):
        return os.path.basename(os.path.abspath(path))
    return split(_plain(path).rstrip("/").removesuffix("/.metadata"))[1]


def expanded(path: str, system: str = os.name) -> list[str]:
    """The paths that match a pattern, for shells that leave that to programs, as on Windows; elsewhere the path.

    A file with exactly that name wins, as ``a[1].pth`` may be one; a pattern without a match is unchanged.

    Args:
        path: as it was typed.
        system: ``os.name``.
    """
    if system != "nt" or not re.search("[*?[]", path) or is_url(path) or os.path.lexists(path):
        return [path]
    from glob import glob

    return sorted(glob(path)) or [path]


def absolute(path: str) -> str:
    """A path from the root of the disk; a URL unchanged."""
    return path if is_url(path) else os.path.abspath(path)


def relative(path: str, folder: str) -> str:
    """A path as seen from a folder, with slashes; links are not followed.  Of two that nothing connects: the path."""
    if is_url(path) or is_url(folder):
        whole, root = _plain(path).rstrip("/"), folder.rstrip("/")
        if whole == root:
            return "."
        if root.startswith(f"{whole}/"):
            return "/".join([os.pardir] * (root.count("/") - whole.count("/")))
        return whole[len(root) + 1 :] if root and whole.startswith(f"{root}/") else path
    absolute = os.path.abspath(path)
    try:
        return os.path.relpath(absolute, folder or ".").replace(os.sep, "/")
    except ValueError:  # another drive
        return absolute.replace(os.sep, "/")


def shown(path: str) -> str:
    """A path as messages and documents have it: a URL without what gives access to it."""
    if not is_url(path):
        return path
    from ckptkit.remote.retries import masked

    return masked(path)


def require_local(destination: str) -> None:
    """Refuse a URL for an output.

    Raises:
        FileAccessError: it is one.
    """
    if is_url(destination):
        told = f"{shown(destination)}: ckptkit cannot write to a URL; write a local file and upload it"
        raise FileAccessError(told, path=shown(destination))


# What is there.


def isdir(path: str) -> bool:
    """Whether a path is a folder's: for a URL, whether files are below it."""
    if not is_url(path):
        return os.path.isdir(path)
    from ckptkit.places import far

    return far.is_folder(path)


def isfile(path: str) -> bool:
    """Whether a path is a file's."""
    if not is_url(path):
        return os.path.isfile(path)
    from ckptkit.places import far

    return far.is_file(path)


def are_listed(path: str) -> bool:
    """Whether it can be found out what is beside a file."""
    if not is_url(path):
        return True
    from ckptkit.remote import store_of

    return store_of(path).has_listings


def is_known(folder: str) -> bool:
    """Whether what is in a folder can be said without a request."""
    if not is_url(folder):
        return True
    from ckptkit.places import far

    return far.is_known(folder)


def exists(path: str) -> bool:
    """Whether anything has a path: a link that leads nowhere, too."""
    return isdir(path) or isfile(path) if is_url(path) else os.path.lexists(path)


def may_exist(path: str) -> bool:
    """As `exists`; and whether a server does not say: it cannot be reached, or refuses."""
    if exists(path):
        return True
    if not is_url(path):
        return False
    from ckptkit.places import far

    return far.is_untold(path)


def identity(path: str) -> Hashable | None:
    """The identity of a file or folder, equal for all paths that lead to it; ``None``: there is none."""
    if is_url(path):
        from ckptkit.places import far

        return far.identity(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def identity_of(file: Source, path: str) -> Hashable:
    """The `identity` of the path that a file was opened by."""
    return file.identity[:2] if isinstance(file, SourceFile) else identity(path)


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there, or cannot be asked.
    """
    if not is_url(path):
        return os.stat(path).st_size
    from ckptkit.places import far

    return far.size(path)


def scandir(folder: str) -> AbstractContextManager[Iterable[os.DirEntry[str] | FarEntry]]:
    """As `os.scandir`; ``""`` is the working directory.

    Raises:
        OSError: it cannot be listed.
    """
    if not is_url(folder):
        return os.scandir(folder or os.curdir)
    from ckptkit.places import far

    return nullcontext(far.entries(folder))


def listdir(folder: str) -> list[str]:
    """The names in a folder; ``""`` is the working directory.

    Raises:
        OSError: it cannot be listed.
    """
    if not is_url(folder):
        return os.listdir(folder or os.curdir)
    from ckptkit.places import far

    return [entry.name for entry in far.entries(folder)]


def listed_below(folder: str) -> Sequence[str] | None:
    """The files below a folder by their paths from there, if one listing has them; ``None``: walk through it.

    Raises:
        OSError: it cannot be listed.
    """
    if not is_url(folder):
        return None
    from ckptkit.places import far

    return far.names_below(folder)


def unreadable_folder(folder: str, error: OSError) -> FileAccessError:
    """The error for a folder that cannot be listed."""
    if isinstance(error, FileAccessError):
        return error
    return FileAccessError(f"{folder}: the folder cannot be read: {error.strerror}", path=folder)


def leads_to(asked: Callable[[], bool]) -> bool:
    """Whether an entry of a folder passes a test, its ``is_file`` or ``is_dir``, with links followed."""
    try:
        return asked()
    except OSError:  # links that lead to one another
        return False


# Its content.


def opened(path: str) -> Source:
    """What contains the bytes of the file at a path.

    Raises:
        MissingFileError: there is none.
        FileAccessError: it cannot be opened.
    """
    if not is_url(path):
        return SourceFile(path)
    from ckptkit.places import far

    return far.opened(path)


def put_back(file: Source, path: str) -> None:
    """Close a file that was examined; a remote one stays open for its next reader."""
    if not is_url(path):
        file.close()
        return
    from ckptkit.places import far

    far.put_back(file, path)


def head(path: str, nbytes: int) -> bytes:
    """The first bytes of a file, or all there are.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if not is_url(path):
        with open(path, "rb") as file:  # noqa: PTH123 - a few bytes
            return file.read(nbytes)
    from ckptkit.places import far

    return far.head(path, nbytes)


def opener(folder: str) -> Callable[[str], Source]:
    """What opens the files below a folder, by their paths from there with slashes, now and later.

    A file of a server's listing is asked for when it is first read.
    """
    if not is_url(folder):
        return lambda name: SourceFile(below(folder, name))
    from ckptkit.places import far

    return far.opener(folder)


def look_ahead(files: Sequence[Source]) -> None:
    """Open files from an `opener` that are remote in parallel, before each is read."""
    from ckptkit.remote.listed import look_ahead as of_listed

    of_listed(files)


@contextmanager
def opened_ahead(folder: str, leave_out: Callable[[str], bool]) -> Iterator[None]:
    """Within it, the files below a remote folder are opened several at a time before they are needed.

    Args:
        folder: that is walked through, in the order of names, files before folders.
        leave_out: called with a file's name: whether it is opened when it is asked for.
    """
    if not is_url(folder):
        yield
        return
    from ckptkit.places import far

    with far.opened_ahead(folder, leave_out):
        yield
