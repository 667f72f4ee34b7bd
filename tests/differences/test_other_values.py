"""`ckptkit.diff`: values that are not plain tensors, files that are no weights, and how files are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.generated_tensors import STORABLE
from torch import nn

import ckptkit
from ckptkit.normalize.trees import Place, SameContent, side_by_side
from ckptkit.pickling.inert import Global, InertDict

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantize.* deprecated"),
    pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental"),
]


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)).state_dict())


def test_values(diff) -> None:
    def state(scale: float, extra: object = (1, "x")) -> dict[str, object]:
        return {
            "w": torch.ones(2),
            "v": torch.ones(3),
            "q": torch.quantize_per_tensor(torch.ones(4), scale, 0, torch.qint8),
            "m._extra_state": extra,
        }

    assert diff(state(0.1), state(0.1)).equal
    difference = diff(state(0.1), state(0.2, (1, "y")))
    assert [row["name"] for row in difference.values] == ["q", "m._extra_state"]
    assert (difference.equal, difference.unchanged, difference.tensors) == (False, 2, 4)
    assert [row["name"] for row in diff(state(0.1), {**state(0.1), "q": torch.ones(4)}).values] == ["q"]


def test_what_cannot_be_gone_through_is_never_equal(diff) -> None:
    vast = {"w": torch.ones(2), "huge": torch.ones(1).expand(10**6, 10**6).T}
    assert diff(vast, vast).equal  # expanded alike: one element is looked at
    window = {"w": torch.ones(2), "huge": torch.ones(2000).as_strided((1000, 1000), (1, 1))}
    difference = diff(window, window)
    assert [row["name"] for row in difference.not_compared] == ["huge"]
    assert (difference.equal, [finding.code for finding in difference.findings]) == (False, ["not-compared"])


@pytest.mark.skipif("complex32" not in STORABLE, reason="this torch cannot save complex32")
def test_dtypes_without_figures(diff) -> None:
    raw = torch.arange(8, dtype=torch.uint8)
    a, b = raw.view(torch.complex32), (raw + 1).view(torch.complex32)
    assert diff({"w": a}, {"w": a.clone()}).equal
    row = diff({"w": a}, {"w": b}).changed[0]
    assert (row["max_abs"], row["nan"], row["dtype"]) == (None, None, "complex32")
    assert diff({"w": a}, {"w": torch.ones(2)}).recast[0]["equal_after_cast"] is None


def test_one_tensor_and_collections(diff) -> None:
    assert diff(torch.ones(3), torch.ones(3)).equal
    assert not diff(torch.ones(3), torch.zeros(3)).equal
    assert diff([torch.ones(3), 5], [torch.ones(3), 5]).equal
    assert not diff([torch.ones(3)], [torch.ones(3), torch.ones(2)]).equal
    assert diff(torch.ones(3).untyped_storage(), torch.ones(3).untyped_storage()).equal
    assert not diff(torch.ones(3).untyped_storage(), torch.zeros(3).untyped_storage()).equal


def test_nothing_compared_is_an_error(diff) -> None:
    with pytest.raises(ckptkit.SectionError, match="nothing to compare"):
        diff({"epoch": 1}, {"epoch": 1})


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    with pytest.raises(ckptkit.FormatError):
        ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth")
    with pytest.raises(ckptkit.MissingFileError):
        ckptkit.diff(tmp_path / "a.pth", tmp_path / "missing.pth")


def test_equal_files_need_no_numpy(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "a.pth")
    code = (
        "import sys, ckptkit; assert ckptkit.diff('a.pth', 'a.pth').equal; "
        "print(sorted({'torch', 'numpy', 'ml_dtypes'} & set(sys.modules)))"
    )
    path = str(Path(ckptkit.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_progress(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pth")
    torch.save({"w": torch.ones(1000)}, tmp_path / "b.pth")
    seen: list[tuple[int, int]] = []
    ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8000, 8000), (16000, 16000)]


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "a.pth")
    torch.save(model(), tmp_path / "b.pth")

    def touch(done: int, total: int) -> None:
        with (tmp_path / "b.pth").open("ab") as file:
            file.write(b"\0")

    with pytest.raises(ckptkit.CorruptError, match="was changed while it was being read"):
        ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth", progress=touch)


def test_trees_of_any_depth_and_with_cycles() -> None:
    def deep(leaf: object) -> list:
        node: list = [leaf]
        for _ in range(20_000):
            node = [node]
        return node

    def cyclic(leaf: object) -> list:
        node: list = [leaf]
        node.append(node)
        return node

    def same(a: object, b: object) -> bool:
        return not list(side_by_side([(Place(), a, b)], SameContent()))

    for tree in (deep, cyclic):
        assert same(tree(1), tree(1))
        assert not same(tree(1), tree(2))
        assert not same(tree(1), tree(True))
    assert same(float("nan"), float("nan"))
    assert not same(InertDict([("a", 1)]), InertDict([("a", 1), ("b", 2)]))
    assert not same(Global("m", "n"), Global("m", "o"))


def test_a_tensor_with_many_names_is_compared_once(tmp_path: Path) -> None:
    weight = torch.rand(50)
    torch.save(dict.fromkeys("abcde", weight), tmp_path / "a.pth")
    seen: list[int] = []
    ckptkit.diff(tmp_path / "a.pth", tmp_path / "a.pth", progress=lambda done, total: seen.append(total))
    assert seen == [400]
