"""Sharded training checkpoints: folders that several processes wrote, each opened as one checkpoint.

`layouts` says by which names a folder is known; the module of each layout has its specification and reads it.
`around` finds the folder that is meant by one that was given; `folder` is it as the one file that was given.
"""

from __future__ import annotations

import os

from ckptkit.bytesource import Source, SourceFile
from ckptkit.formats.distributed.around import found_in
from ckptkit.formats.distributed.folder import FolderSource
from ckptkit.formats.unpacked import unpacked_source

__all__ = ["folder_source"]


def folder_source(path: str, tag: str | None = None) -> Source | None:
    """What stands for a folder that is one checkpoint, or leads to one; ``None``: there is none, or it is no folder.

    Args:
        path: the folder.
        tag: which of several steps in it is meant.

    Raises:
        FileAccessError: it cannot be listed; there are several checkpoints in it, or no such step.
        CorruptError: it points to a step that is not there, or outside of it.
    """
    if not os.path.isdir(path):
        return None
    found = found_in(path, tag)
    if found is None:
        return None
    if found.layout is None:
        return unpacked_source(found.root) or SourceFile(found.root)
    return FolderSource(
        path,
        found.root,
        found.layout,
        found.names,
        found.tag,
        own=found.own,
        members=found.members,
        asked=tag,
        findings=found.findings,
    )
