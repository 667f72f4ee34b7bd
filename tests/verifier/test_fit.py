"""The fit and load checks: every finding has a checkpoint that provokes it."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from ckptkit.errors import SectionError, VerifyError
from ckptkit.formats import read
from ckptkit.report import Report
from ckptkit.verifier import verify

Run = Callable[..., Report]


@pytest.fixture
def run(save: Any) -> Run:
    """``run(obj, model=..., ...)`` saves with torch and verifies, without a forward pass unless asked."""

    def check(obj: object, *, device_tag: str = "cpu", **options: Any) -> Report:
        return check_file(save(obj, device=device_tag), **options)

    return check


def check_file(path: Path, **options: Any) -> Report:
    checkpoint, file = read(path)
    try:
        return verify(checkpoint, **{"forward": False, "device": "cpu", **options})
    finally:
        file.close()


def codes(report: Report) -> list[tuple[str, str]]:
    return [(f.severity, f.code) for f in report.findings]


def finding(report: Report, code: str) -> Any:
    [found] = [f for f in report.findings if f.code == code]
    return found


class Net(nn.Module):
    """Linear, batch norm and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    values = dict(Net().state_dict())
    values.update({name.replace("__", "."): value for name, value in changes.items()})
    return values


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state().items() if name not in names}


NOT_LOADED = ("info", "not-loaded")


def test_all_fits(run: Run) -> None:
    report = run(Net().state_dict(), model=Net)
    assert report.ok
    assert codes(report) == [("info", "fit-coverage")]
    assert finding(report, "fit-coverage").message == "9 of 9 tensors, 100.0 % of parameters, of Net"
    assert report.details["coverage"] == {"tensors": 9, "of": 9, "parameters_share": 1.0}
    assert report.details["loaded"] is True
    assert report.details["missing_keys"] == report.details["unexpected_keys"] == []


def test_cuda_tags_never_matter(run: Run) -> None:
    assert run(Net().state_dict(), device_tag="cuda:3", model=Net).ok


def test_missing_keys(run: Run) -> None:
    report = run(without("head.bias", "body.0.bias"), model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("error", "missing-keys"), NOT_LOADED]
    assert report.details["missing_keys"] == ["body.0.bias", "head.bias"]
    assert "2 of the reference's 9 tensors are not in the checkpoint: body.0.bias, head.bias" in str(report.findings)
    share = (54 - 9) / 54
    assert report.details["coverage"] == {"tensors": 7, "of": 9, "parameters_share": pytest.approx(share)}
    assert "7 of 9 tensors, 83.3 % of parameters" in finding(report, "fit-coverage").message
    assert report.details["loaded"] is False


def test_long_lists_are_folded_in_messages_alone(run: Run) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(9)))
    report = run({"0.weight": torch.ones(1, 1)}, model=model)
    assert "2.weight, 3.weight, 4.weight, 5.weight and 3 more" in finding(report, "missing-keys").message
    assert len(report.details["missing_keys"]) == 8


def test_unexpected_keys(run: Run) -> None:
    report = run(state(body__2__weight=torch.ones(1)), model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("error", "unexpected-keys"), NOT_LOADED]
    assert report.details["unexpected_keys"] == ["body.2.weight"]


def test_allowed_names(run: Run) -> None:
    odd = without("head.bias", "head.weight") | {"extra.w": torch.ones(1)}
    report = run(odd, model=Net, allow_missing=["head.*"], allow_unexpected=["extra.*"])
    assert report.ok
    assert codes(report) == [
        ("info", "fit-coverage"), ("info", "allowed-missing"), ("info", "allowed-unexpected"),
    ]  # fmt: skip
    assert report.details["missing_keys"] == report.details["unexpected_keys"] == []
    assert not run(odd, model=Net, allow_missing=["head.b*"], allow_unexpected=["*"]).ok
    assert not run(odd, model=Net, allow_missing=["*"]).ok


def test_nothing_checked_is_never_ok(run: Run) -> None:
    strangers = {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}
    everything = {"allow_missing": ["*"], "allow_unexpected": ["*"]}
    for options in ({}, everything):
        report = run(strangers, model=Net, **options)
        assert codes(report) == [("info", "fit-coverage"), ("error", "nothing-matches"), NOT_LOADED]
        assert "0 of 9 tensors, 0.0 % of parameters" in finding(report, "fit-coverage").message
        assert "body.0.weight" in finding(report, "nothing-matches").message
        assert "a.weight" in finding(report, "nothing-matches").message
    assert codes(run(strangers, model=nn.Identity(), allow_unexpected=["*"]))[1] == ("error", "nothing-matches")
    # Counters that torch fills in are no match.
    assert ("error", "nothing-matches") in codes(run(strangers, model=nn.BatchNorm1d(2), **everything))


