"""Exactly a model's tensors under its names: what torch loads afterwards loads strictly into the model."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckptkit
from ckptkit import Like, RewriteError, VerifyError

Save = Callable[..., Path]
Through = Callable[..., Any]


class Net(nn.Module):
    """Layers that are known by name, one of them with a ``module`` of its own."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.mlp = nn.ModuleDict({"module": nn.Linear(4, 4)})
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes)


NET = "import torch; from torch import nn\n" + "\n".join(
    [
        "class Net(nn.Module):",
        "    def __init__(self, classes=3):",
        "        super().__init__()",
        "        self.features = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))",
        "        self.mlp = nn.ModuleDict({'module': nn.Linear(4, 4)})",
        "        self.norm = nn.LayerNorm(4)",
        "        self.head = nn.Linear(4, classes)",
    ]
)


def renamed(state: Mapping[str, Any], rename: Callable[[str], str], **others: torch.Tensor) -> OrderedDict[str, Any]:
    """The state_dict with its versions, renamed, and other tensors beside it."""
    made = OrderedDict((rename(name), value) for name, value in state.items())
    metadata = getattr(state, "_metadata", {})
    made._metadata = OrderedDict((rename(path + ".x")[:-2], entry) for path, entry in metadata.items() if path)
    made.update(others)
    return made


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("rename", "others"),
    [
        (lambda name: name, {}),
        (lambda name: name, {"queue": ONE, "fc.weight": ONE}),
        (lambda name: f"module.{name}", {"n_averaged": ONE}),
        (lambda name: f"module._orig_mod.{name}", {}),
        (lambda name: f"model._orig_mod.module.{name}", {"model.queue": ONE, "loss": ONE}),
        (lambda name: f"a.b.c.{name}", {"a.b.other": ONE, "z.features.0.weight": torch.ones(4, 2)}),
        (lambda name: name.replace("features.", "features.module."), {}),
        (lambda name: "net." + name.replace("features.", "features.module."), {"net.queue": ONE}),
        (lambda name: name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta"), {"x": ONE}),
        (lambda name: "module.bert." + name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta"), {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value("x.features.0.norm.weight"),
)
def test_names_are_found(rename: Callable[[str], str], others: dict[str, torch.Tensor], through: Through) -> None:
    model = Net()
    state = model.state_dict()
    loaded = through({"net": renamed(state, rename, **others), "epoch": 1}, Like(state))
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded._metadata.keys() <= state._metadata.keys()
    assert loaded._metadata["features.1"] == {"version": 2}
    Net().load_state_dict(loaded, strict=True)


def test_a_prefix_is_put_on(through: Through) -> None:
    for outer in (nn.DataParallel(Net()), nn.ModuleDict({"a": nn.ModuleDict({"b": Net()})})):
        loaded = through(Net().state_dict(), Like(outer.state_dict()))
        outer.load_state_dict(loaded, strict=True)


def test_old_names_of_weight_norm(through: Through) -> None:
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))).state_dict()
    expected = {"0.bias": (4,), "0.weight_g": (4, 1), "0.weight_v": (4, 3)}
    loaded = through(renamed(new, "module.{}".format), Like(expected))
    assert list(loaded) == list(expected)
    assert torch.equal(loaded["0.weight_v"], new["0.parametrizations.weight.original1"])


