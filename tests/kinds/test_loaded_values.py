"""Every value of a state_dict is what torch.load gives, or an error that names it; torch is the oracle."""

from __future__ import annotations

import collections
import io
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.torch_oracle import same
from torch import nn

import ckptkit
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, RewriteError, UnsupportedError

Save = Callable[..., Path]

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore::UserWarning")]

try:
    from torch.nested._internal.nested_tensor import _rebuild_njt as rebuild_jagged
except ImportError:  # before torch 2.3
    rebuild_jagged = None

NESTED = hasattr(torch._utils, "_rebuild_nested_tensor")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    PER_TENSOR = torch.quantize_per_tensor(torch.arange(16.0).reshape(4, 4), 0.1, 3, torch.quint8)
FLOAT_SCALES = torch.arange(4.0) + 0.5


def per_channel(dtype: torch.dtype, zero_points: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_channel(torch.arange(24.0).reshape(4, 6), FLOAT_SCALES, zero_points, 0, dtype)


def with_note(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "kept beside it"  # type: ignore[attr-defined]
    return tensor


VALUES: dict[str, Callable[[], Any]] = {
    "per tensor": lambda: PER_TENSOR,
    "32 bits": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, -2, torch.qint32),
    "a view of a quantized one": lambda: PER_TENSOR.t()[1:3],
    "per channel": lambda: torch.quantize_per_channel(torch.ones(4, 3), torch.ones(3), torch.zeros(3), 1, torch.qint8),
    "float qparams": lambda: per_channel(torch.quint8, torch.rand(4)),
    "two in a byte": lambda: per_channel(torch.quint4x2, torch.rand(4)),
    "a quantized parameter": lambda: nn.Parameter(PER_TENSOR, requires_grad=False),
    "coo": lambda: torch.eye(3).to_sparse(),
    "coo of places twice": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (4, 4)),
    "coo with a dense dimension": lambda: torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3)),
    "coo of nothing": lambda: torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (4, 4)),
    "a sparse parameter": lambda: nn.Parameter(torch.eye(3).to_sparse()),
    "sparse with an attribute": lambda: with_note(torch.eye(3).to_sparse()),
    "csr": lambda: torch.tensor([[0.0, 1], [2, 3]]).to_sparse_csr(),
    "csr of 32 bits": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32), torch.ones(2), (2, 4)
    ),
    "csr in batches": lambda: torch.ones(3, 2, 2).to_sparse_csr(),
    "csc": lambda: torch.tensor([[0.0, 1], [2, 3]]).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 1)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((1, 2)),
    "csr of nothing": lambda: torch.zeros(2, 2).to_sparse_csr(),
    "meta": lambda: torch.empty(3, 4, device="meta").t(),
    "a dtype": lambda: torch.qint8,
    "a layout": lambda: torch.sparse_coo,
    "a scheme": lambda: torch.per_channel_affine,
    "a device": lambda: torch.device("cuda", 1),
    "a size": lambda: torch.Size([3, 4]),
    "packed parameters": lambda: (PER_TENSOR, torch.ones(4), None),
    "extra state": lambda: {"a": 1, 3: [torch.ones(2), (None, b"x", 2.5)], "s": {4, 5}, "f": frozenset([1])},
    "dicts": lambda: [OrderedDict(a=1), collections.Counter("aab"), collections.defaultdict(list, {"a": [1]})],
    "numbers": lambda: [3 + 4j, 1 << 70, True, slice(1, 3), range(4), bytearray(b"x"), set(), b""],
    "bytes in memory": lambda: io.BytesIO(b"abc"),
    "array": lambda: numpy.arange(6.0).reshape(2, 3),
    "array in Fortran's order": lambda: numpy.asfortranarray(numpy.arange(6).reshape(2, 3)),
    "big-endian array": lambda: numpy.array([1, 2], ">i4").astype(">i4"),
    "array of nothing": lambda: numpy.zeros((0, 3), "f2"),
    "array of text": lambda: numpy.array(["ab", "c"]),
    "array of one number": lambda: numpy.array(3),
    "numpy's number": lambda: numpy.float32(3),
    "numpy's bool": lambda: numpy.bool_(True),
    "lazy": lambda: nn.parameter.UninitializedParameter(),
}
if NESTED:
    VALUES["nested"] = lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
    VALUES["nested, a view"] = lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]).transpose(1, 2)
