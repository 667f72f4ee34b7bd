"""What a manifest says: one record a file.  What its text is, `ckptkit.released.manifests` says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptkit.report import SCHEMA_VERSION, count_of

__all__ = [
    "Changes",
    "Digests",
    "FileRecord",
    "GoldenRecord",
    "Manifest",
    "ShardRecord",
    "TensorRecord",
    "paths_of",
]

Digests = Literal["total", "tensor"]
"""Whether a manifest lists each tensor, or folds them into the content digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """What one tensor must be."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What one file of a sharded checkpoint must be: bytes, and SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRecord:
    """A file of outputs that belong to a checkpoint (``ckptkit verify --write-golden``), and its SHA-256."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What one checkpoint must be; the fields are those of the manifest.

    Attributes:
        whole_digest: of everything in the file (`ckptkit.digests`); ``None``: it has none, or was recorded before
            there was one.
        tensors: by name; ``None``: folded into the content digest.
        architecture: the known model it is, with arguments that are not the library's own:
            ``"torchvision:resnet18(num_classes=10)"``; ``None``: it is none.
    """

    path: str
    size: int
    sha256: str
    format: str
    kind: str
    trust: str
    content_digest: str | None
    tensors: Mapping[str, TensorRecord] | None
    architecture: str | None = None
    golden: GoldenRecord | None = None
    shards: Mapping[str, ShardRecord] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    whole_digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as it stands in the manifest."""
        document: dict[str, Any] = {
            "path": self.path,
            "size": self.size,
            "sha256": self.sha256,
            "format": self.format,
            "kind": self.kind,
            "trust": self.trust,
            "content_digest": self.content_digest,
            **({} if self.whole_digest is None else {"whole_digest": self.whole_digest}),
            "architecture": self.architecture,
            "golden": None if self.golden is None else {"path": self.golden.path, "sha256": self.golden.sha256},
        }
        if self.shards:
            document["shards"] = {
                name: {"size": shard.size, "sha256": shard.sha256} for name, shard in self.shards.items()
            }
        if self.others:
            document["others"] = list(self.others)
        document["tensors"] = None
        if self.tensors is not None:
            document["tensors"] = {
                name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "digest": tensor.digest}
                for name, tensor in self.tensors.items()
            }
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The paths of a manifest by what became of them when it was made or updated."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What released files must be.

    Attributes:
        files: sorted by path.
        folder: the folder that paths are relative to.
        folders: those it was made of, relative to it: in them no other checkpoint may lie; ``"."`` is itself.
        changes: what `make` did; of a manifest that was read, nothing.
        passed_over: how many files of each kind its folders hold that are not checkpoints; it is not written.
    """

    files: tuple[FileRecord, ...]
    folder: str
    folders: tuple[str, ...] = ()
    changes: Changes = Changes()
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"<Manifest of {count_of(len(self.files), 'file')} in {self.folder!r:.80}>"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as one JSON-ready document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "folders": list(self.folders),
            "files": [file.to_dict() for file in self.files],
        }

    def to_json(self) -> str:
        """The manifest's text: one line for each field of a file, and for each tensor and shard."""
        return "".join(self._text())

    def _text(self) -> Iterator[str]:
        yield f'{{\n  "schema_version": {SCHEMA_VERSION},\n  "folders": {json.dumps(self.folders)},\n  "files": ['
        for number, file in enumerate(self.files):
            yield ",\n    {" if number else "\n    {"
            for index, (name, value) in enumerate(file.to_dict().items()):
                yield f'{"," * (index > 0)}\n      "{name}": '
                yield from _lines(value) if name in ("tensors", "shards") and value else [json.dumps(value)]
            yield "\n    }"
        yield "\n  ]\n}\n" if self.files else "]\n}\n"


def _lines(value: Mapping[str, object]) -> Iterator[str]:
    """A mapping with each of its entries on a line of its own."""
    for index, (name, inner) in enumerate(value.items()):
        yield f"{',' if index else '{'}\n        {json.dumps(name)}: {json.dumps(inner)}"
    yield "\n      }"


def paths_of(records: Iterable[FileRecord]) -> set[str]:
    """Every file that records name: checkpoints, shards and golden files."""
    paths: set[str] = set()
    for record in records:
        folder = record.path.rpartition("/")[0]
        paths.add(record.path)
        paths.update(f"{folder}/{shard}" if folder else shard for shard in record.shards)
        if record.golden is not None:
            paths.add(record.golden.path)
    return paths
