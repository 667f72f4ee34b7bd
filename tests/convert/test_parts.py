"""``--part`` and ``--finish``: what several processes write becomes the checkpoint that one would have written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from support.far import below, serving
from support.files import same_files
from torch import nn

import ckptkit
from ckptkit.errors import CorruptError, DestinationExistsError, RewriteError
from ckptkit.fleet.shares import Share
from ckptkit.normalize.selection import KEY
from ckptkit.places import is_temporary_name
from ckptkit.plan import LiteralBytes, Plan
from ckptkit.transfer import part_records, parts
from ckptkit.transfer.part_records import balanced, shares_of, staging_of

SIZE = "6kB"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(9)))
    state = net.state_dict()
    state["head.weight"] = state["0.0.weight"]
    return state


@pytest.fixture
def source(save: Callable[..., Path], state: dict[str, torch.Tensor]) -> Path:
    return save({"model": state, "epoch": 3}, "source.pth")


def listed(folder: str | Path) -> list[str]:
    return sorted(os.listdir(folder))


def shared(convert: Any, count: int, *arguments: object) -> list[str]:
    """What each part says, the last one first; then they are finished."""
    lines = []
    for number in range(count, 0, -1):
        done = convert(*arguments, "--part", f"{number}/{count}")
        assert (done.code, done.err.count("error")) == (0, 0), done.err
        lines.append(done.out)
    done = convert(*arguments, "--finish")
    assert done.code == 0, done.err
    return [*lines, done.out]


WAYS = {
    "plain": [],
    "unchecked": ["--no-check"],
    "renamed": ["--no-receipt", "--rename", "^head=>top"],
    "cast": ["--dtype", "float16", "--tied", "duplicate", "--metadata", "note=as it is"],
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("plain", "model.safetensors"),
        ("unchecked", "model.safetensors"),
        ("renamed", "model.safetensors"),
        ("cast", "model.safetensors"),
        ("plain", "model.pth"),
        ("renamed", "pytorch_model.bin"),
        *(
            pytest.param(*each, marks=pytest.mark.thorough)
            for each in [
                ("plain", "pytorch_model.bin"),
                ("unchecked", "pytorch_model.bin"),
                ("cast", "pytorch_model.bin"),
                ("unchecked", "model.pth"),
                ("renamed", "model.pth"),
                ("cast", "model.pth"),
            ]
        ),
    ],
)
def test_the_same_bytes_as_of_one_process(convert, source: Path, way: str, name: str) -> None:
    os.mkdir("one")
    os.mkdir("many")
    arguments = ["--weights-only", "--max-shard-size", SIZE, *WAYS[way]]
    whole = convert(source, f"one/{name}", *arguments)
    assert whole.code == 0, whole.err
    lines = shared(convert, 3, source, f"many/{name}", *arguments)
    assert same_files("one", "many")
    assert len(listed("one")) > 4
    assert lines[0].startswith(f"many/{name}.index.json: part 3 of 3: ")
    assert lines[-1].replace("many/", "one/") == whole.out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sources_of_several_files(convert, source: Path, state: dict[str, torch.Tensor]) -> None:
    """Shards and folders: each file is hashed by one part, and all of them stand in the receipt."""
    for folder in ("shards", "a", "b", "c", "d"):
        os.mkdir(folder)
    assert convert(source, "shards/model.safetensors", "--weights-only", "--max-shard-size", "9kB").code == 0
    index = "shards/model.safetensors.index.json"
    assert convert(index, "a/model.bin", "--max-shard-size", SIZE).code == 0
    shared(convert, 5, index, "b/model.bin", "--max-shard-size", SIZE)
    assert same_files("a", "b")
    dcp.save({"model": dict(state), "epoch": 3}, checkpoint_id="training")
    arguments = ("--weights-only", "--max-shard-size", SIZE)
    assert convert("training", "c/model.safetensors", *arguments).code == 0
    shared(convert, 2, "training", "d/model.safetensors", *arguments)
    assert same_files("c", "d")
    receipt = json.loads(json.loads(Path("d/model.safetensors.index.json").read_text())["metadata"][KEY])[-1]
    assert receipt["sha256"].keys() == set(os.listdir("training"))


def test_sources_that_are_far(tmp_path: Path, source: Path) -> None:
    """Each part fetches its own tensors; one of them fetches all, for the digest in the receipt."""
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    content = source.read_bytes()
    given: dict[str, Any] = {"weights_only": True, "max_shard_size": 6000, "storage_options": {"key": "secret"}}
    with serving({"far://user:secret@bucket/source.pth": content}) as store:
        url = next(iter(store.files))
        ckptkit.convert(url, tmp_path / "one/model.bin", **given)
        fetched = []
        for number in (1, 2, 3):
            store.asked.clear()
            ckptkit.convert(url, tmp_path / "many/model.bin", part=f"{number}/3", **given)
            fetched.append(sum(each.nbytes for each in store.asked if each.what == "read"))
        (hidden,) = (tmp_path / "many").iterdir()
        assert not [path for path in hidden.iterdir() if b"secret" in path.read_bytes()]
        (hidden / "part-00002-of-00003.json").unlink()
        with pytest.raises(RewriteError, match="part 2 is missing: ckptkit convert") as refused:
            ckptkit.convert(url, tmp_path / "many/model.bin", finish=True, **given)
        assert "secret" not in str(refused.value)
        ckptkit.convert(url, tmp_path / "many/model.bin", part="2/3", **given)
        ckptkit.convert(url, tmp_path / "many/model.bin", finish=True, **given)
    assert same_files(tmp_path / "one", tmp_path / "many")
    assert max(fetched) < 1.6 * len(content)
    assert sorted(fetched)[1] < 0.8 * len(content)


def test_shards_that_are_far_are_fetched_once(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Each is hashed by the part that reads it; the others look at its header alone."""
    for folder in ("source", "one", "many"):
        (tmp_path / folder).mkdir()
    source = save({f"layer{number}": torch.rand(250, 1000) for number in range(8)}, "source.pth")
    given: dict[str, Any] = {"max_shard_size": "2.1MB"}
    ckptkit.convert(source, tmp_path / "source/model.safetensors", **given)
    with serving(below(tmp_path / "source", "far://bucket")) as store:
        url = "far://bucket/model.safetensors.index.json"
        ckptkit.convert(url, tmp_path / "one/model.bin", **given)
        store.asked.clear()
        for number in (1, 2):
            ckptkit.convert(url, tmp_path / "many/model.bin", part=f"{number}/2", **given)
        fetched = sum(each.nbytes for each in store.asked if each.what == "read")
        ckptkit.convert(url, tmp_path / "many/model.bin", finish=True, **given)
        assert fetched < 1.1 * sum(map(len, store.files.values()))
    assert same_files(tmp_path / "one", tmp_path / "many")


