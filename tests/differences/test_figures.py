"""The figures of a difference: torch computes them too, over random bits of every dtype."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.generated_tensors import STORABLE

import ckptkit
from ckptkit.dtypes import DTYPES

COMPUTED = [name for name in STORABLE if DTYPES[name].numpy is not None]
FLOATS = [name for name in COMPUTED if DTYPES[name].kind == "float"]
INTS = [name for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32") if name in STORABLE]

pytestmark = pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")


def random_bits(dtype: str, numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (numel * DTYPES[dtype].itemsize,), dtype=torch.uint8, generator=generator)
    return raw & 1 != 0 if dtype == "bool" else raw.view(getattr(torch, dtype))


def numbers(dtype: str, numel: int, seed: int) -> torch.Tensor:
    """Ordinary values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, 2, generator=generator, dtype=torch.float64)
    if DTYPES[dtype].kind == "complex":
        return torch.view_as_complex(values).to(getattr(torch, dtype))
    if DTYPES[dtype].kind in ("int", "bool"):
        return random_bits(dtype, numel, seed)
    return values[:, 0].abs().to(getattr(torch, dtype))


def changed(folder: Path, a: torch.Tensor, b: torch.Tensor, key: str = "changed") -> dict:
    torch.save({"w": a}, folder / "a.pth")
    torch.save({"w": b}, folder / "b.pth")
    rows = ckptkit.diff(folder / "a.pth", folder / "b.pth").to_dict()[key]
    assert len(rows) == 1
    return rows[0]


def parts(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, one row an element."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128))
    return tensor.to(torch.float64).reshape(-1, 1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(tensor.numel(), -1)


def oracle(a: torch.Tensor, b: torch.Tensor) -> dict:
    x, y = parts(a), parts(b)
    finite = torch.isfinite(x).all(1) & torch.isfinite(y).all(1)
    nan_a, nan_b = x.isnan().any(1), y.isnan().any(1)
    same = (bits(a) == bits(b)).all(1)
    p, q = x[finite], y[finite]
    apart = (q - p).abs()[:, 0] if p.shape[1] == 1 else torch.hypot(*(q - p).T)
    alike = (x == y).all(1)
    return {
        "max_abs": apart.max().item() if len(apart) else None,
        "mean_abs": apart.mean().item() if len(apart) else None,
        "relative_norm": ((q - p).norm() / p.norm()).item(),
        "cosine": torch.nn.functional.cosine_similarity(p.flatten(), q.flatten(), dim=0, eps=0).item(),
        "equal_share": same.double().mean().item(),
        "differing": int((~same).sum()),
        "nan_a": int((nan_a & ~nan_b).sum()),
        "nan_b": int((nan_b & ~nan_a).sum()),
        "nan_both": int((nan_a & nan_b).sum()),
        "signs": int(((x.signbit() != y.signbit()) & x.isnan() & y.isnan()).any(1).sum()),
        "zero_signs": int((alike & ~same).sum()),
        "infinite": int((~finite & ~nan_a & ~nan_b & ~alike).sum()),
    }


def held(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def agree(row: dict, expected: dict) -> None:
    flat = {**row, **{f"nan_{side}": row["nan"][side] for side in ("a", "b", "both")}, "signs": row["nan"]["signs"]}
    for key in ("max_abs", "mean_abs", "relative_norm", "cosine", "equal_share"):
        value = held(expected[key])
        assert flat[key] == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)), key
    for key in ("differing", "nan_a", "nan_b", "nan_both", "signs", "zero_signs", "infinite"):
        assert flat[key] == expected[key], key


@pytest.mark.parametrize("dtype", COMPUTED)
def test_ordinary_values(tmp_path: Path, dtype: str) -> None:
    a, b = numbers(dtype, 70_001, 1), numbers(dtype, 70_001, 2)
    b[:1000] = a[:1000]
    agree(changed(tmp_path, a, b), oracle(a, b))


@pytest.mark.parametrize("dtype", [name for name in COMPUTED if DTYPES[name].kind in ("float", "complex")])
def test_random_bits(tmp_path: Path, dtype: str) -> None:
    a, b = random_bits(dtype, 40_000, 3), random_bits(dtype, 40_000, 4)
    bits(b)[::3] = bits(a)[::3]
    if dtype in ("float64", "complex128"):  # whose squares float64 does not hold
        row, expected = changed(tmp_path, a, b), oracle(a, b)
        assert row["relative_norm"] is None
        agree({**row, "cosine": None}, {**expected, "relative_norm": None, "cosine": None})
    else:
        agree(changed(tmp_path, a, b), oracle(a, b))


def test_whole_numbers_are_exact(tmp_path: Path) -> None:
    a = torch.tensor([2**62 + 1, -(2**63), 5])
    b = torch.tensor([2**62, 2**63 - 1, 5])
    row = changed(tmp_path, a, b)
    assert row["max_abs"] == 2**64 - 1  # float64 would say 2**64
    assert row["mean_abs"] == 2**64 / 3
    assert row["equal_share"] == pytest.approx(1 / 3)
    assert changed(tmp_path, a[:1], b[:1])["max_abs"] == 1
    if hasattr(torch, "uint64"):
        unsigned = torch.tensor([2**64 - 1, 1], dtype=torch.uint64), torch.tensor([2**64 - 2, 1], dtype=torch.uint64)
        assert changed(tmp_path, *unsigned)["max_abs"] == 1


def test_zeros_of_other_sign(tmp_path: Path) -> None:
    row = changed(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (row["max_abs"], row["zero_signs"], row["only_zero_signs"], row["equal_share"]) == (0, 1, True, 0.5)
    row = changed(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 2.0]))
    assert (row["max_abs"], row["zero_signs"], row["only_zero_signs"]) == (1, 1, False)


