"""dcp: a folder that torch.distributed.checkpoint (DCP) wrote.

Layout (``torch/distributed/checkpoint/filesystem.py``):

- ``.metadata``: which tensors and objects there are, and where they lie (`ckptkit.formats.distributed.dcp_metadata`);
  it is written last, so that a folder without it is that of a save which never finished
- ``__{rank}_{n}.distcp``: items end to end; each is a whole file of ``torch.save`` (`ckptkit.formats.torch_zip`) with one
  tensor, a chunk of a larger one, or with any other object.  Their data lie at any offset, aligned to nothing.
- an item that went through ``stream.zstd/1`` is one frame of zstd, and such a file inside
- ``__{rank}.metadata``: without collectives each rank has its own, and is a whole of its own

A tensor that several ranks hold is stored once, by any of them.  A chunk's own strides count: it may be transposed, or
expanded.  ``planner_data`` says where in the nested dicts and lists that were saved each value belongs; without it the
names are the keys, dots and all.  Holes in lists are ``None``, as torch leaves them.

Objects are read when the folder is opened, tensors when their values are wanted: each item is a pickle, and those that
were not read yet are told, and judged by whoever reads them (`_Items.judge`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from threading import Lock

from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import GlobalUse, TensorEntry
from ckptkit.computed import Held, spooled
from ckptkit.errors import CorruptError, FileAccessError, FormatError, LimitError, MissingFileError, UnsupportedError
from ckptkit.formats.distributed.dcp_metadata import METADATA_NBYTES, Metadata, TensorMetadata, parse_metadata
from ckptkit.formats.distributed.folder import FolderSource
from ckptkit.formats.format import Probe
from ckptkit.formats.shards import Shard, merged_findings, merged_globals, prefixed
from ckptkit.formats.torch_zip import read_archive
from ckptkit.formats.zip_archive import read_directory
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding, count_of, listed
from ckptkit.transfer.pieces import Piece, pieced

__all__ = ["Opened", "open_folder", "read"]

NAME = "dcp"

_OWN_METADATA = re.compile(r"__([0-9]{1,9})\.metadata", re.ASCII)

_ZSTD = ("stream.zstd/1",)
"""What ``torch.distributed.checkpoint._extension.ZStandard`` calls itself."""

_MOST_KEYS = 100
"""Keys that lead to one value."""

_SPARE = 1000
"""Places in lists beyond one for each value: torch leaves out what is empty."""

_LISTED = 5
"""Names that a message lists."""


class Opened:
    """A folder whose ``.metadata`` was read and held against its files.

    Attributes:
        metadata: what it says.
        items: what reads the items.
        tensors: by name, each in pieces that were not read yet.
        objects: by name, as they were pickled.
        globals: the verdicts on all names that were read so far, and what tells that there are more.
        findings: what is remarkable.
        discarded: what the pickles of the objects make and drop.
    """

    def __init__(self, probe: Probe, folder: FolderSource, metadata: Metadata) -> None:
        self.metadata = metadata
        files = _files(folder, metadata)
        self.items = _Items(folder, metadata, files, probe.limits)
        self.tensors = {name: self._tensor(tensor, files) for name, tensor in metadata.tensors.items()}
        shards = {name: Shard(name, self.items.read(row, name), {}) for name, row in metadata.objects.items()}
        for file in files.values():
            file.release()
        self.objects = {name: shard.raw.root for name, shard in shards.items()}
        self.discarded = tuple(part for shard in shards.values() for part in shard.raw.discarded)
        self.globals = merge_uses(metadata.globals, merged_globals(shards), self._unread())
        self.findings = (*merged_findings(shards), *self._foreign(folder))

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

    def _unread(self) -> Iterator[GlobalUse]:
        count = self.items.unread
        if count:
            yield GlobalUse(
                name="items of tensors", verdict="unknown", count=count, where=(), kind="unread",
                reason="pickles that are read when their values are",
            )  # fmt: skip

    def _foreign(self, folder: FolderSource) -> Iterator[Finding]:
        named = set(self.metadata.items.paths)
        foreign = [name for name in folder.names if name.endswith(".distcp") and "/" not in name and name not in named]
        if foreign:
            yield Finding(
                code="foreign-part",
                severity="warning",
                message=f"the checkpoint does not name {count_of(len(foreign), 'file')} of its folder: "
                f"{listed(foreign, _LISTED)}; left over from another save, or from more ranks",
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
        pickle_protocol=metadata.protocol,
        globals=opened.globals,
        findings=opened.findings,
        discarded=opened.discarded,
        unread=opened.items if opened.items.unread else None,
    )


def open_folder(probe: Probe) -> Opened:
    """The same by names, before it becomes a tree.

    Raises:
        As `read`.
    """
    folder = probe.file
    if not isinstance(folder, FolderSource):
        raise TypeError("a folder is read")
    name = _metadata_name(folder)
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
    try:
        return Opened(probe, folder, metadata)
    except FormatError as error:
        error.globals = (*metadata.globals, *error.globals)
        raise


def _metadata_name(folder: FolderSource) -> str:
    """The ``.metadata`` that is meant.

    Raises:
        FileAccessError: each rank has its own, and none was chosen.
        CorruptError: there is none.
    """
    ranks = {int(found[1]): name for name in folder.names if (found := _OWN_METADATA.fullmatch(name))}
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
            f"{folder.path}: {asked}each of {len(ranks):,} ranks saved a checkpoint of its own here, without the "
            f"others; choose one with --tag: {listed(known, _LISTED)}",
            path=folder.path,
            names=known,
        )
    raise CorruptError("there is no .metadata, which is written last: the save never finished, or the file was lost")


def _files(folder: FolderSource, metadata: Metadata) -> dict[str, Source]:
    """The files that hold the items, once all are there and long enough.

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


