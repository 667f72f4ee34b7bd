"""Dense values are those of torch's `to_dense()` and `dequantize()`, and of block scales the formula's, bit for bit."""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from support.files import extents, flipped, opened, with_data, written
from support.generated_tensors import SOME
from torch import nn

import ckptkit
from ckptkit import Densify, RewriteError
from ckptkit.checkpoint import Checkpoint
from ckptkit.compare import check_output
from ckptkit.computed import ConvertedRange, DenseRange
from ckptkit.errors import CorruptError, DTypeError, KeyCollisionError
from ckptkit.torch_bridge import tensors
from ckptkit.transfer import dense

Save = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, on prototypes and what it will remove


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in C order, all NaN as one: their payload depends on the processor."""
    tensor = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    if tensor.is_floating_point() and tensor.element_size() > 1:
        tensor[tensor.isnan()] = math.nan
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def assert_equal(got: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    assert bits(got) == bits(expected), name


def dense_of(value: torch.Tensor) -> torch.Tensor:
    """What torch makes of it."""
    if value.is_quantized:
        return value.dequantize()
    if value.is_nested:
        return value.contiguous().to_padded_tensor(0)
    return value.to_dense() if value.layout != torch.strided else value


def assert_dense(path: Path, saved: dict[str, Any], **options: Any) -> None:
    """In either container, the values are those that torch makes of what was saved."""
    for suffix in (".safetensors", ".pth"):
        out = path.with_name(f"out{suffix}")
        ckptkit.convert(path, out, densify=True, force=True, **options)
        got = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
        assert list(got.keys()) == list(saved) or suffix == ".safetensors"
        assert got.keys() == saved.keys()
        for name, value in saved.items():
            assert type(got[name]) in (torch.Tensor, nn.Parameter)
            assert_equal(got[name], dense_of(value).detach(), name)


# Sparse.

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-8, 65504.0]


def numbers(draw: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values of any kind, some odd."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    made = torch.randn(shape, generator=generator) * 8
    if dtype == torch.bool:
        return made > 0
    made = made.to(dtype)
    if dtype.is_floating_point and made.numel() and draw(st.booleans()):
        made.view(-1)[draw(st.integers(0, made.numel() - 1))] = draw(st.sampled_from(SPECIAL))
    return made


@st.composite
def coo(draw: Callable[..., Any]) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    size = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    sparse, count = draw(st.integers(1, len(size))), draw(st.integers(0, 12))
    indices = [[draw(st.integers(0, size[axis] - 1)) for _ in range(count)] for axis in range(sparse)]
    values = numbers(draw, (count, *size[sparse:]), dtype)
    made = torch.sparse_coo_tensor(torch.tensor(indices, dtype=torch.int64).reshape(sparse, count), values, size)
    return made.coalesce() if draw(st.booleans()) and dtype != torch.bool else made


@st.composite
def compressed(draw: Callable[..., Any]) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64]))
    layout = draw(st.sampled_from(["csr", "csc", "bsr", "bsc"]))
    high, wide = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) if layout in ("bsr", "bsc") else (1, 1)
    rows, columns = high * draw(st.integers(1, 4)), wide * draw(st.integers(1, 4))
    batch = tuple(draw(st.lists(st.integers(1, 2), max_size=2)))
    inner = (draw(st.integers(1, 3)),) if not batch and draw(st.booleans()) else ()
    keep = torch.rand(rows // high, columns // wide, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    mask = (keep > 0.5).repeat_interleave(high, 0).repeat_interleave(wide, 1)
    values = numbers(draw, (*batch, rows, columns, *inner), dtype)
    values = torch.where((values == 0) | (values != values), torch.ones((), dtype=dtype), values)
    whole = torch.where(mask.reshape(rows, columns, *[1] * len(inner)), values, torch.zeros((), dtype=dtype))
    options: dict[str, Any] = {"dense_dim": len(inner)} if inner else {}
    if layout in ("bsr", "bsc"):
        return getattr(whole, f"to_sparse_{layout}")((high, wide), **options)
    return getattr(whole, f"to_sparse_{layout}")(**options)


def made_of(tmp: Path, value: torch.Tensor) -> torch.Tensor:
    torch.save({"v": value}, tmp)
    with opened(tmp) as checkpoint:
        return tensors(Densify()(checkpoint).state_dict)["v"]


@SOME
@given(coo() | compressed())
def test_sparse_tensors_of_every_layout(tmp_path_factory: pytest.TempPathFactory, value: torch.Tensor) -> None:
    path = tmp_path_factory.getbasetemp() / "sparse.pth"
    assert_equal(made_of(path, value), value.to_dense())


@pytest.mark.parametrize("layout", ["csr", "csc", "bsr", "bsc"])
def test_negative_zero_and_hybrid_values(layout: str, save: Save) -> None:
    whole = torch.tensor([[-0.0, 1.0], [math.nan, 2.0]])
    size = ((2, 2),) if layout[0] == "b" else ()
    value = getattr(whole + 1, f"to_sparse_{layout}")(*size)
    value.values().copy_(whole.reshape(value.values().shape))
    assert_dense(save({"v": value}), {"v": value})


def test_a_sum_is_rounded_each_time(save: Save) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.bool):
        count = 5000
        indices = torch.randint(0, 9, (2, count), generator=torch.Generator().manual_seed(1))
        values = (torch.randn(count, 2, generator=torch.Generator().manual_seed(2)) * 10).to(dtype)
        value = torch.sparse_coo_tensor(indices, values, (9, 9, 2))
        assert_dense(save({"v": value}), {"v": value})


def test_blocks_begin_and_end_anywhere(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_SPARSE_NBYTES", 40)
    monkeypatch.setattr(dense, "_LOOKED", 3)
    monkeypatch.setattr(dense, "CHUNK_NBYTES", 44)
    monkeypatch.setattr(dense, "_WIDE_NBYTES", 64)
    torch.manual_seed(0)
    whole = torch.randn(6, 8) * (torch.rand(6, 8) > 0.5)
    saved = {
        "coo": torch.sparse_coo_tensor(torch.randint(0, 5, (2, 40)), torch.randn(40, 3), (5, 5, 3)),
        "wide": torch.sparse_coo_tensor(torch.randint(0, 3, (1, 7)), torch.randn(7, 29), (3, 29)),
        "csr": whole.to_sparse_csr(),
        "csc": torch.stack([whole, whole]).to_sparse_csc(),
        "bsr": whole.to_sparse_bsr((2, 4)),
        "nested": torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 5), torch.randn(1, 7)]),
        "per tensor": torch.quantize_per_tensor(torch.randn(3, 5, 7), 0.03, 4, torch.quint8),
        "last": torch.quantize_per_channel(torch.randn(3, 17), torch.rand(17) + 0.01, torch.arange(17), 1, torch.qint8),
        "middle": torch.quantize_per_channel(
            torch.randn(3, 5, 2), torch.rand(5) + 0.01, torch.arange(5), 1, torch.qint8
        ),
    }
    assert_dense(save(saved), saved)


def test_parts_that_do_not_lie_in_a_row(save: Save) -> None:
    torch.manual_seed(0)
    indices, values = torch.randint(0, 4, (9, 2)).t(), torch.randn(3, 9).t()
    value = torch.sparse_coo_tensor(indices, values, (4, 4, 3))
    conj = torch.sparse_coo_tensor(indices, torch.randn(9, dtype=torch.complex64).conj(), (4, 4))
    saved = {"v": value, "conj": conj}
    assert_dense(save(saved), saved)


# Nested.


def test_nested_tensors_are_padded(save: Save) -> None:
    strided = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 2), torch.randn(1, 1)])
    jagged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(5, 3)], layout=torch.jagged)
    odd = torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(3, 4)]).transpose(1, 2)
    saved = {"strided": strided, "jagged": jagged, "odd": odd}
    path = save(saved)
    assert_dense(path, saved)
    report = ckptkit.convert(path, path.with_name("x.pth"), densify=True)
    told = [finding for finding in report.findings if finding.code == "densified"]
    assert [finding.severity for finding in told] == ["info", "warning"]
    assert "3 nested tensors are padded" in told[1].message


# Quantized.


@st.composite
def quantized(draw: Callable[..., Any]) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from([torch.qint8, torch.quint8, torch.qint32]))
    whole = numbers(draw, shape, torch.float32).nan_to_num(0, 9, -9)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    zero = draw(st.integers(0, 100))
    if draw(st.booleans()):
        return torch.quantize_per_tensor(whole, draw(st.sampled_from([0.1, 0.037, 1 / 3, 1e-9])), zero, dtype)
    axis = draw(st.integers(0, len(shape) - 1))
    scales = torch.rand(shape[axis], generator=seed, dtype=torch.float64) + 1e-3
    if draw(st.booleans()) and dtype != torch.qint32:  # torch itself crashes on it
        return torch.quantize_per_channel(whole, scales.float(), torch.randn(shape[axis], generator=seed), axis, dtype)
    if len(shape) == 4 and axis < 2 and draw(st.booleans()):
        whole = whole.contiguous(memory_format=torch.channels_last)
    return torch.quantize_per_channel(whole, scales, torch.full((shape[axis],), zero), axis, dtype)


@SOME
@given(quantized())
def test_quantized_tensors(tmp_path_factory: pytest.TempPathFactory, value: torch.Tensor) -> None:
    path = tmp_path_factory.getbasetemp() / "quantized.pth"
    assert_equal(made_of(path, value), value.dequantize())


@pytest.mark.parametrize("zero", [0, 100, -3])
def test_differences_of_32_bits_wrap_around(zero: int, save: Save) -> None:
    whole = torch.tensor([2**31 - 1, -(2**31), 2**24 + 1, 123456789, 0], dtype=torch.int32)
    saved = {
        "one": torch._make_per_tensor_quantized_tensor(whole, 0.1, zero),
        "many": torch._make_per_channel_quantized_tensor(
            whole, torch.rand(5, dtype=torch.float64), torch.full((5,), zero), 0
        ),
    }
    assert_dense(save(saved), saved)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (3, 1)])
@pytest.mark.parametrize("dtype", ["quint4x2", "quint2x4"])
def test_packed_numbers(dtype: str, shape: tuple[int, int], save: Save) -> None:
    scales, zeros = torch.rand(shape[0]) + 0.01, torch.randn(shape[0])
    value = torch.quantize_per_channel(torch.randn(shape), scales, zeros, 0, getattr(torch, dtype))
    assert_dense(save({"v": value}), {"v": value})


def test_a_scalar_and_what_is_empty(save: Save) -> None:
    saved = {
        "scalar": torch.quantize_per_tensor(torch.tensor(1.0), 0.1, 1, torch.qint8),
        "none": torch.quantize_per_tensor(torch.ones(0, 3), 0.1, 1, torch.qint8),
        "no rows": torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3), (0, 3)),
        "nothing stored": torch.zeros(3, 4).to_sparse(),
        "csr": torch.zeros(3, 4).to_sparse_csr(),
    }
    assert_dense(save(saved), saved)


class Quantized(nn.Module):
    """A network as torch quantizes it, with packed parameters of every kind that it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.ao.nn.quantized.Conv2d(3, 4, 3)
        self.linear = torch.ao.nn.quantized.Linear(6, 5)
        self.dynamic = torch.ao.nn.quantized.dynamic.Linear(4, 3)
        self.half = torch.ao.nn.quantized.dynamic.Linear(4, 3, dtype=torch.float16)
        self.embedding = torch.ao.nn.quantized.Embedding(10, 4)
        self.plain = nn.Linear(2, 2)


