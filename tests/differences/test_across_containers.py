"""Copies in other containers are equal, and a difference seen from the other side is the same one."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given
from support.generated_tensors import SOME, state_dicts

import ckptkit

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
CHECKPOINTS = ["ddp_resume.pth", "legacy.pth", "model.safetensors.index.json", "scripted.pt", "state_dict.safetensors",
               "tied.pth", "whole_model.pth"]  # fmt: skip
ENDINGS = [".pth", ".safetensors", ".safetensors.index.json", ".bin.index.json"]

pytestmark = pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")


UNHOLDABLE = ["dtype.complex128", "dtype.complex32", "dtype.float4*", "dtype.bits*"]
"""Names in ``tied.pth`` of what safetensors has no dtypes for."""


def holdable(folder: Path, name: str) -> Path:
    """A fixture, without what safetensors cannot hold."""
    if name != "tied.pth":
        return FIXTURES / name
    ckptkit.convert(FIXTURES / name, folder / "holdable.pth", exclude=UNHOLDABLE)
    left_out = ckptkit.diff(FIXTURES / name, folder / "holdable.pth")
    assert (len(left_out.removed), left_out.added, left_out.changed) == (8, (), ())
    return folder / "holdable.pth"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_copy_in_another_container_is_equal(tmp_path: Path, name: str, ending: str) -> None:
    source = holdable(tmp_path, name) if "safetensors" in ending else FIXTURES / name
    copy = tmp_path / f"copy{ending}"
    ckptkit.convert(source, copy, weights_only=True, max_shard_size=50_000 if "index" in ending else None)
    written = copy if copy.exists() else next(tmp_path.glob("copy*"))
    difference = ckptkit.diff(source, written)
    assert (difference.equal, difference.ok, difference.ties) == (True, True, ())
    with ckptkit.open(source) as file:
        assert difference.unchanged == len(file.state_dict.everything) > 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_file_is_equal_to_itself(name: str) -> None:
    difference = ckptkit.diff(FIXTURES / name, FIXTURES / name, strict=True)
    assert (difference.equal, difference.ok, difference.same_order) == (True, True, True)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_wrapped_copy_is_equal_without_prefixes(tmp_path: Path, name: str) -> None:
    wrapped = tmp_path / "wrapped.safetensors"
    source = holdable(tmp_path, name)
    ckptkit.convert(source, wrapped, weights_only=True, strip_module=True, add_module=True)
    assert ckptkit.diff(source, wrapped, strip_module=True).equal


def test_renamed_by_content_across_containers(tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.safetensors"
    source = holdable(tmp_path, "tied.pth")
    ckptkit.convert(source, renamed, weights_only=True, rename=["^=>other."])
    difference = ckptkit.diff(source, renamed)
    assert {row["by"] for row in difference.renamed} == {"content"}
    assert {row["to"].removeprefix("other.") for row in difference.renamed} == {
        row["from"] for row in difference.renamed
    }
    assert (difference.added, difference.removed, difference.changed) == ((), (), ())


@pytest.mark.parametrize("flipped", [0, 3, 4 << 20])
def test_one_flipped_bit_is_found(tmp_path: Path, flipped: int) -> None:
    a = torch.zeros((4 << 20) + 1, dtype=torch.uint8)
    b = a.clone()
    b[flipped] = 1
    torch.save({"w": a, "v": torch.ones(2)}, tmp_path / "a.pth")
    safetensors.torch.save_file({"w": b, "v": torch.ones(2)}, tmp_path / "b.safetensors")
    row = ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.safetensors").changed[0]
    assert (row["name"], row["differing"], row["max_abs"]) == ("w", 1, 1)


def test_large_tensors_in_pieces(tmp_path: Path) -> None:
    a = torch.arange(12_000_000, dtype=torch.float32)
    b = a.clone()
    b[[0, 5_000_000, 11_999_999]] += torch.tensor([1.0, 2.0, 4.0])
    torch.save({"w": a}, tmp_path / "a.pth")
    torch.save({"w": b}, tmp_path / "b.pth")
    row = ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth").changed[0]
    assert (row["differing"], row["max_abs"], row["elements"]) == (3, 4.0, 12_000_000)
    assert row["mean_abs"] == pytest.approx(7 / 12_000_000)


def test_compressed_records(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(5000.0), "v": torch.ones(3)}, buffer)
    (tmp_path / "a.pth").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as out:
        for record in source.namelist():
            out.writestr(record, source.read(record))
    assert ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth").equal


def test_big_endian_files(tmp_path: Path) -> None:
    state = {"w": torch.arange(5000.0), "n": torch.arange(9)}
    torch.save(state, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_STORED) as out,
    ):
        for record in source.namelist():
            data = source.read(record)
            if record.endswith("byteorder"):
                data = b"big"
            elif record.rpartition("/")[0].endswith("/data"):
                width = 4 if record.endswith("/0") else 8
                data = b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))
            out.writestr(record, data)
    assert ckptkit.diff(tmp_path / "a.pth", tmp_path / "b.pth").equal


# Properties.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("differences")


def saved(folder: Path, name: str, obj: object) -> Path:
    torch.save(obj, folder / name)
    return folder / name


STATES = state_dicts()


@SOME
@given(state=STATES)
def test_whatever_is_saved_is_equal_to_itself(folder: Path, state: Any) -> None:
    path = saved(folder, "a.pth", state)
    if not ckptkit.inspect(path)["tensors"]:
        return
    difference = ckptkit.diff(path, path, strict=True)
    assert difference.ok, difference.to_json()


@SOME
@given(a=STATES, b=STATES, mixed=st.booleans())
def test_a_difference_is_mirrored(folder: Path, a: Any, b: Any, mixed: bool) -> None:
    if mixed:  # most of two independent ones differs by name alone
        b = {**a, **dict(list(b.items())[:2])}
    paths = saved(folder, "a.pth", a), saved(folder, "b.pth", b)
    try:
        there = ckptkit.diff(*paths)
    except ckptkit.SectionError:
        with pytest.raises(ckptkit.SectionError):
            ckptkit.diff(*reversed(paths))
        return
    back = ckptkit.diff(*reversed(paths))
    assert (there.equal, there.unchanged, there.same_order) == (back.equal, back.unchanged, back.same_order)
    assert (sorted(there.added), sorted(there.removed)) == (sorted(back.removed), sorted(back.added))
    names = [sorted((row["from"], row["to"]) for row in there.renamed)]
    names.append(sorted((row["to"], row["from"]) for row in back.renamed))
    assert names[0] == names[1]
    for ours, theirs in ((there.recast, back.recast), (there.reshaped, back.reshaped), (there.changed, back.changed)):
        assert len(ours) == len(theirs)
        mirrored = {row.get("was", row["name"]): row for row in theirs}
        for row in ours:
            other = mirrored[row["name"]]
            for key in (
                "max_abs",
                "mean_abs",
                "cosine",
                "equal_share",
                "equal_after_cast",
                "same_values",
                "zero_signs",
            ):
                assert row.get(key) == other.get(key), key
            if row.get("nan"):
                assert (row["nan"]["a"], row["nan"]["b"]) == (other["nan"]["b"], other["nan"]["a"])
