"""What is advised where a checkpoint does not fit: the cause, and the command that fixes it."""

from __future__ import annotations

import gc
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from support.fitting import NOT_LOADED, Net, Run, check_file, codes, finding, state, without
from torch import nn

import ckptkit
from ckptkit.cli import cli, main
from ckptkit.verifier.advice import folded


def carry_out(fix: str | None, *options: str) -> None:
    """Run the command that was told."""
    assert fix is not None
    program, *arguments = shlex.split(fix)
    assert program == "ckptkit"
    threshold = gc.get_threshold()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *options])
    gc.set_threshold(*threshold)
    assert ended.value.code == 0


def test_another_architecture(run: Run, save: Any) -> None:
    """One of which nothing is in the reference, and a sibling of it."""
    squeeze = torchvision.models.squeezenet1_1().state_dict()
    report = run(squeeze, model="torchvision:shufflenet_v2_x0_5")
    assert codes(report) == [("info", "fit-coverage"), ("error", "another-architecture"), NOT_LOADED]
    found = finding(report, "another-architecture")
    assert "names and shapes of torchvision squeezenet1_1, not those of torchvision:shufflenet_v2_x0_5" in found.message
    assert found.fix.endswith("model.pth --model torchvision:squeezenet1_1")

    weights = torchvision.models.resnet34(num_classes=7).state_dict()
    path = save({"model": {f"module.{name}": value for name, value in weights.items()}, "ema": state()})
    report = check_file(path, section="model", model="torchvision:resnet18")
    found = finding(report, "another-architecture")
    assert found.message.startswith("the checkpoint has the names and shapes of torchvision resnet34, head 1000 → 7")
    expected = "--model torchvision:resnet34 --model-arg num_classes=7 --section model --strip-module"
    assert found.fix.endswith(expected)
    carry_out(found.fix, "--no-forward", "--device", "cpu")


def test_no_architecture_is_advised_where_the_reference_is_right(run: Run) -> None:
    """Another head, a layer more, a layer less: of the reference itself, or of a model made from it."""
    make, model = torchvision.models.shufflenet_v2_x0_5, "torchvision:shufflenet_v2_x0_5"
    weights = make().state_dict()
    for misfit in (
        run(make(num_classes=3).state_dict(), model=model),
        run(weights, model=lambda: make(num_classes=3)),
        run({**weights, "extra": torch.ones(1)}, model=model),
        run({name: value for name, value in weights.items() if name != "conv1.0.weight"}, model=model),
    ):
        assert not misfit.ok
        assert "another-architecture" not in [code for _, code in codes(misfit)]


@pytest.mark.parametrize(
    ("prefix", "option"),
    [
        ("module.", "--strip-module"),
        ("module._orig_mod.", "--strip-module"),
        ("_orig_mod.", "--strip-module"),
        ("model.encoder.", "--strip-prefix model.encoder."),
    ],
)
def test_a_prefix_too_much(run: Run, prefix: str, option: str) -> None:
    report = run({prefix + name: value for name, value in Net().state_dict().items()}, model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("error", "wrapper-prefix"), NOT_LOADED]
    found = finding(report, "wrapper-prefix")
    assert f"9 of 9 keys have `{prefix}`; once renamed, all 9 tensors of the reference fit" in found.message
    assert found.fix.startswith("ckptkit convert ") and found.fix.endswith(".safetensors " + option)
    assert len(report.details["unexpected_keys"]) == 9


def test_a_prefix_that_brings_little_together_is_no_cause(run: Run) -> None:
    few = {"other." + name: value for name, value in state().items() if name.startswith("head.")}
    report = run(few | {"stem.weight": torch.ones(1)}, model=Net)
    assert ("error", "nothing-matches") in codes(report)
    report = run(few | {"body.0.weight": torch.ones(5, 3)}, model=Net)
    assert [code for _, code in codes(report)] == ["fit-coverage", "missing-keys", "unexpected-keys", "not-loaded"]


def test_a_prefix_too_few(run: Run) -> None:
    report = run(Net().state_dict(), model=lambda: nn.DataParallel(Net()))
    found = finding(report, "wrapper-prefix")
    assert "the reference's names have `module.`, none of the 9 keys does; once renamed, all 9" in found.message
    assert found.fix.endswith("--add-module")
    wrapped = nn.ModuleDict({"net": Net()})
    assert finding(run(Net().state_dict(), model=wrapped), "wrapper-prefix").fix.endswith("--add-prefix net.")


