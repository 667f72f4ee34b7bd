"""By how much the values of two tensors differ: sums to which pieces contribute, and the figures computed from them.

- Differences are of the elements that are finite in both, in float64; of whole numbers they are exact, whatever
  their size.  For complex numbers the absolute difference is the modulus, and norms and cosine are those of the vector
  of real and imaginary parts.
- Two elements are *equal* where their bits are; of tensors of different dtypes, where their values are.
- A zero and a negative zero are equal in value and not in bits.  They are counted, and so are NaN on one side,
  on both, and of those the ones whose sign differs.
- An element is within tolerance where |b - a| is at most ``atol + rtol * max(|a|, |b|)``, so that it
  does not matter which of the files is named first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ckptkit.arguments import tolerance
from ckptkit.casting import CAST_SOURCES, CAST_TARGETS, caster, numpy_dtype
from ckptkit.checkpoint import TensorEntry
from ckptkit.differences.bits import chunks_side_by_side
from ckptkit.dtypes import DTYPES
from ckptkit.startup import dataclass

__all__ = ["MEASURED", "Sums", "Tolerance", "is_measurable", "measure_pair"]

MEASURED = 1 << 22
"""Elements of a tensor that one thread measures before it looks for other work."""

_BLOCK = 1 << 15
"""Elements measured at a time: with all intermediate results they fit into a core's own cache."""

