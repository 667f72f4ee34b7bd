"""Models of torchvision, all the way: saved from a wrapper, converted to safetensors, verified by name.

The small ones of different families are in every run.  All of them are in ``pytest -m slow
tests/verifier/test_torchvision_models.py``, which takes the better part of an hour on two cores.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torchvision
from support.fitting import check_file

import ckptkit
from ckptkit.verifier.references import build

SMALL = [
    "squeezenet1_1",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "quantized_shufflenet_v2_x0_5",
    "lraspp_mobilenet_v3_large",
    "ssdlite320_mobilenet_v3_large",
    "raft_small",
    "mc3_18",
]


def convert_and_verify(name: str, folder: Path) -> None:
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    without: dict[str, object] = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    if "googlenet" in name or "inception" in name:
        without["init_weights"] = True  # said, so that nothing is warned of
    torch.manual_seed(1)
    model = builder(**without)
    wrapped = torch.nn.DataParallel(model).state_dict()
    count = len(wrapped)
    torch.save(wrapped, folder / "wrapped.pth")
    del model, wrapped
    assert ckptkit.convert(folder / "wrapped.pth", folder / "model.safetensors", strip_module=True).ok
    (folder / "wrapped.pth").unlink()
    report = check_file(folder / "model.safetensors", model=f"torchvision:{name}", forward=True)
    (folder / "model.safetensors").unlink()
    assert report.ok, report.findings
    found = {finding.code for finding in report.findings}
    assert found & {"forward-ok", "empty-output"}  # a detector that draws its weights may find nothing
    assert report.details["coverage"] == {"tensors": count, "of": count, "parameters_share": 1.0}
    _, reference = build(f"torchvision:{name}", {})
    shapes = {output["path"]: output["shape"] for output in report.details["outputs"]}
    assert reference.outputs is not None and set(shapes) == set(reference.outputs)
    for path, expected in reference.outputs.items():
        assert len(shapes[path]) == len(expected)
        assert all(want in (None, got) for want, got in zip(expected, shapes[path], strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_small_models_of_every_family(name: str, tmp_path: Path) -> None:
    convert_and_verify(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models())
def test_every_model(name: str, tmp_path: Path) -> None:
    convert_and_verify(name, tmp_path)
