"""dcp: a folder that torch.distributed.checkpoint (DCP) wrote.

Layout (``torch/distributed/checkpoint/filesystem.py``):

- ``.metadata``: which tensors and objects there are, and where they are (`ckptkit.formats.distributed.dcp_metadata`);
  it is written last, so a folder without it is from a save that never finished
- ``__{rank}_{n}.distcp``: items end to end; each is a whole file of ``torch.save`` with one tensor, a chunk of a larger
  one, or with any other object (`ckptkit.formats.distributed.dcp_items`).  Their data are aligned to nothing.
- an item that went through ``stream.zstd/1`` is one frame of zstd, and such a file inside
- ``__{rank}.metadata``: without collectives each rank has its own.  Each may be complete, under the same names; or the
  ranks share the tensors, and their metadata is combined

A tensor that several ranks hold is stored once, by any of them.  A chunk's own strides count: it may be transposed, or
expanded.  ``planner_data`` says where in the nested dicts and lists that were saved each value belongs; without it the
names are the keys, dots and all.  Holes in lists are ``None``, as torch leaves them.

Objects are read when the folder is opened, tensors when their values are needed.  Each item is a pickle; unread ones
are reported, and judged when they are read (`ckptkit.formats.distributed.dcp_items`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

from ckptkit.bytesource import Source, SourceFile
from ckptkit.checkpoint import GlobalUse, Replica, TensorEntry
from ckptkit.errors import CorruptError, FileAccessError, FormatError, LimitError, MissingFileError
from ckptkit.formats.distributed.dcp_items import ItemReader
from ckptkit.formats.distributed.dcp_metadata import METADATA_NBYTES, parse_metadata
from ckptkit.formats.distributed.dcp_record import LISTED, Metadata, TensorMetadata, Wanted, together
from ckptkit.formats.distributed.folder import FolderSource, folder_of
from ckptkit.formats.format import Probe
from ckptkit.formats.shards import Shard, merged_findings, merged_globals
from ckptkit.normalize import RawCheckpoint
from ckptkit.normalize.trees import Place, SameContent, side_by_side
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding, count_of, listed
from ckptkit.transfer.pieces import Piece, pieced

__all__ = ["Opened", "open_folder", "read"]

NAME = "dcp"

_OWN_METADATA = re.compile(r"__([0-9]{1,9})\.metadata", re.ASCII)

_MOST_KEYS = 100
"""Keys that lead to one value."""

_SPARE = 1000
"""Places in lists beyond one for each value: torch leaves out what is empty."""


_LATER_NS = 60 * 10**9
"""Nanoseconds that the clocks of machines may differ by."""


class Opened:
    """A folder whose ``.metadata`` was read and checked against its files.

    Attributes:
        metadata: its content.
        items: what reads the items.
        tensors: by name, each in pieces that were not read yet.
        objects: by name, as they were pickled.
        unread: how many items are of tensors, and were not read.
        globals: the verdicts on all names that were read so far, and the entry for unread ones.
        findings: noteworthy facts.
        discarded: what the pickles of the objects make and discard.
        replicas: chunks that several ranks stored.
    """

    def __init__(self, probe: Probe, folder: FolderSource, metadata: Metadata, written: Source) -> None:
        self.metadata = metadata
        files = _files(folder, metadata)
        self.items = ItemReader(folder, metadata.items, files, probe.limits, metadata.chunks)
        self.tensors = {name: self._tensor(tensor, files) for name, tensor in metadata.tensors.items()}
        self.unread = sum(1 for _ in metadata.chunks())
        shards = {name: Shard(name, self.items.read(row, name), {}) for name, row in metadata.objects.items()}
        others = {name: [self.items.read(row, name) for row in rows] for name, rows in metadata.others.items()}
        for file in files.values():
            file.release()
        self.objects = {name: shard.raw.root for name, shard in shards.items()}
        self.discarded = tuple(part for shard in shards.values() for part in shard.raw.discarded)
        theirs = (raw.globals for raws in others.values() for raw in raws)
        self.globals = merge_uses(metadata.globals, merged_globals(shards), *theirs, self._unread())
        self.replicas = tuple(self._replicas(files))
        self.findings = (*merged_findings(shards), *self._own(others), *self._foreign(folder), *_later(files, written))

    def _tensor(self, tensor: TensorMetadata, files: dict[str, Source]) -> TensorEntry:
        paths, row_of = self.metadata.items.paths, self.items.tensor
        pieces = [
            Piece(offsets, sizes, partial(row_of, row, tensor.name), paths[row] if row >= 0 else "")
            for offsets, sizes, row in zip(tensor.offsets, tensor.sizes, tensor.rows, strict=True)
        ]
        own = {paths[row]: files[paths[row]] for row in tensor.rows if row >= 0}
        return pieced(
            tensor.name, tensor.shape, tensor.dtype, pieces, files=tuple(own.values()),
            requires_grad=tensor.requires_grad,
        )  # fmt: skip

    def _replicas(self, files: dict[str, Source]) -> Iterator[Replica]:
        paths = self.metadata.items.paths
        for wanted, row in self.metadata.copies:

            def whole(row: int, wanted: Wanted = wanted) -> TensorEntry:
                piece = Piece((0,) * len(wanted.sizes), wanted.sizes, partial(self.items.tensor, row, wanted.name))
                return pieced(wanted.name, wanted.sizes, wanted.dtype, [piece], files=(files[paths[row]],))

            yield Replica(wanted.name, whole(wanted.row), whole(row), f"{paths[wanted.row]} and {paths[row]}")

    def _own(self, others: Mapping[str, Sequence[RawCheckpoint]]) -> Iterator[Finding]:
        """Whether what was pickled under one name differs between ranks."""
        own = []
        for name, raws in others.items():
            pairs = [(Place().below(name), self.objects[name], raw.root) for raw in raws]
            if any(met.how != "bytes" for met in side_by_side(pairs, SameContent())):
                own.append(name)
        if own:
            yield Finding(
                code="rank-values",
                severity="info",
                message=f"each rank has its own {listed(own, LISTED)}; the values of the first rank are used",
            )

    def _unread(self) -> Iterator[GlobalUse]:
        count = self.unread
        if count:
            yield GlobalUse(
                name="items of tensors", verdict="unknown", count=count, where=(), kind="unread",
                reason="pickles that are read together with their values",
            )  # fmt: skip

    def _foreign(self, folder: FolderSource) -> Iterator[Finding]:
        named = set(self.metadata.items.paths)
        foreign = [name for name in folder.names if name.endswith(".distcp") and "/" not in name and name not in named]
        if foreign:
            yield Finding(
                code="foreign-part",
                severity="warning",
                message=f"the checkpoint does not name {count_of(len(foreign), 'file')} in its folder: "
                f"{listed(foreign, LISTED)}; left over from another save, or from more ranks",
            )


def _later(files: dict[str, Source], written: Source) -> Iterator[Finding]:
    """Whether files were written after ``.metadata``, which is written last."""
    times = {name: file.identity[3] for name, file in files.items() if isinstance(file, SourceFile)}
    last = written.identity[3] if isinstance(written, SourceFile) else 0
    later = [name for name, time in times.items() if last and time > last + _LATER_NS]
    if later:
        yield Finding(
            code="later-part",
            severity="warning",
            message=f"{count_of(len(later), 'file', 'was', 'were')} written after .metadata, which a save writes "
            f"last: {listed(later, LISTED)}; a later save may have replaced them without finishing, or they were "
            "copied",
        )


def read(probe: Probe) -> RawCheckpoint:
    """The tree that was saved, and the folder's own facts; of tensors nothing is read.

    Raises:
        FormatError: something is missing, damaged or refused.
    """
    opened = open_folder(probe)
    metadata = opened.metadata
    values: dict[str, object] = {**opened.objects, **opened.tensors}
    return RawCheckpoint(
        root=_nested(metadata, values),
        format=NAME,
        format_version=metadata.version,
        metadata=metadata.strings,
        globals=opened.globals,
        findings=opened.findings,
        discarded=opened.discarded,
        replicas=opened.replicas,
        unread=opened.items if opened.unread else None,
    )


def open_folder(probe: Probe) -> Opened:
    """The same by names, before it becomes a tree.

    Raises:
        As `read`.
    """
    folder = folder_of(probe)
    ranks = {int(found[1]): name for name in folder.names if (found := _OWN_METADATA.fullmatch(name))}
    if folder.tag is None and len(ranks) > 1 and ".metadata" not in folder.names:
        known = [_parsed(probe, folder, name) for _, name in sorted(ranks.items())]
        if not all(metadata.is_whole for metadata, _ in known):
            whole = together([metadata for metadata, _ in known])
            if whole is not None:
                return _opened(probe, folder, whole, known[0][1])
    return _opened(probe, folder, *_parsed(probe, folder, _metadata_name(folder, ranks)))


def _parsed(probe: Probe, folder: FolderSource, name: str) -> tuple[Metadata, Source]:
    """The content of a ``.metadata``, and its file."""
    try:
        file = folder.part(name)
        if file.size > METADATA_NBYTES:
            raise LimitError("bytes of .metadata", limit=METADATA_NBYTES, actual=file.size)
        if not file.size:
            raise CorruptError("the file is empty: the save never finished")
        metadata = parse_metadata(file.read(0, file.size), probe.limits)
        file.release()
    except FormatError as error:
        raise error.at(where=name) from error.__cause__
    return metadata, file


def _opened(probe: Probe, folder: FolderSource, metadata: Metadata, file: Source) -> Opened:
    try:
        return Opened(probe, folder, metadata, file)
    except FormatError as error:
        error.globals = (*metadata.globals, *error.globals)
        raise


def _metadata_name(folder: FolderSource, ranks: Mapping[int, str]) -> str:
    """The ``.metadata`` that is meant.

    Raises:
        FileAccessError: each rank has its own, and none was chosen.
        CorruptError: it is missing.
    """
    if ".metadata" in folder.names:
        return ".metadata"
    if len(ranks) == 1:
        return next(iter(ranks.values()))
    if ranks:
        tag = (folder.tag or "").removeprefix("__").removesuffix(".metadata").removeprefix("rank")
        if tag.isdecimal() and int(tag[:10]) in ranks:
            return ranks[int(tag[:10])]
        known = [str(rank) for rank in sorted(ranks)]
        asked = f"there is no rank {folder.tag!r:.40}: " if folder.tag else ""
        raise FileAccessError(
            f"{folder.path}: {asked}each of {len(ranks):,} ranks saved a separate checkpoint here; choose one with "
            f"--tag: {listed(known, LISTED)}",
            path=folder.path,
            names=known,
        )
    raise CorruptError("there is no .metadata, which a save writes last: the save never finished, or the file was lost")


def _files(folder: FolderSource, metadata: Metadata) -> dict[str, Source]:
    """The files that contain the items, once all are there and long enough.

    Raises:
        CorruptError: they are not.
    """
    files: dict[str, Source] = {}
    sizes: dict[str, int | None] = {}
    for path in dict.fromkeys(metadata.items.paths):
        try:
            files[path] = folder.part(path)
            sizes[path] = files[path].size
            files[path].release()
        except MissingFileError:
            sizes[path] = None
    metadata.check_files(sizes)
    return files


class _Branch:
    """A dict or list that was saved, and what was put into it by key."""

    __slots__ = ("children", "container")

    def __init__(self, container: InertDict | list[object]) -> None:
        self.container = container
        self.children: dict[str | int, _Branch | None] = {}


def _nested(metadata: Metadata, values: dict[str, object]) -> InertDict:
    """The tree that the values were taken from.

    Raises:
        CorruptError: two values are in one place, or a dict is a list.
        LimitError: it is nested too deeply, or a list is longer than there are values.
    """
    if metadata.paths is None:
        return InertDict([(name, values[name]) for name in metadata.order])
    root, spare = _Branch(InertDict()), [len(values) + _SPARE]
    # Names are described in the order in which ranks wrote them, and planned in that of what was saved.
    for name, path in metadata.paths.items():
        if name not in values:
            continue
        if len(path) > _MOST_KEYS:
            raise LimitError("keys that lead to a value", limit=_MOST_KEYS, actual=len(path))
        branch = root
        for key, following in pairwise(path):
            child = branch.children.get(key)
            kind = list if isinstance(following, int) else InertDict
            if child is None and key not in branch.children:
                child = _Branch(kind())
                _put(branch, key, child.container, spare)
                branch.children[key] = child
            if child is None or not isinstance(child.container, kind):
                raise CorruptError(f"{name!r:.200}: its path in planner_data leads through another value")
            branch = child
        if path[-1] in branch.children:
            raise CorruptError(f"{name!r:.200}: planner_data puts another value in its place")
        branch.children[path[-1]] = None
        _put(branch, path[-1], values[name], spare)
    return root.container  # type: ignore[return-value]


def _put(branch: _Branch, key: str | int, value: object, spare: Sequence[int]) -> None:
    container = branch.container
    if isinstance(container, InertDict):
        container.pairs.append((key, value))
        return
    if not isinstance(key, int) or not 0 <= key < spare[0]:
        raise CorruptError(f"planner_data has a list with the index {key!r:.40}")
    container += [None] * (key + 1 - len(container))
    container[key] = value
