"""A container that is not there yet: one module and one row, and every command knows it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ckptkit

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"

MODULE = '''
"""Boxes: ``BOX1``, eight bytes of length, that much JSON (names, module versions, strings), the tensors."""

import json

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import Storage, TensorEntry, contiguous_stride
from ckptkit.errors import CorruptError
from ckptkit.formats.json_text import parse, state_dict_node, versions_from, versions_text
from ckptkit.formats.safetensors_writer import require_storable
from ckptkit.normalize import RawCheckpoint
from ckptkit.plan import Gather, LiteralBytes, Plan, moved


def read(probe):
    size = int.from_bytes(probe.head[4:12], "little")
    if 12 + size > probe.file.size:
        raise CorruptError("the description reaches beyond the file")
    document = parse(probe.file.read(12, size), probe.limits, "the description")
    values, offset = {}, 12 + size
    for name, (dtype, shape, nbytes) in document["tensors"].items():
        storage = Storage(
            key=name, dtype=dtype, nbytes=nbytes, location="cpu", source=ByteRange(probe.file, offset, nbytes)
        )
        shape = tuple(shape)
        values[name] = TensorEntry(
            storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype=dtype
        ).check()
        offset += nbytes
    root = state_dict_node(values, versions_from(document["versions"], probe.limits))
    return RawCheckpoint(root=root, format="box", metadata=document["metadata"])


def write(checkpoint):
    require_storable(checkpoint, "a box", plain=True)
    tensors = checkpoint.state_dict
    described = {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in tensors.items()}
    document = {"tensors": described, "versions": versions_text(tensors), "metadata": dict(checkpoint.metadata)}
    text = json.dumps(document).encode()
    data = b"BOX1" + len(text).to_bytes(8, "little") + text
    steps, offset = [LiteralBytes(0, data)], len(data)
    for entry in tensors.values():
        whole = entry.covers_storage and entry.is_plain_bytes
        steps += moved(offset, entry.storage.source) if whole else [Gather(offset, entry)]
        offset += entry.nbytes
    return Plan(format="box", nbytes=offset, steps=tuple(steps), tensors=len(tensors), aliases={})
'''

ROW = """
    Format(
        name="box",
        suffixes=(".box",),
        claims=lambda probe: probe.head.startswith(b"BOX1"),
        reader="box",
        writer="box",
        has_pickle=False,
        tensors_alone=True,
        words="a box of tensors",
    ),
)  # fmt: skip
\"\"\"Every container that is one file"""

USE = """
import shutil, sys
import ckptkit
from ckptkit.cli import main

resume, sharded = sys.argv[1:]
box = ckptkit.convert(resume, "clean.box", strip_module=True, weights_only=True).details
assert (box["checked"], box["plan"]["format"]) == (True, "box"), box
try:
    ckptkit.convert(resume, "whole.box")
except ckptkit.RewriteError as error:
    assert "a box cannot store what is beside the weights" in str(error), error
else:
    raise SystemExit("training state does not fit into a box")
with ckptkit.open("clean.box") as file:
    assert file.format == "box" and file.checkpoint.trust == "safe" and not file.checkpoint.origin.has_pickle
ckptkit.convert("clean.box", "back.pth")
ckptkit.convert(sharded, "named by content.bin", to="box")
ckptkit.convert("named by content.bin", "back.safetensors", dtype="float16", receipt=True)
assert ckptkit.diff("clean.box", "back.pth").ok
assert ckptkit.diff(resume, "clean.box", strip_module=True).ok
try:
    ckptkit.convert("clean.box", "many.box", max_shard_size=100)
except ckptkit.RewriteError as error:
    assert "there is no index format for several box files" in str(error), error
else:
    raise SystemExit("boxes have no index")
shutil.copy("clean.box", "folder")  # which has no ending
assert ckptkit.check("clean.box", no_pickle=True, require_format=["box"]).ok
refused = ckptkit.check("back.pth", no_pickle=True, require_format=["box"])
assert [finding.code for finding in refused.findings] == ["pickle-not-allowed", "container-not-allowed"], refused
found = ckptkit.check(".", require_format=["box"])  # by content, whatever they are called
assert sorted(each.path for each in found.results if each.ok) == ["clean.box", "folder", "named by content.bin"], found
main(["inspect", "clean.box", "folder"])
"""


def test_one_module_and_one_row(tmp_path: Path) -> None:
    package = tmp_path / "ckptkit"
    shutil.copytree(Path(ckptkit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "formats" / "box.py").write_text(MODULE)
    table = package / "formats" / "containers.py"
    end = ')  # fmt: skip\n"""Every container that is one file'
    before, after = table.read_text(encoding="utf-8").split(end)
    table.write_text(before + ROW.removeprefix("\n") + after, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    sources = [FIXTURES / "ddp_resume.pth", FIXTURES / "model.safetensors.index.json"]
    done = subprocess.run(
        [sys.executable, "-c", USE, *sources], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clean.box: box, state dict" in done.stdout
    assert "a box of tensors" in done.stdout
