"""Manifests: what released files must be, as a JSON file beside them.

Version 1, one JSON object of ASCII (RFC 8259), files sorted by path, one line a tensor::

    {"schema_version": 1,
     "origin": str,
     "folders": [str],
     "files": [{"path": str, "size": int, "sha256": hex | null, "format": str, "kind": str,
                "trust": str, "content_digest": "sha256:…" | null, "whole_digest": "sha256:…",
                "architecture": str | null, "golden": {"path": str, "sha256": hex} | null,
                "shards": {name: {"size": int, "sha256": hex}},
                "others": [name],
                "tensors": {name: {"dtype": str, "shape": [int], "digest": "sha256:…"}} | null}]}

Paths are relative to the manifest's folder, with ``/``, and never lead out of it; if it was made of files at URLs, they
are relative to the ``origin``, a URL, which other manifests do not have.  ``folders`` are those the manifest was made
from (``"."`` is its own, which is also the default): everything in them is released, so a checkpoint there that is not
among ``files`` is one too many.  ``size`` is in bytes, of a sharded checkpoint with its shards; ``sha256`` is of the
file itself, and of an index the index alone; a folder that is one checkpoint has none, and its files are its
``shards``.  Digests, and the names of tensors, are those of `ckptkit.digests`.  ``tensors`` is ``null`` if they are
combined in the content digest.  ``whole_digest``, ``shards`` (named relative to the index, or to the folder) and
``others`` (values that are not plain tensors) are left out if there are none.  A reader ignores keys it does not know,
and refuses another version.

`FileRecord` is one of ``files``; `ckptkit.released.manifest_maker` makes and updates manifests.

A manifest may come from a stranger: everything in it must have its proper type, paths must not lead out of its folder,
and a list of tensors must match its content digest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ckptkit import places
from ckptkit.checkpoint import Trust
from ckptkit.digests import DigestLine, content_digest
from ckptkit.errors import CorruptError, FileAccessError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.json_text import parse
from ckptkit.formats.shards import is_shard_name
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.nearness import with_meant_file
from ckptkit.report import SCHEMA_VERSION, count_of
from ckptkit.startup import dataclass

if TYPE_CHECKING:
    from ckptkit.documents import ManifestFile, ManifestOptions, ManifestOrigin, ManifestTensor, WrittenManifest

__all__ = [
    "Changes",
    "Digests",
    "FileRecord",
    "GoldenRecord",
    "Manifest",
    "ShardRecord",
    "TensorRecord",
    "manifest_text",
    "read_manifest",
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
        sha256: of the file; ``None``: it is a folder, whose files are its ``shards``.
        whole_digest: of everything in the file (`ckptkit.digests`); ``None``: it has none, or was recorded before
            there was one.
        tensors: by name; ``None``: folded into the content digest.
        architecture: the known model it is, with arguments that are not the library's own:
            ``"torchvision:resnet18(num_classes=10)"``; ``None``: it is not one.
    """

    path: str
    size: int
    sha256: str | None
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

    @property
    def parts(self) -> set[str]:
        """The paths of its shards."""
        folder = self.path if self.sha256 is None else self.path.rpartition("/")[0]
        return {f"{folder}/{shard}" if folder else shard for shard in self.shards}

    def to_dict(self) -> ManifestFile:
        """The record for the manifest."""
        whole: ManifestOptions = {} if self.whole_digest is None else {"whole_digest": self.whole_digest}
        further: ManifestOptions = {}
        if self.shards:
            further["shards"] = {
                name: {"size": shard.size, "sha256": shard.sha256} for name, shard in self.shards.items()
            }
        if self.others:
            further["others"] = list(self.others)
        tensors: dict[str, ManifestTensor] | None = None
        if self.tensors is not None:
            tensors = {
                name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "digest": tensor.digest}
                for name, tensor in self.tensors.items()
            }
        return {
            "path": self.path,
            "size": self.size,
            "sha256": self.sha256,
            "format": self.format,
            "kind": self.kind,
            "trust": self.trust,
            "content_digest": self.content_digest,
            **whole,
            "architecture": self.architecture,
            "golden": None if self.golden is None else {"path": self.golden.path, "sha256": self.golden.sha256},
            **further,
            "tensors": tensors,
        }


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
        origin: the URL of the folder that it was made from; ``None``: it was made from local files.
        beside: the folder of the manifest itself, which golden files are relative to; ``None``: ``folder``.
        folders: the folders it was made from, relative to ``folder``; they may contain no other checkpoint. ``"."`` is
            ``folder`` itself.
        changes: what `make` did; empty for a manifest that was read.
        passed_over: how many files in its folders are not checkpoints, by kind; it is not written.
    """

    files: tuple[FileRecord, ...]
    folder: str
    folders: tuple[str, ...] = ()
    changes: Changes = Changes()
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False)
    origin: str | None = None
    beside: str | None = field(default=None, compare=False)

    @property
    def paths(self) -> set[str]:
        """Every file that it names: checkpoints, shards and golden files."""
        goldens = {record.golden.path for record in self.files if record.golden is not None}
        return goldens.union(*({record.path} | record.parts for record in self.files))

    def __repr__(self) -> str:
        return f"<Manifest of {count_of(len(self.files), 'file')} in {self.folder!r:.80}>"

    def to_dict(self) -> WrittenManifest:
        """The manifest as one JSON-ready document."""
        origin: ManifestOrigin = {} if self.origin is None else {"origin": self.origin}
        return {
            "schema_version": SCHEMA_VERSION,
            **origin,
            "folders": list(self.folders),
            "files": [file.to_dict() for file in self.files],
        }

    def to_json(self) -> str:
        """The manifest's text."""
        return "".join(manifest_text(self.to_dict()))


