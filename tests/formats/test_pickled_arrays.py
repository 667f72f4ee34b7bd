"""numpy's arrays in pickles are tensors where there is no torch tensor: of pickle.dump, joblib.dump and torch.save."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CkptkitError, CorruptError, FormatError, LimitError, UnknownFormatError, UnsupportedError
from ckptkit.formats.plain_pickle import read
from ckptkit.limits import Limits
from ckptkit.pickling.inert import walk

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]

PICKLERS: dict[str, Callable[[object, int], bytes]] = {"C": pickle.dumps, "Python": pickle._dumps}  # type: ignore[attr-defined]


def arrays() -> dict[str, Any]:
    """Of every kind; ``large`` has more bytes than are read at once, ``long`` more than lie in a frame."""
    draw = np.random.default_rng(0).standard_normal
    return {
        "conv.weight": draw((3, 4)).astype("f4"), "large": draw((200, 170)), "bool": draw(5) > 0,
        "fortran": np.asfortranarray(draw((5, 7, 3))), "half": draw(300).astype("f2"), "scalar": np.array(3.0),
        "complex": draw(9).astype("c8"), "empty": np.zeros((0, 3), "f4"), "long": np.arange(70_000).astype("i1"),
        "wide": np.arange(5, dtype="u2"), "count": np.arange(9),
    }  # fmt: skip


def swapped() -> dict[str, Any]:
    draw = np.random.default_rng(1).standard_normal
    return {
        "a": draw((3, 4)).astype(">f4"),
        "b": (draw(5) + 1j * draw(5)).astype(">c8"),
        "c": np.arange(3, dtype=">i2"),
    }


def as_tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def put(folder: Path, data: bytes, name: str = "model.pkl") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def bits_of(found: Any, wanted: dict[str, Any], same_bits: SameBits) -> bool:
    return set(found) == set(wanted) and all(same_bits(found[name], as_tensor(wanted[name])) for name in wanted)


SHAPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a dict": lambda values: values,
    "detectron2": lambda values: {"model": values, "__author__": "Caffe2", "matching_heuristics": True},
    "caffe2": lambda values: {"blobs": values, "cfg": "MODEL: x"},
}


@pytest.mark.parametrize(
    ("protocol", "pickler", "shape"),
    [
        pytest.param(protocol, pickler, shape, marks=[pytest.mark.thorough] * (number != protocol % 3))
        for protocol, pickler, (number, shape) in itertools.product(range(6), PICKLERS, enumerate(SHAPES))
    ],
)
def test_they_are_the_tensors_that_numpy_gives(
    protocol: int, pickler: str, shape: str, tmp_path: Path, same_bits: SameBits
) -> None:
    path = put(tmp_path, PICKLERS[pickler](SHAPES[shape](arrays()), protocol))
    with ckptkit.open(path) as file:
        assert (file.format, file.trust) == ("pickle", "needs_trust")
        assert "arrays-as-tensors" in {finding.code for finding in file.findings}
    assert list(ckptkit.load_state_dict(path)) == list(arrays())
    assert bits_of(ckptkit.load_state_dict(path), arrays(), same_bits)
    ckptkit.convert(path, tmp_path / "m.safetensors", weights_only=True)
    assert bits_of(load_file(tmp_path / "m.safetensors"), arrays(), same_bits)
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=True)
    inside = whole if shape == "a dict" else whole["model" if shape == "detectron2" else "blobs"]
    assert bits_of(inside, arrays(), same_bits)
    assert ckptkit.diff(path, tmp_path / "m.pth").equal
    assert ckptkit.check(path, max_trust="needs_trust", no_nan=True).ok
    assert shape == "a dict" or (whole.get("__author__") or whole.get("cfg")) in ("Caffe2", "MODEL: x")


@pytest.mark.parametrize("protocol", range(6))
def test_big_endian_ones(protocol: int, tmp_path: Path, same_bits: SameBits) -> None:
    path = put(tmp_path, pickle.dumps(swapped(), protocol))
    assert bits_of(ckptkit.load_state_dict(path), swapped(), same_bits)
    for name in ("m.pth", "m.safetensors"):
        ckptkit.convert(path, tmp_path / name)
        assert bits_of(ckptkit.load_state_dict(tmp_path / name), swapped(), same_bits)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("protocol", range(5))
def test_names_of_numpy_1_and_2(module: str, protocol: int, tmp_path: Path, same_bits: SameBits) -> None:
    other = "numpy._core.multiarray" if module == "numpy.core.multiarray" else "numpy.core.multiarray"
    data = pickle._dumps(arrays(), protocol)  # type: ignore[attr-defined]
    if protocol < 4:  # a name has no length before it
        data = data.replace(f"c{other}\n".encode(), f"c{module}\n".encode())
        assert module.encode() in data
    assert bits_of(ckptkit.load_state_dict(put(tmp_path, data)), arrays(), same_bits)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_their_bytes_stay_where_they_lie(protocol: int, tmp_path: Path) -> None:
    path = put(tmp_path, pickle.dumps({"m": arrays()}, protocol))
    checkpoint, file = formats.read(path)
    data = path.read_bytes()
    for name, value in arrays().items():
        entry = checkpoint.state_dict[name]
        source = entry.storage.source
        assert source.file is file
        order = "F" if name == "fortran" else "C"
        assert data[source.offset : source.offset + source.nbytes] == value.tobytes(order)  # type: ignore[union-attr]
        assert entry.stride == tuple(step // value.itemsize for step in value.strides) or not value.size
    file.close()


def test_one_array_under_two_names_is_tied(tmp_path: Path) -> None:
    one = np.ones(3)
    found = ckptkit.load_state_dict(put(tmp_path, pickle.dumps({"a": one, "b": one})))
    assert found["a"].data_ptr() == found["b"].data_ptr()


def test_dicts_in_dicts(save: Any, tmp_path: Path) -> None:
    tree = {"params": {"dense": {"kernel": np.ones((2, 3), "f4"), "bias": np.zeros(3, "f4")}, "out": {"w": np.ones(1)}}}
    for path in (put(tmp_path, pickle.dumps(tree)), save(tree)):
        assert list(ckptkit.load_state_dict(path)) == ["dense.kernel", "dense.bias", "out.w"]
        ckptkit.convert(path, tmp_path / "m.pth", force=True)
        whole = torch.load(tmp_path / "m.pth", weights_only=True)
        assert torch.equal(whole["params"]["dense"]["kernel"], torch.ones(2, 3))


def test_lists_of_arrays_and_nothing_else(tmp_path: Path) -> None:
    for value in ([np.ones(2), np.zeros((2, 2))], (np.ones(1), {3: np.ones(2)}), {0: np.ones(2)}):
        with ckptkit.open(put(tmp_path, pickle.dumps(value))) as file:
            assert file.kind == "collection"
            assert {row["form"] for row in ckptkit.inspect(file.path)["tensors"] if "form" in row} == set()
        ckptkit.convert(tmp_path / "model.pkl", tmp_path / "m.pth", force=True)
        assert torch.equal(next(iter(_leaves(torch.load(tmp_path / "m.pth")))), as_tensor(next(iter(_leaves(value)))))


def _leaves(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (list, tuple)) else [value]


class Table:
    def __init__(self) -> None:
        self.values, self.names = np.ones((2, 2)), ["a", "b"]


@pytest.mark.parametrize(
    "value",
    [
        np.ones(2),
        {"lr": np.float64(0.1), "x": 3},
        Table(),
        {"table": Table(), "n": 3},
        {"a": np.ones(2), "b": 1, "c": 2},
        {"a": np.array(["x", "y"])},
        {"a": np.array([object], object)},
        {"a": np.zeros(2, [("x", "f4"), ("y", "i4")])},
        {"a": np.ma.masked_array([1.0], [True])},
        {"a": np.array(["2020-01-01"], "M8[D]")},
        {"a": np.ones(2, np.longdouble)},
        [np.ones(2), "text"],
    ],
)
def test_what_is_no_checkpoint_still_is_none(value: object, tmp_path: Path) -> None:
    for protocol in range(6):
        with pytest.raises(UnknownFormatError, match=r"a Python pickle .*, but not written by torch.save"):
            formats.read(put(tmp_path, pickle.dumps(value, protocol)))


def test_others_among_them_stay_arrays(tmp_path: Path) -> None:
    values = {"w": np.ones((2, 3), "f4"), "b": np.ones(3), "names": np.array(["x"]), "n": 3}
    path = put(tmp_path, pickle.dumps(values))
    with ckptkit.open(path) as file:
        assert list(file.state_dict) == ["w", "b"]
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=False)
    assert whole["names"] == values["names"] and torch.equal(whole["w"], torch.ones(2, 3)) and whole["n"] == 3


@pytest.mark.parametrize("protocol", range(6))
def test_among_torch_tensors_they_stay_arrays(protocol: int, tmp_path: Path, save: Any) -> None:
    value = {"model": {"w": torch.ones(2)}, "stats": {"mean": np.ones(300), "order": np.zeros(2, ">f4")}}
    for path in (put(tmp_path, pickle.dumps(value, protocol)), save(value)):
        with ckptkit.open(path) as file:
            assert list(file.state_dict) == ["w"] and "arrays-as-tensors" not in {f.code for f in file.findings}
        ckptkit.convert(path, tmp_path / "m.pth", force=True)
        whole = torch.load(tmp_path / "m.pth", weights_only=False)
        assert np.array_equal(whole["stats"]["mean"], np.ones(300)) and torch.equal(whole["model"]["w"], torch.ones(2))


def test_in_other_containers(save: Any, tmp_path: Path, same_bits: SameBits) -> None:
    legacy = tmp_path / "old.pth"
    torch.save({"net": arrays()}, legacy, _use_new_zipfile_serialization=False)
    for path in (save({"net": arrays()}), legacy):
        assert bits_of(ckptkit.load_state_dict(path), arrays(), same_bits)
        ckptkit.convert(path, tmp_path / "m.pth", force=True)
        assert bits_of(torch.load(tmp_path / "m.pth", weights_only=True)["net"], arrays(), same_bits)


# joblib.


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
@pytest.mark.parametrize("protocol", [2, *(pytest.param(number, marks=pytest.mark.thorough) for number in (3, 4)), 5])
def test_joblib(compress: Any, protocol: int, tmp_path: Path, same_bits: SameBits) -> None:
    import joblib

    values = arrays()
    path = tmp_path / "model.joblib"
    joblib.dump({"model": values, "epoch": 3}, path, compress=compress, protocol=protocol)
    wanted = joblib.load(path)["model"]
    with ckptkit.open(path) as file:
        assert (file.format, file.trust, file.kind) == ("pickle", "needs_trust", "resume")
        if not compress:
            assert all(entry.storage.source.file is file._file for entry in file.state_dict.values())
    assert bits_of(ckptkit.load_state_dict(path), wanted, same_bits)
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=True)
    assert whole["epoch"] == 3 and bits_of(whole["model"], wanted, same_bits)
    assert ckptkit.diff(path, tmp_path / "m.pth").equal


def test_joblib_with_torch_tensors(tmp_path: Path, same_bits: SameBits) -> None:
    import joblib

    path = tmp_path / "model.joblib"
    state = {"w": torch.randn(300, 200), "b": torch.ones(3)}
    joblib.dump({"model": state, "mean": np.arange(40_000.0), "scaler": {"std": np.ones(3)}}, path)
    found = ckptkit.load_state_dict(path)
    assert all(same_bits(found[name], state[name]) for name in state)
    ckptkit.convert(path, tmp_path / "m.pth")
    whole = torch.load(tmp_path / "m.pth", weights_only=False)
    assert np.array_equal(whole["mean"], np.arange(40_000.0)) and np.array_equal(whole["scaler"]["std"], np.ones(3))


def test_joblib_of_objects_is_told_as_before(tmp_path: Path) -> None:
    import joblib

    path = tmp_path / "model.joblib"
    for value in (Table(), {"w": np.ones(3), "o": np.array([{}, 3], object)}):
        joblib.dump(value, path)
        with pytest.raises(UnknownFormatError, match=r"a joblib file, not written by torch.save; joblib.load reads it"):
            formats.read(path)


# Hostile twins.


def _joblib(shape: Any, nbytes: int, *, padding: bytes = b"", state: dict[str, Any] | None = None) -> bytes:
    """A file of joblib's by hand, whose array says one size and has another."""
    out = io.BytesIO()
    out.write(b"\x80\x03}X\x01\x00\x00\x00acjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81")
    given = {"shape": shape, "order": "C", "dtype": np.dtype("f4"), "subclass": np.ndarray, **(state or {})}
    out.write(pickle.dumps(given, 3)[2:-1] + b"b" + padding + b"\0" * nbytes + b"s.")
    return out.getvalue()


