"""Models of torchvision, all the way: saved from a wrapper, converted to safetensors, verified by name.

The small ones of different families are in every run, that of videos with a small input.  All of them are in
``pytest -m slow tests/verifier/test_torchvision_models.py``, which takes the better part of an hour on two cores.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from support.fitting import check_file

import ckptkit
from ckptkit.report import Report
from ckptkit.verifier.references import build

OF_VIDEOS: dict[str, Any] = {"input_shapes": [(1, 3, 4, 32, 32)]}

SMALL = [
    ("squeezenet1_1", {}, {"": [1, 1000]}),
    ("mobilenet_v3_small", {}, {"": [1, 1000]}),
    pytest.param("mnasnet0_5", {}, {"": [1, 1000]}, marks=pytest.mark.thorough),
    ("quantized_shufflenet_v2_x0_5", {}, {"": [1, 1000]}),
    ("lraspp_mobilenet_v3_large", {}, {"out": [1, 21, 224, 224]}),
    ("ssdlite320_mobilenet_v3_large", {}, {"0.boxes": [300, 4], "0.scores": [300], "0.labels": [300]}),
    ("raft_small", {}, {str(step): [1, 2, 128, 128] for step in range(12)}),
    ("mc3_18", OF_VIDEOS, {"": [1, 400]}),
    *(pytest.param(name, {}, {"": [1, 400]}, marks=pytest.mark.thorough) for name in ("mc3_18", "r3d_18")),
]


def convert_and_verify(name: str, folder: Path, **options: Any) -> Report:
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    without: dict[str, object] = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    if "googlenet" in name or "inception" in name:
        without["init_weights"] = True  # said, so that nothing is warned of
    torch.manual_seed(0)
    model = builder(**without)
    wrapped = torch.nn.DataParallel(model).state_dict()
    count = len(wrapped)
    torch.save(wrapped, folder / "wrapped.pth")
    del model, wrapped
    assert ckptkit.convert(folder / "wrapped.pth", folder / "model.safetensors", strip_module=True).ok
    (folder / "wrapped.pth").unlink()
    report = check_file(folder / "model.safetensors", model=f"torchvision:{name}", forward=True, **options)
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
    return report


@pytest.mark.parametrize(("name", "options", "shapes"), SMALL)
def test_small_models_of_every_family(
    name: str, options: dict[str, Any], shapes: dict[str, list[int]], tmp_path: Path
) -> None:
    report = convert_and_verify(name, tmp_path, **options)
    expected = ["fit-coverage", "forward-ok", *(["batch-not-compared"] if name.startswith("ssd") else [])]
    assert [f.code for f in report.findings] == expected
    assert {o["path"]: o["shape"] for o in report.details["outputs"]} == shapes
    assert all(o["finite"] for o in report.details["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models())
def test_every_model(name: str, tmp_path: Path) -> None:
    convert_and_verify(name, tmp_path)
