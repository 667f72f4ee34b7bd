"""Receipts: what an output says of its making is true, and the same wherever and whenever it is made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit import conversion
from ckptkit.extras import __version__
from ckptkit.normalize.selection import KEY

Save = Callable[..., Path]

STATE = {"module.a": torch.arange(300.0), "module.b": torch.ones(200, 2), "module.c": torch.zeros(3)}
OUTPUTS = [("out.pth", None), ("out.safetensors", None), ("out.pth", 1000), ("out.safetensors", 1000)]
outputs = pytest.mark.parametrize(("name", "size"), OUTPUTS)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def convert(source: Path, target: Path, **options: Any) -> Path:
    return Path(ckptkit.convert(source, target, **options).details["destination"])


def metadata(path: Path) -> dict[str, str]:
    """The metadata: of safetensors as the library reads it, of an index as it stands there."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata()
    with ckptkit.open(path) as file:
        return dict(file.metadata)


def receipts(path: Path) -> list[Any]:
    return json.loads(metadata(path)[KEY])


def files(written: Path) -> list[Path]:
    """What belongs to an output: the file, or the index and its shards."""
    if written.suffix != ".json":
        return [written]
    names = set(json.loads(written.read_text(encoding="utf-8"))["weight_map"].values())
    return [written, *(written.with_name(name) for name in sorted(names))]


@pytest.fixture
def tokens() -> Iterator[list[str]]:
    """The stand-ins that were made up, as far as they are alike."""
    made: list[str] = []

    class Recorded(conversion.Tokens):
        def __init__(self) -> None:
            super().__init__()
            made.append(self.prefix)

    with mock.patch("ckptkit.conversion.Tokens", Recorded):
        yield made


@outputs
def test_a_receipt_holds_the_digest_of_the_source(
    save: Save, tmp_path: Path, tokens: list[str], name: str, size: int | None
) -> None:
    source = save(STATE)
    written = convert(source, tmp_path / name, strip_module=True, max_shard_size=size)
    assert len(files(written)) == (1 if size is None else 4)
    (prefix,) = tokens
    assert re.fullmatch("[0-9a-f]{32}", prefix)
    for path in files(written):
        assert prefix.encode() not in path.read_bytes()
        assert receipts(path) == [
            {
                "ckptkit": __version__,
                "format": "torch-zip",
                "sha256": sha256(source),
                "operations": ["StripModule()"],
            }
        ]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@outputs
def test_of_a_sharded_source_each_file_has_its_digest(
    save: Save, tmp_path: Path, tokens: list[str], ending: str, name: str, size: int | None
) -> None:
    source = convert(save(STATE), tmp_path / f"source{ending}", max_shard_size=1000, receipt=False)
    target = tmp_path / "elsewhere"
    target.mkdir()
    written = convert(source, target / name, max_shard_size=size)
    assert len(files(source)) == 4
    for path in files(written):
        (made,) = receipts(path)
        assert made["sha256"] == {part.name: sha256(part) for part in sorted(files(source))}
        assert made["format"] == ("safetensors-sharded" if ending == ".safetensors" else "torch-sharded")
        assert not any(prefix.encode() in path.read_bytes() for prefix in tokens)


def test_shards_below_the_index_are_named_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "parts/1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "parts/1.safetensors", "b": "2.safetensors"}}))
    (made,) = receipts(convert(index, tmp_path / "out.pth"))
    assert made["sha256"] == {
        "2.safetensors": sha256(tmp_path / "2.safetensors"),
        "model.safetensors.index.json": sha256(index),
        "parts/1.safetensors": sha256(tmp_path / "parts/1.safetensors"),
    }


def test_receipts_chain(save: Save, tmp_path: Path) -> None:
    source = save(STATE)
    first = convert(source, tmp_path / "1.safetensors", strip_module=True)
    second = convert(first, tmp_path / "2.pth", add_prefix="net", dtype="float16")
    third = convert(second, tmp_path / "3.safetensors", max_shard_size=600)
    fourth = convert(third, tmp_path / "4.pth", map_location="cuda:1")
    made = receipts(fourth)
    assert [one["operations"] for one in made] == [
        ["StripModule()"],
        ["CastDtype(dtype='float16', keep=())", "AddPrefix(prefix='net')"],
        [],
        ["MapLocation(location='cuda:1')"],
    ]
    assert [one["format"] for one in made] == ["torch-zip", "safetensors", "torch-zip", "safetensors-sharded"]
    assert [one["sha256"] for one in made[:3]] == [sha256(source), sha256(first), sha256(second)]
    assert made[3]["sha256"] == {part.name: sha256(part) for part in sorted(files(third))}
    # Each is what the file it was read from had, and one more.
    for number, path in enumerate((first, second, third, fourth), 1):
        assert receipts(path) == made[:number]