def unpacked(module: Quantized) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        stem, mark, last = name.partition("_packed_params.")
        if not mark:
            state[name] = value
        elif last == "_packed_weight":
            state[f"{stem}weight"] = value
        elif last == "_packed_params":
            state.update(zip((f"{stem}weight", f"{stem}bias"), value, strict=True))
    return {name: value for name, value in state.items() if value is not None}


def test_packed_parameters_of_quantized_modules(save: Save) -> None:
    torch.manual_seed(0)
    module = Quantized()
    expected = unpacked(module)
    assert {"linear.weight", "linear.bias", "embedding.weight", "conv.weight", "half.weight"} <= expected.keys()
    assert_dense(save(module.state_dict()), expected)
    path = save(module.state_dict())
    report = ckptkit.convert(path, path.with_name("y.pth"), densify=True, rename=[r"linear\.=>fc."])
    assert "fc.weight" in torch.load(path.with_name("y.pth"), weights_only=True)
    assert report.details["dropped"] == []


def test_a_name_that_is_taken_is_an_error(save: Save) -> None:
    state = torch.ao.nn.quantized.Linear(2, 2).state_dict()
    with pytest.raises(KeyCollisionError, match="would both be named 'weight'"):
        ckptkit.convert(save({**state, "weight": torch.ones(2)}), "unused.pth", densify=True)


