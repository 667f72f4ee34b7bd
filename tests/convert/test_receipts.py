"""``--metadata`` and receipts: what an output says about itself, in every container."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ckptkit

KEY = "ckptkit_receipts"
OUTPUTS = ["out.pth", "out.safetensors", "sharded.safetensors", "sharded.bin"]


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def metadata(path: str) -> dict[str, Any]:
    """As it stands in the file, read without ckptkit."""
    if path.endswith(".index.json"):
        found: dict[str, Any] = json.loads(Path(path).read_text())["metadata"]
        return found
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            return dict(file.metadata())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums too
        if "archive/ckptkit/metadata.json" not in archive.namelist():
            return {}
        return json.loads(archive.read("archive/ckptkit/metadata.json"))  # type: ignore[no-any-return]


@pytest.fixture
def made(convert) -> Any:
    """``made(SRC, name, ...)``: the receipts of an output, of which there may be shards."""

    def make(source: object, name: str, *options: object) -> list[dict[str, Any]]:
        sharding = ["--max-shard-size", "4000"] if name.startswith("sharded") else []
        done = convert(source, name, *sharding, *options)
        assert done.code == 0, done.err
        files = [name]
        if sharding:
            index = f"{name}.index.json"
            files = [index, *json.loads(Path(index).read_text())["weight_map"].values()]
            assert len(set(files)) > 2
        texts = {file: metadata(file).get(KEY) for file in files}
        assert len(set(texts.values())) == 1  # in each shard and in the index
        text = texts[files[0]]
        return [] if text is None else json.loads(text)

    return make


@pytest.fixture
def source(save) -> Path:
    return save({f"module.w{i}": torch.full((200,), float(i)) for i in range(20)})


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_receipt(source: Path, made, name: str) -> None:
    expected = {
        "ckptkit": ckptkit.__version__,
        "format": "torch-zip",
        "sha256": sha256(source),
        "operations": ["CastDtype(dtype='float64', keep=())", "StripModule()", "MapLocation(location='cpu')"],
    }
    options = ["--strip-module", "--dtype", "float64", "--map-location", "cpu"]
    assert made(source, name, *options) == [expected]


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_receipt(source: Path, made, name: str) -> None:
    assert made(source, name, "--no-receipt") == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_unchecked_there_is_no_digest(source: Path, made, name: str) -> None:
    (receipt,) = made(source, name, "--no-check")
    assert receipt == {"ckptkit": ckptkit.__version__, "format": "torch-zip", "operations": []}


def test_every_option_is_listed(source: Path, made) -> None:
    options = [
        "--weights-only",
        "--include",
        "*",
        "--rename",
        "^module\\.=>m.",
        "--tied",
        "duplicate",
        "--add-prefix",
        "a",
    ]
    (receipt,) = made(source, "out.pth", *options)
    assert receipt["operations"] == [
        "WeightsOnly()",
        "Select(include=('*',), exclude=())",
        "AddPrefix(prefix='a')",
        r"Rename(rules=(('^module\\.', 'm.'),))",
        "Tied(policy='duplicate')",
    ]


def test_a_chain(source: Path, made) -> None:
    first = made(source, "1.pth", "--strip-module")
    second = made("1.pth", "2.safetensors", "--dtype", "bfloat16")
    third = made("2.safetensors", "sharded.safetensors")
    fourth = made("sharded.safetensors.index.json", "4.pth")
    assert third == [*second, third[-1]]
    assert second == [*first, second[-1]]
    assert fourth == [*third, fourth[-1]]
    assert [receipt["format"] for receipt in fourth] == ["torch-zip", "torch-zip", "safetensors", "safetensors-sharded"]
    assert [receipt["sha256"] for receipt in fourth[:3]] == [sha256(source), sha256("1.pth"), sha256("2.safetensors")]
    folder = sorted(name for name in os.listdir() if name.startswith("sharded"))
    assert fourth[3]["sha256"] == {name: sha256(name) for name in folder}
    assert made("4.pth", "5.pth", "--no-receipt") == fourth  # what was there stays


def test_what_is_no_receipt_is_replaced(tmp_path: Path, made) -> None:
    for text in ("nonsense", "3", '{"a": 1}', "[" * 50_000):
        save_file({"w": torch.ones(1)}, tmp_path / "in.safetensors", {KEY: text})
        (receipt,) = made("in.safetensors", "out.pth", "--force")
        assert receipt["sha256"] == sha256("in.safetensors")


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_same_input_and_options_give_the_same_bytes(source: Path, made, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source, tmp_path / "elsewhere" / "another.name")
    made(source, name, "--strip-module")
    files = {file: sha256(file) for file in os.listdir() if file.startswith((name, name.split(".")[0] + "-"))}
    assert files
    for file in files:
        os.unlink(file)
    made("elsewhere/another.name", name, "--strip-module")
    assert {file: sha256(file) for file in files} == files


# Strings of one's own.


@pytest.mark.parametrize("name", OUTPUTS)
def test_metadata_is_set_and_kept(source: Path, convert, tmp_path: Path, name: str) -> None:
    given = {"license": "MIT", "note": 'a=b \u2603 "quoted" \n', "empty": ""}
    options = [part for key, value in given.items() for part in ("--metadata", f"{key}={value}")]
    assert convert(source, name, *options).code == 0
    with ckptkit.open(name) as file:
        assert {key: file.metadata[key] for key in given} == given
    for target in ("again.pth", "again.safetensors"):
        assert convert(name, target, "--metadata", "license=GPL", "--force").code == 0
        found = metadata(target)
        assert {key: found[key] for key in given} == {**given, "license": "GPL"}


def test_a_file_from_elsewhere_keeps_its_metadata(tmp_path: Path, convert) -> None:
    own = {"format": "pt", "modelspec.title": "x", "json": '{"a": [1, 2]}'}
    save_file({"w": torch.ones(1)}, tmp_path / "in.safetensors", own)
    for name in ("out.safetensors", "out.pth"):
        assert convert("in.safetensors", name, "--no-receipt").code == 0
        assert metadata(name) == own
    assert convert("out.pth", "back.safetensors", "--no-receipt").code == 0
    assert metadata("back.safetensors") == own
    assert Path("back.safetensors").read_bytes() == Path("out.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("novalue", "--metadata 'novalue': expected KEY=VALUE"),
        ("=v", "--metadata '=v': expected KEY=VALUE"),
        ("best=module.w1", "metadata 'best': its value 'module.w1' is a tensor's name"),
    ],
)
def test_refused(source: Path, refused, given: str, words: str) -> None:
    assert words in refused(source, "out.safetensors", "--metadata", given)


def test_torch_passes_over_it(source: Path, converted, agree) -> None:
    agree(converted(source, "out.pth", "--metadata", "a=b"), torch.load(source))


def test_in_python(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.pth")
    ckptkit.convert(source, out, metadata={"a": "b"}, strip_module=True)
    found = metadata(out)
    assert found["a"] == "b"
    assert json.loads(found[KEY])[0]["operations"] == ["StripModule()"]
    ckptkit.convert(source, out, metadata={"a": "b"}, receipt=False, force=True)
    assert metadata(out) == {"a": "b"}

    def mine(checkpoint: ckptkit.Checkpoint) -> ckptkit.Checkpoint:
        return checkpoint

    with ckptkit.open(source) as file:
        file.rewrite(mine, ckptkit.StripModule()).save(out, force=True)
    names = json.loads(metadata(out)[KEY])[0]["operations"]
    assert names == ["test_in_python.<locals>.mine()", "StripModule()"]
