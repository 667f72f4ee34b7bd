"""The check of outputs whose bytes are not the source's as they lie: cast, cut, gathered, written twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import extents, flipped, written

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import Checkpoint
from ckptkit.compare import check_output
from ckptkit.errors import CorruptError
from ckptkit.rewrite import CastDtype, Compact, Tied

Save = Callable[..., Path]

BIG = torch.arange(1000.0)


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    base = torch.randn(20, 30)
    return {"whole": base, "tied": base, "t": torch.randn(8, 9).t(), "half": torch.randn(50).half(),
            "part": BIG[100:120], "count": torch.tensor(3)}  # fmt: skip


@pytest.fixture
def source(save: Save) -> Iterator[Checkpoint]:
    checkpoint, file = formats.read(save(state(), "source.pth"))
    with closing(file):
        yield checkpoint


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "rewriter",
    [CastDtype("bfloat16"), CastDtype("float64"), CastDtype("float8_e5m2"), Compact(), Tied("duplicate")],
    ids=lambda rewriter: type(rewriter).__name__,
)
def test_any_flipped_bit_is_found(source: Checkpoint, tmp_path: Path, suffix: str, rewriter: Any) -> None:
    source = source.rewrite(rewriter)
    path = written(source, tmp_path / f"out{suffix}")
    assert check_output(source, str(path)) > 0
    good = path.read_bytes()
    places = extents(path)
    for name, (offset, nbytes) in places.items():
        for at in (offset, offset + nbytes - 1):
            path.write_bytes(good)
            flipped(path, at)
            with pytest.raises(CorruptError, match="the output") as caught:
                check_output(source, str(path))
            same = [other for other, (begin, _) in places.items() if begin == offset]
            assert any(other in str(caught.value) for other in same), name


def test_another_cast_is_a_difference(source: Checkpoint, tmp_path: Path) -> None:
    path = written(source.rewrite(CastDtype("bfloat16")), tmp_path / "out.safetensors")
    for other in (source, source.rewrite(CastDtype("float16")), source.rewrite(CastDtype("bfloat16", "part"))):
        with pytest.raises(CorruptError, match="has another dtype or shape"):
            check_output(other, str(path))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cast": {"dtype": "bfloat16"},
    "duplicated": {"tied": "duplicate"},
    "cast and duplicated": {"dtype": "float64", "tied": "duplicate"},
    "renamed": {"add_prefix": "x", "map_location": "cuda:1"},
    "sharded": {"max_shard_size": 1000},
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", list(state()))
def test_a_damaged_source_is_found(save: Save, tmp_path: Path, suffix: str, options: dict[str, Any], name: str) -> None:
    path = save(state())
    offset, nbytes = extents(path)[name]
    flipped(path, offset + nbytes - 1)  # of `part` that is outside its view
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(CorruptError, match=r"the bytes have CRC-32 .* the file is damaged") as caught:
        ckptkit.convert(path, tmp_path / f"out{suffix}", **options)
    assert name in caught.value.message or name in ("whole", "tied")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_damage_of_what_is_left_out_does_not_matter(save: Save, tmp_path: Path) -> None:
    path = save(state())
    flipped(path, extents(path)["half"][0])
    ckptkit.convert(path, tmp_path / "out.pth", exclude=["half"])
    assert "half" not in torch.load(tmp_path / "out.pth")
