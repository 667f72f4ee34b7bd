"""``--dry-run`` tells what would be done, and does nothing; and the options about the output as a file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptkit


@pytest.fixture
def source(save) -> Path:
    base = torch.arange(24.0).view(4, 6)
    weights = {
        "module.w": base,
        "module.tied": base,
        "module.t": torch.ones(3, 4).t(),
        "module.n": torch.ones(2, dtype=torch.int64),
        "module.big": torch.zeros(1000)[:10],
        "module.head.weight": torch.ones(2, 2),
    }
    return save({"epoch": 3, "state_dict": weights, "optimizer_name": "SGD"})


OPTIONS = ["--strip-module", "--weights-only", "--exclude", "head.*", "--dtype", "float16"]


def test_as_json(source: Path, convert) -> None:
    done = convert(source, "out.safetensors", *OPTIONS, "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert document["schema_version"] == 1
    assert (document["written"], document["checked"], document["ok"]) == (False, False, True)
    assert (document["source"], document["destination"]) == (str(source), "out.safetensors")
    assert document["section"] == "state_dict"
    assert document["renames"] == [{"from": f"module.{n}", "to": n} for n in ("w", "tied", "t", "n", "big")]
    assert document["dropped"] == ["module.head.weight"]
    assert document["casts"] == [{"name": n, "from": "float32", "to": "float16"} for n in ("w", "tied", "t", "big")]
    assert document["gathered"] == ["t"]
    assert document["compacted"] == {"storages": 1, "nbytes": 990 * 2}
    assert document["operations"][:2] == ["WeightsOnly()", "Select(include=(), exclude=('head.*',))"]
    plan = document["plan"]
    assert plan["aliases"] == {"tied": "w"}
    assert plan["shards"] == []
    assert plan["copies"] == {"count": 1, "nbytes": 16}
    assert plan["casts"] == {"count": 2, "nbytes": 48 + 20}
    assert plan["gathers"] == {"count": 1, "nbytes": 24}
    assert plan["literals"]["count"] == 1
    assert plan["nbytes"] == plan["literals"]["nbytes"] + 16 + 68 + 24
    assert {f["code"] for f in document["findings"]} == {"renamed", "dropped", "left-out", "written-out"}
    assert os.listdir() == ["model.pth"]


def test_what_is_planned_is_done(source: Path, convert) -> None:
    for name in ("out.safetensors", "out.pth"):
        planned, done = (
            json.loads(convert(source, name, *OPTIONS, "--no-receipt", "--json", *dry).out)
            for dry in (["--dry-run"], [])
        )
        assert (done["written"], done["checked"]) == (True, True)
        assert Path(name).stat().st_size == planned["plan"]["nbytes"]
        for key in ("plan", "renames", "dropped", "casts", "gathered", "compacted", "operations"):
            assert planned[key] == done[key]
        assert [f for f in done["findings"] if not f["code"].startswith("cast-")] == planned["findings"]


def test_as_text(source: Path, convert) -> None:
    done = convert(source, "out.safetensors", *OPTIONS, "--dry-run")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("out.safetensors: safetensors, 5 tensors, ")
    assert lines[1].split() == ["moved", "as", "steps", "bytes"]
    assert [line.split() for line in lines[2:5]] == [
        ["copies", "1", "16"],
        ["casts", "2", "68"],
        ["gathers", "1", "24"],
    ]
    for line in (
        "tied: tied = w",
        "rename: module.w -> w",
        "drop: module.head.weight",
        "cast: w  float32 -> float16",
        "gather: t",
    ):
        assert line in lines
    assert lines[-1] == "dry run: nothing was written"
    assert "info: not in the output: epoch, optimizer_name [left-out]" in done.err
    quiet = convert(source, "out.safetensors", *OPTIONS, "--dry-run", "-q")
    assert (quiet.out, quiet.err) == (done.out, "")
    compact = convert(source, "out.pth", "--dry-run")
    assert "compact: 1 storage, 3.96 kB that no tensor uses" in compact.out
    assert os.listdir() == ["model.pth"]


def test_long_lists_are_cut_in_text_alone(save, convert) -> None:
    path = save({f"module.{i}": torch.ones(1) for i in range(500)})
    done = convert(path, "out.pth", "--strip-module", "--dry-run")
    assert "rename: and 490 more (--json lists all)" in done.out
    assert len(done.out.splitlines()) < 30
    document = json.loads(convert(path, "out.pth", "--strip-module", "--dry-run", "--json").out)
    assert len(document["renames"]) == 500


def test_a_plan_that_cannot_be_carried_out_is_an_error(source: Path, refused) -> None:
    for options in (
        ["out.safetensors"],
        ["out.pth", "--rename", "w$=>tied"],
        ["out.pth", "--include", "zzz"],
        ["out.pth", "--tied", "error"],
        ["out.nonsense"],
        ["out.pth", "--dtype", "int8"],
    ):
        assert refused(source, *options, "--dry-run").startswith("ckptkit: error: ")


def test_a_dry_run_does_not_mind_what_is_there(source: Path, convert) -> None:
    Path("out.pth").write_bytes(b"precious")
    assert convert(source, "out.pth", "--dry-run").code == 0
    assert Path("out.pth").read_bytes() == b"precious"


def test_a_dry_run_reads_no_tensor(source: Path, convert) -> None:
    data = bytearray(source.read_bytes())
    at = data.index(torch.ones(2, 2).numpy().tobytes())
    data[at] ^= 1
    source.write_bytes(data)
    assert convert(source, "out.pth", "--dry-run").code == 0
    assert convert(source, "out.pth").code == 2
    assert os.listdir() == ["model.pth"]


# The output as a file.


@pytest.mark.parametrize(
    ("name", "to", "is_zip"),
    [
        ("out.bin", "safetensors", False),
        ("out.weights", "safetensors", False),
        ("out.safetensors", "torch-zip", True),
        ("out.safetensors", "pth", True),
        ("out", "pt", True),
        ("out.ckpt", None, True),
        ("OUT.PT", None, True),
        ("Out.SafeTensors", None, False),
    ],
)
def test_the_container(save, convert, agree, name: str, to: str | None, is_zip: bool) -> None:
    state = {"w": torch.arange(3.0)}
    done = convert(save(state), name, *(["--to", to] if to else []))
    assert done.code == 0, done.err
    with open(name, "rb") as file:  # torch.load goes by endings, too
        agree(torch.load(file) if is_zip else load_file(name), state)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["out.h5"],
            "the extension '.h5' does not belong to a known container; use .pth, .pt, .pkl, .ckpt, .bin, "
            ".safetensors, or --to",
        ),
        (["out"], "the extension '' does not belong to a known container"),
        (["out.pth", "--to", "onnx"], "unknown container 'onnx'; choose from: torch-zip, safetensors"),
        (["folder.pth"], "folder.pth: "),
        (
            ["nowhere/out.pth"],
            "nowhere/out.pth: cannot be written: the folder nowhere does not exist; create it first: mkdir -p nowhere",
        ),
        (["out.pth", "--bogus"], "No such option"),
        ([], "Missing argument 'DST'"),
    ],
)
def test_bad_destinations(save, refused, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    assert words.lower() in refused(save({"w": torch.ones(1)}), *arguments).lower()


def test_force(source: Path, convert, refused) -> None:
    Path("out.pth").write_bytes(b"precious")
    assert refused(source, "out.pth") == "ckptkit: error: out.pth: already exists; --force overwrites it"
    assert Path("out.pth").read_bytes() == b"precious"
    assert convert(source, "out.pth", "--force").code == 0
    assert torch.load("out.pth")["epoch"] == 3
    assert sorted(os.listdir()) == ["model.pth", "out.pth"]


def test_onto_itself(source: Path, refused, convert) -> None:
    before = torch.load(source)
    assert "already exists" in refused(source, source, "--strip-module")
    assert convert(source, source, "--strip-module", "--force").code == 0
    after = torch.load(source)
    assert list(after["state_dict"]) == [name.removeprefix("module.") for name in before["state_dict"]]


def test_the_mode_follows_the_umask(source: Path, convert) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            assert convert(source, "out.pth", "--force").code == 0
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.stat("out.pth").st_mode) == mode
        os.unlink("out.pth")


def test_no_check_moves_the_same_bytes(source: Path, convert, agree) -> None:
    for name in ("a.pth", "a.safetensors"):
        options = ["--weights-only", "--strip-module"]
        assert convert(source, name, *options).code == 0
        done = convert(source, f"b{name}", *options, "--no-check")
        assert done.code == 0
        assert done.out.rstrip().endswith("not compared")
    agree(torch.load("ba.pth"), torch.load("a.pth"))
    agree(load_file("ba.safetensors"), load_file("a.safetensors"))
    with ckptkit.open("ba.pth") as file:  # storages whose sums the source had recorded keep them
        assert {e.storage.crc32 is None for name, e in file.state_dict.items() if name != "big"} == {False}
    assert convert("ba.pth", "again.pth").code == 0


def test_no_check_notices_no_damage(source: Path, convert, refused) -> None:
    data = bytearray(source.read_bytes())
    data[data.index(torch.arange(24.0).numpy().tobytes())] ^= 1
    source.write_bytes(data)
    assert "module.w: the bytes have CRC-32" in refused(source, "out.pth")
    assert convert(source, "out.pth", "--no-check").code == 0
    assert "the file is damaged" in refused("out.pth", "again.pth")


def test_quiet(source: Path, convert) -> None:
    done = convert(source, "out.safetensors", *OPTIONS, "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    loud = convert(source, "loud.safetensors", *OPTIONS)
    assert loud.out.startswith("loud.safetensors: safetensors, 5 tensors, ")
    assert loud.out.endswith("compared byte for byte after the cast\n")
    assert {line.rpartition("[")[2] for line in loud.err.splitlines()} >= {"renamed]", "dropped]", "left-out]"}
    quiet_error = convert("no.pth", "out.pth", "-q")
    assert (quiet_error.code, quiet_error.out) == (2, "")
    assert quiet_error.err == "ckptkit: error: no.pth: no such file\n"


def test_in_python(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    report: Any = ckptkit.convert(source, target, to="safetensors", weights_only=True, dry_run=True, check=False)
    assert (report.details["written"], report.details["plan"]["format"]) == (False, "safetensors")
    assert not target.exists()
    with pytest.raises(ckptkit.DestinationExistsError):
        ckptkit.convert(source, source)
    ckptkit.convert(source, target, to="safetensors", weights_only=True)
    assert "module.w" in load_file(target)


def test_a_plan_is_shown_in_a_line(save, tmp_path: Path) -> None:
    path = save({f"layer.{n}.weight": torch.ones(4) for n in range(500)})
    with ckptkit.open(path) as file:
        assert repr(file.save(tmp_path / "a.pth")).startswith("<Plan of torch-zip: 500 tensors, ")
        sharded = file.plan(tmp_path / "b.safetensors", max_shard_size="20kB")
    assert repr(sharded).endswith(f" in {len(sharded.shards)} shards>")
    assert len(repr(sharded)) < 100