def test_joblib_by_hand(tmp_path: Path) -> None:
    assert ckptkit.load_state_dict(put(tmp_path, _joblib((2, 3), 24)))["a"].shape == (2, 3)
    aligned = _joblib((2, 3), 24, padding=b"\x03\xff\xff\xff", state={"numpy_array_alignment_bytes": 16})
    assert ckptkit.load_state_dict(put(tmp_path, aligned))["a"].shape == (2, 3)


@pytest.mark.parametrize(
    "data",
    [
        _joblib((2, 3), 20), _joblib((2, 3), 28), _joblib((2**62, 8), 24), _joblib((-1, 3), 24), _joblib("x", 24),
        _joblib((2, 3), 24, padding=b"\xff", state={"numpy_array_alignment_bytes": 16}),
        _joblib((2, 3), 24, state={"dtype": np.dtype("O")}), _joblib((2, 3), 24, state={"dtype": 3}),
        _joblib((1,) * 70, 4), _joblib((2, 3), 24)[:-20],
    ],
)  # fmt: skip
def test_joblib_that_lies_ends_in_an_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        formats.read(put(tmp_path, data))


def patched(protocol: int, old: bytes, new: bytes) -> bytes:
    data = pickle.dumps({"w": np.arange(4096.0), "v": np.ones(3)}, protocol)
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("size", [(1 << 12) - 1, (1 << 12) + 1, 0x7FFF])
def test_sizes_that_lie(protocol: int, size: int, tmp_path: Path) -> None:
    data = patched(protocol, b"M\x00\x10", b"M" + struct.pack("<H", size))
    with pytest.raises(CorruptError, match=r"a numpy array \[[0-9]+\] of float64 with 32,768 bytes: damaged|no pickle"):
        formats.read(put(tmp_path, data))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_cut_off_anywhere(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps({"m": {"w": np.arange(20_000.0), "v": np.ones(3)}}, protocol)
    for end in [*range(1, 400, 7), 70_000, len(data) - 1]:
        with pytest.raises(CkptkitError):
            formats.read(put(tmp_path, data[:end]))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_held_bytes_that_are_wanted_as_bytes_too(protocol: int, tmp_path: Path) -> None:
    """What only looks like an array's bytes is there when it is asked for."""
    raw = bytes(range(256)) * 1000
    for weights in ({"w": np.ones(3)}, {"w": torch.ones(3)}):
        value = {"m": weights, "x": (1, (3,), np.dtype("f4"), False, raw)}
        path = put(tmp_path, pickle.dumps(value, protocol))
        assert ckptkit.load_state_dict(path)["w"].tolist() == [1, 1, 1]
        ckptkit.convert(path, tmp_path / "m.pth", force=True)
        assert torch.load(tmp_path / "m.pth", weights_only=False)["x"][4] == raw


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_do_not_count_as_bytes_of_the_pickle(protocol: int, tmp_path: Path) -> None:
    from ckptkit.bytesource import SourceFile

    path = put(tmp_path, pickle.dumps({str(n): np.arange(30_000.0) + n for n in range(9)}, protocol))
    file = SourceFile(path)
    limits = Limits(pickle_nbytes=300_000)
    raw = read(formats.Probe(file, limits))
    assert sum(isinstance(node, TensorEntry) for node in walk(raw.root)) == 9
    file.close()


def test_a_compressed_one_has_a_limit(tmp_path: Path) -> None:
    import joblib

    from ckptkit.bytesource import SourceFile

    path = tmp_path / "model.joblib"
    joblib.dump({"w": np.zeros(3_000_000)}, path, compress=9)
    file = SourceFile(path)
    with pytest.raises(LimitError, match="bytes of zlib-compressed data"):
        formats.detect(formats.Probe(file, Limits(unpacked_nbytes=5 << 20, unpacked_ratio=2)))
    file.close()


def test_both_byte_orders_do_not_fit_one_pth(tmp_path: Path) -> None:
    path = put(tmp_path, pickle.dumps({"a": np.ones(2, ">f4"), "b": np.ones(2, "<f4")}, 2))
    ckptkit.convert(path, tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedError, match="both byte orders"):
        ckptkit.convert(path, tmp_path / "m.pth")


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", range(6))
def test_names_beside_them_are_judged(protocol: int, tmp_path: Path) -> None:
    for value in ({"m": {"w": np.ones(300)}, "x": Runs()}, [Runs(), {"w": np.ones(300)}]):
        with ckptkit.open(put(tmp_path, pickle.dumps(value, protocol))) as file:
            assert (file.format, file.trust) == ("pickle", "hostile")
        assert not ckptkit.check(file.path).ok


def test_names_beside_those_of_joblib_are_judged(tmp_path: Path) -> None:
    import joblib

    for compress in (0, 3):
        joblib.dump({"m": {"w": np.ones(30_000)}, "x": Runs()}, tmp_path / "m.joblib", compress=compress)
        with ckptkit.open(tmp_path / "m.joblib") as file:
            assert file.trust == "hostile"
