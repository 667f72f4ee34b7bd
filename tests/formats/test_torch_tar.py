"""torch-tar: archives as torch 0.1 wrote them, which today's torch still reads."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import Conformance
from support.files import tensor_of
from support.tar_samples import NUMBERS, Pid, archive, dumped, members, record, storage

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnknownFormatError, UnsupportedError
from ckptkit.formats import torch_tar
from ckptkit.limits import Limits
from ckptkit.pickling.inert import walk

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


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
        data = archive(members(obj, tensors, storages))
        used = (len(data.rstrip(b"\0")) // 512 + 1) * 512
        path.write_bytes(data[: used + 1024])  # without the padding, of which any part may be missing
        assert list(by_torch(path)) == list(state)
        return path


# What is read.


def test_views_ties_and_geometry(tmp_path: Path, same_bits: SameBits) -> None:
    checkpoint = opened(archive(members()), tmp_path)
    assert (checkpoint.origin.format_version, checkpoint.origin.writer) == (
        "1000",
        "torch 0.1, of early 2017 or before",
    )
    assert checkpoint.origin.pickle_protocol == 2
    assert [finding.code for finding in checkpoint.findings] == ["no-checksums"]
    found = checkpoint.state_dict
    for name, value in by_torch(tmp_path / "model.pt").items():
        assert same_bits(tensor_of(found[name]), value)
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
    assert all(same_bits(tensor_of(entry), value) for entry, value in zip(entries, expected, strict=False))
    (view,) = [node for node in checkpoint.rest if not isinstance(node, TensorEntry)]  # type: ignore[attr-defined]
    assert view.source.read() == struct.pack("<2f", 1, 2)


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = [record(1, 11, (), ()), record(2, None, (), ()), record(3, 11, (0,), (1,))]
    obj = {"none": Pid("1"), "nowhere": Pid("2"), "empty": Pid("3")}
    checkpoint = opened(archive(members(obj, tensors, [storage(11, torch.zeros(0))])), tmp_path)
    assert [(name, entry.shape) for name, entry in checkpoint.state_dict.items()] == [
        ("none", (0,)), ("nowhere", (0,)), ("empty", (0,))]  # fmt: skip
    assert {entry.dtype for entry in checkpoint.state_dict.values()} == {"float32"}


PARAMETER, VARIABLE = b"ctorch.nn.parameter\nParameter\n", b"ctorch.autograd.variable\nVariable\n"
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
LINEAR = b"(ctorch.nn.modules.linear\nLinear\nU\x09linear.pyU\x11class Linear: ...tQ"


def text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def variable(cls: bytes, key: str, gradient: bytes = b"N", requires_grad: bool = True) -> bytes:
    """``cls()`` and the state that torch 0.1 gave it."""
    return cls + b")\x81(" + text(key) + b"Q" + gradient + b"N" + (b"\x88" if requires_grad else b"\x89") + b"\x89tb"


def linear(weight: bytes, bias: bytes) -> bytes:
    """The pickle of a module with its source."""
    parameters = ORDERED_DICT + b"(" + text("weight") + weight + text("bias") + bias + b"u"
    others = b"".join(text(name) + ORDERED_DICT for name in ("_buffers", "_modules", "_backward_hooks"))
    return b"\x80\x02" + LINEAR + b")\x81}(" + text("_parameters") + parameters + others + b"ub."


def test_a_whole_model_with_gradients(tmp_path: Path, same_bits: SameBits) -> None:
    weight = variable(PARAMETER, "1", variable(VARIABLE, "2", requires_grad=False))
    tensors = [record(1, 11, (2, 3), (3, 1)), record(2, 12, (2, 3), (3, 1)), record(3, 13, (2,), (1,))]
    storages = [storage(11, NUMBERS), storage(12, NUMBERS + 10), storage(13, torch.ones(2))]
    parts = members(None, tensors, storages)
    parts["pickle"] = linear(weight, variable(PARAMETER, "3", requires_grad=False))
    checkpoint = opened(archive(parts), tmp_path)
    assert checkpoint.origin.kind == "whole_model"
    found = checkpoint.state_dict
    expected = by_torch(tmp_path / "model.pt")
    assert isinstance(expected, torch.nn.Linear)
    assert list(found) == ["weight", "bias"]
    for name, value in expected._parameters.items():
        assert value is not None
        assert same_bits(tensor_of(found[name]), value)
        assert (found[name].is_parameter, found[name].requires_grad) == (True, value.requires_grad)
    assert sorted(finding.code for finding in checkpoint.findings) == ["embedded-source", "no-checksums"]
    assert expected.weight.requires_grad
    assert [tensor_of(entry).reshape(-1)[0].item() for entry in gradients(checkpoint.module)] == [10]
    ckptkit.convert(tmp_path / "model.pt", tmp_path / "new.pth")
    again = torch.load(tmp_path / "new.pth", weights_only=True)
    assert {name: value.tolist() for name, value in again.items()} == {
        "weight": [[0, 1, 2], [3, 4, 5]], "bias": [1, 1]}  # fmt: skip


def gradients(tree: object) -> list[TensorEntry]:
    """What the parameters in a tree carry along."""
    parameters = [node for node in walk(tree) if isinstance(node, TensorEntry) and node.attributes is not None]
    return [entry.attributes["grad"] for entry in parameters]  # type: ignore[index]


# What is refused.


def changed(**parts: bytes) -> bytes:
    return archive({**members(), **parts})


def with_pickle(obj: object) -> bytes:
    return archive(members(obj))


def linked() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as tar:
        for name, data in members().items():
            info = tarfile.TarInfo(name)
            if name == "storages":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if info.size else None)
    return out.getvalue()


def renamed_by_pax() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members().items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), {"path": "other"} if name == "sys_info" else {}
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


ITEMS = list(members().items())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (archive({"model/": b"", "model/weights.bin": b"x"}), UnknownFormatError, "begins with 'model/', 'model/w"),
        (archive(ITEMS[:2] + ITEMS[3:]), UnknownFormatError, "a tar archive that is not a checkpoint.*'sys_info'"),
        (archive([(f"./{name}", data) for name, data in ITEMS]), UnknownFormatError, "begins with './sys_info'"),
        (archive([("x" * 300, b""), *ITEMS]), AmbiguousError, "each once, as files; found 'xxx.*.type 'x'."),
        (archive([*ITEMS, ("extra", b"")]), AmbiguousError, "each once, as files; found .*'extra' .type '0'"),
        (archive([*ITEMS, ITEMS[3]]), AmbiguousError, "each once, as files; found .*'storages'.*'storages'"),
        (archive([*ITEMS, *[("x", b"")] * 9]), AmbiguousError, "each once, as files"),
        (linked(), AmbiguousError, "'storages' .type '2'"),
        (renamed_by_pax(), AmbiguousError, "each once, as files; found 'sys_info' .type 'x'."),
        (changed()[:1600], CorruptError, "truncated: the file has 1,600 bytes"),
        (changed() + b"\x01", AmbiguousError, "follow the archive's last member and are not padding"),
        (changed() + archive({"a": b""}), AmbiguousError, "follow the archive's last member and are not padding"),
        (changed() + bytes(2 << 20), AmbiguousError, "follow the archive's last member and are not padding"),
        (archive(members(info=[])), UnsupportedError, "sys_info: only protocol version 1000"),
        (archive(members(info={"protocol_version": 1001})), UnsupportedError, "only protocol version 1000"),
        (changed(sys_info=dumped(print)), CorruptError, "not the names __builtin__.print"),
        (changed(sys_info=dumped({}) + b"."), CorruptError, "sys_info, byte 6: 1 byte follows"),
        (changed(tensors=dumped("3")), CorruptError, "tensors: a number of records is expected"),
        (changed(tensors=dumped(2)), CorruptError, "tensors, record 0"),
        (changed(tensors=dumped(10**9)), LimitError, "tensors: records: 1,000,000,000 is over"),
        (changed(tensors=dumped(0, 1)), CorruptError, "tensors, byte 5: 5 bytes follow"),
        (archive(members(tensors=[dumped((1, torch.FloatTensor, 11))])), UnsupportedError, "not .key, storage's key"),
        (archive(members(tensors=[dumped((1, "11", torch.FloatTensor))])), UnsupportedError, "storage has no key"),
        (
            archive(members(tensors=[record(1, 12, (1,), (1,))])),
            CorruptError,
            "tensors: storage 12 is named but does not",
        ),
        (archive(members(tensors=[record(1, 11, (7,), (1,))])), CorruptError, "reach to byte 28 of a storage of 24"),
        (
            archive(members(tensors=[record(1, 11, (1,), (-1,))])),
            CorruptError,
            "tensors, record 0, byte .*: a count of -1",
        ),
        (archive(members(tensors=[record(1, 11, (1,) * 65, (1,) * 65)])), CorruptError, "65 dimensions"),
        (archive(members(tensors=[record(1, 11, (1,), (1,))] * 2)), AmbiguousError, "key 1 is given to two"),
        (archive(members(tensors=[record(11, 11, (1,), (1,))])), AmbiguousError, "key 11 is given to two"),
        (archive(members(storages=[storage(11, NUMBERS)] * 2)), AmbiguousError, "storages, record 1: the key 11"),
        (archive(members(storages=[storage("11", NUMBERS)])), UnsupportedError, "not .key, location, class"),
        (archive(members(storages=[dumped((11, torch.FloatStorage))])), UnsupportedError, "before torch 0.1 was"),
        (archive(members(storages=[dumped((11, "cpu", print))])), CorruptError, "8 bytes are declared"),
        (
            archive(members(storages=[dumped((11, "cpu", print)) + bytes(8)])),
            UnsupportedError,
            "class __builtin__.print",
        ),
        (
            changed(storages=dumped(1) + storage(11, NUMBERS)[:-1]),
            CorruptError,
            "24 bytes are declared, but only 23 are left",
        ),
        (changed(storages=dumped(1) + storage(11, NUMBERS) + dumped(())), CorruptError, "a list of views is expected"),
        (archive(members(views=[(12, 11, 1)])), CorruptError, "a view that is not .key, storage's key, offset, size"),
        (archive(members(views=[(12, 11, 1, -1)])), CorruptError, "a view that is not"),
        (archive(members(views=[(12, 11, 4, 3)])), CorruptError, "view '12' of elements 4 to 7 is not inside"),
        (archive(members(views=[(12, 13, 0, 1)])), CorruptError, "storages: storage 13 is named but does not exist"),
        (archive(members(views=[(11, 11, 0, 1)])), AmbiguousError, "also named as something else"),
        (with_pickle(Pid("4")), CorruptError, "pickle, byte .*names a tensor or storage 4 that does not exist"),
        (with_pickle(Pid("x")), UnsupportedError, "neither a key nor a class"),
        (with_pickle(Pid("1" * 30)), UnsupportedError, "neither a key nor a class"),
        (with_pickle(Pid((print, 1, 2))), CorruptError, "whose file or source is not text"),
        (changed(pickle=dumped([], [])), CorruptError, "pickle, byte 6: 6 bytes follow"),
    ],
)
def test_refusals(data: bytes, error: type[FormatError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words) as caught:
        opened(data, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "model.pt"))


def test_a_truncated_archive_is_told_what_is_whole(tmp_path: Path) -> None:
    tensors = [record(1, 11, (6,), (1,)), record(2, 12, (6,), (1,)), record(3, 11, (1,), (1,))]
    data = archive(members(None, tensors, [storage(11, NUMBERS), storage(12, NUMBERS)]))
    end = data.rindex(NUMBERS.numpy().tobytes())
    with pytest.raises(CorruptError, match=r"missing.; 1 of 2 storages is complete, 2 of 3 tensors are whole"):
        opened(data[: end + 3], tmp_path)
    with pytest.raises(CorruptError, match="truncated: the archive's end is missing"):
        opened(data[: (end // 512 + 1) * 512], tmp_path)


def test_names_are_reported_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        opened(archive(members([print, Pid("4")], [record(1, 11, (1,), (1,))])), tmp_path)
    assert [(use.name, use.where) for use in caught.value.globals][:2] == [
        ("torch.FloatTensor", ("tensors",)), ("torch.FloatStorage", ("storages",))]  # fmt: skip
    assert "__builtin__.print" in [use.name for use in caught.value.globals]


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(archive(members()))
    file = SourceFile(path)
    with pytest.raises(LimitError, match="records"):
        torch_tar.read(formats.Probe(file, Limits(entries=2)))
    file.close()
