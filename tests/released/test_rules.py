"""Every rule of a policy on real files: one that keeps it, and one that does not."""

from __future__ import annotations

import io
import os
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.codes import CODES
from ckptkit.released.policy import Policy
from ckptkit.released.policy_rules import RULES
from ckptkit.released.results import CheckFinding

WEIGHTS = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.zeros(3)}


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


class Own:
    pass


def findings(path: Path, **policy: Any) -> list[CheckFinding]:
    """What is found, after what every finding must be is checked."""
    report = ckptkit.check(path, **policy)
    for finding in report.findings:
        assert finding.path == str(path) and finding.code in CODES and finding.message
        assert finding.expected not in (None, "") and finding.found not in (None, "")
    assert report.ok == (not any(finding.severity == "error" for finding in report.findings))
    return list(report.findings)


def only(path: Path, code: str, rule: str, **policy: Any) -> CheckFinding:
    """The one finding."""
    (finding,) = findings(path, **policy)
    assert (finding.code, finding.rule, finding.severity) == (code, rule, "error")
    return finding


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    """A file that keeps every rule."""
    save_file(WEIGHTS, tmp_path / "safe.safetensors")
    return tmp_path / "safe.safetensors"


def test_a_sound_file_keeps_every_rule(safe: Path) -> None:
    report = ckptkit.check(
        safe,
        no_pickle=True,
        max_trust="safe",
        require_format="safetensors",
        max_size="1kB",
        allow_dtype="float32",
        no_nan=True,
        no_optimizer=True,
        no_prefix=True,
        location="cpu",
    )
    assert report.exit_code == 0 and not report.findings
    (result,) = report.results
    assert result.rules == ("readable", *(name for name, _, _ in RULES))
    assert report.to_dict()["checked"] == 1


def test_the_rules_are_the_fields_of_a_policy() -> None:
    others = {"allow_part", "fits", "forward", "model_args", "input_shapes", "ignore_checksums", "tp_rules"}
    assert {name.replace("-", "_") for name, _, _ in RULES} - {"whole"} | others == set(Policy.__dataclass_fields__)


def test_no_pickle(save) -> None:
    path = save(WEIGHTS)
    assert findings(path) == []
    finding = only(path, "pickle-not-allowed", "no-pickle", no_pickle=True)
    assert finding.found == "torch-zip" and finding.fix == f"ckptkit convert {path} {path.with_suffix('.safetensors')}"


def test_max_trust(save) -> None:
    path = save({"state_dict": WEIGHTS, "args": Own()}, "own.pth")
    assert findings(path) == []
    finding = only(path, "trust-not-allowed", "max-trust", max_trust="safe")
    assert (finding.expected, finding.found) == ("safe", "needs_trust")
    assert "Own" in finding.message
    assert findings(save(WEIGHTS, "plain.pth"), max_trust="safe") == []


