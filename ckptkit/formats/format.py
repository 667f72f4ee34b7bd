"""A container, as the rest of ckptkit sees it: a name, how it is recognized, and the modules that read and write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.bytesource import Source
from ckptkit.checkpoint import Checkpoint, GlobalUse
from ckptkit.errors import CorruptError, FormatError, RewriteError
from ckptkit.formats.unpacked import UnpackedSource
from ckptkit.formats.zip_archive import LOCAL_SIGNATURE, Records, read_directory
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.report import Finding

if TYPE_CHECKING:
    from ckptkit.plan import Plan

__all__ = ["HEAD_NBYTES", "TORCH_MARKS", "Around", "Format", "Probe", "is_folder"]

HEAD_NBYTES = 512
"""First bytes of a file that sniffing looks at."""

TORCH_MARKS = ("/data.pkl", "/model.json", "/archive_format", "/.data/extern_modules")
"""Records that identify the root folder of a torch archive."""


def is_folder(file: Source) -> bool:
    """Whether a source represents a folder of files (`ckptkit.formats.distributed.folder`), and has no bytes itself."""
    return hasattr(file, "layout")


class Probe:
    """A file for those who must say what it is: its first bytes and, read once, its directory.

    Attributes:
        file: the file.
        limits: bounds on what it may ask for.
        prefix: before the key of each storage: the name of a shard, and a colon.
        outcomes: for containers that cannot claim a file without reading it: the result or the error by name; ``None``:
            the file is none of theirs.
    """

    def __init__(self, file: Source, limits: Limits, prefix: str = "") -> None:
        self.file = file
        self.limits = limits
        self.prefix = prefix
        self.outcomes: dict[str, RawCheckpoint | FormatError | None] = {}

    @cached_property
    def head(self) -> bytes:
        """Its first `HEAD_NBYTES` bytes, or all there are."""
        return self.file.read(0, min(HEAD_NBYTES, self.file.size))

    @cached_property
    def records(self) -> Records | None:
        """Every record of a zip archive, or of an unpacked one, by its full name; ``None``: the file is neither.

        Raises:
            CorruptError: the file begins like one, and is damaged or ambiguous; if it is truncated, the message says
                what is left of it.
        """
        if isinstance(self.file, UnpackedSource):
            return self.file.records()
        if not self.head.startswith(LOCAL_SIGNATURE):
            return None
        try:
            return read_directory(self.file, self.limits)
        except CorruptError as error:
            from ckptkit.formats.truncated import what_is_left

            found = what_is_left(self.file, self.limits)
            if found is None:
                raise
            raise CorruptError(found) from error

    @cached_property
    def json_object(self) -> bytes | None:
        """The whole file if it begins like a JSON object and is no larger than an index of shards may be."""
        begins = self.head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{")
        return self.file.read(0, self.file.size) if begins and self.file.size <= self.limits.index_nbytes else None


class Around(NamedTuple):
    """The source of a checkpoint.

    Attributes:
        given: the file that was given: one that is compressed, or an archive.
        findings: about the way to it.
        uses: the names in the pickles beside it, and what could not be read.
        has_pickle: whether there may be any.
        where: the way, for messages.
    """

    given: Source
    findings: tuple[Finding, ...]
    uses: tuple[GlobalUse, ...]
    has_pickle: bool
    where: str

    def further(
        self, where: str, finding: Finding, uses: tuple[GlobalUse, ...] = (), *, has_pickle: bool = False
    ) -> Around:
        """The same one step further in."""
        return Around(
            self.given,
            (*self.findings, finding),
            (*self.uses, *uses),
            self.has_pickle or has_pickle,
            f"{self.where}: {where}" if self.where else where,
        )

    def at(self, error: FormatError) -> FormatError:
        """The error with the path before its place, and with the names beside it."""
        error.where = f"{self.where}: {error.where}" if error.where else self.where
        error.globals = (*error.globals, *(use for use in self.uses if use.kind == "name"))
        return error


class Format(NamedTuple):
    """One container, and everything about it that others ask: no name of one is compared anywhere else.

    Attributes:
        name: as in `Origin.format` and the JSON documents.
        claims: whether the file claims to be of this container.
            After that the decision is final: anything wrong with the file is that container's error.
        reader: the module that reads it.
        suffixes: endings of destinations that choose it, the customary one first.
        writer: the module that writes it; ``None``: cannot be written.
        has_pickle: whether there may be pickles in it; the shards of an index without any must be of ``shards``.
        is_program: whether it contains a program, of which only the weights can be written.
        tensors_alone: whether it can store only named tensors, each with its own bytes; otherwise there is a tree, and
            tensors share storages in it.
        shards: for an index, the container of its shards.
        is_folder: whether it is a folder that several processes wrote, and that is one checkpoint.
        ties_once: whether tied tensors are in it under one name only, and loading fills in the others.
        loader: the function that programs load it with, if one loads everything in it.
        maps_location: whether ``loader`` takes a ``map_location``.
        has_classes: whether the classes of its modules are in it, so that loading it needs none of them.
        title: what writes such files, in a line.
        words: what it is, for a reader who sees one for the first time, with ``{}`` in the place of its class; ``""``:
            its content says that.
    """

    name: str
    claims: Callable[[Probe], bool]
    reader: str
    suffixes: tuple[str, ...] = ()
    writer: str | None = None
    has_pickle: bool = True
    is_program: bool = False
    tensors_alone: bool = False
    shards: str | None = None
    is_folder: bool = False
    ties_once: bool = False
    loader: str | None = None
    maps_location: bool = False
    has_classes: bool = False
    title: str = ""
    words: str = ""

    def read(self, probe: Probe) -> RawCheckpoint:
        """The tree and the container's facts; reads directory, pickle or header only.

        Raises:
            FormatError: the file is damaged or refused.
        """
        read: Callable[[Probe], RawCheckpoint] = import_module(f"ckptkit.formats.{self.reader}").read
        raw = read(probe)
        return replace(raw, has_pickle=raw.has_pickle and self.has_pickle, is_program=self.is_program)

    def write(self, checkpoint: Checkpoint, ranks: int | None = None) -> Plan:
        """The plan of a file, or a folder, that contains a checkpoint.

        Args:
            checkpoint: what to write.
            ranks: how many share a folder; ``None``: one.

        Raises:
            RewriteError: the container cannot hold it, or cannot be written at all.
        """
        if self.writer is None:
            raise RewriteError(f"{self.name} cannot be written")
        write: Callable[..., Plan] = import_module(f"ckptkit.formats.{self.writer}").write
        return write(checkpoint) if ranks is None else write(checkpoint, ranks)
