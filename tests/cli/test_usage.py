"""Command lines that are wrong: what was probably meant, and the document where JSON is asked for."""

from __future__ import annotations

import gc
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ckptkit.cli import COMMANDS, main
from ckptkit.nearness import meant_file, nearest

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Typed]:
    """``typed("inspect", ...)``: exit code, stdout and stderr of a line that is typed among some files."""
    monkeypatch.chdir(tmp_path)
    state = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    torch.save(state, tmp_path / "model.pth")
    torch.save({"model": state, "ema": state, "optimizer": {"lr": 0.1}}, tmp_path / "two.pth")
    with zipfile.ZipFile(tmp_path / "nets.zip", "w") as archive:
        archive.write(tmp_path / "model.pth", "model.pth")
    for step in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / "run" / step).mkdir(parents=True)
        torch.save(state, tmp_path / "run" / step / "model.pth")
    threshold = gc.get_threshold()

    def line(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        return int(ended.value.code or 0), *capsys.readouterr()

    yield line
    gc.set_threshold(*threshold)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("inspct model.pth", "did you mean inspect?"),
        ("info model.pth", "did you mean inspect?"),
        ("model.pth", "did you mean ckptkit inspect model.pth?"),
        ("inspect --fliter x model.pth", "No such option '--fliter'; did you mean --filter?"),
        ("convert model.pth o.pth --strip-modul", "did you mean --strip-module?"),
        ("--json inspect model.pth", "after the command: ckptkit COMMAND --json"),
        ("--versoin", "did you mean --version?"),
        ("inspect modle.pth", "modle.pth: no such file; did you mean model.pth?"),
        ("inspect model.pth!", "model.pth!: no such file; did you mean model.pth?"),
        ("inspect model.pt", "did you mean model.pth?"),
        ("inspect model", "did you mean model.pth?"),
        ("inspect rum/checkpoint-10/model.pth", "did you mean run/checkpoint-10/model.pth?"),
        ("convert modle.pth o.pth", "did you mean model.pth?"),
        ("diff model.pth modell.pth", "did you mean model.pth?"),
        ("check modle.pth", "did you mean model.pth?"),
        ("manifest modle.pth", "did you mean model.pth?"),
        ("check --manifest modle.json", "did you mean model.pth?"),
        ("report modle.pth", "did you mean model.pth?"),
        ("inspect nets.zip!modle.pth", "'model.pth'; did you mean 'model.pth'?"),
        ("inspect nest.zip!model.pth", "did you mean 'nets.zip!model.pth'?"),
        ("inspect two.pth --section modle", "did you mean 'model'?"),
        ("convert run o.pth --tag checkpoint-1O", "did you mean 'checkpoint-10'"),
        ("convert two.pth o.pth --section model --leave-out optimzer", "did you mean 'optimizer'?"),
        ("explain module_prefix", "did you mean module-prefix?"),
        ("explain moduleprefx", "did you mean module-prefix?"),
        ("explain trsut", "did you mean trust?"),
        ("inspect model.pth --format jsn", "did you mean json?"),
        ("inspect model.pth --sort sise", "did you mean size?"),
        ("convert model.pth o.pth --tied dup", "did you mean duplicate?"),
        ("convert model.pth o --to st", "did you mean safetensors?"),
        ("convert model.pth o.safetensor", "did you mean .safetensors?"),
        ("convert model.pth o.pth --map-location gpu", "did you mean 'cuda'?"),
        ("check model.pth --require-format safetensor", "did you mean safetensors?"),
        ("check model.pth --allow-dtype bf16", "did you mean bfloat16?"),
        *((f"convert model.pth o.pth --dtype {name}", "did you mean float16?") for name in ("fp16", "half", "F16")),
        ("convert model.pth o.pth --dtype torch.double", "did you mean float64?"),
        ("convert model.pth o.pth --dtype fp8", "did you mean float8_e4m3fn?"),
    ],
)
def test_what_was_meant_is_told(typed: Typed, words: str, meant: str) -> None:
    code, out, err = typed(*words.split())
    assert code == 2
    assert meant in err + out
    assert "internal error" not in err