# Weights in FP8 with scales beside them.


def reference(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """The formula, in float32."""
    scale = scale.float()
    for axis, (size, of) in enumerate(zip(weight.shape, block, strict=True)):
        scale = scale.repeat_interleave(of, axis).narrow(axis, 0, size)
    return weight.float() * scale


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (300, 200), (129, 1), (1, 129), (64, 32)])
def test_blocks_of_128_with_ragged_edges(shape: tuple[int, int], dtype: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 1e-3
    saved = {"l.weight": weight, "l.weight_scale_inv": scale, "norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    save_file(saved, tmp_path / "in.safetensors")
    ckptkit.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", densify=True, dtype=dtype)
    got = load_file(tmp_path / "out.safetensors")
    wanted = reference(weight, scale, (128, 128))
    assert got.keys() == {"l.weight", "norm.weight"}
    assert_equal(got["l.weight"], wanted.to(getattr(torch, dtype or "float32")))
    assert got["norm.weight"].dtype == getattr(torch, dtype or "bfloat16")


SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    # shape of the weight, of the scale, and the block that has one; none: it is refused
    "_scale of a tensor": ((4, 6), (), (4, 6)),
    "_scale of one": ((4, 6), (1,), (4, 6)),
    "_scale of rows": ((4, 6), (4, 1), (1, 6)),
    "_scale of rows, flat": ((4, 6), (4,), (1, 6)),
    "_scale of columns": ((3, 4, 6), (3, 1, 6), (1, 4, 1)),
    "_scale of groups": ((4, 64), (4, 2), (1, 32)),
    "_scale of blocks": ((200, 256), (2, 2), None),  # of 100 rows, or of 128 and 72
    "_scale of squares": ((4, 4), (4,), None),
    "_scale of other columns": ((4, 6), (6,), None),
    "_scale of what does not divide": ((5, 6), (2, 1), None),
    "_scale_inv of a tensor": ((4, 6), (1, 1), (4, 6)),
    "_scale_inv of blocks": ((200, 256), (2, 2), (128, 128)),
}


POWERS = [torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *POWERS])
def test_scales_by_their_shape(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape, grid, block = SCALES[case]
    torch.manual_seed(0)
    weight, scale = torch.randn(shape).to(torch.float8_e5m2), (torch.rand(grid) + 0.1).to(dtype)
    save_file({"w": weight, f"w{case.partition(' ')[0]}": scale}, tmp_path / "in.safetensors")
    if block is None:
        with pytest.raises(RewriteError, match=r"1 value cannot be made dense: w \(.* --exclude w leaves it"):
            ckptkit.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", densify=True)
        assert not (tmp_path / "out.safetensors").exists()
        return
    ckptkit.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", densify=True)
    whole = scale if scale.dim() == len(shape) else scale.reshape(*scale.shape, *[1] * (len(shape) - scale.dim()))
    assert_equal(load_file(tmp_path / "out.safetensors")["w"], reference(weight, whole, block))


def test_several_scales_are_refused(tmp_path: Path) -> None:
    weight, scale = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1)
    save_file({"w": weight, "w_scale": scale, "w_scale_2": torch.ones(1)}, tmp_path / "in.safetensors")
    with pytest.raises(RewriteError, match="it has several scales: w_scale, w_scale_2"):
        ckptkit.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", densify=True)
    ckptkit.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", densify=True, exclude="w")
    assert load_file(tmp_path / "out.safetensors").keys() == {"w_scale", "w_scale_2"}