def test_nan(tmp_path: Path) -> None:
    nan = float("nan")
    a = torch.tensor([nan, nan, 1.0, nan, 4.0])
    b = torch.tensor([nan, 1.0, nan, -nan, 4.0])
    b[3] = torch.tensor([0xFFC00000 - 2**32], dtype=torch.int32).view(torch.float32)[0]
    row = changed(tmp_path, a, b)
    assert row["nan"] == {"a": 1, "b": 1, "both": 2, "signs": 1}
    assert (row["differing"], row["max_abs"], row["only_nan_bits"]) == (3, 0, False)
    assert changed(tmp_path, a[3:], b[3:])["only_nan_bits"]


def test_infinities(tmp_path: Path) -> None:
    inf = float("inf")
    row = changed(tmp_path, torch.tensor([inf, inf, 1.0, 2.0]), torch.tensor([inf, -inf, inf, 3.0]))
    assert (row["infinite"], row["max_abs"], row["mean_abs"]) == (2, 1.0, 1.0)


def test_nothing_finite_has_no_figures(tmp_path: Path) -> None:
    row = changed(tmp_path, torch.tensor([float("nan")]), torch.tensor([float("inf")]))
    assert [row[key] for key in ("max_abs", "mean_abs", "relative_norm", "cosine")] == [None] * 4


def test_expanded_tensors(tmp_path: Path) -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    row = changed(tmp_path, a.expand(1000, 2), b.expand(1000, 2))
    assert (row["elements"], row["differing"], row["max_abs"], row["mean_abs"]) == (2000, 1000, 1.0, 0.5)
    agree(row, oracle(a.repeat(1000, 1).flatten(), b.repeat(1000, 1).flatten()))


@pytest.mark.parametrize("layout", ["transposed", "strided", "conjugated", "negated"])
def test_views(tmp_path: Path, layout: str) -> None:
    a, b = torch.randn(300, 300, dtype=torch.complex64), torch.randn(300, 300, dtype=torch.complex64)
    view = {
        "transposed": lambda t: t.T,
        "strided": lambda t: t[::2, 1::3],
        "conjugated": lambda t: t.conj(),
        "negated": lambda t: t.conj().imag,
    }[layout]
    plain = view(b).resolve_conj().resolve_neg().contiguous()
    agree(
        changed(tmp_path, view(a), plain),
        oracle(view(a).resolve_conj().resolve_neg().contiguous().flatten(), plain.flatten()),
    )


# Casts.


def after_cast(folder: Path, a: torch.Tensor, b: torch.Tensor) -> bool:
    equal = changed(folder, a, b, "recast")["equal_after_cast"]
    assert changed(folder, b, a, "recast")["equal_after_cast"] is equal
    return equal


@pytest.mark.parametrize("wide", FLOATS)
@pytest.mark.parametrize("narrow", FLOATS)
def test_floats_are_equal_after_the_cast(tmp_path: Path, wide: str, narrow: str) -> None:
    if wide == narrow or DTYPES[wide].itemsize < DTYPES[narrow].itemsize or narrow == "float8_e8m0fnu":
        return
    a = numbers(wide, 5000, 5)
    b = a.to(getattr(torch, narrow))
    assert after_cast(tmp_path, a, b) is True
    bits(b)[7] ^= 1
    assert after_cast(tmp_path, a, b) is False


@pytest.mark.parametrize("wide", [*INTS, "bool"])
@pytest.mark.parametrize("narrow", ["float64", "float32", "float16", "bfloat16", "int8", "bool"])
def test_whole_numbers_are_equal_after_the_cast(tmp_path: Path, wide: str, narrow: str) -> None:
    if wide == narrow:
        return
    a = torch.arange(2 if "bool" in (wide, narrow) else 100).to(getattr(torch, wide))
    b = a.to(getattr(torch, narrow))
    assert after_cast(tmp_path, a, b) is True
    b = (b == 0) if narrow == "bool" else b + 1
    assert after_cast(tmp_path, a, b) is False


def test_large_whole_numbers(tmp_path: Path) -> None:
    large = torch.tensor([2**63 - 1])
    assert after_cast(tmp_path, large, large.to(torch.float32))
    if hasattr(torch, "uint64"):
        assert after_cast(tmp_path, large, large.to(torch.uint64))
        assert not after_cast(tmp_path, large, torch.tensor([2**63], dtype=torch.uint64))


def test_complex_numbers_are_equal_after_the_cast(tmp_path: Path) -> None:
    a = numbers("complex128", 100, 6)
    b = a.to(torch.complex64)
    assert after_cast(tmp_path, a, b) is True
    b[3] += 1
    assert after_cast(tmp_path, a, b) is False
    assert (
        after_cast(tmp_path, a.real.contiguous(), torch.complex(a.real, torch.zeros(100, dtype=torch.float64))) is True
    )


def test_a_nan_stays_one(tmp_path: Path) -> None:
    a = torch.tensor([float("nan"), 1.0])
    assert after_cast(tmp_path, a, a.half())
    assert not after_cast(tmp_path, a, torch.tensor([2.0, 1.0]).half())
