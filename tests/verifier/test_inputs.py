"""What a model is given: drawn from a seed, in shapes asked for, or read from a file of any container."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptkit
from ckptkit.errors import VerifyError
from ckptkit.verifier.inputs import Input, drawn_inputs, read_inputs, wanted_inputs

CPU = torch.device("cpu")


def test_shapes_asked_for_keep_the_kind_of_the_input() -> None:
    known = (Input(shape=(1, 16), name="input_ids", below=100), Input(shape=(1, 16), name="mask", below=2))
    assert wanted_inputs(known, [], "m") == known
    both = wanted_inputs(known, [(2, 8)], "m")  # one shape for all that are documented alike
    assert both == (Input(shape=(2, 8), name="input_ids", below=100), Input(shape=(2, 8), name="mask", below=2))
    assert wanted_inputs(known, [(1, 4), (1, 5)], "m")[1] == Input(shape=(1, 5), name="mask", below=2)
    assert wanted_inputs(known, [(1, 4), (1, 4), (3,)], "m")[2] == Input(shape=(3,))
    other = (Input(shape=(1, 3)), Input(shape=(1, 7), name="b"))
    assert wanted_inputs(other, [(2, 3)], "m") == (Input(shape=(2, 3)), other[1])


def test_a_list_of_images_stays_one() -> None:
    known = (Input(shape=(3, 32, 32), is_list=True),)
    inputs = drawn_inputs(wanted_inputs(known, [(2, 3, 8, 8), (3, 4, 6)], "m"), 0)
    assert inputs.is_list and inputs.rows == 3
    [images] = inputs.batch(CPU, torch.float32).args
    assert [tuple(image.shape) for image in images] == [(3, 8, 8), (3, 8, 8), (3, 4, 6)]
    assert inputs.rebatched(CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "is unknown; give --input-shape .*, --input FILE or --no-forward"),
        ([()], "expected sizes of at least 1"),
        ([(1, 0)], "expected sizes of at least 1"),
        ([(1 << 20, 1 << 20)], "elements are more than"),
    ],
)
def test_shapes_that_are_none(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        wanted_inputs((), shapes, "m")


def test_values_come_from_the_seed() -> None:
    wanted = (Input(shape=(1, 3)), Input(shape=(1, 50), name="ids", below=7))
    first, again, other = (drawn_inputs(wanted, seed) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()
    assert torch.equal(first.values[0], torch.rand((1, 3), generator=torch.Generator().manual_seed(1)))
    batch = first.batch(CPU, torch.float16)
    assert batch.args[0].dtype == torch.float16
    assert batch.kwargs["ids"].dtype == torch.int64  # whole numbers are not cast
    assert set(batch.kwargs["ids"].flatten().tolist()) <= set(range(7))
    assert str(first) == "1x3 and ids 1x50"
    with pytest.raises(VerifyError, match="cannot be made from seed"):
        drawn_inputs(wanted, 1 << 80)


def test_a_row_and_its_pair() -> None:
    alone = drawn_inputs((Input(shape=(1, 3)),), 0)
    pair = alone.rebatched(CPU, torch.float32)
    assert pair is not None and torch.equal(pair.args[0][:1], alone.values[0])
    assert not torch.equal(pair.args[0][0], pair.args[0][1])
    several = drawn_inputs((Input(shape=(4, 3)), Input(shape=(4, 2), name="b")), 0)
    row = several.rebatched(CPU, torch.float32)
    assert row is not None and torch.equal(row.args[0], several.values[0][:1])
    assert torch.equal(row.kwargs["b"], several.values[1][:1])
    assert drawn_inputs((Input(shape=(4, 3)), Input(shape=(3,))), 0).rebatched(CPU, torch.float32) is None


X, Y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)


def saved(obj: Any, path: Path, name: str) -> str:
    if name.endswith(".safetensors"):
        save_file(obj, path / name)
    else:
        torch.save(obj, path / name)
    return str(path / name)


@pytest.mark.parametrize(
    ("obj", "name", "args", "kwargs"),
    [
        ({"0": X, "1": Y}, "in.safetensors", [X, Y], {}),
        ({"input1": Y, "input0": X}, "in.pth", [X, Y], {}),
        ({"mask": Y, "input_0": X}, "in.pth", [X], {"mask": Y}),
        ({"ids": X}, "in.safetensors", [], {"ids": X}),
        (X, "in.pt", [X], {}),
        ([X, Y], "in.pt", [X, Y], {}),
    ],
)
def test_files_of_inputs(tmp_path: Path, obj: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    batch = read_inputs(saved(obj, tmp_path, name), ()).batch(CPU, torch.float32)
    assert len(batch.args) == len(args) and all(torch.equal(a, b) for a, b in zip(batch.args, args, strict=True))
    assert batch.kwargs.keys() == kwargs.keys()
    assert all(torch.equal(batch.kwargs[key], kwargs[key]) for key in kwargs)


@pytest.mark.parametrize(
    ("obj", "known", "message"),
    [
        ({"0": X, "2": Y}, (), "its inputs 0, 2 leave gaps"),
        ({"1": X}, (), "leave gaps"),
        ({"epoch": 3}, (), "contains no inputs"),
        ([X, 3], (), "contains no inputs"),
        ({"0": X}, (Input(shape=(3, 8, 8), is_list=True),), "takes a list of images"),
        ({"image": torch.ones(3, 8, 8)}, (Input(shape=(3, 8, 8), is_list=True),), "takes a list of images"),
    ],
)
def test_files_that_are_no_inputs(tmp_path: Path, obj: Any, known: tuple[Input, ...], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        read_inputs(saved(obj, tmp_path, "in.pth"), known)


def test_an_unreadable_file_of_inputs(tmp_path: Path) -> None:
    (tmp_path / "in.pt").write_bytes(b"no tensors")
    with pytest.raises(ckptkit.FormatError):
        read_inputs(str(tmp_path / "in.pt"), ())
    with pytest.raises(ckptkit.MissingFileError):
        read_inputs(str(tmp_path / "none.pt"), ())


class Ids(nn.Module):
    """Takes token ids and a mask, both by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)

    def forward(self, *, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.words(ids) * mask.unsqueeze(-1)


@pytest.fixture
def verified(save: Callable[..., Path], tmp_path: Path) -> Callable[..., ckptkit.Report]:
    def check(inputs: dict[str, torch.Tensor], **options: Any) -> ckptkit.Report:
        torch.manual_seed(0)
        path = saved(inputs, tmp_path, "in.safetensors")
        return ckptkit.verify(save(Ids().state_dict()), model=Ids, input=path, device="cpu", **options)

    return check


def test_a_model_runs_on_the_files_values(verified: Callable[..., ckptkit.Report]) -> None:
    report = verified({"ids": torch.tensor([[1, 2, 9]]), "mask": torch.ones(1, 3, dtype=torch.float64)})
    assert report.ok, report.findings
    assert report.details["outputs"][0]["shape"] == [1, 3, 4]
    assert report.details["outputs"][0]["dtype"] == "float32"  # the mask is cast to the model's type
    assert report.details["inputs"]["seed"] is None
    failed = verified({"ids": torch.tensor([[10]]), "mask": torch.ones(1, 1)})
    assert [f.code for f in failed.findings if f.severity == "error"] == ["forward-failed"]
    with pytest.raises(VerifyError, match="give only one of them"):
        verified({"ids": torch.tensor([[1]])}, input_shapes=[(1, 3)])