def test_until_the_end_nothing_is_seen(convert, source: Path) -> None:
    os.mkdir("out")
    arguments = (source, "out/model.safetensors", "--weights-only", "--max-shard-size", SIZE)
    for number in (1, 2):
        assert convert(*arguments, "--part", f"{number}/2").code == 0
        (hidden,) = listed("out")
        assert is_temporary_name(hidden)
    # Whoever looks through the folder, and whoever tidies it up, passes over what is not complete.
    with pytest.raises(ckptkit.FileAccessError, match="unfinished ckptkit output"):
        ckptkit.convert("out", "elsewhere", to="torch-zip")
    assert convert(source, "out/other.pth").code == 0
    assert listed("out") == sorted([hidden, "other.pth"])
    assert convert(*arguments, "--finish").code == 0
    assert hidden not in listed("out")


def test_a_part_that_is_there_is_kept(convert, source: Path) -> None:
    os.mkdir("out")
    arguments = (source, "out/model.safetensors", "--weights-only", "--max-shard-size", SIZE, "--dtype", "float16")
    first = convert(*arguments, "--part", "2/3", "--json")
    (hidden,) = Path("out").iterdir()

    def inodes() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in hidden.iterdir()}

    before = inodes()
    again = convert(*arguments, "--part", "2/3", "--json")
    assert inodes() == before
    documents = [json.loads(done.out) for done in (first, again)]
    assert [document["part"].pop("kept") for document in documents] == [False, True]
    assert documents[0] == documents[1]  # what casts lost, too
    assert any(finding["code"] == "cast-rounded" for finding in documents[0]["findings"])
    assert documents[0]["part"] == {
        "part": 2, "of": 3,
        "shards": sorted(name for name in before if name.startswith("model-")),
        "nbytes": sum((hidden / name).stat().st_size for name in before if name.startswith("model-")),
    }  # fmt: skip
    assert "was already there" in convert(*arguments, "--part", "2/3").out
    assert convert(*arguments, "--part", "2/3", "--force").code == 0
    assert all(inodes()[name] != before[name] for name in documents[0]["part"]["shards"])
    for number in (1, 3):
        assert convert(*arguments, "--part", f"{number}/3").code == 0
    told = convert(*arguments, "--finish", "--json")
    whole = convert(source, "whole.safetensors", *arguments[2:], "--json")
    losses = [json.loads(done.out)["findings"] for done in (told, whole)]
    assert [f for f in losses[0] if f["code"] == "cast-rounded"] == [
        f for f in losses[1] if f["code"] == "cast-rounded"
    ]


