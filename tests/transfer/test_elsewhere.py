"""Where Linux's and POSIX's own calls are missing, and no open file can be replaced or removed: as on Windows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import elsewhere

linux_only = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="is simulated where /proc tells open files")

STATE = {
    "a.weight": torch.arange(300.0).view(15, 20),
    "a.bias": torch.ones(20),
    "b": torch.arange(600).view(2, 300).t(),
}
"""Plain, and one that has to be gathered."""


def run(folder: Path, *commands: list[str]) -> list[str]:
    """Each command's exit code and what it told."""
    script = Path(elsewhere.__file__)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(commands)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert not done.stderr.count("Traceback"), done.stderr
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert len(codes) == len(commands), (done.stdout, done.stderr)
    return [f"{code} {done.stderr}" if code != "0" else code for code in codes]


def same(path: Path, state: dict[str, torch.Tensor] = STATE) -> bool:
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "a.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    return tmp_path


@linux_only
def test_the_lock_is_that_of_the_simulation(folder: Path) -> None:
    code = """if True:
        import os, elsewhere
        elsewhere.take_away()
        file = open("a.pth")
        for action, *paths in (os.replace, "a.pth", "x"), (os.replace, "old.pth", "a.pth"), (os.unlink, "a.pth"):
            try:
                action(*paths)
            except PermissionError:
                print("held")
        file.close()
        os.replace("old.pth", "a.pth")
        print(hasattr(os, "pread"))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(elsewhere.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["held", "held", "held", "False"], done.stderr


@linux_only
def test_reading_and_writing(folder: Path) -> None:
    """And that goldens are written over: in the same process, which imports torch for both."""
    (folder / "model.py").write_text("import torch\ndef make(): return torch.nn.Linear(4, 3)\n")
    torch.save(torch.nn.Linear(4, 3).state_dict(), folder / "l.pth")
    verify = ["verify", "l.pth", "--model", "model.py:make", "--input-shape", "1,4"]
    codes = run(
        folder,
        ["inspect", "a.pth", "old.pth"],
        ["convert", "a.pth", "b.safetensors"],
        ["convert", "old.pth", "b.pth", "--no-check"],
        ["convert", "a.pth", "half.safetensors", "--dtype", "float16"],
        ["diff", "a.pth", "b.safetensors"],
        ["check", "a.pth", "b.safetensors", "--no-nan"],
        ["manifest", "a.pth", "-o", "lock.json"],
        ["check", "--manifest", "lock.json"],
        ["manifest", "b.safetensors", "-o", "lock.json", "--force"],
        ["load", "b.safetensors", "3"],
        ["load", "old.pth", "3"],
        [*verify, "--write-golden", "g.safetensors"],
        [*verify, "--write-golden", "g.safetensors", "--force"],
        [*verify[:4], "--golden", "g.safetensors"],
    )
    assert set(codes) == {"0"}, codes
    assert same(folder / "b.safetensors")
    assert same(folder / "b.pth")
    assert json.loads((folder / "lock.json").read_text())["files"][0]["path"] == "b.safetensors"


@linux_only
@pytest.mark.parametrize("check", [[], ["--no-check"]], ids=["checked", "unchecked"])
def test_what_exists_is_replaced_and_in_place_too(folder: Path, check: list[str]) -> None:
    codes = run(
        folder,
        ["convert", "a.pth", "b.safetensors", *check],
        ["convert", "a.pth", "b.safetensors", *check],
        ["convert", "a.pth", "b.safetensors", "--force", *check],
        ["convert", "a.pth", "a.pth", "--force", *check],
        ["convert", "old.pth", "old.pth", "--force", "--add-prefix", "m.", *check],
        ["convert", "b.safetensors", "b.safetensors", "--force", *check],
    )
    assert [code[0] for code in codes] == ["0", "2", "0", "0", "0", "0"], codes
    assert "b.safetensors: already exists; --force overwrites it" in codes[1]
    assert same(folder / "b.safetensors")
    assert same(folder / "a.pth")
    assert same(folder / "old.pth", {f"m.{name}": value for name, value in STATE.items()})
    assert sorted(os.listdir(folder)) == ["a.pth", "b.safetensors", "old.pth"]


@linux_only
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_shards_are_written_replaced_and_merged(folder: Path, ending: str) -> None:
    name = f"s.{ending}"
    codes = run(
        folder,
        ["convert", "a.pth", name, "--max-shard-size", "3kB"],
        ["convert", "a.pth", name, "--max-shard-size", "3kB", "--force"],
        ["inspect", f"{name}.index.json"],
        ["convert", f"{name}.index.json", name, "--max-shard-size", "3kB", "--force"],  # in place
        ["convert", f"{name}.index.json", name, "--max-shard-size", "2kB", "--force"],  # in place, others
        ["convert", f"{name}.index.json", f"whole.{ending}"],
        ["diff", "a.pth", f"{name}.index.json"],
    )
    assert set(codes) == {"0"}, codes
    assert same(folder / f"whole.{ending}")
    left = [item for item in os.listdir(folder) if item.startswith(("s-", ".s", ".a"))]
    index = json.loads((folder / f"{name}.index.json").read_text())
    assert sorted(left) == sorted(set(index["weight_map"].values())), (
        "no shard of before, and no temporary file, is left"
    )


@linux_only
def test_folders(folder: Path) -> None:
    into = ["convert", ".", "out/new", "--to", "safetensors"]
    assert run(folder, into, ["convert", ".", ".", "--to", "torch-zip", "--force"]) == ["0", "0"]
    assert run(folder, into)[0].startswith("2 ")
    assert same(folder / "out/new/a.safetensors") and same(folder / "old.pth") and same(folder / "out/new/a.pth")
