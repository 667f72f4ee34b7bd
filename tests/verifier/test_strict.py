"""verify accepts what torch's strict load accepts, and names what that refuses: torch is asked, key by key."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from click.testing import CliRunner
from support.fitting import check_file, codes
from torch import nn
from torch.nn.utils import parametrizations

import ckptkit
from ckptkit.cli import convert, verify


class OwnNorm(nn.Module):
    """A norm without a counter, as inplace_abn has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm1d(3)
        self.b = self.a


class ExtraState(nn.Linear):
    """Keeps something beside its tensors."""

    kept: object = {"scale": 1}

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: object) -> None:
        self.kept = state


class ExtraTensor(ExtraState):
    kept: object = torch.ones(2)


class Renaming(nn.Linear):
    """Takes an older name of its weight."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Versioned(nn.Linear):
    """Before its version 2 it had no bias."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict.setdefault(prefix + "bias", torch.zeros(3))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class LookingAtValues(nn.Linear):
    """A hook that needs the values drops what is too small to matter."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self._register_load_state_dict_pre_hook(self.look)

    @staticmethod
    def look(state_dict: Any, prefix: str, *args: Any) -> None:
        for name in [name for name, value in state_dict.items() if float(value.abs().sum()) < 0]:
            del state_dict[name]
        state_dict.pop(prefix + "mask", None)


def older(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(wrap(nn.Linear(3, 3)))

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "plain batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)),
    "batch norm without statistics": lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True)),
    "instance norm with statistics": lambda: nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True)),
    "synchronized": lambda: nn.Sequential(nn.SyncBatchNorm(3), nn.LayerNorm(3)),
    "own norm": lambda: nn.Sequential(nn.Linear(3, 3), OwnNorm()),
    "tied": Tied,
    "shared module": SharedModule,
    "extra state": lambda: nn.Sequential(ExtraState(3, 3)),
    "extra tensor": lambda: nn.Sequential(ExtraTensor(3, 3)),
    "renaming": lambda: nn.Sequential(Renaming(3, 3)),
    "versioned": lambda: nn.Sequential(Versioned(3, 3)),
    "looking at values": lambda: nn.Sequential(LookingAtValues(), nn.BatchNorm1d(3)),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
    "older weight norm": older(nn.utils.weight_norm),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))),
    "older spectral norm": older(nn.utils.spectral_norm),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3))),
    "recurrent": lambda: nn.Sequential(nn.LSTM(3, 2)),
    "attention": lambda: nn.Sequential(nn.MultiheadAttention(2, 1)),
    "parameter dict": lambda: nn.ParameterDict({"x": torch.ones(3, 2), "y": torch.ones(())}),
}


def reshaped(value: Any) -> Any:
    return value.reshape(-1)[:1].repeat(7, 2) if isinstance(value, torch.Tensor) else value


def perturbed(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state as it is, and with each of its keys dropped, renamed and reshaped, and others added."""
    yield "as it is", dict(state)
    yield (
        "half",
        {n: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in state.items()},
    )
    for name in state:
        yield f"without {name}", {n: v for n, v in state.items() if n != name}
        yield f"{name} renamed", {n + "_old" * (n == name): v for n, v in state.items()}
        yield f"{name} reshaped", {n: reshaped(v) if n == name else v for n, v in state.items()}
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in state):
        for added in ("num_batches_tracked", "_extra_state", "kernel", "mask", "more.weight"):
            name = f"{prefix}.{added}" if prefix else added
            yield f"with {name}", {**state, name: state.get(name, torch.tensor(3))}
    if (counters := [name for name in state if name.endswith("num_batches_tracked")]) and len(counters) > 1:
        yield "without counters", {n: v for n, v in state.items() if n not in counters}