def test_the_command_that_is_told_really_fixes_it(save: Any) -> None:
    path = save({"module." + name: value for name, value in Net().state_dict().items()})
    fix = finding(check_file(path, model=Net), "wrapper-prefix").fix
    carry_out(fix)
    assert check_file(path.with_suffix(".safetensors"), model=Net).ok


def test_a_prefix_and_another_head(run: Run) -> None:
    report = run({"module." + name: value for name, value in Net(7).state_dict().items()}, model=Net)
    assert "once renamed, 7 of 9 tensors of the reference fit" in finding(report, "wrapper-prefix").message


def test_a_prefix_in_one_of_several_sections(run: Run) -> None:
    wrapped = {"module." + name: value for name, value in Net().state_dict().items()}
    report = run({"model": wrapped, "other": {"other.weight": torch.ones(1)}}, model=Net)
    assert "--section model --strip-module" in finding(report, "wrapper-prefix").fix


def test_another_head(run: Run, save: Any) -> None:
    weights = torchvision.models.resnet18(num_classes=10).state_dict()
    report = run(weights, model="torchvision:resnet18")
    assert codes(report) == [("info", "fit-coverage"), ("error", "shape-mismatch"), NOT_LOADED]
    found = finding(report, "shape-mismatch")
    assert (
        "another head: `fc` has 10 outputs in the checkpoint and 1000 in the reference; everything else"
    ) in found.message
    assert found.fix.endswith("model.pth --model torchvision:resnet18 --model-arg num_classes=10")
    assert report.details["shape_mismatches"] == [
        {"name": "fc.weight", "checkpoint": [10, 512], "reference": [1000, 512]},
        {"name": "fc.bias", "checkpoint": [10], "reference": [1000]},
    ]
    assert "120 of 122 tensors, 95.6 % of parameters" in finding(report, "fit-coverage").message
    assert run(weights, model="torchvision:resnet18", model_args={"num_classes": "10"}).ok
    assert finding(run(Net(7).state_dict(), model=Net), "shape-mismatch").fix is None


def test_a_model_that_is_a_head(run: Run) -> None:
    found = finding(run(nn.Linear(3, 1).state_dict(), model=lambda: nn.Linear(3, 2)), "shape-mismatch")
    assert found.message.startswith(
        "another head: the model itself has 1 output in the checkpoint and 2 in the reference; everything else fits"
    )


def test_a_detector_with_another_head(run: Run) -> None:
    weights = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    ).state_dict()
    found = finding(run(weights, model="torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"), "shape-mismatch")
    assert found.fix.endswith("--model-arg num_classes=3")


def test_a_head_in_many_layers(run: Run) -> None:
    """Each of SSD's six has its own number of outputs for a class."""
    name = "ssdlite320_mobilenet_v3_large"
    weights = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).state_dict()
    found = finding(run(weights, model=f"torchvision:{name}"), "shape-mismatch")
    assert found.message.startswith("another head: `head.classification_head.module_list.0.1`, ")
    assert found.fix.endswith("--model-arg num_classes=5")


def test_other_shapes(run: Run) -> None:
    report = run(state(body__0__weight=torch.ones(5, 4)), model=Net)
    found = finding(report, "shape-mismatch")
    assert "1 tensor has another shape" in found.message
    assert "body.0.weight [5, 4] instead of [5, 3]" in found.message
    assert found.fix is None


def test_auxiliary_classifiers(run: Run) -> None:
    aux = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    report = run(aux.state_dict(), model="torchvision:fcn_resnet50")
    assert finding(report, "unexpected-keys").fix.endswith("--model-arg aux_loss=True")
    plain = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False)
    report = run(plain.state_dict(), model="torchvision:googlenet")
    assert finding(report, "missing-keys").fix.endswith("--model-arg aux_logits=False")
    assert run(plain.state_dict(), model="torchvision:googlenet", model_args={"aux_logits": "False"}).ok


# Names of other releases.


