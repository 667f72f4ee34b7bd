"""What a container is to the rest of ckptkit: four functions and a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.limits import Limits
from ckptkit.normalize import RawCheckpoint
from ckptkit.plan import Plan

__all__ = ["HEAD_NBYTES", "Format"]

HEAD_NBYTES = 512
"""First bytes of a file that sniffing looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One container.

    Attributes:
        name: as in `Origin.format` and the JSON documents.
        suffixes: endings of destinations that choose it.
        sniff: whether a file that begins so, of this size in bytes, claims to be of this container.
            After that the decision stands: what is wrong with the file is that container's error.
        read: the tree and the container's facts; reads directory, pickle or header only.
        write: the plan of a file that holds a checkpoint; ``None``: cannot be written.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes, int], bool]
    read: Callable[[SourceFile, Limits], RawCheckpoint]
    write: Callable[[Checkpoint], Plan] | None
