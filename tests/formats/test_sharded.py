"""Sharded checkpoints: an index and its shards as one, and everything that can be wrong with them."""

from __future__ import annotations

import functools
import json
import operator
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conformance import Conformance
from support.files import tensor_of

import ckptkit
from ckptkit import formats
from ckptkit.errors import CorruptError, FileAccessError, LimitError, UnknownFormatError
from ckptkit.limits import Limits

Save = Callable[..., Path]
State = dict[str, torch.Tensor]


def shard(state: State, folder: Path, count: int = 3, *, ending: str = "safetensors", **metadata: Any) -> Path:
    """As transformers does it: shards by size, an index that lists every name."""
    names = [f"model-{n + 1:05d}-of-{count:05d}.{ending}" for n in range(count)]
    parts: list[State] = [{} for _ in range(count)]
    for number, (name, value) in enumerate(state.items()):
        parts[number * count // len(state)][name] = value
    for name, part in zip(names, parts, strict=True):
        if ending == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    index = folder / f"model.{ending}.index.json"
    total = sum(value.nbytes for value in state.values())
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index.write_text(json.dumps({"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}))
    return index


def model() -> State:
    return {f"layers.{n}.weight": torch.randn(4, n + 1) for n in range(7)}


def changed(index: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The index with its document changed in place."""
    document = json.loads(index.read_text())
    change(document)
    index.write_text(json.dumps(document))
    return index


def codes(index: Path) -> dict[str, str]:
    with ckptkit.open(index) as file:
        return {finding.code: finding.message for finding in file.findings}


class TestSafetensors(Conformance):
    reads = "safetensors-sharded"

    def written(self, state: State, folder: Path) -> Path:
        return shard(state, folder, 2)


class TestSafetensorsShard(TestSafetensors):
    def damage(self, path: Path) -> Path:
        return path.with_name("model-00002-of-00002.safetensors")


class TestTorch(Conformance):
    reads = "torch-sharded"

    def written(self, state: State, folder: Path) -> Path:
        return shard(state, folder, 2, ending="bin")


class TestTorchShard(TestTorch):
    step = 7

    def damage(self, path: Path) -> Path:
        return path.with_name("model-00001-of-00002.bin")


# What is read.


def test_the_facts(tmp_path: Path) -> None:
    state = model()
    index = shard(state, tmp_path, transformers_version="4.40", tied=True, extra={"a": 1})
    with ckptkit.open(index) as file:
        assert file.metadata == {"transformers_version": "4.40", "tied": "true", "format": "pt"}, "no total_size"
        origin = file.checkpoint.origin
        assert origin.size == sum(path.stat().st_size for path in tmp_path.iterdir())
        assert origin.path == str(index)
        keys = [entry.storage.key for entry in file.state_dict.values()]
        assert keys[0] == "model-00001-of-00003.safetensors:layers.0.weight"
        assert len(set(keys)) == len(state)
        assert not {"shard-extra-keys", "shard-total-size", "part-of-a-checkpoint"} & {f.code for f in file.findings}


def test_names_come_in_the_order_of_the_weight_map(tmp_path: Path) -> None:
    index = shard(model(), tmp_path)
    changed(index, lambda d: d.update(weight_map=dict(reversed(d["weight_map"].items()))))
    with ckptkit.open(index) as file:
        assert list(file.state_dict) == list(reversed(model()))


def test_ties_and_views_inside_a_shard_stay(tmp_path: Path) -> None:
    base = torch.randn(4, 4)
    index = shard({"a": base, "b": base, "part": base[:2], "c": torch.ones(1)}, tmp_path, 1, ending="bin")
    with ckptkit.open(index) as file:
        a, b, part = (file.state_dict[name] for name in ("a", "b", "part"))
        assert a.view == b.view
        assert a.storage is part.storage
    assert "shard-total-size" not in codes(index), "each name counted"
    once = base.nbytes + base[:2].nbytes + 4
    assert "shard-total-size" not in codes(changed(index, lambda d: d["metadata"].update(total_size=once))), "ties once"
    ckptkit.convert(index, tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth", weights_only=True)
    assert again["a"].data_ptr() == again["b"].data_ptr() == again["part"].data_ptr()


def test_legacy_shards_big_names_and_module_versions(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    os.mkdir(tmp_path / "sub")
    torch.save(state, tmp_path / "sub" / "a.bin", _use_new_zipfile_serialization=False)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "sub/a.bin")}))
    with ckptkit.open(index) as file:
        assert list(file.state_dict) == list(state)
        assert file.state_dict.versions is not None
        assert set(file.state_dict.versions) == {"", "0", "1"}
    ckptkit.convert(index, tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth", weights_only=True)
    assert again._metadata == state._metadata  # type: ignore[attr-defined]


def test_a_shard_may_be_a_link_as_in_the_cache(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    (tmp_path / "elsewhere").mkdir()
    first.rename(tmp_path / "elsewhere" / "blob")
    first.symlink_to(tmp_path / "elsewhere" / "blob")
    with ckptkit.open(index) as file:
        assert len(file.state_dict) == 7


def test_names_of_all_pickles_are_reported(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2, ending="bin")
    for number in (1, 2):
        part = torch.load(tmp_path / f"model-0000{number}-of-00002.bin")
        torch.save({**part, f"extra{number}": os.path.join}, tmp_path / f"model-0000{number}-of-00002.bin")
    with ckptkit.open(index) as file:
        assert file.trust == "hostile"
        (use,) = [use for use in file.checkpoint.globals if use.verdict == "dangerous"]
        assert use.count == 2
        assert {place.split(":")[0] for place in use.where} <= {f"model-0000{n}-of-00002.bin" for n in (1, 2)}


class Graph:
    """Pickled as an FX graph is: by a function's text, and what it imports."""

    def __init__(self, imports: str) -> None:
        self.imports = imports

    def __reduce__(self) -> tuple[object, ...]:
        from torch.fx.graph_module import reduce_graph_module

        return reduce_graph_module, ({"_code": "\n\n\ndef forward(self, x):\n    return x\n"}, self.imports)


@pytest.mark.parametrize("hostile", [1, 2, 3])
@pytest.mark.parametrize(
    ("value", "payload", "honest"),
    [
        (Graph("import torch"), Graph("import os"), "needs_trust"),
        (int | None, functools.partial(functools.reduce, operator.add), "needs_trust"),
        ("plain", os.path.join, "safe"),
    ],
    ids=["graph", "reduce", "path"],
)
def test_the_worst_shard_decides(hostile: int, value: Any, payload: Any, honest: str, tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 3, ending="bin")
    shards = [tmp_path / f"model-0000{number}-of-00003.bin" for number in (1, 2, 3)]
    parts = [torch.load(path) for path in shards]
    for number, (path, part) in enumerate(zip(shards, parts, strict=True), 1):
        torch.save({**part, f"extra{number}": value}, path)
    assert judged(index) == {honest}
    torch.save({**parts[hostile - 1], f"extra{hostile}": payload}, shards[hostile - 1])
    assert judged(index) == {"hostile"}
    with ckptkit.open(index) as file:
        bad = [use for use in file.checkpoint.globals if use.verdict == "dangerous"]
        assert bad and all(use.where[0].startswith(shards[hostile - 1].name) for use in bad)
    assert not ckptkit.check([index]).ok


def judged(index: Path) -> set[str]:
    """The trust of a checkpoint, in every document that tells it."""
    with ckptkit.open(index) as file:
        opened = file.trust
    (record,) = ckptkit.manifest([index]).files
    return {opened, record.trust, ckptkit.inspect(index)["trust"]}


def test_compiled_code_in_a_shard_needs_trust(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2, ending="bin")
    with zipfile.ZipFile(tmp_path / "model-00002-of-00002.bin", "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/kernel.so", b"\x7fELF")
    assert judged(index) == {"needs_trust"}
    with ckptkit.open(index) as file:
        (part,) = file.checkpoint.unvouched
        assert part.where == ("model-00002-of-00002.bin: kernel.so",)


def test_a_whole_that_is_refused_tells_what_its_shards_name(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 3, ending="bin")
    first = tmp_path / "model-00001-of-00003.bin"
    torch.save({**torch.load(first), "extra": os.path.join}, first)
    (tmp_path / "model-00003-of-00003.bin").unlink()
    with pytest.raises(CorruptError, match="1 shard missing") as caught:
        ckptkit.open(index)
    assert "posixpath.join" in [use.name for use in caught.value.globals if use.verdict == "dangerous"]


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    state = {f"w{n}": torch.full((1,), float(n)) for n in range(120)}
    index = shard(state, tmp_path, 120)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        with ckptkit.open(index) as file:
            assert len(file.state_dict) == 120
            assert tensor_of(file.state_dict["w119"]).item() == 119
        with pytest.raises(
            FileAccessError, match=r"too many shards for the number of open files allowed; raise the limit .ulimit"
        ):
            ckptkit.convert(index, tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ckptkit.convert(index, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == state.keys()


def test_a_shard_that_is_exchanged_while_it_is_open(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2)
    with ckptkit.open(index) as file:
        other = tmp_path / "model-00001-of-00002.safetensors"
        other.write_bytes(other.read_bytes() + b"x")
        with pytest.raises(CorruptError, match="the file was changed while it was being read"):
            tensor_of(file.state_dict["layers.0.weight"])
    with pytest.raises(FileAccessError, match="the checkpoint was closed"):
        tensor_of(file.state_dict["layers.6.weight"])


# What is noticed.


def test_a_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    index = shard(model(), tmp_path)
    assert not {"shard-not-named", "shard-metadata"} & codes(index).keys()
    names = json.loads(index.read_text())["weight_map"]
    lost = [name for name, file in names.items() if file.startswith("model-00002")]
    changed(index, lambda d: [d["weight_map"].pop(name) for name in lost])
    assert "puts no tensor into model-00002-of-00003.safetensors, which" in codes(index)["shard-not-named"]


@pytest.mark.parametrize("metadata", [{"format": "pt", "run": "7"}, {"format": "np"}, {}])
def test_metadata_that_one_shard_alone_has(metadata: dict[str, str], tmp_path: Path) -> None:
    index = shard(model(), tmp_path)
    second = tmp_path / "model-00002-of-00003.safetensors"
    save_file(load_file(second), second, metadata=metadata)
    key = "'run'" if "run" in metadata else "'format'"
    assert f"do not all have the same metadata: {key}" in codes(index)["shard-metadata"]


def test_names_beyond_the_index(tmp_path: Path) -> None:
    index = changed(shard(model(), tmp_path), lambda d: d["weight_map"].pop("layers.2.weight"))
    assert "1 name in shards that the index does not list: 'layers.2.weight'" in codes(index)["shard-extra-keys"]
    with ckptkit.open(index) as file:
        assert list(file.state_dict)[-1] == "layers.2.weight"


@pytest.mark.parametrize("size", [1, -1, 1 << 70, "448", True, 1.5])
def test_another_total_size(size: object, tmp_path: Path) -> None:
    index = changed(shard(model(), tmp_path), lambda d: d["metadata"].update(total_size=size))
    assert "the shards' tensors have 448" in codes(index)["shard-total-size"]
    changed(index, lambda d: d["metadata"].update(total_size=448.0))
    assert "shard-total-size" not in codes(index)


def test_one_shard_alone(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    with ckptkit.open(first) as file:
        (finding,) = [finding for finding in file.findings if finding.code == "part-of-a-checkpoint"]
        assert finding.message.startswith("shard 1 of 2 of a sharded checkpoint")
        assert finding.fix == f"ckptkit inspect {index}"
    first.rename(tmp_path / "a.safetensors")
    changed(index, lambda d: d.update(weight_map={"x": "a.safetensors", "y": "b.safetensors"}))
    assert "one of 2 shards" in codes(tmp_path / "a.safetensors")["part-of-a-checkpoint"]
    index.unlink()
    assert "part-of-a-checkpoint" not in codes(tmp_path / "a.safetensors")
    assert (
        "no index beside it that names them all"
        in codes(tmp_path / "model-00002-of-00002.safetensors")["part-of-a-checkpoint"]
    )


def test_a_folder_lists_the_index_and_not_its_shards(run: Any, tmp_path: Path) -> None:
    shard(model(), tmp_path, 2)
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    documents = json.loads(run("inspect", "--json", tmp_path).stdout)["files"]
    assert [(Path(d["path"]).name, d["format"]) for d in documents] == [
        ("model.safetensors.index.json", "safetensors-sharded"), ("other.safetensors", "safetensors")]  # fmt: skip


@pytest.mark.parametrize("ending", ["bin", "pth", "pt", "ckpt", "pkl"])
def test_a_folder_lists_indexes_of_all_endings(ending: str, run: Any, tmp_path: Path) -> None:
    shard(model(), tmp_path, 2, ending=ending, source="model.safetensors", of={"a": "b.safetensors"})
    (document,) = json.loads(run("inspect", "--json", tmp_path).stdout)["files"]
    assert Path(document["path"]).name == f"model.{ending}.index.json"
    assert document["format"] == "torch-sharded", "whatever its metadata names"
    assert document["metadata"] == {"source": "model.safetensors"}


# What is wrong.


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 7)
    names = [f"model-{n + 1:05d}-of-00007.safetensors" for n in range(7)]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n")
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:-3])
    changed(index, lambda d: d["weight_map"].update({"layers.3.weight": names[4], "nowhere": names[5]}))
    save_file({"layers.6.weight": torch.ones(1), "layers.5.weight": torch.ones(1)}, tmp_path / names[6])
    with pytest.raises(CorruptError) as caught:
        formats.read(index)
    for words in (
        f"1 shard missing: {names[0]}; put them into the index's folder",
        f"1 shard present only as git-lfs pointer: {names[1]} (4,976,698,672 bytes); run: git lfs pull",
        f"1 shard that cannot be read: {names[2]} (data: truncated: 45 of 48 bytes of data are present",
        f"1 name in two shards: 'layers.5.weight' ({names[5]} and {names[6]})",
        f"2 names of the index in no shard: 'layers.3.weight' ({names[4]}), 'nowhere' ({names[5]})",
    ):
        assert words in caught.value.message
    assert str(caught.value).startswith(f"{index}: ")


def test_a_name_in_another_shard(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2)
    changed(index, lambda d: d["weight_map"].update({"layers.0.weight": "model-00002-of-00002.safetensors"}))
    with pytest.raises(CorruptError, match=r"1 name not in the shard that the index says: 'layers.0.weight' .model"):
        formats.read(index)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.safetensors", "a/../../x", "a\\b", "C:x", "./x", "a//b", "", "x/", "a\0b"]
)
def test_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    index = changed(shard(model(), tmp_path), lambda d: d["weight_map"].update({"layers.0.weight": name}))
    with pytest.raises(
        CorruptError, match=r"puts 'layers.0.weight' into .*: absolute, empty, or leaving the index's folder"
    ):
        formats.read(index)


def test_an_index_cannot_name_an_index(tmp_path: Path) -> None:
    index = changed(shard(model(), tmp_path), lambda d: d["weight_map"].update({"x": "model.safetensors.index.json"}))
    with pytest.raises(CorruptError, match=r"1 shard that cannot be read: model.safetensors.index.json .a JSON file"):
        formats.read(index)


def test_safetensors_shards_must_be_safetensors(tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2)
    torch.save({"layers.0.weight": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CorruptError, match="it is torch-zip, but the index promises safetensors"):
        formats.read(index)


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), {1: torch.ones(1)}])
def test_a_shard_without_names(value: object, tmp_path: Path) -> None:
    index = shard(model(), tmp_path, 2, ending="bin")
    torch.save(value, tmp_path / "model-00001-of-00002.bin")
    with pytest.raises(
        CorruptError, match=r"1 shard without a state_dict of names and values: model-00001-of-00002.bin"
    ):
        formats.read(index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": []}', "weight_map of an index must map tensors' names to file names, and is not an object"),
        ('{"weight_map": {"a": ["b"]}}', "the weight_map maps 'a' to a list, which is not a file name"),
        ('{"weight_map": {}, "metadata": []}', "the metadata of an index must be an object"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the name 'a' appears twice in the index"),
        ('{"weight_map": {"a": "x"}', "the index is not valid JSON"),
        ('{"weight_map": {"a": NaN}}', "the index is not valid JSON: NaN"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CorruptError, match=words):
        formats.read(index)


def test_limits(tmp_path: Path) -> None:
    index = shard(model(), tmp_path)
    for limits, words in (
        (Limits(shards=2), "shards of one checkpoint: 3 is over the limit of 2"),
        (Limits(entries=6), "tensors in an index: 7 is over the limit of 6"),
    ):
        with pytest.raises(LimitError, match=words):
            formats.read(index, limits=limits)
    with pytest.raises(UnknownFormatError, match="an index of shards that cannot be read"):
        formats.read(index, limits=Limits(index_nbytes=100))


def test_an_empty_index_holds_no_tensor(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with ckptkit.open(index) as file:
        assert (file.format, file.kind) == ("torch-sharded", "other")
