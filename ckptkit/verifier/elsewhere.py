"""What would fit where this does not: other weights in the same file, or another reference."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ckptkit.architectures import Architecture, identify
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import CkptkitError
from ckptkit.formats import read
from ckptkit.normalize.wrappers import unwrapped
from ckptkit.rewrite.prefix import StripModule
from ckptkit.verifier.advice import matching
from ckptkit.verifier.context import Context

__all__ = ["architecture_that_fits", "command_for", "other_weights", "section_that_fits"]

_MAX_SECTIONS = 16
"""Sections that are tried; each is read as if it had been chosen."""


def other_weights(checkpoint: Checkpoint) -> list[str]:
    """The sections of the file that hold weights and are not the one selected."""
    return [s.path for s in checkpoint.sections if s.is_weights and not s.selected]


def section_that_fits(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], already: int
) -> tuple[str, int, bool] | None:
    """The other section of which most tensors fit: its path, how many, and whether wrappers have to come off.

    Args:
        checkpoint: with the section that was selected.
        expected: the model's names and shapes.
        already: how many of the selected section's tensors fit; another has to have more, and more than half.
    """
    best: tuple[str, int, bool] | None = None
    most = max(already, len(expected) // 2)
    for path in other_weights(checkpoint)[:_MAX_SECTIONS]:
        try:
            other, file = read(checkpoint.origin.path, section=path)
        except CkptkitError:
            continue  # it cannot be chosen, so it cannot be advised
        try:
            for stripped in (False, True):
                subject = StripModule()(other) if stripped else other
                matched = matching(subject.state_dict, expected)
                if matched > most:
                    best, most = (path, matched, stripped), matched
        except CkptkitError:
            continue  # two names would become one without the wrapper
        finally:
            file.close()
    return best


def architecture_that_fits(checkpoint: Checkpoint, spec: str | None) -> Architecture | None:
    """The known architecture that has the names and shapes, wrappers aside; of several, the reference's own.

    Args:
        checkpoint: with the section that was selected.
        spec: the reference that was named, which may fit when built with other arguments.
    """
    exact = [found for found in identify(checkpoint.state_dict) if found.exact and not found.prefix]
    return next((found for found in exact if found.reference == spec), exact[0] if exact else None)


def command_for(checkpoint: Checkpoint, architecture: Architecture, context: Context) -> str:
    """The verification of the file against an architecture, ready to be pasted."""
    options = ["--model", architecture.reference]
    for name, value in architecture.args.items():
        options += ["--model-arg", f"{name}={value}"]
    stripped = ["--strip-module"] * any(unwrapped(name) != name for name in checkpoint.state_dict)
    return shlex.join(["ckptkit", "verify", checkpoint.origin.path, *options, *context.taken(stripped)])