def test_without_a_check_there_is_no_digest(save: Save, tmp_path: Path, tokens: list[str]) -> None:
    written = convert(save(STATE), tmp_path / "out.safetensors", check=False)
    assert receipts(written) == [{"ckptkit": __version__, "format": "torch-zip", "operations": []}]
    assert tokens[0].encode() not in written.read_bytes()


@outputs
def test_without_a_receipt_metadata_stay(tmp_path: Path, name: str, size: int | None) -> None:
    given = {"format": "pt", "license": "MIT", KEY: '["kept as it is"]', "é": "ü"}
    source = tmp_path / "source.safetensors"
    save_file(STATE, source, metadata=given)
    written = convert(source, tmp_path / name, max_shard_size=size, receipt=False)
    for path in files(written):
        kept = {key: value for key, value in metadata(path).items() if key not in ("total_size", "format")}
        assert kept == {key: value for key, value in given.items() if key != "format"}


@outputs
def test_nothing_depends_on_place_name_or_time(save: Save, tmp_path: Path, name: str, size: int | None) -> None:
    one = save(STATE, "one.pth", device="cuda:0")
    (tmp_path / "another folder").mkdir()
    other = Path(shutil.copy(one, tmp_path / "another folder" / "other.ckpt"))
    os.utime(other, (0, 0))
    made = []
    for number, source in enumerate((one, other)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with mock.patch("time.time", lambda then=number: 1e9 * then):
            written = convert(source, folder / name, strip_module=True, map_location="cpu", max_shard_size=size)
        made.append({path.name: path.read_bytes() for path in files(written)})
    assert made[0] == made[1]


def test_a_rewriter_of_ones_own_has_no_address_in_the_receipt(save: Save, tmp_path: Path) -> None:
    class Own:
        def __call__(self, checkpoint: ckptkit.Checkpoint) -> ckptkit.Checkpoint:
            return checkpoint

    def same(checkpoint: ckptkit.Checkpoint) -> ckptkit.Checkpoint:
        return checkpoint

    source = save(STATE)
    for number in range(2):
        with ckptkit.open(source) as file:
            file.rewrite(Own(), same, ckptkit.MapLocation(lambda storage, tag: "cpu")).save(tmp_path / f"{number}.pth")
    assert (tmp_path / "0.pth").read_bytes() == (tmp_path / "1.pth").read_bytes()
    assert " at 0x" not in metadata(tmp_path / "0.pth")[KEY]
    assert len(receipts(tmp_path / "0.pth")[0]["operations"]) == 3


def test_saving_leaves_the_metadata_in_memory_alone(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    save_file(STATE, source, metadata={"license": "MIT"})
    with ckptkit.open(source) as file:
        held, before = file.metadata, dict(file.metadata)
        file.save(tmp_path / "out.pth")
        once = (tmp_path / "out.pth").read_bytes()
        file.save(tmp_path / "out.pth", force=True)
        assert file.metadata is held
        assert dict(held) == before == {"license": "MIT"}
        assert (tmp_path / "out.pth").read_bytes() == once


DEEP = "[" * 5000 + "]" * 5000
HOSTILE = {
    "no JSON": ("{", 0),
    "nothing": ("", 0),
    "null": ("null", 0),
    "an object": ('{"ckptkit": "0.0"}', 0),
    "text": ('"[]"', 0),
    "a number of many digits": ("9" * 10_000, 0),
    "numbers in it": ("[1e999, NaN, -0.0, 12345678901234567890123]", 4),
    "too deep": (DEEP, None),
    "deep": ("[" * 300 + "]" * 300, 1),
    "half a character": ('["\\ud800"]', 1),
    "a zero byte": ('["\\u0000"]', 1),
    "what looks like a digest": (json.dumps([{"sha256": "0" * 64, "again": "0123456789abcdef" * 4}]), 1),
    "very many": (json.dumps([{"ckptkit": "0.0.1", "sha256": "f" * 64}] * 20_000), 20_000),
}


@pytest.mark.parametrize(
    ("name", "size", "text", "count"),
    [
        pytest.param(*output, *HOSTILE[what], id=f"{what}-{output}", marks=[pytest.mark.thorough] if again else [])
        for what in HOSTILE
        for output in OUTPUTS
        for again in [what == "very many" and output[1] is not None]
    ],
)
def test_what_a_stranger_wrote_there(
    tmp_path: Path, tokens: list[str], name: str, size: int | None, text: str, count: int | None
) -> None:
    source = tmp_path / "source.safetensors"
    save_file(STATE, source, metadata={KEY: text, "note": text})
    for path in files(convert(source, tmp_path / name, max_shard_size=size)):
        *earlier, made = receipts(path)
        assert made == {"ckptkit": __version__, "format": "safetensors", "sha256": sha256(source), "operations": []}
        if count is not None:
            assert len(earlier) == count
            assert repr(earlier) == repr(json.loads(text) if count else [])
        assert metadata(path)["note"] == text
        assert tokens[0].encode() not in path.read_bytes()
