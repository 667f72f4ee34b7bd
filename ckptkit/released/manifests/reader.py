"""Reads manifests; what one is, `ckptkit.released.manifests` says.

A manifest may come from a stranger: everything in it has the type it must have, paths do not lead out of its folder,
and where it lists tensors, they are those of its content digest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, get_args

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Trust
from ckptkit.digests import Line, content_digest
from ckptkit.errors import CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.shards.names import is_shard_name
from ckptkit.formats.strict_json import parse
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.released.manifests.records import FileRecord, GoldenRecord, Manifest, ShardRecord, TensorRecord
from ckptkit.report import SCHEMA_VERSION

__all__ = ["read_manifest"]

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
    file = SourceFile(path)
    try:
        if file.size > DEFAULT_LIMITS.index_nbytes:
            raise LimitError("bytes of a manifest", limit=DEFAULT_LIMITS.index_nbytes, actual=file.size)
        document = parse(file.read(0, file.size), DEFAULT_LIMITS, "the manifest")
        records = list(_records(document))
        folders = _folders(document)
    except FormatError as error:
        raise error.at(path=file.path) from error.__cause__
    finally:
        file.close()
    folder = os.path.dirname(os.path.abspath(file.path))
    files = tuple(sorted(records, key=lambda record: record.path))
    return Manifest(files=files, folder=folder, folders=folders)


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
        raise CorruptError("'files' must be a list of at least one file: nothing to check is never well")
    seen: set[str] = set()
    for number, value in enumerate(files):
        record = _record(_Fields(value, f"files[{number}]"))
        if record.path in seen:
            raise CorruptError(f"the path {record.path!r:.80} stands twice", where=f"files[{number}]")
        seen.add(record.path)
        yield record


def _folders(document: object) -> tuple[str, ...]:
    given = _Fields(document, "the manifest").optional("folders", list)
    if given is None:
        return (".",)
    return tuple(name if name == "." else _Fields({"folders": name}, "folders").path("folders") for name in given)


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
    record = FileRecord(
        path=fields.path("path"),
        size=fields.size("size"),
        sha256=fields.match("sha256", _HEX, "64 hexadecimal digits"),
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
        Line(name=name, kind=tensor.dtype, shape=tensor.shape, digest=tensor.digest)
        for name, tensor in record.tensors.items()
    )
    found = content_digest(lines)
    if found != record.content_digest:
        raise CorruptError(
            f"its tensors have the content digest {found}, not {record.content_digest} as recorded: edited or merged "
            "by hand; write it again: ckptkit manifest --update",
            where=fields.place,
        )


def _golden(fields: _Fields) -> GoldenRecord:
    return GoldenRecord(path=fields.path("path"), sha256=fields.match("sha256", _HEX, "64 hexadecimal digits"))


def _shard_name(fields: _Fields, name: str) -> str:
    if not is_shard_name(name):
        raise fields.wrong("shards", name, "names of files in the index's folder or below it")
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