def test_another_architecture(run: Run) -> None:
    squeeze = torchvision.models.squeezenet1_1().state_dict()
    assert codes(run(squeeze, model="torchvision:shufflenet_v2_x0_5"))[1] == ("error", "nothing-matches")


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
    shown = prefix.partition("_orig_mod.")[0] or prefix
    assert f"9 of 9 keys carry `{shown}`; once renamed, all 9 tensors of the reference fit" in found.message
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
    assert "the reference's names carry `module.`, none of the 9 keys does; once renamed, all 9" in found.message
    assert found.fix.endswith("--add-module")
    wrapped = nn.ModuleDict({"net": Net()})
    assert finding(run(Net().state_dict(), model=wrapped), "wrapper-prefix").fix.endswith("--add-prefix net.")


def test_the_command_that_is_told_really_mends_it(save: Any) -> None:
    path = save({"module." + name: value for name, value in Net().state_dict().items()})
    fix = finding(check_file(path, model=Net), "wrapper-prefix").fix
    command = [sys.executable, "-c", "from ckptkit.cli import main; main()", *fix.split()[1:]]
    subprocess.run(command, check=True, capture_output=True)
    assert check_file(path.with_suffix(".safetensors"), model=Net).ok


def test_a_prefix_and_another_head(run: Run) -> None:
    report = run({"module." + name: value for name, value in Net(7).state_dict().items()}, model=Net)
    assert "once renamed, 7 of 9 tensors of the reference fit" in finding(report, "wrapper-prefix").message


def test_a_prefix_in_one_of_several_sections(run: Run) -> None:
    wrapped = {"module." + name: value for name, value in Net().state_dict().items()}
    report = run({"model": wrapped, "other": {"x": torch.ones(1)}}, model=Net)
    assert "--section model --strip-module" in finding(report, "wrapper-prefix").fix


def test_another_head(run: Run, save: Any) -> None:
    weights = torchvision.models.resnet18(num_classes=10).state_dict()
    report = run(weights, model="torchvision:resnet18")
    assert codes(report) == [("info", "fit-coverage"), ("error", "shape-mismatch"), NOT_LOADED]
    found = finding(report, "shape-mismatch")
    assert "another head: `fc` has 10 outputs in the checkpoint and 1000 in the reference; all else" in found.message
    assert found.fix.endswith("model.pth --model torchvision:resnet18 --model-arg num_classes=10")
    assert report.details["shape_mismatches"] == [
        {"name": "fc.weight", "checkpoint": [10, 512], "reference": [1000, 512]},
        {"name": "fc.bias", "checkpoint": [10], "reference": [1000]},
    ]
    assert "120 of 122 tensors, 95.6 % of parameters" in finding(report, "fit-coverage").message
    assert run(weights, model="torchvision:resnet18", model_args={"num_classes": "10"}).ok
    assert finding(run(Net(7).state_dict(), model=Net), "shape-mismatch").fix is None


def test_a_detector_with_another_head(run: Run) -> None:
    weights = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    ).state_dict()
    found = finding(run(weights, model="torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"), "shape-mismatch")
    assert found.fix.endswith("--model-arg num_classes=3")


def test_other_shapes(run: Run) -> None:
    report = run(state(body__0__weight=torch.ones(5, 4)), model=Net)
    found = finding(report, "shape-mismatch")
    assert "1 tensors have another shape" in found.message
    assert "body.0.weight [5, 4] against [5, 3]" in found.message
    assert found.fix is None


def test_auxiliary_classifiers(run: Run) -> None:
    aux = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    report = run(aux.state_dict(), model="torchvision:fcn_resnet50")
    assert finding(report, "unexpected-keys").fix.endswith("--model-arg aux_loss=True")
    plain = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False)
    report = run(plain.state_dict(), model="torchvision:googlenet")
    assert finding(report, "missing-keys").fix.endswith("--model-arg aux_logits=False")
    assert run(plain.state_dict(), model="torchvision:googlenet", model_args={"aux_logits": "False"}).ok


def test_batch_counters_are_benign(run: Run) -> None:
    counter = "body.1.num_batches_tracked"
    old = OrderedDict(without(counter))
    new = OrderedDict(old)
    new._metadata = Net().state_dict()._metadata  # version 2: torch itself calls it missing
    for weights in (old, new):
        report = run(weights, model=Net)
        assert report.ok
        assert codes(report) == [("info", "fit-coverage"), ("info", "batch-counters")]
        assert counter in finding(report, "batch-counters").message
        assert report.details["coverage"] == {"tensors": 8, "of": 9, "parameters_share": 1.0}
        assert report.details["loaded"] is True
    report = run(state(head__num_batches_tracked=torch.tensor(3)), model=Net)
    assert report.ok
    assert codes(report)[1] == ("info", "batch-counters")


