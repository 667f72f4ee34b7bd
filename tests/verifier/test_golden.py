"""Golden files: written whole or not at all, read strictly, and what outputs are held against."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

import ckptkit
from ckptkit.report import Finding, Report

KEY = "ckptkit.golden"


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"y": y, "wide": y.repeat(1, 100_000)}


OPTIONS: dict[str, Any] = {"model": Net, "input_shapes": [(1, 3)], "device": "cpu"}


def codes(report: Report) -> list[str]:
    return [f.code for f in report.findings if f.code not in ("fit-coverage", "forward-ok")]


def found(report: Report, code: str) -> Finding:
    [finding] = [f for f in report.findings if f.code == code]
    return finding


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in Net().state_dict().items()}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    torch.manual_seed(0)
    torch.save(dict(Net().state_dict()), folder / "model.pth")
    report = ckptkit.verify(folder / "model.pth", write_golden=folder / "golden.safetensors", **OPTIONS)
    assert codes(report) == ["golden-written"], report.findings
    return folder


@pytest.fixture
def golden(made_once: Path, tmp_path: Path) -> Path:
    for name in ("golden.safetensors", "model.pth"):
        shutil.copy(made_once / name, tmp_path)
    return tmp_path / "golden.safetensors"


def held(save: Any, weights: dict[str, torch.Tensor], golden: Path, **options: Any) -> Report:
    given = {"model": Net, "device": "cpu", **options}
    return ckptkit.verify(save(weights, "subject.pth"), golden=golden, **given)


def description(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def rewritten(path: Path, change: Callable[[Any], object], tensors: Callable[[Any], object] = lambda t: None) -> Path:
    """The golden with its description, or its tensors, changed."""
    document, values = description(path), load_file(path)
    change(document)
    tensors(values)
    target = path.with_name("changed.safetensors")
    save_file(values, target, metadata={KEY: json.dumps(document)})
    return target


def test_what_is_in_it(golden: Path) -> None:
    document = description(golden)
    assert document["version"] == 1
    assert document["reference"] == {"spec": None, "label": "Net", "args": "{}"}
    assert document["inputs"]["seed"] == 0 and len(document["inputs"]["sha256"]) == 64
    assert (document["dtype"], document["device"]) == ("float32", "cpu")
    assert document["versions"]["torch"] == torch.__version__
    y, wide = document["outputs"]
    assert (y["path"], y["shape"], y["step"]) == ("y", [1, 4], 1)
    assert (wide["path"], wide["shape"], wide["step"]) == ("wide", [1, 400_000], 2)  # 1.6 MB, sampled
    assert os.path.getsize(golden) < 1_200_000


def test_the_same_weights_agree(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    report = held(save, weights, golden)
    assert report.ok and codes(report) == ["golden-equal"]
    assert "(of wide a sample)" in found(report, "golden-equal").message


def test_other_weights_do_not(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    weights["linear.bias"][1] += 0.25
    report = held(save, weights, golden)
    assert not report.ok and codes(report) == ["golden-weights", "golden-differs"]
    told = found(report, "golden-weights")
    assert told.severity == "warning" and "1 of 2 tensors differs: linear.bias" in told.message
    [check] = [c for c in report.details["checks"] if c["name"] == "golden"]
    assert check["figures"]["outputs"][0]["max_abs"] == pytest.approx(0.25, rel=1e-4)
    assert codes(held(save, weights, golden, rtol=1.0)) == ["golden-weights", "golden-close"]


def test_a_little_off_is_close(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    weights["linear.bias"][1] += 1e-6
    report = held(save, weights, golden)
    assert report.ok and codes(report) == ["golden-weights", "golden-close"]
    assert codes(held(save, weights, golden, atol=0.0, rtol=0.0)) == ["golden-weights", "golden-differs"]


def test_another_dtype_is_held_to_its_own_tolerance(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    report = held(save, {name: value.bfloat16() for name, value in weights.items()}, golden, dtype="bfloat16")
    assert report.ok and codes(report) == ["golden-weights", "golden-versions", "golden-close"]
    told = found(report, "golden-weights")
    assert told.severity == "info" and "2 of 2 tensors differ (float32 then, bfloat16 now)" in told.message
    assert "dtype float32 then, bfloat16 now" in found(report, "golden-versions").message


def test_another_version_is_told(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    path = rewritten(golden, lambda d: d["versions"].update(torch="1.0"))
    report = held(save, weights, path)
    assert report.ok and codes(report) == ["golden-versions", "golden-equal"]
    assert f"torch 1.0 then, {torch.__version__} now" in found(report, "golden-versions").message


class Tiny(nn.Module):
    """Outputs of about 1e-10, as deep models have whose weights were never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=5e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Cancelling(nn.Module):
    """What is left of two large sums is their rounding, here on one side in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)[:, None] * torch.linspace(10, 100, 50)[:, None]
        step = 64 if torch.get_num_threads() == 1 else 4
        parts = [y[..., i : i + step].sum(-1) for i in range(0, 256, step)]
        return torch.stack(parts).sum(0) - y.sum(-1)


def recorded(save: Any, target: Path, model: Any, width: int, **options: Any) -> Any:
    torch.manual_seed(1)
    state = model().state_dict()
    given = {"model": model, "input_shapes": [(1, width)], "device": "cpu", **options}
    report = ckptkit.verify(save(state), write_golden=target, **given)
    assert "golden-written" in codes(report), report.findings
    return state


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def as_first_releases_wrote(path: Path) -> Path:
    """Without noise and weights, and with the ``atol`` that was float32's."""

    def change(document: Any) -> None:
        del document["weights"]
        document["tolerance"]["atol"] = 1.2e-7
        for output in document["outputs"]:
            del output["noise"]

    return rewritten(path, change)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("place", ["layers.0.weight", "layers.3.weight"])
