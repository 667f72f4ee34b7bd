"""What is below URLs: servers have files and no folders, and say in one listing which are there.

A URL is a folder where files are below it.  It takes one request to find out: a URL with a file's extension (``.pth``,
``.json``) is opened as a file first, and the answer is kept for its next reader; for any other, the listing is
requested first.  A listing has everything below a URL, however deep, and is kept for the command, so questions about
paths below it take no further request.

Names are as the server has them.  A URL that is not a path (``a//b``, ``../b``) is a file like any other, in the
listing's root, and never leads out of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ckptkit.bytesource import Source, given_up
from ckptkit.errors import FileAccessError, MissingFileError
from ckptkit.remote import current_session, opened_at, revealed, session, source_at, store_of
from ckptkit.remote.listed import ListedSource
from ckptkit.remote.retries import masked
from ckptkit.remote.source import RemoteSource

__all__ = [
    "FarEntry",
    "Tree",
    "entries",
    "head",
    "identity",
    "is_file",
    "is_folder",
    "is_known",
    "is_untold",
    "names_below",
    "opened",
    "opened_ahead",
    "opener",
    "put_back",
    "size",
]

_FILE_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9_]{0,15}\Z")
_ODD = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)")
_SIDE_BY_SIDE = 16
"""Files that are opened at a time."""

_AHEAD = 64
"""Files that are open before they are asked for."""

_asking = threading.RLock()
"""Held while a listing is requested, so that no two threads request one."""


class FarEntry:
    """A file or folder below a URL, like an entry of `os.scandir`.

    Attributes:
        name: in its folder.
        path: its URL.
        nbytes: of a file; ``None``: it is a folder.
    """

    __slots__ = ("name", "nbytes", "path")

    def __init__(self, name: str, path: str, nbytes: int | None) -> None:
        self.name, self.path, self.nbytes = name, path, nbytes

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.nbytes is not None

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.nbytes is None

    def is_symlink(self) -> bool:
        """There are none."""
        return False


class Tree:
    """What a listing says.

    Args:
        root: the URL it is of, without a slash at its end.
        files: size in bytes by path from there.

    Attributes:
        root, files: as above.
        folders: names in each folder, by its path from the root (``""``: itself), with the sizes of files.
    """

    def __init__(self, root: str, files: Mapping[str, int]) -> None:
        self.root = root
        self.files = {name: nbytes for name, nbytes in files.items() if nbytes or (name and not name.endswith("/"))}
        self.folders: dict[str, dict[tuple[str, bool], int | None]] = {}
        for name, nbytes in self.files.items():
            folder, _, own = ("", "", name) if _ODD.search(name) else name.rpartition("/")
            inside = self.folders.get(folder)
            if inside is None:
                inside = self._folder(folder)
            inside[own, True] = nbytes

    def _folder(self, path: str) -> dict[tuple[str, bool], int | None]:
        if path not in self.folders:
            self.folders[path] = {}
            if path:
                above, _, name = path.rpartition("/")
                self._folder(above)[name, False] = None
        return self.folders[path]

    def url(self, inside: str) -> str:
        """The URL of a path from the root."""
        return f"{self.root}/{inside}" if inside else self.root

    def entries(self, folder: str) -> list[FarEntry]:
        """What is in a folder, by name."""
        inside = self.folders.get(folder, {})
        start = f"{self.url(folder)}/"
        return [
            FarEntry(name, start + name + "/" * (nbytes is None and (name, True) in inside), nbytes)
            for (name, _), nbytes in sorted(inside.items(), key=lambda each: each[0])
        ]

    def is_folder(self, url: str, inside: str) -> bool:
        """Whether a URL is a folder's: with a slash at its end if a file has the same name."""
        return inside in self.folders and (inside not in self.files or url.endswith("/"))


def _found(url: str) -> tuple[Tree, str] | None:
    """The listing that a URL is in, and its path there; ``None``: there is none yet."""
    current, url = current_session(), url.rstrip("/")
    for root, tree in list(current.listings.items()) if current is not None else ():
        if tree is not None and tree.files and (url == root or url.startswith(f"{root}/")):
            return tree, url[len(root) + 1 :]
    return None


