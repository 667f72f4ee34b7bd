"""Sharded training checkpoints: folders that several processes wrote, each opened as one checkpoint.

`layouts` has the names that identify a folder; the module of each layout has its specification and reads it.
`around` finds the folder that a given one refers to; `folder` treats it as one file.
"""

from __future__ import annotations

import os

from ckptkit import places
from ckptkit.bytesource import Source
from ckptkit.errors import FileAccessError
from ckptkit.formats.distributed.around import Found, found_in
from ckptkit.formats.distributed.folder import FolderSource, listing
from ckptkit.formats.distributed.layouts import LAYOUTS, is_metadata
from ckptkit.formats.format import HEAD_NBYTES
from ckptkit.formats.unpacked import unpacked_source

__all__ = ["folder_source", "unlisted_source"]


def folder_source(path: str, tag: str | None = None, tp_rules: str | os.PathLike[str] | None = None) -> Source | None:
    """The source for a folder that is one checkpoint, or leads to one; ``None`` for any other path.

    Args:
        path: the folder.
        tag: which of several steps in it is meant.
        tp_rules: the file with the rules for joining slices of ranks; with one, files whose names differ only in one
            number are one checkpoint.

    Raises:
        FileAccessError: it cannot be listed; there are several checkpoints in it, or no such step.
        CorruptError: it points to a step that is not there, or outside of it.
    """
    if not places.isdir(path):
        return None
    if tp_rules is not None:
        return _by_rules(path, tag, os.fsdecode(tp_rules))
    found = found_in(path, tag)
    if found is None:
        return None
    if found.layout is None:
        return unpacked_source(found.root) or places.opened(found.root)
    return _source(path, found, found.layout, tag)


def unlisted_source(url: str) -> Source | None:
    """The source for the folder of a ``.metadata`` whose server lists no files: the others are those that it names.

    Args:
        url: of a file; the result for any other is ``None``.
    """
    folder, name = places.split(url)
    if name != ".metadata" or places.are_listed(url):
        return None
    try:
        is_one = is_metadata(places.head(url, HEAD_NBYTES))
    except OSError:  # reported when it is opened
        return None
    return FolderSource(url, folder, "dcp", (name,)) if is_one else None


def _source(path: str, found: Found, layout: str, tag: str | None) -> FolderSource:
    return FolderSource(
        path,
        found.root,
        layout,
        found.names,
        found.tag,
        own=found.own,
        members=found.members,
        asked=tag,
        findings=found.findings,
    )


def _by_rules(path: str, tag: str | None, tp_rules: str) -> FolderSource:
    """The folder of ranks whose slices are joined by rules that are given.

    Raises:
        As `folder_source`.
        FileAccessError: it holds none, or the rules cannot be read.
        FormatError: the rules are invalid.
    """
    from ckptkit.formats.distributed.slices import sliced
    from ckptkit.formats.distributed.tensor_parallel import rules_in

    rules, names = rules_in(tp_rules), listing(path)
    is_placed = any(layout.claims(path, names) for layout in LAYOUTS if layout.format in _PLACED)
    is_it = not is_placed and tag is None and bool(sliced(names))
    found = Found(path, "megatron", names, tuple(sliced(names))) if is_it else found_in(path, tag)
    if found is None or (found.layout != "megatron" and (found.layout in _PLACED or not sliced(found.names))):
        raise FileAccessError(
            f"{path}: --tp-rules joins files whose names differ in one number; there are none here", path=path
        )
    source = _source(path, found, "megatron", tag)
    source.tp_rules, source.rules = rules, tp_rules
    return source


_PLACED = ("dcp", "megatron", "safetensors-dcp")
"""Layouts whose readers say themselves what belongs together."""
