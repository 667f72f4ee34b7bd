"""The index of known architectures, and what a model's names and shapes come down to in it.

Two digests and a sketch, the same in every Python:

- `names_digest`: of the sorted names
- `shapes_digest`: of the shapes in that order, with the dimensions left out that an argument decides
- `sketch`: the `SKETCH` smallest hashes of (name, shape) pairs.  The share two models' sketches have in
  common estimates the share of pairs the models have in common (A. Broder, "On the resemblance and
  containment of documents", 1997).

``num_batches_tracked`` is not part of any: old files do not have it, and nothing depends on it.

Both digests are the CRC-32 and the Adler-32 of the text.  They are not safe against someone who looks for collisions,
who could as well have saved the model itself: a match is a hint, never a reason to trust a file.  (`hashlib` takes as
long to import as everything else here takes to run.)

The index has a line of JSON for each model, and its sketch in a file beside it.
``python tests/support/index_maker.py`` writes them.  A line is

    {"name": "resnet18", "args": {}, "tensors": 102, "names": digest, "shapes": digest,
     "free": {"num_classes": {"default": 1000, "linear": [[tensor, dimension, a, b], ...]}},
     "head": ["fc"], "trunk": digest, "trunk_shapes": digest}

- ``names``, ``shapes``: the digests; free dimensions are masked
- ``free``: the arguments that decide a dimension and nothing else.  ``linear``: the dimension is a x value + b,
  as of classes; ``square``: it is (value / a) ** 2 + b, as the positions of an image cut into patches
- ``head``: the modules with a dimension that ``num_classes`` decides; ``trunk``: the names without them

The first line says what the index was made from.  Line n of the sketches belongs to row n: the hashes
as 32-bit little-endian integers in base64, 0 where the model has fewer tensors.
"""

from __future__ import annotations

import binascii
import json
import os
import sys
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import compress, count
from math import isqrt
from typing import Any, Literal, NamedTuple

__all__ = [
    "LIBRARIES",
    "SKETCH",
    "ArchitectureIndex",
    "Dimension",
    "Free",
    "Row",
    "Shapes",
    "load",
    "names_digest",
    "shapes_digest",
    "similarity",
    "sketch",
    "weights_of",
]

SKETCH = 48
"""Hashes in a sketch.  The estimate is right to about 7 %."""

Shapes = Mapping[str, tuple[int, ...]]
"""Names of tensors, and their shapes."""

Dimension = tuple[int, int]
"""A tensor, by its place among the sorted names, and one of its dimensions."""

_MIX = 2654435761
"""An odd number (2**32 over the golden ratio): CRCs of similar names differ in patterns, their products do not."""


def weights_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """What counts, sorted by name."""
    return dict(sorted(pair for pair in shapes if not pair[0].endswith("num_batches_tracked")))


def names_digest(names: Iterable[str]) -> str:
    """Sixteen hexadecimal digits for names that are sorted."""
    return _digest("\n".join(names))


def shapes_digest(shapes: Sequence[tuple[int, ...]], masked: Collection[Dimension] = ()) -> str | None:
    """Sixteen hexadecimal digits for shapes in the order of their names.

    Args:
        shapes: of the tensors.
        masked: dimensions that may have any size.

    Returns:
        ``None`` where a shape has no such dimension.
    """
    lines = [str(shape) for shape in shapes]
    for tensor in {tensor for tensor, _ in masked}:
        axes = {axis for index, axis in masked if index == tensor}
        if tensor >= len(shapes) or max(axes) >= len(shapes[tensor]):
            return None
        lines[tensor] = str(tuple(-1 if axis in axes else size for axis, size in enumerate(shapes[tensor])))
    return _digest("\n".join(lines))


def sketch(shapes: Shapes) -> list[int]:
    """The smallest hashes other than 0, in ascending order; fewer than `SKETCH` if there are fewer tensors."""
    hashes = {zlib.crc32(f"{n} {s}".encode("utf-8", "surrogatepass")) * _MIX & 0xFFFFFFFF for n, s in shapes.items()}
    return sorted(hashes - {0})[:SKETCH]


def similarity(first: Collection[int], second: Collection[int]) -> float:
    """An estimate of how much of two models is the same, from their sketches: 0 to 1."""
    smallest = sorted({*first, *second})[:SKETCH]
    return len({*first} & {*second} & {*smallest}) / len(smallest) if smallest else 0.0


def _digest(text: str) -> str:
    data = text.encode("utf-8", "surrogatepass")
    return f"{zlib.crc32(data):08x}{zlib.adler32(data):08x}"


LIBRARIES = ("torchvision", "timm")
"""The libraries there is an index of; where two have the same model, the first is named first."""

_MAX_ARGUMENT = 1 << 31
"""No model has so many classes, or so large images."""


