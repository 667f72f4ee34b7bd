"""ZIP archives that are not checkpoints of torch's: what they are by their records' names, and what to do.

- ``.npz``: arrays as ``.npy`` records (``numpy/lib/_npyio_impl.py``)
- ``.keras``: ``config.json``, ``metadata.json`` and ``model.weights.h5`` (``keras/src/saving/saving_lib.py``)
- ``.mar`` (TorchServe): ``MAR-INF/MANIFEST.json`` (``model_archiver/model_packaging_utils.py``)
- ``.docx``, ``.xlsx``, ``.pptx``: ``[Content_Types].xml`` (ECMA-376); ``.jar``, ``.apk``, wheels
- any other: what is inside is for whoever unpacks it; files in it that look like checkpoints are named
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptkit.formats.archives.zip_archive import Record
from ckptkit.report import count_of, listed

__all__ = ["describe_zip"]

_CHECKPOINTS = (".pth", ".pt", ".pt2", ".ckpt", ".bin", ".safetensors", ".pkl", ".jit", ".ptl", ".tar", ".pth.tar")
"""Endings that checkpoints have."""


def describe_zip(records: dict[str, Record]) -> str:
    """One sentence: what the archive is, and the remedy where there is one.

    Args:
        records: by their full names; none of torch's containers claims them.
    """
    names = [name for name in records if not name.endswith("/")]
    inside = [name for name in names if name.lower().endswith(_CHECKPOINTS)]
    if not names:
        return "a zip archive without a file in it"
    if all(name.endswith(".npy") for name in names):
        return f"a numpy archive (.npz) of {count_of(len(names), 'array')}: {_some(names)}; numpy.load reads it"
    if "model.weights.h5" in records or ("config.json" in records and "metadata.json" in records):
        return "a Keras model (.keras), no torch checkpoint; keras.saving.load_model reads it"
    if "MAR-INF/MANIFEST.json" in records:
        held = (
            f"; its weights are {_some(inside)}: unpack that first (unzip)" if inside else "; unpack it first (unzip)"
        )
        return f"a TorchServe model archive (.mar){held}"
    if "[Content_Types].xml" in records:
        return "an office document (.docx, .xlsx or .pptx), no checkpoint"
    if "META-INF/MANIFEST.MF" in records or "AndroidManifest.xml" in records:
        return "a Java or Android package (.jar, .apk), no checkpoint"
    if any(name.endswith(".dist-info/METADATA") for name in names):
        held = f", which holds {_some(inside)}: unpack that first (unzip)" if inside else ""
        return f"a Python package (.whl){held}" if inside else "a Python package (.whl), no checkpoint"
    if "data.pkl" in records:
        return (
            "the records of a torch checkpoint without their folder, as unpacking and packing again leaves them: "
            "torch wants data.pkl inside a folder. Pack the folder itself, stored (zip -0 -r NEW.pth FOLDER)"
        )
    if inside:
        return (
            f"a zip archive, no checkpoint itself, with {count_of(len(inside), 'checkpoint')} in it: {_some(inside)}; "
            "unpack it first (unzip)"
        )
    return f"a zip archive without a torch checkpoint; it holds {count_of(len(names), 'file')}: {_some(names)}"


def _some(names: Iterable[str]) -> str:
    """The first names, each cut short."""
    return listed([repr(name if len(name) <= 80 else name[:80] + "…") for name in names], 4)
