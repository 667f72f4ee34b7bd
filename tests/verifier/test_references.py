"""References: every form is built, and everything that can go wrong has one clear line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.errors import MissingDependencyError, VerifyError
from ckptkit.verifier.references import build

MODELS = """
import sys
from dataclasses import dataclass

import torch
from torch import nn

from neighbour import WIDTH


@dataclass
class Config:
    width: int = WIDTH


class Net(nn.Module):
    def __init__(self, width: int = Config().width, name: str = "net"):
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.drop = nn.Dropout()
        self.name = name


def make(width=3, **rest):
    return Net(width, **rest)


def needs(width):
    return Net(width)


def fails():
    raise ValueError("no such\\n   thing")


def leaves():
    sys.exit(3)


def returns_a_state_dict():
    return Net().state_dict()


class Group:
    make = staticmethod(make)


instance = Net(4)
number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of factories with a neighbour it imports, in the working directory."""
    (tmp_path / "neighbour.py").write_text("WIDTH = 5")
    (tmp_path / "my_models.py").write_text(MODELS)
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("from torch import nn\ndef tiny():\n    return nn.Linear(2, 2)")
    (package / "bad.py").write_text("import nosuchpackage")
    (package / "worse.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path / "my_models.py"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("neighbour", "pack", "my_models") or name.startswith("_ckptkit_reference"):
            del sys.modules[name]


def width(spec: Any, **args: object) -> int:
    model, _ = build(spec, args)
    assert not model.training and not model.drop.training
    return model.layer.in_features


def test_a_file_absolute_and_relative(models: Path) -> None:
    path = list(sys.path)
    assert width(f"{models}:make") == 3
    assert width("my_models.py:make") == 3
    assert width("./my_models.py:Net") == 5  # a class, with its neighbour's default
    assert width("my_models.py:instance") == 4
    assert width("my_models.py:Group.make") == 3
    assert sys.path == path
    assert build("my_models.py:make", {})[1].spec == "my_models.py:make"


def test_a_module_in_the_working_directory(models: Path) -> None:
    assert width("my_models:make") == 3
    assert isinstance(build("pack.nets:tiny", {})[0], nn.Linear)
    assert isinstance(build("torch.nn:Identity", {})[0], nn.Identity)


def test_arguments_are_literals_or_strings(models: Path) -> None:
    assert width("my_models:make", width="7") == 7
    assert width("my_models:make", width=8) == 8
    model, reference = build("my_models:make", {"name": "a-b", "width": "(3)"})
    assert model.name == "a-b"
    assert reference.args == {"name": "a-b", "width": 3}
    assert build("my_models:make", {"name": "'7'"})[0].name == "7"


def test_objects_are_references_too(models: Path) -> None:
    given = nn.Sequential(nn.Dropout(), nn.Linear(2, 3)).train()
    model, reference = build(given, {})
    assert reference.spec is None and reference.label == "Sequential"
    assert model is not given and given.training  # a copy: the caller's model stays as it is
    assert not model.training
    assert build(nn.Linear, {"in_features": 2, "out_features": "4"})[0].out_features == 4


def test_torchvision_by_name() -> None:
    model, reference = build("torchvision:squeezenet1_1", {"num_classes": "7"})
    assert model.classifier[1].out_channels == 7
    assert [i.shape for i in reference.inputs] == [(1, 3, 224, 224)]
    assert not reference.inputs[0].is_list and not model.training


@pytest.mark.parametrize(
    ("name", "args", "shapes"),
    [
        ("inception_v3", {}, ((1, 3, 299, 299),)),
        ("quantized_googlenet", {}, ((1, 3, 224, 224),)),
        ("vit_b_32", {"image_size": "64"}, ((1, 3, 64, 64),)),
        ("r3d_18", {}, ((1, 3, 16, 112, 112),)),
        ("s3d", {}, ((1, 3, 16, 224, 224),)),
        ("raft_small", {}, ((1, 3, 128, 128), (1, 3, 128, 128))),
        ("lraspp_mobilenet_v3_large", {}, ((1, 3, 224, 224),)),
        ("ssdlite320_mobilenet_v3_large", {}, ((3, 320, 320),)),
    ],
)
def test_torchvision_families_and_their_inputs(
    name: str, args: dict[str, object], shapes: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights would be downloaded")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    _, reference = build(f"torchvision:{name}", args)
    assert tuple(i.shape for i in reference.inputs) == shapes
    assert reference.inputs[0].is_list is name.startswith("ssdlite")


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        ("resnet18", {}, "'resnet18' is not a reference; expected torchvision:NAME, timm:NAME, .*:factory or path"),
        ("torchvision:", {}, "is not a reference"),
        (":make", {}, "is not a reference"),
        ("torchvision:resnet81", {}, "torchvision has no model 'resnet81'; did you mean resnet18"),
        ("torchvision:resnet18", {"num_clases": "3"}, "torchvision:resnet18: .*unexpected keyword argument 'num_clas"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "without pretrained weights; omit weights"),
        ("torchvision:resnet18", {"num_classes": "many"}, "building the model failed: TypeError"),
        ("pack.missing:make", {}, "there is no module 'pack.missing' here"),
        ("nowhere.models:make", {}, "there is no module 'nowhere' here"),
        ("pack.bad:make", {}, "importing pack.bad failed: ModuleNotFoundError: No module named 'nosuchpackage'"),
        ("pack.worse:make", {}, "importing pack.worse failed: ZeroDivisionError"),
        ("pack.nets:tinny", {}, "there is no 'tinny' in it; did you mean tiny?"),
        ("missing.py:make", {}, "there is no file 'missing.py'"),
        ("pack/worse.py:make", {}, "running pack/worse.py failed: ZeroDivisionError: division by zero"),
        ("pack/nets.txt:make", {}, "no file 'pack/nets.txt'"),
        ("note.txt/../my_models.py:make", {}, "no file"),
        ("./README:make", {}, "is not a Python file; its name must end in .py"),
        ("my_models.py", {}, "my_models.py: name the factory in it: my_models.py:NAME"),
        ("C:/x/my_models.py", {}, "name the factory in it: C:/x/my_models.py:NAME"),
        ("my_models:number", {}, "is of type int; expected a function, a class or a module"),
        ("my_models:fails", {}, "building the model failed: ValueError: no such thing$"),
        ("my_models:leaves", {}, "building the model failed: SystemExit: 3"),
        ("my_models:returns_a_state_dict", {}, "returned OrderedDict; expected an nn.Module"),
        ("my_models:make", {"widht": 3}, "unexpected keyword argument 'widht'"),
        ("my_models:needs", {"widht": 3}, "did you mean width?"),
        ("my_models:needs", {}, "missing a required argument: 'width'; give it with --model-arg NAME=VALUE"),
        ("my_models:instance", {"width": 3}, "is already a module and takes no arguments .width."),
    ],
)
def test_what_goes_wrong_is_one_clear_line(models: Path, spec: str, args: dict[str, object], message: str) -> None:
    (models.parent / "README").write_text("")
    path = list(sys.path)
    with pytest.raises(VerifyError, match=message) as caught:
        build(spec, args)
    assert "\n" not in str(caught.value)
    assert sys.path == path


def test_a_windows_path_keeps_its_drive(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifyError, match=r"there is no file 'C:\\\\models.py'"):
        build("C:\\models.py:make", {})


def test_a_module_that_cannot_be_copied() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("not me")

    with pytest.raises(VerifyError, match="cannot be copied: RuntimeError: not me; give a factory"):
        build(Stubborn(), {})


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingDependencyError, match=r"torchvision, which is not installed; .* pip install"):
        build("torchvision:resnet18", {})
    assert isinstance(build(nn.Linear, {"in_features": 1, "out_features": 1})[0], torch.nn.Linear)