def _listing(url: str) -> tuple[Tree, str] | None:
    """As `_found`, with a request for a listing if there is none; ``None``: nothing is below the URL.

    Raises:
        FileAccessError: it cannot be listed.
    """
    with _asking, session() as current:
        found, root = _found(url), url.rstrip("/")
        if found is not None:
            return found
        if (failed := current.failed.get(f"{root}/*")) is not None:
            raise failed
        if root not in current.listings:
            store = store_of(url)
            try:
                current.listings[root] = Tree(root, store.listing(revealed(root))) if store.has_listings else None
            except FileAccessError as error:
                current.failed[f"{root}/*"] = error
                raise
        tree = current.listings[root]
        return (tree, "") if tree is not None and tree.files else None


def is_known(url: str) -> bool:
    """Whether a URL is in a listing that was asked for."""
    return _found(url) is not None


def is_folder(url: str) -> bool:
    """Whether files are below a URL; a URL that cannot be listed has none."""
    found = _found(url)
    if found is not None:
        return found[0].is_folder(url, found[1])
    try:
        if not store_of(url).has_listings:
            return False
        with session() as current:
            is_named = not url.endswith("/") and _FILE_ENDING.search(url)
            if is_named and (_is_there(url) or not isinstance(current.failed.get(url), MissingFileError)):
                return False
            return _listing(url) is not None
    except FileAccessError:  # reported when it is opened
        return False


def is_file(url: str) -> bool:
    """Whether there is a file at a URL, and it can be opened."""
    found = _found(url)
    if found is not None:
        return found[1] in found[0].files and not url.endswith("/")
    return not url.endswith("/") and not is_folder(url) and _is_there(url)


def is_untold(url: str) -> bool:
    """Whether a server did not say what is at a URL that it was asked for in this session."""
    with session() as current:
        told = [current.failed.get(asked) for asked in (url, f"{url.rstrip('/')}/*")]
    return any(error is not None and not isinstance(error, MissingFileError) for error in told)


def _is_there(url: str) -> bool:
    """Whether a file can be opened; it is kept open for its next reader."""
    with session() as current:
        if url in current.opened or url in current.failed:
            return url in current.opened
        try:
            source = opened_at(url)
        except FileAccessError as error:
            current.failed[url] = error  # reported when it is opened, and not requested again
            return False
        current.keep(url, source)
        return True


def opened(url: str) -> Source:
    """As `ckptkit.places.opened`."""
    try:
        return source_at(url)
    except FileAccessError as error:
        is_open = isinstance(error, MissingFileError) or _FILE_ENDING.search(url) is None
        told = _nothing_at(url) if is_open else None
        if told is None:
            raise
        raise told from None


def _nothing_at(url: str) -> FileAccessError | None:
    """The message for a URL without a file: its folder cannot be listed, or is empty.

    Returns: ``None``: all that is known is that there is none.
    """
    try:
        if not store_of(url).has_listings:
            what = "is a folder, and this server does not list its files; name one of them" if url.endswith("/") else ""
        else:
            what = "there are no files below this URL" if _listing(url) is None and url.endswith("/") else ""
    except FileAccessError as error:
        return error
    return MissingFileError(f"{masked(url)}: {what}", path=masked(url)) if what else None


def identity(url: str) -> Hashable | None:
    """The identity of a file or folder; ``None``: it is not in a listing."""
    found = _found(url)
    if found is None:
        return ("", url) if is_folder(url) or is_file(url) else None
    tree, inside = found
    is_one = tree.is_folder(url, inside)
    return (tree.root, inside, is_one) if is_one or inside in tree.files else None


def size(url: str) -> int:
    """Bytes of a file.

    Raises:
        MissingFileError: there is none.
        FileAccessError: it cannot be asked.
    """
    found = _found(url)
    if found is not None:
        tree, inside = found
        if inside in tree.files:
            return tree.files[inside]
        raise MissingFileError(f"{masked(url)}: no such file", path=masked(url))
    with session():
        source = source_at(url)
        try:
            return source.size
        finally:
            put_back(source, url)


def head(url: str, nbytes: int) -> bytes:
    """The first bytes of a file, or all there are; it is kept open for its next reader.

    Raises:
        FileAccessError: it is not there, or cannot be read.
    """
    with session():
        source = opened(url)
        try:
            return source.read(0, min(nbytes, source.size))
        finally:
            put_back(source, url)


