"""Options that leave something out: tensors by name, sections, and what stands beside the weights."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    torch.manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()


@pytest.fixture
def resume(save) -> Path:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return save({
        "epoch": 4,
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "args": argparse.Namespace(arch="mlp"),
    })  # fmt: skip


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


# Tensors by name.


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        (["--include", "*.weight"], lambda n: n.endswith(".weight")),
        (["--include", "0.*", "--include", "2.*"], lambda n: n[0] in "02"),
        (["--exclude", "1.*"], lambda n: n[0] != "1"),
        (["--include", "[01].*", "--exclude", "*bias"], lambda n: n[0] in "01" and not n.endswith("bias")),
        (["--exclude", "?.running_*", "--exclude", "*tracked"], lambda n: "running" not in n and "tracked" not in n),
        (["--include", "*"], lambda n: True),
        (["--exclude", "none of them"], lambda n: True),
    ],
)
def test_globs(save, converted, agree, options: list[str], keep: Callable[[str], bool]) -> None:
    state = model().state_dict()
    path = save(state)
    expected = {name: tensor for name, tensor in state.items() if keep(name)}
    agree(converted(path, "out.pth", *options), expected)
    agree(converted(path, "out.safetensors", *options), expected, ordered=False)
    versions = dict(torch.load("out.pth")._metadata)
    modules = {"", *(name.rpartition(".")[0] for name in expected)}
    assert versions == {path: entry for path, entry in state._metadata.items() if path in modules}


@pytest.mark.parametrize("glob", ["module.1.*", "top.1.*", "*.1.*"])
def test_globs_match_names_before_and_after_renaming(save, converted, agree, glob: str) -> None:
    state = model().state_dict()
    path = save({f"module.{name}": tensor for name, tensor in state.items()})
    renaming = ["--strip-module", "--add-prefix", "top"]
    kept = {f"top.{name}": tensor for name, tensor in state.items() if name[0] != "1"}
    agree(converted(path, "out.pth", *renaming, "--exclude", glob), kept)
    others = {f"top.{name}": tensor for name, tensor in state.items() if name[0] == "1"}
    agree(converted(path, "other.pth", *renaming, "--include", glob), others)


def test_case_counts(save, convert, refused) -> None:
    path = save({"Head.weight": torch.ones(1), "body": torch.ones(1)})
    assert convert(path, "out.pth", "--exclude", "head.*").code == 0
    assert list(torch.load("out.pth")) == ["Head.weight", "body"]
    assert "no name matches 'head.*'; there is 'Head.weight'" in refused(path, "no.pth", "--include", "head.*")


def test_what_is_told(save, convert) -> None:
    done = convert(save(model().state_dict()), "out.pth", "--exclude", "0.*", "--exclude", "head.*", "--json")
    document = json.loads(done.out)
    assert document["dropped"] == ["0.weight", "0.bias"]
    found = {finding["code"]: (finding["severity"], finding["message"]) for finding in document["findings"]}
    assert found == {
        "dropped": ("info", "2 tensors left out: 0.weight, 0.bias"),
        "nothing-excluded": ("warning", "--exclude 'head.*' matches no name"),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--include", "0.weights"], "no name matches '0.weights'; there is '0.weight'"),
        (["--include", "0.*", "--include", "zzz"], "no name matches 'zzz'"),
        (["--exclude", "*"], "none of 8 names is left"),
        (["--include", "0.*", "--exclude", "0.*"], "none of 8 names is left"),
    ],
)
def test_nothing_left(save, refused, options: list[str], words: str) -> None:
    path = save(model().state_dict())
    for destination in ("out.pth", "out.safetensors"):
        assert words in refused(path, destination, *options)


# Sections, and what is beside the weights.


def test_a_section_is_chosen(save, converted, refused, agree) -> None:
    raw, ema = model().state_dict(), {name: tensor + 1 for name, tensor in model().state_dict().items()}
    path = save({"model": raw, "ema": ema, "epoch": 3})
    assert "several sections contain weights ('model', 'ema')" in refused(path, "out.safetensors", "--weights-only")
    assert "no section 'emma'" in refused(path, "out.pth", "--section", "emma")
    agree(converted(path, "ema.pth", "--section", "ema", "--weights-only"), ema)
    agree(converted(path, "raw.safetensors", "--section", "model", "--weights-only"), raw, ordered=False)
    whole: Any = converted(path, "whole.pth", "--section", "ema", "--add-prefix", "x")
    assert list(whole) == ["model", "ema", "epoch"]
    agree(whole["ema"], {f"x.{name}": tensor for name, tensor in ema.items()})
    agree(whole["model"], raw)


def test_weights_only(resume: Path, converted, agree) -> None:
    expected = loaded(resume)["state_dict"]
    agree(converted(resume, "out.pth", "--weights-only"), expected)
    agree(converted(resume, "out.safetensors", "--weights-only"), expected, ordered=False)


def test_leave_out(resume: Path, convert, refused, agree) -> None:
    source = loaded(resume)
    assert convert(resume, "out.pth", "--leave-out", "optimizer", "--leave-out", "args").code == 0
    written = torch.load("out.pth", weights_only=True)
    assert list(written) == ["epoch", "state_dict", "scheduler"]
    agree(written["state_dict"], source["state_dict"])
    assert written["scheduler"] == source["scheduler"]
    line = refused(resume, "no.pth", "--leave-out", "optimiser")
    assert "there is no 'optimiser' to leave out; there is 'epoch', 'optimizer', 'scheduler', 'args'" in line
    assert "cannot be left out" in refused(resume, "no.pth", "--leave-out", "state_dict")


def test_leave_out_part_by_part_for_safetensors(resume: Path, convert, refused, converted, agree) -> None:
    line = refused(resume, "out.safetensors", "--leave-out", "optimizer", "--leave-out", "args")
    assert "beside the weights (epoch, scheduler)" in line
    options = [part for key in ("optimizer", "args", "epoch", "scheduler") for part in ("--leave-out", key)]
    agree(converted(resume, "out.safetensors", *options), loaded(resume)["state_dict"], ordered=False)
    done = convert(resume, "again.safetensors", *options)
    assert "info: not in the output: epoch, optimizer, scheduler, args [left-out]" in done.err


# Optimizers count parameters.


def test_dropping_parameters_under_an_optimizer_is_refused(resume: Path, refused, converted, convert) -> None:
    for options in (["--exclude", "2.*"], ["--include", "0.*"]):
        line = refused(resume, "out.pth", *options)
        assert (
            "the optimizer's state is keyed by the position of each parameter; --leave-out optimizer leaves it out"
        ) in line
        whole: Any = converted(
            resume, f"a{options[0]}.pth", *options, "--leave-out", "optimizer", "--leave-out", "args"
        )
        assert "optimizer" not in whole
        assert set(whole["state_dict"]) < set(loaded(resume)["state_dict"])
        converted(resume, f"b{options[0]}.pth", *options, "--weights-only")


def test_dropping_buffers_under_an_optimizer_is_fine(resume: Path, convert) -> None:
    assert convert(resume, "out.pth", "--exclude", "*.num_batches_tracked", "--exclude", "*.running_*").code == 0
    assert list(loaded(Path("out.pth"))["state_dict"]) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--add-module", "--map-location", "cpu"],
        ["--rename", "^0=>first", "--exclude", "1.num_batches_tracked"],
        ["--leave-out", "args", "--no-check"],
    ],
    ids=" ".join,
)
def test_training_goes_on_as_it_would_have(resume: Path, convert, agree, options: list[str]) -> None:
    assert convert(resume, "out.pth", *options).code == 0

    def resumed(path: Path) -> dict[str, torch.Tensor]:
        saved = loaded(path)
        net = model()
        names = list(net.state_dict())
        state = dict(zip(names, saved["state_dict"].values(), strict=False))  # the order is that of the model
        if len(saved["state_dict"]) < len(names):
            names.remove("1.num_batches_tracked")
            state = dict(zip(names, saved["state_dict"].values(), strict=True))
        net.load_state_dict(state, strict=False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        scheduler.load_state_dict(saved["scheduler"])
        trained(net, optimizer)
        scheduler.step()
        result = net.state_dict()
        result.pop("1.num_batches_tracked")
        result["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
        return result

    agree(resumed(Path("out.pth")), resumed(resume))


def test_in_python(resume: Path, tmp_path: Path, agree) -> None:
    report = ckptkit.convert(
        resume,
        tmp_path / "out.pth",
        include=["0.*", "2.*"],
        exclude=["*.bias"],
        leave_out=["optimizer"],
        section="state_dict",
    )
    state = loaded(resume)["state_dict"]
    agree(loaded(tmp_path / "out.pth")["state_dict"], {name: state[name] for name in ("0.weight", "2.weight")})
    assert {"dropped", "left-out"} <= {finding.code for finding in report.findings}
    ckptkit.convert(resume, tmp_path / "w.pth", weights_only=True)
    agree(torch.load(tmp_path / "w.pth"), state)


# What is hostile, and goes along.


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1",)


class Reaches:
    """Hostile by what it is given: no name in the tree is."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (torch.nn.Module, "__init__")