def test_missing_parts_are_named_with_their_commands(convert, source: Path) -> None:
    os.mkdir("out")
    arguments = ["source.pth", "out/model.bin", "--weights-only", "--max-shard-size", SIZE]
    arguments += ["--rename", "^head=>top head", "--metadata", "a b=c"]
    none = convert(*arguments, "--finish")
    assert none.code == 2
    assert "it has no parts yet; write each of N parts, from 1/N to N/N: ckptkit convert source.pth" in none.err
    for number in (1, 4):
        assert convert(*arguments, "--part", f"{number}/4").code == 0
    (hidden,) = Path("out").iterdir()
    before = {path: path.read_bytes() for path in hidden.iterdir()}
    done = convert(*arguments, "--finish")
    assert done.code == 2
    assert "2 of 4 parts are missing or incomplete; nothing was changed" in done.err
    assert {path: path.read_bytes() for path in hidden.iterdir()} == before
    commands = [line.partition(": ")[2] for line in done.err.splitlines() if line.startswith("  part ")]
    assert [command.split()[-1] for command in commands] == ["2/4", "3/4"]
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["ckptkit", "convert"]
        assert convert(*words[2:]).code == 0
    assert convert(*arguments, "--finish").code == 0
    assert "top head" in json.loads(Path("out/model.bin.index.json").read_text())["weight_map"].__repr__()


def test_shards_that_are_not_whole(convert, source: Path) -> None:
    os.mkdir("out")
    os.mkdir("one")
    arguments = ("--weights-only", "--max-shard-size", SIZE)
    assert convert(source, "one/model.safetensors", *arguments).code == 0
    command = (source, "out/model.safetensors", *arguments)
    for number in (1, 2):
        assert convert(*command, "--part", f"{number}/2").code == 0
    (hidden,) = Path("out").iterdir()
    record = json.loads((hidden / "part-00002-of-00002.json").read_text())
    one, *_, last = (hidden / name for name in record["shards"])
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    damaged = convert(*command, "--finish")
    assert (damaged.code, "part 2 has different bytes than were recorded: " + one.name in damaged.err) == (2, True)
    os.truncate(last, 100)
    cut = convert(*command, "--finish")
    assert (cut.code, f"part 2 has 100 of the {record['shards'][last.name]['nbytes']:,} bytes" in cut.err) == (2, True)
    last.unlink()
    gone = convert(*command, "--finish")
    assert (gone.code, f"part 2 has no {last.name}" in gone.err) == (2, True)
    assert convert(*command, "--part", "2/2").code == 0
    record_path = hidden / "part-00001-of-00002.json"
    text = record_path.read_text()
    others = [text.replace('"of": 2', '"of": 999999999'), text.replace('"digests": {', '"digests": {"a": "00"')]
    others += [text.replace('"losses": []', '"losses": [[1]]'), text.replace('"nbytes": ', '"nbytes": -')]
    assert len({text, *others}) == 5
    for broken in ("", "[]", "1", text[:100], text.replace('"shards"', '"shard"'), *others):
        record_path.write_text(broken)
        with pytest.raises(CorruptError, match="not the record of a part"):
            ckptkit.convert(source, "out/model.safetensors", weights_only=True, max_shard_size=SIZE, finish=True)
    record_path.write_text(text)
    assert convert(*command, "--finish").code == 0
    assert same_files("one", "out")


