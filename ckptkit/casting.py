"""Values of one floating dtype become values of another, as ``torch.Tensor.to(dtype)`` makes them.

- Rounding is to nearest, ties to even, subnormal results included.  A float64 is rounded to float32
  first where the target is narrower still, because torch does: the second rounding can meet a tie that the
  first made, and torch's value, not the nearest, is what a cast by hand gives.
- Values beyond the target's range become infinity; NaN in ``float8_e4m3fnuz`` and ``float8_e5m2fnuz``, which have no
  infinity; and in ``float8_e4m3fn``, which has none either, the largest value, 448
  (``torch/headeronly/util/Float8_e4m3fn.h`` of torch 2.15; 2.11 gave NaN).
- A NaN becomes the target's quiet NaN of the same sign, unsigned where the target has no signed one.  Its
  payload is not kept: torch's own depends on the processor.
- ``float8_e8m0fnu`` is only a source.  It has neither sign nor zero: no tensor of weights can be cast to it.
  ``float4_e2m1fn_x2`` packs two values in a byte, and torch casts it neither way.

How: numpy and ml_dtypes between the wide types.  Sources of 8 and 16 bits go through a table of all their
patterns.  To 8 bits a float32 goes through the table of bfloat16, whose pattern is its upper half with the lowest bit
set if any bit below is (rounding to odd): this keeps it on the same side of every tie of an 8-bit type.

Everything is done in blocks that fit into a core's own cache, outside the interpreter lock.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from ckptkit.computed import ConvertedRange, DTypeConversion
from ckptkit.dtypes import DTYPES, meant_dtype
from ckptkit.errors import DTypeError
from ckptkit.startup import dataclass
from ckptkit.tensor import Storage

__all__ = ["CAST_SOURCES", "CAST_TARGETS", "Caster", "Losses", "cast_storage", "caster", "numpy_dtype"]

CAST_TARGETS = (
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip
"""The dtypes that can be cast to."""

CAST_SOURCES = (*CAST_TARGETS, "float8_e8m0fnu")
"""The dtypes that can be cast from."""

_BLOCK = 1 << 17
"""Values converted at a time: with their intermediate results they still fit into a core's own cache, and threads
rarely wait for each other."""

_SATURATES = "float8_e4m3fn"
"""The one type in which values beyond the range become the largest value."""

_LARGEST = 0x7E
"""The bits of that value, 448."""

_PAST = 464.0
"""Half a step above it, which still rounds down to it: anything greater is beyond the range."""

_ROUNDED, _UNDERFLOWED, _OVERFLOWED = 1, 2, 3

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Losses:
    """What casting did to values; those of several pieces can be added.

    A NaN that stays NaN is not a loss.

    Attributes:
        values: how many were cast.
        overflowed: past the target's range: they became infinity, NaN, or the largest value.
        rounded: changed to another value of the target's range.
        underflowed: of the rounded ones, those that became zero.
    """

    values: int = 0
    overflowed: int = 0
    rounded: int = 0
    underflowed: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.values + other.values,
            self.overflowed + other.overflowed,
            self.rounded + other.rounded,
            self.underflowed + other.underflowed,
        )


@dataclass(frozen=True, slots=True)
class Caster:
    """Casts the bytes of whole values; made by `caster`.  May be used by several threads at once.

    Attributes:
        before, after: torch names of the dtypes.
        byteorder: of the values before; those after are little-endian.
    """

    before: str
    after: str
    byteorder: Literal["little", "big"] = "little"

    def __call__(self, values: Bytes) -> bytes:
        """The bytes of the values after the cast."""
        out = bytearray(memoryview(values).nbytes // DTYPES[self.before].itemsize * DTYPES[self.after].itemsize)
        self.into(values, out)
        return bytes(out)

    def into(self, values: Bytes, out: bytearray | memoryview) -> None:
        """Cast into a buffer of the right size, which must not overlap with the values."""
        for source, target in self._blocks(values, out):
            native = target.astype(target.dtype.newbyteorder("="), copy=False)
            _cast(self.before, self.after, source, native)
            if native is not target:  # on a big-endian machine
                target[...] = native

    def losses(self, values: Bytes, cast: Bytes) -> Losses:
        """The effects of the cast, counted.

        Args:
            values: the bytes before.
            cast: the result.
        """
        import numpy

        count = memoryview(values).nbytes // DTYPES[self.before].itemsize
        total = Losses(count)
        if _is_exact(self.before, self.after):
            return total
        bits = _bits_dtype(self.before)
        for source, target in self._blocks(values, cast):
            if _has_table(self.before, self.after) and self.before != "float64":
                fates = _table(self.before, self.after).fates.take(_patterns(self.before, source), mode="clip")
                total += _counted(fates)
            else:
                back = numpy.empty(source.shape, bits)
                _cast(self.after, self.before, target.astype(target.dtype.newbyteorder("="), copy=False), back)
                wide = numpy_dtype(self.before)
                total += _compared(source.view(wide), back.view(wide), saturates=self.after == _SATURATES)
        return total

    def _blocks(self, values: Bytes, out: Bytes) -> Iterator[tuple[Any, Any]]:
        """Both as bits, in blocks: the values before in this machine's byte order, those after little-endian."""
        import numpy

        if not memoryview(values).nbytes:
            return
        native = _bits_dtype(self.before)
        before = numpy.frombuffer(values, native.newbyteorder(">" if self.byteorder == "big" else "<"))
        after = numpy.frombuffer(out, _bits_dtype(self.after).newbyteorder("<"))
        with numpy.errstate(all="ignore"):  # overflow and signalling NaN are expected
            for start in range(0, before.size, _BLOCK):
                yield before[start : start + _BLOCK].astype(native, copy=False), after[start : start + _BLOCK]


