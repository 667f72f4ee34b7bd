"""`ckptkit.testing`: each assertion passing and failing, and what its message says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import ckptkit
from ckptkit import testing
from ckptkit.testing import (
    assert_allowed,
    assert_fits,
    assert_matches_manifest,
    assert_no_nan,
    assert_no_pickle,
    assert_runs,
    assert_safe,
    assert_same_outputs,
    assert_same_weights,
)

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "fixtures"
SMALL = {"width_mult": 0.1, "num_classes": 10}


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The weights of ``ddp_resume.pth`` in another container, without the prefix."""
    ckptkit.convert(FIXTURES / "ddp_resume.pth", tmp_path / "clean.safetensors", strip_module=True, weights_only=True)
    return tmp_path / "clean.safetensors"


def failure(assertion, *given: object, **options: object) -> list[str]:
    """The lines of its message."""
    with pytest.raises(AssertionError) as caught:
        assertion(*given, **options)
    assert "__tracebackhide__" in assertion.__code__.co_varnames, "pytest shows the test, not the inside of this"
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{assertion.__name__}: ")
    assert any(line.startswith("  expected: ") for line in lines)
    assert any(line.startswith("  found:    ") for line in lines)
    return lines


# Weights.


def test_same_weights_whatever_the_container(clean: Path, tmp_path: Path) -> None:
    assert_same_weights(FIXTURES / "ddp_resume.pth", clean, strip_module=True)
    ckptkit.convert(clean, tmp_path / "again.pth")
    assert_same_weights(str(clean), tmp_path / "again.pth")


def test_another_prefix_is_told_with_what_to_do(clean: Path) -> None:
    lines = failure(assert_same_weights, FIXTURES / "ddp_resume.pth", clean)
    assert lines[1] == f"  a:        {FIXTURES / 'ddp_resume.pth'} (torch-zip, resume, 314 tensors)"
    assert lines[2] == f"  b:        {clean} (safetensors, state_dict, 314 tensors)"
    assert lines[5].startswith("- prefix-differs: ")
    assert lines[5].endswith(" (fix: strip_module=True)")
    assert lines[-1].startswith("... and ")


def test_every_kind_of_difference_has_its_line() -> None:
    a = {
        "same": torch.ones(3),
        "w": torch.zeros(4),
        "shape": torch.ones(4),
        "dtype": torch.ones(2),
        "gone": torch.ones(5),
    }
    b = {"same": torch.ones(3), "w": torch.zeros(4), "shape": torch.ones(2, 2), "dtype": torch.ones(2).half()}
    b["new"] = torch.ones(6, dtype=torch.int8)
    b["w"][1] = 0.5
    lines = failure(assert_same_weights, a, b)
    assert lines[1:4] == [
        "  a:        a dict in memory (5 tensors)",
        "  b:        a dict in memory (5 tensors)",
        "  expected: the same names, shapes and dtypes, values bit for bit",
    ]
    assert [line for line in lines if line.startswith("- ")] == [
        "- changed: w, 1 of 4 elements, by at most 0.5, on average 0.125",
        "- only in b: new",
        "- only in a: gone",
        "- shape: shape, [4] in a, [2, 2] in b",
        "- dtype: dtype, float32 in a, float16 in b",
    ]


def test_renamed_tensors_are_found() -> None:
    lines = failure(assert_same_weights, {"a.weight": torch.arange(9.0)}, {"b.weight": torch.arange(9.0)})
    assert "- renamed: a.weight in a, b.weight in b" in lines


@pytest.mark.parametrize(
    ("options", "passes"), [({}, False), ({"atol": 1e-3}, True), ({"rtol": 1e-3}, True), ({"atol": 1e-6}, False)]
)
def test_tolerance(options: dict[str, float], passes: bool) -> None:
    a, b = {"w": torch.ones(10)}, {"w": torch.ones(10) + 1e-4}
    if passes:
        assert_same_weights(a, b, **options)
    else:
        lines = failure(assert_same_weights, a, b, **options)
        assert "10 of 10 elements" in lines[-1]


def test_nan_is_the_same_as_itself_and_a_sign_is_not() -> None:
    assert_same_weights({"w": torch.tensor([float("nan"), 1.0])}, {"w": torch.tensor([float("nan"), 1.0])})
    nan = failure(assert_same_weights, {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([float("nan"), 1.0])})
    assert "- changed: w, 1 of 2 elements, by at most 0, on average 0, 1 NaN in b alone" in nan
    zero = failure(assert_same_weights, {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])})
    assert "- changed: w, 1 of 2 elements, by the sign of zeros alone" in zero


