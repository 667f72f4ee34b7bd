"""Finds the word that was probably meant by an unknown one: ``; did you mean resnet18?``.

One rule for options, commands, codes, models, dtypes, sections, members of archives and files.  A word that is the same
apart from case, spaces, ``-`` and ``_`` is the only suggestion; otherwise the few that begin with the given text;
otherwise the most similar ones, by `difflib`, without clearly less similar ones.  Nothing is compared before something
is wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice

from ckptkit.errors import FileAccessError, MissingFileError
from ckptkit.shell import quoted

__all__ = ["asked_of", "did_you_mean", "meant_file", "near_names", "nearest", "with_meant_file"]

_MOST, _LONGEST = 4096, 200
"""Words that are compared, and characters of each: files may contain any number of any length."""

_ALIKE, _SPREAD = 0.6, 0.12
"""How alike a word must be (of 1), and how much less than the most alike one."""


def nearest(given: str, known: Iterable[str], n: int = 3, *, called: Mapping[str, str] | None = None) -> list[str]:
    """The words that were probably meant, the most alike first.

    Args:
        given: the word.
        known: those that there are.
        n: how many at most.
        called: what people also call some of them, in lower case with ``-``: ``{"st": "safetensors"}``.
    """
    wanted = _plain(given[:_LONGEST])
    if called is not None and wanted in called:
        return [called[wanted]]
    words: dict[str, list[str]] = {}
    for word in islice(known, _MOST):
        if len(word) <= _LONGEST and word != given:
            words.setdefault(_plain(word), []).append(word)
    if wanted in words:
        return words[wanted][:n]
    from difflib import SequenceMatcher, get_close_matches  # every command starts faster without

    begun = [word for word in words if len(wanted) > 1 and word.startswith(wanted)]
    near = begun if 0 < len(begun) <= n else get_close_matches(wanted, words, n, cutoff=_ALIKE)
    share = {word: SequenceMatcher(None, word, wanted).ratio() for word in near}
    near = sorted((word for word in words if word in share), key=share.__getitem__, reverse=True)
    return [name for word in near if share[word] > share[near[0]] - _SPREAD for name in words[word]][:n]


def did_you_mean(
    given: str,
    known: Iterable[str],
    n: int = 3,
    *,
    called: Mapping[str, str] | None = None,
    shown: Callable[[str], str] = str,
) -> str:
    """The end of a message: ``"; did you mean a, b or c?"``; ``""`` if nothing is near.

    Args:
        given: the word; see `nearest`.
        known: those that there are.
        n: how many at most.
        called: what people also call some of them.
        shown: how a word is written: ``repr`` for what files hold.
    """
    return asked_of(map(shown, nearest(given, known, n, called=called)))


def asked_of(words: Iterable[str]) -> str:
    """The end of a message that asks whether one of these was meant; ``""`` if there are none."""
    *some, last = ("", *words)
    if not last:
        return ""
    return f"; did you mean {', '.join(some[1:])}{' or ' if some[1:] else ''}{last}?"


def _plain(word: str) -> str:
    return re.sub(r"[-_\s]+", "-", word.casefold())


def meant_file(path: str) -> str:
    """The end of a message about a missing local file: files in its folder that may be meant.

    That is a file or folder with a similar name, or with the same name and another extension; if a folder of the path
    does not exist, the same path through one that does.  For ``FILE!MEMBER`` the file is searched for, and so it is for
    ``FILE!``.
    """
    file, mark, member = path.partition("!")
    with suppress(OSError, ValueError):
        return asked_of(quoted(near + (mark + member if member else "")) for near in _near_files(file))
    return ""


def near_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Names of files that were probably meant: those of the same stem, or of one that is alike; endings count less."""
    stems: dict[str, list[str]] = {}
    for name in islice(names, _MOST):
        stems.setdefault(_stem(name), []).append(name)
    same = stems.get(_stem(wanted)) or [name for near in nearest(_stem(wanted), stems) for name in stems[near]]
    return ((len(same) > 1 and nearest(wanted, same)) or same)[:3]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].lstrip(".").partition(".")[0].casefold()


def with_meant_file(error: FileAccessError) -> FileAccessError:
    """The error for a given path; if nothing has the path, with the suggestion of `meant_file`."""
    meant = meant_file(error.path) if isinstance(error, MissingFileError) and error.path is not None else ""
    return MissingFileError(f"{error}{meant}", path=error.path, names=error.names) if meant else error


def _near_files(path: str) -> Iterator[str]:
    there, rest = path.rstrip("/" + os.sep), ""
    while there and not os.path.lexists(os.path.dirname(there) or os.curdir):
        there, name = os.path.split(there)
        rest = os.path.join(name, rest)
    folder, wanted = os.path.split(there)
    if not wanted:
        return
    with os.scandir(folder or os.curdir) as listing:
        names = [each.name for each in islice(listing, _MOST) if each.name[0] != "." or wanted[0] == "."]
    for name in near_names(wanted, sorted(names)):
        near = os.path.join(folder, name, rest.rstrip(os.sep)) if rest else os.path.join(folder, name)
        if os.path.lexists(near):
            yield near
