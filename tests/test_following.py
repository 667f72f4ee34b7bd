"""Every fix that is printed and is a ckptkit command: it runs, leads on, and ends where nothing is left to fix.

Other people's checkpoints are followed too where a folder of them is named, as in test_corpus.py:

    CKPTKIT_CORPUS=folder python -m pytest tests/test_following.py
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from click.testing import CliRunner
from support.range_server import range_server
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckptkit.cli import cli
from ckptkit.fixes import combined_fix
from ckptkit.report import Finding, apart, convert_command

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDER = os.environ.get("CKPTKIT_CORPUS", "")
CORPUS = sorted(path for path in Path(FOLDER).iterdir() if path.is_file()) if FOLDER else []

_MOST = 60
"""Commands for one file; the longest way has some ten."""

_TAKEN = {"--section": 2, "--strip-module": 1}
"""Options, with the words they are, that a conversion has carried out: its output is looked at without them."""

NETS = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def bn(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Plain())


def tied():
    return Tied()


def vgg():
    return nn.ModuleDict({"features": bn(), "classifier": nn.Linear(4, 2)})


def own():
    return nn.ModuleDict({"features": bn(), "mlp": nn.ModuleDict({"module": nn.Linear(4, 2)})})
"""


def bn(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def state(*prefixes: str, width: int = 4, **others: Any) -> dict[str, Any]:
    """Its weights under each prefix; dots in other names are written ``__``."""
    named = {prefix + name: value for prefix in prefixes or ("",) for name, value in bn(width).state_dict().items()}
    return {**named, **{name.replace("__", "."): value for name, value in others.items()}}


@contextmanager
def saved_from(device: str) -> Iterator[None]:
    with mock.patch("torch.serialization.location_tag", lambda storage: device):
        yield


def run(arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The command in this process: its exit code, and the document."""
    result = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    if result.exception is not None:
        return 2, {"error": f"{result.exception}"}
    return result.return_value, json.loads(result.stdout)


def looked_at(command: list[str], source: str, output: str) -> list[str]:
    """The command for the output of a conversion of a file."""
    if command[0] == "inspect":
        return ["inspect", output]
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word in _TAKEN:
            for _ in range(_TAKEN[word] - 1):
                next(words)
        else:
            kept.append(output if word == source else word)
    return kept


class Way:
    """All that comes of a command and of the fixes it prints."""

    def __init__(self) -> None:
        self.run: list[list[str]] = []
        self.ends: set[tuple[str, str]] = set()

    def follow(self, command: list[str], before: tuple[tuple[str, ...], ...] = ()) -> None:
        if command in self.run:
            return
        self.run.append(command)
        assert len(self.run) < _MOST, self.run
        code, document = run(command)
        if code == 2 and not before and command[0] == "inspect":
            self.ends.add(("inspect", "not read"))
            return
        assert code in (0, 1), (command, document)
        findings = document["files"][0]["findings"] if command[0] == "inspect" else document["findings"]
        fixes = [finding for finding in findings if (finding["fix"] or "").startswith("ckptkit ")]
        if not fixes:
            worst = next(
                (f["code"] for f in findings if f["severity"] == "error" and f["code"] != "not-loaded"), "fits"
            )
            self.ends.add((command[0], worst))
        for finding in fixes:
            fix = shlex.split(finding["fix"])[1:]
            # The same advice about what came of it would never end.
            advice = (finding["code"], *(word for word in fix if not Path(word).suffix or ":" in word))
            assert advice not in before, (command, finding, before)
            self.carry_out(command, fix, (*before, advice))

    def carry_out(self, command: list[str], fix: list[str], before: tuple[tuple[str, ...], ...]) -> None:
        if fix[0] != "convert":
            self.follow(fix, before)
            return
        if fix in self.run:
            return
        self.run.append(fix)
        code, document = run(fix)
        assert code == 0, (command, fix, document)
        assert document["written"] and Path(document["destination"]).exists()
        for looking in (["inspect", document["destination"]], looked_at(command, fix[1], document["destination"])):
            self.follow(looking, before)


def follow_at_once(command: list[str], *looking: str) -> set[str]:
    """Run the combined fix of a file, if it has one; the codes that it does not fix.

    What it says is fixed is gone from the output, and nothing graver than it knew of has come.
    """
    code, document = run(command)
    if code == 2:
        return set()
    told = document if command[0] == "verify" else document["files"][0]
    findings, combined = document.get("findings") or told["findings"], told["combined_fix"]
    advised = {each["code"] for each in findings if (each["fix"] or "").startswith("ckptkit convert ")}
    assert (combined is None) <= (advised <= {"not-a-plain-tensor"}), advised
    if combined is None:
        return advised
    assert set(combined["codes"]) <= advised
    fix = shlex.split(combined["command"])[1:]
    code, done = run(fix)
    assert code == 0 and done["written"], (combined, done)
    kept = [] if {"--weights-only", "--like"} & {*fix} or fix[2].endswith(".safetensors") else command[2:]
    look = looked_at(command, fix[1], fix[2]) if command[0] != "inspect" else ["inspect", fix[2], *kept]
    code, after = run(look)
    assert code != 2, (look, after)
    left = after["findings"] if "findings" in after else after["files"][0]["findings"]
    assert not {each["code"] for each in left} & {*combined["codes"]}, (combined, left)
    graver = {each["code"] for each in left if each["severity"] != "info"}
    # That a model lacks tensors or has others shows where names are its own.
    assert command[0] == "verify" or graver <= {each["code"] for each in findings}, (combined, left)
    undone = advised - {*combined["codes"]}
    assert all(each in combined["keeps"] for each in undone), combined
    return undone


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.*")) + CORPUS, ids=lambda path: path.name)
def test_every_fix_of_a_file_leads_on(path: Path, folder: Path) -> None:
    if path.suffix in (".py", ".json") and not path.name.endswith(".index.json"):
        return
    for each in path.parent.glob("model*") if path.name.startswith("model") else [path]:
        shutil.copy(each, folder)
    follow_at_once(["inspect", path.name])
    Way().follow(["inspect", path.name])
    for known in run(["inspect", path.name])[1]["files"][0].get("architecture") or []:
        args = [part for name, value in known["args"].items() for part in ("--model-arg", f"{name}={value}")]
        options = ["--no-forward", "--device", "cpu", *args]
        Way().follow(["verify", path.name, "--model", known["reference"], *options])


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has moved to another package
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})


ONE = torch.ones(1)
HEAD = {"classifier__weight": torch.ones(2, 4), "classifier__bias": torch.ones(2)}

FILES: dict[str, Callable[[], object]] = {
    "wrapped.pth": lambda: state("module."),
    "best.pth.tar": lambda: {"state_dict": state("module._orig_mod."), "args": argparse.Namespace(lr=1), "epoch": 3},
    "it's 100 %.ckpt": lambda: {"model": state("_orig_mod."), "optimizer": {"state": {0: {"m": torch.ones(4, 3)}}}},
    "several.pth": lambda: {"net_g": state(), "net_d": state("module.", width=5), "ema": state()},
    "several_quantized.pth": lambda: {"a": {"w": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8)}, "b": state()},
    "collision.pth": lambda: {"module.a": ONE, "a": ONE},
    "whole.pth": lambda: nn.DataParallel(bn()),
    "whole_in_a_dict.pth": lambda: {"model": nn.DataParallel(bn()), "epoch": 1},
    "quantized.pth": quantized,
    "wrapped_quantized.pth": lambda: nn.DataParallel(quantized()),
    "method.pth": lambda: bn().state_dict,
    "complex.pth": lambda: {"module.a": torch.ones(2, dtype=torch.complex128), "module.b": ONE},
    "views.pth": lambda: {"a": torch.ones(9999)[:3], "b": torch.ones(3, 2).t()},
    "all.pth": lambda: {
        "model": state("module.", features__module__a=ONE),
        "model_ema": state("module."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3, 3, 3)}}, "param_groups": [{"params": [0]}]},
        "args": argparse.Namespace(lr=1, out=Path("runs")),
    },
    "both wrapped.pth": lambda: {"net_g": state("module."), "net_d": state("module.", width=5)},
    '$(inner) "`.pth': lambda: {"w": state("features.module.", **HEAD), "where": Path("runs"), "epoch": 1},
    "nested.pth": lambda: {"model": {"encoder": {"0": state()}, "module": {"w": ONE}}, "epoch": 1},
    "arrays.pth": lambda: {"module.w": numpy.ones((3, 4), "float32"), "module.b": numpy.ones(3, "float32")},
    "averaged.pth": lambda: {"model": bn().state_dict(), "model_ema": AveragedModel(bn()).state_dict()},
}


AMONG_OTHERS = ("all.pth", "it's 100 %.ckpt", "several.pth", "whole.pth", "quantized.pth", "views.pth")
"""Files of every way to go, which are followed among neighbours in every run."""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("name", "neighbours"),
    [
        *(pytest.param(name, False, id=f"{name}-alone") for name in FILES),
        *(
            pytest.param(
                name, True, id=f"{name}-neighbours", marks=() if name in AMONG_OTHERS else pytest.mark.thorough
            )
            for name in FILES
        ),
    ],
)
def test_every_fix_of_a_kind_leads_on(name: str, neighbours: bool, folder: Path) -> None:
    """Also where what would be written is there already, and where a section is named."""
    with saved_from("cuda:3") if neighbours else nullcontext():
        torch.save(FILES[name](), folder / name)
    if neighbours:
        stem = name.partition(".")[0]
        for ending in (".safetensors", ".pth", ".clean.pth"):
            if stem + ending != name:
                (folder / (stem + ending)).write_bytes(b"another's")
    follow_at_once(["inspect", name])
    Way().follow(["inspect", name])
    checking = ["check", name, "--no-pickle", "--no-prefix", "--no-optimizer", "--location", "cpu"]
    follow_at_once(checking)
    Way().follow(checking)
    for section in [part["path"] for part in run(["inspect", name])[1]["files"][0]["sections"] if part["path"]]:
        if run(["inspect", name, "--section", section])[0] != 2:  # an optimizer's
            follow_at_once(["inspect", name, "--section", section])
            way = Way()
            way.follow(["inspect", name, "--section", section])
            converted = [command for command in way.run if command[:2] == ["convert", name]]
            assert all("--section" in command for command in converted)


def test_a_combined_fix_of_what_is_no_file_of_its_own_runs(folder: Path) -> None:
    """A member of an archive, a sharded index, standard input, a URL, and a name that looks like an option."""
    with saved_from("cuda:0"):
        torch.save({"model": state("module."), "epoch": 1}, folder / '-it\'s "x".pth')
    data = (folder / '-it\'s "x".pth').read_bytes()
    with zipfile.ZipFile(folder / "runs 1.zip", "w") as archive:
        archive.writestr("a/it's.pth", data)
    halves = [*state("module.").items()][::2], [*state("module.").items()][1::2]
    for number, half in enumerate(halves):
        torch.save(dict(half), folder / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{number}.bin" for number, half in enumerate(halves) for name, _ in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with range_server() as server:
        server.files["x.pth"] = data
        sources = ["runs 1.zip/a/it's.pth", "pytorch_model.bin.index.json", f"{server.url}/x.pth"]
        assert [follow_at_once(["inspect", source]) for source in sources] == [set()] * len(sources)
    for source, given in (("-", data), ('-it\'s "x".pth', None)):
        told = CliRunner().invoke(cli, ["inspect", "--json", "--", source], input=given, standalone_mode=False)
        command = shlex.split(json.loads(told.stdout)["files"][0]["combined_fix"]["command"])
        done = CliRunner().invoke(cli, command[1:], input=given, standalone_mode=False)
        assert done.return_value == 0, done.output
        assert run(["inspect", f"./{command[3]}"])[1]["files"][0]["findings"][0]["code"] == "not-a-model"


def advised(severity: str, code: str, *options: str, suffix: str = ".safetensors") -> Finding:
    return Finding(code=code, severity=severity, message="m", fix=convert_command("x.pth", *options, suffix=suffix))


@pytest.mark.parametrize(
    ("findings", "command", "keeps", "codes"),
    [
        ([("a", "--weights-only")], "x.safetensors --weights-only", "keeps the weights; drops epoch and args", "a"),
        (
            [("a", "--map-location", "cpu", ".pth")],
            "x.clean.pth --map-location cpu",
            "keeps everything, moved to cpu",
            "a",
        ),
        (
            [("a", "--strip-module", "--weights-only"), ("b", "--map-location", "cpu", ".pth")],
            "x.safetensors --strip-module --weights-only",
            "keeps the weights, without wrapper prefixes; drops epoch and args",
            "a b",
        ),
        (
            [("a", "--weights-only", ".pth"), ("b", "--map-location", "cpu", ".pth")],
            "x.clean-3.pth --map-location cpu --weights-only",
            "keeps the weights, moved to cpu; drops epoch and args",
            "a b",
        ),
        (
            [("a", "--map-location", "cuda:1", ".pth"), ("b", "--weights-only")],
            "x.safetensors --weights-only",
            "keeps the weights; drops epoch and args; does not fix all of a",
            "b",
        ),
        (
            [("a", "--section", "ema", "--weights-only"), ("b", "--weights-only")],
            "x.clean.safetensors --weights-only",
            "keeps the weights; drops epoch and args; does not fix all of a",
            "b",
        ),
        (
            [("a", "--section", "args", "--weights-only"), ("b", "--section", "ema", "--weights-only")],
            "x.safetensors --section args --weights-only",
            "keeps the weights of 'args'; drops epoch; does not fix all of b",
            "a",
        ),
        (
            [("a", "--rename", "x=>y"), ("b", "--strip-module", "--rename", "z=>w"), ("c", "--densify", ".pth")],
            "x.clean.safetensors --rename x=>y --strip-module --rename z=>w --densify",
            "keeps the weights, renamed, without wrapper prefixes, as plain tensors",
            "a b c",
        ),
    ],
)
def test_where_advice_does_not_go_together_a_rule_decides(
    findings: list[tuple[str, ...]], command: str, keeps: str, codes: str, folder: Path
) -> None:
    told = []
    for code, *options in findings:
        suffix = options.pop() if options[-1].startswith(".") else ".safetensors"
        told.append(advised("warning", code, *options, suffix=suffix))
    found = combined_fix(apart(told), ["epoch", "args"] if "drops" in keeps else [])
    assert found == {"command": found and found["command"], "keeps": keeps, "codes": codes.split()}
    assert found["command"].replace("'", "") == f"ckptkit convert x.pth {command}"


Row = tuple[Callable[[], object], list[str], str]
FITTING: dict[str, Row] = {
    "wrapped": (lambda: state("module."), ["bn"], "fits"),
    "compiled": (lambda: state("model._orig_mod.module."), ["bn"], "fits"),
    "averaged": (FILES["averaged.pth"], ["bn", "--section", "model_ema"], "fits"),
    "averaged and prefixed": (lambda: {"w": state("ema.module.", ema__n_averaged=ONE), "n": 1}, ["bn"], "fits"),
    "a head and a queue": (lambda: state("module.q.", module__q__fc__weight=ONE, module__queue=ONE), ["bn"], "fits"),
    "two encoders": (lambda: {"state_dict": state("module.q.", "module.k.")}, ["bn"], "fits"),
    "two heads of a trunk": (lambda: state("trunk.", head_a=ONE, head_b=ONE), ["bn"], "fits"),
    "an inner module": (lambda: {"w": state("features.module.", **HEAD), "epoch": 1}, ["vgg"], "fits"),
    "an inner one in a prefix": (lambda: state("net.features.module.", net__x=ONE, **PREFIXED), ["vgg"], "fits"),
    "an inner one beside one's own": (lambda: state("features.module.", **OWN), ["own"], "fits"),
    "its own inner one": (lambda: state("module.features.", **PREFIXED_OWN), ["own", "--strip-module"], "fits"),
    "a model's argument": (lambda: state("module.", width=8, x=ONE), ["bn", "--model-arg", "width=8"], "fits"),
    "another section": (
        lambda: {"model": {"0.weight": torch.ones(4, 3, 3, 3)}, "ema": state("module.", module__fc=ONE)},
        ["bn", "--section", "model"],
        "fits",
    ),
    "too many counters": (lambda: state(), ["plain"], "fits"),
    "a tied name less": (lambda: without("b.weight"), ["tied"], "fits"),
    "a tensor less": (lambda: {n: v for n, v in state("module.").items() if "bias" not in n}, ["bn"], "missing-keys"),
    "other widths": (lambda: state("module.", width=8), ["bn"], "shape-mismatch"),
    "something else": (lambda: {"a.b": ONE}, ["bn"], "nothing-matches"),
}
PREFIXED = {f"net__{name}": value for name, value in HEAD.items()}
OWN = {"mlp__module__weight": torch.ones(2, 4), "mlp__module__bias": torch.ones(2)}
PREFIXED_OWN = {f"module__{name}": value for name, value in OWN.items()}


def without(name: str) -> dict[str, Any]:
    """The weights of the model whose two layers share theirs, less a name."""
    layer = nn.Linear(4, 4)
    values = {"a.weight": layer.weight.data, "a.bias": layer.bias.data, "b.weight": layer.weight.data}
    return {key: value for key, value in {**values, "b.bias": layer.bias.data.clone()}.items() if key != name}


@pytest.mark.parametrize("kind", FITTING)
def test_what_verify_advises_leads_to_a_file_that_fits(kind: str, folder: Path) -> None:
    made, (factory, *options), end = FITTING[kind]
    torch.save(made(), folder / "x.pth")
    way, verifying = Way(), ["verify", "x.pth", "--model", f"nets.py:{factory}", "--no-forward", "--device", "cpu"]
    follow_at_once([*verifying, *options])
    way.follow([*verifying, *options])
    assert {found for command, found in way.ends if command == "verify"} == {end}, way.run
    assert all("--device" in command for command in way.run if command[0] == "verify")