def test_scales_are_found_though_they_are_left_out(tmp_path: Path) -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    saved = {"a.weight": weight, "a.weight_scale": torch.tensor(0.5), "a.input_scale": torch.tensor(3.0)}
    save_file(saved, tmp_path / "in.safetensors")
    for options, names in (({"include": "*.weight"}, {"a.weight"}), ({}, {"a.weight", "a.input_scale"})):
        out = tmp_path / "out.safetensors"
        report = ckptkit.convert(
            tmp_path / "in.safetensors", out, densify=True, dtype="bfloat16", force=True, **options
        )
        assert load_file(out).keys() == names
        assert_equal(load_file(out)["a.weight"], torch.full((4, 4), 0.5, dtype=torch.bfloat16))
        assert "cast-scaled" not in [finding.code for finding in report.findings]


def test_scales_in_another_shard(tmp_path: Path) -> None:
    weight, scale = torch.randn(300, 200).to(torch.float8_e4m3fn), torch.rand(3, 2)
    names = {"w": "model-00001-of-00002.safetensors", "w_scale_inv": "model-00002-of-00002.safetensors"}
    save_file({"w": weight}, tmp_path / names["w"])
    save_file({"w_scale_inv": scale}, tmp_path / names["w_scale_inv"])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"metadata": {{}}, "weight_map": {names}}}'.replace("'", '"'))
    ckptkit.convert(index, tmp_path / "out.safetensors", densify=True)
    assert_equal(load_file(tmp_path / "out.safetensors")["w"], reference(weight, scale, (128, 128)))


# What it is to the rest.


def mixed() -> dict[str, Any]:
    torch.manual_seed(0)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([1.0, -2.0]), (3, 3)).coalesce()
    return {
        "a": torch.randn(3, 4), "q": torch.quantize_per_tensor(torch.randn(40, 50), 0.1, 3, torch.qint8),
        "s": sparse, "tied": sparse, "n": torch.tensor(3), "half": torch.eye(4, dtype=torch.float16).to_sparse_csr(),
    }  # fmt: skip


