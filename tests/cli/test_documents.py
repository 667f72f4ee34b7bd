"""Documents: what each command prints as JSON is what its type says, and all that its other outputs are made of."""

from __future__ import annotations

import io
import json
import re
import types
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from ckptkit.cli import COMMANDS, ending, html, tensor_tables
from ckptkit.cli.inspect import lines as inspect_lines
from ckptkit.cli.options import View
from ckptkit.cli.tables import Cell, columns, wrapped
from ckptkit.conversion.document import ConvertFolderDocument
from ckptkit.differences.difference import DiffDocument
from ckptkit.documents import (
    CheckDocument,
    ConvertDocument,
    ExplainDocument,
    ManifestDocument,
    ReportDocument,
    VerifyDocument,
)
from ckptkit.inspection.document import InspectDocument
from ckptkit.page.frame import charts_script

DOCUMENTS: dict[str, Any] = {
    "check": CheckDocument,
    "convert": ConvertDocument,
    "diff": DiffDocument,
    "explain": ExplainDocument,
    "inspect": InspectDocument,
    "manifest": ManifestDocument,
    "report": ReportDocument,
    "verify": VerifyDocument,
}

TIMES = r'(?<=time)(stamp)?="[^"]*"|(?<=, in )(?:under )?[\d.]+ m?s\b|"histograms":\[(\[[-\d,]*\]|null|,)*\]'
"""What differs from one run to another; and histograms, which pages have and JSON has not."""

MEASURED = r'"seconds":\{[^}]*\}|"(?:seconds|peak_memory_nbytes)":[\d.e-]+'
"""The same in the data of a page."""

NET = """
import torch

def build():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
"""

CASES = [
    "inspect .",
    "inspect . --stats",
    "inspect whole.pth ddp.pth half.safetensors --depth 1",
    "inspect resume.pth --filter *nothing*",
    "convert ddp.pth out/a.safetensors --strip-module --dtype float16",
    "convert ddp.pth out/b.safetensors --dry-run --rename 0=>first --exclude *.bias --max-shard-size 100",
    "convert resume.pth out/c.pth -q",
    "convert strided.pth out/d.safetensors --dry-run",
    "convert . new --to torch-zip --dry-run",
    "convert . out/folder --to torch-zip --weights-only",
    "convert . out/folder --to torch-zip -q",
    "diff ddp.pth half.safetensors --strip-module",
    "diff ddp.pth resume.pth --top 1",
    "diff ddp.pth ddp.pth",
    "diff resume.pth later.pth --strict",
    "check . --no-pickle --max-size 600",
    "check ddp.pth -q",
    "check . --manifest lock.json --no-nan",
    "check . --part 1/2",
    "manifest ddp.pth half.safetensors resume.pth strided.pth",
    "manifest ddp.pth half.safetensors -o new.json",
    "manifest --update -o lock.json",
    "manifest -q ddp.pth -o quiet.json",
    "report runs/a.jsonl runs/b.json",
    "report runs/part.jsonl -q",
    "explain",
    "explain damaged",
    "verify ddp.pth --strip-module --model net.py:build --input-shape 2,3",
    "verify ddp.pth --model net.py:build --no-forward -q",
    "verify half.safetensors --model net.py:build --input-shape 2,3 --against ddp.pth",
    "verify resume.pth --model net.py:build --input-shape 2,3 --section model --write-golden golden.safetensors",
]


