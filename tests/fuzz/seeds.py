"""Honest files of every container, written by torch, for the fuzzer to start from.

    python tests/fuzz/seeds.py FOLDER        (needs torch; writes FOLDER/TARGET/NAME)

Archives are written without checksums: a mutated record is then read, not refused for its CRC.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

Seeds = Iterator[tuple[str, bytes]]


def objects() -> dict[str, Any]:
    """What people save, as small as it comes."""
    torch.manual_seed(0)
    shared = torch.arange(6.0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "kept"  # type: ignore[attr-defined]
    return {
        "state_dict": model.state_dict(),
        "model": model,
        "resume": {
            "epoch": 3,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1),
        },
        "views": {"a": shared, "b": shared[2:], "c": shared.view(2, 3).T, "d": shared.to(torch.float8_e4m3fn)},
        "odd": [parameter, torch.sparse_coo_tensor([[0]], [1.0], (2,), check_invariants=True), {1, 2.5}, (None, b"x")],
        "tensor": torch.ones(2, dtype=torch.complex64).conj(),
        "method": nn.Linear(1, 1).state_dict,
    }


def without_checksums(data: bytes) -> bytes:
    """The archive with no record compressed and every CRC-32 zero, which means "not recorded"."""
    data = stored(data)
    raw = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.start_dir
        for info in archive.infolist():
            raw[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
    position = start
    while raw[position : position + 4] == b"PK\1\2":
        raw[position + 16 : position + 20] = bytes(4)
        position += 46 + sum(struct.unpack_from("<HHH", raw, position + 28))
    return bytes(raw)


def _zip(name: str, value: Any, **options: Any) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return name, buffer.getvalue()


def torch_zip() -> Seeds:
    for name, value in objects().items():
        name, data = _zip(name, value)
        yield name, without_checksums(data)


def pickles() -> Seeds:
    for protocol in range(6):
        yield f"plain{protocol}", pickle.dumps({"a": [1, -(2**70), 1.5, None, True], "b": ("x", b"y", {3})}, protocol)
        yield f"ordered{protocol}", pickle.dumps(OrderedDict(a=1), protocol)
    for name, value in objects().items():
        for protocol in (2, 4):
            _, data = _zip(name, value, pickle_protocol=protocol)
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                inner = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
                yield f"{name}{protocol}", archive.read(inner)


def legacy() -> Seeds:
    for name, value in objects().items():
        yield _zip(name, value, _use_new_zipfile_serialization=False)
    yield _zip("protocol4", torch.ones(2), _use_new_zipfile_serialization=False, pickle_protocol=4)


def plain_pickles() -> Seeds:
    for protocol in range(6):
        yield f"protocol{protocol}", pickle.dumps({"w": torch.ones(2), "epoch": 3}, protocol)
    yield "large", pickle.dumps([torch.arange(20_000)])


def tar() -> Seeds:
    """By hand: nothing has written this container since 2017 (``torch/serialization.py``, ``legacy_load``)."""

    def dumps(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, 2) for value in values)

    class Reference:
        def __init__(self, key: int) -> None:
            self.key = key

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return str(value.key) if isinstance(value, Reference) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"weight": Reference(1), "bias": Reference(2)})
    storages = dumps(1, (10, "cpu", torch.FloatStorage)) + struct.pack("<q6f", 6, *range(6)) + dumps([])
    tensors = dumps(2)
    tensors += dumps((1, 10, torch.FloatTensor)) + struct.pack("<iiqqqqq", 2, 0, 2, 3, 3, 1, 0)
    tensors += dumps((2, 10, torch.FloatTensor)) + struct.pack("<iiqqq", 1, 0, 2, 1, 4)
    facts = {"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    members = {"sys_info": dumps(facts), "pickle": buffer.getvalue(), "tensors": tensors, "storages": storages}
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        output = io.BytesIO()
        with tarfile.open(fileobj=output, mode="w", format=tar_format) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        yield f"tar{tar_format}", output.getvalue()[: 512 * (sum(2 + len(d) // 512 for d in members.values()) + 4)]


def torchscript() -> Seeds:
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).eval()
    for name, script in {
        "scripted": torch.jit.script(model),
        "traced": torch.jit.trace(model, torch.ones(1, 2)),
        "frozen": torch.jit.freeze(torch.jit.script(model)),
    }.items():
        buffer = io.BytesIO()
        torch.jit.save(script, buffer)
        yield name, without_checksums(buffer.getvalue())
    yield "mobile", without_checksums(torch.jit.script(model)._save_to_buffer_for_lite_interpreter())


def stored(data: bytes) -> bytes:
    """The archive with no record compressed."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(output, "w") as target:
        for info in source.infolist():
            if "debug_pkl" not in info.filename:
                target.writestr(info.filename, source.read(info))
    return output.getvalue()


def packages() -> Seeds:
    from torch.package import PackageExporter

    buffer = io.BytesIO()
    with PackageExporter(buffer) as exporter:
        exporter.save_pickle("model", "weights.pkl", {"w": torch.ones(2)})
        exporter.save_text("model", "note.txt", "x")
    yield "package", without_checksums(buffer.getvalue())


def exports() -> Seeds:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 1), (torch.ones(1, 2),)), buffer)
    yield "export", without_checksums(buffer.getvalue())


def headers() -> Seeds:
    state = {"a": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(0)}
    yield "plain", save(state)
    yield "metadata", save(state, metadata={"format": "pt", "d": "a"})


def indexes() -> Seeds:
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    yield "index", json.dumps({"metadata": {"total_size": 16}, "weight_map": names}).encode()
    yield "other", json.dumps({"weight_map": {**names, "c": "three.bin", "d": "../one.safetensors"}}).encode()


def first_bytes() -> Seeds:
    for number, data in enumerate(
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n",
         b"<!DOCTYPE html><title>x",
         b"\x1f\x8b\x08", b"\x08\x08\x12\x07pytorch\x1a\x01x", b"GGUF\3\0\0\0", b"\x93NUMPY\1\0v\0{'descr': '<f4'}",
         b"\x89HDF\r\n\x1a\n", b"TFL3", b"\0\0\0\0ET12", b"\xff\xfea\0b\0", b'{"error": "x"}', b"a,b\n1,2\n", bytes(64))
    ):  # fmt: skip
        yield str(number), data


SEEDS = {
    "pickle": pickles,
    "torch-zip": torch_zip,
    "torch-zip-pickle": pickles,
    "torch-legacy": legacy,
    "plain-pickle": plain_pickles,
    "torch-tar": tar,
    "torchscript": torchscript,
    "torch-package": packages,
    "pt2": exports,
    "safetensors": headers,
    "sharded": indexes,
    "first-bytes": first_bytes,
}
"""From each target of `run` to its seeds."""


def main(folder: Path) -> None:
    """Write all seeds."""
    for target, make in SEEDS.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in make():
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and in many places
        main(Path(sys.argv[1]))
