"""``ckptkit verify`` as it is typed: its screen, its document, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from ckptkit.cli.verify import command
from ckptkit.errors import CkptkitError
from ckptkit.report import SCHEMA_VERSION

NET = """
import torch

def build(width=4):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's code, its weights in two containers, and weights that are a little and very different."""
    (tmp_path / "net.py").write_text(NET)
    space: dict[str, Any] = {}
    exec(NET, space)  # noqa: S102
    weights = space["build"]().state_dict()
    torch.save(weights, tmp_path / "net.pth")
    save_file({f"module.{k}": v for k, v in weights.items()}, tmp_path / "ddp.safetensors")
    torch.save({**weights, "2.bias": weights["2.bias"] + 1}, tmp_path / "other.pth")
    torch.save({**weights, "0.bias": weights["0.bias"] * torch.nan}, tmp_path / "broken.pth")
    torch.save(space["build"](), tmp_path / "whole.pth")
    return tmp_path


def verify(folder: Path, name: str, *arguments: object, code: int = 0, model: bool = True) -> str:
    """What is on stdout, once the exit code is the one expected."""
    given = ["--model", f"{folder / 'net.py'}:build"] if model else []
    shape = [] if "--golden" in arguments or "--input" in arguments else ["--input-shape", "1,3"]
    done = invoke(folder / name, *given, *shape, "--device", "cpu", *arguments)
    assert done.return_value == code if isinstance(done.return_value, int) else done.exit_code == code, done.output
    return done.stdout


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)


def test_one_line_a_check_and_the_verdict_last(folder: Path) -> None:
    lines = verify(folder, "net.pth").splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["fit", "load", "weights", "forward", "behaviour"]
    assert {line.split()[1] for line in lines[:-1]} == {"ok"}
    column = lines[0].index("4 of 4 tensors")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines[:-1])
    assert lines[-1] == f"{folder / 'net.pth'}: passed against {folder / 'net.py'}:build"
    assert len(lines) < 25


def test_a_failure_is_marked_and_is_1(folder: Path) -> None:
    lines = verify(folder, "broken.pth", code=1).splitlines()
    marked = [line for line in lines if " error " in line]
    assert any("[weights-not-finite]" in line and line.startswith("weights") for line in marked)
    assert any("[output-not-finite]" in line and line.startswith("forward") for line in marked)
    assert lines[-1].split(": ")[-1].startswith("FAILED")


def test_no_forward(folder: Path) -> None:
    lines = verify(folder, "net.pth", "--no-forward").splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["fit", "load", "weights"]


def test_the_document(folder: Path) -> None:
    document = json.loads(verify(folder, "net.pth", "--json", "--against", folder / "ddp.safetensors"))
    assert document["schema_version"] == SCHEMA_VERSION and document["ok"] is True
    checks = {check["name"]: check for check in document["checks"]}
    assert list(checks) == ["fit", "load", "weights", "forward", "behaviour", "devices", "golden", "against"]
    assert not checks["golden"]["run"] and checks["against"]["run"]
    assert checks["against"]["codes"] == ["against-unwrapped", "against-equal"]
    assert checks["against"]["figures"]["outputs"][0]["equal"] is True
    assert [step["name"] for step in document["steps"]] == ["build", *checks]
    assert {"seconds", "peak_memory_nbytes"} <= set(document)
    assert document["outputs"][0]["mean"] is not None


def test_a_check_that_failed_is_not_called_ok(folder: Path) -> None:
    lines = verify(folder, "ddp.safetensors", code=1).splitlines()
    assert lines[0].split()[:2] == ["fit", "failed"]
    (load,) = [line for line in lines if line.startswith("load")]
    assert load.split()[1:3] == ["not", "loaded"]
    assert "ok" not in {word for line in lines[:-1] for word in line.split()[:2]}


def test_what_is_advised_keeps_how_the_weights_were_taken(folder: Path) -> None:
    weights = torch.load(folder / "net.pth")
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    wide = {f"module.old.{name}": tensor for name, tensor in weights.items()}
    torch.save({"a": wide, "b": {name: torch.zeros(1) for name in "xy"}, "epoch": 1}, folder / "two.pth")

    def told(name: str, words: str) -> list[str]:
        arguments = [str(folder / name), "--model", f"{folder / 'net.py'}:build"]
        arguments += ["--section", "a", "--strip-module", "--no-forward"]
        text = CliRunner().invoke(command, arguments, standalone_mode=False).stdout
        (fix,) = [line.split() for line in text.splitlines() if words in line]
        return fix

    fix = told("two.pth", "ckptkit convert")
    assert fix[4:] == ["--section", "a", "--strip-module", "--strip-prefix", "old.", "--weights-only"]
    torch.save({"a": wrapped, "b": {**weights, "0.bias": weights["0.bias"] + 1}}, folder / "both.pth")
    fix = told("both.pth", "ckptkit verify")
    assert fix[-3:] == ["--strip-module", "--section", "b"]