class _Items:
    """Reads items.

    Attributes:
        unread: how many of tensors were not read yet when the folder was opened.
    """

    def __init__(self, folder: FolderSource, metadata: Metadata, files: dict[str, Source], limits: Limits) -> None:
        self._folder = folder
        self._metadata = metadata
        self._files = files
        self._limits = limits
        self._lock = Lock()
        self._tensors: dict[int, TensorEntry] = {}
        self._uses: tuple[GlobalUse, ...] = ()
        self.unread = sum(row >= 0 for tensor in metadata.tensors.values() for row in tensor.rows)

    def judge(self) -> tuple[GlobalUse, ...]:
        """As `ckptkit.checkpoint.Unread.judge`: file by file, in the order in which they lie there."""
        items = self._metadata.items
        rows = [
            (items.paths[row], items.starts[row], row, number, tensor)
            for tensor in self._metadata.tensors.values()
            for number, row in enumerate(tensor.rows)
            if row >= 0
        ]
        rows.sort(key=lambda found: found[:3])
        before = ""
        for path, _, row, number, tensor in rows:
            if before and path != before:
                self._files[before].release()
            before = path
            entry = self.tensor(row, tensor.name)
            if entry.shape != tensor.sizes[number] or entry.dtype != tensor.dtype:
                raise CorruptError(
                    f"tensor {tensor.name!r:.200}: its piece in {path} at {[*tensor.offsets[number]]} is {entry.dtype} "
                    f"{[*entry.shape]}, not {tensor.dtype} {[*tensor.sizes[number]]}"
                )
        return self._uses

    def tensor(self, row: int, name: str) -> TensorEntry:
        """The tensor that an item is.

        Raises:
            CorruptError: it is damaged, or more than one plain tensor.
        """
        known = self._tensors.get(row)
        if known is not None:
            return known
        raw = self.read(row, name)
        entry = raw.root
        odd = [use for use in raw.globals if use.verdict not in ("torch", "allowed")]
        is_plain = isinstance(entry, TensorEntry) and entry.subclass is None and entry.attributes is None
        if not isinstance(entry, TensorEntry) or not is_plain or odd or raw.discarded or entry.effects:
            names = f": it names {listed([use.name for use in odd], _LISTED)}" if odd else ""
            error = CorruptError(f"the item is not one plain tensor{names}", where=self._place(row, name))
            raise error.at(seen=raw.globals)
        with self._lock:
            self._uses = merge_uses(self._uses, raw.globals)
            self._tensors[row] = entry
        return entry

    def read(self, row: int, name: str) -> RawCheckpoint:
        """What an item holds; the keys of its storages begin with the name.

        Raises:
            FormatError: it is damaged or refused.
            MissingDependencyError: it is compressed, and nothing that decompresses it is installed.
        """
        try:
            area = self._area(row, name)
            raw = read_archive(read_directory(area, self._limits), self._limits)
        except FormatError as error:
            place = self._place(row, name)
            error.where = f"{place}: {error.where}" if error.where else place
            raise
        return prefixed(raw, f"{name}:")

    def _place(self, row: int, name: str) -> str:
        items = self._metadata.items
        return f"{items.paths[row]}, {name!r:.200} at byte {items.starts[row]:,}"

    def _area(self, row: int, name: str) -> ByteRange:
        """Where an item's bytes lie, decompressed."""
        items = self._metadata.items
        area = ByteRange(self._files[items.paths[row]], items.starts[row], items.lengths[row])
        through = items.transforms[row]
        if not through:
            return area
        if through != _ZSTD:
            raise UnsupportedError(f"it went through {listed(map(repr, through))}; stream.zstd/1 is read")
        from ckptkit.formats.sources import Inner, compression_of

        compression = compression_of(area.read(0, min(area.nbytes, 16)))
        if compression is None or compression.name != "zstd":
            raise CorruptError("it went through stream.zstd/1, and is no frame of zstd")
        inner = Inner(area.file.path, area, area.file, name=name, owns=False)
        parts = compression.parts(inner, self._limits)
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            return Held(first, area.file.path).whole
        with self._lock:  # nothing else is spooled meanwhile
            return spooled(chain((first, second), parts), None, self._folder, "has items of zstd, and takes")


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
    for name in metadata.order:
        path = metadata.paths[name]
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
                raise CorruptError(f"{name!r:.200}: its path in planner_data leads through what is something else")
            branch = child
        if path[-1] in branch.children:
            raise CorruptError(f"{name!r:.200}: another value is in its place by planner_data")
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
