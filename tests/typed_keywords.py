"""What mypy makes of the keywords of the public functions; it is checked with the package, and never run.

Each wrong call is one that mypy must refuse: strict as it is here, it tells of an ignored error that is none.
"""

from __future__ import annotations

import gzip
import io
import mmap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ckptkit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ckptkit.options import ConvertKeywords


def right(path: Path) -> None:
    """Every form that a value may have."""
    report: ckptkit.Report = ckptkit.convert(path, "out.safetensors", strip_module=True, include="a.*", exclude=["b.*"])
    ckptkit.convert(source=path, destination=path, rename=["^a=>b", ("c", "d")], map_location={"cuda:0": "cpu"})
    ckptkit.convert(path, path, map_location=lambda storage, tag: None, tied="error", max_shard_size="5GB", like=path)
    ckptkit.convert(path, path, progress=lambda done, of: None, metadata={"a": "b"}, model_args=None)
    ckptkit.convert(path, path, all_tensors=True, keep_beside=False, as_key="model")
    ckptkit.convert(path, path, max_shard_size="5GB", part="2/8", jobs=None, files_from=path, finish=False)
    ckptkit.convert(path, in_place=True, backup=True, strip_module=True)
    ckptkit.convert([path, "other.pth"], in_place=True, confirm=lambda paths: len(paths) < 3)
    ckptkit.convert(["a.pth", path], "folder/", to="safetensors")
    with ThreadPoolExecutor() as executor:
        ckptkit.convert(path, path, executor=executor)
    report = ckptkit.verify(path, model="torchvision:resnet18", golden=path, input_shapes=[(1, 3, 64, 64)], seed=1)
    difference: ckptkit.Difference = ckptkit.diff(path, path, section_a="model", atol=1e-6, progress=None)
    checked: ckptkit.CheckReport = ckptkit.check(path, no_pickle=True, max_trust="safe", allow_dtype="float32")
    state = ckptkit.load_state_dict(
        path, strip_module=True, rename=["^a=>b"], dtype="float16", device="cuda", mapped=None
    )
    ckptkit.load_state_dict(path, dtype=torch.float16, storage_options={"anon": True})
    ckptkit.diff("s3://a/b.pth", path, storage_options={"client_kwargs": {"endpoint_url": "http://localhost:9000"}})
    ckptkit.check("s3://a/", storage_options=None)
    ckptkit.convert(path, path, dtype=torch.bfloat16)
    with zipfile.ZipFile(path) as archive, archive.open("m.pth") as member, gzip.open(path) as unzipped:
        ckptkit.load_state_dict(member)
        ckptkit.load(unzipped)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        ckptkit.inspect(mapping)
        ckptkit.diff(file, io.BytesIO(mapping[:]))
    foreign: ckptkit.Foreign = ckptkit.load(path, section="args", map_location=None)
    print(report.ok, difference.equal, checked.ok, state["w"], foreign.lr)


def handed_on(path: Path, **options: Unpack[ConvertKeywords]) -> ckptkit.Report:
    """A function of one's own with the same keywords."""
    return ckptkit.convert(path, "out.pth", **options)


def wrong(path: Path) -> None:
    """A name that is none, and a value of another type."""
    ckptkit.convert(path, path, strip_modul=True)  # type: ignore[call-arg]
    ckptkit.convert(path, path, strip_module="yes")  # type: ignore[arg-type]
    ckptkit.convert(path, path, tied="both")  # type: ignore[arg-type]
    ckptkit.convert(path, in_place="yes")  # type: ignore[arg-type]
    ckptkit.convert(path, path, confirm=lambda: True)  # type: ignore[arg-type,misc]
    ckptkit.verify(path, modle="torchvision:resnet18")  # type: ignore[call-arg]
    ckptkit.verify(path, seed="7")  # type: ignore[arg-type]
    ckptkit.diff(path, path, rtol="small")  # type: ignore[arg-type]
    ckptkit.check(path, no_pickel=True)  # type: ignore[call-arg]
    ckptkit.check(path, max_trust="hostile")  # type: ignore[arg-type]
    ckptkit.inspect(path, storage_options="anon=true")  # type: ignore[arg-type]
    ckptkit.load_state_dict(path, strip_modul=True)  # type: ignore[call-arg]
    ckptkit.load_state_dict(path, mapped="yes")  # type: ignore[arg-type]
    ckptkit.load(path.open())  # type: ignore[arg-type]
    ckptkit.load(path, sektion="args")  # type: ignore[call-arg]
    handed_on(path, include=3)  # type: ignore[arg-type]