def manifest_text(document: WrittenManifest) -> Iterator[str]:
    """The text of a manifest, a piece at a time: one line for each field of a file, and for each tensor and shard."""
    origin = f'  "origin": {json.dumps(document["origin"])},\n' if "origin" in document else ""
    yield f'{{\n  "schema_version": {SCHEMA_VERSION},\n{origin}  "folders": {json.dumps(document["folders"])},\n'
    yield '  "files": ['
    for number, file in enumerate(document["files"]):
        yield ",\n    {" if number else "\n    {"
        for index, (name, value) in enumerate(file.items()):
            yield f'{"," * (index > 0)}\n      "{name}": '
            yield from _lines(value) if isinstance(value, dict) and value and name != "golden" else [json.dumps(value)]
        yield "\n    }"
    yield "\n  ]\n}\n" if document["files"] else "]\n}\n"


def _lines(value: Mapping[str, object]) -> Iterator[str]:
    """A mapping with one entry per line."""
    for index, (name, inner) in enumerate(value.items()):
        yield f"{',' if index else '{'}\n        {json.dumps(name)}: {json.dumps(inner)}"
    yield "\n      }"


_HEX = re.compile(r"[0-9a-f]{64}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MOST_NBYTES = 1 << 62


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """A manifest, with everything in it checked.

    Raises:
        MissingFileError, FileAccessError: it cannot be opened.
        CorruptError: it is not a manifest, damaged, or names no files.
        UnsupportedError: it is of another version.
        LimitError: it is larger than manifests are.
    """
    try:
        file = places.opened(os.fsdecode(path))
    except FileAccessError as error:
        raise with_meant_file(error) from error.__cause__
    try:
        if file.size > DEFAULT_LIMITS.index_nbytes:
            raise LimitError("bytes of a manifest", limit=DEFAULT_LIMITS.index_nbytes, actual=file.size)
        document = parse(file.read(0, file.size), DEFAULT_LIMITS, "the manifest")
        records = list(_records(document))
        folders = _folders(document)
        origin = _origin(document)
    except FormatError as error:
        raise error.at(path=file.path) from error.__cause__
    finally:
        file.close()
    folder = places.split(os.fsdecode(path))[0]
    folder = folder if places.is_url(folder) else os.path.abspath(folder)
    files = tuple(sorted(records, key=lambda record: record.path))
    return Manifest(files=files, folder=folder, folders=folders, origin=origin)


def _records(document: object) -> Iterator[FileRecord]:
    if not isinstance(document, dict) or "files" not in document or "schema_version" not in document:
        raise CorruptError(
            "is not a manifest: expected a JSON object with 'schema_version' and 'files', as ckptkit manifest writes it"
        )
    version = document["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UnsupportedError(
            f"is a manifest of version {version!r:.40}; this ckptkit reads version {SCHEMA_VERSION}: "
            "use the ckptkit that wrote it, or write it again"
        )
    files = document["files"]
    if not isinstance(files, list) or not files:
        raise CorruptError("'files' must list at least one file: checking nothing is never a success")
    seen: set[str] = set()
    for number, value in enumerate(files):
        record = _record(_Fields(value, f"files[{number}]"))
        if record.path in seen:
            raise CorruptError(f"the path {record.path!r:.80} appears twice", where=f"files[{number}]")
        seen.add(record.path)
        yield record


def _folders(document: object) -> tuple[str, ...]:
    given = _Fields(document, "the manifest").optional("folders", list)
    if given is None:
        return (".",)
    return tuple(name if name == "." else _Fields({"folders": name}, "folders").path("folders") for name in given)


def _origin(document: object) -> str | None:
    fields = _Fields(document, "the manifest")
    origin: str | None = fields.optional("origin", str)
    if origin is not None and not places.is_url(origin):
        raise fields.wrong("origin", origin, "a URL")
    return origin


def _record(fields: _Fields) -> FileRecord:
    golden = fields.optional("golden", dict)
    tensors = fields.optional("tensors", dict)
    shards = fields.optional("shards", dict) or {}
    others = fields.optional("others", list) or []
    trust = fields.get("trust", str)
    if trust not in get_args(Trust):
        raise fields.wrong("trust", trust, "one of " + ", ".join(get_args(Trust)))
    if not all(isinstance(name, str) for name in others):
        raise fields.wrong("others", others, "names")
    is_folder = bool(shards) and fields.optional("sha256", str) is None
    record = FileRecord(
        path=fields.path("path"),
        size=fields.size("size"),
        sha256=None if is_folder else fields.match("sha256", _HEX, "64 hexadecimal digits"),
        format=fields.get("format", str),
        kind=fields.get("kind", str),
        trust=trust,
        content_digest=fields.digest("content_digest"),
        whole_digest=fields.digest("whole_digest"),
        architecture=fields.optional("architecture", str),
        golden=None if golden is None else _golden(fields.inner("golden", golden)),
        shards={
            _shard_name(fields, name): _shard(fields.inner(f"shards[{name!r:.80}]", each))
            for name, each in shards.items()
        },
        others=tuple(others),
        tensors=None
        if tensors is None
        else {name: _tensor(fields.inner(f"tensors[{name!r:.80}]", each)) for name, each in tensors.items()},
    )
    _require_consistent(record, fields)
    return record


def _require_consistent(record: FileRecord, fields: _Fields) -> None:
    """Refuse tensors that are not those of the content digest: a manifest that was edited or merged by hand."""
    if record.tensors is None or record.others:
        return
    lines = (
        DigestLine(name=name, kind=tensor.dtype, shape=tensor.shape, digest=tensor.digest)
        for name, tensor in record.tensors.items()
    )
    found = content_digest(lines)
    if found != record.content_digest:
        raise CorruptError(
            f"its tensors have the content digest {found}, not {record.content_digest} as recorded: it was edited or "
            "merged by hand; write it again: ckptkit manifest --update",
            where=fields.place,
        )


def _golden(fields: _Fields) -> GoldenRecord:
    return GoldenRecord(path=fields.path("path"), sha256=fields.match("sha256", _HEX, "64 hexadecimal digits"))


def _shard_name(fields: _Fields, name: str) -> str:
    if not is_shard_name(name):
        raise fields.wrong("shards", name, "names of files in or below the folder, or that of the index")
    return name


def _shard(fields: _Fields) -> ShardRecord:
    return ShardRecord(size=fields.size("size"), sha256=fields.match("sha256", _HEX, "64 hexadecimal digits"))


def _tensor(fields: _Fields) -> TensorRecord:
    shape = fields.get("shape", list)
    if len(shape) > DEFAULT_LIMITS.dimensions or not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        raise fields.wrong("shape", shape, "a list of sizes")
    return TensorRecord(
        dtype=fields.get("dtype", str),
        shape=tuple(shape),
        digest=fields.match("digest", _DIGEST, "'sha256:' and 64 hexadecimal digits"),
    )


class _Fields:
    """The fields of a JSON object, each of the type it must have."""

    def __init__(self, value: object, place: str) -> None:
        self.place = place
        if not isinstance(value, dict):
            raise CorruptError(f"is {value!r:.60}; expected an object", where=place)
        self._value: dict[str, object] = value

    def wrong(self, name: str, value: object, expected: str) -> CorruptError:
        return CorruptError(f"{name!r} is {value!r:.60}; expected {expected}", where=self.place)

    def get(self, name: str, kind: type) -> Any:
        if name not in self._value:
            raise CorruptError(f"{name!r} is missing", where=self.place)
        value = self._value[name]
        if type(value) is not kind:
            raise self.wrong(name, value, {"str": "text", "int": "a whole number", "list": "a list"}[kind.__name__])
        return value

    def optional(self, name: str, kind: type) -> Any:
        value = self._value.get(name)
        if value is not None and type(value) is not kind:
            raise self.wrong(name, value, {"str": "text", "dict": "an object", "list": "a list"}[kind.__name__])
        return value

    def inner(self, name: str, value: object) -> _Fields:
        return _Fields(value, f"{self.place}.{name}")

    def match(self, name: str, pattern: re.Pattern[str], expected: str) -> str:
        value: str = self.get(name, str)
        if pattern.match(value) is None:
            raise self.wrong(name, value, expected)
        return value

    def digest(self, name: str) -> str | None:
        if self.optional(name, str) is None:
            return None
        return self.match(name, _DIGEST, "'sha256:' and 64 hexadecimal digits")

    def size(self, name: str) -> int:
        value: int = self.get(name, int)
        if not 0 <= value < _MOST_NBYTES:
            raise self.wrong(name, value, "a number of bytes")
        return value

    def path(self, name: str) -> str:
        value: str = self.get(name, str)
        if not is_shard_name(value):
            raise self.wrong(name, value, "a path relative to the manifest's folder that does not leave it")
        return value
