"""ZIP archives that are not checkpoints: each is named, with what to do."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from ckptkit import formats
from ckptkit.errors import UnknownFormatError


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x.npy", "y.npy"], r"numpy archive \(.npz\) of 2 arrays: 'x.npy', 'y.npy'; numpy.load reads it"),
        (["config.json", "metadata.json", "model.weights.h5"], r"Keras model \(.keras\).*keras.saving.load_model"),
        (["MAR-INF/MANIFEST.json", "model.pth", "handler.py"], r"TorchServe .*weights are 'model.pth': unpack"),
        (["MAR-INF/MANIFEST.json", "handler.py"], r"TorchServe model archive \(.mar\); unpack it first"),
        (["[Content_Types].xml", "word/document.xml"], "office document"),
        (["META-INF/MANIFEST.MF", "A.class"], "Java or Android"),
        (["p/__init__.py", "p-1.dist-info/METADATA"], r"Python package \(.whl\), no checkpoint"),
        (["p/w.pth", "p-1.dist-info/METADATA"], r"Python package \(.whl\), which holds 'p/w.pth': unpack that first"),
        (["data.pkl", "data/0", "version"], "without their folder"),
        (
            ["a/model.safetensors", "b.ckpt", "README"],
            "with 2 checkpoints in it",
        ),
        ([f"f{n}.txt" for n in range(6)], r"it holds 6 files: 'f0.txt', 'f1.txt', 'f2.txt', 'f3.txt' and 2 more"),
        (["folder/"], "without a file in it"),
        (["x" * 300 + ".txt"], "x{80}…"),
    ],
)
def test_each_is_named(names: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as out:
        for name in names:
            out.writestr(name, b"")
    with pytest.raises(UnknownFormatError, match=words) as caught:
        formats.read(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_what_numpy_writes(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "a.npz", first=numpy.ones(3), second=numpy.zeros(2))
    with pytest.raises(UnknownFormatError, match=r"2 arrays: 'first\.npy', 'second\.npy'"):
        formats.read(tmp_path / "a.npz")


def test_a_checkpoint_zipped_once_more(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model.pth", buffer.getvalue())
    with pytest.raises(UnknownFormatError, match=r"with 1 checkpoint in it: 'model\.pth'; unpack it first"):
        formats.read(tmp_path / "model.zip")