def test_a_change_of_small_outputs_is_seen(save: Any, tmp_path: Path, place: str, is_old: bool, threads: Any) -> None:
    target = tmp_path / "g.safetensors"
    state = recorded(save, target, Tiny, 32)
    [output] = description(target)["outputs"]
    assert 0 < output["noise"] < 1e-14
    target = as_first_releases_wrote(target) if is_old else target
    for count in (1, 2, 3):
        threads(count)
        assert held(save, state, target, model=Tiny).ok
    report = held(save, {**state, place: state[place] * 1.05}, target, model=Tiny)
    assert not report.ok and float(report.details["outputs"][0]["max"]) < 1e-9
    assert codes(report) == ["golden-differs"] if is_old else ["golden-weights", "golden-differs"]
    assert held(save, {**state, place: state[place] * 1.05}, target, model=Tiny, atol=1e-9).ok


@pytest.mark.parametrize("is_old", [False, True])
def test_what_cancels_is_as_uncertain_as_its_terms(save: Any, tmp_path: Path, is_old: bool, threads: Any) -> None:
    threads(2)
    target = tmp_path / "g.safetensors"
    state = recorded(save, target, Cancelling, 256)
    [output] = description(target)["outputs"]
    assert output["noise"] > 0
    target = as_first_releases_wrote(target) if is_old else target
    for count in (1, 2):
        threads(count)
        report = held(save, state, target, model=Cancelling)
        assert report.ok, report.findings
    threads(1)
    assert not held(save, state, target, model=Cancelling, atol=0.0).ok  # nothing else lets it pass


def test_an_atol_that_was_given_still_counts(save: Any, tmp_path: Path) -> None:
    target = tmp_path / "g.safetensors"
    state = recorded(save, target, Tiny, 32, atol=0.5)
    assert description(target)["tolerance"]["atol"] == 0.5
    report = held(save, {name: value * 2 for name, value in state.items()}, target, model=Tiny)
    assert report.ok and codes(report) == ["golden-weights", "golden-close"]
    assert not held(save, {name: value * 2 for name, value in state.items()}, target, model=Tiny, atol=0.0).ok


def test_the_weights_are_recorded(save: Any, weights: dict[str, torch.Tensor], golden: Path, tmp_path: Path) -> None:
    """With the digests of a manifest, under the names of the model, whatever the container, prefix or order."""
    recorded = description(golden)["weights"]
    record = ckptkit.manifest([save(weights)]).files[0]
    assert recorded["content_digest"] == record.content_digest
    digest = hashlib.sha256(weights["linear.bias"].numpy().tobytes()).hexdigest()
    assert recorded["tensors"]["linear.bias"] == f"float32 [4] sha256:{digest}"
    save_file({"module." + name: value for name, value in reversed(weights.items())}, tmp_path / "x.safetensors")
    with ckptkit.open(tmp_path / "x.safetensors") as opened:
        opened.rewrite(ckptkit.StripModule()).save(tmp_path / "y.safetensors")
    assert codes(ckptkit.verify(tmp_path / "y.safetensors", model=Net, golden=golden, device="cpu")) == ["golden-equal"]