def test_what_stands_beside_is_not_touched(save: Save) -> None:
    saved = mixed()
    path = save(
        {"model": OrderedDict(saved), "optimizer": {"state": {0: {"m": saved["s"]}}, "param_groups": []}, "e": 3}
    )
    ckptkit.convert(path, path.with_name("out.pth"), densify=True)
    got = torch.load(path.with_name("out.pth"), weights_only=True)
    for name, value in saved.items():
        assert_equal(got["model"][name], dense_of(value), name)
    assert got["model"]["s"].data_ptr() == got["model"]["tied"].data_ptr()
    assert got["optimizer"]["state"][0]["m"].is_sparse
    assert got["e"] == 3


def test_parameters_stay_parameters(save: Save) -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    model.scale = nn.Parameter(torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8), requires_grad=False)
    path = save({"w": model.weight, "q": model.scale})
    ckptkit.convert(path, path.with_name("out.pth"), densify=True)
    got = torch.load(path.with_name("out.pth"), weights_only=True)
    assert [type(value) for value in got.values()] == [nn.Parameter, nn.Parameter]
    assert (got["w"].requires_grad, got["q"].requires_grad) == (True, False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_dtype_is_that_of_a_cast_after_it(dtype: str, save: Save) -> None:
    saved, wanted = mixed(), getattr(torch, dtype)
    path = save(saved)
    ckptkit.convert(path, path.with_name("out.pth"), densify=True, dtype=dtype)
    got = torch.load(path.with_name("out.pth"), weights_only=True)
    for name, value in saved.items():
        expected = dense_of(value)
        assert_equal(got[name], expected.to(wanted) if expected.is_floating_point() else expected, name)
    with opened(path) as checkpoint:
        alone = Densify(f"torch.{dtype}")(checkpoint)
        for name, tensor in tensors(alone.state_dict).items():
            assert_equal(tensor, got[name] if name != "a" else saved["a"], name)


def test_values_that_none_are_made_of_stay_or_are_refused(save: Save) -> None:
    saved = {"a": torch.ones(2), "m": torch.ones(3, device="meta"), "extra": {"x": 1}, "s": torch.eye(2).to_sparse()}
    path = save(saved)
    with pytest.raises(
        RewriteError,
        match=r"1 value cannot be made dense: m \(a meta tensor is a shape without "
        r"values\); --exclude m",
    ):
        ckptkit.convert(path, path.with_name("out.pth"), densify=True)
    ckptkit.convert(path, path.with_name("out.pth"), densify=True, exclude="m")
    got = torch.load(path.with_name("out.pth"), weights_only=True)
    assert (got["extra"], got["s"].layout) == ({"x": 1}, torch.strided)


def test_nothing_to_make_is_told(save: Save) -> None:
    path = save({"a": torch.ones(2)})
    report = ckptkit.convert(path, path.with_name("out.pth"), densify=True)
    assert [(f.code, f.severity) for f in report.findings if f.code == "densified"] == [("densified", "info")]
    with opened(path) as checkpoint:
        assert Densify()(checkpoint) is checkpoint
    with pytest.raises(DTypeError, match="values cannot be cast to 'int8'"):
        Densify("int8")


def test_what_stays_packed_is_told(tmp_path: Path) -> None:
    packed = {
        "q.qweight": torch.zeros(32, 64, dtype=torch.int32),
        "q.qzeros": torch.zeros(2, 8, dtype=torch.int32),
        "q.scales": torch.ones(2, 64).half(),
        "q.g_idx": (torch.arange(256) // 128).int(),
    }
    save_file(packed, path := tmp_path / "gptq.safetensors")
    report = ckptkit.convert(path, out := tmp_path / "out.safetensors", densify=True)
    (told,) = [finding for finding in report.findings if finding.code == "densified"]
    assert told.severity == "warning"
    assert told.message.startswith("1 module stays quantized: GPTQ, 4 bits, groups of 128 (1 module of qweight, ")
    assert all(torch.equal(tensor, packed[name]) for name, tensor in load_file(out).items())


def test_it_is_offered_where_it_helps(save: Save, tmp_path: Path) -> None:
    path = save({"q": torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8), "a": torch.ones(1)})
    with pytest.raises(RewriteError, match="--exclude q leaves them out, --densify makes dense tensors from them"):
        ckptkit.convert(path, tmp_path / "out.safetensors")
    [found] = [f for f in ckptkit.inspect(path)["findings"] if f["code"] == "not-a-plain-tensor"]
    assert found["fix"].endswith(" --densify")
    path = save({"m": torch.ones(2, device="meta"), "a": torch.ones(1)})
    [found] = [f for f in ckptkit.inspect(path)["findings"] if f["code"] == "not-a-plain-tensor"]
    assert found["fix"] is None
    with pytest.raises(RewriteError, match=r"\): --exclude m leaves them out"):
        ckptkit.convert(path, tmp_path / "out.safetensors")
    save_file(
        {"w": torch.ones(2, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)}, tmp_path / "in.safetensors"
    )
    with pytest.raises(DTypeError, match=r"garbage\. Make them dense with --densify, leave them"):
        ckptkit.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="bfloat16")