def test_names_that_torch_itself_upgrades(run: Run) -> None:
    """RetinaNet's heads rename `conv.0.weight` of their version 1 when they load."""
    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    old = OrderedDict()
    for name, value in model.state_dict().items():
        head, dot, rest = name.partition("_head.conv.")
        layer, _, tail = rest.partition(".0.")
        old[f"{head}{dot}{2 * int(layer)}.{tail}" if dot else name] = value
    assert "head.classification_head.conv.6.weight" in old
    report = run(old, model="torchvision:retinanet_resnet50_fpn")
    assert report.ok
    assert report.details["coverage"]["parameters_share"] == 1.0
    assert "16 tensors are brought to their present names" in finding(report, "upgraded-keys").message
    # And a value that went astray on the way would be seen.
    old["head.classification_head.conv.6.weight"] = torch.full((256, 256, 3, 3), torch.nan)
    assert not run(old, model="torchvision:retinanet_resnet50_fpn").ok


def test_the_probe_leaves_the_model_alone() -> None:
    from ckptkit.checkpoint import StateDict
    from ckptkit.verifier.measure import measure

    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit = measure(model, StateDict({}))
    assert fit.tensors == 0 and len(fit.missing) == 9 and not fit.counters
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._load_state_dict_post_hooks


class Interrupting(Net):
    """Its loading code looks at values, which there are none of before the weights are read."""

    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        if next(iter(state_dict.values())).sum().item() is None:
            raise ValueError
        super()._load_from_state_dict(state_dict, *args)


def test_loading_code_that_needs_values(run: Run) -> None:
    assert run(Net().state_dict(), model=Interrupting).ok
    report = run(without("head.bias"), model=Interrupting)
    assert report.details["missing_keys"] == ["head.bias"]


class Refusing(Net):
    """Its loading code objects to every checkpoint."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        args[6].append("not with me")


def test_load_failed(run: Run) -> None:
    report = run(Net().state_dict(), model=Refusing)
    assert codes(report) == [("info", "fit-coverage"), ("error", "load-failed")]
    assert "not with me" in finding(report, "load-failed").message
    assert report.details["loaded"] is False


class Doubling(Net):
    """Its loading code changes a value afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(self.double)

    @staticmethod
    def double(module: Any, keys: Any) -> None:
        with torch.no_grad():
            module.head.bias.mul_(2)


def test_load_differs(run: Run) -> None:
    report = run(Net().state_dict(), model=Doubling)
    assert codes(report) == [("info", "fit-coverage"), ("error", "load-differs")]
    assert "1 tensors in the model are not what the checkpoint holds: head.bias" in str(report.findings)


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        self.out.weight = self.embed.weight