_WHOLE = ("int", "bool")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far values may be apart and still count as unchanged; see the module.

    Raises:
        VerifyError: nothing could be within it, or everything.
    """

    atol: float = 0.0
    rtol: float = 0.0

    def __post_init__(self) -> None:
        for name in ("atol", "rtol"):
            object.__setattr__(self, name, tolerance(name, getattr(self, name)) or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Facts about some elements; those of several pieces can be added.

    Attributes:
        numel: how many elements there are.
        equal: of them, equal ones.
        finite: finite in both.
        total: sum of the absolute differences; ``largest``: the largest.  Python's own integers where both are
            whole numbers.
        squares, squares_a, squares_b, product: sums of (b - a)², a², b² and a·b.
        nan_a, nan_b, nan_both: NaN only in the first, only in the second, in both.
        nan_bits, nan_signs: NaN in both with other bits, and of those with another sign.
        zero_signs: equal in value, but one of them a negative zero.
        infinite: not NaN, infinite in one of them, and not equal.
        outside: not within tolerance.
        uncast, uncast_back: not equal after the cast, in one direction and in the other; see `_cast_differs`.
    """

    numel: int = 0
    equal: int = 0
    finite: int = 0
    total: float = 0
    largest: float = 0
    squares: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    product: float = 0.0
    nan_a: int = 0
    nan_b: int = 0
    nan_both: int = 0
    nan_bits: int = 0
    nan_signs: int = 0
    zero_signs: int = 0
    infinite: int = 0
    outside: int = 0
    uncast: int = 0
    uncast_back: int = 0

    def __add__(self, other: Sums) -> Sums:
        added = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Sums)}
        return Sums(**{**added, "largest": max(self.largest, other.largest)})

    def times(self, copies: int) -> Sums:
        """The sums if each element occurs so often."""
        if copies == 1:
            return self
        multiplied = {each.name: getattr(self, each.name) * copies for each in fields(Sums)}
        return Sums(**{**multiplied, "largest": self.largest})

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON; ``None`` for one that is undefined or does not fit a float64."""
        norms = math.sqrt(self.squares_a), math.sqrt(self.squares_b)
        mean = self.total / self.finite if self.finite else None
        cosine = _ratio(self.product, norms[0] * norms[1])
        return {
            "max_abs": _held(self.largest) if self.finite else None,
            "mean_abs": _held(mean),
            "relative_norm": _ratio(math.sqrt(self.squares), norms[0]),
            "cosine": None if cosine is None else max(-1.0, min(1.0, cosine)),
            "equal_share": self.equal / self.numel if self.numel else 1.0,
            "elements": self.numel,
            "differing": self.numel - self.equal,
            "nan": {"a": self.nan_a, "b": self.nan_b, "both": self.nan_both, "signs": self.nan_signs},
            "infinite": self.infinite,
            "zero_signs": self.zero_signs,
            "only_zero_signs": 0 < self.zero_signs == self.numel - self.equal,
            "only_nan_bits": 0 < self.nan_bits == self.numel - self.equal,
        }


def _held(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) or math.isfinite(value) else None


def _ratio(above: float, below: float) -> float | None:
    if not below or not math.isfinite(below) or not math.isfinite(above):
        return None
    return above / below


def is_measurable(dtype: str) -> bool:
    """Whether numpy knows the values of a dtype."""
    return DTYPES[dtype].numpy is not None


def measure_pair(a: TensorEntry, b: TensorEntry, tolerance: Tolerance, measured: Callable[[int], object]) -> Sums:
    """The sums over two tensors of as many elements, of dtypes that numpy knows.

    Args:
        a: the first tensor.
        b: the second.
        tolerance: what `Sums.outside` is counted by.
        measured: called with the bytes that were processed.
    """
    import numpy

    sums = Sums()
    with numpy.errstate(all="ignore"):  # signaling NaN, and values beyond float64
        for left, right in chunks_side_by_side(a, b, _BLOCK):
            sums += _block(left, right, a.dtype, b.dtype, tolerance)
            measured(len(left) + len(right))
    return sums


def _block(left: memoryview, right: memoryview, a: str, b: str, tolerance: Tolerance) -> Sums:
    kinds = {DTYPES[a].kind, DTYPES[b].kind}
    # Of uint64 and a signed type the differences need 65 bits.
    if kinds <= {*_WHOLE} and (a == b or "uint64" not in (a, b)):
        return _whole(left, right, a, b, tolerance)
    sums = _finite(left, right, a, b, tolerance) if kinds <= {"float", *_WHOLE} else None
    return _any(left, right, a, b, tolerance) if sums is None else sums


def _whole(left: memoryview, right: memoryview, a: str, b: str, tolerance: Tolerance) -> Sums:
    """Whole numbers: their differences are computed as unsigned integers, which can represent all of them."""
    import numpy

    wide = numpy.uint64 if a == "uint64" else numpy.int64
    x, y = _values(left, a).astype(wide), _values(right, b).astype(wide)
    u, v = x.view(numpy.uint64), y.view(numpy.uint64)
    apart = numpy.where(x >= y, u - v, v - u)
    unlike = x != y
    p, q, step = x.astype(numpy.float64), y.astype(numpy.float64), apart.astype(numpy.float64)
    outside = unlike & ~(step <= tolerance.atol + tolerance.rtol * numpy.maximum(numpy.abs(p), numpy.abs(q)))
    same = _same_bits(left, right, DTYPES[a].itemsize) if a == b else ~unlike
    return Sums(
        numel=x.size, equal=_count(same), finite=x.size,
        total=(int((apart >> numpy.uint64(32)).sum()) << 32) + int((apart & numpy.uint64(0xFFFFFFFF)).sum()),
        largest=int(apart.max()), squares=_dot(step, step), squares_a=_dot(p, p), squares_b=_dot(q, q),
        product=_dot(p, q), outside=_count(outside), uncast=_count(unlike), uncast_back=_count(unlike),
    )  # fmt: skip


def _finite(left: memoryview, right: memoryview, a: str, b: str, tolerance: Tolerance) -> Sums | None:
    """Real numbers that are all finite, which most are; ``None``: some are not, or their squares are not."""
    import numpy

    p, q = _values(left, a).astype(numpy.float64), _values(right, b).astype(numpy.float64)
    squares_a, squares_b = _dot(p, p), _dot(q, q)
    if not math.isfinite(squares_a + squares_b) or (a != b and "uint64" in (a, b)):
        return None
    step = numpy.abs(q - p)
    unlike = step != 0
    count = _count(unlike)
    equal, uncast = p.size - count, (0, 0)
    if a == b:
        equal = _count(_same_bits(left, right, DTYPES[a].itemsize))
    elif count:
        uncast = _cast_differs(left, right, a, b, ~unlike)
    outside = count
    if tolerance != Tolerance():
        reach = numpy.maximum(numpy.abs(p), numpy.abs(q))
        outside = _count(unlike & (step > tolerance.atol + tolerance.rtol * reach))
    return Sums(
        numel=p.size, equal=equal, finite=p.size, total=float(step.sum()), largest=float(step.max()),
        squares=_dot(step, step), squares_a=squares_a, squares_b=squares_b, product=_dot(p, q),
        zero_signs=p.size - count - equal if a == b else 0, outside=outside, uncast=uncast[0], uncast_back=uncast[1],
    )  # fmt: skip


def _any(left: memoryview, right: memoryview, a: str, b: str, tolerance: Tolerance) -> Sums:
    """Any numbers: complex ones, NaN and Inf among them."""
    import numpy

    x, y = _values(left, a), _values(right, b)
    p, q = _parts(x, a), _parts(y, b)  # one row an element: its value, or real and imaginary part
    if p.shape != q.shape:
        p, q = (_with_imaginary(part) for part in (p, q))
    nan_p, nan_q = numpy.isnan(p).any(axis=1), numpy.isnan(q).any(axis=1)
    both = nan_p & nan_q
    alike = (p == q).all(axis=1)
    if {DTYPES[a].kind, DTYPES[b].kind} <= {*_WHOLE}:  # one is uint64: float64 rounds what 64 bits tell apart
        alike = (x >= 0) & (y >= 0) & (x.astype(numpy.uint64) == y.astype(numpy.uint64))
    finite = numpy.isfinite(p).all(axis=1) & numpy.isfinite(q).all(axis=1)
    difference = numpy.where(finite[:, None], q - p, 0.0)
    step = _moduli(difference)
    reach = numpy.maximum(_moduli(p), _moduli(q))
    close = finite & (step <= tolerance.atol + tolerance.rtol * reach)
    same, nan_signs = (alike | both), 0
    if a == b:
        same = _same_bits(left, right, DTYPES[a].itemsize)
        nan_signs = _count(((numpy.signbit(p) != numpy.signbit(q)) & numpy.isnan(p) & numpy.isnan(q)).any(axis=1))
    uncast, uncast_back = (0, 0) if a == b else _cast_differs(left, right, a, b, alike | both)
    flat_p, flat_q, flat = p[finite].reshape(-1), q[finite].reshape(-1), difference.reshape(-1)
    return Sums(
        numel=x.size, equal=_count(same), finite=_count(finite), total=float(step.sum()),
        largest=float(step.max(initial=0.0)), squares=_dot(flat, flat), squares_a=_dot(flat_p, flat_p),
        squares_b=_dot(flat_q, flat_q), product=_dot(flat_p, flat_q),
        nan_a=_count(nan_p & ~nan_q), nan_b=_count(nan_q & ~nan_p), nan_both=_count(both),
        nan_bits=_count(both & ~same), nan_signs=nan_signs, zero_signs=_count(alike & ~same) if a == b else 0,
        infinite=_count(~finite & ~nan_p & ~nan_q & ~alike), outside=_count(~(alike | both | close)),
        uncast=uncast, uncast_back=uncast_back,
    )  # fmt: skip


def _dot(x: Any, y: Any) -> float:
    """The sum of products, without the threads that a library for matrices would start for it."""
    import numpy

    return float(numpy.einsum("i,i", x, y))


def _count(mask: Any) -> int:
    import numpy

    return int(numpy.count_nonzero(mask))


def _values(data: memoryview | bytes, dtype: str) -> Any:
    """The elements; of a bool whatever is not zero is true, as in C."""
    import numpy

    if DTYPES[dtype].kind == "bool":
        return numpy.frombuffer(data, numpy.uint8) != 0
    return numpy.frombuffer(data, numpy_dtype(dtype))


def _parts(values: Any, dtype: str) -> Any:
    """The values in float64, one row each."""
    import numpy

    if DTYPES[dtype].kind == "complex":
        return values.astype(numpy.complex128).view(numpy.float64).reshape(-1, 2)
    return values.astype(numpy.float64).reshape(-1, 1)


def _with_imaginary(parts: Any) -> Any:
    import numpy

    return parts if parts.shape[1] == 2 else numpy.concatenate([parts, numpy.zeros_like(parts)], axis=1)


def _moduli(parts: Any) -> Any:
    import numpy

    return numpy.abs(parts[:, 0]) if parts.shape[1] == 1 else numpy.hypot(parts[:, 0], parts[:, 1])


def _same_bits(left: memoryview | bytes, right: memoryview | bytes, width: int) -> Any:
    import numpy

    word = f"<u{min(width, 8)}"
    same = numpy.frombuffer(left, word) == numpy.frombuffer(right, word)
    return same if width <= 8 else same.reshape(-1, width // 8).all(axis=1)


# Casts.


def _cast_differs(left: memoryview, right: memoryview, a: str, b: str, alike: Any) -> tuple[int, int]:
    """The elements that a cast does not make equal: of the wider dtype to the narrower, as torch casts.

    The first number is of casts of ``left``, the second of casts of ``right``; of two floating dtypes as wide as
    each other either could be the source.  If there is no such cast, it counts unequal values.  Whole numbers are
    cast to a floating dtype, whatever their widths; between each other their values must be equal.

    Args:
        left: values of dtype ``a``.
        right: values of dtype ``b``.
        a: the one dtype.
        b: the other.
        alike: which values are equal without a cast.
    """
    kinds = DTYPES[a].kind, DTYPES[b].kind
    unlike = _count(~alike)
    if set(kinds) <= {"float", *_WHOLE} and "float" in kinds and unlike:
        wide_a, wide_b = (_width(name) for name in (a, b))
        there = _uncast(left, right, a, b) if wide_a >= wide_b else None
        back = _uncast(right, left, b, a) if wide_b >= wide_a else None
        return (unlike if there is None else there, unlike if back is None else back)
    if kinds == ("complex", "complex") and unlike:
        halves = sorted((a, b), key=lambda name: -DTYPES[name].itemsize)
        parts = {"complex64": "float32", "complex128": "float64"}
        wide, narrow = (left, right) if halves[0] == a else (right, left)
        lost = _uncast_each(wide, narrow, parts[halves[0]], parts[halves[1]]).reshape(-1, 2).any(axis=1)
        return (_count(lost), unlike) if wide is left else (unlike, _count(lost))
    return unlike, unlike


def _width(name: str) -> int:
    """By what dtypes are wider than others: whole numbers are wider than all floating ones."""
    return 64 if DTYPES[name].kind in _WHOLE else DTYPES[name].itemsize


def _uncast(wide: memoryview, narrow: memoryview, a: str, b: str) -> int | None:
    """How many values of ``wide``, of dtype ``a``, cast to ``b`` are not ``narrow``'s; ``None``: no such cast."""
    if b not in CAST_TARGETS or (a not in CAST_SOURCES and DTYPES[a].kind not in _WHOLE):
        return None
    if DTYPES[a].kind in _WHOLE:
        through = "float64" if b == "float64" else "float32"
        values = _values(wide, a).astype(through)
        if through == b:
            return _count(~_equal_or_nan(values, _values(narrow, b)))
        wide, a = memoryview(values.tobytes()), through
    return _count(_uncast_each(wide, narrow, a, b))


def _uncast_each(wide: memoryview, narrow: memoryview, a: str, b: str) -> Any:
    cast = memoryview(caster(a, b)(wide))
    same = _same_bits(cast, narrow, DTYPES[b].itemsize)
    return ~same if same.all() else ~_equal_or_nan(_values(cast, b), _values(narrow, b))


def _equal_or_nan(x: Any, y: Any) -> Any:
    """Where values are equal; a NaN is to every other, since casts do not keep its bits."""
    import numpy

    x, y = x.astype(numpy.float64), y.astype(numpy.float64)
    return (x == y) | (numpy.isnan(x) & numpy.isnan(y))