@pytest.mark.parametrize(
    "words", ["frobnicate", "inspect --qqq model.pth", "inspect zzzz.pth", "explain qqq", "inspect model.pth --sort q"]
)
def test_what_is_like_nothing_is_told_so(typed: Typed, words: str) -> None:
    code, _, err = typed(*words.split())
    assert code == 2
    assert "did you mean" not in err


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("resnet18", "did you mean torchvision:resnet18 or timm:resnet18?"),
        ("ResNet18", "did you mean torchvision:resnet18 or timm:resnet18?"),
        ("vit_b_61", "did you mean torchvision:vit_b_16"),
        ("torchvision.resnet18", "did you mean torchvision:resnet18"),
        ("torchvison:resnet18", "did you mean torchvision:resnet18?"),
        ("torchvision:resnet19", "did you mean resnet18"),
        ("net.py", "name the factory in it: net.py:NAME; there are net.py:build, net.py:Net"),
        ("ent.py", "name the factory in it: ent.py:NAME"),
        ("net.py:biuld", "did you mean build?"),
        ("nte.py:build", "there is no file 'nte.py'; did you mean net.py?"),
    ],
)
def test_the_model_that_was_meant_is_told(typed: Typed, tmp_path: Path, model: str, meant: str) -> None:
    (tmp_path / "net.py").write_text("def build():\n    pass\n\nclass Net:\n    pass\n\ndef _own():\n    pass\n")
    code, _, err = typed("verify", "model.pth", "--model", model)
    assert code == 2
    assert meant in err


def test_what_is_nearest() -> None:
    assert nearest("Module Prefix", ["module-prefix", "module-prefixes"]) == ["module-prefix"]
    assert nearest("resnet1", ["resnet18", "resnet101", "vgg"]) == ["resnet18", "resnet101"]
    assert nearest("st", ["torch-zip"], called={"st": "safetensors"}) == ["safetensors"]
    assert nearest("a", ["b", "c"]) == []
    assert nearest("x" * 100_000, ["x" * 100_000 + "y"] * 10_000) == []  # neither long names nor many cost anything


def test_files_with_hostile_names_are_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mo del;rm.pth").touch()
    assert meant_file("mo del;mr.pth") == "; did you mean 'mo del;rm.pth'?"
    assert meant_file("none/at/all.pth") == ""
    assert meant_file("\0") == ""


JSON_LINES = [
    ("inspect", "--fliter", "x", "--json"),
    ("inspect", "--json"),
    ("--json", "inspect", "a.pth"),
    ("inspct", "a.pth", "--format", "json"),
    ("inspect", "a.pth", "--format=json", "--depth", "deep"),
    ("diff", "-", "-", "--json"),
    *((command, "--nope", "--json") for command in sorted(COMMANDS)),
]


@pytest.mark.parametrize("words", JSON_LINES, ids=" ".join)
def test_wrong_usage_is_a_document_where_json_is_asked_for(typed: Typed, words: tuple[str, ...]) -> None:
    code, out, err = typed(*words)
    assert code == 2
    document = json.loads(out)
    message = document["error"].pop("message")
    assert document == {"schema_version": 1, "ok": False, "error": {"type": "UsageError"}}
    assert f"Error: {message}" in err


@pytest.mark.parametrize(
    "words", [("inspect",), ("inspect", "--nope", "--format", "text"), ("inspect", "--nope", "--", "--json")]
)
def test_elsewhere_it_is_told_on_stderr_alone(typed: Typed, words: tuple[str, ...]) -> None:
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert "Error: " in err


def test_a_list_that_cannot_be_read_is_a_document(typed: Typed) -> None:
    code, out, err = typed("inspect", "--files-from", "none.txt", "--json")
    assert code == 2
    assert json.loads(out)["error"]["message"] in err


@pytest.mark.parametrize("command", ["inspect", "check"])
@pytest.mark.parametrize("wrong", ["none.pth", "nets.zip!none.pth", "foo://none/at.pth"])
def test_one_argument_that_cannot_be_read_stops_no_other(typed: Typed, command: str, wrong: str) -> None:
    code, out, err = typed(command, "model.pth", wrong, "two.pth", "--json")
    assert code == 2
    files = {file["path"]: file for file in json.loads(out)["files"]}
    assert files.keys() == {"model.pth", wrong, "two.pth"}
    if command == "inspect":
        assert [path for path, file in files.items() if file["error"] is None] == ["model.pth", "two.pth"]
        assert err.count("ckptkit: error: ") == 1
    else:
        assert [path for path, file in files.items() if file["checked"]] == ["model.pth", "two.pth"]


def test_a_manifest_tells_of_every_path_that_it_cannot_record(typed: Typed, tmp_path: Path) -> None:
    code, out, err = typed("manifest", "model.pth", "none.pth", "-", "nil.pth", "-o", "m.json")
    assert (code, out) == (2, "")
    assert "3 files cannot be recorded:" in err
    assert all(f"\n  {path}: " in err for path in ("none.pth", "-", "nil.pth"))
    assert not (tmp_path / "m.json").exists()