@pytest.mark.parametrize(
    ("record", "data", "words"),
    [
        ("kernel.so", b"\x7fELF", r"it contains compiled code \(kernel.so\)"),
        ("notes.gz", b"\x1f\x8b\x08\x00", r"it contains unread content \(notes.gz\)"),
    ],
)
def test_max_trust_is_of_all_that_is_in_the_file(save, record: str, data: bytes, words: str) -> None:
    path = save(WEIGHTS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/{record}", data)
    finding = only(path, "trust-not-allowed", "max-trust", max_trust="safe")
    assert finding.found == "needs_trust" and re.search(words, finding.message) and "pickle" not in finding.message
    assert findings(path) == []


@pytest.mark.parametrize("policy", [{}, {"max_trust": "safe"}, {"max_trust": "needs_trust"}])
def test_a_hostile_file_never_passes(save, policy: dict[str, Any]) -> None:
    path = save({"state_dict": WEIGHTS, "x": Runs()})
    finding = only(path, "trust-not-allowed", "max-trust", **policy)
    assert finding.found == "hostile" and "system" in finding.message and finding.fix is None


def test_require_format(save, safe: Path) -> None:
    path = save(WEIGHTS)
    finding = only(path, "container-not-allowed", "require-format", require_format="safetensors")
    assert (finding.expected, finding.found) == (["safetensors"], "torch-zip")
    assert findings(path, require_format=("safetensors", "torch-zip")) == []
    liar = safe.rename(safe.with_suffix(".pth"))
    assert findings(liar, require_format="safetensors") == [], "content decides, not the ending"


def test_shards_count_as_what_they_are(safe: Path, tmp_path: Path) -> None:
    ckptkit.convert(safe, tmp_path / "s.safetensors.index.json", max_shard_size=13)
    index = tmp_path / "s.safetensors.index.json"
    assert findings(index, require_format="safetensors", no_pickle=True) == []
    finding = only(index, "file-too-large", "max-size", max_size=100)
    whole = sum(path.stat().st_size for path in tmp_path.glob("s[-.]*"))
    assert finding.found == whole and "with its shards" in finding.message


def test_max_size(save) -> None:
    path = save({"w": torch.ones(5000)})
    size = path.stat().st_size
    assert findings(path, max_size=size) == []
    finding = only(path, "file-too-large", "max-size", max_size=size - 1)
    assert (finding.expected, finding.found) == (size - 1, size)
    assert f"{size:,} bytes" in finding.message, "where rounded sizes are alike, bytes tell"


def test_allow_dtype(save) -> None:
    path = save({**WEIGHTS, "steps": torch.tensor(3), "half": torch.ones(2).half()})
    assert findings(path, allow_dtype=["float32", "int64", "float16"]) == []
    finding = only(path, "dtype-not-allowed", "allow-dtype", allow_dtype="float32")
    assert finding.found == ["float16", "int64"] and "2 tensors" in finding.message and "half, steps" in finding.message


@pytest.mark.parametrize(("values", "told"), [([1.0, float("nan")], "1 NaN"), ([float("inf"), float("-inf")], "2 Inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_no_nan(save, values: list[float], told: str, dtype: torch.dtype) -> None:
    path = save({**WEIGHTS, "bad": torch.tensor(values).to(dtype)})
    assert findings(path) == []
    finding = only(path, "values-not-finite", "no-nan", no_nan=True)
    assert finding.found == [f"bad ({told})"]
    assert findings(save(WEIGHTS, "good.pth"), no_nan=True) == []


def test_nan_in_a_transposed_tensor_is_seen(save) -> None:
    bad = torch.zeros(4, 3)
    bad[3, 1] = torch.nan
    only(save({"w": bad.t()}), "values-not-finite", "no-nan", no_nan=True)


def test_buffers_may_be_infinite(save) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -torch.inf))
    assert findings(save(model), no_nan=True, max_trust="needs_trust") == []


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_values_nobody_can_compute_are_not_taken_for_sound(save) -> None:
    path = save({"w": torch.ones(4), "odd": torch.zeros(2, dtype=torch.complex32)})
    finding = only(path, "check-not-run", "no-nan", no_nan=True)
    assert finding.found == ["complex32"]
    report = ckptkit.check(path, no_nan=True)
    assert report.exit_code == 2 and report.to_dict()["checked"] == 0
    packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert findings(save({"w": packed}, "packed.pth"), no_nan=True) == [], "all its codes are numbers"


def test_objects_among_the_weights_are_not_taken_for_sound(save) -> None:
    assert findings(save({"w": torch.ones(4), "extra._extra_state": {"scale": 2}}), no_nan=True) == [], "plain data"
    path = save({"w": torch.ones(4), "x._extra_state": Own(), "y._extra_state": io.BytesIO(b"values")}, "own.pth")
    finding = only(path, "check-not-run", "no-nan", no_nan=True)
    assert finding.found == ["x._extra_state", "y._extra_state"] and ckptkit.check(path, no_nan=True).exit_code == 2


def test_tensors_in_bytes_are_not_taken_for_sound(save) -> None:
    inner = io.BytesIO()
    torch.save(NAN, inner, _use_new_zipfile_serialization=False)

    class Kept:
        def __reduce__(self) -> tuple[object, ...]:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    assert only(save({"w": torch.ones(4), "x": Kept()}), "check-not-run", "no-nan", no_nan=True).found == ["x"]


NAN, INF = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])