def renamed_back(weights: dict[str, torch.Tensor], pattern: str, replacement: str) -> dict[str, torch.Tensor]:
    return {re.sub(pattern, replacement, name): value for name, value in weights.items()}


@pytest.mark.parametrize("wrapper", ["", pytest.param("module.", marks=pytest.mark.thorough)])
def test_old_names_of_densenet(save: Any, wrapper: str) -> None:
    weights = torchvision.models.densenet121(num_classes=3).state_dict()
    old = renamed_back(weights, r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.")
    assert sum("norm.1.weight" in name for name in old) == 58
    path = save({wrapper + name: value for name, value in old.items()})
    options = {"model": "torchvision:densenet121", "model_args": {"num_classes": 3}}
    found = finding(check_file(path, **options), "old-names")
    assert "DenseNets before 0.3; once renamed, all 727 tensors of the reference fit" in found.message
    carry_out(found.fix)
    assert check_file(path.with_suffix(".safetensors"), **options).ok


class Gammas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LayerNorm(3) for _ in range(3))
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_old_names_of_layer_norm(save: Any, wrapper: str) -> None:
    weights = dict(Gammas().state_dict())
    old = renamed_back(renamed_back(weights, r"(layers\.\d)\.weight", r"\1.gamma"), r"(layers\.\d)\.bias", r"\1.beta")
    path = save({wrapper + name: value for name, value in old.items()})
    found = finding(check_file(path, model=Gammas), "old-names")
    assert "6 of 8 keys are `gamma` and `beta`" in found.message
    carry_out(found.fix)
    assert check_file(path.with_suffix(".safetensors"), model=Gammas).ok


def test_new_weight_norm_for_the_older_one(save: Any) -> None:
    def older() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)))

    path = save(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))).state_dict())
    found = finding(check_file(path, model=older), "old-names")
    carry_out(found.fix)
    assert check_file(path.with_suffix(".safetensors"), model=older).ok
    # The other way round torch's own hook renames while it loads.
    path = save(older().state_dict(), "older.pth")
    report = check_file(path, model=lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))))
    assert report.ok and ("info", "upgraded-keys") in codes(report)


def test_old_names_that_are_no_cause(run: Run) -> None:
    """One such name among others does not make a checkpoint an old one."""
    report = run({**state(), "head.gamma": torch.ones(1)}, model=Net)
    assert [code for _, code in codes(report)] == ["fit-coverage", "unexpected-keys", "not-loaded"]


@pytest.mark.parametrize("is_older", [True, False])
def test_the_other_form_of_spectral_norm(save: Any, is_older: bool) -> None:
    def older() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(*(nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)))

    def newer() -> nn.Module:
        convs = (nn.Conv2d(3, 3, 3) for _ in range(2))
        return nn.Sequential(*(nn.utils.parametrizations.spectral_norm(conv) for conv in convs))

    source, reference = (older, newer) if is_older else (newer, older)
    path = save(source().state_dict())
    found = finding(check_file(path, model=reference), "old-names")
    assert "spectral_norm" in found.message and "once renamed, all 8 tensors of the reference fit" in found.message
    carry_out(found.fix)
    assert check_file(path.with_suffix(".safetensors"), model=reference).ok


# Other weights in the same file.


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_another_section_fits(save: Any, wrapper: str) -> None:
    ema = {wrapper + name: value for name, value in state().items()}
    path = save({"state_dict": without("head.weight", "head.bias"), "ema": ema})
    report = check_file(path, section="state_dict", model=Net)
    found = finding(report, "another-section")
    assert "section 'ema' has 9 of the reference's 9 tensors, the selected 'state_dict' 7" in found.message
    assert found.fix is None  # Net has no name to put in a command
    report = check_file(path, section="ema", model=Net)
    assert report.ok is (not wrapper)


def test_the_command_that_chooses_another_section(save: Any) -> None:
    good = torchvision.models.squeezenet1_1(num_classes=2).state_dict()
    bad = {name: value for name, value in good.items() if not name.startswith("classifier")}
    path = save({"model": bad, "ema": {"module." + name: value for name, value in good.items()}})
    options = {"model": "torchvision:squeezenet1_1", "model_args": {"num_classes": "2"}}
    found = finding(check_file(path, section="model", **options), "another-section")
    assert found.fix.endswith("--model-arg num_classes=2 --section ema --strip-module")
    carry_out(found.fix, "--no-forward", "--device", "cpu")


