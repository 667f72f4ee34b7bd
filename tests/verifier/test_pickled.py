"""Running the pickled model itself: only when asked, never of a hostile file, and saying what it imports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.report import Report


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def verify(path: Path, **options: Any) -> Report:
    given = {"unsafe_load": True, "input_shapes": [(1, 3)], "device": "cpu", **options}
    return ckptkit.verify(path, **given)


def codes(report: Report) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings if f.code not in ("fit-coverage", "forward-ok")}


def test_without_the_option_it_is_never_run(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ckptkit.VerifyError, match=r"give --model REF .*, or --unsafe-load to run the pickled model"):
        verify(save(model()), unsafe_load=False)
    # With a reference it is verified like any other, and still not run.
    assert verify(save(model()), unsafe_load=False, model=model).ok


def test_it_runs_and_says_what_it_imports(save: Any, capfd: pytest.CaptureFixture[str]) -> None:
    report = verify(save(model()))
    assert report.ok and codes(report) == {"unsafe-load": "warning"}
    told = capfd.readouterr().err
    assert "--unsafe-load runs code; loading it imports:" in told
    for name in ("torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Linear"):
        assert f"\n  {name}\n" in told
    assert "torch.nn.modules.linear.Linear" in report.findings[0].message
    assert report.details["reference"] == "the pickled model"
    expected = model()(torch.rand((1, 3), generator=torch.Generator().manual_seed(0)))
    assert report.details["outputs"][0]["max"] == float(expected.detach().max())


def test_names_are_told_before_anything_is_imported(
    save: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        assert "torch.nn.modules.linear.Linear" in capfd.readouterr().err
        raise ImportError("stop here")

    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(ckptkit.VerifyError, match="cannot be loaded: ImportError: stop here"):
        verify(save(model()))


class Hostile(nn.Linear):
    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def test_a_hostile_file_is_refused_always(save: Any, tmp_path: Path) -> None:
    net = model()
    net.extra = Hostile(1, 1)
    net.extra.target = str(tmp_path / "made")
    path = save(net)
    with pytest.raises(ckptkit.CkptkitError, match="hostile"):
        verify(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_section_of_it(save: Any, tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "all.pt"
    saved = {"epoch": 3, "net.v1": model(), "other": nn.Linear(7, 7)}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    assert verify(path, section="net.v1").ok
    assert verify(path, section="other", input_shapes=[(1, 7)]).ok
    with pytest.raises(ckptkit.SectionError):
        verify(path)


def test_wrapped_models(save: Any) -> None:
    assert verify(save(nn.DataParallel(model()))).ok
    assert verify(save(model().state_dict)).ok  # the bound method


class Changing(nn.Module):
    """Adds to its weights when it is unpickled."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        with torch.no_grad():
            self.linear.bias += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_code_that_changes_weights_while_it_loads(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())
    report = verify(save(Changing()))
    assert not report.ok and codes(report)["pickled-differs"] == "error"
    assert "linear.bias" in next(f.message for f in report.findings if f.code == "pickled-differs")


def _this() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.Changing = Changing
    return module


def test_classes_that_are_not_here(save: Any, tmp_path: Path) -> None:
    import sys
    import types

    (tmp_path / "elsewhere.py").write_text("import torch\nclass Net(torch.nn.Linear):\n    pass\n")
    module = types.ModuleType("elsewhere")
    sys.modules["elsewhere"] = module
    try:
        exec((tmp_path / "elsewhere.py").read_text(), module.__dict__)  # noqa: S102
        path = save(module.Net(3, 2))
    finally:
        del sys.modules["elsewhere"]
    with pytest.raises(ckptkit.VerifyError, match=r"ModuleNotFoundError: .*must be importable from here"):
        verify(path)


def test_what_holds_no_model(save: Any) -> None:
    with pytest.raises(ckptkit.VerifyError, match="contains no pickled model to run"):
        verify(save(model().state_dict()))
    with pytest.raises(ckptkit.VerifyError, match="give only one of them"):
        verify(save(model()), model=model)
    with pytest.raises(ckptkit.VerifyError, match="give --input-shape"):
        verify(save(model()), input_shapes=[])


def test_its_outputs_against_another_checkpoint(save: Any) -> None:
    theirs = model().state_dict()
    report = verify(save(model()), against=save(theirs, "theirs.pth"))
    assert report.ok and "against-equal" in codes(report)
    theirs["2.bias"] = theirs["2.bias"] + 1
    report = verify(save(model()), against=save(theirs, "theirs.pth"))
    assert codes(report)["against-differs"] == "error"
    assert "they diverge at `2`" in report.findings[-1].message
