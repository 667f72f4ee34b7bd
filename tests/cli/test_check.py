"""``ckptkit check`` as it is typed: its screen, its outputs, its exit codes, its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import ckptkit
from ckptkit.cli.check import RENDERERS, command
from ckptkit.errors import CkptkitError

WEIGHTS = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.zeros(3)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two files."""
    monkeypatch.chdir(tmp_path)
    torch.save(WEIGHTS, "a.pth")
    save_file(WEIGHTS, "b.safetensors")
    return tmp_path


def check(*arguments: str, code: int = 0) -> str:
    """What is on stdout, once the exit code is the one expected."""
    done = CliRunner().invoke(command, arguments, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert done.return_value == code, done.output
    return done.stdout


def test_a_line_a_file_and_the_verdict_last() -> None:
    lines = check("a.pth", "b.safetensors").splitlines()
    assert lines[0].startswith("a.pth: ok (") and lines[0].endswith("; readable, max-trust, whole)")
    assert lines[1].startswith("b.safetensors: ok (")
    assert lines[2:] == ["2 files passed"]


def test_a_failure_says_rule_expected_found_and_fix() -> None:
    lines = check(".", "--no-pickle", code=1).splitlines()
    assert lines[0].startswith("a.pth: FAILED (")
    assert lines[1].startswith("  error: no-pickle: ") and lines[1].endswith("[pickle-not-allowed]")
    assert [line.strip() for line in lines[2:5]] == [
        "expected: no pickle",
        "found: torch-zip",
        "fix: ckptkit convert a.pth a.safetensors",
    ]
    assert lines[5].startswith("b.safetensors: ok") and lines[6] == "1 of 2 files failed"


def test_the_document_is_that_of_python() -> None:
    Path("c.pth").write_bytes(b"not a checkpoint")
    Path("notes.txt").write_text('"files": [], "findings": []')
    for options in ({}, {"no_pickle": True}, {"skip_others": True, "part": "2/3"}):
        arguments = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is True]
        arguments += ["--part", "2/3"] * ("part" in options)
        report = ckptkit.check(["."], **options)
        assert check(".", *arguments, "--json", code=report.exit_code) == json.dumps(report.to_dict()) + "\n"


def test_quiet_shows_only_what_is_wrong() -> None:
    assert check(".", "-q") == ""
    assert check(".", "-q", "--no-pickle", code=1).splitlines()[0].startswith("a.pth: FAILED")


def test_colour() -> None:
    assert "\x1b[" not in check(".")
    assert "\x1b[32m" in check(".", "--color", "always")


def test_what_cannot_be_read_is_2() -> None:
    Path("c.pth").write_bytes(b"not a checkpoint")
    lines = check(".", code=2).splitlines()
    assert "c.pth: NOT CHECKED" in lines and lines[-1] == "1 of 3 files could not be checked, 2 passed"
    check("nope.pth", code=2)


def test_the_verdict_counts_each_outcome() -> None:
    for number in range(5):
        torch.save(WEIGHTS, f"p{number}.pth")
    save_file(WEIGHTS, "c.safetensors")
    for name in ("u.ckpt", "v.safetensors"):
        Path(name).write_bytes(b"")
    last = check(".", "--no-pickle", code=2).splitlines()[-1]
    assert last == "6 of 10 files failed, 2 could not be checked, 2 passed"


def test_what_is_passed_over_is_counted() -> None:
    Path("README.md").write_text("# weights")
    Path("notes").write_text("words")
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9))
    lines = check(".").splitlines()
    assert lines[-2:] == ["skipped: 3 files (2 text files, 1 PNG image)", "2 files passed"]
    assert check(".", "-q") == ""
    assert json.loads(check(".", "--json"))["passed_over"] == {"text file": 2, "PNG image": 1}
    for output, begins in (("github", ""), ("markdown", "\nS")):
        assert f"{begins or 's'}kipped: 3 files (2 text files, 1 PNG image)" in check(".", "--format", output)


def test_others_are_skipped_where_that_is_asked_for() -> None:
    for name, content in {"b.txt": b"words", "c.py": b"import os\n", "d.bin": b"words"}.items():
        Path(name).write_bytes(content)
    Path("e").write_bytes(Path("a.pth").read_bytes())
    named = ("b.txt", "c.py", "d.bin")
    check(*named, code=2)
    assert check(*named, "--skip-others").splitlines() == [
        "skipped: 3 files (3 text files)",
        "there is no checkpoint among the files",
    ]
    assert json.loads(check(*named, "--skip-others", "--json"))["ok"] is True
    lines = check(*named, "a.pth", "e", "--skip-others").splitlines()
    assert lines[-1] == "2 files passed" and [line[:4] for line in lines[:2]] == ["a.pt", "e: o"]
    check(*named, "e", "--skip-others", "--no-pickle", code=1)
    check(*named, "nope.txt", "--skip-others", code=2)
    Path("f.pth").write_bytes(b"words")
    check("f.pth", "--skip-others", code=2)
    Path("empty").mkdir()
    check("b.txt", "empty", "--skip-others", code=2)


def test_a_shard_or_a_file_named_twice_is_one_result() -> None:
    ckptkit.convert("a.pth", "s.safetensors.index.json", max_shard_size=20)
    shard, other = sorted(str(path) for path in Path().glob("s-*"))
    lines = check(shard, code=0).splitlines()
    assert lines[0].startswith("s.safetensors.index.json: ok")
    assert f"checked in place of {shard}" in lines[1] and "[whole-checked]" in lines[1]
    assert lines[-1] == "1 file passed"
    for named in ([shard, other], [shard, "s.safetensors.index.json"], [".//" + shard, shard, "."]):
        document = json.loads(check(*named, "--json"))
        assert [file["path"] for file in document["files"]].count("s.safetensors.index.json") == 1
        assert not any(file["path"].endswith(shard) for file in document["files"])
    check("a.pth", "./a.pth", "--json")
    assert json.loads(check("a.pth", "./a.pth", "--json"))["checked"] == 1
    ckptkit.manifest(".", "lock.json")
    assert check(shard, "--manifest", "lock.json").splitlines()[-1] == "1 file passed"


