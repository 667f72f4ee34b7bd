"""What to do about a checkpoint that does not fit: the one cause behind many names or shapes."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.checkpoint import StateDict
from ckptkit.rewrite.like import Fitting, Like
from ckptkit.verifier.measure import ShapeMismatch

__all__ = ["head_classes", "renamings_that_fit"]


def renamings_that_fit(state_dict: StateDict, like: Like, already: int = 0) -> list[Fitting]:
    """The changes of names that make most of the model's tensors fit, of different tensors but equally many.

    Args:
        state_dict: the weights.
        like: the model.
        already: how many fit as they are; a change has to bring more, and more than half.
    """
    changes = [fitting for fitting in like.fittings(state_dict) if fitting.options]
    most = max((len(fitting.sources) for fitting in changes), default=0)
    if most <= max(len(like.expected) // 2, already):
        return []
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
