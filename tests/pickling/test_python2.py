"""Files that Python 2 saved: its strings, its names, and what becomes of them in another file."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.files import MAGIC, PROTOCOL, Call, Pid

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import TensorEntry
from ckptkit.pickling.inert import Object, mapping_items
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.tensors import StorageTable
from ckptkit.pickling.writer import write_pickle
from ckptkit.transfer.values import stream


class Python2(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes what Python 2's pickler writes: byte strings where Python 3 has text, longs with their L."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def persistent_id(self, obj: Any) -> object:
        return obj.pid if isinstance(obj, Pid) else None

    def save_text(self, obj: str) -> None:
        self.save_string(obj.encode(), obj)

    def save_bytes(self, obj: bytes) -> None:
        self.save_string(obj, obj)

    def save_string(self, raw: bytes, remembered: object) -> None:
        if not self.bin:
            self.write(b"S" + repr(raw)[1:].encode() + b"\n")
        elif len(raw) < 256:
            self.write(b"U" + bytes([len(raw)]) + raw)
        else:
            self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(remembered)

    dispatch[str] = save_text
    dispatch[bytes] = save_bytes


def dumped(obj: object, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    Python2(out, protocol).dump(obj)
    return out.getvalue()


def storage(key: str, numel: int) -> Pid:
    return Pid("storage", torch.FloatStorage, key, "cuda:1", numel, None)


def v2(key: str, *shape: int) -> Call:
    stride = torch.empty(shape).stride()
    return Call(torch._utils._rebuild_tensor_v2, storage(key, 4), 0, shape, stride, False, OrderedDict())


def saved(obj: object, path: Path, keys: list[str], protocol: int = 2) -> Path:
    """A file of storages of four numbers, the first its place in the file."""
    data = [dumped(part, protocol) for part in (MAGIC, PROTOCOL, {"little_endian": True}, obj, keys)]
    data += [struct.pack("<q4f", 4, number, 1.5, 2.5, 3.5) for number in range(len(keys))]
    path.write_bytes(b"".join(data))
    return path


def values(entry: object) -> list[float]:
    assert isinstance(entry, TensorEntry)
    return list(struct.unpack(f"<{entry.numel}f", b"".join(stream(entry))))


# Whole files.


def test_a_state_dict(tmp_path: Path) -> None:
    long_name = "layer." + "x" * 300  # over 255 bytes, where Python 2 changes the opcode
    state = OrderedDict([("conv.weight", v2("1", 2, 2)), ("straße", v2("2", 4)), (long_name, v2("2", 2))])
    path = saved(state, tmp_path / "old.pt", ["1", "2"])
    checkpoint, file = formats.read(path)
    assert list(checkpoint.state_dict) == ["conv.weight", "straße", long_name]
    assert all(type(name) is str for name in checkpoint.state_dict)
    expected = torch.load(path, map_location="cpu", weights_only=False)
    assert list(expected) == list(checkpoint.state_dict)
    for name, value in expected.items():
        assert values(checkpoint.state_dict[name]) == value.reshape(-1).tolist()
    assert {entry.location for entry in checkpoint.state_dict.values()} == {"cuda:1"}
    file.close()


def test_a_converted_one_loads_as_safely_as_the_old(tmp_path: Path) -> None:
    path = saved({"w": v2("1", 4), "epoch": 3, "note": "text"}, tmp_path / "old.pt", ["1"])
    old = torch.load(path, map_location="cpu", weights_only=True)
    ckptkit.convert(path, tmp_path / "new.pth")
    new = torch.load(tmp_path / "new.pth", map_location="cpu", weights_only=True)
    assert list(new) == list(old) == ["w", "epoch", "note"]
    assert new["w"].equal(old["w"])
    assert (new["epoch"], new["note"]) == (3, "text")


def test_pairs_as_an_argument_of_the_dict(tmp_path: Path) -> None:
    state = Call(OrderedDict, [["a", v2("1", 4)], ["b", v2("2", 2)]])
    path = saved(state, tmp_path / "old.pt", ["1", "2"])
    ckptkit.convert(path, tmp_path / "new.pth")
    new = torch.load(tmp_path / "new.pth", map_location="cpu", weights_only=True)
    assert [(name, value.tolist()) for name, value in new.items()] == [("a", [0, 1.5, 2.5, 3.5]), ("b", [1, 1.5])]


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_pickles_before_protocol_2(protocol: int, tmp_path: Path) -> None:
    # Protocol 0 has no opcode for torch's persistent ids: only a file without tensors can be of it.
    obj: object = {"lr": 0.5, "names": ["a", "b"], "big": 1 << 70} if protocol == 0 else {"w": v2("1", 4), "ok": True}
    path = saved(obj, tmp_path / "old.pt", [] if protocol == 0 else ["1"], protocol)
    checkpoint, file = formats.read(path)
    assert checkpoint.origin.pickle_protocol == 0
    expected = torch.load(path, map_location="cpu", weights_only=False)
    if protocol:
        assert values(checkpoint.state_dict["w"]) == expected["w"].tolist()
    else:
        assert dict(mapping_items(checkpoint.rest)[:1]) == {"lr": expected["lr"]}  # type: ignore[index]
    file.close()
    ckptkit.convert(path, tmp_path / "new.pth")
    again = torch.load(tmp_path / "new.pth", map_location="cpu", weights_only=True)
    assert list(again) == list(expected)


def test_arrays_whose_bytes_are_no_text_survive(tmp_path: Path) -> None:
    raw = np.array([1.5, -2.25e300, 7.0])
    array = Call(np.ones(1).__reduce__()[0], np.ndarray, (0,), "b")
    dtype = Call(np.dtype, "f8", 0, 1)

    class Array(Call):
        def __reduce__(self) -> tuple[Any, ...]:
            return (*array.call, (1, (3,), dtype, False, raw.tobytes()))

    path = saved({"w": v2("1", 4), "mean": Array(None)}, tmp_path / "old.pt", ["1"])
    checkpoint, file = formats.read(path)
    mean = checkpoint.state_dict.extra.get("mean")
    if mean is None:
        mean = dict(mapping_items(checkpoint.rest) or [])["mean"]
    assert isinstance(mean, Object)
    assert isinstance(mean.state, tuple)
    assert mean.state[4] == raw.tobytes()
    file.close()
    ckptkit.convert(path, tmp_path / "new.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy on its own dtype's old spelling
        again = torch.load(tmp_path / "new.pth", map_location="cpu", weights_only=False)
    assert again["mean"].tobytes() == raw.tobytes()


# Bytes in a pickle.


def tree(data: bytes) -> object:
    table = StorageTable(lambda key, nbytes: (None, None))  # type: ignore[arg-type, return-value]
    return read_pickle(data, constructors=table.constructors).root


def through(root: object, protocol: int) -> bytes:
    return write_pickle(root, lower=lambda node: node, protocol=protocol)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_string_is_text_where_it_is_one_and_bytes_where_not(protocol: int) -> None:
    texts = [b"", b"plain", "naïve".encode(), b'it\'s "quoted"\\\n\r\t', b"x" * 300]
    others = [b"\xff", b"\x80\x02\x00", bytes(range(256)), b"\xed\xa0\x80"]
    assert tree(dumped(texts + others, protocol)) == [text.decode() for text in texts] + others


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bytes_are_bytes_however_python_3_pickled_them(protocol: int) -> None:
    value = [b"\xff\x00", b"abc", bytes(range(256)) * 3]
    assert tree(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bytes_are_written_as_they_are_read_again(protocol: int) -> None:
    root = [b"", b"\xff", {"raw": bytes(range(256))}["raw"], bytearray(b"x") if protocol == 5 else None]
    data = through(root, protocol)
    assert tree(data) == root == pickle.loads(data)


@pytest.mark.parametrize(
    "call",
    [
        b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.",  # not in latin-1
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.",
        b"c_codecs\nencode\nK\x01X\x06\x00\x00\x00latin1\x86R.",
        b"c_codecs\nencode\nX\x01\x00\x00\x00a\x85R.",
    ],
)
def test_other_encodings_stay_calls(call: bytes) -> None:
    root = tree(b"\x80\x02" + call)
    assert isinstance(root, Object)
    assert root.class_name == "_codecs.encode"


def test_one_text_is_encoded_once() -> None:
    text = pickle.dumps("é" * 1000, 2)[2:-1]
    call = b"c_codecs\nencode\nq\x05" + text + b"q\x06X\x06\x00\x00\x00latin1q\x07\x86R"
    root = tree(b"\x80\x02](" + call + b"h\x05h\x06h\x07\x86R" * 1000 + b"e.")
    assert isinstance(root, list)
    assert len(root) == 1001
    assert len({id(value) for value in root}) == 1
