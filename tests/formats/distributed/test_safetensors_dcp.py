"""The hub's sharded safetensors: put together bit for bit, the same as what torch consolidates, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.files import SameBits
from support.sharded import Samples

import ckptkit
from ckptkit.errors import CkptkitError, CorruptError


@pytest.fixture
def copy(sharded: Samples, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded["hf_several_files"].folder, tmp_path / "ckpt"))


def written(path: Path, tensors: dict[str, torch.Tensor], offsets: dict[str, Any] | None) -> None:
    info = {name: {"saved_offsets": each} for name, each in (offsets or {}).items()}
    metadata = {"format": "pt"} if offsets is None else {"format": "pt", "DCP_SHARDING_INFO": json.dumps(info)}
    save_file(tensors, path, metadata)


def shards(folder: Path, *each: tuple[dict[str, torch.Tensor], dict[str, Any] | None], of: str = "00001") -> Path:
    folder.mkdir(exist_ok=True)
    for number, (tensors, offsets) in enumerate(each, 1):
        written(folder / f"shard-{number:05}-model-00001-of-{of}.safetensors", tensors, offsets)
    return folder


@pytest.mark.parametrize("case", ["hf_sharded_2", "hf_sharded_4", "hf_several_files"])
def test_the_files_make_up_what_was_saved(case: str, sharded: Samples, tmp_path: Path, same_bits: SameBits) -> None:
    sample = sharded[case]
    with ckptkit.open(sample.folder) as file:
        assert (file.format, file.trust, file.kind) == ("safetensors-dcp", "safe", "state_dict")
        assert file.metadata == {"format": "pt"}
        assert [f.severity for f in file.findings if f.code == "completeness-unknown"] == ["info"]
    ckptkit.convert(sample.folder, tmp_path / "w.safetensors")
    for found in (ckptkit.load_state_dict(sample.folder), ckptkit.load_state_dict(tmp_path / "w.safetensors")):
        assert found.keys() == sample.tensors.keys()
        assert all(same_bits(found[name], value) for name, value in sample.tensors.items())
    with ckptkit.open(tmp_path / "w.safetensors") as file:
        assert file.checkpoint.part is None


def test_what_only_other_ranks_have_may_be_missing(copy: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    (copy / "shard-00002-model-00002-of-00002.safetensors").unlink()
    told = "missing: shard-00002-model-00002-of-00002.safetensors; a rank without values writes no file"
    for command in (("inspect", copy), ("check", copy), ("convert", copy, tmp_path / "o.safetensors")):
        done = run(*command)
        assert (done.returncode, told in done.stdout + done.stderr) == (0, True), done


def test_a_hole_names_the_file_that_may_be_missing(copy: Path) -> None:
    (copy / "shard-00001-model-00002-of-00002.safetensors").unlink()
    text = r"leave out .*; missing: shard-00001-model-00002-of-00002\.safetensors"
    with pytest.raises(CorruptError, match=text):
        ckptkit.open(copy)


def test_the_consolidated_twin_is_the_same(sharded: Samples, same_bits: SameBits) -> None:
    """Beside it the shards lie in ``sharded``; the whole is opened by its own index, as ever."""
    folder = sharded["hf_consolidated"].folder
    index = folder / "model.safetensors.index.json"
    assert ckptkit.diff(index, folder / "sharded").equal
    with ckptkit.open(index) as whole, ckptkit.open(folder / "sharded") as file:
        assert (whole.format, file.format) == ("safetensors-sharded", "safetensors-dcp")
    found = ckptkit.load_state_dict(folder / "sharded")
    assert all(same_bits(found[name], value) for name, value in sharded["hf_consolidated"].tensors.items())


def test_a_tensor_of_no_dimension_keeps_its_value(tmp_path: Path) -> None:
    """What torch consolidates has 0.0 in its place."""
    folder = shards(
        tmp_path / "x", ({"a": torch.tensor(3.5), "w": torch.ones(2, 3)}, {"a": [], "w": [0, 0]}),
        ({"w": torch.zeros(1, 3)}, {"w": [2, 0]}),
    )  # fmt: skip
    found = ckptkit.load_state_dict(folder)
    assert found["a"].item() == 3.5
    assert torch.equal(found["w"], torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3]))


def test_what_two_ranks_stored_must_be_the_same(tmp_path: Path) -> None:
    def rank(number: int, value: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"w": torch.full((2,), value), "own": torch.ones(1)}, {"w": [0], "own": [number]}

    assert ckptkit.load_state_dict(shards(tmp_path / "x", rank(0, 1.0), rank(1, 1.0)))["own"].shape == (2,)
    folder = shards(tmp_path / "y", rank(0, 1.0), rank(1, 0.0))
    with pytest.raises(CorruptError, match=r"w \(shard-00001-.*safetensors and shard-00002-.*safetensors\)"):
        ckptkit.load_state_dict(folder)


WHOLE = {"w": torch.ones(2, 2)}
FIRST = WHOLE, {"w": [0, 0]}
DAMAGED: dict[str, tuple[tuple[Any, ...], str]] = {
    "a hole": ((FIRST, (WHOLE, {"w": [3, 0]})), r"tensor 'w' of shape \[5, 2\]: its pieces leave out 2 elements of 10"),
    "an overlap": ((FIRST, (WHOLE, {"w": [1, 0]}), (WHOLE, {"w": [2, 0]})), "overlap"),
    "a file twice": ((FIRST, FIRST), "shard-00002-.*: it has no unique slice"),
    "no offsets": ((FIRST, (WHOLE, None)), "shard-00002-.*: its metadata has no DCP_SHARDING_INFO"),
    "other names": ((FIRST, (WHOLE, {"v": [2, 0]})), "describes other tensors than the file has"),
    "too few offsets": ((FIRST, (WHOLE, {"w": [2]})), "does not give 'w' an offset for each of its dimensions"),
    "offsets that are none": ((FIRST, (WHOLE, {"w": ["2", 0]})), "does not give 'w' an offset"),
    "an offset below 0": ((FIRST, (WHOLE, {"w": [-2, 0]})), "reaches outside"),
    "another dtype": ((FIRST, ({"w": torch.ones(2, 2).half()}, {"w": [2, 0]})), "float16"),
    "another tensor": ((FIRST, ({"w": torch.ones(3, 2)}, {"w": [0, 0]})), "is a different tensor there"),
    "other dimensions": ((FIRST, ({"w": torch.ones(2)}, {"w": [2]})), "a different number of dimensions"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_files_that_do_not_fit_together_are_refused(what: str, tmp_path: Path) -> None:
    parts, text = DAMAGED[what]
    with pytest.raises(CkptkitError, match=text):
        ckptkit.open(shards(tmp_path / "x", *parts))


def test_files_that_names_speak_of_must_be_there(copy: Path, tmp_path: Path) -> None:
    for path in copy.glob("shard-0000?-model-00002-*"):
        path.unlink()
    with pytest.raises(CorruptError, match=r"1 file is missing: …-model-00002-of-00002\.safetensors; get"):
        ckptkit.open(copy)
    folder = shards(tmp_path / "x", FIRST, FIRST, FIRST)
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CorruptError, match="1 file is missing: shard-00002-…; get"):
        ckptkit.open(folder)
    written(folder / "shard-00002-model-00001-of-00003.safetensors", *FIRST)
    with pytest.raises(CorruptError, match="several checkpoints are mixed here: of 1 and 3 consolidated files"):
        ckptkit.open(folder)


def test_a_file_of_another_kind_is_refused(copy: Path) -> None:
    path = copy / "shard-00002-model-00001-of-00002.safetensors"
    data = path.read_bytes()
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CorruptError, match=rf"{path.name}: it is torch-zip, but its name says safetensors"):
        ckptkit.open(copy)
    path.write_bytes(data[:-4])
    with pytest.raises(CorruptError, match=path.name):
        ckptkit.open(copy)


def test_each_file_says_what_it_is_a_part_of(sharded: Samples) -> None:
    path = sharded["hf_sharded_2"].folder / "shard-00001-model-00001-of-00001.safetensors"
    with ckptkit.open(path) as file, safe_open(str(path), "np") as oracle:
        assert file.checkpoint.part is not None
        assert set(file.state_dict) == set(oracle.keys())
