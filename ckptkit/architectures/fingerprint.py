"""What a model's names and shapes come down to: two digests and a sketch, the same in every Python.

- `names_digest`: of the sorted names
- `shapes_digest`: of the shapes in that order, with the dimensions left out that an argument decides
- `sketch`: the `SKETCH` smallest hashes of (name, shape) pairs.  The share two models' sketches have in
  common estimates the share of pairs the models have in common (A. Broder, "On the resemblance and
  containment of documents", 1997).

``num_batches_tracked`` is no part of any: old files do not have it, and nothing depends on it.

Both digests are the CRC-32 and the Adler-32 of the text.  They are not safe against someone who looks for
collisions, who could as well have saved the model itself: what is found is a hint, never a reason to
trust a file.  (`hashlib` takes as long to import as everything else here takes to run.)
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = ["SKETCH", "Dimension", "Shapes", "names_digest", "shapes_digest", "similarity", "sketch", "weights_of"]

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
    """The smallest hashes, in ascending order; fewer than `SKETCH` where there are fewer tensors.  None is 0."""
    hashes = {zlib.crc32(f"{n} {s}".encode("utf-8", "surrogatepass")) * _MIX & 0xFFFFFFFF for n, s in shapes.items()}
    return sorted(hashes - {0})[:SKETCH]


def similarity(first: Collection[int], second: Collection[int]) -> float:
    """An estimate of how much of two models is the same, from their sketches: 0 to 1."""
    smallest = sorted({*first, *second})[:SKETCH]
    return len({*first} & {*second} & {*smallest}) / len(smallest) if smallest else 0.0


def _digest(text: str) -> str:
    data = text.encode("utf-8", "surrogatepass")
    return f"{zlib.crc32(data):08x}{zlib.adler32(data):08x}"