# The output's check.


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_flipped_bit_of_what_was_made_is_found(suffix: str, dtype: str | None, save: Save, tmp_path: Path) -> None:
    with opened(save(mixed())) as checkpoint:
        result = checkpoint.rewrite(Densify(dtype))
        path = written(result, tmp_path / f"out{suffix}")
        assert check_output(result, str(path)) > 0
        good = path.read_bytes()
        for offset, nbytes in extents(path).values():
            for at in (offset, offset + nbytes - 1):
                path.write_bytes(good)
                flipped(path, at)
                with pytest.raises(CorruptError, match="the output"):
                    check_output(result, str(path))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_damage_of_what_it_is_made_of_is_found(dtype: str | None, save: Save, tmp_path: Path) -> None:
    path = save({"s": torch.eye(3).to_sparse(), "a": torch.ones(2)})
    with opened(path) as checkpoint:
        parts = list(checkpoint.state_dict.extra["s"].args[1][:2])  # type: ignore[attr-defined]
        places = [entry.storage.source.offset for entry in parts]
    good = path.read_bytes()
    for at, message in (
        (places[1], "tensor 's': the bytes have CRC-32"),
        (places[0] + 1, "index .* of a sparse tensor"),
    ):
        path.write_bytes(good)
        flipped(path, at)
        with pytest.raises(CorruptError, match=message):
            ckptkit.convert(path, tmp_path / "out.safetensors", densify=True, dtype=dtype)
        assert not (tmp_path / "out.safetensors").exists()


def test_indices_outside_are_an_error(save: Save, tmp_path: Path) -> None:
    value = torch.sparse_coo_tensor(torch.tensor([[0, 10**9]]), torch.ones(2), (4,), check_invariants=False)
    csr = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2]), torch.tensor([0, 7]), torch.ones(2), (2, 2), check_invariants=False
    )
    for each in (value, csr):
        with pytest.raises(CorruptError, match=r"tensor 's': index \d+ of a sparse tensor"):
            ckptkit.convert(save({"s": each}), tmp_path / "out.safetensors", densify=True)
        assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("size", [(10**6, 10**6), (10**12,), (1, 10**12)])
def test_a_size_beyond_all_use_is_refused(size: tuple[int, ...], save: Save, tmp_path: Path) -> None:
    value = torch.sparse_coo_tensor(torch.zeros(len(size), 1, dtype=torch.int64), torch.ones(1), size)
    for dry_run in (True, False):
        with pytest.raises(RewriteError, match=r"would take 3,999,999,999,.* over the limit .* --exclude s"):
            ckptkit.convert(save({"s": value}), tmp_path / "out.pth", densify=True, dry_run=dry_run)
    assert list(tmp_path.glob("out*")) == []


def test_elements_that_are_repeated_are_bounded(save: Save, tmp_path: Path) -> None:
    one = torch.quantize_per_tensor(torch.ones(1), 0.5, 0, torch.qint8).expand(10**12)
    with pytest.raises(RewriteError, match=r"would take 3,999,999,999,999 bytes more .* --exclude q"):
        ckptkit.convert(save({"q": one}), tmp_path / "out.pth", densify=True)
    few = torch.quantize_per_tensor(torch.ones(1), 0.5, 0, torch.qint8).expand(1000)
    assert_dense(save({"q": few}), {"q": few})
    many = torch.sparse_coo_tensor(torch.zeros(0, 10**12, dtype=torch.int64), torch.ones(1).expand(10**12), ())
    with pytest.raises(RewriteError, match="tensor 's': its values overlap in storage"):
        ckptkit.convert(save({"s": many}), tmp_path / "out.pth", densify=True)
    none = torch.sparse_coo_tensor(torch.zeros(0, 3, dtype=torch.int64), torch.tensor([1.0, 2.0, 4.5]), ())
    assert_dense(save({"s": none}), {"s": none})