def with_attribute(value: object) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.codebook = value  # type: ignore[assignment]
    return module


def on_tensor(value: object) -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.scale = value  # type: ignore[attr-defined]
    return tensor


BROKEN = {
    "a buffer": {"bn.weight": torch.ones(2), "bn.running_var": NAN},
    "an optimizer's moment": {
        "state_dict": WEIGHTS,
        "optimizer": {"state": {0: {"exp_avg": NAN}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    },
    "averaged weights": {"model": WEIGHTS, "ema": {name: value * torch.nan for name, value in WEIGHTS.items()}},
    "sparse values": lambda: {"w": torch.ones(2), "s": torch.sparse_coo_tensor([[0], [1]], [torch.nan], (4, 4))},
    "compressed rows": lambda: {"s": torch.eye(3).mul(torch.nan).to_sparse_csr()},
    "infinite sparse values": lambda: {"s": torch.sparse_coo_tensor([[0], [1]], [torch.inf], (4, 4))},
    "a numpy array": {"layer.w": NAN.numpy()},
    "a numpy array among weights": {**WEIGHTS, "layer.w": NAN.double().numpy()},
    "a big-endian one": {"layer.w": np.array([[0.0, np.nan]], ">f8")},
    "a complex one": {"layer.w": np.array([np.nan + 1j], "c8")},
    "a masked one": {"layer.w": np.ma.array([1.0, np.nan])},
    "one in Fortran's order": {"layer.w": np.asfortranarray(np.full((3, 2), np.nan, "f2"))},
    "one beside the weights": {"state_dict": WEIGHTS, "mean": NAN.numpy()},
    "a bare tensor": NAN,
    "a list": [torch.ones(2), [NAN]],
    "a tensor's attribute": {"layer.weight": torch.ones(2), "t": on_tensor(NAN)},
    "a module's attribute": with_attribute(NAN),
    "an array in a module": with_attribute(NAN.numpy()),
    "a numpy scalar among weights": {**WEIGHTS, "scale": np.float32("nan")},
    "an array of objects": {**WEIGHTS, "ragged": np.array([float("nan"), None], object)},
    "a number in extra state": {**WEIGHTS, "m._extra_state": {"amax": [float("nan")]}},
}

SOUND = {
    "an observer": {"w": torch.ones(2), "a.min_val": torch.tensor(torch.inf), "a.max_val": torch.tensor(-torch.inf)},
    "a mask": {"w": torch.ones(2), "attn.mask": torch.full((2, 2), -torch.inf)},
    "moments": {
        "state_dict": WEIGHTS,
        "optimizer": {"state": {0: {"exp_avg": INF}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    },
    "an array of numbers": {"w": torch.ones(2), "ids": np.arange(4), "names": np.array(["nan"])},
    "a metric": {"state_dict": WEIGHTS, "best": np.float64("inf"), "loss": np.float64("nan")},
    "an object array": {"w": torch.ones(2), "ragged": np.array([np.ones(2), np.ones(3)], dtype=object)},
}


LAZY = ("sparse values", "infinite sparse values", "compressed rows")
"""Those that torch warns of when it makes them."""


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", BROKEN)
def test_nan_in_any_value(kind: str, save) -> None:
    made = BROKEN[kind]
    path = save(made() if kind in LAZY else made)
    only(path, "values-not-finite", "no-nan", no_nan=True, max_trust="needs_trust")


def test_arrays_of_newer_pickles(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        torch.save({"w": NAN.numpy(), "big": np.full(3, np.nan, ">f2")}, tmp_path / "x.pth", pickle_protocol=protocol)
        finding = only(tmp_path / "x.pth", "values-not-finite", "no-nan", no_nan=True)
        assert finding.found == ["big (3 NaN)", "w (1 NaN)"]


@pytest.mark.parametrize("kind", SOUND)
def test_honest_infinities_and_numbers(kind: str, save) -> None:
    assert findings(save(SOUND[kind]), no_nan=True) == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per", "ignore:torch._make_per")
def test_scales_of_quantized_tensors(save) -> None:
    ints = torch.ones(2, 2, dtype=torch.int8)
    one = torch._make_per_tensor_quantized_tensor(ints, float("nan"), 0)
    assert only(save({"q": one}), "values-not-finite", "no-nan", no_nan=True).found == ["q (1 NaN)"]
    scales = torch.tensor([0.1, torch.nan], dtype=torch.float64)
    each = torch._make_per_channel_quantized_tensor(ints, scales, torch.zeros(2, dtype=torch.int64), 0)
    only(save({"q": each}), "values-not-finite", "no-nan", no_nan=True)
    good = torch._make_per_tensor_quantized_tensor(ints, 0.1, 0)
    assert findings(save({"q": good}), no_nan=True) == []


@pytest.mark.parametrize("array", [np.array([1.0], "g"), np.array([(1, 2.0)], "i4,f4")], ids=["longdouble", "fields"])
def test_arrays_that_are_not_understood(array: object, save) -> None:
    finding = only(save({"w": torch.ones(2), "a": array}), "check-not-run", "no-nan", no_nan=True)
    assert "a" in finding.message.split(": ")[-1]


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, [], {"state_dict": {}, "lr": 0.1}])
def test_a_file_without_tensors_is_not_green(state: object, save) -> None:
    path = save(state)
    assert "no tensor" in only(path, "check-not-run", "no-nan", no_nan=True).message
    assert ckptkit.check(path, no_nan=True).exit_code == 2 and ckptkit.check(path).exit_code == 0


def test_no_optimizer(save) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert findings(path) == []
    finding = only(path, "optimizer-not-allowed", "no-optimizer", no_optimizer=True)
    assert finding.fix is not None and "--weights-only" in finding.fix
    assert findings(save(model.state_dict(), "bare.pth"), no_optimizer=True) == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_no_prefix(save, prefix: str) -> None:
    path = save({prefix + name: value for name, value in WEIGHTS.items()})
    assert findings(path) == []
    finding = only(path, "prefix-not-allowed", "no-prefix", no_prefix=True)
    assert finding.found == [prefix]
    assert findings(save({"module_list.0.weight": torch.ones(2)}, "no.pth"), no_prefix=True) == []


def test_location(save) -> None:
    path = save(WEIGHTS, device="cuda:1")
    assert findings(path) == [] and findings(path, location=["cpu", "cuda:1"]) == []
    finding = only(path, "location-not-allowed", "location", location="cpu")
    assert (finding.expected, finding.found) == (["cpu"], ["cuda:1"])
    assert finding.fix is not None and finding.fix.endswith("--map-location cpu")


def test_fits(save) -> None:
    model = torch.nn.Linear(2, 3)
    path = save(model.state_dict())
    reference = "torch.nn:Linear"
    arguments = {"in_features": 2, "out_features": 3}
    assert findings(path, fits=reference, model_args=arguments) == []
    found = findings(path, fits=reference, model_args={**arguments, "out_features": 4})
    assert {(f.rule, f.code) for f in found if f.severity == "error"} == {("fits", "shape-mismatch")}
    finding = only(path, "check-not-run", "fits", fits="no.such.module:factory")
    assert "no.such.module" in finding.message
    assert ckptkit.check(path, fits="no.such.module:factory").exit_code == 2


def test_forward(save) -> None:
    model = torch.nn.Linear(2, 3)
    policy: dict[str, Any] = {
        "fits": "torch.nn:Linear",
        "model_args": {"in_features": 2, "out_features": 3},
        "forward": True,
    }
    path = save(model.state_dict())
    assert [f for f in findings(path, input_shapes=[[1, 2]], **policy) if f.severity == "error"] == []
    found = findings(path, input_shapes=[[1, 5]], **policy)
    assert ("forward", "forward-failed") in {(f.rule, f.code) for f in found}
    only(path, "check-not-run", "fits", **policy)  # no input shape is known


def test_forward_without_a_model_is_not_run(save) -> None:
    finding = only(save(WEIGHTS), "check-not-run", "forward", forward=True)
    assert "--fits" in finding.message


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("state_dict", {"no_pickle": True}),
        ("resume", {"no_pickle": True}),
        ("whole_model", {"no_pickle": True}),
        ("resume", {"require_format": "safetensors"}),
        ("resume", {"no_optimizer": True}),
        ("resume", {"no_prefix": True}),
        ("resume", {"location": "cpu"}),
        ("whole_model", {"max_trust": "safe"}),
        ("resume", {"max_trust": "safe"}),
    ],
)
def test_the_command_that_is_told_mends_it(save, run, kind: str, policy: dict[str, Any]) -> None:
    model = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    optimizer = {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"params": [0], "lr": 1.0}]}
    contents = {
        "state_dict": model.module.state_dict(),
        "resume": {"state_dict": model.state_dict(), "optimizer": optimizer, "args": Own()},
        "whole_model": model.module,
    }
    path = save(contents[kind], device="cuda:0")
    (finding,) = findings(path, **policy)
    assert finding.fix is not None
    program, *arguments = shlex.split(finding.fix)
    done = run(*arguments)
    assert (program, done.returncode) == ("ckptkit", 0), done.stderr
    assert findings(Path(arguments[2]), **policy) == []