def test_a_tied_name_that_is_not_there(through: Through, save: Save) -> None:
    """It is the tensor that the model has under both names; nothing else is made up."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    state = model.state_dict()
    less = OrderedDict((name, value) for name, value in state.items() if name != "b.weight")
    loaded = through(less, Like(state, tied=[["a.weight", "b.weight"]]))
    assert list(loaded) == list(state)
    assert loaded["b.weight"].data_ptr() == loaded["a.weight"].data_ptr()
    with ckptkit.open(save(model, "tied.pth")) as reference:  # a checkpoint says itself what is tied
        assert list(through(less, Like(reference.state_dict))) == list(state)
    with pytest.raises(RewriteError, match=r"1 of its 4 tensors is not there: b\.weight"):
        through(less, Like(state))


def test_counts_of_batches_are_missing_where_torch_says_so(through: Through) -> None:
    model = Net()
    less = OrderedDict((name, value) for name, value in model.state_dict().items() if "num_batches" not in name)
    Net().load_state_dict(through(less, Like(model.state_dict())), strict=True)
    less._metadata = model.state_dict()._metadata
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*num_batches_tracked"):
        Net().load_state_dict(less, strict=True)
    with pytest.raises(RewriteError, match=r"is not there: features\.1\.num_batches_tracked"):
        through(less, Like(model.state_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None, "norm.bias": None}, r"2 of its 13 tensors are not there: norm\.bias, head\.weight"),
        ({"head.bias": torch.ones(5)}, r"1 tensor has another shape: head\.bias \[5\] instead of \[3\]"),
        ({"head.bias": torch.ones(3).to_sparse()}, r"head\.bias is not a plain tensor instead of \[3\]"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_does_not_fit_is_refused(prefix: str, change: dict[str, Any], message: str, through: Through) -> None:
    state = {**Net().state_dict(), **change}
    with pytest.raises(RewriteError, match=message):
        through({prefix + name: value for name, value in state.items() if value is not None}, Like(Net().state_dict()))


def test_two_sets_that_fit_equally_are_named(through: Through) -> None:
    state = Net().state_dict()
    both = {f"{side}.{name}": value.clone() for side in ("encoder_q", "encoder_k") for name, value in state.items()}
    expected = (
        r"2 sets of tensors fit the reference equally well: those of --strip-prefix encoder_q\., of --strip-prefix enc"
    )
    with pytest.raises(RewriteError, match=expected):
        through(both, Like(state))
    chosen = through(both, ckptkit.StripPrefix("encoder_k"), Like(state))  # names that fit as they are go first
    assert all(torch.equal(chosen[name], state[name]) for name in state)
    copied = {f"module.{copy}{name}": value.clone() for copy in ("", "target.") for name, value in state.items()}
    assert list(through({**copied, "module.queue": ONE}, Like(state))) == list(state)  # wrappers aside they do, too
    again = {name.replace("_k.", "_q2."): value for name, value in both.items()}
    tied = {name: again[name.replace("_q2.", "_q.")] for name in again}  # one set under two names
    assert list(through(tied, Like(state))) == list(state)


def test_a_model_without_tensors() -> None:
    with pytest.raises(RewriteError, match="the reference has no tensors to compare with"):
        Like({})
    assert repr(Like({"a": (1,)}, label="torchvision:resnet18")) == "Like('torchvision:resnet18')"


# The command.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    model = Net()
    averaged = AveragedModel(model).state_dict()
    torch.save({"model": model.state_dict(), "model_ema": averaged, "gan": Net(7).state_dict()}, "resume.pth")
    save_file(model.state_dict(), "reference.safetensors")
    return tmp_path


def test_the_section_is_found(folder: Path) -> None:
    report = ckptkit.convert("resume.pth", "gan.pth", like="nets.py:Net", model_args={"classes": "7"})
    assert report.details["section"] == "gan" and report.details["like"] == "nets.py:Net"
    Net(7).load_state_dict(torch.load("gan.pth"), strict=True)
    told = {finding.code: finding.message for finding in report.findings}
    assert told["like-reference"] == "all 13 tensors of nets.py:Net are present in section 'gan'"
    assert told["left-out"] == "not in the output: model, model_ema"
    with pytest.raises(RewriteError, match=r"fit nets\.py:Net equally well: those of --section model, of"):
        ckptkit.convert("resume.pth", "out.pth", like="nets.py:Net")
    with pytest.raises(
        RewriteError,
        match=r"no section fits: 'model' .*head.weight \[3, 4\] instead of \[9, "
        r"4\].*'gan'",
    ):
        ckptkit.convert("resume.pth", "out.pth", like=lambda: Net(9))
    report = ckptkit.convert("resume.pth", "ema.safetensors", section="model_ema", like=Net())
    assert report.details["dropped"] == ["n_averaged"]
    assert len(report.details["renames"]) == 13
    assert load_file("ema.safetensors").keys() == Net().state_dict().keys()
    assert ckptkit.verify("ema.safetensors", model=Net, forward=False).ok


def test_another_checkpoint_is_a_model_too_and_needs_no_torch(folder: Path) -> None:
    program = (
        "import sys, ckptkit; ckptkit.convert('resume.pth', 'out.pth', section='model_ema', "
        "like='reference.safetensors', dtype='bfloat16', keep_dtype='norm.*'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    loaded = torch.load("out.pth")
    assert loaded.keys() == load_file("reference.safetensors").keys()
    kept = {name for name, value in loaded.items() if value.dtype == torch.float32}
    assert kept == {"norm.weight", "norm.bias"}
    report = ckptkit.convert("resume.pth", "out.pth", section="gan", like=lambda: Net(7), dry_run=True)
    assert report.details["operations"] == ["WeightsOnly()", "Like('<lambda>')"]


def test_what_is_asked_for_goes_first(folder: Path, save: Save) -> None:
    state = Net().state_dict()
    both = {f"module.{side}.{name}": value.clone() for side in ("q", "k") for name, value in state.items()}
    torch.save(both, "moco.pth")
    for options in ({"include": "module.k.*"}, {"strip_prefix": "module.k"}, {"strip_module": True, "exclude": "q.*"}):
        report = ckptkit.convert("moco.pth", "out.pth", like="reference.safetensors", force=True, **options)
        assert set(report.details["dropped"]) == {f"module.q.{name}" for name in state}
        assert all(old == f"module.k.{new['to']}" for new in report.details["renames"] for old in [new["from"]])
        assert list(torch.load("out.pth")) == list(load_file("reference.safetensors"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"like": "nothing.pth"}, ckptkit.MissingFileError, r"nothing\.pth: no such file"),
        (
            {"like": "resume.pth"},
            ckptkit.SectionError,
            r"resume\.pth: does not have exactly one set of weights to match \('model', 'model_ema', 'gan'\)",
        ),
        ({"like": "nets.py:Nothing"}, VerifyError, "there is no 'Nothing' in it"),
        (
            {"like": "reference.safetensors", "model_args": {"a": "1"}},
            RewriteError,
            "is a checkpoint, so --model-arg does not apply",
        ),
        ({"model_args": {"a": "1"}}, RewriteError, "--model-arg is for the model of --like, which is not given"),
    ],
)
def test_what_is_no_reference(options: dict[str, Any], error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        ckptkit.convert("resume.pth", "out.pth", **options)
    assert not (folder / "out.pth").exists()