def caster(before: str, after: str, *, byteorder: Literal["little", "big"] = "little") -> Caster:
    """What casts values of dtype ``before`` to dtype ``after``.

    Args:
        before: torch name of the values' dtype, such as ``"float32"``.
        after: of the dtype they get.
        byteorder: of the values before.

    Raises:
        DTypeError: there is no such cast; the message lists what there is.
    """
    if before not in CAST_SOURCES:
        raise DTypeError(f"values of {before!r} cannot be cast; possible: {', '.join(CAST_SOURCES)}")
    if after not in CAST_TARGETS:
        raise DTypeError(
            f"values cannot be cast to {after!r}; possible: {', '.join(CAST_TARGETS)}{meant_dtype(after, CAST_TARGETS)}"
        )
    return Caster(before, after, byteorder)


# One block at a time, as bits in this machine's byte order.


def cast_storage(storage: Storage, before: str, after: str) -> Storage:
    """The storage with its values cast as they are read.

    Raises:
        DTypeError: there is no such cast.
    """
    conversion = DTypeConversion(
        storage.source,
        before=DTYPES[before].itemsize,
        after=DTYPES[after].itemsize,
        function=caster(before, after, byteorder=storage.byteorder),
        name=f"storage {storage.key!r}",
        dtype=before,
    )
    return replace(
        storage,
        dtype=after if DTYPES[after].storage_class else None,
        nbytes=conversion.nbytes,
        source=ConvertedRange(conversion, 0, conversion.nbytes),
        crc32=None,
        byteorder="little",
        original=storage.original or storage,
    )


def _cast(before: str, after: str, source: Any, target: Any) -> None:
    """Cast the block ``source`` into the block ``target``."""
    import numpy

    if before == after:
        target[...] = source
        return
    if _has_table(before, after):
        _table(before, after).values.take(_patterns(before, source), out=target, mode="clip")
        return
    wide, result = source.view(numpy_dtype(before)), target.view(numpy_dtype(after))
    narrower = before == "float64" and target.itemsize < 4
    numpy.copyto(result, wide.astype(numpy.float32) if narrower else wide, casting="unsafe")
    nan = numpy.isnan(wide if source.itemsize >= 4 else result)
    if nan.any():
        sign = source[nan] >> (8 * source.itemsize - 1)
        target[nan] = _quiet_nan(after) | (sign.astype(target.dtype) << (8 * target.itemsize - 1))


