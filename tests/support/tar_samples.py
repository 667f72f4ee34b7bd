"""Archives as torch 0.1 wrote them, by hand."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from typing import Any

import torch

SYS_INFO = {"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
GARBAGE = b"\x7f\x01\x02\x03"
"""What stood beside the number of dimensions in memory, and was written along."""


class Pid:
    """Stands for a persistent id."""

    def __init__(self, pid: object) -> None:
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> object:
        return obj.pid if isinstance(obj, Pid) else None


def dumped(*values: object, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    for value in values:
        Pickler(out, protocol).dump(value)
    return out.getvalue()


def storage(key: object, values: torch.Tensor, location: str = "cpu") -> bytes:
    cls = getattr(torch, torch.storage._dtype_to_storage_type_map()[values.dtype])
    data = bytes(values.reshape(-1).view(torch.uint8).tolist()) if values.numel() else b""
    return dumped((key, location, cls)) + struct.pack("<q", values.numel()) + data


def geometry(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    numbers = (*shape, *stride, offset)
    return struct.pack("<i", len(shape)) + GARBAGE + struct.pack(f"<{len(numbers)}q", *numbers)


def record(key: object, storage_key: object, *where: Any) -> bytes:
    return dumped((key, storage_key, torch.FloatTensor)) + geometry(*where)


def archive(members: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1485049680.25  # type: ignore[assignment] # Python 3 writes a pax header for it
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


NUMBERS = torch.arange(6.0)


def members(
    obj: object = None,
    tensors: list[bytes] | None = None,
    storages: list[bytes] | None = None,
    views: object = (),
    info: object = SYS_INFO,
) -> dict[str, bytes]:
    """The members of an archive of one storage and three tensors over it, or of what is given."""
    if tensors is None:
        tensors = [record(1, 11, (2, 3), (3, 1)), record(2, 11, (3, 2), (1, 3)), record(3, 11, (2,), (2,), 1)]
    storages = [storage(11, NUMBERS)] if storages is None else storages
    obj = OrderedDict([("w", Pid("1")), ("t", Pid("2")), ("tied", Pid("1"))]) if obj is None else obj
    return {
        "sys_info": dumped(info),
        "pickle": dumped(obj),
        "tensors": dumped(len(tensors)) + b"".join(tensors),
        "storages": dumped(len(storages)) + b"".join(storages) + dumped(list(views)),  # type: ignore[call-overload]
    }
