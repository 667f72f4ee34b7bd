"""What to do about a checkpoint that does not fit.

Many names or shapes may have one cause; other weights in the file, or another reference, might fit.
Long lists of names are folded by module for messages; documents keep them whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from ckptkit.architectures import Architecture, identify
from ckptkit.bytesource import Source
from ckptkit.checkpoint import Checkpoint
from ckptkit.conversion.options import read_others
from ckptkit.normalize.modules import unwrapped
from ckptkit.rewrite.like import Fitting, Like
from ckptkit.rewrite.names import module_paths
from ckptkit.verifier.context import Context
from ckptkit.verifier.measure import ShapeMismatch

__all__ = ["architecture_that_fits", "command_for", "folded", "head_classes", "renamings_that_fit", "sections_that_fit"]


def renamings_that_fit(fittings: Sequence[Fitting], expected: int) -> list[Fitting]:
    """The changes of names that bring most of the model's together, of different tensors but equally many.

    Args:
        fittings: of the weights, the one without a change first.
        expected: how many names the model has; a change has to match more than half, and more than no change does.
    """

    def together(fitting: Fitting) -> int:
        return len(fitting.sources) + len(fitting.differing)

    enough = max(expected // 2, together(fittings[0]))
    changes = [fitting for fitting in fittings[1:] if together(fitting) > enough]
    most = max((len(fitting.sources) for fitting in changes), default=0)
    return [fitting for fitting in changes if len(fitting.sources) == most]


def head_classes(mismatches: Sequence[ShapeMismatch]) -> tuple[int, int] | None:
    """The two numbers of classes when a head of another size explains all mismatches: the file's, the reference's.

    That is the case if all differ only in their first dimension, and in the same proportion (a detector's box head has
    four outputs for each class).
    """
    for m in mismatches:
        if not m.checkpoint or len(m.checkpoint) != len(m.reference) or m.checkpoint[1:] != m.reference[1:]:
            return None
    ours = min((m.checkpoint[0] for m in mismatches), default=0)
    theirs = min((m.reference[0] for m in mismatches), default=0)
    if not ours or any(m.checkpoint[0] * theirs != m.reference[0] * ours for m in mismatches):
        return None
    return ours, theirs


def sections_that_fit(
    checkpoint: Checkpoint, file: Source | None, like: Like, already: int
) -> list[tuple[str, Fitting]]:
    """The other sections that most tensors fit, equally many: their paths, and how.

    Args:
        checkpoint: with the section that was selected.
        file: the open file; ``None``: no other section can be read.
        like: the model.
        already: how many of the selected section's tensors fit; another has to have more, and more than half.
    """
    found = [
        (path, max(like.fittings(other.state_dict), key=lambda fitting: len(fitting.sources)))
        for path, other in (() if file is None else read_others(checkpoint, file))
    ]
    most = max((len(fitting.sources) for _, fitting in found), default=0)
    if most <= max(len(like.expected) // 2, already):
        return []
    return [(path, fitting) for path, fitting in found if len(fitting.sources) == most]


def architecture_that_fits(checkpoint: Checkpoint, spec: str | None) -> Architecture | None:
    """The known architecture that has the names and shapes, wrappers aside; of several, the reference's own.

    Args:
        checkpoint: with the section that was selected.
        spec: the reference that was named, which may fit when built with other arguments.
    """
    exact = [found for found in identify(checkpoint.state_dict) if found.exact and not found.prefix]
    return next((found for found in exact if found.reference == spec), exact[0] if exact else None)


def command_for(checkpoint: Checkpoint, architecture: Architecture, context: Context) -> str | None:
    """The verification of the file against an architecture, ready to be pasted; see `Context.command`."""
    stripped = ["--strip-module"] * any(unwrapped(name) != name for name in checkpoint.state_dict)
    reference, args = architecture.reference, architecture.args
    return context.command(checkpoint.origin.path, *stripped, model=reference, **args)


def folded(names: Collection[str], among: Collection[str]) -> list[str]:
    """The names, with ``layer4.* (30)`` instead of those of a module all of whose names are among them.

    Args:
        names: for example the missing ones.
        among: all names there are on that side; those given are of them.
    """
    everything = Counter(path for name in among for path in module_paths(name))
    given = Counter(path for name in names for path in module_paths(name))
    lines: dict[str, None] = {}
    for name in names:
        whole = next((path for path in module_paths(name) if given[path] == everything[path] > 1), None)
        lines[name if whole is None else f"{whole}.* ({given[whole]:,})"] = None
    return list(lines)