def test_a_file_without_weights_is_not_to_be_converted(save) -> None:
    assert only(save({"lr": 1}), "pickle-not-allowed", "no-pickle", no_pickle=True).fix is None


def test_forward_against_the_golden(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(2, 3)\n")
    state = torch.nn.Linear(2, 3).state_dict()
    path = save(state)
    ckptkit.verify(path, model="net.py:build", input_shapes=[[1, 2]], device="cpu", write_golden="g.safetensors")
    ckptkit.manifest([path], "m.json", golden="g.safetensors")
    (finding,) = ckptkit.check(manifest="m.json", forward=True).findings
    assert finding.code == "check-not-run" and "net.py:build" in finding.message, "code is run only where it is named"
    assert ckptkit.check(manifest="m.json", forward=True, fits="net.py:build").exit_code == 0
    save({**state, "bias": state["bias"] + 1})
    report = ckptkit.check(manifest="m.json", forward=True, fits="net.py:build")
    assert [(f.rule, f.code) for f in report.findings] == [
        ("manifest", "tensors-differ"),
        ("forward", "golden-weights"),
        ("forward", "golden-differs"),
    ]
    assert report.exit_code == 1


def test_forward_with_the_architecture_that_is_identified(save) -> None:
    torchvision = pytest.importorskip("torchvision")
    path = save(torchvision.models.squeezenet1_1(num_classes=7).state_dict())
    report = ckptkit.check(path, forward=True, input_shapes=[[1, 3, 64, 64]])
    assert report.exit_code == 0 and report.results[0].rules == ("readable", "max-trust", "whole", "forward")


def test_unreadable(tmp_path: Path, safe: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(safe.read_bytes()[:-1])
    finding = only(broken, "file-unreadable", "readable", no_nan=True)
    assert finding.found == "CorruptError" and str(broken) not in finding.message
    only(tmp_path / "nope.pth", "file-unreadable", "readable")
    report = ckptkit.check([safe, broken])
    assert report.exit_code == 2 and report.to_dict()["checked"] == 1


def test_what_a_policy_cannot_be_is_an_error(safe: Path) -> None:
    with pytest.raises(ckptkit.VerifyError, match="max-size"):
        ckptkit.check(safe, max_size="big")
    with pytest.raises(ckptkit.VerifyError, match="nothing to check"):
        ckptkit.check()