def test_other_weights_are_told(run: Run) -> None:
    report = run({"model": state(), "ema": state()}, section="model", model=Net)
    assert report.ok
    assert "the weights of section 'model' are verified; the file also contains ema" in str(report.findings)
    assert ("info", "other-weights") not in codes(run({"model": state(), "optimizer": {"lr": 0.1}}, model=Net))


def test_no_section_is_advised_that_fits_no_better(run: Run) -> None:
    report = run({"model": without("head.bias"), "ema": without("head.bias")}, section="model", model=Net)
    assert [code for _, code in codes(report)] == ["fit-coverage", "missing-keys", "other-weights", "not-loaded"]


def test_what_fits_equally_is_named(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prefixes, and two sections."""
    (tmp_path / "net.py").write_text("from support.fitting import Net")
    monkeypatch.chdir(tmp_path)
    both = {f"{side}.{name}": value.clone() for side in ("q", "k") for name, value in state().items()}
    found = finding(check_file(save(both), model="net.py:Net"), "wrapper-prefix")
    assert "9 of 18 keys have `q.`" in found.message
    assert found.message.endswith("all 9 tensors of the reference fit; just as many after --strip-prefix k.")
    assert found.fix.endswith("model.safetensors --strip-prefix q. --like net.py:Net")
    path = save({"a": without("head.bias"), "b": state(), "c": state()})
    found = finding(check_file(path, section="a", model="net.py:Net"), "another-section")
    assert "section 'b' has 9 of the reference's 9 tensors (and so do 'c'), the selected 'a' 8" in found.message


def test_commands_keep_the_options_that_were_given(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text("from support.fitting import Net")
    monkeypatch.chdir(tmp_path)
    path = save({"a": {"module." + name: value for name, value in without("head.bias").items()}, "b": state()})
    given = {"section": "a", "strip_module": True, "allow_unexpected": "x*", "seed": 3, "ignore_checksums": True}
    report = ckptkit.verify(path, model="net.py:Net", model_args={"classes": "4"}, input_shapes=[(2, 3)], **given)
    words = shlex.split(finding(report, "another-section").fix)
    assert words[:2] == ["ckptkit", "verify"]
    for option in ("--seed 3", "--input-shape 2,3", "--model-arg classes=4", "--allow-unexpected x*", "--strip-module"):
        assert f" {option} " in f"{' '.join(words)} "
    assert "--ignore-checksums" in words and words[-2:] == ["--section", "b"]
    assert cli.main(words[1:], standalone_mode=False) == 0
    path = save({"a": {"module." + name: value for name, value in state(x=torch.ones(1)).items()}, "b": {"w": state()}})
    report = ckptkit.verify(path, model="net.py:Net", section="a", ignore_checksums=True, forward=False)
    expected = "model.safetensors --section a --like net.py:Net --ignore-checksums"
    assert finding(report, "wrapper-prefix").fix.endswith(expected)


# Folding.


def test_names_are_folded_by_module() -> None:
    among = ["stem.weight", "a.0.w", "a.0.b", "a.1.w", "c.w", "top"]
    assert folded(["a.0.w", "a.0.b", "a.1.w", "top"], among) == ["a.* (3)", "top"]
    assert folded(["a.0.w", "a.0.b"], among) == ["a.0.* (2)"]
    assert folded(["a.0.w", "a.1.w", "c.w"], among) == ["a.0.w", "a.1.w", "c.w"]
    assert folded([], among) == []
    assert folded([".".join("x" * 500)], [".".join("x" * 500)]) == [".".join("x" * 500)]


def test_missing_and_unexpected_modules_are_folded(run: Run) -> None:
    report = run(without("body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var",
                         "body.1.num_batches_tracked"), model=Net)  # fmt: skip
    assert "in state_dict: body.1.* (4); 4 of" in finding(report, "missing-keys").message  # torch fills in the counter
    assert len(report.details["missing_keys"]) == 4
    report = run(state(more__a=torch.ones(1), more__b=torch.ones(1)), model=Net)
    assert "in state_dict: more.* (2); 2 of" in finding(report, "unexpected-keys").message