Change = Callable[[Path, pytest.MonkeyPatch], object]


def another_state(path: Path, _: pytest.MonkeyPatch) -> None:
    """The same names and shapes, other values: no size, and no header, tells."""
    content = torch.load(path)
    content["model"]["5.0.weight"] += 1
    torch.save(content, path)


def longer(path: Path, _: pytest.MonkeyPatch) -> None:
    torch.save(torch.load(path) | {"note": "x" * 9999}, path)


def other_steps(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(part_records, "_steps_digest", lambda *_: "0" * 64)


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (lambda *_: None, {"dtype": "float16"}, "--dtype was not given and is now float16"),
        (lambda *_: None, {"receipt": False}, "--no-receipt was not given and is now given"),
        (lambda *_: None, {"rename": ["^a=>b"]}, r"--rename was '\^head=>top' and is now '\^a=>b'"),
        (lambda *_: None, {"part": "2/4"}, "part 1 of 3 already exists .* this is one of 4 parts"),
        (longer, {}, "source.pth had [0-9,]+ bytes and now has [0-9,]+"),
        (another_state, {}, "the source's file source.pth has different content"),
        (
            lambda _, patch: patch.setattr(part_records, "__version__", "0.0.1"),
            {},
            "wrote it, but this is 0.0.1: use one version on all machines",
        ),
        (other_steps, {}, "the same options made different shards from the same source"),
    ],
)
def test_parts_of_another_plan_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, options: dict[str, Any], told: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    given: dict[str, Any] = {"weights_only": True, "max_shard_size": 6000, "rename": "^head=>top"}
    ckptkit.convert(source, out / "model.bin", part="1/3", **given)
    (hidden,) = out.iterdir()
    before = listed(hidden)
    change(source, monkeypatch)
    for asked in ({"part": "2/3"}, {"part": "2/3", "force": True}, {"part": "1/3"}, {"finish": True}):
        if "finish" in asked and "part" in options:
            continue
        with pytest.raises(RewriteError, match=told) as refused:
            ckptkit.convert(source, out / "model.bin", **{**given, **asked, **options})
        assert f"to start again, remove the folder {hidden}" in str(refused.value)
        assert listed(hidden) == before
    shutil.rmtree(hidden)
    monkeypatch.undo()


