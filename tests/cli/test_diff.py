"""``ckptkit diff``: exit codes, text, JSON and markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with ``a.pth``, its equal ``same.pth``, ``b.pth`` with another head, ``ddp.pth`` wrapped."""
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "same.pth")
    torch.save({**state, "1.weight": state["1.weight"] + 0.25, "1.bias": state["1.bias"] * 2}, tmp_path / "b.pth")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.pth")
    return tmp_path


SUMMARY = r"ckptkit: 4 tensors of 268 B in A and 268 B in B compared in (under )?\d\.\d s\n"


def test_equal(run, files: Path) -> None:
    done = run("diff", "a.pth", "same.pth")
    assert done.returncode == 0
    assert re.fullmatch(SUMMARY, done.stderr)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("A  a.pth: torch-zip, state dict, ")
    assert lines[1].startswith("B  same.pth: torch-zip, ")
    assert lines[2:] == ["same: all 4 tensors are bit-identical"]


def test_different(run, files: Path) -> None:
    done = run("diff", "a.pth", "b.pth")
    assert done.returncode == 1
    assert re.fullmatch(SUMMARY, done.stderr)
    assert "different: only 1 changed; 2 of 4 tensors are bit-identical" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["1", "2", "of", "2", "2", "changed"] in [row[:6] for row in rows]
    row = next(row for row in rows if row[:1] == ["1.weight"])
    assert row[1:7] == ["float32", "[3,", "8]", "0.25", "0.25", row[6]]
    assert row[-1] == "0.0%"


def test_top(run, files: Path) -> None:
    done = run("diff", "a.pth", "b.pth", "--top", "1")
    assert "and 1 more (--top 2, or --json)" in done.stdout
    assert len(json.loads(run("diff", "a.pth", "b.pth", "--top", "1", "--json").stdout)["changed"]) == 2


def test_json(run, files: Path) -> None:
    done = run("diff", "a.pth", "b.pth", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert (document["schema_version"], document["equal"], document["unchanged"]) == (1, False, 2)
    assert {row["name"] for row in document["changed"]} == {"1.weight", "1.bias"}
    promised = {"a", "b", "added", "removed", "renamed", "reshaped", "recast", "changed", "metadata"}
    assert promised <= document.keys()
    assert run("diff", "a.pth", "b.pth", "--format", "json").stdout == done.stdout


def test_markdown(run, files: Path) -> None:
    torch.save({"a|b`c": torch.ones(2), "<b>": torch.ones(3)}, files / "odd.pth")
    torch.save({"a|b`c": torch.zeros(2), "<b>": torch.ones(3)}, files / "other.pth")
    done = run("diff", "odd.pth", "other.pth", "--format", "markdown")
    assert done.returncode == 1
    assert done.stdout.startswith("## Different: only a\\|b\\`c changed; 1 of 2 tensors is bit-identical\n")
    assert "| `a\\|b'c` | float32 | \\[2\\] | 1 | 1 | 1 | - | 0.0% |  |" in done.stdout
    done = run("diff", "a.pth", "ddp.pth", "--format", "markdown", "--top", "2")
    assert "<details><summary>renamed: 4 tensors</summary>" in done.stdout
    assert done.stdout.count("\nand 2 more") == 1
    assert "Fix: `ckptkit diff a.pth ddp.pth --strip-module`" in done.stdout


def test_strip_module(run, files: Path) -> None:
    done = run("diff", "a.pth", "ddp.pth")
    assert done.returncode == 1
    assert "4 tensors have another name and the same bits" in done.stdout
    assert "ckptkit diff a.pth ddp.pth --strip-module" in done.stdout
    assert run("diff", "a.pth", "ddp.pth", "--strip-module").returncode == 0


def test_tolerance(run, files: Path) -> None:
    assert run("diff", "a.pth", "b.pth", "--atol", "0.5").returncode == 0
    done = run("diff", "a.pth", "b.pth", "--atol", "0.26", "--rtol", "0.5")
    assert done.returncode == 0
    assert "2 of 4 tensors are bit-identical, the others are within tolerance" in done.stdout
    assert run("diff", "a.pth", "b.pth", "--atol", "-1").returncode == 2


def test_strict(run, files: Path) -> None:
    state = torch.load(files / "a.pth")
    torch.save({"state_dict": state, "epoch": 4}, files / "resume.pth")
    done = run("diff", "resume.pth", "a.pth")
    assert done.returncode == 0
    assert "training state\n  key    A  B\n  epoch  4  -\n" in done.stdout
    assert run("diff", "resume.pth", "a.pth", "--strict").returncode == 1


def test_whole_trees(run, files: Path) -> None:
    state = torch.load(files / "a.pth")
    for name, beta in (("one", 0.999), ("two", 0.99)):
        groups = [{"lr": 0.1, "betas": (0.9, beta)}]
        torch.save({"model": state, "optim": {"state": {}, "param_groups": groups}, "epoch": 4}, files / f"{name}.pth")
    done = run("diff", "one.pth", "two.pth")
    assert done.returncode == 0
    lines = done.stdout.partition("elsewhere in the files\n")[2].splitlines()
    assert [line.split() for line in lines] == [
        ["place", "A", "B", "max", "|b-a|"],
        ["optim.param_groups.0.betas.1", "0.999", "0.99", "-"],
    ]
    done = run("diff", "one.pth", "two.pth", "--strict", "--json")
    assert done.returncode == 1
    row = {"path": "optim.param_groups.0.betas.1", "what": "value", "a": "0.999", "b": "0.99", "max_abs": None}
    assert json.loads(done.stdout)["tree"] == [row]
    long = {f"k{i}": i for i in range(3000)}
    torch.save({"model": state, "x": {"y": long}}, files / "long.pth")
    torch.save({"model": state, "x": {"y": {key: -1 - i for key, i in long.items()}}}, files / "other.pth")
    assert "and 2,990 more" in run("diff", "long.pth", "other.pth").stdout


def test_sections(run, files: Path) -> None:
    first, second = torch.load(files / "a.pth"), torch.load(files / "b.pth")
    torch.save({"g": first, "d": second}, files / "gan.pth")
    assert run("diff", "gan.pth", "a.pth").returncode == 2
    assert run("diff", "gan.pth", "a.pth", "--section-a", "g").returncode == 0
    assert run("diff", "b.pth", "gan.pth", "--section-b", "d").returncode == 0
    assert run("diff", "gan.pth", "gan.pth", "--section-a", "g", "--section-b", "d").returncode == 1
    assert run("diff", "gan.pth", "gan.pth", "--section", "d").returncode == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b"version https://git-lfs.github.com/spec/v1\n", None],
    ids=["empty", "zeros", "pointer", "missing"],
)
def test_what_is_no_checkpoint(run, files: Path, content: bytes | None) -> None:
    if content is not None:
        (files / "bad.pth").write_bytes(content)
    for pair in (("a.pth", "bad.pth"), ("bad.pth", "a.pth"), ("bad.pth", "bad.pth")):
        done = run("diff", *pair)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("ckptkit: error: bad.pth: ")
    document = json.loads(run("diff", "a.pth", "bad.pth", "--json").stdout)
    assert document["error"]["message"].startswith("bad.pth: ")