class Free(NamedTuple):
    """An argument that decides dimensions.

    Attributes:
        default: its usual value.
        form: how a dimension follows from it.
        at: tensor, dimension, and the two numbers of the form.
    """

    default: int
    form: Literal["linear", "square"]
    at: tuple[tuple[int, int, int, int], ...]

    def solve(self, shapes: Sequence[tuple[int, ...]]) -> int | None:
        """The value that gives these shapes; ``None`` where no value gives all of them."""
        value: int | None = None
        for tensor, axis, a, b in self.at:
            rest = shapes[tensor][axis] - b
            if self.form == "linear":
                found, inexact = divmod(rest, a)
            else:
                side = isqrt(max(rest, 0))
                found, inexact = side * a, rest - side * side
            if inexact or not 0 < found < _MAX_ARGUMENT or value not in (None, found):
                return None
            value = found
        return value


class Row(NamedTuple):
    """A line of the index; see the module's docstring."""

    name: str
    args: Mapping[str, object]
    tensors: int
    names: str
    shapes: str
    free: Mapping[str, Free]
    head: tuple[str, ...]
    trunk: str
    trunk_shapes: str

    @property
    def masked(self) -> frozenset[Dimension]:
        """The free dimensions."""
        return frozenset((tensor, axis) for free in self.free.values() for tensor, axis, _, _ in free.at)

    @property
    def trunk_free(self) -> dict[str, Free]:
        """The free arguments of the trunk: tensors are counted without the head's."""
        classes = self.free.get("num_classes")
        head = sorted({tensor for tensor, *_ in classes.at}) if classes else []
        return {
            name: Free(
                default=free.default,
                form=free.form,
                at=tuple((t - sum(h < t for h in head), *rest) for t, *rest in free.at if t not in head),  # type: ignore[misc]
            )
            for name, free in self.free.items()
            if name != "num_classes" and any(t not in head for t, *_ in free.at)
        }


class ArchitectureIndex:
    """One library's models.  Only the lines that are asked for are parsed."""

    def __init__(self, library: str, folder: str | os.PathLike[str] | None = None) -> None:
        self.library = library
        self._path = os.path.join(folder or os.path.dirname(__file__), library)
        with open(f"{self._path}.jsonl", encoding="utf-8") as lines:  # noqa: PTH123 - ours; pathlib takes long to import
            self._text = lines.read()
        self._lines: list[str] | None = None
        self._sketches: array[int] | None = None

    def having(self, key: Literal["names", "trunk"], digest: str) -> Iterator[tuple[int, Row]]:
        """The rows with this digest, with their numbers, in the order of the index."""
        wanted, end = f'"{key}": "{digest}"', 0
        while (found := self._text.find(wanted, end)) >= 0:
            start, end = self._text.rfind("\n", 0, found) + 1, self._text.find("\n", found)
            yield self._text.count("\n", 0, start) - 1, _row(json.loads(self._text[start:end]))

    def rows(self) -> list[Row]:
        """All rows."""
        return [_row(json.loads(line)) for line in self._all_lines()]

    def row(self, number: int) -> Row:
        """The row of this number."""
        return _row(json.loads(self._all_lines()[number]))

    def known(self, hashes: Iterable[int]) -> set[int]:
        """Those of these hashes that any row's sketch has; few models have any, and `sharing` takes longer."""
        return {*hashes}.intersection(self._all_sketches())

    def sharing(self, hashes: Collection[int]) -> dict[int, int]:
        """How many of these hashes each row's sketch has, for rows that have any."""
        sketches = self._all_sketches()
        result: dict[int, int] = {}
        for place in compress(count(), map({*hashes}.__contains__, sketches)) if hashes else ():
            result[place // SKETCH] = result.get(place // SKETCH, 0) + 1
        return result

    def sketch(self, number: int) -> list[int]:
        """The sketch of the row of this number."""
        return [value for value in self._all_sketches()[number * SKETCH : (number + 1) * SKETCH] if value]

    def _all_lines(self) -> list[str]:
        if self._lines is None:
            self._lines = self._text.splitlines()[1:]
        return self._lines

    def _all_sketches(self) -> array[int]:
        if self._sketches is None:
            with open(f"{self._path}.sketches", "rb") as lines:  # noqa: PTH123 - the same
                self._sketches = array("I", binascii.a2b_base64(lines.read()))
            if sys.byteorder == "big":
                self._sketches.byteswap()
        return self._sketches


@cache
def load(library: str) -> ArchitectureIndex:
    """The index of one of `LIBRARIES`, read once."""
    return ArchitectureIndex(library)


def _row(line: dict[str, Any]) -> Row:
    free = {}
    for name, facts in line["free"].items():
        form: Literal["linear", "square"] = "linear" if "linear" in facts else "square"
        free[name] = Free(default=facts["default"], form=form, at=tuple((t, x, a, b) for t, x, a, b in facts[form]))
    return Row(**{**line, "free": free, "head": tuple(line["head"])})
