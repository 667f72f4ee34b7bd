"""The error tree: everything ckptkit raises on purpose.

Imports nothing, so every layer may use it.  "The two do not match" is a `ckptkit.Report`, never an exception; an
exception means that the work could not be done.

Messages name what, where, expected, found, and what to do about it.  A layer that knows less (the pickle reader knows
the byte, not the file) leaves an attribute ``None``; the layer above fills it in with `FormatError.at`.  An error also
has the path, place and names of its message as attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "AmbiguousError",
    "CkptkitError",
    "CorruptError",
    "DTypeError",
    "DestinationExistsError",
    "FailedReportError",
    "FileAccessError",
    "FormatError",
    "KeyCollisionError",
    "LimitError",
    "MissingDependencyError",
    "MissingFileError",
    "PartError",
    "RewriteError",
    "SectionError",
    "UnknownFormatError",
    "UnsupportedError",
    "VerifyError",
]


class CkptkitError(Exception):
    """Base of every error ckptkit raises on purpose.

    Each survives pickling with its attributes, so that it can come out of a process pool.

    Attributes:
        path: the file or folder it is about; ``None``: it is about none, or the layer that raised it does not know.
        where: the part of the file, such as ``"data.pkl"`` or ``"header"``; ``None``: all of it, or not known.
        offset: position in bytes inside that part; ``None``: no one position.
        is_hostile: whether a sharded checkpoint was refused because its pickles would run something: exit code 1.
        names: the names that the message lists, without its shortening: names of tensors, or the available choices; see
            the classes.
    """

    path: str | None = None
    where: str | None = None
    offset: int | None = None
    names: tuple[str, ...] = ()
    is_hostile: bool = False

    def __init__(self, *args: object, path: str | None = None, names: Iterable[str] = (), **others: Any) -> None:
        super().__init__(*args, **others)  # of ImportError: its name
        if path is not None:
            self.path = path
        if names := tuple(names):
            self.names = names

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: Any = super().__reduce__()
        return _revived, (type(self), *reduced[1:])


def _revived(cls: type[CkptkitError], args: tuple[Any, ...], state: dict[str, Any] | None = None) -> CkptkitError:
    """An error as it was pickled: its own ``__init__``, which made the message and the attributes, is not called."""
    error = cls.__new__(cls, *args)
    super(CkptkitError, error).__init__(*args)  # of Exception, OSError or ImportError
    error.__setstate__(state)
    return error


class FileAccessError(CkptkitError, OSError):
    """A file or folder could not be opened, read, written or renamed; ``path`` is the one, if it is one."""


class MissingFileError(FileAccessError, FileNotFoundError):
    """The named file does not exist."""


class DestinationExistsError(FileAccessError, FileExistsError):
    """The destination exists and overwriting was not asked for."""


class MissingDependencyError(CkptkitError, ImportError):
    """An optional package is needed; the message contains the command that installs it."""


class FormatError(CkptkitError, ValueError):
    """A file's content is not what its format requires.

    Attributes:
        message: what is wrong, without the place, which ``str`` adds before it.
        path, where, offset, names: as in `CkptkitError`.
        globals: the verdict (`ckptkit.checkpoint.GlobalUse`) on every name that the file's pickles gave before the
            error: refused files are still reported.
        called: whether the pickle that has the error calls one of them before it.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        where: str | None = None,
        offset: int | None = None,
        names: Iterable[str] = (),
    ) -> None:
        super().__init__(message, names=names)
        self.message = message
        self.path = path
        self.where = where
        self.offset = offset
        self.globals: tuple[Any, ...] = ()
        self.called = False

    def at(self, *, path: str | None = None, where: str | None = None, seen: tuple[Any, ...] = ()) -> FormatError:
        """Fill in what the raising layer did not know; known attributes are kept.

        Args:
            path: the file.
            where: the part of it.
            seen: the names that the pickles gave which were read before.
        """
        self.path = self.path if self.path is not None else path
        self.where = self.where if self.where is not None else where
        self.globals = (*seen, *self.globals)
        return self

    def __str__(self) -> str:
        place = self.where or ""
        if self.offset is not None:
            place = f"{place}, byte {self.offset}" if place else f"byte {self.offset}"
        return ": ".join(part for part in (self.path, place, self.message) if part)


class UnknownFormatError(FormatError):
    """The content is not a container that ckptkit supports."""


class CorruptError(FormatError):
    """The container is known, but damaged, ambiguous or inconsistent."""


class AmbiguousError(CorruptError):
    """Structure on which readers of the format disagree: each could see different content.

    Honest files never have such structure, so a file that does is reported as hostile.
    """


class UnsupportedError(FormatError):
    """The content is valid, but ckptkit cannot represent or write part of it; ``names`` are those of the values."""


class PartError(FormatError):
    """The file is a part of a checkpoint, and the whole is needed: ``part-of-a-checkpoint``."""


class LimitError(FormatError):
    """A file asks for more than `ckptkit.limits.Limits` allows.

    Attributes:
        limit: the largest value allowed.
        actual: the value the file asks for (or the first one past the limit).
    """

    def __init__(self, what: str, *, limit: int, actual: int, where: str | None = None) -> None:
        super().__init__(f"{what}: {actual:,} is over the limit of {limit:,}", where=where)
        self.limit = limit
        self.actual = actual


class SectionError(CkptkitError, LookupError):
    """The named section is not in the file, or several could be meant and none was named.

    Attributes:
        names: the paths of the sections there are to choose from, as ``section=`` and ``--section`` take them.
    """


class RewriteError(CkptkitError, ValueError):
    """A rewrite cannot be carried out on this checkpoint; ``names`` are those of the tensors in its way."""


class KeyCollisionError(RewriteError):
    """Two tensors would get the same name.

    Attributes:
        first, second: the names they have now; ``names`` are both.
        target: the name both would get.
    """

    def __init__(self, first: str, second: str, target: str) -> None:
        super().__init__(
            f"{first!r} and {second!r} would both be named {target!r}; nothing was renamed", names=(first, second)
        )
        self.first = first
        self.second = second
        self.target = target


class DTypeError(RewriteError):
    """The target cannot store a tensor's dtype; ``names`` are those of the tensors."""


class VerifyError(CkptkitError):
    """A check could not run at all (this is not "it does not match")."""


class FailedReportError(CkptkitError):
    """Raised only by `Report.raise_if_failed`: the check ran and did not pass."""
