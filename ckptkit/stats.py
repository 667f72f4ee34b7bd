"""Statistics of a tensor's values, streamed: the one thing `inspect` reads tensor bytes for.

`NonFinite` counts only NaN and Inf, in bytes that the caller reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.transfer.checksums import Checksums
from ckptkit.transfer.values import stream

__all__ = ["NO_STATS", "Histogram", "NonFinite", "count_all", "tensor_stats"]

NO_STATS: Mapping[str, float | int | None] = dict.fromkeys(("min", "max", "mean", "std", "zeros", "nan", "inf"))
"""The statistics of values that cannot be processed."""

_WITHOUT_NAN = ("F4", "F6_E2M3", "F6_E3M2")
"""Floating types in which every pattern is a finite number (OCP Microscaling Formats 1.0, 5.3)."""


def tensor_stats(
    entry: TensorEntry, checksums: Checksums | None = None, histogram: Histogram | None = None
) -> dict[str, float | int | None]:
    """min, max, mean, std (population), and the counts of zeros, NaN and Inf.

    min, max and moments are of the finite values, moments in float64; ``None`` if there are none, if float64 cannot
    represent the figure, or if the dtype has no order (complex) or no values that numpy supports.

    All are ``None``, too, for a view of far more elements than its storage holds, which a few bytes of a file can ask
    for; but expanded dimensions are counted, not processed.

    Args:
        entry: the tensor.
        checksums: what sums the bytes as they pass by.
        histogram: what counts the finite values as they pass by.
    """
    row = DTYPES[entry.dtype]
    result = dict(NO_STATS)
    if row.numpy is None or row.kind == "complex":
        return result
    entry, copies = _unexpanded(entry)
    if entry.nbytes > DEFAULT_LIMITS.overlap * entry.storage.nbytes:
        return result
    import numpy

    from ckptkit.casting import numpy_dtype

    dtype = numpy_dtype(entry.dtype)
    low, high, count, mean, squares = math.inf, -math.inf, 0, 0.0, 0.0
    zeros = nan = inf = 0
    for chunk in stream(entry) if checksums is None else checksums.along(entry, stream(entry)):
        stored = numpy.frombuffer(chunk, dtype=dtype)
        with numpy.errstate(all="ignore"):  # signalling NaN, and squares past float64
            values = stored.astype(numpy.float64)
            is_finite = numpy.isfinite(values)
            finite = values[is_finite]
            zeros += int((values == 0).sum())
            nan += int(numpy.isnan(values).sum())
            inf += int(numpy.isinf(values).sum())
            if not finite.size:
                continue
            if histogram is not None:
                histogram.update(finite, copies)
            # Whole numbers exactly: float64 holds those of 53 bits.
            ordered = stored if row.kind == "int" else finite
            low, high = min(low, ordered.min().item()), max(high, ordered.max().item())
            # Chan, Golub and LeVeque's merging of moments: exact enough at any length.
            part_mean = float(finite.mean())
            part_squares = float(((finite - part_mean) ** 2).sum())
            total = count + finite.size
            delta = part_mean - mean
            squares += part_squares + delta * delta * (count / total) * finite.size
            mean += delta * (finite.size / total)
            count = total
    result.update(zeros=zeros * copies, nan=nan * copies, inf=inf * copies)
    if count:
        std = math.sqrt(squares / count) if squares < math.inf else math.inf
        figures = {"min": low, "max": high, "mean": mean, "std": std}
        result.update({name: value for name, value in figures.items() if math.isfinite(value)})
    return result


class Histogram:
    """Counts finite values in bins of equal width in one pass, whatever comes next.

    The width is a power of two, and each bin begins at a multiple of it: each bin twice as wide is two of these, so
    counts stay exact when bins are merged.  It is the least with which `BINS` bins hold all values, however the values
    are cut into pieces.  Whole numbers have bins no narrower than 1.

    Args:
        dtype: torch name, of the values before they became float64.
    """

    BINS = 64

    __slots__ = ("_counts", "_exponent", "_first")

    def __init__(self, dtype: str) -> None:
        self._exponent = -1074 if DTYPES[dtype].is_floating else 0
        self._first = 0
        self._counts: list[int] = []

    def update(self, values: Any, copies: int = 1) -> None:
        """Count some more.

        Args:
            values: one array of float64, all finite, at least one.
            copies: how often each counts.
        """
        import numpy

        low, high = float(values.min()), float(values.max())
        exponent = max(self._exponent, math.frexp(max(abs(low), abs(high)))[1] - 52)  # floor(value / width) is exact
        if not self._counts and low != high:
            exponent = max(exponent, math.frexp(high / 2 - low / 2)[1] - 5)  # where not even a 64th of the range fits
        while True:
            wider = exponent - self._exponent
            # Of a value below 0 the quotient may be too small for float64; its bin is the first below 0 all the same.
            first, last = (math.floor(math.ldexp(end, -exponent)) or -(end < 0) for end in (low, high))
            if self._counts:
                first = min(first, self._first >> wider)
                last = max(last, (self._first + len(self._counts) - 1) >> wider)
            if last - first < self.BINS:
                break
            exponent += 1
        places = numpy.floor(numpy.ldexp(values, -exponent)).astype(numpy.int64)
        if exponent > 0 and low < 0:
            places[(places == 0) & (values < 0)] = -1
        places -= first
        counts = (numpy.bincount(places, minlength=last - first + 1) * copies).tolist()
        for at, count in enumerate(self._counts, self._first):
            counts[(at >> wider) - first] += count
        self._exponent, self._first, self._counts = exponent, first, counts

    def to_list(self) -> list[int] | None:
        """``[exponent, first, counts...]``: bins ``2 ** exponent`` wide, from ``first * 2 ** exponent`` on.

        A count below 0 means so many empty bins.  ``None`` if nothing was counted.
        """
        if not self._counts:
            return None
        short: list[int] = []
        for count in self._counts:
            if not count and short and short[-1] < 0:
                short[-1] -= 1
            else:
                short.append(count or -1)
        return [self._exponent, self._first, *short]


def _unexpanded(entry: TensorEntry) -> tuple[TensorEntry, int]:
    """The tensor with each expanded dimension (stride 0) taken once, and how often each element is in it."""
    if 0 in entry.shape:
        return entry, 1
    expanded = [size > 1 and stride == 0 for size, stride in zip(entry.shape, entry.stride, strict=True)]
    shape = tuple(1 if again else size for again, size in zip(expanded, entry.shape, strict=True))
    return replace(entry, shape=shape), entry.numel // math.prod(shape)


@lru_cache(64)
def _counted(dtype: str) -> tuple[int | None, Any, int]:
    """Of values of a dtype: how many are not finite before any is counted, what numpy counts as, and its size."""
    row = DTYPES[dtype]
    known = row.numpy is not None or row.kind in ("int", "bool") or row.safetensors in _WITHOUT_NAN
    if row.numpy is None or row.kind not in ("float", "complex"):
        return 0 if known else None, None, 1
    from ckptkit.casting import numpy_dtype

    part = numpy_dtype({"complex64": "float32", "complex128": "float64"}.get(dtype, dtype))
    return 0, part, part.itemsize


class NonFinite:
    """Counts NaN and Inf in values that come in pieces, which need not end where an element does.

    Of a complex element each part counts on its own.  Whole numbers have none; of a dtype whose values numpy does not
    know both are ``None``.

    Args:
        dtype: torch name.
    """

    __slots__ = ("_dtype", "_rest", "_width", "inf", "nan")

    def __init__(self, dtype: str) -> None:
        none, self._dtype, self._width = _counted(dtype)
        self.nan: int | None = none
        self.inf: int | None = none
        self._rest = b""

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Count in the next piece."""
        if self._dtype is None:
            return
        if self._rest or len(data) % self._width:
            data = self._rest + bytes(data)
            whole = len(data) // self._width * self._width
            data, self._rest = data[:whole], data[whole:]
        import numpy

        values = numpy.frombuffer(data, dtype=self._dtype)
        with numpy.errstate(all="ignore"):  # signalling NaN
            finite = int(numpy.count_nonzero(numpy.isfinite(values)))
            if finite != values.size:
                nan = int(numpy.count_nonzero(numpy.isnan(values)))
                self.nan = (self.nan or 0) + nan
                self.inf = (self.inf or 0) + values.size - finite - nan

    @property
    def counts_nothing(self) -> bool:
        """Whether there is nothing to count in values of the dtype."""
        return self._dtype is None

    def are_finite(self, data: bytes) -> bool:
        """Whether all of these values are finite."""
        import numpy

        with numpy.errstate(all="ignore"):
            return len(data) % self._width == 0 and bool(numpy.isfinite(numpy.frombuffer(data, self._dtype)).all())


def count_all(pieces: Sequence[tuple[NonFinite, memoryview]]) -> None:
    """Count in the values of tensors of one dtype, each as a whole: of a hundred thousand of a few elements at once."""
    first = pieces[0][0]
    if first.counts_nothing or (len(pieces) > 1 and first.are_finite(b"".join([data for _, data in pieces]))):
        return
    for counts, data in pieces:
        counts.update(data)