def hostile(report: ckptkit.Report) -> list[ckptkit.Finding]:
    return [finding for finding in report.findings if finding.code == "hostile-output"]


@pytest.mark.parametrize("thing", [Runs(), Reaches(), functools.partial(eval, "1"), [{"a": (Runs(),)}]], ids=range(4))
def test_a_pth_that_keeps_hostile_names_says_so(thing: object, save, tmp_path: Path) -> None:
    source, target = save({"model": model().state_dict(), "extra": thing}), tmp_path / "out.pth"
    report = ckptkit.convert(source, target)
    (finding,) = hostile(report)
    assert report.ok and finding.severity == "warning" and finding.fix == "--weights-only"
    assert (
        "torch.nn.modules.module.Module.__init__" if isinstance(thing, Reaches) else "__builtin__.eval"
    ) in finding.message
    assert ckptkit.inspect(target)["trust"] == "hostile", "the output is as hostile"
    for options in ({"weights_only": True}, {"leave_out": ["extra"]}):
        clean = tmp_path / "clean.pth"
        assert hostile(ckptkit.convert(source, clean, force=True, **options)) == []
        assert ckptkit.inspect(clean)["trust"] == "safe"
    assert hostile(ckptkit.convert(source, tmp_path / "out.safetensors", weights_only=True)) == []