def test_against_another(folder: Path) -> None:
    text = verify(folder, "net.pth", "--against", folder / "other.pth", code=1)
    assert "against    error    outputs of" in text and "they diverge at `2` [against-differs]" in text
    verify(folder, "net.pth", "--against", folder / "other.pth", "--rtol", "10")
    verify(folder, "net.pth", "--against", folder / "other.pth", "--atol", "2")


def test_golden_files(folder: Path) -> None:
    golden = folder / "golden.safetensors"
    assert "[golden-written]" in verify(folder, "net.pth", "--write-golden", golden)
    assert "bit-equal to those in" in verify(folder, "net.pth", "--golden", golden)
    assert "[golden-differs]" in verify(folder, "other.pth", "--golden", golden, code=1)
    for extra in ([], ["--json"]):
        done = invoke(
            folder / "net.pth", "--model", f"{folder / 'net.py'}:build", "--input-shape", "1,3", "--write-golden",
            golden, *extra
        )  # fmt: skip
        assert isinstance(done.exception, CkptkitError) and "--force replaces it" in str(done.exception)
    verify(folder, "net.pth", "--write-golden", golden, "--force", "--seed", "3")
    assert "[golden-equal]" in verify(folder, "net.pth", "--golden", golden)


def test_inputs_from_a_file(folder: Path) -> None:
    save_file({"input0": torch.ones(5, 3)}, folder / "in.safetensors")
    document = json.loads(verify(folder, "net.pth", "--input", folder / "in.safetensors", "--json"))
    assert document["outputs"][0]["shape"] == [5, 2]
    assert document["inputs"]["path"] == str(folder / "in.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu,cuda:64"], "is not available"),
        (["--device", "cpu,cpu"], "names a device twice"),
        (["--golden", "none.safetensors"], "none.safetensors"),
        (["--input", "none.pt"], "give only one of them"),
        (["--against", "none.pt"], "none.pt"),
        (["--atol", "-1"], "expected a finite number of at least 0"),
        (["--rtol", "nan"], "expected a finite number of at least 0"),
        (["--no-forward", "--golden", "g.safetensors"], "nothing is computed"),
        (["--unsafe-load"], "give only one of them"),
    ],
)
def test_what_cannot_be_done_is_told(folder: Path, arguments: list[str], message: str) -> None:
    done = invoke(
        folder / "net.pth",
        "--model",
        f"{folder / 'net.py'}:build",
        "--input-shape",
        "1,3",
        "--device",
        "cpu",
        *arguments,
    )
    assert isinstance(done.exception, (CkptkitError, click.UsageError)) and message in str(done.exception)
    assert done.stdout == ""


def test_a_device_that_is_not_here_is_2_and_one_line(run: Any, folder: Path) -> None:
    arguments = ["--model", "net.py:build", "--input-shape", "1,3", "--device", "cpu,cuda:64"]
    done = run("verify", "net.pth", *arguments, cwd=folder)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ckptkit: error: device 'cuda:64' is not available")


def test_a_pickled_model(run: Any, folder: Path) -> None:
    refused = run("verify", "whole.pth", "--input-shape", "1,3", cwd=folder)
    assert refused.returncode == 2 and "--unsafe-load" in refused.stderr and "--model REF" in refused.stderr
    done = run("verify", "whole.pth", "--input-shape", "1,3", "--unsafe-load", "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "  torch.nn.modules.linear.Linear\n" in done.stderr  # told, quiet or not
    assert "[unsafe-load]" in done.stdout


def test_an_error_is_a_document_too(run: Any, folder: Path) -> None:
    done = run("verify", "net.pth", "--model", "net.py:build", "--device", "cuda:99", "--json", cwd=folder)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "VerifyError"


def test_names_cannot_write_to_the_terminal(folder: Path) -> None:
    torch.save({**torch.load(folder / "net.pth"), "evil\x1b[31m": torch.ones(1)}, folder / "evil.pth")
    text = verify(folder, "evil.pth", code=1)
    assert "\x1b" not in text and "evil\\x1b[31m" in text


def test_wrapped_weights_of_a_known_model_need_no_model(tmp_path: Path) -> None:
    weights = torchvision.models.squeezenet1_1(num_classes=3).state_dict()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "ddp.pth")
    done = invoke(tmp_path / "ddp.pth", "--strip-module", "--no-forward", "--json")
    document = json.loads(done.stdout)
    assert (done.return_value, document["ok"]) == (0, True)
    assert document["reference"] == "torchvision:squeezenet1_1"
    assert [found["code"] for found in document["findings"]][:2] == ["identified", "fit-coverage"]