def test_tied_weights_from_safetensors(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_model(Tied(), str(path))
    assert check_file(path, model=Tied).ok
    safetensors.torch.save_file({"out.weight": Tied().out.weight.detach()}, path)  # no record of the other name
    report = check_file(path, model=Tied)
    assert report.ok
    assert codes(report) == [("info", "fit-coverage"), ("info", "tied-restored")]
    assert "embed.weight = out.weight" in finding(report, "tied-restored").message
    assert report.details["coverage"] == {"tensors": 2, "of": 2, "parameters_share": 1.0}
    assert report.details["missing_keys"] == []
    assert run(Tied().state_dict(), model=Tied).ok
    weight = torch.ones(4, 3)
    assert run({"embed.weight": weight, "out.weight": weight}, model=Tied).ok  # one object under both names


def test_tied_weights_that_differ_in_the_file(run: Run) -> None:
    report = run({"embed.weight": torch.ones(4, 3), "out.weight": torch.zeros(4, 3)}, model=Tied)
    assert codes(report)[1] == ("error", "load-differs")
    assert "embed.weight" in finding(report, "load-differs").message


def test_one_tensor_for_two_that_are_not_tied(run: Run) -> None:
    weight = torch.ones(2, 2)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    report = run({"0.weight": weight, "1.weight": weight}, model=model)
    assert report.ok and report.details["coverage"]["tensors"] == 2


def test_dtypes(run: Run) -> None:
    half = Net().half().state_dict()
    report = run(half, model=Net)
    assert report.ok
    found = finding(report, "dtype-mismatch")
    assert found.severity == "warning"
    assert "8 tensors are float16 in the checkpoint and float32 in the reference" in found.message
    assert codes(run(half, model=Net, dtype="float16")) == [("info", "fit-coverage")]
    assert run(Net().state_dict(), model=Net, dtype="bfloat16").ok  # a cast that was asked for
    narrowed = state(body__1__num_batches_tracked=torch.tensor(3, dtype=torch.int32))
    assert finding(run(narrowed, model=Net), "dtype-mismatch").severity == "warning"
    named = run(torchvision.models.squeezenet1_1().half().state_dict(), model="torchvision:squeezenet1_1")
    assert finding(named, "dtype-mismatch").fix.endswith("torchvision:squeezenet1_1 --dtype float16")


def test_dtypes_of_another_kind(run: Run) -> None:
    report = run(state(head__bias=torch.ones(4, dtype=torch.int64)), model=Net)
    assert codes(report)[1:] == [("error", "dtype-mismatch"), NOT_LOADED]
    assert "head.bias int64 into float32" in finding(report, "dtype-mismatch").message


class Extra(Net):
    """Keeps something beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: object = {"built": True}

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_extra_state_is_never_made_from_the_file(run: Run) -> None:
    report = run(Extra().state_dict(), model=Extra)
    assert report.ok
    assert codes(report) == [("info", "fit-coverage"), ("warning", "extra-state")]
    assert "_extra_state" in finding(report, "extra-state").message
    assert report.details["coverage"] == {"tensors": 9, "of": 9, "parameters_share": 1.0}
    assert run(Net().state_dict(), model=Extra).details["missing_keys"] == ["_extra_state"]
    assert run(Extra().state_dict(), model=Net).details["unexpected_keys"] == ["_extra_state"]


def test_extra_state_that_is_a_tensor_is_loaded(run: Run) -> None:
    kept: list[Extra] = []

    def make() -> Extra:
        kept.append(Extra())
        kept[-1].extra = torch.zeros(1)
        return kept[-1]

    source = Extra()
    source.extra = torch.arange(3)
    assert run(source.state_dict(), model=make).ok
    assert kept[0].extra.tolist() == [0, 1, 2]  # not shown to the module without its values before


def test_values_that_are_no_plain_tensors(run: Run) -> None:
    report = run(state(head__weight=torch.ones(4, 5).to_sparse()), model=Net)
    assert ("error", "unloadable-value") in codes(report)
    assert "head.weight" in finding(report, "unloadable-value").message
    assert report.details["loaded"] is False


def test_weights_that_are_no_numbers(run: Run) -> None:
    report = run(state(head__bias=torch.tensor([1, torch.nan, torch.inf, -torch.inf])), model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("error", "weights-not-finite")]
    assert "head.bias (1 NaN, 2 Inf of 4)" in finding(report, "weights-not-finite").message
    huge = state(head__bias=torch.tensor([65000.0] * 4, dtype=torch.float16))
    assert run(huge, model=Net).ok  # their sum alone is infinite
    assert not run(state(body__1__running_mean=torch.full((5,), torch.nan)), model=Net).ok


def test_an_infinite_buffer_may_be_a_mask(run: Run) -> None:
    report = run(state(body__1__running_var=torch.full((5,), torch.inf)), model=Net)
    assert codes(report) == [("info", "fit-coverage"), ("info", "infinite-buffer")]


def test_eight_bit_floats(run: Run) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(2).to(torch.float8_e4m3fn))

    assert run(Small().state_dict(), model=Small).ok
    assert not run({"w": torch.tensor([1, torch.nan]).to(torch.float8_e4m3fn)}, model=Small).ok


def test_whole_models_and_resume_dicts(run: Run) -> None:
    assert run(nn.Linear(2, 2), model=nn.Linear(2, 2)).ok
    assert run({"model": Net().state_dict(), "epoch": 3}, model=Net).ok


def test_a_model_that_is_given_stays_as_it_is(run: Run) -> None:
    model = Net().train()
    before = model.head.bias.clone()
    assert run(Net().half().state_dict(), model=model, dtype="float16").ok
    assert model.training and torch.equal(model.head.bias, before) and model.head.bias.dtype == torch.float32


def test_files_without_weights(run: Run) -> None:
    with pytest.raises(SectionError, match="holds no state_dict to verify"):
        run({"epoch": 3}, model=Net)
    two = {"generator": Net().state_dict(), "discriminator": Net().state_dict()}
    with pytest.raises(SectionError, match="choose one with --section: generator, discriminator"):
        run(two, model=Net)


def test_models_that_cannot_be_compared(run: Run) -> None:
    with pytest.raises(VerifyError, match="'weight' is not initialised"):
        run(Net().state_dict(), model=nn.LazyLinear(3))
    with pytest.raises(VerifyError, match=r"'body.0.weight' is on the meta device"):
        run(Net().state_dict(), model=lambda: Net().to("meta"))

    class Broken(Net):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyError("x")

    with pytest.raises(VerifyError, match=r"state_dict\(\) failed: KeyError"):
        run(Net().state_dict(), model=Broken)


def test_global_random_state_is_left_alone(run: Run) -> None:
    weights = Net().state_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert run(weights, model=Net).ok
    assert torch.equal(torch.rand(3), expected)