def put_back(file: Source, url: str) -> None:
    """Keep a file open for its next reader in this session."""
    current = current_session()
    if current is not None and isinstance(file, RemoteSource):
        current.keep(url, file)
    else:
        file.close()


def entries(url: str) -> list[FarEntry]:
    """What is in a folder, by name.

    Raises:
        MissingFileError: nothing does.
        FileAccessError: it cannot be listed.
    """
    found = _listing(url)
    if found is None or found[1] not in found[0].folders:
        raise MissingFileError(f"{masked(url)}: there are no files below this URL", path=masked(url))
    return found[0].entries(found[1])


def names_below(url: str) -> Sequence[str]:
    """The files below a URL, by their paths from there.

    Raises:
        FileAccessError: it cannot be listed.
    """
    found = _listing(url)
    if found is None:
        return ()
    tree, inside = found
    start = f"{inside}/" if inside else ""
    return [name[len(start) :] for name in tree.files if name.startswith(start)]


def opener(url: str) -> Callable[[str], Source]:
    """What opens the files below a folder, also once the session has ended."""
    store, found = store_of(url), _listing(url)
    tree, inside = found if found is not None else (Tree(url.rstrip("/"), {}), "")
    current, root = current_session(), revealed(tree.root)

    def part(name: str) -> Source:
        path = f"{inside}/{name}" if inside else name
        where = tree.url(path)
        if tree.files and path not in tree.files:
            raise MissingFileError(f"{masked(where)}: no such file", path=masked(where))
        kept = None if current is None else current.taken(where)
        if kept is not None:
            return kept
        real = f"{root}/{path}"
        return ListedSource(store, real, tree.files[path]) if tree.files else RemoteSource(store, real)

    return part


# Several at a time.


class _Ahead:
    """Files that are opened before they are asked for, in the order of a walk."""

    def __init__(self, urls: Iterator[str]) -> None:
        self._urls = urls
        self._pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="ckptkit-open")
        self._opening: dict[str, Future[RemoteSource]] = {}
        self._within = threading.Lock()
        self._halt = threading.Event()
        self._fill()

    def _fill(self) -> None:
        while len(self._opening) < _AHEAD:
            url = next(self._urls, None)
            if url is None:
                return
            context = contextvars.copy_context()
            context.run(given_up.set, self._halt)
            self._opening[url] = self._pool.submit(context.run, _looked_into, url)

    def take(self, url: str) -> RemoteSource | None:
        """One of the files, opened; ``None``: it was not among them.

        Raises:
            FileAccessError: as opening it.
        """
        with self._within:
            future = self._opening.pop(url, None)
            if future is None:  # the first ones waiting may be some that the walk has passed
                for passed in list(self._opening)[: _SIDE_BY_SIDE if len(self._opening) == _AHEAD else 0]:
                    _drop(self._opening.pop(passed))
            self._fill()
        return None if future is None else future.result()

    def close(self) -> None:
        self._halt.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for future in self._opening.values():
            _drop(future)


def _looked_into(url: str) -> RemoteSource:
    """A file with the bytes that identify it already here: its first bytes, and an archive's last."""
    file = opened_at(url)
    file._look_ahead()
    return file


def _drop(future: Future[RemoteSource] | None) -> None:
    def close(done: Future[RemoteSource]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().close()

    if future is not None and not future.cancel():
        future.add_done_callback(close)


@contextlib.contextmanager
def opened_ahead(url: str, leave_out: Callable[[str], bool]) -> Iterator[None]:
    """As `ckptkit.places.opened_ahead`."""
    with session() as current:
        before = current.ahead
        current.ahead = ahead = _Ahead(_walk(url, leave_out))
        try:
            yield
        finally:
            current.ahead = before
            ahead.close()


def _walk(url: str, leave_out: Callable[[str], bool]) -> Iterator[str]:
    found = _listing(url)
    if found is None:
        return
    tree, inside = found
    folders = [inside]
    while folders:
        folder = folders.pop()
        inner = tree.entries(folder)
        yield from (entry.path for entry in inner if entry.nbytes and not leave_out(entry.name))
        folders += [f"{folder}/{entry.name}" if folder else entry.name for entry in reversed(inner) if entry.is_dir()]
