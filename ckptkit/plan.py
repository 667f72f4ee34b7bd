"""What a writer will do, before anything is done.

A format's writer turns a `Checkpoint` into a `Plan`: the exact size of the output and the steps that fill it, each at a
known position.  `--dry-run` shows the plan, `ckptkit.transfer` executes exactly that plan.  Steps do not overlap,
except that a `Digest` and a `Checksum` fill in fields of a `LiteralBytes`.  The plan of a sharded checkpoint is that of
its index, which contains the shards' plans.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.bytesource import Source
from ckptkit.checkpoint import TensorEntry
from ckptkit.computed import ByteSource, ConvertedRange, DenseRange, is_made
from ckptkit.report import count_of
from ckptkit.startup import dataclass

if TYPE_CHECKING:
    from ckptkit.documents import PlanDocument, StepsDocument

__all__ = ["Cast", "Checksum", "Copy", "Digest", "Gather", "IndexFile", "LiteralBytes", "Plan", "Step", "moved"]


class Copy(NamedTuple):
    """Bytes that are copied unchanged from ``source`` to position ``target`` of the output."""

    target: int
    source: ByteSource

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.source.nbytes


class Cast(NamedTuple):
    """Values that are converted to another dtype, or computed from others, on their way to position ``target``."""

    target: int
    source: ConvertedRange | DenseRange

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.source.nbytes


class Gather(NamedTuple):
    """A tensor whose values are written in C order, little-endian, at ``target``."""

    target: int
    entry: TensorEntry

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.entry.nbytes


class LiteralBytes(NamedTuple):
    """Bytes that ckptkit makes: headers, pickles, padding."""

    target: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return len(self.data)


class Digest(NamedTuple):
    """The SHA-256 of a whole source file, as 64 hexadecimal digits at ``target``, inside a `LiteralBytes`."""

    target: int
    file: Source

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return 64


class Checksum(NamedTuple):
    """The CRC-32, as 4 little-endian bytes at ``target``, of the output's bytes from ``start``."""

    target: int
    start: int
    covers: int

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return 4


Step = Copy | Cast | Gather | LiteralBytes | Digest | Checksum


def moved(target: int, source: ByteSource) -> list[Copy | Cast]:
    """The steps that bring these bytes to position ``target``: one, or several copies for bytes in pieces."""
    if not is_made(source):
        return [Copy(target, source)]
    copies = source.whole.copies(source.offset, source.nbytes) if isinstance(source, DenseRange) else None
    return [Cast(target, source)] if copies is None else [Copy(target + at, run) for at, run in copies]


def _is_gathered(step: Step) -> bool:
    """Whether a step only puts values in another order, as for a tensor in pieces."""
    return isinstance(step, Cast) and isinstance(step.source, DenseRange) and step.source.whole.is_gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFile:
    """The content of an index of shards; see `ckptkit.formats.sharded`.

    Attributes:
        weight_map: each tensor's name and the name of the shard that contains it.
        metadata: JSON values, by name.
    """

    weight_map: Mapping[str, str]
    metadata: Mapping[str, object]

    def to_bytes(self, names: Mapping[str, str] | None = None) -> bytes:
        """The index as written; ``names`` gives shards other names than their own."""
        shards = self.weight_map if names is None else {key: names[shard] for key, shard in self.weight_map.items()}
        document = {"metadata": dict(self.metadata), "weight_map": dict(shards)}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The output of one file, and of the shards it names.

    Attributes:
        format: container name.
        nbytes: exact size of the file in bytes.
        steps: in order of position; digests, then checksums, last.
        tensors: number of tensors that a reader of the output will see, including those beside the weights.
        aliases: names recorded as another name's tensor (safetensors).
        shards: the files that are written beside this one, by their names.
        index: for a sharded checkpoint, the content of this file; its only step writes exactly that.
        in_folder: the name of this file in a separate folder with the shards, where that folder is the destination;
            ``None``: the file is the destination.
    """

    format: str
    nbytes: int
    steps: tuple[Step, ...]
    tensors: int
    aliases: Mapping[str, str]
    shards: Mapping[str, Plan] = field(default_factory=dict)
    index: IndexFile | None = None
    in_folder: str | None = None

    def __repr__(self) -> str:
        shards = f" in {count_of(len(self.shards), 'shard')}" if self.shards else ""
        return f"<Plan of {self.format}: {count_of(self.tensors, 'tensor')}, {self.total_nbytes:,} bytes{shards}>"

    @property
    def total_nbytes(self) -> int:
        """Size in bytes of the file and its shards."""
        return self.nbytes + sum(shard.nbytes for shard in self.shards.values())

    def all_steps(self) -> Iterator[Step]:
        """The steps of the shards and of this file."""
        for shard in self.shards.values():
            yield from shard.steps
        yield from self.steps

    def to_dict(self) -> PlanDocument:
        """The plan for JSON documents: bytes by the way they are moved."""
        ways: dict[type[Step], list[int]] = {}
        for step in self.all_steps():
            ways.setdefault(Gather if _is_gathered(step) else type(step), []).append(step.nbytes)

        def made(kind: type[Step]) -> StepsDocument:
            sizes = ways.get(kind, ())
            return {"count": len(sizes), "nbytes": sum(sizes)}

        return {
            "format": self.format,
            "nbytes": self.total_nbytes,
            "tensors": self.tensors,
            "copies": made(Copy),
            "casts": made(Cast),
            "gathers": made(Gather),
            "literals": made(LiteralBytes),
            "aliases": dict(self.aliases),
            "shards": [
                {"name": name, "nbytes": shard.nbytes, "tensors": shard.tensors} for name, shard in self.shards.items()
            ],
        }