def test_long_lists_are_cut_and_counted() -> None:
    a = {f"layer{n}": torch.zeros(1) for n in range(50)}
    lines = failure(assert_same_weights, a, {name: torch.ones(1) for name in a})
    assert sum(line.startswith("- ") for line in lines) == 20
    assert lines[-1] == "... and 30 more"


def test_open_files_rewritten_ones_and_modules(clean: Path) -> None:
    model = get_model("mobilenet_v2", **SMALL)
    model.load_state_dict(ckptkit.load_state_dict(clean))
    assert_same_weights(clean, model)
    assert_same_weights(clean, model.state_dict())
    with ckptkit.open(FIXTURES / "ddp_resume.pth") as file:
        assert_same_weights(file, clean, strip_module=True)
        assert_same_weights(file.rewrite(ckptkit.StripModule()), clean)
    with torch.no_grad():
        model.classifier[1].bias[0] += 1
    lines = failure(assert_same_weights, clean, model)
    assert lines[2] == "  b:        a MobileNetV2 in memory (314 tensors)"
    assert lines[-1].startswith("- changed: classifier.1.bias, 1 of 10 elements, by at most 1,")


@pytest.mark.parametrize("given", [3, None, ["a.pth"], {}, {"w": 1}])
def test_what_is_no_weights_is_a_type_error(given: object) -> None:
    with pytest.raises(TypeError, match=r"^b is "):
        assert_same_weights({"w": torch.ones(1)}, given)