def test_other_weights_are_named_where_nothing_runs(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    class Failing(Net):
        def forward(self, x: torch.Tensor) -> Any:
            raise RuntimeError("no")

    weights["linear.weight"] += 1
    assert codes(held(save, weights, golden, model=Failing)) == ["forward-failed", "golden-weights"]


def test_outputs_of_another_shape(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    class Other(Net):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.linear(x)[:, :3], "more": self.linear(x)}

    report = held(save, weights, golden, model=Other)
    assert codes(report) == ["golden-differs"]
    message = found(report, "golden-differs").message
    assert "`y`: 1x3 is the shape, but the record has 1x4" in message
    assert "`wide`: it is missing" in message and "`more`: it is not in the golden" in message


def test_from_the_golden_and_the_checkpoint_alone(save: Any, tmp_path: Path) -> None:
    """On another machine: no model, arguments or shapes are named."""
    torch.manual_seed(0)
    path = save(get_model("squeezenet1_1", num_classes=7).state_dict())
    target = tmp_path / "g.safetensors"
    spec = {"model": "torchvision:squeezenet1_1", "model_args": {"num_classes": "7"}}
    report = ckptkit.verify(path, write_golden=target, input_shapes=[(2, 3, 64, 64)], seed=3, device="cpu", **spec)
    assert "golden-written" in codes(report), report.findings
    report = ckptkit.verify(path, golden=target, device="cpu")
    assert report.ok and "golden-equal" in codes(report)
    assert report.details["reference"] == "torchvision:squeezenet1_1"
    assert report.details["outputs"][0]["shape"] == [2, 7]
    assert ckptkit.verify(path, golden=target, device="cpu", **spec).ok
    with pytest.raises(
        ckptkit.VerifyError,
        match=r"is the golden file of torchvision:squeezenet1_1, not of "
        r"torchvision:sq",
    ):
        ckptkit.verify(path, golden=target, model="torchvision:squeezenet1_0", device="cpu")
    with pytest.raises(ckptkit.VerifyError, match="recorded with the arguments num_classes=7, not num_classes=8"):
        ckptkit.verify(path, golden=target, model=spec["model"], model_args={"num_classes": 8}, device="cpu")
    for options in ({"seed": 4}, {"input_shapes": [(1, 3, 64, 64)]}, {"input": path}):
        with pytest.raises(ckptkit.VerifyError, match="contains its own inputs"):
            ckptkit.verify(path, golden=target, device="cpu", **options)


def test_a_golden_names_no_code_to_run(save: Any, weights: dict[str, torch.Tensor], golden: Path) -> None:
    for spec in ("os:getcwd", "net.py:build", None):
        path = rewritten(golden, lambda d, spec=spec: d["reference"].update(spec=spec))
        with pytest.raises(ckptkit.VerifyError, match="is your own code; name it with --model"):
            held(save, weights, path, model=None)


def test_inputs_from_a_file_are_kept(save: Any, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({"x": torch.tensor([[1.0, 2.0, 3.0]])}, tmp_path / "in.safetensors")
    target = tmp_path / "g.safetensors"
    options = {"model": Net, "device": "cpu"}
    ckptkit.verify(save(weights), input=tmp_path / "in.safetensors", write_golden=target, **options)
    (tmp_path / "in.safetensors").unlink()
    report = held(save, weights, target)
    assert codes(report) == ["golden-equal"]
    other = rewritten(target, lambda d: None, lambda t: t["input.0"].add_(1))
    with pytest.raises(ckptkit.CorruptError, match="its inputs are not those it was written with"):
        held(save, weights, other)


def test_an_existing_file_is_kept_unless_forced(
    save: Any, weights: dict[str, torch.Tensor], golden: Path, tmp_path: Path
) -> None:
    before = golden.read_bytes()
    built: list[int] = []
    with pytest.raises(ckptkit.DestinationExistsError, match="--force"):
        ckptkit.verify(save(weights), write_golden=golden, **{**OPTIONS, "model": lambda: built.append(1)})
    assert golden.read_bytes() == before and not built
    weights["linear.bias"] += 1
    assert ckptkit.verify(save(weights), write_golden=golden, force=True, **OPTIONS).ok
    assert golden.read_bytes() != before
    path = save(weights)
    saved = path.read_bytes()
    with pytest.raises(ckptkit.DestinationExistsError, match="is a checkpoint; --force replaces only a golden file"):
        ckptkit.verify(path, write_golden=path, force=True, **OPTIONS)
    assert path.read_bytes() == saved
    with pytest.raises(ckptkit.FileAccessError, match="in an existing folder"):
        ckptkit.verify(save(weights), write_golden=tmp_path / "no" / "g.safetensors", **OPTIONS)
    with pytest.raises(ckptkit.VerifyError, match="nothing is computed"):
        ckptkit.verify(save(weights), write_golden=tmp_path / "h.safetensors", forward=False, **OPTIONS)


def test_nothing_is_written_of_a_model_that_fails(save: Any, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights["linear.bias"][0] = torch.nan
    report = ckptkit.verify(save(weights), write_golden=tmp_path / "g.safetensors", **OPTIONS)
    assert "golden-not-written" in codes(report)
    assert not (tmp_path / "g.safetensors").exists()


def test_arguments_that_are_no_literals(save: Any, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    options = {**OPTIONS, "model": lambda activation: Net(), "model_args": {"activation": nn.ReLU}}
    with pytest.raises(ckptkit.VerifyError, match="are not literals and cannot be recorded"):
        ckptkit.verify(save(weights), write_golden=tmp_path / "g.safetensors", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def put(*path: Any) -> Callable[[Any], None]:
    """Sets the value at the keys before it, which are the last."""
    *keys, last, value = path

    def change(document: Any) -> None:
        for key in keys:
            document = document[key]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("version", 2), "'version' is 2; expected 1"),
        (put("version", True), "'version' is True; expected int"),
        (put("reference", []), "'reference' is .*; expected dict"),
        (put("reference", "args", "__import__('os')"), "expected a dict, as a Python literal"),
        (put("reference", "args", "[1]"), "expected a dict, as a Python literal"),
        (put("inputs", "items", []), "at least one input"),
        (put("inputs", "items", 0, "shape", [1, "3"]), "expected a list of sizes"),
        (put("inputs", "items", 0, "shape", [1, 1 << 39]), "expected a shape"),
        (put("inputs", "items", 0, "below", 0), "expected a shape"),
        (put("inputs", "items", 0, "is_list", 1), "expected bool"),
        (put("inputs", "seed", "0"), "'seed' is '0'; expected int"),
        (put("inputs", "seed", None), "'tensor' is None; expected str"),
        (put("outputs", 0, "tensor", "output.9"), "expected the name of a tensor in the file"),
        (put("outputs", 0, "shape", [1, 5]), "expected every 1th of 5"),
        (put("outputs", 1, "step", 0), "expected every 0th"),
        (put("outputs", 0, "dtype", "float64"), "expected every 1th of 4 of float64"),
        (put("outputs", {}), "'outputs' is .*; expected list"),
        (put("dtype", "int8"), "expected a floating-point type"),
        (put("tolerance", "rtol", -1), "expected a number of at least 0"),
        (put("outputs", 0, "noise", -1), "expected a number of at least 0"),
        (put("weights", "tensors", {"linear.bias": 3}), "expected strings by name"),
        (put("versions", "torch", 2), "expected strings by name"),
    ],
)
def test_damaged_goldens(save: Any, weights: dict[str, torch.Tensor], golden: Path, change: Any, message: str) -> None:
    path = rewritten(golden, change)
    with pytest.raises(ckptkit.CorruptError, match=message) as caught:
        held(save, weights, path)
    assert str(path) in str(caught.value)


def test_what_is_no_golden(save: Any, weights: dict[str, torch.Tensor], golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ckptkit.CorruptError, match="is not a golden file"):
        held(save, weights, save(weights, "weights.pth"))
    save_file(weights, tmp_path / "plain.safetensors")
    with pytest.raises(ckptkit.CorruptError, match="is not a golden file"):
        held(save, weights, tmp_path / "plain.safetensors")
    save_file(weights, tmp_path / "bad.safetensors", metadata={KEY: "{"})
    with pytest.raises(ckptkit.FormatError):
        held(save, weights, tmp_path / "bad.safetensors")
    shutil.copy(golden, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 5000)
    with pytest.raises(ckptkit.FormatError):
        held(save, weights, tmp_path / "cut.safetensors")
    with pytest.raises(ckptkit.MissingFileError):
        held(save, weights, tmp_path / "none.safetensors")
    other = rewritten(golden, put("inputs", "sha256", "0" * 64))
    with pytest.raises(ckptkit.VerifyError, match="seed 0 gives different inputs"):
        held(save, weights, other)
