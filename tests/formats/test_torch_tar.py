"""torch-tar: archives as torch 0.1 wrote them, which today's torch still reads."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import Conformance, tensor

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnknownFormatError, UnsupportedError
from ckptkit.formats import torch_tar
from ckptkit.limits import Limits
from ckptkit.pickling.inert import walk

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]

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
    data = bytes(values.contiguous().view(torch.uint8).reshape(-1).tolist()) if values.numel() else b""
    return dumped((key, location, cls)) + struct.pack("<q", values.numel()) + data


def geometry(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    numbers = (*shape, *stride, offset)
    return struct.pack("<i", len(shape)) + GARBAGE + struct.pack(f"<{len(numbers)}q", *numbers)


def record(key: object, storage_key: object, *where: Any) -> bytes:
    return dumped((key, storage_key, torch.FloatTensor)) + geometry(*where)


def archive(members: dict[str, bytes] | list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=format) as tar:
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


def opened(data: bytes, tmp_path: Path) -> Checkpoint:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    return formats.read(path)[0]


def by_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=False)


class TestConformance(Conformance):
    """torch-tar does what every container does."""

    reads = "torch-tar"
    step = 61

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        """As torch 0.1 wrote it."""
        obj = OrderedDict((name, Pid(str(key))) for key, name in enumerate(state))
        tensors = [
            record(key, 1000 + key, tuple(value.shape), value.stride()) for key, value in enumerate(state.values())
        ]
        storages = [storage(1000 + key, value) for key, value in enumerate(state.values())]
        path = folder / "model.pt"
        path.write_bytes(archive(members(obj, tensors, storages)))
        assert list(by_torch(path)) == list(state)
        return path


# What is read.


def test_views_ties_and_geometry(tmp_path: Path, same_bits: SameBits) -> None:
    checkpoint = opened(archive(members()), tmp_path)
    assert (checkpoint.origin.format_version, checkpoint.origin.writer) == ("1000", "torch 0.1, before 0.1.10")
    assert checkpoint.origin.pickle_protocol == 2
    assert [finding.code for finding in checkpoint.findings] == ["no-checksums"]
    found = checkpoint.state_dict
    for name, value in by_torch(tmp_path / "model.pt").items():
        assert same_bits(tensor(found[name]), value)
        assert found[name].stride == value.stride()
    assert found["w"].view == found["tied"].view
    assert found["w"].storage is found["t"].storage


def test_views_of_storages_and_bare_storages(tmp_path: Path, same_bits: SameBits) -> None:
    tensors = [record(1, 12, (2,), (1,)), record(2, 13, (1,), (1,), 1), record(3, 11, (6,), (1,))]
    obj = [Pid("1"), Pid("2"), Pid("3"), Pid("12")]
    data = archive(members(obj, tensors, views=[(12, 11, 1, 2), (13, 11, 4, 2)]))
    checkpoint = opened(data, tmp_path)
    expected = by_torch(tmp_path / "model.pt")
    entries = [node for node in walk(checkpoint.rest) if isinstance(node, TensorEntry)]
    assert [entry.storage_offset for entry in entries] == [1, 5, 0]
    assert len({id(entry.storage) for entry in entries}) == 1
    assert all(same_bits(tensor(entry), value) for entry, value in zip(entries, expected, strict=False))
    (view,) = [node for node in checkpoint.rest if not isinstance(node, TensorEntry)]  # type: ignore[attr-defined]
    assert view.source.read() == struct.pack("<2f", 1, 2)


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = [record(1, 11, (), ()), record(2, None, (), ()), record(3, 11, (0,), (1,))]
    obj = {"none": Pid("1"), "nowhere": Pid("2"), "empty": Pid("3")}
    checkpoint = opened(archive(members(obj, tensors, [storage(11, torch.zeros(0))])), tmp_path)
    assert [(name, entry.shape) for name, entry in checkpoint.state_dict.items()] == [
        ("none", (0,)), ("nowhere", (0,)), ("empty", (0,))]  # fmt: skip
    assert {entry.dtype for entry in checkpoint.state_dict.values()} == {"float32"}


class Linear(torch.nn.Linear):
    """A module as torch 0.1 pickled it: class with source, parameters that hold their gradients."""


class Old:
    """``Parameter()`` or ``Variable()`` with the state torch 0.1 gave it."""

    def __init__(self, cls: type, state: tuple[object, ...]) -> None:
        self.args = (cls, state)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        import copyreg

        return copyreg.__newobj__, (self.args[0],), self.args[1]  # type: ignore[attr-defined]

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """The pickler asks an object for the class that it makes anew."""
        return self.args[0]


def test_a_whole_model_with_gradients(tmp_path: Path, same_bits: SameBits) -> None:
    from torch.autograd.variable import Variable

    weight = Old(torch.nn.Parameter, (Pid("1"), Old(Variable, (Pid("2"), None, None, False, False)), None, True, False))
    bias = Old(torch.nn.Parameter, (Pid("3"), None, OrderedDict(), False, False))
    empty: OrderedDict[str, object] = OrderedDict()
    state = {"_parameters": OrderedDict(weight=weight, bias=bias), "_buffers": empty, "_modules": empty, "training": True}

    class Model:
        def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
            return Build(), (), state

    class Build:
        """The class, by its source."""

    class Sourced(Pickler):
        def persistent_id(self, obj: Any) -> object:
            return (torch.nn.Linear, "linear.py", "class Linear: ...") if type(obj) is Build else super().persistent_id(obj)

        def reducer_override(self, obj: Any) -> Any:
            return NotImplemented

    tensors = [record(1, 11, (2, 3), (3, 1)), record(2, 12, (2, 3), (3, 1)), record(3, 13, (2,), (1,))]
    storages = [storage(11, NUMBERS), storage(12, NUMBERS + 10), storage(13, torch.ones(2))]
    parts = members(None, tensors, storages)
    out = io.BytesIO()
    Sourced(out, 2).dump(Model())
    parts["pickle"] = out.getvalue()
    checkpoint = opened(archive(parts), tmp_path)
    assert checkpoint.origin.kind == "whole_model"
    found = checkpoint.state_dict
    assert list(found) == ["weight", "bias"]
    assert tensor(found["weight"]).equal(NUMBERS.reshape(2, 3))
    assert tensor(found["bias"]).equal(torch.ones(2))
    assert found["weight"].is_parameter
    assert (found["weight"].requires_grad, found["bias"].requires_grad) == (True, False)
    assert sorted(finding.code for finding in checkpoint.findings) == ["embedded-source", "no-checksums"]
    gradients = [node for node in walk(checkpoint.rest) if isinstance(node, TensorEntry) and node not in found.values()]
    assert not gradients
    ckptkit.convert(tmp_path / "model.pt", tmp_path / "new.pth")
    again = torch.load(tmp_path / "new.pth", weights_only=True)
    assert list(again) == ["weight", "bias"]
    assert again["weight"].equal(NUMBERS.reshape(2, 3))
