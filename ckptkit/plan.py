"""What a writer will do, before anything is done.

A format's writer turns a `Checkpoint` into a `Plan`: the exact size of the output and the steps
that fill it, each at a known position.  `--dry-run` shows the plan, `ckptkit.transfer` executes
exactly that plan.  Steps do not overlap, except that a `Checksum` fills in a field of a `Literal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptkit.bytesource import ByteSource
from ckptkit.checkpoint import TensorEntry

__all__ = ["Checksum", "Copy", "Gather", "Literal", "Plan", "Step"]


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that move as they lie, from ``source`` to position ``target`` of the output."""

    target: int
    source: ByteSource

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class Gather:
    """A tensor whose values are written in C order, little-endian, at ``target``."""

    target: int
    entry: TensorEntry

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.entry.nbytes


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that ckptkit makes: headers, pickles, padding."""

    target: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Checksum:
    """The CRC-32, as 4 little-endian bytes at ``target``, of the output's bytes from ``start``."""

    target: int
    start: int
    covers: int

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return 4


Step = Copy | Gather | Literal | Checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The output of one file.

    Attributes:
        format: container name.
        nbytes: exact size of the output.
        steps: in order of position; checksums last.
        tensors: number of tensors a reader of the output will see, those beside the weights too.
        aliases: names recorded as another name's tensor (safetensors).
    """

    format: str
    nbytes: int
    steps: tuple[Step, ...]
    tensors: int
    aliases: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The plan as it stands in JSON documents: bytes by the way they are moved."""
        moved = {kind: [s for s in self.steps if isinstance(s, kind)] for kind in (Copy, Gather, Literal)}
        return {
            "format": self.format,
            "nbytes": self.nbytes,
            "tensors": self.tensors,
            "copies": {"count": len(moved[Copy]), "nbytes": sum(s.nbytes for s in moved[Copy])},
            "gathers": {"count": len(moved[Gather]), "nbytes": sum(s.nbytes for s in moved[Gather])},
            "literals": {"count": len(moved[Literal]), "nbytes": sum(s.nbytes for s in moved[Literal])},
            "aliases": self.aliases,
        }