def as_torch_says(model: nn.Module, state: Any) -> tuple[bool, set[str], set[str], set[str]]:
    """Whether the strict load takes it, and the names that its error names: missing, unexpected, of another size."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        listed = {what: set(re.findall(r'"([^"]+)"', line)) for what, line in
                  re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", str(error))}  # fmt: skip
        sizes = set(re.findall(r"size mismatch for (\S+): ", str(error)))
        return False, listed.get("Missing", set()), listed.get("Unexpected", set()), sizes
    return True, set(), set(), set()


ALIKE = ("plain batch norm", "synchronized", "older weight norm", "orthogonal", "parameter dict")
"""Kinds that go the way of others."""


def kinds(with_versions: bool) -> Iterator[Any]:
    """All of them; thorough are those like others, and those that have no versions to go without."""
    for kind, make in MODELS.items():
        has_versions = any(part.get("version", 1) > 1 for part in make().state_dict()._metadata.values())
        more = kind in ALIKE or not (with_versions or has_versions)
        yield pytest.param(kind, with_versions, marks=pytest.mark.thorough if more else ())


@pytest.mark.parametrize(("kind", "with_versions"), [*kinds(True), *kinds(False)])
def test_verify_says_what_the_strict_load_says(kind: str, with_versions: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = MODELS[kind]().state_dict()
    seen = set()
    for what, values in perturbed(whole):
        if not with_versions and not what.startswith(("as it is", "without")):
            continue
        state = OrderedDict(values)
        if with_versions:
            state._metadata = whole._metadata  # type: ignore[attr-defined]
        path = tmp_path / "x.pth"
        torch.save(state, path)
        accepted, missing, unexpected, sizes = as_torch_says(MODELS[kind](), torch.load(path, weights_only=False))
        report = check_file(path, model=MODELS[kind])
        said = f"{what}: {[f.line for f in report.findings]}"
        assert report.ok == accepted, said
        assert set(report.details["missing_keys"]) == missing, said
        assert set(report.details["unexpected_keys"]) == unexpected, said
        errors = " ".join(f.message for f in report.findings if f.severity == "error")
        assert all(name in errors and "size mismatch for" in errors for name in sizes), said
        causes = ("wrapper-prefix", "nothing-matches", "old-names")  # in place of a list of names
        if not any(code in causes for _, code in codes(report)):
            assert ("Missing key(s) in state_dict: " in errors) == bool(missing), said
            assert ("Unexpected key(s) in state_dict: " in errors) == bool(unexpected), said
        seen.add(accepted)
    assert seen == {True, False}


@pytest.mark.parametrize("kind", ["batch norm", "tied", "instance norm with statistics", "extra tensor", "weight norm"])
def test_safetensors_are_held_to_its_own_load_model(kind: str, tmp_path: Path) -> None:
    """The container records no versions, and stores tied tensors under one name alone."""
    whole = {name: value.clone() for name, value in MODELS[kind]().state_dict().items()}
    for what, values in perturbed(whole):
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(values, path)
        try:
            safetensors.torch.load_model(MODELS[kind](), path)
            accepted = True
        except RuntimeError:
            accepted = False
        report = check_file(path, model=MODELS[kind])
        if kind == "tied" and {"a.weight", "b.weight"} <= set(values):
            continue  # load_model takes no file that has both names, load_state_dict does
        assert report.ok == accepted, f"{what}: {[f.line for f in report.findings]}"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_follow_the_rule_of_their_container(ending: str, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in Tied().state_dict().items() if name != "b.weight"}
    shard = tmp_path / f"model-00001-of-00001.{ending}"
    safetensors.torch.save_file(state, shard) if ending == "safetensors" else torch.save(state, shard)
    index = tmp_path / f"model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, shard.name)}))
    report = check_file(index, model=Tied)
    code = ("info", "tied-restored") if ending == "safetensors" else ("error", "missing-keys")
    assert codes(report)[1] == code and report.ok == (ending == "safetensors")


def write_factories(folder: Path) -> None:
    (folder / "ref.py").write_text(
        "from torch import nn\n"
        "def bn(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))\n"
        "def no_bn(): return nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4))\n"
        "def group(): return nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4))\n"
        "def tied():\n    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))\n"
        "    m[1].weight = m[0].weight\n    return m\n"
    )


def counted(state: Any, *drop: str, **add: Any) -> Any:
    kept = OrderedDict((name, value) for name, value in state.items() if name not in drop)
    kept.update(add)
    kept._metadata = state._metadata  # type: ignore[attr-defined]
    return kept


def states() -> dict[str, tuple[Any, str, str]]:
    """Weights that only loading minds: with the reference, and what the finding begins with."""
    torch.manual_seed(0)
    bn = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).state_dict()
    group = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)).state_dict()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    tied[1].weight = tied[0].weight
    inner = [name for name in bn if name.startswith("1.")]
    return {
        "extra": (counted(group, **{"1.num_batches_tracked": torch.tensor(7)}), "group", "Unexpected"),
        "one of two is extra": (
            counted(bn, *inner, **{"1.num_batches_tracked": torch.tensor(7)}), "no_bn", "Unexpected",
        ),
        "missing": (counted(bn, "1.num_batches_tracked"), "bn", "Missing"),
        "tied": (counted(tied.state_dict(), "1.weight"), "tied", "Missing"),
        "tied and a counter": (counted(tied.state_dict(), "0.weight", "2.num_batches_tracked"), "tied", "Missing"),
        "two sides": (counted(tied.state_dict(), "1.weight", **{"0.num_batches_tracked": torch.tensor(1)}), "tied",
                      "Missing"),
    }  # fmt: skip


def test_what_only_loading_minds_is_not_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it for a model that an index knows under another name than the reference's."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("import torchvision\n\ndef build():\n    return torchvision.models.resnet18()\n")
    state = torchvision.models.resnet18().state_dict()
    torch.save(counted(state, "bn1.num_batches_tracked"), "x.pth")
    report = check_file(Path("x.pth"), model="net.py:build")
    assert [code for _, code in codes(report)] == ["fit-coverage", "missing-keys", "not-loaded"]
    assert "--allow-missing '*num_batches_tracked'" in str(report.findings[1].fix)


@pytest.mark.parametrize("kind", states())
def test_the_fixes_lead_to_a_file_that_passes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_factories(tmp_path)
    state, factory, words = states()[kind]
    torch.save(state, "x.pth")
    command, steps = ["x.pth", "--model", f"ref.py:{factory}", "--no-forward"], 0
    report = ckptkit.verify("x.pth", model=f"ref.py:{factory}", forward=False)
    [told, *_] = [f.message for f in report.findings if f.severity == "error"]
    assert told.startswith(f"{words} key(s) in state_dict: ")
    [checked, *_] = ckptkit.check("x.pth", fits=f"ref.py:{factory}").findings
    assert (checked.severity, checked.rule, checked.message) == ("error", "fits", told)
    while (done := CliRunner().invoke(verify.command, [*command, "--json"], standalone_mode=False)).return_value:
        [fix, *_] = [f["fix"] for f in json.loads(done.stdout)["findings"] if f["fix"]]
        _, *command = shlex.split(fix)
        if command[0] == "convert":
            assert CliRunner().invoke(convert.command, command[1:], standalone_mode=False).return_value == 0
            command = ["verify", command[2], "--model", f"ref.py:{factory}"]
        command, steps = [*command[1:], "--no-forward"], steps + 1
        assert steps < 4
    assert steps
