"""What to do about a checkpoint that does not fit: the one cause behind many names or shapes."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.rewrite.like import Fitting
from ckptkit.verifier.measure import ShapeMismatch

__all__ = ["head_classes", "renamings_that_fit"]


def renamings_that_fit(fittings: Sequence[Fitting], expected: int) -> list[Fitting]:
    """The changes of names that bring most of the model's together, of different tensors but equally many.

    Args:
        fittings: of the weights, the one without a change first.
        expected: how many names the model has; a change has to bring together more than half, and more than none does.
    """

    def together(fitting: Fitting) -> int:
        return len(fitting.sources) + len(fitting.differing)

    enough = max(expected // 2, together(fittings[0]))
    changes = [fitting for fitting in fittings[1:] if together(fitting) > enough]
    most = max((len(fitting.sources) for fitting in changes), default=0)
    return [fitting for fitting in changes if len(fitting.sources) == most]


def head_classes(mismatches: Sequence[ShapeMismatch]) -> tuple[int, int] | None:
    """The two numbers of classes when a head of another size explains all mismatches: the file's, the reference's.

    So it is when all differ in their first dimension alone, and in the same proportion (a detector's
    box head has four outputs for each class).
    """
    for m in mismatches:
        if not m.checkpoint or len(m.checkpoint) != len(m.reference) or m.checkpoint[1:] != m.reference[1:]:
            return None
    ours = min((m.checkpoint[0] for m in mismatches), default=0)
    theirs = min((m.reference[0] for m in mismatches), default=0)
    if not ours or any(m.checkpoint[0] * theirs != m.reference[0] * ours for m in mismatches):
        return None
    return ours, theirs