def test_what_cannot_be_read_never_passes(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 no more")
    for bad in (tmp_path / "missing.pth", tmp_path / "bad.pth"):
        for assertion in (assert_same_weights, assert_same_outputs):
            with pytest.raises(ckptkit.CkptkitError):
                assertion(bad, bad, *["torchvision:resnet18"] * (assertion is assert_same_outputs))
        for assertion in (assert_fits, assert_runs):
            with pytest.raises(ckptkit.CkptkitError):
                assertion(bad, "torchvision:resnet18")
        with pytest.raises(ckptkit.CkptkitError):
            assert_safe(bad)
        for assertion in (assert_no_pickle, assert_no_nan, assert_allowed):
            with pytest.raises((ckptkit.CkptkitError, AssertionError)):
                assertion(bad)


@pytest.mark.parametrize("assertion", [assert_no_pickle, assert_no_nan, assert_allowed])
def test_nothing_never_passes(assertion, tmp_path: Path) -> None:
    with pytest.raises(ckptkit.CkptkitError, match="nothing"):
        assertion()
    with pytest.raises((ckptkit.CkptkitError, AssertionError)):
        assertion(tmp_path)


# Models.


def test_fits(clean: Path) -> None:
    assert_fits(clean, "torchvision:mobilenet_v2", model_args=SMALL)
    assert_fits(FIXTURES / "ddp_resume.pth", get_model("mobilenet_v2", **SMALL), strip_module=True)
    lines = failure(assert_fits, FIXTURES / "ddp_resume.pth", "torchvision:mobilenet_v2", model_args=SMALL)
    assert lines[2] == "  expected: every tensor of torchvision:mobilenet_v2, with its shape, and no others"
    assert lines[3] == "  found:    wrapper-prefix"
    assert "--strip-module" in lines[4]


def test_fits_but_for_what_is_allowed() -> None:
    state = {"weight": torch.ones(2, 3), "extra": torch.ones(1)}
    assert_fits(state, nn.Linear(3, 2), allow_missing=["bias"], allow_unexpected=["extra"])
    lines = failure(assert_fits, state, nn.Linear(3, 2))
    assert {line.partition(":")[0] for line in lines[4:]} == {"- missing-keys", "- unexpected-keys"}


def test_runs() -> None:
    state = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    assert_runs(state, nn.Linear(3, 2), input_shapes=[[4, 3]])
    state["weight"][0, 0] = float("nan")
    lines = failure(assert_runs, state, nn.Linear(3, 2), input_shapes=[[4, 3]])
    assert "NaN" in "\n".join(lines[4:])


def test_golden_outputs(clean: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden.safetensors"
    ckptkit.verify(clean, model="torchvision:mobilenet_v2", model_args=SMALL, device="cpu", write_golden=golden)
    assert_runs(clean, golden=golden)
    state = ckptkit.load_state_dict(clean)
    state["classifier.1.bias"] = state["classifier.1.bias"] + 1
    lines = failure(assert_runs, state, golden=golden)
    assert lines[2].endswith(f"that agree with {golden}")


def test_same_outputs(save) -> None:
    state = {"weight": torch.randn(2, 3), "bias": torch.zeros(2)}
    given = {"model": nn.Linear(3, 2), "input_shapes": [[4, 3]]}
    path = save({f"module.{name}": value for name, value in state.items()})
    assert_same_outputs(path, state, **given)
    assert_same_outputs(state, path, strip_module=True, **given)
    assert_same_outputs(state, {**state, "bias": torch.full((2,), 0.01)}, atol=0.1, **given)
    lines = failure(assert_same_outputs, path, {**state, "bias": torch.ones(2)}, **given)
    assert lines[1:3] == ["  weights:  a dict in memory (2 tensors)", f"  expected: those of {path}"]
    assert lines[-1].startswith("- ")
    with pytest.raises(ckptkit.SectionError):
        assert_same_outputs(save([1, 2], "nothing.pth"), state, **given)


# Files.


def test_safe(clean: Path) -> None:
    assert_safe(clean)
    lines = failure(assert_safe, FIXTURES / "ddp_resume.pth")
    assert lines[-2:] == [
        "  found:    trust 'needs_trust': 1 other name",
        "- argparse.Namespace (unknown; data.pkl: args)",
    ]
    with ckptkit.open(FIXTURES / "ddp_resume.pth") as file:
        assert failure(assert_safe, file) == lines


def test_no_pickle(clean: Path, save) -> None:
    assert_no_pickle(clean, FIXTURES / "state_dict.safetensors")
    path = save({"w": torch.ones(1)})
    lines = failure(assert_no_pickle, clean, path)
    assert len([line for line in lines if line.startswith("- ")]) == 1
    assert lines[-1].startswith(f"- {path}: no-pickle: ")


def test_no_nan(clean: Path) -> None:
    assert_no_nan(clean, {"w": torch.ones(3)})
    lines = failure(assert_no_nan, {"a": torch.ones(1), "w": torch.tensor([1.0, float("nan")])})
    assert lines[1] == "  files:    a dict in memory (2 tensors)"
    assert lines[-1].startswith("- a dict in memory (2 tensors): no-nan: ")
    assert lines[-1].endswith("found w (1 NaN))"), "no command for a file that is gone"
    with ckptkit.open(clean) as file:
        assert_no_nan(file.rewrite(ckptkit.AddModule()))


def test_allowed(clean: Path) -> None:
    assert_allowed(clean, no_pickle=True, max_size="10MB", allow_dtype=["float32", "int64"])
    lines = failure(assert_allowed, clean, max_size="1kB", allow_dtype=["float16"])
    assert {line.split(": ")[1] for line in lines if line.startswith("- ")} == {"max-size", "allow-dtype"}
    with pytest.raises(ckptkit.CkptkitError, match="max-trust"):
        assert_allowed(clean, max_trust="blind")
    with pytest.raises(AssertionError):
        assert_allowed(clean.parent / "nothing-here")


def test_matches_manifest(clean: Path) -> None:
    manifest = clean.parent / "weights.lock.json"
    ckptkit.manifest([clean], manifest)
    assert_matches_manifest(clean, manifest)
    assert_matches_manifest([], manifest)
    ckptkit.convert(clean, clean, dtype="float16", force=True)
    lines = failure(assert_matches_manifest, [clean], manifest)
    assert lines[2] == f"  expected: manifest={manifest}"
    assert any("clean.safetensors: manifest: " in line for line in lines)


def test_pytest_shows_the_message_and_not_our_inside(clean: Path, tmp_path: Path, python) -> None:
    (tmp_path / "test_release.py").write_text(
        "from ckptkit.testing import assert_safe\n\n\ndef test_it():\n"
        f"    assert_safe({str(FIXTURES / 'ddp_resume.pth')!r})\n"
    )
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_release.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "argparse.Namespace (unknown; data.pkl: args)" in done.stdout
    assert "raise AssertionError" not in done.stdout


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, ckptkit.testing; print({'torch', 'numpy', 'pytest', 'ckptkit.released'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "set()", done.stderr


def test_all_is_sorted_and_documented() -> None:
    assert testing.__all__ == sorted(testing.__all__)
    assert all("Raises:" in (getattr(testing, name).__doc__ or "") for name in testing.__all__)
