"""Which files are meant: those named, and those that folders hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import field

from ckptkit import places
from ckptkit.errors import CkptkitError, FileAccessError
from ckptkit.formats import STDIN
from ckptkit.formats.folder import Surveyor, indexes_by_shard
from ckptkit.places import is_temporary_name
from ckptkit.report import count_of, split_member
from ckptkit.startup import dataclass

__all__ = ["Selected", "Selection", "name_of", "select", "size_of", "step_of"]

_OTHER_STEP = "other training step"
"""The kind of a folder that is skipped because the folder above names another as its last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """One checkpoint.

    Attributes:
        path: for opening it.
        name: relative to the folder in question, with ``/``; begins with ``../`` if it is not below it.
        names: that, and its other names: links to the same file.
    """

    path: str
    name: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The files that paths mean.

    Attributes:
        checkpoints: each once, sorted by name.
        passed: the files that were met and are not checkpoints, with their kinds.
        others: those among them that may hold pickles, with their kinds.
        unreadable: files and folders about which nothing is known, and why.
        empty: folders without a checkpoint, each with its message.
        shards: shards that were named, by the path of the index that includes them.
    """

    checkpoints: tuple[Selected, ...]
    passed: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    unreadable: tuple[tuple[str, CkptkitError], ...] = ()
    empty: tuple[tuple[str, CkptkitError], ...] = ()
    shards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def passed_over(self) -> dict[str, int]:
        """How many files of each kind are not checkpoints."""
        return dict(Counter(self.passed.values()))

    def require_all(self) -> None:
        """Raise where not everything that was meant is known.

        Raises:
            CkptkitError: a folder contains no checkpoint, or something cannot be read; the message lists all of it.
        """
        errors = [error for _, error in (*self.empty, *self.unreadable)]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise FileAccessError("\n  ".join([f"{count_of(len(errors), 'path')} cannot be read:", *map(str, errors)]))


def select(
    paths: Iterable[str | os.PathLike[str]],
    *,
    relative_to: str,
    tag: str | None = None,
    skip_others: bool = False,
    whole: bool = False,
    known: Container[str] = (),
    manifest: str | None = None,
    every_pickle: bool = False,
    are_whole: bool = False,
    beside: bool = False,
) -> Selection:
    """The checkpoints that paths mean.

    A file represents itself, whether it exists or not: opening it finds out.  A folder means the checkpoint files in it
    and below it, as for ``ckptkit inspect``; a folder that names its last step, or from which a tag chooses one, means
    the content of that step.  A shard is left out where its index is there.

    Args:
        paths: files and folders.
        relative_to: the folder that names are relative to.
        tag: which of several steps is meant, in each of the folders.
        skip_others: whether files that are named and no checkpoint are skipped, as those of folders are.
        whole: whether a named shard means all of them, if its index is beside it.
        known: names of files that are listed themselves, so no index covers them.
        manifest: the file with the requirements, which is not one of them.
        are_whole: whether each folder is one checkpoint, because rules say how to join its files.
        every_pickle: whether incomplete outputs of ckptkit are treated as their content.
        beside: whether files beside the last step of a folder are found too; other steps are skipped, and counted.

    Raises:
        FileAccessError: there are no paths: nothing checked is never well; or there is no such step.
        CorruptError: a folder names a step that is not there.
    """
    surveyor = Surveyor(is_unfinished=(lambda _: False) if every_pickle else is_temporary_name)
    empty: list[tuple[str, CkptkitError]] = []
    shards: dict[str, list[str]] = {}
    indexes: dict[str, dict[str, str]] = {}
    given = [os.fsdecode(path) for path in paths]
    if not given:
        raise FileAccessError("no files: name files or folders")
    if manifest is not None:
        surveyor.know(manifest)
    for path in given:
        if places.isdir(path) and are_whole:
            surveyor.named(path)
            continue
        if places.isdir(path):
            if (nothing := _survey(surveyor, path, tag, beside=beside)) is not None:
                empty.append((path, nothing))
            continue
        index = None
        if whole and name_of(path, relative_to) not in known:
            folder, name = places.split(path)
            if folder not in indexes:
                indexes[folder] = _indexes_beside(folder, name)
            index = indexes[folder].get(name)
        if index is not None:
            shards.setdefault(index, []).append(path)
            surveyor.named(index)
        elif skip_others and path != STDIN and split_member(path) is None:
            surveyor.candidate(path)
        else:
            surveyor.named(path)
    found = surveyor.result()
    del surveyor  # of very many files it is large
    checkpoints: dict[str, Selected] = {}
    seen: dict[str, str] = {}
    for each in found.checkpoints:
        names = [name_of(path, relative_to, seen) for path in (each.path, *each.others)]
        checkpoints.setdefault(names[0], Selected(path=each.path, name=names[0], names=tuple(names)))
    return Selection(
        checkpoints=tuple(checkpoints[name] for name in sorted(checkpoints)),
        passed=found.passed,
        others=found.others,
        unreadable=found.unreadable,
        empty=tuple(empty),
        shards={index: tuple(dict.fromkeys(named)) for index, named in shards.items()},
    )


def _survey(surveyor: Surveyor, folder: str, tag: str | None, *, beside: bool) -> CkptkitError | None:
    """Search a folder, or what it means; the error if there is no checkpoint, or no such step."""
    try:
        step = step_of(folder, tag)
    except CkptkitError as error:
        return error
    if not places.isdir(step):
        surveyor.named(step)
        return None
    if not beside or tag is not None or step == folder:
        return surveyor.folder(step)
    for other in _other_steps(step):
        surveyor.skip(other, _OTHER_STEP)
    return surveyor.folder(folder)


def _indexes_beside(folder: str, name: str) -> dict[str, str]:
    """As `indexes_by_shard`; a server is asked what is beside a file only where its name is that of a shard."""
    return indexes_by_shard(folder) if places.is_known(folder) or "-of-" in name else {}


def step_of(path: str, tag: str | None = None) -> str:
    """The folder or file that a folder means: the step that it names, or itself.

    Raises:
        CkptkitError: there is no such step.
    """
    from ckptkit.formats.distributed.around import sharded_in

    found = sharded_in(path, tag)
    return path if found is None else found.root


def _other_steps(step: str) -> Iterator[str]:
    """The folders beside a step that are steps too."""
    from ckptkit.formats.distributed.around import sharded_at

    above, own = places.split(step)[0], places.identity(step)
    with places.scandir(above or os.curdir) as entries:
        names = sorted(entry.name for entry in entries if places.leads_to(entry.is_dir))
    for name in names:
        path = places.below(above, name)
        try:
            if places.identity(path) != own and sharded_at(path) is not None:  # a link may lead to the step itself
                yield path
        except CkptkitError:  # it is reported where it is met
            continue


def name_of(path: str, folder: str, seen: dict[str, str] | None = None) -> str:
    """A file's name relative to a folder, with ``/``; links are not followed.

    Args:
        path: the file.
        folder: the base of relative paths.
        seen: for very many files, collects the names of the folders they are in, each of which is listed once.
    """
    if not folder and os.sep == "/" and path[:1] not in ("/", ".") and os.path.normpath(path) == path:
        return path  # as most are, of very many
    above, _, last = path.rpartition("/")
    if seen is not None and above and last not in ("", ".", "..") and os.sep == "/" and not places.is_url(path):
        if above not in seen:
            seen[above] = places.relative(above, folder)
        if not seen[above].endswith(".."):  # else the path may be that of the folder
            return f"{seen[above]}/{last}".removeprefix("./")
    name = places.relative(path, folder)
    return path if name == path else name  # the same text takes no extra memory


def size_of(path: str) -> int:
    """Bytes of a file, or of those in a folder; 0 if unknown, so that opening it reports the error."""
    try:
        if places.is_url(path) and places.isdir(path):
            return sum(places.size(places.below(path, name)) for name in places.listed_below(path) or ())
        if os.path.isdir(path):
            return sum(size_of(os.path.join(inside, name)) for inside, _, names in os.walk(path) for name in names)
        return places.size(path)
    except (OSError, ValueError):
        return 0