def _compared(values: Any, back: Any, *, saturates: bool) -> Losses:
    """The losses of values that were cast; ``back`` has the results in their own type; `Losses.values` is 0."""
    import numpy

    differs = values != back
    rounded = int(numpy.count_nonzero(differs))
    if not rounded:
        return Losses()
    overflowed = 0
    if saturates or not numpy.isfinite(back).all():
        nan = int(numpy.count_nonzero(numpy.isnan(values)))  # which differs from itself
        past = ~numpy.isfinite(back)
        if saturates:
            past |= numpy.abs(values) > _PAST
        overflowed = int(numpy.count_nonzero(past & differs)) - nan
        rounded -= overflowed + nan
    return Losses(0, overflowed, rounded, int(numpy.count_nonzero((back == 0) & differs)))


def _counted(fates: Any) -> Losses:
    """The losses of values by their fates; `Losses.values` is 0."""
    import numpy

    lost = int(numpy.count_nonzero(fates))
    if not lost:
        return Losses()
    overflowed, underflowed = (int(numpy.count_nonzero(fates == fate)) for fate in (_OVERFLOWED, _UNDERFLOWED))
    return Losses(0, overflowed, lost - overflowed, underflowed)


# Tables.


class _Table(NamedTuple):
    values: Any
    """The bits after the cast, for each pattern."""
    fates: Any
    """0 where the value is kept, else what became of it."""


def _has_table(before: str, after: str) -> bool:
    """Whether a cast goes through a table; bfloat16 is widened to float32 by a shift, which is faster."""
    if DTYPES[before].itemsize <= 2:
        return before != after and (before, after) != ("bfloat16", "float32")
    return DTYPES[after].itemsize == 1


def _patterns(before: str, source: Any) -> Any:
    """The place in the table of each value of a block."""
    import numpy

    if source.itemsize <= 2:
        return source
    if before == "float64":
        source = source.view(numpy.float64).astype(numpy.float32).view(numpy.uint32)
    upper = source & 0xFFFF
    upper += 0xFFFF  # carries into the lowest bit of the upper half where any bit is set
    upper |= source
    upper >>= 16
    return upper.astype(numpy.uint16)


@functools.cache
def _table(before: str, after: str) -> _Table:
    """The table of a cast from 8 or 16 bits, or from more through bfloat16 rounded to odd."""
    import numpy

    stored = before if DTYPES[before].itemsize <= 2 else "bfloat16"
    bits = _bits_dtype(stored)
    with numpy.errstate(all="ignore"):
        values = numpy.arange(1 << (8 * bits.itemsize)).astype(bits).view(numpy_dtype(stored)).astype(numpy.float32)
        cast = values.astype(numpy_dtype(after))
        back = cast.astype(numpy.float32)
        nan = numpy.isnan(values)
        past = ~nan & ~numpy.isfinite(back) & (back != values)
        result = cast.view(_bits_dtype(after))
        sign = numpy.signbit(values).astype(result.dtype) << (8 * result.itemsize - 1)
        if after == _SATURATES:
            result[past] = _LARGEST | sign[past]
        result[nan] = _quiet_nan(after) | sign[nan]
    fates = numpy.zeros(values.shape, numpy.uint8)
    fates[(back != values) & ~nan] = _ROUNDED
    fates[(back != values) & (back == 0)] = _UNDERFLOWED
    fates[past] = _OVERFLOWED
    return _Table(result, fates)


@functools.cache
def _is_exact(before: str, after: str) -> bool:
    """Whether every value is kept, whatever it is."""
    if DTYPES[before].itemsize > 2 or not _has_table(before, after):
        return DTYPES[before].itemsize <= DTYPES[after].itemsize
    return not _table(before, after).fates.any()


@functools.cache
def _quiet_nan(name: str) -> Any:
    """The bits of the NaN without sign and payload."""
    import numpy

    return numpy.array([numpy.nan], numpy.float32).astype(numpy_dtype(name)).view(_bits_dtype(name))[0]


def _bits_dtype(name: str) -> Any:
    """The unsigned integers as wide as a dtype."""
    import numpy

    return numpy.dtype(f"u{DTYPES[name].itemsize}")


def numpy_dtype(name: str) -> Any:
    """The numpy dtype of a torch name; importing ml_dtypes makes numpy know its types."""
    import numpy

    known = DTYPES[name].numpy or name
    if known.startswith("ml_dtypes."):
        import ml_dtypes

        return numpy.dtype(getattr(ml_dtypes, known.removeprefix("ml_dtypes.")))
    return numpy.dtype(known)
