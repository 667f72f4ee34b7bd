"""The fit check: every finding has a checkpoint that provokes it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchvision
from support.fitting import NOT_LOADED, Net, Run, codes, finding, state, without
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead

from ckptkit.errors import SectionError, VerifyError


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
    message = finding(report, "missing-keys").message
    assert message.startswith('Missing key(s) in state_dict: "body.0.bias", "head.bias"; 2 of the reference\'s 9 names')
    share = (54 - 9) / 54
    assert report.details["coverage"] == {"tensors": 7, "of": 9, "parameters_share": pytest.approx(share)}
    assert "7 of 9 tensors, 83.3 % of parameters" in finding(report, "fit-coverage").message
    assert report.details["loaded"] is False


def test_long_lists_are_folded_in_messages_alone(run: Run) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(9)))
    report = run({"0.weight": torch.ones(1, 1)}, model=model)
    assert '"2.weight", "3.weight", "4.weight", "5.weight" and 3 more; 8 of' in finding(report, "missing-keys").message
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


def test_a_counter_that_torch_fills_in(run: Run) -> None:
    counter = "body.1.num_batches_tracked"
    report = run(without(counter), model=Net)  # no version is recorded
    assert report.ok
    assert codes(report) == [("info", "fit-coverage"), ("info", "batch-counters")]
    assert f"1 BatchNorm counter is not in the checkpoint ({counter})" in finding(report, "batch-counters").message
    assert report.details["coverage"] == {"tensors": 8, "of": 9, "parameters_share": 1.0}
    assert report.details["loaded"] is True


def test_names_that_torch_itself_upgrades(run: Run) -> None:
    """RetinaNet's heads rename `conv.0.weight` of their version 1 when they load."""

    def heads() -> nn.Module:
        return nn.ModuleDict({"head": RetinaNetHead(in_channels=32, num_anchors=2, num_classes=3)})

    old = OrderedDict()
    for name, value in heads().state_dict().items():
        head, dot, rest = name.partition("_head.conv.")
        layer, _, tail = rest.partition(".0.")
        old[f"{head}{dot}{2 * int(layer)}.{tail}" if dot else name] = value
    assert "head.classification_head.conv.6.weight" in old
    report = run(old, model=heads)
    assert report.ok
    assert report.details["coverage"]["parameters_share"] == 1.0
    assert "16 tensors are converted to their current names" in finding(report, "upgraded-keys").message
    # And a value that went astray on the way would be seen.
    old["head.classification_head.conv.6.weight"] = torch.full((32, 32, 3, 3), torch.nan)
    assert not run(old, model=heads).ok


def test_the_probe_leaves_the_model_alone() -> None:
    from ckptkit.checkpoint import StateDict
    from ckptkit.verifier.measure import measure_fit

    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit = measure_fit(model, StateDict({}))
    assert fit.tensors == 0 and len(fit.missing) == 8 and fit.counters == ("body.1.num_batches_tracked",)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._load_state_dict_post_hooks


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


def test_whole_models_and_resume_dicts(run: Run) -> None:
    assert run(nn.Linear(2, 2), model=nn.Linear(2, 2)).ok
    assert run({"model": Net().state_dict(), "epoch": 3}, model=Net).ok


def test_files_without_weights(run: Run) -> None:
    with pytest.raises(SectionError, match="contains no state_dict to verify"):
        run({"epoch": 3}, model=Net)
    two = {"generator": Net().state_dict(), "discriminator": Net().state_dict()}
    with pytest.raises(SectionError, match="choose one with --section: generator, discriminator"):
        run(two, model=Net)


def test_models_that_cannot_be_compared(run: Run) -> None:
    with pytest.raises(VerifyError, match="'weight' is not initialized"):
        run(Net().state_dict(), model=nn.LazyLinear(3))
    assert run(Net().state_dict(), model=lambda: Net().to("meta")).ok  # filled as any model is

    class Broken(Net):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyError("x")

    with pytest.raises(VerifyError, match=r"state_dict\(\) failed: KeyError"):
        run(Net().state_dict(), model=Broken)
