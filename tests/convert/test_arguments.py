"""Options given together, given wrong, and given from Python in other forms than the command line has."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import ckptkit
from ckptkit.cli.convert import command


@pytest.fixture
def source(save) -> Path:
    weights: Any = OrderedDict({"a.weight": torch.ones(2), "a.bias": torch.zeros(2), "b.weight": torch.ones(3)})
    weights._metadata = OrderedDict({"": {"version": 1}, "a": {"version": 2}})
    return save({"model": weights, "epoch": 3, "note": "text"})


def test_one_text_is_one_pattern(source: Path, tmp_path: Path) -> None:
    """Not one for each of its characters, of which `*` would keep or drop everything."""

    def names(**options: Any) -> list[str]:
        ckptkit.convert(source, tmp_path / "out.pth", force=True, **options)
        return list(torch.load(tmp_path / "out.pth", weights_only=True)["model"])

    assert names(include="a.*") == ["a.weight", "a.bias"]
    assert names(exclude="*.weight") == ["a.bias"]
    assert names(rename="^a=>x") == ["x.weight", "x.bias", "b.weight"]
    assert names(leave_out="epoch") == ["a.weight", "a.bias", "b.weight"]
    assert list(torch.load(tmp_path / "out.pth")) == ["model", "note"]
    names(dtype="float16", keep_dtype="a.*")
    dtypes = {name: value.dtype for name, value in torch.load(tmp_path / "out.pth")["model"].items()}
    assert dtypes == {"a.weight": torch.float32, "a.bias": torch.float32, "b.weight": torch.float16}


def test_any_sequence_will_do(source: Path, tmp_path: Path) -> None:
    options: Any = {"include": iter(["a.*", "b.*"]), "exclude": {"b.*"}, "rename": iter([("^a", "x"), "bias=>b"])}
    ckptkit.convert(source, tmp_path / "out.pth", **options)
    assert list(torch.load(tmp_path / "out.pth")["model"]) == ["x.weight", "x.b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"epoch": 3}}, "metadata 'epoch': 3 is not text; metadata maps strings to strings"),
        ({"metadata": {3: "x"}}, "metadata 3: 'x' is not text"),
        ({"max_shard_size": 0}, "0 is not a valid file size"),
        ({"max_shard_size": -5}, "-5 is not a valid file size"),
        ({"map_location": 5}, "'5' is not a device location"),
        ({"tied": "both"}, "no policy 'both' for tied tensors"),
        ({"dtype": torch.int8}, "values cannot be cast to 'int8'"),
        ({"keep_dtype": "a.*"}, "--keep-dtype makes exceptions to --dtype, which is not given"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_refused_in_python(source: Path, tmp_path: Path, options: dict[str, Any], words: str, check: bool) -> None:
    with pytest.raises(ckptkit.RewriteError) as caught:
        ckptkit.convert(source, tmp_path / "out.safetensors", weights_only=True, check=check, **options)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_torch_dtype_will_do(source: Path, tmp_path: Path) -> None:
    ckptkit.convert(source, tmp_path / "out.pth", dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert torch.load(tmp_path / "out.pth")["model"]["b.weight"].dtype == torch.bfloat16


def test_weights_only_and_leave_out(source: Path, converted, refused) -> None:
    """The one does not hide a mistake in the other."""
    written = converted(source, "out.pth", "--weights-only", "--leave-out", "epoch")
    assert list(written) == ["a.weight", "a.bias", "b.weight"]
    line = refused(source, "no.pth", "--weights-only", "--leave-out", "epok")
    assert "there is no 'epok' to leave out; there is 'epoch', 'note'" in line


def test_the_place_of_module_versions_is_taken(source: Path, save, refused, convert) -> None:
    for options in ([], ["--no-check"]):
        taken = ["--weights-only", "--metadata", "torch._metadata=mine", *options]
        assert "'torch._metadata' is reserved for module versions" in refused(source, "out.safetensors", *taken)
    path = save({"w": torch.ones(1)}, "plain.pth")
    assert "reserved for module versions" in refused(path, "out.safetensors", "--metadata", "torch._metadata={}")
    assert convert(path, "out.safetensors", "--metadata", "torch._metadata=free text").code == 0
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata()["torch._metadata"] == "free text"


def test_everything_at_once(source: Path, converted, agree, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("weight$=>w\n")
    options = [
        *("--add-module", "--strip-module", "--strip-prefix", "module", "--add-prefix", "net", "--section", "model"),
        *("--rename", "^net=>n", "--rename-file", "rules", "--include", "n.*", "--exclude", "*.bias", "--weights-only"),
        *("--leave-out", "note", "--map-location", "cuda:1=cpu", "--map-location", "cpu=cpu", "--dtype", "float64"),
        *("--keep-dtype", "b.*", "--tied", "duplicate", "--to", "torch-zip", "--max-shard-size", "1GB", "--metadata"),
        *("x=y", "--no-receipt", "--force", "--no-progress", "-q", "--color", "never", "--no-check"),
    ]
    expected = {"n.a.w": torch.ones(2, dtype=torch.float64), "n.b.w": torch.ones(3)}
    agree(converted(source, "out.bin", *options), expected)
    underscored = [option.replace("-", "_") if option.startswith("--") else option for option in options]
    agree(
        converted(
            source, "again.bin", *("--" + option[2:] if option[:2] == "__" else option for option in underscored)
        ),
        expected,
    )


def test_options_may_stand_anywhere(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--rename", "b$=>c", str(source), "--rename=a$=>b", "--weights-only", "out.pth", "--rename", "c$=>d"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert list(torch.load("out.pth")) == ["a.weight", "a.bias", "b.weight"]
    again = CliRunner().invoke(
        command, ["--rename", "t$=>1", "out.pth", "--rename=s1=>2", "2.pth", "--rename", "s$=>1"]
    )
    assert again.exit_code == 0, again.output
    assert list(torch.load("2.pth")) == ["a.weigh1", "a.bia1", "b.weigh1"]


def test_help_names_every_option() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    for parameter in command.params:
        assert all(option in text for option in parameter.opts if option.startswith("-")), parameter.opts