@pytest.mark.parametrize("is_other", [True, False])
def test_a_source_that_was_written_to_between_parts_is_compared_as_a_whole(tmp_path: Path, is_other: bool) -> None:
    source, out = tmp_path / "source.safetensors", tmp_path / "out"
    out.mkdir()
    save_file({f"{number:02}": torch.full((25_000,), float(number)) for number in range(20)}, source)
    given: dict[str, Any] = {"max_shard_size": 250_000, "dtype": "bfloat16"}
    ckptkit.convert(source, out / "model.safetensors", part="1/2", **given)
    with open(source, "r+b") as file:  # a byte of each of four shards, none of those that tell states apart
        for place in (1_050_001, 1_550_001, 550_001, 250_001):
            file.seek(-place, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(b"\x43" if is_other else byte)
    os.utime(source, (1, 1))
    ckptkit.convert(source, out / "model.safetensors", part="2/2", **given)
    if not is_other:
        ckptkit.convert(source, out / "model.safetensors", finish=True, **given)
        assert (out / "model.safetensors.index.json").exists()
        return
    with pytest.raises(RewriteError, match=r"the source was changed .* with --force: tensor"):
        ckptkit.convert(source, out / "model.safetensors", finish=True, **given)
    assert len(listed(out)) == 1
    for asked in ({"part": "1/2", "force": True}, {"part": "2/2", "force": True}, {"finish": True}):
        ckptkit.convert(source, out / "model.safetensors", **given, **asked)


def test_what_is_there_is_replaced_at_the_end(convert, save, source: Path, state: dict[str, torch.Tensor]) -> None:
    old = save({name: value + 1 for name, value in state.items() if value.ndim}, "old.pth")
    os.mkdir("out")
    assert convert(old, "out/model.safetensors", "--max-shard-size", "4kB").code == 0
    os.chmod("out/model.safetensors.index.json", 0o600)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    arguments = (source, "out/model.safetensors", "--weights-only", "--max-shard-size", SIZE)
    refused = convert(*arguments, "--part", "1/2")
    assert (refused.code, "already exists; --force overwrites it" in refused.err) == (2, True)
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    for number in (1, 2):
        assert convert(*arguments, "--part", f"{number}/2", "--force").code == 0
    assert {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()} == before
    (hidden,) = (path for path in Path("out").iterdir() if path.is_dir())
    if os.name == "posix":
        assert hidden.stat().st_mode & 0o777 == 0o700
    refused = convert(*arguments, "--finish")
    assert (refused.code, "already exists; --force overwrites it" in refused.err) == (2, True)
    assert convert(*arguments, "--finish", "--force").code == 0
    os.mkdir("one")
    assert convert(source, "one/model.safetensors", *arguments[2:]).code == 0
    assert same_files("one", "out")
    if os.name == "posix":
        assert {path.stat().st_mode & 0o777 for path in Path("out").iterdir()} == {0o600}
    again = convert(*arguments, "--finish")
    assert (again.code, "already exists" in again.err) == (2, True)


@pytest.mark.parametrize("asked", [{"part": "1/2"}, {"finish": True}])
def test_nothing_to_share(source: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(RewriteError, match=r"everything fits into one file of .* so there is nothing to share"):
        ckptkit.convert(source, tmp_path / "m.safetensors", weights_only=True, max_shard_size="1GB", **asked)
    with pytest.raises(RewriteError, match="there is nothing to share; omit it"):
        ckptkit.convert(source, tmp_path / "m.pth", **asked)
    with pytest.raises(RewriteError, match="a dcp folder is written by one process"):
        ckptkit.convert(source, tmp_path / "folder", to="dcp", ranks=2, **asked)
    assert listed(tmp_path) == ["source.pth"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"part": "0/3"}, "--part '0/3': expected I/N, I from 1 to N, such as 2/8"),
        ({"part": "4/3"}, "expected I/N"),
        ({"part": "1"}, "expected I/N"),
        ({"part": "1/2", "finish": True}, "--finish combines the parts; omit --part 1/2"),
        ({"dry_run": True, "finish": True}, "omit --dry-run"),
        ({"part": "1/999999999"}, "--part 1/999999999: there can be at most 10,000 shards"),
        ({"part": "1/2", "jobs": 2}, "one process writes a part; omit --jobs"),
        ({"jobs": 0}, "--jobs 0: expected a whole number from 1"),
        ({"files_from": "list.txt"}, "--files-from list.txt lists files of a folder, but the source is one checkpoint"),
        ({"executor": 3}, "executor is int; expected a concurrent.futures.Executor"),
    ],
)
def test_what_does_not_go_together(source: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(RewriteError, match=told):
        ckptkit.convert(source, tmp_path / "m.bin", weights_only=True, max_shard_size=6000, **options)
    assert listed(tmp_path) == ["source.pth"]


def test_more_parts_than_shards_and_folders_that_are_not_there(convert, source: Path) -> None:
    arguments = (source, "out/model.bin", "--weights-only", "--max-shard-size", "20kB")
    refused = convert(*arguments, "--part", "1/2")
    assert (refused.code, "the folder out does not exist; create it first" in refused.err) == (2, True)
    os.mkdir("out")
    os.mkdir("one")
    assert convert(source, "one/model.bin", *arguments[2:]).code == 0
    lines = shared(convert, 9, *arguments)
    assert same_files("one", "out")
    assert lines[0].startswith("out/model.bin.index.json: part 9 of 9: 0 B in 0 shards of ")
    dry = convert(source, "new/", *arguments[2:], "--to", "torch-zip", "--part", "1/2", "--dry-run")
    assert (dry.code, os.path.exists("new")) == (0, False)
    assert convert(source, "new/", *arguments[2:], "--to", "torch-zip", "--part", "1/2").code == 0
    assert len(listed("new")) == 1


def test_a_destination_appears_meanwhile(source: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"weights_only": True, "max_shard_size": 6000}
    out = tmp_path / "out"
    out.mkdir()
    for number in (1, 2):
        ckptkit.convert(source, out / "m.bin", part=f"{number}/2", **given)
    (hidden,) = out.iterdir()
    before = listed(hidden)
    first = min(name for name in before if name.startswith("m-"))
    (out / first).write_bytes(b"somebody's")
    with pytest.raises(DestinationExistsError, match=first):
        ckptkit.convert(source, out / "m.bin", finish=True, **given)
    assert listed(hidden) == before
    assert (out / first).read_bytes() == b"somebody's"
    ckptkit.convert(source, out / "m.bin", finish=True, force=True, **given)
    assert hidden.name not in listed(out)


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_one_process_finishes(convert, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several jobs may try to: the last one that wrote its part does."""
    os.mkdir("out")
    arguments = (source, "out/m.bin", "--weights-only", "--max-shard-size", SIZE)
    for number in (1, 2):
        assert convert(*arguments, "--part", f"{number}/2").code == 0
    told = []
    real = parts.Parts.finish

    def meanwhile(self: Any, **given: Any) -> Any:
        if not told:
            told.append(convert(*arguments, "--finish"))
        return real(self, **given)

    monkeypatch.setattr(parts.Parts, "finish", meanwhile)
    assert convert(*arguments, "--finish").code == 0
    assert (told[0].code, "another process is combining the parts into a checkpoint" in told[0].err) == (2, True)
    os.mkdir("one")
    assert ckptkit.convert(source, "one/m.bin", weights_only=True, max_shard_size=SIZE).ok
    assert same_files("one", "out")


def test_something_else_is_where_parts_go(convert, source: Path) -> None:
    os.mkdir("out")
    arguments = (source, "out/m.bin", "--weights-only", "--max-shard-size", SIZE)
    Path(staging_of("out/m.bin.index.json")).write_text("words")
    for asked in (("--part", "2/2"), ("--finish",)):
        done = convert(*arguments, *asked)
        assert (done.code, "m.bin.index.json" in done.err, "bug" in done.err) == (2, True, False), done.err
    assert len(listed("out")) == 1


def test_shares_are_balanced_by_bytes() -> None:
    sizes = {"a": 5, "b": 9, "c": 1, "d": 4, "e": 5}
    shares = balanced(sizes, 3)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert sorted(sum(sizes[name] for name in share) for share in shares) == [6, 9, 9]
    shards = {
        f"s{number}": Plan(format="x", nbytes=100, steps=(LiteralBytes(0, bytes(100)),), tensors=1, aliases={})
        for number in range(7)
    }
    plan = Plan(format="x", nbytes=0, steps=(), tensors=7, aliases={}, shards=shards)
    assert [len(share) for share in shares_of(plan, 3)] == [3, 2, 2]
    assert [share for share in shares_of(plan, 9) if not share] == [[], []]
    assert str(Share(2, 8)) == "2/8"
    for name in ("model.safetensors.index.json", "x" * 200 + ".bin.index.json", "plain.index.json"):
        staging = staging_of(f"out/{name}")
        assert os.path.dirname(staging) == "out"
        assert is_temporary_name(os.path.basename(staging))
    assert staging_of("a.bin.index.json") != staging_of("b.bin.index.json")