def test_files_of_the_other_byte_order(save: Save) -> None:
    value = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), torch.randn(3, 2, dtype=torch.float64), (4, 2))

    def swapped(name: str, data: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        words = [data[at : at + 8][::-1] for at in range(0, len(data), 8)]
        return b"".join(words) if name.startswith("data/") else data

    path = with_data(save({"s": value}), swapped)
    ckptkit.convert(path, path.with_name("out.safetensors"), densify=True)
    assert_equal(load_file(path.with_name("out.safetensors"))["s"], value.to_dense())


def test_memory_is_bounded(save: Save, tmp_path: Path) -> None:
    value = torch.sparse_coo_tensor(torch.tensor([[5, 9_999], [7, 9_999]]), torch.ones(2), (10_000, 10_000))
    path = save({"s": value, "w": torch.ones(2)})
    with opened(path) as checkpoint:
        result = Densify()(checkpoint)
        source = result.state_dict["s"].storage.source
        assert isinstance(source, DenseRange)
        tracemalloc.start()
        for chunk in source.part(0, 160 << 20).chunks():
            assert len(chunk) <= 4 << 20
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        tracemalloc.stop()
    report = ckptkit.convert(path, tmp_path / "out.safetensors", densify=True, dry_run=True)
    assert report.details["plan"]["casts"] == {"count": 1, "nbytes": 400_000_000}


def test_views_of_a_rewritten_checkpoint_read_like_others(save: Save) -> None:
    with opened(save(mixed())) as checkpoint:
        result: Checkpoint = checkpoint.rewrite(Densify("bfloat16"))
        entry = result.state_dict["q"]
        assert isinstance(entry.storage.source, ConvertedRange)
        assert entry.storage.source.read(3, 7) == entry.storage.source.plain().read(3, 7)
        whole = b"".join(entry.storage.source.chunks(100))
        assert whole == bits(mixed()["q"].dequantize().bfloat16())
        with pytest.raises(CorruptError, match="are not inside a range"):
            entry.storage.source.part(1, entry.nbytes)


# torchao's tensors: stand-ins that are pickled as its own are, and, where it is installed, those.


class Wrapper(torch.Tensor):
    """A tensor that keeps others in its ``__dict__`` and has no bytes of its own."""

    @staticmethod
    def __new__(cls, shape: Any, dtype: torch.dtype, **kept: Any) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[attr-defined]

    def __init__(self, shape: Any, dtype: torch.dtype, **kept: Any) -> None:
        vars(self).update(kept)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = args[0]
        return type(own)(own.shape, own.dtype, **vars(own)) if func is torch.ops.aten.detach.default else NotImplemented


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``torchao("quantization.Int8Tensor")``: a class of that name."""

    def named(path: str) -> Any:
        module, _, name = f"torchao.{path}".rpartition(".")
        made = type(name, (Wrapper,), {"__module__": module})
        for count in range(1, module.count(".") + 2):
            above = ".".join(module.split(".")[:count])
            monkeypatch.setitem(sys.modules, above, sys.modules.get(above) or ModuleType(above))
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        return made

    return named


def affine(numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``dequantize_affine`` of torchao 0.13 to 0.18, of groups of columns."""
    groups = numbers.reshape(len(numbers), scale.shape[-1] if scale.dim() > 1 else 1, -1).to(dtype)
    groups = groups if zero is None else groups - zero.reshape(len(numbers), -1, 1).to(dtype)
    return (groups * scale.reshape(len(numbers), -1, 1)).reshape(numbers.shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
def test_torchao_by_its_tensors(torchao: Any, save: Save, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    numbers = torch.randint(-128, 127, (6, 32)).to(torch.int8)
    scale, zero = (torch.rand(6, groups) + 0.01).to(dtype), torch.randint(-9, 9, (6, groups))
    block = {"block_size": (1, 32 // groups)}
    eighths = torch.randn(6, 32).to(torch.float8_e4m3fn)
    plain = torchao("dtypes.uintx.plain_layout.PlainAQTTensorImpl")
    whole = torchao("dtypes.affine_quantized_tensor.AffineQuantizedTensor")
    int8 = torchao("quantization.Int8Tensor")
    float8 = torchao("quantization.Float8Tensor")
    dynamic = torchao("quantization.linear_activation_quantized_tensor.LinearActivationQuantizedTensor")
    lying = plain((6, 32), torch.int8, int_data=numbers, scale=scale, zero_point=zero, _layout=None)
    aqt = whole((6, 32), dtype, tensor_impl=lying, quant_min=None, quant_max=None, zero_point_domain=None, **block)
    old = whole((6, 32), dtype, layout_tensor=lying, zero_point_domain=None, **block)
    wide = scale.float()
    tensors_of = {
        "aqt": aqt, "old": old, "dynamic": dynamic((6, 32), dtype, original_weight_tensor=aqt, input_quant_func=None),
        "int8": int8((6, 32), dtype, qdata=numbers, scale=scale, zero_point=zero.to(torch.int8), **block),
        "symmetric": int8((6, 32), dtype, qdata=numbers, scale=wide, zero_point=None, act_pre_scale=None, **block),
        "float8": float8((6, 32), dtype, qdata=eighths, scale=wide, mm_config=None, **block),
    }  # fmt: skip
    expected = {
        **dict.fromkeys(("aqt", "old", "dynamic", "int8"), affine(numbers, scale, zero, dtype)),
        "symmetric": affine(numbers, wide, None, dtype),
        "float8": affine(eighths.float(), wide, None, torch.float32).to(dtype),
    }
    path = save({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors_of.items()})
    ckptkit.convert(path, path.with_name("out.safetensors"), densify=True)
    got = load_file(path.with_name("out.safetensors"))
    for name, tensor in expected.items():
        assert_equal(got[name], tensor, name)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another": (
        "quantization.Int4Tensor",
        {"qdata": torch.ones(2, 4), "scale": torch.ones(2)},
        "Int4Tensor, which the",
    ),
    "inputs scaled": (
        "quantization.Int8Tensor",
        {"qdata": torch.ones(4, 4, dtype=torch.int8), "scale": torch.ones(4), "act_pre_scale": torch.ones(4)},
        "whose inputs are scaled too",
    ),
    "does not fit": (
        "quantization.Int8Tensor",
        {"qdata": torch.ones(4, 4, dtype=torch.int8), "scale": torch.ones(3)},
        "do not fit together",
    ),
    "no layout": (
        "dtypes.AffineQuantizedTensor",
        {"tensor_impl": torch.ones(4, 4)},
        "the layout of its numbers is unknown",
    ),
    "of another type": (
        "quantization.Int8Tensor",
        {"qdata": torch.ones(4, 4, dtype=torch.int32), "scale": torch.ones(4)},
        "of int32 with scales of float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_torchao_that_is_not_known_is_refused_by_name(torchao: Any, save: Save, case: str) -> None:
    cls, parts, message = REFUSED[case]
    path = save({"w": torchao(cls)((4, 4), torch.float32, block_size=(1, 4), **parts), "a": torch.ones(1)})
    with pytest.raises(RewriteError, match=rf"1 value cannot be made dense: w \(.*{message}.*\); --exclude w"):
        ckptkit.convert(path, path.with_name("out.safetensors"), densify=True)
    with pytest.raises(RewriteError, match=r"tensors of other classes \(w"):
        ckptkit.convert(path, path.with_name("out.safetensors"))


# With other options.


def test_like_the_float_model(save: Save) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(torch.ao.nn.quantized.Linear(6, 5), nn.ReLU(), torch.ao.nn.quantized.Linear(5, 2))
    path = save(module.state_dict())
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    like = save(model.state_dict(), "like.pth")
    out = path.with_name("out.safetensors")
    report = ckptkit.convert(path, out, densify=True, like=str(like), dtype="bfloat16")
    assert report.details["dropped"] == ["0.scale", "0.zero_point", "2.scale", "2.zero_point"]
    model.bfloat16().load_state_dict(load_file(out))
    assert_equal(model[0].weight.detach(), module[0].weight().dequantize().bfloat16())


@pytest.mark.parametrize("to", ["safetensors-sharded", "torch-sharded"])
def test_in_shards(to: str, save: Save) -> None:
    saved = mixed()
    ending = "safetensors" if to.startswith("s") else "bin"
    out = save(saved).with_name(f"out.{ending}.index.json")
    ckptkit.convert(out.with_name("model.pth"), out, densify=True, to=to, max_shard_size=4000, dtype="float16")
    got = ckptkit.load_state_dict(out)
    for name, value in saved.items():
        expected = dense_of(value)
        assert_equal(got[name], expected.half() if expected.is_floating_point() else expected, name)


def test_keep_dtype_keeps_what_was_made(save: Save) -> None:
    path = save(mixed())
    ckptkit.convert(path, path.with_name("out.safetensors"), densify=True, dtype="bfloat16", keep_dtype="q")
    got = load_file(path.with_name("out.safetensors"))
    assert (got["q"].dtype, got["a"].dtype) == (torch.float32, torch.bfloat16)