if rebuild_jagged is not None:
    VALUES["jagged"] = lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", VALUES)
def test_what_torch_loads(tmp_path: Path, name: str, protocol: int) -> None:
    state = OrderedDict({"l.weight": torch.ones(2), "l._extra_state": VALUES[name](), "l.bias": torch.zeros(2)})
    path = tmp_path / "model.pth"
    torch.save(state, path, pickle_protocol=protocol)
    ours, theirs = ckptkit.load_state_dict(path), torch.load(path, weights_only=False)
    if name == "big-endian array":  # numpy keeps the order in protocol 5 alone, and torch takes no such array
        theirs["l._extra_state"] = theirs["l._extra_state"].astype("i4")
    assert same(ours, theirs)


def test_of_the_old_container_too(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"q": PER_TENSOR, "w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert same(dict(ckptkit.load_state_dict(path)), torch.load(path, weights_only=False))


def test_the_kinds_beside_each_other(save: Save) -> None:
    """One of each in one file; what is one object stays one, and what shares memory shares it."""
    base = torch.arange(6.0)
    sparse = torch.sparse_coo_tensor([[0, 1]], base[:2], (3,))
    state = {"conv.weight": PER_TENSOR, "conv.bias": base, "emb": sparse, "tied": PER_TENSOR, "half": base[3:]}
    path = save(state)
    ours = ckptkit.load_state_dict(path)
    assert same(dict(ours), torch.load(path, weights_only=False))
    assert ours["conv.weight"] is ours["tied"]
    assert ours["half"].untyped_storage().data_ptr() == ours["conv.bias"].untyped_storage().data_ptr()
    assert ours["emb"]._values().data_ptr() == ours["conv.bias"].data_ptr()


@pytest.mark.parametrize("location", ["cpu", torch.device("cpu"), {"cuda:7": "cpu"}, lambda storage, tag: storage])
def test_everything_is_put_where_it_is_asked_for(save: Save, location: Any, tmp_path: Path) -> None:
    state = {"q": PER_TENSOR, "c": per_channel(torch.qint8, torch.zeros(4)), "s": torch.eye(3).to_sparse()}
    ckptkit.convert(save(state), tmp_path / "gpu.pth", map_location="cuda:7")
    ours = ckptkit.load_state_dict(tmp_path / "gpu.pth", map_location=location)
    assert same(dict(ours), state)
    with pytest.raises(RewriteError, match="cannot be put on 'cuda:7'"):
        ckptkit.load_state_dict(tmp_path / "gpu.pth", map_location=None)
    with pytest.raises(UnsupportedError, match=r"2 of 3 values .*q .torch .* cannot create it"):
        ckptkit.load_state_dict(tmp_path / "gpu.pth", map_location="meta")  # torch has no quantized ones there
    ckptkit.convert(tmp_path / "gpu.pth", tmp_path / "s.pth", include="s")
    assert ckptkit.load_state_dict(tmp_path / "s.pth", map_location="meta")["s"].is_meta


class Call:
    """Pickles as a call of a function, which is not called here."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_tensors_of_devices_without_storages(save: Save) -> None:
    from_numpy = Call(torch._utils._rebuild_device_tensor_from_numpy, numpy.ones(3), torch.bfloat16, "xla:0", False)
    if not hasattr(torch._utils, "_rebuild_device_tensor_from_cpu_tensor"):
        pytest.skip("this torch makes such tensors on their own device alone, whatever map_location is")
    from_cpu = Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(2), torch.float16, "maia:0", True)
    calls = {"n": from_numpy, "w": torch.ones(1), "c": from_cpu}
    path = save(calls)
    assert same(dict(ckptkit.load_state_dict(path, map_location="cpu")), torch.load(path, "cpu", weights_only=False))
    rows = [row["name"] for row in ckptkit.inspect(path)["tensors"]]
    assert sorted(rows) == sorted([*calls, *(f"{name}.data" for name in calls if name != "w")])
    with pytest.raises(RewriteError, match=r"saved on 'xla:0' cannot be put .* give map_location=\"cpu\""):
        ckptkit.load_state_dict(path, map_location=None)
    with pytest.raises(RewriteError, match="a function has no storage"):
        ckptkit.load_state_dict(path, map_location=lambda storage, tag: storage)


def test_tensors_of_devices_are_converted(save: Save, tmp_path: Path) -> None:
    single, copied = numpy.arange(6, dtype="f4").reshape(2, 3), torch.arange(5.0)
    on_device = torch._utils._rebuild_device_tensor_from_cpu_tensor
    moved = Call(on_device, copied, torch.float32, "maia:0", True)
    calls: dict[str, Any] = {
        "half": Call(torch._utils._rebuild_device_tensor_from_numpy, single, torch.bfloat16, "xla:0", False),
        "whole": Call(torch._utils._rebuild_device_tensor_from_numpy, single, torch.float32, "xla:1", True),
        "copied": moved,
        "part": Call(on_device, copied[1:3], torch.float32, "maia:0", False),
        "kept": Call(torch._utils._rebuild_parameter, moved, True, OrderedDict()),
        "plain": torch.ones(1),
    }
    path = save(calls)
    wanted = torch.load(path, "cpu", weights_only=False)
    ckptkit.convert(path, tmp_path / "m.safetensors", tied="duplicate")
    found = ckptkit.load_state_dict(tmp_path / "m.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v.detach()) for k, v in wanted.items())
    assert ckptkit.diff(path, tmp_path / "m.safetensors").equal
    ckptkit.convert(path, tmp_path / "kept.pth")  # the calls stay what they are
    assert same(torch.load(tmp_path / "kept.pth", "cpu", weights_only=False), wanted)
    assert b"_rebuild_device_tensor_from_numpy" in (tmp_path / "kept.pth").read_bytes()
    ckptkit.convert(path, tmp_path / "cast.pth", dtype="float16", keep_dtype=["half"], map_location="cpu")
    cast = torch.load(tmp_path / "cast.pth", weights_only=True)
    assert {name: value.dtype for name, value in cast.items()} == {
        name: torch.bfloat16 if name == "half" else torch.float16 for name in calls
    }


@pytest.mark.parametrize(
    "arguments",
    [
        (numpy.ones(3), torch.qint8, "xla:0", False),
        (numpy.ones(3), torch.float32, 3, False),
        ("x", torch.float32, "xla:0", False),
        (numpy.array(["x"]), torch.float32, "xla:0", False),
    ],
)
def test_tensors_of_devices_that_do_not_fit_are_refused(arguments: Any, save: Save, tmp_path: Path) -> None:
    path = save({"n": Call(torch._utils._rebuild_device_tensor_from_numpy, *arguments), "w": torch.ones(1)})
    with pytest.raises(RewriteError):
        ckptkit.convert(path, tmp_path / "m.safetensors")


# What a file must not make torch do.


def coo(indices: Any, values: Any, size: Any, *more: Any) -> Call:
    return Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (indices, values, size, *more))


def compressed(layout: torch.layout, steps: list[int], plain: list[int], values: Any, size: Any) -> Call:
    parts = torch.tensor(steps), torch.tensor(plain, dtype=torch.int64), values, torch.Size(size)
    return Call(torch._utils._rebuild_sparse_tensor, layout, parts)


def quantized(size: Any, stride: Any, how: Any, *, offset: int = 0, data: torch.Tensor = PER_TENSOR) -> Call:
    memory = torch.storage.TypedStorage(wrap_storage=data.untyped_storage(), dtype=data.dtype, _internal=True)
    return Call(torch._utils._rebuild_qtensor, memory, offset, size, stride, how, False, OrderedDict())


def channels(scales: Any, zero_points: Any, axis: Any) -> Call:
    return quantized((4, 4), (4, 1), (torch.per_channel_affine, scales, zero_points, axis))


def nested(sizes: Any, strides: Any, offsets: Any) -> Call:
    rows = [torch.tensor(part) for part in (sizes, strides, offsets)]
    return Call(torch._utils._rebuild_nested_tensor, torch.arange(9.0), *rows)


ONE, FOURS = torch.ones(1), (torch.ones(4), torch.zeros(4, dtype=torch.int64))
AFFINE = torch.per_tensor_affine, 0.1, 3
CSR, BSR = torch.sparse_csr, torch.sparse_bsr

BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "an index far outside": (lambda: coo(torch.tensor([[10**9], [0]]), ONE, (4, 4), False),
        "index 1000000000 of a sparse tensor in dimension 0, whose size is 4"),
    "a negative index": (lambda: coo(torch.tensor([[0], [-1]]), ONE, (4, 4)), "index -1 .* in dimension 1"),
    "a negative size": (lambda: coo(torch.tensor([[0], [0]]), ONE, (4, -4)), "size is not whole numbers"),
    "fewer values than indices": (lambda: coo(torch.tensor([[0, 1]]), ONE, (4,)), r"indices \[1, 2\] and values \[1\]"),
    "more dimensions of indices": (lambda: coo(torch.zeros(3, 1, dtype=torch.int64), ONE, (4,)), "do not make"),
    "indices of floats": (lambda: coo(torch.zeros(1, 1), ONE, (4,)), "which is not possible"),
    "coalesced that is not": (lambda: coo(torch.tensor([[1, 0]]), torch.ones(2), (4,), True), "marked as coalesced"),
    "coalesced with a place twice": (
        lambda: coo(torch.tensor([[0, 1, 1], [3, 2, 2]]), torch.ones(3), (4, 4), True), "marked as coalesced"),
    "a whole too large": (lambda: coo(torch.tensor([[0], [0]]), ONE, (1 << 40, 1 << 40)), "than torch can count"),
    "a layout of no kind": (lambda: Call(torch._utils._rebuild_sparse_tensor, torch.strided, (ONE, ONE, (1,))),
        "a sparse tensor of layout 'strided'"),
    "steps that fall": (lambda: compressed(CSR, [0, 2, 1], [0], ONE, (2, 2)), "compressed indices"),
    "steps past the end": (lambda: compressed(CSR, [0, 9, 1], [0], ONE, (2, 2)), "do not rise from 0 to 1"),
    "steps that do not begin at 0": (lambda: compressed(CSR, [1, 1, 1], [0], ONE, (2, 2)), "do not rise from 0"),
    "steps of a huge negative": (lambda: compressed(CSR, [0, -(1 << 63), 1], [0], ONE, (2, 2)), "do not rise from 0"),
    "too few steps": (lambda: compressed(CSR, [0, 1], [0], ONE, (2, 2)), "do not make a sparse_csr tensor of .2, 2."),
    "a column outside": (lambda: compressed(CSR, [0, 1, 1], [10**9], ONE, (2, 2)), "index 1000000000 .* its plain"),
    "a column twice": (lambda: compressed(CSR, [0, 2, 2], [1, 1], torch.ones(2), (2, 2)), "are duplicated"),
    "columns out of order": (lambda: compressed(CSR, [0, 2, 2], [1, 0], torch.ones(2), (2, 2)), "not in order"),
    "blocks that do not divide": (lambda: compressed(BSR, [0, 1], [0], torch.ones(1, 2, 2), (3, 2)), "do not make"),
    "a block outside": (lambda: compressed(BSR, [0, 1], [1], torch.ones(1, 2, 2), (2, 2)), "index 1 .* size is 1"),
    "blocks of nothing": (lambda: compressed(BSR, [0, 1], [0], torch.ones(1, 0, 2), (2, 2)), "do not make"),
    "an axis outside": (lambda: channels(*FOURS, 2), "the axis of a quantized tensor of 2 dimensions is 2"),
    "a negative axis": (lambda: channels(*FOURS, -1), "is -1"),
    "few scales": (lambda: channels(torch.ones(1), FOURS[1], 0), "1 scales for 4 channels"),
    "few zero points": (lambda: channels(FOURS[0], FOURS[1][:2], 0), "2 zero points for 4 channels"),
    "scales of two dimensions": (lambda: channels(torch.ones(4, 1), FOURS[1], 0), "its scales are a tensor .4, 1."),
    "a scheme unknown": (lambda: quantized((4, 4), (4, 1), (torch.per_channel_symmetric, 1.0, 0)), "scheme"),
    "past the storage": (lambda: quantized((4, 5), (5, 1), AFFINE), "reach to byte 20 of a storage of 16 bytes"),
    "an offset past it": (lambda: quantized((4, 4), (4, 1), AFFINE, offset=1), "reach to byte 17"),
    "packed past it": (lambda: quantized((4, 7), (7, 1), (torch.per_channel_affine, *FOURS, 0),
        data=per_channel(torch.quint4x2, torch.rand(4))), "reach to byte 14 of a storage of 12"),
    "a scale that is text": (lambda: quantized((4, 4), (4, 1), (torch.per_tensor_affine, "1", 0)), "are not numbers"),
    "a nested one outside": (lambda: nested([[3, 3], [1, 3]], [[3, 1], [3, 1]], [0, 9]), "outside its buffer of 9"),
    "a nested negative size": (lambda: nested([[3, 3], [-1, 3]], [[3, 1], [3, 1]], [0, 3]), "outside its buffer"),
    "a nested negative stride": (lambda: nested([[2, 3]], [[-3, 1]], [3]), "outside its buffer"),
    "a nested huge stride": (lambda: nested([[2, 3]], [[10**9, 1]], [0]), "outside its buffer"),
    "nested of other counts": (lambda: nested([[3, 3]], [[3, 1]], [0, 1]), "of a nested tensor do not fit"),
    "meta of a negative size": (lambda: Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (-1,), (1,),
        False), "size is not whole numbers"),
    "meta of other lengths": (lambda: Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2,), (1, 1),
        False), "of a meta tensor do not fit"),
    "too few arguments": (lambda: Call(torch._utils._rebuild_qtensor, 1), "1 arguments, but torch saves 7"),
}  # fmt: skip
if rebuild_jagged is not None:

    def jagged(offsets: list[int], **more: Any) -> Call:
        given = {"values": torch.ones(3, 2), "offsets": torch.tensor(offsets), "lengths": None, "_ragged_idx": 1}
        function = torch._tensor._rebuild_from_type_v2
        return Call(function, rebuild_jagged, torch.nested._internal.nested_tensor.NestedTensor, (given | more,), {})

    BROKEN |= {
        "jagged past its values": (lambda: jagged([0, 9]), "do not rise from 0 to 3"),
        "jagged that falls": (lambda: jagged([0, 3, 1]), "do not rise"),
        "jagged of long parts": (lambda: jagged([0, 1, 3], lengths=torch.tensor([2, 2])), "lengths of a nested tensor"),
        "jagged along no dimension": (lambda: jagged([0, 3], _ragged_idx=4), "ragged dimension"),
    }


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_together_is_an_error(save: Save, name: str) -> None:
    make, words = BROKEN[name]
    path = save({"l.weight": torch.ones(2), "l.odd": make(), "l.bias": torch.ones(1)})
    with pytest.raises(CorruptError, match=words) as caught:
        ckptkit.load_state_dict(path)
    assert caught.value.path == str(path)
    assert "l.odd" in str(caught.value)
    with pytest.raises(CorruptError, match=words):
        ckptkit.load_state_dict(path, map_location="meta")
    (row,) = [row for row in ckptkit.inspect(path)["tensors"] if row["name"] == "l.odd" and "value" in row]
    is_told = row["value"].startswith("malformed")  # else it takes the bytes of indices to see it
    assert re.search(words, row["value"]) if is_told else row["dtype"] in DTYPES


def test_what_has_no_place_is_saved_on_none(save: Save, command: Any) -> None:
    odd = Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2,), (1, 1), False)
    told = command("inspect", save({"w": torch.ones(2), "odd": odd})).out
    assert "saved on cpu, written" in told and "odd (malformed meta tensor: size (2,) and stride (1, 1)" in told


def test_an_array_whose_bytes_are_not_its_shape(save: Save) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            function, args, state = numpy.ones(3).__reduce__()[:3]
            return function, args, (*state[:1], (4,), *state[2:])

    with pytest.raises(CorruptError, match=r"l.odd: a numpy array of shape \[4\] .* has 24 bytes, not 32"):
        ckptkit.load_state_dict(save({"l.weight": torch.ones(1), "l.odd": Odd()}))


def test_a_damaged_quantized_tensor_is_named(save: Save) -> None:
    path = save({"l.weight": torch.ones(2), "l.q": PER_TENSOR})
    with zipfile.ZipFile(path) as archive:
        info = max((i for i in archive.infolist() if "/data/" in i.filename), key=lambda i: i.file_size)
        data = bytearray(path.read_bytes())
        at = data.index(archive.read(info))
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"tensor 'l\.q'"):
        ckptkit.load_state_dict(path)


# What is not made.


class Thing:
    """Somebody's class."""

    def __init__(self) -> None:
        self.ran = True


class Wrapping(torch.Tensor):
    """A subclass that wraps a tensor, as torchao's do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "an object": (Thing, "test_loaded_values.Thing"),
    "one in a dict": (lambda: {"a": [Thing()]}, "test_loaded_values.Thing"),
    "a function": (lambda: same, "torch_oracle.same"),
    "a name of torch's": (lambda: torch.load, "torch.serialization.load"),
    "a class": (lambda: nn.Linear, "Linear"),
    "a wrapper": (lambda: Wrapping(torch.ones(2, 3)), r"Wrapping \[2, 3\] float32"),
    "a parameter of a wrapper": (
        lambda: Call(torch._utils._rebuild_parameter, Wrapping(torch.ones(2, 3)), True, OrderedDict()),
        r"Wrapping \[2, 3\] float32",
    ),
    "an array of objects": (lambda: numpy.array([Thing()], object), r"numpy array \[1\] object"),
    "a masked array": (lambda: numpy.ma.masked_array([1.0], [True]), r"numpy MaskedArray \[1\] float64"),
    "a matrix": (lambda: numpy.matrix([[1.0]]), r"numpy matrix \[1, 1\] float64"),
    "a defaultdict of something": (lambda: collections.defaultdict(Thing), "defaultdict of .*Thing"),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_what_only_foreign_code_makes_is_named(save: Save, name: str, tmp_path: Path) -> None:
    make, words = FOREIGN[name]
    path = save({"l.weight": torch.ones(2), "l._extra_state": make(), "m._extra_state": Thing(), "n": 3})
    with pytest.raises(UnsupportedError, match=f"2 of 4 values .*l._extra_state .*{words}.*m._extra_state") as caught:
        ckptkit.load_state_dict(path)
    assert "--exclude l._extra_state --exclude m._extra_state" in str(caught.value)
    ckptkit.convert(path, tmp_path / "out.pth", exclude=["l._extra_state", "m._extra_state"])
    assert same(dict(ckptkit.load_state_dict(tmp_path / "out.pth")), {"l.weight": torch.ones(2), "n": 3})


def test_a_value_without_end(save: Save) -> None:
    deep: Any = []
    for _ in range(150):
        deep = [deep]
    endless: list[Any] = [1]
    endless.append(endless)
    ours = ckptkit.load_state_dict(save({"w": torch.ones(1), "l._extra_state": endless}))["l._extra_state"]
    assert ours[1] is ours
    with pytest.raises(UnsupportedError, match="nested more than 100 levels deep"):
        ckptkit.load_state_dict(save({"w": torch.ones(1), "l._extra_state": deep}))


# Loading it.


def test_module_versions_decide_as_in_torch(save: Save, tmp_path: Path) -> None:
    """BatchNorm's counter may be missing where the versions are old, and must be there where they are 2."""
    saved = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).state_dict()
    whole = save(saved)
    state = ckptkit.load_state_dict(whole)
    assert type(state) is OrderedDict
    assert state._metadata == saved._metadata == torch.load(whole, weights_only=False)._metadata  # type: ignore[attr-defined]
    del saved["1.num_batches_tracked"]
    for path, is_old in ((save(saved), False), (save(dict(saved), "old.pth"), True)):
        ckptkit.convert(path, tmp_path / "same.safetensors", force=True)
        for found in (path, tmp_path / "same.safetensors"):
            model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
            if is_old:
                model.load_state_dict(ckptkit.load_state_dict(found), strict=True)
            else:
                with pytest.raises(RuntimeError, match="num_batches_tracked"):
                    model.load_state_dict(ckptkit.load_state_dict(found), strict=True)
    assert ckptkit.load_state_dict(save(dict(saved)))._metadata == {}  # type: ignore[attr-defined]


def test_a_quantized_model_loads(save: Save) -> None:
    backend = torch.backends.quantized
    backend.engine = next(name for name in ("fbgemm", "x86", "qnnpack") if name in backend.supported_engines)
    from torch.ao.nn import quantized as q

    model, fresh = (nn.Sequential(q.Linear(3, 2), q.Conv2d(1, 2, 1), q.Embedding(4, 8)) for _ in range(2))
    for path in (save(model.state_dict()), save(model)):
        fresh.load_state_dict(ckptkit.load_state_dict(path), strict=True)
        assert torch.equal(fresh[0].weight().dequantize(), model[0].weight().dequantize())
        assert torch.equal(fresh[1].weight().dequantize(), model[1].weight().dequantize())
