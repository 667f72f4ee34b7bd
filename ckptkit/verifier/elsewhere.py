"""What would fit where this does not: other weights in the same file, or another reference."""

from __future__ import annotations

from ckptkit.architectures import Architecture, identify
from ckptkit.checkpoint import Checkpoint
from ckptkit.conversion.like import read_others
from ckptkit.normalize.wrappers import unwrapped
from ckptkit.rewrite.like import Fitting, Like
from ckptkit.verifier.context import Context

__all__ = ["architecture_that_fits", "command_for", "sections_that_fit"]


def sections_that_fit(checkpoint: Checkpoint, like: Like, already: int) -> list[tuple[str, Fitting]]:
    """The other sections of which most tensors fit, equally many: their paths, and how.

    Args:
        checkpoint: with the section that was selected.
        like: the model.
        already: how many of the selected section's tensors fit; another has to have more, and more than half.
    """
    found = [
        (path, max(like.fittings(other.state_dict), key=lambda fitting: len(fitting.sources)))
        for path, other in read_others(checkpoint)
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