def test_nothing_to_compare(run, files: Path) -> None:
    torch.save({"epoch": 1}, files / "none.pth")
    done = run("diff", "none.pth", "none.pth")
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither contains a tensor, so there is nothing to compare" in done.stderr


def test_control_characters_do_not_reach_the_terminal(run, files: Path) -> None:
    torch.save({"w\x1b[2J": torch.ones(1), "v": torch.ones(2)}, files / "odd.pth")
    torch.save({"w\x1b[2J": torch.zeros(1), "v": torch.ones(2)}, files / "other.pth")
    for output in ("text", "markdown"):
        done = run("diff", "odd.pth", "other.pth", "--format", output)
        assert done.returncode == 1
        assert "\x1b" not in done.stdout


def test_color(run, files: Path) -> None:
    assert "\x1b[" in run("diff", "a.pth", "b.pth", "--color", "always").stdout
    assert "\x1b[" not in run("diff", "a.pth", "b.pth").stdout


def test_progress(run, files: Path) -> None:
    assert "100%" in run("diff", "a.pth", "b.pth", "--progress").stderr
    assert run("diff", "a.pth", "b.pth", "--progress", "-q").stderr == ""


def test_sizes_are_of_the_weights_and_what_one_lacks_is_not_compared(run, files: Path) -> None:
    shared = torch.ones(100)
    torch.save({"a": shared, "b": shared}, files / "tied.pth")
    torch.save({"a": shared, "b": shared.clone(), "c": shared.clone()}, files / "more.pth")
    torch.save([torch.ones(2), torch.ones(3)], files / "list.pth")
    for pair, lines, last in (
        (
            ("tied.pth", "tied.pth"),
            ("2 tensors of 400 B", "2 tensors of 400 B"),
            "2 tensors of 400 B in A and 400 B in B",
        ),
        (
            ("tied.pth", "more.pth"),
            ("2 tensors of 400 B", "3 tensors of 1.2 kB"),
            "2 of 3 tensors of 400 B in A and 1.2 kB in B",
        ),
        (("list.pth", "list.pth"), ("collection", "collection"), "2 tensors"),
        (("tied.pth", "list.pth"), ("2 tensors of 400 B", "collection"), "0 of 4 tensors"),
    ):
        done = run("diff", *pair)
        assert all(f"{part}," in line for part, line in zip(lines, done.stdout.splitlines(), strict=False)), pair
        assert done.stderr.startswith(f"ckptkit: {last} compared in "), pair
