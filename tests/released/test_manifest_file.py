"""Manifests that are damaged, hostile, or of another version are refused with a message that says where."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import CkptkitError, CorruptError, FormatError, LimitError, MissingFileError, UnsupportedError
from ckptkit.released.manifest_file import read_manifest

FIXTURES = Path(__file__).parents[2] / "fixtures"
DOCUMENT = json.loads((FIXTURES / "weights.lock.json").read_text("ascii"))
INDEX = 2
"""Of the sharded checkpoint among the files."""

Spoil = Callable[[dict[str, Any]], object]


@pytest.fixture
def read(tmp_path: Path) -> Callable[[object], object]:
    def write_and_read(document: object) -> object:
        path = tmp_path / "m.json"
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return read_manifest(path)

    return write_and_read


def test_what_is_sound_is_read(read) -> None:
    manifest = read(DOCUMENT)
    assert manifest.to_dict() == DOCUMENT
    assert (FIXTURES / "weights.lock.json").read_text("ascii") == manifest.to_json()
    more = copy.deepcopy(DOCUMENT)
    more["files"].reverse()
    more["files"][0]["later"] = {"a": 1}
    assert read(more).files == manifest.files  # another order, and keys of a later minor version


def file(key: str, value: object, number: int = 0) -> Spoil:
    return lambda document: document["files"][number].update({key: value})


def without(key: str) -> Spoil:
    return lambda document: document["files"][0].pop(key)


def tensor(key: str, value: object) -> Spoil:
    return lambda document: next(iter(document["files"][0]["tensors"].values())).update({key: value})


SPOILED: list[tuple[Spoil, str]] = [
    (lambda document: document.pop("files"), "is not a manifest"),
    (lambda document: document.pop("schema_version"), "is not a manifest"),
    (lambda document: document.update(files=[]), "at least one file"),
    (lambda document: document.update(files={}), "at least one file"),
    (lambda document: document["files"].append(None), r"files\[9\]: is None; expected an object"),
    (lambda document: document["files"].append(document["files"][0]), "appears twice"),
    *((without(key), f"'{key}' is missing") for key in ("path", "size", "sha256", "format", "kind", "trust")),
    *(
        (file("path", path), "does not leave it")
        for path in ("", "/etc/passwd", "../x.pth", "a/../../x", "C:\\x", "a//b")
    ),
    (file("path", 3), "'path' is 3; expected text"),
    *((file("size", size), "'size' is") for size in (-1, 1 << 70, 1.0, True, "1")),
    *((file("sha256", value), "'sha256' is") for value in ("", "A" * 64, "0" * 63, "0" * 64 + "\n", None)),
    (file("trust", "trusted"), "one of safe, needs_trust, hostile"),
    (file("content_digest", "0" * 64), "'content_digest' is"),
    (file("content_digest", "sha256:" + "0" * 64), "edited or merged by hand"),
    (file("content_digest", None), "edited or merged by hand"),
    (file("architecture", 3), "'architecture' is 3"),
    (file("golden", "x"), "'golden' is 'x'; expected an object"),
    (file("golden", {"path": "../x", "sha256": "0" * 64}), r"golden: 'path' is"),
    (file("golden", {"path": "x"}), r"golden: 'sha256' is missing"),
    (file("others", [1]), "'others' is"),
    (file("others", {}), "'others' is"),
    (file("tensors", []), "'tensors' is"),
    (file("tensors", {"w": 1}), r"tensors\['w'\]: is 1"),
    (file("shards", {"../x": {"size": 1, "sha256": "0" * 64}}, INDEX), "'shards' is '../x'"),
    (file("shards", {"x": {"size": 1}}, INDEX), r"shards\['x'\]: 'sha256' is missing"),
    (tensor("shape", [-1]), "'shape' is"),
    (tensor("shape", [1 << 70]), "'shape' is"),
    (tensor("shape", [1] * 65), "'shape' is"),
    (tensor("shape", [True]), "'shape' is"),
    (tensor("shape", "3"), "'shape' is"),
    (tensor("shape", [3]), "edited or merged by hand"),
    (tensor("dtype", None), "'dtype' is None"),
    (tensor("digest", "md5:0"), "'digest' is"),
    (lambda document: document["files"][0]["tensors"].popitem(), "edited or merged by hand"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_what_is_not_is_refused(spoil: Spoil, message: str, read) -> None:
    document = copy.deepcopy(DOCUMENT)
    spoil(document)
    with pytest.raises(CorruptError, match=message) as caught:
        read(document)
    assert str(caught.value).count("m.json") == 1


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.0, True])
def test_another_version(version: object, read) -> None:
    with pytest.raises(UnsupportedError, match="this ckptkit reads version 1"):
        read({**DOCUMENT, "schema_version": version})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "is not a manifest"),
        (b'{"schema_version": 1, "schema_version": 1, "files": []}', "appears twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": 1, "files": [{"path": "\\ud800"}]}', "not Unicode text"),
        (b'{"schema_version": NaN}', "NaN"),
    ],
)
def test_what_is_no_json(data: bytes, message: str, read) -> None:
    with pytest.raises(FormatError, match=message):
        read(data)


def test_one_cut_short_anywhere(read) -> None:
    data = (FIXTURES / "weights.lock.json").read_bytes()
    for end in range(0, len(data) - 2, 1013):
        with pytest.raises(CorruptError):
            read(data[:end])


def test_a_conflict_of_git(read) -> None:
    text = (FIXTURES / "weights.lock.json").read_text()
    with pytest.raises(CkptkitError, match="not valid JSON"):
        read(text.replace('      "size"', '<<<<<<< HEAD\n      "size"', 1).encode())


def test_one_too_large_or_not_there(tmp_path: Path) -> None:
    with open(tmp_path / "m.json", "wb") as out:
        out.truncate(65 << 20)
    with pytest.raises(LimitError, match="bytes of a manifest"):
        read_manifest(tmp_path / "m.json")
    with pytest.raises(MissingFileError):
        read_manifest(tmp_path / "none.json")