def test_one_argument_that_cannot_be_read_does_not_hide_the_others(open_folder: Path, unprivileged) -> None:
    for name in ("shut.pth", "good.pth"):
        torch.save(WEIGHTS, open_folder / name)
    (open_folder / "shut.pth").chmod(0)
    (open_folder / "below").mkdir()
    (open_folder / "below").chmod(0)
    paths = [str(open_folder / name) for name in ("good.pth", "shut.pth", "below")]

    def run() -> str:
        done = CliRunner().invoke(command, paths, standalone_mode=False)
        return f"{done.return_value} {done.exception} {done.stdout}"

    shown = unprivileged(run)
    assert shown.startswith("2 None ")
    assert f"{paths[0]}: ok" in shown and f"{paths[1]}: NOT CHECKED" in shown and f"{paths[2]}: NOT CHECKED" in shown
    assert shown.splitlines()[-1] == "2 of 3 files could not be checked, 1 passed"


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(CkptkitError, match="nothing to check"):
        check()


def test_manifest() -> None:
    ckptkit.manifest(["a.pth", "b.safetensors"], "weights.lock.json")
    assert check("--manifest", "weights.lock.json").splitlines()[-1] == "2 files passed"
    torch.save({**WEIGHTS, "fc.bias": torch.ones(3)}, "a.pth")
    shown = check("--manifest", "weights.lock.json", code=1)
    assert "[tensors-differ]" in shown and "1 with different values (fc.bias)" in shown
    Path("a.pth").unlink()
    assert "a.pth: FAILED\n" in check("--manifest", "weights.lock.json", code=1)


@pytest.mark.parametrize("output", sorted(RENDERERS.keys() - {"text"} | {"json"}))
def test_every_output_is_what_its_renderer_gives(output: str) -> None:
    shown = check(".", "--no-pickle", "--format", output, code=1)
    assert "pickle-not-allowed" in shown and "a.pth" in shown
    assert "\x1b" not in check(".", "--format", output, "--color", "always")


def test_json() -> None:
    document = json.loads(check(".", "--no-pickle", "--json", code=1))
    assert (document["schema_version"], document["ok"], document["checked"]) == (1, False, 2)
    (finding,) = document["findings"]
    assert (finding["path"], finding["rule"], finding["code"]) == ("a.pth", "no-pickle", "pickle-not-allowed")
    assert json.loads(check(".", "--format", "json"))["ok"] is True


def test_an_error_is_a_document_too() -> None:
    done = CliRunner().invoke(command, ["--manifest", "nope.json", "--json"], standalone_mode=False)
    assert isinstance(done.exception, CkptkitError)
    assert json.loads(done.stdout)["error"]["type"] == "MissingFileError"


def test_the_name_of_a_container_as_format_is_a_policy() -> None:
    shown = check(".", "--format", "safetensors", "--format", "github", code=1)
    assert shown.startswith("::error file=a.pth") and "container-not-allowed" in shown
    check(".", "--format", "safetensors", "--require-format", "torch-zip")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "yaml"],
        ["--allow-dtype", "float31"],
        ["--require-format", "zip"],
        ["--max-trust", "hostile"],
        ["--input-shape", "1,x"],
        ["--model-arg", "x"],
    ],
)
def test_bad_usage(run, arguments: list[str], folder: Path) -> None:
    done = run("check", "a.pth", *arguments, cwd=folder)
    assert done.returncode == 2 and done.stdout == "" and arguments[0] in done.stderr


def test_the_nearest_configuration_holds(run, folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "pyproject.toml").write_text("[tool.ckptkit]\nno-pickle = true\npaths = ['.']\n")
    done = run("check", cwd=folder / "deep")
    assert done.returncode == 1 and "../a.pth: FAILED" in done.stdout
    (folder / "other.toml").write_text("max-size = 1\n")
    shown = check("a.pth", "--config", "other.toml", code=1)
    assert "file-too-large" in shown and "pickle-not-allowed" not in shown
    (folder / "pyproject.toml").write_text("[tool.ckptkit]\nno-pickles = true\n")
    done = run("check", "a.pth", cwd=folder)
    assert done.returncode == 2
    told = "pyproject.toml: [tool.ckptkit] has an unknown key 'no-pickles'; did you mean no-pickle?"
    assert done.stderr == f"ckptkit: error: {told}\n"


def test_without_torch_a_model_is_a_line_and_2(run, folder: Path) -> None:
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    env = {"PYTHONPATH": f"{folder}:{Path(ckptkit.__file__).parent.parent}"}
    assert run("check", "a.pth", "--no-nan", "--no-pickle", cwd=folder, env=env).returncode == 1, "needs no torch"
    for option in (["--fits", "torchvision:resnet18"], ["--forward"]):
        done = run("check", "a.pth", *option, cwd=folder, env=env)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and "torch, which is not installed" in done.stderr


def test_names_from_a_file_do_not_reach_the_terminal() -> None:
    torch.save({"w\x1b[31m": torch.tensor(float("nan"))}, "a.pth")
    assert "\x1b" not in check("a.pth", "--no-nan", code=1)
