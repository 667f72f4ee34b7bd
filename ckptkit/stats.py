"""Statistics of a tensor's values, streamed: the one thing `inspect` reads tensor bytes for."""

from __future__ import annotations

import math
from typing import Any

from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.transfer import stream

__all__ = ["tensor_stats"]


def tensor_stats(entry: TensorEntry) -> dict[str, float | int | None]:
    """min, max, mean, std (population), and the counts of zeros, NaN and Inf.

    Moments are of the finite values, in float64; ``None`` where there are none, or where the dtype
    has no order (complex) or no values numpy knows.
    """
    row = DTYPES[entry.dtype]
    result: dict[str, float | int | None] = dict.fromkeys(("min", "max", "mean", "std", "zeros", "nan", "inf"))
    if row.numpy is None or row.kind == "complex":
        return result
    dtype = _numpy_dtype(row.numpy)
    low, high, count, mean, squares = math.inf, -math.inf, 0, 0.0, 0.0
    zeros = nan = inf = 0
    for chunk in stream(entry):
        values = _as_float64(chunk, dtype)
        import numpy

        finite = values[numpy.isfinite(values)]
        zeros += int((values == 0).sum())
        nan += int(numpy.isnan(values).sum())
        inf += int(numpy.isinf(values).sum())
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            # Chan, Golub and LeVeque's merging of moments: exact enough at any length.
            part_mean = float(finite.mean())
            part_squares = float(((finite - part_mean) ** 2).sum())
            total = count + finite.size
            delta = part_mean - mean
            squares += part_squares + delta * delta * count * finite.size / total
            mean += delta * finite.size / total
            count = total
    result.update(zeros=zeros, nan=nan, inf=inf)
    if count:
        result.update(min=low, max=high, mean=mean, std=math.sqrt(squares / count))
    return result


def _numpy_dtype(name: str) -> Any:
    import numpy

    if name.startswith("ml_dtypes."):
        import ml_dtypes

        return numpy.dtype(getattr(ml_dtypes, name.removeprefix("ml_dtypes.")))
    return numpy.dtype(name)


def _as_float64(chunk: bytes, dtype: Any) -> Any:
    import numpy

    return numpy.frombuffer(chunk, dtype=dtype).astype(numpy.float64)
