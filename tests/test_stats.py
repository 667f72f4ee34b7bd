"""Statistics agree with torch's, for every dtype that has values."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.generated_tensors import STORABLE

from ckptkit import formats
from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.stats import Histogram, tensor_stats

Save = Callable[..., Path]
FIGURES = ["min", "max", "mean", "std", "zeros", "nan", "inf"]


@pytest.fixture
def stats(save: Save) -> Callable[[torch.Tensor], dict[str, Any]]:
    def measure(tensor: torch.Tensor) -> dict[str, Any]:
        checkpoint, file = formats.read(save(tensor))
        with closing(file):
            assert isinstance(checkpoint.rest, TensorEntry)
            result = tensor_stats(checkpoint.rest)
        assert list(result) == FIGURES
        json.dumps(result, allow_nan=False)
        return result

    return measure


Stats = Callable[[torch.Tensor], dict[str, Any]]


def as_float64(tensor: torch.Tensor) -> torch.Tensor:
    # float8_e8m0fnu has no conversion to float64 in every torch; all values go through float32 exactly.
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 8 else tensor).double()


def expected(tensor: torch.Tensor) -> dict[str, Any]:
    values = as_float64(tensor)
    finite = values[values.isfinite()]
    counts = {"zeros": int((values == 0).sum()), "nan": int(values.isnan().sum()), "inf": int(values.isinf().sum())}
    if not finite.numel():
        return {**dict.fromkeys(FIGURES), **counts}
    return {
        "min": finite.min().item(),
        "max": finite.max().item(),
        "mean": finite.mean().item(),
        "std": finite.std(correction=0).item(),
        **counts,
    }


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert {k: v for k, v in found.items() if k not in ("mean", "std")} == {
        k: v for k, v in wanted.items() if k not in ("mean", "std")
    }
    for key in ("mean", "std"):
        if wanted[key] is None:
            assert found[key] is None
        else:
            assert math.isclose(found[key], wanted[key], rel_tol=1e-12, abs_tol=1e-300), key


WITH_VALUES = [name for name in STORABLE if DTYPES[name].numpy and DTYPES[name].kind != "complex"]
WITHOUT = [name for name in STORABLE if name not in WITH_VALUES]


@pytest.mark.parametrize("dtype", WITH_VALUES)
def test_every_dtype(stats: Stats, dtype: str) -> None:
    width = DTYPES[dtype].itemsize
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (1024, width), dtype=torch.uint8) if width > 1 else torch.arange(256).to(torch.uint8)
    raw = raw % 2 if dtype == "bool" else raw
    if dtype == "float64":
        raw[:, -1] &= 0xBF  # exponents whose squares float64 holds
    tensor = raw.reshape(-1).view(getattr(torch, dtype))
    found, wanted = stats(tensor), expected(tensor)
    if DTYPES[dtype].kind == "int":
        values = tensor.tolist()
        wanted.update(min=min(values), max=max(values))
    assert_close(found, wanted)


@pytest.mark.parametrize("dtype", WITHOUT)
def test_dtypes_without_ordered_values(stats: Stats, dtype: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.zeros(16, dtype=torch.uint8).view(getattr(torch, dtype))
    assert stats(tensor) == dict.fromkeys(FIGURES)


SPECIAL = {
    "empty": torch.empty(0, 3),
    "0-d": torch.tensor(1.5),
    "all NaN": torch.full((3,), float("nan")),
    "infinities": torch.tensor([float("inf"), -float("inf"), 1.0, 3.0]),
    "zeros": torch.tensor([0.0, -0.0, 1.0]),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "steps": torch.arange(12.0)[1::3],
    "constant": torch.full((1000,), 0.1),
    "offset far from zero": torch.arange(1000.0, dtype=torch.float64) + 1e9,
    "signalling NaN": torch.tensor([0x7FA00000, 0x3F800000], dtype=torch.int32).view(torch.float32),
    "expanded": torch.tensor([0.0, 2.0, float("nan")]).view(3, 1).expand(3, 1000),
    "negative view": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tensors(stats: Stats, name: str) -> None:
    assert_close(stats(SPECIAL[name]), expected(SPECIAL[name]))


def test_chunks_are_merged(stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.transfer.values.CHUNK_NBYTES", 64)
    monkeypatch.setattr("ckptkit.bytesource.CHUNK_NBYTES", 64)
    torch.manual_seed(0)
    tensor = torch.randn(40, 50) + 100
    tensor[::7] = float("nan")
    assert_close(stats(tensor.t()), expected(tensor))
    plain = torch.randn(2 << 20) * 3 - 5  # 8 MiB: two chunks of the real size
    assert_close(stats(plain), expected(plain))


def test_whole_numbers_are_exact(stats: Stats) -> None:
    found = stats(torch.tensor([-(1 << 63), (1 << 63) - 1]))
    assert (found["min"], found["max"]) == (-(1 << 63), (1 << 63) - 1)
    assert isinstance(stats(torch.tensor([True, False]))["max"], (int, float))


def test_figures_float64_cannot_hold_are_left_out(stats: Stats) -> None:
    found = stats(torch.tensor([1e308, 1e308, -1e308], dtype=torch.float64))
    assert (found["min"], found["max"], found["std"]) == (-1e308, 1e308, None)
    found = stats(torch.tensor([1e308] * 4, dtype=torch.float64))
    assert found["mean"] is None
    assert found["inf"] == 0


def test_expanded_tensors_cost_what_they_hold(stats: Stats) -> None:
    found = stats(torch.tensor([3.0, 0.0]).expand(1 << 20, 1 << 20, 2))
    assert (found["mean"], found["zeros"]) == (1.5, 1 << 40)


def test_views_of_far_more_than_they_hold_are_not_gone_through(stats: Stats) -> None:
    assert stats(torch.zeros(1 << 12).as_strided((1 << 11, 1 << 11), (1, 1))) == dict.fromkeys(FIGURES)
    assert stats(torch.arange(100.0).unfold(0, 50, 1))["mean"] == pytest.approx(49.5)


# Histograms, held against numpy's of the same edges.


def counted(tensor: torch.Tensor, save: Save) -> list[int] | None:
    checkpoint, file = formats.read(save(tensor))
    with closing(file):
        assert isinstance(checkpoint.rest, TensorEntry)
        histogram = Histogram(checkpoint.rest.dtype)
        tensor_stats(checkpoint.rest, histogram=histogram)
    return histogram.to_list()


@numpy.errstate(over="ignore")
def opened(found: list[int]) -> tuple[list[int], list[float]]:
    """Counts and edges of what a page is given."""
    exponent, first, *short = found
    counts = [each for count in short for each in ([count] if count >= 0 else [0] * -count)]
    edges = [float(numpy.ldexp(float(first + at), exponent)) for at in range(len(counts) + 1)]  # the last may be inf
    assert 0 < len(counts) <= Histogram.BINS
    assert counts[0] and counts[-1]
    return counts, edges


def assert_counts(found: list[int] | None, values: numpy.ndarray) -> None:
    finite = values[numpy.isfinite(values)]
    if not finite.size:
        assert found is None
        return
    counts, edges = opened(found)
    assert edges[0] <= finite.min() and finite.max() < edges[-1]
    if edges[-1] < math.inf:
        # numpy's last bin is closed: one more takes what would be on its edge.
        wanted, _ = numpy.histogram(finite, [*edges, math.nextafter(edges[-1], math.inf)])
        assert [*counts, 0] == wanted.tolist()
    width = edges[1] - edges[0]
    smaller = width / 2
    narrower = math.floor(finite.max() / smaller) - math.floor(finite.min() / smaller) if smaller else Histogram.BINS
    assert narrower >= Histogram.BINS or width <= max(abs(finite.max()), abs(finite.min())) * 2.0**-51 or width <= 1


@pytest.mark.parametrize("dtype", WITH_VALUES)
def test_every_dtype_has_a_histogram(save: Save, dtype: str) -> None:
    torch.manual_seed(0)
    width = DTYPES[dtype].itemsize
    raw = torch.randint(0, 256, (1024, width), dtype=torch.uint8) if width > 1 else torch.arange(256).to(torch.uint8)
    raw = raw % 2 if dtype == "bool" else raw
    tensor = raw.reshape(-1).view(getattr(torch, dtype))
    assert_counts(counted(tensor, save), as_float64(tensor).numpy())
    if DTYPES[dtype].is_floating:  # of values as models have them
        tensor = (torch.randn(5000) * 0.3).to(tensor.dtype)
        assert_counts(counted(tensor, save), as_float64(tensor).numpy())


@pytest.mark.parametrize("name", [name for name in SPECIAL if name != "signalling NaN"])
def test_histograms_of_special_tensors(save: Save, name: str) -> None:
    found = counted(SPECIAL[name], save)
    assert_counts(found, as_float64(SPECIAL[name]).numpy())
    if name == "expanded":
        assert sum(opened(found)[0]) == 2000


def test_whole_numbers_have_a_bin_each(save: Save) -> None:
    assert counted(torch.tensor([3, 5, 5, -2]), save) == [0, -2, 1, -4, 1, -1, 2]
    assert counted(torch.tensor([True, False, True]), save) == [0, 0, 1, 2]
    assert counted(torch.ones(3, dtype=torch.complex64), save) is None


FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-1, 1) | st.integers(-9, 9).map(float)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # where other work has the cores
@given(st.lists(st.lists(FINITE, min_size=1, max_size=12), min_size=1, max_size=5))
def test_a_histogram_is_the_same_however_the_values_are_cut(pieces: list[list[float]]) -> None:
    whole, cut = Histogram("float64"), Histogram("float64")
    together = numpy.array([value for piece in pieces for value in piece])
    whole.update(together)
    for piece in pieces:
        cut.update(numpy.array(piece))
    assert whole.to_list() == cut.to_list()
    assert sum(opened(whole.to_list())[0]) == together.size
