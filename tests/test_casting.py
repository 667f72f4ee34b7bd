"""Every cast is torch's, bit for bit, and what it loses is counted."""

from __future__ import annotations

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch

from ckptkit import DTypeError, casting
from ckptkit.casting import CAST_SOURCES, CAST_TARGETS, Losses, caster
from ckptkit.dtypes import DTYPES

HERE = [name for name in CAST_TARGETS if hasattr(torch, name)]
"""What this torch, the judge, can cast to."""

PAIRS = [(before, after) for before in CAST_SOURCES for after in HERE if before != after and hasattr(torch, before)]
DRAWN = 1 << 17
"""How many patterns of a wide type are tried, beside those near boundaries."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = [name for name in CAST_SOURCES if DTYPES[name].itemsize < 4 and hasattr(torch, name)]
UNSIGNED_NAN = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.element_size()])


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def to_tensor(data: bytes, name: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch_dtype(name))


def every_pattern(name: str) -> torch.Tensor:
    """All values of a type of 8 or 16 bits."""
    width = torch_dtype(name).itemsize
    return torch.arange(1 << 8 * width).to(BITS[width]).view(torch_dtype(name))


@functools.cache
def boundaries() -> torch.Tensor:
    """Where the small types change from one value to the next: their values, what lies half-way, what is past them."""
    found = []
    for name in SMALL:
        values = every_pattern(name).to(torch.float64)
        values = values[values.isfinite()].unique()
        step = values[-1] - values[-2]
        past = values[-1] + step * torch.tensor([0.5, 1, 1.5, 2, 100], dtype=torch.float64)
        found += [values, (values[1:] + values[:-1]) / 2, past, -past]
    return torch.cat(found)


@functools.cache
def values_of(name: str, drawn: int = DRAWN) -> torch.Tensor:
    """All values of a small type; of a wide one patterns drawn at random, and every boundary from both sides."""
    if name in SMALL:
        return every_pattern(name)
    dtype = torch_dtype(name)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(1 << 63), (1 << 63) - 1, (drawn,), generator=generator, dtype=torch.int64)
    weights = torch.randn(drawn // 4, generator=generator, dtype=torch.float64)
    edges = boundaries().to(dtype)
    up, down = torch.full_like(edges, float("inf")), torch.full_like(edges, float("-inf"))
    parts = [
        patterns.view(dtype),
        (weights * 0.02).to(dtype),
        (weights * torch.exp2(torch.randint(-150, 140, weights.shape, generator=generator).double())).to(dtype),
        edges, edges.nextafter(up), edges.nextafter(down),
    ]  # fmt: skip
    if name == "float64":  # nearer to the boundary than float32 can tell
        parts += [edges * (1 + 2.0**-40), edges * (1 - 2.0**-40)]
        parts += [patterns.view(torch.float32).double()]
    return torch.cat(parts)


def cast_by_torch(values: torch.Tensor, name: str) -> torch.Tensor:
    """As torch 2.15 casts; before it, float8_e4m3fn had NaN for what is past its range."""
    cast = values.to(torch_dtype(name))
    if name == "float8_e4m3fn":
        wide = values.to(torch.float64)
        past = ~wide.isnan() & (wide.abs() > 464)
        cast = torch.where(past, torch.copysign(torch.tensor(448.0).double(), wide), cast.double()).to(cast.dtype)
    return cast


def counted_slowly(values: torch.Tensor, cast: torch.Tensor) -> Losses:
    wide, back = values.double(), cast.double()
    number, differs = ~wide.isnan(), wide != back
    past = ~back.isfinite()
    if cast.dtype is torch.float8_e4m3fn:
        past |= wide.abs() > 464
    counts = (number & differs & past, number & differs & ~past, number & differs & ~past & (back == 0))
    return Losses(len(values), *(int(count.sum()) for count in counts))


@pytest.mark.parametrize(
    ("before", "after", "drawn"),
    [
        *((before, after, DRAWN) for before, after in PAIRS),
        *(pytest.param(*pair, 1 << 20, marks=pytest.mark.thorough) for pair in PAIRS if pair[0] not in SMALL),
    ],
)
def test_a_cast_is_torchs_and_its_losses_are_counted(before: str, after: str, drawn: int) -> None:
    values = values_of(before, drawn)
    data = to_bytes(values)
    cast = caster(before, after)
    result = cast(data)
    got, expected = to_tensor(result, after), cast_by_torch(values, after)
    nan = expected.double().isnan()
    assert torch.equal(nan, got.double().isnan())
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])
    if after not in UNSIGNED_NAN and before not in UNSIGNED_NAN:
        nan &= values.double().isnan()
        assert torch.equal(bits(got)[nan] < 0, bits(values)[nan] < 0)
    assert cast.losses(data, result) == counted_slowly(values, got)


@pytest.mark.parametrize("name", HERE)
def test_a_cast_to_the_same_dtype_changes_nothing(name: str) -> None:
    data = to_bytes(values_of(name))
    assert caster(name, name)(data) == data
    assert caster(name, name).losses(data, data) == Losses(len(values_of(name)))


def test_a_float64_is_rounded_twice_as_torch_does() -> None:
    value = 1 + 2.0**-8 + 2.0**-40  # a little above half-way between two neighbours in bfloat16
    data = to_bytes(torch.tensor([value], dtype=torch.float64))
    got = to_tensor(caster("float64", "bfloat16")(data), "bfloat16").item()
    assert got == torch.tensor([value], dtype=torch.float64).to(torch.bfloat16).item() == 1
    assert Fraction(value) - 1 > Fraction(1 + 2.0**-7) - Fraction(value)  # the other neighbour is nearer


def test_a_float32_is_rounded_once() -> None:
    data = to_bytes(torch.tensor([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-23, 1 + 3 * 2.0**-8]))
    got = to_tensor(caster("float32", "bfloat16")(data), "bfloat16").tolist()
    assert got == [1, 1 + 2.0**-7, 1 + 2.0**-6]


@pytest.mark.parametrize(
    ("after", "losses"),
    [
        ("float64", Losses(10)),
        ("bfloat16", Losses(10, rounded=3)),
        ("float16", Losses(10, overflowed=2, rounded=2, underflowed=1)),
        ("float8_e5m2", Losses(10, overflowed=2, rounded=3, underflowed=1)),
        ("float8_e4m3fnuz", Losses(10, overflowed=4, rounded=2, underflowed=1)),  # infinity is past its range too
        ("float8_e4m3fn", Losses(10, overflowed=4, rounded=2, underflowed=1)),
    ],
)
def test_losses_by_hand(after: str, losses: Losses) -> None:
    kept = [0.0, -0.0, -1.5, float("nan")]
    data = to_bytes(torch.tensor([*kept, 500, 1 + 2.0**-20, -1e30, 1e-20, 2.0**100, float("inf")]))
    cast = caster("float32", after)
    assert cast.losses(data, cast(data)) == losses


def test_losses_add_up() -> None:
    values = values_of("float32")[:50_001]
    cast = caster("float32", "float16")
    data = to_bytes(values)
    pieces = [data[start : start + 4 * 777] for start in range(0, len(data), 4 * 777)]
    assert sum((cast.losses(piece, cast(piece)) for piece in pieces), Losses()) == cast.losses(data, cast(data))
    assert cast.losses(data, cast(data)).values == 50_001


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_value_is_cast_the_same_wherever_it_stands(before: str, after: str) -> None:
    nan = torch.full((10,), float("nan")).to(torch_dtype(before))
    cast, width = caster(before, after), nan.element_size()
    data = to_bytes(values_of(before)[:3001]) + to_bytes(nan)
    pieces = b"".join(cast(data[start : start + 7 * width]) for start in range(0, len(data), 7 * width))
    assert cast(data) == pieces


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_big_endian_values(before: str, after: str) -> None:
    values = values_of(before)[:5000]
    width = values.element_size()
    data = to_bytes(values)
    swapped = to_bytes(values.contiguous().view(torch.uint8).reshape(-1, width).flip(1))
    cast = caster(before, after, byteorder="big")
    assert cast(swapped) == caster(before, after)(data)
    assert cast.losses(swapped, cast(swapped)) == caster(before, after).losses(data, cast(swapped))


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("float16", "float32"), ("float64", "float16")])
def test_buffers_need_not_be_aligned(before: str, after: str) -> None:
    data = to_bytes(values_of(before)[:4000])
    expected = caster(before, after)(data)
    source, target = bytearray(b"x" + data), bytearray(b"y" * (len(expected) + 2))
    caster(before, after).into(memoryview(source)[1:], memoryview(target)[1:-1])
    assert target == b"y" + expected + b"y"


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_nothing_is_cast_to_nothing(before: str, after: str) -> None:
    assert caster(before, after)(b"") == b""
    assert caster(before, after).losses(b"", b"") == Losses()


def test_threads_share_a_cast() -> None:
    casting._table.cache_clear()
    data = to_bytes(values_of("float32"))
    cast = caster("float32", "float8_e5m2")
    size = 4 * 100_000
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(cast, pieces)) == cast(data)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("float32", "float8_e8m0fnu", "'float8_e8m0fnu'"),
        ("float32", "int64", "'int64'"),
        ("float32", "half", "'half'"),
        ("float32", "", "''"),
        ("float4_e2m1fn_x2", "float32", "'float4_e2m1fn_x2'"),
        ("complex64", "float32", "'complex64'"),
    ],
)
def test_what_cannot_be_cast_is_refused_with_what_can(before: str, after: str, named: str) -> None:
    with pytest.raises(DTypeError, match=f"{named}.*; possible: float64, float32, float16, bfloat16, "):
        caster(before, after)


def test_numpy_is_imported_when_values_are_cast() -> None:
    code = (
        "import sys, ckptkit.casting as c, ckptkit; ckptkit.CastDtype('float16'); f = c.caster('float32', 'float16')\n"
        "print({'numpy', 'ml_dtypes', 'torch'} & set(sys.modules)); f(bytes(4))\n"
        "print({'numpy', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["set()", "{'numpy'}"]