charts = cache(charts_script)  # millions of letters, which are gone through for nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of many kinds, one that cannot be read, a model's code, and a manifest that no longer holds."""
    made = tmp_path_factory.mktemp("documents")
    space: dict[str, Any] = {}
    exec(NET, space)  # noqa: S102
    net = space["build"]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    weights = net.state_dict()
    (made / "net.py").write_text(NET)
    (made / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    torch.save({f"module.{name}": value for name, value in weights.items()}, made / "ddp.pth")
    save_file({name: value.half() for name, value in weights.items()}, made / "half.safetensors")
    resume = {"model": weights, "optimizer": optimizer.state_dict(), "epoch": 3, "名前": "モデル"}
    torch.save(resume, made / "resume.pth")
    torch.save({**resume, "model": {**weights, "0.bias": torch.full((4,), torch.nan)}, "epoch": 4}, made / "later.pth")
    torch.save(net, made / "whole.pth")
    tied = torch.ones(4, 3)
    views = {"a": tied.t(), "b": tied, "c": tied, "d|`é": torch.ones(9)[3:], "重": torch.ones(2)}
    torch.save(views, made / "strided.pth")
    lora = {f"base_model.model.{i}.q.lora_{side}.weight": torch.ones(2, 2) for i in range(3) for side in "AB"}
    save_file(lora, made / "lora.safetensors")
    save_file({"0.weight": torch.ones(4, 3).char(), "0.weight_scale": torch.ones(4)}, made / "int8.safetensors")
    torch.save(nn.Linear(1, 1).state_dict(), made / "gone.pth")
    command("manifest", "ddp.pth gone.pth -o lock.json --digests total", made)
    (made / "gone.pth").unlink()
    (made / "out" / "folder").mkdir(parents=True)
    (made / "runs").mkdir()
    for file, asked in (("a.jsonl", "--json-lines"), ("b.json", "--json"), ("part.jsonl", "--part 1/3 --json-lines")):
        (made / "runs" / file).write_text(command("check", f"ddp.pth broken.pth {asked}", made))
    return made


RUNNER = CliRunner(**({"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}))
"""Keeps stderr apart, which click does by itself since 8.2."""


def command(name: str, arguments: str, folder: Path) -> str:
    """What a command writes to stdout, run in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for written in ("new.json", "quiet.json", "golden.safetensors"):
            Path(written).unlink(missing_ok=True)
        lock = Path("lock.json").read_bytes() if Path("lock.json").exists() else None
        found = import_module(f"ckptkit.cli.{name}").command
        done = RUNNER.invoke(found, arguments.split(), standalone_mode=False)
        if lock is not None:
            Path("lock.json").write_bytes(lock)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def outputs(name: str) -> tuple[str, ...]:
    return tuple(import_module(f"ckptkit.cli.{name}").RENDERERS)


def rendered(name: str, output: str, document: Any, view: View) -> str:
    render = import_module(f"ckptkit.cli.{name}").RENDERERS[output]
    if name == "inspect" and output == "html":
        lines = html.inspected((render(each, view) for each in document["files"]), document["passed_over"])
    elif name == "inspect":
        lines = inspect_lines(document["files"], document["passed_over"], render, view)
    else:
        lines = render(document, view)
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("case", CASES)
def test_a_document_is_what_its_type_says_and_gives_every_output_of_its_command(folder: Path, case: str) -> None:
    name, _, arguments = case.partition(" ")
    arguments += " --force" if name == "convert" else ""
    document = json.loads(command(name, f"{arguments} --json", folder))
    kind = ConvertFolderDocument if name == "convert" and "files" in document else DOCUMENTS[name]
    assert list(problems(document, kind, name)) == []
    top, depth = 1 if "--top 1" in arguments else 10, 1 if "--depth 1" in arguments else None
    written = re.search(r"-o (\S+)", arguments)
    view = View(quiet="-q" in arguments, depth=depth, top=top, written=written and written[1])
    for output in outputs(name):
        text = command(name, f"{arguments} --format {output}", folder)
        made = rendered(name, output, document, view)
        made, text = (re.sub(f"{TIMES}|{MEASURED}", "", each.replace(charts(), "charts")) for each in (made, text))
        assert made == text
        assert text or view.quiet


def problems(value: Any, kind: Any, place: str) -> Iterator[str]:
    """Where a value is not of the type."""
    origin, args = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        if not isinstance(value, dict) or not kind.__required_keys__ <= value.keys() <= get_type_hints(kind).keys():
            yield f"{place}: {value!r:.200} is no {kind.__name__}"
        else:
            for key, inner in get_type_hints(kind).items():
                if key in value:
                    yield from problems(value[key], inner, f"{place}.{key}")
    elif origin in (Union, types.UnionType):
        found = [list(problems(value, each, place)) for each in args]
        if [] not in found:
            yield from min(found, key=lambda told: place in str(told))
    elif origin is Literal:
        if value not in args:
            yield f"{place}: {value!r} is none of {args}"
    elif origin in (list, dict):
        if not isinstance(value, origin):
            yield f"{place}: {value!r:.80} is no {origin}"
            return
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from problems(inner, args[-1], f"{place}[{key}]")
    elif kind is not Any and not isinstance(value, (float, int) if kind is float else kind):
        yield f"{place}: {value!r:.80} is no {kind}"


def test_types_are_held() -> None:
    good = {"schema_version": 1, "codes": {"a": {"title": "t", "meaning": "m", "remedy": "-"}}}
    assert list(problems(good, ExplainDocument, "")) == []
    for bad in ({**good, "more": 1}, {"codes": {}}, {**good, "codes": []}, {**good, "codes": {"a": {"title": 1}}}):
        assert list(problems(bad, ExplainDocument, ""))


def test_every_command_has_a_document_and_says_so() -> None:
    assert DOCUMENTS.keys() == COMMANDS.keys()
    for name in COMMANDS:
        found: click.Command = import_module(f"ckptkit.cli.{name}").command
        (option,) = [each for each in found.params if each.name == "output"]
        assert isinstance(option.type, click.Choice)
        assert {"text", "markdown"} <= {*outputs(name)}
        assert {"json", *outputs(name)} <= {*option.type.choices}
        assert DOCUMENTS[name].__doc__.startswith(f"The document of ``ckptkit {name}``")


def test_flat_lines_of_a_saved_document(folder: Path) -> None:
    document = json.loads(command("inspect", "resume.pth --stats --json", folder))
    lines = [line for file in document["files"] for line in tensor_tables.flat(file, View())]
    assert "".join(f"{line}\n" for line in lines) == command("inspect", "resume.pth --stats --flat", folder)


@pytest.mark.parametrize("width", [40, 60])
def test_what_a_terminal_cannot_show_keeps_its_columns(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escaped before columns are counted: two names of four characters are 24 columns each in ASCII."""
    monkeypatch.setattr(ending._ending, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    rows = [["\u5c64\u5c64\u5c64\u5c64", "[3, 4]"], ["weight", Cell("\u5c64 [5]", "[5]")]]
    lines = columns(rows, ["name", "shape"], "nl", width)
    assert lines[1] == r"\u5c64\u5c64\u5c64\u5c64  [3, 4]" and all(len(line) <= width for line in lines)
    assert lines[2].startswith("weight" + " " * 20) and lines[2].isascii()
    assert max(map(len, wrapped("\u5c64" * 40, width))) <= width


def test_wide_characters_keep_their_columns() -> None:
    lines = columns([["重み", "1"], ["a", "22"], ["e\u0301", "3"]], ["name", "n"], "lr")
    assert lines == ["name   n", "重み   1", "a     22", "e\u0301      3"]
    cut = columns([["重" * 40, "x"]], ["name", "n"], "ll", 40)[1]
    assert cut.startswith("重重") and "…" in cut and len(cut) < 25