def test_a_hostile_value_among_the_weights_is_excluded_by_name(save, tmp_path: Path) -> None:
    source = save({**model().state_dict(), "bad[0]": Runs()})
    (finding,) = hostile(ckptkit.convert(source, tmp_path / "out.pth"))
    assert finding.fix == "--exclude 'bad[[]0]'"
    report = ckptkit.convert(source, tmp_path / "clean.pth", exclude="bad[[]0]")
    assert hostile(report) == [] and ckptkit.inspect(tmp_path / "clean.pth")["trust"] == "safe"


def test_shards_that_keep_hostile_names_say_so(save, tmp_path: Path) -> None:
    source = save({**model().state_dict(), "bad": Runs()})
    report = ckptkit.convert(source, tmp_path / "out.bin.index.json", max_shard_size=64)
    assert len(report.details["plan"]["shards"]) > 1
    assert [finding.fix for finding in hostile(report)] == ["--exclude bad"]


def test_a_plan_says_it_too_and_an_honest_source_says_nothing(save, tmp_path: Path) -> None:
    source = save({"model": model().state_dict(), "extra": Runs()}, "bad.pth")
    assert hostile(ckptkit.convert(source, tmp_path / "out.pth", dry_run=True))
    honest = save({"model": model().state_dict(), "args": argparse.Namespace(a=1)}, "good.pth")
    assert hostile(ckptkit.convert(honest, tmp_path / "out.pth")) == []
